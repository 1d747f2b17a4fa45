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
    /// A recipient that is not accepted is logged, and is no part of the transaction.
    pub async fn recipient(&self, envelope: &Envelope, argument: RecipientArgument) -> (Opinion, Recipient) {
        let started = Instant::now();
        let recipient = self.judge_recipient(envelope, argument).await;
        let opinion = match &recipient {
            Ok(recipient) => recipient.known().unwrap_or(Opinion::Accept),
            Err((opinion, _)) => opinion.clone(),
        };
        match recipient {
            Ok(recipient) => {
                if opinion != Opinion::Accept {
                    log_refused_recipient(envelope, &recipient.argument, &opinion, &why(&recipient), started);
                }
                (opinion, recipient)
            }
            Err((_, (argument, why))) => {
                log_refused_recipient(envelope, &argument, &opinion, &why, started);
                (opinion, Recipient { argument, address: None, standing: Standing::Unjudged(why) })
            }
        }
    }

    /// `Err`: the recipient is refused or put off without anybody having been asked, and why.
    async fn judge_recipient(
        &self,
        envelope: &Envelope,
        argument: RecipientArgument,
    ) -> Result<Recipient, (Opinion, (RecipientArgument, String))> {
        let settings = &self.settings.recipients;
        let unjudged = |argument, address, why: &str| {
            Ok(Recipient { argument, address, standing: Standing::Unjudged(why.to_owned()) })
        };
        let address = match Address::parse(&argument.raw) {
            Ok(address) => address,
            Err(error) => {
                let raw = String::from_utf8_lossy(&argument.raw).into_owned();
                warn!("{}: recipient \"{}\" is not judged: {error}", envelope.queue_id(), Quoted(&raw));
                return self.trouble(None, argument, None, error.to_string());
            }
        };
        if let Some(why) = self.is_trusted(&envelope.client) {
            return unjudged(argument, Some(address), why);
        }
        let mailer = argument.mailer.as_deref();
        let by_mailer = mailer.is_some_and(|m| settings.local_mailers.iter().any(|local| local == m));
        if self.is_exempt(&address) {
            return unjudged(argument, Some(address), "exempt");
        }
        // Sendmail has resolved the address already and says to which mailbox; Postfix repeats it.
        let mailbox = argument.mailbox.as_deref().filter(|_| by_mailer);
        let mailbox = mailbox.and_then(|m| Address::parse(m.as_bytes()).ok());
        match self.resolver.resolve(mailbox.as_ref().unwrap_or(&address), by_mailer).await {
            Err(unavailable) => {
                warn!("{}: {address}: {unavailable}", envelope.queue_id());
                let why = unavailable.to_string();
                self.trouble(unavailable.on_error, argument, Some(address), why)
            }
            Ok(resolution) if resolution.is_nobody() => match settings.unknown {
                Unknown::Pass => unjudged(argument, Some(address), "unknown"),
                Unknown::Reject => {
                    Err((Opinion::Reject(Reply::unknown_user()), (argument, "unknown user".to_owned())))
                }
            },
            // Somebody gets the mail who can't be asked: whatever the others say, the recipient accepts.
            Ok(resolver::Resolution { unjudged: Some(why), .. }) => unjudged(argument, Some(address), &why),
            Ok(resolution) => {
                let mut judges = Vec::with_capacity(resolution.users.len());
                for user in resolution.users {
                    judges.push(self.judge(envelope, &address, user).await);
                }
                Ok(Recipient { argument, address: Some(address), standing: Standing::Judged(judges) })
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
    fn trouble(
        &self,
        on_error: Option<OnError>,
        argument: RecipientArgument,
        address: Option<Address>,
        why: String,
    ) -> Result<Recipient, (Opinion, (RecipientArgument, String))> {
        match self.opinion_on_error(on_error) {
            Opinion::Accept => Ok(Recipient { argument, address, standing: Standing::Unjudged(why) }),
            opinion => Err((opinion, (argument, why))),
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
        let from_network = |address| settings.trusted_networks.iter().any(|network| network.contains(address));
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
                    Some(Ok((n, answer))) => ballot.record(n, answer),
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
            let seats = recipient.judges().iter().map(|judge| ballot.seat(envelope, recipient, judge, n, size));
            let seats = seats.collect();
            ballot.seats.push(seats);
        }
        ballot
    }

    fn seat(&mut self, envelope: &Envelope, recipient: &Recipient, judge: &Judge, n: usize, size: u64) -> Seat {
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
                    format!("{user}={verdict} ({filter}: {}, {seconds:.3}s)", Quoted(&answer.status))
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
        let mut users = self.users.clone();
        if users.is_empty() {
            users = recipients.iter().map(self::why).collect();
        }
        let to: Vec<String> = recipients.iter().map(|recipient| shown(&recipient.argument)).collect();
        info!(
            interface = envelope.interface.as_str(),
            from = %format_args!("<{}>", Quoted(&envelope.sender.to_string())),
            to = %to.join(","),
            client = %client(&envelope.client),
            helo = %Quoted(envelope.client.helo.as_deref().unwrap_or_default()),
            verdicts = %users.join(", "),
            outcome = self.opinion.verdict().as_str(),
            reply = %self.opinion.reply().map(Reply::to_string).as_deref().map(Quoted).unwrap_or(Quoted("")),
            size = self.size.unwrap_or(0),
            seconds = %format_args!("{:.3}", started.elapsed().as_secs_f64()),
            "{}: {}{}{why}",
            envelope.queue_id(),
            self.opinion.verdict().as_str(),
            if why.is_empty() { "" } else { " without message: " },
        );
    }
}

fn log_refused_recipient(
    envelope: &Envelope,
    argument: &RecipientArgument,
    opinion: &Opinion,
    why: &str,
    started: Instant,
) {
    info!(
        interface = envelope.interface.as_str(),
        from = %format_args!("<{}>", Quoted(&envelope.sender.to_string())),
        to = %shown(argument),
        client = %client(&envelope.client),
        helo = %Quoted(envelope.client.helo.as_deref().unwrap_or_default()),
        verdicts = %Quoted(why),
        outcome = opinion.verdict().as_str(),
        reply = %opinion.reply().map(Reply::to_string).as_deref().map(Quoted).unwrap_or(Quoted("")),
        size = envelope.declared_size.unwrap_or(0),
        seconds = %format_args!("{:.3}", started.elapsed().as_secs_f64()),
        "{}: {} at RCPT TO",
        envelope.queue_id(),
        opinion.verdict().as_str(),
    );
}

fn why(recipient: &Recipient) -> String {
    match &recipient.standing {
        Standing::Unjudged(why) => format!("{} ({why})", shown(&recipient.argument)),
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

fn shown(argument: &RecipientArgument) -> String {
    let raw = String::from_utf8_lossy(&argument.raw);
    format!("<{}>", Quoted(raw.trim_start_matches('<').trim_end_matches('>')))
}

fn client(client: &Client) -> String {
    let name = client.name.as_deref().unwrap_or("unknown");
    match client.address {
        Some(address) => format!("{}[{address}]", Quoted(name)),
        None => format!("{}[unknown]", Quoted(name)),
    }
}
