//! What tuning times and installs for the products of `lora_linear` on wgpu, and the products that it takes for right.

use std::time::Duration;

use burn::cubecl::Runtime;
use burn::tensor::{Tensor, TensorData, TensorPrimitive};
use burn_wgpu::{WgpuDevice, WgpuRuntime};
use orpo_wgpu::ops::kernel::{Cut, Elements, Layout};
use orpo_wgpu::ops::tune::{self, MatrixEngine, Timing, Timings, Verdict};
use orpo_wgpu::ops::{CutChoice, CutKind, Cuts};

use super::lora_linear::{Case, F32, Input, compare};
use super::on::Gpu;
use crate::support::adapter;

fn install(device: &WgpuDevice, kinds: &[CutKind], choice: CutChoice, ms: Option<f64>) -> usize {
    let timings: Timings<Cuts> = kinds.iter().map(|&kind| Timing { kind, choice, ms }).collect();
    tune::install::<Cuts>(device, &timings)
}

fn candidates(device: &WgpuDevice, kind: CutKind) -> Vec<CutChoice> {
    Cuts::candidates(&WgpuRuntime::client(device), kind)
}

/// Whatever is fastest for a kind of product, or if nothing is right, it comes out the same.
#[test]
fn a_tuned_product_is_right_whoever_makes_it() {
    let Some(device) = adapter() else { return };
    // No other test has products of these sizes, whose choice holds for the whole process.
    let shape = [60, 68, 92, 8];
    let case = Case { shape, has_adapter: true, has_residual: true, input: Input::AddTo, types: F32 };
    let kinds = CutKind::of_linear(shape.map(|n| n as u32), Elements::F32);
    let cuts = Cut::all().into_iter().filter(|cut| !matches!(cut, Cut::Matrices(_))).map(CutChoice::Own);
    // What the device would never try is not installed.
    let mut n_installed = 0;
    for choice in cuts.chain([CutChoice::Burn]) {
        if install(&device, &kinds, choice, Some(1.0)) > 0 {
            n_installed += 1;
            compare(case, &device);
            install(&device, &kinds, choice, None);
        }
    }
    assert!(n_installed > 3, "{n_installed} ways to make the product");
    let verdicts = kinds.map(|kind| tune::verdict::<Cuts>(&device, kind));
    assert_eq!(verdicts, [Verdict::Wrong; 2]);
    compare(case, &device);
}

#[test]
fn tuning_times_what_is_worth_it_once() {
    let Some(device) = adapter() else { return };
    let large = CutKind::new(Layout::RowsRows, [256, 516, 520, 8], Elements::F32);
    let tiny = CutKind::new(Layout::RowsRows, [16, 516, 520, 8], Elements::F32);
    let tune = |kinds: &[CutKind]| tune::tune::<Cuts>(&device, kinds, Duration::from_secs(60));
    // A run that had no time for the others has timed one way.
    let [first, others @ ..] = &candidates(&device, large)[..] else { panic!("there are ways") };
    install(&device, &[large], *first, Some(1e9));
    let timings = tune(&[large, tiny, large]);
    assert!(timings.iter().all(|timing| timing.kind == large), "{timings:?}");
    assert_eq!(timings.iter().map(|timing| timing.choice).collect::<Vec<_>>(), others);
    assert!(timings.iter().all(|timing| timing.ms.is_some_and(|ms| ms > 0.0 && ms < 1e9)), "{timings:?}");
    let fastest = timings.iter().min_by(|a, b| a.ms.unwrap().total_cmp(&b.ms.unwrap())).unwrap();
    assert_eq!(tune::verdict::<Cuts>(&device, large), Verdict::Fastest(fastest.choice));
    assert_eq!(tune(&[large, tiny]), []);
}

#[test]
fn tuning_without_time_times_nothing() {
    let Some(device) = adapter() else { return };
    let kind = CutKind::new(Layout::RowsRows, [256, 532, 520, 8], Elements::F32);
    assert_eq!(tune::tune::<Cuts>(&device, &[kind], Duration::ZERO), []);
    assert_eq!(tune::verdict::<Cuts>(&device, kind), Verdict::Untried);
}

/// What a way can get wrong is seen, wherever it is in the output.
#[test]
fn a_wrong_product_is_seen() {
    let Some(device) = adapter() else { return };
    let client = WgpuRuntime::client(&device);
    let kind = CutKind::new(Layout::RowsRows, [1024, 68, 96, 0], Elements::F32);
    let scratch = Cuts::scratch(&client, &device, kind);
    let rule = candidates(&device, kind)[0];
    let product = Cuts::launch(&scratch, rule, None).expect("the rule makes every product");
    let product = Tensor::<Gpu, 2>::from_primitive(TensorPrimitive::Float(product)).into_data();
    let right: Vec<f32> = product.to_vec().unwrap();
    let [m, n] = [right.len() / 68, 68];
    let is_product = |values: &[f32], depth| {
        let data = TensorData::new(values.to_vec(), [values.len() / n, n]);
        let tensor = Tensor::<Gpu, 2>::from_data(data, &device).into_primitive().tensor();
        tune::is_product(&tensor, depth)
    };
    assert!(is_product(&right, 96));
    assert!(!is_product(&right, 95), "another depth");
    let wrong = |what: &str, change: &dyn Fn(&mut [f32])| {
        let mut values = right.clone();
        change(&mut values);
        assert!(!is_product(&values, 96), "{what}");
    };
    wrong("nothing is written", &|values| values.fill(0.0));
    wrong("the last row is not", &|values| values[(m - 1) * n..].fill(0.0));
    wrong("nor the last column", &|values| values.chunks_mut(n).for_each(|row| row[n - 1] = 0.0));
    for first in [0, 300, 512, m - 8] {
        wrong("a block is not", &|values| {
            values[first * n..(first + 8) * n].chunks_mut(n).for_each(|row| row[16..24].fill(0.0));
        });
        wrong("a block is turned", &|values| {
            for i in 0..8 {
                for j in 0..i {
                    values.swap((first + i) * n + 8 + j, (first + j) * n + 8 + i);
                }
            }
        });
        wrong("a sum is rounded", &|values| {
            values[first * n..(first + 8) * n].iter_mut().for_each(|sum| *sum += 1.0 / 16.0);
        });
        wrong("a sum is none", &|values| values[first * n..(first + 8) * n].fill(f32::NAN));
    }
    wrong("rows are one on", &|values| values.rotate_right(n));
    wrong("columns are one on", &|values| values.chunks_mut(n).for_each(|row| row.rotate_right(1)));
}
