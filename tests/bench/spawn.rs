//! The floor of every filter: fork, become the user, exec, wait, with nothing around it. The only unsafe code here.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use nix::sys::time::TimeSpec;
use nix::sys::wait::{WaitPidFlag, WaitStatus, wait, waitpid};
use nix::unistd::{
    ForkResult, Gid, Pid, Uid, dup2_stdin, dup2_stdout, execve, fork, geteuid, setgroups, setresgid,
    setresuid,
};

/// What is run, and as whom.
pub(crate) struct Program {
    pub(crate) path: CString,
    /// Standard input.
    pub(crate) input: CString,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// Runs it for a while, `at_a_time` at a time, from a process that must have one thread; how often, and how long that
/// took.
pub(crate) fn run_for(program: &Program, at_a_time: usize, duration: Duration) -> (u32, Duration) {
    let started = Instant::now();
    let count = run_while(program, at_a_time, |_| started.elapsed() < duration);
    (count, started.elapsed())
}

/// The same, so many times.
pub(crate) fn run_times(program: &Program, at_a_time: usize, count: u32) {
    run_while(program, at_a_time, |started| started < count);
}

/// As long as another one is wanted, after so many; how many there were.
fn run_while(program: &Program, at_a_time: usize, is_wanted: impl Fn(u32) -> bool) -> u32 {
    let (mut running, mut started) = (0, 0);
    loop {
        while running < at_a_time && is_wanted(started) {
            start(program);
            (running, started) = (running + 1, started + 1);
        }
        if running == 0 {
            return started;
        }
        let status = wait().expect("wait");
        assert!(matches!(status, WaitStatus::Exited(_, 0)), "{status:?}");
        running -= 1;
    }
}

/// Runs it at these times, whether or not those before have ended, from a process that must have one thread; from when
/// it was due to when its end is known.
pub(crate) fn at_times(program: &Program, times: &[Duration]) -> Vec<Duration> {
    let mut ends = SigSet::empty();
    ends.add(Signal::SIGCHLD);
    ends.thread_block().expect("sigprocmask");
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    let signals = SignalFd::with_flags(&ends, flags).expect("signalfd");
    let began = Instant::now();
    let mut due = times.iter().copied().peekable();
    let mut running: HashMap<Pid, Duration> = HashMap::new();
    let mut latencies = Vec::new();
    while due.peek().is_some() || !running.is_empty() {
        while let Some(time) = due.next_if(|time| *time <= began.elapsed()) {
            running.insert(start(program), time);
        }
        let left = due.peek().map(|time| TimeSpec::from(time.saturating_sub(began.elapsed())));
        ppoll(&mut [PollFd::new(signals.as_fd(), PollFlags::POLLIN)], left, None).expect("ppoll");
        while signals.read_signal().expect("signalfd").is_some() {}
        while let Ok(WaitStatus::Exited(pid, 0)) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            let time = running.remove(&pid).expect("a child of ours");
            latencies.push(began.elapsed().saturating_sub(time));
        }
    }
    latencies
}

fn start(program: &Program) -> Pid {
    // SAFETY: this process has one thread, so the child may do what the parent may.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let Err(errno) = become_program(program);
            eprintln!("{}: {errno}", program.path.to_string_lossy());
            // SAFETY: _exit(2) has no preconditions.
            unsafe { nix::libc::_exit(1) }
        }
    }
}

fn become_program(program: &Program) -> nix::Result<Infallible> {
    let (uid, gid) = (Uid::from_raw(program.uid), Gid::from_raw(program.gid));
    if geteuid().is_root() {
        setgroups(&[gid])?;
        setresgid(gid, gid, gid)?;
        setresuid(uid, uid, uid)?;
    }
    dup2_stdin(open(program.input.as_c_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?)?;
    dup2_stdout(open(c"/dev/null", OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?)?;
    execve::<&CStr, &CStr>(&program.path, &[&program.path], &[c"PATH=/usr/bin:/bin"])
}
