//! Ring 2: the numbers that the kernel counted are the same in the metrics and in the pinned maps, as `bpftool` shows
//! them, and the metrics endpoint has no part in what they count. Needs root and the eBPF object.

use anyhow::{Context, Result, ensure};
use drowse::clock;
use drowse_tests::deadline::{eventually, pause};
use drowse_tests::isolated::isolated;
use drowse_tests::pinned::{dump, steering_links, wait_until_open};
use drowse_tests::process::{Drowse, SOON, connect_to, echo};
use drowse_tests::scrape::Scrape;
use drowse_tests::whoami::{Client, handed_off};
use drowse_tests::workspace;
use serde_json::Value;

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");
const NAME: &str = "test.service";
const PUBLIC: &str = "127.0.0.1:8080";
const METRICS: &str = "127.0.0.1:9101";
const HANDED_OFF: &str = "group=\"handed_off\"";
const TO_BACKEND: &str = "direction=\"to_backend\"";
const TO_CLIENT: &str = "direction=\"to_client\"";

/// Where the backend listens: at a port of this test's own, because the listen hook counts by the number of the port, in
/// whatever network namespace.
fn backend() -> String {
    format!("127.0.0.1:{}", port())
}

fn port() -> u32 {
    20_000 + std::process::id() % 10_000
}

fn run(options: &[&str]) -> Result<Drowse> {
    let backend = backend();
    let command = ["--", ECHO, "--behaviour", "whoami", &backend];
    Drowse::run(&[&words(&backend)[..], options, &command].concat())
}

/// Options that all have.
fn words(backend: &str) -> [&str; 10] {
    ["--listen", PUBLIC, "--backend", backend, "--metrics", METRICS, "--plane", "handoff", "--name", NAME]
}

/// A scrape for which the kernel has been asked anew: it is asked once a second.
fn fresh_scrape() -> Result<Scrape> {
    pause(std::time::Duration::from_millis(1100));
    Scrape::of(METRICS)
}

/// The fields of the one entry of a map.
fn entry(map: &str) -> Result<Value> {
    let entries = dump(NAME, map)?;
    ensure!(entries.len() == 1, "{map}: {entries:?}");
    let value = entries.first().and_then(|entry| entry.pointer("/formatted/value"));
    Ok(value.with_context(|| format!("{map} has no field names: {entries:?}"))?.clone())
}

fn number(fields: &Value, name: &str) -> Result<u64> {
    fields.get(name).and_then(Value::as_u64).with_context(|| format!("no {name} in {fields}"))
}

/// Some flows: two open, three over, and their bytes.
fn some_flows() -> Result<[Client; 2]> {
    Client::connect(PUBLIC)?.end()?;
    let mut open = [handed_off(PUBLIC)?, handed_off(PUBLIC)?];
    for client in &mut open {
        client.echo(b"still here")?;
    }
    for _ in 0..3 {
        let mut client = handed_off(PUBLIC)?;
        client.echo(b"short")?;
        client.end()?;
    }
    wait_until_open(NAME, 2)?;
    Ok(open)
}

#[test]
fn the_metrics_are_what_bpftool_shows() -> Result<()> {
    isolated(|| {
        let _drowse = run(&[])?;
        let _open = some_flows()?;
        // The backend may have been faster than the hook.
        let _another = std::net::TcpListener::bind(format!("127.0.0.2:{}", port()))?;
        let scrape = fresh_scrape()?;
        let service = entry("SERVICE")?;
        for (metric, labels, field) in [
            ("flows_total", vec![HANDED_OFF], "flows_total"),
            ("flows_open", vec![HANDED_OFF], "flows_open"),
            ("transferred_bytes_total", vec![HANDED_OFF, TO_BACKEND], "bytes_to_backend"),
            ("transferred_bytes_total", vec![HANDED_OFF, TO_CLIENT], "bytes_to_client"),
            ("handoff_uncounted_flows_total", vec![], "uncounted_total"),
        ] {
            let (served, pinned) = (scrape.count(metric, &labels)?, number(&service, field)?);
            ensure!(served == pinned, "{metric}: {served}, {field}: {pinned}");
        }
        ensure!(number(&service, "flows_total")? >= 5 && number(&service, "flows_open")? == 2, "{service}");
        ensure!(number(&service, "bytes_to_backend")? > 35, "{service}");
        let public = entry("PUBLIC")?;
        for (verdict, field) in [("steered", "steered_total"), ("passed", "passed_total")] {
            let labels = [&*format!("verdict=\"{verdict}\""), &*format!("address=\"{PUBLIC}\"")];
            let (served, pinned) = (scrape.count("handoff_packets_total", &labels)?, number(&public, field)?);
            ensure!(served == pinned, "{verdict}: {served}, {pinned}");
        }
        ensure!(number(&public, "steered_total")? >= 5, "{public}");
        let listens = entry("LISTENS")?;
        let (served, pinned) =
            (scrape.count("backend_listens_total", &[])?, number(&listens, "listens_total")?);
        ensure!(served == pinned && pinned >= 1, "{served}, {listens}");
        let lost = scrape.count("backend_listen_events_lost_total", &[])?;
        ensure!(lost == number(&listens, "events_lost_total")?, "{lost}, {listens}");
        ensure!(scrape.count("handoff_active", &[])? == 1, "{}", scrape.text);

        // Moments: the monotonic clock there, unix time here.
        for (metric, fields, field) in [
            ("handoff_last_activity_timestamp_seconds", &service, "last_activity_ns"),
            ("backend_last_listen_timestamp_seconds", &listens, "last_listen_ns"),
        ] {
            let ago = clock::now().as_secs_f64()
                - std::time::Duration::from_nanos(number(fields, field)?).as_secs_f64();
            let pinned = clock::unix_time().as_secs_f64() - ago;
            let served = scrape.value(metric, &[])?;
            ensure!((served - pinned).abs() < 0.1, "{metric}: {served}, {field}: {pinned}");
        }
        Ok(())
    })
}

#[test]
fn the_metrics_of_what_the_kernel_moves_are_what_bpftool_shows() -> Result<()> {
    isolated(|| {
        let backend = backend();
        let words = ["--listen", PUBLIC, "--backend", &backend, "--metrics", METRICS, "--plane", "sockmap"];
        let _drowse = Drowse::run(&[&words[..], &["--name", NAME, "--", ECHO, &backend]].concat())?;
        let mut open = connect_to(PUBLIC)?;
        eventually("a flow that the kernel moves", SOON, || {
            echo(&mut open, b"is it you")?;
            // The programs are loaded beside the backend's start.
            let Ok(counted) = entry("PROXIED") else { return Ok(None) };
            Ok((number(&counted, "redirected_to_client")? > 0).then_some(()))
        })?;
        let mut over = connect_to(PUBLIC)?;
        eventually("a second one", SOON, || {
            echo(&mut over, b"and this")?;
            Ok((number(&entry("PROXIED")?, "flows_total")? == 2).then_some(()))
        })?;
        drop(over);
        eventually("the second flow to end", SOON, || {
            let counted = entry("PROXIED")?;
            Ok((number(&counted, "flows_open")? == 1 && number(&counted, "flows_total")? == 2).then_some(()))
        })?;
        let (redirected, passed) = ("verdict=\"redirected\"", "verdict=\"passed\"");
        let (scrape, counted) = (Scrape::of(METRICS)?, entry("PROXIED")?);
        for (metric, labels, field) in [
            ("redirected_flows_open", vec![], "flows_open"),
            ("redirected_flows_total", vec![], "flows_total"),
            ("redirection_refused_flows_total", vec![], "refused_total"),
            ("redirection_events_lost_total", vec![], "events_lost_total"),
            ("redirection_peers_total", vec![], "peers_total"),
            ("redirection_bytes_total", vec![TO_BACKEND, redirected], "redirected_to_backend"),
            ("redirection_bytes_total", vec![TO_CLIENT, redirected], "redirected_to_client"),
            ("redirection_bytes_total", vec![TO_BACKEND, passed], "passed_to_backend"),
            ("redirection_bytes_total", vec![TO_CLIENT, passed], "passed_to_client"),
        ] {
            let (served, pinned) = (scrape.count(metric, &labels)?, number(&counted, field)?);
            ensure!(served == pinned, "{metric} {labels:?}: {served}, {field}: {pinned}");
        }
        ensure!(number(&counted, "redirected_to_backend")? >= 9, "{counted}");
        Ok(())
    })
}

/// Everything that bpftool shows of these maps is in the reference, by its name.
#[test]
fn the_reference_has_every_field_of_every_map() -> Result<()> {
    isolated(|| {
        let _drowse = run(&[])?;
        let mut proxied = Client::connect(PUBLIC)?;
        let _open = some_flows()?;
        eventually("a flow that the kernel moves", SOON, || {
            proxied.echo(b"is it you")?;
            Ok((!dump(NAME, "TAKEN")?.is_empty()).then_some(()))
        })?;
        let text = std::fs::read_to_string(workspace().join("docs/reference/maps.md"))?;
        for map in ["SERVICE", "FLOWS", "PUBLIC", "LISTENS", "PORTS", "PROXIED", "DIRECTIONS", "TAKEN"] {
            let (_, section) =
                text.split_once(&format!("\n## {map}\n")).with_context(|| format!("no {map}"))?;
            let section = section.split("\n## ").next().unwrap_or_default();
            let entries = dump(NAME, map)?;
            let first = entries.first().with_context(|| format!("{map} is empty"))?;
            for part in ["key", "value"] {
                let fields = first.pointer(&format!("/formatted/{part}")).and_then(Value::as_object);
                for field in fields.into_iter().flat_map(|fields| fields.keys()) {
                    ensure!(
                        section.contains(&format!("| `{field}` |")),
                        "{map}.{field} is not in the reference"
                    );
                }
            }
        }
        let pins = std::fs::read_dir("/sys/fs/bpf/drowse/test_service")?;
        for pin in pins {
            let name = pin?.file_name().to_string_lossy().into_owned();
            ensure!(text.contains(&format!("\n## {name}\n")), "{name} is pinned and not in the reference");
        }
        Ok(())
    })
}

/// Also with a public socket for every address, which is the metrics' address, too.
#[test]
fn the_metrics_are_not_handed_off_and_not_counted() -> Result<()> {
    isolated(|| {
        let backend = backend();
        let words = ["--listen", ":8080", "--backend", &backend, "--metrics", METRICS, "--plane", "handoff"];
        let command = ["--name", NAME, "--idle-time", "500ms", "--", ECHO, "--behaviour", "whoami", &backend];
        let drowse = Drowse::run(&[&words[..], &command].concat())?;
        ensure!(Scrape::of(METRICS)?.count("wakes_total", &[])? == 0, "a scrape wakes");
        Client::connect(PUBLIC)?.end()?;
        let client = handed_off(PUBLIC)?;
        ensure!(steering_links()?.len() == 1, "nothing steers");
        for _ in 0..10 {
            Scrape::of(METRICS)?;
        }
        let _silent = connect_to(METRICS)?;
        wait_until_open(NAME, 1)?;
        let before = fresh_scrape()?;
        let after = fresh_scrape()?;
        let total = |scrape: &Scrape| scrape.count("flows_total", &[HANDED_OFF]);
        ensure!(total(&before)? == total(&after)?, "scrapes are counted");
        client.end()?;
        // Somebody who looks all the time does not keep it awake.
        eventually("sleep", SOON, || {
            Ok((Scrape::of(METRICS)?.count("state", &["state=\"asleep\""])? == 1).then_some(()))
        })?;
        drop(drowse);
        Ok(())
    })
}

#[test]
fn no_counter_goes_back_when_flows_are_taken_up_from_a_killed_drowse() -> Result<()> {
    isolated(|| {
        let backend = backend();
        let served_by = drowse_tests::whoami::Backend::at(&backend)?;
        let mut killed = Drowse::run(&words(&backend))?;
        let _open = [handed_off(PUBLIC)?, handed_off(PUBLIC)?];
        let before = fresh_scrape()?.count("flows_total", &[HANDED_OFF])?;
        killed.signal(rustix::process::Signal::KILL)?;
        killed.wait_for_exit()?;
        let _next = Drowse::run(&words(&backend))?;
        let mut last = std::collections::BTreeMap::new();
        eventually("the flows to be taken up", SOON, || {
            let scrape = Scrape::of(METRICS)?;
            for (series, value) in scrape.counters()? {
                let before = last.insert(series.to_owned(), value).unwrap_or(0.0);
                ensure!(value >= before, "{series} went from {before} to {value}");
            }
            let open = scrape.count("flows_open", &[HANDED_OFF])?;
            let total = scrape.count("flows_total", &[HANDED_OFF])?;
            Ok((open == 2 && total >= before).then_some(()))
        })?;
        drop(served_by);
        Ok(())
    })
}
