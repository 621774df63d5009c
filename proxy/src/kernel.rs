//! What of drowse runs inside the kernel: the eBPF object, loaded once, with the listen hook and the hand-off in it.
//!
//! Owns: when the object is loaded, whether new connections are steered at this moment, and the reason why not. Must
//! never: delay a client (loading takes place in a thread, beside the backend's start), or decide when to hand off.

use std::cell::Cell;
use std::future::Future;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use anyhow::{Context as _, bail};
use drowse_ebpf::{Endpoint, FAMILY_V4, FAMILY_V6, Service};
use rustix::thread::{MembarrierCommand, membarrier};
use tracing::{debug, info, warn};

mod redirecting;

use self::redirecting::Redirecting;
use crate::address::Address;
use crate::clock::{self, Monotonic};
use crate::config::{PlaneChoice, RunArgs, Switch};
use crate::ebpf::{self, Object};
use crate::listener::Listeners;
use crate::plane::choose::{self, ListenerFacts, Redirection};
use crate::plane::handoff::{self, Handoff, Inspect, Miss};
use crate::plane::sockmap::{self, Announcements, Sockmap};
use crate::privileges::Loader;
use crate::readiness::listen_hook::{self, ListenHook};
use crate::report::counters::KernelCounters;
use crate::report::snapshot::{HandoffState, HandoffView, ListenerView};
use crate::{sockets, sys};

/// How long the lookup of the backend's name may hold up the loading. Later its address is learnt from a connection.
const LOOKUP_TIME: Duration = Duration::from_millis(100);
/// The shortest time between two searches for the backend's listeners that no event asks for.
const SEARCH_PAUSE: Duration = Duration::from_secs(1);

/// Longer than it takes to deal with a packet that has come.
const PACKET_TIME: Duration = Duration::from_millis(50);
/// The shortest time between two inspections, or two looks at the backend's memory, for somebody who asks. A little less
/// than `drowse top` waits between two looks, so that each gets one.
pub const LOOK_PAUSE: Duration = Duration::from_millis(800);

/// What the kernel has to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// The object is loaded, or it is known that it cannot be. From now on [`Kernel::is_hooked`] is what it will be.
    Loaded,
    /// Somebody began to listen on the backend's port.
    Listened,
}

/// One of drowse's listeners, as far as hand-off goes.
#[derive(Clone, Debug)]
struct Public {
    name: String,
    /// Its addresses as packets have them, or why its connections cannot be handed off.
    endpoints: Result<Vec<Endpoint>, String>,
}

/// What the backend has against a hand-off.
#[derive(Clone, Debug, PartialEq, Eq)]
enum BackendSays {
    NotAsked,
    Nothing,
    Against(String),
}

/// What a search for the backend's listeners is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Search {
    /// Something changed.
    Due,
    /// Nothing did since this moment.
    Done(Monotonic),
}

/// The object and what is done with it. Dropped in this order: steering ends, then the programs are detached.
#[derive(Debug)]
struct Loaded {
    handoff: Result<Handoff, String>,
    /// Until the plane takes it; or why there is none.
    sockmap: Option<Result<(Sockmap, Announcements), String>>,
    hook: ListenHook,
    object: Object,
}

/// What the hand-off needs to know.
struct Wanted {
    public: Vec<Endpoint>,
    backend: Vec<Endpoint>,
    /// drowse's own listeners.
    listeners: Vec<OwnedFd>,
}

enum Stage {
    /// Nobody asked for it yet.
    Unused,
    Loading {
        loading: Pin<Box<dyn Future<Output = anyhow::Result<Loaded>>>>,
        /// The backend ran already: flows may be open that an earlier drowse handed off.
        takes_over: bool,
    },
    Loaded(Box<Loaded>),
    /// It cannot be loaded.
    Refused,
}

/// See the module.
pub struct Kernel {
    name: String,
    pin_dir: PathBuf,
    backend: Address,
    /// Flows that are open when we exit go on without us.
    flows_outlive_us: bool,
    warns: bool,
    redirecting: Redirecting,
    /// The most flows that the kernel may have to move.
    flows_max: usize,
    public: Vec<Public>,
    /// What the options, or the kernel, have against a hand-off.
    obstacle: Option<String>,
    backend_says: BackendSays,
    /// Until it is used, or nothing, where there is nothing to load.
    loader: Option<Loader>,
    stage: Stage,
    /// New connections are to be handed off, if possible.
    wanted: bool,
    search: Search,
    /// The last try to steer failed.
    trouble: Option<String>,
    /// The reason, or the success, was logged.
    told: Option<String>,
    /// When the counters were last brought up to date for somebody who looks.
    shown_at: Option<Monotonic>,
    /// The counters of handed-off flows as they were last read: they do not go back when they cannot be.
    last: Cell<Service>,
}

impl Kernel {
    /// Nothing is loaded yet. `flows_outlive_us`: the backend goes on when drowse exits. `flows_max`: so many flows are
    /// open at most.
    #[must_use]
    pub fn new(
        run: &RunArgs,
        listeners: &[ListenerFacts],
        flows_max: u64,
        flows_outlive_us: bool,
        loader: Loader,
    ) -> Self {
        let public: Vec<Public> = listeners
            .iter()
            .map(|listener| Public { name: listener.name.clone(), endpoints: choose::endpoints(listener) })
            .collect();
        let none_fits = || {
            let reason = |one: &Public| Some(format!("{}: {}", one.name, one.endpoints.as_ref().err()?));
            Some(public.iter().map(reason).collect::<Option<Vec<String>>>()?.join("; "))
        };
        Self {
            name: run.service_name(),
            pin_dir: run.pin_dir.clone(),
            backend: run.backend.clone(),
            flows_outlive_us,
            warns: run.plane == PlaneChoice::Handoff,
            redirecting: Redirecting::new(run, listeners),
            flows_max: usize::try_from(flows_max).unwrap_or(usize::MAX),
            obstacle: choose::obstacle(run).or_else(none_fits),
            public,
            backend_says: BackendSays::NotAsked,
            stage: Stage::Unused,
            loader: Some(loader).filter(|_| run.ebpf == Switch::Auto && run.backend.port().is_some()),
            wanted: false,
            search: Search::Due,
            trouble: None,
            told: None,
            shown_at: None,
            last: Cell::default(),
        }
    }

    /// Begins to load, unless that was done, or there is no use for it. [`News::Loaded`] follows. `takes_over`: the
    /// backend runs already.
    pub fn load(&mut self, takes_over: bool, listeners: Option<&Listeners>) {
        let Some(port) = self.backend.port() else { return };
        let Some(loader) = self.loader.take() else { return };
        let (name, pin_dir) = (self.name.clone(), self.pin_dir.clone());
        let public = self.endpoints();
        let sockets = listeners.map_or_else(|| Ok(Vec::new()), Listeners::tcp_sockets);
        let (backend, keep) = (self.backend.clone(), self.flows_outlive_us);
        let redirects = self.redirection().map(|wanted| (wanted, self.flows_max));
        // Flows that an earlier drowse handed off are counted, even if this one hands off none.
        let obstacle = self.obstacle.clone().filter(|_| !takes_over);
        let loading = Box::pin(async move {
            let resolved = tokio::time::timeout(LOOKUP_TIME, backend.resolve()).await;
            let addresses = resolved.map_or_else(|_late| Vec::new(), Result::unwrap_or_default);
            let backend: Vec<Endpoint> = addresses
                .iter()
                .filter_map(|address| Some(choose::backend_endpoint(address.as_socket()?)))
                .collect();
            let load = move || {
                let wanted = obstacle.map_or_else(
                    || Ok(Wanted { public, backend, listeners: sockets.map_err(|error| error.to_string())? }),
                    Err,
                );
                let result = Loaded::new(&pin_dir, &name, port, wanted, keep, redirects);
                // To load takes 9 MB for a moment, most of it for the kernel's own types.
                sys::return_free_memory();
                result
            };
            loader.run(load).await?
        });
        self.stage = Stage::Loading { loading, takes_over };
    }

    /// The plane `sockmap`, once, when it is loaded. What becomes of it is to be told by [`Kernel::redirects`].
    pub fn take_sockmap(&mut self) -> Option<Result<(Sockmap, Announcements), String>> {
        match &mut self.stage {
            Stage::Loaded(loaded) => loaded.sockmap.take(),
            Stage::Unused | Stage::Loading { .. } | Stage::Refused => None,
        }
    }

    /// The plane of this name moves flows by the kernel from now on, or none does: one line of log.
    pub fn redirects(&mut self, result: Result<&str, String>) {
        match result {
            Ok(plane) => self.redirecting.used(plane),
            Err(reason) => self.redirecting.refused(reason, false),
        }
    }

    /// Why the proxy's flows are not moved as they should be, in a few words; `None`: they are.
    #[must_use]
    pub fn forward_obstacle(&self) -> Option<String> {
        self.redirecting.obstacle()
    }

    /// The way by which the kernel moves the proxy's flows or will, as far as is known.
    #[must_use]
    pub fn redirection(&self) -> Option<Redirection> {
        self.redirecting.wanted()
    }

    /// What the options have against the plane that they ask for: one line of log.
    pub fn tell_contradiction(&self) {
        self.redirecting.tell_contradiction();
    }

    /// Whether the listen hook sees every listen.
    #[must_use]
    pub fn is_hooked(&self) -> bool {
        matches!(self.stage, Stage::Loaded(_))
    }

    /// Whether flows that were handed off may be open that are not counted yet.
    #[must_use]
    pub fn may_have_flows(&self) -> bool {
        matches!(self.stage, Stage::Loading { takes_over: true, .. })
    }

    /// The next thing that the kernel has to tell. Cancel safe.
    pub async fn next(&mut self) -> News {
        match &mut self.stage {
            Stage::Unused | Stage::Refused => std::future::pending().await,
            Stage::Loading { loading, .. } => {
                let loaded = loading.await;
                self.use_loaded(loaded);
                News::Loaded
            }
            Stage::Loaded(loaded) => {
                loaded.hook.listened().await;
                self.search = Search::Due;
                News::Listened
            }
        }
    }

    fn use_loaded(&mut self, loaded: anyhow::Result<Loaded>) {
        match loaded {
            Ok(loaded) => {
                if let Some(reason) = loaded.object.unpinned() {
                    info!("eBPF maps are not pinned: {reason}");
                }
                if let Err(reason) = &loaded.handoff {
                    self.obstacle.get_or_insert_with(|| reason.clone());
                }
                debug!("the listen hook is attached");
                self.stage = Stage::Loaded(Box::new(loaded));
            }
            Err(error) => {
                info!("readiness by retried connects, no listen hook: {error:#}");
                self.obstacle.get_or_insert_with(|| format!("{error:#}"));
                self.stage = Stage::Refused;
                self.redirecting.refused(format!("{error:#}"), true);
            }
        }
        self.search = Search::Due;
        self.tell_obstacle();
    }

    /// What the backend has against its clients coming straight to it, if anything.
    pub fn set_backend_obstacle(&mut self, obstacle: Option<String>) {
        self.backend_says = obstacle.map_or(BackendSays::Nothing, BackendSays::Against);
        self.search = Search::Due;
        self.tell_obstacle();
    }

    /// Hands new connections off from now on, or no more. Off takes effect at once but for handshakes under way, see
    /// [`Kernel::last_look`].
    pub fn hand_off(&mut self, wanted: bool) {
        if wanted != self.wanted {
            self.wanted = wanted;
            self.search = Search::Due;
        }
        let allowed = self.wanted && self.obstacle.is_none() && self.backend_says == BackendSays::Nothing;
        let Stage::Loaded(loaded) = &mut self.stage else { return };
        let Ok(handoff) = &mut loaded.handoff else { return };
        if !allowed {
            handoff.stop_steering();
            return;
        }
        if self.search == Search::Due {
            self.search = Search::Done(clock::now());
            // Trouble may pass: the next client that is proxied is a reason to try again.
            self.trouble = handoff.steer(&mut loaded.object).err().map(|error| format!("{error:#}"));
            if self.trouble.is_some() {
                handoff.stop_steering();
            }
            self.tell_found();
        }
    }

    /// A client came to drowse and was connected to the backend at `peer`, although new connections are handed off: the
    /// backend's listeners may have changed.
    pub fn was_bypassed(&mut self, peer: Option<SocketAddr>) {
        let Stage::Loaded(loaded) = &mut self.stage else { return };
        let Ok(handoff) = &mut loaded.handoff else { return };
        let is_news = peer.is_some_and(|peer| handoff.learn(choose::backend_endpoint(peer)));
        let is_old =
            matches!(self.search, Search::Done(at) if clock::now().saturating_sub(at) >= SEARCH_PAUSE);
        if is_news || is_old {
            self.search = Search::Due;
        }
    }

    /// The counters of handed-off flows. All zero if there were none.
    #[must_use]
    pub fn service(&self) -> Service {
        let Stage::Loaded(loaded) = &self.stage else { return Service::default() };
        if loaded.handoff.is_err() {
            return Service::default();
        }
        match handoff::service(&loaded.object) {
            Ok(service) => {
                self.last.set(service);
                service
            }
            Err(error) => {
                warn!("{error:#}; so it stays awake");
                let last = self.last.get();
                Service { flows_open: last.flows_open.max(1), ..last }
            }
        }
    }

    /// Everything that was counted, with `service` as it was read before. What cannot be read is left out.
    #[must_use]
    pub fn counters(&self, service: Service) -> KernelCounters {
        let Stage::Loaded(loaded) = &self.stage else {
            return KernelCounters { service, ..KernelCounters::default() };
        };
        let public = self.endpoints().into_iter().filter_map(|endpoint| {
            let steered = handoff::steered(&loaded.object, &endpoint).ok()?;
            Some((ebpf::socket_address(&endpoint)?.to_string(), steered))
        });
        let listens = self.backend.port().and_then(|port| listen_hook::listens(&loaded.object, port).ok());
        KernelCounters { service, public: public.collect(), listens, proxied: None }
    }

    /// Brings the counters of handed-off flows up to date for somebody who looks, at most once in [`LOOK_PAUSE`].
    pub fn inspect_to_show(&mut self) {
        let now = clock::now();
        if self.shown_at.is_none_or(|at| now.saturating_sub(at) >= LOOK_PAUSE) {
            self.shown_at = Some(now);
            self.inspect(Inspect::All);
        }
    }

    /// Brings the bytes and the activity of open handed-off flows up to date; some microseconds for each. Returns whether
    /// they are.
    pub fn inspect(&self, which: Inspect) -> bool {
        let Stage::Loaded(loaded) = &self.stage else { return true };
        if loaded.handoff.is_ok()
            && let Err(error) = handoff::inspect(&loaded.object, which)
        {
            warn!("{error:#}");
            return false;
        }
        true
    }

    /// After the hand-off ended and the proxy's flows, too: whether somebody is half-way to the backend, in a handshake or
    /// in its accept queue; or, if `open_counts`, connected to it, counted or not. This is the net below the counters.
    pub fn last_look(&self, open_counts: bool) -> impl Future<Output = bool> + use<> {
        let found = match &self.stage {
            Stage::Loaded(loaded) => loaded.handoff.as_ref().map_or(&[][..], Handoff::found),
            Stage::Unused | Stage::Loading { .. } | Stage::Refused => &[],
        };
        let backend: Vec<_> = found.iter().filter_map(|(at, _)| ebpf::socket_address(at)).collect();
        let public: Vec<_> = self.endpoints().iter().filter_map(ebpf::socket_address).collect();
        async move {
            if public.is_empty() {
                return false;
            }
            // A SYN that the steering program saw before it was detached is in the tables when this returns: packets are
            // received under RCU, and this waits for all of them (`synchronize_rcu`, membarrier(2)). Kernels booted with
            // nohz_full= do not have it; a packet takes no millisecond.
            let waited = tokio::task::spawn_blocking(|| membarrier(MembarrierCommand::Global)).await;
            if !matches!(waited, Ok(Ok(()))) {
                tokio::time::sleep(PACKET_TIME).await;
            }
            let look = move || sockets::look(&public, &backend).context("read /proc/self/net/tcp");
            match tokio::task::spawn_blocking(look).await.context("look for handshakes").flatten() {
                Ok(seen) => seen.handshakes + seen.queued > 0 || (open_counts && seen.open > 0),
                Err(error) => {
                    warn!("cannot look whether somebody is about to connect, so it stays awake: {error:#}");
                    true
                }
            }
        }
    }

    /// Whether new connections are handed off at this moment.
    #[must_use]
    pub fn is_steering(&self) -> bool {
        matches!(&self.stage, Stage::Loaded(loaded) if loaded.handoff.as_ref().is_ok_and(Handoff::is_steering))
    }

    /// Why nothing is handed off, now or ever.
    #[must_use]
    pub fn obstacle(&self) -> Option<&str> {
        match (&self.obstacle, &self.backend_says) {
            (Some(reason), _) | (None, BackendSays::Against(reason)) => Some(reason),
            (None, BackendSays::NotAsked | BackendSays::Nothing) => None,
        }
    }

    /// The hand-off as people see it: how new connections to each listener travel while the backend is awake.
    #[must_use]
    pub fn view(&self) -> HandoffView {
        let reason = self.obstacle().map(str::to_owned).or_else(|| self.found_nothing());
        let state = match (&reason, self.is_steering()) {
            (Some(_), _) => HandoffState::Off,
            (None, true) => HandoffState::On,
            (None, false) => HandoffState::Ready,
        };
        let listeners = self.public.iter().map(|public| {
            let address = public.name.clone();
            let (handed_off, reason) = match &public.endpoints {
                Err(reason) => (false, Some(reason.clone())),
                Ok(endpoints) => {
                    let uncovered = self.uncovered(endpoints);
                    let is_all = uncovered.is_some() && endpoints.len() == 1;
                    (reason.is_none() && !is_all, uncovered)
                }
            };
            ListenerView { address, handed_off, reason }
        });
        HandoffView { state, listeners: listeners.collect(), reason }
    }

    /// Why there is nobody to hand off to, although somebody is looked for.
    fn found_nothing(&self) -> Option<String> {
        if self.trouble.is_some() {
            return self.trouble.clone();
        }
        let Stage::Loaded(loaded) = &self.stage else { return None };
        let found = loaded.handoff.as_ref().ok()?.found();
        if !self.wanted || self.search == Search::Due || found.iter().any(|(_, found)| found.is_ok()) {
            return None;
        }
        let miss = found.iter().find_map(|(_, found)| found.err()).unwrap_or(Miss::Nobody);
        let backend = &self.backend;
        Some(match miss {
            Miss::Nobody => format!(
                "no socket of this network namespace listens at {backend}: a container or another machine does"
            ),
            Miss::Refused => format!(
                "the listener at {backend} is of MPTCP or has an upper layer protocol; a backend written in Go needs \
                 GODEBUG=multipathtcp=0"
            ),
            Miss::Bound => format!("the listener at {backend} is bound to a network interface"),
        })
    }

    /// Which of a listener's families the backend's listeners do not fit.
    fn uncovered(&self, endpoints: &[Endpoint]) -> Option<String> {
        let Stage::Loaded(loaded) = &self.stage else { return None };
        let found = loaded.handoff.as_ref().ok()?.found();
        if found.iter().all(|(_, found)| found.is_err()) {
            return None;
        }
        let missing = |family| {
            let one = endpoints.iter().find(|endpoint| endpoint.family == family)?;
            let seen = handoff::steered(&loaded.object, one).ok()?;
            let fits = found.iter().any(|(at, found)| found.is_ok() && at.family == family);
            (!fits && seen.steered_total == 0).then_some(family)
        };
        let family =
            if missing(FAMILY_V6).is_some() { "IPv6" } else { missing(FAMILY_V4).map(|_| "IPv4")? };
        Some(format!("{family} is proxied: the backend at {} does not listen for it", self.backend))
    }

    fn endpoints(&self) -> Vec<Endpoint> {
        self.public.iter().filter_map(|public| public.endpoints.as_ref().ok()).flatten().copied().collect()
    }

    /// One line of log for each new reason why nothing is handed off.
    fn tell_obstacle(&mut self) {
        if let Some(reason) = self.obstacle().map(str::to_owned) {
            self.tell(format!("connections are not handed off: {reason}"), Some(&reason), self.warns);
        }
    }

    /// One line of log for what a search found, if that is news.
    fn tell_found(&mut self) {
        let Stage::Loaded(loaded) = &self.stage else { return };
        let Ok(handoff) = &loaded.handoff else { return };
        let is_steering = handoff.is_steering();
        let nothing = self.found_nothing();
        let line = if let Some(reason) = &nothing {
            format!("connections are not handed off: {reason}")
        } else {
            let listeners = self.view().listeners.into_iter();
            let reasons = listeners.filter_map(|it| Some(format!("{}: {}", it.address, it.reason?)));
            let line = format!("new connections go straight to {} (hand-off)", self.backend);
            std::iter::once(line).chain(reasons).collect::<Vec<_>>().join("; ")
        };
        self.tell(line, nothing.as_deref(), self.warns && !is_steering);
    }

    fn tell(&mut self, line: String, reason: Option<&str>, warns: bool) {
        if self.told.as_ref() == Some(&line) {
            return;
        }
        if warns {
            warn!(event = "handoff", reason, "{line}");
        } else {
            info!(event = "handoff", reason, "{line}");
        }
        self.told = Some(line);
    }
}

impl Loaded {
    /// Loads the object and attaches the listen hook for `port`. `wanted`: what the hand-off needs to know, or why there
    /// will be none. `redirects`: how the kernel is to move flows, and how many at most, if it is. That it does not is no error.
    fn new(
        pin_dir: &Path,
        name: &str,
        port: u16,
        wanted: Result<Wanted, String>,
        keep_flows: bool,
        redirects: Option<(Redirection, usize)>,
    ) -> anyhow::Result<Self> {
        let layout = redirects.map(|_| ebpf::layout_for_sockmap());
        let known = layout.as_ref().and_then(|layout| layout.as_ref().ok()).copied();
        let mut object =
            Object::load_for(pin_dir, name, known, redirects.map_or(0, |(_, flows_max)| flows_max))?;
        object.keep_flows(keep_flows);
        // Before anything is counted.
        let wanted = wanted.and_then(|wanted| {
            handoff::mark(&mut object, &wanted.listeners).map_err(|error| format!("{error:#}"))?;
            Ok(wanted)
        });
        let hook = ListenHook::attach(&mut object, &[port])?;
        let handoff = wanted.and_then(|wanted| {
            Handoff::prepare(&mut object, &wanted.public, &wanted.backend)
                .map_err(|error| format!("{error:#}"))
        });
        let sockmap = layout.zip(redirects).map(|(layout, (wanted, _))| {
            layout.and_then(|_| prepare_sockmap(&mut object, wanted)).map_err(|error| format!("{error:#}"))
        });
        Ok(Self { handoff, sockmap, hook, object })
    }
}

/// Prepares the plane `sockmap` as far as this kernel can be trusted with it. Who asks for it by name gets it with a warning.
fn prepare_sockmap(object: &mut Object, wanted: Redirection) -> anyhow::Result<(Sockmap, Announcements)> {
    let fault = sockmap::known_fault();
    if wanted == Redirection::Best
        && let Some(fault) = fault
    {
        bail!("{fault}; `--plane sockmap` uses it all the same");
    }
    let prepared = Sockmap::prepare(object, wanted)?;
    let unnoticed = if wanted == Redirection::Ends { prepared.0.peers_notice_nothing() } else { Ok(()) };
    for warning in fault.into_iter().chain(unnoticed.err()) {
        warn!("{warning}; it is used all the same, because it was asked for");
    }
    Ok(prepared)
}
