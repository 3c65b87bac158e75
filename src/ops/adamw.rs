//! AdamW over the adapter's tensors and their gradients' global norm, in `f32` as PyTorch computes them.
//!
//! ```text
//! norm = sqrt(Σ over all tensors of g²)          factor = min(1, max_grad_norm / (norm + 1e-6))     torch.nn.utils.clip_grad_norm_
//! g ← factor · g      m ← β1 m + (1 − β1) g      v ← β2 v + (1 − β2) g²                             arXiv:1711.05101
//! p ← p (1 − lr · decay) − lr · (m / (1 − β1ᵗ)) / (sqrt(v / (1 − β2ᵗ)) + ε)                          torch.optim.AdamW
//! ```
//!
//! Gradients of a loss that was scaled are divided by its scale first, and so is their norm. Those of a step's micro-batches are added
//! up before.
//!
//! The norm stays on the device, so that a step waits for it only once, at its end. A norm that is not finite leaves everything as
//! it is.

use burn::cubecl;
use burn::cubecl::client::ComputeClient;
use burn::cubecl::prelude::*;
use burn::tensor::backend::Backend;
use burn::tensor::{Bool, DType, Shape, Tensor};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::cube::{THREADS, arrays, bytes, cube_sum, empty, lane_sum, owned, vector_width};
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

/// Updates tensors: the parameters and their first and second moments, in the order of the parameters.
///
/// # Shapes
/// - of each parameter its gradient and its moments have that of the parameter   - `norm`: `[1]`, of [`grad_norm`]
///
/// # Panics
/// If numbers of tensors differ, or shapes.
pub fn adamw<B: Kernels>(
    parameters: Vec<Tensor<B, 2>>,
    grads: Vec<Tensor<B, 2>>,
    moments: [Vec<Tensor<B, 2>>; 2],
    norm: Tensor<B, 1>,
    step: &AdamWStep,
) -> (Vec<Tensor<B, 2>>, [Vec<Tensor<B, 2>>; 2]) {
    for tensors in [&grads, &moments[0], &moments[1]] {
        assert_eq!(tensors.len(), parameters.len(), "adamw: number of tensors against the parameters'");
        for (tensor, parameter) in tensors.iter().zip(&parameters) {
            assert_eq!(tensor.dims(), parameter.dims(), "adamw: shape against the parameter's");
        }
    }
    B::adamw(parameters, grads, moments, norm, step)
}

/// Adds gradients, in `f32` and of any shapes, to the sums of those of the same tensors.
///
/// # Panics
/// If numbers of tensors differ, or shapes.
pub fn add_grads<B: Kernels>(sums: Vec<Tensor<B, 2>>, grads: Vec<Tensor<B, 2>>) -> Vec<Tensor<B, 2>> {
    assert_eq!(grads.len(), sums.len(), "add_grads: number of tensors against the sums'");
    for (grad, sum) in grads.iter().zip(&sums) {
        assert_eq!(grad.dims(), sum.dims(), "add_grads: shape against the sum's");
    }
    B::add_grads(sums, grads)
}

/// [`grad_norm`] in plain burn tensors.
pub fn grad_norm_reference<B: Backend>(grads: &[Tensor<B, 2>]) -> Tensor<B, 1> {
    Tensor::cat(grads.iter().map(|g| (g.clone() * g.clone()).sum()).collect(), 0).sum().sqrt()
}

/// [`adamw`] in plain burn tensors.
pub fn adamw_reference<B: Backend>(
    parameters: Vec<Tensor<B, 2>>,
    grads: Vec<Tensor<B, 2>>,
    [m, v]: [Vec<Tensor<B, 2>>; 2],
    norm: Tensor<B, 1>,
    step: &AdamWStep,
) -> (Vec<Tensor<B, 2>>, [Vec<Tensor<B, 2>>; 2]) {
    let tensors = parameters.into_iter().zip(grads).zip(m.into_iter().zip(v));
    let updated = tensors.map(|((parameter, grad), (m, v))| updated(parameter, grad, [m, v], &norm, step));
    let (parameters, moments): (_, Vec<_>) = updated.map(|[parameter, m, v]| (parameter, (m, v))).unzip();
    let (m, v) = moments.into_iter().unzip();
    (parameters, [m, v])
}

/// [`add_grads`] in plain burn tensors.
pub fn add_grads_reference<B: Backend>(
    sums: Vec<Tensor<B, 2>>,
    grads: Vec<Tensor<B, 2>>,
) -> Vec<Tensor<B, 2>> {
    sums.into_iter().zip(grads).map(|(sum, grad)| sum + grad).collect()
}

fn updated<B: Backend>(
    parameter: Tensor<B, 2>,
    grad: Tensor<B, 2>,
    [m, v]: [Tensor<B, 2>; 2],
    norm: &Tensor<B, 1>,
    step: &AdamWStep,
) -> [Tensor<B, 2>; 3] {
    let &AdamWStep { learning_rate, beta1, beta2, epsilon, weight_decay, max_grad_norm, t, loss_scale } =
        step;
    let shape = parameter.dims();
    let is_finite: Tensor<B, 2, Bool> = norm.clone().is_finite().unsqueeze::<2>().expand(shape);
    let (grad, norm) = (grad / loss_scale, norm.clone() / loss_scale);
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
    [chosen(parameter, updated), chosen(m, new_m), chosen(v, new_v)]
}

/// The most tensors that share a launch: Llama-3-8B's 448, with LoRA on all linear layers, take 28.
const TENSORS: usize = 16;
/// The most cubes that share a gradient's sum.
const MAX_PARTS: u32 = 128;
/// The most that share an update.
const MAX_CUBES: u32 = 1 << 14;

/// How many tensors share a launch that takes so many buffers for each, one beside them and the launch's sizes.
fn tensors_of_launch<R: CubeRuntime>(client: &ComputeClient<R>, buffers: usize) -> usize {
    let most = client.properties().hardware.max_bindings as usize;
    (most.saturating_sub(2) / buffers).clamp(1, TENSORS)
}

/// Elements of a vector that the rows of all tensors are whole ones of.
fn shared_width<R: CubeRuntime>(tensors: &[CubeTensor<R>]) -> usize {
    tensors.iter().map(|tensor| vector_width(tensor.meta.num_elements())).min().unwrap_or(1)
}

/// How many vectors each tensor has.
fn lengths<R: CubeRuntime>(tensors: &[CubeTensor<R>], width: usize) -> SequenceArg<R, usize> {
    let mut lengths = SequenceArg::new();
    for tensor in tensors {
        lengths.push(tensor.meta.num_elements() / width);
    }
    lengths
}

/// How many elements the longest has.
fn longest<R: CubeRuntime>(tensors: &[CubeTensor<R>]) -> u32 {
    tensors.iter().map(|tensor| tensor.meta.num_elements() as u32).max().unwrap_or(1)
}

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

/// The cubes of a row share a tensor.
#[cube(launch_unchecked)]
fn add_kernel<N: Size>(
    grads: &Sequence<Array<Vector<f32, N>>>,
    sums: &mut Sequence<Array<Vector<f32, N>>>,
    lengths: &Sequence<usize>,
) {
    #[unroll]
    for i in 0..grads.len() {
        if CUBE_POS_Y as usize == i {
            let (grad, sum) = (grads.index(i), sums.index_mut(i));
            let mut at = (CUBE_POS_X * THREADS + UNIT_POS) as usize;
            while at < lengths[i] {
                sum[at] += grad[at];
                at += (CUBE_COUNT_X * THREADS) as usize;
            }
        }
    }
}

/// The cubes of a row share a tensor.
#[cube(launch_unchecked)]
fn update_kernel<N: Size>(
    grads: &Sequence<Array<Vector<f32, N>>>,
    norm: &Array<f32>,
    parameters: &mut Sequence<Array<Vector<f32, N>>>,
    m: &mut Sequence<Array<Vector<f32, N>>>,
    v: &mut Sequence<Array<Vector<f32, N>>>,
    lengths: &Sequence<usize>,
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
    let mut factor = inverse_scale;
    if comptime!(clips) {
        factor *= min(max_grad_norm / (norm[0] * inverse_scale + 1e-6), 1.0f32);
    }
    #[unroll]
    for i in 0..grads.len() {
        if is_finite && CUBE_POS_Y as usize == i {
            let (grad, parameter) = (grads.index(i), parameters.index_mut(i));
            let (m, v) = (m.index_mut(i), v.index_mut(i));
            let mut at = (CUBE_POS_X * THREADS + UNIT_POS) as usize;
            while at < lengths[i] {
                let g = grad[at] * Vector::new(factor);
                let new_m = m[at] * Vector::new(betas.0) + g * Vector::new(remainders.0);
                let new_v = v[at] * Vector::new(betas.1) + g * g * Vector::new(remainders.1);
                let denominator = new_v.sqrt() * Vector::new(inverse_root_correction) + Vector::new(epsilon);
                let updated =
                    parameter[at] * Vector::new(decay) - new_m / denominator * Vector::new(step_size);
                parameter[at] = updated;
                m[at] = new_m;
                v[at] = new_v;
                at += (CUBE_COUNT_X * THREADS) as usize;
            }
        }
    }
}

/// Launches the sums of squares, a few gradients at a time, and the root of their sum.
pub(super) fn launch_norm<R: CubeRuntime>(grads: Vec<CubeTensor<R>>) -> CubeTensor<R> {
    let like = grads[0].clone();
    let client = like.client.clone();
    let parts = |grads: &[CubeTensor<R>]| longest(grads).div_ceil(4 * THREADS).clamp(1, MAX_PARTS);
    let grads = grads.chunks(tensors_of_launch(&client, 1));
    let n_sums = grads.clone().map(|grads| grads.len() * parts(grads) as usize).sum();
    let sums = empty(&like, Shape::new([n_sums]), DType::F32);
    let norm = empty(&like, Shape::new([1]), DType::F32);
    let mut first_sum = 0;
    for grads in grads {
        let width = shared_width(grads);
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
                    lengths(grads, width),
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

/// Launches the sums of gradients, a few at a time, in place: a sum that others hold too is copied first.
pub(super) fn launch_add<R: CubeRuntime>(
    sums: Vec<CubeTensor<R>>,
    grads: &[CubeTensor<R>],
) -> Vec<CubeTensor<R>> {
    let sums: Vec<_> = sums.into_iter().map(owned).collect();
    let Some(CubeTensor { client, .. }) = sums.first() else { return sums };
    let n_tensors = tensors_of_launch(client, 2);
    for (sums, grads) in sums.chunks(n_tensors).zip(grads.chunks(n_tensors)) {
        let width = shared_width(grads);
        let cubes = longest(grads).div_ceil(width as u32 * THREADS).min(MAX_CUBES);
        let read = bytes(&grads.iter().collect::<Vec<_>>());
        profile::kernel("add_grads", read / size_of::<f32>(), 3 * read, client, || {
            #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
            // SAFETY: an index is held against the number of vectors, which a gradient and its sum both have.
            unsafe {
                add_kernel::launch_unchecked::<R>(
                    client,
                    CubeCount::new_2d(cubes, grads.len() as u32),
                    CubeDim::new_1d(THREADS),
                    width,
                    arrays(grads),
                    arrays(sums),
                    lengths(grads, width),
                );
            }
        });
    }
    sums
}

/// Launches the updates of tensors, a few at a time, in place: a tensor that others hold too is copied first.
pub(super) fn launch_update<R: CubeRuntime>(
    parameters: Vec<CubeTensor<R>>,
    grads: &[CubeTensor<R>],
    moments: [Vec<CubeTensor<R>>; 2],
    norm: &CubeTensor<R>,
    step: &AdamWStep,
) -> (Vec<CubeTensor<R>>, [Vec<CubeTensor<R>>; 2]) {
    let owned = |tensors: Vec<CubeTensor<R>>| tensors.into_iter().map(owned).collect::<Vec<_>>();
    let (parameters, [m, v]) = (owned(parameters), moments.map(owned));
    let &AdamWStep { learning_rate, beta1, beta2, epsilon, weight_decay, max_grad_norm, t, loss_scale } =
        step;
    let [correction1, correction2] = [beta1, beta2].map(|beta| 1.0 - beta.powi(t as i32));
    let client = &norm.client;
    let n_tensors = tensors_of_launch(client, 4);
    for (i, grads) in grads.chunks(n_tensors).enumerate() {
        let of_launch = |tensors: &[CubeTensor<R>]| arrays(&tensors[i * n_tensors..][..grads.len()]);
        let width = shared_width(grads);
        let cubes = longest(grads).div_ceil(width as u32 * THREADS).min(MAX_CUBES);
        let read = bytes(&grads.iter().collect::<Vec<_>>());
        profile::kernel("adamw", 15 * read / size_of::<f32>(), 7 * read, client, || {
            #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
            // SAFETY: an index is held against the number of vectors, which a parameter's arrays all have.
            unsafe {
                update_kernel::launch_unchecked::<R>(
                    client,
                    CubeCount::new_2d(cubes, grads.len() as u32),
                    CubeDim::new_1d(THREADS),
                    width,
                    arrays(grads),
                    norm.clone().into_array_arg(),
                    of_launch(&parameters),
                    of_launch(&m),
                    of_launch(&v),
                    lengths(grads, width),
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
    }
    (parameters, [m, v])
}
