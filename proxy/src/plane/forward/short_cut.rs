//! A direction whose peer sends straight to the target, as long as it may; what it does not, comes here as ever.
//!
//! Owns: when the short cut is opened anew, and when it is closed for good. Must never: ask for it while anything that was
//! received is not written to the target, or leave it open when the flow ends.
//! Rests on: `proxy-ebpf/src/ends.rs`, for the order of bytes. No answer needs to be waited for: "not yet" means that bytes
//! or an end are on their way here, and these are an event; or that the target has no room, and then the next bytes pass.

use drowse_ebpf::{Direction as Progress, Renewal};

use super::direction::{Direction, End, Tools};
use super::redirected;
use crate::clock::Monotonic;
use crate::plane::sockmap::Renewed;

/// What we know of the short cut of a direction.
#[derive(Debug, Default)]
pub(super) struct ShortCut {
    /// There is none.
    never: bool,
    /// What is asked about the peer, once it is known.
    question: Option<Renewal>,
    /// The peer is in the kernel's map of peers, and stays there.
    entered: bool,
    /// There is no reason to open it anew.
    fresh: bool,
}

impl ShortCut {
    /// The key of the direction's counters, once there are such.
    pub(super) fn source(&self) -> Option<u64> {
        self.question.map(|question| question.source)
    }

    /// Whether the peer sends, or sent, straight to the target.
    pub(super) fn was_opened(&self) -> bool {
        self.entered
    }

    /// It must be opened anew: the worker wrote bytes to the target, which the peer sent the ordinary way, or the kernel asks
    /// for it.
    pub(super) fn expire(&mut self) {
        self.fresh = false;
    }
}

impl Direction {
    /// Lets the peer of `from` send straight to `to`, if it can. Nothing that was received may wait. Returns whether this
    /// direction is moved like that, now or later.
    pub(super) fn cut_short(&mut self, from: &mut End, to: &mut End, tools: &mut Tools) -> bool {
        let Some(redirector) = tools.redirector.as_mut().filter(|redirector| redirector.cuts_short()) else {
            return false;
        };
        if self.short_cut.never || self.is_redirected() {
            return false;
        }
        if self.short_cut.fresh || self.ended || !self.is_flushed() || from.eager || from.reset || to.reset {
            return true;
        }
        if self.short_cut.question.is_none() {
            if redirected::join(from, to, redirector) {
                let direction = Progress {
                    target: to.cookie,
                    token: from.token,
                    to_client: u32::from(to.is_client),
                    ..Progress::default()
                };
                self.short_cut.question = redirector.find_peer(&from.socket, from.cookie, direction);
            }
            if self.short_cut.question.is_none() {
                self.short_cut.never = true;
                return false;
            }
        }
        let Some(question) = &mut self.short_cut.question else { return false };
        match redirector.renew(question) {
            Renewed::Open => {
                self.short_cut.entered = true;
                self.short_cut.fresh = true;
            }
            Renewed::NotYet => {}
            Renewed::Never => {
                self.close_short_cut(tools);
                self.short_cut.never = true;
                return false;
            }
        }
        true
    }

    /// Whether the kernel moves bytes of this direction.
    pub(super) fn is_in_kernel(&self) -> bool {
        self.is_redirected() || self.short_cut.was_opened()
    }

    /// Closes the short cut: from now on everything that the peer sends comes to us. Returns when the kernel last moved a byte of it.
    pub(super) fn close_short_cut(&mut self, tools: &mut Tools) -> Option<Monotonic> {
        self.short_cut.fresh = false;
        let question = self.short_cut.question.take()?;
        let source = question.source;
        let redirector = tools.redirector.as_mut()?;
        if self.short_cut.entered {
            redirector.stop_peer(&question);
        }
        let progress = redirector.progress(source);
        redirector.forget(source);
        progress.map(|progress| Monotonic::from_nanos(progress.last_activity_ns))
    }
}
