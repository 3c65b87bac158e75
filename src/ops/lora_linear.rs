//! The LoRA-fused linear: `y = x Wᵀ + scale · (x Aᵀ) Bᵀ` (arXiv:2106.09685, eq. 3, with `scale = lora_alpha / r`).
//!
//! `W` is frozen and never has a gradient. The graph is cut at the rank-r tensor `s = x Aᵀ` (arXiv:2510.00206): the big
//! product starts its accumulators from `scale · s Bᵀ`, so that `y` is touched once. Backward likewise:
//!
//! ```text
//! ds = scale · dy B      dB = scale · dyᵀ s      one read of dy on software adapters, for small ranks
//! dA = dsᵀ x             dx = dy W + ds A        the same prologue as forward
//! ```
//!
//! Each rank-r tensor and each `dA` is a thin product of `x`. Those of layers of one input can be made as one, so [`lora_rank_r`] and
//! [`lora_backward_a`] take the adapters of all of them, and [`lora_backward_b`] does, as what is around its products is small.
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

/// Where the gradient by `x` goes.
#[derive(Debug, Clone)]
pub enum InputGrad<B: Backend> {
    /// Into a tensor of its own, in this dtype.
    New(DType),
    /// It is added to `[tokens, in]`, in its dtype.
    AddTo(Tensor<B, 2>),
}

/// The gradient by a layer's output, and what its adapter's gradients are made from besides.
#[derive(Debug, Clone)]
pub struct LoraOutputGrad<'a, B: Backend> {
    /// `[tokens, out]`
    pub dy: Tensor<B, 2>,
    /// The rank-r tensor of forward, `[tokens, r]`.
    pub s: Tensor<B, 2>,
    /// The adapter.
    pub lora: &'a Lora<B>,
}

/// What the gradient by a layer's output gives its adapter; [`lora_backward_a`] and [`lora_linear_backward`] go on from there.
#[derive(Debug, Clone)]
pub struct LoraGrads<B: Backend> {
    /// By the rank-r tensor, `[tokens, r]`.
    pub ds: Tensor<B, 2>,
    /// `[out, r]`
    pub db: Tensor<B, 2>,
}

/// Computes `residual + x Wᵀ + scale · s Bᵀ`, without the terms that are not there.
///
/// # Shapes
/// - `x`: `[tokens, in]`   - `weight`: `[out, in]`   - `residual`, output: `[tokens, out]`, in the residual's dtype, or `x`'s without
/// - `adapter`: with its rank-r tensor, `[tokens, r]`, of [`lora_rank_r`]
///
/// # Panics
/// If the shapes do not fit each other.
pub fn lora_linear<B: Kernels>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    adapter: Option<(&Lora<B>, Tensor<B, 2>)>,
    residual: Option<Tensor<B, 2>>,
) -> Tensor<B, 2> {
    let ([tokens, n_in], [n_out, w_in]) = (x.dims(), weight.dims());
    assert_eq!(n_in, w_in, "lora_linear: x has {n_in} columns, the weight has {w_in}");
    if let Some((lora, s)) = &adapter {
        check_adapter(lora, [n_out, n_in], s, tokens);
    }
    if let Some(residual) = &residual {
        assert_eq!(residual.dims(), [tokens, n_out], "lora_linear: shape of the residual");
    }
    B::lora_linear_forward(x, weight, adapter, residual)
}

/// Computes the rank-r tensors of layers whose input is the same: `x Aᵀ`, `[tokens, in] -> [tokens, r]`, for each adapter.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn lora_rank_r<B: Kernels>(x: Tensor<B, 2>, loras: &[&Lora<B>]) -> Vec<Tensor<B, 2>> {
    for lora in loras {
        assert_eq!(x.dims()[1], lora.a.dims()[1], "lora_linear: columns of x against lora_A");
    }
    if loras.is_empty() { Vec::new() } else { B::lora_rank_r(x, loras) }
}

/// The gradient by the output of a layer with an input in this dtype, as backward's products take it: for bf16 rounded to it, as in
/// PyTorch; in f16, where small numbers would be lost, as it is. Any shape.
pub fn output_grad<B: Kernels>(dy: Tensor<B, 2>, dtype: DType) -> Tensor<B, 2> {
    if dtype == DType::BF16 { cast(dy, dtype) } else { dy }
}

/// Computes `ds = scale · dy B` and `dB = scale · dyᵀ s` of layers, which need have nothing in common.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn lora_backward_b<B: Kernels>(layers: &[LoraOutputGrad<'_, B>]) -> Vec<LoraGrads<B>> {
    for LoraOutputGrad { dy, s, lora } in layers {
        let ([tokens, n_out], [_, r]) = (dy.dims(), lora.b.dims());
        assert_eq!(lora.b.dims(), [n_out, r], "lora_linear: shape of lora_B against that of the gradient");
        assert_eq!(s.dims(), [tokens, r], "lora_linear: shape of the rank-r tensor against [tokens, r]");
    }
    let grads = if layers.is_empty() { Vec::new() } else { B::lora_backward_b(layers) };
    assert_eq!(grads.len(), layers.len(), "lora_linear: gradients of adapters");
    grads
}

/// Computes `dA = dsᵀ x` of layers whose input is the same, from the gradients by their rank-r tensors.
///
/// # Shapes
/// - `x`: `[tokens, in]`   - `ds`: `[tokens, r]` each   - outputs: `[r, in]`
///
/// # Panics
/// If the shapes do not fit each other.
pub fn lora_backward_a<B: Kernels>(x: Tensor<B, 2>, ds: &[Tensor<B, 2>]) -> Vec<Tensor<B, 2>> {
    for ds in ds {
        assert_eq!(
            x.dims()[0],
            ds.dims()[0],
            "lora_linear: rows of x against the gradient by the rank-r tensor"
        );
    }
    let das = if ds.is_empty() { Vec::new() } else { B::lora_backward_a(x, ds) };
    assert_eq!(das.len(), ds.len(), "lora_linear: gradients of adapters");
    das
}

/// Computes the gradient by `x`, `dy W + ds A`, with that by the adapter's rank-r tensor where there is an adapter.
///
/// # Shapes
/// - `dy`: `[tokens, out]`   - `weight`: `[out, in]`   - `ds`: `[tokens, r]`   - output: `[tokens, in]`
///
/// # Panics
/// If the shapes do not fit each other.
pub fn lora_linear_backward<B: Kernels>(
    dy: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    adapter: Option<(&Lora<B>, Tensor<B, 2>)>,
    input: InputGrad<B>,
) -> Tensor<B, 2> {
    let ([tokens, n_out], [w_out, n_in]) = (dy.dims(), weight.dims());
    assert_eq!(n_out, w_out, "lora_linear: the gradient has {n_out} columns, the weight gives {w_out}");
    if let Some((lora, ds)) = &adapter {
        check_adapter(lora, [n_out, n_in], ds, tokens);
    }
    let (sum, dtype) = match input {
        InputGrad::New(dtype) => (None, dtype),
        InputGrad::AddTo(sum) => {
            assert_eq!(sum.dims(), [tokens, n_in], "lora_linear: shape of what the gradient is added to");
            let dtype = sum.dtype();
            (Some(sum), dtype)
        }
    };
    let ds_a = adapter.map(|(lora, ds)| (ds, lora.a.clone()));
    B::lora_linear_backward_input(dy, weight, ds_a, sum, dtype)
}

/// The output of [`lora_linear`] in plain burn tensors: three products and sums. Differentiable by burn's own autodiff.
pub fn lora_linear_reference<B: Backend>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    lora: Option<&Lora<B>>,
    residual: Option<Tensor<B, 2>>,
) -> Tensor<B, 2> {
    let adapter = lora.map(|lora| (lora, rank_r_reference(x.clone(), lora)));
    forward_reference(x, weight, adapter, residual)
}

/// Holds an adapter and a rank-r tensor, or a gradient by it, to the layer's shape.
fn check_adapter<B: Backend>(lora: &Lora<B>, [n_out, n_in]: [usize; 2], s: &Tensor<B, 2>, tokens: usize) {
    let r = lora.a.dims()[0];
    assert_eq!(lora.a.dims(), [r, n_in], "lora_linear: shape of lora_A against [r, in]");
    assert_eq!(lora.b.dims(), [n_out, r], "lora_linear: shape of lora_B against [out, r]");
    assert_eq!(s.dims(), [tokens, r], "lora_linear: shape of the rank-r tensor against [tokens, r]");
}

/// [`Kernels::lora_rank_r`] of one adapter in plain burn tensors.
pub(super) fn rank_r_reference<B: Backend>(x: Tensor<B, 2>, lora: &Lora<B>) -> Tensor<B, 2> {
    to_f32(x).matmul(lora.a.clone().transpose())
}

/// [`Kernels::lora_linear_forward`] in plain burn tensors.
pub(super) fn forward_reference<B: Backend>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    adapter: Option<(&Lora<B>, Tensor<B, 2>)>,
    residual: Option<Tensor<B, 2>>,
) -> Tensor<B, 2> {
    let dtype = residual.as_ref().map_or(x.dtype(), Tensor::dtype);
    let mut y = to_f32(x).matmul(to_f32(weight).transpose());
    if let Some((lora, s)) = adapter {
        y = y + s.matmul(lora.b.clone().transpose() * lora.scale);
    }
    if let Some(residual) = residual {
        y = to_f32(residual) + y;
    }
    cast(y, dtype)
}

/// [`Kernels::lora_backward_b`] of one layer in plain burn tensors.
pub(super) fn backward_b_reference<B: Backend>(layer: &LoraOutputGrad<'_, B>) -> LoraGrads<B> {
    let LoraOutputGrad { dy, s, lora } = layer.clone();
    let dy = to_f32(dy);
    let ds = dy.clone().matmul(lora.b.clone() * lora.scale);
    let db = dy.transpose().matmul(s * lora.scale);
    LoraGrads { ds, db }
}

/// [`Kernels::lora_backward_a`] of one layer in plain burn tensors.
pub(super) fn backward_a_reference<B: Backend>(x: Tensor<B, 2>, ds: Tensor<B, 2>) -> Tensor<B, 2> {
    ds.transpose().matmul(to_f32(x))
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
