//! The project's ops against the same formula in burn's own ops: both on the same adapter, in turns, in one run.
//!
//! `cargo bench --bench ops [-- WORD]` runs the groups whose name has the word. A ratio above 1 says that the project's op is
//! faster. On software adapters the build profile hardly matters, as the time goes into the driver's code.

mod attention;
mod plain_product;
mod tiles;

use std::time::Instant;

use burn::tensor::backend::Backend;
use burn::tensor::quantization::{QuantLevel, QuantScheme};
use burn::tensor::{DType, Distribution, FloatDType, Tensor};
use burn_autodiff::Autodiff;
use burn_wgpu::{Wgpu, WgpuDevice};
use orpo_wgpu::ops::adamw::{
    AdamWStep, adamw, adamw_reference, add_grads, add_grads_reference, grad_norm, grad_norm_reference,
};
use orpo_wgpu::ops::lora_linear::{
    InputGrad, Lora, LoraGrads, LoraOutputGrad, lora_backward_a, lora_backward_b, lora_linear,
    lora_linear_backward, lora_rank_r,
};
use orpo_wgpu::ops::orpo_loss::{
    PairSpan, orpo_loss, orpo_loss_backward, orpo_loss_backward_reference, orpo_loss_reference,
};

use orpo_wgpu::ops::quantize::{BLOCK, Storage, Weight};
use orpo_wgpu::ops::rms_norm::{rms_norm, rms_norm_backward, rms_norm_reference};
use orpo_wgpu::ops::rope::{RopeTable, rope, rope_backward, rope_reference};
use orpo_wgpu::ops::swiglu::{swiglu, swiglu_backward, swiglu_backward_reference, swiglu_reference};
use orpo_wgpu::ops::token_logps::{
    Expected, Head, ScoredToken, token_logps, token_logps_backward, token_logps_backward_reference,
    token_logps_reference,
};
use plain_product::Products;

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
    let ((_, s), forward_ms) = time(device, || {
        let s = lora_rank_r(x.clone(), &[lora]).remove(0);
        (lora_linear(x.clone(), weight.clone(), Some((lora, s.clone())), None), s)
    });
    let (_, backward_ms) = time(device, || {
        let layer = LoraOutputGrad { dy: dy.clone(), s, lora };
        let LoraGrads { ds, db } = lora_backward_b(&[layer]).remove(0);
        let da = lora_backward_a(x.clone(), std::slice::from_ref(&ds));
        let dx =
            lora_linear_backward(dy.clone(), weight.clone(), Some((lora, ds)), InputGrad::New(x.dtype()));
        (dx, da, db)
    });
    times.forward.push(forward_ms);
    times.backward.push(backward_ms);
}

/// The same in products of burn's and sums, each product by the fastest routine.
fn plain_step(inputs: &Inputs<Wgpu>, products: &mut Products, device: &WgpuDevice, times: &mut Times) {
    let Inputs { x, weight, lora: Lora { a, b, scale }, dy } = inputs;
    let turned = |t: &Tensor<Wgpu, 2>| t.clone().transpose();
    let ((_, s), forward_ms) = time(device, || {
        let s = products.product(x.clone(), turned(a));
        let y = products.product(x.clone(), turned(weight));
        (y + products.product(s.clone(), turned(b)) * *scale, s)
    });
    let (_, backward_ms) = time(device, || {
        let ds = products.product(dy.clone(), b.clone()) * *scale;
        let db = products.product(turned(dy), s) * *scale;
        let da = products.product(turned(&ds), x.clone());
        let dx = products.product(dy.clone(), weight.clone()) + products.product(ds, a.clone());
        (dx, da, db)
    });
    times.forward.push(forward_ms);
    times.backward.push(backward_ms);
}

fn median(times: &mut Vec<f64>) -> f64 {
    times.drain(..WARM_UPS);
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn report(op: &str, shape: &str, ours: Times, burn: Times) {
    for (what, mut ours, mut burn) in
        [("forward", ours.forward, burn.forward), ("backward", ours.backward, burn.backward)]
    {
        let (ours, burn) = (median(&mut ours), median(&mut burn));
        println!("{op} {what:8} {shape}: {ours:8.2} ms, burn {burn:8.2} ms, ratio {:.2}", burn / ours);
    }
}

/// Both sides from `f32`, and ours from `f16` against burn's from `f32`.
fn bench_lora_linear(device: &WgpuDevice) {
    let types = [FloatDType::F32, FloatDType::F16].into_iter();
    let mut products = Products::default();
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
            plain_step(&plain, &mut products, device, &mut burn);
        }
        report("lora_linear", &format!("{dtype:?} tokens {tokens}, {n_in} -> {n_out}, r {r}"), ours, burn);
    }
    let (n_improved, n_shapes) = products.n_improved();
    println!(
        "lora_linear: of burn's {n_shapes} products {n_improved} are not the fastest by burn's default routine"
    );
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

/// Times both sides in turns and prints their medians.
fn compare<T, U>(device: &WgpuDevice, what: &str, mut ours: impl FnMut() -> T, mut burn: impl FnMut() -> U) {
    let (mut our_times, mut burn_times) = (vec![], vec![]);
    for _ in 0..WARM_UPS + RUNS {
        our_times.push(time(device, &mut ours).1);
        burn_times.push(time(device, &mut burn).1);
    }
    let (ours, burn) = (median(&mut our_times), median(&mut burn_times));
    println!("{what}: {ours:8.2} ms, burn {burn:8.2} ms, ratio {:.2}", burn / ours);
}

fn random<const D: usize>(shape: [usize; D], dtype: DType, device: &WgpuDevice) -> Tensor<Wgpu, D> {
    let tensor = Tensor::<Wgpu, D>::random(shape, Distribution::Uniform(-1.0, 1.0), device);
    tensor.cast(FloatDType::from(dtype))
}

const STORED: [DType; 2] = [DType::F32, DType::F16];

/// Tokens, hidden.
const RMS_NORM: [[usize; 2]; 3] = [[512, 1024], [512, 4096], [2048, 512]];

fn bench_rms_norm(device: &WgpuDevice) {
    for (shape, dtype) in RMS_NORM.into_iter().flat_map(|shape| STORED.map(|dtype| (shape, dtype))) {
        let (x, sum) = (random(shape, DType::F32, device), random(shape, DType::F32, device));
        let (weight, dy) = (random([shape[1]], DType::F32, device), random(shape, dtype, device));
        compare(
            device,
            &format!("rms_norm forward  {shape:?} {dtype:?}"),
            || rms_norm(x.clone(), weight.clone(), 1e-5, dtype),
            || rms_norm_reference(x.clone(), weight.clone(), 1e-5, dtype),
        );
        let (mut our_times, mut burn_times) = (vec![], vec![]);
        for _ in 0..WARM_UPS + RUNS {
            let ours = || rms_norm_backward(dy.clone(), x.clone(), weight.clone(), 1e-5, Some(sum.clone()));
            our_times.push(time(device, ours).1);
            let x = Tensor::<Tracked, 2>::from_inner(x.clone()).require_grad();
            let y = rms_norm_reference(x.clone(), Tensor::from_inner(weight.clone()), 1e-5, dtype);
            let loss = (y * Tensor::from_inner(dy.clone())).sum();
            let burn = || x.grad(&loss.backward()).expect("the input is tracked") + sum.clone();
            burn_times.push(time(device, burn).1);
        }
        let (ours, burn) = (median(&mut our_times), median(&mut burn_times));
        println!(
            "rms_norm backward {shape:?} {dtype:?}: {ours:8.2} ms, burn {burn:8.2} ms, ratio {:.2}",
            burn / ours
        );
    }
}

/// Tokens, heads, dimensions of a head.
const ROPE: [[usize; 3]; 2] = [[512, 16, 64], [512, 32, 128]];

fn bench_rope(device: &WgpuDevice) {
    for (shape, dtype) in ROPE.into_iter().flat_map(|shape| STORED.map(|dtype| (shape, dtype))) {
        let [tokens, _, head_dim] = shape;
        let angles = random([tokens, head_dim / 2], DType::F32, device);
        let table = RopeTable { cos: angles.clone().cos(), sin: angles.sin() };
        let x = random(shape, dtype, device);
        compare(
            device,
            &format!("rope forward  {shape:?} {dtype:?}"),
            || rope(x.clone(), &table),
            || rope_reference(x.clone(), table.cos.clone(), table.sin.clone()),
        );
        compare(
            device,
            &format!("rope backward {shape:?} {dtype:?}"),
            || rope_backward(x.clone(), &table),
            || rope_reference(x.clone(), table.cos.clone(), -table.sin.clone()),
        );
    }
}

/// Tokens, intermediate.
const SWIGLU: [[usize; 2]; 2] = [[512, 2816], [512, 14_336]];

fn bench_swiglu(device: &WgpuDevice) {
    for (shape, dtype) in SWIGLU.into_iter().flat_map(|shape| STORED.map(|dtype| (shape, dtype))) {
        let [dh, gate, up] = [(); 3].map(|()| random(shape, dtype, device));
        compare(
            device,
            &format!("swiglu forward  {shape:?} {dtype:?}"),
            || swiglu(gate.clone(), up.clone()),
            || swiglu_reference(gate.clone(), up.clone()),
        );
        compare(
            device,
            &format!("swiglu backward {shape:?} {dtype:?}"),
            || swiglu_backward(dh.clone(), gate.clone(), up.clone()),
            || swiglu_backward_reference(dh.clone(), gate.clone(), up.clone()),
        );
    }
}

/// Rows, columns.
const QUANTIZE: [[usize; 2]; 2] = [[1024, 2816], [4096, 4096]];

/// Matrices made dense, against burn's own block-wise int8.
fn bench_quantize(device: &WgpuDevice) {
    let scheme = QuantScheme::default().with_level(QuantLevel::block([BLOCK as u8]));
    for shape in QUANTIZE {
        let dense: Tensor<Wgpu, 2> = random(shape, DType::F32, device);
        let values = dense.clone().reshape([shape[0] * shape[1]]);
        let theirs = dense.quantize_dynamic(&scheme);
        for storage in [Storage::Int8, Storage::Nf4] {
            let ours = Weight::quantize(shape, storage, DType::F32, |range| values.clone().slice([range]));
            compare(
                device,
                &format!("dequantize {shape:?} {storage:?}"),
                || ours.to_dense(),
                || theirs.clone().dequantize(),
            );
        }
    }
}

/// Tensors of the adapter, each `[rows, columns]`.
const ADAMW: [(usize, [usize; 2]); 2] = [(1, [1024, 1024]), (64, [8, 1024])];

fn bench_adamw(device: &WgpuDevice) {
    for (n_tensors, shape) in ADAMW {
        let tensors = || (0..n_tensors).map(|_| random(shape, DType::F32, device)).collect::<Vec<_>>();
        let (parameters, grads) = (tensors(), tensors());
        compare(
            device,
            &format!("adamw grad_norm {n_tensors} of {shape:?}"),
            || grad_norm(&grads),
            || grad_norm_reference(&grads),
        );
        // Both sides own what they add to, as training does.
        let sums = || Some(parameters.iter().map(|p| p.clone() + 0.0).collect::<Vec<_>>());
        let (mut ours, mut burn) = (sums(), sums());
        compare(
            device,
            &format!("adamw add_grads {n_tensors} of {shape:?}"),
            || ours = ours.take().map(|sums| add_grads(sums, grads.clone())),
            || burn = burn.take().map(|sums| add_grads_reference(sums, grads.clone())),
        );
        let norm = grad_norm(&grads);
        let step = AdamWStep {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            t: 10,
            loss_scale: 1.0,
        };
        // Both sides own what they update, as training does.
        let state = || {
            let each =
                |f: fn(&Tensor<Wgpu, 2>) -> Tensor<Wgpu, 2>| parameters.iter().map(f).collect::<Vec<_>>();
            Some((each(|p| p.clone() + 0.0), [each(|p| p.clone() * 0.0), each(|p| p.clone().abs())]))
        };
        let (mut ours, mut burn) = (state(), state());
        compare(
            device,
            &format!("adamw update    {n_tensors} of {shape:?}"),
            || ours = ours.take().map(|(p, moments)| adamw(p, grads.clone(), moments, norm.clone(), &step)),
            || {
                burn = burn
                    .take()
                    .map(|(p, moments)| adamw_reference(p, grads.clone(), moments, norm.clone(), &step));
            },
        );
    }
}

/// Rows, hidden, vocabulary.
const TOKEN_LOGPS: [[usize; 3]; 2] = [[16, 512, 32_000], [64, 512, 32_000]];
/// Rows of a shard of the vocabulary.
const SHARD_ROWS: usize = 8192;

/// The head's softmax, gather and gradient, ours and in burn's ops around burn's products: chunks and shards are the same.
fn bench_token_logps(device: &WgpuDevice) {
    for [n_rows, n_hidden, vocab] in TOKEN_LOGPS {
        let random =
            |rows| Tensor::<Wgpu, 2>::random([rows, n_hidden], Distribution::Uniform(-0.1, 0.1), device);
        let shards = (0..vocab)
            .step_by(SHARD_ROWS)
            .map(|first_id| Weight::Dense(random(SHARD_ROWS.min(vocab - first_id))));
        let head = Head { shards: shards.collect(), chunk_bytes: 64 << 20 };
        let hidden = random(n_rows);
        let token = |row: usize| ScoredToken { row_idx: row as u32, target: (row * 7919 % vocab) as u32 };
        let scored: Vec<_> = (0..n_rows).map(token).collect();
        let dlogps = Tensor::<Wgpu, 1>::random([n_rows], Distribution::Default, device);
        let (mut ours, mut burn) = (Times::default(), Times::default());
        for _ in 0..WARM_UPS + RUNS {
            let (forward, ms) = time(device, || token_logps(hidden.clone(), &head, &scored, Expected::Keep));
            ours.forward.push(ms);
            let (_, ms) = time(device, || token_logps_backward(dlogps.clone(), forward, &head, &scored));
            ours.backward.push(ms);
            let (forward, ms) =
                time(device, || token_logps_reference(hidden.clone(), &head, &scored, Expected::Keep));
            burn.forward.push(ms);
            let expected = forward.expected.expect("the forward pass kept it");
            let (_, ms) =
                time(device, || token_logps_backward_reference(dlogps.clone(), expected, &head, &scored));
            burn.backward.push(ms);
        }
        report("token_logps", &format!("{n_rows} rows, {n_hidden} -> {vocab}"), ours, burn);
    }
}

fn main() {
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let device = WgpuDevice::DefaultDevice;
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let mut is_software = true;
    for adapter in pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all())) {
        let info = adapter.get_info();
        is_software &= info.device_type == wgpu::DeviceType::Cpu;
        println!("adapter: {} ({:?}, {:?}) {}", info.name, info.backend, info.device_type, info.driver_info);
    }
    let (backend, of_attention) = (<Wgpu as Backend>::name(&device), attention::ATTENTION_RUNS);
    println!("backend: {backend}; median of {RUNS} runs, of attention's {of_attention}");
    if "lora_linear".contains(&wanted) {
        bench_lora_linear(&device);
    }
    if "attention".contains(&wanted) {
        attention::bench_attention(&device);
    }
    if "tiles".contains(&wanted) {
        tiles::bench_tiles(&device, is_software);
    }
    if "orpo_loss".contains(&wanted) {
        bench_orpo_loss(&device);
    }
    if "quantize".contains(&wanted) {
        bench_quantize(&device);
    }
    if "rms_norm".contains(&wanted) {
        bench_rms_norm(&device);
    }
    if "rope".contains(&wanted) {
        bench_rope(&device);
    }
    if "swiglu".contains(&wanted) {
        bench_swiglu(&device);
    }
    if "adamw".contains(&wanted) {
        bench_adamw(&device);
    }
    if "token_logps".contains(&wanted) {
        bench_token_logps(&device);
    }
}
