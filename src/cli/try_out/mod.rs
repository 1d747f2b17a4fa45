//! `usermilter try`: one user's rules and filter, run through a monitor and a worker as in the daemon.

mod envelope;
mod message;

use std::{
    fmt::Write as _,
    io::{self, Read},
    net::IpAddr,
    process::ExitCode,
    sync::Arc,
    time::Instant,
};

use jiff::{Timestamp, fmt::rfc2822};

use nix::unistd::{User as Entry, geteuid};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use self::envelope::{Mail, Setting};
use super::{
    ConfigArguments, NOPERM, SOFTWARE, TEMPFAIL, USAGE, load_for_oneself,
    output::{self, BAD, GOOD, ODD, styled},
    run_in_worker,
};
use crate::{
    address::Address,
    config::Config,
    environment::{self, Subject},
    filter::{Answer, Filters, Question},
    holdings::{Holdings, Inspector},
    logging::Chain,
    metrics::FilterMetrics,
    monitor::Phase,
    recipient::{Decision, Source},
    reply::Reply,
    resolver,
    rules::Rules,
    ruling,
    spool::Message,
    user::{Account, User, UserName},
    verdict::{Opinion, Verdict},
    worker::Monitor,
};

const HELP: &str = "\
A filter gets the environment, the standard input, the directory, the limits and all else that the daemon gives it, for a
mail that comes as the options say. Whoever is not root needs none of root's rights for it: what only the daemon may read
(a directory's password, the spool directory) is done without, and said so. Nothing is written to the user's log.

Not the same as in the daemon: the time, in the Received field on top, unless --date sets it; the queue id, which only an
MTA gives, unless --set does; USERMILTER_DEADLINE, if little of filter.deadline was left; limits and control groups, if
the daemon was started with other ones. The exempt addresses and trusted networks of the configuration do not count here.

Variables that --set can set: ORIGINAL_RECIPIENT CLIENT_HOSTNAME CLIENT_PROTOCOL SASL_USERNAME SASL_METHOD SASL_SENDER
USERMILTER_QUEUE_ID USERMILTER_SIZE (what the client declares, at RCPT TO) USERMILTER_SMTPUTF8 (1 or 0) USERMILTER_TLS.

Examples:
  usermilter try < mail
      one's own filter
  usermilter try --sender spammer@example.com --client 203.0.113.9 --set CLIENT_HOSTNAME=mx.example.com < mail
      who delivers decides, too
  usermilter try --phase recipient --sender '' --helo localhost
      rules and the executable at RCPT TO, for a bounce
  usermilter try --user alice --recipient alice+shop@example.org --json < mail
      as root: somebody else's, as JSON
  usermilter try < mail || echo \"not wanted: $?\"
      in a script

Exit status:
   0  accept
  64  wrong usage; nobody is called so
  70  a filter error, whatever filter.on-error makes of it; or trouble of ours
  75  defer
  77  reject
  78  the configuration has a fault, or root calls and server.user does not exist

Files:
  ~/.usermilter/rules.toml, recipient, message    see usermilter-filter(7)";

/// Run rules and filter as the daemon would, on the message on standard input.
///
/// Shows the verdict and what it comes from, the reply, what the filter wrote, and how long it took. Root can try
/// anybody's filter, others their own.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub(super) struct Arguments {
    #[command(flatten)]
    config: ConfigArguments,
    /// Whose rules and filter [default: the invoking user].
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// What to try: the rules and the filter at RCPT TO, or those at end of message.
    #[arg(long, value_enum, default_value = "message")]
    phase: PhaseArgument,
    /// Envelope sender; empty for the null sender of bounces.
    #[arg(long, value_name = "ADDRESS", default_value = "sender@example.com")]
    sender: String,
    /// Envelope recipient; may be given again for more that mean the same user [default: the user at the first of our
    /// domains].
    #[arg(long = "recipient", value_name = "ADDRESS")]
    recipients: Vec<String>,
    /// The client's address.
    #[arg(long, value_name = "IP", default_value = "192.0.2.1")]
    client: IpAddr,
    /// What the client says in HELO.
    #[arg(long, value_name = "NAME", default_value = "client.example.com")]
    helo: String,
    /// Anything else that an MTA tells, by the name of the filter's variable; see below.
    #[arg(long = "set", value_name = "VARIABLE=VALUE")]
    settings: Vec<Setting>,
    /// The MTA's name, in the Received field on top [default: the first of our domains].
    #[arg(long, value_name = "NAME")]
    host: Option<String>,
    /// When the mail comes, in the Received field on top, like "Fri, 20 Nov 2026 17:00:00 +0000" [default: now].
    #[arg(long, value_name = "DATE", value_parser = date)]
    date: Option<Timestamp>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

fn date(text: &str) -> Result<Timestamp, String> {
    rfc2822::parse(text).map(|date| date.timestamp()).map_err(|error| error.to_string())
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum PhaseArgument {
    Recipient,
    Message,
}

/// What is shown.
struct Trial {
    opinion: Opinion,
    /// What decided: a rule, a filter, or that there is nothing to ask.
    by: String,
    rules_error: Option<String>,
    answer: Option<Answer>,
    is_error: bool,
}

impl Trial {
    /// Nobody's filter was run.
    fn without_filter(opinion: Opinion, by: String, rules_error: Option<String>) -> Self {
        Self { opinion, by, rules_error, answer: None, is_error: false }
    }
}

pub(super) fn run(mut arguments: Arguments) -> ExitCode {
    // Asked here: the worker is somebody else when root calls.
    arguments.user = arguments.user.or_else(invoking_user);
    let mut config = match load_for_oneself(&arguments.config) {
        Ok(config) => config,
        Err(status) => return status,
    };
    if !geteuid().is_root() {
        // Where the daemon keeps large messages, only its worker may write. A filter sees no name of either.
        config.filter.spool_directory = std::env::temp_dir();
    }
    let text = match arguments.phase {
        PhaseArgument::Recipient => Vec::new(),
        PhaseArgument::Message => {
            let mut text = Vec::new();
            if let Err(error) = io::stdin().lock().read_to_end(&mut text) {
                eprintln!("usermilter: standard input: {error}");
                return ExitCode::from(SOFTWARE);
            }
            text
        }
    };
    let (arguments, text) = (Arc::new(arguments), Arc::new(text));
    run_in_worker(config, move |config, monitor| {
        try_out(Arc::clone(&arguments), config, monitor, Arc::clone(&text))
    })
}

async fn try_out(
    arguments: Arc<Arguments>,
    config: Arc<Config>,
    monitor: Arc<Monitor>,
    text: Arc<Vec<u8>>,
) -> u8 {
    match trial(&arguments, &config, monitor, &text).await {
        Ok(trial) => {
            let report = if arguments.json { format!("{}\n", trial.json()) } else { trial.text() };
            output::print(&report);
            trial.exit_status()
        }
        Err((status, message)) => {
            eprintln!("usermilter: {message}");
            status
        }
    }
}

async fn trial(
    arguments: &Arguments,
    config: &Arc<Config>,
    monitor: Arc<Monitor>,
    text: &[u8],
) -> Result<Trial, (u8, String)> {
    let usage = |message| (USAGE, message);
    let name = arguments.user.as_deref();
    let name = name.ok_or_else(|| usage("who are you? Say --user NAME".to_owned()))?;
    let user_name = UserName::try_from(name.to_owned()).map_err(|error| usage(format!("--user: {error}")))?;
    let our_domain = config.recipients.domains.first().map_or("localhost", |domain| domain);
    let mail = Mail::new(arguments, &format!("{name}@{our_domain}")).map_err(usage)?;
    let Mail { envelope, address, named, argument, all } = &mail;

    let resolver = resolver::Chain::open(config);
    let found = find_user(&resolver, &user_name).await.map_err(|error| (SOFTWARE, error))?;
    let (user, directory_rules) =
        found.ok_or_else(|| usage(format!("--user: nobody is called \"{name}\"")))?;
    let (_, extension) = address.split_extension(&config.recipients.delimiters);
    let extension = extension.map(str::to_lowercase);

    let inspector = Inspector::new(Arc::clone(&monitor), config.filter.inspect_ttl.0);
    let holdings = match inspector.holdings(&user).await {
        Ok(holdings) => holdings,
        Err(error) => {
            let by = format!("not asked: {}", Chain(&*error));
            return Ok(Trial { is_error: true, ..Trial::without_filter(Opinion::Accept, by, None) });
        }
    };
    let phase = match arguments.phase {
        PhaseArgument::Recipient => Phase::Recipient,
        PhaseArgument::Message => Phase::Message,
    };
    let message = match phase {
        Phase::Recipient => None,
        Phase::Message => {
            let host = arguments.host.as_deref().unwrap_or(our_domain);
            let date = arguments.date.unwrap_or_else(Timestamp::now);
            let message = message::spool(config, envelope, host, date, text);
            Some(message.map_err(|error| (SOFTWARE, format!("spool: {error}")))?)
        }
    };
    let size = message.as_ref().map(Message::size).or(envelope.declared_size);
    let rules_error = holdings.rules_error.clone();
    let site = config.recipients.rules.as_ref().map(|rules| (&*rules.compiled, Source::Site));
    let directory = directory_rules.as_deref().map(|rules| (rules, Source::Directory));
    let own = holdings.rules.as_ref().map(|rules| (rules, Source::Rules));
    let by_rules = site
        .into_iter()
        .chain(directory)
        .chain(own)
        .find_map(|(rules, whose)| {
            let ruled = ruling::decide(rules, whose, envelope, named, size);
            let waits = phase == Phase::Recipient && ruled.is_provisional();
            let until_the_size_is_known = |decision: Decision| Decision {
                opinion: Opinion::Accept,
                by: format!("{}, which waits for the size", decision.by),
                ..decision
            };
            if waits { ruled.decision.map(until_the_size_is_known) } else { ruled.decision }
        })
        .map(|decision| decision.in_words_for(envelope));
    if let Some(decision) = by_rules {
        return Ok(Trial::without_filter(decision.opinion, decision.by, rules_error));
    }
    let Some(filter) = holdings.inspection.filter(phase, extension.as_deref()) else {
        let by = format!("no {} filter{}", phase.as_str(), where_looked(config, &holdings));
        return Ok(Trial::without_filter(Opinion::Accept, by, rules_error));
    };
    if message.as_ref().is_some_and(|message| message.size() > config.filter.max_message.0) {
        let by = "larger than filter.max-message".to_owned();
        return Ok(Trial::without_filter(Opinion::Accept, by, rules_error));
    }
    let subject = Subject { address, extension: extension.as_deref(), argument, all: all.clone() };
    let time_limit = match phase {
        Phase::Recipient => config.filter.recipient_deadline.0,
        Phase::Message => config.filter.deadline.0,
    };
    let question = Question {
        user: &user,
        phase,
        extension: extension.as_deref(),
        queue_id: envelope.queue_id(),
        variables: environment::variables(envelope, phase, size, &subject),
        message: message.as_ref(),
        deadline: Instant::now() + time_limit,
        smtputf8: envelope.smtputf8,
    };
    let filters = Filters::new(monitor, config.filter.clone(), FilterMetrics::default());
    let answer = filters.ask(question, &CancellationToken::new()).await;
    let (answer, _) = answer.ok_or_else(|| (SOFTWARE, "the filter was not started".to_owned()))?;
    Ok(Trial {
        opinion: answer.opinion.clone(),
        by: format!("{}: {}", filter.name, answer.status),
        rules_error,
        is_error: answer.is_error(),
        answer: Some(answer),
    })
}

fn where_looked(config: &Config, holdings: &Holdings) -> String {
    format!(" in {}", holdings.inspection.home.join(&config.filter.directory).display())
}

fn invoking_user() -> Option<String> {
    Entry::from_uid(geteuid()).ok().flatten().map(|entry| entry.name)
}

/// The user as the resolvers know them; whom they don't know may still be a user of this host. `None`: nobody.
async fn find_user(
    resolver: &resolver::Chain,
    name: &UserName,
) -> Result<Option<(User, Option<Arc<Rules>>)>, String> {
    let address = Address::parse(name.as_str().as_bytes()).map_err(|error| error.to_string())?;
    let resolution = resolver.resolve(&address, true).await.map_err(|error| error.to_string())?;
    let known = resolution.users.into_iter().next().map(|resolved| (resolved.user, resolved.directory_rules));
    if known.is_some() {
        return Ok(known);
    }
    let entry = Entry::from_name(name.as_str()).map_err(|error| format!("user database: {error}"))?;
    Ok(entry.map(|_| (User { name: name.clone(), account: Account::Passwd, program: None }, None)))
}

impl Trial {
    fn exit_status(&self) -> u8 {
        match self.opinion.verdict() {
            _ if self.is_error => SOFTWARE,
            Verdict::Accept => 0,
            Verdict::Reject => NOPERM,
            Verdict::Defer => TEMPFAIL,
        }
    }

    fn verdict(&self) -> &'static str {
        if self.is_error { "error" } else { self.opinion.verdict().as_str() }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        if let Some(error) = &self.rules_error {
            let _ = writeln!(text, "rules:    {}: {}", styled(ODD, "ignored"), error.escape_debug());
        }
        let style = match self.exit_status() {
            0 => GOOD,
            TEMPFAIL => ODD,
            _ => BAD,
        };
        let (verdict, by) = (styled(style, self.verdict()), self.by.escape_debug());
        let _ = writeln!(text, "verdict:  {verdict} ({by})");
        if self.is_error {
            let verdict = self.opinion.verdict().as_str();
            let _ = writeln!(text, "          the daemon would {verdict} (filter.on-error)");
        }
        if let Some(reply) = self.opinion.reply() {
            for line in reply.to_string().lines() {
                let _ = writeln!(text, "reply:    {line}");
            }
        }
        if let Some(answer) = &self.answer {
            let _ = writeln!(text, "time:     {:.3} s", answer.elapsed.as_secs_f64());
            for (label, output) in [("output:  ", &answer.output), ("stderr:  ", &answer.error_output)] {
                for line in output.lines() {
                    let _ = writeln!(text, "{label} {}", line.escape_debug());
                }
            }
        }
        text
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "verdict": self.verdict(),
            "by": self.by,
            "rules_error": self.rules_error,
            "reply": self.opinion.reply().map(Reply::to_string),
            "output": self.answer.as_ref().map(|answer| &answer.output),
            "stderr": self.answer.as_ref().map(|answer| &answer.error_output),
            "seconds": self.answer.as_ref().map(|answer| answer.elapsed.as_secs_f64()),
        })
    }
}
