//! The `orpo-wgpu` binary: runs the command line and prints one error chain.

use std::error::Error as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Err(error) = orpo_wgpu::cli::run(std::env::args_os()) else { return ExitCode::SUCCESS };
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        message = format!("{message}: {error}");
        cause = error.source();
    }
    eprintln!("orpo-wgpu: {message}");
    if let Some(hint) = error.hint() {
        eprintln!("hint: {hint}");
    }
    ExitCode::from(error.exit_code())
}
