//! Lines that somebody types, with the keys that they know from a shell: arrows, Home and End, Ctrl-R, and what was typed before.

use std::io::{self, ErrorKind};

use rustyline::error::ReadlineError;
use rustyline::{Behavior, Config, DefaultEditor};

use crate::error::{Error, Result};
use crate::infer::talk::{Line, Lines};

/// What errors call it.
const NAME: &str = "the terminal";

/// A terminal that is typed on.
#[derive(Debug)]
pub struct Keyboard(DefaultEditor);

impl Keyboard {
    /// The terminal of this process, where it is one that lines can be edited on; standard output, which may be a file, is not written to.
    pub fn open() -> Option<Self> {
        let config = Config::builder().behavior(Behavior::PreferTerm).auto_add_history(true).build();
        if is_edited() { DefaultEditor::with_config(config).ok().map(Self) } else { None }
    }
}

/// Where rustyline edits nothing it writes prompts to standard output; the terminals of Git Bash are no consoles, which is what it reads
/// on Windows.
fn is_edited() -> bool {
    let variable = |name| std::env::var(name).unwrap_or_default();
    let has_terminal = match () {
        #[cfg(unix)]
        () => std::fs::OpenOptions::new().read(true).write(true).open("/dev/tty").is_ok(),
        #[cfg(not(unix))]
        () => variable("MSYSTEM").is_empty(),
    };
    has_terminal && !["dumb", "cons25", "emacs"].contains(&variable("TERM").as_str())
}

impl Lines for Keyboard {
    fn read(&mut self, prompt: &str) -> Result<Line> {
        match self.0.readline(prompt) {
            // What is pasted may be several lines.
            Ok(text) => Ok(Line::Text(text.trim_end_matches(['\n', '\r']).to_owned())),
            Err(ReadlineError::Interrupted) => Ok(Line::Dropped),
            Err(ReadlineError::Eof) => Ok(Line::End),
            Err(ReadlineError::Io(error)) if error.kind() == ErrorKind::InvalidData => {
                note!("what is no UTF-8 is not read");
                self.read(prompt)
            }
            Err(ReadlineError::Io(error)) => Err(Error::io("read", NAME)(error)),
            Err(error) => Err(Error::io("read", NAME)(io::Error::other(error))),
        }
    }
}
