//! The service manager, if there is one that speaks sd_notify(3): told how the daemon is, and given a sign of life as
//! long as there is a worker that answers. Without one, nothing of this happens.

use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tracing::warn;

/// The manager's watchdog waits for signs of life. Half of its time passes between two of them (sd_watchdog_enabled(3)).
pub(super) struct Manager {
    every: Option<Duration>,
    next: Option<Instant>,
}

impl Manager {
    /// As the environment says.
    pub(super) fn new() -> Self {
        let every = sd_notify::watchdog_enabled().map(|watchdog| watchdog / 2).filter(|time| !time.is_zero());
        Self { every, next: every.map(|_| Instant::now()) }
    }

    /// The time between two signs of life, if the manager wants any.
    pub(super) fn interval(&self) -> Option<Duration> {
        self.every
    }

    /// The daemon serves, or serves again after [`Manager::reloading`].
    pub(super) fn ready(&self, status: &str) {
        tell(&[NotifyState::Ready, NotifyState::MainPid(std::process::id()), NotifyState::Status(status)]);
    }

    /// A new configuration is about to be tried.
    pub(super) fn reloading(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => tell(&[NotifyState::Reloading, now, NotifyState::Status("reloading")]),
            Err(error) => warn!("no monotonic time for the service manager: {error}"),
        }
    }

    /// Something that an operator would like to see.
    pub(super) fn status(&self, status: &str) {
        tell(&[NotifyState::Status(status)]);
    }

    /// The daemon begins to end.
    pub(super) fn stopping(&self) {
        tell(&[NotifyState::Stopping, NotifyState::Status("finishing transactions")]);
    }

    /// When [`Manager::sign_of_life`] has something to do.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.next
    }

    /// To be called when all is well, at the latest at the deadline.
    pub(super) fn sign_of_life(&mut self, now: Instant) {
        if let (Some(every), Some(next)) = (self.every, self.next)
            && next <= now
        {
            tell(&[NotifyState::Watchdog]);
            self.next = Some(now + every);
        }
    }

    /// Puts off what is due: all is not well.
    pub(super) fn withhold_until(&mut self, later: Instant) {
        self.next = self.next.map(|next| next.max(later));
    }
}

/// What can't be told is no reason to serve less.
fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!("the service manager can't be told: {error}");
    }
}
