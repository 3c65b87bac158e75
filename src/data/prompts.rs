//! Prompts of a file: what a model is asked without an answer.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::dataset::Location;
use super::json;
use super::message::{Context, Parsed, context, kind, last_answer, messages};
use super::row::{history, instruction, optional_text, text};
use crate::error::{Error, Result};

/// Names of the column that holds what the user says, in the order in which they are looked for.
const QUERY_COLUMNS: [&str; 4] = ["query", "prompt", "question", INSTRUCTION];
/// LLaMA-Factory's alpaca, perhaps with an `input`.
const INSTRUCTION: &str = "instruction";
/// Columns of a whole conversation.
const CONVERSATION_COLUMNS: [&str; 3] = ["messages", "conversations", "chosen"];

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
    pub columns: Map<String, Value>,
}

/// Reads a file of prompts: rows of JSON if its name ends in `.jsonl` or `.json`, else one prompt a line. Empty lines are ignored.
///
/// A row has what a row of pairs asks, which may be one: `query`, `prompt`, `question` or `instruction` with `input`, and where they are
/// there `system` and `history`, a list of `[question, answer]`; or a conversation in `messages`, `conversations`, `chosen` or `prompt`,
/// of which a last answer is left out. Other columns are kept.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::Row`] for the first line that is no prompt, [`Error::File`] if there is none.
pub fn read_prompts(path: &Path) -> Result<Vec<Prompt>> {
    let text = json::read_text(path)?;
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    let mut prompts = Vec::new();
    if ["jsonl", "json"].contains(&extension.as_str()) {
        json::each_value(&text, path, |location, value| {
            prompts.push(parse(value, &location).map_err(|problem| location.error(problem))?);
            Ok(())
        })?;
    } else {
        let file: Arc<Path> = path.into();
        let lines = json::without_mark(&text).lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        prompts =
            lines.map(|(i, line)| plain(line, Location::new(file.clone(), i + 1))).collect::<Result<_>>()?;
    }
    match prompts.is_empty() {
        true => Err(Error::file(path, "holds no prompt").with_hint("one prompt a line, or a .jsonl file")),
        false => Ok(prompts),
    }
}

/// A line as it stands, unless it is a row.
fn plain(line: &str, location: Location) -> Result<Prompt> {
    if serde_json::from_str(line).is_ok_and(|value| parse(value, &location).is_ok()) {
        let problem = "a JSON object where every line is a prompt as it stands";
        return Err(location
            .error(problem)
            .with_hint("rows of columns are for a file whose name ends in .jsonl"));
    }
    Ok(Prompt { query: line.to_owned(), system: None, history: Vec::new(), location, columns: Map::new() })
}

/// Reads a row, or says what is wrong with it.
fn parse(value: Value, location: &Location) -> Parsed<Prompt> {
    let Value::Object(columns) = value else {
        return Err(format!("expected a JSON object, found {}", kind(&value)));
    };
    let is_there = |column: &&str| columns.get(*column).is_some_and(|value| !value.is_null());
    let column = QUERY_COLUMNS.iter().chain(&CONVERSATION_COLUMNS).copied().find(is_there);
    let column = column.ok_or_else(|| {
        format!("no column `{}` or `{}`", QUERY_COLUMNS.join("`, `"), CONVERSATION_COLUMNS[0])
    })?;
    let Context { system, history, query } =
        if columns[column].is_array() || CONVERSATION_COLUMNS.contains(&column) {
            let messages = messages(&columns, column)?;
            match last_answer(&messages, column) {
                Ok((before, _)) => before,
                Err(_) => context(&messages, column)?,
            }
        } else {
            let query = match column {
                INSTRUCTION => instruction(&columns)?,
                _ => text(&columns, column)?.to_owned(),
            };
            Context { system: None, history: history(&columns)?, query }
        };
    if query.trim().is_empty() {
        return Err(format!("`{column}` asks nothing"));
    }
    let system = match system {
        Some(system) => Some(system),
        None => optional_text(&columns, "system")?.map(str::to_owned),
    };
    Ok(Prompt { query, system, history, location: location.clone(), columns })
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
            "{\"question\": \"c\", \"system\": \"\", \"answer_zh\": \"d\"}\n",
            "{\"instruction\": \"d\", \"input\": \"e\", \"chosen\": \"f\", \"rejected\": \"g\"}\n"
        );
        let prompts = read("prompts.jsonl", text).unwrap();
        let queries: Vec<&str> = prompts.iter().map(|prompt| prompt.query.as_str()).collect();
        assert_eq!(queries, ["a", "b", "c", "d\ne"]);
        assert_eq!(prompts[0].history, [("q".to_owned(), "r".to_owned())]);
        let systems: Vec<_> = prompts.iter().map(|prompt| prompt.system.as_deref()).collect();
        assert_eq!(systems, [Some("s"), None, Some(""), None]);
    }

    #[test]
    fn a_conversation_is_a_prompt_without_its_last_answer() {
        let text = r#"[{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}, {
            "prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"},
                       {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}], "system": "t"}]"#;
        let prompts = read("prompts.json", text).unwrap();
        let read: Vec<_> = prompts.iter().map(|p| (p.query.as_str(), p.system.as_deref())).collect();
        assert_eq!(read, [("a", Some("s")), ("b", Some("t"))]);
        assert_eq!(
            (prompts[0].history.len(), &prompts[1].history[..]),
            (0, &[("q".to_owned(), "r".to_owned())][..])
        );
        assert!(prompts[1].location.to_string().ends_with("prompts.json:1:88"), "{}", prompts[1].location);
    }

    #[test]
    fn pairs_are_prompts_without_their_answers() {
        let pairs = concat!(
            "{\"conversations\": [{\"from\": \"human\", \"value\": \"a\"}], \"chosen\": {}, \"rejected\": {}}\n",
            "{\"chosen\": [{\"role\": \"user\", \"content\": \"b\"}, {\"role\": \"assistant\", \"content\": \"c\"}]}\n"
        );
        let queries = read("pairs.jsonl", pairs).unwrap().into_iter().map(|prompt| prompt.query);
        assert_eq!(queries.collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn a_row_that_is_no_prompt_is_named() {
        let error = |text: &str| read("prompts.jsonl", text).unwrap_err().to_string();
        for (text, problem) in [
            (
                "{\"query\": \"a\"}\n\n{\"text\": \"b\"}\n",
                "prompts.jsonl:3: no column `query`, `prompt`, `question`, `instruction` or `messages`",
            ),
            ("{\"query\": 1}", "prompts.jsonl:1: `query` must be a string, found a number"),
            (
                "{\"query\": \"a\", \"history\": [[\"q\"]]}",
                "prompts.jsonl:1: `history[0]` must be a list of two strings",
            ),
            ("{\"prompt\": \" \"}", "prompts.jsonl:1: `prompt` asks nothing"),
            ("[1]", "prompts.jsonl:1: expected a JSON object, found a number"),
            (
                "{\"messages\": [{\"role\": \"system\", \"content\": \"s\"}]}",
                "prompts.jsonl:1: `messages` must take turns",
            ),
            ("{", "prompts.jsonl:1: not JSON"),
            ("\n", "prompts.jsonl: holds no prompt"),
        ] {
            assert!(error(text).contains(problem), "{}", error(text));
        }
        let error = read("prompts.txt", "Who are you?\n{\"query\": \"a\"}\n").unwrap_err().to_string();
        assert!(error.contains("prompts.txt:2: a JSON object"), "{error}");
    }
}
