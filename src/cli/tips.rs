//! What is told of a command line that cannot be read: tips for words that other trainers know, and every value that its flag does not
//! take.

use std::ffi::OsString;

use clap::CommandFactory;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::{Cli, command};
use crate::config::{other_names, value_problem};
use crate::data::spelling::edits;

/// The same error; of a flag or command that another trainer has, with what it is here, and of a value with all that are as wrong.
pub(super) fn with_tip(mut usage: clap::Error, args: &[OsString]) -> clap::Error {
    if let Some(problems) = value_problems(&usage, args) {
        return clap::Error::raw(usage.kind(), problems).with_cmd(&command());
    }
    let word = |kind| match usage.get(kind) {
        Some(ContextValue::String(word)) => Some(word.clone()),
        _ => None,
    };
    let others = match (usage.kind(), word(ContextKind::InvalidArg)) {
        (ErrorKind::UnknownArgument, Some(first)) => other_tips(&first, args),
        _ => Vec::new(),
    };
    let tip = match usage.kind() {
        ErrorKind::InvalidSubcommand => {
            let ours = word(ContextKind::InvalidSubcommand).and_then(|word| other_names::our_command(&word));
            let has_similar = usage.get(ContextKind::SuggestedSubcommand).is_some();
            ours.map(str::to_owned).or_else(|| (!has_similar).then(all_commands))
        }
        ErrorKind::UnknownArgument => {
            let (flag, similar) = (word(ContextKind::InvalidArg), word(ContextKind::SuggestedArg));
            let tip = flag.as_deref().and_then(|flag| flag_tip(flag, args));
            let is_far = |similar: &str| !is_similar(flag.as_deref().unwrap_or_default(), similar);
            if tip.is_some() || similar.as_deref().is_some_and(is_far) {
                usage.remove(ContextKind::SuggestedArg);
            }
            show_options(&mut usage, args);
            tip
        }
        _ => None,
    };
    if tip.is_some() {
        usage.remove(ContextKind::SuggestedSubcommand);
    }
    let tips: Vec<_> = tip.into_iter().chain(others).map(Into::into).collect();
    if !tips.is_empty() {
        usage.insert(ContextKind::Suggested, ContextValue::StyledStrs(tips));
    }
    usage
}

fn all_commands() -> String {
    let command = Cli::command();
    let names: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).collect();
    format!("the commands are {}", names.join(", "))
}

/// Of flags after the first that are unknown as well: clap ends with that.
fn other_tips(first: &str, args: &[OsString]) -> Vec<String> {
    let command = command();
    let Some(subcommand) = args.iter().skip(1).find_map(|arg| command.find_subcommand(arg)) else {
        return Vec::new();
    };
    let known = |flag: &str| {
        let name = other_names::name_of(flag);
        ["help", "version"].contains(&name.as_str())
            || subcommand.get_arguments().any(|arg| arg.get_long() == Some(name.as_str()))
    };
    let mut tips = Vec::new();
    let mut seen = vec![first.to_owned()];
    for arg in args.iter().filter_map(|arg| arg.to_str()).filter(|arg| arg.starts_with("--") && arg.len() > 2)
    {
        let flag = arg.split('=').next().unwrap_or(arg).to_owned();
        if !known(&flag) && !seen.contains(&flag) {
            let tip = flag_tip(&flag, args).map_or_else(String::new, |tip| format!(": {tip}"));
            tips.push(format!("{flag} is unknown as well{tip}"));
            seen.push(flag);
        }
    }
    tips
}

/// A line for each value that its flag does not take, if it is such a value that clap ended with.
fn value_problems(usage: &clap::Error, args: &[OsString]) -> Option<String> {
    let mut args = args.to_vec();
    let mut lines = Vec::new();
    let mut next = without_bad_value(usage, &mut args);
    while let Some((flag, value, problem)) = next {
        let is = if value.is_empty() { "is empty".to_owned() } else { format!("is {value}") };
        lines.push(format!("{flag} {is}: {problem}\n"));
        let error = command().try_get_matches_from(&args).err();
        next = error.and_then(|error| without_bad_value(&error, &mut args));
    }
    (!lines.is_empty()).then(|| lines.join("       "))
}

/// Takes a flag out of the command line whose value clap has ended with; gives it as it was typed, the value, and what is wrong.
fn without_bad_value(error: &clap::Error, args: &mut Vec<OsString>) -> Option<(String, String, String)> {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    if ![ErrorKind::ValueValidation, ErrorKind::InvalidValue].contains(&error.kind()) {
        return None;
    }
    // The flag comes with the name of its value. One without a value, which is an empty one to clap, is not among the words below.
    let name = other_names::name_of(text(ContextKind::InvalidArg)?.split([' ', '[']).next()?);
    let value = text(ContextKind::InvalidValue)?;
    let is_flag = |word: &str| word.starts_with("--") && other_names::name_of(word) == name;
    for at in 0..args.len() {
        let Some(word) = args[at].to_str().map(str::to_owned) else { continue };
        let n_words = match word.split_once('=') {
            Some((flag, given)) if is_flag(flag) && given == value => 1,
            None if is_flag(&word) && args.get(at + 1).is_some_and(|next| next == value) => 2,
            _ => continue,
        };
        args.drain(at..at + n_words);
        let flag = word.split('=').next().unwrap_or(&word).to_owned();
        return Some((flag, value.to_owned(), value_problem(error)));
    }
    None
}

/// What to type instead of a flag, or of a word that is none.
fn flag_tip(theirs: &str, args: &[OsString]) -> Option<String> {
    let command = command();
    let has =
        |command: &clap::Command, flag: &str| command.get_arguments().any(|arg| arg.get_long() == Some(flag));
    let Some(subcommand) = args.iter().skip(1).find_map(|arg| command.find_subcommand(arg)) else {
        let name = other_names::name_of(theirs);
        let owner = command.get_subcommands().find(|subcommand| has(subcommand, &name))?.get_name();
        return Some(format!("it is a flag of `{owner}`: {} {owner} --{name}", command.get_name()));
    };
    if !theirs.starts_with('-') {
        let is_data = theirs.ends_with(".jsonl") || theirs.ends_with(".json");
        return (is_data && has(subcommand, "dataset")).then(|| format!("--dataset {theirs}"));
    }
    let ours = other_names::ours(theirs).filter(|ours| has(subcommand, other_names::flag_of(ours)));
    let ours = ours.map(|ours| format!("here this is {ours}"));
    let name = other_names::name_of(theirs);
    // Most have some of those of `train`, which are what is looked for.
    let owners = command.get_subcommands().filter(|other| has(other, &name));
    let owner = || owners.max_by_key(|owner| owner.get_name() == "train");
    ours.or_else(|| other_names::not_here(theirs).map(str::to_owned))
        .or_else(|| owner().map(|owner| format!("it is a flag of `{}`", owner.get_name())))
}

/// Whether what clap found is what may have been meant: the beginning of it, or up to a third of its characters off.
fn is_similar(flag: &str, found: &str) -> bool {
    let [flag, found] = [flag, found].map(other_names::name_of);
    found.starts_with(&flag) || 3 * edits(&flag, &found) <= flag.len()
}

/// Gives the error the usage of its subcommand: clap's names a similar flag alone, as if that were needed.
fn show_options(usage: &mut clap::Error, args: &[OsString]) {
    let mut command = command();
    command.build();
    if let Some(name) = args.iter().skip(1).find(|arg| command.find_subcommand(arg).is_some())
        && let Some(subcommand) = command.find_subcommand_mut(name)
    {
        usage.insert(ContextKind::Usage, ContextValue::StyledStr(subcommand.render_usage()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(args: &[&str]) -> String {
        let args: Vec<OsString> = [&["orpo-wgpu"], args].concat().into_iter().map(OsString::from).collect();
        with_tip(command().try_get_matches_from(&args).unwrap_err(), &args).to_string()
    }

    #[test]
    fn a_word_of_another_trainer_is_told_what_it_is_here() {
        for (args, tip) in [
            (&["train", "--per-device-train-batch-size", "4"][..], "tip: here this is --batch_size\n"),
            (&["plan", "--load_in_4bit"], "tip: here this is --quantization_bit 4\n"),
            (&["train", "--warmup_steps=10"], "tip: here this is --warmup_ratio, a share of the steps\n"),
            (&["infer", "--ckpt_dir", "x"], "tip: here this is --adapters\n"),
            (&["train", "--betta", "1"], "tip: a similar argument exists: '--beta'"),
            (&["train", "--learning", "1"], "tip: a similar argument exists: '--learning-rate'"),
            (
                &["train", "--rlhf_type", "orpo"],
                "tip: ORPO is what is trained, and nothing else; for ORPO leave it out\n",
            ),
            (
                &["train", "--loss-type", "x"],
                "tip: ORPO is what is trained, and nothing else; for ORPO leave it out\n",
            ),
            (&["train", "--use_dora", "true"], "tip: adapters are plain LoRA, so leave it out\n"),
            (&["train", "pairs.jsonl"], "tip: --dataset pairs.jsonl\n"),
            (&["--learning-rate", "1"], "tip: it is a flag of `train`: orpo-wgpu train --learning_rate\n"),
            (&["infer", "--lora_rank", "8"], "tip: it is a flag of `train`\n"),
            (&["sft"], "tip: ORPO is what is trained here, and nothing else: `train` does it\n"),
            (&["serve"], "tip: a checkpoint is a PEFT adapter, which vLLM serves (see the README); "),
            (&["rlhf", "--beta", "1"], "tip: here this is `train`\n"),
            (&["chat"], "tip: here this is `infer`\n"),
            (&["merge"], "tip: here this is `export`\n"),
            (&["tain"], "tip: a similar subcommand exists: 'train'"),
            (&["frobnicate"], "tip: the commands are train, plan, infer, eval, export, bench, devices\n"),
        ] {
            let message = usage(args);
            assert!(message.contains(tip), "{args:?}: {message}");
            assert_eq!(message.matches("tip:").count(), 1, "{message}");
        }
        let message = usage(&["infer", "--lora_r", "8"]);
        assert!(!message.contains("--lora_rank"), "infer has no such flag: {message}");
    }

    #[test]
    fn all_unknown_flags_are_told_of() {
        let flags = [
            "train",
            "--per_device_train_batch_size",
            "4",
            "--beta",
            "1",
            "--load_in_4bit=true",
            "--zero",
            "--zero",
        ];
        let message = usage(&flags);
        for tip in [
            "tip: here this is --batch_size\n",
            "tip: --load_in_4bit is unknown as well: here this is --quantization_bit 4\n",
            "tip: --zero is unknown as well\n",
        ] {
            assert_eq!(message.matches(tip).count(), 1, "`{tip}` in {message}");
        }
        assert_eq!(message.matches("tip:").count(), 3, "{message}");
    }

    #[test]
    fn all_values_that_no_flag_takes_are_told_of() {
        let flags =
            ["train", "--batch_size", "1.5", "--beta", "0.1", "--learning-rate=fast", "--strict", "so"];
        let message = usage(&flags);
        for line in [
            "error: --batch_size is 1.5: expected a whole number, and none below zero\n",
            "       --learning-rate is fast: expected a number\n",
            "       --strict is so: expected one of true, false\n",
        ] {
            assert!(message.contains(line), "`{line}` in {message}");
        }
        assert!(!message.contains("--beta"), "{message}");
        for (value, problem) in [
            ("-1", "expected a whole number, and none below zero"),
            ("18446744073709551616", "it is too large"),
        ] {
            let message = usage(&["bench", &format!("--batch_size={value}")]);
            assert!(message.contains(&format!("--batch_size is {value}: {problem}")), "{message}");
        }
        assert!(usage(&["infer", "--seed", "x"]).contains("--seed is x: expected a whole number"));
        assert!(
            usage(&["train", "--quantization_bit", "5000000000"]).contains("is 5000000000: it is too large")
        );
        let message = usage(&["train", "--quantization_bit=-1", "--lr_scheduler_type", "cosin"]);
        assert!(
            message.contains("--quantization_bit is -1: expected a whole number, and none below zero"),
            "{message}"
        );
        assert!(message.contains("linear, cosine"), "{message}");
        assert!(message.contains("; did you mean `cosine`?"), "{message}");
    }

    /// The next word is no value of a flag that needs none, or has none, and what is behind `--` is no flag.
    #[test]
    fn only_values_are_told_of_as_such() {
        let message = usage(&["train", "--profile", "--batch_size", "x"]);
        assert!(message.contains("error: --batch_size is x: "), "{message}");
        assert!(!message.contains("--profile"), "{message}");
        let message = usage(&["infer", "--seed", "x", "--", "--top_k=a"]);
        assert!(message.contains("error: --seed is x: ") && !message.contains("top_k"), "{message}");
        for flags in [&["train", "--batch_size", "--beta", "0.2"][..], &["train", "--output_dir"]] {
            let message = usage(flags);
            assert!(message.contains("a value is required for '--"), "{message}");
        }
    }

    #[test]
    fn what_is_far_from_every_flag_has_no_tip() {
        let message = usage(&["train", "--lora_zero", "1"]);
        assert!(!message.contains("tip:"), "{message}");
    }

    #[test]
    fn usage_names_no_flag_as_needed() {
        for flag in ["--betta", "--lora_zero", "--load_in_4bit"] {
            let message = usage(&["train", flag, "1"]);
            assert!(message.contains("Usage: orpo-wgpu train [OPTIONS]\n"), "{flag}: {message}");
        }
    }
}
