//! Envelope rules at RCPT TO, of users and of the site, as a client of a real Postfix meets them through both
//! interfaces.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;
mod rcpt;

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use common::policy::{self, Request};
use common::smtp::{Client, Reply};
use common::{PATIENCE, Usermilter, wait_until};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use rcpt::{CLIENT_ADDRESS, CLIENT_NAME, Interfaces, MESSAGE, STRANGER, Scene, Setting, runs};

/// Users of the same name as what their rules are about.
fn users_with_rules() -> Setting {
    let setting =
        Setting::of(&["sender", "file", "extension", "client", "helo", "size", "date", "later", "rule2"]);
    let rules = |user: &str, text: &str| drop(setting.site.users.file(user, "rules.toml", text));
    rules(
        "sender",
        r#"
        [[rule]]
        sender = ["*@spam.example", "Eve@Example.COM", "@xn--bcher-kva.example", "<>"]
        action = "reject"
        reply = "554 5.6.0 not from you, 100% sure"
        "#,
    );
    rules("file", "default = \"reject\"\n[[rule]]\nsender-file = [\"friends.txt\"]\naction = \"accept\"\n");
    setting.site.users.file(
        "file",
        "friends.txt",
        "# friends\nfriend@sender.example # from school\n\n.family.example\n",
    );
    rules("extension", "[[rule]]\nrecipient = [\"extension+shop@*\"]\naction = \"defer\"\n");
    rules(
        "client",
        r#"
        [[rule]]
        client = ["198.51.100.0/25", "2001:db8:bad::/48", "*.dyn.example.net"]
        action = "reject"
        reply = "no such clients"
        "#,
    );
    rules(
        "helo",
        "[[rule]]\nhelo = [\"localhost\", \"*.lan\"]\naction = \"reject\"\nreply = \"5.5.0 who?\"\n",
    );
    rules("size", "[[rule]]\nsize-over = \"10K\"\naction = \"reject\"\nreply = \"552 5.3.4 too much\"\n");
    rules(
        "date",
        r#"
        [[rule]]
        expires = 2020-01-31
        action = "reject"
        reply = "expired long ago"
        [[rule]]
        expires = 2999-12-31
        sender = "stranger@*"
        action = "reject"
        reply = "on holiday"
        "#,
    );
    rules("later", "default = \"defer\"\n");
    rules(
        "rule2",
        r#"
        default = "reject"
        [[rule]]
        sender = "both@sender.example"
        helo = "other.example"
        action = "reject"
        [[rule]]
        sender = "*@sender.example"
        action = "accept"
        "#,
    );
    setting
}

struct Session<'a> {
    address: &'a str,
    name: &'a str,
    reverse_name: &'a str,
    helo: &'a str,
}

const USUAL: Session<'_> =
    Session { address: CLIENT_ADDRESS, name: CLIENT_NAME, reverse_name: CLIENT_NAME, helo: CLIENT_NAME };

impl Session<'_> {
    fn rcpt(&self, scene: &Scene, mail: (&str, &str), name: &str) -> Reply {
        let mut client = Client::connect(scene.postfix.port());
        client.ehlo("localhost");
        let attributes = [("NAME", self.name), ("REVERSE_NAME", self.reverse_name), ("ADDR", self.address)];
        assert_eq!(client.xclient(&attributes).code, 220);
        client.ehlo(self.helo);
        client.mail_from(mail.0, mail.1);
        client.rcpt_to(&format!("{name}@test.example"))
    }
}

/// The code and, at the end of the text, the words.
#[track_caller]
fn assert_says(reply: &Reply, code: u16, words: &str) {
    assert!(reply.code == code && reply.text().ends_with(words), "{reply:?}, not {code} … {words}");
}

/// Every key of rules.toml, whichever interface asks.
fn every_key_counts(interfaces: Interfaces) {
    // Only then XCLIENT takes an IPv6 address.
    let setting = users_with_rules().postfix(|p| p.set("inet_protocols", "all"));
    let scene = setting.interfaces(interfaces).start();
    let from = |sender: &str, name: &str| USUAL.rcpt(&scene, (sender, ""), name);

    let bad = [
        ("x@spam.example", ""),
        ("EVE@example.com", ""),
        ("a@XN--Bcher-KVA.example", ""),
        ("a@BÜCHER.example", "SMTPUTF8"),
        ("", ""),
    ];
    for mail in bad {
        let reply = USUAL.rcpt(&scene, mail, "sender");
        assert_says(&reply, 554, "not from you, 100% sure");
        assert!(reply.text().starts_with("5.6.0"), "{reply:?}");
    }
    assert_eq!(from("x@notspam.example", "sender").code, 250);

    assert_eq!(from("friend@sender.example", "file").code, 250);
    assert_eq!(from("x@deep.family.example", "file").code, 250);
    assert_says(&from("foe@sender.example", "file"), 550, "message refused by the recipient");

    assert_eq!(from(STRANGER, "extension").code, 250);
    assert_says(&from(STRANGER, "extension+SHOP"), 451, "recipient asks to try again later");

    let client = |address, name, reverse_name| {
        Session { address, name, reverse_name, ..USUAL }.rcpt(&scene, (STRANGER, ""), "client").code
    };
    let unavailable = "[UNAVAILABLE]";
    assert_eq!(client("198.51.100.127", CLIENT_NAME, CLIENT_NAME), 550);
    assert_eq!(client("198.51.100.128", CLIENT_NAME, CLIENT_NAME), 250);
    assert_eq!(client("IPV6:2001:db8:bad::7", unavailable, unavailable), 550);
    assert_eq!(client("IPV6:2001:db8:bee::7", unavailable, unavailable), 250);
    assert_eq!(client("192.0.2.1", "h.DYN.example.net", "h.dyn.example.net"), 550);
    assert_eq!(client("192.0.2.1", unavailable, "h.dyn.example.net"), 250, "the name is not verified");

    let helo = |helo| Session { helo, ..USUAL }.rcpt(&scene, (STRANGER, ""), "helo");
    assert_says(&helo("LocalHost"), 550, "who?");
    assert_eq!(helo("printer.lan").code, 550);
    assert_eq!(helo("localhost.example").code, 250);

    let size = |size: &str| USUAL.rcpt(&scene, (STRANGER, size), "size");
    assert_says(&size("SIZE=10241"), 552, "too much");
    assert_eq!(size("SIZE=10240").code, 250);
    assert_eq!(size("").code, 250);

    assert_says(&from(STRANGER, "date"), 550, "on holiday");
    assert_eq!(from("friend@sender.example", "date").code, 250);
    assert_eq!(from(STRANGER, "later").code, 451);
    assert_eq!(from("both@sender.example", "rule2").code, 250, "all keys of a rule must match");
    assert_eq!(from("both@else.example", "rule2").code, 550);
    // A refused recipient leaves the others alone.
    let sent = scene.send(STRANGER, &["later", "helo", "date"], MESSAGE);
    assert_eq!(sent.recipients.iter().map(|r| r.code).collect::<Vec<_>>(), [451, 250, 550]);
    assert_eq!(sent.outcome().code, 250);
}

#[test]
fn every_key_counts_through_both_interfaces() {
    every_key_counts(Interfaces::Both);
}

#[test]
fn every_key_counts_through_the_milter_alone() {
    every_key_counts(Interfaces::Milter);
}

#[test]
fn every_key_counts_through_the_policy_service_alone() {
    every_key_counts(Interfaces::Policy);
}

#[test]
fn rules_are_asked_however_the_recipient_is_written() {
    for interfaces in [Interfaces::Both, Interfaces::Milter, Interfaces::Policy] {
        let setting = Setting::of(&["alice"]).interfaces(interfaces);
        setting.site.users.file("alice", "rules.toml", "default = \"reject\"\n");
        let scene = setting.start();
        for argument in [
            "<ALICE@Test.EXAMPLE>",
            "<@x.example:alice@test.example>",
            "<\"alice\"@test.example>",
            "<al\\ice@test.example>",
            "<alice@test.example (Alice)>",
            "<test.example!alice>",
            "<alice%test.example>",
        ] {
            let mut client = scene.client();
            client.mail_from(STRANGER, "");
            let reply = client.command(&format!("RCPT TO:{argument}"));
            assert_eq!(reply.code, 550, "{interfaces:?} {argument} {reply:?}");
        }
    }
}

#[test]
fn the_real_size_counts_at_the_end_of_the_message() {
    let setting = Setting::of(&["plain", "friends", "other"]);
    let size = "[[rule]]\nsize-over = \"20K\"\naction = \"reject\"\nreply = \"552 5.3.4 too much\"\n";
    setting.site.users.file("plain", "rules.toml", size);
    let friends = "[[rule]]\nsender = \"friend@*\"\naction = \"accept\"\n";
    setting.site.users.file("friends", "rules.toml", format!("{size}{friends}"));
    // Only for an address that is not used here: costs nothing elsewhere.
    let elsewhere = size.replace("action", "recipient = \"other+x@*\"\naction");
    setting.site.users.file("other", "rules.toml", elsewhere);
    let scene = setting.start();

    let large = [MESSAGE, &b"\n0123456789012345678901234567890123456789\n".repeat(700)].concat();
    for name in ["plain", "friends"] {
        // What the client declared was a lie, or nothing.
        for parameters in ["SIZE=100", ""] {
            let mut client = scene.client();
            client.mail_from("friend@sender.example", parameters);
            assert_eq!(client.rcpt_to(&format!("{name}@test.example")).code, 250);
            assert_says(&client.data(&large), 552, "too much");
            client.quit();
        }
        assert_eq!(scene.send("friend@sender.example", &[name], MESSAGE).outcome().code, 250);
        assert_eq!(scene.delivered(name), 1, "{name}");
    }
    // Somebody else takes it: accepted.
    assert_eq!(scene.send(STRANGER, &["plain", "other"], &large).outcome().code, 250);
    let seen = scene.site.daemon.log_lines().len();
    assert_eq!(scene.send(STRANGER, &["other"], &large).outcome().code, 250);
    scene.site.daemon.wait_for_log_after(seen, "without message: nobody's filter decides", PATIENCE);
}

/// What comes of a mail to one recipient: of friends, of foes, without or with a declared size, small or large.
struct BySize<'a> {
    scene: &'a Scene,
    name: &'a str,
}

impl BySize<'_> {
    /// The policy service's action, the reply to RCPT TO, and to the message if it gets there.
    fn of(&self, sender: &str, parameters: &str, message: &[u8]) -> (String, u16, String) {
        let address = format!("{}@test.example", self.name);
        let size = parameters.strip_prefix("SIZE=").unwrap_or("0");
        let request = Request::rcpt(sender, &address).with("size", size);
        let action = policy::Client::connect(self.scene.site.policy_address()).ask(&request);
        let mut client = self.scene.client();
        client.mail_from(sender, parameters);
        let rcpt = client.rcpt_to(&address).code;
        let reply = if rcpt == 250 { client.data(message).text() } else { String::new() };
        client.quit();
        (action, rcpt, reply)
    }
}

#[test]
fn a_rule_that_waits_for_the_size_is_not_passed_over_by_what_comes_after_it() {
    const RULES: &str = "[[rule]]\nsize-over = \"20K\"\naction = \"filter\"\n\
                         [[rule]]\nsender = \"friend@*\"\naction = \"accept\"\n\
                         [[rule]]\nsender = \"foe@*\"\naction = \"reject\"\nreply = \"5.7.1 rule\"\n";
    let large = [MESSAGE, &b"\n0123456789012345678901234567890123456789\n".repeat(700)].concat();
    // The site's rules, and a user's own.
    for whose in ["site", "user"] {
        let mut setting = Setting::of(&["alice"]);
        if whose == "site" {
            let path = setting.site.sandbox.write("site-rules.toml", RULES);
            setting = setting.recipients(&format!("rules = \"{}\"\nunknown = \"reject\"", path.display()));
        } else {
            setting.site.users.file("alice", "rules.toml", RULES);
        }
        setting.site.users.filter("alice", "recipient", rcpt::counting("recipient", 77, "too early"));
        setting.site.users.filter("alice", "message", rcpt::counting("message", 77, "filter"));
        let scene = setting.start();
        let alice = BySize { scene: &scene, name: "alice" };
        let dunno = || "DUNNO".to_owned();
        for declared in ["", "SIZE=100"] {
            let (action, rcpt, reply) = alice.of("friend@sender.example", declared, MESSAGE);
            assert_eq!((action, rcpt), (dunno(), 250), "{whose} {declared}");
            assert!(reply.starts_with("2.0.0"), "{whose} {declared}: {reply}");
            let (action, rcpt, reply) = alice.of("friend@sender.example", declared, &large);
            assert_eq!((action, rcpt, reply), (dunno(), 250, "5.7.1 filter".into()), "{whose} {declared}");
        }
        // Whoever declares a size is judged by it at once.
        for message in [MESSAGE, &large] {
            let (action, rcpt, _) = alice.of("foe@sender.example", "SIZE=100", message);
            assert_eq!((action, rcpt), ("550 5.7.1 rule".to_owned(), 550), "{whose}");
        }
        for (message, expected) in [(MESSAGE, "5.7.1 rule"), (&large, "5.7.1 filter")] {
            let (action, rcpt, reply) = alice.of("foe@sender.example", "", message);
            assert_eq!((action, rcpt, reply), (dunno(), 250, expected.into()), "{whose}");
        }
        assert_eq!(runs(&scene.site.users, "alice", "message"), 3, "{whose}");
        assert_eq!(runs(&scene.site.users, "alice", "recipient"), 0, "{whose}");
        if whose == "site" {
            // Nobody has this address, but the site may accept what it gets.
            let nobody = BySize { scene: &scene, name: "umt-nobody" };
            assert_eq!(nobody.of("friend@sender.example", "", MESSAGE).0, "DUNNO");
        }
    }
}

#[test]
fn a_refusal_of_users_waits_for_a_rule_that_may_accept_a_large_message() {
    const RULES: &str = "[[rule]]\nsize-over = \"20K\"\naction = \"accept\"\n";
    let large = [MESSAGE, &b"\n0123456789012345678901234567890123456789\n".repeat(700)].concat();
    for whose in ["site", "user"] {
        let mut setting = Setting::of(&["alice", "ruled"]);
        if whose == "site" {
            let path = setting.site.sandbox.write("site-rules.toml", RULES);
            setting = setting.recipients(&format!("rules = \"{}\"", path.display()));
            let reject = "default = \"reject\"\n";
            setting.site.users.file("ruled", "rules.toml", reject);
        } else {
            setting.site.users.file("alice", "rules.toml", RULES);
            let reject = format!("default = \"reject\"\n{RULES}");
            setting.site.users.file("ruled", "rules.toml", reject);
        }
        setting.site.users.filter("alice", "recipient", rcpt::says(77, "message refused by the recipient"));
        let scene = setting.start();
        for name in ["alice", "ruled"] {
            let it = BySize { scene: &scene, name };
            let refused = "5.7.1 message refused by the recipient".to_owned();
            let (action, rcpt, reply) = it.of(STRANGER, "", MESSAGE);
            assert_eq!((action.as_str(), rcpt, reply), ("DUNNO", 250, refused.clone()), "{whose} {name}");
            let (action, rcpt, reply) = it.of(STRANGER, "", &large);
            assert_eq!((action.as_str(), rcpt), ("DUNNO", 250), "{whose} {name}");
            assert!(reply.starts_with("2.0.0"), "{whose} {name}: {reply}");
            let (action, rcpt, _) = it.of(STRANGER, "SIZE=100", MESSAGE);
            assert_eq!((action, rcpt), (format!("550 {refused}"), 550), "{whose} {name}");
        }
    }
}

#[test]
fn a_file_with_an_error_is_ignored_whole_and_the_log_says_where() {
    let reject = "[[rule]]\nsender = \"*\"\naction = \"reject\"\n";
    let cases = [
        ("syntax", format!("{reject}[[rule]\n"), "rules.toml:4:"),
        ("key", format!("{reject}colour = 1\n"), "rules.toml:4:1: "),
        ("action", "default = \"reject\"\n[[rule]]\naction = \"bounce\"\n".to_owned(), "rules.toml:3:10: "),
        ("network", format!("{reject}client = [\"192.0.2.0/33\"]\n"), "rules.toml:4:11: "),
        ("missing", format!("{reject}sender-file = \"friends.txt\"\n"), "rules.toml:4:15: "),
        ("escape", format!("{reject}sender-file = \"../../bob/rules.toml\"\n"), "rules.toml:4:15: "),
    ];
    let names: Vec<&str> = cases.iter().map(|(name, ..)| *name).collect();
    let scene = Setting::of(&names).start_alone();
    for (name, text, place) in &cases {
        scene.site.users.file(name, "rules.toml", text);
        assert_eq!(scene.ask(STRANGER, name), "DUNNO", "{text}");
        let line = scene.site.daemon.wait_for_log(&format!("user={name}"), PATIENCE);
        assert!(line.contains("rules ignored") && line.contains(place), "{line}");
    }
    // A list with a bad line is named with the line.
    scene.site.users.file("missing", "friends.txt", "a@b.example\n\nc@d e@f\n");
    assert_eq!(scene.ask(STRANGER, "missing"), "DUNNO");
    scene.site.daemon.wait_for_log("line 3", PATIENCE);
    // Mended.
    scene.site.users.file("missing", "friends.txt", "stranger@sender.example\n");
    assert!(scene.ask(STRANGER, "missing").starts_with("550 5.7.1 "));
}

#[test]
fn what_is_no_plain_file_hangs_nobody() {
    let names = ["fifo", "zero", "huge", "long", "directory", "dangling", "loop", "binary", "linked"];
    let setting = Setting::of(&[&names[..], &["listfifo", "listzero", "listhuge"]].concat());
    let scene = setting.log("level = \"debug\"").start_alone();
    let path = |user: &str, name: &str| {
        // The directory is the user's.
        scene.site.users.file(user, ".keep", "");
        scene.site.users.account(user).path(name)
    };
    let reject = "default = \"reject\"\n";
    let fifo = |path| {
        nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o666)).unwrap();
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    };
    let huge = |path| fs::File::create(path).unwrap().set_len(1 << 40).unwrap();
    fifo(path("fifo", "rules.toml"));
    symlink("/dev/zero", path("zero", "rules.toml")).unwrap();
    huge(path("huge", "rules.toml"));
    let comment = format!("# {}\n", "x".repeat(1000));
    fs::write(path("long", "rules.toml"), format!("{reject}{}", comment.repeat(1100))).unwrap();
    fs::create_dir(path("directory", "rules.toml")).unwrap();
    symlink("/nonexistent/rules.toml", path("dangling", "rules.toml")).unwrap();
    symlink("rules.toml", path("loop", "rules.toml")).unwrap();
    fs::write(path("binary", "rules.toml"), b"default = \"reject\" # \xff\n").unwrap();
    scene.site.users.file("linked", "real.toml", reject);
    symlink("real.toml", path("linked", "rules.toml")).unwrap();
    for user in ["listfifo", "listzero", "listhuge"] {
        scene.site.users.file(
            user,
            "rules.toml",
            "default = \"reject\"\n[[rule]]\nsender-file = \"list\"\naction = \"accept\"\n",
        );
    }
    fifo(path("listfifo", "list"));
    symlink("/dev/zero", path("listzero", "list")).unwrap();
    huge(path("listhuge", "list"));

    let started = Instant::now();
    for name in names.iter().filter(|name| **name != "linked") {
        assert_eq!(scene.ask(STRANGER, name), "DUNNO", "{name}");
        if *name != "dangling" {
            let line = scene.site.daemon.wait_for_log(&format!("homes/{name}/"), PATIENCE);
            assert!(line.contains("rules ignored"), "{line}");
        }
    }
    for name in ["listfifo", "listzero", "listhuge"] {
        assert_eq!(scene.ask(STRANGER, name), "DUNNO", "{name}");
        scene.site.daemon.wait_for_log(&format!("homes/{name}/.usermilter/list"), PATIENCE);
    }
    // A link is followed, as the user.
    assert!(scene.ask(STRANGER, "linked").starts_with("550 5.7.1 "));
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
}

#[test]
fn an_edit_counts_after_the_inspect_ttl_for_questions_asked_before_too() {
    let setting = Setting::of(&["alice"]).filter("inspect-ttl = \"1s\"");
    setting.site.users.file("alice", "rules.toml", "default = \"reject\"\n");
    let scene = setting.start();
    assert_eq!(scene.rcpt(STRANGER, "alice").code, 550);
    scene.site.users.file("alice", "rules.toml", "default = \"accept\"\n");
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(scene.send(STRANGER, &["alice"], MESSAGE).outcome().code, 250);
    scene.site.users.file("alice", "rules.toml", "default = \"defer\"\n");
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(scene.rcpt(STRANGER, "alice").code, 451);
    fs::remove_file(scene.site.users.account("alice").path("rules.toml")).unwrap();
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(scene.rcpt(STRANGER, "alice").code, 250);
}

#[test]
fn the_second_interface_says_what_the_first_has_said() {
    let scene = Setting::of(&["alice"]).start_alone();
    let milter = || scene.milter(STRANGER).rcpt(&["<alice@test.example>"]).letter();
    scene.site.users.file("alice", "rules.toml", "default = \"accept\"\n");
    assert_eq!(scene.ask(STRANGER, "alice"), "DUNNO");
    scene.site.users.file("alice", "rules.toml", "default = \"reject\"\n");
    assert_eq!(milter(), 'c', "the policy service let this one in");
    assert!(scene.ask(STRANGER, "alice").starts_with("550"), "another mail");
    scene.site.users.file("alice", "rules.toml", "default = \"accept\"\n");
    assert_eq!(milter(), 'y', "what the policy service said");
}

#[test]
fn many_questions_at_once_cost_one_inspection_when_the_ttl_is_over() {
    const CONNECTIONS: usize = 200;
    let setting = Setting::of(&["alice"]).filter("inspect-ttl = \"2s\"").log("level = \"debug\"");
    setting.site.users.file("alice", "rules.toml", "default = \"reject\"\n");
    let scene = setting.start_alone();
    let inspections = || scene.site.daemon.log_lines().iter().filter(|l| l.contains("inspected")).count();
    let mut clients: Vec<_> =
        (0..CONNECTIONS).map(|_| policy::Client::connect(scene.site.policy_address())).collect();
    for round in 1..=2 {
        let request = Request::rcpt(STRANGER, "alice@test.example").encode();
        for client in &mut clients {
            client.send_raw(&request).unwrap();
        }
        for client in &mut clients {
            assert!(client.read_action().unwrap().unwrap().starts_with("550"));
        }
        // The log is read by a thread of its own.
        assert!(wait_until(PATIENCE, || inspections() >= round));
        std::thread::sleep(Duration::from_millis(2100));
        assert_eq!(inspections(), round);
    }
}

#[test]
fn a_hundred_thousand_senders_are_looked_up_at_once() {
    let setting = Setting::of(&["alice"]).filter("inspect-ttl = \"60s\"");
    let mut list = String::new();
    for n in 0..100_000 {
        let _ = writeln!(list, "friend{n}@host{}.example", n % 89);
    }
    setting.site.users.file("alice", "friends.txt", &list);
    setting.site.users.file(
        "alice",
        "rules.toml",
        "default = \"reject\"\n[[rule]]\nsender-file = \"friends.txt\"\naction = \"accept\"\n",
    );
    let scene = setting.start();
    assert_eq!(scene.rcpt("friend99999@host52.example", "alice").code, 250);
    assert_eq!(scene.rcpt("friend99999@host53.example", "alice").code, 550);
    // Once it is understood, a question costs no search.
    let mut client = policy::Client::connect(scene.site.policy_address());
    let started = Instant::now();
    for n in 0..1000 {
        let request = Request::rcpt(&format!("nobody{n}@host1.example"), "alice@test.example");
        assert!(client.ask(&request).starts_with("550"));
    }
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

const SITE_RULES: &str = r#"
[[rule]]
sender = "friend-of-the-house@*"
action = "accept"

[[rule]]
sender = "*@spam.example"
action = "reject"
reply = "not at our site"

[[rule]]
recipient = "staff@test.example"
sender-file = "members.txt"
action = "accept"

[[rule]]
recipient = "staff@test.example"
action = "reject"
reply = "5.7.2 only members may write to this list"
"#;

/// A site with rules and a list that is a pipe in aliases(5).
fn site_with_rules(interfaces: Interfaces) -> Scene {
    let setting = Setting::of(&["alice"]).interfaces(interfaces);
    let rules = setting.site.sandbox.write("site-rules.toml", SITE_RULES);
    setting.site.sandbox.write("members.txt", "# mailman's roster\nmember@sender.example\n");
    let aliases =
        setting.site.sandbox.write("aliases", "staff: \"|/usr/lib/mailman/mail/mailman post staff\"\n");
    setting.site.users.file("alice", "rules.toml", "default = \"reject\"\n");
    setting.site.users.filter("alice", "recipient", rcpt::counting("recipient", 77, "no"));
    setting
        .mailboxes(&["staff", "postmaster"])
        .recipients(&format!("rules = \"{}\"\naliases = [\"{}\"]\n", rules.display(), aliases.display()))
        .start()
}

#[test]
fn the_site_is_asked_before_its_users() {
    for interfaces in [Interfaces::Both, Interfaces::Milter] {
        let scene = site_with_rules(interfaces);
        assert_eq!(scene.rcpt("friend-of-the-house@x.example", "alice").code, 250);
        assert_says(&scene.rcpt("a@spam.example", "alice"), 550, "not at our site");
        assert_says(&scene.rcpt("a@else.example", "alice"), 550, "message refused by the recipient");
        assert_eq!(scene.rcpt("a@spam.example", "postmaster").code, 250, "exempt");
        assert_eq!(runs(&scene.site.users, "alice", "recipient"), 0);
    }
}

#[test]
fn only_members_may_write_to_a_list() {
    for interfaces in [Interfaces::Both, Interfaces::Milter] {
        let scene = site_with_rules(interfaces);
        let sent = scene.send("Member@Sender.Example", &["staff"], MESSAGE);
        assert_eq!(sent.outcome().code, 250);
        let reply = scene.rcpt(STRANGER, "Staff");
        assert_says(&reply, 550, "only members may write to this list");
        assert!(reply.text().starts_with("5.7.2"), "{reply:?}");
        assert_eq!(scene.rcpt("", "staff").code, 550, "bounces to a list go to its owner");
        assert_eq!(scene.delivered("staff"), 1);
    }
}

#[test]
fn site_rules_come_anew_with_a_reload_and_stay_if_the_new_ones_have_an_error() {
    let mut scene = site_with_rules(Interfaces::Both);
    let path = scene.site.sandbox.join("site-rules.toml");
    assert_eq!(scene.rcpt("new@sender.example", "staff").code, 550);
    scene.site.sandbox.write("members.txt", "new@sender.example\n");
    assert_eq!(scene.rcpt("new@sender.example", "staff").code, 550, "not before the reload");

    let seen = scene.site.daemon.log_lines().len();
    scene.site.sandbox.write(
        "site-rules.toml",
        "[[rule]]\naction = \"reject\"\n\n[[rule]]\nsender = \"a@b@c\"\naction = \"reject\"\n",
    );
    scene.site.daemon.signal(Signal::SIGHUP);
    let line = scene.site.daemon.wait_for_log_after(seen, "site-rules.toml:5:10", PATIENCE);
    assert!(line.contains(&path.display().to_string()), "{line}");
    assert_eq!(scene.rcpt("new@sender.example", "staff").code, 550);
    assert_eq!(scene.rcpt("member@sender.example", "staff").code, 250, "the old rules, the old members");

    let worker = scene.site.daemon.worker_pid();
    scene.site.sandbox.write("site-rules.toml", SITE_RULES);
    scene.site.daemon.signal(Signal::SIGHUP);
    assert!(wait_until(PATIENCE, || !scene.site.daemon.worker_pids().contains(&worker)));
    assert_eq!(scene.rcpt("new@sender.example", "staff").code, 250);
    assert_eq!(scene.rcpt("member@sender.example", "staff").code, 550);
}

#[test]
fn site_rules_with_an_error_are_refused_at_the_start() {
    let setting = Setting::of(&["alice"]);
    let rules = setting.site.sandbox.write("site-rules.toml", "default = \"perhaps\"\n");
    let setting = setting.recipients(&format!("rules = \"{}\"", rules.display()));
    let failure = Usermilter::try_start(&setting.site.config()).unwrap_err();
    assert_eq!(failure.status.and_then(|s| s.code()), Some(78), "{failure}");
    assert!(failure.stderr.contains(&format!("{}:1:11: ", rules.display())), "{failure}");
}

#[test]
fn requests_of_old_and_new_postfix_are_understood() {
    let setting = Setting::of(&["alice"]);
    setting.site.users.file(
        "alice",
        "rules.toml",
        "[[rule]]\nsender = \"stranger@*\"\naction = \"reject\"\n",
    );
    let scene = setting.start_alone();
    let full = || Request::rcpt(STRANGER, "alice@test.example");
    // SMTPD_POLICY_README: since 2.2 sasl_*, 2.3 reverse_client_name, ccert_* and encryption_*, 2.5 stress, 3.0 client_port,
    // 3.1 policy_context, 3.2 server_*, then compatibility_level and mail_version.
    let mut old = full();
    for name in [
        "sasl_method",
        "sasl_username",
        "sasl_sender",
        "size",
        "reverse_client_name",
        "ccert_subject",
        "ccert_issuer",
        "ccert_fingerprint",
        "ccert_pubkey_fingerprint",
        "encryption_protocol",
        "encryption_cipher",
        "encryption_keysize",
        "etrn_domain",
        "stress",
        "client_port",
        "policy_context",
        "server_address",
        "server_port",
        "recipient_count",
        "instance",
    ] {
        old = old.without(name);
    }
    let bare =
        old.clone().without("client_address").without("client_name").without("helo_name").without("queue_id");
    let new =
        full().with("compatibility_level", "3.9").with("mail_version", "3.9.0").with("x", "unknown=to us");
    let mut client = policy::Client::connect(scene.site.policy_address());
    for request in [full(), old, bare, new] {
        assert!(client.ask(&request).starts_with("550 5.7.1 "), "{request:?}");
        for state in ["CONNECT", "EHLO", "HELO", "MAIL", "DATA", "END-OF-MESSAGE", "VRFY", "ETRN", ""] {
            assert_eq!(client.ask(&request.clone().with("protocol_state", state)), "DUNNO", "{state}");
        }
        assert_eq!(client.ask(&request.clone().with("sender", "friend@sender.example")), "DUNNO");
        assert_eq!(client.ask(&request.without("recipient")), "DUNNO");
    }
}

#[test]
fn both_services_work_on_unix_sockets() {
    let setting = Setting::of(&["alice", "bob"]).unix_sockets();
    setting.site.users.file("alice", "rules.toml", "default = \"reject\"\n");
    setting.site.users.filter("bob", "message", rcpt::says(77, "no, said bob"));
    let scene = setting.start();
    let reply = scene.rcpt(STRANGER, "alice");
    assert!(reply.code == 550 && reply.text().contains("Recipient address rejected"), "{reply:?}");
    let sent = scene.send(STRANGER, &["bob"], MESSAGE);
    assert_eq!((sent.outcome().code, sent.outcome().text()), (550, "5.7.1 no, said bob".to_owned()));
}

#[test]
fn addresses_that_are_not_utf8_get_an_answer() {
    let setting = Setting::of(&["alice"]).postfix(|p| p.set("smtputf8_enable", "no"));
    setting.site.users.file("alice", "rules.toml", "default = \"reject\"\n");
    let scene = setting.start();
    let mut client = scene.client();
    client.send_raw(b"MAIL FROM:<b\xf6se@sender.example>\r\n").unwrap();
    assert_eq!(client.read_reply().unwrap().code, 250);
    // Such a sender is a stranger as any other, and no reason to close the connection.
    let reply = client.rcpt_to("alice@test.example");
    assert_eq!(reply.code, 550, "{}", client.transcript());
    assert!(!scene.postfix.log().contains("warning: problem talking to server"), "{}", scene.postfix.log());
}
