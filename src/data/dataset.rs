//! Preference rows: reading them from files, sampling, splitting and ordering them.
//!
//! What a row may look like is in `row.rs`, what a data set may be named in [`source`](super::source). All randomness
//! comes from xoshiro256++ seeded with the caller's seed, so the same seed gives the same rows on every machine.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::SliceRandom;

use super::{json, row, source};
use crate::error::{Error, Result};

/// A place in a data file, shown as `file.jsonl:7`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Location {
    /// The file as the user gave it.
    pub path: Arc<Path>,
    /// The 1-based line on which the row begins.
    pub line: usize,
}

impl Location {
    /// An error about the row at this place.
    pub fn error(&self, problem: impl Into<String>) -> Error {
        Error::Row { path: self.path.to_path_buf(), line: self.line, problem: problem.into(), hint: None }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.path.display(), self.line)
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

/// The order in which rows are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shuffle {
    /// A permutation drawn from this seed.
    Seeded(u64),
    /// File order.
    Off,
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
///   target is not a column of ours or whose source no row has.
/// - [`Error::Io`], [`Error::File`]: a file that cannot be read, a data set without a single usable row.
/// - [`Error::Row`]: text that is not UTF-8 or not JSON; with [`Strictness::Strict`] any row that cannot be used.
pub fn load(
    specs: &[String],
    columns: &BTreeMap<String, String>,
    strict: Strictness,
    seed: u64,
) -> Result<Dataset> {
    row::check_renames(columns)?;
    let mut unseen: BTreeSet<&str> = columns.keys().map(String::as_str).collect();
    let mut dataset = Dataset::default();
    for (i, source) in source::resolve(specs, Path::new(""))?.into_iter().enumerate() {
        let mut part = Dataset::default();
        for file in &source.files {
            let text = json::read_text(file)?;
            collect(&text, file, columns, strict, &mut part, &mut unseen)?;
        }
        if part.rows.is_empty() {
            return Err(no_usable_rows(&source.path, &part.skipped));
        }
        if let Some(n) = source.sample {
            part.rows = sample(part.rows, n, &mut rng(seed, Draw::Sample, i as u64));
        }
        dataset.rows.append(&mut part.rows);
        dataset.skipped.append(&mut part.skipped);
    }
    if !unseen.is_empty() {
        let names: Vec<_> = unseen.iter().map(|name| format!("`{name}`")).collect();
        return Err(Error::config(format!("--columns renames {}, which no row has", names.join(", "))));
    }
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
    collect(text, path, columns, strict, &mut dataset, &mut BTreeSet::new())?;
    Ok(dataset)
}

/// Appends a text's rows to `dataset` and takes the renamed columns that it has from `unseen`.
fn collect(
    text: &str,
    path: &Path,
    columns: &BTreeMap<String, String>,
    strict: Strictness,
    dataset: &mut Dataset,
    unseen: &mut BTreeSet<&str>,
) -> Result<()> {
    let path: Arc<Path> = path.into();
    json::each_value(text, &path, |line, value| {
        unseen.retain(|name| value.get(name).is_none());
        let location = Location { path: path.clone(), line };
        match row::parse(value, columns, location.clone()) {
            Ok(row) => dataset.rows.push(row),
            Err(reason) => strict.reject(&mut dataset.skipped, location, reason)?,
        }
        Ok(())
    })
}

fn no_usable_rows(path: &Path, skipped: &[Skipped]) -> Error {
    if skipped.is_empty() {
        return Error::file(path, "it has no rows");
    }
    let problem = format!("none of its {} rows can be used: {}", skipped.len(), summarize(skipped));
    Error::file(path, problem).with_hint(
        "name your columns with --columns, for example '{\"question\": \"query\", \"good\": \"response\", \"bad\": \
         \"rejected_response\"}'",
    )
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

/// Splits rows into those to train on and those to validate with: `(train, validation)`.
///
/// `floor(rows · test_ratio)` rows validate: a seeded draw, or the last rows when shuffling is off. Both parts keep
/// the order of `rows`. A row that stands in `rows` more than once is never in both parts: copies of a validation row
/// are taken out of the training part.
///
/// # Panics
/// If `test_ratio` is not in `[0, 1)`.
pub fn split(rows: Vec<Row>, test_ratio: f64, shuffle: Shuffle) -> (Vec<Row>, Vec<Row>) {
    assert!((0.0..1.0).contains(&test_ratio), "test_ratio is {test_ratio}, expected at least 0 and less than 1");
    // 100 · 0.29 is 28.999999999999996 in f64, and means 29.
    let n_val = (rows.len() as f64 * test_ratio + 1e-9).floor() as usize;
    let mut order: Vec<usize> = (0..rows.len()).collect();
    if let Shuffle::Seeded(seed) = shuffle {
        order.shuffle(&mut rng(seed, Draw::Split, 0));
    }
    let val_idx: HashSet<usize> = order.split_off(rows.len() - n_val).into_iter().collect();
    let (mut train, mut val) = (Vec::new(), Vec::new());
    for (i, row) in rows.into_iter().enumerate() {
        if val_idx.contains(&i) { val.push(row) } else { train.push(row) }
    }
    let held_out: HashSet<&Location> = val.iter().map(|row| &row.location).collect();
    train.retain(|row| !held_out.contains(&row.location));
    (train, val)
}

/// The order in which an epoch (counted from 0) visits `n` rows: a permutation of its own for every epoch, or
/// `0, 1, … n-1` when shuffling is off.
pub fn epoch_order(n: usize, epoch: usize, shuffle: Shuffle) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    if let Shuffle::Seeded(seed) = shuffle {
        order.shuffle(&mut rng(seed, Draw::Epoch, epoch as u64));
    }
    order
}

/// Exactly `n` of the rows, in file order; all of them as often as they fit, and a draw for the remainder.
fn sample(rows: Vec<Row>, n: usize, rng: &mut Xoshiro256PlusPlus) -> Vec<Row> {
    let mut remainder: Vec<usize> = (0..rows.len()).collect();
    remainder.shuffle(rng);
    remainder.truncate(n % rows.len());
    remainder.sort_unstable();
    let whole = (0..n / rows.len()).flat_map(|_| 0..rows.len());
    whole.chain(remainder).map(|i| rows[i].clone()).collect()
}

/// What a random number is for; every use has a stream of its own.
enum Draw {
    Sample,
    Split,
    Epoch,
}

fn rng(seed: u64, draw: Draw, idx: u64) -> Xoshiro256PlusPlus {
    let stream = (draw as u64 + 1).wrapping_mul(0xd1b5_4a32_d192_ed03) ^ idx.wrapping_mul(0x8cb9_2ba7_2f3d_8dd7);
    Xoshiro256PlusPlus::seed_from_u64(seed ^ stream)
}
