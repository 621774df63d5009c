//! Capabilities: what the process was given for eBPF, one thread has, and only until the object is loaded.
//!
//! Owns: what is given up, and when. Must never: take from a drowse that somebody runs by hand what his own commands
//! and listeners need.
//!
//! Rests on: capabilities belong to a thread, which hands them to those that it starts, and may always give some up
//! (capabilities(7)); what a file descriptor of bpf(2) is good for needs none of them, but for Linux before 5.19 where
//! `kernel.unprivileged_bpf_disabled` is set (`__sys_bpf` in `kernel/bpf/syscall.c`).

use std::sync::mpsc;

use anyhow::Context as _;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tracing::warn;

use crate::address::Address;
use crate::config::RunArgs;
use crate::ebpf::kernel_version;

/// From here on bpf(2) asks for no capability to use what is loaded.
const FIRST_WITH_FREE_USE: (u32, u32) = (5, 19);

/// The capabilities that the process needs for as long as it runs.
///
/// A drowse that bound its listeners itself keeps all, since it needs `CAP_NET_ADMIN` to seal them (where unprivileged
/// socket filters are refused), and so does one with a COMMAND, which it has to end whatever user that became. As a
/// service of systemd's it has neither.
#[must_use]
pub fn needed(run: &RunArgs, listeners_are_ours: bool) -> CapabilitySet {
    if listeners_are_ours || !run.command.is_empty() {
        return CapabilitySet::all();
    }
    let mut needed = CapabilitySet::empty();
    if matches!(run.backend, Address::Unix(_)) {
        needed |= CapabilitySet::DAC_OVERRIDE;
    }
    let release = rustix::system::uname();
    let version = kernel_version(&release.release().to_string_lossy());
    if version.is_none_or(|version| version < FIRST_WITH_FREE_USE) {
        needed |= CapabilitySet::BPF;
    }
    needed
}

/// The thread that has the capabilities which the process was started with.
#[derive(Debug)]
pub struct Loader {
    job: mpsc::Sender<Job>,
    thread: JoinHandle<()>,
}

type Job = Box<dyn FnOnce() + Send>;

impl Loader {
    /// Starts the thread. The calling thread, and with it all that it starts from now on, keeps `needed`.
    ///
    /// To be called within a tokio runtime, before anything else starts a thread.
    #[must_use]
    pub fn start(needed: CapabilitySet) -> Self {
        let (job, jobs) = mpsc::channel::<Job>();
        let thread = tokio::task::spawn_blocking(move || {
            // tokio keeps the thread for other work, also after a panic.
            let _at_the_end = GivesUp(needed);
            if let Ok(job) = jobs.recv() {
                job();
            }
        });
        give_up_all_but(needed);
        Self { job, thread }
    }

    /// Does `load` in the thread, which then has nothing but what is needed, either.
    ///
    /// # Errors
    /// It panicked.
    pub async fn run<T: Send + 'static>(
        self,
        load: impl FnOnce() -> T + Send + 'static,
    ) -> anyhow::Result<T> {
        let (sender, loaded) = tokio::sync::oneshot::channel();
        let runtime = Handle::current();
        let job = move || {
            let _guard = runtime.enter();
            let _nobody_waits = sender.send(load());
        };
        // It fails only with the thread, which then answers nothing.
        let _ = self.job.send(Box::new(job));
        let loaded = loaded.await;
        self.thread.await.context("load the eBPF object")?;
        loaded.context("load the eBPF object")
    }
}

/// Gives up all but these when it is dropped.
struct GivesUp(CapabilitySet);

impl Drop for GivesUp {
    fn drop(&mut self) {
        give_up_all_but(self.0);
    }
}

/// Leaves this thread, and those that it starts, `needed` of what it has.
fn give_up_all_but(needed: CapabilitySet) {
    if needed.is_all() {
        return;
    }
    let given_up = capabilities(None).and_then(|held| {
        let left = CapabilitySets {
            effective: held.effective & needed,
            permitted: held.permitted & needed,
            inheritable: held.inheritable & needed,
        };
        if left == held { Ok(()) } else { set_capabilities(None, left) }
    });
    if let Err(error) = given_up {
        warn!("capabilities are kept that are not needed any more: {error}");
    }
}
