//! A whole Postfix, fed by its own smtp-source(1): what usermilter costs a site, and what of that any milter costs.

use std::process::Command;
use std::time::Instant;

use crate::Plan;
use crate::accounting::{Measuring, Server, Watch};
use crate::common::{self, Postfix};
use crate::filter;
use crate::floors::{Batches, Floor};
use crate::least::Stage;
use crate::load::{self, Side};
use crate::report::{Measured, Outcome, Round};
use crate::site::{self, FILTERED, PLAIN, SENDER, Site};

/// At a time, each with one message, as most of a site's are.
const SESSIONS: usize = 10;

/// Messages of one run of smtp-source.
const BATCH: usize = 100;

/// Users without filters, against the same Postfix without a milter, and with milters that do nothing.
pub(crate) fn no_filter(_: &Site, plan: Plan) -> Outcome {
    if !common::is_root() {
        return Outcome::Skipped("Postfix wants root".into());
    }
    let site = Site::start_judging_loopback();
    let ours = Instance::start(PLAIN, Some((&site.milter, site.servers())));
    let alone = Instance::start(PLAIN, None);
    let milters = [
        ("Postfix with the floor of milter", Floor::prompt_milter()),
        ("Postfix with the least milter, until DATA", Floor::least(Stage::Data)),
        ("Postfix with the least milter, until connect", Floor::least(Stage::Connect)),
    ];
    let references = milters
        .each_ref()
        .map(|(name, milter)| (*name, Instance::start(PLAIN, Some((&milter.address, milter.servers())))));
    let rounds = load::rounds(plan, || Round {
        ours: ours.measure(plan),
        floor: alone.measure(plan),
        references: references.iter().map(|(name, instance)| (*name, instance.measure(plan))).collect(),
    });
    site.expect_log(&format!("{PLAIN}=accept"));
    Outcome::Measured(rounds)
}

/// One filter for each message, against whichever is slower: Postfix without a milter, or the filter with nothing around
/// it. Its processor time is that of both. They share the processors here, so they are measured together too.
pub(crate) fn filter(_: &Site, plan: Plan) -> Outcome {
    if !common::is_root() {
        return Outcome::Skipped("Postfix wants root".into());
    }
    let site = Site::start_judging_loopback();
    let ours = Instance::start(FILTERED, Some((&site.milter, site.servers())));
    let alone = Instance::start(FILTERED, None);
    let milter = Floor::prompt_milter();
    let with_floor = Instance::start(FILTERED, Some((&milter.address, milter.servers())));
    let runs = Side::child(|| filter::bare_runs(&site, plan, FILTERED));
    let rounds = load::rounds(plan, || {
        let (ours, alone_rate, bare) = (ours.measure(plan), alone.measure(plan), runs.measure());
        let floor =
            Measured { rate: alone_rate.rate.min(bare.rate), spent: bare.spent.and(&alone_rate.spent) };
        let beside = |instance: &Instance| instance.measure_beside(plan, filter::batches(&site, FILTERED));
        let references = vec![
            ("Postfix alone, the loop beside it", beside(&alone)),
            ("Postfix with the floor of milter, the loop beside it", beside(&with_floor)),
        ];
        Round { ours, floor, references }
    });
    site.expect_log(&format!("{FILTERED}=accept"));
    Outcome::Measured(rounds)
}

struct Instance {
    postfix: Postfix,
    servers: Vec<Server>,
    recipient: String,
}

impl Instance {
    /// For mail to one user, through a milter or none.
    fn start(user: &str, milter: Option<(&str, Vec<Server>)>) -> Self {
        let recipient = site::address_of(user);
        // Nothing is delivered: the same work on either side would only bring the ratio nearer to 1.
        let mut builder = Postfix::builder().mailboxes(&[&recipient]).process_limit(100);
        builder = builder.set("virtual_transport", "discard:");
        let mut servers = Vec::new();
        if let Some((address, of_milter)) = milter {
            builder = builder.milter(address);
            servers = of_milter;
        }
        let postfix = builder.start();
        servers.push(Server { pid: postfix.pid(), name: "master" });
        let instance = Self { postfix, servers, recipient };
        // Processes start with the first messages.
        instance.send_batch();
        instance
    }

    /// For about as long as is planned, with an empty queue before and after.
    fn measure(&self, plan: Plan) -> Measured {
        self.measure_each(plan, self.servers.clone(), || self.send_batch())
    }

    /// While a loop runs a program as often as there are messages.
    fn measure_beside(&self, plan: Plan, mut batches: Batches) -> Measured {
        let mut servers = self.servers.clone();
        servers.push(batches.server());
        self.measure_each(plan, servers, || batches.run_beside(BATCH, || self.send_batch()))
    }

    fn measure_each(&self, plan: Plan, servers: Vec<Server>, mut batch: impl FnMut()) -> Measured {
        let mut watch = Watch::start(Measuring::Servers, &servers);
        let (began, mut sent) = (Instant::now(), 0);
        while began.elapsed() < plan.duration {
            batch();
            sent += BATCH;
            // An smtpd ends after a hundred sessions.
            watch.look();
        }
        let rate = sent as f64 / began.elapsed().as_secs_f64();
        self.postfix.wait_queue_empty();
        Measured { rate, spent: watch.end().each(sent as f64) }
    }

    fn send_batch(&self) {
        let mut command = Command::new(common::require("smtp-source"));
        command.args(["-s", &SESSIONS.to_string(), "-m", &BATCH.to_string(), "-l", "4096"]);
        command.args(["-f", SENDER, "-t", &self.recipient]);
        let status = command.arg(format!("127.0.0.1:{}", self.postfix.port())).status().expect("smtp-source");
        assert!(status.success(), "smtp-source: {status}\n{}", self.postfix.log());
    }
}
