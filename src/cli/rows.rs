//! The rows of a run, from the flags to token ids.

use super::open::OpenModel;
use crate::config::TrainArgs;
use crate::data::dataset::{self, Dataset, Shuffle, Skipped, Strictness};
use crate::data::tokenize::{TokenizedPair, TruncationStrategy, tokenize_rows};
use crate::demo;
use crate::error::{Error, Result};
use crate::train::plan::Plan;

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
    /// Reads, splits and tokenizes the rows, and lists on standard error those that are left out.
    ///
    /// # Errors
    /// If a file cannot be read, a row cannot be used and that is an error, or no row is left to train on.
    pub fn load(args: &TrainArgs, open: &OpenModel) -> Result<Self> {
        let strictness = if args.strict { Strictness::Strict } else { Strictness::Lenient };
        let truncation: TruncationStrategy = args.truncation_strategy.parse()?;
        let load = |specs: &[String]| {
            dataset::load(specs, &args.columns.clone().unwrap_or_default(), strictness, args.seed)
        };
        let Dataset { rows, mut skipped } = match args.dataset.as_slice() {
            [] if args.model_id_or_path.is_some() => {
                return Err(Error::config("--dataset is missing: what is the model to learn from?").with_hint(
                    "a JSONL file with rows of query, response, rejected_response; --dataset demo takes the demo's pairs",
                ));
            }
            _ if is_demo_data(args) => demo::pairs()?,
            specs => load(specs)?,
        };
        let shuffle = shuffle(args);
        let (train, val) = if args.val_dataset.is_empty() {
            dataset::split(rows, args.dataset_test_ratio, shuffle)
        } else {
            let val = load(&args.val_dataset)?;
            skipped.extend(val.skipped);
            (rows, val.rows)
        };
        let mut tokenize = |rows: &[dataset::Row]| -> Result<Vec<TokenizedPair>> {
            let system = args.system.as_deref();
            let (pairs, left_out) = tokenize_rows(
                rows,
                &open.tokenizer,
                open.template,
                args.max_length,
                truncation,
                system,
                strictness,
            )?;
            skipped.extend(left_out);
            open.check_ids(pairs.iter().flat_map(|p| p.prompt.iter().chain(&p.chosen).chain(&p.rejected)))?;
            Ok(pairs)
        };
        let (train, val) = (tokenize(&train)?, tokenize(&val)?);
        for row in &skipped {
            eprintln!("left out: {row}");
        }
        if train.is_empty() {
            let name = args.dataset.first().map_or(demo::NAME, String::as_str);
            return Err(Error::file(
                name,
                format!("none of its rows can be trained on: {}", dataset::summarize(&skipped)),
            )
            .with_hint(
                "every row and its reason are listed above; rows that are too long: raise --max_length",
            ));
        }
        Ok(Self { train, val, skipped })
    }
}

/// Whether the demo's own pairs are trained on.
pub fn is_demo_data(args: &TrainArgs) -> bool {
    match args.dataset.as_slice() {
        [] => args.model_id_or_path.is_none(),
        [name] => name == demo::NAME,
        _ => false,
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
