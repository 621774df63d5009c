//! `drowse enable` and `drowse disable`: from a service that runs to one that sleeps, and back.
//!
//! Owns: the order of looking, deciding ([`plan`]), showing and doing, and putting everything back if something fails.
//! Must never: decide by itself, or leave half a set-up behind.

use std::io::{self, Write};
use std::iter;

use crate::activation::Failure;
use crate::activation::systemd::manager::{Job, Manager};
use crate::activation::systemd::{self, Bus, REPLY_TIMEOUT};
use crate::clock;
use crate::config::{DisableArgs, EnableArgs};
use crate::report::control;

pub mod contents;
pub mod facts;
pub mod files;
pub mod holders;
pub mod plan;
pub mod trial;

use std::path::PathBuf;

use self::facts::Facts;
use self::files::Changed;
use self::plan::{Plan, Step};

/// How units are told apart by the ends of their names, systemd.unit(5).
const UNIT_TYPES: [&str; 11] = [
    "service",
    "socket",
    "target",
    "timer",
    "path",
    "mount",
    "automount",
    "swap",
    "device",
    "slice",
    "scope",
];

/// The names of the units of one service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// The service itself: `web.service`.
    pub unit: String,
    /// `web`.
    pub instance: String,
    /// `drowse@web.socket`.
    pub socket: String,
    /// `drowse@web.service`.
    pub service: String,
    /// They belong to the user's systemd.
    pub user: bool,
}

impl Names {
    /// The names for the service that people call `text`: `web` or `web.service`.
    ///
    /// # Errors
    /// That is no service that could sleep; in one line for people.
    pub fn new(text: &str, user: bool) -> Result<Self, String> {
        let has_type = text.rsplit_once('.').is_some_and(|(_, kind)| UNIT_TYPES.contains(&kind));
        let unit = if has_type { text.to_owned() } else { format!("{text}.service") };
        systemd::check_unit_name(&unit).map_err(|failure| failure.message)?;
        let Some(instance) = unit.strip_suffix(".service") else {
            return Err(format!("{unit} is no service: name the .service that should sleep"));
        };
        if instance.starts_with("drowse@") {
            return Err(format!("{unit} is drowse itself: name the service behind it"));
        }
        let service = format!("drowse@{instance}.service");
        if systemd::check_unit_name(&service).is_err() {
            return Err(format!("{unit} has too long a name: {service} is none that systemd takes"));
        }
        Ok(Self {
            instance: instance.to_owned(),
            socket: format!("drowse@{instance}.socket"),
            service,
            unit,
            user,
        })
    }

    /// `--user` with a leading space, or nothing: goes after `systemctl` and `journalctl`.
    #[must_use]
    pub fn user_flag(&self) -> &'static str {
        if self.user { " --user" } else { "" }
    }

    fn bus(&self) -> Bus {
        if self.user { Bus::User } else { Bus::System }
    }
}

/// The files of one service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// `/etc/drowse/web.conf`: the options of `drowse run`. A rule for polkit may go by its presence.
    pub conf: PathBuf,
    /// `/etc/systemd/system/drowse@web.socket.d/drowse.conf`.
    pub socket: PathBuf,
    /// `/etc/systemd/system/drowse@web.service.d/drowse.conf`.
    pub service: PathBuf,
    /// `/etc/systemd/system`.
    pub directory: PathBuf,
    /// `/run/systemd/system`.
    pub runtime_directory: PathBuf,
}

/// How a command that sets something up ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// As it was asked to.
    Well,
    /// It could not; what is wrong was said.
    Refused,
}

/// `drowse enable`. Says on `out` what it finds and does.
///
/// # Errors
/// systemd cannot be asked or refuses, or a file cannot be written: what was done is undone. Or it is all done, and the
/// socket does not listen or nobody reads `out`: it stays.
pub async fn enable(args: &EnableArgs, out: &mut impl Write) -> anyhow::Result<Ended> {
    let began = clock::now();
    let names = Names::new(&args.unit, args.user).map_err(anyhow::Error::msg)?;
    let mut manager = connect(&names).await?;
    let places = facts::places(&names)?;
    let facts = Facts::look(names.clone(), places, Some(args), &manager).await?;
    // Whoever only looks need not be root.
    let facts = Facts { may_write: facts.may_write || args.dry_run, ..facts };
    let plan = match plan::enable(args, &facts) {
        Ok(plan) => plan,
        Err(problems) => return refuse(out, &format!("{} cannot be set up yet:", names.unit), &problems),
    };
    show(&plan, &names, args.dry_run, out)?;
    if args.dry_run {
        return Ok(Ended::Well);
    }
    if !plan.is_empty() {
        carry_out(&plan, &facts, &mut manager).await?;
        listens(&manager, &names).await?;
        let took = clock::now().saturating_sub(began);
        writeln!(out, "done in {:.2} s: {}", took.as_secs_f64(), plan.outcome)?;
    }
    if args.try_out {
        return trial::run(args, &names, &manager, out).await;
    }
    Ok(Ended::Well)
}

/// `drowse disable`. Says on `out` what it finds and does. That the service does not start at the end is no failure: what
/// was set up is gone, and the reason is told.
///
/// # Errors
/// As [`enable`].
pub async fn disable(args: &DisableArgs, out: &mut impl Write) -> anyhow::Result<Ended> {
    let names = Names::new(&args.unit, args.user).map_err(anyhow::Error::msg)?;
    let mut manager = connect(&names).await?;
    let places = facts::places(&names)?;
    let facts = Facts::look(names.clone(), places, None, &manager).await?;
    let facts = Facts { may_write: facts.may_write || args.dry_run, ..facts };
    let plan = match plan::disable(&facts) {
        Ok(plan) => plan,
        Err(problems) => return refuse(out, &format!("{} stays as it is:", names.unit), &problems),
    };
    show(&plan, &names, args.dry_run, out)?;
    if !args.dry_run && !plan.is_empty() {
        carry_out(&plan, &facts, &mut manager).await?;
        for directory in &plan.directories {
            // One that is not empty has something of somebody else's.
            let _stays = std::fs::remove_dir(directory);
        }
        if let Some(directory) = control::own_directory(None, names.user) {
            control::forget(&directory, &names.instance);
        }
        let mut outcome = plan.outcome;
        if plan.start
            && let Err(failure) = manager.job(Job::Start, &names.unit).await
        {
            let why = why(&manager, names.user_flag(), &names.unit, &failure).await;
            outcome = format!("nothing of drowse is left, but {} does not run: {why}", names.unit);
        }
        writeln!(out, "done: {outcome}")?;
    }
    Ok(Ended::Well)
}

async fn connect(names: &Names) -> anyhow::Result<Manager> {
    Manager::connect(names.bus(), REPLY_TIMEOUT).await.map_err(|failure| {
        let hint = if names.user {
            "is there a session of this user? see loginctl, or loginctl enable-linger"
        } else {
            "is systemd running here, and dbus? without them use drowse run"
        };
        anyhow::anyhow!("{}: {hint}", failure.message)
    })
}

fn refuse(out: &mut impl Write, heading: &str, problems: &[String]) -> anyhow::Result<Ended> {
    writeln!(out, "{heading}")?;
    for problem in problems {
        writeln!(out, "- {problem}")?;
    }
    Ok(Ended::Refused)
}

fn show(plan: &Plan, names: &Names, dry_run: bool, out: &mut impl Write) -> io::Result<()> {
    for line in &plan.found {
        writeln!(out, "{line}")?;
    }
    for note in &plan.notes {
        writeln!(out, "note: {note}")?;
    }
    if plan.is_empty() {
        return writeln!(out, "nothing to change: {}", plan.outcome);
    }
    for step in &plan.before {
        writeln!(out, "- {}", step.describe(names))?;
    }
    for change in &plan.files {
        if dry_run {
            write!(out, "{}", files::diff(change))?;
        } else {
            let what = match (&change.before, &change.after) {
                (None, _) => "write",
                (Some(_), Some(_)) => "change",
                (Some(_), None) => "remove",
            };
            writeln!(out, "- {what} {}", change.path.display())?;
            for line in
                change.after.iter().flat_map(|text| text.lines()).filter(|line| !line.starts_with('#'))
            {
                writeln!(out, "      {line}")?;
            }
        }
    }
    for step in &plan.after {
        writeln!(out, "- {}", step.describe(names))?;
    }
    if plan.start {
        writeln!(out, "- start {}, unless it runs", names.unit)?;
    }
    if dry_run {
        writeln!(out, "nothing of this was done (--dry-run); it would lead to: {}", plan.outcome)?;
    }
    out.flush()
}

/// Does it all, or undoes what was done.
async fn carry_out(plan: &Plan, facts: &Facts, manager: &mut Manager) -> anyhow::Result<()> {
    let mut doing = Doing { changed: Changed::default(), done: Vec::new(), facts, manager };
    let Err(error) = doing.all(plan).await else { return Ok(()) };
    let mut message = format!("{error:#}");
    let failed = doing.undo().await;
    if failed.is_empty() {
        message.push_str("; everything is as it was before");
    } else {
        message = format!("{message}; and not all of it could be undone: {}", failed.join("; "));
    }
    Err(anyhow::Error::msg(message))
}

struct Doing<'a> {
    changed: Changed,
    done: Vec<Step>,
    facts: &'a Facts,
    manager: &'a mut Manager,
}

impl Doing<'_> {
    async fn all(&mut self, plan: &Plan) -> anyhow::Result<()> {
        for step in &plan.before {
            self.step(step).await?;
        }
        for change in &plan.files {
            self.changed.apply(change)?;
        }
        for step in &plan.after {
            self.step(step).await?;
        }
        Ok(())
    }

    async fn step(&mut self, step: &Step) -> anyhow::Result<()> {
        self.done.push(step.clone());
        match step {
            Step::Disable { unit, at_runtime } => {
                self.manager.disable(unit, *at_runtime).await?;
                if *unit == self.facts.names.unit {
                    // systemd removes the unit's own file, too, if that is a link, and the links of units that its
                    // Also= names.
                    files::restore(&self.facts.other_links)?;
                }
            }
            Step::Enable(unit) => self.manager.enable(unit).await?,
            Step::Restore(links) => self.changed.restore(links)?,
            Step::Reload => self.manager.reload().await?,
            Step::Do(job, unit) => {
                for (job, unit) in awaited(*job, unit, self.facts) {
                    if let Err(failure) = self.manager.job(job, unit).await {
                        anyhow::bail!(
                            "{}",
                            why(self.manager, self.facts.names.user_flag(), unit, &failure).await
                        );
                    }
                }
            }
        }
        Ok(())
    }

    /// Puts everything back as far as possible; says what could not be.
    async fn undo(self) -> Vec<String> {
        let mut failed = self.changed.undo();
        let mut jobs = Vec::new();
        for step in self.done.iter().rev() {
            let undone = match step {
                Step::Disable { unit, .. } if *unit == self.facts.names.unit => {
                    files::restore(&self.facts.links).map_err(|error| format!("{error:#}"))
                }
                Step::Disable { unit, .. } => {
                    self.manager.enable(unit).await.map_err(|failure| failure.message)
                }
                Step::Enable(unit) => {
                    self.manager.disable(unit, false).await.map(drop).map_err(|failure| failure.message)
                }
                Step::Do(job, unit) => {
                    jobs.push((*job, unit));
                    Ok(())
                }
                // What was changed knows its links.
                Step::Restore(_) | Step::Reload => Ok(()),
            };
            failed.extend(undone.err());
        }
        failed.extend(self.manager.reload().await.err().map(|failure| failure.message));
        for (job, unit) in jobs {
            let back = match job {
                Job::Start => Job::Stop,
                Job::Stop => Job::Start,
                Job::Restart => Job::Restart,
            };
            for (job, unit) in awaited(back, unit, self.facts) {
                let undone = self.manager.job(job, unit).await;
                failed.extend(undone.err().map(|failure| failure.message));
                failed.extend(self.manager.reset_failed(unit).await.err().map(|failure| failure.message));
            }
        }
        failed
    }
}

/// A job, and the one to wait for besides: systemd restarts a running drowse with its socket, by a job of its own. A start
/// joins that job, or finds it done.
fn awaited<'a>(job: Job, unit: &'a str, facts: &'a Facts) -> impl Iterator<Item = (Job, &'a str)> {
    let restarts_drowse = job == Job::Restart && unit == facts.names.socket && facts.service.is_up;
    iter::once((job, unit)).chain(restarts_drowse.then_some((Job::Start, facts.names.service.as_str())))
}

/// Why a unit could not be started, with what it said last.
async fn why(manager: &Manager, user_flag: &str, unit: &str, failure: &Failure) -> String {
    let result = match manager.properties(unit).await.map(|properties| properties.text("Result")) {
        Ok(result) if !matches!(result.as_str(), "" | "success") => format!(" (result {result})"),
        Ok(_) | Err(_) => String::new(),
    };
    let said = trial::last_words(unit, !user_flag.is_empty()).await;
    format!("{}{result}{said}; see: journalctl{user_flag} -u {unit}", failure.message)
}

/// The proof that systemd listens.
async fn listens(manager: &Manager, names: &Names) -> anyhow::Result<()> {
    let listed = manager.units(std::slice::from_ref(&names.socket)).await?;
    match listed.first() {
        Some(socket) if socket.is_up() => Ok(()),
        Some(socket) => anyhow::bail!(
            "{} is {} and not active; see: systemctl{} status {}",
            names.socket,
            socket.active_state,
            names.user_flag(),
            names.socket
        ),
        None => anyhow::bail!("systemd does not know {}", names.socket),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_known_by_either_name() {
        for text in ["my.app", "my.app.service"] {
            let names = Names::new(text, false).unwrap();
            assert_eq!(
                (names.unit.as_str(), names.socket.as_str()),
                ("my.app.service", "drowse@my.app.socket")
            );
        }
        assert_eq!(Names::new("web@1", true).unwrap().service, "drowse@web@1.service");
        for (text, says) in [
            ("web.socket", "name the .service"),
            ("web@", "is a template"),
            ("drowse@web", "is drowse itself"),
            ("a b", "systemd-escape"),
            ("multi-user.target", "is no service"),
        ] {
            let error = Names::new(text, false).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
        assert!(Names::new(&"a".repeat(243), false).unwrap_err().contains("too long"));
    }
}
