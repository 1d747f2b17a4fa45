//! Users in a directory, with a real slapd that has the files of `ldap/`.

#![allow(clippy::unwrap_used, reason = "a test that can't go on should stop there")]

mod answers;
mod cache;
mod connections;
mod files;
mod outages;
#[path = "../slapd/mod.rs"]
mod slapd;

use std::{path::Path, time::Duration};

use slapd::{DAEMON, DAEMON_PASSWORD, PEOPLE, Slapd};
use usermilter::{
    address::Address,
    config::{
        Config, ResolverConfig,
        ldap::{LdapConfig, SecretError},
    },
    resolver::ldap::{Found, LdapAnswer, LdapResolver, Timing, Unavailable},
};

/// Waits short enough for tests, in the proportions of the real ones.
const TIMING: Timing = Timing {
    return_after: Duration::from_secs(1),
    first_back_off: Duration::from_millis(200),
    max_back_off: Duration::from_millis(400),
    idle_limit: Duration::from_secs(60),
};

/// `timeout` of the sections here: a hung server takes this long to notice.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The keys that every section here has; `keys` follow.
fn section(uris: &[String], keys: &str) -> String {
    format!(
        "[[resolver]]\n\
         type = \"ldap\"\n\
         uri = {uris:?}\n\
         base = \"{PEOPLE}\"\n\
         filter = \"(|(&(objectClass=inetOrgPerson)(mail=%s))(&(objectClass=nisMailAlias)(cn=%u)))\"\n\
         forward-attribute = \"rfc822MailMember\"\n\
         default-uid = 5000\n\
         default-gid = 5000\n\
         default-home = \"/var/vmail/%d/%u\"\n\
         timeout = \"1s\"\n\
         {keys}\n"
    )
}

/// As whom the sample's rules let the daemon read.
fn credentials(slapd: &Slapd) -> String {
    format!("bind-dn = \"{DAEMON}\"\npassword-file = \"{}\"\n", slapd.password_file(DAEMON_PASSWORD))
}

fn parse(text: &str) -> LdapConfig {
    let config = Config::parse(text, Path::new("usermilter.toml")).unwrap();
    match config.resolvers.into_iter().next() {
        Some(ResolverConfig::Ldap(config)) => *config,
        other => panic!("{other:?}"),
    }
}

fn try_resolver(text: &str) -> Result<LdapResolver, SecretError> {
    let mut config = parse(text);
    config.load_secrets()?;
    Ok(LdapResolver::with_timing(config, TIMING))
}

fn resolver(text: &str) -> LdapResolver {
    try_resolver(text).unwrap()
}

/// A resolver that asks one server and remembers nothing.
fn forgetful(slapd: &Slapd) -> LdapResolver {
    let keys = format!("{}cache-ttl = \"0s\"\nnegative-ttl = \"0s\"", credentials(slapd));
    resolver(&section(&[slapd.ldap()], &keys))
}

fn address(text: &str) -> Address {
    Address::parse(text.as_bytes()).unwrap()
}

async fn ask(resolver: &LdapResolver, text: &str) -> Result<LdapAnswer, Unavailable> {
    resolver.lookup(&address(text)).await.map(|answer| (*answer).clone())
}

async fn found(resolver: &LdapResolver, text: &str) -> Found {
    match ask(resolver, text).await {
        Ok(LdapAnswer::Found(found)) => found,
        other => panic!("{text}: {other:?}"),
    }
}

async fn unavailable(resolver: &LdapResolver, text: &str) -> String {
    match ask(resolver, text).await {
        Err(Unavailable { reason }) => reason,
        other => panic!("{text}: {other:?}"),
    }
}

/// An entry for [`slapd::Setup::entries`], with an address `name`@example.org and further lines.
fn person(name: &str, more: &str) -> String {
    let own = format!(
        "objectClass: inetOrgPerson\nobjectClass: usermilterUser\n\
         uid: {name}\ncn: {name}\nsn: {name}\nmail: {name}@example.org"
    );
    // All values of an attribute have to stand together.
    let (classes, others): (Vec<&str>, Vec<&str>) =
        own.lines().chain(more.lines()).partition(|line| line.starts_with("objectClass"));
    let lines = [classes, others].concat().join("\n");
    format!("dn: uid={name},{PEOPLE}\n{lines}\n\n")
}
