//! Filters that people already have, with the real programs: SpamAssassin, bogofilter, a DKIM check, Python, Perl, and
//! recipes in shell. What `usermilter init` writes is what is run.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use common::process::Server;
use common::smtp::Client;
use common::users::Account;
use common::{PATIENCE, Postfix, Sandbox, Sendmail, Site, Usermilter, free_port, require, wait_until};

const ALICE: &str = "alice@test.example";
const HAM: &str = "From: Bob <bob@sender.example>\r\nTo: Alice <alice@test.example>\r\n\
    Subject: Minutes of the meeting\r\nDate: Fri, 20 Nov 2026 12:00:00 +0000\r\n\
    Message-ID: <minutes@sender.example>\r\n\r\nPlease find the agenda of our project below.\r\n";
const GTUBE: &str = "XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X\r\n";

fn alice() -> Site {
    Site::of(&[("alice", 5001)]).start()
}

/// The filter that `usermilter init` writes.
fn template(name: &str) -> String {
    let sandbox = Sandbox::new();
    let mut command = Command::new(Usermilter::program());
    command.args(["init", "--template", name]).env("HOME", sandbox.path()).stdin(Stdio::null());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fs::read_to_string(sandbox.join(".usermilter/message")).unwrap()
}

/// A mail from a client of this address and name: the reply.
fn mail_from(postfix: &Postfix, address: &str, name: &str, message: &str) -> String {
    let mut client = Client::connect_as(postfix.port(), address, name);
    let sent = client.send("bob@sender.example", &[ALICE], message.as_bytes());
    let reply = sent.outcome();
    format!("{} {}", reply.code, reply.text())
}

fn mail(postfix: &Postfix, message: &str) -> String {
    mail_from(postfix, "192.0.2.10", "mx.sender.example", message)
}

/// As the user, in their home.
fn as_user(account: &Account, program: &str) -> Command {
    let mut command = Command::new(require(program));
    command
        .uid(account.uid)
        .gid(account.gid)
        .env_clear()
        .env("HOME", &account.home)
        .env("PATH", "/usr/bin:/bin");
    command.current_dir(&account.home).stdin(Stdio::piped());
    command
}

#[test]
fn spamassassin_refuses_spam_and_its_relay_tests_see_the_client() {
    let spamd = common::unpacked("spamd", &["spamd"]).join("usr/sbin/spamd");
    let sandbox = Sandbox::new();
    let port = free_port();
    // No network tests, nobody's preferences; one rule of our own, about the relay that SpamAssassin makes out of the
    // Received header on top.
    let relay = r"/^\[ ip=192\.0\.2\.66 rdns=bad\.sender\.example helo=bad\.sender\.example by=\S+ /";
    let mut command = Command::new(require("perl"));
    command.arg("-T").arg(spamd).args(["--local", "--nouser-config", "--min-children=1", "--max-children=2"]);
    command.arg(format!("--listen=127.0.0.1:{port}")).args(["--username=nobody", "--syslog=stderr"]);
    command.arg("--helper-home-dir=/nonexistent");
    command
        .arg(format!("--cf=header OUR_RELAY X-Spam-Relays-Untrusted =~ {relay}"))
        .arg("--cf=score OUR_RELAY 50");
    let log = fs::File::create(sandbox.join("spamd.log")).unwrap();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let _spamd = Server::start(&mut command);
    let listens = || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok();
    assert!(wait_until(PATIENCE, listens), "{:?}", fs::read_to_string(sandbox.join("spamd.log")));

    let site = alice();
    let template = template("spamassassin");
    assert_eq!(template.matches("spamc -c").count(), 2, "the comment and the command");
    site.users.filter("alice", "message", template.replace("spamc -c", &format!("spamc -p {port} -c")));
    let postfix = Postfix::builder().milter(site.milter_address()).start();
    assert!(mail(&postfix, HAM).starts_with("250 "));
    let refused = mail(&postfix, &format!("{HAM}{GTUBE}"));
    assert!(refused.starts_with("550 5.7.1 message looks like spam (10"), "{refused}");
    let refused = mail_from(&postfix, "192.0.2.66", "bad.sender.example", HAM);
    assert!(refused.starts_with("550 5.7.1 message looks like spam (5"), "{refused}");
    assert_eq!(postfix.wait_delivered("alice", 1, PATIENCE).len(), 1);
}

#[test]
fn without_a_spamd_mail_is_accepted() {
    let site = alice();
    let template = template("spamassassin").replace("spamc -c", &format!("spamc -p {} -c", free_port()));
    site.users.filter("alice", "message", template);
    assert_eq!(site.judge(&[ALICE], format!("{HAM}{GTUBE}").as_bytes()).letter(), 'a');
}

#[test]
fn bogofilter_judges_by_the_users_own_word_lists() {
    let site = alice();
    let account = site.users.account("alice");
    site.users.filter("alice", "message", template("bogofilter"));
    // Without word lists it knows nothing.
    assert_eq!(site.judge(&[ALICE], HAM.as_bytes()).letter(), 'a');
    for n in 1..=20 {
        for (option, text) in [
            ("-s", format!("Subject: cheap pills {n}\n\nbuy cheap pills now, casino lottery {n}\n")),
            (
                "-n",
                format!("Subject: minutes of the meeting {n}\n\nplease find the agenda of our project {n}\n"),
            ),
        ] {
            let mut bogofilter = as_user(account, "bogofilter").arg(option).spawn().unwrap();
            bogofilter.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
            assert!(bogofilter.wait().unwrap().success());
        }
    }
    let spam = "Subject: cheap pills\r\n\r\nbuy cheap pills now: casino\r\n";
    assert_eq!(site.judge(&[ALICE], spam.as_bytes()).text(), "550 5.7.1 message looks like spam");
    assert_eq!(site.judge(&[ALICE], HAM.as_bytes()).letter(), 'a');
}

/// A stand-in: prints what rspamc prints, whatever rspamd would have said; its arguments go to a file. It shows how the
/// template reads an action. That the real rspamc prints actions in this form is not shown here.
const RSPAMC: &str = "#!/bin/sh
echo \"$@\" > ~/arguments
cat > /dev/null
echo 'Results for file: stdin (0.1 seconds)'
echo '[Metric: default]'
echo \"Action: $(cat ~/action)\"
echo 'Spam: false'
";

#[test]
fn the_template_for_rspamd_reads_what_rspamc_prints() {
    let site = alice();
    let account = site.users.account("alice");
    let rspamc = account.filter("rspamc", RSPAMC);
    site.users.filter(
        "alice",
        "message",
        template("rspamd").replace("rspamc --ip", &format!("{} --ip", rspamc.display())),
    );
    for (action, expected) in [
        ("no action", "a"),
        ("add header", "a"),
        ("reject", "y 550 5.7.1 message looks like spam"),
        ("greylist", "y 451 4.7.1 try again later"),
        ("soft reject", "y 451 4.7.1 try again later"),
    ] {
        fs::write(account.home.join("action"), action).unwrap();
        let answer = site.judge(&[ALICE], HAM.as_bytes());
        assert_eq!(format!("{} {}", answer.letter(), answer.text()).trim_end(), expected, "{action}");
    }
    assert_eq!(
        site.home_text("alice", "arguments").trim_end(),
        "--ip 192.0.2.10 --helo mx.sender.example --from s@sender.example --rcpt alice@test.example"
    );
}

/// With everything that a careless hand changes: spaces, folds, bytes beyond ASCII, dots, empty lines at the end.
const ODD: &[u8] = b"From: S <s@sender.example>\r\nTo: alice@test.example\r\n\
    Subject:  odd   spacing \r\n\tfolded\r\n  twice\r\nX-8bit: caf\xc3\xa9 \xe9  \r\nX-Tab:\tx\r\nX-Empty:\r\n\
    Date: Mon, 1 Jan 2024 00:00:00 +0000\r\nMessage-ID: <m1@sender.example>\r\n\r\n\
    .dot\r\n..two\r\ntrailing  \r\n\xe9 latin\r\n\r\n\r\n> From here\r\nFrom there\r\n\r\n\r\n";

/// Accepts only if both signatures hold: that of opendkim, and one over every byte of the header fields.
const DKIM_CHECK: &str = "#!/usr/bin/python3
import sys
import dkim
record = open('dkim-record', 'rb').read()
message = dkim.DKIM(sys.stdin.buffer.read())
try:
    good = [message.verify(idx=n, dnsfunc=lambda name, timeout=5: record) for n in range(2)]
except dkim.ValidationError as error:
    good = [error]
if good != [True, True]:
    print('5.7.20', good)
    sys.exit(77)
";

const DKIM_SIGN: &str = "import sys
import dkim
message = sys.stdin.buffer.read()
key = open(sys.argv[1], 'rb').read()
fields = [b'from', b'to', b'subject', b'x-8bit', b'x-tab', b'x-empty', b'date', b'message-id']
exact = {'canonicalize': (b'simple', b'simple'), 'include_headers': fields}
sys.stdout.buffer.write(dkim.sign(message, b'two', b'sender.example', key, **exact) + message)
";

fn filtered(command: &mut Command, input: &[u8]) -> Vec<u8> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{command:?}");
    output.stdout
}

/// [`ODD`] with two signatures, and the record that verifies them.
fn signed(directory: &Path) -> (Vec<u8>, String) {
    let key = directory.join("key.pem");
    let made = filtered(Command::new(require("openssl")).args(["genrsa", "-traditional", "2048"]), b"");
    fs::write(&key, made).unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    let mut public = Command::new(require("openssl"));
    let public = filtered(public.args(["rsa", "-pubout", "-in"]).arg(&key), b"");
    let base64: String =
        String::from_utf8(public).unwrap().lines().filter(|line| !line.starts_with('-')).collect();
    let mut opendkim = Command::new(require("opendkim-testmsg"));
    let once = filtered(opendkim.args(["-C", "-d", "sender.example", "-s", "one", "-k"]).arg(&key), ODD);
    // Not the python3 of a path that begins elsewhere: the module is Debian's.
    let twice = filtered(Command::new("/usr/bin/python3").args(["-c", DKIM_SIGN]).arg(&key), &once);
    (twice, format!("v=DKIM1; k=rsa; p={base64}"))
}

#[test]
fn a_signature_holds_so_not_a_byte_differs() {
    let sandbox = Sandbox::new();
    let (message, record) = signed(sandbox.path());
    for line_endings in ["lf", "crlf"] {
        let site = Site::of(&[("alice", 5001)])
            .set("filter", "line-endings", &format!("\"{line_endings}\""))
            .filter("alice", "message", DKIM_CHECK)
            .start();
        fs::write(site.users.account("alice").home.join("dkim-record"), &record).unwrap();
        let postfix = Postfix::builder().milter(site.milter_address()).start();
        let sendmail = Sendmail::builder().milter(site.milter_address()).start();
        for (mta, port) in [("Postfix", postfix.port()), ("Sendmail", sendmail.port())] {
            let ask = |message: &[u8]| {
                let mut client = Client::connect(port);
                client.ehlo("mx.sender.example");
                client.mail_from("s@sender.example", "BODY=8BITMIME");
                client.rcpt_to(ALICE);
                let reply = client.data(message);
                format!("{} {}", reply.code, reply.text())
            };
            let good = ask(&message);
            assert!(good.starts_with("250 "), "{mta}, {line_endings}: {good}");
            // The check sees what differs.
            for (old, new) in
                [("trailing  ", "trailing "), ("odd   spacing", "odd  spacing"), ("Tab:\tx", "Tab: x")]
            {
                let refused = ask(&replaced(&message, old.as_bytes(), new.as_bytes()));
                assert!(refused.starts_with("550 5.7.20 ["), "{mta}, {line_endings}, {old:?}: {refused}");
            }
        }
    }
}

fn replaced(text: &[u8], old: &[u8], new: &[u8]) -> Vec<u8> {
    let at = text.windows(old.len()).position(|window| window == old).expect("what is replaced");
    [&text[..at], new, &text[at + old.len()..]].concat()
}

const PYTHON: &str = "#!/usr/bin/python3
import email
import email.policy
import os
import sys
message = email.message_from_binary_file(sys.stdin.buffer, policy=email.policy.default)
if message['Return-Path'] != '<' + os.environ['SENDER'] + '>':
    sys.exit(1)
for part in message.walk():
    if (part.get_filename() or '').lower().endswith('.exe'):
        print('5.7.1 no programs, please: ' + part.get_filename())
        sys.exit(77)
";

const PERL: &str = "#!/usr/bin/perl
use strict;
use warnings;
local $/;
my ($header, $body) = split /\\n\\n/, <STDIN>, 2;
my $links = () = $body =~ m{https?://}g;
if ($links > 3) { print \"554 5.6.0 $links links, $ENV{CLIENT_ADDRESS}\\n\"; exit 77 }
exit 0;
";

/// As `.procmailrc` would have it: conditions in order, the first that holds ends it; EXITCODE=77 and EXITCODE=75.
const RECIPES: &str = "#!/bin/sh
header=$(sed '/^$/q')
has() { printf '%s\\n' \"$header\" | grep -qiE -- \"$1\"; }

# :0
# * ^List-Id: .*<dev\\.lists\\.example>
has '^List-Id: .*<dev\\.lists\\.example>' && exit 0

# :0
# * ^Subject: .*(lottery|prize)
has '^Subject: .*(lottery|prize)' && { echo 'no prizes'; exit 77; }

# :0
# * ! ^To:
has '^To:' || { echo 'who are you?'; exit 75; }
";

#[test]
fn python_perl_and_shell_filters_judge_mail_as_it_comes() {
    let site = alice();
    let postfix = Postfix::builder().milter(site.milter_address()).start();
    let html = "MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\n";
    let attached = |name: &str| {
        format!(
            "{html}Subject: x\r\n\r\n--b\r\nContent-Type: application/octet-stream\r\n\
                 Content-Disposition: attachment; filename=\"{name}\"\r\n\r\nMZ\r\n--b--\r\n"
        )
    };
    let links = |count: usize| format!("Subject: x\r\n\r\n{}", "http://example.com/\r\n".repeat(count));
    for (filter, cases) in [
        (
            PYTHON,
            vec![
                (attached("minutes.pdf"), "250 "),
                (attached("SETUP.EXE"), "550 5.7.1 no programs, please: SETUP.EXE"),
            ],
        ),
        (PERL, vec![(links(3), "250 "), (links(4), "554 5.6.0 4 links, 192.0.2.10")]),
        (
            RECIPES,
            vec![
                (HAM.to_owned(), "250 "),
                (HAM.replace("Minutes", "Prize minutes"), "550 5.7.1 no prizes"),
                (HAM.replace("Subject: ", "List-Id: Dev <dev.lists.example>\r\nSubject: Prize "), "250 "),
                (links(1), "451 4.7.1 who are you?"),
            ],
        ),
    ] {
        site.users.filter("alice", "message", filter);
        for (message, expected) in cases {
            let got = mail(&postfix, &message);
            assert!(got.starts_with(expected), "{got} not {expected}:\n{message}");
        }
    }
}
