//! The recorder of launches: what it counts, and that it changes nothing.

use burn::tensor::Tensor;
use burn_wgpu::Wgpu;
use orpo_wgpu::ops::profile;
use orpo_wgpu::ops::swiglu::swiglu;

use super::tensors::bits;
use crate::support::adapter;

#[test]
fn launches_are_counted_and_come_out_the_same() {
    let Some(device) = adapter() else { return };
    let gate = Tensor::<Wgpu, 2>::full([130, 64], 0.75, &device);
    let run = || bits(swiglu(gate.clone(), gate.clone()));
    let client = gate.clone().into_primitive().tensor().client;
    let before = run();
    profile::start();
    let during = run();
    for _ in 0..3 {
        profile::kernel("three times", 5, 7, &client, || drop(gate.clone() * 2.0));
    }
    let entries = profile::finish();
    assert_eq!(during, before, "results under the recorder");

    // Other tests launch meanwhile.
    let entry = |name| entries.iter().find(|entry| entry.name == name).unwrap();
    let (three, op) = (entry("three times"), entry("swiglu forward"));
    assert_eq!((three.calls, three.flops, three.bytes), (3, 15, 21));
    assert!(op.calls >= 1 && op.bytes >= 3 * 4 * 130 * 64, "{op:?}");
    assert!(three.seconds > 0.0 && op.seconds > 0.0, "{entries:?}");
    assert!(entries.is_sorted_by(|a, b| a.seconds >= b.seconds), "{entries:?}");

    run();
    profile::kernel("three times", 5, 7, &client, || drop(gate.clone() * 2.0));
    let is_late = profile::finish().iter().any(|entry| entry.name == "three times");
    assert!(!is_late, "a launch was recorded after the end");
}
