//! `orpo-wgpu plan`: what a training run takes of the device, and how long, before anything is loaded.

use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, Table, Width, presets as styles};

use super::advice::advice;
use super::budget::{Budget, Case, Rows, Setting, USABLE, runs_again};
use super::nearest::{Nearest, alternatives, nearest};
use super::open::OpenModel;
use super::rows::{Data, lengths, load, note_left_out, note_positions, nothing_to_train_on, shuffle};
use super::start;
use super::words::{entry, millions, new_table};
use super::work::Work;
use crate::config::TrainArgs;
use crate::data::dataset::Dataset;
use crate::data::draw;
use crate::data::renames;
use crate::data::tokenize::TokenizedPair;
use crate::demo;
use crate::device::{self, DeviceChoice, size};
use crate::error::{Error, Result};
use crate::model::LlamaConfig;
use crate::model::presets;
use crate::train::cost::StepMemory;
use crate::words::{counted, thousands};

/// Columns of the table's first one, which holds the longest flag: all of them together fit 80.
const SETTINGS_WIDTH: u16 = 34;

/// Runs the subcommand.
///
/// # Errors
/// What the settings, the model's folder and the data can be wrong in, and a device that is not there.
pub fn run(args: TrainArgs) -> Result<()> {
    if args.model_type.as_deref() == Some("list") {
        say!("{}", presets::list());
        return Ok(());
    }
    let args = &start::with_checkpoint(args)?;
    let selected = device::select(&args.device)?;
    let ranks = start::ranks(args)?;
    let source = Source::open(args)?;
    let is_elsewhere = selected.choice == DeviceChoice::Cpu && args.device.eq_ignore_ascii_case("auto");
    // Memory of a device that is not here is asked about where none is here.
    let choice = match args.max_memory.filter(|_| is_elsewhere) {
        Some(memory) => DeviceChoice::elsewhere(memory.0),
        None => {
            if let Some(note) = &selected.note {
                tell("device", &format!("{note}; --max_memory 8GiB asks about a GPU of 8 GiB"));
            }
            selected.choice
        }
    };
    let is_elsewhere = is_elsewhere && choice != DeviceChoice::Cpu;
    let rows = source.pairs.as_deref().map_or(Rows::Longest, Rows::Known);
    let case = Case::new(args, &source.config, ranks, rows, &choice)?
        .with_val(&source.val)
        .stored_with(source.embedding_width);
    let base = Setting::of(args);
    let none = || Error::config("no row is left to train on");
    let chosen = case.predict(&base)?.ok_or_else(none)?;

    tell("model", &format!("{}, {} weights", source.name, millions(source.config.n_weights())));
    source.print_data(args);
    let longest = source.pairs.iter().flatten().map(TokenizedPair::prompt_and_longer_answer).max();
    note_positions(longest.unwrap_or(args.max_length), &source.config);
    print_device(args, &case, is_elsewhere);
    tell("chosen", &base.flags(None));
    print_memory(&case, &chosen);
    let resumes = args.resume_from_checkpoint.is_some();
    let mut others = alternatives(&case, &base, resumes)?;
    let nearest = if case.fits(&chosen) { None } else { nearest(&case, &base, resumes)? };
    if let Some(Nearest { setting, budget, .. }) = &nearest {
        let is_new = !others.iter().any(|(other, _)| other == setting) && *setting != base;
        others.extend(is_new.then(|| (setting.clone(), *budget)));
    }
    say!("\n{}", table(&case, &base, &chosen, &others));
    tell("kept", "what layers compute in forward and hold until backward has read it");
    let n_layers = source.config.num_hidden_layers;
    tell("again", &format!("how many of the {n_layers} layers hold less, and run again in backward instead"));
    let budgets = std::iter::once(&chosen).chain(others.iter().map(|(_, budget)| budget));
    if let Some(budget) = budgets.into_iter().find(|budget| !case.fits_buffers(budget)) {
        tell("fits", &too_large(&case, budget));
    }
    if let Some(nearest) = nearest {
        tell("nearest", &advice(&case, &base, &nearest));
    }
    say!("");
    let work = Work::of(args, &case, source.n_pairs, &chosen)?;
    tell("run", &work.what);
    let time = match is_elsewhere {
        true => "unknown: the device is not here to be measured".to_owned(),
        false => work.time(args, &case)?,
    };
    tell("time", &time);
    Ok(())
}

fn tell(label: &str, text: &str) {
    say!("{}", entry(label, text));
}

/// What is planned for.
struct Source {
    name: String,
    config: LlamaConfig,
    /// Bytes of a value of the embedding, as it is stored.
    embedding_width: usize,
    /// Pairs to train on; none where no tokenizer or no data set is at hand.
    pairs: Option<Vec<TokenizedPair>>,
    /// Pairs to evaluate on.
    val: Vec<TokenizedPair>,
    /// Pairs to train on, where they can be counted.
    n_pairs: Option<usize>,
    /// Rows that are left out, as being too long or unusable.
    n_left_out: usize,
}

impl Source {
    /// A model folder, with its data where they are named, the shape of a published model, or the demo.
    fn open(args: &TrainArgs) -> Result<Self> {
        if let (Some(name), None) = (&args.model_type, &args.model_id_or_path) {
            let config = presets::named(name).map_err(|unknown| {
                Error::config(unknown).with_hint(
                    "of another model, pass the folder as --model_id_or_path; config.json and the tokenizer will do",
                )
            })?;
            return Ok(Self {
                name: format!("{name}, the published shape"),
                config,
                embedding_width: size_of::<u16>(),
                pairs: None,
                val: Vec::new(),
                n_pairs: count_rows(args)?,
                n_left_out: 0,
            });
        }
        let open = OpenModel::open(args.model_id_or_path.as_deref(), &args.template_type)?;
        let embedding_width = open.width()?;
        start::adapter_of(args).map_or(Ok(()), |folder| open.check_adapter(folder))?;
        if args.dataset.is_empty() && !open.is_demo() {
            return Ok(Self {
                name: open.name.clone(),
                config: open.config,
                embedding_width,
                pairs: None,
                val: Vec::new(),
                n_pairs: None,
                n_left_out: 0,
            });
        }
        let Data { train, val, skipped } = Data::load(args, &open)?;
        Ok(Self {
            name: open.name.clone(),
            config: open.config,
            embedding_width,
            n_pairs: Some(train.len()),
            pairs: Some(train),
            val,
            n_left_out: skipped.len(),
        })
    }

    fn print_data(&self, args: &TrainArgs) {
        let Some(pairs) = &self.pairs else {
            let lacks = if args.model_id_or_path.is_none() { "the model's tokenizer" } else { "a --dataset" };
            let what = format!(
                "every pair is taken as two sequences of {} tokens with nothing in common, the most that --max_length lets through; \
                 without {lacks} nothing shorter is known",
                thousands(args.max_length)
            );
            tell("data", &what);
            return;
        };
        let (pairs_to, rows) = (counted(pairs.len(), "pair"), counted(self.n_left_out, "row"));
        tell("data", &format!("{pairs_to} to train on, {} to evaluate on, {rows} left out", self.val.len()));
        tell("lengths", &lengths(pairs));
    }
}

/// Rows to train on of a data set that cannot be tokenized; none where no data set is named.
fn count_rows(args: &TrainArgs) -> Result<Option<usize>> {
    if args.dataset.is_empty() {
        return Ok(None);
    }
    let Dataset { rows, skipped, unused } = load(args, &args.dataset, demo::pairs)?;
    note_left_out(&skipped);
    let is_split = args.val_dataset.is_empty();
    if is_split {
        renames::check_used(&[&unused])?;
    }
    let rows = if is_split { draw::split(rows, args.dataset_test_ratio, shuffle(args)).0 } else { rows };
    if rows.is_empty() { Err(nothing_to_train_on(args, 0, &[])) } else { Ok(Some(rows.len())) }
}

fn print_device(args: &TrainArgs, case: &Case<'_>, is_elsewhere: bool) {
    let device = match is_elsewhere {
        true => "a GPU that is not here, and is taken to compute in fp16".to_owned(),
        false => case.choice.describe(),
    };
    let memory = match (case.memory, case.usable()) {
        (Some(memory), Some(usable)) => {
            let whence = match (args.max_memory, case.choice) {
                (Some(max_memory), _) => format!(" by --max_memory {max_memory}"),
                (None, DeviceChoice::Cpu) => " free".to_owned(),
                _ => String::new(),
            };
            let (memory, usable) = (size(memory), size(usable));
            format!("{memory}{whence}, of which a run may fill {:.0} %, {usable}", 100.0 * USABLE)
        }
        _ => "which does not say how much memory it has, so that whether a run fits is unknown".to_owned(),
    };
    tell("device", &format!("{device}: {memory}"));
}

/// Why settings do not fit that would leave memory free.
fn too_large(case: &Case<'_>, budget: &Budget) -> String {
    let (what, bytes) = budget.largest;
    let (largest, most) = (size(bytes as u64), size(case.choice.shard_bytes() as u64));
    format!(
        "no also where a tensor is larger than the device takes: it takes {most} in one, and in the first such line {what} have {largest}"
    )
}

/// The memory of the chosen settings by part.
fn print_memory(case: &Case<'_>, chosen: &Budget) {
    let StepMemory { weights, embedding, adapters, gradients, kept, layer, scratch, head } = chosen.memory;
    let (total, tokens) = (size(chosen.memory.total() as u64), thousands(chosen.tokens));
    tell("memory", &format!("{total} at the fullest, in a step with the longest pairs ({tokens} tokens)"));
    let kept_what = format!("kept for backward ({})", runs_again(chosen.keep, case.config.num_hidden_layers));
    for (bytes, what) in [
        (weights, "weights"),
        (embedding, "the embedding, as it is stored"),
        (adapters + gradients, "LoRA and optimizer"),
        (kept, &kept_what),
        (layer, "one live layer"),
        (head, "a chunk of the head"),
        (scratch, "scratch"),
    ] {
        if bytes > 0 {
            say!("  {:>10}  {what}", size(bytes as u64));
        }
    }
    if *case.choice != DeviceChoice::Cpu {
        let embedding = size(case.embedding_bytes() as u64);
        tell("besides", &format!("in the computer's own memory the embedding, {embedding} as it is stored"));
    }
}

/// One line for each setting, the chosen one first; no wider than a terminal.
fn table(case: &Case<'_>, base: &Setting, chosen: &Budget, others: &[(Setting, Budget)]) -> Table {
    let mut table = new_table();
    table.load_style(styles::UTF8_BORDERS_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["settings", "kept", "total", "again", "fits"]);
    let cells = |flags: String, budget: &Budget| {
        let fits = match case.memory {
            None => "unknown",
            Some(_) if case.fits(budget) => "yes",
            Some(_) => "no",
        };
        let [kept, total] = [budget.memory.kept, budget.memory.total()].map(|bytes| size(bytes as u64));
        let again = budget.keep.n_again(case.config.num_hidden_layers).to_string();
        [flags, kept, total, again, fits.to_owned()]
    };
    table.add_row(cells("as chosen".to_owned(), chosen));
    for (setting, budget) in others {
        table.add_row(cells(setting.flags(Some(base)) + &case.left_out(setting.max_length), budget));
    }
    for (i, column) in table.column_iter_mut().enumerate() {
        if i == 0 {
            column.set_constraint(ColumnConstraint::UpperBoundary(Width::Fixed(SETTINGS_WIDTH)));
        } else {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Adapter;

    #[test]
    fn a_tensor_that_the_device_does_not_take_is_told_of() {
        let device = burn_wgpu::WgpuDevice::IntegratedGpu(78);
        let adapter = Box::new(Adapter { memory_bytes: Some(80 << 30), ..Adapter::unknown() });
        let choice = DeviceChoice::Wgpu { device, adapter };
        let args = TrainArgs { dtype: "fp32".to_owned(), ..TrainArgs::default() };
        let config = presets::named("llama3-8b-instruct").unwrap();
        let case = Case::new(&args, &config, [8; 7], Rows::Longest, &choice).unwrap();
        let budget = case.predict(&Setting::of(&args)).unwrap().unwrap();
        assert!(budget.memory.total() < 80 << 30 && !case.fits(&budget));
        let says =
            "it takes 128 MiB in one, and in the first such line the weights of a linear layer have 224 MiB";
        assert!(too_large(&case, &budget).ends_with(says), "{}", too_large(&case, &budget));
    }
}
