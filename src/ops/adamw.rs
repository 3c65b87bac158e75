//! AdamW over the adapter's tensors and their gradients' global norm, in `f32` as PyTorch computes them.
//!
//! ```text
//! norm = sqrt(Σ over all tensors of g²)          factor = min(1, max_grad_norm / (norm + 1e-6))     torch.nn.utils.clip_grad_norm_
//! g ← factor · g      m ← β1 m + (1 − β1) g      v ← β2 v + (1 − β2) g²                             arXiv:1711.05101
//! p ← p (1 − lr · decay) − lr · (m / (1 − β1ᵗ)) / (sqrt(v / (1 − β2ᵗ)) + ε)                          torch.optim.AdamW
//! ```
//!
//! Gradients of a loss that was scaled are divided by its scale first, and so is their norm.
//!
//! The norm stays on the device, so that a step waits for it only once, at its end. A norm that is not finite leaves everything as
//! it is.

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::tensor::backend::Backend;
use burn::tensor::{Bool, DType, Shape, Tensor};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::cube::{THREADS, arrays, bytes, cube_sum, empty, lane_sum, one_thread_each, owned, vector_width};
use super::{Kernels, profile};

/// One step's settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// The step's learning rate.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled decay, times the learning rate.
    pub weight_decay: f64,
    /// Largest global norm of the gradients; 0 for no clipping.
    pub max_grad_norm: f64,
    /// The update's number, from 1: `t` of the bias corrections.
    pub t: usize,
    /// What the loss was multiplied with before backward; 1 for nothing.
    pub loss_scale: f64,
}

/// Computes the global norm of the gradients, `[1]`.
///
/// # Panics
/// If there are none.
pub fn grad_norm<B: Kernels>(grads: &[Tensor<B, 2>]) -> Tensor<B, 1> {
    assert!(!grads.is_empty(), "grad_norm: no gradients");
    B::grad_norm(grads)
}

/// Updates one tensor: the parameter and its first and second moment.
///
/// # Shapes
/// - `parameter`, `grad`, `moments`: the same   - `norm`: `[1]`, of [`grad_norm`]
///
/// # Panics
/// If shapes differ.
pub fn adamw<B: Kernels>(
    parameter: Tensor<B, 2>,
    grad: Tensor<B, 2>,
    moments: [Tensor<B, 2>; 2],
    norm: Tensor<B, 1>,
    step: &AdamWStep,
) -> (Tensor<B, 2>, [Tensor<B, 2>; 2]) {
    for t in [&grad, &moments[0], &moments[1]] {
        assert_eq!(t.dims(), parameter.dims(), "adamw: shape against the parameter's");
    }
    B::adamw(parameter, grad, moments, norm, step)
}

/// [`grad_norm`] in plain burn tensors.
pub fn grad_norm_reference<B: Backend>(grads: &[Tensor<B, 2>]) -> Tensor<B, 1> {
    Tensor::cat(grads.iter().map(|g| (g.clone() * g.clone()).sum()).collect(), 0).sum().sqrt()
}

/// [`adamw`] in plain burn tensors.
pub fn adamw_reference<B: Backend>(
    parameter: Tensor<B, 2>,
    grad: Tensor<B, 2>,
    [m, v]: [Tensor<B, 2>; 2],
    norm: Tensor<B, 1>,
    step: &AdamWStep,
) -> (Tensor<B, 2>, [Tensor<B, 2>; 2]) {
    let &AdamWStep { learning_rate, beta1, beta2, epsilon, weight_decay, max_grad_norm, t, loss_scale } =
        step;
    let shape = parameter.dims();
    let is_finite: Tensor<B, 2, Bool> = norm.clone().is_finite().unsqueeze::<2>().expand(shape);
    let (grad, norm) = (grad / loss_scale, norm / loss_scale);
    let grad = match max_grad_norm > 0.0 {
        true => grad * ((norm + 1e-6).recip() * max_grad_norm).clamp_max(1.0).unsqueeze::<2>(),
        false => grad,
    };
    let correction1 = 1.0 - beta1.powi(t as i32);
    let correction2 = 1.0 - beta2.powi(t as i32);
    let new_m = m.clone() * beta1 + grad.clone() * (1.0 - beta1);
    let new_v = v.clone() * beta2 + grad.clone() * grad * (1.0 - beta2);
    let denominator = new_v.clone().sqrt() / correction2.sqrt() + epsilon;
    let updated = parameter.clone() * (1.0 - learning_rate * weight_decay)
        - new_m.clone() / denominator * (learning_rate / correction1);
    let chosen = |old: Tensor<B, 2>, new: Tensor<B, 2>| old.mask_where(is_finite.clone(), new);
    (chosen(parameter, updated), [chosen(m, new_m), chosen(v, new_v)])
}

/// Gradients whose squares one launch sums. With the sums and the launch's sizes these are the eight buffers of every device.
const GRADS: usize = 6;
/// The most cubes that share a gradient.
const MAX_PARTS: u32 = 128;

/// Each cube sums the squares of a part of one gradient.
#[cube(launch_unchecked)]
fn squares_kernel<N: Size>(
    grads: &Sequence<Array<Vector<f32, N>>>,
    sums: &mut Array<f32>,
    lengths: &Sequence<usize>,
    first_sum: usize,
) {
    let mut squares = Vector::<f32, N>::new(0.0);
    #[unroll]
    for i in 0..grads.len() {
        if CUBE_POS_Y as usize == i {
            let grad = grads.index(i);
            let mut at = (CUBE_POS_X * THREADS + UNIT_POS) as usize;
            while at < lengths[i] {
                let g = grad[at];
                squares += g * g;
                at += (CUBE_COUNT_X * THREADS) as usize;
            }
        }
    }
    let sum = cube_sum::<Const<1>>(Vector::new(lane_sum::<N>(squares)), THREADS);
    if UNIT_POS == 0 {
        sums[first_sum + CUBE_POS] = sum[0];
    }
}

/// One cube takes the root of the sum of sums.
#[cube(launch_unchecked)]
fn norm_kernel(sums: &Array<f32>, norm: &mut Array<f32>, n_sums: usize) {
    let mut total = 0.0f32;
    let mut at = UNIT_POS as usize;
    while at < n_sums {
        total += sums[at];
        at += THREADS as usize;
    }
    let total = cube_sum::<Const<1>>(Vector::new(total), THREADS);
    if UNIT_POS == 0 {
        norm[0] = total[0].sqrt();
    }
}

#[cube(launch_unchecked)]
fn update_kernel<N: Size>(
    grad: &Array<Vector<f32, N>>,
    norm: &Array<f32>,
    parameter: &mut Array<Vector<f32, N>>,
    m: &mut Array<Vector<f32, N>>,
    v: &mut Array<Vector<f32, N>>,
    vectors: usize,
    max_grad_norm: f32,
    inverse_scale: f32,
    betas: (f32, f32),
    remainders: (f32, f32),
    decay: f32,
    step_size: f32,
    inverse_root_correction: f32,
    epsilon: f32,
    #[comptime] clips: bool,
) {
    // An exponent of ones is infinity or NaN. A comparison of floats is no test: compilers may take them for finite.
    let is_finite = u32::reinterpret(norm[0]) & 0x7f80_0000 != 0x7f80_0000;
    if is_finite && ABSOLUTE_POS < vectors {
        let mut g = grad[ABSOLUTE_POS] * Vector::new(inverse_scale);
        if comptime!(clips) {
            g *= Vector::new(min(max_grad_norm / (norm[0] * inverse_scale + 1e-6), 1.0f32));
        }
        let new_m = m[ABSOLUTE_POS] * Vector::new(betas.0) + g * Vector::new(remainders.0);
        let new_v = v[ABSOLUTE_POS] * Vector::new(betas.1) + g * g * Vector::new(remainders.1);
        let denominator = new_v.sqrt() * Vector::new(inverse_root_correction) + Vector::new(epsilon);
        let updated =
            parameter[ABSOLUTE_POS] * Vector::new(decay) - new_m / denominator * Vector::new(step_size);
        parameter[ABSOLUTE_POS] = updated;
        m[ABSOLUTE_POS] = new_m;
        v[ABSOLUTE_POS] = new_v;
    }
}

/// Launches the sums of squares, a few gradients at a time, and the root of their sum.
pub(super) fn launch_norm<R: CubeRuntime>(grads: Vec<CubeTensor<R>>) -> CubeTensor<R> {
    let like = grads[0].clone();
    let client = like.client.clone();
    let parts = |grads: &[CubeTensor<R>]| {
        let longest = grads.iter().map(|grad| grad.meta.num_elements()).max().unwrap_or(1);
        (longest as u32).div_ceil(4 * THREADS).clamp(1, MAX_PARTS)
    };
    let n_sums = grads.chunks(GRADS).map(|grads| grads.len() * parts(grads) as usize).sum();
    let sums = empty(&like, Shape::new([n_sums]), DType::F32);
    let norm = empty(&like, Shape::new([1]), DType::F32);
    let mut first_sum = 0;
    for grads in grads.chunks(GRADS) {
        let width = grads.iter().map(|grad| vector_width(grad.meta.num_elements())).min().unwrap_or(1);
        let mut lengths = SequenceArg::new();
        for grad in grads {
            lengths.push(grad.meta.num_elements() / width);
        }
        let bytes = bytes(&grads.iter().collect::<Vec<_>>());
        let elements = bytes / size_of::<f32>();
        let cubes = CubeCount::new_2d(parts(grads), grads.len() as u32);
        profile::kernel("grad_norm", 2 * elements, bytes, &client, || {
            #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
            // SAFETY: an index into a gradient is held against its length; there is a sum for every cube.
            unsafe {
                squares_kernel::launch_unchecked::<R>(
                    &client,
                    cubes,
                    CubeDim::new_1d(THREADS),
                    width,
                    arrays(grads),
                    sums.clone().into_array_arg(),
                    lengths,
                    first_sum,
                );
            }
        });
        first_sum += grads.len() * parts(grads) as usize;
    }
    profile::kernel("grad_norm root", n_sums, 4 * n_sums, &client, || {
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: an index is held against the number of sums.
        unsafe {
            norm_kernel::launch_unchecked::<R>(
                &client,
                CubeCount::new_single(),
                CubeDim::new_1d(THREADS),
                sums.into_array_arg(),
                norm.clone().into_array_arg(),
                n_sums,
            );
        }
    });
    norm
}

/// Launches the update of one tensor, in place: a tensor that others hold too is copied first.
pub(super) fn launch_update<R: CubeRuntime>(
    parameter: CubeTensor<R>,
    grad: CubeTensor<R>,
    [m, v]: [CubeTensor<R>; 2],
    norm: CubeTensor<R>,
    step: &AdamWStep,
) -> (CubeTensor<R>, [CubeTensor<R>; 2]) {
    let (parameter, m, v) = (owned(parameter), owned(m), owned(v));
    let &AdamWStep { learning_rate, beta1, beta2, epsilon, weight_decay, max_grad_norm, t, loss_scale } =
        step;
    let [correction1, correction2] = [beta1, beta2].map(|beta| 1.0 - beta.powi(t as i32));
    let client = parameter.client.clone();
    let width = vector_width(parameter.meta.num_elements());
    let vectors = parameter.meta.num_elements() / width;
    let (cubes, cube) = one_thread_each(&client, vectors);
    let bytes = bytes(&[&grad, &parameter, &m, &v, &parameter, &m, &v]);
    profile::kernel("adamw", 15 * vectors * width, bytes, &client, || {
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: the one index is held against the number of vectors, which all arrays have.
        unsafe {
            update_kernel::launch_unchecked::<R>(
                &client,
                cubes,
                cube,
                width,
                grad.into_array_arg(),
                norm.into_array_arg(),
                parameter.clone().into_array_arg(),
                m.clone().into_array_arg(),
                v.clone().into_array_arg(),
                vectors,
                max_grad_norm as f32,
                (1.0 / loss_scale) as f32,
                (beta1 as f32, beta2 as f32),
                ((1.0 - beta1) as f32, (1.0 - beta2) as f32),
                (1.0 - learning_rate * weight_decay) as f32,
                (learning_rate / correction1) as f32,
                (1.0 / correction2.sqrt()) as f32,
                epsilon as f32,
                max_grad_norm > 0.0,
            );
        }
    });
    (parameter, [m, v])
}
