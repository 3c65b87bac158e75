//! Rows to token ids: the prompt, the chosen and the rejected answer of a pair.
//!
//! The prompt and the answers are encoded apart, so no token spans the boundary between them, and both answers follow
//! the very same prompt.

use std::fmt;
use std::str::FromStr;

use rayon::prelude::*;

use super::dataset::{Location, Row, Skipped, Strictness};
use super::template::{Renderer, Template};
pub use super::tokenizer::{DecodeStream, TextTokenizer};
use crate::error::{Error, Result};

/// A preference as token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizedPair {
    /// Everything up to the answer, at least one token.
    pub prompt: Vec<u32>,
    /// The chosen answer with the control token that ends it, unless it was cut.
    pub chosen: Vec<u32>,
    /// The rejected answer with the control token that ends it, unless it was cut.
    pub rejected: Vec<u32>,
    /// The row that the pair was made from.
    pub location: Location,
}

/// What happens to a pair of which the prompt and the longer answer exceed `max_length` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TruncationStrategy {
    /// `delete`: the pair is left out.
    Delete,
    /// `truncation_right`: the answers are cut (and lose the token that ends them), never the prompt. A pair whose
    /// prompt leaves no room for an answer is left out.
    TruncationRight,
}

impl TruncationStrategy {
    /// Both strategies, in the order of the help text.
    pub const ALL: [Self; 2] = [Self::Delete, Self::TruncationRight];

    /// The name that `--truncation_strategy` knows it by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Delete => "delete",
            Self::TruncationRight => "truncation_right",
        }
    }
}

impl fmt::Display for TruncationStrategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for TruncationStrategy {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|strategy| strategy.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::config(format!("--truncation_strategy `{name}`: expected {names}"))
        })
    }
}

/// Renders and encodes rows, in order: the pairs, and the rows that were left out.
///
/// `max_length` is in tokens and counts the prompt with one answer. `default_system` stands in for rows without a
/// system prompt of their own; a row's empty one counts as its own and means none.
///
/// # Errors
/// [`Error::File`] if the tokenizer lacks the template's control tokens; with [`Strictness::Strict`] [`Error::Row`]
/// for the first row that does not fit, or whose answers are equal once they are tokens.
pub fn tokenize_rows(
    rows: &[Row],
    tokenizer: &TextTokenizer,
    template: Template,
    max_length: usize,
    truncation: TruncationStrategy,
    default_system: Option<&str>,
    strict: Strictness,
) -> Result<(Vec<TokenizedPair>, Vec<Skipped>)> {
    let renderer = template.renderer(tokenizer)?;
    let encoded: Vec<_> = rows.par_iter().map(|row| encode(row, tokenizer, &renderer, default_system)).collect();
    let (mut pairs, mut skipped) = (Vec::with_capacity(rows.len()), Vec::new());
    for (row, encoded) in rows.iter().zip(encoded) {
        match fit(encoded?, max_length, truncation) {
            Ok(pair) => pairs.push(pair),
            Err(reason) => strict.reject(&mut skipped, row.location.clone(), reason)?,
        }
    }
    Ok((pairs, skipped))
}

fn encode(
    row: &Row,
    tokenizer: &TextTokenizer,
    renderer: &Renderer,
    default_system: Option<&str>,
) -> Result<TokenizedPair> {
    let system = row.system.as_deref().or(default_system);
    Ok(TokenizedPair {
        prompt: tokenizer.encode_pieces(&renderer.prompt(system, &row.history, &row.query))?,
        chosen: tokenizer.encode_pieces(&renderer.answer(&row.response))?,
        rejected: tokenizer.encode_pieces(&renderer.answer(&row.rejected_response))?,
        location: row.location.clone(),
    })
}

/// Brings a pair within `max_length`, or says why it is left out.
fn fit(
    mut pair: TokenizedPair,
    max_length: usize,
    truncation: TruncationStrategy,
) -> std::result::Result<TokenizedPair, String> {
    let prompt = pair.prompt.len();
    let longer = pair.chosen.len().max(pair.rejected.len());
    if prompt == 0 {
        return Err("the prompt is empty, so nothing predicts the answer's first token".to_owned());
    }
    if prompt + longer > max_length {
        let over = format!("--max_length is {max_length}");
        match truncation {
            TruncationStrategy::Delete => {
                let total = prompt + longer;
                return Err(format!("{total} tokens (prompt {prompt}, longer answer {longer}), {over}"));
            }
            TruncationStrategy::TruncationRight if prompt >= max_length => {
                return Err(format!("the prompt's {prompt} tokens leave no room for an answer, {over}"));
            }
            TruncationStrategy::TruncationRight => {
                pair.chosen.truncate(max_length - prompt);
                pair.rejected.truncate(max_length - prompt);
            }
        }
    }
    if pair.chosen == pair.rejected {
        return Err(format!("the answers are equal in their {} tokens", pair.chosen.len()));
    }
    Ok(pair)
}
