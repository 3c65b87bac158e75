//! The LoRA-fused linear: `y = x Wᵀ + scale · (x Aᵀ) Bᵀ` (arXiv:2106.09685, eq. 3, with `scale = lora_alpha / r`).
//!
//! `W` is frozen and never has a gradient. The graph is cut at the rank-r tensor `s = x Aᵀ` (arXiv:2510.00206): the big
//! product starts its accumulators from `scale · s Bᵀ`, so `x` and `y` are each touched once. Backward likewise:
//!
//! ```text
//! ds = scale · dy B      dB = scale · dyᵀ s      one read of dy
//! dA = dsᵀ x             dx = dy W + ds A        the same prologue as forward
//! ```
//!
//! Saved for backward: `x`, `s`, and the weights. Every product accumulates in `f32`.

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorPrimitive};
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops as AutodiffOps, OpsKind};

use super::{Kernels, Ops};

/// One LoRA adapter of one linear layer, as burn tensors.
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

/// [`Lora`] as a runtime's kernels see it.
#[derive(Debug, Clone)]
pub struct LoraPrimitive<B: Backend> {
    /// `[r, in]`
    pub a: FloatTensor<B>,
    /// `[out, r]`
    pub b: FloatTensor<B>,
    /// `lora_alpha / r`
    pub scale: f32,
}

/// What backward gives the adapter.
#[derive(Debug, Clone)]
pub struct LoraGrads<B: Backend> {
    /// Gradient of the rank-r tensor, `[tokens, r]`; [`Kernels::lora_linear_backward_input`] goes on from it.
    pub ds: FloatTensor<B>,
    /// `[r, in]`
    pub da: FloatTensor<B>,
    /// `[out, r]`
    pub db: FloatTensor<B>,
}

/// Computes `x Wᵀ`, plus `scale · (x Aᵀ) Bᵀ` where there is an adapter.
///
/// # Shapes
/// - `x`: `[tokens, in]`   - `weight`: `[out, in]`   - output: `[tokens, out]`
///
/// # Panics
/// If the shapes do not fit each other.
pub fn lora_linear<B: Ops>(x: Tensor<B, 2>, weight: Tensor<B, 2>, lora: Option<&Lora<B>>) -> Tensor<B, 2> {
    check_shapes(&x, &weight, lora);
    let lora = lora.map(|lora| LoraPrimitive {
        a: primitive(lora.a.clone()),
        b: primitive(lora.b.clone()),
        scale: lora.scale,
    });
    tensor(B::lora_linear(primitive(x), primitive(weight), lora))
}

/// [`lora_linear`] in plain burn tensors: three products and a sum. Differentiable by burn's own autodiff.
pub fn lora_linear_reference<B: Backend>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    lora: Option<&Lora<B>>,
) -> Tensor<B, 2> {
    check_shapes(&x, &weight, lora);
    let y = x.clone().matmul(weight.transpose());
    match lora {
        Some(lora) => {
            let s = x.matmul(lora.a.clone().transpose());
            y + s.matmul(lora.b.clone().transpose()) * lora.scale
        }
        None => y,
    }
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

/// [`Kernels::lora_linear_forward`] in plain burn tensors: `(y, s)`.
pub(super) fn forward_reference<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    lora: Option<LoraPrimitive<B>>,
) -> (FloatTensor<B>, Option<FloatTensor<B>>) {
    let (x, weight) = (tensor::<B>(x), tensor::<B>(weight));
    let y = x.clone().matmul(weight.transpose());
    match lora {
        Some(lora) => {
            let s = x.matmul(tensor::<B>(lora.a).transpose());
            let y = y + s.clone().matmul(tensor::<B>(lora.b).transpose() * lora.scale);
            (primitive(y), Some(primitive(s)))
        }
        None => (primitive(y), None),
    }
}

/// [`Kernels::lora_linear_backward_lora`] in plain burn tensors.
pub(super) fn backward_lora_reference<B: Backend>(
    dy: FloatTensor<B>,
    x: FloatTensor<B>,
    s: FloatTensor<B>,
    lora: LoraPrimitive<B>,
) -> LoraGrads<B> {
    let (dy, x, s) = (tensor::<B>(dy), tensor::<B>(x), tensor::<B>(s));
    let ds = dy.clone().matmul(tensor::<B>(lora.b) * lora.scale);
    let db = dy.transpose().matmul(s * lora.scale);
    let da = ds.clone().transpose().matmul(x);
    LoraGrads { ds: primitive(ds), da: primitive(da), db: primitive(db) }
}

/// [`Kernels::lora_linear_backward_input`] in plain burn tensors.
pub(super) fn backward_input_reference<B: Backend>(
    dy: FloatTensor<B>,
    weight: FloatTensor<B>,
    ds_a: Option<(FloatTensor<B>, FloatTensor<B>)>,
) -> FloatTensor<B> {
    let dx = tensor::<B>(dy).matmul(tensor::<B>(weight));
    primitive(match ds_a {
        Some((ds, a)) => dx + tensor::<B>(ds).matmul(tensor::<B>(a)),
        None => dx,
    })
}

fn tensor<B: Backend>(primitive: FloatTensor<B>) -> Tensor<B, 2> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

fn primitive<B: Backend>(tensor: Tensor<B, 2>) -> FloatTensor<B> {
    tensor.into_primitive().tensor()
}

/// Backward of a linear layer with an adapter; parents `x`, `a`, `b`.
#[derive(Debug)]
struct LoraLinearBackward;

/// What [`LoraLinearBackward`] keeps. The frozen weight is a raw primitive: it never is a node of the graph.
#[derive(Debug, Clone)]
struct LoraLinearState<B: Backend> {
    x: FloatTensor<B>,
    s: FloatTensor<B>,
    weight: FloatTensor<B>,
    lora: LoraPrimitive<B>,
}

impl<B: Kernels> Backward<B, 3> for LoraLinearBackward {
    type State = LoraLinearState<B>;

    fn backward(
        self,
        ops: AutodiffOps<Self::State, 3>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let [node_x, node_a, node_b] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let LoraLinearState { x, s, weight, lora } = ops.state;
        let a = lora.a.clone();
        let LoraGrads { ds, da, db } = B::lora_linear_backward_lora(dy.clone(), x, s, lora);
        if let Some(node) = node_a {
            grads.register::<B>(node.id, da);
        }
        if let Some(node) = node_b {
            grads.register::<B>(node.id, db);
        }
        // The first layer's input needs no gradient: its product with W would be the step's dearest wasted one.
        if let Some(node) = node_x {
            grads.register::<B>(node.id, B::lora_linear_backward_input(dy, weight, Some((ds, a))));
        }
    }
}

/// Backward of a frozen linear layer; parent `x`.
#[derive(Debug)]
struct LinearBackward;

impl<B: Kernels> Backward<B, 1> for LinearBackward {
    type State = FloatTensor<B>;

    fn backward(
        self,
        ops: AutodiffOps<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let [node_x] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        if let Some(node) = node_x {
            grads.register::<B>(node.id, B::lora_linear_backward_input(dy, ops.state, None));
        }
    }
}

/// [`Ops::lora_linear`] under autodiff.
pub(super) fn lora_linear_autodiff<B: Kernels, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    weight: FloatTensor<Autodiff<B, C>>,
    lora: Option<LoraPrimitive<Autodiff<B, C>>>,
) -> FloatTensor<Autodiff<B, C>> {
    let weight = weight.primitive;
    let Some(lora) = lora else {
        let (y, _) = B::lora_linear_forward(x.primitive.clone(), weight.clone(), None);
        return match LinearBackward.prepare::<C>([x.node.clone()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(weight, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        };
    };
    let nodes = [x.node.clone(), lora.a.node.clone(), lora.b.node.clone()];
    let lora = LoraPrimitive { a: lora.a.primitive, b: lora.b.primitive, scale: lora.scale };
    let (y, s) = B::lora_linear_forward(x.primitive.clone(), weight.clone(), Some(lora.clone()));
    match (LoraLinearBackward.prepare::<C>(nodes).compute_bound().stateful(), s) {
        (OpsKind::Tracked(prep), Some(s)) => {
            prep.finish(LoraLinearState { x: x.primitive, s, weight, lora }, y)
        }
        (OpsKind::Tracked(_), None) => unreachable!("a forward with an adapter gives the rank-r tensor"),
        (OpsKind::UnTracked(prep), _) => prep.finish(y),
    }
}
