//! The eBPF object in user space: embedded, loaded, pinned, its log lines passed on.
//!
//! Owns: the loaded object (maps and programs), its pins and its log. Must never: attach a program by itself (the
//! part that a program belongs to does), or outlive the process: nothing that changes the kernel's behaviour is pinned.
//! Rests on: a map or program without pin and a `bpf_link` are gone with their last file descriptor.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::{LazyLock, Mutex, PoisonError};

use anyhow::{Context as _, anyhow, bail};
use aya::maps::sock::SockMapFd;
use aya::maps::{Array, HashMap, Map, MapData, RingBuf, SkStorage, SockHash, SockMap};
use aya::programs::sk_msg::SkMsgLink;
use aya::programs::sk_skb::SkSkbLink;
use aya::programs::{ProgramError, SchedClassifier, SkMsg, SkSkb, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfLoader, Pod};
use aya_log::EbpfLogger;
use drowse_ebpf as abi;
use rustix::io::Errno;
use tracing::level_filters::LevelFilter;
use tracing_log::LogTracer;

pub mod facts;
mod layout;
mod pins;

pub use facts::{Answer, Availability, Fact, availability, cgroup2_root, kernel_release, kernel_version};
pub use layout::{Layout, layout};
pub use pins::{PIN_DIR, open_flows, pin_name};

use crate::sys::{self, Readable};
use pins::Pins;

/// The object that `cargo xtask build-ebpf` built; empty if it did not.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/drowse.o"));

/// Bytes of a ring buffer that nothing is written to: the least that the kernel allows, one page.
const RING_BYTES_MIN: usize = 4096;

/// How often a test run is tried that signals interrupt.
const ATTEMPTS_MAX: usize = 8;

/// Bytes of the log's ring buffer otherwise; some hundred lines.
const LOG_BYTES: usize = 128 << 10;

/// A loader that is made once. To make one takes 20 ms, ten times as long as to load the object, because aya then parses
/// the kernel's own types (5 MB). They are for CO-RE relocations, of which the object has none: it is made without them.
type Loader = LazyLock<Mutex<EbpfLoader<'static>>>;

/// The loader for an object whose maps have no pins.
static LOADER: Loader = LazyLock::new(new_loader);
/// The loader for an object some of whose maps are pinned, or are there already; it never forgets a path.
static PINNING_LOADER: Loader = LazyLock::new(new_loader);

fn new_loader() -> Mutex<EbpfLoader<'static>> {
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    Mutex::new(loader)
}

/// The eBPF object, loaded: its maps exist, its programs can be loaded and attached.
pub struct Object {
    // Dropped in this order: programs are detached first, then the pins go.
    ebpf: Ebpf,
    pins: Result<Pins, String>,
}

impl Object {
    /// Loads the embedded object and pins its maps in the directory [`pin_name`]`(name)` of `pin_dir`. Maps that cannot be
    /// pinned are no error, see [`Object::unpinned`]. The counters of flows that a drowse of the same name left behind are
    /// taken over. `layout`: what the programs are told that read the kernel's own structures; without it these cannot be
    /// used, and their maps are as small as can be.
    ///
    /// # Errors
    /// The object is not built in, a capability is missing, or the kernel refuses.
    pub fn load(pin_dir: &Path, name: &str, layout: Option<Layout>) -> anyhow::Result<Self> {
        Self::load_for(pin_dir, name, layout, abi::PROXIED_FLOWS_MAX)
    }

    /// [`Object::load`] with maps for `flows_max` proxied flows, or [`abi::PROXIED_FLOWS_MAX`] if that is less.
    ///
    /// # Errors
    /// As [`Object::load`].
    pub fn load_for(
        pin_dir: &Path,
        name: &str,
        layout: Option<Layout>,
        flows_max: usize,
    ) -> anyhow::Result<Self> {
        let pins = || Pins::claim(pin_dir, name).map_err(|error| format!("{error:#}"));
        Self::load_with(pins, layout, flows_max)
    }

    /// Loads the embedded object to try something out: it has no pins, and maps for one flow.
    ///
    /// # Errors
    /// As [`Object::load`].
    pub fn load_to_try(layout: Layout) -> anyhow::Result<Self> {
        Self::load_with(|| Err("it is there to try something out".to_owned()), Some(layout), 1)
    }

    fn load_with(
        pins: impl FnOnce() -> Result<Pins, String>,
        layout: Option<Layout>,
        flows_max: usize,
    ) -> anyhow::Result<Self> {
        let availability = availability();
        if let Some(reason) = availability.obstacle() {
            bail!("{reason}");
        }
        let level = log_level();
        let log_bytes = if *level == 0 { RING_BYTES_MIN } else { LOG_BYTES };
        let mut pins = pins();
        let loader = if pins.is_ok() { &PINNING_LOADER } else { &LOADER };
        let mut loader = loader.lock().unwrap_or_else(PoisonError::into_inner);
        // The loader keeps a reference for ever; a process loads one object. Zero, before Linux 5.14, is no socket's.
        let netns_cookie: &'static u64 = Box::leak(Box::new(sys::own_netns_cookie().unwrap_or(0)));
        loader.override_global(abi::global::NETNS_COOKIE, netns_cookie, true);
        loader
            .override_global(abi::global::LOG_LEVEL, level, true)
            .map_max_entries(abi::map::LOG, u32::try_from(log_bytes)?);
        if let Some(layout) = layout {
            let layout: &'static Layout = Box::leak(Box::new(layout));
            loader
                .override_global(abi::global::WRITE_SEQ_OFFSET, &layout.write_seq, true)
                .override_global(abi::global::WMEM_QUEUED_OFFSET, &layout.wmem_queued, true)
                .override_global(abi::global::SNDBUF_OFFSET, &layout.sndbuf, true)
                .override_global(abi::global::COPIED_SEQ_OFFSET, &layout.copied_seq, true)
                .override_global(abi::global::MSS_OFFSET, &layout.mss, true)
                .override_global(abi::global::NOTSENT_LOWAT_OFFSET, &layout.notsent_lowat, true)
                .override_global(abi::global::ULP_OPS_OFFSET, &layout.ulp_ops, true)
                .override_global(abi::global::SOCKET_OFFSET, &layout.socket, true);
        }
        let (sockets, news) = if layout.is_some() { sizes(flows_max) } else { (1, RING_BYTES_MIN) };
        for map in
            [abi::map::SOURCES, abi::map::SOCKETS, abi::map::DIRECTIONS, abi::map::TAKEN, abi::map::ENDS]
        {
            loader.map_max_entries(map, u32::try_from(sockets)?);
        }
        loader.map_max_entries(abi::map::PASSING, u32::try_from(news)?);
        for (map, path) in pins.iter().flat_map(Pins::kept) {
            loader.map_pin_path(map, path);
        }
        let ebpf = loader.load(OBJECT).map_err(explain).context("load the eBPF object")?;
        if let Err(error) = pins.as_ref().map_or(Ok(()), |pins| pins.show(&ebpf)) {
            pins = Err(format!("{error:#}"));
        }
        Ok(Self { ebpf, pins })
    }

    /// Why the maps are not pinned, if they are not: for one line of log. All but the
    /// hand-off works without.
    #[must_use]
    pub fn unpinned(&self) -> Option<&str> {
        self.pins.as_ref().err().map(String::as_str)
    }

    /// Whether the counters of handed-off flows outlive this object if any of those flows is open when it is dropped.
    /// Else they go with it.
    pub(crate) fn keep_flows(&mut self, keep: bool) {
        if let Ok(pins) = &mut self.pins {
            pins.keep = keep;
        }
    }

    /// The hash map `name`, to write.
    pub(crate) fn hash_map_mut<K: Pod, V: Pod>(
        &mut self,
        name: &str,
    ) -> anyhow::Result<HashMap<&mut MapData, K, V>> {
        HashMap::try_from(self.map_mut(name)?).with_context(|| format!("use map {name}"))
    }

    /// The hash map `name`, to read.
    pub(crate) fn hash_map<K: Pod, V: Pod>(&self, name: &str) -> anyhow::Result<HashMap<&MapData, K, V>> {
        HashMap::try_from(self.map(name)?).with_context(|| format!("use map {name}"))
    }

    /// The array `name`, to read.
    pub(crate) fn array<V: Pod>(&self, name: &str) -> anyhow::Result<Array<&MapData, V>> {
        Array::try_from(self.map(name)?).with_context(|| format!("use map {name}"))
    }

    /// The socket storage `name`, to write.
    pub(crate) fn sk_storage_mut<V: Pod>(
        &mut self,
        name: &str,
    ) -> anyhow::Result<SkStorage<&mut MapData, V>> {
        SkStorage::try_from(self.map_mut(name)?).with_context(|| format!("use map {name}"))
    }

    /// The sockmap `name`, to write.
    pub(crate) fn sock_map_mut(&mut self, name: &str) -> anyhow::Result<SockMap<&mut MapData>> {
        SockMap::try_from(self.map_mut(name)?).with_context(|| format!("use map {name}"))
    }

    /// A descriptor of the map `name`.
    pub(crate) fn descriptor(&self, name: &str) -> anyhow::Result<OwnedFd> {
        let (Map::Array(data) | Map::HashMap(data) | Map::SockHash(data)) = self.map(name)? else {
            bail!("map {name} is of no type that descriptors are asked for");
        };
        data.fd()
            .as_fd()
            .try_clone_to_owned()
            .with_context(|| format!("duplicate the descriptor of map {name}"))
    }

    /// Attaches the verdict program `name`, which is loaded, to the sockhash `map`, until the link is dropped.
    pub(crate) fn attach_verdict(&mut self, name: &str, map: &str) -> anyhow::Result<SkSkbLink> {
        let fd = self.sock_hash_fd(map)?;
        let verdict: &mut SkSkb = self.program(name)?;
        let attached =
            verdict.attach(&fd).map_err(explain).with_context(|| format!("attach {name} to {map}"))?;
        verdict.take_link(attached).with_context(|| format!("keep {name} attached to {map}"))
    }

    /// Attaches the `sk_msg` program `name`, which is loaded, to the sockhash `map`, until the link is dropped.
    pub(crate) fn attach_msg(&mut self, name: &str, map: &str) -> anyhow::Result<SkMsgLink> {
        let fd = self.sock_hash_fd(map)?;
        let program: &mut SkMsg = self.program(name)?;
        let attached =
            program.attach(&fd).map_err(explain).with_context(|| format!("attach {name} to {map}"))?;
        program.take_link(attached).with_context(|| format!("keep {name} attached to {map}"))
    }

    fn sock_hash_fd(&self, name: &str) -> anyhow::Result<SockMapFd> {
        let map: SockHash<_, u64> =
            SockHash::try_from(self.map(name)?).with_context(|| format!("use map {name}"))?;
        map.fd().try_clone().with_context(|| format!("duplicate the descriptor of map {name}"))
    }

    fn map(&self, name: &str) -> anyhow::Result<&Map> {
        self.ebpf.map(name).with_context(|| format!("find map {name} in the eBPF object"))
    }

    fn map_mut(&mut self, name: &str) -> anyhow::Result<&mut Map> {
        self.ebpf.map_mut(name).with_context(|| format!("find map {name} in the eBPF object"))
    }

    /// Runs the classifier `name`, which is loaded, `times` times with `frame`, in the network namespace of this thread.
    /// Gives its last answer. A signal that interrupts the kernel's loop is no reason to give up.
    pub(crate) fn ask(&self, name: &str, frame: &[u8], times: u32) -> anyhow::Result<u32> {
        let program =
            self.ebpf.program(name).with_context(|| format!("find program {name} in the eBPF object"))?;
        let program: &SchedClassifier = program.try_into().with_context(|| format!("use program {name}"))?;
        let run = || {
            let options = TestRunOptions { data_in: Some(frame), repeat: times, ..TestRunOptions::new() };
            program.test_run(options)
        };
        let mut result = run();
        for _ in 1..ATTEMPTS_MAX {
            match &result {
                Err(ProgramError::SyscallError(error))
                    if error.io_error.kind() == io::ErrorKind::Interrupted =>
                {
                    result = run();
                }
                Ok(_) | Err(_) => break,
            }
        }
        Ok(result.map_err(explain).with_context(|| format!("run {name}"))?.return_value)
    }

    /// The ring buffer `name`, taken out of the object: it has one reader.
    pub(crate) fn ring_buffer(&mut self, name: &str) -> anyhow::Result<RingBuf<MapData>> {
        let map = self.ebpf.take_map(name).with_context(|| format!("find map {name} in the eBPF object"))?;
        RingBuf::try_from(map).with_context(|| format!("use map {name}"))
    }

    /// The program `name`, not loaded yet.
    pub(crate) fn program<'a, P>(&'a mut self, name: &str) -> anyhow::Result<&'a mut P>
    where
        &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
    {
        let program = self.ebpf.program_mut(name);
        let program = program.with_context(|| format!("find program {name} in the eBPF object"))?;
        program.try_into().with_context(|| format!("use program {name}"))
    }

    /// The programs' log, taken out of the object. To be called within a tokio runtime.
    pub(crate) fn log(&mut self) -> anyhow::Result<Log> {
        let lines = EbpfLogger::init_with_logger(&mut self.ebpf, LogTracer::new());
        let lines = lines.context("find the log in the eBPF object")?;
        let readable = Readable::new(lines.as_fd()).context("watch the programs' log")?;
        Ok(Log { lines, readable })
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        let service = self.array::<abi::Service>(abi::map::SERVICE).and_then(|map| Ok(map.get(&0, 0)?));
        if let Ok(pins) = &mut self.pins {
            pins.keep &= service.is_ok_and(|service| service.flows_open > 0);
        }
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Object").finish_non_exhaustive()
    }
}

/// The programs' log lines, on their way into `tracing`.
pub(crate) struct Log {
    lines: EbpfLogger<LogTracer>,
    readable: Readable,
}

impl Log {
    /// Waits for log lines and passes them on. Cancel safe.
    ///
    /// # Errors
    /// The runtime is shutting down.
    pub(crate) async fn pass_on(&mut self) -> io::Result<()> {
        let mut ready = self.readable.readable().await?;
        self.lines.flush();
        ready.clear_ready();
        Ok(())
    }
}

/// What the programs of the plane sockmap are told, if they can be used.
///
/// # Errors
/// They need something that is not here: the reason.
pub fn layout_for_sockmap() -> anyhow::Result<Layout> {
    if let Some(reason) = availability().sockmap_obstacle() {
        bail!("{reason}");
    }
    layout()
}

/// How many sockets the maps of proxied flows take, and the bytes of the ring buffer of [`abi::PassingEvent`].
fn sizes(flows_max: usize) -> (usize, usize) {
    let sockets = 2 * flows_max.clamp(1, abi::PROXIED_FLOWS_MAX);
    let bytes = sockets * abi::PASSING_EVENTS_BYTES / abi::PROXIED_SOCKETS_MAX;
    (sockets, bytes.next_power_of_two().clamp(RING_BYTES_MIN, abi::PASSING_EVENTS_BYTES))
}

/// An address as the programs have it, in the words of the standard library. `None`: not one that they write.
pub(crate) fn socket_address(endpoint: &abi::Endpoint) -> Option<SocketAddr> {
    let [first, ..] = endpoint.address;
    let ip = match endpoint.family {
        abi::FAMILY_V4 => IpAddr::V4(Ipv4Addr::from(first.to_ne_bytes())),
        abi::FAMILY_V6 => {
            let words = endpoint.address.map(u32::from_be).into_iter();
            IpAddr::V6(Ipv6Addr::from_bits(words.fold(0, |bits, word| bits << 32 | u128::from(word))))
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::try_from(endpoint.port).ok()?))
}

/// The level of [`abi::global::LOG_LEVEL`] that the current subscribers want. Lines above it cost nothing: the verifier
/// removes them.
fn log_level() -> &'static u8 {
    match LevelFilter::current().into_level() {
        None => &0,
        Some(tracing::Level::ERROR) => &(aya_log::Level::Error as u8),
        Some(tracing::Level::WARN) => &(aya_log::Level::Warn as u8),
        Some(tracing::Level::INFO) => &(aya_log::Level::Info as u8),
        Some(tracing::Level::DEBUG) => &(aya_log::Level::Debug as u8),
        Some(tracing::Level::TRACE) => &(aya_log::Level::Trace as u8),
    }
}

/// An error of aya in one line, with what the administrator can do about it.
pub(crate) fn explain(error: impl std::error::Error + Send + Sync + 'static) -> anyhow::Error {
    let error = anyhow::Error::new(error);
    let not_permitted = |error: &io::Error| error.raw_os_error() == Some(Errno::PERM.raw_os_error());
    if error.chain().filter_map(|error| error.downcast_ref()).any(not_permitted) {
        return anyhow!(
            "the kernel does not permit it although CAP_BPF and CAP_NET_ADMIN are there: a user namespace \
             (PrivateUsers=), a SystemCallFilter= without `bpf`, or a container may be the cause"
        );
    }
    if let Some(ProgramError::LoadError { io_error, verifier_log }) = error.downcast_ref() {
        let log = verifier_log.to_string();
        return anyhow!("the kernel's verifier refuses the program: {io_error}: {}", verifier_reason(&log));
    }
    error
}

/// The line of a verifier's log that says why: the last one before the statistics.
fn verifier_reason(log: &str) -> &str {
    let statistics = ["processed ", "verification time ", "stack depth "];
    let is_reason = |line: &&str| !line.is_empty() && !statistics.iter().any(|start| line.starts_with(start));
    log.lines().map(str::trim).rfind(is_reason).unwrap_or("it gives no reason")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verifiers_reason_is_found_above_its_statistics() {
        let log = "33: (61) r9 = *(u32 *)(r1 +0)\ndereference of modified ctx ptr R1 off=28 disallowed\n\
            verification time 245 usec\nstack depth 80\nprocessed 25 insns (limit 1000000)\n\n";
        assert_eq!(verifier_reason(log), "dereference of modified ctx ptr R1 off=28 disallowed");
        assert_eq!(verifier_reason(""), "it gives no reason");
    }

    #[test]
    fn maps_are_as_large_as_the_limit_of_flows_asks_for() {
        assert_eq!(sizes(0), (2, RING_BYTES_MIN));
        assert_eq!(sizes(1000), (2000, 64 << 10));
        let largest = (abi::PROXIED_SOCKETS_MAX, abi::PASSING_EVENTS_BYTES);
        assert_eq!(sizes(abi::PROXIED_FLOWS_MAX), largest);
        assert_eq!(sizes(usize::MAX), largest);
    }

    #[test]
    fn an_error_without_permission_says_what_may_be_the_cause() {
        let explained = |errno: Errno| format!("{:#}", explain(io::Error::from(errno)));
        assert!(explained(Errno::PERM).contains("SystemCallFilter="));
        assert!(!explained(Errno::NOMEM).contains("SystemCallFilter="));
    }
}
