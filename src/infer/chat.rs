//! Questions to answers as text: a conversation, streamed.

use std::fmt::Write as _;
use std::io::{ErrorKind, Write};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::backend::Backend;

use super::generate::{Generation, GenerationConfig, Session, StopReason};
use crate::data::template::{Renderer, Template};
use crate::data::tokenize::TextTokenizer;
use crate::error::{Error, Result};
use crate::model::Llama;
use crate::ops::Kernels;
use crate::words::counted;

/// A conversation.
#[derive(Debug)]
pub struct Chat<'m, B: Backend> {
    session: Session<'m, B>,
    tokenizer: &'m TextTokenizer,
    renderer: Renderer,
    system: Option<String>,
    history: Vec<(String, String)>,
    interrupt: Arc<AtomicBool>,
}

impl<'m, B: Kernels> Chat<'m, B> {
    /// A conversation without history; an empty `system` is none.
    ///
    /// # Errors
    /// [`Error::File`] if the tokenizer lacks the template's control tokens, [`Error::Config`] for settings out of range.
    pub fn new(
        model: &'m Llama<B>,
        tokenizer: &'m TextTokenizer,
        template: Template,
        system: Option<String>,
        config: &GenerationConfig,
    ) -> Result<Self> {
        config.check()?;
        let renderer = template.renderer(tokenizer)?;
        Ok(Self {
            session: Session::new(model, config),
            tokenizer,
            renderer,
            system,
            history: Vec::new(),
            interrupt: Arc::default(),
        })
    }

    /// Has whoever sets this flag end the answer that is being generated, or the next one if none is. An answer that it ended takes
    /// the flag back.
    pub fn interrupted_by(&mut self, flag: Arc<AtomicBool>) {
        self.interrupt = flag;
    }

    /// Takes the flag back that was set when no answer was being generated.
    pub(super) fn forget_interrupt(&self) {
        self.interrupt.store(false, Ordering::Relaxed);
    }

    /// Questions and answers so far, oldest first.
    pub fn history(&self) -> &[(String, String)] {
        &self.history
    }

    /// The system prompt.
    pub fn system(&self) -> Option<&str> {
        self.system.as_deref()
    }

    /// Forgets the history.
    pub fn clear(&mut self) {
        self.history.clear();
    }

    /// Begins again with another system prompt; an empty one is none.
    pub fn reset_system(&mut self, system: Option<String>) {
        self.system = system;
        self.clear();
    }

    /// Begins again as if nothing had been generated: with a system prompt, what was said before, and the seed's first draw.
    pub fn begin(&mut self, system: Option<String>, history: Vec<(String, String)>) {
        (self.system, self.history) = (system, history);
        self.session.restart();
    }

    /// Checks that a question can be answered, without answering it.
    ///
    /// # Errors
    /// [`Error::Config`] for one that is too long, or whose tokens the model does not know.
    pub fn check(&self, query: &str) -> Result<()> {
        self.session.check_prompt(&self.prompt(query)?)
    }

    fn prompt(&self, query: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode_pieces(&self.renderer.prompt(self.system.as_deref(), &self.history, query))
    }

    /// Answers, and writes the answer as it comes: whole characters, flushed token by token, no line end. What has been said is kept
    /// in the history, also of an answer that was interrupted.
    ///
    /// # Errors
    /// As [`Session::generate`]; [`Error::Io`] if the answer cannot be written. After an error the history is as before.
    pub fn ask(&mut self, query: &str, output: &mut dyn Write) -> Result<Generation> {
        let prompt = self.prompt(query)?;
        let mut stream = self.tokenizer.decode_stream();
        let mut answer = String::new();
        let mut failure = None;
        let mut show = |text: &str| -> Result<()> {
            answer.push_str(text);
            output
                .write_all(text.as_bytes())
                .and_then(|()| output.flush())
                .map_err(Error::io("write", OUTPUT))
        };
        let generation =
            self.session.generate(&prompt, self.tokenizer.stop_ids(), &mut |token| match stream
                .push(token)
                .and_then(|text| show(&text))
            {
                Ok(()) if self.interrupt.load(Ordering::Relaxed) => ControlFlow::Break(()),
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failure = Some(error);
                    ControlFlow::Break(())
                }
            })?;
        if let Some(error) = failure {
            return Err(error);
        }
        if generation.stop_reason == StopReason::Interrupted {
            self.forget_interrupt();
        }
        show(&stream.finish()?)?;
        self.history.push((query.to_owned(), answer));
        Ok(generation)
    }
}

/// What errors call the place that answers are written to.
pub(super) const OUTPUT: &str = "standard output";

/// Answers one question, on a line of its own.
///
/// # Errors
/// As [`Chat::ask`]. That nobody reads the output any more is none.
pub fn one_shot<B: Kernels>(
    chat: &mut Chat<'_, B>,
    query: &str,
    output: &mut dyn Write,
    notes: &mut dyn Write,
    manner: Manner,
) -> Result<()> {
    // That an answer is cut is told whoever asks.
    unless_closed(ask_on_line(chat, query, output, notes, Manner { is_terminal: true, ..manner }))
}

/// How is talked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Manner {
    /// Somebody types: they are prompted, told what commands do, and may go on after a mistake.
    pub is_terminal: bool,
    /// Speed and reason of the end are noted after every answer.
    pub verbose: bool,
}

pub(super) fn ask_on_line<B: Kernels>(
    chat: &mut Chat<'_, B>,
    query: &str,
    output: &mut dyn Write,
    notes: &mut dyn Write,
    manner: Manner,
) -> Result<()> {
    let generation = chat.ask(query, output)?;
    writeln!(output).and_then(|()| output.flush()).map_err(Error::io("write", OUTPUT))?;
    let is_cut = generation.stop_reason != StopReason::StopToken;
    match manner {
        Manner { verbose: true, .. } => note(notes, &format!("[{}]\n", figures(&generation))),
        Manner { is_terminal: true, .. } if is_cut => {
            note(notes, &format!("[cut: {}]\n", generation.stop_reason));
        }
        _ => {}
    }
    Ok(())
}

/// What an answer cost, in words.
pub(super) fn figures(generation: &Generation) -> String {
    let Generation { tokens, stop_reason, n_prefilled, prefill_time, .. } = generation;
    let mut text =
        format!("{}, {:.1} tokens/s", counted(tokens.len(), "token"), generation.tokens_per_second());
    // Writing to a string cannot fail.
    let _ = write!(
        text,
        "; prompt: {} in {:.2} s; {stop_reason}",
        counted(*n_prefilled, "new token"),
        prefill_time.as_secs_f64()
    );
    text
}

/// Writes beside the answers, where there is anybody to read it.
pub(super) fn note(notes: &mut dyn Write, text: &str) {
    let _ = notes.write_all(text.as_bytes()).and_then(|()| notes.flush());
}

/// Takes it for a good end that nobody reads the output any more, as in `orpo-wgpu infer … | head`.
pub(super) fn unless_closed(result: Result<()>) -> Result<()> {
    match result {
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}
