//! A model's tokenizer: text to token ids and back.
//!
//! Text is encoded as text. The spelling of a control token in it (`<|eot_id|>`) becomes ordinary tokens, and nothing
//! is put before or after it; control tokens come from the [`template`](super::template) alone.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use tokenizers::Tokenizer;

use super::template::{Piece, Template};
use crate::error::{Error, Result};

/// A tokenizer with what its model's folder says about it.
#[derive(Debug, Clone)]
pub struct TextTokenizer {
    inner: Tokenizer,
    path: PathBuf,
    vocab_size: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    stop_ids: Vec<u32>,
    chat_template: Option<String>,
}

/// What a text ends with, where `tokenizer_config.json` does not say.
const USUAL_EOS: [&str; 3] = ["<|end_of_text|>", "</s>", "<|endoftext|>"];

/// What ends Llama-3's answers, whatever the model's `generation_config.json` says: the first release names only
/// `<|end_of_text|>`, and never stops.
const LLAMA3_STOP: [&str; 2] = ["<|eot_id|>", "<|end_of_text|>"];

impl TextTokenizer {
    /// Reads the `tokenizer.json` of a model folder, and where they are there its `tokenizer_config.json`
    /// (`bos_token`, `eos_token`, `add_bos_token`, `chat_template`) and `chat_template.jinja`, which goes first.
    ///
    /// # Errors
    /// [`Error::File`] naming the file that is missing or cannot be understood, [`Error::Io`] for one that cannot be
    /// read.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let mut tokenizer = Self::from_file(folder.join("tokenizer.json"))?;
        let config = folder.join("tokenizer_config.json");
        if let Some(text) = read_if_there(&config)? {
            let config: TokenizerConfig =
                serde_json::from_str(&text).map_err(|error| Error::file(&config, error.to_string()))?;
            tokenizer.apply(config);
        }
        if let Some(text) = read_if_there(&folder.join("chat_template.jinja"))? {
            tokenizer.chat_template = Some(text);
        }
        Ok(tokenizer)
    }

    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::File`] if there is none or it cannot be understood, [`Error::Io`] if it cannot be read.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        match std::fs::read(path) {
            Ok(bytes) => Self::from_bytes(&bytes, path),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(Error::file(path, "there is no such file").with_hint(
                    "a model with only a tokenizer.model: in Python, transformers.AutoTokenizer.from_pretrained(folder)\
                     .save_pretrained(folder) writes the tokenizer.json",
                ))
            }
            Err(error) => Err(Error::io("read", path)(error)),
        }
    }

    /// Reads the bytes of a `tokenizer.json`; `label` is the name that errors give it.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be understood.
    pub fn from_bytes(bytes: &[u8], label: impl AsRef<Path>) -> Result<Self> {
        let path = label.as_ref();
        let wrong = |error: tokenizers::Error| Error::file(path, format!("not a tokenizer: {error}"));
        let mut inner = Tokenizer::from_bytes(bytes).map_err(wrong)?;
        inner.set_encode_special_tokens(true);
        // A tokenizer.json may carry the length limit and the padding it was last used with.
        inner.with_padding(None).with_truncation(None).map_err(wrong)?;
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1);
        let eos = USUAL_EOS.iter().find_map(|token| inner.token_to_id(token));
        let bos = added_before(&inner).map_err(wrong)?;
        let tokenizer =
            Self { inner, path: path.to_owned(), vocab_size, bos, eos, stop_ids: Vec::new(), chat_template: None };
        Ok(tokenizer.with_stop_ids(&[]))
    }

    fn apply(&mut self, config: TokenizerConfig) {
        let id = |token: Option<TokenName>| token.and_then(|token| self.inner.token_to_id(token.text()));
        let bos = id(config.bos_token);
        let eos = id(config.eos_token).or(self.eos);
        self.bos = match config.add_bos_token {
            Some(true) => self.bos.or(bos),
            Some(false) => None,
            None => self.bos,
        };
        self.eos = eos;
        self.chat_template = config.chat_template.and_then(ChatTemplate::into_default);
        self.set_stop_ids(&[]);
    }

    /// The same tokenizer with the ids that end a generation: the given ones (`eos_token_id` of the model's
    /// `generation_config.json` and `config.json`), the tokenizer's end of text, and Llama-3's end of turn.
    pub fn with_stop_ids(mut self, ids: &[u32]) -> Self {
        self.set_stop_ids(ids);
        self
    }

    fn set_stop_ids(&mut self, ids: &[u32]) {
        let llama3 = LLAMA3_STOP.iter().filter_map(|token| self.inner.token_to_id(token));
        let mut all: Vec<u32> = ids.iter().copied().chain(self.eos).chain(llama3).collect();
        all.sort_unstable();
        all.dedup();
        self.stop_ids = all;
    }

    /// The ids that end a generation, ascending.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// The file that the tokenizer was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number of ids, counted up to the highest: what an embedding needs at least.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that the tokenizer puts before a text, if it does.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    /// The model's chat template in Jinja, where its folder has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The id of a token by its exact content, control tokens included.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Encodes text as text, without control tokens.
    ///
    /// # Errors
    /// [`Error::File`] naming the tokenizer, if it cannot encode the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match self.inner.encode_fast(text, false) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => Err(Error::file(&self.path, format!("cannot encode a text: {error}"))),
        }
    }

    /// Encodes a rendered conversation, every piece on its own.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_pieces(&self, pieces: &[Piece]) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Control(id) => ids.push(*id),
                Piece::Text(text) => ids.extend(self.encode(text)?),
            }
        }
        Ok(ids)
    }

    /// Encodes a conversation up to the point where the model answers.
    ///
    /// # Errors
    /// As [`encode`](Self::encode), and [`Error::File`] if the tokenizer lacks the template's control tokens.
    pub fn encode_prompt(
        &self,
        template: Template,
        system: Option<&str>,
        history: &[(String, String)],
        query: &str,
    ) -> Result<Vec<u32>> {
        self.encode_pieces(&template.renderer(self)?.prompt(system, history, query))
    }

    /// The text of token ids, without control tokens.
    ///
    /// # Errors
    /// [`Error::File`] naming the tokenizer, if its decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.decode_as(ids, true)
    }

    /// The text of token ids, control tokens spelled out.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn decode_with_control(&self, ids: &[u32]) -> Result<String> {
        self.decode_as(ids, false)
    }

    fn decode_as(&self, ids: &[u32], skip_control: bool) -> Result<String> {
        let wrong = |error| Error::file(&self.path, format!("cannot decode tokens: {error}"));
        self.inner.decode(ids, skip_control).map_err(wrong)
    }

    /// Begins to decode ids that arrive one by one.
    pub fn decode_stream(&self) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, window: Vec::new(), n_context: 0, n_shown: 0 }
    }

    fn is_control(&self, id: u32) -> bool {
        let vocabulary = self.inner.get_added_vocabulary();
        vocabulary.simple_id_to_token(id).is_some_and(|token| vocabulary.is_special_token(&token))
    }
}

/// The text of ids that arrive one by one: what [`decode`](TextTokenizer::decode) gives for all of them, in parts that
/// never end within a character.
#[derive(Debug)]
pub struct DecodeStream<'t> {
    tokenizer: &'t TextTokenizer,
    /// The ids of the last part, as context (a decoder may strip a text's first space), and those not yet complete.
    window: Vec<u32>,
    n_context: usize,
    /// Bytes of the window's text that have been returned.
    n_shown: usize,
}

impl DecodeStream<'_> {
    /// Takes the next id and returns the text that became complete with it, often none.
    ///
    /// # Errors
    /// As [`decode`](TextTokenizer::decode).
    pub fn push(&mut self, id: u32) -> Result<String> {
        if self.tokenizer.is_control(id) {
            return Ok(String::new());
        }
        self.window.push(id);
        let text = self.tokenizer.decode(&self.window)?;
        // Bytes that are not (yet) a character decode to U+FFFD.
        let complete = text.trim_end_matches('\u{fffd}');
        let part = complete.get(self.n_shown..).unwrap_or_default().to_owned();
        self.n_shown += part.len();
        if complete.len() == text.len() && !part.is_empty() {
            self.window.drain(..self.n_context);
            self.n_context = self.window.len();
            self.n_shown = self.tokenizer.decode(&self.window)?.len();
        }
        Ok(part)
    }

    /// Returns what is left: bytes that never became a character, as U+FFFD.
    ///
    /// # Errors
    /// As [`decode`](TextTokenizer::decode).
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.window)?;
        Ok(text.get(self.n_shown..).unwrap_or_default().to_owned())
    }
}

/// The single token that the tokenizer's post-processor puts before a text.
fn added_before(tokenizer: &Tokenizer) -> tokenizers::Result<Option<u32>> {
    let plain = tokenizer.encode_fast("a", false)?;
    let processed = tokenizer.encode_fast("a", true)?;
    let first = processed.get_ids().first().copied();
    Ok(first.filter(|_| processed.len() > plain.len() && !processed.get_ids().starts_with(plain.get_ids())))
}

fn read_if_there(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

/// What is of use in a `tokenizer_config.json`.
#[derive(Deserialize)]
struct TokenizerConfig {
    bos_token: Option<TokenName>,
    eos_token: Option<TokenName>,
    add_bos_token: Option<bool>,
    chat_template: Option<ChatTemplate>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TokenName {
    Plain(String),
    Described { content: String },
}

impl TokenName {
    fn text(&self) -> &str {
        match self {
            Self::Plain(content) | Self::Described { content } => content,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ChatTemplate {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl ChatTemplate {
    fn into_default(self) -> Option<String> {
        match self {
            Self::One(template) => Some(template),
            Self::Named(all) => all.into_iter().find(|named| named.name == "default").map(|named| named.template),
        }
    }
}
