//! Adapters as PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! PEFT stores `lora_A.weight` as `[r, in]` and `lora_B.weight` as `[out, r]`, under
//! `base_model.model.model.layers.{i}.{module}`; so does this program.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Tensor, backend::Backend};
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;

use super::{LoraConfig, last_name, ranks, target_modules, targeted, tensors};
use crate::error::{Error, Result};
use crate::model::Llama;
use crate::model::llama::LINEAR_NAMES;
use crate::model::load::Checkpoint;
use crate::ops::lora_linear::Lora;
use crate::ops::read::read;

/// The file of an adapter's tensors.
pub const ADAPTER_FILE: &str = "adapter_model.safetensors";
/// The file of an adapter's settings.
pub const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";

/// `adapter_config.json` as PEFT writes it; what changes the computation and is not computed here must be off.
#[derive(Debug, Deserialize)]
struct AdapterConfigFile {
    peft_type: Option<String>,
    base_model_name_or_path: Option<String>,
    r: usize,
    lora_alpha: f64,
    target_modules: Option<serde_json::Value>,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    bias: Option<String>,
    modules_to_save: Option<Vec<String>>,
    #[serde(default)]
    rank_pattern: BTreeMap<String, usize>,
    #[serde(default)]
    alpha_pattern: BTreeMap<String, f64>,
    init_lora_weights: Option<serde_json::Value>,
    alora_invocation_tokens: Option<Vec<u32>>,
}

/// An adapter as its `adapter_config.json` has it.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredConfig {
    /// Rank, but for modules that have one of their own.
    pub r: usize,
    /// As in [`LoraConfig`].
    pub lora_alpha: f64,
    /// The modules' last names; none where the file has a regular expression, as PEFT takes it.
    pub target_modules: Option<Vec<String>>,
    /// See [`ranks`]; the most that there can be.
    pub ranks: [usize; LINEAR_NAMES.len()],
}

/// Reads what an adapter folder's `adapter_config.json` says of it, without its tensors.
///
/// # Errors
/// As [`load`].
pub fn stored_config(folder: &Path) -> Result<StoredConfig> {
    let AdapterConfigFile { r, lora_alpha, target_modules: modules, rank_pattern, .. } = read_config(folder)?;
    let modules = modules.as_ref().and_then(serde_json::Value::as_array);
    let target_modules = modules.map(|modules| {
        let names = modules.iter().filter_map(|module| module.as_str());
        names.map(|name| last_name(name).to_owned()).collect::<Vec<_>>()
    });
    let most = rank_pattern.values().copied().fold(r, usize::max);
    let ranks = match &target_modules {
        Some(modules) => ranks(most, modules),
        None => [most; LINEAR_NAMES.len()],
    };
    Ok(StoredConfig { r, lora_alpha, target_modules, ranks })
}

/// The base model that an adapter folder's `adapter_config.json` names, and a check that the adapter is one that is computed, before a
/// model is loaded in vain.
///
/// # Errors
/// As [`load`].
pub fn base_model(folder: &Path) -> Result<Option<String>> {
    Ok(read_config(folder)?.base_model_name_or_path)
}

fn read_config(folder: &Path) -> Result<AdapterConfigFile> {
    if !folder.is_dir() {
        let problem = if folder.exists() { "it is not a folder" } else { "there is no such folder" };
        return Err(Error::file(folder, format!("is not an adapter folder: {problem}")).with_hint(format!(
            "name a run, one of its checkpoints, or another folder that holds {ADAPTER_CONFIG_FILE} and {ADAPTER_FILE}"
        )));
    }
    let config_path = folder.join(ADAPTER_CONFIG_FILE);
    if !config_path.exists() {
        return Err(Error::file(folder, format!("holds no {ADAPTER_CONFIG_FILE}"))
            .with_hint("name an adapter, or a run that has saved a checkpoint"));
    }
    let text = std::fs::read_to_string(&config_path).map_err(Error::io("read", &config_path))?;
    let config: AdapterConfigFile = serde_json::from_str(&text)
        .map_err(|e| Error::file(&config_path, format!("is not a LoRA configuration: {e}")))?;
    check_kind(&config).map_err(|problem| Error::file(&config_path, problem))?;
    Ok(config)
}

/// Loads a PEFT adapter folder into the model.
///
/// Which modules carry the adapter, and each one's rank, is read from the tensors.
///
/// # Errors
/// If the folder or a file is missing or damaged, the adapter is of a kind that is not computed, or its tensors do not fit the model.
pub fn load<B: Backend>(model: &mut Llama<B>, folder: &Path) -> Result<LoraConfig> {
    let device = model.device();
    let all = target_modules(&["ALL".to_owned()])?;
    let linears: Vec<_> = targeted(model, &all).map(|(name, linear)| (name, linear.weight.dims())).collect();
    let StoredAdapter { config, checkpoint, modules } = StoredAdapter::open(folder, &linears)?;
    let mut target_modules: Vec<String> = Vec::new();
    let mut modules = modules.into_iter().peekable();
    for (name, linear) in targeted(model, &all) {
        if let Some(StoredModule { a, b, scale, .. }) = modules.next_if(|next| next.name == name) {
            let (a, b) = (checkpoint.tensor(&a, &device), checkpoint.tensor(&b, &device));
            linear.lora = Some(Lora { a, b, scale });
            let module = last_name(&name).to_owned();
            if !target_modules.contains(&module) {
                target_modules.push(module);
            }
        }
    }
    Ok(LoraConfig { r: config.r, lora_alpha: config.lora_alpha, target_modules })
}

/// An adapter folder that fits a model and is not read yet.
pub(super) struct StoredAdapter {
    config: AdapterConfigFile,
    pub(super) checkpoint: Checkpoint,
    /// In the order of the model's linears.
    pub(super) modules: Vec<StoredModule>,
}

/// A linear's part of an adapter: its full name, those of A and B, and what their product is scaled by.
pub(super) struct StoredModule {
    pub(super) name: String,
    pub(super) a: String,
    pub(super) b: String,
    pub(super) scale: f32,
}

impl StoredAdapter {
    /// Opens that of a model with these linears, by full name and shape `[out, in]`.
    ///
    /// # Errors
    /// As [`load`].
    pub(super) fn open(folder: &Path, linears: &[(String, [usize; 2])]) -> Result<Self> {
        let config = read_config(folder)?;
        let weights_path = folder.join(ADAPTER_FILE);
        let checkpoint = Checkpoint::open_file(&weights_path)?;
        let (mut expected, mut modules) = (Vec::new(), Vec::new());
        for (name, [n_out, n_in]) in linears {
            let [a, b] = ["lora_A", "lora_B"].map(|part| format!("base_model.model.{name}.{part}.weight"));
            if [&a, &b].iter().all(|name| checkpoint.shape(name).is_none()) {
                continue;
            }
            let r = pattern_value(&config.rank_pattern, name).unwrap_or(config.r);
            let alpha = pattern_value(&config.alpha_pattern, name).unwrap_or(config.lora_alpha);
            let denominator = if config.use_rslora { (r as f64).sqrt() } else { r as f64 };
            expected.push((a.clone(), vec![r, *n_in]));
            expected.push((b.clone(), vec![*n_out, r]));
            modules.push(StoredModule { name: name.clone(), a, b, scale: (alpha / denominator) as f32 });
        }
        let mut fits = checkpoint.check(&expected, |_| false);
        if fits.is_ok() && modules.is_empty() {
            fits = Err(Error::file(&weights_path, "holds no LoRA tensors of this model's layers"));
        }
        fits.map_err(|error| match &config.base_model_name_or_path {
            Some(base) => {
                error.with_hint(format!("{ADAPTER_CONFIG_FILE} names `{base}` as the model it belongs to"))
            }
            None => error,
        })?;
        Ok(Self { config, checkpoint, modules })
    }
}

/// The value of the first key that is the module's name or its end after a dot, as PEFT matches plain keys.
fn pattern_value<T: Copy>(pattern: &BTreeMap<String, T>, module: &str) -> Option<T> {
    let matches =
        |key: &str| module.strip_suffix(key).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    pattern.iter().find(|(key, _)| matches(key)).map(|(_, value)| *value)
}

fn check_kind(config: &AdapterConfigFile) -> Result<(), String> {
    let kind = config.peft_type.as_deref().unwrap_or("LORA");
    let bias = config.bias.as_deref().unwrap_or("none");
    let saved = config.modules_to_save.as_deref().unwrap_or_default();
    // These change the base weights as PEFT loads them.
    let init = config.init_lora_weights.as_ref().and_then(serde_json::Value::as_str).unwrap_or_default();
    let changes_base =
        ["pissa", "olora", "corda", "loftq"].iter().any(|name| init.to_lowercase().starts_with(name));
    // PEFT reads keys as regular expressions; plain names are all that is read here.
    let mut keys = config.rank_pattern.keys().chain(config.alpha_pattern.keys());
    let regex = keys.find(|key| !key.chars().all(|c| c.is_ascii_alphanumeric() || "._".contains(c)));
    if kind != "LORA" {
        Err(format!("peft_type is `{kind}`, only LORA is computed"))
    } else if config.use_dora {
        Err("use_dora is true: DoRA is not computed".to_owned())
    } else if config.alora_invocation_tokens.is_some() {
        Err("alora_invocation_tokens is given: adapters that begin behind a text are not computed".to_owned())
    } else if bias != "none" {
        Err(format!("bias is `{bias}`: adapters with biases are not computed"))
    } else if !saved.is_empty() {
        Err(format!("modules_to_save names {}: whole saved modules are not read", saved.join(", ")))
    } else if changes_base {
        Err(format!(
            "init_lora_weights is `{init}`, which changes the base model: convert it with PEFT's save_pretrained first"
        ))
    } else if let Some(key) = regex {
        Err(format!("the pattern `{key}` is a regular expression: only module names are read"))
    } else if config.r == 0 {
        Err("r is 0".to_owned())
    } else if let Some((name, _)) = config.rank_pattern.iter().find(|(_, r)| **r == 0) {
        Err(format!("rank_pattern has a rank of 0 for {name}"))
    } else {
        Ok(())
    }
}

/// Writes named tensors as a safetensors file in `f32`.
///
/// # Errors
/// If the device cannot be read or the file cannot be written.
pub fn write_safetensors<B: Backend>(path: &Path, tensors: &[(String, Tensor<B, 2>)]) -> Result<()> {
    let mut stored = Vec::new();
    for (name, tensor) in tensors {
        let bytes: Vec<u8> = read(tensor.clone())?.iter().flat_map(|v| v.to_le_bytes()).collect();
        stored.push((name, tensor.dims().to_vec(), bytes));
    }
    let views: Result<Vec<_>, _> = stored
        .iter()
        .map(|(name, shape, bytes)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect();
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let bytes = views
        .and_then(|views| safetensors::serialize(views, Some(metadata)))
        .map_err(|e| Error::file(path, format!("cannot be serialised: {e}")))?;
    std::fs::write(path, bytes).map_err(Error::io("write", path))
}

/// Writes the adapter in PEFT's format into an existing folder.
///
/// # Errors
/// See [`write_safetensors`].
pub fn save<B: Backend>(
    model: &Llama<B>,
    config: &LoraConfig,
    base_model: &str,
    folder: &Path,
) -> Result<()> {
    write_safetensors(&folder.join(ADAPTER_FILE), &tensors(model))?;
    // An adapter that was loaded with patterns or rank-stabilised scaling keeps each module's own rank and scale.
    let (mut rank_pattern, mut alpha_pattern) = (BTreeMap::new(), BTreeMap::new());
    for (layer, decoder) in model.layers.iter().enumerate() {
        for (module, linear) in decoder.linears() {
            let Some(lora) = &linear.lora else { continue };
            let r = lora.a.dims()[0];
            let alpha = if r == config.r && lora.scale == (config.lora_alpha / r as f64) as f32 {
                config.lora_alpha
            } else {
                f64::from(lora.scale) * r as f64
            };
            let name = format!("model.layers.{layer}.{module}");
            if r != config.r {
                rank_pattern.insert(name.clone(), r);
            }
            if alpha != config.lora_alpha {
                alpha_pattern.insert(name, alpha);
            }
        }
    }
    let written = serde_json::json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": config.target_modules,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_to_transform": null,
        "layers_pattern": null,
        "modules_to_save": null,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": false,
        "use_dora": false,
        "revision": null,
    });
    let path = folder.join(ADAPTER_CONFIG_FILE);
    std::fs::write(&path, format!("{written:#}\n")).map_err(Error::io("write", &path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_computed_otherwise_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |field: &str| {
            let text = format!("{{\"peft_type\": \"LORA\", \"r\": 8, \"lora_alpha\": 32{field}}}");
            std::fs::write(folder.path().join(ADAPTER_CONFIG_FILE), text).unwrap();
            base_model(folder.path()).map(drop).map_err(|error| error.to_string())
        };
        assert_eq!(refused(", \"alora_invocation_tokens\": null, \"use_dora\": false"), Ok(()));
        for (field, says) in [
            (", \"use_dora\": true", "use_dora is true"),
            (", \"bias\": \"all\"", "bias is `all`"),
            (", \"modules_to_save\": [\"lm_head\"]", "modules_to_save names lm_head"),
            (", \"init_lora_weights\": \"pissa_niter_4\"", "which changes the base model"),
            (", \"alora_invocation_tokens\": [1, 2]", "alora_invocation_tokens is given"),
            (", \"rank_pattern\": {\"layers.[0-3]\": 4}", "is a regular expression"),
            (", \"rank_pattern\": {\"q_proj\": 0}", "has a rank of 0 for q_proj"),
        ] {
            let error = refused(field).unwrap_err();
            assert!(error.contains(ADAPTER_CONFIG_FILE) && error.contains(says), "{field}: {error}");
        }
    }
}
