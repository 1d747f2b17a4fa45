//! What is logged, and how.
//!
//! The policy: *info* has one line per transaction and per refused recipient, queue id first, and the life of the
//! daemon; *warn* what an operator should look at some day; *error* what needs someone now; *debug* steps;
//! *trace* protocol frames. Text of strangers is written escaped, so that no line can be forged.

use std::{
    error::Error,
    fmt,
    io::{self, Write},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl, open},
    sys::stat::{Mode, SFlag, fstat},
    unistd::dup2_stderr,
};
use tracing::{level_filters::LevelFilter, warn};
use tracing_subscriber::{Layer, Registry, fmt::MakeWriter, layer::SubscriberExt, util::SubscriberInitExt};

use crate::config::{Log, LogFormat, LogLevel};

/// Starts logging: to the journal when systemd connected standard error with it, else to standard error.
pub fn start(log: &Log) {
    let level = match log.level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let journal = under_journald().then(tracing_journald::layer).and_then(Result::ok);
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
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    }
}

/// Whether standard error is the journal (systemd.exec(5), `$JOURNAL_STREAM`: device and inode of the stream).
fn under_journald() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    fstat(io::stderr()).is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Room for lines in the pipe behind standard error, in bytes: a second of much mail. The most that the kernel gives without
/// privilege (pipe(7)).
const PIPE_SIZE: i32 = 1 << 20;

/// Makes standard error lose what a pipe has no room for, instead of waiting: a reader that stands still must not hold up
/// the mail.
///
/// The pipe is opened anew, since whoever else writes to it may rely on waiting. Where it can't be opened (it is a
/// socket, or another user's) all stays as it was.
pub fn never_wait() {
    let is_pipe = fstat(io::stderr())
        .is_ok_and(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFIFO);
    let flags = OFlag::O_WRONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    if is_pipe && let Ok(pipe) = open("/proc/self/fd/2", flags, Mode::empty()) {
        let _ = fcntl(&pipe, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE));
        let _ = dup2_stderr(&pipe);
    }
}

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
                match stderr.write(bytes) {
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
        for c in self.0.chars().take(MAX_QUOTED) {
            write!(f, "{}", c.escape_debug())?;
        }
        if self.0.chars().nth(MAX_QUOTED).is_some() {
            f.write_str("…")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_can_forge_a_line() {
        assert_eq!(Quoted("a\nb\u{1b}[0m\"c").to_string(), "a\\nb\\u{1b}[0m\\\"c");
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
