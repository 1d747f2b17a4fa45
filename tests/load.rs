//! Many connections, slow ones, and more than there is room for: the daemon grows by nothing, and serves the others.
//!
//! `LOAD=long` (`make load`) takes ten minutes for what takes seconds in `make test`, and prints figures.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;
mod site;

use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use common::milter::{self, Frame};
use common::site::{SiteBuilder, send};
use common::{PATIENCE, Postfix, Site, policy, smtp, wait_until};
use site::{descriptors, status_field};

/// `server.max-connections`, as it is by default.
const LIMIT: usize = 1000;

/// Connections beyond the limit.
const FLOOD: usize = 10_000;

const MESSAGE: &[u8] = b"Subject: load\r\n\r\nThe quick brown fox jumps over the lazy dog.\r\n";

/// Recipients, the letter of the milter's answer, and the beginning of the policy service's.
const VERDICTS: &[(&str, &[char], &str)] = &[
    ("accept@test.example", &['a'], "DUNNO"),
    ("plain@test.example", &['a'], "DUNNO"),
    ("reject@test.example", &['y'], "DUNNO"),
    ("defer@test.example", &['y'], "DUNNO"),
    ("ruled@test.example", &['y'], "550 5.7.1 "),
    ("error@test.example", &['a'], "DUNNO"),
];

fn site() -> SiteBuilder {
    let names = ["accept", "plain", "reject", "defer", "ruled", "error"];
    let users: Vec<(&str, u32)> = names.into_iter().zip(5001..).collect();
    let site = Site::of(&users)
        .set("filter", "inspect-ttl", "\"5s\"")
        .filter("accept", "message", "#!/bin/sh\ncat > /dev/null\n")
        .filter("reject", "message", "#!/bin/sh\necho not wanted\nexit 77\n")
        .filter("defer", "message", "#!/bin/sh\nexit 75\n")
        .filter("error", "message", "#!/bin/sh\nexit 1\n");
    site.users.file("ruled", "rules.toml", "default = \"reject\"\n");
    site
}

fn is_long() -> bool {
    std::env::var("LOAD").is_ok_and(|value| value == "long")
}

/// This process has the other ends.
fn allow_many_descriptors() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(hard > 14_000, "ulimit -Hn is {hard}: too low for {FLOOD} connections");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

fn milter_verdict(client: &mut milter::Client, turn: usize) {
    let (recipient, letters, _) = VERDICTS[turn % VERDICTS.len()];
    let answer = send(client, "<s@sender.example>", &[recipient], MESSAGE);
    assert!(letters.contains(&answer.letter()), "{recipient}: {answer:?}");
}

fn policy_verdict(client: &mut policy::Client, turn: usize) {
    let (recipient, _, action) = VERDICTS[turn % VERDICTS.len()];
    let answer = client.ask(&policy::Request::rcpt("s@sender.example", recipient));
    assert!(answer.starts_with(action), "{recipient}: {answer}");
}

/// What a process has at a moment.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    /// Resident, in KiB.
    memory: usize,
    descriptors: usize,
}

impl Sample {
    fn of(pid: u32) -> Self {
        let memory = status_field(pid, "VmRSS").trim_end_matches(" kB").parse().unwrap();
        Self { memory, descriptors: descriptors(pid).len() }
    }
}

/// The samples of one process, one a second or more.
struct Samples {
    name: &'static str,
    pid: u32,
    all: Vec<Sample>,
}

impl Samples {
    fn mean(samples: &[Sample]) -> Sample {
        let sum = |of: fn(&Sample) -> usize| samples.iter().map(of).sum::<usize>() / samples.len();
        Sample { memory: sum(|s| s.memory), descriptors: sum(|s| s.descriptors) }
    }

    fn first_third(&self) -> Sample {
        Self::mean(&self.all[..self.all.len() / 3])
    }

    fn last_third(&self) -> Sample {
        Self::mean(&self.all[self.all.len() - self.all.len() / 3..])
    }
}

impl fmt::Display for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = (self.first_third(), self.last_third());
        write!(
            f,
            "{:<8} {:>6} -> {:>6} KiB, {:>5} -> {:>5} descriptors",
            self.name, first.memory, last.memory, first.descriptors, last.descriptors
        )
    }
}

/// The guard is nobody's child; it has the monitor's command line.
fn guard_of(monitor: u32, worker: u32) -> u32 {
    let command = |pid: u32| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.find(|&pid| ![monitor, worker].contains(&pid) && command(pid) == command(monitor))
        .expect("the guard")
}

/// Children that have ended and nobody has waited for.
fn zombies(pid: u32) -> usize {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let is_zombie = |pid: &&str| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'))
    };
    children.split_whitespace().filter(is_zombie).count()
}

#[test]
fn a_thousand_connections_to_each_service_make_nothing_grow() {
    allow_many_descriptors();
    let duration = Duration::from_secs(if is_long() { 600 } else { 12 });
    let site = site().start();
    let (monitor, worker) = (site.daemon.pid(), site.daemon.worker_pid());
    let before = Sample::of(worker);
    let over = AtomicBool::new(false);
    let (mails, requests) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let mut processes = [("monitor", monitor), ("worker", worker), ("guard", guard_of(monitor, worker))]
        .map(|(name, pid)| Samples { name, pid, all: Vec::new() });
    let mut most_zombies = 0;
    std::thread::scope(|scope| {
        // Each driver has its share of the connections, and uses one after the other.
        const DRIVERS: usize = 4;
        let everybody = std::sync::Arc::new(std::sync::Barrier::new(2 * DRIVERS + 1));
        for driver in 0..DRIVERS {
            let (site, over, mails, requests) = (&site, &over, &mails, &requests);
            let barrier = std::sync::Arc::clone(&everybody);
            scope.spawn(move || {
                let mut clients: Vec<_> = (0..LIMIT / DRIVERS).map(|_| site.mta()).collect();
                barrier.wait();
                for turn in driver.. {
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                    let number = turn % clients.len();
                    milter_verdict(&mut clients[number], turn);
                    mails.fetch_add(1, Ordering::Relaxed);
                }
            });
            let barrier = std::sync::Arc::clone(&everybody);
            scope.spawn(move || {
                let connect = |_| policy::Client::connect(site.policy_address());
                let mut clients: Vec<_> = (0..LIMIT / DRIVERS).map(connect).collect();
                barrier.wait();
                for turn in driver.. {
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                    let number = turn % clients.len();
                    policy_verdict(&mut clients[number], turn);
                    requests.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
        }
        everybody.wait();
        let started = Instant::now();
        while started.elapsed() < duration {
            std::thread::sleep(Duration::from_millis(250));
            processes.iter_mut().for_each(|process| process.all.push(Sample::of(process.pid)));
            most_zombies = most_zombies.max(zombies(monitor));
        }
        over.store(true, Ordering::Relaxed);
    });
    println!(
        "{} mails and {} policy requests in {duration:?}, at most {most_zombies} zombies at a time",
        mails.into_inner(),
        requests.into_inner()
    );
    processes.iter().for_each(|process| println!("{process}"));
    for process in &processes {
        let (first, last) = (process.first_third(), process.last_third());
        // A tenth, and what an allocator may keep for a thread.
        assert!(last.memory <= first.memory + first.memory / 10 + 4096, "{process}");
        // Filters come and go: each has some descriptors of the worker's.
        assert!(last.descriptors <= first.descriptors + 32, "{process}");
    }
    // Between two looks one child can have ended that is just being reaped.
    assert!(most_zombies < 16, "{most_zombies} zombies");
    assert!(wait_until(PATIENCE, || zombies(monitor) == 0), "zombies are left");
    let left = || Sample::of(worker).descriptors;
    assert!(wait_until(PATIENCE, || left() <= before.descriptors), "{} descriptors of {before:?}", left());
    println!(
        "worker   {} KiB when all have left, {} KiB at the start",
        Sample::of(worker).memory,
        before.memory
    );
}

#[test]
fn clients_of_a_byte_a_second_hold_nobody_up() {
    allow_many_descriptors();
    let site = site().start();
    const SLOW: usize = 300;
    let connect = |address: &str| TcpStream::connect(address.trim_start_matches("inet:")).unwrap();
    let milters: Vec<_> = (0..SLOW).map(|_| connect(site.milter_address())).collect();
    let policies: Vec<_> = (0..SLOW).map(|_| connect(site.policy_address())).collect();
    // A HELO that goes on for hours, and a request.
    let frame = Frame::new(b'O', [0, 0, 0, 6, 0, 0, 1, 0xff, 0, 0x1f, 0xff, 0xff]).encode();
    let helo = Frame::new(b'H', vec![b'x'; 50_000]).encode();
    let milter_bytes = [frame, helo].concat();
    let request = policy::Request::rcpt("s@sender.example", "ruled@test.example").encode();
    let over = AtomicBool::new(false);
    let sent = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let at = sent.fetch_add(1, Ordering::Relaxed);
                for (mut stream, bytes) in milters
                    .iter()
                    .map(|stream| (stream, &milter_bytes))
                    .chain(policies.iter().map(|stream| (stream, &request)))
                {
                    stream.write_all(&bytes[at..=at]).unwrap();
                }
                std::thread::sleep(Duration::from_secs(1));
            }
        });
        let mut mta = site.mta();
        let mut client = policy::Client::connect(site.policy_address());
        let started = Instant::now();
        let mut turns = 0;
        while turns < 200 || started.elapsed() < Duration::from_secs(if is_long() { 120 } else { 3 }) {
            milter_verdict(&mut mta, turns);
            policy_verdict(&mut client, turns);
            // A new connection is served too.
            if turns % 20 == 0 {
                mta = site.mta();
                client = policy::Client::connect(site.policy_address());
            }
            turns += 1;
        }
        over.store(true, Ordering::Relaxed);
        println!("{turns} mails and requests beside {SLOW} slow connections of each kind");
    });
    let sent = sent.into_inner();
    assert!((2..request.len()).contains(&sent), "no slow client is to have finished: {sent} bytes");
    // They were not cut off either: what is missing gets its answer.
    for mut stream in &policies {
        stream.write_all(&request[sent..]).unwrap();
        let mut answer = [0; 10];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"action=550");
    }
}

/// Opens as many connections more as are to be refused, all at once: each ends without a byte, and without a reset.
fn flood(address: &str) -> usize {
    const THREADS: usize = 8;
    let refused = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let streams: Vec<_> = (0..FLOOD / THREADS)
                    .map(|_| TcpStream::connect(address.trim_start_matches("inet:")).unwrap())
                    .collect();
                let ends = streams.iter().map(|mut stream| {
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    stream.read(&mut [0])
                });
                let ends: Vec<io::Result<usize>> = ends.collect();
                refused.lock().unwrap().extend(ends);
            });
        }
    });
    let ends = refused.into_inner().unwrap();
    let impolite: Vec<_> = ends.iter().filter(|end| !matches!(end, Ok(0))).collect();
    assert!(impolite.is_empty(), "{} of {}: {:?}", impolite.len(), ends.len(), impolite[0]);
    ends.len()
}

#[test]
fn ten_thousand_connections_are_refused_politely_and_the_other_service_goes_on() {
    allow_many_descriptors();
    let site = site().start();
    let worker = site.daemon.worker_pid();
    let open = descriptors(worker).len();
    let postfix = Postfix::builder().milter(site.milter_address()).policy(site.policy_address());
    let postfix = postfix.mailboxes(&["accept"]).start();
    let offer = || {
        let mut client = smtp::Client::connect(postfix.port());
        client.ehlo("mx.sender.example");
        let sent = client.send("s@sender.example", &["accept@test.example"], MESSAGE);
        let first = [&sent.mail, &sent.recipients[0]].into_iter().find(|reply| !reply.is_success());
        let code = first.unwrap_or_else(|| sent.outcome()).code;
        client.quit();
        code
    };

    let mut mtas: Vec<_> = (0..LIMIT).map(|_| site.mta()).collect();
    let mut client = policy::Client::connect(site.policy_address());
    let seen = site.daemon.log_lines().len();
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| flood(site.milter_address()));
        let mut turns = 0;
        while !flood.is_finished() || turns < 100 {
            policy_verdict(&mut client, turns);
            // Who was there before is served too.
            milter_verdict(&mut mtas[turns % LIMIT], turns);
            turns += 1;
        }
        assert_eq!(flood.join().unwrap(), FLOOD);
    });
    let said =
        site.daemon.log_lines()[seen..].iter().filter(|line| line.contains("refused: server.max")).count();
    assert!((1..10).contains(&said), "{FLOOD} connections were refused in {said} lines");
    assert_eq!(offer(), 451, "Postfix has its client come again");
    drop(mtas);
    assert!(wait_until(PATIENCE, || offer() == 250), "there is room again");

    let connect = |_| policy::Client::connect(site.policy_address());
    // Postfix has one.
    drop(client);
    let mut clients: Vec<_> = (0..LIMIT - 1).map(connect).collect();
    clients.iter_mut().for_each(|client| policy_verdict(client, 0));
    let mut mta = site.mta();
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| {
            // It may be idle, and gone, by now.
            let _filler = policy::Client::connect(site.policy_address());
            flood(site.policy_address())
        });
        let mut turns = 0;
        while !flood.is_finished() || turns < 100 {
            milter_verdict(&mut mta, turns);
            policy_verdict(&mut clients[turns % (LIMIT - 1)], turns);
            turns += 1;
        }
        assert_eq!(flood.join().unwrap(), FLOOD);
    });
    drop((clients, mta));
    assert!(wait_until(PATIENCE, || offer() == 250), "there is room again");
    drop(postfix);
    let left = || descriptors(worker).len();
    assert!(wait_until(PATIENCE, || left() <= open), "{} descriptors of {open}", left());
    assert_eq!(site.daemon.worker_pid(), worker);
}
