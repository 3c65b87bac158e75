//! The command line: what the user typed to what runs. One file a subcommand; the flags of `train` are in [`crate::config`].

/// Prints a line of results to standard output. Where nobody reads that any more, as behind `| head`, the line is lost and the work
/// goes on; what else can be wrong, as a disk that is full, is the program's error once the work is done.
macro_rules! say {
    ($($line:tt)*) => { $crate::cli::print_line(format_args!($($line)*)) };
}

/// Prints a line about the work to standard error, where there is anybody to read it.
macro_rules! note {
    ($($line:tt)*) => { $crate::cli::print_note(format_args!($($line)*)) };
}

pub mod adapter;
pub mod advice;
pub mod bench;
pub mod budget;
pub mod devices;
pub mod eval;
pub mod export;
pub mod infer;
pub mod interrupts;
pub mod keyboard;
pub mod limits;
pub mod longest;
mod measured_step;
pub mod nearest;
pub mod open;
pub mod outcome;
pub mod plan;
mod precision;
pub mod profile_table;
pub mod progress;
mod record;
pub mod rows;
mod start;
mod tips;
pub mod train;
mod tune;
pub mod words;
mod work;

use std::error::Error as _;
use std::ffi::OsString;
use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::{TrainArgs, with_dashed_aliases};
use crate::demo;
use crate::error::{Error, Result};
use crate::ops::notes;

/// Whether standard error has lines already.
static IS_NOTED: AtomicBool = AtomicBool::new(false);

/// The first failure of standard output.
static UNPRINTED: Mutex<Option<io::Error>> = Mutex::new(None);

fn print_line(line: fmt::Arguments<'_>) {
    tell_noticed();
    keep_failure(writeln!(io::stdout(), "{line}"));
}

fn keep_failure(printed: io::Result<()>) {
    if let Err(error) = printed
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        UNPRINTED.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }
}

/// Whether everything that was printed arrived, or nobody wanted it.
fn check_printed() -> Result<()> {
    tell_noticed();
    keep_failure(io::stdout().flush());
    match UNPRINTED.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(error) => Err(Error::io("write", "standard output")(error)),
        None => Ok(()),
    }
}

/// Unlike `eprintln!`, which panics where standard error is closed.
fn print_note(line: fmt::Arguments<'_>) {
    tell_noticed();
    IS_NOTED.store(true, Ordering::Relaxed);
    let _ = writeln!(io::stderr(), "{line}");
}

/// Tells of what the ops noticed of the device since something was last printed.
fn tell_noticed() {
    for noticed in notes::take() {
        let _ = writeln!(io::stderr(), "{}", words::noted("device", &noticed));
    }
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
    /// Compute what a run logs of its held-out rows, of an adapter that there is; nothing is written
    Eval(Box<TrainCommand>),
    /// Merge an adapter into its model, as a folder like the model's own, for what reads no adapters
    Export(export::ExportArgs),
    /// Time a training step on random weights, and see how far it is from what the device can do
    Bench(bench::BenchArgs),
    /// List the devices, and which one `--device auto` takes
    Devices(devices::DevicesArgs),
}

#[derive(Debug, clap::Args)]
struct TrainCommand {
    /// Settings from a TOML or JSON file, such as a run's args.json; of several files the later wins, and flags over all
    #[arg(long, action = clap::ArgAction::Append)]
    config: Vec<PathBuf>,
    #[command(flatten)]
    _args: TrainArgs,
}

/// The whole command line, with every flag in both spellings.
pub fn command() -> clap::Command {
    // A flag that is given again wins, so that one can be added to a command that is repeated.
    let command =
        Cli::command().mut_subcommands(|command| with_dashed_aliases(command).args_override_self(true));
    ["train", "plan", "eval"].into_iter().fold(command, |command, name| {
        command.mut_subcommand(name, |subcommand| subcommand.after_help(demo_settings()))
    })
}

/// What applies instead of the defaults where the demo is trained.
fn demo_settings() -> String {
    let settings = demo::settings();
    let flags: Vec<String> = settings.iter().map(|(name, value)| format!("--{name} {value}")).collect();
    format!("The demo, which is trained without a model, has defaults of its own: {}", flags.join(" "))
}

/// Runs a command line and prints its error, if it has one: the cause behind it, and what to do.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let Err(error) = run(args) else { return ExitCode::SUCCESS };
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        message = format!("{message}: {error}");
        cause = error.source();
    }
    // Stands apart from what was said on the way.
    if IS_NOTED.load(Ordering::Relaxed) {
        note!("");
    }
    note!("orpo-wgpu: {message}");
    if let Some(hint) = error.hint() {
        note!("hint: {hint}");
    }
    ExitCode::from(error.exit_code())
}

/// Parses and runs a command line.
///
/// # Errors
/// What the subcommand says, and standard output that cannot be written. Usage errors end the process as clap does, with code 2.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<()> {
    let args: Vec<OsString> = args.into_iter().collect();
    let matches = match command().try_get_matches_from(&args) {
        Ok(matches) => matches,
        Err(usage) if usage.use_stderr() => tips::with_tip(usage, &args).exit(),
        // Help and version, which clap would lose in silence where the disk is full.
        Err(asked) => {
            keep_failure(asked.print());
            return check_printed();
        }
    };
    run_matches(&matches).and_then(|()| check_printed())
}

fn run_matches(matches: &ArgMatches) -> Result<()> {
    let cli = Cli::from_arg_matches(matches).map_err(|e| Error::config(e.to_string()))?;
    match (cli.command, matches.subcommand()) {
        (Command::Train(command), Some((_, matches))) => {
            train::run(TrainArgs::resolve(matches, &command.config, &demo::settings())?)
        }
        (Command::Plan(command), Some((_, matches))) => {
            plan::run(TrainArgs::resolve(matches, &command.config, &demo::settings())?)
        }
        (Command::Eval(command), Some((_, matches))) => {
            let args = TrainArgs::resolve(matches, &command.config, &demo::settings())?;
            let is_named = matches.value_source("adapters") == Some(ValueSource::CommandLine);
            eval::run(&args, is_named, &command.config)
        }
        (Command::Infer(args), _) => infer::run(&args),
        (Command::Export(args), _) => export::run(&args),
        (Command::Bench(args), _) => bench::run(&args),
        (Command::Devices(args), _) => devices::run(&args),
        (Command::Train(_) | Command::Plan(_) | Command::Eval(_), None) => {
            unreachable!("a parsed subcommand has matches")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config::other_names;

    #[test]
    fn help_tells_of_the_demo_s_own_defaults() {
        for name in ["train", "plan", "eval"] {
            let help = command().find_subcommand_mut(name).unwrap().render_help().to_string();
            let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(help.contains("--learning_rate 0.002 --batch_size 8"), "{name}: {help}");
        }
    }

    #[test]
    fn what_is_true_or_false_stands_alone_for_true() {
        let mut command = command();
        command.build();
        for subcommand in command.get_subcommands() {
            for flag in subcommand.get_arguments().filter(|flag| !flag.is_positional()) {
                let values: Vec<_> =
                    flag.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
                let fewest = flag.get_num_args().map_or(1, |n| n.min_values());
                assert!(
                    values != ["true", "false"] || fewest == 0,
                    "{} {}",
                    subcommand.get_name(),
                    flag.get_id()
                );
            }
        }
    }

    #[test]
    fn a_flag_has_one_default_in_every_subcommand() {
        let command = command();
        let train = command.find_subcommand("train").unwrap();
        let mut n_shared = 0;
        // Measured is another length, and few steps; a model of its own and draws of its own have defaults of their own.
        for (name, own) in [
            ("plan", &[][..]),
            ("eval", &[]),
            ("infer", &["seed"]),
            ("export", &["output_dir"]),
            ("bench", &["max_length", "max_steps", "model_type"]),
        ] {
            let subcommand = command.find_subcommand(name).unwrap();
            for flag in subcommand.get_arguments().filter(|flag| !own.contains(&flag.get_id().as_str())) {
                let Some(trains) = train.get_arguments().find(|other| other.get_id() == flag.get_id()) else {
                    continue;
                };
                n_shared += 1;
                assert_eq!(
                    flag.get_default_values(),
                    trains.get_default_values(),
                    "{name} --{}",
                    flag.get_id()
                );
            }
        }
        assert!(n_shared > 50, "only {n_shared} flags are shared");
    }

    #[test]
    fn other_names_are_of_flags_that_there_are_and_hide_none() {
        let command = command();
        let flags = command.get_subcommands().flat_map(clap::Command::get_arguments);
        let flags: BTreeSet<&str> = flags.filter_map(clap::Arg::get_long).collect();
        let mut seen = BTreeSet::new();
        for (ours, theirs) in other_names::OTHER_NAMES {
            assert!(flags.contains(other_names::flag_of(ours)), "{ours} is no flag");
            for name in *theirs {
                assert!(!flags.contains(name), "--{name} is a flag of ours");
                assert!(seen.insert(name), "--{name} stands in the table twice");
            }
        }
        for (_, theirs) in other_names::NOT_HERE {
            for name in *theirs {
                assert!(!flags.contains(name), "--{name} is a flag of ours");
                assert!(seen.insert(name), "--{name} stands in a table twice");
            }
        }
        for (ours, theirs) in other_names::OTHER_COMMANDS {
            for named in ours.split('`').skip(1).step_by(2) {
                assert!(command.find_subcommand(named).is_some(), "{named} is no command");
            }
            assert!(theirs.iter().all(|name| command.find_subcommand(name).is_none()), "{theirs:?}");
        }
    }
}
