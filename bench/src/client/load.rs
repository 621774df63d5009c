//! A load as a value: what a case asks for, and what came of it.
//!
//! Owns: running a load in this process, or in a child of it where the client has to stand elsewhere (in another
//! network namespace), with the same result. Both travel as JSON, latencies as the histogram's own buckets, so that
//! nothing is lost on the way.

use std::io::Read;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::client::bulk::BulkLoad;
use crate::client::closed::RequestLoad;
use crate::client::fresh::FreshLoad;
use crate::client::paced::PacedLoad;
use crate::process::{Running, readable_within};
use crate::wire::Pattern;

/// A child must have its result by then: every load gives up on a silent peer long before.
const RESULT_WITHIN: Duration = Duration::from_mins(1);

/// What a client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Load {
    /// A closed loop of requests.
    Request(RequestLoad),
    /// Requests at a fixed rate.
    Paced(PacedLoad),
    /// A new connection for each request.
    Fresh(FreshLoad),
    /// Many bytes over one connection.
    Bulk(BulkLoad),
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadResult {
    /// Requests, or in bulk bytes, per second of the time that counts.
    pub per_second: f64,
    /// All requests that were answered, the warm-up's too; a bulk transfer is one.
    pub requests: u64,
    /// All bytes that were sent and received, as far as they are the load's own.
    pub bytes: u64,
    /// Latencies in nanoseconds, where the load has them.
    #[serde(with = "buckets")]
    pub latency: Option<Histogram<u64>>,
    /// The same from the moment at which the request was really sent, where it had another time to be sent.
    #[serde(with = "buckets")]
    pub latency_since_sent: Option<Histogram<u64>>,
    /// How late the client itself was with its requests, in nanoseconds, where they had a time to be sent. It is part
    /// of the latencies.
    #[serde(with = "buckets")]
    pub send_delay: Option<Histogram<u64>>,
}

/// Arguments of a client in a process of its own.
#[derive(Debug, Clone, clap::Args)]
pub struct LoadArgs {
    /// The load as JSON.
    #[arg(long, value_parser = parse)]
    pub spec: Load,
    /// Where to connect.
    #[arg(long)]
    pub address: SocketAddr,
}

fn parse(text: &str) -> Result<Load, serde_json::Error> {
    serde_json::from_str(text)
}

/// Runs one load and prints its result as JSON.
///
/// # Errors
/// When the load fails.
pub fn run(args: &LoadArgs, print: impl Fn(&str) -> Result<()>) -> Result<()> {
    crate::process::raise_file_limit()?;
    let result = args.spec.run(args.address, &Pattern::default())?;
    print(&serde_json::to_string(&result).context("write the result as JSON")?)
}

impl Load {
    /// Flows that a proxy may see at the same time; it may notice the end of one after the start of the next.
    #[must_use]
    pub fn flows(&self) -> usize {
        match self {
            Self::Request(load) => load.connections,
            Self::Paced(load) => load.connections,
            Self::Fresh(load) => load.at_once * 4,
            Self::Bulk(_) => 1,
        }
    }

    /// Runs it in this process.
    ///
    /// # Errors
    /// When a connection fails, stalls, or brings wrong bytes.
    pub fn run(&self, address: SocketAddr, pattern: &Pattern) -> Result<LoadResult> {
        match self {
            Self::Request(load) => load.run(address, pattern),
            Self::Paced(load) => load.run(address, pattern),
            Self::Fresh(load) => load.run(address, pattern),
            Self::Bulk(load) => load.run(address, pattern),
        }
    }

    /// Runs it in a child: `command` starts this program where the client shall stand, and gets the arguments that it
    /// needs.
    ///
    /// # Errors
    /// As [`Load::run`], in the child's own words; and when it cannot be started.
    pub fn run_in_child(&self, mut command: Command, address: SocketAddr) -> Result<LoadResult> {
        let spec = serde_json::to_string(self).context("write a load as JSON")?;
        command.args(["load".to_owned(), format!("--spec={spec}"), format!("--address={address}")]);
        command.stdout(Stdio::piped());
        let mut client = Running::start("client", command)?;
        let mut stdout = client.take_stdout().context("read the client's stdout")?;
        let mut text = String::new();
        // It prints nothing before its result, and that at once.
        if readable_within(&stdout, RESULT_WITHIN)? {
            stdout.read_to_string(&mut text).context("read the client's result")?;
        }
        serde_json::from_str(&text).with_context(|| client.last_words())
    }
}

/// An optional histogram as the list of its buckets that are not empty: value and count.
mod buckets {
    use hdrhistogram::Histogram;
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::client::histogram;

    #[expect(clippy::ref_option, reason = "serde hands out a reference to the field")]
    pub(super) fn serialize<S: Serializer>(
        field: &Option<Histogram<u64>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let list = |all: &Histogram<u64>| -> Vec<(u64, u64)> {
            all.iter_recorded().map(|bucket| (bucket.value_iterated_to(), bucket.count_at_value())).collect()
        };
        field.as_ref().map(list).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Histogram<u64>>, D::Error> {
        let Some(list) = Option::<Vec<(u64, u64)>>::deserialize(deserializer)? else { return Ok(None) };
        let mut all = histogram().map_err(D::Error::custom)?;
        for (value, count) in list {
            all.record_n(value, count).map_err(D::Error::custom)?;
        }
        Ok(Some(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_and_results_survive_the_way_to_a_child_and_back() {
        let time = Duration::from_millis(17);
        let (connections, request_len) = (3, 64);
        for load in [
            Load::Request(RequestLoad { connections, request_len, warm_up_time: time, measured_time: time }),
            Load::Bulk(BulkLoad { direction: crate::client::bulk::Direction::Both, bytes: u64::MAX }),
        ] {
            assert_eq!(parse(&serde_json::to_string(&load).unwrap()).unwrap(), load);
        }
        let mut latency = crate::client::histogram().unwrap();
        for value in [1, 999, 1_000, 123_456, 7_000_000_001, u64::MAX] {
            latency.saturating_record_n(value, 3);
        }
        let result = LoadResult {
            per_second: 0.1,
            requests: 6,
            bytes: 7,
            latency: Some(latency.clone()),
            latency_since_sent: Some(latency),
            send_delay: None,
        };
        let back: LoadResult = serde_json::from_str(&serde_json::to_string(&result).unwrap()).unwrap();
        assert_eq!(back, result);
        assert_eq!(
            back.latency.unwrap().value_at_quantile(0.5),
            result.latency.unwrap().value_at_quantile(0.5)
        );
    }

    #[test]
    fn a_load_that_nobody_knows_is_refused() {
        assert!(parse(r#"{"bulk":{"direction":"sideways","bytes":1}}"#).is_err());
        assert!(parse(r#"{"bulk":{"direction":"up","bytes":1,"speed":2}}"#).is_err());
    }
}
