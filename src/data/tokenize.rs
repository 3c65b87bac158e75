//! Rows to token ids: the prompt, the chosen and the rejected answer of a pair.
//!
//! The prompt and the answers are encoded apart, so no token spans the boundary between them, and both answers follow
//! the very same prompt.

use std::fmt;
use std::hash::Hasher;
use std::str::FromStr;

use rayon::prelude::*;

use super::dataset::{Location, Row, Skipped, Strictness};
use super::template::{Renderer, Template};
pub use super::tokenizer::{DecodeStream, TextTokenizer};
use crate::error::{Error, Result};
use crate::fnv::Fnv1a;

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

impl TokenizedPair {
    /// Tokens of the prompt and the longer answer, which `--max_length` counts.
    pub fn prompt_and_longer_answer(&self) -> usize {
        self.prompt.len() + self.chosen.len().max(self.rejected.len())
    }
}

/// A number that tells other rows, or others in their order, from these; the same in every build.
pub fn fingerprint(pairs: &[TokenizedPair]) -> u64 {
    let mut hash = Fnv1a::default();
    for tokens in pairs.iter().flat_map(|pair| [&pair.prompt, &pair.chosen, &pair.rejected]) {
        hash.write(&(tokens.len() as u64).to_le_bytes());
        tokens.iter().for_each(|token| hash.write(&token.to_le_bytes()));
    }
    hash.finish()
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
    let encoded: Vec<_> =
        rows.par_iter().map(|row| encode(row, tokenizer, &renderer, default_system)).collect();
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

/// Brings a pair within `max_length`.
///
/// # Errors
/// Why it is left out.
pub fn fit(
    mut pair: TokenizedPair,
    max_length: usize,
    truncation: TruncationStrategy,
) -> std::result::Result<TokenizedPair, String> {
    let room = room_for_answers(&pair, max_length, truncation)?;
    pair.chosen.truncate(room);
    pair.rejected.truncate(room);
    Ok(pair)
}

/// How many tokens of each answer `max_length` leaves: all of the longer one, or those that truncation does.
///
/// # Errors
/// Why the pair is left out.
pub fn room_for_answers(
    pair: &TokenizedPair,
    max_length: usize,
    truncation: TruncationStrategy,
) -> std::result::Result<usize, String> {
    let (prompt, total) = (pair.prompt.len(), pair.prompt_and_longer_answer());
    if prompt == 0 {
        return Err("the prompt is empty, so nothing predicts the answer's first token".to_owned());
    }
    let mut room = total - prompt;
    if total > max_length {
        let over = format!("--max_length is {max_length}");
        match truncation {
            TruncationStrategy::Delete => {
                return Err(format!("{total} tokens (prompt {prompt}, longer answer {room}), {over}"));
            }
            TruncationStrategy::TruncationRight if prompt >= max_length => {
                return Err(format!("the prompt's {prompt} tokens leave no room for an answer, {over}"));
            }
            TruncationStrategy::TruncationRight => room = max_length - prompt,
        }
    }
    let [chosen, rejected] = [&pair.chosen, &pair.rejected].map(|answer| &answer[..room.min(answer.len())]);
    if chosen == rejected {
        return Err(format!("the answers are equal in their {} tokens", chosen.len()));
    }
    Ok(room)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use serde_json::Value;

    use super::super::dataset::parse_rows;
    use super::super::tokenizer::tests::llama3_like;
    use super::*;
    use crate::left_out::left_out;

    fn rows(lines: &[(&str, &str, &str)]) -> Vec<Row> {
        let row = |(i, (query, response, rejected)): (usize, &(&str, &str, &str))| Row {
            query: (*query).to_owned(),
            response: (*response).to_owned(),
            rejected_response: (*rejected).to_owned(),
            system: None,
            history: Vec::new(),
            location: Location::new(Path::new("rows.jsonl"), i + 1),
        };
        lines.iter().enumerate().map(row).collect()
    }

    /// With [`llama3_like`], to which every letter is a token.
    fn tokenized(
        rows: &[Row],
        max_length: usize,
        truncation: TruncationStrategy,
        strict: Strictness,
    ) -> Result<(Vec<TokenizedPair>, Vec<Skipped>)> {
        tokenize_rows(rows, &llama3_like(), Template::Llama3, max_length, truncation, None, strict)
    }

    #[test]
    fn answers_end_with_end_of_turn_and_follow_the_same_prompt() {
        let tokenizer = llama3_like();
        let (pairs, skipped) =
            tokenized(&rows(&[("q", "yes", "\nno")]), 2048, TruncationStrategy::Delete, Strictness::Strict)
                .unwrap();
        assert!(skipped.is_empty());
        assert_eq!(
            tokenizer.decode_with_control(&pairs[0].prompt).unwrap(),
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>\
             <|start_header_id|>assistant<|end_header_id|>\n\n"
        );
        assert_eq!(tokenizer.decode_with_control(&pairs[0].chosen).unwrap(), "yes<|eot_id|>");
        assert_eq!(tokenizer.decode_with_control(&pairs[0].rejected).unwrap(), "\nno<|eot_id|>");
        let newlines = tokenizer.token_to_id("ĊĊ").unwrap();
        assert_eq!(
            pairs[0].prompt.last(),
            Some(&newlines),
            "an answer's newline does not join the template's"
        );
        assert_eq!(pairs[0].location.to_string(), "rows.jsonl:1");
        let prompt = tokenizer.encode_prompt(Template::Llama3, None, &[], "q").unwrap();
        assert_eq!(pairs[0].prompt, prompt, "training and inference write the same prompt");
    }

    #[test]
    fn a_row_s_system_prompt_goes_before_the_default() {
        let tokenizer = llama3_like();
        let mut rows = rows(&[("q", "a", "b"), ("q", "a", "b"), ("q", "a", "b")]);
        rows[1].system = Some("own".to_owned());
        rows[2].system = Some(String::new());
        let pairs = tokenize_rows(
            &rows,
            &tokenizer,
            Template::Llama3,
            2048,
            TruncationStrategy::Delete,
            Some("default"),
            Strictness::Strict,
        )
        .unwrap()
        .0;
        for (pair, system) in pairs.iter().zip([Some("default"), Some("own"), None]) {
            let expected = tokenizer.encode_prompt(Template::Llama3, system, &[], "q").unwrap();
            assert_eq!(pair.prompt, expected, "{system:?}");
        }
    }

    #[test]
    fn pairs_that_do_not_fit_are_left_out_or_cut() {
        let n_prompt = llama3_like().encode_prompt(Template::Llama3, None, &[], "q").unwrap().len();
        let rows = rows(&[("q", "abc", "abcdef"), ("q", "abcd", "abce"), ("qqqqqqqq", "a", "b")]);
        let delete = |max| tokenized(&rows, max, TruncationStrategy::Delete, Strictness::Lenient).unwrap();
        let cut =
            |max| tokenized(&rows, max, TruncationStrategy::TruncationRight, Strictness::Lenient).unwrap();
        let lines = |pairs: &[TokenizedPair]| pairs.iter().map(|pair| pair.location.line).collect::<Vec<_>>();

        // "abcdef" and its end of turn are 7 tokens, "abcd" 5, the last prompt 7 longer than the others.
        assert_eq!(lines(&delete(n_prompt + 9).0), [1, 2, 3]);
        assert_eq!(lines(&delete(n_prompt + 7).0), [1, 2], "exactly max_length tokens fit");
        let (pairs, skipped) = delete(n_prompt + 6);
        assert_eq!(lines(&pairs), [2]);
        assert_eq!(
            skipped[0].to_string(),
            format!(
                "rows.jsonl:1: {} tokens (prompt {n_prompt}, longer answer 7), --max_length is {}",
                n_prompt + 7,
                n_prompt + 6
            )
        );

        let (pairs, skipped) = cut(n_prompt + 6);
        assert_eq!(lines(&pairs), [1, 2]);
        assert_eq!((pairs[0].chosen.len(), pairs[0].rejected.len()), (4, 6), "only what is too long is cut");
        assert_eq!((pairs[1].chosen.len(), pairs[1].rejected.len()), (5, 5));
        let reason = format!(
            "the prompt's {} tokens leave no room for an answer, --max_length is {}",
            n_prompt + 7,
            n_prompt + 6
        );
        assert_eq!(skipped, [Skipped { location: rows[2].location.clone(), reason }]);
        let reason = &cut(n_prompt).1[0].reason;
        assert_eq!(
            reason,
            &format!(
                "the prompt's {n_prompt} tokens leave no room for an answer, --max_length is {n_prompt}"
            )
        );
        let (pairs, skipped) = cut(n_prompt + 3);
        assert!(pairs.is_empty(), "{pairs:?}");
        assert_eq!(skipped[0].reason, "the answers are equal in their 3 tokens");
    }

    #[test]
    fn a_pair_without_a_prompt_is_left_out() {
        let location = rows(&[("", "a", "b")])[0].location.clone();
        let pair = TokenizedPair { prompt: vec![], chosen: vec![1], rejected: vec![2], location };
        let reason = fit(pair, 10, TruncationStrategy::Delete).unwrap_err();
        assert_eq!(reason, "the prompt is empty, so nothing predicts the answer's first token");
    }

    #[test]
    fn strict_ends_at_the_first_row_that_does_not_fit() {
        let rows = rows(&[("q", "a", "b"), ("q", "a", "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbb")]);
        let error = tokenized(&rows, 40, TruncationStrategy::Delete, Strictness::Strict).unwrap_err();
        assert!(matches!(error, Error::Row { line: 2, .. }), "{error:?}");
    }

    #[test]
    fn names_are_read_back() {
        for strategy in TruncationStrategy::ALL {
            assert_eq!(strategy.to_string().parse::<TruncationStrategy>().unwrap(), strategy);
        }
        let error = "truncation_left".parse::<TruncationStrategy>().unwrap_err().to_string();
        assert!(error.contains("expected delete, truncation_right"), "{error}");
    }

    /// Files that are too large or not ours to commit.
    fn shared() -> Option<PathBuf> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data");
        if folder.is_dir() {
            return Some(folder);
        }
        left_out(&format!("there is no {}", folder.display()));
        None
    }

    fn read_json(path: PathBuf) -> Value {
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    fn ids(value: &Value) -> Vec<u32> {
        serde_json::from_value(value.clone()).unwrap()
    }

    #[test]
    fn llama3_s_tokens_are_those_of_the_reference() {
        let Some(data) = shared() else { return };
        let tokenizer = TextTokenizer::from_folder(data.join("llama3-tokenizer")).unwrap();
        assert_eq!(tokenizer.vocab_size(), 128256);
        assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(128000), Some(128009)));
        assert_eq!(tokenizer.stop_ids(), [128001, 128009]);
        assert_eq!(Template::detect(&tokenizer, tokenizer.chat_template()).unwrap(), Template::Llama3);

        let check = |text: &str, expected: &[u32]| {
            assert_eq!(tokenizer.encode(text).unwrap(), expected, "{text:?}");
            assert_eq!(tokenizer.decode(expected).unwrap(), text);
            let mut stream = tokenizer.decode_stream();
            let mut streamed: String = expected.iter().map(|id| stream.push(*id).unwrap()).collect();
            streamed.push_str(&stream.finish().unwrap());
            assert_eq!(streamed, text, "streamed");
        };
        let vectors = read_json(data.join("vectors/llama3_bpe_vectors.json"));
        for vector in vectors.as_array().unwrap() {
            check(vector["text"].as_str().unwrap(), &ids(&vector["ids"]));
        }
        let read = |name: &str| std::fs::read_to_string(data.join("vectors").join(name)).unwrap();
        let (texts, lines) = (read("llama-bpe.inp"), read("llama-bpe.out"));
        let texts: Vec<_> = texts.split("\n__ggml_vocab_test__\n").collect();
        let lines: Vec<_> = lines.lines().collect();
        assert!(vectors.as_array().unwrap().len() > 30 && texts.len() > 30, "vectors are missing");
        for (text, line) in texts.iter().zip(&lines) {
            check(text, &line.split_whitespace().map(|id| id.parse().unwrap()).collect::<Vec<_>>());
        }
        assert_eq!(texts.len(), lines.len());
    }

    /// The HF template trims what is said and ours does not, so ours is given trimmed text.
    #[test]
    fn llama3_s_conversations_are_those_of_its_chat_template() {
        let Some(data) = shared() else { return };
        let tokenizer = TextTokenizer::from_folder(data.join("llama3-tokenizer")).unwrap();
        let renderer = Template::Llama3.renderer(&tokenizer).unwrap();
        let vectors = read_json(data.join("vectors/chat_templates.json"));
        let mut n_compared = 0;
        for case in vectors["cases"].as_array().unwrap().iter().filter(|case| case["template"] == "llama3") {
            let said = |message: &Value| message["content"].as_str().unwrap().trim().to_owned();
            let mut messages = case["messages"].as_array().unwrap().as_slice();
            let system = messages.first().filter(|message| message["role"] == "system").map(said);
            messages = &messages[usize::from(system.is_some())..];
            let answer = match messages {
                [before @ .., last] if last["role"] == "assistant" => {
                    messages = before;
                    Some(said(last))
                }
                _ => None,
            };
            let Some((query, turns)) = messages.split_last() else { continue };
            let alternates = turns.chunks(2).all(|turn| turn.len() == 2 && turn[1]["role"] == "assistant");
            if !alternates || query["role"] != "user" || case["add_generation_prompt"] == answer.is_some() {
                continue;
            }
            let history: Vec<_> = turns.chunks(2).map(|turn| (said(&turn[0]), said(&turn[1]))).collect();
            let mut pieces = renderer.prompt(system.as_deref(), &history, &said(query));
            pieces.extend(answer.iter().flat_map(|answer| renderer.answer(answer)));
            let tokens = tokenizer.encode_pieces(&pieces).unwrap();
            assert_eq!(tokenizer.decode_with_control(&tokens).unwrap(), case["text"].as_str().unwrap());
            assert_eq!(tokens, ids(&case["ids"]), "{}", case["text"]);
            n_compared += 1;
        }
        assert!(n_compared >= 4, "only {n_compared} conversations could be compared");
    }

    #[test]
    fn real_preference_data_is_used_but_for_what_does_not_fit() {
        let Some(data) = shared() else { return };
        let tokenizer = TextTokenizer::from_folder(data.join("llama3-tokenizer")).unwrap();
        let too_long = [144, 187, 193];
        for (file, n_rows, left_out) in
            [("oaast_zh_single.jsonl", 382, &too_long[..]), ("shareai_dpo_zh_en_emoji_1row.jsonl", 1, &[])]
        {
            let text = std::fs::read_to_string(data.join("pref").join(file)).unwrap();
            let strict = Strictness::Strict;
            let rows = parse_rows(&text, Path::new(file), &Default::default(), strict).unwrap().rows;
            assert_eq!(rows.len(), n_rows, "{file}");
            let delete = TruncationStrategy::Delete;
            let lenient = Strictness::Lenient;
            let (pairs, skipped) =
                tokenize_rows(&rows, &tokenizer, Template::Llama3, 2048, delete, None, lenient).unwrap();
            let lines: Vec<_> = skipped.iter().map(|row| row.location.line).collect();
            assert_eq!(lines, left_out, "{file}");
            assert_eq!(pairs.len(), n_rows - lines.len(), "{file}");
            for pair in pairs {
                let row = rows.iter().find(|row| row.location == pair.location).unwrap();
                for (answer, text) in
                    [(&pair.chosen, &row.response), (&pair.rejected, &row.rejected_response)]
                {
                    assert_eq!(answer.last(), Some(&128009), "{}", row.location);
                    assert_eq!(&tokenizer.decode(answer).unwrap(), text, "{}", row.location);
                }
            }
        }
    }

    #[test]
    fn a_model_without_a_chat_format_gets_plain_text() {
        let Some(data) = shared() else { return };
        let tokenizer = TextTokenizer::from_folder(data.join("stories260K-hf")).unwrap();
        assert_eq!((tokenizer.vocab_size(), tokenizer.bos_id(), tokenizer.eos_id()), (512, Some(1), Some(2)));
        let template = Template::detect(&tokenizer, tokenizer.chat_template()).unwrap();
        assert_eq!(template, Template::Default);
        let prompt = tokenizer.encode_prompt(template, None, &[], "Once upon a time").unwrap();
        assert_eq!(prompt, [1, 403, 407, 261, 378], "the beginning of the model's own greedy trace");
    }
}
