//! What rules say about a recipient of a transaction.

use crate::{
    address::Address,
    recipient::Decision,
    reply::Reply,
    rules::{Action, Question, Rules},
    transaction::Envelope,
    verdict::{Opinion, Verdict},
};

/// The decision of the rules, unless they leave it to the filters. `size`: as far as it is known, in bytes. `whose`
/// is put in front of the rule's number in the log.
pub fn decide(
    rules: &Rules,
    whose: &str,
    envelope: &Envelope,
    recipient: &Address,
    size: Option<u64>,
) -> Option<Decision> {
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
        Some(text) => Reply::from_text(verdict, text, envelope.smtputf8),
        None => Reply::default_of(verdict),
    };
    let opinion = match ruling.action {
        Action::Filter => return None,
        Action::Accept => Opinion::Accept,
        Action::Reject => Opinion::Reject(reply(Verdict::Reject)),
        Action::Defer => Opinion::Defer(reply(Verdict::Defer)),
    };
    let by = ruling.rule.map_or_else(|| format!("{whose}default rule"), |n| format!("{whose}rule {n}"));
    Some(Decision { opinion, by })
}

/// As [`decide`], of a user's own rules before the size is known for certain: rules that look at it may still
/// refuse at the end of the message what they would let in now, so that only a refusal counts.
pub fn decide_early(
    rules: &Rules,
    envelope: &Envelope,
    recipient: &Address,
    declared_size: Option<u64>,
) -> Option<Decision> {
    let decision = decide(rules, "", envelope, recipient, declared_size)?;
    let may_change = decision.opinion == Opinion::Accept && rules.depends_on_size();
    (!may_change).then_some(decision)
}
