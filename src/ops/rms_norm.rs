//! RMSNorm: `y = x / sqrt(mean(x²) + eps) · weight` over the last dimension (arXiv:1910.07467), in `f32`.
//!
//! Backward, with `r = 1 / sqrt(mean(x²) + eps)` and `g = dy · weight`: `dx = r g − x r³ mean(g · x)`. The weight is frozen. What
//! the norm reads is the residual stream, so its gradient goes on top of the one that passes the norm by: `sum`.

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::cube::{
    THREADS, bytes, cube_sum, empty, is_software, lane_sum, one_cube_each, overwrite, vector_width,
};
use super::{Kernels, backward, cast, profile, to_f32, tracked};

/// Normalizes every row by its root mean square.
///
/// # Shapes
/// - `x`: `[tokens, hidden]` in `f32`   - `weight`: `[hidden]` in `f32`   - output: `[tokens, hidden]` in `dtype`
///
/// # Panics
/// If the weight's length is not that of a row.
pub fn rms_norm<B: Kernels>(x: Tensor<B, 2>, weight: Tensor<B, 1>, eps: f64, dtype: DType) -> Tensor<B, 2> {
    check_shapes(&x, &weight);
    B::rms_norm_forward(x, weight, eps, dtype)
}

/// Computes `sum + ∂/∂x`, `[tokens, hidden]` in `f32`, from the gradient `dy` of the norm's output.
///
/// # Panics
/// If a shape differs from forward's.
pub fn rms_norm_backward<B: Kernels>(
    dy: Tensor<B, 2>,
    x: Tensor<B, 2>,
    weight: Tensor<B, 1>,
    eps: f64,
    sum: Option<Tensor<B, 2>>,
) -> Tensor<B, 2> {
    check_shapes(&x, &weight);
    for t in [Some(&dy), sum.as_ref()].into_iter().flatten() {
        assert_eq!(t.dims(), x.dims(), "rms_norm: shape of a gradient");
    }
    B::rms_norm_backward(dy, x, weight, eps, sum)
}

fn check_shapes<B: Backend>(x: &Tensor<B, 2>, weight: &Tensor<B, 1>) {
    assert_eq!(x.dims()[1], weight.dims()[0], "rms_norm: length of a row against the weight's");
}

/// [`rms_norm`] in plain burn tensors. Differentiable by burn's own autodiff.
pub fn rms_norm_reference<B: Backend>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 1>,
    eps: f64,
    dtype: DType,
) -> Tensor<B, 2> {
    let x = to_f32(x);
    let mean_square = (x.clone() * x.clone()).mean_dim(1);
    cast(x * (mean_square + eps).sqrt().recip() * weight.unsqueeze(), dtype)
}

/// [`rms_norm_backward`] in plain burn tensors.
pub fn rms_norm_backward_reference<B: Backend>(
    dy: Tensor<B, 2>,
    x: Tensor<B, 2>,
    weight: Tensor<B, 1>,
    eps: f64,
    sum: Option<Tensor<B, 2>>,
) -> Tensor<B, 2> {
    let x = tracked(x);
    let y = rms_norm_reference(x.clone(), Tensor::from_inner(weight), eps, DType::F32);
    let dx = x.grad(&backward(y, to_f32(dy))).expect("the input is tracked");
    match sum {
        Some(sum) => sum + dx,
        None => dx,
    }
}

/// The most threads that share a row on a GPU.
pub const GPU_THREADS: u32 = THREADS;
/// The most threads that share a row on a software adapter, where barriers cost more than the row.
pub const SOFTWARE_THREADS: u32 = 16;

/// The most threads that share a row on this device.
pub(super) fn most_threads<R: CubeRuntime>(client: &ComputeClient<R>) -> u32 {
    if is_software(client) { SOFTWARE_THREADS } else { GPU_THREADS }
}

/// How a row is shared out over the threads of its cube.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct RowPlan {
    /// Elements that a thread loads at once.
    width: usize,
    /// Vectors of a row.
    vectors: usize,
    threads: u32,
    /// Vectors of a row that a thread has.
    steps: usize,
    /// Whether the loops over them are unrolled, which is what keeps vectors in registers.
    is_unrolled: bool,
    /// Whether a thread keeps its vectors, instead of loading them again for the second pass.
    is_held: bool,
}

impl RowPlan {
    /// Vectors that a thread has registers for; with [`GPU_THREADS`] this holds rows of 8192.
    const UNROLLED: usize = 8;
    /// Vectors that a thread of a software adapter keeps: in the first-level cache, which still beats loading
    /// them again. Unrolled loops over them would take minutes to compile.
    const HELD: usize = 64;

    fn new(hidden: usize, most_threads: u32) -> Self {
        let width = vector_width(hidden);
        let vectors = hidden / width;
        let threads = (vectors as u32).next_power_of_two().clamp(most_threads.min(32), most_threads);
        let steps = vectors.div_ceil(threads as usize);
        let is_unrolled = steps <= Self::UNROLLED;
        let is_held = is_unrolled || most_threads <= SOFTWARE_THREADS && steps <= Self::HELD;
        Self { width, vectors, threads, steps, is_unrolled, is_held }
    }
}

#[cube(launch_unchecked)]
fn forward_kernel<F: Float, N: Size>(
    x: &Array<Vector<f32, N>>,
    weight: &Array<Vector<f32, N>>,
    y: &mut Array<Vector<F, N>>,
    rows: usize,
    inverse_hidden: f32,
    eps: f32,
    #[comptime] plan: RowPlan,
    #[define(F)] _dtype: StorageType,
) {
    // Cubes past the last row go through the motions, as a barrier is for whole cubes only.
    let n_vectors = select(CUBE_POS < rows, plan.vectors, 0usize);
    let row = CUBE_POS * plan.vectors;
    let mut held = Array::<Vector<f32, N>>::new(comptime!(if plan.is_held { plan.steps } else { 1 }));
    let mut squares = Vector::<f32, N>::new(0.0);
    #[unroll(plan.is_unrolled)]
    for step in 0..plan.steps {
        let place = step * plan.threads as usize + UNIT_POS as usize;
        if place < n_vectors {
            let x = x[row + place];
            if comptime!(plan.is_held) {
                held[step] = x;
            }
            squares += x * x;
        }
    }
    let sum = cube_sum::<Const<1>>(Vector::new(lane_sum::<N>(squares)), plan.threads)[0];
    let r = Vector::<f32, N>::new((sum * inverse_hidden + eps).inverse_sqrt());
    #[unroll(plan.is_unrolled)]
    for step in 0..plan.steps {
        let place = step * plan.threads as usize + UNIT_POS as usize;
        if place < n_vectors {
            let x = if comptime!(plan.is_held) { held[step] } else { x[row + place] };
            y[row + place] = Vector::cast_from(x * r * weight[place]);
        }
    }
}

#[cube(launch_unchecked)]
fn backward_kernel<F: Float, N: Size>(
    dy: &Array<Vector<F, N>>,
    x: &Array<Vector<f32, N>>,
    weight: &Array<Vector<f32, N>>,
    sum: &Array<Vector<f32, N>>,
    dx: &mut Array<Vector<f32, N>>,
    rows: usize,
    inverse_hidden: f32,
    eps: f32,
    #[comptime] has_sum: bool,
    #[comptime] plan: RowPlan,
    #[define(F)] _dtype: StorageType,
) {
    let n_vectors = select(CUBE_POS < rows, plan.vectors, 0usize);
    let row = CUBE_POS * plan.vectors;
    let n_held = comptime!(if plan.is_held { plan.steps } else { 1 });
    let mut held_x = Array::<Vector<f32, N>>::new(n_held);
    let mut held_g = Array::<Vector<f32, N>>::new(n_held);
    let mut squares = Vector::<f32, N>::new(0.0);
    let mut products = Vector::<f32, N>::new(0.0);
    #[unroll(plan.is_unrolled)]
    for step in 0..plan.steps {
        let place = step * plan.threads as usize + UNIT_POS as usize;
        if place < n_vectors {
            let x = x[row + place];
            let g = Vector::<f32, N>::cast_from(dy[row + place]) * weight[place];
            if comptime!(plan.is_held) {
                held_x[step] = x;
                held_g[step] = g;
            }
            squares += x * x;
            products += g * x;
        }
    }
    let mut both = RuntimeCell::<Vector<f32, Const<2>>>::new(Vector::new(lane_sum::<N>(squares)));
    both.store_at(1, lane_sum::<N>(products));
    let sums = cube_sum::<Const<2>>(both.consume(), plan.threads);
    let r = (sums[0] * inverse_hidden + eps).inverse_sqrt();
    // In terms of x r, which is about 1, as r³ has no place in `f32` for large x.
    let mean = Vector::<f32, N>::new(sums[1] * inverse_hidden * r);
    let r = Vector::<f32, N>::new(r);
    #[unroll(plan.is_unrolled)]
    for step in 0..plan.steps {
        let place = step * plan.threads as usize + UNIT_POS as usize;
        if place < n_vectors {
            let at = row + place;
            let x = if comptime!(plan.is_held) { held_x[step] } else { x[at] };
            let g = if comptime!(plan.is_held) {
                held_g[step]
            } else {
                Vector::<f32, N>::cast_from(dy[at]) * weight[place]
            };
            let mut gradient = r * (g - x * r * mean);
            if comptime!(has_sum) {
                gradient += sum[at];
            }
            dx[at] = gradient;
        }
    }
}

/// Launches forward: a row a cube of at most `most_threads`, a power of two.
pub fn launch_forward<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    eps: f64,
    dtype: DType,
    most_threads: u32,
) -> CubeTensor<R> {
    let [rows, hidden] = [0, 1].map(|i| x.meta.shape()[i]);
    let plan = RowPlan::new(hidden, most_threads);
    let client = x.client.clone();
    let (cubes, cube) = one_cube_each(&client, rows, plan.threads);
    let y = empty(&x, x.meta.shape().clone(), dtype);
    let bytes = bytes(&[&x, &weight, &y]);
    profile::kernel("rms_norm forward", 4 * rows * hidden, bytes, &client, || {
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: a place is held against the vectors of a row, and the row against the number of rows.
        unsafe {
            forward_kernel::launch_unchecked::<R>(
                &client,
                cubes,
                cube,
                plan.width,
                x.into_array_arg(),
                weight.into_array_arg(),
                y.clone().into_array_arg(),
                rows,
                (1.0 / hidden as f64) as f32,
                eps as f32,
                plan,
                dtype.into(),
            );
        }
    });
    y
}

/// Launches backward: a row a cube of at most `most_threads`, a power of two; over `sum` where it can.
pub fn launch_backward<R: CubeRuntime>(
    dy: CubeTensor<R>,
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    eps: f64,
    sum: Option<CubeTensor<R>>,
    most_threads: u32,
) -> CubeTensor<R> {
    let [rows, hidden] = [0, 1].map(|i| x.meta.shape()[i]);
    let plan = RowPlan::new(hidden, most_threads);
    let (client, dtype, has_sum) = (x.client.clone(), dy.dtype, sum.is_some());
    let (cubes, cube) = one_cube_each(&client, rows, plan.threads);
    let bytes = bytes(&[&dy, &x, &weight, &x]) + sum.as_ref().map_or(0, |sum| bytes(&[sum]));
    // Without a sum its place is taken by `x`, which is held twice and so stays as it is.
    let dx = overwrite(sum.unwrap_or_else(|| x.clone()), 3);
    profile::kernel("rms_norm backward", 10 * rows * hidden, bytes, &client, || {
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: a place is held against the vectors of a row, and the row against the number of rows.
        unsafe {
            backward_kernel::launch_unchecked::<R>(
                &client,
                cubes,
                cube,
                plan.width,
                dy.into_array_arg(),
                x.into_array_arg(),
                weight.into_array_arg(),
                dx.input,
                dx.output,
                rows,
                (1.0 / hidden as f64) as f32,
                eps as f32,
                has_sum,
                plan,
                dtype.into(),
            );
        }
    });
    dx.tensor
}
