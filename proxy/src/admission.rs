//! Admission: who may wake the backend, and how much of drowse one source may have.
//!
//! PURE. Owns: the rules for a client at the moment of its accept, the seats that are taken, and what is told of those
//! who were refused. Must never: ask the kernel, or read a clock.
//!
//! A seat is taken as long as it lives: it goes where its client goes, and is given back wherever that ends, be it a
//! worker that panics. It is a reference count, so that no thread waits for another.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use crate::clock::Monotonic;
use crate::report::snapshot::Refused;

/// How much of an IPv6 address names a source: whoever has one address of a /64 can have all (RFC 4291, 2.5.1).
const SOURCE_PREFIX_V6: u32 = 64;
/// Sources that are remembered before those without a seat are looked for.
const SWEEP_AT_MIN: usize = 64;
/// The shortest time between two lines of log about clients that were refused.
pub const TELL_PAUSE: Duration = Duration::from_mins(1);

/// What a client may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Wake the backend, and wait for it.
    MayWake,
    /// Use the backend while it is awake.
    Stranger,
}

/// Why a client is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It is a stranger, and the backend is not awake.
    MayNotWake,
    /// Its source has as many connections as one may have.
    TooManyOfSource,
}

/// A client's place among those of its source. Dropping it gives it back.
#[derive(Debug, Default)]
pub struct Seat {
    _taken: Option<Arc<()>>,
}

/// The rules, and who has which seats.
#[derive(Debug)]
pub struct Admission {
    /// Who may wake the backend; empty: everybody.
    allow: Vec<IpNet>,
    max_per_source: Option<u64>,
    /// One reference more for each source than it has seats.
    taken: HashMap<IpAddr, Arc<()>>,
    sweep_at: usize,
}

impl Admission {
    /// Everybody may wake the backend if `allow` is empty; a source may have any number of connections without
    /// `max_per_source`.
    #[must_use]
    pub fn new(allow: Vec<IpNet>, max_per_source: Option<u64>) -> Self {
        Self { allow, max_per_source, taken: HashMap::new(), sweep_at: SWEEP_AT_MIN }
    }

    /// Decides on a client `from` an address, or from none, as those of a unix socket: they may all wake the backend, and
    /// are of no source.
    ///
    /// # Errors
    /// It is refused: the reason.
    pub fn admit(&mut self, from: Option<IpAddr>, is_awake: bool) -> Result<(Seat, Standing), Refusal> {
        let Some(ip) = from.map(|ip| ip.to_canonical()) else {
            return Ok((Seat::default(), Standing::MayWake));
        };
        let may_wake = self.allow.is_empty() || self.allow.iter().any(|net| net.contains(&ip));
        match (may_wake, is_awake) {
            (true, _) => Ok((self.seat(ip)?, Standing::MayWake)),
            (false, true) => Ok((self.seat(ip)?, Standing::Stranger)),
            (false, false) => Err(Refusal::MayNotWake),
        }
    }

    fn seat(&mut self, ip: IpAddr) -> Result<Seat, Refusal> {
        let Some(max) = self.max_per_source else { return Ok(Seat::default()) };
        if self.taken.len() >= self.sweep_at {
            self.taken.retain(|_, seats| seats_of(seats) > 0);
            self.sweep_at = SWEEP_AT_MIN.max(2 * self.taken.len());
        }
        let seats = self.taken.entry(source(ip)).or_default();
        if seats_of(seats) >= max {
            return Err(Refusal::TooManyOfSource);
        }
        Ok(Seat { _taken: Some(Arc::clone(seats)) })
    }
}

fn seats_of(seats: &Arc<()>) -> u64 {
    (Arc::strong_count(seats) - 1) as u64
}

/// What counts as one source.
fn source(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => ip,
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> SOURCE_PREFIX_V6 << SOURCE_PREFIX_V6).into(),
    }
}

/// Reads one `--allow`: a network, or a single address.
///
/// # Errors
/// It is neither, or an IPv6 way to write IPv4, which no client would match.
pub fn network(text: &str) -> Result<IpNet, String> {
    let text = text.trim();
    let network = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    match network {
        Ok(IpNet::V6(net)) if net.addr().to_ipv4_mapped().is_some() && net.prefix_len() > 0 => {
            Err(format!("'{text}' is IPv4 in IPv6: write it as IPv4"))
        }
        Ok(network) => Ok(network),
        Err(_) => {
            Err(format!("'{text}' is no network; write it as 192.0.2.0/24, 2001:db8::/32 or 192.0.2.1"))
        }
    }
}

/// Who was refused: counted one by one, told in few lines.
#[derive(Debug, Default)]
pub struct Refusals {
    total: Refused,
    told: Refused,
    /// The address of the last one.
    last: Option<IpAddr>,
    told_at: Option<Monotonic>,
}

impl Refusals {
    /// One more, from this address.
    pub fn add(&mut self, refusal: Refusal, from: Option<IpAddr>) {
        self.last = from;
        match refusal {
            Refusal::MayNotWake => self.total.may_not_wake += 1,
            Refusal::TooManyOfSource => self.total.too_many_of_source += 1,
        }
    }

    /// All so far.
    #[must_use]
    pub fn total(&self) -> Refused {
        self.total
    }

    /// When there will be something to tell, if there is.
    #[must_use]
    pub fn due(&self) -> Option<Monotonic> {
        let at = self.told_at.map_or(Monotonic::ZERO, |at| at.saturating_add(TELL_PAUSE));
        (self.total != self.told).then_some(at)
    }

    /// One line about all who were refused since the last line, if it is due at `now`. `backend`: as people know it.
    pub fn tell(&mut self, backend: &str, now: Monotonic) -> Option<String> {
        self.due().filter(|due| *due <= now)?;
        let strangers = self.total.may_not_wake - self.told.may_not_wake;
        let too_many = self.total.too_many_of_source - self.told.too_many_of_source;
        let mut line = match strangers + too_many {
            1 => "refused a client".to_owned(),
            count => format!("refused {count} clients"),
        };
        let reasons = [
            (strangers, format!("may not wake {backend} (--allow)")),
            (too_many, "beyond --max-per-source".to_owned()),
        ];
        let mut between = ": ";
        for (count, reason) in reasons.iter().filter(|(count, _)| *count > 0) {
            let _infallible = write!(line, "{between}{count} {reason}");
            between = ", ";
        }
        if let Some(last) = self.last {
            let _infallible = write!(line, "; the last from {}", last.to_canonical());
        }
        self.told = self.total;
        self.told_at = Some(now);
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn rules(allow: &[&str], max_per_source: Option<u64>) -> Admission {
        Admission::new(allow.iter().map(|text| network(text).unwrap()).collect(), max_per_source)
    }

    fn standing(rules: &mut Admission, from: &str, is_awake: bool) -> Result<Standing, Refusal> {
        rules.admit(Some(ip(from)), is_awake).map(|(_, standing)| standing)
    }

    #[test]
    fn without_a_rule_everybody_may_wake() {
        let mut rules = rules(&[], None);
        for from in ["192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1"] {
            assert_eq!(standing(&mut rules, from, false), Ok(Standing::MayWake));
        }
        assert!(rules.taken.is_empty());
    }

    #[test]
    fn a_stranger_is_served_while_it_is_awake_and_refused_else() {
        let mut rules = rules(&["10.0.0.0/8", "192.0.2.7", "2001:db8::/32"], None);
        for from in ["10.255.0.1", "::ffff:10.0.0.1", "192.0.2.7", "2001:db8:1::1"] {
            for is_awake in [true, false] {
                assert_eq!(standing(&mut rules, from, is_awake), Ok(Standing::MayWake), "{from}");
            }
        }
        for from in ["11.0.0.1", "::ffff:192.0.2.8", "2001:db9::1", "::1", "::a00:1"] {
            assert_eq!(standing(&mut rules, from, true), Ok(Standing::Stranger), "{from}");
            assert_eq!(standing(&mut rules, from, false), Err(Refusal::MayNotWake), "{from}");
        }
    }

    #[test]
    fn a_client_without_an_address_always_may() {
        let mut rules = rules(&["10.0.0.0/8"], Some(1));
        let seats: Vec<_> = (0..5).map(|_| rules.admit(None, false).unwrap()).collect();
        assert!(seats.iter().all(|(_, standing)| *standing == Standing::MayWake));
    }

    #[test]
    fn one_family_does_not_open_the_other() {
        let mut v4 = rules(&["0.0.0.0/0"], None);
        assert_eq!(standing(&mut v4, "::ffff:8.8.8.8", false), Ok(Standing::MayWake));
        assert_eq!(standing(&mut v4, "2001:db8::1", false), Err(Refusal::MayNotWake));
        let mut v6 = rules(&["::/0"], None);
        assert_eq!(standing(&mut v6, "2001:db8::1", false), Ok(Standing::MayWake));
        assert_eq!(standing(&mut v6, "::ffff:8.8.8.8", false), Err(Refusal::MayNotWake));
    }

    #[test]
    fn a_source_has_so_many_seats_and_gets_them_back() {
        let mut rules = rules(&[], Some(2));
        let first = rules.admit(Some(ip("192.0.2.1")), false).unwrap();
        let _second = rules.admit(Some(ip("::ffff:192.0.2.1")), true).unwrap();
        assert_eq!(rules.admit(Some(ip("192.0.2.1")), true).unwrap_err(), Refusal::TooManyOfSource);
        let _other = rules.admit(Some(ip("192.0.2.2")), true).unwrap();
        std::thread::spawn(move || drop(first)).join().unwrap();
        let _third = rules.admit(Some(ip("192.0.2.1")), true).unwrap();
        assert_eq!(rules.admit(Some(ip("192.0.2.1")), true).unwrap_err(), Refusal::TooManyOfSource);
    }

    #[test]
    fn a_source_of_ipv6_is_a_64() {
        let mut rules = rules(&[], Some(1));
        let _first = rules.admit(Some(ip("2001:db8:0:1::1")), true).unwrap();
        assert!(rules.admit(Some(ip("2001:db8:0:1:ffff::2")), true).is_err());
        assert!(rules.admit(Some(ip("2001:db8:0:2::1")), true).is_ok());
    }

    /// Clients come and go at random: nobody has more than the limit, nobody is refused below it, nothing grows.
    #[test]
    fn seats_are_exact_whatever_comes_and_goes() {
        let mut random = 1_u64;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % below
        };
        let mut rules = rules(&["10.0.0.0/9"], Some(3));
        let mut there: Vec<(u32, Seat)> = Vec::new();
        for round in 0..100_000_u32 {
            let address = 0x0a00_0000 | (u32::try_from(next(4)).unwrap() << 22) | (round % 7);
            let open = there.iter().filter(|(of, _)| *of == address).count();
            let is_awake = next(2) == 0;
            let may_wake = address & 0x0080_0000 == 0;
            match rules.admit(Some(IpAddr::from(address.to_be_bytes())), is_awake) {
                Ok((seat, standing)) => {
                    assert!(open < 3 && (may_wake || is_awake));
                    assert_eq!(standing == Standing::MayWake, may_wake);
                    there.push((address, seat));
                }
                Err(Refusal::TooManyOfSource) => assert_eq!(open, 3),
                Err(Refusal::MayNotWake) => assert!(!may_wake && !is_awake),
            }
            if next(2) == 0 && !there.is_empty() {
                there.swap_remove(usize::try_from(next(there.len() as u64)).unwrap());
            }
        }
        drop(there);
        for address in 0..100_000_u32 {
            let _gone_at_once = rules.admit(Some(IpAddr::from(address.to_be_bytes())), true).unwrap();
        }
        assert!(rules.taken.len() <= SWEEP_AT_MIN, "{} sources are remembered", rules.taken.len());
    }

    #[test]
    fn networks_are_read_as_people_write_them() {
        for text in ["10.0.0.0/8", " 192.0.2.1", "2001:db8::/32", "::1", "192.0.2.77/24", "::/0"] {
            assert!(network(text).is_ok(), "{text}");
        }
        for (text, says) in [
            ("", "no network"),
            ("10.0.0.0/33", "no network"),
            ("example.org", "no network"),
            ("::ffff:10.0.0.0/104", "write it as IPv4"),
        ] {
            let error = network(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn a_thousand_scans_are_one_line() {
        let mut refusals = Refusals::default();
        assert_eq!(refusals.due(), None);
        let now = Duration::from_secs(1000);
        refusals.add(Refusal::MayNotWake, Some(ip("192.0.2.9")));
        let first = "refused a client: 1 may not wake dice.service (--allow); the last from 192.0.2.9";
        assert_eq!(refusals.tell("dice.service", now).as_deref(), Some(first));
        for _ in 0..1000 {
            refusals.add(Refusal::MayNotWake, Some(ip("192.0.2.9")));
        }
        refusals.add(Refusal::TooManyOfSource, Some(ip("::ffff:192.0.2.10")));
        assert_eq!(refusals.tell("dice.service", now + TELL_PAUSE / 2), None);
        assert_eq!(refusals.due(), Some(now + TELL_PAUSE));
        let second = "refused 1001 clients: 1000 may not wake dice.service (--allow), 1 beyond --max-per-source; the last \
                      from 192.0.2.10";
        assert_eq!(refusals.tell("dice.service", now + TELL_PAUSE).as_deref(), Some(second));
        assert_eq!((refusals.due(), refusals.total().may_not_wake), (None, 1001));
    }
}
