//! The metrics endpoint as a scraper asks it, and its text as Prometheus understands it.
//!
//! Must never: know a metric's name; what is read is compared by the tests.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read, Write};

use anyhow::{Context, Result, bail, ensure};

use crate::process::{connect_to, own_address};

/// Where tests let drowse serve metrics: `ADDRESS:PORT`.
#[must_use]
pub fn metrics() -> String {
    format!("{}:9101", own_address())
}

/// An answer of the endpoint.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status of HTTP.
    pub status: u16,
    /// Everything before the body, in lower case.
    pub head: String,
    /// The body.
    pub body: String,
}

/// What `stream` answers to this request.
///
/// # Errors
/// The connection breaks, or the answer is no HTTP.
pub fn request(mut stream: impl Read + Write, method: &str, path: &str) -> Result<Answer> {
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: drowse\r\nConnection: close\r\n\r\n")
        .context("send the request")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("receive the answer")?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("no head in {answer:?}"))?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok(Answer {
        status: status.with_context(|| format!("no status in {head:?}"))?,
        head: head.to_lowercase(),
        body: body.to_owned(),
    })
}

/// A whole exposition, read.
#[derive(Clone, Debug, Default)]
pub struct Scrape {
    /// The text.
    pub text: String,
    /// Samples by name and labels, as they are written.
    pub samples: BTreeMap<String, String>,
    /// The families by name.
    pub families: BTreeMap<String, Family>,
}

/// What the exposition says of a family of metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Family {
    /// `counter`, `gauge`, ...
    pub kind: String,
    /// `seconds`, `bytes`, or empty.
    pub unit: String,
    /// What it tells.
    pub help: String,
}

impl Scrape {
    /// Asks the endpoint at `address`.
    ///
    /// # Errors
    /// It does not answer, or not with OpenMetrics text.
    pub fn of(address: &str) -> Result<Self> {
        let answer = request(connect_to(address)?, "GET", "/metrics")?;
        ensure!(answer.status == 200, "{answer:?}");
        let kind = "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8";
        ensure!(answer.head.lines().any(|line| line == kind), "{}", answer.head);
        Self::read(answer.body)
    }

    /// Reads OpenMetrics text.
    ///
    /// # Errors
    /// It is none; a sample comes twice, or has no family.
    pub fn read(text: String) -> Result<Self> {
        let mut scrape = Self::default();
        let lines = text.strip_suffix("# EOF\n").context("no end")?.lines();
        for line in lines {
            let words: Vec<&str> = line.splitn(4, ' ').collect();
            if let ["#", key, name, rest] = *words.as_slice() {
                let family = scrape.families.entry(name.to_owned()).or_default();
                let field = match key {
                    "TYPE" => &mut family.kind,
                    "UNIT" => &mut family.unit,
                    "HELP" => &mut family.help,
                    _ => bail!("an unknown line: {line}"),
                };
                ensure!(field.is_empty(), "twice: {line}");
                rest.clone_into(field);
                continue;
            }
            let (series, value) = line.rsplit_once(' ').with_context(|| format!("no value: {line}"))?;
            ensure!(scrape.family_of(series).is_some(), "no family: {line}");
            let before = scrape.samples.insert(series.to_owned(), value.to_owned());
            ensure!(before.is_none(), "twice: {line}");
        }
        Ok(Self { text, ..scrape })
    }

    /// The family that a sample of this name belongs to.
    #[must_use]
    pub fn family_of(&self, series: &str) -> Option<(&str, &Family)> {
        let name = series.split('{').next()?;
        let has = |(family, found): &(&String, &Family)| {
            let suffixes: &[&str] = match &*found.kind {
                "counter" => &["_total"],
                "histogram" => &["_bucket", "_count", "_sum"],
                "info" => &["_info"],
                _ => &[""],
            };
            suffixes.iter().any(|suffix| name.strip_suffix(suffix) == Some(family))
        };
        self.families.iter().find(has).map(|(name, family)| (name.as_str(), family))
    }

    /// Every name that an expression may have: those of the samples, also of families that have none now.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let of = |(name, family): (&String, &Family)| -> Vec<String> {
            match &*family.kind {
                "counter" => vec![format!("{name}_total")],
                "histogram" => ["_bucket", "_count", "_sum"].map(|suffix| format!("{name}{suffix}")).into(),
                "info" => vec![format!("{name}_info")],
                _ => vec![name.clone()],
            }
        };
        self.families.iter().flat_map(of).collect()
    }

    /// The one sample `drowse_NAME` that has all of `labels`, written `key="value"`.
    ///
    /// # Errors
    /// There is none, or more than one, or it is no number.
    pub fn value(&self, name: &str, labels: &[&str]) -> Result<f64> {
        Ok(self.sample(name, labels)?.parse()?)
    }

    /// The same, of one that is a whole number.
    ///
    /// # Errors
    /// There is none, or more than one, or it is no whole number.
    pub fn count(&self, name: &str, labels: &[&str]) -> Result<u64> {
        Ok(self.sample(name, labels)?.parse()?)
    }

    fn sample(&self, name: &str, labels: &[&str]) -> Result<&str> {
        let fits = |series: &str| {
            let (found, rest) = series.split_once('{').unwrap_or((series, "}"));
            let has = |label: &&str| rest.trim_end_matches('}').split(',').any(|one| one == *label);
            found.strip_prefix("drowse_") == Some(name) && labels.iter().all(has)
        };
        let found: Vec<_> = self.samples.iter().filter(|(series, _)| fits(series)).collect();
        match *found.as_slice() {
            [(_, value)] => Ok(value),
            _ => bail!("not one {name} with {labels:?}: {found:?} in\n{}", self.text),
        }
    }

    /// The samples that only grow: counters and what a histogram counts.
    ///
    /// # Errors
    /// One is no number.
    pub fn counters(&self) -> Result<BTreeMap<&str, f64>> {
        let grows = |series: &str| {
            self.family_of(series).is_some_and(|(_, family)| matches!(&*family.kind, "counter" | "histogram"))
        };
        let counters = self.samples.iter().filter(|(series, _)| grows(series));
        counters.map(|(series, value)| Ok((&**series, value.parse()?))).collect()
    }

    /// The same in the older text format of Prometheus, which `promtool check metrics` reads: there a family has the
    /// name that its samples have, an info is a gauge, and there are no units.
    #[must_use]
    pub fn classic(&self) -> String {
        let mut text = String::new();
        for (name, family) in &self.families {
            let (suffix, kind) = match &*family.kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                kind => ("", kind),
            };
            let _infallible =
                writeln!(text, "# HELP {name}{suffix} {}\n# TYPE {name}{suffix} {kind}", family.help);
            for line in self.text.lines().filter(|line| !line.starts_with('#')) {
                if self.family_of(line).is_some_and(|(of, _)| of == name) {
                    let _infallible = writeln!(text, "{line}");
                }
            }
        }
        text
    }
}
