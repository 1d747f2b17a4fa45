//! Clients, as many as asked for, each with a thread and a connection of its own and one question at a time.

use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use crate::Plan;
use crate::report::Pair;

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

/// Measures both sides in turn, ours first.
pub(crate) fn in_turn(plan: Plan, ours: impl Fn() -> f64, floor: impl Fn() -> f64) -> Vec<Pair> {
    (0..plan.rounds).map(|_| Pair { ours: ours(), floor: floor() }).collect()
}
