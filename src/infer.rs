//! Inference: a model and its adapter answer.
//!
//! ```text
//! sample    logits -> the next token
//! generate  prompt -> tokens, one by one, with a key-value cache
//! chat      questions -> answers as text: a conversation or a single prompt
//! prompts   a file of questions -> answers
//! talk      the loop of a chat: what is typed or piped -> questions and commands
//! ```

pub mod chat;
pub mod generate;
pub mod prompts;
pub mod results;
pub mod sample;
pub mod talk;
