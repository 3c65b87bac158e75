//! `orpo-wgpu eval`: the figures of an adapter are those that its run logged.

use std::fs;
use std::process::Output;

use serde_json::Value;

use crate::workplace::{Workplace, orpo_wgpu, stderr, stdout};

fn eval(workplace: &Workplace, flags: &[&str]) -> Output {
    orpo_wgpu(&[&["eval"], flags].concat()).current_dir(workplace.0.path()).output().unwrap()
}

/// Names and figures of the table, as they are printed.
fn evaluated(workplace: &Workplace, flags: &[&str]) -> Vec<(String, String)> {
    let output = eval(workplace, flags);
    assert!(output.status.success(), "{flags:?}: {}", stderr(&output));
    let shown = stdout(&output);
    let cells = shown.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        (words.len() == 2 && words[0].starts_with("eval_"))
            .then(|| (words[0].to_owned(), words[1].to_owned()))
    });
    cells.collect()
}

/// The evaluations of a run's log, first and last.
fn logged(workplace: &Workplace) -> [Vec<(String, String)>; 2] {
    let log = fs::read_to_string(workplace.path("out/logging.jsonl")).unwrap();
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let evaluations: Vec<Vec<(String, String)>> = lines
        .map(|line| line.as_object().unwrap().clone())
        .filter(|line| line.contains_key("eval_loss"))
        .map(|line| {
            let figures = line.iter().filter(|(name, _)| name.starts_with("eval_"));
            figures.map(|(name, value)| (name.clone(), format!("{:.4}", value.as_f64().unwrap()))).collect()
        })
        .collect();
    assert!(evaluations.len() >= 2, "{log}");
    [evaluations[0].clone(), evaluations[evaluations.len() - 1].clone()]
}

#[test]
fn an_adapter_has_the_figures_that_its_run_logged() {
    let workplace = Workplace::new();
    let rows = fs::read_to_string(workplace.path("pairs.jsonl")).unwrap();
    let others: Vec<&str> = rows.lines().take(3).collect();
    fs::write(workplace.path("others.jsonl"), others.join("\n")).unwrap();
    for held_out in [
        &["--dataset_test_ratio", "0.4"][..],
        &["--val_dataset", "others.jsonl", "--batch_size", "2", "--beta", "0.3"],
    ] {
        let output = workplace.train(&[&["--learning_rate", "0.01", "--max_steps", "3"], held_out].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        let [before, after] = logged(&workplace);
        assert_ne!(before, after);
        assert_eq!(before.len(), 10);
        let run = ["--config", "out/args.json"];
        assert_eq!(
            evaluated(&workplace, &[&run[..], &["--adapters", "out"]].concat()),
            after,
            "{held_out:?}"
        );
        assert_eq!(evaluated(&workplace, &run), after, "{held_out:?}: a run's record is beside its adapter");
        let none = evaluated(&workplace, &[&run[..], &["--adapters", "none"]].concat());
        assert_eq!(none, before, "{held_out:?}: B of a new adapter is 0");
        let written = workplace.written();
        let merge = ["export", "--model_id_or_path", "model", "--adapters", "out", "--output_dir", "merged"];
        let merged = orpo_wgpu(&merge).current_dir(workplace.0.path()).output().unwrap();
        assert!(merged.status.success(), "{}", stderr(&merged));
        let merged = ["--model_id_or_path", "merged", "--adapters", "none"];
        let merged = evaluated(&workplace, &[&run[..], &merged].concat());
        for ((name, merged), (_, adapted)) in merged.iter().zip(&after) {
            let off = merged.parse::<f64>().unwrap() - adapted.parse::<f64>().unwrap();
            assert!(off.abs() < 2e-4, "{name}: {merged} merged, {adapted} with the adapter");
        }
        fs::remove_dir_all(workplace.path("merged")).unwrap();
        assert_eq!(workplace.written(), written, "nothing is written");
    }
}

/// Rows to train on are not needed for it.
#[test]
fn rows_that_are_named_are_enough() {
    let workplace = Workplace::new();
    let model = ["--device", "cpu", "--model_id_or_path", "model"];
    assert_eq!(evaluated(&workplace, &[&model[..], &["--val_dataset", "pairs.jsonl"]].concat()).len(), 10);
    fs::write(workplace.path("unanswered.jsonl"), "{\"prompt\": \"Who?\", \"chosen\": \"I.\"}\n").unwrap();
    for (flags, says) in [
        (&[][..], "no rows to evaluate on are named\nhint: --val_dataset FILE names them"),
        (
            &["--dataset", "pairs.jsonl"],
            "no row is held out to evaluate on\nhint: --val_dataset FILE names rows",
        ),
        (&["--val_dataset", "pairs.jsonl", "--max_length", "4"], "none of its rows can be evaluated on: "),
        (
            &["--dataset", "pairs.jsonl", "--dataset_test_ratio", "0.4", "--max_length", "4"],
            "can be evaluated on: ",
        ),
        (&["--val_dataset", "unanswered.jsonl"], "unanswered.jsonl"),
        (&["--val_dataset", "nowhere.jsonl"], "nowhere.jsonl"),
        (&["--val_dataset", "pairs.jsonl", "--adapters", "nowhere"], "nowhere: is not an adapter folder"),
    ] {
        let output = eval(&workplace, &[&model[..], flags].concat());
        let message = stderr(&output);
        assert!(!output.status.success() && message.contains(says), "{flags:?}: {message}");
    }
}

/// A run that goes on, or begins from an adapter, has that in its record.
#[test]
fn a_run_s_own_adapter_is_evaluated_and_not_the_one_it_began_from() {
    let workplace = Workplace::new();
    let held_out = ["--dataset_test_ratio", "0.4", "--learning_rate", "0.01"];
    let train = |flags: &[&str]| {
        let output = workplace.train(&[&held_out, flags].concat());
        assert!(output.status.success(), "{}", stderr(&output));
    };
    train(&["--output_dir", "first"]);
    fs::create_dir(workplace.path("none")).unwrap();
    for from in ["--adapters", "--resume_from_checkpoint"] {
        train(&[from, "first", "--max_steps", "4"]);
        let [_, after] = logged(&workplace);
        assert_eq!(evaluated(&workplace, &["--config", "out/args.json"]), after, "{from}");
        let checkpoint = workplace.path("out/checkpoint-4");
        fs::rename(&checkpoint, workplace.path("none/checkpoint-4")).unwrap();
        let message = stderr(&eval(&workplace, &["--config", "out/args.json"]));
        assert!(
            message.contains("out: holds no checkpoint to evaluate\nhint: --adapters names one"),
            "{message}"
        );
        let none = evaluated(&workplace, &["--config", "out/args.json", "--adapters", "none"]);
        assert_ne!(none, after, "{from}: a folder of that name is another thing");
        fs::remove_dir_all(workplace.path("none/checkpoint-4")).unwrap();
    }
}

#[test]
fn rows_that_are_learned_from_are_told_of() {
    let workplace = Workplace::new();
    let flags = ["--device", "cpu", "--model_id_or_path", "model", "--dataset", "pairs.jsonl"];
    let output = eval(&workplace, &[&flags[..], &["--val_dataset", "pairs.jsonl"]].concat());
    assert!(stderr(&output).contains("7 are trained on as well"), "{}", stderr(&output));
}
