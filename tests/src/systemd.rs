//! A real systemd for one test: process 1 of namespaces of its own.
//!
//! Owns: the namespaces, the root on tmpfs, one directory of cgroup2, and everything that runs in them. All of it is
//! gone when the [`Systemd`] is dropped, and also when the test is killed: the processes die with the thread that
//! booted (`PR_SET_PDEATHSIG`), the empty cgroup and the state directory are removed by the next boot.
//! Must never: touch the host's units, its `/usr`, its network, or a cgroup that it did not make.
//!
//! Facts it rests on: systemd in a container sends `READY=1` to `$NOTIFY_SOCKET` when its boot is finished
//! (<https://systemd.io/CONTAINER_INTERFACE>); `cgroup.kill` (Linux 5.14) ends a whole tree; `/proc/PID/root` shows the files of
//! another mount namespace; a thread may enter a network namespace by itself (setns(2)).

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use drowse::clock;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::deadline::eventually;
use crate::isolated::in_netns;

/// The part that must run inside the new namespaces, before systemd does.
const BOOT: &str = include_str!("systemd-boot.sh");
/// Process 1 of the pid namespace enters our cgroup and makes it the root of a cgroup namespace.
const ENTER_CGROUP: &str =
    r#"echo 0 >"$CGROUP/cgroup.procs" && exec unshare --cgroup --propagation unchanged sh -c "$BOOT""#;
/// Runs `timeout SECONDS COMMAND` in the namespaces and the cgroup of process 1: $0 its cgroup, $1 its pid.
const ENTER: &str = r#"echo 0 >"$0/init.scope/cgroup.procs" && pid=$1 && shift &&
    exec nsenter -t "$pid" -m -u -i -n -p -C timeout -k 1 "$@""#;
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// A boot takes 0.4 s. This is for a machine that is busy with other tests.
const BOOT_TIMEOUT: Duration = Duration::from_mins(1);
/// No command of a test takes longer; one that does fails the test.
const COMMAND_TIMEOUT: &str = "30";
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// What a [`Systemd`] is made of.
#[derive(Clone, Debug, Default)]
pub struct Options {
    tree: PathBuf,
    binds: Vec<(PathBuf, PathBuf)>,
    kept: Vec<String>,
}

impl Options {
    /// The host's systemd, with nothing of the host's but `/usr`. `DROWSE_TEST_TREE` names another tree.
    #[must_use]
    pub fn new() -> Self {
        let tree = std::env::var_os("DROWSE_TEST_TREE").map(PathBuf::from).unwrap_or_default();
        Self { tree, ..Self::default() }
    }

    /// Uses `directory/usr` and `directory/etc` in place of the host's: another version of systemd.
    #[must_use]
    pub fn tree(mut self, directory: impl Into<PathBuf>) -> Self {
        self.tree = directory.into();
        self
    }

    /// Shows a host file or directory inside.
    #[must_use]
    pub fn bind(mut self, host_path: impl Into<PathBuf>, inner_path: impl Into<PathBuf>) -> Self {
        self.binds.push((host_path.into(), inner_path.into()));
        self
    }

    /// Leaves a unit of the stock targets as it is. All but journald, D-Bus, sysusers and tmpfiles are masked.
    #[must_use]
    pub fn keep(mut self, unit: impl Into<String>) -> Self {
        self.kept.push(unit.into());
        self
    }
}

/// A booted systemd. Boot it on the thread that outlives it: the processes die with that thread.
#[derive(Debug)]
pub struct Systemd {
    process: Child,
    /// Process 1, as the host numbers it.
    pid: u32,
    place: Place,
    boot_time: Duration,
}

impl Systemd {
    /// Boots the host's systemd.
    ///
    /// # Errors
    /// Not root, a tool is missing, no cgroup2 that may be written, or systemd did not come up; its console is in
    /// the message.
    pub fn boot() -> Result<Self> {
        Self::boot_with(&Options::new())
    }

    /// Boots with `options`.
    ///
    /// # Errors
    /// As [`Systemd::boot`].
    pub fn boot_with(options: &Options) -> Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "booting a systemd needs root: run cargo xtask test as root"
        );
        let began = clock::now();
        let place = Place::claim()?;
        let notify = UnixDatagram::bind(place.directory.join("notify")).context("bind the notify socket")?;
        let process = spawn(options, &place).context("start unshare (package util-linux)")?;
        let mut systemd = Self { process, pid: 0, place, boot_time: Duration::ZERO };
        systemd
            .wait_ready(&notify)
            .and_then(|()| systemd.find_init())
            .with_context(|| format!("boot systemd; its console says:\n{}", systemd.console()))?;
        systemd.boot_time = clock::now().saturating_sub(began);
        Ok(systemd)
    }

    /// From the call of `boot` to systemd's own "startup finished".
    #[must_use]
    pub fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// The host's view of an absolute path inside.
    #[must_use]
    pub fn path(&self, inner_path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inner_path}", self.pid))
    }

    /// Copies a host file to a path inside, with its mode.
    ///
    /// # Errors
    /// One of the files cannot be read or written.
    pub fn install(&self, host_path: impl AsRef<Path>, inner_path: &str) -> Result<()> {
        let (from, to) = (host_path.as_ref(), self.path(inner_path));
        make_parent(&to)?;
        fs::copy(from, &to).with_context(|| format!("install {} as {inner_path}", from.display()))?;
        Ok(())
    }

    /// Writes a file inside, and the directories above it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, inner_path: &str, contents: &str) -> Result<()> {
        let to = self.path(inner_path);
        make_parent(&to)?;
        fs::write(&to, contents).with_context(|| format!("write {inner_path}"))
    }

    /// Runs a command inside, as root, and gives back what it wrote and how it ended.
    ///
    /// # Errors
    /// It could not be run, or it took longer than 30 s.
    pub fn run<S: AsRef<str>>(&self, command: impl IntoIterator<Item = S>) -> Result<Output> {
        let words: Vec<String> = command.into_iter().map(|word| word.as_ref().to_owned()).collect();
        let output = Command::new("sh")
            .args(["-c", ENTER])
            .arg(&self.place.cgroup)
            .args([&self.pid.to_string(), COMMAND_TIMEOUT])
            .args(&words)
            .env_clear()
            .envs([
                ("PATH", SEARCH_PATH),
                ("SYSTEMD_COLORS", "0"),
                ("SYSTEMD_PAGER", ""),
                ("LC_ALL", "C.UTF-8"),
            ])
            .current_dir("/")
            .stdin(Stdio::null())
            .output()
            .context("start nsenter (package util-linux)")?;
        ensure!(
            output.status.code() != Some(124),
            "took longer than {COMMAND_TIMEOUT} s: {}",
            words.join(" ")
        );
        Ok(output)
    }

    /// Runs a command that must succeed, and gives back what it wrote to its standard output.
    ///
    /// # Errors
    /// As [`Systemd::run`], or it failed; what it wrote to standard error is in the message.
    pub fn call<S: AsRef<str>>(&self, command: impl IntoIterator<Item = S>) -> Result<String> {
        let words: Vec<String> = command.into_iter().map(|word| word.as_ref().to_owned()).collect();
        let output = self.run(&words)?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {}: {}", words.join(" "), output.status, complaint.trim());
        String::from_utf8(output.stdout).context("read what the command wrote")
    }

    /// `systemctl ARGUMENTS`, which must succeed.
    ///
    /// # Errors
    /// As [`Systemd::call`].
    pub fn systemctl<S: AsRef<str>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<String> {
        let arguments = arguments.into_iter().map(|word| word.as_ref().to_owned());
        self.call(std::iter::once("systemctl".to_owned()).chain(arguments))
    }

    /// A property of a unit as `systemctl show` prints it.
    ///
    /// # Errors
    /// As [`Systemd::call`].
    pub fn property(&self, unit: &str, property: &str) -> Result<String> {
        let value = self.systemctl(["show", "--value", "--property", property, "--", unit])?;
        Ok(value.trim_end().to_owned())
    }

    /// Waits until a property of a unit is `value`.
    ///
    /// # Errors
    /// It is not within `within`; the message says what it is.
    pub fn wait_until_property(
        &self,
        unit: &str,
        property: &str,
        value: &str,
        within: Duration,
    ) -> Result<()> {
        self.wait_until(unit, property, within, |now| now == value)
            .with_context(|| format!("wait until {property} of {unit} is {value}"))
    }

    /// Waits until a property of a unit is as `wanted` says.
    ///
    /// # Errors
    /// It is not within `within`; the message says what it is.
    pub fn wait_until(
        &self,
        unit: &str,
        property: &str,
        within: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let mut last = String::new();
        eventually(&format!("change of {property} of {unit}"), within, || {
            last = self.property(unit, property)?;
            Ok(wanted(&last).then_some(()))
        })
        .with_context(|| format!("{property} of {unit} is {last:?}"))
    }

    /// What the journal has of a unit: its own lines and those of systemd about it.
    ///
    /// # Errors
    /// As [`Systemd::call`].
    pub fn journal(&self, unit: &str) -> Result<String> {
        self.call(["journalctl", "--sync"])?;
        self.call(["journalctl", "--no-pager", "--quiet", "--output=cat", "--unit", unit])
    }

    /// The lines that the processes of a unit wrote, without those of systemd about it.
    ///
    /// # Errors
    /// As [`Systemd::call`].
    pub fn lines_of(&self, unit: &str) -> Result<Vec<String>> {
        self.call(["journalctl", "--sync"])?;
        let only = format!("_SYSTEMD_UNIT={unit}");
        let text = self.call(["journalctl", "--no-pager", "--quiet", "--output=cat", &only])?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// Everything in the journal, with times to the microsecond: what a failed test shows.
    ///
    /// # Errors
    /// As [`Systemd::call`].
    pub fn whole_journal(&self) -> Result<String> {
        self.call(["journalctl", "--sync"])?;
        self.call(["journalctl", "--no-pager", "--quiet", "--output=short-monotonic", "--no-hostname"])
    }

    /// Runs `work` on a thread that has entered the network namespace. Sockets that it makes stay there.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    ///
    /// # Panics
    /// When `work` does.
    pub fn in_netns<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let netns = File::open(format!("/proc/{}/ns/net", self.pid)).context("open the network namespace")?;
        in_netns(netns, work)
    }

    /// Blocks until systemd says that its boot is finished.
    fn wait_ready(&mut self, notify: &UnixDatagram) -> Result<()> {
        let deadline = clock::now() + BOOT_TIMEOUT;
        let ended = pidfd(&self.process)?;
        let mut message = [0; 4096];
        loop {
            let mut events = [PollFd::new(notify, PollFlags::IN), PollFd::new(&ended, PollFlags::IN)];
            let ready = poll(&mut events, Some(&until(deadline)?)).context("wait for systemd")?;
            ensure!(ready > 0, "systemd did not finish its boot within {BOOT_TIMEOUT:?}");
            let [said, died] = events.map(|event| !event.revents().is_empty());
            if said {
                let length = notify.recv(&mut message).context("read systemd's notification")?;
                let text = String::from_utf8_lossy(message.get(..length).unwrap_or_default());
                if text.lines().any(|line| line == "READY=1") {
                    return Ok(());
                }
            } else if died {
                bail!("process 1 ended");
            }
        }
    }

    /// Learns the pid of process 1: the only child of unshare.
    fn find_init(&mut self) -> Result<()> {
        let unshare = self.process.id();
        let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children"))
            .context("look for process 1")?;
        self.pid = children.trim().parse().with_context(|| format!("understand children {children:?}"))?;
        Ok(())
    }

    fn console(&self) -> String {
        fs::read_to_string(self.place.directory.join("console")).unwrap_or_else(|error| error.to_string())
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        self.place.kill();
        // Dead already, unless the boot did not get as far as entering the cgroup.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The state directory and the cgroup of one systemd. A lock on the directory tells the living from the dead.
#[derive(Debug)]
struct Place {
    directory: PathBuf,
    cgroup: PathBuf,
    _alive: File,
}

impl Place {
    /// Makes a place, and removes those of tests that were killed.
    fn claim() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let states = std::env::temp_dir().join("drowse-test-systemd");
        fs::create_dir_all(&states).context("make the directory of states")?;
        let cgroup_root = cgroup2_root()?;
        // While we hold it, no other test takes a half-made place for a dead one.
        let making = File::create(states.join("lock")).context("open the lock of the states")?;
        flock(&making, FlockOperation::LockExclusive).context("lock the states")?;
        remove_dead(&states, &cgroup_root)?;

        let name = format!("drowse-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let (directory, cgroup) = (states.join(&name), cgroup_root.join(&name));
        fs::create_dir(&directory).with_context(|| format!("make {}", directory.display()))?;
        let alive = File::create(directory.join("alive")).context("open the place's lock")?;
        flock(&alive, FlockOperation::LockExclusive).context("lock the place")?;
        File::create(directory.join("console")).context("make the console's file")?;
        let place = Self { directory, cgroup, _alive: alive };
        fs::create_dir(&place.cgroup).with_context(|| {
            format!("make {}: a cgroup2 that root may write is needed", place.cgroup.display())
        })?;
        Ok(place)
    }

    /// Ends every process in the cgroup.
    fn kill(&self) {
        let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = remove_cgroup(&self.cgroup) {
            eprintln!("left behind: {}: {error:#}", self.cgroup.display());
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Removes the places whose test is dead. Their processes died with it, or are killed here.
fn remove_dead(states: &Path, cgroup_root: &Path) -> Result<()> {
    for entry in fs::read_dir(states).context("read the directory of states")? {
        let directory = entry.context("read the directory of states")?.path();
        let Ok(alive) = File::open(directory.join("alive")) else { continue };
        let Some(name) = directory.file_name() else { continue };
        if flock(&alive, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let place = Place { cgroup: cgroup_root.join(name), directory, _alive: alive };
            place.kill();
        }
    }
    Ok(())
}

/// Waits until the cgroup is empty and removes it.
fn remove_cgroup(cgroup: &Path) -> Result<()> {
    let deadline = clock::now() + END_TIMEOUT;
    if !cgroup.exists() {
        return Ok(());
    }
    let events = File::open(cgroup.join("cgroup.events")).context("open cgroup.events")?;
    loop {
        // A change between the read and the poll is not missed: poll tells of any since this open file's last read.
        let mut text = [0; 256];
        let length = rustix::io::pread(&events, &mut text, 0).context("read cgroup.events")?;
        let populated = text.get(..length).unwrap_or_default().windows(11).any(|word| word == b"populated 1");
        if !populated {
            break;
        }
        let mut fds = [PollFd::new(&events, PollFlags::PRI)];
        let changed = poll(&mut fds, Some(&until(deadline)?)).context("wait for the cgroup to empty")?;
        ensure!(changed > 0, "processes are left after {END_TIMEOUT:?}");
    }
    remove_cgroup_tree(cgroup)
}

fn remove_cgroup_tree(cgroup: &Path) -> Result<()> {
    for entry in fs::read_dir(cgroup).with_context(|| format!("read {}", cgroup.display()))? {
        let entry = entry.context("read a cgroup")?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup_tree(&entry.path())?;
        }
    }
    fs::remove_dir(cgroup).with_context(|| format!("remove {}", cgroup.display()))
}

/// Where cgroup2 is mounted: `/sys/fs/cgroup`, or below it on a machine that still has version 1.
fn cgroup2_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read the mounts")?;
    let cgroup2 =
        mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find_map(|fields| match *fields {
            [_, directory, "cgroup2", ..] => Some(PathBuf::from(directory)),
            _ => None,
        });
    cgroup2.ok_or_else(|| anyhow!("no cgroup2 is mounted: mount one, or use a newer container runtime"))
}

/// Starts the chain that ends in systemd: it dies with this thread, and unshare's child dies with unshare.
fn spawn(options: &Options, place: &Place) -> Result<Child> {
    let mut binds = String::new();
    for (from, to) in &options.binds {
        let from = from.canonicalize().with_context(|| format!("find {}", from.display()))?;
        writeln!(binds, "{}\t{}", from.display(), to.display())?;
    }
    let console =
        File::options().append(true).open(place.directory.join("console")).context("open the console")?;
    let name = place.directory.file_name().unwrap_or_default();
    Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--uts"])
        .args(["--ipc", "--net", "--propagation", "private", "sh", "-c", ENTER_CGROUP])
        .env_clear()
        .envs([("PATH", SEARCH_PATH), ("LC_ALL", "C.UTF-8"), ("BOOT", BOOT)])
        .env("NAME", name)
        .env("TREE", &options.tree)
        .env("STATE", &place.directory)
        .env("CGROUP", &place.cgroup)
        .env("BINDS", binds)
        .env("KEEP", options.kept.join(" "))
        .stdin(Stdio::null())
        .stdout(console.try_clone().context("share the console")?)
        .stderr(console)
        .spawn()
        .context("start setpriv (package util-linux)")
}

fn make_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))
}

fn pidfd(process: &Child) -> Result<OwnedFd> {
    let pid = i32::try_from(process.id()).ok().and_then(Pid::from_raw).context("understand a pid")?;
    pidfd_open(pid, PidfdFlags::empty()).context("open a pidfd")
}

/// The time left until `deadline`, as poll wants it. Nothing left is an error in the making: poll then returns 0.
fn until(deadline: clock::Monotonic) -> Result<Timespec> {
    Timespec::try_from(deadline.saturating_sub(clock::now())).context("understand a time")
}
