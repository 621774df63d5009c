//! `drowse enable --try`: one connection, and what came of it.
//!
//! Owns: that connection. Must never: send a byte on it, or change anything of what was set up.

use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use socket2::{SockAddr, Socket, Type};
use tokio::process::Command;

use super::{Ended, Names};
use crate::activation::systemd::manager::Manager;
use crate::address::{self, Address};
use crate::clock;
use crate::config::EnableArgs;
use crate::ebpf::pin_name;
use crate::report::control;
use crate::report::snapshot::{Snapshot, StateName};
use crate::report::text::printable;

/// How often drowse is asked how far it is: nobody tells.
const PAUSE: Duration = Duration::from_millis(20);
/// How long the public socket may take to take a connection.
const CONNECT_TIME: Duration = Duration::from_secs(5);
/// What may be needed beyond the time that a start may take.
const MARGIN: Duration = Duration::from_secs(5);
/// The longest that anybody waits for an answer.
const WAIT_MAX: Duration = Duration::from_mins(10);
/// How long the journal may take.
const JOURNAL_TIME: Duration = Duration::from_secs(2);

/// Connects to the first listener and says what happens.
///
/// # Errors
/// Nobody reads `out`.
pub async fn run(
    args: &EnableArgs,
    names: &Names,
    manager: &Manager,
    out: &mut impl Write,
) -> anyhow::Result<Ended> {
    let Some(listen) = args.listen.first() else { return Ok(Ended::Well) };
    let start_timeout = args.run_args(&names.unit).map(|run| run.start_timeout).unwrap_or_default();
    writeln!(out, "try: connecting to {listen}")?;
    out.flush()?;
    match wake(listen, start_timeout.min(WAIT_MAX), names, manager).await {
        Ok(words) => {
            writeln!(out, "try: {words}")?;
            Ok(Ended::Well)
        }
        Err(error) => {
            writeln!(out, "try: failed: {error:#}")?;
            writeln!(
                out,
                "What was set up stays: put it right and connect again, or undo it with drowse disable{} {}",
                names.user_flag(),
                names.instance
            )?;
            Ok(Ended::Refused)
        }
    }
}

async fn wake(
    listen: &Address,
    start_timeout: Duration,
    names: &Names,
    manager: &Manager,
) -> anyhow::Result<String> {
    let before = ask(names).await;
    let began = clock::now();
    let client = connect(listen).await.with_context(|| format!("connect to {listen}"))?;
    let deadline = began + start_timeout + MARGIN;
    let total = |snapshot: &Snapshot| snapshot.flows.proxied.total + snapshot.flows.handed_off.total;
    let total_before = before.as_ref().map_or(0, total);
    loop {
        let ended = is_ended(&client);
        let now = ask(names).await;
        let took = clock::now().saturating_sub(began).as_secs_f64();
        if let Some(now) = &now {
            let is_awake = matches!(now.state, StateName::Awake | StateName::Settling);
            if is_awake && now.held == 0 && total(now) > total_before {
                return Ok(arrived(before.as_ref(), now, &names.unit, took));
            }
            if now.state == StateName::Failed {
                let reason =
                    now.last_failure.as_ref().map_or(now.line.as_str(), |last| last.message.as_str());
                anyhow::bail!("{reason}");
            }
        } else {
            does_drowse_run(names, manager).await?;
        }
        if ended {
            anyhow::bail!("the connection was ended after {took:.2} s, before {} had it", names.unit);
        }
        if clock::now() >= deadline {
            anyhow::bail!(
                "{} did not take the connection within {took:.0} s; see: drowse status {}",
                names.unit,
                names.instance
            );
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn arrived(before: Option<&Snapshot>, now: &Snapshot, unit: &str, took: f64) -> String {
    let wakes = |snapshot: &Snapshot| snapshot.activations_total;
    match now.last_activation {
        Some(activation) if wakes(now) > before.map_or(0, wakes) => {
            format!("{unit} woke and took the connection; it was ready after {:.3} s", activation.took_s)
        }
        _ => format!("{unit} runs already and took the connection within {took:.3} s"),
    }
}

/// Fails with its reason if drowse itself cannot start.
async fn does_drowse_run(names: &Names, manager: &Manager) -> anyhow::Result<()> {
    let listed = manager.units(&[names.service.clone(), names.socket.clone()]).await?;
    for unit in listed {
        if unit.active_state == "failed" || unit.sub_state == "auto-restart" {
            let said = last_words(&unit.id, names.user).await;
            anyhow::bail!(
                "{} does not start{said}; see: journalctl{} -u {}",
                unit.id,
                names.user_flag(),
                unit.id
            );
        }
    }
    Ok(())
}

/// What drowse says of the service; nothing if it does not run.
async fn ask(names: &Names) -> Option<Snapshot> {
    let directory = control::own_directory(None, names.user)?;
    let file_name = pin_name(&names.instance).ok()?;
    let services = control::ask_all(&[directory], |found| found == file_name).await.ok()?;
    services.into_iter().find_map(|service| service.answer.ok())
}

async fn connect(listen: &Address) -> anyhow::Result<Socket> {
    let addresses = listen.resolve().await?;
    let mut last = None;
    for address in &addresses {
        match tokio::time::timeout(CONNECT_TIME, connect_to(address.clone())).await {
            Ok(Ok(socket)) => return Ok(socket),
            Ok(Err(error)) => last = Some(format!("{}: {error}", address::display(address))),
            Err(_elapsed) => {
                last = Some(format!("{}: no answer within {CONNECT_TIME:?}", address::display(address)));
            }
        }
    }
    anyhow::bail!("{}", last.unwrap_or_else(|| "the name has no address".to_owned()))
}

async fn connect_to(address: SockAddr) -> std::io::Result<Socket> {
    let connect = move || {
        let socket = Socket::new(address.domain(), Type::STREAM, None)?;
        socket.connect_timeout(&address, CONNECT_TIME)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    tokio::task::spawn_blocking(connect).await.map_err(std::io::Error::other)?
}

/// Whether the other side ended the connection. A byte that it sends is no end.
fn is_ended(client: &Socket) -> bool {
    let mut byte = [std::mem::MaybeUninit::uninit()];
    match client.peek(&mut byte) {
        Ok(length) => length == 0,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    }
}

/// The last line that a unit's processes wrote to the journal, after a colon; empty if there is none to be had.
pub(super) async fn last_words(unit: &str, user: bool) -> String {
    let field = if user { "_SYSTEMD_USER_UNIT" } else { "_SYSTEMD_UNIT" };
    let mut command = Command::new("journalctl");
    command.args(["--quiet", "--no-pager", "--output=cat", "--lines=1"]).arg(format!("{field}={unit}"));
    command.stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let Ok(Ok(output)) = tokio::time::timeout(JOURNAL_TIME, command.output()).await else {
        return String::new();
    };
    match String::from_utf8_lossy(&output.stdout).trim() {
        "" => String::new(),
        line => format!(": {}", printable(line)),
    }
}
