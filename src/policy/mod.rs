//! The Postfix policy service (SMTPD_POLICY_README): one answer per request, or a closed connection.
//!
//! In trouble with a request the connection is closed without an answer, as the protocol wants it; `OK` is never
//! said, since it would skip the restrictions that follow.

mod codec;

use std::{sync::Arc, time::Duration};

pub use codec::{CodecError, MAX_REQUEST_LENGTH, PolicyCodec, Request};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
    time::timeout,
};
use tokio_util::codec::Framed;
use tracing::{debug, warn};

use crate::{
    address::Sender,
    logging::Chain,
    pipeline::Pipeline,
    reply::Reply,
    transaction::{Client, Envelope, Interface, RecipientArgument, Sasl},
    verdict::Opinion,
    worker::Drain,
};

/// A connection that sends no complete request for as long is closed. Postfix closes idle ones after 300 s
/// (smtpd_policy_service_max_idle).
const IDLE_TIME_LIMIT: Duration = Duration::from_secs(1000);

/// An answer that the client does not take for as long ends the connection.
const WRITE_TIME_LIMIT: Duration = Duration::from_secs(60);

/// The answer that leaves the decision to others.
const DUNNO: &str = "DUNNO";

/// Serves one connection to its end.
pub async fn serve<S>(pipeline: Arc<Pipeline>, stream: S, mut drain: watch::Receiver<Option<Drain>>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut framed = Framed::new(stream, PolicyCodec::default());
    loop {
        let next = tokio::select! {
            biased;
            next = timeout(IDLE_TIME_LIMIT, next_request(&mut framed)) => next,
            // Between requests a connection can go at any time: Postfix makes another.
            _ = drain.wait_for(Option::is_some), if framed.read_buffer().is_empty() => return,
        };
        let request = match next {
            Ok(Some(Ok(request))) => request,
            Ok(Some(Err(error))) => {
                warn!(interface = "policy", "connection closed: {}", Chain(&error));
                return;
            }
            Ok(None) => return,
            Err(_) => {
                debug!(interface = "policy", "idle connection closed");
                return;
            }
        };
        let Some(action) = answer(&pipeline, &request).await else {
            warn!(interface = "policy", "connection closed: request is not smtpd_access_policy");
            return;
        };
        if !matches!(timeout(WRITE_TIME_LIMIT, send(&mut framed, action)).await, Ok(Ok(()))) {
            debug!(interface = "policy", "client went away without its answer");
            return;
        }
    }
}

async fn next_request<S>(framed: &mut Framed<S, PolicyCodec>) -> Option<Result<Request, CodecError>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    use std::{future::poll_fn, pin::Pin};
    use tokio_stream::Stream;
    poll_fn(|cx| Pin::new(&mut *framed).poll_next(cx)).await
}
