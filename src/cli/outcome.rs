//! What `train` prints when it is done: the demo's answers before and after, and what the run came to.

use std::path::Path;

use comfy_table::{ContentArrangement, Table, presets};

use super::open::OpenModel;
use super::words::new_table;
use crate::config::TrainArgs;
use crate::demo;
use crate::error::Result;
use crate::infer::generate::{GenerationConfig, answer};
use crate::model::Llama;
use crate::ops::Kernels;
use crate::shell::pasted;
use crate::train::Summary;
use crate::train::metrics::StepMetrics;
use crate::words::counted;

/// Answers of the demo that are shown; all are counted.
const SHOWN_ANSWERS: usize = 6;
/// The flags of `infer` that say what they say of a run: of what the model is made, and how a conversation is written.
const SHARED_WITH_INFER: [&str; 7] = [
    "model_id_or_path",
    "dtype",
    "quantization_bit",
    "quantize_lm_head",
    "template_type",
    "system",
    "device",
];

/// Answers the demo's questions, and says `when`.
///
/// # Errors
/// If the device fails.
pub fn answers<B: Kernels>(
    model: &Llama<B>,
    open: &OpenModel,
    questions: &[&str],
    when: &str,
) -> Result<Vec<String>> {
    if !questions.is_empty() {
        note!("demo     answering {} {when}", counted(questions.len(), "held-out question"));
    }
    let config = GenerationConfig::greedy(48);
    questions
        .iter()
        .map(|question| {
            let prompt = open.tokenizer.encode_prompt(open.template, None, &[], question)?;
            answer(model, &open.tokenizer, &prompt, &config)
        })
        .collect()
}

/// A table with lines between its parts, as wide as the terminal.
pub fn table(header: &[&str]) -> Table {
    let mut table = new_table();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(header);
    table
}

/// Shows the first answers side by side and counts all; `start` heads those from before.
pub fn print_answers(questions: &[&str], start: &str, before: &[String], after: &[String]) {
    if questions.is_empty() {
        return;
    }
    let mut table = table(&["question (not in the training data)", start, "after"]);
    for ((question, before), after) in questions.iter().zip(before).zip(after).take(SHOWN_ANSWERS) {
        table.add_row([question, before.as_str(), after.as_str()]);
    }
    say!("{table}");
    let chinese = |answers: &[String]| answers.iter().filter(|answer| demo::is_chinese(answer)).count();
    let n = questions.len();
    let shown =
        if n > SHOWN_ANSWERS { format!("{SHOWN_ANSWERS} of {n} questions shown; a") } else { "a".to_owned() };
    say!("{shown}nswers in Chinese: {} of {n} {start}, {} of {n} after\n", chinese(before), chinese(after));
}

/// Shows the metrics before and after, where the adapter is, and how to talk to it.
pub fn print_summary(summary: &Summary, args: &TrainArgs) {
    let mut table = table(match (summary.is_validation, &summary.before) {
        (true, _) => &["validation rows", "before", "after"],
        (false, Some(_)) => &["training rows", "first logged steps", "last logged steps"],
        (false, None) => &["training rows", "all steps"],
    });
    let figures = |m: &StepMetrics| {
        [
            ("loss", m.loss),
            ("nll_loss", m.nll_loss),
            ("log_odds_chosen", m.log_odds_chosen),
            ("rewards/accuracies", m.rewards_accuracies),
            ("logps/chosen", m.logps_chosen),
            ("logps/rejected", m.logps_rejected),
        ]
    };
    let before = summary.before.as_ref().map(figures);
    for (i, (name, after)) in figures(&summary.after).into_iter().enumerate() {
        let cells = before.map(|before| before[i].1).into_iter().chain([after]);
        table.add_row(std::iter::once(name.to_owned()).chain(cells.map(|figure| format!("{figure:.4}"))));
    }
    say!("{table}");
    if summary.n_skipped > 0 {
        say!("skipped steps, whose gradients overflowed fp16: {}", summary.n_skipped);
    }
    let steps = counted(summary.n_steps, "step");
    say!("{steps} in {:.1} s, evaluations and saves included", summary.elapsed_s);
    say!("adapter: {}", summary.checkpoint.display());
    say!("talk to it: {}", infer_command(args, &summary.checkpoint));
}

/// The command that talks to an adapter as it was trained: on the same weights, in the same form.
fn infer_command(args: &TrainArgs, checkpoint: &Path) -> String {
    let flags = args.changed_flags(&SHARED_WITH_INFER);
    let space = if flags.is_empty() { "" } else { " " };
    format!("{} infer {flags}{space}--adapters {}", program(), pasted(checkpoint))
}

/// The program as it was called, so that a command can be pasted.
pub fn program() -> String {
    let name = std::env::args_os().next().unwrap_or_else(|| env!("CARGO_PKG_NAME").into());
    name.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn flags_of(subcommand: &str) -> BTreeSet<String> {
        let command = crate::cli::command();
        let flags = command.find_subcommand(subcommand).unwrap().get_arguments();
        flags.filter_map(|flag| flag.get_long().map(str::to_owned)).collect()
    }

    #[test]
    fn what_infer_and_train_share_is_handed_on() {
        let (train, infer) = (flags_of("train"), flags_of("infer"));
        // Which adapter it is, is known; a seed draws something else in each.
        let own = ["adapters", "seed"];
        let shared: BTreeSet<&str> =
            train.intersection(&infer).map(String::as_str).filter(|name| !own.contains(name)).collect();
        assert_eq!(shared, SHARED_WITH_INFER.into());
    }

    #[test]
    fn a_run_is_talked_to_as_it_was_trained() {
        let command = |args: &TrainArgs| infer_command(args, Path::new("out/checkpoint-2"));
        let plain = command(&TrainArgs::default());
        assert!(plain.ends_with(" infer --adapters out/checkpoint-2"), "{plain}");
        let args = TrainArgs {
            model_id_or_path: Some("my model".into()),
            dtype: "fp32".to_owned(),
            quantization_bit: 8,
            quantize_lm_head: true,
            template_type: "default-generation".to_owned(),
            system: Some("Answer in one word, and don't explain.".to_owned()),
            device: "wgpu:1".to_owned(),
            lora_rank: 4,
            ..TrainArgs::default()
        };
        let flags = "infer --model_id_or_path 'my model' --dtype fp32 --quantization_bit 8 --quantize_lm_head true \
                     --template_type default-generation --system 'Answer in one word, and don'\\''t explain.' \
                     --device wgpu:1 --adapters out/checkpoint-2";
        assert!(command(&args).ends_with(flags), "{}", command(&args));
    }
}
