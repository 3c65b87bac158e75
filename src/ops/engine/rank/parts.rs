//! The products of [`rank`](super) on warpgroups, which multiply 16-bit numbers: an entry of the small matrix, which is `f32`, is the sum
//! of several of them, so that it stands in as many lines.

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;

use super::sums::{self, Layout, Sums};
use super::{Depth, Thin};
use crate::ops::cube::{arrays, bytes, empty, one_thread_each};
use crate::ops::engine::Engine;
use crate::ops::engine::product::turned;
use crate::ops::engine::routes::RouteKind;
use crate::ops::engine::warpgroup::{self, ROW_ENTRIES, WarpgroupProduct};
use crate::ops::profile;

/// Numbers of `bf16`, of 8 bits, that one of `f32`, of 24, is the sum of. Of `f16`, whose smallest number is not small beside a
/// gradient, there may be none.
pub(super) const PARTS: usize = 3;
/// Columns of a tile: the fewest, as there are few tiles.
const TILE: u32 = 128;

/// Whether warpgroups make this product, whose factors are alike, with their parts: the matrix of tokens is the left operand where its
/// columns are the depth, and the sums' rows have to be of whole pairs; else it is the right one.
pub(super) fn are_taken<R: Engine>(product: &Thin<R>) -> bool {
    let Thin { x, depth, .. } = product;
    let is_turned = *depth == Depth::Columns;
    let is_even = !is_turned || product.rank().is_multiple_of(2);
    let is_taken = x.dtype == DType::BF16
        && is_even
        && warpgroup::has_rows(x)
        && warpgroup::are_there::<R>(&x.client, x.dtype);
    let kind = RouteKind {
        m: x.meta.shape()[0],
        n: TILE as usize,
        depth: TILE as usize,
        rank: 0,
        is_turned,
        dtype: x.dtype,
        out: DType::F32,
        has_addend: false,
    };
    is_taken && warpgroup::comes_out_right::<R>(&x.device, kind, TILE)
}

/// What a product is made by way of.
struct Parts<'a, R: Engine> {
    /// Of factors that are alike.
    product: &'a Thin<R>,
    /// `[PARTS · factors · r, length]`, in rows as the copy engine reads them.
    numbers: CubeTensor<R>,
    /// Of the depth.
    splits: usize,
    /// `[splits · m, n]` of the product.
    sums: CubeTensor<R>,
    outputs: Vec<CubeTensor<R>>,
}

impl<'a, R: Engine> Parts<'a, R> {
    fn new(product: &'a Thin<R>) -> Self {
        let Thin { x, factors, depth, .. } = product;
        let [tokens, width] = [0, 1].map(|i| x.meta.shape()[i]);
        let lines = PARTS * factors.len() * product.rank();
        let (length, [m, n]) = match depth {
            Depth::Columns => (width, [tokens, lines]),
            Depth::Tokens(_) => (tokens, [lines, width]),
        };
        let splits = warpgroup::splits(&x.client, [m, n, length], TILE);
        let mut numbers = empty(x, Shape::from([lines, length.next_multiple_of(ROW_ENTRIES)]), x.dtype);
        numbers.meta.shape_mut()[1] = length;
        let sums = empty(x, Shape::from([splits * m, n]), DType::F32);
        Self { product, numbers, splits, sums, outputs: factors.iter().map(|_| product.output()).collect() }
    }

    fn multiply(&self) {
        let Thin { x, depth, .. } = self.product;
        let turned = turned(&self.numbers);
        let (left, right) = match depth {
            Depth::Columns => (x, &turned),
            Depth::Tokens(_) => (&self.numbers, x),
        };
        let product =
            WarpgroupProduct { left, right, tails: None, out: &self.sums, addend: None, splits: self.splits };
        if let Err(problem) = R::warpgroup_product(TILE, &product) {
            unreachable!("{problem}, in a product with an adapter's parts");
        }
    }

    fn sums(&self) -> Sums<R> {
        let layout = match self.product.depth {
            Depth::Columns => Layout::Tokens { parts: PARTS },
            // Of these the parts are like splits.
            Depth::Tokens(side) => Layout::Ranks(side),
        };
        let (terms, outputs) = (self.sums.clone(), self.outputs.clone());
        Sums { terms, layout, scale: self.product.scale, outputs }
    }
}

/// [`multiply_together`](super::multiply_together) of products that [take parts](are_taken), of factors that are alike.
pub(super) fn multiply<R: Engine>(name: &'static str, products: &[&Thin<R>]) -> Vec<Vec<CubeTensor<R>>> {
    let Some(first) = products.first() else { return Vec::new() };
    let parts: Vec<_> = products.iter().map(|product| Parts::new(product)).collect();
    let work = |Parts { product, outputs, .. }: &Parts<'_, R>| {
        let Thin { x, factors, .. } = product;
        let flops = 2 * x.meta.num_elements() * factors.len() * product.rank();
        [flops, bytes(&[x]) + bytes(&[&factors[0], &outputs[0]]) * factors.len()]
    };
    let [flops, moved] = parts.iter().map(work).fold([0, 0], |[a, b], [c, d]| [a + c, b + d]);
    profile::kernel(name, flops, moved, &first.x.client, || {
        fill(&parts);
        for parts in &parts {
            parts.multiply();
        }
        sums::launch(&parts.iter().map(Parts::sums).collect::<Vec<_>>());
    });
    parts.into_iter().map(|parts| parts.outputs).collect()
}

/// Fills in the numbers that add up to the entries of the factors.
fn fill<R: Engine>(parts: &[Parts<'_, R>]) {
    let client = &parts[0].numbers.client;
    let n_entries = |parts: &Parts<'_, R>| parts.numbers.meta.num_elements() / PARTS;
    let (cubes, cube) = one_thread_each(client, parts.iter().map(n_entries).sum());
    let (mut of_products, mut numbers) = (SequenceArg::new(), SequenceArg::new());
    for parts in parts {
        let (factors, rank, axis) = (&parts.product.factors, parts.product.rank(), parts.product.rank_axis());
        let meta = &factors[0].meta;
        let (length, step, rank_step) =
            (meta.shape()[1 - axis], meta.strides()[1 - axis], meta.strides()[axis]);
        let pitch = parts.numbers.meta.strides()[0];
        of_products.push(FactorsLaunch::new(arrays(factors), length, pitch, rank, step, rank_step));
        numbers.push(parts.numbers.clone().into_array_arg());
    }
    #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
    // SAFETY: a product's entries are held against their number, and steps are the factors' own.
    unsafe {
        let dtype = parts[0].numbers.dtype;
        fill_kernel::launch_unchecked::<R>(client, cubes, cube, of_products, numbers, dtype.into());
    }
}

/// The factors of one product.
#[derive(CubeType, CubeLaunch)]
struct Factors {
    entries: Sequence<Array<f32>>,
    /// Entries of the depth.
    length: usize,
    /// Numbers from one line to the next.
    pitch: usize,
    rank: usize,
    step: usize,
    rank_step: usize,
}

/// `entries[i][rank · length] -> numbers[PARTS, factors, rank, length]` of every product.
#[cube(launch_unchecked)]
fn fill_kernel<F: Float>(
    products: &Sequence<Factors>,
    numbers: &mut Sequence<Array<F>>,
    #[define(F)] _dtype: StorageType,
) {
    let mut first = 0usize;
    #[unroll]
    for i in 0..products.len() {
        let factors = products.index(i);
        let n_entries = factors.entries.len() * factors.rank * factors.length;
        if ABSOLUTE_POS >= first && ABSOLUTE_POS < first + n_entries {
            write_parts(factors, numbers.index_mut(i), ABSOLUTE_POS - first);
        }
        first += n_entries;
    }
}

#[cube]
fn write_parts<F: Float>(factors: &Factors, numbers: &mut Array<F>, entry: usize) {
    let Factors { length, pitch, rank, step, rank_step, .. } = *factors;
    let ranks = factors.entries.len() * rank;
    let (line, at) = (entry / length, entry % length);
    let mut rest = 0.0f32;
    #[unroll]
    for i in 0..factors.entries.len() {
        if line / rank == i {
            rest = factors.entries.index(i)[at * step + line % rank * rank_step];
        }
    }
    #[unroll]
    for part in 0..PARTS {
        // Rounded in its bits: some compilers take a conversion there and back for nothing. The last is what is left, so that what is no
        // number stays none.
        let bits = u32::reinterpret(rest) + 0x8000u32;
        let rounded = f32::reinterpret(bits & 0xffff_0000u32);
        let number = if comptime!(part + 1 < PARTS) { rounded } else { rest };
        numbers[(part * ranks + line) * pitch + at] = F::cast_from(number);
        rest -= number;
    }
}

#[cfg(test)]
mod tests {
    use super::super::Side;
    use super::*;
    use crate::ops::engine::any_device::{device, random, values};

    #[test]
    fn the_numbers_of_every_factor_add_up_to_it() {
        let Some(device) = device() else { return };
        // Numbers of 24 bits show whether those in `bf16` would be rounded.
        let (_, x) = random(9, [21, 14], &device);
        let factors = |n: usize, shape: [usize; 2]| (0..n).map(|seed| random(seed, shape, &device)).unzip();
        let (of_rows, rights): (Vec<_>, Vec<_>) = factors(3, [4, 14]);
        let (of_columns, lefts): (Vec<_>, Vec<_>) = factors(2, [21, 5]);
        let products = [Thin::rows(&x, &rights, 1.0), Thin::columns(&x, &lefts, 1.0, Side::Rows)];
        let parts: Vec<_> = products.iter().map(Parts::new).collect();
        fill(&parts);
        for (parts, wanted, rank, length, pitch) in
            [(&parts[0], &of_rows, 4, 14, 16), (&parts[1], &of_columns, 5, 21, 24)]
        {
            let written = CubeTensor::new_contiguous(
                x.client.clone(),
                x.device.clone(),
                Shape::from([PARTS * wanted.len() * rank, pitch]),
                parts.numbers.handle.clone(),
                DType::F32,
            );
            let numbers = values(&written);
            for (i, wanted) in wanted.iter().enumerate() {
                for (k, at) in (0..rank).flat_map(|k| (0..length).map(move |at| (k, at))) {
                    let line = |part: usize| (part * parts.product.factors.len() + i) * rank + k;
                    let number = |part: usize| numbers[line(part) * pitch + at];
                    let is_of_rows = parts.product.depth == Depth::Columns;
                    let whole = wanted[if is_of_rows { k * length + at } else { at * rank + k }];
                    let sum = (0..PARTS).map(number).sum::<f32>();
                    assert_eq!(sum, whole, "factor {i} of rank {rank}, rank {k}, entry {at}");
                    for part in 0..PARTS {
                        assert_eq!(number(part).to_bits() & 0xffff, 0, "part {part} of {whole} is no bf16");
                    }
                }
            }
        }
    }
}
