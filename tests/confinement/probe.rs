//! The worker that tries.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Uid, getppid, pipe, setgroups, setresgid, setresuid};
use usermilter::monitor::{Question, Report, Request, decode_first, encode};
use usermilter::sys;
use usermilter::worker::{self, Inherited};

/// The first life probes, the next ones serve.
pub(crate) fn start(inherited: Inherited) -> i32 {
    let arguments: Vec<String> = std::env::args().collect();
    let scene = PathBuf::from(&arguments[3]);
    if fs::exists(scene.join("probed")).unwrap() {
        return worker::start(inherited);
    }
    fs::write(scene.join("probed"), "").unwrap();
    let prober = Prober {
        scene,
        directory_port: arguments[5].parse().unwrap(),
        other_port: arguments[6].parse().unwrap(),
    };
    if arguments[4] == "unconfined" {
        let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
        drop_to(nobody.uid, nobody.gid);
        return prober.all(&inherited.channel);
    }
    let call = arguments[4].clone();
    worker::start_with(inherited, move |inherited| match &*call {
        "confined" => prober.all(&inherited.channel),
        call => prober.hostile(call, &inherited.channel),
    })
}

fn drop_to(uid: Uid, gid: Gid) {
    setgroups(&[gid]).unwrap();
    setresgid(gid, gid, gid).unwrap();
    setresuid(uid, uid, uid).unwrap();
}

struct Prober {
    scene: PathBuf,
    directory_port: u16,
    other_port: u16,
}

impl Prober {
    fn path(&self, name: &str) -> PathBuf {
        self.scene.join(name)
    }

    fn all(&self, channel: &OwnedFd) -> i32 {
        send(channel, &Request::Ready, &[]);
        let unnamed = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .mode(0o444)
            .open(self.path("spool"));
        tell("file without a name in the spool", unnamed);
        let memory = memfd_create("message", MFdFlags::MFD_CLOEXEC);
        let opened_anew = memory.as_ref().map_err(|errno| io::Error::from(*errno));
        tell("memory for a message, opened anew", opened_anew.and_then(sys::reopen_for_reading));
        tell("memory for a message", memory);
        tell("look at a file of the configuration", fs::metadata(self.path("etc/users")));
        tell("ask for the configuration's file", ask(channel));
        tell("connect to the directory", TcpStream::connect(("127.0.0.1", self.directory_port)));

        for (name, path) in [
            ("read a file of the configuration", self.path("etc/users")),
            ("read what lies beside a file of the configuration", self.path("etc/beside")),
            ("read a user's file", self.path("home/secret")),
            ("read /etc/hostname", "/etc/hostname".into()),
            ("read /etc/passwd", "/etc/passwd".into()),
            ("read /etc/shadow", "/etc/shadow".into()),
            ("read /proc/self/status", "/proc/self/status".into()),
            ("read the program", std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into())),
        ] {
            tell(name, File::open(path));
        }
        tell("list a directory", fs::read_dir(self.path("home")).map(|mut entries| entries.next().is_some()));
        tell("write elsewhere", File::create(self.path("elsewhere/new")));
        tell("write a file with a name in the spool", File::create(self.path("spool/new")));
        tell("make a directory", fs::create_dir(self.path("elsewhere/directory")));
        tell("link", std::os::unix::fs::symlink("/etc", self.path("elsewhere/link")));

        tell("connect elsewhere", TcpStream::connect(("127.0.0.1", self.other_port)));
        tell("listen", TcpListener::bind("127.0.0.1:0"));
        tell("datagrams", UdpSocket::bind("127.0.0.1:0"));
        let name = SocketAddr::from_abstract_name(self.scene.as_os_str().as_encoded_bytes()).unwrap();
        tell("connect to an abstract socket", UnixStream::connect_addr(&name));
        tell("netlink socket", netlink());

        tell("signal to the monitor", kill(getppid(), Signal::SIGCONT));
        tell("signal to itself", kill(nix::unistd::getpid(), None));
        tell("root", setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)));
        // The last ones, with an eye on sys::fork: it wants one thread.
        tell("process", sys::fork(|| 0));
        let thread = std::thread::Builder::new().spawn(|| ());
        tell("thread", thread.map(|thread| thread.join().is_ok()));
        tell("done", Ok::<_, Errno>(()));
        std::thread::sleep(Duration::from_secs(60));
        0
    }

    /// What the worker does not survive.
    fn hostile(&self, call: &str, channel: &OwnedFd) -> i32 {
        send(channel, &Request::Ready, &[]);
        // The monitor has taken note when it answers: a first worker that dies before is its end.
        ask(channel).unwrap();
        let root = Path::new("/");
        let outcome = match call {
            "execute" => nix::unistd::execve(c"/bin/true", &[c"true"], &[] as &[&std::ffi::CStr])
                .map(|never| match never {}),
            "trace" => nix::sys::ptrace::traceme(),
            "mount" => {
                nix::mount::mount(Some(root), root, None::<&str>, nix::mount::MsFlags::MS_BIND, None::<&str>)
            }
            "unshare" => nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER),
            "change root" => nix::unistd::chroot(root),
            other => panic!("{other}"),
        };
        eprintln!("survived {call}: {outcome:?}");
        0
    }
}

/// One line for the test, which reads our standard error.
fn tell<T, E: Into<io::Error>>(name: &str, outcome: Result<T, E>) {
    match outcome.map_err(Into::into) {
        Ok(_) => eprintln!("probe {name} => ok"),
        Err(error) => match error.raw_os_error() {
            Some(number) => eprintln!("probe {name} => {:?}", Errno::from_raw(number)),
            None => eprintln!("probe {name} => {error}"),
        },
    }
}

/// Has the monitor's child read the first file of the configuration.
fn ask(channel: &OwnedFd) -> io::Result<()> {
    let (report, theirs) = pipe()?;
    send(channel, &Request::Ask { job: 1, question: Question::File(0) }, &[theirs.as_raw_fd()]);
    drop(theirs);
    let mut bytes = Vec::new();
    File::from(report).read_to_end(&mut bytes)?;
    match decode_first(&bytes) {
        Ok((Report::File(_), _)) => Ok(()),
        other => Err(io::Error::other(format!("{other:?}"))),
    }
}

fn send(channel: &OwnedFd, request: &Request, descriptors: &[i32]) {
    let mut ready = [PollFd::new(std::os::fd::AsFd::as_fd(channel), PollFlags::POLLOUT)];
    poll(&mut ready, PollTimeout::NONE).unwrap();
    sys::send_with_descriptors(channel, &encode(request).unwrap(), descriptors).unwrap();
}

fn netlink() -> nix::Result<OwnedFd> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
    socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)
}
