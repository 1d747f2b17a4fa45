//! The Postfix policy service (SMTPD_POLICY_README): one answer per request, or a closed connection.
//!
//! In trouble with a request the connection is closed without an answer, as the protocol wants it; `OK` is never
//! said, since it would skip the restrictions that follow.

mod codec;

use std::{borrow::Cow, net::IpAddr, sync::Arc, time::Duration};

pub use codec::{CodecError, MAX_REQUEST_LENGTH, PolicyCodec, Request};
use futures_util::{SinkExt, StreamExt};
use moka::future::Cache;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
    time::{Instant, timeout},
};
use tokio_util::codec::Framed;
use tracing::{debug, warn};

use crate::{
    address::Sender,
    logging::{Chain, Quoted},
    pipeline::Pipeline,
    recipient::FilterSet,
    reply::Reply,
    transaction::{self, Client, Envelope, Interface, RecipientArgument, Sasl},
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

/// What is remembered of all transactions together, in bytes: a hundred thousand of them. Strangers choose who has many
/// filters: an alias of a thousand users, say.
const TRANSACTIONS_CAPACITY: u64 = 32 << 20;

/// Longest instance that is remembered, in bytes; Postfix' have about 30.
const MAX_INSTANCE_LENGTH: usize = 256;

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
        let weigh = |instance: &String, filters: &FilterSet| {
            let names: usize =
                filters.iter().map(|(user, filter)| user.as_str().len() + filter.len() + 64).sum();
            u32::try_from(instance.len() + names + 200).unwrap_or(u32::MAX)
        };
        let first = Cache::builder().weigher(weigh).max_capacity(TRANSACTIONS_CAPACITY);
        let first = first.time_to_idle(TRANSACTION_TTL).build();
        Self { pipeline, first }
    }
}

/// Serves one connection to its end.
pub async fn serve<S>(service: Arc<Service>, stream: S, mut drain: watch::Receiver<Option<Drain>>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut framed = Framed::new(stream, PolicyCodec::default());
    // Both outlive the requests: to set them up anew for each would take longer than most answers.
    let leave = drain.wait_for(Option::is_some);
    let silence = tokio::time::sleep(IDLE_TIME_LIMIT);
    tokio::pin!(leave, silence);
    let (mut heard, mut patience) = (Instant::now(), IDLE_TIME_LIMIT);
    let (mut is_new, mut is_leaving) = (true, false);
    loop {
        // Between requests a connection can go at any time: Postfix makes another.
        if is_leaving && !is_new && framed.read_buffer().is_empty() {
            return;
        }
        let next = tokio::select! {
            biased;
            next = framed.next() => next,
            _ = &mut leave, if !is_leaving => {
                is_leaving = true;
                (heard, patience) = (Instant::now(), FIRST_REQUEST_TIME_LIMIT);
                silence.as_mut().reset(heard + patience);
                continue;
            }
            () = &mut silence => {
                if heard.elapsed() >= patience {
                    debug!(interface = "policy", "idle connection closed");
                    return;
                }
                silence.as_mut().reset(heard + patience);
                continue;
            }
        };
        heard = Instant::now();
        is_new = false;
        let request = match next {
            Some(Ok(request)) => request,
            Some(Err(error)) => {
                warn!(interface = "policy", "connection closed: {}", Chain(&error));
                finish(&mut framed).await;
                return;
            }
            None => return,
        };
        let Some(action) = answer(&service, &request).await else {
            warn!(interface = "policy", "connection closed: request is not smtpd_access_policy");
            finish(&mut framed).await;
            return;
        };
        if !matches!(timeout(WRITE_TIME_LIMIT, send(&mut framed, action)).await, Ok(Ok(()))) {
            debug!(interface = "policy", "client went away without its answer");
            return;
        }
    }
}

/// Answers pipelined requests together: written out only when no further one waits, whole, in the buffer. Whoever has
/// sent a part of one may wait for the last answer before going on.
async fn send<S>(framed: &mut Framed<S, PolicyCodec>, action: String) -> Result<(), CodecError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    framed.feed(action).await?;
    let another_waits = framed.read_buffer().windows(2).any(|pair| pair == b"\n\n");
    if another_waits { Ok(()) } else { framed.flush().await }
}

/// Writes out what the requests before a bad one are owed.
async fn finish<S>(framed: &mut Framed<S, PolicyCodec>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let _ = timeout(WRITE_TIME_LIMIT, framed.flush()).await;
}

/// The action for a request; `None` if it is none that we serve.
async fn answer(service: &Service, request: &Request) -> Option<String> {
    let pipeline = &service.pipeline;
    if request.bytes("request") != Some(b"smtpd_access_policy") {
        return None;
    }
    if request.bytes("protocol_state") != Some(b"RCPT") {
        return Some(DUNNO.to_owned());
    }
    let Some(recipient) = request.bytes("recipient") else {
        return Some(DUNNO.to_owned());
    };
    let client = client(request);
    let sender = match Sender::from_client(request.bytes("sender").unwrap_or_default()) {
        Ok(sender) => sender,
        Err(error) => {
            let sender = request.get("sender").unwrap_or_default();
            warn!("NOQUEUE: sender \"{}\" is not judged: {error}", Quoted(&sender));
            return Some(action(&pipeline.opinion_on_trouble(&client)));
        }
    };
    let envelope = Envelope {
        interface: Interface::Policy,
        queue_id: request.get("queue_id").and_then(|id| transaction::queue_id(&id)),
        client: Arc::new(client),
        sender,
        declared_size: request.get("size").and_then(|size| size.parse().ok()).filter(|size| *size > 0),
        // The protocol does not say; ASCII is always right.
        smtputf8: false,
    };
    let argument = RecipientArgument { raw: recipient.to_vec(), mailer: None, mailbox: None };
    // One smtpd asks about the recipients of a transaction one after the other.
    let instance = request.get("instance").filter(|instance| instance.len() <= MAX_INSTANCE_LENGTH);
    let instance = instance.unwrap_or_default();
    let known = service.first.get(&*instance).await;
    let mut first = known.clone();
    let recipient = pipeline.recipient(&envelope, argument, &mut first).await;
    if let (Some(first), None, false) = (first, known, instance.is_empty()) {
        service.first.insert(instance.into_owned(), first).await;
    }
    Some(action(&recipient.known().unwrap_or(Opinion::Accept)))
}

fn action(opinion: &Opinion) -> String {
    opinion.reply().map_or(DUNNO.to_owned(), Reply::policy_action)
}

fn client(request: &Request) -> Client {
    let text = |name| request.get(name).map(Cow::into_owned);
    let known = |name| text(name).filter(|value| value != "unknown");
    let address = request.get("client_address").and_then(|address| address.parse::<IpAddr>().ok());
    Client {
        address: address.map(|address| address.to_canonical()),
        name: known("client_name"),
        helo: text("helo_name"),
        protocol: text("protocol_name").unwrap_or_else(|| "ESMTP".into()),
        sasl: text("sasl_username").map(|username| Sasl {
            username,
            method: text("sasl_method").unwrap_or_default(),
            sender: text("sasl_sender").unwrap_or_default(),
        }),
        tls: known("encryption_protocol"),
        is_local: false,
    }
}
