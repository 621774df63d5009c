//! The real program as a child process, on a loopback address of its own.
//!
//! Owns: the process from start to its end, whatever becomes of the test. Tests in other processes never meet: each
//! has its own address in 127.0.0.0/8, so ports can be the same everywhere.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use drowse::clock;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::deadline::eventually;
use crate::drowse_binary;

/// Long enough for anything that must happen, on a machine that is busy with other tests.
pub const SOON: Duration = Duration::from_secs(10);
/// The port that tests let drowse listen on.
pub const PUBLIC_PORT: u16 = 8080;
/// The port that tests give to backends.
pub const BACKEND_PORT: u16 = 8081;

/// The variable that says where status sockets are.
pub const RUNTIME_DIR: &str = "DROWSE_RUNTIME_DIR";

/// This test process's own loopback address.
#[must_use]
pub fn own_address() -> String {
    let [_, a, b, c] = std::process::id().to_be_bytes();
    format!("127.{}.{b}.{c}", 1 + a % 250)
}

/// Where drowse listens: `ADDRESS:PORT`.
#[must_use]
pub fn public() -> String {
    format!("{}:{PUBLIC_PORT}", own_address())
}

/// Where the backend listens: `ADDRESS:PORT`.
#[must_use]
pub fn backend() -> String {
    format!("{}:{BACKEND_PORT}", own_address())
}

/// A running `drowse`. It is killed when the test ends, and what it started with it.
#[derive(Debug)]
pub struct Drowse {
    child: Child,
    output: Receiver<String>,
    lines: Vec<String>,
    notifications: Receiver<String>,
    /// Where the notify socket and the status socket are, for as long as they are needed.
    directory: TempDir,
    /// Its name, unless the command gave it another.
    name: String,
}

impl Drowse {
    /// Starts `drowse run ARGUMENTS` and waits for its `READY=1`.
    ///
    /// # Errors
    /// It ended before; the message has its output.
    pub fn run<S: AsRef<OsStr>>(arguments: &[S]) -> Result<Self> {
        let mut drowse = Self::spawn(Command::new(drowse_binary()?).arg("run").args(arguments))?;
        drowse.wait_for_notification("READY=1")?;
        Ok(drowse)
    }

    /// Starts a command that is or becomes drowse, and waits for nothing.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let directory = tempfile::tempdir().context("make a directory for sockets")?;
        let path = directory.path().join("notify");
        let notifications = read_notifications(UnixDatagram::bind(&path)?);
        let name = unique_name(&directory);
        command.env("NOTIFY_SOCKET", &path).env("DROWSE_NAME", &name).stdin(Stdio::null());
        if command.get_envs().all(|(name, _)| name != RUNTIME_DIR) {
            command.env(RUNTIME_DIR, runtime_dir_in(&directory));
        }
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("start drowse")?;
        let (to_test, output) = channel();
        let stdout: Option<Box<dyn Read + Send>> = child.stdout.take().map(|pipe| Box::new(pipe) as _);
        let stderr: Option<Box<dyn Read + Send>> = child.stderr.take().map(|pipe| Box::new(pipe) as _);
        for pipe in [stdout, stderr].into_iter().flatten() {
            let to_test = to_test.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                    if to_test.send(line).is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Self { child, output, lines: Vec::new(), notifications, directory, name })
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The directory of its status socket, unless the command had another.
    #[must_use]
    pub fn runtime_dir(&self) -> PathBuf {
        runtime_dir_in(&self.directory)
    }

    /// Waits for a line of output that contains `text`, among those that no earlier wait has passed by.
    ///
    /// # Errors
    /// It does not come; the message has all output.
    pub fn wait_for_line(&mut self, text: &str) -> Result<String> {
        self.wait_for_line_with(&[text])
    }

    /// Waits for a line of output that contains all of `texts`, among those that no earlier wait has passed by.
    ///
    /// # Errors
    /// It does not come; the message has all output.
    pub fn wait_for_line_with(&mut self, texts: &[&str]) -> Result<String> {
        let deadline = clock::now() + SOON;
        loop {
            match self.output.recv_timeout(deadline.saturating_sub(clock::now())) {
                Ok(line) => {
                    self.lines.push(line.clone());
                    if texts.iter().all(|text| line.contains(text)) {
                        return Ok(line);
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    bail!("no line with '{}' in:\n{}", texts.join("' and '"), self.lines.join("\n"));
                }
            }
        }
    }

    /// Waits for a message to the service manager that contains `text`, and returns it.
    ///
    /// # Errors
    /// It does not come; the message has all output.
    pub fn wait_for_notification(&mut self, text: &str) -> Result<String> {
        let deadline = clock::now() + SOON;
        while let Ok(message) = self.notifications.recv_timeout(deadline.saturating_sub(clock::now())) {
            if message.contains(text) {
                return Ok(message);
            }
        }
        bail!("no notification with '{text}'; the output is:\n{}", self.all_output().join("\n"))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// It is not there any more.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.child.id().cast_signed()).context("no process id")?;
        kill_process(pid, signal).context("send a signal to drowse")
    }

    /// Whether the process has ended.
    ///
    /// # Errors
    /// It cannot be asked.
    pub fn has_exited(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    /// It does not end.
    pub fn wait_for_exit(&mut self) -> Result<ExitStatus> {
        eventually("drowse to exit", SOON, || Ok(self.child.try_wait()?))
    }

    /// Every line that it has written; once it has exited, all there will ever be.
    pub fn all_output(&mut self) -> Vec<String> {
        let ended = self.child.try_wait().is_ok_and(|status| status.is_some());
        let patience = if ended { SOON } else { Duration::ZERO };
        while let Ok(line) = self.output.recv_timeout(patience) {
            self.lines.push(line);
        }
        self.lines.clone()
    }
}

impl Drop for Drowse {
    fn drop(&mut self) {
        // An orderly stop first, so that a backend of a process group of its own is not left behind.
        let _already_gone = self.signal(Signal::TERM);
        let gone = eventually("drowse to exit", Duration::from_secs(3), || Ok(self.child.try_wait()?));
        if gone.is_err() {
            let _already_gone = self.child.kill();
            let _reaped = self.child.wait();
        }
        // Of one that was killed, or whose flows were open; nothing where there is no BPF file system.
        let _none_left = std::fs::remove_dir_all(Path::new("/sys/fs/bpf/drowse").join(&self.name));
    }
}

/// A name that no other drowse has, of characters that stay as they are in the name of its pins.
fn unique_name(directory: &TempDir) -> String {
    let last = directory.path().file_name().unwrap_or_default().to_string_lossy();
    last.chars().filter(char::is_ascii_alphanumeric).chain("-test".chars()).collect()
}

fn runtime_dir_in(directory: &TempDir) -> PathBuf {
    directory.path().join("drowse")
}

/// Reads at once what drowse tells its service manager, as systemd does.
fn read_notifications(socket: UnixDatagram) -> Receiver<String> {
    let (to_test, notifications) = channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length) = socket.recv(&mut buffer) {
            let message = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned();
            if to_test.send(message).is_err() {
                return;
            }
        }
    });
    notifications
}

/// A connection to where drowse listens, with a time limit on everything.
///
/// # Errors
/// It is refused.
pub fn connect() -> Result<TcpStream> {
    connect_to(&public())
}

/// A connection to `address`, with a time limit on everything.
///
/// # Errors
/// It is refused.
pub fn connect_to(address: &str) -> Result<TcpStream> {
    let stream = TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
    stream.set_read_timeout(Some(SOON))?;
    stream.set_write_timeout(Some(SOON))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Sends `request` to an echoing backend through `stream` and compares what comes back.
///
/// # Errors
/// Something else comes back, or nothing.
pub fn echo(stream: &mut TcpStream, request: &[u8]) -> Result<()> {
    stream.write_all(request).context("send a request")?;
    let mut reply = vec![0; request.len()];
    stream.read_exact(&mut reply).context("read the echo")?;
    if reply != request {
        bail!("sent {}, got {}", request.escape_ascii(), reply.escape_ascii());
    }
    Ok(())
}

/// One request on a connection of its own, ended by a FIN on both sides.
///
/// # Errors
/// Anything but a whole echo and a clean end.
pub fn one_request(request: &[u8]) -> Result<()> {
    let mut stream = connect()?;
    echo(&mut stream, request)?;
    stream.shutdown(Shutdown::Write)?;
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).context("read to the end")?;
    if !rest.is_empty() {
        bail!("more came than was sent: {:?}", rest.escape_ascii());
    }
    Ok(())
}
