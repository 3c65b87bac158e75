//! The products of a matrix of tokens with one of a few columns, as an adapter has them.
//!
//! Tiles of a general product are as wide as high: of such an output they leave a GPU a handful of workgroups, each with all of the
//! depth before it. Here the large matrix, which is what takes time to read, is spread over all of them, and read once for every
//! [`RANKS`] columns. All sums are `f32`, in one order.
//!
//! Where warpgroups multiply they make these products: the small matrix, which is `f32`, is then as many of the large one's numbers as
//! its own digits take, and its lines are still a fraction of a tile.

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use super::Engine;
use super::product::turned;
use super::routes::RouteKind;
use super::warpgroup::{self, ROW_ENTRIES, WarpgroupProduct};
use crate::ops::cube::{bytes, empty, lane_sum, one_thread_each, vector_width};
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
/// Rows of which it makes one partial sum for every [`RANKS`] columns, so that the sums stay an eighth of the matrix, and of a narrow one
/// there are still several workgroups for each processor of a large GPU.
const SLAB: usize = 128;

/// `factor · x · rightᵀ`: `[m, depth] · [r, depth]ᵀ -> [m, r]`; `right` is `f32`.
pub(super) fn rows<R: Engine>(
    name: &'static str,
    x: &CubeTensor<R>,
    right: &CubeTensor<R>,
    factor: f32,
) -> CubeTensor<R> {
    let x = into_contiguous(x.clone());
    let [m, depth] = [0, 1].map(|i| x.meta.shape()[i]);
    let rank = right.meta.shape()[0];
    assert_eq!(right.meta.shape()[1], depth, "{name}: depth of the operands");
    // Of an odd rank the sums would have rows of an odd length.
    if rank.is_multiple_of(2) && on_warpgroups(&x, true) {
        return rows_in_parts(name, &x, right, factor);
    }
    let right = into_contiguous(right.clone());
    let out = empty(&x, Shape::from([m, rank]), DType::F32);
    let (client, dtype) = (x.client.clone(), x.dtype);
    let width = vector_width(depth);
    // Neighbours read the same rows.
    let cubes = CubeCount::Static(rank.div_ceil(RANKS) as u32, m.div_ceil(ROWS) as u32, 1);
    profile::kernel(name, 2 * m * depth * rank, bytes(&[&x, &right, &out]), &client, || {
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: rows and ranks are held against their numbers, and a row's vectors are counted.
        unsafe {
            rows_kernel::launch_unchecked::<R>(
                &client,
                cubes,
                CubeDim::new_1d(ROW_THREADS as u32),
                width,
                x.into_array_arg(),
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

    // A few threads an output, then one. Rows are longer than what they hold, which keeps outputs out of each other's banks.
    let parts = comptime!(ROW_THREADS / (ROWS * RANKS));
    let pitch = comptime!(ROW_THREADS + parts);
    let mut shared = SharedMemory::<f32>::new(comptime!(ROWS * RANKS * pitch));
    #[unroll]
    for i in 0..comptime!(ROWS * RANKS) {
        shared[i * pitch + unit] = sums[i];
    }
    sync_cube();
    let mut part = 0.0f32;
    for i in 0..comptime!(ROWS * RANKS) {
        part += shared[unit / parts * pitch + unit % parts + i * parts];
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

/// `factor · xᵀ · left`: `[m, n]ᵀ · [m, r]`, as `[n, r]` or `[r, n]`; `left` is `f32`.
pub(super) fn columns<R: Engine>(
    name: &'static str,
    x: &CubeTensor<R>,
    left: &CubeTensor<R>,
    factor: f32,
    side: Side,
) -> CubeTensor<R> {
    let [x, left] = [x, left].map(|tensor| into_contiguous(tensor.clone()));
    let [m, n] = [0, 1].map(|i| x.meta.shape()[i]);
    let rank = left.meta.shape()[1];
    assert_eq!(left.meta.shape()[0], m, "{name}: depth of the operands");
    let width = vector_width(n);
    let slab = SLAB * rank.div_ceil(RANKS);
    let parts = on_warpgroups(&x, false).then(|| empty_parts(&x, rank, m));
    let splits = parts.as_ref().map_or(1, |_| warpgroup::splits(&x.client, [PARTS * rank, n, m], TILE));
    let slabs = if parts.is_some() { PARTS * splits } else { m.div_ceil(slab) };
    let sums = empty(&x, Shape::from([slabs * rank, n]), DType::F32);
    let shape = if side == Side::Rows { [rank, n] } else { [n, rank] };
    let out = empty(&x, Shape::from(shape), DType::F32);
    let (client, dtype) = (x.client.clone(), x.dtype);
    let cubes =
        CubeCount::Static((n / width).div_ceil(LANES) as u32, rank.div_ceil(RANKS) as u32, slabs as u32);
    let (sum_cubes, sum_cube) = one_thread_each(&client, rank * n / width);
    profile::kernel(name, 2 * m * n * rank, bytes(&[&x, &left, &out]), &client, || {
        if let Some(parts) = &parts {
            split(&left, 1, parts);
            multiply(parts, &x, &sums, splits);
        }
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: columns and ranks are held against their numbers, and rows are counted.
        unsafe {
            if parts.is_none() {
                columns_kernel::launch_unchecked::<R>(
                    &client,
                    cubes,
                    CubeDim::new_1d((LANES * TURNS) as u32),
                    width,
                    x.into_array_arg(),
                    left.into_array_arg(),
                    sums.clone().into_array_arg(),
                    m,
                    slab,
                    n / width,
                    rank,
                    dtype.into(),
                );
            }
            sum_kernel::launch_unchecked::<R>(
                &client,
                sum_cubes,
                sum_cube,
                width,
                sums.into_array_arg(),
                out.clone().into_array_arg(),
                slabs,
                n / width,
                rank,
                factor,
                side,
            );
        }
    });
    out
}

/// Numbers of `bf16`, of 8 bits, that one of `f32`, of 24, is the sum of. Of `f16`, whose smallest number is not small beside a
/// gradient, there may be none.
const PARTS: usize = 3;
/// Columns of a tile: the fewest, as there are few tiles.
const TILE: u32 = 128;

/// Whether warpgroups multiply a factor's parts with this matrix, which is contiguous, as the left operand or the right one.
fn on_warpgroups<R: Engine>(x: &CubeTensor<R>, is_left: bool) -> bool {
    let [m, n] = [0, 1].map(|i| x.meta.shape()[i]);
    if x.dtype != DType::BF16
        || !n.is_multiple_of(ROW_ENTRIES)
        || !warpgroup::are_there::<R>(&x.client, x.dtype)
    {
        return false;
    }
    let kind = RouteKind {
        m,
        n: TILE as usize,
        depth: TILE as usize,
        rank: 0,
        is_turned: is_left,
        dtype: x.dtype,
        out: DType::F32,
        has_addend: false,
    };
    warpgroup::comes_out_right::<R>(&x.device, kind, TILE)
}

/// Room for the parts of a factor of so many entries a column, `[PARTS · r, length]`, in the type of `like`.
fn empty_parts<R: Engine>(like: &CubeTensor<R>, rank: usize, length: usize) -> CubeTensor<R> {
    let pitch = length.next_multiple_of(ROW_ENTRIES);
    let mut parts = empty(like, Shape::from([PARTS * rank, pitch]), like.dtype);
    parts.meta.shape_mut()[1] = length;
    parts
}

/// Fills in the parts that add up to the entries of a factor, whose columns run along this axis.
fn split<R: Engine>(factor: &CubeTensor<R>, rank_axis: usize, parts: &CubeTensor<R>) {
    let ([rank, length], strides) =
        ([rank_axis, 1 - rank_axis].map(|axis| factor.meta.shape()[axis]), factor.meta.strides());
    let (cubes, cube) = one_thread_each(&factor.client, rank * length);
    #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
    // SAFETY: ranks and entries are held against their numbers, and steps are the factor's own.
    unsafe {
        parts_kernel::launch_unchecked::<R>(
            &factor.client,
            cubes,
            cube,
            factor.clone().into_array_arg(),
            parts.clone().into_array_arg(),
            length,
            parts.meta.strides()[0],
            rank,
            strides[1 - rank_axis],
            strides[rank_axis],
            parts.dtype.into(),
        );
    }
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

/// `left · right` in parts of the depth, each a matrix of `sums`.
fn multiply<R: Engine>(left: &CubeTensor<R>, right: &CubeTensor<R>, sums: &CubeTensor<R>, splits: usize) {
    let product = WarpgroupProduct { left, right, tails: None, out: sums, addend: None, splits };
    if let Err(problem) = R::warpgroup_product(TILE, &product) {
        unreachable!("{problem}, in a product with an adapter's parts");
    }
}

/// [`rows`] by the parts of `right`, whose products with `x` are sums over parts of the depth.
fn rows_in_parts<R: Engine>(
    name: &'static str,
    x: &CubeTensor<R>,
    right: &CubeTensor<R>,
    factor: f32,
) -> CubeTensor<R> {
    let ([m, depth], rank) = ([0, 1].map(|i| x.meta.shape()[i]), right.meta.shape()[0]);
    let parts = empty_parts(x, rank, depth);
    let splits = warpgroup::splits(&x.client, [m, PARTS * rank, depth], TILE);
    let sums = empty(x, Shape::from([splits * m, PARTS * rank]), DType::F32);
    let out = empty(x, Shape::from([m, rank]), DType::F32);
    let (cubes, cube) = one_thread_each(&x.client, m * rank);
    profile::kernel(name, 2 * m * depth * rank, bytes(&[x, right, &out]), &x.client, || {
        split(right, 0, &parts);
        multiply(x, &turned(&parts), &sums, splits);
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: entries are held against their number.
        unsafe {
            sum_parts_kernel::launch_unchecked::<R>(
                &x.client,
                cubes,
                cube,
                sums.into_array_arg(),
                out.clone().into_array_arg(),
                splits,
                m,
                rank,
                factor,
            );
        }
    });
    out
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
    for row in range_stepped(part * slab + turn, min(m, (part + 1) * slab), TURNS) {
        let entries = Vector::<f32, N>::cast_from(x[row * row_vectors + min(column, row_vectors - 1)]);
        #[unroll]
        for k in 0..RANKS {
            own[k] += entries * Vector::new(left[row * rank + min(first_rank + k, rank - 1)]);
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
    out: &mut Array<f32>,
    slabs: usize,
    row_vectors: usize,
    rank: usize,
    factor: f32,
    #[comptime] side: Side,
) {
    if ABSOLUTE_POS < rank * row_vectors {
        let mut sum = sums[ABSOLUTE_POS];
        for slab in 1..slabs {
            sum += sums[slab * rank * row_vectors + ABSOLUTE_POS];
        }
        let k = ABSOLUTE_POS / row_vectors;
        let column = ABSOLUTE_POS % row_vectors * sum.size();
        #[unroll]
        for c in 0..sum.size() {
            let at = match comptime!(side) {
                Side::Rows => k * row_vectors * sum.size() + column + c,
                Side::Columns => (column + c) * rank + k,
            };
            out[at] = sum[c] * factor;
        }
    }
}
