//! A file of prompts, answered one by one.

use std::io::Write;

use super::chat::{Chat, Manner, OUTPUT, ask_on_line, figures, note, unless_closed};
use super::generate::StopReason;
use super::results::Results;
use crate::data::prompts::Prompt;
use crate::error::{Error, Result};
use crate::ops::Kernels;
use crate::words::counted;

/// Of the prompts those that the model can answer, in order. The others are told of, as are rows that are none.
///
/// # Errors
/// [`Error::Row`] of the first of them if there is nothing else.
pub fn answerable<B: Kernels>(
    chat: &mut Chat<'_, B>,
    prompts: Vec<Result<Prompt>>,
    notes: &mut dyn Write,
) -> Result<Vec<Prompt>> {
    let (n_prompts, system) = (prompts.len(), chat.system().map(str::to_owned));
    let (mut can_be_answered, mut left_out) = (Vec::new(), Vec::new());
    for prompt in prompts {
        let prompt = match prompt {
            Ok(prompt) => prompt,
            Err(problem) => {
                left_out.push(problem);
                continue;
            }
        };
        begin(chat, &prompt, system.as_deref());
        match chat.check(&prompt.query) {
            Ok(()) => can_be_answered.push(prompt),
            Err(Error::Config { problems, .. }) => left_out.push(prompt.location.error(problems.join("; "))),
            Err(other) => return Err(other),
        }
    }
    chat.begin(system, Vec::new());
    if can_be_answered.is_empty() && !left_out.is_empty() {
        return Err(left_out.remove(0));
    }
    if !left_out.is_empty() {
        note(
            notes,
            &format!("{} of {n_prompts} prompts cannot be answered and are left out:\n", left_out.len()),
        );
        left_out.iter().for_each(|problem| note(notes, &format!("  {problem}\n")));
    }
    Ok(can_be_answered)
}

/// Begins a prompt's conversation; one without a system prompt of its own has this.
fn begin<B: Kernels>(chat: &mut Chat<'_, B>, prompt: &Prompt, system: Option<&str>) {
    chat.begin(prompt.system.clone().or_else(|| system.map(str::to_owned)), prompt.history.clone());
}

/// Answers [`answerable`] prompts, each in a conversation of its own with the same draws, so that an answer depends on its prompt alone.
///
/// Without `results` every prompt and its answer are written to `output` as they come. With them they are added there, and a run that ends
/// early leaves the answers up to then. Rows without a system prompt of their own have the chat's.
///
/// # Errors
/// As [`Chat::ask`]; [`Error::Io`] if the file or the output cannot be written; [`Error::Interrupted`] if an answer to a file was. That
/// nobody reads the output any more is no error.
pub fn answer_prompts<B: Kernels>(
    chat: &mut Chat<'_, B>,
    prompts: &[Prompt],
    mut results: Option<Results>,
    output: &mut dyn Write,
    notes: &mut dyn Write,
    manner: Manner,
) -> Result<()> {
    let system = chat.system().map(str::to_owned);
    let (mut n_cut, mut n_full) = (0, 0);
    let mut answer = |(i, prompt): (usize, &Prompt)| {
        begin(chat, prompt, system.as_deref());
        match &mut results {
            None => {
                let space = if i == 0 { "" } else { "\n" };
                writeln!(output, "{space}>>> {}", prompt.query).map_err(Error::io("write", OUTPUT))?;
                ask_on_line(chat, &prompt.query, output, notes, manner)
            }
            Some(results) => {
                let generation = chat.ask(&prompt.query, &mut std::io::sink())?;
                if generation.stop_reason == StopReason::Interrupted {
                    let hint = format!("--append goes on with {}", results.path().display());
                    return Err(Error::Interrupted {
                        what: "answer",
                        done: i,
                        of: prompts.len(),
                        hint: Some(hint),
                    });
                }
                n_cut += usize::from(generation.stop_reason == StopReason::MaxNewTokens);
                n_full += usize::from(generation.stop_reason == StopReason::ContextEnd);
                let response =
                    chat.history().last().map(|(_, response)| response.as_str()).unwrap_or_default();
                results.add(prompt, response)?;
                if manner.is_terminal || manner.verbose {
                    note(notes, &format!("{}/{}: {}\n", i + 1, prompts.len(), figures(&generation)));
                }
                Ok(())
            }
        }
    };
    unless_closed(prompts.iter().enumerate().try_for_each(&mut answer))?;
    if let Some(results) = results {
        let mut cut = String::new();
        for (n, by) in [(n_cut, "--max_new_tokens"), (n_full, "the model's context")] {
            if n > 0 {
                cut += &format!(", {n} of them cut by {by}");
            }
        }
        note(
            notes,
            &format!("{} written to {}{cut}\n", counted(prompts.len(), "answer"), results.path().display()),
        );
    }
    Ok(())
}
