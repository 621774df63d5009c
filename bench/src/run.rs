//! One run: arguments to report.
//!
//! Owns: what takes part, and where the results go. Must never: call a run with a wrong byte a success.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::bars::Bars;
use crate::cases::{self, Setting, Sizes};
use crate::cpus::{Layout, bind_this_thread};
use crate::isolation::{self, Network, Remote};
use crate::peers::{Direct, Drowse, Haproxy, Nginx, Peer, Plane, Socat, SocketProxyd, Wanted};
use crate::plot;
use crate::report::compare::compare;
use crate::report::ranking::DIRECT;
use crate::report::{Machine, PeerFacts, Report, SCHEMA, markdown, readme};
use crate::wire::Pattern;

const ROUNDS: usize = 5;
const DEFAULT_PLANES: [&str; 5] = ["handoff", "sockmap", "sockmap-ends", "splice", "copy"];
const ROUNDS_MAX: usize = 1000;
const SOCKET_PROXYD: [&str; 2] =
    ["/usr/lib/systemd/systemd-socket-proxyd", "/lib/systemd/systemd-socket-proxyd"];
const BARS: &str = include_str!("../bars.toml");

/// The peers beside drowse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PeerName {
    /// No proxy.
    Direct,
    /// systemd's own proxy.
    SystemdSocketProxyd,
    /// The proxy `haproxy` in TCP mode with splice.
    Haproxy,
    /// nginx as a stream proxy.
    Nginx,
    /// socat, a process for each flow.
    Socat,
}

/// Arguments of a run.
#[derive(Debug, Clone, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of the command line of its own")]
pub struct RunArgs {
    /// Smoke test: one short round of everything; only shows that all peers move the right bytes.
    #[arg(long)]
    pub quick: bool,
    /// Measure only cases whose name begins so: request, bulk/up, idle-flows, cold, startup, ...
    #[arg(long, value_name = "CASE", value_delimiter = ',')]
    pub only: Vec<String>,
    /// drowse's planes to measure.
    #[arg(long, value_name = "PLANE", value_delimiter = ',', default_values = DEFAULT_PLANES)]
    pub planes: Vec<Plane>,
    /// Measure each of these planes a second time, in the same rounds and as drowse-PLANE-variant, with this option of
    /// drowse; again for more options.
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    pub variant_option: Vec<String>,
    /// Leave drowse out and measure the peers alone.
    #[arg(long)]
    pub no_drowse: bool,
    /// What to measure beside drowse.
    #[arg(
        long,
        value_name = "PEER",
        value_delimiter = ',',
        default_values = ["direct", "systemd-socket-proxyd", "haproxy", "nginx", "socat"]
    )]
    pub peers: Vec<PeerName>,
    /// Interleaved rounds of each case [default: 5, 1 with --quick].
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Directory for latest.json, the tables and the plots [default: bench/results for a whole run, else target/bench].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Fail when a bar of bench/bars.toml is not reached.
    #[arg(long, conflicts_with = "quick")]
    pub check: bool,
    /// Fail when the run in this file puts a pair of peers in the other order, in a case that neither run flags.
    #[arg(long, value_name = "JSON", conflicts_with = "quick")]
    pub compare: Option<PathBuf>,
    /// Print the main table alone, as it stands in the README.
    #[arg(long)]
    pub readme: bool,
    /// Measure nothing: print, check and compare the run in this file, and write it only with --out.
    #[arg(long, value_name = "JSON", conflicts_with_all = ["quick", "only", "rounds"])]
    pub from: Option<PathBuf>,
    /// The drowse to measure [default: beside this program].
    #[arg(long, value_name = "FILE")]
    pub drowse: Option<PathBuf>,
    /// The network that this program was started again in; set by the program itself.
    #[arg(long, hide = true)]
    pub isolated: Option<Network>,
}

/// Runs everything, prints the tables, and writes the results.
///
/// # Errors
/// When something cannot be set up, a peer fails or moves wrong bytes, with `--check` a bar is not reached, or with
/// `--compare` the other run contradicts this one.
pub fn run(args: &RunArgs, print: impl Fn(&str) -> Result<()>) -> Result<()> {
    if let Some(path) = &args.from {
        return finish(args, &Report::read(path)?, args.out.as_deref(), print);
    }
    // A run takes long: better to know before it that it cannot be compared after it.
    args.compare.as_deref().map(Report::read).transpose()?;
    let Some(network) = args.isolated else {
        isolation::start_again_isolated("--isolated")?;
        return Ok(());
    };
    let report = measure(args, network)?;
    finish(args, &report, Some(&output_directory(args)?), print)
}

/// What drowse pinned for us: a peer that ends with open flows leaves its counters for the next drowse of its name.
struct Pins;

impl Drop for Pins {
    fn drop(&mut self) {
        let ours = format!("drowse-bench-{}-", std::process::id());
        let pins = fs::read_dir("/sys/fs/bpf/drowse").into_iter().flatten().flatten();
        for entry in pins.filter(|entry| entry.file_name().to_string_lossy().starts_with(&ours)) {
            let _gone_already = fs::remove_dir_all(entry.path());
        }
    }
}

fn measure(args: &RunArgs, network: Network) -> Result<Report> {
    let _removed = Pins;
    let rounds = args.rounds.unwrap_or(if args.quick { 1 } else { ROUNDS });
    ensure!((1..=ROUNDS_MAX).contains(&rounds), "--rounds takes 1 to {ROUNDS_MAX}");
    let congestion_control = isolation::prepare(network)?;
    if network == Network::Host {
        eprintln!("no network namespace allowed: using the host's loopback with {congestion_control}");
    }
    let setting = setting(args)?;
    let mut report = Report {
        schema: SCHEMA,
        started: now(),
        ended: now(),
        arguments: std::env::args().skip(1).filter(|argument| !argument.starts_with("--isolated")).collect(),
        quick: args.quick,
        rounds,
        load: "closed loop (each connection waits for its answer before the next request), except where a case names \
               its rate"
            .to_owned(),
        machine: machine(&setting, network, congestion_control)?,
        peers: facts(&setting)?,
        measurements: Vec::new(),
    };
    bind_this_thread(&setting.layout.client)?;
    let all = cases::all(&setting);
    for begin in &args.only {
        let known = || all.iter().map(|case| case.name.as_str()).collect::<Vec<_>>().join(", ");
        let found = all.iter().any(|case| case.name.starts_with(begin));
        ensure!(found, "no case begins with {begin}: {}", known());
    }
    let asked_for =
        |name: &str| args.only.is_empty() || args.only.iter().any(|begin| name.starts_with(begin));
    for case in all.into_iter().filter(|case| asked_for(&case.name)) {
        report.measurements.extend(case.measure(rounds, |line| eprintln!("{line}")));
    }
    report.ended = now();
    report.machine.load_average_end = load_average()?;
    Ok(report)
}

/// Prints, writes and judges a run.
fn finish(
    args: &RunArgs,
    report: &Report,
    directory: Option<&Path>,
    print: impl Fn(&str) -> Result<()>,
) -> Result<()> {
    let (tables, main_table) = (markdown::render(report), readme::render(report));
    print(if args.readme { &main_table } else { &tables })?;
    if let Some(directory) = directory {
        save(directory, report, &[("latest.md", tables), ("latest-readme.md", main_table)])?;
    }
    judge(args, report)
}

fn now() -> String {
    humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string()
}

fn setting(args: &RunArgs) -> Result<Setting> {
    let this_program = std::env::current_exe().context("find this program")?;
    let mut peers: Vec<Box<dyn Peer>> = Vec::new();
    for name in &args.peers {
        peers.push(match name {
            PeerName::Direct => Box::new(Direct),
            PeerName::SystemdSocketProxyd => Box::new(SocketProxyd { program: socket_proxyd()? }),
            PeerName::Haproxy => Box::new(Haproxy),
            PeerName::Nginx => Box::new(Nginx),
            PeerName::Socat => Box::new(Socat),
        });
    }
    let drowse = if args.no_drowse { None } else { Some(drowse(args, &this_program)?) };
    for (plane, program) in args.planes.iter().zip(drowse.iter().cycle()) {
        let drowse = |variant| Box::new(Drowse { program: program.clone(), plane: *plane, variant });
        peers.push(drowse(Vec::new()));
        if !args.variant_option.is_empty() {
            peers.push(drowse(args.variant_option.clone()));
        }
    }
    // What hand-off is compared with is a direct connection: one right after the other, within the same moment of the
    // machine.
    peers.sort_by_key(|peer| peer.name() != DIRECT && !peer.hands_off());
    Ok(Setting {
        sizes: if args.quick { Sizes::QUICK } else { Sizes::FULL },
        layout: Layout::of_this_machine()?,
        files_max: crate::process::raise_file_limit()?,
        peers,
        drowse,
        may_load_ebpf: args.isolated == Some(Network::Namespace),
        remote: remote(args.isolated.unwrap_or(Network::Host)),
        this_program,
        pattern: Pattern::default(),
    })
}

/// Where a remote client is, if that can be made.
fn remote(network: Network) -> Option<Remote> {
    match Remote::new(network) {
        Ok(remote) => Some(remote),
        Err(err) => {
            eprintln!("no case has a remote client: {err:#}");
            None
        }
    }
}

fn socket_proxyd() -> Result<PathBuf> {
    let found = SOCKET_PROXYD.iter().map(PathBuf::from).find(|path| path.exists());
    found.context(
        "systemd-socket-proxyd is not installed: install systemd, or leave it out with --peers direct",
    )
}

fn drowse(args: &RunArgs, this_program: &Path) -> Result<PathBuf> {
    let path = args.drowse.clone().unwrap_or_else(|| this_program.with_file_name("drowse"));
    let found = path.canonicalize();
    found.with_context(|| {
        format!(
            "find drowse at {}: build it (cargo build --release -p drowse) or leave it out with --no-drowse",
            path.display()
        )
    })
}

fn facts(setting: &Setting) -> Result<Vec<PeerFacts>> {
    let wanted = Wanted {
        backend: ([127, 0, 0, 1], 80).into(),
        listen: [127, 0, 0, 1].into(),
        flows: 1,
        layout: &setting.layout,
    };
    let fact = |peer: &dyn Peer| {
        let mut command_line = peer.command_line(&wanted);
        if let Some(program) = command_line.first_mut() {
            *program =
                Path::new(program).file_name().map_or_else(String::new, |name| name.display().to_string());
        }
        Ok(PeerFacts {
            name: peer.name().to_owned(),
            version: peer.version()?,
            command_line,
            configuration: peer.configuration(),
        })
    };
    setting.peers.iter().map(|peer| fact(peer.as_ref())).collect()
}

fn machine(setting: &Setting, network: Network, congestion_control: String) -> Result<Machine> {
    let read = |path: &str| fs::read_to_string(path).with_context(|| format!("read {path}"));
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let memory = field(&read("/proc/meminfo")?, "MemTotal").context("find the memory's size")?;
    let memory_kib: u64 = memory.trim_end_matches(" kB").parse().context("read the memory's size")?;
    let load_average = load_average()?;
    let layout = &setting.layout;
    let processors: BTreeSet<usize> =
        [&layout.client, &layout.proxy, &layout.backend].into_iter().flatten().copied().collect();
    Ok(Machine {
        kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        processor: field(&read("/proc/cpuinfo")?, "model name")
            .unwrap_or_else(|| "unnamed processor".to_owned()),
        processors: processors.len(),
        layout: layout.clone(),
        memory_mib: memory_kib / 1024,
        network,
        congestion_control,
        load_average_start: load_average,
        load_average_end: load_average,
        files_max: setting.files_max,
    })
}

/// Of the last minute.
fn load_average() -> Result<f64> {
    let text = fs::read_to_string("/proc/loadavg").context("read /proc/loadavg")?;
    text.split_whitespace().next().and_then(|load| load.parse().ok()).context("read the load average")
}

/// The results in the tree are those of whole runs only.
fn output_directory(args: &RunArgs) -> Result<PathBuf> {
    if let Some(directory) = &args.out {
        return Ok(directory.clone());
    }
    let whole = !args.quick
        && !args.no_drowse
        && args.only.is_empty()
        && args.planes.len() >= DEFAULT_PLANES.len()
        && args.variant_option.is_empty()
        && args.peers.len() >= 5;
    if whole {
        return Ok(Path::new(env!("CARGO_MANIFEST_DIR")).join("results"));
    }
    let program = std::env::current_exe().context("find this program")?;
    let target = program.ancestors().nth(2).context("find the target directory")?;
    Ok(target.join("bench"))
}

/// Writes the run; plots that it has no figures for are removed, so that all files are of the same run.
fn save(directory: &Path, report: &Report, texts: &[(&str, String)]) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
    for name in plot::NAMES {
        let path = directory.join(name);
        match fs::remove_file(&path) {
            Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
                return Err(err).with_context(|| format!("remove {}", path.display()));
            }
            _ => {}
        }
    }
    let plots = plot::all(report).context("draw the plots")?;
    let json = ("latest.json", report.to_json()?);
    for (name, content) in texts.iter().chain([&json]).chain(&plots) {
        let path = directory.join(name);
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
        eprintln!("wrote {}", path.display());
    }
    Ok(())
}

fn judge(args: &RunArgs, report: &Report) -> Result<()> {
    let mut short = report.failures();
    if args.check {
        short.extend(Bars::read(BARS)?.missed_by(report));
    }
    if let Some(path) = &args.compare {
        short.extend(contradictions(report, path)?);
    }
    if !short.is_empty() {
        bail!("{} of the run fell short:\n  {}", short.len(), short.join("\n  "));
    }
    Ok(())
}

fn contradictions(report: &Report, path: &Path) -> Result<Vec<String>> {
    let comparison = compare(report, &Report::read(path)?);
    ensure!(
        !comparison.is_empty(),
        "the run in {} has no pair of peers in common with this one: compare runs of the same cases",
        path.display()
    );
    eprintln!(
        "compared with {}: {} pairs of peers in the same order, {} flagged in at least one run, {} contradictions",
        path.display(),
        comparison.agreed,
        comparison.flagged,
        comparison.contradictions.len()
    );
    Ok(comparison.contradictions)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Better;
    use crate::report::tests::{measurement, report};

    #[derive(clap::Parser)]
    struct Arguments {
        #[command(flatten)]
        run: RunArgs,
    }

    fn parse(arguments: &[&str]) -> Result<RunArgs, clap::Error> {
        let line = ["bench"].iter().chain(arguments);
        <Arguments as clap::Parser>::try_parse_from(line).map(|arguments| arguments.run)
    }

    /// One peer twice as quick as the other.
    fn run_of(quick: &str, slow: &str) -> Report {
        report(vec![
            measurement("bulk/up", quick, Better::Higher, &[200.0; 5]),
            measurement("bulk/up", slow, Better::Higher, &[100.0; 5]),
        ])
    }

    #[test]
    fn files_of_another_run_do_not_stay_beside_this_one() {
        let directory = tempfile::tempdir().unwrap();
        let stale = directory.path().join("latency.svg");
        fs::write(&stale, "of another run").unwrap();
        let report = run_of("a", "b");
        save(directory.path(), &report, &[("latest.md", "text".to_owned())]).unwrap();
        assert!(!stale.exists());
        assert!(directory.path().join("throughput.svg").exists());
        assert_eq!(fs::read_to_string(directory.path().join("latest.md")).unwrap(), "text");
        let back = Report::read(&directory.path().join("latest.json")).unwrap();
        assert_eq!(back.to_json().unwrap(), report.to_json().unwrap());
    }

    #[test]
    fn a_run_that_contradicts_another_fails_and_names_the_pair() {
        let directory = tempfile::tempdir().unwrap();
        let (one, other) = (directory.path().join("one.json"), directory.path().join("other.json"));
        fs::write(&one, run_of("a", "b").to_json().unwrap()).unwrap();
        fs::write(&other, run_of("b", "a").to_json().unwrap()).unwrap();
        let compared = |this: &Path, other: &Path| {
            let paths = [this, other].map(|path| path.display().to_string());
            let [this, other] = paths.each_ref().map(String::as_str);
            run(&parse(&["--from", this, "--compare", other]).unwrap(), |_| Ok(()))
        };
        compared(&one, &one).unwrap();
        let failure = format!("{:#}", compared(&one, &other).unwrap_err());
        assert!(failure.contains("bulk/up: a is ahead of b in this run"), "{failure}");
        let missing = format!("{:#}", compared(&one, &directory.path().join("none")).unwrap_err());
        assert!(missing.contains("none"), "{missing}");
    }

    #[test]
    fn a_smoke_test_can_be_neither_checked_nor_compared_and_lists_are_read() {
        assert!(parse(&["--quick", "--check"]).is_err());
        assert!(parse(&["--quick", "--compare", "other.json"]).is_err());
        assert!(parse(&["--quick", "--from", "other.json"]).is_err());
        assert_eq!(
            parse(&["--variant-option=--a", "--variant-option", "--b=1"]).unwrap().variant_option,
            ["--a", "--b=1"]
        );
        assert_eq!(parse(&[]).unwrap().planes, <Plane as clap::ValueEnum>::value_variants());
        assert_eq!(parse(&["--only", "request/64B,bulk"]).unwrap().only, ["request/64B", "bulk"]);
    }
}
