//! What rules say about a recipient of a transaction.

use crate::{
    address::Address,
    recipient::Decision,
    reply::Reply,
    rules::{Action, Question, Rules},
    transaction::Envelope,
    verdict::{Opinion, Verdict},
};

/// What rules say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruled {
    /// The decision, unless they leave it to the filters.
    pub decision: Option<Decision>,
    /// Whether it may be another if the message is larger than is known.
    pub waits_for_size: bool,
}

/// Asks the rules. `size`: as far as it is known, in bytes. `whose`
/// is put in front of the rule's number in the log.
pub fn decide(
    rules: &Rules,
    whose: &str,
    envelope: &Envelope,
    recipient: &Address,
    size: Option<u64>,
) -> Ruled {
    let client = &envelope.client;
    let ruling = rules.judge(&Question {
        sender: &envelope.sender,
        recipient,
        client_address: client.address,
        client_name: client.name.as_deref(),
        helo: client.helo.as_deref(),
        size,
        today: jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).date(),
    });
    let reply = |verdict| match ruling.reply {
        Some(text) => Reply::from_text(verdict, text, true),
        None => Reply::default_of(verdict),
    };
    let opinion = match ruling.action {
        Action::Filter => None,
        Action::Accept => Some(Opinion::Accept),
        Action::Reject => Some(Opinion::Reject(reply(Verdict::Reject))),
        Action::Defer => Some(Opinion::Defer(reply(Verdict::Defer))),
    };
    let by = || ruling.rule.map_or_else(|| format!("{whose}default rule"), |n| format!("{whose}rule {n}"));
    let decision = opinion.map(|opinion| Decision { opinion, by: by() });
    Ruled { decision, waits_for_size: ruling.waits_for_size }
}
