//! Other settings than the chosen ones: one thing changed in each, and the nearest that fit the device.

use super::budget::{Budget, Case, Setting};
use super::precision;
use crate::error::Result;

/// The settings that differ from these in one thing each, which may be two flags (a batch and its accumulation, the layers' bits and the
/// head's), those whose prediction there is and that keep half of the rows. A run that is resumed keeps its batches and its rows.
///
/// # Errors
/// If the chosen settings are none that the device takes.
pub fn alternatives(case: &Case<'_>, base: &Setting, resumes: bool) -> Result<Vec<(Setting, Budget)>> {
    let resolved =
        precision::resolve(case.choice, &base.dtype, base.quantization_bit, base.quantize_lm_head)?;
    let mut settings = Vec::new();
    for dtype in ["fp16", "fp32"].into_iter().filter(|name| *name != resolved.dtype_name()) {
        settings.push(Setting { dtype: dtype.to_owned(), ..base.clone() });
    }
    for (bits, head) in [(0, false), (8, false), (8, true), (4, false), (4, true)] {
        let other = Setting { quantization_bit: bits, quantize_lm_head: head, ..base.clone() };
        settings.extend((other != *base).then_some(other));
    }
    if !resumes {
        let half = case.longest_row(base.max_length) / 2;
        if !case.leaves_out_most(half) {
            settings.push(Setting { max_length: half, ..base.clone() });
        }
        settings.push(with_batch(base, 1));
    }
    settings.push(Setting { gradient_checkpointing: !base.gradient_checkpointing, ..base.clone() });
    let mut predicted = Vec::new();
    for setting in settings.into_iter().filter(|setting| setting != base) {
        predicted.extend(case.predict(&setting)?.map(|budget| (setting, budget)));
    }
    Ok(predicted)
}

/// The settings with another micro-batch and the accumulation that keeps a step's pairs, rounded up.
fn with_batch(base: &Setting, batch_size: usize) -> Setting {
    let pairs = base.batch_size * base.gradient_accumulation_steps;
    Setting { batch_size, gradient_accumulation_steps: pairs.div_ceil(batch_size), ..base.clone() }
}

/// What [`nearest`] found.
#[derive(Debug, Clone)]
pub struct Nearest {
    /// The settings.
    pub setting: Setting,
    /// Their prediction.
    pub budget: Budget,
    /// Whether they fit; if not, they take the least that there is.
    pub fits: bool,
}

/// Looks for the settings nearest to `base` that fit.
///
/// Changes are made in the order of what they cost, each on top of those before: time alone (layers run again in backward, smaller
/// micro-batches with as many pairs a step), then precision (fp16, int8, NF4, an int8 head), then data (a shorter `--max_length` that
/// keeps half of the rows). Once all of them together fit, those that turn out not to be needed are taken back, the dearest first. A run
/// that is resumed keeps its batches and its rows.
///
/// # Errors
/// If `base` is nothing that the device takes.
pub fn nearest(case: &Case<'_>, base: &Setting, resumes: bool) -> Result<Option<Nearest>> {
    let mut best: Option<Nearest> = None;
    // Whether these fit; the smallest of all is remembered for the case that none does.
    let mut tries = |setting: &Setting| -> Result<bool> {
        let Some(budget) = case.predict(setting)? else { return Ok(false) };
        let fits = case.fits(&budget);
        let is_smaller =
            best.as_ref().is_none_or(|best| !best.fits && budget.memory.total() < best.budget.memory.total());
        if fits || is_smaller {
            best = Some(Nearest { setting: setting.clone(), budget, fits });
        }
        Ok(fits)
    };
    let mut setting = base.clone();
    let mut found = tries(&setting)?;
    for change in changes(case, base, resumes)? {
        if found {
            break;
        }
        change(&mut setting);
        found = tries(&setting)?;
    }
    if !found && !resumes {
        found = shorten(case, &mut setting, &mut tries)?;
    }
    if found {
        type Undo = fn(&mut Setting, &Setting);
        let undo: [Undo; 5] = [
            |s, base| s.quantize_lm_head = base.quantize_lm_head,
            |s, base| {
                (s.quantization_bit, s.quantize_lm_head) = (base.quantization_bit, base.quantize_lm_head);
            },
            |s, base| s.dtype.clone_from(&base.dtype),
            |s, base| {
                s.batch_size = base.batch_size;
                s.gradient_accumulation_steps = base.gradient_accumulation_steps;
            },
            |s, base| s.gradient_checkpointing = base.gradient_checkpointing,
        ];
        for undo in undo {
            let mut without = setting.clone();
            undo(&mut without, base);
            if without != setting && tries(&without)? {
                setting = without;
            }
        }
    }
    Ok(best)
}

type Change = Box<dyn Fn(&mut Setting)>;

/// What can be changed but for the length, cheapest first.
fn changes(case: &Case<'_>, base: &Setting, resumes: bool) -> Result<Vec<Change>> {
    let mut changes: Vec<Change> = Vec::new();
    if !base.gradient_checkpointing {
        changes.push(Box::new(|s| s.gradient_checkpointing = true));
    }
    if !resumes {
        let divisors = (1..base.batch_size).rev().filter(|n| base.batch_size.is_multiple_of(*n));
        changes.extend(divisors.map(|n| -> Change { Box::new(move |s| *s = with_batch(s, n)) }));
    }
    let resolved =
        precision::resolve(case.choice, &base.dtype, base.quantization_bit, base.quantize_lm_head)?;
    if resolved.dtype_name() == "fp32" {
        changes.push(Box::new(|s| s.dtype = "fp16".to_owned()));
    }
    for bits in [8, 4].into_iter().filter(|bits| base.quantization_bit == 0 || *bits < base.quantization_bit)
    {
        changes.push(Box::new(move |s| s.quantization_bit = bits));
    }
    if !base.quantize_lm_head {
        changes.push(Box::new(|s| s.quantize_lm_head = true));
    }
    Ok(changes)
}

/// Finds the largest `--max_length` that fits and keeps half of the rows, in steps of 64 tokens (of 8 where rows are short).
fn shorten(
    case: &Case<'_>,
    setting: &mut Setting,
    tries: &mut impl FnMut(&Setting) -> Result<bool>,
) -> Result<bool> {
    let longest = case.longest_row(setting.max_length);
    let step = if longest > 256 { 64 } else { 8 };
    // Lengths up to `fits` steps fit or leave out too many rows, those from `fails` steps on do not.
    let (mut fits, mut fails, mut found) = (0, longest.div_ceil(step), None);
    while fails - fits > 1 {
        let middle = fits.midpoint(fails);
        let shorter = Setting { max_length: middle * step, ..setting.clone() };
        if case.leaves_out_most(shorter.max_length) {
            fits = middle;
        } else if tries(&shorter)? {
            (fits, found) = (middle, Some(shorter));
        } else {
            fails = middle;
        }
    }
    match found {
        Some(shorter) => {
            *setting = shorter;
            Ok(true)
        }
        None => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::advice::{advice, check_fits};
    use crate::cli::budget::Rows;
    use crate::cli::budget::tests::pair;
    use crate::config::{ByteSize, TrainArgs};
    use crate::device::DeviceChoice;
    use crate::model::LlamaConfig;
    use crate::model::presets::preset;

    fn llama() -> LlamaConfig {
        preset("llama3-8b-instruct").unwrap()
    }

    /// What is found for Llama-3-8B on a GPU of so many GB, as flags over those chosen.
    fn found(gigabytes: u64, resumes: bool, edit: fn(&mut TrainArgs)) -> (String, bool) {
        let choice = DeviceChoice::elsewhere(gigabytes * 1_000_000_000);
        let mut args = TrainArgs { gradient_accumulation_steps: Some(16), ..TrainArgs::default() };
        edit(&mut args);
        let config = llama();
        let case = Case::new(&args, &config, [args.lora_rank; 7], Rows::Longest, &choice).unwrap();
        let base = Setting::of(&args);
        let nearest = nearest(&case, &base, resumes).unwrap().unwrap();
        assert_eq!(nearest.fits, case.fits(&nearest.budget));
        assert_eq!(case.predict(&nearest.setting).unwrap().unwrap().memory, nearest.budget.memory);
        (nearest.setting.flags(Some(&base)), nearest.fits)
    }

    #[test]
    fn what_costs_least_comes_first_and_nothing_comes_in_vain() {
        type Edit = fn(&mut TrainArgs);
        let cases: [(u64, Edit, &str); 6] = [
            (80, |_| {}, ""),
            (16, |_| {}, "--quantization_bit 8"),
            (12, |_| {}, "--quantization_bit 4"),
            (36, |a| a.gradient_checkpointing = false, "--gradient_checkpointing true"),
            (40, |a| a.batch_size = 12, "--batch_size 6 --gradient_accumulation_steps 32"),
            (32, |a| a.dtype = "fp32".to_owned(), "--dtype fp16"),
        ];
        for (gigabytes, edit, flags) in cases {
            assert_eq!(found(gigabytes, false, edit), (flags.to_owned(), true), "{gigabytes} GB");
        }
    }

    #[test]
    fn rows_are_shortened_last_and_no_more_than_needed() {
        let (flags, fits) = found(8, false, |_| {});
        assert!(fits && flags.contains("--quantization_bit 4"), "{flags}");
        let max_length: usize = flags.split("--max_length ").nth(1).unwrap().parse().unwrap();
        assert!(max_length >= 256 && max_length.is_multiple_of(64), "{flags}");
        // Another 64 tokens are too many.
        let choice = DeviceChoice::elsewhere(8_000_000_000);
        let args = TrainArgs { gradient_accumulation_steps: Some(16), ..TrainArgs::default() };
        let config = llama();
        let case = Case::new(&args, &config, [8; 7], Rows::Longest, &choice).unwrap();
        let head = flags.contains("--quantize_lm_head true");
        let longer = Setting {
            quantization_bit: 4,
            quantize_lm_head: head,
            max_length: max_length + 64,
            ..Setting::of(&args)
        };
        assert!(!case.fits(&case.predict(&longer).unwrap().unwrap()), "{flags}");
    }

    #[test]
    fn a_shorter_length_keeps_half_of_the_rows() {
        // Enough for 400 tokens, too little for 4000.
        let choice = DeviceChoice::elsewhere(6_500_000_000);
        let args =
            TrainArgs { gradient_accumulation_steps: Some(16), max_length: 4096, ..TrainArgs::default() };
        let (config, base) = (llama(), Setting::of(&args));
        let told = |n_long: usize, n_short: usize| {
            let rows = [vec![pair(4000); n_long], vec![pair(400); n_short]].concat();
            let case = Case::new(&args, &config, [8; 7], Rows::Known(&rows), &choice).unwrap();
            let others = alternatives(&case, &base, false).unwrap();
            let is_shortened = others.iter().any(|(other, _)| other.max_length < base.max_length);
            (advice(&case, &base, &nearest(&case, &base, false).unwrap().unwrap()), is_shortened)
        };
        let (half, is_shortened) = told(5, 5);
        assert!(half.contains("--max_length 3968 fits, with "), "{half}");
        assert!(half.ends_with(" (leaves out 5 of 10 rows)") && is_shortened, "{half}");
        let (most, is_shortened) = told(6, 5);
        let says = "no settings that keep half of the rows fit: --quantization_bit 4 --quantize_lm_head true takes the least, ";
        assert!(most.starts_with(says) && !is_shortened, "{most}");
    }

    #[test]
    fn a_resumed_run_keeps_its_batches_and_rows() {
        let (flags, fits) = found(40, true, |a| a.batch_size = 12);
        assert!(!flags.contains("batch_size") && !flags.contains("max_length"), "{flags} {fits}");
    }

    #[test]
    fn where_nothing_fits_the_least_is_named() {
        let (flags, fits) = found(2, false, |_| {});
        assert!(
            !fits && flags.contains("--quantization_bit 4 --quantize_lm_head true --max_length 64"),
            "{flags}"
        );
        let choice = DeviceChoice::elsewhere(2_000_000_000);
        let (args, config) = (TrainArgs::default(), llama());
        let case = Case::new(&args, &config, [8; 7], Rows::Longest, &choice).unwrap();
        let base = Setting::of(&args);
        let budget = case.predict(&base).unwrap().unwrap();
        let error = check_fits(&case, &base, &budget, false).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.hint().unwrap().contains("no settings fit"), "{:?}", error.hint());
    }

    #[test]
    fn adapters_on_few_modules_take_little() {
        let choice = DeviceChoice::elsewhere(24_000_000_000);
        let (args, config) = (TrainArgs::default(), llama());
        let adapters = |modules: &[&str]| {
            let modules: Vec<String> = modules.iter().map(|m| (*m).to_owned()).collect();
            let ranks = crate::lora::ranks(256, &modules);
            let case = Case::new(&args, &config, ranks, Rows::Longest, &choice).unwrap();
            case.predict(&Setting::of(&args)).unwrap().unwrap().memory.adapters
        };
        // q_proj: 4096 + 4096, v_proj: 4096 + 1024; four tensors of f32 of each.
        assert_eq!(adapters(&["q_proj", "v_proj"]), 4 * 4 * 32 * 256 * (8192 + 5120));
        assert_eq!(adapters(&["v_proj"]), 4 * 4 * 32 * 256 * 5120);
    }

    #[test]
    fn alternatives_differ_in_one_thing() {
        let choice = DeviceChoice::elsewhere(24_000_000_000);
        let args = TrainArgs {
            batch_size: 4,
            gradient_accumulation_steps: Some(4),
            max_memory: Some(ByteSize(16_000_000_000)),
            ..TrainArgs::default()
        };
        let config = llama();
        let case = Case::new(&args, &config, [8; 7], Rows::Longest, &choice).unwrap();
        assert_eq!(case.memory, Some(16_000_000_000), "the flag goes over the device");
        let base = Setting::of(&args);
        let flags: Vec<_> =
            alternatives(&case, &base, false).unwrap().iter().map(|(s, _)| s.flags(Some(&base))).collect();
        assert_eq!(
            flags,
            [
                "--dtype fp32",
                "--quantization_bit 8",
                "--quantization_bit 8 --quantize_lm_head true",
                "--quantization_bit 4",
                "--quantization_bit 4 --quantize_lm_head true",
                "--max_length 1024",
                "--batch_size 1 --gradient_accumulation_steps 16",
                "--gradient_checkpointing false",
            ]
        );
    }
}
