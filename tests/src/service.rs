//! A booted systemd with the shipped units and the program in their places, and backends behind them.
//!
//! Owns: where things are installed. Must never: change a shipped unit; what a test needs comes with drop-ins and
//! `/etc/drowse/NAME.conf`, as it does for a user.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::systemd::{Options, Systemd};
use crate::{drowse_binary, workspace};

/// Long enough for anything that must happen, on a machine that is busy with other tests.
pub const SOON: Duration = Duration::from_secs(20);
/// The public port of [`Installation::echo`].
pub const PUBLIC_PORT: u16 = 8080;
/// The backend's own port of [`Installation::echo`].
pub const BACKEND_PORT: u16 = 8081;

/// A systemd with drowse installed.
#[derive(Debug)]
pub struct Installation {
    /// The systemd.
    pub systemd: Systemd,
}

/// Boots, installs, runs `test`, and adds the journal to its error.
///
/// `echo_backend` is the path of the program `echo-backend`, which only an integration test knows.
///
/// # Errors
/// The boot's, or the test's.
pub fn with_drowse(echo_backend: &str, test: impl FnOnce(&Installation) -> Result<()>) -> Result<()> {
    with_drowse_on(Options::new(), echo_backend, test)
}

/// [`with_drowse`] with options of the boot.
///
/// # Errors
/// The boot's, or the test's.
pub fn with_drowse_on(
    options: Options,
    echo_backend: &str,
    test: impl FnOnce(&Installation) -> Result<()>,
) -> Result<()> {
    let options =
        options.bind(drowse_binary()?, "/usr/bin/drowse").bind(echo_backend, "/usr/bin/echo-backend");
    let installation = Installation { systemd: Systemd::boot_with(&options)? };
    let units = workspace().join("units");
    for unit in ["drowse@.socket", "drowse@.service"] {
        installation.systemd.install(units.join(unit), &format!("/usr/lib/systemd/system/{unit}"))?;
    }
    for (shipped, place) in [
        ("sysusers.d/drowse.conf", "/usr/lib/sysusers.d/drowse.conf"),
        ("polkit-1/rules.d/50-drowse.rules", "/usr/share/polkit-1/rules.d/50-drowse.rules"),
    ] {
        installation.systemd.install(units.join(shipped), place)?;
    }
    installation.systemd.call(["systemd-sysusers"])?;
    with_journal(&installation, test)
}

/// Runs `test` and adds the journal to its error.
///
/// # Errors
/// The test's.
pub fn with_journal(
    installation: &Installation,
    test: impl FnOnce(&Installation) -> Result<()>,
) -> Result<()> {
    test(installation).map_err(|error| {
        let journal = installation.systemd.whole_journal().unwrap_or_else(|error| format!("{error:#}"));
        error.context(format!("the journal:\n{journal}")).context("a test under systemd failed")
    })
}

impl Installation {
    /// Installs one of `units/examples` as its README says, with `conf` added to its configuration.
    ///
    /// # Errors
    /// A file cannot be written, or a unit does not load.
    pub fn example(&self, example: &str, conf: &str) -> Result<()> {
        let (systemd, examples) = (&self.systemd, workspace().join("units/examples"));
        let from = examples.join(example);
        systemd.install(examples.join("dice/dice.py"), "/usr/local/bin/dice.py")?;
        systemd.install(from.join("dice.service"), "/etc/systemd/system/dice.service")?;
        systemd.install(from.join("listen.conf"), "/etc/systemd/system/drowse@dice.socket.d/listen.conf")?;
        let drop_in = from.join("unix-backend.conf");
        if drop_in.exists() {
            systemd.install(drop_in, "/etc/systemd/system/drowse@dice.service.d/unix-backend.conf")?;
        }
        let shipped = std::fs::read_to_string(from.join("dice.conf")).context("read the example's conf")?;
        self.configure("dice", &format!("{shipped}{conf}\n"))?;
        self.listen("dice")
    }

    /// Puts `echo-backend ARGUMENTS` as `echo.service` on [`BACKEND_PORT`] behind drowse on [`PUBLIC_PORT`].
    ///
    /// # Errors
    /// A file cannot be written, or a unit does not load.
    pub fn echo(&self, arguments: &str, conf: &str) -> Result<()> {
        self.echo_unit(arguments, "")?;
        self.socket("echo", &format!("127.0.0.1:{PUBLIC_PORT}"))?;
        self.configure("echo", &format!("DROWSE_BACKEND=127.0.0.1:{BACKEND_PORT}\n{conf}\n"))?;
        self.listen("echo")
    }

    /// Writes `echo.service`, ready when it listens, with `settings` added to the file's end, its \[Service\] section.
    ///
    /// # Errors
    /// The file cannot be written, or systemd does not reload.
    pub fn echo_unit(&self, arguments: &str, settings: &str) -> Result<()> {
        let unit = format!(
            "[Service]\nType=notify\nExecStart=/usr/bin/echo-backend 127.0.0.1:{BACKEND_PORT} --notify {arguments}\n\
             {settings}\n"
        );
        self.unit("echo", &unit)
    }

    /// Writes the backend unit `NAME.service` and reloads.
    ///
    /// # Errors
    /// The file cannot be written, or systemd does not reload.
    pub fn unit(&self, name: &str, contents: &str) -> Result<()> {
        self.systemd.write(&format!("/etc/systemd/system/{name}.service"), contents)?;
        self.systemd.systemctl(["daemon-reload"]).map(drop)
    }

    /// Gives `drowse@NAME.socket` its address.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn socket(&self, name: &str, address: &str) -> Result<()> {
        let path = format!("/etc/systemd/system/drowse@{name}.socket.d/listen.conf");
        self.systemd.write(&path, &format!("[Socket]\nListenStream={address}\n"))
    }

    /// Writes `/etc/drowse/NAME.conf`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn configure(&self, name: &str, conf: &str) -> Result<()> {
        self.systemd.write(&format!("/etc/drowse/{name}.conf"), conf)
    }

    /// Reloads and starts `drowse@NAME.socket`.
    ///
    /// # Errors
    /// A unit does not load.
    pub fn listen(&self, name: &str) -> Result<()> {
        self.systemd.systemctl(["daemon-reload"])?;
        self.systemd.systemctl(["start", &format!("drowse@{name}.socket")]).map(drop)
    }

    /// Waits until `drowse@NAME.service` says in its status that it is asleep and systemd says that `NAME.service` is
    /// stopped.
    ///
    /// # Errors
    /// Not soon.
    pub fn wait_asleep(&self, name: &str) -> Result<()> {
        self.systemd.wait_until_property(&format!("{name}.service"), "ActiveState", "inactive", SOON)?;
        self.systemd.wait_until(&format!("drowse@{name}.service"), "StatusText", SOON, |status| {
            status.starts_with("asleep")
        })
    }

    /// Connects to the public port of [`Installation::echo`].
    ///
    /// # Errors
    /// The connection is refused.
    pub fn connect(&self) -> Result<TcpStream> {
        let stream = self
            .systemd
            .in_netns(|| TcpStream::connect((Ipv4Addr::LOCALHOST, PUBLIC_PORT)))?
            .context("connect to the public port")?;
        with_deadline(&stream)?;
        Ok(stream)
    }

    /// Sends a line to the public port on a connection of its own and waits for its echo and the end.
    ///
    /// # Errors
    /// The connection is refused or reset, or the reply is another.
    pub fn ask(&self) -> Result<()> {
        ask(self.connect()?)
    }
}

/// Bounds every read and write of a client.
///
/// # Errors
/// The socket does not take a timeout.
pub fn with_deadline(stream: &TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(SOON)).context("bound the reads")?;
    stream.set_write_timeout(Some(SOON)).context("bound the writes")
}

/// One request on a connection of its own, as the shortest of clients does it.
///
/// # Errors
/// The connection is reset, or the reply is another.
pub fn ask(mut stream: TcpStream) -> Result<()> {
    stream.write_all(b"how are you\n").context("send")?;
    let mut reply = [0; 12];
    stream.read_exact(&mut reply).context("receive")?;
    ensure!(&reply == b"how are you\n", "another reply: {reply:?}");
    stream.shutdown(std::net::Shutdown::Write).context("half-close")?;
    let rest = stream.read(&mut reply).context("wait for the end")?;
    ensure!(rest == 0, "more than the reply");
    Ok(())
}

/// The body of the answer to `GET /` over any stream.
///
/// # Errors
/// The connection breaks, or the answer is no HTTP 200.
pub fn http_get(mut stream: impl Read + Write) -> Result<String> {
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: dice\r\nConnection: close\r\n\r\n")
        .context("send the request")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("receive the answer")?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("no head in {answer:?}"))?;
    ensure!(head.starts_with("HTTP/1.1 200 "), "not 200: {head}");
    Ok(body.to_owned())
}

/// Lines that a failed test prints, numbered.
#[must_use]
pub fn numbered(lines: &[String]) -> String {
    lines.iter().enumerate().fold(String::new(), |mut text, (number, line)| {
        let _ = writeln!(text, "{number}: {line}");
        text
    })
}

/// A unix socket inside, as the host reaches it.
///
/// # Errors
/// Nobody listens there.
pub fn connect_unix(path: &Path) -> Result<std::os::unix::net::UnixStream> {
    let stream = std::os::unix::net::UnixStream::connect(path).context("connect to the public socket")?;
    stream.set_read_timeout(Some(SOON)).context("bound the reads")?;
    Ok(stream)
}
