//! The way of a mail: resolve → rules → filter → combine. The only file that names every stage.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tokio::{sync::oneshot, task::JoinSet, time::timeout_at};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;

use crate::{
    address::{Address, AddressError},
    answers::Answers,
    ballot::{Ballot, Site, Told},
    config::{Config, OnError, Recipients, Split, Unknown},
    environment::{self, Subject},
    filter::{Answer, Filters, Question, Room},
    holdings::Inspector,
    logging::{Chain, Quoted},
    metrics::Metrics,
    monitor::Phase,
    recipient::{Decision, FilterSet, Judge, Recipient, Source, Standing},
    record::{self, Record},
    reply::Reply,
    resolver::{self, ldap::ServerState},
    rules::{Mixed, Rules, WaitsForSize},
    ruling::{self, Ruled},
    spool::Message,
    transaction::{Client, Envelope, Interface, RecipientArgument},
    user_log::UserLog,
    verdict::{self, Opinion},
    worker::{InspectError, Monitor},
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
    answers: Answers,
    user_log: UserLog,
    metrics: Arc<Metrics>,
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
    /// Where to; empty: nowhere.
    pub redirect_to: Vec<Address>,
}

impl Outcome {
    fn unchanged(opinion: Opinion) -> Self {
        Self { opinion, changes: Vec::new() }
    }
}

impl Pipeline {
    /// For a worker. `tracker`: gets the tasks that outlive a transaction.
    pub fn new(
        settings: Arc<Config>,
        monitor: &Arc<Monitor>,
        resolver: resolver::Chain,
        tracker: TaskTracker,
        metrics: Arc<Metrics>,
    ) -> Self {
        let filters = Filters::new(Arc::clone(monitor), settings.filter.clone(), metrics.filters.clone());
        let user_log = UserLog::new(Arc::clone(monitor), tracker.clone(), metrics.user_log_failures.clone());
        Self {
            resolver,
            inspector: Inspector::new(Arc::clone(monitor), settings.filter.inspect_ttl.0),
            filters: Arc::new(filters),
            answers: Answers::new(),
            user_log,
            metrics,
            settings,
            tracker,
        }
    }

    /// Whether recipients are put off who would be judged by other filters than the transaction's first.
    pub fn splits(&self) -> bool {
        self.settings.verdicts.split == Split::Always
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
        let mut recipient = self.judge_recipient(envelope, argument, started).await;
        let mut known = recipient.known();
        if self.splits() && matches!(known, None | Some(Opinion::Accept)) {
            Self::split(&mut recipient, first);
            known = recipient.known();
        }
        self.metrics.recipients.of((envelope.interface, known.as_ref().into())).inc();
        // A policy client asks no more about a recipient; what a milter asks about the message is counted at its end.
        let refused = matches!(known, Some(Opinion::Reject(_) | Opinion::Defer(_)));
        if refused || envelope.interface == Interface::Policy {
            self.count_verdicts(envelope, &recipient);
        }
        if let Some(opinion @ (Opinion::Reject(_) | Opinion::Defer(_))) = known {
            record::refused_recipient(envelope, &recipient, &opinion, started);
            self.tell_users(envelope, std::slice::from_ref(&recipient), &opinion);
        }
        recipient
    }

    /// Counts what is known before the message.
    fn count_verdicts(&self, envelope: &Envelope, recipient: &Recipient) {
        let verdicts = &self.metrics.verdicts;
        for judge in recipient.judges() {
            verdicts.of((envelope.interface, judge.said())).inc();
        }
        if let Standing::Refused(decision) = &recipient.standing {
            verdicts.of((envelope.interface, (decision.opinion.verdict().into(), decision.source))).inc();
        }
    }

    /// Counts a transaction, and what was said of its message.
    fn count(&self, envelope: &Envelope, outcome: &Opinion, told: &[Told<'_>]) {
        self.metrics.transactions.of(outcome.verdict().into()).inc();
        for told in told {
            self.metrics.verdicts.of((envelope.interface, (told.said, told.source))).inc();
        }
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
    fn split(recipient: &mut Recipient, first: &mut Option<FilterSet>) {
        let filters = recipient.filters();
        match first {
            None => *first = Some(filters),
            Some(first) if *first == filters => (),
            Some(_) => {
                let opinion = Opinion::Defer(Reply::one_filter_at_a_time());
                recipient.standing =
                    Standing::Refused(Decision { opinion, by: "split".into(), source: Source::Split });
            }
        }
    }

    async fn judge_recipient(
        &self,
        envelope: &Envelope,
        argument: RecipientArgument,
        started: Instant,
    ) -> Recipient {
        let mut recipient = Recipient {
            address: None,
            standing: Standing::Unjudged(String::new()),
            site_waits_for_size: WaitsForSize::default(),
            argument,
        };
        let trusted = self.is_trusted(&envelope.client);
        let address = read_recipient(&recipient.argument, |address| self.resolver.is_our_domain(address));
        recipient.standing = match (trusted, &address) {
            (Some(why), _) => Standing::Unjudged(why.into()),
            (None, Ok(address)) if Self::is_exempt(&self.settings.recipients, address) => {
                Standing::Unjudged("exempt".into())
            }
            (None, Ok(address)) => self.standing(envelope, &mut recipient, address, started).await,
            (None, Err(error)) => {
                let raw = String::from_utf8_lossy(&recipient.argument.raw);
                warn!("{}: recipient \"{}\" is not judged: {error}", envelope.queue_id(), Quoted(&raw));
                self.trouble(None, error.to_string())
            }
        };
        recipient.address = address.ok();
        recipient
    }

    async fn standing(
        &self,
        envelope: &Envelope,
        recipient: &mut Recipient,
        address: &Address,
        started: Instant,
    ) -> Standing {
        let settings = &self.settings.recipients;
        let argument = &recipient.argument;
        let is_local = argument.mailer.as_ref().is_some_and(|mailer| settings.local_mailers.contains(mailer));
        // If the message is no larger than is known: what users say at RCPT TO would come too early.
        let mut site_decides = false;
        if let Some(rules) = self.site_rules().filter(|_| is_local || self.resolver.is_our_domain(address)) {
            let ruled = ruling::decide(rules, Source::Site, envelope, address, envelope.declared_size);
            site_decides = ruled.is_provisional();
            recipient.site_waits_for_size =
                if site_decides { WaitsForSize::ALL } else { ruled.waits_for_size };
            match ruled.decision {
                // It may be the users' turn in the end.
                Some(_) if site_decides => (),
                Some(Decision { opinion: Opinion::Accept, by, .. }) => return Standing::Unjudged(by),
                Some(decision) => return Standing::Refused(decision.in_words_for(envelope)),
                None => (),
            }
        }
        // Sendmail has resolved the address already and says to which mailbox; Postfix repeats it.
        let mailbox = argument.mailbox.as_deref().filter(|_| is_local);
        let mailbox = mailbox.and_then(|mailbox| Address::from_client(mailbox.as_bytes()).ok());
        match self.resolver.resolve(mailbox.as_ref().unwrap_or(address), is_local).await {
            Err(unavailable) => {
                let (address, why) = (address.to_string(), unavailable.to_string());
                warn!("{}: {}: {}", envelope.queue_id(), Quoted(&address), Quoted(&why));
                self.trouble(unavailable.on_error, unavailable.to_string())
            }
            Ok(resolution) if resolution.is_nobody() => match settings.unknown {
                Unknown::Pass => Standing::Unjudged("unknown".into()),
                Unknown::Reject => {
                    let opinion = Opinion::Reject(Reply::unknown_user());
                    let source = Source::UnknownUser;
                    Standing::Refused(Decision { opinion, by: "unknown user".into(), source })
                }
            },
            // Somebody gets the mail who can't be asked: whatever the others say, the recipient accepts.
            Ok(resolver::Resolution { unjudged: Some(why), .. }) => Standing::Unjudged(why),
            Ok(resolution) => {
                let deadline = started + self.settings.filter.recipient_deadline.0;
                let judge = |user| self.judge(envelope, argument, address, user, deadline, site_decides);
                Standing::Judged(match <[_; 1]>::try_from(resolution.users) {
                    Ok([user]) => vec![judge(user).await],
                    // Side by side: the MTA waits for all of them, and its patience is that for one.
                    Err(users) => Box::pin(join_all(users.into_iter().map(judge))).await,
                })
            }
        }
    }

    fn site_rules(&self) -> Option<&Rules> {
        self.settings.recipients.rules.as_ref().map(|rules| &*rules.compiled)
    }

    /// What one user says at RCPT TO; nothing if the site may decide.
    async fn judge(
        &self,
        envelope: &Envelope,
        argument: &RecipientArgument,
        address: &Address,
        resolved: resolver::ResolvedUser,
        deadline: Instant,
        site_decides: bool,
    ) -> Judge {
        let resolver::ResolvedUser { user, address: final_address, extension, directory_rules } = resolved;
        // What takes its time is boxed: this future is moved about for every recipient, and would be some KiB with it.
        let inspected = match self.inspector.remembered(&user).await {
            Some(holdings) => Ok(holdings),
            None => Box::pin(timeout_at(deadline.into(), self.inspector.holdings(&user)))
                .await
                .unwrap_or_else(|_| Err(Arc::new(InspectError::NoAnswer))),
        };
        let (holdings, unknown) = match inspected {
            Ok(holdings) => (holdings, None),
            Err(error) => {
                let why = Chain(&*error).to_string();
                warn!("{}: user {}: {}", envelope.queue_id(), user.name, Quoted(&why));
                let opinion = self.opinion_on_error(None);
                let by = format!("not asked: {why}");
                (Arc::default(), Some(Decision { opinion, by, source: Source::Trouble }))
            }
        };
        let mut judge = Judge {
            user,
            address: final_address,
            extension,
            directory_rules,
            holdings,
            decided: unknown,
            waits_for_size: if site_decides { WaitsForSize::ALL } else { WaitsForSize::default() },
        };
        if site_decides || judge.decided.is_some() {
            return judge;
        }
        if let Some(ruled) = self.ask_rules(envelope, address, &judge) {
            // So it is if the message is no larger than is known: nothing is decided, and no executable is asked.
            if ruled.is_provisional() {
                judge.waits_for_size = WaitsForSize::ALL;
                return judge;
            }
            judge.waits_for_size = ruled.waits_for_size;
            judge.decided.clone_from(&ruled.decision);
        }
        let extension = judge.extension.as_deref();
        if judge.decided.is_none()
            && let Some(filter) = judge.holdings.inspection.filter(Phase::Recipient, extension)
        {
            let ask = self.ask_recipient_filter(envelope, argument, address, &judge, &filter.name, deadline);
            judge.decided = Box::pin(ask).await;
        }
        judge.decided = judge.decided.map(|decision| decision.in_words_for(envelope));
        judge
    }

    /// Asks the lists of the directory, then the user's rules. `None`: there are none.
    fn ask_rules(&self, envelope: &Envelope, address: &Address, judge: &Judge) -> Option<Arc<Ruled>> {
        judge.rules().next()?;
        let question = self.answers.question(&judge.user, envelope, address, &judge.address);
        Some(self.answers.of_rules(question, envelope, || {
            let mut ruled = Ruled { decision: None, waits_for_size: WaitsForSize::default() };
            for (rules, whose) in judge.rules() {
                ruled = ruling::decide(rules, whose, envelope, address, envelope.declared_size);
                if ruled.decision.is_some() {
                    break;
                }
            }
            ruled
        }))
    }

    /// Asks the user's `recipient` executable; `None`: go on to the message filter.
    async fn ask_recipient_filter(
        &self,
        envelope: &Envelope,
        argument: &RecipientArgument,
        address: &Address,
        judge: &Judge,
        filter: &str,
        deadline: Instant,
    ) -> Option<Decision> {
        let extension = judge.extension.as_deref();
        let subject =
            Subject { address: &judge.address, extension, argument, all: vec![address.to_string()] };
        let ask = async {
            let question = Question {
                user: &judge.user,
                phase: Phase::Recipient,
                extension,
                queue_id: envelope.queue_id(),
                variables: environment::variables(
                    envelope,
                    Phase::Recipient,
                    envelope.declared_size,
                    &subject,
                ),
                message: None,
                deadline,
                // Whoever asks the same next may speak it.
                smtputf8: true,
            };
            let answer =
                self.filters.ask(question, &CancellationToken::new()).await.map(|(answer, _)| answer);
            if let Some(answer) = &answer {
                record::error_output(envelope, judge.user.name.as_str(), filter, &answer.error_output);
                self.user_log.recipient_filter(envelope, judge, filter, answer);
            }
            answer
        };
        let question = self.answers.question(&judge.user, envelope, address, &judge.address);
        let answer = self.answers.of_executable(question, filter, ask).await?;
        let goes_on = answer.opinion == Opinion::Accept && !answer.is_final;
        if answer.is_error() {
            warn!(
                "{}: user {}: {}: {}",
                envelope.queue_id(),
                judge.user.name,
                filter,
                Quoted(&answer.status)
            );
        }
        (!goes_on).then(|| Decision {
            opinion: answer.opinion.clone(),
            by: format!("{filter}: {}, {:.3}s", answer.status, answer.elapsed.as_secs_f64()),
            source: Source::RecipientFilter,
        })
    }

    /// Our own trouble with a recipient: accepted, or 4xx where the configuration says so.
    fn trouble(&self, on_error: Option<OnError>, why: String) -> Standing {
        match self.opinion_on_error(on_error) {
            Opinion::Accept => Standing::Unjudged(why),
            opinion => Standing::Refused(Decision { opinion, by: why, source: Source::Trouble }),
        }
    }

    /// What our own trouble with a whole transaction means: nothing, if its mail is not judged anyway.
    pub fn opinion_on_trouble(&self, client: &Client) -> Opinion {
        match self.is_trusted(client) {
            Some(_) => Opinion::Accept,
            None => self.opinion_on_error(None),
        }
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

    /// What is counted.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Each resolver's name for people, and what is known of the servers that it asks.
    pub fn resolvers(&self) -> impl Iterator<Item = (String, Vec<ServerState>)> {
        self.resolver.states()
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
        self.at_once(envelope, recipients, "trouble", self.opinion_on_trouble(&envelope.client))
    }

    fn at_once(&self, envelope: &Envelope, recipients: &[Recipient], why: &str, opinion: Opinion) -> Outcome {
        let size = envelope.declared_size;
        let (verdicts, changes, started) = (None, String::new(), Instant::now());
        let record =
            Record { envelope, recipients, verdicts, opinion: &opinion, why, changes, size, started };
        record.log();
        self.count(envelope, &opinion, &[]);
        recipients.iter().for_each(|recipient| self.count_verdicts(envelope, recipient));
        self.tell_users(envelope, recipients, &opinion);
        Outcome::unchanged(opinion)
    }

    /// The outcome of a message that no filter is asked about because it is larger than `filter.max-message`. Rules
    /// that look at the size are asked; `size` is what is known to have come, in bytes.
    pub fn too_large(&self, envelope: &Envelope, recipients: &[Recipient], size: u64) -> Outcome {
        let site = Site { rules: self.site_rules(), mixed: Mixed::Deliver };
        let mut ballot = Ballot::new(envelope, recipients, size, site);
        ballot.skip_filters();
        let opinion = ballot.outcome();
        let (why, changes, started) = ("larger than max-message", String::new(), Instant::now());
        let (verdicts, size) = (Some(ballot.lines()), Some(size));
        Record { envelope, recipients, verdicts, opinion: &opinion, why, changes, size, started }.log();
        let told = ballot.told();
        self.count(envelope, &opinion, &told);
        self.user_log.verdicts(envelope, &told, &opinion, &[]);
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
        // Of the filter that answered last: kept until it is known whether another is needed.
        let mut room = None;
        loop {
            if ballot.is_settled() {
                tell(self.outcome(envelope, &ballot, mixed));
            }
            drop(room.take());
            tokio::select! {
                answer = running.join_next() => match answer {
                    Some(Ok((n, asked))) => {
                        let answer;
                        (answer, room) = asked.unzip();
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
        let outcome = self.outcome(envelope, &ballot, mixed);
        tell(outcome.clone());
        let verdicts = Some(ballot.lines());
        let changes = outcome.changes.iter().map(Change::shown).collect::<Vec<_>>().join(", ");
        let opinion = &outcome.opinion;
        let size = Some(size);
        Record { envelope, recipients, verdicts, opinion, why: "", changes, size, started }.log();
        let told = ballot.told();
        self.count(envelope, opinion, &told);
        self.user_log.verdicts(envelope, &told, opinion, &outcome.changes);
    }

    /// The answers come in any order, each with the number of its poll.
    fn start_filters(
        self: &Arc<Self>,
        ballot: &Ballot<'_>,
        envelope: &Envelope,
        message: Message,
        deadline: Instant,
        settled: &CancellationToken,
    ) -> JoinSet<(usize, Option<(Answer, Room)>)> {
        let (size, smtputf8) = (message.size(), envelope.smtputf8);
        let message = Arc::new(message);
        let mut running = JoinSet::new();
        for (n, poll) in ballot.polls().iter().enumerate() {
            let (filters, settled, message) =
                (Arc::clone(&self.filters), settled.clone(), Arc::clone(&message));
            let variables = ballot.variables(poll, envelope, size);
            let (user, extension) = (poll.judge.user.clone(), poll.judge.extension.clone());
            let queue_id = envelope.queue_id().to_owned();
            running.spawn(async move {
                let question = Question {
                    user: &user,
                    phase: Phase::Message,
                    extension: extension.as_deref(),
                    queue_id: &queue_id,
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

    fn outcome(&self, envelope: &Envelope, ballot: &Ballot<'_>, mixed: Mixed) -> Outcome {
        let opinion = ballot.outcome().in_words_for(envelope.smtputf8);
        if opinion != Opinion::Accept {
            return Outcome::unchanged(opinion);
        }
        let changes = ballot.refusers().filter_map(|recipient| self.change(recipient, mixed)).collect();
        Outcome { opinion, changes }
    }

    /// What becomes of a refuser's copy.
    fn change(&self, recipient: &Recipient, mixed: Mixed) -> Option<Change> {
        let redirect_to = match recipient.mixed(mixed) {
            Mixed::Deliver => return None,
            Mixed::Drop => Vec::new(),
            Mixed::Redirect => {
                let extension = recipient.redirect_extension();
                let extension = extension.unwrap_or(&self.settings.verdicts.redirect_extension);
                recipient.redirected(&self.settings.recipients.delimiters, extension)?
            }
        };
        Some(Change { raw: recipient.argument.raw.clone(), redirect_to })
    }
}

/// A recipient's address. What MTAs read in ways of their own is what the MTA says that it is, or else what Postfix makes of it:
/// nobody's filter is to be got around by a spelling.
fn read_recipient(
    argument: &RecipientArgument,
    is_ours: impl Fn(&Address) -> bool,
) -> Result<Address, AddressError> {
    let plain = Address::parse(&argument.raw);
    if plain.as_ref().is_ok_and(|address| !address.has_other_readings()) {
        return plain;
    }
    let named = plain.or_else(|_| Address::from_client(&argument.raw));
    let reading = match (&argument.mailbox, &named) {
        (Some(mailbox), _) => Address::from_client(mailbox.as_bytes()).ok(),
        (None, Ok(address)) => {
            // A domain of ours leads to the rest of the way (trivial-rewrite(8)).
            address.without_routing(|address| address.domain().is_none() || is_ours(address))
        }
        (None, Err(_)) => None,
    };
    reading.filter(|reading| reading.domain().is_some()).map_or(named, Ok)
}

impl Change {
    fn shown(&self) -> String {
        let raw = String::from_utf8_lossy(&self.raw);
        let old = raw.trim_start_matches('<').trim_end_matches('>');
        let new: Vec<String> = self.redirect_to.iter().map(|new| format!("<{new}>")).collect();
        match &new[..] {
            [] => format!("<{old}> dropped"),
            new => format!("<{old}> redirected to {}", new.join(" ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_of_ours_leads_to_the_rest_of_the_way() {
        let read = |raw: &str| {
            let argument = RecipientArgument { raw: raw.into(), mailer: None, mailbox: None };
            read_recipient(&argument, |address| address.domain() == Some("ours.example")).unwrap().to_string()
        };
        for routed in [
            "alice%ours.example@ours.example",
            "ours.example!alice@ours.example",
            "alice@ours.example@ours.example",
            "\"alice@ours.example\"@ours.example",
            "ours.example!alice%ours.example@ours.example",
            "@a.example:@[::1]:alice@ours.example",
            "alice%ours.example",
        ] {
            assert_eq!(read(routed), "alice@ours.example", "{routed}");
        }
        // Postfix sends these elsewhere, or refuses to.
        assert_eq!(read("alice%else.example@ours.example"), "alice@else.example");
        assert_eq!(read("alice%ours.example@else.example"), "alice%ours.example@else.example");
        assert_eq!(read("alice@ours.example"), "alice@ours.example");
    }
}
