//! Generation: a prompt's tokens to the answer's, one by one.
//!
//! The prompt is read in chunks, so that its activations stay small; then every token costs one row of work. Keys and values
//! are cached, and only the last row's logits are computed.

use std::fmt;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use burn::tensor::backend::Backend;

use super::sample::{Sampler, SamplingConfig};
use crate::data::tokenize::TextTokenizer;
use crate::error::{Error, Result};
use crate::model::Llama;
use crate::model::llama::KvCache;
use crate::ops::Kernels;
use crate::ops::read::read;

/// Rows of a prompt that are read at a time, so that their activations stay small.
const PREFILL_ROWS: usize = 512;

const NO_TOKENS: &str = "--max_new_tokens is 0, expected at least 1";

/// How an answer is generated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GenerationConfig {
    /// The most tokens of an answer.
    pub max_new_tokens: usize,
    /// How each is chosen.
    pub sampling: SamplingConfig,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self { max_new_tokens: 2048, sampling: SamplingConfig::default() }
    }
}

impl GenerationConfig {
    /// Always the likeliest token, at most `max_new_tokens`.
    pub fn greedy(max_new_tokens: usize) -> Self {
        Self { max_new_tokens, sampling: SamplingConfig::greedy() }
    }

    /// Checks the settings' ranges.
    ///
    /// # Errors
    /// [`Error::Config`] with everything that is wrong.
    pub fn check(&self) -> Result<()> {
        match (self.sampling.check(), self.max_new_tokens) {
            (Err(Error::Config { mut problems, hint }), 0) => {
                problems.push(NO_TOKENS.to_owned());
                Err(Error::Config { problems, hint })
            }
            (Ok(()), 0) => Err(Error::config(NO_TOKENS)),
            (checked, _) => checked,
        }
    }
}

/// Why an answer ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// The model ended it.
    StopToken,
    /// It has `max_new_tokens`.
    MaxNewTokens,
    /// Prompt and answer fill the model's context (`max_position_embeddings`).
    ContextEnd,
    /// Whoever takes the tokens wants no more.
    Interrupted,
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StopToken => "the model ended it",
            Self::MaxNewTokens => "--max_new_tokens reached",
            Self::ContextEnd => "the model's context is full",
            Self::Interrupted => "interrupted",
        })
    }
}

/// An answer as token ids, and what it cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    /// The answer, without the token that ended it.
    pub tokens: Vec<u32>,
    /// Why it ends.
    pub stop_reason: StopReason,
    /// Tokens of the prompt that had to be computed; the others were cached.
    pub n_prefilled: usize,
    /// Until the prompt was read.
    pub prefill_time: Duration,
    /// From there to the end.
    pub decode_time: Duration,
}

impl Generation {
    /// Tokens of the answer a second, not counting the prompt.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens.len() as f64 / self.decode_time.as_secs_f64().max(f64::EPSILON)
    }
}

/// A model in use: its cache and its draws go on from one answer to the next.
#[derive(Debug)]
pub struct Session<'m, B: Backend> {
    model: &'m Llama<B>,
    cache: KvCache<B>,
    /// The tokens in the cache.
    cached: Vec<u32>,
    sampler: Sampler,
    config: GenerationConfig,
}

impl<'m, B: Kernels> Session<'m, B> {
    /// A session with an empty cache, at the beginning of the seed's draws.
    pub fn new(model: &'m Llama<B>, config: &GenerationConfig) -> Self {
        Self {
            model,
            cache: model.new_cache(),
            cached: Vec::new(),
            sampler: Sampler::new(config.sampling),
            config: *config,
        }
    }

    /// The most tokens that a prompt may have: the model's context, less one for the answer.
    pub fn max_prompt_tokens(&self) -> usize {
        self.model.config.max_position_embeddings.saturating_sub(1)
    }

    /// Generates an answer to `prompt`, and hands each token to `on_token` as it comes, except the one of `stop_ids` that ends it.
    ///
    /// What of the prompt was computed for the answer before is not computed again, if all of it begins this prompt too.
    ///
    /// # Errors
    /// [`Error::Config`] for settings out of range and a prompt that is empty, too long or outside the vocabulary; [`Error::Device`] if the device fails or the
    /// logits are not numbers.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        stop_ids: &[u32],
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generation> {
        self.config.check()?;
        self.check_prompt(prompt)?;
        let started = Instant::now();
        if !prompt.starts_with(&self.cached) || prompt.len() == self.cached.len() {
            self.forget();
        }
        let n_cached = self.cached.len();
        let mut logits = self.extend(&prompt[n_cached..])?;
        let prefilled = Instant::now();
        let mut seen = prompt.to_vec();
        let stop_reason = loop {
            let Some(token) = self.sampler.sample(&logits, &seen) else {
                self.forget();
                return Err(self.broken(seen.len() - prompt.len()));
            };
            if stop_ids.contains(&token) {
                break StopReason::StopToken;
            }
            seen.push(token);
            if on_token(token).is_break() {
                break StopReason::Interrupted;
            }
            if seen.len() - prompt.len() == self.config.max_new_tokens {
                break StopReason::MaxNewTokens;
            }
            if seen.len() > self.max_prompt_tokens() {
                break StopReason::ContextEnd;
            }
            logits = self.extend(&[token])?;
        };
        Ok(Generation {
            tokens: seen.split_off(prompt.len()),
            stop_reason,
            n_prefilled: prompt.len() - n_cached,
            prefill_time: prefilled - started,
            decode_time: prefilled.elapsed(),
        })
    }

    /// Checks that a prompt can be read.
    ///
    /// # Errors
    /// [`Error::Config`] for one that is empty, too long or outside the vocabulary.
    pub fn check_prompt(&self, prompt: &[u32]) -> Result<()> {
        let (n, max) = (prompt.len(), self.max_prompt_tokens());
        let vocab_size = self.model.config.vocab_size;
        if n == 0 {
            return Err(Error::config("the prompt is empty"));
        }
        if n > max {
            let problem =
                format!("the prompt has {n} tokens, and the model's context takes {max} before an answer");
            return Err(Error::config(problem).with_hint("a shorter prompt, or less history"));
        }
        match prompt.iter().find(|token| **token as usize >= vocab_size) {
            None => Ok(()),
            Some(token) => Err(Error::config(format!(
                "the prompt has token {token}, and the model's vocab_size is {vocab_size}"
            ))
            .with_hint("tokenizer.json and config.json are of different models")),
        }
    }

    /// Empties the cache and begins the draws again.
    pub fn restart(&mut self) {
        self.forget();
        self.sampler = Sampler::new(self.config.sampling);
    }

    /// Empties the cache.
    fn forget(&mut self) {
        self.cache = self.model.new_cache();
        self.cached.clear();
    }

    /// Puts tokens into the cache and reads the logits that follow the last of them.
    fn extend(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let config = &self.model.config;
        // Until the device has answered, nothing is known of the cache.
        let mut cached = std::mem::take(&mut self.cached);
        let mut rest = tokens;
        loop {
            let (chunk, after) = rest.split_at(rest.len().min(PREFILL_ROWS));
            let hidden = self.model.forward_cached(chunk, &mut self.cache);
            cached.extend_from_slice(chunk);
            rest = after;
            if rest.is_empty() {
                let last = hidden.slice([chunk.len() - 1..chunk.len(), 0..config.hidden_size]);
                match read(self.model.lm_head.logits(last)) {
                    Ok(logits) => {
                        self.cached = cached;
                        return Ok(logits);
                    }
                    Err(error) => {
                        self.forget();
                        return Err(error);
                    }
                }
            }
        }
    }

    fn broken(&self, n_tokens: usize) -> Error {
        Error::Device {
            device: format!("{:?}", self.model.device()),
            problem: format!("the logits of token {} of the answer are not finite", n_tokens + 1),
            hint: Some(
                "an adapter whose training diverged does this: try another checkpoint, or none; so does an activation beyond 65504 in \
                 fp16: --dtype fp32"
                    .to_owned(),
            ),
        }
    }
}

/// Generates one answer; see [`Session::generate`].
///
/// # Errors
/// As [`Session::generate`].
pub fn generate<B: Kernels>(
    model: &Llama<B>,
    prompt: &[u32],
    stop_ids: &[u32],
    config: &GenerationConfig,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generation> {
    Session::new(model, config).generate(prompt, stop_ids, on_token)
}

/// Generates one answer as text.
///
/// # Errors
/// As [`Session::generate`], and [`Error::File`] if the tokenizer cannot decode the answer.
pub fn answer<B: Kernels>(
    model: &Llama<B>,
    tokenizer: &TextTokenizer,
    prompt: &[u32],
    config: &GenerationConfig,
) -> Result<String> {
    let generation =
        generate(model, prompt, tokenizer.stop_ids(), config, &mut |_| ControlFlow::Continue(()))?;
    tokenizer.decode(&generation.tokens)
}
