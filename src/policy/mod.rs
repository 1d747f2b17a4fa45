//! The Postfix policy service (SMTPD_POLICY_README): one answer per request, or a closed connection.
//!
//! In trouble with a request the connection is closed without an answer, as the protocol wants it; `OK` is never
//! said, since it would skip the restrictions that follow.

mod codec;

use std::{sync::Arc, time::Duration};

pub use codec::{CodecError, MAX_REQUEST_LENGTH, PolicyCodec, Request};
use futures_util::{SinkExt, StreamExt};
use moka::future::Cache;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
    time::timeout,
};
use tokio_util::codec::Framed;
use tracing::{debug, warn};

use crate::{
    address::Sender,
    logging::{Chain, Quoted},
    pipeline::Pipeline,
    recipient::FilterSet,
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

/// How long a worker that leaves waits for the first request of a connection. Without an answer on a new connection,
/// after that on an old one was lost, Postfix gives up: 451 4.3.5.
const FIRST_REQUEST_TIME_LIMIT: Duration = Duration::from_secs(1);

/// The answer that leaves the decision to others.
const DUNNO: &str = "DUNNO";

/// How long a transaction is remembered after its last recipient, for `verdict.split`.
const TRANSACTION_TTL: Duration = Duration::from_secs(600);

/// Transactions remembered.
const TRANSACTIONS: u64 = 100_000;

/// What all connections share.
#[derive(Debug)]
pub struct Service {
    pipeline: Arc<Pipeline>,
    /// The filters of each transaction's first recipient, by `instance`.
    first: Cache<String, FilterSet>,
}

impl Service {
    /// For a worker.
    pub fn new(pipeline: Arc<Pipeline>) -> Self {
        let first = Cache::builder().max_capacity(TRANSACTIONS).time_to_idle(TRANSACTION_TTL).build();
        Self { pipeline, first }
    }
}

/// Serves one connection to its end.
pub async fn serve<S>(service: Arc<Service>, stream: S, mut drain: watch::Receiver<Option<Drain>>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut framed = Framed::new(stream, PolicyCodec::default());
    let mut is_new = true;
    loop {
        let leave = async {
            let _ = drain.wait_for(Option::is_some).await;
            if is_new {
                tokio::time::sleep(FIRST_REQUEST_TIME_LIMIT).await;
            }
        };
        let next = tokio::select! {
            biased;
            next = timeout(IDLE_TIME_LIMIT, framed.next()) => next,
            // Between requests a connection can go at any time: Postfix makes another.
            () = leave, if framed.read_buffer().is_empty() => return,
        };
        is_new = false;
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
        let Some(action) = answer(&service, &request).await else {
            warn!(interface = "policy", "connection closed: request is not smtpd_access_policy");
            return;
        };
        if !matches!(timeout(WRITE_TIME_LIMIT, send(&mut framed, action)).await, Ok(Ok(()))) {
            debug!(interface = "policy", "client went away without its answer");
            return;
        }
    }
}

/// Answers pipelined requests together: written out only when no further one waits in the buffer.
async fn send<S>(framed: &mut Framed<S, PolicyCodec>, action: String) -> Result<(), CodecError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    framed.feed(action).await?;
    if framed.read_buffer().is_empty() { framed.flush().await } else { Ok(()) }
}

/// The action for a request; `None` if it is none that we serve.
async fn answer(service: &Service, request: &Request) -> Option<String> {
    let pipeline = &service.pipeline;
    if request.get("request") != Some("smtpd_access_policy") {
        return None;
    }
    if request.get("protocol_state") != Some("RCPT") {
        return Some(DUNNO.to_owned());
    }
    let Some(recipient) = request.get("recipient") else {
        return Some(DUNNO.to_owned());
    };
    let sender = match Sender::parse(request.get("sender").unwrap_or_default().as_bytes()) {
        Ok(sender) => sender,
        Err(error) => {
            warn!(
                "NOQUEUE: sender \"{}\" is not judged: {error}",
                Quoted(request.get("sender").unwrap_or_default())
            );
            return Some(action(&pipeline.opinion_on_trouble()));
        }
    };
    let envelope = Envelope {
        interface: Interface::Policy,
        queue_id: request.get("queue_id").map(str::to_owned),
        client: Arc::new(client(request)),
        sender,
        declared_size: request.get("size").and_then(|size| size.parse().ok()).filter(|size| *size > 0),
        // The protocol does not say; ASCII is always right.
        smtputf8: false,
    };
    let argument = RecipientArgument { raw: recipient.as_bytes().to_vec(), mailer: None, mailbox: None };
    // One smtpd asks about the recipients of a transaction one after the other.
    let instance = request.get("instance").unwrap_or_default();
    let known = service.first.get(instance).await;
    let mut first = known.clone();
    let recipient = pipeline.recipient(&envelope, argument, &mut first).await;
    if let (Some(first), None, false) = (first, known, instance.is_empty()) {
        service.first.insert(instance.to_owned(), first).await;
    }
    Some(action(&recipient.known().unwrap_or(Opinion::Accept)))
}

fn action(opinion: &Opinion) -> String {
    opinion.reply().map_or(DUNNO.to_owned(), Reply::policy_action)
}

fn client(request: &Request) -> Client {
    let known = |name| request.get(name).filter(|value| *value != "unknown").map(str::to_owned);
    Client {
        address: request.get("client_address").and_then(|address| address.parse().ok()),
        name: known("client_name"),
        helo: request.get("helo_name").map(str::to_owned),
        protocol: request.get("protocol_name").unwrap_or("ESMTP").to_owned(),
        sasl: request.get("sasl_username").map(|username| Sasl {
            username: username.to_owned(),
            method: request.get("sasl_method").unwrap_or_default().to_owned(),
            sender: request.get("sasl_sender").unwrap_or_default().to_owned(),
        }),
        tls: known("encryption_protocol"),
        is_local: false,
    }
}
