//! The layout, held to what is written about it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Who may import whom, by the first module of a `use crate::` line. Everything may import `error`.
const MAY_IMPORT: [(&str, &[&str]); 14] = [
    ("cli", &["cli", "config", "data", "demo", "device", "infer", "lora", "model", "ops", "shell", "train"]),
    ("config", &["data", "device", "lora", "shell", "train"]),
    ("data", &["left_out", "ops", "shell"]),
    ("demo", &["data", "model"]),
    ("device", &[]),
    ("error", &[]),
    ("infer", &["data", "lora", "model", "ops"]),
    ("left_out", &[]),
    ("lora", &["model", "ops"]),
    ("main", &[]),
    ("model", &["ops"]),
    ("ops", &["left_out"]),
    ("shell", &[]),
    ("train", &["data", "lora", "model", "ops"]),
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

#[test]
fn modules_import_only_what_they_may() {
    let mut wrong = Vec::new();
    let mut n_imports = 0;
    for (path, text) in rust_files(&root().join("src")) {
        let first = path.components().next().unwrap().as_os_str().to_string_lossy();
        let module = first.trim_end_matches(".rs");
        if module == "lib" {
            continue;
        }
        let (_, may) = MAY_IMPORT
            .iter()
            .find(|(name, _)| *name == module)
            .unwrap_or_else(|| panic!("{module} is not in the table"));
        for line in text.lines().map(str::trim) {
            let Some(import) =
                line.strip_prefix("use crate::").or_else(|| line.strip_prefix("pub use crate::"))
            else {
                continue;
            };
            n_imports += 1;
            let imported = import.split([':', ';', '{']).next().unwrap();
            if imported != module && imported != "error" && !may.contains(&imported) {
                wrong.push(format!("{}: {line}", path.display()));
            }
        }
    }
    assert!(n_imports > 50, "only {n_imports} imports were seen");
    assert!(wrong.is_empty(), "not allowed:\n{}", wrong.join("\n"));
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

/// Flags of other programs in the README: cargo's, `hf download`'s, uv's, vLLM's, llama.cpp's and those of `benches/peers.py`.
const NOT_OURS: [&str; 17] = [
    "base",
    "bench",
    "enable-lora",
    "features",
    "help",
    "local-dir",
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
fn the_readme_names_every_flag_that_it_shows() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let command = orpo_wgpu::cli::command();
    let known: BTreeSet<String> = command
        .get_subcommands()
        .flat_map(|c| c.get_arguments().filter_map(|a| a.get_long().map(str::to_owned)).collect::<Vec<_>>())
        .chain(NOT_OURS.map(str::to_owned))
        .collect();
    let words = readme.split(|c: char| c.is_whitespace() || "`(),;:".contains(c));
    for flag in words.filter_map(|word| word.strip_prefix("--")).filter(|flag| !flag.is_empty()) {
        assert!(known.contains(flag), "the README shows --{flag}, which is no flag");
    }
}
