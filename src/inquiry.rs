//! Questions that only the system can answer: accounts and hosts, which NSS knows, and the texts of the
//! administrator's files.
//!
//! A worker that has confined itself can do none of this: NSS may open any file, load code and talk to anybody. It
//! asks the monitor, one of whose children answers as the worker's user and ends. A command asks directly.

use std::{
    io,
    net::{IpAddr, SocketAddr, ToSocketAddrs},
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::runtime::Handle;

use crate::{
    config::{Config, Recipients, ResolverConfig},
    monitor::Question,
    resolver::source::{self, ReadError, Reading},
    user::UserName,
    worker::Monitor,
};

/// Who is asked.
#[derive(Clone, Debug)]
pub enum Inquiry {
    /// The system, by this process.
    Direct,
    /// The monitor, whose children ask.
    Monitor(Arc<Monitor>, Arc<[PathBuf]>),
}

/// The hosts of one `[[resolver]]`.
#[derive(Clone, Debug)]
pub struct Hosts {
    inquiry: Inquiry,
    resolver: usize,
}

impl Inquiry {
    /// Asks the monitor about what this configuration names, which must be the worker's.
    pub fn through(monitor: Arc<Monitor>, config: &Config) -> Self {
        let files = source_files(config).map(Path::to_owned).collect();
        Self::Monitor(monitor, files)
    }

    /// The uid of a user of the host; `None`: there is no such user.
    ///
    /// # Errors
    ///
    /// Why nobody can tell.
    pub async fn uid(&self, name: UserName) -> io::Result<Option<u32>> {
        match self {
            Self::Direct => blocking(move || uid(&name)).await,
            Self::Monitor(monitor, _) => monitor.uid(name).await.map_err(io::Error::other),
        }
    }

    /// The hosts of the resolver with this number.
    pub fn hosts(&self, resolver: usize) -> Hosts {
        Hosts { inquiry: self.clone(), resolver }
    }

    /// Reads a file of the configuration. Blocks: not for an async thread, but for one of a runtime.
    ///
    /// # Errors
    ///
    /// [`ReadError`]
    pub fn read(&self, path: &Path) -> Result<Reading, ReadError> {
        match self {
            Self::Direct => source::read(path),
            Self::Monitor(monitor, files) => {
                let number = files.iter().position(|file| file == path);
                let number = number.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
                let reading = Handle::current().block_on(monitor.read(number));
                reading.map_err(|error| io::Error::other(error).into())
            }
        }
    }
}

impl Hosts {
    /// Of no configuration: asked directly.
    pub fn direct() -> Self {
        Inquiry::Direct.hosts(0)
    }

    /// Where a server is: the one with this number among the resolver's, which has this host and port.
    ///
    /// # Errors
    ///
    /// Why nobody can tell.
    pub async fn addresses(&self, server: usize, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        let addresses = match (host.parse::<IpAddr>(), &self.inquiry) {
            (Ok(literal), _) => vec![literal],
            (Err(_), Inquiry::Direct) => {
                let host = host.to_owned();
                blocking(move || addresses(&host)).await?
            }
            (Err(_), Inquiry::Monitor(monitor, _)) => {
                let question = Question::Host { resolver: self.resolver, server };
                monitor.addresses(question).await.map_err(io::Error::other)?
            }
        };
        Ok(addresses.into_iter().map(|address| SocketAddr::new(address, port)).collect())
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// Asks NSS for a user (getpwnam(3)).
pub(crate) fn uid(name: &UserName) -> io::Result<Option<u32>> {
    let entry = nix::unistd::User::from_name(name.as_str())?;
    Ok(entry.map(|entry| entry.uid.as_raw()))
}

/// Asks NSS for a host (getaddrinfo(3)).
pub(crate) fn addresses(host: &str) -> io::Result<Vec<IpAddr>> {
    Ok((host, 0).to_socket_addrs()?.map(|address| address.ip()).collect())
}

/// The files that a configuration names and that are read again when they change. A worker says by their number which
/// one it wants; `:include:` files, which these name, are not among them.
pub(crate) fn source_files(config: &Config) -> impl Iterator<Item = &Path> {
    let passwd_files = config.resolvers.iter().filter_map(|resolver| match resolver {
        ResolverConfig::PasswdFile(file) => Some(&file.path),
        ResolverConfig::Passwd(_) | ResolverConfig::Ldap(_) => None,
    });
    let Recipients { aliases, virtual_aliases, .. } = &config.recipients;
    aliases.iter().chain(virtual_aliases).chain(passwd_files).map(PathBuf::as_path)
}

/// The host of a server, if it is one of the configuration that has a name.
pub(crate) fn server_host(config: &Config, resolver: usize, server: usize) -> Option<&str> {
    match config.resolvers.get(resolver)? {
        ResolverConfig::Ldap(ldap) => Some(ldap.uri.get(server)?.tcp()?.0),
        ResolverConfig::Passwd(_) | ResolverConfig::PasswdFile(_) => None,
    }
}
