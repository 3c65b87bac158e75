//! Self-attention with rotary positions.

use burn::tensor::{Tensor, backend::Backend};

use super::LlamaConfig;
use super::linear::{Linear, LinearOutput};
use super::rope::rope_table;
use crate::ops::Kernels;
use crate::ops::attention::{AttentionMask, AttentionOutput, Visible, attention, attention_backward};
use crate::ops::rope::{RopeTable, rope, rope_backward};

/// Positions and masks of a packed row of tokens, shared by every layer.
#[derive(Debug, Clone)]
pub struct AttentionLayout<B: Backend> {
    /// Rotations by row.
    pub rope: RopeTable<B>,
    /// Which rows each row sees.
    pub mask: AttentionMask<B>,
}

impl<B: Backend> AttentionLayout<B> {
    /// Builds the layout of packed rows at these positions.
    pub fn new(config: &LlamaConfig, positions: &[u32], visible: Vec<Visible>, device: &B::Device) -> Self {
        Self { rope: rope_table(config, positions, device), mask: AttentionMask::new(visible, device) }
    }

    /// Builds the layout of one sequence's next rows after `n_cached` cached ones: row `i` sees the cache and rows up to itself.
    pub fn causal(config: &LlamaConfig, n_cached: usize, n_new: usize, device: &B::Device) -> Self {
        let positions: Vec<u32> = (n_cached as u32..(n_cached + n_new) as u32).collect();
        Self {
            rope: rope_table(config, &positions, device),
            mask: AttentionMask::causal(n_cached, n_new, device),
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

/// What backward needs of the block's forward pass.
#[derive(Debug, Clone)]
pub struct AttentionActivations<B: Backend> {
    /// The block's input, `[tokens, hidden]`.
    x: Tensor<B, 2>,
    /// Rotated queries and keys, and the values, with their layers' rank-r tensors.
    qkv: [Tensor<B, 3>; 3],
    s_qkv: [Option<Tensor<B, 2>>; 3],
    output: AttentionOutput<B>,
    /// The rank-r tensor of `o_proj`.
    s_o: Option<Tensor<B, 2>>,
}

impl<B: Backend> AttentionActivations<B> {
    /// What attention itself computed.
    pub fn output(&self) -> &AttentionOutput<B> {
        &self.output
    }
}

impl<B: Backend> Attention<B> {
    /// The layers of the block's input.
    fn projections(&self) -> [&Linear<B>; 3] {
        [&self.q_proj, &self.k_proj, &self.v_proj]
    }
}

impl<B: Kernels> Attention<B> {
    /// Runs the block over packed rows and adds its output to the residual stream.
    ///
    /// # Shapes
    /// - `x`, `residual`, output: `[tokens, hidden]`
    pub fn forward(
        &self,
        x: Tensor<B, 2>,
        residual: Tensor<B, 2>,
        layout: &AttentionLayout<B>,
    ) -> Tensor<B, 2> {
        let ([q, k, v], _) = self.project(x, layout);
        self.o_proj.forward_onto(attention(q, k, v, &layout.mask).out, residual).y
    }

    /// [`forward`](Self::forward) that keeps what backward needs.
    pub fn forward_keeping(
        &self,
        x: Tensor<B, 2>,
        residual: Tensor<B, 2>,
        layout: &AttentionLayout<B>,
    ) -> (Tensor<B, 2>, AttentionActivations<B>) {
        let (qkv, s_qkv) = self.project(x.clone(), layout);
        let [q, k, v] = qkv.clone();
        let output = attention(q, k, v, &layout.mask);
        let LinearOutput { y, s: s_o } = self.o_proj.forward_onto(output.out.clone(), residual);
        (y, AttentionActivations { x, qkv, s_qkv, output, s_o })
    }

    /// What backward needs, from the block's input and what attention itself computed.
    pub fn recompute(
        &self,
        x: Tensor<B, 2>,
        output: AttentionOutput<B>,
        layout: &AttentionLayout<B>,
    ) -> AttentionActivations<B> {
        let (qkv, s_qkv) = self.project(x.clone(), layout);
        let s_o = self.o_proj.rank_r(output.out.clone());
        AttentionActivations { x, qkv, s_qkv, output, s_o }
    }

    /// Runs the block for the next rows of one sequence, whose earlier keys and values are in `cache`.
    pub fn forward_cached(
        &self,
        x: Tensor<B, 2>,
        residual: Tensor<B, 2>,
        layout: &AttentionLayout<B>,
        cache: &mut Option<LayerCache<B>>,
    ) -> Tensor<B, 2> {
        let ([q, k, v], _) = self.project(x, layout);
        let (keys, values) = match cache.take() {
            Some(seen) => (Tensor::cat(vec![seen.keys, k], 0), Tensor::cat(vec![seen.values, v], 0)),
            None => (k, v),
        };
        *cache = Some(LayerCache { keys: keys.clone(), values: values.clone() });
        self.o_proj.forward_onto(attention(q, keys, values, &layout.mask).out, residual).y
    }

    /// The gradient by `x`, where it is asked for, from that of the output; adds the adapters' gradients to `lora`, in the
    /// checkpoint's order.
    pub fn backward(
        &self,
        dy: Tensor<B, 2>,
        kept: AttentionActivations<B>,
        layout: &AttentionLayout<B>,
        needs_dx: bool,
        lora: &mut Vec<Tensor<B, 2>>,
    ) -> Option<Tensor<B, 2>> {
        let AttentionActivations { x, qkv: [q, k, v], s_qkv, output, s_o } = kept;
        let needs_dout = needs_dx || self.projections().iter().any(|linear| linear.lora.is_some());
        let (dout, o_lora) =
            Linear::backward_each([&self.o_proj], [dy], output.out.clone(), [s_o], needs_dout);
        let mut dx = None;
        if let Some(dout) = dout {
            let [dq, dk, dv] = attention_backward(dout, q, k, v, output, &layout.mask);
            let (dq, dk) = (rope_backward(dq, &layout.rope), rope_backward(dk, &layout.rope));
            let dys = [dq, dk, dv].map(rows);
            let (below, qkv_lora) = Linear::backward_each(self.projections(), dys, x, s_qkv, needs_dx);
            lora.extend(qkv_lora);
            dx = below;
        }
        lora.extend(o_lora);
        dx
    }

    /// Rotated queries and keys, and the values, with the rank-r tensors of their layers.
    fn project(
        &self,
        x: Tensor<B, 2>,
        layout: &AttentionLayout<B>,
    ) -> ([Tensor<B, 3>; 3], [Option<Tensor<B, 2>>; 3]) {
        let heads = |t: Tensor<B, 2>| {
            let [n_tokens, width] = t.dims();
            t.reshape([n_tokens, width / self.head_dim, self.head_dim])
        };
        let [q, k, v] = Linear::forward_each(self.projections(), x);
        let rotate = |y: Tensor<B, 2>| rope(heads(y), &layout.rope);
        ([rotate(q.y), rotate(k.y), heads(v.y)], [q.s, k.s, v.s])
    }
}

/// `[tokens, heads, head_dim] -> [tokens, heads · head_dim]`
fn rows<B: Backend>(t: Tensor<B, 3>) -> Tensor<B, 2> {
    let [n_tokens, heads, head_dim] = t.dims();
    t.reshape([n_tokens, heads * head_dim])
}
