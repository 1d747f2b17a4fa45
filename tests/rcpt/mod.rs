//! What the tests of the RCPT stage share: users whose names are in test.example, usermilter for them, and a private
//! Postfix whose main.cf has the fragments of `postfix/`, word for word but for the addresses.

#![allow(dead_code, reason = "every test binary uses another part")]
#![allow(unreachable_pub, reason = "`pub` marks what is offered to tests")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::common::milter;
use crate::common::policy::{self, Request};
use crate::common::postfix::{Builder, fragment};
use crate::common::site::SiteBuilder;
use crate::common::smtp::{Client, Reply, Sent};
use crate::common::{Postfix, Site, VirtualUsers};

pub const CLIENT_ADDRESS: &str = "192.0.2.10";
pub const CLIENT_NAME: &str = "mx.sender.example";
pub const STRANGER: &str = "stranger@sender.example";
pub const MESSAGE: &[u8] = b"From: stranger@sender.example\nSubject: test\n\nHello.\n";

/// Which interfaces Postfix uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interfaces {
    Both,
    Milter,
    Policy,
}

/// What to start; see [`Setting::of`].
#[derive(Debug)]
pub struct Setting {
    pub site: SiteBuilder,
    pub interfaces: Interfaces,
    mailboxes: Vec<String>,
    postfix: Builder,
}

impl Setting {
    /// Users of these names. Each uid is used once: the kernel counts processes by uid, and what another test does to the
    /// limit (RLIMIT_NPROC) is not to be seen here.
    pub fn of(names: &[&str]) -> Self {
        let users: Vec<(&str, u32)> = names.iter().map(|&name| (name, unused_uid())).collect();
        Self {
            site: Site::of(&users),
            interfaces: Interfaces::Both,
            mailboxes: names.iter().map(|&name| name.to_owned()).collect(),
            postfix: Postfix::builder(),
        }
    }

    pub fn interfaces(mut self, interfaces: Interfaces) -> Self {
        self.interfaces = interfaces;
        self
    }

    /// Both services on Unix sockets that Postfix may use and others may not.
    pub fn unix_sockets(mut self) -> Self {
        let run = self.site.sandbox.directory("run");
        let [milter, policy] = ["milter", "policy"].map(|name| format!("unix:{}", run.join(name).display()));
        self.site = self.site.milter_at(&milter).policy_at(&policy);
        self.lines("server", "socket-mode = \"0660\"\nsocket-group = \"postfix\"")
    }

    /// Lines of `[recipients]`.
    pub fn recipients(self, lines: &str) -> Self {
        self.lines("recipients", lines)
    }

    /// Lines of `[filter]`.
    pub fn filter(self, lines: &str) -> Self {
        self.lines("filter", lines)
    }

    /// Lines of `[verdict]`.
    pub fn verdict(self, lines: &str) -> Self {
        self.lines("verdict", lines)
    }

    /// Lines of `[log]`.
    pub fn log(self, lines: &str) -> Self {
        self.lines("log", lines)
    }

    fn lines(mut self, section: &str, lines: &str) -> Self {
        for line in lines.lines() {
            let (key, value) = line.split_once(" = ").unwrap_or_else(|| panic!("no key in {line}"));
            self.site = self.site.set(section, key, value);
        }
        self
    }

    /// Mailboxes that Postfix has beside those of the users.
    pub fn mailboxes(mut self, names: &[&str]) -> Self {
        self.mailboxes.extend(names.iter().map(|&name| name.to_owned()));
        self
    }

    pub fn postfix(mut self, change: impl FnOnce(Builder) -> Builder) -> Self {
        self.postfix = change(self.postfix);
        self
    }

    /// Starts usermilter and Postfix.
    #[track_caller]
    pub fn start(self) -> Scene {
        let Self { site, interfaces, mailboxes, postfix } = self;
        let site = site.start();
        let mailboxes: Vec<&str> = mailboxes.iter().map(String::as_str).collect();
        let mut postfix = postfix.mailboxes(&mailboxes);
        if interfaces != Interfaces::Policy {
            let lines = fragment("main.cf.milter", "inet:127.0.0.1:8890", site.milter_address());
            postfix = postfix.main_cf(&lines);
        }
        if interfaces != Interfaces::Milter {
            let lines = fragment("main.cf.policy", "inet:127.0.0.1:8891", site.policy_address());
            postfix = postfix.main_cf(&lines);
        }
        Scene { postfix: postfix.start(), site }
    }

    /// Starts usermilter alone.
    #[track_caller]
    pub fn start_alone(self) -> Alone {
        Alone { site: self.site.start() }
    }
}

/// A uid that no other test has.
pub fn unused_uid() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    20_000 + (std::process::id().wrapping_mul(251) + NEXT.fetch_add(1, Ordering::Relaxed)) % 40_000
}

/// usermilter without an MTA.
#[derive(Debug)]
pub struct Alone {
    pub site: Site,
}

impl Alone {
    /// The policy service's action for a stranger's mail to a local part of test.example.
    #[track_caller]
    pub fn ask(&self, sender: &str, name: &str) -> String {
        let request = Request::rcpt(sender, &format!("{name}@test.example"));
        policy::Client::connect(self.site.policy_address()).ask(&request)
    }

    /// A milter connection of the client that [`Request::rcpt`] tells of, in a transaction.
    #[track_caller]
    pub fn milter(&self, sender: &str) -> milter::Client {
        let mut client = milter::Client::connect(self.site.milter_address());
        begin(&mut client, &[&format!("<{sender}>")]);
        client
    }
}

/// CONNECT to MAIL.
#[track_caller]
pub fn begin(client: &mut milter::Client, mail: &[&str]) {
    client.macros('C', &[("j", "mx.test.example")]);
    client.connected(CLIENT_NAME, CLIENT_ADDRESS, 25);
    client.helo(CLIENT_NAME);
    client.macros('M', &[("{client_addr}", CLIENT_ADDRESS), ("{client_name}", CLIENT_NAME)]);
    client.mail(mail);
}

/// DATA to end of message, for one that is asked for.
#[track_caller]
pub fn send_message(client: &mut milter::Client) -> milter::Answer {
    let answer = client.data();
    if answer.letter() != 'c' {
        return answer;
    }
    client.header("Subject", " test");
    client.end_of_headers();
    client.body(b"Hello.\r\n");
    client.end_of_message()
}

/// All servers.
#[derive(Debug)]
pub struct Scene {
    // Dropped in this order: Postfix first.
    pub postfix: Postfix,
    pub site: Site,
}

impl Scene {
    /// A session of mx.sender.example[192.0.2.10].
    #[track_caller]
    pub fn client(&self) -> Client {
        Client::connect_as(self.postfix.port(), CLIENT_ADDRESS, CLIENT_NAME)
    }

    /// The reply to RCPT TO, for a local part of test.example.
    #[track_caller]
    pub fn rcpt(&self, sender: &str, name: &str) -> Reply {
        let mut client = self.client();
        client.mail_from(sender, "");
        let reply = client.rcpt_to(&format!("{name}@test.example"));
        client.quit();
        reply
    }

    /// A transaction with these local parts of test.example.
    #[track_caller]
    pub fn send(&self, sender: &str, names: &[&str], message: &[u8]) -> Sent {
        let mut client = self.client();
        let addresses: Vec<String> = names.iter().map(|name| format!("{name}@test.example")).collect();
        let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
        let sent = client.send(sender, &addresses, message);
        client.quit();
        sent
    }

    /// How many messages a mailbox has, once everything is delivered.
    #[track_caller]
    pub fn delivered(&self, name: &str) -> usize {
        self.postfix.wait_queue_empty();
        self.postfix.maildir(name).len()
    }
}

/// A filter that leaves a line in `~/.usermilter/NAME.runs` each time and exits so.
pub fn counting(name: &str, status: u8, says: &str) -> String {
    format!(
        "#!/bin/sh\necho \"$SENDER $RECIPIENT\" >> .usermilter/{name}.runs\nprintf '%s\\n' '{says}'\nexit {status}\n"
    )
}

/// How often such a filter has run.
pub fn runs(users: &VirtualUsers, user: &str, name: &str) -> usize {
    let path = users.account(user).path(&format!("{name}.runs"));
    fs::read_to_string(path).unwrap_or_default().lines().count()
}

/// A filter that exits so, whatever the message.
pub fn says(status: u8, text: &str) -> String {
    format!("#!/bin/sh\nprintf '%s\\n' '{text}'\nexit {status}\n")
}
