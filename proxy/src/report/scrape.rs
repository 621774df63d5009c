//! The metrics endpoint: OpenMetrics text at `GET /metrics` over HTTP/1.1.
//!
//! Owns: the listener of `--metrics` and whoever is connected to it. Must never: hold up a client or grow, whatever its
//! peers do: there are few at a time, each has a second, and a place is free again no sooner than a pause later.
//! It is no listener of the service: nothing is counted, handed off or woken by it.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use socket2::{Domain, Socket};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::address::Address;
use crate::listener::Listeners;
use crate::report::metrics;

/// Peers that are served at a time; more wait in the backlog.
const PEERS_MAX: usize = 8;
/// Peers that may wait; more are not let in.
const BACKLOG: i32 = 32;
/// How long a peer may take to ask and to read its answer.
const PEER_TIME: Duration = Duration::from_secs(1);
/// A place is free again so long after it was taken at the earliest: nobody makes us answer more than 80 times a second.
const PEER_PAUSE: Duration = Duration::from_millis(100);
/// The longest request, in bytes; the least that the library allows. A real one has 300.
const REQUEST_BYTES_MAX: usize = 8192;
/// The one page that there is.
const PATH: &str = "/metrics";

/// Somebody wants the metrics: the text goes here.
pub type Question = oneshot::Sender<String>;

/// The endpoint of one service.
pub struct Endpoint {
    listeners: Listeners,
    peers: FuturesUnordered<Pin<Box<dyn Future<Output = ()>>>>,
    ask: mpsc::Sender<Question>,
    asked: mpsc::Receiver<Question>,
}

impl Endpoint {
    /// Listens at `address`, which is none of where `clients` come to.
    ///
    /// # Errors
    /// It is taken, not permitted, or not there.
    pub async fn open(address: &Address, clients: &Listeners) -> anyhow::Result<Self> {
        let resolved =
            address.resolve_to_listen().await.with_context(|| format!("resolve --metrics {address}"))?;
        if resolved.iter().any(|one| clients.is_at(one)) {
            bail!("--metrics {address} is where clients come to; it needs an address of its own");
        }
        let listeners =
            Listeners::bind(std::slice::from_ref(address), BACKLOG).await.context("serve metrics")?;
        let (ask, asked) = mpsc::channel(PEERS_MAX);
        Ok(Self { listeners, peers: FuturesUnordered::new(), ask, asked })
    }

    /// The next peer that asks for the metrics. Serves all others meanwhile. Cancel safe.
    pub async fn asked(&mut self) -> Question {
        loop {
            let has_room = self.peers.len() < PEERS_MAX;
            tokio::select! {
                Some(question) = self.asked.recv() => return question,
                Some(()) = self.peers.next(), if !self.peers.is_empty() => {}
                // Where accepting failed, the next one pauses.
                peer = self.listeners.accept(), if has_room => if let Ok(peer) = peer {
                    self.take_in(peer.socket);
                },
            }
        }
    }

    fn take_in(&self, peer: Socket) {
        let ask = self.ask.clone();
        self.peers.push(Box::pin(async move {
            let pause = tokio::time::sleep(PEER_PAUSE);
            let _left_or_too_slow = tokio::time::timeout(PEER_TIME, serve(peer, ask)).await;
            pause.await;
        }));
    }
}

async fn serve(peer: Socket, ask: mpsc::Sender<Question>) -> io::Result<()> {
    if peer.domain()? == Domain::UNIX {
        talk(UnixStream::from_std(peer.into())?, ask).await;
    } else {
        talk(TcpStream::from_std(peer.into())?, ask).await;
    }
    Ok(())
}

async fn talk(peer: impl AsyncRead + AsyncWrite + Unpin, ask: mpsc::Sender<Question>) {
    let answer = service_fn(|request| {
        let ask = ask.clone();
        async move { Ok::<_, Infallible>(answer(&request, &ask).await) }
    });
    let mut http = http1::Builder::new();
    http.keep_alive(false).half_close(true).max_buf_size(REQUEST_BYTES_MAX).header_read_timeout(None);
    let _left_or_spoke_no_http = http.serve_connection(TokioIo::new(peer), answer).await;
}

async fn answer(request: &Request<Incoming>, ask: &mpsc::Sender<Question>) -> Response<Full<Bytes>> {
    if request.uri().path() != PATH {
        return refusal(StatusCode::NOT_FOUND, "there is nothing here but /metrics\n");
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response =
            refusal(StatusCode::METHOD_NOT_ALLOWED, "metrics can be read with GET, and nothing else\n");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let (question, text) = oneshot::channel();
    // Fails only when drowse exits, and then nobody waits for an answer.
    let _exiting = ask.send(question).await;
    let Ok(text) = text.await else {
        return refusal(StatusCode::SERVICE_UNAVAILABLE, "drowse exits\n");
    };
    let mut response = Response::new(text.into());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(metrics::CONTENT_TYPE));
    response
}

fn refusal(status: StatusCode, words: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(words));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
