//! What is counted. One [`Metrics`] is made by the worker and handed to whoever has something to count; `/metrics`
//! shows it in the form of OpenMetrics 1.0.
//!
//! Labels have values from lists that are known at the start: no address, no user, nothing that a stranger says.
//! docs/monitoring.md says what each metric is good for.

mod histogram;
mod label;
mod running;
mod series;

use std::{fmt, sync::Arc, time::SystemTime};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{
        counter::{ConstCounter, Counter},
        gauge::{ConstGauge, Gauge},
        info::Info,
    },
    registry::{Registry, Unit},
};
use tokio::sync::watch;

pub use histogram::{Histogram, Percentiles};
pub use label::{AnswerSource, LabelSet, Labels, Place, Service};
pub use running::{Running, RunningFilter};
pub use series::By;

use crate::{
    config::{Config, ResolverConfig},
    filter::AnswerKind,
    monitor::{History, Phase},
    recipient::Source,
    transaction::Interface,
    verdict::{AtRcpt, Ending, Said},
};
use series::Series;

/// Everything that is counted, since the worker started.
#[derive(Debug)]
pub struct Metrics {
    /// Transactions that ended, over the milter interface: a policy request is about one recipient.
    pub transactions: By<Ending, Counter>,
    /// Recipients, as far as RCPT TO decided about them.
    pub recipients: By<(Interface, AtRcpt), Counter>,
    /// What users said, and where it came from.
    pub verdicts: By<(Interface, (Said, Source)), Counter>,
    /// Filters.
    pub filters: FilterMetrics,
    /// By position in the configuration.
    pub resolvers: Vec<ResolverMetrics>,
    /// Connections.
    pub connections: By<Service, ConnectionMetrics>,
    /// Messages being received or judged.
    pub spool: SpoolMetrics,
    /// Entries for users' own logs that were lost.
    pub user_log_failures: Counter,
    registry: Registry,
}

/// Of filters.
#[derive(Clone, Debug, Default)]
pub struct FilterMetrics(Arc<FilterSeries>);

/// See [`FilterMetrics`].
#[derive(Debug, Default)]
pub struct FilterSeries {
    /// How they ended.
    pub answers: By<(Phase, AnswerKind), Counter>,
    /// From fork to end.
    pub run_time: By<Phase, Histogram>,
    /// How long they waited for others to end.
    pub queue_time: By<Phase, Histogram>,
    /// How many wait.
    pub waiting: Gauge,
    /// Those that run.
    pub running: Running,
}

/// Of one resolver.
#[derive(Clone, Debug, Default)]
pub struct ResolverMetrics {
    /// Where answers came from.
    pub lookups: Arc<By<AnswerSource, Counter>>,
    /// How long NSS or the directory took.
    pub latency: Histogram,
    /// Failures of each LDAP server, in the order of the configuration.
    pub server_failures: Vec<Counter>,
}

/// Of one service.
#[derive(Clone, Debug, Default)]
pub struct ConnectionMetrics {
    /// Now.
    pub open: Gauge,
    /// Since the start.
    pub accepted: Counter,
    /// Closed at once, since there were too many.
    pub refused: Counter,
}

/// Of messages that are kept while they are judged.
#[derive(Clone, Debug, Default)]
pub struct SpoolMetrics {
    /// How many there are.
    pub messages: Gauge,
    /// Their bytes in memory.
    pub memory: Gauge,
    /// Their bytes on disk.
    pub disk: Gauge,
}

/// One more, as long as it lives.
#[derive(Debug)]
pub struct OneMore(Gauge);

impl OneMore {
    /// Adds one to the gauge.
    pub fn of(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for OneMore {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl std::ops::Deref for FilterMetrics {
    type Target = FilterSeries;

    fn deref(&self) -> &FilterSeries {
        &self.0
    }
}

impl SpoolMetrics {
    /// The bytes at a place.
    pub fn bytes(&self, place: Place) -> &Gauge {
        match place {
            Place::Memory => &self.memory,
            Place::Disk => &self.disk,
        }
    }
}

impl Metrics {
    /// Nothing counted yet. `history`: what the monitor has counted.
    pub fn new(config: &Config, history: watch::Receiver<History>) -> Self {
        let mut metrics = Self {
            transactions: By::default(),
            recipients: By::default(),
            verdicts: By::default(),
            filters: FilterMetrics::default(),
            resolvers: config.resolvers.iter().map(ResolverMetrics::new).collect(),
            connections: By::default(),
            spool: SpoolMetrics::default(),
            user_log_failures: Counter::default(),
            registry: Registry::with_prefix("usermilter"),
        };
        metrics.register(config, history);
        metrics
    }

    /// The text of `/metrics`.
    ///
    /// # Errors
    ///
    /// Never, as long as text can be written to memory.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }

    fn register(&mut self, config: &Config, history: watch::Receiver<History>) {
        let registry = &mut self.registry;
        let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The program", build);
        registry.register_collector(Box::new(FromHistory { history, worker_started: SystemTime::now() }));

        let milter = registry.sub_registry_with_label(("interface".into(), "milter".into()));
        let help = "Transactions (MAIL FROM to end of message) that ended, by outcome";
        milter.register("transactions", help, self.transactions.series());
        let help =
            "Recipients, by what they were told at RCPT TO; pending: decided at the end of the message";
        registry.register("recipients", help, self.recipients.series());
        let help = "Verdicts of users, and where they came from";
        registry.register("verdicts", help, self.verdicts.series());

        let filters = &self.filters;
        registry.register("filter_runs", "Filters asked, by how they ended", filters.answers.series());
        let help = "Run time of filters, from fork to end";
        registry.register_with_unit("filter_run", help, Unit::Seconds, filters.run_time.series());
        let help = "How long filters waited until there was room for them";
        registry.register_with_unit("filter_queue", help, Unit::Seconds, filters.queue_time.series());
        registry.register("filters_running", "Filters that run", filters.running.count.clone());
        registry.register(
            "filters_waiting",
            "Filters that wait until there is room",
            filters.waiting.clone(),
        );
        let limit = constant(config.filter.max_processes);
        registry.register("filters_limit", "Filters that may run at a time (filter.max-processes)", limit);

        let help = "Questions to resolvers, by where the answer came from";
        let lookups = self.resolvers.iter().zip(&config.resolvers).enumerate();
        let lookups = lookups.flat_map(|(n, (metrics, config))| {
            sources(config).iter().map(move |source| {
                let mut labels = resolver_labels(n, config);
                source.write(&mut labels);
                (labels, metrics.lookups.of(*source).clone())
            })
        });
        registry.register("resolver_lookups", help, Series::new(lookups));
        let help = "How long questions took that a resolver did not answer from memory";
        let latency = self.resolvers.iter().zip(&config.resolvers).enumerate();
        let latency = latency.filter(|(_, (_, config))| sources(config).contains(&AnswerSource::Asked));
        let latency =
            latency.map(|(n, (metrics, config))| (resolver_labels(n, config), metrics.latency.clone()));
        let latency = Series::new(latency);
        registry.register_with_unit("resolver_latency", help, Unit::Seconds, latency);
        let failures = self.resolvers.iter().enumerate().flat_map(|(n, resolver)| {
            resolver.server_failures.iter().enumerate().map(move |(server, counter)| {
                let labels = vec![("resolver", (n + 1).to_string()), ("server", (server + 1).to_string())];
                (labels, counter.clone())
            })
        });
        let help = "Failures of directory servers, by their places in the configuration";
        registry.register("ldap_failures", help, Series::new(failures));

        let connections = |select: fn(&ConnectionMetrics) -> Counter| {
            Series::new(self.connections.iter().map(|(service, metrics)| (labels(service), select(metrics))))
        };
        let accepted = connections(|metrics| metrics.accepted.clone());
        registry.register("connections", "Connections accepted", accepted);
        let refused = connections(|metrics| metrics.refused.clone());
        registry.register("connections_refused", "Connections closed since there were too many", refused);
        let open = self.connections.iter().map(|(service, metrics)| (labels(service), metrics.open.clone()));
        registry.register("connections_open", "Connections open", Series::new(open));
        let limit = constant(config.server.max_connections);
        let help = "Connections that the milter and policy services each take (server.max-connections)";
        registry.register("connections_limit", help, limit);

        let messages = self.spool.messages.clone();
        registry.register("spool_messages", "Messages kept while they come in or are judged", messages);
        let places = [Place::Memory, Place::Disk];
        let bytes = places.map(|place| (labels(place), self.spool.bytes(place).clone()));
        registry.register_with_unit("spool", "Size of these messages", Unit::Bytes, Series::new(bytes));
        let help = "Entries for users' own logs that could not be written";
        registry.register("user_log_failures", help, self.user_log_failures.clone());
    }
}

impl ResolverMetrics {
    fn new(config: &ResolverConfig) -> Self {
        let servers = match config {
            ResolverConfig::Ldap(config) => config.uri.len(),
            ResolverConfig::Passwd(_) | ResolverConfig::PasswdFile(_) => 0,
        };
        // Clones of a counter would be the same one.
        let server_failures = std::iter::repeat_with(Counter::default).take(servers).collect();
        Self { server_failures, ..Self::default() }
    }
}

/// Where a resolver's answers can come from.
fn sources(config: &ResolverConfig) -> &'static [AnswerSource] {
    match config {
        ResolverConfig::Passwd(_) => &[AnswerSource::Cache, AnswerSource::Asked, AnswerSource::Unavailable],
        ResolverConfig::PasswdFile(_) => &[AnswerSource::File, AnswerSource::Unavailable],
        ResolverConfig::Ldap(_) => {
            &[AnswerSource::Cache, AnswerSource::Asked, AnswerSource::Stale, AnswerSource::Unavailable]
        }
    }
}

fn resolver_labels(n: usize, config: &ResolverConfig) -> LabelSet {
    vec![("resolver", (n + 1).to_string()), ("type", config.kind().to_owned())]
}

fn labels(value: impl Labels) -> LabelSet {
    let mut labels = LabelSet::new();
    value.write(&mut labels);
    labels
}

fn constant(value: usize) -> Gauge {
    let gauge = Gauge::default();
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    gauge
}

/// What the monitor has counted: it outlives workers.
#[derive(Debug)]
struct FromHistory {
    history: watch::Receiver<History>,
    worker_started: SystemTime,
}

impl Collector for FromHistory {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let history = self.history.borrow();
        let mut metric = |name, help, unit: Option<&Unit>, metric: &dyn EncodeMetric| {
            metric.encode(encoder.encode_descriptor(name, help, unit, metric.metric_type())?)
        };
        let (seconds, started) = (Some(&Unit::Seconds), seconds_of(history.started));
        metric("start_time", "When the daemon started (Unix time)", seconds, &ConstGauge::new(started))?;
        let started = seconds_of(self.worker_started);
        metric(
            "worker_start_time",
            "When this worker started (Unix time)",
            seconds,
            &ConstGauge::new(started),
        )?;
        let restarts = "Workers that died and were replaced";
        metric("worker_restarts", restarts, None, &ConstCounter::new(history.restarts))?;
        let reloads = "Reloads of the configuration that took effect";
        metric("reloads", reloads, None, &ConstCounter::new(history.reloads))?;
        let failures =
            "Reloads that changed nothing, since the configuration has a fault or no worker came up with it";
        metric("reload_failures", failures, None, &ConstCounter::new(history.reload_failures))?;
        let last = i64::from(history.last_reload_error.is_none());
        metric("last_reload_successful", "Whether the last reload took effect", None, &ConstGauge::new(last))
    }
}

/// Unix time.
pub fn seconds_of(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
