//! What travels between the processes, and nothing else can.
//!
//! Worker and monitor exchange [`Request`]s and [`Event`]s over a SOCK_SEQPACKET pair, one per packet. A forked
//! child answers with a [`Report`] on a pipe of the job's own, which the monitor never reads.

use std::{net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    resolver::source::Identity,
    user::{User, UserName},
};

/// Longest packet, in bytes. One environment variable may have 128 KiB (MAX_ARG_STRLEN of execve(2)), and the
/// kernel's default socket buffer takes 208 KiB.
pub const MAX_PACKET: usize = 160 * 1024;

/// Longest report of an inspection, in bytes: a rules file and its sender files.
pub const MAX_REPORT: usize = 32 << 20;

/// Number by which worker and monitor speak of one job.
pub type JobId = u32;

/// The table of requests: all that a worker can ask of the monitor. Long texts stay where they are, in the packet or the
/// transaction: what a process allocates before it forks, it pays for with page faults after.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request<'a> {
    /// The worker serves; whoever served before may drain.
    Ready,
    /// Find out what a user has. Descriptor: the report pipe.
    Inspect {
        /// The job.
        job: JobId,
        /// Of whom.
        user: User,
    },
    /// Run a user's filter. Descriptors: the message ([`Phase::Message`] only), standard output, standard error. For a
    /// filter that is not run ([`End::NotRun`]) the child's report is on standard output.
    Run {
        /// The job.
        job: JobId,
        /// Whose filter.
        user: User,
        /// Which of the filters.
        phase: Phase,
        /// The extension of the address, if any.
        extension: Option<&'a str>,
        /// Values of the environment.
        variables: Vec<(Variable, &'a str)>,
        /// Time limit, in milliseconds; the configuration's limit holds if it is shorter.
        time_limit: u64,
    },
    /// Append to the log that a user keeps, if there is one. Descriptor: the report pipe, which stays empty if it went
    /// well.
    Log {
        /// The job.
        job: JobId,
        /// Whose log.
        user: User,
        /// What to append.
        text: &'a str,
    },
    /// The worker is alive: the answer to [`Event::Ping`].
    Alive,
    /// Ask the system, as the worker's own user. Descriptor: the report pipe.
    Ask {
        /// The job.
        job: JobId,
        /// What.
        question: Question,
    },
}

/// What a worker that has confined itself can't find out alone. Of hosts and files it names only those of the
/// configuration, by their number there.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Question {
    /// The uid of a user, by NSS.
    Uid(UserName),
    /// The addresses of a directory server, by NSS.
    Host {
        /// Which `[[resolver]]`.
        resolver: usize,
        /// Which of its servers.
        server: usize,
    },
    /// The text of a file that is read again when it changes: aliases(5), virtual(5) and passwd files, in this order.
    File(usize),
}

/// What the monitor tells a worker.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// Accept no more connections, finish, and leave.
    Drain {
        /// Whether to wait for open milter connections to end too, or only for transactions.
        connections: bool,
    },
    /// Say that you are alive.
    Ping,
    /// A new configuration could not be used; everything stays as it was.
    ReloadFailed {
        /// Why, cut to less than a kilobyte.
        error: String,
    },
    /// A job's process has ended.
    Finished {
        /// The job.
        job: JobId,
        /// How.
        end: End,
        /// From fork to end, in microseconds.
        elapsed: u64,
    },
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// With this status.
    Exited(i32),
    /// Before it became the filter: there is a report instead.
    NotRun,
    /// By this signal.
    Signaled(i32),
    /// By us, because its time was up.
    TimedOut,
    /// It could not be started: errno of fork(2).
    NotStarted(i32),
}

/// When a filter runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// At RCPT TO.
    Recipient,
    /// At end of message.
    Message,
}

impl Phase {
    /// The name of the executable, and of the phase in the environment.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Recipient => "recipient",
            Self::Message => "message",
        }
    }

    /// The names of files that are tried for an extension, the most special first.
    pub fn candidates(self, extension: Option<&str>) -> Vec<String> {
        let base = self.as_str();
        match extension {
            None => vec![base.into()],
            // Such an extension would leave the directory or name a hidden file; it matches nothing, not even
            // the default.
            Some(e) if e.contains(['/', '\0']) || e.starts_with('.') => vec![base.into()],
            Some("") => vec![format!("{base}-default"), base.into()],
            Some(e) => vec![format!("{base}-{e}"), format!("{base}-default"), base.into()],
        }
    }
}

/// The variables that a filter gets beside HOME, USER, LOGNAME, SHELL and PATH. usermilter-filter(7) says what
/// they hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)] // the names say it
pub enum Variable {
    Sender,
    Recipient,
    OriginalRecipient,
    Local,
    Extension,
    Domain,
    ClientAddress,
    ClientHostname,
    ClientHelo,
    ClientProtocol,
    SaslUsername,
    SaslMethod,
    SaslSender,
    Phase,
    QueueId,
    Recipients,
    Size,
    Deadline,
    Smtputf8,
    Tls,
    Version,
}

impl Variable {
    /// The name in the environment.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sender => "SENDER",
            Self::Recipient => "RECIPIENT",
            Self::OriginalRecipient => "ORIGINAL_RECIPIENT",
            Self::Local => "LOCAL",
            Self::Extension => "EXTENSION",
            Self::Domain => "DOMAIN",
            Self::ClientAddress => "CLIENT_ADDRESS",
            Self::ClientHostname => "CLIENT_HOSTNAME",
            Self::ClientHelo => "CLIENT_HELO",
            Self::ClientProtocol => "CLIENT_PROTOCOL",
            Self::SaslUsername => "SASL_USERNAME",
            Self::SaslMethod => "SASL_METHOD",
            Self::SaslSender => "SASL_SENDER",
            Self::Phase => "USERMILTER_PHASE",
            Self::QueueId => "USERMILTER_QUEUE_ID",
            Self::Recipients => "USERMILTER_RECIPIENTS",
            Self::Size => "USERMILTER_SIZE",
            Self::Deadline => "USERMILTER_DEADLINE",
            Self::Smtputf8 => "USERMILTER_SMTPUTF8",
            Self::Tls => "USERMILTER_TLS",
            Self::Version => "USERMILTER_VERSION",
        }
    }
}

/// What a job's child says for itself, as long as it has not become the filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// Why the job was not done.
    Refusal(Refusal),
    /// What the user has.
    Inspection(Inspection),
    /// [`Question::Uid`]; `None`: there is no such user.
    Uid(Option<u32>),
    /// [`Question::Host`]
    Addresses(Vec<IpAddr>),
    /// [`Question::File`]: the file's bytes follow the report.
    File(Identity),
}

/// Why a filter was not run, or a user not inspected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// The user has no such filter any more.
    NoFilter,
    /// No such user.
    NoUser,
    /// Which check failed on what.
    Check(String),
}

/// What a user has in the filter directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inspection {
    /// The uid that filters run as.
    pub uid: u32,
    /// The home directory.
    pub home: PathBuf,
    /// Executables whose names begin with `recipient` or `message`.
    pub filters: Vec<FilterFile>,
    /// The site's program that is asked at RCPT TO if the user has none.
    pub fallback_recipient: Option<FilterFile>,
    /// The site's program that is asked about messages if the user has none.
    pub fallback_message: Option<FilterFile>,
    /// The rules file.
    pub rules: Option<RulesSource>,
    /// Why there is a rules file that can't be used.
    pub rules_problem: Option<String>,
    /// Whether verdicts are to be logged to the user's own log.
    pub log: bool,
}

impl Inspection {
    /// The filter that would run for an extension, if any.
    pub fn filter(&self, phase: Phase, extension: Option<&str>) -> Option<&FilterFile> {
        let candidates = if self.filters.is_empty() { Vec::new() } else { phase.candidates(extension) };
        let own = candidates.iter().find_map(|name| self.filters.iter().find(|file| &file.name == name));
        own.or(match phase {
            Phase::Recipient => self.fallback_recipient.as_ref(),
            Phase::Message => self.fallback_message.as_ref(),
        })
    }
}

/// A rules file and the sender files that it names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RulesSource {
    /// The text of `rules.toml`.
    pub text: String,
    /// Name and text of each sender file that exists.
    pub sender_files: Vec<(String, String)>,
}

/// One executable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterFile {
    /// Its name in the user's directory, as `message-shop`, or the path of the site's program.
    pub name: String,
    /// Why it will not be run, if a check fails.
    pub problem: Option<String>,
}

/// A packet or report that is none.
#[derive(Debug, thiserror::Error)]
#[error("malformed message of {length} bytes")]
pub struct Malformed {
    length: usize,
    source: postcard::Error,
}

/// Packs a message.
///
/// # Errors
///
/// [`Malformed`] if a value has no form on the wire, which no type here can bring about.
pub fn encode(message: &impl Serialize) -> Result<Vec<u8>, Malformed> {
    postcard::to_stdvec(message).map_err(|source| Malformed { length: 0, source })
}

/// Unpacks a message; nothing may follow it.
///
/// # Errors
///
/// [`Malformed`]
pub fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Malformed> {
    match decode_first(bytes)? {
        (message, []) => Ok(message),
        _ => Err(Malformed { length: bytes.len(), source: postcard::Error::DeserializeBadEncoding }),
    }
}

/// Unpacks a message, and what follows it.
///
/// # Errors
///
/// [`Malformed`]
pub fn decode_first<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<(T, &'a [u8]), Malformed> {
    postcard::take_from_bytes(bytes).map_err(|source| Malformed { length: bytes.len(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn extensions_choose_the_most_special_filter_and_never_leave_the_directory() {
        let names = |e| Phase::Message.candidates(e);
        assert_eq!(names(None), ["message"]);
        assert_eq!(names(Some("shop")), ["message-shop", "message-default", "message"]);
        assert_eq!(names(Some("../x")), ["message"]);
        assert_eq!(names(Some(".hidden")), ["message"]);
        assert_eq!(names(Some("a/b")), ["message"]);
    }

    #[test]
    fn a_message_with_something_behind_it_is_malformed() {
        let mut bytes = encode(&Request::Ready).unwrap();
        assert!(decode::<Request>(&bytes).is_ok());
        bytes.push(0);
        assert!(decode::<Request>(&bytes).is_err());
    }

    proptest! {
        #[test]
        fn what_a_worker_sends_is_what_the_monitor_reads(
            job in any::<JobId>(), name in "[a-z][a-z0-9@.]{0,20}", ids in any::<(u32, u32)>(), home in "/[^\0]{0,30}",
            extension in prop::option::of(any::<String>()), helo in any::<String>(), time_limit in any::<u64>(),
        ) {
            let account = crate::user::Account::Virtual { uid: ids.0, gid: ids.1, home: home.into() };
            let user = User { name: name.try_into().unwrap(), account, program: None };
            let variables = vec![(Variable::ClientHelo, helo.as_str())];
            let request = Request::Run { job, user, phase: Phase::Message, extension: extension.as_deref(), variables, time_limit };
            let bytes = encode(&request).unwrap();
            let read: Request = decode(&bytes).unwrap();
            prop_assert_eq!(format!("{read:?}"), format!("{request:?}"));
        }

        #[test]
        fn no_extension_leads_out_of_the_directory(extension in "[./\0a-]{0,6}|(?s).{0,12}") {
            for name in Phase::Message.candidates(Some(&extension)) {
                prop_assert!(name.starts_with("message") && !name.contains(['/', '\0']), "{:?}", name);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<Request>(&bytes);
            let _ = decode::<Event>(&bytes);
            let _ = decode::<Report>(&bytes);
        }
    }
}
