//! `config.json`: the shape of a Llama model.

use std::path::Path;

use serde::Deserialize;

use crate::error::{Error, Result};

/// A Llama model's shape, every field resolved; names as in Hugging Face's `LlamaConfig`.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads; divides the number of query heads.
    pub num_key_value_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the frequencies are stretched beyond the trained context.
    pub rope_scaling: Option<Llama3RopeScaling>,
    /// Longest context the model was trained for, in tokens.
    pub max_position_embeddings: usize,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Token that opens a text, where the model has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
}

/// `rope_scaling` of type `llama3` (transformers, `_compute_llama3_parameters`).
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub struct Llama3RopeScaling {
    /// What long wavelengths are stretched by.
    pub factor: f64,
    /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_max_position_embeddings / high_freq_factor` stay as they are.
    pub high_freq_factor: f64,
    /// Context of the model before stretching, in tokens.
    pub original_max_position_embeddings: f64,
}

/// `config.json` as written; what transformers leaves out has its default there.
#[derive(Debug, Deserialize)]
struct ConfigFile {
    model_type: Option<String>,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<serde_json::Value>,
    rope_parameters: Option<serde_json::Value>,
    max_position_embeddings: usize,
    vocab_size: usize,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    hidden_act: Option<String>,
    quantization_config: Option<serde_json::Value>,
    bos_token_id: Option<TokenIds>,
    eos_token_id: Option<TokenIds>,
}

/// One token id or a list of them, as `eos_token_id` comes.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum TokenIds {
    One(u32),
    Many(Vec<u32>),
}

impl TokenIds {
    /// The ids as a list.
    pub(crate) fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

impl LlamaConfig {
    /// Shapes `[out, in]` of a layer's linears, in the order of [`LINEAR_NAMES`](super::llama::LINEAR_NAMES).
    pub fn linear_shapes(&self) -> [[usize; 2]; 7] {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        [
            [q, hidden],
            [kv, hidden],
            [kv, hidden],
            [hidden, q],
            [inner, hidden],
            [inner, hidden],
            [hidden, inner],
        ]
    }

    /// The number of weights of the whole model.
    pub fn n_weights(&self) -> usize {
        let linears: usize = self.linear_shapes().iter().map(|[n_out, n_in]| n_out * n_in).sum();
        let vocab = self.vocab_size * self.hidden_size;
        let matrices = if self.tie_word_embeddings { 1 } else { 2 };
        self.num_hidden_layers * (linears + 2 * self.hidden_size) + self.hidden_size + matrices * vocab
    }

    /// Reads a `config.json`.
    ///
    /// # Errors
    /// If the file cannot be read, is not such a configuration, or describes a model that this program does not compute: all
    /// reasons in one error.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        Self::parse(&text, path)
    }

    /// Parses the text of a `config.json`; `path` is for messages.
    ///
    /// # Errors
    /// See [`read`](Self::read).
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let file: ConfigFile = serde_json::from_str(text)
            .map_err(|e| Error::file(path, format!("is not a Llama configuration: {e}")))?;
        let mut problems = Vec::new();
        let mut require = |holds: bool, problem: String| {
            if !holds {
                problems.push(problem);
            }
        };
        let model_type = file.model_type.as_deref().unwrap_or("llama");
        require(model_type == "llama", format!("model_type is `{model_type}`, not `llama`"));
        require(!file.attention_bias, "attention_bias is true: linears with biases are not computed".into());
        require(!file.mlp_bias, "mlp_bias is true: linears with biases are not computed".into());
        let act = file.hidden_act.as_deref().unwrap_or("silu");
        require(act == "silu", format!("hidden_act is `{act}`, not `silu`"));
        require(
            file.quantization_config.is_none(),
            "the weights are quantised (quantization_config): take the unquantised model".into(),
        );
        let heads = file.num_attention_heads;
        let kv_heads = file.num_key_value_heads.unwrap_or(heads);
        require(
            kv_heads > 0 && heads.is_multiple_of(kv_heads),
            format!("num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}"),
        );
        let head_dim = file.head_dim.unwrap_or(file.hidden_size / heads.max(1));
        require(
            head_dim > 0 && head_dim.is_multiple_of(2),
            format!("head_dim {head_dim} is not a positive even number"),
        );
        let positive = [
            ("hidden_size", file.hidden_size),
            ("intermediate_size", file.intermediate_size),
            ("num_hidden_layers", file.num_hidden_layers),
            ("vocab_size", file.vocab_size),
        ];
        for (name, value) in positive {
            require(value > 0, format!("{name} is 0"));
        }
        // transformers 5 writes `rope_parameters` with the base inside, earlier versions `rope_theta` and `rope_scaling`.
        let rope = file.rope_parameters.as_ref().or(file.rope_scaling.as_ref());
        let rope_theta = file
            .rope_theta
            .or_else(|| rope.and_then(|r| r.get("rope_theta")).and_then(serde_json::Value::as_f64))
            .unwrap_or(10_000.0);
        let rope_scaling = match rope.map(parse_rope_scaling).transpose() {
            Ok(scaling) => scaling.flatten(),
            Err(problem) => {
                problems.push(problem);
                None
            }
        };
        if !problems.is_empty() {
            return Err(Error::file(path, problems.join("; "))
                .with_hint("this program computes Llama models as transformers' LlamaForCausalLM does"));
        }
        Ok(Self {
            hidden_size: file.hidden_size,
            intermediate_size: file.intermediate_size,
            num_hidden_layers: file.num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            rms_norm_eps: file.rms_norm_eps,
            rope_theta,
            rope_scaling,
            max_position_embeddings: file.max_position_embeddings,
            vocab_size: file.vocab_size,
            tie_word_embeddings: file.tie_word_embeddings,
            bos_token_id: file.bos_token_id.and_then(|ids| ids.into_vec().first().copied()),
            eos_token_ids: file.eos_token_id.map(TokenIds::into_vec).unwrap_or_default(),
        })
    }
}

fn parse_rope_scaling(value: &serde_json::Value) -> Result<Option<Llama3RopeScaling>, String> {
    let kind = value.get("rope_type").or_else(|| value.get("type")).and_then(serde_json::Value::as_str);
    match kind {
        None | Some("default") => Ok(None),
        Some("llama3") => serde_json::from_value(value.clone())
            .map(Some)
            .map_err(|e| format!("rope_scaling of type llama3 is incomplete: {e}")),
        Some(other) => Err(format!("rope_scaling of type `{other}` is not computed, only `llama3`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA3: &str = r#"{"model_type":"llama","hidden_size":4096,"intermediate_size":14336,"num_hidden_layers":32,
        "num_attention_heads":32,"num_key_value_heads":8,"rms_norm_eps":1e-5,"rope_theta":500000.0,
        "max_position_embeddings":8192,"vocab_size":128256,"bos_token_id":128000,"eos_token_id":[128001,128009]}"#;

    fn parse(text: &str) -> Result<LlamaConfig> {
        LlamaConfig::parse(text, Path::new("config.json"))
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let config = parse(LLAMA3).unwrap();
        assert_eq!((config.head_dim, config.rope_theta, config.tie_word_embeddings), (128, 500_000.0, false));
        assert_eq!((config.rope_scaling, config.eos_token_ids), (None, vec![128_001, 128_009]));
    }

    #[test]
    fn rope_is_read_in_the_form_of_either_transformers_version() {
        let scaling = r#"{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,
            "original_max_position_embeddings":8192,"rope_theta":10.0}"#;
        let old = LLAMA3.replace("\"vocab_size\"", &format!("\"rope_scaling\":{scaling},\"vocab_size\""));
        let new = old.replace("\"rope_theta\":500000.0,", "").replace("rope_scaling", "rope_parameters");
        assert_eq!(parse(&old).unwrap().rope_theta, 500_000.0);
        assert_eq!(parse(&new).unwrap().rope_theta, 10.0);
        assert_eq!(parse(&old).unwrap().rope_scaling, parse(&new).unwrap().rope_scaling);
        assert_eq!(parse(&old).unwrap().rope_scaling.unwrap().factor, 8.0);
    }

    #[test]
    fn a_model_that_is_not_computed_is_refused_with_every_reason() {
        let text = LLAMA3.replace("\"llama\"", "\"qwen2\"").replace(
            "\"vocab_size\"",
            r#""attention_bias":true,"rope_scaling":{"type":"yarn"},"vocab_size""#,
        );
        let message = parse(&text).unwrap_err().to_string();
        for reason in ["qwen2", "attention_bias", "yarn"] {
            assert!(message.contains(reason), "{message} should name {reason}");
        }
    }
}
