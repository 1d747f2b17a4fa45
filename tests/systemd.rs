//! Under a service manager, which the tests play: what it is told and when (sd_notify(3)), its watchdog, its sockets
//! (sd_listen_fds(3)); the unit and its companions, as systemd's own tools read them; and without any manager.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;

use std::fs;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::site::SiteBuilder;
use common::{PATIENCE, Postfix, Sandbox, Site, Usermilter, smtp, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const REFUSES: &str = "#!/bin/sh\necho refused by $USER\nexit 77\n";
const MESSAGE: &[u8] = b"Subject: x\r\n\r\nhello\r\n";

/// The manager's end of $NOTIFY_SOCKET.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    fn new(sandbox: &Sandbox) -> Self {
        let path = sandbox.join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket, path }
    }

    /// Starts usermilter as a service of this manager.
    fn start(&self, config: &str, watchdog: Option<Duration>) -> Usermilter {
        Usermilter::start_by(config, |command| {
            command.env("NOTIFY_SOCKET", &self.path);
            if let Some(watchdog) = watchdog {
                command.env("WATCHDOG_USEC", watchdog.as_micros().to_string());
            }
        })
    }

    /// The next message, signs of life apart.
    #[track_caller]
    fn next(&self) -> String {
        loop {
            let message = self.receive().expect("a message to the service manager");
            if message != "WATCHDOG=1\n" {
                return message;
            }
        }
    }

    fn receive(&self) -> Option<String> {
        let mut buffer = [0; 4096];
        let length = self.socket.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    /// When the next sign of life comes.
    #[track_caller]
    fn sign_of_life(&self) -> Instant {
        while self.receive().expect("a sign of life") != "WATCHDOG=1\n" {}
        Instant::now()
    }

    /// Forgets what has been said.
    fn clear(&self) {
        self.socket.set_nonblocking(true).unwrap();
        while self.receive().is_some() {}
        self.socket.set_nonblocking(false).unwrap();
    }
}

/// Alice, whose filter refuses everything, and a configuration with addresses that are known before it runs.
struct Home {
    builder: SiteBuilder,
    milter: String,
    policy: String,
}

impl Home {
    fn new() -> Self {
        let address = || format!("inet:127.0.0.1:{}", common::free_port());
        let (milter, policy) = (address(), address());
        let builder = Site::of(&[("alice", 5001)]).filter("alice", "message", REFUSES);
        Self { builder: builder.milter_at(&milter).policy_at(&policy), milter, policy }
    }

    fn config(&self) -> String {
        self.builder.config()
    }
}

/// The first answer to a mail for alice.
fn judge(builder_address: &str) -> String {
    let mut mta = common::milter::Client::connect(builder_address);
    mta.macros('C', &[("j", "mx.test.example")]);
    mta.helo("mx.sender.example");
    let answer = common::site::send(&mut mta, "<s@sender.example>", &["alice@test.example"], MESSAGE);
    mta.quit();
    answer.text()
}

#[test]
fn the_manager_is_told_of_start_reload_failed_reload_and_end() {
    let sandbox = Sandbox::new();
    let manager = Manager::new(&sandbox);
    let site = Home::new();
    let config = site.config();
    let mut daemon = manager.start(&config, None);
    let ready = manager.next();
    assert_eq!(ready, format!("READY=1\nMAINPID={}\nSTATUS=serving\n", daemon.pid()));

    daemon.reload();
    let reloading = manager.next();
    let time = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").expect(&reloading);
    assert!(time.lines().next().unwrap().parse::<u64>().unwrap() > 0, "{reloading}");
    assert!(manager.next().starts_with("READY=1\n"));
    assert_eq!(judge(&site.milter), "550 5.7.1 refused by alice");

    daemon.write_config("no configuration");
    daemon.reload();
    assert!(manager.next().starts_with("RELOADING=1\n"));
    let ready = manager.next();
    assert!(ready.starts_with("READY=1\n") && ready.contains("could not"), "{ready}");

    // A worker that can't come up is found out only when it has tried: its user is unknown.
    daemon.write_config(&config.replace("\"nobody\"", "\"umt-nobody-has-this-name\""));
    daemon.reload();
    assert!(manager.next().starts_with("RELOADING=1\n"));
    let ready = manager.next();
    assert!(ready.starts_with("READY=1\n") && ready.contains("could not"), "{ready}");
    assert_eq!(judge(&site.milter), "550 5.7.1 refused by alice");

    let worker = Pid::from_raw(daemon.worker_pid().cast_signed());
    kill(worker, Signal::SIGKILL).unwrap();
    assert_eq!(manager.next(), "STATUS=the worker died; starting another\n");
    assert_eq!(manager.next(), "STATUS=serving\n");

    assert_eq!(daemon.terminate().code(), Some(0));
    assert!(manager.next().starts_with("STOPPING=1\n"));
}

#[test]
fn a_hung_worker_gives_no_sign_of_life_and_is_replaced_before_the_watchdog_bites() {
    let sandbox = Sandbox::new();
    let manager = Manager::new(&sandbox);
    let site = Home::new();
    let watchdog = Duration::from_secs(24);
    let daemon = manager.start(&site.config(), Some(watchdog));
    let first = manager.sign_of_life();
    let mut last = manager.sign_of_life();
    assert!(last - first < watchdog, "{:?}", last - first);

    let hung = daemon.worker_pid();
    kill(Pid::from_raw(hung.cast_signed()), Signal::SIGSTOP).unwrap();
    manager.clear();
    manager.socket.set_read_timeout(Some(watchdog)).unwrap();
    loop {
        match manager.receive().expect("the watchdog would have bitten") {
            sign if sign == "WATCHDOG=1\n" => last = Instant::now(),
            status if status == "STATUS=serving\n" => break,
            _ => (),
        }
    }
    let next = manager.sign_of_life();
    assert!(next - last < watchdog, "no sign of life in {:?}", next - last);
    daemon.wait_for_log("worker does not answer; ending it", PATIENCE);
    assert_ne!(daemon.worker_pid(), hung);
    assert_eq!(judge(&site.milter), "550 5.7.1 refused by alice");
}

#[test]
fn a_filter_hears_nothing_of_the_manager() {
    let sandbox = Sandbox::new();
    let manager = Manager::new(&sandbox);
    let site = Home::new();
    site.builder.users.filter("alice", "message", "#!/bin/sh\nenv > \"$HOME/env\"\nexit 0\n");
    let _daemon = manager.start(&site.config(), Some(Duration::from_secs(60)));
    judge(&site.milter);
    let environment = fs::read_to_string(site.builder.users.account("alice").home.join("env")).unwrap();
    for name in ["NOTIFY_SOCKET", "WATCHDOG", "LISTEN_"] {
        assert!(!environment.contains(name), "{environment}");
    }
}

/// Starts usermilter with these sockets as descriptors 3 and 4.
fn start_activated(config: &str, names: &str, first: OwnedFd, second: OwnedFd) -> Usermilter {
    Usermilter::start_by(config, |command| activate(command, names, first, second))
}

fn activate(command: &mut Command, names: &str, first: OwnedFd, second: OwnedFd) {
    let program = command.get_program().to_owned();
    let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
    let mut shell = Command::new("/bin/sh");
    let script = "exec 3<&0 4<&1 </dev/null >/dev/null; LISTEN_PID=$$ exec \"$@\"";
    shell.args(["-c", script, "sh"]).arg(program).args(arguments);
    shell.stdin(Stdio::from(first)).stdout(Stdio::from(second)).stderr(Stdio::piped());
    shell.env("LISTEN_FDS", "2").env("LISTEN_FDNAMES", names);
    for name in ["NOTIFY_SOCKET", "JOURNAL_STREAM", "WATCHDOG_USEC"] {
        shell.env_remove(name);
    }
    *command = shell;
}

#[test]
fn sockets_of_the_manager_serve_postfix_survive_a_reload_and_stay_when_usermilter_ends() {
    let sandbox = Sandbox::new();
    let (milter_path, policy) = (sandbox.join("milter.sock"), TcpListener::bind("127.0.0.1:0").unwrap());
    let milter = UnixListener::bind(&milter_path).unwrap();
    fs::set_permissions(&milter_path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    let policy_address = format!("inet:127.0.0.1:{}", policy.local_addr().unwrap().port());
    let milter_address = format!("unix:{}", milter_path.display());
    // The configuration's own addresses must stay free.
    let site = Home::new();
    site.builder.users.filter(
        "alice",
        "recipient",
        "#!/bin/sh\n[ \"$SENDER\" = evil@sender.example ] && exit 77\nexit 0\n",
    );
    let (first, second) = (milter.try_clone().unwrap().into(), policy.try_clone().unwrap().into());
    let mut daemon = start_activated(&site.config(), "milter:policy", first, second);
    daemon.wait_for_log("server.milter is not used", PATIENCE);
    daemon.wait_for_log("server.policy is not used", PATIENCE);
    for unused in [&site.milter, &site.policy] {
        TcpListener::bind(unused.strip_prefix("inet:").unwrap()).unwrap();
    }

    let postfix = Postfix::builder()
        .mailboxes(&["alice@test.example"])
        .milter(&milter_address)
        .policy(&policy_address)
        .start();
    let refused = || {
        let mut client = smtp::Client::connect_as(postfix.port(), "192.0.2.10", "mx.sender.example");
        client.mail_from("evil@sender.example", "");
        let by_policy = client.rcpt_to("alice@test.example").text();
        client.rset();
        let by_milter = client.send("s@sender.example", &["alice@test.example"], MESSAGE).outcome().text();
        assert!(by_milter.ends_with("refused by alice"), "{by_milter}\n{}", client.transcript());
        assert!(by_policy.contains("5.7.1"), "{by_policy}\n{}", client.transcript());
    };
    refused();
    let (seen, old) = (daemon.log_lines().len(), daemon.worker_pid());
    daemon.reload();
    daemon.wait_for_log_after(seen, "worker has left", PATIENCE);
    assert_ne!(daemon.worker_pid(), old);
    refused();
    assert_eq!(daemon.terminate().code(), Some(0));
    // A connection that nobody accepts, but that is not refused: the socket is still the manager's.
    std::os::unix::net::UnixStream::connect(&milter_path).unwrap();
    drop(milter);
}

#[test]
fn a_socket_of_the_manager_that_is_none_ends_the_start_and_an_unknown_one_is_closed() {
    let sandbox = Sandbox::new();
    let site = Home::new();
    let datagram = UnixDatagram::bind(sandbox.join("datagram")).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connected = || std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let everybodys = UnixListener::bind(sandbox.join("everybodys")).unwrap();
    fs::set_permissions(sandbox.join("everybodys"), fs::Permissions::from_mode(0o666)).unwrap();
    for (name, bad, why) in [
        ("milter", OwnedFd::from(datagram), "not a stream socket"),
        ("milter", connected().into(), "does not listen"),
        ("control", everybodys.into(), "SocketMode=0660"),
        ("control", listener.try_clone().unwrap().into(), "SocketMode=0660"),
    ] {
        let config = sandbox.write("usermilter.toml", site.config());
        let mut command = Command::new(Usermilter::program());
        command.arg("serve").arg("--config").arg(config);
        activate(&mut command, &format!("{name}:policy"), bad, listener.try_clone().unwrap().into());
        let output = command.output().unwrap();
        let log = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(78), "{log}");
        assert!(log.contains(why), "{log}");
    }
    let (first, second) = (listener.try_clone().unwrap().into(), connected().into());
    let daemon = start_activated(&site.config(), "policy:other", first, second);
    daemon.wait_for_log("no such interface", PATIENCE);
    assert_eq!(judge(&site.milter), "550 5.7.1 refused by alice");
    let open = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    // As without a manager: 0 to 2, signalfd, two listeners, the channel, the pipe of the guard; and the control socket, unless
    // another daemon has it.
    assert!((8..=9).contains(&open), "{open}");
}

#[test]
fn it_starts_under_runit_and_from_a_plain_shell() {
    let sandbox = Sandbox::new();
    let site = Home::new();
    let config = sandbox.write("usermilter.toml", site.config());
    let directory = sandbox.directory("service");
    // The very file, but for the program and its configuration; the host's own directories are left alone.
    let run = fs::read_to_string(packaging("runit/run")).unwrap();
    let command = format!("exec {} serve --config {}\n", Usermilter::program().display(), config.display());
    let run: String = run
        .lines()
        .filter(|line| !line.starts_with("install "))
        .map(|line| if line == "exec usermilter serve" { command.clone() } else { format!("{line}\n") })
        .collect();
    assert!(run.contains(&command), "{run}");
    let script = sandbox.write("service/run", run);
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();

    let runit = common::unpacked("runit", &["runit"]);
    let find = |name: &str| {
        let places = ["usr/bin", "bin", "usr/sbin", "sbin"].map(|place| runit.join(place).join(name));
        places
            .into_iter()
            .find(|path| path.exists())
            .unwrap_or_else(|| panic!("no {name} in {}", runit.display()))
    };
    let mut starts = vec![("a shell", Command::new("/bin/sh"))];
    starts[0].1.arg(&script);
    let mut runsv = Command::new(find("runsv"));
    runsv.arg(&directory);
    starts.push(("runsv", runsv));
    for (name, mut command) in starts {
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut server = common::process::Server::start(&mut command);
        let address = site.milter.strip_prefix("inet:").unwrap();
        let up = || std::net::TcpStream::connect(address).is_ok();
        assert!(wait_until(PATIENCE, up), "{name}: nobody listens");
        assert_eq!(judge(&site.milter), "550 5.7.1 refused by alice", "{name}");
        assert!(server.terminate(PATIENCE).is_some(), "{name} did not end");
        assert!(wait_until(PATIENCE, || !up()), "{name}: somebody still listens");
    }
}

fn packaging(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging").join(name)
}

fn shown(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn systemd_understands_the_units() {
    let sandbox = Sandbox::new();
    for unit in fs::read_dir(packaging("systemd")).unwrap() {
        let unit = unit.unwrap();
        let program = Usermilter::program();
        let text = fs::read_to_string(unit.path()).unwrap();
        let text = text.replace("/usr/bin/usermilter", program.to_str().unwrap());
        sandbox.write(unit.file_name().to_str().unwrap(), text);
    }
    let analyze = common::require("systemd-analyze");
    for unit in ["usermilter.service", "usermilter-milter.socket", "usermilter-policy.socket"] {
        let mut verify = Command::new(&analyze);
        let output = verify.args(["verify", "--man=no"]).arg(sandbox.join(unit)).output().unwrap();
        let said = shown(&output);
        // What it says of other units of the host is not ours.
        assert!(output.status.success() && !said.contains("usermilter"), "{unit}: {said}");
    }
    let mut security = Command::new(&analyze);
    security.args(["security", "--offline=true", "--threshold=65"]).arg(sandbox.join("usermilter.service"));
    let output = security.output().unwrap();
    assert!(output.status.success(), "{}", shown(&output));
}

#[test]
fn the_unit_waits_longer_than_the_drain_and_allows_what_the_monitor_keeps() {
    let unit = fs::read_to_string(packaging("systemd/usermilter.service")).unwrap();
    let value = |key: &str| unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let drain = usermilter::config::Config::default().server.drain_timeout.0;
    assert!(
        Duration::from_secs(value("TimeoutStopSec").unwrap().parse().unwrap())
            > drain + Duration::from_secs(6)
    );

    // By running with less and looking.
    let site = Home::new();
    let daemon = Usermilter::start(&site.config());
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let set = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t")).unwrap();
        u64::from_str_radix(line, 16).unwrap()
    };
    let allowed: u64 = unit
        .lines()
        .filter_map(|line| line.strip_prefix("CapabilityBoundingSet="))
        .flat_map(str::split_whitespace)
        .map(|name| 1 << name.parse::<caps::Capability>().unwrap().index())
        .fold(0, |all, one: u64| all | one);
    assert_eq!(set("CapBnd"), allowed & set("CapBnd"), "the monitor keeps what the unit does not allow");
    assert_eq!(set("CapPrm") & !allowed, 0);
    assert_eq!(set("CapPrm"), set("CapEff"));
    assert_eq!(set("CapInh") | set("CapAmb"), 0);
    assert!(set("CapPrm").count_ones() <= 9, "{status}");
}

#[test]
fn systemd_makes_the_user_and_the_spool() {
    let root = Sandbox::new();
    root.directory("etc");
    let option = format!("--root={}", root.path().display());
    let run = |program: &str, arguments: &[&str], file: &str| {
        let mut command = Command::new(common::require(program));
        let output = command.arg(&option).args(arguments).arg(packaging(file)).output().unwrap();
        assert!(output.status.success(), "{}", shown(&output));
    };
    run("systemd-sysusers", &[], "sysusers.d/usermilter.conf");
    let passwd = fs::read_to_string(root.join("etc/passwd")).unwrap();
    let line = passwd.lines().find(|line| line.starts_with("usermilter:")).expect(&passwd);
    let fields: Vec<&str> = line.split(':').collect();
    let uid: u32 = fields[2].parse().unwrap();
    assert!((1..1000).contains(&uid) && fields[6] == "/usr/sbin/nologin", "{line}");
    run("systemd-tmpfiles", &["--create"], "tmpfiles.d/usermilter.conf");
    let spool = fs::metadata(root.join("var/spool/usermilter")).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!((spool.uid(), spool.mode() & 0o7777), (uid, 0o700));
}
