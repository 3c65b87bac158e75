//! The operations that this project brings along: each has one file here and one test of the same name, and so have its shaders and
//! its group of the bench, where it has them.
//!
//! An op's file holds the formula and its source, the public functions for forward and backward, and a `_reference` in plain burn
//! tensors. [`Kernels`] is what a runtime brings: forward and backward of every op as separate calls. Its default bodies are the
//! references, which is what the CPU runs; `gpu.rs` launches the project's kernels instead, on every runtime of CubeCL, with the
//! products and the loss of its [`Engine`](engine::Engine). A backward that has no short formula of
//! its own is the reference under burn's autodiff.
//!
//! Activations and frozen weights are `f32`, `f16` or `bf16`; the residual stream, adapters, statistics and every sum are `f32`.

pub mod adamw;
pub mod attention;
pub mod lora_linear;
pub mod orpo_loss;
pub mod quantize;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
pub mod token_logps;

mod cube;
#[cfg(feature = "cuda")]
mod cuda;
pub mod engine;
mod gpu;
pub mod kernel;
mod lanes;
pub mod notes;
mod product;
pub mod profile;
pub mod read;
pub mod tune;
mod wgpu;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, FloatDType, Int, Tensor};
use burn_autodiff::Autodiff;
use burn_flex::Flex;

pub use cube::matrix_units_are_off;
pub use product::{CutChoice, CutKind, Cuts};

use adamw::AdamWStep;
use attention::{AttentionMask, AttentionOutput};
use lora_linear::{Lora, LoraGrads, LoraOutputGrad};
use orpo_loss::PairSpan;
use quantize::{Packed, Storage};
use rope::RopeTable;
use token_logps::{Expected, ExpectedRows, Head, ScoredToken, TokenLogps};

/// Forward and backward of every op on one runtime. The default bodies are the references; shapes are those of the ops' public
/// functions, which check them.
pub trait Kernels: Backend {
    /// Bytes in tensors on the device, where it can be told. Everything launched before counts as done.
    fn bytes_in_use(_device: &Self::Device) -> Option<u64> {
        None
    }

    /// See [`lora_rank_r`](lora_linear::lora_rank_r); in `f32`.
    fn lora_rank_r(x: Tensor<Self, 2>, loras: &[&Lora<Self>]) -> Vec<Tensor<Self, 2>> {
        loras.iter().map(|lora| lora_linear::rank_r_reference(x.clone(), lora)).collect()
    }

    /// See [`lora_linear`](lora_linear::lora_linear).
    fn lora_linear_forward(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        adapter: Option<(&Lora<Self>, Tensor<Self, 2>)>,
        residual: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        lora_linear::forward_reference(x, weight, adapter, residual)
    }

    /// See [`lora_backward_b`](lora_linear::lora_backward_b).
    fn lora_backward_b(layers: &[LoraOutputGrad<'_, Self>]) -> Vec<LoraGrads<Self>> {
        layers.iter().map(lora_linear::backward_b_reference).collect()
    }

    /// See [`lora_backward_a`](lora_linear::lora_backward_a).
    fn lora_backward_a(x: Tensor<Self, 2>, ds: &[Tensor<Self, 2>]) -> Vec<Tensor<Self, 2>> {
        ds.iter().map(|ds| lora_linear::backward_a_reference(x.clone(), ds.clone())).collect()
    }

    /// `dx = sum + dy W + ds A`, `[tokens, in]`, in `dtype`; without an adapter or a sum the rest of it.
    fn lora_linear_backward_input(
        dy: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        ds_a: Option<(Tensor<Self, 2>, Tensor<Self, 2>)>,
        sum: Option<Tensor<Self, 2>>,
        dtype: DType,
    ) -> Tensor<Self, 2> {
        lora_linear::backward_input_reference(dy, weight, ds_a, sum, dtype)
    }

    /// Codes of `f32` values and a scale for each block of them, by the first line of [`quantize`](mod@quantize)'s formulas: `(codes,
    /// scales)`, `[words]` and `[blocks]`.
    fn quantize_blocks(values: Tensor<Self, 1>, storage: Storage) -> (Tensor<Self, 1, Int>, Tensor<Self, 1>) {
        quantize::quantize_reference(values, storage)
    }

    /// The dense matrix of one in codes.
    fn dequantize_blocks(packed: &Packed<Self>) -> Tensor<Self, 2> {
        quantize::dequantize_reference(packed)
    }

    /// See [`rms_norm`](rms_norm::rms_norm).
    fn rms_norm_forward(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        eps: f64,
        dtype: DType,
    ) -> Tensor<Self, 2> {
        rms_norm::rms_norm_reference(x, weight, eps, dtype)
    }

    /// See [`rms_norm_backward`](rms_norm::rms_norm_backward).
    fn rms_norm_backward(
        dy: Tensor<Self, 2>,
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        eps: f64,
        sum: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        rms_norm::rms_norm_backward_reference(dy, x, weight, eps, sum)
    }

    /// See [`rope`](rope::rope).
    fn rope_forward(x: Tensor<Self, 3>, table: &RopeTable<Self>) -> Tensor<Self, 3> {
        rope::rope_reference(x, table.cos.clone(), table.sin.clone())
    }

    /// See [`rope_backward`](rope::rope_backward).
    fn rope_backward(dy: Tensor<Self, 3>, table: &RopeTable<Self>) -> Tensor<Self, 3> {
        rope::rope_reference(dy, table.cos.clone(), -table.sin.clone())
    }

    /// See [`swiglu`](swiglu::swiglu).
    fn swiglu_forward(gate: Tensor<Self, 2>, up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        swiglu::swiglu_reference(gate, up)
    }

    /// See [`swiglu_backward`](swiglu::swiglu_backward).
    fn swiglu_backward(
        dy: Tensor<Self, 2>,
        gate: Tensor<Self, 2>,
        up: Tensor<Self, 2>,
    ) -> (Tensor<Self, 2>, Tensor<Self, 2>) {
        swiglu::swiglu_backward_reference(dy, gate, up)
    }

    /// See [`attention`](attention::attention).
    fn attention_forward(
        q: Tensor<Self, 3>,
        k: Tensor<Self, 3>,
        v: Tensor<Self, 3>,
        mask: &AttentionMask<Self>,
    ) -> AttentionOutput<Self> {
        attention::attention_forward_reference(q, k, v, mask)
    }

    /// See [`attention_backward`](attention::attention_backward).
    fn attention_backward(
        dout: Tensor<Self, 2>,
        q: Tensor<Self, 3>,
        k: Tensor<Self, 3>,
        v: Tensor<Self, 3>,
        output: AttentionOutput<Self>,
        mask: &AttentionMask<Self>,
    ) -> [Tensor<Self, 3>; 3] {
        attention::attention_backward_reference(dout, q, k, v, output, mask)
    }

    /// See [`token_logps`](token_logps::token_logps).
    fn token_logps_forward(
        hidden: Tensor<Self, 2>,
        head: &Head<Self>,
        scored: &[ScoredToken],
        expected: Expected,
    ) -> TokenLogps<Self> {
        token_logps::token_logps_reference(hidden, head, scored, expected)
    }

    /// See [`token_logps_backward`](token_logps::token_logps_backward).
    fn token_logps_backward(
        dlogps: Tensor<Self, 1>,
        expected: ExpectedRows<Self>,
        head: &Head<Self>,
        scored: &[ScoredToken],
    ) -> Tensor<Self, 2> {
        token_logps::token_logps_backward_reference(dlogps, expected, head, scored)
    }

    /// The statistics of [`orpo_loss`](orpo_loss::orpo_loss): `[pairs, 5]` from `logps: [entries]`.
    fn orpo_loss_forward(logps: Tensor<Self, 1>, pairs: &[PairSpan]) -> Tensor<Self, 2> {
        orpo_loss::orpo_loss_reference(logps, pairs)
    }

    /// The loss's derivative by every entry's log-probability, `[entries]`.
    fn orpo_loss_backward(
        stats: Tensor<Self, 2>,
        pairs: &[PairSpan],
        beta: f32,
        grad_scale: f32,
    ) -> Tensor<Self, 1> {
        orpo_loss::orpo_loss_backward_reference(stats, pairs, beta, grad_scale)
    }

    /// See [`grad_norm`](adamw::grad_norm).
    fn grad_norm(grads: &[Tensor<Self, 2>]) -> Tensor<Self, 1> {
        adamw::grad_norm_reference(grads)
    }

    /// See [`add_grads`](adamw::add_grads).
    fn add_grads(sums: Vec<Tensor<Self, 2>>, grads: Vec<Tensor<Self, 2>>) -> Vec<Tensor<Self, 2>> {
        adamw::add_grads_reference(sums, grads)
    }

    /// See [`adamw`](adamw::adamw).
    fn adamw(
        parameters: Vec<Tensor<Self, 2>>,
        grads: Vec<Tensor<Self, 2>>,
        moments: [Vec<Tensor<Self, 2>>; 2],
        norm: Tensor<Self, 1>,
        step: &AdamWStep,
    ) -> (Vec<Tensor<Self, 2>>, [Vec<Tensor<Self, 2>>; 2]) {
        adamw::adamw_reference(parameters, grads, moments, norm, step)
    }
}

impl Kernels for Flex {
    fn attention_forward(
        q: Tensor<Self, 3>,
        k: Tensor<Self, 3>,
        v: Tensor<Self, 3>,
        mask: &AttentionMask<Self>,
    ) -> AttentionOutput<Self> {
        attention::attention_forward_by_head(&q, &k, &v, mask)
    }

    fn attention_backward(
        dout: Tensor<Self, 2>,
        q: Tensor<Self, 3>,
        k: Tensor<Self, 3>,
        v: Tensor<Self, 3>,
        output: AttentionOutput<Self>,
        mask: &AttentionMask<Self>,
    ) -> [Tensor<Self, 3>; 3] {
        attention::attention_backward_by_head(&dout, &q, &k, &v, &output, mask)
    }
}

/// The tensor in another float type; itself where it has it.
pub(crate) fn cast<B: Backend, const D: usize>(tensor: Tensor<B, D>, dtype: DType) -> Tensor<B, D> {
    if tensor.dtype() == dtype { tensor } else { tensor.cast(FloatDType::from(dtype)) }
}

/// The tensor in `f32`.
pub(crate) fn to_f32<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Tensor<B, D> {
    cast(tensor, DType::F32)
}

/// A tensor of the references' backward: under autodiff, tracked.
fn tracked<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Tensor<Autodiff<B>, D> {
    Tensor::from_inner(tensor).require_grad()
}

/// Backward from `y` with the gradient `dy`: that of `Σ y · dy`.
fn backward<B: Backend, const D: usize>(
    y: Tensor<Autodiff<B>, D>,
    dy: Tensor<B, D>,
) -> <Autodiff<B> as burn::tensor::backend::AutodiffBackend>::Gradients {
    (y * Tensor::from_inner(dy)).sum().backward()
}
