//! The listening sockets: bound by the monitor, kept by it while workers come and go.

use std::{
    fs, io,
    net::TcpListener,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, FileTypeExt, MetadataExt, lchown},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
    rc::Rc,
};

use nix::sys::{
    socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket},
    stat::{Mode, fchmod, umask},
};

use tracing::warn;

use crate::{
    config::{DEFAULT_CONTROL, FileMode, Server, SocketAddress},
    logging::Chain,
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

/// A socket that can't be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}")]
pub struct BindError {
    address: SocketAddress,
    source: io::Error,
}

impl Listeners {
    /// Binds what the configuration wants and `existing` does not have yet.
    pub(super) fn bind(server: &Server, existing: &Self) -> Result<Self, BindError> {
        let get_with = |address: &SocketAddress, mode| match existing.all().find(|l| &l.address == address) {
            Some(listener) => Ok(Rc::clone(listener)),
            None => Listener::bind(address, server, mode)
                .map(Rc::new)
                .map_err(|source| BindError { address: address.clone(), source }),
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
            milter: server.milter.iter().map(get).collect::<Result<_, _>>()?,
            policy: server.policy.iter().map(get).collect::<Result<_, _>>()?,
            metrics: server.metrics.iter().map(get).collect::<Result<_, _>>()?,
            control: server.control.0.iter().filter_map(get_control).collect::<Result<_, _>>()?,
        })
    }
}

impl Listeners {
    pub(super) fn all(&self) -> impl Iterator<Item = &Rc<Listener>> {
        self.milter.iter().chain(&self.policy).chain(&self.metrics).chain(&self.control)
    }
}

impl Listener {
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
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
            Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process serves this socket")),
            Err(error) => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

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
