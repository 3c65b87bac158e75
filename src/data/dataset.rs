//! Preference rows: reading them from files.
//!
//! What a row may look like is in `row.rs`, what a data set may be named in [`source`].

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::draw::sample_of;
use super::renames::UnusedRenames;
use super::{json, row, source};
use crate::error::{Error, Result, place};

/// Rows that cannot be used of which the first that advice helps is looked for.
const ADVISED_ROWS: usize = 10;

/// The place of a row in a data file, shown as `file.jsonl:7`; no two rows have the same.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Location {
    /// The file as the user gave it.
    pub path: Arc<Path>,
    /// The 1-based line on which the row begins.
    pub line: usize,
    /// The 1-based byte of the line at which it begins, where other rows begin on the line before.
    pub column: Option<usize>,
}

impl Location {
    /// The place of the only row of a line, or of its first.
    pub fn new(path: impl Into<Arc<Path>>, line: usize) -> Self {
        Self { path: path.into(), line, column: None }
    }

    /// An error about the row at this place.
    pub fn error(&self, problem: impl Into<String>) -> Error {
        let Self { path, line, column } = self;
        Error::Row {
            path: path.to_path_buf(),
            line: *line,
            column: *column,
            problem: problem.into(),
            hint: None,
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&place(&self.path, self.line, self.column))
    }
}

/// One preference: a query with the answer to learn and the answer to avoid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// What the user says last.
    pub query: String,
    /// The chosen answer.
    pub response: String,
    /// The rejected answer.
    pub rejected_response: String,
    /// The system prompt; `None` takes the run's default, an empty one stands for no system prompt at all.
    pub system: Option<String>,
    /// Earlier turns, oldest first: what the user said and what the assistant answered.
    pub history: Vec<(String, String)>,
    /// Where the row stands.
    pub location: Location,
}

/// Query, both answers, system prompt and earlier turns of a row.
pub type Content<'a> = (&'a str, [&'a str; 2], Option<&'a str>, &'a [(String, String)]);

impl Row {
    /// What it says, wherever it stands.
    pub fn content(&self) -> Content<'_> {
        let Self { query, response, rejected_response, system, history, location: _ } = self;
        (query, [response, rejected_response], system.as_deref(), history)
    }
}

/// A row that was left out, shown as `file.jsonl:7: reason`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Where the row stands.
    pub location: Location,
    /// Why it cannot be used.
    pub reason: String,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.location, self.reason)
    }
}

/// The rows of one or several data files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dataset {
    /// The usable rows, in file order.
    pub rows: Vec<Row>,
    /// The rows that were left out, in file order.
    pub skipped: Vec<Skipped>,
    /// What `--columns` renames in vain.
    pub unused: UnusedRenames,
}

/// What happens to a row that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strictness {
    /// It is left out and listed.
    Lenient,
    /// It ends the load with [`Error::Row`].
    Strict,
}

impl Strictness {
    /// Leaves the row out, or fails because of it.
    pub(super) fn reject(self, skipped: &mut Vec<Skipped>, location: Location, reason: String) -> Result<()> {
        match self {
            Self::Lenient => skipped.push(Skipped { location, reason }),
            Self::Strict => return Err(location.error(reason)),
        }
        Ok(())
    }
}

/// Loads data sets: each `spec` is a `.jsonl` or `.json` file, a folder of such files, or a name of
/// [`source::REGISTRY`], optionally with `#n` for a sample of `n` rows.
///
/// A sample is drawn from the usable rows of its data set and keeps file order. Where `n` exceeds their number, every
/// row is taken `n / rows` times and the remainder is sampled, as ms-swift does (`swift/dataset/utils.py`).
/// `columns` renames the user's columns to ours (`{"question": "query"}`) before anything else looks at a row.
///
/// # Errors
/// - [`Error::Config`]: no spec at all, a spec that names nothing (all of them, with hints), a `columns` entry whose
///   target is not a column of ours.
/// - [`Error::Io`], [`Error::File`]: a file that cannot be read, a data set without a single usable row.
/// - [`Error::Row`]: text that is not UTF-8 or not JSON; with [`Strictness::Strict`] any row that cannot be used.
pub fn load(
    specs: &[String],
    columns: &BTreeMap<String, String>,
    strict: Strictness,
    seed: u64,
) -> Result<Dataset> {
    row::check_renames(columns)?;
    let mut unused = UnusedRenames::of(columns);
    let mut dataset = Dataset::default();
    for (i, source) in source::resolve(specs, Path::new(""))?.into_iter().enumerate() {
        let mut part = Dataset::default();
        for file in &source.files {
            let text = json::read_text(file)?;
            collect(&text, file, columns, strict, &mut part, &mut unused)?;
        }
        if part.rows.is_empty() {
            let error = no_usable_rows(&source.path, &part.skipped, columns);
            // A name that is not there is likelier wrong than missing.
            return Err(match unused.told().filter(|_| specs.len() == 1 && !part.skipped.is_empty()) {
                Some((problem, hint)) => error.with_hint(format!("{problem}; {hint}")),
                None => error,
            });
        }
        if let Some(n) = source.sample {
            part.rows = sample_of(part.rows, n, seed, i as u64);
        }
        dataset.rows.append(&mut part.rows);
        dataset.skipped.append(&mut part.skipped);
    }
    dataset.unused = unused;
    Ok(dataset)
}

/// Reads the rows of a text that holds one JSON object a line, or one JSON array of objects.
///
/// `path` is the name under which the rows are reported; it need not exist.
///
/// # Errors
/// - [`Error::Config`]: a `columns` entry whose target is not a column of ours.
/// - [`Error::Row`]: text that is not JSON; with [`Strictness::Strict`] any row that cannot be used.
pub fn parse_rows(
    text: &str,
    path: &Path,
    columns: &BTreeMap<String, String>,
    strict: Strictness,
) -> Result<Dataset> {
    row::check_renames(columns)?;
    let mut dataset = Dataset::default();
    let mut unused = UnusedRenames::of(columns);
    collect(text, path, columns, strict, &mut dataset, &mut unused)?;
    dataset.unused = unused;
    Ok(dataset)
}

/// Appends a text's rows to `dataset` and takes the renamed columns that it has from `unused`.
fn collect(
    text: &str,
    path: &Path,
    columns: &BTreeMap<String, String>,
    strict: Strictness,
    dataset: &mut Dataset,
    unused: &mut UnusedRenames,
) -> Result<()> {
    let n_before = dataset.rows.len();
    json::each_value(text, path, |location, value| {
        unused.see(&value);
        match row::parse(value, columns, location.clone()) {
            Ok(row) => dataset.rows.push(row),
            Err(reason) => {
                strict.reject(&mut dataset.skipped, location.clone(), reason).map_err(|error| {
                    // Where others of the file can be used it is no matter of the columns.
                    if dataset.rows.len() > n_before {
                        return error
                            .with_hint("without --strict true such rows are left out, and all are listed");
                    }
                    match advice(&[&location], columns) {
                        Some(advice) => error.with_hint(advice),
                        None => error,
                    }
                })?;
            }
        }
        Ok(())
    })
}

fn no_usable_rows(path: &Path, skipped: &[Skipped], columns: &BTreeMap<String, String>) -> Error {
    if skipped.is_empty() {
        return Error::file(path, "it has no rows");
    }
    let none = match skipped.len() {
        1 => "its only row cannot be used".to_owned(),
        n => format!("none of its {n} rows can be used"),
    };
    let problem = format!("{none}: {}", summarize(skipped));
    let error = Error::file(path, problem);
    let rows: Vec<_> = skipped.iter().take(ADVISED_ROWS).map(|row| &row.location).collect();
    let mut files = rows.chunk_by(|a, b| a.path == b.path);
    match files.find_map(|rows| advice(rows, columns)) {
        Some(advice) => error.with_hint(advice),
        None => error,
    }
}

/// What would make one of these rows of a file usable, which is read once more, up to the last of them.
fn advice(rows: &[&Location], columns: &BTreeMap<String, String>) -> Option<String> {
    let last = rows.last()?;
    let text = json::read_text(&last.path).ok()?;
    let lines = (!json::is_array(&text)).then_some(&*last.path);
    let mut found = None;
    let look = |location: Location, value: Value| {
        if rows.contains(&&location) {
            found = row::advice(&value, columns, lines);
        }
        // An error ends the reading, of which nothing else is wanted.
        if found.is_none() && location != **last { Ok(()) } else { Err(last.error("seen")) }
    };
    let _ = json::each_value(&text, &last.path, look);
    found
}

/// The first three different reasons for which rows were left out, each with its first row and its number of rows.
pub fn summarize(skipped: &[Skipped]) -> String {
    let mut reasons: Vec<(&Skipped, usize)> = Vec::new();
    for row in skipped {
        match reasons.iter_mut().find(|(first, _)| first.reason == row.reason) {
            Some((_, count)) => *count += 1,
            None => reasons.push((row, 1)),
        }
    }
    let mut parts: Vec<_> = reasons
        .iter()
        .take(3)
        .map(|(first, count)| match count {
            1 => first.to_string(),
            _ => format!("{first} ({count} rows)"),
        })
        .collect();
    if reasons.len() > 3 {
        parts.push("…".to_owned());
    }
    parts.join("; ")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::data::renames::check_used;

    const GOOD: &str = r#"{"query": "q", "response": "c", "rejected_response": "r"}"#;
    const EQUAL: &str = r#"{"query": "q", "response": "c", "rejected_response": "c"}"#;

    fn none() -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    fn parse(text: &str, strict: Strictness) -> Result<Dataset> {
        parse_rows(text, Path::new("rows.jsonl"), &none(), strict)
    }

    #[test]
    fn bad_rows_are_left_out_with_file_line_and_reason() {
        let text = format!("{GOOD}\n\n{EQUAL}\n[]\n{GOOD}\n");
        let dataset = parse(&text, Strictness::Lenient).unwrap();
        let lines: Vec<_> = dataset.rows.iter().map(|row| row.location.to_string()).collect();
        assert_eq!(lines, ["rows.jsonl:1", "rows.jsonl:5"]);
        let skipped: Vec<_> = dataset.skipped.iter().map(Skipped::to_string).collect();
        assert_eq!(
            skipped,
            [
                "rows.jsonl:3: the chosen and the rejected answer are equal",
                "rows.jsonl:4: expected a JSON object, found a list"
            ]
        );
        let error = parse(&text, Strictness::Strict).unwrap_err();
        assert!(matches!(error, Error::Row { line: 3, .. }), "{error:?}");
        assert_eq!(error.to_string(), skipped[0]);
    }

    #[test]
    fn advice_looks_no_further_than_its_row() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        let row = r#"{"question": "q", "chosen": "c", "rejected": "r"}"#;
        let load = |text: String| {
            std::fs::write(&path, text).unwrap();
            load(&[path.display().to_string()], &none(), Strictness::Strict, 1).unwrap_err()
        };
        let error = load(format!("{row}\nnot JSON\n"));
        assert!(matches!(error, Error::Row { line: 1, .. }), "{error:?}");
        assert_eq!(error.hint().unwrap(), r#"--columns '{"question":"prompt"}' reads these rows"#);
        let error = load(format!("{GOOD}\n{row}\nnot JSON\n"));
        assert!(matches!(error, Error::Row { line: 2, .. }), "{error:?}");
        assert!(
            error.hint().unwrap().starts_with("without --strict true"),
            "its columns are not those of all"
        );
    }

    #[test]
    fn what_is_not_json_ends_the_load_at_once() {
        for strict in [Strictness::Lenient, Strictness::Strict] {
            let error = parse(&format!("{GOOD}\n{EQUAL}\n{{\"query\"\n"), strict).unwrap_err().to_string();
            let expected = if strict == Strictness::Strict {
                "rows.jsonl:2: the chosen"
            } else {
                "rows.jsonl:3: not JSON"
            };
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn folders_and_several_sets_are_joined_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
            path.to_string_lossy().into_owned()
        };
        let asking = |query: &str| GOOD.replace(r#""q""#, &format!("{query:?}"));
        write("set/b.jsonl", format!("{}\n{EQUAL}\n{}", asking("2"), asking("3")));
        write("set/a.json", format!("[{},\n{}]", asking("0"), asking("1")));
        let other =
            write("other.jsonl", r#"{"frage": "4", "response": "c", "rejected_response": "r"}"#.to_owned());
        let set = folder.path().join("set").to_string_lossy().into_owned();
        let in_set = |place: &str| Path::new(&set).join(place).display().to_string();
        let columns = BTreeMap::from([("frage".to_owned(), "query".to_owned())]);

        let dataset = load(&[set.clone(), other.clone()], &columns, Strictness::Lenient, 42).unwrap();
        let queries: Vec<_> = dataset.rows.iter().map(|row| row.query.as_str()).collect();
        assert_eq!(queries, ["0", "1", "2", "3", "4"]);
        assert_eq!(dataset.rows[1].location.to_string(), in_set("a.json:2"));
        assert_eq!(dataset.skipped[0].location.to_string(), in_set("b.jsonl:2"));

        let sampled = load(&[format!("{set}#2"), other], &columns, Strictness::Lenient, 42).unwrap();
        assert_eq!(sampled.rows.len(), 3);
        assert_eq!(sampled.rows[2].query, "4");

        let alone = load(std::slice::from_ref(&set), &columns, Strictness::Lenient, 42).unwrap();
        check_used(&[&alone.unused, &dataset.unused]).unwrap();
        let error = check_used(&[&alone.unused]).unwrap_err();
        assert!(error.to_string().contains("--columns renames `frage`, which no row has"), "{error}");
        assert!(matches!(error, Error::Config { .. }), "{error:?}");
        assert_eq!(error.hint(), Some("the first row has query, response, rejected_response"));
        let columns = BTreeMap::from([("respones".to_owned(), "response".to_owned())]);
        let misspelt = load(&[set], &columns, Strictness::Lenient, 42).unwrap();
        let error = check_used(&[&misspelt.unused]).unwrap_err();
        assert!(
            error.hint().unwrap().starts_with("did you mean `response`? the first row has "),
            "{error:?}"
        );
    }

    #[test]
    fn a_set_without_usable_rows_says_how_many_and_why() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("bad.jsonl");
        let spec = [file.to_string_lossy().into_owned()];
        std::fs::write(&file, format!("{EQUAL}\n[]\n{EQUAL}\n1\n\"x\"\n{{}}\n")).unwrap();
        let error = load(&spec, &none(), Strictness::Lenient, 42).unwrap_err();
        let file_1 = format!("{}:1", file.display());
        let expected = format!(
            "{}: none of its 6 rows can be used: {file_1}: the chosen and the rejected answer are equal (2 rows); ",
            file.display()
        );
        assert!(error.to_string().starts_with(&expected), "{error}");
        assert!(error.to_string().ends_with("found a number; …"), "three reasons: {error}");
        assert!(error.hint().unwrap().contains("--columns"), "{error:?}");

        std::fs::write(&file, GOOD.replace("query", "qusetion")).unwrap();
        let columns = BTreeMap::from([("question".to_owned(), "query".to_owned())]);
        let error = load(&spec, &columns, Strictness::Lenient, 42).unwrap_err();
        let hint = "--columns renames `question`, which no row has; did you mean `qusetion`? the first row has qusetion, \
                    response, rejected_response";
        assert_eq!(error.hint(), Some(hint));

        std::fs::write(&file, "\n").unwrap();
        let error = load(&spec, &none(), Strictness::Lenient, 42).unwrap_err();
        assert_eq!(error.to_string(), format!("{}: it has no rows", file.display()));
    }

    #[test]
    fn rows_of_one_line_are_rows_of_their_own() {
        let row = |i: u32| GOOD.replace("\"q\"", &format!("\"{i}\""));
        let text = format!("[{}]", (0..10).map(row).collect::<Vec<_>>().join(", "));
        let rows = parse(&text, Strictness::Strict).unwrap().rows;
        assert_eq!(rows[1].location.to_string(), format!("rows.jsonl:1:{}", GOOD.len() + 4));
        let places: HashSet<_> = rows.iter().map(|row| &row.location).collect();
        assert_eq!(places.len(), 10);
    }
}
