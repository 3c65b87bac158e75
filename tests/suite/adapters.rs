//! `--adapters` with something else than an adapter of the model.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn gqa(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/goldens/gqa").join(name)
}

/// What `infer` says when it fails on these flags.
fn failure(folder: &Path, flags: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_orpo-wgpu"));
    command.args(["infer", "hi", "--device", "cpu"]).args(flags).current_dir(folder);
    let output = command.output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{flags:?}: {message}");
    message
}

#[test]
fn a_folder_that_is_none_is_one_error_before_a_model_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    // A model without weights, which fails as soon as it is loaded.
    fs::create_dir(folder.path().join("model")).unwrap();
    for name in ["config.json", "tokenizer.json"] {
        fs::copy(gqa("model").join(name), folder.path().join("model").join(name)).unwrap();
    }
    fs::create_dir(folder.path().join("empty")).unwrap();
    fs::write(folder.path().join("adapter_model.safetensors"), "").unwrap();
    for (adapters, says) in [
        (
            "nowhere",
            "orpo-wgpu: nowhere: is not an adapter folder: there is no such folder\nhint: name a run, ",
        ),
        ("adapter_model.safetensors", "is not an adapter folder: it is not a folder\nhint: name a run, "),
        ("empty", "orpo-wgpu: empty: holds no adapter_config.json\nhint: "),
    ] {
        let message = failure(folder.path(), &["--model_id_or_path", "model", "--adapters", adapters]);
        assert!(message.contains(says) && message.lines().count() == 2, "{adapters}: {message}");
    }
}

#[test]
fn an_adapter_of_another_model_is_a_short_error() {
    let folder = tempfile::tempdir().unwrap();
    let message = failure(folder.path(), &["--adapters", gqa("adapter").to_str().unwrap()]);
    assert!(message.contains("adapter_model.safetensors: 28 of its tensors do not fit:"), "{message}");
    assert!(message.contains("has shape [8, 64], expected [8, 128]"), "{message}");
    assert!(message.contains("\n  and 23 more\nhint: these are tensors of another model"), "{message}");
    assert_eq!(message.lines().count(), 8, "{message}");
}
