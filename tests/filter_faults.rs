//! Whatever is wrong with a filter costs nobody mail and harms only its own verdict: the error action applies, and the
//! log says which check failed on which path.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use common::site::{own_uid, send_message};
use common::users::Account;
use common::{PATIENCE, Postfix, Site, smtp, wait_until};

const MESSAGE: &[u8] = b"Subject: x\r\n\r\nhello\r\n";
const ALICE: &str = "alice@test.example";
const REFUSE: &str = "#!/bin/sh\nexit 77\n";

type Fault = (&'static str, fn(&Account), &'static str);

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// Name of a user, what is wrong with their filter, and what the log says of it (`~`: the user's directory of filters).
/// Every filter would refuse, if it were run.
const FAULTS: &[Fault] = &[
    ("exit1", |a| drop(a.filter("message", "#!/bin/sh\nexit 1\n")), "message: exit 1"),
    ("exit2", |a| drop(a.filter("message", "#!/bin/sh\n)\n")), "message: exit 2"),
    ("killed", |a| drop(a.filter("message", "#!/bin/sh\nkill -9 $$\n")), "killed by SIGKILL"),
    ("segv", |a| drop(a.filter("message", "#!/bin/sh\nkill -SEGV $$\n")), "killed by SIGSEGV"),
    ("plain", |a| drop(a.file("message", REFUSE)), "~/message: not executable"),
    ("interpreter", |a| drop(a.filter("message", "#!/nonexistent/x\n")), "interpreter of its #! line"),
    ("no-line", |a| drop(a.filter("message", "exit 77\n")), "a script needs a #! line"),
    ("empty", |a| drop(a.filter("message", "")), "a script needs a #! line"),
    ("group", |a| set_mode(&a.filter("message", REFUSE), 0o770), "~/message: file is writable by group"),
    ("others", |a| set_mode(&a.filter("message", REFUSE), 0o707), "~/message: file is writable by group"),
    ("setuid", |a| set_mode(&a.filter("message", REFUSE), 0o4700), "~/message: file has a setuid"),
    ("setgid", |a| set_mode(&a.filter("message", REFUSE), 0o2710), "~/message: file has a setuid"),
    (
        "open-directory",
        |a| {
            a.filter("message", REFUSE);
            set_mode(&a.home.join(".usermilter"), 0o770);
        },
        "/.usermilter: directory is writable by group",
    ),
    (
        "open-home",
        |a| {
            a.filter("message", REFUSE);
            set_mode(&a.home, 0o777);
        },
        "homes/open-home: directory is writable by group",
    ),
    (
        "foreign-file",
        |a| chown(a.filter("message", "#!/bin/sh\nexit 77\n"), Some(5999), Some(a.gid)).unwrap(),
        "~/message: owned by uid 5999",
    ),
    (
        "foreign-directory",
        |a| {
            set_mode(&a.filter("message", REFUSE), 0o755);
            let directory = a.home.join(".usermilter");
            set_mode(&directory, 0o755);
            chown(directory, Some(5999), Some(a.gid)).unwrap();
        },
        "/.usermilter: owned by uid 5999",
    ),
    ("fifo", |a| special(a, SFlag::S_IFIFO, 0), "~/message: not a regular file"),
    ("null", |a| special(a, SFlag::S_IFCHR, makedev(1, 3)), "~/message: not a regular file"),
    ("tty", |a| special(a, SFlag::S_IFCHR, makedev(5, 0)), "~/message: not a regular file"),
    (
        "directory",
        |a| fs::create_dir(a.file("x", "").with_file_name("message")).unwrap(),
        "~/message: not a regular file",
    ),
    (
        "socket",
        |a| drop(UnixListener::bind(a.file("x", "").with_file_name("message")).unwrap()),
        "~/message: not a regular file",
    ),
    ("loop", |a| link(a, "message"), "too many levels of symbolic links"),
    (
        "loops",
        |a| [("message", "b"), ("b", "c"), ("c", "b")].iter().for_each(|(l, t)| link_as(a, l, t)),
        "too many levels",
    ),
    ("dangling", |a| link(a, "/nonexistent/program"), "/nonexistent"),
    ("link-to-null", |a| link(a, "/dev/null"), "/dev/null: not a regular file"),
    (
        "link-to-open",
        |a| {
            let directory = a.home.join("open");
            fs::create_dir(&directory).unwrap();
            chown(&directory, Some(a.uid), Some(a.gid)).unwrap();
            fs::rename(a.filter("program", REFUSE), directory.join("program")).unwrap();
            set_mode(&directory, 0o777);
            link(a, "../open/program");
        },
        "/open: directory is writable by group",
    ),
    (
        // Whoever can write to a directory on the way can point the link elsewhere.
        "link-in-open",
        |a| {
            let directory = a.home.join("open");
            let program = a.filter("program", REFUSE);
            fs::create_dir(&directory).unwrap();
            symlink(program, directory.join("link")).unwrap();
            chown(&directory, Some(a.uid), Some(a.gid)).unwrap();
            set_mode(&directory, 0o777);
            link(a, "../open/link");
        },
        "/open: directory is writable by group",
    ),
    (
        "link-in-open-directory",
        |a| {
            let program = a.filter("program", REFUSE);
            fs::rename(program, a.home.join("program")).unwrap();
            link(a, "../program");
            set_mode(&a.home.join(".usermilter"), 0o770);
        },
        "/.usermilter: directory is writable by group",
    ),
    (
        "unreadable-script",
        |a| set_mode(&a.filter("message", REFUSE), 0o100),
        // The interpreter is run, and can't read the script: dash says 2.
        "message: exit 2",
    ),
    (
        "hidden-directory",
        |a| {
            a.filter("message", REFUSE);
            set_mode(&a.home.join(".usermilter"), 0o000);
        },
        "/.usermilter: ",
    ),
    (
        "foreign-home",
        |a| {
            a.filter("message", REFUSE);
            chown(&a.home, Some(5999), Some(5999)).unwrap();
        },
        "homes/foreign-home",
    ),
];

fn special(account: &Account, kind: SFlag, device: u64) {
    let path = account.file("x", "").with_file_name("message");
    mknod(&path, kind, Mode::from_bits_truncate(0o777), device).unwrap();
    chown(&path, Some(account.uid), Some(account.gid)).unwrap();
    set_mode(&path, 0o700);
}

fn link(account: &Account, target: &str) {
    link_as(account, "message", target);
}

fn link_as(account: &Account, name: &str, target: &str) {
    let path = account.file("x", "").with_file_name(name);
    symlink(target, &path).unwrap();
    std::os::unix::fs::lchown(path, Some(account.uid), Some(account.gid)).unwrap();
}

fn each_fault_means(on_error: &str, expected: &str) {
    let users: Vec<(&str, u32)> = FAULTS.iter().zip(5001..).map(|(fault, uid)| (fault.0, uid)).collect();
    let site = Site::of(&users).set("filter", "on-error", &format!("\"{on_error}\"")).start();
    let mut wrong = String::new();
    for (user, prepare, why) in FAULTS {
        let account = site.users.account(user);
        prepare(account);
        let seen = site.daemon.log_lines().len();
        let answer = site.judge(&[&format!("{user}@test.example")], MESSAGE);
        let got = format!("{} {}", answer.letter(), answer.text());
        site.daemon.wait_for_log_after(seen, "outcome=", PATIENCE);
        let log = site.daemon.log_lines()[seen..].join("\n");
        let why = why.replace('~', &account.home.join(".usermilter").display().to_string());
        if !got.starts_with(expected) || !log.to_lowercase().contains(&why.to_lowercase()) {
            wrong += &format!("{user}: {got}\n  not: {why}\n  log: {log}\n");
        }
    }
    assert!(wrong.is_empty(), "on-error {on_error}\n{wrong}");
}

#[test]
fn a_filter_that_cannot_be_run_accepts_by_default_and_the_log_names_the_check_and_the_path() {
    each_fault_means("accept", "a");
}

#[test]
fn a_filter_that_cannot_be_run_defers_if_the_administrator_wants_so() {
    each_fault_means("defer", "y 451 4.3.0");
}

#[test]
fn through_postfix_a_broken_filter_delivers_or_defers_and_never_refuses() {
    for (on_error, code) in [("accept", 250), ("defer", 451)] {
        let site = Site::of(&[("alice", 5001)])
            .set("filter", "on-error", &format!("\"{on_error}\""))
            .filter("alice", "message", "#!/nonexistent/interpreter\n")
            .start();
        let postfix = Postfix::builder().milter(site.milter_address()).start();
        let mut client = smtp::Client::connect_as(postfix.port(), "192.0.2.10", "mx.sender.example");
        let sent = client.send("s@sender.example", &[ALICE], MESSAGE);
        assert_eq!(sent.outcome().code, code, "{}", client.transcript());
        if code == 250 {
            postfix.wait_delivered("alice", 1, PATIENCE);
        }
    }
}

#[test]
fn a_user_whose_home_is_missing_has_nothing_and_accepts() {
    let site = Site::of(&[("alice", 5001)]).set("filter", "on-error", "\"defer\"").start();
    fs::remove_dir_all(&site.users.account("alice").home).unwrap();
    assert_eq!(site.judge(&[ALICE], MESSAGE).letter(), 'a');
}

#[test]
fn virtual_users_outside_of_what_the_configuration_allows_run_nothing() {
    let mut builder = Site::of(&[("alice", 5001), ("low", 5000), ("high", 6000)]);
    let outside = builder.sandbox.directory("elsewhere");
    let homes = builder.users.homes().to_owned();
    builder.users.add("group", 5002, 6001);
    for name in ["alice", "low", "high", "group"] {
        builder = builder.filter(name, "message", "#!/bin/sh\n: > ~/ran\nexit 77\n");
    }
    fs::rename(homes.join("alice"), outside.join("alice")).unwrap();
    symlink(outside.join("alice"), homes.join("linked")).unwrap();
    let line = |name: &str, uid: u32, gid: u32, home: &Path| {
        format!("{name}:x:{uid}:{gid}::{}:/bin/sh\n", home.display())
    };
    let file = [
        line("low", 5000, 5000, &homes.join("low")),
        line("high", 6000, 6000, &homes.join("high")),
        line("group", 5002, 6001, &homes.join("group")),
        line("outside", 5001, 5001, &outside.join("alice")),
        line("linked", 5001, 5001, &homes.join("linked")),
        line("homes", 5001, 5001, &homes),
        line("root", 0, 0, &homes.join("low")),
        line("wheel", 5001, 0, &homes.join("low")),
        line("dots", 5001, 5001, &homes.join("../elsewhere/alice")),
    ];
    fs::write(builder.users.passwd_file(), file.concat()).unwrap();
    let site =
        builder.set("filter", "on-error", "\"defer\"").set("filter", "virtual-uids", "[5001, 5999]").start();
    for (name, why) in [
        ("low", "virtual-uids"),
        ("high", "virtual-uids"),
        ("group", "virtual-uids"),
        ("outside", "outside filter.virtual-homes"),
        ("linked", "leads outside filter.virtual-homes"),
        ("homes", "outside filter.virtual-homes"),
    ] {
        let seen = site.daemon.log_lines().len();
        let answer = site.judge(&[&format!("{name}@test.example")], MESSAGE);
        assert_eq!(answer.text(), "451 4.3.0 cannot decide right now, try again later", "{name}");
        let line = site.daemon.wait_for_log_after(seen, why, PATIENCE);
        assert!(line.contains(name), "{line}");
    }
    // Lines of root never make it into the table; the log says so at the start.
    for name in ["root", "wheel", "dots"] {
        assert_eq!(site.judge(&[&format!("{name}@test.example")], MESSAGE).letter(), 'a', "{name}");
        site.daemon.wait_for_log(&format!("\"{name}\""), PATIENCE);
    }
    for home in [homes.join("low"), homes.join("high"), homes.join("group"), outside.join("alice")] {
        assert!(!home.join("ran").exists(), "{}", home.display());
    }
}

#[test]
fn a_passwd_user_below_min_uid_runs_nothing() {
    let site = Site::of(&[])
        .resolvers("[[resolver]]\ntype = \"passwd\"\nmin-uid = 0\n")
        .set("filter", "on-error", "\"defer\"")
        .start();
    let answer = site.judge(&["root@test.example"], MESSAGE);
    assert!(answer.text().starts_with("451 4.3.0"), "{answer:?}");
    site.daemon.wait_for_log("user root (uid 0): no filter runs below filter.min-uid", PATIENCE);
}

/// The command lines of processes that run with this uid.
fn processes_of(uid: u32) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let owner =
            status.lines().find_map(|line| line.strip_prefix("Uid:\t")?.split('\t').next()?.parse().ok());
        if owner == Some(uid) && !status.contains("State:\tZ") {
            found.push(
                fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default().replace('\0', " "),
            );
        }
    }
    found
}

#[test]
fn a_filter_that_outlives_its_time_loses_its_whole_group_by_term_and_then_by_kill() {
    let site = Site::of(&[("polite", own_uid(0)), ("stubborn", own_uid(1)), ("half", own_uid(2))])
        .set("filter", "timeout", "\"1s\"")
        .filter("polite", "message", "#!/bin/sh\ntrap 'date +%s%N > ~/term; exit 77' TERM\nsleep 100 & wait\n")
        .filter(
            "stubborn",
            "message",
            "#!/bin/sh\ntrap '' TERM\nsleep 100 & (trap '' TERM; sleep 100; sleep 100) &\nwhile :; do sleep 100; done\n",
        )
        // The leader goes at once, its child does not listen.
        .filter("half", "message", "#!/bin/sh\n(trap '' TERM; sleep 100; sleep 100) &\nsleep 100\n")
        .start();
    std::thread::scope(|scope| {
        for (name, uid, least, most) in [
            ("polite", own_uid(0), 1.0, 2.9),
            ("stubborn", own_uid(1), 2.9, 6.0),
            ("half", own_uid(2), 1.0, 6.0),
        ] {
            let site = &site;
            scope.spawn(move || {
                let started = Instant::now();
                let answer = site.judge(&[&format!("{name}@test.example")], MESSAGE);
                let took = started.elapsed().as_secs_f64();
                assert_eq!(answer.letter(), 'a', "a time-out is a filter error, whatever it exits with");
                assert!((least..most).contains(&took), "{name} took {took} s");
                let gone = wait_until(Duration::from_secs(2), || processes_of(uid).is_empty());
                assert!(gone, "{name} left {:?}", processes_of(uid));
                let line = site.daemon.wait_for_log(&format!("{name}=error (message: timed out"), PATIENCE);
                assert!(line.contains("outcome=\"accept\""), "{line}");
            });
        }
    });
    assert!(site.users.account("polite").home.join("term").exists(), "SIGTERM came first");
}

#[test]
fn a_filter_that_forks_without_end_is_bounded_and_ended() {
    let site = Site::of(&[("bomb", own_uid(3)), ("alice", own_uid(4))])
        .set("filter", "timeout", "\"3s\"")
        .set("filter", "max-user-processes", "20")
        .filter(
            "bomb",
            "message",
            "#!/usr/bin/perl\nwhile (1) { defined fork or select undef, undef, undef, 0.1 }\n",
        )
        .filter("alice", "message", "#!/bin/sh\necho no\nexit 77\n")
        .start();
    std::thread::scope(|scope| {
        let bomb = scope.spawn(|| site.judge(&["bomb@test.example"], MESSAGE));
        assert!(wait_until(PATIENCE, || processes_of(own_uid(3)).len() > 10), "it forks");
        // Others are served meanwhile.
        assert_eq!(site.judge(&[ALICE], MESSAGE).text(), "550 5.7.1 no");
        assert_eq!(bomb.join().unwrap().letter(), 'a');
    });
    assert!(wait_until(PATIENCE, || processes_of(own_uid(3)).is_empty()), "{:?}", processes_of(own_uid(3)));
}

#[test]
fn what_a_filter_does_with_its_streams_does_not_change_its_verdict() {
    let big = format!("Subject: x\r\n\r\n{}", "0123456789abcde\r\n".repeat(10 << 16));
    let site = Site::of(&[("alice", own_uid(5))])
        .filter("alice", "message", "#!/bin/sh\n. ~/what\necho 'still my words'\nexit 77\n")
        .start();
    let what = site.users.account("alice").home.join("what");
    for (script, message, text) in [
        ("exec <&-", MESSAGE, "still my words"),
        ("exec <&-", big.as_bytes(), "still my words"),
        ("read -r line", big.as_bytes(), "still my words"),
        (":", big.as_bytes(), "still my words"),
        ("head -c 200000000 /dev/zero | tr '\\0' x", MESSAGE, "xxxxxxxx"),
        ("head -c 200000000 /dev/zero >&2", MESSAGE, "still my words"),
        ("sleep 100 & : hold stdout", MESSAGE, "still my words"),
        ("sleep 100 2>&1 >/dev/null & : hold stderr", MESSAGE, "still my words"),
        ("setsid sh -c 'sleep 3; : > ~/daemon' & sleep 0.3", MESSAGE, "still my words"),
        ("exec >&- 2>&-; exit 77", MESSAGE, "message refused by the recipient"),
    ] {
        fs::write(&what, format!("{script}\n")).unwrap();
        let started = Instant::now();
        let answer = site.judge(&[ALICE], message);
        let expected = format!("550 5.7.1 {text}");
        assert!(answer.text().starts_with(&expected), "{script}: {answer:?}");
        assert!(started.elapsed() < Duration::from_secs(20), "{script}: {:?}", started.elapsed());
    }
    // Children in its group went with it; a daemon in a session of its own is its user's affair.
    let rest = || processes_of(own_uid(5)).into_iter().filter(|line| line.contains("sleep 100")).count();
    assert!(wait_until(PATIENCE, || rest() == 0), "{:?}", processes_of(own_uid(5)));
    assert!(site.daemon.log_lines().iter().all(|line| line.len() < 20_000));
}

#[test]
fn a_filter_that_vanishes_or_spoils_after_it_was_seen_is_not_run() {
    let site = Site::of(&[("alice", 5131)]).set("filter", "on-error", "\"defer\"").start();
    let account = site.users.account("alice");
    let mut mta = site.mta();
    let mut ask = |between: &dyn Fn()| {
        account.filter("message", "#!/bin/sh\n: > ~/ran\nexit 77\n");
        mta.macros('M', common::site::MAIL_MACROS);
        mta.mail(&["<s@sender.example>"]);
        assert_eq!(mta.rcpt(&["<alice@test.example>"]).letter(), 'c');
        between();
        let answer = send_message(&mut mta, MESSAGE);
        mta.abort();
        answer
    };
    assert_eq!(ask(&|| fs::remove_file(account.path("message")).unwrap()).letter(), 'a');
    site.daemon.wait_for_log("filter is gone", PATIENCE);
    assert!(ask(&|| set_mode(&account.path("message"), 0o770)).text().starts_with("451 4.3.0"));
    site.daemon.wait_for_log("message: file is writable by group", PATIENCE);
    assert!(!account.home.join("ran").exists());
    assert!(ask(&|| ()).text().starts_with("550"));
}
