//! Shapes of published models by the registry's names, and a small one that suits a device in software.

use super::LlamaConfig;
use super::config::Llama3RopeScaling;

/// The names that [`preset`] knows, with what they stand for.
pub const PRESETS: [(&str, &str); 5] = [
    ("llama3-8b-instruct", "Meta-Llama-3-8B-Instruct"),
    ("llama3_1-8b-instruct", "Meta-Llama-3.1-8B-Instruct"),
    ("llama3_2-1b-instruct", "Llama-3.2-1B-Instruct"),
    ("llama3_2-3b-instruct", "Llama-3.2-3B-Instruct"),
    ("small", "4 layers of 512 with 32,000 tokens, for devices in software"),
];

/// The names with what they stand for, a line each.
pub fn list() -> String {
    PRESETS.map(|(name, what)| format!("{name:24} {what}")).join("\n")
}

/// [`preset`] of a `--model_type`.
///
/// # Errors
/// Says which names there are.
pub fn named(model_type: &str) -> Result<LlamaConfig, String> {
    preset(model_type).ok_or_else(|| {
        let names = PRESETS.map(|(name, _)| name).join(", ");
        format!("--model_type `{model_type}`: expected one of {names}")
    })
}

/// The shape that goes by a name (each model's published `config.json`).
pub fn preset(name: &str) -> Option<LlamaConfig> {
    let base = LlamaConfig {
        hidden_size: 4096,
        intermediate_size: 14_336,
        num_hidden_layers: 32,
        num_attention_heads: 32,
        num_key_value_heads: 8,
        head_dim: 128,
        rms_norm_eps: 1e-5,
        rope_theta: 500_000.0,
        rope_scaling: None,
        max_position_embeddings: 8192,
        vocab_size: 128_256,
        tie_word_embeddings: false,
        bos_token_id: Some(128_000),
        eos_token_ids: vec![128_001, 128_009],
    };
    let scaled = |factor: f64| {
        Some(Llama3RopeScaling {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        })
    };
    let long = LlamaConfig { max_position_embeddings: 131_072, ..base.clone() };
    match name {
        "llama3-8b-instruct" => Some(base),
        "llama3_1-8b-instruct" => Some(LlamaConfig { rope_scaling: scaled(8.0), ..long }),
        "llama3_2-1b-instruct" => Some(LlamaConfig {
            hidden_size: 2048,
            intermediate_size: 8192,
            num_hidden_layers: 16,
            head_dim: 64,
            rope_scaling: scaled(32.0),
            tie_word_embeddings: true,
            ..long
        }),
        "llama3_2-3b-instruct" => Some(LlamaConfig {
            hidden_size: 3072,
            intermediate_size: 8192,
            num_hidden_layers: 28,
            num_attention_heads: 24,
            rope_scaling: scaled(32.0),
            tie_word_embeddings: true,
            ..long
        }),
        "small" => Some(LlamaConfig {
            hidden_size: 512,
            intermediate_size: 1408,
            num_hidden_layers: 4,
            num_attention_heads: 8,
            num_key_value_heads: 2,
            head_dim: 64,
            vocab_size: 32_000,
            ..base
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_has_its_model_s_number_of_weights() {
        let millions = |name: &str| (preset(name).unwrap().n_weights() as f64 / 1e6).round() as u64;
        let counts = PRESETS.map(|(name, _)| millions(name));
        assert_eq!(counts, [8030, 8030, 1236, 3213, 44]);
    }
}
