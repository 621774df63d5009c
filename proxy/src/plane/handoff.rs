//! The plane `handoff`: while the backend is awake, new connections go straight to its own listener.
//!
//! Owns: the steering program's attachment, the backend's listeners in their slots, the counters of handed-off flows.
//! Must never: decide when to steer, or hold a flow: what was handed off belongs to the backend alone.
//! Rests on: `sk_lookup` programs of a network namespace being attached by a `bpf_link` that is not pinned (Linux 5.9), so
//! that they are gone with the process however it dies; a sockmap letting go of a listener that closes.

use std::fs::File;
use std::os::fd::OwnedFd;

use anyhow::{Context as _, bail};
use aya::programs::sk_lookup::SkLookupLink;
use aya::programs::{SchedClassifier, SkLookup};
use drowse_ebpf::{self as abi, Endpoint, Flow, Inspection, Mark, Search, Service, Steered};

use crate::ebpf::{self, Object};

/// Slots for each of the backend's addresses: members of a `SO_REUSEPORT` group that are looked for, so that steering
/// goes on when one of them closes.
const SLOTS_PER_ADDRESS: u32 = 4;
/// The most addresses of a backend whose listeners are looked for.
const ADDRESSES_MAX: usize = (abi::LISTENERS_MAX / SLOTS_PER_ADDRESS) as usize;
const _: () = assert!(ADDRESSES_MAX >= 2);

/// Why there is no listener of the backend in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Miss {
    /// Nobody listens there, in this network namespace.
    Nobody,
    /// Its listener cannot be in a sockmap.
    Refused,
    /// Its listener is bound to a network interface.
    Bound,
}

/// The plane, prepared: programs loaded, nothing attached.
#[derive(Debug)]
pub struct Handoff {
    /// The backend's addresses, and what the last search found there.
    backend: Vec<(Endpoint, Result<(), Miss>)>,
    /// Steering is on while this lives.
    link: Option<SkLookupLink>,
}

impl Handoff {
    /// Prepares the plane in `object`, whose listen hook is attached: connections to `public` will go to the listeners
    /// of `backend`. Takes up the flows that an earlier drowse of the same name handed off. Blocks for some
    /// milliseconds.
    ///
    /// # Errors
    /// The maps are not pinned (then those flows could not be taken up), there are too many addresses, or the kernel
    /// refuses.
    pub fn prepare(object: &mut Object, public: &[Endpoint], backend: &[Endpoint]) -> anyhow::Result<Self> {
        if let Some(reason) = object.unpinned() {
            bail!("its counters have to outlive drowse, and they cannot be pinned: {reason}");
        }
        if public.len() > abi::PUBLIC_MAX {
            bail!(
                "drowse listens on {} addresses, and at most {} are handed off",
                public.len(),
                abi::PUBLIC_MAX
            );
        }
        let mut steered = object.hash_map_mut::<Endpoint, Steered>(abi::map::PUBLIC)?;
        for endpoint in public {
            steered.insert(endpoint, Steered::default(), 0).context("make a counter for a public address")?;
        }
        let steer: &mut SkLookup = object.program(abi::program::STEER)?;
        steer.load().map_err(ebpf::explain).context("load the steering program")?;
        for name in [abi::program::FIND_LISTENER, abi::program::INSPECT_FLOWS] {
            let program: &mut SchedClassifier = object.program(name)?;
            program.load().map_err(ebpf::explain).with_context(|| format!("load {name}"))?;
        }
        let mut handoff = Self { backend: Vec::new(), link: None };
        for endpoint in backend {
            handoff.learn(*endpoint);
        }
        inspect(object, Inspect::TakeUp).context("take up the flows that were handed off before")?;
        Ok(handoff)
    }

    /// Another address that the backend turned out to have. Returns whether it is news.
    pub fn learn(&mut self, endpoint: Endpoint) -> bool {
        let is_news =
            self.backend.len() < ADDRESSES_MAX && self.backend.iter().all(|(known, _)| *known != endpoint);
        if is_news {
            self.backend.push((endpoint, Err(Miss::Nobody)));
        }
        is_news
    }

    /// Whether new connections go to the backend's listeners.
    #[must_use]
    pub fn is_steering(&self) -> bool {
        self.link.is_some()
    }

    /// Where the backend listens, as far as the last search found a listener there, or why not.
    pub fn found(&self) -> &[(Endpoint, Result<(), Miss>)] {
        &self.backend
    }

    /// Begins to steer, if there is a listener to steer to.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn steer(&mut self, object: &mut Object) -> anyhow::Result<()> {
        self.find(object)?;
        if self.link.is_none() && self.backend.iter().any(|(_, found)| found.is_ok()) {
            let netns = File::open("/proc/thread-self/ns/net").context("open the network namespace")?;
            let program: &mut SkLookup = object.program(abi::program::STEER)?;
            let attached =
                program.attach(netns).map_err(ebpf::explain).context("attach the steering program")?;
            self.link = Some(program.take_link(attached).context("keep the steering program attached")?);
        }
        Ok(())
    }

    /// Leaves new connections to drowse's own listeners. A handshake that is under way at this moment may still go to
    /// the backend: see [`crate::kernel::Kernel::last_look`].
    pub fn stop_steering(&mut self) {
        self.link = None;
    }

    /// Looks for the backend's listeners, and puts what it finds in place of what it found before.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    fn find(&mut self, object: &mut Object) -> anyhow::Result<()> {
        for ((backend, found), first_slot) in
            self.backend.iter_mut().zip((0_u32..).step_by(SLOTS_PER_ADDRESS as usize))
        {
            let slots = first_slot..first_slot + SLOTS_PER_ADDRESS;
            let mut answer = Err(Miss::Nobody);
            for slot in slots.clone() {
                let search = Search { backend: *backend, slot, source_port: slot + 1 };
                let one = match object.ask(abi::program::FIND_LISTENER, &search.to_frame(), 1)? {
                    abi::found::STORED => Ok(()),
                    abi::found::REFUSED => Err(Miss::Refused),
                    abi::found::BOUND => Err(Miss::Bound),
                    _ => Err(Miss::Nobody),
                };
                answer = answer.or(one);
            }
            *found = answer;
            if answer.is_err() {
                let mut listeners = object.sock_map_mut(abi::map::LISTENERS)?;
                for slot in slots {
                    // Most are empty already.
                    let _ = listeners.clear_index(&slot);
                }
            }
        }
        Ok(())
    }
}

/// Marks drowse's own listeners, so that what they accept is told from what is handed off. To be done before anything is
/// counted.
///
/// # Errors
/// The kernel refuses.
pub fn mark(object: &mut Object, listeners: &[OwnedFd]) -> anyhow::Result<()> {
    let mut marks = object.sk_storage_mut::<Mark>(abi::map::MARKS)?;
    for listener in listeners {
        marks.insert(listener, Mark::default(), 0).context("mark a listener")?;
    }
    Ok(())
}

/// The counters of all flows that were handed off.
///
/// # Errors
/// They cannot be read.
pub fn service(object: &Object) -> anyhow::Result<Service> {
    object.array::<Service>(abi::map::SERVICE)?.get(&0, 0).context("read the counters of handed-off flows")
}

/// What was counted for one public address.
///
/// # Errors
/// It cannot be read, or is not one of the addresses that were prepared.
pub fn steered(object: &Object, endpoint: &Endpoint) -> anyhow::Result<Steered> {
    object
        .hash_map::<Endpoint, Steered>(abi::map::PUBLIC)?
        .get(endpoint, 0)
        .context("read a public address's counters")
}

/// Which flows an inspection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inspect {
    /// All, to show them.
    All,
    /// As many as it takes to find one that has moved bytes since the last inspection: whether there is one is all that
    /// the idle decision wants to know, and while flows are busy the first ones tell.
    UntilOneMoved,
    /// All, and those that are not there any more are taken out: nobody was told when they closed.
    TakeUp,
}

/// Brings the counters of open flows up to date.
///
/// # Errors
/// The kernel cannot be asked.
pub fn inspect(object: &Object, which: Inspect) -> anyhow::Result<()> {
    let before = service(object)?.last_activity_ns;
    let flows = object.hash_map::<u64, Flow>(abi::map::FLOWS)?;
    // Fused: asked once more after its end, aya's walk begins anew, and each flow would be inspected thousands of times.
    let mut cookies: Box<dyn Iterator<Item = u64>> =
        Box::new(flows.keys().take(abi::FLOWS_MAX).map_while(Result::ok).fuse());
    if which == Inspect::TakeUp {
        // A walk begins anew when the entry that it is at is taken out.
        cookies = Box::new(cookies.collect::<Vec<_>>().into_iter());
    }
    loop {
        let part: Vec<u64> = cookies.by_ref().take(abi::INSPECTED_MAX).collect();
        if part.is_empty() {
            break;
        }
        let inspection = Inspection::of(&part, which == Inspect::TakeUp);
        object.ask(abi::program::INSPECT_FLOWS, &inspection.to_frame(), inspection.count)?;
        if which == Inspect::UntilOneMoved && service(object)?.last_activity_ns != before {
            break;
        }
    }
    Ok(())
}
