//! Of the products that wgpu has shaders for: how they are cut, and burn's own product.

use std::sync::LazyLock;

use burn::cubecl::client::ComputeClient;
use burn::tensor::DType;
use burn_wgpu::{WgpuDevice, WgpuRuntime};
use serde::{Deserialize, Serialize};

use super::{Device, Floats, Scratch};
use crate::ops::kernel::{Cut, Element, Elements, Layout, products_revision};
use crate::ops::tune::{MatrixEngine, Table, typical_rows};

/// What the time of a product depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CutKind {
    /// How the operands lie in memory.
    pub layout: Layout,
    /// Rows of the output, rounded up to a power of two.
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
        let m = m.checked_next_power_of_two().unwrap_or(m);
        Self { layout, m, n, depth, rank, elements }
    }

    /// The forward product of a linear layer and its gradient by the input, `[tokens, in, out, rank]`, with activations, weight
    /// and output of these types.
    pub fn of_linear([tokens, n_in, n_out, rank]: [u32; 4], elements: Elements) -> [Self; 2] {
        [
            Self::new(Layout::RowsRows, [tokens, n_out, n_in, rank], elements),
            Self::new(Layout::RowsColumns, [tokens, n_in, n_out, rank], elements),
        ]
    }

    /// Rows of the product that stands for all of this kind.
    pub(super) fn rows(self) -> u32 {
        typical_rows(self.m as usize) as u32
    }

    /// Whether burn's product is as precise: it rounds to its operands' type, and so does every sum that follows it.
    fn suits_burn(self) -> bool {
        self.elements == Elements::F32
    }
}

/// Who makes a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CutChoice {
    /// The project's kernels.
    Own(Cut),
    /// burn's product, to which the rest is added.
    Burn,
}

/// The matrix engine of the shaders.
#[derive(Debug)]
pub enum Cuts {}

impl MatrixEngine for Cuts {
    type Runtime = WgpuRuntime;
    type Kind = CutKind;
    type Choice = CutChoice;
    type Scratch = Scratch;

    fn table() -> &'static Table<CutKind, CutChoice> {
        static TABLE: Table<CutKind, CutChoice> = LazyLock::new(Default::default);
        &TABLE
    }

    fn revision() -> String {
        format!("{:016x}", products_revision())
    }

    fn of_linear(extents: [u32; 4], weight: DType) -> Vec<CutKind> {
        // Activations are as the weights are; what joins the residual stream goes out as f32, and its gradient comes in as f32.
        let weight = Element::from(weight);
        let mixes = [(weight, weight), (weight, Element::F32), (Element::F32, weight)];
        let elements = mixes.map(|(lhs, out)| Elements { lhs, rhs: weight, out });
        elements.into_iter().flat_map(|elements| CutKind::of_linear(extents, elements)).collect()
    }

    fn flops(kind: CutKind) -> f64 {
        2.0 * f64::from(kind.rows()) * f64::from(kind.n) * (f64::from(kind.depth) + f64::from(kind.rank))
    }

    fn depth(kind: CutKind) -> usize {
        kind.depth as usize
    }

    fn candidates(client: &ComputeClient<WgpuRuntime>, kind: CutKind) -> Vec<CutChoice> {
        // Only the gradient by a layer's input meets a weight of another type and may be rounded to it.
        let rounds = kind.layout == Layout::RowsColumns;
        let cuts = Device::of(client).cuts(kind.layout, kind.elements, [kind.m, kind.n], rounds);
        let burn = kind.suits_burn().then_some(CutChoice::Burn);
        cuts.into_iter().map(CutChoice::Own).chain(burn).collect()
    }

    fn scratch(client: &ComputeClient<WgpuRuntime>, device: &WgpuDevice, kind: CutKind) -> Scratch {
        Scratch::new(client, device, kind)
    }

    fn launch(scratch: &Scratch, choice: CutChoice, zeros: Option<Floats>) -> Option<Floats> {
        Some(scratch.run(choice, zeros))
    }

    fn zeros(scratch: &Scratch) -> Floats {
        scratch.zeros()
    }
}
