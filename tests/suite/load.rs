//! Models in either dtype: loaded and random.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use burn::tensor::DType;
use burn::tensor::backend::Backend;
use burn_flex::Flex;
use burn_wgpu::Wgpu;
use orpo_wgpu::data::batch::{LossCompat, pack};
use orpo_wgpu::data::dataset::Location;
use orpo_wgpu::data::tokenize::TokenizedPair;
use orpo_wgpu::demo;
use orpo_wgpu::lora::{self, LoraConfig};
use orpo_wgpu::model::attention::AttentionLayout;
use orpo_wgpu::model::llama::{Keep, LINEAR_NAMES};
use orpo_wgpu::model::load::{Checkpoint, Flaws, load_llama};
use orpo_wgpu::model::{Llama, LlamaConfig, Precision};
use orpo_wgpu::ops::Kernels;
use orpo_wgpu::ops::quantize::Storage;
use orpo_wgpu::ops::read::read;
use orpo_wgpu::train::step::{DeviceBatch, forward_backward};

use crate::support::{adapter, assert_close, left_out};
use crate::workplace::fixture;

fn tiny() -> LlamaConfig {
    LlamaConfig { num_hidden_layers: 2, vocab_size: 301, ..demo::config().unwrap() }
}

fn check_dtypes<B: Backend>(model: &Llama<B>, dtype: DType, shard_bytes: usize) {
    for layer in &model.layers {
        assert!(layer.linears().iter().all(|(_, linear)| linear.weight.dtype() == dtype));
        for norm in [&layer.input_layernorm, &layer.post_attention_layernorm] {
            assert_eq!((norm.weight.dtype(), norm.dtype), (DType::F32, dtype));
        }
    }
    assert_eq!((model.norm.weight.dtype(), model.norm.dtype), (DType::F32, DType::F32), "the final norm");
    let shards = &model.lm_head.shards;
    let bytes = |i: usize| shards[i].dims().iter().product::<usize>() * dtype.size();
    assert!(
        shards.len() > 1 && (0..shards.len()).all(|i| bytes(i) <= shard_bytes),
        "shards within their bytes"
    );
    assert_eq!(bytes(0), shard_bytes, "a shard as large as it may be");
    assert!(shards.iter().all(|shard| shard.dtype() == dtype));
    assert_eq!(model.lm_head.vocab_size(), model.config.vocab_size);
}

#[test]
fn a_loaded_model_keeps_its_matrices_in_the_dtype_that_was_asked_for() {
    let (checkpoint, config) = (demo::checkpoint().unwrap(), demo::config().unwrap());
    let shard_bytes = 100 * 4 * config.hidden_size;
    let [full, half, brain] = [DType::F32, DType::F16, DType::BF16].map(|dtype| {
        let model = load_llama::<Flex>(
            &checkpoint,
            &config,
            Precision::dense(dtype),
            shard_bytes,
            &Default::default(),
        )
        .unwrap();
        check_dtypes(&model, dtype, shard_bytes);
        let tokens: Vec<u32> = (3..40).collect();
        let layout = AttentionLayout::causal(&config, 0, tokens.len(), &Default::default());
        let logits = model.lm_head.logits(model.forward(&tokens, &layout));
        logits.into_data().to_vec::<f32>().unwrap()
    });
    let largest = full.iter().fold(0f32, |max, v| max.max(v.abs()));
    assert_close(&half, &full, 1e-2 * largest, 0.0, "logits in halves");
    assert_close(&brain, &full, 5e-2 * largest, 0.0, "logits in brain floats");
}

/// A checkpoint of the demo's shapes with some weights of bf16's range.
fn wide_checkpoint(wide: &[(&str, &[f32])]) -> Checkpoint {
    let demo = demo::checkpoint().unwrap();
    let tensors = demo.names().map(|name| {
        let shape = demo.shape(name).unwrap().to_vec();
        let mut values = vec![0.01f32; shape.iter().product()];
        let special = wide.iter().filter(|(tensor, _)| *tensor == name).flat_map(|(_, values)| *values);
        values.iter_mut().zip(special).for_each(|(value, &special)| *value = special);
        let bytes: Vec<u8> = values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
        (name.to_owned(), shape, bytes)
    });
    let tensors: Vec<_> = tensors.collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, shape.clone(), bytes).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    Checkpoint::from_bytes(Arc::new(bytes), Path::new("wide.safetensors")).unwrap()
}

#[test]
fn what_halves_do_not_hold_is_counted_and_refused() {
    const UP: &str = "model.layers.0.mlp.up_proj.weight";
    const DOWN: &str = "model.layers.1.mlp.down_proj.weight";
    let config = demo::config().unwrap();
    let load_as = |checkpoint: &Checkpoint, precision| {
        load_llama::<Flex>(checkpoint, &config, precision, 1 << 20, &Default::default()).map(drop)
    };
    let load = |checkpoint: &Checkpoint, dtype| load_as(checkpoint, Precision::dense(dtype));
    // 2⁻²⁵ is halfway between 0 and the least number above it, and rounds to the even one; 0 was 0 before.
    let tiny: &[f32] = &[1e-8, -1e-30, 2f32.powi(-25), 2f32.powi(-24), 0.0];
    let small = wide_checkpoint(&[(UP, tiny)]);
    load(&small, DType::F16).unwrap();
    assert_eq!(small.flaws(), Flaws { n_flushed: 3, ..Flaws::default() });

    let large = wide_checkpoint(&[(UP, &[65_280.0, -65_536.0]), (DOWN, &[1e6, -3e38])]);
    let error = load(&large, DType::F16).unwrap_err().to_string();
    assert!(
        error.contains("3 weights in 2 tensors") && error.contains(&format!("1 of them in `{UP}`")),
        "{error}"
    );
    load(&wide_checkpoint(&[(DOWN, &[1e6])]), DType::F32).unwrap();
    // Codes hold it; the f16 that they are made for a product does not.
    for linears in [Storage::Int8, Storage::Nf4] {
        let precision = Precision { linears, ..Precision::dense(DType::F16) };
        let error = load_as(&wide_checkpoint(&[(DOWN, &[1e6])]), precision).unwrap_err().to_string();
        assert!(error.contains(&format!("1 of them in `{DOWN}`")), "{linears:?}: {error}");
    }
}

#[test]
fn weights_that_are_no_numbers_are_refused_in_every_precision() {
    const UP: &str = "model.layers.0.mlp.up_proj.weight";
    let config = demo::config().unwrap();
    use Storage::{Bf16, F16, F32, Int8, Nf4, PackedF16};
    for storage in [F32, F16, Bf16, PackedF16, Int8, Nf4] {
        let checkpoint = wide_checkpoint(&[(UP, &[f32::NAN, 1.0, f32::NEG_INFINITY])]);
        let dtype = match storage {
            F16 => DType::F16,
            Bf16 => DType::BF16,
            _ => DType::F32,
        };
        let precision = Precision { dtype, linears: storage, head: storage };
        let error = load_llama::<Flex>(&checkpoint, &config, precision, 1 << 20, &Default::default());
        let error = error.map(drop).unwrap_err().to_string();
        assert!(
            error.contains(
                "2 weights in 1 tensors are no finite numbers; 2 of them in `model.layers.0.mlp.up"
            ),
            "{storage:?}: {error}"
        );
    }
}

#[test]
fn a_listener_hears_of_every_byte_that_is_read() {
    let demo = (wide_checkpoint(&[]), demo::config().unwrap(), 2);
    let folder = fixture("gqa/model");
    let gqa_config = LlamaConfig::read(&folder.join("config.json")).unwrap();
    let gqa = (Checkpoint::open_folder(&folder).unwrap(), gqa_config, 4);
    assert!(demo.1.tie_word_embeddings && !gqa.1.tie_word_embeddings, "one of each kind");
    let quantised = Precision { dtype: DType::F32, linears: Storage::Nf4, head: Storage::PackedF16 };
    for ((checkpoint, config, width), precision) in [(demo, quantised), (gqa, Precision::dense(DType::F32))] {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let checkpoint = checkpoint.on_read({
            let heard = heard.clone();
            move |read_bytes, total_bytes| heard.lock().unwrap().push((read_bytes, total_bytes))
        });
        let shard_bytes = 100 * 4 * config.hidden_size;
        load_llama::<Flex>(&checkpoint, &config, precision, shard_bytes, &Default::default()).unwrap();
        // An embedding that is not the head as well stays in its file.
        let embedding = if config.tie_word_embeddings { 0 } else { config.vocab_size * config.hidden_size };
        let total = ((config.n_weights() - embedding) * width) as u64;
        let heard = heard.lock().unwrap();
        assert!(heard.windows(2).all(|pair| pair[0].0 < pair[1].0), "bytes only grow: {heard:?}");
        assert!(heard.iter().all(|&(_, of)| of == total), "{total} bytes in all: {heard:?}");
        assert_eq!((heard.last().unwrap().0, checkpoint.read_bytes()), (total, total));
        assert!(heard.len() > 9 * config.num_hidden_layers + 2, "the head comes in pieces: {}", heard.len());
    }
}

/// Bytes of this process that belong to no file.
fn anonymous_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn loading_takes_little_memory_beside_the_model() {
    /// Names a checkpoint to the process that loads it and does nothing else.
    const CHECKPOINT: &str = "ORPO_WGPU_TEST_CHECKPOINT";
    const PEAK: &str = "most beside the model: ";
    if !cfg!(target_os = "linux") {
        return left_out("only Linux says how much of a process's memory is no file's");
    }
    let config = LlamaConfig {
        hidden_size: 512,
        intermediate_size: 1024,
        num_hidden_layers: 8,
        num_attention_heads: 8,
        num_key_value_heads: 8,
        head_dim: 64,
        vocab_size: 512,
        ..demo::config().unwrap()
    };
    let model_bytes = 2 * config.n_weights() as u64;
    if let Some(path) = std::env::var_os(CHECKPOINT) {
        let before = anonymous_bytes();
        let peak = Arc::new(AtomicU64::new(0));
        let checkpoint = Checkpoint::open_file(Path::new(&path)).unwrap().on_read({
            let peak = peak.clone();
            move |read_bytes, _| {
                // Two bytes a weight in the file and in the model: what was read is what has to be there.
                let beside = anonymous_bytes().saturating_sub(before + read_bytes);
                peak.fetch_max(beside, Ordering::Relaxed);
            }
        });
        load_llama::<Flex>(&checkpoint, &config, Precision::dense(DType::F16), 1 << 20, &Default::default())
            .unwrap();
        println!("{PEAK}{}", peak.load(Ordering::Relaxed));
        return;
    }

    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, config.hidden_size]),
        ("model.norm.weight".to_owned(), vec![config.hidden_size]),
    ];
    for layer in 0..config.num_hidden_layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let norms = ["input_layernorm", "post_attention_layernorm"];
        shapes.extend(norms.map(|part| (name(part), vec![config.hidden_size])));
        let linears = LINEAR_NAMES.iter().zip(config.linear_shapes());
        shapes.extend(linears.map(|(part, shape)| (name(part), shape.to_vec())));
    }
    let zeros = vec![0; 2 * config.hidden_size * config.intermediate_size];
    let views = shapes.iter().map(|(name, shape)| {
        let bytes = &zeros[..2 * shape.iter().product::<usize>()];
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, shape.clone(), bytes).unwrap())
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
    assert!(path.metadata().unwrap().len() > model_bytes, "the whole model is in the file");

    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "load::loading_takes_little_memory_beside_the_model", "--nocapture"])
        .env(CHECKPOINT, &path)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let peak = said.lines().find_map(|line| line.split_once(PEAK)).expect("the child says its peak").1;
    let (peak, largest) = (peak.parse::<u64>().unwrap(), zeros.len() as u64);
    // The process itself grows a little, and what was freed may not be given back at once.
    let limit = 6 * largest;
    assert!(5 * limit < model_bytes, "a second model of {model_bytes} bytes is far above {limit}");
    assert!(
        peak <= limit,
        "{peak} bytes beside a model of {model_bytes}, whose largest tensor has {largest}"
    );
}

fn check_random<B: Kernels>(dtype: DType, device: &B::Device) {
    let config = tiny();
    let shard_bytes = 100 * dtype.size() * config.hidden_size;
    let mut model = Llama::<B>::random(&config, Precision::dense(dtype), shard_bytes, device);
    check_dtypes(&model, dtype, shard_bytes);
    let weights =
        model.layers[0].mlp.up_proj.weight.to_dense().into_data().convert::<f32>().to_vec::<f32>().unwrap();
    let deviation = (weights.iter().map(|w| w * w).sum::<f32>() / weights.len() as f32).sqrt();
    assert!((0.018..0.022).contains(&deviation), "standard deviation {deviation}");
    let row = |id| model.embed_tokens.gather(&[id], dtype);
    assert_ne!(row(0), row(1));

    let target_modules = lora::target_modules(&["ALL".to_owned()]).unwrap();
    lora::attach(&mut model, &LoraConfig { r: 4, lora_alpha: 8.0, target_modules }, 1);
    let location = Location::new(Path::new("random"), 1);
    let pair =
        TokenizedPair { prompt: vec![1, 2, 3], chosen: vec![4, 5], rejected: vec![6, 300, 8], location };
    let grads = forward_backward(
        &model,
        DeviceBatch::new(&model, &pack(&[&pair], LossCompat::Trl)),
        0.1,
        1.0,
        Keep::All,
    );
    assert!(read(grads.stats).unwrap().iter().all(|value| value.is_finite()), "the loss is finite");
    let db = grads.lora[1].clone().into_data().to_vec::<f32>().unwrap();
    assert!(db.iter().all(|g| g.is_finite()) && db.iter().any(|&g| g != 0.0), "the adapter has a gradient");
}

#[test]
fn a_random_model_trains_on_the_cpu() {
    check_random::<Flex>(DType::F32, &Default::default());
}

#[test]
fn a_random_model_of_halves_trains_on_the_cpu() {
    check_random::<Flex>(DType::F16, &Default::default());
}

#[test]
fn a_random_model_of_brain_floats_trains_on_the_cpu() {
    check_random::<Flex>(DType::BF16, &Default::default());
}

#[test]
fn a_random_model_trains_on_the_gpu() {
    if let Some(device) = adapter() {
        check_random::<Wgpu>(DType::F32, &device);
    }
}
