//! Grouped-query attention over packed rows.

use std::ops::Range;

use burn::tensor::activation::softmax;
use burn::tensor::{Tensor, TensorData, backend::Backend};
use burn_autodiff::Autodiff;

use super::LlamaConfig;
use super::llama::Linear;
use super::rope::RopeTable;
use crate::ops::Ops;

/// What a masked score gets added; large enough for a weight of exactly zero, and finite.
const MASKED: f32 = -1e30;

/// Rows that attend among themselves, and which of them see which.
#[derive(Debug, Clone)]
pub struct Block<B: Backend> {
    /// The packed rows.
    pub rows: Range<usize>,
    /// Added to the scores, `[rows, keys]`: 0 where a row sees a key, a large negative number where not.
    pub mask: Tensor<B, 2>,
}

/// Positions and masks of a packed row of tokens, shared by every layer.
#[derive(Debug, Clone)]
pub struct AttentionLayout<B: Backend> {
    /// Rotations by row.
    pub rope: RopeTable<B>,
    /// Disjoint blocks that cover all rows, in order.
    pub blocks: Vec<Block<B>>,
}

impl<B: Backend> AttentionLayout<B> {
    /// Builds the layout of `positions.len()` rows that fall into `blocks`; `attends(query, key)` takes packed rows.
    pub fn new(
        config: &LlamaConfig,
        positions: &[u32],
        blocks: &[Range<usize>],
        attends: impl Fn(usize, usize) -> bool,
        device: &B::Device,
    ) -> Self {
        let blocks = blocks.iter().map(|rows| {
            let visible = rows.clone().flat_map(|i| rows.clone().map(move |j| (i, j)));
            let mask: Vec<f32> = visible.map(|(i, j)| if attends(i, j) { 0.0 } else { MASKED }).collect();
            let mask = Tensor::from_data(TensorData::new(mask, [rows.len(), rows.len()]), device);
            Block { rows: rows.clone(), mask }
        });
        Self { rope: RopeTable::new(config, positions, device), blocks: blocks.collect() }
    }

    /// Builds the layout of one sequence's next rows after `n_cached` cached ones: row `i` sees the cache and rows up to itself.
    pub fn causal(config: &LlamaConfig, n_cached: usize, n_new: usize, device: &B::Device) -> Self {
        let n_keys = n_cached + n_new;
        let mask: Vec<f32> = (0..n_new)
            .flat_map(|i| (0..n_keys).map(move |j| if j <= n_cached + i { 0.0 } else { MASKED }))
            .collect();
        let mask = Tensor::from_data(TensorData::new(mask, [n_new, n_keys]), device);
        let positions: Vec<u32> = (n_cached as u32..n_keys as u32).collect();
        Self {
            rope: RopeTable::new(config, &positions, device),
            blocks: vec![Block { rows: 0..n_new, mask }],
        }
    }

    /// The same layout under autodiff.
    pub fn lift(&self) -> AttentionLayout<Autodiff<B>> {
        let lift = |t: &Tensor<B, 2>| Tensor::from_inner(t.clone());
        AttentionLayout {
            rope: RopeTable { cos: lift(&self.rope.cos), sin: lift(&self.rope.sin) },
            blocks: self.blocks.iter().map(|b| Block { rows: b.rows.clone(), mask: lift(&b.mask) }).collect(),
        }
    }
}

/// Keys and values of the tokens that a layer has seen, `[tokens, kv_heads, head_dim]` each.
#[derive(Debug, Clone)]
pub struct LayerCache<B: Backend> {
    keys: Tensor<B, 3>,
    values: Tensor<B, 3>,
}

/// Self-attention with rotary positions and shared key-value heads.
#[derive(Debug, Clone)]
pub struct Attention<B: Backend> {
    /// `[hidden -> heads · head_dim]`
    pub q_proj: Linear<B>,
    /// `[hidden -> kv_heads · head_dim]`
    pub k_proj: Linear<B>,
    /// `[hidden -> kv_heads · head_dim]`
    pub v_proj: Linear<B>,
    /// `[heads · head_dim -> hidden]`
    pub o_proj: Linear<B>,
    /// Width of one head.
    pub head_dim: usize,
}

impl<B: Ops> Attention<B> {
    /// Runs the block over packed rows.
    ///
    /// # Shapes
    /// - `x`, output: `[tokens, hidden]`
    pub fn forward(&self, x: Tensor<B, 2>, layout: &AttentionLayout<B>) -> Tensor<B, 2> {
        let (q, k, v) = self.project(x, layout);
        let blocks = layout.blocks.iter().map(|Block { rows, mask }| {
            let part = |t: &Tensor<B, 3>| t.clone().narrow(0, rows.start, rows.len());
            attend(part(&q), part(&k), part(&v), mask.clone())
        });
        self.o_proj.forward(Tensor::cat(blocks.collect(), 0))
    }

    /// Runs the block for the next rows of one sequence, whose earlier keys and values are in `cache`.
    pub fn forward_cached(
        &self,
        x: Tensor<B, 2>,
        layout: &AttentionLayout<B>,
        cache: &mut Option<LayerCache<B>>,
    ) -> Tensor<B, 2> {
        let (q, k, v) = self.project(x, layout);
        let (keys, values) = match cache.take() {
            Some(seen) => (Tensor::cat(vec![seen.keys, k], 0), Tensor::cat(vec![seen.values, v], 0)),
            None => (k, v),
        };
        *cache = Some(LayerCache { keys: keys.clone(), values: values.clone() });
        self.o_proj.forward(attend(q, keys, values, layout.blocks[0].mask.clone()))
    }

    fn project(
        &self,
        x: Tensor<B, 2>,
        layout: &AttentionLayout<B>,
    ) -> (Tensor<B, 3>, Tensor<B, 3>, Tensor<B, 3>) {
        let heads = |t: Tensor<B, 2>| {
            let [n_tokens, width] = t.dims();
            t.reshape([n_tokens, width / self.head_dim, self.head_dim])
        };
        let q = layout.rope.rotate(heads(self.q_proj.forward(x.clone())));
        let k = layout.rope.rotate(heads(self.k_proj.forward(x.clone())));
        (q, k, heads(self.v_proj.forward(x)))
    }
}

impl<B: Backend> Attention<B> {
    /// The same block under autodiff: frozen weights, tracked adapters.
    pub fn lift(&self) -> Attention<Autodiff<B>> {
        Attention {
            q_proj: self.q_proj.lift(),
            k_proj: self.k_proj.lift(),
            v_proj: self.v_proj.lift(),
            o_proj: self.o_proj.lift(),
            head_dim: self.head_dim,
        }
    }
}

/// `softmax(q kᵀ / sqrt(head_dim) + mask) v` (arXiv:1706.03762), query head `h` with key head `h / (heads / kv_heads)`.
///
/// The query heads of one key head are laid end to end as rows, so keys and values are never repeated.
///
/// # Shapes
/// - `q`: `[queries, heads, head_dim]`   - `k`, `v`: `[keys, kv_heads, head_dim]`   - `mask`: `[queries, keys]`
/// - output: `[queries, heads · head_dim]`
fn attend<B: Backend>(q: Tensor<B, 3>, k: Tensor<B, 3>, v: Tensor<B, 3>, mask: Tensor<B, 2>) -> Tensor<B, 2> {
    let ([n_queries, heads, head_dim], [n_keys, kv_heads, _]) = (q.dims(), k.dims());
    let group = heads / kv_heads;
    let q = q.swap_dims(0, 1).reshape([kv_heads, group * n_queries, head_dim]);
    let scores = q.matmul(k.permute([1, 2, 0])) * (head_dim as f64).powf(-0.5);
    let scores = scores.reshape([kv_heads, group, n_queries, n_keys]) + mask.unsqueeze::<4>();
    let weights = softmax(scores, 3).reshape([kv_heads, group * n_queries, n_keys]);
    let out = weights.matmul(v.swap_dims(0, 1)).reshape([heads, n_queries, head_dim]);
    out.swap_dims(0, 1).reshape([n_queries, heads * head_dim])
}
