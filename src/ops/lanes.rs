//! Whether a device's threads can hand each other what they have read, without a word of memory: on a software adapter a load takes the
//! time of many products, and the threads of a plane often need the same.

use std::any::TypeId;
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use burn::cubecl;
use burn::cubecl::device::{Device, DeviceId};
use burn::cubecl::prelude::*;
use burn_cubecl::CubeRuntime;

/// How many threads every plane has, if all have as many and get right what they hand each other. CubeCL says of no software adapter that
/// they do, so that it is tried, once a process.
pub(super) fn lanes<R: CubeRuntime>(client: &ComputeClient<R>, device: &R::Device) -> Option<u32> {
    static TRIED: LazyLock<Mutex<HashMap<(TypeId, DeviceId), bool>>> = LazyLock::new(Mutex::default);
    let hardware = &client.properties().hardware;
    let lanes = hardware.plane_size_max;
    let is_fixed = hardware.plane_size_min == lanes && lanes.is_power_of_two();
    let key = (TypeId::of::<R>(), device.to_id());
    let is_right = || {
        *TRIED
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(key)
            .or_insert_with(|| try_shuffles(client, lanes))
    };
    (is_fixed && is_right()).then_some(lanes)
}

/// Whether every thread of two planes gets the number of every lane from it.
fn try_shuffles<R: CubeRuntime>(client: &ComputeClient<R>, lanes: u32) -> bool {
    let threads = 2 * lanes;
    let is_right = client.empty(threads as usize * size_of::<u32>());
    #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
    // SAFETY: there is an entry a thread.
    unsafe {
        shuffles::launch_unchecked::<R>(
            client,
            CubeCount::new_single(),
            CubeDim::new_1d(threads),
            ArrayArg::from_raw_parts(is_right.clone(), threads as usize),
            lanes,
        );
    }
    let read = client.read_one(is_right);
    read.is_ok_and(|bytes| bytemuck::cast_slice(&bytes).iter().all(|&right: &u32| right == 1))
}

#[cube(launch_unchecked)]
fn shuffles(is_right: &mut Array<u32>, #[comptime] lanes: u32) {
    let mut n_right = 0u32;
    #[unroll]
    for lane in 0..lanes {
        n_right += u32::cast_from(plane_shuffle(UNIT_POS_PLANE, lane) == lane);
    }
    is_right[UNIT_POS as usize] = u32::cast_from(n_right == lanes);
}
