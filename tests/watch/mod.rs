//! What those who watch the daemon see: pages over TCP, and what `usermilter status` prints.

#![allow(dead_code, reason = "every test binary uses another part")]
#![allow(unreachable_pub, reason = "`pub` marks what is offered to tests")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use crate::common::site::{Site, SiteBuilder};
use crate::common::smtp::{Client, Sent};
use crate::common::{PATIENCE, Postfix, Usermilter, free_port, wait_until};

pub const SENDER: &str = "stranger@sender.example";

/// A message filter that does what the subject says.
pub const OBEDIENT: &str = "#!/bin/sh
case $(grep -m1 '^Subject:') in
*refuse*) echo not this one; exit 77 ;;
*later*) exit 75 ;;
*fail*) exit 3 ;;
*kill*) kill -KILL $$ ;;
*wait*) while ! test -e \"$HOME/go\"; do sleep 0.1; done ;;
esac
";

/// A daemon that can be watched, behind a Postfix with both services: alice's filter is obedient, bob refuses everybody at
/// RCPT TO, carol has nothing.
#[derive(Debug)]
pub struct Watched {
    // Dropped in this order.
    pub postfix: Postfix,
    pub site: Site,
    pub port: u16,
    pub control: PathBuf,
}

impl Watched {
    #[track_caller]
    pub fn start(change: impl FnOnce(SiteBuilder) -> SiteBuilder) -> Self {
        let port = free_port();
        let site = Site::of(&[("alice", 5001), ("bob", 5002), ("carol", 5003)]).set(
            "server",
            "metrics",
            &format!("\"inet:127.0.0.1:{port}\""),
        );
        site.users.file("bob", "rules.toml", "default = \"reject\"\n");
        let control = site.sandbox.join("control.sock");
        let site = site.filter("alice", "message", OBEDIENT);
        let site = change(site.set("server", "control", &format!("\"unix:{}\"", control.display()))).start();
        let postfix = Postfix::builder().milter(site.milter_address()).policy(site.policy_address()).start();
        Self { postfix, site, port, control }
    }

    /// An SMTP session of a foreign client.
    #[track_caller]
    pub fn client(&self) -> Client {
        Client::connect_as(self.postfix.port(), "192.0.2.10", "mx.sender.example")
    }

    /// Sends mails with this subject, in one session.
    #[track_caller]
    pub fn send(&self, recipient: &str, subject: &str, count: usize) -> Vec<Sent> {
        let mut client = self.client();
        let message = format!("From: {SENDER}\nSubject: {subject}\n\nHello.\n");
        let recipient = format!("{recipient}@test.example");
        let sent = (0..count).map(|_| client.send(SENDER, &[&recipient], message.as_bytes())).collect();
        client.quit();
        sent
    }

    #[track_caller]
    pub fn metrics(&self) -> Metrics {
        Metrics::of(&get(self.port, "/metrics").unwrap())
    }

    /// The metrics, as soon as they are as wanted; fails with them when time is up.
    #[track_caller]
    pub fn metrics_when(&self, what: &str, wanted: impl Fn(&Metrics) -> bool) -> Metrics {
        let mut last = None;
        let found = wait_until(PATIENCE, || {
            last = get(self.port, "/metrics")
                .ok()
                .filter(|page| page.status == 200)
                .map(|page| Metrics::of(&page));
            last.as_ref().is_some_and(&wanted)
        });
        let last = last.expect("a page");
        assert!(found, "{what}: {last:#?}");
        last
    }

    /// Lets alice's filter go on that waits.
    pub fn go(&self) {
        std::fs::write(self.site.users.account("alice").home.join("go"), "").unwrap();
    }

    /// `usermilter status` on this daemon.
    pub fn status(&self, arguments: &[&str]) -> Output {
        status(&self.control, arguments).output().unwrap()
    }

    /// The document.
    #[track_caller]
    pub fn document(&self) -> serde_json::Value {
        let output = self.status(&["--json"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

/// The command, with nothing on standard input.
pub fn status(control: &std::path::Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(Usermilter::program());
    command.arg("status").arg("--socket").arg(control).args(arguments).stdin(Stdio::null());
    command
}

/// A response of HTTP/1.1.
#[derive(Clone, Debug)]
pub struct Page {
    pub status: u16,
    pub header: String,
    pub body: String,
}

impl Page {
    pub fn field(&self, name: &str) -> Option<&str> {
        let fields = self.header.lines().filter_map(|line| line.split_once(": "));
        fields.into_iter().find(|(other, _)| other.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

/// Connects and sends these bytes.
pub fn open(port: u16, bytes: &[u8]) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(bytes)?;
    Ok(stream)
}

pub fn get(port: u16, path: &str) -> io::Result<Page> {
    request(port, "GET", path)
}

pub fn request(port: u16, method: &str, path: &str) -> io::Result<Page> {
    let request = format!("{method} {path} HTTP/1.1\r\nHost: test\r\n\r\n");
    let mut text = String::new();
    open(port, request.as_bytes())?.read_to_string(&mut text)?;
    let (header, body) = text.split_once("\r\n\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
    let status = header.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.ok_or(io::ErrorKind::InvalidData)?;
    Ok(Page { status, header: header.to_owned(), body: body.to_owned() })
}

/// Samples by name and labels, as the page has them.
#[derive(Clone, Debug)]
pub struct Metrics(pub BTreeMap<String, f64>);

impl Metrics {
    #[track_caller]
    pub fn of(page: &Page) -> Self {
        assert_eq!(page.status, 200, "{}", page.header);
        let samples = page.body.lines().filter(|line| !line.starts_with('#'));
        let samples = samples.filter_map(|line| line.rsplit_once(' '));
        Self(samples.map(|(name, value)| (name.to_owned(), value.parse().unwrap())).collect())
    }

    /// The value of a sample, without the prefix of all names.
    #[track_caller]
    pub fn value(&self, sample: &str) -> f64 {
        let name = format!("usermilter_{sample}");
        *self.0.get(&name).unwrap_or_else(|| panic!("no {name} in {:#?}", self.0))
    }

    /// What has counted of a family: its samples that are not 0.
    pub fn counted(&self, family: &str) -> BTreeMap<&str, u64> {
        let prefix = format!("usermilter_{family}_total");
        let counted = self.0.iter().filter(|(_, value)| **value != 0.0);
        counted.filter_map(|(name, value)| Some((name.strip_prefix(&prefix)?, *value as u64))).collect()
    }
}
