//! Readiness: how we learn that the backend accepts connections.
//!
//! Owns: when to try. The listen hook or the backend's own `READY=1` says so at once; without them a connect is
//! retried. Must never: decide what follows, or give up; `lifecycle` has the deadline.

pub mod listen_hook;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use socket2::{SockAddr, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Notify;

use crate::address::{self, Address};
use crate::clock;
use crate::config::{ReadyProbe, RunArgs};
use crate::pairing;

/// The pause between two connects is this part of the time waited so far, so that at most so much is lost.
const RETRY_PART: u32 = 32;
/// The shortest pause between two connects.
const RETRY_MIN: Duration = Duration::from_millis(1);
/// The longest pause between two connects.
const RETRY_MAX: Duration = Duration::from_millis(100);
/// The same part while the listen hook watches: only a net, for a backend whose listen no hook sees (behind a port
/// forward into another network namespace, say).
const HOOKED_PART: u32 = 4;
/// The longest pause while the listen hook watches.
const HOOKED_MAX: Duration = Duration::from_secs(1);
/// How long the backend may take to answer the HTTP probe.
const HTTP_TIME: Duration = Duration::from_secs(5);
/// How much of an HTTP answer is looked at for its status line and headers, in bytes.
const HTTP_HEAD_MAX: usize = 8 * 1024;
const _: () = assert!(RETRY_MIN.as_millis() < RETRY_MAX.as_millis());

/// What is known from outside about the backend that starts.
#[derive(Debug, Default)]
pub struct Hints {
    /// Something happened: try now.
    changed: Notify,
    hooked: AtomicBool,
    said_ready: AtomicBool,
    last_error: Mutex<String>,
}

impl Hints {
    /// A new start begins: what an earlier one said no longer counts.
    pub fn clear(&self) {
        self.said_ready.store(false, Relaxed);
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The backend may have become ready: a listen was seen, or the manager reports progress.
    pub fn nudge(&self) {
        self.changed.notify_one();
    }

    /// From now on the listen hook sees every listen.
    pub fn set_hooked(&self) {
        self.hooked.store(true, Relaxed);
        self.nudge();
    }

    /// The backend said `READY=1`.
    pub fn set_said_ready(&self) {
        self.said_ready.store(true, Relaxed);
        self.nudge();
    }

    /// Why the last try failed; empty if there was none.
    #[must_use]
    pub fn last_error(&self) -> String {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn pause(&self, waited: Duration) -> Duration {
        if self.hooked.load(Relaxed) {
            (waited / HOOKED_PART).clamp(RETRY_MAX, HOOKED_MAX)
        } else {
            (waited / RETRY_PART).clamp(RETRY_MIN, RETRY_MAX)
        }
    }
}

/// Waits until the backend is ready. Returns the connection that proved it, for the first client to use.
pub async fn wait(run: &RunArgs, hints: &Hints) -> Option<Socket> {
    let since = clock::now();
    loop {
        match try_once(run, hints).await {
            Ok(scout) => return scout,
            Err(error) => {
                *hints.last_error.lock().unwrap_or_else(PoisonError::into_inner) = error.to_string();
            }
        }
        let pause = hints.pause(clock::now().saturating_sub(since));
        let _either = tokio::time::timeout(pause, hints.changed.notified()).await;
    }
}

async fn try_once(run: &RunArgs, hints: &Hints) -> io::Result<Option<Socket>> {
    let backend = &run.backend;
    match &run.ready_probe {
        ReadyProbe::Connect => pairing::connect(backend).await.map(Some),
        ReadyProbe::Notify if hints.said_ready.load(Relaxed) => pairing::connect(backend).await.map(Some),
        ReadyProbe::Notify => Err(io::Error::new(io::ErrorKind::WouldBlock, "it did not say READY=1")),
        ReadyProbe::Http(path) => {
            let socket = pairing::introduce(pairing::connect(backend).await?, None, run.proxy_protocol)?;
            tokio::time::timeout(HTTP_TIME, http_get(socket, backend, path)).await??;
            Ok(None)
        }
    }
}

/// Sends a GET and reads the status line of the answer.
async fn http_get(socket: Socket, backend: &Address, path: &str) -> io::Result<()> {
    let host = match backend {
        Address::Tcp { .. } => backend.to_string(),
        Address::Unix(_) | Address::Abstract(_) => "localhost".to_owned(),
    };
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: drowse\r\nConnection: close\r\n\r\n");
    if socket.local_addr()?.is_unix() {
        exchange(UnixStream::from_std(socket.into())?, &request).await
    } else {
        exchange(TcpStream::from_std(socket.into())?, &request).await
    }
}

async fn exchange<S: AsyncReadExt + AsyncWriteExt + Unpin>(mut stream: S, request: &str) -> io::Result<()> {
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    while head.len() < HTTP_HEAD_MAX {
        if stream.read_buf(&mut head).await? == 0 {
            break;
        }
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut response = httparse::Response::new(&mut headers);
        let parsed = response.parse(&head);
        if let Some(code) = response.code {
            let ready = (200..400).contains(&code);
            return if ready {
                Ok(())
            } else {
                Err(io::Error::other(format!("the HTTP probe got status {code}")))
            };
        }
        if let Err(error) = parsed {
            return Err(io::Error::other(format!("the HTTP probe got no HTTP: {error}")));
        }
    }
    Err(io::Error::other("the HTTP probe got no status line"))
}

/// The address at which somebody listens already, although the backend is not running. Only addresses of this
/// machine are looked at, by binding to them for a moment; nobody is connected to.
pub async fn occupied(backend: &Address) -> Option<String> {
    let addresses = backend.resolve().await.ok()?;
    addresses.iter().find(|one| one.as_socket().is_some() && is_taken(one)).map(address::display)
}

fn is_taken(address: &SockAddr) -> bool {
    let bind = || {
        let socket = Socket::new(address.domain(), Type::STREAM, None)?;
        // With SO_REUSEADDR only a socket that listens is in the way, none in TIME_WAIT.
        socket.set_reuse_address(true)?;
        socket.bind(address)
    };
    bind().is_err_and(|error: io::Error| error.kind() == io::ErrorKind::AddrInUse)
}
