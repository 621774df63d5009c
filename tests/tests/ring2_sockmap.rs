//! Ring 2: flows that the kernel moves, seen from outside: status, maps, the idle decision, privileges, a killed drowse.
//! Needs root and the eBPF object. What the plane does to bytes is in `ring2_planes`.
//!
//! Each test has its own network namespace and BPF file system, and the real program in them.
#![expect(clippy::indexing_slicing, reason = "a field that JSON does not have is null")]

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, channel};
use std::thread::spawn;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use drowse::accounting::Accounting;
use drowse::admission::Seat;
use drowse::clock::{self, Monotonic};
use drowse::ebpf::{Object, layout};
use drowse::plane::forward::{Forward, Mode};
use drowse::plane::sockmap::Sockmap;
use drowse::plane::{Flow, Plane as _};
use drowse_ebpf::Proxied;
use drowse_tests::deadline::{eventually, pause};
use drowse_tests::drowse_binary;
use drowse_tests::isolated::isolated;
use drowse_tests::pinned::{
    bpftool, dump, entries_held_by, held_by, maps_held_by, steering_links, wait_until_gone,
};
use drowse_tests::process::{Drowse, RUNTIME_DIR, SOON, connect_to, echo};
use drowse_tests::whoami::{Backend, handed_off};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::process::Signal;
use rustix::time::Timespec;
use serde_json::Value;

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");
const NAME: &str = "test.service";
const PUBLIC: &str = "127.0.0.1:8080";
const BACKEND: &str = "127.0.0.1:8081";
/// A killed drowse has ended each of its flows by then.
const HEARD_WITHIN: Duration = Duration::from_secs(1);
/// Longer than anything takes that is not measured, on a machine that has much else to do.
const LONG: Duration = Duration::from_mins(1);
/// Bytes of a request, and of an answer.
const MESSAGE: usize = 64;
/// The pins that stay when drowse is killed, for the next one to replace or take up.
const PINNED: [&str; 9] =
    ["PORTS", "LISTENS", "PUBLIC", "DIRECTIONS", "TAKEN", "PROXIED", "MARKS", "FLOWS", "SERVICE"];

/// What all have.
const ADDRESSES: [&str; 7] = ["run", "--listen", PUBLIC, "--backend", BACKEND, "--name", NAME];

/// drowse with an echoing backend that it starts and stops.
fn with_command(options: &[&str]) -> Result<Drowse> {
    Drowse::run(&[&ADDRESSES[1..], options, &["--", ECHO, BACKEND]].concat())
}

/// drowse in front of a backend of the test's own.
fn in_front(options: &[&str]) -> Result<Drowse> {
    Drowse::run(&[&ADDRESSES[1..], options].concat())
}

/// drowse with these capabilities alone, after `words` of setpriv(1).
fn confined(words: &[&str], options: &[&str]) -> Result<Drowse> {
    let mut command = Command::new("setpriv");
    command.args(words).arg(drowse_binary()?).args(ADDRESSES).args(options);
    Drowse::spawn(&mut command)
}

fn told(drowse: &Drowse, words: &[&str]) -> Result<String> {
    let mut command = Command::new(drowse_binary()?);
    let output = command.args(words).env(RUNTIME_DIR, drowse.runtime_dir()).output()?;
    ensure!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn shown(drowse: &Drowse) -> Result<Value> {
    let text = told(drowse, &["status", NAME, "--json"])?;
    serde_json::from_str(&text).context("read what status shows")
}

/// A number that status shows, 0 where it shows none.
fn number(status: &Value, pointer: &str) -> u64 {
    status.pointer(pointer).and_then(Value::as_u64).unwrap_or(0)
}

/// Waits until the plane is `plane`.
fn wait_for_plane(drowse: &Drowse, plane: &str) -> Result<Value> {
    let mut last = Value::Null;
    eventually(&format!("the plane {plane}"), SOON, || {
        last = shown(drowse)?;
        Ok((last["plane"]["forward"] == plane).then(|| last.clone()))
    })
    .with_context(|| format!("status: {last:#}"))
}

/// A flow whose bytes the kernel moves both ways, once drowse has begun with that.
fn redirected(drowse: &Drowse) -> Result<TcpStream> {
    wait_for_plane(drowse, "sockmap")?;
    let mut client = connect_to(PUBLIC)?;
    eventually("a flow that the kernel moves", SOON, || {
        let before = shown(drowse)?;
        echo(&mut client, b"is it you")?;
        let after = shown(drowse)?;
        let grown = |field: &str| {
            let pointer = format!("/counters/redirected/{field}");
            number(&after, &pointer) - number(&before, &pointer)
        };
        Ok((grown("redirected_to_backend") == 9 && grown("redirected_to_client") == 9).then_some(()))
    })?;
    Ok(client)
}

/// The names of the programs that a process holds.
fn programs_of(pid: u32) -> Result<Vec<Value>> {
    let programs = held_by(pid)?.into_iter().filter(|(kind, _)| *kind == "prog");
    programs.map(|(_, id)| Ok(bpftool(&["prog", "show", "id", &id.to_string()])?["name"].clone())).collect()
}

/// The ids of the pinned maps.
fn pinned_maps() -> Result<BTreeSet<u64>> {
    let ids = PINNED.map(|map| {
        let shown = bpftool(&["map", "show", "pinned", &format!("/sys/fs/bpf/drowse/test_service/{map}")])?;
        shown["id"].as_u64().with_context(|| format!("no id in {shown}"))
    });
    ids.into_iter().collect()
}

fn wait_until_maps_are_gone(ids: &BTreeSet<u64>) -> Result<()> {
    ensure!(!ids.is_empty(), "nothing was there to begin with");
    for id in ids {
        eventually(&format!("map {id} to go"), SOON, || {
            Ok(bpftool(&["map", "show", "id", &id.to_string()]).is_err().then_some(()))
        })?;
    }
    Ok(())
}

/// The state does not become `asleep` within `time`, in which `meanwhile` is done again and again.
fn stays_awake(drowse: &Drowse, time: Duration, mut meanwhile: impl FnMut() -> Result<()>) -> Result<()> {
    let until = clock::now() + time;
    while clock::now() < until {
        meanwhile()?;
        let status = shown(drowse)?;
        ensure!(status["state"] == "awake", "{status:#}");
        pause(Duration::from_millis(100));
    }
    Ok(())
}

fn wait_until_asleep(drowse: &Drowse) -> Result<()> {
    eventually("sleep", SOON, || Ok((shown(drowse)?["state"] == "asleep").then_some(())))
}

#[test]
fn status_says_what_the_kernel_moves_as_the_map_does() -> Result<()> {
    isolated(|| {
        let mut drowse = with_command(&["--plane", "sockmap"])?;
        drowse.wait_for_line_with(&["in front of", "plane sockmap where possible, else splice"])?;
        let asleep = shown(&drowse)?;
        ensure!(asleep["plane"]["forward"] == "splice", "{asleep:#}");
        let reason = asleep["plane"]["reason"].as_str().unwrap_or_default();
        ensure!(reason.starts_with("sockmap once the backend"), "{asleep:#}");
        connect_to(PUBLIC)?;
        drowse.wait_for_line("the kernel moves the bytes of flows")?;
        let _open = redirected(&drowse)?;
        let status = eventually("the first flow to end", SOON, || {
            let status = shown(&drowse)?;
            Ok((number(&status, "/flows/proxied/open") == 1).then_some(status))
        })?;
        ensure!(status["plane"]["reason"].is_null(), "{status:#}");
        ensure!(steering_links()?.is_empty(), "--plane sockmap hands nothing off");

        let entries = dump(NAME, "PROXIED")?;
        let [entry] = entries.as_slice() else { bail!("not one entry: {entries:?}") };
        let fields = entry.pointer("/formatted/value").and_then(Value::as_object).context("named fields")?;
        for (field, value) in fields.iter().filter(|(field, _)| *field != "last_activity_ns") {
            let shown = number(&status, &format!("/counters/redirected/{field}"));
            ensure!(value.as_u64() == Some(shown), "{field}: {value} in the map, {status:#}");
        }
        let [open, bytes] = ["flows_open", "redirected_to_client"]
            .map(|field| number(&status, &format!("/counters/redirected/{field}")));
        ensure!(open >= 1 && bytes >= 9, "{status:#}");
        ensure!(dump(NAME, "DIRECTIONS")?.len() as u64 == 2 * open, "two directions of each of {open} flows");
        let text = told(&drowse, &["status", NAME])?;
        ensure!(text.contains("of these moved by the kernel: 1 open"), "{text}");
        ensure!(text.contains("plane        sockmap; hand-off is off"), "{text}");
        Ok(())
    })
}

#[test]
fn redirected_traffic_keeps_awake_and_silence_does_not() -> Result<()> {
    isolated(|| {
        let options = ["--plane", "sockmap", "--idle-policy", "traffic", "--idle-time", "1s"];
        let drowse = with_command(&options)?;
        drop(connect_to(PUBLIC)?);
        let mut client = redirected(&drowse)?;
        let before = number(&shown(&drowse)?, "/counters/redirected/redirected_to_backend");
        let mut requests = 0;
        stays_awake(&drowse, Duration::from_secs(3), || {
            requests += 1;
            echo(&mut client, b"123456789")
        })?;
        let after = number(&shown(&drowse)?, "/counters/redirected/redirected_to_backend");
        ensure!(after - before == 9 * requests, "{requests} requests, {before} and {after} redirected");
        wait_until_asleep(&drowse)?;
        let end = client.read(&mut [0]);
        ensure!(matches!(end, Ok(0)) || end.is_err(), "the silent flow is closed: {end:?}");
        echo(&mut connect_to(PUBLIC)?, b"awake again")
    })
}

#[test]
fn an_open_redirected_flow_keeps_awake_under_connections() -> Result<()> {
    isolated(|| {
        let drowse = with_command(&["--plane", "sockmap", "--idle-time", "500ms"])?;
        let first = connect_to(PUBLIC)?;
        let mut client = redirected(&drowse)?;
        drop(first);
        stays_awake(&drowse, Duration::from_secs(2), || Ok(()))?;
        echo(&mut client, b"still there")?;
        drop(client);
        wait_until_asleep(&drowse)
    })
}

/// Also for a user who is not root.
#[test]
fn three_capabilities_are_enough_for_whoever_has_them() -> Result<()> {
    isolated(|| {
        let _backend = Backend::on(TcpListener::bind(BACKEND)?, |stream| drop(answer(stream)))?;
        // Somebody else may neither run what is in our target directory, nor write where the test's sockets are.
        let place = tempfile::Builder::new().permissions(permissions(0o755)).tempdir()?;
        let program = place.path().join("drowse");
        std::fs::copy(drowse_binary()?, &program)?;
        let runtime = place.path().join("run");
        std::fs::create_dir(&runtime)?;
        std::os::unix::fs::chown(&runtime, Some(65534), Some(65534))?;
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--inh-caps=-all,+bpf,+net_admin,+perfmon",
            "--ambient-caps=-all,+bpf,+net_admin,+perfmon",
            "--bounding-set=-all,+bpf,+net_admin,+perfmon",
        ]);
        command.arg(&program).args(ADDRESSES).args(["--plane", "sockmap"]).env(RUNTIME_DIR, &runtime);
        let mut drowse = Drowse::spawn(&mut command)?;
        drowse.wait_for_line("the kernel moves the bytes of flows")?;
        let uid = std::fs::read_to_string(format!("/proc/{}/status", drowse.id()))?;
        ensure!(uid.contains("\nUid:\t65534\t65534\t65534\t65534\n"), "{uid}");
        let before = directions_of(drowse.id())?;
        let mut client = connect_to(PUBLIC)?;
        eventually("a flow that the kernel moves", SOON, || {
            echo(&mut client, b"as nobody")?;
            Ok((directions_of(drowse.id())? == before + 2).then_some(()))
        })?;
        let lines = drowse.all_output().join("\n");
        ensure!(!lines.contains("by splice"), "{lines}");
        Ok(())
    })
}

/// The entries of the map of directions that a process holds, which need not be pinned.
fn directions_of(pid: u32) -> Result<usize> {
    let entries = entries_held_by(pid, |name| name == "DIRECTIONS")?;
    entries.into_values().next().context("it holds no such map")
}

fn permissions(mode: u32) -> std::fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(mode)
}

/// An echo.
fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            count => stream.write_all(buffer.get(..count).unwrap_or_default())?,
        }
    }
}

#[test]
fn without_cap_perfmon_flows_are_spliced_and_connections_still_handed_off() -> Result<()> {
    isolated(|| {
        let _backend = Backend::at(BACKEND)?;
        let words = ["--inh-caps=-all", "--bounding-set=-all,+bpf,+net_admin"];
        let mut drowse = confined(&words, &[])?;
        let told = drowse.wait_for_line("flows that come to drowse are moved by splice, not by sockmap")?;
        ensure!(told.contains("CAP_PERFMON") && told.contains("AmbientCapabilities="), "{told}");
        handed_off(PUBLIC)?.end()?;
        let status = shown(&drowse)?;
        ensure!(status["plane"]["forward"] == "splice", "{status:#}");
        let reason = status["plane"]["reason"].as_str().unwrap_or_default();
        ensure!(reason.contains("no sockmap: ") && reason.contains("CAP_PERFMON"), "{status:#}");
        let text = told_once(&drowse, &["status", NAME])?;
        ensure!(text.contains("splice (no sockmap: sockmap needs CAP_PERFMON"), "{text}");
        let lines = drowse.all_output();
        let said = lines.iter().filter(|line| line.contains("CAP_PERFMON")).count();
        ensure!(said == 1, "said {said} times:\n{}", lines.join("\n"));
        Ok(())
    })
}

/// What `told` says, without line breaks.
fn told_once(drowse: &Drowse, words: &[&str]) -> Result<String> {
    Ok(told(drowse, words)?.split_whitespace().collect::<Vec<_>>().join(" "))
}

#[test]
fn without_capabilities_drowse_says_so_once_and_splices() -> Result<()> {
    isolated(|| {
        let _backend = Backend::on(TcpListener::bind(BACKEND)?, |stream| drop(answer(stream)))?;
        let words = ["--inh-caps=-all", "--bounding-set=-all"];
        let mut drowse = confined(&words, &["--plane", "sockmap"])?;
        let told = drowse.wait_for_line("flows are moved by splice, not by sockmap")?;
        ensure!(told.contains("WARN") && told.contains("CAP_BPF"), "{told}");
        echo(&mut connect_to(PUBLIC)?, b"by splice")?;
        let status = shown(&drowse)?;
        ensure!(status["plane"]["forward"] == "splice", "{status:#}");
        ensure!(status["plane"]["reason"].as_str().is_some_and(|why| why.contains("CAP_BPF")), "{status:#}");
        let lines = drowse.all_output();
        let said = lines.iter().filter(|line| line.contains("not by sockmap")).count();
        ensure!(said == 1, "said {said} times:\n{}", lines.join("\n"));
        Ok(())
    })
}

#[test]
fn what_cannot_be_redirected_loads_nothing_for_it() -> Result<()> {
    isolated(|| {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("public").display().to_string();
        let words = ["--listen", &path, "--backend", BACKEND, "--name", NAME, "--plane", "sockmap"];
        let mut drowse = Drowse::run(&[&words[..], &["--", ECHO, BACKEND]].concat())?;
        let told = drowse.wait_for_line("not by sockmap")?;
        ensure!(told.contains("every listener is a unix socket"), "{told}");
        let mut client = std::os::unix::net::UnixStream::connect(&path)?;
        client.set_read_timeout(Some(SOON))?;
        client.write_all(b"hello")?;
        client.read_exact(&mut [0; 5])?;
        eventually("the other programs", SOON, || {
            let programs = programs_of(drowse.id())?;
            ensure!(programs.iter().all(|name| name != "redirect"), "{programs:?}");
            Ok(programs.iter().any(|name| name == "observe").then_some(()))
        })
    })
}

#[test]
fn check_tries_and_pins_nothing() -> Result<()> {
    isolated(|| {
        let check = |words: &[&str]| -> Result<(Value, Output)> {
            let mut command = Command::new("setpriv");
            command.args(words).arg(drowse_binary()?).args(["check", "--json"]);
            let output = command.env(RUNTIME_DIR, "/nowhere/at-all").output()?;
            let found: Value = serde_json::from_slice(&output.stdout)?;
            let planes = found["planes"].as_array().context("planes")?.iter();
            let sockmap = planes.clone().find(|plane| plane["subject"] == "sockmap");
            Ok((sockmap.context("no sockmap")?.clone(), output))
        };
        let (sockmap, output) = check(&[])?;
        ensure!(sockmap["answer"] == "yes" && output.status.success(), "{output:?}");
        let (sockmap, output) = check(&["--inh-caps=-all", "--bounding-set=-all,+bpf,+net_admin"])?;
        let reason = sockmap["reason"].as_str().unwrap_or_default();
        ensure!(sockmap["answer"] == "no" && reason.contains("CAP_PERFMON"), "{output:?}");
        let (sockmap, output) = check(&["--inh-caps=-all", "--bounding-set=-all"])?;
        let reason = sockmap["reason"].as_str().unwrap_or_default();
        ensure!(sockmap["answer"] == "no" && reason.contains("CAP_BPF"), "{output:?}");
        ensure!(!std::path::Path::new("/sys/fs/bpf/drowse").exists(), "check pinned something");
        Ok(())
    })
}

/// A backend whose connections come to the test itself.
fn connections_to_the_test() -> Result<(Backend, Receiver<TcpStream>)> {
    let (give, take) = channel();
    let backend = Backend::on(TcpListener::bind(BACKEND)?, move |stream| drop(give.send(stream)))?;
    Ok((backend, take))
}

/// Both ends of a flow.
fn both_ends(accepted: &Receiver<TcpStream>) -> Result<(TcpStream, TcpStream)> {
    let client = connect_to(PUBLIC)?;
    let backend = accepted.recv_timeout(SOON).context("wait for the backend's end")?;
    backend.set_read_timeout(Some(SOON))?;
    backend.set_write_timeout(Some(SOON))?;
    Ok((client, backend))
}

/// Both ends of a flow that the kernel moves, as one of `open`.
fn moved_by_the_kernel(
    drowse: &Drowse,
    accepted: &Receiver<TcpStream>,
    open: u64,
) -> Result<(TcpStream, TcpStream)> {
    let mut flow = both_ends(accepted)?;
    eventually("a flow that the kernel moves", SOON, || {
        // The kernel takes a direction over after some small bursts.
        (0..8).try_for_each(|_| exchange(&mut flow))?;
        Ok((number(&shown(drowse)?, "/counters/redirected/flows_open") == open).then_some(()))
    })?;
    Ok(flow)
}

/// Writes until the other side takes no more for a while.
fn fill(stream: &mut TcpStream) -> Result<()> {
    stream.set_write_timeout(Some(Duration::from_millis(300)))?;
    let full = loop {
        if let Err(error) = stream.write_all(&[7; 16 << 10]) {
            break error;
        }
    };
    ensure!(full.kind() == ErrorKind::WouldBlock, "not full: {full}");
    stream.set_write_timeout(Some(SOON)).context("bound the writes")
}

/// Reads all that is left, up to an end or a reset.
fn hear_the_end(stream: &mut TcpStream) -> Result<()> {
    loop {
        match stream.read(&mut [0; 16 << 10]) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error).context("wait for the end"),
        }
    }
}

/// At each end a reset or an end is heard, nothing of the killed one runs, and the next of its name works.
#[test]
fn a_killed_drowse_leaves_no_open_flow_and_nothing_that_works() -> Result<()> {
    isolated(|| {
        let (_backend, accepted) = connections_to_the_test()?;
        let mut killed = in_front(&["--plane", "sockmap"])?;
        wait_for_plane(&killed, "sockmap")?;
        let mut quiet = moved_by_the_kernel(&killed, &accepted, 1)?;
        let mut download = moved_by_the_kernel(&killed, &accepted, 2)?;
        fill(&mut download.1)?;
        let mut upload = moved_by_the_kernel(&killed, &accepted, 3)?;
        fill(&mut upload.0)?;
        let status = shown(&killed)?;
        for (field, least) in [
            ("flows_open", 3),
            ("passed_to_client", 1),
            ("passed_to_backend", 1),
            ("redirected_to_client", 5),
        ] {
            let counted = number(&status, &format!("/counters/redirected/{field}"));
            ensure!(counted >= least, "{field} is {counted}: {status:#}");
        }
        let (programs, maps) = (held_by(killed.id())?, maps_held_by(killed.id())?);
        ensure!(programs_of(killed.id())?.iter().any(|name| name == "redirect"), "no program redirects");
        let pinned = pinned_maps()?;
        ensure!(pinned.is_subset(&maps), "{pinned:?} of {maps:?}");

        killed.signal(Signal::KILL)?;
        let at = clock::now();
        killed.wait_for_exit()?;
        for (near, far) in [&mut quiet, &mut download, &mut upload].map(|(near, far)| (near, far)) {
            hear_the_end(near)?;
            hear_the_end(far)?;
        }
        let took = clock::now().saturating_sub(at);
        ensure!(took < HEARD_WITHIN, "all heard only after {took:?}");
        wait_until_gone(&programs)?;
        wait_until_maps_are_gone(&maps.difference(&pinned).copied().collect())?;
        ensure!(pinned_maps()? == pinned, "other maps are pinned than were");

        let next = in_front(&["--plane", "sockmap"])?;
        wait_for_plane(&next, "sockmap")?;
        // Its counters begin at zero.
        let _open = moved_by_the_kernel(&next, &accepted, 1)?;
        let taken_up: BTreeSet<u64> = pinned_maps()?.intersection(&pinned).copied().collect();
        ensure!(taken_up.len() <= 3, "only MARKS, FLOWS and SERVICE are taken up: {taken_up:?}");
        wait_until_maps_are_gone(&pinned.difference(&taken_up).copied().collect())
    })
}

/// Peers whose messages go straight to the other side are plain sockets again when drowse is killed.
#[test]
fn a_killed_drowse_leaves_no_peer_in_its_maps() -> Result<()> {
    isolated(|| {
        let (_backend, accepted) = connections_to_the_test()?;
        let mut killed = in_front(&["--plane", "sockmap-ends"])?;
        wait_for_plane(&killed, "sockmap-ends")?;
        let mut flow = both_ends(&accepted)?;
        eventually("peers that are let send straight on", SOON, || {
            exchange(&mut flow)?;
            Ok((number(&shown(&killed)?, "/counters/redirected/peers_total") == 2).then_some(()))
        })?;
        let (programs, maps) = (held_by(killed.id())?, maps_held_by(killed.id())?);
        let pinned = pinned_maps()?;
        killed.signal(Signal::KILL)?;
        let at = clock::now();
        killed.wait_for_exit()?;
        hear_the_end(&mut flow.0)?;
        hear_the_end(&mut flow.1)?;
        let took = clock::now().saturating_sub(at);
        ensure!(took < HEARD_WITHIN, "all heard only after {took:?}");
        drop(flow);
        wait_until_gone(&programs)?;
        wait_until_maps_are_gone(&maps.difference(&pinned).copied().collect())
    })
}

/// What the threads of [`Load`] do with its sockets, until these end.
type Work = fn(&TcpStream, &AtomicU64) -> Result<()>;

/// What a thread has to say: what it did, and when it heard of the end.
type Heard = (String, Result<Monotonic>);

/// Flows that are used without a pause by a thread for each direction of each end.
struct Load {
    /// The sockets of the clients and of the backend. They stay open when the threads have ended.
    sockets: Vec<(Arc<TcpStream>, Arc<TcpStream>)>,
    /// What each thread has moved or done so far.
    done: Vec<(String, Arc<AtomicU64>)>,
    heard: Receiver<Heard>,
}

impl Load {
    const FLOWS: usize = 8;

    /// Half of the flows carry bulk both ways at once, the others requests and answers.
    fn on(flows: Vec<(TcpStream, TcpStream)>) -> Self {
        let (tell, heard) = channel();
        let mut load = Self { sockets: Vec::new(), done: Vec::new(), heard };
        for (number, (client, backend)) in flows.into_iter().enumerate() {
            let (client, backend) = (Arc::new(client), Arc::new(backend));
            let bulk: [(&str, &Arc<TcpStream>, Work); 4] = [
                ("a writing client", &client, push),
                ("a reading client", &client, pull),
                ("a writing backend", &backend, push),
                ("a reading backend", &backend, pull),
            ];
            let requests: [(&str, &Arc<TcpStream>, Work); 2] =
                [("an asking client", &client, ask), ("an answering backend", &backend, reply)];
            for (what, stream, work) in if number % 2 == 0 { &bulk[..] } else { &requests[..] } {
                let (name, stream, work) = (format!("{what}, flow {number}"), Arc::clone(stream), *work);
                let done = Arc::new(AtomicU64::new(0));
                load.done.push((name.clone(), Arc::clone(&done)));
                let tell = tell.clone();
                spawn(move || {
                    let end = work(&stream, &done).map(|()| clock::now());
                    // Nobody waits for it when the test has failed.
                    let _ = tell.send((name, end));
                });
            }
            load.sockets.push((client, backend));
        }
        load
    }

    /// Waits until each thread has got on by `steps`.
    fn wait_for_steps(&self, steps: u64) -> Result<()> {
        let start: Vec<u64> = self.done.iter().map(|(_, done)| done.load(Relaxed)).collect();
        for ((name, done), start) in self.done.iter().zip(start) {
            eventually(&format!("{name} to get on"), LONG, || {
                Ok((done.load(Relaxed) - start >= steps).then_some(()))
            })?;
        }
        Ok(())
    }

    /// Waits until each thread has heard of the end, and tells when the last one did and who that was.
    fn wait_for_all(&self) -> Result<(Monotonic, String)> {
        let mut missing: BTreeSet<&str> = self.done.iter().map(|(name, _)| name.as_str()).collect();
        let mut last = (Monotonic::ZERO, String::new());
        while !missing.is_empty() {
            let told = self.heard.recv_timeout(LONG);
            let (name, at) = told.with_context(|| format!("these hang: {missing:?}"))?;
            let at = at.with_context(|| name.clone())?;
            missing.remove(name.as_str());
            last = last.max((at, name));
        }
        Ok(last)
    }
}

/// Whether a socket tells by this that its other side is gone.
fn is_end(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

/// Writes until the end, and counts the writes.
fn push(mut stream: &TcpStream, done: &AtomicU64) -> Result<()> {
    let bytes = vec![7; 64 << 10];
    loop {
        match stream.write(&bytes) {
            Ok(_) => done.fetch_add(1, Relaxed),
            Err(error) if is_end(&error) => return Ok(()),
            Err(error) => return Err(error).context("write"),
        };
    }
}

/// Reads until the end, and counts the reads.
fn pull(stream: &TcpStream, done: &AtomicU64) -> Result<()> {
    let mut buffer = vec![0; 64 << 10];
    while receive(stream, &mut buffer)? > 0 {
        done.fetch_add(1, Relaxed);
    }
    Ok(())
}

/// Asks and waits for the answer, until the end.
fn ask(mut stream: &TcpStream, done: &AtomicU64) -> Result<()> {
    loop {
        match stream.write_all(&[1; MESSAGE]) {
            Err(error) if is_end(&error) => return Ok(()),
            written => written.context("ask")?,
        }
        if !receive_message(stream)? {
            return Ok(());
        }
        done.fetch_add(1, Relaxed);
    }
}

/// Waits for a request and answers it, until the end.
fn reply(mut stream: &TcpStream, done: &AtomicU64) -> Result<()> {
    while receive_message(stream)? {
        match stream.write_all(&[2; MESSAGE]) {
            Err(error) if is_end(&error) => return Ok(()),
            written => written.context("answer")?,
        }
        done.fetch_add(1, Relaxed);
    }
    Ok(())
}

/// Receives a whole message; not if the end comes first.
fn receive_message(stream: &TcpStream) -> Result<bool> {
    let mut buffer = [0; MESSAGE];
    let mut count = 0;
    while count < MESSAGE {
        match receive(stream, &mut buffer[count..])? {
            0 => return Ok(false),
            more => count += more,
        }
    }
    Ok(true)
}

/// Receives what there is; nothing at the end. `recv` itself does not wait: on a socket in a sockmap it may give up early
/// (`tcp_bpf_recvmsg`).
fn receive(stream: &TcpStream, buffer: &mut [u8]) -> Result<usize> {
    loop {
        let mut fds = [PollFd::new(stream, PollFlags::IN | PollFlags::RDHUP)];
        let ready = poll(&mut fds, Some(&Timespec::try_from(LONG)?))?;
        ensure!(ready > 0, "nothing came, not even an end");
        match rustix::net::recv(stream, &mut *buffer, RecvFlags::DONTWAIT) {
            Ok((count, _)) => return Ok(count),
            Err(Errno::CONNRESET | Errno::PIPE) => return Ok(0),
            Err(Errno::AGAIN) => {}
            Err(error) => return Err(error).context("receive"),
        }
    }
}

/// A flow is over for this socket as it is for one that no program has seen: no read waits, no write gets through, and it
/// can be connected anew.
fn works_like_a_plain_one(stream: &TcpStream) -> Result<()> {
    eventually("writes to fail", LONG, || Ok((&*stream).write(b"x").is_err().then_some(())))?;
    let mut rest = vec![0; 64 << 10];
    while receive(stream, &mut rest)? > 0 {}
    ensure!((&*stream).read(&mut rest)? == 0, "bytes after the end");
    let error = stream.take_error()?;
    ensure!(error.is_none(), "an error is left: {error:?}");

    rustix::net::connect_unspec(stream).context("dissolve the connection")?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    rustix::net::connect(stream, &listener.local_addr()?).context("connect anew")?;
    let (accepted, _) = listener.accept()?;
    accepted.set_read_timeout(Some(SOON))?;
    let mut flow = (stream.try_clone()?, accepted);
    (0..100).try_for_each(|_| exchange(&mut flow))
}

/// Kills drowse while flows, whose bytes `plane` moves, are under full load.
fn killed_under_load(plane: &str) -> Result<()> {
    isolated(|| {
        let (_backend, accepted) = connections_to_the_test()?;
        let mut killed = in_front(&["--plane", plane])?;
        wait_for_plane(&killed, plane)?;
        let mut flows = Vec::new();
        for open in 1..=Load::FLOWS as u64 {
            let peers = if plane == "sockmap-ends" { 2 * open } else { 0 };
            let mut flow = both_ends(&accepted)?;
            // Whoever hangs in a write is found out by not being heard of.
            [&flow.0, &flow.1].into_iter().try_for_each(|end| end.set_write_timeout(None))?;
            eventually("a flow that the kernel moves", LONG, || {
                (0..8).try_for_each(|_| exchange(&mut flow))?;
                let status = shown(&killed)?;
                let counted = |field| number(&status, &format!("/counters/redirected/{field}"));
                Ok(((counted("flows_open"), counted("peers_total")) == (open, peers)).then_some(()))
            })?;
            flows.push(flow);
        }
        let (programs, maps) = (held_by(killed.id())?, maps_held_by(killed.id())?);
        let pinned = pinned_maps()?;
        let load = Load::on(flows);
        let before = shown(&killed)?;
        load.wait_for_steps(200)?;
        let after = shown(&killed)?;
        for field in ["redirected_to_client", "redirected_to_backend"] {
            let moved = [&before, &after].map(|now| number(now, &format!("/counters/redirected/{field}")));
            ensure!(moved[1] > moved[0], "nothing more is {field}: {moved:?}");
        }

        // All are at it still.
        load.wait_for_steps(1)?;
        ensure!(load.heard.try_recv().is_err(), "a flow ended by itself");
        let at = clock::now();
        killed.signal(Signal::KILL)?;
        let (last, who) = load.wait_for_all()?;
        let took = last.saturating_sub(at);
        ensure!(took < HEARD_WITHIN, "{who} heard only after {took:?}");
        killed.wait_for_exit()?;
        // The peers are open still: none of them keeps a program.
        wait_until_gone(&programs)?;
        wait_until_maps_are_gone(&maps.difference(&pinned).copied().collect())?;
        for (client, backend) in &load.sockets {
            works_like_a_plain_one(client).context("a client's socket")?;
            works_like_a_plain_one(backend).context("a backend's socket")?;
        }
        Ok(())
    })
}

/// At both ends of each flow everybody hears of it in time, whatever they were about.
#[test]
fn all_hear_of_a_drowse_killed_under_load() -> Result<()> {
    killed_under_load("sockmap")
}

/// The same, with peers whose messages go straight to the other side.
#[test]
fn all_peers_hear_of_a_drowse_killed_under_load() -> Result<()> {
    killed_under_load("sockmap-ends")
}

/// Every flow goes through two drowses, of which each has the other's socket for a peer.
fn one_behind_the_other(before: &str, behind: &str) -> Result<()> {
    const BETWEEN: &str = "127.0.0.1:8082";
    const FLOWS: usize = 16;
    const REQUESTS: usize = 500;
    isolated(|| {
        let (_backend, accepted) = connections_to_the_test()?;
        let ends = ["--listen", BETWEEN, "--backend", BACKEND, "--name", "behind.service"];
        let mut behind = Drowse::run(&[&ends[..], &["--plane", behind]].concat())?;
        let ends = ["--listen", PUBLIC, "--backend", BETWEEN, "--name", NAME];
        let mut before = Drowse::run(&[&ends[..], &["--plane", before]].concat())?;
        for drowse in [&mut before, &mut behind] {
            drowse.wait_for_line("the kernel moves the bytes")?;
        }
        let answered = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let flows = (0..FLOWS).map(|_| {
                let (client, backend) = both_ends(&accepted)?;
                let answered = &answered;
                let answering = scope.spawn(move || reply(&backend, answered));
                Ok((scope.spawn(move || ask_for(&client, REQUESTS)), answering))
            });
            let flows = flows.collect::<Result<Vec<_>>>()?;
            flows.into_iter().flat_map(|(asking, answering)| [asking, answering]).try_for_each(|thread| {
                thread.join().map_err(|_| anyhow::anyhow!("a thread panicked")).flatten()
            })
        })?;
        ensure!(answered.load(Relaxed) == (FLOWS * REQUESTS) as u64, "{answered:?} requests were answered");
        for field in ["redirected_to_client", "redirected_to_backend"] {
            let moved = number(&shown(&before)?, &format!("/counters/redirected/{field}"));
            ensure!(moved > 0, "nothing is {field}");
        }
        Ok(())
    })
}

/// Asks so often, gets an answer each time, and ends.
fn ask_for(mut stream: &TcpStream, requests: usize) -> Result<()> {
    for request in 0..requests {
        stream.write_all(&[1; MESSAGE]).context("ask")?;
        ensure!(receive_message(stream)?, "an end instead of answer {request}");
    }
    stream.shutdown(Shutdown::Write)?;
    ensure!(!receive_message(stream)?, "an answer without a request");
    Ok(())
}

#[test]
fn peers_before_a_drowse_are_served() -> Result<()> {
    one_behind_the_other("sockmap-ends", "sockmap")
}

#[test]
fn peers_behind_a_drowse_are_served() -> Result<()> {
    one_behind_the_other("sockmap", "sockmap-ends")
}

#[test]
fn peers_before_and_behind_a_drowse_are_served() -> Result<()> {
    one_behind_the_other("sockmap-ends", "sockmap-ends")
}

/// Both ends of a flow that `plane` has: the client's and the backend's.
fn open(plane: &Forward) -> Result<(TcpStream, TcpStream)> {
    let pair = || -> Result<(TcpStream, TcpStream)> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let near = connect_to(&listener.local_addr()?.to_string())?;
        let far = listener.accept()?.0;
        far.set_read_timeout(Some(SOON))?;
        Ok((near, far))
    };
    let ((client, accepted), (connected, backend)) = (pair()?, pair()?);
    plane.open(Flow { client: accepted.into(), backend: connected.into(), seat: Seat::default() });
    Ok((client, backend))
}

fn exchange(flow: &mut (TcpStream, TcpStream)) -> Result<()> {
    let mut buffer = [0; 5];
    flow.0.write_all(b"there")?;
    flow.1.read_exact(&mut buffer)?;
    ensure!(&buffer == b"there", "{buffer:?}");
    flow.1.write_all(b"back!")?;
    flow.0.read_exact(&mut buffer)?;
    ensure!(&buffer == b"back!", "{buffer:?}");
    Ok(())
}

#[test]
fn flows_beyond_the_limit_are_spliced() -> Result<()> {
    const LIMIT: usize = 4;
    isolated(|| {
        let accounting = Accounting::new(1);
        let mut object =
            Object::load_for(std::path::Path::new("/sys/fs/bpf/drowse"), NAME, Some(layout()?), LIMIT)?;
        let (sockmap, announcements) =
            Sockmap::prepare(&mut object, drowse::plane::choose::Redirection::Own)?;
        let mut plane = Forward::new(Mode::Splice, 1, Arc::clone(&accounting))?;
        plane.use_sockmap(sockmap, announcements)?;
        let mut flows = (0..LIMIT + 6).map(|_| open(&plane)).collect::<Result<Vec<_>>>()?;
        let mut rounds = 0;
        let mut wait_for = |what: &str, flows: &mut [(TcpStream, TcpStream)], fits: fn(&Proxied) -> bool| {
            eventually(what, SOON, || {
                flows.iter_mut().try_for_each(exchange)?;
                rounds += 1;
                Ok(Some(accounting.redirected()).filter(fits))
            })
            .with_context(|| format!("{:?}", accounting.redirected()))
        };
        wait_for("the limit", &mut flows, |counted| {
            (counted.flows_total, counted.refused_total) == (LIMIT as u64, 6)
        })?;
        // Both directions of each, by now.
        wait_for("some bytes", &mut flows, |counted| counted.redirected_to_backend >= 500)?;
        let before = wait_for("a round", &mut flows, |_| true)?.redirected_to_client;
        let after = wait_for("a round", &mut flows, |_| true)?.redirected_to_client;
        ensure!(after - before == 5 * LIMIT as u64, "{before}, {after}");
        // A worker counts what it has sent.
        let all = 5 * rounds * (LIMIT as u64 + 6);
        eventually("all bytes to be counted", SOON, || {
            let totals = accounting.totals();
            Ok(((totals.bytes_to_backend, totals.bytes_to_client) == (all, all)).then_some(()))
        })?;
        drop(flows);
        eventually("all flows to close", SOON, || Ok((accounting.totals().flows_open == 0).then_some(())))?;
        let mut next = open(&plane)?;
        eventually("one more", SOON, || {
            exchange(&mut next)?;
            let counted = accounting.redirected();
            Ok(((counted.flows_open, counted.flows_total) == (1, LIMIT as u64 + 1)).then_some(()))
        })
    })
}
