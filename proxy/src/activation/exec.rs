//! The `exec` driver: the backend is a child process in a process group of its own.
//!
//! Owns: the child from spawn until its whole group is gone. Must never: leave a process behind, or hand it our
//! listeners, our notify socket or our raised limit on open files.

use std::ffi::OsString;
use std::io::{ErrorKind, Write as _};
use std::os::linux::net::SocketAddrExt as _;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use rustix::process::{Pid, Rlimit, Signal, WaitOptions};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::net::UnixDatagram;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::{BackendState, Change, Driver, DriverChange, DriverFuture, Failure, memory};
use crate::sys;

/// How long a killed process group may take to vanish; the kernel is slow to free much memory.
const KILL_TIME: Duration = Duration::from_secs(10);
/// How often a process group whose leader has ended is looked at: no event tells when the last member ends.
const GROUP_POLL: Duration = Duration::from_millis(5);
/// The longest piece of output that is passed on as one line, in bytes.
const LINE_MAX: usize = 8 * 1024;
/// What a service manager told us and must not reach the child.
const PRIVATE_ENVIRONMENT: [&str; 7] = [
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "JOURNAL_STREAM",
];

/// Runs a command as the backend.
#[derive(Debug)]
pub struct ExecDriver {
    command: Vec<OsString>,
    name: String,
    stop_timeout: Duration,
    open_files: Rlimit,
    /// Give the child a notify socket and report its `READY=1`.
    listens_for_ready: bool,
    running: Option<Running>,
    /// Reapers, output and notify readers of the present child and those before it.
    tasks: JoinSet<()>,
    changes: (mpsc::Sender<Change>, mpsc::Receiver<Change>),
}

#[derive(Debug)]
struct Running {
    group: Pid,
    /// Ours is the stop: its end is no news.
    stopping: Arc<AtomicBool>,
    /// True once the whole group is gone.
    gone: watch::Receiver<bool>,
}

impl ExecDriver {
    /// A driver for `command`, which gets `open_files` as its limit on open files.
    #[must_use]
    pub fn new(
        command: Vec<OsString>,
        stop_timeout: Duration,
        open_files: Rlimit,
        listens_for_ready: bool,
    ) -> Self {
        let program = command.first().map(|program| Path::new(program).file_name().unwrap_or(program));
        let name = program.map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let (running, tasks, changes) = (None, JoinSet::new(), mpsc::channel(16));
        Self { command, name, stop_timeout, open_files, listens_for_ready, running, tasks, changes }
    }

    fn spawn(&mut self) -> Result<(), Failure> {
        while self.tasks.try_join_next().is_some() {}
        if self.running.as_ref().is_some_and(|running| !*running.gone.borrow()) {
            return Ok(());
        }
        let Some((program, arguments)) = self.command.split_first() else {
            return Err(Failure::new("not-found", "the command is empty"));
        };
        let mut command = Command::new(program);
        command.args(arguments).process_group(0).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        for variable in PRIVATE_ENVIRONMENT {
            command.env_remove(variable);
        }
        let notify = if self.listens_for_ready {
            let (socket, address) =
                notify_socket().map_err(|error| self.not_started(&error, "make a notify socket"))?;
            command.env("NOTIFY_SOCKET", address);
            Some(socket)
        } else {
            None
        };
        sys::prepare_child(command.as_std_mut(), self.open_files);
        let mut child = command.spawn().map_err(|error| self.not_started(&error, "start it"))?;
        let Some(group) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) else {
            return Err(Failure::new("exit-code", format!("{} ended at once", self.name)));
        };
        if let Some(output) = child.stdout.take() {
            self.tasks.spawn(pass_on(output, format!("[{}] ", self.name), Output::Stdout));
        }
        if let Some(output) = child.stderr.take() {
            self.tasks.spawn(pass_on(output, format!("[{}] ", self.name), Output::Stderr));
        }
        let stopping = Arc::new(AtomicBool::new(false));
        let (tell_gone, gone) = watch::channel(false);
        self.running = Some(Running { group, stopping: Arc::clone(&stopping), gone });
        let (name, changes, patience) = (self.name.clone(), self.changes.0.clone(), self.stop_timeout);
        let report = notify.map(|socket| self.tasks.spawn(report_ready(socket, self.changes.0.clone())));
        self.tasks.spawn(async move {
            let ended = reap(child, group, patience).await;
            if let Some(report) = report {
                report.abort();
            }
            if !stopping.load(Relaxed) {
                let _nobody_listens_when_we_exit = changes.send(Change::Down(failure(&name, ended))).await;
            }
            tell_gone.send_replace(true);
        });
        Ok(())
    }

    fn not_started(&self, error: &std::io::Error, step: &str) -> Failure {
        let program = self.command.first().map(|program| program.to_string_lossy()).unwrap_or_default();
        if error.kind() == ErrorKind::NotFound {
            Failure::new("not-found", format!("no program '{program}': check its name and PATH"))
        } else if error.kind() == ErrorKind::PermissionDenied {
            Failure::new("denied", format!("'{program}' is not executable for this user"))
        } else {
            Failure::new("exec", format!("'{program}': cannot {step}: {error}"))
        }
    }
}

impl Driver for ExecDriver {
    fn name(&self) -> &str {
        &self.name
    }

    fn state(&mut self) -> DriverFuture<Result<BackendState, Failure>> {
        let up = self.running.as_ref().is_some_and(|running| !*running.gone.borrow());
        Box::pin(std::future::ready(Ok(if up { BackendState::Up } else { BackendState::Down })))
    }

    fn start(&mut self) -> DriverFuture<Result<(), Failure>> {
        Box::pin(std::future::ready(self.spawn()))
    }

    fn stop(&mut self) -> DriverFuture<Result<(), Failure>> {
        let Some(Running { group, stopping, mut gone }) = self.running.take() else {
            return Box::pin(std::future::ready(Ok(())));
        };
        stopping.store(true, Relaxed);
        let (name, patience) = (self.name.clone(), self.stop_timeout);
        Box::pin(async move {
            signal(group, Signal::TERM);
            if tokio::time::timeout(patience, gone.wait_for(|gone| *gone)).await.is_ok() {
                return Ok(());
            }
            signal(group, Signal::KILL);
            match tokio::time::timeout(KILL_TIME, gone.wait_for(|gone| *gone)).await {
                Ok(_) => Ok(()),
                Err(_elapsed) => Err(Failure::new(
                    "stop-timeout",
                    format!("{name} (process group {group:?}) cannot be killed"),
                )),
            }
        })
    }

    fn is_socket_activated(&self) -> DriverFuture<bool> {
        Box::pin(std::future::ready(false))
    }

    fn handoff_obstacle(&self) -> DriverFuture<Option<String>> {
        Box::pin(std::future::ready(None))
    }

    fn memory(&self) -> Option<u64> {
        let running = self.running.as_ref().filter(|running| !*running.gone.borrow())?;
        memory::of_process_group(running.group.as_raw_nonzero().get())
    }

    fn changed(&mut self) -> DriverChange<'_> {
        Box::pin(async {
            match self.changes.1.recv().await {
                Some(change) => change,
                None => std::future::pending().await,
            }
        })
    }
}

impl Drop for ExecDriver {
    /// A last resort for errors on the way out: an orderly exit has stopped the backend before.
    fn drop(&mut self) {
        if let Some(running) = &self.running
            && !*running.gone.borrow()
        {
            signal(running.group, Signal::KILL);
        }
    }
}

/// Waits for the child and then for the rest of its group, as systemd does for a unit's main process: what is
/// left is asked to end, and after `patience` killed.
async fn reap(mut child: Child, group: Pid, patience: Duration) -> std::io::Result<ExitStatus> {
    let ended = child.wait().await;
    if is_gone(group) {
        return ended;
    }
    signal(group, Signal::TERM);
    let empty = async {
        while !is_gone(group) {
            tokio::time::sleep(GROUP_POLL).await;
        }
    };
    if tokio::time::timeout(patience, empty).await.is_err() {
        signal(group, Signal::KILL);
        let killed = async {
            while !is_gone(group) {
                tokio::time::sleep(GROUP_POLL).await;
            }
        };
        let _unkillable = tokio::time::timeout(KILL_TIME, killed).await;
    }
    ended
}

/// Whether no process of the group is left. Orphans of the group that came to us (as PID 1 of a container, or as a
/// subreaper) are reaped on the way.
fn is_gone(group: Pid) -> bool {
    while let Ok(Some(_)) = rustix::process::waitpgid(group, WaitOptions::NOHANG) {}
    rustix::process::test_kill_process_group(group).is_err()
}

fn signal(group: Pid, signal: Signal) {
    let _gone_already = rustix::process::kill_process_group(group, signal);
}

fn failure(name: &str, ended: std::io::Result<ExitStatus>) -> Option<Failure> {
    use std::os::unix::process::ExitStatusExt as _;
    let status = match ended {
        Ok(status) => status,
        Err(error) => return Some(Failure::new("wait", format!("{name}: cannot wait for it: {error}"))),
    };
    match (status.code(), status.signal()) {
        (Some(0), _) => None,
        (Some(code), _) => Some(Failure::new("exit-code", format!("{name} exited with status {code}"))),
        (None, number) => {
            Some(Failure::new("signal", format!("{name} was ended by signal {}", number.unwrap_or(0))))
        }
    }
}

/// A datagram socket for `sd_notify(3)`, with the address as `NOTIFY_SOCKET` has it.
fn notify_socket() -> std::io::Result<(UnixDatagram, String)> {
    let name = format!("drowse-{}-{}", std::process::id(), crate::clock::now().as_nanos());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name)?;
    let socket = std::os::unix::net::UnixDatagram::bind_addr(&address)?;
    socket.set_nonblocking(true)?;
    Ok((UnixDatagram::from_std(socket)?, format!("@{name}")))
}

/// Waits for one `READY=1`; anything else that the child says is of no interest.
async fn report_ready(socket: UnixDatagram, changes: mpsc::Sender<Change>) {
    let mut message = [0; 4096];
    while let Ok(length) = socket.recv(&mut message).await {
        let lines = message.get(..length).unwrap_or_default();
        if lines.split(|byte| *byte == b'\n').any(|line| line == b"READY=1") {
            let _nobody_listens_when_we_exit = changes.send(Change::Ready).await;
            return;
        }
    }
}

#[derive(Clone, Copy)]
enum Output {
    Stdout,
    Stderr,
}

impl Output {
    fn write(self, text: &[u8]) {
        let _closed = match self {
            Self::Stdout => std::io::stdout().lock().write_all(text),
            Self::Stderr => std::io::stderr().lock().write_all(text),
        };
    }
}

/// Passes a child's output on, each line with a prefix, until its end. Very long lines are broken. Whoever reads our
/// output may be slow or have stopped: then the child waits, and nobody else.
async fn pass_on(mut from: impl AsyncRead + Unpin, prefix: String, to: Output) {
    let mut pending = Vec::with_capacity(LINE_MAX);
    loop {
        let ended = !matches!(from.read_buf(&mut pending).await, Ok(1..));
        let mut lines = Vec::new();
        while let Some(end) = line_end(&pending, ended) {
            let line: Vec<u8> = pending.drain(..end).collect();
            let text = line.strip_suffix(b"\n").unwrap_or(&line);
            lines.extend([prefix.as_bytes(), text, b"\n"].concat());
        }
        if !lines.is_empty() {
            let _runtime_ends = tokio::task::spawn_blocking(move || to.write(&lines)).await;
        }
        if ended {
            return;
        }
    }
}

fn line_end(pending: &[u8], ended: bool) -> Option<usize> {
    match pending.iter().position(|byte| *byte == b'\n') {
        Some(newline) => Some(newline + 1),
        None if pending.len() >= LINE_MAX || (ended && !pending.is_empty()) => Some(pending.len()),
        None => None,
    }
}
