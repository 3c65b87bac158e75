//! What tuning times and installs for the products of an engine that has cubek's routines or warpgroups.

use std::time::Duration;

use burn::cubecl::Runtime;
use burn::tensor::DType;
use orpo_wgpu::ops::engine::{RouteKind, Routes};
use orpo_wgpu::ops::tune::{self, LinearKind, Timing, Timings, Tunable, Verdict};

use super::lora_linear::{Case, F16, Input, compare};
use super::on::{GpuRuntime, adapter};
use crate::gpu::product::matrix_sizes;
use crate::support::{has_matrices, left_out};

type Engine = Routes<GpuRuntime>;

fn kinds(shape: [usize; 4]) -> [RouteKind; 2] {
    let extents = shape.map(|n| n as u32);
    Engine::of_linear(LinearKind { extents, dtype: DType::F16, joins_stream: false, shares_input: true })
}

/// A route that passes the check of a known product is right on random numbers too, and one that does not is never taken. Where none
/// is right, registers make the product.
#[test]
fn a_product_is_right_whichever_route_makes_it() {
    let Some(device) = adapter() else { return };
    if !has_matrices(&matrix_sizes::<GpuRuntime>(&device)) {
        return;
    }
    let client = GpuRuntime::client(&device);
    // Of stages that routines load in pairs there is one left over: of 16 entries forward, of 32 backward.
    let shape = [70, 80, 96, 8];
    let case = Case { shape, has_adapter: true, has_residual: false, input: Input::AddTo, types: F16 };
    let kinds = kinds(shape);
    let install = |choice, ms| {
        let timings: Timings<Engine> = kinds.iter().map(|&kind| Timing { kind, choice, ms }).collect();
        assert_eq!(tune::install::<Engine>(&device, &timings), kinds.len(), "{choice:?}");
    };
    let mut n_right = 0;
    for route in Engine::candidates(&client, kinds[0]) {
        let is_right = kinds.iter().all(|&kind| {
            let scratch = Engine::scratch(&client, &device, kind);
            tune::is_right::<Engine>(&scratch, kind, route).unwrap_or(false)
        });
        if is_right {
            n_right += 1;
            install(route, Some(1.0));
            compare(case, &device);
        } else {
            left_out(&format!("{route:?} is not right here, and not taken"));
        }
        install(route, None);
    }
    assert!(n_right >= 3, "{n_right} routes are right");
    assert_eq!(tune::verdict::<Engine>(&device, kinds[0]), Verdict::NoneRight);
    compare(case, &device);
}

/// The first route can be taken wherever there are matrix units; software adapters compile some of the others for a minute.
#[test]
fn tuning_finds_a_route() {
    let Some(device) = adapter() else { return };
    if !has_matrices(&matrix_sizes::<GpuRuntime>(&device)) {
        return;
    }
    let kind = kinds([256, 512, 768, 8])[0];
    let mut timings: Timings<Engine> = Vec::new();
    tune::tune::<Engine>(&device, &[kind], Duration::from_secs(5), |timing| timings.push(timing));
    let first = Engine::candidates(&GpuRuntime::client(&device), kind)[0];
    assert_eq!((timings[0].kind, timings[0].choice), (kind, first));
    assert!(timings[0].ms.is_some_and(|ms| ms > 0.0), "{timings:?}");
    assert!(matches!(tune::verdict::<Engine>(&device, kind), Verdict::Fastest(_)));
    let text = serde_json::to_string(&timings).unwrap();
    let back: Timings<Engine> = serde_json::from_str(&text).unwrap();
    // serde_json may read the last bit of a time otherwise.
    assert_eq!((back[0].kind, back[0].choice), (timings[0].kind, timings[0].choice));
}
