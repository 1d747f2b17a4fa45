//! What happens to filters when the monitor is killed and can end them no more.
//!
//! A filter itself then dies by PR_SET_PDEATHSIG; what it has forked would live on. The guard is a process of nothing but
//! a loop: it waits for the end of a pipe that only the monitor holds, and then ends every process group in a table that
//! only the monitor writes. It is nobody's child, listens to nobody, and has no other descriptor.

use std::{
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::atomic::{AtomicI32, Ordering},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::{
        signal::{Signal, killpg},
        stat::Mode,
        wait::waitpid,
    },
    unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout, pipe2, read, setsid},
};

use crate::sys::{self, SharedNumbers};

/// Process groups in the table; more than all workers together have jobs.
const MAX_GROUPS: usize = 4096;

/// The monitor's end.
pub(super) struct Guard {
    groups: SharedNumbers,
    free: Vec<usize>,
    /// Its end tells the guard that the monitor is gone.
    alive: OwnedFd,
}

/// A place in the table.
pub(super) struct Place(usize);

impl Guard {
    /// Starts the guard. To be called before there is anything that it should not inherit.
    pub(super) fn start() -> nix::Result<Self> {
        let groups = SharedNumbers::new(MAX_GROUPS)?;
        let (end, alive) = pipe2(OFlag::O_CLOEXEC)?;
        // Twice, so that it is not the monitor's child, whose ends mean something.
        let between = sys::fork(|| i32::from(sys::fork(|| watch(groups.slots(), &end)).is_err()))?;
        waitpid(between, None)?;
        // No other child may see the table: a worker could name groups in it that root would end.
        groups.hide_from_children()?;
        Ok(Self { groups, free: (0..MAX_GROUPS).rev().collect(), alive })
    }

    /// Takes note of a process group. `None`: there is no room, and it is not guarded.
    pub(super) fn add(&mut self, group: Pid) -> Option<Place> {
        let place = self.free.pop()?;
        self.groups.slots()[place].store(group.as_raw(), Ordering::Release);
        Some(Place(place))
    }

    /// Forgets a process group, before its number can be another's.
    pub(super) fn remove(&mut self, place: Place) {
        self.groups.slots()[place.0].store(0, Ordering::Release);
        self.free.push(place.0);
    }

    /// The descriptor that no other process may have.
    pub(super) fn descriptor(&self) -> RawFd {
        self.alive.as_raw_fd()
    }
}

/// Waits for the end of the monitor, in the guard. The monitor's signals stay blocked.
fn watch(groups: &[AtomicI32], end: &OwnedFd) -> i32 {
    let prepared = sys::close_all_but(&[end.as_raw_fd()])
        .and_then(|()| setsid())
        .and_then(|_| open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()))
        .and_then(|null| {
            dup2_stdin(&null).and_then(|()| dup2_stdout(&null)).and_then(|()| dup2_stderr(&null))
        });
    if prepared.is_err() {
        return 1;
    }
    while let Ok(1..) | Err(Errno::EINTR) = read(end, &mut [0; 16]) {}
    for group in groups {
        let group = group.load(Ordering::Acquire);
        if group > 1 {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
    }
    0
}
