//! A whole training step against the same step in plain burn operations under burn's autodiff: both on the same adapter, the same
//! model and batch, in turns, in one run.
//!
//! `cargo bench --bench step [-- TOKENS]`, of one length or of both. The plain step keeps every activation; the project's is timed with
//! everything kept, and with each layer run again in backward.

use std::path::Path;
use std::time::Instant;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use burn_wgpu::{Wgpu, WgpuDevice};
use orpo_wgpu::data::batch::{Batch, LossCompat, pack};
use orpo_wgpu::data::dataset::Location;
use orpo_wgpu::data::tokenize::TokenizedPair;
use orpo_wgpu::lora::{self, LoraConfig};
use orpo_wgpu::model::llama::Keep;
use orpo_wgpu::model::presets::preset;
use orpo_wgpu::model::{Llama, Precision};
use orpo_wgpu::ops::adamw::{AdamWStep, adamw, adamw_reference, grad_norm, grad_norm_reference};
use orpo_wgpu::train::step::{DeviceBatch, forward_backward};

#[path = "../tests/suite/plain.rs"]
mod plain;

const WARM_UPS: usize = 1;
const RUNS: usize = 3;
const BETA: f32 = 0.1;
const STEP: AdamWStep = AdamWStep {
    learning_rate: 1e-4,
    beta1: 0.9,
    beta2: 0.95,
    epsilon: 1e-8,
    weight_decay: 0.1,
    max_grad_norm: 1.0,
    t: 1,
    loss_scale: 1.0,
};

/// Tokens of each of the pair's two sequences, the first half of which they share.
const LENGTHS: [usize; 2] = [128, 512];

fn batch(n_tokens: usize, vocab: usize) -> Batch {
    let ids = |n: usize, seed: usize| (0..n).map(|i| ((i * 7919 + seed * 104_729) % vocab) as u32).collect();
    let n_prompt = n_tokens / 2;
    let location = Location::new(Path::new("bench"), 1);
    let pair = TokenizedPair {
        prompt: ids(n_prompt, 1),
        chosen: ids(n_tokens - n_prompt, 2),
        rejected: ids(n_tokens - n_prompt, 3),
        location,
    };
    pack(&[&pair], LossCompat::Swift)
}

fn seconds(device: &WgpuDevice, f: impl FnOnce()) -> f64 {
    let wait = || <Wgpu as Backend>::sync(device).expect("the device answers");
    wait();
    let start = Instant::now();
    f();
    wait();
    start.elapsed().as_secs_f64()
}

fn step(model: &Llama<Wgpu>, batch: &Batch, keep: Keep) {
    let grads = forward_backward(model, DeviceBatch::new(model, batch), BETA, 1.0, keep).lora;
    let norm = grad_norm(&grads);
    let parameters = lora::parameters(model);
    let moments = [(); 2].map(|()| parameters.iter().map(Tensor::zeros_like).collect());
    adamw(parameters, grads, moments, norm, &STEP);
}

fn plain_step(model: &Llama<Wgpu>, batch: &Batch) {
    let (_, grads) = plain::forward_backward(model, batch, BETA);
    let norm = grad_norm_reference(&grads);
    let parameters = lora::parameters(model);
    let moments = [(); 2].map(|()| parameters.iter().map(Tensor::zeros_like).collect());
    adamw_reference(parameters, grads, moments, norm, &STEP);
}

fn median(mut times: Vec<f64>) -> f64 {
    times.drain(..WARM_UPS);
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let device = WgpuDevice::DefaultDevice;
    let config = preset("small").expect("the preset is there");
    let mut model =
        Llama::<Wgpu>::random(&config, Precision::dense(burn::tensor::DType::F32), 64 << 20, &device);
    let modules = lora::target_modules(&["ALL".to_owned()]).expect("ALL is known");
    lora::attach(&mut model, &LoraConfig { r: 8, lora_alpha: 32.0, target_modules: modules }, 42);
    println!("backend: {}; preset small in f32; median of {RUNS} steps", <Wgpu as Backend>::name(&device));
    let wanted: Option<usize> = std::env::args().find_map(|arg| arg.parse().ok());
    for n_tokens in LENGTHS.into_iter().filter(|&n| wanted.is_none_or(|wanted| wanted == n)) {
        let batch = batch(n_tokens, config.vocab_size);
        let (mut plain, mut kept, mut again) = (vec![], vec![], vec![]);
        for _ in 0..WARM_UPS + RUNS {
            plain.push(seconds(&device, || plain_step(&model, &batch)));
            kept.push(seconds(&device, || step(&model, &batch, Keep::All)));
            again.push(seconds(&device, || step(&model, &batch, Keep::Input)));
        }
        let (plain, kept, again) = (median(plain), median(kept), median(again));
        println!(
            "step, 2 x {n_tokens} tokens ({} computed): plain {plain:.3} s; everything kept {kept:.3} s, ratio {:.2}; \
             layers run again {again:.3} s, ratio {:.2}",
            batch.n_tokens(),
            plain / kept,
            plain / again
        );
    }
}
