//! Starting and ending servers so that none outlives the test run, even one that is killed.

use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::wait_until;

/// A server in a process group of its own; ended when dropped, and when the test process dies.
#[derive(Debug)]
pub struct Server {
    child: Child,
    status: Option<ExitStatus>,
    guard: Option<Guard>,
}

impl Server {
    /// Starts it.
    #[track_caller]
    pub fn start(command: &mut Command) -> Self {
        let child = command.process_group(0).spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let guard = Guard::start(child.id());
        Server { child, status: None, guard: Some(guard) }
    }

    /// Its standard error, if that was set up as a pipe and not taken yet.
    pub fn stderr(&mut self) -> Option<ChildStderr> {
        self.child.stderr.take()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The exit status, if it has ended.
    pub fn status(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().expect("wait for a child");
        }
        if self.status.is_some() {
            self.guard = None;
        }
        self.status
    }

    /// Sends a signal to the server itself (not to its group), if it still runs.
    pub fn signal(&mut self, signal: Signal) {
        if self.status().is_none() {
            kill(pid_of(&self.child), signal).expect("signal a child");
        }
    }

    /// SIGTERM, and the exit status; `None` if it has not ended in time.
    pub fn terminate(&mut self, timeout: Duration) -> Option<ExitStatus> {
        self.signal(Signal::SIGTERM);
        wait_until(timeout, || self.status().is_some());
        self.status
    }

    /// SIGKILL to it and its group.
    pub fn kill(&mut self) {
        if self.status().is_none() {
            let _ = killpg(pid_of(&self.child), Signal::SIGKILL);
            self.status = self.child.wait().ok();
            self.guard = None;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.terminate(Duration::from_secs(5)).is_none() {
            self.kill();
        }
    }
}

/// A process that ends the server when this one is gone, known by the end of a pipe that only we hold open.
///
/// PR_SET_PDEATHSIG would not do: the kernel forgets it when Postfix's master changes its effective user.
#[derive(Debug)]
struct Guard(Child);

impl Guard {
    fn start(server: u32) -> Self {
        const SCRIPT: &str = "read -r _; kill -TERM $0 && sleep 5 && kill -KILL $0";
        let mut command = Command::new("/bin/sh");
        command.args(["-c", SCRIPT, &server.to_string()]).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Guard(command.spawn().expect("start /bin/sh"))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Killed before it sees the end of its pipe: the pid may soon be somebody else's.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}
