//! ORPO + LoRA fine-tuning of Llama models on any GPU: the library behind the `orpo-wgpu` program.
//!
//! A training step, from top to bottom:
//!
//! ```text
//! data    rows -> pairs of token ids -> a packed batch: no padding, a pair's common prompt once
//! model   embed -> decoder layers, each run again in backward -> final norm, on the scored rows only
//! ops     token_logps: head, log-softmax and gather in chunks -> orpo_loss -> its gradient by every log-probability
//! train   backward through the layers -> clip by the global norm -> AdamW on the adapter
//! ```
//!
//! Shapes are written in words: `tokens` are the rows of a packed batch, `rows` those of them that are scored, `entries` the scored
//! (row, target) pairs, `pairs` the preferences; `hidden`, `vocab`, `heads`, `kv_heads`, `head_dim` are the model's, `r` the adapter's
//! rank. Weights are `[out, in]`, as the checkpoints store them.

pub mod cli;
pub mod config;
pub mod data;
pub mod demo;
pub mod device;
pub mod error;
mod fnv;
pub mod infer;
#[cfg(test)]
mod left_out;
mod lock;
pub mod lora;
pub mod model;
pub mod ops;
pub mod train;

mod shell;
mod words;
