//! What tuning times and installs for the products of an engine that has cubek's routines or warpgroups.

use std::time::Duration;

use burn::cubecl::Runtime;
use burn::tensor::{DType, Tensor, TensorData, TensorPrimitive};
use burn_cubecl::kernel::into_contiguous;
use burn_flex::Flex;
use orpo_wgpu::ops::engine::{Engine as _, Route, RouteKind, Routes, TILE_COLUMNS, WarpgroupProduct};
use orpo_wgpu::ops::tune::{self, LinearKind, Timing, Timings, Tunable, Verdict};

use super::lora_linear::{Case, F16, Input, compare};
use super::on::{Gpu, GpuDevice, GpuRuntime, adapter, stored_types};
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
    // Of stages that routines load in pairs there is one left over: of 16 entries forward, of 32 backward. Where warpgroups would make
    // the product, cubek's routines are for rows that these do not take.
    let has_choice = |shape| Engine::candidates(&device, kinds(shape)[0]).len() > 1;
    let shape = if has_choice([70, 80, 96, 8]) { [70, 80, 96, 8] } else { [70, 84, 100, 8] };
    let case = Case { shape, has_adapter: true, has_residual: false, input: Input::AddTo, types: F16 };
    let kinds = kinds(shape);
    let install = |choice, ms| {
        let timings: Timings<Engine> = kinds.iter().map(|&kind| Timing { kind, choice, ms }).collect();
        assert_eq!(tune::install::<Engine>(&device, &timings), kinds.len(), "{choice:?}");
    };
    let mut n_right = 0;
    for route in Engine::candidates(&device, kinds[0]) {
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
    // What warpgroups make is not timed; they take no rows of a multiple of four.
    let candidates = |kind| Engine::candidates(&device, kind);
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

/// Warpgroups' tiles of every width, with all that their kernel is compiled for.
#[test]
fn every_tile_of_warpgroups_multiplies() {
    let Some(device) = adapter() else { return };
    if GpuRuntime::warpgroup_processors(&GpuRuntime::client(&device)).is_none() {
        left_out("the device has no warpgroups that multiply");
        return;
    }
    for (dtype, error) in stored_types() {
        if dtype == DType::F32 {
            continue;
        }
        for is_turned in [false, true] {
            for columns in TILE_COLUMNS {
                for form in [
                    Form {
                        extents: [300, 520],
                        has_tail: false,
                        has_addend: false,
                        out: DType::F32,
                        splits: 1,
                    },
                    Form {
                        extents: [300, 520],
                        has_tail: false,
                        has_addend: false,
                        out: DType::F32,
                        splits: 3,
                    },
                    Form { extents: [3, 136], has_tail: true, has_addend: false, out: dtype, splits: 1 },
                    Form {
                        extents: [300, 520],
                        has_tail: true,
                        has_addend: true,
                        out: DType::F32,
                        splits: 1,
                    },
                    // More tiles than a GPU has processors, so that some make several.
                    Form { extents: [1100, 4360], has_tail: true, has_addend: true, out: dtype, splits: 1 },
                ] {
                    // Each is a kernel of its own; the types differ in two instructions.
                    if dtype == DType::F16 && form.has_addend == (form.out == DType::F32) {
                        continue;
                    }
                    let error = if form.out == DType::F32 { 1e-4 } else { error };
                    multiply(form, [dtype, form.out], is_turned, columns, error, &device);
                }
            }
        }
    }
}

/// What has to get a known product right before it is taken gets one right.
#[test]
fn warpgroups_pass_their_trial() {
    let Some(device) = adapter() else { return };
    let client = GpuRuntime::client(&device);
    if GpuRuntime::warpgroup_processors(&client).is_none() {
        left_out("the device has no warpgroups that multiply");
        return;
    }
    for kind in kinds([1534, 512, 768, 8]) {
        for columns in TILE_COLUMNS {
            let (sample, route) = (kind.sample_of_many_tiles(), Route::Warpgroups { columns });
            let scratch = Engine::scratch(&client, &device, sample);
            let is_right = tune::is_right::<Engine>(&scratch, sample, route).unwrap_or(false);
            assert!(is_right, "{sample:?}, {route:?}");
        }
    }
}

/// A product on warpgroups: `[m, n]`, and what belongs to it.
#[derive(Debug, Clone, Copy)]
struct Form {
    extents: [usize; 2],
    has_tail: bool,
    has_addend: bool,
    out: DType,
    splits: usize,
}

fn multiply(form: Form, dtypes: [DType; 2], is_turned: bool, columns: u32, error: f32, device: &GpuDevice) {
    let (Form { extents: [m, n], has_tail, has_addend, splits, .. }, [dtype, out_dtype]) = (form, dtypes);
    let [depth, tail] = [328, 64];
    let mut numbers = Numbers::new(21);
    let mut tensor = |shape, dtype| random::<Gpu, 2>(&mut numbers, shape, 1.0, dtype, device);
    let mut operands = |depth| {
        let left = tensor([m, depth], dtype);
        let right = if is_turned { tensor([n, depth], dtype).transpose() } else { tensor([depth, n], dtype) };
        [left, right]
    };
    let (frozen, tails) = (operands(depth), operands(tail));
    let mut want = on_cpu(&frozen[0]).matmul(on_cpu(&frozen[1]));
    if has_tail {
        want = want + on_cpu(&tails[0]).matmul(on_cpu(&tails[1]));
    }
    // Over the addend, or over what shows where nothing is written.
    let mut out = Tensor::<Gpu, 2>::full([splits * m, n], f32::NAN, device).cast(out_dtype);
    if has_addend {
        out = tensor([m, n], out_dtype);
        want = want + on_cpu(&out);
    }
    let out = into_contiguous(out.into_primitive().tensor());
    let [frozen, tails] = [frozen, tails].map(|pair| pair.map(|operand| operand.into_primitive().tensor()));
    let product = WarpgroupProduct {
        left: &frozen[0],
        right: &frozen[1],
        tails: has_tail.then_some(&tails),
        out: &out,
        addend: has_addend.then_some(&out),
        splits,
    };
    let what = format!("{form:?}, {dtype:?}, right operand turned: {is_turned}, {columns} columns");
    GpuRuntime::warpgroup_product(columns, &product).expect(&what);
    let got = Tensor::<Gpu, 2>::from_primitive(TensorPrimitive::Float(out)).cast(DType::F32);
    let got = got.reshape([splits, m, n]).sum_dim(0).reshape([m, n]);
    assert_close(&values(got), &values(want), 10.0 * error, error, &what);
}

fn on_cpu(tensor: &Tensor<Gpu, 2>) -> Tensor<Flex, 2> {
    let data = TensorData::new(values(tensor.clone()), tensor.dims());
    Tensor::from_data(data, &Default::default())
}
