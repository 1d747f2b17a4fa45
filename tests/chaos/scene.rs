//! What every scenario has: a Postfix, a site with a filter of every verdict, load, and the count at the end.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io::Read;
use std::iter::Sum;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::common::postfix::Postfix;
use super::common::site::{Site, SiteBuilder, own_uid};
use super::common::smtp::Reply;
use super::common::{Usermilter, free_port, wait_until};
use super::load::{Client, FIELD, Fate, Load, Offer};
use super::site::descriptors;

/// Everybody who gets mail. What their filters say is in [`site`]; `rogue` has the faulty one, alice and robert are
/// those of the recorded sessions.
const USERS: [&str; 10] =
    ["accept", "reject", "defer", "error", "slow", "plain", "ruled", "rogue", "alice", "robert"];

/// Those who may refuse a message for good.
const REFUSERS: [&str; 2] = ["reject", "ruled"];

/// What is right when nothing is broken: recipients, the code of the reply that decides, and its words.
const RIGHT: &[(&[&str], u16, &str)] = &[
    (&["accept"], 250, ""),
    (&["reject"], 550, "not wanted"),
    (&["defer"], 451, "not now"),
    (&["error"], 250, ""),
    (&["slow"], 250, ""),
    (&["plain"], 250, ""),
    (&["ruled"], 550, ""),
    (&["accept", "reject"], 250, ""),
    (&["reject", "ruled"], 550, "not wanted"),
];

/// Longer than any restart, time limit or drain here, on a busy machine.
const RECOVERY: Duration = Duration::from_secs(60);

/// A Postfix, and addresses where each scenario's daemon listens in turn.
pub(crate) struct Lane {
    pub(crate) postfix: Postfix,
    number: u32,
    milter: String,
    policy: String,
}

impl Lane {
    pub(crate) fn new(number: usize) -> Self {
        let [milter, policy] = [(); 2].map(|()| format!("inet:127.0.0.1:{}", free_port()));
        let postfix = Postfix::builder().milter(&milter).policy(&policy).mailboxes(&USERS).process_limit(40);
        Self { postfix: postfix.start(), number: u32::try_from(number).unwrap(), milter, policy }
    }

    /// Where the daemon serves milter clients.
    pub(crate) fn milter(&self) -> &str {
        &self.milter
    }

    /// Where it serves policy clients.
    pub(crate) fn policy(&self) -> &str {
        &self.policy
    }

    /// The uid of the user with the faulty filter, whose processes are nobody else's.
    pub(crate) fn rogue_uid(&self) -> u32 {
        own_uid(self.number)
    }
}

/// Whether there is more time than in `make test`.
pub(crate) fn is_long() -> bool {
    std::env::var("CHAOS").is_ok_and(|value| value == "long")
}

/// The first in `make test`, the second in `make chaos`.
pub(crate) fn short_or_long<T>(short: T, long: T) -> T {
    if is_long() { long } else { short }
}

/// A site with a filter of every verdict, on the lane's addresses.
pub(crate) fn site(lane: &Lane) -> SiteBuilder {
    let uids = USERS.iter().zip(5001..).map(|(name, uid)| (*name, uid));
    let users: Vec<(&str, u32)> =
        uids.map(|(name, uid)| (name, if name == "rogue" { lane.rogue_uid() } else { uid })).collect();
    let site = Site::of(&users)
        .milter_at(&lane.milter)
        .policy_at(&lane.policy)
        // Longer than any SMTP session of the load.
        .set("server", "drain-timeout", "\"20s\"")
        .set("filter", "timeout", "\"5s\"")
        .set("filter", "memory-limit", "\"4K\"")
        .filter("accept", "message", "#!/bin/sh\ncat > /dev/null\n")
        .filter("reject", "message", "#!/bin/sh\necho not wanted\nexit 77\n")
        .filter("defer", "message", "#!/bin/sh\necho not now\nexit 75\n")
        .filter("error", "message", "#!/bin/sh\necho complaint >&2\nexit 1\n")
        .filter("slow", "message", "#!/bin/sh\nsleep 0.3\n");
    site.users.file("ruled", "rules.toml", "default = \"reject\"\n");
    site
}

/// A running site under load.
pub(crate) struct Scene<'a> {
    pub(crate) lane: &'a Lane,
    pub(crate) site: Site,
    /// For whoever starts the daemon anew.
    pub(crate) config: String,
    pub(crate) load: Load,
    name: String,
    prober: Client,
    probes: Vec<Offer>,
    usual: Open,
}

/// Open descriptors but for sockets, of which Postfix has some open as long as it likes.
#[derive(Debug)]
struct Open {
    monitor: usize,
    worker: usize,
}

impl Open {
    fn now(daemon: &Usermilter) -> Self {
        let count = |pid| {
            let open = descriptors(pid);
            open.iter().filter(|(_, link)| !link.to_string_lossy().starts_with("socket:")).count()
        };
        Self { monitor: count(daemon.pid()), worker: count(daemon.worker_pid()) }
    }
}

/// Runs a scenario: load, the fault, load again, and the count.
pub(crate) fn with_fault(lane: &Lane, site: SiteBuilder, fault: impl FnOnce(&mut Scene)) -> Counts {
    run(lane, site, false, fault)
}

/// The same with mail for the user with the faulty filter.
pub(crate) fn with_rogue(lane: &Lane, site: SiteBuilder, fault: impl FnOnce(&mut Scene)) -> Counts {
    run(lane, site, true, fault)
}

fn run(lane: &Lane, site: SiteBuilder, with_rogue: bool, fault: impl FnOnce(&mut Scene)) -> Counts {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let name = format!("scenario{}", NUMBER.fetch_add(1, Ordering::Relaxed));
    let config = site.config();
    let site = site.start();
    let port = lane.postfix.port();
    let usual = Open::now(&site.daemon);
    let prober = Client::new(port, format!("{name}-probe"));
    let load = Load::start(port, &name, with_rogue);
    let mut scene = Scene { lane, site, config, load, name, prober, probes: Vec::new(), usual };
    scene.wait_right();
    scene.load.wait_accepted(short_or_long(10, 200));
    fault(&mut scene);
    scene.wait_right();
    scene.load.wait_accepted(short_or_long(10, 200));
    scene.finish()
}

impl Scene<'_> {
    /// Waits until every recipient's verdict is right.
    #[track_caller]
    pub(crate) fn wait_right(&mut self) {
        for &(recipients, code, words) in RIGHT {
            self.wait_verdict(recipients, code, words);
        }
    }

    #[track_caller]
    fn wait_verdict(&mut self, recipients: &'static [&'static str], code: u16, words: &str) {
        let mut said = None;
        let right = wait_until(RECOVERY, || {
            said = self.probe(recipients);
            said.as_ref().is_some_and(|reply| reply.code == code && reply.text().contains(words))
        });
        assert!(right, "{recipients:?}: {said:?} and not {code}");
    }

    /// Whether every recipient's verdict is right now, be the fault as it may.
    #[track_caller]
    pub(crate) fn assert_right(&mut self) {
        for &(recipients, code, words) in RIGHT {
            let said = self.probe(recipients);
            let right = said.as_ref().is_some_and(|reply| reply.code == code && reply.text().contains(words));
            assert!(right, "{recipients:?}: {said:?} and not {code}");
        }
    }

    /// Offers a message, which counts like any other; the reply that decided.
    fn probe(&mut self, recipients: &[&'static str]) -> Option<Reply> {
        let offer = self.prober.offer(recipients);
        // A session that stood idle while a worker was drained would be told 451.
        self.prober.quit();
        self.probes.push(offer.clone());
        offer.reply.or_else(|| offer.recipients.into_iter().find_map(|(_, reply)| reply))
    }

    fn finish(self) -> Counts {
        let Scene { lane, mut site, load, name, mut probes, usual, .. } = self;
        let mut offers = load.finish();
        offers.append(&mut probes);
        let empty = wait_until(RECOVERY, || lane.postfix.queue_is_empty());
        assert!(empty, "the queue is not empty\n{}", queue(&lane.postfix));
        let counts = count(&offers, &delivered(&lane.postfix, &name));
        let monitor = site.daemon.pid();
        assert!(site.daemon.status().is_none(), "the daemon has ended");
        // Nothing is left of what went wrong: no descriptor, no process, no zombie.
        let alone = wait_until(RECOVERY, || children(monitor) == site.daemon.worker_pids());
        assert!(alone, "the monitor has children {:?}", children(monitor));
        let mut open = Open::now(&site.daemon);
        let clean = wait_until(RECOVERY, || {
            open = Open::now(&site.daemon);
            open.monitor <= usual.monitor && open.worker <= usual.worker
        });
        assert!(clean, "{open:?} and not {usual:?}: {:?}", descriptors(site.daemon.worker_pid()));
        counts
    }
}

fn queue(postfix: &Postfix) -> String {
    let listed = postfix.command("postqueue").arg("-p").output().unwrap();
    String::from_utf8_lossy(&listed.stdout).into_owned()
}

fn children(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// Copies by message and user.
type Copies = HashMap<(String, &'static str), usize>;

fn delivered(postfix: &Postfix, name: &str) -> Copies {
    let mut copies = Copies::new();
    let prefix = format!("{name}-");
    for user in USERS {
        let directory = postfix.directory().join("mail/virtual").join(user).join("new");
        for entry in fs::read_dir(directory).into_iter().flatten() {
            if let Some(id) = id_of(&entry.unwrap().path()).filter(|id| id.starts_with(&prefix)) {
                *copies.entry((id, user)).or_default() += 1;
            }
        }
    }
    copies
}

fn id_of(path: &Path) -> Option<String> {
    let mut header = Vec::new();
    fs::File::open(path).unwrap().take(4096).read_to_end(&mut header).unwrap();
    let header = String::from_utf8_lossy(&header).into_owned();
    header.lines().find_map(|line| Some(line.strip_prefix(FIELD)?.strip_prefix(": ")?.to_owned()))
}

/// Messages, and copies of them that were delivered.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    offered: usize,
    accepted: usize,
    refused: usize,
    deferred: usize,
    delivered: usize,
}

impl Counts {
    pub(crate) const HEADING: &str = "offered accepted refused deferred   copies";
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts { offered, accepted, refused, deferred, delivered } = self;
        write!(f, "{offered:>7} {accepted:>8} {refused:>7} {deferred:>8} {delivered:>8}")
    }
}

impl Sum for Counts {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), |a, b| Self {
            offered: a.offered + b.offered,
            accepted: a.accepted + b.accepted,
            refused: a.refused + b.refused,
            deferred: a.deferred + b.deferred,
            delivered: a.delivered + b.delivered,
        })
    }
}

/// Holds what was said to clients against what is in the mailboxes.
#[track_caller]
fn count(offers: &[Offer], copies: &Copies) -> Counts {
    let mut counts = Counts { offered: offers.len(), delivered: copies.values().sum(), ..Counts::default() };
    let mut wrong = String::new();
    for offer in offers {
        let fate = offer.fate();
        match fate {
            Fate::Accepted => counts.accepted += 1,
            Fate::Refused => counts.refused += 1,
            Fate::Deferred => counts.deferred += 1,
        }
        for (user, reply) in &offer.recipients {
            let refused = reply.as_ref().is_some_and(|reply| reply.code >= 500);
            let is_due = fate == Fate::Accepted && offer.taken().any(|name| name == *user);
            let found = copies.get(&(offer.id.clone(), *user)).copied().unwrap_or(0);
            let right = found == usize::from(is_due) || offer.in_doubt && found == 1;
            if !right || refused && *user != "ruled" {
                wrong += &format!("{found} copies for {user} of {offer:?}\n");
            }
        }
        // Whoever was put off or refused at RCPT TO has no part in the rest.
        if fate == Fate::Refused && !offer.taken().all(|user| REFUSERS.contains(&user)) {
            wrong += &format!("refused for good: {offer:?}\n");
        }
    }
    let known: usize = offers.iter().map(|offer| offer.recipients.len()).sum();
    assert!(counts.delivered <= known, "{} copies of {known} at most", counts.delivered);
    assert!(wrong.is_empty(), "{wrong}");
    counts
}
