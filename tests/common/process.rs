//! Starting and ending servers so that none outlives the test run, even one that is killed.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Mutex, OnceLock, mpsc};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::wait_until;

/// A server: its own process group, SIGTERM if the test process dies, ended when dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    status: Option<ExitStatus>,
}

impl Server {
    /// A command that runs `program` and dies with the test process.
    ///
    /// `setpriv` asks the kernel for the signal at the parent's death and execs the program, so the pid is the program's.
    pub fn command(program: &Path) -> Command {
        let mut command = Command::new(super::require("setpriv"));
        command
            .args(["--pdeathsig", "TERM", "--"])
            .arg(program)
            .process_group(0);
        command
    }

    /// Starts a command that [`Server::command`] made.
    pub fn start(command: Command) -> Self {
        Server {
            child: spawn(command),
            status: None,
        }
    }

    /// The standard streams that were set up as pipes.
    pub fn streams(
        &mut self,
    ) -> (
        Option<std::process::ChildStdout>,
        Option<std::process::ChildStderr>,
    ) {
        (self.child.stdout.take(), self.child.stderr.take())
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The exit status, if it has ended.
    pub fn status(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().expect("wait for a child");
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

/// Spawns from a thread that lives as long as the process.
///
/// The death signal comes when the *thread* that spawned ends, and a test's thread may end before a server that
/// several tests share.
fn spawn(command: Command) -> Child {
    type Order = (Command, mpsc::Sender<std::io::Result<Child>>);
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<Order>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, reply) in inbox {
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(orders)
    });
    let program = format!("{command:?}");
    let (reply, answer) = mpsc::channel();
    spawner
        .lock()
        .unwrap()
        .send((command, reply))
        .expect("spawner thread");
    answer
        .recv()
        .expect("spawner thread")
        .unwrap_or_else(|e| panic!("{program}: {e}"))
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}
