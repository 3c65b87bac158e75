//! How the attention kernels cut their work, and the two products that every one of them is made of: of the lines that a workgroup
//! owns with those of a step of its walk, and of weights with the latter, both by whichever units the tile names. The third, of weights
//! with the owned lines, registers alone have.

use burn::cubecl;
use burn::cubecl::prelude::*;

use super::lines::{Block, Lines, Quad};
use super::matrices::{MatrixRoom, MatrixSums};
use super::registers::{RegisterRoom, RegisterSums};

/// What multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Units {
    /// Every thread's own registers, in `f32`.
    Registers {
        /// Quads of the walked lines that are staged in workgroup memory at a time.
        stage: usize,
    },
    /// The same on a software adapter: nothing is staged, and of what the threads of a plane all need each reads a part, and hands it to
    /// the others.
    Lanes {
        /// Threads of a plane; 1 where they cannot hand on anything.
        lanes: usize,
    },
    /// Matrix units, on operands of the tensors' 16-bit type, with `f32` sums.
    Matrices {
        /// Rows, columns and depth of one of their matrices.
        side: usize,
    },
    /// `attention_mma.cu`, whose kernels stand for themselves.
    Mma(MmaUnit),
}

/// What has one of the products of `attention_mma.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MmaUnit {
    /// A warp, by `mma`.
    Warp,
    /// The four warps of a workgroup together, by `wgmma`.
    Warpgroup,
}

/// How a workgroup's part of the scores is cut. All numbers are powers of two, and `columns` is at least four. For [`Units::Lanes`]
/// `lines` is at least four too, a plane's threads have the same owned lines, and the walked lines are as many as the owned ones or more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Threads along the lines that the workgroup owns.
    pub threads_m: usize,
    /// Threads along the lines that it walks over, and along `head_dim`.
    pub threads_n: usize,
    /// Owned lines of a thread.
    pub lines: usize,
    /// Walked lines of a thread.
    pub columns: usize,
    /// What multiplies. A plane of threads has its own `side` lines of the block.
    pub units: Units,
}

impl Tile {
    /// Lines that a workgroup owns.
    pub const fn block_m(&self) -> usize {
        self.threads_m * self.lines
    }

    /// Lines of one step of its walk.
    pub const fn block_n(&self) -> usize {
        self.threads_n * self.columns
    }

    /// Threads that share a line where each line is read once: on a GPU neighbours read what lies side by side, a software adapter's lanes
    /// a line each.
    pub(super) const fn line_threads(&self) -> usize {
        if self.is_software() { 1 } else { 8 }
    }

    /// Whether it is for a software adapter.
    pub(super) const fn is_software(&self) -> bool {
        matches!(self.units, Units::Lanes { .. })
    }
}

/// What a kernel is compiled for besides the tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Form {
    /// Quads of a line.
    pub(super) quads: usize,
    /// Query heads of one key head that share a tile, a power of two.
    pub(super) heads: usize,
}

/// A thread's place along the owned lines. Threads are numbered in one dimension, along which software adapters fill their vectors.
#[cube]
pub(super) fn thread_m(#[comptime] tile: Tile) -> usize {
    UNIT_POS as usize / tile.threads_n
}

/// A thread's place along the walked lines.
#[cube]
pub(super) fn thread_n(#[comptime] tile: Tile) -> usize {
    UNIT_POS as usize % tile.threads_n
}

/// The walked line of a step that is a thread's column `j`. Neighbours have neighbouring lines.
#[cube]
pub(super) fn column(thread_n: usize, j: usize, #[comptime] tile: Tile) -> usize {
    thread_n + j * tile.threads_n
}

/// What a workgroup multiplies with.
#[expect(dead_code, reason = "what is made are variants of the type that the derive expands to")]
#[derive(CubeType)]
pub(super) enum Room<F: Float> {
    Registers(RegisterRoom),
    Matrices(MatrixRoom<F>),
}

/// The sums of a workgroup's owned lines, `[block_m, head_dim]`, as its units hold them.
#[expect(dead_code, reason = "what is made are variants of the type that the derive expands to")]
#[derive(CubeType)]
pub(super) enum Sums {
    Registers(RegisterSums),
    Matrices(MatrixSums),
}

#[cube]
impl<F: Float> Room<F> {
    /// Room for products with the lines of `n_owned` tensors.
    pub(super) fn new(#[comptime] n_owned: usize, #[comptime] form: Form, #[comptime] tile: Tile) -> Room<F> {
        match comptime!(tile.units) {
            Units::Registers { .. } | Units::Lanes { .. } => {
                Room::new_Registers(RegisterRoom::new(form, tile))
            }
            Units::Matrices { side } => Room::new_Matrices(MatrixRoom::<F>::new(n_owned, side, form, tile)),
            Units::Mma(_) => unreachable!(),
        }
    }

    /// Sums of nothing.
    pub(super) fn zeros(&self) -> Sums {
        match self {
            Room::Registers(room) => Sums::new_Registers(room.zeros()),
            Room::Matrices(room) => Sums::new_Matrices(room.zeros()),
        }
    }

    /// Takes in the owned lines of the tensor that [`Self::products`] calls `slot`.
    pub(super) fn own(&mut self, #[comptime] slot: usize, owned: &Block<F>) {
        match self {
            Room::Registers(_) => {}
            Room::Matrices(room) => room.own(slot, owned),
        }
    }

    /// Takes in a step's lines, with which the next products are.
    pub(super) fn walk(&mut self, walked: &Block<F>) {
        match self {
            Room::Registers(_) => {}
            Room::Matrices(room) => room.walk(walked),
        }
    }

    /// A thread's products of owned lines, those of `slot`, with walked ones, `[lines, columns]`.
    pub(super) fn products(
        &mut self,
        #[comptime] slot: usize,
        owned: &Block<F>,
        walked: &Block<F>,
    ) -> Array<f32> {
        match self {
            Room::Registers(room) => room.products::<F>(owned, walked),
            Room::Matrices(room) => room.products(slot),
        }
    }

    /// Puts a thread's `[lines, columns]` where [`Self::accumulate`] finds them.
    pub(super) fn share(&mut self, values: &Array<f32>) {
        match self {
            Room::Registers(room) => room.share(values),
            Room::Matrices(room) => room.share(values),
        }
    }

    /// Adds the shared weights' sums of walked lines.
    pub(super) fn accumulate(&self, walked: &Block<F>, sums: &mut Sums) {
        match (self, sums) {
            (Room::Registers(room), Sums::Registers(sums)) => room.accumulate::<F>(walked, sums),
            (Room::Matrices(room), Sums::Matrices(sums)) => room.accumulate(sums),
            _ => unreachable!(),
        }
    }

    /// What a line's weights are relative to in a step, by what they were relative to before and by the largest score since. May be
    /// less than the latter, where rescaling is dear.
    pub(super) fn maximum(&mut self, before: f32, largest: f32, step: u32) -> f32 {
        match self {
            Room::Registers(_) => largest,
            Room::Matrices(room) => room.maximum(before, largest, step),
        }
    }

    /// Multiplies the sums of a thread's lines by what follows from the step's maxima.
    pub(super) fn rescale(&mut self, sums: &mut Sums, factors: &Array<f32>, step: u32) {
        match (self, sums) {
            (Room::Registers(room), Sums::Registers(sums)) => room.rescale(sums, factors),
            (Room::Matrices(room), Sums::Matrices(sums)) => room.rescale(sums, factors, step),
            _ => unreachable!(),
        }
    }

    /// Writes the sums of a thread's lines, each times its line's factor.
    pub(super) fn store<O: Float>(
        &mut self,
        sums: &Sums,
        factors: &Array<f32>,
        out: &mut Array<Quad<O>>,
        lines: &Lines,
        first: usize,
    ) {
        match (self, sums) {
            (Room::Registers(room), Sums::Registers(sums)) => {
                room.store::<O>(sums, factors, out, lines, first);
            }
            (Room::Matrices(room), Sums::Matrices(sums)) => {
                room.store::<O>(sums, factors, out, lines, first);
            }
            _ => unreachable!(),
        }
    }
}
