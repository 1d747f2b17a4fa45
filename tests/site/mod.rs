//! What tests of the processes share: a site of two users, the daemon's processes as /proc shows them, and mail to it
//! without an MTA in between.

#![allow(dead_code, reason = "every test binary uses another part")]
#![allow(unreachable_pub, reason = "`pub` marks what is offered to tests")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a harness that can't go on fails the test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::common::milter::{Answer, Client};
use super::common::{PATIENCE, Sandbox, VirtualUsers, free_port, wait_until};

/// Two virtual users, alice and bob, and addresses for the daemon to listen on.
#[derive(Debug)]
pub struct Site {
    pub users: VirtualUsers,
    pub milter: String,
    pub policy: String,
    pub sandbox: Sandbox,
}

/// Lines that a configuration has beside the usual ones, by section.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extra<'a> {
    pub server: &'a str,
    pub recipients: &'a str,
    pub filter: &'a str,
}

impl Site {
    pub fn new() -> Self {
        super::common::require_root();
        let sandbox = Sandbox::new();
        let users = VirtualUsers::new(&sandbox, &[("alice", 5001), ("bob", 5002)]);
        let [milter, policy] = [free_port(), free_port()].map(|port| format!("inet:127.0.0.1:{port}"));
        Site { users, milter, policy, sandbox }
    }

    /// A configuration on the site's addresses.
    pub fn config(&self, extra: Extra<'_>) -> String {
        self.config_on(&[&self.milter], &[&self.policy], extra)
    }

    /// A configuration on other addresses.
    pub fn config_on(&self, milter: &[&str], policy: &[&str], extra: Extra<'_>) -> String {
        format!(
            r#"
[server]
user = "nobody"
milter = {milter:?}
policy = {policy:?}
control = "off"
{server}

[recipients]
domains = ["test.example"]
trusted-networks = []
{recipients}

[[resolver]]
type = "passwd-file"
path = "{passwd_file}"

[filter]
virtual-uids = [5001, 5999]
virtual-homes = ["{homes}"]
inspect-ttl = "0s"
{filter}
"#,
            server = extra.server,
            recipients = extra.recipients,
            filter = extra.filter,
            passwd_file = self.users.passwd_file().display(),
            homes = self.users.homes().display(),
        )
    }

    /// A filter that writes its pid to `~/pid`, sleeps, and exits with this status.
    pub fn slow_filter(&self, user: &str, seconds: f64, status: u8) {
        let script = format!("#!/bin/sh\necho $$ > \"$HOME/pid\"\nsleep {seconds}\nexit {status}\n");
        self.users.filter(user, "message", script);
    }

    /// The pid of the filter that is running for the user, waiting for it.
    #[track_caller]
    pub fn filter_pid(&self, user: &str) -> u32 {
        let path = self.users.account(user).home.join("pid");
        let read = || fs::read_to_string(&path).ok()?.trim().parse().ok();
        assert!(wait_until(PATIENCE, || read().is_some()), "the filter of {user} did not start");
        let pid = read().unwrap();
        fs::remove_file(path).unwrap();
        pid
    }

    /// A milter session in which a client has said HELO.
    #[track_caller]
    pub fn session(&self) -> Client {
        session(&self.milter)
    }

    /// The answer to one message for one recipient, in a session of its own.
    #[track_caller]
    pub fn judge(&self, recipient: &str) -> Answer {
        let mut client = self.session();
        let answer = message(&mut client, &[recipient]);
        client.quit();
        answer
    }

    /// [`Site::judge`] on another thread, for what takes its time.
    pub fn judge_meanwhile(&self, recipient: &str) -> std::thread::JoinHandle<std::io::Result<Answer>> {
        let (address, recipient) = (self.milter.clone(), recipient.to_owned());
        std::thread::spawn(move || {
            let mut client = session(&address);
            start_message(&mut client, &[&recipient]);
            client.send(&super::common::milter::Frame::new(b'E', []))?;
            client.read_answer()
        })
    }
}

/// A milter session in which a client has said HELO.
#[track_caller]
pub fn session(address: &str) -> Client {
    let mut client = Client::connect(address);
    client.connected("mx.sender.example", "192.0.2.10", 4711);
    client.helo("mx.sender.example");
    client
}

/// A whole message in a session; the answer that decided.
#[track_caller]
pub fn message(client: &mut Client, recipients: &[&str]) -> Answer {
    match start_message(client, recipients) {
        Some(early) => early,
        None => client.end_of_message(),
    }
}

/// All but the end of a message; the answer if there is one already.
#[track_caller]
pub fn start_message(client: &mut Client, recipients: &[&str]) -> Option<Answer> {
    client.mail(&["<s@sender.example>"]);
    for recipient in recipients {
        let answer = client.rcpt(&[&format!("<{recipient}>")]);
        if answer.letter() != 'c' {
            return Some(answer);
        }
    }
    let answer = client.data();
    if answer.letter() != 'c' {
        return Some(answer);
    }
    client.header("Subject", " test");
    client.end_of_headers();
    client.body(b"text\r\n");
    None
}

/// Whether mail was let in.
pub fn is_accepted(answer: &Answer) -> bool {
    matches!(answer.letter(), 'a' | 'c')
}

/// Whether a process runs: it exists and is no zombie.
pub fn runs(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z')))
}

/// Waits until a process no longer runs.
#[track_caller]
pub fn wait_gone(what: &str, pid: u32, timeout: Duration) {
    assert!(wait_until(timeout, || !runs(pid)), "{what} ({pid}) still runs after {timeout:?}");
}

/// A field of /proc/PID/status.
#[track_caller]
pub fn status_field(pid: u32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {status}")).trim().to_owned()
}

/// What the descriptors of a process are: number and link.
#[track_caller]
pub fn descriptors(pid: u32) -> Vec<(u32, PathBuf)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let mut descriptors: Vec<_> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            Some((entry.file_name().to_str()?.parse().ok()?, fs::read_link(entry.path()).ok()?))
        })
        .collect();
    descriptors.sort();
    descriptors
}

/// Processor time that a process has used.
#[track_caller]
pub fn processor_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    // USER_HZ is 100 on every architecture that Debian has.
    Duration::from_millis(ticks * 10)
}

/// SIGKILL or another signal to a process of the daemon under test.
#[track_caller]
pub fn signal(pid: u32, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), signal).unwrap();
}

/// Whether something listens on a TCP address written as in a configuration.
pub fn is_listening(address: &str) -> bool {
    std::net::TcpStream::connect(address.trim_start_matches("inet:")).is_ok()
}

/// Whether the path exists.
pub fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}
