//! Ring 1: the real program with a command as its backend, from the first client to sleep and on to the exit.
#![expect(clippy::unwrap_used, reason = "fixtures fail as tests do")]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drowse_tests::deadline::{eventually, pause};
use drowse_tests::drowse_binary;
use drowse_tests::process::{Drowse, SOON, backend, connect, connect_to, echo, one_request, public};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, test_kill_process};
use socket2::SockRef;

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");

/// `drowse run` in front of an echo backend.
fn run(options: &[&str], backend_options: &[&str]) -> Result<Drowse> {
    let (public, backend) = (public(), backend());
    let addresses = ["--listen", &public, "--backend", &backend, "--log-level", "debug"];
    let command = ["--", ECHO, &backend];
    Drowse::run(&[&addresses, options, &command, backend_options].concat())
}

fn is_alive(pid: i32) -> bool {
    test_kill_process(Pid::from_raw(pid).unwrap()).is_ok()
}

/// SIGKILL for the one child of drowse.
fn kill_the_backend(drowse: &Drowse) -> Result<()> {
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", drowse.id()))?;
    let child: i32 = children.trim().parse().context("one child")?;
    rustix::process::kill_process(Pid::from_raw(child).context("a pid")?, Signal::KILL)?;
    Ok(())
}

#[test]
fn a_backend_wakes_serves_sleeps_and_wakes_again() -> Result<()> {
    let mut drowse = run(&["--idle-time", "100ms"], &[])?;
    for round in 0..3 {
        one_request(format!("round {round}").as_bytes())?;
        drowse.wait_for_line("is awake after")?;
        drowse.wait_for_line("is asleep")?;
        ensure!(connect_to(&backend()).is_err(), "asleep is shown while the backend still listens");
    }
    Ok(())
}

#[test]
fn many_clients_wait_through_one_start_with_what_they_sent() -> Result<()> {
    let mut drowse = run(&[], &["--delay-ms", "400"])?;
    let clients: Vec<_> = (0..64)
        .map(|number| {
            let mut client = connect()?;
            let request = format!("client {number}: ").repeat(1 + number * 7).into_bytes();
            client.write_all(&request)?;
            Ok((client, request))
        })
        .collect::<Result<_>>()?;
    for (mut client, request) in clients {
        client.shutdown(Shutdown::Write)?;
        let mut reply = Vec::new();
        client.read_to_end(&mut reply)?;
        ensure!(reply == request, "{} bytes sent, {} came back", request.len(), reply.len());
    }
    let starts = drowse.all_output().iter().filter(|line| line.contains("StartBackend")).count();
    ensure!(starts == 1, "{starts} starts for one wake-up");
    Ok(())
}

#[test]
fn a_held_client_that_half_closes_gets_its_whole_reply() -> Result<()> {
    let _drowse = run(&[], &["--delay-ms", "200", "--behaviour", "reply-after-fin"])?;
    let mut client = connect()?;
    client.write_all(b"all I have to say")?;
    client.shutdown(Shutdown::Write)?;
    let mut reply = String::new();
    client.read_to_string(&mut reply)?;
    ensure!(reply == "all I have to say", "{reply}");
    Ok(())
}

#[test]
fn a_backend_that_speaks_first_is_heard() -> Result<()> {
    let _drowse = run(&[], &["--behaviour", "banner"])?;
    let mut greeting = [0; 8];
    connect()?.read_exact(&mut greeting)?;
    ensure!(&greeting == b"welcome\n", "{}", greeting.escape_ascii());
    Ok(())
}

#[test]
fn a_client_that_leaves_while_it_waits_is_forgotten() -> Result<()> {
    let mut drowse = run(&["--idle-time", "50ms"], &["--delay-ms", "300"])?;
    let client = connect()?;
    drowse.wait_for_line("waking echo-backend")?;
    SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
    drop(client);
    let awake = drowse.wait_for_line("is awake after")?;
    ensure!(awake.contains("nobody waits any more"), "{awake}");
    drowse.wait_for_line("is asleep")?;
    Ok(())
}

#[test]
fn exactly_so_many_connections_are_served_and_the_rest_wait() -> Result<()> {
    let mut drowse = run(&["--connections-max", "3"], &[])?;
    let mut served = Vec::new();
    for number in 0..3_u8 {
        let mut client = connect()?;
        echo(&mut client, &[number])?;
        served.push(client);
    }
    let mut fourth = connect()?;
    fourth.write_all(b"4")?;
    fourth.set_read_timeout(Some(Duration::from_millis(300)))?;
    let early = fourth.read(&mut [0]);
    ensure!(early.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "{early:?}");
    drop(served.pop());
    fourth.set_read_timeout(Some(SOON))?;
    fourth.read_exact(&mut [0])?;
    drowse.wait_for_notification("3 flows")?;
    Ok(())
}

#[test]
fn an_open_flow_keeps_the_backend_awake_under_connections() -> Result<()> {
    let mut drowse = run(&["--idle-time", "50ms"], &[])?;
    let mut client = connect()?;
    echo(&mut client, b"a")?;
    pause(Duration::from_millis(300));
    echo(&mut client, b"b")?;
    ensure!(!drowse.all_output().iter().any(|line| line.contains("idle")), "it went to sleep on a client");
    drop(client);
    drowse.wait_for_line("is asleep")?;
    Ok(())
}

#[test]
fn a_silent_flow_is_closed_fin_first_under_traffic() -> Result<()> {
    let mut drowse = run(&["--idle-time", "200ms", "--idle-policy", "traffic"], &[])?;
    let mut client = connect()?;
    echo(&mut client, b"a")?;
    let end = client.read(&mut [0]).context("a silent flow ends with a FIN, not with a reset")?;
    ensure!(end == 0, "a byte from nowhere");
    drowse.wait_for_line("is asleep")?;
    Ok(())
}

#[test]
fn a_flow_that_moves_bytes_keeps_the_backend_awake_under_traffic() -> Result<()> {
    let mut drowse = run(&["--idle-time", "300ms", "--idle-policy", "traffic"], &[])?;
    let mut client = connect()?;
    for round in 0..12_u8 {
        echo(&mut client, &[round])?;
        pause(Duration::from_millis(50));
    }
    ensure!(!drowse.all_output().iter().any(|line| line.contains("stopping")), "it was stopped in use");
    Ok(())
}

#[test]
fn the_busy_command_vetoes_and_one_that_fails_counts_as_busy() -> Result<()> {
    let veto = std::env::temp_dir().join(format!("drowse-veto-{}", std::process::id()));
    std::fs::write(&veto, "")?;
    let command = format!(
        "case $(cat {0}; test -e {0} && echo there) in *broken*) exit 7;; *there*) exit 0;; *) exit 1;; esac",
        veto.display()
    );
    let mut drowse = run(&["--idle-time", "100ms", "--busy-command", &command], &[])?;
    one_request(b"a")?;
    drowse.wait_for_line("is in use after all")?;
    std::fs::write(&veto, "broken")?;
    drowse.wait_for_line("counts as busy")?;
    ensure!(connect_to(&backend()).is_ok(), "stopped in spite of the veto");
    std::fs::remove_file(&veto)?;
    drowse.wait_for_line("is asleep")?;
    Ok(())
}

#[test]
fn a_busy_command_that_hangs_is_ended_with_all_its_processes() -> Result<()> {
    let command = "sleep 1000 & echo pid $!; wait";
    let mut drowse = run(&["--idle-time", "50ms", "--busy-command", command], &[])?;
    one_request(b"a")?;
    let pid: i32 = drowse.wait_for_line("pid ")?.rsplit(' ').next().context("a pid")?.parse()?;
    drowse.signal(Signal::TERM)?;
    ensure!(drowse.wait_for_exit()?.success());
    eventually("its end", SOON, || Ok((!is_alive(pid)).then_some(())))
}

#[test]
fn idle_action_none_never_stops_the_backend() -> Result<()> {
    let mut drowse = run(&["--idle-time", "10ms", "--idle-action", "none"], &[])?;
    one_request(b"a")?;
    pause(Duration::from_millis(200));
    ensure!(connect_to(&backend()).is_ok(), "the backend is gone");
    drowse.wait_for_notification("never put to sleep")?;
    Ok(())
}

#[test]
fn drowse_exits_when_idle_even_if_nobody_ever_came() -> Result<()> {
    let mut drowse = run(&["--exit-idle-time", "100ms"], &[])?;
    ensure!(drowse.wait_for_exit()?.success());
    Ok(())
}

#[test]
fn drowse_exits_after_the_backend_went_to_sleep() -> Result<()> {
    let mut drowse = run(&["--idle-time", "50ms", "--exit-idle-time", "100ms"], &[])?;
    one_request(b"a")?;
    ensure!(drowse.wait_for_exit()?.success());
    ensure!(connect_to(&backend()).is_err(), "it left the backend behind");
    Ok(())
}

/// A client that meets the exit is served, or it is not let in; never let in and dropped.
#[test]
fn nobody_is_lost_at_the_exit() -> Result<()> {
    let address = public().parse()?;
    for round in 0..20_u64 {
        let mut drowse = run(&["--idle-time", "10ms", "--exit-idle-time", "20ms"], &[])?;
        let mut served = 0;
        eventually("the exit", SOON, || {
            if let Ok(mut client) = TcpStream::connect_timeout(&address, Duration::from_millis(50)) {
                client.set_read_timeout(Some(SOON))?;
                echo(&mut client, b"am I in time?")
                    .with_context(|| format!("client {served} of round {round}"))?;
                drop(client);
                served += 1;
                pause(Duration::from_micros(18_000 + 5_000 * ((7 * served + round) % 37)));
            }
            Ok(drowse.has_exited()?.then_some(()))
        })
        .with_context(|| drowse.all_output().join("\n"))?;
        ensure!(drowse.wait_for_exit()?.success());
    }
    Ok(())
}

#[test]
fn a_stop_request_lets_open_flows_end_and_takes_the_backend_along() -> Result<()> {
    let mut drowse = run(&[], &[])?;
    let mut client = connect()?;
    echo(&mut client, b"before")?;
    drowse.signal(Signal::TERM)?;
    drowse.wait_for_line("letting open connections end")?;
    eventually("the listener to close", SOON, || Ok(connect().is_err().then_some(())))?;
    echo(&mut client, b"after")?;
    drop(client);
    ensure!(drowse.wait_for_exit()?.success());
    ensure!(connect_to(&backend()).is_err(), "it left the backend behind");
    Ok(())
}

/// Nothing but its own deadlines wakes it then.
#[test]
fn a_stop_without_a_service_manager_is_no_slower() -> Result<()> {
    let (public, backend) = (public(), backend());
    let mut command = Command::new("env");
    command.args(["-u", "NOTIFY_SOCKET"]).arg(drowse_binary()?).args(["run", "--drain-time", "1min"]);
    command.args(["--listen", &public, "--backend", &backend, "--", ECHO, &backend]);
    let mut drowse = Drowse::spawn(&mut command)?;
    drowse.wait_for_line("asleep")?;
    one_request(b"wake up")?;
    drowse.signal(Signal::TERM)?;
    ensure!(drowse.wait_for_exit()?.success());
    Ok(())
}

#[test]
fn the_drain_time_bounds_a_stop() -> Result<()> {
    let mut drowse = run(&["--drain-time", "200ms"], &[])?;
    let mut client = connect()?;
    echo(&mut client, b"a")?;
    drowse.signal(Signal::TERM)?;
    ensure!(drowse.wait_for_exit()?.success());
    let end = client.read(&mut [0]);
    ensure!(end.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "{end:?}");
    Ok(())
}

#[test]
fn a_killed_drowse_takes_the_backend_along() -> Result<()> {
    let drowse = run(&[], &[])?;
    one_request(b"a")?;
    drowse.signal(Signal::KILL)?;
    eventually("the backend's end", SOON, || Ok(connect_to(&backend()).is_err().then_some(())))
}

#[test]
fn a_killed_backend_is_woken_again_by_the_next_client() -> Result<()> {
    let mut drowse = run(&[], &[])?;
    let mut client = connect()?;
    echo(&mut client, b"a")?;
    kill_the_backend(&drowse)?;
    let end = client.read(&mut [0]);
    ensure!(matches!(end, Ok(0)) || end.is_err(), "the flow outlived its backend");
    drowse.wait_for_line("was ended by signal 9")?;
    one_request(b"b")
}

#[test]
fn a_start_that_fails_resets_the_client_and_the_next_try_works() -> Result<()> {
    let marker = std::env::temp_dir().join(format!("drowse-fails-once-{}", std::process::id()));
    let (public, backend) = (public(), backend());
    let script = format!(
        "if test -e {0}; then rm {0}; exec {ECHO} {backend}; fi; touch {0}; exit 3",
        marker.display()
    );
    let mut drowse =
        Drowse::run(&["--listen", &public, "--backend", &backend, "--", "/bin/sh", "-c", &script])?;
    let mut first = connect()?;
    let end = first.read(&mut [0]);
    ensure!(end.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "{end:?}");
    drowse.wait_for_line("sh: sh exited with status 3 (result exit-code)")?;
    one_request(b"again")?;
    ensure!(!marker.exists());
    Ok(())
}

#[test]
fn a_backend_that_never_listens_is_given_up_and_ended() -> Result<()> {
    let (public, backend) = (public(), backend());
    let mut drowse = Drowse::run(&[
        "--listen",
        &public,
        "--backend",
        &backend,
        "--start-timeout",
        "300ms",
        "--",
        "/bin/sh",
        "-c",
        "echo pid $$; exec sleep 1000",
    ])?;
    let mut client = connect()?;
    let end = client.read(&mut [0]);
    ensure!(end.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "{end:?}");
    let pid: i32 = drowse.wait_for_line("[sh] pid ")?.rsplit(' ').next().context("a pid")?.parse()?;
    let why = drowse.wait_for_line("did not accept a connection within 300ms")?;
    ensure!(why.contains("refused"), "{why}");
    eventually("the end of the backend", SOON, || Ok((!is_alive(pid)).then_some(())))
}

#[test]
fn a_backend_that_was_given_up_and_not_stopped_is_used_when_it_listens_at_last() -> Result<()> {
    let mut drowse = run(&["--idle-action", "none", "--start-timeout", "100ms"], &["--delay-ms", "500"])?;
    let end = connect()?.read(&mut [0]);
    ensure!(end.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "{end:?}");
    drowse.wait_for_line("did not accept a connection within 100ms")?;
    eventually("the backend to listen", SOON, || Ok(connect_to(&backend()).ok()))?;
    one_request(b"late but there")
}

#[test]
fn a_backend_that_ignores_the_stop_is_killed_with_its_whole_group() -> Result<()> {
    let (public, backend) = (public(), backend());
    let script = format!("trap '' TERM; sleep 1000 & echo pid $!; {ECHO} {backend}");
    let mut drowse = Drowse::run(&[
        "--listen",
        &public,
        "--backend",
        &backend,
        "--stop-timeout",
        "200ms",
        "--idle-time",
        "50ms",
        "--",
        "/bin/sh",
        "-c",
        &script,
    ])?;
    one_request(b"a")?;
    let pid: i32 = drowse.wait_for_line("[sh] pid ")?.rsplit(' ').next().context("a pid")?.parse()?;
    drowse.wait_for_line("is asleep")?;
    ensure!(!is_alive(pid), "asleep is shown while a process of the group is left");
    Ok(())
}

#[test]
fn output_that_nobody_reads_stops_nobody_but_the_backend() -> Result<()> {
    let (_unread, output) = std::io::pipe()?;
    let redirect = format!("exec \"$@\" >/proc/{}/fd/{}", std::process::id(), output.as_raw_fd());
    let script = format!("while :; do echo {}; done & exec {ECHO} {}", "y".repeat(200), backend());
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &redirect, "sh"]).arg(drowse_binary()?);
    command.args(["run", "--listen", &public(), "--backend", &backend(), "--", "/bin/sh", "-c", &script]);
    let mut drowse = Drowse::spawn(&mut command)?;
    drowse.wait_for_notification("READY=1")?;
    one_request(b"first")?;
    eventually("the pipe to be full", SOON, || {
        let mut room = [PollFd::new(&output, PollFlags::OUT)];
        Ok((poll(&mut room, Some(&Timespec::default()))? == 0).then_some(()))
    })?;
    one_request(b"second")?;
    drowse.signal(Signal::TERM)?;
    ensure!(drowse.wait_for_exit()?.success());
    Ok(())
}

#[test]
fn the_status_is_told_in_plain_words() -> Result<()> {
    let mut drowse = run(&["--idle-time", "500ms"], &["--delay-ms", "100"])?;
    drop(connect()?);
    drowse.wait_for_notification("STATUS=waking echo-backend (0.0 s), 1 client waits")?;
    drowse.wait_for_notification("STATUS=awake: ")?;
    drowse.wait_for_notification("STATUS=asleep: the next connection wakes echo-backend")?;
    drowse.signal(Signal::TERM)?;
    drowse.wait_for_notification("STOPPING=1")?;
    Ok(())
}

#[test]
fn a_reload_is_announced_and_ends_the_pause_after_failures() -> Result<()> {
    let (public, backend) = (public(), backend());
    let marker = std::env::temp_dir().join(format!("drowse-mended-{}", std::process::id()));
    let script = format!("test -e {} && exec {ECHO} {backend}; exit 3", marker.display());
    let mut drowse =
        Drowse::run(&["--listen", &public, "--backend", &backend, "--", "/bin/sh", "-c", &script])?;
    // Pauses of 0.25, 0.5, 1, 2 and then 4 s.
    for _ in 0..5 {
        ensure!(connect()?.read(&mut [0]).is_err(), "somebody was served");
    }
    std::fs::write(&marker, "")?;
    let mut client = connect()?;
    drowse.signal(Signal::HUP)?;
    drowse.wait_for_notification("RELOADING=1\nMONOTONIC_USEC=")?;
    drowse.wait_for_notification("READY=1")?;
    client.set_read_timeout(Some(Duration::from_secs(2)))?;
    echo(&mut client, b"at once")?;
    std::fs::remove_file(&marker)?;
    Ok(())
}

#[test]
fn a_client_that_outlives_a_dead_backend_keeps_nothing_awake() -> Result<()> {
    let mut drowse = run(&["--idle-time", "100ms"], &[])?;
    let mut client = connect()?;
    echo(&mut client, b"a")?;
    kill_the_backend(&drowse)?;
    ensure!(client.read(&mut [0])? == 0, "the backend had nothing unread, so its end is a FIN");
    drowse.wait_for_line("was ended by signal 9")?;
    // The first client never closes its half.
    one_request(b"b")?;
    drowse.wait_for_line("is asleep")?;
    Ok(())
}

#[test]
fn a_second_stop_request_waits_for_nobody() -> Result<()> {
    let mut drowse = run(&["--drain-time", "infinity"], &[])?;
    let mut client = connect()?;
    echo(&mut client, b"a")?;
    drowse.signal(Signal::INT)?;
    drowse.wait_for_line("letting open connections end")?;
    drowse.signal(Signal::TERM)?;
    ensure!(drowse.wait_for_exit()?.success());
    Ok(())
}
