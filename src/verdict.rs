//! The algebra of verdicts (contract of how a recipient's and a transaction's verdict come about).
//!
//! Pure: opinions of users become the opinion of a recipient, opinions of recipients the outcome of a
//! transaction. Nothing here can refuse a mail that somebody accepts.

use serde::Deserialize;

use crate::{address::Address, reply::Reply};

/// What somebody says about a mail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Let it in.
    Accept,
    /// Refuse it for good: 5xx.
    Reject,
    /// Ask the client to come again: 4xx.
    Defer,
}

impl Verdict {
    /// The word used in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::Reject => "reject",
            Self::Defer => "defer",
        }
    }
}

/// What is told of a user: a verdict, or why there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// Let it in.
    Accept,
    /// Refuse it for good.
    Reject,
    /// Put it off.
    Defer,
    /// The filter was in trouble.
    Error,
    /// The filter's verdict could not change anything.
    NotAsked,
}

impl Said {
    /// The word used in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::Reject => "reject",
            Self::Defer => "defer",
            Self::Error => "error",
            Self::NotAsked => "not-asked",
        }
    }
}

impl From<Verdict> for Said {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Accept => Self::Accept,
            Verdict::Reject => Self::Reject,
            Verdict::Defer => Self::Defer,
        }
    }
}

/// How a transaction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The mail was let in.
    Accept,
    /// It was refused for good.
    Reject,
    /// It was put off.
    Defer,
    /// The client gave up before we had anything to say, mostly since no recipient was left.
    Aborted,
}

impl Ending {
    /// The word used in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::Reject => "reject",
            Self::Defer => "defer",
            Self::Aborted => "aborted",
        }
    }
}

impl From<Verdict> for Ending {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Accept => Self::Accept,
            Verdict::Reject => Self::Reject,
            Verdict::Defer => Self::Defer,
        }
    }
}

/// What became of a recipient at RCPT TO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtRcpt {
    /// Accepted, whatever the message.
    Accept,
    /// Refused for good.
    Reject,
    /// Put off.
    Defer,
    /// The message will decide.
    Pending,
}

impl AtRcpt {
    /// The word used in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::Reject => "reject",
            Self::Defer => "defer",
            Self::Pending => "pending",
        }
    }
}

impl From<Option<&Opinion>> for AtRcpt {
    fn from(known: Option<&Opinion>) -> Self {
        match known {
            None => Self::Pending,
            Some(Opinion::Accept) => Self::Accept,
            Some(Opinion::Reject(_)) => Self::Reject,
            Some(Opinion::Defer(_)) => Self::Defer,
        }
    }
}

/// A verdict and, unless it is accept, the reply that goes with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opinion {
    /// Let it in.
    Accept,
    /// Refuse it, with a reply of class 5.
    Reject(Reply),
    /// Put it off, with a reply of class 4.
    Defer(Reply),
}

impl Opinion {
    /// A verdict with its default reply.
    pub fn plain(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Accept => Self::Accept,
            Verdict::Reject => Self::Reject(Reply::default_reject()),
            Verdict::Defer => Self::Defer(Reply::default_defer()),
        }
    }

    /// The verdict alone.
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Accept => Verdict::Accept,
            Self::Reject(_) => Verdict::Reject,
            Self::Defer(_) => Verdict::Defer,
        }
    }

    /// The same with a reply in ASCII, unless the client speaks SMTPUTF8 (RFC 6531).
    pub fn in_words_for(self, smtputf8: bool) -> Self {
        match self {
            Self::Reject(reply) if !smtputf8 => Self::Reject(reply.into_ascii()),
            Self::Defer(reply) if !smtputf8 => Self::Defer(reply.into_ascii()),
            other => other,
        }
    }

    /// The reply, unless accepted.
    pub fn reply(&self) -> Option<&Reply> {
        match self {
            Self::Accept => None,
            Self::Reject(reply) | Self::Defer(reply) => Some(reply),
        }
    }
}

/// The opinion of a recipient with several users (an alias): reject only if all of them reject.
///
/// Nobody to ask is an accept. The reply is the first one of the class that wins.
pub fn of_recipient<'a>(users: impl IntoIterator<Item = &'a Opinion>) -> Opinion {
    let mut result: Option<&Opinion> = None;
    for opinion in users {
        result = match (result, opinion) {
            (_, Opinion::Accept) => return Opinion::Accept,
            (Some(Opinion::Defer(_)), _) => result,
            (_, Opinion::Defer(_)) | (None, _) => Some(opinion),
            (earlier, Opinion::Reject(_)) => earlier,
        };
    }
    result.cloned().unwrap_or(Opinion::Accept)
}

/// The outcome of a transaction: all recipients reject → reject; somebody accepts → accept; else defer.
///
/// The reply is that of the recipients of the winning class if they agree on one, else one with a line for
/// each of their addresses, in the order given; beyond ASCII only if the client speaks SMTPUTF8.
pub fn of_transaction(recipients: &[(&Address, &Opinion)], smtputf8: bool) -> Opinion {
    let has = |verdict| recipients.iter().any(|(_, opinion)| opinion.verdict() == verdict);
    if recipients.is_empty() || has(Verdict::Accept) {
        return Opinion::Accept;
    }
    let class = if has(Verdict::Defer) { Verdict::Defer } else { Verdict::Reject };
    let replies: Vec<(&Address, &Reply)> = recipients
        .iter()
        .filter(|(_, opinion)| opinion.verdict() == class)
        .filter_map(|(address, opinion)| Some((*address, opinion.reply()?)))
        .collect();
    let Some((_, first)) = replies.first() else {
        return Opinion::plain(class);
    };
    let reply = if replies.iter().all(|(_, reply)| reply == first) {
        (*first).clone()
    } else {
        Reply::per_recipient(class, &replies, smtputf8)
    };
    match class {
        Verdict::Reject => Opinion::Reject(reply),
        _ => Opinion::Defer(reply),
    }
}

/// Whether the outcome is settled although some recipients (`None`) have not answered yet.
///
/// Only an accept settles it: whatever the others say, the mail is let in.
pub fn is_settled<'a>(recipients: impl IntoIterator<Item = Option<&'a Opinion>>) -> bool {
    recipients.into_iter().any(|opinion| matches!(opinion, Some(Opinion::Accept)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn opinion() -> impl Strategy<Value = Opinion> {
        prop_oneof![
            Just(Opinion::Accept),
            "[a-c]".prop_map(|text| Opinion::Reject(Reply::from_text(Verdict::Reject, &text, false))),
            "[a-c]".prop_map(|text| Opinion::Defer(Reply::from_text(Verdict::Defer, &text, false))),
        ]
    }

    fn addresses(count: usize) -> Vec<Address> {
        (0..count).map(|n| Address::parse(format!("user{n}@example.org").as_bytes()).unwrap()).collect()
    }

    fn naive(verdicts: &[Verdict]) -> Verdict {
        if verdicts.is_empty() || verdicts.contains(&Verdict::Accept) {
            Verdict::Accept
        } else if verdicts.contains(&Verdict::Defer) {
            Verdict::Defer
        } else {
            Verdict::Reject
        }
    }

    proptest! {
        #[test]
        fn a_recipient_rejects_only_if_all_users_reject(users in prop::collection::vec(opinion(), 0..6)) {
            let verdicts: Vec<_> = users.iter().map(Opinion::verdict).collect();
            prop_assert_eq!(of_recipient(&users).verdict(), naive(&verdicts));
        }

        #[test]
        fn a_transaction_follows_the_same_law(recipients in prop::collection::vec(opinion(), 0..6)) {
            let addresses = addresses(recipients.len());
            let pairs: Vec<_> = addresses.iter().zip(&recipients).collect();
            let verdicts: Vec<_> = recipients.iter().map(Opinion::verdict).collect();
            prop_assert_eq!(of_transaction(&pairs, false).verdict(), naive(&verdicts));
        }

        #[test]
        fn the_outcome_does_not_depend_on_the_order(recipients in prop::collection::vec(opinion(), 0..6)) {
            let addresses = addresses(recipients.len());
            let forward: Vec<_> = addresses.iter().zip(&recipients).collect();
            let backward: Vec<_> = addresses.iter().zip(recipients.iter().rev()).collect();
            prop_assert_eq!(of_transaction(&forward, false).verdict(), of_transaction(&backward, false).verdict());
        }

        #[test]
        fn one_more_accept_always_accepts(mut recipients in prop::collection::vec(opinion(), 0..6), at in 0usize..6) {
            recipients.insert(at.min(recipients.len()), Opinion::Accept);
            let addresses = addresses(recipients.len());
            let pairs: Vec<_> = addresses.iter().zip(&recipients).collect();
            prop_assert_eq!(of_transaction(&pairs, false), Opinion::Accept);
        }

        #[test]
        fn what_is_settled_can_not_change(known in prop::collection::vec(opinion(), 0..5), rest in prop::collection::vec(opinion(), 0..5)) {
            let answers = known.iter().map(Some).chain(rest.iter().map(|_| None));
            if is_settled(answers) {
                let all: Vec<_> = known.iter().chain(&rest).collect();
                let addresses = addresses(all.len());
                let pairs: Vec<_> = addresses.iter().zip(all).collect();
                prop_assert_eq!(of_transaction(&pairs, false), Opinion::Accept);
            }
        }
    }

    #[test]
    fn replies_that_agree_are_given_once_and_others_by_recipient() {
        let addresses = addresses(2);
        let no = Opinion::Reject(Reply::from_text(Verdict::Reject, "no", false));
        let never = Opinion::Reject(Reply::from_text(Verdict::Reject, "554 5.6.0 never", false));
        let same = of_transaction(&[(&addresses[0], &no), (&addresses[1], &no)], false);
        assert_eq!(same, no);
        let differ = of_transaction(&[(&addresses[0], &no), (&addresses[1], &never)], false);
        assert_eq!(
            differ.reply().unwrap().to_string(),
            "550-5.7.1 <user0@example.org>: no\n550 5.7.1 <user1@example.org>: never"
        );
    }

    #[test]
    fn a_defer_among_rejects_defers_with_its_own_reply() {
        let addresses = addresses(2);
        let no = Opinion::Reject(Reply::from_text(Verdict::Reject, "no", false));
        let later = Opinion::Defer(Reply::from_text(Verdict::Defer, "later", false));
        assert_eq!(of_transaction(&[(&addresses[0], &no), (&addresses[1], &later)], false), later);
    }
}
