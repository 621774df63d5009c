//! Ring 1: the metrics endpoint beside the real program: what it serves, and that its peers are no harm.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::UnixStream;
use std::process::{Command, Output};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use drowse::clock;
use drowse_tests::deadline::eventually;
use drowse_tests::drowse_binary;
use drowse_tests::process::{Drowse, SOON, backend, connect, connect_to, echo, one_request, public};
use drowse_tests::scrape::{Scrape, metrics, request};
use socket2::{Domain, Socket, Type};

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");

/// `drowse run` named `echo` in front of an echo backend, its metrics at `at`.
fn run_at(at: &str, options: &[&str], backend_options: &[&str]) -> Result<Drowse> {
    let (public, backend) = (public(), backend());
    let addresses = ["--name", "echo", "--listen", &public, "--backend", &backend, "--metrics", at];
    let plane = ["--plane", "splice"];
    Drowse::run(&[&addresses[..], &plane, options, &["--", ECHO, &backend], backend_options].concat())
}

fn run(options: &[&str], backend_options: &[&str]) -> Result<Drowse> {
    run_at(&metrics(), options, backend_options)
}

fn state(scrape: &Scrape, state: &str) -> Result<bool> {
    Ok(scrape.count("state", &[&format!("state=\"{state}\"")])? > 0)
}

/// Waits until the service is in a state.
fn wait_for(wanted: &str) -> Result<Scrape> {
    eventually(wanted, SOON, || {
        let scrape = Scrape::of(&metrics())?;
        Ok(state(&scrape, wanted)?.then_some(scrape))
    })
}

#[test]
fn a_service_is_followed_from_sleep_to_use_and_back() -> Result<()> {
    let _drowse = run(&["--idle-time", "200ms", "--connections-max", "7"], &["--delay-ms", "300"])?;
    let asleep = Scrape::of(&metrics())?;
    let word = |state: &str| format!("state=\"{state}\"");
    for other in ["waking", "awake", "settling", "stopping", "failed"] {
        ensure!(asleep.count("state", &[&word(other)])? == 0, "{other}");
    }
    ensure!(state(&asleep, "asleep")? && asleep.count("wakes_total", &[])? == 0);
    ensure!(asleep.count("connections_max", &[])? == 7);
    ensure!(asleep.count("build_info", &[&format!("version=\"{}\"", env!("CARGO_PKG_VERSION"))])? == 1);
    ensure!(asleep.count("backend_info", &[&format!("address=\"{}\"", backend()), "unit=\"\""])? == 1);
    ensure!(asleep.count("last_activity_timestamp_seconds", &[]).is_err(), "used before anybody came");
    ensure!(asleep.samples.keys().all(|series| series.contains("{name=\"echo\"")), "{}", asleep.text);

    let mut client = connect()?;
    let waking = wait_for("waking")?;
    ensure!(waking.count("clients_held", &[])? == 1 && waking.count("wakes_total", &[])? == 1);
    ensure!(waking.count("activations_total", &[])? == 0);
    echo(&mut client, b"good morning")?;
    let (proxied, handed_off) = ("group=\"proxied\"", "group=\"handed_off\"");
    // A byte is counted when it is delivered, which its reader may know first.
    let awake = eventually("the answer to be counted", SOON, || {
        let scrape = Scrape::of(&metrics())?;
        let bytes = scrape.count("transferred_bytes_total", &[proxied, "direction=\"to_client\""])?;
        Ok((bytes == 12).then_some(scrape))
    })?;
    ensure!(state(&awake, "awake")? && awake.count("clients_held", &[])? == 0);
    ensure!(awake.count("flows_open", &[proxied])? == 1 && awake.count("flows_total", &[proxied])? == 1);
    ensure!(awake.count("flows_total", &[handed_off])? == 0);
    for direction in ["direction=\"to_backend\"", "direction=\"to_client\""] {
        ensure!(awake.count("transferred_bytes_total", &[proxied, direction])? == 12, "{}", awake.text);
        ensure!(awake.count("transferred_bytes_total", &[handed_off, direction])? == 0);
    }
    let bucket = |le: &str| awake.count("activation_duration_seconds_bucket", &[&format!("le=\"{le}\"")]);
    ensure!((bucket("0.25")?, bucket("90.0")?, bucket("+Inf")?) == (0, 1, 1), "{}", awake.text);
    let took = awake.value("activation_duration_seconds_sum", &[])?;
    ensure!((0.3..10.0).contains(&took) && awake.count("activations_total", &[])? == 1, "{took}");
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
    for moment in ["last_activity_timestamp_seconds", "state_since_timestamp_seconds"] {
        let at = awake.value(moment, &[])?;
        ensure!((now - 20.0..=now + 0.01).contains(&at), "{moment}: {at}, now {now}");
    }

    drop(client);
    let asleep = wait_for("asleep")?;
    ensure!(asleep.count("stops_total", &[])? == 1 && asleep.count("flows_open", &[proxied])? == 0);
    Ok(())
}

#[test]
fn a_strange_name_is_still_a_label() -> Result<()> {
    let (public, backend, at) = (public(), backend(), metrics());
    let addresses = ["--listen", &public, "--backend", &backend, "--metrics", &at];
    let _drowse =
        Drowse::run(&[&["--name", "a \"b\" \\ c"][..], &addresses, &["--", ECHO, &backend]].concat())?;
    let scrape = Scrape::of(&metrics())?;
    let series = "drowse_wakes_total{name=\"a \\\"b\\\" \\\\ c\"}";
    ensure!(scrape.samples.contains_key(series), "no {series} in {}", scrape.text);
    Ok(())
}

#[test]
fn failures_are_counted_by_reason() -> Result<()> {
    let _drowse = run(&[], &["--exit", "3"])?;
    let _reset = connect()?.read(&mut [0]);
    let failed = wait_for("failed")?;
    ensure!(failed.count("failures_total", &["reason=\"exit-code\""])? == 1, "{}", failed.text);
    ensure!(failed.count("failures_total", &["reason=\"timeout\""])? == 0);
    ensure!(failed.count("wakes_total", &[])? == 1 && failed.count("activations_total", &[])? == 0);
    Ok(())
}

#[test]
fn looking_wakes_nobody_and_counts_as_no_use() -> Result<()> {
    let mut drowse = run(&["--idle-time", "300ms"], &[])?;
    for _ in 0..20 {
        ensure!(state(&Scrape::of(&metrics())?, "asleep")?);
    }
    one_request(b"a")?;
    // Somebody who looks all the time, and holds a connection, keeps nobody awake.
    let _silent = connect_to(&metrics())?;
    let asleep = wait_for("asleep")?;
    ensure!(asleep.count("flows_total", &["group=\"proxied\""])? == 1, "{}", asleep.text);
    ensure!(asleep.count("wakes_total", &[])? == 1);
    drowse.wait_for_line("is asleep: nobody used it for 300 ms")?;
    Ok(())
}

#[test]
fn everything_else_is_refused_in_plain_words() -> Result<()> {
    let _drowse = run(&[], &[])?;
    let ask = |method: &str, path: &str| request(connect_to(&metrics())?, method, path);
    for path in ["/", "/metric", "/metrics/", "/status"] {
        let answer = ask("GET", path)?;
        ensure!(
            answer.status == 404 && answer.body.contains("nothing here but /metrics"),
            "{path}: {answer:?}"
        );
    }
    for method in ["POST", "DELETE", "OPTIONS", "BREW"] {
        let answer = ask(method, "/metrics")?;
        ensure!(answer.status == 405 && answer.body.contains("GET"), "{method}: {answer:?}");
        ensure!(answer.head.contains("allow: get, head"), "{}", answer.head);
    }
    let answer = ask("GET", "/metrics?name[]=drowse_state")?;
    ensure!(answer.status == 200 && answer.body.ends_with("# EOF\n"), "{answer:?}");
    let answer = ask("HEAD", "/metrics")?;
    ensure!(answer.status == 200 && answer.body.is_empty(), "{answer:?}");
    let mut stream = connect_to(&metrics())?;
    stream.write_all(b"hello?\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 400 "), "{answer:?}");
    Ok(())
}

#[test]
fn a_unix_socket_and_an_abstract_name_serve_the_same() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("metrics.sock");
    let drowse = run_at(path.to_str().context("a path")?, &[], &[])?;
    let answer = request(UnixStream::connect(&path)?, "GET", "/metrics")?;
    ensure!(answer.status == 200, "{answer:?}");
    ensure!(state(&Scrape::read(answer.body)?, "asleep")?);
    drop(drowse);
    ensure!(!path.exists(), "the socket stays behind");

    let name = format!("drowse-metrics-{}", std::process::id());
    let _drowse = run_at(&format!("@{name}"), &[], &[])?;
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name)?;
    let answer = request(UnixStream::connect_addr(&address)?, "GET", "/metrics")?;
    ensure!(answer.status == 200, "{answer:?}");
    Ok(())
}

/// How `drowse run` with these metrics ends.
fn refused(at: &str) -> Result<Output> {
    let mut command = Command::new(drowse_binary()?);
    let directory = tempfile::tempdir()?;
    command.args([
        "run",
        "--listen",
        &public(),
        "--backend",
        &backend(),
        "--metrics",
        at,
        "--",
        ECHO,
        &backend(),
    ]);
    command.env("DROWSE_RUNTIME_DIR", directory.path()).output().context("run drowse")
}

#[test]
fn an_address_that_cannot_be_is_refused_at_once_with_the_reason() -> Result<()> {
    let taken = std::net::TcpListener::bind(metrics())?;
    let any = format!(":{}", drowse_tests::process::PUBLIC_PORT);
    let cases = [
        (public(), 2, "is an address of the service; it needs one of its own"),
        (backend(), 2, "is an address of the service; it needs one of its own"),
        ("nonsense".to_owned(), 2, "has no port"),
        (any, 1, "cannot listen on [::]:8080"),
        (metrics(), 1, "another process listens there"),
        ("192.0.2.1:9101".to_owned(), 1, "this machine does not have that address"),
        ("/proc/metrics.sock".to_owned(), 1, "cannot listen on /proc/metrics.sock"),
        ("/no/such/directory/metrics.sock".to_owned(), 1, "the directory does not exist"),
    ];
    for (at, status, words) in cases {
        let output = refused(&at)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(status) && said.contains(words),
            "{at}: {:?}: {said}",
            output.status
        );
    }
    drop(taken);
    Ok(())
}

/// Resident memory in KiB.
fn memory(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("find VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// A connection that is made without waiting for it.
fn begin_to_connect(to: &str) -> Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
    let _in_progress = socket.connect(&to.parse::<SocketAddr>()?.into());
    Ok(socket)
}

/// Some never ask, some ask for ever, some never read; more than are served or let in.
#[test]
fn hostile_peers_hold_up_no_client_and_take_no_memory() -> Result<()> {
    // Without eBPF, whose object is loaded beside the first start.
    let drowse = run(&["--ebpf", "off"], &[])?;
    one_request(b"warm")?;
    Scrape::of(&metrics())?;
    let before = memory(drowse.id())?;
    let mut crowd = Vec::new();
    let mut talkers: Vec<TcpStream> = (0..4).map(|_| connect_to(&metrics())).collect::<Result<_>>()?;
    for round in 0..10 {
        for _ in 0..200 {
            crowd.push(begin_to_connect(&metrics())?);
        }
        for talker in &mut talkers {
            // Until it is dropped.
            let _gone = talker.write(&[b'x'; 4096]);
        }
        let began = clock::now();
        one_request(format!("client {round}").as_bytes())?;
        let took = clock::now().saturating_sub(began);
        ensure!(took < Duration::from_secs(2), "round {round}: a client waited for {took:?}");
    }
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", drowse.id()))?.count();
    ensure!(descriptors < 80, "{descriptors} descriptors with 2000 peers");
    let grown = memory(drowse.id())?.saturating_sub(before);
    ensure!(grown < 2048, "grown by {grown} KiB");
    // The last of those who wait have had their second.
    drop(crowd);
    eventually("an answer after all", SOON, || Ok(Scrape::of(&metrics()).ok()))?;
    Ok(())
}

/// Silent peers are as many as may wait, and are there again at once: whoever asks gets an answer all the same.
#[test]
fn silent_peers_make_room_after_a_second() -> Result<()> {
    let _drowse = run(&[], &[])?;
    let silent: Vec<TcpStream> = (0..24).map(|_| connect_to(&metrics())).collect::<Result<_>>()?;
    let began = clock::now();
    Scrape::of(&metrics())?;
    let took = clock::now().saturating_sub(began);
    ensure!(took > Duration::from_secs(2), "more than eight were served at a time: {took:?}");
    for mut stream in silent {
        ensure!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)), "a silent peer is still there");
    }
    Ok(())
}

#[test]
fn one_peer_cannot_make_drowse_answer_all_the_time() -> Result<()> {
    let _drowse = run(&[], &[])?;
    let began = clock::now();
    let answers: usize = std::thread::scope(|scope| {
        let ask = || {
            let mut answers = 0;
            while clock::now().saturating_sub(began) < Duration::from_secs(1) {
                answers += usize::from(Scrape::of(&metrics()).is_ok());
            }
            answers
        };
        let threads: Vec<_> = (0..16).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or(0)).sum()
    });
    let took = clock::now().saturating_sub(began).as_secs_f64();
    ensure!(answers > 0, "no answer at all");
    // Eight places, ten times a second each, and the first eight at once.
    let at_most = took * 80.0 + 8.0;
    #[expect(clippy::cast_precision_loss, reason = "some hundred")]
    let answers = answers as f64;
    ensure!(answers <= at_most, "{answers} answers in {took} s");
    Ok(())
}

#[test]
fn no_counter_goes_back_while_it_wakes_works_and_sleeps() -> Result<()> {
    let _drowse = run(&["--idle-time", "20ms", "--workers", "3"], &[])?;
    let done = std::sync::atomic::AtomicBool::new(false);
    let order = std::sync::atomic::Ordering::SeqCst;
    let (mut looks, mut last) = (0, Scrape::of(&metrics())?);
    std::thread::scope(|scope| -> Result<()> {
        let work = scope.spawn(|| {
            let worked = (0..40).try_for_each(|round| {
                one_request(format!("round {round}").as_bytes())?;
                if round % 4 == 0 { wait_for("asleep").map(drop) } else { Ok(()) }
            });
            done.store(true, order);
            worked
        });
        while !done.load(order) {
            let now = Scrape::of(&metrics())?;
            let counters = now.counters()?;
            for (series, before) in last.counters()? {
                let value = counters.get(series).with_context(|| format!("{series} is gone"))?;
                ensure!(*value >= before, "{series} went from {before} to {value}");
            }
            looks += 1;
            last = now;
        }
        work.join().map_err(|_| anyhow::anyhow!("a panic"))?
    })?;
    ensure!(looks > 10, "only {looks} looks");
    let last = wait_for("asleep")?;
    ensure!(last.count("flows_total", &["group=\"proxied\""])? == 40, "{}", last.text);
    let wakes = last.count("wakes_total", &[])?;
    ensure!(wakes >= 10 && wakes == last.count("stops_total", &[])?, "{}", last.text);
    ensure!(wakes == last.count("activation_duration_seconds_count", &[])?, "{}", last.text);
    Ok(())
}
