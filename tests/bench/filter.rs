//! Messages whose recipients have filters, against the same programs run with nothing around them.

use std::path::Path;

use crate::floors::Floor;
use crate::load::Side;
use crate::milter::{self, End, Message};
use crate::report::{Outcome, Waits};
use crate::site::{FILTERED, READERS, Site};
use crate::{Plan, load};

/// One filter that ends at once.
pub(crate) fn one(site: &Site, plan: Plan) -> Outcome {
    const CONNECTIONS: usize = 4;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let message = Message::new(&[FILTERED], 4096);
    let pairs = load::in_turn(
        plan,
        Side {
            rate: || milter::rate(&site.milter, &message, CONNECTIONS, plan, End::Accepted),
            servers: site.processes(),
        },
        Side::alone(|| runs(site, plan, cores, FILTERED, "/dev/null".as_ref())),
    );
    site.expect_log("filtered=accept (message: exit 0,");
    Outcome::Measured(pairs)
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
    let pairs = load::in_turn(
        plan,
        Side {
            rate: || milter::rate(&site.milter, &message, CONNECTIONS, plan, End::Refused),
            servers: site.processes(),
        },
        // As many at a time as filters of both connections: on a busy machine more processes get more of it.
        Side::alone(|| {
            runs(&site, plan, CONNECTIONS * readers.len(), readers[0], &file) / f64::from(READERS)
        }),
    );
    site.expect_log("reader9=reject (message: exit 0,");
    Outcome::Measured(pairs)
}

/// How long a filter that ends at once keeps the MTA waiting, with half as many messages as either side can take.
///
/// Messages come when they come, whether or not those before have been answered: clients that wait for each other would
/// leave the daemon in peace whenever it is slow.
pub(crate) fn latency(_: &Site, plan: Plan) -> Outcome {
    let site = Site::start_with("max-processes-per-user = 64");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let message = Message::new(&[FILTERED], 4096);
    let account = site.users.account(FILTERED);
    let (ids, filter) = ((account.uid, account.gid), site.message_filter(FILTERED));
    let rounds = (0..plan.rounds).map(|_| {
        let capacity = milter::rate(&site.milter, &message, 4, plan, End::Accepted);
        let ours = milter::waits(
            &site.milter,
            &message,
            &load::arrivals(capacity / 2.0, plan.duration),
            End::Accepted,
        );
        let capacity = runs(&site, plan, cores, FILTERED, "/dev/null".as_ref());
        let floor = Floor::spawn_now_and_then(plan.duration, capacity / 2.0, ids, &filter);
        Waits { ours, floor }
    });
    let rounds = rounds.collect();
    site.expect_log("filtered=accept (message: exit 0,");
    Outcome::Waited(rounds)
}

/// Runs per second of a user's filter with nothing around it.
pub(crate) fn runs(site: &Site, plan: Plan, at_a_time: usize, user: &str, input: &Path) -> f64 {
    let account = site.users.account(user);
    let ids = (account.uid, account.gid);
    Floor::spawn(plan.duration, at_a_time, ids, &site.message_filter(user), input)
}
