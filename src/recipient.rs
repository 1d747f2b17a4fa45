//! A recipient of a transaction: who is asked about it, and what is known of their opinions.

use std::sync::Arc;

use crate::{
    address::Address,
    holdings::Holdings,
    monitor::Phase,
    rules::{Mixed, Rules, WaitsForSize},
    transaction::{Envelope, RecipientArgument},
    user::{User, UserName},
    verdict::{self, Opinion, Said},
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
    /// What the site's rules may overrule once the real size is known.
    pub site_waits_for_size: WaitsForSize,
}

/// Who decides about a recipient.
#[derive(Clone, Debug)]
pub enum Standing {
    /// Nobody: accepted, and why.
    Unjudged(String),
    /// Nobody: refused or put off at once.
    Refused(Decision),
    /// Its users.
    Judged(Vec<Judge>),
}

/// An opinion and what it comes from, for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The opinion.
    pub opinion: Opinion,
    /// As `rule 3` or `recipient: exit 77`.
    pub by: String,
    /// The same in one word of a few.
    pub source: Source,
}

/// Where a verdict comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The site's rules.
    Site,
    /// The lists of senders in the user's directory entry.
    Directory,
    /// The user's rules.
    Rules,
    /// The user's executable at RCPT TO.
    RecipientFilter,
    /// The user's executable at the end of the message.
    MessageFilter,
    /// The user has none of these.
    Nothing,
    /// `verdict.split`
    Split,
    /// Nobody has the address.
    UnknownUser,
    /// Our own trouble.
    Trouble,
}

impl Source {
    /// The word used in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Site => "site-rules",
            Self::Directory => "directory",
            Self::Rules => "rules",
            Self::RecipientFilter => "recipient-filter",
            Self::MessageFilter => "message-filter",
            Self::Nothing => "nothing",
            Self::Split => "split",
            Self::UnknownUser => "unknown-user",
            Self::Trouble => "trouble",
        }
    }
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
    /// The user's lists of senders in the directory, asked before the user's rules.
    pub directory_rules: Option<Arc<Rules>>,
    /// What the user has.
    pub holdings: Arc<Holdings>,
    /// What is decided before the message is seen.
    pub decided: Option<Decision>,
    /// What the user's rules may overrule once the real size is known.
    pub waits_for_size: WaitsForSize,
}

/// The message filters that judge a recipient; empty: none does.
pub type FilterSet = Vec<(UserName, String)>;

impl Judge {
    /// The name of the message filter that is to be asked, unless the matter is decided.
    pub fn message_filter(&self) -> Option<&str> {
        if self.decided.is_some() {
            return None;
        }
        let filter = self.holdings.inspection.filter(Phase::Message, self.extension.as_deref());
        filter.map(|filter| filter.name.as_str())
    }

    /// What there is to tell before the message is seen, and where it comes from.
    pub fn said(&self) -> (Said, Source) {
        match (&self.decided, self.message_filter()) {
            (Some(decision), _) => (decision.opinion.verdict().into(), decision.source),
            (None, Some(_)) => (Said::NotAsked, Source::MessageFilter),
            (None, None) => (Said::Accept, Source::Nothing),
        }
    }

    /// The opinion, as far as it is known without the message.
    pub fn known(&self) -> Option<Opinion> {
        let known = match &self.decided {
            Some(decision) => Some(decision.opinion.clone()),
            None => self.message_filter().is_none().then_some(Opinion::Accept),
        };
        known.filter(|opinion| !self.waits_for_size.holds_back(opinion.verdict()))
    }

    /// The rules that are asked for the user, in order: the lists of the directory, then the user's own.
    pub fn rules(&self) -> impl Iterator<Item = (&Rules, Source)> {
        let directory = self.directory_rules.as_deref().map(|rules| (rules, Source::Directory));
        let own = self.holdings.rules.as_ref().map(|rules| (rules, Source::Rules));
        directory.into_iter().chain(own)
    }
}

impl Decision {
    /// The same in words that the client understands.
    pub fn in_words_for(self, envelope: &Envelope) -> Self {
        Self { opinion: self.opinion.in_words_for(envelope.smtputf8), ..self }
    }
}

impl Recipient {
    /// The users who are asked.
    pub fn judges(&self) -> &[Judge] {
        match &self.standing {
            Standing::Unjudged(_) | Standing::Refused(_) => &[],
            Standing::Judged(judges) => judges,
        }
    }

    /// The recipient's opinion, as far as it is known without the message.
    pub fn known(&self) -> Option<Opinion> {
        let known = match &self.standing {
            Standing::Refused(decision) => Some(decision.opinion.clone()),
            Standing::Unjudged(_) | Standing::Judged(_) => combine(self.judges().iter().map(Judge::known)),
        };
        // The site is asked before the users.
        known.filter(|opinion| !self.site_waits_for_size.holds_back(opinion.verdict()))
    }

    /// The filters that judge the message for this recipient.
    pub fn filters(&self) -> FilterSet {
        let filters = self.judges().iter().filter_map(|judge| {
            let filter = judge.message_filter()?;
            Some((judge.user.name.clone(), filter.to_owned()))
        });
        let mut filters: FilterSet = filters.collect();
        filters.sort();
        filters
    }

    /// What is to become of this recipient's copy if it refuses and others accept: the user's wish, but never more
    /// than the site allows. An alias with several users has no wish of its own.
    pub fn mixed(&self, site: Mixed) -> Mixed {
        self.wish(Rules::mixed).map_or(site, |wish| wish.min(site))
    }

    /// The extension to redirect to, if the user wants another than the site's.
    pub fn redirect_extension(&self) -> Option<&str> {
        self.wish(Rules::redirect_extension)
    }

    /// Where a refused copy goes: each user's own address, with this extension in place of the one that it has. An
    /// alias need not exist with an extension, and a mail that is taken and then can't be delivered would bounce.
    /// `None`: without a delimiter there are no such addresses, and the copy must go somewhere.
    pub fn redirected(&self, delimiters: &str, extension: &str) -> Option<Vec<Address>> {
        let delimiter = delimiters.chars().next()?;
        let each = self.judges().iter().map(|judge| {
            // The name of a user may have a delimiter in it.
            let name = match &judge.extension {
                Some(_) => judge.address.split_extension(delimiters).0,
                None => judge.address.local(),
            };
            judge.address.with_local(format!("{name}{delimiter}{extension}"))
        });
        let addresses: Vec<Address> = each.collect();
        // Refused by the site alone: there is nobody to redirect to.
        (!addresses.is_empty()).then_some(addresses)
    }

    fn wish<'a, T>(&'a self, wish: impl Fn(&'a Rules) -> Option<T>) -> Option<T> {
        match self.judges() {
            [judge] => judge.holdings.rules.as_ref().and_then(wish),
            _ => None,
        }
    }
}

/// A recipient's opinion from those of its users: `None` as long as it depends on one that is not known.
pub fn combine(users: impl IntoIterator<Item = Option<Opinion>>) -> Option<Opinion> {
    let (mut refusals, mut all_are_known) = (Vec::new(), true);
    for opinion in users {
        match opinion {
            Some(Opinion::Accept) => return opinion,
            Some(refusal) => refusals.push(refusal),
            None => all_are_known = false,
        }
    }
    all_are_known.then(|| verdict::of_recipient(&refusals))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verdict::Verdict;

    #[test]
    fn an_opinion_is_known_when_nothing_can_change_it() {
        let reject = || Some(Opinion::plain(Verdict::Reject));
        assert_eq!(combine([]), Some(Opinion::Accept));
        assert_eq!(combine([reject(), None]), None);
        assert_eq!(combine([None, Some(Opinion::Accept)]), Some(Opinion::Accept));
        assert_eq!(combine([reject(), reject()]), reject());
    }

    #[test]
    fn a_user_may_wish_for_less_than_the_site_allows_but_not_for_more() {
        let with = |text: &str| {
            let rules = Rules::parse(text, |_| None).unwrap();
            let judge = Judge {
                user: User {
                    name: UserName::try_from("alice".to_owned()).unwrap(),
                    account: crate::user::Account::Passwd,
                    program: None,
                },
                address: Address::parse(b"alice@example.org").unwrap(),
                extension: None,
                directory_rules: None,
                holdings: Arc::new(Holdings { rules: Some(rules), ..Holdings::default() }),
                decided: None,
                waits_for_size: WaitsForSize::default(),
            };
            Recipient {
                argument: RecipientArgument::default(),
                address: None,
                standing: Standing::Judged(vec![judge]),
                site_waits_for_size: WaitsForSize::default(),
            }
        };
        assert_eq!(with("mixed = \"drop\"").mixed(Mixed::Deliver), Mixed::Deliver);
        assert_eq!(with("mixed = \"drop\"").mixed(Mixed::Redirect), Mixed::Redirect);
        assert_eq!(with("mixed = \"deliver\"").mixed(Mixed::Drop), Mixed::Deliver);
        assert_eq!(with("").mixed(Mixed::Drop), Mixed::Drop);
    }
}
