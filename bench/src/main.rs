//! `drowse-bench`: arguments -> run -> exit code.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use drowse_bench::backend::{self, BackendArgs};
use drowse_bench::client::load::{self, LoadArgs};
use drowse_bench::run::{self, RunArgs};

/// Compares drowse with a direct connection and with what people would otherwise use.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(flatten)]
    run: RunArgs,
    #[command(subcommand)]
    other: Option<Other>,
}

#[derive(Debug, Subcommand)]
enum Other {
    /// The backend of the measurements, also useful by itself.
    Backend(BackendArgs),
    /// One load of a client in a process of its own.
    #[command(hide = true)]
    Load(LoadArgs),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match &arguments.other {
        Some(Other::Backend(args)) => backend::run(args),
        Some(Other::Load(args)) => load::run(args, print),
        None => run::run(&arguments.run, print),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("drowse-bench: {err:#}");
            ExitCode::FAILURE
        }
    }
}

fn print(text: &str) -> Result<()> {
    std::io::stdout().write_all(text.as_bytes()).context("print the report")
}
