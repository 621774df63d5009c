//! Which processors each part of a benchmark may use.
//!
//! Owns: the layout, the same for every peer, and starting children under it. Must never: move other processes.
//! A child inherits the affinity of the thread that starts it (`sched_setaffinity(2)`).

use anyhow::{Context, Result, ensure};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The processors of client, proxy and backend.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Layout {
    /// The load generator's.
    pub client: Vec<usize>,
    /// The proxy's; all threads of it.
    pub proxy: Vec<usize>,
    /// The backend's.
    pub backend: Vec<usize>,
}

impl Layout {
    /// Divides the processors that this process may use.
    ///
    /// # Errors
    /// When the kernel does not tell which they are.
    pub fn of_this_machine() -> Result<Self> {
        let allowed = sched_getaffinity(None).context("read the allowed processors")?;
        let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
        ensure!(!cpus.is_empty(), "no processor is allowed");
        Ok(Self::of(&cpus))
    }

    /// Client and backend get one each; the proxy the others, or, with fewer than four, all of them, as it would
    /// have on a small machine in the field.
    fn of(cpus: &[usize]) -> Self {
        let (client, others) = cpus.split_at(1.min(cpus.len()));
        let (backend, rest) = others.split_at(1.min(others.len()));
        let backend = if backend.is_empty() { client } else { backend };
        let proxy = if rest.len() < 2 { cpus } else { rest };
        Self { client: client.to_vec(), proxy: proxy.to_vec(), backend: backend.to_vec() }
    }
}

/// Binds the calling thread, and what it starts from now on, to `cpus`.
///
/// # Errors
/// When the kernel refuses.
pub fn bind_this_thread(cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(*cpu);
    }
    sched_setaffinity(None, &set).with_context(|| format!("bind to processors {cpus:?}"))
}

/// Runs `start` with the calling thread bound to `cpus`, then gives the thread its own processors back.
///
/// # Errors
/// Those of `start`, or when the kernel refuses an affinity.
pub fn started_on<T>(cpus: &[usize], start: impl FnOnce() -> Result<T>) -> Result<T> {
    let own = sched_getaffinity(None).context("read the allowed processors")?;
    bind_this_thread(cpus)?;
    let started = start();
    sched_setaffinity(None, &own).context("return to the own processors")?;
    started
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_has_a_processor_on_any_machine() {
        let layout = |client: &[usize], proxy: &[usize], backend: &[usize]| Layout {
            client: client.to_vec(),
            proxy: proxy.to_vec(),
            backend: backend.to_vec(),
        };
        assert_eq!(Layout::of(&[3]), layout(&[3], &[3], &[3]));
        assert_eq!(Layout::of(&[0, 1]), layout(&[0], &[0, 1], &[1]));
        assert_eq!(Layout::of(&[0, 1, 2]), layout(&[0], &[0, 1, 2], &[1]));
        assert_eq!(Layout::of(&[0, 1, 2, 3]), layout(&[0], &[2, 3], &[1]));
    }

    #[test]
    fn a_child_inherits_the_processors_and_the_thread_gets_its_own_back() {
        let before = sched_getaffinity(None).unwrap();
        let last = (0..CpuSet::MAX_CPU).rfind(|cpu| before.is_set(*cpu)).unwrap();
        let status =
            started_on(&[last], || Ok(std::fs::read_to_string("/proc/thread-self/status")?)).unwrap();
        let line = status.lines().find(|line| line.starts_with("Cpus_allowed_list")).unwrap();
        assert_eq!(line.split_whitespace().last().unwrap(), last.to_string());
        assert!(sched_getaffinity(None).unwrap() == before);
    }
}
