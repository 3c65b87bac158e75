//! Rotary position embedding (arXiv:2104.09864) in Hugging Face's half-split layout.
//!
//! `[x1, x2] -> [x1 cos − x2 sin, x2 cos + x1 sin]` over the halves of a head, in `f32`. Backward is the rotation back.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use super::{Kernels, cast, to_f32};

/// Rotation angles' cosine and sine by row, `[tokens, head_dim / 2]` each, in `f32`.
#[derive(Debug, Clone)]
pub struct RopeTable<B: Backend> {
    /// `cos(position · frequency)`
    pub cos: Tensor<B, 2>,
    /// `sin(position · frequency)`
    pub sin: Tensor<B, 2>,
}

/// Rotates every head of every row.
///
/// # Shapes
/// - `x`, output: `[tokens, heads, head_dim]`, in one dtype
///
/// # Panics
/// If the table is of other rows or another head.
pub fn rope<B: Kernels>(x: Tensor<B, 3>, table: &RopeTable<B>) -> Tensor<B, 3> {
    check_shapes(&x, table);
    B::rope_forward(x, table)
}

/// Rotates a gradient back; shapes as [`rope`].
///
/// # Panics
/// As [`rope`].
pub fn rope_backward<B: Kernels>(dy: Tensor<B, 3>, table: &RopeTable<B>) -> Tensor<B, 3> {
    check_shapes(&dy, table);
    B::rope_backward(dy, table)
}

fn check_shapes<B: Backend>(x: &Tensor<B, 3>, table: &RopeTable<B>) {
    let [tokens, _, head_dim] = x.dims();
    for t in [&table.cos, &table.sin] {
        assert_eq!(t.dims(), [tokens, head_dim / 2], "rope: shape of the table");
    }
}

/// [`rope`] in plain burn tensors. Differentiable by burn's own autodiff.
pub fn rope_reference<B: Backend>(x: Tensor<B, 3>, cos: Tensor<B, 2>, sin: Tensor<B, 2>) -> Tensor<B, 3> {
    let (dtype, half) = (x.dtype(), x.dims()[2] / 2);
    let x = to_f32(x);
    let (x1, x2) = (x.clone().narrow(2, 0, half), x.narrow(2, half, half));
    let (cos, sin) = (cos.unsqueeze_dim::<3>(1), sin.unsqueeze_dim::<3>(1));
    let first = x1.clone() * cos.clone() - x2.clone() * sin.clone();
    let second = x2 * cos + x1 * sin;
    cast(Tensor::cat(vec![first, second], 2), dtype)
}
