//! Preference data, from files on disk to the packed batches of a training step.
//!
//! ```text
//! dataset   files -> rows: query, response, rejected_response
//! draw      rows  -> those to train on and to validate with, in an order
//! template  row   -> pieces: control tokens and text, never mixed
//! tokenize  pieces -> token ids of a pair: prompt, chosen, rejected
//! batch     pairs -> one packed row of tokens and what is scored in it
//! prompts   a file -> prompts that are answered, not learned from
//! ```
//!
//! Everything here is host memory. A row that cannot be used is returned as [`dataset::Skipped`], with its file, line
//! and reason, by the stage that leaves it out: nothing is dropped in silence.

pub mod batch;
pub mod dataset;
pub mod draw;
pub mod prompts;
pub mod renames;
pub mod source;
pub mod spelling;
pub mod template;
pub mod tokenize;

mod json;
mod message;
mod row;
mod tokenizer;
