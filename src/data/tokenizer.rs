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
        let tokenizer = Self {
            inner,
            path: path.to_owned(),
            vocab_size,
            bos,
            eos,
            stop_ids: Vec::new(),
            chat_template: None,
        };
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
    #[cfg(test)]
    pub(super) fn decode_with_control(&self, ids: &[u32]) -> Result<String> {
        self.decode_as(ids, false)
    }

    fn decode_as(&self, ids: &[u32], skip_control: bool) -> Result<String> {
        let wrong = |error| Error::file(&self.path, format!("cannot decode tokens: {error}"));
        self.inner.decode(ids, skip_control).map_err(wrong)
    }

    /// Begins to decode ids that arrive one by one.
    pub fn decode_stream(&self) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, window: Vec::new(), n_context: 0 }
    }
}

/// The text of ids that arrive one by one: what [`decode`](TextTokenizer::decode) gives for all of them, in parts that
/// never end within a character.
///
/// They may differ around bytes that form no character: a byte-fallback decoder gives up on the whole run of bytes
/// that such a byte stands in, the stream keeps what it has returned of the run.
#[derive(Debug)]
pub struct DecodeStream<'t> {
    tokenizer: &'t TextTokenizer,
    /// The ids of the last part, as context (a decoder may strip a text's first space), and those since then.
    window: Vec<u32>,
    n_context: usize,
}

impl DecodeStream<'_> {
    /// Takes the next id and returns the text that became complete with it, often none.
    ///
    /// # Errors
    /// As [`decode`](TextTokenizer::decode).
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.window.push(id);
        let part = self.pending()?;
        // Bytes that are not yet a character decode to U+FFFD.
        if part.is_empty() || part.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        self.window.drain(..self.n_context);
        self.n_context = self.window.len();
        Ok(part)
    }

    /// Returns what is left: bytes that never became a character, as U+FFFD.
    ///
    /// # Errors
    /// As [`decode`](TextTokenizer::decode).
    pub fn finish(self) -> Result<String> {
        self.pending()
    }

    fn pending(&self) -> Result<String> {
        let (context, pending) = self.window.split_at(self.n_context);
        let text = self.tokenizer.decode(&self.window)?;
        match text.strip_prefix(&self.tokenizer.decode(context)?) {
            Some(part) => Ok(part.to_owned()),
            None => self.tokenizer.decode(pending),
        }
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
            Self::Named(all) => {
                all.into_iter().find(|named| named.name == "default").map(|named| named.template)
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use rand::rngs::Xoshiro256PlusPlus;
    use rand::{RngExt, SeedableRng};
    use serde_json::{Value, json};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    use super::*;

    /// A tokenizer of Llama-3's make: byte-level BPE, `ignore_merges`, a beginning of text by the post-processor.
    ///
    /// It knows every byte, `\n\n`, `hi`, and ` hello`, which no merges lead to.
    pub(in crate::data) fn llama3_like() -> TextTokenizer {
        TextTokenizer::from_bytes(llama3_json().to_string().as_bytes(), "llama3/tokenizer.json").unwrap()
    }

    fn llama3_json() -> Value {
        let mut vocab: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
        vocab.sort();
        vocab.extend(["ĊĊ", "hi", "Ġhello"].map(str::to_owned));
        let control = super::super::template::LLAMA3_CONTROL;
        let split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        json!({
            "version": "1.0",
            "added_tokens": added(&control, vocab.len()),
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
            ]},
            "post_processor": begins_with(control[0], vocab.len()),
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "ignore_merges": true, "vocab": numbered(&vocab), "merges": ["Ċ Ċ", "h i"]},
        })
    }

    /// A tokenizer of Llama-2's make: SentencePiece's word-start mark, byte fallback, `<s>` by the post-processor.
    pub(in crate::data) fn sentencepiece_like() -> TextTokenizer {
        TextTokenizer::from_bytes(sentencepiece_json().to_string().as_bytes(), "sp/tokenizer.json").unwrap()
    }

    fn sentencepiece_json() -> Value {
        let mut vocab: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
        vocab.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
        vocab.push("▁".to_owned());
        vocab.extend(('a'..='z').map(String::from));
        vocab.extend(["▁a", "▁o"].map(str::to_owned));
        json!({
            "version": "1.0",
            "added_tokens": added(&["<unk>", "<s>", "</s>"], 0),
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ]},
            "post_processor": begins_with("<s>", 1),
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ]},
            "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
                      "vocab": numbered(&vocab), "merges": ["▁ a", "▁ o"]},
        })
    }

    fn numbered(vocab: &[String]) -> BTreeMap<&String, usize> {
        vocab.iter().zip(0..).collect()
    }

    fn added(tokens: &[&str], first_id: usize) -> Value {
        let token = |(i, content): (usize, &&str)| {
            json!({"id": first_id + i, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        tokens.iter().enumerate().map(token).collect()
    }

    fn begins_with(token: &str, id: usize) -> Value {
        let special = json!({"SpecialToken": {"id": token, "type_id": 0}});
        let text = json!({"Sequence": {"id": "A", "type_id": 0}});
        json!({"type": "TemplateProcessing", "single": [special, text], "pair": [special, text],
               "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}}})
    }

    #[test]
    fn text_never_becomes_a_control_token() {
        for tokenizer in [llama3_like(), sentencepiece_like()] {
            for control in ["<|eot_id|>", "<|begin_of_text|>", "<s>", "</s>"] {
                let text = format!("a {control}{control} b");
                let ids = tokenizer.encode(&text).unwrap();
                let is_control = |id: &u32| {
                    tokenizer.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(id)
                };
                assert!(!ids.iter().any(is_control), "{text} became {ids:?}");
                assert_eq!(tokenizer.decode(&ids).unwrap(), text);
            }
        }
    }

    #[test]
    fn whole_words_of_the_vocabulary_need_no_merges() {
        let tokenizer = llama3_like();
        let hello = tokenizer.token_to_id("Ġhello").unwrap();
        assert_eq!(tokenizer.encode(" hello").unwrap(), [hello]);
        assert_eq!(tokenizer.encode("\n\n").unwrap(), [tokenizer.token_to_id("ĊĊ").unwrap()]);
        assert_eq!(tokenizer.decode(&[hello, hello]).unwrap(), " hello hello");
    }

    #[test]
    fn the_limits_that_a_tokenizer_was_saved_with_are_dropped() {
        let mut json = llama3_json();
        json["truncation"] =
            json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
        json["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
                                 "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
        let tokenizer = TextTokenizer::from_bytes(json.to_string().as_bytes(), "limited").unwrap();
        assert_eq!(tokenizer.encode("0123456789").unwrap().len(), 10);
    }

    #[test]
    fn a_folder_says_what_begins_and_ends_a_text() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| std::fs::write(folder.path().join(name), text).unwrap();
        let open = || TextTokenizer::from_folder(folder.path());
        let error = open().unwrap_err();
        assert!(error.to_string().ends_with("tokenizer.json: there is no such file"), "{error}");
        assert!(error.hint().unwrap().contains("save_pretrained"), "{error:?}");

        write("tokenizer.json", llama3_json().to_string());
        let tokenizer = open().unwrap();
        let id = |token: &str| tokenizer.token_to_id(token);
        assert_eq!(tokenizer.bos_id(), id("<|begin_of_text|>"));
        assert_eq!(tokenizer.eos_id(), id("<|end_of_text|>"));
        assert_eq!(tokenizer.chat_template(), None);
        assert_eq!(tokenizer.vocab_size(), 256 + 3 + 5);

        let config = json!({"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>", "special": true},
                            "add_bos_token": false, "model_max_length": 1e30,
                            "chat_template": [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]});
        write("tokenizer_config.json", config.to_string());
        let tokenizer = open().unwrap();
        assert_eq!(tokenizer.bos_id(), None);
        assert_eq!(tokenizer.eos_id(), id("<|eot_id|>"));
        assert_eq!(tokenizer.chat_template(), Some("D"));
        let stops = [id("<|end_of_text|>"), id("<|eot_id|>")].map(Option::unwrap);
        assert_eq!(tokenizer.stop_ids(), stops);
        assert_eq!(tokenizer.with_stop_ids(&[7, stops[1]]).stop_ids(), [7, stops[0], stops[1]]);

        write("chat_template.jinja", "J".to_owned());
        assert_eq!(open().unwrap().chat_template(), Some("J"));
        write("tokenizer_config.json", "{".to_owned());
        assert!(open().unwrap_err().to_string().contains("tokenizer_config.json: EOF"), "names the file");
        write("tokenizer.json", "{}".to_owned());
        assert!(
            open().unwrap_err().to_string().contains("tokenizer.json: not a tokenizer"),
            "names the file"
        );
    }

    fn streamed(tokenizer: &TextTokenizer, ids: &[u32]) -> Vec<String> {
        let mut stream = tokenizer.decode_stream();
        let mut parts: Vec<_> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
        parts.push(stream.finish().unwrap());
        parts
    }

    #[test]
    fn a_stream_gives_the_same_text_in_whole_characters() {
        for tokenizer in [llama3_like(), sentencepiece_like()] {
            for text in ["a  b", " hello hello", "Großmutter 中文 🤔 1️⃣\n\n ok", "a\u{fffd}b", "🤔"]
            {
                let ids = tokenizer.encode(text).unwrap();
                let parts = streamed(&tokenizer, &ids);
                assert_eq!(parts.concat(), text, "{parts:?}");
                assert!(text.contains('\u{fffd}') || !parts.concat().contains('\u{fffd}'), "{parts:?}");
                assert!(
                    parts.iter().filter(|part| !part.is_empty()).count() > 1 || text == "🤔",
                    "{parts:?}"
                );
            }
            let control = tokenizer.eos_id().unwrap();
            let ids =
                [tokenizer.encode("a b").unwrap(), vec![control], tokenizer.encode("c").unwrap()].concat();
            assert_eq!(streamed(&tokenizer, &ids).concat(), tokenizer.decode(&ids).unwrap());
        }
        let tokenizer = llama3_like();
        let parts = streamed(&tokenizer, &tokenizer.encode("中").unwrap());
        assert_eq!(parts, ["", "", "中", ""], "nothing before the character's last byte");
        let cut = &tokenizer.encode("中").unwrap()[..2];
        assert_eq!(streamed(&tokenizer, cut), ["", "", "\u{fffd}"], "half a character only at the very end");
    }

    /// Ids in any order, so that most bytes form no character.
    #[test]
    fn a_stream_of_noise_ends_as_it_decodes() {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(3);
        let tokenizer = llama3_like();
        for _ in 0..300 {
            let n = rng.random_range(1..20);
            let ids: Vec<u32> = (0..n).map(|_| rng.random_range(0..tokenizer.vocab_size() as u32)).collect();
            assert_eq!(streamed(&tokenizer, &ids).concat(), tokenizer.decode(&ids).unwrap(), "{ids:?}");
        }
        // Byte fallback gives up on a whole run of bytes; what is not a byte must come through.
        let tokenizer = sentencepiece_like();
        for _ in 0..300 {
            let n = rng.random_range(1..20);
            let ids: Vec<u32> =
                (0..n).map(|_| rng.random_range(131..tokenizer.vocab_size() as u32)).collect();
            let letters = |text: String| text.chars().filter(char::is_ascii).collect::<String>();
            let decoded = tokenizer.decode(&ids).unwrap();
            assert_eq!(letters(streamed(&tokenizer, &ids).concat()), letters(decoded), "{ids:?}");
        }
    }
}
