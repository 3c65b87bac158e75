//! A file of prompts, answered one by one.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::chat::{Chat, Manner, OUTPUT, ask_on_line, figures, note, unless_closed};
use crate::data::dataset::Location;
use crate::error::{Error, Result, counted};
use crate::ops::Kernels;

/// Names of the column that holds what the user says, in the order in which they are looked for.
const QUERY_COLUMNS: [&str; 3] = ["query", "prompt", "question"];

/// A prompt of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// What the user says.
    pub query: String,
    /// The row's own system prompt; an empty one means none.
    pub system: Option<String>,
    /// Questions and answers before it, oldest first.
    pub history: Vec<(String, String)>,
    /// Where it stands.
    pub location: Location,
    /// The whole row, where the file has columns.
    columns: Map<String, Value>,
}

/// Reads a file of prompts: one JSON object a line if its name ends in `.jsonl` or `.json` (with `query`, `prompt` or `question`, and
/// where they are there `system` and `history`, a list of `[question, answer]`), else one prompt a line. Empty lines are ignored.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::Row`] for the first line that is no prompt, [`Error::File`] if there is none.
pub fn read_prompts(path: &Path) -> Result<Vec<Prompt>> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    let is_json = ["jsonl", "json"].contains(&extension.as_str());
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let file: Arc<Path> = path.into();
    let prompts = lines.map(|(i, line)| {
        let location = Location { path: file.clone(), line: i + 1 };
        if is_json {
            parse(line, &location).map_err(|problem| location.error(problem))
        } else if parse(line, &location).is_ok() {
            let problem = "a JSON object where every line is a prompt as it stands";
            Err(location.error(problem).with_hint("rows of columns are for a file whose name ends in .jsonl"))
        } else {
            Ok(plain(line, location))
        }
    });
    let prompts = prompts.collect::<Result<Vec<_>>>()?;
    match prompts.is_empty() {
        true => Err(Error::file(path, "holds no prompt").with_hint("one prompt a line, or a .jsonl file")),
        false => Ok(prompts),
    }
}

fn plain(line: &str, location: Location) -> Prompt {
    Prompt { query: line.to_owned(), system: None, history: Vec::new(), location, columns: Map::new() }
}

/// Reads a row, or says what is wrong with it.
fn parse(line: &str, location: &Location) -> Result<Prompt, String> {
    let value: Value = serde_json::from_str(line).map_err(|e| format!("not JSON: {e}"))?;
    let Value::Object(columns) = value else {
        return Err("expected a JSON object".to_owned());
    };
    let text = |name: &str| match columns.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(format!("`{name}` must be a string")),
    };
    let mut query = None;
    for name in QUERY_COLUMNS {
        query = query.or(text(name)?);
    }
    let query = query.ok_or_else(|| format!("no column `{}`", QUERY_COLUMNS.join("`, `")))?;
    let turns = match columns.get("history") {
        None | Some(Value::Null) => &[],
        Some(Value::Array(turns)) => turns.as_slice(),
        Some(_) => return Err("`history` must be a list of [question, answer]".to_owned()),
    };
    let turn = |(i, turn): (usize, &Value)| match turn.as_array().map(Vec::as_slice) {
        Some([Value::String(question), Value::String(answer)]) => Ok((question.clone(), answer.clone())),
        _ => Err(format!("`history[{i}]` must be a list of two strings, [question, answer]")),
    };
    let history = turns.iter().enumerate().map(turn).collect::<Result<_, _>>()?;
    Ok(Prompt { query, system: text("system")?, history, location: location.clone(), columns })
}

/// Answers prompts, each in a conversation of its own with the same draws, so that an answer depends on its prompt alone.
///
/// Without `result_file` every prompt and its answer are written to `output` as they come. With it they go into that file, one JSON
/// object a line: the row's columns (or `query`) and `response`; a response that the row already had is kept as `labels`, as ms-swift
/// does. A run that ends early leaves the answers up to then. Rows without a system prompt of their own have the chat's.
///
/// # Errors
/// [`Error::Row`], before anything is answered, for the first prompt that cannot be; as [`Chat::ask`]; [`Error::Io`] if the file or the
/// output cannot be written. That nobody reads the output any more is no error.
pub fn answer_prompts<B: Kernels>(
    chat: &mut Chat<'_, B>,
    prompts: &[Prompt],
    result_file: Option<&Path>,
    output: &mut dyn Write,
    notes: &mut dyn Write,
    manner: Manner,
) -> Result<()> {
    let system = chat.system().map(str::to_owned);
    let begin = |chat: &mut Chat<'_, B>, prompt: &Prompt| {
        chat.begin(prompt.system.clone().or_else(|| system.clone()), prompt.history.clone());
    };
    for prompt in prompts {
        begin(chat, prompt);
        chat.check(&prompt.query).map_err(|error| match error {
            Error::Config { problems, .. } => prompt.location.error(problems.join("; ")),
            other => other,
        })?;
    }
    let mut file = match result_file {
        Some(path) => Some((path, File::create(path).map_err(Error::io("create", path))?)),
        None => None,
    };
    let mut answer = |(i, prompt): (usize, &Prompt)| {
        begin(chat, prompt);
        match &mut file {
            None => {
                let space = if i == 0 { "" } else { "\n" };
                writeln!(output, "{space}>>> {}", prompt.query).map_err(Error::io("write", OUTPUT))?;
                ask_on_line(chat, &prompt.query, output, notes, manner)
            }
            Some((path, file)) => {
                let generation = chat.ask(&prompt.query, &mut std::io::sink())?;
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
        note(notes, &format!("{} {are} in {}\n", counted(prompts.len(), "answer"), path.display()));
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

    fn read(name: &str, text: &str) -> Result<Vec<Prompt>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        read_prompts(&path)
    }

    #[test]
    fn a_text_has_a_prompt_a_line() {
        let prompts = read("prompts.txt", "\u{feff}Who are you?\r\n\n  你好 \n").unwrap();
        let read: Vec<_> = prompts.iter().map(|p| (p.query.as_str(), p.location.line)).collect();
        assert_eq!(read, [("Who are you?", 1), ("  你好 ", 3)]);
    }

    #[test]
    fn rows_have_a_query_by_any_of_its_names() {
        let text = concat!(
            "{\"query\": \"a\", \"system\": \"s\", \"history\": [[\"q\", \"r\"]]}\n",
            "{\"prompt\": \"b\", \"history\": null}\n",
            "{\"question\": \"c\", \"system\": \"\", \"answer_zh\": \"d\"}\n"
        );
        let prompts = read("prompts.jsonl", text).unwrap();
        let queries: Vec<&str> = prompts.iter().map(|prompt| prompt.query.as_str()).collect();
        assert_eq!(queries, ["a", "b", "c"]);
        assert_eq!(prompts[0].history, [("q".to_owned(), "r".to_owned())]);
        let systems: Vec<_> = prompts.iter().map(|prompt| prompt.system.as_deref()).collect();
        assert_eq!(systems, [Some("s"), None, Some("")]);
    }

    #[test]
    fn a_row_that_is_no_prompt_is_named() {
        let error = |text: &str| read("prompts.jsonl", text).unwrap_err().to_string();
        for (text, problem) in [
            (
                "{\"query\": \"a\"}\n\n{\"text\": \"b\"}\n",
                "prompts.jsonl:3: no column `query`, `prompt`, `question`",
            ),
            ("{\"query\": 1}", "prompts.jsonl:1: `query` must be a string"),
            (
                "{\"query\": \"a\", \"history\": [[\"q\"]]}",
                "prompts.jsonl:1: `history[0]` must be a list of two strings",
            ),
            ("[1]", "prompts.jsonl:1: expected a JSON object"),
            ("{", "prompts.jsonl:1: not JSON"),
            ("\n", "prompts.jsonl: holds no prompt"),
        ] {
            assert!(error(text).contains(problem), "{}", error(text));
        }
        let error = read("prompts.txt", "Who are you?\n{\"query\": \"a\"}\n").unwrap_err().to_string();
        assert!(error.contains("prompts.txt:2: a JSON object"), "{error}");
    }

    #[test]
    fn a_result_keeps_the_row_and_its_own_response() {
        let rows = "{\"query\": \"a\", \"response\": \"old\", \"id\": 7}\n";
        let expected = serde_json::json!({ "query": "a", "response": "new", "id": 7, "labels": "old" });
        assert_eq!(result(&read("prompts.jsonl", rows).unwrap()[0], "new"), expected);
        let expected = serde_json::json!({ "query": "b", "response": "c" });
        assert_eq!(result(&read("prompts.txt", "b").unwrap()[0], "c"), expected);
    }
}
