//! Who users are: resolvers that never come to say anything, users whom no filter may run as, directories that can be
//! listened to.

use std::{collections::HashMap, path::Path};

use nix::unistd::User;

use super::Warnings;
use crate::{
    config::{
        Config, Filter, PasswdConfig, ResolverConfig,
        ldap::{Bind, LdapConfig, LdapUri},
    },
    resolver::passwd_file::PasswdFile,
    user::Account,
};

pub(super) fn check(config: &Config, warnings: &mut Warnings) {
    let mut earlier = Earlier::default();
    for (number, resolver) in config.resolvers.iter().enumerate() {
        let key = format!("resolver.{number}");
        match resolver {
            ResolverConfig::Passwd(passwd) => earlier.passwd(&key, number, passwd, &config.filter, warnings),
            ResolverConfig::PasswdFile(file) => {
                earlier.passwd_file(&key, number, &file.path, &config.filter, warnings);
            }
            ResolverConfig::Ldap(ldap) => {
                transport(&key, ldap, warnings);
                times(&key, ldap, config, warnings);
                earlier.ldap(&key, number, ldap, warnings);
            }
        }
    }
}

/// The resolvers asked before, with their numbers from 0: the first that knows a user wins.
#[derive(Default)]
struct Earlier<'a> {
    passwd: Option<(usize, &'a PasswdConfig)>,
    /// By name in lower case.
    files: HashMap<String, usize>,
    directories: Vec<(usize, &'a LdapConfig)>,
}

impl<'a> Earlier<'a> {
    fn passwd(
        &mut self,
        key: &str,
        number: usize,
        passwd: &'a PasswdConfig,
        filter: &Filter,
        warnings: &mut Warnings,
    ) {
        if let Some((first, _)) = self.passwd {
            warnings.add(
                format!("{key}.type"),
                format!("passwd again: whoever it knows, resolver {} has answered before", first + 1),
            );
        }
        if passwd.min_uid < filter.min_uid {
            warnings.add(
                format!("{key}.min-uid"),
                format!(
                    "below filter.min-uid, {}: users from {} on are judged, but their filters do not run",
                    filter.min_uid, passwd.min_uid
                ),
            );
        }
        self.passwd.get_or_insert((number, passwd));
    }

    fn passwd_file(
        &mut self,
        key: &str,
        number: usize,
        path: &Path,
        filter: &Filter,
        warnings: &mut Warnings,
    ) {
        let key = format!("{key}.path");
        let file = PasswdFile::open(path);
        for problem in file.problems().iter() {
            warnings.add_at(&key, path, problem.line, &problem.message);
        }
        for (line, user) in file.users() {
            let name = user.name.as_str().to_lowercase();
            let host_user = || User::from_name(&name).ok().flatten();
            if let Some(first) = self.files.get(&name).filter(|first| **first != number) {
                let message =
                    format!("{name} is never found here: resolver {} has the name before", first + 1);
                warnings.add_at(&key, path, line, message);
            } else if let Some((first, _)) = self.passwd
                && host_user().is_some()
            {
                let message = format!(
                    "{name} is never found here: a user of this host, whom resolver {} finds before",
                    first + 1
                );
                warnings.add_at(&key, path, line, message);
            }
            if let Some(problem) = forbidden(&user.account, filter) {
                warnings.add_at(&key, path, line, format!("no filter runs as {name}: {problem}"));
            }
            self.files.entry(name).or_insert(number);
        }
    }

    fn ldap(&mut self, key: &str, number: usize, ldap: &'a LdapConfig, warnings: &mut Warnings) {
        let same = |other: &LdapConfig| {
            (&other.uri, &other.base, &other.filter) == (&ldap.uri, &ldap.base, &ldap.filter)
        };
        if let Some((first, _)) = self.directories.iter().find(|(_, other)| same(other)) {
            warnings.add(
                format!("{key}.filter"),
                format!(
                    "servers, base and filter are those of resolver {}, which has answered before",
                    first + 1
                ),
            );
        }
        self.directories.push((number, ldap));
    }
}

/// Why the monitor would not run a filter as this user (`child.rs` decides; this is to say so before).
fn forbidden(account: &Account, filter: &Filter) -> Option<String> {
    let Account::Virtual { uid, gid, home } = account else { return None };
    let ids = filter.virtual_uids;
    if *uid < filter.min_uid {
        Some(format!("uid {uid} is below filter.min-uid, {}", filter.min_uid))
    } else if !(ids.contains(*uid) && ids.contains(*gid)) {
        Some(format!("uid {uid} or gid {gid} is outside filter.virtual-uids, [{}, {}]", ids.first, ids.last))
    } else if !filter.virtual_homes.iter().any(|homes| home.starts_with(homes) && home != homes) {
        Some(format!("home {} is outside filter.virtual-homes", home.display()))
    } else {
        None
    }
}

fn transport(key: &str, ldap: &LdapConfig, warnings: &mut Warnings) {
    let is_exposed = |uri: &&LdapUri| uri.url().scheme() == "ldap" && !ldap.starttls && !is_loopback(uri);
    let Some(uri) = ldap.uri.iter().find(is_exposed) else { return };
    let harm = match ldap.bind() {
        Bind::Simple { .. } => "whoever is on the way reads the password, and",
        Bind::Anonymous | Bind::External => "whoever is on the way",
    };
    warnings.add(
        format!("{key}.uri"),
        format!(
            "{uri} without TLS: {harm} can change who users are and what runs for them; use ldaps:// or starttls = true"
        ),
    );
}

fn is_loopback(uri: &LdapUri) -> bool {
    let host = uri.tcp().map(|(host, _)| host).unwrap_or_default();
    host == "localhost" || host.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
}

fn times(key: &str, ldap: &LdapConfig, config: &Config, warnings: &mut Warnings) {
    let patience = config.filter.recipient_deadline.0;
    let servers = u32::try_from(ldap.uri.len()).unwrap_or(u32::MAX);
    let worst = ldap.timeout.0.saturating_mul(servers);
    if worst >= patience {
        warnings.add(
            format!("{key}.timeout"),
            format!("{servers} server(s) that do not answer take {worst:?}, and an MTA waits less than that at RCPT TO"),
        );
    }
    if ldap.stale_ttl < ldap.cache_ttl {
        warnings.add(
            format!("{key}.stale-ttl"),
            "shorter than cache-ttl: nothing that is remembered helps while the servers are away",
        );
    }
}
