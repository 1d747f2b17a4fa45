//! Which users an address means.
//!
//! Resolvers are asked in the order of the configuration; the full local part is tried before the part in front of
//! a delimiter. "Nobody has this address" and "could not ask" are different answers all the way.

mod passwd;

use std::path::PathBuf;

use crate::{
    address::Address,
    config::{OnError, Recipients, ResolverConfig},
    user::{Account, User, UserName},
};
use passwd::Passwd;

/// The users of an address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
}

/// One user, and by which address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedUser {
    /// The user.
    pub user: User,
    /// The final address: after aliases, with its extension.
    pub address: Address,
    /// The extension that was not part of the user's name.
    pub extension: Option<String>,
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
    resolvers: Vec<Resolver>,
    delimiters: String,
}

#[derive(Debug)]
enum Resolver {
    Passwd(Passwd),
    PasswdFile(PathBuf),
}

/// What one resolver says of one name.
enum Lookup {
    User(User),
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
                ResolverConfig::PasswdFile { path } => Resolver::PasswdFile(path.clone()),
            })
            .collect();
        Self { resolvers, delimiters: recipients.delimiters.clone() }
    }

    /// The users of an address that is ours.
    ///
    /// # Errors
    ///
    /// [`Unavailable`] if a resolver that might know the address could not be asked.
    pub async fn resolve(&self, address: &Address) -> Result<Resolution, Unavailable> {
        let (base, extension) = address.split_extension(&self.delimiters);
        let whole = (address.local(), None);
        let candidates = std::iter::once(whole).chain(extension.map(|extension| (base, Some(extension))));
        for (local, extension) in candidates {
            for resolver in &self.resolvers {
                match resolver.lookup(&local.to_lowercase(), address).await? {
                    Lookup::NotFound => (),
                    Lookup::Unjudged(why) => {
                        return Ok(Resolution { users: Vec::new(), unjudged: Some(why) });
                    }
                    Lookup::User(user) => {
                        let extension = extension.map(str::to_lowercase);
                        let user = ResolvedUser { user, address: address.clone(), extension };
                        return Ok(Resolution { users: vec![user], unjudged: None });
                    }
                }
            }
        }
        Ok(Resolution::default())
    }
}

impl Resolver {
    async fn lookup(&self, local: &str, address: &Address) -> Result<Lookup, Unavailable> {
        let _ = address;
        match self {
            Self::Passwd(passwd) => {
                let Ok(name) = UserName::try_from(local.to_owned()) else { return Ok(Lookup::NotFound) };
                match passwd.lookup(local).await {
                    Ok(passwd::Answer::Found) => Ok(Lookup::User(User { name, account: Account::Passwd })),
                    Ok(passwd::Answer::System) => Ok(Lookup::Unjudged(format!("{local} is a system account"))),
                    Ok(passwd::Answer::NotFound) => Ok(Lookup::NotFound),
                    Err(error) => Err(Unavailable {
                        resolver: "passwd".into(),
                        reason: error.to_string(),
                        on_error: None,
                    }),
                }
            }
            Self::PasswdFile(_) => Ok(Lookup::NotFound),
        }
    }
}
