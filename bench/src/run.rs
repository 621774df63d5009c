//! One run: arguments to report.
//!
//! Owns: what takes part, and where the results go. Must never: call a run with a wrong byte a success.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::bars::Bars;
use crate::cases::{self, Setting, Sizes};
use crate::cpus::{Layout, bind_this_thread};
use crate::isolation::{self, Network, Remote};
use crate::peers::{Direct, Drowse, Haproxy, Nginx, Peer, Plane, Socat, SocketProxyd, Wanted};
use crate::report::{Machine, PeerFacts, Report, SCHEMA, markdown};
use crate::wire::Pattern;

const ROUNDS: usize = 5;
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
pub struct RunArgs {
    /// Smoke test: one short round of everything; only shows that all peers move the right bytes.
    #[arg(long)]
    pub quick: bool,
    /// Measure only cases whose name begins so: request, bulk/up, idle-flows, cold, startup, ...
    #[arg(long, value_name = "CASE", value_delimiter = ',')]
    pub only: Vec<String>,
    /// drowse's planes to measure.
    #[arg(long, value_name = "PLANE", value_delimiter = ',', default_values = ["splice", "copy"])]
    pub planes: Vec<Plane>,
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
    /// Directory for latest.json and latest.md [default: bench/results for a whole run, else target/bench].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Fail when a bar of bench/bars.toml is not reached.
    #[arg(long, conflicts_with = "quick")]
    pub check: bool,
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
/// When something cannot be set up, a peer fails or moves wrong bytes, or, with `--check`, a bar is not reached.
pub fn run(args: &RunArgs, print: impl Fn(&str) -> Result<()>) -> Result<()> {
    let Some(network) = args.isolated else {
        isolation::start_again_isolated("--isolated")?;
        return Ok(());
    };
    let rounds = args.rounds.unwrap_or(if args.quick { 1 } else { ROUNDS });
    ensure!((1..=ROUNDS_MAX).contains(&rounds), "--rounds takes 1 to {ROUNDS_MAX}");
    let congestion_control = isolation::prepare(network)?;
    if network == Network::Host {
        eprintln!("no network namespace allowed: using the host's loopback with {congestion_control}");
    }
    let setting = setting(args)?;
    let mut report = Report {
        schema: SCHEMA,
        started: humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string(),
        arguments: std::env::args().skip(1).filter(|argument| !argument.starts_with("--isolated")).collect(),
        quick: args.quick,
        rounds,
        load: "closed loop (each connection waits for its answer before the next request)".to_owned(),
        machine: machine(&setting, network, congestion_control)?,
        peers: facts(&setting)?,
        measurements: Vec::new(),
    };
    bind_this_thread(&setting.layout.client)?;
    let asked_for =
        |name: &str| args.only.is_empty() || args.only.iter().any(|begin| name.starts_with(begin));
    let all = cases::all(&setting);
    for begin in &args.only {
        let known = || all.iter().map(|case| case.name.as_str()).collect::<Vec<_>>().join(", ");
        ensure!(
            all.iter().any(|case| case.name.starts_with(begin)),
            "no case begins with {begin}: {}",
            known()
        );
    }
    for case in all.into_iter().filter(|case| asked_for(&case.name)) {
        report.measurements.extend(case.measure(rounds, |line| eprintln!("{line}")));
    }
    let text = markdown::render(&report);
    print(&text)?;
    save(&output_directory(args)?, &report, &text)?;
    judge(args, &report)
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
        peers.push(Box::new(Drowse { program: program.clone(), plane: *plane }));
    }
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
        Ok(PeerFacts { name: peer.name().to_owned(), version: peer.version()?, command_line })
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
    let load = read("/proc/loadavg")?;
    let load_average =
        load.split_whitespace().next().and_then(|load| load.parse().ok()).context("read the load average")?;
    Ok(Machine {
        kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        processor: field(&read("/proc/cpuinfo")?, "model name")
            .unwrap_or_else(|| "unnamed processor".to_owned()),
        layout: setting.layout.clone(),
        memory_mib: memory_kib / 1024,
        network,
        congestion_control,
        load_average,
        files_max: setting.files_max,
    })
}

/// The results in the tree are those of whole runs only.
fn output_directory(args: &RunArgs) -> Result<PathBuf> {
    if let Some(directory) = &args.out {
        return Ok(directory.clone());
    }
    let whole = !args.quick
        && !args.no_drowse
        && args.only.is_empty()
        && args.planes.len() >= 2
        && args.peers.len() >= 5;
    if whole {
        return Ok(Path::new(env!("CARGO_MANIFEST_DIR")).join("results"));
    }
    let program = std::env::current_exe().context("find this program")?;
    let target = program.ancestors().nth(2).context("find the target directory")?;
    Ok(target.join("bench"))
}

fn save(directory: &Path, report: &Report, text: &str) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
    let mut json = serde_json::to_string_pretty(report).context("write the report as JSON")?;
    json.push('\n');
    for (name, content) in [("latest.json", json.as_str()), ("latest.md", text)] {
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
    if !short.is_empty() {
        bail!("{} of the run fell short:\n  {}", short.len(), short.join("\n  "));
    }
    Ok(())
}
