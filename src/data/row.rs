//! One JSON object to one [`Row`]: the forms that preference data comes in.
//!
//! | columns | who writes it |
//! |---|---|
//! | `query`, `response`, `rejected_response` | ms-swift |
//! | `prompt`, `chosen`, `rejected` | TRL; the answers (and the prompt) as text or as lists of `{role, content}` |
//! | `question`, `answer_zh`, `answer_en` | `shareAI/DPO-zh-en-emoji`: Chinese is chosen, English rejected |
//! | `chosen`, `rejected` | TRL; two whole conversations that differ in their last message |
//! | `messages`, `rejected_response` or `rejected_messages` | ms-swift 4 |
//! | `instruction`, `chosen`, `rejected`, perhaps `input` | LLaMA-Factory's alpaca; `input` is the query's second line |
//! | `conversations`, `chosen`, `rejected` | LLaMA-Factory's sharegpt; `chosen` and `rejected` are one message each |
//!
//! A message is `{role, content}` with the roles system, user and assistant, or `{from, value}` with system, human and gpt.
//! `system` and `history` may stand beside any of the text forms, `system` beside any form. A conversation's own
//! system message goes before the column. Other columns are ignored, but for those without which a row says something else
//! ([`MATTERS`]): a row that has one, and a form that does not read it, cannot be used.

mod advice;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::dataset::{Location, Row};
use super::message::{
    Context, Message, Object, Parsed, Role, context, kind, last_answer, last_of_same, message, messages,
    wrong_type,
};
use super::source::{Columns, SHAREAI};
use super::spelling::meant;
use crate::error::{Error, Result};

pub(super) use advice::advice;

const SWIFT: Columns =
    Columns { query: "query", response: "response", rejected_response: "rejected_response" };
const TRL: Columns = Columns { query: "prompt", response: "chosen", rejected_response: "rejected" };
const ALPACA: Columns = Columns { query: "instruction", response: "chosen", rejected_response: "rejected" };

/// The text forms, in the order in which they are looked for.
const FORMS: [Columns; 4] = [SWIFT, TRL, SHAREAI, ALPACA];

/// What alpaca rows have beside `instruction`.
const INPUT: &str = "input";
const CONVERSATIONS: &str = "conversations";

const OTHER_COLUMNS: [&str; 6] = [INPUT, CONVERSATIONS, "messages", "rejected_messages", "system", "history"];

/// Columns without which a query is not what its writer asked.
const MATTERS: [&str; 7] = [ALPACA.query, INPUT, "history", "tools", "images", "videos", "audios"];

const ACCEPTED: &str = "accepted are `query` + `response` + `rejected_response`, `prompt` + `chosen` + `rejected`, \
                        `question` + `answer_zh` + `answer_en`, `instruction` + `chosen` + `rejected`, `chosen` + \
                        `rejected` as conversations, `conversations` + `chosen` + `rejected`, and `messages` + \
                        `rejected_response`";

/// A row as its form gives it.
pub(super) struct Pair {
    /// What both answers follow.
    pub(super) context: Context,
    response: String,
    rejected_response: String,
    /// The columns that make its form.
    form: Vec<&'static str>,
    /// The columns of [`MATTERS`] that are read, or that repeat what is.
    read: &'static [&'static str],
}

/// Checks that `--columns` renames to columns of ours, or to nothing.
///
/// # Errors
/// [`Error::Config`] with every entry that does not.
pub(super) fn check_renames(columns: &BTreeMap<String, String>) -> Result<()> {
    let known = || FORMS.into_iter().flat_map(Columns::names).chain(OTHER_COLUMNS);
    let problems: Vec<_> = columns
        .iter()
        .filter(|(_, ours)| !ours.is_empty() && known().all(|column| column != *ours))
        .map(|(theirs, ours)| format!("--columns renames `{theirs}` to `{ours}`, which is no column of ours"))
        .collect();
    if problems.is_empty() {
        return Ok(());
    }
    let known: BTreeSet<_> = known().collect();
    let known: Vec<_> = known.into_iter().collect();
    let hint = format!("our columns are {}; \"\" leaves one out", known.join(", "));
    Err(Error::Config { problems, hint: Some(hint) })
}

/// Reads a row, or says why it cannot be used.
pub(super) fn parse(value: Value, renames: &BTreeMap<String, String>, location: Location) -> Parsed<Row> {
    let Value::Object(mut object) = value else {
        return Err(format!("expected a JSON object, found {}", kind(&value)));
    };
    if let Some([first, second, ours]) = renamed_alike(&object, renames) {
        return Err(format!(
            "--columns renames both `{first}` and `{second}`, which the row has, to `{ours}`"
        ));
    }
    rename(&mut object, renames);
    let pair = pair(&object)?;
    if let Some(other) = other_pair(&object, &pair) {
        let its_own: Vec<_> =
            other.iter().filter(|column| !pair.form.contains(column)).map(|column| (*column, "")).collect();
        return Err(format!(
            "the row is one by {} and another by {}: it has to be one of them; where all rows are both, {} reads the first",
            quoted(&pair.form),
            quoted(&other),
            advice::columns_flag(renames, &its_own)
        ));
    }
    let Pair { context, response, rejected_response, form: _, read } = pair;
    if let Some(column) = MATTERS.iter().find(|column| !read.contains(column) && is_filled(&object, column)) {
        let place = if *column == INPUT { ", but beside `instruction`" } else { "" };
        let without = advice::columns_flag(renames, &[(column, "")]);
        return Err(format!("`{column}` is not read in a row of this form{place}; {without} leaves it out"));
    }
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

/// Two columns of a row that would be one, and which.
fn renamed_alike<'a>(object: &Object, renames: &'a BTreeMap<String, String>) -> Option<[&'a str; 3]> {
    let mut seen = BTreeMap::new();
    let mut present =
        renames.iter().filter(|(theirs, ours)| !ours.is_empty() && object.contains_key(*theirs));
    present.find_map(|(theirs, ours)| Some([seen.insert(ours, theirs)?, theirs, ours].map(String::as_str)))
}

/// Renames all columns at once, so that two may change places; those that have no new name are gone.
fn rename(object: &mut Object, renames: &BTreeMap<String, String>) {
    let renamed: Vec<_> = renames
        .iter()
        .filter_map(|(theirs, ours)| Some((ours.clone(), object.shift_remove(theirs)?)))
        .filter(|(ours, _)| !ours.is_empty())
        .collect();
    object.extend(renamed);
}

/// Whether a column is there and says something.
pub(super) fn is_filled(object: &Object, column: &str) -> bool {
    match object.get(column) {
        None | Some(Value::Null) => false,
        // LLaMA-Factory keeps `tools` as a list that is written as a text.
        Some(Value::String(text)) => !matches!(text.trim(), "" | "[]" | "{}" | "null"),
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::Object(fields)) => !fields.is_empty(),
        Some(Value::Bool(is_set)) => *is_set,
        Some(Value::Number(_)) => true,
    }
}

/// The columns of a text form that is a row of its own beside this one: another query or another answer. (Alpaca's shares its answers
/// with TRL's, and its query [`MATTERS`].)
fn other_pair(object: &Object, pair: &Pair) -> Option<[&'static str; 3]> {
    let texts = [&pair.context.query, &pair.response, &pair.rejected_response];
    let is_other = |form: &[&str; 3]| {
        let theirs = || {
            form.iter().zip(texts).map(|(column, text)| (object.get(*column).and_then(Value::as_str), text))
        };
        form.iter().all(|column| is_filled(object, column))
            && theirs().all(|(theirs, _)| theirs.is_some())
            && theirs().any(|(theirs, text)| theirs != Some(text))
    };
    [SWIFT, TRL, SHAREAI].map(Columns::names).into_iter().find(is_other)
}

/// Finds the form by the columns present.
pub(super) fn pair(object: &Object) -> Parsed<Pair> {
    let has = |column: &str| object.contains_key(column);
    let is_list = |column: &str| object.get(column).is_some_and(Value::is_array);
    let has_answers = has(TRL.response) && has(TRL.rejected_response);
    // Beside two whole conversations it repeats the chosen one.
    let is_repeated = is_list(TRL.response) && !has("rejected_response") && !has("rejected_messages");
    if object.get("messages").is_some_and(|messages| !messages.is_null()) && !is_repeated {
        if has_answers && !has("rejected_response") && !has("rejected_messages") {
            return answers_to(object, "messages");
        }
        let chosen = messages(object, "messages")?;
        let (context, response) = last_answer(&chosen, "messages")?;
        let (rejected, rejected_response) = match (has("rejected_response"), has("rejected_messages")) {
            (true, _) => ("rejected_response", text(object, "rejected_response")?.to_owned()),
            (_, true) => ("rejected_messages", last_of_same(object, "rejected_messages", &chosen)?),
            _ => return Err("`messages` needs a column `rejected_response` beside it".to_owned()),
        };
        return Ok(Pair {
            context,
            response,
            rejected_response,
            form: vec!["messages", rejected],
            read: &[],
        });
    }
    if is_list(TRL.response) && has(TRL.rejected_response) {
        return whole_conversations(object);
    }
    if is_list(CONVERSATIONS) && has_answers && object[TRL.response].is_object() {
        return answers_to(object, CONVERSATIONS);
    }
    let Some(columns) = FORMS.iter().find(|c| has(c.query) && has(c.response) && has(c.rejected_response))
    else {
        return Err(unknown_form(object));
    };
    let (context, read): (_, &[_]) = match &object[columns.query] {
        Value::Array(_) if *columns == TRL => {
            (context(&messages(object, columns.query)?, columns.query)?, &[])
        }
        _ if *columns == ALPACA => (single(object, instruction(object)?)?, &[ALPACA.query, INPUT, "history"]),
        _ => (single(object, text(object, columns.query)?.to_owned())?, &["history"]),
    };
    let response = text(object, columns.response)?.to_owned();
    let rejected_response = text(object, columns.rejected_response)?.to_owned();
    Ok(Pair { context, response, rejected_response, form: columns.names().into(), read })
}

/// A text after the turns of `history`.
pub(super) fn single(object: &Object, query: String) -> Parsed<Context> {
    Ok(Context { system: None, history: history(object)?, query })
}

/// `instruction` and `input`, a line each; where one is empty, the other.
pub(super) fn instruction(object: &Object) -> Parsed<String> {
    let parts = [optional_text(object, ALPACA.query)?, optional_text(object, INPUT)?];
    let parts: Vec<_> = parts.into_iter().flatten().filter(|part| !part.is_empty()).collect();
    Ok(parts.join("\n"))
}

/// LLaMA-Factory's sharegpt: a conversation in `column` that ends with the user, and an answer each in `chosen` and `rejected`.
fn answers_to(object: &Object, column: &'static str) -> Parsed<Pair> {
    let answer = |column: &str| match message(&object[column], column)? {
        Message { role: Role::Assistant, content } => Ok(content.to_owned()),
        _ => Err(format!("`{column}` must be a message of the assistant (gpt)")),
    };
    Ok(Pair {
        context: context(&messages(object, column)?, column)?,
        response: answer(TRL.response)?,
        rejected_response: answer(TRL.rejected_response)?,
        form: vec![column, TRL.response, TRL.rejected_response],
        read: &[],
    })
}

/// TRL's conversational forms: `chosen` and `rejected` are one assistant message each after `prompt`, or whole
/// conversations (a `prompt` beside those repeats their first message, and is not looked at).
fn whole_conversations(object: &Object) -> Parsed<Pair> {
    let chosen = messages(object, TRL.response)?;
    let form = vec![TRL.response, TRL.rejected_response];
    let rejected_response = |chosen: &[Message]| last_of_same(object, TRL.rejected_response, chosen);
    if let [Message { role: Role::Assistant, content }] = chosen[..] {
        let (context, read): (_, &[_]) = match object.get(TRL.query) {
            None | Some(Value::Null) => {
                return Err("`chosen` has only an answer, and there is no `prompt`".to_owned());
            }
            Some(Value::Array(_)) => (context(&messages(object, TRL.query)?, TRL.query)?, &[]),
            Some(_) => (single(object, text(object, TRL.query)?.to_owned())?, &["history"]),
        };
        let rejected_response = rejected_response(&chosen)?;
        return Ok(Pair { context, response: content.to_owned(), rejected_response, form, read });
    }
    let (context, response) = last_answer(&chosen, TRL.response)?;
    let rejected_response = rejected_response(&chosen)?;
    Ok(Pair { context, response, rejected_response, form, read: &[ALPACA.query, INPUT] })
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

pub(super) fn text<'a>(object: &'a Object, column: &str) -> Parsed<&'a str> {
    optional_text(object, column)?.ok_or_else(|| format!("`{column}` is null"))
}

pub(super) fn optional_text<'a>(object: &'a Object, column: &str) -> Parsed<Option<&'a str>> {
    match object.get(column) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(wrong_type(column, "a string", other)),
    }
}

fn quoted(columns: &[&str]) -> String {
    columns.iter().map(|column| format!("`{column}`")).collect::<Vec<_>>().join(", ")
}

fn unknown_form(object: &Object) -> String {
    let forms = FORMS.map(Columns::names);
    for names in forms.into_iter().chain([[CONVERSATIONS, TRL.response, TRL.rejected_response]]) {
        let (found, missing): (Vec<_>, Vec<_>) =
            names.into_iter().partition(|name| object.contains_key(*name));
        if let ([_, _], [missing]) = (&found[..], &missing[..]) {
            let near =
                meant(missing, object.keys().map(String::as_str).filter(|column| !found.contains(column)));
            let near = near.map_or_else(String::new, |near| format!("; is it `{near}`?"));
            return format!("no column `{missing}` beside {}{near}", quoted(&found));
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
        parse(value, &renames, Location::new(Path::new("rows.jsonl"), 7))
    }

    /// A row as `[system, history…, query, chosen, rejected]`, `-` for no system prompt.
    fn flat(row: &Row) -> String {
        let system = row.system.as_deref().unwrap_or("-");
        let history: Vec<_> =
            row.history.iter().map(|(question, answer)| format!("{question}>{answer}")).collect();
        format!("{system}|{}|{}|{}|{}", history.join(","), row.query, row.response, row.rejected_response)
    }

    #[test]
    fn a_row_that_is_two_is_refused() {
        let row = |prompt: &str, chosen: &str| {
            json!({"query": "q", "response": "c", "rejected_response": "r",
                   "prompt": prompt, "chosen": chosen, "rejected": "r"})
        };
        for two in [row("p", "c"), row("q", "d")] {
            let reason = parsed(two, &[]).unwrap_err();
            assert!(
                reason.contains("`query`, `response`, `rejected_response` and another by `prompt`, `chosen`"),
                "{reason}"
            );
            assert!(
                reason.ends_with(r#"--columns '{"chosen":"","prompt":"","rejected":""}' reads the first"#),
                "{reason}"
            );
        }
        let left_out = [("prompt", ""), ("chosen", ""), ("rejected", "")];
        assert_eq!(flat(&parsed(row("p", "d"), &left_out).unwrap()), "-||q|c|r");
        assert_eq!(flat(&parsed(row("q", "c"), &[]).unwrap()), "-||q|c|r", "twice the same");
        assert_eq!(flat(&parsed(row("", "d"), &[]).unwrap()), "-||q|c|r", "one that is not filled in");
        let beside_messages = |response: &str| {
            let messages = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "c"}]);
            json!({"messages": messages, "query": "q", "response": response, "rejected_response": "r"})
        };
        let reason = parsed(beside_messages("d"), &[]).unwrap_err();
        assert!(
            reason.starts_with("the row is one by `messages`, `rejected_response` and another by `query`,"),
            "{reason}"
        );
        assert!(reason.ends_with(r#"--columns '{"query":"","response":""}' reads the first"#), "{reason}");
        assert_eq!(flat(&parsed(beside_messages("c"), &[]).unwrap()), "-||q|c|r", "twice the same");
    }

    #[test]
    fn two_columns_of_a_row_are_not_renamed_to_one() {
        let renames = [("ask", "query"), ("question", "query"), ("id", ""), ("n", "")];
        let row = |ask: &str| json!({ask: "q", "response": "c", "rejected_response": "r", "id": 1, "n": 2});
        assert_eq!(flat(&parsed(row("ask"), &renames).unwrap()), "-||q|c|r", "another file has the other");
        let mut both = row("ask");
        both["question"] = json!("p");
        let reason = parsed(both, &renames).unwrap_err();
        assert!(
            reason.contains("renames both `ask` and `question`, which the row has, to `query`"),
            "{reason}"
        );
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
                json!({"prompt": "q", "chosen": "c", "rejected": "r", "conversations": [], "tools": "[]"}),
                "-||q|c|r",
            ),
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
            (
                json!({"prompt": "q", "messages": [user("q"), assistant("c")],
                       "chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")]}),
                "-||q|c|r",
            ),
        ] {
            assert_eq!(flat(&parsed(value.clone(), &[]).unwrap()), expected, "{value}");
        }
    }

    #[test]
    fn llama_factory_s_forms_give_their_rows() {
        let human = |text: &str| json!({"from": "human", "value": text});
        let gpt = |text: &str| json!({"from": "gpt", "value": text});
        let system = json!({"from": "system", "value": "s"});
        for (value, expected) in [
            (json!({"instruction": "i", "chosen": "c", "rejected": "r"}), "-||i|c|r"),
            (json!({"instruction": "i", "input": "x", "chosen": "c", "rejected": "r"}), "-||i\nx|c|r"),
            (json!({"instruction": "i", "input": "", "chosen": "c", "rejected": "r"}), "-||i|c|r"),
            (json!({"instruction": "i", "input": null, "chosen": "c", "rejected": "r"}), "-||i|c|r"),
            (json!({"instruction": "", "input": "x", "chosen": "c", "rejected": "r"}), "-||x|c|r"),
            (
                json!({"instruction": "i", "input": "x", "chosen": "c", "rejected": "r", "system": "s",
                       "history": [["a", "b"]], "images": []}),
                "s|a>b|i\nx|c|r",
            ),
            (json!({"conversations": [human("q")], "chosen": gpt("c"), "rejected": gpt("r")}), "-||q|c|r"),
            (
                json!({"conversations": [human("a"), gpt("b"), human("q")], "chosen": gpt("c"),
                       "rejected": gpt("r"), "system": "s", "tools": ""}),
                "s|a>b|q|c|r",
            ),
            (
                json!({"conversations": [system, human("q")], "chosen": gpt("c"), "rejected": gpt("r"), "system": "other"}),
                "s||q|c|r",
            ),
            (
                json!({"messages": [{"role": "user", "content": "q"}],
                       "chosen": {"role": "assistant", "content": "c"},
                       "rejected": {"role": "assistant", "content": "r"}}),
                "-||q|c|r",
            ),
            (
                json!({"chosen": [human("q"), gpt("c")], "rejected": [human("q"), gpt("r")], "instruction": "q"}),
                "-||q|c|r",
            ),
        ] {
            assert_eq!(flat(&parsed(value.clone(), &[]).unwrap()), expected, "{value}");
        }
    }

    #[test]
    fn what_matters_is_not_left_out_in_silence() {
        let row = |column: &str, value: Value| {
            let mut row = json!({"prompt": "q", "chosen": "c", "rejected": "r"});
            row[column] = value;
            row
        };
        for (column, value) in [
            ("input", json!("x")),
            ("instruction", json!("i")),
            ("tools", json!([{"name": "t"}])),
            ("images", json!(["a.png"])),
        ] {
            let reason = parsed(row(column, value.clone()), &[]).unwrap_err();
            assert!(reason.starts_with(&format!("`{column}` is not read in a row of this form")), "{reason}");
            assert!(
                reason.ends_with(&format!("--columns '{{\"{column}\":\"\"}}' leaves it out")),
                "{reason}"
            );
            assert_eq!(flat(&parsed(row(column, value), &[(column, "")]).unwrap()), "-||q|c|r");
            parsed(row(column, json!(null)), &[]).unwrap();
        }
        let named = json!({"question": "q", "chosen": "c", "rejected": "r", "tools": "[1]"});
        let reason = parsed(named, &[("question", "prompt")]).unwrap_err();
        assert!(
            reason.ends_with(r#"--columns '{"question":"prompt","tools":""}' leaves it out"#),
            "what was given stays: {reason}"
        );
        let renamed = json!({"question": "i", "input": "x", "chosen": "c", "rejected": "r"});
        let reason = parsed(renamed.clone(), &[("question", "prompt")]).unwrap_err();
        assert!(reason.contains("but beside `instruction`"), "{reason}");
        assert_eq!(flat(&parsed(renamed, &[("question", "instruction")]).unwrap()), "-||i\nx|c|r");
        let user = json!({"role": "user", "content": "q"});
        let answer = |text: &str| json!({"role": "assistant", "content": text});
        for value in [
            json!({"prompt": [user], "chosen": [answer("c")], "rejected": [answer("r")], "history": [["a", "b"]]}),
            json!({"chosen": [user, answer("c")], "rejected": [user, answer("r")], "history": [["a", "b"]]}),
            json!({"messages": [user, answer("c")], "rejected_response": "r", "history": [["a", "b"]]}),
        ] {
            let reason = parsed(value, &[]).unwrap_err();
            assert!(reason.starts_with("`history` is not read"), "{reason}");
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
                json!({"prompt": "q", "choosen": "c", "rejected": "r"}),
                "no column `chosen` beside `prompt`, `rejected`; is it `choosen`?",
            ),
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
                "`messages[0].role` is `tool`, expected system, user (human) or assistant (gpt)",
            ),
            (
                json!({"messages": [1], "rejected_response": "r"}),
                "`messages[0]` must be a message, found a number",
            ),
            (
                json!({"instruction": "i", "chosen": "c"}),
                "no column `rejected` beside `instruction`, `chosen`",
            ),
            (
                json!({"instruction": "i", "input": ["x"], "chosen": "c", "rejected": "r"}),
                "`input` must be a string, found a list",
            ),
            (
                json!({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "c"}}),
                "no column `rejected` beside `conversations`, `chosen`",
            ),
            (
                json!({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "human", "value": "c"}, "rejected": {}}),
                "`chosen` must be a message of the assistant (gpt)",
            ),
            (
                json!({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "c"}, "rejected": "r"}),
                "`rejected` must be a message, found a string",
            ),
            (
                json!({"conversations": [{"from": "observation", "value": "q"}], "chosen": {}, "rejected": {}}),
                "`conversations[0].from` is `observation`, expected system, user (human) or assistant (gpt)",
            ),
            (
                json!({"conversations": [{"from": "human"}], "chosen": {}, "rejected": {}}),
                "`conversations[0]` has no `value`",
            ),
            (
                json!({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "chosen": {}, "rejected": {}}),
                "`conversations` must take turns",
            ),
            (json!({"conversations": [], "chosen": {}, "rejected": {}}), "`conversations` must take turns"),
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
        for ours in ["history", "input", "conversations", ""] {
            check_renames(&renames(ours)).unwrap();
        }
        let error = check_renames(&renames("qeury")).unwrap_err();
        assert!(error.to_string().contains("--columns renames `frage` to `qeury`"), "{error}");
        assert!(error.hint().unwrap().contains("rejected_response"), "{error:?}");
    }
}
