//! The ops on wgpu: which shader is launched how often, on which buffers.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Shape, Tensor, TensorPrimitive};
use burn_cubecl::element::BoolElement;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, FloatElement, IntElement};
use burn_wgpu::{WgpuDevice, WgpuRuntime};

use super::adamw::{self, AdamWStep};
use super::kernel::{BAND, Layout, MAX_WORKGROUPS, PANEL, RANK_QUADS, Shader, Tile, launch};
use super::lora_linear::{Lora, LoraGrads};
use super::orpo_loss::{MEAN_LOGP_MAX, PairSpan};
use super::rope::RopeTable;
use super::token_logps::{self, Expected, ExpectedRows, Head, ScoredToken, TokenLogps};
use super::{Kernels, cube, rms_norm, rope, swiglu};

type Floats = CubeTensor<WgpuRuntime>;

impl<F: FloatElement, I: IntElement, BT: BoolElement> Kernels for CubeBackend<WgpuRuntime, F, I, BT> {
    fn bytes_in_use(device: &WgpuDevice) -> Option<u64> {
        let client = <WgpuRuntime as burn::cubecl::Runtime>::client(device);
        client.memory_usage().ok().map(|usage| usage.bytes_in_use)
    }

    fn lora_linear_forward(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        lora: Option<&Lora<Self>>,
        residual: Option<Tensor<Self, 2>>,
    ) -> (Tensor<Self, 2>, Option<Tensor<Self, 2>>) {
        let (x, weight) = (input(x), input(weight));
        let (y, s) = match lora {
            None => (product(Layout::RowsRows, &x, &weight, None, 1.0), None),
            Some(lora) => {
                let s = product(Layout::RowsRows, &x, &input(lora.a.clone()), None, 1.0);
                let prologue = Some((&s, &input(lora.b.clone()), lora.scale));
                (product(Layout::RowsRows, &x, &weight, prologue, 1.0), Some(s))
            }
        };
        let y = tensor(y);
        let y = match residual {
            Some(residual) => residual + y,
            None => y,
        };
        (y, s.map(tensor))
    }

    fn lora_rank_r(x: Tensor<Self, 2>, lora: &Lora<Self>) -> Tensor<Self, 2> {
        tensor(product(Layout::RowsRows, &input(x), &input(lora.a.clone()), None, 1.0))
    }

    fn lora_linear_backward_lora(
        dy: Tensor<Self, 2>,
        x: Tensor<Self, 2>,
        s: Tensor<Self, 2>,
        lora: &Lora<Self>,
    ) -> LoraGrads<Self> {
        let (dy, x, s, b) = (input(dy), input(x), input(s), input(lora.b.clone()));
        let (ds, db) = match RANK_QUADS.into_iter().find(|quads| dims(&b)[1] <= 4 * quads) {
            Some(rank_quads) => lora_backward(rank_quads, &dy, &b, &s, lora.scale),
            None => (
                product(Layout::RowsColumns, &dy, &b, None, lora.scale),
                product(Layout::ColumnsColumns, &dy, &s, None, lora.scale),
            ),
        };
        let da = product(Layout::ColumnsColumns, &ds, &x, None, 1.0);
        LoraGrads { ds: tensor(ds), da: tensor(da), db: tensor(db) }
    }

    fn lora_linear_backward_input(
        dy: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        ds_a: Option<(Tensor<Self, 2>, Tensor<Self, 2>)>,
        sum: Option<Tensor<Self, 2>>,
        _dtype: DType,
    ) -> Tensor<Self, 2> {
        let (dy, weight) = (input(dy), input(weight));
        let ds_a = ds_a.map(|(ds, a)| (input(ds), input(a)));
        let prologue = ds_a.as_ref().map(|(ds, a)| (ds, a, 1.0));
        let dx = tensor(product(Layout::RowsColumns, &dy, &weight, prologue, 1.0));
        match sum {
            Some(sum) => sum + dx,
            None => dx,
        }
    }

    fn token_logps_forward(
        hidden: Tensor<Self, 2>,
        head: &Head<Self>,
        scored: &[ScoredToken],
        expected: Expected,
    ) -> TokenLogps<Self> {
        token_logps::forward_fused(hidden, head, scored, expected)
    }

    fn token_logps_backward(
        dlogps: Tensor<Self, 1>,
        expected: ExpectedRows<Self>,
        head: &Head<Self>,
        scored: &[ScoredToken],
    ) -> Tensor<Self, 2> {
        token_logps::backward_fused(dlogps, expected, head, scored)
    }

    fn rms_norm_forward(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        eps: f64,
        dtype: DType,
    ) -> Tensor<Self, 2> {
        let (x, weight) = (stored_f32(x), stored_f32(weight));
        let threads = Device::of(&x).norm_threads;
        tensor(rms_norm::launch_forward(x, weight, eps, dtype, threads))
    }

    fn rms_norm_backward(
        dy: Tensor<Self, 2>,
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        eps: f64,
        sum: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        let (x, weight, sum) = (stored_f32(x), stored_f32(weight), sum.map(stored_f32));
        let threads = Device::of(&x).norm_threads;
        tensor(rms_norm::launch_backward(stored(dy), x, weight, eps, sum, threads))
    }

    fn rope_forward(x: Tensor<Self, 3>, table: &RopeTable<Self>) -> Tensor<Self, 3> {
        rotate(x, table, 1.0)
    }

    fn rope_backward(dy: Tensor<Self, 3>, table: &RopeTable<Self>) -> Tensor<Self, 3> {
        rotate(dy, table, -1.0)
    }

    fn swiglu_forward(gate: Tensor<Self, 2>, up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        tensor(swiglu::launch_forward(stored(gate), stored(up)))
    }

    fn swiglu_backward(
        dh: Tensor<Self, 2>,
        gate: Tensor<Self, 2>,
        up: Tensor<Self, 2>,
    ) -> (Tensor<Self, 2>, Tensor<Self, 2>) {
        let (dgate, dup) = swiglu::launch_backward(stored(dh), stored(gate), stored(up));
        (tensor(dgate), tensor(dup))
    }

    fn grad_norm(grads: &[Tensor<Self, 2>]) -> Tensor<Self, 1> {
        tensor(adamw::launch_norm(grads.iter().map(|grad| stored_f32(grad.clone())).collect()))
    }

    fn adamw(
        parameter: Tensor<Self, 2>,
        grad: Tensor<Self, 2>,
        moments: [Tensor<Self, 2>; 2],
        norm: Tensor<Self, 1>,
        step: &AdamWStep,
    ) -> (Tensor<Self, 2>, [Tensor<Self, 2>; 2]) {
        let (parameter, grad, norm) = (stored_f32(parameter), stored_f32(grad), stored_f32(norm));
        let (parameter, moments) = adamw::launch_update(parameter, grad, moments.map(stored_f32), norm, step);
        (tensor(parameter), moments.map(tensor))
    }

    fn orpo_loss_forward(logps: Tensor<Self, 1>, pairs: &[PairSpan]) -> Tensor<Self, 2> {
        let logps = input(logps);
        check_order(pairs, logps.meta.shape()[0]);
        let stats = output(&logps, [pairs.len(), 5]);
        let spans = logps.client.create_from_slice(bytemuck::cast_slice(&span_words(pairs)));
        launch(
            &logps.client,
            Shader::OrpoLoss,
            [pairs.len() as u32, 1, 1],
            &[&logps.handle, &spans, &stats.handle],
            &[pairs.len() as u32, MEAN_LOGP_MAX.to_bits()],
        );
        tensor(stats)
    }

    fn orpo_loss_backward(
        stats: Tensor<Self, 2>,
        pairs: &[PairSpan],
        beta: f32,
        grad_scale: f32,
    ) -> Tensor<Self, 1> {
        let stats = input(stats);
        let n_entries = pairs.last().map_or(0, |span| span.end as usize);
        check_order(pairs, n_entries);
        let dlogps = output(&stats, [n_entries]);
        let spans = stats.client.create_from_slice(bytemuck::cast_slice(&span_words(pairs)));
        launch(
            &stats.client,
            Shader::OrpoLossBackward,
            [pairs.len() as u32, 1, 1],
            &[&stats.handle, &spans, &dlogps.handle],
            &[pairs.len() as u32, MEAN_LOGP_MAX.to_bits(), beta.to_bits(), grad_scale.to_bits()],
        );
        tensor(dlogps)
    }
}

/// The tensor as a shader reads it: contiguous, `f32`.
fn input<B: Backend<FloatTensorPrimitive = Floats>, const D: usize>(tensor: Tensor<B, D>) -> Floats {
    let tensor = tensor.into_primitive().tensor();
    assert_eq!(tensor.dtype, DType::F32, "the wgpu kernels take f32 tensors");
    assert!(
        !tensor.meta.shape().contains(&0),
        "the wgpu kernels take no empty tensor: {:?}",
        tensor.meta.shape()
    );
    into_contiguous(tensor)
}

/// The tensor as a CubeCL kernel reads it: contiguous, `f32` or `f16`.
fn stored<B: Backend<FloatTensorPrimitive = Floats>, const D: usize>(tensor: Tensor<B, D>) -> Floats {
    cube::readable(tensor.into_primitive().tensor())
}

/// The same of a tensor that has to be `f32`.
fn stored_f32<B: Backend<FloatTensorPrimitive = Floats>, const D: usize>(tensor: Tensor<B, D>) -> Floats {
    cube::readable_f32(tensor.into_primitive().tensor())
}

/// The primitive as a tensor.
fn tensor<B: Backend<FloatTensorPrimitive = Floats>, const D: usize>(primitive: Floats) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

/// A new tensor on the device of `like`, not initialised.
fn output<const D: usize>(like: &Floats, shape: [usize; D]) -> Floats {
    let handle = like.client.empty(shape.iter().product::<usize>() * size_of::<f32>());
    CubeTensor::new_contiguous(
        like.client.clone(),
        like.device.clone(),
        Shape::from(shape),
        handle,
        DType::F32,
    )
}

/// Rows and columns.
fn dims(tensor: &Floats) -> [u32; 2] {
    [0, 1].map(|i| u32::try_from(tensor.meta.shape()[i]).expect("a dimension fits 32 bits"))
}

fn rotate<B: Backend<FloatTensorPrimitive = Floats>>(
    x: Tensor<B, 3>,
    table: &RopeTable<B>,
    direction: f32,
) -> Tensor<B, 3> {
    let (cos, sin) = (stored_f32(table.cos.clone()), stored_f32(table.sin.clone()));
    tensor(rope::launch(stored(x), cos, sin, direction))
}

/// What work is cut for.
#[derive(Clone, Copy)]
struct Device {
    tiles: &'static [Tile],
    /// How many workgroups keep it busy.
    busy: u32,
    /// The most threads that share a row of a norm.
    norm_threads: u32,
}

const GPU: Device = Device { tiles: &Tile::GPU, busy: 128, norm_threads: rms_norm::GPU_THREADS };
const SOFTWARE: Device = Device { tiles: &Tile::SOFTWARE, busy: 4, norm_threads: rms_norm::SOFTWARE_THREADS };

impl Device {
    fn of(tensor: &Floats) -> Self {
        // Mesa's and Google's software adapters have as many lanes as the processor's vectors; no GPU has that few.
        if tensor.client.properties().hardware.plane_size_max <= 16 { SOFTWARE } else { GPU }
    }
}

/// `(ds, dB)` in one read of `dy`.
fn lora_backward(rank_quads: u32, dy: &Floats, b: &Floats, s: &Floats, scale: f32) -> (Floats, Floats) {
    let ([tokens, n_out], r) = (dims(dy), dims(b)[1]);
    let (panels, steps) = (n_out.div_ceil(PANEL), tokens.div_ceil(PANEL));
    let splits = Device::of(dy).busy.div_ceil(panels).clamp(1, steps.div_ceil(2));
    let span = steps.div_ceil(splits) * PANEL;
    let splits = tokens.div_ceil(span);
    let ds_parts = output(dy, [(panels * tokens) as usize, r as usize]);
    let db_parts = output(dy, [(splits * n_out) as usize, r as usize]);
    launch(
        &dy.client,
        Shader::LoraBackward { rank_quads, is_vec4: n_out % 4 == 0 && r % 4 == 0 },
        [panels, splits, 1],
        &[&dy.handle, &b.handle, &s.handle, &ds_parts.handle, &db_parts.handle],
        &[tokens, n_out, r, span, scale.to_bits()],
    );
    (sum(ds_parts, panels, [tokens, r]), sum(db_parts, splits, [n_out, r]))
}

/// `scale · (lhs · rhs + prologue.2 · prologue.0 · prologue.1)`, the operands lying as `layout` says.
fn product(
    layout: Layout,
    lhs: &Floats,
    rhs: &Floats,
    prologue: Option<(&Floats, &Floats, f32)>,
    scale: f32,
) -> Floats {
    let ([l0, l1], [r0, r1]) = (dims(lhs), dims(rhs));
    let ([m, depth], [n, rhs_depth]) = match layout {
        Layout::RowsRows => ([l0, l1], [r0, r1]),
        Layout::RowsColumns => ([l0, l1], [r1, r0]),
        Layout::ColumnsColumns => ([l1, l0], [r1, r0]),
    };
    assert_eq!(depth, rhs_depth, "{layout:?}: depth of {:?} against {:?}", dims(lhs), dims(rhs));
    // Without a prologue its buffers are never read; some buffer has to stand in their place.
    let (prologue_lhs, prologue_rhs, prologue_scale) = prologue.unwrap_or((lhs, rhs, 0.0));
    let rank = if prologue.is_some() { dims(prologue_lhs)[1] } else { 0 };

    let is_vec4 = [l1, r1, n, rank].iter().all(|length| length % 4 == 0);
    let Plan { tile, splits, span } = Plan::new(Device::of(lhs), [m, n, depth], prologue.is_some());
    let out = output(lhs, [(splits * m) as usize, n as usize]);
    let blocks_m = m.div_ceil(tile.block_m);
    launch(
        &lhs.client,
        Shader::Product { layout, tile, is_vec4 },
        [BAND * n.div_ceil(tile.block_n), blocks_m.div_ceil(BAND), splits],
        &[&lhs.handle, &rhs.handle, &prologue_lhs.handle, &prologue_rhs.handle, &out.handle],
        &[m, n, depth, rank, span, prologue_scale.to_bits(), scale.to_bits()],
    );
    sum(out, splits, [m, n])
}

/// Sums the parts of a product that was split along its depth.
fn sum(parts: Floats, splits: u32, [m, n]: [u32; 2]) -> Floats {
    if splits == 1 {
        return parts;
    }
    let out = output(&parts, [m as usize, n as usize]);
    let groups = (m * n).div_ceil(Shader::Sum.workgroup_size());
    let x = groups.min(MAX_WORKGROUPS);
    launch(
        &parts.client,
        Shader::Sum,
        [x, groups.div_ceil(x), 1],
        &[&parts.handle, &out.handle],
        &[m * n, splits, x * Shader::Sum.workgroup_size()],
    );
    out
}

/// How a product is cut on one device.
struct Plan {
    tile: Tile,
    /// Parts of the depth, each summed by workgroups of its own.
    splits: u32,
    /// Entries of the depth in a part.
    span: u32,
}

impl Plan {
    fn new(device: Device, [m, n, depth]: [u32; 3], has_prologue: bool) -> Self {
        let blocks = |tile: &Tile| m.div_ceil(tile.block_m) * n.div_ceil(tile.block_n);
        // The time of a block, staging included, times the blocks, or the workgroups that would have been busy meanwhile.
        let cost = |tile: &Tile| {
            let (block_m, block_n) = (u64::from(tile.block_m), u64::from(tile.block_n));
            u64::from(blocks(tile).max(device.busy)) * (block_m * block_n + 8 * (block_m + block_n))
        };
        let tile = *device.tiles.iter().min_by_key(|tile| cost(tile)).expect("a device has tiles");
        // A part is worth a second launch when it is long, and a prologue belongs to one part only.
        let most = if has_prologue { 1 } else { (depth / (16 * tile.block_k)).max(1) };
        let splits = device.busy.div_ceil(blocks(&tile)).clamp(1, most);
        let span = depth.div_ceil(splits).next_multiple_of(tile.block_k);
        Self { tile, splits: depth.div_ceil(span), span }
    }
}

/// The shaders hold no index against the number of entries: the spans have to be in order, and the last within it.
fn check_order(pairs: &[PairSpan], n_entries: usize) {
    let ends = pairs.iter().flat_map(|p| [p.nll_start, p.chosen_start, p.rejected_start, p.end]);
    assert!(
        ends.clone().is_sorted() && ends.last().is_some_and(|end| end as usize <= n_entries),
        "orpo_loss: spans out of order or past {n_entries} entries: {pairs:?}"
    );
}

/// A pair's span as the shaders' `Span` has it.
fn span_words(pairs: &[PairSpan]) -> Vec<[u32; 8]> {
    pairs
        .iter()
        .map(|p| [p.nll_start, p.chosen_start, p.rejected_start, p.end, p.nll_weight.to_bits(), 0, 0, 0])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPES: [[u32; 3]; 8] = [
        [1, 1, 1],
        [1, 4096, 4096],
        [7, 331, 107],
        [2048, 8, 4096],
        [8, 4096, 2048],
        [2048, 4096, 14336],
        [4096, 16, 2049],
        [100_000, 128_256, 17],
    ];

    #[test]
    fn the_parts_of_a_product_cover_its_depth_once() {
        for device in [GPU, SOFTWARE] {
            for [m, n, depth] in SHAPES {
                let Plan { tile, splits, span } = Plan::new(device, [m, n, depth], false);
                assert_eq!(span % tile.block_k, 0, "{m} x {n} x {depth}");
                assert!(
                    splits * span >= depth && (splits - 1) * span < depth,
                    "{m} x {n} x {depth}: {splits} x {span}"
                );
                assert_eq!(Plan::new(device, [m, n, depth], true).splits, 1, "{m} x {n} x {depth}");
            }
        }
    }

    #[test]
    fn a_plan_stays_within_the_dispatch_limits() {
        for device in [GPU, SOFTWARE] {
            for [m, n, depth] in SHAPES {
                let Plan { tile, splits, .. } = Plan::new(device, [m, n, depth], false);
                let groups =
                    [BAND * n.div_ceil(tile.block_n), m.div_ceil(tile.block_m).div_ceil(BAND), splits];
                assert!(
                    groups.iter().all(|&g| (1..=MAX_WORKGROUPS).contains(&g)),
                    "{m} x {n} x {depth}: {groups:?}"
                );
            }
        }
    }

    #[test]
    fn narrow_products_get_narrow_tiles_and_split_depths() {
        let Plan { tile, splits, .. } = Plan::new(GPU, [2048, 8, 4096], false);
        assert_eq!(tile.block_n, 8);
        assert_eq!(splits, 8);
        assert_eq!(Plan::new(GPU, [8, 4096, 2048], false).tile.block_m, 8);
        assert_eq!(Plan::new(GPU, [2048, 4096, 4096], true).tile, Tile::GPU[0]);
        assert_eq!(Plan::new(GPU, [256, 1024, 1024], true).tile.block_m, 32);
    }
}
