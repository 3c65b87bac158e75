//! `rms_norm` on a GPU against the reference on the CPU under burn's autodiff: the output and the gradient.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, FloatDType, Tensor, TensorPrimitive};
use burn_autodiff::Autodiff;
use burn_cubecl::kernel::into_contiguous;
use burn_flex::Flex;
use orpo_wgpu::ops::Kernels;
use orpo_wgpu::ops::rms_norm::{
    GPU_THREADS, SOFTWARE_THREADS, launch_backward, launch_forward, rms_norm, rms_norm_backward,
    rms_norm_reference,
};

use super::on::{Gpu, adapter};
use super::tensors::{bits, central_differences, random, stored, stored_types, values};
use crate::support::{Numbers, assert_close};

const ATOL: f32 = 1e-5;
const EPS: f64 = 1e-5;

/// Tokens, hidden. The last four have rows that are too long for the registers, or more rows than a dimension has cubes.
const SHAPES: [[usize; 2]; 11] = [
    [3, 1],
    [1, 7],
    [130, 64],
    [3, 107],
    [5, 1022],
    [3, 4096],
    [2, 8192],
    [2, 9000],
    [2, 2051],
    [2, 16_384],
    [65_543, 4],
];

struct Inputs<B: Backend> {
    x: Tensor<B, 2>,
    weight: Tensor<B, 1>,
    dy: Tensor<B, 2>,
    sum: Tensor<B, 2>,
}

/// `dy` is stored in `dtype`, all else in `f32`.
fn inputs<B: Backend>(shape: [usize; 2], dtype: DType, device: &B::Device) -> Inputs<B> {
    let mut numbers = Numbers::new(15);
    let x = random(&mut numbers, shape, 3.0, DType::F32, device);
    let weight = random::<B, 1>(&mut numbers, [shape[1]], 1.0, DType::F32, device) + 1.5;
    let dy = random(&mut numbers, shape, 1.0, dtype, device);
    Inputs { x, weight, dy, sum: random(&mut numbers, shape, 1.0, DType::F32, device) }
}

/// `y`, `dx` and `sum + dx`.
fn reference(shape: [usize; 2], dtype: DType) -> [Vec<f32>; 3] {
    type B = Autodiff<Flex>;
    let Inputs { x, weight, dy, sum } = inputs::<B>(shape, dtype, &Default::default());
    let x = x.require_grad();
    let y = rms_norm_reference(x.clone(), weight, EPS, DType::F32);
    let grads = (y.clone() * dy.cast(FloatDType::F32)).sum().backward();
    let dx = x.grad(&grads).unwrap();
    [y.inner(), dx.clone(), sum.inner() + dx].map(values)
}

#[test]
fn output_and_gradient() {
    let Some(device) = adapter() else { return };
    for (dtype, rtol) in stored_types() {
        let n_shapes = if dtype == DType::F32 { SHAPES.len() } else { SHAPES.len() - 1 };
        for shape in SHAPES.into_iter().take(n_shapes) {
            let Inputs { x, weight, dy, sum } = inputs::<Gpu>(shape, dtype, &device);
            let y = rms_norm(x.clone(), weight.clone(), EPS, dtype);
            assert_eq!(y.dtype(), dtype, "type of y");
            // The sum is held twice here, so that nothing is written over; given away below, so that it is.
            let backward = |sum| rms_norm_backward(dy.clone(), x.clone(), weight.clone(), EPS, sum);
            let got = [y, backward(None), backward(Some(sum.clone()))].map(values);
            let want = reference(shape, dtype);
            for ((name, got), want) in ["y", "dx", "sum + dx"].iter().zip(&got).zip(&want) {
                let rtol = if *name == "y" { rtol } else { 1e-4 };
                assert_close(got, want, ATOL, rtol, &format!("{shape:?}, {dtype:?}: {name}"));
            }
            let again = inputs::<Gpu>(shape, dtype, &device);
            assert_eq!(bits(sum.clone()), bits(again.sum), "the sum was written over");
            assert_eq!(bits(x.clone()), bits(again.x), "x was written over");
            assert_eq!(got[2], values(backward(Some(sum))), "{shape:?}, {dtype:?}: in place");
        }
    }
}

/// A launch takes as many threads as suit its device, so that a software adapter would never see those meant for GPUs.
#[test]
fn every_number_of_threads() {
    let Some(device) = adapter() else { return };
    for most_threads in [SOFTWARE_THREADS, GPU_THREADS] {
        for shape in &SHAPES[..10] {
            let Inputs { x, weight, dy, sum } = inputs::<Gpu>(*shape, DType::F32, &device);
            // CUDA leaves gaps between the rows of what comes from the host, which the op would close.
            let [x, dy, sum] = [x, dy, sum].map(|t| into_contiguous(t.into_primitive().tensor()));
            let weight = weight.into_primitive().tensor();
            let y = launch_forward(x.clone(), weight.clone(), EPS, DType::F32, most_threads);
            let dx = launch_backward(dy, x, weight, EPS, Some(sum), most_threads);
            let [want_y, _, want_dx] = reference(*shape, DType::F32);
            for (name, got, want) in [("y", y, want_y), ("sum + dx", dx, want_dx)] {
                let got = values(Tensor::<Gpu, 2>::from_primitive(TensorPrimitive::Float(got)));
                assert_close(&got, &want, ATOL, 1e-4, &format!("{shape:?}, {most_threads}: {name}"));
            }
        }
    }
}

/// One row by the formula, in `f64`.
fn formula(x: &[f64], weight: &[f64]) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter().zip(weight).map(|(x, weight)| x / (mean + EPS).sqrt() * weight).collect()
}

#[test]
fn large_and_small_rows() {
    let Some(device) = adapter() else { return };
    let hidden = 107;
    for size in [1e-20, 1e-4, 1e-2, 1e3, 1e8, 1e16] {
        let mut numbers = Numbers::new(31);
        let [x, weight, dy] = [size, 1.0, 1.0].map(|size| numbers.vec(hidden, size));
        let wide = |values: &[f32]| values.iter().copied().map(f64::from).collect::<Vec<_>>();
        let [x64, weight64, dy64] = [&x, &weight, &dy].map(|v| wide(v));
        let tensor = |values: &[f32]| stored::<Gpu, 2>(values.to_vec(), [1, hidden], DType::F32, &device);
        let weight = tensor(&weight).reshape([hidden]);
        let y = rms_norm(tensor(&x), weight.clone(), EPS, DType::F32);
        let want: Vec<_> = formula(&x64, &weight64).into_iter().map(|y| y as f32).collect();
        assert_close(&values(y), &want, 0.0, 1e-5, &format!("y of {size}"));

        let dx = rms_norm_backward(tensor(&dy), tensor(&x), weight, EPS, None);
        let mean_square = x64.iter().map(|x| x * x).sum::<f64>() / hidden as f64;
        let r = 1.0 / (mean_square + EPS).sqrt();
        let g: Vec<_> = dy64.iter().zip(&weight64).map(|(dy, weight)| dy * weight).collect();
        let mean = g.iter().zip(&x64).map(|(g, x)| g * x).sum::<f64>() / hidden as f64;
        let want: Vec<_> = g.iter().zip(&x64).map(|(g, x)| r * (g - x * r * r * mean)).collect();
        // In units of r, which is the size of the gradient.
        let in_units = |values: Vec<f32>| values.into_iter().map(|v| (f64::from(v) / r) as f32).collect();
        let want: Vec<f32> = want.into_iter().map(|v| (v / r) as f32).collect();
        let got: Vec<f32> = in_units(values(dx));
        assert_close(&got, &want, 1e-6, 1e-5, &format!("dx of {size}"));
    }
}

#[test]
fn the_gradient_is_that_of_the_formula() {
    let Some(device) = adapter() else { return };
    let Inputs { x, weight, dy, .. } = inputs::<Gpu>([1, 7], DType::F32, &device);
    let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
    let (x64, weight64, dy64) =
        (wide(values(x.clone())), wide(values(weight.clone())), wide(values(dy.clone())));
    let want = central_differences(&x64, |x| {
        formula(x, &weight64).iter().zip(&dy64).map(|(y, dy)| y * dy).sum::<f64>()
    });
    assert_close(&values(rms_norm_backward(dy, x, weight, EPS, None)), &want, 1e-6, 1e-5, "dx");
}

#[test]
fn from_views() {
    let Some(device) = adapter() else { return };
    fn run<B: Kernels>(device: &B::Device) -> Vec<f32> {
        let mut numbers = Numbers::new(8);
        let mut random = |shape| random::<B, 2>(&mut numbers, shape, 1.0, DType::F32, device);
        // Rows alone keep the buffer, at an offset.
        let turned = random([64, 12]).transpose();
        let sliced = random([30, 64]).slice([11..23, 0..64]);
        let weight = random([3, 64]).slice([1..2, 0..64]).reshape([64]);
        let all = random([20, 64]);
        let sum = all.clone().slice([4..16, 0..64]);
        let tensors = [
            rms_norm(turned.clone(), weight.clone(), EPS, DType::F32),
            rms_norm(sliced.clone(), weight.clone(), EPS, DType::F32),
            rms_norm_backward(turned.clone(), sliced.clone(), weight.clone(), EPS, Some(sum.clone())),
            rms_norm_backward(sliced, turned, weight, EPS, Some(sum)),
            all,
        ];
        tensors.map(values).concat()
    }
    assert_close(&run::<Gpu>(&device), &run::<Flex>(&Default::default()), ATOL, 1e-5, "from views");
}

#[test]
fn the_same_input_gives_the_same_bits() {
    let Some(device) = adapter() else { return };
    let [first, second] = [(); 2].map(|()| {
        let Inputs { x, weight, dy, sum } = inputs::<Gpu>([130, 1022], DType::F32, &device);
        let y = rms_norm(x.clone(), weight.clone(), EPS, DType::F32);
        [y, rms_norm_backward(dy, x, weight, EPS, Some(sum))].map(bits)
    });
    assert_eq!(first, second);
}
