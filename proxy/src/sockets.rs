//! The kernel's TCP socket tables: handshakes that are under way, and connections that nobody has accepted yet.
//!
//! Owns: reading `/proc/self/net/tcp` and `tcp6`, and which of their lines concern given addresses. Must never: decide
//! what they mean, or remember anything from one look to the next.
//!
//! Rests on Linux's `tcp_ipv4.c` and `tcp_ipv6.c` (`tcp4_seq_show`, `tcp6_seq_show`): a table has all listeners before
//! all other sockets; a listener's `rx_queue` is the length of its accept queue; a handshake has state 03 and the
//! address that its SYN was sent to, also where the listener has a wildcard address or (steered) another port; what it
//! becomes takes its place in the same bucket of the hash table, and has inode 0 until it is accepted; an IPv4
//! handshake at an IPv6 listener is in `tcp6`, v4-mapped. A handshake that is answered with a SYN cookie is in no
//! table. The directory is that of the process's main thread, and is there with `ProcSubset=pid`, too.

use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const TABLES: [&str; 2] = ["/proc/self/net/tcp", "/proc/self/net/tcp6"];

/// Who is connected to the backend, or on the way to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// Handshakes under way at the public addresses: a SYN has come, the client's ACK (with `TCP_DEFER_ACCEPT`: its
    /// first data) has not.
    pub handshakes: u64,
    /// Connections that nobody has accepted: those in the accept queues of the listeners that a connection to the
    /// backend's address reaches, or those to the public addresses, whichever are more.
    pub queued: u64,
    /// Connections to the public addresses that somebody has accepted.
    pub open: u64,
}

/// Looks at the sockets of our network namespace. Blocks while the kernel writes its tables, which takes some
/// milliseconds for its hash table and 2 ms for each thousand of sockets.
///
/// `public` has the addresses that clients connect to: 0.0.0.0 is every IPv4 address and `[::]` every IPv6 address that
/// is not v4-mapped, so a listener of both families needs both. `backend` has the addresses that the backend is
/// reached at. Whoever was under way to a public address when the look began is seen, unless accepted or gone before
/// its end: the queues are read first, and who enters one after that is found among the connections.
///
/// # Errors
/// A table cannot be read. One for IPv6 that is not there has no sockets.
pub fn look(public: &[SocketAddr], backend: &[SocketAddr]) -> io::Result<Look> {
    let mut tally = Tally::new(public, backend);
    for path in TABLES {
        match File::open(path) {
            Ok(table) => tally.read(BufReader::new(table))?,
            Err(error) if error.kind() == ErrorKind::NotFound && path.ends_with('6') => {}
            Err(error) => return Err(error),
        }
    }
    Ok(tally.look())
}

/// The sockets that were counted so far.
struct Tally {
    /// Canonical.
    public: Vec<SocketAddr>,
    /// Canonical.
    backend: Vec<SocketAddr>,
    handshakes: u64,
    /// In accept queues of the backend's listeners.
    waiting: u64,
    /// At public addresses and not accepted.
    not_accepted: u64,
    /// At public addresses and accepted.
    accepted: u64,
}

impl Tally {
    fn new(public: &[SocketAddr], backend: &[SocketAddr]) -> Self {
        let plain = |address: &SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        let (public, backend) = (public.iter().map(plain).collect(), backend.iter().map(plain).collect());
        Self { public, backend, handshakes: 0, waiting: 0, not_accepted: 0, accepted: 0 }
    }

    fn look(&self) -> Look {
        let queued = self.waiting.max(self.not_accepted);
        Look { handshakes: self.handshakes, queued, open: self.accepted }
    }

    fn read(&mut self, mut table: impl BufRead) -> io::Result<()> {
        let mut line = Vec::new();
        while table.read_until(b'\n', &mut line)? > 0 {
            // What is no line of a socket, such as the heading, is passed over.
            let _ = self.count(&line);
            line.clear();
        }
        Ok(())
    }

    /// `0: 0100007F:46A1 00000000:0000 0A 00000000:00000001 00:00000000 00000000 0 0 26545329 ...`: number, local and
    /// remote address, state, send and receive queue, three fields of timers, user, timeout, inode.
    fn count(&mut self, line: &[u8]) -> Option<()> {
        let mut fields = line.split(u8::is_ascii_whitespace).filter(|field| !field.is_empty());
        let (ip, port) = split_at_colon(fields.nth(1)?)?;
        let port = u16::try_from(hex(port)?).ok()?;
        if !self.public.iter().chain(&self.backend).any(|wanted| wanted.port() == port) {
            return None;
        }
        let local = SocketAddr::new(parse_ip(ip)?, port);
        let is_public = self.public.iter().any(|public| covers(*public, local));
        // The states of include/net/tcp_states.h.
        match fields.nth(1)? {
            // SYN_RECV and NEW_SYN_RECV
            b"03" if is_public => self.handshakes += 1,
            // ESTABLISHED, CLOSE_WAIT: those that are not accepted have no file, nor have orphans, but no orphan is
            // in one of these states.
            b"01" | b"08" if is_public => {
                let is_accepted = fields.nth(5)? != b"0";
                self.accepted += u64::from(is_accepted);
                self.not_accepted += u64::from(!is_accepted);
            }
            // LISTEN
            b"0A" if self.backend.iter().any(|backend| reaches(*backend, local)) => {
                let (_, rx_queue) = split_at_colon(fields.next()?)?;
                self.waiting += u64::from(hex(rx_queue)?);
            }
            _ => {}
        }
        Some(())
    }
}

fn covers(public: SocketAddr, local: SocketAddr) -> bool {
    let any_ip = public.ip().is_unspecified() && public.is_ipv4() == local.is_ipv4();
    public.port() == local.port() && (any_ip || public.ip() == local.ip())
}

/// Whether a connection to `backend` may come to `listener`. One on `[::]` gets IPv4 connections, too, unless it has
/// `IPV6_V6ONLY`, which no table tells.
fn reaches(backend: SocketAddr, listener: SocketAddr) -> bool {
    let any_ip = listener.ip().is_unspecified() && (listener.is_ipv6() || backend.is_ipv4());
    // Linux connects to the loopback address when asked to connect to the unspecified one.
    let loopback: IpAddr =
        if backend.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    let ip = if backend.ip().is_unspecified() { loopback } else { backend.ip() };
    backend.port() == listener.port() && (any_ip || ip == listener.ip())
}

/// A canonical address from its words, each of network order and written as a number of this machine.
fn parse_ip(digits: &[u8]) -> Option<IpAddr> {
    let mut octets = [0; 16];
    for (octets, word) in octets.chunks_mut(4).zip(digits.chunks(8)) {
        octets.copy_from_slice(&hex(word)?.to_ne_bytes());
    }
    let [a, b, c, d, ..] = octets;
    match digits.len() {
        8 => Some(Ipv4Addr::new(a, b, c, d).into()),
        32 => Some(IpAddr::V6(octets.into()).to_canonical()),
        _ => None,
    }
}

fn split_at_colon(field: &[u8]) -> Option<(&[u8], &[u8])> {
    let colon = field.iter().position(|byte| *byte == b':')?;
    Some((field.get(..colon)?, field.get(colon + 1..)?))
}

/// A number of one to eight hex digits.
fn hex(digits: &[u8]) -> Option<u32> {
    if !(1..=8).contains(&digits.len()) {
        return None;
    }
    digits.iter().try_fold(0, |number, digit| Some(number << 4 | char::from(*digit).to_digit(16)?))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd as _;
    use std::time::Duration;

    use socket2::{Domain, Socket, Type};

    use super::*;
    use crate::{clock, sys};

    /// Written by Linux 6.18: one client connected and one in its handshake at 127.0.0.1:18081 and at
    /// `[::ffff:127.0.0.1]`:18083; the same at `[::]`:18082 for each family. Nobody accepts.
    const TCP: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:46A1 00000000:0000 0A 00000000:00000001 00:00000000 00000000     0        0 26545329 3 000000004de5d555 100 0 0 10 0
   1: 0100007F:D088 0100007F:46A1 01 00000000:00000000 00:00000000 00000000     0        0 26545332 2 00000000d4313a4b 20 0 0 10 -1
   2: 0100007F:D096 0100007F:46A1 02 00000001:00000000 01:00000064 00000000     0        0 26545333 2 00000000508e4674 100 0 0 10 -1
   3: 0100007F:46A1 0100007F:D096 03 00000000:00000000 01:00000064 00000000     0        0 0 0 00000000202ffccf
   4: 0100007F:46A1 0100007F:D088 01 00000000:00000000 00:00000000 00000000     0        0 0 1 00000000adb2cca0 20 0 0 10 -1
";
    const TCP6: &str = "  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0000000000000000FFFF00000100007F:46A3 00000000000000000000000000000000:0000 0A 00000000:00000001 00:00000000 00000000     0        0 26545331 3 0000000022398724 100 0 0 10 0
   1: 00000000000000000000000000000000:46A2 00000000000000000000000000000000:0000 0A 00000000:00000002 00:00000000 00000000     0        0 26545330 5 000000007db66a14 100 0 0 10 0
   2: 0000000000000000FFFF00000100007F:46A3 0000000000000000FFFF00000100007F:E554 01 00000000:00000000 00:00000000 00000000     0        0 0 1 000000001940c06f 20 0 0 10 -1
   3: 0000000000000000FFFF00000100007F:46A2 0000000000000000FFFF00000100007F:CBCC 03 00000000:00000000 01:00000063 00000000     0        0 0 0 00000000e2589f92
   4: 00000000000000000000000001000000:BC14 00000000000000000000000001000000:46A2 01 00000000:00000000 00:00000000 00000000     0        0 26545336 2 0000000085bff512 20 0 0 10 -1
   6: 0000000000000000FFFF00000100007F:46A2 0000000000000000FFFF00000100007F:CBBC 01 00000000:00000000 00:00000000 00000000     0        0 0 1 000000002931d50b 20 0 0 10 -1
   7: 00000000000000000000000001000000:46A2 00000000000000000000000001000000:BC14 01 00000000:00000000 00:00000000 00000000     0        0 0 1 000000007fc31f3f 20 0 0 10 -1
   8: 00000000000000000000000001000000:46A2 00000000000000000000000001000000:BC1E 03 00000000:00000000 01:00000063 00000000     0        0 0 0 00000000990641b5
   9: 0000000000000000FFFF00000100007F:46A3 0000000000000000FFFF00000100007F:E55C 03 00000000:00000000 01:00000063 00000000     0        0 0 0 000000006aa992f8
";

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn tally(table: &str, public: &[&str], backend: &[&str]) -> Tally {
        let mut tally = Tally::new(&addresses(public), &addresses(backend));
        tally.read(table.as_bytes()).unwrap();
        tally
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn recorded_clients_are_counted_by_the_address_they_came_to() {
        for (public, v4, v6) in [
            (&["127.0.0.1:18081"][..], 1, 0),
            (&["0.0.0.0:18081"], 1, 0),
            (&["127.0.0.2:18081"], 0, 0),
            (&["127.0.0.1:18080"], 0, 0),
            (&["[::]:18081"], 0, 0),
            (&["127.0.0.1:18082"], 0, 1),
            (&["[::ffff:127.0.0.1]:18082"], 0, 1),
            (&["0.0.0.0:18082"], 0, 1),
            (&["[::]:18082"], 0, 1),
            (&["[::1]:18082"], 0, 1),
            (&["[::2]:18082"], 0, 0),
            (&["0.0.0.0:18082", "[::]:18082"], 0, 2),
            (&["0.0.0.0:18081", "127.0.0.1:18081", "[::1]:18082", "127.0.0.1:18083"], 1, 2),
            (&[], 0, 0),
        ] {
            for (table, clients) in [(TCP, v4), (TCP6, v6)] {
                let tally = tally(table, public, &[]);
                assert_eq!((tally.handshakes, tally.not_accepted), (clients, clients), "{public:?}");
            }
        }
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn recorded_queues_are_those_of_the_listeners_that_a_connection_reaches() {
        for (backend, v4, v6) in [
            (&["127.0.0.1:18081"][..], 1, 0),
            (&["0.0.0.0:18081"], 1, 0),
            (&["127.0.0.2:18081"], 0, 0),
            (&["[::1]:18081"], 0, 0),
            (&["10.1.2.3:18082"], 0, 2),
            (&["[::1]:18082", "127.0.0.1:18082"], 0, 2),
            (&["127.0.0.1:18083"], 0, 1),
            (&["[::ffff:127.0.0.1]:18083"], 0, 1),
            (&["[::1]:18083"], 0, 0),
            (&["127.0.0.1:18081", "127.0.0.1:18083", "[::1]:18082"], 1, 3),
        ] {
            assert_eq!(tally(TCP, &[], backend).waiting, v4, "{backend:?}");
            assert_eq!(tally(TCP6, &[], backend).waiting, v6, "{backend:?}");
        }
    }

    #[test]
    fn who_waits_is_told_once() {
        let both = &["127.0.0.1:18081"];
        let open = tally(TCP, both, both).look().open;
        assert_eq!(tally(TCP, both, both).look(), Look { handshakes: 1, queued: 1, open });
        // The client entered the queue after the listener was read.
        let late = TCP.replace("0A 00000000:00000001", "0A 00000000:00000000");
        assert_eq!(tally(&late, both, both).look(), Look { handshakes: 1, queued: 1, open });
        let accepted = late.replace("0        0 0 1 ", "0        0 26545340 1 ");
        assert_eq!(tally(&accepted, both, both).look(), Look { handshakes: 1, queued: 0, open: open + 1 });
    }

    #[test]
    fn a_listener_on_a_specific_address_is_reached_only_there() {
        let reached = |backend: &str, listener: &str| {
            reaches(addresses(&[backend])[0], listener.parse::<SocketAddr>().unwrap())
        };
        assert!(reached("127.0.0.1:80", "0.0.0.0:80"));
        assert!(!reached("[::1]:80", "0.0.0.0:80"));
        assert!(reached("[::1]:80", "[::]:80"));
        assert!(reached("[fe80::1%3]:80", "[fe80::1]:80"));
        assert!(reached("[::]:80", "[::1]:80"));
        assert!(!reached("127.0.0.1:80", "0.0.0.0:81"));
    }

    #[test]
    fn what_is_no_line_is_passed_over() {
        let any = &["0.0.0.0:18081"];
        for line in TCP.lines() {
            for end in 0..=line.len() {
                let found = tally(line.get(..end).unwrap(), any, any);
                assert!(found.handshakes + found.waiting + found.not_accepted <= 1, "{line}");
            }
        }
        let bytes: String = (0..=255).map(char::from).collect();
        for odd in [
            "",
            "\n\n",
            "0:",
            "0: : : : :",
            "0: 0100007F:46A1",
            "0: 0100007F:46A1 00000000:0000",
            "0: 0100007F:46A1 00000000:0000 01",
            "0: 0100007F:46A1 00000000:0000 01 0:0 0:0 0 0 0",
            "0: 0100007F:46A1 00000000:0000 0A",
            "0: 0100007F:46A1 00000000:0000 0A 1",
            "0: 0100007F:46A1 00000000:0000 0A 0:x",
            "0: 0100007F:+6A1 00000000:0000 03 0:0",
            "0: 0100007F:146A1 00000000:0000 03 0:0",
            "0: 0100007:46A1 00000000:0000 03 0:0",
            "0: 0100007G:46A1 00000000:0000 03 0:0",
            "0: 0000000000000000FFFF00000100007F0:46A1 0:0 03 0:0",
            "0: 0100007F46A1 00000000:0000 03 0:0",
            "0: 0100007F:46A1 00000000:0000 3 0:0",
            "\u{fffd}\u{0}: \u{fffd}:46A1 \u{fffd} 03 0:0",
            &bytes,
        ] {
            assert_eq!(tally(odd, any, any).look(), Look::default(), "{odd}");
        }
        assert_eq!(tally("no line\n0: 0100007F:46A1 0:0 03", any, any).look().handshakes, 1);
    }

    /// Looks until it sees what it should, or for long enough on a busy machine.
    fn expect(public: &[SocketAddr], backend: &[SocketAddr], handshakes: u64, queued: u64) {
        let wanted = (handshakes, queued);
        let deadline = clock::now() + Duration::from_secs(20);
        loop {
            let seen = look(public, backend).unwrap();
            if (seen.handshakes, seen.queued) == wanted {
                return;
            }
            assert!(clock::now() < deadline, "{seen:?} is not {wanted:?} at {public:?}, {backend:?}");
            std::thread::yield_now();
        }
    }

    /// A client that never sees the answer to its SYN.
    fn half_open(to: SocketAddr) -> Socket {
        let client = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
        sys::drop_new_connections(client.as_fd(), true).unwrap();
        client.set_nonblocking(true).unwrap();
        assert_eq!(client.connect(&to.into()).unwrap_err().raw_os_error(), Some(libc::EINPROGRESS));
        client
    }

    fn listener(address: &str) -> (TcpListener, u16) {
        let listener = TcpListener::bind(address).unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, port)
    }

    #[test]
    fn real_queues_are_seen_until_they_are_accepted() {
        for (bound, reached_at) in [
            ("127.0.0.1:0", "127.0.0.1"),
            ("0.0.0.0:0", "127.0.0.1"),
            ("[::1]:0", "::1"),
            ("[::]:0", "::1"),
            ("[::]:0", "127.0.0.1"),
            ("[::ffff:127.0.0.1]:0", "127.0.0.1"),
        ] {
            let (listener, port) = listener(bound);
            let backend = [SocketAddr::new(reached_at.parse().unwrap(), port)];
            expect(&backend, &backend, 0, 0);
            let clients = [(); 3].map(|()| TcpStream::connect(backend[0]).unwrap());
            expect(&backend, &backend, 0, 3);
            let accepted = listener.accept().unwrap();
            expect(&backend, &backend, 0, 2);
            drop((clients, accepted));
            // A client that has gone is still in the queue.
            expect(&backend, &backend, 0, 2);
            let elsewhere = [SocketAddr::new("127.0.0.1".parse().unwrap(), port ^ 1)];
            expect(&elsewhere, &elsewhere, 0, 0);
        }
    }

    #[test]
    fn real_handshakes_are_seen() {
        for (bound, reached_at, any) in [
            ("127.0.0.1:0", "127.0.0.1", "0.0.0.0"),
            ("0.0.0.0:0", "127.0.0.1", "0.0.0.0"),
            ("[::]:0", "::1", "::"),
            ("[::]:0", "127.0.0.1", "0.0.0.0"),
        ] {
            let (_listener, port) = listener(bound);
            let [public, any] = [reached_at, any].map(|ip| SocketAddr::new(ip.parse().unwrap(), port));
            let first = half_open(public);
            expect(&[public], &[], 1, 0);
            expect(&[any], &[public], 1, 0);
            let second = half_open(public);
            expect(&[public, any], &[public], 2, 0);
            let other: IpAddr = if any.is_ipv4() { Ipv6Addr::UNSPECIFIED.into() } else { [0; 4].into() };
            expect(&[SocketAddr::new(other, port)], &[], 0, 0);
            drop((first, second));
        }
    }

    #[test]
    fn a_handshake_that_ends_is_in_the_queue() {
        let (listener, _) = listener("127.0.0.1:0");
        let public = [listener.local_addr().unwrap()];
        let client = half_open(public[0]);
        expect(&public, &public, 1, 0);
        // The next SYN-ACK, a second after the first one, is let through.
        sys::drop_new_connections(client.as_fd(), false).unwrap();
        expect(&public, &public, 0, 1);
    }

    #[test]
    fn a_hundred_thousand_sockets_are_no_obstacle() {
        let line = TCP.lines().nth(2).unwrap();
        let mut table = format!("{line}\n").repeat(100_000);
        table.push_str(TCP.lines().nth(4).unwrap());
        let began = clock::now();
        assert_eq!(tally(&table, &["127.0.0.1:18081"], &["127.0.0.1:18081"]).handshakes, 1);
        println!("parsed in {:?}", clock::now().saturating_sub(began));
    }
}
