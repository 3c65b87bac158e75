//! One error type for the whole program.
//!
//! A variant is named by what the user can look at: a file, a line, a tensor, a step. The cause is reachable only
//! through [`std::error::Error::source`], so that printing the chain never says a thing twice.

use std::path::{Path, PathBuf};

use crate::words::first_of;

/// The result of everything that can fail because of the user, the files or the machine.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// How many of the tensors that do not fit a message names: one wrong folder gives hundreds.
const SHOWN_TENSORS: usize = 5;

/// What went wrong, where, and (where one is known) what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Flags or a configuration file that cannot be run; all problems found, one each.
    #[error("invalid configuration:{}", each_on_its_line(.problems))]
    Config {
        /// One sentence a problem, each naming the flag.
        problems: Vec<String>,
        /// What to do.
        hint: Option<String>,
    },
    /// A file or folder that the operating system would not read or write.
    #[error("cannot {action} {}", .path.display())]
    Io {
        /// `read`, `write`, `create`, …
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's word.
        source: std::io::Error,
    },
    /// A file whose content is not what it should be.
    #[error("{}: {problem}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        hint: Option<String>,
    },
    /// A row of a data set that cannot be used.
    #[error("{}: {problem}", place(path, *line, *column))]
    Row {
        /// The data file.
        path: PathBuf,
        /// 1-based line.
        line: usize,
        /// 1-based byte of the line, where other rows begin on it before.
        column: Option<usize>,
        /// What is wrong with the row.
        problem: String,
        /// What to do.
        hint: Option<String>,
    },
    /// Tensors of a checkpoint or an adapter that are missing, extra or misshapen; the first of them are named, one line each.
    #[error("{}: {} of its tensors do not fit:\n  {}", .path.display(), .problems.len(), first_of(.problems, SHOWN_TENSORS).join("\n  "))]
    Tensors {
        /// The file or folder.
        path: PathBuf,
        /// One sentence a tensor, with both shapes; all of them.
        problems: Vec<String>,
        /// What to do, where more is known than that they are another model's.
        hint: Option<String>,
    },
    /// A device that is not there, or cannot do what is asked.
    #[error("device {device}: {problem}")]
    Device {
        /// The device as the user names it.
        device: String,
        /// What it lacks, with both numbers.
        problem: String,
        /// What to do.
        hint: Option<String>,
    },
    /// Settings whose longest step does not fit the device, by the prediction.
    #[error("does not fit the device: {problem}")]
    DoesNotFit {
        /// What it takes, and what there is.
        problem: String,
        /// What to change.
        hint: Option<String>,
    },
    /// A device without room for what a run needs next.
    #[error("device {device} is out of memory in {doing}: {problem}")]
    OutOfMemory {
        /// The device as the user names it.
        device: String,
        /// The work that needed the room: `step 12 (pairs.jsonl:3)`.
        doing: String,
        /// What could not be allocated, and what is held of how much.
        problem: String,
        /// What to do.
        hint: Option<String>,
    },
    /// A run that the user ended, and that can go on.
    #[error("interrupted after {what} {done} of {of}")]
    Interrupted {
        /// What the run consists of: `step`, `answer`.
        what: &'static str,
        /// How many of them are done and saved.
        done: usize,
        /// Those of the whole run.
        of: usize,
        /// How to go on.
        hint: Option<String>,
    },
    /// A run that trained nothing.
    #[error("the adapter did not change: {problem}")]
    Unchanged {
        /// Why.
        problem: String,
        /// What to do.
        hint: &'static str,
    },
    /// A number that is no longer finite.
    #[error("step {step}: {quantity} is {value}, computed from {rows}")]
    NonFinite {
        /// 1-based optimizer step; 0 before the first.
        step: usize,
        /// What it is: `loss`, `grad_norm`.
        quantity: &'static str,
        /// The value.
        value: f64,
        /// The rows of the step, `file:line` each.
        rows: String,
    },
}

/// `file:line`, or `file:line:column`.
pub fn place(path: &Path, line: usize, column: Option<usize>) -> String {
    let column = column.map_or_else(String::new, |column| format!(":{column}"));
    format!("{}:{line}{column}", path.display())
}

/// One problem on the same line, several on lines of their own.
fn each_on_its_line(problems: &[String]) -> String {
    match problems {
        [problem] => format!(" {problem}"),
        several => several.iter().map(|problem| format!("\n  {problem}")).collect(),
    }
}

impl Error {
    /// A configuration error with a single problem.
    pub fn config(problem: impl Into<String>) -> Self {
        Self::Config { problems: vec![problem.into()], hint: None }
    }

    /// An error of a file's content.
    pub fn file(path: impl AsRef<Path>, problem: impl Into<String>) -> Self {
        Self::File { path: path.as_ref().to_owned(), problem: problem.into(), hint: None }
    }

    /// For `map_err`: an error of the operating system, with what was tried on which path.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// The same error with what to do about it; variants without a hint stay as they are.
    pub fn with_hint(mut self, text: impl Into<String>) -> Self {
        if let Self::Config { hint, .. }
        | Self::File { hint, .. }
        | Self::Row { hint, .. }
        | Self::Tensors { hint, .. }
        | Self::Device { hint, .. }
        | Self::DoesNotFit { hint, .. }
        | Self::OutOfMemory { hint, .. }
        | Self::Interrupted { hint, .. } = &mut self
        {
            *hint = Some(text.into());
        }
        self
    }

    /// What to do, where one is known.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Config { hint, .. }
            | Self::File { hint, .. }
            | Self::Row { hint, .. }
            | Self::Device { hint, .. }
            | Self::DoesNotFit { hint, .. }
            | Self::OutOfMemory { hint, .. }
            | Self::Interrupted { hint, .. } => hint.as_deref(),
            Self::Tensors { hint, .. } => {
                Some(hint.as_deref().unwrap_or("these are tensors of another model than config.json's"))
            }
            Self::Unchanged { hint, .. } => Some(hint),
            Self::NonFinite { .. } => Some(
                "lower --learning_rate or --beta, or take the rows named above out of the data; in fp16, which ends at \
                     65504, --dtype fp32 may do",
            ),
            Self::Io { .. } => None,
        }
    }

    /// The process's exit code: 2 for usage and configuration, 1 for a run that failed, 130 (as shells have it) for one that Ctrl-C or
    /// another signal ended.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config { .. } | Self::DoesNotFit { .. } => 2,
            Self::Interrupted { .. } => 130,
            _ => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_tensors_that_do_not_fit_are_named() {
        let error = |n: usize| {
            let problems = (1..=n).map(|i| format!("`t{i}` is missing")).collect();
            Error::Tensors { path: PathBuf::from("model"), problems, hint: None }.to_string()
        };
        assert_eq!(error(1), "model: 1 of its tensors do not fit:\n  `t1` is missing");
        assert!(error(5).ends_with("\n  `t5` is missing"), "{}", error(5));
        let many = error(448);
        assert!(many.starts_with("model: 448 of its tensors") && many.lines().count() == 7, "{many}");
        assert!(many.ends_with("\n  `t5` is missing\n  and 443 more"), "{many}");
    }
}
