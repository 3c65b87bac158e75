//! One JSON object to one [`Row`]: the forms that preference data comes in.
//!
//! | columns | who writes it |
//! |---|---|
//! | `query`, `response`, `rejected_response` | ms-swift |
//! | `prompt`, `chosen`, `rejected` | TRL; the answers (and the prompt) as text or as lists of `{role, content}` |
//! | `question`, `answer_zh`, `answer_en` | `shareAI/DPO-zh-en-emoji`: Chinese is chosen, English rejected |
//! | `chosen`, `rejected` | TRL; two whole conversations that differ in their last message |
//! | `messages`, `rejected_response` or `rejected_messages` | ms-swift 4 |
//!
//! `system` and `history` may stand beside any of the text forms, `system` beside any form. A conversation's own
//! system message goes before the column. Other columns are ignored.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::dataset::{Location, Row};
use super::source::{Columns, SHAREAI};
use crate::error::{Error, Result};

const SWIFT: Columns =
    Columns { query: "query", response: "response", rejected_response: "rejected_response" };
const TRL: Columns = Columns { query: "prompt", response: "chosen", rejected_response: "rejected" };

/// The text forms, in the order in which they are looked for.
const FORMS: [Columns; 3] = [SWIFT, TRL, SHAREAI];

const OTHER_COLUMNS: [&str; 4] = ["messages", "rejected_messages", "system", "history"];

const ACCEPTED: &str = "accepted are `query` + `response` + `rejected_response`, `prompt` + `chosen` + `rejected`, \
                        `question` + `answer_zh` + `answer_en`, `chosen` + `rejected` as conversations, and `messages` \
                        + `rejected_response`";

type Object = Map<String, Value>;
/// Every failure in here is the reason for which the row cannot be used.
type Parsed<T> = std::result::Result<T, String>;

/// What both answers follow.
struct Context {
    system: Option<String>,
    history: Vec<(String, String)>,
    query: String,
}

/// Checks that `--columns` renames to columns of ours.
///
/// # Errors
/// [`Error::Config`] with every entry that does not.
pub(super) fn check_renames(columns: &BTreeMap<String, String>) -> Result<()> {
    let known = || FORMS.iter().flat_map(|c| [c.query, c.response, c.rejected_response]).chain(OTHER_COLUMNS);
    let problems: Vec<_> = columns
        .iter()
        .filter(|(_, ours)| known().all(|column| column != *ours))
        .map(|(theirs, ours)| format!("--columns renames `{theirs}` to `{ours}`, which is no column of ours"))
        .collect();
    if problems.is_empty() {
        return Ok(());
    }
    let hint = format!("our columns are {}", known().collect::<Vec<_>>().join(", "));
    Err(Error::Config { problems, hint: Some(hint) })
}

/// Reads a row, or says why it cannot be used.
pub(super) fn parse(value: Value, renames: &BTreeMap<String, String>, location: Location) -> Parsed<Row> {
    let Value::Object(mut object) = value else {
        return Err(format!("expected a JSON object, found {}", kind(&value)));
    };
    rename(&mut object, renames);
    let (context, response, rejected_response) = pair(&object)?;
    if response.trim().is_empty() {
        return Err("the chosen answer is empty".to_owned());
    }
    if rejected_response.trim().is_empty() {
        return Err("the rejected answer is empty".to_owned());
    }
    if response == rejected_response {
        return Err("the chosen and the rejected answer are equal".to_owned());
    }
    let system = match context.system {
        Some(system) => Some(system),
        None => optional_text(&object, "system")?.map(str::to_owned),
    };
    Ok(Row { query: context.query, response, rejected_response, system, history: context.history, location })
}

/// Renames all columns at once, so that two may change places.
fn rename(object: &mut Object, renames: &BTreeMap<String, String>) {
    let renamed: Vec<_> = renames
        .iter()
        .filter_map(|(theirs, ours)| Some((ours.clone(), object.shift_remove(theirs)?)))
        .collect();
    object.extend(renamed);
}

/// Finds the form by the columns present: the context, the chosen and the rejected answer.
fn pair(object: &Object) -> Parsed<(Context, String, String)> {
    let has = |column: &str| object.contains_key(column);
    if object.get("messages").is_some_and(|messages| !messages.is_null()) {
        let chosen = messages(object, "messages")?;
        let (context, response) = last_answer(&chosen, "messages")?;
        let rejected = match (has("rejected_response"), has("rejected_messages")) {
            (true, _) => text(object, "rejected_response")?.to_owned(),
            (_, true) => last_of_same(object, "rejected_messages", &chosen)?,
            _ => return Err("`messages` needs a column `rejected_response` beside it".to_owned()),
        };
        return Ok((context, response, rejected));
    }
    if object.get(TRL.response).is_some_and(Value::is_array) && has(TRL.rejected_response) {
        return conversations(object);
    }
    let Some(columns) = FORMS.iter().find(|c| has(c.query) && has(c.response) && has(c.rejected_response))
    else {
        return Err(unknown_form(object));
    };
    let context = match &object[columns.query] {
        Value::Array(_) if *columns == TRL => context(&messages(object, columns.query)?, columns.query)?,
        _ => Context {
            system: None,
            history: history(object)?,
            query: text(object, columns.query)?.to_owned(),
        },
    };
    let response = text(object, columns.response)?.to_owned();
    Ok((context, response, text(object, columns.rejected_response)?.to_owned()))
}

/// TRL's conversational forms: `chosen` and `rejected` are one assistant message each after `prompt`, or whole
/// conversations (a `prompt` beside those repeats their first message, and is not looked at).
fn conversations(object: &Object) -> Parsed<(Context, String, String)> {
    let chosen = messages(object, TRL.response)?;
    if let [Message { role: Role::Assistant, content }] = chosen[..] {
        let context = match object.get(TRL.query) {
            None | Some(Value::Null) => {
                return Err("`chosen` has only an answer, and there is no `prompt`".to_owned());
            }
            Some(Value::Array(_)) => context(&messages(object, TRL.query)?, TRL.query)?,
            Some(_) => Context {
                system: None,
                history: history(object)?,
                query: text(object, TRL.query)?.to_owned(),
            },
        };
        return Ok((context, content.to_owned(), last_of_same(object, TRL.rejected_response, &chosen)?));
    }
    let (context, response) = last_answer(&chosen, TRL.response)?;
    Ok((context, response, last_of_same(object, TRL.rejected_response, &chosen)?))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    System,
    User,
    Assistant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Message<'a> {
    role: Role,
    content: &'a str,
}

fn messages<'a>(object: &'a Object, column: &str) -> Parsed<Vec<Message<'a>>> {
    let value = &object[column];
    let list = value.as_array().ok_or_else(|| wrong_type(column, "a list of messages", value))?;
    let message = |(i, value): (usize, &'a Value)| {
        let field = |name: &str| match value.get(name) {
            Some(Value::String(text)) => Ok(text.as_str()),
            Some(other) => Err(wrong_type(&format!("{column}[{i}].{name}"), "a string", other)),
            None => Err(format!("`{column}[{i}]` has no `{name}`")),
        };
        let role = match field("role")? {
            "system" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            other => {
                return Err(format!("`{column}[{i}].role` is `{other}`, expected system, user or assistant"));
            }
        };
        Ok(Message { role, content: field("content")? })
    };
    list.iter().enumerate().map(message).collect()
}

/// Splits a whole conversation into what comes before its last message, and that message, an answer.
fn last_answer(conversation: &[Message], column: &str) -> Parsed<(Context, String)> {
    match conversation {
        [before @ .., Message { role: Role::Assistant, content }] => {
            Ok((context(before, column)?, (*content).to_owned()))
        }
        _ => Err(format!("`{column}` does not end with an assistant message")),
    }
}

/// The last message of a conversation that must otherwise be the same as `chosen`.
fn last_of_same(object: &Object, column: &str, chosen: &[Message]) -> Parsed<String> {
    let rejected = messages(object, column)?;
    match (chosen, &rejected[..]) {
        ([before @ .., _], [same @ .., Message { role: Role::Assistant, content }]) if before == same => {
            Ok((*content).to_owned())
        }
        (_, [.., Message { role: Role::Assistant, .. }]) => {
            Err(format!("`{column}` differs from the chosen conversation before its last message"))
        }
        _ => Err(format!("`{column}` does not end with an assistant message")),
    }
}

/// `[system] (user assistant)* user` as a context.
fn context(messages: &[Message], column: &str) -> Parsed<Context> {
    let (system, turns) = match messages {
        [Message { role: Role::System, content }, rest @ ..] => (Some((*content).to_owned()), rest),
        _ => (None, messages),
    };
    let unordered =
        || format!("`{column}` must take turns, user and assistant, with a user message before the answer");
    let Some((query, turns)) = turns.split_last() else { return Err(unordered()) };
    let history = turns
        .chunks(2)
        .map(|turn| match turn {
            [question, answer] if question.role == Role::User && answer.role == Role::Assistant => {
                Ok((question.content.to_owned(), answer.content.to_owned()))
            }
            _ => Err(unordered()),
        })
        .collect::<Parsed<_>>()?;
    if query.role != Role::User {
        return Err(unordered());
    }
    Ok(Context { system, history, query: query.content.to_owned() })
}

fn history(object: &Object) -> Parsed<Vec<(String, String)>> {
    let turns = match object.get("history") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(turns)) => turns,
        Some(other) => return Err(wrong_type("history", "a list of [question, answer]", other)),
    };
    let turn = |(i, turn): (usize, &Value)| match turn.as_array().map(Vec::as_slice) {
        Some([Value::String(question), Value::String(answer)]) => Ok((question.clone(), answer.clone())),
        _ => Err(format!("`history[{i}]` must be a list of two strings, [question, answer]")),
    };
    turns.iter().enumerate().map(turn).collect()
}

fn text<'a>(object: &'a Object, column: &str) -> Parsed<&'a str> {
    optional_text(object, column)?.ok_or_else(|| format!("`{column}` is null"))
}

fn optional_text<'a>(object: &'a Object, column: &str) -> Parsed<Option<&'a str>> {
    match object.get(column) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(wrong_type(column, "a string", other)),
    }
}

fn wrong_type(column: &str, expected: &str, found: &Value) -> String {
    format!("`{column}` must be {expected}, found {}", kind(found))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn unknown_form(object: &Object) -> String {
    let quoted = |names: &[&str]| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    for columns in FORMS {
        let names = [columns.query, columns.response, columns.rejected_response];
        let (found, missing): (Vec<_>, Vec<_>) =
            names.into_iter().partition(|name| object.contains_key(*name));
        if found.len() == 2 {
            return format!("no column {} beside {}", quoted(&missing), quoted(&found));
        }
    }
    match object.keys().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => format!("the row has no columns; {ACCEPTED}"),
        ref found => format!("unknown form, with the columns {}; {ACCEPTED}", quoted(found)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    fn parsed(value: Value, renames: &[(&str, &str)]) -> Parsed<Row> {
        let renames =
            renames.iter().map(|(theirs, ours)| ((*theirs).to_owned(), (*ours).to_owned())).collect();
        parse(value, &renames, Location { path: Path::new("rows.jsonl").into(), line: 7 })
    }

    /// A row as `[system, history…, query, chosen, rejected]`, `-` for no system prompt.
    fn flat(row: &Row) -> String {
        let system = row.system.as_deref().unwrap_or("-");
        let history: Vec<_> =
            row.history.iter().map(|(question, answer)| format!("{question}>{answer}")).collect();
        format!("{system}|{}|{}|{}|{}", history.join(","), row.query, row.response, row.rejected_response)
    }

    #[test]
    fn every_form_gives_its_row() {
        let user = |text: &str| json!({"role": "user", "content": text});
        let assistant = |text: &str| json!({"role": "assistant", "content": text});
        let system = json!({"role": "system", "content": "s"});
        for (value, expected) in [
            (json!({"query": "q", "response": "c", "rejected_response": "r"}), "-||q|c|r"),
            (
                json!({"query": "q", "response": "c", "rejected_response": "r", "system": null, "history": null,
                       "id": 3}),
                "-||q|c|r",
            ),
            (
                json!({"query": "q", "response": "c", "rejected_response": "r", "system": "s",
                       "history": [["a", "b"], ["d", "e"]]}),
                "s|a>b,d>e|q|c|r",
            ),
            (json!({"query": "", "response": "c", "rejected_response": "r", "system": ""}), "|||c|r"),
            (json!({"question": "q", "answer_zh": "c", "answer_en": "r"}), "-||q|c|r"),
            (json!({"prompt": "q", "chosen": "c", "rejected": "r"}), "-||q|c|r"),
            (
                json!({"prompt": [user("q")], "chosen": [assistant("c")], "rejected": [assistant("r")]}),
                "-||q|c|r",
            ),
            (
                json!({"prompt": [system, user("a"), assistant("b"), user("q")], "chosen": [assistant("c")], "rejected": [assistant("r")]}),
                "s|a>b|q|c|r",
            ),
            (json!({"prompt": [system, user("q")], "chosen": "c", "rejected": "r"}), "s||q|c|r"),
            (json!({"prompt": "q", "chosen": [assistant("c")], "rejected": [assistant("r")]}), "-||q|c|r"),
            (
                json!({"prompt": "q", "chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")]}),
                "-||q|c|r",
            ),
            (
                json!({"chosen": [system, user("a"), assistant("b"), user("q"), assistant("c")],
                       "rejected": [system, user("a"), assistant("b"), user("q"), assistant("r")], "system": "other"}),
                "s|a>b|q|c|r",
            ),
            (
                json!({"messages": [user("a"), assistant("b"), user("q"), assistant("c")], "rejected_response": "r", "system": "s"}),
                "s|a>b|q|c|r",
            ),
            (
                json!({"messages": [user("q"), assistant("c")], "rejected_messages": [user("q"), assistant("r")]}),
                "-||q|c|r",
            ),
            (json!({"messages": null, "query": "q", "response": "c", "rejected_response": "r"}), "-||q|c|r"),
        ] {
            assert_eq!(flat(&parsed(value.clone(), &[]).unwrap()), expected, "{value}");
        }
    }

    #[test]
    fn columns_are_renamed_first_and_all_at_once() {
        let value = json!({"question": "q", "response": "r", "rejected_response": "c", "query": "not this"});
        let swapped =
            [("response", "rejected_response"), ("rejected_response", "response"), ("question", "query")];
        assert_eq!(flat(&parsed(value, &swapped).unwrap()), "-||q|c|r");
        let value = json!({"query": "q", "response": "c", "rejected_response": "r", "system": "s"});
        assert_eq!(
            flat(&parsed(value, &[("system", "prompt")]).unwrap()),
            "-||q|c|r",
            "the old name is gone"
        );
    }

    #[test]
    fn what_cannot_be_used_says_why() {
        let user = json!({"role": "user", "content": "q"});
        let assistant = |text: &str| json!({"role": "assistant", "content": text});
        for (value, expected) in [
            (json!([1]), "expected a JSON object, found a list"),
            (json!("text"), "expected a JSON object, found a string"),
            (
                json!({"query": "q", "response": "same", "rejected_response": "same"}),
                "the chosen and the rejected answer are equal",
            ),
            (
                json!({"query": "q", "response": " \n", "rejected_response": "r"}),
                "the chosen answer is empty",
            ),
            (json!({"query": "q", "response": "c", "rejected_response": ""}), "the rejected answer is empty"),
            (
                json!({"query": "q", "response": "c", "rejected_response": null}),
                "`rejected_response` is null",
            ),
            (
                json!({"query": "q", "response": "c"}),
                "no column `rejected_response` beside `query`, `response`",
            ),
            (json!({"chosen": "c", "rejected": "r"}), "no column `prompt` beside `chosen`, `rejected`"),
            (
                json!({"query": 5, "response": "c", "rejected_response": "r"}),
                "`query` must be a string, found a number",
            ),
            (
                json!({"query": "q", "response": true, "rejected_response": "r"}),
                "`response` must be a string, found a boolean",
            ),
            (
                json!({"query": "q", "response": "c", "rejected_response": "r", "system": {}}),
                "`system` must be a string, found an object",
            ),
            (
                json!({"query": "q", "response": "c", "rejected_response": "r", "history": "h"}),
                "`history` must be a list of [question, answer], found a string",
            ),
            (
                json!({"query": "q", "response": "c", "rejected_response": "r", "history": [["a", "b"], ["c"]]}),
                "`history[1]` must be a list of two strings, [question, answer]",
            ),
            (
                json!({"text": "t", "label": 1}),
                "unknown form, with the columns `text`, `label`; accepted are `query` + `response` + `rejected_response`, `prompt`",
            ),
            (json!({}), "the row has no columns; accepted are"),
            (
                json!({"messages": [user, assistant("c")]}),
                "`messages` needs a column `rejected_response` beside it",
            ),
            (
                json!({"messages": [user], "rejected_response": "r"}),
                "`messages` does not end with an assistant message",
            ),
            (
                json!({"messages": [user, user, assistant("c")], "rejected_response": "r"}),
                "`messages` must take turns",
            ),
            (json!({"messages": [assistant("c")], "rejected_response": "r"}), "`messages` must take turns"),
            (
                json!({"messages": [{"role": "tool", "content": ""}], "rejected_response": "r"}),
                "`messages[0].role` is `tool`, expected system, user or assistant",
            ),
            (
                json!({"messages": [user, {"role": "assistant"}], "rejected_response": "r"}),
                "`messages[1]` has no `content`",
            ),
            (
                json!({"messages": [user, {"role": "assistant", "content": [1]}], "rejected_response": "r"}),
                "`messages[1].content` must be a string, found a list",
            ),
            (
                json!({"messages": "m", "rejected_response": "r"}),
                "`messages` must be a list of messages, found a string",
            ),
            (
                json!({"chosen": [assistant("c")], "rejected": [assistant("r")]}),
                "`chosen` has only an answer, and there is no `prompt`",
            ),
            (
                json!({"chosen": [user, assistant("c")], "rejected": [{"role": "user", "content": "x"}, assistant("r")]}),
                "`rejected` differs from the chosen conversation before its last message",
            ),
            (
                json!({"chosen": [user, assistant("c")], "rejected": [assistant("r")]}),
                "`rejected` differs from the chosen conversation before its last message",
            ),
            (
                json!({"chosen": [user, assistant("c")], "rejected": [user]}),
                "`rejected` does not end with an assistant message",
            ),
            (
                json!({"prompt": "q", "chosen": [assistant("c")], "rejected": "r"}),
                "`rejected` must be a list of messages, found a string",
            ),
            (
                json!({"prompt": [user, assistant("a")], "chosen": [assistant("c")], "rejected": [assistant("r")]}),
                "`prompt` must take turns",
            ),
        ] {
            let reason = parsed(value.clone(), &[]).unwrap_err();
            assert!(reason.starts_with(expected), "{value}\n   gave: {reason}\nwanted: {expected}");
        }
    }

    #[test]
    fn renames_must_go_to_our_columns() {
        let renames = |ours: &str| BTreeMap::from([("frage".to_owned(), ours.to_owned())]);
        check_renames(&renames("query")).unwrap();
        check_renames(&renames("history")).unwrap();
        let error = check_renames(&renames("qeury")).unwrap_err();
        assert!(error.to_string().contains("--columns renames `frage` to `qeury`"), "{error}");
        assert!(error.hint().unwrap().contains("rejected_response"), "{error:?}");
    }
}
