//! Attention in plain burn tensors, with tables of scores.

use std::ops::Range;

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};

use super::mask::{AttentionMask, MASKED, Visible};
use super::{AttentionOutput, scale};
use crate::ops::{cast, to_f32};

/// The most rows that the references make scores of at a time: few enough for a head's table of them to stay in a processor's cache.
pub const CHUNK_ROWS: usize = 64;

/// What is added to whole tables of scores, `[rows, keys]` of each sequence: 0 where a row sees a key, and what leaves nothing of the others.
#[derive(Debug, Clone)]
pub struct AdditiveMask<B: Backend>(Vec<(Block, Tensor<B, 2>)>);

impl<B: Backend> AdditiveMask<B> {
    /// That of rows which see these keys.
    pub fn new(visible: &[Visible], device: &B::Device) -> Self {
        let blocks = blocks(visible, usize::MAX).into_iter();
        Self(blocks.map(|block| (block.clone(), block.mask(visible, device))).collect())
    }
}

/// Attention's output in plain burn tensors, with the whole table of scores. Differentiable by burn's own autodiff.
pub fn attention_reference<B: Backend>(
    q: Tensor<B, 3>,
    k: Tensor<B, 3>,
    v: Tensor<B, 3>,
    mask: &AdditiveMask<B>,
) -> Tensor<B, 2> {
    let parts = mask.0.iter().map(|(block, mask)| {
        let scores = Scores::new(&q, &k, mask.clone(), block);
        let weights = burn::tensor::activation::softmax(scores.values, 2);
        let out = weights.matmul(by_head(&v, &block.keys));
        scores.heads.to_rows(out)
    });
    cast(Tensor::cat(parts.collect(), 0), q.dtype())
}

/// [`attention`](super::attention) in plain burn tensors, [`CHUNK_ROWS`] at a time.
pub(in crate::ops) fn attention_forward_reference<B: Backend>(
    q: Tensor<B, 3>,
    k: Tensor<B, 3>,
    v: Tensor<B, 3>,
    mask: &AttentionMask<B>,
) -> AttentionOutput<B> {
    let parts = blocks(&mask.visible, CHUNK_ROWS).into_iter().map(|block| {
        let Scores { values, heads, .. } =
            Scores::new(&q, &k, block.mask(&mask.visible, &k.device()), &block);
        let max = values.clone().max_dim(2);
        let exps = (values - max.clone()).exp();
        let sum = exps.clone().sum_dim(2);
        let out = exps.matmul(by_head(&v, &block.keys)) / sum.clone();
        (heads.to_rows(out), heads.to_rows(max + sum.log()))
    });
    let (outs, lses): (Vec<_>, Vec<_>) = parts.unzip();
    AttentionOutput { out: cast(Tensor::cat(outs, 0), q.dtype()), lse: Tensor::cat(lses, 0) }
}

/// [`attention_backward`](super::attention_backward) in plain burn tensors, [`CHUNK_ROWS`] at a time.
pub(in crate::ops) fn attention_backward_reference<B: Backend>(
    dout: Tensor<B, 2>,
    q: Tensor<B, 3>,
    k: Tensor<B, 3>,
    v: Tensor<B, 3>,
    output: AttentionOutput<B>,
    mask: &AttentionMask<B>,
) -> [Tensor<B, 3>; 3] {
    let dtype = q.dtype();
    let scale = scale(q.dims()[2]);
    let width = |t: &Tensor<B, 2>| [t.dims()[0], q.dims()[1], t.dims()[1] / q.dims()[1]];
    let (dout, out) = (to_f32(dout), to_f32(output.out));
    let delta = (dout.clone() * out.clone()).reshape(width(&out)).sum_dim(2);
    let (dout, lse) = (dout.clone().reshape(width(&dout)), output.lse.clone().reshape(width(&output.lse)));
    let mut dq = Vec::new();
    let (mut dk, mut dv) = (to_f32(k.zeros_like()), to_f32(v.zeros_like()));
    for block in blocks(&mask.visible, CHUNK_ROWS) {
        let Scores { values, q, heads } = Scores::new(&q, &k, block.mask(&mask.visible, &k.device()), &block);
        let rows = |t: &Tensor<B, 3>| heads.by_head(t.clone().slice([block.rows.clone()]));
        let weights = (values - rows(&lse)).exp();
        let dout = rows(&dout);
        let dweights = dout.clone().matmul(by_head(&v, &block.keys).swap_dims(1, 2));
        let dscores = weights.clone() * (dweights - rows(&delta));
        dq.push(heads.to_rows(dscores.clone().matmul(by_head(&k, &block.keys)) * scale));
        let add = |to: &mut Tensor<B, 3>, part: Tensor<B, 3>| {
            let sum = to.clone().slice([block.keys.clone()]) + part.swap_dims(0, 1);
            *to = to.clone().slice_assign([block.keys.clone()], sum);
        };
        add(&mut dv, weights.swap_dims(1, 2).matmul(dout));
        add(&mut dk, dscores.swap_dims(1, 2).matmul(q));
    }
    let dq = Tensor::cat(dq, 0).reshape(q.dims());
    [dq, dk, dv].map(|t| cast(t, dtype))
}

/// Rows that attend among the same keys.
#[derive(Debug, Clone)]
struct Block {
    rows: Range<usize>,
    keys: Range<usize>,
}

impl Block {
    /// What is added to its scores, `[rows, keys]`.
    fn mask<B: Backend>(&self, visible: &[Visible], device: &B::Device) -> Tensor<B, 2> {
        let at = |key: u32| key as usize - self.keys.start;
        let mut mask = vec![MASKED; self.rows.len() * self.keys.len()];
        for (row, v) in mask.chunks_exact_mut(self.keys.len()).zip(&visible[self.rows.clone()]) {
            row[at(v.first)..at(v.prefix_end)].fill(0.0);
            row[at(v.own_start)..at(v.end)].fill(0.0);
        }
        Tensor::from_data(TensorData::new(mask, [self.rows.len(), self.keys.len()]), device)
    }
}

/// Rows of the same first key, at most `max_rows` at a time, and the keys that any of them sees.
fn blocks(visible: &[Visible], max_rows: usize) -> Vec<Block> {
    let mut start = 0;
    let mut blocks = Vec::new();
    for group in visible.chunk_by(|a, b| a.first == b.first) {
        for chunk in group.chunks(max_rows) {
            let end = chunk.iter().map(|v| v.end).max().unwrap_or(chunk[0].first);
            blocks.push(Block {
                rows: start..start + chunk.len(),
                keys: chunk[0].first as usize..end as usize,
            });
            start += chunk.len();
        }
    }
    blocks
}

/// How rows are laid out by key head: `[kv_heads, group · rows, _]`, the query heads of one key head end to end.
#[derive(Clone, Copy)]
struct Heads {
    kv_heads: usize,
    group: usize,
}

impl Heads {
    /// `[rows, heads, width] -> [kv_heads, group · rows, width]`
    fn by_head<B: Backend>(self, t: Tensor<B, 3>) -> Tensor<B, 3> {
        let [n_rows, _, width] = t.dims();
        t.swap_dims(0, 1).reshape([self.kv_heads, self.group * n_rows, width])
    }

    /// `[kv_heads, group · rows, width] -> [rows, heads · width]`
    fn to_rows<B: Backend>(self, t: Tensor<B, 3>) -> Tensor<B, 2> {
        let [_, n, width] = t.dims();
        let (heads, n_rows) = (self.kv_heads * self.group, n / self.group);
        t.reshape([heads, n_rows, width]).swap_dims(0, 1).reshape([n_rows, heads * width])
    }
}

/// Masked, scaled scores of a block, `[kv_heads, group · rows, keys]`.
struct Scores<B: Backend> {
    values: Tensor<B, 3>,
    /// What they are products of, with the scale in it: `[kv_heads, group · rows, head_dim]`.
    q: Tensor<B, 3>,
    heads: Heads,
}

impl<B: Backend> Scores<B> {
    fn new(q: &Tensor<B, 3>, k: &Tensor<B, 3>, mask: Tensor<B, 2>, block: &Block) -> Self {
        let ([_, heads, head_dim], kv_heads) = (q.dims(), k.dims()[1]);
        let heads = Heads { kv_heads, group: heads / kv_heads };
        let (n_rows, n_keys) = (block.rows.len(), block.keys.len());
        let q = heads.by_head(to_f32(q.clone().slice([block.rows.clone()]))) * scale(head_dim);
        let scores = q.clone().matmul(by_head(k, &block.keys).swap_dims(1, 2));
        // As one line a head: burn's CPU adds what each line takes in whole vectors, and a matrix to each of several value by value.
        let scores = scores.reshape([kv_heads * heads.group, n_rows * n_keys]);
        let scores = scores + mask.reshape([1, n_rows * n_keys]);
        Self { values: scores.reshape([kv_heads, heads.group * n_rows, n_keys]), q, heads }
    }
}

/// Keys or values of a block, `[kv_heads, keys, head_dim]` in `f32`.
fn by_head<B: Backend>(t: &Tensor<B, 3>, keys: &Range<usize>) -> Tensor<B, 3> {
    to_f32(t.clone().slice([keys.clone()]).swap_dims(0, 1))
}
