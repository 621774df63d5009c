//! What a load costs: processor time of the machine and of the proxy, and how often the proxy waited.
//!
//! Owns: reading the kernel's counters before and after a load. Must never: guess; a counter that went away with its
//! process is left out. The machine's time is that of everything that ran, interrupts and both ends included, from
//! `/proc/stat` in ticks of 10 ms; nothing is subtracted for an idle machine, which a run asks for. The proxy's time is
//! that of its threads, in nanoseconds from `/proc/PID/task/TID/schedstat` (`sched-stats.rst` of the kernel), and of the
//! processes that it has reaped, in ticks from `/proc/PID/stat`. A thread's `voluntary_ctxt_switches` counts how often
//! it gave the processor up to wait (`proc_pid_status(5)`).

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, ensure};

use crate::process::Running;

const MIB: f64 = 1_048_576.0;

/// All that a load moved, its warm-up included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Bytes, those of both directions together.
    Bytes(u64),
    /// Requests with their answers.
    Requests(u64),
}

/// The counters at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    machine_ticks: u64,
    proxy: Option<ProxyCounters>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct ProxyCounters {
    /// Of processes that ended, and that their parents, which are still there, have waited for.
    reaped_ticks: u64,
    threads: BTreeMap<u32, ThreadCounters>,
    /// Whether threads end with their flows, before their switches can be counted.
    forgets_switches: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct ThreadCounters {
    ran_ns: u64,
    switches: u64,
}

impl Counters {
    /// Reads them, the proxy's too when there is one.
    ///
    /// # Errors
    /// When `/proc` does not tell.
    pub fn now(proxy: Option<&Running>, has_process_for_each_flow: bool) -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        let proxy = proxy.map(|proxy| ProxyCounters::now(proxy, has_process_for_each_flow, None));
        Ok(Self { machine_ticks: machine_ticks(&stat)?, proxy: proxy.transpose()? })
    }

    /// The same of a proxy that may have started the process `backend` itself, which is then not counted with it.
    ///
    /// # Errors
    /// When `/proc` does not tell.
    pub fn without_backend(proxy: &Running, backend: u32) -> Result<Self> {
        let proxy = Some(ProxyCounters::now(proxy, false, Some(backend))?);
        Ok(Self { proxy, ..Self::now(None, false)? })
    }

    /// What was used since `before`, for each unit of `work`: figures by name with their unit.
    #[must_use]
    pub fn costs_since(&self, before: &Self, work: Work) -> Vec<(&'static str, f64)> {
        let (machine, proxy, switches, units, small_units) = match work {
            Work::Bytes(bytes) => (
                "machine_cpu_s_per_gib",
                "proxy_cpu_s_per_gib",
                "proxy_switches_per_mib",
                float(bytes) / (1024.0 * MIB),
                float(bytes) / MIB,
            ),
            Work::Requests(requests) => (
                "machine_cpu_s_per_100k",
                "proxy_cpu_s_per_100k",
                "proxy_switches_per_1k",
                float(requests) / 100_000.0,
                float(requests) / 1_000.0,
            ),
        };
        if units <= 0.0 {
            return Vec::new();
        }
        let mut costs = vec![(machine, seconds(self.machine_ticks, before.machine_ticks) / units)];
        costs.extend(self.proxy_cpu_s_since(before).map(|cpu_s| (proxy, cpu_s / units)));
        costs.extend(self.switches_since(before).map(|count| (switches, float(count) / small_units)));
        costs
    }

    /// Seconds of processor time that the proxy took since `before`; none without a proxy.
    #[must_use]
    pub fn proxy_cpu_s_since(&self, before: &Self) -> Option<f64> {
        let (now, before) = (self.proxy.as_ref()?, before.proxy.as_ref()?);
        let ran_ns = now.sum_since(before, |thread| thread.ran_ns);
        Some(float(ran_ns) / 1e9 + seconds(now.reaped_ticks, before.reaped_ticks))
    }

    /// How often the proxy waited since `before`; none when that cannot be known.
    #[must_use]
    pub fn switches_since(&self, before: &Self) -> Option<u64> {
        let (now, before) = (self.proxy.as_ref()?, before.proxy.as_ref()?);
        (!now.forgets_switches).then(|| now.sum_since(before, |thread| thread.switches))
    }
}

impl ProxyCounters {
    fn now(proxy: &Running, forgets_switches: bool, except: Option<u32>) -> Result<Self> {
        let mut counters = Self { forgets_switches, ..Self::default() };
        for pid in proxy.processes()?.into_iter().filter(|pid| Some(*pid) != except) {
            // What is gone since it was listed counts with its parent as soon as that has waited for it.
            let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
            counters.reaped_ticks += reaped_ticks(&stat)?;
            let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { continue };
            for thread in threads.filter_map(Result::ok) {
                let read = |file| fs::read_to_string(thread.path().join(file));
                let (Ok(status), Ok(schedstat)) = (read("status"), read("schedstat")) else { continue };
                let id = thread.file_name().to_string_lossy().parse().context("read a thread's id")?;
                let (ran_ns, switches) = (ran_ns(&schedstat)?, voluntary_switches(&status)?);
                counters.threads.insert(id, ThreadCounters { ran_ns, switches });
            }
        }
        Ok(counters)
    }

    /// What `pick` grew by in all threads that are there now; those that were not there before began with zero.
    fn sum_since(&self, before: &Self, pick: fn(&ThreadCounters) -> u64) -> u64 {
        let since = |(id, now): (&u32, &ThreadCounters)| {
            pick(now).saturating_sub(before.threads.get(id).map(pick).unwrap_or_default())
        };
        self.threads.iter().map(since).sum()
    }
}

/// Memory that the kernel uses itself, of the whole machine.
#[derive(Debug, Clone, Copy)]
pub struct KernelMemory {
    bytes: u64,
}

impl KernelMemory {
    /// Sockets, files and their like (`Slab`), stacks and page tables of processes, and pages that TCP's buffers hold
    /// (`mem` of `/proc/net/sockstat`, which is of all network namespaces).
    ///
    /// # Errors
    /// When `/proc` does not tell.
    pub fn now() -> Result<Self> {
        let meminfo = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
        let sockstat = fs::read_to_string("/proc/net/sockstat").context("read /proc/net/sockstat")?;
        let page_bytes = u64::try_from(rustix::param::page_size()).context("read the size of a page")?;
        Ok(Self { bytes: kernel_kib(&meminfo)? * 1024 + tcp_pages(&sockstat)? * page_bytes })
    }

    /// How much more it is than `before`, in bytes.
    #[must_use]
    pub fn growth_since(self, before: Self) -> u64 {
        self.bytes.saturating_sub(before.bytes)
    }
}

fn kernel_kib(meminfo: &str) -> Result<u64> {
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let value = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        value.with_context(|| format!("find {name} in /proc/meminfo"))
    };
    Ok(field("Slab")? + field("KernelStack")? + field("PageTables")?)
}

fn tcp_pages(sockstat: &str) -> Result<u64> {
    let line = sockstat.lines().find_map(|line| line.strip_prefix("TCP:"));
    let pages = line.and_then(|line| {
        let mut words = line.split_whitespace();
        words.find(|word| *word == "mem")?;
        words.next()?.parse().ok()
    });
    pages.context("find TCP's pages in /proc/net/sockstat")
}

/// Ticks in which a processor was not idle: user, nice, system, irq and softirq.
fn machine_ticks(stat: &str) -> Result<u64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu ")).context("find cpu in /proc/stat")?;
    let ticks = line.split_whitespace().map(str::parse).collect::<Result<Vec<u64>, _>>();
    let ticks = ticks.context("read cpu in /proc/stat")?;
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = ticks.as_slice() else {
        anyhow::bail!("/proc/stat has fewer fields than it should");
    };
    Ok(user + nice + system + irq + softirq)
}

/// Ticks of the children that a process has waited for: fields 16 and 17 of `/proc/PID/stat`.
fn reaped_ticks(stat: &str) -> Result<u64> {
    // The name, in parentheses, may hold anything.
    let (_, fields) = stat.rsplit_once(')').context("find the name in /proc/PID/stat")?;
    let ticks: Vec<u64> = fields.split_whitespace().skip(13).take(2).filter_map(|t| t.parse().ok()).collect();
    ensure!(ticks.len() == 2, "/proc/PID/stat has fewer fields than it should");
    Ok(ticks.iter().sum())
}

/// Time that a thread ran: the first field of its `schedstat`.
fn ran_ns(schedstat: &str) -> Result<u64> {
    let first = schedstat.split_whitespace().next();
    first.and_then(|first| first.parse().ok()).context("read a thread's time on processors")
}

fn voluntary_switches(status: &str) -> Result<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    value.and_then(|value| value.trim().parse().ok()).context("find a thread's voluntary switches")
}

fn seconds(now: u64, before: u64) -> f64 {
    float(now.saturating_sub(before)) / float(rustix::param::clock_ticks_per_second())
}

#[expect(clippy::cast_precision_loss, reason = "a count here is far below 2^52")]
fn float(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_NS: u64 = 1_000_000_000;

    fn counters(machine_ticks: u64, reaped_ticks: u64, threads: &[(u32, u64, u64)]) -> Counters {
        let thread = |(id, ran_ns, switches): &(u32, u64, u64)| {
            (*id, ThreadCounters { ran_ns: *ran_ns, switches: *switches })
        };
        let threads = threads.iter().map(thread).collect();
        let proxy = ProxyCounters { reaped_ticks, threads, forgets_switches: false };
        Counters { machine_ticks, proxy: Some(proxy) }
    }

    #[test]
    fn the_kernels_counters_are_read_as_documented() {
        let stat = "cpu  10 2 30 1000 500 4 5 600 7 8\ncpu0 1 1 1 1 1 1 1 1 1 1\n";
        assert_eq!(machine_ticks(stat).unwrap(), 51);
        assert!(machine_ticks("cpu  1 2 3\n").is_err());
        let process = "12 (a ) b) S 1 12 12 0 -1 4194560 1 2 3 4 100 20 3 4 20 0 1 0 5 6 7";
        assert_eq!(reaped_ticks(process).unwrap(), 7);
        assert!(reaped_ticks("12 (a) S 1 2").is_err());
        assert_eq!(ran_ns("123 45 6\n").unwrap(), 123);
        let status = "Name:\tx\nvoluntary_ctxt_switches:\t41\nnonvoluntary_ctxt_switches:\t7\n";
        assert_eq!(voluntary_switches(status).unwrap(), 41);
        let meminfo = "MemTotal: 9 kB\nSlab:  100 kB\nKernelStack: 20 kB\nPageTables:    3 kB\n";
        assert_eq!(kernel_kib(meminfo).unwrap(), 123);
        assert!(kernel_kib("Slab: 1 kB\n").is_err());
        let sockstat = "sockets: used 5\nTCP: inuse 1 orphan 0 tw 0 alloc 2 mem 33\nUDP: inuse 0 mem 4\n";
        assert_eq!(tcp_pages(sockstat).unwrap(), 33);
    }

    #[test]
    fn costs_are_per_unit_of_work_and_new_threads_count_in_whole() {
        let per_second = rustix::param::clock_ticks_per_second();
        let before = counters(0, 0, &[(1, SECOND_NS, 100), (2, 5, 50)]);
        let after = counters(4 * per_second, per_second, &[(1, 3 * SECOND_NS, 300), (3, SECOND_NS, 200)]);
        let costs = after.costs_since(&before, Work::Bytes(2 << 30));
        let expected = [
            ("machine_cpu_s_per_gib", 2.0),
            ("proxy_cpu_s_per_gib", 2.0),
            ("proxy_switches_per_mib", 400.0 / 2048.0),
        ];
        assert_eq!(costs, expected);
        let costs = after.costs_since(&before, Work::Requests(200_000));
        let expected =
            [("machine_cpu_s_per_100k", 2.0), ("proxy_cpu_s_per_100k", 2.0), ("proxy_switches_per_1k", 2.0)];
        assert_eq!(costs, expected);
        assert_eq!(after.costs_since(&before, Work::Requests(0)), []);
        let mut forgetful = after;
        forgetful.proxy.as_mut().unwrap().forgets_switches = true;
        assert_eq!(forgetful.switches_since(&before), None);
    }

    #[test]
    fn a_direct_connection_costs_the_machine_only() {
        let machine = |machine_ticks| Counters { machine_ticks, proxy: None };
        let costs = machine(100).costs_since(&machine(0), Work::Requests(100_000));
        assert_eq!(costs.iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["machine_cpu_s_per_100k"]);
    }

    #[test]
    fn the_counters_of_a_busy_family_grow() {
        let mut command = crate::process::family("sh");
        // The first process of a PID namespace gets no signal that it does not catch.
        let work = "trap 'exit 0' TERM; i=0; while [ $i -lt 200000 ]; do i=$((i + 1)); done";
        command.args(["-c", &format!("{work}; sleep 60 & echo worked; wait")]);
        command.stdout(std::process::Stdio::piped());
        let mut running = Running::start_family("busy", command).unwrap();
        let stdout = running.take_stdout().unwrap();
        let patience = std::time::Duration::from_secs(20);
        assert!(crate::process::readable_within(&stdout, patience).unwrap());
        let counters = Counters::now(Some(&running), false).unwrap();
        let proxy = counters.proxy.unwrap();
        assert_eq!(proxy.threads.len(), 2);
        assert!(proxy.sum_since(&ProxyCounters::default(), |thread| thread.ran_ns) > 1_000_000);
    }
}
