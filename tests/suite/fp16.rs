//! Training in fp16: near TRL's figures in f32, with a loss scale that keeps small gradients and gives way to large ones.

use std::path::Path;

use burn::tensor::DType;
use burn_wgpu::{Wgpu, WgpuDevice};
use orpo_wgpu::data::batch::{LossCompat, pack};
use orpo_wgpu::data::tokenize::fingerprint;
use orpo_wgpu::lora;
use orpo_wgpu::model::llama::Keep;
use orpo_wgpu::model::load::{Checkpoint, load_llama};
use orpo_wgpu::model::{Llama, LlamaConfig, Precision};
use orpo_wgpu::ops::Kernels;
use orpo_wgpu::train::loss_scale::LossScaleConfig;
use orpo_wgpu::train::run_folder::{CheckpointTexts, RunFolder, Tracker};
use orpo_wgpu::train::step::{DeviceBatch, forward_backward};
use orpo_wgpu::train::trainer_state::TrainerState;
use orpo_wgpu::train::{Summary, TrainData, TrainSettings, train};
use serde_json::{Map, Value};

use crate::goldens::{CASES, Case, Recorder, relative_distance, values};
use crate::support::adapter;

/// A run of one case in fp16, its log and what it came to.
fn train_in_fp16<B: Kernels>(
    case: &Case,
    config: LossScaleConfig,
    max_steps: Option<usize>,
    device: &B::Device,
) -> (orpo_wgpu::error::Result<Summary>, Vec<Map<String, Value>>) {
    let (mut model, lora_config) = case.adapted_in::<B>(Precision::dense(DType::F16), device);
    let folder = tempfile::tempdir().unwrap();
    let texts = CheckpointTexts { base_model: String::new(), args: String::new(), card: String::new() };
    let mut run = RunFolder::create(folder.path(), texts, 2, Vec::new(), Tracker::None).unwrap();
    let mut recorder = Recorder::default();
    // The same rows before and after say whether anything was learnt.
    let data = TrainData { train: &case.pairs, val: &case.pairs };
    let mut settings = TrainSettings { loss_scale: Some(config), ..case.settings(LossCompat::Swift) };
    settings.schedule.max_steps = max_steps.unwrap_or(settings.schedule.max_steps);
    let summary = train(&mut model, &lora_config, data, &settings, &mut run, None, &mut recorder);
    recorder.0.retain(|line| line.contains_key("loss"));
    (summary, recorder.0)
}

/// Ten steps in fp16 against TRL's in f32. Two cases: a software adapter's driver takes its time over every width of a head.
pub(crate) fn check_trajectories_in_fp16<B: Kernels>(device: &B::Device) {
    for name in ["gqa", "odd"] {
        let case = Case::open(name);
        let (summary, log) = train_in_fp16::<B>(&case, LossScaleConfig::default(), None, device);
        assert_eq!(summary.unwrap().n_skipped, 0, "{name}: skipped steps");
        let golden = case.golden["trajectories"]["swift"].as_array().unwrap();
        assert_eq!(log.len(), golden.len(), "{name}: lines of the log");
        for (line, golden) in log.iter().zip(golden) {
            for key in ["loss", "nll_loss", "grad_norm"] {
                let (got, want) = (line[key].as_f64().unwrap(), golden[key].as_f64().unwrap());
                let step = &line["step"];
                assert!(
                    (got - want).abs() <= 1e-2 * want.abs(),
                    "{name} step {step} {key}: {got} against {want}"
                );
            }
            assert_eq!(line["loss_scale"], 65_536.0, "{name}");
        }
    }
}

#[test]
fn gpu_trajectories_in_fp16_are_near_those_of_trl() {
    if let Some(device) = adapter() {
        check_trajectories_in_fp16::<Wgpu>(&device);
    }
}

/// A scale that overflows costs steps, each of which lowers it, and updates nothing meanwhile. These scales are larger than the command
/// line takes, so that the small model overflows.
#[test]
fn a_loss_scale_that_overflows_falls_until_it_fits() {
    let Some(device) = adapter() else { return };
    let case = Case::open(CASES[0]);
    let config =
        LossScaleConfig { init_scale: 1e9, backoff_factor: 1.0 / 64.0, ..LossScaleConfig::default() };
    let (summary, log) = train_in_fp16::<Wgpu>(&case, config, None, &device);
    let summary = summary.unwrap();
    assert!((1..10).contains(&summary.n_skipped), "{summary:?}");
    assert!(log.iter().any(|line| line["grad_norm"].is_null()), "a skipped step has no norm: {log:?}");
    let scales: Vec<f64> = log.iter().map(|line| line["loss_scale"].as_f64().unwrap()).collect();
    assert!(scales.is_sorted_by(|a, b| a >= b) && scales[0] > scales[9], "{scales:?}");
    assert!(summary.after.loss < summary.before.unwrap().loss, "it trains all the same: {summary:?}");

    // One that has not fallen enough by the end has skipped every step, and nothing was trained.
    let config = LossScaleConfig { init_scale: 1e30, ..config };
    let error = train_in_fp16::<Wgpu>(&case, config, Some(2), &device).0.unwrap_err().to_string();
    assert!(error.contains("the adapter did not change: 2 steps were skipped"), "{error}");
    // One that has fallen to nothing ends the run and names the rows.
    let config = LossScaleConfig { backoff_factor: 1e-34, ..config };
    let error = train_in_fp16::<Wgpu>(&case, config, None, &device).0.unwrap_err();
    assert_eq!(error.exit_code(), 1);
    let error = error.to_string();
    assert!(
        error.contains("step 1: grad_norm, at this loss scale") && error.contains("pairs.jsonl:"),
        "{error}"
    );
}

/// Gradients below what f16 holds vanish without a scale, and do not with one.
#[test]
fn a_loss_scale_keeps_small_gradients() {
    let Some(device) = adapter() else { return };
    let case = Case::open(CASES[0]);
    let rows: Vec<_> = case.pairs.iter().take(2).collect();
    let batch = pack(&rows, LossCompat::Swift);
    let beta = case.settings(LossCompat::Swift).beta;
    let (exact, _) = case.adapted::<Wgpu>(&device);
    let (model, _) = case.adapted_in::<Wgpu>(Precision::dense(DType::F16), &device);
    let small = 1e-6;
    let grads = |model: &Llama<Wgpu>, scale: f32| -> Vec<Vec<f32>> {
        let grads =
            forward_backward(model, DeviceBatch::new(model, &batch), beta, small * scale, Keep::Input).lora;
        grads.into_iter().map(|grad| values(grad / (small * scale))).collect()
    };
    let want = grads(&exact, 1.0);
    let with = relative_distance(&grads(&model, 65_536.0), &want);
    let without = relative_distance(&grads(&model, 1.0), &want);
    assert!(with < 1e-2, "with a scale they are off by {with:e} of their norm");
    assert!(without > 0.1, "without one they are off by {without:e}, so that this shows nothing");
}

/// Scale, count of skipped steps and bias corrections go on where the checkpoint left them.
#[test]
fn a_resumed_run_in_fp16_equals_one_that_was_not_interrupted() {
    let Some(device) = adapter() else { return };
    let case = Case::open(CASES[0]);
    // Overflows in the first steps, and grows again soon after.
    let loss_scale =
        LossScaleConfig { init_scale: 1e7, backoff_factor: 1e-2, growth_factor: 4.0, growth_interval: 2 };
    let settings =
        TrainSettings { loss_scale: Some(loss_scale), save_steps: 3, ..case.settings(LossCompat::Swift) };
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, from: Option<&Path>| {
        let (mut model, lora_config) = case.adapted_in::<Wgpu>(Precision::dense(DType::F16), &device);
        let state = from.map(|checkpoint| {
            lora::load(&mut model, checkpoint).unwrap();
            TrainerState::read(checkpoint, &model, &settings.plan, fingerprint(&case.pairs)).unwrap()
        });
        let texts = CheckpointTexts { base_model: String::new(), args: String::new(), card: String::new() };
        let mut run =
            RunFolder::create(&folder.path().join(name), texts, 9, Vec::new(), Tracker::None).unwrap();
        let mut recorder = Recorder::default();
        let data = TrainData { train: &case.pairs, val: &[] };
        train(&mut model, &lora_config, data, &settings, &mut run, state, &mut recorder).unwrap();
        let weights: Vec<_> = lora::parameters(&model).into_iter().map(values).collect();
        let figures =
            |line: &Map<String, Value>| ["loss", "loss_scale", "skipped_steps"].map(|k| line[k].clone());
        (weights, recorder.0.iter().map(figures).collect::<Vec<_>>())
    };
    let (weights, log) = run("whole", None);
    let (resumed_weights, resumed_log) = run("resumed", Some(&folder.path().join("whole/checkpoint-3")));
    let skipped = |i: usize| log[i][2].as_u64().unwrap();
    assert!(
        skipped(2) > 0 && skipped(2) < 3,
        "steps were skipped before the checkpoint, and not all: {log:?}"
    );
    assert!((3..log.len()).any(|i| log[i][1].as_f64() > log[i - 1][1].as_f64()), "the scale grew: {log:?}");
    let state = std::fs::read_to_string(folder.path().join("whole/checkpoint-3/trainer_state.json")).unwrap();
    let n_updates = serde_json::from_str::<Value>(&state).unwrap()["n_updates"].as_u64().unwrap();
    assert_eq!(n_updates, 3 - skipped(2), "a skipped step is no update");
    assert_eq!(resumed_log, log[3..], "loss, scale and skipped steps");
    assert_eq!(resumed_weights, weights, "the adapter");
}

/// How much larger the residual stream is than in the case that it was made from.
const WIDE: f32 = 8e4;

/// The `gqa` case with everything that reaches the residual stream larger by [`WIDE`]. The norms take the size away again, so that it
/// computes the same, with activations that f16 has no numbers for.
fn wide(dtype: DType, device: &WgpuDevice) -> (Case, Llama<Wgpu>, lora::LoraConfig) {
    let case = Case::open("gqa");
    let file = case.folder.join("model/model.safetensors");
    let stored = std::fs::read(&file).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&stored).unwrap();
    let tensors = stored.tensors().into_iter().map(|(name, view)| {
        assert_eq!(view.dtype(), safetensors::Dtype::F32, "{name}");
        let reaches = ["embed_tokens", "o_proj", "down_proj"].iter().any(|part| name.contains(part));
        let factor = if reaches { WIDE } else { 1.0 };
        let values = view.data().chunks_exact(4).map(|b| factor * f32::from_le_bytes(b.try_into().unwrap()));
        let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
        (name, view.shape().to_vec(), bytes)
    });
    let tensors: Vec<_> = tensors.collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    let checkpoint = Checkpoint::from_bytes(std::sync::Arc::new(bytes), &file).unwrap();
    let config = LlamaConfig::read(&case.folder.join("model/config.json")).unwrap();
    let mut model = load_llama(&checkpoint, &config, Precision::dense(dtype), 1 << 20, device).unwrap();
    let lora_config = lora::load(&mut model, &case.folder.join("adapter")).unwrap();
    (case, model, lora_config)
}

/// Activations beyond 65,504, with gradients that vanish at a scale of 1.
#[test]
fn activations_beyond_f16_train_with_a_loss_scale() {
    let Some(device) = adapter() else { return };
    let losses = |dtype, loss_scale| {
        let (case, mut model, lora_config) = wide(dtype, &device);
        let tokens: Vec<u32> = case.pairs[0].prompt.clone();
        let largest = values(model.embed(&tokens)).iter().fold(0f32, |most, v| most.max(v.abs()));
        assert!(largest > 65_504.0, "a residual stream in f16 would be infinite, not {largest}");
        let folder = tempfile::tempdir().unwrap();
        let texts = CheckpointTexts { base_model: String::new(), args: String::new(), card: String::new() };
        let mut run = RunFolder::create(folder.path(), texts, 2, Vec::new(), Tracker::None).unwrap();
        let mut recorder = Recorder::default();
        let data = TrainData { train: &case.pairs, val: &[] };
        let settings = TrainSettings { loss_scale, ..case.settings(LossCompat::Swift) };
        train(&mut model, &lora_config, data, &settings, &mut run, None, &mut recorder).unwrap();
        recorder.0.iter().map(|line| line["loss"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    let exact = losses(DType::F32, None);
    assert!(exact[9] < 0.99 * exact[0], "the run learns something: {exact:?}");
    for (i, (got, want)) in
        losses(DType::F16, Some(LossScaleConfig::default())).iter().zip(&exact).enumerate()
    {
        assert!((got - want).abs() <= 1e-2 * want, "step {}: {got} against {want}", i + 1);
    }

    let small = 1e-6;
    let grads = |dtype, scale: f32| -> Vec<Vec<f32>> {
        let (case, model, _) = wide(dtype, &device);
        let batch = pack(&case.pairs.iter().take(2).collect::<Vec<_>>(), LossCompat::Swift);
        let beta = case.settings(LossCompat::Swift).beta;
        let grads =
            forward_backward(&model, DeviceBatch::new(&model, &batch), beta, small * scale, Keep::Input).lora;
        grads.into_iter().map(|grad| values(grad / (small * scale))).collect()
    };
    let want = grads(DType::F32, 1.0);
    let with = relative_distance(&grads(DType::F16, 65_536.0), &want);
    let without = relative_distance(&grads(DType::F16, 1.0), &want);
    assert!(with < 1e-2, "with a scale they are off by {with:e} of their norm");
    assert!(without > 0.1, "without one they are off by {without:e}, so that this shows nothing");
}
