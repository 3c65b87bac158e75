//! What the threads of a plane hand each other on a software adapter, where a load takes the time of many products: of the lines that
//! they all own each reads some, and has the others' by a shuffle.

use burn::cubecl;
use burn::cubecl::prelude::*;

use super::lines::Quad;
use super::tile::{Tile, Units, thread_m};

/// Of how many of its owned lines a thread reads a quad.
pub(super) const fn n_read(tile: Tile) -> usize {
    match tile.units {
        Units::Lanes { lanes } => tile.lines.div_ceil(lanes),
        Units::Registers { .. } | Units::Matrices { .. } | Units::Mma(_) => tile.lines,
    }
}

/// The owned line of which a thread reads its quad number `i`.
#[cube]
pub(super) fn read_line(i: usize, #[comptime] tile: Tile) -> usize {
    let first = thread_m(tile) * tile.lines;
    match comptime!(tile.units) {
        Units::Lanes { lanes } => first + min(UNIT_POS_PLANE as usize + i * lanes, comptime!(tile.lines - 1)),
        _ => first + i,
    }
}

/// The quad of a thread's owned line `i`, by those that it and the others of its plane have read.
#[cube]
pub(super) fn line_quad(read: &Array<Quad<f32>>, #[comptime] i: usize, #[comptime] tile: Tile) -> Quad<f32> {
    match comptime!(tile.units) {
        // llvmpipe makes a broadcast a loop over the lanes, and a shuffle from one lane an instruction or two.
        Units::Lanes { lanes } => plane_shuffle(read[comptime!(i / lanes)], comptime!((i % lanes) as u32)),
        _ => read[i],
    }
}
