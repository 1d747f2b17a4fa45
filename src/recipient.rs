//! A recipient of a transaction: who is asked about it, and what is known of their opinions.

use std::sync::Arc;

use crate::{
    address::Address,
    holdings::Holdings,
    monitor::Phase,
    transaction::RecipientArgument,
    user::User,
    verdict::{self, Opinion},
};

/// A recipient, as far as RCPT TO decides about it.
#[derive(Clone, Debug)]
pub struct Recipient {
    /// As the MTA named it.
    pub argument: RecipientArgument,
    /// The address, if it is one.
    pub address: Option<Address>,
    /// Who decides.
    pub standing: Standing,
}

/// Who decides about a recipient.
#[derive(Clone, Debug)]
pub enum Standing {
    /// Nobody: accepted, and why.
    Unjudged(String),
    /// Nobody: refused or put off at once, and why.
    Refused(Opinion, String),
    /// Its users.
    Judged(Vec<Judge>),
}

/// One user who is asked about one recipient.
#[derive(Clone, Debug)]
pub struct Judge {
    /// Who.
    pub user: User,
    /// The final address, after aliases.
    pub address: Address,
    /// Its extension.
    pub extension: Option<String>,
    /// What the user has.
    pub holdings: Arc<Holdings>,
    /// What is decided before the message is seen, and by what.
    pub decided: Option<(Opinion, String)>,
}

impl Judge {
    /// The name of the message filter that is to be asked, unless the matter is decided.
    pub fn message_filter(&self) -> Option<&str> {
        if self.decided.is_some() {
            return None;
        }
        let filter = self.holdings.inspection.filter(Phase::Message, self.extension.as_deref());
        filter.map(|filter| filter.name.as_str())
    }

    /// Whether the user's rules look at the size, which is known for certain only at the end.
    pub fn waits_for_size(&self) -> bool {
        self.decided.is_none()
            && self.holdings.rules.as_ref().is_some_and(crate::rules::Rules::depends_on_size)
    }

    /// The opinion, as far as it is known without the message.
    pub fn known(&self) -> Option<Opinion> {
        match &self.decided {
            Some((opinion, _)) => Some(opinion.clone()),
            None if self.message_filter().is_none() && !self.waits_for_size() => Some(Opinion::Accept),
            None => None,
        }
    }
}

impl Recipient {
    /// The users who are asked.
    pub fn judges(&self) -> &[Judge] {
        match &self.standing {
            Standing::Unjudged(_) | Standing::Refused(..) => &[],
            Standing::Judged(judges) => judges,
        }
    }

    /// The recipient's opinion, as far as it is known without the message.
    pub fn known(&self) -> Option<Opinion> {
        if let Standing::Refused(opinion, _) = &self.standing {
            return Some(opinion.clone());
        }
        let opinions: Vec<Option<Opinion>> = self.judges().iter().map(Judge::known).collect();
        combine(&opinions)
    }
}

/// A recipient's opinion from those of its users: `None` as long as it depends on one that is not known.
pub fn combine(users: &[Option<Opinion>]) -> Option<Opinion> {
    let known: Vec<&Opinion> = users.iter().flatten().collect();
    if known.len() == users.len() || known.contains(&&Opinion::Accept) {
        Some(verdict::of_recipient(known))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verdict::Verdict;

    #[test]
    fn an_opinion_is_known_when_nothing_can_change_it() {
        let reject = || Some(Opinion::plain(Verdict::Reject));
        assert_eq!(combine(&[]), Some(Opinion::Accept));
        assert_eq!(combine(&[reject(), None]), None);
        assert_eq!(combine(&[Some(Opinion::Accept), None]), Some(Opinion::Accept));
        assert_eq!(combine(&[reject(), reject()]), reject());
    }
}
