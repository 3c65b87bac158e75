//! The head in plain burn tensors.

use burn::tensor::backend::Backend;
use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData};

use super::{Expected, ExpectedRows, Head, ScoredToken, TokenLogps, chunk_rows};
use crate::ops::{Kernels, to_f32};

/// [`Kernels::token_logps_forward`] in plain burn tensors.
pub fn token_logps_reference<B: Kernels>(
    hidden: Tensor<B, 2>,
    head: &Head<B>,
    scored: &[ScoredToken],
    expected: Expected,
) -> TokenLogps<B> {
    let hidden = to_f32(hidden);
    let [n_rows, n_hidden] = hidden.dims();
    let device = hidden.device();
    let chunk_rows = chunk_rows(head, n_rows);
    let (mut target_logits, mut softmaxes) = (Gathered::default(), Vec::new());
    for start in (0..n_rows).step_by(chunk_rows) {
        let rows = start..(start + chunk_rows).min(n_rows);
        let h = hidden.clone().slice([rows.clone(), 0..n_hidden]);
        let mut softmax: Option<PartialSoftmax<B>> = None;
        for (shard, first) in head.shards.iter().zip(head.first_ids()) {
            let n = shard.dims()[0];
            let weight = to_f32(shard.to_dense());
            let logits = h.clone().matmul(weight.clone().transpose());
            let belongs = |token: &ScoredToken| {
                rows.contains(&(token.row_idx as usize))
                    && (first..first + n).contains(&(token.target as usize))
            };
            target_logits.push(scored, belongs, |picked| {
                let place = |token: &&ScoredToken| {
                    (token.row_idx - start as u32) * n as u32 + token.target - first as u32
                };
                let places: Vec<u32> = picked.iter().map(place).collect();
                logits.clone().reshape([rows.len() * n]).select(0, indices(&places, &device))
            });
            let part = PartialSoftmax::new(logits, weight, expected);
            softmax = Some(match softmax {
                Some(seen) => seen.merge(part),
                None => part,
            });
        }
        softmaxes.extend(softmax);
    }
    let by_row =
        |f: fn(&PartialSoftmax<B>) -> Tensor<B, 2>| Tensor::cat(softmaxes.iter().map(f).collect(), 0);
    let (max, sum) = (by_row(|s| s.max.clone()), by_row(|s| s.sum.clone()));
    let by_entry = |t: Tensor<B, 2>| {
        let row_indices: Vec<u32> = scored.iter().map(|token| token.row_idx).collect();
        t.squeeze_dim::<1>(1).select(0, indices(&row_indices, &device))
    };
    // In this order: where the target is the likeliest token the difference is exactly zero, and the logarithm is all there is.
    let logps = (target_logits.in_order() - by_entry(max)) - by_entry(sum.clone().log());
    let weighted: Option<Vec<_>> = softmaxes.into_iter().map(|s| s.weighted).collect();
    let expected =
        weighted.map(|parts| ExpectedRows { weighted: Tensor::cat(parts, 0), sum: sum.squeeze_dim(1) });
    TokenLogps { logps, expected, peak_bytes: None }
}

/// A softmax over a part of the vocabulary: `max` of the logits, `sum = Σ exp(z − max)`, both `[rows, 1]`, and
/// `weighted = Σ exp(z − max) W`, `[rows, hidden]`, where it is asked for.
struct PartialSoftmax<B: Backend> {
    max: Tensor<B, 2>,
    sum: Tensor<B, 2>,
    weighted: Option<Tensor<B, 2>>,
}

impl<B: Backend> PartialSoftmax<B> {
    fn new(logits: Tensor<B, 2>, weight: Tensor<B, 2>, expected: Expected) -> Self {
        let max = logits.clone().max_dim(1);
        let exps = (logits - max.clone()).exp();
        let sum = exps.clone().sum_dim(1);
        Self { max, sum, weighted: (expected == Expected::Keep).then(|| exps.matmul(weight)) }
    }

    /// The softmax over both parts.
    fn merge(self, other: Self) -> Self {
        let max = self.max.clone().max_pair(other.max.clone());
        let (a, b) = ((self.max - max.clone()).exp(), (other.max - max.clone()).exp());
        let weighted = self.weighted.zip(other.weighted).map(|(x, y)| x * a.clone() + y * b.clone());
        Self { max, sum: self.sum * a + other.sum * b, weighted }
    }
}

/// [`Kernels::token_logps_backward`] in plain burn tensors.
pub fn token_logps_backward_reference<B: Kernels>(
    dlogps: Tensor<B, 1>,
    expected: ExpectedRows<B>,
    head: &Head<B>,
    scored: &[ScoredToken],
) -> Tensor<B, 2> {
    let ExpectedRows { weighted: unscaled, sum } = expected;
    let ([n_rows, n_hidden], device) = (unscaled.dims(), unscaled.device());
    let (row_indices, targets): (Vec<u32>, Vec<u32>) = scored.iter().map(|t| (t.row_idx, t.target)).unzip();
    let row_indices = indices(&row_indices, &device);
    let weighted = rows(head, &targets) * dlogps.clone().unsqueeze_dim::<2>(1);
    let by_row = Tensor::<B, 2>::zeros([n_rows, n_hidden], &device).select_assign(
        0,
        row_indices.clone(),
        weighted,
        IndexingUpdateOp::Add,
    );
    let row_weight =
        Tensor::<B, 1>::zeros([n_rows], &device).select_assign(0, row_indices, dlogps, IndexingUpdateOp::Add);
    by_row - unscaled * (row_weight / sum).unsqueeze_dim::<2>(1)
}

/// Rows of the weight by token id, `[ids] -> [ids, hidden]`.
fn rows<B: Kernels>(head: &Head<B>, ids: &[u32]) -> Tensor<B, 2> {
    let mut gathered = Gathered::default();
    for (shard, first) in head.shards.iter().zip(head.first_ids()) {
        let range = first..first + shard.dims()[0];
        gathered.push(
            ids,
            |&id| range.contains(&(id as usize)),
            |picked| {
                let local: Vec<u32> = picked.iter().map(|&&id| id - first as u32).collect();
                let shard = shard.to_dense();
                let device = shard.device();
                to_f32(shard.select(0, indices(&local, &device)))
            },
        );
    }
    gathered.in_order()
}

/// Parts picked out of a list in several passes, to be put back into the list's order.
struct Gathered<B: Backend, const D: usize> {
    parts: Vec<Tensor<B, D>>,
    order: Vec<usize>,
}

impl<B: Backend, const D: usize> Default for Gathered<B, D> {
    fn default() -> Self {
        Self { parts: Vec::new(), order: Vec::new() }
    }
}

impl<B: Backend, const D: usize> Gathered<B, D> {
    /// Adds `compute` of the items that `belongs` picks; one row of its result an item.
    fn push<T>(
        &mut self,
        items: &[T],
        belongs: impl Fn(&T) -> bool,
        compute: impl FnOnce(&[&T]) -> Tensor<B, D>,
    ) {
        let picked: Vec<(usize, &T)> = items.iter().enumerate().filter(|(_, item)| belongs(item)).collect();
        if !picked.is_empty() {
            self.order.extend(picked.iter().map(|(i, _)| i));
            self.parts.push(compute(&picked.iter().map(|(_, item)| *item).collect::<Vec<_>>()));
        }
    }

    fn in_order(self) -> Tensor<B, D> {
        let rows = Tensor::cat(self.parts, 0);
        if self.order.is_sorted() {
            return rows;
        }
        let mut place = vec![0; self.order.len()];
        for (at, &i) in self.order.iter().enumerate() {
            place[i] = at as u32;
        }
        let device = rows.device();
        rows.select(0, indices(&place, &device))
    }
}

fn indices<B: Backend>(values: &[u32], device: &B::Device) -> Tensor<B, 1, Int> {
    let values: Vec<i32> = values.iter().map(|&v| v as i32).collect();
    let shape = [values.len()];
    Tensor::from_data(TensorData::new(values, shape), device)
}
