//! The demo inside the binary: a tiny Llama, its tokenizer and its preference pairs, all made by `src/demo/make_demo.py`.
//!
//! The base answers short questions in English; a system prompt brings out that it knows the same answers in Chinese. The pairs prefer
//! Chinese answers with emoji, so training turns the default from one language to the other.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::data::dataset::{self, Dataset, Strictness};
use crate::data::tokenize::TextTokenizer;
use crate::error::Result;
use crate::model::LlamaConfig;
use crate::model::load::Checkpoint;

/// The name of the demo's model and of its data set, on the command line and in files.
pub const NAME: &str = "demo";

const CONFIG: &str = include_str!("demo/config.json");
const MODEL: &[u8] = include_bytes!("demo/model.safetensors");
const TOKENIZER: &[u8] = include_bytes!("demo/tokenizer.json");
const PAIRS: &str = include_str!("demo/pairs.jsonl");
const HELD_OUT: &str = include_str!("demo/held_out.jsonl");

/// The demo model's shape.
///
/// # Errors
/// None in a binary whose tests pass.
pub fn config() -> Result<LlamaConfig> {
    LlamaConfig::parse(CONFIG, Path::new("demo/config.json"))
}

/// The demo model's weights.
///
/// # Errors
/// None in a binary whose tests pass.
pub fn checkpoint() -> Result<Checkpoint> {
    Checkpoint::from_bytes(Arc::new(MODEL), Path::new("demo/model.safetensors"))
}

/// The files of the demo model's folder, but for its weights.
pub const FILES: [(&str, &[u8]); 2] = [("config.json", CONFIG.as_bytes()), ("tokenizer.json", TOKENIZER)];

/// The demo model's tokenizer.
///
/// # Errors
/// None in a binary whose tests pass.
pub fn tokenizer() -> Result<TextTokenizer> {
    TextTokenizer::from_bytes(TOKENIZER, "demo/tokenizer.json")
}

/// The rows to train on.
///
/// # Errors
/// None in a binary whose tests pass.
pub fn pairs() -> Result<Dataset> {
    dataset::parse_rows(PAIRS, Path::new("demo/pairs.jsonl"), &Default::default(), Strictness::Strict)
}

/// Rows whose questions are in none of the [`pairs`].
///
/// # Errors
/// None in a binary whose tests pass.
pub fn held_out() -> Result<Dataset> {
    dataset::parse_rows(HELD_OUT, Path::new("demo/held_out.jsonl"), &Default::default(), Strictness::Strict)
}

/// Settings that suit a model of a million weights, over the defaults, which suit one of eight billion.
pub fn settings() -> Map<String, Value> {
    let settings = json!({
        "learning_rate": 2e-3,
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1.0,
        "logging_steps": 5,
        "eval_steps": 20,
    });
    settings.as_object().cloned().unwrap_or_default()
}

/// Whether a text is mostly Chinese: more CJK characters than ASCII letters.
pub fn is_chinese(text: &str) -> bool {
    let cjk = text.chars().filter(|c| ('\u{4e00}'..='\u{9fff}').contains(c)).count();
    cjk > text.chars().filter(char::is_ascii_alphabetic).count()
}
