//! A whole Postfix, fed by its own smtp-source(1): what usermilter costs a site.

use std::process::Command;
use std::time::Instant;

use crate::Plan;
use crate::common::{self, Postfix};
use crate::filter;
use crate::load::{self, Side};
use crate::report::{Measured, Outcome};
use crate::site::{self, FILTERED, PLAIN, SENDER, Site};

/// At a time, each with one message, as most of a site's are.
const SESSIONS: usize = 10;

/// Messages of one run of smtp-source.
const BATCH: usize = 100;

/// Users without filters, against the same Postfix without a milter.
pub(crate) fn no_filter(_: &Site, plan: Plan) -> Outcome {
    against_alone(plan, PLAIN, |alone| alone.measure(plan, PLAIN))
}

/// One filter for each message, against whichever is slower: Postfix without a milter, or the filter with nothing around
/// it. Its processor time is that of both.
pub(crate) fn filter(site: &Site, plan: Plan) -> Outcome {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runs = Side::alone(|| filter::runs(site, plan, cores, FILTERED, "/dev/null".as_ref()));
    against_alone(plan, FILTERED, |alone| {
        let (alone, bare) = (alone.measure(plan, FILTERED), runs.measure(plan));
        Measured {
            rate: alone.rate.min(bare.rate),
            processor_time: alone.processor_time + bare.processor_time,
        }
    })
}

fn against_alone(plan: Plan, user: &str, floor: impl Fn(&Instance) -> Measured) -> Outcome {
    if !common::is_root() {
        return Outcome::Skipped("Postfix wants root".into());
    }
    let site = Site::start_judging_loopback();
    let alone = Instance::start(None);
    let with_milter = Instance::start(Some(&site));
    // Processes start with the first messages.
    for instance in [&alone, &with_milter] {
        instance.send(BATCH, user);
    }
    let pairs = load::pairs(plan, || with_milter.measure(plan, user), || floor(&alone));
    site.expect_log(&format!("{user}=accept"));
    Outcome::Measured(pairs)
}

struct Instance {
    postfix: Postfix,
    servers: Vec<u32>,
}

impl Instance {
    fn start(site: Option<&Site>) -> Self {
        let mailboxes = [PLAIN, FILTERED].map(site::address_of);
        let mailboxes = mailboxes.each_ref().map(String::as_str);
        // Nothing is delivered: the same work on either side would only bring the ratio nearer to 1.
        let mut builder = Postfix::builder().mailboxes(&mailboxes).process_limit(100);
        builder = builder.set("virtual_transport", "discard:");
        if let Some(site) = site {
            builder = builder.milter(&site.milter);
        }
        let postfix = builder.start();
        let servers =
            [postfix.pid()].into_iter().chain(site.iter().flat_map(|site| site.processes())).collect();
        Self { postfix, servers }
    }

    /// Messages per second, for about as long as is planned, with an empty queue before and after.
    fn measure(&self, plan: Plan, user: &str) -> Measured {
        let (before, began, mut sent) = (load::processor_time(&self.servers), Instant::now(), 0);
        while began.elapsed() < plan.duration {
            self.send(BATCH, user);
            sent += BATCH;
        }
        let rate = sent as f64 / began.elapsed().as_secs_f64();
        self.postfix.wait_queue_empty();
        Measured { rate, processor_time: (load::processor_time(&self.servers) - before) / sent as f64 }
    }

    fn send(&self, messages: usize, user: &str) {
        let mut command = Command::new(common::require("smtp-source"));
        command.args(["-s", &SESSIONS.to_string(), "-m", &messages.to_string(), "-l", "4096"]);
        command.args(["-f", SENDER, "-t", &site::address_of(user)]);
        let status = command.arg(format!("127.0.0.1:{}", self.postfix.port())).status().expect("smtp-source");
        assert!(status.success(), "smtp-source: {status}\n{}", self.postfix.log());
    }
}
