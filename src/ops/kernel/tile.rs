//! What the variants of the products differ in.

use burn::tensor::DType;
use serde::{Deserialize, Serialize};

/// Which index of an operand runs along its rows' memory, by operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Layout {
    /// `[m, depth] · [n, depth]ᵀ`
    RowsRows,
    /// `[m, depth] · [depth, n]`
    RowsColumns,
    /// `[depth, m]ᵀ · [depth, n]`
    ColumnsColumns,
}

impl Layout {
    /// Every layout.
    pub const ALL: [Self; 3] = [Self::RowsRows, Self::RowsColumns, Self::ColumnsColumns];

    /// Whether what the left and the right operand give to a row and to a column of the product are rows of theirs.
    pub fn are_rows(self) -> [bool; 2] {
        [self != Self::ColumnsColumns, self == Self::RowsRows]
    }
}

/// Which buffers of a product have lines of whole quads, and are read and written four entries at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Quads {
    /// The main product's left operand.
    pub main_lhs: bool,
    /// The main product's right operand.
    pub main_rhs: bool,
    /// The prologue's left operand.
    pub prologue_lhs: bool,
    /// The prologue's right operand.
    pub prologue_rhs: bool,
    /// The output, and what is added to it.
    pub out: bool,
}

impl Quads {
    /// Those of a product of these extents. Without a prologue, a rank of 0, its operands go by the output: products with and without one
    /// then share a variant.
    pub fn new(layout: Layout, [m, n, depth, rank]: [u32; 4]) -> Self {
        let [m, n, depth, r] = [m, n, depth, rank].map(|length| length % 4 == 0);
        let lengths = |depth: bool| match layout {
            Layout::RowsRows => [depth, depth],
            Layout::RowsColumns => [depth, n],
            Layout::ColumnsColumns => [m, n],
        };
        let ([main_lhs, main_rhs], [prologue_lhs, prologue_rhs]) =
            (lengths(depth), if rank == 0 { [n, n] } else { lengths(r) });
        Self { main_lhs, main_rhs, prologue_lhs, prologue_rhs, out: n }
    }

    /// Every mix that a layout's products have.
    pub fn all(layout: Layout) -> Vec<Self> {
        let mut all = Vec::new();
        for [m, n, depth] in (0..8u32).map(|i| [i & 1, i >> 1 & 1, i >> 2].map(|bit| 4 + bit)) {
            // No product of this layout has a prologue.
            let ranks = if layout == Layout::ColumnsColumns { &[0][..] } else { &[0, 4, 5] };
            for &rank in ranks {
                let quads = Self::new(layout, [m, n, depth, rank]);
                if !all.contains(&quads) {
                    all.push(quads);
                }
            }
        }
        all
    }
}

/// What a buffer holds. Every sum is `f32` all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Element {
    /// 32-bit floats
    F32,
    /// 16-bit floats
    F16,
}

impl From<DType> for Element {
    /// What a tensor of this type holds.
    ///
    /// # Panics
    /// Of a type that shaders do not read.
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            other => panic!("shaders read f32 and f16, not {other:?}"),
        }
    }
}

impl Element {
    /// Both.
    pub const ALL: [Self; 2] = [Self::F32, Self::F16];

    /// The tensors' name for it.
    pub(in crate::ops) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
        }
    }

    /// Its WGSL, as vectors of four where rows allow them.
    pub(super) fn wgsl(self, is_vec4: bool) -> String {
        let name = match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
        };
        if is_vec4 { format!("vec4<{name}>") } else { name.to_owned() }
    }
}

/// What the operands of a product hold; those of its prologue are always `f32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Elements {
    /// The left operand.
    pub lhs: Element,
    /// The right operand.
    pub rhs: Element,
    /// The output, and what is added to it.
    pub out: Element,
}

impl Elements {
    /// `f32` throughout.
    pub const F32: Self = Self { lhs: Element::F32, rhs: Element::F32, out: Element::F32 };

    /// Every mix.
    pub fn all() -> impl Iterator<Item = Self> + Clone {
        let pairs = Element::ALL.into_iter().flat_map(|lhs| Element::ALL.map(|rhs| (lhs, rhs)));
        pairs.flat_map(|(lhs, rhs)| Element::ALL.map(|out| Self { lhs, rhs, out }))
    }
}

/// How a product is cut on devices whose lanes have registers of their own, and on software adapters whose lanes cannot hand each other
/// anything: what a workgroup computes, and what a thread of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tile {
    /// Rows of the output that a workgroup computes.
    pub block_m: u32,
    /// Columns of the output that a workgroup computes.
    pub block_n: u32,
    /// Depth of one step.
    pub block_k: u32,
    /// Blocks of 4 x 4 that a thread computes, down the rows.
    pub quads_m: u32,
    /// Blocks of 4 x 4 that a thread computes, along the columns.
    pub quads_n: u32,
}

impl Tile {
    const fn new(block_m: u32, block_n: u32, block_k: u32, quads_m: u32, quads_n: u32) -> Self {
        Self { block_m, block_n, block_k, quads_m, quads_n }
    }

    /// 64 to 256 threads of at most 8 x 8 accumulators.
    pub const ALL: [Self; 7] = [
        Self::new(128, 128, 16, 2, 2),
        Self::new(64, 64, 16, 2, 2),
        Self::new(32, 64, 16, 1, 2),
        Self::new(128, 16, 16, 2, 1),
        Self::new(128, 8, 16, 1, 1),
        Self::new(16, 128, 16, 1, 2),
        Self::new(8, 128, 16, 1, 1),
    ];

    pub(super) fn tile_m(self) -> u32 {
        self.block_m / (4 * self.quads_m)
    }

    pub(super) fn tile_n(self) -> u32 {
        self.block_n / (4 * self.quads_n)
    }

    /// Items that a thread stages in a step, at most, of an operand with so many lines: four quads each where these are its rows, else one.
    pub(super) fn items(self, lines: u32, is_rows: bool) -> u32 {
        let items = lines * self.block_k / if is_rows { 16 } else { 4 };
        items.div_ceil(self.tile_m() * self.tile_n())
    }
}

/// How a product is cut on software adapters: the threads of a workgroup, which are in one dimension, and what each computes. In the
/// other dimension all have the same lines of an operand, of which a subgroup's threads read a part each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DirectTile {
    /// Threads down the rows of the output.
    pub threads_m: u32,
    /// Threads along its columns.
    pub threads_n: u32,
    /// Rows of a thread, a multiple of four.
    pub lines: u32,
    /// Columns of a thread, a multiple of four.
    pub columns: u32,
    /// Lanes of a subgroup, of which a workgroup is one or more.
    pub lanes: u32,
}

impl DirectTile {
    /// Lanes of software adapters' subgroups: the numbers in vectors of 128, 256 and 512 bits.
    pub const LANES: [u32; 3] = [4, 8, 16];

    /// Every cut for so many lanes, of at most 128 sums a thread: twice as many are a tenth faster, and take the driver twice as long to
    /// compile.
    pub fn all(lanes: u32) -> [Self; 5] {
        let threads = lanes.max(8);
        let across = |lines, columns| Self { threads_m: 1, threads_n: threads, lines, columns, lanes };
        let down = |lines, columns| Self { threads_m: threads, threads_n: 1, lines, columns, lanes };
        [across(16, 8), down(8, 16), across(8, 8), down(8, 8), across(4, 16)]
    }

    /// Whether the threads have the same lines of the left operand; else they have those of the right one.
    pub(super) fn shares_lhs(self) -> bool {
        self.threads_m == 1
    }

    /// Lines of a thread that the others have too, and those that it alone has.
    pub(super) fn shared_and_own(self) -> [u32; 2] {
        if self.shares_lhs() { [self.lines, self.columns] } else { [self.columns, self.lines] }
    }

    /// Quads that a thread reads of the lines that all have, for four entries of the depth.
    pub(super) fn reads(self) -> u32 {
        self.shared_and_own()[0].div_ceil(self.lanes)
    }

    /// Loads of a thread for four entries of the depth.
    pub(in crate::ops) fn loads(self) -> u32 {
        self.reads() + self.shared_and_own()[1]
    }

    /// Threads of a workgroup.
    pub(in crate::ops) fn threads(self) -> u32 {
        self.threads_m * self.threads_n
    }
}

/// How a product on cooperative matrices is cut: what a workgroup computes, and what a subgroup of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MatrixTile {
    /// Rows, columns and depth of a matrix of the device.
    pub size: u32,
    /// Rows of the output that a workgroup computes.
    pub block_m: u32,
    /// Columns of the output that a workgroup computes.
    pub block_n: u32,
    /// Depth of one step.
    pub block_k: u32,
    /// Rows of the output that a subgroup computes.
    pub patch_m: u32,
    /// Columns of the output that a subgroup computes.
    pub patch_n: u32,
    /// Lanes of a subgroup, as far as is known: any number is right for which a workgroup is whole subgroups, the true one is fastest.
    pub lanes: u32,
}

impl MatrixTile {
    /// The sizes that WGSL can name, the faster first.
    pub const SIZES: [u32; 2] = [16, 8];
    /// Numbers of lanes that variants are compiled for: software adapters, most devices, and AMD's.
    pub const LANES: [u32; 3] = [8, 32, 64];

    /// Every cut for one matrix size and one number of lanes: at most 16 matrices of sums a subgroup, and as many threads as every
    /// device has. The last four are within the 16 KiB of workgroup memory that every device has.
    pub fn all(size: u32, lanes: u32) -> impl DoubleEndedIterator<Item = Self> {
        let cuts = [
            (128, 256, 32, 64, 64),
            (128, 192, 32, 64, 48),
            (128, 128, 32, 64, 64),
            (128, 128, 32, 64, 32),
            (128, 128, 16, 64, 64),
            (128, 64, 16, 64, 32),
            (64, 64, 32, 32, 32),
            (32, 32, 32, 16, 16),
        ];
        let tiles = cuts.into_iter().map(move |(block_m, block_n, block_k, patch_m, patch_n)| Self {
            size,
            block_m,
            block_n,
            block_k,
            patch_m,
            patch_n,
            lanes,
        });
        tiles.filter(move |tile| tile.patch_m * tile.patch_n <= 16 * size * size && tile.threads() <= 256)
    }

    /// Quads of the left and of the right operand that a thread stages in a step.
    pub(super) fn items(self) -> [u32; 2] {
        [self.block_m, self.block_n].map(|lines| lines * self.block_k / 4 / self.threads())
    }

    /// Lines of so many entries of which sixteen threads stage quads at once, so that they are to be in banks of their own: a power of two
    /// that divides eight. One where the workgroup does not stage eight lines at once, or a whole line takes sixteen threads.
    pub(super) fn together(self, length: u32) -> u32 {
        let across = 1 << (length / 4).trailing_zeros();
        if (self.threads() / across).is_multiple_of(8) { (16 / across).max(1) } else { 1 }
    }

    /// Quads that a thread stores, at most, of a matrix of sums a patch.
    pub(super) fn store_items(self) -> u32 {
        (self.size * self.size / 4).div_ceil(self.lanes)
    }

    /// Bytes of workgroup memory: both operands in `f16`, in lines of two quads more than they have, and one matrix of sums a patch.
    pub fn shared_bytes(self) -> u32 {
        let lines = |n: u32, length: u32| 8 * n * (length / 4 + 2);
        let rhs = lines(self.block_n, self.block_k).max(lines(self.block_k, self.block_n));
        let patches = self.threads() / self.lanes;
        lines(self.block_m, self.block_k) + rhs + 4 * patches * self.size * self.size
    }

    /// Depth that is multiplied without a loop: all of a step, but with the eight lanes of a software adapter, whose compiler takes long
    /// for it and wins nothing.
    pub(super) fn turn(self) -> u32 {
        if self.lanes == Self::LANES[0] { self.size } else { self.block_k }
    }

    /// Threads of a workgroup.
    pub fn threads(self) -> u32 {
        self.block_m / self.patch_m * (self.block_n / self.patch_n) * self.lanes
    }
}

/// How a product is cut into blocks, and by that the shader that makes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Cut {
    /// `lora_linear.wgsl`
    Registers(Tile),
    /// `lora_linear_direct.wgsl`
    Direct(DirectTile),
    /// `lora_linear_matrix.wgsl`
    Matrices(MatrixTile),
}

impl Cut {
    /// Every cut that a launch can ask for.
    pub fn all() -> Vec<Self> {
        let sizes =
            MatrixTile::SIZES.into_iter().flat_map(|size| MatrixTile::LANES.map(|lanes| (size, lanes)));
        let matrices = sizes.flat_map(|(size, lanes)| MatrixTile::all(size, lanes).map(Self::Matrices));
        let direct = DirectTile::LANES.into_iter().flat_map(|lanes| DirectTile::all(lanes).map(Self::Direct));
        Tile::ALL.map(Self::Registers).into_iter().chain(direct).chain(matrices).collect()
    }

    /// `[m, n, depth]` of a workgroup's step.
    pub fn block(self) -> [u32; 3] {
        match self {
            Self::Registers(tile) => [tile.block_m, tile.block_n, tile.block_k],
            // Four entries of the depth make a step.
            Self::Direct(tile) => [tile.threads_m * tile.lines, tile.threads_n * tile.columns, 4],
            Self::Matrices(tile) => [tile.block_m, tile.block_n, tile.block_k],
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Sixteen threads store quads of 8 bytes at once where none of them is in the same of 32 banks as another one.
    fn banks(tile: MatrixTile, across: u32, together: u32, pitch: u32) {
        let line = |group: u32| group / 8 * 8 + group % together * (8 / together) + group % 8 / together;
        let places = (0..16.min(tile.threads()))
            .map(|thread| (line(thread / across) * pitch + thread % across) % 16)
            .collect::<HashSet<_>>();
        // Of fewer than eight lines at once there is no choice.
        if (tile.threads() / across).is_multiple_of(8) {
            assert_eq!(
                places.len(),
                16,
                "{tile:?}: {across} threads along a line, {together} lines together"
            );
        }
    }

    /// What the shader of software adapters takes for granted.
    #[test]
    fn threads_of_a_direct_tile_are_whole_subgroups_in_one_dimension() {
        for tile in DirectTile::LANES.into_iter().flat_map(DirectTile::all) {
            assert_eq!(tile.threads_m.min(tile.threads_n), 1, "{tile:?}");
            assert!(tile.threads().is_multiple_of(tile.lanes), "{tile:?}");
            assert!(tile.lines.is_multiple_of(4) && tile.columns.is_multiple_of(4), "{tile:?}");
        }
    }

    /// What the shader of matrices takes for granted where it stages an operand, in rows and in columns.
    #[test]
    fn the_threads_of_a_tile_share_its_lines_out() {
        let kinds =
            MatrixTile::SIZES.into_iter().flat_map(|size| MatrixTile::LANES.map(|lanes| (size, lanes)));
        for tile in kinds.flat_map(|(size, lanes)| MatrixTile::all(size, lanes)) {
            let MatrixTile { block_m, block_n, block_k, .. } = tile;
            assert!((block_k / 4).is_power_of_two(), "{tile:?}: threads along the left operand's lines");
            let [lhs, rhs] = tile.items();
            for (lines, length, items) in
                [(block_m, block_k, lhs), (block_n, block_k, rhs), (block_k, block_n, rhs)]
            {
                let quads = length / 4;
                let across = 1 << quads.trailing_zeros();
                assert_eq!(tile.threads() % across, 0, "{tile:?}: {across} threads along a line");
                let at_once = tile.threads() / across;
                assert_eq!(lines % at_once, 0, "{tile:?}: {at_once} of {lines} lines at once");
                let together = tile.together(length);
                assert_eq!(8 % together, 0, "{tile:?}: of each eight lines {together} together");
                assert!(
                    together == 1 || at_once % 8 == 0,
                    "{tile:?}: of {at_once} lines {together} together"
                );
                banks(tile, across, together, quads + 2);
                assert_eq!(items, lines / at_once * (quads / across), "{tile:?}: quads of a thread");
            }
        }
    }
}
