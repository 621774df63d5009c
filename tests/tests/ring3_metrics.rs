//! Ring 3: metrics of the shipped unit, in its sandbox.

use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use drowse_tests::deadline::eventually;
use drowse_tests::scrape::{Scrape, request};
use drowse_tests::service::{Installation, SOON, with_deadline, with_drowse};

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");

fn scrape(installation: &Installation) -> Result<Scrape> {
    let stream = installation.systemd.in_netns(|| TcpStream::connect("127.0.0.1:9101"))??;
    with_deadline(&stream)?;
    Scrape::read(request(stream, "GET", "/metrics")?.body)
}

#[test]
fn a_unit_is_counted_by_name_and_by_its_results() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo("", "DROWSE_IDLE_TIME=1s\nDROWSE_METRICS=127.0.0.1:9101")?;
        installation.ask()?;
        let awake = scrape(installation)?;
        ensure!(
            awake.count("backend_info", &["unit=\"echo.service\"", "name=\"echo\""])? == 1,
            "{}",
            awake.text
        );
        ensure!(awake.count("activations_total", &[])? == 1, "{}", awake.text);
        installation.wait_asleep("echo")?;
        ensure!(scrape(installation)?.count("stops_total", &[])? == 1);

        installation.echo_unit("--exit 3", "")?;
        ensure!(installation.ask().is_err(), "served by a backend that does not start");
        eventually("the failure", SOON, || {
            let failures = scrape(installation)?.count("failures_total", &["reason=\"exit-code\""])?;
            Ok((failures == 1).then_some(()))
        })?;
        let all: u64 = scrape(installation)?
            .samples
            .iter()
            .filter(|(series, _)| series.starts_with("drowse_failures_total"))
            .filter_map(|(_, value)| value.parse::<u64>().ok())
            .sum();
        ensure!(all == 1, "{all} failures");
        Ok(())
    })
}

#[test]
fn a_unix_socket_in_the_runtime_directory_is_for_root_alone() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo("", "DROWSE_METRICS=/run/drowse/echo.metrics")?;
        installation.ask()?;
        let path = installation.systemd.path("/run/drowse/echo.metrics");
        let mode = std::fs::metadata(&path).context("find the socket")?;
        let mode = std::os::unix::fs::PermissionsExt::mode(&mode.permissions());
        ensure!(mode.trailing_zeros() >= 6, "{mode:o}");
        let answer = request(UnixStream::connect(&path)?, "GET", "/metrics")?;
        ensure!(answer.status == 200 && Scrape::read(answer.body)?.count("wakes_total", &[])? == 1);
        let said = installation.systemd.call(["drowse", "status"])?;
        ensure!(said.lines().count() == 2, "the metrics are taken for a service: {said}");
        Ok(())
    })
}

/// Clients wait at systemd's socket until drowse runs: they are served without metrics, too.
#[test]
fn an_address_that_is_taken_costs_the_metrics_and_not_the_service() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let _taken = installation.systemd.in_netns(|| std::net::TcpListener::bind("127.0.0.1:9101"))??;
        installation.echo("", "DROWSE_METRICS=127.0.0.1:9101")?;
        installation.ask()?;
        let said = installation.systemd.lines_of("drowse@echo.service")?.join("\n");
        ensure!(said.contains("there are no metrics: ") && said.contains("127.0.0.1:9101"), "{said}");
        Ok(())
    })
}
