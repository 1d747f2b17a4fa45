//! The way of a mail: resolve → rules → filter → combine. The only file that names every stage.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::oneshot, task::JoinSet};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use crate::{
    address::Address,
    config::{Config, OnError, Unknown},
    environment::{self, Subject},
    filter::{Answer, Filters, Question},
    holdings::Inspector,
    logging::{Chain, Quoted},
    monitor::Phase,
    recipient::{Judge, Recipient, Standing, combine},
    reply::Reply,
    resolver,
    rules::{self, Action},
    spool::Message,
    transaction::{Client, Envelope, RecipientArgument},
    verdict::{self, Opinion, Verdict},
    worker::Monitor,
};

/// How long after the deadline a filter that was told to end may take until its answer is no longer waited for.
const DEADLINE_MARGIN: Duration = Duration::from_secs(4);

/// Longest field of a line in the log, in characters: a transaction can have thousands of recipients.
const MAX_FIELD_LENGTH: usize = 8192;

/// Most lines logged of one filter's standard error.
const MAX_ERROR_LINES: usize = 20;

/// All stages, for both interfaces.
#[derive(Debug)]
pub struct Pipeline {
    settings: Arc<Config>,
    resolver: resolver::Chain,
    inspector: Inspector,
    filters: Arc<Filters>,
    /// What must be finished before the worker may leave.
    tracker: TaskTracker,
}

/// What becomes of a transaction.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// For the MTA.
    pub opinion: Opinion,
}

impl Pipeline {
    /// For a worker. `tracker`: gets the tasks that outlive a transaction.
    pub fn new(settings: Arc<Config>, monitor: &Arc<Monitor>, tracker: TaskTracker) -> Self {
        Self {
            resolver: resolver::Chain::new(&settings.resolvers, &settings.recipients),
            inspector: Inspector::new(Arc::clone(monitor), settings.filter.inspect_ttl.0),
            filters: Arc::new(Filters::new(Arc::clone(monitor), settings.filter.clone())),
            settings,
            tracker,
        }
    }

    /// RCPT TO: finds out who decides about a recipient, and what they say without seeing the message.
    ///
    /// A recipient that is refused or put off ([`Recipient::known`]) is logged, and is no part of the transaction.
    pub async fn recipient(&self, envelope: &Envelope, argument: RecipientArgument) -> Recipient {
        let started = Instant::now();
        let (address, standing) = self.standing(envelope, &argument).await;
        let recipient = Recipient { argument, address, standing };
        if let Some(opinion @ (Opinion::Reject(_) | Opinion::Defer(_))) = recipient.known() {
            log_refused_recipient(envelope, &recipient, &opinion, started);
        }
        recipient
    }

    async fn standing(
        &self,
        envelope: &Envelope,
        argument: &RecipientArgument,
    ) -> (Option<Address>, Standing) {
        let address = match Address::parse(&argument.raw) {
            Ok(address) => address,
            Err(error) => {
                let raw = String::from_utf8_lossy(&argument.raw);
                warn!("{}: recipient \"{}\" is not judged: {error}", envelope.queue_id(), Quoted(&raw));
                return (None, self.trouble(None, error.to_string()));
            }
        };
        let standing = match self.is_trusted(&envelope.client) {
            Some(why) => Standing::Unjudged(why.into()),
            None if self.is_exempt(&address) => Standing::Unjudged("exempt".into()),
            None => self.standing_of_address(envelope, argument, &address).await,
        };
        (Some(address), standing)
    }

    async fn standing_of_address(
        &self,
        envelope: &Envelope,
        argument: &RecipientArgument,
        address: &Address,
    ) -> Standing {
        let settings = &self.settings.recipients;
        let is_local = argument.mailer.as_ref().is_some_and(|mailer| settings.local_mailers.contains(mailer));
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
                    Standing::Refused(Opinion::Reject(Reply::unknown_user()), "unknown user".into())
                }
            },
            // Somebody gets the mail who can't be asked: whatever the others say, the recipient accepts.
            Ok(resolver::Resolution { unjudged: Some(why), .. }) => Standing::Unjudged(why),
            Ok(resolution) => {
                let mut judges = Vec::with_capacity(resolution.users.len());
                for user in resolution.users {
                    judges.push(self.judge(envelope, address, user).await);
                }
                Standing::Judged(judges)
            }
        }
    }

    /// What one user says at RCPT TO.
    async fn judge(&self, envelope: &Envelope, address: &Address, resolved: resolver::ResolvedUser) -> Judge {
        let resolver::ResolvedUser { user, address: final_address, extension } = resolved;
        let (holdings, decided) = match self.inspector.holdings(&user).await {
            Ok(holdings) => {
                let decided = holdings
                    .rules
                    .as_ref()
                    .and_then(|rules| rule(rules, envelope, address, envelope.declared_size));
                (holdings, decided)
            }
            Err(error) => {
                let why = Chain(&*error).to_string();
                warn!("{}: user {}: {}", envelope.queue_id(), user.name, Quoted(&why));
                (Arc::default(), Some((self.opinion_on_error(None), format!("not asked: {why}"))))
            }
        };
        Judge { user, address: final_address, extension, holdings, decided }
    }

    /// Our own trouble with a recipient: accepted, or 4xx where the configuration says so.
    fn trouble(&self, on_error: Option<OnError>, why: String) -> Standing {
        match self.opinion_on_error(on_error) {
            Opinion::Accept => Standing::Unjudged(why),
            opinion => Standing::Refused(opinion, why),
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

    fn is_exempt(&self, address: &Address) -> bool {
        let (base, _) = address.split_extension(&self.settings.recipients.delimiters);
        self.settings.recipients.exempt.iter().any(|exempt| {
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

    /// Whether the message is needed to decide: as soon as somebody accepts, it is not.
    pub fn needs_message(recipients: &[Recipient]) -> bool {
        let known: Vec<_> = recipients.iter().map(Recipient::known).collect();
        !verdict::is_settled(known.iter().map(Option::as_ref)) && known.iter().any(Option::is_none)
    }

    /// The outcome of a transaction whose message need not be seen.
    pub fn without_message(&self, envelope: &Envelope, recipients: &[Recipient], why: &str) -> Outcome {
        let record = Record { opinion: Opinion::Accept, users: Vec::new(), size: envelope.declared_size };
        record.log(envelope, recipients, why, Instant::now());
        Outcome { opinion: Opinion::Accept }
    }

    /// The outcome of a transaction that our own trouble keeps from being judged.
    pub fn on_trouble(&self, envelope: &Envelope, recipients: &[Recipient], why: &str) -> Outcome {
        let opinion = self.opinion_on_error(None);
        warn!("{}: not judged: {}", envelope.queue_id(), Quoted(why));
        let record = Record { opinion: opinion.clone(), users: Vec::new(), size: envelope.declared_size };
        record.log(envelope, recipients, "trouble", Instant::now());
        Outcome { opinion }
    }

    /// End of message: asks the filters, side by side, and tells the outcome as soon as it is settled.
    ///
    /// Filters that run on then are let run; the line in the log waits for them.
    pub fn message(
        self: &Arc<Self>,
        envelope: Envelope,
        recipients: Vec<Recipient>,
        message: Message,
    ) -> oneshot::Receiver<Outcome> {
        let (sender, receiver) = oneshot::channel();
        let pipeline = Arc::clone(self);
        self.tracker.spawn(async move { pipeline.ask_all(envelope, recipients, message, sender).await });
        receiver
    }

    async fn ask_all(
        self: Arc<Self>,
        envelope: Envelope,
        recipients: Vec<Recipient>,
        message: Message,
        outcome: oneshot::Sender<Outcome>,
    ) {
        let started = Instant::now();
        let deadline = started + self.settings.filter.deadline.0;
        let size = message.size();
        let mut ballot = Ballot::new(&envelope, &recipients, size);
        let settled = CancellationToken::new();
        let message = Arc::new(message);
        let mut running = JoinSet::new();
        for (n, poll) in ballot.polls.iter().enumerate() {
            let (pipeline, settled, message) = (Arc::clone(&self), settled.clone(), Arc::clone(&message));
            let variables = poll.variables(&envelope, &recipients, size);
            let (user, extension) = (poll.judge.user.clone(), poll.judge.extension.clone());
            let smtputf8 = envelope.smtputf8;
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
                (n, pipeline.filters.ask(question, &settled).await)
            });
        }
        drop(message);
        let mut outcome = Some(outcome);
        let give_up = tokio::time::sleep_until((deadline + DEADLINE_MARGIN).into());
        tokio::pin!(give_up);
        loop {
            if outcome.is_some() && ballot.is_settled(&recipients) {
                settled.cancel();
                tell(&mut outcome, ballot.outcome(&recipients));
            }
            tokio::select! {
                answer = running.join_next() => match answer {
                    Some(Ok((n, answer))) => {
                        if let Some(answer) = &answer {
                            log_error_output(&envelope, &ballot.polls[n], answer);
                        }
                        ballot.record(n, answer);
                    }
                    Some(Err(error)) => warn!("{}: filter task: {error}", envelope.queue_id()),
                    None => break,
                },
                () = &mut give_up, if outcome.is_some() => {
                    ballot.give_up(self.opinion_on_error(None));
                    tell(&mut outcome, ballot.outcome(&recipients));
                }
            }
        }
        // A task that panicked has left no answer.
        ballot.give_up(self.opinion_on_error(None));
        let opinion = ballot.outcome(&recipients);
        tell(&mut outcome, opinion.clone());
        let record = Record { opinion, users: ballot.lines(&recipients), size: Some(size) };
        record.log(&envelope, &recipients, "", started);
    }
}

fn tell(outcome: &mut Option<oneshot::Sender<Outcome>>, opinion: Opinion) {
    if let Some(sender) = outcome.take() {
        // An MTA that has gone away does not want to know.
        let _ = sender.send(Outcome { opinion });
    }
}

/// What a user's rules say, if they decide.
fn rule(
    rules: &rules::Rules,
    envelope: &Envelope,
    recipient: &Address,
    size: Option<u64>,
) -> Option<(Opinion, String)> {
    let client = &envelope.client;
    let ruling = rules.judge(&rules::Question {
        sender: &envelope.sender,
        recipient,
        client_address: client.address,
        client_name: client.name.as_deref(),
        helo: client.helo.as_deref(),
        size,
        today: jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).date(),
    });
    let by = ruling.rule.map_or("default rule".to_owned(), |n| format!("rule {n}"));
    let reply = |verdict, default: Reply| {
        ruling.reply.map_or(default, |text| Reply::from_text(verdict, text, envelope.smtputf8))
    };
    let opinion = match ruling.action {
        Action::Filter => return None,
        Action::Accept => Opinion::Accept,
        Action::Reject => Opinion::Reject(reply(Verdict::Reject, Reply::default_reject())),
        Action::Defer => Opinion::Defer(reply(Verdict::Defer, Reply::default_defer())),
    };
    Some((opinion, by))
}

/// Who is asked about a message, for whom, and what they said.
struct Ballot {
    polls: Vec<Poll>,
    /// Per recipient and judge: what is decided, or which poll decides.
    seats: Vec<Vec<Seat>>,
}

/// One filter of one user, asked once however many recipients lead to it.
struct Poll {
    judge: Judge,
    filter: String,
    /// Indexes of recipients.
    recipients: Vec<usize>,
    state: PollState,
}

enum PollState {
    Waiting,
    NotNeeded,
    Answered(Answer),
    GivenUp(Opinion),
}

enum Seat {
    Decided(Opinion, String),
    Poll(usize),
}

impl Ballot {
    fn new(envelope: &Envelope, recipients: &[Recipient], size: u64) -> Self {
        let mut ballot = Self { polls: Vec::new(), seats: Vec::with_capacity(recipients.len()) };
        for (n, recipient) in recipients.iter().enumerate() {
            let seats =
                recipient.judges().iter().map(|judge| ballot.seat(envelope, recipient, judge, n, size));
            let seats = seats.collect();
            ballot.seats.push(seats);
        }
        ballot
    }

    fn seat(
        &mut self,
        envelope: &Envelope,
        recipient: &Recipient,
        judge: &Judge,
        n: usize,
        size: u64,
    ) -> Seat {
        if let Some((opinion, by)) = &judge.decided {
            return Seat::Decided(opinion.clone(), by.clone());
        }
        // Rules that look at the size were asked with what the client declared; now it is known.
        if let (true, Some(rules), Some(address)) =
            (judge.waits_for_size(), &judge.holdings.rules, &recipient.address)
            && let Some((opinion, by)) = rule(rules, envelope, address, Some(size))
        {
            return Seat::Decided(opinion, by);
        }
        let Some(filter) = judge.message_filter() else {
            return Seat::Decided(Opinion::Accept, "no filter".into());
        };
        let known = self.polls.iter().position(|p| p.judge.user == judge.user && p.filter == filter);
        let index = known.unwrap_or_else(|| {
            self.polls.push(Poll {
                judge: judge.clone(),
                filter: filter.to_owned(),
                recipients: Vec::new(),
                state: PollState::Waiting,
            });
            self.polls.len() - 1
        });
        if self.polls[index].recipients.last() != Some(&n) {
            self.polls[index].recipients.push(n);
        }
        Seat::Poll(index)
    }

    fn record(&mut self, poll: usize, answer: Option<Answer>) {
        self.polls[poll].state = answer.map_or(PollState::NotNeeded, PollState::Answered);
    }

    fn give_up(&mut self, opinion: Opinion) {
        for poll in self.polls.iter_mut().filter(|poll| matches!(poll.state, PollState::Waiting)) {
            poll.state = PollState::GivenUp(opinion.clone());
        }
    }

    fn opinion_of_seat(&self, seat: &Seat) -> Option<Opinion> {
        match seat {
            Seat::Decided(opinion, _) => Some(opinion.clone()),
            Seat::Poll(n) => match &self.polls[*n].state {
                PollState::Answered(answer) => Some(answer.opinion.clone()),
                PollState::GivenUp(opinion) => Some(opinion.clone()),
                PollState::Waiting | PollState::NotNeeded => None,
            },
        }
    }

    fn opinions(&self) -> Vec<Option<Opinion>> {
        let of_recipient = |seats: &Vec<Seat>| {
            let opinions: Vec<_> = seats.iter().map(|seat| self.opinion_of_seat(seat)).collect();
            combine(&opinions)
        };
        self.seats.iter().map(of_recipient).collect()
    }

    fn is_settled(&self, _recipients: &[Recipient]) -> bool {
        let opinions = self.opinions();
        verdict::is_settled(opinions.iter().map(Option::as_ref)) || opinions.iter().all(Option::is_some)
    }

    /// The outcome, when it is settled. What is not known then can't change it.
    fn outcome(&self, recipients: &[Recipient]) -> Opinion {
        let opinions = self.opinions();
        let known: Vec<(&Address, &Opinion)> = recipients
            .iter()
            .zip(&opinions)
            .filter_map(|(recipient, opinion)| Some((recipient.address.as_ref()?, opinion.as_ref()?)))
            .collect();
        // A recipient without a readable address is one that nobody could be asked about.
        if recipients.iter().any(|recipient| recipient.address.is_none()) {
            return Opinion::Accept;
        }
        verdict::of_transaction(&known)
    }

    /// For the log: each user's verdict, how it came about, and how long it took.
    fn lines(&self, recipients: &[Recipient]) -> Vec<String> {
        let mut lines = Vec::new();
        for (recipient, seats) in recipients.iter().zip(&self.seats) {
            for (seat, judge) in seats.iter().zip(recipient.judges()) {
                if let Seat::Decided(opinion, by) = seat {
                    lines.push(format!("{}={} ({by})", judge.user.name, opinion.verdict().as_str()));
                }
            }
        }
        for poll in &self.polls {
            let (user, filter) = (&poll.judge.user.name, &poll.filter);
            lines.push(match &poll.state {
                PollState::Answered(answer) => {
                    let verdict = if answer.is_error { "error" } else { answer.opinion.verdict().as_str() };
                    let seconds = answer.elapsed.as_secs_f64();
                    format!("{user}={verdict} ({filter}: {}, {seconds:.3}s)", answer.status)
                }
                PollState::NotNeeded => format!("{user}=not-asked ({filter})"),
                PollState::GivenUp(_) | PollState::Waiting => format!("{user}=error ({filter}: no answer)"),
            });
        }
        lines
    }
}

impl Poll {
    fn variables(
        &self,
        envelope: &Envelope,
        recipients: &[Recipient],
        size: u64,
    ) -> Vec<(crate::monitor::Variable, String)> {
        let addresses = self.recipients.iter().filter_map(|n| recipients[*n].address.as_ref());
        let subject = Subject {
            address: &self.judge.address,
            extension: self.judge.extension.as_deref(),
            argument: &recipients[self.recipients[0]].argument,
            all: addresses.map(Address::to_string).collect(),
        };
        environment::variables(envelope, Phase::Message, Some(size), &subject)
    }
}

/// What the log says of a transaction.
struct Record {
    opinion: Opinion,
    users: Vec<String>,
    size: Option<u64>,
}

impl Record {
    fn log(&self, envelope: &Envelope, recipients: &[Recipient], why: &str, started: Instant) {
        let users = match &self.users[..] {
            [] => recipients.iter().map(self::why).collect(),
            users => users.to_vec(),
        };
        let to: Vec<String> = recipients.iter().map(|recipient| shown(&recipient.argument)).collect();
        let line = Line { to: to.join(","), verdicts: users.join(", "), opinion: &self.opinion, started };
        let outcome = self.opinion.verdict().as_str();
        let (separator, size) =
            (if why.is_empty() { "" } else { " without message: " }, self.size.unwrap_or(0));
        line.log(envelope, size, &format!("{outcome}{separator}{why}"));
    }
}

fn log_refused_recipient(envelope: &Envelope, recipient: &Recipient, opinion: &Opinion, started: Instant) {
    let line = Line { to: shown(&recipient.argument), verdicts: why(recipient), opinion, started };
    let what = format!("{} at RCPT TO", opinion.verdict().as_str());
    line.log(envelope, envelope.declared_size.unwrap_or(0), &what);
}

/// One line of the log. Fields are strings, which the log's writer quotes and escapes.
struct Line<'a> {
    to: String,
    verdicts: String,
    opinion: &'a Opinion,
    started: Instant,
}

impl Line<'_> {
    fn log(&self, envelope: &Envelope, size: u64, what: &str) {
        let reply = self.opinion.reply().map(Reply::to_string).unwrap_or_default();
        info!(
            interface = envelope.interface.as_str(),
            from = shorten(&format!("<{}>", envelope.sender)),
            to = shorten(&self.to),
            client = shorten(&client(&envelope.client)),
            helo = shorten(envelope.client.helo.as_deref().unwrap_or_default()),
            verdicts = shorten(&self.verdicts),
            outcome = self.opinion.verdict().as_str(),
            reply = shorten(&reply),
            size,
            seconds = self.started.elapsed().as_millis() as f64 / 1000.0,
            "{}: {what}",
            Quoted(envelope.queue_id()),
        );
    }
}

/// The start of a text that strangers can make long.
fn shorten(text: &str) -> &str {
    let end = text.char_indices().nth(MAX_FIELD_LENGTH).map_or(text.len(), |(at, _)| at);
    &text[..end]
}

fn why(recipient: &Recipient) -> String {
    match &recipient.standing {
        Standing::Unjudged(why) | Standing::Refused(_, why) => {
            format!("{} ({why})", shown(&recipient.argument))
        }
        Standing::Judged(judges) => {
            let each = judges.iter().map(|judge| match &judge.decided {
                Some((opinion, by)) => format!("{}={} ({by})", judge.user.name, opinion.verdict().as_str()),
                None => match judge.message_filter() {
                    Some(filter) => format!("{}=not-asked ({filter})", judge.user.name),
                    None => format!("{}=accept (no filter)", judge.user.name),
                },
            });
            each.collect::<Vec<_>>().join(", ")
        }
    }
}

/// What a filter wrote to standard error, a line each.
fn log_error_output(envelope: &Envelope, poll: &Poll, answer: &Answer) {
    for line in answer.error_output.lines().filter(|line| !line.trim().is_empty()).take(MAX_ERROR_LINES) {
        info!("{}: {} {}: {}", Quoted(envelope.queue_id()), poll.judge.user.name, poll.filter, Quoted(line));
    }
}

fn shown(argument: &RecipientArgument) -> String {
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
