//! ORPO + LoRA fine-tuning of Llama models on any GPU.

pub mod cli;
pub mod config;
pub mod data;
pub mod demo;
pub mod device;
pub mod error;
pub mod infer;
pub mod lora;
pub mod model;
pub mod ops;
pub mod train;
