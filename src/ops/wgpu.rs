//! The ops on wgpu: which shader is launched how often, on which buffers.

use burn::tensor::{DType, Shape};
use burn_cubecl::element::BoolElement;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, FloatElement, IntElement};
use burn_wgpu::WgpuRuntime;

use super::Kernels;
use super::kernel::{BAND, Layout, MAX_WORKGROUPS, PANEL, RANK_QUADS, Shader, Tile, launch};
use super::lora_linear::{LoraGrads, LoraPrimitive};
use super::orpo_loss::{MEAN_LOGP_MAX, PairSpan};

type Floats = CubeTensor<WgpuRuntime>;

impl<F: FloatElement, I: IntElement, BT: BoolElement> Kernels for CubeBackend<WgpuRuntime, F, I, BT> {
    fn lora_linear_forward(
        x: Floats,
        weight: Floats,
        lora: Option<LoraPrimitive<Self>>,
    ) -> (Floats, Option<Floats>) {
        let (x, weight) = (input(x), input(weight));
        let Some(LoraPrimitive { a, b, scale }) = lora else {
            return (product(Layout::RowsRows, &x, &weight, None, 1.0), None);
        };
        let s = product(Layout::RowsRows, &x, &input(a), None, 1.0);
        let y = product(Layout::RowsRows, &x, &weight, Some((&s, &input(b), scale)), 1.0);
        (y, Some(s))
    }

    fn lora_linear_backward_lora(
        dy: Floats,
        x: Floats,
        s: Floats,
        lora: LoraPrimitive<Self>,
    ) -> LoraGrads<Self> {
        let (dy, x, s, b) = (input(dy), input(x), input(s), input(lora.b));
        let (ds, db) = match RANK_QUADS.into_iter().find(|quads| dims(&b)[1] <= 4 * quads) {
            Some(rank_quads) => lora_backward(rank_quads, &dy, &b, &s, lora.scale),
            None => (
                product(Layout::RowsColumns, &dy, &b, None, lora.scale),
                product(Layout::ColumnsColumns, &dy, &s, None, lora.scale),
            ),
        };
        let da = product(Layout::ColumnsColumns, &ds, &x, None, 1.0);
        LoraGrads { ds, da, db }
    }

    fn lora_linear_backward_input(dy: Floats, weight: Floats, ds_a: Option<(Floats, Floats)>) -> Floats {
        let (dy, weight) = (input(dy), input(weight));
        let ds_a = ds_a.map(|(ds, a)| (input(ds), input(a)));
        product(Layout::RowsColumns, &dy, &weight, ds_a.as_ref().map(|(ds, a)| (ds, a, 1.0)), 1.0)
    }

    fn orpo_loss_forward(logps: Floats, pairs: &[PairSpan]) -> Floats {
        let logps = input(logps);
        let stats = output(&logps, [pairs.len(), 5]);
        let spans = logps.client.create_from_slice(bytemuck::cast_slice(&span_words(pairs)));
        launch(
            &logps.client,
            Shader::OrpoLoss,
            [pairs.len() as u32, 1, 1],
            &[&logps.handle, &spans, &stats.handle],
            &[pairs.len() as u32, MEAN_LOGP_MAX.to_bits()],
        );
        stats
    }

    fn orpo_loss_backward(stats: Floats, pairs: &[PairSpan], beta: f32, grad_scale: f32) -> Floats {
        let stats = input(stats);
        let n_entries = pairs.last().map_or(0, |span| span.end as usize);
        let dlogps = output(&stats, [n_entries]);
        let spans = stats.client.create_from_slice(bytemuck::cast_slice(&span_words(pairs)));
        launch(
            &stats.client,
            Shader::OrpoLossBackward,
            [pairs.len() as u32, 1, 1],
            &[&stats.handle, &spans, &dlogps.handle],
            &[pairs.len() as u32, MEAN_LOGP_MAX.to_bits(), beta.to_bits(), grad_scale.to_bits()],
        );
        dlogps
    }
}

/// The tensor as a shader reads it: contiguous, `f32`.
fn input(tensor: Floats) -> Floats {
    assert_eq!(tensor.dtype, DType::F32, "the wgpu kernels take f32 tensors");
    into_contiguous(tensor)
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

/// Whether the device is a processor: Mesa's and Google's adapters have as many lanes as its vectors, and no GPU has that few.
fn is_software(tensor: &Floats) -> bool {
    tensor.client.properties().hardware.plane_size_max <= 16
}

/// How many workgroups it takes to keep the device busy.
fn busy_workgroups(tensor: &Floats) -> u32 {
    if is_software(tensor) { 4 } else { 128 }
}

/// `(ds, dB)` in one read of `dy`.
fn lora_backward(rank_quads: u32, dy: &Floats, b: &Floats, s: &Floats, scale: f32) -> (Floats, Floats) {
    let ([tokens, n_out], r) = (dims(dy), dims(b)[1]);
    let (panels, steps) = (n_out.div_ceil(PANEL), tokens.div_ceil(PANEL));
    let splits = busy_workgroups(dy).div_ceil(panels).clamp(1, steps.div_ceil(2));
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
    let plan = Plan::new(lhs, [m, n, depth], prologue.is_some());
    let Plan { tile, splits, span } = plan;
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
    splits: u32,
    span: u32,
}

impl Plan {
    fn new(like: &Floats, [m, n, depth]: [u32; 3], has_prologue: bool) -> Self {
        let tiles: &[Tile] = if is_software(like) { &Tile::SOFTWARE } else { &Tile::GPU };
        let busy = busy_workgroups(like);
        let blocks = |tile: &Tile| m.div_ceil(tile.block_m) * n.div_ceil(tile.block_n);
        // The time of a block, staging included, times how many the device cannot do at once.
        let cost = |tile: &Tile| {
            let (bm, bn) = (u64::from(tile.block_m), u64::from(tile.block_n));
            u64::from(blocks(tile).max(busy)) * (bm * bn + 8 * (bm + bn))
        };
        let tile = *tiles.iter().min_by_key(|tile| cost(tile)).expect("a list of tiles has entries");
        // A split is worth its second launch when it is long, and a prologue belongs to one split only.
        let most = if has_prologue { 1 } else { (depth / (16 * tile.block_k)).max(1) };
        let splits = busy.div_ceil(blocks(&tile)).clamp(1, most);
        let span = depth.div_ceil(splits).next_multiple_of(tile.block_k);
        Self { tile, splits: depth.div_ceil(span).max(1), span }
    }
}

/// A pair's span as the shaders' `Span` has it.
fn span_words(pairs: &[PairSpan]) -> Vec<[u32; 8]> {
    pairs
        .iter()
        .map(|p| [p.nll_start, p.chosen_start, p.rejected_start, p.end, p.nll_weight.to_bits(), 0, 0, 0])
        .collect()
}
