//! `adamw` and `grad_norm` against loops in `f64`, which follow torch.optim.AdamW and clip_grad_norm_; `add_grads` to the bit.

use burn::tensor::{DType, Tensor};
use burn_flex::Flex;
use orpo_wgpu::ops::Kernels;
use orpo_wgpu::ops::adamw::{AdamWStep, adamw, add_grads, grad_norm};

use super::on::{Gpu, GpuDevice, adapter};
use super::tensors::{bits, random, stored, values};
use crate::support::{Numbers, assert_close};

/// Of a tensor of the adapter.
const SHAPES: [[usize; 2]; 5] = [[1, 1], [1, 7], [8, 64], [3, 107], [16, 4096]];

fn step(max_grad_norm: f64, t: usize) -> AdamWStep {
    AdamWStep {
        learning_rate: 1e-2 / t as f64,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
        max_grad_norm,
        t,
        loss_scale: f64::from(1u32 << (t % 3 * 5)),
    }
}

/// One tensor, and its first and second moment.
type State<B> = (Tensor<B, 2>, [Tensor<B, 2>; 2]);

/// [`adamw`] of one tensor.
fn update<B: Kernels>(
    (parameter, [m, v]): State<B>,
    grad: Tensor<B, 2>,
    norm: Tensor<B, 1>,
    step: &AdamWStep,
) -> [Tensor<B, 2>; 3] {
    let (mut p, [mut m, mut v]) = adamw(vec![parameter], vec![grad], [vec![m], vec![v]], norm, step);
    [p.remove(0), m.remove(0), v.remove(0)]
}

/// Parameter, first and second moment of torch.optim.AdamW.
struct Loop {
    p: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
}

impl Loop {
    fn update(&mut self, grad: &[f32], norm: f64, step: &AdamWStep) {
        let &AdamWStep { learning_rate, beta1, beta2, epsilon, weight_decay, max_grad_norm, t, loss_scale } =
            step;
        let norm = norm / loss_scale;
        let factor = if max_grad_norm > 0.0 { (max_grad_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
        for (i, &g) in grad.iter().enumerate() {
            let g = f64::from(g) / loss_scale * factor;
            self.p[i] -= learning_rate * weight_decay * self.p[i];
            self.m[i] = beta1 * self.m[i] + (1.0 - beta1) * g;
            self.v[i] = beta2 * self.v[i] + (1.0 - beta2) * g * g;
            let m = self.m[i] / (1.0 - beta1.powi(t as i32));
            let v = self.v[i] / (1.0 - beta2.powi(t as i32));
            self.p[i] -= learning_rate * m / (v.sqrt() + epsilon);
        }
    }
}

fn norm_of(grads: &[&[f32]]) -> f64 {
    grads.iter().flat_map(|grad| grad.iter()).map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt()
}

/// Tensors of all these shapes, in one call.
fn follow<B: Kernels>(shapes: &[[usize; 2]], max_grad_norm: f64, n_steps: usize, device: &B::Device) {
    let mut numbers = Numbers::new(21);
    let mut each = |scale: f32| -> Vec<Vec<f32>> {
        shapes.iter().map(|shape| numbers.vec(shape.iter().product(), scale)).collect()
    };
    let tensors = |values: &[Vec<f32>]| -> Vec<Tensor<B, 2>> {
        let stored = |(values, &shape): (&Vec<f32>, &_)| stored(values.clone(), shape, DType::F32, device);
        values.iter().zip(shapes).map(stored).collect()
    };
    let (start, zeros) = (each(0.5), each(0.0));
    let mut want: Vec<_> = start
        .iter()
        .map(|start| Loop {
            p: start.iter().copied().map(f64::from).collect(),
            m: vec![0.0; start.len()],
            v: vec![0.0; start.len()],
        })
        .collect();
    let mut parameters = tensors(&start);
    let mut moments = [tensors(&zeros), tensors(&zeros)];
    for t in 1..=n_steps {
        let grads = each(10f32.powi(t as i32 % 4 - 2));
        let gradients = tensors(&grads);
        let norm = grad_norm(&gradients);
        (parameters, moments) = adamw(parameters, gradients, moments, norm, &step(max_grad_norm, t));
        let norm = norm_of(&grads.iter().map(Vec::as_slice).collect::<Vec<_>>());
        for (want, grad) in want.iter_mut().zip(&grads) {
            want.update(grad, norm, &step(max_grad_norm, t));
        }
    }
    let narrow = |values: &[f64]| values.iter().map(|&v| v as f32).collect::<Vec<_>>();
    let [m, v] = moments;
    for (i, (((parameter, m), v), want)) in parameters.into_iter().zip(m).zip(v).zip(&want).enumerate() {
        for (name, got, want, atol) in
            [("parameter", parameter, &want.p, 1e-6), ("m", m, &want.m, 1e-7), ("v", v, &want.v, 0.0)]
        {
            let what = format!("tensor {i} of {shapes:?}, clipped to {max_grad_norm}: {name}");
            assert_close(&values(got), &narrow(want), atol, 2e-5, &what);
        }
    }
}

#[test]
fn follows_torch() {
    let Some(device) = adapter() else { return };
    let each_alone = SHAPES.map(|shape| vec![shape]);
    // More than a launch takes, in vectors and, beside one of odd length, one by one.
    let together = [SHAPES.repeat(4), vec![[8, 64]; 19]];
    for shapes in each_alone.into_iter().chain(together) {
        // Without clipping, with it in some steps, with it in all.
        for max_grad_norm in [0.0, 1.0, 1e-4] {
            follow::<Gpu>(&shapes, max_grad_norm, 6, &device);
            follow::<Flex>(&shapes, max_grad_norm, 6, &Default::default());
        }
    }
}

#[test]
fn more_cubes_than_one_dimension_has() {
    let Some(device) = adapter() else { return };
    let ones = || Tensor::<Gpu, 2>::ones([257, 65_537], &device);
    let norm = grad_norm(&[ones()]);
    assert_close(&values(norm.clone()), &[(257.0f32 * 65_537.0).sqrt()], 0.0, 1e-6, "norm");
    let mut want = Loop { p: vec![1.0], m: vec![1.0], v: vec![1.0] };
    want.update(&[1.0], (257.0f64 * 65_537.0).sqrt(), &step(1.0, 1));
    let [p, m, v] = update((ones(), [ones(), ones()]), ones(), norm, &step(1.0, 1));
    for (got, want) in [(p, want.p[0]), (m, want.m[0]), (v, want.v[0])] {
        let [low, high] = [got.clone().min(), got.max()].map(|t| t.into_scalar());
        assert_close(&[low, high], &[want as f32; 2], 0.0, 1e-6, "an update of ones");
    }
}

fn state(device: &GpuDevice) -> (Tensor<Gpu, 2>, Tensor<Gpu, 2>, [Tensor<Gpu, 2>; 2]) {
    let mut numbers = Numbers::new(4);
    let mut tensor = || random::<Gpu, 2>(&mut numbers, [8, 107], 1.0, DType::F32, device);
    let (parameter, grad, m, v) = (tensor(), tensor(), tensor(), tensor());
    (parameter, grad, [m, v.clone() * v])
}

#[test]
fn a_norm_that_is_no_number_leaves_everything() {
    let Some(device) = adapter() else { return };
    for norm in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for max_grad_norm in [0.0, 1.0] {
            let (parameter, grad, moments) = state(&device);
            let norm_tensor = Tensor::<Gpu, 1>::from_floats([norm], &device);
            let got = update((parameter, moments), grad * f32::NAN, norm_tensor, &step(max_grad_norm, 3));
            let (parameter, _, [m_before, v_before]) = state(&device);
            let before = [parameter, m_before, v_before].map(bits);
            assert_eq!(got.map(bits), before, "norm {norm}");
        }
    }
}

#[test]
fn what_others_hold_stays() {
    let Some(device) = adapter() else { return };
    let (parameter, grad, [m, v]) = state(&device);
    let norm = grad_norm(std::slice::from_ref(&grad));
    let update = |state| update(state, grad.clone(), norm.clone(), &step(1.0, 3)).map(bits);
    let kept = update((parameter.clone(), [m.clone(), v.clone()]));
    let (before, _, [m_before, v_before]) = state(&device);
    for (held, before) in [(&parameter, before), (&m, m_before), (&v, v_before)] {
        assert_eq!(bits(held.clone()), bits(before), "a held tensor was written over");
    }
    assert_eq!(kept, update((parameter, [m, v])), "in place");
}

#[test]
fn from_views() {
    let Some(device) = adapter() else { return };
    fn run<B: Kernels>(device: &B::Device) -> Vec<f32> {
        let mut numbers = Numbers::new(8);
        let mut random = |shape| random::<B, 2>(&mut numbers, shape, 1.0, DType::F32, device);
        let (turned, all) = (random([64, 12]).transpose(), random([30, 64]));
        let sliced = all.clone().slice([11..23, 0..64]);
        let norm = grad_norm(&[turned.clone(), sliced.clone()]);
        let moments = [random([64, 12]).transpose(), turned.clone() * turned.clone()];
        let [p, m, v] = update((sliced, moments), turned, norm.clone(), &step(1.0, 2));
        [p, m, v, all, norm.unsqueeze()].map(values).concat()
    }
    assert_close(&run::<Gpu>(&device), &run::<Flex>(&Default::default()), 1e-6, 1e-5, "from views");
}

#[test]
fn norms() {
    let Some(device) = adapter() else { return };
    let [small, odd, rank, large] = [[1, 1], [3, 107], [8, 64], [300, 1031]];
    let sets = [
        vec![small],
        vec![odd, rank],
        vec![large],
        vec![rank; 16],
        vec![rank; 17],
        vec![small, odd, rank, large, rank, odd, small, large, rank, rank, rank, small, odd],
    ];
    for shapes in sets {
        let mut numbers = Numbers::new(12);
        let grads: Vec<_> = shapes.iter().map(|shape| numbers.vec(shape.iter().product(), 2.0)).collect();
        let tensors: Vec<_> = shapes
            .iter()
            .zip(&grads)
            .map(|(&shape, grad)| stored::<Gpu, 2>(grad.clone(), shape, DType::F32, &device))
            .collect();
        let want = norm_of(&grads.iter().map(Vec::as_slice).collect::<Vec<_>>()) as f32;
        let [first, second] = [(); 2].map(|()| grad_norm(&tensors));
        assert_close(&values(first.clone()), &[want], 0.0, 1e-6, &format!("{shapes:?}"));
        assert_eq!(bits(first), bits(second), "{shapes:?}: the same bits");
        for (i, tensor) in tensors.iter().enumerate() {
            let mut broken = tensors.clone();
            let hole = Tensor::<Gpu, 2>::full([1, 1], f32::NAN, &device);
            let [rows, columns] = tensor.dims();
            broken[i] = tensor.clone().slice_assign([rows - 1..rows, columns - 1..columns], hole);
            assert!(values(grad_norm(&broken))[0].is_nan(), "{shapes:?}: NaN at the end of tensor {i}");
        }
    }
}

#[test]
fn sums_of_gradients() {
    let Some(device) = adapter() else { return };
    // More than a launch takes, in vectors and, beside tensors of odd lengths, one by one.
    for shapes in [vec![[8, 64]; 35], SHAPES.repeat(5), vec![[257, 65_537]], vec![]] {
        let mut numbers = Numbers::new(31);
        let mut each = || shapes.iter().map(|s| numbers.vec(s[0] * s[1], 1.0)).collect::<Vec<_>>();
        let (first, second) = (each(), each());
        let tensors = |values: &[Vec<f32>]| -> Vec<Tensor<Gpu, 2>> {
            let stored =
                |(values, &shape): (&Vec<f32>, _)| stored(values.clone(), shape, DType::F32, &device);
            values.iter().zip(&shapes).map(stored).collect()
        };
        let held = tensors(&first);
        for sums in [held.clone(), tensors(&first)] {
            let sums = add_grads(sums, tensors(&second));
            assert_eq!(sums.len(), shapes.len());
            for (i, sum) in sums.into_iter().enumerate() {
                let want: Vec<_> = first[i].iter().zip(&second[i]).map(|(a, b)| a + b).collect();
                assert_eq!(values(sum), want, "tensor {i} of {shapes:?}");
            }
        }
        for (held, first) in held.into_iter().zip(first) {
            assert_eq!(values(held), first, "a held tensor was written over");
        }
    }
}
