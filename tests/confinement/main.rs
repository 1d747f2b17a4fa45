//! What a confined worker can't do, shown by one that tries: the monitor's fork, the drop of privileges and the
//! confinement are those of the program, and then probes run instead of the service. The same probes without the
//! walls show that it is these that hold.
//!
//! This program is its own monitor, which must have one thread, so that the usual test harness can't host it. Its first
//! worker probes, those that follow serve.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

#[path = "../common/mod.rs"]
mod common;
mod probe;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use common::own_monitor::{self, MONITOR, Test};
use common::process::Server;
use common::{PATIENCE, Sandbox, free_port, wait_until};

const TESTS: &[Test] = &[
    ("a_confined_worker_gets_at_nothing_that_it_does_not_need", nothing_else),
    ("without_the_walls_the_same_probes_succeed", without_walls),
    ("what_no_worker_does_is_its_end", hostile_calls),
];

fn main() -> ExitCode {
    own_monitor::run(TESTS, probe::start)
}

/// Where a worker probes.
struct Scene {
    sandbox: Sandbox,
    config: PathBuf,
    directory_port: u16,
    /// Each accepts connections, in the kernel, as long as it lives.
    _listeners: (TcpListener, TcpListener, UnixListener),
    other_port: u16,
}

impl Scene {
    fn new() -> Self {
        common::require_root();
        let sandbox = Sandbox::new();
        let listener = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (directory, other) = (listener(), listener());
        let (directory_port, other_port) =
            (directory.local_addr().unwrap().port(), other.local_addr().unwrap().port());
        let name = SocketAddr::from_abstract_name(sandbox.path().as_os_str().as_encoded_bytes()).unwrap();
        let abstract_socket = UnixListener::bind_addr(&name).unwrap();
        // Everybody may read and write all this; what keeps the worker out is nothing but its walls.
        for name in ["spool", "elsewhere", "home", "etc"] {
            let mode = if matches!(name, "spool" | "elsewhere") { 0o1777 } else { 0o755 };
            fs::set_permissions(sandbox.directory(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        sandbox.write("home/secret", "of a user\n");
        sandbox.write("etc/users", "");
        sandbox.write("etc/beside", "not configured\n");
        let config = sandbox.write(
            "usermilter.toml",
            format!(
                "[server]\nuser = \"nobody\"\nmilter = [\"inet:127.0.0.1:{port}\"]\npolicy = []\n\
                 drain-timeout = \"1s\"\n[filter]\nspool-directory = \"{spool}\"\n\
                 [[resolver]]\ntype = \"passwd-file\"\npath = \"{users}\"\n\
                 [[resolver]]\ntype = \"ldap\"\nuri = [\"ldap://127.0.0.1:{directory_port}\"]\n\
                 base = \"dc=example\"\nfilter = \"(mail=%s)\"\n",
                port = free_port(),
                spool = sandbox.join("spool").display(),
                users = sandbox.join("etc/users").display(),
            ),
        );
        let listeners = (directory, other, abstract_socket);
        Scene { sandbox, config, directory_port, other_port, _listeners: listeners }
    }

    /// Starts the monitor and waits until its log has the text.
    #[track_caller]
    fn run(&self, what: &str, until: &str) -> String {
        let log = self.sandbox.join("log");
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg(MONITOR).arg(&self.config).arg(self.sandbox.path()).arg(what);
        command.arg(self.directory_port.to_string()).arg(self.other_port.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log).unwrap());
        let mut server = Server::start(&mut command);
        let text = || fs::read_to_string(&log).unwrap();
        assert!(wait_until(PATIENCE, || text().contains(until)), "{what}: {}", text());
        let status = server.terminate(PATIENCE);
        assert_eq!(status.and_then(|status| status.code()), Some(0), "{what}: {}", text());
        text()
    }

    /// What came of each probe, by its name.
    fn outcomes(&self, what: &str) -> BTreeMap<String, String> {
        let log = self.run(what, "probe done => ok");
        let lines = log.lines().filter_map(|line| line.strip_prefix("probe ")?.split_once(" => "));
        lines.map(|(name, outcome)| (name.to_owned(), outcome.to_owned())).collect()
    }
}

/// Probes that must succeed, or the worker could not work.
const NEEDED: &[&str] = &[
    "file without a name in the spool",
    "memory for a message",
    "memory for a message, opened anew",
    "thread",
    "look at a file of the configuration",
    "ask for the configuration's file",
    "connect to the directory",
    "done",
];

fn nothing_else() {
    let outcomes = Scene::new().outcomes("confined");
    for (name, outcome) in &outcomes {
        assert_eq!(NEEDED.contains(&name.as_str()), outcome == "ok", "{name}: {outcome}\n{outcomes:#?}");
    }
    assert!(NEEDED.iter().all(|name| outcomes.contains_key(*name)), "{outcomes:#?}");
    assert!(outcomes.len() > NEEDED.len() + 15, "{outcomes:#?}");
    // One each of what only Landlock, and only seccomp, holds.
    assert_eq!(outcomes["read what lies beside a file of the configuration"], "EACCES", "{outcomes:#?}");
    assert_eq!(outcomes["process"], "ENOSYS", "{outcomes:#?}");
}

fn without_walls() {
    let outcomes = Scene::new().outcomes("unconfined");
    // What other things than the walls forbid to nobody: an unprivileged user, or a rule of every kernel.
    let others = ["read /etc/shadow", "root"];
    for (name, outcome) in &outcomes {
        assert_eq!(!others.contains(&name.as_str()), outcome == "ok", "{name}: {outcome}\n{outcomes:#?}");
    }
}

fn hostile_calls() {
    for call in ["execute", "trace", "mount", "unshare", "change root"] {
        let log = Scene::new().run(call, "worker died");
        assert!(log.contains("killed by SIGSYS"), "{call}: no SIGSYS\n{log}");
        assert!(!log.contains("survived"), "{call}: {log}");
    }
}
