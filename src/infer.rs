//! Inference: a model and its adapter answer.
//!
//! ```text
//! sample    logits -> the next token
//! generate  prompt -> tokens, one by one, with a key-value cache
//! chat      questions -> answers as text: a conversation, a single prompt or a file of them
//! ```

pub mod chat;
pub mod generate;
pub mod prompts;
pub mod sample;
