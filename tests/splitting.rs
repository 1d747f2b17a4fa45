//! `verdict.split = "always"`: recipients who filter differently are taken one at a time, and a real sending MTA then
//! delivers to each.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;
mod rcpt;

use std::fs;

use common::policy::{self, Request};
use common::postfix::Postfix;
use common::smtp::Client;
use common::{PATIENCE, milter, wait_until};
use rcpt::{Alone, Interfaces, MESSAGE, STRANGER, Scene, Setting, begin, counting, runs, says, send_message};

const SPLIT: &str = "split = \"always\"";
const PUT_OFF: &str = "452 4.5.3 recipients who filter differently are taken one at a time";

/// alice, bob and carol have filters of their own; dora and emil have none; fred's rules accept.
fn six() -> Setting {
    let setting = Setting::of(&["alice", "bob", "carol", "dora", "emil", "fred"]).verdict(SPLIT);
    setting.site.users.filter("alice", "message", counting("message", 77, "no, said alice"));
    setting.site.users.filter("bob", "message", counting("message", 0, ""));
    setting.site.users.filter("carol", "message", counting("message", 0, ""));
    setting.site.users.filter("fred", "message", counting("message", 77, "no, said fred"));
    setting.site.users.file("fred", "rules.toml", "[[rule]]\nsender = \"stranger@*\"\naction = \"accept\"\n");
    setting
}

fn ask(client: &mut policy::Client, instance: &str, name: &str) -> String {
    let request = Request::rcpt(STRANGER, &format!("{name}@test.example"));
    client.ask(&request.with("instance", instance))
}

#[test]
fn the_policy_service_knows_a_transaction_by_its_instance() {
    let scene = six().start_alone();
    let mut client = policy::Client::connect(scene.site.policy_address());
    assert_eq!(ask(&mut client, "1.a", "alice"), "DUNNO");
    assert_eq!(ask(&mut client, "1.a", "bob"), PUT_OFF);
    assert_eq!(ask(&mut client, "1.a", "dora"), PUT_OFF, "having none counts as one");
    assert_eq!(ask(&mut client, "1.a", "Alice+shop"), "DUNNO", "the same filter");
    // Another transaction in between, and another connection of the same smtpd.
    assert_eq!(ask(&mut client, "2.b", "bob"), "DUNNO");
    let mut another = policy::Client::connect(scene.site.policy_address());
    assert_eq!(ask(&mut another, "1.a", "carol"), PUT_OFF);
    assert_eq!(ask(&mut another, "2.b", "alice"), PUT_OFF);
    assert_eq!(ask(&mut another, "2.b", "bob"), "DUNNO");
    assert_eq!(ask(&mut client, "3.c", "dora"), "DUNNO");
    assert_eq!(ask(&mut client, "3.c", "emil"), "DUNNO", "nobody filters: never split");
    assert_eq!(ask(&mut client, "3.c", "fred"), "DUNNO", "accepted by rules: no filter judges");
    assert_eq!(ask(&mut client, "3.c", "alice"), PUT_OFF);
    // Without an instance (as VRFY, or a Postfix before 2.1) nothing is known of the transaction.
    assert_eq!(ask(&mut client, "", "alice"), "DUNNO");
    assert_eq!(ask(&mut client, "", "bob"), "DUNNO");
}

#[test]
fn a_recipient_who_is_refused_is_no_part_of_the_transaction() {
    let setting = six();
    setting.site.users.file("alice", "rules.toml", "default = \"reject\"\n");
    let scene = setting.start_alone();
    let mut client = policy::Client::connect(scene.site.policy_address());
    assert!(ask(&mut client, "1.a", "alice").starts_with("550 5.7.1 "));
    assert_eq!(ask(&mut client, "1.a", "bob"), "DUNNO");
    assert_eq!(ask(&mut client, "1.a", "carol"), PUT_OFF);
    let mut milter = scene.milter(STRANGER);
    assert!(milter.rcpt(&["<alice@test.example>"]).text().starts_with("550 5.7.1 "));
    assert_eq!(milter.rcpt(&["<bob@test.example>"]).letter(), 'c');
    assert_eq!(milter.rcpt(&["<carol@test.example>"]).text(), PUT_OFF);
}

#[test]
fn the_milter_knows_the_transaction_by_itself() {
    let scene = six().start_alone();
    let mut client = scene.milter(STRANGER);
    let rcpt = |client: &mut milter::Client, name: &str| {
        let answer = client.rcpt(&[&format!("<{name}@test.example>")]);
        if answer.letter() == 'y' { answer.text() } else { answer.letter().to_string() }
    };
    assert_eq!(rcpt(&mut client, "bob"), "c");
    assert_eq!(rcpt(&mut client, "alice"), PUT_OFF);
    assert_eq!(rcpt(&mut client, "bob+x"), "c");
    assert_eq!(rcpt(&mut client, "emil"), PUT_OFF);
    assert_eq!(send_message(&mut client).letter(), 'a');
    assert_eq!(runs(&scene.site.users, "bob", "message"), 1);
    assert_eq!(runs(&scene.site.users, "alice", "message"), 0, "she is asked alone");
    // The next transaction of the connection, and one after RSET.
    begin(&mut client, &["<stranger@sender.example>"]);
    assert_eq!(rcpt(&mut client, "alice"), "c");
    client.abort();
    begin(&mut client, &["<stranger@sender.example>"]);
    assert_eq!(rcpt(&mut client, "carol"), "c");
    assert_eq!(rcpt(&mut client, "alice"), PUT_OFF);
}

#[test]
fn an_mta_with_both_interfaces_splits_and_forgets_with_rset() {
    for interfaces in [Interfaces::Both, Interfaces::Milter, Interfaces::Policy] {
        let scene = six().interfaces(interfaces).start();
        let mut client = scene.client();
        client.mail_from(STRANGER, "");
        assert_eq!(client.rcpt_to("alice@test.example").code, 250);
        let reply = client.rcpt_to("bob@test.example");
        assert_eq!(reply.code, 452, "{interfaces:?} {reply:?}");
        assert!(reply.text().starts_with("4.5.3 ") && reply.text().ends_with("one at a time"), "{reply:?}");
        client.rset();
        client.mail_from(STRANGER, "");
        assert_eq!(client.rcpt_to("bob@test.example").code, 250, "{interfaces:?}");
        assert_eq!(client.rcpt_to("carol@test.example").code, 452);
        assert_eq!(client.data(MESSAGE).code, 250);
        // The same session goes on with the rest, as Exim does.
        client.mail_from(STRANGER, "");
        assert_eq!(client.rcpt_to("carol@test.example").code, 250, "{interfaces:?}");
        assert_eq!(client.data(MESSAGE).code, 250);
        assert_eq!((scene.delivered("bob"), scene.delivered("carol"), scene.delivered("alice")), (1, 1, 0));
    }
}

#[test]
fn users_without_filters_are_never_split() {
    let scene = six().start();
    let sent = scene.send(STRANGER, &["dora", "emil", "fred", "dora+x"], MESSAGE);
    assert!(sent.recipients.iter().all(|reply| reply.code == 250), "{sent:?}");
    assert_eq!(sent.outcome().code, 250);
    assert_eq!((scene.delivered("dora"), scene.delivered("emil"), scene.delivered("fred")), (2, 1, 1));
}

#[test]
fn without_the_setting_nobody_is_put_off() {
    let setting = Setting::of(&["alice", "bob"]);
    setting.site.users.filter("alice", "message", says(0, ""));
    setting.site.users.filter("bob", "message", says(0, ""));
    let scene = setting.start();
    let sent = scene.send(STRANGER, &["alice", "bob"], MESSAGE);
    assert!(sent.recipients.iter().all(|reply| reply.code == 250), "{sent:?}");
}

const SENDER: &str = "sam@relay.example";

/// A sending MTA that delivers everything for test.example to the scene's Postfix, and tries again after three seconds.
fn sending_mta(scene: &Scene) -> Postfix {
    Postfix::builder()
        .mailboxes(&[SENDER])
        .set("virtual_mailbox_domains", "relay.example")
        .set("myhostname", "mx.relay.example")
        .set("default_transport", format!("smtp:[127.0.0.1]:{}", scene.postfix.port()))
        .set("queue_run_delay", "1s")
        // Longer than the delivery agent may still have the file, or else qmgr(8) leaves it where it is, for good ("skipped, still
        // being delivered").
        .set("minimal_backoff_time", "3s")
        .set("maximal_backoff_time", "3s")
        .start()
}

/// For the scene's Postfix the sending MTA, which is at 127.0.0.1, is a stranger.
fn receiving(setting: Setting) -> Scene {
    setting.postfix(|p| p.set("mynetworks", "192.0.2.1/32")).start()
}

/// One message for many, handed to the sending MTA, and the end of its queue.
fn submit(relay: &Postfix, names: &[&str], body: &str) {
    let mut client = Client::connect(relay.port());
    client.ehlo("localhost");
    let addresses: Vec<String> = names.iter().map(|name| format!("{name}@test.example")).collect();
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let message = format!("From: {SENDER}\nSubject: for many\n\n{body}\n");
    assert_eq!(client.send(SENDER, &addresses, message.as_bytes()).outcome().code, 250);
    client.quit();
    assert!(wait_until(PATIENCE * 3, || relay.queue_is_empty()), "{}", relay.log());
}

#[test]
fn a_sending_mta_tells_its_user_who_refused_and_delivers_to_the_others_once() {
    let scene = receiving(six());
    let relay = sending_mta(&scene);
    submit(&relay, &["alice", "bob"], "hello");
    assert_eq!(scene.delivered("bob"), 1);
    assert_eq!(scene.delivered("alice"), 0);
    let bounces = relay.wait_delivered(SENDER, 1, PATIENCE);
    let bounce = String::from_utf8_lossy(&bounces[0]);
    assert_eq!(bounces.len(), 1);
    assert!(bounce.contains("no, said alice") && bounce.contains("<alice@test.example>"), "{bounce}");
    assert!(bounce.contains("MAILER-DAEMON@mx.relay.example"), "written by the sending MTA: {bounce}");
    assert!(!bounce.contains("bob@test.example"), "{bounce}");
    assert!(!scene.postfix.log().contains("non-delivery notification"), "no backscatter from us");
    assert!(relay.log().contains("452 4.5.3"), "{}", relay.log());
    assert_eq!(
        (runs(&scene.site.users, "alice", "message"), runs(&scene.site.users, "bob", "message")),
        (1, 1)
    );
}

#[test]
fn three_recipients_with_three_filters_and_two_without() {
    let scene = receiving(six());
    let relay = sending_mta(&scene);
    submit(&relay, &["bob", "dora", "alice", "emil", "carol"], "hello");
    for name in ["bob", "carol", "dora", "emil"] {
        assert_eq!(scene.delivered(name), 1, "{name}");
    }
    assert_eq!(scene.delivered("alice"), 0);
    for name in ["alice", "bob", "carol"] {
        assert_eq!(runs(&scene.site.users, name, "message"), 1, "{name}");
    }
    assert_eq!(relay.wait_delivered(SENDER, 1, PATIENCE).len(), 1);
}

#[test]
fn many_transactions_take_little_memory() {
    let setting = six().filter("inspect-ttl = \"60s\"");
    let scene: Alone = setting.start_alone();
    let worker = scene.site.daemon.worker_pid();
    let memory = || -> u64 {
        let status = fs::read_to_string(format!("/proc/{worker}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let mut client = policy::Client::connect(scene.site.policy_address());
    assert_eq!(ask(&mut client, "first", "alice"), "DUNNO");
    let before = memory();
    for batch in 0..100 {
        let requests: Vec<u8> = (0..200)
            .flat_map(|n| {
                let request = Request::rcpt("", "alice@test.example");
                request.with("instance", &format!("{batch:x}.{n:x}.{}", "x".repeat(200))).encode()
            })
            .collect();
        client.send_raw(&requests).unwrap();
        for _ in 0..200 {
            assert_eq!(client.read_action().unwrap().unwrap(), "DUNNO");
        }
    }
    let grown = memory().saturating_sub(before);
    assert!(grown < 40_000, "20,000 transactions take {grown} KiB");
    assert_eq!(ask(&mut client, "first", "bob"), PUT_OFF, "still known");
}
