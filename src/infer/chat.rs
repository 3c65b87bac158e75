//! Questions to answers as text: a conversation, streamed, and the loop that a user talks to.

use std::fmt::Write as _;
use std::io::{BufRead, ErrorKind, Write};
use std::ops::ControlFlow;

use burn::tensor::backend::Backend;

use super::generate::{Generation, GenerationConfig, Session, StopReason};
use crate::data::template::{Renderer, Template};
use crate::data::tokenize::TextTokenizer;
use crate::error::{Error, Result, counted};
use crate::model::Llama;
use crate::ops::Kernels;

/// A conversation.
#[derive(Debug)]
pub struct Chat<'m, B: Backend> {
    session: Session<'m, B>,
    tokenizer: &'m TextTokenizer,
    renderer: Renderer,
    system: Option<String>,
    history: Vec<(String, String)>,
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
        Ok(Self { session: Session::new(model, config), tokenizer, renderer, system, history: Vec::new() })
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
    /// in the history.
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
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failure = Some(error);
                    ControlFlow::Break(())
                }
            })?;
        if let Some(error) = failure {
            return Err(error);
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
    unless_closed(ask_on_line(chat, query, output, notes, manner))
}

/// How the loop talks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Manner {
    /// Somebody types: they are prompted, told what commands do, and may go on after a mistake.
    pub is_terminal: bool,
    /// Speed and reason of the end are noted after every answer.
    pub verbose: bool,
}

/// What the loop understands besides questions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    Clear,
    ResetSystem,
    MultiLine,
    SingleLine,
    Exit,
    Help,
}

impl Command {
    /// Reads a command, with a slash before it or without; `help` alone is a message.
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim().to_lowercase();
        let name = if text == "help" { "" } else { text.strip_prefix('/').unwrap_or(&text) };
        Some(match name {
            "clear" => Self::Clear,
            "reset-system" => Self::ResetSystem,
            "multi-line" => Self::MultiLine,
            "single-line" => Self::SingleLine,
            "exit" | "quit" => Self::Exit,
            "help" => Self::Help,
            _ => return None,
        })
    }
}

/// What a line that was typed or piped means.
enum Meaning<'a> {
    Command(Command),
    /// Looks like one.
    Unknown,
    Message(&'a str),
}

impl<'a> Meaning<'a> {
    /// Who types can begin a message with a slash, and may mistake a command's name; what is piped is sent as it is.
    fn of(text: &'a str, manner: Manner) -> Self {
        if manner.is_terminal
            && let Some(message) = escaped(text)
        {
            return Self::Message(message);
        }
        match Command::parse(text) {
            Some(command) => Self::Command(command),
            None if manner.is_terminal && is_like_command(text) => Self::Unknown,
            None => Self::Message(text),
        }
    }
}

/// The message that begins with a slash, of a line with spaces before it.
fn escaped(line: &str) -> Option<&str> {
    line.strip_prefix(' ').map(|rest| rest.trim_start_matches(' ')).filter(|rest| rest.starts_with('/'))
}

/// Whether a line looks like a command: a slash, and a word of letters, digits and dashes right after it.
fn is_like_command(line: &str) -> bool {
    let word = line.strip_prefix('/').and_then(|rest| rest.split(char::is_whitespace).next());
    let is_of_word = |c: char| c.is_ascii_alphanumeric() || "-_?".contains(c);
    word.is_some_and(|word| !word.is_empty() && word.chars().all(is_of_word))
}

const HELP: &str = "clear          forget what was said
reset-system   forget what was said, and take another system prompt (an empty line for none)
multi-line     messages of many lines, each ended by a line with only #
single-line    one line a message
exit, quit     end; so does the end of input (Ctrl-D)
/help          this list
 /text         with a space before it, a message that begins with a slash
";

/// Answers what is read, message by message, until the input ends or says so.
///
/// Answers go to `output`; prompts, and what commands did, to `notes`, and only if [`Manner::is_terminal`].
///
/// # Errors
/// [`Error::Io`] if input or output fails, and as [`Chat::ask`]; on a terminal a message that cannot be answered (because it is too
/// long) is noted, and the conversation goes on. That nobody reads the output any more is no error.
pub fn run<B: Kernels>(
    chat: &mut Chat<'_, B>,
    input: &mut dyn BufRead,
    output: &mut dyn Write,
    notes: &mut dyn Write,
    manner: Manner,
) -> Result<()> {
    unless_closed(Loop { input, notes, manner, lines: Lines::Single }.run(chat, output))
}

/// Whether a message ends with its line or with a line of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lines {
    Single,
    Multi,
}

struct Loop<'io> {
    input: &'io mut dyn BufRead,
    notes: &'io mut dyn Write,
    manner: Manner,
    lines: Lines,
}

impl Loop<'_> {
    fn run<B: Kernels>(&mut self, chat: &mut Chat<'_, B>, output: &mut dyn Write) -> Result<()> {
        self.say("type a message, or /help for the commands\n");
        while let Some(message) = self.read_message(">>> ")? {
            match Meaning::of(&message, self.manner) {
                Meaning::Command(Command::Exit) => return Ok(()),
                Meaning::Command(Command::Clear) => {
                    chat.clear();
                    self.say("forgotten\n");
                }
                Meaning::Command(Command::ResetSystem) => {
                    self.say("system prompt> ");
                    let Some(first) = self.read_line()? else { break };
                    let system = self.read_rest(first)?;
                    chat.reset_system(Some(system));
                    self.say("new system prompt, and nothing said so far\n");
                }
                Meaning::Command(Command::MultiLine) => {
                    self.lines = Lines::Multi;
                    self.say("a line with only # ends a message, and single-line this mode\n");
                }
                Meaning::Command(Command::SingleLine) => self.lines = Lines::Single,
                // Asked for, so that it is told wherever the questions come from.
                Meaning::Command(Command::Help) => note(self.notes, HELP),
                Meaning::Unknown => {
                    self.say(&format!("`{}` is no command; these are:\n{HELP}", message.trim()));
                }
                Meaning::Message(query) if query.trim().is_empty() => {}
                Meaning::Message(query) => match ask_on_line(chat, query, output, self.notes, self.manner) {
                    Err(Error::Config { problems, .. }) if self.manner.is_terminal => {
                        self.say(&format!("{}; `clear` forgets what was said\n", problems.join("; ")));
                    }
                    answered => answered?,
                },
            }
        }
        // The shell's prompt begins on its own line.
        self.say("\n");
        Ok(())
    }

    fn say(&mut self, text: &str) {
        if self.manner.is_terminal {
            note(self.notes, text);
        }
    }

    /// Reads a message or a command; `None` at the end of input.
    fn read_message(&mut self, prompt: &str) -> Result<Option<String>> {
        self.say(prompt);
        let Some(first) = self.read_line()? else { return Ok(None) };
        match Meaning::of(&first, self.manner) {
            Meaning::Message(_) => self.read_rest(first).map(Some),
            Meaning::Command(_) | Meaning::Unknown => Ok(Some(first)),
        }
    }

    /// Reads what belongs to a text beside its first line.
    fn read_rest(&mut self, first: String) -> Result<String> {
        if self.lines == Lines::Single {
            return Ok(first);
        }
        let mut text = String::new();
        let mut line = Some(first);
        while let Some(next) = line.filter(|line| line.trim() != "#") {
            text.push_str(&next);
            text.push('\n');
            self.say("... ");
            line = self.read_line()?;
        }
        text.truncate(text.trim_end_matches('\n').len());
        Ok(text)
    }

    /// Reads a line without its end; bytes that are no UTF-8 become U+FFFD.
    fn read_line(&mut self) -> Result<Option<String>> {
        let mut bytes = Vec::new();
        let n = self.input.read_until(b'\n', &mut bytes).map_err(Error::io("read", "standard input"))?;
        let text = String::from_utf8_lossy(&bytes);
        Ok((n > 0).then(|| text.trim_end_matches(['\n', '\r']).to_owned()))
    }
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
    let is_cut = matches!(generation.stop_reason, StopReason::MaxNewTokens | StopReason::ContextEnd);
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
