//! `swiglu` on a GPU against the reference on the CPU under burn's autodiff: the output and both gradients.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, FloatDType, Tensor};
use burn_autodiff::Autodiff;
use burn_flex::Flex;
use orpo_wgpu::ops::Kernels;
use orpo_wgpu::ops::swiglu::{swiglu, swiglu_backward, swiglu_reference};

use super::on::{Gpu, adapter};
use super::tensors::{bits, central_differences, random, stored, stored_types, values};
use crate::support::{Numbers, assert_close};

const ATOL: f32 = 1e-6;

/// Tokens, intermediate; the last is more than one row of cubes can hold.
const SHAPES: [[usize; 2]; 8] =
    [[1, 1], [3, 7], [1, 64], [130, 107], [3, 4096], [130, 64], [1, 65_537], [263, 63_877]];

/// `dh`, `gate` and `up`.
fn inputs<B: Backend>(shape: [usize; 2], dtype: DType, device: &B::Device) -> [Tensor<B, 2>; 3] {
    let mut numbers = Numbers::new(5);
    [1.0, 6.0, 2.0].map(|size| random(&mut numbers, shape, size, dtype, device))
}

/// `h`, `dgate` and `dup` by the reference, in `f32` from the stored inputs.
fn reference(shape: [usize; 2], dtype: DType) -> [Vec<f32>; 3] {
    type B = Autodiff<Flex>;
    let tensors = inputs::<B>(shape, dtype, &Default::default());
    let [dh, gate, up] = tensors.map(|t| t.cast(FloatDType::F32));
    let (gate, up) = (gate.require_grad(), up.require_grad());
    let h = swiglu_reference(gate.clone(), up.clone());
    let grads = (h.clone() * dh).sum().backward();
    [h.inner(), gate.grad(&grads).unwrap(), up.grad(&grads).unwrap()].map(values)
}

#[test]
fn output_and_gradients() {
    let Some(device) = adapter() else { return };
    for (dtype, rtol) in stored_types() {
        for shape in &SHAPES[..7] {
            let [dh, gate, up] = inputs::<Gpu>(*shape, dtype, &device);
            // Held twice here, so that nothing is written over; given away below, so that everything is.
            let h = swiglu(gate.clone(), up.clone());
            let (dgate, dup) = swiglu_backward(dh.clone(), gate.clone(), up.clone());
            assert!([&h, &dgate, &dup].iter().all(|t| t.dtype() == dtype), "{dtype:?}: type of a result");
            let names = ["h", "dgate", "dup"];
            let got = [h, dgate, dup].map(values);
            let want = reference(*shape, dtype);
            for ((name, got), want) in names.iter().zip(&got).zip(&want) {
                assert_close(got, want, ATOL, rtol, &format!("{shape:?}, {dtype:?}: {name}"));
            }
            let [_, gate_again, up_again] = inputs::<Gpu>(*shape, dtype, &device);
            assert_eq!(bits(gate.clone()), bits(gate_again.clone()), "gate was written over");
            assert_eq!(bits(up.clone()), bits(up_again.clone()), "up was written over");
            let (dgate, dup) = swiglu_backward(dh, gate, up);
            let in_place = [swiglu(gate_again, up_again), dgate, dup].map(values);
            assert_eq!(got, in_place, "{shape:?}, {dtype:?}: in place");
        }
    }
}

#[test]
fn more_cubes_than_one_dimension_has() {
    let Some(device) = adapter() else { return };
    let shape = SHAPES[7];
    let gate = Tensor::<Gpu, 2>::ones(shape, &device);
    let h = swiglu(gate.clone(), gate * 3.0);
    let want = 3.0 / (1.0 + (-1.0f32).exp());
    let [low, high] = [h.clone().min(), h.max()].map(|t| t.into_scalar());
    assert_close(&[low, high], &[want; 2], ATOL, 1e-6, "h");
}

#[test]
fn gradients_are_those_of_the_formula() {
    let Some(device) = adapter() else { return };
    let formula = |gate: &[f64], up: &[f64], dh: &[f64]| {
        let terms = gate.iter().zip(up).zip(dh);
        terms.map(|((gate, up), dh)| dh * up * gate / (1.0 + (-gate).exp())).sum::<f64>()
    };
    let tensors = inputs::<Gpu>([3, 7], DType::F32, &device);
    let [dh, gate, up] = tensors.clone().map(|t| values(t).into_iter().map(f64::from).collect::<Vec<_>>());
    let [dh_tensor, gate_tensor, up_tensor] = tensors;
    let (dgate, dup) = swiglu_backward(dh_tensor, gate_tensor, up_tensor);
    let want_gate = central_differences(&gate, |gate| formula(gate, &up, &dh));
    let want_up = central_differences(&up, |up| formula(&gate, up, &dh));
    assert_close(&values(dgate), &want_gate, ATOL, 1e-5, "dgate");
    assert_close(&values(dup), &want_up, ATOL, 1e-5, "dup");
}

#[test]
fn a_stored_product_saturates_and_nan_stays() {
    let Some(device) = adapter() else { return };
    let tensor = |values: [f32; 6]| stored::<Gpu, 2>(values.to_vec(), [2, 3], DType::F16, &device);
    let gate = tensor([300.0, 300.0, 60_000.0, -5.0, f32::NAN, 1.0]);
    let up = tensor([300.0, -300.0, 1.0, 60_000.0, 1.0, 0.0]);
    let h = values(swiglu(gate, up));
    let [a, b, c] = [65_504.0, -65_504.0, 60_000.0];
    assert_close(&h, &[a, b, c, -2008.0, f32::NAN, 0.0], 0.0, 1e-3, "h");
    // Far out there is nothing left of the logistic function or of its slope, and no NaN.
    let gate = tensor([-60_000.0, 60_000.0, -100.0, 100.0, 0.0, -0.0]);
    let (dgate, dup) = swiglu_backward(gate.clone() * 0.0 + 1.0, gate.clone(), gate * 0.0 + 1.0);
    assert_close(&values(dgate), &[0.0, 1.0, 0.0, 1.0, 0.5, 0.5], 1e-6, 1e-3, "dgate");
    assert_close(&values(dup), &[0.0, 60_000.0, 0.0, 100.0, 0.0, 0.0], 1e-6, 1e-3, "dup");
}

#[test]
fn from_views() {
    let Some(device) = adapter() else { return };
    fn run<B: Kernels>(device: &B::Device) -> Vec<f32> {
        let mut numbers = Numbers::new(8);
        let mut random = |shape| random::<B, 2>(&mut numbers, shape, 1.0, DType::F32, device);
        // Rows alone keep the buffer, at an offset.
        let (gate, up) = (random([64, 12]).transpose(), random([30, 64]).slice([11..23, 0..64]));
        let (dgate, dup) = swiglu_backward(random([20, 64]).slice([4..16, 0..64]), gate.clone(), up.clone());
        [swiglu(gate, up), dgate, dup].map(values).concat()
    }
    assert_close(&run::<Gpu>(&device), &run::<Flex>(&Default::default()), ATOL, 1e-5, "from views");
}

#[test]
fn of_one_tensor_twice() {
    let Some(device) = adapter() else { return };
    let x = random::<Gpu, 2>(&mut Numbers::new(2), [3, 64], 1.0, DType::F32, &device);
    let want: Vec<_> = values(x.clone()).into_iter().map(|x| x * x / (1.0 + (-x).exp())).collect();
    assert_close(&values(swiglu(x.clone(), x)), &want, ATOL, 1e-5, "h");
}
