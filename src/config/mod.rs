//! The configuration: `usermilter.toml(5)`, read once by the monitor and handed to the worker as it is.
//!
//! [`Config::load`] is the only way to get one from a file; after it no code checks a setting again.

mod error;
pub mod ldap;
mod template;
mod text;
mod values;

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

pub use error::{ConfigError, Place};
use serde::Deserialize;
pub use text::KeyPlaces;
pub use values::{ByteSize, Control, FileMode, IdRange, Network, SocketAddress, Span};

pub use crate::rules::Mixed;
use crate::{rules::Rules, verdict::Verdict};

/// Where the configuration is looked for when `--config` names no other file.
pub const DEFAULT_PATH: &str = "/etc/usermilter/usermilter.toml";

/// Where the control socket is, unless the configuration says otherwise.
pub const DEFAULT_CONTROL: &str = "/run/usermilter/control.sock";

/// Everything that can be set. The field names are the keys, in kebab-case.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Config {
    /// Sockets and processes.
    pub server: Server,
    /// Which addresses are judged.
    pub recipients: Recipients,
    /// Who an address is, asked in order. Empty in the file means [`ResolverConfig::default`].
    #[serde(rename = "resolver")]
    pub resolvers: Vec<ResolverConfig>,
    /// How filters run.
    pub filter: Filter,
    /// How verdicts are combined.
    #[serde(rename = "verdict")]
    pub verdicts: Verdicts,
    /// What is logged.
    pub log: Log,
}

/// `[server]`
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Server {
    /// The worker's user when started as root.
    pub user: String,
    /// Milter listeners; none turns the interface off.
    pub milter: Vec<SocketAddress>,
    /// Policy listeners; none turns the interface off.
    pub policy: Vec<SocketAddress>,
    /// Where `usermilter status` asks.
    pub control: Control,
    /// Where `/metrics` and health checks are served; absent: nowhere.
    pub metrics: Option<SocketAddress>,
    /// Permissions of Unix sockets.
    pub socket_mode: FileMode,
    /// Group of Unix sockets; absent: the group of the process.
    pub socket_group: Option<String>,
    /// Connections at a time, per interface.
    pub max_connections: usize,
    /// How long a worker that leaves may take to finish what it has.
    pub drain_timeout: Span,
}

/// `[recipients]`
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Recipients {
    /// Domains whose addresses are ours.
    #[serde(deserialize_with = "domains")]
    pub domains: Vec<String>,
    /// Values of the milter macro `{rcpt_mailer}` that make an address ours whatever its domain.
    pub local_mailers: Vec<String>,
    /// Characters that separate an extension from a user's name.
    pub delimiters: String,
    /// aliases(5) sources.
    #[serde(deserialize_with = "absolute_paths")]
    pub aliases: Vec<PathBuf>,
    /// virtual(5) sources.
    #[serde(rename = "virtual", deserialize_with = "absolute_paths")]
    pub virtual_aliases: Vec<PathBuf>,
    /// Local parts (or whole addresses) that are always accepted.
    pub exempt: Vec<String>,
    /// What becomes of an address of ours that nobody has.
    pub unknown: Unknown,
    /// Clients whose mail is not judged.
    pub trusted_networks: Vec<Network>,
    /// Whether mail of authenticated clients is judged.
    pub judge_authenticated: bool,
    /// The site's rules.
    pub rules: Option<SiteRules>,
}

/// `recipients.unknown`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unknown {
    /// The MTA decides.
    Pass,
    /// `550 5.1.1`
    Reject,
}

/// `[[resolver]]`. Its key `type` is the name of the variant.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResolverConfig {
    /// The host's users, through NSS (getpwnam(3)).
    Passwd(PasswdConfig),
    /// A file of passwd(5) lines.
    PasswdFile(PasswdFileConfig),
    /// A directory.
    Ldap(Box<ldap::LdapConfig>),
}

/// `[[resolver]] type = "passwd"`
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct PasswdConfig {
    /// Users below exist, but are not judged.
    #[serde(default = "min_uid")]
    pub min_uid: u32,
}

/// `[[resolver]] type = "passwd-file"`
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct PasswdFileConfig {
    /// The file.
    pub path: PathBuf,
}

/// `[filter]`
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Filter {
    /// Directory under a user's home.
    #[serde(deserialize_with = "relative_path")]
    pub directory: PathBuf,
    /// Time limit of one filter.
    pub timeout: Span,
    /// Time limit of all filters of a transaction.
    pub deadline: Span,
    /// Time limit of a `recipient` executable. There is no way to tell an MTA at RCPT TO that an answer takes time:
    /// stay below Postfix's milter_command_timeout (30 s) and smtpd_policy_service_timeout (100 s), and Sendmail's
    /// time limit R (10 s by default).
    pub recipient_deadline: Span,
    /// What a filter error means.
    pub on_error: OnError,
    /// Filters don't run for larger messages, which are accepted.
    pub max_message: ByteSize,
    /// Filters running at a time.
    pub max_processes: usize,
    /// Filters of one user running at a time.
    pub max_processes_per_user: usize,
    /// How long what a user has is remembered.
    pub inspect_ttl: Span,
    /// Overrides of the exit status table.
    #[serde(deserialize_with = "exit_status")]
    pub exit_status: BTreeMap<u8, Verdict>,
    /// Where large messages are kept while they are judged.
    pub spool_directory: PathBuf,
    /// Messages up to this size stay in memory.
    pub memory_limit: ByteSize,
    /// Whether filters run with no_new_privs (prctl(2)).
    pub no_new_privileges: bool,
    /// RLIMIT_AS of a filter.
    pub max_memory: ByteSize,
    /// RLIMIT_CPU of a filter.
    pub max_cpu: Span,
    /// RLIMIT_NOFILE of a filter.
    pub max_open_files: u64,
    /// RLIMIT_FSIZE of a filter.
    pub max_file_size: ByteSize,
    /// RLIMIT_NPROC of a filter's user.
    pub max_user_processes: u64,
    /// Uids and gids that virtual users may have.
    pub virtual_uids: IdRange,
    /// Directories in which homes of virtual users may lie.
    #[serde(deserialize_with = "absolute_paths")]
    pub virtual_homes: Vec<PathBuf>,
    /// No filter runs as a user below.
    pub min_uid: u32,
    /// Where programs lie, owned by root, that a directory entry may name as a user's filter.
    #[serde(deserialize_with = "absolute_paths")]
    pub program_directories: Vec<PathBuf>,
    /// The message filter of users who have none of their own, owned by root.
    #[serde(deserialize_with = "absolute_path")]
    pub default_message: Option<PathBuf>,
    /// The `recipient` executable of users who have none of their own, owned by root.
    #[serde(deserialize_with = "absolute_path")]
    pub default_recipient: Option<PathBuf>,
    /// Line endings of what a filter reads.
    pub line_endings: LineEndings,
    /// Whether Return-Path and Received are put on top.
    pub trace_headers: bool,
}

/// `filter.on-error` and its likes: what our own trouble means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// Let the mail in.
    Accept,
    /// Ask the client to come again.
    Defer,
}

impl OnError {
    /// The verdict that the setting stands for.
    pub fn verdict(self) -> Verdict {
        match self {
            Self::Accept => Verdict::Accept,
            Self::Defer => Verdict::Defer,
        }
    }
}

/// `filter.line-endings`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LineEndings {
    /// As Unix programs expect.
    Lf,
    /// As on the wire.
    Crlf,
}

/// `[verdict]`
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Verdicts {
    /// What becomes of refusers' copies when others accept; users may wish for less.
    pub mixed: Mixed,
    /// The extension of addresses that refusers' copies are redirected to.
    #[serde(deserialize_with = "extension")]
    pub redirect_extension: String,
    /// Whether recipients who filter differently are taken one at a time.
    pub split: Split,
}

/// `verdict.split`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// Recipients are taken as they come.
    Never,
    /// One filter per transaction: other recipients are put off with `452 4.5.3`.
    Always,
}

/// `recipients.rules`: the site's own rules, asked before any user's.
#[derive(Clone, Debug)]
pub struct SiteRules {
    /// The file; sender files are looked for beside it.
    pub path: PathBuf,
    /// What is in it; empty until [`Config::load`] has read it.
    pub compiled: Arc<Rules>,
}

impl<'de> Deserialize<'de> for SiteRules {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self { path: PathBuf::deserialize(deserializer)?, compiled: Arc::default() })
    }
}

impl SiteRules {
    fn read(&mut self) -> Result<(), ConfigError> {
        let read_error = |path: &Path, source| ConfigError::NamedFile { path: path.into(), source };
        let text = fs::read_to_string(&self.path).map_err(|source| read_error(&self.path, source))?;
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        let mut unreadable = None;
        let compiled = Rules::parse(&text, |name| {
            let path = directory.join(name);
            match fs::read_to_string(&path) {
                Ok(text) => Some(text),
                Err(source) => {
                    unreadable.get_or_insert(read_error(&path, source));
                    None
                }
            }
        });
        match (compiled, unreadable) {
            (_, Some(error)) => Err(error),
            (Ok(rules), None) => {
                self.compiled = Arc::new(rules);
                Ok(())
            }
            (Err(error), None) => Err(ConfigError::Invalid {
                place: Place { path: self.path.clone(), line: error.line, column: error.column },
                message: error.message,
            }),
        }
    }
}

/// `[log]`
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Log {
    /// The least important kind of line that is written.
    pub level: LogLevel,
    /// The form of lines on standard error.
    pub format: LogFormat,
}

/// `log.level`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogLevel {
    /// Something must be done.
    Error,
    /// Something is odd.
    Warn,
    /// A line per transaction.
    Info,
    /// A line per step.
    Debug,
    /// Everything, including protocol frames.
    Trace,
}

/// `log.format`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// For people and grep.
    Text,
    /// One JSON object a line.
    Json,
}

impl ResolverConfig {
    /// The value of `type`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Passwd(_) => "passwd",
            Self::PasswdFile(_) => "passwd-file",
            Self::Ldap(_) => "ldap",
        }
    }
}

impl Config {
    /// Reads the file, or the built-in defaults when `path` is `None` and [`DEFAULT_PATH`] does not exist.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], with the place of the fault.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let mut config = Self::read(path)?;
        if let Some(rules) = &mut config.recipients.rules {
            rules.read()?;
        }
        for resolver in &mut config.resolvers {
            if let ResolverConfig::Ldap(ldap) = resolver {
                ldap.load_secrets()?;
            }
        }
        Ok(config)
    }

    /// As [`Config::load`], without the site's rules and the directories whose files the calling user may not read.
    ///
    /// # Errors
    ///
    /// As [`Config::load`].
    pub fn load_readable(path: Option<&Path>) -> Result<Self, ConfigError> {
        let mut config = Self::read(path)?;
        let readable = |outcome: Result<(), ConfigError>| match outcome {
            Err(error) if error.is_forbidden() => Ok(false),
            other => other.map(|()| true),
        };
        if let Some(rules) = &mut config.recipients.rules
            && !readable(rules.read())?
        {
            config.recipients.rules = None;
        }
        let mut resolvers = Vec::new();
        for mut resolver in config.resolvers {
            let usable = match &mut resolver {
                ResolverConfig::Ldap(ldap) => readable(ldap.load_secrets().map_err(ConfigError::from))?,
                ResolverConfig::Passwd(_) | ResolverConfig::PasswdFile(_) => true,
            };
            resolvers.extend(usable.then_some(resolver));
        }
        Ok(Self { resolvers, ..config })
    }

    fn read(path: Option<&Path>) -> Result<Self, ConfigError> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        match fs::read_to_string(file) {
            Ok(text) => Self::parse(&text, file),
            Err(error) if path.is_none() && error.kind() == io::ErrorKind::NotFound => Self::parse("", file),
            Err(source) => Err(ConfigError::Read { path: file.into(), source }),
        }
    }

    /// Reads the text of a configuration, and no other file; `path` is for messages.
    ///
    /// # Errors
    ///
    /// As [`Config::load`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = text::read(text, path)?;
        if config.resolvers.is_empty() {
            config.resolvers.push(ResolverConfig::default());
        }
        Ok(config)
    }

    /// As [`Config::load`], but finds every fault, in the order of the file.
    pub fn faults(path: Option<&Path>) -> Vec<ConfigError> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        let text = fs::read_to_string(file).unwrap_or_default();
        let mut faults = text::faults::<Self>(&text, file);
        if !faults.is_empty() {
            return faults;
        }
        let mut config = match Self::read(path) {
            Ok(config) => config,
            Err(error) => return vec![error],
        };
        // What is wrong with the files that it names.
        let places = KeyPlaces::of(&text, file);
        if let Some(Err(error)) = config.recipients.rules.as_mut().map(SiteRules::read) {
            faults.push(error.at(places.nearest("recipients.rules")));
        }
        for (number, resolver) in config.resolvers.iter_mut().enumerate() {
            if let ResolverConfig::Ldap(ldap) = resolver
                && let Err(error) = ldap.load_secrets()
            {
                let is_password = ldap.password_file.as_deref() == Some(error.path());
                let key = if is_password { "password-file" } else { "ca-file" };
                let place = places.nearest(&format!("resolver.{number}.{key}"));
                faults.push(ConfigError::from(error).at(place));
            }
        }
        faults
    }
}

impl Default for Server {
    fn default() -> Self {
        Self {
            user: "usermilter".into(),
            milter: vec![SocketAddress::Inet(([127, 0, 0, 1], 8890).into())],
            policy: vec![SocketAddress::Inet(([127, 0, 0, 1], 8891).into())],
            control: Control(Some(DEFAULT_CONTROL.into())),
            metrics: None,
            socket_mode: FileMode(0o660),
            socket_group: None,
            max_connections: 1000,
            drain_timeout: Span(Duration::from_secs(300)),
        }
    }
}

impl Default for Recipients {
    fn default() -> Self {
        let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
        let mut domains: Vec<String> =
            host.and_then(|h| crate::address::normalize_domain(&h)).into_iter().collect();
        domains.push("localhost".into());
        Self {
            domains,
            local_mailers: vec!["local".into()],
            delimiters: "+".into(),
            aliases: Vec::new(),
            virtual_aliases: Vec::new(),
            exempt: vec!["postmaster".into(), "abuse".into()],
            unknown: Unknown::Pass,
            trusted_networks: ["127.0.0.0/8", "::1"].iter().filter_map(|n| n.parse().ok()).collect(),
            judge_authenticated: false,
            rules: None,
        }
    }
}

impl Default for ResolverConfig {
    fn default() -> Self {
        Self::Passwd(PasswdConfig { min_uid: min_uid() })
    }
}

impl Default for Filter {
    fn default() -> Self {
        Self {
            directory: ".usermilter".into(),
            timeout: Span(Duration::from_secs(60)),
            deadline: Span(Duration::from_secs(240)),
            recipient_deadline: Span(Duration::from_secs(25)),
            on_error: OnError::Accept,
            max_message: ByteSize(50 << 20),
            max_processes: 64,
            max_processes_per_user: 4,
            inspect_ttl: Span(Duration::from_secs(5)),
            exit_status: BTreeMap::new(),
            spool_directory: "/var/spool/usermilter".into(),
            memory_limit: ByteSize(1 << 20),
            no_new_privileges: true,
            max_memory: ByteSize(1 << 30),
            max_cpu: Span(Duration::from_secs(60)),
            max_open_files: 256,
            max_file_size: ByteSize(100 << 20),
            max_user_processes: 64,
            virtual_uids: IdRange { first: 5000, last: 5999 },
            virtual_homes: vec!["/var/vmail".into()],
            min_uid: min_uid(),
            program_directories: vec!["/usr/lib/usermilter/filters".into()],
            default_message: None,
            default_recipient: None,
            line_endings: LineEndings::Lf,
            trace_headers: true,
        }
    }
}

impl Default for Verdicts {
    fn default() -> Self {
        Self { mixed: Mixed::Deliver, redirect_extension: "junk".into(), split: Split::Never }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { level: LogLevel::Info, format: LogFormat::Text }
    }
}

fn min_uid() -> u32 {
    1000
}

fn domains<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let names = Vec::<String>::deserialize(deserializer)?;
    names
        .into_iter()
        .map(|name| {
            crate::address::normalize_domain(&name)
                .ok_or_else(|| serde::de::Error::custom(format!("\"{name}\" is no domain name")))
        })
        .collect()
}

fn relative_path<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let path = PathBuf::deserialize(deserializer)?;
    let plain = path.components().all(|c| matches!(c, std::path::Component::Normal(_)));
    if plain && path.components().next().is_some() {
        Ok(path)
    } else {
        Err(serde::de::Error::custom("expected a path below the user's home, without \"..\""))
    }
}

fn absolute_paths<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
    let paths = Vec::<PathBuf>::deserialize(deserializer)?;
    match paths.iter().find(|path| !path.is_absolute()) {
        None => Ok(paths),
        Some(path) => {
            Err(serde::de::Error::custom(format!("\"{}\": expected an absolute path", path.display())))
        }
    }
}

fn absolute_path<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let path = PathBuf::deserialize(deserializer)?;
    if path.is_absolute() {
        Ok(Some(path))
    } else {
        Err(serde::de::Error::custom(format!("\"{}\": expected an absolute path", path.display())))
    }
}

fn extension<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let extension = String::deserialize(deserializer)?;
    let bad = |c: char| c.is_control() || c.is_whitespace() || matches!(c, '/' | '@');
    if extension.is_empty() || extension.starts_with('.') || extension.contains(bad) {
        Err(serde::de::Error::custom(format!("\"{extension}\" is no extension of an address")))
    } else {
        Ok(extension)
    }
}

fn exit_status<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<u8, Verdict>, D::Error> {
    let table = BTreeMap::<String, Verdict>::deserialize(deserializer)?;
    table
        .into_iter()
        .map(|(status, verdict)| match status.parse() {
            Ok(status) => Ok((status, verdict)),
            Err(_) => {
                Err(serde::de::Error::custom(format!("\"{status}\" is no exit status: expected 0 to 255")))
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(text: &str) -> String {
        Config::parse(text, Path::new("usermilter.toml")).unwrap_err().to_string()
    }

    #[test]
    fn an_empty_file_gives_the_documented_defaults() {
        let config = Config::parse("", Path::new("x")).unwrap();
        assert_eq!(config.server.milter[0].to_string(), "inet:127.0.0.1:8890");
        assert_eq!(config.server.policy[0].to_string(), "inet:127.0.0.1:8891");
        assert_eq!(config.filter.timeout.0.as_secs(), 60);
        assert_eq!(config.resolvers.len(), 1);
        assert!(config.recipients.domains.contains(&"localhost".to_owned()));
    }

    #[test]
    fn every_fault_has_file_line_and_column() {
        assert!(
            fault("[server]\nmilter = [\"inet:x\"]\n").starts_with("usermilter.toml:2:10: socket address")
        );
        assert!(fault("[server]\n  colour = 1\n").starts_with("usermilter.toml:2:3: "));
        assert!(fault("[filter]\ntimeout = \"5\"").contains(":2:11: time \"5\""));
        assert!(fault("[filter]\ndirectory = \"../x\"").contains(":2:13: "));
        assert!(fault("[filter]\nvirtual-uids = [0, 5]").contains(":2:16: range"));
        assert!(fault("[filter]\nexit-status = { 300 = \"reject\" }").contains(":2:15: \"300\""));
        assert!(fault("nonsense").starts_with("usermilter.toml:1:"));
        assert!(fault("[[resolver]]\ntype = \"nis\"").contains(":2:8: unknown variant `nis`"));
        assert!(fault("[[resolver]]\nmin-uid = 1").contains(":1:1: missing field `type`"));
        assert!(fault("[[resolver]]\ntype = 1").contains(":2:8: "));
        assert!(fault("resolver = 1").contains(":1:12: "));
        let passwd = "[[resolver]]\nmin-uid = 1\ntype = \"passwd\"\n";
        assert!(fault(&format!("{passwd}colour = 1")).contains(":4:1: "));
        assert!(
            fault(&format!("{passwd}[[resolver]]\ntype = \"passwd-file\"")).contains(":4:1: missing field")
        );
        let ldap = "[[resolver]]\ntype = \"ldap\"\nuri = [\"ldap://x\"]\nbase = \"x\"\n";
        assert!(fault(&format!("{ldap}filter = \"(uid=%x)\"")).contains(":5:10: \"(uid=%x)\""));
        assert!(fault(&format!("{ldap}sasl = \"gssapi\"")).contains(":5:8: unknown variant"));
    }

    #[test]
    fn exit_statuses_can_be_overridden() {
        let config =
            Config::parse("[filter]\nexit-status = { 1 = \"reject\", 2 = \"defer\" }", Path::new("x"))
                .unwrap();
        assert_eq!(config.filter.exit_status, BTreeMap::from([(1, Verdict::Reject), (2, Verdict::Defer)]));
    }
}
