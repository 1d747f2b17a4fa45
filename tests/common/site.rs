//! A whole site in one value: virtual users, and usermilter in front of them, set up by a few words.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use super::milter::{Answer, Client};
use super::{PATIENCE, Sandbox, Usermilter, VirtualUsers, free_port, is_root};

/// What to start; see [`Site::of`].
#[derive(Debug)]
pub struct SiteBuilder {
    pub sandbox: Sandbox,
    pub users: VirtualUsers,
    settings: BTreeMap<String, BTreeMap<String, String>>,
    resolvers: Option<String>,
    environment: Vec<String>,
    milter: String,
    policy: String,
}

/// A running usermilter with its users.
#[derive(Debug)]
pub struct Site {
    // Dropped in this order: the processes first, then their files.
    pub daemon: Usermilter,
    pub users: VirtualUsers,
    pub sandbox: Sandbox,
    milter: String,
    policy: String,
}

impl Site {
    /// A site for test.example whose worker is nobody, with these virtual users, nothing trusted, nothing remembered of
    /// what users have.
    pub fn of(users: &[(&str, u32)]) -> SiteBuilder {
        let sandbox = Sandbox::new();
        let users = VirtualUsers::new(&sandbox, users);
        let (milter, policy) =
            (format!("inet:127.0.0.1:{}", free_port()), format!("inet:127.0.0.1:{}", free_port()));
        let spool = sandbox.directory("spool");
        let nobody = nix::unistd::User::from_name("nobody").unwrap().expect("user nobody");
        if is_root() {
            nix::unistd::chown(&spool, Some(nobody.uid), Some(nobody.gid)).unwrap();
        }
        let homes = users.homes().display().to_string();
        let builder = SiteBuilder {
            sandbox,
            users,
            settings: BTreeMap::new(),
            resolvers: None,
            environment: Vec::new(),
            milter,
            policy,
        };
        let (milter, policy) = (builder.milter.clone(), builder.policy.clone());
        builder
            .set("server", "user", r#""nobody""#)
            .set("server", "milter", &format!("[\"{milter}\"]"))
            .set("server", "policy", &format!("[\"{policy}\"]"))
            // The default is one path for all.
            .set("server", "control", r#""off""#)
            .set("server", "drain-timeout", r#""1s""#)
            .set("recipients", "domains", r#"["test.example"]"#)
            .set("recipients", "trusted-networks", "[]")
            .set("filter", "virtual-uids", "[5001, 20000000]")
            .set("filter", "virtual-homes", &format!("[\"{homes}\"]"))
            .set("filter", "spool-directory", &format!("\"{}\"", spool.display()))
            .set("filter", "inspect-ttl", r#""0s""#)
            // The limit counts what other tests run as the same uid.
            .set("filter", "max-user-processes", "5000")
    }

    /// The milter socket.
    pub fn milter_address(&self) -> &str {
        &self.milter
    }

    /// The policy socket.
    pub fn policy_address(&self) -> &str {
        &self.policy
    }

    /// A milter connection of an MTA as Postfix 3.7, with a foreign client that said HELO.
    #[track_caller]
    pub fn mta(&self) -> Client {
        let mut client = Client::connect(&self.milter);
        client.macros('C', &[("j", "mx.test.example")]);
        client.helo("mx.sender.example");
        client
    }

    /// One mail through a milter connection of its own: the answer that decides it.
    #[track_caller]
    pub fn judge(&self, recipients: &[&str], message: &[u8]) -> Answer {
        let mut mta = self.mta();
        let answer = send(&mut mta, "<s@sender.example>", recipients, message);
        mta.quit();
        answer
    }

    /// As [`Site::judge`], with the line of the log that tells of it.
    #[track_caller]
    pub fn judge_logged(&self, recipients: &[&str], message: &[u8]) -> (Answer, String) {
        let seen = self.daemon.log_lines().len();
        let answer = self.judge(recipients, message);
        let line = self.daemon.wait_for_log_after(seen, "outcome=", PATIENCE);
        (answer, line)
    }

    /// What a user's filter wrote to a file of the home directory, waiting for it.
    #[track_caller]
    pub fn home_file(&self, user: &str, name: &str) -> Vec<u8> {
        let path = self.users.account(user).home.join(name);
        assert!(super::wait_until(Duration::from_secs(10), || path.exists()), "no {}", path.display());
        std::fs::read(path).unwrap()
    }

    /// As [`Site::home_file`], as text.
    #[track_caller]
    pub fn home_text(&self, user: &str, name: &str) -> String {
        String::from_utf8_lossy(&self.home_file(user, name)).into_owned()
    }
}

impl SiteBuilder {
    /// Sets a key of the configuration, in TOML's words; the last one counts.
    pub fn set(mut self, section: &str, key: &str, value: &str) -> Self {
        self.settings.entry(section.to_owned()).or_default().insert(key.to_owned(), value.to_owned());
        self
    }

    /// Resolvers instead of the users' passwd-file.
    pub fn resolvers(mut self, text: impl Into<String>) -> Self {
        self.resolvers = Some(text.into());
        self
    }

    /// Adds to the daemon's environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push(format!("{name}={value}"));
        self
    }

    /// Another milter socket.
    pub fn milter_at(mut self, address: &str) -> Self {
        self.milter = address.to_owned();
        self.set("server", "milter", &format!("[\"{address}\"]"))
    }

    /// Another policy socket.
    pub fn policy_at(mut self, address: &str) -> Self {
        self.policy = address.to_owned();
        self.set("server", "policy", &format!("[\"{address}\"]"))
    }

    /// A filter of a user, as [`VirtualUsers::filter`].
    pub fn filter(self, user: &str, name: &str, script: &str) -> Self {
        self.users.filter(user, name, script);
        self
    }

    /// The text of the configuration.
    pub fn config(&self) -> String {
        let mut text = String::new();
        for (section, settings) in &self.settings {
            let _ = writeln!(text, "[{section}]");
            for (key, value) in settings {
                let _ = writeln!(text, "{key} = {value}");
            }
        }
        let passwd_file = format!(
            "[[resolver]]\ntype = \"passwd-file\"\npath = \"{}\"\n",
            self.users.passwd_file().display()
        );
        text + self.resolvers.as_ref().unwrap_or(&passwd_file)
    }

    /// Starts usermilter.
    #[track_caller]
    pub fn start(self) -> Site {
        let wrapper = match &self.environment[..] {
            [] => Vec::new(),
            environment => [&["env".to_owned()], environment].concat(),
        };
        self.start_under(&wrapper)
    }

    /// Starts usermilter as [`Usermilter::start_under`] does.
    #[track_caller]
    pub fn start_under(self, wrapper: &[String]) -> Site {
        let daemon = Usermilter::start_under(wrapper, &self.config());
        Site { daemon, users: self.users, sandbox: self.sandbox, milter: self.milter, policy: self.policy }
    }
}

/// A uid that no other test run uses, for what a uid's processes tell; `n` is below 10.
pub fn own_uid(n: u32) -> u32 {
    100_000 + std::process::id() % 1_000_000 * 10 + n
}

/// The macros that Postfix sends with MAIL for mx.sender.example[192.0.2.10].
pub const MAIL_MACROS: &[(&str, &str)] = &[
    ("j", "mx.test.example"),
    ("{client_addr}", "192.0.2.10"),
    ("{client_name}", "mx.sender.example"),
    ("{client_port}", "4711"),
];

/// One mail over a milter connection, as Postfix does it: the answer that decides it, be it at RCPT (of the last
/// recipient, if none is left), DATA or end of message.
#[track_caller]
pub fn send(mta: &mut Client, sender: &str, recipients: &[&str], message: &[u8]) -> Answer {
    mta.macros('M', MAIL_MACROS);
    mta.mail(&[sender]);
    let mut accepted = 0;
    let mut answer = None;
    for recipient in recipients {
        let bare = recipient.trim_matches(['<', '>']).to_lowercase();
        mta.macros('R', &[("{rcpt_addr}", &bare), ("{rcpt_mailer}", "virtual")]);
        let reply = mta.rcpt(&[&format!("<{}>", recipient.trim_matches(['<', '>']))]);
        accepted += usize::from(reply.letter() == 'c');
        answer = Some(reply);
    }
    if accepted == 0 {
        mta.abort();
        return answer.expect("a recipient");
    }
    mta.macros('T', &[("i", "4QUEUEID")]);
    let answer = send_message(mta, message);
    mta.abort();
    answer
}

/// DATA and what follows: a header and a body in the form of RFC 5322, with CRLF or LF line ends in the header; the body
/// goes as it is.
#[track_caller]
pub fn send_message(mta: &mut Client, message: &[u8]) -> Answer {
    let answer = mta.data();
    if answer.letter() != 'c' {
        return answer;
    }
    let (header, body) = split_message(message);
    for (name, value) in header {
        let answer = mta.header(&name, value);
        if answer.letter() != 'c' {
            return answer;
        }
    }
    let answer = mta.end_of_headers();
    if answer.letter() != 'c' {
        return answer;
    }
    let answer = mta.body(body);
    if !matches!(answer.letter(), 'c' | 's') {
        return answer;
    }
    mta.end_of_message()
}

/// Header fields as an MTA hands them over (with the leading space, folds as bare LF), and the body.
fn split_message(message: &[u8]) -> (Vec<(String, Vec<u8>)>, &[u8]) {
    let mut fields: Vec<(String, Vec<u8>)> = Vec::new();
    let mut rest = message;
    loop {
        let end = rest.iter().position(|&b| b == b'\n').map_or(rest.len(), |at| at + 1);
        let (line, after) = rest.split_at(end);
        let text = line.strip_suffix(b"\n").unwrap_or(line);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        if text.is_empty() {
            return (fields, after);
        }
        rest = after;
        match (text[0], fields.last_mut()) {
            (b' ' | b'\t', Some((_, value))) => {
                value.push(b'\n');
                value.extend_from_slice(text);
            }
            _ => {
                let colon = text.iter().position(|&b| b == b':').expect("a header field");
                let name = String::from_utf8_lossy(&text[..colon]).into_owned();
                fields.push((name, text[colon + 1..].to_vec()));
            }
        }
    }
}
