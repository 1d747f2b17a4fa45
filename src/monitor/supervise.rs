//! The monitor's loop, and the life cycle of workers.
//!
//! There is one worker that serves, at times a *candidate* that is to replace it (reload), and workers that
//! *drain*. The listening sockets belong to the monitor, so that none of this loses a connection.

use std::{
    collections::VecDeque,
    io,
    ops::ControlFlow,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal, kill},
        signalfd::{SfdFlags, SignalFd},
        socket::{AddressFamily, SockFlag, SockType, socketpair},
    },
    unistd::Pid,
};
use tracing::{error, info, warn};

use super::{
    Activated, BindError,
    history::{History, shortened},
    jobs::{Ended, Jobs, WorkerId},
    manager::Manager,
    privileges,
    sockets::{Listener, Listeners},
    wire::{Event, MAX_PACKET, Request, decode, encode},
};
use crate::{
    config::{Config, ConfigError},
    logging::{Chain, tell_lost},
    sys::{self, ChildEnd},
    worker::{self, Inherited, UserError, WorkerUser},
};

/// How long a new worker may take until it is ready.
const READY_TIME_LIMIT: Duration = Duration::from_secs(30);
/// A worker that lived as long is restarted at once.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);
/// First and longest pause before a worker is restarted that died soon.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));
/// More draining workers than this, and the eldest no longer waits for open connections.
const MAX_DRAINING: usize = 3;
/// Packets of one worker that are handled before signals, time limits and other workers have their turn.
const MAX_PACKETS_AT_ONCE: usize = 64;
/// A worker that leaves more events unread than its jobs can have, and this many, reads none.
const MAX_UNREAD: usize = 1024;
/// A worker that has not left this long after its drain time is killed.
const DRAIN_MARGIN: Duration = Duration::from_secs(3);

/// How often workers are asked whether they are alive; more often if the service manager is impatient, so that a worker
/// that hangs is replaced before all of us are.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// Signs of life to the manager are this many times as rare.
const PINGS_FOR_A_SIGN: u32 = 4;
/// A worker that has not answered so many times in a row is killed. Counted, not timed: when the monitor itself was
/// stopped for an hour (job control, a virtual machine), no worker is at fault.
const MAX_UNANSWERED: u32 = 4;

/// Why the monitor ends with an error.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The configuration can't be used.
    #[error("configuration")]
    Config(#[from] ConfigError),
    /// A socket can't be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The system refuses something basic.
    #[error("{what}")]
    System {
        /// What failed.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The first worker did not come up; its own message is in the log.
    #[error("the worker could not be started")]
    Worker,
    /// Nobody can be a worker.
    #[error(transparent)]
    User(#[from] UserError),
}

impl MonitorError {
    /// Whether the configuration has to be changed, or the host.
    pub fn is_misconfiguration(&self) -> bool {
        match self {
            Self::Config(_) | Self::Bind(_) => true,
            Self::User(error) => !matches!(error, UserError::Unavailable { .. }),
            Self::System { .. } | Self::Worker => false,
        }
    }
}

fn system(what: &'static str) -> impl FnOnce(Errno) -> MonitorError {
    move |errno| MonitorError::System { what, source: errno.into() }
}

/// Runs the daemon in the foreground until SIGTERM or SIGINT.
///
/// # Errors
///
/// [`MonitorError`] if it can't start; later trouble is logged and lived with.
pub fn serve(config_path: Option<PathBuf>, config: Config, activated: Activated) -> Result<(), MonitorError> {
    serve_on(config_path, config, activated, worker::start)
}

/// Runs one worker to its end, without sockets, and serves its requests as those of any worker: for commands that
/// show what the daemon would do. Returns the worker's exit status.
///
/// # Errors
///
/// [`MonitorError`] if it can't start, or ends without a status.
pub fn run_once(
    config: Config,
    run_worker: impl Fn(Inherited) -> i32 + 'static,
) -> Result<i32, MonitorError> {
    // Filters get what they get from a daemon.
    privileges::reduce();
    let mut monitor =
        Monitor::start(None, config, Listeners::default(), Activated::default(), Box::new(run_worker))?;
    monitor.runs_once = true;
    monitor.run()?;
    monitor.status.ok_or(MonitorError::Worker)
}

/// As [`serve`], with another worker: what the monitor withstands is tested with one that breaks every rule.
///
/// # Errors
///
/// As [`serve`].
pub fn serve_with(
    config_path: Option<PathBuf>,
    config: Config,
    run_worker: fn(Inherited) -> i32,
) -> Result<(), MonitorError> {
    serve_on(config_path, config, Activated::default(), run_worker)
}

fn serve_on(
    config_path: Option<PathBuf>,
    config: Config,
    activated: Activated,
    run_worker: fn(Inherited) -> i32,
) -> Result<(), MonitorError> {
    privileges::reduce();
    activated.log_ignored(&config.server);
    let listeners = Listeners::bind(&config.server, &Listeners::default(), &activated)?;
    Monitor::start(config_path, config, listeners, activated, Box::new(run_worker))?.run()
}

fn block_signals() -> Result<SignalFd, MonitorError> {
    // Whoever started us may ignore some, and filters would inherit that. A log whose reader is gone is no reason to
    // end: SIGPIPE alone is ignored, and restored in each child.
    sys::reset_signals().and_then(|()| sys::ignore_signal(Signal::SIGPIPE)).map_err(system("sigaction"))?;
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT] {
        signals.add(signal);
    }
    signals.thread_block().map_err(system("sigprocmask"))?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).map_err(system("signalfd"))
}

struct Monitor {
    config_path: Option<PathBuf>,
    /// What a forked worker does. Returns its exit status.
    run_worker: Box<dyn Fn(Inherited) -> i32>,
    /// Whether the end of the worker is the end of it all.
    runs_once: bool,
    /// The worker's exit status, then.
    status: Option<i32>,
    signals: SignalFd,
    jobs: Jobs,
    workers: Vec<Worker>,
    /// Of the worker that serves.
    settings: Arc<Config>,
    /// The same; looked up anew only for another name, since the user database may hang.
    user: WorkerUser,
    listeners: Listeners,
    /// Sockets that no configuration can take away.
    activated: Activated,
    manager: Manager,
    /// When workers are next asked whether they are alive.
    next_ping: Instant,
    ping_interval: Duration,
    next_id: WorkerId,
    restart: Restart,
    /// Set by SIGHUP.
    reload_wanted: bool,
    /// Set by SIGTERM.
    stopping: Option<Stop>,
    /// Whether any worker was ever ready.
    served: bool,
    history: History,
    /// Room for one packet.
    buffer: Vec<u8>,
}

/// The end of the daemon.
#[derive(Clone, Copy)]
struct Stop {
    /// When to wait no longer: first for workers, which are killed then, and then for what the kernel holds.
    at: Instant,
    killed: bool,
}

/// When a dead worker is followed by another.
struct Restart {
    pause: Duration,
    at: Option<Instant>,
}

struct Worker {
    id: WorkerId,
    pid: Pid,
    channel: OwnedFd,
    role: Role,
    ready: bool,
    /// It was sent SIGKILL: what it still says is not heard. The kernel may take its time.
    killed: bool,
    /// How often it was asked in vain whether it is alive.
    unanswered: u32,
    /// Its channel has something to read, or room to write.
    is_ready: bool,
    started: Instant,
    settings: Arc<Config>,
    user: WorkerUser,
    listeners: Listeners,
    /// Events that the socket had no room for.
    outgoing: VecDeque<Vec<u8>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Serving,
    /// Is to serve, once it is ready.
    Candidate,
    /// Finishes what it has; killed at the time given.
    Draining(Instant),
}

impl Monitor {
    fn start(
        config_path: Option<PathBuf>,
        config: Config,
        listeners: Listeners,
        activated: Activated,
        run_worker: Box<dyn Fn(Inherited) -> i32>,
    ) -> Result<Self, MonitorError> {
        let manager = Manager::new();
        let impatient = manager.interval().map(|interval| interval / PINGS_FOR_A_SIGN);
        let ping_interval = impatient.map_or(PING_INTERVAL, |interval| interval.min(PING_INTERVAL));
        let user = WorkerUser::look_up(&config.server.user)?;
        let mut monitor = Self {
            user,
            history: History::new(config_path.clone()),
            config_path,
            run_worker,
            runs_once: false,
            status: None,
            signals: block_signals()?,
            jobs: Jobs::new().map_err(system("getrlimit"))?,
            workers: Vec::new(),
            settings: Arc::new(config),
            listeners,
            activated,
            manager,
            next_ping: Instant::now() + ping_interval,
            ping_interval,
            next_id: 0,
            restart: Restart { pause: BACKOFF.0, at: None },
            reload_wanted: false,
            stopping: None,
            served: false,
            buffer: vec![0; MAX_PACKET],
        };
        let (settings, user) = (Arc::clone(&monitor.settings), monitor.user.clone());
        monitor.start_worker(settings, user, monitor.listeners.clone(), Role::Serving)?;
        Ok(monitor)
    }

    fn run(&mut self) -> Result<(), MonitorError> {
        loop {
            if self.wait()? {
                self.handle_signal()?;
            }
            self.handle_requests();
            self.reload_if_wanted();
            tell_lost();
            if self.handle_time().is_break() {
                return Ok(());
            }
        }
    }

    /// Sleeps until a signal, a packet, room for a packet, or a point in time. Whether there is a signal; each worker
    /// knows whether there is something for it.
    fn wait(&mut self) -> Result<bool, MonitorError> {
        let mut fds = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        for worker in self.workers.iter().filter(|worker| !worker.killed) {
            let mut events = PollFlags::POLLIN;
            events.set(PollFlags::POLLOUT, !worker.outgoing.is_empty());
            fds.push(PollFd::new(worker.channel.as_fd(), events));
        }
        let timeout = self.next_deadline().map_or(PollTimeout::NONE, |at| {
            // Rounded up, or the loop would spin through the last millisecond.
            let wait = at.saturating_duration_since(Instant::now()).as_millis() + 1;
            PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
        });
        let is_ready = match poll(&mut fds, timeout) {
            // A descriptor that is invalid or hung up is ready too: what is done with it says why.
            Ok(_) => fds.iter().map(|fd| fd.any().unwrap_or(true)).collect(),
            Err(Errno::EINTR) => vec![false; fds.len()],
            Err(errno) => return Err(system("poll")(errno)),
        };
        let mut is_ready = is_ready.into_iter();
        let signal = is_ready.next().unwrap_or(false);
        for worker in self.workers.iter_mut().filter(|worker| !worker.killed) {
            worker.is_ready = is_ready.next().unwrap_or(false);
        }
        Ok(signal)
    }

    fn next_deadline(&self) -> Option<Instant> {
        let workers = self.workers.iter().filter_map(Worker::deadline);
        workers
            .chain(self.jobs.next_deadline())
            .chain(self.restart.at)
            .chain([self.next_ping])
            .chain(self.manager.next_deadline())
            .chain(self.stopping.map(|stop| stop.at))
            .min()
    }

    /// One; whether there are more, the next poll says.
    fn handle_signal(&mut self) -> Result<(), MonitorError> {
        let Some(signal) = self.signals.read_signal().map_err(system("signalfd"))? else { return Ok(()) };
        match Signal::try_from(signal.ssi_signo as i32) {
            Ok(Signal::SIGCHLD) => self.reap()?,
            Ok(Signal::SIGHUP) => self.reload_wanted = true,
            Ok(Signal::SIGTERM | Signal::SIGINT) => self.stop(),
            _ => (),
        }
        Ok(())
    }

    fn reap(&mut self) -> Result<(), MonitorError> {
        while let Some((pid, end)) = sys::next_ended_child().map_err(system("waitid"))? {
            if let Some(ended) = self.jobs.ended(pid, end) {
                self.tell_end(&ended);
            } else if let Some(at) = self.workers.iter().position(|w| w.pid == pid) {
                let mut worker = self.workers.remove(at);
                worker.ready |= worker.left_ready(&mut self.buffer);
                self.worker_ended(&worker, end)?;
            }
            sys::reap(pid);
        }
        Ok(())
    }

    fn tell_end(&mut self, ended: &Ended) {
        let elapsed = u64::try_from(ended.elapsed.as_micros()).unwrap_or(u64::MAX);
        let event = Event::Finished { job: ended.id, end: ended.end, elapsed };
        if let Some(worker) = self.workers.iter_mut().find(|worker| worker.id == ended.worker) {
            worker.send(&event);
        }
    }

    fn worker_ended(&mut self, worker: &Worker, end: ChildEnd) -> Result<(), MonitorError> {
        self.jobs.end_of_worker(worker.id);
        if self.runs_once {
            if let ChildEnd::Exited(status) = end {
                self.status = Some(status);
            }
            self.stop();
            return Ok(());
        }
        match worker.role {
            Role::Draining(_) => info!(pid = %worker.pid, "worker has left"),
            Role::Candidate => {
                error!(pid = %worker.pid, end = end.to_string(), "new worker failed; the configuration stays as it was");
                self.reload_failed(&format!("the new worker failed: {end}"));
            }
            Role::Serving if self.stopping.is_some() => (),
            Role::Serving if !self.served && !worker.ready => {
                return Err(MonitorError::Worker);
            }
            Role::Serving => {
                // Ready for a moment, in which it may have served.
                if !std::mem::replace(&mut self.served, true) {
                    self.manager.ready("serving");
                }
                if worker.started.elapsed() >= HEALTHY_AFTER {
                    self.restart.pause = BACKOFF.0;
                }
                error!(pid = %worker.pid, end = end.to_string(), pause = ?self.restart.pause, "worker died; starting another");
                self.history.worker_died(format!("worker {}: {end}", worker.pid));
                self.restart.later();
                self.manager.status("the worker died; starting another");
            }
        }
        Ok(())
    }

    fn handle_requests(&mut self) {
        let mut became_ready = None;
        for worker in self.workers.iter_mut().filter(|worker| !worker.killed && worker.is_ready) {
            worker.flush();
            if let Err(reason) = worker.handle_packets(&mut self.buffer, &mut self.jobs, &mut became_ready) {
                error!(pid = %worker.pid, reason = %reason, "worker breaks the protocol; ending it");
                worker.kill();
            }
        }
        if let Some(id) = became_ready {
            self.worker_ready(id);
        }
    }

    fn worker_ready(&mut self, id: WorkerId) {
        let Some(at) = self.workers.iter().position(|worker| worker.id == id && !worker.killed) else {
            return;
        };
        let is_candidate = self.workers[at].role == Role::Candidate;
        if is_candidate || !self.served {
            self.manager.ready("serving");
        } else {
            self.manager.status("serving");
        }
        self.served = true;
        // What reading a configuration and starting a worker took is of no use from here on, mostly for months.
        let _ = sys::let_go_of_code();
        let settings = Arc::clone(&self.workers[at].settings);
        if is_candidate {
            for worker in self.workers.iter_mut().filter(|w| w.role == Role::Serving) {
                worker.drain(true);
            }
            self.workers[at].role = Role::Serving;
            self.history.reloaded();
            self.listeners = self.workers[at].listeners.clone();
            self.settings = settings;
            self.user = self.workers[at].user.clone();
            self.restart.at = None;
            self.hurry_the_eldest();
        }
        let show = |listeners: &[Rc<Listener>]| {
            let addresses: Vec<_> = listeners.iter().map(|l| l.address.to_string()).collect();
            if addresses.is_empty() { "off".to_owned() } else { addresses.join(" ") }
        };
        info!(
            worker = %self.workers[at].pid,
            milter = %show(&self.listeners.milter),
            policy = %show(&self.listeners.policy),
            metrics = %show(&self.listeners.metrics),
            control = %show(&self.listeners.control),
            "ready"
        );
    }

    fn hurry_the_eldest(&mut self) {
        let draining = self.workers.iter_mut().filter(|w| matches!(w.role, Role::Draining(_)));
        let mut draining: Vec<_> = draining.collect();
        draining.sort_by_key(|worker| worker.id);
        let excess = draining.len().saturating_sub(MAX_DRAINING);
        for worker in draining.into_iter().take(excess) {
            worker.send(&Event::Drain { connections: false });
        }
    }

    /// Breaks when it is time to leave.
    fn handle_time(&mut self) -> ControlFlow<()> {
        let now = Instant::now();
        self.jobs.enforce_deadlines(now);
        for worker in self.workers.iter_mut().filter(|w| w.deadline().is_some_and(|at| at <= now)) {
            warn!(pid = %worker.pid, role = ?worker.role, "worker takes too long; ending it");
            worker.kill();
        }
        self.look_after_workers(now);
        if let Some(stop) = self.stopping {
            if self.workers.is_empty() && self.jobs.is_empty() {
                info!("stopped");
                return ControlFlow::Break(());
            }
            if stop.at <= now && stop.killed {
                warn!("stopped; processes that do not end are left behind");
                return ControlFlow::Break(());
            }
            if stop.at <= now {
                self.workers.iter_mut().for_each(Worker::kill);
                self.stopping = Some(Stop { at: now + DRAIN_MARGIN, killed: true });
            }
        } else if self.restart.at.is_some_and(|at| at <= now) {
            self.restart.at = None;
            let (settings, listeners) = (Arc::clone(&self.settings), self.listeners.clone());
            if let Err(error) = self.start_worker(settings, self.user.clone(), listeners, Role::Serving) {
                error!(pause = ?self.restart.pause, "no worker can be started: {}", Chain(&error));
                self.restart.later();
            }
        }
        ControlFlow::Continue(())
    }

    /// Asks workers whether they are alive, ends those that never answer, and passes the good news on.
    fn look_after_workers(&mut self, now: Instant) {
        if self.next_ping <= now {
            self.next_ping = now + self.ping_interval;
            for worker in self.workers.iter_mut().filter(|worker| worker.ready && !worker.killed) {
                if worker.unanswered >= MAX_UNANSWERED {
                    error!(pid = %worker.pid, role = ?worker.role, "worker does not answer; ending it");
                    worker.kill();
                } else {
                    worker.unanswered += 1;
                    worker.send(&Event::Ping);
                }
            }
        }
        // While the daemon ends it is its drain time that counts, and the manager's own limit.
        let is_well = |worker: &Worker| worker.role == Role::Serving && worker.ready && worker.unanswered < 2;
        if self.stopping.is_some() || self.workers.iter().any(is_well) {
            self.manager.sign_of_life(now);
        } else {
            self.manager.withhold_until(self.next_ping);
        }
    }

    /// Starts a candidate with the new configuration; whatever is wrong leaves everything as it is.
    ///
    /// One at a time: a candidate may have accepted connections by the time that another SIGHUP comes, so that it
    /// can't be ended for a newer configuration. That one is read when the candidate serves.
    fn reload_if_wanted(&mut self) {
        let under_way = self.workers.iter().any(|worker| worker.role == Role::Candidate);
        if !self.reload_wanted || under_way || self.stopping.is_some() {
            return;
        }
        self.reload_wanted = false;
        self.manager.reloading();
        let outcome =
            Config::load(self.config_path.as_deref()).map_err(MonitorError::from).and_then(|config| {
                let user = match &config.server.user {
                    name if *name == self.settings.server.user => self.user.clone(),
                    name => WorkerUser::look_up(name)?,
                };
                let listeners = Listeners::bind(&config.server, &self.listeners, &self.activated)?;
                self.start_worker(Arc::new(config), user, listeners, Role::Candidate)
            });
        match outcome {
            Ok(()) => info!("reloading: new worker started"),
            Err(error) => {
                let error = Chain(&error).to_string();
                error!(%error, "configuration not reloaded; it stays as it was");
                self.reload_failed(&error);
            }
        }
    }

    fn reload_failed(&mut self, error: &str) {
        self.history.reload_failed(error);
        self.manager.ready("serving; the new configuration could not be used");
        for worker in self.workers.iter_mut().filter(|worker| worker.role == Role::Serving) {
            worker.send(&Event::ReloadFailed { error: shortened(error).to_owned() });
        }
    }

    fn stop(&mut self) {
        let now = Instant::now();
        if let Some(stop) = &mut self.stopping {
            info!("stopping at once");
            if !stop.killed {
                stop.at = now;
            }
            return;
        }
        info!("stopping");
        self.manager.stopping();
        let at = now + self.settings.server.drain_timeout.0 + DRAIN_MARGIN;
        self.stopping = Some(Stop { at, killed: false });
        self.restart.at = None;
        // Whoever watches is told to the end how far it has come.
        (self.listeners.milter, self.listeners.policy) = Default::default();
        self.activated = Activated::default();
        self.workers.iter_mut().for_each(|worker| worker.drain(false));
    }

    fn start_worker(
        &mut self,
        settings: Arc<Config>,
        user: WorkerUser,
        listeners: Listeners,
        role: Role,
    ) -> Result<(), MonitorError> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (channel, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .map_err(system("socketpair"))?;
        let monitor = nix::unistd::getpid();
        let raw = |listeners: &[Rc<Listener>]| listeners.iter().map(|l| l.descriptor.as_raw_fd()).collect();
        let sockets: [Vec<RawFd>; 4] =
            [&listeners.milter, &listeners.policy, &listeners.metrics, &listeners.control].map(|l| raw(l));
        let mut history = self.history.clone();
        if role == Role::Candidate {
            // It is told of itself: when it serves, this is so.
            history.reloaded();
        }
        let pid = sys::fork(|| {
            self.forget_all_but(&listeners, &channel);
            let [milter, policy, metrics, control] =
                sockets.map(|sockets| sockets.into_iter().map(sys::adopt).collect());
            (self.run_worker)(Inherited {
                settings: Arc::clone(&settings),
                user: user.clone(),
                monitor,
                // The owners of these are the parent's; in this process they are never dropped.
                channel: sys::adopt(theirs.as_raw_fd()),
                milter,
                policy,
                metrics,
                control,
                history,
            })
        })
        .map_err(system("fork"))?;
        self.next_id += 1;
        self.workers.push(Worker {
            id: self.next_id,
            pid,
            channel,
            role,
            ready: false,
            killed: false,
            unanswered: 0,
            is_ready: false,
            started: Instant::now(),
            settings,
            user,
            listeners,
            outgoing: VecDeque::new(),
        });
        Ok(())
    }
}

impl Restart {
    /// Each time later than the last, so that a crash loop does not take the machine.
    fn later(&mut self) {
        self.at = Some(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(BACKOFF.1);
    }
}

impl Monitor {
    /// In a forked worker: closes what belongs to the monitor, its end of the new channel among it, and to other
    /// workers.
    fn forget_all_but(&self, listeners: &Listeners, channel: &OwnedFd) {
        let kept: Vec<RawFd> = listeners.all().map(|l| l.descriptor.as_raw_fd()).collect();
        let others =
            self.workers.iter().flat_map(|worker| worker.listeners.all()).chain(self.listeners.all());
        let mut closed: Vec<RawFd> =
            others.map(|l| l.descriptor.as_raw_fd()).filter(|fd| !kept.contains(fd)).collect();
        closed.extend(self.activated.descriptors().into_iter().filter(|fd| !kept.contains(fd)));
        closed.extend(self.workers.iter().map(|worker| worker.channel.as_raw_fd()));
        closed.extend([channel.as_raw_fd(), self.signals.as_fd().as_raw_fd(), self.jobs.guard_descriptor()]);
        closed.sort_unstable();
        closed.dedup();
        sys::close_in_child(&closed);
    }
}

impl Worker {
    /// When the worker is killed if nothing changes.
    fn deadline(&self) -> Option<Instant> {
        match self.role {
            _ if self.killed => None,
            Role::Draining(at) => Some(at),
            _ if !self.ready => Some(self.started + READY_TIME_LIMIT),
            _ => None,
        }
    }

    fn kill(&mut self) {
        self.killed = true;
        self.outgoing.clear();
        // Not reaped yet, or it would not be in the list: the pid is its own.
        let _ = kill(self.pid, Signal::SIGKILL);
    }

    fn drain(&mut self, connections: bool) {
        self.role = Role::Draining(Instant::now() + self.settings.server.drain_timeout.0 + DRAIN_MARGIN);
        // It accepts no more. What nobody else wants is closed, or the kernel would go on to accept for nobody.
        self.listeners = Listeners::default();
        self.send(&Event::Drain { connections });
    }

    fn send(&mut self, event: &Event) {
        if let Ok(packet) = encode(event) {
            self.outgoing.push_back(packet);
            self.flush();
        }
    }

    fn flush(&mut self) {
        while let Some(packet) = self.outgoing.front() {
            match sys::send_with_descriptors(&self.channel, packet, &[]) {
                Ok(()) => drop(self.outgoing.pop_front()),
                // Full: poll says when to go on. Anything else: the worker is gone and will be reaped.
                Err(Errno::EAGAIN | Errno::EINTR) => return,
                Err(_) => self.outgoing.clear(),
            }
        }
    }

    /// Whether a worker that is dead said that it is ready, and nobody has heard it yet.
    fn left_ready(&self, buffer: &mut [u8]) -> bool {
        let mut is_ready = || {
            let received = sys::receive_with_descriptors(&self.channel, buffer).ok()?;
            Some(matches!(decode(&buffer[..received.length]), Ok(Request::Ready)))
        };
        !self.killed && (0..MAX_PACKETS_AT_ONCE).any(|_| is_ready() == Some(true))
    }

    fn handle_packets(
        &mut self,
        buffer: &mut [u8],
        jobs: &mut Jobs,
        became_ready: &mut Option<WorkerId>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        for _ in 0..MAX_PACKETS_AT_ONCE {
            let received = match sys::receive_with_descriptors(&self.channel, buffer) {
                Ok(received) => received,
                Err(Errno::EAGAIN | Errno::ECONNRESET) => return Ok(()),
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            if received.truncated {
                return Err("over-long packet".into());
            }
            if received.length == 0 {
                // An honest worker keeps its end open until it is gone.
                self.kill();
                return Ok(());
            }
            let request: Request<'_> = decode(&buffer[..received.length])?;
            if let Request::Ready = request {
                if std::mem::replace(&mut self.ready, true) {
                    return Err("ready for the second time".into());
                }
                *became_ready = Some(self.id);
            } else if let Request::Alive = request {
                self.unanswered = 0;
            } else if let Some(failed) =
                jobs.start(self.id, &request, &received.descriptors, &self.settings, &self.user)?
            {
                let event = Event::Finished { job: failed.id, end: failed.end, elapsed: 0 };
                self.send(&event);
            }
            if self.outgoing.len() > MAX_UNREAD + Jobs::limit(&self.settings.filter) {
                return Err("events are not read".into());
            }
        }
        Ok(())
    }
}
