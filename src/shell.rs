//! Commands that are pasted into a shell.

use std::path::{Path, PathBuf};

/// A path as it is pasted.
pub(crate) fn pasted(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_alphanumeric() || "._/-+:=@,\\".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) { text } else { quoted(&text) }
}

/// A text in quotes, within which the shell changes nothing.
pub(crate) fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A file beside this one that is not there yet, so that a command may write it: `run.json` for `run.yaml`, or `run-2.json`.
///
/// `suffix` follows the name without its extension.
pub(crate) fn unused_beside(path: &Path, suffix: &str, extension: &str) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let named = |number: &str| path.with_file_name(format!("{stem}{suffix}{number}.{extension}"));
    let numbers = (2..).map(|n: usize| format!("-{n}"));
    let mut names = std::iter::once(String::new()).chain(numbers).map(|number| named(&number));
    // What is a link to nowhere is there as well. The numbers do not end, so that one is always found.
    names.find(|name| name.symlink_metadata().is_err()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_can_be_pasted() {
        let pasted = |path: &str| pasted(Path::new(path));
        assert_eq!(pasted("output/v0-2026/checkpoint-4"), "output/v0-2026/checkpoint-4");
        assert_eq!(pasted("my runs/it's"), r"'my runs/it'\''s'");
    }

    #[test]
    fn what_is_there_is_not_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let beside = |name: &str, suffix: &str| {
            let path = unused_beside(&folder.path().join(name), suffix, "json");
            path.strip_prefix(folder.path()).unwrap().display().to_string()
        };
        assert_eq!(beside("run.yaml", ""), "run.json");
        assert_eq!(beside("run", "-messages"), "run-messages.json");
        for name in ["run.json", "run-2.json"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!(beside("run.yaml", ""), "run-3.json");
        assert_eq!(beside("run.json", ""), "run-3.json");
    }
}
