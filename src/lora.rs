//! LoRA adapters: which linears carry one, how they start, and PEFT's files of them.
//!
//! An adapter's tensors have one order everywhere: by layer, by module in the checkpoint's order, A before B.

mod merge;
mod peft;

use burn::tensor::{Tensor, TensorData, backend::Backend};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::model::llama::LINEAR_NAMES;
use crate::model::{Linear, Llama};
use crate::ops::lora_linear::Lora;

pub use merge::{Merged, merge};
pub use peft::{
    ADAPTER_CONFIG_FILE, ADAPTER_FILE, StoredConfig, base_model, load, save, stored_config, write_safetensors,
};

/// The highest rank of a new adapter. Of more, an adapter is no longer small beside the matrices that it is added to.
pub const MAX_RANK: usize = 256;

/// What an adapter is, in PEFT's names; written as `adapter_config.json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// The update is scaled by `lora_alpha / r`.
    pub lora_alpha: f64,
    /// The modules' last names: `q_proj`, …
    pub target_modules: Vec<String>,
}

/// Resolves `--lora_target_modules`: `ALL` (every linear but `lm_head`) or module names.
///
/// # Errors
/// Names every unknown module and the known ones.
pub fn target_modules(names: &[String]) -> Result<Vec<String>> {
    let known: Vec<&str> = LINEAR_NAMES.iter().map(|name| last_name(name)).collect();
    let all = ["ALL", "all", "all-linear"];
    let is_known = |name: &&str| known.contains(name) || all.contains(name);
    let unknown: Vec<&str> = names.iter().map(String::as_str).filter(|n| !is_known(n)).collect();
    if !unknown.is_empty() || names.is_empty() {
        return Err(Error::config(format!(
            "--lora_target_modules: no module named `{}`",
            unknown.join("`, `")
        ))
        .with_hint(format!("the modules are ALL, or some of {}", known.join(", "))));
    }
    if names.iter().any(|name| all.contains(&name.as_str())) {
        return Ok(known.into_iter().map(str::to_owned).collect());
    }
    Ok(known.into_iter().filter(|k| names.iter().any(|n| n == k)).map(str::to_owned).collect())
}

fn last_name(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

/// Attaches fresh adapters: A uniform in `±1/sqrt(in)` (PEFT's Kaiming-uniform with `a = √5`), B zero.
///
/// The draws depend on the seed alone, not on the device.
pub fn attach<B: Backend>(model: &mut Llama<B>, config: &LoraConfig, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let device = model.device();
    for (_, linear) in targeted(model, &config.target_modules) {
        let [n_out, n_in] = linear.weight.dims();
        let bound = (n_in as f32).sqrt().recip();
        let a: Vec<f32> = (0..config.r * n_in).map(|_| rng.random_range(-bound..bound)).collect();
        linear.lora = Some(Lora {
            a: Tensor::from_data(TensorData::new(a, [config.r, n_in]), &device),
            b: Tensor::zeros([n_out, config.r], &device),
            scale: (config.lora_alpha / config.r as f64) as f32,
        });
    }
}

/// The linears of these modules with their full names, in order.
fn targeted<'a, B: Backend>(
    model: &'a mut Llama<B>,
    target_modules: &'a [String],
) -> impl Iterator<Item = (String, &'a mut Linear<B>)> {
    model.layers.iter_mut().enumerate().flat_map(move |(layer, decoder)| {
        decoder
            .linears_mut()
            .into_iter()
            .filter(|(name, _)| target_modules.iter().any(|target| target == last_name(name)))
            .map(move |(name, linear)| (format!("model.layers.{layer}.{name}"), linear))
    })
}

/// The adapter's tensors with their PEFT names, in order.
pub fn tensors<B: Backend>(model: &Llama<B>) -> Vec<(String, Tensor<B, 2>)> {
    let mut tensors = Vec::new();
    for (layer, decoder) in model.layers.iter().enumerate() {
        for (module, linear) in decoder.linears() {
            if let Some(lora) = &linear.lora {
                let name = |part| format!("base_model.model.model.layers.{layer}.{module}.{part}.weight");
                tensors.push((name("lora_A"), lora.a.clone()));
                tensors.push((name("lora_B"), lora.b.clone()));
            }
        }
    }
    tensors
}

/// [`tensors`] without their names.
pub fn parameters<B: Backend>(model: &Llama<B>) -> Vec<Tensor<B, 2>> {
    tensors(model).into_iter().map(|(_, tensor)| tensor).collect()
}

/// [`parameters`], to change.
pub fn tensors_mut<B: Backend>(model: &mut Llama<B>) -> Vec<&mut Tensor<B, 2>> {
    let linears = model.layers.iter_mut().flat_map(|decoder| decoder.linears_mut());
    let adapters = linears.filter_map(|(_, linear)| linear.lora.as_mut());
    adapters.flat_map(|lora| [&mut lora.a, &mut lora.b]).collect()
}

/// The rank of each linear of a layer, in the order of [`LINEAR_NAMES`], where these modules carry an adapter; 0 for none.
pub fn ranks(r: usize, target_modules: &[String]) -> [usize; LINEAR_NAMES.len()] {
    LINEAR_NAMES.map(|name| if target_modules.iter().any(|target| target == last_name(name)) { r } else { 0 })
}
