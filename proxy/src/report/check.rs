//! `drowse check`: what is possible on this machine, why not, and how to get it; and what the running services use.
//!
//! Owns: the looks that belong to no stage, and the words. Must never: change anything.
//! Rests on: `sk_lookup` programs choose a listener since Linux 5.9; 5.15 is the oldest kernel that hand-off is made
//! for.

use std::io::{Read as _, Write as _};

use anyhow::{Context as _, ensure};
use rustix::pipe::{SpliceFlags, pipe, splice};
use serde::Serialize;

use crate::config::LookArgs;
use crate::ebpf::{Answer, Availability, Fact, Object, availability, kernel_version, layout_for_sockmap};
use crate::plane::choose::Redirection;
use crate::plane::sockmap::{self, Sockmap};
use crate::report::control::{self, Service};
use crate::report::text::table;
use crate::report::{Said, status};

/// The oldest kernel for hand-off, major and minor.
const HANDOFF_KERNEL: (u32, u32) = (5, 15);

/// What was found, as `--json` has it.
#[derive(Clone, Debug, Serialize)]
pub struct Findings {
    /// What the faster planes and the listen hook need.
    pub requirements: Vec<Fact>,
    /// Whether each plane is possible here; the fastest first.
    pub planes: Vec<Fact>,
    /// The public listeners of every running service that answers.
    pub listeners: Vec<Listener>,
    /// Services that do not answer, and why, a line each.
    pub silent: Vec<String>,
}

/// A public listener of a running service.
#[derive(Clone, Debug, Serialize)]
pub struct Listener {
    /// The service's name.
    pub service: String,
    /// The listener's address, with systemd's name for it.
    pub address: String,
    /// The plane of its connections: `handoff`, `sockmap`, `sockmap-ends`, `splice` or `copy`.
    pub plane: String,
    /// Why it is not handed off. `null`: it is, or nobody said.
    pub reason: Option<String>,
}

/// Answers `drowse check`: no success if something could not be found out.
///
/// # Errors
/// A directory with status sockets cannot be read.
pub async fn check(args: &LookArgs) -> anyhow::Result<Said> {
    let services = control::ask_all(&control::directories(args.runtime_dir.as_deref()), |_| true).await?;
    let available = availability();
    let sockmap = sockmap_fact(&available);
    let proxying = [sockmap_ends_fact(&sockmap), sockmap, splice_fact()];
    let findings = findings(&available, handoff_facts(), proxying, &services);
    let facts = findings.requirements.iter().chain(&findings.planes);
    let unknown = facts.filter(|fact| fact.answer == Answer::Unknown).count();
    let answer = if args.json {
        serde_json::to_string_pretty(&findings).context("write JSON")? + "\n"
    } else {
        text(&findings)
    };
    let success = unknown == 0 && findings.silent.is_empty();
    Ok(Said { answer, notes: findings.silent, success })
}

/// What hand-off needs of this machine, whatever the service.
#[must_use]
pub fn handoff_facts() -> Vec<Fact> {
    let release = rustix::system::uname();
    let Availability { object, capabilities, bpffs, cgroup2, .. } = availability();
    vec![kernel(&release.release().to_string_lossy()), object, capabilities, cgroup2, bpffs]
}

fn kernel(release: &str) -> Fact {
    let (major, minor) = HANDOFF_KERNEL;
    let (answer, reason) = match kernel_version(release) {
        Some(version) if version >= HANDOFF_KERNEL => (Answer::Yes, format!("Linux {release}")),
        Some(_) => (
            Answer::No,
            format!("Linux {release}: hand-off needs {major}.{minor} or later; boot a newer kernel"),
        ),
        None => (Answer::Unknown, format!("the release '{release}' is no version")),
    };
    Fact { subject: "kernel", answer, reason }
}

/// Whether the kernel moves the flows of a proxy, by what it needs and then by trying: programs are loaded, and unloaded.
fn sockmap_fact(available: &Availability) -> Fact {
    let Availability { object, capabilities, cgroup2, perfmon, btf, bpffs: _ } = available;
    let needed = [object, capabilities, cgroup2, perfmon, btf];
    let (answer, reason) = match needed.into_iter().find(|fact| fact.answer == Answer::No) {
        Some(missing) => (Answer::No, format!("{}: {}", missing.subject, missing.reason)),
        None => match try_sockmap() {
            Ok(()) => match sockmap::known_fault() {
                None => {
                    (Answer::Yes, "the kernel redirects from socket to socket, as its probes say".to_owned())
                }
                Some(fault) => (Answer::Unknown, fault),
            },
            Err(error) => (Answer::No, format!("{error:#}")),
        },
    };
    Fact { subject: "sockmap", answer, reason }
}

fn try_sockmap() -> anyhow::Result<()> {
    let mut object = Object::load_to_try(layout_for_sockmap()?)?;
    Sockmap::prepare(&mut object, Redirection::Own).map(drop)
}

/// Whether programs on this machine can send past the proxy without noticing. It is there on demand if they can notice.
fn sockmap_ends_fact(sockmap: &Fact) -> Fact {
    let (answer, reason) = match (sockmap.answer, try_sockmap_ends()) {
        (Answer::No | Answer::Unknown, _) => (sockmap.answer, "it needs what sockmap needs".to_owned()),
        (Answer::Yes, Ok(())) => (Answer::Yes, "local programs send straight to the other side".to_owned()),
        (Answer::Yes, Err(error)) => (
            Answer::No,
            format!("{error:#}; programs that do not mind may still have it by --plane sockmap-ends"),
        ),
    };
    Fact { subject: "sockmap-ends", answer, reason }
}

fn try_sockmap_ends() -> anyhow::Result<()> {
    let mut object = Object::load_to_try(layout_for_sockmap()?)?;
    let (sockmap, _announcements) = Sockmap::prepare(&mut object, Redirection::Ends)?;
    sockmap.peers_notice_nothing().map_err(anyhow::Error::msg)
}

/// Whether splice(2) works here, by moving a byte.
fn splice_fact() -> Fact {
    match splice_a_byte() {
        Ok(()) => Fact {
            subject: "splice",
            answer: Answer::Yes,
            reason: "splice(2) moves bytes in the kernel".into(),
        },
        Err(error) => Fact {
            subject: "splice",
            answer: Answer::No,
            reason: format!(
                "{error:#}; a SystemCallFilter= or a container may forbid it, flows are copied then"
            ),
        },
    }
}

fn splice_a_byte() -> anyhow::Result<()> {
    let (mut near, mut far) = std::os::unix::net::UnixStream::pair().context("make a socket")?;
    far.set_nonblocking(true).context("set a socket to non-blocking")?;
    let (from, to) = pipe().context("make a pipe")?;
    let mut pipe_end = std::fs::File::from(to);
    pipe_end.write_all(&[42]).context("write into a pipe")?;
    splice(&from, None, &near, None, 1, SpliceFlags::NONBLOCK).context("splice from a pipe into a socket")?;
    near.flush().context("flush a socket")?;
    let mut byte = [0];
    far.read_exact(&mut byte).context("read what was spliced")?;
    ensure!(byte == [42], "splice(2) moved another byte");
    Ok(())
}

fn findings(
    available: &Availability,
    handoff: Vec<Fact>,
    proxying: [Fact; 3],
    services: &[Service],
) -> Findings {
    let Availability { object, capabilities, cgroup2, bpffs, perfmon, btf } = available;
    let mut requirements = [object, capabilities, cgroup2, bpffs, perfmon, btf].map(Fact::clone).to_vec();
    let mut planes = vec![plane(&handoff)];
    planes.extend(proxying);
    planes.push(Fact { subject: "copy", answer: Answer::Yes, reason: "needs nothing".into() });
    for fact in handoff {
        if requirements.iter().all(|known| known.subject != fact.subject) {
            requirements.push(fact);
        }
    }
    let answers = services.iter().filter_map(|service| service.answer.as_ref().ok());
    let listeners = answers.flat_map(|snapshot| {
        snapshot.plane.handoff.listeners.iter().map(|listener| Listener {
            service: snapshot.name.clone(),
            address: listener.address.clone(),
            plane: snapshot.plane.of(listener).to_owned(),
            reason: snapshot.plane.why_not(listener).map(str::to_owned),
        })
    });
    Findings { requirements, planes, listeners: listeners.collect(), silent: status::silences(services) }
}

/// Hand-off needs every one of `facts`.
fn plane(facts: &[Fact]) -> Fact {
    let first = |answer| facts.iter().find(|fact| fact.answer == answer);
    let (answer, reason) = match (first(Answer::No), first(Answer::Unknown)) {
        (Some(missing), _) => (Answer::No, format!("{}: {}", missing.subject, missing.reason)),
        (None, Some(unknown)) => (Answer::Unknown, format!("{}: {}", unknown.subject, unknown.reason)),
        (None, None) => {
            let reason = "possible on this machine; whether a service can use it, its listeners say";
            (Answer::Yes, reason.to_owned())
        }
    };
    Fact { subject: "handoff", answer, reason }
}

fn text(findings: &Findings) -> String {
    let facts = |title: &str, facts: &[Fact]| {
        let heading = [title, "ANSWER", "WHY"].map(str::to_owned).to_vec();
        let row =
            |fact: &Fact| vec![fact.subject.to_owned(), word(fact.answer).to_owned(), fact.reason.clone()];
        table(&std::iter::once(heading).chain(facts.iter().map(row)).collect::<Vec<_>>(), true)
    };
    let mut text = facts("REQUIREMENT", &findings.requirements) + "\n" + &facts("PLANE", &findings.planes);
    if !findings.listeners.is_empty() {
        let heading = ["SERVICE", "LISTENER", "PLANE", "WHY NOT HANDED OFF"].map(str::to_owned).to_vec();
        let row = |listener: &Listener| {
            let Listener { service, address, plane, reason } = listener.clone();
            vec![service, address, plane, reason.unwrap_or_default()]
        };
        let rows: Vec<_> = std::iter::once(heading).chain(findings.listeners.iter().map(row)).collect();
        text.push('\n');
        text.push_str(&table(&rows, true));
    }
    text
}

fn word(answer: Answer) -> &'static str {
    match answer {
        Answer::Yes => "yes",
        Answer::No => "no",
        Answer::Unknown => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::text::WIDTH;

    fn fact(subject: &'static str, answer: Answer, reason: &str) -> Fact {
        Fact { subject, answer, reason: reason.to_owned() }
    }

    fn available(bpffs: Answer) -> Availability {
        Availability {
            object: fact("object", Answer::Yes, "built in"),
            capabilities: fact("capabilities", Answer::Yes, "CAP_BPF and CAP_NET_ADMIN"),
            cgroup2: fact("cgroup2", Answer::Yes, "mounted"),
            bpffs: fact(
                "bpffs",
                bpffs,
                "no BPF file system at /sys/fs/bpf: `mount -t bpf bpf /sys/fs/bpf` as root",
            ),
            perfmon: fact("perfmon", Answer::No, "sockmap needs CAP_PERFMON, which is missing"),
            btf: fact("btf", Answer::Yes, "the kernel's types"),
        }
    }

    #[test]
    fn kernels_are_compared_by_number() {
        for (release, answer) in [
            ("5.15.0-91-generic", Answer::Yes),
            ("6.1", Answer::Yes),
            ("10.0-rc1", Answer::Yes),
            ("5.9.2", Answer::No),
            ("4.19.0", Answer::No),
            ("unknown", Answer::Unknown),
        ] {
            assert_eq!(kernel(release).answer, answer, "{release}");
        }
    }

    #[test]
    fn hand_off_needs_every_fact() {
        let yes = fact("kernel", Answer::Yes, "");
        let unknown = fact("capabilities", Answer::Unknown, "capget failed");
        assert_eq!(plane(std::slice::from_ref(&yes)).answer, Answer::Yes);
        let found = plane(&[yes.clone(), unknown.clone()]);
        assert_eq!((found.answer, found.reason.as_str()), (Answer::Unknown, "capabilities: capget failed"));
        assert_eq!(plane(&[unknown, fact("bpffs", Answer::No, "none"), yes]).answer, Answer::No);
    }

    #[test]
    fn splice_works_on_every_machine_that_runs_tests() {
        assert_eq!(splice_fact().answer, Answer::Yes, "{:?}", splice_fact());
    }

    #[test]
    fn the_text_names_every_fact_once_within_eighty_columns() {
        let available = available(Answer::No);
        let handoff = vec![kernel("6.1.0"), available.bpffs.clone()];
        let sockmap = sockmap_fact(&available);
        let proxying = [sockmap_ends_fact(&sockmap), sockmap, splice_fact()];
        let found = findings(&available, handoff, proxying, &[]);
        assert_eq!((found.planes[2].subject, found.planes[2].answer), ("sockmap", Answer::No));
        let text = text(&found);
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        let requirements = ["object", "capabilities", "cgroup2", "bpffs", "perfmon", "btf", "kernel"];
        for subject in
            requirements.into_iter().chain(["handoff", "sockmap-ends", "sockmap", "splice", "copy"])
        {
            assert_eq!(
                text.lines().filter(|line| line.split(' ').next() == Some(subject)).count(),
                1,
                "{text}"
            );
        }
        assert!(!text.contains("SERVICE"), "{text}");
        assert!(text.contains("bpffs         no      no BPF file system at /sys/fs/bpf:"), "{text}");
    }
}
