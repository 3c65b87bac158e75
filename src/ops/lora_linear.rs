//! The LoRA-fused linear: `y = x Wᵀ + scale · (x Aᵀ) Bᵀ` (arXiv:2106.09685, eq. 3, with `scale = lora_alpha / r`).
//!
//! `W` is frozen and never has a gradient. The graph is cut at the rank-r tensor `s = x Aᵀ` (arXiv:2510.00206): the big
//! product starts its accumulators from `scale · s Bᵀ`, so `x` and `y` are each touched once. Backward likewise:
//!
//! ```text
//! ds = scale · dy B      dB = scale · dyᵀ s      one read of dy on software adapters, for small ranks
//! dA = dsᵀ x             dx = dy W + ds A        the same prologue as forward
//! ```
//!
//! Forward may add a residual, and backward to what `dx` already sums, in the same pass. Saved for backward: `x` and `s`. `x`, `dy`
//! and the weight are `f32`, `f16` or `bf16`, each on its own, but that `dy` becomes `bf16` with `x`; the adapter, `s` and its gradients
//! are `f32`, and so are the sums of products.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use super::{Kernels, cast, to_f32};

/// One LoRA adapter of one linear layer, in `f32`.
///
/// # Shapes
/// - `a`: `[r, in]`   - `b`: `[out, r]` (PEFT's `lora_A.weight` and `lora_B.weight`)
#[derive(Debug, Clone)]
pub struct Lora<B: Backend> {
    /// The down projection.
    pub a: Tensor<B, 2>,
    /// The up projection.
    pub b: Tensor<B, 2>,
    /// `lora_alpha / r`.
    pub scale: f32,
}

/// What backward gives the adapter.
#[derive(Debug, Clone)]
pub struct LoraGrads<B: Backend> {
    /// Gradient of the rank-r tensor, `[tokens, r]`; the gradient by `x` goes on from it.
    pub ds: Tensor<B, 2>,
    /// `[r, in]`
    pub da: Tensor<B, 2>,
    /// `[out, r]`
    pub db: Tensor<B, 2>,
}

/// What is to become of the gradient by `x`.
#[derive(Debug, Clone)]
pub enum InputGrad<B: Backend> {
    /// Nothing below the layer learns: its product with `W` would be the step's dearest wasted one.
    Skip,
    /// A tensor of its own, in `x`'s dtype.
    New,
    /// Added to `[tokens, in]`, in its dtype.
    AddTo(Tensor<B, 2>),
}

impl<B: Backend> InputGrad<B> {
    /// Goes on from the gradient of another layer of the same input; where that was skipped, this is too.
    pub fn after(dx: Option<Tensor<B, 2>>) -> Self {
        dx.map_or(Self::Skip, Self::AddTo)
    }
}

/// What a layer's backward computes.
#[derive(Debug, Clone)]
pub struct LoraLinearGrads<B: Backend> {
    /// `[tokens, in]`, unless it was to be skipped.
    pub dx: Option<Tensor<B, 2>>,
    /// `[da, db]`, where there is an adapter.
    pub lora: Option<[Tensor<B, 2>; 2]>,
}

/// Computes `residual + x Wᵀ + scale · (x Aᵀ) Bᵀ`, without the terms that are not there, and the rank-r tensor `s = x Aᵀ`.
///
/// # Shapes
/// - `x`: `[tokens, in]`   - `weight`: `[out, in]`   - `residual`, output: `[tokens, out]`, in the residual's dtype, or `x`'s without
/// - `s`: `[tokens, r]`, there where an adapter is
///
/// # Panics
/// If the shapes do not fit each other.
pub fn lora_linear<B: Kernels>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    lora: Option<&Lora<B>>,
    residual: Option<Tensor<B, 2>>,
) -> (Tensor<B, 2>, Option<Tensor<B, 2>>) {
    check_shapes(&x, &weight, lora);
    if let Some(residual) = &residual {
        assert_eq!(residual.dims(), [x.dims()[0], weight.dims()[0]], "lora_linear: shape of the residual");
    }
    B::lora_linear_forward(x, weight, lora, residual)
}

/// Computes the rank-r tensor of [`lora_linear`] alone: `[tokens, in] -> [tokens, r]`.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn lora_rank_r<B: Kernels>(x: Tensor<B, 2>, lora: &Lora<B>) -> Tensor<B, 2> {
    assert_eq!(x.dims()[1], lora.a.dims()[1], "lora_linear: columns of x against lora_A");
    B::lora_rank_r(x, lora)
}

/// Computes the gradients from that of the output, `dy: [tokens, out]`, and what forward was given and gave. For `x` in bf16 `dy` is
/// rounded to it, as in PyTorch; in f16, where small numbers would be lost, it is taken as it is.
///
/// # Panics
/// If the shapes do not fit each other, or `s` is missing where there is an adapter.
pub fn lora_linear_backward<B: Kernels>(
    dy: Tensor<B, 2>,
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    lora: Option<&Lora<B>>,
    s: Option<Tensor<B, 2>>,
    input: InputGrad<B>,
) -> LoraLinearGrads<B> {
    check_shapes(&x, &weight, lora);
    assert_eq!(dy.dims(), [x.dims()[0], weight.dims()[0]], "lora_linear: shape of the gradient");
    let (sum, dtype) = match input {
        InputGrad::Skip => (None, None),
        InputGrad::New => (None, Some(x.dtype())),
        InputGrad::AddTo(sum) => {
            assert_eq!(sum.dims(), x.dims(), "lora_linear: shape of what the gradient is added to");
            let dtype = sum.dtype();
            (Some(sum), Some(dtype))
        }
    };
    // Once for all products, of which each reads half the bytes then.
    let dy = if x.dtype() == DType::BF16 { cast(dy, DType::BF16) } else { dy };
    let grads = lora.map(|lora| {
        let s = s.expect("lora_linear: forward with an adapter gives the rank-r tensor");
        B::lora_linear_backward_lora(dy.clone(), x, s, lora)
    });
    let dx = dtype.map(|dtype| {
        let ds_a = grads.as_ref().zip(lora).map(|(grads, lora)| (grads.ds.clone(), lora.a.clone()));
        B::lora_linear_backward_input(dy, weight, ds_a, sum, dtype)
    });
    LoraLinearGrads { dx, lora: grads.map(|grads| [grads.da, grads.db]) }
}

/// The output of [`lora_linear`] in plain burn tensors: three products and sums. Differentiable by burn's own autodiff.
pub fn lora_linear_reference<B: Backend>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    lora: Option<&Lora<B>>,
    residual: Option<Tensor<B, 2>>,
) -> Tensor<B, 2> {
    forward_reference(x, weight, lora, residual).0
}

fn check_shapes<B: Backend>(x: &Tensor<B, 2>, weight: &Tensor<B, 2>, lora: Option<&Lora<B>>) {
    let ([_, n_in], [n_out, w_in]) = (x.dims(), weight.dims());
    assert_eq!(n_in, w_in, "lora_linear: x has {n_in} columns, the weight has {w_in}");
    if let Some(Lora { a, b, .. }) = lora {
        let r = a.dims()[0];
        assert_eq!(a.dims(), [r, n_in], "lora_linear: shape of lora_A against [r, in]");
        assert_eq!(b.dims(), [n_out, r], "lora_linear: shape of lora_B against [out, r]");
    }
}

/// [`Kernels::lora_linear_forward`] in plain burn tensors.
pub(super) fn forward_reference<B: Backend>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    lora: Option<&Lora<B>>,
    residual: Option<Tensor<B, 2>>,
) -> (Tensor<B, 2>, Option<Tensor<B, 2>>) {
    let dtype = residual.as_ref().map_or(x.dtype(), Tensor::dtype);
    let x = to_f32(x);
    let mut y = x.clone().matmul(to_f32(weight).transpose());
    let s = lora.map(|lora| x.matmul(lora.a.clone().transpose()));
    if let (Some(lora), Some(s)) = (lora, &s) {
        y = y + s.clone().matmul(lora.b.clone().transpose() * lora.scale);
    }
    if let Some(residual) = residual {
        y = to_f32(residual) + y;
    }
    (cast(y, dtype), s)
}

/// [`Kernels::lora_linear_backward_lora`] in plain burn tensors.
pub(super) fn backward_lora_reference<B: Backend>(
    dy: Tensor<B, 2>,
    x: Tensor<B, 2>,
    s: Tensor<B, 2>,
    lora: &Lora<B>,
) -> LoraGrads<B> {
    let (dy, x) = (to_f32(dy), to_f32(x));
    let ds = dy.clone().matmul(lora.b.clone() * lora.scale);
    let db = dy.transpose().matmul(s * lora.scale);
    let da = ds.clone().transpose().matmul(x);
    LoraGrads { ds, da, db }
}

/// [`Kernels::lora_linear_backward_input`] in plain burn tensors.
pub(super) fn backward_input_reference<B: Backend>(
    dy: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    ds_a: Option<(Tensor<B, 2>, Tensor<B, 2>)>,
    sum: Option<Tensor<B, 2>>,
    dtype: DType,
) -> Tensor<B, 2> {
    let mut dx = to_f32(dy).matmul(to_f32(weight));
    if let Some((ds, a)) = ds_a {
        dx = dx + ds.matmul(a);
    }
    if let Some(sum) = sum {
        dx = to_f32(sum) + dx;
    }
    cast(dx, dtype)
}
