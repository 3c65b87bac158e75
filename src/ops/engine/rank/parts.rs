//! The products of [`rank`](super) on warpgroups, which multiply 16-bit numbers: an entry of the small matrix, which is `f32`, is the sum
//! of several of them, so that it stands in as many lines.

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;

use crate::ops::cube::{bytes, empty, one_thread_each};
use crate::ops::engine::Engine;
use crate::ops::engine::product::turned;
use crate::ops::engine::routes::RouteKind;
use crate::ops::engine::warpgroup::{self, ROW_ENTRIES, WarpgroupProduct};
use crate::ops::profile;

/// Numbers of `bf16`, of 8 bits, that one of `f32`, of 24, is the sum of. Of `f16`, whose smallest number is not small beside a
/// gradient, there may be none.
const PARTS: usize = 3;
/// Columns of a tile: the fewest, as there are few tiles.
const TILE: u32 = 128;

/// Whether warpgroups multiply a factor's parts with this matrix, which is contiguous, as the left operand or the right one.
pub(super) fn are_taken<R: Engine>(x: &CubeTensor<R>, is_left: bool) -> bool {
    let is_taken =
        x.dtype == DType::BF16 && warpgroup::has_rows(x) && warpgroup::are_there::<R>(&x.client, x.dtype);
    let kind = RouteKind {
        m: x.meta.shape()[0],
        n: TILE as usize,
        depth: TILE as usize,
        rank: 0,
        is_turned: is_left,
        dtype: x.dtype,
        out: DType::F32,
        has_addend: false,
    };
    is_taken && warpgroup::comes_out_right::<R>(&x.device, kind, TILE)
}

/// What a factor is multiplied by way of.
pub(super) struct Parts<R: Engine> {
    /// `[PARTS · r, length]`, in rows as the copy engine reads them.
    numbers: CubeTensor<R>,
    /// Of the depth.
    splits: usize,
    /// `[splits · m, n]` of the product.
    pub(super) sums: CubeTensor<R>,
}

impl<R: Engine> Parts<R> {
    /// Room for a product of `x` with a factor of so many columns: with the tokens as its depth, `[PARTS · r, n]`, or as its rows,
    /// `[m, PARTS · r]`.
    fn new(x: &CubeTensor<R>, rank: usize, sums_tokens: bool) -> Self {
        let [tokens, width] = [0, 1].map(|i| x.meta.shape()[i]);
        let length = if sums_tokens { tokens } else { width };
        let lines = PARTS * rank;
        let [m, n] = if sums_tokens { [lines, width] } else { [tokens, lines] };
        let splits = warpgroup::splits(&x.client, [m, n, length], TILE);
        let mut numbers = empty(x, Shape::from([lines, length.next_multiple_of(ROW_ENTRIES)]), x.dtype);
        numbers.meta.shape_mut()[1] = length;
        Self { numbers, splits, sums: empty(x, Shape::from([splits * m, n]), DType::F32) }
    }

    /// Room for sums over the tokens; [`Self::sums`] are `[slabs · r, n]`.
    pub(super) fn over_tokens(x: &CubeTensor<R>, rank: usize) -> Self {
        Self::new(x, rank, true)
    }

    /// Matrices `[r, n]` that [`Self::sums`] are.
    pub(super) fn slabs(&self) -> usize {
        PARTS * self.splits
    }

    /// Launches the sums over the tokens: those of `leftᵀ · x`.
    pub(super) fn sum_tokens(&self, left: &CubeTensor<R>, x: &CubeTensor<R>) {
        self.fill(left, 1);
        self.multiply(&self.numbers, x);
    }

    /// Fills in the numbers that add up to the entries of a factor, whose columns are counted along this axis.
    fn fill(&self, factor: &CubeTensor<R>, rank_axis: usize) {
        let [rank, length] = [rank_axis, 1 - rank_axis].map(|axis| factor.meta.shape()[axis]);
        let [rank_step, step] = [rank_axis, 1 - rank_axis].map(|axis| factor.meta.strides()[axis]);
        let (cubes, cube) = one_thread_each(&factor.client, rank * length);
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: ranks and entries are held against their numbers, and steps are the factor's own.
        unsafe {
            parts_kernel::launch_unchecked::<R>(
                &factor.client,
                cubes,
                cube,
                factor.clone().into_array_arg(),
                self.numbers.clone().into_array_arg(),
                length,
                self.numbers.meta.strides()[0],
                rank,
                step,
                rank_step,
                self.numbers.dtype.into(),
            );
        }
    }

    fn multiply(&self, left: &CubeTensor<R>, right: &CubeTensor<R>) {
        let product =
            WarpgroupProduct { left, right, tails: None, out: &self.sums, addend: None, splits: self.splits };
        if let Err(problem) = R::warpgroup_product(TILE, &product) {
            unreachable!("{problem}, in a product with an adapter's parts");
        }
    }
}

/// [`rows`](super::rows) of a matrix with which [parts are multiplied](are_taken); the rank is even, as the sums' rows have to be of
/// whole pairs.
pub(super) fn rows<R: Engine>(
    name: &'static str,
    x: &CubeTensor<R>,
    right: &CubeTensor<R>,
    factor: f32,
) -> CubeTensor<R> {
    let ([m, depth], rank) = ([0, 1].map(|i| x.meta.shape()[i]), right.meta.shape()[0]);
    let parts = Parts::new(x, rank, false);
    let out = empty(x, Shape::from([m, rank]), DType::F32);
    let (cubes, cube) = one_thread_each(&x.client, m * rank);
    profile::kernel(name, 2 * m * depth * rank, bytes(&[x, right, &out]), &x.client, || {
        parts.fill(right, 0);
        parts.multiply(x, &turned(&parts.numbers));
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: entries are held against their number.
        unsafe {
            sum_parts_kernel::launch_unchecked::<R>(
                &x.client,
                cubes,
                cube,
                parts.sums.clone().into_array_arg(),
                out.clone().into_array_arg(),
                parts.splits,
                m,
                rank,
                factor,
            );
        }
    });
    out
}

#[cube(launch_unchecked)]
fn parts_kernel<F: Float>(
    factor: &Array<f32>,
    parts: &mut Array<F>,
    length: usize,
    pitch: usize,
    rank: usize,
    step: usize,
    rank_step: usize,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS < rank * length {
        let k = ABSOLUTE_POS / length;
        let at = ABSOLUTE_POS % length;
        let mut rest = factor[at * step + k * rank_step];
        #[unroll]
        for part in 0..PARTS {
            // Rounded in its bits: some compilers take a conversion there and back for nothing. The last is what is left, so that what
            // is no number stays none.
            let bits = u32::reinterpret(rest) + 0x8000u32;
            let rounded = f32::reinterpret(bits & 0xffff_0000u32);
            let number = if comptime!(part + 1 < PARTS) { rounded } else { rest };
            parts[(part * rank + k) * pitch + at] = F::cast_from(number);
            rest -= number;
        }
    }
}

/// `[splits, m, PARTS · r] -> [m, r]`
#[cube(launch_unchecked)]
fn sum_parts_kernel(
    sums: &Array<f32>,
    out: &mut Array<f32>,
    splits: usize,
    m: usize,
    rank: usize,
    factor: f32,
) {
    if ABSOLUTE_POS < m * rank {
        let row = ABSOLUTE_POS / rank;
        let k = ABSOLUTE_POS % rank;
        let mut sum = 0.0f32;
        for split in 0..splits {
            #[unroll]
            for part in 0..PARTS {
                sum += sums[((split * m + row) * PARTS + part) * rank + k];
            }
        }
        out[ABSOLUTE_POS] = sum * factor;
    }
}
