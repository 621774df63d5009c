//! `drowse top`: every running drowse, live, on a terminal.
//!
//! Owns: the terminal, from the first frame until it is as it was before, however that comes about. Must never: change
//! a service, wait for one (they are asked beside the keys, and for a second at most), or cost one more than a question
//! for each look.
//! Rests on: a terminal that hangs up is readable and has no more input (`EIO` or an end of file, `n_tty_read`), and its
//! session gets a SIGHUP.

use std::io::{self, IsTerminal as _, Stdin};
use std::os::fd::AsFd as _;
use std::time::Duration;

use anyhow::{Context as _, bail};
use drowse_ebpf::Endpoint;
use ratatui::DefaultTerminal;
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::MissedTickBehavior;

use self::keys::{Key, Keys};
use self::model::{CountedFlow, Model, Reaction};
use self::view::Abilities;
use crate::clock;
use crate::config::TopArgs;
use crate::ebpf;
use crate::report::Said;
use crate::report::control::{self, Service};
use crate::sys::Readable;

pub mod keys;
pub mod model;
pub mod view;

/// How long the rest of a key's bytes may take, as from the other end of a slow line.
const ESCAPE_TIME: Duration = Duration::from_millis(100);
/// Bytes of input that are read at a time.
const INPUT_BYTES: usize = 256;
/// The flows of one service that are looked at, at most.
pub const FLOWS_SHOWN_MAX: usize = 1000;

/// Shows all services until somebody quits, or the terminal goes away.
///
/// # Errors
/// There is no terminal to draw on.
pub async fn top(args: &TopArgs) -> anyhow::Result<Said> {
    let can = abilities(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))?;
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        bail!("top needs a terminal for its input and its output; for scripts: drowse status --json");
    }
    let mut signals = Signals::new()?;
    let mut input = Input::new()?;
    let terminal = ratatui::try_init().context("prepare the terminal");
    let shown = match terminal {
        Ok(terminal) => watch(args, can, terminal, &mut signals, &mut input).await,
        Err(error) => Err(error),
    };
    let _the_terminal_may_be_gone = ratatui::try_restore();
    shown.map(|()| Said { answer: String::new(), notes: vec![], success: true })
}

/// What the environment says of the terminal.
fn abilities(variable: impl Fn(&str) -> Option<String>) -> anyhow::Result<Abilities> {
    match variable("TERM").as_deref() {
        None | Some("dumb") => {
            bail!("this terminal cannot be drawn on (TERM is dumb or not set); use: drowse status")
        }
        Some(_) => {}
    }
    // As setlocale(3) looks for the character set.
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(&variable).unwrap_or_default();
    let locale = locale.to_lowercase();
    let unicode = locale.contains("utf-8") || locale.contains("utf8");
    Ok(Abilities { colour: variable("NO_COLOR").is_none(), unicode })
}

async fn watch(
    args: &TopArgs,
    can: Abilities,
    mut terminal: DefaultTerminal,
    signals: &mut Signals,
    input: &mut Input,
) -> anyhow::Result<()> {
    let directories = control::directories(args.runtime_dir.as_deref());
    let mut model = Model::new(args.interval);
    let mut looks = tokio::time::interval(args.interval);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut looking = None;
    loop {
        if terminal.draw(|frame| view::draw(frame, &model, can)).is_err() {
            return Ok(());
        }
        let reaction = loop {
            tokio::select! {
                biased;
                reaction = signals.next() => break reaction,
                keys = input.keys() => break model.press_all(&keys),
                services = finished(&mut looking) => {
                    looking = None;
                    take(&mut model, services);
                    // The answers have brought the kernel's counters up to date.
                    break Reaction::LookInto;
                }
                _ = looks.tick(), if looking.is_none() => {
                    looking = Some(Box::pin(control::ask_all(&directories, |_| true)));
                }
            }
        };
        match reaction {
            Reaction::Quit => return Ok(()),
            Reaction::LookInto => look_into(&mut model),
            Reaction::Stay => {}
        }
    }
}

async fn finished<T>(task: &mut Option<std::pin::Pin<Box<impl Future<Output = T>>>>) -> T {
    match task {
        Some(task) => task.await,
        None => std::future::pending().await,
    }
}

fn take(model: &mut Model, services: anyhow::Result<Vec<Service>>) {
    match services {
        Ok(services) => model.update(services, clock::now()),
        Err(error) => model.trouble = Some(format!("{error:#}")),
    }
}

/// Reads the flows of the service that is looked into, if one is.
fn look_into(model: &mut Model) {
    if let Some(watched) = model.looked_into() {
        let (of, flows) = (watched.id.clone(), flows(&watched.name));
        model.update_flows(&of, flows, clock::now());
    }
}

/// The flows of the service `name` that were handed off, from its pinned map.
fn flows(name: &str) -> Result<Vec<CountedFlow>, String> {
    let found = ebpf::open_flows(name, FLOWS_SHOWN_MAX)
        .map_err(|error| format!("the flows that were handed off cannot be shown one by one: {error:#}"))?;
    let counted = |(cookie, flow): (u64, drowse_ebpf::Flow)| {
        let client = Endpoint { address: flow.client, port: flow.client_port, family: flow.family };
        CountedFlow {
            cookie,
            client: ebpf::socket_address(&client).map_or_else(|| "?".to_owned(), |client| client.to_string()),
            opened: Duration::from_nanos(flow.opened_ns),
            last_activity: Duration::from_nanos(flow.last_activity_ns),
            bytes: (flow.bytes_to_backend, flow.bytes_to_client),
        }
    };
    Ok(found.into_iter().map(counted).collect())
}

/// What is told by signals.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    resized: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let watched = |kind| signal(kind).context("watch for signals");
        Ok(Self {
            terminate: watched(SignalKind::terminate())?,
            interrupt: watched(SignalKind::interrupt())?,
            hangup: watched(SignalKind::hangup())?,
            resized: watched(SignalKind::window_change())?,
        })
    }

    /// The next one. Cancel safe. The size of the terminal is asked for at each frame.
    async fn next(&mut self) -> Reaction {
        tokio::select! {
            _ = self.terminate.recv() => Reaction::Quit,
            _ = self.interrupt.recv() => Reaction::Quit,
            _ = self.hangup.recv() => Reaction::Quit,
            _ = self.resized.recv() => Reaction::Stay,
        }
    }
}

/// The keys of the terminal. (crossterm's reader never returns once the terminal has hung up.)
struct Input {
    terminal: Stdin,
    readable: Readable,
    keys: Keys,
}

impl Input {
    fn new() -> anyhow::Result<Self> {
        let terminal = io::stdin();
        let readable = Readable::new(terminal.as_fd()).context("watch the terminal's input")?;
        Ok(Self { terminal, readable, keys: Keys::default() })
    }

    /// The next keys. Cancel safe.
    async fn keys(&mut self) -> Vec<Key> {
        loop {
            let readable = self.readable.readable();
            let ready = if self.keys.is_pending() {
                match tokio::time::timeout(ESCAPE_TIME, readable).await {
                    Ok(ready) => ready,
                    Err(_elapsed) => return self.keys.flush().into_iter().collect(),
                }
            } else {
                readable.await
            };
            let Ok(mut ready) = ready else { return vec![Key::Interrupt] };
            // The terminal blocks, because others who have it open want it to: it is read only when it has something.
            let mut fds = [PollFd::new(&self.terminal, PollFlags::IN)];
            if !matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1..)) {
                ready.clear_ready();
                continue;
            }
            let mut bytes = Vec::with_capacity(INPUT_BYTES);
            match rustix::io::read(&self.terminal, spare_capacity(&mut bytes)) {
                Ok(0) | Err(_) => return vec![Key::Interrupt],
                Ok(_) => {}
            }
            let keys = self.keys.read(&bytes);
            if !keys.is_empty() {
                return keys;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_says_what_the_terminal_can() {
        let with = |set: &[(&str, &str)]| {
            let set: Vec<(String, String)> =
                set.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            abilities(move |name| set.iter().find(|(set, _)| set == name).map(|(_, value)| value.clone()))
        };
        let plain = with(&[("TERM", "vt100")]).unwrap();
        assert_eq!(plain, Abilities { colour: true, unicode: false });
        let rich = with(&[("TERM", "xterm"), ("LANG", "de_DE.UTF-8"), ("NO_COLOR", "1")]).unwrap();
        assert_eq!(rich, Abilities { colour: false, unicode: true });
        let overruled = with(&[("TERM", "xterm"), ("LANG", "C.UTF-8"), ("LC_ALL", "C")]).unwrap();
        assert!(!overruled.unicode);
        for cannot in [&[][..], &[("TERM", "dumb")]] {
            assert!(with(cannot).unwrap_err().to_string().contains("drowse status"));
        }
    }
}
