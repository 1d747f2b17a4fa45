//! The threads that serve, each with a runtime of its own. A connection stays where it began: threads that take over each
//! other's work have to wake each other for it, which a session of one message did as often as it read or wrote.

use std::{future::Future, io, sync::Arc, thread};

use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::task::TaskTracker;
use tracing::warn;

use super::Stream;

/// Most threads that serve. One answers tens of thousands of requests a second; the MTA and the filters have more use for the
/// other processors.
const MAX_THREADS: usize = 4;

/// The threads that serve, the one that accepts first.
#[derive(Clone, Debug)]
pub(super) struct Threads(Arc<[Thread]>);

#[derive(Debug)]
struct Thread {
    runtime: Handle,
    connections: TaskTracker,
}

/// A runtime for one thread.
pub(super) fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

impl Threads {
    /// One for each processor, up to [`MAX_THREADS`]. Counting processors reads files, which a confined process can't.
    pub(super) fn count() -> usize {
        thread::available_parallelism().map_or(1, |processors| processors.get().min(MAX_THREADS))
    }

    /// Adds threads to the one that calls this in its runtime, up to `count`. They end with the process.
    pub(super) fn start(count: usize) -> io::Result<Self> {
        let mut runtimes = vec![Handle::current()];
        for _ in 1..count {
            let runtime = runtime()?;
            runtimes.push(runtime.handle().clone());
            let serve = move || runtime.block_on(std::future::pending::<()>());
            thread::Builder::new().name("serve".into()).spawn(serve)?;
        }
        let threads = runtimes.into_iter();
        Ok(Self(threads.map(|runtime| Thread { runtime, connections: TaskTracker::new() }).collect()))
    }

    /// Has a connection that was accepted here served by whichever thread has the fewest.
    pub(super) fn serve<F>(&self, stream: Stream, serve: impl FnOnce(Stream) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let Some((n, thread)) = self.0.iter().enumerate().min_by_key(|(_, thread)| thread.connections.len())
        else {
            return;
        };
        if n == 0 {
            thread.connections.spawn_on(serve(stream), &thread.runtime);
            return;
        }
        // It is watched by the runtime that it was registered with.
        let moved = stream.unwatch().map(|stream| async {
            match Stream::watch(stream) {
                Ok(stream) => serve(stream).await,
                Err(error) => warn!("connection lost: {error}"),
            }
        });
        match moved {
            Ok(connection) => drop(thread.connections.spawn_on(connection, &thread.runtime)),
            Err(error) => warn!("connection lost: {error}"),
        }
    }

    /// Waits until each thread has found the time to answer.
    pub(super) async fn answer(&self) {
        for thread in &*self.0 {
            let _ = thread.runtime.spawn(async {}).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, sync::mpsc, time::Duration};

    use tokio::{io::AsyncWriteExt, net::UnixStream, sync::oneshot, time::timeout};

    use super::*;

    /// Generous: the machine may be busy.
    const PATIENCE: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn each_thread_has_as_many_connections_and_they_are_served_there() {
        let threads = Threads::start(3).unwrap();
        let (sender, mut served) = tokio::sync::mpsc::unbounded_channel();
        let mut clients = Vec::new();
        for _ in 0..6 {
            let (client, stream) = UnixStream::pair().unwrap();
            let sender = sender.clone();
            threads.serve(Stream::Unix(stream), move |mut stream| async move {
                stream.write_all(b"x").await.unwrap();
                let _ = sender.send(thread::current().id());
                std::future::pending::<()>().await;
            });
            clients.push(client);
        }
        let mut by_thread = HashMap::new();
        for client in &clients {
            timeout(PATIENCE, client.readable()).await.unwrap().unwrap();
            *by_thread.entry(timeout(PATIENCE, served.recv()).await.unwrap()).or_insert(0) += 1;
        }
        assert_eq!(by_thread.into_values().collect::<Vec<_>>(), [2, 2, 2]);
    }

    #[tokio::test]
    async fn a_thread_that_hangs_is_not_hidden_by_the_others() {
        let threads = Threads::start(2).unwrap();
        timeout(PATIENCE, threads.answer()).await.unwrap();
        let (release, hang) = mpsc::channel::<()>();
        let (sender, hangs) = oneshot::channel();
        let (_client, first) = UnixStream::pair().unwrap();
        threads.serve(Stream::Unix(first), |_| std::future::pending());
        let (_client, second) = UnixStream::pair().unwrap();
        threads.serve(Stream::Unix(second), move |_| async move {
            let _ = sender.send(());
            let _ = hang.recv();
        });
        timeout(PATIENCE, hangs).await.unwrap().unwrap();
        assert!(timeout(Duration::from_millis(100), threads.answer()).await.is_err());
        release.send(()).unwrap();
        timeout(PATIENCE, threads.answer()).await.unwrap();
    }
}
