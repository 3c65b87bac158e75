//! The odds-ratio loss as kernels for every runtime: what `shaders/orpo_loss.wgsl` and its backward compute, by the same series.
//!
//! A cube takes a pair; its threads stride over the pair's entries.

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::cubecl::server::Handle;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use crate::ops::cube::cube_sum;
use crate::ops::orpo_loss::{MEAN_LOGP_MAX, PairSpan, SPAN_WORDS, backward_by, forward_by};

/// Threads of a pair.
const THREADS: u32 = 64;
const LN_2: f32 = std::f32::consts::LN_2;

/// `2 atanh(z) = log((1 + z) / (1 − z))` for `|z| ≤ 1/3`.
#[cube]
fn atanh_twice(z: f32) -> f32 {
    let q = z * z;
    let tail = 1.0 / 7.0 + q * (1.0 / 9.0 + q * (1.0 / 11.0 + q / 13.0));
    2.0 * z * (1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * tail)))
}

/// `(eˣ − 1) / x` for `−ln 2 < x < 0`, where `eˣ − 1` itself would cancel.
#[cube]
fn expm1_ratio(x: f32) -> f32 {
    let tail = 1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0 * (1.0 + x / 9.0)));
    1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0 * tail)))
}

/// `log(1 − eˣ)` for `x < 0`, by a series on either side of −ln 2.
#[cube]
fn log1mexp(x: f32) -> f32 {
    let u = x.exp();
    let far = -atanh_twice(u / (2.0 - u));
    let near = (-x * expm1_ratio(x)).ln();
    select(x > -LN_2, near, far)
}

/// `log σ(x)`.
#[cube]
fn log_sigmoid(x: f32) -> f32 {
    let u = (-x.abs()).exp();
    x.min(0.0) - atanh_twice(u / (2.0 + u))
}

/// A mean log-probability as the odds take it. Not by `min`, which may drop a NaN, and a NaN has to reach the loss.
#[cube]
fn held(mean_logp: f32) -> f32 {
    select(mean_logp > MEAN_LOGP_MAX, f32::new(MEAN_LOGP_MAX), mean_logp)
}

#[cube]
fn sum_between(logps: &Array<f32>, start: u32, end: u32) -> f32 {
    let mut sum = f32::new(0.0);
    let mut entry = start + UNIT_POS;
    while entry < end {
        sum += logps[entry as usize];
        entry += THREADS;
    }
    cube_sum::<Const<1>>(Vector::new(sum), THREADS)[0]
}

#[cube(launch_unchecked)]
fn forward(logps: &Array<f32>, spans: &Array<u32>, stats: &mut Array<f32>) {
    let pair = CUBE_POS;
    let at = pair * SPAN_WORDS;
    let chosen_start = spans[at + 1];
    let rejected_start = spans[at + 2];
    let end = spans[at + 3];
    let prompt = sum_between(logps, spans[at], chosen_start);
    let chosen_sum = sum_between(logps, chosen_start, rejected_start);
    let rejected_sum = sum_between(logps, rejected_start, end);
    if UNIT_POS == 0 {
        let chosen = chosen_sum / f32::cast_from(rejected_start - chosen_start);
        let rejected = rejected_sum / f32::cast_from(end - rejected_start);
        let w = held(chosen);
        let l = held(rejected);
        let log_odds = (w - l) - (log1mexp(w) - log1mexp(l));
        stats[pair * 5] = -f32::reinterpret(spans[at + 4]) * (prompt + chosen_sum);
        stats[pair * 5 + 1] = chosen;
        stats[pair * 5 + 2] = rejected;
        stats[pair * 5 + 3] = log_odds;
        stats[pair * 5 + 4] = log_sigmoid(log_odds);
    }
}

/// Also writes the entries between a pair and the one before, which are no pair's and get 0.
#[cube(launch_unchecked)]
fn backward(
    stats: &Array<f32>,
    spans: &Array<u32>,
    dlogps: &mut Array<f32>,
    beta_per_pair: f32,
    grad_scale: f32,
) {
    let pair = CUBE_POS;
    let at = pair * SPAN_WORDS;
    let start = spans[at];
    let chosen_start = spans[at + 1];
    let rejected_start = spans[at + 2];
    let end = spans[at + 3];
    let prompt = -f32::reinterpret(spans[at + 4]);
    // In log space: its parts overflow where it does not.
    let log_factor = log_sigmoid(-stats[pair * 5 + 3]);
    let by_chosen = beta_per_pair * (log_factor - log1mexp(held(stats[pair * 5 + 1]))).exp();
    let by_rejected = beta_per_pair * (log_factor - log1mexp(held(stats[pair * 5 + 2]))).exp();
    let chosen = prompt - by_chosen / f32::cast_from(rejected_start - chosen_start);
    let rejected = by_rejected / f32::cast_from(end - rejected_start);
    let mut entry = UNIT_POS;
    if pair > 0 {
        entry += spans[at - SPAN_WORDS + 3];
    }
    while entry < end {
        let of_prompt = select(entry < start, f32::new(0.0), prompt);
        let of_chosen = select(entry < chosen_start, of_prompt, chosen);
        let dlogp = select(entry < rejected_start, of_chosen, rejected);
        dlogps[entry as usize] = dlogp * grad_scale;
        entry += THREADS;
    }
}

/// Launches forward: `[entries] -> [pairs, 5]`.
pub(super) fn launch_forward<R: CubeRuntime>(logps: CubeTensor<R>, pairs: &[PairSpan]) -> CubeTensor<R> {
    forward_by(logps, pairs, |logps, spans, stats| {
        #[expect(unsafe_code, reason = "a checked launch counts every turn of loops that are known to end")]
        // SAFETY: the spans are in order and end within the entries.
        unsafe {
            forward::launch_unchecked::<R>(
                &logps.client,
                CubeCount::Static(pairs.len() as u32, 1, 1),
                CubeDim::new_1d(THREADS),
                logps.clone().into_array_arg(),
                words(spans, pairs),
                stats.clone().into_array_arg(),
            );
        }
    })
}

/// Launches backward: `[pairs, 5] -> [entries]`.
pub(super) fn launch_backward<R: CubeRuntime>(
    stats: CubeTensor<R>,
    pairs: &[PairSpan],
    beta: f32,
    grad_scale: f32,
) -> CubeTensor<R> {
    backward_by(stats, pairs, |stats, spans, dlogps| {
        #[expect(unsafe_code, reason = "a checked launch counts every turn of loops that are known to end")]
        // SAFETY: the spans are in order, and there are as many entries as the last one ends at.
        unsafe {
            backward::launch_unchecked::<R>(
                &stats.client,
                CubeCount::Static(pairs.len() as u32, 1, 1),
                CubeDim::new_1d(THREADS),
                stats.clone().into_array_arg(),
                words(spans, pairs),
                dlogps.clone().into_array_arg(),
                beta / pairs.len() as f32,
                grad_scale,
            );
        }
    })
}

fn words<R: CubeRuntime>(handle: Handle, pairs: &[PairSpan]) -> ArrayArg<R> {
    #[expect(unsafe_code, reason = "an array of plain integers has no other constructor")]
    // SAFETY: the buffer was made of these spans.
    unsafe {
        ArrayArg::from_raw_parts(handle, pairs.len() * SPAN_WORDS)
    }
}
