//! The busy command: somebody else's veto on putting the backend to sleep.
//!
//! Owns: the command's process group, which ends when nobody waits for the answer any more. Must never: decide what an
//! answer leads to; `lifecycle` does.

use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::Command;
use tracing::warn;

/// How long the busy command may run; one that does not answer counts as busy.
const BUSY_COMMAND_TIME: Duration = Duration::from_secs(30);

/// Asks the busy command. Whatever is no clear "not busy" is busy: a check that fails must not stop a service.
pub async fn is_busy(command: Option<String>) -> bool {
    let Some(command) = command else { return false };
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(&command).stdin(Stdio::null()).kill_on_drop(true).process_group(0);
    let answer = async {
        let mut child = shell.spawn()?;
        let group = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        let unanswered = KillOnDrop(group);
        let status = child.wait().await;
        // It may leave a process behind on purpose once it has answered.
        unanswered.answered();
        status
    };
    match tokio::time::timeout(BUSY_COMMAND_TIME, answer).await {
        Ok(Ok(status)) if status.code() == Some(1) => false,
        Ok(Ok(status)) if status.success() => true,
        Ok(Ok(status)) => {
            warn!("busy command '{command}' ended with {status}: counts as busy (0 is busy, 1 is not)");
            true
        }
        Ok(Err(error)) => {
            warn!("busy command '{command}' cannot be run: {error}: counts as busy");
            true
        }
        Err(_elapsed) => {
            warn!("busy command '{command}' took longer than {BUSY_COMMAND_TIME:?}: counts as busy");
            true
        }
    }
}

/// Ends a process group that nobody waits for any more.
struct KillOnDrop(Option<Pid>);

impl KillOnDrop {
    fn answered(mut self) {
        self.0 = None;
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _gone_already = kill_process_group(group, Signal::KILL);
        }
    }
}
