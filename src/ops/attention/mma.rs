//! Which kernels of `attention_mma.cu` are launched how often, on which buffers.

use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::launch::{Mask, Sizes};
use super::tile::MmaUnit;
use crate::ops::engine::Engine;

/// Lines that a workgroup owns.
pub const OWNED: usize = 64;
/// Widths of heads that the kernels take.
pub(super) const HEAD_DIMS: [usize; 2] = [64, 128];

/// Which of the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MmaPass {
    /// The output and the log-sum-exp.
    Forward,
    /// The gradient by the queries.
    Queries,
    /// Those by the keys and the values.
    Keys,
}

/// What one of them is launched on.
#[derive(Debug)]
pub struct MmaLaunch<'a, R: CubeRuntime> {
    /// Along the heads, for each split, and the owned lines.
    pub workgroups: [usize; 2],
    /// What multiplies.
    pub unit: MmaUnit,
    /// In the order of the kernel's arguments.
    pub buffers: &'a [&'a CubeTensor<R>],
    /// Query heads that share a tile.
    pub heads_of_tile: usize,
    /// Entries of a line.
    pub head_dim: usize,
    /// Of the gradients by keys and values, which are in `f32` where there are several.
    pub splits: usize,
    /// Queries, keys, one past the last key that is seen, heads and key heads.
    pub sizes: [usize; 5],
    /// Of scores.
    pub scale: f32,
}

fn launch<R: Engine>(
    pass: MmaPass,
    unit: MmaUnit,
    splits: usize,
    sizes: &Sizes,
    mask: &Mask<R>,
    buffers: &[&CubeTensor<R>],
) {
    let Sizes { n_queries, n_keys, heads, kv_heads, head_dim } = *sizes;
    let heads_of_tile = sizes.form(OWNED).heads;
    let workgroups = match pass {
        MmaPass::Keys => [splits * kv_heads, n_keys.div_ceil(OWNED)],
        MmaPass::Forward | MmaPass::Queries => {
            [heads / heads_of_tile, (n_queries * heads_of_tile).div_ceil(OWNED)]
        }
    };
    R::attention_mma(
        pass,
        &MmaLaunch {
            workgroups,
            unit,
            buffers,
            heads_of_tile,
            head_dim,
            splits,
            sizes: [n_queries, n_keys, mask.n_seen, heads, kv_heads],
            scale: sizes.scale(),
        },
    );
}

pub(super) fn forward<R: Engine>(
    unit: MmaUnit,
    sizes: &Sizes,
    mask: &Mask<R>,
    [q, k, v]: [&CubeTensor<R>; 3],
    out: &CubeTensor<R>,
    lse: &CubeTensor<R>,
) {
    launch(MmaPass::Forward, unit, 1, sizes, mask, &[q, k, v, &mask.table, out, lse]);
}

/// `stats` are those of `row_stats`; the gradients by keys and values are those of so many splits, behind each other.
pub(super) fn backward<R: Engine>(
    unit: MmaUnit,
    sizes: &Sizes,
    mask: &Mask<R>,
    [dout, q, k, v, stats]: [&CubeTensor<R>; 5],
    [dq, dk, dv]: [&CubeTensor<R>; 3],
    splits: usize,
) {
    launch(MmaPass::Queries, unit, 1, sizes, mask, &[dout, q, k, v, stats, &mask.table, dq]);
    launch(MmaPass::Keys, unit, splits, sizes, mask, &[dout, q, k, v, stats, &mask.table, dk, dv]);
}
