//! What a hostile filter can't do to anybody else: alice's, a program that tries whatever it can, runs beside bob's, on the
//! same message. Each of its attempts succeeds on something of its own, which shows that it is one.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

#[path = "../common/mod.rs"]
mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;

use common::site::{own_uid, send};
use common::{PATIENCE, Site, SystemUser, Usermilter, free_port, require, require_root, wait_until};

/// A thousand attempts on a machine that does other things too.
const LONG: Duration = Duration::from_secs(100);

/// What is known to the daemon, to root or to bob's filter only.
const IN_THE_ENVIRONMENT: &str = "secret-of-the-environment";
const PASSWORD: &str = "secret-password";
const ALIAS: &str = "secret-alias";

/// What the hostile filter reports.
#[derive(Debug, Deserialize)]
struct Report {
    /// What was tried, on what, and what came of it.
    attempts: Vec<(String, String, String)>,
    /// The descriptors it began with.
    descriptors: Vec<u32>,
    /// What its standard input is.
    input: String,
    /// Its /proc/self/status.
    status: BTreeMap<String, String>,
    /// Whether it leads a session and a process group.
    session: bool,
    limits: String,
    environment: BTreeMap<String, String>,
    message: String,
    /// How many processes of others let it read these files of theirs.
    seen: BTreeMap<String, u32>,
    /// Where it found what it was to look for.
    found: Vec<String>,
    /// What it saw in the spool directory.
    spool: Vec<String>,
}

/// A mail for alice, whose filter attacks, and bob, whose filter waits until that is over.
#[derive(Default)]
struct Attack {
    /// Length of the mail's body.
    length: usize,
    /// Started as the last arguments of this.
    wrapper: &'static [&'static str],
}

impl Attack {
    /// The report, and bob's home.
    #[track_caller]
    fn run(self) -> (Report, PathBuf) {
        require_root();
        let users = [("alice", own_uid(0)), ("bob", own_uid(1))];
        let builder = Site::of(&users)
            .filter("alice", "message", include_str!("probe.py"))
            .filter(
                "bob",
                "message",
                "#!/bin/sh\necho $$ > \"$HOME/new\"\nmv \"$HOME/new\" \"$HOME/pid\"\n\
                 while [ ! -e \"$HOME/go\" ]; do sleep 0.1; done\ncat > \"$HOME/seen\"\nexit 77\n",
            )
            .set("filter", "memory-limit", "\"16K\"")
            .set("filter", "timeout", "\"150s\"");
        let sandbox = &builder.sandbox;
        let aliases = sandbox.write("aliases", format!("{ALIAS}: bob\n"));
        let password = sandbox.write("password", PASSWORD);
        fs::set_permissions(&password, fs::Permissions::from_mode(0o600)).unwrap();
        let resolvers = format!(
            "[[resolver]]\ntype = \"passwd-file\"\npath = {:?}\n[[resolver]]\ntype = \"ldap\"\n\
             uri = [\"ldap://127.0.0.1:{}\"]\nbase = \"dc=example\"\nfilter = \"(mail=%s)\"\n\
             bind-dn = \"cn=daemon\"\npassword-file = {password:?}\n",
            builder.users.passwd_file(),
            free_port(),
        );
        let sockets = ["milter", "policy", "control"].map(|name| sandbox.join(name));
        let [milter, policy, control] = sockets.clone().map(|path| format!("unix:{}", path.display()));
        let bob = builder.users.account("bob").clone();
        for (name, mode) in [("secret", 0o600), ("open", 0o644)] {
            let path = bob.home.join(name);
            fs::write(&path, "of bob\n").unwrap();
            chown(&path, Some(bob.uid), Some(bob.gid)).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        let environment = format!("A_SECRET={IN_THE_ENVIRONMENT}");
        let wrapper: Vec<String> =
            self.wrapper.iter().copied().chain(["env", &environment]).map(str::to_owned).collect();
        let site = builder
            .milter_at(&milter)
            .policy_at(&policy)
            .set("recipients", "aliases", &format!("[{aliases:?}]"))
            .set("server", "control", &format!("{control:?}"))
            .resolvers(resolvers)
            .start_under(&wrapper);

        let alice = site.users.account("alice").home.clone();
        let (monitor, worker) = (site.daemon.pid(), site.daemon.worker_pid());
        let body = "All work and no play makes Jack a dull boy.\r\n".repeat(self.length / 45 + 1);
        let message = format!("Subject: x\r\nFrom: s@sender.example\r\n\r\n{body}");
        let report = std::thread::scope(|scope| {
            let recipients = ["alice@test.example".to_owned(), format!("{ALIAS}@test.example")];
            let mut mta = site.mta();
            let transaction = scope.spawn(move || {
                let recipients = recipients.each_ref().map(String::as_str);
                send(&mut mta, "<s@sender.example>", &recipients, message.as_bytes())
            });
            let pid = || fs::read_to_string(bob.home.join("pid")).ok()?.trim().parse::<u32>().ok();
            assert!(wait_until(PATIENCE, || pid().is_some()), "the filter of bob did not start");
            let targets = serde_json::json!({
                "processes": { "monitor": monitor, "worker": worker, "guard": guard(&site.daemon), "filter of bob": pid() },
                "files": [bob.home.join("secret"), bob.home.join("open"), bob.path("message"), password],
                "directories": [&bob.home, &bob.home.join(".usermilter")],
                "sockets": sockets,
                "secrets": [ALIAS, IN_THE_ENVIRONMENT, PASSWORD, bob.home],
                "spool": site.sandbox.join("spool"),
            });
            fs::write(alice.join("targets.new"), targets.to_string()).unwrap();
            fs::set_permissions(alice.join("targets.new"), fs::Permissions::from_mode(0o644)).unwrap();
            fs::rename(alice.join("targets.new"), alice.join("targets")).unwrap();
            let (report, failure) = (alice.join("report"), alice.join("failure"));
            let over = wait_until(LONG, || report.exists() || failure.exists());
            fs::write(bob.home.join("go"), "").unwrap();
            let answer = transaction.join().unwrap();
            assert!(over && !failure.exists(), "{:?} {answer:?}", fs::read_to_string(failure));
            // Both filters refuse, so nobody has ended or changed bob's.
            assert_eq!(answer.letter(), 'y', "{answer:?}");
            fs::read_to_string(report).unwrap()
        });
        assert_eq!((site.daemon.pid(), site.daemon.worker_pid()), (monitor, worker));
        let report: Report = serde_json::from_str(&report).unwrap();
        // Whatever alice has done to the message, and read of it, bob has it all.
        assert_eq!(fs::read_to_string(bob.home.join("seen")).unwrap(), report.message);
        assert!(report.message.len() > self.length / 2 && report.message.contains("makes Jack"));
        (report, bob.home)
    }
}

/// The guard: the process that has the other end of a pipe of the monitor's, and is not its child.
fn guard(daemon: &Usermilter) -> u32 {
    let descriptors = |pid: u32| -> BTreeSet<PathBuf> {
        let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let links = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
        links.filter(|link| link.to_string_lossy().starts_with("pipe:")).collect()
    };
    let identity = |pid: u32| fs::metadata(format!("/proc/{pid}/exe")).map(|exe| (exe.dev(), exe.ino())).ok();
    let (program, of_monitor) = (identity(daemon.pid()), descriptors(daemon.pid()));
    let pids =
        fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|&pid| pid != daemon.pid() && pid != daemon.worker_pid() && identity(pid) == program)
        .find(|&pid| !descriptors(pid).is_disjoint(&of_monitor))
        .expect("the guard")
}

/// Attempts that the kernel of this machine knows, and how the same went on what is the filter's own.
fn check_attempts(report: &Report) {
    let own: BTreeMap<&str, &str> = report
        .attempts
        .iter()
        .filter(|(_, target, _)| target == "own")
        .map(|(what, _, outcome)| (&**what, &**outcome))
        .collect();
    let unknown: Vec<_> =
        own.iter().filter(|(_, outcome)| matches!(**outcome, "ENOSYS" | "ENOENT")).collect();
    assert!(unknown.len() <= 4, "{unknown:?}");
    let mut count = 0;
    for (what, target, outcome) in report.attempts.iter().filter(|(_, target, _)| target != "own") {
        // A signal that would end one's own is shown by one that does not.
        let like = match what.as_str() {
            "kill the group" => "signal 0 to the group",
            signal if signal.starts_with("signal ") && !signal.contains("group") => "signal 0",
            what => what,
        };
        let on_own = *own.get(like).unwrap_or_else(|| panic!("{what} was not tried on its own"));
        assert!(matches!(on_own, "ok" | "ENOSYS" | "ENOENT"), "{what} on its own: {on_own}\n{own:?}");
        let of_message = ["EBADF", "EINVAL", "EXDEV", "ENOENT"];
        let is_refused = matches!(outcome.as_str(), "EACCES" | "EPERM")
            // A descriptor that is not open for writing; a file that can have no name.
            || target == "message" && of_message.contains(&outcome.as_str())
            // Where processes are hidden.
            || matches!(outcome.as_str(), "ENOENT" | "ESRCH") && !target.starts_with('/')
            || outcome == on_own && on_own != "ok";
        assert!(is_refused, "{what} on {target}: {outcome}");
        count += 1;
    }
    assert!(count > 400, "{count}");
    println!("{count} attempts on what is others', {} on its own", own.len());
}

fn check_filter_of(report: &Report, bob: &Path) {
    check_attempts(report);
    assert_eq!(report.descriptors, [0, 1, 2]);
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(u64::from_str_radix(report.status[set].trim(), 16).unwrap(), 0, "{set}");
    }
    assert_eq!(report.status["NoNewPrivs"].trim(), "1");
    let alice = own_uid(0).to_string();
    assert_eq!(report.status["Groups"].trim(), alice);
    for ids in ["Uid", "Gid"] {
        assert_eq!(report.status[ids].split_whitespace().collect::<Vec<_>>(), [&*alice; 4], "{ids}");
    }
    assert!(report.session);
    for (limit, value) in [("Max core file size", "0"), ("Max open files", "256"), ("Max cpu time", "60")] {
        let line = report.limits.lines().find_map(|line| line.strip_prefix(limit)).unwrap();
        let values: Vec<_> = line.split_whitespace().take(2).collect();
        assert_eq!(values, [value; 2], "{limit}");
    }
    // Nothing in what it was given tells of anybody else.
    let given = format!("{:?}{}", report.environment, report.message);
    assert!(given.contains("alice"), "{given}");
    let bobs = bob.display().to_string();
    for secret in ["bob", &bobs, ALIAS, IN_THE_ENVIRONMENT, PASSWORD] {
        assert!(!given.contains(secret), "{secret}: {given}");
    }
    for file in ["environ", "fd", "maps", "mem", "stack", "syscall", "io", "numa_maps"] {
        assert_eq!(report.seen.get(file).copied().unwrap_or(0), 0, "/proc/PID/{file} of others");
    }
    assert!(report.spool.is_empty(), "{:?}", report.spool);
}

#[test]
fn a_hostile_filter_gets_at_nothing_of_the_daemon_or_of_another_recipient() {
    let (report, bob) = Attack::default().run();
    check_filter_of(&report, &bob);
    assert!(report.input.starts_with("/memfd:"), "{}", report.input);
    // Known, and in docs/threat-model.md: the path of a filter that runs is there for all to see.
    assert_eq!(report.found, [format!("cmdline: {}", bob.display())]);
    assert!(report.seen["cmdline"] > 1, "{:?}", report.seen);
}

#[test]
fn a_message_on_disk_is_out_of_a_hostile_filters_reach_too() {
    let (report, bob) = Attack { length: 300_000, ..Attack::default() }.run();
    check_filter_of(&report, &bob);
    assert!(report.input.contains("/spool/"), "{}", report.input);
}

#[test]
fn where_processes_are_hidden_a_filter_does_not_see_who_else_has_one() {
    let wrapper =
        &["unshare", "--mount", "sh", "-c", "mount -t proc -o hidepid=2 proc /proc && exec \"$@\"", "sh"];
    let (report, bob) = Attack { wrapper, ..Attack::default() }.run();
    check_filter_of(&report, &bob);
    assert_eq!((report.found.len(), &report.seen["cmdline"]), (0, &0), "{report:?}");
}

#[test]
fn a_filter_writes_a_few_lines_to_the_log_and_all_under_its_name() {
    let site = Site::of(&[("alice", own_uid(2))])
        .filter(
            "alice",
            "message",
            "#!/bin/sh\necho 'told you so' >&2\nprintf '\\n2026-01-01T00:00:00Z ERROR usermilter is off\\r\\033[2J\\n' >&2\n\
             yes 'again and again' | head -c 50000000 >&2\nexit 77\n",
        )
        .start();
    let seen = site.daemon.log_lines().len();
    let (answer, _) = site.judge_logged(&["alice@test.example"], b"Subject: x\r\n\r\nx\r\n");
    assert_eq!(answer.letter(), 'y', "{answer:?}");
    // What it wrote last, if it were to come.
    std::thread::sleep(Duration::from_millis(500));
    let log = site.daemon.log_lines()[seen..].to_vec();
    assert!(log.iter().any(|line| line.contains("told you so")), "{log:?}");
    assert!(log.len() <= 25 && log.iter().map(String::len).sum::<usize>() < 32 * 1024, "{log:?}");
    for line in &log {
        assert!(
            line.contains("alice") && !line.starts_with("2026-01-01") && !line.contains(['\r', '\x1b']),
            "{line}"
        );
    }
}

#[test]
fn a_filter_has_the_groups_of_its_user_and_no_others() {
    let builder = Site::of(&[]);
    let user = SystemUser::create(&builder.sandbox, "anna");
    // Others may have the files locked.
    let add = || Command::new(require("usermod")).args(["-aG", "games,mail", &user.name]).status();
    assert!(wait_until(PATIENCE, || add().unwrap().success()), "usermod");
    user.filter("message", "#!/bin/sh\nid -G > \"$HOME/groups\"\nexit 77\n");
    let site = builder.resolvers("[[resolver]]\ntype = \"passwd\"\n").start();
    let answer = site.judge(&[&format!("{}@test.example", user.name)], b"Subject: x\r\n\r\nx\r\n");
    assert_eq!(answer.letter(), 'y', "{answer:?}");
    let groups = fs::read_to_string(user.home.join("groups")).unwrap();
    let groups: BTreeSet<u32> = groups.split_whitespace().map(|gid| gid.parse().unwrap()).collect();
    let gid = |name: &str| nix::unistd::Group::from_name(name).unwrap().unwrap().gid.as_raw();
    assert_eq!(groups, BTreeSet::from([user.gid, gid("games"), gid("mail")]));
}
