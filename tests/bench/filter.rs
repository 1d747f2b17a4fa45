//! Messages whose recipients have filters, against the same programs run with nothing around them.

use std::path::Path;

use crate::floors::{Batches, Floor};
use crate::load::{Answered, Side};
use crate::milter::{self, End, Message};
use crate::report::{Outcome, Round, Waits};
use crate::site::{FILTERED, READERS, Site};
use crate::{Plan, load};

/// One filter that ends at once.
pub(crate) fn one(site: &Site, plan: Plan) -> Outcome {
    const CONNECTIONS: usize = 4;
    let message = Message::new(&[FILTERED], 4096);
    let send = |address: &str, end| milter::send(address, &message, CONNECTIONS, plan, end);
    let ours = Side::of(site.servers(), || send(&site.milter, End::Accepted));
    let rounds = against_parts(plan, &ours, send, || bare_runs(site, plan, FILTERED));
    site.expect_log("filtered=accept (message: exit 0,");
    Outcome::Measured(rounds)
}

/// Ten filters that read all of a larger message.
///
/// All ten refuse (exit status 0 is made to mean that): were one to accept, the outcome would be known before the others
/// have ended, and they would not be waited for.
pub(crate) fn ten(_: &Site, plan: Plan) -> Outcome {
    const CONNECTIONS: usize = 2;
    const SIZE: usize = 1 << 20;
    let site = Site::start_with("exit-status = { 0 = \"reject\" }");
    let readers: Vec<String> = (0..READERS).map(|n| format!("reader{n}")).collect();
    let readers: Vec<&str> = readers.iter().map(String::as_str).collect();
    let message = Message::new(&readers, SIZE);
    let file = site.sandbox.write("message", message.content());
    let send = |address: &str, end| milter::send(address, &message, CONNECTIONS, plan, end);
    let ours = Side::of(site.servers(), || send(&site.milter, End::Refused));
    let rounds = against_parts(plan, &ours, send, || {
        // As many at a time as filters of both connections: on a busy machine more processes get more of it.
        let runs = runs(&site, plan, CONNECTIONS * readers.len(), readers[0], &file);
        Answered { count: runs.count / f64::from(READERS), ..runs }
    });
    site.expect_log("reader9=reject (message: exit 0,");
    Outcome::Measured(rounds)
}

/// Against the runs, and against the runs together with what it takes to be told the message by this protocol.
fn against_parts(
    plan: Plan,
    ours: &Side<impl Fn() -> Answered>,
    send: impl Fn(&str, End) -> Answered,
    runs: impl Fn() -> Answered,
) -> Vec<Round> {
    let milter = Floor::milter();
    let told = Side::of(milter.servers(), || send(&milter.address, End::Accepted));
    let runs = Side::child(runs);
    load::rounds(plan, || {
        let (ours, floor, told) = (ours.measure(), runs.measure(), told.measure());
        let sum = told.then(&floor);
        Round { ours, floor, references: vec![("floor of milter, then the runs", sum)] }
    })
}

/// How long a filter that ends at once keeps the MTA waiting, with half as many messages as either side can take.
///
/// Messages come when they come, whether or not those before have been answered: clients that wait for each other would
/// leave the daemon in peace whenever it is slow.
pub(crate) fn latency(_: &Site, plan: Plan) -> Outcome {
    let site = Site::start_with("max-processes-per-user = 64");
    let message = Message::new(&[FILTERED], 4096);
    let account = site.users.account(FILTERED);
    let (ids, filter) = ((account.uid, account.gid), site.message_filter(FILTERED));
    let rounds = (0..plan.rounds).map(|_| {
        let capacity = milter::send(&site.milter, &message, 4, plan, End::Accepted).per_second();
        let ours = milter::waits(
            &site.milter,
            &message,
            &load::arrivals(capacity / 2.0, plan.duration),
            End::Accepted,
        );
        let capacity = bare_runs(&site, plan, FILTERED).per_second();
        let floor = Floor::spawn_now_and_then(plan.duration, capacity / 2.0, ids, &filter);
        Waits { ours, floor }
    });
    let rounds = rounds.collect();
    site.expect_log("filtered=accept (message: exit 0,");
    Outcome::Waited(rounds)
}

/// Runs a user's filter with nothing around it and nothing to read, as many at a time as there are processors.
pub(crate) fn bare_runs(site: &Site, plan: Plan, user: &str) -> Answered {
    runs(site, plan, load::processors(), user, "/dev/null".as_ref())
}

fn runs(site: &Site, plan: Plan, at_a_time: usize, user: &str, input: &Path) -> Answered {
    let account = site.users.account(user);
    let ids = (account.uid, account.gid);
    Floor::spawn(plan.duration, at_a_time, ids, &site.message_filter(user), input)
}

/// The same loop, to be run beside something else.
pub(crate) fn batches(site: &Site, user: &str) -> Batches {
    let account = site.users.account(user);
    Batches::start(load::processors(), (account.uid, account.gid), &site.message_filter(user))
}
