//! A worker that an attacker owns: a stand-in speaks to the real monitor as no honest worker would. Whatever it says,
//! nothing runs but users' own checked filters, the monitor lives, and it keeps nothing.
//!
//! This program is its own monitor, which must have one thread, so that the usual test harness can't host it:
//! each test starts it again with [`MONITOR`]. The stand-in attacks in its first life; the one that follows it is honest.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../site/mod.rs"]
mod site;
mod stand_in;

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use common::process::Server;
use common::{Sandbox, VirtualUsers, wait_until};

/// First argument of the process that is to be the monitor; the configuration, the scene and the attack follow.
const MONITOR: &str = "be-the-monitor";

/// Descriptors of a monitor whose worker is honest: 0 to 2, a listener, signals, the channel.
const USUAL_DESCRIPTORS: u32 = 7;

/// Patience with what should take a second.
const SOON: Duration = Duration::from_secs(15);

type Test = (&'static str, fn());

const TESTS: &[Test] = &[
    ("a_worker_that_breaks_the_protocol_is_ended_and_followed_by_another", malformed),
    ("nothing_is_kept_of_refused_descriptors_even_when_they_run_short", short_of_descriptors),
    ("no_request_runs_what_is_no_users_own_filter", foreign_users),
    ("a_filter_gets_no_descriptor_of_another_kind", wrong_kinds),
    ("a_worker_that_never_reads_is_ended_and_starts_no_more_than_its_share", flood),
    ("a_flood_of_requests_does_not_hold_up_the_end", flood_and_stop),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == MONITOR) {
        return be_the_monitor(&arguments[1]);
    }
    // As the usual harness: words that are no option choose tests, `--list` names them.
    let words: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let chosen = TESTS
        .iter()
        .filter(|(name, _)| words.is_empty() || words.iter().any(|word| name.contains(word.as_str())));
    let mut failed = false;
    for (name, test) in chosen {
        if arguments.iter().any(|argument| argument == "--list") {
            println!("{name}: test");
            continue;
        }
        let passed = std::panic::catch_unwind(test).is_ok();
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        failed |= !passed;
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn be_the_monitor(config: &str) -> ExitCode {
    usermilter::sys::close_all_but(&[]).unwrap();
    let path = PathBuf::from(config);
    let config = usermilter::config::Config::load(Some(&path)).unwrap();
    usermilter::logging::start(&config.log);
    match usermilter::monitor::serve_with(Some(path), config, stand_in::start) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Where an attack takes place.
struct Scene {
    sandbox: Sandbox,
    users: VirtualUsers,
    config: PathBuf,
}

impl Scene {
    fn new() -> Self {
        common::require_root();
        let sandbox = Sandbox::new();
        let mut users = VirtualUsers::new(&sandbox, &[("alice", 5001), ("bob", 5002)]);
        // One who may not have filters, but has one.
        users.add("low", 4999, 4999);
        for user in ["alice", "bob", "low"] {
            let script =
                "#!/bin/sh\necho message >> \"$HOME/ran\"\n[ \"$SENDER\" = wait ] && sleep 5\nexit 0\n";
            users.filter(user, "message", script);
            users.filter(user, ".hidden", "#!/bin/sh\necho hidden >> \"$HOME/ran\"\n");
            let outside = users.account(user).home.join("outside");
            fs::copy(users.account(user).path(".hidden"), &outside).unwrap();
            let account = users.account(user);
            std::os::unix::fs::chown(&outside, Some(account.uid), Some(account.gid)).unwrap();
        }
        let config = sandbox.write(
            "usermilter.toml",
            format!(
                "[server]\nuser = \"nobody\"\nmilter = [\"unix:{milter}\"]\npolicy = []\ncontrol = \"off\"\ndrain-timeout = \"1s\"\n\
                 [filter]\nvirtual-uids = [5001, 5999]\nvirtual-homes = [\"{homes}\"]\nmax-processes = 4\n\
                 timeout = \"5s\"\nprogram-directories = [\"/usr/lib/usermilter/filters\"]\n",
                milter = sandbox.join("milter.sock").display(),
                homes = users.homes().display(),
            ),
        );
        // The stand-in, as nobody, writes here how far it came.
        let marks = sandbox.directory("marks");
        fs::set_permissions(marks, fs::Permissions::from_mode(0o1777)).unwrap();
        Scene { sandbox, users, config }
    }

    fn mark(&self, name: &str) -> PathBuf {
        self.sandbox.join("marks").join(name)
    }

    /// What ran as this user, in order.
    fn ran(&self, user: &str) -> String {
        fs::read_to_string(self.users.account(user).home.join("ran")).unwrap_or_default()
    }

    fn start(&self, attack: &str, descriptors: Option<u32>) -> Monitor {
        let mut command = Command::new("/bin/sh");
        let limit = descriptors.map_or(String::new(), |limit| format!("ulimit -n {limit}; "));
        command.args(["-c", &format!("{limit}exec \"$@\""), "sh"]);
        command.arg(std::env::current_exe().unwrap()).arg(MONITOR).arg(&self.config);
        command.arg(self.sandbox.path()).arg(attack);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut server = Server::start(&mut command);
        let mut stderr = server.stderr().unwrap();
        let log = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stderr.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        Monitor { server, log }
    }
}

struct Monitor {
    server: Server,
    log: std::thread::JoinHandle<String>,
}

impl Monitor {
    fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// SIGTERM; it must end in peace. Its log.
    #[track_caller]
    fn stop(mut self) -> String {
        let status = self.server.terminate(SOON);
        let log = self.log.join().unwrap();
        assert_eq!(status.and_then(|status| status.code()), Some(0), "{status:?}\n{log}");
        log
    }
}

#[track_caller]
fn wait_for(what: &Path) {
    assert!(wait_until(SOON, || what.exists()), "{} did not come", what.display());
}

/// Waits until the monitor has only what it always has.
#[track_caller]
fn wait_for_descriptors(monitor: &Monitor) {
    let now = || site::descriptors(monitor.pid());
    assert!(wait_until(SOON, || now().len() == USUAL_DESCRIPTORS as usize), "{:?}", now());
}

fn malformed() {
    for (attack, reason) in [
        ("noise", "malformed message of "),
        ("trailing", "malformed message of "),
        ("too-long", "over-long packet"),
        ("many-descriptors", "over-long packet"),
        ("few-descriptors", "request with 1 descriptors"),
        ("five-descriptors", "over-long packet"),
        ("ready-twice", "ready for the second time"),
        ("bad-user-name", "malformed message of "),
        ("bad-program-name", "malformed message of "),
        // No fault of the protocol, but the end of the worker all the same.
        ("empty", "worker died"),
        ("close", "worker died"),
    ] {
        let scene = Scene::new();
        let start = Instant::now();
        let monitor = scene.start(attack, None);
        wait_for(&scene.mark("honest"));
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "{attack}: another only after {:?}",
            start.elapsed()
        );
        wait_for_descriptors(&monitor);
        let log = monitor.stop();
        assert!(log.contains(reason), "{attack}: {log}");
        assert!(!scene.mark("survived").exists(), "{attack}: the worker was not ended\n{log}");
        for user in ["alice", "bob", "low"] {
            assert_eq!(scene.ran(user), "", "{attack}: {user}");
        }
    }
}

fn short_of_descriptors() {
    let scene = Scene::new();
    // Fewer than the kernel passes in one message; the next worker must get its channel all the same.
    let monitor = scene.start("many-descriptors", Some(USUAL_DESCRIPTORS + 4));
    wait_for(&scene.mark("honest"));
    wait_for_descriptors(&monitor);
    assert!(!scene.mark("survived").exists());
    monitor.stop();
}

fn foreign_users() {
    let scene = Scene::new();
    let homes = scene.users.homes().to_owned();
    std::os::unix::fs::symlink("/etc", homes.join("out")).unwrap();
    let monitor = scene.start("foreign-users", None);
    wait_for(&scene.mark("survived"));
    let told = fs::read_to_string(scene.mark("told")).unwrap();
    // One line per request: what was asked, and what came of it. The last one shows that a proper one runs.
    for line in told.lines() {
        let (request, outcome) = line.split_once(" => ").unwrap();
        match request {
            "alice" => assert_eq!(outcome, "exited 0, no report", "{told}"),
            _ if request.starts_with("extension ") => assert_eq!(outcome, "exited 0, no report", "{told}"),
            _ => assert!(!outcome.starts_with("exited 0,") && outcome.contains("Refusal("), "{line}\n{told}"),
        }
    }
    let extensions = told.lines().filter(|line| line.starts_with("extension ")).count();
    assert!(extensions > 4 && told.lines().any(|line| line.starts_with("alice => ")), "{told}");
    assert_eq!(scene.ran("alice"), "message\n".repeat(extensions + 1), "{told}");
    assert_eq!((scene.ran("bob"), scene.ran("low")), (String::new(), String::new()));
    monitor.stop();
}

fn wrong_kinds() {
    let scene = Scene::new();
    let monitor = scene.start("wrong-kinds", None);
    wait_for(&scene.mark("survived"));
    let told = fs::read_to_string(scene.mark("told")).unwrap();
    for line in told.lines() {
        let (request, outcome) = line.split_once(" => ").unwrap();
        if request == "alice" {
            assert_eq!(outcome, "exited 0, no report", "{told}");
        } else {
            assert!(outcome.starts_with("NotRun, "), "{line}\n{told}");
        }
    }
    assert!(told.lines().count() > 8, "{told}");
    assert_eq!(scene.ran("alice"), "message\n", "{told}");
    monitor.stop();
}

fn flood() {
    let scene = Scene::new();
    let monitor = scene.start("flood", None);
    // max-processes, and 32 inspections; the worker itself is a child too.
    let (limit, mut most) = (4 + 32 + 1, 0);
    wait_until(SOON, || {
        most = most.max(children(monitor.pid()));
        scene.mark("honest").exists()
    });
    wait_for(&scene.mark("honest"));
    assert!((5..=limit).contains(&most), "{most} children at a time");
    wait_for_descriptors(&monitor);
    let log = monitor.stop();
    assert!(log.contains("events are not read"), "{log}");
}

fn flood_and_stop() {
    let scene = Scene::new();
    let monitor = scene.start("reading-flood", None);
    wait_for(&scene.mark("attacks"));
    std::thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    monitor.stop();
    // The drain time of 1 s, 3 s until the worker is killed, and the end of its jobs.
    assert!(start.elapsed() < Duration::from_secs(9), "{:?}", start.elapsed());
}

fn children(pid: u32) -> usize {
    fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
        .map_or(0, |text| text.split_whitespace().count())
}
