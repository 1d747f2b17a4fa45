//! `recipient` executables: asked at RCPT TO, once for both interfaces, and by their exit status.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;
mod rcpt;

use std::fs;
use std::time::{Duration, Instant};

use common::policy::{self, Request};
use common::{PATIENCE, wait_until};
use rcpt::{
    CLIENT_ADDRESS, CLIENT_NAME, Interfaces, MESSAGE, STRANGER, Setting, begin, counting, runs, says,
};

#[test]
fn exit_statuses_mean_what_the_contract_says() {
    let names = ["zero", "final", "no", "later", "broken", "signal", "overridden"];
    let setting = Setting::of(&names).filter("inspect-ttl = \"0s\"\nexit-status = { 3 = \"reject\" }");
    // Every user's message filter refuses, so that a message that reaches it is known.
    for name in names {
        setting.site.users.filter(name, "message", counting("message", 77, "no, said the message filter"));
    }
    let recipient = |user: &str, script: &str| drop(setting.site.users.filter(user, "recipient", script));
    recipient("zero", &says(0, "550 ignored"));
    recipient("final", &says(99, "550 ignored"));
    recipient("no", &says(77, "554 5.6.0 not from there"));
    recipient("later", &says(75, "not tonight"));
    recipient("broken", &says(1, "550 5.7.1 a broken script must not refuse"));
    recipient("signal", "#!/bin/sh\necho 550 no\nkill -SEGV $$\n");
    recipient("overridden", &says(3, "three"));
    let scene = setting.start();
    let outcome = |name| {
        let sent = scene.send(STRANGER, &[name], MESSAGE);
        let reply = sent.data.unwrap_or_else(|| sent.recipients[0].clone());
        (reply.code, reply.text())
    };
    let by_message = (550, "5.7.1 no, said the message filter".to_owned());
    assert_eq!(outcome("zero"), by_message, "go on to the message filter");
    assert_eq!(outcome("broken"), by_message);
    assert_eq!(outcome("signal"), by_message);
    assert_eq!(outcome("final").0, 250, "99 asks nothing further");
    let at_rcpt = |code, name: &str, dsn: &str, text: &str| {
        (code, format!("{dsn} <{name}@test.example>: Recipient address rejected: {text}"))
    };
    assert_eq!(outcome("no"), at_rcpt(554, "no", "5.6.0", "not from there"));
    assert_eq!(outcome("later"), at_rcpt(451, "later", "4.7.1", "not tonight"));
    assert_eq!(outcome("overridden"), at_rcpt(550, "overridden", "5.7.1", "three"));
    for (name, count) in [("zero", 1), ("broken", 1), ("signal", 1), ("final", 0), ("no", 0), ("later", 0)] {
        assert_eq!(runs(&scene.site.users, name, "message"), count, "{name}");
    }
    assert_eq!(scene.delivered("final"), 1);
    assert!(scene.site.daemon.log_lines().iter().any(|l| l.contains("broken") && l.contains("exit 1")));
    // Refused alone: the others of the transaction get the mail.
    let sent = scene.send(STRANGER, &["no", "final", "later"], MESSAGE);
    assert_eq!(sent.recipients.iter().map(|r| r.code).collect::<Vec<_>>(), [554, 250, 451]);
    assert_eq!(sent.outcome().code, 250);
}

#[test]
fn the_milter_alone_gives_the_reply_as_it_was_written() {
    let setting = Setting::of(&["alice", "bob"]).interfaces(Interfaces::Milter);
    setting.site.users.filter("alice", "recipient", says(100, "100% no\nand $HOME\n\nagain"));
    setting.site.users.filter("bob", "recipient", says(111, "451 4.4.5 busy"));
    let scene = setting.start();
    let reply = scene.rcpt(STRANGER, "alice");
    assert_eq!(
        (reply.code, reply.text()),
        (550, "5.7.1 100% no\n5.7.1 and $HOME\n5.7.1 \n5.7.1 again".into())
    );
    let reply = scene.rcpt(STRANGER, "bob");
    assert_eq!((reply.code, reply.text()), (451, "4.4.5 busy".into()));
}

#[test]
fn the_most_special_filter_is_asked() {
    let setting = Setting::of(&["alice", "bob"]);
    for (name, status) in [("recipient-shop", 77), ("recipient-default", 69), ("recipient", 99)] {
        setting.site.users.filter("alice", name, says(status, name));
    }
    setting.site.users.filter("bob", "recipient", says(77, "recipient"));
    let scene = setting.start_alone();
    let ask = |address: &str| scene.ask(STRANGER, address);
    assert_eq!(ask("alice+shop"), "550 5.7.1 recipient-shop");
    assert_eq!(ask("ALICE+SHOP"), "550 5.7.1 recipient-shop");
    assert_eq!(ask("alice+other"), "550 5.7.1 recipient-default");
    assert_eq!(ask("alice+shop+more"), "550 5.7.1 recipient-default");
    assert_eq!(ask("alice"), "DUNNO");
    assert_eq!(ask("alice+../recipient-shop"), "DUNNO", "matches nothing but the plain one");
    assert_eq!(ask("alice+.shop"), "DUNNO");
    assert_eq!(ask("bob+any"), "550 5.7.1 recipient");
    fs::remove_file(scene.site.users.account("alice").path("recipient-default")).unwrap();
    assert_eq!(scene.ask("another@sender.example", "alice+other"), "DUNNO");
}

#[test]
fn standard_input_is_empty_and_the_environment_is_that_of_the_phase() {
    let setting = Setting::of(&["alice", "bob"]).mailboxes(&["sales"]);
    let aliases = setting.site.sandbox.write("aliases", "sales: alice+orders\n");
    let script =
        "#!/bin/sh\ncat > .usermilter/input\nenv | sort > .usermilter/env\npwd >> .usermilter/env\nexit 0\n";
    setting.site.users.filter("alice", "recipient", script);
    let scene = setting.recipients(&format!("aliases = [\"{}\"]", aliases.display())).start();
    let mut client = scene.client();
    client.mail_from("Joe@Sender.Example", "SIZE=4711");
    assert_eq!(client.rcpt_to("bob@test.example").code, 250);
    assert_eq!(client.rcpt_to("Sales@Test.Example").code, 250);
    let path = |name| scene.site.users.account("alice").path(name);
    assert_eq!(fs::read(path("input")).unwrap(), b"");
    let environment = fs::read_to_string(path("env")).unwrap();
    let home = scene.site.users.account("alice").home.display().to_string();
    for line in [
        &format!("HOME={home}"),
        "USER=alice",
        "LOGNAME=alice",
        "SHELL=/bin/sh",
        "SENDER=Joe@sender.example",
        "RECIPIENT=alice+orders@test.example",
        "DOMAIN=test.example",
        "ORIGINAL_RECIPIENT=Sales@Test.Example",
        "LOCAL=alice+orders",
        "EXTENSION=orders",
        &format!("CLIENT_ADDRESS={CLIENT_ADDRESS}"),
        &format!("CLIENT_HOSTNAME={CLIENT_NAME}"),
        &format!("CLIENT_HELO={CLIENT_NAME}"),
        "CLIENT_PROTOCOL=ESMTP",
        "SASL_USERNAME=",
        "USERMILTER_PHASE=recipient",
        "USERMILTER_RECIPIENTS=Sales@test.example",
        "USERMILTER_SIZE=4711",
        "USERMILTER_DEADLINE=24",
        "USERMILTER_TLS=",
        &home,
    ] {
        assert!(environment.lines().any(|l| l == line), "no {line:?} in\n{environment}");
    }
    assert!(environment.contains("\nUSERMILTER_QUEUE_ID="), "{environment}");
}

#[test]
fn it_runs_once_when_both_interfaces_ask_the_same() {
    let setting = Setting::of(&["alice"]);
    setting.site.users.filter("alice", "recipient", counting("recipient", 0, ""));
    let scene = setting.start();
    let count = || runs(&scene.site.users, "alice", "recipient");
    assert_eq!(scene.rcpt(STRANGER, "alice").code, 250);
    assert_eq!(count(), 1, "two interfaces, one run");
    assert_eq!(scene.rcpt(STRANGER, "alice").code, 250);
    assert_eq!(count(), 1, "the same within a minute");
    assert_eq!(scene.rcpt("other@sender.example", "alice").code, 250);
    assert_eq!(count(), 2, "another sender");
    assert_eq!(scene.rcpt(STRANGER, "alice+x").code, 250);
    assert_eq!(count(), 3, "another recipient");
    let mut client = scene.client();
    client.ehlo("another.example");
    client.mail_from(STRANGER, "");
    client.rcpt_to("alice@test.example");
    assert_eq!(count(), 4, "another HELO");
    let mut client = common::smtp::Client::connect_as(scene.postfix.port(), "192.0.2.77", CLIENT_NAME);
    client.mail_from(STRANGER, "");
    client.rcpt_to("alice@test.example");
    assert_eq!(count(), 5, "another client");
}

#[test]
fn a_refusal_is_remembered_and_so_is_an_error() {
    let setting = Setting::of(&["no", "broken"]);
    setting.site.users.filter("no", "recipient", counting("recipient", 77, "never"));
    setting.site.users.filter("broken", "recipient", counting("recipient", 2, ""));
    let scene = setting.start_alone();
    for (name, letter, action) in [("no", 'y', "550 5.7.1 never"), ("broken", 'c', "DUNNO")] {
        let address = format!("<{name}@test.example>");
        assert_eq!(scene.milter(STRANGER).rcpt(&[&address]).letter(), letter);
        assert_eq!(scene.ask(STRANGER, name), action);
        assert_eq!(scene.ask(STRANGER, name), action);
        assert_eq!(runs(&scene.site.users, name, "recipient"), 1, "{name}");
    }
}

#[test]
fn simultaneous_questions_are_one_run() {
    let setting = Setting::of(&["alice"]);
    let slow = counting("recipient", 77, "no").replace("printf", "sleep 0.5\nprintf");
    setting.site.users.filter("alice", "recipient", slow);
    let scene = setting.start_alone();
    let request = Request::rcpt(STRANGER, "alice@test.example").encode();
    let mut clients: Vec<_> = (0..50).map(|_| policy::Client::connect(scene.site.policy_address())).collect();
    for client in &mut clients {
        client.send_raw(&request).unwrap();
    }
    for client in &mut clients {
        assert_eq!(client.read_action().unwrap().unwrap(), "550 5.7.1 no");
    }
    assert_eq!(runs(&scene.site.users, "alice", "recipient"), 1);
}

#[test]
fn two_addresses_of_one_user_are_two_questions() {
    let setting = Setting::of(&["alice"]);
    let aliases = setting.site.sandbox.write("aliases", "old: alice\nnew: alice\n");
    setting.site.users.filter(
        "alice",
        "recipient",
        "#!/bin/sh\ncase $ORIGINAL_RECIPIENT in old@*) echo moved; exit 77;; esac\nexit 0\n",
    );
    let scene = setting.recipients(&format!("aliases = [\"{}\"]", aliases.display())).start_alone();
    assert_eq!(scene.ask(STRANGER, "new"), "DUNNO");
    assert_eq!(scene.ask(STRANGER, "old"), "550 5.7.1 moved");
}

#[test]
fn the_deadline_is_one_for_all_users_of_an_alias() {
    let names = ["a", "b", "c", "d"];
    let setting = Setting::of(&names).filter("inspect-ttl = \"0s\"\nrecipient-deadline = \"2s\"");
    let aliases = setting.site.sandbox.write("aliases", "all: a, b, c, d\nlone: a\n");
    for name in names {
        setting.site.users.filter(name, "recipient", "#!/bin/sh\nsleep 60\nexit 77\n");
    }
    let scene = setting.recipients(&format!("aliases = [\"{}\"]", aliases.display())).start_alone();
    let started = Instant::now();
    assert_eq!(scene.ask(STRANGER, "all"), "DUNNO", "on-error is accept");
    let elapsed = started.elapsed();
    assert!((2..6).contains(&elapsed.as_secs()), "{elapsed:?}");
    let line = scene.site.daemon.wait_for_log("timed out", PATIENCE);
    assert!(line.contains("recipient"), "{line}");
    // The milter does not wait for it again.
    let started = Instant::now();
    assert_eq!(scene.milter(STRANGER).rcpt(&["<all@test.example>"]).letter(), 'c');
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}

#[test]
fn trouble_defers_where_the_site_wants_it() {
    let setting = Setting::of(&["alice", "open"]).filter("inspect-ttl = \"0s\"\non-error = \"defer\"");
    setting.site.users.filter("alice", "recipient", says(2, "oops"));
    let path = setting.site.users.filter("open", "recipient", says(0, ""));
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o722)).unwrap();
    let scene = setting.start_alone();
    assert!(scene.ask(STRANGER, "alice").starts_with("451 4.3.0 "));
    assert!(scene.ask(STRANGER, "open").starts_with("451 4.3.0 "));
    scene.site.daemon.wait_for_log("writable by group or others", PATIENCE);
}

#[test]
fn not_too_many_run_at_a_time() {
    let setting = Setting::of(&["alice"]).filter("inspect-ttl = \"0s\"\nmax-processes-per-user = 2");
    let script = "#!/bin/sh\ncd .usermilter\nmkdir -p running\n: > running/$$\nls running | wc -l >> most\nsleep 0.2\nrm running/$$\nexit 99\n";
    setting.site.users.filter("alice", "recipient", script);
    let scene = setting.start_alone();
    let mut clients: Vec<_> = (0..10).map(|_| policy::Client::connect(scene.site.policy_address())).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        client
            .send_raw(&Request::rcpt(&format!("s{n}@sender.example"), "alice@test.example").encode())
            .unwrap();
    }
    for client in &mut clients {
        assert_eq!(client.read_action().unwrap().unwrap(), "DUNNO");
    }
    let most = fs::read_to_string(scene.site.users.account("alice").path("most")).unwrap();
    assert_eq!(most.lines().count(), 10);
    assert!(most.lines().all(|n| n.trim().parse::<u32>().unwrap() <= 2), "{most}");
}

#[test]
fn a_flood_of_output_harms_only_its_own_verdict() {
    let setting = Setting::of(&["alice"]).filter("inspect-ttl = \"0s\"\nrecipient-deadline = \"10s\"");
    setting.site.users.filter(
        "alice",
        "recipient",
        "#!/bin/sh\necho no\nhead -c 20000000 /dev/zero\nexit 77\n",
    );
    let scene = setting.start_alone();
    let answer = scene.ask(STRANGER, "alice");
    assert!(answer.starts_with("550 5.7.1 no") && answer.len() < 1100, "{answer}");
    assert!(!answer.contains('\0'));
}

/// The first to ask may speak SMTPUTF8 and the next may not.
#[test]
fn a_remembered_reply_is_in_words_that_the_client_understands() {
    let setting = Setting::of(&["alice"]);
    setting.site.users.filter("alice", "recipient", says(77, "nein, böse 郵便"));
    let scene = setting.start_alone();
    let ask = |parameter: &[&str]| {
        let mut client = common::milter::Client::connect(scene.site.milter_address());
        let mail = [&["<stranger@sender.example>"], parameter].concat();
        begin(&mut client, &mail);
        client.rcpt(&["<alice@test.example>"]).text()
    };
    assert_eq!(ask(&["SMTPUTF8"]), "550 5.7.1 nein, böse 郵便");
    assert_eq!(ask(&[]), "550 5.7.1 nein, b?se ??");
    assert_eq!(ask(&["SMTPUTF8"]), "550 5.7.1 nein, böse 郵便");
    assert_eq!(scene.ask(STRANGER, "alice"), "550 5.7.1 nein, b?se ??");
}

#[test]
fn a_client_that_leaves_ends_nothing_for_the_others() {
    let setting = Setting::of(&["alice"]);
    let slow = counting("recipient", 77, "no").replace("printf", "sleep 1\nprintf");
    setting.site.users.filter("alice", "recipient", slow);
    let scene = setting.start_alone();
    let request = Request::rcpt(STRANGER, "alice@test.example");
    let mut first = policy::Client::connect(scene.site.policy_address());
    first.send_raw(&request.encode()).unwrap();
    assert!(wait_until(PATIENCE, || runs(&scene.site.users, "alice", "recipient") == 1));
    drop(first);
    assert_eq!(policy::Client::connect(scene.site.policy_address()).ask(&request), "550 5.7.1 no");
    assert_eq!(runs(&scene.site.users, "alice", "recipient"), 1);
}
