//! The start of drowse itself: `startup`, from just before its exec until `READY=1`, in milliseconds.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::cases::cold::Ebpf;
use crate::cases::{Case, Contestant, Sample, Setting, free_addresses, milliseconds};
use crate::cpus::started_on;
use crate::process::{self, Running};
use crate::report::Better;
use crate::stats::median;

/// How long a program may take to say that it is ready.
const READY_WITHIN: Duration = Duration::from_secs(10);
/// Other states than READY=1 that may come before it.
const MESSAGES_MAX: usize = 100;

/// drowse with and without its eBPF programs; nothing when it does not take part.
#[must_use]
pub fn case(setting: &Setting) -> Option<Case<'_>> {
    let drowse = setting.drowse.as_deref()?;
    let contestants = Ebpf::both(setting)
        .map(|ebpf| Contestant {
            peer: ebpf.peer(),
            measure: Box::new(move || measure(setting, drowse, ebpf)),
        })
        .collect();
    Some(Case { name: "startup".to_owned(), unit: "ms", better: Better::Lower, contestants })
}

/// The socket on which a program tells its service manager that it is ready (`sd_notify(3)`).
#[derive(Debug)]
pub struct ReadySocket {
    socket: UnixDatagram,
    directory: TempDir,
}

impl ReadySocket {
    /// Opens it.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open() -> Result<Self> {
        let directory = tempfile::tempdir().context("make a directory for the notify socket")?;
        let socket = UnixDatagram::bind(directory.path().join("notify")).context("open the notify socket")?;
        socket.set_read_timeout(Some(READY_WITHIN)).context("set a read timeout")?;
        Ok(Self { socket, directory })
    }

    /// Tells `command` of it.
    pub fn announce_to(&self, command: &mut Command) {
        command.env("NOTIFY_SOCKET", self.directory.path().join("notify"));
    }

    /// Waits for `READY=1`.
    ///
    /// # Errors
    /// When it does not come.
    pub fn wait(&self) -> Result<()> {
        let mut buffer = [0; 4096];
        for _ in 0..MESSAGES_MAX {
            let len = self.socket.recv(&mut buffer).context("wait for READY=1")?;
            let message = buffer.get(..len).unwrap_or_default();
            if message.split(|byte| *byte == b'\n').any(|line| line == b"READY=1") {
                return Ok(());
            }
        }
        bail!("{MESSAGES_MAX} messages came without READY=1")
    }
}

fn measure(setting: &Setting, drowse: &Path, ebpf: Ebpf) -> Result<Sample> {
    let times = (0..setting.sizes.starts_each)
        .map(|_| Ok(milliseconds(start(setting, drowse, ebpf)?)))
        .collect::<Result<Vec<f64>>>()?;
    Ok(Sample {
        value: median(&times).context("no start was made")?,
        latency: None,
        details: Vec::new(),
        work: None,
    })
}

fn start(setting: &Setting, drowse: &Path, ebpf: Ebpf) -> Result<Duration> {
    let ready = ReadySocket::open()?;
    // Not by process::command: setpriv's own start must not count.
    let mut command = Command::new(drowse);
    command.args(["run", ebpf.option()]);
    let (listen, backend) = free_addresses()?;
    command.args([format!("--listen={listen}"), format!("--backend={backend}")]);
    process::plain(&mut command);
    ready.announce_to(&mut command);
    started_on(&setting.layout.proxy, || {
        let started_at = drowse::clock::now();
        let mut process = Running::start("drowse", command)?;
        ready.wait().with_context(|| process.last_words())?;
        Ok(drowse::clock::now().saturating_sub(started_at))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_is_a_whole_line_of_its_own() {
        let ready = ReadySocket::open().unwrap();
        let sender = UnixDatagram::unbound().unwrap();
        let path = ready.directory.path().join("notify");
        ready.socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        sender.send_to(b"STATUS=not READY=1\nREADY=10", &path).unwrap();
        assert!(ready.wait().is_err());
        sender.send_to(b"STATUS=asleep\nREADY=1", &path).unwrap();
        ready.wait().unwrap();
    }
}
