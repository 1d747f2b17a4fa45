//! The stand-in itself: what runs instead of a worker, in a process forked by the monitor.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, pipe, setgroups, setresgid, setresuid};
use serde::Serialize;
use usermilter::monitor::{End, Event, JobId, MAX_PACKET, Phase, Report, Variable, decode, encode};
use usermilter::sys;
use usermilter::worker::Inherited;

/// [`usermilter::monitor::Request`] as it is on the wire, without what its types see to.
#[derive(Serialize)]
pub(super) enum Request {
    Ready,
    Inspect {
        job: JobId,
        user: User,
    },
    Run {
        job: JobId,
        user: User,
        phase: Phase,
        extension: Option<String>,
        variables: Vec<(Variable, String)>,
        time_limit: u64,
    },
    Log {
        job: JobId,
        user: User,
        text: String,
    },
    Alive,
    Ask {
        job: JobId,
        question: Question,
    },
}

#[derive(Serialize)]
pub(super) enum Question {
    Uid(String),
    Host { resolver: u64, server: u64 },
    File(u64),
}

#[derive(Clone, Serialize)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) account: Account,
    pub(super) program: Option<String>,
}

#[derive(Clone, Serialize)]
pub(super) enum Account {
    Passwd,
    Virtual { uid: u32, gid: u32, home: PathBuf },
}

pub(super) struct StandIn {
    pub(super) channel: OwnedFd,
    scene: PathBuf,
}

/// The first life attacks, the next one is honest.
pub(crate) fn start(inherited: Inherited) -> i32 {
    let arguments: Vec<String> = std::env::args().collect();
    let marks = Path::new(&arguments[3]).join("marks");
    let attacks = arguments[4] != "nothing" && !marks.join("attacks").exists();
    let vanishes = attacks && arguments[4] == "vanish";
    if vanishes {
        // Whoever waits for our end lets it go on.
        kill(inherited.monitor, Signal::SIGSTOP).unwrap();
    }
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    drop_to(nobody.uid, nobody.gid);
    let it = StandIn { channel: inherited.channel, scene: arguments[3].clone().into() };
    it.send(&Request::Ready, &[]);
    if vanishes {
        it.mark("attacks", "");
        return 0;
    }
    if attacks {
        it.mark("attacks", "");
        it.attack(&arguments[4]);
        // Long enough for the monitor to end what must be ended.
        std::thread::sleep(Duration::from_secs(2));
        it.mark("survived", "");
    } else {
        it.mark("honest", "");
    }
    it.serve_nobody()
}

fn drop_to(uid: Uid, gid: Gid) {
    setgroups(&[gid]).unwrap();
    setresgid(gid, gid, gid).unwrap();
    setresuid(uid, uid, uid).unwrap();
}

impl StandIn {
    pub(super) fn mark(&self, name: &str, text: &str) {
        let path = self.path(name);
        // At once, since somebody waits for it.
        let new = path.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, path).unwrap();
    }

    pub(super) fn path(&self, mark: &str) -> PathBuf {
        self.scene.join("marks").join(mark)
    }

    pub(super) fn home(&self, name: &str) -> PathBuf {
        self.scene.join("homes").join(name)
    }

    pub(super) fn alice(&self) -> User {
        virtual_user("alice", 5001, 5001, self.home("alice"))
    }

    fn serve_nobody(&self) -> i32 {
        loop {
            match self.event(Duration::from_secs(60)) {
                Some(Event::Drain { .. }) | None => return 0,
                Some(_) => (),
            }
        }
    }

    fn attack(&self, attack: &str) {
        let (read, write) = pipe().unwrap();
        let inspect = |job| Request::Inspect { job, user: self.alice() };
        match attack {
            "noise" => {
                let mut state = 0x2545_f491_4f6c_dd1d_u64;
                for length in 1..64 {
                    let noise: Vec<u8> = std::iter::repeat_with(|| {
                        state ^= state << 13;
                        state ^= state >> 7;
                        state ^= state << 17;
                        state.to_le_bytes()[0]
                    })
                    .take(length)
                    .collect();
                    self.send_bytes(&noise, &[]);
                }
            }
            "trailing" => {
                let mut packet = encode(&inspect(1)).unwrap();
                packet.push(0);
                self.send_bytes(&packet, &[write.as_raw_fd()]);
            }
            "too-long" => self.send_bytes(&vec![0; MAX_PACKET + 1], &[]),
            "many-descriptors" => self.send(&inspect(1), &[read.as_raw_fd(); 253]),
            "five-descriptors" => self.send(&inspect(1), &[write.as_raw_fd(); 5]),
            "few-descriptors" => self.send(&self.run(1, self.alice(), None), &[write.as_raw_fd()]),
            "ready-twice" => self.send(&Request::Ready, &[]),
            "bad-user-name" => {
                let user = User { name: "../alice".into(), ..self.alice() };
                self.send(&self.run(1, user, None), &[write.as_raw_fd(); 2]);
            }
            "bad-program-name" => {
                let user = User { program: Some("../../bin/sh".into()), ..self.alice() };
                self.send(&self.run(1, user, None), &[write.as_raw_fd(); 2]);
            }
            "empty" => self.send_bytes(&[], &[]),
            "close" => sys::close_in_child(&[self.channel.as_raw_fd()]),
            "foreign-users" => self.foreign_users(),
            "wrong-kinds" => self.wrong_kinds(),
            "questions" => self.questions(),
            "many-signs" => (0..20_000).for_each(|_| self.send(&Request::Alive, &[])),
            "sign-with-descriptors" => self.send(&Request::Alive, &[write.as_raw_fd(); 3]),
            "question-without-pipe" => self.ask_without_pipe(),
            "others-homes" => self.others_homes(),
            "odd-requests" => self.odd_requests(),
            "races" => self.run_while_others_swap(),
            name if name.starts_with("name=") => {
                let user =
                    User { name: name["name=".len()..].into(), account: Account::Passwd, program: None };
                self.send(&self.run(1, user, None), &[write.as_raw_fd(); 2]);
            }
            "flood" => self.flood(false),
            "reading-flood" => self.flood(true),
            _ => panic!("no attack {attack}"),
        }
    }

    pub(super) fn run(&self, job: JobId, user: User, extension: Option<&str>) -> Request {
        let variables = vec![(Variable::Sender, String::new())];
        let extension = extension.map(str::to_owned);
        Request::Run { job, user, phase: Phase::Message, extension, variables, time_limit: u64::MAX }
    }

    fn foreign_users(&self) {
        let mut told = String::new();
        let mut ask = |what: &str, user: User, extension: Option<&str>| {
            told += &format!("{what} => {}\n", self.outcome(user, extension));
        };
        for name in [
            "root",
            "daemon",
            "mail",
            "www-data",
            "nobody",
            "postfix",
            "ROOT",
            "0",
            "5001",
            "65534",
            "root@localhost",
            "*",
            "%u",
            "~root",
            "umt-nobody-has-this-name",
        ] {
            ask(name, User { name: name.into(), account: Account::Passwd, program: None }, None);
        }
        let (own, bobs, lows) = (self.home("alice"), self.home("bob"), self.home("low"));
        for (what, uid, gid, home) in [
            ("uid 0", 0, 5001, &own),
            ("gid 0", 5001, 0, &own),
            ("uid -1", u32::MAX, 5001, &own),
            ("gid -1", 5001, u32::MAX, &own),
            ("gid of daemon", 5001, 1, &own),
            ("gid of shadow", 5001, 42, &own),
            ("uid 4999", 4999, 5001, &lows),
            ("gid 4999", 5001, 4999, &own),
            ("uid 6000", 6000, 5001, &own),
            ("uid 2^31", 1 << 31, 5001, &own),
            ("home of bob", 5001, 5001, &bobs),
            ("bob with the home of alice", 5002, 5002, &own),
            ("no home", 5001, 5001, &PathBuf::new()),
            ("relative home", 5001, 5001, &"alice".into()),
            ("all homes", 5001, 5001, &self.scene.join("homes")),
            ("home of root", 5001, 5001, &"/root".into()),
            ("home above", 5001, 5001, &self.home("alice/../../homes/alice")),
            ("home behind a link", 5001, 5001, &self.home("out")),
            ("home with NUL", 5001, 5001, &self.home("alice\0")),
        ] {
            ask(what, virtual_user("alice", uid, gid, home.clone()), None);
        }
        for program in ["sh", "true", "absent"] {
            let user =
                User { program: Some(program.into()), ..virtual_user("none", 5003, 5003, self.home("none")) };
            ask(&format!("program {program}"), user, None);
        }
        // These find alice's filter, and nothing else.
        for extension in
            ["../../outside", "../outside", "/bin/sh", ".hidden", "\0", "x\0y", "", "..", &"x".repeat(4000)]
        {
            let shown: String = extension.escape_default().take(20).collect();
            ask(&format!("extension {shown}"), self.alice(), Some(extension));
        }
        ask("alice", self.alice(), None);
        self.mark("told", &told);
    }

    fn wrong_kinds(&self) {
        let named: OwnedFd = File::open("/etc/passwd").unwrap().into();
        let directory: OwnedFd = File::open("/etc").unwrap().into();
        let device: OwnedFd = File::open("/dev/zero").unwrap().into();
        let writable: OwnedFd = File::options().write(true).open("/dev/null").unwrap().into();
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let socket: OwnedFd = socket.into();
        let of_proc: OwnedFd = File::open("/proc/self/status").unwrap().into();
        let terminal: OwnedFd = File::open("/dev/ptmx").unwrap().into();
        let path_only = |path: &str| open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
        let [only_path, only_directory] = ["/etc/passwd", "/etc"].map(path_only);
        let events = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::empty()).unwrap().0;
        let counter: OwnedFd = nix::sys::eventfd::EventFd::from_value(0).unwrap().into();
        let fifo_path = self.path("fifo");
        nix::unistd::mkfifo(&fifo_path, Mode::S_IRWXU).unwrap();
        let fifo: OwnedFd = File::options().read(true).write(true).open(&fifo_path).unwrap().into();
        let writable_memory = memfd_create("message", MFdFlags::MFD_CLOEXEC).unwrap();
        // Anonymous, but open for writing.
        let path = self.path("anonymous");
        let anonymous: OwnedFd =
            File::options().read(true).write(true).create_new(true).open(&path).unwrap().into();
        fs::remove_file(&path).unwrap();
        let mut told = String::new();
        let mut ask = |what: &str, stdin: Option<&OwnedFd>, [stdout, stderr]: [Option<&OwnedFd>; 2]| {
            let (output, output_in) = pipe().unwrap();
            let stdin = stdin.map(AsRawFd::as_raw_fd);
            let outputs = [stdout, stderr].map(|fd| fd.unwrap_or(&output_in).as_raw_fd());
            let descriptors: Vec<RawFd> = stdin.into_iter().chain(outputs).collect();
            self.send(&self.run(7, self.alice(), None), &descriptors);
            drop(output_in);
            told += &format!("{what} => {}\n", self.end(7, output));
        };
        for (what, stdin) in [
            ("named file", &named),
            ("directory", &directory),
            ("device", &device),
            ("write-only device", &writable),
            ("socket", &socket),
            ("writable file", &anonymous),
            ("file of /proc", &of_proc),
            ("terminal", &terminal),
            ("file that is not open", &only_path),
            ("directory that is not open", &only_directory),
            ("set of events", &events),
            ("counter", &counter),
            ("FIFO", &fifo),
            ("pipe", &pipe().unwrap().0),
            ("writable memory", &writable_memory),
            ("channel to the monitor", &self.channel),
        ] {
            ask(&format!("{what} as message"), Some(stdin), [None, None]);
        }
        for (what, output) in [
            ("file", &anonymous),
            ("socket", &socket),
            ("device", &writable),
            ("terminal", &terminal),
            ("set of events", &events),
            ("counter", &counter),
            ("memory", &writable_memory),
            ("file that is not open", &only_path),
            ("channel to the monitor", &self.channel),
        ] {
            ask(&format!("{what} as output"), None, [Some(output), None]);
            ask(&format!("{what} as error output"), None, [None, Some(output)]);
        }
        // A report to a socket: nothing is said, and nothing done.
        self.send(&Request::Inspect { job: 8, user: self.alice() }, &[socket.as_raw_fd()]);
        let (silent, _) = pipe().unwrap();
        told += &format!("socket as report => {}\n", self.end(8, silent));
        told += &format!("alice => {}\n", self.outcome(self.alice(), None));
        self.mark("told", &told);
    }

    /// As many requests as the monitor takes.
    fn flood(&self, reads: bool) {
        let (_read, write) = pipe().unwrap();
        let mut wait = self.run(1, self.alice(), None);
        if let Request::Run { variables, .. } = &mut wait {
            *variables = vec![(Variable::Sender, "wait".into())];
        }
        let wait = encode(&wait).unwrap();
        let inspect = encode(&Request::Inspect { job: 2, user: self.alice() }).unwrap();
        let mut failures = 0;
        let mut count = 0;
        while failures < 300 {
            count += 1;
            let (packet, descriptors) = match count % 4 {
                0 => (&wait, &[write.as_raw_fd(); 2][..]),
                _ => (&inspect, &[write.as_raw_fd()][..]),
            };
            match sys::send_with_descriptors(&self.channel, packet, descriptors) {
                Ok(()) => failures = 0,
                Err(_) => {
                    failures += 1;
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
            while reads && self.event(Duration::ZERO).is_some() {}
        }
    }

    /// Sends a proper request and says what came of it.
    pub(super) fn outcome(&self, user: User, extension: Option<&str>) -> String {
        let (output, theirs) = pipe().unwrap();
        let request = self.run(9, user, extension);
        self.send(&request, &[theirs.as_raw_fd(), theirs.as_raw_fd()]);
        drop(theirs);
        self.end(9, output)
    }

    pub(super) fn end(&self, job: JobId, report: OwnedFd) -> String {
        let end = loop {
            match self.event(Duration::from_secs(10)) {
                Some(Event::Finished { job: of, end, .. }) if of == job => break end,
                Some(_) => (),
                None => return "no answer".into(),
            }
        };
        let mut bytes = Vec::new();
        let _ = File::from(report).read_to_end(&mut bytes);
        let report = match decode::<Report>(&bytes) {
            Ok(report) => format!("{report:?}"),
            Err(_) => "no report".into(),
        };
        match end {
            End::Exited(status) => format!("exited {status}, {report}"),
            other => format!("{other:?}, {report}"),
        }
    }

    pub(super) fn event(&self, patience: Duration) -> Option<Event> {
        let timeout = PollTimeout::try_from(patience).unwrap();
        let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(&self.channel), PollFlags::POLLIN)];
        if poll(&mut fds, timeout).ok()? == 0 {
            return None;
        }
        let mut buffer = [0; 1024];
        let received = sys::receive_with_descriptors(&self.channel, &mut buffer).ok()?;
        let event = decode(&buffer[..received.length]).ok()?;
        if event == Event::Ping {
            self.send(&Request::Alive, &[]);
        }
        Some(event)
    }

    pub(super) fn send(&self, request: &Request, descriptors: &[RawFd]) {
        self.send_bytes(&encode(request).unwrap(), descriptors);
    }

    /// The monitor may have ended us, or be at it.
    fn send_bytes(&self, bytes: &[u8], descriptors: &[RawFd]) {
        if let Err(error) = sys::send_with_descriptors(&self.channel, bytes, descriptors) {
            let _ = writeln!(std::io::stderr(), "stand-in: {error}");
        }
    }
}

pub(super) fn virtual_user(name: &str, uid: u32, gid: u32, home: impl AsRef<Path>) -> User {
    User {
        name: name.into(),
        account: Account::Virtual { uid, gid, home: home.as_ref().into() },
        program: None,
    }
}
