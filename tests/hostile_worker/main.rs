//! A worker that an attacker owns: a stand-in speaks to the real monitor as no honest worker would. Whatever it says,
//! nothing runs but users' own checked filters, the monitor lives, and it keeps nothing.
//!
//! This program is its own monitor, which must have one thread, so that the usual test harness can't host it:
//! each test starts it again with [`MONITOR`]. The stand-in attacks in its first life; the one that follows it is honest.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

#[path = "../common/mod.rs"]
mod common;
mod races;
mod requests;
#[path = "../site/mod.rs"]
mod site;
mod stand_in;

use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use common::own_monitor::{self, MONITOR, Test};
use common::process::Server;
use common::{Sandbox, VirtualUsers, wait_until};

/// Descriptors of a monitor whose worker is honest: 0 to 2, a listener, signals, the channel.
const USUAL_DESCRIPTORS: u32 = 7;

/// Patience with what should take a second.
const SOON: Duration = Duration::from_secs(15);

const TESTS: &[Test] = &[
    ("a_worker_that_breaks_the_protocol_is_ended_and_followed_by_another", malformed),
    ("a_first_worker_that_dies_as_soon_as_it_is_ready_is_followed_by_another", vanished),
    ("nothing_is_kept_of_refused_descriptors_even_when_they_run_short", short_of_descriptors),
    ("no_request_runs_what_is_no_users_own_filter", foreign_users),
    ("a_filter_gets_no_descriptor_of_another_kind", wrong_kinds),
    ("a_worker_that_never_reads_is_ended_and_starts_no_more_than_its_share", flood),
    ("a_flood_of_requests_does_not_hold_up_the_end", flood_and_stop),
    ("a_home_that_the_worker_invents_gives_nothing_of_another_user_away", others_homes),
    ("questions_are_answered_about_what_the_configuration_names_and_as_the_worker", questions),
    ("signs_of_life_without_end_harm_nobody", signs_of_life),
    ("requests_without_sense_harm_only_themselves", odd_requests),
    ("while_a_user_edits_a_filter_each_run_is_of_one_version", races::edits),
    ("in_a_directory_that_a_group_may_write_nothing_runs_whatever_is_swapped", races::writable_directory),
    ("in_a_sticky_directory_others_names_are_no_filters_whatever_is_swapped", races::sticky_directory),
    ("a_home_behind_a_link_that_is_swapped_runs_nothing_and_tells_nothing", races::home_behind_a_link),
    ("a_child_on_its_way_to_a_filter_can_not_be_looked_into_by_its_user", races::looks_into_a_child),
    ("while_directories_are_mounted_over_each_other_only_the_users_own_filters_run", races::mounts),
];

fn main() -> ExitCode {
    own_monitor::run(TESTS, stand_in::start)
}

/// Where an attack takes place.
struct Scene {
    sandbox: Sandbox,
    users: VirtualUsers,
    config: PathBuf,
}

impl Scene {
    fn new() -> Self {
        Self::with("")
    }

    /// With more lines in the section `[filter]`.
    fn with(settings: &str) -> Self {
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
                 timeout = \"5s\"\nprogram-directories = [\"/usr/lib/usermilter/filters\"]\n{settings}\n",
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
        let mounts = if self.mark("own-mounts").exists() { "unshare --mount" } else { "" };
        command.args(["-c", &format!("{limit}exec {mounts} \"$@\""), "sh"]);
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
    wait_for_within(what, SOON);
}

#[track_caller]
fn wait_for_within(what: &Path, patience: Duration) {
    assert!(wait_until(patience, || what.exists()), "{} did not come", what.display());
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
        ("question-without-pipe", "request with 0 descriptors"),
        ("name=", "malformed message of "),
        ("name=+", "malformed message of "),
        ("name=-", "malformed message of "),
        ("name=root:0", "malformed message of "),
        ("name=/root", "malformed message of "),
        ("name=root\n", "malformed message of "),
        ("name=root alice", "malformed message of "),
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

/// The monitor hears that the worker is ready and that it has ended at once.
fn vanished() {
    let scene = Scene::new();
    let mut monitor = scene.start("vanish", None);
    wait_for(&scene.mark("attacks"));
    let has_ended = || children(monitor.pid()).iter().all(|pid| !site::runs(*pid));
    assert!(wait_until(SOON, has_ended), "the worker did not end");
    monitor.server.signal(Signal::SIGCONT);
    wait_for(&scene.mark("honest"));
    let log = monitor.stop();
    assert!(log.contains("worker died; starting another"), "{log}");
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

fn others_homes() {
    let site_program = "#!/bin/sh\necho \"$HOME\" > \"$(mktemp \"${0%/*}/marks/home-XXXXXX\")\"\n";
    let sandbox = Sandbox::new();
    sandbox.directory("marks");
    fs::set_permissions(sandbox.join("marks"), fs::Permissions::from_mode(0o1777)).unwrap();
    let program = sandbox.write("program", site_program);
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut scene = Scene::with(&format!("default-message = \"{}\"", program.display()));
    scene.users.add("carol", 5003, 5003);
    let homes = scene.users.homes().to_owned();
    let (bob, carol) = (homes.join("bob"), homes.join("carol"));
    let link = |target: &Path, path: PathBuf| std::os::unix::fs::symlink(target, path);
    // Bob follows links of his own, and has a secret.
    fs::remove_file(bob.join(".usermilter/message")).unwrap();
    fs::write(bob.join("secret"), "nobody reads this but bob\n").unwrap();
    fs::write(bob.join("rules"), "# rules of bob\n").unwrap();
    for (name, mode) in [("secret", 0o600), ("rules", 0o644)] {
        std::os::unix::fs::chown(bob.join(name), Some(5002), Some(5002)).unwrap();
        fs::set_permissions(bob.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    link(Path::new("../rules"), bob.join(".usermilter/rules.toml")).unwrap();
    // Carol lets everybody in, and has links to it wherever the monitor's child would read or write.
    let open = homes.join("open");
    for home in [&carol, &carol.join("lists"), &open] {
        let directory = home.join(".usermilter");
        fs::create_dir_all(&directory).unwrap();
        for name in ["rules.toml", "friends", "log"] {
            link(&bob.join("secret"), directory.join(name)).unwrap();
        }
        for path in [home, &directory] {
            std::os::unix::fs::chown(path, Some(5003), Some(5003)).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        }
    }
    let rules = carol.join("lists/.usermilter/rules.toml");
    fs::remove_file(&rules).unwrap();
    fs::write(&rules, "[[rule]]\nsender-file = [\"friends\"]\naction = \"accept\"\n").unwrap();
    link(&carol.join("lists"), carol.join("link")).unwrap();
    std::os::unix::fs::chown(&open, Some(0), Some(0)).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o1777)).unwrap();

    let monitor = scene.start("others-homes", None);
    wait_for(&scene.mark("survived"));
    let told = fs::read_to_string(scene.mark("told")).unwrap();
    monitor.stop();
    let outcome = |request: &str| {
        let line = told.lines().find_map(|line| line.strip_prefix(request)?.strip_prefix(" => "));
        line.unwrap_or_else(|| panic!("no {request}: {told}"))
    };
    assert!(!told.contains("nobody reads this"), "{told}");
    assert!(outcome("inspect bob at home").contains("rules of bob"), "{told}");
    for place in [
        "in the home of carol",
        "in a directory of carol",
        "behind a link of carol",
        "where all can put something",
    ] {
        for request in ["inspect", "run"] {
            let outcome = outcome(&format!("{request} bob {place}"));
            assert!(
                !outcome.starts_with("exited 0,") && outcome.contains("Refusal("),
                "{request} {place}: {told}"
            );
        }
    }
    let secret = fs::read_to_string(bob.join("secret")).unwrap();
    assert_eq!(secret, "nobody reads this but bob\n", "{told}");
    // The site's program takes its settings from a home: only where nobody else can put some.
    let marks = fs::read_dir(sandbox.join("marks")).unwrap().flatten();
    let mut ran: Vec<_> = marks
        .map(|mark| {
            (mark.metadata().unwrap().uid(), fs::read_to_string(mark.path()).unwrap().trim_end().to_owned())
        })
        .collect();
    ran.sort();
    let shown = |path: &Path| path.display().to_string();
    assert_eq!(
        ran,
        [(5002, shown(&bob)), (5003, shown(&carol)), (5003, shown(&carol.join("absent")))],
        "{told}"
    );
}

fn questions() {
    // One file that the worker's user may read, and one that is root's.
    let sandbox = Sandbox::new();
    let (open, closed) =
        (sandbox.write("aliases", "team: alice\n"), sandbox.write("closed", "team: secret\n"));
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o600)).unwrap();
    let scene = Scene::with(&format!("[recipients]\naliases = [{open:?}, {closed:?}]"));
    let monitor = scene.start("questions", None);
    wait_for(&scene.mark("survived"));
    let told = fs::read_to_string(scene.mark("told")).unwrap();
    monitor.stop();
    assert!(told.contains("file 0 => Exited(0) ") && told.contains("team: alice"), "{told}");
    assert!(
        told.contains("uid root => Exited(0) ") && told.contains("\nalice => exited 0, no report\n"),
        "{told}"
    );
    assert!(!told.contains("secret"), "{told}");
    for line in told.lines().filter(|line| line.starts_with("file ") || line.starts_with("host ")).skip(1) {
        assert!(line.contains(" => NotRun ") || line.contains(" => Exited(126) "), "{line}\n{told}");
    }
    assert_eq!(told.lines().count(), 12, "{told}");
}

/// Signs of life that nobody asked for, and with descriptors: nothing comes of them, and nothing is kept.
fn signs_of_life() {
    for attack in ["many-signs", "sign-with-descriptors"] {
        let scene = Scene::new();
        let monitor = scene.start(attack, None);
        wait_for_within(&scene.mark("survived"), Duration::from_secs(60));
        wait_for_descriptors(&monitor);
        monitor.stop();
    }
}

fn odd_requests() {
    let scene = Scene::new();
    let monitor = scene.start("odd-requests", None);
    wait_for_within(&scene.mark("survived"), Duration::from_secs(60));
    let told = fs::read_to_string(scene.mark("told")).unwrap();
    assert!(told.lines().count() > 8, "{told}");
    for line in told.lines() {
        assert!(line.ends_with(" => exited 0, no report"), "{line}\n{told}");
    }
    wait_for_descriptors(&monitor);
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
    assert!(told.lines().count() > 30, "{told}");
    assert_eq!(scene.ran("alice"), "message\n", "{told}");
    monitor.stop();
}

fn flood() {
    let scene = Scene::new();
    let monitor = scene.start("flood", None);
    // max-processes, and 32 inspections; the worker itself is a child too.
    let (limit, mut most) = (4 + 32 + 1, 0);
    wait_until(SOON, || {
        most = most.max(children(monitor.pid()).len());
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

fn children(pid: u32) -> Vec<u32> {
    let listed = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    listed.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}
