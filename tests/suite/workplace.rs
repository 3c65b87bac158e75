//! A folder to run the binary in, with a model and pairs that may be spoiled.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// A command line of the binary.
pub(crate) fn orpo_wgpu(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_orpo-wgpu"));
    command.args(args);
    command
}

/// A command as a shell takes it.
#[cfg(unix)]
pub(crate) fn quoted(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| format!("'{}'", word.to_string_lossy())).collect::<Vec<_>>().join(" ")
}

/// A file or folder of the golden cases.
pub(crate) fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/goldens").join(path)
}

/// A folder with a copy of the `gqa` case's model and pairs, to be spoiled.
pub(crate) struct Workplace(pub(crate) TempDir);

impl Workplace {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("model")).unwrap();
        for entry in fs::read_dir(fixture("gqa/model")).unwrap() {
            let from = entry.unwrap().path();
            fs::copy(&from, folder.path().join("model").join(from.file_name().unwrap())).unwrap();
        }
        fs::copy(fixture("gqa/pairs.jsonl"), folder.path().join("pairs.jsonl")).unwrap();
        Self(folder)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs `train` for two steps on the model and the pairs of this folder, with these flags on top; on the CPU, as it is mostly not the
    /// device that is tested.
    pub(crate) fn train(&self, flags: &[&str]) -> Output {
        self.train_command(flags).output().unwrap()
    }

    pub(crate) fn train_command(&self, flags: &[&str]) -> Command {
        let mut command = orpo_wgpu(&["train"]);
        let base = [
            ("--model_id_or_path", "model"),
            ("--dataset", "pairs.jsonl"),
            ("--device", "cpu"),
            ("--output_dir", "out"),
            ("--add_output_dir_suffix", "false"),
            ("--overwrite_output_dir", "true"),
            ("--max_steps", "2"),
            ("--warmup_ratio", "0"),
        ];
        for (flag, value) in base {
            if !flags.contains(&flag) {
                command.args([flag, value]);
            }
        }
        command.args(flags).current_dir(self.0.path());
        command
    }

    /// Everything below the output folder.
    pub(crate) fn written(&self) -> Vec<String> {
        let mut files = Vec::new();
        let mut folders = vec![self.path("out")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                if entry.path().is_dir() {
                    folders.push(entry.path());
                }
                files.push(entry.path().strip_prefix(self.path("out")).unwrap().display().to_string());
            }
        }
        files.sort();
        files
    }
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub(crate) fn write_pairs(workplace: &Workplace, text: &str) {
    fs::write(workplace.path("pairs.jsonl"), text).unwrap();
}
