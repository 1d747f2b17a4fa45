//! How the verdicts of several users become one answer, with a real Postfix from SMTP to Maildir.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;

use std::time::{Duration, Instant};

use common::site::{MAIL_MACROS, SiteBuilder, send, send_message};
use common::{PATIENCE, Postfix, Site, smtp, wait_until};

const MESSAGE: &[u8] = b"Subject: x\r\n\r\nhello\r\n";
const ALICE: &str = "alice@test.example";
const BOB: &str = "bob@test.example";
const CAROL: &str = "carol@test.example";
const USERS: &[(&str, u32)] = &[("alice", 5001), ("bob", 5002), ("carol", 5003)];

fn refuse(text: &str) -> String {
    format!("#!/bin/sh\necho '{text}'\nexit 77\n")
}

fn defer(text: &str) -> String {
    format!("#!/bin/sh\necho '{text}'\nexit 75\n")
}

const ACCEPT: &str = "#!/bin/sh\nexit 0\n";

/// Notes when it starts and stops, in nanoseconds.
fn stamped(seconds: f64, status: i32) -> String {
    format!("#!/bin/sh\ndate +%s%N >> ~/start\nsleep {seconds}\ndate +%s%N >> ~/stop\nexit {status}\n")
}

fn with_postfix(builder: SiteBuilder) -> (Site, Postfix, smtp::Client) {
    let site = builder.start();
    let postfix = Postfix::builder().milter(site.milter_address()).start();
    let client = smtp::Client::connect_as(postfix.port(), "192.0.2.10", "mx.sender.example");
    (site, postfix, client)
}

fn stamps(site: &Site, user: &str, name: &str) -> Vec<u128> {
    let path = site.users.account(user).home.join(name);
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| line.parse().unwrap()).collect()
}

#[test]
fn the_algebra_of_verdicts_holds_from_smtp_to_the_maildir() {
    let (site, postfix, mut client) = with_postfix(Site::of(USERS));
    let all = [ALICE, BOB, CAROL];
    let (no, later) = (refuse("no"), defer("later"));
    let never = refuse("554 5.6.0 never\never");
    let tomorrow = defer("452 4.2.2 tomorrow");
    let mut delivered = 0;
    for (scripts, recipients, code, text) in [
        ([&*no, &no, &no], &all[..], 550, "5.7.1 no"),
        ([&no, &no, &no], &all[..1], 550, "5.7.1 no"),
        ([&never, &no, &no], &all[..1], 554, "5.6.0 never\n5.6.0 ever"),
        // Replies that differ: a line for each recipient, in the order of the client.
        (
            [&never, &no, &no],
            &[CAROL, ALICE][..],
            550,
            "5.7.1 <carol@test.example>: no\n5.7.1 <alice@test.example>: never ever",
        ),
        ([&later, &no, &no], &all[..], 451, "4.7.1 later"),
        ([&no, &no, &tomorrow], &all[..], 452, "4.2.2 tomorrow"),
        (
            [&later, &no, &tomorrow],
            &all[..],
            451,
            "4.7.1 <alice@test.example>: later\n4.7.1 <carol@test.example>: tomorrow",
        ),
        // Somebody accepts: everybody gets it, refusers and deferrers too.
        ([&no, &later, ACCEPT], &all[..], 250, ""),
        ([&no, ACCEPT, &no], &all[..], 250, ""),
        ([&no, &no, "#!/bin/sh\nexit 1\n"], &all[..], 250, ""),
        ([&no, &no, "#!/bin/sh\nexit 99\n"], &all[..], 250, ""),
    ] {
        for ((user, _), script) in USERS.iter().zip(scripts) {
            site.users.filter(user, "message", script);
        }
        let sent = client.send("s@sender.example", recipients, MESSAGE);
        let reply = sent.outcome();
        assert_eq!(reply.code, code, "{}", client.transcript());
        assert!(code == 250 || reply.text() == text, "{reply:?}");
        delivered += usize::from(code == 250);
    }
    for (user, _) in USERS {
        postfix.wait_delivered(user, delivered, PATIENCE);
    }
    postfix.wait_queue_empty();
    for (user, _) in USERS {
        assert_eq!(postfix.maildir(user).len(), delivered, "{user}");
    }
}

#[test]
fn who_cannot_be_asked_counts_as_accepting() {
    let site = Site::of(USERS).filter("alice", "message", &refuse("no")).start();
    for (others, letter) in [
        (&[][..], 'y'),
        (&[BOB], 'a'),
        (&["postmaster@test.example"], 'a'),
        (&["abuse+x@test.example"], 'a'),
        (&["nobody-here@test.example"], 'a'),
        (&["alice@elsewhere.example"], 'a'),
    ] {
        let recipients = [&[ALICE], others].concat();
        assert_eq!(site.judge(&recipients, MESSAGE).letter(), letter, "{recipients:?}");
    }
}

#[test]
fn the_log_has_one_line_per_transaction_with_every_users_verdict() {
    let site = Site::of(USERS)
        .filter("alice", "message", &refuse("no"))
        .filter("bob", "message", &defer("later"))
        .filter("carol", "message", "#!/bin/sh\nexit 3\n")
        .start();
    let (answer, line) = site.judge_logged(&[ALICE, BOB, CAROL], MESSAGE);
    assert_eq!(answer.letter(), 'a');
    for part in [
        "4QUEUEID: accept",
        "from=\"<s@sender.example>\"",
        "to=\"<alice@test.example>,<bob@test.example>,<carol@test.example>\"",
        "client=\"mx.sender.example[192.0.2.10]\"",
        "alice=reject (message: exit 77, ",
        "bob=defer (message: exit 75, ",
        "carol=error (message: exit 3, ",
        "outcome=\"accept\"",
    ] {
        assert!(line.contains(part), "no {part} in {line}");
    }
    assert_eq!(site.daemon.log_lines().iter().filter(|line| line.contains("outcome=")).count(), 1);
}

#[test]
fn filters_of_a_transaction_run_at_the_same_time() {
    let site = Site::of(USERS)
        .filter("alice", "message", &stamped(1.5, 77))
        .filter("bob", "message", &stamped(1.5, 77))
        .filter("carol", "message", &stamped(1.5, 77))
        .start();
    assert_eq!(site.judge(&[ALICE, BOB, CAROL], MESSAGE).letter(), 'y');
    let last_start = USERS.iter().map(|(user, _)| stamps(&site, user, "start")[0]).max().unwrap();
    let first_stop = USERS.iter().map(|(user, _)| stamps(&site, user, "stop")[0]).min().unwrap();
    assert!(last_start < first_stop, "one waited for another");
}

#[test]
fn the_answer_comes_as_soon_as_it_is_settled_and_the_slow_filter_is_let_run() {
    let site = Site::of(USERS)
        .filter("alice", "message", &stamped(3.0, 77))
        .filter("bob", "message", ACCEPT)
        .start();
    let started = Instant::now();
    assert_eq!(site.judge(&[ALICE, BOB], MESSAGE).letter(), 'a');
    assert!(stamps(&site, "alice", "stop").is_empty(), "answered after {:?}", started.elapsed());
    let line = site.daemon.wait_for_log("outcome=", PATIENCE);
    assert_eq!(stamps(&site, "alice", "stop").len(), 1, "it was not killed");
    assert!(line.contains("alice=reject") && line.contains("bob=accept"), "{line}");
}

#[test]
fn filters_that_cannot_change_a_settled_outcome_are_not_started() {
    let names: Vec<String> = (0..6).map(|n| format!("user{n}")).collect();
    let users: Vec<(&str, u32)> = names.iter().map(String::as_str).zip(5001..).collect();
    let mut builder = Site::of(&users).set("filter", "max-processes", "1");
    for (user, _) in &users {
        builder = builder.filter(user, "message", "#!/bin/sh\n: > ~/ran\nexit 0\n");
    }
    let site = builder.start();
    let addresses: Vec<String> = names.iter().map(|name| format!("{name}@test.example")).collect();
    let recipients: Vec<&str> = addresses.iter().map(String::as_str).collect();
    for _ in 0..5 {
        let (answer, line) = site.judge_logged(&recipients, MESSAGE);
        assert_eq!(answer.letter(), 'a');
        let ran = names.iter().filter(|name| {
            let path = site.users.account(name).home.join("ran");
            std::fs::remove_file(path).is_ok()
        });
        assert_eq!(ran.count(), 1, "{line}");
        assert_eq!(line.matches("=not-asked").count(), 5, "{line}");
    }
}

/// The most filters that ran at a time.
fn overlap(site: &Site, users: &[&str]) -> usize {
    let mut events: Vec<(u128, i32)> = Vec::new();
    for user in users {
        events.extend(stamps(site, user, "start").into_iter().map(|at| (at, 1)));
        events.extend(stamps(site, user, "stop").into_iter().map(|at| (at, -1)));
    }
    events.sort_unstable();
    let mut now = 0;
    events
        .iter()
        .map(|(_, step)| {
            now += step;
            now
        })
        .max()
        .unwrap_or(0)
        .try_into()
        .unwrap()
}

#[test]
fn no_more_filters_run_at_a_time_than_the_configuration_allows() {
    let site = Site::of(USERS)
        .set("filter", "max-processes", "3")
        .set("filter", "max-processes-per-user", "2")
        .filter("alice", "message", &stamped(0.3, 77))
        .filter("bob", "message", &stamped(0.3, 77))
        .filter("carol", "message", &stamped(0.3, 77))
        .start();
    std::thread::scope(|scope| {
        for n in 0..12 {
            let (site, recipient) = (&site, [ALICE, ALICE, BOB, CAROL][n % 4]);
            scope.spawn(move || assert_eq!(site.judge(&[recipient], MESSAGE).letter(), 'y'));
        }
    });
    assert_eq!(overlap(&site, &["alice"]), 2);
    assert_eq!(overlap(&site, &["alice", "bob", "carol"]), 3);
    assert_eq!(stamps(&site, "alice", "stop").len(), 6);
}

#[test]
fn a_deadline_ends_what_runs_and_what_waits() {
    let site = Site::of(USERS)
        .set("filter", "deadline", "\"1s\"")
        .set("filter", "max-processes", "1")
        .set("filter", "on-error", "\"defer\"")
        .filter("alice", "message", "#!/bin/sh\necho $USERMILTER_DEADLINE > ~/deadline\nsleep 50\nexit 77\n")
        .filter("bob", "message", "#!/bin/sh\necho $USERMILTER_DEADLINE > ~/deadline\nsleep 50\nexit 77\n")
        .start();
    let started = Instant::now();
    let (answer, line) = site.judge_logged(&[ALICE, BOB], MESSAGE);
    assert!(answer.text().starts_with("451 4.3.0"), "{answer:?}");
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
    assert_eq!(line.matches("=error").count(), 2, "{line}");
    assert!(
        line.contains("alice=error (message: timed out,") || line.contains("bob=error (message: timed out,"),
        "{line}"
    );
}

#[test]
fn a_user_reached_by_two_addresses_is_asked_once_per_distinct_filter() {
    let note = "#!/bin/sh\nwhat=$(echo \"${0##*/} $RECIPIENT $EXTENSION $USERMILTER_RECIPIENTS\" | tr '\\n' ' ')\n\
                echo \"$what\" >> ~/asked\nexit 77\n";
    let site = Site::of(USERS)
        .filter("alice", "message", note)
        .filter("alice", "message-shop", note)
        .filter("bob", "message-default", note)
        .start();
    let recipients = [
        "alice@test.example",
        "alice+news@test.example",
        "alice+Shop@test.example",
        "ALICE@test.example",
        "alice+shop@test.example",
        "bob+x@test.example",
        "bob+y@test.example",
    ];
    assert_eq!(site.judge(&recipients, MESSAGE).letter(), 'y');
    let asked = |user: &str| {
        let mut lines: Vec<String> =
            site.home_text(user, "asked").lines().map(|l| l.trim().to_owned()).collect();
        lines.sort();
        lines
    };
    assert_eq!(
        asked("alice"),
        [
            "message alice@test.example  alice@test.example alice+news@test.example ALICE@test.example",
            "message-shop alice+Shop@test.example shop alice+Shop@test.example alice+shop@test.example",
        ]
    );
    assert_eq!(asked("bob"), ["message-default bob+x@test.example x bob+x@test.example bob+y@test.example"]);
    // Bob has nothing for his plain address.
    assert_eq!(site.judge(&[BOB], MESSAGE).letter(), 'a');
}

#[test]
fn extensions_choose_the_most_special_filter() {
    let site = Site::of(USERS)
        .set("recipients", "delimiters", "\"+-\"")
        .filter("alice", "message", &refuse("plain"))
        .filter("alice", "message-default", &refuse("default"))
        .filter("alice", "message-shop", &refuse("shop"))
        .start();
    for (address, text) in [
        ("alice@test.example", "plain"),
        ("alice+shop@test.example", "shop"),
        ("alice-shop@test.example", "shop"),
        ("alice+SHOP@test.example", "shop"),
        ("alice+other@test.example", "default"),
        ("alice+@test.example", "default"),
        // Not a way out of the directory.
        ("alice+../message-shop@test.example", "plain"),
        ("alice+.hidden@test.example", "plain"),
        ("alice+a/b@test.example", "plain"),
    ] {
        assert_eq!(site.judge(&[address], MESSAGE).text(), format!("550 5.7.1 {text}"), "{address}");
    }
}

#[test]
fn an_alias_refuses_only_if_all_its_users_do_and_never_tells_who_they_are() {
    let builder = Site::of(USERS);
    let aliases = builder.sandbox.write(
        "aliases",
        "team: alice, bob\nlonely: alice\nwide: alice, someone@elsewhere.example\nnested: team, carol\npipe: \"|/bin/x\", alice\nloop: loop2\nloop2: loop\n",
    );
    let virtual_aliases = builder.sandbox.write(
        "virtual",
        "sales@test.example alice@test.example, carol@test.example\nsales2@test.example sales@test.example\n",
    );
    let site = builder
        .set("recipients", "aliases", &format!("[\"{}\"]", aliases.display()))
        .set("recipients", "virtual", &format!("[\"{}\"]", virtual_aliases.display()))
        .filter("alice", "message", &refuse("alice says no"))
        .filter("bob", "message", &refuse("bob says no"))
        .filter("carol", "message", ACCEPT)
        .start();
    let ask = |address: &str| site.judge(&[&format!("{address}@test.example")], MESSAGE);
    assert_eq!(ask("team").text(), "550 5.7.1 alice says no");
    assert_eq!(ask("Lonely+x").text(), "550 5.7.1 alice says no");
    for accepted in ["wide", "nested", "pipe", "loop", "sales", "sales2"] {
        assert_eq!(ask(accepted).letter(), 'a', "{accepted}");
    }
    site.users.filter("carol", "message", refuse("carol says no"));
    for refused in ["nested", "sales", "sales2"] {
        assert_eq!(ask(refused).letter(), 'y', "{refused}");
    }
    site.users.filter("bob", "message", defer("bob says later"));
    assert_eq!(ask("team").text(), "451 4.7.1 bob says later");
    // The addresses of the reply are those that the client named.
    let answer = site.judge(&["sales@test.example", "lonely@test.example", "team@test.example"], MESSAGE);
    assert!(answer.text().starts_with("451 4.7.1"), "{answer:?}");
    site.users.filter("bob", "message", refuse("bob says no"));
    site.users.filter("alice", "message", "#!/bin/sh\necho \"no to $LOCAL\"\nexit 77\n");
    let answer = site.judge(&["sales@test.example", BOB], MESSAGE);
    let text = answer.text();
    let lines: Vec<&str> = text.split("\r\n").collect();
    assert!(lines[0].starts_with("550-5.7.1 <sales@test.example>: "), "{text}");
    assert_eq!(lines[1], "550 5.7.1 <bob@test.example>: bob says no");
}

#[test]
fn a_reply_for_several_recipients_is_ascii_unless_the_client_speaks_smtputf8() {
    let site = Site::of(&[("jürgen", 5001), ("bob", 5002)])
        .filter("jürgen", "message", &refuse("no"))
        .filter("bob", "message", &refuse("never"))
        .start();
    for (parameter, name) in [("SMTPUTF8", "jürgen"), ("BODY=8BITMIME", "j?rgen")] {
        let mut mta = site.mta();
        mta.macros('M', MAIL_MACROS);
        mta.mail(&["<s@sender.example>", parameter]);
        assert_eq!(mta.rcpt(&["<jürgen@test.example>"]).letter(), 'c');
        assert_eq!(mta.rcpt(&["<bob@test.example>"]).letter(), 'c');
        let answer = send_message(&mut mta, MESSAGE);
        let expected = format!("550-5.7.1 <{name}@test.example>: no\r\n550 5.7.1 <bob@test.example>: never");
        assert_eq!(answer.text(), expected);
    }
}

#[test]
fn transactions_side_by_side_do_not_disturb_each_other() {
    let site = Site::of(USERS)
        .filter("alice", "message", "#!/bin/sh\nread -r line\necho \"$line\"\nexit 77\n")
        .set("filter", "trace-headers", "false")
        .start();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let site = &site;
            scope.spawn(move || {
                let mut mta = site.mta();
                for n in 0..10 {
                    let message = format!("Subject: {thread}-{n}\r\n\r\n{}", "x\r\n".repeat(n * 1000));
                    let answer = send(&mut mta, "<s@sender.example>", &[ALICE], message.as_bytes());
                    assert_eq!(answer.text(), format!("550 5.7.1 Subject: {thread}-{n}"));
                }
            });
        }
    });
    assert!(wait_until(PATIENCE, || site
        .daemon
        .log_lines()
        .iter()
        .filter(|l| l.contains("outcome="))
        .count()
        == 80));
}
