//! What is logged, and how.
//!
//! The policy: *info* has one line per transaction and per refused recipient, queue id first, and the life of the
//! daemon; *warn* what an operator should look at some day; *error* what needs someone now; *debug* steps;
//! *trace* protocol frames. Text of strangers is written escaped, so that no line can be forged.

use std::{
    error::Error,
    fmt::{self, Write as _},
    io::{self, Write},
    mem::ManuallyDrop,
    os::fd::{AsFd, AsRawFd},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl, open},
    sys::{
        socket::{MsgFlags, SockType, getsockopt, send, sockopt},
        stat::{Mode, SFlag, fstat},
    },
    unistd::dup2_stderr,
};
use tracing::{
    field::{Field, Visit},
    level_filters::LevelFilter,
    warn,
};
use tracing_subscriber::{
    Layer, Registry,
    field::RecordFields,
    fmt::{FormatFields, MakeWriter, format::Writer},
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use crate::{
    config::{Log, LogFormat, LogLevel},
    sys,
};

/// Starts logging: to the journal when systemd connected standard error with it, else to standard error.
pub fn start(log: &Log) {
    let level = match log.level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let journal = under_journald().then(journal).flatten();
    let layer = journal.map_or_else(|| lines(log.format, || StandardError), Layer::boxed);
    // A second start (tests in one process) changes nothing.
    let _ = tracing_subscriber::registry().with(layer.with_filter(level)).try_init();
}

/// A line to `writer` for each event.
pub fn lines<W>(format: LogFormat, writer: W) -> Box<dyn Layer<Registry> + Send + Sync>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    // Text is for people and grep; a write that fails (a closed pipe) must not end the daemon.
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .with_ansi(false)
        .with_target(false)
        .log_internal_errors(false);
    match format {
        LogFormat::Text => lines.fmt_fields(Fields).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    }
}

/// Fields as `name="value"`, the message without its name, as [`tracing_subscriber`] writes them where there are no colours, at a
/// third of the work: every mail is a line.
struct Fields;

impl<'writer> FormatFields<'writer> for Fields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut line = FieldWriter { writer, is_first: true, result: Ok(()) };
        fields.record(&mut line);
        line.result
    }
}

struct FieldWriter<'writer> {
    writer: Writer<'writer>,
    is_first: bool,
    result: fmt::Result,
}

impl Visit for FieldWriter<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.record_debug(field, &format_args!("{value}")),
            _ => self.record_debug(field, &value),
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut write = || {
            if !std::mem::take(&mut self.is_first) {
                self.writer.write_char(' ')?;
            }
            match field.name() {
                // Ours escape strangers' text by themselves; libraries' need not.
                "message" => write!(Sanitized(&mut self.writer), "{value:?}"),
                name => {
                    self.writer.write_str(name.strip_prefix("r#").unwrap_or(name))?;
                    write!(self.writer, "={value:?}")
                }
            }
        };
        self.result = self.result.and_then(|()| write());
    }
}

/// Escapes what a terminal could take for a command.
struct Sanitized<W>(W);

impl<W: fmt::Write> fmt::Write for Sanitized<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut plain = 0;
        let is_bad = |c: char| matches!(c, '\x07' | '\x08' | '\x0c' | '\x1b' | '\x7f'..='\u{9f}');
        for (at, c) in text.char_indices().filter(|(_, c)| is_bad(*c)) {
            self.0.write_str(&text[plain..at])?;
            match c {
                '\u{80}'.. => write!(self.0, "\\u{{{:x}}}", u32::from(c))?,
                _ => write!(self.0, "\\x{:02x}", u32::from(c))?,
            }
            plain = at + c.len_utf8();
        }
        self.0.write_str(&text[plain..])
    }
}

/// Whether standard error is the journal (systemd.exec(5), `$JOURNAL_STREAM`: device and inode of the stream).
fn under_journald() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    fstat(io::stderr()).is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// The journal's own socket, which loses what it has no room for instead of waiting: a journal that stands still must not hold
/// up the mail.
fn journal() -> Option<tracing_journald::Layer> {
    // The library keeps its socket to itself. It gets the lowest number that is free (socket(2)), as this copy does.
    let number = io::stderr().as_fd().try_clone_to_owned().ok()?.as_raw_fd();
    let layer = tracing_journald::layer().ok()?;
    // The layer's; it is never closed here.
    let socket = ManuallyDrop::new(sys::adopt(number));
    if getsockopt(&*socket, sockopt::SockType) == Ok(SockType::Datagram) {
        let _ = fcntl(&*socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK));
    }
    Some(layer)
}

/// Room for lines in the pipe behind standard error, in bytes: a second of much mail. The most that the kernel gives without
/// privilege (pipe(7)).
const PIPE_SIZE: i32 = 1 << 20;

/// Makes standard error lose what a pipe or socket has no room for, instead of waiting: a reader that stands still must not
/// hold up the mail.
///
/// Whoever else writes to it may rely on waiting. So a pipe is opened anew; where it can't be (it is another user's) all stays as
/// it was. With a socket each call says that it does not wait.
pub fn never_wait() {
    let kind = fstat(io::stderr()).map_or(SFlag::empty(), |stat| SFlag::from_bits_truncate(stat.st_mode))
        & SFlag::S_IFMT;
    IS_SOCKET.store(kind == SFlag::S_IFSOCK, Ordering::Relaxed);
    let flags = OFlag::O_WRONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    if kind == SFlag::S_IFIFO
        && let Ok(pipe) = open("/proc/self/fd/2", flags, Mode::empty())
    {
        let _ = fcntl(&pipe, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE));
        let _ = dup2_stderr(&pipe);
    }
}

/// Whether standard error is a socket, as that of a service under systemd.
static IS_SOCKET: AtomicBool = AtomicBool::new(false);

/// Lines of this process that were lost, and not told of yet.
static LOST: AtomicUsize = AtomicUsize::new(0);

/// Whether the last line stands there without its end.
static IS_TORN: AtomicBool = AtomicBool::new(false);

/// Says how many lines were lost, as soon as there is room to say so.
pub fn tell_lost() {
    let lost = LOST.swap(0, Ordering::Relaxed);
    if lost > 0 {
        warn!("{lost} log lines lost: standard error had no room for them");
        // This one too.
        if LOST.load(Ordering::Relaxed) > 0 {
            LOST.fetch_add(lost - 1, Ordering::Relaxed);
        }
    }
}

/// Standard error, to which a line is written whole or else counted.
struct StandardError;

impl Write for StandardError {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr().lock();
        let mut write = |mut bytes: &[u8]| {
            while !bytes.is_empty() {
                let sent = if IS_SOCKET.load(Ordering::Relaxed) {
                    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                    send(stderr.as_raw_fd(), bytes, flags).map_err(io::Error::from)
                } else {
                    stderr.write(bytes)
                };
                match sent {
                    Ok(written) => bytes = &bytes[written..],
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                    Err(_) => break,
                }
            }
            bytes.len()
        };
        let ended = !IS_TORN.load(Ordering::Relaxed) || write(b"\n") == 0;
        let left = if ended { write(line) } else { line.len() };
        IS_TORN.store(!ended || (1..line.len()).contains(&left), Ordering::Relaxed);
        if left > 0 {
            LOST.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An error with all its causes, as `what failed: because of this: because of that`; those that an error of some library
/// already tells at its end are not told again.
pub struct Chain<'a>(pub &'a dyn Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut told = self.0.to_string();
        f.write_str(&told)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !told.ends_with(&text) {
                write!(f, ": {text}")?;
                told = text;
            }
            cause = error.source();
        }
        Ok(())
    }
}

/// Text of a stranger or a filter, made safe for one line of a log: controls, quotes and backslashes escaped, cut
/// at [`MAX_QUOTED`] characters.
pub struct Quoted<'a>(pub &'a str);

/// Longest text that [`Quoted`] writes, in characters.
pub const MAX_QUOTED: usize = 500;

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.0.char_indices().nth(MAX_QUOTED).map_or(self.0.len(), |(at, _)| at);
        let (text, is_cut) = (&self.0[..end], end < self.0.len());
        // Mostly nothing is to be escaped: what stands between is written as a whole.
        let is_plain = |c: char| matches!(c, ' '..='~') && !matches!(c, '"' | '\'' | '\\');
        let mut written = 0;
        for (at, c) in text.char_indices().filter(|(_, c)| !is_plain(*c)) {
            write!(f, "{}{}", &text[written..at], c.escape_debug())?;
            written = at + c.len_utf8();
        }
        f.write_str(&text[written..])?;
        if is_cut {
            f.write_str("…")?;
        }
        Ok(())
    }
}

/// What a test has logged.
#[cfg(test)]
#[derive(Clone, Default)]
pub(crate) struct Captured(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

#[cfg(test)]
impl Captured {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

#[cfg(test)]
impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_written_as_the_library_writes_them() {
        let (ours, theirs) = (Captured::default(), Captured::default());
        let layer = |captured: &Captured| {
            let captured = captured.clone();
            let writer = move || captured.clone();
            tracing_subscriber::fmt::layer().without_time().with_ansi(false).with_writer(writer)
        };
        let both = vec![layer(&ours).fmt_fields(Fields).boxed(), layer(&theirs).boxed()];
        let subscriber = tracing_subscriber::registry().with(both);
        tracing::subscriber::with_default(subscriber, || {
            let odd = "a \"b\" \u{1b}[2J\u{9b}\u{7f}\0\t\u{2028}ü";
            tracing::info!(from = odd, size = 7_u64, seconds = 0.25, is = true, none = "", "{odd} {}", 1);
            tracing::warn!(error = %odd, what = ?Some(odd), r#type = 1, "{odd}");
            tracing::error!("plain");
            tracing::error!(message = odd, after = 1);
            tracing::error!(alone = 1);
        });
        let (ours, theirs) = (ours.text(), theirs.text());
        assert!(ours.lines().count() >= 5);
        assert_eq!(ours, theirs);
    }

    #[test]
    fn no_text_can_forge_a_line() {
        assert_eq!(Quoted("a\nb\u{1b}[0m\"c").to_string(), "a\\nb\\u{1b}[0m\\\"c");
        let odd = "it's \\ ü \u{301}\t\0.";
        let each: String = odd.chars().map(|c| c.escape_debug().to_string()).collect();
        assert_eq!(Quoted(odd).to_string(), each);
        assert_eq!(Quoted(&"x".repeat(600)).to_string().chars().count(), MAX_QUOTED + 1);
    }

    #[test]
    fn causes_are_told_once_each() {
        let error = crate::config::ConfigError::Read {
            path: "/x".into(),
            source: std::io::Error::from(std::io::ErrorKind::NotFound),
        };
        assert_eq!(Chain(&error).to_string(), "cannot read configuration file /x: entity not found");
        #[derive(Debug, thiserror::Error)]
        #[error("no file: {0}")]
        struct Repeats(#[source] std::io::Error);
        let error = Repeats(std::io::Error::from(std::io::ErrorKind::NotFound));
        assert_eq!(Chain(&error).to_string(), "no file: entity not found");
    }
}
