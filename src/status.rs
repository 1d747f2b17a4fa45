//! What `usermilter status` shows: one document, filled in by the worker, read by the command.
//!
//! It names users and queue ids, which is why it is had on the control socket alone.

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Instant, SystemTime},
};

use nix::unistd::{Pid, getpid};
use serde::{Deserialize, Serialize};

use crate::{
    config::{Config, DEFAULT_PATH, SocketAddress},
    metrics::{By, ConnectionMetrics, Labels, Percentiles, Place, ResolverMetrics, Service, seconds_of},
    monitor::{History, Incident, Phase},
    pipeline::Pipeline,
    resolver::ldap::ServerState,
};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};

/// The document. Times are Unix time, and spans are seconds; counts are since the worker started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Of the program that serves.
    pub version: String,
    /// When this was so.
    pub time: f64,
    /// `serving` or `draining`.
    pub state: String,
    /// The configuration file.
    pub configuration: String,
    /// The monitor.
    pub monitor: Process,
    /// The worker.
    pub worker: Process,
    /// Workers that died and were replaced, since the daemon started.
    pub restarts: u64,
    /// The last of them, latest first.
    pub recent_restarts: Vec<Event>,
    /// Reloads, since the daemon started.
    pub reloads: Reloads,
    /// `milter`, `policy`, `metrics` and `control`.
    pub services: Vec<ServiceStatus>,
    /// Transactions, by outcome.
    pub transactions: BTreeMap<String, u64>,
    /// What recipients were told at RCPT TO: by interface, then by outcome.
    pub recipients: BTreeMap<String, BTreeMap<String, u64>>,
    /// Verdicts: by where they came from, then by verdict. What never was is left out.
    pub verdicts: BTreeMap<String, BTreeMap<String, u64>>,
    /// Filters.
    pub filters: Filters,
    /// Resolvers, in the order of the configuration.
    pub resolvers: Vec<ResolverStatus>,
    /// Messages that are kept.
    pub spool: Spool,
    /// Entries for users' own logs that could not be written.
    pub user_log_failures: u64,
}

/// A process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// When it started.
    pub started: f64,
}

/// Something that went wrong.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Event {
    /// When.
    pub time: f64,
    /// What.
    pub what: String,
}

/// Reloads of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reloads {
    /// That took effect.
    pub succeeded: u64,
    /// That changed nothing.
    pub failed: u64,
    /// Why the last one failed, if it did.
    pub last_error: Option<Event>,
}

/// Connections of a service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Its name.
    pub name: String,
    /// Where it listens; empty: it is off.
    pub addresses: Vec<String>,
    /// Connections now.
    pub open: u64,
    /// Connections at most, for each socket of `metrics` and `control`, and for all of another service.
    pub limit: u64,
    /// Connections so far.
    pub accepted: u64,
    /// Connections closed since there were too many.
    pub refused: u64,
}

/// Filters.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Filters {
    /// Those that run now, eldest first.
    pub running: Vec<RunningFilter>,
    /// How many may run at a time.
    pub limit: u64,
    /// How many wait.
    pub waiting: u64,
    /// How they ended: by phase, then by result. What never was is left out.
    pub results: BTreeMap<String, BTreeMap<String, u64>>,
    /// By phase.
    pub run_time: BTreeMap<String, Times>,
    /// By phase.
    pub queue_time: BTreeMap<String, Times>,
}

/// A filter that runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunningFilter {
    /// Whose.
    pub user: String,
    /// `recipient` or `message`.
    pub phase: String,
    /// For which mail.
    pub queue_id: String,
    /// For how long.
    pub seconds: f64,
}

/// How long something takes.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Times {
    /// How often it happened.
    pub count: u64,
    /// All together.
    pub sum: f64,
    /// The median.
    pub p50: f64,
    /// Nine of ten took no longer.
    pub p90: f64,
    /// 99 of a hundred took no longer.
    pub p99: f64,
}

/// A resolver.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ResolverStatus {
    /// Its type, with the file or the servers.
    pub name: String,
    /// Where answers came from.
    pub lookups: BTreeMap<String, u64>,
    /// How long it took to ask.
    pub latency: Times,
    /// Servers of a directory.
    pub servers: Vec<Server>,
}

/// A server of a directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Server {
    /// Its address.
    pub uri: String,
    /// `in use`, `failed`, or `idle`.
    pub state: String,
    /// How often it failed.
    pub failures: u64,
    /// When and why it last did, unless it has answered since.
    pub last_failure: Option<Event>,
}

/// Messages that are kept while they come in or are judged.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spool {
    /// How many.
    pub messages: u64,
    /// Their bytes in memory.
    pub memory_bytes: u64,
    /// Their bytes on disk.
    pub disk_bytes: u64,
}

impl Status {
    /// The status of a worker that serves, or drains.
    pub fn new(settings: &Config, pipeline: &Pipeline, history: &History, worker: Worker) -> Self {
        let metrics = pipeline.metrics();
        let path = history.config_path.as_deref().unwrap_or(Path::new(DEFAULT_PATH));
        let state = if worker.is_draining { "draining" } else { "serving" };
        let labels = pipeline.resolvers();
        let resolvers = labels.zip(&metrics.resolvers);
        let mut recipients = BTreeMap::<_, BTreeMap<_, _>>::new();
        for ((interface, outcome), counter) in metrics.recipients.iter() {
            let outcomes = recipients.entry(interface.as_str().to_owned()).or_default();
            outcomes.insert(outcome.as_str().to_owned(), counter.get());
        }
        let mut verdicts = BTreeMap::<String, BTreeMap<String, u64>>::new();
        for ((_, (said, source)), counter) in metrics.verdicts.iter().filter(|(_, c)| c.get() > 0) {
            let of_source = verdicts.entry(source.as_str().to_owned()).or_default();
            *of_source.entry(said.as_str().to_owned()).or_default() += counter.get();
        }
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            time: seconds_of(SystemTime::now()),
            state: state.into(),
            configuration: path.display().to_string(),
            monitor: Process { pid: worker.monitor.as_raw(), started: seconds_of(history.started) },
            worker: Process { pid: getpid().as_raw(), started: seconds_of(worker.started) },
            restarts: history.restarts,
            recent_restarts: history.recent_restarts.iter().map(Event::from).collect(),
            reloads: Reloads {
                succeeded: history.reloads,
                failed: history.reload_failures,
                last_error: history.last_reload_error.as_ref().map(Event::from),
            },
            services: services(settings, &metrics.connections, worker.watchers_limit),
            transactions: by_word(&metrics.transactions, |outcome| outcome.as_str()),
            recipients,
            verdicts,
            filters: filters(settings, pipeline),
            resolvers: resolvers.map(|((name, servers), m)| ResolverStatus::new(name, servers, m)).collect(),
            spool: Spool {
                messages: number(&metrics.spool.messages),
                memory_bytes: number(metrics.spool.bytes(Place::Memory)),
                disk_bytes: number(metrics.spool.bytes(Place::Disk)),
            },
            user_log_failures: metrics.user_log_failures.get(),
        }
    }
}

/// What the worker knows of itself.
#[derive(Clone, Copy, Debug)]
pub struct Worker {
    /// The process that started it.
    pub monitor: Pid,
    /// When that was.
    pub started: SystemTime,
    /// Whether it is about to leave.
    pub is_draining: bool,
    /// Connections at a time to each socket of those who watch.
    pub watchers_limit: usize,
}

fn services(
    settings: &Config,
    connections: &By<Service, ConnectionMetrics>,
    watchers_limit: usize,
) -> Vec<ServiceStatus> {
    let server = &settings.server;
    let each = connections.iter().map(|(service, metrics)| {
        let (addresses, limit): (Vec<SocketAddress>, _) = match service {
            Service::Milter => (server.milter.clone(), server.max_connections),
            Service::Policy => (server.policy.clone(), server.max_connections),
            Service::Metrics => (server.metrics.iter().cloned().collect(), watchers_limit),
            Service::Control => {
                (server.control.0.iter().cloned().map(SocketAddress::Unix).collect(), watchers_limit)
            }
        };
        ServiceStatus {
            name: service.as_str().into(),
            addresses: addresses.iter().map(ToString::to_string).collect(),
            open: number(&metrics.open),
            limit: limit as u64,
            accepted: metrics.accepted.get(),
            refused: metrics.refused.get(),
        }
    });
    each.collect()
}

fn filters(settings: &Config, pipeline: &Pipeline) -> Filters {
    let metrics = &pipeline.metrics().filters;
    let now = Instant::now();
    let running = metrics.running.now().into_iter().map(|filter| RunningFilter {
        user: filter.user,
        phase: filter.phase.to_owned(),
        queue_id: filter.queue_id,
        seconds: now.saturating_duration_since(filter.started).as_secs_f64(),
    });
    let mut results = BTreeMap::<_, BTreeMap<_, _>>::new();
    for ((phase, kind), counter) in metrics.answers.iter().filter(|(_, counter)| counter.get() > 0) {
        let of_phase = results.entry(phase.as_str().to_owned()).or_default();
        of_phase.insert(kind.as_str().to_owned(), counter.get());
    }
    let times = |histograms: &By<Phase, crate::metrics::Histogram>| {
        let each = histograms.iter().map(|(phase, h)| (phase.as_str().to_owned(), h.percentiles().into()));
        each.collect()
    };
    Filters {
        running: running.collect(),
        limit: settings.filter.max_processes as u64,
        waiting: number(&metrics.waiting),
        results,
        run_time: times(&metrics.run_time),
        queue_time: times(&metrics.queue_time),
    }
}

impl ResolverStatus {
    fn new(name: String, servers: Vec<ServerState>, metrics: &ResolverMetrics) -> Self {
        let servers = servers.into_iter().zip(&metrics.server_failures).map(|(server, failures)| Server {
            uri: server.uri,
            state: match (server.in_use, &server.failure) {
                (true, _) => "in use".into(),
                (false, Some(_)) => "failed".into(),
                (false, None) => "idle".into(),
            },
            failures: failures.get(),
            last_failure: server.failure.map(|(ago, what)| {
                let time = seconds_of(SystemTime::now()) - ago.as_secs_f64();
                Event { time, what }
            }),
        });
        Self {
            name,
            lookups: by_word(&metrics.lookups, |source| source.as_str()),
            latency: metrics.latency.percentiles().into(),
            servers: servers.collect(),
        }
    }
}

fn by_word<L: Labels>(counters: &By<L, Counter>, word: impl Fn(L) -> &'static str) -> BTreeMap<String, u64> {
    counters.iter().map(|(label, counter)| (word(label).to_owned(), counter.get())).collect()
}

/// A gauge that counts things: never negative, but for a moment.
fn number(gauge: &Gauge) -> u64 {
    u64::try_from(gauge.get()).unwrap_or(0)
}

impl From<&Incident> for Event {
    fn from(incident: &Incident) -> Self {
        Self { time: seconds_of(incident.at), what: incident.what.clone() }
    }
}

impl From<Percentiles> for Times {
    fn from(percentiles: Percentiles) -> Self {
        let Percentiles { count, sum, p50, p90, p99 } = percentiles;
        Self { count, sum, p50, p90, p99 }
    }
}
