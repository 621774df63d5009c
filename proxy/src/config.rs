//! The command line, parsed into checked types. Every default and every limit of user space lives here.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Command, FromArgMatches, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;

use crate::address::Address;
use crate::admission;
use crate::ebpf::PIN_DIR;
use crate::idle::IdlePolicy;
use crate::lifecycle::{IdleAction, Ownership, Rules};
use crate::plane::splice::PIPES_MAX;

/// Descriptors kept free for everything that is neither a flow nor a worker: listeners, D-Bus, epoll, eBPF.
pub const DESCRIPTORS_RESERVED: u64 = 64;
/// Descriptors kept free for each worker: its epoll, its eventfd and all pipes it may have.
pub const DESCRIPTORS_PER_WORKER: u64 = 2 + 2 * PIPES_MAX as u64;
/// Workers by default, at most; more only helps with many CPUs to spare.
pub const WORKERS_DEFAULT_MAX: usize = 4;
/// Descriptors of one flow: the client's and the backend's.
pub const DESCRIPTORS_PER_FLOW: u64 = 2;
/// The default of `--connections-max` where the limit on open files allows it.
pub const CONNECTIONS_MAX_DEFAULT: u64 = 10_000;

/// How often `drowse top` may look: counters of flows that were handed off are brought up to date no more often.
pub const INTERVAL_MIN: Duration = Duration::from_secs(1);
/// How seldom `drowse top` may look.
pub const INTERVAL_MAX: Duration = Duration::from_hours(1);

/// A service sleeps until its first connection: drowse holds the client, starts the backend, gets out of the way,
/// and stops the backend when nobody uses it any more.
#[derive(Debug, Parser)]
#[command(name = "drowse", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub action: Action,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// Proxy one service, waking and stopping its backend
    Run(Box<RunArgs>),
    /// Let a systemd service sleep until its first connection: check, write the units' settings, start the socket
    Enable(Box<EnableArgs>),
    /// Undo what enable did to a service
    Disable(DisableArgs),
    /// Show what sleeps and what is awake, or all about one: why is it awake, how do its bytes travel
    Status(StatusArgs),
    /// Watch every running drowse: states, flows, rates, time to sleep
    Top(TopArgs),
    /// Show what is possible on this machine and how to get the rest
    Check(LookArgs),
}

/// The options of `drowse enable`.
#[derive(Clone, Debug, Args)]
pub struct EnableArgs {
    /// The service that is to sleep: NAME or NAME.service
    pub unit: String,

    /// Where clients connect: IP:PORT, [V6]:PORT, :PORT, /path or @abstract. May be given more than once
    #[arg(long, value_name = "ADDR", required = true)]
    pub listen: Vec<Address>,

    /// Where the service itself accepts connections
    #[arg(long, value_name = "ADDR")]
    pub backend: Address,

    /// The service belongs to the user's systemd, not to the system's
    #[arg(long)]
    pub user: bool,

    /// Show what would be written and done, and change nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Connect to the first listener at the end, and show how the service wakes
    #[arg(long = "try", conflicts_with = "dry_run")]
    pub try_out: bool,

    /// Options of `drowse run`.
    #[command(flatten)]
    pub options: RunOptions,
}

/// The options of `drowse disable`.
#[derive(Clone, Debug, Args)]
pub struct DisableArgs {
    /// The service: NAME or NAME.service
    pub unit: String,

    /// The service belongs to the user's systemd, not to the system's
    #[arg(long)]
    pub user: bool,

    /// Show what would be removed and done, and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Options of `drowse run` that were given to `drowse enable`, which writes them down. Their definition is that of
/// [`RunArgs`]: whatever can come from the environment there can be given here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunOptions(Vec<RunOption>);

/// An option of `drowse run` as it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunOption {
    /// `idle-time`
    pub long: String,
    /// `DROWSE_IDLE_TIME`
    pub variable: String,
    /// `15min`; nothing for an option that takes no value.
    pub value: Option<String>,
}

/// Options of `drowse run` that `drowse enable` decides by itself, or has in a form of its own.
const SET_BY_ENABLE: [&str; 6] = ["listen", "backend", "unit", "user", "name", "runtime_dir"];

fn run_command() -> Command {
    RunArgs::augment_args(Command::new("drowse run"))
}

impl RunOptions {
    /// The options, in the order of `drowse run --help`.
    #[must_use]
    pub fn given(&self) -> &[RunOption] {
        &self.0
    }
}

impl FromArgMatches for RunOptions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let command = run_command();
        let mut given = Vec::new();
        for arg in command.get_arguments().filter(|arg| is_configuration(arg)) {
            let id = arg.get_id().as_str();
            let (Some(long), Some(variable)) = (arg.get_long(), arg.get_env().and_then(OsStr::to_str)) else {
                continue;
            };
            if matches.value_source(id) != Some(ValueSource::CommandLine) {
                continue;
            }
            let values: Vec<&str> =
                matches.get_raw(id).into_iter().flatten().filter_map(OsStr::to_str).collect();
            let delimiter = arg.get_value_delimiter().unwrap_or(' ');
            let value = arg.get_action().takes_values().then(|| values.join(&delimiter.to_string()));
            given.push(RunOption { long: long.to_owned(), variable: variable.to_owned(), value });
        }
        Ok(Self(given))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for RunOptions {
    fn augment_args(command: Command) -> Command {
        let run = run_command();
        let options = run.get_arguments().filter(|arg| is_configuration(arg)).cloned();
        command.args(options.map(|arg| arg.env(None::<&'static str>)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn is_configuration(arg: &clap::Arg) -> bool {
    arg.get_env().is_some() && !SET_BY_ENABLE.contains(&arg.get_id().as_str())
}

impl EnableArgs {
    /// What `drowse run` will be told in front of `unit`, checked as it will check it.
    ///
    /// # Errors
    /// One line for people.
    pub fn run_args(&self, unit: &str) -> Result<RunArgs, String> {
        let options = self.options.given().iter().map(|option| match &option.value {
            Some(value) => format!("--{}={value}", option.long),
            None => format!("--{}", option.long),
        });
        let line = ["drowse run".to_owned(), format!("--backend={}", self.backend), format!("--unit={unit}")]
            .into_iter()
            .chain(options);
        // What is in our own environment is not what the service will have in its.
        let command = run_command().mut_args(|arg| arg.env(None::<&'static str>));
        let matches = command.try_get_matches_from(line).map_err(|error| error.to_string())?;
        let run = RunArgs::from_arg_matches(&matches).map_err(|error| error.to_string())?;
        run.check(self.listen.len())?;
        Ok(run)
    }
}

/// The options of `drowse status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// The service: its name, or its systemd unit [default: one line for each]
    pub name: Option<String>,

    /// How to look.
    #[command(flatten)]
    pub look: LookArgs,
}

/// The options of `drowse top`.
#[derive(Clone, Debug, Args)]
pub struct TopArgs {
    /// How often to look
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = interval)]
    pub interval: Duration,

    /// Where the status sockets are [default: /run/drowse and `$XDG_RUNTIME_DIR/drowse`]
    #[arg(long, value_name = "DIR", env = "DROWSE_RUNTIME_DIR")]
    pub runtime_dir: Option<PathBuf>,
}

/// The options of a command that looks at running services.
#[derive(Clone, Debug, Args)]
pub struct LookArgs {
    /// Answer in JSON, for scripts
    #[arg(long)]
    pub json: bool,

    /// Where the status sockets are [default: /run/drowse and `$XDG_RUNTIME_DIR/drowse`]
    #[arg(long, value_name = "DIR", env = "DROWSE_RUNTIME_DIR")]
    pub runtime_dir: Option<PathBuf>,
}

/// The options of `drowse run`. Each can also come from the environment.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Listen here: HOST:PORT, [V6]:PORT, :PORT, /path or @abstract. May be given more than once; not under
    /// systemd socket activation, where the listeners come from the .socket unit
    #[arg(long, value_name = "ADDR", env = "DROWSE_LISTEN", value_delimiter = ' ')]
    pub listen: Vec<Address>,

    /// Where the backend accepts connections
    #[arg(long, value_name = "ADDR", env = "DROWSE_BACKEND")]
    pub backend: Address,

    /// The systemd unit that is the backend. Without a unit or a COMMAND the backend looks after itself
    #[arg(long, value_name = "NAME.service", env = "DROWSE_UNIT", conflicts_with = "command")]
    pub unit: Option<String>,

    /// The unit belongs to the user's systemd, not to the system's
    #[arg(long, env = "DROWSE_USER", requires = "unit")]
    pub user: bool,

    /// How bytes travel
    #[arg(long, value_enum, default_value = "auto", env = "DROWSE_PLANE")]
    pub plane: PlaneChoice,

    /// Whether to load eBPF programs: auto loads them where kernel and privileges allow
    #[arg(long, value_enum, default_value = "auto", env = "DROWSE_EBPF")]
    pub ebpf: Switch,

    /// Flows and held clients at a time; more wait in the listener's backlog [default: what the limit on open
    /// files allows, at most 10000]
    #[arg(long, value_name = "N", env = "DROWSE_CONNECTIONS_MAX", value_parser = clap::value_parser!(u64).range(1..))]
    pub connections_max: Option<u64>,

    /// Clients that may wait for the backend at a time; more wait in the listener's backlog [default: as many as
    /// --connections-max lets in]
    #[arg(long, value_name = "N", env = "DROWSE_HELD_MAX", value_parser = clap::value_parser!(u64).range(1..))]
    pub held_max: Option<u64>,

    /// Flows and held clients of one source (an IPv4 address, a /64 of IPv6) at a time; more are reset. Nothing is
    /// handed off then [default: no limit]
    #[arg(long, value_name = "N", env = "DROWSE_MAX_PER_SOURCE", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_per_source: Option<u64>,

    /// Only clients from here may wake the backend: a network or an address, more with commas or by giving it again.
    /// Others are reset unless the backend is awake. Clients of unix sockets always may [default: everybody]
    #[arg(long, value_name = "CIDR", env = "DROWSE_ALLOW", value_delimiter = ',', value_parser = admission::network)]
    pub allow: Vec<IpNet>,

    /// Threads that move bytes [default: one per CPU, at most 4]
    #[arg(long, value_name = "N", env = "DROWSE_WORKERS", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub workers: Option<u16>,

    /// How long nobody may use the backend before it is stopped
    #[arg(long, value_name = "TIME", default_value = "15min", env = "DROWSE_IDLE_TIME", value_parser = duration)]
    pub idle_time: Duration,

    /// What counts as use: an open connection, or a byte that moves
    #[arg(long, value_enum, default_value = "connections", env = "DROWSE_IDLE_POLICY")]
    pub idle_policy: IdlePolicy,

    /// What happens to an idle backend
    #[arg(long, value_enum, default_value = "stop", env = "DROWSE_IDLE_ACTION")]
    pub idle_action: IdleAction,

    /// Exit after so long with nothing to do; systemd's socket starts drowse again
    #[arg(long, value_name = "TIME", default_value = "infinity", env = "DROWSE_EXIT_IDLE_TIME", value_parser = duration)]
    pub exit_idle_time: Duration,

    /// Asked before an idle backend is stopped: exit status 0 means busy, 1 means not busy, anything else counts
    /// as busy. Run by /bin/sh
    #[arg(long, value_name = "CMD", env = "DROWSE_BUSY_COMMAND")]
    pub busy_command: Option<String>,

    /// How long a client waits for the backend to accept connections
    #[arg(long, value_name = "TIME", default_value = "90s", env = "DROWSE_START_TIMEOUT", value_parser = duration)]
    pub start_timeout: Duration,

    /// How long the backend may take to stop; a COMMAND is then killed
    #[arg(long, value_name = "TIME", default_value = "90s", env = "DROWSE_STOP_TIMEOUT", value_parser = duration)]
    pub stop_timeout: Duration,

    /// How long open connections may take to end when drowse is asked to stop
    #[arg(long, value_name = "TIME", default_value = "10s", env = "DROWSE_DRAIN_TIME", value_parser = duration)]
    pub drain_time: Duration,

    /// How to know that the backend is ready: auto and connect: it accepts a connection; notify: it says READY=1;
    /// `http:PATH`: a GET answers with a status below 400
    #[arg(long, value_name = "auto|connect|notify|http:PATH", default_value = "auto", env = "DROWSE_READY_PROBE", value_parser = ready_probe)]
    pub ready_probe: ReadyProbe,

    /// Tell the backend the client's address in a PROXY protocol header
    #[arg(long, value_enum, value_name = "VERSION", env = "DROWSE_PROXY_PROTOCOL")]
    pub proxy_protocol: Option<ProxyProtocol>,

    /// The service's name in logs and pins [default: the unit, the command, or the backend's address]
    #[arg(long, env = "DROWSE_NAME")]
    pub name: Option<String>,

    /// Where the status socket goes, for `drowse status` [default: /run/drowse for root,
    /// `$XDG_RUNTIME_DIR/drowse` for others and with --user]
    #[arg(long, value_name = "DIR", env = "DROWSE_RUNTIME_DIR")]
    pub runtime_dir: Option<PathBuf>,

    /// The directory of a BPF file system where eBPF maps are pinned, for bpftool and for the next drowse
    #[arg(long, value_name = "DIR", default_value = PIN_DIR, env = "DROWSE_PIN_DIR")]
    pub pin_dir: PathBuf,

    /// Serve metrics for Prometheus here, as OpenMetrics text at `/metrics`. Whoever can connect can read them
    #[arg(long, value_name = "ADDR", env = "DROWSE_METRICS")]
    pub metrics: Option<Address>,

    /// How much to log
    #[arg(long, value_enum, default_value = "info", env = "DROWSE_LOG_LEVEL")]
    pub log_level: LogLevel,

    /// The backend as a command of ours: a child process
    #[arg(last = true, value_name = "COMMAND", num_args = 1..)]
    pub command: Vec<OsString>,
}

/// `--plane`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PlaneChoice {
    /// The fastest that is possible here
    Auto,
    /// New connections straight to the backend's own listener, with a warning if that is not possible; the others as
    /// with auto
    Handoff,
    /// Redirected by the kernel from socket to socket; bulk, and what a receiver cannot keep up with, by drowse
    Sockmap,
    /// As sockmap, and where the other end is on this machine already as it is written
    SockmapEnds,
    /// Through pipes in the kernel
    Splice,
    /// Through a buffer in user space
    Copy,
}

/// A feature that is used where it works, or never.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Where it works
    Auto,
    /// Never
    Off,
}

/// `--ready-probe`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadyProbe {
    /// The backend accepts a connection.
    Connect,
    /// The backend says `READY=1`, then accepts a connection.
    Notify,
    /// A GET of this path answers with a status below 400.
    Http(String),
}

/// `--proxy-protocol`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ProxyProtocol {
    /// The line of text
    V1,
    /// The binary header
    V2,
}

/// `--log-level`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// Only what ends drowse
    Error,
    /// What was survived but is odd
    Warn,
    /// Activations and stops
    Info,
    /// Each flow
    Debug,
    /// Each event
    Trace,
}

impl LogLevel {
    /// The level as `tracing` has it.
    #[must_use]
    pub fn level(self) -> tracing::Level {
        match self {
            Self::Error => tracing::Level::ERROR,
            Self::Warn => tracing::Level::WARN,
            Self::Info => tracing::Level::INFO,
            Self::Debug => tracing::Level::DEBUG,
            Self::Trace => tracing::Level::TRACE,
        }
    }
}

impl RunArgs {
    /// The service's name: what was given, else the unit, the command, or the backend's address.
    #[must_use]
    pub fn service_name(&self) -> String {
        let command = || {
            let program = std::path::Path::new(self.command.first()?).file_name()?;
            Some(program.to_string_lossy().into_owned())
        };
        self.name
            .clone()
            .or_else(|| self.unit.clone())
            .or_else(command)
            .unwrap_or_else(|| self.backend.to_string())
    }

    /// What the lifecycle must know.
    #[must_use]
    pub fn rules(&self) -> Rules {
        let ownership = match (&self.unit, self.command.is_empty()) {
            (Some(_), _) => Ownership::Managed,
            (None, false) => Ownership::Own,
            (None, true) => Ownership::Foreign,
        };
        Rules {
            ownership,
            idle_time: self.idle_time,
            idle_policy: self.idle_policy,
            idle_action: self.idle_action,
            exit_idle_time: self.exit_idle_time,
            start_timeout: self.start_timeout,
            stop_timeout: self.stop_timeout,
            drain_time: self.drain_time,
        }
    }

    /// Checks what clap cannot: options that contradict each other.
    ///
    /// # Errors
    /// One line for people.
    pub fn check(&self, listeners_passed: usize) -> Result<(), String> {
        match (listeners_passed > 0, self.listen.is_empty()) {
            (false, true) => {
                return Err("no listener: give --listen ADDR, or start drowse from a .socket unit".to_owned());
            }
            (true, false) => {
                return Err(
                    "listeners came from systemd (LISTEN_FDS) and --listen is given too: drop one of the two"
                        .to_owned(),
                );
            }
            (true, true) | (false, false) => {}
        }
        if self.start_timeout.is_zero() {
            return Err(
                "--start-timeout 0 leaves the backend no time; for no limit write infinity".to_owned()
            );
        }
        if self.idle_policy == IdlePolicy::Traffic && self.idle_time.is_zero() {
            return Err(
                "--idle-policy traffic with --idle-time 0 would close every connection at once".to_owned()
            );
        }
        if self.listen.contains(&self.backend) {
            return Err(format!("--listen and --backend are both {}; they must differ", self.backend));
        }
        if let Some(metrics) = &self.metrics
            && (self.listen.contains(metrics) || *metrics == self.backend)
        {
            return Err(format!("--metrics {metrics} is an address of the service; it needs one of its own"));
        }
        if self.ready_probe == ReadyProbe::Notify && self.unit.is_none() && self.command.is_empty() {
            return Err("--ready-probe notify needs --unit or a COMMAND that says READY=1".to_owned());
        }
        if !self.allow.is_empty() && self.unit.is_none() && self.command.is_empty() {
            return Err("--allow says who may wake the backend: it needs --unit or a COMMAND".to_owned());
        }
        if self.unit.as_ref().is_some_and(|unit| !unit.contains('.')) {
            return Err(format!(
                "--unit needs the unit's full name: {}.service",
                self.unit.as_deref().unwrap_or("")
            ));
        }
        Ok(())
    }

    /// Forwarding threads: as many as asked for, else one per CPU up to [`WORKERS_DEFAULT_MAX`].
    #[must_use]
    pub fn workers(&self) -> usize {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.workers.map_or(cpus.min(WORKERS_DEFAULT_MAX), usize::from)
    }

    /// How many flows and held clients there may be, given the limit on open files.
    ///
    /// # Errors
    /// The user's number needs more open files than the limit allows.
    pub fn connections_max(&self, open_files_max: u64) -> Result<u64, String> {
        let reserved = DESCRIPTORS_RESERVED + DESCRIPTORS_PER_WORKER * self.workers() as u64;
        let possible = open_files_max.saturating_sub(reserved) / DESCRIPTORS_PER_FLOW;
        match self.connections_max {
            Some(wanted) if wanted > possible => Err(format!(
                "--connections-max={wanted} needs {} open files, the limit is {open_files_max}; raise LimitNOFILE= or ulimit -n",
                wanted.saturating_mul(DESCRIPTORS_PER_FLOW).saturating_add(reserved)
            )),
            Some(wanted) => Ok(wanted),
            None => Ok(CONNECTIONS_MAX_DEFAULT.min(possible).max(1)),
        }
    }
}

/// A duration as systemd writes it: `15min`, `2h 30s`, a bare number of seconds, `infinity`.
fn duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    if text == "infinity" {
        return Ok(Duration::MAX);
    }
    if let Ok(seconds) = text.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string());
    }
    humantime::parse_duration(text)
        .map_err(|error| format!("{error}; write it as 90s, 15min, 2h 30s or infinity"))
}

/// The time between two looks.
fn interval(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        time if (INTERVAL_MIN..=INTERVAL_MAX).contains(&time) => Ok(time),
        _ => Err(format!("it is between {INTERVAL_MIN:?} and {INTERVAL_MAX:?}")),
    }
}

fn ready_probe(text: &str) -> Result<ReadyProbe, String> {
    match (text, text.strip_prefix("http:")) {
        ("auto" | "connect", _) => Ok(ReadyProbe::Connect),
        ("notify", _) => Ok(ReadyProbe::Notify),
        (_, Some(path))
            if path.starts_with('/') && !path.contains(|c: char| c.is_whitespace() || c.is_control()) =>
        {
            Ok(ReadyProbe::Http(path.to_owned()))
        }
        (_, Some(path)) => Err(format!("'{path}' is no path: it starts with '/' and has no blanks")),
        _ => Err("expected auto, connect, notify or http:/PATH".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(args: &[&str]) -> Result<RunArgs, clap::Error> {
        let line = ["drowse", "run", "--backend", "127.0.0.1:9"].iter().chain(args);
        let Action::Run(run) = Cli::try_parse_from(line)?.action else { panic!("not run") };
        Ok(*run)
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    fn enable(args: &[&str]) -> Result<EnableArgs, clap::Error> {
        let line = ["drowse", "enable", "web", "--listen", ":80", "--backend", ":8081"].iter().chain(args);
        let Action::Enable(enable) = Cli::try_parse_from(line)?.action else { panic!("not enable") };
        Ok(*enable)
    }

    #[test]
    fn enable_takes_what_run_takes_from_its_environment() {
        let command = run_command();
        for arg in command.get_arguments().filter(|arg| arg.get_env().is_some()) {
            let taken = enable(&[]).is_ok_and(|_| {
                let line = RunOptions::augment_args(Command::new("x"));
                line.get_arguments().any(|other| other.get_id() == arg.get_id())
            });
            assert_ne!(taken, SET_BY_ENABLE.contains(&arg.get_id().as_str()), "{}", arg.get_id());
        }
        let given = enable(&["--idle-time", "2h 30s", "--plane=copy"]).unwrap();
        let written: Vec<_> = given
            .options
            .given()
            .iter()
            .map(|option| format!("{}={}", option.variable, option.value.as_deref().unwrap_or("-")))
            .collect();
        assert_eq!(written, ["DROWSE_PLANE=copy", "DROWSE_IDLE_TIME=2h 30s"]);
        let run = given.run_args("web.service").unwrap();
        assert_eq!((run.idle_time, run.plane), (Duration::from_secs(7230), PlaneChoice::Copy));
        assert!(enable(&[]).unwrap().options.given().is_empty(), "defaults are not written down");
        for several in
            [&["--allow", "10.0.0.0/8,192.0.2.1"][..], &["--allow=10.0.0.0/8", "--allow=192.0.2.1"]]
        {
            let run = enable(several).unwrap().run_args("web.service").unwrap();
            assert_eq!(run.allow.len(), 2, "{several:?}");
        }
    }

    #[test]
    fn enable_refuses_what_run_would_refuse() {
        for wrong in [&["--idle-time", "soon"][..], &["--unit", "x.service"], &["--try", "--dry-run"]] {
            assert!(enable(wrong).is_err(), "{wrong:?}");
        }
        let contradiction = enable(&["--idle-policy", "traffic", "--idle-time", "0"]).unwrap();
        assert!(contradiction.run_args("web.service").is_err());
    }

    #[test]
    fn durations_are_read_as_systemd_writes_them() {
        for (text, seconds) in
            [("15min", 900.0), ("2h 30s", 7230.0), ("90", 90.0), ("0.5", 0.5), ("50ms", 0.05)]
        {
            assert!((duration(text).unwrap().as_secs_f64() - seconds).abs() < 1e-9, "{text}");
        }
        assert_eq!(duration("infinity"), Ok(Duration::MAX));
        for text in ["", "-1", "15 parsecs", "nan"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn who_owns_the_backend_follows_from_unit_and_command() {
        assert_eq!(run(&[]).unwrap().rules().ownership, Ownership::Foreign);
        assert_eq!(run(&["--unit", "a.service"]).unwrap().rules().ownership, Ownership::Managed);
        assert_eq!(run(&["--", "sleep", "1"]).unwrap().rules().ownership, Ownership::Own);
        assert!(run(&["--unit", "a.service", "--", "sleep"]).is_err());
    }

    #[test]
    fn contradictions_are_refused() {
        for wrong in [
            &["--listen", "127.0.0.1:9"][..],
            &["--ready-probe", "notify"],
            &["--unit", "dice"],
            &["--start-timeout", "0"],
            &["--allow", "10.0.0.0/8"],
            &["--idle-policy", "traffic", "--idle-time", "0"],
        ] {
            let listens = usize::from(wrong[0] != "--listen");
            assert!(run(wrong).unwrap().check(listens).is_err(), "{wrong:?}");
        }
        assert!(run(&[]).unwrap().check(0).is_err());
        assert!(run(&["--listen", "127.0.0.1:8"]).unwrap().check(1).is_err());
        assert!(run(&["--ready-probe", "http:health"]).is_err());
        assert!(run(&["--unit", "dice.service", "--ready-probe", "notify"]).unwrap().check(1).is_ok());
    }

    #[test]
    fn networks_are_given_with_commas_or_one_by_one() {
        let line = ["--allow", "10.0.0.0/8, 192.0.2.1", "--allow", "2001:db8::/32", "--unit", "a.service"];
        let allow: Vec<String> = run(&line).unwrap().allow.iter().map(ToString::to_string).collect();
        assert_eq!(allow, ["10.0.0.0/8", "192.0.2.1/32", "2001:db8::/32"]);
        assert!(run(&line).unwrap().check(1).is_ok());
        for wrong in [&["--allow", ""][..], &["--allow", "10.0.0.0/33"], &["--max-per-source", "0"]] {
            assert!(run(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_name_comes_from_what_is_known_best() {
        assert_eq!(run(&[]).unwrap().service_name(), "127.0.0.1:9");
        assert_eq!(run(&["--", "/usr/bin/python3", "-m", "x"]).unwrap().service_name(), "python3");
        assert_eq!(run(&["--unit", "a.service"]).unwrap().service_name(), "a.service");
        assert_eq!(run(&["--name", "n", "--unit", "a.service"]).unwrap().service_name(), "n");
    }

    #[test]
    fn connections_fit_the_limit_on_open_files() {
        assert_eq!(run(&["--workers", "2"]).unwrap().connections_max(1024), Ok(414));
        assert_eq!(run(&[]).unwrap().connections_max(1 << 20), Ok(CONNECTIONS_MAX_DEFAULT));
        assert_eq!(run(&["--connections-max", "9"]).unwrap().connections_max(1024), Ok(9));
        assert!(run(&["--connections-max", "9000"]).unwrap().connections_max(1024).is_err());
        assert!(run(&["--connections-max", "0"]).is_err());
    }
}
