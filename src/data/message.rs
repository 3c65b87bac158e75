//! Conversations as lists of messages, in the spellings of OpenAI (`role`, `content`) and ShareGPT (`from`, `value`).

use serde_json::{Map, Value};

use super::row::is_filled;

pub(super) type Object = Map<String, Value>;
/// Every failure in here is the reason for which the row cannot be used.
pub(super) type Parsed<T> = Result<T, String>;

/// What an assistant asks of tools, beside or instead of what it says.
const CALLS: [&str; 2] = ["tool_calls", "function_call"];

/// What both answers follow.
pub(super) struct Context {
    pub(super) system: Option<String>,
    pub(super) history: Vec<(String, String)>,
    pub(super) query: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    System,
    User,
    Assistant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message<'a> {
    pub(super) role: Role,
    pub(super) content: &'a str,
}

pub(super) fn messages<'a>(object: &'a Object, column: &str) -> Parsed<Vec<Message<'a>>> {
    let value = &object[column];
    let list = value.as_array().ok_or_else(|| wrong_type(column, "a list of messages", value))?;
    list.iter().enumerate().map(|(i, value)| message(value, &format!("{column}[{i}]"))).collect()
}

/// A message in either spelling; `place` is where it stands.
pub(super) fn message<'a>(value: &'a Value, place: &str) -> Parsed<Message<'a>> {
    let object = value.as_object().ok_or_else(|| wrong_type(place, "a message", value))?;
    if let Some(calls) = CALLS.iter().find(|field| is_filled(object, field)) {
        return Err(format!("`{place}` has `{calls}`, without which the conversation is another"));
    }
    let (role, content) = if object.contains_key("from") { ("from", "value") } else { ("role", "content") };
    let field = |name: &str| match object.get(name) {
        Some(Value::String(text)) => Ok(text.as_str()),
        Some(other) => Err(wrong_type(&format!("{place}.{name}"), "a string", other)),
        None => Err(format!("`{place}` has no `{name}`")),
    };
    let role = match field(role)? {
        "system" => Role::System,
        "user" | "human" => Role::User,
        "assistant" | "gpt" => Role::Assistant,
        other => {
            return Err(format!(
                "`{place}.{role}` is `{other}`, expected system, user (human) or assistant (gpt)"
            ));
        }
    };
    Ok(Message { role, content: field(content)? })
}

/// Splits a whole conversation into what comes before its last message, and that message, an answer.
pub(super) fn last_answer(conversation: &[Message], column: &str) -> Parsed<(Context, String)> {
    match conversation {
        [before @ .., Message { role: Role::Assistant, content }] => {
            Ok((context(before, column)?, (*content).to_owned()))
        }
        _ => Err(format!("`{column}` does not end with an assistant message")),
    }
}

/// The last message of a conversation that must otherwise be the same as `chosen`.
pub(super) fn last_of_same(object: &Object, column: &str, chosen: &[Message]) -> Parsed<String> {
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
pub(super) fn context(messages: &[Message], column: &str) -> Parsed<Context> {
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

pub(super) fn wrong_type(column: &str, expected: &str, found: &Value) -> String {
    format!("`{column}` must be {expected}, found {}", kind(found))
}

pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
