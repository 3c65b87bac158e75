//! What tuning times and installs for the products of `lora_linear` on wgpu.

use std::time::Duration;

use orpo_wgpu::ops::kernel::{Cut, Elements, Layout};
use orpo_wgpu::ops::tune::{self, Choice, Cuts, Kind, Timing, Timings};

use super::lora_linear::{Case, F32, Input, compare};
use crate::support::adapter;

/// Whatever is installed for a kind of product, it comes out the same.
#[test]
fn a_tuned_product_is_right_whoever_makes_it() {
    let Some(device) = adapter() else { return };
    // No other test has products of these sizes, whose choice holds for the whole process.
    let shape = [60, 68, 92, 8];
    let case = |types| Case { shape, has_adapter: true, has_residual: true, input: Input::AddTo, types };
    let install = |elements, choice| {
        let kinds = Kind::of_linear(shape.map(|n| n as u32), elements);
        tune::install::<Cuts>(&device, &kinds.map(|kind| Timing { kind, choice, ms: 1.0 }))
    };
    let cuts = Cut::all().into_iter().filter(|cut| !matches!(cut, Cut::Matrices(_))).map(Choice::Own);
    // What the device would never try is not installed.
    let mut n_installed = 0;
    for choice in cuts.chain([Choice::Burn]) {
        if install(Elements::F32, choice) > 0 {
            n_installed += 1;
            compare(case(F32), &device);
        }
    }
    assert!(n_installed > 3, "{n_installed} ways to make the product");
}

#[test]
fn tuning_times_what_is_worth_it_once() {
    let Some(device) = adapter() else { return };
    let large = Kind::new(Layout::RowsRows, [256, 516, 520, 8], Elements::F32);
    let tiny = Kind::new(Layout::RowsRows, [16, 516, 520, 8], Elements::F32);
    let timings = tune::tune::<Cuts>(&device, &[large, tiny, large], Duration::from_secs(30));
    assert_eq!(timings.iter().map(|timing| timing.kind).collect::<Vec<_>>(), [large]);
    assert!(timings[0].ms > 0.0 && timings[0].ms.is_finite(), "{timings:?}");
    let text = serde_json::to_string(&timings).unwrap();
    let back: Timings<Cuts> = serde_json::from_str(&text).unwrap();
    // serde_json may read the last bit of a time otherwise.
    assert_eq!((back[0].kind, back[0].choice), (timings[0].kind, timings[0].choice));
    assert_eq!(tune::tune::<Cuts>(&device, &[large], Duration::from_secs(30)), []);
}

#[test]
fn tuning_without_time_times_nothing() {
    let Some(device) = adapter() else { return };
    let kind = Kind::new(Layout::RowsRows, [256, 532, 520, 8], Elements::F32);
    assert_eq!(tune::tune::<Cuts>(&device, &[kind], Duration::ZERO), []);
}
