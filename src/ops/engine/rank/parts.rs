//! The products of [`rank`](super) on warpgroups, which multiply 16-bit numbers: an entry of the small matrix, which is `f32`, is the sum
//! of several of them, so that it stands in as many lines.

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;

use super::{Depth, Side, sum_slabs};
use crate::ops::cube::{arrays, bytes, empty, one_thread_each};
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

/// Whether warpgroups multiply a factor's parts with this matrix, which is contiguous: as the left operand where its columns are the
/// depth, as the right one where its rows are.
pub(super) fn are_taken<R: Engine>(x: &CubeTensor<R>, of: Depth) -> bool {
    let is_taken =
        x.dtype == DType::BF16 && warpgroup::has_rows(x) && warpgroup::are_there::<R>(&x.client, x.dtype);
    let kind = RouteKind {
        m: x.meta.shape()[0],
        n: TILE as usize,
        depth: TILE as usize,
        rank: 0,
        is_turned: of == Depth::Columns,
        dtype: x.dtype,
        out: DType::F32,
        has_addend: false,
    };
    is_taken && warpgroup::comes_out_right::<R>(&x.device, kind, TILE)
}

/// Whether factors can be multiplied as one: they lie alike, and have as many columns.
pub(super) fn are_alike<R: Engine>(a: &CubeTensor<R>, b: &CubeTensor<R>) -> bool {
    a.meta.shape() == b.meta.shape() && a.meta.strides() == b.meta.strides()
}

/// What factors that are [alike](are_alike) are multiplied by way of, in one product.
struct Parts<R: Engine> {
    /// `[PARTS · factors · r, length]`, in rows as the copy engine reads them.
    numbers: CubeTensor<R>,
    /// Of the depth.
    splits: usize,
    /// `[splits · m, n]` of the product.
    sums: CubeTensor<R>,
}

impl<R: Engine> Parts<R> {
    /// Room for a product of `x` with factors of so many columns in all: `[m, PARTS · r]`, or of the tokens `[PARTS · r, n]`.
    fn new(x: &CubeTensor<R>, rank: usize, depth: Depth) -> Self {
        let [tokens, width] = [0, 1].map(|i| x.meta.shape()[i]);
        let lines = PARTS * rank;
        let (length, [m, n]) = match depth {
            Depth::Columns => (width, [tokens, lines]),
            Depth::Tokens => (tokens, [lines, width]),
        };
        let splits = warpgroup::splits(&x.client, [m, n, length], TILE);
        let mut numbers = empty(x, Shape::from([lines, length.next_multiple_of(ROW_ENTRIES)]), x.dtype);
        numbers.meta.shape_mut()[1] = length;
        Self { numbers, splits, sums: empty(x, Shape::from([splits * m, n]), DType::F32) }
    }

    /// Fills in the numbers that add up to the entries of the factors, whose columns are counted along this axis.
    fn fill(&self, factors: &[CubeTensor<R>], rank_axis: usize) {
        let meta = &factors[0].meta;
        let [rank, length] = [rank_axis, 1 - rank_axis].map(|axis| meta.shape()[axis]);
        let [rank_step, step] = [rank_axis, 1 - rank_axis].map(|axis| meta.strides()[axis]);
        let client = &factors[0].client;
        let (cubes, cube) = one_thread_each(client, factors.len() * rank * length);
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: ranks and entries are held against their numbers, and steps are the factors' own.
        unsafe {
            parts_kernel::launch_unchecked::<R>(
                client,
                cubes,
                cube,
                arrays(factors),
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

    /// Launches the sums of a product whose rows are tokens, one output for each of the factors.
    fn sum_columns(&self, outputs: &[CubeTensor<R>], factor: f32) {
        let [m, rank] = [0, 1].map(|i| outputs[0].meta.shape()[i]);
        let client = &self.sums.client;
        let (cubes, cube) = one_thread_each(client, outputs.len() * m * rank);
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: entries are held against their number.
        unsafe {
            sum_parts_kernel::launch_unchecked::<R>(
                client,
                cubes,
                cube,
                self.sums.clone().into_array_arg(),
                arrays(outputs),
                self.splits,
                m,
                rank,
                factor,
            );
        }
    }
}

/// [`rows`](super::rows) of factors that are [alike](are_alike), and of a matrix with which [parts are multiplied](are_taken); the rank
/// is even, as the sums' rows have to be of whole pairs.
pub(super) fn rows<R: Engine>(
    name: &'static str,
    x: &CubeTensor<R>,
    rights: &[CubeTensor<R>],
    factor: f32,
) -> Vec<CubeTensor<R>> {
    let ([m, depth], rank) = ([0, 1].map(|i| x.meta.shape()[i]), rights[0].meta.shape()[0]);
    let ranks = rights.len() * rank;
    let parts = Parts::new(x, ranks, Depth::Columns);
    let outputs: Vec<_> = rights.iter().map(|_| empty(x, Shape::from([m, rank]), DType::F32)).collect();
    let moved = bytes(&[x]) + bytes(&[&rights[0], &outputs[0]]) * rights.len();
    profile::kernel(name, 2 * m * depth * ranks, moved, &x.client, || {
        parts.fill(rights, 0);
        parts.multiply(x, &turned(&parts.numbers));
        parts.sum_columns(&outputs, factor);
    });
    outputs
}

/// [`columns`](super::columns) of factors that are [alike](are_alike), and of a matrix with which [parts are multiplied](are_taken).
pub(super) fn columns<R: Engine>(
    name: &'static str,
    x: &CubeTensor<R>,
    lefts: &[CubeTensor<R>],
    factor: f32,
    side: Side,
) -> Vec<CubeTensor<R>> {
    let ([m, n], rank) = ([0, 1].map(|i| x.meta.shape()[i]), lefts[0].meta.shape()[1]);
    let ranks = lefts.len() * rank;
    let parts = Parts::new(x, ranks, Depth::Tokens);
    let outputs: Vec<_> =
        lefts.iter().map(|_| empty(x, Shape::from(side.shape(n, rank)), DType::F32)).collect();
    let moved = bytes(&[x]) + bytes(&[&lefts[0], &outputs[0]]) * lefts.len();
    profile::kernel(name, 2 * m * n * ranks, moved, &x.client, || {
        parts.fill(lefts, 1);
        parts.multiply(&parts.numbers, x);
        sum_slabs(&parts.sums, PARTS * parts.splits, &outputs, factor, side);
    });
    outputs
}

/// `factors[i][rank · length] -> [PARTS, factors, rank, length]`, in rows of `pitch`.
#[cube(launch_unchecked)]
fn parts_kernel<F: Float>(
    factors: &Sequence<Array<f32>>,
    parts: &mut Array<F>,
    length: usize,
    pitch: usize,
    rank: usize,
    step: usize,
    rank_step: usize,
    #[define(F)] _dtype: StorageType,
) {
    let ranks = factors.len() * rank;
    let line = ABSOLUTE_POS / length;
    let at = ABSOLUTE_POS % length;
    if line < ranks {
        let mut rest = 0.0f32;
        #[unroll]
        for i in 0..factors.len() {
            if line / rank == i {
                rest = factors.index(i)[at * step + line % rank * rank_step];
            }
        }
        #[unroll]
        for part in 0..PARTS {
            // Rounded in its bits: some compilers take a conversion there and back for nothing. The last is what is left, so that what
            // is no number stays none.
            let bits = u32::reinterpret(rest) + 0x8000u32;
            let rounded = f32::reinterpret(bits & 0xffff_0000u32);
            let number = if comptime!(part + 1 < PARTS) { rounded } else { rest };
            parts[(part * ranks + line) * pitch + at] = F::cast_from(number);
            rest -= number;
        }
    }
}

/// `[splits, m, PARTS, outputs, r] -> outputs[i][m, r]`
#[cube(launch_unchecked)]
fn sum_parts_kernel(
    sums: &Array<f32>,
    outputs: &mut Sequence<Array<f32>>,
    splits: usize,
    m: usize,
    rank: usize,
    factor: f32,
) {
    let ranks = outputs.len() * rank;
    let row = ABSOLUTE_POS / ranks;
    let k = ABSOLUTE_POS % ranks;
    if row < m {
        let mut sum = 0.0f32;
        for split in 0..splits {
            #[unroll]
            for part in 0..PARTS {
                sum += sums[((split * m + row) * PARTS + part) * ranks + k];
            }
        }
        #[unroll]
        for i in 0..outputs.len() {
            if k / rank == i {
                outputs.index_mut(i)[row * rank + k % rank] = sum * factor;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use burn_wgpu::WgpuRuntime;

    use super::*;
    use crate::ops::engine::any_device::{device, random, values};

    const OUTPUTS: usize = 3;
    const RANK: usize = 4;

    #[test]
    fn the_numbers_of_every_factor_add_up_to_it() {
        let Some(device) = device() else { return };
        const LENGTH: usize = 21;
        const PITCH: usize = 24;
        for rank_axis in [0, 1] {
            let shape = if rank_axis == 0 { [RANK, LENGTH] } else { [LENGTH, RANK] };
            let (wanted, factors): (Vec<_>, Vec<_>) =
                (0..OUTPUTS).map(|seed| random(seed, shape, &device)).unzip();
            // Numbers of 24 bits show whether those in `bf16` would be rounded.
            let written = empty(&factors[0], Shape::from([PARTS * OUTPUTS * RANK, PITCH]), DType::F32);
            let mut numbers = written.clone();
            numbers.meta.shape_mut()[1] = LENGTH;
            Parts { numbers, splits: 1, sums: written.clone() }.fill(&factors, rank_axis);
            let numbers = values(&written);
            for (i, wanted) in wanted.iter().enumerate() {
                for (k, at) in (0..RANK).flat_map(|k| (0..LENGTH).map(move |at| (k, at))) {
                    let number = |part: usize| numbers[((part * OUTPUTS + i) * RANK + k) * PITCH + at];
                    let whole = wanted[if rank_axis == 0 { k * LENGTH + at } else { at * RANK + k }];
                    assert_eq!(
                        (0..PARTS).map(number).sum::<f32>(),
                        whole,
                        "factor {i}, rank {k}, entry {at}"
                    );
                    for part in 0..PARTS {
                        assert_eq!(number(part).to_bits() & 0xffff, 0, "part {part} of {whole} is no bf16");
                    }
                }
            }
        }
    }

    #[test]
    fn sums_are_those_of_all_parts_and_splits() {
        let Some(device) = device() else { return };
        let (m, n, splits, factor) = (5, 12, 2, 0.5);
        let room = |shape: [usize; 2], like: &CubeTensor<WgpuRuntime>| {
            (0..OUTPUTS).map(|_| empty(like, Shape::from(shape), DType::F32)).collect::<Vec<_>>()
        };
        let assert_sum = |got: f32, terms: &[f32], what: &str| {
            let sum = factor * terms.iter().sum::<f32>();
            assert!((got - sum).abs() < 1e-4, "{what}: {got}, not {sum}");
        };

        let ranks = OUTPUTS * RANK;
        let (sums, of_product) = random(0, [splits * m, PARTS * ranks], &device);
        let outputs = room([m, RANK], &of_product);
        Parts { numbers: of_product.clone(), splits, sums: of_product }.sum_columns(&outputs, factor);
        for (i, got) in outputs.iter().map(values).enumerate() {
            for (row, k) in (0..m).flat_map(|row| (0..RANK).map(move |k| (row, k))) {
                let line = |split: usize, part: usize| ((split * m + row) * PARTS + part) * ranks;
                let terms: Vec<f32> = (0..splits)
                    .flat_map(|split| (0..PARTS).map(move |part| line(split, part)))
                    .map(|line| sums[line + i * RANK + k])
                    .collect();
                assert_sum(got[row * RANK + k], &terms, &format!("output {i}, row {row}, rank {k}"));
            }
        }

        let slabs = PARTS * splits;
        let (sums, of_product) = random(1, [slabs * ranks, n], &device);
        for side in [Side::Rows, Side::Columns] {
            let outputs = room(side.shape(n, RANK), &of_product);
            sum_slabs(&of_product, slabs, &outputs, factor, side);
            for (i, got) in outputs.iter().map(values).enumerate() {
                for (k, column) in (0..RANK).flat_map(|k| (0..n).map(move |column| (k, column))) {
                    let of_slab = |slab: usize| sums[(slab * ranks + i * RANK + k) * n + column];
                    let terms: Vec<f32> = (0..slabs).map(of_slab).collect();
                    let at = if side == Side::Rows { k * n + column } else { column * RANK + k };
                    assert_sum(
                        got[at],
                        &terms,
                        &format!("{side:?} of output {i}, rank {k}, column {column}"),
                    );
                }
            }
        }
    }
}
