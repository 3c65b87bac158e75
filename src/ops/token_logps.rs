//! The head: `lm_head`, log-softmax and gather over the rows that are scored, in chunks.
//!
//! `[tokens, vocab]` never exists: the softmax is taken shard by shard of the vocabulary and merged (arXiv:1805.02867). A token's
//! log-probability is `z[target] − logsumexp(z)` with `z = W h`, and its derivative by `h`, `W[target] − Wᵀ softmax(z)`, does not
//! depend on what the loss later weighs it with. So one pass over the chunks computes both the log-probabilities and
//! `Wᵀ softmax(z)` of every row, and [`token_logps_backward`] applies the weights: two products with the head a row, no second
//! forward. The weight is `f32`, `f16` or `bf16`; hidden states, logits and log-sum-exp are `f32`, and softmax is too until it is
//! multiplied by a weight of 16 bits, for which it is rounded to the same.

mod entries;
mod fused;
mod kernel;
mod reference;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use super::Kernels;
use super::lora_linear::lora_linear;
use super::quantize::Weight;

pub(super) use fused::{backward as backward_fused, forward as forward_fused};
pub use reference::{token_logps_backward_reference, token_logps_reference};

/// One scored token: a target for a row of the hidden states. A row may have more than one target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoredToken {
    /// Index into the hidden states' rows.
    pub row_idx: u32,
    /// The token id whose log-probability is asked for.
    pub target: u32,
}

/// The head's weight `[vocab, hidden]`, in shards of rows: each fits the device's largest binding, and a chunk's logits the cache.
#[derive(Debug, Clone)]
pub struct Head<B: Backend> {
    /// Consecutive rows of the matrix, `[rows, hidden]` each, in one dtype.
    pub shards: Vec<Weight<B>>,
    /// The most bytes that a chunk's logits may take.
    pub chunk_bytes: usize,
}

/// Log-probabilities of the entries and what backward needs.
#[derive(Debug, Clone)]
pub struct TokenLogps<B: Backend> {
    /// `[entries]`, nats.
    pub logps: Tensor<B, 1>,
    /// There when [`Expected::Keep`] was asked for.
    pub expected: Option<ExpectedRows<B>>,
    /// The most bytes in tensors on the device while logits were there, where it tells.
    pub peak_bytes: Option<u64>,
}

/// `Wᵀ softmax(W h)` by row, `weighted / sum`: backward divides, in the pass that it makes anyway.
#[derive(Debug, Clone)]
pub struct ExpectedRows<B: Backend> {
    /// `Wᵀ exp(z − max)`, up to a factor that `sum` has too, `[rows, hidden]`.
    pub weighted: Tensor<B, 2>,
    /// `Σ exp(z − max)`, `[rows]`.
    pub sum: Tensor<B, 1>,
}

/// Whether [`token_logps`] also prepares backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// Training: keep `Wᵀ softmax(W h)`.
    Keep,
    /// Evaluation: log-probabilities alone.
    Skip,
}

impl<B: Backend> Head<B> {
    /// Number of tokens in the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.shards.iter().map(|shard| shard.dims()[0]).sum()
    }

    /// Computes the logits of a few rows, `[rows, hidden] -> [rows, vocab]`; for generation, not for training.
    pub fn logits(&self, hidden: Tensor<B, 2>) -> Tensor<B, 2>
    where
        B: Kernels,
    {
        let logits = |shard: &Weight<B>| lora_linear(hidden.clone(), shard.to_dense(), None, None);
        Tensor::cat(self.shards.iter().map(logits).collect(), 1)
    }

    /// The first token id of every shard.
    fn first_ids(&self) -> Vec<usize> {
        let lengths = self.shards.iter().map(|shard| shard.dims()[0]);
        lengths.scan(0, |first, n| Some(std::mem::replace(first, *first + n))).collect()
    }
}

impl<B: Backend> Head<B> {
    /// See [`logits_bytes`], for `n_rows` rows.
    pub fn logits_bytes(&self, n_rows: usize) -> usize {
        let longest = self.shards.iter().max_by_key(|shard| shard.dims()[0]);
        let bytes =
            |shard: &Weight<B>| logits_bytes(shard.dims()[0], self.chunk_bytes, shard.dtype(), n_rows);
        longest.map_or(0, bytes)
    }
}

/// The most bytes that a chunk's logits of `n_rows` rows take, of shards of at most `shard_rows` tokens in `dtype`: beside the logits
/// their exponentials, where they are stored in another type.
pub fn logits_bytes(shard_rows: usize, chunk_bytes: usize, dtype: DType, n_rows: usize) -> usize {
    let exponentials = if dtype == DType::F32 { 0 } else { dtype.size() };
    let per_logit = size_of::<f32>() + exponentials;
    rows_of_chunk(shard_rows, chunk_bytes, n_rows) * shard_rows * per_logit
}

/// How many rows' logits for the longest shard take at most the bytes that a chunk may.
fn chunk_rows<B: Backend>(head: &Head<B>, n_rows: usize) -> usize {
    let shard_rows = head.shards.iter().map(|shard| shard.dims()[0]).max().unwrap_or(1);
    rows_of_chunk(shard_rows, head.chunk_bytes, n_rows)
}

fn rows_of_chunk(shard_rows: usize, chunk_bytes: usize, n_rows: usize) -> usize {
    (chunk_bytes / (shard_rows * size_of::<f32>())).clamp(1, n_rows)
}

/// Computes the log-probabilities of the scored tokens.
///
/// # Shapes
/// - `hidden`: `[rows, hidden]`, only rows that are scored   - `scored`: entries, sorted or not
///
/// # Panics
/// If nothing is scored, or a row index or a target is out of range.
pub fn token_logps<B: Kernels>(
    hidden: Tensor<B, 2>,
    head: &Head<B>,
    scored: &[ScoredToken],
    expected: Expected,
) -> TokenLogps<B> {
    let n_hidden = hidden.dims()[1];
    let fits = |shard: &Weight<B>| shard.dims()[1] == n_hidden && shard.dtype() == head.shards[0].dtype();
    assert!(
        head.shards.iter().all(fits),
        "token_logps: the head's shards fit neither {n_hidden} columns nor each other"
    );
    check_entries(scored, hidden.dims()[0], head.vocab_size());
    B::token_logps_forward(hidden, head, scored, expected)
}

/// Computes the loss's gradient by the hidden states from its gradient by the log-probabilities.
///
/// `dh[row] = Σ_entries dlogp · W[target] − (Σ_entries dlogp) · expected[row]`.
///
/// # Shapes
/// - `dlogps`: `[entries]`   - output: `[rows, hidden]`
///
/// # Panics
/// If the forward pass was made with [`Expected::Skip`] or of other entries.
pub fn token_logps_backward<B: Kernels>(
    dlogps: Tensor<B, 1>,
    forward: TokenLogps<B>,
    head: &Head<B>,
    scored: &[ScoredToken],
) -> Tensor<B, 2> {
    let expected =
        forward.expected.expect("token_logps_backward: the forward pass kept nothing for backward");
    assert_eq!(dlogps.dims(), [scored.len()], "token_logps_backward: a gradient an entry");
    check_entries(scored, expected.weighted.dims()[0], head.vocab_size());
    B::token_logps_backward(dlogps, expected, head, scored)
}

fn check_entries(scored: &[ScoredToken], n_rows: usize, vocab_size: usize) {
    assert!(!scored.is_empty(), "token_logps: nothing is scored");
    let outside =
        |token: &&ScoredToken| token.row_idx as usize >= n_rows || token.target as usize >= vocab_size;
    if let Some(token) = scored.iter().find(outside) {
        panic!("token_logps: {token:?} is outside {n_rows} rows or {vocab_size} tokens");
    }
}
