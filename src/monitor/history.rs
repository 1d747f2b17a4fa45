//! What the monitor remembers of workers and reloads, for those who watch the daemon. A worker is told at its start, and
//! of reloads that fail while it serves.

use std::{collections::VecDeque, path::PathBuf, time::SystemTime};

/// Ends of workers that are told one by one.
const MAX_RECENT: usize = 10;

/// Longest text of an error, in bytes: it travels in a packet.
const MAX_ERROR_LENGTH: usize = 700;

/// What happened since the daemon started.
#[derive(Clone, Debug)]
pub struct History {
    /// When it did.
    pub started: SystemTime,
    /// The configuration file; `None`: the default one, if there is one.
    pub config_path: Option<PathBuf>,
    /// Workers that served, died, and were replaced.
    pub restarts: u64,
    /// The last of them.
    pub recent_restarts: VecDeque<Incident>,
    /// Reloads that took effect.
    pub reloads: u64,
    /// Reloads that changed nothing.
    pub reload_failures: u64,
    /// Why the last reload failed, if it did.
    pub last_reload_error: Option<Incident>,
}

/// What went wrong, and when.
#[derive(Clone, Debug)]
pub struct Incident {
    /// When.
    pub at: SystemTime,
    /// What.
    pub what: String,
}

impl Incident {
    fn now(what: String) -> Self {
        Self { at: SystemTime::now(), what }
    }
}

impl History {
    /// Nothing has happened yet.
    pub fn new(config_path: Option<PathBuf>) -> Self {
        Self {
            started: SystemTime::now(),
            config_path,
            restarts: 0,
            recent_restarts: VecDeque::new(),
            reloads: 0,
            reload_failures: 0,
            last_reload_error: None,
        }
    }

    /// A worker that served has died.
    pub(super) fn worker_died(&mut self, how: String) {
        self.restarts += 1;
        self.recent_restarts.truncate(MAX_RECENT - 1);
        self.recent_restarts.push_front(Incident::now(how));
    }

    /// A new configuration has taken effect.
    pub(super) fn reloaded(&mut self) {
        self.reloads += 1;
        self.last_reload_error = None;
    }

    /// A new configuration has not taken effect.
    pub fn reload_failed(&mut self, error: &str) {
        self.reload_failures += 1;
        self.last_reload_error = Some(Incident::now(shortened(error).to_owned()));
    }
}

/// The start of an error's text that fits into a packet.
pub(super) fn shortened(error: &str) -> &str {
    let end = (0..=error.len().min(MAX_ERROR_LENGTH)).rev().find(|end| error.is_char_boundary(*end));
    &error[..end.unwrap_or(0)]
}
