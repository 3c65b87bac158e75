//! The ORPO loss over token log-probabilities (arXiv:2403.07691, eq. 6 and 7; TRL's `ORPOTrainer.odds_ratio_loss`).
//!
//! For a pair with mean response log-probabilities `ℓw` (chosen) and `ℓl` (rejected), in nats a token:
//!
//! ```text
//! log_odds       = (ℓw − ℓl) − (log1mexp(ℓw) − log1mexp(ℓl))        log1mexp(x) = log(1 − eˣ)
//! log_odds_ratio = log σ(log_odds)
//! loss           = nll − beta · mean over pairs of log_odds_ratio
//! ```
//!
//! `beta` is the paper's λ and its authors' `alpha`. Which tokens enter `nll`, and how they are averaged, is where trainers
//! differ: a [`PairSpan`] carries the range and the weight, so the op serves every form.
//!
//! Gradients, by token: a chosen response token gets `−β/pairs · exp(log σ(−log_odds) − log1mexp(ℓw)) / n_chosen`, a rejected
//! one `+β/pairs · exp(log σ(−log_odds) − log1mexp(ℓl)) / n_rejected`, and every NLL token `−nll_weight`. The factor is taken
//! in log space because its parts over- and underflow where it does not. A mean log-probability above [`MEAN_LOGP_MAX`]
//! (a memorised answer) counts as that, which keeps the odds finite. Everything is `f32`.

use burn::cubecl::server::Handle;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::cube::{bytes, empty};
use super::{Kernels, profile};

/// The largest mean log-probability whose odds are taken as they are, in nats; `odds(−1e-8) = 1e8`.
pub const MEAN_LOGP_MAX: f32 = -1e-8;

/// Where one pair's scored tokens lie among a batch's entries, and what they weigh in the NLL.
///
/// `[nll_start, chosen_start)` are prompt tokens (empty unless the prompt counts), `[chosen_start, rejected_start)` the chosen
/// response and `[rejected_start, end)` the rejected one. The NLL runs over `[nll_start, rejected_start)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairSpan {
    /// First entry of the pair.
    pub nll_start: u32,
    /// First entry of the chosen response.
    pub chosen_start: u32,
    /// First entry of the rejected response.
    pub rejected_start: u32,
    /// One past the pair's last entry.
    pub end: u32,
    /// What one NLL token weighs: `1 / tokens` for a token mean over the batch.
    pub nll_weight: f32,
}

/// The loss of a batch and, by pair, what it is made of.
#[derive(Debug, Clone)]
pub struct OrpoLoss<B: Backend> {
    /// `[pairs, 5]`: weighted NLL, `ℓw`, `ℓl`, `log_odds`, `log_odds_ratio`. Column 0 sums to the batch's NLL.
    pub stats: Tensor<B, 2>,
}

/// Computes the loss's parts from the token log-probabilities.
///
/// # Shapes
/// - `logps`: `[entries]`, log-probabilities in nats   - `pairs`: one span a pair, in order
///
/// # Panics
/// If a span is empty on either side or runs past `logps`.
pub fn orpo_loss<B: Kernels>(logps: Tensor<B, 1>, pairs: &[PairSpan]) -> OrpoLoss<B> {
    check_spans(logps.dims()[0], pairs);
    OrpoLoss { stats: B::orpo_loss_forward(logps, pairs) }
}

/// Computes `grad_scale · ∂loss/∂logps`, `[entries]`.
///
/// `grad_scale` carries what the caller multiplies the loss with: one over the accumulation steps, a loss scale.
pub fn orpo_loss_backward<B: Kernels>(
    loss: &OrpoLoss<B>,
    pairs: &[PairSpan],
    beta: f32,
    grad_scale: f32,
) -> Tensor<B, 1> {
    B::orpo_loss_backward(loss.stats.clone(), pairs, beta, grad_scale)
}

fn check_spans(n_entries: usize, pairs: &[PairSpan]) {
    for span in pairs {
        assert!(
            span.nll_start <= span.chosen_start
                && span.chosen_start < span.rejected_start
                && span.rejected_start < span.end
                && span.end as usize <= n_entries,
            "orpo_loss: {span:?} does not fit {n_entries} entries"
        );
    }
}

/// Words of a span as the kernels have it.
pub(super) const SPAN_WORDS: usize = 8;

/// The kernels hold no index against the number of entries: the spans have to be in order, and the last within it.
fn check_order(pairs: &[PairSpan], n_entries: usize) {
    let ends = pairs.iter().flat_map(|p| [p.nll_start, p.chosen_start, p.rejected_start, p.end]);
    assert!(
        ends.clone().is_sorted() && ends.last().is_some_and(|end| end as usize <= n_entries),
        "orpo_loss: spans out of order or past {n_entries} entries: {pairs:?}"
    );
}

/// A pair's span as the kernels have it.
fn span_words(pairs: &[PairSpan]) -> Vec<[u32; SPAN_WORDS]> {
    pairs
        .iter()
        .map(|p| [p.nll_start, p.chosen_start, p.rejected_start, p.end, p.nll_weight.to_bits(), 0, 0, 0])
        .collect()
}

/// The statistics, `[pairs, 5]`, of a kernel that `launch` launches with the log-probabilities, the spans' words and its output.
pub(super) fn forward_by<R: CubeRuntime>(
    logps: CubeTensor<R>,
    pairs: &[PairSpan],
    launch: impl FnOnce(&CubeTensor<R>, Handle, &CubeTensor<R>) + Send,
) -> CubeTensor<R> {
    let n_entries = logps.meta.shape()[0];
    let stats = empty(&logps, [pairs.len(), 5], DType::F32);
    launched("orpo_loss forward", n_entries, &logps, pairs, stats, launch)
}

/// The derivative by every entry, `[entries]`, of a kernel that `launch` launches with the statistics, the spans' words and its output.
pub(super) fn backward_by<R: CubeRuntime>(
    stats: CubeTensor<R>,
    pairs: &[PairSpan],
    launch: impl FnOnce(&CubeTensor<R>, Handle, &CubeTensor<R>) + Send,
) -> CubeTensor<R> {
    let n_entries = pairs.last().map_or(0, |span| span.end as usize);
    let dlogps = empty(&stats, [n_entries], DType::F32);
    launched("orpo_loss backward", n_entries, &stats, pairs, dlogps, launch)
}

fn launched<R: CubeRuntime>(
    name: &'static str,
    n_entries: usize,
    input: &CubeTensor<R>,
    pairs: &[PairSpan],
    output: CubeTensor<R>,
    launch: impl FnOnce(&CubeTensor<R>, Handle, &CubeTensor<R>) + Send,
) -> CubeTensor<R> {
    check_order(pairs, n_entries);
    let spans = input.client.create_from_slice(bytemuck::cast_slice(&span_words(pairs)));
    let moved = bytes(&[input, &output]);
    profile::kernel(name, n_entries, moved, &input.client, || launch(input, spans, &output));
    output
}

/// `log(1 − eˣ)` for `x < 0`, in plain burn tensors, with the switch at −ln 2 (cran.r-project.org/package=Rmpfr, log1mexp-note).
///
/// `1 − eˣ = −2t / (1 − t)` with `t = tanh(x / 2)` serves the near side, as burn has no `expm1`. Each branch sees only arguments of
/// its own side, so that autodiff never multiplies an infinity by a masked zero.
pub fn log1mexp<B: Backend>(x: Tensor<B, 1>) -> Tensor<B, 1> {
    let switch = -std::f32::consts::LN_2;
    let is_near = x.clone().greater_elem(switch);
    let t = x.clone().clamp_min(switch).div_scalar(2.0).tanh();
    let near = (t.clone() * -2.0 / (-t + 1.0)).log();
    let far = (-x.clamp_max(switch).exp()).log1p();
    far.mask_where(is_near, near)
}

/// `log σ(x)`, in plain burn tensors.
fn log_sigmoid<B: Backend>(x: Tensor<B, 1>) -> Tensor<B, 1> {
    x.clone().clamp_max(0.0) - (-x.abs()).exp().log1p()
}

/// [`Kernels::orpo_loss_forward`] in plain burn tensors. Differentiable by burn's own autodiff.
pub fn orpo_loss_reference<B: Backend>(logps: Tensor<B, 1>, pairs: &[PairSpan]) -> Tensor<B, 2> {
    let part = |start: u32, end: u32| logps.clone().slice(start as usize..end as usize);
    let columns = |f: &dyn Fn(&PairSpan) -> Tensor<B, 1>| Tensor::cat(pairs.iter().map(f).collect(), 0);
    let nll = columns(&|p| part(p.nll_start, p.rejected_start).sum() * -p.nll_weight);
    let chosen = columns(&|p| part(p.chosen_start, p.rejected_start).mean());
    let rejected = columns(&|p| part(p.rejected_start, p.end).mean());
    let (w, l) = (chosen.clone().clamp_max(MEAN_LOGP_MAX), rejected.clone().clamp_max(MEAN_LOGP_MAX));
    let log_odds = w.clone() - l.clone() - (log1mexp(w) - log1mexp(l));
    let log_odds_ratio = log_sigmoid(log_odds.clone());
    Tensor::stack(vec![nll, chosen, rejected, log_odds, log_odds_ratio], 1)
}

/// [`Kernels::orpo_loss_backward`] in plain burn tensors.
pub fn orpo_loss_backward_reference<B: Backend>(
    stats: Tensor<B, 2>,
    pairs: &[PairSpan],
    beta: f32,
    grad_scale: f32,
) -> Tensor<B, 1> {
    let device = stats.device();
    let column = |i: usize| stats.clone().slice([0..pairs.len(), i..i + 1]).squeeze_dim::<1>(1);
    let log_sigmoid_neg = log_sigmoid(-column(3));
    let factor = |logp: Tensor<B, 1>| {
        (log_sigmoid_neg.clone() - log1mexp(logp.clamp_max(MEAN_LOGP_MAX))).exp()
            * (beta / pairs.len() as f32)
    };
    let (chosen, rejected) = (-factor(column(1)), factor(column(2)));

    let n_entries = pairs.last().map_or(0, |span| span.end as usize);
    // One column a pair would be mostly zeros; an entry belongs to one pair, so its pair's index gathers the factors.
    let mut pair_of = vec![0i32; n_entries];
    let (mut per_chosen, mut per_rejected) = (vec![0f32; n_entries], vec![0f32; n_entries]);
    let mut nll = vec![0f32; n_entries];
    for (pair, span) in pairs.iter().enumerate() {
        let [start, c, r, end] =
            [span.nll_start, span.chosen_start, span.rejected_start, span.end].map(|i| i as usize);
        pair_of[start..end].fill(pair as i32);
        per_chosen[c..r].fill(1.0 / (r - c) as f32);
        per_rejected[r..end].fill(1.0 / (end - r) as f32);
        nll[start..r].fill(-span.nll_weight);
    }
    let upload = |values: Vec<f32>| Tensor::<B, 1>::from_data(TensorData::new(values, [n_entries]), &device);
    let pair_of = Tensor::from_data(TensorData::new(pair_of, [n_entries]), &device);
    let odds = chosen.select(0, pair_of.clone()) * upload(per_chosen)
        + rejected.select(0, pair_of) * upload(per_rejected);
    (odds + upload(nll)) * grad_scale
}
