//! What a user is told about a run that does not fit: both numbers, and the flags that help.

use super::budget::{Budget, Case, Rows, Setting, USABLE};
use super::nearest::{Nearest, nearest};
use crate::config::ByteSize;
use crate::device::{DeviceChoice, size};
use crate::error::{Error, Result};

/// Refuses a run whose longest step does not fit, and says which settings do.
///
/// # Errors
/// [`Error::DoesNotFit`] if it does not.
pub fn check_fits(case: &Case<'_>, base: &Setting, budget: &Budget, resumes: bool) -> Result<()> {
    let Some(problem) = misfit(case, budget) else { return Ok(()) };
    let advice = nearest(case, base, resumes)?.map(|nearest| advice(case, base, &nearest));
    let more = "--max_memory says how much there is, where the device says too little".to_owned();
    let more = case.fits_buffers(budget).then_some(more);
    let hints: Vec<String> = advice.into_iter().chain(more).collect();
    let hint = (!hints.is_empty()).then(|| hints.join("; "));
    Err(Error::DoesNotFit { problem, hint })
}

/// In what a step does not fit the device; none if it does.
pub fn misfit(case: &Case<'_>, budget: &Budget) -> Option<String> {
    if case.fits(budget) {
        return None;
    }
    let (name, largest) = budget.largest;
    let (Some(memory), Some(usable), true) = (case.memory, case.usable(), case.fits_buffers(budget)) else {
        return Some(format!(
            "in the longest step, {} tokens, {name} take {} in one tensor, and {} ({}) takes {} in one",
            budget.tokens,
            size(largest as u64),
            case.choice,
            case.choice.describe(),
            size(case.choice.shard_bytes() as u64)
        ));
    };
    Some(format!(
        "the longest step, {} tokens, is predicted to take {} of memory on {} ({}), and a run may fill {} ({:.0} % of {})",
        budget.tokens,
        bytes(budget),
        case.choice,
        case.choice.describe(),
        size(usable),
        100.0 * USABLE,
        size(memory)
    ))
}

/// The flags that make a run fit, or that nothing does.
pub fn advice(case: &Case<'_>, base: &Setting, nearest: &Nearest) -> String {
    let Nearest { setting, budget, fits } = nearest;
    let (flags, left_out) = (setting.flags(Some(base)), case.left_out(setting.max_length));
    if *fits {
        return format!("{flags} fits, with {}{left_out}{}", bytes(budget), price(case, base, setting));
    }
    let needed = (budget.memory.total() as f64 / USABLE).ceil() as u64;
    format!(
        "no settings {}fit: {} takes the least, {}{left_out}, which needs a device of {}; a smaller model may do",
        if matches!(case.rows, Rows::Known(_)) { "that keep half of the rows " } else { "" },
        if flags.is_empty() { "this" } else { &flags },
        bytes(budget),
        size(needed)
    )
}

/// What weights in less than `f32` cost on the CPU, which makes each matrix dense for every product; nothing where they were so before.
fn price(case: &Case<'_>, base: &Setting, setting: &Setting) -> &'static str {
    let is_packed = |s: &Setting| s.dtype.eq_ignore_ascii_case("fp16") || s.quantization_bit > 0;
    match *case.choice == DeviceChoice::Cpu && is_packed(setting) && !is_packed(base) {
        true => ", and on the CPU a step of short rows takes up to three times as long as in fp32",
        false => "",
    }
}

/// The share of what did not fit that other settings are looked for in, whatever the device says of its memory.
const CLEARLY_LESS: f64 = 0.8;

/// Which flags take clearly less memory than a run that ran out of it; none if there are none.
///
/// # Errors
/// If `base` is nothing that the device takes.
pub fn smaller(case: &Case<'_>, base: &Setting, resumes: bool) -> Result<Option<String>> {
    let Some(before) = case.predict(base)? else { return Ok(None) };
    let enough = (before.memory.total() as f64 * CLEARLY_LESS / USABLE) as u64;
    // As a number that is easily typed.
    let enough = enough.next_multiple_of(if enough > 1 << 30 { 1 << 20 } else { 1 << 10 });
    let case = Case { memory: Some(case.memory.map_or(enough, |memory| memory.min(enough))), ..case.clone() };
    let Some(Nearest { setting, budget, .. }) = nearest(&case, base, resumes)? else { return Ok(None) };
    let flags = setting.flags(Some(base));
    let (less, more, enough) = (bytes(&budget), bytes(&before), ByteSize(enough));
    let (left_out, price) = (case.left_out(setting.max_length), price(&case, base, &setting));
    Ok(if !flags.is_empty() {
        Some(format!(
            "by the prediction {flags} takes {less} instead of {more}{left_out}, together with --max_memory {enough} where the device \
             says that it has more{price}; other programs may hold the rest"
        ))
    } else if budget.memory.total() < before.memory.total() {
        Some(format!(
            "by the prediction --max_memory {enough} makes it {less} instead of {more}, as more layers run again in backward; other \
             programs may hold the rest"
        ))
    } else {
        None
    })
}

fn bytes(budget: &Budget) -> String {
    size(budget.memory.total() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::budget::Rows;
    use crate::config::TrainArgs;
    use crate::model::LlamaConfig;
    use crate::model::presets::preset;

    fn llama() -> LlamaConfig {
        preset("llama3-8b-instruct").unwrap()
    }

    #[test]
    fn a_tensor_beyond_the_largest_buffer_is_refused() {
        let choice = DeviceChoice::elsewhere(400_000_000_000);
        let args = TrainArgs { batch_size: 16, max_length: 8192, ..TrainArgs::default() };
        let config = llama();
        let case = Case::new(&args, &config, [8; 7], Rows::Longest, &choice).unwrap();
        let base = Setting::of(&args);
        let budget = case.predict(&base).unwrap().unwrap();
        let error = check_fits(&case, &base, &budget, false).unwrap_err();
        assert!(error.to_string().contains("take 7.0 GiB in one tensor"), "{error}");
        assert!(error.hint().unwrap().starts_with("--batch_size 4"), "{:?}", error.hint());
    }

    #[test]
    fn a_device_that_does_not_say_takes_everything() {
        let (args, config) = (TrainArgs::default(), llama());
        let mut case = Case::new(&args, &config, [8; 7], Rows::Longest, &DeviceChoice::Cpu).unwrap();
        case.memory = None;
        let base = Setting::of(&args);
        let budget = case.predict(&base).unwrap().unwrap();
        check_fits(&case, &base, &budget, false).unwrap();
        let advice = smaller(&case, &base, false).unwrap().unwrap();
        assert!(advice.contains("--dtype fp16") && advice.contains("instead of"), "{advice}");
        assert!(
            advice.contains(", and on the CPU a step of short rows takes up to three times as long"),
            "{advice}"
        );
        case.memory = Some(budget.memory.total() as u64);
        let hint = |choice: &DeviceChoice| {
            let case = Case { choice, ..case.clone() };
            let base = Setting { dtype: "fp32".to_owned(), ..base.clone() };
            let budget = case.predict(&base).unwrap().unwrap();
            check_fits(&case, &base, &budget, false).unwrap_err().hint().unwrap().to_owned()
        };
        let on_cpu = hint(&DeviceChoice::Cpu);
        assert!(on_cpu.starts_with("--dtype fp16 fits, with "), "{on_cpu}");
        assert!(
            on_cpu.contains(", and on the CPU a step of short rows takes up to three times as long"),
            "{on_cpu}"
        );
        let on_gpu = hint(&DeviceChoice::elsewhere(0));
        assert!(on_gpu.starts_with("--dtype fp16 fits, with ") && !on_gpu.contains("CPU"), "{on_gpu}");
    }

    #[test]
    fn what_is_kept_for_speed_is_given_up_first() {
        let choice = DeviceChoice::elsewhere(80_000_000_000);
        let (args, config) = (TrainArgs::default(), llama());
        let case = Case::new(&args, &config, [8; 7], Rows::Longest, &choice).unwrap();
        let base = Setting::of(&args);
        assert_eq!(case.predict(&base).unwrap().unwrap().keep.n_again(config.num_hidden_layers), 0);
        let advice = smaller(&case, &base, false).unwrap().unwrap();
        assert!(advice.starts_with("by the prediction --max_memory "), "{advice}");
    }
}
