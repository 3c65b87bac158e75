//! Devices on the adapter at hand, and what a driver's failure turns into.

use burn::tensor::{DType, Tensor};
use burn_wgpu::{Wgpu, WgpuDevice};
use orpo_wgpu::device::{self, DeviceChoice};
use serde_json::Value;

use crate::support::adapter;
use crate::workplace::{orpo_wgpu, stdout};

/// One test, since a failure on one thread is everybody's who computes on the device meanwhile.
#[test]
fn the_adapter_works_and_its_failures_are_errors() {
    if adapter().is_none() {
        return;
    }
    let choice = device::select("wgpu").unwrap().choice;
    let DeviceChoice::Wgpu { device, adapter } = &choice else { panic!("wgpu is {choice}") };
    assert!(!adapter.name.is_empty() && !adapter.driver.is_empty(), "{adapter:?}");
    assert!(adapter.memory_bytes.is_some_and(|bytes| bytes > 1 << 28), "{adapter:?}");
    // What WebGPU promises of every device.
    assert!(choice.shard_bytes() >= 128 << 20, "{adapter:?}");

    for dtype in [DType::F32, DType::F16] {
        device::self_test::<Wgpu>(device, &choice, dtype).unwrap();
    }
    assert!(choice.memory_bytes() > 0, "the self-test's tensors were somewhere");

    does_not_fit(&choice, device, adapter.shard_bytes() as usize);
    // burn starts a device on a thread of its own, which is where it panics.
    let absent = WgpuDevice::DiscreteGpu(77);
    let choice = DeviceChoice::Wgpu { device: absent.clone(), adapter: adapter.clone() };
    let error = device::self_test::<Wgpu>(&absent, &choice, DType::F32).unwrap_err().to_string();
    assert!(error.contains("self-test failed: No Discrete GPU device found"), "{error}");
}

/// A tensor that is larger than the device's largest fails, even where reading it succeeds.
fn does_not_fit(choice: &DeviceChoice, device: &WgpuDevice, shard_bytes: usize) {
    const COLUMNS: usize = 1 << 20;
    let n_rows = shard_bytes / (COLUMNS * size_of::<f32>()) + 1;
    let error = device::guard("a test", choice, || {
        let sum = Tensor::<Wgpu, 2>::zeros([n_rows, COLUMNS], device) + 1.0;
        // burn says Ok, and gives something else than 1.
        let _ = sum.slice([0..1, 0..1]).try_into_data();
        Ok(())
    })
    .unwrap_err();
    let message = error.to_string();
    for says in
        ["is out of memory in a test: a buffer of ", "as the device's largest has ", "; this run held "]
    {
        assert!(message.contains(says), "no `{says}` in {message}");
    }
    assert!(error.hint().unwrap().contains("--batch_size"), "a full device has its own hint");
}

#[test]
fn the_cpu_is_listed_as_well() {
    let devices = |flags: &[&str]| stdout(&orpo_wgpu(&["devices"]).args(flags).output().unwrap());
    let table = devices(&[]);
    assert!(table.lines().any(|line| line.starts_with(" cpu ") && line.contains("thread")), "{table}");
    let json: Value = serde_json::from_str(&devices(&["--json"])).unwrap();
    assert!(json["cpu"]["threads"].as_u64() > Some(0), "{json}");
}
