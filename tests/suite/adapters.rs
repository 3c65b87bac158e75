//! `--adapters` with something else than an adapter of the model.

use std::fs;
use std::path::Path;

use crate::workplace::{Workplace, fixture, orpo_wgpu, stderr};

/// What `infer` says when it fails on these flags.
fn failure(folder: &Path, flags: &[&str]) -> String {
    let mut command = orpo_wgpu(&["infer", "hi", "--device", "cpu"]);
    let output = command.args(flags).current_dir(folder).output().unwrap();
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{flags:?}: {message}");
    message
}

#[test]
fn a_folder_that_is_none_is_one_error_before_a_model_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    // A model without weights, which fails as soon as it is loaded.
    fs::create_dir(folder.path().join("model")).unwrap();
    for name in ["config.json", "tokenizer.json"] {
        fs::copy(fixture("gqa/model").join(name), folder.path().join("model").join(name)).unwrap();
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
fn an_adapter_of_another_model_is_a_short_error_that_names_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = fixture("gqa/adapter").display().to_string();
    let message = failure(folder.path(), &["--adapters", &adapter]);
    let says = format!(
        "{adapter}/adapter_config.json: is an adapter of `fixture`, and without --model_id_or_path the model is the demo\n\
         hint: pass --model_id_or_path DIR, where DIR is the folder of fixture\n"
    );
    assert_eq!(message, format!("orpo-wgpu: {says}"));

    let other = fixture("odd/model").display().to_string();
    let message = failure(folder.path(), &["--adapters", &adapter, "--model_id_or_path", &other]);
    assert!(message.contains("of its tensors do not fit:"), "{message}");
    let hint = "hint: adapter_config.json names `fixture` as the model it belongs to";
    assert!(message.ends_with(&format!("{hint}\n")) && message.lines().count() <= 10, "{message}");
}

#[test]
fn train_and_plan_name_it_as_well() {
    let adapter = fixture("gqa/adapter").display().to_string();
    for subcommand in ["train", "plan"] {
        let folder = tempfile::tempdir().unwrap();
        let mut command = orpo_wgpu(&[subcommand, "--device", "cpu", "--adapters", &adapter]);
        let message = stderr(&command.current_dir(folder.path()).output().unwrap());
        assert!(message.contains("is an adapter of `fixture`"), "{subcommand}: {message}");
    }
}

/// Defaults are no wishes, and a wish for what happens to be the default is one.
#[test]
fn what_is_asked_of_an_adapter_and_is_not_what_it_has_is_refused_whole() {
    let workplace = Workplace::new();
    let small = ["--lora_rank", "4", "--lora_alpha", "16", "--lora_target_modules", "v_proj,q_proj"];
    let output = workplace.train(&[&small[..], &["--max_steps", "1"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let from = |from: &'static str, flags: &[&str]| {
        let run = [from, "out", "--max_steps", "2", "--output_dir", "next"];
        workplace.train(&[&run, flags].concat())
    };
    let settings = "lora_rank = 8\nlora_alpha = 32\nlora_target_modules = 'ALL'\n";
    fs::write(workplace.path("defaults.toml"), settings).unwrap();
    let flags = ["--lora_rank", "8", "--lora_alpha", "32", "--lora_target_modules", "ALL"];
    for start in ["--adapters", "--resume_from_checkpoint"] {
        for defaults in [&flags[..], &["--config", "defaults.toml"]] {
            let output = from(start, defaults);
            let says = "checkpoint-1 has a rank of 4, and --lora_rank is 8; an alpha of 16, and --lora_alpha is 32; \
                        the modules q_proj,v_proj, and --lora_target_modules is ALL\n\
                        hint: leave --lora_rank and --lora_alpha and --lora_target_modules out, ";
            assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
            assert!(stderr(&output).contains(says), "{}", stderr(&output));
        }
        let run = [
            "plan",
            "--device",
            "cpu",
            "--model_id_or_path",
            "model",
            "--dataset",
            "none.jsonl",
            start,
            "out",
        ];
        let output =
            orpo_wgpu(&[&run[..], &["--lora_rank", "8"]].concat()).current_dir(workplace.0.path()).output();
        assert!(stderr(&output.unwrap()).contains("a rank of 4, and --lora_rank is 8"), "before the rows");
        for same in [&small[..], &["--config", "out/args.json"], &[]] {
            let output = from(start, same);
            assert!(output.status.success(), "{start} {same:?}: {}", stderr(&output));
        }
    }
}
