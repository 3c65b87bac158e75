//! The gated MLP.

use burn::tensor::{Tensor, backend::Backend};

use super::linear::{Linear, LinearOutput};
use crate::ops::Kernels;
use crate::ops::swiglu::{swiglu, swiglu_backward};

/// `down(silu(gate(x)) · up(x))` (SwiGLU, arXiv:2002.05202).
#[derive(Debug, Clone)]
pub struct Mlp<B: Backend> {
    /// `[hidden -> intermediate]`
    pub gate_proj: Linear<B>,
    /// `[hidden -> intermediate]`
    pub up_proj: Linear<B>,
    /// `[intermediate -> hidden]`
    pub down_proj: Linear<B>,
}

/// What backward needs of the block's forward pass.
#[derive(Debug, Clone)]
pub struct MlpActivations<B: Backend> {
    /// The block's input, `[tokens, hidden]`.
    x: Tensor<B, 2>,
    gate: LinearOutput<B>,
    up: LinearOutput<B>,
    /// `silu(gate) · up`, `[tokens, intermediate]`.
    h: Tensor<B, 2>,
    /// The rank-r tensor of `down_proj`.
    s_down: Option<Tensor<B, 2>>,
}

impl<B: Kernels> Mlp<B> {
    /// Runs the block and adds its output to the residual stream.
    ///
    /// # Shapes
    /// - `x`, `residual`, output: `[tokens, hidden]`
    pub fn forward(&self, x: Tensor<B, 2>, residual: Tensor<B, 2>) -> Tensor<B, 2> {
        let [gate, up] = Linear::forward_each([&self.gate_proj, &self.up_proj], x);
        self.down_proj.forward_onto(swiglu(gate.y, up.y), residual).y
    }

    /// [`forward`](Self::forward) that keeps what backward needs.
    pub fn forward_keeping(
        &self,
        x: Tensor<B, 2>,
        residual: Tensor<B, 2>,
    ) -> (Tensor<B, 2>, MlpActivations<B>) {
        let [gate, up] = Linear::forward_each([&self.gate_proj, &self.up_proj], x.clone());
        let h = swiglu(gate.y.clone(), up.y.clone());
        let LinearOutput { y, s: s_down } = self.down_proj.forward_onto(h.clone(), residual);
        (y, MlpActivations { x, gate, up, h, s_down })
    }

    /// What backward needs, without the block's output: the product of `down_proj` is left out.
    pub fn recompute(&self, x: Tensor<B, 2>) -> MlpActivations<B> {
        let [gate, up] = Linear::forward_each([&self.gate_proj, &self.up_proj], x.clone());
        let h = swiglu(gate.y.clone(), up.y.clone());
        let s_down = self.down_proj.rank_r(h.clone());
        MlpActivations { x, gate, up, h, s_down }
    }

    /// The gradient by `x`, where it is asked for, from that of the output; adds the adapters' gradients to `lora`, in the
    /// checkpoint's order.
    pub fn backward(
        &self,
        dy: Tensor<B, 2>,
        kept: MlpActivations<B>,
        needs_dx: bool,
        lora: &mut Vec<Tensor<B, 2>>,
    ) -> Option<Tensor<B, 2>> {
        let MlpActivations { x, gate, up, h, s_down } = kept;
        let needs_dh = needs_dx || self.gate_proj.lora.is_some() || self.up_proj.lora.is_some();
        let (dh, down_lora) = Linear::backward_each([&self.down_proj], [dy], h, [s_down], needs_dh);
        let mut dx = None;
        if let Some(dh) = dh {
            let (dgate, dup) = swiglu_backward(dh, gate.y, up.y);
            let linears = [&self.gate_proj, &self.up_proj];
            let (below, lora_of_x) =
                Linear::backward_each(linears, [dgate, dup], x, [gate.s, up.s], needs_dx);
            lora.extend(lora_of_x);
            dx = below;
        }
        lora.extend(down_lora);
        dx
    }
}
