//! Ring 1: `drowse top` on a terminal of the test's own, as somebody sees it in 80 columns and 24 lines.

use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZero;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drowse::clock;
use drowse_tests::deadline::eventually;
use drowse_tests::drowse_binary;
use drowse_tests::process::{Drowse, RUNTIME_DIR, SOON, backend, connect, echo, public};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};
use vt100::Parser;

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");

fn columns_or_lines(count: u16) -> Result<NonZero<u16>> {
    NonZero::new(count).context("some")
}

/// A terminal with a program on it.
struct OnTerminal {
    child: Child,
    /// The end where the person sits; none once it was closed.
    keyboard: Option<File>,
    output: Receiver<Vec<u8>>,
    reading: Option<JoinHandle<()>>,
    screen: Parser,
    /// Everything that was written to the terminal.
    written: Vec<u8>,
    /// Keeps the settings readable when the program has gone.
    terminal: Option<OwnedFd>,
    before: Termios,
}

impl OnTerminal {
    /// `drowse top OPTIONS` in a session of its own, which the terminal controls.
    fn top(directory: &Path, options: &[&str], set: &[(&str, &str)]) -> Result<Self> {
        Self::start(&["setsid", "--ctty", "--wait"], directory, options, set)
    }

    fn start(runner: &[&str], directory: &Path, options: &[&str], set: &[(&str, &str)]) -> Result<Self> {
        let keyboard = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&keyboard)?;
        unlockpt(&keyboard)?;
        let name = ptsname(&keyboard, Vec::new())?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let terminal =
            rustix::fs::open(name.as_c_str(), flags, Mode::empty()).context("open the terminal")?;
        tcsetwinsize(&terminal, Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 })?;
        let before = tcgetattr(&terminal)?;
        let (program, arguments) = runner.split_first().context("a runner")?;
        let mut command = Command::new(program);
        command.args(arguments).arg(drowse_binary()?).arg("top").args(options);
        command
            .env_remove("NO_COLOR")
            .env("TERM", "xterm")
            .env("LC_ALL", "C.UTF-8")
            .env(RUNTIME_DIR, directory);
        command.envs(set.iter().copied());
        let side = || -> Result<Stdio> { Ok(terminal.try_clone()?.into()) };
        let child = command.stdin(side()?).stdout(side()?).stderr(side()?).spawn();
        let child = child.context("run setsid (package util-linux)")?;
        drop(command);
        let (to_test, output) = channel();
        let mut reader = File::from(keyboard.try_clone()?);
        let reading = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length) = reader.read(&mut buffer) {
                let read = buffer.get(..length).unwrap_or_default();
                if read.is_empty() || to_test.send(read.to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            child,
            keyboard: Some(keyboard.into()),
            output,
            reading: Some(reading),
            screen: Parser::new(columns_or_lines(24)?, columns_or_lines(80)?, 0),
            written: Vec::new(),
            terminal: Some(terminal),
            before,
        })
    }

    /// Takes in what was written meanwhile, waiting for the first of it no longer than `patience`.
    fn look(&mut self, patience: Duration) {
        match self.output.recv_timeout(patience) {
            Ok(bytes) => {
                self.screen.process(&bytes);
                self.written.extend(bytes);
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
    }

    fn wait_for(&mut self, what: &str, is_there: impl Fn(&str) -> bool) -> Result<String> {
        let deadline = clock::now() + SOON;
        loop {
            let shown = self.screen.screen().contents();
            if is_there(&shown) {
                return Ok(shown);
            }
            ensure!(clock::now() < deadline, "{what} is not shown:\n{shown}");
            self.look(Duration::from_millis(50));
        }
    }

    fn wait_for_words(&mut self, words: &str) -> Result<String> {
        self.wait_for(words, |shown| shown.contains(words))
    }

    /// Whether a character on the screen has a colour.
    fn is_coloured(&self) -> Result<bool> {
        let screen = self.screen.screen();
        let (lines, columns) = screen.size();
        let places = (0..lines.get()).flat_map(|line| (0..columns.get()).map(move |column| (line, column)));
        let mut cells = places.map(|(line, column)| screen.cell(line, column).context("a cell"));
        cells.try_fold(false, |found, cell| Ok(found || cell?.fgcolor() != vt100::Color::Default))
    }

    fn type_in(&mut self, keys: &[u8]) -> Result<()> {
        self.keyboard.as_mut().context("a keyboard")?.write_all(keys).context("type")
    }

    fn resize(&mut self, lines: u16, columns: u16) -> Result<()> {
        self.screen.screen_mut().set_size(columns_or_lines(lines)?, columns_or_lines(columns)?);
        let size = Winsize { ws_row: lines, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(self.keyboard.as_ref().context("a keyboard")?, size).context("resize")
    }

    /// `setsid` becomes the program, unless it leads a process group already: then the program is its child.
    fn pid(&self) -> Result<Pid> {
        let own = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{own}/task/{own}/children"))?;
        let pid = children.split_whitespace().next().map_or(Ok(own.cast_signed()), str::parse)?;
        Pid::from_raw(pid).context("a pid")
    }

    /// Closes every descriptor of the terminal that is not the program's.
    fn close(&mut self) -> Result<()> {
        self.output = channel().1;
        // What it writes next ends the thread that reads.
        self.type_in(b"s")?;
        self.reading
            .take()
            .context("a reader")?
            .join()
            .map_err(|_panic| anyhow::anyhow!("the reader panicked"))?;
        self.terminal = None;
        self.keyboard = None;
        Ok(())
    }

    fn wait_for_exit(&mut self) -> Result<ExitStatus> {
        let child = &mut self.child;
        let status = eventually("top to exit", SOON, || Ok(child.try_wait()?))?;
        Ok(status)
    }

    /// The other screen is left, the cursor is back, and lines are read as before.
    fn ensure_restored(&mut self) -> Result<()> {
        let deadline = clock::now() + SOON;
        // Its last words may still be on their way.
        while self.screen.screen().alternate_screen() || self.screen.screen().hide_cursor() {
            ensure!(clock::now() < deadline, "the screen is not restored");
            self.look(Duration::from_millis(50));
        }
        let now = tcgetattr(self.terminal.as_ref().context("a terminal")?.as_fd())?;
        let modes = |it: &Termios| (it.input_modes, it.output_modes, it.control_modes, it.local_modes);
        ensure!(modes(&now) == modes(&self.before), "the terminal's modes are not restored: {now:?}");
        Ok(())
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _gone_meanwhile = self.pid().map(|pid| kill_process(pid, Signal::KILL));
            let _gone_meanwhile = self.child.kill();
            let _reaped = self.child.wait();
        }
    }
}

/// `drowse run` named `echo` in front of an echo backend.
fn run(options: &[&str]) -> Result<Drowse> {
    let (public, backend) = (public(), backend());
    let addresses = ["--name", "echo", "--listen", &public, "--backend", &backend, "--plane", "splice"];
    Drowse::run(&[&addresses, options, &["--", ECHO, &backend]].concat())
}

/// The line of the screen that begins with `name`, without the columns' blanks.
fn line(shown: &str, name: &str) -> String {
    let line = shown.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn a_service_is_watched_from_sleep_to_use_and_q_restores_the_terminal() -> Result<()> {
    let drowse = run(&[])?;
    let mut top = OnTerminal::top(&drowse.runtime_dir(), &[], &[])?;
    let shown = top.wait_for("asleep", |shown| line(shown, "echo").starts_with("echo asleep"))?;
    ensure!(shown.lines().all(|line| line.chars().count() <= 80), "{shown}");
    ensure!(top.screen.screen().alternate_screen(), "it draws over what was there");
    ensure!(shown.starts_with("drowse  1 asleep  flows 0  in 0/s"), "{shown}");

    let mut client = connect()?;
    echo(&mut client, b"good morning")?;
    top.wait_for("awake and in use", |shown| line(shown, "echo").starts_with("echo awake in use 1 0 "))?;
    for _ in 0..5 {
        echo(&mut client, &[b'x'; 8192])?;
        top.look(SOON);
    }
    top.wait_for("traffic", |shown| shown.contains('█'))?;

    drop(client);
    top.wait_for("the time to sleep", |shown| line(shown, "echo").starts_with("echo awake 15 min 0 0 "))?;
    ensure!(top.is_coloured()?, "no colour: {}", top.written.escape_ascii());
    top.type_in(b"q")?;
    let status = top.wait_for_exit()?;
    ensure!(status.success(), "{status}");
    top.ensure_restored()
}

#[test]
fn sorting_filtering_resizing_and_looking_into_one() -> Result<()> {
    let drowse = run(&[])?;
    let mut top = OnTerminal::top(&drowse.runtime_dir(), &[], &[("NO_COLOR", "1")])?;
    top.wait_for_words("NAMEv")?;
    top.type_in(b"s")?;
    top.wait_for_words("STATEv")?;
    top.type_in(b"/nobody\r")?;
    top.wait_for_words("no service has 'nobody'")?;
    // Escape gives the filter up, and the program is still there.
    top.type_in(b"/\x1b")?;
    top.wait_for("the service again", |shown| line(shown, "echo").starts_with("echo asleep"))?;
    top.type_in(b"\r")?;
    top.wait_for_words("echo: asleep for ")?;
    let shown = top.wait_for_words("0 flows are proxied")?;
    ensure!(shown.contains("the next connection wakes"), "{shown}");
    top.resize(40, 120)?;
    top.wait_for("the footer in the last line", |shown| {
        shown.lines().nth(39).is_some_and(|line| line.starts_with("q quit"))
    })?;
    ensure!(!top.is_coloured()?, "colour in spite of NO_COLOR: {}", top.written.escape_ascii());
    top.type_in(b"\x03")?;
    ensure!(top.wait_for_exit()?.success(), "Ctrl-C");
    top.ensure_restored()
}

#[test]
fn sigterm_restores_the_terminal() -> Result<()> {
    let directory = tempfile::tempdir()?;
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut top = OnTerminal::top(directory.path(), &[], &[])?;
        top.wait_for_words("no drowse runs here")?;
        kill_process(top.pid()?, signal)?;
        let status = top.wait_for_exit()?;
        ensure!(status.success(), "{signal:?}: {status}");
        top.ensure_restored().with_context(|| format!("{signal:?}"))?;
    }
    Ok(())
}

/// With a session its SIGHUP tells, without one the end of input.
#[test]
fn a_terminal_that_is_closed_ends_it() -> Result<()> {
    let directory = tempfile::tempdir()?;
    for runner in [&["setsid", "--ctty", "--wait"][..], &["env"]] {
        let mut top = OnTerminal::start(runner, directory.path(), &[], &[])?;
        top.wait_for_words("no drowse runs here")?;
        top.close()?;
        top.wait_for_exit().with_context(|| format!("{runner:?}"))?;
    }
    Ok(())
}

/// One that hangs is shown as such, and the others and the keys go on.
#[test]
fn a_service_that_hangs_is_shown_and_holds_up_nobody() -> Result<()> {
    let drowse = run(&[])?;
    let _never_answers = UnixListener::bind(drowse.runtime_dir().join("hangs.sock"))?;
    let mut top = OnTerminal::top(&drowse.runtime_dir(), &[], &[])?;
    top.wait_for("both", |shown| {
        line(shown, "echo").starts_with("echo asleep") && line(shown, "hangs").starts_with("hangs ? ")
    })?;
    let before = clock::now();
    top.type_in(b"s")?;
    top.wait_for_words("STATEv")?;
    let took = clock::now().saturating_sub(before);
    ensure!(took < Duration::from_millis(900), "a key waited for the one that hangs: {took:?}");
    top.type_in(b"q")?;
    ensure!(top.wait_for_exit()?.success());
    Ok(())
}

#[test]
fn without_a_terminal_it_says_so() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut command = Command::new(drowse_binary()?);
    command.arg("top").env(RUNTIME_DIR, directory.path()).env("TERM", "xterm").stdin(Stdio::null());
    let output = command.output()?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(output.status.code() == Some(1) && output.stdout.is_empty(), "{said}");
    ensure!(said.contains("needs a terminal") && said.contains("drowse status --json"), "{said}");

    let mut top = OnTerminal::top(directory.path(), &[], &[("TERM", "dumb")])?;
    top.wait_for_words("use: drowse status")?;
    let status = top.wait_for_exit()?;
    ensure!(status.code() == Some(1), "{status}");

    for wrong in ["0", "999ms", "infinity", "soon"] {
        let output = Command::new(drowse_binary()?).args(["top", "--interval", wrong]).output()?;
        ensure!(output.status.code() == Some(2), "{wrong}: {output:?}");
    }
    Ok(())
}
