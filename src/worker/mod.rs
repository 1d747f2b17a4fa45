//! The unprivileged side: drops every privilege, then serves milter and policy clients with tokio until it is told
//! to drain. Composition root: here the stages are put together.

mod accept;
mod channel;
mod confine;
mod http;
mod threads;
mod user;

use std::{
    future::Future,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, SystemTime},
};

use nix::{
    sys::{
        prctl,
        resource::{Resource, getrlimit, setrlimit},
        signal::Signal,
        stat::{Mode, umask},
    },
    unistd::{Pid, Uid, getppid},
};
use threads::{Threads, runtime};
use tokio::{sync::watch, time::timeout};
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use accept::accept_loop;
pub use accept::{Listener, Stream};
pub use channel::{Drain, Ended, Finished, InspectError, Monitor, RunRequest};
pub use user::{UserError, WorkerUser};

use crate::{
    config::Config,
    inquiry::Inquiry,
    logging::{Chain, tell_lost},
    metrics::{Metrics, Service},
    milter,
    monitor::History,
    pipeline::Pipeline,
    policy,
    resolver::{self, Files},
    sys,
};

/// How often files of the configuration (aliases, passwd-files) are looked at. A change in place takes two looks.
const REFRESH_INTERVAL: Duration = Duration::from_millis(500);

/// What the worker has from the monitor.
#[derive(Debug)]
pub struct Inherited {
    /// The configuration.
    pub settings: Arc<Config>,
    /// Who to be.
    pub user: WorkerUser,
    /// The parent.
    pub monitor: Pid,
    /// The socket to the parent.
    pub channel: OwnedFd,
    /// Listening sockets of the milter interface.
    pub milter: Vec<OwnedFd>,
    /// Listening sockets of the policy interface.
    pub policy: Vec<OwnedFd>,
    /// Listening sockets for `/metrics` and health checks.
    pub metrics: Vec<OwnedFd>,
    /// Listening sockets for `usermilter status`.
    pub control: Vec<OwnedFd>,
    /// What happened before.
    pub history: History,
}

/// Why a worker can't serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WorkerError {
    #[error("{what}")]
    System { what: &'static str, source: std::io::Error },
    #[error("privileges could be regained")]
    NotDropped,
    #[error("the monitor is gone")]
    Orphan,
}

fn system<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> WorkerError {
    move |source| WorkerError::System { what, source: source.into() }
}

/// Runs a worker in a process that was just forked from the monitor. Returns the exit status.
pub fn start(inherited: Inherited) -> i32 {
    let threads = Threads::count();
    in_confined_process(inherited, |inherited, files| {
        runtime().map_err(system("tokio"))?.block_on(serve(inherited, files, threads)).map(|()| 0)
    })
}

/// As [`start`], with something else than to serve: what a worker can't do is tested with one that tries.
pub fn start_with(inherited: Inherited, body: impl FnOnce(Inherited) -> i32) -> i32 {
    in_confined_process(inherited, |inherited, _| Ok(body(inherited)))
}

fn in_confined_process(
    inherited: Inherited,
    body: impl FnOnce(Inherited, Files) -> Result<i32, WorkerError>,
) -> i32 {
    in_process(inherited, |inherited| {
        // The last files of the configuration that this process opens by itself.
        let files = Files::open(&inherited.settings);
        confine::confine(&inherited.settings, &files.included());
        body(inherited, files)
    })
}

/// The same for a worker that serves nobody: drops its privileges, then does what a command wants.
pub fn start_for_command<F>(inherited: Inherited, command: impl FnOnce(Arc<Config>, Arc<Monitor>) -> F) -> i32
where
    F: Future<Output = i32>,
{
    in_process(inherited, |inherited| {
        runtime().map_err(system("tokio"))?.block_on(async {
            let monitor = Monitor::new(inherited.channel, inherited.history)
                .map_err(system("channel to the monitor"))?;
            monitor.ready().await.map_err(system("telling the monitor"))?;
            let status = command(inherited.settings, Arc::clone(&monitor)).await;
            std::mem::forget(monitor);
            Ok(status)
        })
    })
}

fn in_process(inherited: Inherited, body: impl FnOnce(Inherited) -> Result<i32, WorkerError>) -> i32 {
    // Filters open the message anew, whatever umask whoever started us has.
    umask(Mode::S_IWGRP | Mode::S_IWOTH);
    // Open until the process is gone: the monitor kills a worker that closes its channel, and why would be lost.
    std::mem::forget(inherited.channel.try_clone());
    match prepare_process(&inherited).and_then(|()| body(inherited)) {
        Ok(status) => status,
        Err(error) => {
            error!("worker: {}", Chain(&error));
            1
        }
    }
}

/// Leaves nothing of the monitor but what is needed.
fn prepare_process(inherited: &Inherited) -> Result<(), WorkerError> {
    sys::reset_signals().map_err(system("signals"))?;
    // Sent to a whole group or control group they are meant for the monitor, which decides.
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGPIPE] {
        sys::ignore_signal(signal).map_err(system("signals"))?;
    }
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(system("getrlimit"))?;
    // Two per connection of an interface at most, and some for files.
    let wanted = soft.max(4 * inherited.settings.server.max_connections as u64 + 512);
    let hard = if Uid::effective().is_root() { hard.max(wanted) } else { hard };
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, wanted.min(hard), hard) {
        warn!(wanted, hard, "RLIMIT_NOFILE stays at {soft}: {error}");
    }
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(system("setrlimit"))?;
    inherited.user.take_over()?;
    prctl::set_no_new_privs().map_err(system("prctl(PR_SET_NO_NEW_PRIVS)"))?;
    prctl::set_dumpable(false).map_err(system("prctl(PR_SET_DUMPABLE)"))?;
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(system("prctl(PR_SET_PDEATHSIG)"))?;
    if getppid() == inherited.monitor { Ok(()) } else { Err(WorkerError::Orphan) }
}

async fn serve(inherited: Inherited, files: Files, threads: usize) -> Result<(), WorkerError> {
    let settings = inherited.settings;
    let monitor =
        Monitor::new(inherited.channel, inherited.history).map_err(system("channel to the monitor"))?;
    let threads = Threads::start(threads).map_err(system("threads"))?;
    monitor.serve_by(threads.clone());
    // Transactions and policy requests under way; connections have trackers of their own.
    let transactions = TaskTracker::new();
    let metrics = Arc::new(Metrics::new(&settings, monitor.history()));
    let inquiry = Inquiry::through(Arc::clone(&monitor), &settings);
    let resolver = resolver::Chain::new(&settings, files, inquiry, &metrics.resolvers);
    let pipeline =
        Pipeline::new(Arc::clone(&settings), &monitor, resolver, transactions.clone(), Arc::clone(&metrics));
    let pipeline = Arc::new(pipeline);
    let drain = monitor.drain();

    let milter = milter::Service::new(Arc::clone(&pipeline), &settings, transactions.clone());
    let policy = Arc::new(policy::Service::new(Arc::clone(&pipeline)));
    let milter_connections = TaskTracker::new();
    let policy_connections = TaskTracker::new();
    let limit = settings.server.max_connections;
    let listeners =
        |sockets: Vec<OwnedFd>| sockets.into_iter().map(Listener::new).collect::<Result<Vec<_>, _>>();
    let milter_listeners = listeners(inherited.milter).map_err(system("milter socket"))?;
    let policy_listeners = listeners(inherited.policy).map_err(system("policy socket"))?;
    let metrics_listeners = listeners(inherited.metrics).map_err(system("metrics socket"))?;
    let control_listeners = listeners(inherited.control).map_err(system("control socket"))?;
    // Nothing can fail from here on: no connection is accepted that would be lost with a worker that is not wanted.
    monitor.ready().await.map_err(system("telling the monitor"))?;
    let mut acceptors = Vec::new();
    for listener in milter_listeners {
        let (service, tracker) = (milter.clone(), milter_connections.clone());
        let counted = metrics.connections.of(Service::Milter).clone();
        let serve = move |stream| service.clone().serve(stream);
        let accept = accept_loop(listener, Service::Milter, limit, tracker, counted, threads.clone(), serve);
        acceptors.push(tokio::spawn(accept));
    }
    for listener in policy_listeners {
        let (service, tracker, drain) = (Arc::clone(&policy), policy_connections.clone(), drain.clone());
        let counted = metrics.connections.of(Service::Policy).clone();
        let serve = move |stream| policy::serve(Arc::clone(&service), stream, drain.clone());
        let accept = accept_loop(listener, Service::Policy, limit, tracker, counted, threads.clone(), serve);
        acceptors.push(tokio::spawn(accept));
    }
    let watched = Arc::new(http::Watched {
        pipeline: Arc::clone(&pipeline),
        settings: Arc::clone(&settings),
        history: monitor.history(),
        drain: drain.clone(),
        monitor: inherited.monitor,
        started: SystemTime::now(),
    });
    let mut watchers = Vec::new();
    let watching = [TaskTracker::new(), TaskTracker::new()];
    let sockets = [(Service::Metrics, metrics_listeners), (Service::Control, control_listeners)];
    for ((service, listeners), tracker) in sockets.into_iter().zip(&watching) {
        for listener in listeners {
            let (watched, counted) = (Arc::clone(&watched), metrics.connections.of(service).clone());
            let serve = move |stream| http::serve(Arc::clone(&watched), service, stream);
            let (tracker, threads) = (tracker.clone(), threads.clone());
            let limit = http::MAX_CONNECTIONS;
            let accept = accept_loop(listener, service, limit, tracker, counted, threads, serve);
            watchers.push(tokio::spawn(accept));
        }
    }
    tokio::spawn(refresh(Arc::clone(&pipeline)));

    let mode = wait_for_drain(drain.clone()).await;
    // Dropping the listeners leaves new connections to the next worker, or refuses them.
    acceptors.iter().for_each(tokio::task::JoinHandle::abort);
    for acceptor in acceptors {
        let _ = acceptor.await;
    }
    // With another worker in place, it is that one's turn; else whoever watches can go on until the end.
    if mode.connections {
        watchers.iter().for_each(tokio::task::JoinHandle::abort);
    }
    for tracker in [&transactions, &milter_connections, &policy_connections] {
        tracker.close();
    }
    info!(connections = milter_connections.len(), transactions = transactions.len(), "draining");
    let finish = async {
        policy_connections.wait().await;
        if mode.connections {
            let mut drain = drain;
            tokio::select! {
                () = milter_connections.wait() => (),
                _ = drain.wait_for(|drain| drain.is_some_and(|drain| !drain.connections)) => (),
            }
        }
        transactions.wait().await;
    };
    if timeout(settings.server.drain_timeout.0, finish).await.is_err() {
        warn!(transactions = transactions.len(), "drain time is over; leaving");
    }
    milter.close().await;
    // Nor is anybody left without an answer who asked before the next worker was there.
    watchers.iter().for_each(tokio::task::JoinHandle::abort);
    let finish = async {
        milter_connections.wait().await;
        for connections in &watching {
            connections.close();
            connections.wait().await;
        }
    };
    let _ = timeout(Duration::from_secs(1), finish).await;
    Ok(())
}

/// Re-reads what administrators change, off the async threads, since a file system can hang.
async fn refresh(pipeline: Arc<Pipeline>) {
    loop {
        tokio::time::sleep(REFRESH_INTERVAL).await;
        let pipeline = Arc::clone(&pipeline);
        let _ = tokio::task::spawn_blocking(move || pipeline.refresh()).await;
        tell_lost();
    }
}

async fn wait_for_drain(mut drain: watch::Receiver<Option<Drain>>) -> Drain {
    match drain.wait_for(Option::is_some).await {
        Ok(mode) => mode.unwrap_or(Drain { connections: false }),
        Err(_) => Drain { connections: false },
    }
}
