//! The children that run for workers: started, timed, ended, reaped.

use std::{
    collections::HashMap,
    fs,
    os::fd::{OwnedFd, RawFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill, killpg},
    unistd::{Pid, getpid},
};
use tracing::debug;

use super::{
    answer::answer,
    child::{Child, NOT_RUN, Parent, Run},
    guard::{Guard, Place},
    wire::{End, JobId, Request},
};
use crate::{
    config::{Config, Filter},
    sys::{self, ChildEnd},
    worker::WorkerUser,
};

/// From SIGTERM to SIGKILL.
const GRACE: Duration = Duration::from_secs(2);

/// Time limit of an inspection, an entry for a log, or an answer, which only touch a few files or ask NSS; a home or a
/// name server that hangs must not hold them for ever.
const FILES_TIME_LIMIT: Duration = Duration::from_secs(10);

/// Inspections, entries for logs and questions that a worker may have under way, beside `max-processes` filters.
pub(super) const MAX_FILE_JOBS: usize = 32;

/// Number by which the monitor tells its workers apart.
pub(super) type WorkerId = u64;

/// All children that are not workers.
pub(super) struct Jobs {
    running: HashMap<Pid, Job>,
    parent: Parent,
    guard: Guard,
}

struct Job {
    worker: WorkerId,
    id: JobId,
    started: Instant,
    /// When to send the next signal.
    deadline: Instant,
    stage: Stage,
    /// In the guard's table.
    place: Option<Place>,
}

/// How far the ending of a job has come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Running,
    Terminated,
    Killed,
}

/// A job that ended.
pub(super) struct Ended {
    pub(super) worker: WorkerId,
    pub(super) id: JobId,
    pub(super) end: End,
    pub(super) elapsed: Duration,
}

/// A request that no honest worker sends.
#[derive(Debug, thiserror::Error)]
pub(super) enum BadRequest {
    #[error("request with {0} descriptors")]
    Descriptors(usize),
    #[error("no job")]
    NoJob,
}

impl Jobs {
    /// None yet.
    pub(super) fn new() -> nix::Result<Self> {
        Ok(Self { running: HashMap::new(), parent: Parent::this_process()?, guard: Guard::start()? })
    }

    /// The descriptor that no child may keep.
    pub(super) fn guard_descriptor(&self) -> RawFd {
        self.guard.descriptor()
    }

    /// Jobs that a worker may have under way.
    pub(super) fn limit(settings: &Filter) -> usize {
        settings.max_processes + MAX_FILE_JOBS
    }

    /// Starts the child that a request asks for. `Some` if it could not be forked, or there are too many already: an
    /// honest worker comes to that when it gave up on children that the kernel holds, in a home that hangs.
    pub(super) fn start(
        &mut self,
        worker: WorkerId,
        request: &Request<'_>,
        descriptors: &[OwnedFd],
        config: &Config,
        worker_user: &WorkerUser,
    ) -> Result<Option<Ended>, BadRequest> {
        let settings = &config.filter;
        let has_room = self.of_worker(worker) < Self::limit(settings);
        let fork_job = |job: &dyn Fn() -> i32| if has_room { fork_job(job) } else { Err(Errno::EAGAIN) };
        let child = Child { settings, parent: &self.parent };
        let (id, time_limit, forked) = match request {
            Request::Ready | Request::Alive => return Err(BadRequest::NoJob),
            Request::Inspect { job, user } => {
                let report = only(descriptors)?;
                (*job, FILES_TIME_LIMIT, fork_job(&|| child.inspect(user, report)))
            }
            Request::Log { job, user, text } => {
                let report = only(descriptors)?;
                (*job, FILES_TIME_LIMIT, fork_job(&|| child.log(user, text, report)))
            }
            Request::Ask { job, question } => {
                let report = only(descriptors)?;
                let monitor = getpid();
                (*job, FILES_TIME_LIMIT, fork_job(&|| answer(question, config, worker_user, monitor, report)))
            }
            Request::Run { job, user, phase, extension, variables, time_limit } => {
                let (stdin, stdout, stderr) = match descriptors {
                    [stdin, stdout, stderr] => (Some(stdin), stdout, stderr),
                    [stdout, stderr] => (None, stdout, stderr),
                    _ => return Err(BadRequest::Descriptors(descriptors.len())),
                };
                let (phase, extension) = (*phase, *extension);
                let run = Run { user, phase, extension, variables, stdin, stdout, stderr };
                let time_limit = Duration::from_millis(*time_limit).min(settings.timeout.0);
                (*job, time_limit, fork_job(&|| child.run(&run)))
            }
        };
        let started = Instant::now();
        match forked {
            Ok(pid) => {
                let deadline = started + time_limit;
                let (stage, place) = (Stage::Running, self.guard.add(pid));
                self.running.insert(pid, Job { worker, id, started, deadline, stage, place });
                Ok(None)
            }
            Err(errno) => {
                let end = End::NotStarted(errno as i32);
                Ok(Some(Ended { worker, id, end, elapsed: Duration::ZERO }))
            }
        }
    }

    /// Takes note of a child that waits to be reaped, and ends what it left in its process group. `None`: not ours.
    ///
    /// To be called before the child is reaped: until then its pid, and so the group's number, is taken.
    pub(super) fn ended(&mut self, pid: Pid, end: ChildEnd) -> Option<Ended> {
        let mut job = self.running.remove(&pid)?;
        if let Some(place) = job.place.take() {
            self.guard.remove(place);
        }
        let _ = killpg(pid, Signal::SIGKILL);
        let end = match (job.stage, end) {
            (Stage::Running, ChildEnd::Exited(NOT_RUN)) if never_executed(pid) => End::NotRun,
            (Stage::Running, ChildEnd::Exited(status)) => End::Exited(status),
            (Stage::Running, ChildEnd::Signaled(signal)) => End::Signaled(signal),
            _ => End::TimedOut,
        };
        Some(Ended { worker: job.worker, id: job.id, end, elapsed: job.started.elapsed() })
    }

    /// Ends every job whose time is up: SIGTERM to the whole group, SIGKILL [`GRACE`] later.
    pub(super) fn enforce_deadlines(&mut self, now: Instant) {
        for (pid, job) in &mut self.running {
            if job.deadline > now {
                continue;
            }
            let (signal, stage) = match job.stage {
                Stage::Running => (Signal::SIGTERM, Stage::Terminated),
                Stage::Terminated | Stage::Killed => (Signal::SIGKILL, Stage::Killed),
            };
            debug!(%pid, %signal, "time is up");
            signal_group(*pid, signal);
            job.stage = stage;
            job.deadline = now + GRACE;
        }
    }

    /// When [`Jobs::enforce_deadlines`] has something to do next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.running.values().map(|job| job.deadline).min()
    }

    /// Begins to end the jobs of a worker that is gone.
    pub(super) fn end_of_worker(&mut self, worker: WorkerId) {
        let now = Instant::now();
        for job in self.running.values_mut().filter(|job| job.worker == worker && job.stage == Stage::Running)
        {
            job.deadline = now;
        }
        self.enforce_deadlines(now);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    fn of_worker(&self, worker: WorkerId) -> usize {
        self.running.values().filter(|job| job.worker == worker).count()
    }
}

/// Forks a child that handles signals as any program does. What else it has of the monitor's is closed by the job, before
/// all else: a child that hangs must not keep a socket open that was closed, nor be a way from a user to the channels.
fn fork_job(job: impl FnOnce() -> i32) -> nix::Result<Pid> {
    sys::fork(|| match sys::restore_signals() {
        Ok(()) => job(),
        Err(_) => NOT_RUN,
    })
}

/// Whether a child that has ended, and is not reaped, never became another program: PF_FORKNOEXEC among the flags of
/// proc_pid_stat(5), which a user has no way to set. Where /proc can't be read (hidepid= with another group), a status that
/// children of ours alone should have is believed: what was never run must not be taken for a filter's word.
fn never_executed(pid: Pid) -> bool {
    const PF_FORKNOEXEC: u64 = 0x40;
    let stat = fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name, in parentheses, is whatever the program calls itself.
    let after_name = stat.rsplit(|byte| *byte == b')').next().unwrap_or_default();
    let flags = std::str::from_utf8(after_name).ok().and_then(|fields| fields.split_whitespace().nth(6));
    flags.and_then(|flags| flags.parse::<u64>().ok()).is_none_or(|flags| flags & PF_FORKNOEXEC != 0)
}

fn only(descriptors: &[OwnedFd]) -> Result<&OwnedFd, BadRequest> {
    match descriptors {
        [descriptor] => Ok(descriptor),
        _ => Err(BadRequest::Descriptors(descriptors.len())),
    }
}

/// Signals a child and its group; a child that has no group yet is alone.
fn signal_group(pid: Pid, signal: Signal) {
    if let Err(Errno::ESRCH) = killpg(pid, signal) {
        let _ = kill(pid, signal);
    }
}
