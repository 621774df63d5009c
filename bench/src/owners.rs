//! Who holds the connections at an address: the backend itself, or a proxy in front of it.
//!
//! Owns: telling connections that were handed to the backend from forwarded ones, by the kernel's word. Must never:
//! believe what a proxy says of itself. `/proc/PID/net/tcp` lists the TCP sockets over IPv4 in the network namespace of a
//! process, with their inodes (`proc_net_tcp.rst` of the kernel), and `/proc/PID/fd` the inodes that it has open.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::client::open_flows;
use crate::process::readable_within;
use crate::wire::Pattern;

/// A proxy that has not begun to hand off by then does not; it may begin after the first connections.
const HANDED_OFF_WITHIN: Duration = Duration::from_secs(5);
/// Time between two connections that look whether it has begun.
const PROBE_INTERVAL: Duration = Duration::from_millis(10);
/// The list of sockets is read in pieces and may miss one, if others come and go meanwhile; not so many times.
const LOOKS_MAX: usize = 10;
/// `TCP_ESTABLISHED` as the list has it.
const ESTABLISHED: &str = "01";

/// Opens connections to `address` until one of them is held by the process `backend` itself.
///
/// # Errors
/// When none is within five seconds, or one fails.
pub fn wait_until_handed_off(address: SocketAddr, backend: u32, pattern: &Pattern) -> Result<()> {
    let until = drowse::clock::now() + HANDED_OFF_WITHIN;
    loop {
        let flow = new_flow(address, pattern)?;
        if is_held_by(backend, address, &flow)? {
            return Ok(());
        }
        ensure!(
            drowse::clock::now() < until,
            "the proxy holds its clients' connections and hands none to the backend after {HANDED_OFF_WITHIN:?}"
        );
        ensure!(!readable_within(&flow, PROBE_INTERVAL)?, "an idle connection brought bytes, or ended");
    }
}

/// Opens one connection to `address`, which the process `backend` must hold.
///
/// # Errors
/// When it does not, or the connection fails.
pub fn check_handed_off(address: SocketAddr, backend: u32, pattern: &Pattern) -> Result<()> {
    let held = is_held_by(backend, address, &new_flow(address, pattern)?)?;
    ensure!(held, "the proxy stopped handing connections to the backend during the measurement");
    Ok(())
}

fn new_flow(address: SocketAddr, pattern: &Pattern) -> Result<TcpStream> {
    open_flows(address, pattern, 1)?.pop().context("open a connection")
}

fn is_held_by(pid: u32, address: SocketAddr, flow: &TcpStream) -> Result<bool> {
    let client = flow.local_addr().context("read a client's address")?;
    for _ in 0..LOOKS_MAX {
        if let Some(is_held) = clients(pid, address)?.get(&v4(client)?) {
            return Ok(*is_held);
        }
    }
    bail!("the kernel lists no connection of {client} at {address}")
}

/// The clients that have a connection at `address`, which is in the network namespace of the process `pid`, and of each
/// whether it is that process that holds it.
///
/// # Errors
/// When `address` is not of IPv4, or `/proc` does not tell.
pub fn clients(pid: u32, address: SocketAddr) -> Result<BTreeMap<SocketAddrV4, bool>> {
    let path = format!("/proc/{pid}/net/tcp");
    let list = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let held = sockets(pid)?;
    let connections = connections(&list, v4(address)?)?;
    Ok(connections.into_iter().map(|(client, inode)| (client, held.contains(&inode))).collect())
}

/// The inodes of the sockets that a process has open.
fn sockets(pid: u32) -> Result<BTreeSet<u64>> {
    let directory = fs::read_dir(format!("/proc/{pid}/fd")).context("list a process's files")?;
    let inode = |entry: fs::DirEntry| {
        let link = fs::read_link(entry.path()).ok()?;
        link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    };
    Ok(directory.filter_map(Result::ok).filter_map(inode).collect())
}

/// The established connections at `address`: the other end of each, and its socket's inode.
fn connections(list: &str, address: SocketAddrV4) -> Result<Vec<(SocketAddrV4, u64)>> {
    let mut found = Vec::new();
    for line in list.lines().skip(1) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, local, client, state, _, _, _, _, _, inode, ..] = fields.as_slice() else {
            bail!("a line of /proc/PID/net/tcp has fewer fields than it should");
        };
        if *state == ESTABLISHED && listed_address(local)? == address {
            found.push((listed_address(client)?, inode.parse().context("read a socket's inode")?));
        }
    }
    Ok(found)
}

/// An address of the list: four bytes as they lie in memory, shown as a number of this machine, and the port.
fn listed_address(text: &str) -> Result<SocketAddrV4> {
    let (ip, port) = text.split_once(':').context("divide an address of /proc/PID/net/tcp")?;
    let ip = u32::from_str_radix(ip, 16).context("read an address of /proc/PID/net/tcp")?;
    let port = u16::from_str_radix(port, 16).context("read a port of /proc/PID/net/tcp")?;
    Ok(SocketAddrV4::new(Ipv4Addr::from(ip.to_ne_bytes()), port))
}

fn v4(address: SocketAddr) -> Result<SocketAddrV4> {
    match address {
        SocketAddr::V4(address) => Ok(address),
        SocketAddr::V6(_) => bail!("only connections over IPv4 can be looked up"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str =
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";

    #[test]
    #[cfg(target_endian = "little")]
    fn established_connections_at_the_address_are_found_and_no_others() {
        let line = |local, client, state, inode| {
            format!(
                "   0: {local} {client} {state} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1 0 20 4 30 10 -1\n"
            )
        };
        let lines = [
            line("0100007F:1F90", "00000000:0000", "0A", 1),
            line("0100007F:1F90", "0100007F:C001", "01", 2),
            line("0100007F:C001", "0100007F:1F90", "01", 3),
            line("0100007F:1F91", "0100007F:C002", "01", 4),
            line("0100007F:1F90", "0100007F:C003", "08", 5),
        ];
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8080);
        let found = connections(&format!("{HEAD}{}", lines.concat()), address).unwrap();
        assert_eq!(found, [(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0xc001), 2)]);
        assert!(connections(&format!("{HEAD}0: 0100007F:1F90\n"), address).is_err());
    }

    #[test]
    fn this_process_holds_both_ends_of_its_own_connection() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = TcpStream::connect(address).unwrap();
        let pid = std::process::id();
        // Until it is accepted, a connection is nobody's.
        assert!(!is_held_by(pid, address, &client).unwrap());
        let accepted = listener.accept().unwrap();
        assert!(is_held_by(pid, address, &client).unwrap());
        drop(accepted);
        assert!(clients(pid, "[::1]:80".parse().unwrap()).is_err());
    }
}
