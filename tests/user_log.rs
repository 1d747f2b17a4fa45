//! `~/.usermilter/log`: what users read there of their own verdicts.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::time::{Duration, Instant};

use common::site::{SiteBuilder, send};
use common::{PATIENCE, Site, wait_until};

const MESSAGE: &[u8] = b"Subject: x\r\nFrom: s@sender.example\r\n\r\nhello\r\n";
const ALICE: &str = "alice@test.example";
const BOB: &str = "bob@test.example";

/// Alice and bob keep logs, carol does not.
fn site() -> SiteBuilder {
    let builder = Site::of(&[("alice", 5001), ("bob", 5002), ("carol", 5003)]);
    builder.users.file("alice", "log", "");
    builder.users.file("bob", "log", "");
    builder
}

/// The lines of a user's log, once there are this many, without the time in front.
#[track_caller]
fn lines(site: &Site, user: &str, count: usize) -> Vec<String> {
    let path = site.users.account(user).path("log");
    let read = || fs::read_to_string(&path).unwrap();
    wait_until(PATIENCE, || read().lines().count() >= count);
    let lines: Vec<String> = read().lines().map(without_time).collect();
    assert_eq!(lines.len(), count, "{lines:#?}");
    lines
}

/// Without the time, and without how long the filter took.
fn without_time(line: &str) -> String {
    let (time, rest) = line.split_once(' ').unwrap();
    assert!(time.parse::<jiff::Timestamp>().is_ok(), "{line}");
    match (rest.find(", 0."), rest.find("s)")) {
        (Some(start), Some(end)) => format!("{}{}", &rest[..start], &rest[end + 1..]),
        _ => rest.to_owned(),
    }
}

#[test]
fn every_verdict_is_a_line_and_standard_error_comes_with_it() {
    let site = site()
        .filter(
            "alice",
            "message",
            "#!/bin/sh\necho 'one' >&2; echo >&2; echo 'two' >&2; echo go away; exit 77\n",
        )
        .filter("bob", "message", "#!/bin/sh\nexit 0\n")
        .start();
    assert_eq!(site.judge(&[ALICE], MESSAGE).letter(), 'y');
    assert_eq!(
        lines(&site, "alice", 3),
        [
            "4QUEUEID message: one",
            "4QUEUEID message: two",
            "4QUEUEID from=<s@sender.example> to=<alice@test.example> reject (message: exit 77) \
             \"550 5.7.1 go away\"",
        ]
    );
    assert_eq!(site.judge(&[BOB], MESSAGE).letter(), 'a');
    assert_eq!(
        lines(&site, "bob", 1),
        ["4QUEUEID from=<s@sender.example> to=<bob@test.example> accept (message: exit 0)"]
    );
    // Their files, and nobody else's.
    for (user, uid) in [("alice", 5001), ("bob", 5002)] {
        assert_eq!(fs::metadata(site.users.account(user).path("log")).unwrap().uid(), uid);
    }
    assert!(!site.users.account("carol").path("log").exists());
}

#[test]
fn it_says_that_somebody_else_accepted_and_never_who() {
    let refuses = "#!/bin/sh\necho no\nexit 77\n";
    for (mixed, wish, fate) in [
        ("deliver", "", "delivered"),
        ("redirect", "", "your copy goes to <alice+junk@test.example>"),
        ("drop", "", "your copy is dropped"),
        ("drop", "mixed = \"deliver\"\n", "delivered"),
    ] {
        let site = site()
            .set("verdict", "mixed", &format!("\"{mixed}\""))
            .filter("alice", "message", refuses)
            .filter("bob", "message", "#!/bin/sh\nsleep 0.3\nexit 0\n");
        site.users.file("alice", "rules.toml", wish);
        let site = site.start();
        assert_eq!(site.judge(&[ALICE, BOB], MESSAGE).letter(), 'a');
        let told = lines(&site, "alice", 1).remove(0);
        assert!(
            told.ends_with(&format!(
                "reject (message: exit 77) \"550 5.7.1 no\"; somebody else accepts: {fate}"
            )),
            "{told}"
        );
        assert!(!told.contains("bob"), "{told}");
        assert!(!lines(&site, "bob", 1)[0].contains("alice"));
    }
}

#[test]
fn what_rules_and_recipient_filters_say_at_rcpt_to_is_told_too() {
    let site = site().filter("bob", "recipient", "#!/bin/sh\necho looking >&2; echo busy; exit 75\n").filter(
        "alice",
        "message",
        "#!/bin/sh\nexit 0\n",
    );
    site.users.file(
        "alice",
        "rules.toml",
        "[[rule]]\nsender = [\"s@*\"]\naction = \"reject\"\nreply = \"not you\"\n",
    );
    let site = site.start();
    assert_eq!(site.judge(&[ALICE], MESSAGE).letter(), 'y');
    let to = "from=<s@sender.example> to=<alice@test.example>";
    assert_eq!(lines(&site, "alice", 1), [format!("NOQUEUE {to} reject (rule 1) \"550 5.7.1 not you\"")]);
    assert_eq!(site.judge(&[BOB], MESSAGE).letter(), 'y');
    let told = lines(&site, "bob", 2);
    assert_eq!(told[0], "NOQUEUE recipient: looking");
    assert!(told[1].ends_with("defer (recipient: exit 75) \"451 4.7.1 busy\""), "{told:?}");

    // Broken: no verdict, so the message filter is asked; there is none.
    site.users.filter("bob", "recipient", "#!/bin/sh\necho oops >&2; exit 3\n");
    let mut mta = site.mta();
    assert_ne!(send(&mut mta, "<other@sender.example>", &[BOB], MESSAGE).letter(), 'y');
    let told = lines(&site, "bob", 5);
    assert_eq!(told[2..4], ["NOQUEUE recipient: oops", "NOQUEUE recipient: error (exit 3)"]);
    assert!(told[4].ends_with("to=<bob@test.example> accept (no filter)"), "{told:?}");
}

#[test]
fn who_was_not_asked_reads_that_and_filter_errors_say_what_is_wrong() {
    let site = site().filter("alice", "message", "#!/bin/sh\nexit 0\n").start();
    // Bob has no filter: his accept settles it.
    assert_ne!(site.judge(&[ALICE, BOB], MESSAGE).letter(), 'y');
    assert!(lines(&site, "alice", 1)[0].ends_with(" not-asked (message)"));
    assert!(lines(&site, "bob", 1)[0].ends_with(" accept (no filter)"));
    site.users.filter("alice", "message", "no script\n");
    site.judge(&[ALICE], MESSAGE);
    let told = lines(&site, "alice", 2).remove(1);
    assert!(told.contains(" error (message: not run: ") && told.contains("#! line"), "{told}");
}

#[test]
fn hostile_values_stay_on_their_line() {
    let site =
        site().filter("alice", "message", "#!/bin/sh\nprintf 'a\\033[2Jb\\rc\\n' >&2\nexit 0\n").start();
    let mut mta = site.mta();
    send(&mut mta, "<\"a\\\"\u{202e}x\"@sender.example>", &[ALICE], MESSAGE);
    let told = lines(&site, "alice", 2);
    assert_eq!(told[0], "4QUEUEID message: a\\u{1b}[2Jb\\rc");
    assert!(told[1].chars().all(|c| c.is_ascii_graphic() || c == ' '), "{told:?}");
}

#[test]
fn it_is_set_aside_when_it_is_long_and_the_session_waits_for_nothing() {
    let flood = "#!/bin/sh\nhead -c 16000 /dev/zero | tr '\\0' x | fold -w 400 >&2\nexit 0\n";
    let site = site().filter("alice", "message", flood).start();
    let account = site.users.account("alice");
    let (log, old) = (account.path("log"), account.path("log.1"));
    fs::OpenOptions::new().append(true).open(&log).unwrap().set_len((1 << 20) - 100).unwrap();
    for _ in 0..3 {
        site.judge(&[ALICE], MESSAGE);
    }
    assert!(wait_until(PATIENCE, || old.exists() && fs::metadata(&log).is_ok_and(|m| m.len() > 0)));
    assert!(fs::metadata(&old).unwrap().len() < (1 << 20) + 64 * 1024);
    assert_eq!(fs::metadata(&log).unwrap().uid(), 5001);

    // A FIFO that nobody reads, a directory: nothing is written, nobody waits.
    fs::remove_file(&log).unwrap();
    nix::unistd::mkfifo(&log, nix::sys::stat::Mode::S_IRWXU).unwrap();
    nix::unistd::chown(&log, Some(5001.into()), None).unwrap();
    let seen = site.daemon.log_lines().len();
    let started = Instant::now();
    site.judge(&[ALICE], MESSAGE);
    assert!(started.elapsed() < Duration::from_secs(5));
    let line = site.daemon.wait_for_log_after(seen, "user alice: log: ", PATIENCE);
    assert!(line.contains("not a regular file"), "{line}");
}

#[test]
fn a_log_leads_to_no_file_that_the_user_could_not_write() {
    let site = site().filter("alice", "message", "#!/bin/sh\nexit 0\n").start();
    let precious = site.sandbox.write("precious", "root's\n");
    let log = site.users.account("alice").path("log");
    fs::remove_file(&log).unwrap();
    symlink(&precious, &log).unwrap();
    nix::unistd::fchownat(
        nix::fcntl::AT_FDCWD,
        &log,
        Some(5001.into()),
        None,
        nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW,
    )
    .unwrap();
    let seen = site.daemon.log_lines().len();
    site.judge(&[ALICE], MESSAGE);
    site.daemon.wait_for_log_after(seen, "user alice: log: ", PATIENCE);
    assert_eq!(fs::read_to_string(precious).unwrap(), "root's\n");
}
