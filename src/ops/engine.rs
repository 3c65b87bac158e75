//! What a runtime of CubeCL brings of its own: the products of [`lora_linear`](super::lora_linear), the odds-ratio loss and, where it
//! has instructions for that, attention. All other kernels have one source for every runtime.
//!
//! The default bodies serve every runtime: cubek's matrix products with sums in `f32`. On tensor cores, where both operands are 16-bit,
//! the adapter rides in the product, which adds to what its output joins and writes that once (`extended.rs`); of the routines, the one
//! that [`tune`](super::tune) found the fastest. In registers, elsewhere, one pass behind the product does the rest.
//!
//! CUDA takes them as they are, with a product and attention of its own on the GPUs that have `wgmma` and `mma` (`cuda.rs`); wgpu has
//! shaders for the products, but for a GPU's narrow ones, and for the loss instead (`wgpu.rs`).

#[cfg(test)]
mod any_device;
mod extended;
mod orpo_loss;
mod product;
mod rank;
mod routes;
mod warpgroup;

use burn::cubecl::client::ComputeClient;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::attention::{MmaLaunch, MmaPass};
use super::gpu::{input, operand, tensor};
use super::lora_linear::{Lora, LoraGrads, LoraOutputGrad};
use super::orpo_loss::PairSpan;
use rank::{Side, Thin};

#[cfg(feature = "cuda")]
pub(super) use extended::is_turned;
pub(super) use product::{Adapter, Rest, Rounding, halves, product, turned};
pub use routes::{Instruction, Route, RouteKind, Routes};
#[cfg(feature = "cuda")]
pub(super) use warpgroup::has_rows;
pub use warpgroup::{TILE_COLUMNS, TILE_DEPTH, TILE_ROWS, WarpgroupProduct};

/// What the profile calls the products of an adapter's backward.
const BACKWARD: &str = "lora_linear backward lora";

/// A backend whose float tensors are those of a runtime.
pub trait Floating<R: CubeRuntime>: Backend<FloatTensorPrimitive = CubeTensor<R>> {}

impl<R: CubeRuntime, B: Backend<FloatTensorPrimitive = CubeTensor<R>>> Floating<R> for B {}

/// The ops that a runtime may have its own kernels for; see those of the same names in [`Kernels`](super::Kernels).
pub trait Engine: CubeRuntime {
    /// `x Aᵀ` for each adapter, `[tokens, r]`.
    fn lora_rank_r<B: Floating<Self>>(x: Tensor<B, 2>, loras: &[&Lora<B>]) -> Vec<Tensor<B, 2>> {
        let a: Vec<_> = loras.iter().map(|lora| input(lora.a.clone())).collect();
        rank_r(&operand(x), &a).into_iter().map(tensor).collect()
    }

    /// `residual + x Wᵀ + scale · s Bᵀ`, `[tokens, out]`.
    fn lora_linear_forward<B: Floating<Self>>(
        x: Tensor<B, 2>,
        weight: Tensor<B, 2>,
        adapter: Option<(&Lora<B>, Tensor<B, 2>)>,
        residual: Option<Tensor<B, 2>>,
    ) -> Tensor<B, 2> {
        let (x, weight) = (operand(x), operand(weight));
        let dtype = residual.as_ref().map_or(x.dtype, Tensor::dtype);
        let adapter = adapter.map(|(lora, s)| Adapter {
            left: input(s),
            right: turned(&input(lora.b.clone())),
            scale: lora.scale,
        });
        let rest = Rest { adapter, addend: residual.map(operand), dtype };
        tensor(product("lora_linear forward", &x, &turned(&weight), Rounding::InParts, rest))
    }

    /// Each adapter's gradients that its output's gives.
    fn lora_backward_b<B: Floating<Self>>(layers: &[LoraOutputGrad<'_, B>]) -> Vec<LoraGrads<B>> {
        backward_b(layers)
    }

    /// `dsᵀ x` for each adapter, `[r, in]`.
    fn lora_backward_a<B: Floating<Self>>(x: Tensor<B, 2>, ds: &[Tensor<B, 2>]) -> Vec<Tensor<B, 2>> {
        let ds: Vec<_> = ds.iter().map(|ds| input(ds.clone())).collect();
        backward_a(&operand(x), &ds).into_iter().map(tensor).collect()
    }

    /// `dx = sum + dy W + ds A`, `[tokens, in]`, in `dtype`.
    fn lora_linear_backward_input<B: Floating<Self>>(
        dy: Tensor<B, 2>,
        weight: Tensor<B, 2>,
        ds_a: Option<(Tensor<B, 2>, Tensor<B, 2>)>,
        sum: Option<Tensor<B, 2>>,
        dtype: DType,
    ) -> Tensor<B, 2> {
        let adapter = ds_a.map(|(ds, a)| Adapter { left: input(ds), right: input(a), scale: 1.0 });
        let rest = Rest { adapter, addend: sum.map(operand), dtype };
        let (dy, weight) = (operand(dy), operand(weight));
        tensor(product("lora_linear backward input", &dy, &weight, Rounding::Whole, rest))
    }

    /// The statistics of [`orpo_loss`](super::orpo_loss::orpo_loss).
    fn orpo_loss_forward<B: Floating<Self>>(logps: Tensor<B, 1>, pairs: &[PairSpan]) -> Tensor<B, 2> {
        tensor(orpo_loss::launch_forward(input(logps), pairs))
    }

    /// The loss's derivative by every entry's log-probability.
    fn orpo_loss_backward<B: Floating<Self>>(
        stats: Tensor<B, 2>,
        pairs: &[PairSpan],
        beta: f32,
        grad_scale: f32,
    ) -> Tensor<B, 1> {
        tensor(orpo_loss::launch_backward(input(stats), pairs, beta, grad_scale))
    }

    /// Whether the threads of a plane of `lanes` hand each other numbers by shuffles as they should; CUDA's do.
    fn shuffles(_client: &ComputeClient<Self>, _lanes: u32) -> bool {
        true
    }

    /// Whether the device's warps multiply as [`attention_mma`](Self::attention_mma) has them.
    fn has_mma(_client: &ComputeClient<Self>) -> bool {
        false
    }

    /// Launches one of attention's kernels for such devices.
    ///
    /// # Panics
    /// On others.
    fn attention_mma(pass: MmaPass, _launch: &MmaLaunch<'_, Self>) {
        unreachable!("{pass:?} on a device without `mma`");
    }

    /// How many processors the device has, where their warpgroups multiply by [`warpgroup_product`](Self::warpgroup_product).
    fn warpgroup_processors(_client: &ComputeClient<Self>) -> Option<usize> {
        None
    }

    /// Launches a product in tiles of so many columns, of [`TILE_COLUMNS`].
    ///
    /// # Errors
    /// If the device cannot.
    fn warpgroup_product(_columns: u32, _product: &WarpgroupProduct<'_, Self>) -> Result<(), &'static str> {
        Err("there are no warpgroups")
    }
}

/// `x Aᵀ` for each of these.
pub(super) fn rank_r<R: Engine>(x: &CubeTensor<R>, a: &[CubeTensor<R>]) -> Vec<CubeTensor<R>> {
    rank::multiply("lora_linear rank r", &[Thin::rows(x, a, 1.0)]).remove(0)
}

/// `ds` and `dB` for each of these, each in a read of its own.
pub(super) fn backward_b<R: Engine, B: Floating<R>>(layers: &[LoraOutputGrad<'_, B>]) -> Vec<LoraGrads<B>> {
    let products = layers.iter().flat_map(|LoraOutputGrad { dy, s, lora }| {
        let (dy, s, b) = (operand(dy.clone()), input(s.clone()), input(lora.b.clone()));
        [Thin::rows(&dy, &[turned(&b)], lora.scale), Thin::columns(&dy, &[s], lora.scale, Side::Columns)]
    });
    let mut grads = rank::multiply(BACKWARD, &products.collect::<Vec<_>>()).into_iter().flatten().map(tensor);
    std::iter::from_fn(|| Some(LoraGrads { ds: grads.next()?, db: grads.next()? })).collect()
}

/// `dsᵀ x` for each of these.
pub(super) fn backward_a<R: Engine>(x: &CubeTensor<R>, ds: &[CubeTensor<R>]) -> Vec<CubeTensor<R>> {
    rank::multiply(BACKWARD, &[Thin::columns(x, ds, 1.0, Side::Rows)]).remove(0)
}
