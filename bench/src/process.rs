//! Child processes of a benchmark.
//!
//! Owns: starting one so that it cannot outlive the benchmark, and ending it. Must never: signal a process that it
//! did not start. `setpriv --pdeathsig` has the kernel kill the child when the thread that started it dies
//! (`PR_SET_PDEATHSIG`), so children are started from the main thread only. A fork does not inherit that, so a program
//! that forks runs as the first process of a PID namespace, with which all other processes in it end
//! (`pid_namespaces(7)`); `unshare --kill-child` ends the first one with its own parent.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{Read, Seek};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// How long a child may take to end after SIGTERM before it gets SIGKILL.
const END_WITHIN: Duration = Duration::from_secs(5);
/// Time between two attempts to connect to a child that does not listen yet.
const PORT_INTERVAL: Duration = Duration::from_millis(2);
/// A program with more processes is not one of the peers.
const PROCESSES_MAX: usize = 10_000;

/// What a service manager would tell the child; nothing of it may come from the caller's own environment.
const MANAGER_VARIABLES: [&str; 5] =
    ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC"];

/// A running child; dropping it ends it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    name: String,
    stderr: File,
    /// Whether the child is `unshare`, which waits for the program itself.
    is_family: bool,
}

impl Running {
    /// Starts `command` under the name `name`, with its stderr kept for [`Running::last_words`].
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start(name: &str, mut command: Command) -> Result<Self> {
        let stderr = tempfile::tempfile().context("make a file for a child's stderr")?;
        command.stderr(stderr.try_clone().context("share a child's stderr")?);
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        Ok(Self { child, name: name.to_owned(), stderr, is_family: false })
    }

    /// As [`Running::start`], for a command of [`family`] or [`socket_activated_family`].
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start_family(name: &str, command: Command) -> Result<Self> {
        let mut running = Self::start(name, command)?;
        running.is_family = true;
        Ok(running)
    }

    /// Waits until the child accepts connections at `address`.
    ///
    /// # Errors
    /// When it ends before, or does not accept in time.
    pub fn wait_for_port(&mut self, address: SocketAddr, timeout: Duration) -> Result<()> {
        let exit = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty()).context("watch a child")?;
        let until = drowse::clock::now() + timeout;
        while TcpStream::connect_timeout(&address, timeout).is_err() {
            ensure!(!readable_within(&exit, PORT_INTERVAL)?, "it ended: {}", self.last_words());
            ensure!(drowse::clock::now() < until, "{} does not listen on {address}", self.name);
        }
        Ok(())
    }

    /// The child's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The child's standard output, if it was piped and not yet taken.
    pub fn take_stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// The last line that the child wrote to stderr, for an error message.
    #[must_use]
    pub fn last_words(&mut self) -> String {
        let mut text = Vec::new();
        let read = self.stderr.rewind().and_then(|()| self.stderr.read_to_end(&mut text));
        let text = String::from_utf8_lossy(&text);
        match (read, text.lines().last()) {
            (Ok(_), Some(line)) => format!("{} said: {line}", self.name),
            _ => format!("{} said nothing", self.name),
        }
    }

    /// The memory of the child and its own children together.
    ///
    /// # Errors
    /// When `/proc` does not tell.
    pub fn memory(&self) -> Result<Memory> {
        let memories = self.processes()?.into_iter().filter_map(|pid| Memory::of(pid).transpose());
        memories.sum()
    }

    /// The processes of the program: itself, its children, and theirs.
    ///
    /// # Errors
    /// When `/proc` does not tell.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let mut found = if self.is_family { children(self.pid())? } else { vec![self.pid()] };
        let mut next = 0;
        while let Some(pid) = found.get(next) {
            ensure!(found.len() < PROCESSES_MAX, "{} has too many processes", self.name);
            found.extend(children(*pid)?);
            next += 1;
        }
        ensure!(!found.is_empty(), "{} is gone", self.name);
        Ok(found)
    }

    /// Whether the child has any eBPF program or map open.
    ///
    /// # Errors
    /// When `/proc` does not tell.
    pub fn has_ebpf(&self) -> Result<bool> {
        let directory = fs::read_dir(format!("/proc/{}/fd", self.pid())).context("list a child's files")?;
        Ok(directory.filter_map(Result::ok).filter_map(|entry| fs::read_link(entry.path()).ok()).any(
            |link| {
                link.to_str().is_some_and(|link| {
                    ["anon_inode:bpf-prog", "anon_inode:bpf-map", "anon_inode:bpf_link"].contains(&link)
                })
            },
        ))
    }

    fn end(&mut self) -> Result<()> {
        if self.child.try_wait().context("look at a child")?.is_some() {
            return Ok(());
        }
        let child = Pid::from_child(&self.child);
        let exit = pidfd_open(child, PidfdFlags::empty()).context("watch a child")?;
        // `unshare` ignores SIGTERM while it waits for the program, and ends once all of its namespace has.
        let program = if self.is_family { children(self.pid())?.first().copied() } else { None };
        let program = program.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)).unwrap_or(child);
        kill_process(program, Signal::TERM).context("end a child")?;
        if !readable_within(&exit, END_WITHIN)? {
            self.child.kill().context("kill a child")?;
        }
        self.child.wait().context("reap a child")?;
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(err) = self.end() {
            eprintln!("{}: {err:#}", self.name);
        }
    }
}

/// The children of `pid`; none when it is gone.
fn children(pid: u32) -> Result<Vec<u32>> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for thread in threads.filter_map(Result::ok) {
        let text = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        for child in text.split_whitespace() {
            found.push(child.parse().context("read a child's process id")?);
        }
    }
    Ok(found)
}

/// Processes' share of the machine's memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct Memory {
    /// Proportional set size in bytes: shared pages count in part.
    pub pss_bytes: u64,
    /// Resident set size in bytes.
    pub rss_bytes: u64,
}

impl Memory {
    /// None when the process has ended.
    fn of(pid: u32) -> Result<Option<Self>> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(err) if [Some(Errno::NOENT), Some(Errno::SRCH)].contains(&Errno::from_io_error(&err)) => {
                return Ok(None);
            }
            Err(err) => return Err(err).with_context(|| format!("read {path}")),
        };
        let bytes = |field: &str| -> Result<u64> {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(field))
                .context("find a field of smaps_rollup")?;
            let kib =
                line.trim().trim_end_matches(" kB").parse::<u64>().context("read a field of smaps_rollup")?;
            Ok(kib * 1024)
        };
        Ok(Some(Self { pss_bytes: bytes("Pss:")?, rss_bytes: bytes("Rss:")? }))
    }
}

impl std::iter::Sum<Self> for Memory {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            pss_bytes: sum.pss_bytes + one.pss_bytes,
            rss_bytes: sum.rss_bytes + one.rss_bytes,
        })
    }
}

/// A command that runs `program` as a service manager would: no stdin, nobody else's manager variables, and killed
/// when this process dies.
#[must_use]
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    plain(&mut command);
    command
}

/// As [`command`], with `listener` passed by the protocol of `sd_listen_fds(3)`: it is descriptor 3 and `LISTEN_PID`
/// is the program's own process id, which only a shell between fork and exec can fill in.
#[must_use]
pub fn socket_activated(program: impl AsRef<OsStr>, listener: TcpListener) -> Command {
    let mut command = Command::new("sh");
    let script =
        r#"export LISTEN_FDS=1 LISTEN_PID=$$; exec setpriv --pdeathsig KILL -- "$@" 3<&0 </dev/null"#;
    command.args(["-c", script, "sh"]).arg(program);
    plain(&mut command);
    command.stdin(Stdio::from(OwnedFd::from(listener)));
    command
}

/// As [`command`], for a program that forks: it gets a PID namespace of its own.
#[must_use]
pub fn family(program: impl AsRef<OsStr>) -> Command {
    let mut command = command("unshare");
    command.args(family_options()).arg(program);
    command
}

/// As [`socket_activated`], for a program that forks: it gets a PID namespace of its own. It does not get to know
/// its own process id as `LISTEN_PID`.
#[must_use]
pub fn socket_activated_family(program: impl AsRef<OsStr>, listener: TcpListener) -> Command {
    let mut command = socket_activated("unshare", listener);
    command.args(family_options()).arg(program);
    command
}

/// Only root may make a PID namespace that is not in a user namespace of its own.
fn family_options() -> impl Iterator<Item = &'static str> {
    let user: &[_] = if rustix::process::geteuid().is_root() { &[] } else { &["--user", "--map-root-user"] };
    user.iter().copied().chain(["--pid", "--fork", "--kill-child=KILL", "--"])
}

/// Gives `command` an environment that is the same for everybody: none of a service manager's variables and none of
/// drowse's own options, no stdin and no stdout.
pub fn plain(command: &mut Command) {
    let options =
        std::env::vars_os().map(|(name, _)| name).filter(|name| name.as_bytes().starts_with(b"DROWSE_"));
    for variable in MANAGER_VARIABLES.into_iter().map(OsString::from).chain(options) {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null());
}

/// Waits until `fd` is readable, or for a pidfd until the process is gone. False when `timeout` passes first.
///
/// # Errors
/// When the kernel refuses the poll.
pub fn readable_within(fd: &impl AsFd, timeout: Duration) -> Result<bool> {
    let until = drowse::clock::now() + timeout;
    for _ in 0..1_000 {
        let left = until.saturating_sub(drowse::clock::now());
        let left = Timespec::try_from(left).context("a timeout is too long")?;
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(err) => return Err(err).context("wait for an event"),
        }
    }
    bail!("interrupted by signals too often")
}

/// Lets this process, and what it starts, open as many files as the hard limit allows, and returns that number.
///
/// # Errors
/// When the kernel refuses.
pub fn raise_file_limit() -> Result<u64> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
        .context("raise the limit of open files")?;
    Ok(maximum.unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_reaches_the_child_as_descriptor_three() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut command = socket_activated("sh", listener);
        command.args(["-c", "test $LISTEN_PID = $$ && echo $LISTEN_FDS && readlink /proc/self/fd/3"]);
        let output = command.stdout(Stdio::piped()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.starts_with("1\nsocket:["), "{text}");
    }

    #[test]
    fn a_dropped_child_is_gone_and_its_last_words_were_kept() {
        let mut sleeper = command("sh");
        sleeper.args(["-c", "echo first >&2; echo asleep >&2; echo; exec sleep 60"]).stdout(Stdio::piped());
        let mut running = Running::start("sleeper", sleeper).unwrap();
        let stdout = running.take_stdout().unwrap();
        assert!(readable_within(&stdout, Duration::from_secs(5)).unwrap());
        assert_eq!(running.last_words(), "sleeper said: asleep");
        assert!(running.memory().unwrap().pss_bytes > 0);
        let pid = running.pid();
        drop(running);
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }
}
