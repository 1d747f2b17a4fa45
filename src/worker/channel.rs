//! The worker's end of the socket pair: asks the monitor, hears how jobs ended.

use std::{
    collections::HashMap,
    io,
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
};
use tokio::{
    io::{AsyncReadExt, Interest, unix::AsyncFd},
    net::unix::pipe,
    sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch},
    time::timeout,
};
use tracing::{debug, error, warn};

use super::threads::Threads;
use crate::{
    monitor::{
        self, End, Event, History, Inspection, JobId, MAX_PACKET, MAX_REPORT, Phase, Question, Refusal,
        Report, Request, Variable,
    },
    resolver::source::{MAX_SIZE, Reading},
    shares::Shares,
    sys,
    user::{User, UserName},
};

/// Inspections under way at a time; the monitor allows 32 jobs that only touch files.
const MAX_INSPECTIONS: usize = 16;

/// Entries for users' logs being written at a time.
const MAX_LOG_ENTRIES: usize = 8;

/// Questions to the system under way at a time. Together with [`MAX_INSPECTIONS`] and [`MAX_LOG_ENTRIES`] no more than
/// the monitor allows, so that filters keep their places.
const MAX_QUESTIONS: usize = 8;

/// Questions to NSS among them: if it hangs, there is still one for a file.
const MAX_NSS_QUESTIONS: usize = MAX_QUESTIONS - 1;

/// How long a question to the system may take, the wait for its turn included: a user database that hangs must not hold
/// up the answer to the MTA for longer than that.
const QUESTION_TIME_LIMIT: Duration = Duration::from_secs(15);

/// How long the worker waits for an inspection, or an entry. The monitor ends the child after 10 s, unless the kernel
/// holds it.
const FILES_TIME_LIMIT: Duration = Duration::from_secs(15);

/// How long nobody looks at what a filter writes. Most have ended by then, and what they wrote fits into the pipe; the
/// end of each pipe would wake the worker for nothing.
const FIRST_LOOK: Duration = Duration::from_millis(20);

/// Bytes kept of a filter's standard output: what 32 lines of a reply can have.
pub(super) const MAX_OUTPUT: usize = 32 * 1024;

/// Bytes kept of a filter's standard error.
pub(super) const MAX_ERROR_OUTPUT: usize = 16 * 1024;

/// Longest answer to a question, without a file's text.
const MAX_REPORT_LENGTH: usize = 64 * 1024;

/// How the drain is to go, once the monitor has asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drain {
    /// Whether open milter connections may end by themselves.
    pub connections: bool,
}

/// The way to the monitor.
#[derive(Debug)]
pub struct Monitor {
    socket: AsyncFd<OwnedFd>,
    waiting: Mutex<HashMap<JobId, Waiting>>,
    next_job: AtomicU32,
    inspections: Limit,
    log_entries: Limit,
    questions: Arc<Semaphore>,
    nss_questions: Arc<Semaphore>,
    drain: watch::Sender<Option<Drain>>,
    history: watch::Sender<History>,
    /// Those who serve, once they do.
    threads: OnceLock<Threads>,
}

/// Jobs that only touch files, under way at a time: one for each user, since a home that hangs must not keep others
/// waiting, and not too many in all.
#[derive(Debug)]
struct Limit {
    all: Arc<Semaphore>,
    shares: Shares,
}

impl Limit {
    fn new(all: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(all)), shares: Shares::new(1) }
    }

    /// The user's own permit first: whoever waits for it must not hold one of everybody's.
    async fn take(&self, user: &User) -> Permits {
        let own = self.shares.take(&user.name).await;
        [own, Arc::clone(&self.all).acquire_owned().await.ok()]
    }
}

type Permits = [Option<OwnedSemaphorePermit>; 2];

/// Who waits for a job, and the permits that one for files takes until the monitor has reaped it, even if nobody waits
/// any more: a worker that starts more than it may is ended. A filter is waited for to its end.
#[derive(Debug)]
struct Waiting {
    sender: oneshot::Sender<Ended>,
    _permits: Permits,
}

/// A job of which the monitor knows nothing: nobody would ever give back its permits.
struct Unsent<'a> {
    monitor: &'a Monitor,
    job: JobId,
}

impl Drop for Unsent<'_> {
    fn drop(&mut self) {
        self.monitor.waiting().remove(&self.job);
    }
}

/// How a job ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// Status or signal.
    pub end: End,
    /// From fork to end.
    pub elapsed: Duration,
}

/// What came of an inspection, or an entry for a log.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// There is no such user (any more).
    #[error("no such user")]
    NoUser,
    /// The monitor's child refused: which check failed on what.
    #[error("{0}")]
    Refused(String),
    /// The child did not answer in time, or died.
    #[error("no answer from the child that looks at the user's files")]
    NoAnswer,
    /// The system refuses something basic.
    #[error("cannot ask the monitor")]
    System(#[from] io::Error),
}

/// A report that is no answer.
impl From<Report> for InspectError {
    fn from(report: Report) -> Self {
        match report {
            Report::Refusal(refusal) => refusal.into(),
            _ => Self::NoAnswer,
        }
    }
}

impl From<Refusal> for InspectError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NoUser => Self::NoUser,
            Refusal::Check(why) => Self::Refused(why),
            Refusal::NoFilter => Self::NoAnswer,
        }
    }
}

/// What came of a run.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub ended: Ended,
    /// The start of standard output.
    pub output: Vec<u8>,
    /// The start of standard error.
    pub error_output: Vec<u8>,
    /// Why the filter was not run, if it was not.
    pub refusal: Option<Refusal>,
}

/// A filter to be run.
#[derive(Debug)]
pub struct RunRequest {
    /// Whose.
    pub user: User,
    /// Which.
    pub phase: Phase,
    /// Extension of the address.
    pub extension: Option<String>,
    /// Environment.
    pub variables: Vec<(Variable, String)>,
    /// Time limit.
    pub time_limit: Duration,
    /// Standard input; `None`: empty.
    pub message: Option<OwnedFd>,
}

impl Monitor {
    /// Takes the socket over and begins to listen on it. To be called in a runtime.
    ///
    /// # Errors
    ///
    /// If the socket can't be watched.
    pub fn new(socket: OwnedFd, history: History) -> io::Result<Arc<Self>> {
        let monitor = Arc::new(Self::unheard(socket, history)?);
        tokio::spawn(Arc::clone(&monitor).listen());
        Ok(monitor)
    }

    /// Before anybody listens.
    fn unheard(socket: OwnedFd, history: History) -> io::Result<Self> {
        Ok(Self {
            socket: sys::watch(socket)?,
            waiting: Mutex::default(),
            next_job: AtomicU32::new(0),
            inspections: Limit::new(MAX_INSPECTIONS),
            log_entries: Limit::new(MAX_LOG_ENTRIES),
            questions: Arc::new(Semaphore::new(MAX_QUESTIONS)),
            nss_questions: Arc::new(Semaphore::new(MAX_NSS_QUESTIONS)),
            drain: watch::Sender::new(None),
            history: watch::Sender::new(history),
            threads: OnceLock::new(),
        })
    }

    /// Says that the worker serves.
    ///
    /// # Errors
    ///
    /// If it can't be said. As with every request, there is no answer at all if the monitor is gone.
    pub async fn ready(&self) -> io::Result<()> {
        self.send_packet(&Request::Ready, &[]).await
    }

    /// Has the monitor told that this worker is alive only when all these threads are.
    pub(super) fn serve_by(&self, threads: Threads) {
        let _ = self.threads.set(threads);
    }

    /// Resolves when the monitor asks to drain, or changes how.
    pub fn drain(&self) -> watch::Receiver<Option<Drain>> {
        self.drain.subscribe()
    }

    /// What the monitor remembers.
    pub fn history(&self) -> watch::Receiver<History> {
        self.history.subscribe()
    }

    /// Finds out what a user has.
    ///
    /// # Errors
    ///
    /// [`InspectError`]
    pub async fn inspect(&self, user: &User) -> Result<Inspection, InspectError> {
        let request = |job| Request::Inspect { job, user: user.clone() };
        let bytes = self.ask_about_files(&self.inspections, user, request).await?;
        match monitor::decode(&bytes) {
            Ok(Report::Inspection(inspection)) => Ok(inspection),
            Ok(other) => Err(other.into()),
            Err(_) => Err(InspectError::NoAnswer),
        }
    }

    /// Appends to the log that a user keeps; nothing happens if there is none.
    ///
    /// # Errors
    ///
    /// [`InspectError`]
    pub async fn append_to_log(&self, user: &User, text: String) -> Result<(), InspectError> {
        let request = |job| Request::Log { job, user: user.clone(), text: &text };
        let bytes = self.ask_about_files(&self.log_entries, user, request).await?;
        match &bytes[..] {
            [] => Ok(()),
            bytes => match monitor::decode(bytes) {
                Ok(Report::Refusal(refusal)) => Err(refusal.into()),
                _ => Err(InspectError::NoAnswer),
            },
        }
    }

    /// The uid of a user of the host; `None`: there is no such user.
    ///
    /// # Errors
    ///
    /// [`InspectError`]
    pub async fn uid(&self, name: UserName) -> Result<Option<u32>, InspectError> {
        match self.ask(Question::Uid(name)).await? {
            (Report::Uid(uid), _) => Ok(uid),
            (other, _) => Err(other.into()),
        }
    }

    /// Where a directory server is.
    ///
    /// # Errors
    ///
    /// [`InspectError`]
    pub async fn addresses(&self, host: Question) -> Result<Vec<IpAddr>, InspectError> {
        match self.ask(host).await? {
            (Report::Addresses(addresses), _) => Ok(addresses),
            (other, _) => Err(other.into()),
        }
    }

    /// Reads a file of the configuration, named by its number.
    ///
    /// # Errors
    ///
    /// [`InspectError`]
    pub async fn read(&self, number: usize) -> Result<Reading, InspectError> {
        match self.ask(Question::File(number)).await? {
            (Report::File(identity), bytes) => Ok(Reading { identity, bytes }),
            (other, _) => Err(other.into()),
        }
    }

    async fn ask(&self, question: Question) -> Result<(Report, Vec<u8>), InspectError> {
        debug!(?question, "asking the system");
        let limit = match question {
            Question::File(_) => MAX_REPORT_LENGTH + MAX_SIZE as usize,
            Question::Uid(_) | Question::Host { .. } => MAX_REPORT_LENGTH,
        };
        let answer = async {
            // That of NSS first: whoever waits for it must not hold one of everybody's.
            let of_nss = match question {
                Question::File(_) => None,
                Question::Uid(_) | Question::Host { .. } => {
                    Arc::clone(&self.nss_questions).acquire_owned().await.ok()
                }
            };
            let permit = Arc::clone(&self.questions).acquire_owned().await.ok();
            self.ask_child([of_nss, permit], limit, |job| Request::Ask { job, question }).await
        };
        let mut bytes = timeout(QUESTION_TIME_LIMIT, answer).await.map_err(|_| InspectError::NoAnswer)??;
        let (report, rest) = monitor::decode_first(&bytes).map_err(|_| InspectError::NoAnswer)?;
        let head = bytes.len() - rest.len();
        bytes.drain(..head);
        Ok((report, bytes))
    }

    /// Has a job done that only touches a few files of a user's, and returns its report.
    async fn ask_about_files<'a>(
        &self,
        limit: &Limit,
        user: &User,
        request: impl FnOnce(JobId) -> Request<'a>,
    ) -> Result<Vec<u8>, InspectError> {
        let permits = timeout(FILES_TIME_LIMIT, limit.take(user)).await;
        let permits = permits.map_err(|_| InspectError::NoAnswer)?;
        self.ask_child(permits, MAX_REPORT, request).await
    }

    /// Has a job done by a child that only reports, and returns the report.
    async fn ask_child<'a>(
        &self,
        permits: Permits,
        max_report: usize,
        request: impl FnOnce(JobId) -> Request<'a>,
    ) -> Result<Vec<u8>, InspectError> {
        let (report, theirs) = report_pipe()?;
        let (job, ended) = self.new_job(permits);
        self.send(job, &request(job), &[&theirs]).await?;
        drop(theirs);
        let mut bytes = Vec::new();
        let mut report = pipe::Receiver::from_owned_fd(report)?.take(max_report as u64);
        let answer = async {
            report.read_to_end(&mut bytes).await?;
            // The child's slot is free only when the monitor has reaped it.
            ended.await.map_err(io::Error::other)
        };
        let _ended = timeout(FILES_TIME_LIMIT, answer).await.map_err(|_| InspectError::NoAnswer)??;
        Ok(bytes)
    }

    /// Runs a filter to its end. The caller sees to it that not too many run at a time.
    ///
    /// # Errors
    ///
    /// If the monitor can't be asked.
    pub async fn run(&self, request: RunRequest) -> io::Result<Finished> {
        let (mut output, their_output) = Capture::new(MAX_OUTPUT)?;
        let (mut error_output, their_error_output) = Capture::new(MAX_ERROR_OUTPUT)?;
        let RunRequest { user, phase, extension, variables, time_limit, message } = request;
        let (job, mut ended) = self.new_job(Permits::default());
        let time_limit = u64::try_from(time_limit.as_millis()).unwrap_or(u64::MAX);
        let variables = variables.iter().map(|(variable, value)| (*variable, value.as_str())).collect();
        let extension = extension.as_deref();
        let packet = Request::Run { job, user, phase, extension, variables, time_limit };
        let mut descriptors: Vec<&OwnedFd> = message.iter().collect();
        descriptors.extend([&their_output, &their_error_output]);
        self.send(job, &packet, &descriptors).await?;
        drop((message, their_output, their_error_output));

        let ended = match timeout(FIRST_LOOK, &mut ended).await {
            Ok(ended) => ended,
            Err(_) => {
                match (output.watch(), error_output.watch()) {
                    (Ok(written), Ok(error_written)) => loop {
                        tokio::select! {
                            ended = &mut ended => break ended,
                            () = output.fill(&written), if output.is_open => (),
                            () = error_output.fill(&error_written), if error_output.is_open => (),
                        }
                    },
                    // Out of descriptors. The filter runs, and goes on to have its say.
                    _ => loop {
                        match timeout(FIRST_LOOK, &mut ended).await {
                            Ok(ended) => break ended,
                            Err(_) => {
                                output.fill_now();
                                error_output.fill_now();
                            }
                        }
                    },
                }
            }
        };
        let ended = ended.map_err(io::Error::other)?;
        output.fill_now();
        error_output.fill_now();
        let refusal = match ended.end {
            End::NotRun => match monitor::decode(&std::mem::take(&mut output.bytes)) {
                Ok(Report::Refusal(refusal)) => Some(refusal),
                _ => Some(Refusal::Check("unreadable report".into())),
            },
            _ => None,
        };
        Ok(Finished { ended, output: output.bytes, error_output: error_output.bytes, refusal })
    }

    fn new_job(&self, permits: Permits) -> (JobId, oneshot::Receiver<Ended>) {
        let (sender, receiver) = oneshot::channel();
        let id = self.next_job.fetch_add(1, Ordering::Relaxed);
        self.waiting().insert(id, Waiting { sender, _permits: permits });
        (id, receiver)
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<JobId, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a request for a job, of which nothing will be heard if that fails.
    async fn send(&self, job: JobId, request: &Request<'_>, descriptors: &[&OwnedFd]) -> io::Result<()> {
        // Also for a caller that stops waiting until there is room in the socket.
        let unsent = Unsent { monitor: self, job };
        self.send_packet(request, descriptors).await?;
        std::mem::forget(unsent);
        Ok(())
    }

    async fn send_packet(&self, request: &Request<'_>, descriptors: &[&OwnedFd]) -> io::Result<()> {
        let packet = monitor::encode(request).map_err(io::Error::other)?;
        if packet.len() > MAX_PACKET {
            return Err(io::Error::other("request is too long for the monitor"));
        }
        let raw: Vec<_> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
        let send =
            |socket: &OwnedFd| sys::send_with_descriptors(socket, &packet, &raw).map_err(io::Error::from);
        match self.socket.async_io(Interest::WRITABLE, send).await {
            // Whoever asks must not take it for trouble with one filter, and let mail in: the listener is about to end
            // the process, and the MTA will hear from nobody.
            Err(error) if is_gone(&error) => std::future::pending().await,
            sent => sent,
        }
    }

    /// Tells the monitor that all who serve can answer.
    async fn answer(self: Arc<Self>) {
        if let Some(threads) = self.threads.get() {
            threads.answer().await;
        }
        if let Err(error) = self.send_packet(&Request::Alive, &[]).await {
            warn!("the monitor can't be answered: {error}");
        }
    }

    /// Hands events to those who wait for them; ends the process when the monitor is gone, since nobody could be
    /// asked any more.
    async fn listen(self: Arc<Self>) {
        let mut buffer = vec![0; 1024];
        loop {
            let receive = |socket: &OwnedFd| match sys::receive_with_descriptors(socket, &mut buffer) {
                Ok(received) => Ok(received.length),
                Err(Errno::EINTR) => Err(io::ErrorKind::WouldBlock.into()),
                Err(errno) => Err(errno.into()),
            };
            let event = match self.socket.async_io(Interest::READABLE, receive).await {
                Ok(0) | Err(_) => {
                    error!("the monitor is gone");
                    sys::exit_now(1);
                }
                Ok(length) => monitor::decode(&buffer[..length]),
            };
            match event {
                Ok(Event::Finished { job, end, elapsed }) => {
                    if let Some(waiting) = self.waiting().remove(&job) {
                        let _ = waiting.sender.send(Ended { end, elapsed: Duration::from_micros(elapsed) });
                    }
                }
                Ok(Event::Ping) => drop(tokio::spawn(Arc::clone(&self).answer())),
                Ok(Event::Drain { connections }) => {
                    self.drain.send_replace(Some(Drain { connections }));
                }
                Ok(Event::ReloadFailed { error }) => {
                    self.history.send_modify(|history| history.reload_failed(&error));
                }
                Err(malformed) => error!(error = %malformed, "the monitor speaks another language"),
            }
        }
    }
}

/// Whether the monitor has closed its end, so that it is dead.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

fn report_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(OFlag::O_CLOEXEC)?)
}

/// The start of what comes through a pipe; the rest is read and thrown away, so that the writer never waits.
struct Capture {
    /// Does not block.
    pipe: OwnedFd,
    bytes: Vec<u8>,
    limit: usize,
    is_open: bool,
}

impl Capture {
    /// And the end to write to.
    fn new(limit: usize) -> io::Result<(Self, OwnedFd)> {
        let (pipe, theirs) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok((Self { pipe, bytes: Vec::new(), limit, is_open: true }, theirs))
    }

    /// What [`Capture::fill`] waits for.
    fn watch(&self) -> io::Result<AsyncFd<OwnedFd>> {
        sys::watch(self.pipe.try_clone()?)
    }

    /// Waits for something and takes it. Cancel safe: what is taken is kept.
    async fn fill(&mut self, watched: &AsyncFd<OwnedFd>) {
        match watched.readable().await {
            Ok(mut ready) => {
                if self.take().is_none() {
                    ready.clear_ready();
                }
            }
            Err(_) => self.is_open = false,
        }
    }

    /// Takes what a writer that has ended left in the pipe. A pipe holds at most 1 MiB (pipe(7)), so that somebody
    /// who goes on writing can't hold this up.
    fn fill_now(&mut self) {
        let mut taken = 0;
        while let Some(n) = self.take() {
            taken += n;
            if n == 0 || taken > 1 << 20 {
                break;
            }
        }
    }

    /// The number of bytes that were there; `None` if there is nothing now.
    fn take(&mut self) -> Option<usize> {
        let mut chunk = [0; 8192];
        match nix::unistd::read(&self.pipe, &mut chunk) {
            Ok(n) => {
                self.is_open = n > 0;
                let room = self.limit.saturating_sub(self.bytes.len()).min(n);
                self.bytes.extend_from_slice(&chunk[..room]);
                Some(n)
            }
            Err(Errno::EAGAIN) => None,
            Err(_) => {
                self.is_open = false;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_writer_left_is_there_though_the_runtime_has_not_looked() {
        let (mut capture, theirs) = Capture::new(5).unwrap();
        nix::unistd::write(&theirs, b"refusal").unwrap();
        drop(theirs);
        capture.fill_now();
        assert_eq!((&capture.bytes[..], capture.is_open), (&b"refus"[..], false));
    }

    #[tokio::test]
    async fn a_writer_that_still_runs_is_waited_for() {
        let (mut capture, theirs) = Capture::new(100).unwrap();
        let watched = capture.watch().unwrap();
        let writer = tokio::task::spawn_blocking(move || {
            for _ in 0..3 {
                std::thread::sleep(Duration::from_millis(5));
                nix::unistd::write(&theirs, b"abc").unwrap();
            }
        });
        while capture.is_open {
            timeout(Duration::from_secs(10), capture.fill(&watched)).await.unwrap();
        }
        writer.await.unwrap();
        assert_eq!(capture.bytes, b"abcabcabc");
    }

    /// A worker's end, and the monitor's, from which nobody reads.
    fn pair() -> (Monitor, OwnedFd) {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        (Monitor::unheard(ours, History::new(None)).unwrap(), theirs)
    }

    #[tokio::test]
    async fn a_question_that_is_given_up_before_it_is_sent_gives_its_permits_back() {
        let (monitor, _theirs) = pair();
        let soon = Duration::from_millis(100);
        while timeout(soon, monitor.ready()).await.is_ok() {}
        let name = || UserName::try_from("alice".to_owned()).unwrap();
        let user = User { name: name(), account: crate::user::Account::Passwd, program: None };
        for _ in 0..3 {
            assert!(timeout(soon, monitor.uid(name())).await.is_err(), "sent, though the socket is full");
            assert!(timeout(soon, monitor.inspect(&user)).await.is_err());
            assert_eq!(monitor.questions.available_permits(), MAX_QUESTIONS);
            assert_eq!(monitor.nss_questions.available_permits(), MAX_NSS_QUESTIONS);
            assert_eq!(monitor.inspections.all.available_permits(), MAX_INSPECTIONS);
            assert!(monitor.waiting().is_empty());
        }
    }

    #[tokio::test]
    async fn questions_to_nss_leave_a_place_for_one_about_a_file() {
        let (monitor, theirs) = pair();
        let monitor = Arc::new(monitor);
        for number in 0..2 * MAX_QUESTIONS {
            let (monitor, name) =
                (Arc::clone(&monitor), UserName::try_from(format!("user{number}")).unwrap());
            tokio::spawn(async move { monitor.uid(name).await });
        }
        let mut buffer = [0; 1024];
        let mut packets = async |monitor: &Monitor| {
            let mut files = Vec::new();
            // Until nothing more comes.
            while let Ok(received) = {
                tokio::time::sleep(Duration::from_millis(50)).await;
                sys::receive_with_descriptors(&theirs, &mut buffer)
            } {
                let request = monitor::decode(&buffer[..received.length]).unwrap();
                files.push(matches!(request, Request::Ask { question: Question::File(0), .. }));
            }
            (files, monitor.questions.available_permits())
        };
        let (files, left) = packets(&monitor).await;
        assert_eq!((files, left), (vec![false; MAX_NSS_QUESTIONS], 1));
        let asking = Arc::clone(&monitor);
        tokio::spawn(async move { asking.read(0).await });
        assert_eq!(packets(&monitor).await.0, [true]);
    }

    #[tokio::test]
    async fn a_monitor_that_is_gone_is_no_error_that_could_let_mail_in() {
        let (monitor, theirs) = pair();
        monitor.ready().await.unwrap();
        drop(theirs);
        assert!(timeout(Duration::from_millis(50), monitor.ready()).await.is_err(), "an answer from nobody");
    }
}
