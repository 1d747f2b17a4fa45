//! One milter connection: what the MTA said so far, and the transaction that it makes.
//!
//! A connection has any number of transactions. Each goes through [`State`]: none, envelope, message, and back to
//! none at its end, when it is aborted, and when the next MAIL shows that the last one is over.

use std::{ffi::CStr, future::Future, io, pin::Pin, sync::Arc};

use indymilter::{Actions, Macros, NegotiateContext, ProtoOpts, SocketInfo, Status};
use tokio_util::{
    bytes::Bytes,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};
use tracing::{debug, warn};

use super::negotiation;
use crate::{
    address::Sender,
    config::{Config, Mixed},
    logging::Quoted,
    pipeline::{Outcome, Pipeline},
    recipient::{FilterSet, Recipient},
    reply::Reply,
    spool::{Spool, SpoolSettings},
    trace_headers,
    transaction::{self, Client, Envelope, Interface, RecipientArgument, Sasl},
    verdict::{Ending, Opinion},
};

/// Most recipients of a transaction. More are accepted and not judged, so that the memory of a connection is bounded.
const MAX_RECIPIENTS: usize = 10_000;

/// What a connection knows.
pub(super) struct Session {
    pipeline: Arc<Pipeline>,
    settings: Arc<Config>,
    transactions: TaskTracker,
    options: ProtoOpts,
    /// Whether the MTA lets us delete recipients and add others.
    can_change_recipients: bool,
    /// From CONNECT, with an MTA that takes no macro lists.
    peer: Client,
    helo: Option<String>,
    state: State,
}

/// How far the transaction has come.
enum State {
    /// There is none.
    Idle,
    /// MAIL was given.
    Envelope(Box<Transaction>),
    /// The message is coming.
    Message(Box<Transaction>, Content),
}

struct Transaction {
    envelope: Envelope,
    recipients: Vec<Recipient>,
    /// The filters that judge the first recipient.
    first: Option<FilterSet>,
    /// Why nobody is asked about it, if so.
    unjudged: Option<String>,
    /// Keeps a draining worker alive.
    _token: TaskTrackerToken,
}

enum Content {
    Spooling(Spool),
    /// Not kept: larger than `max-message`. Bytes that had come when this was clear.
    TooLarge(u64),
    /// Not kept: our own trouble.
    Failed(String),
}

/// The future of a transaction's outcome.
pub(super) type OutcomeFuture = Pin<Box<dyn Future<Output = Outcome> + Send>>;

impl Session {
    pub(super) fn new(pipeline: Arc<Pipeline>, settings: Arc<Config>, transactions: TaskTracker) -> Self {
        Self {
            pipeline,
            settings,
            transactions,
            options: ProtoOpts::empty(),
            can_change_recipients: false,
            peer: Client::default(),
            helo: None,
            state: State::Idle,
        }
    }

    pub(super) fn negotiate(
        &mut self,
        cx: &mut NegotiateContext<Self>,
        actions: Actions,
        options: ProtoOpts,
    ) {
        let wants_changes = self.settings.verdicts.mixed != Mixed::Deliver;
        let terms = negotiation::terms(actions, options, wants_changes);
        self.can_change_recipients = terms.actions.contains(negotiation::CHANGE_RECIPIENTS);
        if wants_changes && !self.can_change_recipients {
            warn!("verdict.mixed: this MTA lets nobody change recipients, so refusers' copies are delivered");
        }
        debug!(?actions, ?options, ?terms, "milter negotiation");
        self.options = terms.options;
        cx.requested_actions = terms.actions;
        cx.requested_opts = terms.options;
        cx.requested_macros = terms.macros;
    }

    /// Continue, said or unsaid as negotiated.
    fn proceed(&self, quiet: ProtoOpts) -> Status {
        if self.options.contains(quiet) { Status::Noreply } else { Status::Continue }
    }

    pub(super) fn connect(&mut self, name: &CStr, socket: &SocketInfo) -> Status {
        self.peer.name = client_name(&name.to_string_lossy());
        self.peer.address = match socket {
            SocketInfo::Inet(address) => Some(address.ip().to_canonical()),
            SocketInfo::Unix(_) | SocketInfo::Unknown => None,
        };
        self.peer.is_local = self.peer.address.is_none() && self.peer.name.as_deref() == Some("localhost");
        self.proceed(ProtoOpts::NOREPLY_CONNECT)
    }

    /// Comes again after STARTTLS; the last one counts.
    pub(super) fn helo(&mut self, name: &CStr) -> Status {
        self.helo = Some(name.to_string_lossy().into_owned());
        self.proceed(ProtoOpts::NOREPLY_HELO)
    }

    pub(super) fn mail(&mut self, macros: &Macros, arguments: &[std::ffi::CString]) -> Status {
        self.abort();
        let raw = arguments.first().map(|argument| argument.to_bytes()).unwrap_or_default();
        let parameters: Vec<String> =
            arguments.iter().skip(1).map(|p| p.to_string_lossy().to_ascii_uppercase()).collect();
        let size = parameters.iter().find_map(|p| p.strip_prefix("SIZE=")?.parse().ok());
        let (sender, unjudged) = match Sender::from_client(raw) {
            Ok(sender) => (sender, None),
            Err(error) => {
                warn!("sender \"{}\" is not judged: {error}", Quoted(&String::from_utf8_lossy(raw)));
                (Sender::Null, Some(format!("sender: {error}")))
            }
        };
        let envelope = Envelope {
            interface: Interface::Milter,
            queue_id: queue_id(macros),
            client: Arc::new(self.client(macros)),
            sender,
            declared_size: size.filter(|size| *size > 0),
            smtputf8: parameters.iter().any(|p| p == "SMTPUTF8"),
        };
        self.state = State::Envelope(Box::new(Transaction {
            envelope,
            recipients: Vec::new(),
            first: None,
            unjudged,
            _token: self.transactions.token(),
        }));
        self.proceed(ProtoOpts::NOREPLY_MAIL)
    }

    fn client(&self, macros: &Macros) -> Client {
        let mut client = self.peer.clone();
        if let Some(address) = value(macros, c"{client_addr}") {
            // Sendmail writes `IPv6:` in front, as RFC 5321 address literals have it.
            let bare = address.strip_prefix("IPv6:").unwrap_or(&address);
            client.address = bare.parse().ok().map(|address: std::net::IpAddr| address.to_canonical());
        }
        let name = value(macros, c"{client_name}");
        if let Some(name) = &name {
            client.name = client_name(name);
        }
        // Submission without a connection: both say port 0; Postfix names localhost, sendmail -bs has address 0 and no name.
        if value(macros, c"{client_port}").as_deref() == Some("0") {
            let has_no_address = value(macros, c"{client_addr}").as_deref() == Some("0");
            client.is_local = name.as_deref() == Some("localhost") || has_no_address;
        } else if name.as_deref() == Some("localhost") {
            client.is_local = client.address.is_none();
        }
        client.helo.clone_from(&self.helo);
        client.protocol = if self.helo.is_some() { "ESMTP".into() } else { String::new() };
        client.tls = value(macros, c"{tls_version}");
        client.sasl = value(macros, c"{auth_authen}").map(|username| Sasl {
            username,
            method: value(macros, c"{auth_type}").unwrap_or_default(),
            sender: value(macros, c"{auth_author}").unwrap_or_default(),
        });
        client
    }

    pub(super) async fn rcpt(&mut self, macros: &Macros, arguments: &[std::ffi::CString]) -> Opinion {
        let State::Envelope(transaction) = &mut self.state else {
            // The MTA breaks its own protocol; what it does with the recipient is its affair.
            return Opinion::Accept;
        };
        transaction.note_queue_id(macros);
        if transaction.unjudged.is_some() {
            return Opinion::Accept;
        }
        // RFC 5321, section 4.5.3.1.10: the client sends the rest in another transaction.
        if transaction.recipients.len() >= MAX_RECIPIENTS {
            return Opinion::Defer(Reply::too_many_recipients());
        }
        let argument = RecipientArgument {
            raw: arguments.first().map(|a| a.to_bytes().to_vec()).unwrap_or_default(),
            mailer: value(macros, c"{rcpt_mailer}"),
            mailbox: value(macros, c"{rcpt_addr}"),
        };
        let recipient =
            self.pipeline.recipient(&transaction.envelope, argument, &mut transaction.first).await;
        match recipient.known() {
            Some(opinion @ (Opinion::Reject(_) | Opinion::Defer(_))) => opinion,
            Some(Opinion::Accept) | None => {
                transaction.recipients.push(recipient);
                Opinion::Accept
            }
        }
    }

    /// `Some` if the message is not needed.
    pub(super) fn data(&mut self, macros: &Macros) -> Option<Opinion> {
        let State::Envelope(mut transaction) = std::mem::replace(&mut self.state, State::Idle) else {
            return Some(Opinion::Accept);
        };
        transaction.note_queue_id(macros);
        let Transaction { envelope, recipients, .. } = &*transaction;
        if let Some(why) = &transaction.unjudged {
            return Some(self.pipeline.on_trouble(envelope, recipients, why).opinion);
        }
        if !self.pipeline.needs_message(recipients, self.can_change_recipients) {
            return Some(
                self.pipeline.without_message(envelope, recipients, "nobody's filter decides").opinion,
            );
        }
        let content = match self.new_spool(&transaction, macros) {
            Ok(spool) => Content::Spooling(spool),
            Err(error) => Content::Failed(self.spool_failed(&error)),
        };
        self.state = State::Message(transaction, content);
        None
    }

    fn new_spool(&self, transaction: &Transaction, macros: &Macros) -> io::Result<Spool> {
        let filter = &self.settings.filter;
        let metrics = self.pipeline.metrics().spool.clone();
        let settings = SpoolSettings { metrics, ..SpoolSettings::new(filter) };
        let mut spool = Spool::new(settings, transaction.envelope.declared_size)?;
        if filter.trace_headers {
            // Of the MTA.
            let host = value(macros, c"j").unwrap_or_else(|| "localhost".into());
            trace_headers::write(&mut spool, &transaction.envelope, &host, jiff::Timestamp::now())?;
        }
        Ok(spool)
    }

    fn spool_failed(&self, error: &io::Error) -> String {
        format!("spool {}: {error}", self.settings.filter.spool_directory.display())
    }

    /// With an MTA that has no DATA stage the message begins without one.
    fn begin_message(&mut self, macros: &Macros) -> Option<Status> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Envelope(transaction) => {
                if let Some(why) = transaction.unjudged.clone() {
                    // What it comes to can be said at the end only, if the stages before it get no answer.
                    self.state = State::Message(transaction, Content::Failed(why));
                    return None;
                }
                self.state = State::Envelope(transaction);
                self.data(macros).map(|_| Status::Accept)
            }
            other => {
                self.state = other;
                None
            }
        }
    }

    pub(super) async fn header(&mut self, macros: &Macros, name: &CStr, value: &CStr) -> Status {
        if let Some(status) = self.begin_message(macros) {
            return if self.options.contains(ProtoOpts::NOREPLY_HEADER) { Status::Noreply } else { status };
        }
        let mut value = value.to_bytes().to_vec();
        if !self.options.contains(ProtoOpts::LEADING_SPACE) {
            // The MTA has taken one space away.
            value.insert(0, b' ');
        }
        let name = name.to_bytes().to_vec();
        self.write(move |spool| spool.header(&name, &value)).await;
        self.proceed(ProtoOpts::NOREPLY_HEADER)
    }

    pub(super) async fn end_of_headers(&mut self, macros: &Macros) -> Status {
        if let Some(status) = self.begin_message(macros) {
            return if self.options.contains(ProtoOpts::NOREPLY_EOH) { Status::Noreply } else { status };
        }
        self.write(Spool::end_of_headers).await;
        self.proceed(ProtoOpts::NOREPLY_EOH)
    }

    pub(super) async fn body(&mut self, macros: &Macros, chunk: Bytes) -> Status {
        if let Some(status) = self.begin_message(macros) {
            return status;
        }
        self.write(move |spool| spool.body(&chunk)).await;
        let is_kept = matches!(self.state, State::Message(_, Content::Spooling(_)));
        // The rest of the body is of no use then. Elsewhere than here Sendmail takes SKIP for more than it says.
        if !is_kept && self.options.contains(ProtoOpts::SKIP) { Status::Skip } else { Status::Continue }
    }

    /// Writes to the spool, off the async threads where that may take time.
    async fn write(&mut self, write: impl FnOnce(&mut Spool) -> io::Result<()> + Send + 'static) {
        let State::Message(_, content) = &mut self.state else {
            return;
        };
        let mut spool = match std::mem::replace(content, Content::TooLarge(0)) {
            Content::Spooling(spool) => spool,
            other => {
                *content = other;
                return;
            }
        };
        let written = if spool.is_on_disk() {
            let task = tokio::task::spawn_blocking(move || write(&mut spool).map(|()| spool));
            task.await.unwrap_or_else(|error| Err(io::Error::other(error)))
        } else {
            write(&mut spool).map(|()| spool)
        };
        let content = match written {
            Ok(spool) if spool.size() > self.settings.filter.max_message.0 => Content::TooLarge(spool.size()),
            Ok(spool) => Content::Spooling(spool),
            Err(error) => Content::Failed(self.spool_failed(&error)),
        };
        if let State::Message(_, slot) = &mut self.state {
            *slot = content;
        }
    }

    /// The outcome may take as long as filters do.
    pub(super) async fn end_of_message(&mut self, macros: &Macros) -> OutcomeFuture {
        let _ = self.begin_message(macros);
        let State::Message(mut transaction, content) = std::mem::replace(&mut self.state, State::Idle) else {
            return ready(Outcome { opinion: Opinion::Accept, changes: Vec::new() });
        };
        transaction.note_queue_id(macros);
        let Transaction { envelope, recipients, .. } = *transaction;
        let spool = match content {
            Content::Spooling(spool) => spool,
            Content::TooLarge(size) => return ready(self.pipeline.too_large(&envelope, &recipients, size)),
            Content::Failed(why) => {
                return ready(self.pipeline.on_trouble(&envelope, &recipients, &why));
            }
        };
        let finished = if spool.is_on_disk() {
            let task = tokio::task::spawn_blocking(move || spool.finish());
            task.await.unwrap_or_else(|error| Err(io::Error::other(error)))
        } else {
            spool.finish()
        };
        match finished {
            Ok(message) => {
                let opinion = self.pipeline.opinion_on_trouble(&envelope.client);
                let trouble = Outcome { opinion, changes: Vec::new() };
                let outcome =
                    self.pipeline.message(envelope, recipients, message, self.can_change_recipients);
                Box::pin(async { outcome.await.unwrap_or(trouble) })
            }
            Err(error) => {
                let why = self.spool_failed(&error);
                ready(self.pipeline.on_trouble(&envelope, &recipients, &why))
            }
        }
    }

    /// Forgets the transaction, if there is one.
    pub(super) fn abort(&mut self) -> Status {
        if !matches!(std::mem::replace(&mut self.state, State::Idle), State::Idle) {
            self.pipeline.metrics().transactions.of(Ending::Aborted).inc();
        }
        Status::Continue
    }
}

fn ready(outcome: Outcome) -> OutcomeFuture {
    Box::pin(std::future::ready(outcome))
}

impl Transaction {
    /// Postfix gives the queue id when the first recipient was accepted, Sendmail only at MAIL.
    fn note_queue_id(&mut self, macros: &Macros) {
        if self.envelope.queue_id.is_none() {
            self.envelope.queue_id = queue_id(macros);
        }
    }
}

/// A name that the MTA has verified. It writes `unknown`, or the address in brackets, where it has none.
fn client_name(name: &str) -> Option<String> {
    (!name.is_empty() && name != "unknown" && !name.starts_with('[')).then(|| name.to_owned())
}

fn queue_id(macros: &Macros) -> Option<String> {
    transaction::queue_id(&value(macros, c"i")?)
}

fn value(macros: &Macros, name: &CStr) -> Option<String> {
    let value = macros.get(name)?.to_string_lossy();
    (!value.is_empty()).then(|| value.into_owned())
}
