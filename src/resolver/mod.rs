//! Which users an address means.
//!
//! Aliases first, as the MTA does it; then the resolvers in the order of the configuration, the full local part
//! before the part in front of a delimiter. "Nobody has this address" and "could not ask" are different answers
//! all the way.

pub mod aliases;
pub mod ldap;
mod passwd;
pub mod passwd_file;
pub mod source;

use std::{
    borrow::Cow,
    collections::{HashSet, VecDeque},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    address::Address,
    config::{Config, OnError, ResolverConfig},
    inquiry::Inquiry,
    metrics::{AnswerSource, ResolverMetrics},
    rules::Rules,
    user::{Account, User, UserName},
};
use aliases::{Aliases, Leaf};
use ldap::{LdapAnswer, LdapResolver, ServerState};
use passwd::Passwd;
use passwd_file::PasswdFile;

/// The users of an address.
#[derive(Clone, Debug, Default)]
pub struct Resolution {
    /// Those who can be asked.
    pub users: Vec<ResolvedUser>,
    /// Why somebody who gets the mail can't be asked, if there is such a one. They count as accepting.
    pub unjudged: Option<String>,
}

impl Resolution {
    /// Whether nobody has the address.
    pub fn is_nobody(&self) -> bool {
        self.users.is_empty() && self.unjudged.is_none()
    }

    fn unjudged(why: impl Into<String>) -> Self {
        Self { users: Vec::new(), unjudged: Some(why.into()) }
    }
}

/// One user, and by which address.
#[derive(Clone, Debug)]
pub struct ResolvedUser {
    /// The user.
    pub user: User,
    /// The final address: after aliases, with its extension.
    pub address: Address,
    /// The extension that was not part of the user's name, in lower case.
    pub extension: Option<String>,
    /// The user's lists of senders in the directory.
    pub directory_rules: Option<Arc<Rules>>,
}

/// A resolver could not be asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{resolver}: {reason}")]
pub struct Unavailable {
    /// Which one.
    pub resolver: String,
    /// Why.
    pub reason: String,
    /// What the configuration says of it; `None`: what it says of filter errors.
    pub on_error: Option<OnError>,
}

/// All resolvers of a configuration.
#[derive(Debug)]
pub struct Chain {
    aliases: Aliases,
    resolvers: Vec<Resolver>,
    inquiry: Inquiry,
    domains: Vec<String>,
    delimiters: String,
}

/// The files of a configuration, read before a worker confines itself.
#[derive(Debug)]
pub struct Files {
    aliases: Aliases,
    /// In the order of their resolvers.
    passwd_files: Vec<(PathBuf, PasswdFile)>,
}

#[derive(Debug)]
struct Resolver {
    kind: Kind,
    metrics: ResolverMetrics,
}

#[derive(Debug)]
enum Kind {
    Passwd(Passwd),
    PasswdFile(PathBuf, PasswdFile),
    Ldap(String, Box<LdapResolver>),
}

/// What one resolver says of one name.
enum Lookup {
    User(User, Option<Arc<Rules>>),
    Unjudged(String),
    Forward(Vec<Address>),
    NotFound,
}

/// What one address leads to.
enum Found {
    Resolution(Resolution),
    Forward(Vec<Address>),
}

/// One step of a resolution, for people who want to see how it comes about.
#[derive(Clone, Debug)]
pub enum Step {
    /// An alias stands for other addresses.
    Alias {
        /// The address.
        address: Address,
        /// `path:line`
        origin: String,
        /// What it stands for.
        targets: Vec<String>,
    },
    /// An address that is not ours, or a command or file, whom nobody can ask.
    Unjudged(String),
    /// A resolver was asked.
    Asked {
        /// Which one.
        resolver: String,
        /// About which name.
        name: String,
        /// What it said, and from where.
        said: String,
        /// How long that took.
        elapsed: Duration,
    },
}

/// Whoever wants to hear of steps. Mostly nobody does, and then none is made up.
struct Trace<'a>(Option<&'a mut (dyn FnMut(Step) + Send)>);

impl Trace<'_> {
    fn is_heard(&self) -> bool {
        self.0.is_some()
    }

    fn tell(&mut self, step: impl FnOnce() -> Step) {
        if let Some(tell) = &mut self.0 {
            tell(step());
        }
    }
}

/// Most addresses that directory entries may lead to, and loops among them.
const MAX_FORWARDS: usize = 1000;

impl Files {
    /// Reads them.
    pub fn open(config: &Config) -> Self {
        let passwd_files = config.resolvers.iter().filter_map(|resolver| match resolver {
            ResolverConfig::PasswdFile(file) => Some((file.path.clone(), PasswdFile::open(&file.path))),
            ResolverConfig::Passwd(_) | ResolverConfig::Ldap(_) => None,
        });
        Self {
            passwd_files: passwd_files.collect(),
            aliases: Aliases::open(&config.recipients.aliases, &config.recipients.virtual_aliases),
        }
    }

    /// `:include:` files, whose paths are in the texts of others.
    pub fn included(&self) -> Vec<PathBuf> {
        self.aliases.included_files()
    }
}

impl Chain {
    /// Opens the resolvers of a configuration, for a process that asks the system itself.
    pub fn open(config: &Config) -> Self {
        Self::new(config, Files::open(config), Inquiry::Direct, &[])
    }

    /// The resolvers of a configuration whose files have been read. `metrics`: where each is counted, or none.
    pub fn new(config: &Config, files: Files, inquiry: Inquiry, metrics: &[ResolverMetrics]) -> Self {
        let metrics = metrics.iter().cloned().chain(std::iter::repeat_with(ResolverMetrics::default));
        let mut passwd_files = files.passwd_files.into_iter();
        let numbered = config.resolvers.iter().enumerate().zip(metrics);
        let resolvers = numbered.filter_map(|((number, config), metrics)| {
            let kind = match config {
                ResolverConfig::Passwd(config) => {
                    Kind::Passwd(Passwd::new(inquiry.clone(), config.min_uid, metrics.latency.clone()))
                }
                ResolverConfig::PasswdFile(_) => {
                    let (path, file) = passwd_files.next()?;
                    Kind::PasswdFile(path, file)
                }
                ResolverConfig::Ldap(config) => {
                    let servers: Vec<_> = config.uri.iter().map(ToString::to_string).collect();
                    let hosts = inquiry.hosts(number);
                    let resolver = LdapResolver::counted((**config).clone(), hosts, metrics.clone());
                    Kind::Ldap(servers.join(" "), Box::new(resolver))
                }
            };
            Some(Resolver { kind, metrics })
        });
        let resolvers = resolvers.collect();
        let recipients = &config.recipients;
        Self {
            aliases: files.aliases,
            resolvers,
            inquiry,
            domains: recipients.domains.clone(),
            delimiters: recipients.delimiters.clone(),
        }
    }

    /// Each resolver's name for messages, and what is known of the servers that it asks.
    pub fn states(&self) -> impl Iterator<Item = (String, Vec<ServerState>)> {
        self.resolvers.iter().map(|resolver| {
            let servers = match &resolver.kind {
                Kind::Ldap(_, ldap) => ldap.server_states(),
                Kind::Passwd(_) | Kind::PasswdFile(..) => Vec::new(),
            };
            (resolver.label(), servers)
        })
    }

    /// Re-reads files that have changed. Blocks; to be called about once a second.
    pub fn refresh(&self) {
        self.aliases.refresh_by(&self.inquiry);
        for resolver in &self.resolvers {
            if let Kind::PasswdFile(_, file) = &resolver.kind {
                file.refresh_by(&self.inquiry);
            }
        }
    }

    /// The users of an address. `is_local`: the MTA says that it delivers here, whatever the domain.
    ///
    /// # Errors
    ///
    /// [`Unavailable`] if a source that might know the address could not be asked.
    pub async fn resolve(&self, address: &Address, is_local: bool) -> Result<Resolution, Unavailable> {
        self.trace(address, is_local, &mut Trace(None)).await
    }

    /// As [`Chain::resolve`], and tells every step.
    ///
    /// # Errors
    ///
    /// As [`Chain::resolve`].
    pub async fn resolve_with(
        &self,
        address: &Address,
        is_local: bool,
        tell: &mut (dyn FnMut(Step) + Send),
    ) -> Result<Resolution, Unavailable> {
        self.trace(address, is_local, &mut Trace(Some(tell))).await
    }

    async fn trace(
        &self,
        address: &Address,
        is_local: bool,
        trace: &mut Trace<'_>,
    ) -> Result<Resolution, Unavailable> {
        let is_ours = |other: &Address| (is_local && other == address) || self.is_our_domain(other);
        let mut all = Resolution::default();
        // What directory entries have led to; most addresses lead to a user at once.
        let mut seen = HashSet::new();
        let mut queue = VecDeque::new();
        let mut next = Some(Cow::Borrowed(address));
        while let Some(current) = next {
            let expansion = self.aliases.expand(&current, is_ours, &self.delimiters);
            // A target that nobody has is its owner's mistake, and no reason to refuse the others' mail.
            let is_target = !expansion.steps.is_empty() || *current != *address;
            for step in expansion.steps {
                trace.tell(|| {
                    let targets = step.targets.iter().map(ToString::to_string).collect();
                    Step::Alias { address: step.address, origin: step.origin, targets }
                });
            }
            for leaf in expansion.leaves {
                let found = match leaf {
                    Leaf::Address(leaf) if is_ours(&leaf) => self.look_up(leaf, trace).await?,
                    Leaf::Address(leaf) => {
                        Found::Resolution(Resolution::unjudged(format!("{leaf} is not ours")))
                    }
                    Leaf::Unjudged(why) => Found::Resolution(Resolution::unjudged(why)),
                    Leaf::Unavailable(reason) => {
                        return Err(Unavailable { resolver: "aliases".into(), reason, on_error: None });
                    }
                };
                match found {
                    Found::Resolution(one) if is_target && one.is_nobody() => {
                        all.add(Resolution::unjudged("alias target is unknown"), trace);
                    }
                    Found::Resolution(mut one) => {
                        // As local(8) has it: what an alias says without a domain is in the domain of the alias.
                        one.users.iter_mut().for_each(|user| user.address.qualify_like(address));
                        all.add(one, trace);
                    }
                    Found::Forward(targets) => {
                        seen.insert(current.key());
                        if seen.len() + targets.len() > MAX_FORWARDS {
                            all.add(Resolution::unjudged("too many forward addresses"), trace);
                        } else {
                            queue.extend(targets.into_iter().filter(|target| seen.insert(target.key())));
                        }
                    }
                }
            }
            next = queue.pop_front().map(Cow::Owned);
        }
        if all.is_nobody() && !seen.is_empty() {
            all.add(Resolution::unjudged("forward addresses lead in a circle"), trace);
        }
        Ok(all)
    }

    /// Whether the address has one of our domains, or none.
    pub fn is_our_domain(&self, address: &Address) -> bool {
        address.domain().is_none_or(|domain| self.domains.iter().any(|ours| ours == domain))
    }

    async fn look_up(&self, address: Address, trace: &mut Trace<'_>) -> Result<Found, Unavailable> {
        let (base, extension) = address.split_extension(&self.delimiters);
        let whole = (address.local(), None);
        let candidates = std::iter::once(whole).chain(extension.map(|extension| (base, Some(extension))));
        for (local, extension) in candidates {
            let is_lower = |byte: u8| byte.is_ascii() && !byte.is_ascii_uppercase();
            let name = if local.len() == address.local().len() && local.bytes().all(is_lower) {
                Cow::Borrowed(&address)
            } else {
                Cow::Owned(address.with_local(local.to_lowercase()))
            };
            for resolver in &self.resolvers {
                let started = trace.is_heard().then(Instant::now);
                let answer = resolver.lookup(&name).await;
                trace.tell(|| Step::Asked {
                    resolver: resolver.label(),
                    name: name.to_string(),
                    said: Lookup::shown(&answer),
                    elapsed: started.map_or(Duration::ZERO, |started| started.elapsed()),
                });
                match answer?.0 {
                    Lookup::NotFound => (),
                    Lookup::Forward(targets) => return Ok(Found::Forward(targets)),
                    Lookup::Unjudged(why) => return Ok(Found::Resolution(Resolution::unjudged(why))),
                    Lookup::User(user, directory_rules) => {
                        let extension = extension.map(str::to_lowercase);
                        drop(name);
                        let user = ResolvedUser { user, address, extension, directory_rules };
                        return Ok(Found::Resolution(Resolution { users: vec![user], unjudged: None }));
                    }
                }
            }
        }
        Ok(Found::Resolution(Resolution::default()))
    }
}

impl Resolution {
    fn add(&mut self, other: Self, trace: &mut Trace<'_>) {
        if self.users.is_empty() {
            self.users = other.users;
        } else {
            self.add_users(other.users);
        }
        if let Some(why) = other.unjudged {
            trace.tell(|| Step::Unjudged(why.clone()));
            self.unjudged.get_or_insert(why);
        }
    }

    fn add_users(&mut self, users: Vec<ResolvedUser>) {
        for user in users {
            let same = |known: &ResolvedUser| known.user == user.user && known.extension == user.extension;
            if !self.users.iter().any(same) {
                self.users.push(user);
            }
        }
    }
}

impl Lookup {
    fn shown(answer: &Result<(Self, AnswerSource), Unavailable>) -> String {
        let source = match answer {
            Ok((_, AnswerSource::Cache)) => " (from cache)",
            Ok((_, AnswerSource::Stale)) => " (stale: no server answers)",
            _ => "",
        };
        match answer {
            Ok((Self::User(user, _), _)) => format!("user {}{source}", user.name),
            Ok((Self::Unjudged(why), _)) => format!("{why}{source}"),
            Ok((Self::Forward(targets), _)) => {
                let targets: Vec<_> = targets.iter().map(ToString::to_string).collect();
                format!("forward to {}{source}", targets.join(", "))
            }
            Ok((Self::NotFound, _)) => format!("not found{source}"),
            Err(unavailable) => format!("could not be asked: {}", unavailable.reason),
        }
    }
}

impl Resolver {
    /// The name for messages.
    fn label(&self) -> String {
        match &self.kind {
            Kind::Passwd(_) => "passwd".into(),
            Kind::PasswdFile(path, _) => format!("passwd-file {}", path.display()),
            Kind::Ldap(servers, _) => format!("ldap {servers}"),
        }
    }

    /// The answer, and where it comes from. Counts it.
    async fn lookup(&self, name: &Address) -> Result<(Lookup, AnswerSource), Unavailable> {
        let answer = self.ask(name).await;
        let source = answer.as_ref().map_or(AnswerSource::Unavailable, |(_, source)| *source);
        self.metrics.lookups.of(source).inc();
        answer
    }

    async fn ask(&self, name: &Address) -> Result<(Lookup, AnswerSource), Unavailable> {
        let unavailable =
            |reason: String| Err(Unavailable { resolver: self.label(), reason, on_error: None });
        match &self.kind {
            Kind::Passwd(passwd) => {
                let Ok(user) = UserName::try_from(name.local().to_owned()) else {
                    return Ok((Lookup::NotFound, AnswerSource::Cache));
                };
                match passwd.lookup(&user).await {
                    Ok((passwd::Answer::Found, source)) => {
                        let user = User { name: user, account: Account::Passwd, program: None };
                        Ok((Lookup::User(user, None), source))
                    }
                    Ok((passwd::Answer::System, source)) => {
                        Ok((Lookup::Unjudged(format!("{user} is a system account")), source))
                    }
                    Ok((passwd::Answer::NotFound, source)) => Ok((Lookup::NotFound, source)),
                    Err(error) => unavailable(error.to_string()),
                }
            }
            Kind::PasswdFile(_, file) => match file.lookup(name) {
                passwd_file::Answer::Found(user) => Ok((Lookup::User(user, None), AnswerSource::File)),
                passwd_file::Answer::NotFound => Ok((Lookup::NotFound, AnswerSource::File)),
                passwd_file::Answer::Unavailable(reason) => unavailable(reason),
            },
            Kind::Ldap(_, ldap) => match ldap.lookup_with_source(name).await {
                Ok((answer, source)) => {
                    let lookup = match &*answer {
                        LdapAnswer::Found(found) => Lookup::User(found.user.clone(), found.rules.clone()),
                        LdapAnswer::Forward(targets) => Lookup::Forward(targets.clone()),
                        LdapAnswer::NotFound => Lookup::NotFound,
                    };
                    let source = match source {
                        ldap::Source::Server => AnswerSource::Asked,
                        ldap::Source::Cache => AnswerSource::Cache,
                        ldap::Source::Stale => AnswerSource::Stale,
                    };
                    Ok((lookup, source))
                }
                Err(error) => {
                    let on_error = Some(ldap.on_error());
                    Err(Unavailable { resolver: self.label(), reason: error.reason, on_error })
                }
            },
        }
    }
}
