//! Ring 2: the listen hook and what it relies on in the kernel. Needs root and the eBPF object.
//!
//! Each test runs in a network and a mount namespace of its own, with a BPF file system of its own. The hook sees the
//! whole machine, so each test reserves its port numbers for itself.
#![expect(clippy::expect_used, reason = "a failed fixture fails the test")]

use std::collections::HashSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use std::{env, fs, thread};

use aya::maps::{HashMap, Map, MapData};
use drowse::ebpf::{Answer, Object, PIN_DIR, availability, pin_name};
use drowse::readiness::listen_hook::{Listen, ListenHook};
use drowse_ebpf::{LISTEN_EVENTS_BYTES, ListenEvent, Listens};
use rustix::mount::{MountFlags, mount};
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Longest wait for something that ought to happen at once.
const DEADLINE: Duration = Duration::from_secs(10);

/// Set for a test's child process: the port it shall watch.
const CHILD_PORT: &str = "DROWSE_TEST_CHILD_PORT";

/// Set for a test's child process: the name it shall use.
const CHILD_NAME: &str = "DROWSE_TEST_CHILD_NAME";

/// Runs `test` in a thread with namespaces of its own and a runtime.
fn isolated(test: impl AsyncFnOnce() + Send) {
    drowse_tests::isolated::isolated(|| {
        run(test());
        Ok(())
    })
    .expect("make namespaces");
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("build a runtime").block_on(test);
}

/// A port number that nobody else on this machine is given: bound, but not listened on, outside of the test's network
/// namespace.
struct Reserved {
    _socket: socket2::Socket,
    port: u16,
}

fn reserve() -> Reserved {
    let socket =
        socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).expect("make a socket");
    socket.set_only_v6(false).expect("bind both families");
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)).into()).expect("reserve a port");
    let port = socket.local_addr().expect("ask for the port").as_socket().expect("an IP address").port();
    Reserved { _socket: socket, port }
}

/// A name that no other test uses.
fn name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("test-{}-{}.service", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

fn listen_v4(port: u16) -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("listen on IPv4")
}

fn pins(name: &str) -> PathBuf {
    Path::new("/sys/fs/bpf/drowse").join(pin_name(name).expect("a name"))
}

/// The hook with the object that it is attached by.
struct Hook {
    events: ListenHook,
    object: Object,
}

impl Hook {
    fn attach(name: &str, ports: &[u16]) -> anyhow::Result<Self> {
        let mut object = Object::load(Path::new(PIN_DIR), name, None)?;
        let events = ListenHook::attach(&mut object, ports)?;
        Ok(Self { events, object })
    }

    fn unpinned(&self) -> Option<&str> {
        self.object.unpinned()
    }

    async fn listened(&mut self) -> Listen {
        self.events.listened().await
    }
}

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.events.fmt(f)
    }
}

fn attach(name: &str, ports: &[u16]) -> Hook {
    let hook = Hook::attach(name, ports).expect("attach the listen hook");
    assert_eq!(hook.unpinned(), None);
    hook
}

async fn listened(hook: &mut Hook) -> Listen {
    timeout(DEADLINE, hook.listened()).await.expect("an event within the deadline")
}

fn pinned(name: &str) -> MapData {
    MapData::from_pin(pins(name).join("LISTENS")).expect("open the pinned map")
}

fn listens(name: &str, port: u16) -> Listens {
    let map = HashMap::<_, u32, Listens>::try_from(Map::HashMap(pinned(name))).expect("a hash map");
    map.get(&u32::from(port), 0).expect("an entry for the port")
}

/// A child process that runs the test `test` again, behind `wrapper`, with `port` and `name` to watch.
fn child(test: &str, wrapper: &[&str], name: &str, port: u16) -> Command {
    let this = env::current_exe().expect("find this executable");
    let mut words = wrapper.iter().map(PathBuf::from).chain([this]);
    let mut command = Command::new(words.next().expect("a program"));
    command.args(words).args(["--exact", test, "--nocapture"]);
    command.env(CHILD_PORT, port.to_string()).env(CHILD_NAME, name);
    command
}

/// In a child process: what it shall watch.
fn as_child() -> Option<(String, u16)> {
    let port = env::var(CHILD_PORT).ok()?.parse().expect("a port");
    Some((env::var(CHILD_NAME).expect("a name"), port))
}

/// Kills a child that is left when a test fails.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_ipv4_listener_is_reported_with_its_address() {
    let port = reserve();
    isolated(async || {
        let before = drowse::clock::now();
        let mut hook = attach(&name(), &[port.port]);
        let _listener = listen_v4(port.port);
        let listen = listened(&mut hook).await;
        assert_eq!(listen.address, SocketAddr::from((Ipv4Addr::LOCALHOST, port.port)));
        assert!(before < listen.time && listen.time < drowse::clock::now(), "{listen:?}");
        assert_ne!(listen.netns_cookie, 0);
    });
}

#[test]
fn an_ipv6_listener_is_reported_with_its_address() {
    let port = reserve();
    isolated(async || {
        let mut hook = attach(&name(), &[port.port]);
        for ip in [Ipv6Addr::LOCALHOST, Ipv6Addr::UNSPECIFIED] {
            let _listener = TcpListener::bind((ip, port.port)).expect("listen on IPv6");
            assert_eq!(listened(&mut hook).await.address, SocketAddr::from((ip, port.port)));
        }
    });
}

#[test]
fn a_connect_succeeds_from_the_event_on() {
    const ROUNDS: usize = 50;
    let port = reserve();
    isolated(async || {
        let mut hook = attach(&name(), &[port.port]);
        for _ in 0..ROUNDS {
            let backend = thread::spawn({
                let port = port.port;
                move || listen_v4(port).accept().map(drop)
            });
            let listen = listened(&mut hook).await;
            TcpStream::connect(listen.address).expect("the first connect succeeds");
            backend.join().expect("no panic").expect("accept");
        }
    });
}

#[test]
fn a_listener_on_another_port_is_not_reported() {
    let (watched, other) = (reserve(), reserve());
    isolated(async || {
        let name = name();
        let mut hook = attach(&name, &[watched.port]);
        let _other = listen_v4(other.port);
        let _watched = listen_v4(watched.port);
        // One ring buffer keeps the order: the other port's event would come first.
        assert_eq!(listened(&mut hook).await.address.port(), watched.port);
        let map = HashMap::<_, u32, Listens>::try_from(Map::HashMap(pinned(&name))).expect("a hash map");
        let ports: Vec<u32> = map.keys().map(|port| port.expect("a key")).collect();
        assert_eq!(ports, [u32::from(watched.port)]);
    });
}

#[test]
fn a_bound_socket_that_does_not_listen_is_not_reported() {
    let port = reserve();
    isolated(async || {
        let mut hook = attach(&name(), &[port.port]);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.port));
        let socket =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        socket.bind(&address.into()).expect("bind");
        let after_bind = drowse::clock::now();
        socket.listen(1).expect("listen");
        assert!(listened(&mut hook).await.time > after_bind);
    });
}

#[test]
fn a_listener_in_another_network_namespace_has_another_cookie() {
    let (one, two) = (reserve(), reserve());
    isolated(async || {
        let mut hook = attach(&name(), &[one.port, two.port]);
        let _one = listen_v4(one.port);
        let _two = listen_v4(two.port);
        let (one_event, two_event) = (listened(&mut hook).await, listened(&mut hook).await);
        assert_eq!(one_event.netns_cookie, two_event.netns_cookie);

        let port = one.port;
        let netns = drowse_tests::isolated::new_netns().expect("another namespace");
        let _listener =
            drowse_tests::isolated::in_netns(netns, || listen_v4(port)).expect("listen in another namespace");
        let elsewhere = listened(&mut hook).await;
        assert_eq!(elsewhere.address, one_event.address);
        assert_ne!(elsewhere.netns_cookie, one_event.netns_cookie);
    });
}

#[test]
fn a_waiting_reader_is_woken_and_a_cancelled_one_loses_nothing() {
    let port = reserve();
    isolated(async || {
        let mut hook = attach(&name(), &[port.port]);
        let early = timeout(Duration::from_millis(20), hook.listened()).await;
        assert!(early.is_err(), "nobody listens yet: {early:?}");
        let _listener = listen_v4(port.port);
        // Polled once and dropped: whether or not it was ready then, the event is seen exactly once.
        let polled = timeout(Duration::ZERO, hook.listened()).await;
        let listen = if let Ok(listen) = polled { listen } else { listened(&mut hook).await };
        assert_eq!(listen.address.port(), port.port);
        let again = timeout(Duration::from_millis(20), hook.listened()).await;
        assert!(again.is_err(), "the event came twice: {again:?}");
    });
}

#[test]
fn bpftool_prints_the_counters_with_their_names() {
    let port = reserve();
    isolated(async || {
        let name = name();
        let mut hook = attach(&name, &[port.port]);
        drop(listen_v4(port.port));
        drop(listen_v4(port.port));
        listened(&mut hook).await;
        let last = listened(&mut hook).await;

        let map = pins(&name).join("LISTENS");
        let dump = Command::new("bpftool").args(["-j", "map", "dump", "pinned"]).arg(map).output();
        let dump = dump.expect("run bpftool (`cargo xtask install` as root)");
        let dump: serde_json::Value = serde_json::from_slice(&dump.stdout).expect("JSON from bpftool");
        let entry = &dump[0]["formatted"];
        assert_eq!(entry["key"], port.port, "{dump}");
        assert_eq!(entry["value"]["listens_total"], 2, "{dump}");
        assert_eq!(entry["value"]["events_lost_total"], 0, "{dump}");
        assert_eq!(entry["value"]["netns_cookie"], last.netns_cookie, "{dump}");
        let last_ns = drowse::clock::as_nanos(last.time);
        assert_eq!(entry["value"]["last_listen_ns"], last_ns, "{dump}");
        assert_eq!(entry["value"]["family"], drowse_ebpf::FAMILY_V4, "{dump}");
    });
}

#[test]
fn a_full_ring_buffer_disturbs_nobody_and_is_counted() {
    const HEADER_BYTES: usize = 8;
    // One record always stays free, or the producer would catch up with the consumer.
    let room = (LISTEN_EVENTS_BYTES - 1) / (size_of::<ListenEvent>() + HEADER_BYTES);
    let port = reserve();
    isolated(async || {
        let name = name();
        let mut hook = attach(&name, &[port.port]);
        let total = room + 15;
        for _ in 0..total {
            drop(listen_v4(port.port));
        }
        let counted = listens(&name, port.port);
        assert_eq!(counted.listens_total, total as u64);
        assert_eq!(counted.events_lost_total, 15);
        for _ in 0..room {
            listened(&mut hook).await;
        }
        let _listener = listen_v4(port.port);
        let last = listened(&mut hook).await;
        let counted = listens(&name, port.port);
        assert_eq!(counted.last_listen_ns, drowse::clock::as_nanos(last.time));
        assert_eq!(counted.events_lost_total, 15);
    });
}

#[test]
fn pins_come_with_the_hook_and_go_with_it() {
    let port = reserve();
    isolated(async || {
        let name = name();
        let hook = attach(&name, &[port.port]);
        let entries = fs::read_dir(pins(&name)).expect("the directory of the pins");
        let entries: HashSet<_> = entries.map(|entry| entry.expect("an entry").file_name()).collect();
        let pinned = drowse_ebpf::map::SHOWN.into_iter().chain(drowse_ebpf::map::KEPT);
        assert_eq!(entries, pinned.map(Into::into).collect());
        drop(hook);
        assert!(!pins(&name).exists());
    });
}

#[test]
fn a_dropped_hook_leaves_no_program_behind() {
    let port = reserve();
    isolated(async || {
        let name = name();
        let hook = attach(&name, &[port.port]);
        let map = pinned(&name);
        let counters = HashMap::<_, u32, Listens>::try_from(Map::HashMap(map)).expect("a hash map");
        drop(hook);
        let _listener = listen_v4(port.port);
        assert_eq!(counters.get(&u32::from(port.port), 0).expect("an entry").listens_total, 0);
    });
}

#[test]
fn a_killed_process_leaves_no_program_and_its_pins_are_replaced() {
    if let Some((name, port)) = as_child() {
        return run(async {
            let _hook = attach(&name, &[port]);
            let mut stdout = std::io::stdout();
            stdout.write_all(b"\nattached\n").and_then(|()| stdout.flush()).expect("tell the parent");
            let _ = std::io::stdin().read_line(&mut String::new());
        });
    }
    let port = reserve();
    isolated(async || {
        let name = name();
        let test = "a_killed_process_leaves_no_program_and_its_pins_are_replaced";
        let mut command = child(test, &[], &name, port.port);
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut victim = Killed(spawned.expect("start a child"));
        let lines = BufReader::new(victim.0.stdout.take().expect("a pipe")).lines();
        let attached = lines.map_while(Result::ok).any(|line| line == "attached");
        assert!(attached, "the child ended without attaching");
        drop(listen_v4(port.port));
        assert_eq!(listens(&name, port.port).listens_total, 1);
        let stale = pinned(&name).info().expect("map info").id();

        victim.0.kill().expect("kill the child");
        victim.0.wait().expect("reap the child");
        drop(listen_v4(port.port));
        assert_eq!(listens(&name, port.port).listens_total, 1, "a program still counts");

        let mut hook = attach(&name, &[port.port]);
        assert_ne!(pinned(&name).info().expect("map info").id(), stale);
        let _listener = listen_v4(port.port);
        listened(&mut hook).await;
        assert_eq!(listens(&name, port.port).listens_total, 1);
    });
}

#[test]
fn two_of_one_name_leave_each_others_pins_alone() {
    let port = reserve();
    isolated(async || {
        let name = name();
        let _first = attach(&name, &[port.port]);
        let id = pinned(&name).info().expect("map info").id();
        let mut second = Hook::attach(&name, &[port.port]).expect("attach another");
        let reason = second.unpinned().expect("it has no pins");
        assert!(reason.contains("belongs to a drowse that runs"), "{reason}");
        let _listener = listen_v4(port.port);
        listened(&mut second).await;
        drop(second);
        assert_eq!(pinned(&name).info().expect("map info").id(), id);
    });
}

#[test]
fn odd_names_are_escaped_and_stay_in_their_place() {
    let port = reserve();
    isolated(async || {
        for name in ["..", "../../escape", "a/b.service", "ümlaut\n", "x\\x2dy@1.service"] {
            let _hook = attach(name, &[port.port]);
            assert!(pins(name).join("LISTENS").exists(), "{name:?}");
            assert_eq!(pins(name).parent(), Some(Path::new("/sys/fs/bpf/drowse")), "{name:?}");
        }
        for name in ["", &"x".repeat(256)] {
            let hook = Hook::attach(name, &[port.port]).expect("attach all the same");
            assert!(hook.unpinned().is_some_and(|reason| reason.contains("the name is")), "{name:?}");
        }
    });
}

#[test]
fn without_a_bpf_file_system_only_the_pins_are_missing() {
    let port = reserve();
    isolated(async || {
        mount("none", "/sys/fs/bpf", "tmpfs", MountFlags::empty(), None).expect("hide the BPF file system");
        assert_eq!(availability().bpffs.answer, Answer::No);
        let mut hook = Hook::attach(&name(), &[port.port]).expect("attach all the same");
        let reason = hook.unpinned().expect("it has no pins");
        assert!(reason.contains("mount -t bpf bpf /sys/fs/bpf"), "{reason}");
        let _listener = listen_v4(port.port);
        listened(&mut hook).await;
    });
}

#[test]
fn a_missing_capability_is_named() {
    if let Some((name, port)) = as_child() {
        let error = Hook::attach(&name, &[port]).expect_err("attach without CAP_BPF");
        let message = format!("{error:#}");
        assert!(message.contains("missing: CAP_BPF;"), "{message}");
        assert!(message.contains("AmbientCapabilities="), "{message}");
        assert_eq!(availability().capabilities.answer, Answer::No);
        return;
    }
    let port = reserve();
    isolated(async || {
        let drop_two = ["setpriv", "--inh-caps=-all", "--bounding-set=-bpf,-sys_admin"];
        let mut command = child("a_missing_capability_is_named", &drop_two, &name(), port.port);
        let output = command.output().expect("run setpriv");
        assert!(output.status.success(), "{output:?}");
    });
}

#[test]
fn cap_bpf_and_cap_net_admin_are_enough() {
    if let Some((name, port)) = as_child() {
        return run(async {
            let mut hook = attach(&name, &[port]);
            let _listener = listen_v4(port);
            listened(&mut hook).await;
        });
    }
    let port = reserve();
    isolated(async || {
        let keep_two = ["setpriv", "--inh-caps=-all", "--bounding-set=-all,+bpf,+net_admin"];
        let mut command = child("cap_bpf_and_cap_net_admin_are_enough", &keep_two, &name(), port.port);
        let output = command.output().expect("run setpriv");
        assert!(output.status.success(), "{output:?}");
    });
}

#[test]
fn too_many_ports_are_refused() {
    let ports: Vec<u16> = (1..=65).collect();
    let error = Hook::attach("too-many", &ports).expect_err("more ports than fit");
    assert!(error.to_string().contains("at most 64 ports"), "{error:#}");
}

#[test]
fn outside_of_a_runtime_it_is_an_error_and_no_panic() {
    isolated(async || {
        let attached = thread::spawn(|| Hook::attach("no-runtime", &[1]).map(drop)).join();
        let error = attached.expect("no panic").expect_err("attach without a runtime");
        assert!(format!("{error:#}").contains("runtime"), "{error:#}");
        assert!(!pins("no-runtime").exists());
    });
}

#[test]
fn a_log_line_of_the_program_reaches_tracing() {
    let port = reserve();
    isolated(async || {
        let (sender, mut lines) = mpsc::unbounded_channel();
        let writer = move || Lines(sender.clone());
        let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_writer(writer);
        let _guard = tracing::subscriber::set_default(subscriber.finish());
        let mut hook = attach(&name(), &[port.port]);
        let _listener = listen_v4(port.port);
        let expected = format!("port {} is listened on", port.port);
        let found = timeout(DEADLINE, async {
            loop {
                tokio::select! {
                    _ = hook.listened() => {}
                    line = lines.recv() => {
                        let line = line.expect("the subscriber lives");
                        if line.contains(&expected) {
                            return line;
                        }
                    }
                }
            }
        });
        let line = found.await.expect("a log line within the deadline");
        assert!(line.contains("DEBUG") && line.contains("listen_hook"), "{line}");
    });
}

/// A log that can be waited for.
struct Lines(mpsc::UnboundedSender<String>);

impl std::io::Write for Lines {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.send(String::from_utf8_lossy(line).into_owned());
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
