//! What `drowse top` shows: the services as they answered, their rates, and what was chosen with the keys.
//!
//! PURE. Owns: rates, order, filter, selection. Must never: ask anybody, read a clock, or draw.

use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crate::clock::Monotonic;
use crate::report::control::{Service, Silence};
use crate::report::snapshot::{Snapshot, StateName};
use crate::report::top::keys::Key;

/// The rates that are remembered for the picture of a service's traffic.
pub const HISTORY_MAX: usize = 120;
/// How far a page up or down goes.
const PAGE: usize = 10;
/// The longest filter, in characters.
const FILTER_MAX: usize = 40;

/// Which service: the name of its socket, and which of those of that name, because there are two directories.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Id {
    file_name: String,
    nth: usize,
}

/// Bytes in a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// From clients to the backend.
    pub to_backend: u64,
    /// From the backend to clients.
    pub to_client: u64,
}

impl Rates {
    /// Both ways.
    #[must_use]
    pub fn sum(self) -> u64 {
        self.to_backend.saturating_add(self.to_client)
    }

    /// Between two readings, `time` apart. `None`: the counters began anew, or no time has passed.
    fn between(before: (u64, u64), after: (u64, u64), time: Duration) -> Option<Self> {
        let rate = |before: u64, after: u64| {
            let bytes = u128::from(after.checked_sub(before)?);
            let in_a_second = (bytes * Duration::from_secs(1).as_nanos()).checked_div(time.as_nanos())?;
            Some(u64::try_from(in_a_second).unwrap_or(u64::MAX))
        };
        Some(Self { to_backend: rate(before.0, after.0)?, to_client: rate(before.1, after.1)? })
    }
}

/// A service that is watched.
#[derive(Clone, Debug)]
pub struct Watched {
    /// Which one.
    pub id: Id,
    /// Its name.
    pub name: String,
    /// What it said last.
    pub answer: Result<Snapshot, Silence>,
    /// What moves. `None`: it was asked once only.
    pub rates: Option<Rates>,
    /// Both ways added up, the latest last.
    pub history: VecDeque<u64>,
    /// The process and its counters at the last answer, and when that was.
    before: Option<(u32, (u64, u64), Monotonic)>,
}

impl Watched {
    /// Takes an answer in.
    fn hear(&mut self, service: Service, now: Monotonic) {
        service.name().clone_into(&mut self.name);
        self.rates = None;
        let heard = service
            .answer
            .as_ref()
            .ok()
            .map(|snapshot| (snapshot.pid, (snapshot.bytes_to_backend, snapshot.bytes_to_client), now));
        if let (Some((pid, bytes, at)), Some((before_pid, before, since))) = (heard, self.before)
            && pid == before_pid
        {
            self.rates = Rates::between(before, bytes, at.saturating_sub(since));
        }
        self.before = heard;
        self.history.push_back(self.rates.map_or(0, Rates::sum));
        if self.history.len() > HISTORY_MAX {
            self.history.pop_front();
        }
        self.answer = service.answer;
    }

    fn snapshot(&self) -> Option<&Snapshot> {
        self.answer.as_ref().ok()
    }
}

/// What the services are ordered by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    /// Their names.
    #[default]
    Name,
    /// What is awake first.
    State,
    /// Who sleeps soonest first.
    Sleeps,
    /// Most open flows first.
    Flows,
    /// Most waiting clients first.
    Held,
    /// Most bytes to the backend first.
    ToBackend,
    /// Most bytes to clients first.
    ToClient,
}

impl Sort {
    fn next(self) -> Self {
        match self {
            Self::Name => Self::State,
            Self::State => Self::Sleeps,
            Self::Sleeps => Self::Flows,
            Self::Flows => Self::Held,
            Self::Held => Self::ToBackend,
            Self::ToBackend => Self::ToClient,
            Self::ToClient => Self::Name,
        }
    }

    fn order(self, one: &Watched, other: &Watched) -> Ordering {
        let (a, b) = (one.snapshot(), other.snapshot());
        let most = |of: fn(&Snapshot) -> u64| b.map(of).cmp(&a.map(of));
        let fastest = |of: fn(Rates) -> u64| other.rates.map(of).cmp(&one.rates.map(of));
        match self {
            Self::Name => Ordering::Equal,
            Self::State => rank(a).cmp(&rank(b)),
            Self::Sleeps => {
                let when =
                    |it: Option<&Snapshot>| it.and_then(|it| it.idle.sleeps_in_s).unwrap_or(f64::INFINITY);
                when(a).total_cmp(&when(b))
            }
            Self::Flows => most(open_flows),
            Self::Held => most(|snapshot| snapshot.held),
            Self::ToBackend => fastest(|rates| rates.to_backend),
            Self::ToClient => fastest(|rates| rates.to_client),
        }
    }
}

/// Open flows of all planes.
#[must_use]
pub fn open_flows(snapshot: &Snapshot) -> u64 {
    snapshot.flows.proxied.open + snapshot.flows.handed_off.open
}

fn rank(snapshot: Option<&Snapshot>) -> u8 {
    match snapshot.map(|snapshot| snapshot.state) {
        Some(StateName::Awake) => 0,
        Some(StateName::Settling) => 1,
        Some(StateName::Stopping) => 2,
        Some(StateName::Waking) => 3,
        Some(StateName::Failed) => 4,
        Some(StateName::Asleep) => 5,
        None => 6,
    }
}

/// A flow of the service that is looked into.
#[derive(Clone, Debug, PartialEq)]
pub struct FlowLine {
    /// Its client's address.
    pub client: String,
    /// How long it has been open.
    pub age: Duration,
    /// How long ago it moved a byte.
    pub silent: Duration,
    /// Bytes so far, to the backend and to the client.
    pub bytes: (u64, u64),
    /// What moves. `None`: it was not there before.
    pub rates: Option<Rates>,
}

/// A flow as the kernel counts it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CountedFlow {
    /// What names it for as long as it is open.
    pub cookie: u64,
    /// Its client's address.
    pub client: String,
    /// When it was opened.
    pub opened: Monotonic,
    /// When it was last seen to have moved a byte.
    pub last_activity: Monotonic,
    /// Bytes so far, to the backend and to the client.
    pub bytes: (u64, u64),
}

/// The flows of one service.
#[derive(Clone, Debug)]
struct Flows {
    /// Of which one.
    of: Id,
    /// Those that were handed off, the busiest first; or why they cannot be seen.
    lines: Result<Vec<FlowLine>, String>,
    before: HashMap<u64, (u64, u64)>,
    at: Monotonic,
}

/// Everything that is shown.
#[derive(Clone, Debug)]
pub struct Model {
    watched: Vec<Watched>,
    /// What services are ordered by.
    pub sort: Sort,
    /// The other way round.
    pub reversed: bool,
    /// Only services whose name, state or unit contains this.
    pub filter: String,
    /// The filter is being typed.
    pub is_filtering: bool,
    /// The selected service is looked into.
    pub shows_flows: bool,
    /// The flows of the service that is looked into.
    flows: Option<Flows>,
    selected: Option<Id>,
    /// Why nobody could be asked, or not yet.
    pub trouble: Option<String>,
    /// How often services are asked.
    pub interval: Duration,
}

/// What follows from a key; of several the last in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reaction {
    /// Go on.
    Stay,
    /// Go on, and look into another service at once.
    LookInto,
    /// Quit.
    Quit,
}

impl Model {
    /// Nobody has been asked yet.
    #[must_use]
    pub fn new(interval: Duration) -> Self {
        Self {
            watched: Vec::new(),
            sort: Sort::default(),
            reversed: false,
            filter: String::new(),
            is_filtering: false,
            shows_flows: false,
            flows: None,
            selected: None,
            trouble: Some("asking ...".to_owned()),
            interval,
        }
    }

    /// What all services answered at `now`. Those that are not among them are forgotten.
    pub fn update(&mut self, services: Vec<Service>, now: Monotonic) {
        let mut before = std::mem::take(&mut self.watched);
        for service in services {
            let nth = self.watched.iter().filter(|other| other.id.file_name == service.file_name).count();
            let id = Id { file_name: service.file_name.clone(), nth };
            let known = before.iter().position(|watched| watched.id == id);
            let mut watched = known.map_or_else(
                || Watched {
                    id,
                    name: String::new(),
                    answer: Err(Silence::Late),
                    rates: None,
                    history: VecDeque::new(),
                    before: None,
                },
                |index| before.swap_remove(index),
            );
            watched.hear(service, now);
            self.watched.push(watched);
        }
        self.trouble = None;
    }

    /// The flows of the service `of` that were handed off, or why they cannot be seen.
    pub fn update_flows(&mut self, of: &Id, found: Result<Vec<CountedFlow>, String>, now: Monotonic) {
        let known = self.flows.take().filter(|flows| flows.of == *of);
        let (before, since) = known.map_or_else(Default::default, |flows| (flows.before, flows.at));
        let time = now.saturating_sub(since);
        let line = |flow: &CountedFlow| FlowLine {
            client: flow.client.clone(),
            age: now.saturating_sub(flow.opened),
            silent: now.saturating_sub(flow.last_activity),
            bytes: flow.bytes,
            rates: before.get(&flow.cookie).and_then(|bytes| Rates::between(*bytes, flow.bytes, time)),
        };
        let counted = found.iter().flatten().map(|flow| (flow.cookie, flow.bytes)).collect();
        let lines = found.map(|found| {
            let mut lines: Vec<FlowLine> = found.iter().map(line).collect();
            let busy = |line: &FlowLine| line.rates.map_or(0, Rates::sum);
            lines.sort_by(|a, b| busy(b).cmp(&busy(a)).then_with(|| a.age.cmp(&b.age)));
            lines
        });
        self.flows = Some(Flows { of: of.clone(), lines, before: counted, at: now });
    }

    /// All services, in no order.
    #[must_use]
    pub fn all(&self) -> &[Watched] {
        &self.watched
    }

    /// The services that the filter lets through, in order.
    #[must_use]
    pub fn shown(&self) -> Vec<&Watched> {
        let wanted = self.filter.to_lowercase();
        let has = |text: &str| text.to_lowercase().contains(&wanted);
        let fits = |watched: &&Watched| {
            let snapshot = watched.snapshot();
            has(&watched.name)
                || snapshot.is_some_and(|it| has(it.state.word()) || it.unit.as_deref().is_some_and(has))
        };
        let mut shown: Vec<&Watched> = self.watched.iter().filter(fits).collect();
        shown.sort_by(|a, b| {
            let order = self.sort.order(a, b).then_with(|| a.name.cmp(&b.name));
            if self.reversed { order.reverse() } else { order }
        });
        shown
    }

    /// Where the selected service is among those that are shown: the first, if it is not among them.
    #[must_use]
    pub fn selected(&self) -> usize {
        let of = |watched: &&Watched| Some(&watched.id) == self.selected.as_ref();
        self.shown().iter().position(of).unwrap_or(0)
    }

    /// The service that is looked into, if one is.
    #[must_use]
    pub fn looked_into(&self) -> Option<&Watched> {
        if !self.shows_flows {
            return None;
        }
        self.shown().get(self.selected()).copied()
    }

    /// The flows of the service that is looked into, once they are known.
    #[must_use]
    pub fn known_flows(&self) -> Option<&Result<Vec<FlowLine>, String>> {
        let of = &self.looked_into()?.id;
        self.flows.as_ref().filter(|flows| flows.of == *of).map(|flows| &flows.lines)
    }

    /// Somebody pressed these keys.
    pub fn press_all(&mut self, keys: &[Key]) -> Reaction {
        keys.iter().map(|key| self.press(*key)).max().unwrap_or(Reaction::Stay)
    }

    /// Somebody pressed a key.
    pub fn press(&mut self, key: Key) -> Reaction {
        if key == Key::Interrupt {
            return Reaction::Quit;
        }
        if self.is_filtering {
            self.edit(key);
            return Reaction::Stay;
        }
        match key {
            Key::Char('q' | 'Q') | Key::Escape => return Reaction::Quit,
            Key::Char('s') => self.sort = self.sort.next(),
            Key::Char('r') => self.reversed = !self.reversed,
            Key::Char('/') => self.is_filtering = true,
            Key::Enter => {
                self.shows_flows = !self.shows_flows;
                return Reaction::LookInto;
            }
            Key::Up | Key::Char('k') => return self.select(|at| at.saturating_sub(1)),
            Key::Down | Key::Char('j') => return self.select(|at| at + 1),
            Key::PageUp => return self.select(|at| at.saturating_sub(PAGE)),
            Key::PageDown => return self.select(|at| at + PAGE),
            Key::Home => return self.select(|_| 0),
            Key::End => return self.select(|_| usize::MAX),
            Key::Char(_) | Key::Erase | Key::Interrupt => {}
        }
        Reaction::Stay
    }

    fn edit(&mut self, key: Key) {
        match key {
            Key::Enter => self.is_filtering = false,
            Key::Escape => {
                self.filter.clear();
                self.is_filtering = false;
            }
            Key::Erase => {
                self.filter.pop();
            }
            Key::Char(character) if self.filter.chars().count() < FILTER_MAX => self.filter.push(character),
            Key::Char(_)
            | Key::Interrupt
            | Key::Up
            | Key::Down
            | Key::PageUp
            | Key::PageDown
            | Key::Home
            | Key::End => {}
        }
    }

    fn select(&mut self, step: impl Fn(usize) -> usize) -> Reaction {
        let shown = self.shown();
        let wanted = step(self.selected()).min(shown.len().saturating_sub(1));
        self.selected = shown.get(wanted).map(|watched| watched.id.clone());
        if self.shows_flows { Reaction::LookInto } else { Reaction::Stay }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::report::status::tests::snapshot;

    /// The answer of a service with so many bytes on both counters.
    pub fn service(name: &str, bytes: u64) -> Service {
        let mut snapshot = snapshot();
        snapshot.name = name.to_owned();
        (snapshot.bytes_to_backend, snapshot.bytes_to_client) = (bytes, 3 * bytes);
        Service { file_name: name.to_owned(), answer: Ok(snapshot) }
    }

    fn changed(name: &str, bytes: u64, change: impl FnOnce(&mut Snapshot)) -> Service {
        let mut service = service(name, bytes);
        change(service.answer.as_mut().unwrap());
        service
    }

    const fn s(seconds: u64) -> Monotonic {
        Duration::from_secs(seconds)
    }

    fn names(model: &Model) -> Vec<&str> {
        model.shown().iter().map(|watched| watched.name.as_str()).collect()
    }

    fn press(model: &mut Model, keys: &str) {
        for key in keys.chars() {
            assert_eq!(model.press(Key::Char(key)), Reaction::Stay, "{key}");
        }
    }

    #[test]
    fn rates_are_what_moved_in_the_time_between_two_answers() {
        let mut model = Model::new(s(1));
        model.update(vec![service("dice", 1000)], s(10));
        assert_eq!(model.all()[0].rates, None);
        model.update(vec![service("dice", 5000)], s(12));
        assert_eq!(model.all()[0].rates, Some(Rates { to_backend: 2000, to_client: 6000 }));
        assert_eq!(model.all()[0].history, [0, 8000]);
        model.update(vec![service("dice", 5000)], s(12));
        assert_eq!(model.all()[0].rates, None, "no time has passed");
        let restarted = changed("dice", 9000, |snapshot| snapshot.pid += 1);
        model.update(vec![restarted], s(13));
        assert_eq!(model.all()[0].rates, None, "another drowse has other counters");
        let enormous = Rates::between((0, 0), (u64::MAX, u64::MAX), Duration::from_nanos(1));
        assert_eq!(enormous, Some(Rates { to_backend: u64::MAX, to_client: u64::MAX }));
        assert_eq!(Rates::between((5, 0), (4, 0), s(1)), None);
    }

    #[test]
    fn one_that_stops_answering_is_shown_as_such_and_one_that_goes_is_forgotten() {
        let mut model = Model::new(s(1));
        model.update(vec![service("a", 0), service("b", 0)], s(10));
        let late = Service { file_name: "a".into(), answer: Err(Silence::Late) };
        model.update(vec![late, service("b", 0)], s(11));
        assert_eq!(model.all()[0].answer.as_ref().unwrap_err(), &Silence::Late);
        model.update(vec![service("a", 500), service("b", 0)], s(12));
        assert_eq!(model.all()[0].rates, None, "the time in between is not known");
        model.update(vec![service("b", 0)], s(13));
        assert_eq!(names(&model), ["b"]);
    }

    #[test]
    fn memory_of_rates_is_bounded() {
        let mut model = Model::new(s(1));
        for second in 0..1000 {
            model.update(vec![service("a", second)], s(second));
        }
        assert_eq!(model.all()[0].history.len(), HISTORY_MAX);
    }

    #[test]
    fn two_services_of_one_name_in_two_directories_are_two() {
        let mut model = Model::new(s(1));
        model.update(vec![service("a", 0), service("a", 0)], s(10));
        model.update(vec![service("a", 10), service("a", 2000)], s(11));
        let rates: Vec<u64> = model.all().iter().map(|watched| watched.rates.unwrap().to_backend).collect();
        assert_eq!(rates, [10, 2000]);
    }

    #[test]
    fn each_order_puts_what_matters_first() {
        let mut model = Model::new(s(1));
        let services = |more: u64| {
            vec![
                changed("a", 100 * more, |it| (it.held, it.idle.sleeps_in_s) = (1, Some(50.0))),
                changed("b", 0, |it| (it.state, it.flows.proxied.open) = (StateName::Asleep, 0)),
                changed("c", 900 * more, |it| {
                    (it.flows.handed_off.open, it.idle.sleeps_in_s) = (9, Some(9.0));
                }),
                Service { file_name: "d".into(), answer: Err(Silence::Late) },
            ]
        };
        model.update(services(0), s(10));
        model.update(services(1), s(11));
        let mut found = Vec::new();
        for _ in 0..7 {
            found.push((model.sort, names(&model).concat()));
            press(&mut model, "s");
        }
        let expected = [
            (Sort::Name, "abcd"),
            (Sort::State, "acbd"),
            (Sort::Sleeps, "cabd"),
            (Sort::Flows, "cabd"),
            (Sort::Held, "abcd"),
            (Sort::ToBackend, "cabd"),
            (Sort::ToClient, "cabd"),
        ];
        assert_eq!(found, expected.map(|(sort, names)| (sort, names.to_owned())));
        press(&mut model, "r");
        assert_eq!(names(&model), ["d", "c", "b", "a"]);
    }

    #[test]
    fn the_filter_is_typed_kept_and_cleared() {
        let mut model = Model::new(s(1));
        let asleep = changed("wiki", 0, |snapshot| snapshot.state = StateName::Asleep);
        model.update(vec![service("dice", 0), asleep], s(10));
        press(&mut model, "/wikq");
        assert_eq!(names(&model), Vec::<&str>::new());
        assert_eq!(model.press(Key::Erase), Reaction::Stay);
        assert_eq!(names(&model), ["wiki"]);
        assert_eq!(model.press(Key::Enter), Reaction::Stay);
        assert!(!model.is_filtering);
        press(&mut model, "/");
        assert_eq!(model.press(Key::Escape), Reaction::Stay);
        assert!(model.filter.is_empty() && !model.is_filtering);
        press(&mut model, "/ASLEEP");
        assert_eq!(names(&model), ["wiki"]);
        press(&mut model, &"x".repeat(1000));
        assert_eq!(model.filter.len(), FILTER_MAX);
        assert_eq!(model.press(Key::Interrupt), Reaction::Quit);
    }

    #[test]
    fn the_selection_stays_with_its_service() {
        let mut model = Model::new(s(1));
        model.update(vec![service("a", 0), service("b", 0), service("c", 0)], s(10));
        assert_eq!(model.selected(), 0);
        model.press(Key::Down);
        press(&mut model, "r");
        model.update(vec![service("b", 0), service("c", 0), service("0", 0)], s(11));
        assert_eq!(names(&model)[model.selected()], "b");
        model.press(Key::End);
        assert_eq!(model.selected(), 2);
        model.press(Key::Down);
        model.press(Key::PageUp);
        assert_eq!(model.selected(), 0);
        model.update(vec![], s(12));
        model.press(Key::Down);
        assert_eq!((model.selected(), model.looked_into().is_none()), (0, true));
    }

    #[test]
    fn quitting_has_three_keys() {
        for key in [Key::Char('q'), Key::Escape, Key::Interrupt] {
            assert_eq!(Model::new(s(1)).press(key), Reaction::Quit);
        }
    }

    #[test]
    fn flows_have_rates_and_the_busiest_is_first() {
        let mut model = Model::new(s(1));
        model.update(vec![service("a", 0), service("b", 0)], s(10));
        assert_eq!(model.press(Key::Enter), Reaction::LookInto);
        let flow = |cookie: u64, bytes: u64| CountedFlow {
            cookie,
            client: format!("192.0.2.{cookie}:4000"),
            opened: s(10 - cookie),
            last_activity: s(10),
            bytes: (bytes, bytes),
        };
        let of = model.looked_into().unwrap().id.clone();
        model.update_flows(&of, Ok(vec![flow(1, 5), flow(2, 5)]), s(10));
        model.update_flows(&of, Ok(vec![flow(1, 5), flow(2, 25), flow(3, 7)]), s(12));
        let lines = model.known_flows().unwrap().clone().unwrap();
        let seen: Vec<_> =
            lines.iter().map(|line| (line.client.as_str(), line.rates.map(Rates::sum))).collect();
        assert_eq!(
            seen,
            [("192.0.2.2:4000", Some(20)), ("192.0.2.1:4000", Some(0)), ("192.0.2.3:4000", None)]
        );
        assert_eq!((lines[0].age, lines[0].silent), (s(4), s(2)));
        assert_eq!(model.press(Key::Down), Reaction::LookInto);
        assert!(model.known_flows().is_none(), "those of another service");
        model.update_flows(&of, Err("not permitted".into()), s(13));
        model.press(Key::Up);
        assert_eq!(model.known_flows(), Some(&Err("not permitted".to_owned())));
    }
}
