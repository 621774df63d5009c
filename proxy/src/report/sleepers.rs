//! Services whose drowse does not answer, as systemd sees them: those that sleep until the first connection, and those
//! of which we may ask nobody else.
//!
//! Owns: finding them, and what is said of them. Must never: start anything, or take longer than [`ASK_TIME`] for a call.
//!
//! Rests on: systemd lists the units in memory; a unit that listens or runs is there, the times of one that is not are
//! forgotten.

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

/// What systemd says of a service, and what was kept of it.
#[derive(Clone, Debug)]
struct Facts {
    instance: Instance,
    unit: String,
    backend: String,
    plane: String,
    /// The backend; nothing if it is not in memory, so that it does not run.
    listed: Option<Listed>,
    /// When the backend came to its state.
    changed: Option<Monotonic>,
    /// When systemd began to listen.
    listening: Option<Monotonic>,
    /// The `Result` of what failed.
    result: String,
    remembered: Option<Remembered>,
    silence: Option<Silence>,
}

impl Known {
    /// What systemd says of those `wanted`, each with the reason why its drowse does not answer, if it should.
    ///
    /// # Errors
    /// systemd cannot be asked any more.
    pub async fn tell(
        &self,
        wanted: Vec<(Instance, Option<Silence>)>,
        directory: &Path,
    ) -> Result<Vec<Snapshot>, Failure> {
        let mut all: Vec<Facts> =
            wanted.into_iter().map(|(instance, silence)| self.read(instance, silence, directory)).collect();
        let names: Vec<String> = all
            .iter()
            .map(|facts| &facts.unit)
            .filter(|unit| check_unit_name(unit).is_ok())
            .cloned()
            .collect();
        // To load many units takes longer than all the rest: only one alone is looked at so closely.
        let listed = if names.len() == 1 {
            self.manager.units(&names).await?
        } else {
            let patterns: Vec<String> = names.iter().map(|name| name.replace('\\', r"\\")).collect();
            self.manager.matching(&patterns).await?
        };
        for facts in &mut all {
            facts.listed = listed.iter().find(|unit| unit.id == facts.unit || names.len() == 1).cloned();
        }
        join_all(all.iter_mut().map(|facts| self.ask(facts))).await;
        let (now, wall) = (clock::now(), clock::wall());
        Ok(all.iter().map(|facts| snapshot(facts, now, wall)).collect())
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
            listed: None,
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
        let Instance { name, .. } = &facts.instance;
        if facts.listed.is_some() {
            facts.changed =
                self.manager.time(&facts.unit, "StateChangeTimestampMonotonic").await.unwrap_or(None);
        }
        let is_told = facts.changed.is_some()
            || facts.remembered.as_ref().is_some_and(|remembered| remembered.asleep_since_s.is_some());
        if !is_told {
            let socket = format!("drowse@{name}.socket");
            facts.listening =
                self.manager.time(&socket, "ActiveEnterTimestampMonotonic").await.unwrap_or(None);
        }
        let backend_failed = facts.listed.as_ref().is_some_and(|unit| unit.active_state == "failed");
        let failed = match (facts.instance.socket_state(), facts.instance.service_state()) {
            ("failed", _) => format!("drowse@{name}.socket"),
            (_, "failed") => format!("drowse@{name}.service"),
            _ if backend_failed => facts.unit.clone(),
            _ => return,
        };
        let properties = self.manager.properties(&failed).await;
        facts.result = properties.map(|properties| properties.text("Result")).unwrap_or_default();
    }
}

fn snapshot(facts: &Facts, now: Monotonic, wall: Wall) -> Snapshot {
    let (state, line) = state(facts);
    let past = |at: Monotonic| now.saturating_sub(at);
    let unix = |at_s: i64| Duration::from_secs(wall.unix_s.saturating_sub(at_s).try_into().unwrap_or(0));
    let changed = facts.changed.map(past);
    let fell_asleep = facts.remembered.as_ref().and_then(|known| known.asleep_since_s).map(unix);
    let since = changed.or(fell_asleep).or(facts.listening.map(past)).unwrap_or_default();
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
        since_s: seconds(since),
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
        plane: PlaneView { forward: facts.plane.clone(), handoff: HandoffView::default() },
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
    let failed = |words: String| (StateName::Failed, format!("failed: {words}"));
    let drowse_runs =
        matches!(facts.instance.service_state(), "active" | "activating" | "reloading" | "deactivating");
    match (facts.instance.socket_state(), facts.instance.service_state()) {
        ("failed", _) => {
            return failed(format!(
                "nobody listens, drowse@{name}.socket failed{result}; see: systemctl status drowse@{name}.socket"
            ));
        }
        (_, "failed") => {
            return failed(format!(
                "drowse itself does not start{result}; see: journalctl -u drowse@{name}.service"
            ));
        }
        _ => {}
    }
    let active = facts.listed.as_ref().map_or("inactive", |unit| unit.active_state.as_str());
    let load = facts.listed.as_ref().map_or("loaded", |unit| unit.load_state.as_str());
    if load != "loaded" {
        return failed(format!("{unit} cannot be started ({load}); see: systemctl status {unit}"));
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
            listed: Some(listed("web.service", backend)),
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
        assert!((snapshot.since_s - 60.0).abs() < 1e-9);
        assert_eq!(snapshot.memory_saved_bytes, Some(5 << 20));
        assert_eq!(snapshot.last_activation, Some(Activation { took_s: 0.25, ago_s: 100.0 }));
        assert_eq!(snapshot.today.map(|today| today.activations), Some(2));
        let since = Facts { changed: Some(Duration::from_secs(150)), ..asleep.clone() };
        assert_eq!(told(&since).memory_saved_bytes, None);
        let forgotten = told(&Facts { changed: None, ..asleep });
        assert!((forgotten.since_s - 60.0).abs() < 1e-9 && forgotten.memory_saved_bytes.is_some());
    }
}
