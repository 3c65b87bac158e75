//! Models in either dtype: loaded and random.

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
use orpo_wgpu::model::llama::Keep;
use orpo_wgpu::model::load::{Checkpoint, ToF16, load_llama};
use orpo_wgpu::model::{Llama, LlamaConfig, Precision};
use orpo_wgpu::ops::Kernels;
use orpo_wgpu::train::optim::read;
use orpo_wgpu::train::step::forward_backward;

use crate::support::{adapter, assert_close};

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
    let [full, half] = [DType::F32, DType::F16].map(|dtype| {
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
    Checkpoint::from_bytes(std::sync::Arc::new(bytes), std::path::Path::new("wide.safetensors")).unwrap()
}

#[test]
fn what_halves_do_not_hold_is_counted_and_refused() {
    const UP: &str = "model.layers.0.mlp.up_proj.weight";
    const DOWN: &str = "model.layers.1.mlp.down_proj.weight";
    let config = demo::config().unwrap();
    let load = |checkpoint: &Checkpoint, dtype| {
        load_llama::<Flex>(checkpoint, &config, Precision::dense(dtype), 1 << 20, &Default::default())
            .map(drop)
    };
    // 2⁻²⁵ is halfway between 0 and the least number above it, and rounds to the even one; 0 was 0 before.
    let tiny: &[f32] = &[1e-8, -1e-30, 2f32.powi(-25), 2f32.powi(-24), 0.0];
    let small = wide_checkpoint(&[(UP, tiny)]);
    load(&small, DType::F16).unwrap();
    assert_eq!(small.to_f16(), ToF16 { n_flushed: 3, ..ToF16::default() });

    let large = wide_checkpoint(&[(UP, &[65_280.0, -65_536.0]), (DOWN, &[1e6, -3e38])]);
    let error = load(&large, DType::F16).unwrap_err().to_string();
    assert!(
        error.contains("3 weights in 2 tensors") && error.contains(&format!("1 of them in `{UP}`")),
        "{error}"
    );
    load(&wide_checkpoint(&[(DOWN, &[1e6])]), DType::F32).unwrap();
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
    assert_ne!(model.embed_tokens.gather(&[0]), model.embed_tokens.gather(&[1]));

    let target_modules = lora::target_modules(&["ALL".to_owned()]).unwrap();
    lora::attach(&mut model, &LoraConfig { r: 4, lora_alpha: 8.0, target_modules }, 1);
    let location = Location { path: std::path::Path::new("random").into(), line: 1 };
    let pair =
        TokenizedPair { prompt: vec![1, 2, 3], chosen: vec![4, 5], rejected: vec![6, 300, 8], location };
    let grads = forward_backward(&model, &pack(&[&pair], LossCompat::Trl), 0.1, 1.0, Keep::All);
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
fn a_random_model_trains_on_the_gpu() {
    if let Some(device) = adapter() {
        check_random::<Wgpu>(DType::F32, &device);
    }
}
