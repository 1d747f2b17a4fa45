//! Filters that people already have, with the real programs: SpamAssassin, bogofilter, Rspamd, a DKIM check, Python,
//! Perl, and recipes in shell. What `usermilter init` writes is what is run.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;

use std::fs;
use std::io::{Read, Write};
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

/// Rspamd, and the libraries that a machine without it may lack.
const RSPAMD_PACKAGES: [&str; 9] = [
    "rspamd",
    "libhyperscan5",
    "libluajit-5.1-2",
    "libglib2.0-0",
    "libicu72",
    "libpcre2-8-0",
    "libsodium23",
    "libsqlite3-0",
    "libunwind8",
];

/// A rule of our own: what Rspamd was told goes to its log, and a subject chooses the score or the action.
const RSPAMD_RULE: &str = r#"
local logger = require "rspamd_logger"
rspamd_config:register_symbol{
  name = "TOLD", type = "prefilter",
  callback = function(task)
    logger.infox(task, "told: ip=%s hostname=%s helo=%s user=%s from=%s rcpt=%s", task:get_ip(), task:get_hostname(),
      task:get_helo(), task:get_user(), task:get_from("smtp")[1].addr, task:get_recipients("smtp")[1].addr)
    if task:get_header("Subject") == "soft reject" then task:set_pre_result("soft reject", "later") end
  end
}
rspamd_config:register_symbol{
  name = "OURS", type = "normal", score = 1.0,
  callback = function(task)
    local score = string.match(task:get_header("Subject") or "", "^score (%d+)$")
    if score then return true, tonumber(score) end
  end
}
"#;

/// A private Rspamd with one worker: no network tests, no Redis, none of Debian's rules but those that are built in.
struct Rspamd {
    server: Server,
    sandbox: Sandbox,
    port: u16,
}

impl Rspamd {
    fn start() -> Self {
        let unpacked = common::unpacked("rspamd", &RSPAMD_PACKAGES);
        let sandbox = Sandbox::new();
        // Users run the client, and the daemon is nobody: the build directory may be out of their reach.
        let copied =
            Command::new("cp").arg("-a").arg(unpacked.join("usr")).arg(sandbox.path()).status().unwrap();
        assert!(copied.success());
        let nobody = nix::unistd::User::from_name("nobody").unwrap().expect("user nobody");
        let data = sandbox.directory("data");
        nix::unistd::chown(&data, Some(nobody.uid), Some(nobody.gid)).unwrap();
        let port = free_port();
        let directory = sandbox.path().display();
        sandbox.write("rule.lua", RSPAMD_RULE);
        // It does not start without a list of top-level domains, and is quick with a short one.
        sandbox.write("tld", "example\n");
        let config = sandbox.write(
            "rspamd.conf",
            format!(
                "lua = \"{directory}/rule.lua\";
options {{
  url_tld = \"{directory}/tld\";
  pidfile = \"{directory}/data/pid\"; cache_file = \"{directory}/data/cache\"; hs_cache_dir = \"{directory}/data/\";
  control_socket = \"{directory}/data/control mode=0600\"; filters = \"\";
  dns {{ nameserver = [\"127.0.0.1:{nobody_answers}\"]; timeout = 0.1s; retransmits = 1; }}
}}
actions {{ greylist = 4; add_header = 6; reject = 15; }}
modules {{ path = \"{directory}/data/\"; }}
logging {{ type = \"console\"; level = \"info\"; }}
worker \"normal\" {{ bind_socket = \"127.0.0.1:{port}\"; count = 1; }}
",
                nobody_answers = free_port()
            ),
        );
        let share = sandbox.join("usr/share/rspamd");
        let mut command = Command::new(sandbox.join("usr/bin/rspamd"));
        command.arg("--no-fork").arg("--config").arg(config);
        command.arg(format!("--var=DBDIR={}", data.display()));
        for (name, directory) in
            [("SHAREDIR", ""), ("RULESDIR", "rules"), ("PLUGINSDIR", "plugins"), ("LUALIBDIR", "lualib")]
        {
            command.arg(format!("--var={name}={}", share.join(directory).display()));
        }
        command.env("LD_LIBRARY_PATH", Self::libraries(&sandbox)).uid(nobody.uid.as_raw());
        let log = fs::File::create(sandbox.join("log")).unwrap();
        command.gid(nobody.gid.as_raw()).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let mut rspamd = Rspamd { server: Server::start(&mut command), sandbox, port };
        let ready = || rspamd.server.status().is_some() || answers_ping(port);
        assert!(wait_until(PATIENCE, ready) && rspamd.server.status().is_none(), "{}", rspamd.log());
        rspamd
    }

    fn libraries(sandbox: &Sandbox) -> String {
        let general = common::libraries(sandbox.path());
        format!("{}:{}", sandbox.join("usr/lib/rspamd").display(), general.display())
    }

    /// The template, told where the client and the server are.
    fn filter(&self) -> String {
        let template = template("rspamd");
        assert_eq!(template.matches("$(rspamc ").count(), 1, "{template}");
        let client = format!(
            "$(LD_LIBRARY_PATH={} {} --connect=127.0.0.1:{} ",
            Self::libraries(&self.sandbox),
            self.sandbox.join("usr/bin/rspamc").display(),
            self.port
        );
        template.replace("$(rspamc ", &client)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.sandbox.join("log")).unwrap()
    }

    /// What it was told of the last of so many mails.
    fn told(&self, mails: usize) -> String {
        let log = self.log();
        let told: Vec<&str> = log.lines().filter_map(|line| Some(line.split_once("told: ")?.1)).collect();
        assert_eq!(told.len(), mails, "{log}");
        told[mails - 1].to_owned()
    }
}

/// Whether a worker is there, not only the socket that it will serve.
fn answers_ping(port: u16) -> bool {
    let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else {
        return false;
    };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = Vec::new();
    stream.write_all(b"GET /ping HTTP/1.0\r\n\r\n").is_ok()
        && stream.read_to_end(&mut answer).is_ok()
        && answer.starts_with(b"HTTP/1.")
        && String::from_utf8_lossy(&answer).contains(" 200 ")
}

#[test]
fn rspamd_chooses_between_accept_reject_and_defer_and_is_told_who_writes_to_whom() {
    let rspamd = Rspamd::start();
    let site = Site::of(&[("alice", 5001)]).set("recipients", "judge-authenticated", "true").start();
    site.users.filter("alice", "message", rspamd.filter());
    let postfix = Postfix::builder().milter(site.milter_address()).start();

    assert!(mail(&postfix, HAM).starts_with("250 "));
    let told = "hostname=mx.sender.example helo=mx.sender.example user=nil from=bob@sender.example rcpt=alice@test.example";
    assert_eq!(rspamd.told(1), format!("ip=192.0.2.10 {told}"));
    // A client without a name, that says things as HELO; an authenticated one; both send bounces.
    for (mails, login, user) in [(2, "[UNAVAILABLE]", "nil"), (3, "carol", "carol")] {
        let mut client = Client::connect(postfix.port());
        client.ehlo("localhost");
        client.xclient(&[("NAME", "[UNAVAILABLE]"), ("ADDR", "203.0.113.7"), ("LOGIN", login)]);
        client.ehlo("--json");
        client.mail_from("", "");
        client.rcpt_to(ALICE);
        assert_eq!(client.data(HAM.as_bytes()).code, 250);
        let told = format!("hostname=nil helo=--json user={user} from= rcpt=alice@test.example");
        assert_eq!(rspamd.told(mails), format!("ip=203.0.113.7 {told}"));
    }

    let refused = mail(&postfix, &format!("{HAM}{GTUBE}"));
    assert!(refused.starts_with("550 5.7.1 message looks like spam"), "{refused}");
    for (subject, action, expected) in [
        ("score 3", "no action", "250 "),
        ("score 5", "greylist", "451 4.7.1 try again later"),
        ("score 7", "add header", "250 "),
        ("score 20", "reject", "550 5.7.1 message looks like spam"),
        ("soft reject", "soft reject", "451 4.7.1 try again later"),
    ] {
        let seen = rspamd.log().len();
        let got = mail(&postfix, &HAM.replace("Minutes of the meeting", subject));
        assert!(got.starts_with(expected), "{subject}: {got}");
        let log = rspamd.log().split_off(seen);
        assert!(log.contains(&format!("({action}): [")), "{subject}: {log}");
    }
    // The ham, the bounces, and scores 3 and 7.
    assert_eq!(postfix.wait_delivered("alice", 5, PATIENCE).len(), 5);
}

#[test]
fn without_an_rspamd_the_filter_is_in_error_and_the_site_decides() {
    let mut rspamd = Rspamd::start();
    let spam = format!("{HAM}{GTUBE}");
    let sites = ["accept", "defer"].map(|on_error| {
        let site = Site::of(&[("alice", 5001)])
            .set("filter", "on-error", &format!("\"{on_error}\""))
            .filter("alice", "message", &rspamd.filter())
            .start();
        let postfix = Postfix::builder().milter(site.milter_address()).start();
        (site, postfix)
    });
    for (_, postfix) in &sites {
        assert!(mail(postfix, &spam).starts_with("550 "));
    }
    assert!(rspamd.server.terminate(PATIENCE).is_some());
    for ((site, postfix), expected) in sites.iter().zip(["250 ", "451 4.3.0 "]) {
        let seen = site.daemon.log_lines().len();
        let got = mail(postfix, &spam);
        assert!(got.starts_with(expected), "{expected}: {got}");
        site.daemon.wait_for_log_after(seen, "no answer from rspamd", PATIENCE);
    }
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
