//! Ring 1: what Prometheus itself makes of the metrics, and of what is in `contrib/` and in the documentation.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use drowse_tests::deadline::eventually;
use drowse_tests::process::{Drowse, SOON, backend, connect, echo, one_request, own_address, public};
use drowse_tests::scrape::{Scrape, metrics};
use drowse_tests::workspace;
use serde_json::Value;

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");

/// What the names of our metrics begin with.
const PREFIX: &str = "drowse_";

fn run() -> Result<Drowse> {
    let (public, backend, at) = (public(), backend(), metrics());
    let addresses = ["--name", "echo", "--listen", &public, "--backend", &backend, "--metrics", &at];
    Drowse::run(&[&addresses[..], &["--plane", "splice", "--", ECHO, &backend]].concat())
}

/// A scrape of a service that is awake.
fn scrape() -> Result<Scrape> {
    let _drowse = run()?;
    one_request(b"good morning")?;
    Scrape::of(&metrics())
}

fn contrib(file: &str) -> PathBuf {
    workspace().join("contrib").join(file)
}

fn promtool(arguments: &[&str], input: &str) -> Result<Output> {
    let mut promtool = Command::new("promtool");
    promtool.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = promtool.spawn().context("run promtool (cargo xtask install as root)")?;
    child.stdin.take().context("its input")?.write_all(input.as_bytes()).context("give it the metrics")?;
    child.wait_with_output().context("wait for promtool")
}

#[test]
fn promtool_has_nothing_against_the_metrics() -> Result<()> {
    let scrape = scrape()?;
    let output = promtool(&["check", "metrics"], &scrape.classic())?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && said.is_empty(), "{}: {said}", output.status);
    // It does look: a counter by another name is none of its liking.
    let worse = scrape.classic().replace("drowse_wakes_total", "drowse_wakes");
    let output = promtool(&["check", "metrics"], &worse)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && said.contains("drowse_wakes"), "{said}");
    Ok(())
}

#[test]
fn promtool_has_nothing_against_the_alerts_and_their_tests_pass() -> Result<()> {
    let (rules, tests) = (contrib("alerts.yml"), contrib("alerts_test.yml"));
    let path = |path: &Path| path.to_str().map(str::to_owned).context("a path");
    let output = promtool(&["check", "rules", &path(&rules)?], "")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success() && said.contains("2 rules found"), "{output:?}");
    let output = promtool(&["test", "rules", &path(&tests)?], "")?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

/// A Prometheus that asks drowse. It dies with the test.
struct Prometheus {
    child: Child,
    address: String,
    _directory: tempfile::TempDir,
}

impl Prometheus {
    fn start() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let config = directory.path().join("prometheus.yml");
        let address = format!("{}:9090", own_address());
        std::fs::write(
            &config,
            format!(
                "global: {{ scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 200ms }}\n\
                 rule_files: [{}]\n\
                 scrape_configs:\n- job_name: drowse\n  static_configs: [ {{ targets: ['{}'] }} ]\n",
                contrib("alerts.yml").canonicalize()?.display(),
                metrics()
            ),
        )?;
        let mut prometheus = Command::new("setpriv");
        prometheus.args(["--pdeathsig", "KILL", "--", "prometheus", "--log.level=error"]);
        prometheus.arg(format!("--config.file={}", config.display()));
        prometheus.arg(format!("--storage.tsdb.path={}", directory.path().join("data").display()));
        prometheus.arg(format!("--web.listen-address={address}"));
        let child = prometheus.spawn().context("run prometheus (cargo xtask install as root)")?;
        Ok(Self { child, address, _directory: directory })
    }

    /// The result of a query; empty if there is none, or not yet.
    fn query(&self, query: &str) -> Result<Vec<Value>> {
        let answer = self.api(&["--data-urlencode", &format!("query={query}")], "query")?;
        let found = answer.pointer("/data/result").and_then(Value::as_array);
        Ok(found.with_context(|| format!("{query}: {answer}"))?.clone())
    }

    fn api(&self, arguments: &[&str], path: &str) -> Result<Value> {
        let url = format!("http://{}/api/v1/{path}", self.address);
        let output = Command::new("curl")
            .args(["--silent", "--get", "--max-time", "5"])
            .args(arguments)
            .arg(url)
            .output();
        let output = output.context("run curl")?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("understand the answer of {path}: {output:?}"))
    }

    /// Waits until it answers and has asked drowse, with success.
    fn wait_for_scrape(&self) -> Result<()> {
        eventually("a scrape", SOON, || {
            let Ok(found) = self.query("up{job=\"drowse\"}") else { return Ok(None) };
            Ok(found.first().is_some_and(|up| up.pointer("/value/1") == Some(&"1".into())).then_some(()))
        })
        .with_context(|| format!("its targets: {:?}", self.api(&[], "targets")))
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _gone_already = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Every expression of the dashboard, with what Grafana puts in place of its variables.
fn expressions() -> Result<Vec<String>> {
    let text = std::fs::read_to_string(contrib("grafana-dashboard.json"))?;
    let dashboard: Value = serde_json::from_str(&text).context("read the dashboard")?;
    let panels = dashboard.get("panels").and_then(Value::as_array).context("panels")?;
    let targets = panels.iter().filter_map(|panel| panel.get("targets")?.as_array()).flatten();
    let expressions: Option<Vec<&str>> = targets.map(|target| target.get("expr")?.as_str()).collect();
    let filled = |expression: &str| {
        expression.replace("$name", ".*").replace("$__rate_interval", "1m").replace("$__range", "1h")
    };
    let expressions: Vec<String> =
        expressions.context("a target without expr")?.into_iter().map(filled).collect();
    ensure!(expressions.len() >= panels.len() && panels.len() >= 8, "an empty dashboard");
    ensure!(expressions.iter().all(|one| !one.contains('$')), "a variable that the test does not know");
    Ok(expressions)
}

/// The names of our metrics in a text.
fn names_in(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c: char| !is_part(c));
    words.filter(|word| word.starts_with(PREFIX)).map(str::to_owned).collect()
}

#[test]
fn a_real_prometheus_takes_it_and_answers_every_question_of_the_dashboard() -> Result<()> {
    let _drowse = run()?;
    let prometheus = Prometheus::start()?;
    prometheus.wait_for_scrape()?;
    let mut client = connect()?;
    echo(&mut client, b"good morning")?;
    let wait_for = |query: &str, value: &str| {
        eventually(query, SOON, || {
            let found = prometheus.query(query)?;
            Ok((found.len() == 1 && found[0]["value"][1] == value).then_some(()))
        })
    };
    wait_for("drowse_flows_open{name=\"echo\",group=\"proxied\"}", "1")?;
    wait_for("drowse_transferred_bytes_total{group=\"proxied\",direction=\"to_client\"}", "12")?;
    wait_for("drowse_activation_duration_seconds_count", "1")?;
    wait_for("drowse_state{state=\"awake\"} == 1", "1")?;
    wait_for("drowse_build_info", "1")?;
    wait_for("count(drowse_activation_duration_seconds_bucket)", "17")?;

    // It knows types, help and units: it read OpenMetrics.
    let metadata = prometheus.api(&[], "metadata")?;
    let scrape = Scrape::of(&metrics())?;
    for (name, family) in &scrape.families {
        let known = &metadata["data"][name][0];
        ensure!(known["type"] == family.kind && known["help"] == family.help, "{name}: {known}");
        ensure!(known["unit"] == family.unit, "{name}: {known}");
    }
    let rules = prometheus.api(&[], "rules")?;
    let group = rules["data"]["groups"][0]["rules"].as_array().context("the alerts")?.clone();
    ensure!(group.len() == 2 && group.iter().all(|rule| rule["health"] != "err"), "{rules}");

    for expression in expressions()? {
        let found = prometheus.query(&expression)?;
        let may_be_none = expression.contains("> 0");
        ensure!(may_be_none || !found.is_empty(), "no answer to {expression}");
    }
    Ok(())
}

#[test]
fn dashboard_and_alerts_name_only_what_is_served() -> Result<()> {
    let served: BTreeSet<String> = scrape()?.names().into_iter().collect();
    let alerts = std::fs::read_to_string(contrib("alerts.yml"))?;
    let expressions = expressions()?.join("\n");
    for (text, at_least) in [(alerts.as_str(), 4), (expressions.as_str(), 10)] {
        let named = names_in(text);
        let unknown: Vec<_> = named.difference(&served).collect();
        ensure!(unknown.is_empty(), "not served: {unknown:?}");
        ensure!(named.len() >= at_least, "{named:?}");
    }
    Ok(())
}

#[test]
fn the_documentation_lists_every_metric_as_it_is_served() -> Result<()> {
    let scrape = scrape()?;
    let text = std::fs::read_to_string(workspace().join("docs/reference/metrics.md"))?;
    let rows = text.lines().filter(|line| line.starts_with("| `drowse_"));
    let rows: Vec<Vec<&str>> =
        rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect()).collect();
    let mut documented: Vec<Vec<String>> = rows
        .into_iter()
        .filter(|row| row.len() == 5)
        .map(|row| row.into_iter().map(|cell| cell.replace('`', "")).collect())
        .collect();
    let mut served: Vec<Vec<String>> = scrape
        .families
        .iter()
        .map(|(name, family)| {
            let suffix = match &*family.kind {
                "counter" => "_total",
                "info" => "_info",
                _ => "",
            };
            let of_it = |series: &&String| scrape.family_of(series).is_some_and(|(of, _)| of == name);
            let labels = scrape.samples.keys().find(of_it).map(|series| labels(series));
            // Only with hand-off or redirection, which ring 2 has.
            let of_ring_2 = || match name.as_str() {
                "drowse_handoff_packets" => "address, verdict".to_owned(),
                "drowse_redirection_bytes" => "direction, verdict".to_owned(),
                _ => String::new(),
            };
            let labels = labels.unwrap_or_else(of_ring_2);
            vec![
                format!("{name}{suffix}"),
                family.kind.clone(),
                family.unit.clone(),
                labels,
                family.help.clone(),
            ]
        })
        .collect();
    documented.sort();
    served.sort();
    for (documented, served) in documented.iter().zip(&served) {
        ensure!(documented == served, "documented: {documented:?}\nserved:     {served:?}");
    }
    ensure!(documented.len() == served.len(), "{} documented, {} served", documented.len(), served.len());
    let unknown: Vec<_> = names_in(&text).into_iter().filter(|name| !scrape.names().contains(name)).collect();
    ensure!(unknown == ["drowse_activation_duration_seconds"], "documented and not served: {unknown:?}");
    Ok(())
}

/// The labels of a sample beside those that all have.
fn labels(series: &str) -> String {
    let (_, labels) = series.split_once('{').unwrap_or_default();
    let keys = labels.split(',').filter_map(|label| Some(label.split_once('=')?.0));
    keys.filter(|key| !matches!(*key, "name" | "le")).collect::<Vec<_>>().join(", ")
}
