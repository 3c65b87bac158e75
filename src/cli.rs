//! The command line: what the user typed to what runs. One file a subcommand; the flags of `train` are in [`crate::config`].

/// Prints a line to standard output. Where nobody reads that any more, as behind `| head`, the line is lost and the work goes on.
macro_rules! say {
    ($($line:tt)*) => { $crate::cli::print_line(format_args!($($line)*)) };
}

pub mod advice;
pub mod bench;
pub mod budget;
pub mod devices;
pub mod infer;
pub mod limits;
pub mod longest;
pub mod nearest;
pub mod open;
pub mod outcome;
pub mod plan;
mod precision;
pub mod profile_table;
pub mod progress;
pub mod rows;
pub mod train;
mod tune;
pub mod words;

use std::ffi::OsString;
use std::fmt;
use std::io::Write;
use std::path::PathBuf;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::{TrainArgs, with_dashed_aliases};
use crate::demo;
use crate::error::{Error, Result};

fn print_line(line: fmt::Arguments<'_>) {
    // That the reader is gone is all that can be wrong.
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Fine-tunes Llama-3 with ORPO + LoRA on the GPU you own, then lets you talk to the result.
#[derive(Debug, Parser)]
#[command(name = "orpo-wgpu", version, propagate_version = true, max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train an adapter; without a model, the demo inside this program
    Train(Box<TrainCommand>),
    /// Predict memory and time of a training run and of its alternatives; nothing is loaded or written
    Plan(Box<TrainCommand>),
    /// Talk to a model and its adapter; without a model, to the demo and its newest adapter
    Infer(Box<infer::InferArgs>),
    /// Time a training step on random weights, and see how far it is from what the device can do
    Bench(bench::BenchArgs),
    /// List the devices, and which one `--device auto` takes
    Devices(devices::DevicesArgs),
}

#[derive(Debug, clap::Args)]
struct TrainCommand {
    /// Settings from a TOML or JSON file, such as a run's args.json; flags win
    #[arg(long)]
    config: Option<PathBuf>,
    #[command(flatten)]
    _args: TrainArgs,
}

/// The whole command line, with every flag in both spellings.
pub fn command() -> clap::Command {
    // A flag that is given again wins, so that one can be added to a command that is repeated.
    Cli::command().mut_subcommands(|command| with_dashed_aliases(command).args_override_self(true))
}

/// Parses and runs a command line.
///
/// # Errors
/// What the subcommand says. Usage errors, help and version end the process as clap does: with code 2, and 0.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<()> {
    let matches = command().get_matches_from(args);
    let cli = Cli::from_arg_matches(&matches).map_err(|e| Error::config(e.to_string()))?;
    match (cli.command, matches.subcommand()) {
        (Command::Train(command), Some((_, matches))) => {
            train::run(TrainArgs::resolve(matches, command.config.as_deref(), &demo::settings())?)
        }
        (Command::Plan(command), Some((_, matches))) => {
            plan::run(TrainArgs::resolve(matches, command.config.as_deref(), &demo::settings())?)
        }
        (Command::Infer(args), _) => infer::run(&args),
        (Command::Bench(args), _) => bench::run(&args),
        (Command::Devices(args), _) => devices::run(&args),
        (Command::Train(_) | Command::Plan(_), None) => unreachable!("a parsed subcommand has matches"),
    }
}
