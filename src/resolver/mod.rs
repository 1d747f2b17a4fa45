//! Which users an address means.
//!
//! Aliases first, as the MTA does it; then the resolvers in the order of the configuration, the full local part
//! before the part in front of a delimiter. "Nobody has this address" and "could not ask" are different answers
//! all the way.

pub mod aliases;
mod passwd;
pub mod passwd_file;
pub mod source;

use std::sync::Arc;

use crate::{
    address::Address,
    config::{OnError, Recipients, ResolverConfig},
    rules::Rules,
    user::{Account, User, UserName},
};
use aliases::{Aliases, Leaf};
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
    domains: Vec<String>,
    delimiters: String,
}

#[derive(Debug)]
enum Resolver {
    Passwd(Passwd),
    PasswdFile(PasswdFile),
}

/// What one resolver says of one name.
enum Lookup {
    User(User, Option<Arc<Rules>>),
    Unjudged(String),
    NotFound,
}

impl Chain {
    /// Opens the resolvers of a configuration.
    pub fn new(resolvers: &[ResolverConfig], recipients: &Recipients) -> Self {
        let resolvers = resolvers
            .iter()
            .map(|config| match config {
                ResolverConfig::Passwd { min_uid } => Resolver::Passwd(Passwd::new(*min_uid)),
                ResolverConfig::PasswdFile { path } => Resolver::PasswdFile(PasswdFile::open(path)),
            })
            .collect();
        Self {
            aliases: Aliases::open(&recipients.aliases, &recipients.virtual_aliases),
            resolvers,
            domains: recipients.domains.clone(),
            delimiters: recipients.delimiters.clone(),
        }
    }

    /// Re-reads files that have changed. Blocks; to be called about once a second.
    pub fn refresh(&self) {
        self.aliases.refresh();
        for resolver in &self.resolvers {
            if let Resolver::PasswdFile(file) = resolver {
                file.refresh();
            }
        }
    }

    /// The users of an address. `is_local`: the MTA says that it delivers here, whatever the domain.
    ///
    /// # Errors
    ///
    /// [`Unavailable`] if a source that might know the address could not be asked.
    pub async fn resolve(&self, address: &Address, is_local: bool) -> Result<Resolution, Unavailable> {
        let is_ours = |other: &Address| (is_local && other == address) || self.is_our_domain(other);
        let expansion = self.aliases.expand(address, is_ours, &self.delimiters);
        let is_alias = !expansion.steps.is_empty();
        let mut all = Resolution::default();
        for leaf in expansion.leaves {
            let one = match leaf {
                Leaf::Address(leaf) if is_ours(&leaf) => self.look_up(&leaf).await?,
                Leaf::Address(leaf) => Resolution::unjudged(format!("{leaf} is not ours")),
                Leaf::Unjudged(why) => Resolution::unjudged(why),
                Leaf::Unavailable(reason) => {
                    return Err(Unavailable { resolver: "aliases".into(), reason, on_error: None });
                }
            };
            // A target that nobody has is the alias owner's mistake, and no reason to refuse the others' mail.
            let one = if is_alias && one.is_nobody() {
                Resolution::unjudged("alias target is unknown")
            } else {
                one
            };
            for user in one.users {
                if !all.users.iter().any(|known| known.user == user.user && known.extension == user.extension)
                {
                    all.users.push(user);
                }
            }
            all.unjudged = all.unjudged.or(one.unjudged);
        }
        Ok(all)
    }

    /// Whether the address has one of our domains, or none.
    pub fn is_our_domain(&self, address: &Address) -> bool {
        address.domain().is_none_or(|domain| self.domains.iter().any(|ours| ours == domain))
    }

    async fn look_up(&self, address: &Address) -> Result<Resolution, Unavailable> {
        let (base, extension) = address.split_extension(&self.delimiters);
        let whole = (address.local(), None);
        let candidates = std::iter::once(whole).chain(extension.map(|extension| (base, Some(extension))));
        for (local, extension) in candidates {
            for resolver in &self.resolvers {
                match resolver.lookup(&local.to_lowercase(), address.domain()).await? {
                    Lookup::NotFound => (),
                    Lookup::Unjudged(why) => return Ok(Resolution::unjudged(why)),
                    Lookup::User(user, directory_rules) => {
                        let extension = extension.map(str::to_lowercase);
                        let user =
                            ResolvedUser { user, address: address.clone(), extension, directory_rules };
                        return Ok(Resolution { users: vec![user], unjudged: None });
                    }
                }
            }
        }
        Ok(Resolution::default())
    }
}

impl Resolver {
    async fn lookup(&self, local: &str, domain: Option<&str>) -> Result<Lookup, Unavailable> {
        let unavailable = |resolver: &str, reason: String| {
            Err(Unavailable { resolver: resolver.into(), reason, on_error: None })
        };
        match self {
            Self::Passwd(passwd) => {
                let Ok(name) = UserName::try_from(local.to_owned()) else {
                    return Ok(Lookup::NotFound);
                };
                match passwd.lookup(local).await {
                    Ok(passwd::Answer::Found) => {
                        Ok(Lookup::User(User { name, account: Account::Passwd, program: None }, None))
                    }
                    Ok(passwd::Answer::System) => {
                        Ok(Lookup::Unjudged(format!("{local} is a system account")))
                    }
                    Ok(passwd::Answer::NotFound) => Ok(Lookup::NotFound),
                    Err(error) => unavailable("passwd", error.to_string()),
                }
            }
            Self::PasswdFile(file) => match file.lookup(local, domain) {
                passwd_file::Answer::Found(entry) => match UserName::try_from(entry.name) {
                    Ok(name) => {
                        let account = Account::Virtual { uid: entry.uid, gid: entry.gid, home: entry.home };
                        Ok(Lookup::User(User { name, account, program: None }, None))
                    }
                    Err(why) => unavailable("passwd-file", why),
                },
                passwd_file::Answer::NotFound => Ok(Lookup::NotFound),
                passwd_file::Answer::Unavailable(reason) => unavailable("passwd-file", reason),
            },
        }
    }
}
