//! What tuning times and installs for the products of an engine that has cubek's routines or warpgroups.

use std::time::Duration;

use burn::cubecl::Runtime;
use burn::tensor::{DType, Tensor, TensorData};
use burn_flex::Flex;
use orpo_wgpu::ops::engine::{Engine as _, RouteKind, Routes, TILE_COLUMNS, WarpgroupProduct};
use orpo_wgpu::ops::tune::{self, LinearKind, Timing, Timings, Tunable, Verdict};

use super::lora_linear::{Case, F16, Input, compare};
use super::on::{Gpu, GpuRuntime, adapter};
use crate::gpu::product::matrix_sizes;
use crate::gpu::tensors::{random, values};
use crate::support::{Numbers, assert_close, has_matrices, left_out};

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
    let n_routes = Engine::candidates(&client, kinds[0]).len();
    assert!(n_right >= n_routes.min(3), "{n_right} of {n_routes} routes are right");
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
    // Of what warpgroups make there is one way; they take no rows of a multiple of four.
    let candidates = |kind| Engine::candidates(&GpuRuntime::client(&device), kind);
    let kind = [[256, 512, 768, 8], [256, 516, 772, 8]].map(|shape| kinds(shape)[0]);
    let kind = kind.into_iter().find(|&kind| candidates(kind).len() > 1).expect("there are several ways");
    let mut timings: Timings<Engine> = Vec::new();
    tune::tune::<Engine>(&device, &[kind], Duration::from_secs(5), |timing| timings.push(timing));
    assert_eq!((timings[0].kind, timings[0].choice), (kind, candidates(kind)[0]));
    assert!(timings[0].ms.is_some_and(|ms| ms > 0.0), "{timings:?}");
    assert!(matches!(tune::verdict::<Engine>(&device, kind), Verdict::Fastest(_)));
    let text = serde_json::to_string(&timings).unwrap();
    let back: Timings<Engine> = serde_json::from_str(&text).unwrap();
    // serde_json may read the last bit of a time otherwise.
    assert_eq!((back[0].kind, back[0].choice), (timings[0].kind, timings[0].choice));
}

/// Warpgroups' tiles of every width, on operands that lie either way, in one sum and in parts of the depth.
#[test]
fn every_tile_of_warpgroups_multiplies() {
    let Some(device) = adapter() else { return };
    if GpuRuntime::warpgroup_processors(&GpuRuntime::client(&device)).is_none() {
        left_out("the device has no warpgroups that multiply");
        return;
    }
    let [m, n, depth] = [300, 520, 328];
    let mut numbers = Numbers::new(21);
    let left = random::<Gpu, 2>(&mut numbers, [m, depth], 1.0, DType::F16, &device);
    for columns in TILE_COLUMNS {
        for (is_turned, splits) in [(false, 1), (true, 1), (false, 3), (true, 3)] {
            let shape = if is_turned { [n, depth] } else { [depth, n] };
            let right = random::<Gpu, 2>(&mut numbers, shape, 1.0, DType::F16, &device);
            let right = if is_turned { right.transpose() } else { right };
            let want = on_cpu(&left).matmul(on_cpu(&right));
            // What is not written shows.
            let out = Tensor::<Gpu, 2>::full([splits * m, n], f32::NAN, &device);
            let [lhs, rhs, sums] = [&left, &right, &out].map(|t| t.clone().into_primitive().tensor());
            let product =
                WarpgroupProduct { left: &lhs, right: &rhs, tails: None, out: &sums, addend: None, splits };
            GpuRuntime::warpgroup_product(columns, &product).expect("there are warpgroups");
            let got = out.reshape([splits, m, n]).sum_dim(0).reshape([m, n]);
            let what = format!("{columns} columns, right operand turned: {is_turned}, {splits} splits");
            assert_close(&values(got), &values(want), 1e-4, 1e-4, &what);
        }
    }
}

fn on_cpu(tensor: &Tensor<Gpu, 2>) -> Tensor<Flex, 2> {
    let data = TensorData::new(values(tensor.clone()), tensor.dims());
    Tensor::from_data(data, &Default::default())
}
