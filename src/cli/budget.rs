//! What a run's longest step takes of the device's memory, under the settings that were chosen and under others.

use std::cmp::Reverse;
use std::path::Path;

use super::precision;
use crate::config::TrainArgs;
use crate::data::batch::{Batch, LossCompat, pack};
use crate::data::dataset::Location;
use crate::data::tokenize::{TokenizedPair, TruncationStrategy, fit, room_for_answers};
use crate::device::DeviceChoice;
use crate::error::Result;
use crate::model::LlamaConfig;
use crate::model::llama::{Keep, KeepPlan, LINEAR_NAMES};
use crate::model::parts::logits_bytes;
use crate::train::cost::{Place, StepMemory, StepShape, largest_tensor};
use crate::words::thousands;

/// The share of a device's memory that a run may be predicted to fill: drivers, displays and fragments take the rest.
pub const USABLE: f64 = 0.85;

/// The share of it that a run may be predicted to fill for the sake of speed: it shall not die for what it could do without.
const SPARE: f64 = 0.7;

/// The settings that memory depends on, named as their flags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// See [`TrainArgs::dtype`].
    pub dtype: String,
    /// See [`TrainArgs::quantization_bit`].
    pub quantization_bit: u32,
    /// See [`TrainArgs::quantize_lm_head`].
    pub quantize_lm_head: bool,
    /// See [`TrainArgs::max_length`].
    pub max_length: usize,
    /// See [`TrainArgs::batch_size`].
    pub batch_size: usize,
    /// See [`TrainArgs::gradient_accumulation_steps`].
    pub gradient_accumulation_steps: usize,
    /// See [`TrainArgs::gradient_checkpointing`].
    pub gradient_checkpointing: bool,
}

impl Setting {
    /// Those of a run.
    pub fn of(args: &TrainArgs) -> Self {
        Self {
            dtype: args.dtype.clone(),
            quantization_bit: args.quantization_bit,
            quantize_lm_head: args.quantize_lm_head,
            max_length: args.max_length,
            batch_size: args.batch_size,
            gradient_accumulation_steps: args.gradient_accumulation_steps.unwrap_or(1),
            gradient_checkpointing: args.gradient_checkpointing,
        }
    }

    /// The flags that turn `other` into these settings, as they are typed; all of them without another.
    pub fn flags(&self, other: Option<&Self>) -> String {
        let mut flags = Vec::new();
        let mut add = |name: &str, value: String, is_same: bool| {
            if other.is_none() || !is_same {
                flags.push(format!("--{name} {value}"));
            }
        };
        let base = other.unwrap_or(self);
        let is_same_batch = (self.batch_size, self.gradient_accumulation_steps)
            == (base.batch_size, base.gradient_accumulation_steps);
        add("dtype", self.dtype.clone(), self.dtype == base.dtype);
        add(
            "quantization_bit",
            self.quantization_bit.to_string(),
            self.quantization_bit == base.quantization_bit,
        );
        add(
            "quantize_lm_head",
            self.quantize_lm_head.to_string(),
            self.quantize_lm_head == base.quantize_lm_head,
        );
        add("max_length", self.max_length.to_string(), self.max_length == base.max_length);
        add("batch_size", self.batch_size.to_string(), is_same_batch);
        add("gradient_accumulation_steps", self.gradient_accumulation_steps.to_string(), is_same_batch);
        add(
            "gradient_checkpointing",
            self.gradient_checkpointing.to_string(),
            self.gradient_checkpointing == base.gradient_checkpointing,
        );
        flags.join(" ")
    }
}

/// The pairs of a run, as far as they are known.
#[derive(Debug, Clone, Copy)]
pub enum Rows<'a> {
    /// Within the chosen `--max_length`.
    Known(&'a [TokenizedPair]),
    /// Every pair is two sequences of `--max_length` tokens that share one: the most that there can be.
    Longest,
}

/// What memory depends on besides the settings.
#[derive(Debug, Clone)]
pub struct Case<'a> {
    /// The model's shape.
    pub config: &'a LlamaConfig,
    /// Rank of each linear's adapter; see [`StepShape::ranks`].
    pub ranks: [usize; LINEAR_NAMES.len()],
    /// The pairs.
    pub rows: Rows<'a>,
    /// Pairs to evaluate on, which take no more than a step over them would.
    pub val: &'a [TokenizedPair],
    /// What happens to pairs that are too long.
    pub truncation: TruncationStrategy,
    /// What is scored.
    pub loss_compat: LossCompat,
    /// Where it runs.
    pub choice: &'a DeviceChoice,
    /// The memory that there is, in bytes, where it is known.
    pub memory: Option<u64>,
    /// Bytes of a value of the embedding, as it is stored.
    pub embedding_width: usize,
}

/// What is kept for backward, and the memory that the longest step is predicted to take.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// What of the layers is kept.
    pub keep: KeepPlan,
    /// The prediction.
    pub memory: StepMemory,
    /// Tokens of the longest micro-batch.
    pub tokens: usize,
    /// What the largest tensor holds, and its bytes.
    pub largest: (&'static str, usize),
}

impl<'a> Case<'a> {
    /// The case of a run's own flags.
    ///
    /// # Errors
    /// If a flag has a value that there is not.
    pub fn new(
        args: &TrainArgs,
        config: &'a LlamaConfig,
        ranks: [usize; LINEAR_NAMES.len()],
        rows: Rows<'a>,
        choice: &'a DeviceChoice,
    ) -> Result<Self> {
        Ok(Self {
            config,
            ranks,
            rows,
            val: &[],
            truncation: args.truncation_strategy.parse()?,
            loss_compat: args.loss_compat.parse()?,
            choice,
            memory: args.max_memory.map(|size| size.0).or_else(|| choice.total_memory()),
            // As Llama is published.
            embedding_width: size_of::<u16>(),
        })
    }

    /// The case of a model that is stored with so many bytes a value.
    pub fn stored_with(self, embedding_width: usize) -> Self {
        Self { embedding_width, ..self }
    }

    /// The case with pairs to evaluate on.
    pub fn with_val(self, val: &'a [TokenizedPair]) -> Self {
        Self { val, ..self }
    }

    /// The bytes that a run may be predicted to fill.
    pub fn usable(&self) -> Option<u64> {
        self.memory.map(|bytes| (bytes as f64 * USABLE) as u64)
    }

    /// Whether a prediction fits; a device that does not say how much it has takes everything that fits its buffers.
    pub fn fits(&self, budget: &Budget) -> bool {
        self.usable().is_none_or(|usable| budget.memory.total() as u64 <= usable) && self.fits_buffers(budget)
    }

    /// Whether every tensor is one that the device takes.
    pub fn fits_buffers(&self, budget: &Budget) -> bool {
        budget.largest.1 <= self.choice.shard_bytes()
    }

    /// The longest step's memory under these settings; none if they leave out every row.
    ///
    /// # Errors
    /// If the device does not compute in the type.
    pub fn predict(&self, setting: &Setting) -> Result<Option<Budget>> {
        Ok(self.longest_step(setting)?.map(|shape| self.budget(&shape)))
    }

    /// The longest step under these settings; none if they leave out every row.
    ///
    /// Without gradient checkpointing everything is kept; with it, what [`keep_for_speed`] finds room for.
    ///
    /// # Errors
    /// If the device does not compute in the type.
    pub fn longest_step(&self, setting: &Setting) -> Result<Option<StepShape>> {
        let precision = precision::resolve(
            self.choice,
            &setting.dtype,
            setting.quantization_bit,
            setting.quantize_lm_head,
        )?;
        let batch = self.longest_batch(setting.max_length, setting.batch_size);
        if batch.pairs.is_empty() {
            return Ok(None);
        }
        let logits = logits_bytes(self.config, precision, self.choice.shard_bytes(), batch.rows.len());
        let accumulates = setting.gradient_accumulation_steps > 1;
        let keeping = |keep: KeepPlan| {
            StepShape::of(&batch, self.ranks, precision, keep, accumulates, logits, self.place())
        };
        if !setting.gradient_checkpointing {
            return Ok(Some(keeping(Keep::All.into())));
        }
        let total = |keep| StepMemory::of(self.config, &keeping(keep)).total() as u64;
        let keep = keep_for_speed(self.choice, self.memory, self.config.num_hidden_layers, total);
        Ok(Some(keeping(keep)))
    }

    /// Bytes of the embedding.
    pub fn embedding_bytes(&self) -> usize {
        self.embedding_width * self.config.vocab_size * self.config.hidden_size
    }

    /// Whose memory it takes.
    pub fn place(&self) -> Place {
        match self.choice {
            DeviceChoice::Cpu => Place::Cpu { embedding_bytes: self.embedding_bytes() },
            _ => Place::Gpu,
        }
    }

    /// What such a step takes.
    pub fn budget(&self, shape: &StepShape) -> Budget {
        Budget {
            keep: shape.keep,
            memory: StepMemory::of(self.config, shape),
            tokens: shape.tokens,
            largest: largest_tensor(self.config, shape),
        }
    }

    /// Tokens of the longest prompt with one answer.
    pub fn longest_row(&self, max_length: usize) -> usize {
        match self.rows {
            Rows::Known(rows) => {
                let longest = rows.iter().map(TokenizedPair::prompt_and_longer_answer).max();
                longest.unwrap_or(0).min(max_length)
            }
            Rows::Longest => max_length,
        }
    }

    /// How many rows `max_length` leaves out.
    fn n_left_out(&self, max_length: usize) -> usize {
        match self.rows {
            Rows::Known(rows) => {
                rows.iter().filter(|row| room_for_answers(row, max_length, self.truncation).is_err()).count()
            }
            Rows::Longest => 0,
        }
    }

    /// Whether `max_length` leaves out more than half of the rows: what is left would be another data set.
    pub fn leaves_out_most(&self, max_length: usize) -> bool {
        match self.rows {
            Rows::Known(rows) => 2 * self.n_left_out(max_length) > rows.len(),
            Rows::Longest => false,
        }
    }

    /// ` (leaves out 2 of 7 rows)`; nothing where `max_length` leaves out none.
    pub fn left_out(&self, max_length: usize) -> String {
        match (self.rows, self.n_left_out(max_length)) {
            (Rows::Known(rows), n @ 1..) => {
                format!(" (leaves out {} of {} rows)", thousands(n), thousands(rows.len()))
            }
            _ => String::new(),
        }
    }

    /// The micro-batch of the longest pairs.
    pub fn longest_batch(&self, max_length: usize, batch_size: usize) -> Batch {
        let pairs: Vec<TokenizedPair> = match self.rows {
            Rows::Known(rows) => self.longest_pairs(rows, max_length, batch_size),
            Rows::Longest => vec![longest_pair(max_length); batch_size],
        };
        pack(&pairs.iter().collect::<Vec<_>>(), self.loss_compat)
    }

    /// The `n` pairs that take the most tokens within `max_length`, those to evaluate on among them, the longest first.
    fn longest_pairs(&self, rows: &[TokenizedPair], max_length: usize, n: usize) -> Vec<TokenizedPair> {
        // What answers share from their beginning on is computed once, and does not count twice; only those are compared that may be
        // longer than the longest so far.
        let most = |pair: &TokenizedPair| {
            let room = room_for_answers(pair, max_length, self.truncation).ok()?;
            // Nothing follows an answer's last token.
            let answers =
                [&pair.chosen, &pair.rejected].map(|answer| answer.len().min(room).saturating_sub(1));
            Some(pair.prompt.len() + answers.iter().sum::<usize>())
        };
        let pairs = rows.iter().chain(self.val).enumerate();
        let mut pairs: Vec<_> =
            pairs.filter_map(|(i, pair)| Some(((Reverse(most(pair)?), i), pair))).collect();
        pairs.sort_by_key(|(rank, _)| *rank);
        let mut longest: Vec<((Reverse<usize>, usize), TokenizedPair)> = Vec::new();
        for (best_rank, pair) in pairs {
            if longest.len() == n && longest.last().is_none_or(|(rank, _)| *rank <= best_rank) {
                break;
            }
            if let Ok(pair) = fit(pair.clone(), max_length, self.truncation) {
                let tokens = pack(&[&pair], self.loss_compat).n_tokens();
                longest.push(((Reverse(tokens), best_rank.1), pair));
                longest.sort_by_key(|(rank, _)| *rank);
                longest.truncate(n);
            }
        }
        longest.into_iter().map(|(_, pair)| pair).collect()
    }
}

/// Two sequences of `max_length` tokens with nothing in common but the first.
pub fn longest_pair(max_length: usize) -> TokenizedPair {
    let answer = |id: u32| vec![id; max_length.max(2) - 1];
    let location = Location::new(Path::new("the longest pair"), 1);
    TokenizedPair { prompt: vec![0], chosen: answer(1), rejected: answer(2), location }
}

/// What is kept for backward beside the layers' inputs, so that less is run again: what attention computed, then everything of as many
/// layers as a GPU of so much memory is known to have room for. What a CPU or a software adapter has is not the run's alone.
///
/// `total` predicts the bytes of a step.
pub fn keep_for_speed(
    choice: &DeviceChoice,
    memory: Option<u64>,
    n_layers: usize,
    total: impl Fn(KeepPlan) -> u64,
) -> KeepPlan {
    let is_gpu = *choice != DeviceChoice::Cpu && !choice.is_software();
    let room = memory.filter(|_| is_gpu).map_or(0, |bytes| (bytes as f64 * SPARE) as u64);
    let mut plans = (0..=n_layers).rev().map(|whole| KeepPlan { whole, rest: Keep::Attention });
    plans.find(|&plan| total(plan) <= room).unwrap_or(Keep::Input.into())
}

/// What of so many layers runs again in backward, in words.
pub fn runs_again(keep: KeepPlan, n_layers: usize) -> String {
    let layers = match keep.n_again(n_layers) {
        0 => return "every activation kept".to_owned(),
        n if n == n_layers => "layers".to_owned(),
        n => format!("{n} of {n_layers} layers"),
    };
    let but = if keep.rest == Keep::Attention { ", but for attention" } else { "" };
    format!("{layers} run again in backward{but}")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A pair of so many tokens: a prompt of `n` and answers of two.
    pub(in crate::cli) fn pair(n: usize) -> TokenizedPair {
        TokenizedPair {
            prompt: vec![1; n],
            chosen: vec![2, 3],
            rejected: vec![4, 5],
            location: Location::new(Path::new("rows.jsonl"), n),
        }
    }

    fn case<'a>(
        config: &'a LlamaConfig,
        rows: &'a [TokenizedPair],
        truncation: TruncationStrategy,
    ) -> Case<'a> {
        let args = TrainArgs { truncation_strategy: truncation.to_string(), ..TrainArgs::default() };
        Case::new(&args, config, [8; LINEAR_NAMES.len()], Rows::Known(rows), &DeviceChoice::Cpu).unwrap()
    }

    #[test]
    fn the_longest_pairs_make_the_longest_batch() {
        let config = crate::demo::config().unwrap();
        let rows: Vec<_> = [3, 9, 1, 7].map(pair).into();
        let lines = |batch: &Batch| batch.locations.iter().map(|l| l.line).collect::<Vec<_>>();
        let delete = case(&config, &rows, TruncationStrategy::Delete);
        assert_eq!(lines(&delete.longest_batch(99, 2)), [9, 7]);
        assert_eq!(lines(&delete.longest_batch(99, 9)).len(), 4);
        assert_eq!(lines(&delete.longest_batch(10, 2)), [7, 3], "9 and two more are beyond");
        assert_eq!([10, 8, 4].map(|n| delete.leaves_out_most(n)), [false, false, true]);
        assert_eq!([99, 10].map(|n| delete.left_out(n)), ["", " (leaves out 1 of 4 rows)"]);
        assert_eq!(delete.longest_row(99), 11);
        let cut = case(&config, &rows, TruncationStrategy::TruncationRight);
        assert_eq!(lines(&cut.longest_batch(10, 2)), [9, 7], "its answers are cut");
        assert_eq!(lines(&cut.longest_batch(9, 2)), [7, 3], "its prompt leaves no room");

        // Two answers that differ in their last token alone are computed nearly once.
        let answers = |n: usize, same: bool| TokenizedPair {
            prompt: vec![1],
            chosen: [vec![2; n], vec![3]].concat(),
            rejected: [vec![if same { 2 } else { 4 }; n], vec![5]].concat(),
            ..pair(n)
        };
        let rows = [answers(30, true), answers(20, false)];
        let alike = case(&config, &rows, TruncationStrategy::Delete);
        assert_eq!(lines(&alike.longest_batch(99, 1)), [20]);
        // Of two that take as many tokens the first one is it, though the other might have taken more.
        let rows = [
            answers(10, false),
            TokenizedPair {
                chosen: vec![2; 20],
                rejected: [vec![2; 9], vec![7; 2]].concat(),
                ..answers(9, true)
            },
        ];
        let tokens = rows.each_ref().map(|row| pack(&[row], LossCompat::Swift).n_tokens());
        assert_eq!(tokens[0], tokens[1], "they take as many");
        let equal = case(&config, &rows, TruncationStrategy::Delete);
        assert_eq!(lines(&equal.longest_batch(99, 1)), [10]);
        let rows = [answers(30, true), answers(20, false)];
        let alike = case(&config, &rows, TruncationStrategy::Delete);
        let val = [answers(40, false)];
        assert_eq!(lines(&alike.with_val(&val).longest_batch(99, 1)), [40], "evaluation takes memory too");
    }

    #[test]
    fn layers_keep_what_there_is_room_for() {
        let gpu = DeviceChoice::elsewhere(0);
        // A layer takes 1 with its input, 2 with what attention computed, and 10 as a whole.
        let total = |keep: KeepPlan| {
            let again = keep.n_again(4) as u64;
            again * if keep.rest == Keep::Input { 1 } else { 2 } + (4 - again) * 10
        };
        let words = |memory| runs_again(keep_for_speed(&gpu, memory, 4, total), 4);
        assert_eq!(words(None), "layers run again in backward");
        assert_eq!(words(Some(11)), "layers run again in backward");
        assert_eq!(words(Some(12)), "layers run again in backward, but for attention");
        assert_eq!(words(Some(23)), "3 of 4 layers run again in backward, but for attention");
        assert_eq!(words(Some(58)), "every activation kept");
        let cpu = keep_for_speed(&DeviceChoice::Cpu, Some(1000), 4, total);
        assert_eq!(cpu, Keep::Input.into());
    }

    #[test]
    fn flags_are_what_differs() {
        let base = Setting::of(&TrainArgs { gradient_accumulation_steps: Some(16), ..TrainArgs::default() });
        let other = Setting { quantization_bit: 4, batch_size: 2, ..base.clone() };
        assert_eq!(
            other.flags(Some(&base)),
            "--quantization_bit 4 --batch_size 2 --gradient_accumulation_steps 16"
        );
        assert_eq!(base.flags(Some(&base)), "");
        assert!(
            base.flags(None)
                .starts_with("--dtype AUTO --quantization_bit 0 --quantize_lm_head false --max_length 2048")
        );
    }
}
