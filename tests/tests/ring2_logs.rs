//! Ring 2: log lines and the journal: a socket of the test's own in its place, in a mount namespace of its own.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use drowse_tests::deadline::eventually;
use drowse_tests::drowse_binary;
use drowse_tests::isolated::isolated;
use drowse_tests::process::{Drowse, SOON, connect_to, echo};
use rustix::mount::{MountFlags, mount};

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");
const SOCKET: &str = "/run/systemd/journal/socket";
const PUBLIC: &str = "127.0.0.1:8080";
const BACKEND: &str = "127.0.0.1:8081";

/// The fields of one message of the native protocol.
type Message = BTreeMap<String, String>;

/// Whoever listens where the journal does.
struct Journal(UnixDatagram);

impl Journal {
    fn new() -> Result<Self> {
        let socket = UnixDatagram::bind(SOCKET)?;
        socket.set_read_timeout(Some(SOON))?;
        Ok(Self(socket))
    }

    /// The next message whose field `DROWSE_EVENT` is `event`.
    fn wait_for(&self, event: &str) -> Result<Message> {
        loop {
            let mut bytes = vec![0; 65_536];
            let length = self.0.recv(&mut bytes).with_context(|| format!("wait for {event}"))?;
            let message = read(bytes.get(..length).unwrap_or_default())?;
            if message.get("DROWSE_EVENT").is_some_and(|found| found == event) {
                return Ok(message);
            }
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        let _gone_already = std::fs::remove_file(SOCKET);
    }
}

/// `NAME=value` and a newline, or `NAME`, a newline, the length in 8 bytes (little endian), the value and a newline.
fn read(mut bytes: &[u8]) -> Result<Message> {
    let mut message = Message::new();
    while !bytes.is_empty() {
        let end = bytes.iter().position(|byte| *byte == b'\n').context("a line")?;
        let (line, rest) = bytes.split_at(end);
        let (line, rest) =
            (String::from_utf8_lossy(line).into_owned(), rest.strip_prefix(b"\n").context("an end")?);
        if let Some((name, value)) = line.split_once('=') {
            message.insert(name.to_owned(), value.to_owned());
            bytes = rest;
            continue;
        }
        let (length, rest) = rest.split_first_chunk().context("a length")?;
        let length = usize::try_from(u64::from_le_bytes(*length))?;
        let (value, rest) = rest.split_at_checked(length).context("a value")?;
        message.insert(line, String::from_utf8(value.to_vec())?);
        bytes = rest.strip_prefix(b"\n").context("an end")?;
    }
    Ok(message)
}

/// `/run` is empty, as on a machine without a journal.
fn empty_run() -> Result<()> {
    mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), None).context("mount an empty /run")?;
    std::fs::create_dir_all(Path::new(SOCKET).parent().context("a directory")?)?;
    Ok(())
}

/// drowse as systemd starts it: stderr is what `JOURNAL_STREAM` says.
fn under_systemd(options: &[&str]) -> Result<Drowse> {
    with_stderr("", options)
}

/// The same after `redirect`, for the shell.
fn with_stderr(redirect: &str, options: &[&str]) -> Result<Drowse> {
    let stream = format!(r#"{redirect} JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) exec "$@""#);
    let mut command = Command::new("sh");
    command
        .args(["-c", &stream, "sh"])
        .arg(drowse_binary()?)
        .args(["run", "--name", "echo", "--plane", "splice"]);
    command.args(["--listen", PUBLIC, "--backend", BACKEND]).args(options);
    Drowse::spawn(command.args(["--", ECHO, BACKEND]))
}

fn field<'a>(message: &'a Message, name: &str) -> Result<&'a str> {
    message.get(name).map(String::as_str).with_context(|| format!("no {name} in {message:?}"))
}

#[test]
fn the_journal_gets_a_field_for_each_fact() -> Result<()> {
    isolated(|| {
        empty_run()?;
        let journal = Journal::new()?;
        let mut drowse = under_systemd(&["--idle-time", "100ms", "--log-level", "debug"])?;
        drowse.wait_for_notification("READY=1")?;
        let mut client = connect_to(PUBLIC)?;
        echo(&mut client, b"good morning")?;
        let awake = journal.wait_for("awake")?;
        ensure!(field(&awake, "MESSAGE")?.starts_with("echo-backend is awake after "), "{awake:?}");
        let latency: u64 = field(&awake, "DROWSE_LATENCY_USEC")?.parse()?;
        ensure!((100..10_000_000).contains(&latency), "{awake:?}");
        for (name, value) in [("PRIORITY", "6"), ("SYSLOG_IDENTIFIER", "drowse"), ("DROWSE_NAME", "echo")] {
            ensure!(field(&awake, name)? == value, "{name}: {awake:?}");
        }
        ensure!(!awake.contains_key("DROWSE_UNIT"), "there is no unit: {awake:?}");
        let begun = journal.wait_for("flow")?;
        ensure!(field(&begun, "DROWSE_PLANE")? == "splice" && field(&begun, "PRIORITY")? == "7", "{begun:?}");
        let cookie = rustix::net::sockopt::socket_cookie(&client)?;
        ensure!(
            field(&begun, "DROWSE_FLOW")?.parse::<u64>()? != cookie,
            "the client's own socket: {begun:?}"
        );
        drop(client);
        let over = journal.wait_for("flow_end")?;
        ensure!(field(&over, "DROWSE_FLOW")? == field(&begun, "DROWSE_FLOW")?, "{over:?}");
        let asleep = journal.wait_for("asleep")?;
        ensure!(field(&asleep, "DROWSE_REASON")? == "idle", "{asleep:?}");
        ensure!(field(&asleep, "MESSAGE")?.contains("nobody used it for 100 ms"), "{asleep:?}");
        field(&asleep, "DROWSE_LATENCY_USEC")?.parse::<u64>()?;
        ensure!(drowse.all_output().is_empty(), "twice: {:?}", drowse.all_output());
        Ok(())
    })
}

#[test]
fn without_a_journal_lines_go_to_stderr_with_their_level() -> Result<()> {
    isolated(|| {
        empty_run()?;
        let mut drowse = under_systemd(&["--idle-time", "100ms"])?;
        drowse.wait_for_notification("READY=1")?;
        echo(&mut connect_to(PUBLIC)?, b"good morning")?;
        let line = drowse.wait_for_line("is awake after")?;
        ensure!(line.starts_with("<6>") && line.contains("echo-backend is awake after "), "{line}");
        ensure!(!line.contains('\u{1b}') && !line.contains("latency"), "{line}");
        Ok(())
    })
}

#[test]
fn a_journal_that_goes_loses_no_line_and_one_that_comes_back_is_used() -> Result<()> {
    isolated(|| {
        empty_run()?;
        let journal = Journal::new()?;
        let mut drowse = under_systemd(&["--idle-time", "50ms"])?;
        drowse.wait_for_notification("READY=1")?;
        echo(&mut connect_to(PUBLIC)?, b"one")?;
        journal.wait_for("asleep")?;
        drop(journal);
        echo(&mut connect_to(PUBLIC)?, b"two")?;
        drowse.wait_for_line("is awake after")?;
        drowse.wait_for_line("is asleep")?;
        let journal = Journal::new()?;
        echo(&mut connect_to(PUBLIC)?, b"three")?;
        journal.wait_for("awake")?;
        journal.wait_for("asleep")?;
        Ok(())
    })
}

/// A queue of unix datagrams holds some, `net.unix.max_dgram_qlen`; a send to a full one waits.
#[test]
fn a_journal_that_hangs_holds_up_nobody() -> Result<()> {
    isolated(|| {
        empty_run()?;
        let _reads_nothing = Journal::new()?;
        let mut drowse = under_systemd(&["--log-level", "debug"])?;
        drowse.wait_for_notification("READY=1")?;
        let queue = std::fs::read_to_string("/proc/sys/net/unix/max_dgram_qlen")?;
        // Two lines each.
        for number in 0..queue.trim().parse::<u32>()? + 10 {
            echo(&mut connect_to(PUBLIC)?, format!("client {number}").as_bytes())?;
        }
        drowse.wait_for_line("a client is connected to the backend")?;
        Ok(())
    })
}

/// The stream that systemd connects to stderr is read by the same journal, and holds little.
#[test]
fn a_stream_that_nobody_reads_holds_up_nobody_and_what_is_lost_is_told() -> Result<()> {
    isolated(|| {
        empty_run()?;
        let redirect = "mkfifo /run/unread; exec 2<>/run/unread;";
        let drowse = with_stderr(redirect, &["--log-level", "debug"])?;
        eventually("a listener", SOON, || Ok(connect_to(PUBLIC).is_ok().then_some(())))?;
        let mut unread = File::options().read(true).write(true).open("/run/unread")?;
        let holds = rustix::pipe::fcntl_getpipe_size(&unread)?;
        // More than it holds: each makes two lines.
        for number in 0..holds / 32 {
            echo(&mut connect_to(PUBLIC)?, format!("client {number}").as_bytes())?;
        }
        let mut said = vec![0; holds];
        let length = unread.read(&mut said)?;
        ensure!(length > holds / 2 && !text(&said).contains("were lost"), "{length} bytes of {holds}");
        echo(&mut connect_to(PUBLIC)?, b"heard again")?;
        let length = unread.read(&mut said)?;
        let news = text(said.get(..length).unwrap_or_default());
        ensure!(news.contains("lines of log were lost") && news.contains("a client is connected"), "{news}");
        drop(drowse);
        Ok(())
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The journal learns the unit of a message from its sender, which must still be there: the last words go through the
/// stream, which belongs to the unit.
#[test]
fn last_words_go_through_the_stream() -> Result<()> {
    isolated(|| {
        empty_run()?;
        let _journal = Journal::new()?;
        let mut drowse = under_systemd(&["--metrics", "/proc/none"])?;
        let status = drowse.wait_for_exit()?;
        ensure!(status.code() == Some(1), "{status}");
        let said = drowse.all_output();
        let [line] = said.as_slice() else { bail!("not one line: {said:?}") };
        ensure!(line.starts_with("<3>") && line.contains("cannot listen on /proc/none"), "{line}");
        Ok(())
    })
}
