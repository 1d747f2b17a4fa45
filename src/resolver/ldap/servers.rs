//! Which server is asked: the first of the list that answers, without making every mail wait for the dead ones.
//!
//! While a server answers there is one connection. When one fails, the next of the list takes over, and after
//! [`Timing::return_after`] the earlier ones are tried again, beside the work. When none answers that is an outage:
//! questions fail at once, but for one at a time that tries all servers anew, at growing intervals.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use prometheus_client::metrics::counter::Counter;
use rustls::{ClientConfig, RootCertStore, crypto::ring};

use super::{
    connection::{Connection, Query, SearchError},
    entry::Entry,
};
use crate::{config::ldap::LdapConfig, inquiry::Hosts};

/// How long a failed server is left alone while a later one of the list answers.
const RETURN_AFTER: Duration = Duration::from_secs(60);

/// How long after the last server failed nobody is asked: short, for the next server may be up already.
const FIRST_BACK_OFF: Duration = Duration::from_secs(1);

/// The longest of these waits; each is twice the one before. A wrong password is tried no more often than this.
const MAX_BACK_OFF: Duration = Duration::from_secs(30);

/// Connections unused for longer are replaced: firewalls and servers (slapd.conf(5), idletimeout) forget them, some
/// without a word, and the next search would wait for its time limit.
const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// The waits that are not in the configuration. Only tests have others than the default.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How long a failed server is left alone while a later one answers.
    pub return_after: Duration,
    /// The first wait after all servers failed.
    pub first_back_off: Duration,
    /// The longest wait after all servers failed.
    pub max_back_off: Duration,
    /// How long an unused connection is kept.
    pub idle_limit: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            return_after: RETURN_AFTER,
            first_back_off: FIRST_BACK_OFF,
            max_back_off: MAX_BACK_OFF,
            idle_limit: IDLE_LIMIT,
        }
    }
}

/// Why no server's entries can be had.
#[derive(Clone, Debug)]
pub(super) enum NoEntries {
    /// None answers. What is remembered may serve.
    Outage(String),
    /// One answered that it won't.
    Refused(String),
}

/// The servers of a section.
#[derive(Debug)]
pub(super) struct Servers {
    config: Arc<LdapConfig>,
    hosts: Hosts,
    tls: Option<Arc<ClientConfig>>,
    timing: Timing,
    state: Mutex<State>,
    /// Held while connecting, so that a thousand questions make one connection.
    connecting: tokio::sync::Mutex<()>,
    /// How often each failed.
    failed: Vec<Counter>,
}

/// What is known of a server.
#[derive(Clone, Debug)]
pub struct ServerState {
    /// Its address.
    pub uri: String,
    /// Whether there is a connection to it, which is used.
    pub in_use: bool,
    /// How long ago it last failed, and why, unless it has answered since.
    pub failure: Option<(Duration, String)>,
}

#[derive(Debug)]
struct State {
    current: Option<Arc<Connection>>,
    /// When each server last failed, and why.
    failures: Vec<Option<(Instant, String)>>,
    outage: Option<Outage>,
}

/// No server answers.
#[derive(Debug)]
struct Outage {
    /// Until then nobody is asked.
    until: Instant,
    back_off: Duration,
    reason: String,
}

/// On what terms a question is asked.
#[derive(Clone, Copy, Debug)]
enum Admission {
    /// As far as is known, there is a server.
    Normal,
    /// To find out whether an outage is over.
    Try,
}

impl Servers {
    pub(super) fn new(config: Arc<LdapConfig>, hosts: Hosts, timing: Timing, failed: Vec<Counter>) -> Self {
        let failures = vec![None; config.uri.len()];
        Self {
            tls: config.authorities().and_then(tls_config),
            config,
            hosts,
            timing,
            state: Mutex::new(State { current: None, failures, outage: None }),
            connecting: tokio::sync::Mutex::new(()),
            failed,
        }
    }

    /// Asks the first server that answers.
    pub(super) async fn search(self: &Arc<Self>, query: &Query) -> Result<Vec<Entry>, NoEntries> {
        let admission = self.admit()?;
        // Once for each server, and once more for a connection that a server has ended while nobody used it.
        for _ in 0..=self.config.uri.len() {
            let Some(connection) = self.connection().await else {
                break;
            };
            match connection.search(&self.config, query).await {
                Ok(entries) => {
                    self.answered();
                    return Ok(entries);
                }
                Err(SearchError::Refused(reason)) => {
                    self.answered();
                    return Err(NoEntries::Refused(reason));
                }
                Err(SearchError::Closed(reason)) => {
                    self.give_up(&connection, reason, connection.was_useful())
                }
                Err(SearchError::Failed(reason)) => self.give_up(&connection, reason, false),
            }
        }
        Err(NoEntries::Outage(self.no_answer(admission)))
    }

    pub(super) fn states(&self) -> Vec<ServerState> {
        let state = self.state();
        let current = state.current.as_ref().map(|connection| connection.server());
        let servers = self.config.uri.iter().zip(&state.failures).enumerate();
        let each = servers.map(|(n, (uri, failure))| ServerState {
            uri: uri.to_string(),
            in_use: current == Some(n),
            failure: failure.as_ref().map(|(when, why)| (when.elapsed(), why.clone())),
        });
        each.collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is a single assignment: a panic leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a question through, unless an outage is on and it is not time for another try.
    fn admit(&self) -> Result<Admission, NoEntries> {
        let mut state = self.state();
        let Some(outage) = &mut state.outage else {
            return Ok(Admission::Normal);
        };
        let now = Instant::now();
        if now < outage.until {
            return Err(NoEntries::Outage(outage.reason.clone()));
        }
        // This question is the try; the others need not wait for it. It connects to each server, binds, and searches.
        let steps = u32::try_from(2 * self.config.uri.len() + 1).unwrap_or(u32::MAX);
        outage.until = now + self.config.timeout.0.saturating_mul(steps);
        state.failures.fill(None);
        Ok(Admission::Try)
    }

    /// The connection in use, or a new one to the first server that has not just failed.
    async fn connection(self: &Arc<Self>) -> Option<Arc<Connection>> {
        if let Some(connection) = self.current() {
            return Some(connection);
        }
        let _turn = self.connecting.lock().await;
        if let Some(connection) = self.current() {
            return Some(connection);
        }
        for server in 0..self.config.uri.len() {
            let due = self.is_due(&self.state(), server);
            if due && let Some(connection) = self.open(server).await {
                self.state().current = Some(Arc::clone(&connection));
                return Some(connection);
            }
        }
        None
    }

    fn current(self: &Arc<Self>) -> Option<Arc<Connection>> {
        let mut state = self.state();
        let connection = state.current.take_if(|connection| !connection.is_fit(self.timing.idle_limit));
        drop(connection);
        let connection = Arc::clone(state.current.as_ref()?);
        let earlier: Vec<usize> =
            (0..connection.server()).filter(|server| self.is_due(&state, *server)).collect();
        if !earlier.is_empty() {
            // Not due any more, for whoever comes while they are tried.
            for server in &earlier {
                state.failures[*server] = Some((Instant::now(), "being tried again".into()));
            }
            tokio::spawn(Arc::clone(self).go_back(earlier));
        }
        Some(connection)
    }

    /// Moves to the first of the earlier servers that answers again.
    async fn go_back(self: Arc<Self>, earlier: Vec<usize>) {
        for server in earlier {
            if let Some(connection) = self.open(server).await {
                let mut state = self.state();
                if state.current.as_ref().is_none_or(|current| current.server() > server) {
                    state.current = Some(connection);
                }
                return;
            }
        }
    }

    async fn open(&self, server: usize) -> Option<Arc<Connection>> {
        let uri = &self.config.uri[server];
        match Connection::open(&self.config, server, &self.hosts, self.tls.clone()).await {
            Ok(connection) => {
                if self.state().failures[server].take().is_some() {
                    tracing::info!(%uri, "LDAP server answers again");
                }
                Some(Arc::new(connection))
            }
            Err(reason) => {
                self.failed(&mut self.state(), server, reason);
                None
            }
        }
    }

    /// Takes a connection out of use. Searches under way on it run to their own ends.
    fn give_up(&self, connection: &Arc<Connection>, reason: String, same_server_again: bool) {
        let mut state = self.state();
        let is_current = |current: &mut Arc<Connection>| Arc::ptr_eq(current, connection);
        // Of all the searches that found out, the first one acts.
        if state.current.take_if(is_current).is_some() && !same_server_again {
            self.failed(&mut state, connection.server(), reason);
        }
    }

    fn failed(&self, state: &mut State, server: usize, reason: String) {
        let uri = &self.config.uri[server];
        if let Some(counter) = self.failed.get(server) {
            counter.inc();
        }
        if state.outage.is_none() && state.failures[server].is_none() {
            tracing::warn!(%uri, reason, "LDAP server failed");
        } else {
            tracing::debug!(%uri, reason, "LDAP server still fails");
        }
        state.failures[server] = Some((Instant::now(), reason));
    }

    fn is_due(&self, state: &State, server: usize) -> bool {
        match &state.failures[server] {
            Some((when, _)) => when.elapsed() >= self.timing.return_after,
            None => true,
        }
    }

    fn answered(&self) {
        if self.state().outage.take().is_some() {
            tracing::info!("the LDAP outage is over");
        }
    }

    /// Starts an outage, or prolongs it after a try. Gives the reason.
    fn no_answer(&self, admission: Admission) -> String {
        let mut state = self.state();
        let back_off = match (&state.outage, admission) {
            // One of many that were under way when the last server failed.
            (Some(outage), Admission::Normal) => return outage.reason.clone(),
            (Some(outage), Admission::Try) => (outage.back_off * 2).min(self.timing.max_back_off),
            (None, _) => {
                tracing::warn!("no LDAP server answers");
                self.timing.first_back_off
            }
        };
        let reasons: Vec<String> = std::iter::zip(&self.config.uri, &state.failures)
            .filter_map(|(uri, failure)| failure.as_ref().map(|(_, reason)| format!("{uri}: {reason}")))
            .collect();
        let reason = format!("no LDAP server answers: {}", reasons.join("; "));
        state.outage = Some(Outage { until: Instant::now() + back_off, back_off, reason: reason.clone() });
        reason
    }
}

/// TLS 1.2 and 1.3 as rustls has them. `None` can't be: ring has cipher suites for both.
fn tls_config(authorities: &Arc<RootCertStore>) -> Option<Arc<ClientConfig>> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().ok()?;
    Some(Arc::new(builder.with_root_certificates(Arc::clone(authorities)).with_no_client_auth()))
}
