//! Users in a directory: what one costs who is remembered, and what a search costs that has to be made.

use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use ldap3::{Ldap, LdapConnAsync, LdapConnSettings, Scope, StdStream};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use url::Url;
use usermilter::address::Address;
use usermilter::config::ldap::LdapConfig;
use usermilter::config::{Config, ResolverConfig};
use usermilter::resolver::ldap::{LdapAnswer, LdapResolver};

use crate::accounting::{Measuring, Server};
use crate::load::{Answered, Side};
use crate::report::Outcome;
use crate::site::{self, PLAIN, Site};
use crate::slapd::{DAEMON, DAEMON_PASSWORD, PEOPLE, Setup, Slapd};
use crate::{Plan, floors, load, policy};

/// Look-ups under way at a time.
const TASKS: usize = 16;

/// Entries to be found.
const ENTRIES: usize = 2000;

/// What is read of an entry: what the daemon asks for by default.
const ATTRIBUTES: [&str; 7] = [
    "uid",
    "uidNumber",
    "gidNumber",
    "homeDirectory",
    "usermilterFilter",
    "usermilterAcceptSender",
    "usermilterRejectSender",
];

/// Policy requests of a user of a directory, once known, against those of a user of a passwd-file.
pub(crate) fn cached(site: &Site, plan: Plan) -> Outcome {
    if let Some(skipped) = lacking() {
        return skipped;
    }
    // The same account, so that nothing differs but where it comes from.
    let account = site.users.account(PLAIN);
    let entry = person(PLAIN, account.uid, account.gid, &account.home.display().to_string());
    let slapd = Slapd::start(&Setup { entries: &entry, ..Setup::default() });
    let resolver = section(&slapd, "cache-ttl = \"1h\"");
    let ours = Site::start_among(&resolver, site.users.homes());
    let rounds = load::in_turn(plan, &policy::side(&ours, PLAIN, plan), &policy::side(site, PLAIN, plan));
    assert_eq!(slapd.searches(&format!("(uid={PLAIN})")), 1, "not every answer but the first was remembered");
    Outcome::Measured(rounds)
}

/// Look-ups of addresses that nobody has asked for before, against searches with nothing around them.
pub(crate) fn uncached(_: &Site, plan: Plan) -> Outcome {
    if let Some(skipped) = lacking() {
        return skipped;
    }
    let entries: String = (0..ENTRIES).map(|n| person(&name(n), 5001, 5001, "/var/vmail/somebody")).collect();
    // No log: it costs both sides the same, and would make them more alike.
    let slapd = Slapd::start(&Setup { entries: &entries, quiet: true, ..Setup::default() });
    let config = parse(&section(&slapd, ""));
    let runtime = floors::runtime();
    let next = Arc::new(AtomicUsize::new(0));
    let servers = vec![Server { pid: slapd.pid(), name: "slapd" }];
    // Here it is the side that asks of which much or little is to be said.
    let measuring = Measuring::ThisProcess;
    let ours = || look_ups(&runtime, plan, &config, &next);
    let floor = || searches(&runtime, plan, &slapd.ldap(), &next);
    Outcome::Measured(load::in_turn(
        plan,
        &Side { ask: ours, measuring, servers: servers.clone() },
        &Side { ask: floor, measuring, servers },
    ))
}

fn lacking() -> Option<Outcome> {
    let programs = ["/usr/sbin/slapd", "/usr/sbin/slapadd"];
    let lacking = !programs.into_iter().all(|program| Path::new(program).exists());
    lacking.then(|| Outcome::Skipped("no slapd; apt-get install slapd".into()))
}

/// What an administrator would write; `keys` follow. The filter finds a user at any domain, so that there are more
/// addresses than entries.
fn section(slapd: &Slapd, keys: &str) -> String {
    format!(
        "[[resolver]]\n\
         type = \"ldap\"\n\
         uri = [\"{}\"]\n\
         base = \"{PEOPLE}\"\n\
         filter = \"{}\"\n\
         bind-dn = \"{DAEMON}\"\n\
         password-file = \"{}\"\n\
         {keys}\n",
        slapd.ldap(),
        filter("%u"),
        slapd.password_file(DAEMON_PASSWORD),
    )
}

fn filter(user: &str) -> String {
    format!("(&(objectClass=posixAccount)(uid={user}))")
}

fn person(name: &str, uid: u32, gid: u32, home: &str) -> String {
    format!(
        "dn: uid={name},{PEOPLE}\nobjectClass: inetOrgPerson\nobjectClass: posixAccount\nuid: {name}\ncn: {name}\n\
         sn: {name}\nmail: {}\nuidNumber: {uid}\ngidNumber: {gid}\nhomeDirectory: {home}\n\n",
        site::address_of(name)
    )
}

fn name(n: usize) -> String {
    format!("person{}", n % ENTRIES)
}

fn parse(section: &str) -> LdapConfig {
    let config = Config::parse(section, Path::new("usermilter.toml")).unwrap();
    let Some(ResolverConfig::Ldap(mut config)) = config.resolvers.into_iter().next() else {
        panic!("no ldap section")
    };
    config.load_secrets().unwrap();
    *config
}

/// Ours, with its cache as it is by default, which fills and helps nothing: no address comes twice.
fn look_ups(runtime: &Runtime, plan: Plan, config: &LdapConfig, next: &Arc<AtomicUsize>) -> Answered {
    let resolver = Arc::new(LdapResolver::new(config.clone()));
    let asked = Arc::clone(&resolver);
    let answered = ask_all(runtime, plan, next, move |n| {
        let resolver = Arc::clone(&asked);
        async move {
            let address = format!("{}@d{}.example", name(n), n / ENTRIES);
            let address = Address::parse(address.as_bytes()).unwrap();
            let answer = resolver.lookup(&address).await.unwrap();
            assert!(matches!(&*answer, LdapAnswer::Found(_)), "{address}: {answer:?}");
        }
    });
    assert_eq!(resolver.cache_counters().hits, 0, "not every look-up was a search");
    answered
}

/// The floor: the library on one connection.
fn searches(runtime: &Runtime, plan: Plan, uri: &str, next: &Arc<AtomicUsize>) -> Answered {
    let ldap = runtime.block_on(connect(uri));
    ask_all(runtime, plan, next, move |n| {
        let mut ldap = ldap.clone();
        async move {
            let found = ldap.search(PEOPLE, Scope::Subtree, &filter(&name(n)), ATTRIBUTES).await.unwrap();
            assert!(found.0.len() == 1 && found.1.rc == 0, "{found:?}");
        }
    })
}

/// As fast as can be: without TCP_NODELAY, which the library does not set, searches would wait for each other.
async fn connect(uri: &str) -> Ldap {
    let url = Url::parse(uri).unwrap();
    let stream = TcpStream::connect(&*url.socket_addrs(|| None).unwrap()).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_nonblocking(true).unwrap();
    let settings = LdapConnSettings::new().set_std_stream(StdStream::Tcp(stream));
    let (driver, mut ldap) = LdapConnAsync::from_url_with_settings(settings, &url).await.unwrap();
    tokio::spawn(async move { driver.drive().await.unwrap() });
    ldap.simple_bind(DAEMON, DAEMON_PASSWORD).await.unwrap().success().unwrap();
    ldap
}

/// Questions of all tasks together, each with a number of its own. The first, which may connect, is not
/// counted.
fn ask_all<F: Future<Output = ()> + Send + 'static>(
    runtime: &Runtime,
    plan: Plan,
    next: &Arc<AtomicUsize>,
    ask: impl Fn(usize) -> F + Clone + Send + 'static,
) -> Answered {
    runtime.block_on(async {
        ask(next.fetch_add(1, Ordering::Relaxed)).await;
        let began = Instant::now();
        let mut tasks = JoinSet::new();
        for _ in 0..TASKS {
            let (ask, next) = (ask.clone(), Arc::clone(next));
            tasks.spawn(async move {
                let mut answered = 0_u32;
                while began.elapsed() < plan.duration {
                    ask(next.fetch_add(1, Ordering::Relaxed)).await;
                    answered += 1;
                }
                answered
            });
        }
        let count: u32 = tasks.join_all().await.into_iter().sum();
        Answered { count: count.into(), seconds: began.elapsed().as_secs_f64() }
    })
}
