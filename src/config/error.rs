//! What is wrong with a configuration, and where.

use std::{fmt, io, path::PathBuf};

use super::ldap::SecretError;
use crate::logging::Chain;

/// A configuration that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("cannot read configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file that the configuration names can't be read.
    #[error("cannot read {}", path.display())]
    NamedFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A password or certificate that a resolver names can't be used.
    #[error("resolver of type ldap")]
    Secret(#[from] SecretError),
    /// The text is no TOML, or a value is not what the setting wants.
    #[error("{place}: {message}")]
    Invalid {
        /// Where.
        place: Place,
        /// What is wrong, and what was expected.
        message: String,
    },
}

/// A position in a file, both numbers from 1; columns count characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// Line number.
    pub line: usize,
    /// Column number.
    pub column: usize,
}

impl ConfigError {
    /// The same with a place in the configuration, if it has none and there is one.
    pub(super) fn at(self, place: Option<&Place>) -> Self {
        match (&self, place) {
            (Self::NamedFile { .. } | Self::Secret(_), Some(place)) => {
                Self::Invalid { place: place.clone(), message: Chain(&self).to_string() }
            }
            _ => self,
        }
    }

    /// Whether all that is wrong is that the calling user may not read a file that the configuration names.
    pub fn is_forbidden(&self) -> bool {
        let source = match self {
            Self::NamedFile { source, .. } | Self::Secret(SecretError::Read { source, .. }) => source,
            Self::Read { .. } | Self::Secret(_) | Self::Invalid { .. } => return false,
        };
        source.kind() == io::ErrorKind::PermissionDenied
    }
}

impl Place {
    /// The place of a byte offset in a file's text.
    pub fn of_offset(path: impl Into<PathBuf>, text: &str, offset: usize) -> Self {
        let before = text.get(..offset).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        Self {
            path: path.into(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.path.display(), self.line, self.column)
    }
}
