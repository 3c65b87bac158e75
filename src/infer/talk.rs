//! The loop that a user talks to: messages and commands, typed or piped.

use std::collections::VecDeque;
use std::io::{BufRead, Write};

use super::chat::{Chat, Manner, ask_on_line, note, unless_closed};
use crate::error::{Error, Result};
use crate::ops::Kernels;

/// What is read at a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// A line, or several that were pasted at once, without the last one's end.
    Text(String),
    /// Whoever types wants to begin anew.
    Dropped,
    /// The input ends.
    End,
}

/// Where lines come from.
pub trait Lines {
    /// Reads a line, and shows `prompt` to whoever types it.
    ///
    /// # Errors
    /// [`Error::Io`] if the input cannot be read.
    fn read(&mut self, prompt: &str) -> Result<Line>;
}

/// Lines that nobody types; bytes that are no UTF-8 become U+FFFD.
#[derive(Debug)]
pub struct Piped<R>(pub R);

impl<R: BufRead> Lines for Piped<R> {
    fn read(&mut self, _: &str) -> Result<Line> {
        let mut bytes = Vec::new();
        let n = self.0.read_until(b'\n', &mut bytes).map_err(Error::io("read", "standard input"))?;
        let text = String::from_utf8_lossy(&bytes);
        Ok(if n > 0 { Line::Text(text.trim_end_matches(['\n', '\r']).to_owned()) } else { Line::End })
    }
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
Ctrl-C         end the answer that is being written, or drop the line that is being typed
";

/// Answers what is read, message by message, until the input ends or says so.
///
/// Answers go to `output`; what commands did to `notes`, and only if [`Manner::is_terminal`].
///
/// # Errors
/// [`Error::Io`] if input or output fails, and as [`Chat::ask`]; on a terminal a message that cannot be answered (because it is too
/// long) is noted, and the conversation goes on. That nobody reads the output any more is no error.
pub fn run<B: Kernels>(
    chat: &mut Chat<'_, B>,
    lines: &mut dyn Lines,
    output: &mut dyn Write,
    notes: &mut dyn Write,
    manner: Manner,
) -> Result<()> {
    unless_closed(
        Loop { lines, notes, manner, is_multi_line: false, pasted: VecDeque::new() }.run(chat, output),
    )
}

/// Lines of somebody who types them where they cannot be edited: prompts go to the second.
#[derive(Debug)]
pub struct Prompted<R, W>(pub R, pub W);

impl<R: BufRead, W: Write> Lines for Prompted<R, W> {
    fn read(&mut self, prompt: &str) -> Result<Line> {
        note(&mut self.1, prompt);
        Piped(&mut self.0).read(prompt)
    }
}

struct Loop<'io> {
    lines: &'io mut dyn Lines,
    notes: &'io mut dyn Write,
    manner: Manner,
    /// Whether a message ends with a line of its own instead of with its line.
    is_multi_line: bool,
    /// Lines that were pasted and not looked at yet.
    pasted: VecDeque<String>,
}

impl Loop<'_> {
    fn run<B: Kernels>(&mut self, chat: &mut Chat<'_, B>, output: &mut dyn Write) -> Result<()> {
        self.say("type a message, or /help for the commands\n");
        loop {
            let message = match self.read_message()? {
                Line::Text(message) => message,
                Line::Dropped => {
                    self.say("Ctrl-D or /exit ends the chat\n");
                    continue;
                }
                Line::End => break,
            };
            match Meaning::of(&message, self.manner) {
                Meaning::Command(Command::Exit) => return Ok(()),
                Meaning::Command(Command::Clear) => {
                    chat.clear();
                    self.say("forgotten\n");
                }
                Meaning::Command(Command::ResetSystem) => match self.read_text(match self.is_multi_line {
                    true => "system prompt, up to a line with only #> ",
                    false => "system prompt> ",
                })? {
                    Line::Text(system) => {
                        chat.reset_system(Some(system));
                        self.say("new system prompt, and nothing said so far\n");
                    }
                    Line::Dropped => self.say("the system prompt is as before\n"),
                    Line::End => break,
                },
                Meaning::Command(Command::MultiLine) => {
                    self.is_multi_line = true;
                    self.say("a line with only # ends a message, and single-line this mode\n");
                }
                Meaning::Command(Command::SingleLine) => self.is_multi_line = false,
                // Asked for, so that it is told wherever the questions come from.
                Meaning::Command(Command::Help) => note(self.notes, HELP),
                Meaning::Unknown => {
                    self.say(&format!("`{}` is no command; these are:\n{HELP}", message.trim()));
                }
                Meaning::Message(query) if query.trim().is_empty() => {}
                Meaning::Message(query) => {
                    // Ctrl-C that came after the last answer was not meant for this one.
                    chat.forget_interrupt();
                    match ask_on_line(chat, query, output, self.notes, self.manner) {
                        Err(Error::Config { problems, .. }) if self.manner.is_terminal => {
                            self.say(&format!("{}; `clear` forgets what was said\n", problems.join("; ")));
                        }
                        answered => answered?,
                    }
                }
            }
        }
        // The shell's prompt begins on its own line.
        self.say("\n");
        Ok(())
    }

    /// Reads a line; several that were pasted are one, unless a line ends messages.
    fn read_line(&mut self, prompt: &str) -> Result<Line> {
        if let Some(line) = self.pasted.pop_front() {
            return Ok(Line::Text(line));
        }
        let read = self.lines.read(prompt)?;
        let Line::Text(text) = &read else { return Ok(read) };
        let Some((first, rest)) = text.split_once('\n').filter(|_| self.is_multi_line) else {
            return Ok(read);
        };
        self.pasted = rest.lines().map(str::to_owned).collect();
        Ok(Line::Text(first.to_owned()))
    }

    fn say(&mut self, text: &str) {
        if self.manner.is_terminal {
            note(self.notes, text);
        }
    }

    /// Reads a message or a command, which is one line in any mode.
    fn read_message(&mut self) -> Result<Line> {
        match self.read_line(">>> ")? {
            Line::Text(first) => match Meaning::of(&first, self.manner) {
                Meaning::Message(_) => self.read_rest(first),
                Meaning::Command(_) | Meaning::Unknown => Ok(Line::Text(first)),
            },
            other => Ok(other),
        }
    }

    /// Reads a text that is no command whatever it is.
    fn read_text(&mut self, prompt: &str) -> Result<Line> {
        match self.read_line(prompt)? {
            Line::Text(first) => self.read_rest(first),
            other => Ok(other),
        }
    }

    /// Reads what belongs to a text beside its first line.
    fn read_rest(&mut self, first: String) -> Result<Line> {
        if !self.is_multi_line {
            return Ok(Line::Text(first));
        }
        let mut text = String::new();
        let mut next = first;
        while next.trim() != "#" {
            text.push_str(&next);
            text.push('\n');
            match self.read_line("... ")? {
                Line::Text(line) => next = line,
                Line::Dropped => return Ok(Line::Dropped),
                Line::End => break,
            }
        }
        text.truncate(text.trim_end_matches('\n').len());
        Ok(Line::Text(text))
    }
}
