//! The matrix products of [`lora_linear`](super::lora_linear) on wgpu: how each is cut, and its launches.

mod cuts;
mod plan;

use burn::cubecl::client::ComputeClient;
use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use burn_wgpu::{WgpuDevice, WgpuRuntime};

use super::cube::{bytes, empty};
use super::engine::{self, Adapter, Rest, Rounding, turned};
use super::kernel::{Cut, Element, Elements, Layout, MAX_WORKGROUPS, PANEL, Quads, Shader, launch};
use super::profile;
use super::tune::{self, LEFT, RIGHT, Verdict};

pub use cuts::{CutChoice, CutKind, Cuts};
pub(super) use plan::Device;
use plan::Plan;

pub(super) type Floats = CubeTensor<WgpuRuntime>;

/// Rows and columns.
pub(super) fn dims(tensor: &Floats) -> [u32; 2] {
    [0, 1].map(|i| u32::try_from(tensor.meta.shape()[i]).expect("a dimension fits 32 bits"))
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
        let kind = CutKind::new(self.layout, [m, n, depth, rank], elements);
        let device = Device::of(&self.lhs.client, &self.lhs.device);
        if device.has_matrices() && self.is_split() {
            let halves = CutKind { elements: Elements { lhs: Element::F16, ..elements }, ..kind };
            if matches!(self.rule(device, halves), Cut::Matrices(_)) {
                return self.run_in_halves();
            }
        }
        // cubek's product has no factor.
        let has_factor = self.scale.to_bits() != 1f32.to_bits();
        let choice = match tune::verdict::<Cuts>(&self.lhs.device, kind) {
            Verdict::Fastest(choice) if choice != CutChoice::Cubek || !has_factor => choice,
            _ => CutChoice::Own(self.rule(device, kind)),
        };
        self.run_as(choice)
    }

    /// The cheapest cut that does not come out wrong; one on matrices has to get a small product right first.
    ///
    /// # Panics
    /// If there is none.
    fn rule(&self, device: Device, kind: CutKind) -> Cut {
        let at = &self.lhs.device;
        let is_right = |&cut: &Cut| {
            let choice = CutChoice::Own(cut);
            let is_sample_right = || {
                !matches!(cut, Cut::Matrices(_)) || tune::comes_out_right::<Cuts>(at, kind.sample(), choice)
            };
            tune::is_known_right::<Cuts>(at, kind, choice).unwrap_or_else(is_sample_right)
        };
        let cuts = device.cuts(self.layout, kind.elements, [kind.m, kind.n], self.rounds);
        let cut = cuts.into_iter().find(is_right);
        cut.unwrap_or_else(|| panic!("the device makes no product of the kind {kind:?} right"))
    }

    /// Whether it meets a weight in `f16` with an `f32` that may not be rounded, and nothing else.
    fn is_split(&self) -> bool {
        let types = [self.lhs.dtype, self.rhs.dtype, self.dtype];
        let is_head = types == [DType::F32, DType::F16, DType::F32] && self.layout == Layout::RowsRows;
        is_head && !self.rounds && self.prologue.is_none() && self.scale.to_bits() == 1f32.to_bits()
    }

    /// Takes the left operand as a sum of two `f16`, which has 22 of the 24 bits of a number around one: two products on matrices cost less than one
    /// without.
    fn run_in_halves(self) -> Floats {
        let [high, low] = engine::halves(self.lhs, DType::F16);
        let part = |lhs: &Floats, addend: Option<Floats>| {
            Product::new(self.layout, lhs, self.rhs).named(self.name).add_to(addend).run()
        };
        let low = part(&low, self.addend.clone());
        part(&high, Some(low))
    }

    fn run_as(mut self, choice: CutChoice) -> Floats {
        let [m, n, depth] = self.extents();
        let cut = match choice {
            CutChoice::Cubek => return self.run_by_cubek(),
            CutChoice::Own(cut) => cut,
        };
        let busy = Device::of(&self.lhs.client, &self.lhs.device).busy;
        let Plan { splits, span } = Plan::new(busy, cut, [m, n, depth], self.prologue.is_some());
        if splits == 1 {
            let out = output_or(self.addend.as_ref(), self.lhs, [m, n], self.dtype);
            self.launch(cut, [m, n, depth], [1, span], &out);
            return out;
        }
        // The parts are summed in another launch, which the addend joins.
        let (addend, dtype) = (self.addend.take(), self.dtype);
        let parts = empty(self.lhs, [splits as usize, m as usize, n as usize], DType::F32);
        self.launch(cut, [m, n, depth], [splits, span], &parts);
        sum(parts, addend, dtype)
    }

    /// cubek's product, and what else there is added to it.
    fn run_by_cubek(self) -> Floats {
        let Self { name, layout, lhs, rhs, prologue, addend, dtype, .. } = self;
        let is_turned = layout == Layout::RowsRows;
        let right = |tensor: &Floats| if is_turned { turned(tensor) } else { tensor.clone() };
        assert_ne!(layout, Layout::ColumnsColumns, "{name}: no such product is timed");
        let adapter =
            prologue.map(|(left, factor, scale)| Adapter { left: left.clone(), right: right(factor), scale });
        engine::product(name, lhs, &right(rhs), Rounding::Whole, Rest { adapter, addend, dtype })
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
        // Of a prologue that is not there the first entries are read, and not used. What stands in its place is nowhere written.
        let (prologue_lhs, prologue_rhs, prologue_scale) = self.prologue.unwrap_or((self.rhs, self.rhs, 0.0));
        let rank = if self.prologue.is_some() { dims(prologue_lhs)[1] } else { 0 };
        let addend = self.addend.as_ref().unwrap_or(out);
        let quads = Quads::new(self.layout, [m, n, depth, rank]);
        let elements =
            Elements { lhs: self.lhs.dtype.into(), rhs: self.rhs.dtype.into(), out: out.dtype.into() };
        let buffers =
            [self.lhs, self.rhs, prologue_lhs, prologue_rhs, out, addend].map(|tensor| &tensor.handle);
        let has_addend = u32::from(self.addend.is_some());
        let [x, y] = plan::blocks(cut, [m, n]);
        let [flops, bytes] = self.work();
        profile::kernel(self.name, flops, bytes, &self.lhs.client, || {
            launch(
                &self.lhs.client,
                Shader::Product { layout: self.layout, cut, elements, quads },
                [x, y, splits],
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
        _ => empty(like, [m as usize, n as usize], dtype),
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
    let splits = Device::of(&dy.client, &dy.device).busy.div_ceil(panels).clamp(1, steps.div_ceil(2));
    let span = steps.div_ceil(splits) * PANEL;
    let splits = tokens.div_ceil(span);
    let parts = |n: u32, lines: u32| empty(dy, [n, lines, r].map(|n| n as usize), DType::F32);
    let (ds_parts, db_parts) = (parts(panels, tokens), parts(splits, n_out));
    let flops = 4 * tokens as usize * n_out as usize * r as usize;
    let moved = bytes(&[dy, b, s, &ds_parts, &db_parts]);
    profile::kernel("lora_linear backward lora", flops, moved, &dy.client, || {
        launch(
            &dy.client,
            Shader::LoraBackward {
                dy: dy.dtype.into(),
                rank_quads,
                is_dy_vec4: n_out % 4 == 0,
                is_rank_vec4: r % 4 == 0,
            },
            [panels, splits, 1],
            &[&dy.handle, &b.handle, &s.handle, &ds_parts.handle, &db_parts.handle],
            &[tokens, n_out, r, span, scale.to_bits()],
        );
    });
    (sum(ds_parts, None, DType::F32), sum(db_parts, None, DType::F32))
}

/// The operands of a product that is only timed.
#[derive(Debug)]
pub struct Scratch {
    kind: CutKind,
    lhs: Floats,
    rhs: Floats,
    prologue: Option<[Floats; 2]>,
    addend: Floats,
}

impl Scratch {
    pub(super) fn new(client: &ComputeClient<WgpuRuntime>, device: &WgpuDevice, kind: CutKind) -> Self {
        let CutKind { layout, n, depth, rank, elements, .. } = kind;
        let m = kind.rows();
        let shape = |lines: u32, depth: u32, is_rows: bool| {
            if is_rows { [lines, depth] } else { [depth, lines] }.map(|n| n as usize)
        };
        let [lhs_rows, rhs_rows] = layout.are_rows();
        let operand = |lines, depth, is_rows, first: u32, pattern, dtype| {
            tune::operand(
                client,
                device,
                shape(lines, depth, is_rows),
                is_rows,
                first as usize,
                pattern,
                dtype,
            )
        };
        // The adapter's operands go on where the others end.
        let prologue = (rank > 0).then(|| {
            [
                operand(m, rank, lhs_rows, depth, LEFT, DType::F32),
                operand(n, rank, rhs_rows, depth, RIGHT, DType::F32),
            ]
        });
        Self {
            kind,
            lhs: operand(m, depth, lhs_rows, 0, LEFT, elements.lhs.dtype()),
            rhs: operand(n, depth, rhs_rows, 0, RIGHT, elements.rhs.dtype()),
            prologue,
            addend: tune::addend(client, device, [m, n].map(|extent| extent as usize), elements.out.dtype()),
        }
    }

    /// What the output is added to, in place.
    pub(super) fn place(&self) -> Floats {
        into_contiguous(self.addend.copy())
    }

    pub(super) fn run(&self, choice: CutChoice, addend: Option<Floats>) -> Floats {
        let product = Product::new(self.kind.layout, &self.lhs, &self.rhs);
        let product = product.into_dtype(self.kind.elements.out.dtype()).add_to(addend);
        match &self.prologue {
            Some([lhs, rhs]) => product.after(lhs, rhs, 1.0).run_as(choice),
            None => product.run_as(choice),
        }
    }
}
