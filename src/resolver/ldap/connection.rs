//! One connection to one server. Searches of many tasks share it (RFC 4511 §4.1.1.1), each with its time limit.

use std::{
    error::Error as _,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use ldap3::{
    Ldap, LdapConnAsync, LdapConnSettings, LdapError, LdapResult, SearchOptions, StdStream,
    result::SearchResult,
};
use rustls::ClientConfig;
use tokio::{net::TcpStream, sync::Semaphore, task::JoinHandle, time::timeout};

use super::entry::Entry;
use crate::{
    config::ldap::{Bind, LdapConfig, LdapUri, Scope},
    inquiry::Hosts,
};

/// Searches sent and not answered yet. slapd ends a session with more than 100 of them (slapd.conf(5),
/// conn_max_pending), and up to here it never has to stop reading.
const MAX_IN_FLIGHT: usize = 64;

/// An address has one entry; a second one is all it takes to know of a fault.
const SIZE_LIMIT: i32 = 2;

/// Searches after which a connection is replaced: ldap3 remembers the number of every search as long as the
/// connection lives, a few bytes each.
const MAX_SEARCHES: usize = 100_000;

/// Result codes (RFC 4511 appendix A).
mod code {
    pub(super) const SUCCESS: u32 = 0;
    pub(super) const SIZE_LIMIT_EXCEEDED: u32 = 4;
    pub(super) const REFERRAL: u32 = 10;
    pub(super) const NO_SUCH_OBJECT: u32 = 32;
    pub(super) const INSUFFICIENT_ACCESS: u32 = 50;
    pub(super) const BUSY: u32 = 51;
    pub(super) const UNAVAILABLE: u32 = 52;
}

/// Why a search gave no entries, not even none.
#[derive(Debug)]
pub(super) enum SearchError {
    /// The server ended the connection: restarted, perhaps, or tired of an idle client.
    Closed(String),
    /// The server does not answer in time, or says that it can't help anybody: another one may.
    Failed(String),
    /// The server will not do this search. It would others, so it must not be taken for dead: who writes to a
    /// strange address would else take the directory away from everybody.
    Refused(String),
}

/// What to look for.
#[derive(Clone, Debug)]
pub(super) struct Query {
    pub(super) filter: String,
    pub(super) attributes: Arc<[String]>,
}

/// An open, bound connection whose server has answered at least once.
#[derive(Debug)]
pub(super) struct Connection {
    server: usize,
    ldap: Ldap,
    driver: JoinHandle<()>,
    permits: Semaphore,
    last_use: Mutex<Instant>,
    searches: AtomicUsize,
    useful: AtomicBool,
}

impl Connection {
    /// Connects to the server number `server` of the configuration and binds.
    ///
    /// # Errors
    ///
    /// What went wrong, without the password.
    pub(super) async fn open(
        config: &LdapConfig,
        server: usize,
        hosts: &Hosts,
        tls: Option<Arc<ClientConfig>>,
    ) -> Result<Self, String> {
        let uri = config.uri.get(server).ok_or("no such server")?;
        let limit = config.timeout.0;
        let connect = async {
            let addresses = match uri.tcp() {
                Some((host, port)) => hosts.addresses(server, host, port).await.map_err(|e| e.to_string())?,
                None => Vec::new(),
            };
            connect(config, uri, &addresses, tls).await
        };
        let (driver, ldap) = within(limit, "connect", connect).await??;
        let driver = tokio::spawn(async move {
            // What ends a connection is told by the searches that were waiting.
            let _ = driver.drive().await;
        });
        // From here on a drop ends the driver, and so the connection.
        let mut connection = Self {
            server,
            ldap,
            driver,
            permits: Semaphore::new(MAX_IN_FLIGHT),
            last_use: Mutex::new(Instant::now()),
            searches: AtomicUsize::new(0),
            useful: AtomicBool::new(false),
        };
        within(limit, "bind", connection.bind(config)).await??;
        Ok(connection)
    }

    /// Which server this is, counted from 0.
    pub(super) fn server(&self) -> usize {
        self.server
    }

    /// Whether the connection is open, as far as is known on this side, and not to be replaced for its age.
    pub(super) fn is_fit(&self, idle_limit: Duration) -> bool {
        let idle = self.last_use.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
        !self.driver.is_finished()
            && idle < idle_limit
            && self.searches.load(Ordering::Relaxed) < MAX_SEARCHES
    }

    /// Whether a search was ever answered here.
    pub(super) fn was_useful(&self) -> bool {
        self.useful.load(Ordering::Relaxed)
    }

    /// Searches; the time limit includes the wait for a free place.
    ///
    /// # Errors
    ///
    /// [`SearchError`]. More entries than asked for are no error here.
    pub(super) async fn search(&self, config: &LdapConfig, query: &Query) -> Result<Vec<Entry>, SearchError> {
        *self.last_use.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.searches.fetch_add(1, Ordering::Relaxed);
        let limit = config.timeout.0;
        let result = timeout(limit, async {
            let _permit = self.permits.acquire().await;
            let mut ldap = self.ldap.clone();
            ldap.with_search_options(SearchOptions::new().sizelimit(SIZE_LIMIT).timelimit(seconds(limit)))
                .search(&config.base, scope(config.scope), &query.filter, &query.attributes[..])
                .await
        });
        let SearchResult(entries, result) = match result.await {
            Err(_) => return Err(SearchError::Failed(too_slow("search", limit))),
            Ok(Err(error @ LdapError::FilterParsing)) => return Err(SearchError::Refused(describe(&error))),
            Ok(Err(error)) => return Err(SearchError::Closed(describe(&error))),
            Ok(Ok(result)) => result,
        };
        self.useful.store(true, Ordering::Relaxed);
        match result.rc {
            code::SUCCESS | code::SIZE_LIMIT_EXCEEDED => entries
                .into_iter()
                .map(|entry| Entry::from_ber(entry.0))
                .collect::<Option<_>>()
                .ok_or_else(|| SearchError::Refused("the server sent what is no entry".into())),
            // A referral is the address of another server, not an answer. And a base that is not there has no
            // users under it, but whoever took it away did not mean to say that nobody exists.
            code::REFERRAL
            | code::NO_SUCH_OBJECT
            | code::INSUFFICIENT_ACCESS
            | code::BUSY
            | code::UNAVAILABLE => Err(SearchError::Failed(refusal("search", &result))),
            _ => Err(SearchError::Refused(refusal("search", &result))),
        }
    }

    async fn bind(&mut self, config: &LdapConfig) -> Result<(), String> {
        let result = match config.bind() {
            Bind::Simple { dn, password } => {
                let password = password.ok_or("the password file was not read")?;
                self.ldap.simple_bind(dn, password.reveal()).await
            }
            Bind::External => self.ldap.sasl_external_bind().await,
            Bind::Anonymous => return self.greet().await,
        };
        let result = result.map_err(|error| describe(&error))?;
        if result.rc == code::SUCCESS { Ok(()) } else { Err(refusal("bind", &result)) }
    }

    /// Without a bind nothing has shown yet that there is a server behind the socket: the kernel accepts
    /// connections for one that hangs. Any answer will do, so the root entry (RFC 4512 §5.1) need not be readable.
    async fn greet(&mut self) -> Result<(), String> {
        self.ldap
            .search("", ldap3::Scope::Base, "(objectClass=*)", ["1.1"])
            .await
            .map(|_| ())
            .map_err(|error| describe(&error))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // A driver that is stuck in a write to a hung server would never see that its last handle is gone.
        self.driver.abort();
    }
}

async fn connect(
    config: &LdapConfig,
    uri: &LdapUri,
    addresses: &[SocketAddr],
    tls: Option<Arc<ClientConfig>>,
) -> Result<(LdapConnAsync, Ldap), String> {
    let mut settings = LdapConnSettings::new().set_starttls(config.starttls);
    if uri.is_tls() || config.starttls {
        // Without these ldap3 would trust what the system trusts, whatever ca-file says.
        settings = settings.set_config(tls.ok_or("the authorities' certificates were not read")?);
    }
    if uri.tcp().is_some() {
        let stream = TcpStream::connect(addresses).await.map_err(|e| e.to_string())?;
        // Searches are small and many: waiting for a full segment would put each behind the last one's answer.
        stream.set_nodelay(true).map_err(|e| e.to_string())?;
        let stream = stream.into_std().map_err(|e| e.to_string())?;
        settings = settings.set_std_stream(StdStream::Tcp(stream));
    }
    LdapConnAsync::from_url_with_settings(settings, uri.url()).await.map_err(|error| describe(&error))
}

async fn within<F: Future>(limit: Duration, what: &str, work: F) -> Result<F::Output, String> {
    timeout(limit, work).await.map_err(|_| too_slow(what, limit))
}

fn too_slow(what: &str, limit: Duration) -> String {
    format!("{what}: no answer within {limit:?}")
}

fn refusal(what: &str, result: &LdapResult) -> String {
    format!("{what}: {result}")
}

/// The whole chain: ldap3's own messages mostly leave out the cause.
fn describe(error: &LdapError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

fn scope(scope: Scope) -> ldap3::Scope {
    match scope {
        Scope::Base => ldap3::Scope::Base,
        Scope::One => ldap3::Scope::OneLevel,
        Scope::Sub => ldap3::Scope::Subtree,
    }
}

/// The limit that the server is told, in whole seconds: it should stop when nobody waits any more.
fn seconds(limit: Duration) -> i32 {
    i32::try_from(limit.as_secs().max(1)).unwrap_or(i32::MAX)
}
