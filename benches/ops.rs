//! The project's ops against the same formula in burn's own ops: both on the same adapter, in turns, in one run.
//!
//! `cargo bench --bench ops [-- WORD]` runs the groups whose name has the word. A ratio above 1 says that the project's op is
//! faster. On software adapters the build profile hardly matters, as the time goes into the driver's code.

use std::time::Instant;

use burn::tensor::backend::Backend;
use burn::tensor::{Distribution, FloatDType, Tensor};
use burn_autodiff::Autodiff;
use burn_wgpu::{Wgpu, WgpuDevice};
use orpo_wgpu::ops::lora_linear::{
    InputGrad, Lora, lora_linear, lora_linear_backward, lora_linear_reference,
};
use orpo_wgpu::ops::orpo_loss::{
    PairSpan, orpo_loss, orpo_loss_backward, orpo_loss_backward_reference, orpo_loss_reference,
};

type Tracked = Autodiff<Wgpu>;

/// Tokens, in, out, rank.
const LORA_LINEAR: [[usize; 4]; 6] = [
    [512, 1024, 1024, 8],
    [512, 1024, 1024, 64],
    [512, 1024, 2816, 8],
    [512, 2816, 1024, 8],
    [512, 256, 256, 8],
    [100, 1024, 1024, 8],
];
const WARM_UPS: usize = 2;
const RUNS: usize = 9;

/// One side's times, in ms.
#[derive(Default)]
struct Times {
    forward: Vec<f64>,
    backward: Vec<f64>,
}

struct Inputs<B: Backend> {
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    lora: Lora<B>,
    dy: Tensor<B, 2>,
}

fn time<T>(device: &WgpuDevice, f: impl FnOnce() -> T) -> (T, f64) {
    let wait = || <Wgpu as Backend>::sync(device).expect("the device answers");
    wait();
    let start = Instant::now();
    let result = f();
    wait();
    (result, start.elapsed().as_secs_f64() * 1e3)
}

fn step(inputs: &Inputs<Wgpu>, device: &WgpuDevice, times: &mut Times) {
    let Inputs { x, weight, lora, dy } = inputs;
    let ((_, s), forward_ms) = time(device, || lora_linear(x.clone(), weight.clone(), Some(lora), None));
    let (_, backward_ms) = time(device, || {
        lora_linear_backward(dy.clone(), x.clone(), weight.clone(), Some(lora), s, InputGrad::New)
    });
    times.forward.push(forward_ms);
    times.backward.push(backward_ms);
}

/// The same in three products of burn's, under its autodiff.
fn plain_step(inputs: &Inputs<Wgpu>, device: &WgpuDevice, times: &mut Times) {
    let track = |t: &Tensor<Wgpu, 2>| Tensor::<Tracked, 2>::from_inner(t.clone()).require_grad();
    let (x, dy) = (track(&inputs.x), Tensor::<Tracked, 2>::from_inner(inputs.dy.clone()));
    let weight = Tensor::from_inner(inputs.weight.clone());
    let lora = Lora { a: track(&inputs.lora.a), b: track(&inputs.lora.b), scale: inputs.lora.scale };
    let (y, forward_ms) = time(device, || lora_linear_reference(x.clone(), weight, Some(&lora), None));
    let loss = (y * dy).sum();
    // The gradients live until the clock has stopped.
    let (grads, backward_ms) = time(device, || loss.backward());
    assert!(x.grad(&grads).is_some() && lora.a.grad(&grads).is_some(), "all gradients are there");
    times.forward.push(forward_ms);
    times.backward.push(backward_ms);
}

fn median(times: &mut Vec<f64>) -> f64 {
    times.drain(..WARM_UPS);
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Both sides from `f32`, and ours from `f16` against burn's from `f32`.
fn bench_lora_linear(device: &WgpuDevice) {
    let types = [FloatDType::F32, FloatDType::F16].into_iter();
    for ([tokens, n_in, n_out, r], dtype) in types.flat_map(|dtype| LORA_LINEAR.map(|shape| (shape, dtype))) {
        let tensor =
            |rows, columns| Tensor::<Wgpu, 2>::random([rows, columns], Distribution::Default, device);
        let plain = Inputs {
            x: tensor(tokens, n_in),
            weight: tensor(n_out, n_in),
            lora: Lora { a: tensor(r, n_in), b: tensor(n_out, r), scale: 2.0 },
            dy: tensor(tokens, n_out),
        };
        let inputs = Inputs {
            x: plain.x.clone().cast(dtype),
            weight: plain.weight.clone().cast(dtype),
            lora: plain.lora.clone(),
            dy: plain.dy.clone().cast(dtype),
        };
        let (mut ours, mut burn) = (Times::default(), Times::default());
        for _ in 0..WARM_UPS + RUNS {
            step(&inputs, device, &mut ours);
            plain_step(&plain, device, &mut burn);
        }
        for (what, ours, burn) in [
            ("forward", &mut ours.forward, &mut burn.forward),
            ("backward", &mut ours.backward, &mut burn.backward),
        ] {
            let (ours, burn) = (median(ours), median(burn));
            println!(
                "lora_linear {what:8} {dtype:?} tokens {tokens}, {n_in} -> {n_out}, r {r}: {ours:8.2} ms, burn {burn:8.2} ms, ratio {:.2}",
                burn / ours
            );
        }
    }
}

/// Pairs, tokens of a response.
const ORPO_LOSS: [[usize; 2]; 2] = [[1, 512], [16, 512]];

fn bench_orpo_loss(device: &WgpuDevice) {
    for [n_pairs, n_tokens] in ORPO_LOSS {
        let span = |pair: usize| {
            let start = (2 * pair * n_tokens) as u32;
            let rejected_start = start + n_tokens as u32;
            let end = rejected_start + n_tokens as u32;
            let nll_weight = 1.0 / (n_pairs * n_tokens) as f32;
            PairSpan { nll_start: start, chosen_start: start, rejected_start, end, nll_weight }
        };
        let pairs: Vec<_> = (0..n_pairs).map(span).collect();
        let logps =
            Tensor::<Wgpu, 1>::random([2 * n_pairs * n_tokens], Distribution::Uniform(-4.0, 0.0), device);
        let (mut ours, mut burn) = (vec![], vec![]);
        for _ in 0..WARM_UPS + RUNS {
            let (_, ms) = time(device, || {
                let loss = orpo_loss(logps.clone(), &pairs);
                orpo_loss_backward(&loss, &pairs, 0.1, 1.0)
            });
            ours.push(ms);
            let (_, ms) = time(device, || {
                let stats = orpo_loss_reference::<Wgpu>(logps.clone(), &pairs);
                orpo_loss_backward_reference::<Wgpu>(stats, &pairs, 0.1, 1.0)
            });
            burn.push(ms);
        }
        let (ours, burn) = (median(&mut ours), median(&mut burn));
        println!(
            "orpo_loss both ways, {n_pairs} pairs of {n_tokens} tokens twice: {ours:8.2} ms, burn {burn:8.2} ms, ratio {:.2}",
            burn / ours
        );
    }
}

fn main() {
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let device = WgpuDevice::DefaultDevice;
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    for adapter in pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all())) {
        let info = adapter.get_info();
        println!("adapter: {} ({:?}, {:?}) {}", info.name, info.backend, info.device_type, info.driver_info);
    }
    println!("backend: {}; median of {RUNS} runs", <Wgpu as Backend>::name(&device));
    if "lora_linear".contains(&wanted) {
        bench_lora_linear(&device);
    }
    if "orpo_loss".contains(&wanted) {
        bench_orpo_loss(&device);
    }
}
