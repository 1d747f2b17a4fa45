//! More than one machine: three daemons behind HAProxy, with the very `postfix/haproxy.cfg`, users in slapd, and one
//! Postfix whose main.cf has the fragments of `postfix/`. The daemons share what machines would: the directory and the
//! homes.
//!
//! ```text
//!   clients ──SMTP──▶ Postfix ──milter, policy──▶ HAProxy ──▶ usermilter one, two, three ──▶ slapd, homes
//! ```

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;
#[allow(dead_code, reason = "other tests use more of it")]
mod slapd;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use common::policy::{self, Request};
use common::postfix::fragment;
use common::process::Server;
use common::site::SiteBuilder;
use common::smtp::{Client, Reply};
use common::{Postfix, Sandbox, Site, Usermilter, free_port, wait_until};
use nix::sys::signal::Signal;
use slapd::{DAEMON, DAEMON_PASSWORD, PEOPLE, Setup, Slapd};

const NAMES: [&str; 3] = ["one", "two", "three"];

/// The directory refuses for `listed` whatever comes from spam.example; `rules.toml` of `early` everybody.
const USERS: [(&str, u32); 5] =
    [("yes", 6001), ("no", 6002), ("later", 6003), ("listed", 6004), ("early", 6005)];

/// Longer than HAProxy takes to notice that a server is down or up again.
const NOTICE: Duration = Duration::from_secs(60);

/// HAProxy, and the libraries that a machine without it may lack.
const HAPROXY_PACKAGES: [&str; 4] =
    ["haproxy", "liblua5.3-0", "libopentracing1", "libopentracing-c-wrapper0"];

/// HAProxy with `postfix/haproxy.cfg`, in which nothing is changed but addresses (and what `edit` changes).
struct HaProxy {
    _server: Server,
    sandbox: Sandbox,
    milter: String,
    policy: String,
}

impl HaProxy {
    fn start(servers: &[Ports], edit: impl Fn(String) -> String) -> Self {
        let unpacked = common::unpacked("haproxy", &HAPROXY_PACKAGES);
        let sandbox = Sandbox::new();
        let own = Ports::new();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("postfix/haproxy.cfg");
        let mut text = fs::read_to_string(path).unwrap();
        let mut replace = |from: &str, to: &str| {
            let (from, to) = (format!(" {from}\n"), format!(" {to}\n"));
            assert_eq!(text.matches(&from).count(), 1, "{from}");
            text = text.replace(&from, &to);
        };
        replace("bind 127.0.0.1:8890", &format!("bind 127.0.0.1:{}", own.milter));
        replace("bind 127.0.0.1:8891", &format!("bind 127.0.0.1:{}", own.policy));
        for (n, ports) in (1..).zip(servers) {
            for (documented, port) in [(8890, ports.milter), (8891, ports.policy)] {
                replace(
                    &format!("192.0.2.{n}:{documented} check port 8892"),
                    &format!("127.0.0.1:{port} check port {}", ports.metrics),
                );
            }
        }
        // What Debian's own configuration has in the place of this.
        let global = sandbox.write(
            "haproxy.cfg",
            format!("global\n    stats socket {} mode 600 level admin\n", sandbox.join("admin").display()),
        );
        let ours = sandbox.write("usermilter.cfg", edit(text));
        let mut command = Command::new(unpacked.join("usr/sbin/haproxy"));
        command.arg("-db").arg("-f").arg(global).arg("-f").arg(ours);
        command.env("LD_LIBRARY_PATH", common::libraries(&unpacked));
        let log = fs::File::create(sandbox.join("log")).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let haproxy = HaProxy {
            _server: Server::start(&mut command),
            sandbox,
            milter: format!("inet:127.0.0.1:{}", own.milter),
            policy: format!("inet:127.0.0.1:{}", own.policy),
        };
        for name in NAMES {
            haproxy.wait_for(name, "UP");
            // At first it takes all for up.
            let checked = || haproxy.column(name, "check_status").iter().all(|status| status == "L7OK");
            assert!(wait_until(NOTICE, checked), "{:?}", haproxy.column(name, "check_status"));
        }
        haproxy
    }

    /// A command of its administrative socket, as `echo COMMAND | socat stdio …` gives it.
    fn administer(&self, command: &str) -> String {
        let mut answer = String::new();
        if let Ok(mut socket) = UnixStream::connect(self.sandbox.join("admin")) {
            socket.write_all(format!("{command}\n").as_bytes()).unwrap();
            socket.read_to_string(&mut answer).unwrap();
        }
        answer
    }

    /// Of a server in both lists, what `show stat` has in a column.
    fn column(&self, server: &str, column: &str) -> Vec<String> {
        let table = self.administer("show stat");
        let mut lines =
            table.trim_start_matches("# ").lines().map(|line| line.split(',').collect::<Vec<_>>());
        let Some(at) = lines.next().and_then(|head| head.iter().position(|&name| name == column)) else {
            return Vec::new();
        };
        lines.filter(|line| line.get(1) == Some(&server)).map(|line| line[at].to_owned()).collect()
    }

    /// Waits until a server is in this state in both lists.
    #[track_caller]
    fn wait_for(&self, server: &str, state: &str) {
        // A server that is up, but with a failed check, is "UP 2/3".
        let reached = || self.column(server, "status").iter().filter(|found| *found == state).count() == 2;
        assert!(
            wait_until(NOTICE, reached),
            "{server} is not {state}: {:?}\n{}",
            self.column(server, "status"),
            fs::read_to_string(self.sandbox.join("log")).unwrap_or_default()
        );
    }
}

/// Where a daemon listens.
#[derive(Clone, Copy)]
struct Ports {
    milter: u16,
    policy: u16,
    metrics: u16,
}

impl Ports {
    fn new() -> Self {
        Ports { milter: free_port(), policy: free_port(), metrics: free_port() }
    }
}

/// All servers.
struct Cluster {
    // Dropped in this order: the MTA first, then what it asks.
    postfix: Postfix,
    haproxy: HaProxy,
    daemons: Vec<Usermilter>,
    ports: [Ports; 3],
    configurations: Vec<String>,
    site: SiteBuilder,
    _slapd: Slapd,
}

impl Cluster {
    fn start(edit: impl Fn(String) -> String) -> Self {
        // Long enough for a session to end by itself.
        let mut site = Site::of(&USERS).set("server", "drain-timeout", "\"1m\"");
        let entries: String = site_entries(&site);
        let slapd = Slapd::start(&Setup { entries: &entries, ..Setup::default() });
        site = site.resolvers(format!(
            "[[resolver]]\ntype = \"ldap\"\nuri = [\"{}\"]\nbind-dn = \"{DAEMON}\"\npassword-file = \"{}\"\n\
             base = \"{PEOPLE}\"\nfilter = \"(&(objectClass=usermilterUser)(mail=%s))\"\n",
            slapd.ldap(),
            slapd.password_file(DAEMON_PASSWORD)
        ));
        let ports = NAMES.map(|_| Ports::new());
        let mut configurations = Vec::new();
        for Ports { milter, policy, metrics } in ports {
            site = site
                .milter_at(&format!("inet:127.0.0.1:{milter}"))
                .policy_at(&format!("inet:127.0.0.1:{policy}"))
                .set("server", "metrics", &format!("\"inet:127.0.0.1:{metrics}\""));
            configurations.push(site.config());
        }
        let daemons = configurations.iter().map(|text| Usermilter::start(text)).collect();
        let haproxy = HaProxy::start(&ports, edit);
        let postfix = Postfix::builder()
            .mailboxes(&USERS.map(|(name, _)| name))
            .process_limit(40)
            .main_cf(&fragment("main.cf.milter", "inet:127.0.0.1:8890", &haproxy.milter))
            .main_cf(&fragment("main.cf.policy", "inet:127.0.0.1:8891", &haproxy.policy))
            .start();
        Cluster { postfix, haproxy, daemons, ports, configurations, site, _slapd: slapd }
    }

    /// As [`offer_to_yes`], from 127.0.0.1. Without XCLIENT, after which Postfix opens another connection to the milter.
    fn offer_as_neighbour(&self) -> u16 {
        let mut client = Client::connect(self.postfix.port());
        client.ehlo("localhost");
        offer(&mut client, Mail { number: 0, kind: Kind::Accept }).code
    }

    fn filter(&self, user: &str, name: &str, script: &str) {
        self.site.users.filter(user, name, script);
    }

    /// How many transactions and recipients each daemon has decided about.
    fn shares(&self) -> Vec<usize> {
        let finished = |daemon: &Usermilter| {
            let lines = daemon.log_lines();
            lines.iter().filter(|line| line.contains("outcome=")).count()
        };
        self.daemons.iter().map(finished).collect()
    }
}

/// The users' entries in the directory.
fn site_entries(site: &SiteBuilder) -> String {
    let entry = |&(name, uid): &(&str, u32)| {
        let home = site.users.account(name).home.display();
        let lists = if name == "listed" { "usermilterRejectSender: *@spam.example\n" } else { "" };
        format!(
            "dn: uid={name},{PEOPLE}\nobjectClass: inetOrgPerson\nobjectClass: posixAccount\n\
             objectClass: usermilterUser\nuid: {name}\ncn: {name}\nsn: {name}\nmail: {name}@test.example\n\
             uidNumber: {uid}\ngidNumber: {uid}\nhomeDirectory: {home}\n{lists}\n"
        )
    };
    USERS.iter().map(entry).collect()
}

/// A mail of the load: what is to become of it is known beforehand.
#[derive(Clone, Copy, Debug)]
struct Mail {
    number: usize,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// Accepted by the user's filter.
    Accept,
    /// Accepted by the user's filter; the directory would refuse other senders.
    AcceptListed,
    /// Refused by the user's filter.
    Reject,
    /// Refused at RCPT TO by what the directory lists.
    RejectListed,
    /// Refused at RCPT TO by the user's rules.
    RejectEarly,
    /// Put off by the user's filter.
    Defer,
}

const KINDS: [Kind; 6] =
    [Kind::Accept, Kind::AcceptListed, Kind::Reject, Kind::RejectListed, Kind::RejectEarly, Kind::Defer];

impl Kind {
    fn user(self) -> &'static str {
        match self {
            Self::Accept => "yes",
            Self::AcceptListed | Self::RejectListed => "listed",
            Self::Reject => "no",
            Self::RejectEarly => "early",
            Self::Defer => "later",
        }
    }

    fn sender(self) -> &'static str {
        if self == Self::RejectListed { "s@spam.example" } else { "s@sender.example" }
    }

    /// What the client hears when nothing is in the way.
    fn verdict(self) -> (u16, &'static str) {
        match self {
            Self::Accept | Self::AcceptListed => (250, "queued"),
            Self::Reject => (550, "not for no"),
            Self::RejectListed | Self::RejectEarly => (550, ""),
            Self::Defer => (451, "later says later"),
        }
    }
}

/// What became of the load.
#[derive(Default)]
struct Ledger {
    offered: usize,
    /// To be offered again, since the MTA said 4xx for us.
    again: VecDeque<Mail>,
    /// Mails with their verdict.
    settled: Vec<Mail>,
    /// How often the MTA put a mail off that nobody wanted put off.
    troubles: usize,
    wrong: Vec<String>,
    ending: bool,
}

struct Load<'a> {
    port: u16,
    /// When it is given up, if the mail does not get through.
    end: Instant,
    ledger: &'a Mutex<Ledger>,
}

impl Load<'_> {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap()
    }

    fn next(&self) -> Option<Mail> {
        let mut ledger = self.ledger();
        if Instant::now() >= self.end {
            return None;
        }
        if let Some(mail) = ledger.again.pop_front() {
            return Some(mail);
        }
        if ledger.ending {
            return None;
        }
        let number = ledger.offered;
        ledger.offered += 1;
        Some(Mail { number, kind: KINDS[number % KINDS.len()] })
    }

    /// One client after the other, each with a few mails, until there are no more.
    fn send_all(&self) {
        while self.send_some() {}
    }

    fn send_some(&self) -> bool {
        let mut client = Client::connect_as(self.port, "192.0.2.10", "mx.sender.example");
        for _ in 0..5 {
            let Some(mail) = self.next() else {
                client.quit();
                return false;
            };
            let reply = offer(&mut client, mail);
            let (code, text) = mail.kind.verdict();
            let mut ledger = self.ledger();
            if reply.code == code && reply.text().contains(text) {
                ledger.settled.push(mail);
                continue;
            }
            if !(400..500).contains(&reply.code) {
                ledger.wrong.push(format!("{mail:?}: {reply:?}"));
                continue;
            }
            // After trouble with a milter the session is lost: a new one, a little later, as MTAs do.
            ledger.troubles += 1;
            ledger.again.push_back(mail);
            drop(ledger);
            std::thread::sleep(Duration::from_millis(100));
            break;
        }
        client.quit();
        true
    }
}

/// The reply to a mail for the user `yes`.
fn offer_to_yes(port: u16) -> u16 {
    let mut client = Client::connect_as(port, "192.0.2.10", "mx.sender.example");
    let reply = offer(&mut client, Mail { number: 0, kind: Kind::Accept });
    client.quit();
    reply.code
}

/// The reply that decides about a mail.
fn offer(client: &mut Client, mail: Mail) -> Reply {
    let sender = client.mail_from(mail.kind.sender(), "");
    if sender.code != 250 {
        return sender;
    }
    let recipient = client.rcpt_to(&format!("{}@test.example", mail.kind.user()));
    if recipient.code != 250 {
        client.rset();
        return recipient;
    }
    client.data(format!("Subject: {}\n\ntext\n", mail.number).as_bytes())
}

#[test]
fn under_load_one_daemon_is_killed_one_reloaded_and_one_upgraded_and_no_mail_is_lost_or_misjudged() {
    let mut cluster = Cluster::start(|text| text);
    // They take their time, so that there is always one at work.
    let slow = |exit: &str| format!("#!/bin/sh\ncat >/dev/null\nsleep 0.1\n{exit}\n");
    cluster.filter("yes", "message", &slow("exit 0"));
    cluster.filter("listed", "message", &slow("exit 0"));
    cluster.filter("no", "message", &slow("echo 'not for no'; exit 77"));
    cluster.filter("later", "message", &slow("echo 'later says later'; exit 75"));
    cluster.site.users.file("early", "rules.toml", "default = \"reject\"\n");

    let ledger = Mutex::new(Ledger::default());
    let (port, end) = (cluster.postfix.port(), Instant::now() + 5 * NOTICE);
    std::thread::scope(|scope| {
        // Whatever fails below, the load ends.
        let ending = Ending(&ledger);
        for _ in 0..8 {
            scope.spawn(|| Load { port, end, ledger: &ledger }.send_all());
        }
        events(&mut cluster, &ledger);
        drop(ending);
    });

    cluster.postfix.wait_queue_empty();
    let ledger = ledger.into_inner().unwrap();
    report(&cluster, &ledger);
}

#[test]
fn a_daemon_that_hangs_is_taken_out_and_while_there_is_none_mail_is_put_off() {
    let mut cluster = Cluster::start(|text| text);
    cluster.filter("yes", "message", "#!/bin/sh\n");
    let worker = cluster.daemons[0].worker_pid();
    let signal = |daemon: &mut Usermilter, signal| {
        daemon.signal(signal);
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker.cast_signed()), signal).unwrap();
    };

    // The kernel goes on taking connections for a daemon that hangs. Who was given to it hears 4xx once that is known.
    signal(&mut cluster.daemons[0], Signal::SIGSTOP);
    let mut codes: Vec<u16> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..6).map(|_| scope.spawn(|| cluster.offer_as_neighbour())).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    codes.sort_unstable();
    assert!(codes.iter().all(|code| [250, 451].contains(code)), "{codes:?}");
    assert!(codes.contains(&250) && codes.contains(&451), "{codes:?}");
    // They were told by HAProxy. Postfix would have waited longer (milter_command_timeout).
    assert!(!cluster.postfix.log().contains("timed out"));
    cluster.haproxy.wait_for("one", "DOWN");
    for _ in 0..3 {
        assert_eq!(offer_to_yes(cluster.postfix.port()), 250);
    }
    signal(&mut cluster.daemons[0], Signal::SIGCONT);
    cluster.haproxy.wait_for("one", "UP");

    // Postfix with the policy service alone, and without the default_action of postfix/main.cf.policy.
    let policy_alone = Postfix::builder().mailboxes(&["yes"]).policy(&cluster.haproxy.policy).start();
    assert_eq!(offer_to_yes(policy_alone.port()), 250);
    for (daemon, name) in cluster.daemons.iter_mut().zip(NAMES) {
        daemon.signal(Signal::SIGKILL);
        cluster.haproxy.wait_for(name, "DOWN");
    }
    assert_eq!(offer_to_yes(cluster.postfix.port()), 451);
    assert_eq!(offer_to_yes(policy_alone.port()), 451);
    cluster.daemons[0] = Usermilter::start(&cluster.configurations[0]);
    cluster.haproxy.wait_for("one", "UP");
    assert_eq!(offer_to_yes(cluster.postfix.port()), 250);
    assert_eq!(offer_to_yes(policy_alone.port()), 250);
}

#[test]
fn daemons_that_end_finish_what_they_judge() {
    let mut cluster = Cluster::start(|text| text);
    // For longer than HAProxy lets somebody live who is down.
    cluster.filter("yes", "message", "#!/bin/sh\ntouch ~/started\nsleep 8\n");
    let started = cluster.site.users.account("yes").home.join("started");
    std::thread::scope(|scope| {
        let port = cluster.postfix.port();
        let client = scope.spawn(move || offer_to_yes(port));
        assert!(wait_until(NOTICE, || started.exists()));
        for daemon in &mut cluster.daemons {
            daemon.signal(Signal::SIGTERM);
        }
        assert_eq!(client.join().unwrap(), 250);
    });
}

#[test]
fn each_daemon_remembers_for_itself_and_with_balance_source_both_services_of_an_mta_ask_one() {
    let from_source = |text: String| {
        assert_eq!(text.matches("    balance leastconn\n").count(), 1);
        text.replace("    balance leastconn\n", "    balance source\n")
    };
    let cluster = Cluster::start(from_source);
    cluster.filter("yes", "recipient", "#!/bin/sh\necho \"$SENDER\" >> .usermilter/runs\n");
    let runs = || {
        let text = fs::read_to_string(cluster.site.users.account("yes").path("runs")).unwrap_or_default();
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };

    for ports in &cluster.ports {
        for _ in 0..2 {
            let request = Request::rcpt("first@sender.example", "yes@test.example");
            let address = format!("inet:127.0.0.1:{}", ports.policy);
            assert_eq!(policy::Client::connect(&address).ask(&request), "DUNNO");
        }
    }
    assert_eq!(runs(), ["first@sender.example"; 3]);

    let mails: Vec<String> = (0..8).map(|n| format!("s{n}@sender.example")).collect();
    for sender in &mails {
        let mut client = Client::connect_as(cluster.postfix.port(), "192.0.2.10", "mx.sender.example");
        assert_eq!(client.send(sender, &["yes@test.example"], b"Subject: x\n\n").outcome().code, 250);
        client.quit();
    }
    assert_eq!(runs()[3..], mails, "each was asked about once");
}

/// Ends the load when dropped.
struct Ending<'a>(&'a Mutex<Ledger>);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).ending = true;
    }
}

/// Waits until so many more mails have their verdict.
#[track_caller]
fn wait_settled(ledger: &Mutex<Ledger>, more: usize) {
    let settled = || ledger.lock().unwrap().settled.len();
    let goal = settled() + more;
    assert!(wait_until(NOTICE, || settled() >= goal), "{} of {goal} mails settled", settled());
}

fn troubles(ledger: &Mutex<Ledger>) -> usize {
    ledger.lock().unwrap().troubles
}

/// What happens meanwhile.
fn events(cluster: &mut Cluster, ledger: &Mutex<Ledger>) {
    const SOME: usize = 60;
    wait_settled(ledger, SOME);
    assert_eq!(troubles(ledger), 0, "nothing has happened yet");
    assert!(cluster.shares().iter().all(|&share| share > 0), "each has its share: {:?}", cluster.shares());

    // One is killed: its monitor, with which all of it ends.
    cluster.daemons[0].signal(Signal::SIGKILL);
    cluster.haproxy.wait_for("one", "DOWN");
    // Whose session it was has heard so by then.
    wait_settled(ledger, SOME);
    let after_kill = troubles(ledger);
    wait_settled(ledger, SOME);
    assert_eq!(troubles(ledger), after_kill, "two are enough");

    // Another gets a new configuration, in which the site refuses what a user has refused before.
    let rule =
        "[[rule]]\nrecipient = [\"early@*\"]\naction = \"reject\"\nreply = \"5.7.1 the site says so\"\n";
    let rules = cluster.site.sandbox.write("rules.toml", rule);
    let section = format!("[recipients]\nrules = \"{}\"\n", rules.display());
    let two = &mut cluster.daemons[1];
    two.write_config(&cluster.configurations[1].replace("[recipients]\n", &section));
    two.reload();
    two.wait_for_log("the site says so", NOTICE);
    wait_settled(ledger, SOME);

    // The first comes back.
    cluster.daemons[0] = Usermilter::start(&cluster.configurations[0]);
    cluster.haproxy.wait_for("one", "UP");
    cluster.daemons[0].wait_for_log("outcome=", NOTICE);
    assert_eq!(troubles(ledger), after_kill, "neither a reload nor a start costs anything");

    // The third is upgraded as docs/scaling.md says.
    let upgrade = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/scaling.md")).unwrap();
    let admin = |command: &str| {
        assert!(upgrade.contains(&format!("admin \"{command}\"\n")), "{command}");
        assert_eq!(cluster.haproxy.administer(command).trim(), "");
    };
    admin("set server usermilter-milter/three state drain");
    admin("set server usermilter-policy/three state drain");
    let sessions = || cluster.haproxy.column("three", "scur")[0] == "0";
    assert!(wait_until(NOTICE, sessions), "sessions of the third do not end");
    assert!(cluster.daemons[2].terminate().success());
    wait_settled(ledger, SOME);
    cluster.daemons[2] = Usermilter::start(&cluster.configurations[2]);
    admin("set server usermilter-milter/three state ready");
    admin("set server usermilter-policy/three state ready");
    cluster.haproxy.wait_for("three", "UP");
    cluster.daemons[2].wait_for_log("outcome=", NOTICE);
    wait_settled(ledger, SOME);
    assert_eq!(troubles(ledger), after_kill, "an upgrade costs nothing");
}

/// Counts, and compares them with what was delivered.
fn report(cluster: &Cluster, ledger: &Ledger) {
    assert!(ledger.wrong.is_empty(), "{}", ledger.wrong.join("\n"));
    assert_eq!(ledger.settled.len(), ledger.offered, "each mail has one verdict");
    let mut expected: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
    let mut counts: BTreeMap<Kind, usize> = BTreeMap::new();
    for mail in &ledger.settled {
        *counts.entry(mail.kind).or_default() += 1;
        if mail.kind.verdict().0 == 250 {
            expected.entry(mail.kind.user()).or_default().insert(mail.number);
        }
    }
    let mut delivered = 0;
    for (user, _) in USERS {
        let mut numbers: Vec<usize> =
            cluster.postfix.maildir(user).iter().map(|message| number(message)).collect();
        numbers.sort_unstable();
        delivered += numbers.len();
        let expected: Vec<usize> = expected.remove(user).unwrap_or_default().into_iter().collect();
        assert_eq!(numbers, expected, "{user} has each accepted mail once and no other");
    }
    let shares = cluster.shares();
    println!(
        "offered {}, by kind {counts:?}, delivered {delivered}, put off for our trouble {}; verdicts of each daemon since it \
         was started {shares:?}",
        ledger.offered, ledger.troubles
    );
}

/// The number that a mail of the load has as its subject.
fn number(message: &[u8]) -> usize {
    let text = String::from_utf8_lossy(message);
    let subject = text.lines().find_map(|line| line.strip_prefix("Subject: "));
    subject.and_then(|subject| subject.parse().ok()).unwrap_or_else(|| panic!("no number: {text}"))
}
