//! `usermilter status`: what it shows is so, whom it shows it to, and what it says when there is nothing to show.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod common;
#[path = "slapd/mod.rs"]
#[allow(dead_code, reason = "another test needs the rest")]
mod slapd;
mod watch;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;

use common::site::own_uid;
use common::{PATIENCE, Sandbox, Usermilter, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use watch::{Watched, status};

fn text(output: &Output) -> (i32, String, String) {
    let string = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap(), string(&output.stdout), string(&output.stderr))
}

#[test]
fn the_document_and_the_dashboard_tell_of_mail_through_postfix() {
    let watched = Watched::start(|site| site);
    watched.send("alice", "good", 2);
    watched.send("alice", "refuse", 1);
    watched.send("alice", "fail", 1);
    watched.send("bob", "never", 1);
    assert!(wait_until(PATIENCE, || watched.document()["transactions"]["aborted"] == 1));
    let document = watched.document();
    assert_eq!(document["transactions"], json!({ "accept": 3, "reject": 1, "defer": 0, "aborted": 1 }));
    assert_eq!(document["recipients"]["policy"]["reject"], 1);
    assert_eq!(document["verdicts"]["rules"], json!({ "reject": 1 }));
    assert_eq!(
        document["filters"]["results"]["message"],
        json!({ "accept": 2, "reject": 1, "exit-status": 1 })
    );
    assert_eq!(document["filters"]["run_time"]["message"]["count"], 4);
    assert_eq!(document["filters"]["running"], json!([]));
    assert_eq!(document["spool"], json!({ "messages": 0, "memory_bytes": 0, "disk_bytes": 0 }));
    assert_eq!(document["state"], "serving");
    assert_eq!(document["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(document["monitor"]["pid"], watched.site.daemon.pid());
    assert_eq!(document["worker"]["pid"], watched.site.daemon.worker_pid());
    let configuration = watched.site.daemon.config_path().display().to_string();
    assert_eq!(document["configuration"], configuration);
    let names: Vec<_> = document["services"].as_array().unwrap().iter().map(|s| s["name"].clone()).collect();
    assert_eq!(names, ["milter", "policy", "metrics", "control"]);
    assert_eq!(document["services"][0]["addresses"], json!([watched.site.milter_address()]));
    assert!(document["services"][0]["accepted"].as_u64().unwrap() >= 1);

    let (code, shown, stderr) = text(&watched.status(&[]));
    assert_eq!((code, stderr.as_str()), (0, ""));
    // Not a terminal: no colours, and nothing is wider than a page.
    assert!(!shown.contains('\x1b'), "{shown}");
    assert!(shown.lines().all(|line| line.chars().count() <= 120), "{shown}");
    let line = |start: &str| {
        let found = shown.lines().find(|line| line.trim_start().starts_with(start));
        let words: Vec<_> =
            found.unwrap_or_else(|| panic!("no {start}: {shown}")).split_whitespace().collect();
        words.join(" ")
    };
    assert!(line("usermilter ").contains("serving"), "{shown}");
    assert!(line("usermilter ").ends_with(&configuration), "{shown}");
    assert!(line("accepted ").starts_with("accepted 3 ") && line("accepted ").contains("60.0 %"), "{shown}");
    assert!(line("refused ").starts_with("refused 1 "), "{shown}");
    assert!(line("given up ").starts_with("given up 1 "), "{shown}");
    assert!(line("policy ").starts_with("policy 0 1 0 4 "), "{shown}");
    assert!(line("rules ").starts_with("rules 0 1 0 0 0"), "{shown}");
    assert!(line("message-filter ").starts_with("message-filter 2 1 0 4 1"), "{shown}");
    assert!(line("message ").starts_with("message 4 "), "{shown}");
    assert_eq!(line("accept 2 "), "accept 2 exit-status 1 reject 1");
    assert!(line("Filters ").starts_with("Filters 0 of 64 running"), "{shown}");
    assert!(line("1 passwd-file ").starts_with("1 passwd-file 9 0 0 0 - -"), "{shown}");
    assert!(!shown.contains("Trouble"), "{shown}");
}

#[test]
fn a_running_filter_is_shown_with_its_user_and_mail() {
    let watched = Watched::start(|site| site);
    thread::scope(|scope| {
        scope.spawn(|| watched.send("alice", "wait", 1));
        let running = |document: &Value| document["filters"]["running"].as_array().unwrap().len();
        assert!(wait_until(PATIENCE, || running(&watched.document()) == 1));
        let filter = watched.document()["filters"]["running"][0].clone();
        assert_eq!((filter["user"].as_str(), filter["phase"].as_str()), (Some("alice"), Some("message")));
        let queue_id = filter["queue_id"].as_str().unwrap();
        assert!(watched.postfix.log().contains(&format!(" {queue_id}: ")), "{filter}");
        assert!(filter["seconds"].as_f64().unwrap() > 0.0);
        let later = watched.document()["filters"]["running"][0]["seconds"].as_f64().unwrap();
        assert!(later > filter["seconds"].as_f64().unwrap());
        let (_, shown, _) = text(&watched.status(&[]));
        let line = shown.lines().find(|line| line.contains("alice")).unwrap();
        assert!(line.contains(queue_id), "{shown}");
        assert!(shown.contains("1 message, "), "{shown}");
        watched.go();
    });
    assert!(wait_until(PATIENCE, || watched.document()["filters"]["running"] == json!([])));
}

#[test]
fn a_dead_worker_and_a_reload_that_failed_are_told_of() {
    let mut watched = Watched::start(|site| site);
    let worker = watched.site.daemon.worker_pid();
    kill(Pid::from_raw(worker.cast_signed()), Signal::SIGKILL).unwrap();
    watched.metrics_when("a new worker", |metrics| metrics.value("worker_restarts_total") == 1.0);
    watched.site.daemon.write_config("[server]\nno-such-key = 1\n");
    watched.site.daemon.reload();
    watched.metrics_when("a failed reload", |metrics| metrics.value("reload_failures_total") == 1.0);
    let document = watched.document();
    assert_eq!(document["restarts"], 1);
    assert!(document["recent_restarts"][0]["what"].as_str().unwrap().contains(&worker.to_string()));
    let error = document["reloads"]["last_error"]["what"].as_str().unwrap();
    assert!(error.contains("usermilter.toml:2:1"), "{error}");
    let (_, shown, _) = text(&watched.status(&[]));
    for part in
        ["Trouble", "worker died", "last reload failed", "usermilter.toml:2:1", "1 restart ", "1 failed"]
    {
        assert!(shown.contains(part), "no {part:?}: {shown}");
    }
}

#[test]
fn servers_of_a_directory_are_shown_with_their_state() {
    let slapd = slapd::Slapd::start(&slapd::Setup::default());
    let dead = format!("ldap://127.0.0.1:{}", slapd::free_port());
    let watched = Watched::start(|site| {
        let (name, password) = (slapd::DAEMON, slapd::DAEMON_PASSWORD);
        let password = site.sandbox.write("password", password);
        site.resolvers(format!(
            "[[resolver]]\ntype = \"ldap\"\nuri = [\"{dead}\", \"{}\"]\nbase = \"{}\"\nbind-dn = \"{name}\"\n\
             password-file = \"{}\"\nfilter = \"(mail=%s)\"\n",
            slapd.ldap(),
            slapd::PEOPLE,
            password.display()
        ))
    });
    // Nobody in the directory, but it was asked, and the second time remembered.
    for _ in 0..2 {
        watched.send("carol", "hello", 1);
    }
    let document = watched.document();
    let resolver = &document["resolvers"][0];
    assert_eq!(resolver["servers"][0]["state"], "failed", "{resolver:#}");
    assert_eq!(resolver["servers"][1]["state"], "in use", "{resolver:#}");
    assert!(resolver["servers"][0]["last_failure"]["what"].is_string());
    assert!(resolver["servers"][0]["failures"].as_u64().unwrap() >= 1);
    assert_eq!(resolver["servers"][1]["failures"], 0);
    assert!(resolver["lookups"]["asked"].as_u64().unwrap() >= 1);
    assert!(resolver["lookups"]["cache"].as_u64().unwrap() >= 1);
    assert_eq!(resolver["lookups"]["unavailable"], 0);
    assert!(resolver["latency"]["count"].as_u64().unwrap() >= 1);
    let metrics = watched.metrics();
    assert!(metrics.value(r#"ldap_failures_total{resolver="1",server="1"}"#) >= 1.0);
    assert_eq!(metrics.value(r#"ldap_failures_total{resolver="1",server="2"}"#), 0.0);
    assert!(metrics.value(r#"resolver_latency_seconds_count{resolver="1",type="ldap"}"#) >= 1.0);
    let (_, shown, _) = text(&watched.status(&[]));
    assert!(shown.contains(&format!("{dead} failed")), "{shown}");
    assert!(shown.contains(&format!("{} in use", slapd.ldap())), "{shown}");
}

#[test]
fn who_follows_sees_each_look_and_rates_between_them() {
    let watched = Watched::start(|site| site);
    // As JSON: a document a line.
    let mut child =
        status(&watched.control, &["--json", "--watch", "1"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut look = || serde_json::from_str::<Value>(&lines.next().unwrap().unwrap()).unwrap();
    let first = look();
    watched.send("alice", "good", 3);
    let last = std::iter::repeat_with(&mut look).find(|d| d["transactions"]["accept"] == 3).unwrap();
    assert!(last["time"].as_f64() > first["time"].as_f64());
    assert_eq!(child.try_wait().unwrap(), None);
    child.kill().unwrap();
    child.wait().unwrap();

    // For people: averages at first, then what came since the last look.
    let mut child = status(&watched.control, &["--watch", "1"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let heading = |line: &String| line.starts_with("Mail ");
    assert!(lines.find(heading).unwrap().ends_with("avg/s"));
    assert!(lines.find(heading).unwrap().ends_with(" /s"));
    let accepted = lines.find(|line| line.trim_start().starts_with("accepted ")).unwrap();
    let words: Vec<&str> = accepted.split_whitespace().collect();
    assert_eq!(words[1..3], ["3", "0.00"], "{accepted}");
    // It outlives the worker, and begins again with the next.
    let worker = watched.site.daemon.worker_pid();
    kill(Pid::from_raw(worker.cast_signed()), Signal::SIGKILL).unwrap();
    let restarted = lines.by_ref().take(3000).find(|line| line.contains("1 restart"));
    assert!(restarted.is_some());
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn who_reads_along_may_leave() {
    let watched = Watched::start(|site| site);
    let mut child = status(&watched.control, &["--watch", "1"]).stdout(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let mut ended = None;
    assert!(wait_until(PATIENCE, || {
        ended = child.try_wait().unwrap();
        ended.is_some()
    }));
    assert_eq!(ended.unwrap().code(), Some(0));
}

/// The command with a terminal, by script(1), and what it wrote there.
fn on_a_terminal(control: &Path, no_color: &str) -> String {
    let program = Usermilter::program();
    let command = format!("{} status --socket {}", program.display(), control.display());
    let mut script = Command::new("script");
    script.args(["-qec", &command, "/dev/null"]).stdin(Stdio::null()).env("NO_COLOR", no_color);
    let output = script.output().expect("script(1) of bsdutils");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn colours_are_for_terminals_whose_users_want_them() {
    let watched = Watched::start(|site| site);
    let colored = on_a_terminal(&watched.control, "");
    assert!(colored.contains("\x1b[32mserving\x1b[0m"), "{colored}");
    let plain = on_a_terminal(&watched.control, "1");
    assert!(plain.contains("serving") && !plain.contains('\x1b'), "{plain}");
}

#[test]
fn without_a_daemon_it_says_where_it_looked_and_what_to_do() {
    let sandbox = Sandbox::new();
    let nowhere = sandbox.join("nobody.sock");
    let (code, stdout, stderr) = text(&status(&nowhere, &[]).output().unwrap());
    assert_eq!((code, stdout.as_str()), (69, ""));
    let path = nowhere.display().to_string();
    for part in ["no daemon answers on", &path, "usermilter serve", "--config", "--socket", "No such file"] {
        assert!(stderr.contains(part), "no {part}: {stderr}");
    }
    let run = |arguments: &[&str]| {
        let mut command = Command::new(Usermilter::program());
        text(&command.arg("status").args(arguments).stdin(Stdio::null()).output().unwrap())
    };
    let config = sandbox.write("off.toml", "[server]\ncontrol = \"off\"\n");
    let (code, _, stderr) = run(&["--config", config.to_str().unwrap()]);
    assert!(code == 69 && stderr.contains("server.control is"), "{stderr}");
    let config = sandbox.write("here.toml", format!("[server]\ncontrol = \"unix:{path}\"\n"));
    let (code, _, stderr) = run(&["--config", config.to_str().unwrap(), "--watch=0"]);
    assert!(code == 64 && stderr.contains("--watch"), "{stderr}");
    let (code, _, stderr) = run(&["--config", config.to_str().unwrap()]);
    assert!(code == 69 && stderr.contains(&path), "{stderr}");
    let config = sandbox.write("tcp.toml", "[server]\ncontrol = \"inet:127.0.0.1:1\"\n");
    let (code, _, stderr) = run(&["--config", config.to_str().unwrap()]);
    assert!(code == 78 && stderr.contains("tcp.toml:2:11") && stderr.contains("unix:/PATH"), "{stderr}");
    assert_eq!(run(&["--config", "x", "--socket", "y"]).0, 64);
    let (code, help, _) = run(&["--help"]);
    assert!(code == 0 && help.contains("Examples:") && help.contains("69  no daemon"), "{help}");
}

#[test]
fn the_control_socket_is_for_its_owner_and_group_alone() {
    // Whatever those who hand mail over may do.
    let watched = Watched::start(|site| site.set("server", "socket-mode", "\"0666\""));
    let metadata = std::fs::symlink_metadata(&watched.control).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.mode() & 0o777, 0o660);
    let uid = own_uid(1);
    let program = watched.site.sandbox.join("usermilter");
    std::fs::copy(Usermilter::program(), &program).unwrap();
    let mut command = Command::new(program);
    command.arg("status").arg("--socket").arg(&watched.control).uid(uid).gid(uid).stdin(Stdio::null());
    let (code, stdout, stderr) = text(&command.output().unwrap());
    assert_eq!((code, stdout.as_str()), (69, ""));
    assert!(stderr.contains("you may not connect"), "{stderr}");
}

#[test]
fn who_sends_nothing_on_the_control_socket_holds_nobody_up() {
    let watched = Watched::start(|site| site);
    let silent: Vec<_> =
        (0..10).map(|_| std::os::unix::net::UnixStream::connect(&watched.control).unwrap()).collect();
    assert_eq!(watched.document()["state"], "serving");
    assert_eq!(watched.send("alice", "good", 1)[0].outcome().code, 250);
    drop(silent);
}
