//! The program under test: `usermilter serve`, with what it logs.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::Signal;

use super::process::Server;
use super::sandbox::{Sandbox, set_mode};
use super::{PATIENCE, wait_until};

/// Longer than a drain of the tests' configurations.
const TERMINATION: Duration = Duration::from_secs(30);

/// valgrind takes fifty times as long for everything.
const PATIENCE_WITH_WRAPPER: Duration = Duration::from_secs(120);

/// A running `usermilter serve`; ended when dropped, its log printed if the test is failing.
#[derive(Debug)]
pub struct Usermilter {
    server: Server,
    log: Arc<Log>,
    config: PathBuf,
    _sandbox: Sandbox,
}

impl Usermilter {
    /// Starts it as the invoking user and waits until it logs that it is ready.
    #[track_caller]
    pub fn start(config: &str) -> Self {
        Self::launch(config, None, &[], |_| ()).unwrap_or_else(|failure| panic!("{failure}"))
    }

    /// Starts it with something more in its environment, or other descriptors.
    #[track_caller]
    pub fn start_by(config: &str, prepare: impl FnOnce(&mut Command)) -> Self {
        Self::launch(config, None, &[], prepare).unwrap_or_else(|failure| panic!("{failure}"))
    }

    /// Starts it as the last arguments of another program, such as valgrind(1), and waits as long as that may take.
    #[track_caller]
    pub fn start_under(wrapper: &[String], config: &str) -> Self {
        Self::launch(config, None, wrapper, |_| ()).unwrap_or_else(|failure| panic!("{failure}"))
    }

    /// Starts it as this user, without supplementary groups.
    #[track_caller]
    pub fn start_as(config: &str, uid: u32, gid: u32) -> Self {
        Self::launch(config, Some((uid, gid)), &[], |_| ()).unwrap_or_else(|failure| panic!("{failure}"))
    }

    /// Starts it; `Err` has its exit status and what it wrote if it does not become ready.
    pub fn try_start(config: &str) -> Result<Self, StartFailure> {
        Self::launch(config, None, &[], |_| ())
    }

    /// The program: the one built with this test, or the one that `USERMILTER` names (an installed one, say).
    pub fn program() -> PathBuf {
        std::env::var_os("USERMILTER")
            .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_usermilter")), PathBuf::from)
    }

    fn launch(
        config: &str,
        user: Option<(u32, u32)>,
        wrapper: &[String],
        prepare: impl FnOnce(&mut Command),
    ) -> Result<Self, StartFailure> {
        let sandbox = Sandbox::new();
        let config = sandbox.write("usermilter.toml", config);
        let mut program = Self::program();
        if user.is_some() {
            program = reachable_copy(&program, &sandbox);
        }
        let mut command = match wrapper {
            [] => Command::new(&program),
            [wrapper, arguments @ ..] => {
                let mut command = Command::new(wrapper);
                command.args(arguments).arg(&program);
                command
            }
        };
        command.arg("serve").arg("--config").arg(&config);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // Not what a test run inherits from systemd.
        command.env_remove("NOTIFY_SOCKET").env_remove("JOURNAL_STREAM").env_remove("LISTEN_FDS");
        command.env_remove("LISTEN_PID").env_remove("LISTEN_FDNAMES");
        command.env_remove("WATCHDOG_USEC").env_remove("WATCHDOG_PID");
        prepare(&mut command);
        if let Some((uid, gid)) = user {
            // Being root, the standard library also clears the supplementary groups.
            command.uid(uid).gid(gid);
        }
        let mut server = Server::start(&mut command);
        let log = Log::collect(server.stderr().expect("stderr is a pipe"));
        let mut daemon = Usermilter { server, log, config, _sandbox: sandbox };

        let patience = if wrapper.is_empty() { PATIENCE } else { PATIENCE_WITH_WRAPPER };
        wait_until(patience, || daemon.server.status().is_some() || daemon.log.says_ready());
        match daemon.server.status() {
            None if daemon.log.says_ready() => Ok(daemon),
            status => {
                // What it last wrote may still be on its way.
                daemon.log.wait_closed(Duration::from_secs(1));
                Err(StartFailure { status, stderr: daemon.log.lines().join("\n") })
            }
        }
    }

    /// Everything logged so far.
    pub fn log_lines(&self) -> Vec<String> {
        self.log.lines()
    }

    /// The first line logged with this text in it, waiting for it; panics with the log when time is up.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str, timeout: Duration) -> String {
        self.wait_for_log_after(0, text, timeout)
    }

    /// As [`Usermilter::wait_for_log`], among the lines after the first `seen` (a former
    /// `log_lines().len()`).
    #[track_caller]
    pub fn wait_for_log_after(&self, seen: usize, text: &str, timeout: Duration) -> String {
        match self.log.wait_for(seen, text, timeout) {
            Some(line) => line,
            None => panic!("usermilter logged no {text:?} in {timeout:?}"),
        }
    }

    /// Leaves what is logged in the pipe, which is made as small as can be, from the next line on.
    pub fn stop_reading_log(&self) {
        self.log.set_reader(Reader::Stopped);
    }

    /// Ends [`Usermilter::stop_reading_log`].
    pub fn go_on_reading_log(&self) {
        self.log.set_reader(Reader::Reading);
    }

    /// Closes our end of the pipe after the next line.
    pub fn close_log(&self) {
        self.log.set_reader(Reader::Gone);
    }

    /// The configuration file, to be overwritten before [`Usermilter::reload`].
    pub fn config_path(&self) -> &Path {
        &self.config
    }

    /// Writes a new configuration; it takes effect with [`Usermilter::reload`].
    pub fn write_config(&self, config: &str) {
        fs::write(&self.config, config).unwrap();
    }

    /// SIGHUP.
    pub fn reload(&mut self) {
        self.server.signal(Signal::SIGHUP);
    }

    /// Any signal, to the monitor.
    pub fn signal(&mut self, signal: Signal) {
        self.server.signal(signal);
    }

    /// SIGTERM, and the exit status; panics if it does not end.
    #[track_caller]
    pub fn terminate(&mut self) -> ExitStatus {
        match self.server.terminate(TERMINATION) {
            Some(status) => status,
            None => panic!("usermilter did not end in {TERMINATION:?} after SIGTERM"),
        }
    }

    /// The exit status of a daemon that was told to end; panics if it does not.
    #[track_caller]
    pub fn terminate_without_signal(&mut self) -> ExitStatus {
        wait_until(TERMINATION, || self.server.status().is_some());
        self.server.status().unwrap_or_else(|| panic!("usermilter did not end in {TERMINATION:?}"))
    }

    /// The exit status, if it has ended.
    pub fn status(&mut self) -> Option<ExitStatus> {
        self.server.status()
    }

    /// The monitor's pid.
    pub fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// The pids of the monitor's children that run usermilter itself: the worker, two during a reload.
    pub fn worker_pids(&self) -> Vec<u32> {
        let identity =
            |pid: u32| fs::metadata(format!("/proc/{pid}/exe")).map(|exe| (exe.dev(), exe.ino())).ok();
        let ours = identity(self.pid());
        children(self.pid()).into_iter().filter(|&pid| identity(pid) == ours).collect()
    }

    /// The worker's pid, waiting until there is exactly one.
    #[track_caller]
    pub fn worker_pid(&self) -> u32 {
        let mut workers = Vec::new();
        let found = wait_until(PATIENCE, || {
            workers = self.worker_pids();
            workers.len() == 1
        });
        assert!(found, "not one worker: {workers:?}");
        workers[0]
    }
}

impl Drop for Usermilter {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- usermilter {}\n{}\n---", self.pid(), self.log.lines().join("\n"));
        }
    }
}

/// Why it did not become ready.
#[derive(Debug)]
pub struct StartFailure {
    /// `None` if it was still running.
    pub status: Option<ExitStatus>,
    pub stderr: String,
}

impl std::fmt::Display for StartFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.status {
            Some(status) => write!(f, "usermilter ended ({status}) before it was ready\n{}", self.stderr),
            None => write!(f, "usermilter did not log that it is ready\n{}", self.stderr),
        }
    }
}

/// The lines of a stream, collected by a thread so that the writer never blocks on us.
#[derive(Debug, Default)]
struct Log {
    state: Mutex<LogState>,
    grown: Condvar,
}

#[derive(Debug, Default)]
struct LogState {
    lines: Vec<String>,
    closed: bool,
    reader: Reader,
}

/// What becomes of the pipe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Reader {
    #[default]
    Reading,
    Stopped,
    Gone,
}

impl Log {
    fn collect(stream: ChildStderr) -> Arc<Self> {
        let log = Arc::new(Log::default());
        let writer = Arc::clone(&log);
        std::thread::spawn(move || {
            let mut reader = BufReader::new(stream);
            let mut line = Vec::new();
            while matches!(reader.read_until(b'\n', &mut line), Ok(1..)) {
                let text = String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned();
                writer.state.lock().unwrap().lines.push(text);
                writer.grown.notify_all();
                line.clear();
                let state = writer.state.lock().unwrap();
                if state.reader == Reader::Stopped {
                    // Refused while more than that is in it.
                    let _ = fcntl(reader.get_ref(), FcntlArg::F_SETPIPE_SZ(4096));
                }
                let state = writer.grown.wait_while(state, |state| state.reader == Reader::Stopped).unwrap();
                if state.reader == Reader::Gone {
                    break;
                }
            }
            writer.state.lock().unwrap().closed = true;
            writer.grown.notify_all();
        });
        log
    }

    fn set_reader(&self, reader: Reader) {
        self.state.lock().unwrap().reader = reader;
        self.grown.notify_all();
    }

    fn lines(&self) -> Vec<String> {
        self.state.lock().unwrap().lines.clone()
    }

    fn find(&self, seen: usize, text: &str) -> Option<String> {
        self.state.lock().unwrap().find(seen, text)
    }

    /// Whether a line has the word; not "already".
    fn says_ready(&self) -> bool {
        let is_word = |line: &String| line.split(|c: char| !c.is_alphanumeric()).any(|word| word == "ready");
        self.state.lock().unwrap().lines.iter().any(is_word)
    }

    fn wait_for(&self, seen: usize, text: &str, timeout: Duration) -> Option<String> {
        self.wait(timeout, |state| state.closed || state.find(seen, text).is_some());
        self.find(seen, text)
    }

    fn wait_closed(&self, timeout: Duration) {
        self.wait(timeout, |state| state.closed);
    }

    fn wait(&self, timeout: Duration, done: impl Fn(&LogState) -> bool) {
        let deadline = Instant::now() + timeout;
        let state = self.state.lock().unwrap();
        let left = deadline.saturating_duration_since(Instant::now());
        drop(self.grown.wait_timeout_while(state, left, |state| !done(state)).unwrap());
    }
}

impl LogState {
    fn find(&self, seen: usize, text: &str) -> Option<String> {
        self.lines.iter().skip(seen).find(|line| line.contains(text)).cloned()
    }
}

/// The program where any user can execute it: the build directory may be below a home that others can't
/// enter.
fn reachable_copy(program: &Path, sandbox: &Sandbox) -> PathBuf {
    let copy = sandbox.join("usermilter");
    if fs::hard_link(program, &copy).is_err() {
        fs::copy(program, &copy).unwrap_or_else(|e| panic!("{}: {e}", program.display()));
        set_mode(&copy, 0o755);
    }
    copy
}

/// The pids whose parent this is, from /proc/*/stat.
fn children(parent: u32) -> Vec<u32> {
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        // "pid (comm) state ppid …", and comm may contain anything.
        let ppid = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse::<u32>().ok());
        if ppid == Some(parent) {
            children.push(pid);
        }
    }
    children.sort_unstable();
    children
}
