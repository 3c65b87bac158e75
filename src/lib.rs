//! ORPO + LoRA fine-tuning of Llama models on any GPU.
pub mod error;
pub mod lora;
pub mod model;
pub mod ops;
pub mod data;
pub mod train;
pub mod config;
