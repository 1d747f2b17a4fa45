//! Clients, as many as asked for, each with a thread and a connection of its own and one question at a time.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::Plan;
use crate::report::{Measured, Pair};

/// Questions per second that all clients together had answered. Connecting, and each client's first question, are not
/// counted.
pub(crate) fn per_second<C>(
    clients: usize,
    plan: Plan,
    connect: impl Fn() -> C + Sync,
    ask: impl Fn(&mut C) + Sync,
) -> f64 {
    let start = Barrier::new(clients);
    thread::scope(|scope| {
        let client = || {
            let mut connection = connect();
            ask(&mut connection);
            start.wait();
            let began = Instant::now();
            let mut answered = 0_u32;
            while began.elapsed() < plan.duration {
                ask(&mut connection);
                answered += 1;
            }
            f64::from(answered) / began.elapsed().as_secs_f64()
        };
        let clients: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
        clients.into_iter().map(|client| client.join().expect("a client that got its answers")).sum()
    })
}

/// When questions come that do not wait for each other's answers: so many a second in the mean, independently of each
/// other (a Poisson process), the same each time.
pub(crate) fn arrivals(per_second: f64, duration: Duration) -> Vec<Duration> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut at = 0.0;
    let gaps = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // In (0, 1], of the upper 53 bits.
        let uniform = ((state >> 11) + 1) as f64 / (1_u64 << 53) as f64;
        -uniform.ln() / per_second
    });
    let times = gaps.map(|gap| {
        at += gap;
        Duration::from_secs_f64(at)
    });
    times.take_while(|at| *at < duration).collect()
}

/// Asks at these times, each on whichever connection is free, and gives what `ask` measured.
pub(crate) fn at_times<C>(
    clients: usize,
    times: &[Duration],
    connect: impl Fn() -> C + Sync,
    ask: impl Fn(&mut C) -> Duration + Sync,
) -> Vec<Duration> {
    let ready = Barrier::new(clients);
    let (next, measured) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..clients {
            scope.spawn(|| {
                let mut connection = connect();
                ask(&mut connection);
                ready.wait();
                let start = Instant::now();
                while let Some(time) = times.get(next.fetch_add(1, Ordering::Relaxed)) {
                    thread::sleep(time.saturating_sub(start.elapsed()));
                    let latency = ask(&mut connection);
                    measured.lock().unwrap().push(latency);
                }
            });
        }
    });
    measured.into_inner().unwrap()
}

/// One side of a figure: what gives its rate, and the processes that serve it.
pub(crate) struct Side<F> {
    pub(crate) rate: F,
    pub(crate) servers: Vec<u32>,
}

/// Measures both sides in turn, ours first.
pub(crate) fn in_turn(plan: Plan, ours: Side<impl Fn() -> f64>, floor: Side<impl Fn() -> f64>) -> Vec<Pair> {
    pairs(plan, || ours.measure(plan), || floor.measure(plan))
}

/// The same for what has a measure of its own.
pub(crate) fn pairs(plan: Plan, ours: impl Fn() -> Measured, floor: impl Fn() -> Measured) -> Vec<Pair> {
    (0..plan.rounds).map(|_| Pair { ours: ours(), floor: floor() }).collect()
}

impl<F: Fn() -> f64> Side<F> {
    /// All that serves it has ended when the rate is known.
    pub(crate) fn alone(rate: F) -> Self {
        Self { rate, servers: Vec::new() }
    }

    pub(crate) fn measure(&self, plan: Plan) -> Measured {
        let before = processor_time(&self.servers);
        let rate = (self.rate)();
        let spent = processor_time(&self.servers) - before;
        Measured { rate, processor_time: spent / (rate * plan.duration.as_secs_f64()) }
    }
}

/// Of servers with all their children, of the clients, which are threads of this process, and of its children that have
/// ended; in seconds.
pub(crate) fn processor_time(servers: &[u32]) -> f64 {
    servers.iter().map(|server| of_tree(*server)).sum::<f64>() + of_process(std::process::id())
}

/// A child that ends meanwhile is counted for its parent from then on.
fn of_tree(pid: u32) -> f64 {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children = children.split_whitespace().filter_map(|child| child.parse().ok());
    children.map(of_tree).sum::<f64>() + of_process(pid)
}

/// utime, stime, cutime and cstime of proc_pid_stat(5), in seconds.
fn of_process(pid: u32) -> f64 {
    /// USER_HZ is 100 on every architecture that Rust knows.
    const TICKS_PER_SECOND: f64 = 100.0;
    // A child may be gone by now.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ');
    let ticks: f64 = fields.skip(11).take(4).filter_map(|field| field.parse::<f64>().ok()).sum();
    ticks / TICKS_PER_SECOND
}
