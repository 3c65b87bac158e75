//! The matrix products of [`lora_linear`](super::lora_linear) on wgpu: how each is cut, and its launches.

mod cuts;
mod plan;

use burn::cubecl::client::ComputeClient;
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::cast;
use burn_cubecl::kernel::matmul::{MatmulStrategy, matmul};
use burn_cubecl::ops::numeric::{self, zeros_client};
use burn_cubecl::tensor::CubeTensor;
use burn_wgpu::{WgpuDevice, WgpuRuntime};

use super::cube::bytes;
use super::kernel::{Cut, Element, Elements, Layout, MAX_WORKGROUPS, PANEL, Quads, Shader, launch};
use super::profile;
use super::tune::{self, LEFT, RIGHT, Verdict};

pub use cuts::{CutChoice, CutKind, Cuts};
pub(super) use plan::Device;
use plan::Plan;

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
        let device = Device::of(&self.lhs.client);
        if device.has_matrices() && self.is_split() {
            return self.run_in_halves();
        }
        let cuts = || device.cuts(self.layout, elements, [m, n], self.rounds).into_iter();
        let rule = || cuts().next();
        let registers = || cuts().find(|cut| !matches!(cut, Cut::Matrices(_)));
        // burn's product has no factor.
        let has_factor = self.scale.to_bits() != 1f32.to_bits();
        let choice = match tune::verdict::<Cuts>(&self.lhs.device, kind) {
            Verdict::Fastest(CutChoice::Burn) if has_factor => rule().map(CutChoice::Own),
            Verdict::Fastest(choice) => Some(choice),
            Verdict::Untried => rule().map(CutChoice::Own),
            Verdict::Wrong => registers().map(CutChoice::Own),
        };
        let choice = choice.unwrap_or_else(|| panic!("no cut of {m} x {n} fits the device's dispatches"));
        self.run_as(choice)
    }

    /// Whether it meets a weight in `f16` with an `f32` that may not be rounded, and nothing else.
    fn is_split(&self) -> bool {
        let types = [self.lhs.dtype, self.rhs.dtype, self.dtype];
        let is_head = types == [DType::F32, DType::F16, DType::F32] && self.layout == Layout::RowsRows;
        is_head && !self.rounds && self.prologue.is_none() && self.scale.to_bits() == 1f32.to_bits()
    }

    /// Takes the left operand as a sum of two `f16`, which has 22 of its 24 bits: two products on matrices cost less than one
    /// without.
    fn run_in_halves(self) -> Floats {
        let high = cast(self.lhs.clone(), DType::F16);
        let low = cast(numeric::sub(self.lhs.clone(), cast(high.clone(), DType::F32)), DType::F16);
        let part = |lhs: &Floats, addend: Option<Floats>| {
            Product::new(self.layout, lhs, self.rhs).named(self.name).add_to(addend).run()
        };
        let low = part(&low, self.addend.clone());
        part(&high, Some(low))
    }

    fn run_as(mut self, choice: CutChoice) -> Floats {
        let [m, n, depth] = self.extents();
        let cut = match choice {
            CutChoice::Burn => return self.run_by_burn(),
            CutChoice::Own(cut) => cut,
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
    prologue: [Floats; 2],
}

impl Scratch {
    pub(super) fn new(client: &ComputeClient<WgpuRuntime>, device: &WgpuDevice, kind: CutKind) -> Self {
        let CutKind { layout, n, depth, rank, elements, .. } = kind;
        let m = kind.rows();
        let shape = |lines: u32, depth: u32, is_rows: bool| {
            if is_rows { [lines, depth] } else { [depth, lines] }.map(|n| n as usize)
        };
        let (lhs_rows, rhs_rows) = (layout != Layout::ColumnsColumns, layout == Layout::RowsRows);
        let operand = |shape, is_rows, pattern, element: Element| {
            tune::operand(client, device, shape, is_rows, pattern, element.dtype())
        };
        // The adapter adds nothing to the pattern's sums.
        let zeros = |shape| zeros_client(client.clone(), device.clone(), Shape::from(shape), DType::F32);
        Self {
            kind,
            lhs: operand(shape(m, depth, lhs_rows), lhs_rows, LEFT, elements.lhs),
            rhs: operand(shape(n, depth, rhs_rows), rhs_rows, RIGHT, elements.rhs),
            prologue: [zeros(shape(m, rank.max(1), lhs_rows)), zeros(shape(n, rank.max(1), rhs_rows))],
        }
    }

    /// Zeros of the output's shape and type.
    pub(super) fn zeros(&self) -> Floats {
        let CutKind { n, elements, .. } = self.kind;
        let m = self.kind.rows();
        let (client, device) = (self.lhs.client.clone(), self.lhs.device.clone());
        zeros_client(client, device, Shape::from([m as usize, n as usize]), elements.out.dtype())
    }

    pub(super) fn run(&self, choice: CutChoice, addend: Option<Floats>) -> Floats {
        let [prologue_lhs, prologue_rhs] = &self.prologue;
        let product = Product::new(self.kind.layout, &self.lhs, &self.rhs);
        let product = product.into_dtype(self.kind.elements.out.dtype()).add_to(addend);
        if self.kind.rank == 0 {
            return product.run_as(choice);
        }
        product.after(prologue_lhs, prologue_rhs, 1.0).run_as(choice)
    }
}
