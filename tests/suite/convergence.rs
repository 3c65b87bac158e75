//! Thirty-two optimizer steps with the project's kernels against the same steps in plain burn operations on the same adapter.

use burn::tensor::Tensor;
use burn_wgpu::{Wgpu, WgpuDevice};
use orpo_wgpu::data::batch::{Batch, LossCompat, pack};
use orpo_wgpu::lora;
use orpo_wgpu::model::Llama;
use orpo_wgpu::model::llama::Keep;
use orpo_wgpu::ops::adamw::{AdamWStep, adamw, adamw_reference, grad_norm, grad_norm_reference};
use orpo_wgpu::ops::read::read;
use orpo_wgpu::train::metrics::StepMetrics;
use orpo_wgpu::train::step::{DeviceBatch, forward_backward};

use crate::goldens::Case;
use crate::plain;
use crate::support::{adapter, alone, assert_close};

const STEPS: usize = 32;
const BETA: f32 = 0.2;

type Matrix = Tensor<Wgpu, 2>;
type Moments = [Vec<Matrix>; 2];
/// Parameters, gradients, moments and the step's number to the parameters and moments after it.
type Update = fn(Vec<Matrix>, Vec<Matrix>, Moments, usize) -> (Vec<Matrix>, Moments);

/// What one side does: a batch's loss and gradients, and the update they make.
struct Side {
    step: fn(&Llama<Wgpu>, &Batch) -> (f32, Vec<Matrix>),
    update: Update,
}

const KERNELS: Side = Side {
    step: |model, batch| {
        let grads = forward_backward(model, DeviceBatch::new(model, batch), BETA, 1.0, Keep::Input);
        (StepMetrics::from_stats(&read(grads.stats).unwrap(), BETA).loss as f32, grads.lora)
    },
    update: |parameters, grads, moments, t| {
        let norm = grad_norm(&grads);
        adamw(parameters, grads, moments, norm, &settings(t))
    },
};

const PLAIN: Side = Side {
    step: |model, batch| {
        let (loss, grads) = plain::forward_backward(model, batch, BETA);
        (loss.into_scalar(), grads)
    },
    update: |parameters, grads, moments, t| {
        let norm = grad_norm_reference(&grads);
        adamw_reference(parameters, grads, moments, norm, &settings(t))
    },
};

fn settings(t: usize) -> AdamWStep {
    AdamWStep {
        learning_rate: 2e-3,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        max_grad_norm: 1.0,
        t,
        loss_scale: 1.0,
    }
}

/// The losses of the steps, each before its update.
fn losses(side: &Side, case: &Case, device: &WgpuDevice) -> Vec<f32> {
    let (mut model, _) = case.adapted::<Wgpu>(device);
    let zeros = || lora::parameters(&model).iter().map(Tensor::zeros_like).collect();
    let mut moments = [zeros(), zeros()];
    let steps = (1..=STEPS).map(|t| {
        let pairs: Vec<_> = (0..2).map(|i| &case.pairs[(2 * t + i) % case.pairs.len()]).collect();
        let (loss, grads) = (side.step)(&model, &pack(&pairs, LossCompat::Trl));
        let updated;
        (updated, moments) = (side.update)(lora::parameters(&model), grads, std::mem::take(&mut moments), t);
        for (slot, tensor) in lora::tensors_mut(&mut model).into_iter().zip(updated) {
            *slot = tensor;
        }
        loss
    });
    steps.collect()
}

#[test]
fn kernels_on_equals_kernels_off_over_32_steps() {
    if adapter().is_some() {
        alone("convergence::over_32_steps");
    }
}

#[test]
#[ignore = "the test above starts it, in a process of its own"]
fn over_32_steps() {
    let device = adapter().unwrap();
    let case = Case::open("gqa");
    let (with, without) = (losses(&KERNELS, &case, &device), losses(&PLAIN, &case, &device));
    assert!(without[STEPS - 1] < 0.8 * without[0], "the run learns something: {without:?}");
    assert_close(&with, &without, 0.0, 1e-4, "losses");
}
