//! What systemd says of a unit, in our words.
//!
//! Owns: the rules for unit names, object paths and states, and the line that people read after a failure.
//! Must never: do I/O. Rests on systemd's `unit-name.c` (names), `bus-label.c` (escapes), `unit-def.c` (states)
//! and `job.c` (job results).

use std::fmt::Write as _;

use super::Bus;
use crate::activation::{BackendState, Failure};

/// The name of a unit that can be a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unit {
    /// The name as it was given; may be an alias.
    pub(super) name: String,
    /// It is a service; else it is a target.
    pub(super) is_service: bool,
    user: bool,
}

impl Unit {
    /// Takes a name that systemd would accept and whose unit can be a backend: a service, or a target that groups
    /// services. Nothing else runs a process that it starts and stops itself: sockets, timers, paths and
    /// automounts start other units, slices and scopes hold processes that somebody else started.
    pub(super) fn parse(name: &str, bus: &Bus) -> Result<Self, Failure> {
        let invalid = |what: &str| Failure::new("invalid-name", format!("{name:?} {what}"));
        let allowed = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
        let Some((stem, kind)) = name.rsplit_once('.') else {
            return Err(invalid(&format!("is not a unit name: write its type too, e.g. {name}.service")));
        };
        if stem.is_empty() || name.len() > 255 || !name.chars().all(allowed) || stem.starts_with('@') {
            return Err(invalid(
                "is not a unit name: see systemd-escape(1) for paths and special characters",
            ));
        }
        if !matches!(kind, "service" | "target") {
            return Err(invalid(
                "cannot be a backend: name the .service (or .target) that should sleep and wake",
            ));
        }
        if stem.ends_with('@') {
            return Err(invalid(&format!("is a template: name an instance, e.g. {stem}main.{kind}")));
        }
        Ok(Self { name: name.to_owned(), is_service: kind == "service", user: matches!(bus, Bus::User) })
    }

    /// `--user` with a leading space, or nothing: goes after `systemctl` and `journalctl`.
    fn user_flag(&self) -> &'static str {
        if self.user { " --user" } else { "" }
    }

    /// The failure of a start job that ended with `result`, which is none of `done` and `failed`.
    pub(super) fn start_job_failed(&self, result: &str) -> Failure {
        let name = &self.name;
        let user = self.user_flag();
        let what = match result {
            "canceled" => {
                "the start was canceled: somebody else stopped the unit or queued another job".to_owned()
            }
            "timeout" => "the start job timed out (JobTimeoutSec=)".to_owned(),
            "dependency" => {
                format!("a unit that it needs failed; see: systemctl{user} list-dependencies {name}")
            }
            "skipped" => "the start was skipped: an ExecCondition= of the unit does not hold".to_owned(),
            "assert" => "an Assert...= of the unit does not hold".to_owned(),
            "unsupported" => "units of this type are not supported on this system".to_owned(),
            "once" => "the unit runs only once a boot and has run".to_owned(),
            "frozen" => format!("the unit is frozen; run: systemctl{user} thaw {name}"),
            other => format!("the start job ended with `{other}`"),
        };
        Failure::new(result, format!("cannot start {name}: {what}; see: journalctl{user} -u {name}"))
    }

    /// The failure of a stop job that ended with `result`, which is not `done`, while the unit is up.
    pub(super) fn stop_job_failed(&self, result: &str) -> Failure {
        let what = match result {
            "canceled" => "somebody else started it again".to_owned(),
            other => format!("the stop job ended with `{other}`"),
        };
        Failure::new(result, format!("cannot stop {}: {what}", self.name))
    }

    /// The unit's job ended well but the unit is down again.
    pub(super) fn ended_at_once(&self, condition_holds: bool) -> Failure {
        let (name, user) = (&self.name, self.user_flag());
        if condition_holds {
            let message = format!(
                "{name} ended right after its start; a backend must stay active (Type=oneshot needs \
                 RemainAfterExit=yes), and its Condition...= must hold; see: journalctl{user} -u {name}"
            );
            Failure::new("ended", message)
        } else {
            let message = format!(
                "{name} was not started: a Condition...= of the unit does not hold; see: systemctl{user} status {name}"
            );
            Failure::new("condition", message)
        }
    }

    /// The unit is in the state `failed`; what its own properties say of that.
    pub(super) fn failed(&self, end: &End) -> Failure {
        let (name, user) = (&self.name, self.user_flag());
        let main = end.main_process();
        let what = match (end.result.as_str(), main) {
            ("exit-code" | "signal" | "core-dump", None) => {
                "a command before the main process failed (ExecStartPre= or the like)".to_owned()
            }
            ("timeout", _) => "it exceeded a time limit of the unit (TimeoutStartSec=, TimeoutStopSec= ...)".to_owned(),
            ("watchdog", _) => "it missed its watchdog (WatchdogSec=)".to_owned(),
            ("oom-kill", _) => "it ran out of memory".to_owned(),
            ("resources", _) => "systemd could not set it up: a file, user or resource is missing".to_owned(),
            ("protocol", _) => "it did not do what its Type= promises (READY=1, PID file, bus name)".to_owned(),
            ("start-limit-hit", _) => {
                "it was started too often in a short time (StartLimitBurst=); drowse resets that count before its \
                 next try"
                    .to_owned()
            }
            (_, Some(main)) => main,
            (_, None) => "the unit is in the state failed".to_owned(),
        };
        let result =
            if matches!(end.result.as_str(), "" | "success") { "failed" } else { end.result.as_str() };
        Failure::new(result, format!("{name} failed: {what} ({result}); see: journalctl{user} -u {name}"))
    }

    /// The unit is not `loaded`: what to do about it. `error` is the unit's own `LoadError`.
    pub(super) fn not_loaded(&self, load_state: &str, error: &str) -> Failure {
        let (name, user) = (&self.name, self.user_flag());
        let message = match load_state {
            "not-found" => format!(
                "unit {name} does not exist: check the name with systemctl{user} list-unit-files, or run systemctl{user} daemon-reload after writing it"
            ),
            "masked" => format!("{name} is masked and cannot be started; run: systemctl{user} unmask {name}"),
            other => {
                let mut message = format!("{name} cannot be loaded ({other})");
                if !error.is_empty() {
                    // Writing to a String cannot fail.
                    let _ = write!(message, ": {}", error.trim_end_matches('.'));
                }
                let _ = write!(message, "; see: systemctl{user} status {name}");
                message
            }
        };
        Failure::new(load_state, message)
    }

    /// We may not do `verb` ("start", "stop") to the unit.
    pub(super) fn denied(&self, verb: &str, detail: &str) -> Failure {
        let message = format!(
            "not allowed to {verb} {}: run as root or add a polkit rule for org.freedesktop.systemd1.manage-units \
             (see polkit(8)): {detail}",
            self.name
        );
        Failure::new("denied", message)
    }
}

/// How a unit came to be `failed`: properties of `org.freedesktop.systemd1.Service`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct End {
    /// `Result`.
    pub(super) result: String,
    /// `ExecMainCode`: `si_code` of waitid(2); zero while no main process has ended.
    pub(super) main_code: i32,
    /// `ExecMainStatus`: exit status or signal number.
    pub(super) main_status: i32,
}

impl End {
    fn main_process(&self) -> Option<String> {
        let status = self.main_status;
        // CLD_EXITED, CLD_KILLED, CLD_DUMPED of <bits/siginfo-consts.h>.
        match self.main_code {
            1 => Some(format!("main process exited with status {status}")),
            2 => Some(format!("main process was killed by signal {status}")),
            3 => Some(format!("main process dumped core on signal {status}")),
            _ => None,
        }
    }
}

/// A unit's `ActiveState`, as far as we tell its values apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ActiveState {
    /// `active`, `reloading`, `refreshing`.
    Active,
    /// `activating`, also while it waits for its automatic restart.
    Activating,
    /// `deactivating`.
    Deactivating,
    /// `inactive`, `maintenance`, and what a later systemd may add.
    Inactive,
    /// `failed`.
    Failed,
}

impl ActiveState {
    pub(super) fn parse(state: &str) -> Self {
        match state {
            "active" | "reloading" | "refreshing" => Self::Active,
            "activating" => Self::Activating,
            "deactivating" => Self::Deactivating,
            "failed" => Self::Failed,
            _ => Self::Inactive,
        }
    }

    pub(super) fn backend_state(self) -> BackendState {
        match self {
            Self::Active | Self::Activating => BackendState::Up,
            Self::Deactivating => BackendState::GoingDown,
            Self::Inactive | Self::Failed => BackendState::Down,
        }
    }

    pub(super) fn is_down(self) -> bool {
        self.backend_state() == BackendState::Down
    }
}

/// The object path of a unit, by systemd's rule: every byte but `[A-Za-z0-9]` becomes `_` and two hex digits, a
/// leading digit too.
pub(super) fn object_path(name: &str) -> String {
    let mut path = String::from("/org/freedesktop/systemd1/unit/");
    for (index, byte) in name.bytes().enumerate() {
        if byte.is_ascii_alphabetic() || (index > 0 && byte.is_ascii_digit()) {
            path.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(path, "_{byte:02x}");
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dice() -> Unit {
        Unit::parse("dice.service", &Bus::System).unwrap()
    }

    #[test]
    fn names_that_cannot_be_a_backend_are_refused_with_the_next_step() {
        for (name, says) in [
            ("dice", "dice.service"),
            ("", "unit name"),
            (".service", "unit name"),
            ("@x.service", "unit name"),
            ("a b.service", "systemd-escape"),
            ("dice',arg0='x.service", "systemd-escape"),
            ("dice.socket", "name the .service"),
            ("user.slice", "name the .service"),
            ("dice@.service", "dice@main.service"),
        ] {
            let failure = Unit::parse(name, &Bus::System).unwrap_err();
            assert_eq!(failure.result, "invalid-name");
            assert!(failure.message.contains(says), "{name}: {failure}");
        }
        assert!(Unit::parse(&format!("{}.service", "a".repeat(248)), &Bus::System).is_err());
        for name in ["dice.service", "dice@a.service", "x-y_z:1.target", "a\\x2db.service"] {
            assert!(Unit::parse(name, &Bus::System).is_ok(), "{name}");
        }
    }

    #[test]
    fn object_paths_are_escaped_as_systemd_does() {
        assert_eq!(object_path("dice.service"), "/org/freedesktop/systemd1/unit/dice_2eservice");
        assert_eq!(object_path("1a@x-2.service"), "/org/freedesktop/systemd1/unit/_31a_40x_2d2_2eservice");
    }

    #[test]
    fn states_map_to_the_backend_state() {
        for (state, backend) in [
            ("active", BackendState::Up),
            ("reloading", BackendState::Up),
            ("refreshing", BackendState::Up),
            ("activating", BackendState::Up),
            ("deactivating", BackendState::GoingDown),
            ("inactive", BackendState::Down),
            ("failed", BackendState::Down),
            ("maintenance", BackendState::Down),
        ] {
            assert_eq!(ActiveState::parse(state).backend_state(), backend, "{state}");
        }
    }

    #[test]
    fn a_failed_unit_says_how_its_main_process_ended() {
        let end =
            |result: &str, main_code, main_status| End { result: result.to_owned(), main_code, main_status };
        let failure = dice().failed(&end("exit-code", 1, 3));
        assert_eq!(
            failure.message,
            "dice.service failed: main process exited with status 3 (exit-code); see: journalctl -u dice.service"
        );
        assert_eq!(failure.result, "exit-code");
        assert!(dice().failed(&end("signal", 2, 9)).message.contains("killed by signal 9"));
        assert!(dice().failed(&end("exit-code", 0, 0)).message.contains("ExecStartPre="));
        assert!(dice().failed(&end("start-limit-hit", 1, 1)).message.contains("StartLimitBurst="));
        assert_eq!(dice().failed(&End::default()).result, "failed");
    }

    #[test]
    fn the_user_manager_is_named_in_what_to_run() {
        let unit = Unit::parse("dice.service", &Bus::User).unwrap();
        assert!(unit.not_loaded("masked", "").message.ends_with("run: systemctl --user unmask dice.service"));
        assert!(unit.start_job_failed("dependency").message.contains("systemctl --user list-dependencies"));
        let failure = dice().not_loaded("bad-setting", "Unit dice.service has a bad unit file setting.");
        assert_eq!(failure.result, "bad-setting");
        assert!(
            failure.message.contains("bad unit file setting; see: systemctl status dice.service"),
            "{failure}"
        );
    }
}
