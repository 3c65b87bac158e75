//! What the threads of a plane hand each other on a software adapter, where a load takes the time of many products: of the lines that
//! they all own each reads some, and has the others' by a shuffle.

use std::any::TypeId;
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use burn::cubecl;
use burn::cubecl::device::{Device, DeviceId};
use burn::cubecl::prelude::*;
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::lines::Quad;
use super::tile::{Tile, Units, thread_m};
use crate::ops::cube::empty;

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

/// How many threads every plane has, if all have as many and get right what they hand each other. CubeCL says of no software adapter that
/// they do, so that it is tried, once a process.
pub(super) fn lanes<R: CubeRuntime>(tensor: &CubeTensor<R>) -> Option<usize> {
    static TRIED: LazyLock<Mutex<HashMap<(TypeId, DeviceId), bool>>> = LazyLock::new(Mutex::default);
    let hardware = &tensor.client.properties().hardware;
    let lanes = hardware.plane_size_max as usize;
    let is_fixed = hardware.plane_size_min as usize == lanes && lanes.is_power_of_two();
    let key = (TypeId::of::<R>(), tensor.device.to_id());
    let is_right = || {
        *TRIED
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(key)
            .or_insert_with(|| try_shuffles(tensor, lanes))
    };
    (is_fixed && is_right()).then_some(lanes)
}

/// Whether every thread of two planes gets the number of every lane from it.
fn try_shuffles<R: CubeRuntime>(like: &CubeTensor<R>, lanes: usize) -> bool {
    let threads = 2 * lanes;
    let is_right = empty(like, Shape::from([threads]), DType::U32);
    #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
    // SAFETY: there is an entry a thread.
    unsafe {
        shuffles::launch_unchecked::<R>(
            &like.client,
            CubeCount::new_single(),
            CubeDim::new_1d(threads as u32),
            is_right.clone().into_array_arg(),
            lanes,
        );
    }
    let read = like.client.read_one(is_right.handle);
    read.is_ok_and(|bytes| bytemuck::cast_slice(&bytes).iter().all(|&right: &u32| right == 1))
}

#[cube(launch_unchecked)]
fn shuffles(is_right: &mut Array<u32>, #[comptime] lanes: usize) {
    let mut n_right = 0u32;
    #[unroll]
    for lane in 0..lanes {
        let lane = comptime!(lane as u32);
        n_right += u32::cast_from(plane_shuffle(UNIT_POS_PLANE, lane) == lane);
    }
    is_right[UNIT_POS as usize] = u32::cast_from(n_right == comptime!(lanes as u32));
}
