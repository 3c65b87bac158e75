//! Rotary position embedding (arXiv:2104.09864) in Hugging Face's half-split layout.
//!
//! `[x1, x2] -> [x1 cos − x2 sin, x2 cos + x1 sin]` over the halves of a head, in `f32`. Backward is the rotation back.

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::cube::{bytes, one_thread_each, overwrite, vector_width};
use super::{Kernels, cast, profile, to_f32};

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
/// If the table is of other rows or another head, or a head is no two halves.
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
    assert!(head_dim % 2 == 0, "rope: a head of {head_dim} has no halves");
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

/// Rotates the pair of vectors of each thread, which stand at the same place of a head's two halves.
#[cube(launch_unchecked)]
fn rotate_kernel<F: Float, N: Size>(
    x: &Array<Vector<F, N>>,
    cos: &Array<Vector<f32, N>>,
    sin: &Array<Vector<f32, N>>,
    y: &mut Array<Vector<F, N>>,
    pairs: usize,
    direction: f32,
    #[comptime] heads: usize,
    #[comptime] half: usize,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS < pairs {
        let head = ABSOLUTE_POS / half;
        let place = ABSOLUTE_POS % half;
        let angle = head / heads * half + place;
        let first = 2 * half * head + place;
        let second = first + half;
        let x1 = Vector::<f32, N>::cast_from(x[first]);
        let x2 = Vector::<f32, N>::cast_from(x[second]);
        let cos = cos[angle];
        let sin = sin[angle] * Vector::new(direction);
        y[first] = Vector::cast_from(x1 * cos - x2 * sin);
        y[second] = Vector::cast_from(x2 * cos + x1 * sin);
    }
}

/// Launches the rotation by the table's angles times `direction`, 1 or -1; over `x` where it can.
pub(super) fn launch<R: CubeRuntime>(
    x: CubeTensor<R>,
    cos: CubeTensor<R>,
    sin: CubeTensor<R>,
    direction: f32,
) -> CubeTensor<R> {
    let (client, dtype) = (x.client.clone(), x.dtype);
    let [heads, head_dim] = [1, 2].map(|i| x.meta.shape()[i]);
    let width = vector_width(head_dim / 2);
    let (pairs, half) = (x.meta.num_elements() / (2 * width), head_dim / (2 * width));
    let (cubes, cube) = one_thread_each(&client, pairs);
    let bytes = bytes(&[&x, &cos, &sin, &x]);
    let y = overwrite(x, 0);
    profile::kernel("rope", 6 * pairs * width, bytes, &client, || {
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: a pair within the number of pairs gives two vectors of `x` and one of the table, whose shapes belong together.
        unsafe {
            rotate_kernel::launch_unchecked::<R>(
                &client,
                cubes,
                cube,
                width,
                y.input,
                cos.into_array_arg(),
                sin.into_array_arg(),
                y.output,
                pairs,
                direction,
                heads,
                half,
                dtype.into(),
            );
        }
    });
    y.tensor
}
