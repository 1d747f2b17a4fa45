//! One user's filter: run through the monitor, and its exit status and output read as a verdict.
//!
//! The table of exit statuses is the contract of `usermilter-filter(7)`: 0 accepts, 99 accepts and ends the matter
//! (qmail-command(8)), the permanent errors of sysexits.h as Postfix local(8) and pipe(8) read them reject, the
//! temporary ones defer, and everything else is a *filter error*, which never rejects.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::{
    config,
    metrics::{FilterMetrics, OneMore, RunningFilter},
    monitor::{End, Phase, Refusal, Variable},
    reply::Reply,
    shares::Shares,
    spool::Message,
    user::User,
    verdict::{Opinion, Verdict},
    worker::{Finished, Monitor, RunRequest},
};

/// What an exit status means, before any override.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// A verdict.
    Verdict(Verdict),
    /// Accept, and ask nothing further.
    AcceptFinally,
    /// None of the documented ones.
    Error,
}

impl Meaning {
    /// The built-in table.
    pub fn of_status(status: i32) -> Self {
        match status {
            0 => Self::Verdict(Verdict::Accept),
            99 => Self::AcceptFinally,
            // EX_NOPERM; EX_DATAERR, EX_NOUSER, EX_NOHOST, EX_UNAVAILABLE, EX_PROTOCOL; qmail's 100.
            77 | 65 | 67 | 68 | 69 | 76 | 100 => Self::Verdict(Verdict::Reject),
            // EX_TEMPFAIL, EX_OSERR, qmail's 111.
            75 | 71 | 111 => Self::Verdict(Verdict::Defer),
            _ => Self::Error,
        }
    }
}

/// How asking a filter ended, in one word of a few.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerKind {
    /// A documented exit status that accepts.
    Accept,
    /// One that rejects.
    Reject,
    /// One that defers.
    Defer,
    /// There was no filter any more, which accepts.
    Gone,
    /// An exit status that means nothing. This one and the rest are filter errors.
    ExitStatus,
    /// Death by a signal.
    Signal,
    /// It took too long.
    Timeout,
    /// The system would not execute it, or a check failed.
    NotExecutable,
    /// Our own trouble, or there was no room before the deadline.
    NotStarted,
}

impl AnswerKind {
    /// The word used in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::Reject => "reject",
            Self::Defer => "defer",
            Self::Gone => "gone",
            Self::ExitStatus => "exit-status",
            Self::Signal => "signal",
            Self::Timeout => "timeout",
            Self::NotExecutable => "not-executable",
            Self::NotStarted => "not-started",
        }
    }

    /// Whether `on-error` applies.
    pub fn is_error(self) -> bool {
        !matches!(self, Self::Accept | Self::Reject | Self::Defer | Self::Gone)
    }
}

/// What a filter said.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its opinion, or what a filter error stands for.
    pub opinion: Opinion,
    /// Whether it wants no further question (exit status 99).
    pub is_final: bool,
    /// For the log: `exit 77`, `signal 9`, `timeout`, or why it was not run.
    pub status: String,
    /// The same in one word.
    pub kind: AnswerKind,
    /// How long it ran.
    pub elapsed: Duration,
    /// What it wrote to standard output.
    pub output: String,
    /// What it wrote to standard error.
    pub error_output: String,
}

impl Answer {
    /// Whether it was a filter error.
    pub fn is_error(&self) -> bool {
        self.kind.is_error()
    }
}

/// A filter to be asked.
pub struct Question<'a> {
    /// Whose filter.
    pub user: &'a User,
    /// Which.
    pub phase: Phase,
    /// Extension of the address.
    pub extension: Option<&'a str>,
    /// The MTA's name for the mail.
    pub queue_id: &'a str,
    /// Environment, without what is known only when the filter starts.
    pub variables: Vec<(Variable, String)>,
    /// The message, in [`Phase::Message`].
    pub message: Option<&'a Message>,
    /// When the answer is of no use any more.
    pub deadline: Instant,
    /// Whether the reply may go beyond ASCII.
    pub smtputf8: bool,
}

/// Room for one filter, among those of its user and among all; free again when dropped.
#[derive(Debug, Default)]
pub struct Room {
    _own: Option<OwnedSemaphorePermit>,
    _shared: Option<OwnedSemaphorePermit>,
}

/// Runs filters, not too many at a time.
#[derive(Debug)]
pub struct Filters {
    monitor: Arc<Monitor>,
    settings: config::Filter,
    all: Arc<Semaphore>,
    shares: Shares,
    metrics: FilterMetrics,
}

impl Filters {
    /// For a worker.
    pub fn new(monitor: Arc<Monitor>, settings: config::Filter, metrics: FilterMetrics) -> Self {
        let all = Arc::new(Semaphore::new(settings.max_processes));
        let shares = Shares::new(settings.max_processes_per_user);
        Self { monitor, settings, all, shares, metrics }
    }

    /// Asks a filter when there is room for it. `None` if `not_needed` was cancelled before it could start.
    ///
    /// The answer comes with the filter's room, so that whoever learns from it that no other is needed can say so
    /// before another takes the room.
    pub async fn ask(
        &self,
        question: Question<'_>,
        not_needed: &CancellationToken,
    ) -> Option<(Answer, Room)> {
        let (came, waiting) = (Instant::now(), OneMore::of(&self.metrics.waiting));
        let room = tokio::select! {
            biased;
            () = not_needed.cancelled() => return None,
            () = tokio::time::sleep_until(question.deadline.into()) => None,
            room = self.room(question.user) => Some(room),
        };
        drop(waiting);
        self.metrics.queue_time.of(question.phase).observe(came.elapsed());
        let (answer, room) = match room {
            Some(room) => (self.run(&question).await, room),
            None => {
                let why = "not started before the deadline".into();
                (self.error(AnswerKind::NotStarted, why, Duration::ZERO), Room::default())
            }
        };
        self.metrics.answers.of((question.phase, answer.kind)).inc();
        if !answer.elapsed.is_zero() {
            self.metrics.run_time.of(question.phase).observe(answer.elapsed);
        }
        Some((answer, room))
    }

    /// The user's own permit first: whoever waits for it must not hold one of everybody's.
    async fn room(&self, user: &User) -> Room {
        let own = self.shares.take(&user.name).await;
        Room { _own: own, _shared: Arc::clone(&self.all).acquire_owned().await.ok() }
    }

    async fn run(&self, question: &Question<'_>) -> Answer {
        let left = question.deadline.saturating_duration_since(Instant::now());
        let time_limit = left.min(self.settings.timeout.0);
        let message = match question.message.map(Message::open).transpose() {
            Ok(message) => message,
            Err(error) => {
                let why = format!("cannot open the message: {error}");
                return self.error(AnswerKind::NotStarted, why, Duration::ZERO);
            }
        };
        let _running = self.metrics.running.enter(RunningFilter {
            user: question.user.name.as_str().to_owned(),
            phase: question.phase.as_str(),
            queue_id: question.queue_id.to_owned(),
            started: Instant::now(),
        });
        let mut variables = question.variables.clone();
        variables.push((Variable::Deadline, time_limit.as_secs().to_string()));
        let request = RunRequest {
            user: question.user.clone(),
            phase: question.phase,
            extension: question.extension.map(str::to_owned),
            variables,
            time_limit,
            message,
        };
        match self.monitor.run(request).await {
            Ok(finished) => self.judge(&finished, question.smtputf8),
            Err(error) => {
                self.error(AnswerKind::NotStarted, format!("cannot be run: {error}"), Duration::ZERO)
            }
        }
    }

    fn judge(&self, finished: &Finished, smtputf8: bool) -> Answer {
        let output = String::from_utf8_lossy(&finished.output).into_owned();
        let error_output = String::from_utf8_lossy(&finished.error_output).into_owned();
        let answer = self.judge_end(finished, &output, smtputf8);
        Answer { output, error_output, ..answer }
    }

    fn judge_end(&self, finished: &Finished, text: &str, smtputf8: bool) -> Answer {
        let elapsed = finished.ended.elapsed;
        match &finished.refusal {
            None => (),
            // Gone since the user was inspected: as if there had been none.
            Some(Refusal::NoFilter | Refusal::NoUser) => {
                return Answer { kind: AnswerKind::Gone, ..accepted("filter is gone".into(), elapsed) };
            }
            Some(Refusal::Check(why)) => {
                return self.error(AnswerKind::NotExecutable, format!("not run: {why}"), elapsed);
            }
        }
        let status = match finished.ended.end {
            End::Exited(status) => status,
            End::Signaled(signal) => {
                let name = nix::sys::signal::Signal::try_from(signal).map_or("unknown", |s| s.as_str());
                return self.error(AnswerKind::Signal, format!("killed by {name}"), elapsed);
            }
            End::TimedOut => {
                return self.error(AnswerKind::Timeout, "timed out".into(), elapsed);
            }
            End::NotRun => return self.error(AnswerKind::NotExecutable, "not run".into(), elapsed),
            End::NotStarted(errno) => {
                let why = nix::errno::Errno::from_raw(errno).desc();
                return self.error(AnswerKind::NotStarted, format!("not started: {why}"), elapsed);
            }
        };
        let overridden = u8::try_from(status).ok().and_then(|s| self.settings.exit_status.get(&s));
        let meaning =
            overridden.map_or_else(|| Meaning::of_status(status), |verdict| Meaning::Verdict(*verdict));
        let (opinion, kind) = match meaning {
            Meaning::Error => {
                return self.error(AnswerKind::ExitStatus, format!("exit {status}"), elapsed);
            }
            Meaning::AcceptFinally | Meaning::Verdict(Verdict::Accept) => {
                (Opinion::Accept, AnswerKind::Accept)
            }
            Meaning::Verdict(Verdict::Reject) => {
                (Opinion::Reject(Reply::from_text(Verdict::Reject, text, smtputf8)), AnswerKind::Reject)
            }
            Meaning::Verdict(Verdict::Defer) => {
                (Opinion::Defer(Reply::from_text(Verdict::Defer, text, smtputf8)), AnswerKind::Defer)
            }
        };
        let is_final = meaning == Meaning::AcceptFinally;
        Answer { opinion, is_final, kind, ..accepted(format!("exit {status}"), elapsed) }
    }

    fn error(&self, kind: AnswerKind, why: String, elapsed: Duration) -> Answer {
        let opinion = match self.settings.on_error.verdict() {
            Verdict::Defer => Opinion::Defer(Reply::trouble()),
            verdict => Opinion::plain(verdict),
        };
        Answer { opinion, kind, ..accepted(why, elapsed) }
    }
}

fn accepted(status: String, elapsed: Duration) -> Answer {
    Answer {
        opinion: Opinion::Accept,
        is_final: false,
        status,
        kind: AnswerKind::Accept,
        elapsed,
        output: String::new(),
        error_output: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_documented_exit_status_means_what_the_manual_says() {
        let of = Meaning::of_status;
        assert_eq!(of(0), Meaning::Verdict(Verdict::Accept));
        assert_eq!(of(99), Meaning::AcceptFinally);
        for status in [77, 65, 67, 68, 69, 76, 100] {
            assert_eq!(of(status), Meaning::Verdict(Verdict::Reject), "{status}");
        }
        for status in [75, 71, 111] {
            assert_eq!(of(status), Meaning::Verdict(Verdict::Defer), "{status}");
        }
        let documented = [0, 99, 77, 65, 67, 68, 69, 76, 100, 75, 71, 111];
        for status in (0..256).filter(|s| !documented.contains(s)) {
            assert_eq!(of(status), Meaning::Error, "{status}");
        }
    }
}
