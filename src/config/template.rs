//! Texts with `%s`, `%u` and `%d` in them, which stand for an address, its local part and its domain.

use std::{borrow::Cow, path::PathBuf, str::FromStr};

use crate::address::Address;

/// A piece of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    /// `%s`
    Address,
    /// `%u`
    Local,
    /// `%d`
    Domain,
}

/// Reads `%s`, `%u`, `%d` and `%%`.
fn pieces(text: &str) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut plain = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        let piece = match c {
            '%' => match chars.next() {
                Some('s') => Piece::Address,
                Some('u') => Piece::Local,
                Some('d') => Piece::Domain,
                Some('%') => {
                    plain.push('%');
                    continue;
                }
                other => {
                    return Err(format!(
                        "\"{text}\": \"%{}\" is unknown: expected %s (address), %u (local part), %d (domain) or %%",
                        other.map(String::from).unwrap_or_default()
                    ));
                }
            },
            c => {
                plain.push(c);
                continue;
            }
        };
        if !plain.is_empty() {
            pieces.push(Piece::Text(std::mem::take(&mut plain)));
        }
        pieces.push(piece);
    }
    if !plain.is_empty() {
        pieces.push(Piece::Text(plain));
    }
    Ok(pieces)
}

/// A search filter (RFC 4515) with `%s` (address), `%u` (local part) and `%d` (domain, empty if there is none).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterTemplate(Vec<Piece>);

impl FilterTemplate {
    /// The filter for an address, whose characters can't change what the filter means (RFC 4515 §3).
    ///
    /// `%s` is the address as RFC 5321 writes it, which is how directories keep it; `%u` is unquoted.
    pub fn filter_for(&self, address: &Address) -> String {
        let mut filter = String::new();
        for piece in &self.0 {
            let value: Cow<'_, str> = match piece {
                Piece::Text(text) => {
                    filter.push_str(text);
                    continue;
                }
                Piece::Address => address.to_string().into(),
                Piece::Local => address.local().into(),
                Piece::Domain => address.domain().unwrap_or_default().into(),
            };
            filter.push_str(&ldap3::ldap_escape(value));
        }
        filter
    }
}

impl FromStr for FilterTemplate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let template = Self(pieces(text)?);
        let sample = Address::parse(b"sample@example.org").map_err(|e| e.to_string())?;
        match ldap3::parse_filter(template.filter_for(&sample)) {
            Ok(_) => Ok(template),
            Err(()) => Err(format!(
                "\"{text}\" is no search filter: expected one like \"(&(objectClass=posixAccount)(mail=%s))\" (RFC 4515)"
            )),
        }
    }
}

/// A home directory with `%s`, `%u` and `%d`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HomeTemplate(Vec<Piece>);

impl HomeTemplate {
    /// The home of a user called `local`, in `domain` if it is known; `None` if what goes in is no single path
    /// component, so that no name can lead out of the directory that the template means.
    pub fn home_of(&self, local: &str, domain: Option<&str>) -> Option<PathBuf> {
        let mut home = String::new();
        for piece in &self.0 {
            let value: Cow<'_, str> = match piece {
                Piece::Text(text) => {
                    home.push_str(text);
                    continue;
                }
                Piece::Address => {
                    domain.map_or_else(|| local.to_owned(), |domain| format!("{local}@{domain}")).into()
                }
                Piece::Local => local.into(),
                Piece::Domain => domain?.into(),
            };
            if value.is_empty() || value.starts_with('.') || value.contains(['/', '\0']) {
                return None;
            }
            home.push_str(&value);
        }
        Some(PathBuf::from(home))
    }
}

impl FromStr for HomeTemplate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.starts_with('/') && !text.split('/').any(|part| part == "..") {
            pieces(text).map(Self)
        } else {
            Err(format!("\"{text}\": expected an absolute path without \"..\", like \"/var/vmail/%d/%u\""))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn address(text: &str) -> Address {
        Address::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn filters_that_do_not_parse_are_refused() {
        for bad in ["", "mail=%s)", "(mail=%s", "(&(mail=%s)", "(mail=%x)", "(mail=%"] {
            assert!(bad.parse::<FilterTemplate>().is_err(), "{bad}");
        }
    }

    #[test]
    fn escapes_stand_for_the_parts_of_the_address() {
        let template: FilterTemplate = "(|(a=%s)(b=%u)(c=%d)(d=100%%))".parse().unwrap();
        assert_eq!(
            template.filter_for(&address("Alice@Example.org")),
            "(|(a=Alice@example.org)(b=Alice)(c=example.org)(d=100%))"
        );
        assert_eq!(
            template.filter_for(&address("postmaster")),
            "(|(a=postmaster)(b=postmaster)(c=)(d=100%))"
        );
        assert_eq!(
            template.filter_for(&address(r#""*)(uid=*"@x.example"#)),
            r#"(|(a="\2a\29\28uid=\2a"@x.example)(b=\2a\29\28uid=\2a)(c=x.example)(d=100%))"#
        );
    }

    #[test]
    fn a_home_stays_in_the_directory_of_its_template() {
        let template: HomeTemplate = "/var/vmail/%d/%u".parse().unwrap();
        assert_eq!(
            template.home_of("alice", Some("example.org")),
            Some("/var/vmail/example.org/alice".into())
        );
        assert_eq!(template.home_of("alice", None), None);
        assert_eq!(template.home_of("..", Some("example.org")), None);
        assert_eq!(template.home_of("a/b", Some("example.org")), None);
        assert_eq!(template.home_of("", Some("example.org")), None);
    }

    proptest! {
        #[test]
        fn no_address_changes_what_a_filter_means(local in "\\PC{1,20}") {
            let template: FilterTemplate = "(mail=%u)".parse().unwrap();
            if let Ok(address) = Address::parse(format!("{local}@example.org").as_bytes()) {
                let filter = template.filter_for(&address);
                let inside = &filter["(mail=".len()..filter.len() - 1];
                prop_assert!(!inside.contains(['(', ')', '*']), "{filter}");
                prop_assert!(ldap3::parse_filter(&filter).is_ok(), "{filter}");
            }
        }
    }
}
