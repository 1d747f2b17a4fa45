//! usermilter behind a real Sendmail, with `sendmail/usermilter.mc` as it is, and the same mails through Postfix: what
//! either MTA makes of every verdict. `cargo test --test sendmail -- --nocapture` prints the table.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;

use std::fmt::Write as _;
use std::fs;
use std::io::{BufReader, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use common::smtp::{Client, Reply};
use common::{PATIENCE, Postfix, Sandbox, Sendmail, Site, Usermilter, require};

const SENDER: &str = "s@sender.example";
const MESSAGE: &[u8] = b"Subject: x\r\nFrom: s@sender.example\r\n\r\nhello\r\n";

/// Says what the file `say` in the home directory tells it: a status, and a reply. Without one it accepts.
const OBEDIENT: &str = "#!/bin/sh
test -f ~/say || exit 0
read -r status < ~/say
tail -n +2 ~/say
exit \"$status\"
";

/// Users with an obedient message filter; each wishes something else for the copy that it refuses.
const JUDGES: [(&str, &str); 4] =
    [("alice", "deliver"), ("bob", "redirect"), ("carol", "drop"), ("dave", "deliver")];

/// One usermilter, and an MTA before it.
struct Bench<'a> {
    site: &'a Site,
    mta: Mta,
}

enum Mta {
    Postfix(Postfix),
    Sendmail(Sendmail),
}

impl Mta {
    fn port(&self) -> u16 {
        match self {
            Mta::Postfix(postfix) => postfix.port(),
            Mta::Sendmail(sendmail) => sendmail.port(),
        }
    }

    fn maildir(&self, mailbox: &str) -> Vec<Vec<u8>> {
        match self {
            Mta::Postfix(postfix) => postfix.maildir(mailbox),
            Mta::Sendmail(sendmail) => sendmail.maildir(mailbox),
        }
    }

    /// What has been accepted is delivered.
    fn wait_delivered(&self) {
        match self {
            Mta::Postfix(postfix) => postfix.wait_queue_empty(),
            Mta::Sendmail(sendmail) => sendmail.wait_queue_empty(),
        }
    }
}

impl Bench<'_> {
    /// What these users' filters say from now on: a status and the text of a reply; the others accept.
    fn say(&self, answers: &[(&str, i32, &str)]) {
        for (user, _) in JUDGES {
            let _ = fs::remove_file(self.site.users.account(user).home.join("say"));
        }
        for (user, status, reply) in answers {
            fs::write(self.site.users.account(user).home.join("say"), format!("{status}\n{reply}\n"))
                .unwrap();
        }
    }

    fn connect(&self) -> Client {
        let mut client = Client::connect(self.mta.port());
        client.ehlo("mx.sender.example");
        client
    }

    /// A mail to recipients of test.example: replies to RCPT that are no 250, the reply to the message, and who got it.
    fn mail(&self, recipients: &[&str]) -> String {
        self.mail_with(&mut self.connect(), "", SENDER, recipients, MESSAGE)
    }

    fn mail_with(
        &self,
        client: &mut Client,
        parameters: &str,
        sender: &str,
        recipients: &[&str],
        message: &[u8],
    ) -> String {
        let before = self.delivered();
        let mut told = String::new();
        let mail = client.mail_from(sender, parameters);
        if !mail.is_success() {
            return format!("MAIL: {}", shown(&mail));
        }
        let mut accepted = 0;
        for recipient in recipients {
            let reply = client.rcpt_to(&format!("{recipient}@test.example"));
            if reply.is_success() {
                accepted += 1;
            } else {
                let _ = write!(told, "RCPT: {} ", shown(&reply));
            }
        }
        if accepted > 0 {
            let reply = client.data(message);
            // What follows 250 is the MTA's.
            told += &if reply.is_success() { "250".to_owned() } else { shown(&reply) };
        } else {
            client.rset();
        }
        self.mta.wait_delivered();
        let after = self.delivered();
        for ((mailbox, before), (_, after)) in before.iter().zip(&after) {
            if after > before {
                let _ = write!(told, " {mailbox}:{}", after - before);
            }
        }
        told.trim().to_owned()
    }

    fn delivered(&self) -> Vec<(&'static str, usize)> {
        MAILBOXES.iter().map(|mailbox| (*mailbox, self.mta.maildir(mailbox).len())).collect()
    }
}

const MAILBOXES: [&str; 9] =
    ["alice", "bob", "carol", "dave", "erin", "frank", "alice+junk", "bob+junk", "alice+shop"];

/// A reply as `550 first | second`.
fn shown(reply: &Reply) -> String {
    format!("{} {}", reply.code, reply.lines.join(" | "))
}

/// What a scenario comes to.
enum Outcome {
    /// With either MTA.
    Both(String),
    /// With Postfix and with Sendmail; `docs/mta-behaviour.md` tells why.
    Differs(String, String),
}

fn both(outcome: &str) -> Outcome {
    Outcome::Both(outcome.to_owned())
}

fn differs(postfix: &str, sendmail: &str) -> Outcome {
    Outcome::Differs(postfix.to_owned(), sendmail.to_owned())
}

struct Scenario {
    name: &'static str,
    run: fn(&Bench<'_>) -> String,
    expected: Outcome,
}

fn scenarios() -> Vec<Scenario> {
    let scenario = |name, expected, run| Scenario { name, run, expected };
    let long = "abcdefghi ".repeat(89) + "abcdefghij";
    let thirty = |first: &str| {
        let lines = (1..=30).map(|n| format!("5.7.1 <u{n}@test.example>: u{n} says no"));
        format!("550 {first}{}", lines.collect::<Vec<_>>().join(" | "))
    };
    vec![
        scenario("accept", both("250 alice:1"), |b| b.mail(&["alice"])),
        scenario("reject with text", both("554 5.6.0 no thanks"), |b| {
            b.say(&[("alice", 77, "554 5.6.0 no thanks")]);
            b.mail(&["alice"])
        }),
        scenario("reject without text", both("550 5.7.1 message refused by the recipient"), |b| {
            b.say(&[("alice", 77, "")]);
            b.mail(&["alice"])
        }),
        scenario("defer with text", both("452 4.2.2 mailbox full"), |b| {
            b.say(&[("alice", 75, "452 4.2.2 mailbox full")]);
            b.mail(&["alice"])
        }),
        scenario("filter error", both("250 alice:1"), |b| {
            b.say(&[("alice", 1, "550 5.7.1 broken")]);
            b.mail(&["alice"])
        }),
        scenario("several lines", both("550 5.7.1 one | 5.7.1 two | 5.7.1 three"), |b| {
            b.say(&[("alice", 77, "one\ntwo\nthree")]);
            b.mail(&["alice"])
        }),
        scenario("percent signs", both("550 5.7.1 100% sure, 50%s %d %% %"), |b| {
            b.say(&[("alice", 77, "100% sure, 50%s %d %% %")]);
            b.mail(&["alice"])
        }),
        scenario("percent signs in a 4xx", both("451 4.7.1 90% full"), |b| {
            b.say(&[("alice", 75, "90% full")]);
            b.mail(&["alice"])
        }),
        scenario("UTF-8 without SMTPUTF8", both("550 5.7.1 b?se"), |b| {
            b.say(&[("alice", 77, "böse")]);
            b.mail(&["alice"])
        }),
        scenario(
            "UTF-8 with SMTPUTF8",
            differs("550 5.7.1 böse", "MAIL: 555 5.5.4 SMTPUTF8 parameter unrecognized"),
            |b| {
                b.say(&[("alice", 77, "böse")]);
                b.mail_with(&mut b.connect(), "SMTPUTF8", SENDER, &["alice"], MESSAGE)
            },
        ),
        scenario("900 bytes of reply", both(&format!("550 5.7.1 {long}")), |b| {
            b.say(&[("alice", 77, &("abcdefghi ".repeat(89) + "abcdefghij"))]);
            b.mail(&["alice"])
        }),
        scenario("mixed, delivered", both("250 alice:1 dave:1"), |b| {
            b.say(&[("alice", 77, "no")]);
            b.mail(&["alice", "dave"])
        }),
        scenario("mixed, redirected", both("250 dave:1 bob+junk:1"), |b| {
            b.say(&[("bob", 77, "no")]);
            b.mail(&["dave", "bob"])
        }),
        scenario("mixed, redirected, other case", both("250 dave:1 bob+junk:1"), |b| {
            b.say(&[("bob", 77, "no")]);
            b.mail(&["Bob", "dave"])
        }),
        scenario("mixed, dropped", both("250 dave:1"), |b| {
            b.say(&[("carol", 77, "no")]);
            b.mail(&["carol", "dave"])
        }),
        scenario("mixed, each their way", both("250 alice:1 dave:1 bob+junk:1"), |b| {
            b.say(&[("alice", 77, "no"), ("bob", 77, "no"), ("carol", 77, "no")]);
            b.mail(&["alice", "bob", "carol", "dave"])
        }),
        scenario("a deferrer among accepters", both("250 alice:1 dave:1"), |b| {
            b.say(&[("alice", 75, "later")]);
            b.mail(&["alice", "dave"])
        }),
        scenario("a deferrer among refusers", both("451 4.7.1 later"), |b| {
            b.say(&[("alice", 75, "later"), ("bob", 77, "no")]);
            b.mail(&["alice", "bob"])
        }),
        scenario(
            "all refuse differently",
            both("550 5.7.1 <bob@test.example>: not me | 5.7.1 <alice@test.example>: nor me"),
            |b| {
                b.say(&[("alice", 77, "nor me"), ("bob", 77, "not me")]);
                b.mail(&["bob", "alice"])
            },
        ),
        scenario("all refuse alike", both("554 5.6.0 not us"), |b| {
            b.say(&[("alice", 77, "554 5.6.0 not us"), ("bob", 77, "554 5.6.0 not us")]);
            b.mail(&["alice", "bob"])
        }),
        scenario("30 refuse differently", both(&thirty("")), |b| {
            let recipients: Vec<String> = (1..=30).map(|n| format!("u{n}")).collect();
            b.mail(&recipients.iter().map(String::as_str).collect::<Vec<_>>())
        }),
        scenario(
            "a user's rule at RCPT",
            differs("RCPT: 550 5.7.1 only friends", "RCPT: 550 5.7.1 <erin@test.example>... only friends"),
            |b| b.mail(&["erin"]),
        ),
        scenario(
            "a rule for one of two",
            differs(
                "RCPT: 550 5.7.1 only friends 250 alice:1",
                "RCPT: 550 5.7.1 <erin@test.example>... only friends 250 alice:1",
            ),
            |b| b.mail(&["erin", "alice"]),
        ),
        scenario(
            "a recipient filter",
            differs(
                "RCPT: 450 4.2.0 come 100% later",
                "RCPT: 450 4.2.0 <frank@test.example>... come 100% later",
            ),
            |b| b.mail(&["frank"]),
        ),
        scenario("an alias, all refuse", both("550 5.7.1 no"), |b| {
            b.say(&[("alice", 77, "no"), ("bob", 77, "no")]);
            b.mail(&["team"])
        }),
        scenario("an alias, all refuse differently", both("550 5.7.1 we do not want it"), |b| {
            b.say(&[("alice", 77, "we do not want it"), ("bob", 77, "go away")]);
            b.mail(&["team"])
        }),
        scenario("an alias, one refuses", both("250 alice:1 bob:1"), |b| {
            b.say(&[("bob", 77, "no")]);
            b.mail(&["team"])
        }),
        scenario("a virtual address", both("554 5.6.0 no thanks"), |b| {
            b.say(&[("dave", 77, "554 5.6.0 no thanks")]);
            b.mail(&["info"])
        }),
        scenario("a virtual address, accepted", both("250 dave:1"), |b| b.mail(&["info"])),
        scenario("mixed, of a virtual address", both("250 alice:1 bob+junk:1"), |b| {
            b.say(&[("bob", 77, "no")]);
            b.mail(&["sales", "alice"])
        }),
        scenario("an extension", both("550 5.7.1 no shops"), |b| b.mail(&["alice+shop"])),
        scenario("null sender", both("550 5.7.1 no"), |b| {
            b.say(&[("alice", 77, "no")]);
            b.mail_with(&mut b.connect(), "", "", &["alice"], MESSAGE)
        }),
        scenario("an empty message", both("550 5.7.1 empty"), |b| {
            b.say(&[("alice", 77, "empty")]);
            b.mail_with(&mut b.connect(), "", SENDER, &["alice"], b"")
        }),
        scenario(
            "several messages in a session",
            both("250 alice:1, 550 5.7.1 no, 250 dave:1, 452 4.2.2 full"),
            |b| {
                let mut client = b.connect();
                let mut told = Vec::new();
                for (answers, recipient) in [
                    (&[][..], "alice"),
                    (&[("alice", 77, "no")], "alice"),
                    (&[("alice", 77, "no")], "dave"),
                    (&[("dave", 75, "452 4.2.2 full")], "dave"),
                ] {
                    b.say(answers);
                    // Given up in the middle, it leaves nothing behind.
                    client.mail_from("other@sender.example", "");
                    client.rcpt_to("bob@test.example");
                    client.rset();
                    told.push(b.mail_with(&mut client, "", SENDER, &[recipient], MESSAGE));
                }
                told.join(", ")
            },
        ),
    ]
}

/// A usermilter for all scenarios. `mixed = "drop"` is what the site allows; each user wishes for less, or not.
fn site(milter: Option<&str>) -> (Site, String) {
    let mut users: Vec<(String, u32)> = ["alice", "bob", "carol", "dave", "erin", "frank"]
        .map(str::to_owned)
        .into_iter()
        .zip(5001..)
        .collect();
    users.extend((1..=30).map(|n| (format!("u{n}"), 5100 + n)));
    let users: Vec<(&str, u32)> = users.iter().map(|(name, uid)| (name.as_str(), *uid)).collect();
    let mut builder = Site::of(&users);
    if let Some(address) = milter {
        builder = builder.milter_at(address);
    }
    for (user, wish) in JUDGES {
        builder.users.filter(user, "message", OBEDIENT);
        builder.users.file(user, "rules.toml", format!("mixed = \"{wish}\"\n"));
    }
    builder.users.filter("alice", "message-shop", "#!/bin/sh\necho no shops\nexit 77\n");
    builder.users.file(
        "erin",
        "rules.toml",
        "default = \"accept\"\n[[rule]]\nsender = [\"*\"]\naction = \"reject\"\nreply = \"5.7.1 only friends\"\n",
    );
    builder.users.filter("frank", "recipient", "#!/bin/sh\necho 450 4.2.0 come 100% later\nexit 75\n");
    for n in 1..=30 {
        builder.users.filter(&format!("u{n}"), "message", "#!/bin/sh\necho \"$USER says no\"\nexit 77\n");
    }
    let aliases = builder.sandbox.write("aliases", "team: alice, bob\n");
    let virtual_users = builder
        .sandbox
        .write("virtual", "info@test.example dave@test.example\nsales@test.example bob@test.example\n");
    let builder = builder
        .set("verdict", "mixed", "\"drop\"")
        .set("recipients", "aliases", &format!("[\"{}\"]", aliases.display()))
        .set("recipients", "virtual", &format!("[\"{}\"]", virtual_users.display()));
    let config = builder.config();
    (builder.start(), config)
}

fn sendmail(site: &Site) -> common::sendmail::Builder {
    Sendmail::builder()
        .milter(site.milter_address())
        .alias("team", "alice, bob")
        .virtual_user("info@test.example", "dave")
        .virtual_user("sales@test.example", "bob")
}

fn postfix(site: &Site) -> Postfix {
    let mut mailboxes: Vec<String> = MAILBOXES.map(str::to_owned).to_vec();
    mailboxes.extend((1..=30).map(|n| format!("u{n}")));
    Postfix::builder()
        .milter(site.milter_address())
        .mailboxes(&mailboxes.iter().map(String::as_str).collect::<Vec<_>>())
        .set(
            "virtual_alias_maps",
            "inline:{ {team@test.example=alice@test.example bob@test.example} \
             {info@test.example=dave@test.example} {sales@test.example=bob@test.example} }",
        )
        .start()
}

#[test]
fn every_verdict_reaches_the_client_and_the_mailboxes_alike_with_either_mta() {
    let (site, _) = site(None);
    let with_postfix = Bench { site: &site, mta: Mta::Postfix(postfix(&site)) };
    let with_sendmail = Bench { site: &site, mta: Mta::Sendmail(sendmail(&site).start()) };
    let mut wrong = String::new();
    println!("{:<34}{:<50}Sendmail", "", "Postfix");
    for Scenario { name, run, expected } in scenarios() {
        let mut ask = |bench: &Bench<'_>, expected: &str, mta: &str| {
            bench.say(&[]);
            let got = run(bench);
            if got != expected {
                let _ = writeln!(wrong, "{name}, {mta}:\n  got      {got}\n  expected {expected}");
            }
            got
        };
        let (postfix, sendmail) = match &expected {
            Outcome::Both(outcome) => (outcome, outcome),
            Outcome::Differs(postfix, sendmail) => (postfix, sendmail),
        };
        let postfix = ask(&with_postfix, postfix, "Postfix");
        let sendmail = ask(&with_sendmail, sendmail, "Sendmail");
        let sendmail = if sendmail == postfix { "same".to_owned() } else { short(&sendmail) };
        println!("{name:<34}{:<50}{sendmail}", short(&postfix));
    }
    assert!(wrong.is_empty(), "\n{wrong}");
}

fn short(text: &str) -> String {
    match text.char_indices().nth(46) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text.to_owned(),
    }
}

#[test]
fn a_unix_socket_and_starttls_carry_the_same() {
    // Sendmail connects to no socket below a directory that others may write, as that of temporary files.
    let sandbox = Sandbox::below(Path::new("/run"));
    let (site, _) = site(Some(&format!("unix:{}", sandbox.join("milter.sock").display())));
    let sendmail = sendmail(&site).tls().start();
    site.users.filter(
        "alice",
        "message",
        "#!/bin/sh\necho \"$USERMILTER_TLS $CLIENT_HELO\" > ~/seen\necho no; exit 77\n",
    );
    let mut client = TlsClient::start(sendmail.port());
    // HELO counts again after STARTTLS.
    assert_eq!(client.command("EHLO mx.sender.example").code, 250);
    for _ in 0..2 {
        assert_eq!(client.command("MAIL FROM:<s@sender.example>").code, 250);
        assert_eq!(client.command("RCPT TO:<alice@test.example>").code, 250);
        assert_eq!(client.command("DATA").code, 354);
        assert_eq!(shown(&client.command("Subject: x\r\n\r\nhello\r\n.")), "550 5.7.1 no");
    }
    assert_eq!(client.command("MAIL FROM:<s@sender.example>").code, 250);
    assert_eq!(
        shown(&client.command("RCPT TO:<erin@test.example>")),
        "550 5.7.1 <erin@test.example>... only friends"
    );
    assert_eq!(client.command("RCPT TO:<dave@test.example>").code, 250);
    assert_eq!(client.command("DATA").code, 354);
    assert_eq!(client.command("Subject: x\r\n\r\nhello\r\n.").code, 250);
    sendmail.wait_delivered("dave", 1, PATIENCE);
    let seen = site.home_text("alice", "seen");
    assert!(seen.starts_with("TLSv1") && seen.ends_with(" mx.sender.example\n"), "{seen}");
}

/// SMTP through `openssl s_client`, which does STARTTLS itself.
struct TlsClient {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl TlsClient {
    fn start(port: u16) -> Self {
        let mut command = Command::new(require("openssl"));
        command.args(["s_client", "-quiet", "-crlf", "-starttls", "smtp", "-name", "first.sender.example"]);
        command.arg("-connect").arg(format!("127.0.0.1:{port}"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = command.spawn().unwrap();
        let input = process.stdin.take().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        Self { process, input, output }
    }

    #[track_caller]
    fn command(&mut self, line: &str) -> Reply {
        // Line ends become CRLF on the way.
        self.input.write_all(format!("{}\n", line.replace("\r\n", "\n")).as_bytes()).unwrap();
        self.input.flush().unwrap();
        let mut ready = [PollFd::new(self.output.get_ref().as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut ready, PollTimeout::from(30_000_u16)).unwrap(), 1, "no reply to {line}");
        Reply::read(&mut self.output).unwrap()
    }
}

impl Drop for TlsClient {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn while_usermilter_is_away_mail_is_put_off_and_then_all_is_well() {
    let (mut site, config) = site(None);
    let sendmail = sendmail(&site).start();
    site.users.filter("alice", "message", "#!/bin/sh\necho no; exit 77\n");
    let mut client = Client::connect(sendmail.port());
    client.ehlo("mx.sender.example");
    let whole = |client: &mut Client| {
        let sent = client.send(SENDER, &["alice@test.example"], MESSAGE);
        client.rset();
        let mut replies = [&sent.mail].into_iter().chain(&sent.recipients).chain(&sent.data);
        replies.find(|reply| !reply.is_success()).unwrap().code
    };
    assert_eq!(whole(&mut client), 550);

    // It goes in the middle of a transaction.
    assert_eq!(client.mail_from(SENDER, "").code, 250);
    assert_eq!(client.rcpt_to("alice@test.example").code, 250);
    assert!(site.daemon.terminate().success());
    let reply = client.data(MESSAGE);
    assert_eq!(reply.code, 451, "{}", client.transcript());
    client.rset();
    // Gone for this session, whoever comes back: F=T.
    assert_eq!(whole(&mut client), 451, "{}", client.transcript());
    let mut during = Client::connect(sendmail.port());
    during.ehlo("mx.sender.example");
    assert_eq!(whole(&mut during), 451, "{}", during.transcript());

    site.daemon = Usermilter::start(&config);
    assert_eq!(whole(&mut client), 451, "{}", client.transcript());
    let mut after = Client::connect(sendmail.port());
    after.ehlo("mx.sender.example");
    assert_eq!(whole(&mut after), 550, "{}", after.transcript());
    assert!(sendmail.maildir("alice").is_empty(), "nothing passed unjudged");
}
