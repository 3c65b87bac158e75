//! Which kernels are launched how often, on which buffers; generic over the runtime.
//!
//! Callers use the functions of the parent module, which check shapes and choose the tile.

use burn::tensor::{DType, Shape};
use burn_cubecl::CubeRuntime;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::kernel::{cast, into_contiguous};
use burn_cubecl::ops::numeric::zeros_client;
use burn_cubecl::tensor::CubeTensor;

use super::backward;
use super::forward;
use super::mask::STRIP;
use super::matrices::shared_bytes;
use super::mma;
use super::splits;
use super::tile::{Form, MmaUnit, Tile, Units};
use super::trial::{Pass, fastest, is_right};
use crate::ops::cube::{bytes, empty, is_software, matrix_units, one_thread_each};
use crate::ops::engine::Engine;
use crate::ops::lanes::shuffling_lanes;
use crate::ops::profile;

/// A mask's table on the device, and how many keys it has.
#[derive(Debug, Clone)]
pub struct Mask<R: CubeRuntime> {
    pub(super) table: CubeTensor<R>,
    /// (query, key) pairs that attend to each other.
    pub(super) n_visible: usize,
    pub(super) n_seen: usize,
}

/// Of the pair that tiles are timed on, which has three of them: near 2 x 1024 tokens that share half.
const TIMED_STEP: usize = 512;

/// Turns that all loops of a thread may take together in a launch: half of those after which Mesa's llvmpipe ends them, without a word.
pub(super) const MOST_TURNS: usize = 1 << 15;
/// More than what a loop's end takes: a turn of its own and, without effect, one of each loop within it.
const ENDING_TURNS: usize = 12;

/// The sizes of one call.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) n_queries: usize,
    pub(super) n_keys: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
}

impl Sizes {
    fn of<R: CubeRuntime>(q: &CubeTensor<R>, k: &CubeTensor<R>) -> Self {
        let (q, k) = (q.meta.shape(), k.meta.shape());
        Self { n_queries: q[0], n_keys: k[0], heads: q[1], kv_heads: k[1], head_dim: q[2] }
    }

    pub(super) fn scale(&self) -> f32 {
        super::scale(self.head_dim) as f32
    }

    /// Turns of a thread's loops in [`forward::forward()`], at most.
    fn turns_forward(&self, form: Form, tile: Tile) -> usize {
        let meeting = tile.threads_n + 1;
        let step = 1 + (form.quads + 1) + meeting + (tile.block_n() / 4 + 1);
        self.n_keys.div_ceil(tile.block_n()) * step + meeting + ENDING_TURNS
    }

    /// Turns of a thread's loops for one block of keys in [`backward::backward_whole()`], at most.
    pub(super) fn turns_backward(&self, form: Form, tile: Tile, splits: usize) -> usize {
        let queries = tile.block_n() / form.heads;
        let steps = self.n_queries.div_ceil(queries).div_ceil(splits);
        let products = 2 * (form.quads + 1) + 2 * (tile.block_n() / 4 + 1);
        let turned = tile.block_n() / tile.block_m() * (tile.block_m() / 4 + 2) + 2;
        let step = 1 + (queries / STRIP + 2) + products + turned;
        let parts = self.heads / self.kv_heads / form.heads;
        parts * (steps * step + ENDING_TURNS) + tile.block_m() / STRIP + 2 * ENDING_TURNS
    }

    /// As many heads a tile as there is a power of two of in the group, up to the table's strips.
    pub(super) fn form(&self, lines: usize) -> Form {
        let group = self.heads / self.kv_heads;
        Form { quads: self.head_dim / 4, heads: (1 << group.trailing_zeros()).min(8).min(lines) }
    }
}

/// Computes `(out, lse)`, cut by this tile; `head_dim` is a multiple of four.
pub fn attention_forward<R: Engine>(
    [q, k, v]: [CubeTensor<R>; 3],
    mask: &Mask<R>,
    tile: Tile,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let [q, k, v] = [q, k, v].map(into_contiguous);
    let sizes = Sizes::of(&q, &k);
    let form = sizes.form(tile.block_m());
    let out = empty(&q, Shape::from([sizes.n_queries, sizes.heads * sizes.head_dim]), q.dtype);
    let lse = empty(&q, Shape::from([sizes.n_queries, sizes.heads]), DType::F32);
    assert!(
        !tile.is_software() || sizes.turns_forward(form, tile) < 2 * MOST_TURNS,
        "attention: {} keys are more than llvmpipe's loops take; the CPU takes them",
        sizes.n_keys
    );
    let blocks = (sizes.n_queries * form.heads).div_ceil(tile.block_m());
    let (client, dtype) = (q.client.clone(), q.dtype.into());
    let flops = 4 * mask.n_visible * sizes.heads * sizes.head_dim;
    profile::kernel("attention forward", flops, bytes(&[&q, &k, &v, &out, &lse]), &q.client.clone(), || {
        if let Units::Mma(unit) = tile.units {
            mma::forward(unit, &sizes, mask, [&q, &k, &v], &out, &lse);
            return;
        }
        #[expect(unsafe_code, reason = "a checked launch counts every turn of loops that are known to end")]
        // SAFETY: lines are held against their number, quads against the line's, and every loop counts up to a bound.
        unsafe {
            forward::forward::launch_unchecked::<R>(
                &client,
                CubeCount::Static((sizes.heads / form.heads) as u32, blocks as u32, 1),
                CubeDim::new_1d((tile.threads_m * tile.threads_n) as u32),
                q.into_array_arg(),
                k.into_array_arg(),
                v.into_array_arg(),
                mask.table.clone().into_array_arg(),
                out.clone().into_array_arg(),
                lse.clone().into_array_arg(),
                sizes.n_queries as u32,
                sizes.n_keys as u32,
                sizes.heads as u32,
                sizes.kv_heads as u32,
                sizes.scale(),
                form,
                tile,
                dtype,
            );
        }
    });
    (out, lse)
}

/// Computes `[dq, dk, dv]`, cut by this tile, the latter two in so many splits of the walks over the queries; `head_dim` is a multiple of
/// four. A software adapter's tile makes all in one walk, since few workgroups keep it busy.
pub fn attention_backward<R: Engine>(
    dout: CubeTensor<R>,
    [q, k, v]: [CubeTensor<R>; 3],
    [out, lse]: [CubeTensor<R>; 2],
    mask: &Mask<R>,
    tile: Tile,
    splits: usize,
) -> [CubeTensor<R>; 3] {
    let [dout, q, k, v, out, lse] = [dout, q, k, v, out, lse].map(into_contiguous);
    let sizes = Sizes::of(&q, &k);
    let form = sizes.form(tile.block_m().min(tile.block_n()));
    let n_lines = sizes.n_queries * sizes.heads;
    let stats = empty(&q, Shape::from([n_lines, 2]), DType::F32);
    let [dk, dv] = [&k, &v].map(|like| empty(like, like.meta.shape().clone(), like.dtype));
    let dq = match tile.is_software() {
        // What is added to in memory starts from zeros.
        true => zeros(&q),
        false => empty(&q, q.meta.shape().clone(), q.dtype),
    };
    let parts = (splits > 1).then(|| splits::parts(&k, splits));
    let [dk_parts, dv_parts] = parts.as_ref().map_or([&dk, &dv], |parts| parts.each_ref());
    let (client, dtype): (_, StorageType) = (q.client.clone(), q.dtype.into());
    let threads = CubeDim::new_1d((tile.threads_m * tile.threads_n) as u32);
    let scalars = [sizes.n_queries, sizes.n_keys, sizes.heads, sizes.kv_heads].map(|n| n as u32);
    let [n_queries, n_keys, heads, kv_heads] = scalars;
    let flops = 10 * mask.n_visible * sizes.heads * sizes.head_dim;
    let moved = bytes(&[&dout, &q, &k, &v, &out, &dq, &dk, &dv]);
    profile::kernel("attention backward", flops, moved, &client, || {
        #[expect(unsafe_code, reason = "a checked launch counts every turn of loops that are known to end")]
        // SAFETY: lines are held against their number, quads against the line's, and every loop counts up to a bound.
        unsafe {
            let (cubes, cube) = one_thread_each(&client, n_lines * tile.line_threads());
            backward::row_stats::launch_unchecked::<R>(
                &client,
                cubes,
                cube,
                dout.clone().into_array_arg(),
                out.into_array_arg(),
                lse.into_array_arg(),
                stats.clone().into_array_arg(),
                n_lines as u32,
                form.quads,
                tile.line_threads(),
                dtype,
            );
            if let Units::Mma(unit) = tile.units {
                let grads = [&dq, dk_parts, dv_parts];
                mma::backward(unit, &sizes, mask, [&dout, &q, &k, &v, &stats], grads, splits);
            } else if tile.is_software() {
                let blocks = sizes.n_keys.div_ceil(tile.block_m());
                let at_once = MOST_TURNS / sizes.turns_backward(form, tile, splits);
                assert!(at_once > 0, "{splits} splits are too few for {} queries", sizes.n_queries);
                for first in (0..blocks).step_by(at_once) {
                    backward::backward_whole::launch_unchecked::<R>(
                        &client,
                        CubeCount::Static(splits as u32 * kv_heads, 1, 1),
                        threads,
                        dout.clone().into_array_arg(),
                        q.clone().into_array_arg(),
                        k.clone().into_array_arg(),
                        v.clone().into_array_arg(),
                        stats.clone().into_array_arg(),
                        mask.table.clone().into_array_arg(),
                        dq.clone().into_array_arg(),
                        dk_parts.clone().into_array_arg(),
                        dv_parts.clone().into_array_arg(),
                        n_queries,
                        n_keys,
                        mask.n_seen as u32,
                        heads,
                        kv_heads,
                        first as u32,
                        (first + at_once).min(blocks) as u32,
                        sizes.scale(),
                        form,
                        tile,
                        dtype,
                        dk_parts.dtype.into(),
                    );
                }
            } else {
                let blocks = (sizes.n_queries * form.heads).div_ceil(tile.block_m());
                backward::backward_queries::launch_unchecked::<R>(
                    &client,
                    CubeCount::Static((sizes.heads / form.heads) as u32, blocks as u32, 1),
                    threads,
                    dout.clone().into_array_arg(),
                    q.clone().into_array_arg(),
                    k.clone().into_array_arg(),
                    v.clone().into_array_arg(),
                    stats.clone().into_array_arg(),
                    mask.table.clone().into_array_arg(),
                    dq.clone().into_array_arg(),
                    n_queries,
                    n_keys,
                    heads,
                    kv_heads,
                    sizes.scale(),
                    form,
                    tile,
                    dtype,
                );
                backward::backward_keys::launch_unchecked::<R>(
                    &client,
                    CubeCount::Static(
                        splits as u32 * kv_heads,
                        sizes.n_keys.div_ceil(tile.block_m()) as u32,
                        1,
                    ),
                    threads,
                    dout.into_array_arg(),
                    q.into_array_arg(),
                    k.into_array_arg(),
                    v.into_array_arg(),
                    stats.into_array_arg(),
                    mask.table.clone().into_array_arg(),
                    dk_parts.clone().into_array_arg(),
                    dv_parts.clone().into_array_arg(),
                    n_queries,
                    n_keys,
                    mask.n_seen as u32,
                    heads,
                    kv_heads,
                    sizes.scale(),
                    form,
                    tile,
                    dtype,
                    dk_parts.dtype.into(),
                );
            }
        }
        if let Some(parts) = &parts {
            splits::add_up(parts, [&dk, &dv]);
        }
    });
    [cast(dq, dk.dtype), dk, dv]
}

/// Zeros of a tensor's shape in `f32`. As lines, CUDA would leave gaps between them.
fn zeros<R: CubeRuntime>(like: &CubeTensor<R>) -> CubeTensor<R> {
    let (client, device, shape) = (like.client.clone(), like.device.clone(), like.meta.shape().clone());
    let flat = zeros_client(client.clone(), device.clone(), Shape::from([shape.num_elements()]), DType::F32);
    CubeTensor::new_contiguous(client, device, shape, flat.handle, DType::F32)
}

/// In how many splits the gradients by keys and values are made.
pub fn splits<R: Engine>(q: &CubeTensor<R>, k: &CubeTensor<R>) -> usize {
    splits::splits(&Sizes::of(q, k), q)
}

impl Tile {
    /// For devices whose lanes have registers of their own.
    pub const GPU: Self =
        Self { threads_m: 16, threads_n: 8, lines: 4, columns: 4, units: Units::Registers { stage: 8 } };

    /// The tile for queries and keys like these.
    pub fn of<R: Engine>(q: &CubeTensor<R>, k: &CubeTensor<R>, pass: Pass) -> Self {
        let Sizes { heads, kv_heads, head_dim, .. } = Sizes::of(q, k);
        if is_software(&q.client) {
            return Self::on_software(q, head_dim);
        }
        let is_right =
            |tile: &Self| is_right::<R>(&q.device, q.dtype, [heads, kv_heads, head_dim], *tile, pass);
        let right: Vec<Self> = Self::mma(q, head_dim).into_iter().filter(is_right).collect();
        match right[..] {
            [] => Self::on_matrices(q, head_dim).filter(is_right).unwrap_or(Self::GPU),
            [tile] => tile,
            _ => fastest::<R>(&q.device, q.dtype, [heads, kv_heads, head_dim], &right, pass, TIMED_STEP),
        }
    }

    /// A software adapter's tile for heads of this width.
    pub fn on_software<R: Engine>(tensor: &CubeTensor<R>, head_dim: usize) -> Self {
        let lanes = shuffling_lanes(&tensor.client, &tensor.device);
        Self::of_lanes(lanes.map_or(1, |lanes| lanes as usize), head_dim)
    }

    /// The tile of software adapters with planes of so many threads, or 1. Registers spill to the first-level cache there, which is less
    /// dear than to load more often. With twice as many lines a thread is up to a third faster, and takes the driver four times as long
    /// to compile; more than four quads of a head are as bad.
    pub fn of_lanes(lanes: usize, head_dim: usize) -> Self {
        let threads_n = head_dim.div_ceil(16).next_power_of_two().max(lanes).max(8);
        let columns = if threads_n < 16 { 8 } else { 4 };
        Self { threads_m: 1, threads_n, lines: 16, columns, units: Units::Lanes { lanes } }
    }

    /// The tiles of `attention_mma.cu`, in the order in which they are tried, where it takes tensors of this type and heads of this width.
    pub fn mma<R: Engine>(tensor: &CubeTensor<R>, head_dim: usize) -> Vec<Self> {
        let is_taken = tensor.dtype != DType::F32 && mma::HEAD_DIMS.contains(&head_dim);
        if !is_taken || matrix_units(&tensor.client, tensor.dtype).is_empty() || !R::has_mma(&tensor.client) {
            return Vec::new();
        }
        let warpgroup = R::warpgroup_processors(&tensor.client).map(|_| MmaUnit::Warpgroup);
        let tile = |unit: MmaUnit| Self {
            threads_m: 16,
            threads_n: 8,
            lines: mma::OWNED / 16,
            columns: 8,
            units: Units::Mma(unit),
        };
        warpgroup.into_iter().chain([MmaUnit::Warp]).map(tile).collect()
    }

    /// The tile for the device's matrix units, if it has any for tensors of this type and heads of this width.
    ///
    /// Planes have to be of one size: the kernel is told of it, and nothing else holds the device to it.
    pub fn on_matrices<R: Engine>(tensor: &CubeTensor<R>, head_dim: usize) -> Option<Self> {
        const LINES: usize = 4;
        let units = matrix_units(&tensor.client, tensor.dtype);
        let hardware = &tensor.client.properties().hardware;
        let plane = hardware.plane_size_max as usize;
        let side = [16, 8]
            .into_iter()
            .find(|side| head_dim.is_multiple_of(*side) && units.contains(&[*side as u32; 3]))?;
        if tensor.dtype == DType::F32 || hardware.plane_size_min as usize != plane {
            return None;
        }
        let cut = |planes: usize| Self {
            threads_m: planes * side / LINES,
            threads_n: plane * LINES / side,
            lines: LINES,
            columns: 4,
            units: Units::Matrices { side },
        };
        let fits = |tile: &Self| {
            let shared = shared_bytes(Form { quads: head_dim / 4, heads: 1 }, *tile);
            shared <= hardware.max_shared_memory_size
                && tile.threads_m * tile.threads_n <= hardware.max_units_per_cube as usize
                && tile.block_n() >= side
        };
        [4, 2, 1].map(cut).into_iter().find(fits)
    }
}
