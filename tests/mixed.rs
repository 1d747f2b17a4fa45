//! Recipients who disagree, and replies for many: what Postfix delivers to whom, and what its client reads.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;
mod rcpt;

use common::smtp::Sent;
use common::{PATIENCE, milter};
use rcpt::{Interfaces, MESSAGE, STRANGER, Scene, Setting, says, send_message};

/// alice refuses, bob accepts, carol defers, dora has no filter. Each has a mailbox for what is redirected, which Postfix
/// finds by its whole name; with `recipient_delimiter` alone it would be the user's own.
fn four(verdict: &str) -> Setting {
    let setting =
        Setting::of(&["alice", "bob", "carol", "dora"]).verdict(verdict).interfaces(Interfaces::Milter);
    setting.site.users.filter("alice", "message", says(77, "no, said alice"));
    setting.site.users.filter("bob", "message", says(0, ""));
    setting.site.users.filter("carol", "message", says(75, "later, said carol"));
    setting.mailboxes(&["alice+junk", "bob+junk", "carol+junk", "dora+junk"])
}

#[track_caller]
fn accepted(sent: &Sent) {
    assert!(sent.recipients.iter().all(|reply| reply.code == 250), "{sent:?}");
    assert_eq!(sent.outcome().code, 250, "{sent:?}");
}

/// How many messages each mailbox has.
#[track_caller]
fn delivered<const N: usize>(scene: &Scene, names: [&str; N]) -> [usize; N] {
    names.map(|name| scene.delivered(name))
}

#[test]
fn a_refused_copy_is_redirected() {
    let scene = four("mixed = \"redirect\"").start();
    accepted(&scene.send(STRANGER, &["alice", "bob", "dora"], MESSAGE));
    assert_eq!(delivered(&scene, ["alice", "alice+junk", "bob", "dora"]), [0, 1, 1, 1]);
    assert_eq!(delivered(&scene, ["bob+junk", "dora+junk"]), [0, 0]);
    let line = scene.site.daemon.wait_for_log("redirected to <alice+junk@test.example>", PATIENCE);
    assert!(line.contains("alice=reject") && line.contains("bob=accept"), "{line}");
    // An extension is replaced.
    accepted(&scene.send(STRANGER, &["alice+shop", "bob"], MESSAGE));
    assert_eq!(delivered(&scene, ["alice", "alice+junk", "bob"]), [0, 2, 2]);
    // All refuse: refused, nothing redirected.
    let sent = scene.send(STRANGER, &["alice", "alice+x"], MESSAGE);
    assert_eq!((sent.outcome().code, sent.outcome().text()), (550, "5.7.1 no, said alice".into()));
    // Nobody accepts and one defers: the client is to come again.
    let sent = scene.send(STRANGER, &["alice", "carol"], MESSAGE);
    assert_eq!((sent.outcome().code, sent.outcome().text()), (451, "4.7.1 later, said carol".into()));
    // Somebody accepts: who defers counts as accepting.
    accepted(&scene.send(STRANGER, &["alice", "carol", "dora"], MESSAGE));
    assert_eq!(delivered(&scene, ["alice", "alice+junk", "carol", "carol+junk", "dora"]), [0, 3, 1, 0, 2]);
}

#[test]
fn a_refused_copy_is_dropped() {
    let scene = four("mixed = \"drop\"").start();
    accepted(&scene.send(STRANGER, &["bob", "alice"], MESSAGE));
    accepted(&scene.send(STRANGER, &["alice", "carol", "dora"], MESSAGE));
    assert_eq!(delivered(&scene, ["alice", "alice+junk", "bob", "carol", "dora"]), [0, 0, 1, 1, 1]);
    scene.site.daemon.wait_for_log("<alice@test.example> dropped", PATIENCE);
    assert!(!scene.postfix.log().contains("non-delivery notification"));
    assert_eq!(scene.send(STRANGER, &["alice"], MESSAGE).outcome().code, 550);
}

#[test]
fn by_default_all_get_it() {
    let scene = four("").start();
    accepted(&scene.send(STRANGER, &["alice", "bob"], MESSAGE));
    assert_eq!(delivered(&scene, ["alice", "alice+junk", "bob"]), [1, 0, 1]);
}

#[test]
fn users_may_wish_for_less_than_the_site_allows() {
    let with_wish = |site: &str, wish: &str| {
        let setting = four(&format!("mixed = \"{site}\"")).mailboxes(&["alice+spam"]);
        setting.site.users.file("alice", "rules.toml", wish);
        let scene = setting.start();
        accepted(&scene.send(STRANGER, &["alice", "bob"], MESSAGE));
        delivered(&scene, ["alice", "alice+junk", "alice+spam", "bob"])
    };
    assert_eq!(with_wish("redirect", "mixed = \"drop\""), [0, 1, 0, 1]);
    assert_eq!(with_wish("drop", "mixed = \"redirect\"\nredirect-extension = \"spam\""), [0, 0, 1, 1]);
    assert_eq!(with_wish("drop", "mixed = \"deliver\""), [1, 0, 0, 1]);
    assert_eq!(with_wish("deliver", "mixed = \"drop\""), [1, 0, 0, 1]);
    assert_eq!(with_wish("drop", ""), [0, 0, 0, 1]);
}

/// Spellings of alice@test.example that Postfix takes. Nobody's filter is to be got around by one, and whoever is deleted
/// must be deleted under the name that Postfix has for them.
const SPELLINGS: &[&str] = &[
    "<ALICE@Test.EXAMPLE>",
    "alice@test.example",
    "< alice@test.example >",
    "<alice@test.example.>",
    "<\"alice\"@test.example>",
    "<\"al\\ice\"@test.example>",
    "<al\\ice@test.example>",
    "<\"alice@test.example\">",
    "<@x.example,@y.example:alice@test.example>",
    "<@x.example:ALICE@Test.Example>",
    "<alice@test.example (Alice)>",
    "<alice(x)@test.example>",
    "<test.example!alice>",
    "<alice%test.example>",
];

#[test]
fn recipients_are_judged_and_changed_however_they_are_written() {
    for mixed in ["redirect", "drop"] {
        let scene = four(&format!("mixed = \"{mixed}\"")).start();
        let send = |argument: &str, others: &[&str]| {
            let mut client = scene.client();
            client.mail_from(STRANGER, "");
            assert_eq!(client.command(&format!("RCPT TO:{argument}")).code, 250, "{argument}");
            for other in others {
                assert_eq!(client.rcpt_to(other).code, 250);
            }
            client.data(MESSAGE)
        };
        for (count, argument) in (1..).zip(SPELLINGS) {
            assert_eq!(send(argument, &[]).text(), "5.7.1 no, said alice", "{argument}");
            assert_eq!(send(argument, &["bob@test.example"]).code, 250, "{argument}");
            let junk = if mixed == "redirect" { count } else { 0 };
            assert_eq!(delivered(&scene, ["alice", "alice+junk", "bob"]), [0, junk, count], "{argument}");
        }
        // Twice in a transaction.
        let junk = scene.delivered("alice+junk");
        accepted(&scene.send(STRANGER, &["alice", "bob", "alice"], MESSAGE));
        let once = if mixed == "redirect" { junk + 1 } else { 0 };
        assert_eq!(delivered(&scene, ["alice", "alice+junk"]), [0, once]);
    }
}

#[test]
fn the_delimiter_is_the_sites_and_without_one_nothing_is_redirected() {
    let setting = four("mixed = \"redirect\"").recipients("delimiters = \"-+\"");
    let setting = setting.mailboxes(&["alice-junk"]).postfix(|p| p.set("recipient_delimiter", "-+"));
    let scene = setting.start();
    accepted(&scene.send(STRANGER, &["alice+x", "bob"], MESSAGE));
    assert_eq!(delivered(&scene, ["alice", "alice-junk"]), [0, 1]);

    let scene = four("mixed = \"redirect\"").recipients("delimiters = \"\"").start();
    accepted(&scene.send(STRANGER, &["alice", "bob"], MESSAGE));
    assert_eq!(delivered(&scene, ["alice", "alice+junk", "bob"]), [1, 0, 1]);
}

/// An alias need not exist with an extension, so its users' own addresses do.
#[test]
fn an_alias_is_redirected_to_its_users() {
    let setting = four("mixed = \"redirect\"").mailboxes(&["eve+x", "eve+junk"]);
    let map = "sales@test.example alice@test.example\nteam@test.example alice@test.example, eve+x@test.example\n\
               all@test.example alice@test.example, bob@test.example\n";
    let virtual_map = setting.site.sandbox.write("virtual", map);
    let mut setting = setting
        .recipients(&format!("virtual = [\"{}\"]", virtual_map.display()))
        .postfix(|p| p.set("virtual_alias_maps", format!("texthash:{}", virtual_map.display())));
    // A user whose name has the delimiter in it.
    let uid = rcpt::unused_uid();
    setting.site.users.add("eve+x", uid, uid);
    setting.site.users.filter("eve+x", "message", says(77, "no, said eve"));
    let setting = setting.mailboxes(&["eve+x+junk"]);
    let scene = setting.start();
    accepted(&scene.send(STRANGER, &["sales", "bob"], MESSAGE));
    assert_eq!(delivered(&scene, ["alice", "alice+junk", "bob"]), [0, 1, 1]);
    accepted(&scene.send(STRANGER, &["team", "bob"], MESSAGE));
    assert_eq!(
        delivered(&scene, ["alice", "alice+junk", "eve+x", "eve+x+junk", "eve+junk"]),
        [0, 2, 0, 1, 0]
    );
    // One of an alias accepts: the alias does.
    accepted(&scene.send(STRANGER, &["all"], MESSAGE));
    assert_eq!(delivered(&scene, ["alice", "alice+junk", "bob"]), [1, 2, 3]);
    // The client reads of the addresses that it named, and of nobody behind them.
    let sent = scene.send(STRANGER, &["team", "alice+x"], MESSAGE);
    let text = sent.outcome().text();
    assert_eq!(text, "5.7.1 no, said alice", "both say the same");
    assert!(!text.contains("eve"));
    assert!(!scene.postfix.log().contains("non-delivery notification"));
}

#[test]
fn an_mta_that_lets_nobody_change_recipients_delivers_and_the_log_says_so() {
    // None at all would stand for those of version 1.
    const ADD_HEADERS: u32 = 0x1;
    const ADD_RECIPIENT: u32 = 0x4;
    const DELETE_RECIPIENT: u32 = 0x8;
    let all_but = |missing: u32| milter::ALL_ACTIONS & !missing;
    let scene = four("mixed = \"drop\"").start_alone();
    for (actions, changes) in [
        (all_but(ADD_RECIPIENT), 0),
        (all_but(DELETE_RECIPIENT), 0),
        (ADD_HEADERS, 0),
        (milter::ALL_ACTIONS, 1),
    ] {
        let seen = scene.site.daemon.log_lines().len();
        let mut client = milter::Client::connect_only(scene.site.milter_address());
        client.negotiate(6, actions, milter::protocol::ALL);
        rcpt::begin(&mut client, &["<stranger@sender.example>"]);
        assert_eq!(client.rcpt(&["<alice@test.example>"]).letter(), 'c');
        assert_eq!(client.rcpt(&["<bob@test.example>"]).letter(), 'c');
        let answer = send_message(&mut client);
        assert_eq!((answer.letter(), answer.changes.len()), ('a', changes), "{actions:#x} {answer:?}");
        if changes == 0 {
            scene.site.daemon.wait_for_log_after(seen, "this MTA lets nobody change recipients", PATIENCE);
        } else {
            assert_eq!(answer.changes[0].data, b"<alice@test.example>\0");
        }
    }
}

fn text(sent: &Sent) -> Vec<String> {
    sent.outcome().lines.clone()
}

#[test]
fn many_who_refuse_get_a_line_each_in_the_clients_order() {
    let names: Vec<String> = (0..30).map(|n| format!("user{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let setting = Setting::of(&names).interfaces(Interfaces::Milter);
    let long = "x".repeat(900);
    for name in &names {
        setting.site.users.filter(name, "message", says(77, &format!("100% no, said {name} %s {long}")));
    }
    let scene = setting.start();
    let order: Vec<&str> = names.iter().rev().copied().collect();
    let sent = scene.send(STRANGER, &order, MESSAGE);
    assert_eq!(sent.outcome().code, 550);
    let lines = text(&sent);
    assert_eq!(lines.len(), 30);
    for (line, name) in lines.iter().zip(&order) {
        let expected = format!("5.7.1 <{name}@test.example>: 100% no, said {name} %s xxxxxxxx");
        assert!(line.starts_with(&expected), "{line}");
        assert!(line.len() > 940, "{} {line}", line.len());
    }
    // One recipient: the reply as it was written.
    let sent = scene.send(STRANGER, &["user7"], MESSAGE);
    assert_eq!(text(&sent), [format!("5.7.1 100% no, said user7 %s {long}")]);
}

#[test]
fn who_defers_is_who_is_told() {
    let setting = four("");
    setting.site.users.filter("dora", "message", says(75, "452 4.2.2 dora is full"));
    let scene = setting.start();
    let sent = scene.send(STRANGER, &["alice", "dora", "carol"], MESSAGE);
    assert_eq!(sent.outcome().code, 451);
    assert_eq!(
        text(&sent),
        ["4.7.1 <dora@test.example>: dora is full", "4.7.1 <carol@test.example>: later, said carol"]
    );
}

#[test]
fn a_client_without_smtputf8_reads_ascii() {
    let setting = Setting::of(&["alice", "bob", "jörg"]).interfaces(Interfaces::Milter);
    setting.site.users.filter("alice", "message", says(77, "nein, sagt 爱丽丝"));
    setting.site.users.filter("bob", "message", says(77, "böse"));
    setting.site.users.filter("jörg", "message", says(77, "nö"));
    setting.site.users.file(
        "bob",
        "rules.toml",
        "[[rule]]\nsender = \"rule@*\"\naction = \"reject\"\nreply = \"Maß voll\"\n",
    );
    let scene = setting.postfix(|p| p.set("smtputf8_enable", "yes")).start();
    let send = |parameters: &str, names: &[&str]| {
        let mut client = scene.client();
        assert_eq!(client.mail_from(STRANGER, parameters).code, 250);
        for name in names {
            assert_eq!(client.rcpt_to(&format!("{name}@test.example")).code, 250, "{name}");
        }
        let reply = client.data(MESSAGE);
        assert_eq!(reply.code, 550);
        reply.lines
    };
    assert_eq!(send("SMTPUTF8", &["alice"]), ["5.7.1 nein, sagt 爱丽丝"]);
    assert_eq!(send("", &["alice"]), ["5.7.1 nein, sagt ???"]);
    assert_eq!(
        send("SMTPUTF8", &["bob", "jörg"]),
        ["5.7.1 <bob@test.example>: böse", "5.7.1 <jörg@test.example>: nö"]
    );
    // Postfix takes such an address without SMTPUTF8 too (strict_smtputf8 = no).
    assert_eq!(
        send("", &["bob", "jörg"]),
        ["5.7.1 <bob@test.example>: b?se", "5.7.1 <j?rg@test.example>: n?"]
    );
    for (parameters, words) in [("SMTPUTF8", "5.7.1 Maß voll"), ("", "5.7.1 Ma? voll")] {
        let mut client = scene.client();
        client.mail_from("rule@sender.example", parameters);
        assert_eq!(client.rcpt_to("bob@test.example").text(), words);
    }
}
