//! What tuning times and installs for the products of `lora_linear` on wgpu, and the products that it takes for right.

use std::panic::catch_unwind;
use std::time::Duration;

use burn::cubecl::Runtime;
use burn::tensor::{DType, Tensor, TensorData, TensorPrimitive};
use burn_wgpu::{WgpuDevice, WgpuRuntime};
use orpo_wgpu::ops::kernel::{Cut, Elements, Layout};
use orpo_wgpu::ops::tune::{self, LinearKind, Timing, Timings, Tunable, Verdict};
use orpo_wgpu::ops::{CutChoice, CutKind, Cuts};

use super::lora_linear::{Case, F16, F32, Input, compare};
use super::on::Gpu;
use super::product::matrix_sizes;
use crate::support::adapter;

fn install(device: &WgpuDevice, kinds: &[CutKind], choice: CutChoice, ms: Option<f64>) -> usize {
    let timings: Timings<Cuts> = kinds.iter().map(|&kind| Timing { kind, choice, ms }).collect();
    tune::install::<Cuts>(device, &timings)
}

fn candidates(device: &WgpuDevice, kind: CutKind) -> Vec<CutChoice> {
    Cuts::candidates(device, kind)
}

fn tune(device: &WgpuDevice, kinds: &[CutKind], budget: Duration) -> Timings<Cuts> {
    let mut timings = Vec::new();
    tune::tune::<Cuts>(device, kinds, budget, |timing| timings.push(timing));
    timings
}

/// The forward product and the gradient by the input of a layer within a block, and of one that joins the stream.
fn kinds(shape: [usize; 4], dtype: DType) -> Vec<CutKind> {
    let linear = |joins_stream| LinearKind {
        extents: shape.map(|n| n as u32),
        dtype,
        joins_stream,
        shares_input: false,
    };
    [false, true].into_iter().flat_map(|joins_stream| Cuts::of_linear(linear(joins_stream))).collect()
}

/// Whatever is fastest for a kind of product, it comes out the same.
#[test]
fn a_tuned_product_is_right_whoever_makes_it() {
    let Some(device) = adapter() else { return };
    for (types, dtype, [tokens, n_in, n_out, rank]) in
        [(F32, DType::F32, [60, 68, 92, 8]), (F16, DType::F16, [60, 68, 100, 8])]
    {
        // No other test has products of these sizes, whose choice holds for the whole process.
        let shape = [tokens, n_in, n_out, rank];
        let cases = [(true, Input::New), (false, Input::AddTo)].map(|(has_residual, input)| Case {
            shape,
            has_adapter: true,
            has_residual,
            input,
            types,
        });
        let kinds = kinds(shape, dtype);
        let choices = Cut::all().into_iter().map(CutChoice::Own).chain([CutChoice::Cubek]);
        // What the device would never try is not installed.
        let mut n_installed = 0;
        for choice in choices {
            if install(&device, &kinds, choice, Some(1.0)) > 0 {
                n_installed += 1;
                cases.iter().for_each(|&case| compare(case, &device));
                install(&device, &kinds, choice, Some(2.0));
            }
        }
        assert!(n_installed > 3, "{n_installed} ways to make the product");
        // What is wrong is not taken by the rule either.
        let ways = candidates(&device, kinds[0]);
        for choice in ways.iter().filter(|choice| **choice != ways[1]) {
            install(&device, &kinds, *choice, None);
        }
        assert_eq!(tune::verdict::<Cuts>(&device, kinds[0]), Verdict::Fastest(ways[1]));
        install(&device, &kinds, ways[1], None);
        assert_eq!(tune::verdict::<Cuts>(&device, kinds[0]), Verdict::NoneRight);
        let outcome = catch_unwind(|| compare(cases[0], &device));
        assert!(outcome.is_err(), "a device that makes no product right makes no step");
    }
}

/// A way that comes out right on a product whose entries are known is timed, the adapter's part included.
#[test]
fn every_way_is_right_on_the_known_product() {
    let Some(device) = adapter() else { return };
    let client = WgpuRuntime::client(&device);
    let mut n_matrices = 0;
    for dtype in [DType::F32, DType::F16] {
        for kind in kinds([100, 136, 72, 8], dtype) {
            let scratch = Cuts::scratch(&client, &device, kind);
            for choice in candidates(&device, kind) {
                let is_right = tune::is_right::<Cuts>(&scratch, kind, choice);
                assert!(is_right.unwrap(), "{choice:?} of {kind:?}");
                n_matrices += usize::from(matches!(choice, CutChoice::Own(Cut::Matrices(_))));
            }
            let added = Cuts::launch(&scratch, candidates(&device, kind)[0], Some(Cuts::place(&scratch)));
            assert!(
                !tune::is_product(&added.unwrap(), Cuts::depth(kind), false).unwrap(),
                "what it is added to is seen in {kind:?}"
            );
            let without = CutKind { rank: 0, ..kind };
            let out = Cuts::launch(&scratch, candidates(&device, kind)[0], None).unwrap();
            assert!(
                !tune::is_product(&out, Cuts::depth(kind), true).unwrap(),
                "nor is it there unless added"
            );
            assert!(
                !tune::is_product(&out, Cuts::depth(without), false).unwrap(),
                "the adapter is seen in {kind:?}"
            );
        }
    }
    let has_matrices = !matrix_sizes::<WgpuRuntime>(&device).is_empty();
    assert_eq!(n_matrices > 0, has_matrices, "matrices are tried where there are some");
}

#[test]
fn tuning_times_what_is_worth_it_once() {
    let Some(device) = adapter() else { return };
    let large = CutKind::new(Layout::RowsRows, [256, 516, 520, 8], Elements::F32);
    let tiny = CutKind::new(Layout::RowsRows, [16, 516, 520, 8], Elements::F32);
    let tune = |kinds: &[CutKind]| tune(&device, kinds, Duration::from_secs(60));
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
    assert_eq!(tune(&device, &[kind], Duration::ZERO), []);
    assert_eq!(tune::verdict::<Cuts>(&device, kind), Verdict::Untried);
}

#[test]
fn what_was_not_timed_follows_what_has_a_few_more_rows() {
    let Some(device) = adapter() else { return };
    let kind = |rows| CutKind::new(Layout::RowsRows, [rows, 548, 520, 8], Elements::F32);
    let choice = candidates(&device, kind(256))[1];
    install(&device, &[kind(256)], choice, Some(1.0));
    for (rows, verdict) in [
        (256, Verdict::Fastest(choice)),
        (190, Verdict::Fastest(choice)),
        (97, Verdict::Fastest(choice)),
        (96, Verdict::Untried),
        (257, Verdict::Untried),
    ] {
        assert_eq!(tune::verdict::<Cuts>(&device, kind(rows)), verdict, "{rows} rows");
    }
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
        tune::is_product(&tensor, depth, false).unwrap()
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
