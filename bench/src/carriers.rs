//! Which plane of drowse moves the bytes of a connection.
//!
//! Owns: telling a plane that is used from one that was asked for and could not be had. Must never: be content with
//! drowse's word alone where the kernel knows better: a plane of the kernel moves the bytes of a connection without
//! waking drowse up, and the kernel counts that ([`crate::costs`]).

use std::fs;
use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::client::{exchange_all, open_flows};
use crate::costs::Counters;
use crate::peers::{Plane, Started};
use crate::process::{Running, readable_within};
use crate::wire::Pattern;

/// A plane that carries no new connection by then does not; it may begin after the first ones.
const CARRIED_WITHIN: Duration = Duration::from_secs(5);
/// Time between two looks whether it has begun.
const PROBE_INTERVAL: Duration = Duration::from_millis(10);
/// How long drowse may take to tell its status.
const STATUS_WITHIN: Duration = Duration::from_secs(1);
/// Requests, one after the other, over a connection whose wake-ups are counted.
const PROBE_REQUESTS: u32 = 200;
/// Requests before these.
const FIRST_REQUESTS: u32 = 20;

/// Opens connections to a drowse until `plane` carries one of them: drowse says so, and does not wake up for what a
/// plane of the kernel moves.
///
/// # Errors
/// When none is carried within five seconds, with what drowse says of its planes; or a connection fails.
pub fn wait_until_carried(started: &Started, plane: Plane, pattern: &Pattern) -> Result<()> {
    let process = started.process.as_ref().context("find drowse's process")?;
    let directory = started.directory().context("find the directory of drowse's status socket")?;
    let until = drowse::clock::now() + CARRIED_WITHIN;
    loop {
        let flow = new_flow(started.address, pattern)?;
        let Err(err) = is_carried(&flow, process, directory, plane, pattern) else { return Ok(()) };
        if drowse::clock::now() >= until {
            return Err(err.context(format!("drowse does not use the plane {}", plane.option())));
        }
        ensure!(!readable_within(&flow, PROBE_INTERVAL)?, "an idle connection brought bytes, or ended");
    }
}

fn new_flow(address: SocketAddr, pattern: &Pattern) -> Result<TcpStream> {
    open_flows(address, pattern, 1)?.pop().context("open a connection")
}

fn is_carried(
    flow: &TcpStream,
    process: &Running,
    directory: &Path,
    plane: Plane,
    pattern: &Pattern,
) -> Result<()> {
    let view = planes(directory)?;
    let used = view.get("forward").and_then(Value::as_str);
    ensure!(used == Some(plane.option()), "its status says: {view}");
    let Some(wakes_max) = plane.wakes_max() else { return Ok(()) };
    let wakes = wakes_for_each_request(flow, process, pattern)?;
    ensure!(
        wakes <= wakes_max,
        "it woke up {wakes:.2} times for each request, at most {wakes_max} are its due"
    );
    Ok(())
}

/// How often `process` gave the processor up to wait, for each of some requests over `flow`. The first ones are not
/// counted: a connection begins in user space.
fn wakes_for_each_request(flow: &TcpStream, process: &Running, pattern: &Pattern) -> Result<f64> {
    let exchange = |positions: Range<u32>| {
        positions
            .into_iter()
            .try_for_each(|position| exchange_all(std::slice::from_ref(flow), pattern, position.into()))
    };
    exchange(0..FIRST_REQUESTS)?;
    let before = Counters::now(Some(process), false)?;
    exchange(FIRST_REQUESTS..FIRST_REQUESTS + PROBE_REQUESTS)?;
    let switches = Counters::now(Some(process), false)?.switches_since(&before);
    let switches = u32::try_from(switches.context("count drowse's wake-ups")?)?;
    Ok(f64::from(switches) / f64::from(PROBE_REQUESTS))
}

/// What the only drowse that has its status socket in `directory` says of its planes.
fn planes(directory: &Path) -> Result<Value> {
    let mut socket =
        UnixStream::connect(status_socket(directory)?).context("connect to drowse's status socket")?;
    socket.set_read_timeout(Some(STATUS_WITHIN)).context("set a read timeout")?;
    let mut json = String::new();
    socket.read_to_string(&mut json).context("read drowse's status")?;
    let mut status: Value = serde_json::from_str(&json).context("read drowse's status as JSON")?;
    status.get_mut("plane").map(Value::take).context("find the planes in drowse's status")
}

fn status_socket(directory: &Path) -> Result<PathBuf> {
    let files = fs::read_dir(directory).context("look for drowse's status socket")?;
    let mut files = files.filter_map(Result::ok).map(|file| file.path());
    let Some(path) = files.find(|path| path.extension().is_some_and(|extension| extension == "sock")) else {
        bail!("drowse has no status socket");
    };
    Ok(path)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;
    use crate::cpus::Layout;
    use crate::peers::{Peer, SocketProxyd, Wanted};
    use crate::wire::COMMAND_LEN;

    /// Sends back all that comes after the command.
    fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                thread::spawn(move || {
                    stream.read_exact(&mut [0; COMMAND_LEN]).unwrap();
                    std::io::copy(&mut stream.try_clone().unwrap(), &mut stream)
                });
            }
        });
        address
    }

    /// A status socket of a drowse that says `status`.
    fn says(status: &'static str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("some.service.sock")).unwrap();
        thread::spawn(move || {
            for peer in listener.incoming() {
                write!(peer.unwrap(), "{status}").unwrap();
            }
        });
        directory
    }

    #[test]
    fn a_plane_is_used_when_the_status_names_it_and_the_kernel_agrees() {
        let (backend, pattern, layout) = (echo(), Pattern::default(), Layout::of_this_machine().unwrap());
        let programs = ["/usr/lib/systemd/systemd-socket-proxyd", "/lib/systemd/systemd-socket-proxyd"];
        let program = programs.iter().map(PathBuf::from).find(|program| program.exists()).unwrap();
        let wanted = Wanted { backend, listen: [127, 0, 0, 1].into(), flows: 4, layout: &layout };
        // A proxy that wakes up for every request; those past it do not wake it up.
        let proxyd = SocketProxyd { program }.start(&wanted).unwrap();
        let process = proxyd.process.as_ref().unwrap();
        let through = new_flow(proxyd.address, &pattern).unwrap();
        let past = new_flow(backend, &pattern).unwrap();
        let carried = |status: &'static str, flow, plane| {
            is_carried(flow, process, says(status).path(), plane, &pattern).map_err(|err| format!("{err:#}"))
        };

        let sockmap = r#"{"plane": {"forward": "sockmap"}, "later": 1}"#;
        assert_eq!(carried(sockmap, &past, Plane::Sockmap), Ok(()));
        let refusal = carried(sockmap, &through, Plane::Sockmap).unwrap_err();
        assert!(refusal.contains("it woke up") && refusal.contains("for each request"), "{refusal}");
        let ends = r#"{"plane": {"forward": "sockmap-ends"}}"#;
        assert_eq!(carried(ends, &past, Plane::SockmapEnds), Ok(()));
        assert!(carried(ends, &through, Plane::SockmapEnds).is_err());
        let splice = r#"{"plane": {"forward": "splice", "reason": "no probe"}}"#;
        assert_eq!(carried(splice, &through, Plane::Splice), Ok(()));

        let refusal = carried(splice, &past, Plane::Sockmap).unwrap_err();
        assert!(refusal.contains("its status says") && refusal.contains("no probe"), "{refusal}");
        assert!(carried(ends, &past, Plane::Sockmap).is_err(), "another plane of the kernel");
        assert!(carried("{}", &past, Plane::Splice).is_err());
        let nothing = tempfile::tempdir().unwrap();
        let refusal = is_carried(&past, process, nothing.path(), Plane::Copy, &pattern).unwrap_err();
        assert!(format!("{refusal:#}").contains("no status socket"), "{refusal:#}");
    }
}
