//! The Postfix policy service (SMTPD_POLICY_README): one answer per request, or a closed connection.
//!
//! In trouble with a request the connection is closed without an answer, as the protocol wants it; `OK` is never
//! said, since it would skip the restrictions that follow.

mod codec;

use std::{borrow::Cow, net::IpAddr, pin::pin, sync::Arc, time::Duration};

pub use codec::{Attribute, CodecError, MAX_REQUEST_LENGTH, PolicyCodec, Request};
use futures_util::{FutureExt, SinkExt, StreamExt};
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
    /// The filters of each transaction's first recipient, by `instance`, if they matter.
    first: Option<Cache<String, FilterSet>>,
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
        let first = pipeline.splits().then(|| first.time_to_idle(TRANSACTION_TTL).build());
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
    let (mut is_new, mut is_leaving) = (true, false);
    // Since `silence` began. It begins anew only when it is over, since to look at the clock costs something.
    let mut was_heard = false;
    loop {
        // Between requests a connection can go at any time: Postfix makes another.
        if is_leaving && !is_new && framed.read_buffer().is_empty() {
            return;
        }
        let next = tokio::select! {
            biased;
            next = framed.next() => next,
            _ = &mut leave, if !is_leaving => {
                (is_leaving, was_heard) = (true, false);
                silence.as_mut().reset(Instant::now() + FIRST_REQUEST_TIME_LIMIT);
                continue;
            }
            () = &mut silence => {
                if !std::mem::take(&mut was_heard) {
                    debug!(interface = "policy", "idle connection closed");
                    return;
                }
                let limit = if is_leaving { FIRST_REQUEST_TIME_LIMIT } else { IDLE_TIME_LIMIT };
                silence.as_mut().reset(Instant::now() + limit);
                continue;
            }
        };
        (is_new, was_heard) = (false, true);
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
        if !matches!(send(&mut framed, &action).await, Some(Ok(()))) {
            debug!(interface = "policy", "client went away without its answer");
            return;
        }
    }
}

/// Answers pipelined requests together: written out only when no further one waits, whole, in the buffer. Whoever has
/// sent a part of one may wait for the last answer before going on. `None`: the client does not take it.
async fn send<S>(framed: &mut Framed<S, PolicyCodec>, action: &str) -> Option<Result<(), CodecError>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut sending = pin!(async {
        framed.feed(action).await?;
        let another_waits = framed.read_buffer().windows(2).any(|pair| pair == b"\n\n");
        if another_waits { Ok(()) } else { framed.flush().await }
    });
    // Mostly the kernel takes it at once.
    match sending.as_mut().now_or_never() {
        Some(sent) => Some(sent),
        None => timeout(WRITE_TIME_LIMIT, sending).await.ok(),
    }
}

/// Writes out what the requests before a bad one are owed.
async fn finish<S>(framed: &mut Framed<S, PolicyCodec>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let _ = timeout(WRITE_TIME_LIMIT, framed.flush()).await;
}

/// The action for a request; `None` if it is none that we serve.
async fn answer(service: &Service, request: &Request) -> Option<Cow<'static, str>> {
    let pipeline = &service.pipeline;
    if request.bytes(Attribute::Request) != Some(b"smtpd_access_policy") {
        return None;
    }
    if request.bytes(Attribute::ProtocolState) != Some(b"RCPT") {
        return Some(DUNNO.into());
    }
    let Some(recipient) = request.bytes(Attribute::Recipient) else {
        return Some(DUNNO.into());
    };
    let client = client(request);
    let sender = match Sender::from_client(request.bytes(Attribute::Sender).unwrap_or_default()) {
        Ok(sender) => sender,
        Err(error) => {
            let sender = request.get(Attribute::Sender).unwrap_or_default();
            warn!("NOQUEUE: sender \"{}\" is not judged: {error}", Quoted(&sender));
            return Some(action(&pipeline.opinion_on_trouble(&client)));
        }
    };
    let size = request.get(Attribute::Size).and_then(|size| size.parse().ok());
    let envelope = Envelope {
        interface: Interface::Policy,
        queue_id: request.get(Attribute::QueueId).and_then(|id| transaction::queue_id(&id)),
        client: Arc::new(client),
        sender,
        declared_size: size.filter(|size| *size > 0),
        // The protocol does not say; ASCII is always right.
        smtputf8: false,
    };
    let argument = RecipientArgument { raw: recipient.to_vec(), mailer: None, mailbox: None };
    let opinion = match &service.first {
        None => pipeline.recipient(&envelope, argument, &mut None).await.known(),
        Some(first) => {
            // One smtpd asks about the recipients of a transaction one after the other.
            let instance = request.get(Attribute::Instance);
            let instance = instance.filter(|instance| instance.len() <= MAX_INSTANCE_LENGTH);
            let instance = instance.unwrap_or_default();
            let known = first.get(&*instance).await;
            let mut filters = known.clone();
            let recipient = pipeline.recipient(&envelope, argument, &mut filters).await;
            if let (Some(filters), None, false) = (filters, known, instance.is_empty()) {
                first.insert(instance.into_owned(), filters).await;
            }
            recipient.known()
        }
    };
    Some(action(&opinion.unwrap_or(Opinion::Accept)))
}

fn action(opinion: &Opinion) -> Cow<'static, str> {
    opinion.reply().map_or(DUNNO.into(), |reply| Reply::policy_action(reply).into())
}

fn client(request: &Request) -> Client {
    let text = |attribute| request.get(attribute).map(Cow::into_owned);
    let known = |attribute| request.get(attribute).filter(|value| value != "unknown").map(Cow::into_owned);
    let address = request.get(Attribute::ClientAddress).and_then(|address| address.parse::<IpAddr>().ok());
    Client {
        address: address.map(|address| address.to_canonical()),
        name: known(Attribute::ClientName),
        helo: text(Attribute::HeloName),
        protocol: text(Attribute::ProtocolName).unwrap_or_else(|| "ESMTP".into()),
        sasl: text(Attribute::SaslUsername).map(|username| Sasl {
            username,
            method: text(Attribute::SaslMethod).unwrap_or_default(),
            sender: text(Attribute::SaslSender).unwrap_or_default(),
        }),
        tls: known(Attribute::EncryptionProtocol),
        is_local: false,
    }
}
