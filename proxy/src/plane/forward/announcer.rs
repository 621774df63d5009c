//! The thread that hears of directions that begin to pass, and tells the worker whose they are.
//!
//! Owns: the one reader of the ring buffer. Must never: touch a flow.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use tracing::error;

use super::{Command, Token, wake};
use crate::plane::sockmap::Announcements;

/// A worker's inbox: its commands, and what wakes it.
type Worker = (Sender<Command>, Arc<OwnedFd>);

/// The eventfd's mark among the events.
const END: u64 = 1;

/// The thread. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Announcer {
    end: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Announcer {
    /// Starts the thread.
    pub(super) fn start(mut announcements: Announcements, workers: Vec<Worker>) -> io::Result<Self> {
        let end = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &announcements, EventData::new_u64(0), EventFlags::IN)?;
        epoll::add(&epoll, &end, EventData::new_u64(END), EventFlags::IN)?;
        let announce = move || {
            let mut events = Vec::with_capacity(2);
            loop {
                while let Some(token) = announcements.take().map(Token) {
                    if let Some((commands, eventfd)) = workers.get(token.worker())
                        && commands.send(Command::Passing(token)).is_ok()
                    {
                        wake(eventfd);
                    }
                }
                events.clear();
                match epoll::wait(&epoll, spare_capacity(&mut events), None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(errno) => {
                        error!("cannot hear of bytes that the kernel passes: {errno}");
                        return;
                    }
                }
                let is_end = |event: &epoll::Event| {
                    let data = event.data;
                    data.u64() == END
                };
                if events.iter().any(is_end) {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("forward-news".to_owned()).spawn(announce)?;
        Ok(Self { end, thread: Some(thread) })
    }
}

impl Drop for Announcer {
    fn drop(&mut self) {
        wake(&self.end);
        if let Some(thread) = self.thread.take() {
            // It does not panic.
            let _ = thread.join();
        }
    }
}
