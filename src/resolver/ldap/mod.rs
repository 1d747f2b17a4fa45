//! Users in a directory (RFC 4511): asked over one connection, remembered for a while, and never taken for
//! unknown because a server is.
//!
//! A question goes [`LdapResolver::lookup`] → what is remembered → `servers` (which server, back-off) →
//! `connection` (one search with its time limit) → `entry` (what the entry means).

mod connection;
mod entry;
mod servers;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use moka::{Expiry, future::Cache};
pub use servers::{ServerState, Timing};

use self::{
    connection::Query,
    servers::{NoEntries, Servers},
};
use crate::{
    address::Address,
    config::{OnError, ldap::LdapConfig},
    inquiry::Hosts,
    metrics::{Histogram, ResolverMetrics},
    rules::Rules,
    user::User,
};

/// What a directory says of an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LdapAnswer {
    /// It is a user's.
    Found(Found),
    /// It stands for other addresses.
    ///
    /// An entry with `forward-attribute` does so if it has neither uid nor home of its own. One that has is
    /// somebody who can be asked, wherever their mail goes then, and its further addresses are not followed.
    Forward(Vec<Address>),
    /// Nobody has it: a server has looked and found nothing.
    NotFound,
}

/// A user's entry.
#[derive(Clone, Debug)]
pub struct Found {
    /// The user. The monitor checks uid and home against `virtual-uids` and `virtual-homes`.
    pub user: User,
    /// Patterns of senders whose mail is accepted, in the form of `sender` in `rules.toml`.
    pub accept_senders: Vec<String>,
    /// Patterns of senders whose mail is refused.
    pub reject_senders: Vec<String>,
    /// Both lists, ready for use; `None` if they are empty.
    pub rules: Option<Arc<Rules>>,
    /// The entry's name, for the log.
    pub dn: String,
}

impl PartialEq for Found {
    /// `rules` follows from the lists.
    fn eq(&self, other: &Self) -> bool {
        let values = |found: &Self| {
            let Self { user, accept_senders, reject_senders, dn, rules: _ } = found.clone();
            (user, accept_senders, reject_senders, dn)
        };
        values(self) == values(other)
    }
}

impl Eq for Found {}

/// The directory could not be asked, or what it said can't be used. This says nothing of whether the address exists.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Unavailable {
    /// For the log; not for the SMTP session.
    pub reason: String,
}

/// Where an answer came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A server, just now.
    Server,
    /// A server, no longer ago than `cache-ttl` or `negative-ttl`.
    Cache,
    /// A server, no longer ago than `stale-ttl`; now none answers.
    Stale,
}

/// How often what happened since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheCounters {
    /// Questions answered from what was remembered.
    pub hits: u64,
    /// Searches, each perhaps for many questions at the same time.
    pub searches: u64,
    /// Questions answered by an old entry because no server answered.
    pub stale: u64,
    /// Questions left without an answer.
    pub unavailable: u64,
}

/// A `[[resolver]]` of type ldap.
pub struct LdapResolver {
    config: Arc<LdapConfig>,
    servers: Arc<Servers>,
    attributes: Arc<[String]>,
    /// Everything that is believed.
    fresh: Cache<Address, Arc<LdapAnswer>>,
    /// What serves in an outage. Users and aliases only: that nobody has an address is not believed for long, and
    /// strangers who guess addresses must not push users out.
    stale: Cache<Address, Arc<LdapAnswer>>,
    serving_stale: AtomicBool,
    counters: Counters,
    latency: Histogram,
}

#[derive(Default)]
struct Counters {
    hits: AtomicU64,
    searches: AtomicU64,
    stale: AtomicU64,
    unavailable: AtomicU64,
}

impl LdapResolver {
    /// A resolver that has not asked anybody yet. The first look-up connects, so this needs no runtime.
    ///
    /// [`LdapConfig::load_secrets`] must have been called if the section names a password or uses TLS.
    pub fn new(config: LdapConfig) -> Self {
        Self::with_timing(config, Timing::default())
    }

    /// As [`LdapResolver::new`]; counts how long servers take and how often they fail, and may have to ask others where
    /// they are.
    pub fn counted(config: LdapConfig, hosts: Hosts, metrics: ResolverMetrics) -> Self {
        Self::build(config, hosts, Timing::default(), metrics)
    }

    /// As [`LdapResolver::new`], with other waits than the built-in ones, for tests that can't wait a minute.
    pub fn with_timing(config: LdapConfig, timing: Timing) -> Self {
        Self::build(config, Hosts::direct(), timing, ResolverMetrics::default())
    }

    fn build(config: LdapConfig, hosts: Hosts, timing: Timing, metrics: ResolverMetrics) -> Self {
        let config = Arc::new(config);
        Self {
            servers: Arc::new(Servers::new(Arc::clone(&config), hosts, timing, metrics.server_failures)),
            latency: metrics.latency,
            attributes: attributes(&config),
            fresh: Cache::builder()
                .max_capacity(config.cache_size)
                .expire_after(BelievedFor { found: config.cache_ttl.0, not_found: config.negative_ttl.0 })
                .build(),
            stale: Cache::builder().max_capacity(config.cache_size).time_to_live(config.stale_ttl.0).build(),
            serving_stale: AtomicBool::new(false),
            counters: Counters::default(),
            config,
        }
    }

    /// Who an address is.
    ///
    /// The address is looked for as it stands; whoever wants an extension dropped asks again without it.
    ///
    /// # Errors
    ///
    /// [`Unavailable`] if neither a server nor an old answer helps: `on-error` says what mail gets.
    pub async fn lookup(&self, address: &Address) -> Result<Arc<LdapAnswer>, Unavailable> {
        self.lookup_with_source(address).await.map(|(answer, _)| answer)
    }

    /// As [`LdapResolver::lookup`], saying too where the answer came from.
    ///
    /// # Errors
    ///
    /// As [`LdapResolver::lookup`].
    pub async fn lookup_with_source(
        &self,
        address: &Address,
    ) -> Result<(Arc<LdapAnswer>, Source), Unavailable> {
        if let Some(answer) = self.fresh.get(address).await {
            count(&self.counters.hits);
            return Ok((answer, Source::Cache));
        }
        // All who ask now about this address wait for one search.
        let started = Instant::now();
        let fetched = self.fresh.try_get_with_by_ref(address, self.fetch(address.clone())).await;
        self.latency.observe(started.elapsed());
        match fetched {
            Ok(answer) => Ok((answer, Source::Server)),
            Err(fault) => self.without_server(address, &fault).await,
        }
    }

    /// What mail gets whose recipient can't be looked up.
    pub fn on_error(&self) -> OnError {
        self.config.on_error
    }

    /// What is known of each server, in the order of the configuration.
    pub fn server_states(&self) -> Vec<ServerState> {
        self.servers.states()
    }

    /// What happened so far.
    pub fn cache_counters(&self) -> CacheCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CacheCounters {
            hits: read(&self.counters.hits),
            searches: read(&self.counters.searches),
            stale: read(&self.counters.stale),
            unavailable: read(&self.counters.unavailable),
        }
    }

    /// Asks a server; one task does for all who wait, so what is logged here is logged once.
    async fn fetch(&self, address: Address) -> Result<Arc<LdapAnswer>, Fault> {
        let answer = self.ask(&address).await;
        match &answer {
            Ok(answer) => {
                self.serving_stale.store(false, Ordering::Relaxed);
                if matches!(**answer, LdapAnswer::NotFound) {
                    self.stale.invalidate(&address).await;
                } else {
                    self.stale.insert(address, Arc::clone(answer)).await;
                }
            }
            Err(Fault::Outage(reason)) => tracing::debug!(%address, reason, "cannot look up"),
            Err(Fault::Unusable(reason)) => tracing::warn!(%address, reason, "cannot look up"),
        }
        answer
    }

    async fn ask(&self, address: &Address) -> Result<Arc<LdapAnswer>, Fault> {
        count(&self.counters.searches);
        let servers = Arc::clone(&self.servers);
        let query = Query {
            filter: self.config.filter.filter_for(address),
            attributes: Arc::clone(&self.attributes),
        };
        // In a task of its own: an SMTP client that hangs up does not undo the work, and ldap3 panics on answers
        // that are no LDAP.
        let entries = tokio::spawn(async move { servers.search(&query).await })
            .await
            .map_err(|error| Fault::Outage(error.to_string()))?
            .map_err(|error| match error {
                NoEntries::Outage(reason) => Fault::Outage(reason),
                NoEntries::Refused(reason) => Fault::Unusable(reason),
            })?;
        entry::answer(&entries, address, &self.config).map(Arc::new).map_err(Fault::Unusable)
    }

    async fn without_server(
        &self,
        address: &Address,
        fault: &Fault,
    ) -> Result<(Arc<LdapAnswer>, Source), Unavailable> {
        let (Fault::Outage(reason) | Fault::Unusable(reason)) = fault;
        if matches!(fault, Fault::Outage(_))
            && let Some(answer) = self.stale.get(address).await
        {
            count(&self.counters.stale);
            if !self.serving_stale.swap(true, Ordering::Relaxed) {
                tracing::warn!(reason, "old answers serve until an LDAP server answers");
            }
            return Ok((answer, Source::Stale));
        }
        count(&self.counters.unavailable);
        Err(Unavailable { reason: reason.clone() })
    }
}

impl fmt::Debug for LdapResolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LdapResolver").field("config", &self.config).finish_non_exhaustive()
    }
}

/// Why there is no answer.
#[derive(Debug)]
enum Fault {
    /// No server answers: an old answer is better than none.
    Outage(String),
    /// One answered, and what it said can't be used. An old answer would hide that.
    Unusable(String),
}

/// How long answers stay in the cache.
struct BelievedFor {
    found: Duration,
    not_found: Duration,
}

impl Expiry<Address, Arc<LdapAnswer>> for BelievedFor {
    fn expire_after_create(&self, _: &Address, answer: &Arc<LdapAnswer>, _: Instant) -> Option<Duration> {
        Some(match **answer {
            LdapAnswer::NotFound => self.not_found,
            LdapAnswer::Found(_) | LdapAnswer::Forward(_) => self.found,
        })
    }

    fn expire_after_update(
        &self,
        address: &Address,
        answer: &Arc<LdapAnswer>,
        now: Instant,
        _: Option<Duration>,
    ) -> Option<Duration> {
        self.expire_after_create(address, answer, now)
    }
}

/// What the server is asked to send: nothing that is not read.
fn attributes(config: &LdapConfig) -> Arc<[String]> {
    let table = &config.attributes;
    [
        Some(&table.name),
        table.uid.as_ref(),
        table.gid.as_ref(),
        table.home.as_ref(),
        table.filter.as_ref(),
        table.accept_senders.as_ref(),
        table.reject_senders.as_ref(),
        config.forward_attribute.as_ref(),
    ]
    .into_iter()
    .flatten()
    .map(|name| name.as_str().to_owned())
    .collect()
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
