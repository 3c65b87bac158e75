//! The products of a matrix of tokens with one of a few columns, as an adapter has them.
//!
//! Tiles of a general product are as wide as high: of such an output they leave a GPU a handful of workgroups, each with all of the
//! depth before it. Here the large matrix, which is what takes time to read, is spread over all of them, and read once for every
//! [`RANKS`] columns. All sums are `f32`, in one order.
//!
//! Where warpgroups multiply they make these products (`parts.rs`): the small matrix's lines are few beside a tile's even in parts, and
//! the depth is cut so that there are tiles for all processors. One such product serves the adapters of all layers of one input, and
//! products that are asked for together share the launches before and behind them.

mod parts;
mod sums;

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use super::Engine;
use crate::ops::cube::{bytes, empty, lane_sum, vector_width};
use crate::ops::profile;
use sums::{Layout, Sums};

/// Columns of the output that a workgroup makes.
const RANKS: usize = 8;
/// Rows of the large matrix of which [`rows_kernel()`] makes an output at a time.
const ROWS: usize = 4;
/// Threads that share a row there.
const ROW_THREADS: usize = 128;
/// Vectors of a row that a workgroup of [`columns_kernel()`] sums the columns of.
const LANES: usize = 32;
/// Threads there that take turns with the rows.
const TURNS: usize = 8;
/// Rows that each of them loads at once: not every compiler lets one load wait beside the others of a loop.
const AHEAD: usize = 4;
/// Rows of which it makes one partial sum for every [`RANKS`] columns, so that the sums stay an eighth of the matrix, and of a narrow one
/// there are still several workgroups for each processor of a large GPU.
const SLAB: usize = 128;
/// Bytes that products may leave between launches which they share; one that leaves more is made by itself.
const TOGETHER: usize = 64 << 20;

/// Along what a product with the matrix of tokens is a sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Depth {
    /// That matrix's columns.
    Columns,
    /// Its rows, the tokens; and how the output lies.
    Tokens(Side),
}

/// How an output lies whose columns are those of the matrix of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Side {
    /// `[n, r]`, as a gradient of `B` lies.
    Columns,
    /// `[r, n]`, as one of `A` lies.
    Rows,
}

/// Products of a matrix of tokens with factors, one each.
pub(super) struct Thin<R: Engine> {
    /// `[m, n]`, contiguous.
    x: CubeTensor<R>,
    /// In `f32`.
    factors: Vec<CubeTensor<R>>,
    /// What the products are multiplied by.
    scale: f32,
    depth: Depth,
}

impl<R: Engine> Thin<R> {
    /// `scale · x · rightᵀ` for each of these: `[m, n] · [n, r] -> [m, r]`; `right: [r, n]` is `f32`.
    pub(super) fn rows(x: &CubeTensor<R>, rights: &[CubeTensor<R>], scale: f32) -> Self {
        Self::new(x, rights, scale, Depth::Columns)
    }

    /// `scale · xᵀ · left` for each of these: `[m, n]ᵀ · [m, r]`, as `[n, r]` or `[r, n]`; `left` is `f32`.
    pub(super) fn columns(x: &CubeTensor<R>, lefts: &[CubeTensor<R>], scale: f32, side: Side) -> Self {
        Self::new(x, lefts, scale, Depth::Tokens(side))
    }

    fn new(x: &CubeTensor<R>, factors: &[CubeTensor<R>], scale: f32, depth: Depth) -> Self {
        assert!(x.is_contiguous(), "a matrix of tokens with gaps in its rows, or turned");
        let product = Self { x: x.clone(), factors: factors.to_vec(), scale, depth };
        let axis = 1 - product.rank_axis();
        for factor in factors {
            assert_eq!(factor.meta.shape()[axis], x.meta.shape()[axis], "depth of a product's operands");
        }
        product
    }

    /// The factors' axis along which their columns are counted.
    fn rank_axis(&self) -> usize {
        if self.depth == Depth::Columns { 0 } else { 1 }
    }

    /// The first factor's columns.
    fn rank(&self) -> usize {
        self.factors[0].meta.shape()[self.rank_axis()]
    }

    /// Room for the first factor's output.
    fn output(&self) -> CubeTensor<R> {
        let ([m, n], rank) = ([0, 1].map(|i| self.x.meta.shape()[i]), self.rank());
        let shape = match self.depth {
            Depth::Columns => [m, rank],
            Depth::Tokens(Side::Columns) => [n, rank],
            Depth::Tokens(Side::Rows) => [rank, n],
        };
        empty(&self.x, Shape::from(shape), DType::F32)
    }

    /// About what is between its launches: sums of slabs, or parts of the factors and their sums.
    fn bytes_between(&self) -> usize {
        let [m, n] = [0, 1].map(|i| self.x.meta.shape()[i]);
        let of_slabs = m * n / SLAB * RANKS * size_of::<f32>();
        let of_parts = parts::PARTS * self.rank() * (m + n) * (size_of::<u16>() + size_of::<f32>());
        self.factors.len() * of_slabs.max(of_parts)
    }

    /// The same in products of factors that lie alike and have as many columns.
    fn of_factors_alike(&self) -> impl Iterator<Item = Self> {
        let are_alike = |a: &CubeTensor<R>, b: &CubeTensor<R>| {
            a.meta.shape() == b.meta.shape() && a.meta.strides() == b.meta.strides()
        };
        let of = |factors: &[CubeTensor<R>]| Self { x: self.x.clone(), factors: factors.to_vec(), ..*self };
        self.factors.chunk_by(are_alike).map(of)
    }
}

/// The outputs of each of these: made together as long as they leave less than [`TOGETHER`] between their launches.
pub(super) fn multiply<R: Engine>(name: &'static str, products: &[Thin<R>]) -> Vec<Vec<CubeTensor<R>>> {
    let mut rest = products;
    let mut outputs = Vec::with_capacity(products.len());
    for n in runs(products.iter().map(Thin::bytes_between), TOGETHER) {
        let (together, others) = rest.split_at(n);
        outputs.extend(multiply_together(name, together));
        rest = others;
    }
    outputs
}

/// How many of these sizes each run of them has whose sum is `most`, or less; one that is larger is alone.
fn runs(sizes: impl Iterator<Item = usize>, most: usize) -> Vec<usize> {
    let (mut runs, mut sum) = (Vec::new(), 0);
    for size in sizes {
        sum += size;
        match runs.last_mut() {
            Some(run) if sum <= most => *run += 1,
            _ => {
                runs.push(1);
                sum = size;
            }
        }
    }
    runs
}

fn multiply_together<R: Engine>(name: &'static str, products: &[Thin<R>]) -> Vec<Vec<CubeTensor<R>>> {
    let with_way = |product: Thin<R>| (parts::are_taken(&product), product);
    let groups = products.iter().map(|product| product.of_factors_alike().map(with_way).collect::<Vec<_>>());
    let groups: Vec<_> = groups.collect();
    let in_parts =
        groups.iter().flatten().filter(|(takes_parts, _)| *takes_parts).map(|(_, product)| product);
    let mut made_in_parts = parts::multiply(name, &in_parts.collect::<Vec<_>>()).into_iter();
    let mut of_slabs = Vec::new();
    let mut outputs = |(takes_parts, product): &(bool, Thin<R>)| match (takes_parts, product.depth) {
        (true, _) => made_in_parts.next().expect("parts make every product that takes them"),
        (false, Depth::Columns) => rows(name, product),
        (false, Depth::Tokens(side)) => {
            let sums = columns(name, product, side);
            of_slabs.extend_from_slice(&sums);
            sums.into_iter().flat_map(|sums| sums.outputs).collect()
        }
    };
    let outputs = groups.iter().map(|group| group.iter().flat_map(&mut outputs).collect()).collect();
    if let Some(Sums { terms, .. }) = of_slabs.first() {
        profile::kernel(name, 0, 0, &terms.client, || sums::launch(&of_slabs));
    }
    outputs
}

fn rows<R: Engine>(name: &'static str, product: &Thin<R>) -> Vec<CubeTensor<R>> {
    let Thin { x, factors, scale, .. } = product;
    let [m, depth] = [0, 1].map(|i| x.meta.shape()[i]);
    let rank = product.rank();
    let (client, dtype) = (&x.client, x.dtype);
    let width = vector_width(depth);
    // Neighbours read the same rows.
    let cubes = CubeCount::Static(rank.div_ceil(RANKS) as u32, m.div_ceil(ROWS) as u32, 1);
    let of_factor = |right: &CubeTensor<R>| {
        let (right, out) = (into_contiguous(right.clone()), product.output());
        profile::kernel(name, 2 * m * depth * rank, bytes(&[x, &right, &out]), client, || {
            #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
            // SAFETY: rows and ranks are held against their numbers, and a row's vectors are counted.
            unsafe {
                rows_kernel::launch_unchecked::<R>(
                    client,
                    cubes.clone(),
                    CubeDim::new_1d(ROW_THREADS as u32),
                    width,
                    x.clone().into_array_arg(),
                    right.into_array_arg(),
                    out.clone().into_array_arg(),
                    m,
                    depth / width,
                    rank,
                    *scale,
                    dtype.into(),
                );
            }
        });
        out
    };
    factors.iter().map(of_factor).collect()
}

#[cube(launch_unchecked)]
fn rows_kernel<F: Float, N: Size>(
    x: &Array<Vector<F, N>>,
    right: &Array<Vector<f32, N>>,
    out: &mut Array<f32>,
    m: usize,
    row_vectors: usize,
    rank: usize,
    scale: f32,
    #[define(F)] _dtype: StorageType,
) {
    let first_rank = CUBE_POS_X as usize * RANKS;
    let first_row = CUBE_POS_Y as usize * ROWS;
    let unit = UNIT_POS as usize;
    let mut sums = Array::<f32>::new(comptime!(ROWS * RANKS));
    #[unroll]
    for i in 0..comptime!(ROWS * RANKS) {
        sums[i] = 0.0f32;
    }
    for at in range_stepped(unit, row_vectors, ROW_THREADS) {
        let mut left = Array::<Vector<f32, N>>::new(ROWS);
        #[unroll]
        for i in 0..ROWS {
            left[i] = Vector::cast_from(x[min(first_row + i, m - 1) * row_vectors + at]);
        }
        #[unroll]
        for k in 0..RANKS {
            let factors = right[min(first_rank + k, rank - 1) * row_vectors + at];
            #[unroll]
            for i in 0..ROWS {
                sums[i * RANKS + k] += lane_sum(left[i] * factors);
            }
        }
    }

    // A few threads an output, then one. An output's row is turned by its number, which keeps it out of its neighbours' banks: longer
    // rows would be more than the 16 KiB that every device has.
    let parts = comptime!(ROW_THREADS / (ROWS * RANKS));
    let mut shared = SharedMemory::<f32>::new(comptime!(ROWS * RANKS * ROW_THREADS));
    #[unroll]
    for i in 0..comptime!(ROWS * RANKS) {
        shared[i * ROW_THREADS + (unit + i * parts) % ROW_THREADS] = sums[i];
    }
    sync_cube();
    let mut part = 0.0f32;
    let output = unit / parts;
    for i in 0..comptime!(ROWS * RANKS) {
        part += shared[output * ROW_THREADS + (unit % parts + (i + output) * parts) % ROW_THREADS];
    }
    sync_cube();
    shared[unit] = part;
    sync_cube();
    let row = first_row + unit / RANKS;
    let k = first_rank + unit % RANKS;
    if unit < comptime!(ROWS * RANKS) && row < m && k < rank {
        let mut sum = 0.0f32;
        #[unroll]
        for i in 0..parts {
            sum += shared[unit * parts + i];
        }
        out[row * rank + k] = sum * scale;
    }
}

/// Launches the sums of slabs of rows; what they come to is still to be launched.
fn columns<R: Engine>(name: &'static str, product: &Thin<R>, side: Side) -> Vec<Sums<R>> {
    let Thin { x, factors, scale, .. } = product;
    let [m, n] = [0, 1].map(|i| x.meta.shape()[i]);
    let rank = product.rank();
    let (client, dtype) = (&x.client, x.dtype);
    let width = vector_width(n);
    let slab = SLAB * rank.div_ceil(RANKS);
    let slabs = m.div_ceil(slab);
    let cubes =
        CubeCount::Static((n / width).div_ceil(LANES) as u32, rank.div_ceil(RANKS) as u32, slabs as u32);
    let of_factor = |left: &CubeTensor<R>| {
        let (left, out) = (into_contiguous(left.clone()), product.output());
        let terms = empty(x, Shape::from([slabs * rank, n]), DType::F32);
        profile::kernel(name, 2 * m * n * rank, bytes(&[x, &left, &out]), client, || {
            #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
            // SAFETY: columns and ranks are held against their numbers, and rows are counted.
            unsafe {
                columns_kernel::launch_unchecked::<R>(
                    client,
                    cubes.clone(),
                    CubeDim::new_1d((LANES * TURNS) as u32),
                    width,
                    x.clone().into_array_arg(),
                    left.into_array_arg(),
                    terms.clone().into_array_arg(),
                    m,
                    slab,
                    n / width,
                    rank,
                    dtype.into(),
                );
            }
        });
        let layout = Layout::Ranks(side);
        Sums { terms, layout, scale: *scale, outputs: vec![out] }
    };
    factors.iter().map(of_factor).collect()
}

/// Sums of a slab's rows each, `[slabs · r, n]`.
#[cube(launch_unchecked)]
fn columns_kernel<F: Float, N: Size>(
    x: &Array<Vector<F, N>>,
    left: &Array<f32>,
    sums: &mut Array<Vector<f32, N>>,
    m: usize,
    slab: usize,
    row_vectors: usize,
    rank: usize,
    #[define(F)] _dtype: StorageType,
) {
    let unit = UNIT_POS as usize;
    let column = CUBE_POS_X as usize * LANES + unit % LANES;
    let turn = unit / LANES;
    let first_rank = CUBE_POS_Y as usize * RANKS;
    let part = CUBE_POS_Z as usize;
    let mut own = Array::<Vector<f32, N>>::new(RANKS);
    #[unroll]
    for k in 0..RANKS {
        own[k] = Vector::new(0.0f32);
    }
    let end = min(m, (part + 1) * slab);
    for first in range_stepped(part * slab + turn, end, comptime!(TURNS * AHEAD)) {
        let mut entries = Array::<Vector<F, N>>::new(AHEAD);
        #[unroll]
        for i in 0..AHEAD {
            entries[i] = x[min(first + i * TURNS, m - 1) * row_vectors + min(column, row_vectors - 1)];
        }
        #[unroll]
        for i in 0..AHEAD {
            let row = first + i * TURNS;
            let entries = Vector::<f32, N>::cast_from(entries[i]);
            #[unroll]
            for k in 0..RANKS {
                let factor = left[min(row, m - 1) * rank + min(first_rank + k, rank - 1)];
                own[k] += entries * Vector::new(select(row < end, factor, 0.0f32));
            }
        }
    }
    let mut shared = SharedMemory::<Vector<f32, N>>::new(comptime!(LANES * TURNS));
    #[unroll]
    for k in 0..RANKS {
        shared[unit] = own[k];
        sync_cube();
        if turn == 0 && column < row_vectors && first_rank + k < rank {
            let mut sum = shared[unit];
            #[unroll]
            for i in 1..TURNS {
                sum += shared[unit + i * LANES];
            }
            sums[(part * rank + first_rank + k) * row_vectors + column] = sum;
        }
        sync_cube();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_have_room_for_all_that_are_in_them() {
        for (sizes, wanted) in [
            (&[][..], &[][..]),
            (&[3, 4, 3], &[3]),
            (&[3, 4, 4, 6, 1], &[2, 2, 1]),
            (&[30, 1, 2, 30, 30], &[1, 2, 1, 1]),
        ] {
            assert_eq!(runs(sizes.iter().copied(), 10), wanted, "{sizes:?}");
        }
    }
}
