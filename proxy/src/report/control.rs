//! The status socket: whoever connects gets one [`Snapshot`] as JSON and the end of the stream.
//!
//! Owns: `DIRECTORY/NAME.sock` while drowse runs, and reading those of others. Must never: read from a peer, wait for
//! one, or keep drowse from serving; a service without a status socket serves as well. Nor may it follow a link, or wait
//! for a pipe, that lies in a directory: `/run/drowse` belongs to the user `drowse`, and root looks into it.
//! Rests on: a unix socket gets the mode that `fchmod(2)` gave it before it was bound, without the umask's bits;
//! connecting to a unix socket needs write permission on it, `unix(7)`, so mode 0600 lets in root and the
//! socket's own user only; a connect to a socket file that nobody listens on is refused.

use std::fmt;
use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::future::Future;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use rustix::fs::{Mode, fchmod};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

use crate::ebpf::pin_name;
use crate::report::remembered::Remembered;
use crate::report::sleepers::{ManagerPlace, Place};
use crate::report::snapshot::Snapshot;

/// Where the sockets of root's services are.
const SYSTEM_DIRECTORY: &str = "/run/drowse";
/// What the name of a status socket ends in.
const EXTENSION: &str = "sock";
/// What the name of the file beside it ends in that outlives its drowse.
const REMEMBERED: &str = "json";
/// Peers that are answered at a time; more wait in the backlog.
const PEERS_MAX: usize = 8;
/// Peers that may wait to be answered.
const BACKLOG: i32 = 64;
/// How long a peer may take to read its answer, and a drowse to give it.
const ANSWER_TIME: Duration = Duration::from_secs(1);
/// The longest answer that is read, in bytes; a real one has 2 KiB.
const ANSWER_BYTES_MAX: u64 = 1 << 20;
/// The longest file of what is remembered, in bytes; a real one has 200.
const REMEMBERED_BYTES_MAX: u64 = 64 << 10;
/// The pause after an accept that failed for want of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

/// Where the status socket of a service goes: `explicit`, else root's or the user's directory. None: the user has no
/// directory for such things.
#[must_use]
pub fn own_directory(explicit: Option<&Path>, user: bool) -> Option<PathBuf> {
    match explicit {
        Some(directory) => Some(directory.to_owned()),
        None if rustix::process::geteuid().is_root() && !user => Some(SYSTEM_DIRECTORY.into()),
        None => users_directory(),
    }
}

/// Where services are looked for: the status sockets in `explicit`, else those of root's services and the user's, and
/// what systemd's managers know of the same.
#[must_use]
pub fn places(explicit: Option<&Path>) -> Vec<Place> {
    if let Some(directory) = explicit {
        return vec![Place { directory: directory.to_owned(), manager: None }];
    }
    let system = Place { directory: SYSTEM_DIRECTORY.into(), manager: Some(ManagerPlace::system()) };
    let user = users_directory()
        .map(|directory| Place { manager: directory.parent().map(ManagerPlace::user), directory });
    [Some(system), user].into_iter().flatten().collect()
}

/// Where status sockets are looked for: `explicit`, else root's directory and the user's.
#[must_use]
pub fn directories(explicit: Option<&Path>) -> Vec<PathBuf> {
    places(explicit).into_iter().map(|place| place.directory).collect()
}

fn users_directory() -> Option<PathBuf> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|path| !path.is_empty())?;
    Some(Path::new(&runtime).join("drowse"))
}

/// The listening end. Dropping it removes the socket.
#[derive(Debug)]
struct Listening {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket's file: somebody may have put another one in its place.
    file: (u64, u64),
}

impl Drop for Listening {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|there| there == self.file) {
            let _gone_already = fs::remove_file(&self.path);
        }
    }
}

/// The status socket of one service, or none.
#[derive(Default)]
pub struct Control {
    listening: Option<Listening>,
    answers: FuturesUnordered<Pin<Box<dyn Future<Output = ()>>>>,
}

impl Control {
    /// Listens at `directory/NAME.sock`. A socket that a killed drowse left behind is replaced. To be called within a
    /// tokio runtime.
    ///
    /// # Errors
    /// There is no such directory and it cannot be made, it may not be written to, or another drowse of that name runs.
    pub fn open(directory: Option<&Path>, name: &str) -> anyhow::Result<Self> {
        let Some(directory) = directory else {
            bail!("no directory for it: set XDG_RUNTIME_DIR or DROWSE_RUNTIME_DIR");
        };
        make(directory).with_context(|| format!("make {}", directory.display()))?;
        let path = directory.join(pin_name(name)?).with_added_extension(EXTENSION);
        if is_alive(&path)? {
            bail!("another drowse named {name} runs; its status socket stays");
        }
        let listening = listen(path.clone()).with_context(|| format!("listen on {}", path.display()))?;
        Ok(Self { listening: Some(listening), answers: FuturesUnordered::new() })
    }

    /// What an earlier drowse of this name knew, if there was one since the machine was started.
    #[must_use]
    pub fn remembered(&self) -> Option<Remembered> {
        read_remembered(&self.listening.as_ref()?.path)
    }

    /// Keeps `remembered` for the next drowse and for who asks while none runs. Best effort, into a directory that is
    /// in memory.
    pub fn remember(&self, remembered: &Remembered) {
        let Some(Listening { path, .. }) = &self.listening else { return };
        let written = || -> io::Result<()> {
            let mut own = temporary().tempfile_in(directory_of(path))?;
            own.write_all(&serde_json::to_vec(remembered)?)?;
            own.persist(path.with_extension(REMEMBERED))?;
            Ok(())
        };
        if let Err(error) = written() {
            tracing::debug!(%error, "cannot keep what the next drowse would know");
        }
    }

    /// The next peer that wants to know; [`Control::answer`] it. Sends answers meanwhile. Cancel safe.
    pub async fn asked(&mut self) -> UnixStream {
        loop {
            let has_room = self.answers.len() < PEERS_MAX;
            tokio::select! {
                Some(()) = self.answers.next(), if !self.answers.is_empty() => {}
                peer = accepted(self.listening.as_ref()), if has_room => return peer,
            }
        }
    }

    /// Sends `snapshot` to `peer` and closes; one that does not read is dropped after a while.
    pub fn answer(&mut self, mut peer: UnixStream, snapshot: &Snapshot) {
        let Ok(mut json) = serde_json::to_vec(snapshot) else { return };
        json.push(b'\n');
        self.answers.push(Box::pin(async move {
            let _peer_left_or_does_not_read = tokio::time::timeout(ANSWER_TIME, peer.write_all(&json)).await;
        }));
    }
}

async fn accepted(listening: Option<&Listening>) -> UnixStream {
    let Some(listening) = listening else { return std::future::pending().await };
    loop {
        match listening.socket.accept().await {
            Ok((peer, _)) => return peer,
            Err(_no_descriptors) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// Makes the directory that all services share, so that everybody may look into it whatever the umask is.
fn make(directory: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o755).create(directory) {
        Ok(()) => fs::set_permissions(directory, Permissions::from_mode(0o755)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// What is remembered of the service `name` in `directory`, if we may know.
#[must_use]
pub fn remembered_in(directory: &Path, name: &str) -> Option<Remembered> {
    read_remembered(&directory.join(pin_name(name).ok()?).with_added_extension(EXTENSION))
}

fn read_remembered(socket: &Path) -> Option<Remembered> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file =
        OpenOptions::new().read(true).custom_flags(flags).open(socket.with_extension(REMEMBERED)).ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut json = Vec::new();
    file.take(REMEMBERED_BYTES_MAX).read_to_end(&mut json).ok()?;
    serde_json::from_slice(&json).ok()
}

/// Forgets what is remembered of the service `name` in `directory`.
pub fn forget(directory: &Path, name: &str) {
    if let Ok(file_name) = pin_name(name) {
        let _nothing_there = fs::remove_file(directory.join(file_name).with_added_extension(REMEMBERED));
    }
}

/// Whether somebody listens at `path`.
fn is_alive(path: &Path) -> anyhow::Result<bool> {
    let shown = path.display();
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).with_context(|| format!("look at {shown}")),
        Ok(found) if !found.file_type().is_socket() => bail!("{shown} exists and is no socket; remove it"),
        Ok(_) => {}
    }
    let connected = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)
        .and_then(|socket| socket.connect(&SockAddr::unix(path)?));
    match connected {
        Ok(()) => Ok(true),
        // Its backlog is full.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {
            Ok(false)
        }
        Err(error) => Err(error).with_context(|| format!("connect to {shown}")),
    }
}

/// Listens under a name that nobody had before: the socket gets its place, and takes that of a dead one, with its final
/// mode and at a moment when a connect is not refused.
fn listen(path: PathBuf) -> io::Result<Listening> {
    let own = temporary().make_in(directory_of(&path), |own| {
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        socket.bind(&SockAddr::unix(own)?)?;
        socket.listen(BACKLOG)?;
        Ok(socket)
    })?;
    let file = identity(own.path())?;
    let socket = UnixListener::from_std(own.persist(&path)?.into())?;
    Ok(Listening { socket, path, file })
}

/// How files are named that are not complete yet.
fn temporary() -> tempfile::Builder<'static, 'static> {
    let mut temporary = tempfile::Builder::new();
    temporary.prefix(".");
    temporary
}

fn directory_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("."))
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

/// A service of which there is a status socket, and its answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// The name of its socket without `.sock`: the service's name, escaped as [`pin_name`] does.
    pub file_name: String,
    /// What it says of itself.
    pub answer: Result<Snapshot, Silence>,
}

impl Service {
    /// The service's name; its socket's, if it does not answer.
    #[must_use]
    pub fn name(&self) -> &str {
        self.answer.as_ref().map_or(&self.file_name, |snapshot| &snapshot.name)
    }
}

/// Why a service does not answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Silence {
    /// The socket belongs to another user.
    NotPermitted,
    /// Nobody listens any more.
    Gone,
    /// No answer in time.
    Late,
    /// Anything else, in one line.
    Odd(String),
}

impl fmt::Display for Silence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotPermitted => {
                f.write_str("not permitted to ask drowse: only root and the user that it runs as may")
            }
            Self::Gone => f.write_str("does not run: it was killed; its next start tidies up"),
            Self::Late => f.write_str("does not answer"),
            Self::Odd(error) => write!(f, "cannot be asked: {error}"),
        }
    }
}

/// Asks every service in `directories` whose socket's name `wanted` accepts, all at once, and no longer than a second.
/// In the order of directories and names.
///
/// # Errors
/// A directory is there and cannot be read.
pub async fn ask_all(directories: &[PathBuf], wanted: impl Fn(&str) -> bool) -> anyhow::Result<Vec<Service>> {
    let mut found = Vec::new();
    for directory in directories {
        found.extend(sockets(directory).with_context(|| format!("read {}", directory.display()))?);
    }
    found.retain(|(file_name, _)| wanted(file_name));
    let questions = found
        .into_iter()
        .map(|(file_name, path)| async move { Service { file_name, answer: ask(&path).await } });
    Ok(futures_util::future::join_all(questions).await)
}

/// The status sockets in `directory`, sorted: each with its name without `.sock`.
fn sockets(directory: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == EXTENSION)
            && let Some(file_name) = path.file_stem().and_then(|stem| stem.to_str())
        {
            found.push((file_name.to_owned(), path));
        }
    }
    found.sort();
    Ok(found)
}

async fn ask(path: &Path) -> Result<Snapshot, Silence> {
    let answer = match tokio::time::timeout(ANSWER_TIME, read(path)).await {
        Err(_elapsed) => return Err(Silence::Late),
        Ok(Err(error)) => return Err(silence(&error)),
        Ok(Ok(answer)) if answer.is_empty() => return Err(Silence::Gone),
        Ok(Ok(answer)) => answer,
    };
    serde_json::from_slice(&answer)
        .map_err(|error| Silence::Odd(format!("its answer is none of this version of drowse: {error}")))
}

async fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    UnixStream::connect(path).await?.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await?;
    Ok(answer)
}

fn silence(error: &io::Error) -> Silence {
    let known = [
        (io::ErrorKind::PermissionDenied, Silence::NotPermitted),
        (io::ErrorKind::ConnectionRefused, Silence::Gone),
        (io::ErrorKind::NotFound, Silence::Gone),
        (io::ErrorKind::ConnectionReset, Silence::Gone),
        (io::ErrorKind::WouldBlock, Silence::Late),
    ];
    let found = known.into_iter().find(|(kind, _)| *kind == error.kind());
    found.map_or_else(|| Silence::Odd(error.to_string()), |(_, silence)| silence)
}
