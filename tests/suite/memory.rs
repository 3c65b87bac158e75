//! The memory of a step against its prediction: in each precision, for all that can be kept for backward, and at both of its ends.

use std::path::Path;

use burn::tensor::{DType, Tensor};
use burn_wgpu::{Wgpu, WgpuRuntime};
use orpo_wgpu::data::batch::{Batch, LossCompat, pack};
use orpo_wgpu::data::dataset::Location;
use orpo_wgpu::data::tokenize::TokenizedPair;
use orpo_wgpu::lora::{self, LoraConfig};
use orpo_wgpu::model::llama::{Keep, KeepPlan, LINEAR_NAMES};
use orpo_wgpu::model::presets::preset;
use orpo_wgpu::model::{Llama, LlamaConfig, Precision};
use orpo_wgpu::ops::quantize::Storage;
use orpo_wgpu::ops::{Kernels, profile};
use orpo_wgpu::train::cost::{Place, StepMemory, StepShape};
use orpo_wgpu::train::step::{DeviceBatch, forward_backward};

use crate::gpu::product::matrix_sizes;
use crate::plain_runtime::PlainBackend;
use crate::support::{adapter, has_matrices};

const LAYERS: usize = 4;
const LEAST: KeepPlan = KeepPlan { whole: 0, rest: Keep::Input };
const ATTENTION: KeepPlan = KeepPlan { whole: 0, rest: Keep::Attention };
const HALF: KeepPlan = KeepPlan { whole: 2, rest: Keep::Attention };
const ALL: KeepPlan = KeepPlan { whole: 0, rest: Keep::All };

/// So narrow that a thousand tokens' activations are most of what a step takes.
fn config() -> LlamaConfig {
    LlamaConfig {
        hidden_size: 128,
        intermediate_size: 384,
        num_hidden_layers: LAYERS,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 32,
        vocab_size: 512,
        ..preset("small").unwrap()
    }
}

/// One pair with answers of so many tokens, after as many as are missing from `n_tokens`: few rows are scored.
fn batch(n_tokens: usize, answer: usize) -> Batch {
    let ids = |n: usize, seed: usize| (0..n).map(|i| ((i * 7919 + seed) % 512) as u32).collect::<Vec<_>>();
    let location = Location::new(Path::new("memory"), 1);
    let [chosen, rejected] = [2, 3].map(|seed| ids(answer, seed));
    let pair = TokenizedPair { prompt: ids(n_tokens - 2 * answer, 1), chosen, rejected, location };
    pack(&[&pair], LossCompat::Swift)
}

/// A model with what else a run holds: both moments, and the adapter as it began.
struct Run<B: Kernels> {
    model: Llama<B>,
    rank: usize,
    _besides: Vec<Tensor<B, 2>>,
}

/// What a step took by each launch, what it says that it took, and what was predicted.
#[derive(Debug)]
struct Bytes {
    measured: f64,
    told: f64,
    predicted: f64,
}

impl<B: Kernels> Run<B> {
    fn new(precision: Precision, rank: usize, device: &B::Device) -> Self {
        let mut model = Llama::<B>::random(&config(), precision, 64 << 20, device);
        let target_modules = lora::target_modules(&["ALL".to_owned()]).unwrap();
        lora::attach(&mut model, &LoraConfig { r: rank, lora_alpha: 32.0, target_modules }, 42);
        let besides = (0..3).flat_map(|_| lora::parameters(&model)).map(|adapter| adapter.zeros_like());
        Self { rank, _besides: besides.collect(), model }
    }

    /// Two micro-batches where the step `accumulates`, else one.
    fn step(&self, batch: &Batch, keep: KeepPlan, accumulates: bool) -> Bytes {
        let step = || forward_backward(&self.model, DeviceBatch::new(&self.model, batch), 0.1, 1.0, keep);
        let _waiting = accumulates.then(step);
        let (gradients, measured) = profile::watch_memory(step);
        let told = gradients.peak_bytes.unwrap() as f64;
        gradients.stats.into_data();
        let logits = self.model.lm_head.logits_bytes(batch.rows.len());
        let ranks = [self.rank; LINEAR_NAMES.len()];
        let precision = self.model.precision;
        let shape = StepShape::of(batch, ranks, precision, keep, accumulates, logits, Place::Gpu);
        let predicted = StepMemory::of(&self.model.config, &shape).total() as f64;
        Bytes { measured: measured.unwrap() as f64, told, predicted }
    }
}

#[track_caller]
fn assert_near(got: f64, want: f64, what: &str) {
    assert!((got / want - 1.0).abs() < 0.1, "{what}: {got} is not within 10 % of {want}");
}

/// The memory of each of these plans, and what it takes beyond the first one, which keeps the least.
fn check_plans<B: Kernels>(precision: Precision, plans: &[KeepPlan], device: &B::Device) {
    let run = Run::<B>::new(precision, 8, device);
    let batch = batch(960, 80);
    let all: Vec<Bytes> = plans.iter().map(|&keep| run.step(&batch, keep, false)).collect();
    let least = &all[0];
    for (i, (keep, bytes)) in plans.iter().zip(&all).enumerate() {
        let what = format!("{precision}, {keep:?}");
        assert_near(bytes.predicted, bytes.measured, &what);
        if i > 0 {
            let beyond = [bytes.predicted - least.predicted, bytes.measured - least.measured];
            assert_near(beyond[0], beyond[1], &format!("{what}: beyond the least"));
        }
        // Samples between launches miss what lives no longer than one.
        let told = bytes.told / bytes.measured;
        assert!((0.85..=1.0).contains(&told), "{what}: {bytes:?}");
    }
}

/// With a high rank and few tokens, memory is at its fullest where backward ends.
fn check_bottom<B: Kernels>(device: &B::Device) {
    let run = Run::<B>::new(Precision::dense(DType::F32), 128, device);
    for accumulates in [false, true] {
        let bytes = run.step(&batch(192, 64), Keep::Input.into(), accumulates);
        let what = format!("accumulates: {accumulates}");
        assert_near(bytes.predicted, bytes.measured, &what);
        assert_near(bytes.told, bytes.measured, &what);
    }
}

fn nf4() -> Precision {
    Precision { linears: Storage::Nf4, ..Precision::dense(DType::F16) }
}

#[test]
fn every_plan_takes_what_is_predicted() {
    let Some(device) = adapter() else { return };
    for (precision, plans) in [
        (Precision::dense(DType::F32), &[LEAST, ATTENTION, HALF, ALL][..]),
        (Precision::dense(DType::F16), &[LEAST, ATTENTION, HALF, ALL]),
        (nf4(), &[LEAST, ALL]),
    ] {
        check_plans::<Wgpu>(precision, plans, &device);
    }
}

/// On matrix units; registers write products in `f32` first.
#[test]
fn cudas_engine_takes_what_is_predicted() {
    let Some(device) = adapter() else { return };
    if !has_matrices(&matrix_sizes::<WgpuRuntime>(&device)) {
        return;
    }
    check_plans::<PlainBackend>(Precision::dense(DType::F16), &[LEAST, HALF, ALL], &device);
    check_plans::<PlainBackend>(nf4(), &[LEAST], &device);
}

#[test]
fn gradients_are_all_there_where_backward_ends() {
    let Some(device) = adapter() else { return };
    check_bottom::<Wgpu>(&device);
}
