//! The matrix products of [`lora_linear`](super::lora_linear) on wgpu: how each is cut, and its launches.

use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;
use burn_wgpu::WgpuRuntime;

use super::kernel::{BAND, Element, Elements, Layout, MAX_WORKGROUPS, PANEL, Shader, Tile, launch};

pub(super) type Floats = CubeTensor<WgpuRuntime>;

/// A new tensor on the device of `like`, not initialised.
pub(super) fn output<const D: usize>(like: &Floats, shape: [usize; D], dtype: DType) -> Floats {
    let handle = like.client.empty(shape.iter().product::<usize>() * dtype.size());
    CubeTensor::new_contiguous(like.client.clone(), like.device.clone(), Shape::from(shape), handle, dtype)
}

/// Rows and columns.
pub(super) fn dims(tensor: &Floats) -> [u32; 2] {
    [0, 1].map(|i| u32::try_from(tensor.meta.shape()[i]).expect("a dimension fits 32 bits"))
}

/// What a tensor of this type holds.
fn element(dtype: DType) -> Element {
    if dtype == DType::F16 { Element::F16 } else { Element::F32 }
}

/// What a product is cut for.
#[derive(Clone, Copy)]
pub(super) struct Device {
    tiles: &'static [Tile],
    /// How many workgroups keep it busy.
    busy: u32,
}

const GPU: Device = Device { tiles: &Tile::GPU, busy: 128 };
const SOFTWARE: Device = Device { tiles: &Tile::SOFTWARE, busy: 4 };

impl Device {
    pub(super) fn of(tensor: &Floats) -> Self {
        // Mesa's and Google's software adapters have as many lanes as the processor's vectors; no GPU has that few.
        if tensor.client.properties().hardware.plane_size_max <= 16 { SOFTWARE } else { GPU }
    }
}

/// `addend + scale · (lhs · rhs + prologue.2 · prologue.0 · prologue.1)`, the operands lying as `layout` says.
pub(super) struct Product<'a> {
    layout: Layout,
    lhs: &'a Floats,
    rhs: &'a Floats,
    prologue: Option<(&'a Floats, &'a Floats, f32)>,
    scale: f32,
    addend: Option<Floats>,
    dtype: DType,
}

impl<'a> Product<'a> {
    /// `lhs · rhs` in `f32`.
    pub(super) fn new(layout: Layout, lhs: &'a Floats, rhs: &'a Floats) -> Self {
        Self { layout, lhs, rhs, prologue: None, scale: 1.0, addend: None, dtype: DType::F32 }
    }

    /// Starts from `scale · lhs · rhs`, both `f32`.
    pub(super) fn after(self, lhs: &'a Floats, rhs: &'a Floats, scale: f32) -> Self {
        Self { prologue: Some((lhs, rhs, scale)), ..self }
    }

    /// Multiplies all but the addend.
    pub(super) fn times(self, scale: f32) -> Self {
        Self { scale, ..self }
    }

    /// Adds to a tensor of the output's type, in its place where nobody else holds it.
    pub(super) fn add_to(self, addend: Option<Floats>) -> Self {
        Self { addend, ..self }
    }

    /// The type of the output.
    pub(super) fn into_dtype(self, dtype: DType) -> Self {
        Self { dtype, ..self }
    }

    /// `[m, n, depth]`
    fn extents(&self) -> [u32; 3] {
        let ([l0, l1], [r0, r1]) = (dims(self.lhs), dims(self.rhs));
        let ([m, depth], [n, rhs_depth]) = match self.layout {
            Layout::RowsRows => ([l0, l1], [r0, r1]),
            Layout::RowsColumns => ([l0, l1], [r1, r0]),
            Layout::ColumnsColumns => ([l1, l0], [r1, r0]),
        };
        assert_eq!(depth, rhs_depth, "{:?}: depth of {:?} against {:?}", self.layout, [l0, l1], [r0, r1]);
        [m, n, depth]
    }

    /// Launches it.
    ///
    /// # Panics
    /// If the addend has another type than the output.
    pub(super) fn run(mut self) -> Floats {
        let [m, n, depth] = self.extents();
        if let Some(addend) = &self.addend {
            assert_eq!(addend.dtype, self.dtype, "the type of a product against that of what it is added to");
        }
        let Plan { tile, splits, span } =
            Plan::new(Device::of(self.lhs), [m, n, depth], self.prologue.is_some());
        if splits == 1 {
            let out = output_or(self.addend.as_ref(), self.lhs, [m, n], self.dtype);
            self.launch(tile, [m, n, depth], [1, span], &out);
            return out;
        }
        // The parts are summed in another launch, which the addend joins.
        let (addend, dtype) = (self.addend.take(), self.dtype);
        let parts = output(self.lhs, [splits as usize, m as usize, n as usize], DType::F32);
        self.launch(tile, [m, n, depth], [splits, span], &parts);
        sum(parts, addend, dtype)
    }

    fn launch(&self, tile: Tile, [m, n, depth]: [u32; 3], [splits, span]: [u32; 2], out: &Floats) {
        // What is not there is never read; some buffer has to stand in its place.
        let (prologue_lhs, prologue_rhs, prologue_scale) = self.prologue.unwrap_or((out, out, 0.0));
        let rank = if self.prologue.is_some() { dims(prologue_lhs)[1] } else { 0 };
        let addend = self.addend.as_ref().unwrap_or(out);
        let is_vec4 = [dims(self.lhs)[1], dims(self.rhs)[1], n, rank].iter().all(|length| length % 4 == 0);
        let elements =
            Elements { lhs: element(self.lhs.dtype), rhs: element(self.rhs.dtype), out: element(out.dtype) };
        let buffers =
            [self.lhs, self.rhs, prologue_lhs, prologue_rhs, out, addend].map(|tensor| &tensor.handle);
        let has_addend = u32::from(self.addend.is_some());
        launch(
            &self.lhs.client,
            Shader::Product { layout: self.layout, tile, elements, is_vec4 },
            [BAND * n.div_ceil(tile.block_n), m.div_ceil(tile.block_m).div_ceil(BAND), splits],
            &buffers,
            &[m, n, depth, rank, span, prologue_scale.to_bits(), self.scale.to_bits(), has_addend],
        );
    }
}

/// Where a sum may go: into its addend where nobody else holds that, else into a new tensor.
fn output_or(addend: Option<&Floats>, like: &Floats, [m, n]: [u32; 2], dtype: DType) -> Floats {
    match addend {
        Some(addend) if addend.can_mut() => addend.clone(),
        _ => output(like, [m as usize, n as usize], dtype),
    }
}

/// Adds up the parts `[splits, lines, columns]` of a product, and the addend.
fn sum(parts: Floats, addend: Option<Floats>, dtype: DType) -> Floats {
    let [splits, m, n] = [0, 1, 2].map(|i| parts.meta.shape()[i] as u32);
    let out = output_or(addend.as_ref(), &parts, [m, n], dtype);
    let shader = Shader::Sum { out: element(dtype) };
    let groups = (m * n).div_ceil(shader.workgroup_size());
    let x = groups.min(MAX_WORKGROUPS);
    let has_addend = u32::from(addend.is_some());
    let addend = addend.as_ref().unwrap_or(&out);
    launch(
        &parts.client,
        shader,
        [x, groups.div_ceil(x), 1],
        &[&parts.handle, &out.handle, &addend.handle],
        &[m * n, splits, x * shader.workgroup_size(), has_addend],
    );
    out
}

/// `(ds, dB)` in one read of `dy`.
pub(super) fn lora_backward(
    rank_quads: u32,
    dy: &Floats,
    b: &Floats,
    s: &Floats,
    scale: f32,
) -> (Floats, Floats) {
    let ([tokens, n_out], r) = (dims(dy), dims(b)[1]);
    let (panels, steps) = (n_out.div_ceil(PANEL), tokens.div_ceil(PANEL));
    let splits = Device::of(dy).busy.div_ceil(panels).clamp(1, steps.div_ceil(2));
    let span = steps.div_ceil(splits) * PANEL;
    let splits = tokens.div_ceil(span);
    let parts = |n: u32, lines: u32| output(dy, [n, lines, r].map(|n| n as usize), DType::F32);
    let (ds_parts, db_parts) = (parts(panels, tokens), parts(splits, n_out));
    launch(
        &dy.client,
        Shader::LoraBackward { dy: element(dy.dtype), rank_quads, is_vec4: n_out % 4 == 0 && r % 4 == 0 },
        [panels, splits, 1],
        &[&dy.handle, &b.handle, &s.handle, &ds_parts.handle, &db_parts.handle],
        &[tokens, n_out, r, span, scale.to_bits()],
    );
    (sum(ds_parts, None, DType::F32), sum(db_parts, None, DType::F32))
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
