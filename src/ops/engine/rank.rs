//! The products of a matrix of tokens with one of a few columns, as an adapter has them.
//!
//! Tiles of a general product are as wide as high: of such an output they leave a GPU a handful of workgroups, each with all of the
//! depth before it. Here the large matrix, which is what takes time to read, is spread over all of them, and read once for every
//! [`RANKS`] columns. All sums are `f32`, in one order.
//!
//! Where warpgroups multiply they make these products (`parts.rs`): the small matrix's lines are few beside a tile's even in parts, and
//! the depth is cut so that there are tiles for all processors. One such product serves the adapters of all layers of one input.

mod parts;

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use super::Engine;
use crate::ops::cube::{arrays, bytes, empty, lane_sum, one_thread_each, vector_width};
use crate::ops::profile;

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

/// Along what the products with the matrix of tokens are sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Depth {
    /// Its columns: those of [`rows`].
    Columns,
    /// Its rows: those of [`columns`].
    Tokens,
}

/// `factor · x · rightᵀ` for each of these: `[m, depth] · [depth, r] -> [m, r]`; `right: [r, depth]` is `f32`.
pub(super) fn rows<R: Engine>(
    name: &'static str,
    x: &CubeTensor<R>,
    rights: &[CubeTensor<R>],
    factor: f32,
) -> Vec<CubeTensor<R>> {
    let x = into_contiguous(x.clone());
    for right in rights {
        assert_eq!(right.meta.shape()[1], x.meta.shape()[1], "{name}: depth of the operands");
    }
    let takes_parts = parts::are_taken(&x, Depth::Columns);
    let of_group = |rights: &[CubeTensor<R>]| match rights[0].meta.shape()[0] {
        rank if takes_parts && rank.is_multiple_of(2) => parts::rows(name, &x, rights, factor),
        _ => rights.iter().map(|right| rows_of_one(name, &x, right, factor)).collect(),
    };
    rights.chunk_by(parts::are_alike).flat_map(of_group).collect()
}

fn rows_of_one<R: Engine>(
    name: &'static str,
    x: &CubeTensor<R>,
    right: &CubeTensor<R>,
    factor: f32,
) -> CubeTensor<R> {
    let [m, depth] = [0, 1].map(|i| x.meta.shape()[i]);
    let rank = right.meta.shape()[0];
    let right = into_contiguous(right.clone());
    let out = empty(x, Shape::from([m, rank]), DType::F32);
    let (client, dtype) = (x.client.clone(), x.dtype);
    let width = vector_width(depth);
    // Neighbours read the same rows.
    let cubes = CubeCount::Static(rank.div_ceil(RANKS) as u32, m.div_ceil(ROWS) as u32, 1);
    profile::kernel(name, 2 * m * depth * rank, bytes(&[x, &right, &out]), &client, || {
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: rows and ranks are held against their numbers, and a row's vectors are counted.
        unsafe {
            rows_kernel::launch_unchecked::<R>(
                &client,
                cubes,
                CubeDim::new_1d(ROW_THREADS as u32),
                width,
                x.clone().into_array_arg(),
                right.into_array_arg(),
                out.clone().into_array_arg(),
                m,
                depth / width,
                rank,
                factor,
                dtype.into(),
            );
        }
    });
    out
}

#[cube(launch_unchecked)]
fn rows_kernel<F: Float, N: Size>(
    x: &Array<Vector<F, N>>,
    right: &Array<Vector<f32, N>>,
    out: &mut Array<f32>,
    m: usize,
    row_vectors: usize,
    rank: usize,
    factor: f32,
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
        out[row * rank + k] = sum * factor;
    }
}

/// Which way [`columns`] writes its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Side {
    /// `[n, r]`, as a gradient of `B` lies.
    Columns,
    /// `[r, n]`, as one of `A` lies.
    Rows,
}

impl Side {
    fn shape(self, n: usize, rank: usize) -> [usize; 2] {
        if self == Self::Rows { [rank, n] } else { [n, rank] }
    }
}

/// `factor · xᵀ · left` for each of these: `[m, n]ᵀ · [m, r]`, as `[n, r]` or `[r, n]`; `left` is `f32`.
pub(super) fn columns<R: Engine>(
    name: &'static str,
    x: &CubeTensor<R>,
    lefts: &[CubeTensor<R>],
    factor: f32,
    side: Side,
) -> Vec<CubeTensor<R>> {
    let x = into_contiguous(x.clone());
    for left in lefts {
        assert_eq!(left.meta.shape()[0], x.meta.shape()[0], "{name}: depth of the operands");
    }
    let takes_parts = parts::are_taken(&x, Depth::Tokens);
    let of_group = |lefts: &[CubeTensor<R>]| match takes_parts {
        true => parts::columns(name, &x, lefts, factor, side),
        false => lefts.iter().map(|left| columns_of_one(name, &x, left, factor, side)).collect(),
    };
    lefts.chunk_by(parts::are_alike).flat_map(of_group).collect()
}

fn columns_of_one<R: Engine>(
    name: &'static str,
    x: &CubeTensor<R>,
    left: &CubeTensor<R>,
    factor: f32,
    side: Side,
) -> CubeTensor<R> {
    let left = into_contiguous(left.clone());
    let [m, n] = [0, 1].map(|i| x.meta.shape()[i]);
    let rank = left.meta.shape()[1];
    let width = vector_width(n);
    let slab = SLAB * rank.div_ceil(RANKS);
    let slabs = m.div_ceil(slab);
    let sums = empty(x, Shape::from([slabs * rank, n]), DType::F32);
    let out = empty(x, Shape::from(side.shape(n, rank)), DType::F32);
    let (client, dtype) = (x.client.clone(), x.dtype);
    let cubes =
        CubeCount::Static((n / width).div_ceil(LANES) as u32, rank.div_ceil(RANKS) as u32, slabs as u32);
    profile::kernel(name, 2 * m * n * rank, bytes(&[x, &left, &out]), &client, || {
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: columns and ranks are held against their numbers, and rows are counted.
        unsafe {
            columns_kernel::launch_unchecked::<R>(
                &client,
                cubes,
                CubeDim::new_1d((LANES * TURNS) as u32),
                width,
                x.clone().into_array_arg(),
                left.into_array_arg(),
                sums.clone().into_array_arg(),
                m,
                slab,
                n / width,
                rank,
                dtype.into(),
            );
        }
        sum_slabs(&sums, slabs, std::slice::from_ref(&out), factor, side);
    });
    out
}

/// Launches the sums of slabs, `[slabs, outputs, r, n] -> outputs[i][r, n]`, or turned.
fn sum_slabs<R: Engine>(
    sums: &CubeTensor<R>,
    slabs: usize,
    outputs: &[CubeTensor<R>],
    factor: f32,
    side: Side,
) {
    let [lines, n] = [0, 1].map(|i| sums.meta.shape()[i]);
    let (ranks, width) = (lines / slabs, vector_width(n));
    let (cubes, cube) = one_thread_each(&sums.client, ranks * n / width);
    #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
    // SAFETY: a rank's vectors are held against their number, and slabs are counted.
    unsafe {
        sum_kernel::launch_unchecked::<R>(
            &sums.client,
            cubes,
            cube,
            width,
            sums.clone().into_array_arg(),
            arrays(outputs),
            slabs,
            n / width,
            ranks / outputs.len(),
            factor,
            side,
        );
    }
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

/// The sums of all slabs.
#[cube(launch_unchecked)]
fn sum_kernel<N: Size>(
    sums: &Array<Vector<f32, N>>,
    outputs: &mut Sequence<Array<f32>>,
    slabs: usize,
    row_vectors: usize,
    rank: usize,
    factor: f32,
    #[comptime] side: Side,
) {
    let ranks = outputs.len() * rank;
    let line = ABSOLUTE_POS / row_vectors;
    if line < ranks {
        let mut sum = sums[ABSOLUTE_POS];
        for slab in 1..slabs {
            sum += sums[slab * ranks * row_vectors + ABSOLUTE_POS];
        }
        let k = line % rank;
        let column = ABSOLUTE_POS % row_vectors * sum.size();
        #[unroll]
        for i in 0..outputs.len() {
            if line / rank == i {
                #[unroll]
                for c in 0..sum.size() {
                    let at = match comptime!(side) {
                        Side::Rows => k * row_vectors * sum.size() + column + c,
                        Side::Columns => (column + c) * rank + k,
                    };
                    outputs.index_mut(i)[at] = sum[c] * factor;
                }
            }
        }
    }
}
