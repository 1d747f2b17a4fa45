//! What a request and a message cost, in instructions (valgrind's callgrind) and system calls (strace), which do not depend on
//! who else uses the machine: none may cost more than it did, and none more because of what it has nothing to do with.
//!
//! Each cost is the difference of two runs of the daemon, one with twice as many requests as the other, so that starting
//! and ending it cancel out. It is the whole daemon's. The daemon is the one that `cargo test` builds, without optimization:
//! its instructions are ten times those of a release, and go up and down with them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::{Duration, SystemTime};

use common::milter::{self, Frame};
use common::policy::{self, Request};
use common::site::{MAIL_MACROS, Site, SiteBuilder};
use common::stream::Stream;
use common::{PATIENCE, wait_until};

/// Instructions, in thousands, as they were counted last. If a change is worth more of them, or fewer are needed by now,
/// write down what the test prints.
const POLICY_REQUEST: f64 = 163.0;
const POLICY_REQUEST_WITH_RULES: f64 = 320.0;
const MESSAGE_WITHOUT_FILTER: f64 = 668.0;

/// System calls, likewise: a request is read, answered, and the next one waited for.
const CALLS_OF_POLICY_REQUEST: f64 = 3.1;
const CALLS_OF_MESSAGE_WITHOUT_FILTER: f64 = 7.0;
/// Of one message on a connection of its own.
const CALLS_OF_SESSION: f64 = 20.5;

/// How much more than what is written down fails: compilers differ, and so do system libraries.
const MARGIN: f64 = 1.15;

/// How much more a cost may be because of something that it must not depend on: the daemon looks at its files every second,
/// and the two runs do not take equally long.
const NOISE: f64 = 1.08;

/// Requests of the shorter run.
const REQUESTS: usize = 200;

#[test]
fn a_policy_request_costs_no_more_instructions_than_it_did() {
    check("a policy request", instructions(site, policy_requests), POLICY_REQUEST);
}

#[test]
fn a_policy_request_about_a_user_with_rules_costs_no_more_instructions_than_it_did() {
    let cost = instructions(|| with_rules(site(), "alice"), policy_requests);
    check("a policy request with fifty rules", cost, POLICY_REQUEST_WITH_RULES);
}

#[test]
fn a_message_without_filters_costs_no_more_instructions_than_it_did() {
    check(
        "a message without filters",
        instructions(site, |site, n| drop(messages(site, n))),
        MESSAGE_WITHOUT_FILTER,
    );
}

#[test]
fn a_policy_request_takes_no_more_system_calls_than_it_did() {
    check("a policy request", system_calls(policy_requests), CALLS_OF_POLICY_REQUEST);
}

#[test]
fn a_message_without_filters_takes_no_more_system_calls_than_it_did() {
    let cost = system_calls(|site, n| drop(messages(site, n)));
    check("a message without filters", cost, CALLS_OF_MESSAGE_WITHOUT_FILTER);
}

#[test]
fn a_session_of_one_message_takes_no_more_system_calls_than_it_did() {
    check("a session of one message", system_calls(sessions), CALLS_OF_SESSION);
}

#[test]
fn a_request_costs_the_same_however_many_users_rules_of_others_and_idle_connections_there_are() {
    const OTHER_USERS: usize = 2000;
    const IDLE: usize = 300;
    let alone = instructions(site, policy_requests);
    let crowded = instructions(
        || {
            let site = with_rules(site(), "bob");
            let mut users = fs::OpenOptions::new().append(true).open(site.users.passwd_file()).unwrap();
            for n in 0..OTHER_USERS {
                writeln!(users, "user{n}:x:5100:5100::{}:/bin/sh", site.users.homes().join("x").display())
                    .unwrap();
            }
            site
        },
        |site, requests| {
            let idle: Vec<_> =
                (0..IDLE).map(|_| Stream::connect(site.policy_address()).expect("a connection")).collect();
            // His rules are in memory.
            let about_bob = Request::rcpt("s@sender.example", "bob@test.example");
            assert_eq!(policy::Client::connect(site.policy_address()).ask(&about_bob), "DUNNO");
            policy_requests(site, requests);
            drop(idle);
        },
    );
    assert!(
        crowded < alone * NOISE,
        "{crowded:.1} thousand instructions among many, {alone:.1} alone: what is looked through that should be looked up?"
    );
}

/// fork(2) copies page tables, so that it takes the longer the larger the process is that forks.
#[test]
fn a_filter_is_started_by_the_monitor_which_does_not_grow_with_the_worker() {
    let builder = site().filter("alice", "message", "#!/bin/sh\necho $PPID >\"$HOME/parent\"\n");
    let builder = with_rules(builder, "bob");
    let senders: String = (0..200_000).map(|n| format!("person{n}@friends.example\n")).collect();
    builder.users.file("bob", "friends.txt", senders);
    let site = builder.start();
    let (monitor, worker) = (site.daemon.pid(), site.daemon.worker_pid());
    let run = || {
        site.judge(&["alice@test.example"], b"Subject: x\n\nx\n");
        let parent = site.home_text("alice", "parent");
        fs::remove_file(site.users.account("alice").home.join("parent")).unwrap();
        assert_eq!(parent.trim(), monitor.to_string());
    };
    run();
    let before = (page_tables(monitor), page_tables(worker));
    let about_bob = Request::rcpt("s@sender.example", "bob@test.example");
    assert_eq!(policy::Client::connect(site.policy_address()).ask(&about_bob), "DUNNO");
    run();
    let after = (page_tables(monitor), page_tables(worker));
    assert!(after.1 >= before.1 + 8, "the worker has not grown, so this shows nothing: {before:?} {after:?}");
    assert!(after.0 <= before.0 + 4, "the monitor has grown: {before:?} {after:?}");
}

/// VmPTE of proc_pid_status(5), in KiB.
fn page_tables(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = status.lines().find_map(|line| line.strip_prefix("VmPTE:")).expect("VmPTE");
    value.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn check(what: &str, cost: f64, recorded: f64) {
    println!("{what}: {cost:.2}, recorded {recorded}");
    assert!(
        cost < recorded * MARGIN,
        "{what} costs {cost:.2}, and {recorded} is written down in tests/regression.rs. Find out what has become dearer \
         (docs/performance.md, \"To find out more\"); if it is worth it, write the new number down"
    );
}

fn site() -> SiteBuilder {
    let site = Site::of(&[("alice", 5101), ("bob", 5102)]).set("filter", "inspect-ttl", r#""1h""#);
    // The counts are written at the end, which takes a while.
    site.set("server", "drain-timeout", r#""2m""#)
}

/// Fifty rules of which the last decides, by a file of senders.
fn with_rules(site: SiteBuilder, user: &str) -> SiteBuilder {
    let rule = |n| {
        format!("[[rule]]\nsender = [\"person{n}@example.net\", \".list{n}.example\"]\naction = \"reject\"\n")
    };
    let rules: String = (1..50).map(rule).collect();
    let last = "[[rule]]\nsender-file = [\"friends.txt\"]\naction = \"accept\"\n";
    site.users.file(user, "rules.toml", rules + last);
    let friends: String = (0..500).map(|n| format!("person{n}@friends.example\n")).collect();
    site.users.file(user, "friends.txt", friends + "s@sender.example\n");
    site
}

fn policy_requests(site: &Site, requests: usize) {
    let mut client = policy::Client::connect(site.policy_address());
    let request = Request::rcpt("s@sender.example", "alice@test.example");
    for _ in 0..requests {
        assert_eq!(client.ask(&request), "DUNNO");
    }
}

/// Each with a message, one after the other.
fn sessions(site: &Site, sessions: usize) {
    for _ in 0..sessions {
        let mut mta = messages(site, 1);
        mta.quit();
        assert!(mta.read_answer().is_err(), "the connection is open");
    }
}

/// As Postfix sends them: all up to the next answer at once.
fn messages(site: &Site, messages: usize) -> milter::Client {
    let mut mta = milter::Client::connect(site.milter_address());
    mta.helo("mx.sender.example");
    let macros = |command: u8, macros: &[(&str, &str)]| {
        let text: String = macros.iter().map(|(name, value)| format!("{name}\0{value}\0")).collect();
        Frame::new(b'D', [&[command], text.as_bytes()].concat()).encode()
    };
    let recipient = [("{rcpt_addr}", "alice@test.example"), ("{rcpt_mailer}", "virtual")];
    let envelope = [
        Frame::new(b'A', []).encode(),
        macros(b'M', MAIL_MACROS),
        Frame::new(b'M', *b"<s@sender.example>\0SIZE=4096\0").encode(),
        macros(b'R', &recipient),
        Frame::new(b'R', *b"<alice@test.example>\0").encode(),
    ]
    .concat();
    let data = [macros(b'T', &[("i", "4QUEUEID")]), Frame::new(b'T', []).encode()].concat();
    for _ in 0..messages {
        for (bytes, answer) in [(&envelope, 'c'), (&data, 'a')] {
            mta.send_raw(bytes).unwrap();
            assert_eq!(mta.read_answer().unwrap().letter(), answer);
        }
    }
    mta
}

/// Thousands of instructions of one request, of a worker with one processor, and so with one thread.
fn instructions(site: impl Fn() -> SiteBuilder, ask: impl Fn(&Site, usize)) -> f64 {
    common::require("valgrind");
    let processor = first_processor();
    let pinned = ["taskset", "--cpu-list", &processor];
    let callgrind = ["valgrind", "--tool=callgrind", "--vgdb=no", "--callgrind-out-file=%/counts.%p"];
    // A child that is ended by a signal leaves no total.
    let of_process = |text: &str| {
        let total = text.lines().find_map(|line| line.strip_prefix("totals: "));
        total.and_then(|total| total.trim().parse::<f64>().ok()).unwrap_or(0.0)
    };
    let program = [&pinned[..], &callgrind].concat();
    let count = |requests| counts(site(), &program, |site| ask(site, requests), of_process);
    let (once, twice) = (count(REQUESTS), count(2 * REQUESTS));
    assert_eq!(once.len(), twice.len(), "what a user has is looked at more than once");
    let cost = (twice.iter().sum::<f64>() - once.iter().sum::<f64>()) / REQUESTS as f64 / 1000.0;
    assert!(cost > 1.0, "{cost} thousand instructions: the worker has left no count");
    cost
}

/// System calls of one request, on as many processors as there are: no thread is to wake another for it.
fn system_calls(ask: impl Fn(&Site, usize)) -> f64 {
    const REQUESTS: usize = 1000;
    let strace = ["strace", "-D", "-ff", "-qq", "--signal=none", "--output=%/calls"];
    let of_thread = |text: &str| text.lines().count() as f64;
    let count = |requests| counts(site(), &strace, |site| ask(site, requests), of_thread).iter().sum::<f64>();
    (count(2 * REQUESTS) - count(REQUESTS)) / REQUESTS as f64
}

/// Runs a daemon under a program that writes a file for each process, and reads these. In the program's
/// arguments `%` is the directory.
fn counts(
    builder: SiteBuilder,
    program: &[&str],
    ask: impl FnOnce(&Site),
    read: impl Fn(&str) -> f64,
) -> Vec<f64> {
    common::require_root();
    common::require(program[0]);
    let directory = builder.sandbox.directory("counts");
    // Each file is written as whoever the process is by then.
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o1777)).unwrap();
    let program: Vec<_> =
        program.iter().map(|word| word.replacen("%/", &format!("{}/", directory.display()), 1)).collect();
    // A file that was just written is read again every second for a while, and how often depends on the machine.
    let users = fs::File::open(builder.users.passwd_file()).unwrap();
    users.set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
    let mut site = builder.start_under(&program);
    ask(&site);
    assert_eq!(site.daemon.terminate().code(), Some(0));
    let texts = || {
        let files = fs::read_dir(&directory).unwrap().map(|file| fs::read(file.unwrap().path()).unwrap());
        files.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).collect::<Vec<_>>()
    };
    // strace is a process of its own, which may still be writing.
    let mut last = texts();
    assert!(wait_until(PATIENCE, || {
        thread::sleep(Duration::from_millis(300));
        let before = std::mem::replace(&mut last, texts());
        before == last
    }));
    last.iter().map(|text| read(text)).collect()
}

fn first_processor() -> String {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let allowed =
        status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).expect("processors");
    allowed.trim().split([',', '-']).next().expect("a processor").to_owned()
}
