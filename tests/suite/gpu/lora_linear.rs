//! `lora_linear` on a GPU against the reference on the CPU under burn's autodiff: the output and every gradient.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, FloatDType, Tensor, TensorData};
use burn_autodiff::Autodiff;
use burn_flex::Flex;
use half::{bf16, f16};
use orpo_wgpu::ops::Kernels;
use orpo_wgpu::ops::lora_linear::{
    InputGrad, Lora, LoraGrads, LoraOutputGrad, lora_backward_a, lora_backward_b, lora_linear,
    lora_linear_backward, lora_linear_reference, lora_rank_r, output_grad,
};

use super::on::{Gpu, GpuDevice, GpuRuntime, ROUNDS_ADAPTERS, adapter, stored_types};
use crate::gpu::product::{ATOL, ATOL_F16, ATOL_MATRICES, RTOL, RTOL_F16, RTOL_MATRICES, matrix_sizes};
use crate::support::{Numbers, assert_close, has_matrices};

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
    [1100, 24, 40, 12],
];

#[derive(Clone, Copy)]
pub(super) struct Case {
    pub(super) shape: [usize; 4],
    pub(super) has_adapter: bool,
    pub(super) has_residual: bool,
    pub(super) input: Input,
    pub(super) types: Types,
}

/// What the tensors hold; `out`: the residual, and what the gradient is added to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Types {
    x: DType,
    weight: DType,
    dy: DType,
    out: DType,
}

pub(super) const F32: Types = Types { x: DType::F32, weight: DType::F32, dy: DType::F32, out: DType::F32 };
/// The last bit of a bf16, of sums whose terms were rounded to it.
const ATOL_BF16: f32 = 1e-2;
const RTOL_BF16: f32 = 8e-3;

pub(super) const F16: Types = Types { x: DType::F16, weight: DType::F16, dy: DType::F16, out: DType::F16 };

/// What the gradient by the input is to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Input {
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
            match dtype {
                DType::F16 => values.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32()),
                DType::BF16 => values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32()),
                _ => {}
            }
            let tensor = Tensor::<B, 2>::from_data(TensorData::new(values, [rows, columns]), device);
            if is_f32 || dtype == DType::F32 { tensor } else { tensor.cast(FloatDType::from(dtype)) }
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

fn rank_r<B: Kernels>(x: &Tensor<B, 2>, lora: &Lora<B>) -> Tensor<B, 2> {
    lora_rank_r(x.clone(), &[lora]).remove(0)
}

/// The op with an adapter.
fn adapted<B: Kernels>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    lora: &Lora<B>,
    residual: Option<Tensor<B, 2>>,
) -> Tensor<B, 2> {
    let s = rank_r(&x, lora);
    lora_linear(x, weight, Some((lora, s)), residual)
}

/// Forward and backward of the op from a random gradient by the output.
fn run<B: Kernels>(case: Case, device: &B::Device) -> Outcome {
    let Inputs { x, weight, lora, residual, dy, sum } = Inputs::<B>::new(case, false, device);
    let adapter = case.has_adapter.then(|| (&lora, rank_r(&x, &lora)));
    let residual = case.has_residual.then_some(residual);
    let y = lora_linear(x.clone(), weight.clone(), adapter.clone(), residual);
    let input = match case.input {
        Input::Skip => None,
        Input::New => Some(InputGrad::New(case.types.x)),
        Input::AddTo => Some(InputGrad::AddTo(sum)),
    };
    let dy = output_grad(dy, case.types.x);
    let grads = adapter
        .map(|(lora, s)| (lora, lora_backward_b(&[LoraOutputGrad { dy: dy.clone(), s, lora }]).remove(0)));
    let [da, db] = grads.as_ref().map_or([None, None], |(_, LoraGrads { ds, db })| {
        [lora_backward_a(x, std::slice::from_ref(ds)).remove(0), db.clone()].map(Some)
    });
    let adapter = grads.map(|(lora, grads)| (lora, grads.ds));
    let dx = input.map(|input| lora_linear_backward(dy, weight, adapter, input));
    Outcome {
        y_dtype: y.dtype(),
        y: values(y),
        dx_dtype: dx.as_ref().map(Tensor::dtype),
        dx: dx.map(values),
        da: da.map(values),
        db: db.map(values),
    }
}

/// The same by burn's autodiff through the reference.
fn run_reference(case: Case) -> Outcome {
    type B = Autodiff<Flex>;
    // In bf16 the products of backward take a gradient rounded.
    let dy = if case.types.x == DType::BF16 { DType::BF16 } else { case.types.dy };
    let inputs = Case { types: Types { dy, ..case.types }, ..case };
    let Inputs { x, weight, lora, residual, dy, sum } = Inputs::<B>::new(inputs, true, &Default::default());
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

pub(super) fn compare(case: Case, device: &GpuDevice) {
    let got = run::<Gpu>(case, device);
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
    // Matrices take weights in f16, and round what else is in f32: gradients of the residual stream, and the adapter, or else products
    // before they are added to something in f16.
    let has_matrices = types.weight == DType::F16 && !matrix_sizes::<GpuRuntime>(device).is_empty();
    let rounds_with = |addend: bool| match ROUNDS_ADAPTERS {
        true => has_adapter,
        false => addend && types.out == DType::F16,
    };
    let rounds = |which: &str| match which {
        "y" => has_matrices && types.x == DType::F16 && rounds_with(has_residual),
        "dx" => has_matrices && (types.dy == DType::F32 || rounds_with(input == Input::AddTo)),
        _ => false,
    };
    let close = |got: &[f32], want: &[f32], which: &str, dtype: DType, what: &str| {
        let (atol, rtol) = match dtype {
            _ if rounds(which) => (ATOL_MATRICES, RTOL_MATRICES),
            DType::F16 => (ATOL_F16, RTOL_F16),
            // Their operands are what the reference has, and nothing else is rounded.
            _ if types.x == DType::BF16 && ["da", "db"].contains(&which) => (ATOL, RTOL),
            // Also of what is `f32` and was rounded on its way to a product with such a weight.
            _ if [types.weight, dtype].contains(&DType::BF16) => (ATOL_BF16, RTOL_BF16),
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
    let mixes = |half| {
        let halves = Types { x: half, weight: half, dy: half, out: half };
        [
            halves,
            Types { out: DType::F32, ..halves },
            Types { weight: half, ..F32 },
            Types { weight: DType::F32, ..halves },
            Types { dy: DType::F32, ..halves },
            Types { out: half, ..F32 },
        ]
    };
    let shapes =
        [[7, 107, 331, 5], [65, 64, 256, 8], [130, 331, 107, 100], [1100, 24, 40, 12], [36, 64, 256, 100]];
    let halves = stored_types().into_iter().map(|(dtype, _)| dtype).filter(|dtype| *dtype != DType::F32);
    for (half, shape) in halves.flat_map(|half| shapes.map(|shape| (half, shape))) {
        for (i, types) in mixes(half).into_iter().enumerate() {
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
    if !has_matrices(&matrix_sizes::<GpuRuntime>(&device)) {
        return;
    }
    let types = Types { weight: DType::F16, ..F32 };
    let shape = [65, 64, 256, 8];
    compare(Case { shape, has_adapter: true, has_residual: true, input: Input::New, types }, &device);
    for types in [F16, Types { out: DType::F32, ..F16 }, Types { dy: DType::F32, ..F16 }] {
        for (shape, input) in [
            ([65, 64, 256, 8], Input::AddTo),
            ([7, 107, 331, 5], Input::New),
            ([65, 64, 107, 8], Input::New),
            ([65, 64, 256, 5], Input::New),
        ] {
            compare(Case { shape, has_adapter: true, has_residual: true, input, types }, &device);
        }
    }
    for (half, _) in stored_types().into_iter().filter(|(dtype, _)| *dtype != DType::F32) {
        an_adapter_has_its_bits(half, &device);
    }
}

/// A frozen matrix of zeros leaves the adapter's product alone, whose numbers are taken as pairs of 16 bits, or rounded.
fn an_adapter_has_its_bits(half: DType, device: &GpuDevice) {
    let [tokens, n_in, n_out, rank, scale] = [70, 80, 72, 5, 2];
    let mut numbers = Numbers::new(7);
    let mut tensor = |rows: usize, columns: usize, limit: f32| {
        let values = numbers.vec(rows * columns, limit);
        Tensor::<Gpu, 2>::from_data(TensorData::new(values, [rows, columns]), device)
    };
    let x = tensor(tokens, n_in, 1.0).cast(FloatDType::from(half));
    let lora = Lora { a: tensor(rank, n_in, 1.0), b: tensor(n_out, rank, 1.0), scale: scale as f32 };
    let [weight, residual] = [([n_out, n_in], half), ([tokens, n_out], DType::F32)]
        .map(|(shape, dtype)| Tensor::<Gpu, 2>::zeros(shape, device).cast(FloatDType::from(dtype)));
    let s = rank_r(&x, &lora);
    let y = lora_linear(x, weight, Some((&lora, s.clone())), Some(residual));
    let (y, s, b) = (values(y), values(s), values(lora.b));
    let bits = match half {
        _ if ROUNDS_ADAPTERS => 10,
        DType::BF16 => 14,
        _ => 19,
    };
    for (i, got) in y.into_iter().enumerate() {
        let (row, column) = (i / n_out * rank, i % n_out * rank);
        let terms = (0..rank).map(|k| f64::from(s[row + k]) * f64::from(b[column + k]) * scale as f64);
        let (sum, most) = terms.fold((0.0, 0.0), |(sum, most), term| (sum + term, most + term.abs()));
        let error = (f64::from(got) - sum).abs();
        assert!(error <= most / f64::from(1 << bits), "{half:?}: {got} against {sum} at {i}, off by {error}");
    }
}

/// A residual that nobody else holds is written in its place; one that somebody does is not.
#[test]
fn a_residual_that_is_held_elsewhere_stays_as_it_is() {
    let Some(device) = adapter() else { return };
    for types in [F32, F16] {
        let case =
            Case { shape: [65, 64, 256, 8], has_adapter: true, has_residual: true, input: Input::New, types };
        let Inputs { x, weight, lora, residual, .. } = Inputs::<Gpu>::new(case, false, &device);
        let before = residual.to_data();
        let held = adapted(x.clone(), weight.clone(), &lora, Some(residual.clone()));
        let held = held.into_data();
        assert_eq!(residual.to_data(), before, "{types:?}");
        let given = adapted(x, weight, &lora, Some(residual));
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
        values(adapted(x, weight, &lora, None))
    }
    let got = turned::<Gpu>(&device);
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
        values(adapted(x, weight, &lora, None))
    }
    let got = sliced::<Gpu>(&device);
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
    let [first, second] = [(); 2].map(|()| run::<Gpu>(case, &device));
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    for (a, b) in [(first.y, second.y), (first.dx.unwrap(), second.dx.unwrap())] {
        assert_eq!(bits(&a), bits(&b));
    }
    for (a, b) in [(first.da.unwrap(), second.da.unwrap()), (first.db.unwrap(), second.db.unwrap())] {
        assert_eq!(bits(&a), bits(&b));
    }
}

/// Layers of one input, whose adapters' products may be made as one: of one rank, of several, and with one in another memory order.
#[test]
fn of_layers_that_share_their_input() {
    let Some(device) = adapter() else { return };
    fn shared<B: Kernels>(ranks: &[usize], half: DType, device: &B::Device) -> Vec<Vec<f32>> {
        let [tokens, n_in] = [70, 104];
        let mut numbers = Numbers::new(9);
        let mut tensor = |rows: usize, columns: usize| {
            // As both types of 16 bits hold them.
            let values: Vec<_> = numbers.vec(rows * columns, 0.2).into_iter().map(bf16::from_f32).collect();
            let values = values.into_iter().map(|value| f16::from_f32(value.to_f32()).to_f32()).collect();
            Tensor::<B, 2>::from_data(TensorData::new(values, [rows, columns]), device)
        };
        let x = tensor(tokens, n_in).cast(FloatDType::from(half));
        let loras: Vec<_> =
            ranks.iter().map(|&r| Lora { a: tensor(r, n_in), b: tensor(8, r), scale: 2.0 }).collect();
        let mut ds: Vec<_> = ranks.iter().map(|&r| tensor(tokens, r)).collect();
        ds.push(tensor(ranks[0], tokens).transpose());
        let s = lora_rank_r(x.clone(), &loras.iter().collect::<Vec<_>>());
        s.into_iter().chain(lora_backward_a(x, &ds)).map(values).collect()
    }
    for (half, _) in stored_types() {
        for ranks in [&[8, 8, 8][..], &[6, 6, 12], &[5, 5], &[64, 64]] {
            let got = shared::<Gpu>(ranks, half, &device);
            let want = shared::<Flex>(ranks, DType::F32, &Default::default());
            assert_eq!(got.len(), 2 * ranks.len() + 1);
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                assert_close(got, want, ATOL, RTOL, &format!("{half:?}, ranks {ranks:?}: product {i}"));
            }
        }
    }
}

/// The gradients that layers' outputs give their adapters, made together: of unlike widths, tokens and ranks.
#[test]
fn of_layers_whose_output_gradients_come_together() {
    let Some(device) = adapter() else { return };
    fn together<B: Kernels>(shapes: &[[usize; 3]], half: DType, device: &B::Device) -> Vec<Vec<f32>> {
        let mut numbers = Numbers::new(4);
        let mut tensor = |rows: usize, columns: usize| {
            let values = numbers.vec(rows * columns, 0.2).into_iter();
            let values = values.map(|value| f16::from_f32(bf16::from_f32(value).to_f32()).to_f32()).collect();
            Tensor::<B, 2>::from_data(TensorData::new(values, [rows, columns]), device)
        };
        let loras: Vec<_> = shapes
            .iter()
            .map(|&[_, n_out, rank]| Lora { a: tensor(rank, 8), b: tensor(n_out, rank), scale: 0.7 })
            .collect();
        let layer = |(&[tokens, n_out, rank], lora): (&[usize; 3], _)| {
            let (dy, s) = (tensor(tokens, n_out).cast(FloatDType::from(half)), tensor(tokens, rank));
            LoraOutputGrad { dy, s, lora }
        };
        let layers: Vec<_> = shapes.iter().zip(&loras).map(layer).collect();
        lora_backward_b(&layers).into_iter().flat_map(|LoraGrads { ds, db }| [ds, db]).map(values).collect()
    }
    for (half, _) in stored_types() {
        for shapes in [&[[70, 104, 8], [300, 40, 8], [70, 40, 8]][..], &[[70, 104, 5], [130, 24, 64]], &[]] {
            let got = together::<Gpu>(shapes, half, &device);
            let want = together::<Flex>(shapes, DType::F32, &Default::default());
            assert_eq!(got.len(), 2 * shapes.len());
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                assert_close(got, want, ATOL, RTOL, &format!("{half:?}, {shapes:?}: gradient {i}"));
            }
        }
    }
}
