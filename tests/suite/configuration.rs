//! `--config`, and the `args.json` that it reads back.

use std::fs;

use serde_json::{Value, json};

use crate::workplace::{Workplace, orpo_wgpu, stderr};

#[test]
fn args_json_repeats_the_run() {
    let workplace = Workplace::new();
    let flags = [
        "--logging_steps",
        "1",
        "--learning-rate",
        "3e-3",
        "--beta",
        "0.4",
        "--lora_target_modules",
        "q_proj,down_proj",
    ];
    assert!(workplace.train(&flags).status.success());
    // From another folder, where no path is what it was.
    let (args, again) = (workplace.path("out/args.json"), workplace.path("again"));
    let mut train = orpo_wgpu(&["train", "--config", args.to_str().unwrap(), "--output_dir"]);
    let output = train.arg(again).current_dir(workplace.path("model")).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let figures = |folder: &str| -> Vec<(f64, f64)> {
        let log = fs::read_to_string(workplace.path(folder).join("logging.jsonl")).unwrap();
        let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.map(|l| (l["loss"].as_f64().unwrap(), l["grad_norm"].as_f64().unwrap())).collect()
    };
    assert_eq!(figures("out"), figures("again"), "same settings, same seed, same device, same bits");
}

#[test]
fn a_configuration_file_takes_what_flags_take() {
    let workplace = Workplace::new();
    let run = r#"{"dataset": "pairs.jsonl,pairs.jsonl#2", "lora_target_modules": "q_proj,v_proj", "columns": "{\"query\": \"query\"}"}"#;
    fs::write(workplace.path("run.json"), run).unwrap();
    let flags = ["train", "--config", "run.json", "--model_id_or_path", "model", "--device", "cpu"];
    let output = ["--max_steps", "1", "--output_dir", "out", "--add_output_dir_suffix", "false"];
    let mut train = orpo_wgpu(&[&flags[..], &output].concat());
    let output = train.current_dir(workplace.0.path()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let resolved = fs::read_to_string(workplace.path("out/args.json")).unwrap();
    let resolved: Value = serde_json::from_str(&resolved).unwrap();
    let pairs = workplace.path("pairs.jsonl").display().to_string();
    assert_eq!(resolved["dataset"], json!([pairs, pairs + "#2"]));
    assert_eq!(resolved["lora_target_modules"], json!(["q_proj", "v_proj"]));
    assert_eq!(resolved["columns"], json!({"query": "query"}));
}
