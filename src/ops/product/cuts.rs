//! Of the products that wgpu has shaders for: how they are cut, and the product that burn brings.

use std::sync::LazyLock;

use burn::cubecl::Runtime;
use burn::cubecl::client::ComputeClient;
use burn_wgpu::{WgpuDevice, WgpuRuntime};
use serde::{Deserialize, Serialize};

use super::{Device, Floats, Scratch};
use crate::ops::kernel::{Cut, Element, Elements, Layout, products_revision};
use crate::ops::tune::{LinearKind, Table, Tunable, like_rows, typical_rows};

/// What the time of a product depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CutKind {
    /// How the operands lie in memory.
    pub layout: Layout,
    /// What the output's rows count as, see [`like_rows`].
    pub m: u32,
    /// Columns of the output.
    pub n: u32,
    /// Entries that each entry of the output sums.
    pub depth: u32,
    /// Rank of the adapter whose product it starts from, or 0.
    pub rank: u32,
    /// What the operands hold.
    pub elements: Elements,
}

impl CutKind {
    /// The kind of a product of these extents.
    pub fn new(layout: Layout, [m, n, depth, rank]: [u32; 4], elements: Elements) -> Self {
        // A product of more rows than that is no product of any model.
        let m = u32::try_from(like_rows(m as usize)).unwrap_or(m);
        Self { layout, m, n, depth, rank, elements }
    }

    /// Rows of the product that stands for all of this kind.
    pub(super) fn rows(self) -> u32 {
        typical_rows(self.m as usize) as u32
    }

    /// A product by which a cut of one like this is judged that was not timed: a few blocks of it.
    pub(super) fn sample(self) -> Self {
        Self { m: 256, n: 264, depth: 264, rank: 8 * self.rank.min(1), ..self }
    }
}

/// Who makes a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CutChoice {
    /// The project's kernels.
    Own(Cut),
    /// cubek's, which is burn's library for it.
    Cubek,
}

/// The matrix engine of the shaders.
#[derive(Debug)]
pub enum Cuts {}

impl Tunable for Cuts {
    type Runtime = WgpuRuntime;
    type Kind = CutKind;
    type Choice = CutChoice;
    type Scratch = Scratch;

    fn table() -> &'static Table<CutKind, CutChoice> {
        static TABLE: Table<CutKind, CutChoice> = LazyLock::new(Default::default);
        &TABLE
    }

    fn revision() -> String {
        format!("{} {:016x}", env!("CARGO_PKG_VERSION"), products_revision())
    }

    fn of_linear(LinearKind { extents, dtype, joins_stream, .. }: LinearKind) -> [CutKind; 2] {
        let [tokens, n_in, n_out, rank] = extents;
        let weight = Element::from(dtype);
        let outside = if joins_stream { Element::F32 } else { weight };
        let forward = Elements { lhs: weight, rhs: weight, out: outside };
        let backward = Elements { lhs: outside, rhs: weight, out: weight };
        [
            CutKind::new(Layout::RowsRows, [tokens, n_out, n_in, rank], forward),
            CutKind::new(Layout::RowsColumns, [tokens, n_in, n_out, rank], backward),
        ]
    }

    fn of_more_rows(kind: CutKind) -> CutKind {
        CutKind { m: like_rows(kind.m as usize + 1) as u32, ..kind }
    }

    fn flops(kind: CutKind) -> f64 {
        2.0 * f64::from(kind.rows()) * f64::from(kind.n) * (f64::from(kind.depth) + f64::from(kind.rank))
    }

    fn depth(kind: CutKind) -> usize {
        (kind.depth + kind.rank) as usize
    }

    fn candidates(device: &WgpuDevice, kind: CutKind) -> Vec<CutChoice> {
        // Only the gradient by a layer's input meets a weight of another type and may be rounded to it.
        let rounds = kind.layout == Layout::RowsColumns;
        let device = Device::of(&WgpuRuntime::client(device), device);
        let cuts = device.worth_timing(device.cuts(kind.layout, kind.elements, [kind.m, kind.n], rounds));
        cuts.into_iter().map(CutChoice::Own).chain([CutChoice::Cubek]).collect()
    }

    fn scratch(client: &ComputeClient<WgpuRuntime>, device: &WgpuDevice, kind: CutKind) -> Scratch {
        Scratch::new(client, device, kind)
    }

    fn launch(scratch: &Scratch, choice: CutChoice, place: Option<Floats>) -> Option<Floats> {
        Some(scratch.run(choice, place))
    }

    fn place(scratch: &Scratch) -> Floats {
        scratch.place()
    }

    /// A product that is added to nothing differs in what it does not read.
    fn is_added(_kind: CutKind) -> bool {
        true
    }
}
