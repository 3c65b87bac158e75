//! Columns that `--columns` renames in vain.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::spelling::meant;
use crate::error::{Error, Result};

/// Columns that were to be renamed and that no row has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnusedRenames {
    /// They.
    pub names: BTreeSet<String>,
    /// The columns of the first row, as its file has them.
    pub columns: Vec<String>,
}

impl UnusedRenames {
    /// All of these, before a row is seen.
    pub fn of(columns: &BTreeMap<String, String>) -> Self {
        Self { names: columns.keys().cloned().collect(), columns: Vec::new() }
    }

    /// Takes out what a row has.
    pub fn see(&mut self, row: &Value) {
        self.names.retain(|name| row.get(name).is_none());
        if let (Value::Object(row), true) = (row, self.columns.is_empty()) {
            self.columns = row.keys().cloned().collect();
        }
    }

    /// That they are unused, and which columns there are; none where all are used.
    pub fn told(&self) -> Option<(String, String)> {
        let name = self.names.first()?;
        let names: Vec<_> = self.names.iter().map(|name| format!("`{name}`")).collect();
        let problem = format!("--columns renames {}, which no row has", names.join(", "));
        let has = format!("the first row has {}", self.columns.join(", "));
        let hint = match meant(name, self.columns.iter().map(String::as_str)) {
            Some(column) => format!("did you mean `{column}`? {has}"),
            None => has,
        };
        Some((problem, hint))
    }
}

/// Holds renames against all data of a run.
///
/// # Errors
/// [`Error::Config`] for those that none of it has a use for.
pub fn check_used(sets: &[&UnusedRenames]) -> Result<()> {
    let [first, others @ ..] = sets else { return Ok(()) };
    let mut unused = (*first).clone();
    unused.names.retain(|name| others.iter().all(|set| set.names.contains(name)));
    match unused.told() {
        Some((problem, hint)) => Err(Error::config(problem).with_hint(hint)),
        None => Ok(()),
    }
}
