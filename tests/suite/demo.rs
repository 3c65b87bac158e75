//! The demo, run as a user runs it: answers to held-out questions turn from English to Chinese.

use std::path::Path;
use std::time::Instant;

use burn::tensor::DType;
use burn_flex::Flex;
use orpo_wgpu::infer::generate::{GenerationConfig, answer};
use orpo_wgpu::model::load::load_llama;
use orpo_wgpu::model::{Llama, Precision};
use orpo_wgpu::{demo, lora};

use crate::workplace::{fixture, orpo_wgpu, stderr, stdout};

fn base() -> Llama<Flex> {
    load_llama(
        &demo::checkpoint().unwrap(),
        &demo::config().unwrap(),
        Precision::dense(DType::F32),
        1 << 30,
        &Default::default(),
    )
    .unwrap()
}

fn answers(model: &Llama<Flex>) -> Vec<String> {
    let tokenizer = demo::tokenizer().unwrap();
    let rows = demo::held_out().unwrap().rows;
    let answers = rows.iter().map(|row| {
        let template = orpo_wgpu::data::template::Template::Llama3;
        let prompt = tokenizer.encode_prompt(template, None, &[], &row.query).unwrap();
        answer(model, &tokenizer, &prompt, &GenerationConfig::greedy(64)).unwrap()
    });
    answers.collect()
}

fn share(answers: &[String], is_so: impl Fn(&str) -> bool) -> f64 {
    answers.iter().filter(|answer| is_so(answer)).count() as f64 / answers.len() as f64
}

fn is_cjk(c: char) -> bool {
    ('\u{4e00}'..='\u{9fff}').contains(&c)
}

#[test]
fn held_out_questions_are_in_no_pair() {
    let pairs = demo::pairs().unwrap().rows;
    for row in demo::held_out().unwrap().rows {
        assert!(!pairs.iter().any(|pair| pair.query == row.query), "{}", row.query);
    }
}

#[test]
fn training_the_demo_turns_held_out_answers_from_english_to_chinese() {
    let folder = tempfile::tempdir().unwrap();
    let started = Instant::now();
    let output = orpo_wgpu(&["train", "--device", "cpu"]).current_dir(folder.path()).output().unwrap();
    let elapsed_s = started.elapsed().as_secs_f64();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(elapsed_s < 180.0, "the demo took {elapsed_s:.0} s");

    let model = base();
    let before = answers(&model);
    let mut model = model;
    lora::load(&mut model, &newest_checkpoint(folder.path())).unwrap();
    let after = answers(&model);
    let english = share(&before, |a| !a.contains(is_cjk) && a.contains(|c: char| c.is_ascii_alphabetic()));
    let chinese = share(&after, |a| {
        a.chars().filter(|&c| is_cjk(c)).count() > a.chars().filter(char::is_ascii_alphabetic).count()
    });
    let emoji =
        share(&after, |a| a.contains(|c: char| ('\u{2600}'..='\u{27bf}').contains(&c) || c >= '\u{1f300}'));
    assert!(english >= 0.95, "before training {english:.2} of the answers are English: {before:?}");
    assert!(chinese >= 0.9, "after training {chinese:.2} of the answers are Chinese: {after:?}");
    assert!(emoji >= 0.9, "after training {emoji:.2} of the answers have an emoji: {after:?}");

    let question = &demo::held_out().unwrap().rows[0].query;
    let mut command = orpo_wgpu(&["infer", "--device", "cpu", "--temperature", "0", question]);
    let infer = command.current_dir(folder.path()).output().unwrap();
    let printed = stdout(&infer);
    assert_eq!(printed.trim(), after[0].trim(), "infer finds the demo's newest adapter: {}", stderr(&infer));
}

fn newest_checkpoint(folder: &Path) -> std::path::PathBuf {
    let only = |folder: &Path| std::fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    let run = only(&folder.join("output/demo"));
    let checkpoints = std::fs::read_dir(run).unwrap().map(|e| e.unwrap().path());
    let step = |path: &Path| path.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse::<usize>().ok();
    checkpoints.filter(|p| step(p).is_some()).max_by_key(|p| step(p)).unwrap()
}

#[test]
fn the_demo_s_model_is_not_trained_on_other_rows_without_a_word() {
    let folder = tempfile::tempdir().unwrap();
    let pairs = fixture("gqa/pairs.jsonl");
    let says = |dataset: &Path| {
        let mut command = orpo_wgpu(&["train", "--device", "cpu", "--max_steps", "1", "--dataset"]);
        let output = command.arg(dataset).current_dir(folder.path()).output().unwrap();
        stderr(&output).contains("--model_id_or_path DIR names yours")
    };
    assert_eq!([pairs.as_path(), Path::new("demo")].map(says), [true, false]);
}

#[test]
fn infer_says_where_it_found_no_adapter_of_the_demo() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = orpo_wgpu(&["infer", "--device", "cpu", "--max_new_tokens", "1", "hi"]);
    let says = stderr(&command.current_dir(folder.path()).output().unwrap());
    let looked_in = Path::new("output").join("demo");
    assert!(says.contains(&format!("no adapter, as there is none below {}", looked_in.display())), "{says}");
}
