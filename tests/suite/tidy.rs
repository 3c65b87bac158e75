//! The layout, held to what is written about it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Who may name whom, by the first module after `crate::`, and does. Everything may name `error` and `words`.
const MAY_NAME: [(&str, &[&str]); 17] = [
    (
        "cli",
        &[
            "cli", "config", "data", "demo", "device", "fnv", "infer", "lora", "model", "ops", "shell",
            "train",
        ],
    ),
    ("config", &["data", "device", "lora", "shell", "train"]),
    ("data", &["fnv", "left_out", "ops", "shell"]),
    ("demo", &["data", "model"]),
    ("device", &[]),
    ("error", &[]),
    ("fnv", &[]),
    ("infer", &["data", "lock", "model", "ops"]),
    ("left_out", &[]),
    ("lock", &[]),
    ("lora", &["model", "ops"]),
    ("main", &[]),
    ("model", &["ops"]),
    ("ops", &["left_out"]),
    ("shell", &[]),
    ("train", &["data", "lock", "lora", "model", "ops", "shell"]),
    ("words", &[]),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The Rust files below a folder, with their paths relative to it.
fn rust_files(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                files.push((path.strip_prefix(folder).unwrap().to_owned(), text));
            }
        }
    }
    files
}

/// The names of the files of a folder with this extension, without it.
fn stems(folder: &str, extension: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(root().join(folder)).unwrap().map(|e| e.unwrap().path());
    let of_kind = entries.filter(|path| path.extension().is_some_and(|e| e == extension));
    of_kind.map(|path| path.file_stem().unwrap().to_string_lossy().into_owned()).collect()
}

/// What is named after every `crate::` of a file that is no macro's, comments left out.
fn named_modules(text: &str) -> impl Iterator<Item = &str> {
    let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    code.flat_map(|line| {
        let named = line.match_indices("crate::").map(|(at, path)| (&line[..at], &line[at + path.len()..]));
        let own = named
            .filter(|(before, _)| !before.ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$'));
        own.map(|(_, rest)| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default())
    })
}

#[test]
fn modules_name_only_what_they_may() {
    let mut wrong = Vec::new();
    let mut used = BTreeSet::new();
    for (path, text) in rust_files(&root().join("src")) {
        let first = path.components().next().unwrap().as_os_str().to_string_lossy();
        let module = first.trim_end_matches(".rs");
        if module == "lib" {
            continue;
        }
        let (module, may) = MAY_NAME
            .iter()
            .find(|(name, _)| *name == module)
            .unwrap_or_else(|| panic!("{module} is not in the table"));
        for named in named_modules(&text) {
            if may.contains(&named) {
                used.insert((*module, named.to_owned()));
            } else if named != *module && !["error", "words"].contains(&named) {
                wrong.push(format!("{}: {named}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "not allowed:\n{}", wrong.join("\n"));
    let rights =
        MAY_NAME.iter().flat_map(|(module, may)| may.iter().map(|named| (*module, named.to_string())));
    let unused: Vec<_> = rights.filter(|right| !used.contains(right)).collect();
    assert!(unused.is_empty(), "not needed: {unused:?}");
}

#[test]
fn every_shader_has_its_op_and_its_test() {
    let (ops, tests) = (stems("src/ops", "rs"), stems("tests/suite/gpu", "rs"));
    let mut shaders = stems("shaders", "wgsl");
    shaders.extend(stems("shaders", "cu"));
    assert!(shaders.len() >= 4, "{shaders:?}");
    for shader in shaders {
        let named = |names: &BTreeSet<String>| names.iter().any(|name| shader.starts_with(name.as_str()));
        assert!(named(&ops), "shaders/{shader} has no op of its name");
        assert!(named(&tests), "shaders/{shader} has no test of its op's name");
    }
}

#[test]
fn only_the_launch_knows_how_shaders_are_launched() {
    for (path, text) in rust_files(&root().join("src")) {
        let (file, has) = (path.display(), |word| text.contains(word));
        let is_launch = path.ends_with("ops/kernel.rs") || path.ends_with("ops/kernel/cuda.rs");
        assert!(!has("KernelArguments") || is_launch, "{file} launches shaders itself");
        assert!(!has("launch_unchecked") || path.starts_with("ops"), "{file} launches kernels itself");
    }
}

const READMES: [&str; 3] = ["README.md", "benches/README.md", "tests/README.md"];

/// Flags of other programs in them: cargo's, `hf download`'s, TensorBoard's, uv's, vLLM's, llama.cpp's, `benches/peers.py`'s.
const NOT_OURS: [&str; 19] = [
    "base",
    "bench",
    "enable-lora",
    "exclude",
    "features",
    "help",
    "local-dir",
    "logdir",
    "lora",
    "lora-modules",
    "make",
    "max-lora-rank",
    "outfile",
    "parity",
    "release",
    "run",
    "shape",
    "test",
    "with",
];

#[test]
fn every_flag_of_a_readme_exists() {
    let command = orpo_wgpu::cli::command();
    let known: BTreeSet<String> = command
        .get_subcommands()
        .flat_map(|c| c.get_arguments().filter_map(|a| a.get_long().map(str::to_owned)).collect::<Vec<_>>())
        .chain(NOT_OURS.map(str::to_owned))
        .collect();
    for readme in READMES {
        let text = fs::read_to_string(root().join(readme)).unwrap();
        let words = text.split(|c: char| c.is_whitespace() || "`(),;:".contains(c));
        for flag in words.filter_map(|word| word.strip_prefix("--")).filter(|flag| !flag.is_empty()) {
            assert!(known.contains(flag), "{readme} shows --{flag}, which is no flag");
        }
    }
}

/// The last part of the address of each heading, as GitHub makes it.
fn anchors(markdown: &str) -> BTreeSet<String> {
    let (mut headings, mut is_code) = (Vec::new(), false);
    for line in markdown.lines() {
        is_code ^= line.starts_with("```");
        headings.extend(line.strip_prefix('#').filter(|_| !is_code));
    }
    headings
        .into_iter()
        .map(|heading| heading.trim_start_matches('#').trim().to_lowercase().replace(' ', "-"))
        .map(|heading| heading.chars().filter(|&c| c.is_alphanumeric() || "-_".contains(c)).collect())
        .collect()
}

#[test]
fn every_link_of_a_readme_leads_somewhere() {
    for readme in READMES {
        let path = root().join(readme);
        let text = fs::read_to_string(&path).unwrap();
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let mut n_links = 0;
        for link in links.filter(|link| !link.starts_with("https://")) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let file = if file.is_empty() { path.clone() } else { path.with_file_name(file) };
            let there = fs::read_to_string(&file).unwrap_or_else(|e| panic!("{readme}: {link}: {e}"));
            assert!(anchor.is_empty() || anchors(&there).contains(anchor), "{readme}: {link} leads nowhere");
            n_links += 1;
        }
        assert!(n_links > 0, "{readme} has no links");
    }
}
