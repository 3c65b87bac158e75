//! How many threads hand each other what they have read, without a word of memory: on a software adapter a load takes the time of many
//! products, and the threads of a plane often need the same.

use std::any::TypeId;
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use burn::cubecl::client::ComputeClient;
use burn::cubecl::device::{Device, DeviceId};

use super::engine::Engine;

/// Threads of a plane, if all planes have as many and shuffles between them come out right, which is tried once a process.
pub(super) fn shuffling_lanes<R: Engine>(client: &ComputeClient<R>, device: &R::Device) -> Option<u32> {
    static TRIED: LazyLock<Mutex<HashMap<(TypeId, DeviceId), bool>>> = LazyLock::new(Mutex::default);
    let tried = || TRIED.lock().unwrap_or_else(PoisonError::into_inner);
    let hardware = &client.properties().hardware;
    let lanes = hardware.plane_size_max;
    if hardware.plane_size_min != lanes || !lanes.is_power_of_two() || lanes < 4 {
        return None;
    }
    let key = (TypeId::of::<R>(), device.to_id());
    let known = tried().get(&key).copied();
    let is_right = known.unwrap_or_else(|| {
        let is_right = R::shuffles(client, lanes);
        tried().insert(key, is_right);
        is_right
    });
    is_right.then_some(lanes)
}
