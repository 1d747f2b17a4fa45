//! What is logged, and where: text and JSON on standard error, the journal under systemd; a log that nobody reads does
//! no harm.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;

use common::policy::{Client, Request};
use common::process::Server;
use common::{PATIENCE, Sandbox, Site, Usermilter, free_port, require_root, wait_until};

const ALICE: &str = "alice@test.example";
const MESSAGE: &[u8] = b"Subject: x\r\n\r\nx\r\n";

#[test]
fn a_transaction_is_one_line_with_its_queue_id_first() {
    let site = Site::of(&[("alice", 5301)])
        .filter("alice", "message", "#!/bin/sh\necho 'no, \"thanks\"'\necho grumble >&2\nexit 77\n")
        .start();
    let (_, line) = site.judge_logged(&[ALICE], MESSAGE);
    let (stamp, rest) = line.split_once("INFO ").unwrap();
    assert!(stamp.contains('T') && rest.starts_with("4QUEUEID: reject "), "{line}");
    for field in [
        r#"interface="milter""#,
        r#"from="<s@sender.example>""#,
        r#"to="<alice@test.example>""#,
        r#"client="mx.sender.example[192.0.2.10]""#,
        r#"helo="mx.sender.example""#,
        r#"verdicts="alice=reject (message: exit 77, "#,
        r#"outcome="reject""#,
        r#"reply="550 5.7.1 no, \"thanks\"""#,
    ] {
        assert!(line.contains(field), "no {field} in {line}");
    }
    let lines = site.daemon.log_lines();
    assert_eq!(lines.iter().filter(|line| line.contains("outcome=")).count(), 1, "{lines:#?}");
    assert!(lines.iter().any(|line| line.contains("alice message: grumble")), "{lines:#?}");
}

#[test]
fn json_lines_are_json_and_have_the_same_fields() {
    let site = Site::of(&[("alice", 5302)])
        .set("log", "format", "\"json\"")
        .filter("alice", "message", "#!/bin/sh\necho no\nexit 77\n")
        .start();
    assert_eq!(site.judge(&[ALICE], MESSAGE).text(), "550 5.7.1 no");
    let line = site.daemon.wait_for_log("\"outcome\"", PATIENCE);
    let value: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(value["outcome"], "reject");
    assert_eq!(value["to"], "<alice@test.example>");
    assert_eq!(value["reply"], "550 5.7.1 no");
    assert_eq!(value["level"], "INFO");
    for line in site.daemon.log_lines() {
        assert!(serde_json::from_str::<serde_json::Value>(&line).is_ok(), "{line}");
    }
}

/// A configuration without users, with a policy service that refuses whom nobody has.
fn configuration(policy: u16) -> String {
    format!(
        "[server]\nuser = \"nobody\"\nmilter = []\npolicy = [\"inet:127.0.0.1:{policy}\"]\n\
         [recipients]\ndomains = [\"test.example\"]\ntrusted-networks = []\nunknown = \"reject\"\n"
    )
}

fn refused(policy: u16) -> String {
    Client::connect(&format!("inet:127.0.0.1:{policy}"))
        .ask(&Request::rcpt("s@sender.example", "umt-nobody@test.example"))
}

/// A daemon that takes this directory for the journal's, with its socket, and the file for the journal's stream.
fn under_systemd(sandbox: &Sandbox, directory: &Path, config: &Path) -> Server {
    fs::create_dir_all("/run/systemd/journal").unwrap();
    // systemd.exec(5): JOURNAL_STREAM names the file that standard error is.
    let stderr = File::create(sandbox.join("stderr")).unwrap();
    let stream = format!("{}:{}", stderr.metadata().unwrap().dev(), stderr.metadata().unwrap().ino());
    let mut command = Command::new("unshare");
    // Seen only in a mount namespace of the daemon's own.
    command.args(["-m", "/bin/sh", "-c", "mount --bind \"$0\" /run/systemd/journal && exec \"$@\""]);
    command.arg(directory).arg(Usermilter::program()).arg("serve").arg("--config").arg(config);
    command.env("JOURNAL_STREAM", stream).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
    Server::start(&mut command)
}

/// The journal's socket in that directory.
fn journal(directory: &Path) -> UnixDatagram {
    let journal = UnixDatagram::bind(directory.join("socket")).unwrap();
    fs::set_permissions(directory.join("socket"), fs::Permissions::from_mode(0o666)).unwrap();
    journal.set_read_timeout(Some(PATIENCE)).unwrap();
    journal
}

#[test]
fn under_systemd_lines_go_to_the_journal() {
    require_root();
    let (sandbox, port) = (Sandbox::new(), free_port());
    let config = sandbox.write("usermilter.toml", configuration(port));
    let directory = sandbox.directory("journal");
    let journal = journal(&directory);
    let mut server = under_systemd(&sandbox, &directory, &config);
    let received = |text: &str| {
        let until = Instant::now() + PATIENCE;
        let mut buffer = vec![0; 65536];
        while Instant::now() < until {
            let length = journal.recv(&mut buffer).expect("a line for the journal");
            let entry = String::from_utf8_lossy(&buffer[..length]).into_owned();
            if entry.contains(text) {
                return entry;
            }
        }
        panic!("no {text} in the journal");
    };
    assert!(received("ready").contains("PRIORITY"));
    assert!(refused(port).starts_with("550 5.1.1"));
    let entry = received("reject at RCPT TO");
    assert!(entry.contains("umt-nobody@test.example") && entry.contains("unknown user"), "{entry}");
    assert_eq!(fs::read_to_string(sandbox.join("stderr")).unwrap(), "");
    assert!(server.terminate(Duration::from_secs(20)).is_some_and(|status| status.success()));
}

/// More lines than there is room for, from worker and monitor: none of them is waited for.
fn serves_without_a_reader(server: &mut Server, port: u16) {
    let listens = || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
    assert!(wait_until(PATIENCE, listens), "ended with {:?}", server.status());
    let mut client = Client::connect(&format!("inet:127.0.0.1:{port}"));
    // A line each, of some 300 bytes.
    for _ in 0..3000 {
        let request = Request::rcpt("s@sender.example", "umt-nobody@test.example");
        assert!(client.ask(&request).starts_with("550 5.1.1"));
    }
    let pid = server.pid();
    let children = || {
        let listed = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        listed.unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    drop(client);
    let before = children();
    // The monitor has its say, and starts another worker.
    server.signal(Signal::SIGHUP);
    assert!(wait_until(PATIENCE, || children().iter().any(|pid| !before.contains(pid))));
    assert!(wait_until(PATIENCE, || children().iter().all(|pid| !before.contains(pid))));
    assert!(refused(port).starts_with("550 5.1.1"));
}

#[test]
fn a_socket_that_nobody_reads_the_log_from_holds_nobody_up() {
    require_root();
    let (sandbox, port) = (Sandbox::new(), free_port());
    let config = sandbox.write("usermilter.toml", configuration(port));
    let (theirs, mut ours) = UnixStream::pair().unwrap();
    let mut command = Command::new(Usermilter::program());
    command.arg("serve").arg("--config").arg(config).env_remove("JOURNAL_STREAM");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(OwnedFd::from(theirs.try_clone().unwrap()));
    let mut server = Server::start(&mut command);
    serves_without_a_reader(&mut server, port);
    // Others who write to it go on to wait.
    let flags = OFlag::from_bits_truncate(fcntl(&theirs, FcntlArg::F_GETFL).unwrap());
    assert!(!flags.contains(OFlag::O_NONBLOCK));
    drop((theirs, command));
    // As soon as somebody reads, it is told what was lost.
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let (mut seen, mut buffer) = (String::new(), vec![0; 65536]);
    while !seen.contains("log lines lost") {
        let length = ours.read(&mut buffer).unwrap();
        assert_ne!(length, 0, "{seen}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
    assert!(server.terminate(Duration::from_secs(20)).is_some_and(|status| status.success()));
}

#[test]
fn a_journal_that_hangs_holds_nobody_up() {
    require_root();
    let (sandbox, port) = (Sandbox::new(), free_port());
    let config = sandbox.write("usermilter.toml", configuration(port));
    let directory = sandbox.directory("journal");
    let _journal = journal(&directory);
    let mut server = under_systemd(&sandbox, &directory, &config);
    serves_without_a_reader(&mut server, port);
    assert!(server.terminate(Duration::from_secs(20)).is_some_and(|status| status.success()));
}

#[test]
fn a_log_whose_reader_is_gone_ends_nothing() {
    require_root();
    let (sandbox, port) = (Sandbox::new(), free_port());
    let config = sandbox.write("usermilter.toml", configuration(port));
    let mut command = Command::new(Usermilter::program());
    command.arg("serve").arg("--config").arg(config).env_remove("JOURNAL_STREAM");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut server = Server::start(&mut command);
    drop(server.stderr());
    let listens = || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
    assert!(wait_until(PATIENCE, listens), "ended with {:?}", server.status());
    for _ in 0..20 {
        assert!(refused(port).starts_with("550 5.1.1"));
    }
    assert_eq!(server.status(), None);
    assert!(server.terminate(Duration::from_secs(20)).is_some_and(|status| status.success()));
}
