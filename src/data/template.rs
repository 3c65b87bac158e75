//! Chat templates: a conversation to pieces of control tokens and text.
//!
//! A piece is either a control token or text, and text is encoded so that it never becomes a control token. What a
//! user writes can therefore not end a turn or open another one.
//!
//! `llama3`, as ms-swift writes it (`swift/llm/utils/template.py`, 2.0.5):
//!
//! ```text
//! <|begin_of_text|>
//! <|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>          only with a system prompt
//! (<|start_header_id|>user<|end_header_id|>\n\n{query}<|eot_id|>
//!  <|start_header_id|>assistant<|end_header_id|>\n\n{answer}<|eot_id|>)*
//! ```
//!
//! There is no default system prompt and an empty one is none. `llama3_2`, the format of Llama 3.1 and later, always has a system
//! message: two lines on dates and an empty one before what the system prompt says, where there is one.
//!
//! Content is not trimmed, which Llama's own `chat_template` does. System and user content is encoded together with the `\n\n` before it, an answer on its own:
//! in generation, too, the answer begins after the `\n\n` has been encoded.

use std::fmt;
use std::str::FromStr;

use super::tokenize::TextTokenizer;
use crate::error::{Error, Result};

/// How a conversation is written as tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Template {
    /// `llama3`: the format of the Llama-3 Instruct models.
    Llama3,
    /// `llama3_2`: that of Llama 3.1, 3.2 and 3.3, by ms-swift's name.
    Llama3_2,
    /// `default-generation`: text that goes on, for models without a chat format.
    ///
    /// `BOS {system}\n{question}\n{answer}\n…{query}` is one text, and `{answer} EOS` another, which follows without a
    /// separator. BOS is there if the tokenizer puts one before a text, a line if there is something to write on it.
    Default,
}

/// A part of a rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// A control token, by its id.
    Control(u32),
    /// Text, to be encoded on its own.
    Text(String),
}

/// The control tokens that Llama-3's format and its models use.
pub(super) const LLAMA3_CONTROL: [&str; 5] =
    ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"];

/// What every system message of Llama 3.1 and later begins with. The second date is the one that 3.1's `chat_template` writes; 3.2's
/// writes that of the day, with which no run could be repeated.
const DATES: &str = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";

impl Template {
    /// Every template, in the order of the help text.
    pub const ALL: [Self; 3] = [Self::Llama3, Self::Llama3_2, Self::Default];

    /// The name that `--template_type` knows it by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama3 => "llama3",
            Self::Llama3_2 => "llama3_2",
            Self::Default => "default-generation",
        }
    }

    /// Finds the template of a model by its tokenizer and the `chat_template` of its `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] if the model comes with a chat template that is not Llama-3's: training would teach it
    /// another format than it is used with, and only the user can want that.
    pub fn detect(tokenizer: &TextTokenizer, chat_template: Option<&str>) -> Result<Self> {
        let has_tokens = LLAMA3_CONTROL.iter().all(|token| tokenizer.token_to_id(token).is_some());
        let is_llama3 = |text: &str| {
            ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"].iter().all(|t| text.contains(t))
        };
        match chat_template {
            None if has_tokens => Ok(Self::Llama3),
            None => Ok(Self::Default),
            Some(text) if has_tokens && is_llama3(text) && text.contains("Cutting Knowledge Date") => {
                Ok(Self::Llama3_2)
            }
            Some(text) if has_tokens && is_llama3(text) => Ok(Self::Llama3),
            Some(_) => Err(Error::Config {
                problems: vec![format!(
                    "--template_type AUTO: the chat template beside {} is not Llama-3's",
                    tokenizer.path().display()
                )],
                hint: Some(
                    "--template_type default-generation trains on plain text, --template_type llama3 on Llama-3's format"
                        .to_owned(),
                ),
            }),
        }
    }

    /// Looks up the template's control tokens.
    ///
    /// # Errors
    /// [`Error::File`] if the tokenizer lacks one of them.
    pub fn renderer(self, tokenizer: &TextTokenizer) -> Result<Renderer> {
        let lacks = |what: &str| {
            Error::file(tokenizer.path(), format!("it has no {what}, which template {self} needs"))
                .with_hint("choose another --template_type, or the model's own tokenizer.json")
        };
        let id = |token: &str| tokenizer.token_to_id(token).ok_or_else(|| lacks(&format!("token `{token}`")));
        Ok(Renderer(match self {
            Self::Llama3 | Self::Llama3_2 => Control::Llama3 {
                preamble: if self == Self::Llama3_2 { DATES } else { "" },
                begin_of_text: id("<|begin_of_text|>")?,
                start_header: id("<|start_header_id|>")?,
                end_header: id("<|end_header_id|>")?,
                eot: id("<|eot_id|>")?,
            },
            Self::Default => Control::Default {
                bos: tokenizer.bos_id(),
                eos: tokenizer.eos_id().ok_or_else(|| lacks("end-of-text token"))?,
            },
        }))
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Template {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|template| template.name() == name).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|template| template.name()).collect();
            Error::config(format!("--template_type `{name}`: expected AUTO, {}", names.join(", ")))
        })
    }
}

/// A template with the control tokens of one tokenizer.
#[derive(Debug, Clone, Copy)]
pub struct Renderer(Control);

#[derive(Debug, Clone, Copy)]
enum Control {
    /// Every system message begins with `preamble`; there is none that is empty.
    Llama3 {
        preamble: &'static str,
        begin_of_text: u32,
        start_header: u32,
        end_header: u32,
        eot: u32,
    },
    Default {
        bos: Option<u32>,
        eos: u32,
    },
}

impl Renderer {
    /// Renders everything up to the answer: an empty `system` is none, `history` is oldest first.
    pub fn prompt(&self, system: Option<&str>, history: &[(String, String)], query: &str) -> Vec<Piece> {
        let system = system.unwrap_or_default();
        match self.0 {
            Control::Llama3 { preamble, begin_of_text, start_header, end_header, eot } => {
                let header = |role: &str, text: String| {
                    let role = Piece::Text(role.to_owned());
                    [Piece::Control(start_header), role, Piece::Control(end_header), Piece::Text(text)]
                };
                let said = |role: &str, text: &str| {
                    header(role, format!("\n\n{text}")).into_iter().chain([Piece::Control(eot)])
                };
                let to_answer = || header("assistant", "\n\n".to_owned());
                let mut pieces = vec![Piece::Control(begin_of_text)];
                let system = format!("{preamble}{system}");
                if !system.is_empty() {
                    pieces.extend(said("system", &system));
                }
                for (question, answer) in history {
                    pieces.extend(said("user", question));
                    pieces.extend(to_answer());
                    pieces.extend(self.answer(answer));
                }
                pieces.extend(said("user", query));
                pieces.extend(to_answer());
                pieces
            }
            Control::Default { bos, .. } => {
                let turns = history.iter().flat_map(|(question, answer)| [question.as_str(), answer]);
                let lines: Vec<_> = [system]
                    .into_iter()
                    .chain(turns)
                    .chain([query])
                    .filter(|line| !line.is_empty())
                    .collect();
                let text = (!lines.is_empty()).then(|| Piece::Text(lines.join("\n")));
                bos.map(Piece::Control).into_iter().chain(text).collect()
            }
        }
    }

    /// Renders an answer with the control token that ends it.
    pub fn answer(&self, answer: &str) -> Vec<Piece> {
        vec![Piece::Text(answer.to_owned()), Piece::Control(self.end_of_answer())]
    }

    /// The control token that ends an answer.
    pub fn end_of_answer(&self) -> u32 {
        match self.0 {
            Control::Llama3 { eot, .. } => eot,
            Control::Default { eos, .. } => eos,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::tests::{llama3_like, sentencepiece_like};
    use super::*;

    const SH: &str = "<|start_header_id|>";
    const EH: &str = "<|end_header_id|>";
    const EOT: &str = "<|eot_id|>";

    /// Pieces as one line, control tokens spelled out and text quoted.
    fn spelled(tokenizer: &TextTokenizer, pieces: &[Piece]) -> String {
        pieces
            .iter()
            .map(|piece| match piece {
                Piece::Control(id) => tokenizer.decode_with_control(&[*id]).unwrap(),
                Piece::Text(text) => format!("{text:?}"),
            })
            .collect()
    }

    fn history() -> Vec<(String, String)> {
        vec![("hi".to_owned(), " hello".to_owned())]
    }

    #[test]
    fn llama3_keeps_control_and_text_apart() {
        let tokenizer = llama3_like();
        let renderer = Template::Llama3.renderer(&tokenizer).unwrap();
        let prompt =
            |system, history: &[_], query| spelled(&tokenizer, &renderer.prompt(system, history, query));
        let ask = format!(r#"{SH}"assistant"{EH}"\n\n""#);
        let plain = format!(r#"<|begin_of_text|>{SH}"user"{EH}"\n\n x "{EOT}{ask}"#);
        assert_eq!(prompt(None, &[], " x "), plain, "not trimmed");
        assert_eq!(prompt(Some(""), &[], " x "), plain, "an empty system prompt is none");
        assert_eq!(
            prompt(Some("be\nkind"), &history(), "x"),
            format!(
                r#"<|begin_of_text|>{SH}"system"{EH}"\n\nbe\nkind"{EOT}{SH}"user"{EH}"\n\nhi"{EOT}{ask}" hello"{EOT}{SH}"user"{EH}"\n\nx"{EOT}{ask}"#
            )
        );
        assert_eq!(
            prompt(None, &[], EOT),
            format!(r#"<|begin_of_text|>{SH}"user"{EH}"\n\n{EOT}"{EOT}{ask}"#),
            "what looks like a control token stays text"
        );
        assert_eq!(spelled(&tokenizer, &renderer.answer("\nyes")), format!(r#""\nyes"{EOT}"#));
        assert_eq!(Some(renderer.end_of_answer()), tokenizer.token_to_id(EOT));
    }

    /// As 3.1's `chat_template` has it with its own date.
    #[test]
    fn later_models_have_a_system_message_with_dates() {
        let tokenizer = llama3_like();
        let renderer = Template::Llama3_2.renderer(&tokenizer).unwrap();
        let dates = r"\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";
        for (system, text) in [(None, ""), (Some(""), ""), (Some("Antworte kurz."), "Antworte kurz.")] {
            let expected = format!(
                r#"<|begin_of_text|>{SH}"system"{EH}"{dates}{text}"{EOT}{SH}"user"{EH}"\n\nx"{EOT}{SH}"assistant"{EH}"\n\n""#
            );
            assert_eq!(spelled(&tokenizer, &renderer.prompt(system, &[], "x")), expected);
        }
    }

    #[test]
    fn default_generation_is_plain_text() {
        let tokenizer = sentencepiece_like();
        let renderer = Template::Default.renderer(&tokenizer).unwrap();
        let prompt =
            |system, history: &[_], query| spelled(&tokenizer, &renderer.prompt(system, history, query));
        assert_eq!(prompt(None, &[], "Once upon"), r#"<s>"Once upon""#);
        assert_eq!(prompt(Some("s"), &history(), "q"), r#"<s>"s\nhi\n hello\nq""#);
        assert_eq!(prompt(Some(""), &[], ""), "<s>");
        assert_eq!(spelled(&tokenizer, &renderer.answer("a time")), r#""a time"</s>"#);
        assert_eq!(renderer.end_of_answer(), 2);
    }

    #[test]
    fn the_template_is_found_by_the_tokenizer_and_its_chat_template() {
        let (llama3, stories) = (llama3_like(), sentencepiece_like());
        assert_eq!(Template::detect(&llama3, None).unwrap(), Template::Llama3);
        let own = "{{ '<|start_header_id|>' + role + '<|end_header_id|>' + text | trim + '<|eot_id|>' }}";
        assert_eq!(Template::detect(&llama3, Some(own)).unwrap(), Template::Llama3);
        let later = format!("{{{{ 'Cutting Knowledge Date: December 2023' }}}}{own}");
        assert_eq!(Template::detect(&llama3, Some(&later)).unwrap(), Template::Llama3_2);
        assert_eq!(Template::detect(&stories, None).unwrap(), Template::Default);
        let chatml = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'}}";
        for (tokenizer, chat_template) in [(&llama3, chatml), (&stories, chatml), (&stories, own)] {
            let error = Template::detect(tokenizer, Some(chat_template)).unwrap_err();
            assert!(matches!(error, Error::Config { .. }), "{error:?}");
            assert!(error.to_string().contains("--template_type AUTO"), "{error}");
            assert!(error.hint().unwrap().contains("--template_type default-generation"), "{error:?}");
        }
    }

    #[test]
    fn a_missing_control_token_is_named() {
        let error = Template::Llama3.renderer(&sentencepiece_like()).unwrap_err();
        assert!(
            error.to_string().contains("no token `<|begin_of_text|>`, which template llama3 needs"),
            "{error}"
        );
        assert!(error.hint().unwrap().contains("--template_type"), "{error:?}");
    }

    #[test]
    fn names_are_read_back() {
        for template in Template::ALL {
            assert_eq!(template.to_string().parse::<Template>().unwrap(), template);
        }
        let error = "chatml".parse::<Template>().unwrap_err().to_string();
        assert!(
            error.contains("--template_type `chatml`: expected AUTO, llama3, llama3_2, default-generation"),
            "{error}"
        );
    }
}
