//! Training against TRL: the cases of `tests/fixtures/goldens`, made by `tests/fixtures/make_goldens.py`.
//!
//! Every case is run from the files that a user would give: a model folder, a PEFT adapter to start from and a file of pairs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Tensor};
use burn_flex::Flex;
use burn_wgpu::{Wgpu, WgpuDevice};
use orpo_wgpu::data::batch::{LossCompat, pack};
use orpo_wgpu::data::dataset::{self, Location, Shuffle, Strictness};
use orpo_wgpu::data::template::Template;
use orpo_wgpu::data::tokenize::{TextTokenizer, TokenizedPair, TruncationStrategy, tokenize_rows};
use orpo_wgpu::lora;
use orpo_wgpu::model::attention::AttentionLayout;
use orpo_wgpu::model::llama::Keep;
use orpo_wgpu::model::load::{Checkpoint, load_llama};
use orpo_wgpu::model::{Llama, LlamaConfig, Precision};
use orpo_wgpu::ops::Kernels;
use orpo_wgpu::train::loss_scale::LossScaleConfig;
use orpo_wgpu::train::metrics::StepMetrics;
use orpo_wgpu::train::optim::AdamWConfig;
use orpo_wgpu::train::plan::Plan;
use orpo_wgpu::train::run_folder::{CheckpointTexts, RunFolder, Tracker, TrainerState};
use orpo_wgpu::train::schedule::{LrSchedulerType, Schedule};
use orpo_wgpu::train::step::forward_backward;
use orpo_wgpu::train::{Observer, Summary, TrainData, TrainSettings, train};
use serde_json::{Map, Value};

use crate::support::{adapter, assert_close};

const CASES: [&str; 4] = ["gqa", "tied_rope", "odd", "history_system"];

/// A golden case, opened as the program opens a user's files.
pub(crate) struct Case {
    folder: PathBuf,
    golden: Value,
    flags: BTreeMap<String, String>,
    pub(crate) pairs: Vec<TokenizedPair>,
}

impl Case {
    pub(crate) fn open(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/goldens").join(name);
        let golden: Value =
            serde_json::from_str(&std::fs::read_to_string(folder.join("golden.json")).unwrap()).unwrap();
        let words: Vec<&str> =
            golden["args"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
        let flags =
            words.chunks(2).map(|f| (f[0].trim_start_matches("--").to_owned(), f[1].to_owned())).collect();
        let specs = [folder.join("pairs.jsonl").display().to_string()];
        let rows = dataset::load(&specs, &BTreeMap::new(), Strictness::Strict, 0).unwrap().rows;
        let tokenizer = TextTokenizer::from_folder(folder.join("model")).unwrap();
        let (pairs, _) = tokenize_rows(
            &rows,
            &tokenizer,
            Template::Llama3,
            2048,
            TruncationStrategy::Delete,
            None,
            Strictness::Strict,
        )
        .unwrap();
        Self { folder, golden, flags, pairs }
    }

    fn flag<T: std::str::FromStr<Err: std::fmt::Debug>>(&self, name: &str) -> T {
        self.flags[name].parse().unwrap()
    }

    /// The model without adapter. Small shards, so that the head is cut into several.
    fn model<B: Kernels>(&self, dtype: DType, device: &B::Device) -> Llama<B> {
        let config = LlamaConfig::read(&self.folder.join("model/config.json")).unwrap();
        let checkpoint = Checkpoint::open_folder(&self.folder.join("model")).unwrap();
        load_llama(&checkpoint, &config, Precision::dense(dtype), 200 * config.hidden_size * 4, device)
            .unwrap()
    }

    pub(crate) fn adapted<B: Kernels>(&self, device: &B::Device) -> (Llama<B>, lora::LoraConfig) {
        self.adapted_in(DType::F32, device)
    }

    fn adapted_in<B: Kernels>(&self, dtype: DType, device: &B::Device) -> (Llama<B>, lora::LoraConfig) {
        let mut model = self.model(dtype, device);
        let config = lora::load(&mut model, &self.folder.join("adapter")).unwrap();
        (model, config)
    }

    fn settings(&self, compat: LossCompat) -> TrainSettings {
        let max_steps = self.flag("max_steps");
        let kind = match self.flags["lr_scheduler_type"].as_str() {
            "constant" => LrSchedulerType::Constant,
            "linear" => LrSchedulerType::Linear,
            _ => LrSchedulerType::Cosine,
        };
        TrainSettings {
            plan: Plan {
                n_rows: self.pairs.len(),
                batch_size: self.flag("batch_size"),
                gradient_accumulation_steps: self.flag("gradient_accumulation_steps"),
                shuffle: Shuffle::Off,
            },
            beta: self.flag("beta"),
            loss_compat: compat,
            schedule: Schedule {
                learning_rate: self.flag("learning_rate"),
                kind,
                warmup_steps: (self.flag::<f64>("warmup_ratio") * max_steps as f64).ceil() as usize,
                max_steps,
            },
            adamw: AdamWConfig {
                adam_beta1: self.flag("adam_beta1"),
                adam_beta2: self.flag("adam_beta2"),
                adam_epsilon: self.flag("adam_epsilon"),
                weight_decay: self.flag("weight_decay"),
                max_grad_norm: self.flag("max_grad_norm"),
            },
            loss_scale: None,
            keep: Keep::Input,
            logging_steps: 1,
            eval_steps: 1000,
            save_steps: 1000,
        }
    }
}

fn floats(value: &Value) -> Vec<f32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|v| v.as_f64().map_or_else(|| floats(v), |v| vec![v as f32]))
        .collect()
}

fn values<B: Kernels, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().to_vec().unwrap()
}

#[test]
fn rows_become_the_ids_that_trl_saw() {
    for name in CASES {
        let case = Case::open(name);
        let tokens = case.golden["tokens"].as_array().unwrap();
        assert_eq!(case.pairs.len(), tokens.len(), "{name}: rows");
        for (pair, tokens) in case.pairs.iter().zip(tokens) {
            let ids = |part: &str| floats(&tokens[part]).iter().map(|&id| id as u32).collect::<Vec<_>>();
            let whole = |answer: &[u32]| [pair.prompt.as_slice(), answer].concat();
            assert_eq!(pair.prompt, ids("prompt"), "{name} {}", pair.location);
            assert_eq!(whole(&pair.chosen), ids("chosen"), "{name} {}", pair.location);
            assert_eq!(whole(&pair.rejected), ids("rejected"), "{name} {}", pair.location);
        }
    }
}

/// Logits and log-probabilities of a sequence, with and without the adapter, against transformers and PEFT.
fn check_forward<B: Kernels>(device: &B::Device) {
    for name in CASES {
        let case = Case::open(name);
        let forward = &case.golden["forward"];
        let ids: Vec<u32> = floats(&forward["ids"]).iter().map(|&id| id as u32).collect();
        for (kind, model) in
            [("base", case.model::<B>(DType::F32, device)), ("adapter", case.adapted::<B>(device).0)]
        {
            let layout = AttentionLayout::causal(&model.config, 0, ids.len(), device);
            let logits = model.lm_head.logits(model.forward(&ids, &layout));
            let [n_rows, vocab] = logits.dims();
            let logps = burn::tensor::activation::log_softmax(logits.clone(), 1);
            let all = values(logps);
            let logps: Vec<f32> =
                ids[1..].iter().enumerate().map(|(row, &id)| all[row * vocab + id as usize]).collect();
            let last = values(logits.slice([n_rows - 2..n_rows, 0..vocab]));
            assert_close(
                &logps,
                &floats(&forward[kind]["logps"]),
                2e-5,
                1e-5,
                &format!("{name} {kind} logps"),
            );
            assert_close(
                &last,
                &floats(&forward[kind]["last_logits"]),
                1e-4,
                1e-4,
                &format!("{name} {kind} logits"),
            );
        }
    }
}

/// Relative distance of two lists of tensors: the norm of their difference over the norm of `want`.
fn relative_distance(got: &[Vec<f32>], want: &[Vec<f32>]) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let flat = |tensors: &[Vec<f32>]| tensors.iter().flatten().map(|&v| f64::from(v)).collect::<Vec<_>>();
    let (got, want) = (flat(got), flat(want));
    assert_eq!(got.len(), want.len());
    let difference = square(&mut got.iter().zip(&want).map(|(g, w)| g - w));
    (difference / square(&mut want.iter().copied())).sqrt()
}

/// Every gradient of the first step, tensor by tensor, against TRL's.
fn check_first_gradients<B: Kernels>(device: &B::Device) {
    for name in CASES {
        let case = Case::open(name);
        let (model, _) = case.adapted::<B>(device);
        for (compat, file) in
            [(LossCompat::Trl, "grads.safetensors"), (LossCompat::Swift, "grads_swift.safetensors")]
        {
            let golden = Checkpoint::open_file(&case.folder.join(file)).unwrap();
            for keep in [Keep::Input, Keep::Attention, Keep::All] {
                let settings = case.settings(compat);
                let micro_batches = settings.plan.micro_batches(0);
                let mut total: Option<Vec<Tensor<B, 2>>> = None;
                for indices in &micro_batches {
                    let rows: Vec<_> = indices.iter().map(|&i| &case.pairs[i]).collect();
                    let scale = 1.0 / micro_batches.len() as f32;
                    let grads =
                        forward_backward(&model, &pack(&rows, compat), settings.beta, scale, keep).lora;
                    total = Some(match total {
                        None => grads,
                        Some(total) => total.into_iter().zip(grads).map(|(a, b)| a + b).collect(),
                    });
                }
                let names: Vec<String> = lora::tensors(&model).into_iter().map(|(name, _)| name).collect();
                assert_eq!(names.len(), golden.names().count(), "{name}: number of gradients");
                for (tensor, grad) in names.iter().zip(total.unwrap()) {
                    let want = values(golden.tensor::<B, 2>(tensor, device));
                    let distance = relative_distance(&[values(grad)], &[want]);
                    assert!(
                        distance < 1e-4,
                        "{name} {compat} {keep:?} {tensor}: off by {distance:e} of its norm"
                    );
                }
            }
        }
    }
}

/// Keeps the lines of the log.
#[derive(Default)]
struct Recorder(Vec<Map<String, Value>>);

impl Observer for Recorder {
    fn before_step(&mut self, _step: usize, _rows: &[&Location]) {}
    fn before_evaluation(&mut self, _step: usize) {}
    fn on_step(&mut self, _step: usize, _metrics: &StepMetrics, _n_tokens: usize) {}
    fn on_skip(&mut self, _step: usize, _scale: f64) {}
    fn on_log(&mut self, line: &Map<String, Value>) {
        self.0.push(line.clone());
    }
    fn memory_bytes(&self) -> u64 {
        0
    }
}

/// Ten steps in each form of the loss, every logged figure against TRL's.
fn check_trajectories<B: Kernels>(device: &B::Device) {
    for name in CASES {
        let case = Case::open(name);
        for compat in LossCompat::ALL {
            let (mut model, lora_config) = case.adapted::<B>(device);
            let folder = tempfile::tempdir().unwrap();
            let texts =
                CheckpointTexts { base_model: String::new(), args: String::new(), card: String::new() };
            let mut run = RunFolder::create(folder.path(), texts, 2, Vec::new(), Tracker::None).unwrap();
            let mut recorder = Recorder::default();
            let data = TrainData { train: &case.pairs, val: &[] };
            let settings = case.settings(compat);
            train(&mut model, &lora_config, data, &settings, &mut run, None, &mut recorder).unwrap();
            let golden = case.golden["trajectories"][compat.name()].as_array().unwrap();
            assert_eq!(recorder.0.len(), golden.len(), "{name} {compat}: lines of the log");
            for (line, golden) in recorder.0.iter().zip(golden) {
                for (key, want) in golden.as_object().unwrap() {
                    let (got, want) = (line[key].as_f64().unwrap(), want.as_f64().unwrap());
                    // The loss is held to 1e-4 of itself; what it is the difference of, and its logarithms, to the same absolute size.
                    let (atol, rtol) = if key == "loss" { (0.0, 1e-4) } else { (1e-4, 3e-4) };
                    let bound = atol + rtol * want.abs();
                    let step = &line["step"];
                    assert!(
                        (got - want).abs() <= bound,
                        "{name} {compat} step {step} {key}: {got} against {want}"
                    );
                }
            }
            if compat == LossCompat::Swift {
                let after = Checkpoint::open_file(&case.folder.join("adapter_after.safetensors")).unwrap();
                let (got, want): (Vec<_>, Vec<_>) = lora::tensors(&model)
                    .into_iter()
                    .map(|(name, t)| (values(t), values(after.tensor::<B, 2>(&name, device))))
                    .unzip();
                let distance = relative_distance(&got, &want);
                assert!(
                    distance < 1e-3,
                    "{name}: the adapter after ten steps is off by {distance:e} of its norm"
                );
            }
        }
    }
}

#[test]
fn cpu_forward_is_that_of_transformers() {
    check_forward::<Flex>(&Default::default());
}

#[test]
fn cpu_first_gradients_are_those_of_trl() {
    check_first_gradients::<Flex>(&Default::default());
}

#[test]
fn cpu_trajectories_are_those_of_trl() {
    check_trajectories::<Flex>(&Default::default());
}

#[test]
fn gpu_forward_is_that_of_transformers() {
    if let Some(device) = adapter() {
        check_forward::<Wgpu>(&device);
    }
}

#[test]
fn gpu_first_gradients_are_those_of_trl() {
    if let Some(device) = adapter() {
        check_first_gradients::<Wgpu>(&device);
    }
}

#[test]
fn gpu_trajectories_are_those_of_trl() {
    if let Some(device) = adapter() {
        check_trajectories::<Wgpu>(&device);
    }
}

/// A run of one case in fp16, its log and what it came to.
fn train_in_fp16(
    case: &Case,
    config: LossScaleConfig,
    max_steps: Option<usize>,
    device: &WgpuDevice,
) -> (orpo_wgpu::error::Result<Summary>, Vec<Map<String, Value>>) {
    let (mut model, lora_config) = case.adapted_in::<Wgpu>(DType::F16, device);
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
#[test]
fn gpu_trajectories_in_fp16_are_near_those_of_trl() {
    let Some(device) = adapter() else { return };
    for name in ["gqa", "odd"] {
        let case = Case::open(name);
        let (summary, log) = train_in_fp16(&case, LossScaleConfig::default(), None, &device);
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

/// A scale that overflows costs steps, each of which lowers it, and updates nothing meanwhile. These scales are larger than the command
/// line takes, so that the small model overflows.
#[test]
fn a_loss_scale_that_overflows_falls_until_it_fits() {
    let Some(device) = adapter() else { return };
    let case = Case::open(CASES[0]);
    let config =
        LossScaleConfig { init_scale: 1e9, backoff_factor: 1.0 / 64.0, ..LossScaleConfig::default() };
    let (summary, log) = train_in_fp16(&case, config, None, &device);
    let summary = summary.unwrap();
    assert!((1..10).contains(&summary.n_skipped), "{summary:?}");
    assert!(log.iter().any(|line| line["grad_norm"].is_null()), "a skipped step has no norm: {log:?}");
    let scales: Vec<f64> = log.iter().map(|line| line["loss_scale"].as_f64().unwrap()).collect();
    assert!(scales.is_sorted_by(|a, b| a >= b) && scales[0] > scales[9], "{scales:?}");
    assert!(summary.after.loss < summary.before.loss, "it trains all the same: {summary:?}");

    // One that has not fallen enough by the end has skipped every step, and nothing was trained.
    let config = LossScaleConfig { init_scale: 1e30, ..config };
    let error = train_in_fp16(&case, config, Some(2), &device).0.unwrap_err().to_string();
    assert!(error.contains("the adapter did not change: 2 steps were skipped"), "{error}");
    // One that has fallen to nothing ends the run and names the rows.
    let config = LossScaleConfig { backoff_factor: 1e-34, ..config };
    let error = train_in_fp16(&case, config, None, &device).0.unwrap_err();
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
    let (model, _) = case.adapted_in::<Wgpu>(DType::F16, &device);
    let small = 1e-6;
    let grads = |model: &Llama<Wgpu>, scale: f32| -> Vec<Vec<f32>> {
        let grads = forward_backward(model, &batch, beta, small * scale, Keep::Input).lora;
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
        let (mut model, lora_config) = case.adapted_in::<Wgpu>(DType::F16, &device);
        let state = from.map(|checkpoint| {
            lora::load(&mut model, checkpoint).unwrap();
            TrainerState::read(checkpoint, &model, &settings.plan).unwrap()
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
