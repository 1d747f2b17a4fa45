//! The lines of the log that tell what became of a mail: queue id first, one line per transaction and one per
//! recipient that is not let in.
//!
//! Fields are strings, which the log's writer quotes and escapes; none is longer than [`MAX_FIELD_LENGTH`].

use std::time::Instant;

use tracing::info;

use crate::{
    ballot::Told,
    logging::Quoted,
    recipient::{Decision, Recipient, Standing},
    reply::Reply,
    transaction::{Client, Envelope, RecipientArgument},
    verdict::Opinion,
};

/// Longest field, in characters: a transaction can have thousands of recipients.
const MAX_FIELD_LENGTH: usize = 8192;

/// Most lines logged of one filter's standard error.
const MAX_ERROR_LINES: usize = 20;

/// What is told of a transaction.
#[derive(Debug)]
pub struct Record<'a> {
    /// Its envelope.
    pub envelope: &'a Envelope,
    /// Its recipients.
    pub recipients: &'a [Recipient],
    /// Each user's verdict; `None`: those that were known before the message.
    pub verdicts: Option<Vec<String>>,
    /// What the MTA is told.
    pub opinion: &'a Opinion,
    /// Why nobody's filter was asked, if so.
    pub why: &'a str,
    /// Recipients changed, as `<old> -> <new>`.
    pub changes: String,
    /// Size of the message in bytes, as far as it is known.
    pub size: Option<u64>,
    /// When the message was complete.
    pub started: Instant,
}

impl Record<'_> {
    /// Writes the line.
    pub fn log(&self) {
        let verdicts = match &self.verdicts {
            Some(verdicts) => verdicts.join(", "),
            None => joined(self.recipients.iter().map(standing), ", "),
        };
        let to = joined(self.recipients.iter().map(|recipient| shown(&recipient.argument)), ",");
        let separator = if self.why.is_empty() { "" } else { " without message: " };
        let what = format!("{}{separator}{}", self.opinion.verdict().as_str(), self.why);
        let size = self.size.unwrap_or(0);
        let line = Line { to, verdicts, changes: &self.changes, what, size };
        line.log(self.envelope, self.opinion, self.started);
    }
}

/// Tells that a recipient is refused or put off at RCPT TO.
pub fn refused_recipient(envelope: &Envelope, recipient: &Recipient, opinion: &Opinion, started: Instant) {
    let line = Line {
        to: shown(&recipient.argument),
        verdicts: standing(recipient),
        changes: "",
        what: format!("{} at RCPT TO", opinion.verdict().as_str()),
        size: envelope.declared_size.unwrap_or(0),
    };
    line.log(envelope, opinion, started);
}

/// Tells what a filter wrote to standard error, a line each.
pub fn error_output(envelope: &Envelope, user: &str, filter: &str, text: &str) {
    for line in text.lines().filter(|line| !line.trim().is_empty()).take(MAX_ERROR_LINES) {
        info!("{}: {user} {}: {}", Quoted(envelope.queue_id()), Quoted(filter), Quoted(line));
    }
}

struct Line<'a> {
    to: String,
    verdicts: String,
    changes: &'a str,
    what: String,
    size: u64,
}

impl Line<'_> {
    fn log(&self, envelope: &Envelope, opinion: &Opinion, started: Instant) {
        let reply = opinion.reply().map(Reply::to_string).unwrap_or_default();
        info!(
            interface = envelope.interface.as_str(),
            from = shorten(&format!("<{}>", envelope.sender)),
            to = shorten(&self.to),
            client = shorten(&client(&envelope.client)),
            helo = shorten(envelope.client.helo.as_deref().unwrap_or_default()),
            verdicts = shorten(&self.verdicts),
            changes = shorten(self.changes),
            outcome = opinion.verdict().as_str(),
            reply = shorten(&reply),
            size = self.size,
            seconds = started.elapsed().as_millis() as f64 / 1000.0,
            "{}: {}",
            Quoted(envelope.queue_id()),
            self.what,
        );
    }
}

/// The start of a text that strangers can make long.
fn shorten(text: &str) -> &str {
    if text.len() <= MAX_FIELD_LENGTH {
        return text;
    }
    let end = text.char_indices().nth(MAX_FIELD_LENGTH).map_or(text.len(), |(at, _)| at);
    &text[..end]
}

/// Mostly there is one.
fn joined(mut texts: impl Iterator<Item = String>, separator: &str) -> String {
    let first = texts.next().unwrap_or_default();
    texts.fold(first, |all, next| all + separator + &next)
}

fn standing(recipient: &Recipient) -> String {
    match &recipient.standing {
        Standing::Unjudged(why) => format!("{} ({why})", shown(&recipient.argument)),
        Standing::Refused(Decision { opinion, by, .. }) => format!("-={} ({by})", opinion.verdict().as_str()),
        Standing::Judged(judges) => {
            joined(judges.iter().map(|judge| Told::before_message(recipient, judge).line()), ", ")
        }
    }
}

/// A recipient as the client named it, in brackets.
pub fn shown(argument: &RecipientArgument) -> String {
    let raw = String::from_utf8_lossy(&argument.raw);
    format!("<{}>", raw.trim_start_matches('<').trim_end_matches('>'))
}

fn client(client: &Client) -> String {
    let name = client.name.as_deref().unwrap_or("unknown");
    match client.address {
        Some(address) => format!("{name}[{address}]"),
        None => format!("{name}[unknown]"),
    }
}
