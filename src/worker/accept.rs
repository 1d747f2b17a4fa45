//! Accepting connections: TCP and Unix alike, up to a limit, whatever accept(2) says.

use std::{
    future::Future,
    io,
    os::fd::OwnedFd,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
};
use tokio_util::task::TaskTracker;
use tracing::warn;

use super::threads::Threads;
use crate::metrics::{ConnectionMetrics, OneMore, Service};

/// Pause after accept(2) failed, for instance because descriptors ran out.
const PAUSE: Duration = Duration::from_millis(100);

/// A listening socket.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// Unix domain.
    Unix(UnixListener),
}

/// A connection.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Tcp(TcpStream),
    /// Unix domain.
    Unix(UnixStream),
}

impl Listener {
    /// Takes over a non-blocking listening socket.
    ///
    /// # Errors
    ///
    /// If it is none.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        use std::os::fd::AsRawFd;
        let address = getsockname::<SockaddrStorage>(socket.as_raw_fd())?;
        Ok(match address.family() {
            Some(AddressFamily::Unix) => Self::Unix(UnixListener::from_std(socket.into())?),
            _ => Self::Tcp(TcpListener::from_std(socket.into())?),
        })
    }

    async fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // Both protocols are question and answer: waiting to fill a segment would only add delay.
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            Self::Unix(listener) => listener.accept().await.map(|(stream, _)| Stream::Unix(stream)),
        }
    }
}

/// A connection that is not watched.
pub(super) enum Unwatched {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

impl Stream {
    /// Has it watched no more by the runtime that it was made in.
    pub(super) fn unwatch(self) -> io::Result<Unwatched> {
        Ok(match self {
            Self::Tcp(stream) => Unwatched::Tcp(stream.into_std()?),
            Self::Unix(stream) => Unwatched::Unix(stream.into_std()?),
        })
    }

    /// Has it watched by the runtime that this is called in.
    pub(super) fn watch(stream: Unwatched) -> io::Result<Self> {
        Ok(match stream {
            Unwatched::Tcp(stream) => Self::Tcp(TcpStream::from_std(stream)?),
            Unwatched::Unix(stream) => Self::Unix(UnixStream::from_std(stream)?),
        })
    }

    /// Has what was read acknowledged now (TCP_QUICKACK, tcp(7), which the kernel takes back on its own), for when more must
    /// come before there is an answer, which would acknowledge it too.
    ///
    /// Sendmail writes macros and the command that they belong to in two small pieces, and waits with the second one for
    /// the acknowledgement of the first: 40 ms for every stage. Postfix writes everything up to the next answer at once.
    pub(crate) fn acknowledge(&self) {
        if let Self::Tcp(stream) = self {
            // Slower, where it can't be set.
            let _ = stream.set_quickack(true);
        }
    }
}

/// Accepts for ever, and has each connection served by one of the threads; one beyond `limit` is closed at once.
pub(super) async fn accept_loop<F>(
    listener: Listener,
    service: Service,
    limit: usize,
    tracker: TaskTracker,
    metrics: ConnectionMetrics,
    threads: Threads,
    serve: impl Fn(Stream) -> F + Clone + Send + 'static,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let interface = service.as_str();
    let why = match service {
        Service::Milter | Service::Policy => "server.max-connections reached",
        Service::Metrics | Service::Control => "as many as are served at a time are open",
    };
    let refused = Arc::new(AtomicUsize::new(0));
    loop {
        match listener.accept().await {
            Ok(stream) if tracker.len() < limit => {
                refused.store(0, Ordering::Relaxed);
                metrics.accepted.inc();
                let (serve, counted) = (serve.clone(), (OneMore::of(&metrics.open), tracker.token()));
                threads.serve(stream, |stream| async move {
                    serve(stream).await;
                    drop(counted);
                });
            }
            // Closing tells the MTA at once, which answers its client 4xx; left in the queue it would wait.
            Ok(_) => {
                metrics.refused.inc();
                if refused.fetch_add(1, Ordering::Relaxed) == 0 {
                    warn!(interface, limit, "connection refused: {why}");
                }
            }
            Err(error) => {
                warn!(interface, "cannot accept a connection: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

macro_rules! delegate {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            Self::Tcp($stream) => $call,
            Self::Unix($stream) => $call,
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        delegate!(self, stream => Pin::new(stream).poll_read(cx, buffer))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        delegate!(self, stream => Pin::new(stream).poll_write(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}
