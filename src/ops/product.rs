//! The matrix products of [`lora_linear`](super::lora_linear) on wgpu: how each is cut, and its launches.

use burn::cubecl::client::ComputeClient;
use burn::cubecl::features::MmaConfig;
use burn::cubecl::ir::{ElemType, FloatKind, StorageType};
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::matmul::{MatmulStrategy, matmul};
use burn_cubecl::ops::numeric::{self, zeros_client};
use burn_cubecl::tensor::CubeTensor;
use burn_wgpu::{WgpuDevice, WgpuRuntime};

use super::cube::{bytes, is_software};
use super::kernel::{
    BAND, Cut, Element, Elements, Layout, MAX_WORKGROUPS, MatrixTile, PANEL, Shader, Tile, launch,
};
use super::profile;
use super::tune::{self, Choice, Kind};

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

/// Cuts of each kind that are worth timing.
const MOST_CUTS: usize = 3;

/// What a product is cut for.
#[derive(Clone, Copy)]
pub(super) struct Device {
    tiles: &'static [Tile],
    /// How many workgroups keep it busy.
    busy: u32,
    /// The size of its matrices of `f16` with `f32` sums, and the lanes of a subgroup.
    matrices: Option<[u32; 2]>,
}

const GPU: Device = Device { tiles: &Tile::GPU, busy: 128, matrices: None };
const SOFTWARE: Device = Device { tiles: &Tile::SOFTWARE, busy: 4, matrices: None };

impl Device {
    pub(super) fn of(client: &ComputeClient<WgpuRuntime>) -> Self {
        let properties = client.properties();
        let most_lanes = properties.hardware.plane_size_max;
        let device = if is_software(client) { SOFTWARE } else { GPU };
        let [f16, f32] =
            [FloatKind::F16, FloatKind::F32].map(|kind| StorageType::from(ElemType::Float(kind)));
        let has = |size: &u32| {
            let [m, n, k] = [*size; 3];
            properties.features.matmul.cmma.contains(&MmaConfig {
                a_type: f16,
                b_type: f16,
                cd_type: f32,
                m,
                n,
                k,
            })
        };
        // naga 29's MSL turns row-major matrices round, and knows no sums of another type than the operands'.
        let size = MatrixTile::SIZES.into_iter().find(|size| !cfg!(target_os = "macos") && has(size));
        let lanes = MatrixTile::LANES.into_iter().find(|&lanes| most_lanes <= lanes);
        Self { matrices: size.map(|size| [size, lanes.unwrap_or(MatrixTile::LANES[2])]), ..device }
    }

    /// The time of a block, staging included, times the blocks, or the workgroups that would have been busy meanwhile.
    fn cost(self, cut: Cut, [m, n]: [u32; 2]) -> u64 {
        let [block_m, block_n, _] = cut.block();
        let blocks = u64::from((m.div_ceil(block_m) * n.div_ceil(block_n)).max(self.busy));
        let [block_m, block_n] = [block_m, block_n].map(u64::from);
        blocks * (block_m * block_n + 8 * (block_m + block_n))
    }

    /// The cuts that the device has for a product, the cheapest first; matrices, which are many times faster, before all others.
    /// They take `f16`; `rounds` says whether an `f32` that meets a weight in `f16` may be rounded to it.
    pub(super) fn cuts(
        self,
        layout: Layout,
        elements: Elements,
        extents: [u32; 2],
        rounds: bool,
    ) -> Vec<Cut> {
        let is_f16 = elements.rhs == Element::F16 && (elements.lhs == Element::F16 || rounds);
        let fits = is_f16 && layout != Layout::ColumnsColumns;
        let matrices = self.matrices.filter(|_| fits).into_iter();
        let matrices = matrices.flat_map(|[size, lanes]| MatrixTile::all(size, lanes));
        let mut matrices: Vec<_> = matrices.map(Cut::Matrices).collect();
        let mut tiles: Vec<_> = self.tiles.iter().copied().map(Cut::Registers).collect();
        for cuts in [&mut matrices, &mut tiles] {
            cuts.sort_by_key(|&cut| self.cost(cut, extents));
            cuts.truncate(MOST_CUTS);
        }
        matrices.extend(tiles);
        matrices
    }
}

/// `addend + scale · (lhs · rhs + prologue.2 · prologue.0 · prologue.1)`, the operands lying as `layout` says.
pub(super) struct Product<'a> {
    name: &'static str,
    layout: Layout,
    lhs: &'a Floats,
    rhs: &'a Floats,
    prologue: Option<(&'a Floats, &'a Floats, f32)>,
    scale: f32,
    addend: Option<Floats>,
    dtype: DType,
    rounds: bool,
}

impl<'a> Product<'a> {
    /// `lhs · rhs` in `f32`.
    pub(super) fn new(layout: Layout, lhs: &'a Floats, rhs: &'a Floats) -> Self {
        let name = match layout {
            Layout::RowsRows => "lora_linear forward",
            Layout::RowsColumns => "lora_linear backward input",
            Layout::ColumnsColumns => "lora_linear backward lora",
        };
        Self {
            name,
            layout,
            lhs,
            rhs,
            prologue: None,
            scale: 1.0,
            addend: None,
            dtype: DType::F32,
            rounds: false,
        }
    }

    /// Lets `lhs` be rounded to the `f16` that `rhs` is in.
    pub(super) fn rounding(self) -> Self {
        Self { rounds: true, ..self }
    }

    /// What the profile calls it, where that is not its layout's usual part.
    pub(super) fn named(self, name: &'static str) -> Self {
        Self { name, ..self }
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
    pub(super) fn run(self) -> Floats {
        let [m, n, depth] = self.extents();
        if let Some(addend) = &self.addend {
            assert_eq!(addend.dtype, self.dtype, "the type of a product against that of what it is added to");
        }
        let rank = self.prologue.map_or(0, |(lhs, _, _)| dims(lhs)[1]);
        let elements =
            Elements { lhs: self.lhs.dtype.into(), rhs: self.rhs.dtype.into(), out: self.dtype.into() };
        let kind = Kind::new(self.layout, [m, n, depth, rank], elements);
        let device = Device::of(&self.lhs.client);
        let formula = || Choice::Own(device.cuts(self.layout, elements, [m, n], self.rounds)[0]);
        // burn's product has no factor.
        let has_factor = self.scale.to_bits() != 1f32.to_bits();
        let timed = tune::choice(&self.lhs.device, kind).filter(|&c| c != Choice::Burn || !has_factor);
        let choice = timed.unwrap_or_else(formula);
        self.run_as(choice)
    }

    fn run_as(mut self, choice: Choice) -> Floats {
        let [m, n, depth] = self.extents();
        let cut = match choice {
            Choice::Burn => return self.run_by_burn(),
            Choice::Own(cut) => cut,
        };
        let busy = Device::of(&self.lhs.client).busy;
        let Plan { splits, span } = Plan::new(busy, cut, [m, n, depth], self.prologue.is_some());
        if splits == 1 {
            let out = output_or(self.addend.as_ref(), self.lhs, [m, n], self.dtype);
            self.launch(cut, [m, n, depth], [1, span], &out);
            return out;
        }
        // The parts are summed in another launch, which the addend joins.
        let (addend, dtype) = (self.addend.take(), self.dtype);
        let parts = output(self.lhs, [splits as usize, m as usize, n as usize], DType::F32);
        self.launch(cut, [m, n, depth], [splits, span], &parts);
        sum(parts, addend, dtype)
    }

    /// burn's product, and what else there is added to it.
    fn run_by_burn(self) -> Floats {
        let work = self.work();
        let Self { name, layout, lhs, rhs, prologue, addend, dtype, .. } = self;
        let turned = |tensor: &Floats, is_turned: bool| {
            let mut tensor = tensor.clone();
            if is_turned {
                tensor.meta.swap(0, 1);
            }
            tensor
        };
        let (turned_lhs, turned_rhs) =
            (turned(lhs, layout == Layout::ColumnsColumns), turned(rhs, layout == Layout::RowsRows));
        let mut product = None;
        profile::kernel(name, work[0], work[1], &lhs.client, || {
            product = matmul(turned_lhs, turned_rhs, None, MatmulStrategy::default(), dtype).ok();
        });
        let product = product.expect("burn multiplies any two matrices of one type");
        let with_prologue = |addend: Floats| match prologue {
            Some((lhs, rhs, scale)) => {
                Product::new(layout, lhs, rhs).times(scale).add_to(Some(addend)).into_dtype(dtype).run()
            }
            None => addend,
        };
        match addend {
            Some(addend) => numeric::add(with_prologue(addend), product),
            None => with_prologue(product),
        }
    }

    /// Operations, and bytes that are read and written at least.
    fn work(&self) -> [usize; 2] {
        let [m, n, depth] = self.extents().map(|n| n as usize);
        let rank = self.prologue.map_or(0, |(lhs, _, _)| dims(lhs)[1] as usize);
        let moved = |t: &Floats| bytes(&[t]);
        let prologue = self.prologue.map_or(0, |(lhs, rhs, _)| moved(lhs) + moved(rhs));
        let addend = self.addend.as_ref().map_or(0, moved);
        [
            2 * m * n * (depth + rank),
            moved(self.lhs) + moved(self.rhs) + prologue + addend + m * n * self.dtype.size(),
        ]
    }

    fn launch(&self, cut: Cut, [m, n, depth]: [u32; 3], [splits, span]: [u32; 2], out: &Floats) {
        // What is not there is never read; some buffer has to stand in its place.
        let (prologue_lhs, prologue_rhs, prologue_scale) = self.prologue.unwrap_or((out, out, 0.0));
        let rank = if self.prologue.is_some() { dims(prologue_lhs)[1] } else { 0 };
        let addend = self.addend.as_ref().unwrap_or(out);
        let is_vec4 = [dims(self.lhs)[1], dims(self.rhs)[1], n, rank].iter().all(|length| length % 4 == 0);
        let elements =
            Elements { lhs: self.lhs.dtype.into(), rhs: self.rhs.dtype.into(), out: out.dtype.into() };
        let buffers =
            [self.lhs, self.rhs, prologue_lhs, prologue_rhs, out, addend].map(|tensor| &tensor.handle);
        let has_addend = u32::from(self.addend.is_some());
        let [block_m, block_n, _] = cut.block();
        let [flops, bytes] = self.work();
        profile::kernel(self.name, flops, bytes, &self.lhs.client, || {
            launch(
                &self.lhs.client,
                Shader::Product { layout: self.layout, cut, elements, is_vec4 },
                [BAND * n.div_ceil(block_n), m.div_ceil(block_m).div_ceil(BAND), splits],
                &buffers,
                &[m, n, depth, rank, span, prologue_scale.to_bits(), self.scale.to_bits(), has_addend],
            );
        });
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
    let shader = Shader::Sum { out: dtype.into() };
    let groups = (m * n).div_ceil(shader.workgroup_size());
    let x = groups.min(MAX_WORKGROUPS);
    let has_addend = u32::from(addend.is_some());
    let addend = addend.as_ref().unwrap_or(&out);
    let flops = (m * n * splits) as usize;
    profile::kernel("lora_linear sum", flops, bytes(&[&parts, &out]), &parts.client, || {
        launch(
            &parts.client,
            shader,
            [x, groups.div_ceil(x), 1],
            &[&parts.handle, &out.handle, &addend.handle],
            &[m * n, splits, x * shader.workgroup_size(), has_addend],
        );
    });
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
    let splits = Device::of(&dy.client).busy.div_ceil(panels).clamp(1, steps.div_ceil(2));
    let span = steps.div_ceil(splits) * PANEL;
    let splits = tokens.div_ceil(span);
    let parts = |n: u32, lines: u32| output(dy, [n, lines, r].map(|n| n as usize), DType::F32);
    let (ds_parts, db_parts) = (parts(panels, tokens), parts(splits, n_out));
    let flops = 4 * tokens as usize * n_out as usize * r as usize;
    let moved = bytes(&[dy, b, s, &ds_parts, &db_parts]);
    profile::kernel("lora_linear backward lora", flops, moved, &dy.client, || {
        launch(
            &dy.client,
            Shader::LoraBackward { dy: dy.dtype.into(), rank_quads, is_vec4: n_out % 4 == 0 && r % 4 == 0 },
            [panels, splits, 1],
            &[&dy.handle, &b.handle, &s.handle, &ds_parts.handle, &db_parts.handle],
            &[tokens, n_out, r, span, scale.to_bits()],
        );
    });
    (sum(ds_parts, None, DType::F32), sum(db_parts, None, DType::F32))
}

/// How the depth of a product is cut.
struct Plan {
    /// Parts of the depth, each summed by workgroups of its own.
    splits: u32,
    /// Entries of the depth in a part.
    span: u32,
}

impl Plan {
    /// Cuts the depth when the blocks alone keep fewer than `busy` workgroups.
    fn new(busy: u32, cut: Cut, [m, n, depth]: [u32; 3], has_prologue: bool) -> Self {
        let [block_m, block_n, block_k] = cut.block();
        // A part is worth a second launch when it is long, and a prologue belongs to one part only.
        let most = if has_prologue { 1 } else { (depth / (16 * block_k)).max(1) };
        let splits = busy.div_ceil(m.div_ceil(block_m) * n.div_ceil(block_n)).clamp(1, most);
        let span = depth.div_ceil(splits).next_multiple_of(block_k);
        Self { splits: depth.div_ceil(span), span }
    }
}

/// The operands of a product that is only timed.
pub(super) struct Scratch {
    kind: Kind,
    lhs: Floats,
    rhs: Floats,
    prologue: [Floats; 2],
}

impl Scratch {
    pub(super) fn new(client: &ComputeClient<WgpuRuntime>, device: &WgpuDevice, kind: Kind) -> Self {
        let Kind { layout, m, n, depth, rank, elements } = kind;
        let operand = |lines: u32, depth: u32, is_rows: bool, element: Element| {
            let shape = if is_rows { [lines, depth] } else { [depth, lines] }.map(|n| n as usize);
            let dtype = if element == Element::F16 { DType::F16 } else { DType::F32 };
            zeros_client(client.clone(), device.clone(), Shape::from(shape), dtype)
        };
        let (lhs_rows, rhs_rows) = (layout != Layout::ColumnsColumns, layout == Layout::RowsRows);
        Self {
            kind,
            lhs: operand(m, depth, lhs_rows, elements.lhs),
            rhs: operand(n, depth, rhs_rows, elements.rhs),
            prologue: [
                operand(m, rank.max(1), lhs_rows, Element::F32),
                operand(n, rank.max(1), rhs_rows, Element::F32),
            ],
        }
    }

    pub(super) fn run(&self, choice: Choice) -> Floats {
        let [prologue_lhs, prologue_rhs] = &self.prologue;
        let dtype = if self.kind.elements.out == Element::F16 { DType::F16 } else { DType::F32 };
        let product = Product::new(self.kind.layout, &self.lhs, &self.rhs).into_dtype(dtype);
        if self.kind.rank == 0 {
            return product.run_as(choice);
        }
        product.after(prologue_lhs, prologue_rhs, 1.0).run_as(choice)
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

    /// Every cut of every device.
    fn cuts() -> impl Iterator<Item = (u32, Cut)> {
        let matrices = MatrixTile::all(16, 32).map(|tile| (GPU.busy, Cut::Matrices(tile)));
        let tiles = [GPU, SOFTWARE]
            .into_iter()
            .flat_map(|device| device.tiles.iter().map(move |&tile| (device.busy, Cut::Registers(tile))));
        tiles.chain(matrices)
    }

    #[test]
    fn the_parts_of_a_product_cover_its_depth_once() {
        for (busy, cut) in cuts() {
            for [m, n, depth] in SHAPES {
                let Plan { splits, span } = Plan::new(busy, cut, [m, n, depth], false);
                assert_eq!(span % cut.block()[2], 0, "{cut:?}: {m} x {n} x {depth}");
                assert!(
                    splits * span >= depth && (splits - 1) * span < depth,
                    "{cut:?}: {m} x {n} x {depth}: {splits} x {span}"
                );
                assert_eq!(Plan::new(busy, cut, [m, n, depth], true).splits, 1, "{m} x {n} x {depth}");
            }
        }
    }

    #[test]
    fn a_plan_stays_within_the_dispatch_limits() {
        let matrices = Some([16, 32]);
        for device in [GPU, SOFTWARE, Device { matrices, ..GPU }] {
            for [m, n, depth] in SHAPES {
                let f16 = Elements { lhs: Element::F16, rhs: Element::F16, out: Element::F32 };
                let cut = device.cuts(Layout::RowsRows, f16, [m, n], false)[0];
                let Plan { splits, .. } = Plan::new(device.busy, cut, [m, n, depth], false);
                let [block_m, block_n, _] = cut.block();
                let groups = [BAND * n.div_ceil(block_n), m.div_ceil(block_m).div_ceil(BAND), splits];
                assert!(
                    groups.iter().all(|&g| (1..=MAX_WORKGROUPS).contains(&g)),
                    "{m} x {n} x {depth}: {groups:?}"
                );
            }
        }
    }

    #[test]
    fn matrices_are_for_f16_on_devices_that_have_them() {
        let device = Device { matrices: Some([16, 32]), ..GPU };
        let f16 = Elements { lhs: Element::F16, rhs: Element::F16, out: Element::F32 };
        let has_matrices = |device: Device, layout, elements| {
            let cuts = device.cuts(layout, elements, [2048, 4096], false);
            cuts.iter().any(|cut| matches!(cut, Cut::Matrices(_)))
        };
        assert!(has_matrices(device, Layout::RowsRows, f16));
        assert!(!has_matrices(device, Layout::ColumnsColumns, f16));
        assert!(!has_matrices(device, Layout::RowsRows, Elements { rhs: Element::F32, ..f16 }));
        assert!(!has_matrices(GPU, Layout::RowsRows, f16));
    }

    #[test]
    fn narrow_products_get_narrow_tiles_and_split_depths() {
        let cut = |extents| GPU.cuts(Layout::RowsRows, Elements::F32, extents, false)[0];
        let narrow = cut([2048, 8]);
        assert_eq!(narrow.block()[1], 8);
        assert_eq!(Plan::new(GPU.busy, narrow, [2048, 8, 4096], false).splits, 8);
        assert_eq!(cut([8, 4096]).block()[0], 8);
        assert_eq!(cut([2048, 4096]), Cut::Registers(Tile::GPU[0]));
        assert_eq!(cut([256, 1024]).block()[0], 32);
    }
}
