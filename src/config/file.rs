//! `--config FILE`: settings under the names of the flags, each of which takes what its flag takes.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use clap::FromArgMatches;
use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::{TrainArgs, other_names, to_map, train_command, value_problem};
use crate::data::spelling::meant;
use crate::error::{Error, Result};
use crate::shell::{pasted, unused_beside};

const NAMING: &str = "a setting is named as its flag, without the dashes: learning_rate = 1e-4";

/// Reads the settings of a TOML or JSON file, without those that are null, into `settings`.
///
/// # Errors
/// If the file cannot be read, is neither, or holds what is no setting: all such problems at once, and its other settings are read.
pub(super) fn read(path: &Path, settings: &mut Map<String, Value>) -> Result<()> {
    if path.is_dir() {
        let record = path.join("args.json");
        let error = Error::config(format!("--config {} is a folder", path.display()));
        return Err(if record.exists() {
            error.with_hint(format!("--config {}", pasted(&record)))
        } else {
            error
        });
    }
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let (mut problems, mut hint) = (Vec::new(), None);
    let known = to_map(&TrainArgs::default());
    let mut seen = BTreeMap::new();
    let (table, null_is) = parse(path, &text)?;
    for (key, value) in table {
        let name = key.replace('-', "_");
        if !known.contains_key(&name) {
            let here = other_name(&name).map_or_else(String::new, |here| format!(" ({here})"));
            problems.push(format!("{}: `{key}` is no setting{here}", path.display()));
            if here.is_empty() {
                hint.get_or_insert(closest(&name, &known));
            }
        } else if let Some(other) = seen.insert(name.clone(), key.clone()) {
            problems.push(format!("{}: `{other}` and `{key}` are the same setting", path.display()));
        } else if value.is_null() && null_is == Null::NotFinite {
            problems.push(format!("{}: `{key}` is no finite number", path.display()));
        } else if !value.is_null() {
            match setting(&name, &value) {
                // JSON has no other number that is null.
                Ok(Value::Null) => problems.push(format!("{}: `{key}` is no finite number", path.display())),
                Ok(value) => drop(settings.insert(name, value)),
                Err(reason) => problems.push(format!("{}: `{key}` is {value}: {reason}", path.display())),
            }
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(Error::Config { problems, hint }) }
}

/// What a null of a table stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Null {
    /// No setting, as in JSON.
    Nothing,
    /// A number that JSON does not have: TOML has no null.
    NotFinite,
}

/// The file as a table: JSON where its name or its first character says so, else TOML.
fn parse(path: &Path, text: &str) -> Result<(Map<String, Value>, Null)> {
    let has_extension = |names: &[&str]| {
        path.extension()
            .is_some_and(|extension| names.iter().any(|name| extension.eq_ignore_ascii_case(name)))
    };
    let invalid = |problem: &str, hint: String| {
        let problems = vec![format!("{}: {problem}", path.display())];
        Err(Error::Config { problems, hint: Some(hint) })
    };
    if has_extension(&["yaml", "yml"]) {
        return invalid("YAML is not read, but TOML and JSON", from_yaml(path));
    }
    let (parsed, null_is) = if has_extension(&["json"]) || text.trim_start().starts_with('{') {
        let json = serde_json::from_str(text).and_then(|value: Value| match value {
            Value::Object(_) => serde_json::from_str(text).map(|Table(table)| Value::Object(table)),
            _ => Ok(value),
        });
        (json.map_err(|e| e.to_string()), Null::Nothing)
    } else {
        (toml::from_str(text).map_err(|e| e.to_string()), Null::NotFinite)
    };
    match parsed {
        Ok(Value::Object(table)) => Ok((table, null_is)),
        Ok(_) => invalid("is not a table of settings", NAMING.to_owned()),
        Err(_) if is_like_yaml(text) => invalid("this is YAML; TOML and JSON are read", from_yaml(path)),
        Err(problem) => invalid(problem.trim(), NAMING.to_owned()),
    }
}

/// A JSON object with every name once: serde_json's own takes the last of several, and TOML refuses them.
struct Table(Map<String, Value>);

impl<'de> Deserialize<'de> for Table {
    fn deserialize<D: Deserializer<'de>>(json: D) -> std::result::Result<Self, D::Error> {
        json.deserialize_map(TableVisitor)
    }
}

struct TableVisitor;

impl<'de> Visitor<'de> for TableVisitor {
    type Value = Table;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of settings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> std::result::Result<Table, A::Error> {
        let mut table = Map::new();
        while let Some(name) = entries.next_key::<String>()? {
            if table.contains_key(&name) {
                return Err(de::Error::custom(format!("`{name}` stands there twice")));
            }
            table.insert(name, entries.next_value()?);
        }
        Ok(Table(table))
    }
}

/// Whether the first line that says something is `name: value`.
fn is_like_yaml(text: &str) -> bool {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let name = lines.find(|line| *line != "---").and_then(|line| line.split_once(':'));
    name.is_some_and(|(name, _)| {
        !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || "_-".contains(c))
    })
}

fn from_yaml(path: &Path) -> String {
    format!(
        "`beta: 0.1` is `beta = 0.1` in TOML, with texts in quotes; python3 -c 'import json, sys, yaml; \
         json.dump(yaml.safe_load(sys.stdin), sys.stdout)' < {} > {} converts it",
        pasted(path),
        pasted(&unused_beside(path, "", "json"))
    )
}

/// What a setting of another trainer is here, or why it is none.
fn other_name(name: &str) -> Option<String> {
    let ours = other_names::ours(name).map(|ours| format!("here it is {}", ours.trim_start_matches('-')));
    ours.or_else(|| other_names::not_here(name).map(str::to_owned))
}

/// What may have been meant by a name that is no setting.
fn closest(name: &str, known: &Map<String, Value>) -> String {
    match meant(name, known.keys().map(String::as_str)) {
        Some(known) => format!("did you mean `{known}`?"),
        None => NAMING.to_owned(),
    }
}

/// The setting of this name as the configuration holds it, or why its value is none.
fn setting(name: &str, value: &Value) -> Result<Value, String> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Number(_) | Value::Bool(_) => value.to_string(),
        // What no flag says in one word.
        Value::Array(_) | Value::Object(_) | Value::Null => {
            let one = Map::from_iter([(name.to_owned(), value.clone())]);
            let args: TrainArgs = serde_json::from_value(Value::Object(one)).map_err(|e| e.to_string())?;
            return Ok(to_map(&args)[name].clone());
        }
    };
    let flag = format!("--{name}={text}");
    let matches = train_command().try_get_matches_from(["train", &flag]).map_err(|e| value_problem(&e))?;
    let args = TrainArgs::from_arg_matches(&matches).map_err(|e| value_problem(&e))?;
    Ok(to_map(&args)[name].clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_as(name: &str, text: &str) -> Result<Map<String, Value>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let mut settings = Map::new();
        read(&path, &mut settings).map(|()| settings)
    }

    #[test]
    fn a_setting_stands_once() {
        for (name, text) in [
            ("run.json", "{\"lora_rank\": 8, \"beta\": 0.2,\n\"lora_rank\": 4}"),
            ("run.toml", "lora_rank = 8\nbeta = 0.2\nlora_rank = 4"),
        ] {
            let error = read_as(name, text).unwrap_err().to_string();
            assert!(error.contains("lora_rank") || error.contains("duplicate key"), "{error}");
            assert!(error.contains("line 2") || error.contains("line 3"), "{error}");
        }
    }

    #[test]
    fn a_setting_takes_what_its_flag_takes() {
        let lists = r#"{"dataset": ["a.jsonl", "b.jsonl#5"], "lora_target_modules": ["q_proj"],
                        "columns": {"question": "query"}, "learning_rate": 0.0002, "batch_size": 4,
                        "max_memory": "8GiB", "strict": true, "lr_scheduler_type": "linear", "system": null}"#;
        let texts = r#"{"dataset": "a.jsonl,b.jsonl#5", "lora_target_modules": "q_proj",
                        "columns": "{\"question\": \"query\"}", "learning-rate": "2e-4", "batch-size": "4",
                        "max_memory": 8589934592, "strict": "true", "lr_scheduler_type": "linear"}"#;
        let toml = "dataset = 'a.jsonl,b.jsonl#5'\nlora_target_modules = ['q_proj']\nlearning_rate = 2e-4\nbatch_size = 4\n\
                    max_memory = '8GiB'\nstrict = true\nlr_scheduler_type = 'linear'\n[columns]\nquestion = 'query'\n";
        let sorted = |settings: Map<String, Value>| {
            let mut settings: Vec<_> = settings.into_iter().collect();
            settings.sort_by(|a, b| a.0.cmp(&b.0));
            settings
        };
        let settings = sorted(read_as("run.json", lists).unwrap());
        assert_eq!(settings.len(), 8, "{settings:?}");
        for (name, text) in [("run.json", texts), ("run.toml", toml), ("run.conf", texts), ("run", toml)] {
            assert_eq!(sorted(read_as(name, text).unwrap()), settings, "{name}: {text}");
        }
        let all = TrainArgs::default().to_json();
        let read: TrainArgs =
            serde_json::from_value(Value::Object(read_as("args.json", &all).unwrap())).unwrap();
        assert_eq!(read, TrainArgs::default());
    }

    #[test]
    fn what_is_no_setting_is_named_with_its_file() {
        for (text, problem, hint) in [
            (r#"{"batch_size": "x"}"#, "run.json: `batch_size` is \"x\": expected a whole number", None),
            (
                r#"{"columns": "question"}"#,
                "run.json: `columns` is \"question\": expected a JSON object such as",
                None,
            ),
            (r#"{"lr_scheduler_type": "wave"}"#, "`lr_scheduler_type` is \"wave\": expected one of ", None),
            (r#"{"max_memory": "much"}"#, "`max_memory` is \"much\": `much` is no size", None),
            (r#"{"dataset": [5]}"#, "run.json: `dataset` is [5]: invalid type: integer `5`", None),
            (r#"{"beta": [0.1]}"#, "run.json: `beta` is [0.1]: invalid type: sequence", None),
            (r#"{"strict": 1}"#, "run.json: `strict` is 1: expected one of true, false", None),
            (r#"{"beta": "nan"}"#, "run.json: `beta` is no finite number", None),
            (r#"{"betta": 0.1}"#, "run.json: `betta` is no setting", Some("did you mean `beta`?")),
            (r#"{"bits": 4}"#, "run.json: `bits` is no setting (here it is quantization_bit)", None),
            (
                r#"{"stage": "dpo"}"#,
                "`stage` is no setting (ORPO is what is trained, and nothing else; for ORPO leave it out)",
                None,
            ),
            (r#"{"zzz": 4}"#, "run.json: `zzz` is no setting", Some(NAMING)),
            ("[1]", "run.json: is not a table of settings", Some(NAMING)),
            ("{\n\"beta\": }", "run.json: expected value at line 2 column 9", Some(NAMING)),
        ] {
            let error = read_as("run.json", text).unwrap_err();
            assert!(error.to_string().contains(problem), "{text}: {error}");
            assert_eq!(error.hint(), hint, "{text}");
        }
        for (setting, name) in [("beta = inf", "beta"), ("system = nan", "system"), ("seed = -nan", "seed")] {
            let nan = read_as("run.toml", setting).unwrap_err().to_string();
            assert!(nan.contains(&format!("run.toml: `{name}` is no finite number")), "{nan}");
        }
        let twice = read_as("run.json", r#"{"batch_size": 4, "batch-size": 8}"#).unwrap_err().to_string();
        assert!(twice.contains("run.json: `batch_size` and `batch-size` are the same setting"), "{twice}");
        let both = read_as("run.toml", "betta = 1\nbatch_size = -1\n").unwrap_err().to_string();
        assert!(both.contains("`betta`") && both.contains("`batch_size` is -1"), "all at once: {both}");
    }

    #[test]
    fn yaml_is_told_how_to_become_json() {
        let yaml = "# a run\n---\nbeta: 0.1\ndataset: pairs.jsonl\n";
        for (name, source, target) in [
            ("run.yaml", "run.yaml", "run.json"),
            ("run.YML", "run.YML", "run.json"),
            ("run.toml", "run.toml", "run.json"),
            ("run", "run", "run.json"),
            ("run.json", "run.json", "run-2.json"),
            ("my run.yaml", "my run.yaml'", "my run.json'"),
        ] {
            let error = read_as(name, yaml).unwrap_err();
            assert!(error.to_string().contains("YAML"), "{name}: {error}");
            let hint = error.hint().unwrap();
            assert!(hint.contains("`beta = 0.1` in TOML"), "{name}: {hint}");
            let (before, after) = hint.split_once(" > ").unwrap();
            assert!(before.ends_with(source), "{name}: {hint}");
            assert!(after.ends_with(&format!("{target} converts it")), "{name}: {hint}");
        }
    }
}
