//! Prompts of a file: what a model is asked without an answer.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::dataset::Location;
use super::json;
use super::message::{Context, Object, Parsed, context, kind, last_answer, messages};
use super::row::{instruction, is_filled, optional_text, pair, single, text};
use crate::error::{Error, Result};

/// Columns that hold what the user says, a text or a list of messages, in the order in which they are looked for.
const QUERY_COLUMNS: [&str; 3] = ["query", "prompt", "question"];
/// Columns that hold a conversation; they are looked for behind those.
const CONVERSATION_COLUMNS: [&str; 2] = ["messages", "conversations"];
/// Those of LLaMA-Factory's alpaca, which are read together.
const INSTRUCTION: [&str; 2] = ["instruction", "input"];

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
/// A row of pairs, as for training, asks what it asks there. Other rows have `query`, `prompt` or `question`, a text or a list of messages,
/// and beside a text, where they are there, `system` and `history`, a list of `[question, answer]`; or `messages` or `conversations`; or
/// `instruction` and `input`. Of messages a last answer is left out. Other columns are kept.
///
/// Gives them in order, and of rows that are no prompts why.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::Row`] for a line that is no JSON, or a row in a text, [`Error::File`] if there is nothing.
pub fn read_prompts(path: &Path) -> Result<Vec<Result<Prompt>>> {
    let text = json::read_text(path)?;
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    let mut prompts = Vec::new();
    if ["jsonl", "json"].contains(&extension.as_str()) {
        json::each_value(&text, path, |location, value| {
            prompts.push(parse(value, &location).map_err(|problem| location.error(problem)));
            Ok(())
        })?;
    } else {
        let file: Arc<Path> = path.into();
        for (i, line) in
            json::without_mark(&text).lines().enumerate().filter(|(_, line)| !line.trim().is_empty())
        {
            prompts.push(Ok(plain(line, Location::new(file.clone(), i + 1))?));
        }
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
    let Context { system, history, query } = match pair(&columns) {
        Ok(pair) => pair.context,
        Err(_) => asked(&columns)?,
    };
    if query.trim().is_empty() {
        return Err("the row asks nothing".to_owned());
    }
    let system = match system {
        Some(system) => Some(system),
        None => optional_text(&columns, "system")?.map(str::to_owned),
    };
    Ok(Prompt { query, system, history, location: location.clone(), columns })
}

/// What a row without a pair of answers asks.
fn asked(columns: &Object) -> Parsed<Context> {
    let mut all = QUERY_COLUMNS.iter().chain(&CONVERSATION_COLUMNS);
    let Some(&column) = all.clone().find(|column| is_filled(columns, column)) else {
        return match INSTRUCTION.iter().any(|column| columns.contains_key(*column)) {
            true => single(columns, instruction(columns)?),
            false if all.any(|column| columns.contains_key(*column)) => {
                Err("the row asks nothing".to_owned())
            }
            false => Err(format!(
                "no column `{}`, `{}` or `{}`",
                QUERY_COLUMNS.join("`, `"),
                CONVERSATION_COLUMNS.join("`, `"),
                INSTRUCTION[0]
            )),
        };
    };
    if QUERY_COLUMNS.contains(&column) && !columns[column].is_array() {
        return single(columns, text(columns, column)?.to_owned());
    }
    let messages = messages(columns, column)?;
    match last_answer(&messages, column) {
        Ok((before, _)) => Ok(before),
        Err(_) => context(&messages, column),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The prompts, or the first row that is none.
    fn read(name: &str, text: &str) -> Result<Vec<Prompt>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        read_prompts(&path)?.into_iter().collect()
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
    fn rows_of_pairs_ask_what_they_ask_in_training() {
        let user = |text: &str| format!(r#"{{"role": "user", "content": "{text}"}}"#);
        let answer = |text: &str| format!(r#"{{"role": "assistant", "content": "{text}"}}"#);
        let [q, a, b, c, d] = [user("q"), answer("a"), user("b"), answer("c"), answer("d")];
        let rows = [
            (r#"{"instruction": null, "input": "b", "chosen": "c", "rejected": "d"}"#.to_owned(), 0),
            (format!(r#"{{"conversations": [{b}], "chosen": {c}, "rejected": {d}}}"#), 0),
            // Its prompt repeats how the conversations begin.
            (
                format!(
                    r#"{{"prompt": "q", "chosen": [{q}, {a}, {b}, {c}], "rejected": [{q}, {a}, {b}, {d}]}}"#
                ),
                1,
            ),
            (format!(r#"{{"instruction": "x", "messages": [{b}, {c}], "rejected_response": "d"}}"#), 0),
        ];
        for (row, n_turns) in rows {
            let prompt = read("pairs.jsonl", &row).unwrap().remove(0);
            assert_eq!((prompt.query.as_str(), prompt.history.len()), ("b", n_turns), "{row}");
        }
    }

    #[test]
    fn columns_that_are_empty_are_passed_over() {
        let text = concat!(
            "{\"query\": \"\", \"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n",
            "{\"messages\": [], \"instruction\": \"\", \"input\": \"b\", \"output\": \"c\"}\n",
        );
        let queries = read("prompts.jsonl", text).unwrap().into_iter().map(|prompt| prompt.query);
        assert_eq!(queries.collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn a_row_that_is_no_prompt_is_named() {
        let error = |text: &str| read("prompts.jsonl", text).unwrap_err().to_string();
        for (text, problem) in [
            (
                "{\"query\": \"a\"}\n\n{\"text\": \"b\"}\n",
                "prompts.jsonl:3: no column `query`, `prompt`, `question`, `messages`, `conversations` or `instruction`",
            ),
            ("{\"query\": 1}", "prompts.jsonl:1: `query` must be a string, found a number"),
            (
                "{\"query\": \"a\", \"history\": [[\"q\"]]}",
                "prompts.jsonl:1: `history[0]` must be a list of two strings",
            ),
            ("{\"prompt\": \" \"}", "prompts.jsonl:1: the row asks nothing"),
            ("{\"chosen\": \"a\", \"rejected\": \"b\"}", "prompts.jsonl:1: no column `query`"),
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
