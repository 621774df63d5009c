//! Every plane moves the same bytes: one suite, run for each plane.
//!
//! Owns: the tests, by theme, and their list; a test binary names planes and how each test is run. A flow here
//! is client <-> C | B <-> backend; C and B belong to the plane. All waiting has a deadline: sockets time out,
//! and what no socket tells is asked for again until a minute is over.
#![expect(
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by a panic"
)]

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use drowse::accounting::Accounting;
use drowse::ebpf::{Object, facts::BPFFS, layout};
use drowse::plane::Plane;
use drowse::plane::choose::Redirection;
use drowse::plane::forward::{Forward, Mode};
use drowse::plane::sockmap::Sockmap;

use crate::isolated::isolated;

pub mod commands;
pub mod congestion;
pub mod counters;
pub mod ends;
pub mod families;
mod fixture;
pub mod leftovers;
pub mod many;
pub mod resets;
pub mod short_cut;
pub mod sleepers;
pub mod streams;
pub mod torn;

/// A plane by its constructor.
pub type MakePlane = fn(Arc<Accounting>) -> Box<dyn Plane>;

/// The worker threads of a plane under test; its accounting has counters for as many.
pub const WORKERS: usize = 2;

/// The plane `copy`.
#[must_use]
pub fn copy(accounting: Arc<Accounting>) -> Box<dyn Plane> {
    Box::new(Forward::new(Mode::Copy, WORKERS, accounting).unwrap())
}

/// The plane `splice`.
#[must_use]
pub fn splice(accounting: Arc<Accounting>) -> Box<dyn Plane> {
    Box::new(Forward::new(Mode::Splice, WORKERS, accounting).unwrap())
}

/// The plane `sockmap`. Needs root, and namespaces of its own.
#[must_use]
pub fn sockmap(accounting: Arc<Accounting>) -> Box<dyn Plane> {
    in_kernel(Redirection::Own, None, accounting)
}

/// The plane `sockmap`, which takes a flow as it opens, and redirects again as soon as nothing is outstanding, so that bulk
/// goes this way, too. Needs root, and namespaces of its own.
#[must_use]
pub fn sockmap_at_once(accounting: Arc<Accounting>) -> Box<dyn Plane> {
    in_kernel(Redirection::Own, Some(0), accounting)
}

/// The plane `sockmap-ends`. Needs root, and namespaces of its own.
#[must_use]
pub fn sockmap_ends(accounting: Arc<Accounting>) -> Box<dyn Plane> {
    in_kernel(Redirection::Ends, None, accounting)
}

fn in_kernel(wanted: Redirection, calm_bursts: Option<u32>, accounting: Arc<Accounting>) -> Box<dyn Plane> {
    let mut object = Object::load(Path::new(BPFFS), "planes", Some(layout().unwrap())).unwrap();
    let (mut sockmap, announcements) = Sockmap::prepare(&mut object, wanted).unwrap();
    sockmap.calm_bursts = calm_bursts.unwrap_or(sockmap.calm_bursts);
    let mut plane = Forward::new(Mode::Splice, WORKERS, accounting).unwrap();
    plane.use_sockmap(sockmap, announcements).unwrap();
    Box::new(plane)
}

/// Runs a test of a plane where this process is.
///
/// # Errors
/// None.
pub fn here(test: fn(MakePlane), make: MakePlane) -> Result<()> {
    test(make);
    Ok(())
}

/// Runs a test of a plane in namespaces of its own, with buffers of the usual size and no pacing.
///
/// # Errors
/// Not root, or the kernel has no `reno`.
pub fn in_namespaces(test: fn(MakePlane), make: MakePlane) -> Result<()> {
    isolated(|| {
        // The files are those of the opening thread's network namespace. bbr would pace the loopback. The
        // buffers are the kernel's defaults; this machine may have others.
        for (name, value) in [
            ("tcp_congestion_control", "reno"),
            ("tcp_rmem", "4096 131072 6291456"),
            ("tcp_wmem", "4096 16384 4194304"),
        ] {
            std::fs::write(format!("/proc/sys/net/ipv4/{name}"), value)
                .with_context(|| format!("set {name}"))?;
        }
        test(make);
        Ok(())
    })
}

/// The tests of a plane, in a module of the plane's name: `plane_tests!(PLANE, RUN, [SET, ...])`.
///
/// `PLANE` is a [`MakePlane`], `RUN` is [`here`] or [`in_namespaces`], both by a name in the module around.
/// The sets:
///
/// | set | what | needs |
/// |---|---|---|
/// | `everywhere` | what holds for each plane | nothing |
/// | `asleep` | an uncongested flow wakes no thread of the plane (`forward-...`) | a plane that promises it |
/// | `in_kernel` | what the maps hold that flows are in | a plane that has such maps |
/// | `cut_short` | peers send straight to the other side | a plane that has them do it |
/// | `alone` | what needs its own limits, ports, addresses or network namespaces | [`in_namespaces`] |
#[macro_export]
macro_rules! plane_tests {
    ($plane:ident, $run:ident, [$($set:ident),+]) => {
        mod $plane {
            use super::{$plane as make, $run as run};

            $($crate::plane_tests!(@set $set);)+
        }
    };
    (@set everywhere) => {
        $crate::plane_tests! { @tests
            streams::mixed_flows_arrive_whole,
            streams::mixed_tcp_flows_arrive_whole,
            streams::backend_speaks_first,
            streams::bytes_before_the_flow_opens_arrive,
            streams::bytes_that_wait_for_the_flow_arrive,
            streams::tiny_and_huge_writes,
            streams::urgent_bytes_stay_in_the_stream,
            ends::half_close_by_the_client_gets_a_reply,
            ends::half_close_by_the_backend_gets_a_reply,
            ends::half_close_by_both_at_once,
            ends::half_close_passes_a_congested_other_direction,
            ends::half_close_by_the_client_behind_a_backlog,
            ends::half_close_by_the_backend_behind_a_backlog,
            ends::close_by_the_client_behind_a_backlog,
            ends::close_by_the_backend_behind_a_backlog,
            resets::reset_by_the_client_reaches_the_backend,
            resets::reset_by_the_backend_reaches_the_client,
            resets::reset_after_the_fin_is_passed_on,
            resets::last_answer_before_a_reset_arrives_whole,
            resets::last_answer_arrives_when_the_request_hits_the_reset,
            resets::killed_backend_with_a_stalled_client,
            resets::killed_client_with_a_stalled_backend,
            torn::reset_by_the_client_at_full_speed,
            torn::reset_by_the_backend_at_full_speed,
            torn::client_closes_in_mid_download,
            torn::backend_closes_in_mid_upload,
            torn::backend_killed_in_mid_upload,
            torn::stalled_backend_killed_in_mid_upload,
            torn::backend_killed_in_mid_download,
            congestion::slow_reader_blocks_the_sender,
            congestion::congested_and_free_in_turn,
            congestion::no_descriptor_left_for_pipes,
            congestion::one_busy_flow_does_not_starve_others,
            many::short_flows_leave_nothing_behind,
            many::fifteen_hundred_flows_at_once,
            many::idle_flows_hold_nothing_but_sockets,
            counters::counters_follow_the_bytes,
            commands::silent_flows_are_closed_active_ones_stay,
            commands::silent_peers_that_do_not_answer_are_closed,
            commands::silent_congested_flow_is_reset,
            commands::reset_all_resets_both_sides,
            commands::reset_all_delivers_what_was_taken,
            commands::dropped_plane_resets_its_flows,
        }
    };
    (@set alone) => {
        $crate::plane_tests! { @tests
            sleepers::sleeping_client_and_a_blocking_writer,
            sleepers::sleeping_client_and_a_level_triggered_writer,
            sleepers::sleeping_client_and_an_edge_triggered_writer,
            sleepers::sleeping_backend_and_a_blocking_writer,
            sleepers::sleeping_backend_and_a_level_triggered_writer,
            sleepers::sleeping_backend_and_an_edge_triggered_writer,
            sleepers::sleepers_where_unsent_bytes_are_limited,
            congestion::congested_and_free_in_turn_with_large_buffers,
            congestion::tiny_windows_stop_no_edge_triggered_writer,
            many::short_flows_of_every_end_leave_nothing_behind,
            families::every_family_meets_every_other,
            families::mptcp_is_served,
            families::peers_in_other_network_namespaces,
        }
    };
    (@set asleep) => {
        $crate::plane_tests! { @tests
            counters::uncongested_flow_costs_no_switches,
        }
    };
    (@set in_kernel) => {
        $crate::plane_tests! { @tests
            leftovers::flows_of_every_end_leave_no_map_entry,
        }
    };
    (@set cut_short) => {
        $crate::plane_tests! { @tests
            short_cut::both_directions_are_cut_short,
            short_cut::an_edge_triggered_stream_is_cut_short,
            short_cut::other_connections_of_the_backend_are_left_alone,
            short_cut::a_peer_with_an_upper_layer_is_left_alone,
            short_cut::what_peers_notice_is_found_out,
        }
    };
    (@tests $($theme:ident::$test:ident,)+) => {
        $(
            #[test]
            fn $test() -> ::anyhow::Result<()> {
                run($crate::planes::$theme::$test, make)
            }
        )+
    };
}
