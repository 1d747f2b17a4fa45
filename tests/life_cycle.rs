//! Workers that die, are replaced and leave; the daemon's start and end. Section 2 of the contract: no message gets a
//! wrong answer because of any of it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;
mod site;

use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::milter::Client;
use common::policy;
use common::{PATIENCE, Sandbox, SystemUser, Usermilter, wait_until};
use nix::sys::signal::Signal;
use site::{Extra, Site, is_accepted, is_listening, message, runs, signal, wait_gone};

const UNKNOWN_REJECTED: Extra<'_> = Extra { recipients: "unknown = \"reject\"", server: "", filter: "" };

/// The policy service's answer about an address of ours that nobody has: it shows which configuration is in force.
fn ask_about_nobody(address: &str) -> String {
    let request = policy::Request::rcpt("s@sender.example", "nobody@test.example");
    policy::Client::connect(address).ask(&request)
}

#[test]
fn a_killed_worker_is_followed_within_a_second_and_no_connection_is_refused() {
    let site = Site::new();
    site.slow_filter("alice", 60.0, 0);
    let daemon = Usermilter::start(&site.config(Extra::default()));
    let worker = daemon.worker_pid();
    let lost = site.judge_meanwhile("alice@test.example");
    let filter = site.filter_pid("alice");

    let killed = Instant::now();
    signal(worker, Signal::SIGKILL);
    // From now on, without a pause: each connection is taken, and the last one is served.
    let mut connections = Vec::new();
    while daemon.worker_pids().iter().all(|pid| *pid == worker) {
        connections.push(Client::connect_only(&site.milter));
        assert!(killed.elapsed() < PATIENCE, "no new worker");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(ask_about_nobody(&site.policy), "DUNNO");
    let gap = killed.elapsed();
    assert!(gap < Duration::from_secs(1), "served again after {gap:?}");
    for mut client in connections {
        client.negotiate(6, common::milter::ALL_ACTIONS, common::milter::protocol::ALL);
    }
    assert!(lost.join().unwrap().is_err(), "the MTA of a lost transaction sees the end, and answers 4xx");
    wait_gone("the filter of the old worker", filter, Duration::from_secs(4));
    assert_ne!(daemon.worker_pid(), worker);
    assert!(is_accepted(&site.judge("bob@test.example")));
}

#[test]
fn a_crash_loop_is_slowed_down() {
    let site = Site::new();
    let daemon = Usermilter::start(&site.config(Extra::default()));
    let mut seen = Vec::new();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        for pid in daemon.worker_pids() {
            if !seen.contains(&pid) {
                seen.push(pid);
                signal(pid, Signal::SIGKILL);
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    // Pauses of 0.1, 0.2, 0.4, 0.8, 1.6 and 3.2 s.
    assert!((4..=6).contains(&seen.len()), "{} workers in 5 s", seen.len());
    let used = site::processor_time(daemon.pid());
    assert!(used < Duration::from_millis(500), "the monitor used {used:?}");
    // It comes back all the same.
    assert_eq!(ask_about_nobody(&site.policy), "DUNNO");
}

#[test]
fn worker_and_filters_end_with_a_killed_monitor() {
    let site = Site::new();
    // One child that the filter waits for and one that it does not.
    let script = "#!/bin/sh\nsleep 60 &\necho $! > \"$HOME/child\"\necho $$ > \"$HOME/pid\"\nsleep 60\n";
    site.users.filter("alice", "message", script);
    let mut daemon = Usermilter::start(&site.config(Extra::default()));
    let worker = daemon.worker_pid();
    let lost = site.judge_meanwhile("alice@test.example");
    let filter = site.filter_pid("alice");
    let child = std::fs::read_to_string(site.users.account("alice").home.join("child")).unwrap();
    daemon.signal(Signal::SIGKILL);
    wait_gone("the worker", worker, Duration::from_secs(2));
    wait_gone("the filter", filter, Duration::from_secs(2));
    wait_gone("what the filter forked", child.trim().parse().unwrap(), Duration::from_secs(2));
    assert!(lost.join().unwrap().is_err());
    assert!(!is_listening(&site.milter));
}

#[test]
fn a_filter_can_die_of_any_signal() {
    let site = Site::new();
    let mut daemon = Usermilter::start(&site.config(Extra::default()));
    // 34 and 64 are real-time signals; 0 would be none.
    for number in [1, 9, 11, 15, 31, 34, 64] {
        site.users.filter("alice", "message", format!("#!/bin/sh\nkill -{number} $$\nsleep 5\n"));
        assert!(is_accepted(&site.judge("alice@test.example")), "signal {number}");
        assert!(daemon.status().is_none(), "signal {number} ended the daemon");
    }
}

#[test]
fn sigterm_lets_a_transaction_finish_and_leaves_nothing() {
    let site = Site::new();
    site.slow_filter("alice", 2.0, 77);
    let socket = site.sandbox.join("milter.sock");
    let unix = format!("unix:{}", socket.display());
    let config = site.config_on(&[&site.milter, &unix], &[&site.policy], Extra::default());
    let mut daemon = Usermilter::start(&config);
    let worker = daemon.worker_pid();
    assert!(is_accepted(&message(&mut site::session(&unix), &["bob@test.example"])));
    let idle = site.session();
    let idle_policy = policy::Client::connect(&site.policy);
    let transaction = site.judge_meanwhile("alice@test.example");
    let filter = site.filter_pid("alice");

    let start = Instant::now();
    daemon.signal(Signal::SIGTERM);
    let refused = || !is_listening(&site.milter) && !is_listening(&site.policy) && !site::exists(&socket);
    assert!(wait_until(Duration::from_secs(1), refused), "new connections are accepted after SIGTERM");
    assert!(runs(filter), "refused only when all was over");
    let status = daemon.terminate_without_signal();
    let answer = transaction.join().unwrap().unwrap();
    assert_eq!(
        (answer.letter(), answer.text().as_str()),
        ('y', "550 5.7.1 message refused by the recipient")
    );
    assert_eq!(status.code(), Some(0), "{status}");
    assert!(start.elapsed() < Duration::from_secs(6), "idle connections hold it up: {:?}", start.elapsed());
    assert!(!runs(worker) && !runs(filter));
    drop((idle, idle_policy));
}

#[test]
fn a_second_sigterm_ends_it_at_once() {
    let site = Site::new();
    site.slow_filter("alice", 60.0, 0);
    let mut daemon = Usermilter::start(&site.config(Extra::default()));
    let worker = daemon.worker_pid();
    let transaction = site.judge_meanwhile("alice@test.example");
    let filter = site.filter_pid("alice");
    daemon.signal(Signal::SIGTERM);
    daemon.wait_for_log("draining", PATIENCE);
    assert!(runs(worker) && runs(filter));
    let start = Instant::now();
    daemon.signal(Signal::SIGTERM);
    let status = daemon.terminate_without_signal();
    assert_eq!(status.code(), Some(0), "{status}");
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    assert!(!runs(worker) && !runs(filter));
    assert!(transaction.join().unwrap().is_err());
}

#[test]
fn the_drain_timeout_is_honoured() {
    let site = Site::new();
    site.slow_filter("alice", 60.0, 0);
    let mut daemon =
        Usermilter::start(&site.config(Extra { server: "drain-timeout = \"1s\"", ..Extra::default() }));
    let transaction = site.judge_meanwhile("alice@test.example");
    let filter = site.filter_pid("alice");
    let start = Instant::now();
    daemon.signal(Signal::SIGTERM);
    let status = daemon.terminate_without_signal();
    let took = start.elapsed();
    assert_eq!(status.code(), Some(0), "{status}");
    assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(6), "{took:?}");
    assert!(!runs(filter));
    assert!(transaction.join().unwrap().is_err(), "the MTA sees the end, and answers 4xx");
}

#[test]
fn sighup_brings_the_new_configuration_and_spoils_nothing_of_the_old() {
    let site = Site::new();
    site.slow_filter("alice", 1.5, 1);
    site.users.filter("bob", "message", "#!/bin/sh\nexit 1\n");
    let mut daemon = Usermilter::start(&site.config(Extra::default()));
    let old = daemon.worker_pid();
    let mut open_session = site.session();
    assert!(is_accepted(&message(&mut open_session, &["bob@test.example"])), "exit 1 is a filter error");
    let mut policy = policy::Client::connect(&site.policy);
    let request = policy::Request::rcpt("s@sender.example", "nobody@test.example");
    assert_eq!(policy.ask(&request), "DUNNO");
    let in_flight = site.judge_meanwhile("alice@test.example");
    let filter = site.filter_pid("alice");

    let seen = daemon.log_lines().len();
    daemon
        .write_config(&site.config(Extra { filter: "exit-status = { 1 = \"reject\" }", ..UNKNOWN_REJECTED }));
    daemon.reload();
    daemon.wait_for_log_after(seen, "ready", PATIENCE);
    // Until then the old worker may take a connection, and judge as before.
    daemon.wait_for_log_after(seen, "draining", PATIENCE);

    assert_eq!(site.judge("bob@test.example").letter(), 'y', "the new configuration rejects for exit 1");
    assert!(ask_about_nobody(&site.policy).starts_with("550 5.1.1 "));
    // The policy connection is closed between requests, which Postfix answers with a new one.
    assert!(policy.read_action().unwrap().is_none());
    assert!(runs(filter) && runs(old), "the test is too slow to show anything");
    assert!(is_accepted(&message(&mut open_session, &["bob@test.example"])), "the session goes on");
    assert!(is_accepted(&in_flight.join().unwrap().unwrap()), "the old configuration holds to the end");
    assert!(is_accepted(&message(&mut open_session, &["bob@test.example"])));
    open_session.quit();
    wait_gone("the old worker", old, Duration::from_secs(3));
    assert_ne!(daemon.worker_pid(), old);
}

#[test]
fn a_configuration_that_cannot_be_used_changes_nothing() {
    let site = Site::new();
    let good = site.config(UNKNOWN_REJECTED);
    let mut daemon = Usermilter::start(&good);
    let worker = daemon.worker_pid();
    let open = site::descriptors(daemon.pid());
    let no_directory = format!("unix:{}", site.sandbox.join("nowhere/milter.sock").display());
    let other = |milter: &[&str]| site.config_on(milter, &[&site.policy], Extra::default());
    // The second line is the first of `[server]`.
    let broken = [
        ("syntax", format!("{good}\n[filter\n"), ":24:8: "),
        ("unknown key", good.replacen("user =", "colour =", 1), ":3:1: "),
        ("bad value", good.replacen("\"0s\"", "\"0\"", 1), ":21:15: "),
        ("unbindable path", other(&[&site.milter, &no_directory]), &*no_directory),
        ("foreign address", other(&["inet:192.0.2.1:8890"]), "inet:192.0.2.1:8890"),
        (
            "no such group",
            site.config_on(
                &[&site.milter, &format!("unix:{}", site.sandbox.join("s").display())],
                &[&site.policy],
                Extra { server: "socket-group = \"umt-nobody-is-in-it\"", ..Extra::default() },
            ),
            "umt-nobody-is-in-it",
        ),
        (
            "no such user",
            good.replacen("\"nobody\"", "\"umt-nobody-has-this-name\"", 1),
            "umt-nobody-has-this-name",
        ),
        ("root", good.replacen("\"nobody\"", "\"root\"", 1), "root"),
    ];
    for (what, config, place) in broken {
        let seen = daemon.log_lines().len();
        daemon.write_config(&config);
        daemon.reload();
        daemon.wait_for_log_after(seen, "stays as it was", PATIENCE);
        let lines = daemon.log_lines()[seen..].join("\n");
        assert!(lines.contains(place), "{what}: {lines}");
        assert!(ask_about_nobody(&site.policy).starts_with("550 5.1.1 "), "{what}");
        assert_eq!(daemon.worker_pid(), worker, "{what}");
    }
    let now = || site::descriptors(daemon.pid());
    assert!(
        wait_until(PATIENCE, || now() == open),
        "something stays open of what failed: {:?} {open:?}",
        now()
    );

    let seen = daemon.log_lines().len();
    fs::remove_file(daemon.config_path()).unwrap();
    daemon.reload();
    daemon.wait_for_log_after(seen, "stays as it was", PATIENCE);
    daemon.write_config(&good);
    daemon.reload();
    daemon.wait_for_log_after(seen, "ready", PATIENCE);
}

#[test]
fn sighup_adds_and_removes_sockets() {
    let site = Site::new();
    let socket = site.sandbox.join("added.sock");
    let unix = format!("unix:{}", socket.display());
    let first = site.config(Extra::default());
    let mut daemon = Usermilter::start(&first);
    // Keeps the old worker alive, which must not keep what is removed.
    let open_session = site.session();
    let old = daemon.worker_pid();

    let seen = daemon.log_lines().len();
    daemon.write_config(&site.config_on(&[&site.milter, &unix], &[], Extra::default()));
    daemon.reload();
    daemon.wait_for_log_after(seen, "ready", PATIENCE);
    assert!(is_accepted(&message(&mut site::session(&unix), &["bob@test.example"])));
    let closed = || !is_listening(&site.policy);
    assert!(wait_until(Duration::from_secs(1), closed), "a removed socket still accepts");
    assert!(runs(old));

    let seen = daemon.log_lines().len();
    daemon.write_config(&first);
    daemon.reload();
    daemon.wait_for_log_after(seen, "ready", PATIENCE);
    assert_eq!(ask_about_nobody(&site.policy), "DUNNO");
    assert!(wait_until(Duration::from_secs(1), || !site::exists(&socket)), "the path of a removed socket");
    drop(open_session);
}

#[test]
fn reloads_under_load_cost_no_answer() {
    let site = Site::new();
    site.users.filter("alice", "message", "#!/bin/sh\ncat > /dev/null\n");
    site.users.filter("bob", "message", "#!/bin/sh\necho 'not today'\nexit 77\n");
    let mut daemon = Usermilter::start(&site.config(UNKNOWN_REJECTED));
    let over = Arc::new(AtomicBool::new(false));
    let milter = |messages_in_a_session: usize| {
        let (address, over) = (site.milter.clone(), Arc::clone(&over));
        std::thread::spawn(move || {
            let mut count = 0;
            while !over.load(Ordering::Relaxed) {
                let mut client = site::session(&address);
                for _ in 0..messages_in_a_session {
                    assert!(is_accepted(&message(&mut client, &["alice@test.example"])));
                    assert_eq!(message(&mut client, &["bob@test.example"]).text(), "550 5.7.1 not today");
                    count += 2;
                }
                client.quit();
            }
            count
        })
    };
    let policy = {
        let (address, over) = (site.policy.clone(), Arc::clone(&over));
        std::thread::spawn(move || {
            let mut count = 0;
            let mut client = policy::Client::connect(&address);
            while !over.load(Ordering::Relaxed) {
                for (recipient, expected) in [("alice", "DUNNO"), ("nobody", "550 5.1.1 ")] {
                    let request =
                        policy::Request::rcpt("s@sender.example", &format!("{recipient}@test.example"));
                    // As Postfix does: a connection that was idle may have been closed; a new one may not.
                    let ask = |client: &mut policy::Client| {
                        client.send_raw(&request.encode()).ok()?;
                        client.read_action().ok()?
                    };
                    let action = ask(&mut client).unwrap_or_else(|| {
                        client = policy::Client::connect(&address);
                        ask(&mut client).expect("an answer on a new connection")
                    });
                    assert!(action.starts_with(expected), "{action}");
                    count += 1;
                }
            }
            count
        })
    };
    let milters = [milter(1), milter(3)];
    for round in 0..25 {
        daemon.reload();
        if round % 5 == 0 {
            // While the candidate of the one before is not ready, or just became it.
            std::thread::sleep(Duration::from_millis(round / 5));
            daemon.reload();
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    over.store(true, Ordering::Relaxed);
    let messages: Vec<usize> = milters.into_iter().map(|thread| thread.join().unwrap()).collect();
    let requests = policy.join().unwrap();
    let reloads = daemon.log_lines().iter().filter(|line| line.contains(" ready ")).count();
    assert!(messages.iter().all(|count| *count >= 10) && requests >= 50, "{messages:?} {requests}");
    assert!(reloads >= 10, "{reloads} reloads");
    daemon.worker_pid();
    let troubles: Vec<_> = daemon.log_lines().into_iter().filter(|line| line.contains("ERROR")).collect();
    assert!(troubles.is_empty(), "{troubles:?}");
}

#[test]
fn a_worker_that_stops_for_a_while_loses_nothing() {
    let site = Site::new();
    site.slow_filter("alice", 0.5, 77);
    let daemon = Usermilter::start(&site.config(Extra::default()));
    let worker = daemon.worker_pid();
    let transaction = site.judge_meanwhile("alice@test.example");
    site.filter_pid("alice");
    signal(worker, Signal::SIGSTOP);
    let used = site::processor_time(daemon.pid());
    std::thread::sleep(Duration::from_secs(4));
    let used = site::processor_time(daemon.pid()) - used;
    signal(worker, Signal::SIGCONT);
    assert_eq!(transaction.join().unwrap().unwrap().letter(), 'y');
    assert_eq!(daemon.worker_pid(), worker);
    assert!(used < Duration::from_millis(100), "the monitor used {used:?}");
}

#[test]
fn without_root_it_runs_filters_of_the_invoking_user_alone() {
    let sandbox = Sandbox::new();
    let (own, other) = (SystemUser::create(&sandbox, "own"), SystemUser::create(&sandbox, "other"));
    own.filter("message", "#!/bin/sh\nid -u > \"$HOME/ran\"\nexit 77\n");
    other.filter("message", "#!/bin/sh\nid -u > \"$HOME/ran\"\nexit 77\n");
    let address = format!("inet:127.0.0.1:{}", common::free_port());
    let config = format!(
        "[server]\nmilter = [\"{address}\"]\npolicy = []\n\
         [recipients]\ndomains = [\"test.example\"]\ntrusted-networks = []\n\
         [filter]\non-error = \"defer\"\nmax-user-processes = 4096\n"
    );
    let daemon = Usermilter::start_as(&config, own.uid, own.gid);
    let judge = |user: &SystemUser| {
        message(&mut site::session(&address), &[&format!("{}@test.example", user.name)]).text()
    };
    assert!(judge(&own).starts_with("550 5.7.1 "), "{}", judge(&own));
    assert_eq!(fs::read_to_string(own.home.join("ran")).unwrap(), format!("{}\n", own.uid));
    assert!(judge(&other).starts_with("451 4."), "{}", judge(&other));
    daemon.wait_for_log("not started as root", PATIENCE);
    assert!(!site::exists(&other.home.join("ran")));
    assert_eq!(site::status_field(daemon.worker_pid(), "Uid"), vec![own.uid.to_string(); 4].join("\t"));
}

#[test]
fn without_a_file_the_built_in_defaults_serve() {
    let default = usermilter::config::DEFAULT_PATH;
    assert!(!site::exists(default.as_ref()), "{default} is there, so the defaults can't be seen");
    let sandbox = Sandbox::new();
    let user = SystemUser::create(&sandbox, "own");
    let program = sandbox.join("usermilter");
    fs::copy(Usermilter::program(), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    // Other runs of this test on the machine want the same ports.
    let ready = wait_until(PATIENCE, || {
        let mut command = Command::new(&program);
        command.arg("serve").uid(user.uid).gid(user.gid).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut server = common::process::Server::start(&mut command);
        let mut stderr = server.stderr().unwrap();
        let mut log = Vec::new();
        let mut chunk = [0; 1024];
        while let Ok(length @ 1..) = stderr.read(&mut chunk) {
            log.extend_from_slice(&chunk[..length]);
            let log = String::from_utf8_lossy(&log);
            if log.contains(" ready ") {
                assert!(log.contains("milter=inet:127.0.0.1:8890 policy=inet:127.0.0.1:8891"), "{log}");
                return true;
            }
        }
        let log = String::from_utf8_lossy(&log);
        assert!(log.contains("cannot listen on inet:127.0.0.1:889"), "{log}");
        false
    });
    assert!(ready, "ports 8890 and 8891 stay in use");
}

#[test]
fn exit_statuses_are_those_of_sysexits() {
    let site = Site::new();
    let run = |arguments: &[&str]| {
        let output = Command::new(Usermilter::program()).args(arguments).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    for arguments in [&["serve", "--colour"][..], &["sing"], &[], &["serve", "--config"]] {
        assert_eq!(run(arguments).0, 64, "{arguments:?}");
    }
    assert_eq!(run(&["--version"]).0, 0);

    let good = site.config(Extra::default());
    let taken = std::net::TcpListener::bind(site.milter.trim_start_matches("inet:")).unwrap();
    for (config, expected) in [
        (good.replacen("user =", "user", 1), "usermilter.toml:3:"),
        (good.clone(), "cannot listen on inet:127.0.0.1:"),
    ] {
        let path = site.sandbox.write("usermilter.toml", config);
        let (status, text) = run(&["serve", "--config", path.to_str().unwrap()]);
        assert_eq!(status, 78, "{text}");
        assert!(text.contains(expected), "{text}");
    }
    drop(taken);
    let path = site.sandbox.write("usermilter.toml", good.replacen("\"nobody\"", "\"umt-none\"", 1));
    let (status, text) = run(&["serve", "--config", path.to_str().unwrap()]);
    assert!(text.contains("user umt-none does not exist; create it, or set server.user"), "{text}");
    assert_eq!(status, 78, "{text}");
    assert_eq!(run(&["serve", "--config", "/nonexistent/usermilter.toml"]).0, 78);
}

#[test]
fn a_unix_socket_has_the_permissions_configured_and_replaces_a_stale_one_only() {
    let site = Site::new();
    let [stale, fresh] = ["stale", "fresh"].map(|name| site.sandbox.join(name));
    let [stale_address, fresh_address] = [&stale, &fresh].map(|path| format!("unix:{}", path.display()));
    drop(UnixListener::bind(&stale).unwrap());
    assert!(site::exists(&stale));
    let config = |server: &str| {
        site.config_on(&[&stale_address], &[&fresh_address], Extra { server, ..Extra::default() })
    };
    let mut daemon = Usermilter::start(&config("socket-mode = \"0620\"\nsocket-group = \"postfix\""));
    let postfix = nix::unistd::Group::from_name("postfix").unwrap().expect("group postfix").gid;
    for path in [&stale, &fresh] {
        let metadata = path.symlink_metadata().unwrap();
        assert_eq!(
            (metadata.mode() & 0o7777, metadata.gid()),
            (0o620, postfix.as_raw()),
            "{}",
            path.display()
        );
    }
    assert!(is_accepted(&message(&mut site::session(&stale_address), &["bob@test.example"])));
    assert_eq!(ask_about_nobody(&fresh_address), "DUNNO");

    let second = Usermilter::try_start(&config("")).expect_err("both can't serve the same socket");
    assert_eq!(second.status.and_then(|status| status.code()), Some(78));
    assert!(second.stderr.contains("another process serves this socket"), "{second}");
    assert!(is_accepted(&message(&mut site::session(&stale_address), &["bob@test.example"])));
    assert_eq!(daemon.terminate().code(), Some(0));
    assert!(!site::exists(&stale) && !site::exists(&fresh));

    fs::write(&stale, "precious").unwrap();
    let third = Usermilter::try_start(&config("")).expect_err("a file is in the way");
    assert_eq!(third.status.and_then(|status| status.code()), Some(78));
    assert_eq!(fs::read_to_string(&stale).unwrap(), "precious");
}
