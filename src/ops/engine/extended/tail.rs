//! An adapter's factor as 16-bit numbers, with which an operand goes on.

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use crate::ops::cube::{bytes, empty, one_thread_each};
use crate::ops::engine::product::turned;
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

/// A factor `[lines, rank]` in `f32` as an operand's tail `[lines, tail_depth]`: its numbers' first or second parts, as the operand has
/// them in each part of a product, times `scale`, and zeros. Lies along the depth in memory, or along the lines.
pub(super) fn tail<R: CubeRuntime>(
    factor: &CubeTensor<R>,
    scale: f32,
    side: Side,
    along_depth: bool,
    dtype: DType,
) -> CubeTensor<R> {
    let [lines, rank] = [0, 1].map(|i| factor.meta.shape()[i]);
    let [line_step, rank_step] = [0, 1].map(|i| factor.meta.strides()[i]);
    let depth = tail_depth(rank);
    let shape = if along_depth { [lines, depth] } else { [depth, lines] };
    let out = empty(factor, Shape::from(shape), dtype);
    let (cubes, cube) = one_thread_each(&factor.client, lines * depth);
    let excess = if dtype == DType::BF16 { 16 } else { 13 };
    profile::kernel("lora_linear tail", lines * depth, bytes(&[factor, &out]), &factor.client, || {
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: lines are held against their number, and ranks are smaller than theirs.
        unsafe {
            tail_kernel::launch_unchecked::<R>(
                &factor.client,
                cubes,
                cube,
                factor.clone().into_array_arg(),
                out.clone().into_array_arg(),
                lines,
                line_step,
                rank,
                rank_step,
                depth,
                scale,
                side,
                along_depth,
                excess,
                dtype.into(),
            );
        }
    });
    if along_depth { out } else { turned(&out) }
}

/// `excess`: bits of an `f32` that the output's type has none for.
#[cube(launch_unchecked)]
fn tail_kernel<F: Float>(
    factor: &Array<f32>,
    out: &mut Array<F>,
    lines: usize,
    line_step: usize,
    rank: usize,
    rank_step: usize,
    depth: usize,
    scale: f32,
    #[comptime] side: Side,
    #[comptime] along_depth: bool,
    #[comptime] excess: u32,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS < lines * depth {
        let (line, at) = if comptime!(along_depth) {
            (ABSOLUTE_POS / depth, ABSOLUTE_POS % depth)
        } else {
            (ABSOLUTE_POS % lines, ABSOLUTE_POS / lines)
        };
        let part = at / rank;
        let whole = factor[line * line_step + at % rank * rank_step] * scale;
        // Rounded in its bits: some compilers take a conversion there and back for nothing.
        let bits = u32::reinterpret(whole) + comptime!(1u32 << (excess - 1));
        let first = f32::reinterpret(bits & comptime!(u32::MAX << excess));
        let number = select(part == comptime!(side.second()), whole - first, first);
        out[ABSOLUTE_POS] = F::cast_from(select(part < PARTS, number, 0.0f32));
    }
}
