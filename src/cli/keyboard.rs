//! Lines that somebody types, with the keys that they know from a shell: arrows, Home and End, Ctrl-R, and what was typed before.

use std::io;

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
    /// The terminal of this process; standard output, which may be a file, is not written to.
    ///
    /// # Errors
    /// [`Error::Io`] if there is none.
    pub fn new() -> Result<Self> {
        let config = Config::builder().behavior(Behavior::PreferTerm).auto_add_history(true).build();
        DefaultEditor::with_config(config).map(Self).map_err(|error| Error::io("open", NAME)(in_io(error)))
    }
}

impl Lines for Keyboard {
    fn read(&mut self, prompt: &str) -> Result<Line> {
        match self.0.readline(prompt) {
            Ok(line) => Ok(Line::Text(line)),
            Err(ReadlineError::Interrupted) => Ok(Line::Dropped),
            Err(ReadlineError::Eof) => Ok(Line::End),
            Err(error) => Err(Error::io("read", NAME)(in_io(error))),
        }
    }
}

fn in_io(error: ReadlineError) -> io::Error {
    match error {
        ReadlineError::Io(error) => error,
        other => io::Error::other(other),
    }
}
