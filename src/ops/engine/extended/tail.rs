//! An adapter's factors as 16-bit numbers, with which operands go on.

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use crate::ops::cube::{bytes, empty, one_thread_each};
use crate::ops::engine::product::{excess_bits, turned};
use crate::ops::profile;

/// What a tail is a multiple of. Most routines have stages of 32, and check no load where the depth is whole ones.
const STAGE: usize = 64;
/// Products of 16-bit numbers that stand for one of the adapter's.
const PARTS: usize = 3;

/// Which operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Side {
    /// `[lines, depth]`
    Left,
    /// `[depth, lines]`
    Right,
}

impl Side {
    /// Of the parts of a product, the one that takes the second of the two numbers that stand for one of this operand's.
    const fn second(self) -> usize {
        match self {
            Self::Left => 1,
            Self::Right => 2,
        }
    }
}

/// Entries that an adapter adds to the depth.
fn tail_depth(rank: usize) -> usize {
    (PARTS * rank).next_multiple_of(STAGE)
}

/// An adapter's factors, `left: [m, rank]`, which is multiplied by `scale`, and `right: [rank, n]`, in `f32`, as tails of operands,
/// `[m, depth]` and `[depth, n]`: their numbers' first or second parts, as the operand has them in each part of a product, and zeros.
/// The left one lies along the depth in memory, the right one too or along its columns.
pub(super) fn tails<R: CubeRuntime>(
    left: &CubeTensor<R>,
    scale: f32,
    right: &CubeTensor<R>,
    right_along_depth: bool,
    dtype: DType,
) -> [CubeTensor<R>; 2] {
    let ([m, rank], n) = ([0, 1].map(|i| left.meta.shape()[i]), right.meta.shape()[1]);
    let [line_step, left_rank_step] = [0, 1].map(|i| left.meta.strides()[i]);
    let [right_rank_step, column_step] = [0, 1].map(|i| right.meta.strides()[i]);
    let depth = tail_depth(rank);
    let left_tail = empty(left, Shape::from([m, depth]), dtype);
    let right_shape = if right_along_depth { [n, depth] } else { [depth, n] };
    let right_tail = empty(right, Shape::from(right_shape), dtype);
    let client = &left.client;
    let (cubes, cube) = one_thread_each(client, (m + n) * depth);
    let moved = bytes(&[left, right, &left_tail, &right_tail]);
    profile::kernel("lora_linear tails", (m + n) * depth, moved, client, || {
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: entries of both tails are held against their numbers, and ranks are smaller than theirs.
        unsafe {
            tails_kernel::launch_unchecked::<R>(
                client,
                cubes,
                cube,
                left.clone().into_array_arg(),
                right.clone().into_array_arg(),
                left_tail.clone().into_array_arg(),
                right_tail.clone().into_array_arg(),
                m,
                n,
                line_step,
                left_rank_step,
                column_step,
                right_rank_step,
                rank,
                depth,
                scale,
                right_along_depth,
                excess_bits(dtype),
                dtype.into(),
            );
        }
    });
    [left_tail, if right_along_depth { turned(&right_tail) } else { right_tail }]
}

/// `excess`: bits of an `f32` that the output's type has none for.
#[cube(launch_unchecked)]
fn tails_kernel<F: Float>(
    left: &Array<f32>,
    right: &Array<f32>,
    left_tail: &mut Array<F>,
    right_tail: &mut Array<F>,
    m: usize,
    n: usize,
    line_step: usize,
    left_rank_step: usize,
    column_step: usize,
    right_rank_step: usize,
    rank: usize,
    depth: usize,
    scale: f32,
    #[comptime] right_along_depth: bool,
    #[comptime] excess: u32,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS < m * depth {
        let at = ABSOLUTE_POS % depth;
        let whole = left[ABSOLUTE_POS / depth * line_step + at % rank * left_rank_step] * scale;
        left_tail[ABSOLUTE_POS] = F::cast_from(number(whole, at / rank, Side::Left, excess));
    } else if ABSOLUTE_POS < (m + n) * depth {
        let entry = ABSOLUTE_POS - m * depth;
        let (column, at) = if comptime!(right_along_depth) {
            (entry / depth, entry % depth)
        } else {
            (entry % n, entry / n)
        };
        let whole = right[column * column_step + at % rank * right_rank_step];
        right_tail[entry] = F::cast_from(number(whole, at / rank, Side::Right, excess));
    }
}

/// What an operand has of a number in this part of a product: its first part, its second or, behind the last, nothing.
#[cube]
fn number(whole: f32, part: usize, #[comptime] side: Side, #[comptime] excess: u32) -> f32 {
    // Rounded in its bits: some compilers take a conversion there and back for nothing.
    let bits = u32::reinterpret(whole) + comptime!(1u32 << (excess - 1));
    let first = f32::reinterpret(bits & comptime!(u32::MAX << excess));
    let number = select(part == comptime!(side.second()), whole - first, first);
    select(part < PARTS, number, 0.0f32)
}
