//! Pairs to one packed row of tokens, in which a pair's common prefix stands once.
//!
//! Both answers of a pair follow the same prompt, and causal attention makes its hidden states equal in both rows. So
//! a pair becomes a [`Segment`] of three ranges, shown with `prompt = a b`, `chosen = c d`, `rejected = c e f`:
//!
//! ```text
//!             prefix     chosen    rejected
//! tokens      a  b  c    -         e
//! positions   0  1  2              3
//! predicts    b  c  d,e            f
//! ```
//!
//! - The prefix is the longest common prefix of the two rows, prompt and answer together.
//! - A row's last token predicts nothing and is no context of anything that is scored, so it is not computed; `d`
//!   and `f` are targets only. The prefix is cut accordingly where one row ends within the other.
//! - The last row of the prefix may predict two tokens. What is scored is therefore a list of (row, target) pairs,
//!   the [`ScoredToken`]s, and the hidden states of every row that occurs in it are computed once ([`Batch::rows`]).

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use super::dataset::Location;
use super::tokenize::TokenizedPair;
use crate::error::{Error, Result};
use crate::ops::attention::Visible;
use crate::ops::orpo_loss::PairSpan;
use crate::ops::token_logps::ScoredToken;

/// Whose ORPO: which tokens of the chosen row the negative log-likelihood is taken over, and what it is divided by.
///
/// The odds-ratio term is the same in all of them: means over the response tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LossCompat {
    /// `swift`: the response, mean over the micro-batch's tokens (ms-swift from 2.4.2 on).
    Swift,
    /// `trl`: prompt and response, mean over the micro-batch's tokens (TRL from 0.9 on).
    Trl,
    /// `llamafactory`: the response, mean over each pair's tokens, then over the pairs.
    LlamaFactory,
}

impl LossCompat {
    /// Every variant, in the order of the help text.
    pub const ALL: [Self; 3] = [Self::Swift, Self::Trl, Self::LlamaFactory];

    /// The name that `--loss_compat` knows it by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Swift => "swift",
            Self::Trl => "trl",
            Self::LlamaFactory => "llamafactory",
        }
    }
}

impl fmt::Display for LossCompat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for LossCompat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|compat| compat.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::config(format!("--loss_compat `{name}`: expected {names}"))
        })
    }
}

/// One pair's rows in the packed batch: the shared prefix, then the rest of chosen, then the rest of rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The first packed row.
    pub start: usize,
    /// Rows of both, at least one.
    pub prefix_len: usize,
    /// Rows of chosen alone; 0 if chosen goes on for a single token after the prefix.
    pub chosen_len: usize,
    /// Rows of rejected alone; 0 if rejected goes on for a single token after the prefix.
    pub rejected_len: usize,
}

impl Segment {
    /// The number of packed rows.
    pub fn n_rows(&self) -> usize {
        self.prefix_len + self.chosen_len + self.rejected_len
    }

    /// The packed row at which chosen goes on alone.
    pub fn chosen_start(&self) -> usize {
        self.start + self.prefix_len
    }

    /// The packed row at which rejected goes on alone.
    pub fn rejected_start(&self) -> usize {
        self.chosen_start() + self.chosen_len
    }

    /// The packed row behind the last.
    pub fn end(&self) -> usize {
        self.start + self.n_rows()
    }
}

/// A micro-batch: pairs packed into one row of tokens, and what is scored in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Token ids. Shape: `[tokens]`.
    pub tokens: Vec<u32>,
    /// Each token's position in its own row, from 0. Shape: `[tokens]`.
    pub positions: Vec<u32>,
    /// The pairs' ranges, back to back from row 0. Shape: `[pairs]`.
    pub segments: Vec<Segment>,
    /// The packed rows that predict something scored, each once, ascending. Shape: `[rows]`.
    pub rows: Vec<u32>,
    /// What is scored, pair by pair. Shape: `[entries]`.
    pub entries: Vec<ScoredToken>,
    /// Where each pair's entries stand. Shape: `[pairs]`.
    pub pairs: Vec<PairSpan>,
    /// The data row of each pair. Shape: `[pairs]`.
    pub locations: Vec<Location>,
}

impl Batch {
    /// The number of tokens that are computed.
    pub fn n_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Which packed rows each packed row sees: those of its pair up to itself, and none that the other answer has alone.
    pub fn visible(&self) -> Vec<Visible> {
        let rows = self.segments.iter().flat_map(|segment| {
            (segment.start..segment.end()).map(|row| {
                let is_rejected = row >= segment.rejected_start();
                let prefix_end = if is_rejected { segment.chosen_start() } else { segment.start };
                let own_start = if is_rejected { segment.rejected_start() } else { segment.start };
                Visible {
                    first: index(segment.start),
                    prefix_end: index(prefix_end),
                    own_start: index(own_start),
                    end: index(row + 1),
                }
            })
        });
        rows.collect()
    }
}

/// Packs pairs into a micro-batch.
///
/// # Panics
/// If a pair has an empty prompt or answer, or the batch has more than `u32::MAX` tokens or entries.
pub fn pack(pairs: &[&TokenizedPair], compat: LossCompat) -> Batch {
    let mut batch = Batch {
        tokens: Vec::new(),
        positions: Vec::new(),
        segments: Vec::with_capacity(pairs.len()),
        rows: Vec::new(),
        entries: Vec::new(),
        pairs: Vec::with_capacity(pairs.len()),
        locations: pairs.iter().map(|pair| pair.location.clone()).collect(),
    };
    for pair in pairs {
        batch.push(pair, compat);
    }
    let n_nll: u32 = batch.pairs.iter().map(|span| span.rejected_start - span.nll_start).sum();
    for span in &mut batch.pairs {
        let divisor = match compat {
            LossCompat::Swift | LossCompat::Trl => f64::from(n_nll),
            LossCompat::LlamaFactory => pairs.len() as f64 * f64::from(span.rejected_start - span.nll_start),
        };
        span.nll_weight = (1.0 / divisor) as f32;
    }
    batch
}

impl Batch {
    /// Appends a pair; its weight is not known before the last one.
    fn push(&mut self, pair: &TokenizedPair, compat: LossCompat) {
        let (n_prompt, n_chosen, n_rejected) = (pair.prompt.len(), pair.chosen.len(), pair.rejected.len());
        assert!(
            n_prompt > 0 && n_chosen > 0 && n_rejected > 0,
            "{}: a part of the pair is empty",
            pair.location
        );

        // Rows that are computed: all but the last of each. Both rows have the prompt, so the prefix has it too.
        let common = pair.chosen.iter().zip(&pair.rejected).take_while(|(c, r)| c == r).count();
        let prefix_len = n_prompt + common.min(n_chosen - 1).min(n_rejected - 1);
        let segment = Segment {
            start: self.tokens.len(),
            prefix_len,
            chosen_len: n_prompt + n_chosen - 1 - prefix_len,
            rejected_len: n_prompt + n_rejected - 1 - prefix_len,
        };
        let shared = prefix_len - n_prompt;
        self.tokens.extend(&pair.prompt);
        self.tokens.extend(&pair.chosen[..n_chosen - 1]);
        self.tokens.extend(&pair.rejected[shared..n_rejected - 1]);
        self.positions.extend(0..index(prefix_len + segment.chosen_len));
        self.positions.extend(index(prefix_len)..index(prefix_len + segment.rejected_len));

        // Position t of a row predicts its token t + 1.
        let first_scored = match compat {
            LossCompat::Trl => 0,
            LossCompat::Swift | LossCompat::LlamaFactory => n_prompt - 1,
        };
        let row_idx = index(self.rows.len());
        self.rows.extend(index(segment.start + first_scored)..index(segment.end()));
        let chosen_row = |t: usize| row_idx + index(t - first_scored);
        let rejected_row = |t: usize| {
            let is_shared = t < prefix_len;
            row_idx + index(if is_shared { t } else { t + segment.chosen_len } - first_scored)
        };
        let nll_start = index(self.entries.len());
        let mut score = |targets: &[u32], positions: Range<usize>, row: &dyn Fn(usize) -> u32| {
            let scored = targets.iter().zip(positions);
            self.entries.extend(scored.map(|(target, t)| ScoredToken { row_idx: row(t), target: *target }));
            index(self.entries.len())
        };
        let chosen_start = score(&pair.prompt[first_scored + 1..], first_scored..n_prompt - 1, &chosen_row);
        let rejected_start = score(&pair.chosen, n_prompt - 1..n_prompt - 1 + n_chosen, &chosen_row);
        let end = score(&pair.rejected, n_prompt - 1..n_prompt - 1 + n_rejected, &rejected_row);
        self.pairs.push(PairSpan { nll_start, chosen_start, rejected_start, end, nll_weight: 0.0 });
        self.segments.push(segment);
    }
}

/// A count as the GPU takes it.
fn index(n: usize) -> u32 {
    assert!(n <= u32::MAX as usize, "{n} tokens do not fit into one batch");
    n as u32
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rand::rngs::Xoshiro256PlusPlus;
    use rand::{RngExt, SeedableRng};

    use super::*;

    fn pair(prompt: &[u32], chosen: &[u32], rejected: &[u32]) -> TokenizedPair {
        let location = Location::new(Path::new("rows.jsonl"), 1);
        TokenizedPair { prompt: prompt.into(), chosen: chosen.into(), rejected: rejected.into(), location }
    }

    /// What packed row `i` sees, in the order of the positions, which must be 0, 1, … up to its own.
    fn context(batch: &Batch, i: usize) -> Vec<u32> {
        let row = batch.visible()[i];
        let mut visible: Vec<_> = (row.first..row.prefix_end)
            .chain(row.own_start..row.end)
            .map(|j| j as usize)
            .map(|j| (batch.positions[j] as usize, batch.tokens[j]))
            .collect();
        visible.sort_unstable();
        let positions: Vec<_> = visible.iter().map(|(position, _)| *position).collect();
        let own = batch.positions[i] as usize;
        assert_eq!(
            positions,
            (0..=own).collect::<Vec<_>>(),
            "row {i} must see every position up to its own once"
        );
        visible.into_iter().map(|(_, token)| token).collect()
    }

    /// Every token of an answer's row from `first` on, with what comes before it.
    fn naive(prompt: &[u32], answer: &[u32], first: usize) -> Vec<(Vec<u32>, u32)> {
        let row = [prompt, answer].concat();
        (first..row.len()).map(|t| (row[..t].to_vec(), row[t])).collect()
    }

    fn scored(batch: &Batch, entries: Range<u32>) -> Vec<(Vec<u32>, u32)> {
        entries
            .map(|e| batch.entries[e as usize])
            .map(|entry| (context(batch, batch.rows[entry.row_idx as usize] as usize), entry.target))
            .collect()
    }

    #[test]
    fn the_example_of_the_module_doc() {
        let (a, b, c, d, e, f) = (1, 2, 3, 4, 5, 6);
        let batch = pack(&[&pair(&[a, b], &[c, d], &[c, e, f])], LossCompat::Trl);
        assert_eq!(batch.tokens, [a, b, c, e]);
        assert_eq!(batch.positions, [0, 1, 2, 3]);
        assert_eq!(batch.segments, [Segment { start: 0, prefix_len: 3, chosen_len: 0, rejected_len: 1 }]);
        assert_eq!(batch.rows, [0, 1, 2, 3]);
        let entries: Vec<_> = batch.entries.iter().map(|entry| (entry.row_idx, entry.target)).collect();
        assert_eq!(entries, [(0, b), (1, c), (2, d), (1, c), (2, e), (3, f)]);
        let span = batch.pairs[0];
        assert_eq!((span.nll_start, span.chosen_start, span.rejected_start, span.end), (0, 1, 3, 6));
    }

    /// Against the form with two full rows a pair: the same targets after the same contexts, in the same order.
    #[test]
    fn every_target_is_scored_once_after_its_own_context() {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(7);
        let mut n_shared_targets = 0;
        for _ in 0..400 {
            // Three ids and short rows, so that answers often share a start, or all they have.
            let mut tokens = |max: usize| -> Vec<u32> {
                (0..rng.random_range(1..=max)).map(|_| rng.random_range(0..3)).collect()
            };
            let pairs: Vec<_> = (0..3).map(|_| pair(&tokens(4), &tokens(5), &tokens(5))).collect();
            let pairs: Vec<_> = pairs.iter().collect();
            for compat in LossCompat::ALL {
                let batch = pack(&pairs, compat);
                assert_eq!(batch.positions.len(), batch.n_tokens(), "one position a token");
                let mut entries = 0;
                for ((pair, span), segment) in pairs.iter().zip(&batch.pairs).zip(&batch.segments) {
                    let n_prompt = pair.prompt.len();
                    assert_eq!(span.nll_start, entries, "entries stand back to back");
                    entries = span.end;
                    let nll_from = if compat == LossCompat::Trl { 1 } else { n_prompt };
                    let nll = naive(&pair.prompt, &pair.chosen, nll_from);
                    let chosen = naive(&pair.prompt, &pair.chosen, n_prompt);
                    let rejected = naive(&pair.prompt, &pair.rejected, n_prompt);
                    assert_eq!(scored(&batch, span.nll_start..span.rejected_start), nll, "{pair:?}");
                    assert_eq!(scored(&batch, span.chosen_start..span.rejected_start), chosen, "{pair:?}");
                    assert_eq!(scored(&batch, span.rejected_start..span.end), rejected, "{pair:?}");

                    // Nothing is computed twice, and no last token at all.
                    let (c, r) = (
                        [&pair.prompt[..], &pair.chosen].concat(),
                        [&pair.prompt[..], &pair.rejected].concat(),
                    );
                    let (c, r) = (&c[..c.len() - 1], &r[..r.len() - 1]);
                    let common = c.iter().zip(r).take_while(|(x, y)| x == y).count();
                    assert_eq!(segment.prefix_len, common, "{pair:?}");
                    assert_eq!(segment.n_rows(), c.len() + r.len() - common, "{pair:?}");
                    n_shared_targets += usize::from(common > n_prompt);
                }
                assert_eq!(entries as usize, batch.entries.len(), "no entry is left over");
                let mut used: Vec<u32> =
                    batch.entries.iter().map(|e| batch.rows[e.row_idx as usize]).collect();
                used.sort_unstable();
                used.dedup();
                assert_eq!(batch.rows, used, "rows are exactly those that predict something, ascending");
            }
        }
        assert!(n_shared_targets > 100, "the draw hardly ever shares more than the prompt");
    }

    #[test]
    fn rows_of_different_pairs_and_answers_do_not_see_each_other() {
        let first = pair(&[1, 2], &[3, 4, 5], &[6, 7, 8]);
        let batch = pack(&[&first, &pair(&[1], &[2, 3], &[3, 2])], LossCompat::Swift);
        // prefix 0..2, chosen 2..4, rejected 4..6; then prefix 6, chosen 7, rejected 8.
        let seen =
            |row: &Visible| (row.first..row.prefix_end).chain(row.own_start..row.end).collect::<Vec<_>>();
        let all: Vec<_> = batch.visible().iter().map(seen).collect();
        let expected: [&[u32]; 9] =
            [&[0], &[0, 1], &[0, 1, 2], &[0, 1, 2, 3], &[0, 1, 4], &[0, 1, 4, 5], &[6], &[6, 7], &[6, 8]];
        assert_eq!(all, expected);
    }

    /// The values are TRL's, ms-swift's and LLaMA-Factory's own formulas in f64 on these pairs.
    #[test]
    fn the_nll_is_that_of_each_trainer() {
        let pairs = [pair(&[1, 2, 3], &[4, 5, 6, 2], &[3, 3]), pair(&[2, 6], &[1, 4], &[5, 1, 2, 6, 3])];
        let logp = |seed: f64, t: f64, target: u32| {
            let logit =
                |v: f64| 2.0 * (1.3 * seed + 0.7 * t + 1.9 * v).sin() + 0.5 * (0.31 * seed * v + t).cos();
            let sum: f64 = (0..7).map(|v| logit(f64::from(v)).exp()).sum();
            logit(f64::from(target)) - sum.ln()
        };
        for (compat, expected) in [
            (LossCompat::Trl, 3.05072998),
            (LossCompat::Swift, 3.29859145),
            (LossCompat::LlamaFactory, 3.72534327),
        ] {
            let batch = pack(&[&pairs[0], &pairs[1]], compat);
            // The model of this example gives chosen and rejected rows different logits, by a seed.
            let sum = |entries: Range<u32>, seed: usize| -> f64 {
                entries
                    .map(|e| batch.entries[e as usize])
                    .map(|e| (batch.rows[e.row_idx as usize] as usize, e.target))
                    .map(|(row, target)| logp(seed as f64, f64::from(batch.positions[row]), target))
                    .sum()
            };
            let mut nll = 0.0;
            for (i, (span, mean_logps)) in
                batch.pairs.iter().zip([(-2.4450878, -4.05608427), (-5.00559873, -2.76218802)]).enumerate()
            {
                nll -= f64::from(span.nll_weight) * sum(span.nll_start..span.rejected_start, 10 * i + 1);
                let n_chosen = f64::from(span.rejected_start - span.chosen_start);
                let n_rejected = f64::from(span.end - span.rejected_start);
                let chosen = sum(span.chosen_start..span.rejected_start, 10 * i + 1) / n_chosen;
                let rejected = sum(span.rejected_start..span.end, 10 * i + 2) / n_rejected;
                assert!((chosen - mean_logps.0).abs() < 1e-7, "{compat}, pair {i}: chosen {chosen}");
                assert!((rejected - mean_logps.1).abs() < 1e-7, "{compat}, pair {i}: rejected {rejected}");
            }
            // The weights are f32.
            assert!((nll - expected).abs() < 5e-7, "{compat}: {nll}, expected {expected}");
        }
    }

    #[test]
    fn an_empty_batch_is_one() {
        let batch = pack(&[], LossCompat::Swift);
        assert_eq!(
            (batch.n_tokens(), batch.rows.len(), batch.entries.len(), batch.pairs.len()),
            (0, 0, 0, 0)
        );
    }

    #[test]
    fn names_are_read_back() {
        for compat in LossCompat::ALL {
            assert_eq!(compat.to_string().parse::<LossCompat>().unwrap(), compat);
        }
        let error = "paper".parse::<LossCompat>().unwrap_err().to_string();
        assert!(error.contains("--loss_compat `paper`: expected swift, trl, llamafactory"), "{error}");
    }
}
