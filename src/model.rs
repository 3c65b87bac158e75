//! Llama models as Hugging Face publishes them: the configuration, the layers and the loading of their weights.
//!
//! Fields and modules carry the checkpoint's names, so there is no table of renames. Everything runs on packed rows
//! `[tokens, hidden]`; there is no batch dimension and no padding.

pub mod attention;
pub mod config;
pub mod linear;
pub mod llama;
pub mod load;
pub mod mlp;
pub mod norm;
pub mod parts;
pub mod precision;
pub mod presets;
pub mod random;
pub mod rope;
pub mod stored;

pub use config::LlamaConfig;
pub use linear::Linear;
pub use llama::{DecoderLayer, Llama};
pub use precision::Precision;
