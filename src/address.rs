//! Mailbox addresses as RFC 5321 §4.1.2 writes them: a local part and, mostly, a domain.
//!
//! An [`Address`] is made from what an SMTP client or a configuration said; whoever holds one need
//! not check it again. The domain is kept in its A-label form (RFC 5890 §2.3.2.1), in lower case, so
//! that `BÜCHER.example` and `xn--bcher-kva.example` are one domain.

use std::fmt;

/// Longest address taken, in bytes. RFC 5321 §4.5.3.1 asks for 64 + 1 + 255; Postfix takes whatever has room in a command
/// of 2048 (line_length_limit, postconf(5)), and a longer one must not get around anybody's filter.
pub const MAX_LENGTH: usize = 2048;

/// What separates a user and a host within a local part, in the order in which Postfix looks for it.
const ROUTING: [char; 3] = ['@', '!', '%'];

/// A mailbox: `alice@example.org`, `"john doe"@example.org`, or a bare local part as in `postmaster`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    local: String,
    domain: Option<String>,
}

/// Why a string is no [`Address`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Longer than [`MAX_LENGTH`].
    #[error("address of {0} bytes is too long")]
    TooLong(usize),
    /// Not UTF-8 (RFC 6531 allows nothing else beyond ASCII).
    #[error("address is not UTF-8")]
    NotUtf8,
    /// A control character, which no mailbox can hold.
    #[error("address has a control character")]
    Control,
    /// No local part, as in `@example.org`.
    #[error("address has no local part")]
    NoLocalPart,
    /// `@` with nothing behind it, or a domain that is none.
    #[error("address has no valid domain")]
    BadDomain,
    /// A quoted string that does not end, or ends too soon.
    #[error("address has a broken quoted string")]
    BadQuoting,
}

impl Address {
    /// Reads an address with or without angle brackets.
    ///
    /// A source route (`<@a,@b:user@c>`, RFC 5321 appendix C) is dropped, quotes and backslashes of a quoted
    /// local part are resolved.
    ///
    /// # Errors
    ///
    /// [`AddressError`] says what is wrong. The null sender `<>` is no address: see [`Sender`].
    pub fn parse(text: &[u8]) -> Result<Self, AddressError> {
        if text.len() > MAX_LENGTH {
            return Err(AddressError::TooLong(text.len()));
        }
        let text = std::str::from_utf8(text).map_err(|_| AddressError::NotUtf8)?;
        let text = without_brackets(text);
        if text.bytes().any(|byte| byte.is_ascii_control())
            || !text.is_ascii() && text.chars().any(char::is_control)
        {
            return Err(AddressError::Control);
        }
        let text = without_source_route(text);
        let (local, domain) = if let Some(quoted) = text.strip_prefix('"') {
            let (local, rest) = unquote(quoted)?;
            match rest.strip_prefix('@') {
                Some(domain) => (local, Some(domain)),
                None if rest.is_empty() => (local, None),
                None => return Err(AddressError::BadQuoting),
            }
        } else {
            match text.rsplit_once('@') {
                Some((local, domain)) => (local.to_owned(), Some(domain)),
                None => (text.to_owned(), None),
            }
        };
        if local.is_empty() {
            return Err(AddressError::NoLocalPart);
        }
        let domain = domain.map(|d| normalize_domain(d).ok_or(AddressError::BadDomain)).transpose()?;
        Ok(Self { local, domain })
    }

    /// Reads what an SMTP client said. As [`Address::parse`], but MTAs let through what is no address, and deliver to it or
    /// from it: nobody's filter is to be got around by that. Control characters, and bytes that are not UTF-8, become
    /// U+FFFD; quotes in the wrong place are as good as none; what is no domain stands for itself.
    ///
    /// # Errors
    ///
    /// [`AddressError::TooLong`], and [`AddressError::NoLocalPart`] if there is nothing to read.
    pub fn from_client(text: &[u8]) -> Result<Self, AddressError> {
        match Self::parse(text) {
            Ok(address) => return Ok(address),
            Err(error @ AddressError::TooLong(_)) => return Err(error),
            Err(_) => (),
        }
        let text = String::from_utf8_lossy(text).replace(char::is_control, "\u{fffd}");
        if let Ok(address) = Self::parse(text.as_bytes()) {
            return Ok(address);
        }
        let text = without_source_route(without_brackets(&text));
        let (local, domain) = text.rsplit_once('@').map_or((text, ""), |parts| parts);
        let local = without_quotes(local);
        let domain =
            (!domain.is_empty()).then(|| normalize_domain(domain).unwrap_or_else(|| domain.to_lowercase()));
        if local.is_empty() && domain.is_none() {
            return Err(AddressError::NoLocalPart);
        }
        Ok(Self { local, domain })
    }

    /// The local part, unquoted, in the case that was given.
    pub fn local(&self) -> &str {
        &self.local
    }

    /// The domain in lower case and A-label form, if there is one.
    pub fn domain(&self) -> Option<&str> {
        self.domain.as_deref()
    }

    /// The same mailbox with another local part.
    pub fn with_local(&self, local: impl Into<String>) -> Self {
        Self { local: local.into(), domain: self.domain.clone() }
    }

    /// Puts it at the domain of another, if it has none itself.
    pub fn qualify_like(&mut self, other: &Self) {
        if self.domain.is_none() {
            self.domain.clone_from(&other.domain);
        }
    }

    /// Whether MTAs may read the local part in ways of their own: `al\\ice`, comments, and what
    /// [`Address::without_routing`] follows.
    pub fn has_other_readings(&self) -> bool {
        self.local.contains(ROUTING) || self.local.contains(['\\', '(', ' ', ':', '[', ']'])
    }

    /// Where Postfix takes a mail whose local part is an address of its own, `user@host` (resolve_dequoted_address),
    /// `host!user` or `user%host` (swap_bangpath and allow_percent_hack, postconf(5)): on and on, as long as `leads_on` says of
    /// an address that its domain is the MTA's own. `None`: nowhere else.
    pub fn without_routing(&self, leads_on: impl Fn(&Self) -> bool) -> Option<Self> {
        let next = |address: &Self| address.next_hop().filter(|_| leads_on(address));
        std::iter::successors(next(self), next).last()
    }

    fn next_hop(&self) -> Option<Self> {
        let [at, bang, percent] = ROUTING;
        let (user, host) = match (self.local.rsplit_once(at), self.local.split_once(bang)) {
            (Some(parts), _) => parts,
            (None, Some((host, user))) => (user, host),
            (None, None) => self.local.rsplit_once(percent)?,
        };
        let domain = normalize_domain(host).filter(|_| !user.is_empty())?;
        Some(Self { local: user.to_owned(), domain: Some(domain) })
    }

    /// What stands before the first of `delimiters`, and the extension behind it: `alice`, `shop` of
    /// `alice+shop`. A delimiter at the very start separates nothing (as in Postfix `recipient_delimiter`).
    pub fn split_extension(&self, delimiters: &str) -> (&str, Option<&str>) {
        split_extension(&self.local, delimiters)
    }

    /// The form in which two spellings of one mailbox are equal: local part in lower case too.
    pub fn key(&self) -> String {
        let mut key =
            String::with_capacity(self.local.len() + self.domain.as_ref().map_or(0, |d| d.len() + 1));
        if self.local.is_ascii() {
            key.push_str(&self.local);
            key.make_ascii_lowercase();
        } else {
            key.push_str(&self.local.to_lowercase());
        }
        if let Some(domain) = &self.domain {
            key.push('@');
            key.push_str(domain);
        }
        key
    }
}

/// How an MTA writes to itself what a client wrote as `<@a,@b:user@c>` or `<user@c (comment)>`: without the source route
/// and comments, in the case that was given. `None` if that is no other spelling.
pub fn plain_spelling(raw: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(raw).ok()?;
    let bare = text.strip_prefix('<').and_then(|t| t.strip_suffix('>')).unwrap_or(text);
    let (mut plain, mut is_quoted, mut is_escaped, mut depth) = (String::new(), false, false, 0u32);
    for c in bare.chars() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            '"' if depth == 0 => is_quoted = !is_quoted,
            '(' if !is_quoted => depth += 1,
            ')' if !is_quoted && depth > 0 => {
                depth -= 1;
                continue;
            }
            _ => (),
        }
        if depth == 0 {
            plain.push(c);
        }
    }
    let plain = without_source_route(plain.trim_matches([' ', '\t']));
    (plain != bare).then(|| format!("<{plain}>"))
}

/// See [`Address::split_extension`].
pub fn split_extension<'a>(local: &'a str, delimiters: &str) -> (&'a str, Option<&'a str>) {
    let is_delimiter = |c| delimiters.chars().any(|delimiter| delimiter == c);
    let split = local.char_indices().skip(1).find(|(_, c)| is_delimiter(*c));
    match split {
        Some((at, c)) => (&local[..at], Some(&local[at + c.len_utf8()..])),
        None => (local, None),
    }
}

impl fmt::Display for Address {
    /// Writes the address as RFC 5321 does, quoting a local part that needs it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if is_dot_string(&self.local) {
            f.write_str(&self.local)?;
        } else {
            f.write_str("\"")?;
            for c in self.local.chars() {
                if matches!(c, '"' | '\\') {
                    f.write_str("\\")?;
                }
                write!(f, "{c}")?;
            }
            f.write_str("\"")?;
        }
        match &self.domain {
            Some(domain) => write!(f, "@{domain}"),
            None => Ok(()),
        }
    }
}

/// The envelope sender: an address, or the null reverse-path of bounces (RFC 5321 §4.5.5).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Sender {
    /// `<>`
    Null,
    /// Anybody else.
    Mailbox(Address),
}

impl Sender {
    /// Reads `<>`, the empty string, or an address.
    ///
    /// # Errors
    ///
    /// As [`Address::parse`].
    pub fn parse(text: &[u8]) -> Result<Self, AddressError> {
        match text {
            b"" | b"<>" => Ok(Self::Null),
            _ => Address::parse(text).map(Self::Mailbox),
        }
    }

    /// Reads what an SMTP client said, as [`Address::from_client`].
    ///
    /// # Errors
    ///
    /// [`AddressError::TooLong`]
    pub fn from_client(text: &[u8]) -> Result<Self, AddressError> {
        match Address::from_client(text) {
            Ok(address) => Ok(Self::Mailbox(address)),
            Err(AddressError::NoLocalPart) => Ok(Self::Null),
            Err(error) => Err(error),
        }
    }

    /// The address, unless it is the null sender.
    pub fn address(&self) -> Option<&Address> {
        match self {
            Self::Null => None,
            Self::Mailbox(address) => Some(address),
        }
    }
}

impl fmt::Display for Sender {
    /// Writes the address; the null sender is the empty string.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => Ok(()),
            Self::Mailbox(address) => address.fmt(f),
        }
    }
}

/// A domain in lower case and A-label form; `None` if it is none. Address literals keep their brackets.
pub fn normalize_domain(domain: &str) -> Option<String> {
    if domain.starts_with('[') {
        return domain.ends_with(']').then(|| domain.to_ascii_lowercase());
    }
    let domain = domain.strip_suffix('.').unwrap_or(domain);
    let is_foreign = |byte| matches!(byte, b'@' | b' ' | b'"' | b'<' | b'>' | b'/' | b'\\');
    if domain.is_empty() || domain.bytes().any(is_foreign) {
        return None;
    }
    let lower = domain.to_ascii_lowercase();
    if domain.is_ascii() && !lower.as_bytes().windows(4).any(|part| part == b"xn--") {
        return Some(lower);
    }
    // A name that IDNA refuses may still be one that an MTA uses: compare it as it stands.
    Some(idna::domain_to_ascii(domain).unwrap_or_else(|_| domain.to_lowercase()))
}

fn without_brackets(text: &str) -> &str {
    let text = text.trim_matches([' ', '\t']);
    let text = text.strip_prefix('<').and_then(|t| t.strip_suffix('>')).unwrap_or(text);
    // Postfix takes white space there, which RFC 5321 has no place for, and does not show that it was there.
    text.trim_matches([' ', '\t'])
}

fn without_source_route(text: &str) -> &str {
    if !text.starts_with('@') {
        return text;
    }
    // The colons of an address literal, [IPv6:...], end no route.
    let mut in_literal = false;
    let end = text.find(|c| {
        in_literal = c == '[' || in_literal && c != ']';
        c == ':' && !in_literal
    });
    end.map_or(text, |end| without_source_route(&text[end + 1..]))
}

/// The content of a quoted string whose opening quote is gone, and what follows its closing quote.
fn unquote(text: &str) -> Result<(String, &str), AddressError> {
    let mut local = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((local, &text[at + 1..])),
            '\\' => local.push(chars.next().ok_or(AddressError::BadQuoting)?.1),
            c => local.push(c),
        }
    }
    Err(AddressError::BadQuoting)
}

/// Quoted or not, in any mixture: `"al"ice` is alice to Postfix.
fn without_quotes(text: &str) -> String {
    let mut plain = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => (),
            '\\' => plain.extend(chars.next()),
            c => plain.push(c),
        }
    }
    plain
}

/// RFC 5321 Dot-string, with RFC 6531's UTF-8.
fn is_dot_string(local: &str) -> bool {
    local.split('.').all(|atom| {
        !atom.is_empty()
            && atom
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || !c.is_ascii() || "!#$%&'*+-/=?^_`{|}~".contains(c))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bang_paths_and_percent_signs_are_routing() {
        let read = |text: &str| {
            let address = Address::parse(text.as_bytes()).unwrap().next_hop();
            address.map(|address| address.to_string())
        };
        assert_eq!(read("Example.org!alice").as_deref(), Some("alice@example.org"));
        assert_eq!(read("a!b!alice").as_deref(), Some("b!alice@a"));
        assert_eq!(read("alice%example.org").as_deref(), Some("alice@example.org"));
        assert_eq!(read("alice%x@example.org").as_deref(), Some("alice@x"));
        assert_eq!(read("\"a@x\"@example.org").as_deref(), Some("a@x"));
        for other in ["alice", "alice@example.org", "x!", "%x", "alice%"] {
            assert_eq!(read(other), None, "{other}");
        }
    }

    #[test]
    fn a_plain_spelling_has_no_route_and_no_comment() {
        let plain = |raw: &str| plain_spelling(raw.as_bytes());
        assert_eq!(plain("<alice@example.org>"), None);
        assert_eq!(plain("Alice@example.org"), None);
        assert_eq!(plain("<\"a(b\"@example.org>"), None);
        assert_eq!(plain("<@a,@b:Alice@Example.org>").as_deref(), Some("<Alice@Example.org>"));
        assert_eq!(plain("<alice@example.org (x (y))>").as_deref(), Some("<alice@example.org>"));
        assert_eq!(plain("< alice@example.org >").as_deref(), Some("<alice@example.org>"));
    }
    use proptest::prelude::*;

    fn address(text: &str) -> Address {
        Address::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn brackets_case_and_source_routes_do_not_matter() {
        assert_eq!(address("<Alice@Example.ORG>").to_string(), "Alice@example.org");
        assert_eq!(address("Alice@example.org.").key(), "alice@example.org");
        assert_eq!(address("<@a.example,@b.example:bob@c.example>").to_string(), "bob@c.example");
    }

    #[test]
    fn quoted_local_parts_are_unquoted_and_quoted_again_only_if_needed() {
        assert_eq!(address(r#"<"john doe"@example.org>"#).local(), "john doe");
        assert_eq!(address(r#""a\"b@c"@example.org"#).local(), "a\"b@c");
        assert_eq!(address(r#""a\"b@c"@example.org"#).to_string(), r#""a\"b@c"@example.org"#);
        assert_eq!(address(r#""plain"@example.org"#).to_string(), "plain@example.org");
        assert_eq!(Address::parse(br#""open@example.org"#), Err(AddressError::BadQuoting));
    }

    #[test]
    fn internationalized_domains_are_compared_as_a_labels() {
        assert_eq!(address("a@BÜCHER.example"), address("a@xn--bcher-kva.example"));
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for bad in [&b""[..], b"<>", b"@example.org", b"a@", b"a\nb@c", b"\xff@example.org", b"a@b/c"] {
            assert!(Address::parse(bad).is_err(), "{bad:?}");
        }
        assert!(Address::parse(&[b'a'; MAX_LENGTH + 1]).is_err());
    }

    #[test]
    fn what_a_client_says_is_an_address_whatever_it_is() {
        for (said, read) in [
            (&b"<alice@Example.org>"[..], "alice@example.org"),
            (b"<\"a\tb\"@example.org>", "a\u{fffd}b@example.org"),
            (b"<\"a\rb\"@example.org>", "a\u{fffd}b@example.org"),
            (b"a\r\nX: y@example.org", "\"a\u{fffd}\u{fffd}X: y\"@example.org"),
            (b"<b\xf6se@example.org>", "b\u{fffd}se@example.org"),
            (b"<\"al\"ice@example.org>", "alice@example.org"),
            (b"<\"a\".\"b\"@example.org>", "a.b@example.org"),
            (b"\"open@example.org", "open@example.org"),
            (b"<a@b/c>", "a@b/c"),
            (b"<a@b c>", "a@b c"),
            (b"<a@>", "a"),
            (b"<\"\"@example.org>", "\"\"@example.org"),
            (b"<@x:\"a\"b@example.org>", "ab@example.org"),
        ] {
            assert_eq!(Address::from_client(said).unwrap().to_string(), read);
        }
        for nothing in [&b""[..], b"<>", b"< >", b"<\"\">"] {
            assert_eq!(Address::from_client(nothing), Err(AddressError::NoLocalPart));
            assert_eq!(Sender::from_client(nothing), Ok(Sender::Null));
        }
        let long = [b'a'; MAX_LENGTH + 1];
        assert_eq!(Sender::from_client(&long), Err(AddressError::TooLong(MAX_LENGTH + 1)));
        // As long as a command of Postfix's has room for, in the worst form.
        assert!(Address::from_client(&[0xff; MAX_LENGTH]).is_ok());
    }

    #[test]
    fn the_extension_starts_at_the_first_delimiter_but_not_at_the_first_character() {
        assert_eq!(split_extension("alice+shop", "+"), ("alice", Some("shop")));
        assert_eq!(split_extension("alice-a+b", "+-"), ("alice", Some("a+b")));
        assert_eq!(split_extension("+alice", "+"), ("+alice", None));
        assert_eq!(split_extension("alice", "+"), ("alice", None));
        assert_eq!(split_extension("alice+", "+"), ("alice", Some("")));
        assert_eq!(split_extension("alice+shop", ""), ("alice+shop", None));
    }

    #[test]
    fn the_null_sender_is_no_address() {
        assert_eq!(Sender::parse(b"<>"), Ok(Sender::Null));
        assert_eq!(Sender::parse(b""), Ok(Sender::Null));
        assert_eq!(Sender::parse(b"<a@b>").unwrap().to_string(), "a@b");
    }

    proptest! {
        #[test]
        fn parsing_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Address::parse(&bytes);
        }

        #[test]
        fn what_a_client_says_is_always_judged(bytes in prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select(&b"\"\\@<>. \t\r\n"[..])], 0..40)) {
            let sender = Sender::from_client(&bytes).unwrap();
            prop_assert!(!sender.to_string().contains(char::is_control));
            if let Ok(strict) = Address::parse(&bytes) {
                prop_assert_eq!(sender.address(), Some(&strict));
            }
        }

        #[test]
        fn writing_and_reading_gives_the_same_address(local in "[^\\p{C}]{1,20}", domain in "[a-z][a-z0-9-]{0,8}\\.example") {
            let first = Address { local, domain: Some(domain) };
            prop_assert_eq!(Address::parse(first.to_string().as_bytes()), Ok(first));
        }
    }
}
