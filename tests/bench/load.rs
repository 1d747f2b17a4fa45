//! Clients, as many as asked for, each with a connection of its own and one question at a time.
//!
//! Each is a thread that sleeps in read(2) until its answer comes, as each smtpd(8) of Postfix is a process that does. A few
//! threads with epoll(7) for all of them would cost a third less, and be nobody's client.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::Plan;
use crate::accounting::{Measuring, Server, Watch};
use crate::report::{Measured, Round};

/// A connection over which one question is asked again and again.
pub(crate) trait Client {
    /// Asks.
    fn ask(&mut self);

    /// Reads what has come, waiting until something has, and goes on; whether the question is answered to its end.
    fn advance(&mut self) -> bool;

    /// Asks, and waits for the end of the answer.
    fn ask_and_wait(&mut self) {
        self.ask();
        while !self.advance() {}
    }
}

/// How many questions were answered in which time.
pub(crate) struct Answered {
    pub(crate) count: f64,
    pub(crate) seconds: f64,
}

impl Answered {
    pub(crate) fn per_second(&self) -> f64 {
        self.count / self.seconds
    }
}

/// Asks for as long as is planned. Connecting, and each client's first question, are not in the time.
pub(crate) fn ask<C: Client>(clients: usize, plan: Plan, connect: impl Fn() -> C + Sync) -> Answered {
    let start = Barrier::new(clients);
    let rates = thread::scope(|scope| {
        let clients: Vec<_> = (0..clients)
            .map(|_| {
                scope.spawn(|| {
                    let mut client = connect();
                    client.ask_and_wait();
                    start.wait();
                    keep_asking(&mut client, plan.duration)
                })
            })
            .collect();
        let clients = clients.into_iter().map(|client| client.join().expect("a client that got its answers"));
        clients.collect::<Vec<_>>()
    });
    let seconds = plan.duration.as_secs_f64();
    // Of each in its own time: one may have to wait for its last answer when others are done.
    Answered { count: rates.iter().map(Answered::per_second).sum::<f64>() * seconds, seconds }
}

/// As many as this machine has.
pub(crate) fn processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

fn keep_asking(client: &mut impl Client, duration: Duration) -> Answered {
    let (began, mut count) = (Instant::now(), 0_u32);
    while began.elapsed() < duration {
        client.ask_and_wait();
        count += 1;
    }
    Answered { count: count.into(), seconds: began.elapsed().as_secs_f64() }
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

/// One side of a figure: what asks, and who is asked.
pub(crate) struct Side<F> {
    pub(crate) ask: F,
    pub(crate) measuring: Measuring,
    pub(crate) servers: Vec<Server>,
}

/// Measures both sides in turn, ours first.
pub(crate) fn in_turn(
    plan: Plan,
    ours: &Side<impl Fn() -> Answered>,
    floor: &Side<impl Fn() -> Answered>,
) -> Vec<Round> {
    rounds(plan, || Round { ours: ours.measure(), floor: floor.measure(), references: Vec::new() })
}

/// The same for what has more sides.
pub(crate) fn rounds(plan: Plan, round: impl Fn() -> Round) -> Vec<Round> {
    (0..plan.rounds).map(|_| round()).collect()
}

impl<F: Fn() -> Answered> Side<F> {
    /// What these servers answer.
    pub(crate) fn of(servers: Vec<Server>, ask: F) -> Self {
        Self { ask, measuring: Measuring::Servers, servers }
    }

    /// What a child does that has ended when the rate is known.
    pub(crate) fn child(ask: F) -> Self {
        Self { ask, measuring: Measuring::Children, servers: Vec::new() }
    }

    pub(crate) fn measure(&self) -> Measured {
        let watch = Watch::start(self.measuring, &self.servers);
        let answered = (self.ask)();
        Measured { rate: answered.per_second(), spent: watch.end().each(answered.count) }
    }
}
