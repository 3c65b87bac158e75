//! SwiGLU: `h = silu(gate) · up`, `silu(x) = x σ(x)` (arXiv:2002.05202), in `f32`.
//!
//! Backward, with `σ = σ(gate)`: `dup = dh · gate σ` and `dgate = dh · up · σ (1 + gate (1 − σ))`.
//!
//! The product is where `f16` runs out first, so that an `f16` output saturates at its largest number. Gradients do not: an
//! infinity in them has to reach the norm that the optimizer looks at.

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::tensor::activation::{sigmoid, silu};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::cube::{bytes, one_thread_each, overwrite, vector_width};
use super::{Kernels, cast, profile, to_f32};

/// The largest `f16`.
const F16_MAX: f32 = 65_504.0;

/// Computes `silu(gate) · up`.
///
/// # Shapes
/// - all: `[tokens, intermediate]`, in one dtype
///
/// # Panics
/// If the shapes differ.
pub fn swiglu<B: Kernels>(gate: Tensor<B, 2>, up: Tensor<B, 2>) -> Tensor<B, 2> {
    assert_eq!(gate.dims(), up.dims(), "swiglu: shapes of gate and up");
    B::swiglu_forward(gate, up)
}

/// Computes `(dgate, dup)` from the output's gradient; shapes as [`swiglu`].
///
/// # Panics
/// If the shapes differ.
pub fn swiglu_backward<B: Kernels>(
    dh: Tensor<B, 2>,
    gate: Tensor<B, 2>,
    up: Tensor<B, 2>,
) -> (Tensor<B, 2>, Tensor<B, 2>) {
    assert_eq!(gate.dims(), up.dims(), "swiglu: shapes of gate and up");
    assert_eq!(gate.dims(), dh.dims(), "swiglu: shape of the gradient");
    B::swiglu_backward(dh, gate, up)
}

/// [`swiglu`] in plain burn tensors. Differentiable by burn's own autodiff.
pub fn swiglu_reference<B: Backend>(gate: Tensor<B, 2>, up: Tensor<B, 2>) -> Tensor<B, 2> {
    let dtype = gate.dtype();
    let h = silu(to_f32(gate)) * to_f32(up);
    cast(if dtype == DType::F16 { h.clamp(-F16_MAX, F16_MAX) } else { h }, dtype)
}

/// [`swiglu_backward`] in plain burn tensors.
pub fn swiglu_backward_reference<B: Backend>(
    dh: Tensor<B, 2>,
    gate: Tensor<B, 2>,
    up: Tensor<B, 2>,
) -> (Tensor<B, 2>, Tensor<B, 2>) {
    let dtype = gate.dtype();
    let (dh, gate, up) = (to_f32(dh), to_f32(gate), to_f32(up));
    let sigmoid = sigmoid(gate.clone());
    let dgate = dh.clone() * up * sigmoid.clone() * (gate.clone() * (-sigmoid.clone() + 1.0) + 1.0);
    (cast(dgate, dtype), cast(dh * gate * sigmoid, dtype))
}

#[cube]
fn logistic<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let one = Vector::<f32, N>::new(1.0);
    // A difference, as cubecl's CUDA has no sign for a vector.
    one / (one + (Vector::new(0.0) - x).exp())
}

#[cube(launch_unchecked)]
fn forward_kernel<F: Float, N: Size>(
    gate: &Array<Vector<F, N>>,
    up: &Array<Vector<F, N>>,
    h: &mut Array<Vector<F, N>>,
    vectors: usize,
    #[comptime] saturates: bool,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS < vectors {
        let gate = Vector::<f32, N>::cast_from(gate[ABSOLUTE_POS]);
        let mut product = gate * logistic::<N>(gate) * Vector::<f32, N>::cast_from(up[ABSOLUTE_POS]);
        if comptime!(saturates) {
            // Comparisons instead of a clamp, which may turn NaN into a number.
            let most = Vector::<f32, N>::new(F16_MAX);
            let least = Vector::<f32, N>::new(-F16_MAX);
            product = select_many(product.greater_than(most), most, product);
            product = select_many(product.less_than(least), least, product);
        }
        h[ABSOLUTE_POS] = Vector::cast_from(product);
    }
}

#[cube(launch_unchecked)]
fn backward_kernel<F: Float, N: Size>(
    dh: &Array<Vector<F, N>>,
    gate: &Array<Vector<F, N>>,
    up: &Array<Vector<F, N>>,
    dgate: &mut Array<Vector<F, N>>,
    dup: &mut Array<Vector<F, N>>,
    vectors: usize,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS < vectors {
        let one = Vector::<f32, N>::new(1.0);
        let dh = Vector::<f32, N>::cast_from(dh[ABSOLUTE_POS]);
        let gate = Vector::<f32, N>::cast_from(gate[ABSOLUTE_POS]);
        let up = Vector::<f32, N>::cast_from(up[ABSOLUTE_POS]);
        let sigmoid = logistic::<N>(gate);
        dgate[ABSOLUTE_POS] = Vector::cast_from(dh * up * sigmoid * (one + gate * (one - sigmoid)));
        dup[ABSOLUTE_POS] = Vector::cast_from(dh * gate * sigmoid);
    }
}

/// Launches forward, over `gate` where it can.
pub(super) fn launch_forward<R: CubeRuntime>(gate: CubeTensor<R>, up: CubeTensor<R>) -> CubeTensor<R> {
    assert_eq!(gate.dtype, up.dtype, "swiglu: types of gate and up");
    let (client, dtype, elements) = (gate.client.clone(), gate.dtype, gate.meta.num_elements());
    let width = vector_width(elements);
    let (cubes, cube) = one_thread_each(&client, elements / width);
    let bytes = bytes(&[&gate, &up, &gate]);
    let h = overwrite(gate, 0);
    profile::kernel("swiglu forward", 6 * elements, bytes, &client, || {
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: the one index is held against the number of vectors, which all arrays have.
        unsafe {
            forward_kernel::launch_unchecked::<R>(
                &client,
                cubes,
                cube,
                width,
                h.input,
                up.into_array_arg(),
                h.output,
                elements / width,
                dtype == DType::F16,
                dtype.into(),
            );
        }
    });
    h.tensor
}

/// Launches backward, over `gate` and `up` where it can.
pub(super) fn launch_backward<R: CubeRuntime>(
    dh: CubeTensor<R>,
    gate: CubeTensor<R>,
    up: CubeTensor<R>,
) -> (CubeTensor<R>, CubeTensor<R>) {
    assert!(dh.dtype == gate.dtype && gate.dtype == up.dtype, "swiglu: types of dh, gate and up");
    let (client, dtype, elements) = (gate.client.clone(), gate.dtype, gate.meta.num_elements());
    let width = vector_width(elements);
    let (cubes, cube) = one_thread_each(&client, elements / width);
    let bytes = bytes(&[&dh, &gate, &up, &gate, &up]);
    let (gate, up) = (overwrite(gate, 1), overwrite(up, 2));
    profile::kernel("swiglu backward", 11 * elements, bytes, &client, || {
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: the one index is held against the number of vectors, which all arrays have.
        unsafe {
            backward_kernel::launch_unchecked::<R>(
                &client,
                cubes,
                cube,
                width,
                dh.into_array_arg(),
                gate.input,
                up.input,
                gate.output,
                up.output,
                elements / width,
                dtype.into(),
            );
        }
    });
    (gate.tensor, up.tensor)
}
