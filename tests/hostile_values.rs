//! What strangers and users choose, end to end: addresses, names, messages, words of filters, in the worst form that gets
//! through. Each test looks at all sides: what the filter was given, what the client was told, byte by byte, and what the
//! log says.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::process::Server;
use common::site::{SiteBuilder, send_message};
use common::{PATIENCE, Postfix, Sendmail, Site};

const ALICE: &str = "alice@test.example";
const SENDER: &str = "s@sender.example";
const MESSAGE: &[u8] = b"Subject: x\r\nFrom: s@sender.example\r\n\r\nhello\r\n";

/// Keeps what it is given, and does as a careless author would: expands every value in a shell, unquoted. Then says what
/// `~/say` says, and ends as `~/status` says.
const PROBE: &str = "#!/bin/sh
cat /proc/$$/environ > ~/environ
cat > ~/message
for value in $SENDER $RECIPIENT $ORIGINAL_RECIPIENT $LOCAL $EXTENSION $CLIENT_HELO $CLIENT_HOSTNAME; do
    echo $value > /dev/null
done
echo x >> ~/runs
test -f ~/say && cat ~/say
test -f ~/grumble && cat ~/grumble >&2
exit \"$(cat ~/status 2>/dev/null || echo 0)\"
";

/// Alice, whose filter is [`PROBE`], at a port of a real MTA.
struct Scene {
    site: Site,
    postfix: Postfix,
}

fn alice() -> SiteBuilder {
    Site::of(&[("alice", 5001)]).filter("alice", "message", PROBE)
}

impl Scene {
    fn start(site: SiteBuilder) -> Self {
        let site = site.start();
        let postfix = Postfix::builder().milter(site.milter_address()).policy(site.policy_address());
        let postfix = postfix.set("smtputf8_enable", "yes").set("local_header_rewrite_clients", "").start();
        Scene { site, postfix }
    }
}

/// A file of alice's home.
fn home(site: &Site, name: &str) -> PathBuf {
    site.users.account("alice").home.join(name)
}

/// Has the filter end with this status and say these bytes.
fn say(site: &Site, status: u8, bytes: &[u8]) {
    fs::write(home(site, "status"), status.to_string()).unwrap();
    fs::write(home(site, "say"), bytes).unwrap();
    for name in ["status", "say"] {
        fs::set_permissions(home(site, name), fs::Permissions::from_mode(0o644)).unwrap();
    }
}

fn runs(site: &Site) -> usize {
    fs::read_to_string(home(site, "runs")).map_or(0, |text| text.lines().count())
}

/// What the filter found in its environment, byte by byte.
fn environment(site: &Site) -> BTreeMap<String, Vec<u8>> {
    let bytes = fs::read(home(site, "environ")).unwrap();
    let pairs = bytes.split(|byte| *byte == 0).filter(|pair| !pair.is_empty());
    let pairs = pairs.map(|pair| {
        let at = pair.iter().position(|byte| *byte == b'=').expect("NAME=value");
        (String::from_utf8(pair[..at].to_vec()).unwrap(), pair[at + 1..].to_vec())
    });
    pairs.collect()
}

/// An SMTP session of which every byte counts.
struct Raw {
    reader: BufReader<TcpStream>,
}

impl Raw {
    fn connect(port: u16) -> Self {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(90))).unwrap();
        let mut raw = Raw { reader: BufReader::new(stream) };
        raw.reply();
        raw
    }

    /// As a client from elsewhere (XCLIENT), which has said EHLO.
    fn foreign(port: u16) -> Self {
        let mut raw = Self::connect(port);
        raw.say(b"EHLO localhost\r\n");
        raw.say(b"XCLIENT ADDR=192.0.2.10 NAME=mx.sender.example\r\n");
        raw.say(b"EHLO mx.sender.example\r\n");
        raw
    }

    fn say(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.reader.get_mut().write_all(bytes).unwrap();
        self.reply()
    }

    /// The bytes of one reply, however its lines look; none if the connection is closed.
    fn reply(&mut self) -> Vec<u8> {
        let mut reply = Vec::new();
        loop {
            let start = reply.len();
            if self.reader.read_until(b'\n', &mut reply).unwrap() == 0 || reply.get(start + 3) != Some(&b'-')
            {
                return reply;
            }
        }
    }

    /// The reply to a message from [`SENDER`] to alice.
    fn message(&mut self, parameters: &str) -> Vec<u8> {
        assert!(self.say(format!("MAIL FROM:<{SENDER}>{parameters}\r\n").as_bytes()).starts_with(b"250"));
        assert!(self.say(format!("RCPT TO:<{ALICE}>\r\n").as_bytes()).starts_with(b"250"));
        assert!(self.say(b"DATA\r\n").starts_with(b"354"));
        self.say(&[MESSAGE, b".\r\n"].concat())
    }
}

/// What came of a mail from a sender, or to a recipient, with a name like this.
enum Fate {
    /// The MTA took no such command.
    Refused(&'static str),
    /// The filter ran, and found this in SENDER or RECIPIENT.
    Judged(&'static str),
}
use Fate::{Judged, Refused};

/// Senders as they are sent, between angle brackets.
const SENDERS: &[(&[u8], &str, Fate)] = &[
    (br#""a b"@x.example"#, "", Judged(r#""a b"@x.example"#)),
    (br#""a\"b\\c"@x.example"#, "", Judged(r#""a\"b\\c"@x.example"#)),
    (b"a%b%s%n@x.example", "", Judged("a%b%s%n@x.example")),
    (b"$(touch${IFS}~/owned)@x.example", "", Judged("\"$(touch${IFS}~/owned)\"@x.example")),
    (b"\"$(touch ~/owned)\"@x.example", "", Judged("\"$(touch ~/owned)\"@x.example")),
    (b"\"`touch ~/owned`\"@x.example", "", Judged("\"`touch ~/owned`\"@x.example")),
    (b"\"; touch ~/owned; #\"@x.example", "", Judged("\"; touch ~/owned; #\"@x.example")),
    (b"|touch@x.example", "", Judged("|touch@x.example")),
    (b"--help@x.example", "", Refused("501 5.1.7 Bad sender address syntax")),
    (b"../../etc/passwd@x.example", "", Judged("\"../../etc/passwd\"@x.example")),
    (b"=?utf-8?q?a=0Ab?=@x.example", "", Judged("=?utf-8?q?a=0Ab?=@x.example")),
    (b"a%0d%0aRCPT@x.example", "", Judged("a%0d%0aRCPT@x.example")),
    (b"a\\nb@x.example", "", Judged("\"a\\\\nb\"@x.example")),
    // No filter was asked once about a sender with a control character.
    (b"\"a\tb\"@x.example", "", Judged("a\u{fffd}b@x.example")),
    (b"\"a\rb\"@x.example", "", Judged("a\u{fffd}b@x.example")),
    (b"\"a\x1b[2Jb\"@x.example", "", Judged("\"a\u{fffd}[2Jb\"@x.example")),
    (b"\"a\x7fb\"@x.example", "", Judged("a\u{fffd}b@x.example")),
    (b"\"a\"b@x.example", "", Refused("501 5.1.7 Bad sender address syntax")),
    (b"\"a\".\"b c\"@x.example", "", Judged("\"a.b c\"@x.example")),
    (b"a@x/y", "", Refused("501 5.1.7 Bad sender address syntax")),
    (b"\"\"@x.example", "", Judged("\"\"@x.example")),
    (b"\"a\0b\"@x.example", "", Refused("501 5.1.7 Bad sender address syntax")),
    ("a\u{2028}b@x.example".as_bytes(), " SMTPUTF8", Judged("a\u{2028}b@x.example")),
    (b"b\xf6se@x.example", "", Refused("500 5.5.2 Error: bad UTF-8 syntax")),
    (b"\"*)(uid=*\"@x.example", "", Judged("\"*)(uid=*\"@x.example")),
    (b"a@[x> outcome=accept]", "", Refused("501 5.1.7 Bad sender address syntax")),
];

/// Recipients as they are sent, all of them alice's.
const RECIPIENTS: &[(&[u8], Fate)] = &[
    // A comment, to Postfix.
    (b"alice+$(touch${IFS}~/owned)@test.example", Judged("alice+$@test.example")),
    (b"alice+$IFS$HOME@test.example", Judged("alice+$IFS$HOME@test.example")),
    (b"\"alice+`touch ~/owned`\"@test.example", Judged("\"alice+`touch ~/owned`\"@test.example")),
    (b"alice+../../../etc/passwd@test.example", Judged("\"alice+../../../etc/passwd\"@test.example")),
    (b"alice+.hidden@test.example", Judged("alice+.hidden@test.example")),
    // Postfix shows them as spaces.
    (b"\"alice+a\tb\"@test.example", Judged("\"alice+a b\"@test.example")),
    (b"\"alice+a\rb\"@test.example", Judged("\"alice+a b\"@test.example")),
    (b"\"al\"ice@test.example", Refused("501 5.1.3 Bad recipient address syntax")),
    (b"\"alice\"+x@test.example", Refused("501 5.1.3 Bad recipient address syntax")),
    (b"alice+*@test.example", Judged("alice+*@test.example")),
    (b"alice+--help@test.example", Judged("alice+--help@test.example")),
];

#[test]
fn hostile_addresses_reach_the_filter_as_data_and_get_around_none() {
    let scene = Scene::start(alice());
    let long_extension = format!("alice+{}@test.example", "e".repeat(1900));
    let long_sender = format!("{}@x.example", "s".repeat(1900));
    let more_senders = [(long_sender.as_bytes(), "", None)];
    let senders = SENDERS.iter().map(|(name, parameters, fate)| (*name, *parameters, Some(fate)));
    for (name, parameters, fate) in senders.chain(more_senders) {
        let mail = [b"MAIL FROM:<", name, b">", parameters.as_bytes(), b"\r\n"].concat();
        check_address(&scene, "SENDER", name, &mail, format!("RCPT TO:<{ALICE}>\r\n").as_bytes(), fate);
    }
    let more_recipients = [(long_extension.as_bytes(), None)];
    for (name, fate) in RECIPIENTS.iter().map(|(name, fate)| (*name, Some(fate))).chain(more_recipients) {
        let rcpt = [b"RCPT TO:<", name, b">\r\n"].concat();
        check_address(&scene, "RECIPIENT", name, format!("MAIL FROM:<{SENDER}>\r\n").as_bytes(), &rcpt, fate);
    }
    assert!(!home(&scene.site, "owned").exists());
    check_lines(&scene.site.daemon.log_lines());
}

/// Sends a mail and looks at what became of it. `None`: the name is as it was sent.
#[track_caller]
fn check_address(scene: &Scene, variable: &str, name: &[u8], mail: &[u8], rcpt: &[u8], fate: Option<&Fate>) {
    let shown = String::from_utf8_lossy(&name[..name.len().min(80)]);
    let (ran, logged) = (runs(&scene.site), scene.site.daemon.log_lines().len());
    let mut raw = Raw::foreign(scene.postfix.port());
    let mut reply = raw.say(mail);
    if reply.starts_with(b"250") {
        reply = raw.say(rcpt);
    }
    if let Some(Refused(expected)) = fate {
        assert_eq!(String::from_utf8_lossy(&reply).trim_end(), *expected, "{shown}");
        return;
    }
    assert!(reply.starts_with(b"250"), "{shown}: {}", String::from_utf8_lossy(&reply));
    assert!(raw.say(b"DATA\r\n").starts_with(b"354"));
    let reply = raw.say(&[MESSAGE, b".\r\n"].concat());
    assert!(reply.starts_with(b"250 2.0.0 Ok: queued as "), "{shown}: {}", String::from_utf8_lossy(&reply));
    assert_eq!(runs(&scene.site), ran + 1, "{shown}: the filter was not asked");
    let environment = environment(&scene.site);
    let got = String::from_utf8_lossy(&environment[variable]).into_owned();
    match fate {
        Some(Judged(expected)) => assert_eq!(got, *expected, "{shown}"),
        _ => assert_eq!(got.as_bytes(), name),
    }
    for (name, value) in &environment {
        let text = String::from_utf8_lossy(value);
        assert!(name == "USERMILTER_RECIPIENTS" || !text.contains(['\n', '\r']), "{name}={text:?}");
    }
    // Nothing was added to the message either.
    let message = fs::read(home(&scene.site, "message")).unwrap();
    let message = String::from_utf8_lossy(&message).into_owned();
    let fields: Vec<&str> = message
        .lines()
        .take_while(|line| !line.is_empty())
        .filter(|line| !line.starts_with(['\t', ' ']))
        .collect();
    let names: Vec<&str> = fields.iter().filter_map(|line| line.split(':').next()).collect();
    assert_eq!(names[..4], ["Return-Path", "Received", "Subject", "From"], "{shown}: {message}");
    let line = scene.site.daemon.wait_for_log_after(logged, "outcome=", PATIENCE);
    assert!(line.contains("verdicts=\"alice=accept (message: exit 0, "), "{line}");
    let lines = scene.site.daemon.log_lines();
    assert_eq!(lines[logged..].iter().filter(|line| line.contains("outcome=")).count(), 1, "{lines:#?}");
}

/// That every line of a log in text begins with time and level, and has nothing that a terminal would obey.
#[track_caller]
fn check_lines(lines: &[String]) {
    for line in lines {
        let mut words = line.split_ascii_whitespace();
        let time = words.next().and_then(|time| time.parse::<jiff::Timestamp>().ok());
        assert!(time.is_some() && matches!(words.next(), Some("INFO" | "WARN" | "ERROR")), "{line:?}");
        let forbidden =
            |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}');
        assert!(!line.contains(forbidden), "{line:?}");
    }
}

/// A message with which a client tries to have the MTA see its end where the filter does not, or the other way round.
#[test]
fn what_the_filter_reads_is_what_is_delivered_however_lines_end() {
    let scene = Scene::start(alice());
    for (number, trick) in [
        &b"a\n.\nMAIL FROM:<forged@x.example>\r\n"[..],
        b"a\n.\r\nMAIL FROM:<forged@x.example>\r\n",
        b"a\r.\rMAIL FROM:<forged@x.example>\r\n",
        b"a\r\n..\r\nMAIL FROM:<forged@x.example>\r\n",
        b"a\r\n.\0\r\nMAIL FROM:<forged@x.example>\r\n",
        b"a\x1b[2J\r\n\xff\xfe\xf0\r\n",
    ]
    .into_iter()
    .enumerate()
    {
        let (ran, logged) = (runs(&scene.site), scene.site.daemon.log_lines().len());
        let mut raw = Raw::foreign(scene.postfix.port());
        raw.say(format!("MAIL FROM:<{SENDER}>\r\n").as_bytes());
        raw.say(format!("RCPT TO:<{ALICE}>\r\n").as_bytes());
        raw.say(b"DATA\r\n");
        let body = [b"Subject: x\r\n\r\n", trick, b"end\r\n.\r\n"].concat();
        let reply = raw.say(&body);
        assert!(reply.starts_with(b"250"), "{}", String::from_utf8_lossy(&reply));
        drop(raw);
        let delivered = scene.postfix.wait_delivered("alice", number + 1, PATIENCE);
        assert_eq!(delivered.len(), number + 1, "a message more");
        assert_eq!(runs(&scene.site), ran + 1);
        let read = fs::read(home(&scene.site, "message")).unwrap();
        assert_eq!(body_of(&read), body_of(delivered.last().unwrap()), "{}", String::from_utf8_lossy(trick));
        scene.site.daemon.wait_for_log_after(logged, "outcome=", PATIENCE);
        assert_eq!(
            scene.site.daemon.log_lines()[logged..].iter().filter(|line| line.contains("outcome=")).count(),
            1
        );
    }
}

/// A message without its header.
fn body_of(message: &[u8]) -> String {
    let text = String::from_utf8_lossy(message).into_owned();
    text.split_once("\n\n").expect("an empty line").1.to_owned()
}

#[test]
fn hostile_names_of_clients_reach_the_filter_as_data_or_not_at_all() {
    let scene = Scene::start(alice());
    for (helo, expected) in [
        (&b"$(touch ~/owned)"[..], Some(&b"$(touch ~/owned)"[..])),
        (b"`touch ~/owned`", Some(b"`touch ~/owned`")),
        (b"x;touch ~/owned", Some(b"x;touch ~/owned")),
        (b"../../etc/passwd", Some(b"../../etc/passwd")),
        (b"-rf", Some(b"-rf")),
        (b"%s%n%x", Some(b"%s%n%x")),
        (b"x\" outcome=\"accept\" y=\"", Some(b"x\" outcome=\"accept\" y=\"")),
        (b"x\x1b[2J\x07y", Some(b"x\x1b[2J\x07y")),
        // Postfix itself makes a space of it.
        (b"x\ry", Some(b"x y")),
        (b"*)(uid=*", Some(b"*)(uid=*")),
        ("\u{202e}\u{2028}".as_bytes(), Some("\u{202e}\u{2028}".as_bytes())),
    ] {
        let shown = String::from_utf8_lossy(helo).into_owned();
        let (ran, logged) = (runs(&scene.site), scene.site.daemon.log_lines().len());
        let mut raw = Raw::foreign(scene.postfix.port());
        assert!(raw.say(&[b"EHLO ", helo, b"\r\n"].concat()).starts_with(b"250"), "{shown:?}");
        let reply = raw.message("");
        assert!(reply.starts_with(b"250"), "{shown:?}: {}", String::from_utf8_lossy(&reply));
        assert_eq!(runs(&scene.site), ran + 1, "{shown}");
        scene.site.daemon.wait_for_log_after(logged, "outcome=", PATIENCE);
        assert_eq!(environment(&scene.site).get("CLIENT_HELO").map(Vec::as_slice), expected, "{shown:?}");
    }
    assert!(!home(&scene.site, "owned").exists());
    check_lines(&scene.site.daemon.log_lines());
    // A name is one that Postfix has looked up, and Postfix believes no other.
    let mut raw = Raw::connect(scene.postfix.port());
    raw.say(b"EHLO localhost\r\n");
    for name in ["$(touch+20~/owned)", "a+0Ab", "-a", "a..b"] {
        let reply = raw.say(format!("XCLIENT NAME={name}\r\n").as_bytes());
        assert!(reply.starts_with(b"501 5.5.4 Bad NAME"), "{name}: {}", String::from_utf8_lossy(&reply));
    }
}

/// What no MTA gives, from somebody who has found the socket.
#[test]
fn what_no_mta_would_say_is_judged_all_the_same_and_makes_no_line() {
    let site = alice().start();
    let huge = "x".repeat(64 * 1024);
    let (line_end, long) = ("a\nb\r\nInjected: y", format!("<{huge}@x.example>"));
    for (queue_id, name, helo, sender, is_judged) in [
        ("4Q\nFORGED INFO 4Q: accept outcome=\"accept\"", line_end, line_end, "<a\nb@x.example>", true),
        ("4Q: accept outcome=\"accept\" x=\"", "x\u{1b}[2J", "-e", "<a\r\nSubject: y@x.example>", true),
        (huge.as_str(), huge.as_str(), huge.as_str(), "<\u{85}\u{9b}@x.example>", true),
        ("4Q", "x", "x", long.as_str(), false),
    ] {
        let (ran, logged) = (runs(&site), site.daemon.log_lines().len());
        let mut mta = site.mta();
        mta.helo(helo);
        let macros =
            [("j", line_end), ("i", queue_id), ("{client_addr}", "192.0.2.10"), ("{client_name}", name)];
        mta.macros('M', &macros);
        mta.mail(&[sender]);
        assert_eq!(mta.rcpt(&["<alice@test.example>"]).letter(), 'c');
        assert_eq!(send_message(&mut mta, MESSAGE).letter(), 'a');
        mta.quit();
        site.daemon.wait_for_log_after(logged, "outcome=\"accept\"", PATIENCE);
        let lines = site.daemon.log_lines();
        assert_eq!(lines[logged..].iter().filter(|line| line.contains(" outcome=")).count(), 1, "{lines:#?}");
        assert_eq!(runs(&site) - ran, usize::from(is_judged), "{lines:#?}");
        if is_judged {
            let environment = environment(&site);
            assert_eq!(environment["USERMILTER_QUEUE_ID"], b"", "a queue id that is none");
            let message = String::from_utf8_lossy(&fs::read(home(&site, "message")).unwrap()).into_owned();
            assert!(!message.contains("\nInjected") && !message.contains("\nSubject: y"), "{message}");
        }
    }
    check_lines(&site.daemon.log_lines());
}

/// What a filter writes to standard output, its status, and the bytes that a client of Postfix then sees, if they are
/// told.
fn words() -> Vec<(Vec<u8>, u8, Option<&'static str>)> {
    let told = |text: &[u8], status: u8, reply: &'static str| (text.to_vec(), status, Some(reply));
    vec![
        told(
            b"no\r\n250 2.0.0 Ok: queued as FORGED\r\n",
            77,
            "550-5.7.1 no\r\n550 5.7.1 250 2.0.0 Ok: queued as FORGED\r\n",
        ),
        told(b"no\r250 2.0.0 Ok", 77, "550 5.7.1 no?250 2.0.0 Ok\r\n"),
        told(b"421 4.3.2 bye", 77, "550 5.7.1 bye\r\n"),
        told(b"521 5.3.2 bye", 77, "550 5.3.2 bye\r\n"),
        told(b"250 2.0.0 fine", 77, "550 5.7.1 fine\r\n"),
        told(b"354 go on", 77, "550 5.7.1 go on\r\n"),
        told(b"550-5.7.1 x", 77, "550 5.7.1 550-5.7.1 x\r\n"),
        told(b"550 5.7.1 never", 75, "451 4.7.1 never\r\n"),
        told(b"\x1b[2J\x1b]0;x\x07no", 77, "550 5.7.1 ?[2J?]0;x?no\r\n"),
        told(b"100% %s%n%x %%", 77, "550 5.7.1 100% %s%n%x %%\r\n"),
        told("b\u{f6}se\u{2028}\u{202e}x\u{85}y".as_bytes(), 77, "550 5.7.1 b?se??x?y\r\n"),
        told(b"\xff\xfeno\0\x7f", 77, "550 5.7.1 ??no??\r\n"),
        (b"\n.\r\nQUIT\r\n".to_vec(), 77, None),
        (b"line\n".repeat(10_000), 77, None),
        (vec![b'x'; 1 << 20], 77, None),
        (b"%".repeat(1 << 16), 75, None),
        (vec![0xff; 1 << 16], 77, None),
    ]
}

#[test]
fn the_words_of_a_filter_are_a_refusal_and_nothing_else() {
    let scene = Scene::start(alice());
    let sendmail = Sendmail::builder().milter(scene.site.milter_address()).start();
    for (text, status, expected) in words() {
        say(&scene.site, status, &text);
        let mut raw = Raw::foreign(scene.postfix.port());
        let reply = check_refusal(&mut raw, "", status);
        if let Some(expected) = expected {
            assert_eq!(reply, expected);
        }
        let mut raw = Raw::connect(sendmail.port());
        raw.say(b"EHLO mx.sender.example\r\n");
        let reply = check_refusal(&mut raw, "", status);
        if let Some(expected) = expected {
            assert_eq!(reply, expected, "Sendmail");
        }
    }
    // Who speaks SMTPUTF8 gets words in it, and no more.
    say(&scene.site, 77, "b\u{f6}se\u{2028}\u{202e}x\u{85}y\n".as_bytes());
    let mut raw = Raw::foreign(scene.postfix.port());
    assert_eq!(check_refusal(&mut raw, " SMTPUTF8", 77), "550 5.7.1 b\u{f6}se??x?y\r\n");
    assert_eq!(scene.postfix.maildir("alice").len() + sendmail.maildir("alice").len(), 0);
    check_lines(&scene.site.daemon.log_lines());
}

#[test]
fn the_words_of_a_recipient_executable_are_a_refusal_and_nothing_else() {
    let site = alice();
    site.users.filter("alice", "recipient", PROBE);
    let scene = Scene::start(site);
    for (number, (text, status, _)) in words().into_iter().enumerate() {
        say(&scene.site, status, &text);
        let mut raw = Raw::foreign(scene.postfix.port());
        // Another sender each time: what was said to the last is good for a minute.
        raw.say(format!("MAIL FROM:<s{number}@sender.example>\r\n").as_bytes());
        let reply = raw.say(format!("RCPT TO:<{ALICE}>\r\n").as_bytes());
        check_reply(&reply, status);
        assert!(raw.say(b"NOOP\r\n").starts_with(b"250 2.0.0 Ok"));
    }
    check_lines(&scene.site.daemon.log_lines());
}

/// The reply to a message that alice's filter refuses, or puts off; the session goes on as if nothing had been said.
#[track_caller]
fn check_refusal(raw: &mut Raw, parameters: &str, status: u8) -> String {
    let reply = raw.message(parameters);
    check_reply(&reply, status);
    assert!(raw.say(b"NOOP\r\n").starts_with(b"250 2.0.0 "), "the session is out of step");
    String::from_utf8(reply).expect("text")
}

/// That these bytes are one reply of the right class, and nothing that a client or a terminal could take for more.
#[track_caller]
fn check_reply(reply: &[u8], status: u8) {
    let text = String::from_utf8(reply.to_vec()).expect("text");
    let class = if status == 77 { '5' } else { '4' };
    let lines: Vec<&str> = text.split_terminator("\r\n").collect();
    assert!(text.ends_with("\r\n") && lines.len() <= 32, "{text:?}");
    for (number, line) in (1..).zip(&lines) {
        let separator = if number == lines.len() { ' ' } else { '-' };
        assert!(!line.contains(char::is_control) && line.len() <= 1100, "{line:?}");
        assert_eq!(line.get(..3), text.get(..3), "{text:?}");
        assert!(line.starts_with(class) && line[3..].starts_with([separator]), "{text:?}");
        assert!(line[4..].starts_with(class) && line[5..].starts_with('.'), "{text:?}");
    }
    assert!(!text.starts_with("421") && !text.starts_with("521"), "{text:?}");
}

/// Words that would be lines, fields or terminal commands of a log, if they could.
const FORGERY: &str = "x\n2026-01-01T00:00:00.000000Z  INFO 4FORGED: accept outcome=\"accept\"\r\u{1b}[2K\u{1b}]0;y\u{7}\u{9b}A\u{2028}\\\" outcome=\"accept\" {\"outcome\":\"accept\"}\nPRIORITY=0\nMESSAGE=forged\n";

/// A mail that alice refuses, with [`FORGERY`] wherever somebody chooses words.
fn forge(site: &Site) {
    say(site, 77, FORGERY.as_bytes());
    fs::write(home(site, "grumble"), FORGERY).unwrap();
    forge_at(site.milter_address());
}

fn forge_at(milter: &str) {
    let mut mta = common::milter::Client::connect(milter);
    mta.helo(FORGERY);
    let name = [("j", FORGERY), ("i", FORGERY), ("{client_addr}", "192.0.2.10"), ("{client_name}", FORGERY)];
    mta.macros('M', &[&name[..], &[("{tls_version}", FORGERY)]].concat());
    mta.mail(&[&format!("<\"{}\"@x.example>", FORGERY.replace('"', "'"))]);
    assert_eq!(mta.rcpt(&["<alice@test.example>"]).letter(), 'c');
    assert_eq!(send_message(&mut mta, MESSAGE).letter(), 'y');
    mta.quit();
}

#[test]
fn nobody_forges_a_line_of_the_log_in_text() {
    let site = alice().start();
    forge(&site);
    site.daemon.wait_for_log(" outcome=\"reject\"", PATIENCE);
    let lines = site.daemon.log_lines();
    check_lines(&lines);
    assert!(!lines.iter().any(|line| line.starts_with("2026-01-01")), "{lines:#?}");
    let of_transaction: Vec<&String> =
        lines.iter().filter(|line| line.contains(" outcome=\"reject\"")).collect();
    assert_eq!(of_transaction.len(), 1, "{lines:#?}");
    // The fields are told by their quotes, which nobody else can write.
    assert!(
        !of_transaction[0].replace("\\\\", "").replace("\\\"", "").contains("outcome=\"accept\""),
        "{lines:#?}"
    );
}

#[test]
fn nobody_forges_a_line_of_the_log_in_json() {
    let site = alice().set("log", "format", "\"json\"").start();
    forge(&site);
    site.daemon.wait_for_log("\"outcome\":\"reject\"", PATIENCE);
    let mut outcomes = Vec::new();
    for line in site.daemon.log_lines() {
        let value: serde_json::Value =
            serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(value["timestamp"].is_string() && value["level"].is_string(), "{line}");
        if !value["outcome"].is_null() {
            assert_eq!(value["helo"], FORGERY);
            assert_eq!(value["client"], format!("{FORGERY}[192.0.2.10]"));
            outcomes.push(value["outcome"].clone());
        }
    }
    assert_eq!(outcomes, ["reject"]);
}

#[test]
fn nobody_forges_an_entry_of_the_journal() {
    let site = alice();
    fs::write(site.users.account("alice").home.join("status"), "77").unwrap();
    let config = site.sandbox.write("usermilter.toml", site.config());
    // The journal's socket, seen only in a mount namespace of the daemon's own.
    let directory = site.sandbox.directory("journal");
    let journal = UnixDatagram::bind(directory.join("socket")).unwrap();
    fs::set_permissions(directory.join("socket"), fs::Permissions::from_mode(0o666)).unwrap();
    journal.set_read_timeout(Some(PATIENCE)).unwrap();
    fs::create_dir_all("/run/systemd/journal").unwrap();
    let stderr = fs::File::create(site.sandbox.join("stderr")).unwrap();
    let stream = format!("{}:{}", stderr.metadata().unwrap().dev(), stderr.metadata().unwrap().ino());
    let mut command = Command::new("unshare");
    command.args(["-m", "/bin/sh", "-c", "mount --bind \"$0\" /run/systemd/journal && exec \"$@\""]);
    command.arg(&directory).arg(common::Usermilter::program()).arg("serve").arg("--config").arg(config);
    command.env("JOURNAL_STREAM", stream).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
    let _server = Server::start(&mut command);
    let mut buffer = vec![0; 1 << 18];
    let mut entry = || {
        loop {
            // An empty one only asks whether there is a journal.
            match journal.recv(&mut buffer).expect("an entry for the journal") {
                0 => (),
                length => return journal_fields(&buffer[..length]),
            }
        }
    };
    let message =
        |entry: &[(String, String)]| entry.iter().find(|(name, _)| name == "MESSAGE").unwrap().1.clone();
    while !message(&entry()).contains("ready") {}
    let milter = site
        .config()
        .lines()
        .find_map(|l| Some(l.strip_prefix("milter = [\"")?.trim_end_matches("\"]").to_owned()));
    forge_at(&milter.unwrap());
    loop {
        let entry = entry();
        for name in ["MESSAGE", "PRIORITY"] {
            assert_eq!(entry.iter().filter(|(other, _)| other == name).count(), 1, "{entry:#?}");
        }
        assert_ne!(message(&entry), "forged");
        assert!(entry.iter().all(|(name, value)| name != "PRIORITY" || value != "0"), "{entry:#?}");
        let field =
            |name: &str| entry.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str());
        if let Some(outcome) = field("F_OUTCOME") {
            assert_eq!((outcome, field("F_HELO")), ("reject", Some(FORGERY)));
            return;
        }
    }
}

/// systemd's native journal protocol: `NAME=value` and a line end, or NAME, a line end, a length, and the value.
fn journal_fields(mut entry: &[u8]) -> Vec<(String, String)> {
    let mut fields = Vec::new();
    while !entry.is_empty() {
        let end = entry.iter().position(|byte| *byte == b'\n').expect("a line");
        let (line, rest) = entry.split_at(end);
        let line = String::from_utf8_lossy(line).into_owned();
        match line.split_once('=') {
            Some((name, value)) => {
                fields.push((name.to_owned(), value.to_owned()));
                entry = &rest[1..];
            }
            None => {
                let (length, rest) = rest[1..].split_first_chunk::<8>().expect("a length");
                let (value, rest) = rest.split_at(usize::try_from(u64::from_le_bytes(*length)).unwrap());
                fields.push((line, String::from_utf8_lossy(value).into_owned()));
                entry = &rest[1..];
            }
        }
    }
    fields
}

#[test]
fn nobody_forges_a_line_of_a_users_own_log() {
    let site = alice();
    site.users.file("alice", "log", "");
    let site = site.start();
    forge(&site);
    let path = site.users.account("alice").path("log");
    let read = || fs::read_to_string(&path).unwrap();
    assert!(common::wait_until(PATIENCE, || read().contains(" reject (")), "{}", read());
    let log = read();
    for line in log.split_terminator('\n') {
        let (time, rest) = line.split_once(' ').unwrap();
        assert!(time.parse::<jiff::Timestamp>().is_ok() && !time.starts_with("2026-01-01"), "{log}");
        assert!(rest.starts_with("NOQUEUE message: ") || rest.starts_with("NOQUEUE from=<"), "{log}");
        assert!(!line.contains(|c: char| c.is_control() || c == '\u{2028}'), "{line:?}");
    }
    assert_eq!(log.lines().filter(|line| line.contains(" NOQUEUE from=<")).count(), 1, "{log}");
}
