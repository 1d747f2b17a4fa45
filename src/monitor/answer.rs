//! Questions of a worker to the system, answered by a child that is no more than the worker: NSS may load any code and
//! talk to anybody, and files are those that the worker's user may read.

use std::{fs::File, io::Write, os::fd::OwnedFd};

use nix::{
    sys::{prctl, signal::Signal},
    unistd::{Pid, getppid, setsid},
};

use super::{
    child::{NOT_RUN, keep_only, refused},
    wire::{self, Question, Refusal, Report},
};
use crate::{config::Config, inquiry, logging::Chain, worker::WorkerUser};

/// Answers as `user`, in a process just forked from `monitor`. Returns the exit status.
pub(super) fn answer(
    question: &Question,
    config: &Config,
    user: &WorkerUser,
    monitor: Pid,
    report: &OwnedFd,
) -> i32 {
    if keep_only(report).is_err() {
        return NOT_RUN;
    }
    let answer = become_worker(user, monitor).and_then(|()| find_out(question, config));
    let (status, report_text, bytes) = match answer {
        Ok((answer, bytes)) => (0, answer, bytes),
        Err(refusal) => (NOT_RUN, Report::Refusal(refusal), Vec::new()),
    };
    if let (Ok(head), Ok(pipe)) = (wire::encode(&report_text), report.try_clone()) {
        let mut pipe = File::from(pipe);
        // The worker may be gone; then nobody misses it.
        let _ = pipe.write_all(&head).and_then(|()| pipe.write_all(&bytes));
    }
    status
}

fn become_worker(user: &WorkerUser, monitor: Pid) -> Result<(), Refusal> {
    setsid().map_err(|e| refused("setsid", e))?;
    user.take_over().map_err(|e| refused("privileges", Chain(&e)))?;
    prctl::set_no_new_privs().map_err(|e| refused("prctl(PR_SET_NO_NEW_PRIVS)", e))?;
    prctl::set_dumpable(false).map_err(|e| refused("prctl(PR_SET_DUMPABLE)", e))?;
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|e| refused("prctl(PR_SET_PDEATHSIG)", e))?;
    if getppid() == monitor { Ok(()) } else { Err(Refusal::Check("the monitor is gone".into())) }
}

fn find_out(question: &Question, config: &Config) -> Result<(Report, Vec<u8>), Refusal> {
    let no_such = || Refusal::Check("the configuration has no such thing".into());
    match question {
        Question::Uid(name) => {
            let uid = inquiry::uid(name).map_err(|e| refused("user database (getpwnam)", e))?;
            Ok((Report::Uid(uid), Vec::new()))
        }
        Question::Host { resolver, server } => {
            let host = inquiry::server_host(config, *resolver, *server).ok_or_else(no_such)?;
            let addresses = inquiry::addresses(host).map_err(|e| refused(host, e))?;
            Ok((Report::Addresses(addresses), Vec::new()))
        }
        Question::File(number) => {
            let path = inquiry::source_files(config).nth(*number).ok_or_else(no_such)?;
            let reading = crate::resolver::source::read(path).map_err(|e| Refusal::Check(e.to_string()))?;
            Ok((Report::File(reading.identity), reading.bytes))
        }
    }
}
