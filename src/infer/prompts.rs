//! A file of prompts, answered one by one.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use serde_json::Value;

use super::chat::{Chat, Manner, OUTPUT, ask_on_line, figures, note, unless_closed};
use super::generate::StopReason;
use crate::data::prompts::Prompt;
use crate::error::{Error, Result};
use crate::ops::Kernels;
use crate::words::counted;

/// Checks that nothing is lost where results go.
///
/// # Errors
/// [`Error::File`] if there is a file of that name that holds something, as that of the prompts does.
pub fn check_result_file(path: &Path) -> Result<()> {
    match path.metadata() {
        Ok(data) if data.is_file() && data.len() > 0 => {
            let problem = "is there already, and what it holds would be lost";
            Err(Error::file(path, problem).with_hint("name another --result_file"))
        }
        _ => Ok(()),
    }
}

fn create(path: &Path) -> Result<File> {
    check_result_file(path)?;
    File::create(path).map_err(Error::io("create", path))
}

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
/// Without `result_file` every prompt and its answer are written to `output` as they come. With it they go into that file, one JSON
/// object a line: the row's columns (or `query`) and `response`; a response that the row already had is kept as `labels`, as ms-swift
/// does. A run that ends early leaves the answers up to then. Rows without a system prompt of their own have the chat's.
///
/// # Errors
/// As [`check_result_file`]; as [`Chat::ask`]; [`Error::Io`] if the file or the output cannot be written. That nobody reads the output
/// any more is no error.
pub fn answer_prompts<B: Kernels>(
    chat: &mut Chat<'_, B>,
    prompts: &[Prompt],
    result_file: Option<&Path>,
    output: &mut dyn Write,
    notes: &mut dyn Write,
    manner: Manner,
) -> Result<()> {
    let system = chat.system().map(str::to_owned);
    let mut file = match result_file {
        Some(path) => Some((path, create(path)?)),
        None => None,
    };
    let (mut n_cut, mut n_full) = (0, 0);
    let mut answer = |(i, prompt): (usize, &Prompt)| {
        begin(chat, prompt, system.as_deref());
        match &mut file {
            None => {
                let space = if i == 0 { "" } else { "\n" };
                writeln!(output, "{space}>>> {}", prompt.query).map_err(Error::io("write", OUTPUT))?;
                ask_on_line(chat, &prompt.query, output, notes, manner)
            }
            Some((path, file)) => {
                let generation = chat.ask(&prompt.query, &mut std::io::sink())?;
                n_cut += usize::from(generation.stop_reason == StopReason::MaxNewTokens);
                n_full += usize::from(generation.stop_reason == StopReason::ContextEnd);
                let response =
                    chat.history().last().map(|(_, response)| response.as_str()).unwrap_or_default();
                writeln!(file, "{}", result(prompt, response)).map_err(Error::io("write", *path))?;
                if manner.is_terminal || manner.verbose {
                    note(notes, &format!("{}/{}: {}\n", i + 1, prompts.len(), figures(&generation)));
                }
                Ok(())
            }
        }
    };
    unless_closed(prompts.iter().enumerate().try_for_each(&mut answer))?;
    if let Some(path) = result_file {
        let are = if prompts.len() == 1 { "is" } else { "are" };
        let mut cut = String::new();
        for (n, by) in [(n_cut, "--max_new_tokens"), (n_full, "the model's context")] {
            if n > 0 {
                cut += &format!(", {n} of them cut by {by}");
            }
        }
        note(notes, &format!("{} {are} in {}{cut}\n", counted(prompts.len(), "answer"), path.display()));
    }
    Ok(())
}

fn result(prompt: &Prompt, response: &str) -> Value {
    let mut row = prompt.columns.clone();
    if row.is_empty() {
        row.insert("query".to_owned(), Value::from(prompt.query.as_str()));
    }
    if let Some(labels) = row.insert("response".to_owned(), Value::from(response)) {
        row.insert("labels".to_owned(), labels);
    }
    Value::Object(row)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::prompts::read_prompts;

    fn read(name: &str, text: &str) -> Prompt {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        read_prompts(&path).unwrap().remove(0).unwrap()
    }

    #[test]
    fn a_result_keeps_the_row_and_its_own_response() {
        let rows = "{\"query\": \"a\", \"response\": \"old\", \"id\": 7}\n";
        let expected = serde_json::json!({ "query": "a", "response": "new", "id": 7, "labels": "old" });
        assert_eq!(result(&read("prompts.jsonl", rows), "new"), expected);
        let expected = serde_json::json!({ "query": "b", "response": "c" });
        assert_eq!(result(&read("prompts.txt", "b"), "c"), expected);
    }

    #[test]
    fn a_file_of_that_name_is_left_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("answers.jsonl");
        for _ in 0..2 {
            create(&path).unwrap();
        }
        std::fs::write(&path, "{}").unwrap();
        for error in [check_result_file(&path).unwrap_err(), create(&path).unwrap_err()] {
            assert!(
                error.to_string().contains("answers.jsonl: is there already, and what it holds"),
                "{error}"
            );
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{}");
    }
}
