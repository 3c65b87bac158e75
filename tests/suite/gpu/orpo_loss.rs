//! `orpo_loss` on a GPU against the reference on the CPU and against `f64` with central differences.

use burn::tensor::{Tensor, TensorData};
use burn_flex::Flex;
use orpo_wgpu::ops::Kernels;
use orpo_wgpu::ops::orpo_loss::{MEAN_LOGP_MAX, PairSpan, orpo_loss, orpo_loss_backward};

use super::on::{Gpu, GpuDevice, adapter};
use crate::support::{Numbers, assert_close};

const BETA: f32 = 0.1;
const GRAD_SCALE: f32 = 3.0;
/// Means of up to a few hundred numbers, in another order than the reference's.
const ATOL: f32 = 1e-6;
/// An exponential of a difference of logarithms around 100 turns their last bit into 1e-5.
const RTOL: f32 = 5e-5;

/// Spans of the given lengths (prompt, chosen, rejected), one after the other, and what a token of them weighs.
fn spans(lengths: &[[u32; 3]]) -> Vec<PairSpan> {
    let mut start = 0;
    let n_nll: u32 = lengths.iter().map(|[prompt, chosen, _]| prompt + chosen).sum();
    let span = |&[prompt, chosen, rejected]: &[u32; 3]| {
        let nll_start = start;
        let chosen_start = nll_start + prompt;
        let rejected_start = chosen_start + chosen;
        start = rejected_start + rejected;
        PairSpan { nll_start, chosen_start, rejected_start, end: start, nll_weight: 1.0 / n_nll as f32 }
    };
    lengths.iter().map(span).collect()
}

/// The statistics and the gradient by the log-probabilities.
fn run<B: Kernels>(logps: &[f32], pairs: &[PairSpan], device: &B::Device) -> (Vec<f32>, Vec<f32>) {
    let logps = Tensor::<B, 1>::from_data(TensorData::new(logps.to_vec(), [logps.len()]), device);
    let loss = orpo_loss(logps, pairs);
    let dlogps = orpo_loss_backward(&loss, pairs, BETA, GRAD_SCALE);
    (loss.stats.into_data().to_vec().unwrap(), dlogps.into_data().to_vec().unwrap())
}

fn compare(logps: &[f32], pairs: &[PairSpan], device: &GpuDevice) {
    let (stats, dlogps) = run::<Gpu>(logps, pairs, device);
    let (want_stats, want_dlogps) = run::<Flex>(logps, pairs, &Default::default());
    assert_close(&stats, &want_stats, ATOL, RTOL, "stats");
    assert_close(&dlogps, &want_dlogps, ATOL, RTOL, "dlogps");
}

#[test]
fn equals_the_reference() {
    let Some(device) = adapter() else { return };
    for lengths in [
        &[[0, 1, 1]][..],
        &[[3, 5, 2]],
        &[[0, 64, 65], [7, 63, 1], [100, 1, 200]],
        &[[0, 300, 129], [33, 2, 3], [0, 1, 1], [1, 64, 64]],
    ] {
        let pairs = spans(lengths);
        let n_entries = pairs.last().unwrap().end as usize;
        let logps: Vec<_> = Numbers::new(5).vec(n_entries, 2.0).iter().map(|v| -v.abs()).collect();
        compare(&logps, &pairs, &device);
    }
}

#[test]
fn entries_of_no_pair_get_no_gradient() {
    let Some(device) = adapter() else { return };
    let mut pairs = spans(&[[2, 3, 4], [0, 70, 5]]);
    for span in &mut pairs {
        span.nll_start += 3;
        span.chosen_start += 3;
        span.rejected_start += 3;
        span.end += 3;
    }
    pairs[1].nll_start += 2;
    pairs[1].chosen_start += 4;
    let n_entries = pairs[1].end as usize;
    let logps: Vec<_> = Numbers::new(9).vec(n_entries, 1.0).iter().map(|v| -v.abs()).collect();
    compare(&logps, &pairs, &device);
}

fn log1mexp(x: f64) -> f64 {
    if x > -std::f64::consts::LN_2 { (-x.exp_m1()).ln() } else { (-x.exp()).ln_1p() }
}

fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// `log_odds` and `log_odds_ratio` of one pair.
fn odds(chosen: f64, rejected: f64) -> [f64; 2] {
    let [w, l] = [chosen, rejected].map(|x| x.min(f64::from(MEAN_LOGP_MAX)));
    let log_odds = (w - l) - (log1mexp(w) - log1mexp(l));
    [log_odds, log_sigmoid(log_odds)]
}

/// `∂ −beta · log_odds_ratio` by both means, by central differences.
fn odds_gradient(chosen: f64, rejected: f64) -> [f64; 2] {
    let loss = |w: f64, l: f64| -f64::from(BETA) * odds(w, l)[1];
    // A relative step stays on its side of zero and of the largest mean that counts.
    let difference = |x: f64, f: &dyn Fn(f64) -> f64| {
        let h = x.abs() * 1e-6;
        (f(x + h) - f(x - h)) / (2.0 * h)
    };
    [difference(chosen, &|w| loss(w, rejected)), difference(rejected, &|l| loss(chosen, l))]
}

#[test]
fn equals_f64_from_a_memorised_answer_to_a_hopeless_one() {
    if let Some(device) = adapter() {
        check_f64::<Gpu>(&device);
    }
}

#[test]
fn the_reference_equals_f64_from_a_memorised_answer_to_a_hopeless_one() {
    check_f64::<Flex>(&Default::default());
}

fn check_f64<B: Kernels>(device: &B::Device) {
    // Means as exact f32 values; the largest that counts is met from below.
    let means: Vec<f32> = [
        1.001e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 0.5, 0.69, 0.692, 0.694, 0.7, 1.0, 2.0, 5.0,
        10.0, 20.0, 40.0, 80.0, 100.0,
    ]
    .iter()
    .map(|x: &f32| -x)
    .collect();
    for &chosen in &means {
        let lengths = vec![[0, 1, 1]; means.len()];
        let pairs = spans(&lengths);
        let logps: Vec<_> = means.iter().flat_map(|&rejected| [chosen, rejected]).collect();
        let (stats, dlogps) = run::<B>(&logps, &pairs, device);
        assert!(stats.iter().chain(&dlogps).all(|v| v.is_finite()), "{chosen}: a value is not finite");
        for (i, &rejected) in means.iter().enumerate() {
            let (w, l) = (f64::from(chosen), f64::from(rejected));
            let [log_odds, log_odds_ratio] = odds(w, l);
            let want =
                [-w * f64::from(pairs[i].nll_weight), w, l, log_odds, log_odds_ratio].map(|v| v as f32);
            assert_close(
                &stats[5 * i..5 * i + 5],
                &want,
                ATOL,
                RTOL,
                &format!("stats of {chosen} against {rejected}"),
            );
            // f32 cannot tell from zero what its own exponential rounds to it, nor can differences of f64 much earlier.
            let [dw, dl] = odds_gradient(w, l).map(|d| d / means.len() as f64);
            let scale = f64::from(GRAD_SCALE);
            let want = [(dw - f64::from(pairs[i].nll_weight)) * scale, dl * scale].map(|v| v as f32);
            assert_close(
                &dlogps[2 * i..2 * i + 2],
                &want,
                1e-7,
                1e-4,
                &format!("dlogps of {chosen} against {rejected}"),
            );
        }
    }
}

#[test]
fn a_mean_above_the_largest_counts_as_that() {
    let Some(device) = adapter() else { return };
    let pairs = spans(&[[0, 1, 1], [0, 1, 1]]);
    let (stats, dlogps) = run::<Gpu>(&[0.0, -1.0, -1.0, 0.0], &pairs, &device);
    assert!(stats.iter().chain(&dlogps).all(|v| v.is_finite()), "{stats:?} {dlogps:?}");
    compare(&[0.0, -1.0, -1.0, 0.0], &pairs, &device);
}

#[test]
fn a_nan_reaches_the_loss() {
    let Some(device) = adapter() else { return };
    let pairs = spans(&[[0, 2, 2], [0, 2, 2]]);
    let logps = [-1.0, -1.0, -1.0, f32::NAN, -1.0, -1.0, -1.0, -1.0];
    let (stats, _) = run::<Gpu>(&logps, &pairs, &device);
    assert!(stats[2].is_nan() && stats[3].is_nan() && stats[4].is_nan(), "{stats:?}");
    assert!(stats[5..].iter().all(|v| v.is_finite()), "{stats:?}");
}
