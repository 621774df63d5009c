//! Ring 1: `drowse status` and `drowse check` beside the real program, and the status socket itself.

use std::io::{ErrorKind, Read, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use drowse::report::control::Control;
use drowse::report::remembered::Remembered;
use drowse::report::snapshot::{FlowCount, HandoffState, Snapshot, Source, StateName};
use drowse_tests::deadline::eventually;
use drowse_tests::drowse_binary;
use drowse_tests::fake_systemd::{FakeSystemd, FakeUnit, PrivateBus};
use drowse_tests::process::{Drowse, RUNTIME_DIR, SOON, backend, connect, echo, one_request, public};
use rustix::process::Signal;
use serde_json::Value;

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");

/// `drowse run` named `echo` in front of an echo backend; with the plane `splice` if the options name none.
fn run(options: &[&str], backend_options: &[&str]) -> Result<Drowse> {
    let (public, backend) = (public(), backend());
    let addresses = ["--name", "echo", "--listen", &public, "--backend", &backend];
    let plane: &[&str] = if options.contains(&"--plane") { &[] } else { &["--plane", "splice"] };
    Drowse::run(&[&addresses, plane, options, &["--", ECHO, &backend], backend_options].concat())
}

/// `drowse WORDS` that looks into `directory`.
fn look(directory: &Path, words: &[&str]) -> Result<Output> {
    let mut command = Command::new(drowse_binary()?);
    command.args(words).env(RUNTIME_DIR, directory).output().context("run drowse")
}

/// What `drowse WORDS` writes to stdout when it succeeds.
fn told(directory: &Path, words: &[&str]) -> Result<String> {
    let output = look(directory, words)?;
    ensure!(output.status.success(), "{words:?}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// What it says to stderr when it fails with status 1.
fn refused(directory: &Path, words: &[&str]) -> Result<String> {
    let output = look(directory, words)?;
    ensure!(output.status.code() == Some(1) && output.stdout.is_empty(), "{words:?}: {output:?}");
    Ok(String::from_utf8(output.stderr)?)
}

fn snapshot(drowse: &Drowse) -> Result<Snapshot> {
    Ok(serde_json::from_str(&told(&drowse.runtime_dir(), &["status", "echo", "--json"])?)?)
}

/// Waits until the service is in `state`.
fn wait_for(drowse: &Drowse, state: StateName) -> Result<Snapshot> {
    eventually(state.word(), SOON, || Ok(Some(snapshot(drowse)?).filter(|found| found.state == state)))
}

/// The one line of `drowse status` below the heading, without the columns' blanks.
fn line(drowse: &Drowse) -> Result<String> {
    let text = told(&drowse.runtime_dir(), &["status"])?;
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let lines: Vec<String> = text.lines().map(words).collect();
    match lines.as_slice() {
        [heading, line] if heading == "NAME STATE SINCE MEMORY LAST WAKE TODAY FLOWS HELD PLANE WHY" => {
            Ok(line.clone())
        }
        _ => bail!("no heading and one line: {text}"),
    }
}

#[test]
fn a_service_is_followed_from_sleep_to_waking_to_use_and_back() -> Result<()> {
    let drowse = run(&["--idle-time", "300ms"], &["--delay-ms", "700"])?;
    let asleep = snapshot(&drowse)?;
    ensure!(asleep.state == StateName::Asleep && asleep.pid == drowse.id(), "{asleep:?}");
    ensure!(asleep.name == "echo" && asleep.unit.is_none() && asleep.backend == backend(), "{asleep:?}");
    ensure!(asleep.last_activation.is_none() && asleep.idle.reasons.is_empty(), "{asleep:?}");
    let text = line(&drowse)?;
    ensure!(
        text.starts_with("echo asleep ") && text.ends_with("the next connection wakes echo-backend"),
        "{text}"
    );

    let mut client = connect()?;
    let waking = wait_for(&drowse, StateName::Waking)?;
    ensure!(waking.held == 1 && waking.line.contains("1 client waits"), "{waking:?}");
    let text = line(&drowse)?;
    ensure!(text.starts_with("echo waking ") && text.contains(" 0 1 splice waking echo-backend"), "{text}");

    echo(&mut client, b"good morning")?;
    let awake = snapshot(&drowse)?;
    ensure!(awake.state == StateName::Awake && awake.held == 0, "{awake:?}");
    ensure!(awake.flows.proxied == FlowCount { open: 1, total: 1 }, "{awake:?}");
    ensure!((awake.bytes_to_backend, awake.bytes_to_client) == (12, 12), "{awake:?}");
    let took_s = awake.last_activation.context("an activation")?.took_s;
    ensure!(awake.activations_total == 1 && (0.69..10.0).contains(&took_s), "{awake:?}");
    ensure!(awake.idle.reasons[0].starts_with("1 open flow, last used "), "{awake:?}");
    let text = line(&drowse)?;
    ensure!(text.contains(" 1 0 splice 1 open flow, last used "), "{text}");
    let whole = told(&drowse.runtime_dir(), &["status", "echo"])?;
    for words in
        ["why awake    1 open flow", "proxied: 1 open, 1 since", "wake-ups     1; the last took", &public()]
    {
        ensure!(whole.contains(words), "no '{words}' in:\n{whole}");
    }

    drop(client);
    let asleep = wait_for(&drowse, StateName::Asleep)?;
    ensure!(
        asleep.flows.proxied == FlowCount { open: 0, total: 1 } && asleep.failures_total == 0,
        "{asleep:?}"
    );
    Ok(())
}

#[test]
fn a_failure_is_told_with_its_reason() -> Result<()> {
    let drowse = run(&[], &["--exit", "3"])?;
    let end = connect()?.read(&mut [0]);
    ensure!(end.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "{end:?}");
    let failed = wait_for(&drowse, StateName::Failed)?;
    let failure = failed.last_failure.clone().context("the failure")?;
    ensure!(failed.failures_total == 1 && failed.activations_total == 0, "{failed:?}");
    ensure!(failure.result == "exit-code" && failure.message.contains("status 3"), "{failure:?}");
    let text = line(&drowse)?;
    ensure!(text.starts_with("echo failed ") && text.contains(&failure.message), "{text}");
    let whole = told(&drowse.runtime_dir(), &["status", "echo"])?;
    ensure!(whole.contains("failures     1; the last ") && whole.contains("exit-code"), "{whole}");
    Ok(())
}

#[test]
fn why_it_stays_awake_is_told() -> Result<()> {
    let drowse = run(&["--idle-action", "none"], &[])?;
    one_request(b"a")?;
    let awake = wait_for(&drowse, StateName::Awake)?;
    ensure!(awake.idle.reasons.last().unwrap() == "never put to sleep: --idle-action none", "{awake:?}");
    drop(drowse);

    let drowse = run(&["--idle-time", "100ms", "--busy-command", "exit 0"], &[])?;
    one_request(b"a")?;
    eventually("the veto", SOON, || {
        let reasons = snapshot(&drowse)?.idle.reasons;
        Ok(reasons.iter().any(|reason| reason.starts_with("busy command vetoed")).then_some(()))
    })?;
    drop(drowse);

    let drowse = run(&[], &[])?;
    one_request(b"a")?;
    eventually("idle", SOON, || {
        let Snapshot { idle, .. } = snapshot(&drowse)?;
        let in_time = idle.sleeps_in_s.is_some_and(|time| (800.0..=900.0).contains(&time));
        Ok((in_time && idle.reasons == ["idle policy: idle in 15 min"]).then_some(()))
    })
}

#[test]
fn json_and_text_agree_for_scripts_and_people() -> Result<()> {
    let drowse = run(&["--plane", "copy"], &[])?;
    let _client = connect()?;
    wait_for(&drowse, StateName::Awake)?;
    let all: Value = serde_json::from_str(&told(&drowse.runtime_dir(), &["status", "--json"])?)?;
    let one: Value = serde_json::from_str(&told(&drowse.runtime_dir(), &["status", "echo", "--json"])?)?;
    let all = all.as_array().context("an array")?;
    ensure!(all.len() == 1 && all[0]["name"] == one["name"] && all[0]["pid"] == one["pid"], "{all:?}\n{one}");
    ensure!(
        one["schema"] == 1 && one["state"] == "awake" && one["flows"]["handed_off"]["open"] == 0,
        "{one}"
    );
    ensure!(one["plane"]["forward"] == "copy", "{one}");
    let listener = &one["plane"]["handoff"]["listeners"][0];
    ensure!(listener["address"] == public() && listener["handed_off"] == false, "{one}");
    ensure!(line(&drowse)?.starts_with("echo awake "), "{one}");
    Ok(())
}

#[test]
fn nobody_and_an_unknown_name_are_told() -> Result<()> {
    let directory = tempfile::tempdir()?;
    for there in [directory.path().to_owned(), directory.path().join("missing")] {
        ensure!(told(&there, &["status"])?.contains("no drowse runs here"));
        ensure!(told(&there, &["status", "--json"])?.trim() == "[]");
        let said = refused(&there, &["status", "dice"])?;
        ensure!(
            said.contains("no drowse named 'dice' runs") && said.contains("drowse@dice.socket"),
            "{said}"
        );
    }
    let said = refused(directory.path(), &["status", ""])?;
    ensure!(said.contains("the name is empty"), "{said}");
    Ok(())
}

/// More peers than are answered at a time connect and neither read nor go away.
#[test]
fn peers_that_never_read_stop_nobody() -> Result<()> {
    let drowse = run(&[], &[])?;
    let socket = drowse.runtime_dir().join("echo.sock");
    let silent: Vec<UnixStream> = (0..40).map(|_| UnixStream::connect(&socket)).collect::<Result<_, _>>()?;
    one_request(b"and the client is served")?;
    ensure!(snapshot(&drowse)?.flows.proxied.total == 1);
    drop(silent);
    Ok(())
}

/// An answer that no socket buffer takes, and one peer more than are answered at a time.
#[test]
fn a_peer_that_never_reads_is_dropped_and_makes_room() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let small = snapshot(&run(&[], &[])?)?;
    let big = Snapshot { line: "x".repeat(4 << 20), ..small };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut control = Control::open(Some(directory.path()), "big")?;
        let socket = directory.path().join("big.sock");
        let connect = || UnixStream::connect(&socket).context("connect");
        let silent: Vec<UnixStream> = (0..8).map(|_| connect()).collect::<Result<_, _>>()?;
        let last = tokio::net::UnixStream::connect(&socket).await?;
        let mut text = String::new();
        let mut reader = tokio::io::BufReader::new(last);
        let whole = async {
            let read = tokio::io::AsyncReadExt::read_to_string(&mut reader, &mut text);
            tokio::time::timeout(SOON, read).await.context("a peer that reads waits for those that do not")
        };
        let before = drowse::clock::now();
        let answering = async {
            loop {
                let peer = control.asked().await;
                control.answer(peer, &big);
            }
        };
        tokio::select! {
            read = whole => { read??; }
            () = answering => {}
        }
        let waited = drowse::clock::now().saturating_sub(before);
        ensure!(waited > Duration::from_millis(900), "nine were answered at a time: {waited:?}");
        drop(silent);
        let read: Snapshot = serde_json::from_str(&text)?;
        ensure!(read == big, "{} bytes of another answer", text.len());
        Ok(())
    })
}

#[test]
fn the_socket_of_a_killed_drowse_is_replaced_and_a_live_one_stays() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("echo.sock");
    let start = |port: u16| {
        let listen = format!("{}:{port}", drowse_tests::process::own_address());
        let mut command = Command::new(drowse_binary()?);
        command.args(["run", "--name", "echo", "--listen", &listen, "--backend", &backend()]);
        let mut drowse = Drowse::spawn(command.env(RUNTIME_DIR, directory.path()))?;
        drowse.wait_for_notification("READY=1")?;
        anyhow::Ok(drowse)
    };
    let pid = || -> Result<u32> {
        let one: Snapshot = serde_json::from_str(&told(directory.path(), &["status", "echo", "--json"])?)?;
        Ok(one.pid)
    };
    let mut killed = start(8080)?;
    ensure!(pid()? == killed.id());
    killed.signal(Signal::KILL)?;
    killed.wait_for_exit()?;
    ensure!(socket.exists(), "nothing was left behind");
    ensure!(told(directory.path(), &["status"])?.contains("gone"));
    ensure!(refused(directory.path(), &["status", "echo"])?.contains("it was killed"));

    let mut second = start(8081 + 1)?;
    ensure!(pid()? == second.id());
    let mut third = start(8081 + 2)?;
    third.wait_for_line("another drowse named echo runs; its status socket stays")?;
    ensure!(pid()? == second.id());
    third.signal(Signal::TERM)?;
    third.wait_for_exit()?;
    ensure!(pid()? == second.id(), "the exit of one removed the other's socket");
    second.signal(Signal::TERM)?;
    second.wait_for_exit()?;
    let left: Vec<_> = std::fs::read_dir(directory.path())?.collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

#[test]
fn a_service_without_a_status_socket_serves() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("echo.sock");
    std::fs::write(&file, "mine")?;
    let cases = [
        (directory.path().join("no/such/directory"), "make "),
        (directory.path().to_owned(), "exists and is no socket; remove it"),
        (PathBuf::from("/proc"), "listen on /proc/echo.sock"),
        (PathBuf::from(format!("/tmp/{}", "x".repeat(200))), "no status socket"),
    ];
    for (there, says) in cases {
        let (public, backend) = (public(), backend());
        let mut command = Command::new(drowse_binary()?);
        command.args([
            "run",
            "--name",
            "echo",
            "--listen",
            &public,
            "--backend",
            &backend,
            "--",
            ECHO,
            &backend,
        ]);
        let mut drowse = Drowse::spawn(command.env(RUNTIME_DIR, &there))?;
        drowse.wait_for_notification("READY=1")?;
        let line = drowse.wait_for_line("no status socket")?;
        ensure!(line.contains(says), "{}: {line}", there.display());
        one_request(b"served")?;
        drop(drowse);
        let _only_in_one_case = std::fs::remove_dir(&there);
    }
    ensure!(std::fs::read_to_string(&file)? == "mine");
    Ok(())
}

/// Only root and the user that drowse runs as may look.
#[test]
fn another_user_is_not_let_in() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        // Nobody else to be: what can be seen as this user is the mode that keeps others out.
        let drowse = run(&[], &[])?;
        let mode = std::fs::metadata(drowse.runtime_dir().join("echo.sock"))?.permissions().mode();
        ensure!(mode & 0o777 == 0o600, "{mode:o}");
        return Ok(());
    }
    let drowse = run(&[], &[])?;
    let directory = drowse.runtime_dir();
    // The way there is open to everybody, so that only the socket's own mode is in it.
    std::fs::set_permissions(directory.parent().unwrap(), std::fs::Permissions::from_mode(0o755))?;
    let mode = |path: &Path| anyhow::Ok(std::fs::metadata(path)?.permissions().mode() & 0o777);
    ensure!(mode(&directory)? == 0o755 && mode(&directory.join("echo.sock"))? == 0o600);

    // So is the way to the program, which may be built where others have no access.
    let program = directory.with_file_name("program");
    std::fs::copy(drowse_binary()?, &program)?;
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    let as_nobody = |words: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"]);
        command.arg(&program).args(words).env(RUNTIME_DIR, &directory);
        command.output().context("run drowse as another user")
    };
    let output = as_nobody(&["status"])?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success() && text.contains("not permitted"), "{output:?}");
    ensure!(!text.contains("asleep"), "{text}");
    let output = as_nobody(&["status", "echo", "--json"])?;
    ensure!(output.status.code() == Some(1) && output.stdout.is_empty(), "{output:?}");
    ensure!(told(&directory, &["status"])?.contains("asleep"), "root itself is not let in");
    Ok(())
}

#[test]
fn one_that_hangs_is_told_within_its_second_beside_those_that_answer() -> Result<()> {
    let drowse = run(&[], &[])?;
    let directory = drowse.runtime_dir();
    let _never_answers = UnixListener::bind(directory.join("hangs.sock"))?;
    let before = drowse::clock::now();
    let text = told(&directory, &["status"])?;
    let took = drowse::clock::now().saturating_sub(before);
    ensure!(text.contains("echo   asleep") && text.contains("does not answer"), "{text}");
    ensure!(took >= Duration::from_secs(1), "{took:?}");
    let said = refused(&directory, &["status", "hangs"])?;
    ensure!(said.contains("hangs: does not answer"), "{said}");
    let output = look(&directory, &["check", "--json"])?;
    ensure!(String::from_utf8_lossy(&output.stderr).contains("hangs: does not answer"), "{output:?}");
    ensure!(output.status.code() == Some(1), "{output:?}");
    Ok(())
}

/// A benchmark more than a test: fifty services that are really there.
#[test]
fn fifty_services_are_told_in_one_go() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let services: Vec<Drowse> = (0..50)
        .map(|number| {
            let (name, listen) =
                (format!("service-{number:02}"), format!("@{}-{number}", directory.path().display()));
            let mut command = Command::new(drowse_binary()?);
            command.args([
                "run",
                "--workers",
                "1",
                "--drain-time",
                "0",
                "--name",
                &name,
                "--listen",
                &listen,
                "--backend",
                &backend(),
            ]);
            Drowse::spawn(command.env(RUNTIME_DIR, directory.path()))
        })
        .collect::<Result<_>>()?;
    let text = eventually("fifty answers", SOON, || {
        let text = told(directory.path(), &["status"])?;
        Ok((text.lines().filter(|line| line.contains(" awake ")).count() == 50).then_some(text))
    })?;
    ensure!(text.lines().skip(1).is_sorted(), "{text}");
    let mut times: Vec<Duration> = (0..20)
        .map(|_| {
            let before = drowse::clock::now();
            told(directory.path(), &["status"])?;
            Ok(drowse::clock::now().saturating_sub(before))
        })
        .collect::<Result<_>>()?;
    times.sort();
    println!("drowse status of 50 services: median {:?}, slowest {:?}", times[10], times[19]);
    for service in &services {
        service.signal(Signal::TERM)?;
    }
    Ok(())
}

#[test]
fn check_names_every_fact_and_every_listener() -> Result<()> {
    let drowse = run(&[], &[])?;
    let output = look(&drowse.runtime_dir(), &["check", "--json"])?;
    let found: Value = serde_json::from_slice(&output.stdout)?;
    let subjects = |key: &str| -> Vec<String> {
        let facts = found[key].as_array().unwrap().iter();
        facts.map(|fact| fact["subject"].as_str().unwrap().to_owned()).collect()
    };
    let requirements = ["object", "capabilities", "cgroup2", "bpffs", "perfmon", "btf", "kernel"];
    ensure!(subjects("requirements") == requirements, "{found}");
    let planes = ["handoff", "sockmap-ends", "sockmap", "splice", "copy"];
    ensure!(subjects("planes") == planes, "{found}");
    let facts = ["requirements", "planes"].map(|key| found[key].as_array().unwrap().clone()).concat();
    for fact in &facts {
        let answer = fact["answer"].as_str().unwrap();
        ensure!(["yes", "no", "unknown"].contains(&answer), "{fact}");
        ensure!(!fact["reason"].as_str().unwrap().is_empty(), "{fact}");
    }
    let all_known = facts.iter().all(|fact| fact["answer"] != "unknown");
    ensure!(output.status.success() == all_known, "{output:?}");
    ensure!(found["planes"][3]["answer"] == "yes" && found["planes"][4]["answer"] == "yes", "{found}");
    let listener = &found["listeners"][0];
    ensure!(listener["service"] == "echo" && listener["address"] == public(), "{found}");
    ensure!(listener["plane"] == "splice", "{found}");

    let text = String::from_utf8(look(&drowse.runtime_dir(), &["check"])?.stdout)?;
    for fact in &facts {
        let subject = fact["subject"].as_str().unwrap();
        ensure!(text.lines().any(|line| line.starts_with(&format!("{subject} "))), "{subject}: {text}");
    }
    ensure!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    ensure!(text.contains(&public()), "{text}");
    Ok(())
}

/// What a COMMAND's processes use, and what its sleep saves.
#[test]
fn memory_is_told_in_use_and_saved() -> Result<()> {
    let drowse = run(&["--idle-time", "300ms"], &[])?;
    ensure!(snapshot(&drowse)?.memory_saved_bytes.is_none(), "nothing has slept yet");
    let mut client = connect()?;
    echo(&mut client, b"good morning")?;
    let awake = wait_for(&drowse, StateName::Awake)?;
    let used = awake.memory_bytes.context("the memory in use")?;
    ensure!((100 << 10..1 << 30).contains(&used) && awake.memory_saved_bytes.is_none(), "{awake:?}");
    ensure!(awake.today.is_some_and(|today| today.activations == 1), "{awake:?}");
    drop(client);
    let asleep = wait_for(&drowse, StateName::Asleep)?;
    let saved = asleep.memory_saved_bytes.context("the memory saved")?;
    ensure!((100 << 10..1 << 30).contains(&saved) && asleep.memory_bytes.is_none(), "{asleep:?}");
    ensure!(line(&drowse)?.contains(" saves "), "{asleep:?}");
    Ok(())
}

/// Services whose drowse does not run are known to systemd; while that cannot be asked, those that run are told.
#[tokio::test]
async fn sleepers_are_told_while_systemd_can_be_asked() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let bus = PrivateBus::start()?;
    let unit = |active| FakeUnit { active, ..FakeUnit::default() };
    let mut systemd = FakeSystemd::start(&bus, "drowse@ring1-sleeper.socket", unit("active")).await?;
    systemd.set_unit("drowse@ring1-failed.socket", unit("failed"));
    systemd.set_unit("drowse@ring1-off.socket", unit("inactive"));
    systemd.set_unit("ring1-sleeper.service", unit("inactive"));
    let status = async || {
        let mut command = tokio::process::Command::new(drowse_binary()?);
        command.args(["status", "--json"]).env_remove(RUNTIME_DIR).env_remove("DBUS_SESSION_BUS_ADDRESS");
        command.env("XDG_RUNTIME_DIR", directory.path()).env("DBUS_SYSTEM_BUS_ADDRESS", bus.address());
        let output = command.output().await?;
        ensure!(output.status.success(), "{output:?}");
        let all: Vec<Snapshot> = serde_json::from_slice(&output.stdout)?;
        anyhow::Ok(all.into_iter().filter(|one| one.name.starts_with("ring1-")).collect::<Vec<_>>())
    };
    let told = status().await?;
    let names: Vec<_> = told.iter().map(|one| (one.name.as_str(), one.state)).collect();
    ensure!(names == [("ring1-failed", StateName::Failed), ("ring1-sleeper", StateName::Asleep)], "{told:?}");
    ensure!(told[1].source == Source::Systemd && told[1].pid == 0, "{told:?}");
    ensure!(told[1].line.ends_with("the next connection wakes ring1-sleeper.service"), "{told:?}");
    systemd.leave_bus().await?;
    ensure!(status().await?.is_empty());
    Ok(())
}

/// What a peer says, and how it calls itself, goes to terminals; scripts get it as it is.
#[test]
fn no_peer_commands_the_terminal() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let evil = |text: &str| text.contains(['\x1b', '\u{9b}', '\u{202e}']);
    let mut hostile = snapshot(&run(&[], &[])?)?;
    let words = "\x1b[2J\u{9b}31m\u{202e}evil\nname  asleep";
    (hostile.name, hostile.line) = (words.into(), format!("awake: {words}"));
    hostile.plane.handoff.listeners[0].address = words.into();
    hostile.plane.handoff.reason = Some(words.into());
    let (listener, json) =
        (UnixListener::bind(directory.path().join("hostile.sock"))?, serde_json::to_vec(&hostile)?);
    std::thread::spawn(move || {
        listener.incoming().for_each(|peer| peer.and_then(|mut peer| peer.write_all(&json)).unwrap());
    });
    // One that is silent, with a name that is no better: it is in the notes.
    drop(UnixListener::bind(directory.path().join("\x1b[2J\u{202e}.sock"))?);
    for words in [&["status"][..], &["status", "hostile"], &["check"], &["status", "\x1b[2J\u{202e}"]] {
        let output = look(directory.path(), words)?;
        let said =
            [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        ensure!(said.contains("?[2J") && !evil(&said), "{words:?}: {said:?}");
        ensure!(said.lines().all(|line| !line.starts_with("name")), "{words:?}: {said:?}");
    }
    let json: Snapshot = serde_json::from_str(&told(directory.path(), &["status", "hostile", "--json"])?)?;
    ensure!(json.name == hostile.name, "{json:?}");
    Ok(())
}

/// `/run/drowse` belongs to a user who is not root: what root reads there is a file of moderate size, or nothing.
#[tokio::test]
async fn what_is_no_file_in_the_directory_is_not_read() -> Result<()> {
    let runtime = tempfile::tempdir()?;
    let directory = runtime.path().join("drowse");
    std::fs::create_dir(&directory)?;
    let bus = PrivateBus::start()?;
    let active = FakeUnit { active: "active", ..FakeUnit::default() };
    let _systemd = FakeSystemd::start(&bus, "drowse@ring1-sleeper.socket", active).await?;
    let today = async || {
        let mut command = tokio::process::Command::new(drowse_binary()?);
        command.args(["status", "ring1-sleeper", "--json"]).env_remove(RUNTIME_DIR).kill_on_drop(true);
        command
            .env("XDG_RUNTIME_DIR", runtime.path())
            .env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent");
        command.env("DBUS_SESSION_BUS_ADDRESS", bus.address());
        let output = tokio::time::timeout(SOON, command.output()).await.context("status hangs")??;
        ensure!(output.status.success(), "{output:?}");
        let one: Snapshot = serde_json::from_slice(&output.stdout)?;
        ensure!(one.source == Source::Systemd, "{one:?}");
        anyhow::Ok(one.today)
    };
    let file = directory.join("ring1-sleeper.json");
    let json = serde_json::to_string(&Remembered { counted_since_s: 1, ..Remembered::default() })?;
    std::fs::write(&file, &json)?;
    ensure!(today().await?.is_some(), "a file is read");
    std::fs::write(&file, json.clone() + &" ".repeat(1 << 20))?;
    ensure!(today().await?.is_some(), "of a long file the beginning is read");

    std::fs::rename(&file, directory.join("elsewhere"))?;
    for target in [directory.join("elsewhere"), "/dev/zero".into()] {
        std::os::unix::fs::symlink(target, &file)?;
        ensure!(today().await?.is_none(), "a link is followed");
        std::fs::remove_file(&file)?;
    }
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &file, rustix::fs::FileType::Fifo, mode, 0)?;
    ensure!(today().await?.is_none());
    Ok(())
}

/// Nor does it write where a link of somebody else's points.
#[tokio::test]
async fn no_link_in_the_directory_is_followed_by_a_write() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let target = directory.path().join("target");
    std::fs::write(&target, "mine")?;
    std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o644))?;
    let link = |name: &str| std::os::unix::fs::symlink(&target, directory.path().join(name));
    let own = format!(".{}", std::process::id());
    let control = Control::open(Some(directory.path()), "echo")?;
    let remembered = Remembered { activations: 7, ..Remembered::default() };
    link(&own)?;
    link("echo.json")?;
    control.remember(&remembered);
    ensure!(control.remembered() == Some(remembered));
    let mode = |path: &Path| anyhow::Ok(std::fs::symlink_metadata(path)?.permissions().mode() & 0o777);
    ensure!(mode(&directory.path().join("echo.json"))? == 0o600);
    ensure!(std::fs::read_to_string(&target)? == "mine" && mode(&target)? == 0o644);
    drop(control);
    let mut left: Vec<_> =
        std::fs::read_dir(directory.path())?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
    left.sort();
    ensure!(left == [&own, "echo.json", "target"], "{left:?}");
    Ok(())
}

/// The state of the hand-off is part of the answer from the first moment.
#[test]
fn hand_off_is_off_while_drowse_takes_every_connection() -> Result<()> {
    let drowse = run(&[], &[])?;
    let handoff = snapshot(&drowse)?.plane.handoff;
    ensure!(handoff.state == HandoffState::Off && handoff.listeners.len() == 1, "{handoff:?}");
    Ok(())
}
