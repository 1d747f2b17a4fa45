//! `default-message`, `default-recipient` and the programs of `program-directories`: filters of the site, for users who
//! write none of their own.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;

use common::milter::Answer;
use common::site::SiteBuilder;
use common::{Site, require_root};

const MESSAGE: &[u8] = b"Subject: x\r\nFrom: s@sender.example\r\n\r\nhello\r\n";
const ALICE: &str = "alice@test.example";
const BOB: &str = "bob@test.example";

/// Refuses, and tells in its reply who it is.
const WHO: &str = "#!/bin/sh
echo \"site $USERMILTER_PHASE $(id -u) $(id -g) $HOME $USER $(pwd) $SENDER $RECIPIENT $CLIENT_ADDRESS\"
exit 77
";

/// A program of root's.
fn program(site: &SiteBuilder, name: &str, script: &str) -> PathBuf {
    site.sandbox.directory("programs");
    let path = site.sandbox.write(&format!("programs/{name}"), script);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A site with `default-message` and `default-recipient` where they are given.
fn site(message: Option<&str>, recipient: Option<&str>) -> SiteBuilder {
    require_root();
    let mut site = Site::of(&[("alice", 5001), ("bob", 5002)]);
    for (key, script) in [("default-message", message), ("default-recipient", recipient)] {
        if let Some(script) = script {
            let path = program(&site, key, script);
            site = site.set("filter", key, &format!("\"{}\"", path.display()));
        }
    }
    site
}

fn shown(answer: &Answer) -> String {
    format!("{} {}", answer.letter(), answer.text())
}

#[test]
fn they_run_as_the_user_with_the_same_environment_when_the_user_has_none() {
    let site = site(Some(WHO), None).filter("bob", "message", "#!/bin/sh\nexit 0\n").start();
    let home = site.users.account("alice").home.display().to_string();
    let expected =
        format!("y 550 5.7.1 site message 5001 5001 {home} alice {home} s@sender.example {ALICE} 192.0.2.10");
    // Alice has not even a directory.
    assert_eq!(shown(&site.judge(&[ALICE], MESSAGE)), expected);
    // A file there that is no filter changes nothing.
    site.users.file("alice", "rules.toml", "default = \"filter\"\n");
    assert_eq!(shown(&site.judge(&[ALICE], MESSAGE)), expected);
    // Who has one of their own is asked by that alone.
    assert_eq!(site.judge(&[BOB], MESSAGE).letter(), 'a');
    // Another phase or extension of their own is not one.
    site.users.filter("alice", "recipient", "#!/bin/sh\nexit 0\n");
    site.users.filter("alice", "message-shop", "#!/bin/sh\necho own; exit 77\n");
    assert_eq!(shown(&site.judge(&[ALICE], MESSAGE)), expected);
    assert_eq!(shown(&site.judge(&["alice+shop@test.example"], MESSAGE)), "y 550 5.7.1 own");
}

#[test]
fn default_recipient_answers_at_rcpt_to() {
    let site = site(None, Some(WHO)).filter("bob", "recipient", "#!/bin/sh\nexit 0\n").start();
    let home = site.users.account("alice").home.display().to_string();
    assert_eq!(
        shown(&site.judge(&[ALICE], MESSAGE)),
        format!(
            "y 550 5.7.1 site recipient 5001 5001 {home} alice {home} s@sender.example {ALICE} 192.0.2.10"
        )
    );
    assert_ne!(site.judge(&[BOB], MESSAGE).letter(), 'y');
    // The user's rules come first.
    site.users.file("alice", "rules.toml", "default = \"accept\"\n");
    assert_ne!(site.judge(&[ALICE], MESSAGE).letter(), 'y');
}

#[test]
fn what_others_than_root_could_change_is_not_run() {
    let site = site(Some(WHO), None).start();
    let program = site.sandbox.join("programs/default-message");
    let (_, line) = site.judge_logged(&[ALICE], MESSAGE);
    assert!(line.contains("alice=reject"), "{line}");
    let refused = |why: &str| {
        let (answer, line) = site.judge_logged(&[ALICE], MESSAGE);
        assert_eq!(answer.letter(), 'a', "{why}: {line}");
        assert!(
            line.contains("alice=error") && line.contains("not run: ") && line.contains(why),
            "{why}: {line}"
        );
    };
    // Not even the user's own.
    chown(&program, Some(5001), None).unwrap();
    refused("owned by uid 5001");
    chown(&program, Some(0), None).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o777)).unwrap();
    refused("writable by group or others");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
    refused("setuid");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    chown(program.parent().unwrap(), Some(5002), None).unwrap();
    refused("owned by uid 5002");
    chown(program.parent().unwrap(), Some(0), None).unwrap();
    assert_eq!(site.judge_logged(&[ALICE], MESSAGE).0.letter(), 'y');
    fs::remove_file(&program).unwrap();
    refused("no such program");
}

#[test]
fn a_user_without_a_home_is_judged_by_the_sites_program_too() {
    let site = site(Some(WHO), None).start();
    let home = site.users.account("alice").home.clone();
    fs::remove_dir(&home).unwrap();
    let answer = shown(&site.judge(&[ALICE], MESSAGE));
    let home = home.display();
    assert_eq!(
        answer,
        format!("y 550 5.7.1 site message 5001 5001 {home} alice / s@sender.example {ALICE} 192.0.2.10")
    );
}

#[test]
fn rules_that_decide_leave_the_sites_programs_unasked() {
    let site = site(Some("#!/bin/sh\n: > ~/asked\nexit 77\n"), None);
    site.users.file("alice", "rules.toml", "default = \"accept\"\n");
    let site = site.start();
    let (_, line) = site.judge_logged(&[ALICE], MESSAGE);
    assert!(line.contains("alice=accept (default rule)"), "{line}");
    assert!(!site.users.account("alice").home.join("asked").exists());
    let (_, line) = site.judge_logged(&[BOB], MESSAGE);
    assert!(line.contains("bob=reject"), "{line}");
    site.home_file("bob", "asked");
}
