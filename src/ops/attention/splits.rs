//! Splits of the gradients by keys and values: of the walks over the queries, which are long for early keys and short for late ones, each
//! takes as many steps as the others, in turns, and has sums of its own, where there are processors for that. Where one walk makes all
//! gradients, a split's steps are also those whose gradients by queries it makes.

use std::num::NonZeroUsize;
use std::sync::LazyLock;
use std::thread::available_parallelism;

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::launch::{MOST_TURNS, Sizes};
use super::lines::Quad;
use super::tile::Tile;
use crate::ops::cube::{empty, is_software, one_thread_each};
use crate::ops::engine::Engine;

/// Keys that a workgroup owns on most devices.
const KEYS: usize = 64;
/// Workgroups for each processor: a few can run beside each other, and no processor should have only long walks.
const WORKGROUPS_OF_PROCESSOR: usize = 4;
/// Processors of a GPU that does not tell how many it has, as none does through wgpu: enough for a large one.
const PROCESSORS: u32 = 128;
/// Workgroups for each core of a processor that is behind a software adapter: all walk about equally far.
const WORKGROUPS_OF_CORE: usize = 2;
/// The most splits on a GPU. The sums of all are few where keys are many: at most 66 MiB on a device of 132 processors, of heads of 128.
pub(super) const MOST: usize = 4;
/// The most that are for a processor's cores.
const MOST_OF_CORES: usize = 16;

/// Asking for them reads files.
static CORES: LazyLock<usize> = LazyLock::new(|| available_parallelism().map_or(1, NonZeroUsize::get));

/// In how many splits the gradients by keys like these keep the device's processors busy.
pub(super) fn splits<R: Engine>(sizes: &Sizes, q: &CubeTensor<R>) -> usize {
    if is_software(&q.client) {
        return splits_of_cores(sizes, Tile::on_software(q, sizes.head_dim), *CORES);
    }
    splits_of(sizes, q.client.properties().hardware.num_streaming_multiprocessors.unwrap_or(PROCESSORS))
}

fn splits_of(sizes: &Sizes, processors: u32) -> usize {
    let workgroups = sizes.n_keys.div_ceil(KEYS) * sizes.kv_heads;
    (WORKGROUPS_OF_PROCESSOR * processors as usize).div_ceil(workgroups).clamp(1, MOST)
}

/// As many as keep the cores busy, and as let a launch make the gradients of a block of keys.
fn splits_of_cores(sizes: &Sizes, tile: Tile, cores: usize) -> usize {
    let form = sizes.form(tile.block_m().min(tile.block_n()));
    let busy = (WORKGROUPS_OF_CORE * cores).div_ceil(sizes.kv_heads).min(MOST_OF_CORES);
    (busy..sizes.n_queries)
        .find(|&splits| sizes.turns_backward(form, tile, splits) <= MOST_TURNS)
        .unwrap_or(busy)
}

/// Room for the splits' gradients by the keys and by the values, `[splits, entries]`.
pub(super) fn parts<R: CubeRuntime>(k: &CubeTensor<R>, splits: usize) -> [CubeTensor<R>; 2] {
    [(); 2].map(|()| empty(k, Shape::from([splits, k.meta.num_elements()]), DType::F32))
}

/// Launches the sums of all splits.
pub(super) fn add_up<R: CubeRuntime>(
    [dk_parts, dv_parts]: &[CubeTensor<R>; 2],
    [dk, dv]: [&CubeTensor<R>; 2],
) {
    let (splits, quads) = (dk_parts.meta.shape()[0], dk_parts.meta.shape()[1] / 4);
    let (cubes, cube) = one_thread_each(&dk.client, quads);
    #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
    // SAFETY: quads are held against their number, and splits are counted.
    unsafe {
        sum_splits::launch_unchecked::<R>(
            &dk.client,
            cubes,
            cube,
            dk_parts.clone().into_array_arg(),
            dv_parts.clone().into_array_arg(),
            dk.clone().into_array_arg(),
            dv.clone().into_array_arg(),
            splits,
            quads,
            dk.dtype.into(),
        );
    }
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
            splits_of(&sizes, 132)
        };
        assert_eq!([64, 1534, 3070, 6136].map(of), [4, 3, 2, 1]);
    }

    #[test]
    fn cores_are_kept_busy_and_launches_short() {
        let of = |n_queries, [heads, kv_heads, head_dim]: [usize; 3], cores| {
            let sizes = Sizes { n_queries, n_keys: n_queries, heads, kv_heads, head_dim };
            splits_of_cores(&sizes, Tile::of_lanes(8, head_dim), cores)
        };
        assert_eq!([1, 2, 16, 64, 256].map(|cores| of(512, [8, 2, 64], cores)), [1, 2, 16, 16, 16]);
        assert_eq!(of(512, [32, 8, 128], 2), 1);
        assert_eq!(of(1, [32, 8, 128], 2), 1);
        // Of 16,384 tokens and four heads a key head 1,024 steps, of which each has 99 turns.
        assert_eq!(of(16_384, [32, 8, 64], 2), 4);
    }
}
