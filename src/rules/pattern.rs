//! What one item of a list in `rules.toml` stands for.
//!
//! `*` stands for any characters, none among them, `?` for exactly one; nothing escapes them. Patterns are folded
//! once, here, into the form in which the questions come: local parts in lower case, domains as lower-case A-labels.

use std::borrow::Cow;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};
use wildmatch::WildMatch;

use crate::address::{Address, AddressError, normalize_domain};

/// Longest pattern, in bytes: the longest address that could match it literally has [`crate::address::MAX_LENGTH`].
pub const MAX_PATTERN_LENGTH: usize = 1024;

/// Longest domain name that DNS can hold, in octets of its text form (RFC 1035 §3.1).
pub(super) const MAX_DOMAIN_LENGTH: usize = 253;

/// Why a string is no pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PatternError {
    /// Nothing but white space.
    #[error("empty pattern, expected an address, a domain or a glob")]
    Empty,
    /// Longer than [`MAX_PATTERN_LENGTH`].
    #[error("pattern of {0} bytes is too long, expected at most {MAX_PATTERN_LENGTH}")]
    TooLong(usize),
    /// A control character, which nothing that a pattern is compared to can hold.
    #[error("control character in a pattern")]
    Control,
    /// White space outside a quoted local part; mostly two addresses in one item.
    #[error("white space in a pattern, expected one address, domain or glob")]
    WhiteSpace,
    /// Two `@` outside a quoted local part; mostly two addresses in one item.
    #[error("more than one @ in a pattern, expected one address")]
    SecondAt,
    /// A quoted local part with a wildcard; its quotes would never match.
    #[error("wildcard beside a quoted local part, expected the local part without quotes")]
    WildcardInQuotes,
    /// What follows the `@` can't be a domain.
    #[error("no valid domain, expected one such as example.org")]
    BadDomain,
    /// A label such as `b*ücher`, which has no A-label.
    #[error("wildcard in the non-ASCII label \"{0}\", expected its A-label form (xn--…)")]
    WildcardInLabel(String),
    /// An exact address that is none.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// Looks like an IP address or network and is none.
    #[error("no valid network, expected an address or a CIDR block such as 192.0.2.0/24 or 2001:db8::/32")]
    BadNetwork,
}

/// An item of `sender`, `recipient`, a sender-file, or a sender list of the directory.
#[derive(Clone, Debug)]
pub(super) enum AddressPattern {
    /// `<>`
    Null,
    /// `alice@example.org`, as [`address_key`] writes it.
    Exact(Box<str>),
    /// `@example.org` or `*@example.org`: any address at that domain.
    Domain(Box<str>),
    /// `.example.org`, kept without its dot: any address at that domain or below it.
    Suffix(Box<str>),
    /// `example.org`: any address at that domain. But also the bare local part `alice`, which looks no different.
    Name { domain: Box<str>, exact: Box<str> },
    /// Anything with a wildcard.
    Glob(AddressGlob),
}

/// A glob on addresses.
#[derive(Clone, Debug)]
pub(super) enum AddressGlob {
    /// `alice+*@*.example.org`: the parts are matched apart, so that no `*` reaches across the `@`.
    Parts { local: WildMatch, domain: WildMatch },
    /// Without `@`, such as `*` or `*.example.org`: matched against the whole address. The second form has the
    /// pattern's labels as A-labels, if that makes a difference: a non-ASCII label may be part of a domain.
    Whole(WildMatch, Option<WildMatch>),
}

impl FromStr for AddressPattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let text = checked(text)?;
        if text == "<>" {
            return Ok(Self::Null);
        }
        let text = text.strip_prefix('<').and_then(|t| t.strip_suffix('>')).unwrap_or(text);
        if !text.starts_with('"') && text.contains(char::is_whitespace) {
            return Err(PatternError::WhiteSpace);
        }
        if text.starts_with('"') {
            // A wildcard in a quoted string may be meant literally or not: ask rather than guess.
            return match has_wildcard(text) {
                true => Err(PatternError::WildcardInQuotes),
                false => Ok(Self::Exact(address_key(&Address::parse(text.as_bytes())?).into())),
            };
        }
        match text.rsplit_once('@') {
            Some((local, _)) if local.contains('@') => Err(PatternError::SecondAt),
            Some(("" | "*", name)) if !has_wildcard(name) => Ok(Self::Domain(domain(name)?.into())),
            Some(("", name)) => Ok(Self::Glob(AddressGlob::parts("*", name)?)),
            Some((local, name)) if has_wildcard(text) => Ok(Self::Glob(AddressGlob::parts(local, name)?)),
            Some(_) => Ok(Self::Exact(address_key(&Address::parse(text.as_bytes())?).into())),
            None if has_wildcard(text) => Ok(Self::Glob(AddressGlob::whole(text))),
            None => match text.strip_prefix('.') {
                Some(name) => Ok(Self::Suffix(domain(name)?.into())),
                None => Ok(Self::Name {
                    domain: domain(text)?.into(),
                    exact: address_key(&Address::parse(text.as_bytes())?).into(),
                }),
            },
        }
    }
}

impl AddressPattern {
    /// What comparing it costs, in characters of a glob; what is looked up by hash costs nothing.
    pub(super) fn cost(&self) -> usize {
        match self {
            Self::Glob(AddressGlob::Parts { local, domain }) => cost(local) + cost(domain),
            Self::Glob(AddressGlob::Whole(first, second)) => cost(first) + second.as_ref().map_or(0, cost),
            _ => 0,
        }
    }
}

impl AddressGlob {
    fn parts(local: &str, domain: &str) -> Result<Self, PatternError> {
        Ok(Self::Parts {
            local: WildMatch::new(&fold_local(local.to_lowercase())),
            domain: WildMatch::new(&domain_glob(domain)?),
        })
    }

    fn whole(text: &str) -> Self {
        let folded = fold_local(text.to_lowercase());
        let as_domain = a_labels(text).ok().filter(|d| *d != folded);
        Self::Whole(WildMatch::new(&folded), as_domain.as_deref().map(WildMatch::new))
    }

    /// Whether the address of this [`address_key`], whose local part is the first `local` bytes, is meant.
    pub(super) fn matches(&self, key: &str, local_length: usize) -> bool {
        match self {
            Self::Parts { local, domain } => {
                let (own_local, own_domain) = key.split_at(local_length);
                // The domain first: it is shorter, and mostly settles it.
                own_domain
                    .strip_prefix('@')
                    .is_some_and(|own| domain.matches(own) && local.matches(own_local))
            }
            Self::Whole(first, second) => {
                first.matches(key) || second.as_ref().is_some_and(|glob| glob.matches(key))
            }
        }
    }
}

/// The form of an address in which patterns are compared: [`Address::key`] with one form of sigma, because lower case
/// makes of `ΝΙΚΟΣ` another word than of `ΝΙΚΟΣ*`.
pub(super) fn address_key(address: &Address) -> String {
    fold_local(address.key())
}

fn fold_local(lower: String) -> String {
    match lower.contains('ς') {
        true => lower.replace('ς', "σ"),
        false => lower,
    }
}

/// An item of `client`.
#[derive(Clone, Debug)]
pub(super) enum ClientPattern {
    /// An address is a network of one. Bits behind the prefix length are ignored.
    Network(IpNet),
    /// A glob on the verified client name.
    Name(WildMatch),
}

impl FromStr for ClientPattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let text = checked(text)?;
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::Network(address.to_canonical().into()));
        }
        if let Ok(network) = text.parse::<IpNet>() {
            return Ok(Self::Network(canonical(network)));
        }
        // No host name has a slash or a colon, or only digits: a mistyped network must not become a dead name glob.
        let digits = text.contains(|c: char| c.is_ascii_digit())
            && text.chars().all(|c| c.is_ascii_digit() || ".*?-".contains(c));
        if digits || text.contains(['/', ':']) {
            return Err(PatternError::BadNetwork);
        }
        Ok(Self::Name(WildMatch::new(&host_glob(text)?)))
    }
}

impl ClientPattern {
    /// As [`AddressPattern::cost`].
    pub(super) fn cost(&self) -> usize {
        match self {
            Self::Network(_) => 0,
            Self::Name(glob) => cost(glob),
        }
    }
}

/// A network of IPv4-mapped IPv6 addresses (RFC 4291 §2.5.5.2) as the IPv4 network that it is.
fn canonical(network: IpNet) -> IpNet {
    match network {
        IpNet::V6(v6) => v6
            .addr()
            .to_ipv4_mapped()
            .zip(v6.prefix_len().checked_sub(96))
            .and_then(|(address, prefix)| Ipv4Net::new(address, prefix).ok())
            .map_or(network, IpNet::V4),
        IpNet::V4(_) => network,
    }
}

/// An item of `helo`.
#[derive(Clone, Debug)]
pub(super) struct HeloPattern(pub(super) WildMatch);

impl FromStr for HeloPattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        Ok(Self(WildMatch::new(&host_glob(checked(text)?)?)))
    }
}

impl HeloPattern {
    /// As [`AddressPattern::cost`].
    pub(super) fn cost(&self) -> usize {
        cost(&self.0)
    }
}

/// The form of a host name in which patterns are compared. A HELO name is the client's own invention: what is no
/// domain is compared as it stands, in lower case.
pub(super) fn host_key(name: &str) -> Cow<'_, str> {
    let plain = |b: u8| b.is_ascii() && !b.is_ascii_uppercase();
    if name.bytes().all(plain) && !name.ends_with('.') && !name.contains("xn--") {
        return Cow::Borrowed(name);
    }
    Cow::Owned(normalize_domain(name).unwrap_or_else(|| name.to_lowercase()))
}

fn cost(glob: &WildMatch) -> usize {
    glob.pattern_chars().len()
}

fn has_wildcard(text: &str) -> bool {
    text.contains(['*', '?'])
}

/// What every pattern must be, without white space around it.
fn checked(text: &str) -> Result<&str, PatternError> {
    let text = text.trim();
    if text.is_empty() {
        return Err(PatternError::Empty);
    }
    if text.len() > MAX_PATTERN_LENGTH {
        return Err(PatternError::TooLong(text.len()));
    }
    if text.contains(char::is_control) {
        return Err(PatternError::Control);
    }
    Ok(text)
}

/// A domain without wildcards.
fn domain(text: &str) -> Result<String, PatternError> {
    let domain = normalize_domain(text).ok_or(PatternError::BadDomain)?;
    let well_formed = domain.starts_with('[') || domain.split('.').all(|label| !label.is_empty());
    match well_formed && domain.len() <= MAX_DOMAIN_LENGTH {
        true => Ok(domain),
        false => Err(PatternError::BadDomain),
    }
}

/// A domain that may have wildcards.
fn domain_glob(text: &str) -> Result<String, PatternError> {
    if !has_wildcard(text) {
        return domain(text);
    }
    let glob = host_glob(text)?;
    let well_formed = glob.starts_with('[') || glob.split('.').all(|label| !label.is_empty());
    match well_formed && !glob.contains([' ', '"', '<', '>', '/', '\\']) {
        true => Ok(glob),
        false => Err(PatternError::BadDomain),
    }
}

/// A host name that may have wildcards, in the form of [`host_key`].
fn host_glob(text: &str) -> Result<String, PatternError> {
    if !has_wildcard(text) {
        return Ok(host_key(text).into_owned());
    }
    match text.strip_suffix('.') {
        // Names are compared without the root's dot; without it this would match far more than was written.
        Some(name) if name.ends_with(['*', '?']) => Err(PatternError::BadDomain),
        Some(name) => a_labels(name),
        None => a_labels(text),
    }
}

/// The labels of a glob as A-labels. One with a wildcard has none, so it must be ASCII.
fn a_labels(text: &str) -> Result<String, PatternError> {
    let labels: Result<Vec<String>, PatternError> = text
        .split('.')
        .map(|label| match (has_wildcard(label), label.is_ascii()) {
            (true, false) => Err(PatternError::WildcardInLabel(label.to_owned())),
            (true, true) => Ok(label.to_ascii_lowercase()),
            (false, _) => Ok(host_key(label).into_owned()),
        })
        .collect();
    Ok(labels?.join("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Result<AddressPattern, PatternError> {
        text.parse()
    }

    fn client(text: &str) -> Result<ClientPattern, PatternError> {
        text.parse()
    }

    #[test]
    fn a_star_before_a_plain_domain_is_looked_up_not_scanned() {
        for text in ["@Example.org", "*@example.org.", "<*@example.org>"] {
            assert!(matches!(address(text), Ok(AddressPattern::Domain(d)) if &*d == "example.org"), "{text}");
        }
        assert_eq!(address("*@example.org").unwrap().cost(), 0);
        assert_eq!(address("a*@*.org").unwrap().cost(), 7);
    }

    #[test]
    fn what_cannot_match_is_refused() {
        let cases = [
            ("", PatternError::Empty),
            (" \t", PatternError::Empty),
            ("a\u{7}b@c", PatternError::Control),
            ("a@b.example c@d.example", PatternError::WhiteSpace),
            ("*@b.example *@d.example", PatternError::WhiteSpace),
            ("Bob Smith", PatternError::WhiteSpace),
            ("a@b.example,c@d.example", PatternError::SecondAt),
            ("*@*@b.example", PatternError::SecondAt),
            ("\"john *\"@b.example", PatternError::WildcardInQuotes),
            ("@", PatternError::BadDomain),
            ("*@", PatternError::BadDomain),
            ("@.example.org", PatternError::BadDomain),
            ("a*@b..example", PatternError::BadDomain),
            ("a*@b/c", PatternError::BadDomain),
            ("a@*.", PatternError::BadDomain),
            (".", PatternError::BadDomain),
            ("a/b", PatternError::BadDomain),
            ("*@b*ücher.example", PatternError::WildcardInLabel("b*ücher".into())),
            ("a@b/c", PatternError::Address(AddressError::BadDomain)),
            ("\"open@b.example", PatternError::Address(AddressError::BadQuoting)),
        ];
        for (text, error) in cases {
            assert_eq!(address(text).unwrap_err(), error, "{text:?}");
        }
        let long = "a".repeat(MAX_PATTERN_LENGTH);
        assert_eq!(address(&format!("{long}*")).unwrap_err(), PatternError::TooLong(1025));
        assert!(address(&format!("{}*", &long[1..])).is_ok());
        assert_eq!(address(&format!("@{}", "a".repeat(254))).unwrap_err(), PatternError::BadDomain);
    }

    #[test]
    fn a_mistyped_network_is_no_name() {
        for bad in [
            "192.0.2.0/33",
            "192.0.2.256",
            "192.0.2",
            "192.0.2.*",
            "192.0.2.1-9",
            "2001:db8::/129",
            "2001:db8:::1",
            "[2001:db8::1]",
            "example.org/24",
        ] {
            assert_eq!(client(bad).unwrap_err(), PatternError::BadNetwork, "{bad}");
        }
        for name in ["*", "*.example.org", "host-1.example", "4.3.2.1.example.org"] {
            assert!(matches!(client(name), Ok(ClientPattern::Name(_))), "{name}");
        }
    }

    #[test]
    fn mapped_networks_are_ipv4_networks() {
        let network = |text| match client(text).unwrap() {
            ClientPattern::Network(network) => network.to_string(),
            ClientPattern::Name(_) => panic!("{text} is a network"),
        };
        assert_eq!(network("::ffff:192.0.2.7"), "192.0.2.7/32");
        assert_eq!(network("::ffff:192.0.2.0/120"), "192.0.2.0/24");
        assert_eq!(network("::/0"), "::/0");
        assert_eq!(network("2001:DB8::/32"), "2001:db8::/32");
    }

    #[test]
    fn labels_of_a_glob_become_a_labels_one_by_one() {
        assert_eq!(domain_glob("*.BÜCHER.Example.").unwrap(), "*.xn--bcher-kva.example");
        assert_eq!(domain_glob("b?r.XN--BCHER-KVA.*").unwrap(), "b?r.xn--bcher-kva.*");
        assert_eq!(domain_glob("[IPv6:*]").unwrap(), "[ipv6:*]");
    }

    #[test]
    fn host_names_are_copied_only_if_they_must_change() {
        assert!(matches!(host_key("mail.example.org"), Cow::Borrowed(_)));
        assert_eq!(host_key("Mail.Example.org."), "mail.example.org");
        assert_eq!(host_key("BÜCHER.example"), "xn--bcher-kva.example");
        assert_eq!(host_key("[IPv6:2001:DB8::1]"), "[ipv6:2001:db8::1]");
        assert_eq!(host_key("A b"), "a b");
    }
}
