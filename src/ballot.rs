//! Who is asked about a message, for whom, and what they said.
//!
//! A recipient has a *seat* for each of its users. A seat is decided, or waits for a *poll*: one filter of one user,
//! asked once however many seats wait for it.

use crate::{
    address::Address,
    environment::{self, Subject},
    filter::Answer,
    monitor::{Phase, Variable},
    recipient::{Decision, Judge, Recipient, Source, Standing, combine},
    rules::{Mixed, Rules},
    ruling,
    transaction::Envelope,
    verdict::{self, Opinion, Said},
};

/// All seats and polls of a transaction.
pub struct Ballot<'a> {
    recipients: &'a [Recipient],
    polls: Vec<Poll<'a>>,
    seats: Vec<Vec<Seat>>,
    /// Whether a refusal is of use although others accept, so that everybody has to be heard.
    everybody_counts: bool,
    /// Whether the client reads more than ASCII.
    smtputf8: bool,
}

/// One filter of one user.
pub struct Poll<'a> {
    /// The first user and recipient that lead to it.
    pub judge: &'a Judge,
    /// The filter's name.
    pub filter: &'a str,
    recipients: Vec<usize>,
    state: PollState,
}

enum PollState {
    Waiting,
    NotNeeded,
    Answered(Answer),
    GivenUp(Opinion),
    /// Not asked about this message, which counts as accepting.
    Skipped,
}

enum Seat {
    Decided(Decision),
    Poll(usize),
}

/// What rules and settings of the site a ballot follows.
#[derive(Clone, Copy)]
pub struct Site<'a> {
    /// Asked again now that the size is known, if they look at it.
    pub rules: Option<&'a Rules>,
    /// What becomes of refusers' copies at most.
    pub mixed: Mixed,
}

impl<'a> Ballot<'a> {
    /// Finds out who is to be asked. `size`: of the message, in bytes.
    pub fn new(envelope: &Envelope, recipients: &'a [Recipient], size: u64, site: Site<'_>) -> Self {
        let everybody_counts = site.mixed != Mixed::Deliver;
        let smtputf8 = envelope.smtputf8;
        let mut ballot =
            Self { recipients, polls: Vec::new(), seats: Vec::new(), everybody_counts, smtputf8 };
        for (n, recipient) in recipients.iter().enumerate() {
            let by_site = match (site.rules, &recipient.address) {
                (Some(rules), Some(address)) if recipient.site_waits_for_size.any() => {
                    ruling::decide(rules, Source::Site, envelope, address, Some(size)).decision
                }
                _ => None,
            };
            let seats = match (by_site, &recipient.standing) {
                (Some(decision), _) => vec![Seat::Decided(decision)],
                (None, Standing::Refused(decision)) => vec![Seat::Decided(decision.clone())],
                (None, _) => recipient.judges().iter().map(|j| ballot.seat(envelope, j, n, size)).collect(),
            };
            ballot.seats.push(seats);
        }
        ballot
    }

    fn seat(&mut self, envelope: &Envelope, judge: &'a Judge, n: usize, size: u64) -> Seat {
        // Rules that look at the size were asked with what the client declared; now it is known.
        if let (true, Some(address)) = (judge.waits_for_size.any(), &self.recipients[n].address) {
            let decide =
                |(rules, whose)| ruling::decide(rules, whose, envelope, address, Some(size)).decision;
            if let Some(decision) = judge.rules().find_map(decide) {
                return Seat::Decided(decision);
            }
        }
        if let Some(decision) = &judge.decided {
            return Seat::Decided(decision.clone());
        }
        let Some(filter) = judge.message_filter() else {
            return Seat::Decided(Decision {
                opinion: Opinion::Accept,
                by: "no filter".into(),
                source: Source::Nothing,
            });
        };
        let known = self.polls.iter().position(|p| p.judge.user == judge.user && p.filter == filter);
        let index = known.unwrap_or_else(|| {
            self.polls.push(Poll { judge, filter, recipients: Vec::new(), state: PollState::Waiting });
            self.polls.len() - 1
        });
        if self.polls[index].recipients.last() != Some(&n) {
            self.polls[index].recipients.push(n);
        }
        Seat::Poll(index)
    }

    /// The filters to ask.
    pub fn polls(&self) -> &[Poll<'a>] {
        &self.polls
    }

    /// The environment of a poll's filter.
    pub fn variables(&self, poll: &Poll<'_>, envelope: &Envelope, size: u64) -> Vec<(Variable, String)> {
        let addresses = poll.recipients.iter().filter_map(|n| self.recipients[*n].address.as_ref());
        let subject = Subject {
            address: &poll.judge.address,
            extension: poll.judge.extension.as_deref(),
            argument: &self.recipients[poll.recipients[0]].argument,
            all: addresses.map(Address::to_string).collect(),
        };
        environment::variables(envelope, Phase::Message, Some(size), &subject)
    }

    /// Takes an answer; `None`: the filter was not started, since it could not change anything.
    pub fn record(&mut self, poll: usize, answer: Option<Answer>) {
        // What was given up has been counted, and the MTA told.
        if !matches!(self.polls[poll].state, PollState::GivenUp(_)) {
            self.polls[poll].state = answer.map_or(PollState::NotNeeded, PollState::Answered);
        }
    }

    /// Fills in for the filters that have not answered.
    pub fn give_up(&mut self, opinion: &Opinion) {
        for poll in self.polls.iter_mut().filter(|poll| matches!(poll.state, PollState::Waiting)) {
            poll.state = PollState::GivenUp(opinion.clone());
        }
    }

    /// Has no filter asked, since the message is not for filters.
    pub fn skip_filters(&mut self) {
        for poll in &mut self.polls {
            poll.state = PollState::Skipped;
        }
    }

    /// Whether no answer that is still to come can change the outcome.
    pub fn is_settled(&self) -> bool {
        let opinions = self.opinions();
        (!self.everybody_counts && verdict::is_settled(opinions.iter().map(Option::as_ref)))
            || opinions.iter().all(Option::is_some)
    }

    /// The outcome, when it is settled. What is not known then can't change it.
    pub fn outcome(&self) -> Opinion {
        let opinions = self.opinions();
        // A recipient without a readable address is one that nobody could be asked about.
        if self.recipients.iter().any(|recipient| recipient.address.is_none()) {
            return Opinion::Accept;
        }
        let known = self.recipients.iter().zip(&opinions);
        let known: Vec<(&Address, &Opinion)> = known
            .filter_map(|(recipient, opinion)| Some((recipient.address.as_ref()?, opinion.as_ref()?)))
            .collect();
        verdict::of_transaction(&known, self.smtputf8)
    }

    /// The recipients who refuse.
    pub fn refusers(&self) -> impl Iterator<Item = &'a Recipient> {
        let refuses = |opinion: &Option<Opinion>| matches!(opinion, Some(Opinion::Reject(_)));
        self.recipients.iter().zip(self.opinions()).filter(move |(_, o)| refuses(o)).map(|(r, _)| r)
    }

    fn opinions(&self) -> Vec<Option<Opinion>> {
        let of_recipient = |seats: &Vec<Seat>| combine(seats.iter().map(|seat| self.opinion_of_seat(seat)));
        self.seats.iter().map(of_recipient).collect()
    }

    fn opinion_of_seat(&self, seat: &Seat) -> Option<Opinion> {
        match seat {
            Seat::Decided(decision) => Some(decision.opinion.clone()),
            Seat::Poll(n) => match &self.polls[*n].state {
                PollState::Answered(answer) => Some(answer.opinion.clone()),
                PollState::GivenUp(opinion) => Some(opinion.clone()),
                PollState::Skipped => Some(Opinion::Accept),
                PollState::Waiting | PollState::NotNeeded => None,
            },
        }
    }

    /// What each user said, for each thing that was asked once.
    pub fn told(&self) -> Vec<Told<'_>> {
        let mut told = Vec::new();
        for (recipient, seats) in self.recipients.iter().zip(&self.seats) {
            for (n, seat) in seats.iter().enumerate() {
                if let Seat::Decided(decision) = seat {
                    told.push(Told::decided(recipient, recipient.judges().get(n), decision));
                }
            }
        }
        told.extend(self.polls.iter().map(|poll| self.told_by(poll)));
        told
    }

    fn told_by(&self, poll: &'a Poll<'a>) -> Told<'a> {
        let filter = poll.filter;
        let (said, by, opinion, error_output) = match &poll.state {
            PollState::Answered(answer) => {
                let said = if answer.is_error() { Said::Error } else { answer.opinion.verdict().into() };
                let by = format!("{filter}: {}, {:.3}s", answer.status, answer.elapsed.as_secs_f64());
                (said, by, Some(&answer.opinion), answer.error_output.as_str())
            }
            PollState::NotNeeded | PollState::Skipped => (Said::NotAsked, filter.to_owned(), None, ""),
            PollState::GivenUp(opinion) => (Said::Error, format!("{filter}: no answer"), Some(opinion), ""),
            PollState::Waiting => (Said::Error, format!("{filter}: no answer"), None, ""),
        };
        let recipients = poll.recipients.iter().map(|n| &self.recipients[*n]).collect();
        let source = Source::MessageFilter;
        Told {
            judge: Some(poll.judge),
            recipients,
            filter: Some(filter),
            said,
            source,
            by,
            opinion,
            error_output,
        }
    }

    /// For the log: each user's verdict, how it came about, and how long it took.
    pub fn lines(&self) -> Vec<String> {
        self.told().iter().map(Told::line).collect()
    }
}

/// What was said once: by whom, and for which recipients.
pub struct Told<'a> {
    /// The user; `None`: the site.
    pub judge: Option<&'a Judge>,
    /// The recipients.
    pub recipients: Vec<&'a Recipient>,
    /// The filter that was to be asked.
    pub filter: Option<&'a str>,
    /// What.
    pub said: Said,
    /// What it comes from, in one word.
    pub source: Source,
    /// What it comes from.
    pub by: String,
    /// The opinion, if there is one.
    pub opinion: Option<&'a Opinion>,
    /// What the filter wrote to standard error.
    pub error_output: &'a str,
}

impl<'a> Told<'a> {
    /// What was known before the message was seen.
    pub fn decided(recipient: &'a Recipient, judge: Option<&'a Judge>, decision: &'a Decision) -> Self {
        let (said, source) = (decision.opinion.verdict().into(), decision.source);
        let (by, opinion) = (decision.by.clone(), Some(&decision.opinion));
        Self { judge, recipients: vec![recipient], filter: None, said, source, by, opinion, error_output: "" }
    }

    /// What there is to tell of a user who was not, or not yet, asked about the message.
    pub fn before_message(recipient: &'a Recipient, judge: &'a Judge) -> Self {
        let by = match (&judge.decided, judge.message_filter()) {
            (Some(decision), _) => return Self::decided(recipient, Some(judge), decision),
            (None, Some(filter)) => filter.to_owned(),
            (None, None) => "no filter".to_owned(),
        };
        let ((said, source), recipients) = (judge.said(), vec![recipient]);
        Self {
            judge: Some(judge),
            recipients,
            filter: None,
            said,
            source,
            by,
            opinion: None,
            error_output: "",
        }
    }

    /// For the log, as `alice=reject (rule 2)`.
    pub fn line(&self) -> String {
        let user = self.judge.map_or("-", |judge| judge.user.name.as_str());
        format!("{user}={} ({})", self.said.as_str(), self.by)
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use proptest::prelude::*;

    use super::*;
    use crate::{
        address::Sender,
        filter::AnswerKind,
        holdings::Holdings,
        monitor::{FilterFile, Inspection},
        reply::Reply,
        rules::WaitsForSize,
        transaction::{Interface, RecipientArgument},
        user::{Account, User, UserName},
        verdict::Verdict,
    };

    /// What a seat of a recipient is: decided, without a filter, or one of four users' filter.
    #[derive(Clone, Debug)]
    enum Plan {
        Decided(Opinion),
        NoFilter,
        Filter(usize),
    }

    fn opinion() -> impl Strategy<Value = Opinion> {
        prop_oneof![
            Just(Opinion::Accept),
            "[ab]".prop_map(|text| Opinion::Reject(Reply::from_text(Verdict::Reject, &text, false))),
            "[ab]".prop_map(|text| Opinion::Defer(Reply::from_text(Verdict::Defer, &text, false))),
        ]
    }

    fn plans() -> impl Strategy<Value = Vec<Vec<Plan>>> {
        let seat = prop_oneof![
            2 => opinion().prop_map(Plan::Decided),
            1 => Just(Plan::NoFilter),
            5 => (0usize..4).prop_map(Plan::Filter),
        ];
        prop::collection::vec(prop::collection::vec(seat, 1..4), 1..5)
    }

    fn judge(plan: &Plan) -> Judge {
        let file = |name: &str| FilterFile { name: name.into(), problem: None };
        let (user, filters, decided) = match plan {
            Plan::Decided(opinion) => (
                9,
                vec![],
                Some(Decision { opinion: opinion.clone(), by: "rule 1".into(), source: Source::Rules }),
            ),
            Plan::NoFilter => (8, vec![], None),
            Plan::Filter(user) => (*user, vec![file("message")], None),
        };
        let name = UserName::try_from(format!("user{user}")).unwrap();
        let inspection = Inspection { filters, ..Inspection::default() };
        Judge {
            user: User { name, account: Account::Passwd, program: None },
            address: Address::parse(b"user@example.org").unwrap(),
            extension: None,
            directory_rules: None,
            holdings: Arc::new(Holdings { inspection, ..Holdings::default() }),
            decided,
            waits_for_size: WaitsForSize::default(),
        }
    }

    fn recipients(plans: &[Vec<Plan>]) -> Vec<Recipient> {
        let recipient = |(n, seats): (usize, &Vec<Plan>)| Recipient {
            argument: RecipientArgument::default(),
            address: Some(Address::parse(format!("r{n}@example.org").as_bytes()).unwrap()),
            standing: Standing::Judged(seats.iter().map(judge).collect()),
            site_waits_for_size: WaitsForSize::default(),
        };
        plans.iter().enumerate().map(recipient).collect()
    }

    fn envelope() -> Envelope {
        Envelope {
            interface: Interface::Milter,
            queue_id: None,
            client: Arc::default(),
            sender: Sender::Null,
            declared_size: None,
            smtputf8: false,
        }
    }

    fn answer(opinion: &Opinion) -> Answer {
        Answer {
            opinion: opinion.clone(),
            is_final: false,
            status: "exit".into(),
            kind: match opinion.verdict() {
                Verdict::Accept => AnswerKind::Accept,
                Verdict::Reject => AnswerKind::Reject,
                Verdict::Defer => AnswerKind::Defer,
            },
            elapsed: Duration::ZERO,
            output: String::new(),
            error_output: String::new(),
        }
    }

    fn naive(verdicts: impl IntoIterator<Item = Verdict>) -> Verdict {
        let all: Vec<Verdict> = verdicts.into_iter().collect();
        match () {
            () if all.contains(&Verdict::Accept) => Verdict::Accept,
            () if all.contains(&Verdict::Defer) => Verdict::Defer,
            () => Verdict::Reject,
        }
    }

    /// What becomes of the transaction when everybody has answered, too simple to be wrong.
    fn expected(plans: &[Vec<Plan>], answers: &[Opinion]) -> Verdict {
        naive(plans.iter().map(|seats| {
            naive(seats.iter().map(|seat| match seat {
                Plan::Decided(opinion) => opinion.verdict(),
                Plan::NoFilter => Verdict::Accept,
                Plan::Filter(user) => answers[*user].verdict(),
            }))
        }))
    }

    proptest! {
        #[test]
        fn an_early_outcome_is_that_of_all_answers_in_whatever_order_they_come(
            plans in plans(),
            answers in prop::collection::vec(opinion(), 4),
            order in Just([0usize, 1, 2, 3]).prop_shuffle(),
            everybody_counts in any::<bool>(),
        ) {
            let recipients = recipients(&plans);
            let mixed = if everybody_counts { Mixed::Drop } else { Mixed::Deliver };
            let mut ballot = Ballot::new(&envelope(), &recipients, 1, Site { rules: None, mixed });
            let expected = expected(&plans, &answers);
            let polled: Vec<String> = ballot.polls().iter().map(|poll| poll.judge.user.name.to_string()).collect();
            let mut distinct = polled.clone();
            distinct.sort();
            distinct.dedup();
            prop_assert_eq!(distinct.len(), polled.len(), "a filter is asked once");
            let mut settled = false;
            for user in order {
                let Some(poll) = polled.iter().position(|name| *name == format!("user{user}")) else { continue };
                prop_assert!(!settled || ballot.is_settled(), "what is settled stays so");
                settled = ballot.is_settled();
                if settled {
                    prop_assert_eq!(ballot.outcome().verdict(), expected);
                    // Not started any more, since it could not change anything.
                    if !everybody_counts {
                        ballot.record(poll, None);
                        continue;
                    }
                }
                ballot.record(poll, Some(answer(&answers[user])));
            }
            prop_assert!(ballot.is_settled());
            prop_assert_eq!(ballot.outcome().verdict(), expected);
            if everybody_counts {
                let refusers = plans.iter().filter(|seats| super::tests::expected(&[(*seats).clone()], &answers) == Verdict::Reject);
                prop_assert_eq!(ballot.refusers().count(), refusers.count());
            }
        }

        #[test]
        fn our_own_trouble_refuses_nothing_that_somebody_has_not_refused(
            plans in plans(), answers in prop::collection::vec(prop::option::of(opinion()), 4), defers in any::<bool>(),
        ) {
            let recipients = recipients(&plans);
            let site = Site { rules: None, mixed: Mixed::Deliver };
            let mut ballot = Ballot::new(&envelope(), &recipients, 1, site);
            let names: Vec<String> = ballot.polls().iter().map(|poll| poll.judge.user.name.to_string()).collect();
            for (poll, name) in names.iter().enumerate() {
                let user: usize = name.trim_start_matches("user").parse().unwrap();
                if let Some(opinion) = &answers[user] {
                    ballot.record(poll, Some(answer(opinion)));
                }
            }
            let trouble = if defers { Opinion::Defer(Reply::trouble()) } else { Opinion::Accept };
            ballot.give_up(&trouble);
            let answers: Vec<Opinion> = answers.into_iter().map(|a| a.unwrap_or(trouble.clone())).collect();
            prop_assert_eq!(ballot.outcome().verdict(), expected(&plans, &answers));
            ballot.skip_filters();
            let all_accept = vec![Opinion::Accept; 4];
            prop_assert_eq!(ballot.outcome().verdict(), expected(&plans, &all_accept));
        }
    }
}
