//! A connection to a socket named as in the configuration: `inet:127.0.0.1:8890` or `unix:/path`.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// No read or write of a test waits longer.
const TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Connects, with time limits on every read and write.
    pub fn connect(address: &str) -> io::Result<Self> {
        let stream = if let Some(path) = address.strip_prefix("unix:") {
            Stream::Unix(UnixStream::connect(path)?)
        } else {
            let stream = TcpStream::connect(address.strip_prefix("inet:").unwrap_or(address))?;
            stream.set_nodelay(true)?;
            Stream::Tcp(stream)
        };
        stream.set_timeout(TIMEOUT)?;
        Ok(stream)
    }

    /// The limit for reads and writes from now on.
    pub fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        match self {
            Stream::Tcp(s) => s.set_read_timeout(Some(timeout)).and(s.set_write_timeout(Some(timeout))),
            Stream::Unix(s) => s.set_read_timeout(Some(timeout)).and(s.set_write_timeout(Some(timeout))),
        }
    }

    /// Says that nothing more will be written; reading goes on.
    pub fn shut_down_write(&self) -> io::Result<()> {
        match self {
            Stream::Tcp(s) => s.shutdown(Shutdown::Write),
            Stream::Unix(s) => s.shutdown(Shutdown::Write),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Tcp(s) => s.as_fd(),
            Stream::Unix(s) => s.as_fd(),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => s.read(buffer),
            Stream::Unix(s) => s.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => s.write(bytes),
            Stream::Unix(s) => s.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
