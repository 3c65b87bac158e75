//! `rope` on a GPU against the reference on the CPU under burn's autodiff: the output and the gradient.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, FloatDType, Tensor};
use burn_autodiff::Autodiff;
use burn_flex::Flex;
use orpo_wgpu::ops::Kernels;
use orpo_wgpu::ops::rope::{RopeTable, rope, rope_backward, rope_reference};

use super::on::{Gpu, adapter};
use super::tensors::{bits, random, stored_types, values};
use crate::support::{Numbers, assert_close};

const ATOL: f32 = 1e-6;

/// Tokens, heads, dimensions of a head.
const SHAPES: [[usize; 3]; 7] =
    [[1, 1, 2], [3, 2, 14], [130, 4, 64], [3, 3, 12], [7, 32, 128], [130, 1, 6], [1100, 8, 64]];

/// The table, `x` and `dy`.
fn inputs<B: Backend>(
    shape: [usize; 3],
    dtype: DType,
    device: &B::Device,
) -> (RopeTable<B>, Tensor<B, 3>, Tensor<B, 3>) {
    let mut numbers = Numbers::new(6);
    let angles = random::<B, 2>(&mut numbers, [shape[0], shape[2] / 2], 3.0, DType::F32, device);
    let table = RopeTable { cos: angles.clone().cos(), sin: angles.sin() };
    let mut random = || random(&mut numbers, shape, 1.0, dtype, device);
    (table, random(), random())
}

fn reference(shape: [usize; 3], dtype: DType) -> [Vec<f32>; 2] {
    type B = Autodiff<Flex>;
    let (table, x, dy) = inputs::<B>(shape, dtype, &Default::default());
    let x = x.cast(FloatDType::F32).require_grad();
    let y = rope_reference(x.clone(), table.cos, table.sin);
    let grads = (y.clone() * dy.cast(FloatDType::F32)).sum().backward();
    [y.inner(), x.grad(&grads).unwrap()].map(values)
}

#[test]
fn output_and_gradient() {
    let Some(device) = adapter() else { return };
    for (dtype, rtol) in stored_types() {
        for shape in SHAPES {
            let (table, x, dy) = inputs::<Gpu>(shape, dtype, &device);
            // Held twice here, so that nothing is written over; given away below, so that everything is.
            let (y, dx) = (rope(x.clone(), &table), rope_backward(dy.clone(), &table));
            assert!(y.dtype() == dtype && dx.dtype() == dtype, "{dtype:?}: type of a result");
            let got = [y, dx].map(values);
            let want = reference(shape, dtype);
            for ((name, got), want) in ["y", "dx"].iter().zip(&got).zip(&want) {
                // A difference of two products may be small beside them.
                let atol = if dtype == DType::F32 { ATOL } else { 1e-3 };
                assert_close(got, want, atol, rtol, &format!("{shape:?}, {dtype:?}: {name}"));
            }
            assert_eq!(bits(x.clone()), bits(inputs::<Gpu>(shape, dtype, &device).1), "x was written over");
            let in_place = [rope(x, &table), rope_backward(dy, &table)].map(values);
            assert_eq!(got, in_place, "{shape:?}, {dtype:?}: in place");
        }
    }
}

#[test]
fn rotates_by_the_angle_and_back() {
    let Some(device) = adapter() else { return };
    let (tokens, heads, half) = (5, 3, 7);
    let mut numbers = Numbers::new(9);
    let x = numbers.vec(tokens * heads * 2 * half, 1.0);
    let angles: Vec<f64> = numbers.vec(tokens * half, 3.0).into_iter().map(f64::from).collect();
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f32> = angles.iter().map(|&angle| f(angle) as f32).collect();
        super::tensors::stored::<Gpu, 2>(values, [tokens, half], DType::F32, &device)
    };
    let table = RopeTable { cos: table(f64::cos), sin: table(f64::sin) };
    let tensor = super::tensors::stored::<Gpu, 3>(x.clone(), [tokens, heads, 2 * half], DType::F32, &device);
    let y = rope(tensor, &table);
    let mut want = vec![0.0; x.len()];
    for token in 0..tokens {
        for head in 0..heads {
            for place in 0..half {
                let at = (token * heads + head) * 2 * half + place;
                let (sin, cos) = angles[token * half + place].sin_cos();
                let [x1, x2] = [x[at], x[at + half]].map(f64::from);
                want[at] = (x1 * cos - x2 * sin) as f32;
                want[at + half] = (x2 * cos + x1 * sin) as f32;
            }
        }
    }
    assert_close(&values(y.clone()), &want, ATOL, 1e-5, "y");
    assert_close(&values(rope_backward(y, &table)), &x, ATOL, 1e-5, "there and back");
}

#[test]
fn from_views() {
    let Some(device) = adapter() else { return };
    fn run<B: Kernels>(device: &B::Device) -> Vec<f32> {
        let (table, _, _) = inputs::<B>([12, 4, 16], DType::F32, device);
        let mut numbers = Numbers::new(8);
        let turned = random::<B, 3>(&mut numbers, [4, 12, 16], 1.0, DType::F32, device).swap_dims(0, 1);
        // Rows alone keep the buffer, at an offset.
        let rows = random::<B, 3>(&mut numbers, [30, 4, 16], 1.0, DType::F32, device);
        let sliced = rows.clone().slice([11..23, 0..4, 0..16]);
        let y = [rope(turned, &table), rope(sliced.clone(), &table), rope_backward(sliced, &table), rows];
        y.map(values).concat()
    }
    assert_close(&run::<Gpu>(&device), &run::<Flex>(&Default::default()), ATOL, 1e-5, "from views");
}

#[test]
#[should_panic(expected = "has no halves")]
fn an_odd_head_is_refused() {
    let (device, table) = (Default::default(), Tensor::ones([2, 3], &Default::default()));
    rope(Tensor::<Flex, 3>::ones([2, 1, 7], &device), &RopeTable { cos: table.clone(), sin: table });
}
