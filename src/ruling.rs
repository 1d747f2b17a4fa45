//! What rules say about a recipient of a transaction.

use crate::{
    address::Address,
    recipient::{Decision, Source},
    reply::Reply,
    rules::{Action, Question, Rules, WaitsForSize},
    transaction::Envelope,
    verdict::{Opinion, Verdict},
};

/// What rules say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruled {
    /// The decision, unless they leave it to the filters.
    pub decision: Option<Decision>,
    /// What is not final, theirs or that of who is asked after them, as long as the message may be larger.
    pub waits_for_size: WaitsForSize,
}

impl Ruled {
    /// Whether there is a decision, and it is not final.
    pub fn is_provisional(&self) -> bool {
        self.decision
            .as_ref()
            .is_some_and(|decision| self.waits_for_size.holds_back(decision.opinion.verdict()))
    }
}

/// Asks the rules, which are `whose`. `size`: as far as it is known, in bytes.
pub fn decide(
    rules: &Rules,
    whose: Source,
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
    let owner = match whose {
        Source::Site => "site ",
        Source::Directory => "directory ",
        _ => "",
    };
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
    let by = || ruling.rule.map_or_else(|| format!("{owner}default rule"), |n| format!("{owner}rule {n}"));
    let decision = opinion.map(|opinion| Decision { opinion, by: by(), source: whose });
    // Who declared a size is judged by it at RCPT TO. An accept would stand for whatever comes then.
    let waits_for_size =
        WaitsForSize { refusal: ruling.waits_for_size.refusal && size.is_none(), ..ruling.waits_for_size };
    Ruled { decision, waits_for_size }
}
