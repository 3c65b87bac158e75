//! `lora_linear` on wgpu against the reference on the CPU under burn's autodiff: the output and every gradient.

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData, TensorPrimitive};
use burn_autodiff::Autodiff;
use burn_cubecl::tensor::CubeTensor;
use burn_flex::Flex;
use burn_wgpu::{Wgpu, WgpuDevice, WgpuRuntime};
use orpo_wgpu::ops::Kernels;
use orpo_wgpu::ops::kernel::{self, BAND, Layout, Shader, Tile};
use orpo_wgpu::ops::lora_linear::{
    InputGrad, Lora, lora_linear, lora_linear_backward, lora_linear_reference,
};

use crate::support::{Numbers, adapter, assert_close};

/// Sums of up to 331 products of numbers around one, in another order than the reference's.
const ATOL: f32 = 1e-5;
const RTOL: f32 = 1e-4;

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
}

/// What the gradient by the input is to be.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Input {
    Skip,
    New,
    AddTo,
}

struct Outcome {
    y: Vec<f32>,
    dx: Option<Vec<f32>>,
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
    fn new([tokens, n_in, n_out, r]: [usize; 4], device: &B::Device) -> Self {
        let mut numbers = Numbers::new(7);
        let mut tensor = |rows: usize, columns: usize, size: f32| {
            let data = TensorData::new(numbers.vec(rows * columns, size), [rows, columns]);
            Tensor::<B, 2>::from_data(data, device)
        };
        let root = |n: usize| 1.0 / (n as f32).sqrt();
        Self {
            x: tensor(tokens, n_in, 1.0),
            weight: tensor(n_out, n_in, root(n_in)),
            lora: Lora { a: tensor(r, n_in, root(n_in)), b: tensor(n_out, r, root(r)), scale: 1.7 },
            dy: tensor(tokens, n_out, root(n_out)),
            residual: tensor(tokens, n_out, 1.0),
            sum: tensor(tokens, n_in, 1.0),
        }
    }
}

/// Forward and backward of the op from a random gradient by the output.
fn run<B: Kernels>(case: Case, device: &B::Device) -> Outcome {
    let Inputs { x, weight, lora, residual, dy, sum } = Inputs::<B>::new(case.shape, device);
    let lora = case.has_adapter.then_some(&lora);
    let (y, s) = lora_linear(x.clone(), weight.clone(), lora, case.has_residual.then_some(residual));
    let input = match case.input {
        Input::Skip => InputGrad::Skip,
        Input::New => InputGrad::New,
        Input::AddTo => InputGrad::AddTo(sum),
    };
    let grads = lora_linear_backward(dy, x, weight, lora, s, input);
    let [da, db] = grads.lora.map_or([None, None], |lora| lora.map(Some));
    Outcome { y: values(y), dx: grads.dx.map(values), da: da.map(values), db: db.map(values) }
}

/// The same by burn's autodiff through the reference.
fn run_reference(case: Case) -> Outcome {
    type B = Autodiff<Flex>;
    let Inputs { x, weight, lora, residual, dy, sum } = Inputs::<B>::new(case.shape, &Default::default());
    let x = x.require_grad();
    let lora = Lora { a: lora.a.require_grad(), b: lora.b.require_grad(), scale: lora.scale };
    let adapter = case.has_adapter.then_some(&lora);
    let y = lora_linear_reference(x.clone(), weight, adapter, case.has_residual.then_some(residual));
    let grads = (y.clone() * dy).sum().backward();
    let dx = x.grad(&grads).map(|dx| if case.input == Input::AddTo { sum.inner() + dx } else { dx });
    Outcome {
        y: values(y.inner()),
        dx: dx.filter(|_| case.input != Input::Skip).map(values),
        da: lora.a.grad(&grads).map(values),
        db: lora.b.grad(&grads).map(values),
    }
}

fn compare(case: Case, device: &WgpuDevice) {
    let got = run::<Wgpu>(case, device);
    let want = run_reference(case);
    let gradients = [("dx", got.dx, want.dx), ("da", got.da, want.da), ("db", got.db, want.db)];
    let Case { shape, has_adapter, has_residual, input } = case;
    let name = format!("{shape:?}, adapter {has_adapter}, residual {has_residual}, input {input:?}");
    assert_close(&got.y, &want.y, ATOL, RTOL, &format!("{name}: y"));
    for (which, got, want) in gradients {
        let what = format!("{name}: {which}");
        assert_eq!(got.is_some(), want.is_some(), "{what} is there on one side only");
        if let (Some(got), Some(want)) = (got, want) {
            assert!(want.iter().any(|v| v.abs() > 100.0 * ATOL), "{what} is too small to compare");
            assert_close(&got, &want, ATOL, RTOL, &what);
        }
    }
}

#[test]
fn with_an_adapter() {
    let Some(device) = adapter() else { return };
    for shape in SHAPES {
        for (input, has_residual) in [(Input::Skip, false), (Input::New, true), (Input::AddTo, false)] {
            compare(Case { shape, has_adapter: true, has_residual, input }, &device);
        }
    }
}

#[test]
fn without_an_adapter() {
    let Some(device) = adapter() else { return };
    for shape in SHAPES {
        for (input, has_residual) in [(Input::Skip, true), (Input::New, false), (Input::AddTo, true)] {
            compare(Case { shape, has_adapter: false, has_residual, input }, &device);
        }
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
    let case = Case { shape: [130, 256, 64, 8], has_adapter: true, has_residual: true, input: Input::AddTo };
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
    let Shader::Product { layout, tile, .. } = shader else { panic!("{shader:?} is no product") };
    let mut numbers = Numbers::new(11);
    let mut operand = |lines: usize, depth: usize, is_rows: bool| {
        let values = numbers.vec(lines * depth, 1.0 / (depth as f32).sqrt());
        let shape = if is_rows { [lines, depth] } else { [depth, lines] };
        let tensor = Tensor::<Wgpu, 2>::from_data(TensorData::new(values.clone(), shape), device);
        let at = move |line: usize, k: usize| {
            f64::from(if is_rows { values[line * depth + k] } else { values[k * lines + line] })
        };
        let TensorPrimitive::Float(primitive) = tensor.into_primitive() else { unreachable!() };
        (primitive, at)
    };
    let (lhs_rows, rhs_rows) = (layout != Layout::ColumnsColumns, layout == Layout::RowsRows);
    let (lhs, lhs_at) = operand(m, depth, lhs_rows);
    let (rhs, rhs_at) = operand(n, depth, rhs_rows);
    let (prologue_lhs, prologue_lhs_at) = operand(m, rank.max(4), lhs_rows);
    let (prologue_rhs, prologue_rhs_at) = operand(n, rank.max(4), rhs_rows);
    let (prologue_scale, scale) = (1.5f32, -0.75f32);
    let has_prologue = rank > 0;
    let splits = if has_prologue { 1 } else { 2 };
    let span = depth.div_ceil(splits).next_multiple_of(tile.block_k as usize);
    let out: CubeTensor<WgpuRuntime> =
        match Tensor::<Wgpu, 2>::full([splits * m, n], f32::NAN, device).into_primitive() {
            TensorPrimitive::Float(primitive) => primitive,
            TensorPrimitive::QFloat(_) => unreachable!(),
        };
    let words = [m, n, depth, rank, span].map(|v| v as u32);
    let [p, s] = [prologue_scale, scale].map(f32::to_bits);
    kernel::launch(
        &lhs.client.clone(),
        shader,
        [
            BAND * (n as u32).div_ceil(tile.block_n),
            (m as u32).div_ceil(tile.block_m).div_ceil(BAND),
            splits as u32,
        ],
        &[&lhs.handle, &rhs.handle, &prologue_lhs.handle, &prologue_rhs.handle, &out.handle],
        &[words[0], words[1], words[2], words[3], words[4], p, s],
    );
    let parts = Tensor::<Wgpu, 2>::from_primitive(TensorPrimitive::Float(out)).into_data();
    let parts: Vec<f32> = parts.to_vec().expect("the values are f32");
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
    for layout in [Layout::RowsRows, Layout::RowsColumns, Layout::ColumnsColumns] {
        for tile in Tile::GPU.into_iter().chain(Tile::SOFTWARE) {
            let (m, n) = (tile.block_m as usize, tile.block_n as usize);
            let (aligned, ragged) = ([m + 4, n + 4, 44, 8], [m + 3, n - 3, 37, 5]);
            for (is_vec4, [m, n, depth, rank]) in [(true, aligned), (false, ragged)] {
                for rank in [0, rank] {
                    let shader = Shader::Product { layout, tile, is_vec4 };
                    let (got, want) = product(shader, [m, n, depth, rank], &device);
                    assert_close(&got, &want, ATOL, RTOL, &format!("{shader:?}, rank {rank}"));
                }
            }
        }
    }
}
