//! Who a recipient resolves to.

use std::{
    fmt,
    hash::{Hash, Hasher},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

/// Longest user name, in bytes: LOGIN_NAME_MAX of Linux is 256 with its NUL; virtual users' names are addresses.
pub const MAX_NAME_LENGTH: usize = 320;

/// A user's name: not empty, without control characters, `/`, or a leading `-`, and no longer than [`MAX_NAME_LENGTH`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct UserName(String);

impl UserName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for UserName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        let bad = name.is_empty()
            || name.len() > MAX_NAME_LENGTH
            || name.starts_with(['-', '+', '.'])
            || name.chars().any(|c| c.is_control() || matches!(c, '/' | ':' | ' '));
        if bad { Err(format!("{name:?} is no user name")) } else { Ok(Self(name)) }
    }
}

impl From<UserName> for String {
    fn from(name: UserName) -> Self {
        name.0
    }
}

impl fmt::Display for UserName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Somebody whose filters and rules can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// The name: a login name, or what the directory or passwd-file calls a virtual user.
    pub name: UserName,
    /// Where uid, gid and home come from.
    pub account: Account,
    /// A program of the site that is the user's message filter, for users who have none of their own.
    pub program: Option<ProgramName>,
}

/// The name of a program in one of `filter.program-directories`: one path component, not hidden.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ProgramName(String);

impl ProgramName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ProgramName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        let bad = name.is_empty()
            || name.len() > MAX_NAME_LENGTH
            || name.starts_with('.')
            || name.chars().any(|c| c.is_control() || c == '/');
        if bad { Err(format!("{name:?} is no name of a program")) } else { Ok(Self(name)) }
    }
}

impl From<ProgramName> for String {
    fn from(name: ProgramName) -> Self {
        name.0
    }
}

/// By the name alone: few users share one, and hashing the path of a home costs more than all else.
impl Hash for User {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}

/// Where a user's uid, gid and home come from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Account {
    /// NSS, looked up by name by whoever is about to become that user.
    Passwd,
    /// A passwd-file or a directory. The monitor checks the values against `virtual-uids` and `virtual-homes`.
    Virtual {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
        /// Home directory.
        home: PathBuf,
    },
}
