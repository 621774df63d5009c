//! One service as OpenMetrics text, <https://github.com/prometheus/OpenMetrics> version 1.0.0.
//!
//! PURE. Owns: names, units and help of all metrics; `docs/reference/metrics.md` lists them. Must never: count anything
//! itself. No label has more values than the code has words, or the service has listeners.

use std::fmt;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeGaugeValue, EncodeMetric as _, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::activation::REASONS;
use crate::report::counters::{OTHER, RedirectedCounters};
use crate::report::snapshot::{HandoffState, Snapshot, StateName};

/// What [`encode`] returns, as HTTP names it.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper bounds of the histogram of wake-ups, in seconds: from a backend that is a shell's child to the default of
/// `--start-timeout`.
const ACTIVATION_SECONDS: [f64; 16] =
    [0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 90.0];

/// How long wake-ups took.
#[must_use]
pub fn activation_histogram() -> Histogram {
    Histogram::new(ACTIVATION_SECONDS)
}

/// `snapshot` as it is at `unix_time`, and how long its wake-ups took.
#[must_use]
pub fn encode(snapshot: Snapshot, activations: Histogram, unix_time: Duration) -> String {
    let name = ("name".into(), snapshot.name.clone().into());
    let mut registry = Registry::with_prefix_and_labels("drowse", std::iter::once(name));
    registry.register_collector(Box::new(Page { snapshot, activations, unix_time }));
    let mut text = String::new();
    let _infallible = prometheus_client::encoding::text::encode(&mut text, &registry);
    text
}

#[derive(Debug)]
struct Page {
    snapshot: Snapshot,
    activations: Histogram,
    unix_time: Duration,
}

type Labels<'a> = Vec<(&'a str, &'a str)>;

const NONE: Labels<'static> = Vec::new();

/// A metric's name without `drowse_`, its unit and `_total`; what it tells.
struct Family(&'static str, Option<Unit>, &'static str);

impl Family {
    fn counters<'a>(
        &self,
        page: &mut DescriptorEncoder<'_>,
        samples: impl IntoIterator<Item = (Labels<'a>, u64)>,
    ) -> fmt::Result {
        let mut metric = page.encode_descriptor(self.0, self.2, self.1.as_ref(), MetricType::Counter)?;
        for (labels, value) in samples {
            metric.encode_family(&labels)?.encode_counter::<NoLabelSet, u64, f64>(&value, None)?;
        }
        Ok(())
    }

    fn gauges<'a, V: EncodeGaugeValue>(
        &self,
        page: &mut DescriptorEncoder<'_>,
        samples: impl IntoIterator<Item = (Labels<'a>, V)>,
    ) -> fmt::Result {
        let mut metric = page.encode_descriptor(self.0, self.2, self.1.as_ref(), MetricType::Gauge)?;
        for (labels, value) in samples {
            metric.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    }

    fn counter(&self, page: &mut DescriptorEncoder<'_>, value: u64) -> fmt::Result {
        self.counters(page, [(NONE, value)])
    }

    fn gauge(&self, page: &mut DescriptorEncoder<'_>, value: u64) -> fmt::Result {
        self.gauges(page, [(NONE, value)])
    }
}

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.service(&mut encoder)?;
        self.flows(&mut encoder)?;
        self.redirection(&mut encoder)?;
        self.activation(&mut encoder)?;
        self.kernel(&mut encoder)
    }
}

impl Page {
    /// Unix time of what was `ago_s` seconds ago, to the millisecond: clocks are read one after the other.
    fn at(&self, ago_s: f64) -> f64 {
        ((self.unix_time.as_secs_f64() - ago_s) * 1000.0).round() / 1000.0
    }

    /// A gauge of a moment, without a value if there was none.
    fn moment(&self, page: &mut DescriptorEncoder<'_>, family: &Family, ago_s: Option<f64>) -> fmt::Result {
        family.gauges(page, ago_s.map(|ago_s| (NONE, self.at(ago_s))))
    }

    fn service(&self, page: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let it = &self.snapshot;
        page.encode_descriptor("build", "The drowse that runs.", None, MetricType::Info)?
            .encode_info(&[("version", env!("CARGO_PKG_VERSION"))])?;
        let unit = it.unit.as_deref().unwrap_or_default();
        page.encode_descriptor("backend", "The backend; unit is empty without one.", None, MetricType::Info)?
            .encode_info(&[("unit", unit), ("address", &it.backend), ("plane", &it.plane.forward)])?;
        Family("state", None, "State of the backend: 1 for the state that it is in, 0 for the others.")
            .gauges(
                page,
                StateName::ALL.map(|state| (vec![("state", state.word())], u64::from(state == it.state))),
            )?;
        let since = Family(
            "state_since_timestamp",
            Some(Unit::Seconds),
            "When the backend came into its state, unix time.",
        );
        self.moment(page, &since, it.since_s)?;
        Family(
            "connections_max",
            None,
            "Flows and held clients that there may be; more wait in the backlog.",
        )
        .gauge(page, it.connections_max)?;
        Family("clients_held", None, "Clients that are accepted and wait for the backend.")
            .gauge(page, it.held)?;
        let refused = it.refused;
        Family("clients_refused", None, "Clients that --allow or --max-per-source turned away, by which.")
            .counters(
                page,
                [("may_not_wake", refused.may_not_wake), ("too_many_of_source", refused.too_many_of_source)]
                    .map(|(reason, count)| (vec![("reason", reason)], count)),
            )
    }

    fn flows(&self, page: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let (it, counters) = (&self.snapshot, &self.snapshot.counters);
        let group = |group| vec![("group", group)];
        let (proxied, handed_off) = (it.flows.proxied, it.flows.handed_off);
        Family(
            "flows_open",
            None,
            "Open flows, by who moves their bytes: drowse, or the backend and the kernel alone.",
        )
        .gauges(page, [(group("proxied"), proxied.open), (group("handed_off"), handed_off.open)])?;
        Family("flows", None, "Flows, open ones included.")
            .counters(page, [(group("proxied"), proxied.total), (group("handed_off"), handed_off.total)])?;
        let of_drowse = |all: u64, handed_off: u64| all.saturating_sub(handed_off);
        let to_backend = counters.handed_off_bytes_to_backend;
        let to_client = counters.handed_off_bytes_to_client;
        let bytes = [
            ("proxied", "to_backend", of_drowse(it.bytes_to_backend, to_backend)),
            ("proxied", "to_client", of_drowse(it.bytes_to_client, to_client)),
            ("handed_off", "to_backend", to_backend),
            ("handed_off", "to_client", to_client),
        ];
        Family("transferred", Some(Unit::Bytes), "Bytes that reached the backend or the clients.").counters(
            page,
            bytes.map(|(group, direction, bytes)| (vec![("group", group), ("direction", direction)], bytes)),
        )?;
        let last = Family(
            "last_activity_timestamp",
            Some(Unit::Seconds),
            "When a flow last opened, closed or moved a byte, unix time. No value: never.",
        );
        self.moment(page, &last, counters.last_activity_ago_s)
    }

    /// What the kernel does of the proxied flows; without value where it moves none.
    fn redirection(&self, page: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let counted = self.snapshot.counters.redirected;
        let one = |value: fn(RedirectedCounters) -> u64| counted.map(|counted| (NONE, value(counted)));
        Family(
            "redirected_flows_open",
            None,
            "Open proxied flows whose bytes the kernel moves. No value: it moves none (plane sockmap).",
        )
        .gauges(page, one(|counted| counted.flows_open))?;
        Family(
            "redirected_flows",
            None,
            "Of the proxied flows those whose bytes the kernel moves, or moved.",
        )
        .counters(page, one(|counted| counted.flows_total))?;
        Family(
            "redirection_refused_flows",
            None,
            "Proxied flows that the kernel does not take, or has no room for.",
        )
        .counters(page, one(|counted| counted.refused_total))?;
        let bytes = counted.into_iter().flat_map(|counted| {
            [
                ("to_backend", "redirected", counted.redirected_to_backend),
                ("to_client", "redirected", counted.redirected_to_client),
                ("to_backend", "passed", counted.passed_to_backend),
                ("to_client", "passed", counted.passed_to_client),
            ]
        });
        Family(
            "redirection",
            Some(Unit::Bytes),
            "Bytes of these flows: redirected by the kernel, or passed to drowse since the receiver did not keep up.",
        )
        .counters(
            page,
            bytes.map(|(direction, verdict, bytes)| {
                (vec![("direction", direction), ("verdict", verdict)], bytes)
            }),
        )?;
        Family(
            "redirection_events_lost",
            None,
            "Times that the kernel began to pass bytes and could not tell drowse at once.",
        )
        .counters(page, one(|counted| counted.events_lost_total))?;
        Family(
            "redirection_peers",
            None,
            "Peers of these flows that were let send straight to the other side.",
        )
        .counters(page, one(|counted| counted.peers_total))
    }

    fn activation(&self, page: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let (it, counters) = (&self.snapshot, &self.snapshot.counters);
        Family("wakes", None, "Starts of the backend for a client, also those that failed.")
            .counter(page, counters.wakes_total)?;
        Family("activations", None, "Wake-ups that succeeded.").counter(page, it.activations_total)?;
        let took = "From the start of the backend to the first connection that it accepts, of wake-ups that succeeded.";
        let seconds = Unit::Seconds;
        let histogram =
            page.encode_descriptor("activation_duration", took, Some(&seconds), MetricType::Histogram)?;
        self.activations.encode(histogram)?;
        Family("stops", None, "How often the backend was put to sleep.")
            .counter(page, counters.stops_total)?;
        let failures =
            |reason| (vec![("reason", reason)], counters.failures.get(reason).copied().unwrap_or(0));
        Family(
            "failures",
            None,
            "Starts that failed, crashes, and stops that failed, by systemd's or drowse's word for it.",
        )
        .counters(page, REASONS.into_iter().chain([OTHER]).map(failures))
    }

    fn kernel(&self, page: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let counters = &self.snapshot.counters;
        let on = u64::from(self.snapshot.plane.handoff.state == HandoffState::On);
        Family("handoff_active", None, "1 while new connections go straight to the backend, else 0.")
            .gauge(page, on)?;
        let last = Family(
            "handoff_last_activity_timestamp",
            Some(Unit::Seconds),
            "When a flow that was handed off last opened, closed or was seen to have moved a byte, unix time. No value: never.",
        );
        self.moment(page, &last, counters.handed_off_activity_ago_s)?;
        Family(
            "handoff_uncounted_flows",
            None,
            "Flows that were handed off and that the kernel's table had no room for.",
        )
        .counter(page, counters.uncounted_total)?;
        let packets = counters.public.iter().flat_map(|public| {
            let labels = |verdict| vec![("address", public.address.as_str()), ("verdict", verdict)];
            [(labels("steered"), public.steered_total), (labels("passed"), public.passed_total)]
        });
        Family(
            "handoff_packets",
            None,
            "First packets of connections to a public address: given to the backend, or left to drowse.",
        )
        .counters(page, packets)?;
        let listens = counters.listens.as_ref();
        let one = |value: fn(&super::counters::ListenCounters) -> u64| {
            listens.map(|listens| (NONE, value(listens)))
        };
        Family(
            "backend_listens",
            None,
            "Sockets that began to listen on the backend's port. No value: no listen hook.",
        )
        .counters(page, one(|listens| listens.listens_total))?;
        Family("backend_listen_events_lost", None, "Of these, the ones that drowse was not told of.")
            .counters(page, one(|listens| listens.events_lost_total))?;
        let last = Family(
            "backend_last_listen_timestamp",
            Some(Unit::Seconds),
            "When a socket last began to listen on the backend's port, unix time. No value: never.",
        );
        self.moment(page, &last, listens.and_then(|listens| listens.last_ago_s))
    }
}
