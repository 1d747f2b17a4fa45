//! The pipeline with everything that belongs to it but the monitor, whom a thread plays: it says what users have, and
//! how their filters end. Everything that is logged is looked at.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use tokio_util::task::TaskTracker;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use usermilter::config::{Config, LogFormat};
use usermilter::metrics::Metrics;
use usermilter::monitor::{
    End, Event, FilterFile, History, Inspection, MAX_PACKET, Phase, Report, Request, RulesSource, decode,
    encode,
};
use usermilter::pipeline::Pipeline;
use usermilter::resolver::Chain;
use usermilter::worker::Monitor;
use usermilter::{logging, sys};

/// Nothing that is fed here takes as long.
const PATIENCE: Duration = Duration::from_secs(30);

/// What users have, all of them the same.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Bits: 1 a message filter, 2 a `recipient` executable, 4 rules, 8 a log, 16 `verdict.mixed` and `verdict.split`.
    pub flags: u8,
    /// Exit status of every filter.
    pub status: u8,
    /// What every filter writes.
    pub output: Vec<u8>,
}

impl Plan {
    /// Whether anybody refuses anything for good.
    pub fn may_reject(&self) -> bool {
        matches!(self.status, 77 | 65 | 67 | 68 | 69 | 76 | 100) && self.flags & 3 != 0 || self.flags & 4 != 0
    }
}

struct Worker {
    runtime: tokio::runtime::Runtime,
    monitor: Arc<Monitor>,
    plan: Arc<Mutex<Plan>>,
    /// Without and with changes of recipients, and what is counted with either.
    settings: [(Arc<Config>, Arc<Metrics>); 2],
}

/// Runs `body` in a runtime with a pipeline of its own.
pub fn with_worker<T>(
    plan: &Plan,
    body: impl AsyncFnOnce(Arc<Pipeline>, Arc<Config>, TaskTracker) -> T,
) -> T {
    static WORKER: OnceLock<Worker> = OnceLock::new();
    let worker = WORKER.get_or_init(Worker::start);
    *worker.plan.lock().unwrap() = plan.clone();
    let (settings, metrics) = &worker.settings[usize::from(plan.flags & 16 != 0)];
    worker.runtime.block_on(async {
        let tracker = TaskTracker::new();
        let pipeline = Arc::new(Pipeline::new(
            Arc::clone(settings),
            &worker.monitor,
            Chain::open(settings),
            tracker.clone(),
            Arc::clone(metrics),
        ));
        let body = async {
            let result = body(pipeline, Arc::clone(settings), tracker.clone()).await;
            tracker.close();
            tracker.wait().await;
            result
        };
        tokio::time::timeout(PATIENCE, body).await.expect("an end")
    })
}

impl Worker {
    fn start() -> Self {
        let layers = vec![
            logging::lines(LogFormat::Text, || OneLine { forbidden: char::is_control }),
            logging::lines(LogFormat::Json, || OneLine { forbidden: |c| c < ' ' }),
        ];
        // Below are frames, of which there are too many to look at.
        tracing_subscriber::registry().with(layers.with_filter(LevelFilter::DEBUG)).init();
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        nix::fcntl::fcntl(&theirs, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
        let plan = Arc::new(Mutex::new(Plan::default()));
        let planned = Arc::clone(&plan);
        std::thread::spawn(move || play_monitor(&ours, &planned));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let monitor = runtime.block_on(async { Monitor::new(theirs, History::new(None)) }).unwrap();
        let settings = ["", "[verdict]\nmixed = \"redirect\"\nsplit = \"always\"\n"];
        let settings = settings.map(|more| {
            let config = Arc::new(config(more));
            let metrics = Arc::new(Metrics::new(&config, monitor.history()));
            (config, metrics)
        });
        Self { runtime, monitor, plan, settings }
    }
}

fn config(more: &str) -> Config {
    let users = crate::file(
        "users",
        b"alice@example.org:x:5001:5001::/var/vmail/alice:\nbob:x:5002:5002::/var/vmail/bob:\n",
    );
    let aliases = crate::file("virtual", b"both@example.org alice@example.org, bob\nlist@ alice\n");
    let text = format!(
        "[recipients]\ndomains = [\"example.org\"]\ntrusted-networks = []\njudge-authenticated = true\n\
         virtual = [\"{}\"]\n[filter]\ninspect-ttl = \"0s\"\nmemory-limit = \"4K\"\nmax-message = \"16K\"\n\
         spool-directory = \"/dev/shm\"\n[[resolver]]\ntype = \"passwd-file\"\npath = \"{}\"\n{more}",
        aliases.display(),
        users.display(),
    );
    Config::parse(&text, Path::new("fuzz")).expect("a configuration without faults")
}

fn play_monitor(socket: &OwnedFd, plan: &Mutex<Plan>) {
    let mut buffer = vec![0; MAX_PACKET];
    loop {
        let received = sys::receive_with_descriptors(socket, &mut buffer).expect("a request");
        if received.length == 0 {
            return;
        }
        assert!(!received.truncated, "a request that the monitor would not take");
        let request = decode(&buffer[..received.length]).expect("a request that the monitor understands");
        let plan = plan.lock().unwrap().clone();
        let mut files: Vec<File> = received.descriptors.into_iter().map(File::from).collect();
        let (job, end) = match request {
            Request::Ready | Request::Alive => continue,
            Request::Ask { .. } => panic!("files and users are not asked of this monitor"),
            Request::Inspect { job, .. } => {
                let report = encode(&Report::Inspection(inspection(&plan))).unwrap();
                files[0].write_all(&report).unwrap();
                (job, 0)
            }
            Request::Log { job, text, .. } => {
                assert!(
                    text.ends_with('\n') && text.lines().all(|line| !line.contains(char::is_control)),
                    "{text:?}"
                );
                (job, 0)
            }
            Request::Run { job, phase, variables, .. } => {
                for (variable, value) in variables {
                    let lines = variable == usermilter::monitor::Variable::Recipients;
                    assert!(
                        !value.contains(['\0', '\r']) && (lines || !value.contains('\n')),
                        "{variable:?}"
                    );
                }
                if phase == Phase::Message {
                    let mut message = Vec::new();
                    files.remove(0).read_to_end(&mut message).unwrap();
                    assert!(message.starts_with(b"Return-Path: <"));
                }
                files[0].write_all(&plan.output[..plan.output.len().min(30_000)]).unwrap();
                files[1].write_all(&plan.output[..plan.output.len().min(30_000)]).unwrap();
                (job, i32::from(plan.status))
            }
        };
        drop(files);
        let event = Event::Finished { job, end: End::Exited(end), elapsed: 1 };
        sys::send_with_descriptors(socket, &encode(&event).unwrap(), &[]).unwrap();
    }
}

fn inspection(plan: &Plan) -> Inspection {
    let has = |bit: u8| plan.flags & bit != 0;
    let file = |name: &str| FilterFile { name: name.into(), problem: None };
    let filters = [(1, "message"), (1, "message-default"), (2, "recipient")];
    let rules = "[[rule]]\nsender = \"*@spam.example\"\naction = \"reject\"\nreply = \"5.7.1 no\"\n";
    Inspection {
        uid: 5001,
        home: "/var/vmail/alice".into(),
        filters: filters.iter().filter(|(bit, _)| has(*bit)).map(|(_, name)| file(name)).collect(),
        rules: has(4).then(|| RulesSource { text: rules.into(), sender_files: Vec::new() }),
        log: has(8),
        ..Inspection::default()
    }
}

/// Takes what is logged, an event at a time, and believes none that is more than a line.
struct OneLine {
    /// What must not be in a line. JSON leaves DEL, and controls beyond ASCII, as they are.
    forbidden: fn(char) -> bool,
}

impl Write for OneLine {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = std::str::from_utf8(bytes).expect("a log in UTF-8");
        let line = text.strip_suffix('\n').expect("a whole line");
        assert!(!line.contains(self.forbidden), "a line that is none: {line:?}");
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
