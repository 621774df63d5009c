//! Where log lines go: to the journal with a field for each fact, or to stderr, in colour for a terminal.
//!
//! Owns: the choice, made once at the start and again for each line that the journal would lose. The fields of a line
//! are those of its event, as `DROWSE_...`; `docs/reference/logs.md` says what each means.
//! Rests on: systemd naming the device and inode of the stream that it connected to stderr in `JOURNAL_STREAM`,
//! `systemd.exec(5)`; the journal's native protocol; a level `<N>` in front of a line on that stream, `sd-daemon(3)`.

use std::fmt;
use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::fstat;
use socket2::{Domain, SockAddr, Socket, Type};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer, debug_fn};
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::config::{LogLevel, RunArgs};

/// The target of the line that says why drowse ends. It goes to stderr in any case: of a process that is gone when the
/// journal reads its message, the journal does not know the unit; of a stream it does.
pub const LAST_WORDS: &str = "last_words";

/// Fields for the journal alone: the message has the same facts in words.
const FIELDS: [&str; 5] = ["event", "flow", "plane", "reason", "latency_usec"];
/// Libraries that tell everything they do at the level of a flow; they are heard with `--log-level trace`.
const TALKATIVE: [&str; 2] = ["aya", "aya_obj"];
/// Where the journal takes messages.
const JOURNAL: &str = "/run/systemd/journal/socket";
/// Who says it, as `journalctl --identifier` finds it.
const IDENTIFIER: &str = "drowse";

/// Begins to log, with the service's name and unit on every line of the journal.
pub fn begin(run: &RunArgs) {
    let level = run.log_level;
    let for_journal = is_journal();
    let stderr = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_target(level == LogLevel::Trace)
        .with_ansi(!for_journal && io::stderr().is_terminal() && !no_color())
        .fmt_fields(debug_fn(|writer, field, value| match field.name() {
            "message" => write!(writer, "{value:?}"),
            name if FIELDS.contains(&name) => Ok(()),
            name => write!(writer, " {name}={value:?}"),
        }));
    let lines = tracing_subscriber::registry().with(heard(level));
    if for_journal {
        let target = level == LogLevel::Trace;
        let format = tracing_subscriber::fmt::format().without_time().with_level(false).with_target(target);
        let stderr = stderr.event_format(Leveled(format.with_ansi(false)));
        lines.with(Journal { native: native(run), stderr, lost: AtomicU64::new(0) }).init();
    } else {
        lines.with(stderr).init();
    }
}

/// Which lines are wanted.
fn heard(level: LogLevel) -> Targets {
    let all = Targets::new().with_default(level.level());
    let libraries = if level == LogLevel::Debug { LevelFilter::INFO } else { level.level().into() };
    all.with_targets(TALKATIVE.map(|library| (library, libraries)))
}

/// The journal's own protocol. None: nobody takes messages there.
fn native(run: &RunArgs) -> Option<tracing_journald::Layer> {
    let unit = run.unit.as_ref().map(|unit| ("DROWSE_UNIT", unit.clone()));
    let always = std::iter::once(("DROWSE_NAME", run.service_name())).chain(unit);
    let priorities = PriorityMappings {
        info: Priority::Informational,
        debug: Priority::Debug,
        trace: Priority::Debug,
        ..PriorityMappings::new()
    };
    let layer = tracing_journald::layer().ok()?;
    Some(
        layer
            .with_syslog_identifier(IDENTIFIER.to_owned())
            .with_field_prefix(Some("DROWSE".to_owned()))
            .with_priority_mappings(priorities)
            .with_custom_fields(always),
    )
}

/// Lines for the journal: with fields while it takes them, else through stderr. When that is full, too, a line is lost:
/// nobody waits for a journal.
struct Journal<L> {
    native: Option<tracing_journald::Layer>,
    stderr: L,
    /// Lines that were lost and not told of.
    lost: AtomicU64,
}

impl<S, L> Layer<S> for Journal<L>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    L: Layer<S>,
{
    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let may = event.metadata().target() != LAST_WORDS && takes_messages();
        let native = self.native.as_ref().filter(|_| may);
        if let Some(native) = native {
            native.on_event(event, context);
        } else if has_room(io::stderr()) {
            let lost = self.lost.swap(0, Relaxed);
            if lost > 0 {
                let _nobody_listens =
                    writeln!(io::stderr(), "<4>{lost} lines of log were lost: the journal hung");
            }
            self.stderr.on_event(event, context);
        } else {
            self.lost.fetch_add(1, Relaxed);
        }
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if let Some(native) = &self.native {
            native.on_new_span(attributes, id, context);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(native) = &self.native {
            native.on_record(id, values, context);
        }
    }
}

/// A line with its level as `sd-daemon(3)` has it, for the journal to take off again.
struct Leveled<F>(F);

impl<S, N, F> FormatEvent<S, N> for Leveled<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let level = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        write!(writer, "<{level}>")?;
        self.0.format_event(context, writer, event)
    }
}

/// Whether stderr is the stream to the journal that systemd made for us.
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(stderr) = fstat(io::stderr().as_fd()) else { return false };
    stream == format!("{}:{}", stderr.st_dev, stderr.st_ino)
}

/// Whether the journal would take a message at this moment, without making us wait: somebody has its socket, and there
/// is room in the queue (`unix_dgram_poll` looks at the peer's). Some microseconds.
fn takes_messages() -> bool {
    let connected = || -> io::Result<bool> {
        let socket = Socket::new(Domain::UNIX, Type::DGRAM.nonblocking(), None)?;
        socket.connect(&SockAddr::unix(JOURNAL)?)?;
        Ok(has_room(&socket))
    };
    connected().unwrap_or(false)
}

/// Whether a line can be written there at this moment without waiting.
fn has_room(to: impl AsFd) -> bool {
    let mut room = [PollFd::new(&to, PollFlags::OUT)];
    poll(&mut room, Some(&Timespec::default())).is_ok()
        && room.iter().all(|room| room.revents().contains(PollFlags::OUT))
}

/// <https://no-color.org>: set and not empty.
fn no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}
