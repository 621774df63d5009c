//! Services whose drowse does not answer, as systemd sees them: those that sleep until the first connection, and those
//! of which we may ask nobody else.
//!
//! Owns: finding them, and what is said of them. Must never: start anything, or take longer than [`ASK_TIME`] for a call.
//!
//! Rests on: systemd lists the units in memory; a unit that listens or runs is there, the times of one that is not are
//! forgotten. Units that are asked for by their names are loaded; names that no unit can have are left out.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::future::join_all;

use crate::activation::Failure;
use crate::activation::systemd::manager::{Listed, Manager};
use crate::activation::systemd::{Bus, check_unit_name};
use crate::clock::{self, Monotonic, Wall};
use crate::report::control::{self, Silence};
use crate::report::counters::Counters;
use crate::report::remembered::Remembered;
use crate::report::snapshot::{
    Activation, Flows, HandoffView, Idle, PlaneView, Refused, SCHEMA, Snapshot, Source, StateName, seconds,
};
use crate::setup::contents::variable;

/// How long systemd may take to answer.
const ASK_TIME: Duration = Duration::from_secs(1);
/// How far two clocks may be apart that tell of the same moment.
const CLOCKS_APART: Duration = Duration::from_secs(3);

/// Where the services of one manager are.
#[derive(Clone, Debug)]
pub struct Place {
    /// The status sockets.
    pub directory: PathBuf,
    /// The manager; nothing if only the sockets are to be asked.
    pub manager: Option<ManagerPlace>,
}

/// One of systemd's managers.
#[derive(Clone, Debug)]
pub struct ManagerPlace {
    /// How it is reached.
    pub bus: Bus,
    /// What is there only if the manager runs.
    sign: PathBuf,
    /// Where the services' options are.
    configuration: PathBuf,
}

impl ManagerPlace {
    /// systemd itself.
    #[must_use]
    pub fn system() -> Self {
        let [sign, configuration] = ["/run/systemd/system", "/etc/drowse"].map(PathBuf::from);
        Self { bus: Bus::System, sign, configuration }
    }

    /// The user's systemd; `runtime` is `$XDG_RUNTIME_DIR`.
    #[must_use]
    pub fn user(runtime: &Path) -> Self {
        let variable =
            |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = || variable("HOME").map(|home| home.join(".config"));
        let configuration = variable("XDG_CONFIG_HOME").or_else(home).unwrap_or_default().join("drowse");
        Self { bus: Bus::User, sign: runtime.join("systemd"), configuration }
    }
}

/// drowse's units of one service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Instance {
    /// `web`, of `drowse@web.socket`.
    pub name: String,
    socket: Option<Listed>,
    service: Option<Listed>,
}

impl Instance {
    fn socket_state(&self) -> &str {
        self.socket.as_ref().map_or("inactive", |unit| unit.active_state.as_str())
    }

    /// As systemd has it, but failed while it waits for the next try of one that failed.
    fn service_state(&self) -> &str {
        match &self.service {
            Some(unit) if unit.sub_state == "auto-restart" => "failed",
            Some(unit) => &unit.active_state,
            None => "inactive",
        }
    }

    /// Whether there is something to tell of it.
    fn is_set_up(&self) -> bool {
        self.socket_state() != "inactive" || self.service_state() != "inactive"
    }
}

/// The services that one manager knows.
#[derive(Debug)]
pub struct Known {
    /// In the order of their names.
    pub instances: Vec<Instance>,
    manager: Manager,
    place: ManagerPlace,
}

/// The services of `place`; nothing if there is no such manager.
///
/// # Errors
/// It runs and cannot be asked.
pub async fn known(place: &ManagerPlace) -> Result<Option<Known>, Failure> {
    let listed = async {
        let manager = Manager::connect(place.bus.clone(), ASK_TIME).await?;
        let units = manager.matching(&["drowse@*.socket", "drowse@*.service"]).await?;
        Ok((manager, units))
    };
    match listed.await {
        Ok((manager, units)) => {
            let instances = instances(units);
            Ok(Some(Known { instances, manager, place: place.clone() }))
        }
        // sd_booted(3) goes by that directory.
        Err(_) if !place.sign.exists() => Ok(None),
        Err(failure) => Err(failure),
    }
}

fn instances(units: Vec<Listed>) -> Vec<Instance> {
    let mut all: Vec<Instance> = Vec::new();
    for unit in units {
        let Some((name, kind)) = unit.id.strip_prefix("drowse@").and_then(|name| name.rsplit_once('.'))
        else {
            continue;
        };
        let (name, is_socket) = (name.to_owned(), kind == "socket");
        let position = all.iter().position(|one| one.name == name);
        let mut instance = position.map_or_else(Instance::default, |position| all.swap_remove(position));
        instance.name = name;
        *(if is_socket { &mut instance.socket } else { &mut instance.service }) = Some(unit);
        all.push(instance);
    }
    all.retain(Instance::is_set_up);
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

impl Facts {
    /// The unit that gives the state: one of drowse's if it failed, else the backend.
    fn origin(&self) -> String {
        let name = &self.instance.name;
        match (self.instance.socket_state(), self.instance.service_state()) {
            ("failed", _) => format!("drowse@{name}.socket"),
            (_, "failed") => format!("drowse@{name}.service"),
            _ => self.unit.clone(),
        }
    }
}

/// Whether `name` is that of `unit`, with or without `.service`.
#[must_use]
pub fn is_unit(unit: &str, name: &str) -> bool {
    unit == name || unit.strip_suffix(".service") == Some(name)
}

/// What systemd says of a service, and what was kept of it.
#[derive(Clone, Debug)]
struct Facts {
    instance: Instance,
    unit: String,
    backend: String,
    plane: String,
    /// They are of the user's manager.
    user: bool,
    /// The backend; nothing if systemd does not know it.
    listed: Option<Listed>,
    /// The backend has been in memory before it was asked for: only then it may have run.
    is_in_memory: bool,
    /// When the unit that gives the state came to its own.
    changed: Option<Monotonic>,
    /// When systemd began to listen.
    listening: Option<Monotonic>,
    /// The `Result` of what failed.
    result: String,
    remembered: Option<Remembered>,
    silence: Option<Silence>,
}

impl Known {
    /// What systemd says of those `wanted`, each with the reason why its drowse does not answer, if it should. With a
    /// `name` only of that service, or of the one in front of the unit of that name.
    ///
    /// # Errors
    /// systemd cannot be asked any more.
    pub async fn tell(
        &self,
        wanted: Vec<(Instance, Option<Silence>)>,
        directory: &Path,
        name: Option<&str>,
    ) -> Result<Vec<Snapshot>, Failure> {
        let mut all: Vec<Facts> =
            wanted.into_iter().map(|(instance, silence)| self.read(instance, silence, directory)).collect();
        all.retain(|facts| name.is_none_or(|name| facts.instance.name == name || is_unit(&facts.unit, name)));
        self.list(&mut all).await?;
        join_all(all.iter_mut().map(|facts| self.ask(facts))).await;
        let (now, wall) = (clock::now(), clock::wall());
        Ok(all.iter().map(|facts| snapshot(facts, now, wall)).collect())
    }

    /// Looks at the backends. One that is not in memory is loaded: whether it can be started is in its file.
    async fn list(&self, all: &mut [Facts]) -> Result<(), Failure> {
        let mut units: Vec<String> = all.iter().map(|facts| facts.unit.clone()).collect();
        units.retain(|unit| check_unit_name(unit).is_ok());
        let patterns: Vec<String> = units.iter().map(|unit| unit.replace('\\', r"\\")).collect();
        let in_memory = if units.is_empty() { vec![] } else { self.manager.matching(&patterns).await? };
        units.retain(|unit| in_memory.iter().all(|one| one.id != *unit));
        let loaded = if units.is_empty() { vec![] } else { self.manager.units(&units).await? };
        // One that was asked for by an alias is listed by its own name, in its place, and one that cannot be is left out.
        let is_whole = loaded.len() == units.len();
        for facts in all {
            let known = in_memory.iter().find(|one| one.id == facts.unit);
            let place = units.iter().position(|unit| is_whole && *unit == facts.unit);
            let loaded =
                loaded.iter().find(|one| one.id == facts.unit).or(place.and_then(|at| loaded.get(at)));
            (facts.is_in_memory, facts.listed) = (known.is_some(), known.or(loaded).cloned());
        }
        Ok(())
    }

    fn read(&self, instance: Instance, silence: Option<Silence>, directory: &Path) -> Facts {
        let conf = self.place.configuration.join(format!("{}.conf", instance.name));
        let conf = fs::read_to_string(conf).unwrap_or_default();
        Facts {
            unit: variable(&conf, "DROWSE_UNIT").unwrap_or_else(|| format!("{}.service", instance.name)),
            backend: variable(&conf, "DROWSE_BACKEND").unwrap_or_default(),
            plane: variable(&conf, "DROWSE_PLANE")
                .filter(|plane| plane == "copy")
                .unwrap_or_else(|| "splice".into()),
            user: self.place.bus == Bus::User,
            listed: None,
            is_in_memory: false,
            changed: None,
            listening: None,
            result: String::new(),
            remembered: control::remembered_in(directory, &instance.name),
            silence,
            instance,
        }
    }

    /// Asks what is needed of one. What is not answered is unknown.
    async fn ask(&self, facts: &mut Facts) {
        let (origin, state) = (facts.origin(), state(facts).0);
        // A backend that never ran has no times, and to ask for them would load it once more.
        if origin != facts.unit || facts.is_in_memory {
            facts.changed = self.manager.time(&origin, "StateChangeTimestampMonotonic").await.unwrap_or(None);
        }
        let is_told = facts.changed.is_some()
            || facts.remembered.as_ref().is_some_and(|remembered| remembered.asleep_since_s.is_some());
        if state == StateName::Asleep && !is_told {
            let socket = format!("drowse@{}.socket", facts.instance.name);
            facts.listening =
                self.manager.time(&socket, "ActiveEnterTimestampMonotonic").await.unwrap_or(None);
        }
        if state == StateName::Failed {
            let properties = self.manager.properties(&origin).await;
            facts.result = properties.map(|properties| properties.text("Result")).unwrap_or_default();
        }
    }
}

fn snapshot(facts: &Facts, now: Monotonic, wall: Wall) -> Snapshot {
    let (state, line) = state(facts);
    let past = |at: Monotonic| now.saturating_sub(at);
    let unix = |at_s: i64| Duration::from_secs(wall.unix_s.saturating_sub(at_s).try_into().unwrap_or(0));
    let changed = facts.changed.map(past);
    let fell_asleep = facts.remembered.as_ref().and_then(|known| known.asleep_since_s).map(unix);
    let asleep = fell_asleep.or(facts.listening.map(past)).filter(|_| state == StateName::Asleep);
    // Somebody else may have run it since.
    let is_last = match (changed, fell_asleep) {
        (Some(changed), Some(asleep)) => changed.abs_diff(asleep) <= CLOCKS_APART,
        (None, Some(_)) => true,
        (_, None) => false,
    };
    let remembered = facts.remembered.as_ref();
    Snapshot {
        schema: SCHEMA,
        name: facts.instance.name.clone(),
        unit: Some(facts.unit.clone()),
        backend: facts.backend.clone(),
        pid: 0,
        source: Source::Systemd,
        state,
        since_s: changed.or(asleep).map(seconds),
        line,
        held: 0,
        refused: Refused::default(),
        connections_max: 0,
        flows: Flows::default(),
        bytes_to_backend: 0,
        bytes_to_client: 0,
        idle: Idle::default(),
        memory_bytes: None,
        memory_saved_bytes: remembered
            .and_then(|known| known.saved_bytes)
            .filter(|_| is_last && state == StateName::Asleep),
        last_activation: remembered.and_then(|known| Some(Activation::past(known.last_activation?, wall))),
        today: remembered.map(|known| known.today(wall)),
        activations_total: 0,
        failures_total: 0,
        last_failure: None,
        plane: PlaneView { forward: facts.plane.clone(), reason: None, handoff: HandoffView::default() },
        counters: Counters::default(),
    }
}

/// The state, and the line for people.
fn state(facts: &Facts) -> (StateName, String) {
    let (name, unit) = (&facts.instance.name, &facts.unit);
    let result = match facts.result.as_str() {
        "" | "success" => String::new(),
        result => format!(" (result {result})"),
    };
    let user = if facts.user { "--user " } else { "" };
    let failed = |words: String| (StateName::Failed, format!("failed: {words}"));
    let drowse_runs =
        matches!(facts.instance.service_state(), "active" | "activating" | "reloading" | "deactivating");
    match (facts.instance.socket_state(), facts.instance.service_state()) {
        ("failed", _) => {
            return failed(format!(
                "nobody listens, drowse@{name}.socket failed{result}; see: systemctl {user}status drowse@{name}.socket"
            ));
        }
        (_, "failed") => {
            return failed(format!(
                "drowse itself does not start{result}; see: journalctl {user}-u drowse@{name}.service"
            ));
        }
        _ => {}
    }
    let active = facts.listed.as_ref().map_or("inactive", |unit| unit.active_state.as_str());
    let load = facts.listed.as_ref().map_or("loaded", |unit| unit.load_state.as_str());
    if load != "loaded" {
        return failed(format!("{unit} cannot be started ({load}); see: systemctl {user}status {unit}"));
    }
    let state = match active {
        "active" | "reloading" | "refreshing" => StateName::Awake,
        "activating" => StateName::Waking,
        "deactivating" => StateName::Stopping,
        "failed" => StateName::Failed,
        _ => StateName::Asleep,
    };
    let words = match (&facts.silence, state) {
        (Some(silence), _) if drowse_runs => format!("{silence}; systemd says that {unit} is {active}"),
        (None, _) if drowse_runs => {
            format!("its drowse has no status socket; systemd says that {unit} is {active}")
        }
        (_, StateName::Asleep) => format!("systemd holds the socket; the next connection wakes {unit}"),
        (_, StateName::Failed) => {
            format!("{unit} failed when it last ran{result}; the next connection tries again")
        }
        _ => format!(
            "{unit} is {active} without drowse, which starts with the next connection and then watches it"
        ),
    };
    (state, format!("{}: {words}", state.word()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::remembered::PastActivation;

    fn listed(id: &str, active_state: &str) -> Listed {
        let [load_state, sub_state] = ["loaded", "x"].map(str::to_owned);
        Listed { id: id.to_owned(), load_state, active_state: active_state.to_owned(), sub_state }
    }

    fn facts(socket: &str, service: &str, backend: &str) -> Facts {
        let units = vec![listed("drowse@web.service", service), listed("drowse@web.socket", socket)];
        Facts {
            instance: instances(units).pop().unwrap(),
            unit: "web.service".into(),
            backend: ":8081".into(),
            plane: "splice".into(),
            user: false,
            listed: Some(listed("web.service", backend)),
            is_in_memory: true,
            changed: Some(Duration::from_secs(100)),
            listening: None,
            result: "exit-code".into(),
            remembered: None,
            silence: None,
        }
    }

    fn told(facts: &Facts) -> Snapshot {
        snapshot(facts, Duration::from_secs(160), Wall { unix_s: 1000, midnight_s: 0 })
    }

    #[test]
    fn units_are_sorted_into_services() {
        let units = vec![
            listed("drowse@b.socket", "active"),
            listed("drowse@a@1.socket", "active"),
            listed("drowse@b.service", "active"),
            listed("drowse@gone.socket", "inactive"),
        ];
        let found = instances(units);
        let names: Vec<_> = found.iter().map(|instance| instance.name.as_str()).collect();
        assert_eq!(names, ["a@1", "b"]);
        assert_eq!((found[1].service_state(), found[0].service_state()), ("active", "inactive"));
        let waits = Listed { sub_state: "auto-restart".into(), ..listed("drowse@c.service", "activating") };
        assert_eq!(instances(vec![waits])[0].service_state(), "failed");
    }

    #[test]
    fn the_state_has_one_origin() {
        for (socket, service, origin) in [
            ("failed", "failed", "drowse@web.socket"),
            ("active", "failed", "drowse@web.service"),
            ("active", "inactive", "web.service"),
        ] {
            assert_eq!(facts(socket, service, "failed").origin(), origin);
        }
    }

    #[test]
    fn each_state_is_told_in_plain_words() {
        let cases = [
            (("active", "inactive", "inactive"), StateName::Asleep, "the next connection wakes web.service"),
            (("active", "inactive", "active"), StateName::Awake, "active without drowse"),
            (
                ("active", "inactive", "failed"),
                StateName::Failed,
                "failed when it last ran (result exit-code)",
            ),
            (
                ("failed", "inactive", "inactive"),
                StateName::Failed,
                "nobody listens, drowse@web.socket failed",
            ),
            (
                ("active", "failed", "active"),
                StateName::Failed,
                "drowse itself does not start (result exit-code)",
            ),
            (("active", "active", "inactive"), StateName::Asleep, "no status socket"),
        ];
        for ((socket, service, backend), state, words) in cases {
            let told = told(&facts(socket, service, backend));
            assert_eq!((told.state, told.source, told.pid), (state, Source::Systemd, 0), "{told:?}");
            assert!(told.line.starts_with(state.word()) && told.line.contains(words), "{}", told.line);
        }
        let silence = Some(Silence::NotPermitted);
        let kept_out = told(&Facts { silence, ..facts("active", "active", "active") });
        assert!(
            kept_out.line.contains("not permitted") && kept_out.line.ends_with("web.service is active"),
            "{}",
            kept_out.line
        );
        let missing = Listed { load_state: "masked".into(), ..listed("web.service", "inactive") };
        let masked = snapshot(
            &Facts { listed: Some(missing), ..facts("active", "inactive", "inactive") },
            Duration::ZERO,
            Wall::default(),
        );
        assert_eq!(
            masked.line,
            "failed: web.service cannot be started (masked); see: systemctl status web.service"
        );
        for (socket, service, says) in [
            ("failed", "inactive", "systemctl --user status drowse@web.socket"),
            ("active", "failed", "journalctl --user -u drowse@web.service"),
        ] {
            let users = told(&Facts { user: true, ..facts(socket, service, "inactive") });
            assert!(users.line.ends_with(says), "{}", users.line);
        }
        let unloaded = told(&Facts { listed: None, ..facts("active", "inactive", "inactive") });
        assert_eq!(unloaded.state, StateName::Asleep);
    }

    #[test]
    fn what_was_kept_is_told_unless_somebody_else_ran_it_since() {
        let remembered = Remembered {
            activations: 2,
            last_activation: Some(PastActivation { took_s: 0.25, at_s: 900 }),
            asleep_since_s: Some(940),
            saved_bytes: Some(5 << 20),
            ..Remembered::default()
        };
        let asleep = Facts { remembered: Some(remembered), ..facts("active", "inactive", "inactive") };
        let snapshot = told(&asleep);
        assert_eq!(snapshot.since_s, Some(60.0));
        assert_eq!(snapshot.memory_saved_bytes, Some(5 << 20));
        assert_eq!(snapshot.last_activation, Some(Activation { took_s: 0.25, ago_s: 100.0 }));
        assert_eq!(snapshot.today.map(|today| today.activations), Some(2));
        let since = Facts { changed: Some(Duration::from_secs(150)), ..asleep.clone() };
        assert_eq!(told(&since).memory_saved_bytes, None);
        let forgotten = told(&Facts { changed: None, ..asleep.clone() });
        assert!(forgotten.since_s == Some(60.0) && forgotten.memory_saved_bytes.is_some());
        let masked = Listed { load_state: "masked".into(), ..listed("web.service", "inactive") };
        let masked = told(&Facts { changed: None, listed: Some(masked), ..asleep });
        assert_eq!((masked.state, masked.since_s), (StateName::Failed, None), "made up");
    }
}
