//! What would make a row usable that is not: other names for its columns, a conversion, or another answer.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::super::source::Columns;
use super::{ALPACA, CONVERSATIONS, FORMS, Object, SWIFT, TRL, is_filled, parse, rename};
use crate::data::dataset::Location;
use crate::data::spelling::meant;
use crate::shell::{pasted, quoted, unused_beside};

/// What data sets call the question, ours among them, the likeliest first.
const QUERIES: [&str; 10] =
    ["prompt", "query", "question", "instruction", "input", "problem", "user", "human", "user_input", "task"];
/// The answer to learn.
const CHOSEN: [&str; 14] = [
    "chosen",
    "response",
    "chosen_response",
    "response_chosen",
    "chosen_answer",
    "answer_chosen",
    "output_chosen",
    "preferred",
    "accepted",
    "winner",
    "better",
    "good",
    "positive",
    "response_j",
];
/// The answer to avoid.
const REJECTED: [&str; 15] = [
    "rejected",
    "reject",
    "rejected_response",
    "response_rejected",
    "rejected_answer",
    "answer_rejected",
    "output_rejected",
    "dispreferred",
    "loser",
    "worse",
    "bad",
    "negative",
    "response_k",
    "rejected_messages",
    "rejected_output",
];
/// The only answer of rows for supervised fine-tuning.
const ANSWERS: [&str; 6] = ["output", "response", "completion", "answer", "chosen", "target"];

/// Whether the only answer of a row is a good one, in rows for KTO: TRL's name and LLaMA-Factory's.
const LABELS: [&str; 2] = ["label", "kto_tag"];

/// Columns that are not read, and that a row of texts can do without.
const NOT_TEXT: [&str; 4] = ["tools", "images", "videos", "audios"];

/// `--columns` with these names on top of those that were given; a column of the row is named as it is in the file.
pub(super) fn columns_flag(renames: &BTreeMap<String, String>, more: &[(&str, &str)]) -> String {
    flag(&with(renames, more))
}

fn flag(renames: &BTreeMap<String, String>) -> String {
    // A map of texts is always JSON.
    let json = serde_json::to_string(renames).unwrap_or_default();
    format!("--columns {}", quoted(&json))
}

fn with(renames: &BTreeMap<String, String>, more: &[(&str, &str)]) -> BTreeMap<String, String> {
    let mut all = renames.clone();
    for (column, ours) in more {
        let in_file = renames.iter().find(|(_, given)| given == column).map_or(*column, |(theirs, _)| theirs);
        all.retain(|_, given| given != ours || ours.is_empty());
        all.insert(in_file.to_owned(), (*ours).to_owned());
    }
    all
}

/// What would make the rows of this kind usable, of which `lines` has one a line; nothing where it is no matter of columns.
pub(in crate::data) fn advice(
    value: &Value,
    renames: &BTreeMap<String, String>,
    lines: Option<&Path>,
) -> Option<String> {
    let mut object = value.as_object()?.clone();
    rename(&mut object, renames);
    let answers = [TRL.response, TRL.rejected_response];
    if answers.iter().all(|column| is_dialogue(&object, column)) {
        let answers = answers.map(|column| in_file(renames, column, value));
        return Some(dialogues(answers, lines));
    }
    if let Some(advice) = names(value, &object, renames).or_else(|| one_answer(&object, renames)) {
        return Some(advice);
    }
    let has = |column: &str| object.contains_key(column);
    let is_list =
        ["messages", CONVERSATIONS, "chosen"].iter().any(|c| object.get(*c).is_some_and(Value::is_array));
    // The names are right where a column is there and says nothing.
    let is_empty = |columns: &[&str]| first(&object, columns).is_some_and(|c| !is_filled(&object, c));
    if has_form(&object) || is_list || [&QUERIES[..], &CHOSEN, &REJECTED].into_iter().any(is_empty) {
        return None;
    }
    let example = [("question", SWIFT.query), ("good", SWIFT.response), ("bad", SWIFT.rejected_response)];
    let missing: Vec<_> = example.into_iter().filter(|(_, ours)| !has(ours)).collect();
    Some(format!("name your columns, for example with {}", columns_flag(renames, &missing)))
}

/// Whether all columns of one of the text forms are there and say something.
fn has_form(object: &Object) -> bool {
    let has = |column: &str| is_filled(object, column);
    FORMS.iter().any(|form| has(form.query) && has(form.response) && has(form.rejected_response))
}

/// What a column of ours is called in the file of this row.
fn in_file<'a>(renames: &'a BTreeMap<String, String>, ours: &'a str, row: &Value) -> &'a str {
    let mut given = renames.iter().filter(|(theirs, given)| *given == ours && row.get(theirs).is_some());
    given.next_back().map_or(ours, |(theirs, _)| theirs)
}

/// How Anthropic's `\n\nHuman: …\n\nAssistant: …` in these columns becomes messages, whatever else a row has.
fn dialogues(answers: [&str; 2], lines: Option<&Path>) -> String {
    let [chosen, rejected] = answers;
    let is = format!(
        "`{chosen}` and `{rejected}` are whole dialogues as texts, which are read as lists of messages"
    );
    let Some(path) = lines else {
        return is;
    };
    // A text of JSON is one of Python as well.
    let names = answers.map(|name| Value::from(name).to_string()).join(", ");
    let script = SPLIT.replace("NAMES", &names);
    let target = unused_beside(path, "-messages", "jsonl");
    format!("{is}; python3 -c {} < {} > {} writes them so", quoted(&script), pasted(path), pasted(&target))
}

/// Python that turns such texts into messages, line by line.
const SPLIT: &str = r#"import json, re, sys
sys.stdin.reconfigure(encoding="utf-8-sig")
def turns(text): return [{"role": {"Human": "user", "Assistant": "assistant"}[who], "content": said.strip()} for who, said in re.findall(r"(?:^|\n\n)(Human|Assistant):(.*?)(?=\n\n(?:Human|Assistant):|\Z)", text, re.S)]
for row in map(json.loads, filter(str.strip, sys.stdin)):
    for name in (NAMES): row[name] = turns(row[name].strip())
    print(json.dumps(row))"#;

fn is_dialogue(object: &Object, column: &str) -> bool {
    let text = object.get(column).and_then(Value::as_str).unwrap_or_default();
    text.trim_start().starts_with("Human:") && text.contains("\n\nAssistant:")
}

/// The first of these columns that the row has.
fn first<'a>(object: &Object, columns: &[&'a str]) -> Option<&'a str> {
    columns.iter().copied().find(|column| object.contains_key(*column))
}

/// The column of the row that seems to be this one of ours, misspelt.
fn misspelt<'a>(object: &'a Object, ours: &str) -> Option<&'a str> {
    meant(ours, object.keys().map(String::as_str))
}

/// `--columns` with which the row can be read, where names alone are missing.
fn names(value: &Value, object: &Object, renames: &BTreeMap<String, String>) -> Option<String> {
    // What such a row lacks is no name: others would leave some of it out.
    if has_form(object) {
        return None;
    }
    let of_texts = |form: Columns| {
        vec![(form.query, &QUERIES[..]), (form.response, &CHOSEN), (form.rejected_response, &REJECTED)]
    };
    // They end with the chosen answer, of which nothing else may speak.
    let of_messages = first(object, &CHOSEN)
        .is_none()
        .then(|| vec![("messages", &[CONVERSATIONS][..]), (SWIFT.rejected_response, &REJECTED)]);
    let reads = |roles: Vec<_>| {
        let mut more = Vec::new();
        for (ours, theirs) in roles {
            if !object.contains_key(ours) {
                more.push((first(object, theirs).or_else(|| misspelt(object, ours))?, ours));
            }
        }
        let has_new = !more.is_empty();
        // What only the tools or pictures of a row stand in the way of is said with what is lost.
        let lost: Vec<_> = NOT_TEXT.into_iter().filter(|column| is_filled(object, column)).collect();
        more.extend(lost.iter().map(|column| (*column, "")));
        let renames = with(renames, &more);
        let location = Location::new(Path::new(""), 1);
        let reads = has_new && parse(value.clone(), &renames, location).is_ok();
        let lost = lost.iter().map(|column| format!(", without `{column}`")).collect::<String>();
        reads.then(|| (more.len(), format!("{} reads these rows{lost}", flag(&renames))))
    };
    // The fewest names are the likeliest, and leave alone what was given.
    let all = [TRL, SWIFT, ALPACA].map(of_texts).into_iter().chain(of_messages);
    all.filter_map(reads).min_by_key(|(n_names, _)| *n_names).map(|(_, advice)| advice)
}

/// What rows for supervised fine-tuning lack, and those of unpaired answers.
fn one_answer(object: &Object, renames: &BTreeMap<String, String>) -> Option<String> {
    if first(object, &REJECTED).is_some() {
        return None;
    }
    if let Some(label) = LABELS.iter().find(|column| object.get(**column).is_some_and(Value::is_boolean)) {
        return Some(format!(
            "these rows have one answer each, and `{label}` says whether it is a good one, as for KTO; ORPO learns from pairs, \
             a chosen and a rejected answer to the same question in one row, which unpaired rows do not make"
        ));
    }
    let is_list = |column: &str| object.get(column).is_some_and(Value::is_array);
    let (missing, more) = if is_list("messages") {
        (SWIFT.rejected_response, Vec::new())
    } else if is_list(CONVERSATIONS) {
        (SWIFT.rejected_response, vec![(CONVERSATIONS, "messages")])
    } else {
        let (query, answer) = (first(object, &QUERIES)?, first(object, &ANSWERS)?);
        // An older form of LLaMA-Factory's pairs.
        if is_list(answer) {
            return Some(format!(
                "`{answer}` is a list: its first text belongs in `{}`, and its second, the answer to avoid, in `{}`",
                TRL.response, TRL.rejected_response
            ));
        }
        let form = [ALPACA, TRL].into_iter().find(|form| form.query == query).unwrap_or(SWIFT);
        let more = [(query, form.query), (answer, form.response)];
        (form.rejected_response, more.into_iter().filter(|(theirs, ours)| theirs != ours).collect())
    };
    let names = match more.is_empty() {
        true => String::new(),
        false => format!(", and pass {}", columns_flag(renames, &more)),
    };
    Some(format!(
        "these rows have one answer each, as for supervised fine-tuning, and ORPO learns from two: add the one to avoid as \
         `{missing}`{names}"
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::left_out::left_out;

    fn advised(value: Value, renames: &[(&str, &str)]) -> Option<String> {
        let renames =
            renames.iter().map(|(theirs, ours)| ((*theirs).to_owned(), (*ours).to_owned())).collect();
        advice(&value, &renames, Some(Path::new("my rows.jsonl")))
    }

    #[test]
    fn names_that_will_do_are_told() {
        for (value, given, columns) in [
            (
                json!({"system": "s", "question": "q", "chosen": "c", "rejected": "r"}),
                &[][..],
                r#"{"question":"prompt"}"#,
            ),
            (
                json!({"instruction": "i", "input": "x", "chosen_response": "c", "rejected_response": "r"}),
                &[],
                r#"{"chosen_response":"chosen","rejected_response":"rejected"}"#,
            ),
            (
                json!({"question": "q", "response_j": "c", "response_k": "r"}),
                &[],
                r#"{"question":"prompt","response_j":"chosen","response_k":"rejected"}"#,
            ),
            (
                json!({"q": "q", "sys": "s", "good": "c", "bad": "r"}),
                &[("q", "query"), ("sys", "system")],
                r#"{"bad":"rejected_response","good":"response","q":"query","sys":"system"}"#,
            ),
            (json!({"prompt": "q", "choosen": "c", "rejected": "r"}), &[], r#"{"choosen":"chosen"}"#),
            (
                json!({"question": "q", "chosen": "c", "rejected": "r"}),
                &[("questoin", "prompt")],
                r#"{"question":"prompt"}"#,
            ),
            (
                json!({
                    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "c"}],
                    "rejected": "r"
                }),
                &[],
                r#"{"rejected":"rejected_response"}"#,
            ),
        ] {
            let expected = format!("--columns '{columns}' reads these rows");
            assert_eq!(advised(value.clone(), given), Some(expected), "{value}");
        }
    }

    #[test]
    fn what_names_alone_lose_is_told() {
        let row =
            json!({"question": "q", "chosen": "c", "rejected": "r", "tools": [{"name": "t"}], "images": []});
        let expected = r#"--columns '{"question":"prompt","tools":""}' reads these rows, without `tools`"#;
        assert_eq!(advised(row, &[]).as_deref(), Some(expected));
    }

    #[test]
    fn rows_with_one_answer_are_told_what_they_lack() {
        let turns = json!([{"from": "human", "value": "q"}, {"from": "gpt", "value": "c"}]);
        for (value, ends) in [
            (json!({"messages": turns}), "as `rejected_response`"),
            (
                json!({"conversations": turns}),
                r#"as `rejected_response`, and pass --columns '{"conversations":"messages"}'"#,
            ),
            (
                json!({"instruction": "i", "input": "", "output": "c"}),
                r#"as `rejected`, and pass --columns '{"output":"chosen"}'"#,
            ),
            (json!({"query": "q", "response": "c"}), "as `rejected_response`"),
            (
                json!({"question": "q", "answer": "c"}),
                r#"as `rejected_response`, and pass --columns '{"answer":"response","question":"query"}'"#,
            ),
        ] {
            let advice = advised(value.clone(), &[]).unwrap();
            assert!(advice.starts_with("these rows have one answer each"), "{value}: {advice}");
            assert!(advice.ends_with(ends), "{value}: {advice}");
        }
    }

    #[test]
    fn unpaired_rows_make_no_pairs() {
        for row in [
            json!({"prompt": "q", "completion": "c", "label": false}),
            json!({"messages": [{"role": "user", "content": "q"}], "kto_tag": true}),
        ] {
            let advice = advised(row.clone(), &[]).unwrap();
            assert!(advice.contains("as for KTO; ORPO learns from pairs"), "{row}: {advice}");
        }
        let advice = advised(json!({"prompt": "q", "completion": "c", "label": "math"}), &[]).unwrap();
        assert!(advice.contains("supervised fine-tuning"), "{advice}");
    }

    fn dialogue(answer: &str) -> String {
        format!("\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant: {answer}")
    }

    #[test]
    fn dialogues_as_texts_are_told_how_to_become_messages() {
        let row = json!({"chosen": dialogue("c"), "rejected": dialogue("r")});
        let says =
            "`chosen` and `rejected` are whole dialogues as texts, which are read as lists of messages";
        let advice = advised(row.clone(), &[]).unwrap();
        assert!(advice.starts_with(&format!("{says}; python3 -c '")), "{advice}");
        assert!(advice.ends_with(" < 'my rows.jsonl' > 'my rows-messages.jsonl' writes them so"), "{advice}");
        assert_eq!(super::advice(&row, &BTreeMap::new(), None).as_deref(), Some(says), "of an array");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_conversion_keeps_what_else_a_row_has() {
        if std::process::Command::new("python3").args(["-c", ""]).status().is_err() {
            left_out("there is no python3");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("messages.jsonl");
        let row = json!({"it's": dialogue("c"), "rejected": dialogue("r"), "system": "s"});
        std::fs::write(&path, format!("{row}\n\n{row}\n")).unwrap();
        let renames = BTreeMap::from([("it's".to_owned(), "chosen".to_owned())]);
        let advice = advice(&row, &renames, Some(&path)).unwrap();
        let (_, command) = advice.split_once("; ").unwrap();
        let command = command.strip_suffix(" writes them so").unwrap();
        let output = std::process::Command::new("sh").args(["-c", command]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(std::fs::read_to_string(&path).unwrap().starts_with(&row.to_string()), "the source stays");

        let text = std::fs::read_to_string(folder.path().join("messages-messages.jsonl")).unwrap();
        let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(rows.len(), 2, "{text}");
        for row in rows {
            let row = parse(row, &renames, Location::new(path.as_path(), 1)).unwrap();
            assert_eq!([row.query, row.response, row.rejected_response], ["q", "c", "r"]);
            assert_eq!(row.system.as_deref(), Some("s"));
            assert_eq!(row.history, [("a".to_owned(), "b".to_owned())]);
        }
    }

    #[test]
    fn names_that_are_not_known_keep_those_that_were_given() {
        let row = json!({"frage": "q", "x": "c", "y": "r"});
        let says = "name your columns, for example with --columns";
        assert_eq!(
            advised(row.clone(), &[]).unwrap(),
            format!(r#"{says} '{{"bad":"rejected_response","good":"response","question":"query"}}'"#)
        );
        assert_eq!(
            advised(row, &[("frage", "query")]).unwrap(),
            format!(r#"{says} '{{"bad":"rejected_response","frage":"query","good":"response"}}'"#)
        );
        assert_eq!(advised(json!({"query": "q", "response": "c", "rejected_response": "c"}), &[]), None);
        assert_eq!(advised(json!({"prompt": "q", "chosen": "c", "rejected": null}), &[]), None);
        assert_eq!(
            columns_flag(&BTreeMap::from([("it's".to_owned(), "query".to_owned())]), &[]),
            r#"--columns '{"it'\''s":"query"}'"#
        );
    }

    #[test]
    fn answers_in_a_list_are_told_where_they_belong() {
        let advice = advised(json!({"instruction": "i", "input": "", "output": ["c", "r"]}), &[]).unwrap();
        assert!(advice.starts_with("`output` is a list: its first text belongs in `chosen`"), "{advice}");
    }
}
