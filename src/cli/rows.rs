//! The rows of a run, from the flags to token ids.

mod notes;

use std::fs;
use std::path::Path;

use super::open::OpenModel;
use super::words::millions;
use crate::config::TrainArgs;
use crate::data::batch::{LossCompat, pack};
use crate::data::dataset::{self, Dataset, Row, Skipped, Strictness};
use crate::data::draw::{self, Shuffle};
use crate::data::renames::{self, UnusedRenames};
use crate::data::tokenize::{TokenizedPair, TruncationStrategy, tokenize_rows};
use crate::demo;
use crate::error::{Error, Result};
use crate::model::LlamaConfig;
use crate::train::plan::Plan;
use crate::words::{counted, first_of, thousands};

/// How many of the rows that are left out standard error names.
const SHOWN_ROWS: usize = 5;
/// The file in a run's folder that lists all of them.
const LEFT_OUT_FILE: &str = "left_out.txt";

/// What helps rows that tokenizing leaves out.
const TOO_LONG: &str = "rows that are too long: raise --max_length";

/// The rows of a run as token ids.
pub struct Data {
    /// Those to learn from, at least one.
    pub train: Vec<TokenizedPair>,
    /// Those to evaluate on.
    pub val: Vec<TokenizedPair>,
    /// Those that cannot be used.
    pub skipped: Vec<Skipped>,
}

impl Data {
    /// Reads, splits and tokenizes the rows, and names on standard error the first of those that are left out.
    ///
    /// # Errors
    /// If a file cannot be read, a row cannot be used and that is an error, or no row is left to train on.
    pub fn load(args: &TrainArgs, open: &OpenModel) -> Result<Self> {
        if args.dataset.is_empty() && args.model_id_or_path.is_some() {
            return Err(Error::config("--dataset is missing: what is the model to learn from?").with_hint(
                "a JSONL file with rows of query, response, rejected_response; --dataset demo takes the demo's pairs",
            ));
        }
        let Dataset { rows, mut skipped, unused } = load(args, &args.dataset, demo::pairs)?;
        if open.is_demo() && !is_demo_data(args) {
            note!(
                "note: no model is named, and the demo's own is taken, of {} weights; --model_id_or_path DIR names yours",
                millions(open.config.n_weights())
            );
        }
        notes::tell(args, &args.dataset, &rows, &unused.columns);
        let shuffle = shuffle(args);
        let (n_rows, mut n_copies) = (rows.len(), 0);
        let (train, val) = if args.val_dataset.is_empty() {
            renames::check_used(&[&unused])?;
            let (train, val) = draw::split(rows, args.dataset_test_ratio, shuffle);
            n_copies = n_rows - train.len() - val.len();
            (train, val)
        } else {
            let val = load(args, &args.val_dataset, demo::held_out)?;
            renames::check_used(&[&unused, &val.unused])?;
            skipped.extend(val.skipped);
            notes::tell(args, &args.val_dataset, &val.rows, &val.unused.columns);
            if let Some(note) = notes::learned_from(&rows, &val.rows) {
                note!("{note}");
            }
            (rows, val.rows)
        };
        if let Some(note) = notes::unused_system(args, train.iter().chain(&val)) {
            note!("{note}");
        }
        let unheld = val.is_empty().then(|| notes::none_held_out(args.dataset_test_ratio, n_rows)).flatten();
        let (n_train, n_malformed) = (train.len(), skipped.len());
        let train = tokenize(args, open, &train, &mut skipped)?;
        if train.is_empty() {
            // The error itself tells of those that tokenizing left out.
            note_left_out(&skipped[..n_malformed]);
            return Err(nothing_to_train_on(args, n_train, &skipped[n_malformed..]));
        }
        let n_val = val.len();
        let val = tokenize(args, open, &val, &mut skipped)?;
        if val.is_empty() && !args.val_dataset.is_empty() {
            return Err(nothing_to_evaluate_on(args, n_val, &skipped));
        }
        let none_left = || {
            let rows = counted(n_val, "row");
            format!("note: nothing is evaluated, as none of the {rows} held out can be used")
        };
        let unheld = if val.is_empty() && n_val > 0 { Some(none_left()) } else { unheld };
        let data = Self { train, val, skipped };
        data.note_lost(args, open)?;
        if n_copies > 0 {
            let rows = counted(n_copies, "row");
            note!(
                "note: {rows} not trained on, as a copy is held out to evaluate on; --val_dataset FILE holds none of these out"
            );
        }
        if let Some(unheld) = unheld {
            note!("{unheld}");
        }
        Ok(data)
    }

    /// Reads and tokenizes the rows that a run with these settings evaluates on, and none to train on.
    ///
    /// # Errors
    /// As [`load`](Self::load), but of rows to evaluate on.
    pub fn load_to_evaluate(args: &TrainArgs, open: &OpenModel) -> Result<Self> {
        let is_named = !args.val_dataset.is_empty();
        let takes_demo = args.model_id_or_path.is_none() && args.dataset.is_empty();
        if !is_named && args.dataset.is_empty() && !takes_demo {
            return Err(Error::config("no rows to evaluate on are named").with_hint(
                "--val_dataset FILE names them; with --config RUN/args.json they are those of the run",
            ));
        }
        let learned = |args: &TrainArgs| load(args, &args.dataset, demo::pairs);
        let (rows, mut skipped) = if is_named {
            let Dataset { rows, skipped, unused } = load(args, &args.val_dataset, demo::held_out)?;
            renames::check_used(&[&unused])?;
            notes::tell(args, &args.val_dataset, &rows, &unused.columns);
            if (takes_demo || !args.dataset.is_empty())
                && let Some(note) = notes::learned_from(&learned(args)?.rows, &rows)
            {
                note!("{note}");
            }
            (rows, skipped)
        } else {
            let Dataset { rows, skipped, unused } = learned(args)?;
            renames::check_used(&[&unused])?;
            notes::tell(args, &args.dataset, &rows, &unused.columns);
            (draw::split(rows, args.dataset_test_ratio, shuffle(args)).1, skipped)
        };
        if let Some(note) = notes::unused_system(args, rows.iter()) {
            note!("{note}");
        }
        if rows.is_empty() {
            return Err(Error::config("no row is held out to evaluate on")
                .with_hint("--val_dataset FILE names rows, --dataset_test_ratio a share of --dataset"));
        }
        let val = tokenize(args, open, &rows, &mut skipped)?;
        if val.is_empty() {
            return Err(nothing_to_evaluate_on(args, rows.len(), &skipped));
        }
        let data = Self { train: Vec::new(), val, skipped };
        data.note_lost(args, open)?;
        Ok(data)
    }

    /// Says which rows are cut, and which are left out.
    fn note_lost(&self, args: &TrainArgs, open: &OpenModel) -> Result<()> {
        let end = open.template.renderer(&open.tokenizer)?.end_of_answer();
        let is_cut = |pair: &&TokenizedPair| {
            [&pair.chosen, &pair.rejected].iter().any(|answer| answer.last() != Some(&end))
        };
        let n_cut = self.train.iter().chain(&self.val).filter(is_cut).count();
        if n_cut > 0 {
            note!("note: answers of {} cut to --max_length {}", counted(n_cut, "row"), args.max_length);
        }
        note_left_out(&self.skipped);
        let (n_lost, n_used) = (self.skipped.len(), self.train.len() + self.val.len());
        if n_lost > n_used {
            let (lost, all) = (thousands(n_lost), thousands(n_lost + n_used));
            note!("note: {lost} of {all} rows are left out, which is most of them");
        }
        Ok(())
    }

    /// Lists all rows that are left out in a run's folder, and says so. Where there are none, a list that an earlier run left there goes.
    ///
    /// # Errors
    /// If the list cannot be written or removed.
    pub fn list_left_out(&self, folder: &Path) -> Result<()> {
        let path = folder.join(LEFT_OUT_FILE);
        if !self.skipped.is_empty() {
            let lines: Vec<String> = self.skipped.iter().map(|row| format!("{row}\n")).collect();
            fs::write(&path, lines.concat()).map_err(Error::io("write", &path))?;
            let rows = if lines.len() == 1 {
                "the row is"
            } else {
                &format!("all {} rows are", thousands(lines.len()))
            };
            note!("left out: {rows} in {}", path.display());
            Ok(())
        } else if path.exists() {
            fs::remove_file(&path).map_err(Error::io("remove", &path))
        } else {
            Ok(())
        }
    }
}

/// Rows as token ids that the model has; those that cannot be used are added to `skipped`.
fn tokenize(
    args: &TrainArgs,
    open: &OpenModel,
    rows: &[Row],
    skipped: &mut Vec<Skipped>,
) -> Result<Vec<TokenizedPair>> {
    let truncation: TruncationStrategy = args.truncation_strategy.parse()?;
    let system = args.system.as_deref();
    let (pairs, left_out) = tokenize_rows(
        rows,
        &open.tokenizer,
        open.template,
        args.max_length,
        truncation,
        system,
        strictness(args),
    )?;
    skipped.extend(left_out);
    open.check_ids(pairs.iter().flat_map(|p| p.prompt.iter().chain(&p.chosen).chain(&p.rejected)))?;
    Ok(pairs)
}

/// Why there is no row to evaluate on: tokenizing left all `n_rows` out, the last ones of those `skipped`.
fn nothing_to_evaluate_on(args: &TrainArgs, n_rows: usize, skipped: &[Skipped]) -> Error {
    let (before, of_these) = skipped.split_at(skipped.len() - n_rows);
    // The error itself tells of these.
    note_left_out(before);
    let problem = format!("none of its rows can be evaluated on: {}", dataset::summarize(of_these));
    let named = if args.val_dataset.is_empty() { &args.dataset } else { &args.val_dataset };
    let name = if named.is_empty() { demo::NAME.to_owned() } else { named.join(" ") };
    Error::file(name, problem).with_hint(TOO_LONG)
}

/// Why there is no row to train on: `n_train` there were, of which tokenizing left some out, or none beside those that are held out.
pub fn nothing_to_train_on(args: &TrainArgs, n_train: usize, left_out: &[Skipped]) -> Error {
    let name = if args.dataset.is_empty() { demo::NAME.to_owned() } else { args.dataset.join(" ") };
    if n_train == 0 {
        let problem = "none of its rows is left to train on: each equals one that is held out to evaluate on";
        Error::file(name, problem).with_hint("--dataset_test_ratio 0 holds none out")
    } else {
        let problem = format!("none of its rows can be trained on: {}", dataset::summarize(left_out));
        Error::file(name, problem).with_hint(TOO_LONG)
    }
}

/// Names the first of the rows that are left out, and says how many more there are.
pub fn note_left_out(skipped: &[Skipped]) {
    first_of(skipped, SHOWN_ROWS).iter().for_each(|row| note!("left out: {row}"));
}

/// How long pairs are, as `train` and `plan` say it: by what `--max_length` counts, and by what a step computes.
pub fn lengths(pairs: &[TokenizedPair]) -> String {
    let counted = pairs.iter().map(TokenizedPair::prompt_and_longer_answer);
    let [shortest, longest] = [counted.clone().min(), counted.max()].map(|n| thousands(n.unwrap_or(0)));
    // Every loss has the same tokens computed.
    let computed = pairs.iter().map(|pair| pack(&[pair], LossCompat::Swift).n_tokens());
    let mut computed: Vec<usize> = computed.collect();
    computed.sort_unstable();
    let last = computed.len().saturating_sub(1) as f64;
    let at = |share: f64| thousands(computed.get((last * share).round() as usize).copied().unwrap_or(0));
    format!(
        "{shortest} to {longest} tokens for prompt + longer answer, which --max_length counts; {} to {} for prompt + both answers, \
         which a step computes (median {}, 90 % up to {})",
        at(0.0),
        at(1.0),
        at(0.5),
        at(0.9)
    )
}

/// Says that the longest sequence has more tokens than the model was made for, where it does.
pub fn note_positions(longest: usize, config: &LlamaConfig) {
    let most = config.max_position_embeddings;
    if longest > most {
        note!(
            "note: the longest prompt + answer has {longest} tokens, the model was made for {most} (max_position_embeddings)"
        );
    }
}

/// The rows of data sets, where these are the demo's those of `demo`.
///
/// # Errors
/// As of [`dataset::load`].
pub fn load(args: &TrainArgs, specs: &[String], demo: fn() -> Result<Dataset>) -> Result<Dataset> {
    let columns = args.columns.clone().unwrap_or_default();
    let Some(sample) = demo_sample(specs) else {
        return dataset::load(specs, &columns, strictness(args), args.seed);
    };
    let Dataset { rows, skipped, unused } = demo()?;
    let rows = match sample {
        Some(n) => draw::sample_of(rows, n, args.seed, 0),
        None => rows,
    };
    Ok(Dataset { rows, skipped, unused: UnusedRenames { names: columns.into_keys().collect(), ..unused } })
}

fn strictness(args: &TrainArgs) -> Strictness {
    if args.strict { Strictness::Strict } else { Strictness::Lenient }
}

/// Whether the demo's own pairs are trained on.
pub fn is_demo_data(args: &TrainArgs) -> bool {
    is_demo_set(&args.dataset) && !(args.dataset.is_empty() && args.model_id_or_path.is_some())
}

/// Whether data sets are the demo's, which goes by its name, whatever else is called so; it is what is taken where none is named.
pub fn is_demo_set(specs: &[String]) -> bool {
    demo_sample(specs).is_some()
}

/// How many rows are sampled of the demo's, where data sets are those.
fn demo_sample(specs: &[String]) -> Option<Option<usize>> {
    match specs {
        [] => Some(None),
        [spec] => match spec.strip_prefix(demo::NAME)? {
            "" => Some(None),
            // What is no number is an error of loading.
            sample => sample.strip_prefix('#')?.parse().ok().filter(|n| *n > 0).map(Some),
        },
        _ => None,
    }
}

/// The order of the rows.
pub fn shuffle(args: &TrainArgs) -> Shuffle {
    if args.dataset_shuffle { Shuffle::Seeded(args.seed) } else { Shuffle::Off }
}

/// How so many rows are cut into steps, and how many steps the run has.
pub fn plan_of(args: &TrainArgs, n_rows: usize) -> (Plan, usize) {
    let plan = Plan {
        n_rows,
        batch_size: args.batch_size,
        gradient_accumulation_steps: args.gradient_accumulation_steps.unwrap_or(1),
        shuffle: shuffle(args),
    };
    let epochs = (args.num_train_epochs * plan.steps_per_epoch() as f64).ceil() as usize;
    (plan, args.max_steps.unwrap_or(epochs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_s_data_go_by_their_name_and_are_sampled() {
        let sample = |specs: &[&str]| demo_sample(&specs.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!([&[][..], &["demo"]].map(sample), [Some(None); 2]);
        assert_eq!(sample(&["demo#5"]), Some(Some(5)));
        for others in [&["demo#0"][..], &["demo#all"], &["demo5"], &["demo.jsonl#5"], &["demo", "demo"]] {
            assert_eq!(sample(others), None, "{others:?}");
        }
        let args = TrainArgs::default();
        let load = |spec: &str| load(&args, &[spec.to_owned()], demo::pairs).unwrap().rows;
        let (all, five) = (load("demo"), load("demo#5"));
        assert!(five.len() == 5 && five.iter().all(|row| all.contains(row)));
    }
}
