//! Which kernels of `attention_mma.cu` are launched how often, on which buffers.

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::launch::{Mask, Sizes};
use super::lines::Quad;
use crate::ops::cube::{empty, one_thread_each};
use crate::ops::engine::Engine;

/// Lines that a workgroup owns.
pub const OWNED: usize = 64;
/// Workgroups for each processor that the keys' gradients are cut into: a few can run beside each other, and of the walks, which are
/// long for early keys and short for late ones, no processor should have only long ones.
const WORKGROUPS_OF_PROCESSOR: usize = 4;
/// The most splits of the keys' gradients. The sums of all are few where keys are many: at most 66 MiB on a device of 132 processors, of
/// heads of 128.
const MOST_SPLITS: usize = 4;
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
    /// Along the owned lines, and the heads, for each split.
    pub workgroups: [usize; 2],
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
    splits: usize,
    sizes: &Sizes,
    mask: &Mask<R>,
    buffers: &[&CubeTensor<R>],
) {
    let Sizes { n_queries, n_keys, heads, kv_heads, head_dim } = *sizes;
    let heads_of_tile = sizes.form(OWNED).heads;
    let workgroups = match pass {
        MmaPass::Keys => [n_keys.div_ceil(OWNED), splits * kv_heads],
        MmaPass::Forward | MmaPass::Queries => {
            [(n_queries * heads_of_tile).div_ceil(OWNED), heads / heads_of_tile]
        }
    };
    R::attention_mma(
        pass,
        &MmaLaunch {
            workgroups,
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
    sizes: &Sizes,
    mask: &Mask<R>,
    [q, k, v]: [&CubeTensor<R>; 3],
    out: &CubeTensor<R>,
    lse: &CubeTensor<R>,
) {
    launch(MmaPass::Forward, 1, sizes, mask, &[q, k, v, &mask.table, out, lse]);
}

/// `stats` are those of `row_stats`; `parts`, where there are several splits, is room for their sums.
pub(super) fn backward<R: Engine>(
    sizes: &Sizes,
    mask: &Mask<R>,
    [dout, q, k, v, stats]: [&CubeTensor<R>; 5],
    [dq, dk, dv]: [&CubeTensor<R>; 3],
    parts: Option<&[CubeTensor<R>; 2]>,
) {
    launch(MmaPass::Queries, 1, sizes, mask, &[dout, q, k, v, stats, &mask.table, dq]);
    let Some([dk_parts, dv_parts]) = parts else {
        launch(MmaPass::Keys, 1, sizes, mask, &[dout, q, k, v, stats, &mask.table, dk, dv]);
        return;
    };
    let (splits, quads) = (dk_parts.meta.shape()[0], dk_parts.meta.shape()[1] / 4);
    launch(MmaPass::Keys, splits, sizes, mask, &[dout, q, k, v, stats, &mask.table, dk_parts, dv_parts]);
    let (cubes, cube) = one_thread_each(&k.client, quads);
    #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
    // SAFETY: quads are held against their number, and splits are counted.
    unsafe {
        sum_splits::launch_unchecked::<R>(
            &k.client,
            cubes,
            cube,
            dk_parts.clone().into_array_arg(),
            dv_parts.clone().into_array_arg(),
            dk.clone().into_array_arg(),
            dv.clone().into_array_arg(),
            splits,
            quads,
            k.dtype.into(),
        );
    }
}

/// Room for the splits' gradients by the keys and by the values, `[splits, entries]`.
pub(super) fn parts<R: CubeRuntime>(k: &CubeTensor<R>, splits: usize) -> [CubeTensor<R>; 2] {
    [(); 2].map(|()| empty(k, Shape::from([splits, k.meta.num_elements()]), DType::F32))
}

/// In how many splits the keys' gradients keep the device's processors busy.
pub(super) fn splits<R: CubeRuntime>(sizes: &Sizes, client: &ComputeClient<R>) -> usize {
    splits_of(sizes, client.properties().hardware.num_streaming_multiprocessors)
}

fn splits_of(sizes: &Sizes, processors: Option<u32>) -> usize {
    let workgroups = sizes.n_keys.div_ceil(OWNED) * sizes.kv_heads;
    let wanted = WORKGROUPS_OF_PROCESSOR * processors.map_or(0, |n| n as usize);
    wanted.div_ceil(workgroups).clamp(1, MOST_SPLITS)
}

/// The sums of all splits, a thread a quad of both gradients.
#[cube(launch_unchecked)]
fn sum_splits<F: Float>(
    dk_parts: &Array<Quad<f32>>,
    dv_parts: &Array<Quad<f32>>,
    dk: &mut Array<Quad<F>>,
    dv: &mut Array<Quad<F>>,
    splits: usize,
    quads: usize,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS < quads {
        let mut k_sum = dk_parts[ABSOLUTE_POS];
        let mut v_sum = dv_parts[ABSOLUTE_POS];
        for split in 1..splits {
            k_sum += dk_parts[split * quads + ABSOLUTE_POS];
            v_sum += dv_parts[split * quads + ABSOLUTE_POS];
        }
        dk[ABSOLUTE_POS] = Quad::cast_from(k_sum);
        dv[ABSOLUTE_POS] = Quad::cast_from(v_sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_keys_are_cut_into_splits() {
        let of = |n_keys| {
            let sizes = Sizes { n_queries: n_keys, n_keys, heads: 32, kv_heads: 8, head_dim: 128 };
            splits_of(&sizes, Some(132))
        };
        assert_eq!([64, 1534, 3070, 6136].map(of), [4, 3, 2, 1]);
    }
}
