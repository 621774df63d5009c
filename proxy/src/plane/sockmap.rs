//! The planes `sockmap` and `sockmap-ends`: established flows that the kernel moves, with a guard.
//!
//! Owns: the programs' attachment, the maps that it works with, and the one reader of what it announces. Must
//! never: move a byte (`forward` moves what is passed), or let a direction be half in: what could not be begun is undone.
//! Rests on: a socket leaving all sockmaps when it is closed; an update by descriptor that asks for no capability (Linux
//! 5.19); an orphan with `TCP_LINGER2` below zero that answers the acknowledgement of its FIN with a reset
//! (`tcp_rcv_state_process`).

use std::fmt;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::Context as _;
use aya::maps::{HashMap, Map, MapData, MapError, RingBuf, SockHash};
use aya::programs::SkSkb;
use aya::programs::sk_skb::SkSkbLink;
use drowse_ebpf::{Direction, PassingEvent, Proxied, Renewal, Taken, map, program};

use self::ends::{Ends, Renewer};
use crate::ebpf::{self, Object};
use crate::plane::choose::Redirection;
use crate::sys::{self, SharedWords};

mod ends;
mod probe;

pub use ends::Renewed;
pub use probe::known_fault;

/// See [`Sockmap::calm_bursts`]. A stream that is bulk from its first bytes on never gets so far, and neither does a
/// connection for one request.
const CALM_BURSTS: u32 = 4;

/// The plane, prepared: the programs are attached to their maps, as long as this lives.
#[derive(Debug)]
pub struct Sockmap {
    /// Small bursts in a row after which the kernel moves a direction: some, unless set to another number.
    pub calm_bursts: u32,
    _verdict: SkSkbLink,
    ends: Option<Ends>,
    sources: OwnedFd,
    sockets: OwnedFd,
    directions: OwnedFd,
    taken: OwnedFd,
    counters: Arc<Counters>,
}

/// The counters of all proxied flows that the kernel moves, shared with the program.
#[derive(Debug)]
pub struct Counters(SharedWords);

impl Counters {
    fn word(&self, offset: usize) -> Option<&AtomicU64> {
        self.0.words().get(offset / size_of::<u64>())
    }

    fn get(&self, offset: usize) -> u64 {
        self.word(offset).map_or(0, |word| word.load(Relaxed))
    }

    fn add(&self, offset: usize, amount: u64) {
        if let Some(word) = self.word(offset) {
            word.fetch_add(amount, Relaxed);
        }
    }

    /// A flow's first direction is moved by the kernel.
    pub fn opened(&self) {
        self.add(offset_of!(Proxied, flows_total), 1);
        self.add(offset_of!(Proxied, flows_open), 1);
    }

    /// Such a flow ended.
    pub fn closed(&self) {
        self.add(offset_of!(Proxied, flows_open), 1_u64.wrapping_neg());
    }

    /// A flow was left to user space.
    pub fn refused(&self) {
        self.add(offset_of!(Proxied, refused_total), 1);
    }

    /// All of them are zero again.
    fn clear(&self) {
        for word in self.0.words() {
            word.store(0, Relaxed);
        }
    }

    /// All of them, each as it is at this moment.
    #[must_use]
    pub fn read(&self) -> Proxied {
        Proxied {
            flows_total: self.get(offset_of!(Proxied, flows_total)),
            flows_open: self.get(offset_of!(Proxied, flows_open)),
            redirected_to_backend: self.get(offset_of!(Proxied, redirected_to_backend)),
            redirected_to_client: self.get(offset_of!(Proxied, redirected_to_client)),
            passed_to_backend: self.get(offset_of!(Proxied, passed_to_backend)),
            passed_to_client: self.get(offset_of!(Proxied, passed_to_client)),
            last_activity_ns: self.get(offset_of!(Proxied, last_activity_ns)),
            refused_total: self.get(offset_of!(Proxied, refused_total)),
            events_lost_total: self.get(offset_of!(Proxied, events_lost_total)),
            peers_total: self.get(offset_of!(Proxied, peers_total)),
        }
    }
}

impl Sockmap {
    /// Loads the programs of `object` that are `wanted`, attaches them to their maps, and sees that the kernel does what the
    /// plane rests on. Blocks for some milliseconds.
    ///
    /// # Errors
    /// The kernel refuses, or does something else; the reason says what.
    pub fn prepare(object: &mut Object, wanted: Redirection) -> anyhow::Result<(Self, Announcements)> {
        let sources = object.descriptor(map::SOURCES)?;
        let verdict: &mut SkSkb = object.program(program::REDIRECT)?;
        verdict.load().map_err(ebpf::explain).context("load the verdict program")?;
        let verdict = object.attach_verdict(program::REDIRECT, map::SOURCES)?;
        let counters = object.descriptor(map::PROXIED)?;
        let counters = SharedWords::map(counters.as_fd(), size_of::<Proxied>() / size_of::<u64>())
            .context("map the counters of proxied flows")?;
        let ends = match wanted {
            Redirection::Own => None,
            Redirection::Ends => Some(Ends::prepare(object)?),
            Redirection::Best => {
                Ends::prepare(object).ok().filter(|ends| probe::peers::notice_nothing(ends).is_ok())
            }
        };
        let mut announcements = Announcements(object.ring_buffer(map::PASSING)?);
        let sockmap = Self {
            calm_bursts: CALM_BURSTS,
            _verdict: verdict,
            ends,
            sources,
            sockets: object.descriptor(map::SOCKETS)?,
            directions: object.descriptor(map::DIRECTIONS)?,
            taken: object.descriptor(map::TAKEN)?,
            counters: Arc::new(Counters(counters)),
        };
        sockmap.probe(&mut announcements)?;
        Ok((sockmap, announcements))
    }

    /// Sees that the kernel does what the plane rests on, with connections over the loopback of this thread's network
    /// namespace. Nothing is left of them. To be called only while the plane has no flow.
    ///
    /// # Errors
    /// What the kernel does instead, or why it cannot be tried.
    pub fn probe(&self, announcements: &mut Announcements) -> anyhow::Result<()> {
        probe::run(self, announcements)
    }

    /// The counters of all flows.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Whether peers may send straight to the other side.
    #[must_use]
    pub fn cuts_short(&self) -> bool {
        self.ends.is_some()
    }

    /// Tries on sockets of our own whether programs can notice that their socket is in a sockmap. `Ok` if no peers are put
    /// into one.
    ///
    /// # Errors
    /// What they can notice, or why it could not be tried.
    pub fn peers_notice_nothing(&self) -> Result<(), String> {
        self.ends.as_ref().map_or(Ok(()), probe::peers::notice_nothing)
    }

    /// What one worker needs.
    ///
    /// # Errors
    /// No descriptor can be had.
    pub fn redirector(&self) -> anyhow::Result<Redirector> {
        let data = |fd: &OwnedFd| -> anyhow::Result<MapData> { Ok(MapData::from_fd(fd.try_clone()?)?) };
        Ok(Redirector {
            sources: SockHash::try_from(Map::SockHash(data(&self.sources)?))?,
            sockets: SockHash::try_from(Map::SockHash(data(&self.sockets)?))?,
            directions: HashMap::try_from(Map::HashMap(data(&self.directions)?))?,
            taken: HashMap::try_from(Map::HashMap(data(&self.taken)?))?,
            renewer: self.ends.as_ref().map(Ends::renewer).transpose()?,
            counters: self.counters(),
            calm_bursts: self.calm_bursts,
        })
    }
}

/// What the kernel announces: directions that begin to pass. It has one reader.
pub struct Announcements(RingBuf<MapData>);

impl Announcements {
    /// The next one, if there is one: the token of the direction.
    #[must_use]
    pub fn take(&mut self) -> Option<u64> {
        let event = self.0.next()?;
        PassingEvent::from_bytes(&event).map(|event| event.token)
    }
}

impl AsFd for Announcements {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl fmt::Debug for Announcements {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Announcements").finish_non_exhaustive()
    }
}

/// One worker's hold on the maps.
pub struct Redirector {
    sources: SockHash<MapData, u64>,
    sockets: SockHash<MapData, u64>,
    directions: HashMap<MapData, u64, Direction>,
    taken: HashMap<MapData, u64, Taken>,
    renewer: Option<Renewer>,
    counters: Arc<Counters>,
    calm_bursts: u32,
}

impl Redirector {
    /// The counters of all flows.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// See [`Sockmap::calm_bursts`].
    #[must_use]
    pub fn calm_bursts(&self) -> u32 {
        self.calm_bursts
    }

    /// Makes `socket`, whose cookie is `cookie`, one that bytes can be redirected to.
    ///
    /// # Errors
    /// The kernel does not take it (`EOPNOTSUPP`: it is not ESTABLISHED, or no plain TCP), or the map is full (`E2BIG`).
    pub fn join(&mut self, socket: &OwnedFd, cookie: u64) -> io::Result<()> {
        // The guards go by the room in the send buffer.
        sys::limit_by_send_buffer_alone(socket.as_fd())?;
        self.sockets.insert(cookie, socket.as_raw_fd(), 0).map_err(into_io)
    }

    /// Undoes [`Redirector::join`]. Whatever was redirected to the socket and is not sent yet is lost, and so is what was
    /// passed and not read.
    pub fn leave(&mut self, cookie: u64) {
        // It is gone already if the socket was closed or has failed.
        let _ = self.sockets.remove(&cookie);
    }

    /// From now on the kernel moves what `source` receives, and what it has received and nobody has read.
    ///
    /// # Errors
    /// As [`Redirector::join`]; then nothing has changed.
    pub fn begin(&mut self, source: &OwnedFd, cookie: u64, direction: Direction) -> io::Result<()> {
        // A close with unread bytes resets, unless these are the passed ones. If we are killed, the peer would go on
        // writing into a window that stays closed.
        sys::reset_when_orphaned(source.as_fd())?;
        // It is of use only after the insert, but must not fail there.
        sys::poke(source.as_fd())?;
        self.directions.insert(cookie, direction, 0).map_err(into_io)?;
        let begun = self
            .taken
            .insert(cookie, Taken::default(), 0)
            .and_then(|()| self.sources.insert(cookie, source.as_raw_fd(), 0));
        if let Err(error) = begun {
            self.forget(cookie);
            return Err(into_io(error));
        }
        let _ = sys::poke(source.as_fd());
        Ok(())
    }

    /// Undoes [`Redirector::begin`]: what comes from now on stays in the receive queue. Bytes that come at this very moment are
    /// lost, so this is for sockets of our own making; a worker closes the socket.
    fn end(&mut self, cookie: u64) {
        // It is gone already if the socket has failed.
        let _ = self.sources.remove(&cookie);
        self.forget(cookie);
    }

    /// Takes the counters of a direction out of the maps. Its source is about to be closed, and leaves the maps by that.
    pub fn forget(&mut self, cookie: u64) {
        let _ = self.directions.remove(&cookie);
        let _ = self.taken.remove(&cookie);
    }

    /// Whether peers may send straight to the other side.
    #[must_use]
    pub fn cuts_short(&self) -> bool {
        self.renewer.is_some()
    }

    /// What to ask about the peer of `source`, so that it sends straight to the target of `direction`; makes the counters
    /// of that. Both sockets must have joined. `None`: there is no such peer, or no room.
    pub fn find_peer(&mut self, source: &OwnedFd, cookie: u64, direction: Direction) -> Option<Renewal> {
        let question = self.renewer.as_ref()?.question(source, cookie, &direction)?;
        self.directions.insert(cookie, direction, 0).ok()?;
        Some(question)
    }

    /// Lets the peer send straight to the target, as far as there is room. All that was received from it must have been
    /// sent on.
    #[must_use]
    pub fn renew(&self, question: &Renewal) -> Renewed {
        self.renewer.as_ref().map_or(Renewed::Never, |renewer| renewer.renew(question))
    }

    /// Has the peer send everything to us again; a message that it is about to send may still go straight to the target.
    pub fn stop_peer(&self, question: &Renewal) {
        let _ = self.renew(&Renewal { ends: 1, ..*question });
    }

    /// How far a direction has got.
    #[must_use]
    pub fn progress(&self, cookie: u64) -> Option<Direction> {
        self.directions.get(&cookie, 0).ok()
    }

    /// Says how many passed bytes were moved on, and how many bytes were written to the target in all. When that is all
    /// that was passed, the kernel moves the next ones.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn publish(&mut self, cookie: u64, taken: Taken) -> io::Result<()> {
        self.taken.insert(cookie, taken, 0).map_err(into_io)
    }
}

impl fmt::Debug for Redirector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redirector").finish_non_exhaustive()
    }
}

fn into_io(error: MapError) -> io::Error {
    if let MapError::SyscallError(error) = error { error.io_error } else { io::Error::other(error) }
}
