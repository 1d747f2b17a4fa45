//! What a message with one filter costs: system calls of the monitor, of its child until it becomes the filter, and of the
//! worker, against recorded numbers. Times would say more about the machine than about the program.
//!
//! A number that has grown for a good reason is recorded anew, here and in docs/performance.md; one that has shrunk too,
//! or nobody would see it grow again.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use common::process::Server;
use common::site::{self, Site};
use common::{PATIENCE, require, require_root, wait_until};

const MESSAGES: u32 = 40;

/// How far a count may be from the recorded one: by one of the monitor's, by three of a child's.
const MARGIN: f64 = 0.1;

/// Recorded: the monitor's, from waking up for the request to sleeping again after the end.
const OF_MONITOR: f64 = 14.0;
/// Recorded: the child's up to exec, beside one look at each component of the filter's path.
const OF_CHILD: f64 = 32.0;
/// Recorded: the worker's of those in [`MADE_FOR_A_FILTER`].
const OF_WORKER: f64 = 5.0;

/// What the worker does for a filter however busy the machine is. How often it waits, wakes up, or looks after files
/// meanwhile, depends on that.
const MADE_FOR_A_FILTER: [&str; 4] = ["memfd_create", "fchmod", "pipe2", "sendmsg"];

/// A build for debugging looks with fcntl(2) whether a descriptor is open before it closes it.
const NOT_COUNTED: &str = "fcntl";

#[test]
fn a_message_with_one_filter_makes_no_more_system_calls_than_recorded() {
    require_root();
    // Once inspected, the user is remembered: only the filter is started.
    let site = Site::of(&[("alice", site::own_uid(0))])
        .set("filter", "inspect-ttl", "\"1h\"")
        .filter("alice", "message", "#!/bin/sh\nexit 0\n")
        .start();
    let (monitor, worker) = (site.daemon.pid(), site.daemon.worker_pid());
    let mut mta = site.mta();
    let body = "All work and no play makes Jack a dull boy.\r\n".repeat(90);
    let message = format!("Subject: x\r\nFrom: s@sender.example\r\n\r\n{body}");
    let mut judge = || {
        let answer = site::send(&mut mta, "<s@sender.example>", &["alice@test.example"], message.as_bytes());
        assert!(matches!(answer.letter(), 'a' | 'c'), "{answer:?}");
    };
    (0..3).for_each(|_| judge());

    let trace = site.sandbox.join("trace");
    let mut strace = strace(&trace, &[monitor, worker]);
    (0..MESSAGES).for_each(|_| judge());
    assert!(strace.terminate(PATIENCE).is_some(), "strace did not end");

    let calls = Calls::read(&fs::read_to_string(&trace).unwrap());
    let each = |count: u32| f64::from(count) / f64::from(MESSAGES);
    let children = &calls.other_programs;
    assert_eq!(children.len(), MESSAGES as usize, "one child for each message: {children:?}");
    let directories = site.users.account("alice").path("message").components().count() as f64;
    let of_monitor = calls.of(|pid| pid == monitor);
    let of_child = calls.of(|pid| children.contains(&pid));
    // All others are threads of the worker, which come and go.
    let mut of_worker = calls.of(|pid| pid != monitor && !children.contains(&pid));
    of_worker.retain(|name, _| MADE_FOR_A_FILTER.contains(name));
    // Now and then the worker has a look at what the user has: a child, a pipe and a request more.
    let looks = of_monitor["clone"] - MESSAGES;
    for (who, counts, recorded) in [
        ("the monitor", of_monitor, OF_MONITOR * each(MESSAGES + looks)),
        ("the child", of_child, OF_CHILD + directories),
        ("the worker", of_worker, OF_WORKER + 2.0 * each(looks)),
    ] {
        let sum = each(counts.values().sum());
        let shown: Vec<_> =
            counts.iter().map(|(name, count)| format!("{name} {:.1}", each(*count))).collect();
        let shown = shown.join(", ");
        println!("{who}: {sum:.1} of {recorded} ({shown})");
        assert!(
            (sum / recorded - 1.0).abs() <= MARGIN,
            "{who} makes {sum:.1} system calls for a message, recorded are {recorded}: {shown}"
        );
    }
}

/// Traces processes, all their threads, and what they fork.
#[track_caller]
fn strace(output: &Path, processes: &[u32]) -> Server {
    let mut command = Command::new(require("strace"));
    command.args(["-f", "-qq", "-o"]).arg(output);
    for pid in processes {
        command.args(["-p", &pid.to_string()]);
    }
    let server = Server::start(&mut command);
    let is_traced = |thread: &u32| {
        let status = fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
        status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
    };
    let all = || processes.iter().flat_map(|pid| threads(*pid)).collect::<Vec<_>>();
    assert!(
        wait_until(PATIENCE, || all().iter().all(is_traced)),
        "strace can't trace: may ptrace(2) be used here?"
    );
    server
}

fn threads(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// How often each process made each system call; of those that become another program, until they do.
struct Calls {
    by_process: BTreeMap<u32, BTreeMap<String, u32>>,
    other_programs: Vec<u32>,
}

impl Calls {
    /// Lines of strace -f: a process id, then a system call, or another event.
    fn read(trace: &str) -> Self {
        let mut by_process: BTreeMap<u32, BTreeMap<String, u32>> = BTreeMap::new();
        let mut other_programs = Vec::new();
        for line in trace.lines() {
            let Some((pid, event)) = line.split_once(' ') else { continue };
            let (Ok(pid), event) = (pid.parse::<u32>(), event.trim_start()) else { continue };
            let is_name = |name: &str| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
            let Some((name, _)) = event.split_once('(').filter(|(name, _)| is_name(name)) else { continue };
            if other_programs.contains(&pid) || name == NOT_COUNTED {
                continue;
            }
            *by_process.entry(pid).or_default().entry(name.to_owned()).or_default() += 1;
            if name == "execve" {
                other_programs.push(pid);
            }
        }
        Self { by_process, other_programs }
    }

    /// The sum over some processes.
    fn of(&self, is_meant: impl Fn(u32) -> bool) -> BTreeMap<&str, u32> {
        let mut sum = BTreeMap::new();
        for (_, calls) in self.by_process.iter().filter(|(pid, _)| is_meant(**pid)) {
            for (name, count) in calls {
                *sum.entry(name.as_str()).or_default() += count;
            }
        }
        sum
    }
}
