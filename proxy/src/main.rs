//! The program `drowse`: arguments in, exit status out. The only place that reports a fatal error.

use std::io::{Stdout, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser as _;
use drowse::config::{Action, Cli, RunArgs};
use drowse::listener::Passed;
use drowse::log;
use drowse::report::text::printable;
use drowse::report::{Said, check, status, top};
use drowse::setup::{self, Ended};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Wrong arguments; clap uses the same.
const WRONG_ARGUMENTS: u8 = 2;
/// How long threads that write output or resolve a name may hold up the exit.
const LAST_WORDS_TIME: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    match Cli::parse().action {
        Action::Run(run) => serve(*run),
        Action::Enable(args) => set_up(async |out| setup::enable(&args, out).await),
        Action::Disable(args) => set_up(async |out| setup::disable(&args, out).await),
        Action::Status(args) => tell(status::status(&args)),
        Action::Top(args) => tell(top::top(&args)),
        Action::Check(args) => tell(check::check(&args)),
    }
}

/// Says what was found out. Nobody is told if the reader of our output went away.
fn tell(look: impl Future<Output = anyhow::Result<Said>>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let said = match runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(look)) {
        Ok(said) => said,
        Err(error) => Said { answer: String::new(), notes: vec![format!("{error:#}")], success: false },
    };
    let written = std::io::stdout().lock().write_all(said.answer.as_bytes());
    for note in &said.notes {
        let _nobody_listens = writeln!(std::io::stderr(), "drowse: {}", printable(note));
    }
    if said.success && written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Carries out a command that says what it does while it does it.
fn set_up(command: impl AsyncFnOnce(&mut Stdout) -> anyhow::Result<Ended>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended =
        runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(command(&mut std::io::stdout())));
    match ended {
        Ok(Ended::Well) => ExitCode::SUCCESS,
        Ok(Ended::Refused) => ExitCode::FAILURE,
        Err(error) => {
            let _nobody_listens = writeln!(std::io::stderr(), "drowse: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(run: RunArgs) -> ExitCode {
    log::begin(&run);
    let open_files = getrlimit(Resource::Nofile);
    let passed = match drowse::listener::passed() {
        Ok(passed) => passed,
        Err(error) => return failed(ExitCode::FAILURE, &error),
    };
    let checked = run.check(passed.len()).and_then(|()| run.connections_max(raise_open_files(open_files)));
    let connections_max = match checked {
        Ok(connections_max) => connections_max,
        Err(message) => return failed(ExitCode::from(WRONG_ARGUMENTS), &anyhow::Error::msg(message)),
    };
    match block_on(run, passed, connections_max, open_files) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(ExitCode::FAILURE, &error),
    }
}

fn failed(status: ExitCode, error: &anyhow::Error) -> ExitCode {
    tracing::error!(target: log::LAST_WORDS, "{error:#}");
    status
}

fn block_on(
    run: RunArgs,
    passed: Vec<Passed>,
    connections_max: u64,
    open_files: Rlimit,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let served = runtime.block_on(drowse::event_loop::run(run, passed, connections_max, open_files));
    runtime.shutdown_timeout(LAST_WORDS_TIME);
    served
}

/// Raises the soft limit on open files to the hard one and returns what holds.
fn raise_open_files(limit: Rlimit) -> u64 {
    let raised = Rlimit { current: limit.maximum, ..limit };
    let holds = if setrlimit(Resource::Nofile, raised).is_ok() { raised } else { limit };
    holds.current.unwrap_or(u64::MAX)
}
