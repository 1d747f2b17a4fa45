//! The privileged side: one thread, no async runtime, and no byte of what a stranger sent is looked at.
//!
//! The monitor binds the sockets, starts the worker, and serves an enumerated table of requests,
//! [`wire::Request`]: *inspect* a user, *run* a user's filter, *log* to a user's own log, *ask* the system. Each is done by
//! a forked child ([`child`]) that becomes the user before it touches anything of theirs ([`answer`]: the worker's own). The worker names a user; what is executed is found, and
//! checked, by the child. A malformed or excessive request ends the worker.
//!
//! [`supervise`] is the loop: requests, ended children, time limits, reload and shutdown.

mod answer;
mod checks;
mod child;
mod guard;
mod history;
mod jobs;
mod manager;
mod privileges;
mod sockets;
mod supervise;
mod user_log;
mod wire;

#[cfg(fuzzing)]
pub use child::{Examined, examine};
pub use history::{History, Incident};
pub use sockets::{Activated, BindError};
pub use supervise::{MonitorError, run_once, serve, serve_with};
pub use wire::{
    End, Event, FilterFile, Inspection, JobId, MAX_PACKET, MAX_REPORT, Malformed, Phase, Question, Refusal,
    Report, Request, RulesSource, Variable, decode, decode_first, encode,
};

/// Whether a program would pass the checks that are made before it is executed as a filter, if it must belong to root or to
/// `owner`: for `usermilter check`.
///
/// # Errors
///
/// Which check fails, on which path.
pub fn check_executable(path: &std::path::Path, owner: u32) -> Result<(), String> {
    checks::executable(path, owner).map(drop).map_err(|error| match error {
        checks::CheckError::Missing => format!("{}: {error}", path.display()),
        checks::CheckError::Failed { .. } => error.to_string(),
    })
}
