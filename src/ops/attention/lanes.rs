//! What the threads of a plane hand each other on a software adapter, where a load takes the time of many products: of the lines that
//! they all own each reads some, and has the others' by a shuffle.

use burn::cubecl;
use burn::cubecl::prelude::*;

use super::lines::Quad;
use super::tile::{Tile, Units, thread_m};

/// Of how many of a thread's lines it reads a quad itself.
pub(super) const fn n_read(tile: Tile) -> usize {
    tile.lines.div_ceil(lanes(tile))
}

/// How many threads share out the reading.
const fn lanes(tile: Tile) -> usize {
    match tile.units {
        Units::Lanes { lanes } => lanes,
        Units::Registers { .. } | Units::Matrices { .. } | Units::Mma(_) => 1,
    }
}

/// The line, of as many as a workgroup owns, of which a thread reads its quad number `i`.
#[cube]
pub(super) fn read_line(i: usize, #[comptime] tile: Tile) -> usize {
    let first = thread_m(tile) * tile.lines;
    match comptime!(lanes(tile)) {
        1 => first + i,
        lanes => first + min(UNIT_POS_PLANE as usize + i * lanes, comptime!(tile.lines - 1)),
    }
}

/// The quad of a thread's line `i`, by those that it and the others of its plane have read.
#[cube]
pub(super) fn line_quad(read: &Array<Quad<f32>>, #[comptime] i: usize, #[comptime] tile: Tile) -> Quad<f32> {
    match comptime!(lanes(tile)) {
        1 => read[i],
        // llvmpipe makes a broadcast a loop over the lanes, and a shuffle from one lane an instruction or two.
        lanes => plane_shuffle(read[comptime!(i / lanes)], comptime!((i % lanes) as u32)),
    }
}
