//! The choice of the next token from the model's logits, as transformers' `generate` makes it.
//!
//! In its order: repetition penalty, then (unless greedy) temperature, top-k, top-p and a draw. Names and semantics are those of
//! transformers' `GenerationConfig`, defaults those of ms-swift 2.0.5. Everything happens on the host in `f32`, sums in `f64`, so a
//! seed gives the same tokens wherever the logits are the same.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::error::{Error, Result};

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingConfig {
    /// What logits are divided by; 0 takes the likeliest token (greedy).
    pub temperature: f32,
    /// Only this many of the likeliest tokens, and what ties with the last of them; 0 takes all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability; 1 takes all.
    pub top_p: f32,
    /// What the logits of tokens that have been seen are divided by (if positive) or multiplied with; 1 changes nothing.
    /// In the prompt or in the answer, once or often (arXiv:1909.05858).
    pub repetition_penalty: f32,
    /// Where the draws begin.
    pub seed: u64,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self { temperature: 0.3, top_k: 20, top_p: 0.7, repetition_penalty: 1.0, seed: 42 }
    }
}

impl SamplingConfig {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Checks the settings' ranges.
    ///
    /// # Errors
    /// [`Error::Config`] with everything that is wrong.
    pub fn check(&self) -> Result<()> {
        let mut problems = Vec::new();
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            problems.push(format!("--temperature is {}, expected 0 (greedy) or more", self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            problems.push(format!("--top_p is {}, expected more than 0 and at most 1", self.top_p));
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            problems
                .push(format!("--repetition_penalty is {}, expected more than 0", self.repetition_penalty));
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Config { problems, hint: None }) }
    }
}

/// Chooses tokens, one after the other.
#[derive(Debug)]
pub struct Sampler {
    config: SamplingConfig,
    rng: StdRng,
}

impl Sampler {
    /// A sampler at the beginning of its draws.
    pub fn new(config: SamplingConfig) -> Self {
        Self { config, rng: StdRng::seed_from_u64(config.seed) }
    }

    /// Chooses the next token from `logits`, `[vocab]`; `seen` are the tokens of prompt and answer so far.
    ///
    /// Returns `None` if a logit is NaN or infinite: the model is broken, and any choice would hide it.
    pub fn sample(&mut self, logits: &[f32], seen: &[u32]) -> Option<u32> {
        let SamplingConfig { temperature, top_k, top_p, repetition_penalty, .. } = self.config;
        if logits.is_empty() || logits.iter().any(|logit| !logit.is_finite()) {
            return None;
        }
        let mut logits = logits.to_vec();
        if repetition_penalty != 1.0 {
            penalize(&mut logits, seen, repetition_penalty);
        }
        let likeliest = argmax(&logits);
        // A temperature so small that the quotients overflow is greedy too.
        if temperature == 0.0 || !(logits[likeliest] / temperature).is_finite() {
            return Some(likeliest as u32);
        }
        logits.iter_mut().for_each(|logit| *logit /= temperature);
        let choice = weigh(&logits, top_k, top_p);
        let drawn = self.rng.random::<f64>() * choice.iter().map(|(_, weight)| weight).sum::<f64>();
        let ends = choice.iter().scan(0.0, |sum, (_, weight)| {
            *sum += weight;
            Some(*sum)
        });
        let place = ends.take_while(|end| *end <= drawn).count().min(choice.len() - 1);
        Some(choice[place].0)
    }
}

/// The tokens that top-k and top-p leave, likeliest first, with their probabilities up to a common factor.
fn weigh(logits: &[f32], top_k: usize, top_p: f32) -> Vec<(u32, f64)> {
    let mut candidates: Vec<Candidate> =
        logits.iter().enumerate().map(|(id, logit)| (id as u32, *logit)).collect();
    keep_top_k(&mut candidates, top_k);
    candidates.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let max = candidates[0].1;
    let mut choice: Vec<(u32, f64)> =
        candidates.into_iter().map(|(id, logit)| (id, f64::from(logit - max).exp())).collect();
    if top_p < 1.0 {
        choice.truncate(n_within(&choice, top_p));
    }
    choice
}

/// A token and its logit.
type Candidate = (u32, f32);

/// The first of the largest.
fn argmax(logits: &[f32]) -> usize {
    (1..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}

/// Makes seen tokens less likely, each once: what is positive is divided, what is negative multiplied.
fn penalize(logits: &mut [f32], seen: &[u32], penalty: f32) {
    let mut ids = seen.to_vec();
    ids.sort_unstable();
    ids.dedup();
    for id in ids {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
        }
    }
}

/// Keeps the `k` largest and what ties with the smallest of them.
fn keep_top_k(candidates: &mut Vec<Candidate>, k: usize) {
    if k == 0 || k >= candidates.len() {
        return;
    }
    let (_, (_, smallest), _) = candidates.select_nth_unstable_by(k - 1, |a, b| b.1.total_cmp(&a.1));
    let smallest = *smallest;
    candidates.retain(|(_, logit)| *logit >= smallest);
}

/// How many of the weights, which descend, stay: one goes if it and all smaller ones together have no more than `1 - top_p`.
fn n_within(choice: &[(u32, f64)], top_p: f32) -> usize {
    let total: f64 = choice.iter().map(|(_, weight)| weight).sum();
    let mut before = 0.0;
    let stay = choice.iter().take_while(|(_, weight)| {
        let stays = (total - before) / total > 1.0 - f64::from(top_p);
        before += weight;
        stays
    });
    stay.count().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ln of 0.5, 0.3, 0.15, 0.05, in another order.
    const LOGITS: [f32; 4] = [-1.897_12, -std::f32::consts::LN_2, -2.995_732, -1.203_973];

    const ALL: SamplingConfig =
        SamplingConfig { temperature: 1.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0, seed: 7 };

    /// How often each of the tokens is drawn.
    fn shares(config: SamplingConfig, logits: &[f32], seen: &[u32]) -> Vec<f64> {
        const N: usize = 20_000;
        let mut sampler = Sampler::new(config);
        let mut shares = vec![0.0; logits.len()];
        for _ in 0..N {
            shares[sampler.sample(logits, seen).unwrap() as usize] += 1.0 / N as f64;
        }
        shares
    }

    /// 0.015 is over four standard deviations of a share of 20,000 draws.
    #[track_caller]
    fn assert_shares(config: SamplingConfig, logits: &[f32], seen: &[u32], expected: &[f64]) {
        for (id, (got, expected)) in shares(config, logits, seen).iter().zip(expected).enumerate() {
            let is_close = if *expected == 0.0 { *got == 0.0 } else { (got - expected).abs() < 0.015 };
            assert!(is_close, "token {id}: drawn {got}, expected {expected}");
        }
    }

    #[test]
    fn greedy_takes_the_first_of_the_likeliest() {
        let mut sampler = Sampler::new(SamplingConfig::greedy());
        assert_eq!(sampler.sample(&LOGITS, &[]), Some(1));
        assert_eq!(sampler.sample(&[0.0, 2.0, 2.0], &[]), Some(1));
        let mut nearly = Sampler::new(SamplingConfig { temperature: 1e-45, ..ALL });
        assert_eq!(nearly.sample(&[1.0, 2.0], &[]), Some(1));
    }

    #[test]
    fn all_probabilities_are_kept_without_limits() {
        assert_shares(ALL, &LOGITS, &[], &[0.15, 0.5, 0.05, 0.3]);
    }

    #[test]
    fn temperature_divides_logits() {
        // Squared and normalised: 0.0225, 0.25, 0.0025, 0.09 of 0.365.
        let config = SamplingConfig { temperature: 0.5, ..ALL };
        assert_shares(config, &LOGITS, &[], &[0.0616, 0.6849, 0.0068, 0.2466]);
    }

    #[test]
    fn top_k_keeps_k_and_ties() {
        assert_shares(SamplingConfig { top_k: 2, ..ALL }, &LOGITS, &[], &[0.0, 0.625, 0.0, 0.375]);
        assert_shares(SamplingConfig { top_k: 2, ..ALL }, &[0.0, 0.0, 0.0, -1.0], &[], &[1.0 / 3.0; 3]);
        assert_shares(SamplingConfig { top_k: 9, ..ALL }, &LOGITS, &[], &[0.15, 0.5, 0.05, 0.3]);
    }

    #[test]
    fn top_p_keeps_the_token_that_reaches_p() {
        assert_shares(SamplingConfig { top_p: 0.7, ..ALL }, &LOGITS, &[], &[0.0, 0.625, 0.0, 0.375]);
        assert_shares(SamplingConfig { top_p: 0.4, ..ALL }, &LOGITS, &[], &[0.0, 1.0, 0.0, 0.0]);
        assert_shares(SamplingConfig { top_p: 1e-6, ..ALL }, &LOGITS, &[], &[0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn top_p_counts_what_top_k_left() {
        // Of what top_k leaves the first two have 0.842; of all four they would have 0.8.
        let config = SamplingConfig { top_k: 3, top_p: 0.86, ..ALL };
        assert_shares(config, &LOGITS, &[], &[0.158, 0.526, 0.0, 0.316]);
        let config = SamplingConfig { top_k: 3, top_p: 0.83, ..ALL };
        assert_shares(config, &LOGITS, &[], &[0.0, 0.625, 0.0, 0.375]);
    }

    #[test]
    fn temperature_comes_before_top_p() {
        // At temperature 0.5 the likeliest has 0.685, the first two 0.93.
        let config = SamplingConfig { temperature: 0.5, top_p: 0.65, ..ALL };
        assert_shares(config, &LOGITS, &[], &[0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn the_penalty_counts_a_token_once_whatever_its_sign() {
        let mut logits = [4.0, -2.0, 1.0, 0.0];
        penalize(&mut logits, &[0, 1, 0, 3, 900], 2.0);
        assert_eq!(logits, [2.0, -4.0, 1.0, 0.0]);
        let mut greedy = Sampler::new(SamplingConfig { repetition_penalty: 8.0, ..SamplingConfig::greedy() });
        assert_eq!(greedy.sample(&[4.0, -2.0, 1.0, 0.0], &[0]), Some(2));
    }

    #[test]
    fn a_seed_decides() {
        let draws = |seed| {
            let mut sampler = Sampler::new(SamplingConfig { seed, ..ALL });
            (0..64).map(|_| sampler.sample(&LOGITS, &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
    }

    #[test]
    fn a_broken_model_is_not_hidden() {
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(Sampler::new(SamplingConfig::greedy()).sample(&[0.0, broken], &[]), None);
        }
    }

    #[test]
    fn all_wrong_settings_are_named() {
        let wrong = SamplingConfig { temperature: -1.0, top_p: 0.0, repetition_penalty: f32::NAN, ..ALL };
        let error = wrong.check().unwrap_err();
        assert_eq!(error.exit_code(), 2);
        for name in ["--temperature", "--top_p", "--repetition_penalty"] {
            assert!(error.to_string().contains(name), "{error}");
        }
        SamplingConfig::default().check().unwrap();
    }
}
