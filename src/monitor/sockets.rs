//! The listening sockets: bound by the monitor, kept by it while workers come and go.

use std::{
    fs, io,
    net::TcpListener,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::{
            fs::{DirBuilderExt, FileTypeExt, MetadataExt, lchown},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    rc::Rc,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::{
        socket::{
            AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, bind,
            connect, getsockname, getsockopt, listen, socket, sockopt,
        },
        stat::{Mode, fchmod, umask},
    },
};
use tracing::{info, warn};

use crate::{
    config::{DEFAULT_CONTROL, FileMode, Server, SocketAddress},
    logging::{Chain, Quoted},
    sys,
};

/// A bound socket. The path of a Unix socket is removed when nobody uses it any more.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) address: SocketAddress,
    pub(super) descriptor: OwnedFd,
    /// Device and inode of the path, so that only our own socket is removed.
    identity: Option<(PathBuf, u64, u64)>,
}

/// All sockets of a configuration, by interface.
#[derive(Clone, Debug, Default)]
pub(super) struct Listeners {
    pub(super) milter: Vec<Rc<Listener>>,
    pub(super) policy: Vec<Rc<Listener>>,
    pub(super) metrics: Vec<Rc<Listener>>,
    pub(super) control: Vec<Rc<Listener>>,
}

/// Interfaces that a service manager may have made sockets for, by the names that it gives them (systemd.socket(5),
/// `FileDescriptorName=`).
const ACTIVATED: &[&str] = &["milter", "policy", "metrics", "control"];

/// Sockets that were there before us (sd_listen_fds(3)). They take the place of what the configuration would bind for
/// their interface, and are nobody's to remove.
#[derive(Debug, Default)]
pub struct Activated {
    listeners: Vec<(&'static str, Rc<Listener>)>,
    /// Names that mean nothing here.
    unknown: Vec<String>,
}

/// A socket that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// It can't be bound.
    #[error("cannot listen on {address}")]
    Bind {
        /// Where.
        address: SocketAddress,
        /// Why.
        source: io::Error,
    },
    /// What the service manager gave us is none.
    #[error("socket {name} (descriptor {descriptor}) of the service manager can't be used")]
    Activated {
        /// What the manager calls it.
        name: String,
        /// Its number.
        descriptor: RawFd,
        /// Why.
        source: io::Error,
    },
}

impl Activated {
    /// Takes over what whoever started us says there is. To be called once, before anything is opened.
    ///
    /// # Errors
    ///
    /// [`BindError`] if one is no listening stream socket. One with an unknown name is logged and closed.
    pub fn take() -> Result<Self, BindError> {
        let unusable =
            |name: &str, descriptor, source| BindError::Activated { name: name.into(), descriptor, source };
        let mut activated = Self::default();
        let given =
            sd_notify::listen_fds_with_names().map_err(|source| unusable("LISTEN_FDS", -1, source))?;
        for (descriptor, name) in given {
            match ACTIVATED.iter().find(|known| **known == name) {
                Some(known) => {
                    let listener = Listener::activated(sys::adopt(descriptor))
                        .and_then(
                            |listener| if name == "control" { listener.private() } else { Ok(listener) },
                        )
                        .map_err(|source| unusable(&name, descriptor, source))?;
                    activated.listeners.push((*known, Rc::new(listener)));
                }
                // Whoever calls closes what is not ours.
                None => activated.unknown.push(name),
            }
        }
        Ok(activated)
    }

    /// Their numbers.
    pub fn descriptors(&self) -> Vec<RawFd> {
        self.listeners.iter().map(|(_, listener)| listener.descriptor.as_raw_fd()).collect()
    }

    /// What the manager has made, or the configuration says, in vain.
    pub(super) fn log_ignored(&self, server: &Server) {
        for name in &self.unknown {
            warn!("socket {} of the service manager is not used: no such interface", Quoted(name));
        }
        let configured = [
            ("milter", !server.milter.is_empty()),
            ("policy", !server.policy.is_empty()),
            ("metrics", server.metrics.is_some()),
            ("control", server.control.0.is_some()),
        ];
        for (name, is_configured) in configured {
            if is_configured && self.of(name).next().is_some() {
                info!("server.{name} is not used: the service manager has made the sockets");
            }
        }
    }

    /// The sockets of an interface, if there are any, or else what is bound for it.
    fn or(
        &self,
        interface: &str,
        bind: impl FnOnce() -> Result<Vec<Rc<Listener>>, BindError>,
    ) -> Result<Vec<Rc<Listener>>, BindError> {
        let given: Vec<_> = self.of(interface).cloned().collect();
        if given.is_empty() { bind() } else { Ok(given) }
    }

    fn of(&self, interface: &str) -> impl Iterator<Item = &Rc<Listener>> {
        self.listeners.iter().filter(move |(name, _)| *name == interface).map(|(_, listener)| listener)
    }
}

impl Listeners {
    /// Takes what the service manager has made, and for other interfaces binds what the configuration wants and
    /// `existing` does not have yet.
    pub(super) fn bind(server: &Server, existing: &Self, activated: &Activated) -> Result<Self, BindError> {
        let get_with = |address: &SocketAddress, mode| match existing.all().find(|l| &l.address == address) {
            Some(listener) => Ok(Rc::clone(listener)),
            None => Listener::bind(address, server, mode)
                .map(Rc::new)
                .map_err(|source| BindError::Bind { address: address.clone(), source }),
        };
        let get = |address: &SocketAddress| get_with(address, server.socket_mode);
        let get_control = |path: &PathBuf| {
            // It tells who gets mail at this moment, which is nobody's business who merely hands mail over.
            let mode = FileMode(server.socket_mode.0 & !0o007);
            match get_with(&SocketAddress::Unix(path.clone()), mode) {
                // Nobody has asked for the default: a second daemon, or one without root, does without it.
                Err(error) if path == Path::new(DEFAULT_CONTROL) => {
                    if nix::unistd::geteuid().is_root() {
                        warn!("no control socket: {}", Chain(&error));
                    }
                    None
                }
                bound => Some(bound),
            }
        };
        Ok(Self {
            milter: activated.or("milter", || server.milter.iter().map(get).collect())?,
            policy: activated.or("policy", || server.policy.iter().map(get).collect())?,
            metrics: activated.or("metrics", || server.metrics.iter().map(get).collect())?,
            control: activated.or("control", || server.control.0.iter().filter_map(get_control).collect())?,
        })
    }
}

impl Listeners {
    pub(super) fn all(&self) -> impl Iterator<Item = &Rc<Listener>> {
        self.milter.iter().chain(&self.policy).chain(&self.metrics).chain(&self.control)
    }
}

impl Listener {
    /// Checks one that somebody else has made.
    fn activated(descriptor: OwnedFd) -> io::Result<Self> {
        let other = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        if getsockopt(&descriptor, sockopt::SockType)? != SockType::Stream {
            return other("not a stream socket (ListenStream=)");
        }
        if !getsockopt(&descriptor, sockopt::AcceptConn)? {
            return other("does not listen (Accept=no)");
        }
        let family = getsockname::<SockaddrStorage>(descriptor.as_raw_fd())?.family();
        let (address, descriptor) = match family {
            Some(AddressFamily::Inet | AddressFamily::Inet6) => {
                let listener = TcpListener::from(descriptor);
                (SocketAddress::Inet(listener.local_addr()?), OwnedFd::from(listener))
            }
            Some(AddressFamily::Unix) => {
                let listener = UnixListener::from(descriptor);
                let path = listener.local_addr()?.as_pathname().unwrap_or(Path::new("@")).to_owned();
                (SocketAddress::Unix(path), OwnedFd::from(listener))
            }
            _ => return other("neither a Unix socket nor one of TCP"),
        };
        fcntl(&descriptor, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Self { address, descriptor, identity: None })
    }

    /// Itself, if none but its owner and group can connect.
    fn private(self) -> io::Result<Self> {
        let is_private = match &self.address {
            SocketAddress::Unix(path) => fs::metadata(path)?.mode() & 0o007 == 0,
            SocketAddress::Inet(_) => false,
        };
        let open = || {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "open to others than owner and group (SocketMode=0660)",
            )
        };
        is_private.then_some(self).ok_or_else(open)
    }

    fn bind(address: &SocketAddress, server: &Server, mode: FileMode) -> io::Result<Self> {
        match address {
            SocketAddress::Inet(inet) => {
                let listener = TcpListener::bind(inet)?;
                listener.set_nonblocking(true)?;
                // The standard library's 128 are few for what comes while no worker accepts.
                listen(&listener, Backlog::MAXCONN)?;
                Ok(Self { address: address.clone(), descriptor: listener.into(), identity: None })
            }
            SocketAddress::Unix(path) => {
                let group = match &server.socket_group {
                    Some(name) => nix::unistd::Group::from_name(name)?
                        .ok_or_else(|| io::Error::other(format!("group {name} does not exist")))
                        .map(Some)?,
                    None => None,
                };
                if path == Path::new(DEFAULT_CONTROL) {
                    make_parent(path)?;
                }
                remove_stale(path)?;
                let listener = listen_on(path, Mode::from_bits_truncate(mode.0))?;
                if let Some(group) = group {
                    lchown(path, None, Some(group.gid.as_raw()))?;
                }
                let metadata = fs::symlink_metadata(path)?;
                let identity = Some((path.clone(), metadata.dev(), metadata.ino()));
                Ok(Self { address: address.clone(), descriptor: listener, identity })
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, device, inode)) = &self.identity
            && fs::symlink_metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (*device, *inode))
        {
            let _ = fs::remove_file(path);
        }
    }
}

/// Binds a Unix socket that has its permissions from the first moment. They are never set by path: whoever may write
/// to the directory (the worker's user, if it is a RuntimeDirectory of theirs) could put a link there.
fn listen_on(path: &Path, mode: Mode) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let address = UnixAddr::new(path)?;
    // bind(2) gives the path the permissions that the socket itself has, less the umask.
    fchmod(&socket, mode)?;
    let before = umask(Mode::empty());
    let bound = bind(socket.as_raw_fd(), &address);
    umask(before);
    bound?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok(socket)
}

/// What systemd or tmpfiles.d make, where the daemon is started without them.
fn make_parent(path: &Path) -> io::Result<()> {
    let Some(parent) = path.parent() else { return Ok(()) };
    match fs::DirBuilder::new().mode(0o755).create(parent) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Removes a socket that a process left behind; one that somebody serves is left alone.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            Err(io::Error::new(io::ErrorKind::AlreadyExists, "the path exists and is no socket"))
        }
        Ok(_) => {
            // The monitor waits for nobody.
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
            match connect(probe.as_raw_fd(), &UnixAddr::new(path)?) {
                Err(Errno::ECONNREFUSED) => fs::remove_file(path),
                // Somebody has so many waiting that there is no room for more.
                Ok(()) | Err(Errno::EAGAIN) => {
                    Err(io::Error::new(io::ErrorKind::AddrInUse, "another process serves this socket"))
                }
                Err(error) => Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_waited_for_who_serves_a_socket_and_accepts_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let busy = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(busy.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&busy, Backlog::new(0).unwrap()).unwrap();
        let _waiting = std::os::unix::net::UnixStream::connect(&path).unwrap();
        assert_eq!(remove_stale(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn a_stale_socket_is_replaced_a_served_one_and_a_file_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let address = SocketAddress::Unix(path.clone());
        let server = Server::default();
        drop(UnixListener::bind(&path).unwrap());
        let bind = || Listener::bind(&address, &server, server.socket_mode);
        let listener = bind().unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o777, 0o660);
        assert!(bind().is_err());
        drop(listener);
        assert!(!path.exists());
        fs::write(&path, "precious").unwrap();
        assert!(bind().is_err());
        assert!(path.exists());
    }
}
