//! The short cut of `sockmap-ends`: peers in our network namespace send straight to where their bytes are to go.
//!
//! Owns: the attachment of the program at the peers, and who is in its map. Must never: be asked about a socket of another
//! network namespace; the answer would be about somebody else. How it keeps the order: `proxy-ebpf/src/ends.rs`.
//! Rests on: a socket that leaves its last sockmap being a plain one again, so that peers go on when drowse dies.

use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd, RawFd};

use anyhow::Context as _;
use aya::maps::{Map, MapData, MapError, SockHash};
use aya::programs::sk_msg::SkMsgLink;
use aya::programs::{SchedClassifier, SkMsg};
use drowse_ebpf::{Direction, Renewal, map, program, renewed};

use crate::ebpf::{self, Object};
use crate::plane::choose;
use crate::sys;

/// The programs, loaded; the one at the peers is attached as long as this lives.
#[derive(Debug)]
pub(super) struct Ends {
    _send: SkMsgLink,
    peers: OwnedFd,
    renew: OwnedFd,
    own_netns: u64,
}

impl Ends {
    /// Loads the programs of `object` and attaches the one at the peers to its map.
    pub(super) fn prepare(object: &mut Object) -> anyhow::Result<Self> {
        let own_netns = sys::own_netns_cookie().context("learn which network namespace this is")?;
        let renew: &mut SchedClassifier = object.program(program::RENEW)?;
        renew.load().map_err(ebpf::explain).context("load the program that finds peers")?;
        let renew = renew.fd().and_then(|fd| Ok(fd.as_fd().try_clone_to_owned()?));
        let renew = renew.context("duplicate a descriptor of a program")?;
        let send: &mut SkMsg = object.program(program::SEND)?;
        send.load().map_err(ebpf::explain).context("load the program at the peers")?;
        let peers = object.descriptor(map::ENDS)?;
        let send = object.attach_msg(program::SEND, map::ENDS)?;
        Ok(Self { _send: send, peers, renew, own_netns })
    }

    /// What one worker needs.
    pub(super) fn renewer(&self) -> anyhow::Result<Renewer> {
        Ok(Renewer {
            peers: SockHash::try_from(Map::SockHash(MapData::from_fd(self.peers.try_clone()?)?))?,
            renew: self.renew.try_clone()?,
            own_netns: self.own_netns,
        })
    }
}

/// What came of a renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewed {
    /// The peer's messages go straight to the target, as far as there is room.
    Open,
    /// Not now; the next bytes that come are a reason to ask again.
    NotYet,
    /// There is no such peer, or it must not be touched.
    Never,
}

/// One worker's hold on peers.
pub(super) struct Renewer {
    peers: SockHash<MapData, u64>,
    renew: OwnedFd,
    own_netns: u64,
}

impl Renewer {
    /// What is to be asked about the peer of `source`. `None`: there is nobody to ask about.
    pub(super) fn question(&self, source: &OwnedFd, cookie: u64, direction: &Direction) -> Option<Renewal> {
        if sys::netns_cookie(source.as_fd()).ok()? != self.own_netns {
            return None;
        }
        let endpoint =
            |address: rustix::net::SocketAddrAny| Some(choose::endpoint(SocketAddr::try_from(address).ok()?));
        let peer = endpoint(rustix::net::getpeername(source).ok()??)?;
        let own = endpoint(rustix::net::getsockname(source).ok()?)?;
        Some(Renewal {
            peer,
            own: own.address,
            own_port: own.port,
            ends: 0,
            source: cookie,
            target: direction.target,
        })
    }

    /// Asks.
    pub(super) fn renew(&self, question: &Renewal) -> Renewed {
        match sys::run_classifier(self.renew.as_fd(), &question.to_frame()) {
            Ok(renewed::RENEWED) => Renewed::Open,
            Ok(renewed::NOT_YET) => Renewed::NotYet,
            Ok(_) | Err(_) => Renewed::Never,
        }
    }

    /// Puts a socket of our own among the peers.
    pub(super) fn enter(&mut self, cookie: u64, socket: RawFd) -> Result<(), MapError> {
        self.peers.insert(cookie, socket, 0)
    }

    /// Undoes [`Renewer::enter`].
    pub(super) fn leave(&mut self, cookie: u64) {
        // It is gone already if it was closed.
        let _ = self.peers.remove(&cookie);
    }
}
