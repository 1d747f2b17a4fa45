//! What the processes keep resident.

use std::fs;
use std::thread;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::common::{Sandbox, Usermilter};
use crate::load::Client;
use crate::milter::{End, Message, Session};
use crate::policy;
use crate::site::{self, FILTERED, PLAIN};

/// Of each interface; `server.max-connections`.
const CONNECTIONS: usize = 1000;

/// Most that should be resident, in MiB.
const MONITOR_BAR: f64 = 6.0;
/// Idle, and when busy.
const WORKER_BARS: (f64, f64) = (20.0, 60.0);

/// In flight at the same time, spooled since they are larger than `filter.memory-limit`.
const MESSAGES: usize = 50;
const MESSAGE_SIZE: usize = 25 << 20;

/// Measures a daemon of its own and prints the table.
pub(crate) fn report() {
    eprintln!("measuring memory …");
    let wanted = 2 * CONNECTIONS as u64 + 100;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("getrlimit");
    if soft < wanted && setrlimit(Resource::RLIMIT_NOFILE, wanted.min(hard), hard).is_err() || hard < wanted {
        println!("memory: skipped, RLIMIT_NOFILE is below {wanted}");
        return;
    }
    let sandbox = Sandbox::new();
    let users = site::users(&sandbox);
    let (milter, policy) = site::addresses();
    let daemon = Usermilter::start(&site::configuration(&sandbox, &users, &milter, &policy, ""));
    let (monitor, worker) = (daemon.pid(), daemon.worker_pid());
    thread::sleep(Duration::from_millis(500));

    println!("| MiB resident (proportional share) | monitor | bar | worker | bar |");
    println!("|---|---:|---:|---:|---:|");
    row("idle", monitor, worker, WORKER_BARS.0);
    let message = Message::new(&[PLAIN], 4096);
    let request = policy::request(PLAIN);
    let mut sessions = Vec::with_capacity(CONNECTIONS);
    let mut clients = Vec::with_capacity(CONNECTIONS);
    for _ in 0..CONNECTIONS {
        let mut session = Session::open(&milter, &message, End::Accepted);
        session.ask_and_wait();
        sessions.push(session);
        let mut client = policy::Connection::open(&policy, &request);
        client.ask_and_wait();
        clients.push(client);
    }
    thread::sleep(Duration::from_millis(500));
    row("1,000 milter and 1,000 policy connections", monitor, worker, WORKER_BARS.1);
    drop((sessions, clients));
    drop(daemon);

    // Anew: a heap that has been large may stay so.
    let daemon = Usermilter::start(&site::configuration(&sandbox, &users, &milter, &policy, ""));
    let message = Message::new(&[FILTERED], 1 << 17);
    thread::scope(|scope| {
        let client = || {
            let mut session = Session::open(&milter, &message, End::Accepted);
            session.send_unfinished(MESSAGE_SIZE);
            session
        };
        let clients: Vec<_> = (0..MESSAGES).map(|_| scope.spawn(client)).collect();
        let sessions: Vec<_> = clients.into_iter().map(thread::ScopedJoinHandle::join).collect();
        assert!(sessions.iter().all(Result::is_ok), "a message was not taken");
        row("50 messages of 25 MiB in flight", daemon.pid(), daemon.worker_pid(), WORKER_BARS.1);
    });
    println!();
}

fn row(what: &str, monitor: u32, worker: u32, worker_bar: f64) {
    let show = |pid: u32, bar: f64| {
        let (resident, share) = (mebibytes(pid, "status", "VmRSS:"), mebibytes(pid, "smaps_rollup", "Pss:"));
        let mark = if resident > bar { " **above the bar**" } else { "" };
        format!("{resident:.1} ({share:.1}) | {bar}{mark}")
    };
    println!("| {what} | {} | {} |", show(monitor, MONITOR_BAR), show(worker, worker_bar));
}

/// A field of a file of /proc, which are in kB.
fn mebibytes(pid: u32, file: &str, field: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let value = text.lines().find_map(|line| line.strip_prefix(field)?.trim().strip_suffix("kB"));
    value.and_then(|value| value.trim().parse::<f64>().ok()).map_or(f64::NAN, |kilobytes| kilobytes / 1024.0)
}
