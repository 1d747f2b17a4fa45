//! The way of a mail: resolve → rules → filter → combine. The only file that names every stage.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::oneshot, task::JoinSet};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;

use crate::{
    address::Address,
    ballot::{Ballot, Site, Told},
    config::{Config, OnError, Recipients, Split, Unknown},
    environment::{self, Subject},
    filter::{Filters, Question, RecipientAnswers, RecipientQuestion},
    holdings::Inspector,
    logging::{Chain, Quoted},
    monitor::Phase,
    recipient::{Decision, FilterSet, Judge, Recipient, Standing},
    record::{self, Record},
    reply::Reply,
    resolver,
    rules::{Mixed, Rules},
    ruling,
    spool::Message,
    transaction::{Client, Envelope, RecipientArgument},
    user_log::UserLog,
    verdict::{self, Opinion},
    worker::Monitor,
};

/// How long after the deadline a filter that was told to end may take until its answer is no longer waited for.
const DEADLINE_MARGIN: Duration = Duration::from_secs(4);

/// All stages, for both interfaces.
#[derive(Debug)]
pub struct Pipeline {
    settings: Arc<Config>,
    resolver: resolver::Chain,
    inspector: Inspector,
    filters: Arc<Filters>,
    recipient_answers: RecipientAnswers,
    user_log: UserLog,
    /// What must be finished before the worker may leave.
    tracker: TaskTracker,
}

/// What becomes of a transaction.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// For the MTA.
    pub opinion: Opinion,
    /// Recipients whose copy goes elsewhere, if the mail is accepted.
    pub changes: Vec<Change>,
}

/// A recipient whose copy goes elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The argument of RCPT TO, byte for byte.
    pub raw: Vec<u8>,
    /// Where to; `None`: nowhere.
    pub redirect_to: Option<Address>,
}

impl Outcome {
    fn unchanged(opinion: Opinion) -> Self {
        Self { opinion, changes: Vec::new() }
    }
}

impl Pipeline {
    /// For a worker. `tracker`: gets the tasks that outlive a transaction.
    pub fn new(settings: Arc<Config>, monitor: &Arc<Monitor>, tracker: TaskTracker) -> Self {
        Self {
            resolver: resolver::Chain::new(&settings.resolvers, &settings.recipients),
            inspector: Inspector::new(Arc::clone(monitor), settings.filter.inspect_ttl.0),
            filters: Arc::new(Filters::new(Arc::clone(monitor), settings.filter.clone())),
            recipient_answers: RecipientAnswers::new(),
            user_log: UserLog::new(Arc::clone(monitor), tracker.clone()),
            settings,
            tracker,
        }
    }

    /// RCPT TO: finds out who decides about a recipient, and what they say without seeing the message.
    ///
    /// A recipient that is refused or put off ([`Recipient::known`]) is logged, and is no part of the transaction.
    /// `first`: the filters that judge the transaction's first recipient, which this one may become.
    pub async fn recipient(
        &self,
        envelope: &Envelope,
        argument: RecipientArgument,
        first: &mut Option<FilterSet>,
    ) -> Recipient {
        let started = Instant::now();
        let mut recipient = self.judge_recipient(envelope, argument).await;
        if matches!(recipient.known(), None | Some(Opinion::Accept)) {
            self.split(&mut recipient, first);
        }
        if let Some(opinion @ (Opinion::Reject(_) | Opinion::Defer(_))) = recipient.known() {
            record::refused_recipient(envelope, &recipient, &opinion, started);
            self.tell_users(envelope, std::slice::from_ref(&recipient), &opinion);
        }
        recipient
    }

    /// Tells users, in their own logs, what became of verdicts that were known before the message.
    fn tell_users(&self, envelope: &Envelope, recipients: &[Recipient], outcome: &Opinion) {
        for recipient in recipients {
            let told: Vec<_> =
                recipient.judges().iter().map(|judge| Told::before_message(recipient, judge)).collect();
            self.user_log.verdicts(envelope, &told, outcome, &[]);
        }
    }

    /// Puts a recipient off that would be judged by another filter than the transaction's first.
    fn split(&self, recipient: &mut Recipient, first: &mut Option<FilterSet>) {
        if self.settings.verdicts.split == Split::Never {
            return;
        }
        let filters = recipient.filters();
        match first {
            None => *first = Some(filters),
            Some(first) if *first == filters => (),
            Some(_) => {
                let opinion = Opinion::Defer(Reply::one_filter_at_a_time());
                recipient.standing = Standing::Refused(Decision { opinion, by: "split".into() });
            }
        }
    }

    async fn judge_recipient(&self, envelope: &Envelope, argument: RecipientArgument) -> Recipient {
        let mut recipient = Recipient {
            address: None,
            standing: Standing::Unjudged(String::new()),
            site_waits_for_size: false,
            argument,
        };
        match Address::parse(&recipient.argument.raw) {
            Ok(address) => {
                recipient.standing = match self.is_trusted(&envelope.client) {
                    Some(why) => Standing::Unjudged(why.into()),
                    None if Self::is_exempt(&self.settings.recipients, &address) => {
                        Standing::Unjudged("exempt".into())
                    }
                    None => self.standing(envelope, &mut recipient, &address).await,
                };
                recipient.address = Some(address);
            }
            Err(error) => {
                let raw = String::from_utf8_lossy(&recipient.argument.raw);
                warn!("{}: recipient \"{}\" is not judged: {error}", envelope.queue_id(), Quoted(&raw));
                recipient.standing = self.trouble(None, error.to_string());
            }
        }
        recipient
    }

    async fn standing(&self, envelope: &Envelope, recipient: &mut Recipient, address: &Address) -> Standing {
        let settings = &self.settings.recipients;
        let argument = &recipient.argument;
        let is_local = argument.mailer.as_ref().is_some_and(|mailer| settings.local_mailers.contains(mailer));
        if let Some(rules) = self.site_rules().filter(|_| is_local || self.resolver.is_our_domain(address)) {
            recipient.site_waits_for_size = rules.depends_on_size();
            match ruling::decide(rules, "site ", envelope, address, envelope.declared_size) {
                Some(Decision { opinion: Opinion::Accept, by }) => return Standing::Unjudged(by),
                Some(decision) => return Standing::Refused(decision),
                None => (),
            }
        }
        // Sendmail has resolved the address already and says to which mailbox; Postfix repeats it.
        let mailbox = argument.mailbox.as_deref().filter(|_| is_local);
        let mailbox = mailbox.and_then(|mailbox| Address::parse(mailbox.as_bytes()).ok());
        match self.resolver.resolve(mailbox.as_ref().unwrap_or(address), is_local).await {
            Err(unavailable) => {
                warn!("{}: {address}: {unavailable}", envelope.queue_id());
                self.trouble(unavailable.on_error, unavailable.to_string())
            }
            Ok(resolution) if resolution.is_nobody() => match settings.unknown {
                Unknown::Pass => Standing::Unjudged("unknown".into()),
                Unknown::Reject => {
                    let opinion = Opinion::Reject(Reply::unknown_user());
                    Standing::Refused(Decision { opinion, by: "unknown user".into() })
                }
            },
            // Somebody gets the mail who can't be asked: whatever the others say, the recipient accepts.
            Ok(resolver::Resolution { unjudged: Some(why), .. }) => Standing::Unjudged(why),
            Ok(resolution) => {
                let mut judges = Vec::with_capacity(resolution.users.len());
                for user in resolution.users {
                    judges.push(self.judge(envelope, argument, address, user).await);
                }
                Standing::Judged(judges)
            }
        }
    }

    fn site_rules(&self) -> Option<&Rules> {
        self.settings.recipients.rules.as_ref().map(|rules| &*rules.compiled)
    }

    /// What one user says at RCPT TO.
    async fn judge(
        &self,
        envelope: &Envelope,
        argument: &RecipientArgument,
        address: &Address,
        resolved: resolver::ResolvedUser,
    ) -> Judge {
        let resolver::ResolvedUser { user, address: final_address, extension, directory_rules } = resolved;
        let holdings = match self.inspector.holdings(&user).await {
            Ok(holdings) => holdings,
            Err(error) => {
                let why = Chain(&*error).to_string();
                warn!("{}: user {}: {}", envelope.queue_id(), user.name, Quoted(&why));
                let opinion = self.opinion_on_error(None);
                let decided = Some(Decision { opinion, by: format!("not asked: {why}") });
                let holdings = Arc::default();
                return Judge { user, address: final_address, extension, directory_rules, holdings, decided };
            }
        };
        let size = envelope.declared_size;
        let by_directory =
            directory_rules.as_ref().and_then(|r| ruling::decide(r, "directory ", envelope, address, size));
        let rules = holdings.rules.as_ref();
        let decided =
            by_directory.or_else(|| rules.and_then(|r| ruling::decide(r, "", envelope, address, size)));
        let mut judge = Judge { user, address: final_address, extension, directory_rules, holdings, decided };
        if judge.decided.is_none() {
            judge.decided = self.ask_recipient_filter(envelope, argument, &judge).await;
        }
        judge
    }

    /// Asks the user's `recipient` executable, if there is one; `None`: go on to the message filter.
    async fn ask_recipient_filter(
        &self,
        envelope: &Envelope,
        argument: &RecipientArgument,
        judge: &Judge,
    ) -> Option<Decision> {
        let extension = judge.extension.as_deref();
        let filter = judge.holdings.inspection.filter(Phase::Recipient, extension)?;
        let question = RecipientQuestion::new(&judge.user, &filter.name, envelope, &judge.address);
        let subject =
            Subject { address: &judge.address, extension, argument, all: vec![judge.address.to_string()] };
        let ask = async {
            let question = Question {
                user: &judge.user,
                phase: Phase::Recipient,
                extension,
                variables: environment::variables(
                    envelope,
                    Phase::Recipient,
                    envelope.declared_size,
                    &subject,
                ),
                message: None,
                deadline: Instant::now() + self.settings.filter.recipient_deadline.0,
                smtputf8: envelope.smtputf8,
            };
            let answer = self.filters.ask(question, &CancellationToken::new()).await;
            if let Some(answer) = &answer {
                record::error_output(envelope, judge.user.name.as_str(), &filter.name, &answer.error_output);
                self.user_log.recipient_filter(envelope, judge, &filter.name, answer);
            }
            answer
        };
        let answer = self.recipient_answers.get_or_ask(question, ask).await?;
        let goes_on = answer.opinion == Opinion::Accept && !answer.is_final;
        if answer.is_error {
            warn!(
                "{}: user {}: {}: {}",
                envelope.queue_id(),
                judge.user.name,
                filter.name,
                Quoted(&answer.status)
            );
        }
        (!goes_on).then(|| Decision {
            opinion: answer.opinion.clone(),
            by: format!("{}: {}, {:.3}s", filter.name, answer.status, answer.elapsed.as_secs_f64()),
        })
    }

    /// Our own trouble with a recipient: accepted, or 4xx where the configuration says so.
    fn trouble(&self, on_error: Option<OnError>, why: String) -> Standing {
        match self.opinion_on_error(on_error) {
            Opinion::Accept => Standing::Unjudged(why),
            opinion => Standing::Refused(Decision { opinion, by: why }),
        }
    }

    /// What our own trouble with a whole transaction means.
    pub fn opinion_on_trouble(&self) -> Opinion {
        self.opinion_on_error(None)
    }

    fn opinion_on_error(&self, on_error: Option<OnError>) -> Opinion {
        match on_error.unwrap_or(self.settings.filter.on_error) {
            OnError::Accept => Opinion::Accept,
            OnError::Defer => Opinion::Defer(Reply::trouble()),
        }
    }

    /// Why mail of this client is not judged, if it is not: a refused submission would be bounced by our own MTA.
    fn is_trusted(&self, client: &Client) -> Option<&'static str> {
        let settings = &self.settings.recipients;
        let from_network =
            |address| settings.trusted_networks.iter().any(|network| network.contains(address));
        if client.is_local {
            Some("local submission")
        } else if client.sasl.is_some() && !settings.judge_authenticated {
            Some("authenticated client")
        } else if client.address.is_some_and(from_network) {
            Some("trusted network")
        } else {
            None
        }
    }

    /// Whether an address is always accepted.
    pub fn is_exempt(settings: &Recipients, address: &Address) -> bool {
        let (base, _) = address.split_extension(&settings.delimiters);
        settings.exempt.iter().any(|exempt| {
            if exempt.contains('@') {
                address.key() == exempt.to_lowercase()
            } else {
                exempt.eq_ignore_ascii_case(address.local()) || exempt.eq_ignore_ascii_case(base)
            }
        })
    }

    /// Re-reads what administrators have changed. Blocks; to be called about once a second.
    pub fn refresh(&self) {
        self.resolver.refresh();
    }

    /// Whether the message is needed to decide: as soon as somebody accepts, it is not, unless refusers' copies go
    /// elsewhere.
    pub fn needs_message(&self, recipients: &[Recipient], can_change_recipients: bool) -> bool {
        let known: Vec<_> = recipients.iter().map(Recipient::known).collect();
        let everybody_counts = self.mixed(can_change_recipients) != Mixed::Deliver;
        known.iter().any(Option::is_none)
            && (everybody_counts || !verdict::is_settled(known.iter().map(Option::as_ref)))
    }

    /// What may become of refusers' copies: with an MTA that lets nobody change recipients, they are delivered.
    fn mixed(&self, can_change_recipients: bool) -> Mixed {
        if can_change_recipients { self.settings.verdicts.mixed } else { Mixed::Deliver }
    }

    /// The outcome of a transaction whose message need not be seen.
    pub fn without_message(&self, envelope: &Envelope, recipients: &[Recipient], why: &str) -> Outcome {
        self.at_once(envelope, recipients, why, Opinion::Accept)
    }

    /// The outcome of a transaction that our own trouble keeps from being judged.
    pub fn on_trouble(&self, envelope: &Envelope, recipients: &[Recipient], why: &str) -> Outcome {
        warn!("{}: not judged: {}", envelope.queue_id(), Quoted(why));
        self.at_once(envelope, recipients, "trouble", self.opinion_on_error(None))
    }

    fn at_once(&self, envelope: &Envelope, recipients: &[Recipient], why: &str, opinion: Opinion) -> Outcome {
        let size = envelope.declared_size;
        let (verdicts, changes, started) = (None, String::new(), Instant::now());
        let record =
            Record { envelope, recipients, verdicts, opinion: &opinion, why, changes, size, started };
        record.log();
        self.tell_users(envelope, recipients, &opinion);
        Outcome::unchanged(opinion)
    }

    /// The outcome of a message that no filter is asked about because it is larger than `filter.max-message`. Rules
    /// that look at the size are asked; `size` is what is known to have come, in bytes.
    pub fn too_large(&self, envelope: &Envelope, recipients: &[Recipient], size: u64) -> Outcome {
        let site = Site { rules: self.site_rules(), mixed: Mixed::Deliver };
        let mut ballot = Ballot::new(envelope, recipients, size, site);
        ballot.give_up(&Opinion::Accept);
        let opinion = ballot.outcome();
        let (why, changes, started) = ("larger than max-message", String::new(), Instant::now());
        let (verdicts, size) = (Some(ballot.lines()), Some(size));
        Record { envelope, recipients, verdicts, opinion: &opinion, why, changes, size, started }.log();
        self.user_log.verdicts(envelope, &ballot.told(), &opinion, &[]);
        Outcome::unchanged(opinion)
    }

    /// End of message: asks the filters, side by side, and tells the outcome as soon as it is settled.
    ///
    /// Filters that run on then are let run; the line in the log waits for them.
    pub fn message(
        self: &Arc<Self>,
        envelope: Envelope,
        recipients: Vec<Recipient>,
        message: Message,
        can_change_recipients: bool,
    ) -> oneshot::Receiver<Outcome> {
        let (sender, receiver) = oneshot::channel();
        let pipeline = Arc::clone(self);
        let mixed = self.mixed(can_change_recipients);
        self.tracker
            .spawn(async move { pipeline.ask_all(&envelope, &recipients, message, mixed, sender).await });
        receiver
    }

    async fn ask_all(
        self: Arc<Self>,
        envelope: &Envelope,
        recipients: &[Recipient],
        message: Message,
        mixed: Mixed,
        sender: oneshot::Sender<Outcome>,
    ) {
        let started = Instant::now();
        let deadline = started + self.settings.filter.deadline.0;
        let size = message.size();
        let mut ballot = Ballot::new(envelope, recipients, size, Site { rules: self.site_rules(), mixed });
        let settled = CancellationToken::new();
        let mut running = self.start_filters(&ballot, envelope, message, deadline, &settled);
        let mut sender = Some(sender);
        let mut tell = |outcome: Outcome| {
            if let Some(sender) = sender.take() {
                // An MTA that has gone away does not want to know.
                let _ = sender.send(outcome);
            }
            settled.cancel();
        };
        let give_up = tokio::time::sleep_until((deadline + DEADLINE_MARGIN).into());
        tokio::pin!(give_up);
        let mut is_given_up = false;
        loop {
            if ballot.is_settled() {
                tell(self.outcome(&ballot, mixed));
            }
            tokio::select! {
                answer = running.join_next() => match answer {
                    Some(Ok((n, answer))) => {
                        if let Some(answer) = &answer {
                            let poll = &ballot.polls()[n];
                            let user = poll.judge.user.name.as_str();
                            record::error_output(envelope, user, poll.filter, &answer.error_output);
                        }
                        ballot.record(n, answer);
                    }
                    Some(Err(error)) => warn!("{}: filter task: {error}", envelope.queue_id()),
                    None => break,
                },
                () = &mut give_up, if !is_given_up => {
                    is_given_up = true;
                    ballot.give_up(&self.opinion_on_error(None));
                }
            }
        }
        // A task that panicked has left no answer.
        ballot.give_up(&self.opinion_on_error(None));
        let outcome = self.outcome(&ballot, mixed);
        tell(outcome.clone());
        let verdicts = Some(ballot.lines());
        let changes = outcome.changes.iter().map(Change::shown).collect::<Vec<_>>().join(", ");
        let opinion = &outcome.opinion;
        let size = Some(size);
        Record { envelope, recipients, verdicts, opinion, why: "", changes, size, started }.log();
        self.user_log.verdicts(envelope, &ballot.told(), opinion, &outcome.changes);
    }

    /// The answers come in any order, each with the number of its poll.
    fn start_filters(
        self: &Arc<Self>,
        ballot: &Ballot<'_>,
        envelope: &Envelope,
        message: Message,
        deadline: Instant,
        settled: &CancellationToken,
    ) -> JoinSet<(usize, Option<crate::filter::Answer>)> {
        let (size, smtputf8) = (message.size(), envelope.smtputf8);
        let message = Arc::new(message);
        let mut running = JoinSet::new();
        for (n, poll) in ballot.polls().iter().enumerate() {
            let (filters, settled, message) =
                (Arc::clone(&self.filters), settled.clone(), Arc::clone(&message));
            let variables = ballot.variables(poll, envelope, size);
            let (user, extension) = (poll.judge.user.clone(), poll.judge.extension.clone());
            running.spawn(async move {
                let question = Question {
                    user: &user,
                    phase: Phase::Message,
                    extension: extension.as_deref(),
                    variables,
                    message: Some(&message),
                    deadline,
                    smtputf8,
                };
                (n, filters.ask(question, &settled).await)
            });
        }
        running
    }

    fn outcome(&self, ballot: &Ballot<'_>, mixed: Mixed) -> Outcome {
        let opinion = ballot.outcome();
        if opinion != Opinion::Accept {
            return Outcome::unchanged(opinion);
        }
        let changes = ballot.refusers().filter_map(|recipient| self.change(recipient, mixed)).collect();
        Outcome { opinion, changes }
    }

    /// What becomes of a refuser's copy.
    fn change(&self, recipient: &Recipient, mixed: Mixed) -> Option<Change> {
        let raw = recipient.argument.raw.clone();
        match recipient.mixed(mixed) {
            Mixed::Deliver => None,
            Mixed::Drop => Some(Change { raw, redirect_to: None }),
            Mixed::Redirect => {
                let address = recipient.mailbox()?;
                let delimiters = &self.settings.recipients.delimiters;
                let extension = recipient.redirect_extension();
                let extension = extension.unwrap_or(&self.settings.verdicts.redirect_extension);
                let (base, _) = address.split_extension(delimiters);
                // Without a delimiter there is no such address, and the mail must go somewhere.
                let local = format!("{base}{}{extension}", delimiters.chars().next()?);
                Some(Change { raw, redirect_to: Some(address.with_local(local)) })
            }
        }
    }
}

impl Change {
    fn shown(&self) -> String {
        let raw = String::from_utf8_lossy(&self.raw);
        let old = raw.trim_start_matches('<').trim_end_matches('>');
        match &self.redirect_to {
            Some(new) => format!("<{old}> redirected to <{new}>"),
            None => format!("<{old}> dropped"),
        }
    }
}
