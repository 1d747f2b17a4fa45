//! The milter interface, on indymilter: callbacks unpack and delegate to [`session::Session`].

mod negotiation;
mod session;

use std::{
    ffi::CString,
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context as TaskContext, Poll},
    time::Duration,
};

use indymilter::{
    ActionError, Callbacks, Context, ContextActions, EomActions, EomContext, SetErrorReply, Status,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch,
};
use tokio_util::task::TaskTracker;
use tracing::{debug, error, warn};

use crate::{
    address::{Address, plain_spelling},
    config::Config,
    pipeline::{Change, Pipeline},
    reply::Reply,
    verdict::Opinion,
    worker::Stream,
};
use session::Session;

/// A connection that says nothing for as long is closed. Somewhat above two hours, as in libmilter, since an MTA
/// may hold a session open as long as its client does.
const IDLE_TIME_LIMIT: Duration = Duration::from_secs(7210);

/// How often an MTA that waits for filters hears that they are at it. Sendmail's default patience is 10 s for some
/// stages, Postfix's 30 s (milter_command_timeout).
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// Serves milter connections.
#[derive(Clone)]
pub struct Service {
    callbacks: Arc<dyn Fn() -> Callbacks<Session> + Send + Sync>,
    close: Arc<watch::Sender<bool>>,
}

impl Service {
    /// For a worker. `transactions`: counts those under way.
    pub fn new(pipeline: Arc<Pipeline>, settings: &Arc<Config>, transactions: TaskTracker) -> Self {
        let settings = Arc::clone(settings);
        let callbacks = move || callbacks(&pipeline, &settings, &transactions);
        Self { callbacks: Arc::new(callbacks), close: Arc::new(watch::Sender::new(false)) }
    }

    /// Serves one connection to its end.
    ///
    /// indymilter's loop is run for each connection, so that its end is known, and accept(2) stays ours.
    pub fn serve(self, stream: Stream) -> impl Future<Output = ()> + Send + 'static {
        let (ended, mut end) = watch::channel(());
        let mut close = self.close.subscribe();
        let peer_left = Arc::new(AtomicBool::new(false));
        let last = LastBytes::default();
        let peer_left_too = Arc::clone(&peer_left);
        let watched = Watched { stream, last, owes_answer: false, peer_left: peer_left_too, _ended: ended };
        let listener = Once(Some(watched));
        let config = indymilter::Config {
            max_connections: 1,
            connection_timeout: IDLE_TIME_LIMIT,
            ..Default::default()
        };
        async move {
            let shutdown = async move {
                tokio::select! {
                    // The sender is dropped with the stream.
                    _ = end.changed() => (),
                    _ = close.wait_for(|close| *close) => (),
                }
            };
            if let Err(error) = indymilter::run(listener, (self.callbacks)(), config, shutdown).await {
                error!("milter connection: {error}");
            }
            // indymilter ends it then, and does not say so.
            if !peer_left.load(Ordering::Relaxed) && !*self.close.borrow() {
                warn!(
                    interface = "milter",
                    "connection closed: a command that makes no sense, or none for too long"
                );
            }
        }
    }

    /// Ends all connections, each after the command that it is at.
    pub async fn close(&self) {
        self.close.send_replace(true);
    }
}

/// A listener that has one connection to give.
struct Once(Option<Watched>);

impl indymilter::Listener for Once {
    type Io = Watched;

    fn poll_accept(&mut self, _: &mut TaskContext<'_>) -> Poll<io::Result<Watched>> {
        self.0.take().map_or(Poll::Pending, |stream| Poll::Ready(Ok(stream)))
    }
}

/// The last bytes that were read, as many as QUIT has.
#[derive(Debug, Default)]
struct LastBytes([u8; QUIT.len()]);

/// The command with which an MTA ends a connection.
const QUIT: [u8; 5] = *b"\0\0\0\x01Q";

impl LastBytes {
    fn push(&mut self, bytes: &[u8]) {
        let new = &bytes[bytes.len().saturating_sub(QUIT.len())..];
        self.0.rotate_left(new.len());
        self.0[QUIT.len() - new.len()..].copy_from_slice(new);
    }
}

/// A stream whose end can be waited for.
struct Watched {
    stream: Stream,
    last: LastBytes,
    /// Nothing was written since something was read, which would have acknowledged it.
    owes_answer: bool,
    /// It said QUIT, closed, or the network failed.
    peer_left: Arc<AtomicBool>,
    _ended: watch::Sender<()>,
}

impl AsyncRead for Watched {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let filled = buffer.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(cx, buffer);
        if read.is_pending() && std::mem::take(&mut this.owes_answer) {
            this.stream.acknowledge();
        }
        if let Poll::Ready(result) = &read {
            this.owes_answer = true;
            let new = &buffer.filled()[filled..];
            this.last.push(new);
            if result.is_err() || new.is_empty() || this.last.0 == QUIT {
                this.peer_left.store(true, Ordering::Relaxed);
            }
        }
        read
    }
}

impl AsyncWrite for Watched {
    fn poll_write(self: Pin<&mut Self>, cx: &mut TaskContext<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(cx, bytes);
        this.owes_answer = false;
        if matches!(&written, Poll::Ready(Err(_))) {
            this.peer_left.store(true, Ordering::Relaxed);
        }
        written
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

fn callbacks(
    pipeline: &Arc<Pipeline>,
    settings: &Arc<Config>,
    transactions: &TaskTracker,
) -> Callbacks<Session> {
    let new_session = {
        let (pipeline, settings, transactions) =
            (Arc::clone(pipeline), Arc::clone(settings), transactions.clone());
        move || Session::new(Arc::clone(&pipeline), Arc::clone(&settings), transactions.clone())
    };
    Callbacks::new()
        .on_negotiate(move |cx, actions, options| {
            let mut session = new_session();
            Box::pin(async move {
                session.negotiate(cx, actions, options);
                cx.data = Some(session);
                Status::Continue
            })
        })
        .on_connect(|cx, name, socket| Box::pin(async move { with(cx, |s, _| s.connect(&name, &socket)) }))
        .on_helo(|cx, name| Box::pin(async move { with(cx, |s, _| s.helo(&name)) }))
        .on_mail(|cx, arguments| Box::pin(async move { with(cx, |s, macros| s.mail(macros, &arguments)) }))
        .on_rcpt(|cx, arguments| {
            Box::pin(async move {
                let Some(session) = cx.data.as_mut() else {
                    return Status::Tempfail;
                };
                let opinion = session.rcpt(&cx.macros, &arguments).await;
                answer(&mut cx.reply, &opinion, Status::Continue)
            })
        })
        .on_data(|cx| {
            Box::pin(async move {
                let Some(session) = cx.data.as_mut() else {
                    return Status::Tempfail;
                };
                match session.data(&cx.macros) {
                    None => Status::Continue,
                    Some(opinion) => answer(&mut cx.reply, &opinion, Status::Accept),
                }
            })
        })
        .on_header(|cx, name, value| {
            Box::pin(async move {
                let Some(session) = cx.data.as_mut() else {
                    return Status::Tempfail;
                };
                session.header(&cx.macros, &name, &value).await
            })
        })
        .on_eoh(|cx| {
            Box::pin(async move {
                let Some(session) = cx.data.as_mut() else {
                    return Status::Tempfail;
                };
                session.end_of_headers(&cx.macros).await
            })
        })
        .on_body(|cx, chunk| {
            Box::pin(async move {
                let Some(session) = cx.data.as_mut() else {
                    return Status::Tempfail;
                };
                session.body(&cx.macros, chunk).await
            })
        })
        .on_eom(|cx| Box::pin(end_of_message(cx)))
        .on_abort(|cx| Box::pin(async move { with(cx, |s, _| s.abort()) }))
        .on_close(|cx| Box::pin(async move { with(cx, |s, _| s.abort()) }))
}

fn with(
    cx: &mut Context<Session>,
    stage: impl FnOnce(&mut Session, &indymilter::Macros) -> Status,
) -> Status {
    match cx.data.as_mut() {
        Some(session) => stage(session, &cx.macros),
        None => Status::Continue,
    }
}

async fn end_of_message(cx: &mut EomContext<Session>) -> Status {
    let Some(session) = cx.data.as_mut() else { return Status::Tempfail };
    let mut outcome = session.end_of_message(&cx.macros).await;
    let outcome = loop {
        tokio::select! {
            outcome = &mut outcome => break outcome,
            () = tokio::time::sleep(PROGRESS_INTERVAL) => {
                if let Err(error) = cx.actions.progress().await {
                    debug!("the MTA went away while filters run: {error}");
                    return Status::Tempfail;
                }
            }
        }
    };
    let mut added = Vec::new();
    for change in &outcome.changes {
        if let Err(error) = change_recipient(&cx.actions, change, &mut added).await {
            // Half a change would lose mail or deliver it twice: the client is to come again.
            error!("recipient cannot be changed: {error}");
            return Status::Tempfail;
        }
    }
    answer(&mut cx.reply, &outcome.opinion, Status::Accept)
}

/// `added`: so far. A client may name a recipient twice, and a user be reached by several.
async fn change_recipient<'a>(
    actions: &EomActions,
    change: &'a Change,
    added: &mut Vec<&'a Address>,
) -> Result<(), ActionError> {
    // A milter argument has no NUL, since it ends at one.
    let raw = CString::new(change.raw.clone()).map_err(|_| ActionError::InvalidParam)?;
    for address in &change.redirect_to {
        if !added.contains(&address) {
            actions.add_recipient(format!("<{address}>")).await?;
            added.push(address);
        }
    }
    // Postfix wants its own spelling back, and takes no notice of one that it does not know.
    if let Some(plain) = plain_spelling(&change.raw) {
        actions.delete_recipient(plain).await?;
    }
    actions.delete_recipient(raw).await
}

/// The reply and the status for an opinion.
fn answer(reply: &mut indymilter::SmtpReply, opinion: &Opinion, accepted: Status) -> Status {
    let status = match opinion {
        Opinion::Accept => return accepted,
        Opinion::Reject(_) => Status::Reject,
        Opinion::Defer(_) => Status::Tempfail,
    };
    if let Some(text) = opinion.reply()
        && let Err(error) = set_reply(reply, text)
    {
        error!("reply \"{text}\" cannot be set: {error}");
    }
    status
}

fn set_reply(slot: &mut indymilter::SmtpReply, reply: &Reply) -> Result<(), indymilter::SmtpReplyError> {
    slot.set_error_reply(&reply.code(), Some(&reply.enhanced()), reply.milter_lines())
}
