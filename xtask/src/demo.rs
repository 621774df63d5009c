//! `cargo xtask demo`: the main job without root and without systemd.
//!
//! Owns: the story that is told. Everything shown is measured while it happens.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use crate::{install, process, say, workspace};

/// Where the demo's drowse listens.
const PUBLIC: &str = "127.0.0.1:8080";
/// Where the demo's backend listens.
const BACKEND: &str = "127.0.0.1:9090";
/// How long the backend may be idle, as `--idle-time` has it.
const IDLE_TIME: &str = "2s";
/// How long anything in the demo may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Builds drowse, puts it in front of a service, and shows a cold request, a warm one and the sleep after them.
pub fn run() -> anyhow::Result<()> {
    let dice = workspace().join("units/examples/dice/dice.py");
    let python = install::program("python3", "python3")?;
    say("building drowse");
    process::run(Command::new("cargo").args(["build", "--quiet", "--release", "--package", "drowse"]))?;
    let mut drowse = Demo::start(&python, &dice)?;
    say(&format!("drowse listens on {PUBLIC}; nothing runs behind it yet"));

    let (answer, cold) = request()?;
    say(&format!("cold request: {answer} after {} (the service was started for it)", show(cold)));
    let (answer, warm) = request()?;
    say(&format!("warm request: {answer} after {}", show(warm)));
    say(&format!("nobody asks any more: in {IDLE_TIME} the service is stopped ..."));
    let asleep = drowse.wait_for("is asleep")?;
    say(&format!("... and it is: {asleep}"));
    if TcpStream::connect(BACKEND).is_ok() {
        bail!("the service still runs although it is said to be asleep");
    }
    let (answer, again) = request()?;
    say(&format!("the next request wakes it again: {answer} after {}", show(again)));
    drowse.stop()?;

    say("done. What to try next:");
    say(
        "  target/release/drowse run --listen 127.0.0.1:8080 --backend 127.0.0.1:9090 -- python3 -m http.server 9090",
    );
    say("  target/release/drowse run --help        every option");
    say("  units/README.md                         the same under systemd, with three small files");
    Ok(())
}

/// drowse in front of the dice service.
struct Demo {
    child: Child,
    lines: Receiver<String>,
    reader: Option<JoinHandle<()>>,
}

impl Demo {
    fn start(python: &Path, dice: &Path) -> anyhow::Result<Self> {
        for address in [PUBLIC, BACKEND] {
            if TcpStream::connect(address).is_ok() {
                bail!("something already listens on {address}; stop it for the demo");
            }
        }
        let port = BACKEND.rsplit(':').next().unwrap_or_default();
        let mut command = Command::new(workspace().join("target/release/drowse"));
        command.args(["run", "--listen", PUBLIC, "--backend", BACKEND, "--idle-time", IDLE_TIME, "--"]);
        command.arg(python).arg(dice).arg(port).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().context("start drowse")?;
        let output = child.stderr.take().context("read what drowse says")?;
        let (sender, lines) = channel();
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                say(&format!("    | {line}"));
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let demo = Self { child, lines, reader: Some(reader) };
        demo.wait_for("in front of")?;
        Ok(demo)
    }

    fn wait_for(&self, text: &str) -> anyhow::Result<String> {
        let deadline = now() + PATIENCE;
        loop {
            let line = self.lines.recv_timeout(deadline.saturating_duration_since(now()));
            let line = line.with_context(|| format!("drowse does not say '{text}'"))?;
            if line.contains(text) {
                return Ok(line.split_once("INFO ").map_or(line.clone(), |(_, said)| said.to_owned()));
            }
        }
    }

    fn stop(&mut self) -> anyhow::Result<()> {
        let pid =
            rustix::process::Pid::from_raw(self.child.id().cast_signed()).context("drowse has no pid")?;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let status = self.child.wait()?;
        if let Some(reader) = self.reader.take() {
            let _it_only_prints = reader.join();
        }
        if !status.success() {
            bail!("drowse ended with {status}");
        }
        Ok(())
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _already_gone = self.child.kill();
            let _reaped = self.child.wait();
        }
    }
}

/// One HTTP request on a connection of its own: the answer's body and how long it took from the connect on.
fn request() -> anyhow::Result<(String, Duration)> {
    let start = now();
    let mut stream = TcpStream::connect(PUBLIC).with_context(|| format!("connect to {PUBLIC}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply).context("read the answer")?;
    let body = reply.rsplit("\r\n\r\n").next().unwrap_or_default().trim().to_owned();
    Ok((body, start.elapsed()))
}

fn show(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

#[expect(clippy::disallowed_methods, reason = "drowse's own clock would make xtask build all of drowse")]
fn now() -> Instant {
    Instant::now()
}
