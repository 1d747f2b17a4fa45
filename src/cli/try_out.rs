//! `usermilter try`: one user's rules and filter, run through a monitor and a worker as in the daemon.

use std::{
    io::{self, Read},
    net::IpAddr,
    process::ExitCode,
    sync::Arc,
    time::Instant,
};

use nix::unistd::{User as Entry, geteuid};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{ConfigArguments, NOPERM, SOFTWARE, TEMPFAIL, USAGE, load, run_in_worker};
use crate::{
    address::{Address, Sender},
    config::Config,
    environment::{self, Subject},
    filter::{Answer, Filters, Question},
    holdings::{Holdings, Inspector},
    logging::Chain,
    metrics::FilterMetrics,
    monitor::Phase,
    recipient::Source,
    reply::Reply,
    resolver,
    rules::Rules,
    ruling,
    spool::{Message, Spool, SpoolSettings},
    trace_headers,
    transaction::{Client, Envelope, Interface, RecipientArgument},
    user::{Account, User, UserName},
    verdict::{Opinion, Verdict},
    worker::Monitor,
};

#[derive(Clone, Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    config: ConfigArguments,
    /// Whose rules and filter [default: the invoking user].
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// What to try: the filter at RCPT TO, or the one at end of message.
    #[arg(long, value_enum, default_value = "message")]
    phase: PhaseArgument,
    /// Envelope sender; empty for the null sender of bounces.
    #[arg(long, value_name = "ADDRESS", default_value = "sender@example.com")]
    sender: String,
    /// Envelope recipient [default: the user at the first of our domains].
    #[arg(long, value_name = "ADDRESS")]
    recipient: Option<String>,
    /// The client's address.
    #[arg(long, value_name = "IP", default_value = "192.0.2.1")]
    client: IpAddr,
    /// What the client says in HELO.
    #[arg(long, value_name = "NAME", default_value = "client.example.com")]
    helo: String,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
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

pub(super) fn run(mut arguments: Arguments) -> ExitCode {
    // Asked here: the worker is somebody else when root calls.
    arguments.user = arguments.user.or_else(invoking_user);
    let config = match load(&arguments.config) {
        Ok(config) => config,
        Err(status) => return status,
    };
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
            if arguments.json {
                println!("{}", trial.json());
            } else {
                trial.print();
            }
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
    let usage = |what: &str, error: &dyn std::fmt::Display| (USAGE, format!("{what}: {error}"));
    let name = arguments.user.as_deref();
    let name = name.ok_or_else(|| (USAGE, "who are you? Say --user NAME".to_owned()))?;
    let user_name = UserName::try_from(name.to_owned()).map_err(|error| usage("--user", &error))?;
    let address = match &arguments.recipient {
        Some(address) => Address::parse(address.as_bytes()),
        None => Address::parse(
            format!("{name}@{}", config.recipients.domains.first().map_or("localhost", |d| d)).as_bytes(),
        ),
    }
    .map_err(|error| usage("--recipient", &error))?;
    let sender = Sender::parse(arguments.sender.as_bytes()).map_err(|error| usage("--sender", &error))?;

    let resolver = resolver::Chain::new(&config.resolvers, &config.recipients, &[]);
    let found = find_user(&resolver, &user_name).await.map_err(|error| (SOFTWARE, error))?;
    let (user, directory_rules) =
        found.ok_or_else(|| (USAGE, format!("--user: nobody is called \"{name}\"")))?;
    let (_, extension) = address.split_extension(&config.recipients.delimiters);
    let extension = extension.map(str::to_lowercase);
    let client = Client {
        address: Some(arguments.client),
        helo: Some(arguments.helo.clone()),
        protocol: "ESMTP".into(),
        ..Client::default()
    };
    let envelope = Envelope {
        interface: Interface::Milter,
        queue_id: None,
        client: Arc::new(client),
        sender,
        declared_size: None,
        smtputf8: false,
    };

    let inspector = Inspector::new(Arc::clone(&monitor), config.filter.inspect_ttl.0);
    let holdings = match inspector.holdings(&user).await {
        Ok(holdings) => holdings,
        Err(error) => {
            let by = format!("not asked: {}", Chain(&*error));
            return Ok(Trial {
                opinion: Opinion::Accept,
                by,
                rules_error: None,
                answer: None,
                is_error: true,
            });
        }
    };
    let phase = match arguments.phase {
        PhaseArgument::Recipient => Phase::Recipient,
        PhaseArgument::Message => Phase::Message,
    };
    let message = match phase {
        Phase::Recipient => None,
        Phase::Message => {
            let message =
                spool(config, &envelope, text).map_err(|error| (SOFTWARE, format!("spool: {error}")))?;
            Some(message)
        }
    };
    let size = message.as_ref().map(Message::size);
    let rules_error = holdings.rules_error.clone();
    let site = config.recipients.rules.as_ref().map(|rules| (&*rules.compiled, Source::Site));
    let directory = directory_rules.as_deref().map(|rules| (rules, Source::Directory));
    let own = holdings.rules.as_ref().map(|rules| (rules, Source::Rules));
    let by_rules = site
        .into_iter()
        .chain(directory)
        .chain(own)
        .find_map(|(rules, whose)| ruling::decide(rules, whose, &envelope, &address, size).decision)
        .map(|decision| decision.in_words_for(&envelope));
    if let Some(decision) = by_rules {
        return Ok(Trial {
            opinion: decision.opinion,
            by: decision.by,
            rules_error,
            answer: None,
            is_error: false,
        });
    }
    let Some(filter) = holdings.inspection.filter(phase, extension.as_deref()) else {
        let by = format!("no {} filter{}", phase.as_str(), where_looked(config, &holdings));
        return Ok(Trial { opinion: Opinion::Accept, by, rules_error, answer: None, is_error: false });
    };
    let argument =
        RecipientArgument { raw: format!("<{address}>").into_bytes(), mailer: None, mailbox: None };
    let subject = Subject {
        address: &address,
        extension: extension.as_deref(),
        argument: &argument,
        all: vec![address.to_string()],
    };
    let time_limit = match phase {
        Phase::Recipient => config.filter.recipient_deadline.0,
        Phase::Message => config.filter.deadline.0,
    };
    let question = Question {
        user: &user,
        phase,
        extension: extension.as_deref(),
        queue_id: envelope.queue_id(),
        variables: environment::variables(&envelope, phase, size, &subject),
        message: message.as_ref(),
        deadline: Instant::now() + time_limit,
        smtputf8: false,
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

/// The message as it would come from an MTA: whatever its line ends are, a filter sees those of the configuration.
fn spool(config: &Config, envelope: &Envelope, text: &[u8]) -> io::Result<Message> {
    let mut spool = Spool::new(SpoolSettings::new(&config.filter), Some(text.len() as u64))?;
    if config.filter.trace_headers {
        trace_headers::write(
            &mut spool,
            envelope,
            config.recipients.domains.first().map_or("localhost", |d| d),
        )?;
    }
    let wire = with_crlf(text);
    let (header, body) = split_header(&wire);
    for (name, value) in fields(header) {
        spool.header(name, &value)?;
    }
    spool.end_of_headers()?;
    spool.body(body)?;
    spool.finish()
}

/// Lines end in CRLF on the wire, whether the text has them so or as LF.
fn with_crlf(text: &[u8]) -> Vec<u8> {
    let mut wire = Vec::with_capacity(text.len() + text.len() / 40);
    for (n, byte) in text.iter().enumerate() {
        if *byte == b'\n' && (n == 0 || text[n - 1] != b'\r') {
            wire.push(b'\r');
        }
        wire.push(*byte);
    }
    wire
}

/// Header without its last line end, and body, of a message with CRLF.
fn split_header(wire: &[u8]) -> (&[u8], &[u8]) {
    if let Some(body) = wire.strip_prefix(b"\r\n") {
        return (&[], body);
    }
    match wire.windows(4).position(|window| window == b"\r\n\r\n") {
        Some(at) => (&wire[..at], &wire[at + 4..]),
        None => (wire.strip_suffix(b"\r\n").unwrap_or(wire), &[]),
    }
}

/// Names and values as a milter gets them: folds as bare LF.
fn fields(header: &[u8]) -> Vec<(&[u8], Vec<u8>)> {
    let mut fields: Vec<(&[u8], Vec<u8>)> = Vec::new();
    for line in header.split(|byte| *byte == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        match (line.first(), fields.last_mut()) {
            (Some(b' ' | b'\t'), Some((_, value))) => {
                value.push(b'\n');
                value.extend_from_slice(line);
            }
            _ => {
                let colon = line.iter().position(|byte| *byte == b':');
                if let Some(colon) = colon {
                    fields.push((&line[..colon], line[colon + 1..].to_vec()));
                }
            }
        }
    }
    fields
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

    fn print(&self) {
        if let Some(error) = &self.rules_error {
            println!("rules:    ignored: {error}");
        }
        println!("verdict:  {} ({})", self.verdict(), self.by);
        if self.is_error {
            println!("          the daemon would {} (filter.on-error)", self.opinion.verdict().as_str());
        }
        if let Some(reply) = self.opinion.reply() {
            for line in reply.to_string().lines() {
                println!("reply:    {line}");
            }
        }
        if let Some(answer) = &self.answer {
            println!("time:     {:.3} s", answer.elapsed.as_secs_f64());
            for (label, text) in [("output:  ", &answer.output), ("stderr:  ", &answer.error_output)] {
                for line in text.lines() {
                    println!("{label} {}", line.escape_debug());
                }
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_taken_apart_as_a_milter_gets_it() {
        for text in [&b"A: 1\n 2\nB:3\n\nx\ny"[..], b"A: 1\r\n 2\r\nB:3\r\n\r\nx\r\ny"] {
            let wire = with_crlf(text);
            let (header, body) = split_header(&wire);
            let expected: Vec<(&[u8], Vec<u8>)> = vec![(b"A", b" 1\n 2".to_vec()), (b"B", b"3".to_vec())];
            assert_eq!(fields(header), expected);
            assert_eq!(body, b"x\r\ny");
        }
        assert_eq!(split_header(b"\r\nbody"), (&b""[..], &b"body"[..]));
        assert_eq!(split_header(b"A: 1\r\n"), (&b"A: 1"[..], &b""[..]));
        assert!(fields(b"").is_empty());
    }
}
