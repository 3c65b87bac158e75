//! Matrix products by cubek, with what else belongs to their output.
//!
//! cubek is called itself and not through burn, whose product gives both operands the type of the left one and takes two `f32` on
//! tensor cores as TF32, with 10 bits of their 23. Here sums are `f32` whatever the operands are. Tensor cores multiply where both have
//! the same 16-bit type, the adapter and what the product is added to included (`extended.rs`); registers elsewhere, which take
//! operands of two types and make them `f32` first, and leave the rest to a pass behind them.

use std::sync::Once;

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeRuntime;
use burn_cubecl::kernel::{cast, into_contiguous};
use burn_cubecl::tensor::CubeTensor;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems, MatmulSetupError};
use cubek::matmul::launch::{Strategy, launch_ref};
use cubek::std::InputBinding;

use super::extended::{Pair, Place};
use super::routes::{Route, RouteKind, Routes};
use super::{Engine, warpgroup};
use crate::ops::cube::{bytes, empty, matrix_units, one_thread_each, overwrite, vector_width};
use crate::ops::tune::{self, Verdict};
use crate::ops::{notes, profile};

/// What a left operand in `f32` may become for a right one that tensor cores take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::ops) enum Rounding {
    /// A sum of two numbers of the right operand's type: of a number around one 22 bits of its 24 in `f16`, 16 in `bf16`.
    InParts,
    /// One such number.
    Whole,
}

/// The transposed matrix, in the same buffer.
pub(in crate::ops) fn turned<R: CubeRuntime>(matrix: &CubeTensor<R>) -> CubeTensor<R> {
    let mut matrix = matrix.clone();
    matrix.meta.swap(0, 1);
    matrix
}

/// `addend + lhs · rhs + adapter`: `[m, depth] · [depth, n] -> [m, n]`.
pub(in crate::ops) fn product<R: Engine>(
    name: &'static str,
    lhs: &CubeTensor<R>,
    rhs: &CubeTensor<R>,
    rounding: Rounding,
    rest: Rest<R>,
) -> CubeTensor<R> {
    if lhs.dtype != DType::F32 || !has_matrices(&rhs.client, rhs.dtype) {
        return multiply(name, lhs, rhs, rest);
    }
    match rounding {
        Rounding::Whole => multiply(name, &cast(lhs.clone(), rhs.dtype), rhs, rest),
        Rounding::InParts => {
            let [high, low] = halves(lhs, rhs.dtype);
            let sum = Rest { adapter: None, addend: None, dtype: DType::F32 };
            let low = multiply(name, &low, rhs, sum);
            let sum = Rest { adapter: None, addend: Some(low), dtype: DType::F32 };
            rest.add_to(multiply(name, &high, rhs, sum))
        }
    }
}

/// Of a matrix in `f32` two of a 16-bit type: its entries rounded, and what that left of them, rounded too.
pub(in crate::ops) fn halves<R: CubeRuntime>(matrix: &CubeTensor<R>, dtype: DType) -> [CubeTensor<R>; 2] {
    let matrix = into_contiguous(matrix.clone());
    let [high, low] = [(); 2].map(|()| empty(&matrix, matrix.meta.shape().clone(), dtype));
    let client = matrix.client.clone();
    let width = vector_width(matrix.meta.num_elements());
    let vectors = matrix.meta.num_elements() / width;
    let (cubes, cube) = one_thread_each(&client, vectors);
    let moved = bytes(&[&matrix, &high, &low]);
    profile::kernel("lora_linear halves", vectors * width, moved, &client, || {
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: vectors are held against their number, which all matrices have.
        unsafe {
            halves_kernel::launch_unchecked::<R>(
                &client,
                cubes,
                cube,
                width,
                matrix.into_array_arg(),
                high.clone().into_array_arg(),
                low.clone().into_array_arg(),
                vectors,
                excess_bits(dtype),
                dtype.into(),
            );
        }
    });
    [high, low]
}

/// Bits of an `f32` that a 16-bit type has none for.
pub(super) fn excess_bits(dtype: DType) -> u32 {
    if dtype == DType::BF16 { 16 } else { 13 }
}

/// `excess`: bits of an `f32` that the outputs' type has none for.
#[cube(launch_unchecked)]
fn halves_kernel<F: Float, N: Size>(
    matrix: &Array<Vector<f32, N>>,
    high: &mut Array<Vector<F, N>>,
    low: &mut Array<Vector<F, N>>,
    vectors: usize,
    #[comptime] excess: u32,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS < vectors {
        let whole = matrix[ABSOLUTE_POS];
        // Rounded in its bits: some compilers take a conversion there and back for nothing.
        let bits = Vector::<u32, N>::reinterpret(whole) + Vector::new(comptime!(1u32 << (excess - 1)));
        let rounded = Vector::<f32, N>::reinterpret(bits & Vector::new(comptime!(u32::MAX << excess)));
        high[ABSOLUTE_POS] = Vector::cast_from(rounded);
        low[ABSOLUTE_POS] = Vector::cast_from(whole - rounded);
    }
}

/// Whether the device has matrix units for a 16-bit type that sum in `f32`.
pub(super) fn has_matrices<R: CubeRuntime>(client: &ComputeClient<R>, dtype: DType) -> bool {
    dtype != DType::F32 && !matrix_units(client, dtype).is_empty()
}

fn multiply<R: Engine>(
    name: &'static str,
    lhs: &CubeTensor<R>,
    rhs: &CubeTensor<R>,
    rest: Rest<R>,
) -> CubeTensor<R> {
    let [m, depth] = [0, 1].map(|i| lhs.meta.shape()[i]);
    let [rhs_depth, n] = [0, 1].map(|i| rhs.meta.shape()[i]);
    assert_eq!(depth, rhs_depth, "{name}: depth of the operands");
    let profiled = |dtype: DType, rank: usize, launch: &mut (dyn FnMut() + Send)| {
        let moved = bytes(&[lhs, rhs]) + m * n * dtype.size();
        profile::kernel(name, 2 * m * n * (depth + rank), moved, &lhs.client, launch);
    };
    if let Some(route) = route(lhs, rhs, &rest) {
        let is_over = rest.addend.as_ref().is_some_and(CubeTensor::can_mut);
        let out = match &rest.addend {
            Some(addend) if is_over => addend.clone(),
            _ => empty(lhs, Shape::from([m, n]), rest.dtype),
        };
        let place = match is_over {
            true => Place::Over(&out),
            false => Place::New { out: &out, addend: rest.addend.as_ref() },
        };
        let operands = Pair::new(lhs, rhs, rest.adapter.as_ref());
        // Matrix units have no tile for some shapes.
        let mut is_made = false;
        profiled(rest.dtype, rest.rank(), &mut || is_made = route.launch(&operands, &place));
        if is_made {
            return out;
        }
    }
    let out = empty(lhs, Shape::from([m, n]), DType::F32);
    let mut outcome = Ok(());
    profiled(DType::F32, 0, &mut || {
        outcome = in_registers(lhs, rhs, &out).map_err(|error| format!("{error:?}"));
    });
    if let Err(error) = outcome {
        panic!("{name}: no product of {:?} and {:?}: {error}", lhs.meta.shape(), rhs.meta.shape());
    }
    rest.add_to(out)
}

/// The route to take; none where registers have to make the product.
fn route<R: Engine>(lhs: &CubeTensor<R>, rhs: &CubeTensor<R>, rest: &Rest<R>) -> Option<Route> {
    if lhs.dtype != rhs.dtype || !has_matrices(&rhs.client, rhs.dtype) {
        return None;
    }
    let kind = RouteKind::of(lhs, rhs, rest);
    let own = warpgroup::columns(&rhs.client, kind, lhs.meta.shape()[0]);
    if let Some(columns) = own {
        let route = Route::Warpgroups { columns };
        if warpgroup::comes_out_right::<R>(&lhs.device, kind, columns) {
            return Some(route);
        }
        static NOTED: Once = Once::new();
        NOTED.call_once(|| notes::note("the GPU's warpgroups get a product wrong, so slower units make it"));
    }
    let rule = Route::UNTIMED;
    let is_rule_right = || tune::comes_out_right::<Routes<R>>(&lhs.device, kind.sample(), rule);
    match tune::verdict::<Routes<R>>(&lhs.device, kind) {
        // Of what warpgroups should have made nothing was timed.
        Verdict::Fastest(route) if own.is_none() => Some(route),
        Verdict::NoneRight if own.is_none() => None,
        _ => is_rule_right().then_some(rule),
    }
}

/// `lhs · rhs` into `out`, which is `f32`.
fn in_registers<R: CubeRuntime>(
    lhs: &CubeTensor<R>,
    rhs: &CubeTensor<R>,
    out: &CubeTensor<R>,
) -> Result<(), MatmulSetupError> {
    let operand = |tensor: &CubeTensor<R>| InputBinding::new(tensor.clone().binding(), tensor.dtype.into());
    let globals = MatmulGlobalElems { lhs: lhs.dtype.into(), rhs: rhs.dtype.into(), out: DType::F32.into() };
    let mut elements = MatmulElems::from_globals(&globals);
    let strategy = Strategy::SimpleUnit(Default::default());
    launch_ref(&strategy, &lhs.client, operand(lhs), operand(rhs), out.clone().binding(), &mut elements)
}

/// Rows of a thread of [`finish()`].
const ROWS: usize = 8;

/// A product of rank r, `scale · left · right`.
pub(in crate::ops) struct Adapter<R: CubeRuntime> {
    /// `[m, r]` in `f32`.
    pub(in crate::ops) left: CubeTensor<R>,
    /// `[r, n]` in `f32`.
    pub(in crate::ops) right: CubeTensor<R>,
    pub(in crate::ops) scale: f32,
}

/// What belongs to an output `[m, n]` besides the product: `addend + product + adapter`, in `dtype`.
pub(in crate::ops) struct Rest<R: CubeRuntime> {
    pub(in crate::ops) adapter: Option<Adapter<R>>,
    /// `[m, n]`, in `dtype`.
    pub(in crate::ops) addend: Option<CubeTensor<R>>,
    /// The output's type.
    pub(in crate::ops) dtype: DType,
}

impl<R: CubeRuntime> Rest<R> {
    /// The adapter's rank, or 0.
    pub(super) fn rank(&self) -> usize {
        self.adapter.as_ref().map_or(0, |adapter| adapter.left.meta.shape()[1])
    }

    /// Adds it to a product in `f32`, over the addend or the product where it can.
    fn add_to(self, product: CubeTensor<R>) -> CubeTensor<R> {
        const NAME: &str = "lora_linear finish";
        let Self { adapter, addend, dtype } = self;
        if adapter.is_none() && addend.is_none() && dtype == DType::F32 {
            return product;
        }
        let client = product.client.clone();
        let [m, n] = [0, 1].map(|i| product.meta.shape()[i]);
        let rank = adapter.as_ref().map_or(0, |adapter| adapter.left.meta.shape()[1]);
        let width = vector_width(n);
        let (cubes, cube) = one_thread_each(&client, m.div_ceil(ROWS) * n / width);
        let work = [m * n * (2 * rank + 1), 2 * bytes(&[&product])];
        let has_addend = addend.is_some();
        // What is not there is never read; some buffer has to stand in its place.
        let none = || Adapter { left: product.clone(), right: product.clone(), scale: 0.0 };
        let Adapter { left, right, scale } = adapter.unwrap_or_else(none);
        let [left, right] = [left, right].map(|factor| into_contiguous(factor).into_array_arg());
        let (product, addend, out, tensor) = match addend {
            Some(addend) => {
                let out = overwrite(addend, 3);
                (product.into_array_arg(), out.input, out.output, out.tensor)
            }
            None if dtype == DType::F32 => {
                let out = overwrite(product, 0);
                (out.input, out.tensor.clone().into_array_arg(), out.output, out.tensor)
            }
            None => {
                let out = empty(&product, Shape::from([m, n]), dtype);
                let stand_in = product.clone().into_array_arg();
                (product.into_array_arg(), stand_in, out.clone().into_array_arg(), out)
            }
        };
        profile::kernel(NAME, work[0], work[1], &client, || {
            #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
            // SAFETY: rows and vectors are held against their numbers, and the rank is that of both sides of the adapter.
            unsafe {
                finish::launch_unchecked::<R>(
                    &client,
                    cubes,
                    cube,
                    width,
                    product,
                    left,
                    right,
                    addend,
                    out,
                    m,
                    n / width,
                    rank,
                    scale,
                    has_addend,
                    dtype.into(),
                );
            }
        });
        tensor
    }
}

/// A thread has one vector of each of [`ROWS`] rows, for which it reads `right` once.
#[cube(launch_unchecked)]
fn finish<F: Float, N: Size>(
    product: &Array<Vector<f32, N>>,
    left: &Array<f32>,
    right: &Array<Vector<f32, N>>,
    addend: &Array<Vector<F, N>>,
    out: &mut Array<Vector<F, N>>,
    rows: usize,
    row_vectors: usize,
    rank: usize,
    scale: f32,
    #[comptime] has_addend: bool,
    #[define(F)] _dtype: StorageType,
) {
    let column = ABSOLUTE_POS % row_vectors;
    let first = ABSOLUTE_POS / row_vectors * ROWS;
    if first < rows {
        let mut sums = Array::<Vector<f32, N>>::new(ROWS);
        #[unroll]
        for i in 0..ROWS {
            sums[i] = Vector::new(0.0f32);
        }
        for k in 0..rank {
            let factors = right[k * row_vectors + column];
            #[unroll]
            for i in 0..ROWS {
                sums[i] += Vector::new(left[min(first + i, rows - 1) * rank + k]) * factors;
            }
        }
        #[unroll]
        for i in 0..ROWS {
            if first + i < rows {
                let at = (first + i) * row_vectors + column;
                let mut sum = product[at] + sums[i] * Vector::new(scale);
                if comptime!(has_addend) {
                    sum += Vector::<f32, N>::cast_from(addend[at]);
                }
                out[at] = Vector::cast_from(sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::any_device::{device, random, values};
    use super::*;

    /// In `f32`, which rounds nothing more.
    #[test]
    fn halves_add_up_and_the_first_has_few_bits() {
        let Some(device) = device() else { return };
        for shape in [[1, 1], [7, 9], [12, 20]] {
            let (wanted, matrix) = random(3, shape, &device);
            let [high, low] = halves(&matrix, DType::F32).map(|half| values(&half));
            for ((high, low), wanted) in high.iter().zip(&low).zip(&wanted) {
                assert_eq!(high + low, *wanted);
                assert!(low.abs() <= wanted.abs() / 2048.0, "{wanted} is {high} and {low}");
                assert_eq!(high.to_bits() & 0x1fff, 0, "{high} has more bits than f16");
            }
        }
        assert_eq!([DType::F16, DType::BF16].map(excess_bits), [13, 16]);
    }
}
