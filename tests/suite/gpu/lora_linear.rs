//! `lora_linear` on wgpu against the reference on the CPU under burn's autodiff: the output and every gradient.

use std::time::Duration;

use burn::cubecl::Runtime;
use burn::cubecl::features::MmaConfig;
use burn::cubecl::ir::{ElemType, FloatKind, StorageType};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, FloatDType, Tensor, TensorData, TensorPrimitive};
use burn_autodiff::Autodiff;
use burn_cubecl::tensor::CubeTensor;
use burn_flex::Flex;
use burn_wgpu::{Wgpu, WgpuDevice, WgpuRuntime};
use half::f16;
use orpo_wgpu::ops::Kernels;
use orpo_wgpu::ops::kernel::{self, BAND, Cut, Element, Elements, Layout, MatrixTile, Shader, Tile};
use orpo_wgpu::ops::lora_linear::{
    InputGrad, Lora, lora_linear, lora_linear_backward, lora_linear_reference,
};
use orpo_wgpu::ops::tune::{self, Choice, Kind, Timing};

use crate::support::{Numbers, adapter, assert_close, has_matrices};

/// Sums of up to 331 products of numbers around one, in another order than the reference's.
const ATOL: f32 = 1e-5;
const RTOL: f32 = 1e-4;
/// The last bit of an f16, and its last of a number around zero.
const ATOL_F16: f32 = 1e-5;
const RTOL_F16: f32 = 1e-3;
/// A prologue's operands rounded to f16, as matrices take them, and sums that go out as f16.
const ATOL_MATRICES: f32 = 2e-3;
const RTOL_MATRICES: f32 = 2e-3;

/// Tokens, in, out, rank.
const SHAPES: [[usize; 4]; 13] = [
    [1, 40, 72, 1],
    [1, 64, 256, 8],
    [7, 107, 331, 5],
    [7, 64, 40, 8],
    [65, 64, 256, 8],
    [65, 72, 40, 256],
    [65, 331, 64, 16],
    [130, 256, 64, 16],
    [130, 331, 107, 100],
    [65, 64, 107, 13],
    [130, 40, 107, 8],
    [130, 256, 256, 8],
    [1100, 24, 40, 4],
];

#[derive(Clone, Copy)]
struct Case {
    shape: [usize; 4],
    has_adapter: bool,
    has_residual: bool,
    input: Input,
    types: Types,
}

/// What the tensors hold; `out`: the residual, and what the gradient is added to.
#[derive(Debug, Clone, Copy)]
struct Types {
    x: DType,
    weight: DType,
    dy: DType,
    out: DType,
}

const F32: Types = Types { x: DType::F32, weight: DType::F32, dy: DType::F32, out: DType::F32 };
const F16: Types = Types { x: DType::F16, weight: DType::F16, dy: DType::F16, out: DType::F16 };

/// What the gradient by the input is to be.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Input {
    Skip,
    New,
    AddTo,
}

struct Outcome {
    y: Vec<f32>,
    y_dtype: DType,
    dx: Option<Vec<f32>>,
    dx_dtype: Option<DType>,
    da: Option<Vec<f32>>,
    db: Option<Vec<f32>>,
}

fn values<B: Backend>(tensor: Tensor<B, 2>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().to_vec().expect("the values are f32")
}

struct Inputs<B: Backend> {
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    lora: Lora<B>,
    residual: Tensor<B, 2>,
    dy: Tensor<B, 2>,
    sum: Tensor<B, 2>,
}

impl<B: Backend> Inputs<B> {
    /// Values that each tensor's type holds, whether the tensors have these types or are all `f32`.
    fn new(case: Case, is_f32: bool, device: &B::Device) -> Self {
        let Case { shape: [tokens, n_in, n_out, r], types, .. } = case;
        let mut numbers = Numbers::new(7);
        let mut typed = |rows: usize, columns: usize, size: f32, dtype: DType| {
            let mut values = numbers.vec(rows * columns, size);
            if dtype == DType::F16 {
                values.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32());
            }
            let tensor = Tensor::<B, 2>::from_data(TensorData::new(values, [rows, columns]), device);
            if is_f32 || dtype == DType::F32 { tensor } else { tensor.cast(FloatDType::F16) }
        };
        let root = |n: usize| 1.0 / (n as f32).sqrt();
        Self {
            x: typed(tokens, n_in, 1.0, types.x),
            weight: typed(n_out, n_in, root(n_in), types.weight),
            lora: Lora {
                a: typed(r, n_in, root(n_in), DType::F32),
                b: typed(n_out, r, root(r), DType::F32),
                scale: 1.7,
            },
            dy: typed(tokens, n_out, root(n_out), types.dy),
            residual: typed(tokens, n_out, 1.0, types.out),
            sum: typed(tokens, n_in, 1.0, types.out),
        }
    }
}

/// Forward and backward of the op from a random gradient by the output.
fn run<B: Kernels>(case: Case, device: &B::Device) -> Outcome {
    let Inputs { x, weight, lora, residual, dy, sum } = Inputs::<B>::new(case, false, device);
    let lora = case.has_adapter.then_some(&lora);
    let (y, s) = lora_linear(x.clone(), weight.clone(), lora, case.has_residual.then_some(residual));
    let input = match case.input {
        Input::Skip => InputGrad::Skip,
        Input::New => InputGrad::New,
        Input::AddTo => InputGrad::AddTo(sum),
    };
    let grads = lora_linear_backward(dy, x, weight, lora, s, input);
    let [da, db] = grads.lora.map_or([None, None], |lora| lora.map(Some));
    Outcome {
        y_dtype: y.dtype(),
        y: values(y),
        dx_dtype: grads.dx.as_ref().map(Tensor::dtype),
        dx: grads.dx.map(values),
        da: da.map(values),
        db: db.map(values),
    }
}

/// The same by burn's autodiff through the reference.
fn run_reference(case: Case) -> Outcome {
    type B = Autodiff<Flex>;
    let Inputs { x, weight, lora, residual, dy, sum } = Inputs::<B>::new(case, true, &Default::default());
    let x = x.require_grad();
    let lora = Lora { a: lora.a.require_grad(), b: lora.b.require_grad(), scale: lora.scale };
    let adapter = case.has_adapter.then_some(&lora);
    let y = lora_linear_reference(x.clone(), weight, adapter, case.has_residual.then_some(residual));
    let grads = (y.clone() * dy).sum().backward();
    let dx = x.grad(&grads).map(|dx| if case.input == Input::AddTo { sum.inner() + dx } else { dx });
    Outcome {
        y_dtype: if case.has_residual { case.types.out } else { case.types.x },
        y: values(y.inner()),
        dx_dtype: match case.input {
            Input::Skip => None,
            Input::New => Some(case.types.x),
            Input::AddTo => Some(case.types.out),
        },
        dx: dx.filter(|_| case.input != Input::Skip).map(values),
        da: lora.a.grad(&grads).map(values),
        db: lora.b.grad(&grads).map(values),
    }
}

fn compare(case: Case, device: &WgpuDevice) {
    let got = run::<Wgpu>(case, device);
    let want = run_reference(case);
    let gradients = [
        ("dx", got.dx, want.dx, want.dx_dtype.unwrap_or(DType::F32)),
        ("da", got.da, want.da, DType::F32),
        ("db", got.db, want.db, DType::F32),
    ];
    let Case { shape, has_adapter, has_residual, input, types } = case;
    let name =
        format!("{shape:?}, adapter {has_adapter}, residual {has_residual}, input {input:?}, {types:?}");
    assert_eq!(got.y_dtype, want.y_dtype, "{name}: type of y");
    assert_eq!(got.dx_dtype, want.dx_dtype, "{name}: type of dx");
    // Matrices take weights in f16, and round what else is in f32: activations, and the prologue's operands.
    let has_matrices = types.weight == DType::F16 && !matrix_sizes(device).is_empty();
    let rounds = |which: &str| match which {
        "y" => has_matrices && has_adapter && types.x == DType::F16,
        "dx" => has_matrices && (has_adapter || types.dy == DType::F32),
        _ => false,
    };
    let close = |got: &[f32], want: &[f32], which: &str, dtype: DType, what: &str| {
        let (atol, rtol) = match dtype {
            _ if rounds(which) => (ATOL_MATRICES, RTOL_MATRICES),
            DType::F16 => (ATOL_F16, RTOL_F16),
            _ => (ATOL, RTOL),
        };
        assert_close(got, want, atol, rtol, what);
    };
    close(&got.y, &want.y, "y", want.y_dtype, &format!("{name}: y"));
    for (which, got, want, dtype) in gradients {
        let what = format!("{name}: {which}");
        assert_eq!(got.is_some(), want.is_some(), "{what} is there on one side only");
        if let (Some(got), Some(want)) = (got, want) {
            assert!(want.iter().any(|v| v.abs() > 100.0 * ATOL), "{what} is too small to compare");
            close(&got, &want, which, dtype, &what);
        }
    }
}

#[test]
fn with_an_adapter() {
    let Some(device) = adapter() else { return };
    for shape in SHAPES {
        for (input, has_residual) in [(Input::Skip, false), (Input::New, true), (Input::AddTo, false)] {
            compare(Case { shape, has_adapter: true, has_residual, input, types: F32 }, &device);
        }
    }
}

#[test]
fn without_an_adapter() {
    let Some(device) = adapter() else { return };
    for shape in SHAPES {
        for (input, has_residual) in [(Input::Skip, true), (Input::New, false), (Input::AddTo, true)] {
            compare(Case { shape, has_adapter: false, has_residual, input, types: F32 }, &device);
        }
    }
}

/// Activations, weights and sums of either type: the mixes of a model's layers, and those that no layer has.
#[test]
fn with_16_bit_floats() {
    let Some(device) = adapter() else { return };
    let mixes = [
        F16,
        Types { out: DType::F32, ..F16 },
        Types { weight: DType::F16, ..F32 },
        Types { weight: DType::F32, ..F16 },
        Types { dy: DType::F32, ..F16 },
        Types { out: DType::F16, ..F32 },
    ];
    let shapes = [[7, 107, 331, 5], [65, 64, 256, 8], [130, 331, 107, 100], [1100, 24, 40, 4]];
    for shape in shapes {
        for (i, types) in mixes.into_iter().enumerate() {
            let (has_adapter, has_residual) = (i % 3 < 2, i % 2 == 1);
            let input = if has_residual { Input::AddTo } else { Input::New };
            compare(Case { shape, has_adapter, has_residual, input, types }, &device);
        }
    }
}

/// Weights in f16 on an adapter with matrix units; what comes in as f32 is rounded on its way where the op lets it.
#[test]
fn on_matrices() {
    let Some(device) = adapter() else { return };
    if !has_matrices(&matrix_sizes(&device)) {
        return;
    }
    for types in [F16, Types { out: DType::F32, ..F16 }, Types { dy: DType::F32, ..F16 }] {
        for (shape, input) in [([65, 64, 256, 8], Input::AddTo), ([7, 107, 331, 5], Input::New)] {
            compare(Case { shape, has_adapter: true, has_residual: true, input, types }, &device);
        }
    }
}

/// A residual that nobody else holds is written in its place; one that somebody does is not.
#[test]
fn a_residual_that_is_held_elsewhere_stays_as_it_is() {
    let Some(device) = adapter() else { return };
    for types in [F32, F16] {
        let case =
            Case { shape: [65, 64, 256, 8], has_adapter: true, has_residual: true, input: Input::New, types };
        let Inputs { x, weight, lora, residual, .. } = Inputs::<Wgpu>::new(case, false, &device);
        let before = residual.to_data();
        let (held, _) = lora_linear(x.clone(), weight.clone(), Some(&lora), Some(residual.clone()));
        let held = held.into_data();
        assert_eq!(residual.to_data(), before, "{types:?}");
        let (given, _) = lora_linear(x, weight, Some(&lora), Some(residual));
        assert_eq!(given.into_data(), held, "{types:?}");
    }
}

#[test]
fn from_tensors_that_are_not_contiguous() {
    let Some(device) = adapter() else { return };
    fn turned<B: Kernels>(device: &B::Device) -> Vec<f32> {
        let mut numbers = Numbers::new(3);
        let mut turned = |rows: usize, columns: usize| {
            let data = TensorData::new(numbers.vec(rows * columns, 0.2), [columns, rows]);
            Tensor::<B, 2>::from_data(data, device).transpose()
        };
        let (x, weight) = (turned(12, 40), turned(24, 40));
        let lora = Lora { a: turned(8, 40), b: turned(24, 8), scale: 0.5 };
        values(lora_linear(x, weight, Some(&lora), None).0)
    }
    let got = turned::<Wgpu>(&device);
    let want = turned::<Flex>(&Default::default());
    assert_close(&got, &want, ATOL, RTOL, "y");
}

#[test]
fn from_slices_of_other_tensors() {
    let Some(device) = adapter() else { return };
    fn sliced<B: Kernels>(device: &B::Device) -> Vec<f32> {
        let mut numbers = Numbers::new(4);
        let mut whole = |rows: usize| {
            let data = TensorData::new(numbers.vec(rows * 64, 0.2), [rows, 64]);
            Tensor::<B, 2>::from_data(data, device)
        };
        // Rows alone keep the buffer, at an offset; columns do not.
        let (x, weight) = (whole(30).slice([11..24, 0..64]), whole(40).slice([4..40, 0..64]));
        let lora =
            Lora { a: whole(12).slice([4..12, 0..64]), b: whole(36).slice([0..36, 8..16]), scale: 0.5 };
        values(lora_linear(x, weight, Some(&lora), None).0)
    }
    let got = sliced::<Wgpu>(&device);
    let want = sliced::<Flex>(&Default::default());
    assert_close(&got, &want, ATOL, RTOL, "y");
}

#[test]
fn the_same_input_gives_the_same_bits() {
    let Some(device) = adapter() else { return };
    let case = Case {
        shape: [130, 256, 64, 8],
        has_adapter: true,
        has_residual: true,
        input: Input::AddTo,
        types: F32,
    };
    let [first, second] = [(); 2].map(|()| run::<Wgpu>(case, &device));
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    for (a, b) in [(first.y, second.y), (first.dx.unwrap(), second.dx.unwrap())] {
        assert_eq!(bits(&a), bits(&b));
    }
    for (a, b) in [(first.da.unwrap(), second.da.unwrap()), (first.db.unwrap(), second.db.unwrap())] {
        assert_eq!(bits(&a), bits(&b));
    }
}

/// One product of one variant, in two splits of the depth where it has no prologue.
fn product(shader: Shader, [m, n, depth, rank]: [usize; 4], device: &WgpuDevice) -> (Vec<f32>, Vec<f32>) {
    let Shader::Product { layout, cut, elements, .. } = shader else { panic!("{shader:?} is no product") };
    let [block_m, block_n, block_k] = cut.block();
    let mut numbers = Numbers::new(11);
    let mut operand = |lines: usize, depth: usize, is_rows: bool, element: Element| {
        let mut values = numbers.vec(lines * depth, 1.0 / (depth as f32).sqrt());
        let shape = if is_rows { [lines, depth] } else { [depth, lines] };
        let mut tensor = Tensor::<Wgpu, 2>::from_data(TensorData::new(values.clone(), shape), device);
        if element == Element::F16 {
            values.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32());
            tensor = tensor.cast(FloatDType::F16);
        }
        let at = move |line: usize, k: usize| {
            f64::from(if is_rows { values[line * depth + k] } else { values[k * lines + line] })
        };
        let TensorPrimitive::Float(primitive) = tensor.into_primitive() else { unreachable!() };
        (primitive, at)
    };
    let (lhs_rows, rhs_rows) = (layout != Layout::ColumnsColumns, layout == Layout::RowsRows);
    let (lhs, lhs_at) = operand(m, depth, lhs_rows, elements.lhs);
    let (rhs, rhs_at) = operand(n, depth, rhs_rows, elements.rhs);
    let (prologue_lhs, prologue_lhs_at) = operand(m, rank.max(4), lhs_rows, Element::F32);
    let (prologue_rhs, prologue_rhs_at) = operand(n, rank.max(4), rhs_rows, Element::F32);
    let (prologue_scale, scale) = (1.5f32, -0.75f32);
    let has_prologue = rank > 0;
    // Parts of a product are f32, whatever their sum goes out as.
    let splits = if has_prologue || elements.out == Element::F16 { 1 } else { 2 };
    let span = depth.div_ceil(splits).next_multiple_of(block_k as usize);
    let out = Tensor::<Wgpu, 2>::full([splits * m, n], f32::NAN, device);
    let out = if elements.out == Element::F16 { out.cast(FloatDType::F16) } else { out };
    let out: CubeTensor<WgpuRuntime> = match out.into_primitive() {
        TensorPrimitive::Float(primitive) => primitive,
        TensorPrimitive::QFloat(_) => unreachable!(),
    };
    let words = [m, n, depth, rank, span].map(|v| v as u32);
    let [p, s] = [prologue_scale, scale].map(f32::to_bits);
    kernel::launch(
        &lhs.client.clone(),
        shader,
        [BAND * (n as u32).div_ceil(block_n), (m as u32).div_ceil(block_m).div_ceil(BAND), splits as u32],
        &[&lhs.handle, &rhs.handle, &prologue_lhs.handle, &prologue_rhs.handle, &out.handle, &out.handle],
        &[words[0], words[1], words[2], words[3], words[4], p, s, 0],
    );
    let parts = Tensor::<Wgpu, 2>::from_primitive(TensorPrimitive::Float(out)).into_data();
    let parts: Vec<f32> = parts.convert::<f32>().to_vec().expect("the values are f32");
    let got = (0..m * n).map(|i| (0..splits).map(|z| parts[z * m * n + i]).sum()).collect();
    let entry = |i: usize| {
        let (row, column) = (i / n, i % n);
        let main: f64 = (0..depth).map(|k| lhs_at(row, k) * rhs_at(column, k)).sum();
        let prologue: f64 = (0..rank).map(|k| prologue_lhs_at(row, k) * prologue_rhs_at(column, k)).sum();
        (f64::from(scale) * (main + f64::from(prologue_scale) * prologue)) as f32
    };
    (got, (0..m * n).map(entry).collect())
}

/// A launch takes the variants that suit its device, so that a software adapter would never see those meant for GPUs.
#[test]
fn every_variant_multiplies() {
    let Some(device) = adapter() else { return };
    // What is read and written is one line of the source each, so that no tile has to meet every mix. Every other one is plain f32,
    // and the mixes' number is no divisor of the cuts', so that each layout pairs them otherwise.
    let mut mixes = Elements::all()
        .flat_map(|elements| [Elements::F32, elements])
        .skip(2)
        .collect::<Vec<_>>()
        .into_iter()
        .cycle();
    for layout in Layout::ALL {
        for tile in Tile::GPU.into_iter().chain(Tile::SOFTWARE) {
            let (m, n) = (tile.block_m as usize, tile.block_n as usize);
            let (aligned, ragged) = ([m + 4, n + 4, 44, 8], [m + 3, n - 3, 37, 5]);
            for (is_vec4, [m, n, depth, rank]) in [(true, aligned), (false, ragged)] {
                let elements = mixes.next().expect("it goes round");
                for rank in [0, rank] {
                    let is_f16 = elements.out == Element::F16;
                    let (atol, rtol) = if is_f16 { (ATOL_F16, RTOL_F16) } else { (ATOL, RTOL) };
                    let shader = Shader::Product { layout, cut: Cut::Registers(tile), elements, is_vec4 };
                    let (got, want) = product(shader, [m, n, depth, rank], &device);
                    assert_close(&got, &want, atol, rtol, &format!("{shader:?}, rank {rank}"));
                }
            }
        }
    }
}

/// The matrix sizes that the device has, with f16 operands and f32 sums.
fn matrix_sizes(device: &WgpuDevice) -> Vec<u32> {
    let [f16, f32] = [FloatKind::F16, FloatKind::F32].map(|kind| StorageType::from(ElemType::Float(kind)));
    let client = WgpuRuntime::client(device);
    let shapes = &client.properties().features.matmul.cmma;
    let has = |shape: &MmaConfig, n| (shape.m, shape.n, shape.k) == (n, n, n);
    let fits = |shape: &MmaConfig| shape.a_type == f16 && shape.b_type == f16 && shape.cd_type == f32;
    let sizes = MatrixTile::SIZES.into_iter();
    sizes.filter(|&n| shapes.iter().any(|shape| fits(shape) && has(shape, n))).collect()
}

/// Only of sizes that the device lists: others run on some without complaint, and wrongly.
#[test]
fn every_matrix_variant_multiplies() {
    let Some(device) = adapter() else { return };
    let sizes = matrix_sizes(&device);
    if !has_matrices(&sizes) {
        return;
    }
    for size in sizes {
        // Two lanes are fewer than any subgroup has, so that one subgroup has to take several patches.
        for (layout, lanes) in [(Layout::RowsRows, 8), (Layout::RowsColumns, 32), (Layout::RowsRows, 2)] {
            // A software adapter's driver takes long over the larger ones.
            let n_tiles = if lanes == 8 { usize::MAX } else { 1 };
            for tile in MatrixTile::all(size, lanes).rev().take(n_tiles) {
                let (m, n) = (tile.block_m as usize, tile.block_n as usize);
                let (aligned, ragged) = ([m + 4, n + 4, 44, 8], [m + 3, n - 3, 37, 5]);
                for (is_vec4, [m, n, depth, rank]) in [(true, aligned), (false, ragged)] {
                    let out = if is_vec4 { Element::F32 } else { Element::F16 };
                    let elements = Elements {
                        lhs: if is_vec4 { Element::F16 } else { Element::F32 },
                        rhs: Element::F16,
                        out,
                    };
                    let shader = Shader::Product { layout, cut: Cut::Matrices(tile), elements, is_vec4 };
                    for rank in [0, rank] {
                        let (got, want) = product(shader, [m, n, depth, rank], &device);
                        let what = format!("{shader:?}, rank {rank}");
                        assert_close(&got, &want, ATOL_MATRICES, RTOL_MATRICES, &what);
                    }
                }
            }
        }
    }
}

/// Whatever is installed for a kind of product, it comes out the same.
#[test]
fn a_tuned_product_is_right_whoever_makes_it() {
    let Some(device) = adapter() else { return };
    // No other test has products of these sizes, whose choice holds for the whole process.
    let shape = [60, 68, 92, 8];
    let case = |types| Case { shape, has_adapter: true, has_residual: true, input: Input::AddTo, types };
    let install = |elements, choice| {
        let kinds = Kind::of_linear(shape.map(|n| n as u32), elements);
        tune::install(&device, &kinds.map(|kind| Timing { kind, choice, ms: 1.0 }));
    };
    let tiles = Tile::GPU.into_iter().chain(Tile::SOFTWARE).map(Cut::Registers).map(Choice::Own);
    // What the device would never try is not installed.
    for choice in tiles.chain([Choice::Burn]) {
        install(Elements::F32, choice);
        compare(case(F32), &device);
    }
}

#[test]
fn tuning_times_what_is_worth_it_once() {
    let Some(device) = adapter() else { return };
    let large = Kind::new(Layout::RowsRows, [256, 516, 520, 8], Elements::F32);
    let tiny = Kind::new(Layout::RowsRows, [16, 516, 520, 8], Elements::F32);
    let timings = tune::tune(&device, &[large, tiny, large], Duration::from_secs(30));
    assert_eq!(timings.iter().map(|timing| timing.kind).collect::<Vec<_>>(), [large]);
    assert!(timings[0].ms > 0.0 && timings[0].ms.is_finite(), "{timings:?}");
    let text = serde_json::to_string(&timings).unwrap();
    assert_eq!(serde_json::from_str::<Vec<Timing>>(&text).unwrap(), timings);
    assert_eq!(tune::tune(&device, &[large], Duration::from_secs(30)), []);
}

#[test]
fn tuning_without_time_times_nothing() {
    let Some(device) = adapter() else { return };
    let kind = Kind::new(Layout::RowsRows, [256, 532, 520, 8], Elements::F32);
    assert_eq!(tune::tune(&device, &[kind], Duration::ZERO), []);
}
