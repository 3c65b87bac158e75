//! A file of prompts, answered one by one.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

use serde_json::Value;

use super::chat::{Chat, Manner, OUTPUT, ask_on_line, figures, note, unless_closed};
use super::generate::StopReason;
use crate::data::dataset::Location;
use crate::data::prompts::Prompt;
use crate::error::{Error, Result};
use crate::ops::Kernels;
use crate::words::counted;

/// Whether a file is there that answers would be added to.
fn holds_something(path: &Path) -> bool {
    path.metadata().is_ok_and(|data| data.is_file() && data.len() > 0)
}

/// Checks that nothing is lost where results go, which is to be a new file.
///
/// # Errors
/// [`Error::File`] if there is a file of that name that holds something, as that of the prompts does.
pub fn check_result_file(path: &Path) -> Result<()> {
    match holds_something(path) {
        true => Err(Error::file(path, "is there already")
            .with_hint("--append adds to what an interrupted run left; else name another --result_file")),
        false => Ok(()),
    }
}

/// The prompts that a result file has no answer to, in their order, for it to be gone on with; of one that is missing, all.
///
/// # Errors
/// [`Error::Row`] of its first line that is no answer to a prompt behind those before, so that nothing else is written into;
/// [`Error::File`] if it has all answers, [`Error::Io`] if it cannot be read.
pub fn unanswered(path: &Path, prompts: Vec<Result<Prompt>>) -> Result<Vec<Result<Prompt>>> {
    if !holds_something(path) {
        return Ok(prompts);
    }
    let answers = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let mut prompts = prompts.into_iter().peekable();
    let mut unanswered = Vec::new();
    for (i, line) in answers.lines().enumerate() {
        let is_its = |prompt: &Result<Prompt>| prompt.as_ref().is_ok_and(|prompt| is_answer(line, prompt));
        unanswered.extend(std::iter::from_fn(|| prompts.next_if(|prompt| !is_its(prompt))));
        if prompts.next().is_none() {
            let problem = "is no answer to the prompts given, in their order";
            return Err(Location::new(path, i + 1).error(problem).with_hint(
                "--append adds to answers to the same prompts; a last line that was cut off has to be taken away",
            ));
        }
    }
    unanswered.extend(prompts);
    match unanswered.iter().any(Result::is_ok) {
        true => Ok(unanswered),
        false => Err(Error::file(path, "has all answers already").with_hint("name another --result_file")),
    }
}

/// Whether a line of a result file is what [`answer_prompts`] writes of this prompt.
fn is_answer(line: &str, prompt: &Prompt) -> bool {
    let written = serde_json::from_str::<Value>(line).ok();
    let response = written.as_ref().and_then(|row| row["response"].as_str());
    response.is_some_and(|response| result(prompt, response).to_string() == line)
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

/// A file to add lines to.
fn end_of(path: &Path) -> std::io::Result<File> {
    let text = if holds_something(path) { std::fs::read(path)? } else { Vec::new() };
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    if text.last().is_some_and(|last| *last != b'\n') {
        file.write_all(b"\n")?;
    }
    Ok(file)
}

/// Answers [`answerable`] prompts, each in a conversation of its own with the same draws, so that an answer depends on its prompt alone.
///
/// Without `result_file` every prompt and its answer are written to `output` as they come. With it they are added to that file, one JSON
/// object a line: the row's columns (or `query`) and `response`; a response that the row already had is kept as `labels`, as ms-swift
/// does. A run that ends early leaves the answers up to then, for [`unanswered`] to go on from. Rows without a system prompt of their own have the chat's.
///
/// # Errors
/// As [`Chat::ask`]; [`Error::Io`] if the file or the output cannot be written. That nobody reads the output
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
        Some(path) => Some((path, end_of(path).map_err(Error::io("write", path))?)),
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
                // In one piece, so that a program that is ended leaves whole lines.
                let line = format!("{}\n", result(prompt, response));
                file.write_all(line.as_bytes()).map_err(Error::io("write", *path))?;
                if manner.is_terminal || manner.verbose {
                    note(notes, &format!("{}/{}: {}\n", i + 1, prompts.len(), figures(&generation)));
                }
                Ok(())
            }
        }
    };
    unless_closed(prompts.iter().enumerate().try_for_each(&mut answer))?;
    if let Some(path) = result_file {
        let mut cut = String::new();
        for (n, by) in [(n_cut, "--max_new_tokens"), (n_full, "the model's context")] {
            if n > 0 {
                cut += &format!(", {n} of them cut by {by}");
            }
        }
        note(notes, &format!("{} written to {}{cut}\n", counted(prompts.len(), "answer"), path.display()));
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
    fn what_has_answers_is_gone_on_with_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let (rows, answers) = (folder.path().join("rows.jsonl"), folder.path().join("answers.jsonl"));
        let text = r#"{"query": "a", "p": 0.1} {} {"query": "b"} {"query": "c"}"#;
        std::fs::write(&rows, text.replace("} {", "}\n{")).unwrap();
        let rest = || unanswered(&answers, read_prompts(&rows).unwrap());
        check_result_file(&answers).unwrap();
        assert_eq!(rest().unwrap().len(), 4, "there is no file");
        let line = |i: usize, response: &str| {
            format!("{}\n", result(read_prompts(&rows).unwrap()[i].as_ref().unwrap(), response))
        };
        let queries = |rest: Vec<Result<Prompt>>| -> Vec<_> {
            rest.into_iter()
                .map(|prompt| prompt.map_or_else(|_| "-".to_owned(), |prompt| prompt.query))
                .collect()
        };
        for (text, left) in [
            (line(0, "1") + &line(2, "2\n"), vec!["-", "c"]),
            (line(2, "2") + line(3, "3").trim_end(), vec!["a", "-"]),
        ] {
            std::fs::write(&answers, &text).unwrap();
            assert_eq!(queries(rest().unwrap()), left);
            assert!(check_result_file(&answers).is_err(), "nobody asked for it to be gone on with");
            end_of(&answers).unwrap();
            assert_eq!(std::fs::read_to_string(&answers).unwrap(), text.trim_end().to_owned() + "\n");
        }
        let refused = [
            (line(2, "2") + &line(0, "1"), "answers.jsonl:2: is no answer to the prompts"),
            (line(0, "1") + "{\"que", "answers.jsonl:2: is no answer"),
            ("my notes\n".to_owned(), "answers.jsonl:1: is no answer"),
            (line(0, "1") + &line(2, "2") + &line(3, "3"), "answers.jsonl: has all answers already"),
        ];
        for (text, says) in refused {
            std::fs::write(&answers, &text).unwrap();
            let error = rest().unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
            assert_eq!(std::fs::read_to_string(&answers).unwrap(), text);
        }
    }
}
