//! Ring 1: options of `drowse run`, each seen to do what it says, and bad input, each with its one clear line.
use std::io::{ErrorKind, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use drowse_tests::drowse_binary;
use drowse_tests::process::{
    Drowse, PUBLIC_PORT, SOON, backend, connect, connect_to, echo, one_request, own_address, public,
};
use rustix::process::Signal;

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");

/// A directory of this test's own.
fn directory() -> Result<PathBuf> {
    let path = std::env::temp_dir().join(format!("drowse-ring1-{}", std::process::id()));
    std::fs::create_dir_all(&path)?;
    Ok(path)
}

fn text(path: &std::path::Path) -> String {
    path.to_string_lossy().into_owned()
}

#[test]
fn options_come_from_the_environment() -> Result<()> {
    let mut command = Command::new(drowse_binary()?);
    command.args(["run", "--", ECHO, &backend()]);
    command.envs([
        ("DROWSE_LISTEN", public()),
        ("DROWSE_BACKEND", backend()),
        ("DROWSE_IDLE_TIME", "100ms".into()),
    ]);
    let mut drowse = Drowse::spawn(&mut command)?;
    drowse.wait_for_notification("READY=1")?;
    one_request(b"a")?;
    drowse.wait_for_line("is asleep")?;
    Ok(())
}

#[test]
fn several_listeners_of_every_family_are_served() -> Result<()> {
    let path = text(&directory()?.join("listener"));
    let (public, backend) = (public(), backend());
    let other = format!("{}:{}", own_address(), PUBLIC_PORT + 10);
    let v6 = format!("[::1]:{}", 10_000 + std::process::id() % 20_000);
    let name = format!("@drowse-ring1-{}", std::process::id());
    let listen =
        ["--listen", &public, "--listen", &other, "--listen", &v6, "--listen", &path, "--listen", &name];
    let drowse = Drowse::run(&[&listen[..], &["--backend", &backend, "--", ECHO, &backend]].concat())?;
    for address in [&public, &other, &v6] {
        echo(&mut connect_to(address)?, address.as_bytes())?;
    }
    let mut client = UnixStream::connect(&path)?;
    client.write_all(b"unix")?;
    client.read_exact(&mut [0; 4])?;
    let address = <std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(
        &name[1..],
    )?;
    let mut client = UnixStream::connect_addr(&address)?;
    client.write_all(b"abstract")?;
    client.read_exact(&mut [0; 8])?;
    drop((client, drowse));
    ensure!(!std::path::Path::new(&path).exists(), "the socket's file is left behind");
    Ok(())
}

#[test]
fn a_backend_may_listen_on_a_unix_socket() -> Result<()> {
    let path = directory()?.join("backend");
    let listener = UnixListener::bind(&path)?;
    let _drowse = Drowse::run(&["--listen", &public(), "--backend", &text(&path)])?;
    let mut client = connect()?;
    client.write_all(b"over the wall")?;
    let mut at_backend = listener.accept()?.0;
    let mut request = [0; 13];
    at_backend.read_exact(&mut request)?;
    ensure!(&request == b"over the wall");
    at_backend.write_all(b"and back")?;
    drop(at_backend);
    let mut reply = String::new();
    client.read_to_string(&mut reply)?;
    ensure!(reply == "and back", "{reply}");
    Ok(())
}

#[test]
fn every_address_of_a_name_is_tried() -> Result<()> {
    // ":PORT" is 127.0.0.1 first and ::1 then; only the second listens.
    let port = 30_000 + u16::try_from(std::process::id() % 20_000).unwrap();
    let listener = TcpListener::bind(("::1", port))?;
    let _drowse = Drowse::run(&["--listen", &public(), "--backend", &format!(":{port}")])?;
    connect()?.write_all(b"x")?;
    listener.accept()?.0.read_exact(&mut [0])?;
    Ok(())
}

#[test]
fn a_plain_proxy_holds_until_the_backend_is_there() -> Result<()> {
    let arguments = ["--listen", &public(), "--backend", &backend(), "--log-level", "debug"];
    let mut drowse = Drowse::run(&arguments)?;
    let mut client = connect()?;
    client.write_all(b"patience")?;
    drowse.wait_for_line("accepts no connection: waiting for it")?;
    let listener = TcpListener::bind(backend())?;
    let mut request = [0; 8];
    listener.accept()?.0.read_exact(&mut request)?;
    ensure!(&request == b"patience");
    Ok(())
}

#[test]
fn the_proxy_protocol_names_the_client() -> Result<()> {
    for version in ["v1", "v2"] {
        let listener = TcpListener::bind(backend())?;
        let _drowse =
            Drowse::run(&["--listen", &public(), "--backend", &backend(), "--proxy-protocol", version])?;
        let mut client = connect()?;
        client.write_all(b"data")?;
        let (from, to) = (client.local_addr()?, client.peer_addr()?);
        let expected = if version == "v1" {
            format!("PROXY TCP4 {} {} {} {}\r\n", from.ip(), to.ip(), from.port(), to.port()).into_bytes()
        } else {
            let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c".to_vec();
            for ip in [from.ip(), to.ip()] {
                let std::net::IpAddr::V4(ip) = ip else { continue };
                header.extend(ip.octets());
            }
            header.extend([from.port().to_be_bytes(), to.port().to_be_bytes()].concat());
            header
        };
        let mut got = vec![0; expected.len() + 4];
        listener.accept()?.0.read_exact(&mut got)?;
        ensure!(got == [&expected[..], b"data"].concat(), "{version}: {}", got.escape_ascii());
    }
    Ok(())
}

#[test]
fn the_http_probe_waits_for_a_good_status() -> Result<()> {
    let directory = directory()?;
    let (public, backend) = (public(), backend());
    let script = format!(
        "import http.server, os\nclass H(http.server.BaseHTTPRequestHandler):\n def do_GET(self):\n  \
         ready = self.path != '/health' or os.path.exists('{0}/seen')\n  open('{0}/seen', 'w').close()\n  \
         self.send_response(200 if ready else 503); self.end_headers(); self.wfile.write(self.path.encode())\n\
         http.server.HTTPServer(('{1}', 8081), H).serve_forever()",
        directory.display(),
        own_address()
    );
    let mut drowse = Drowse::run(&[
        "--listen",
        &public,
        "--backend",
        &backend,
        "--ready-probe",
        "http:/health",
        "--log-level",
        "debug",
        "--",
        "/usr/bin/python3",
        "-c",
        &script,
    ])?;
    let mut client = connect()?;
    client.write_all(b"GET /page HTTP/1.0\r\n\r\n")?;
    let mut reply = String::new();
    client.read_to_string(&mut reply)?;
    ensure!(reply.contains(" 200 ") && reply.ends_with("/page"), "{reply}");
    let first = drowse.wait_for_line("GET /health")?;
    ensure!(first.contains(" 503 "), "the page was served before the probe succeeded: {first}");
    drowse.wait_for_line("\" 200 ")?;
    Ok(())
}

#[test]
fn the_notify_probe_waits_for_ready() -> Result<()> {
    let (public, backend) = (public(), backend());
    let script = format!(
        "{ECHO} {backend} & while ! test -e $READY; do sleep 0.01; done; \
         python3 -c 'import os, socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); \
         s.sendto(b\"READY=1\", b\"\\0\" + os.environb[b\"NOTIFY_SOCKET\"][1:])'; wait"
    );
    let ready = directory()?.join("ready");
    let mut command = Command::new(drowse_binary()?);
    command.args([
        "run",
        "--listen",
        &public,
        "--backend",
        &backend,
        "--ready-probe",
        "notify",
        "--log-level",
        "debug",
    ]);
    let mut drowse = Drowse::spawn(command.env("READY", &ready).args(["--", "/bin/sh", "-c", &script]))?;
    drowse.wait_for_notification("READY=1")?;
    let mut client = connect()?;
    client.write_all(b"early")?;
    drowse_tests::deadline::eventually("the backend to listen", SOON, || Ok(connect_to(&backend).ok()))?;
    client.set_read_timeout(Some(std::time::Duration::from_millis(200)))?;
    let early = client.read(&mut [0; 5]);
    ensure!(
        early.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock),
        "let in early: {early:?}"
    );
    std::fs::write(&ready, "")?;
    client.set_read_timeout(Some(SOON))?;
    client.read_exact(&mut [0; 5])?;
    Ok(())
}

#[test]
fn a_backend_that_never_says_ready_leaves_nothing_open() -> Result<()> {
    let mut drowse = Drowse::run(&[
        "--listen",
        &public(),
        "--backend",
        &backend(),
        "--ready-probe",
        "notify",
        "--ebpf",
        "off",
        "--",
        "/bin/false",
    ])?;
    let open = |drowse: &Drowse| {
        Ok::<_, std::io::Error>(std::fs::read_dir(format!("/proc/{}/fd", drowse.id()))?.count())
    };
    let before = open(&drowse)?;
    for _ in 0..3 {
        let end = connect()?.read(&mut [0]);
        ensure!(end.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "{end:?}");
        drowse.wait_for_line("false exited with status 1")?;
    }
    // The pipes of the last child are closed a moment later.
    drowse_tests::deadline::eventually("its descriptors to close", SOON, || {
        Ok((open(&drowse)? <= before).then_some(()))
    })
}

#[test]
fn a_stranger_at_the_backends_address_is_told_and_not_served_from() -> Result<()> {
    let stranger = TcpListener::bind(backend())?;
    stranger.set_nonblocking(true)?;
    let mut drowse = Drowse::run(&["--listen", &public(), "--backend", &backend(), "--", ECHO, &backend()])?;
    let end = connect()?.read(&mut [0]);
    ensure!(end.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "{end:?}");
    drowse.wait_for_line("another process already listens on the backend's address")?;
    ensure!(stranger.accept().is_err(), "the stranger was connected to");
    drop(stranger);
    one_request(b"now it is free")
}

#[test]
fn a_stale_socket_file_is_replaced() -> Result<()> {
    let path = directory()?.join("stale");
    drop(UnixListener::bind(&path)?);
    let _drowse = Drowse::run(&["--listen", &text(&path), "--backend", &backend()])?;
    UnixStream::connect(&path)?;
    Ok(())
}

/// Runs drowse with something wrong; returns its exit status and what it says.
fn refused(command: &mut Command) -> Result<(Option<i32>, String)> {
    let mut drowse = Drowse::spawn(command)?;
    let status = drowse.wait_for_exit()?;
    Ok((status.code(), drowse.all_output().join("\n")))
}

#[test]
fn bad_input_gets_one_clear_line_and_the_right_status() -> Result<()> {
    let file = directory()?.join("a-file");
    std::fs::write(&file, "")?;
    let taken = TcpListener::bind(public())?;
    let (public, backend, file) = (public(), backend(), text(&file));
    let no_directory = "/nonexistent-directory/socket";
    let cases: &[(&[&str], i32, &str)] = &[
        (&["--backend", &backend], 2, "no listener: give --listen ADDR, or start drowse from a .socket unit"),
        (&["--listen", &public, "--backend", &backend], 1, "another process listens there"),
        (&["--listen", &file, "--backend", &backend], 1, "exists and is no socket"),
        (&["--listen", no_directory, "--backend", &backend], 1, "the directory does not exist"),
        (&["--listen", "192.0.2.1:80", "--backend", &backend], 1, "this machine does not have that address"),
        (&["--listen", &public, "--backend", &public], 2, "must differ"),
        (&["--listen", "8080", "--backend", &backend], 2, "has no port"),
        (&["--listen", &public], 2, "--backend <ADDR>"),
        (
            &["--listen", &public, "--backend", &backend, "--unit", "a.service", "--", "true"],
            2,
            "cannot be used with",
        ),
        (&["--listen", &public, "--backend", &backend, "--unit", "dice"], 2, "dice.service"),
        (&["--listen", &public, "--backend", &backend, "--idle-time", "soon"], 2, "write it as 90s, 15min"),
        (&["--listen", &public, "--backend", &backend, "--connections-max", "9999999"], 2, "LimitNOFILE="),
        (&["--listen", &public, "--backend", &backend, "--start-timeout", "0"], 2, "write infinity"),
        (
            &["--listen", &public, "--backend", &backend, "--ready-probe", "notify"],
            2,
            "needs --unit or a COMMAND",
        ),
    ];
    for (arguments, status, line) in cases {
        let (code, said) = refused(Command::new(drowse_binary()?).arg("run").args(*arguments))?;
        ensure!(code == Some(*status), "{arguments:?}: status {code:?}: {said}");
        ensure!(said.contains(line), "{arguments:?}: {said}");
        let errors = said.lines().filter(|line| line.contains("ERROR") || line.starts_with("error:")).count();
        ensure!(errors == 1, "{arguments:?}: not one line: {said}");
        ensure!(!said.contains("panicked"), "{said}");
    }
    drop(taken);
    Ok(())
}

#[test]
fn listeners_from_systemd_and_from_the_command_line_exclude_each_other() -> Result<()> {
    let mut command = Command::new("systemd-socket-activate");
    let passed = format!("{}:{}", own_address(), PUBLIC_PORT + 1);
    command.args(["-l", &passed]).arg(drowse_binary()?);
    let mut drowse = Drowse::spawn(command.args(["run", "--listen", &public(), "--backend", &backend()]))?;
    drowse.wait_for_line("Listening on")?;
    let _client = connect_to(&passed)?;
    drowse.wait_for_line("listeners came from systemd (LISTEN_FDS) and --listen is given too")?;
    ensure!(drowse.wait_for_exit()?.code() == Some(2));
    Ok(())
}

#[test]
fn wrong_descriptors_from_the_service_manager_are_told() -> Result<()> {
    let cases = [
        ("", "x", "invalid LISTEN_FDS"),
        ("exec 3<&- 4<&- 5<&-; ", "3", "that LISTEN_FDS promises: Bad file descriptor"),
        ("exec 3</dev/null; ", "1", "is no listening stream socket"),
    ];
    for (prepare, count, says) in cases {
        let script = format!("{prepare}LISTEN_FDS={count} LISTEN_PID=$$ exec \"$@\"");
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &script, "sh"]).arg(drowse_binary()?).args(["run", "--backend", &backend()]);
        let (code, said) = refused(&mut command)?;
        ensure!(code == Some(1) && said.contains(says), "{count}: status {code:?}: {said}");
    }
    Ok(())
}

#[test]
fn a_name_that_does_not_resolve_is_told_when_the_wait_is_over() -> Result<()> {
    let mut drowse = Drowse::run(&[
        "--listen",
        &public(),
        "--backend",
        "no-such-host.invalid:80",
        "--start-timeout",
        "300ms",
    ])?;
    let end = connect()?.read(&mut [0]);
    ensure!(end.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "{end:?}");
    let line = drowse.wait_for_line("did not accept a connection within 300ms")?;
    ensure!(line.contains("lookup"), "{line}");
    Ok(())
}

#[test]
fn a_missing_command_is_told_and_tried_again() -> Result<()> {
    let missing = directory()?.join("not-yet-there");
    let mut drowse =
        Drowse::run(&["--listen", &public(), "--backend", &backend(), "--", &text(&missing), &backend()])?;
    let end = connect()?.read(&mut [0]);
    ensure!(end.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "{end:?}");
    drowse.wait_for_line("no program '")?;
    std::os::unix::fs::symlink(ECHO, &missing)?;
    one_request(b"there now")
}

/// Out of descriptors: clients wait in the backlog or are held, and are served when there are some again.
#[test]
fn running_out_of_descriptors_loses_nobody() -> Result<()> {
    let drowse = Drowse::run(&["--listen", &public(), "--backend", &backend(), "--", ECHO, &backend()])?;
    one_request(b"first")?;
    let pid = rustix::process::Pid::from_raw(drowse.id().cast_signed()).context("a pid")?;
    let open = std::fs::read_dir(format!("/proc/{}/fd", drowse.id()))?.count();
    let limit = |current: u64| {
        let limit = rustix::process::Rlimit { current: Some(current), maximum: Some(20_000) };
        rustix::process::prlimit(Some(pid), rustix::process::Resource::Nofile, limit)
    };
    limit(open as u64 + 9)?;
    let mut clients = Vec::new();
    for number in 0..20_u8 {
        let mut client = connect()?;
        client.write_all(&[number])?;
        clients.push(client);
    }
    clients.first_mut().unwrap().read_exact(&mut [0])?;
    limit(1000)?;
    for (number, client) in (0_u8..).zip(&mut clients).skip(1) {
        let mut reply = [0];
        client.read_exact(&mut reply).with_context(|| format!("client {number}"))?;
        ensure!(reply == [number]);
    }
    drowse.signal(Signal::TERM)
}

#[test]
fn a_proxy_in_front_of_itself_is_refused() -> Result<()> {
    let port = 20_000 + std::process::id() % 10_000;
    let (any, loopback) = (format!(":{port}"), format!("127.0.0.1:{port}"));
    let arguments = ["run", "--listen", &any, "--backend", &loopback];
    let (code, said) = refused(Command::new(drowse_binary()?).args(arguments))?;
    ensure!(code == Some(1) && said.contains("is where drowse itself listens"), "{code:?}: {said}");
    Ok(())
}
