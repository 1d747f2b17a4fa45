//! Many address patterns asked at once: what needs no glob is looked up by hash, however many there are.

use std::cell::OnceCell;
use std::collections::HashSet;

use super::pattern::{AddressGlob, AddressPattern, MAX_DOMAIN_LENGTH, PatternError, address_key};
use crate::address::Address;

/// Most lines that the sender-files of one rules file have together: a hundred times the largest address book, and
/// some hundred megabytes in memory at worst.
pub const MAX_SENDER_LINES: usize = 1_000_000;

/// Address patterns, any of which may match.
#[derive(Clone, Debug, Default)]
pub(super) struct AddressSet {
    null: bool,
    exact: Strings,
    domains: Strings,
    suffixes: Strings,
    globs: Vec<AddressGlob>,
    cost: usize,
}

impl AddressSet {
    pub(super) fn insert(&mut self, pattern: AddressPattern) {
        self.cost += pattern.cost();
        match pattern {
            AddressPattern::Null => self.null = true,
            AddressPattern::Exact(key) => self.exact.insert(key),
            AddressPattern::Domain(domain) => self.domains.insert(domain),
            AddressPattern::Suffix(domain) => self.suffixes.insert(domain),
            AddressPattern::Name { domain, exact } => {
                self.domains.insert(domain);
                self.exact.insert(exact);
            }
            AddressPattern::Glob(glob) => self.globs.push(glob),
        }
    }

    /// Characters of all globs, which is what asking costs.
    pub(super) fn cost(&self) -> usize {
        self.cost
    }

    /// Whether any pattern means this mailbox.
    pub(super) fn contains(&self, mailbox: &Mailbox<'_>) -> bool {
        let Some(address) = mailbox.address else {
            return self.null;
        };
        if let Some(domain) = address.domain()
            && (self.domains.contains(domain) || self.has_suffix_of(domain))
        {
            return true;
        }
        if self.exact.is_empty() && self.globs.is_empty() {
            return false;
        }
        let key = mailbox.key(address);
        let local_length = address.domain().map_or(key.len(), |d| key.len() - d.len() - 1);
        self.exact.contains(key) || self.globs.iter().any(|glob| glob.matches(key, local_length))
    }

    fn has_suffix_of(&self, domain: &str) -> bool {
        if self.suffixes.is_empty() {
            return false;
        }
        let mut rest = domain;
        loop {
            // A stranger's domain of a thousand labels must not be hashed a thousand times; no suffix is that long.
            if rest.len() <= MAX_DOMAIN_LENGTH && self.suffixes.contains(rest) {
                return true;
            }
            match rest.split_once('.') {
                Some((_, parent)) => rest = parent,
                None => return false,
            }
        }
    }
}

/// Up to so many strings are compared one by one, which takes less than hashing the question: most rules name a
/// handful of addresses, and every rule is asked.
const FEW: usize = 8;

/// A set of strings, small or large.
#[derive(Clone, Debug, Default)]
struct Strings {
    few: Vec<Box<str>>,
    many: HashSet<Box<str>>,
}

impl Strings {
    fn insert(&mut self, string: Box<str>) {
        if self.contains(&string) {
            return;
        }
        if self.many.is_empty() && self.few.len() < FEW {
            self.few.push(string);
        } else {
            self.many.extend(self.few.drain(..));
            self.many.insert(string);
        }
    }

    fn contains(&self, string: &str) -> bool {
        self.few.iter().any(|few| **few == *string) || (!self.many.is_empty() && self.many.contains(string))
    }

    fn is_empty(&self) -> bool {
        self.few.is_empty() && self.many.is_empty()
    }
}

/// A sender or recipient in the form that patterns are compared in, made when first needed.
pub(super) struct Mailbox<'a> {
    address: Option<&'a Address>,
    key: OnceCell<String>,
}

impl<'a> Mailbox<'a> {
    /// `None` is the null sender.
    pub(super) fn new(address: Option<&'a Address>) -> Self {
        Self { address, key: OnceCell::new() }
    }

    fn key(&self, address: &Address) -> &str {
        self.key.get_or_init(|| address_key(address))
    }
}

/// Why a sender-file can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SenderFileError {
    #[error("line {0}: {1}")]
    Line(usize, PatternError),
    #[error("more than {MAX_SENDER_LINES} lines in all sender-files")]
    TooManyLines,
}

/// Reads a sender-file: an address pattern per line; blank lines and what follows a `#` at the start of a line or behind
/// white space are ignored (within an address, `#` is a character like any other). `lines_left` is lowered by the
/// lines read.
pub(super) fn read_sender_file(text: &str, lines_left: &mut usize) -> Result<AddressSet, SenderFileError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut set = AddressSet::default();
    for (number, line) in (1..).zip(text.lines()) {
        *lines_left = lines_left.checked_sub(1).ok_or(SenderFileError::TooManyLines)?;
        let item = without_comment(line).trim();
        if !item.is_empty() {
            set.insert(item.parse().map_err(|e| SenderFileError::Line(number, e))?);
        }
    }
    Ok(set)
}

fn without_comment(line: &str) -> &str {
    let comment = line
        .match_indices('#')
        .map(|(at, _)| &line[..at])
        .find(|before| before.chars().next_back().is_none_or(char::is_whitespace));
    comment.unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Sender;

    fn set(items: &[&str]) -> AddressSet {
        let mut set = AddressSet::default();
        for item in items {
            set.insert(item.parse().unwrap());
        }
        set
    }

    fn has(set: &AddressSet, address: &str) -> bool {
        let sender = Sender::parse(address.as_bytes()).unwrap();
        set.contains(&Mailbox::new(sender.address()))
    }

    #[track_caller]
    fn check(items: &[&str], yes: &[&str], no: &[&str]) {
        let set = set(items);
        for address in yes {
            assert!(has(&set, address), "{items:?} should match {address}");
        }
        for address in no {
            assert!(!has(&set, address), "{items:?} should not match {address}");
        }
    }

    #[test]
    fn an_address_matches_itself_in_any_case() {
        check(
            &["Alice@Example.ORG", "MÜLLER@example.org", "\"John Doe\"@example.org"],
            &["aLICE@example.org", "<alice@EXAMPLE.org>", "müller@example.org", "\"john doe\"@example.org"],
            &["alice@example.net", "alice+x@example.org", "alice", ""],
        );
    }

    #[test]
    fn a_domain_matches_every_address_at_it_and_none_below() {
        for item in ["@example.org", "*@example.org", "example.org"] {
            check(
                &[item],
                &["a@example.org", "B@EXAMPLE.ORG", "\"a@b\"@example.org"],
                &["a@sub.example.org", "a@badexample.org", "a@org", ""],
            );
        }
        check(&["localhost"], &["a@localhost", "localhost"], &["a"]);
    }

    #[test]
    fn a_leading_dot_matches_the_domain_and_all_below() {
        check(
            &[".example.org"],
            &["a@example.org", "a@sub.example.org", "a@x.y.example.org"],
            &["a@badexample.org", "a@org", "a", ""],
        );
        let endless = format!("a@{}example.org", "b.".repeat(500));
        check(&[".example.org"], &[&endless], &[]);
    }

    #[test]
    fn globs_match_the_parts_apart() {
        check(
            &["alice+*@*.example.org"],
            &["alice+@a.example.org", "ALICE+shop@a.b.example.org"],
            &["alice@a.example.org", "alice+shop@example.org", "\"alice+@x.example.org\"@evil.example"],
        );
        check(&["al?ce@*"], &["alice@a", "alüce@b.example"], &["alce@a", "aliice@a", "alice"]);
    }

    #[test]
    fn a_glob_without_at_matches_the_whole_address() {
        check(&["*"], &["a@b.example", "a"], &[""]);
        check(&["*.example"], &["a@b.example", "b.example"], &["a@example"]);
        check(&["*."], &["\"a.\""], &["a@b.example", "a"]);
        check(&["ali*"], &["alice@a.example", "alice"], &["bob@alice.example"]);
    }

    #[test]
    fn a_sender_without_domain_matches_patterns_without_at_only() {
        check(&["alice"], &["alice", "ALICE", "x@alice"], &["alice@example.org"]);
        check(&["alice@*", "*@*", "@example.org", "alice@alice"], &[], &["alice"]);
    }

    #[test]
    fn only_the_null_pattern_matches_the_null_sender() {
        check(&["<>"], &["", "<>"], &["a@b.example"]);
        check(&["*", "*@*", "?", "@example.org", ".example.org", "alice"], &[], &[""]);
    }

    #[test]
    fn internationalized_domains_match_however_they_are_written() {
        for item in [
            "a@bücher.example",
            "@BÜCHER.example",
            "bücher.example",
            ".bücher.example",
            "a*@bücher.example",
            "*@bücher.*",
            "*@XN--BCHER-KVA.ex*",
            "*bcher-kva.example",
            "*@xn--bcher*",
        ] {
            check(&[item], &["a@xn--bcher-kva.example", "a@Bücher.example"], &["a@bucher.example"]);
        }
        check(&["*.bücher.example"], &["a@x.bücher.example"], &["a@bücher.example"]);
        check(&["*müller*"], &["hans.MÜLLER@example.org"], &["muller@example.org"]);
    }

    #[test]
    fn greek_names_match_although_lower_case_has_two_sigmas() {
        check(
            &["ΝΙΚΟΣ*@example.org", "ΟΔΟΣ@example.org"],
            &["νικος@example.org", "ΝΙΚΟΣΑ@example.org", "οδος@example.org"],
            &["νικο@example.org"],
        );
    }

    #[test]
    fn a_sender_file_has_comments_blank_lines_and_any_line_ending() {
        let text = "\u{feff}# friends\r\n\r\n  alice@example.org  \r\n<>\n\t@b.example # all\n#x@c.example\nx#y@c.example\n.d.example\ne*@e.example";
        let mut left = 100;
        let set = read_sender_file(text, &mut left).unwrap();
        assert_eq!(left, 91);
        for yes in ["alice@example.org", "", "z@b.example", "x#y@c.example", "a@b.d.example", "ee@e.example"]
        {
            assert!(has(&set, yes), "{yes}");
        }
        for no in ["x@c.example", "\"#x\"@c.example", "friends", "f@e.example"] {
            assert!(!has(&set, no), "{no}");
        }
    }

    #[test]
    fn a_bad_line_of_a_sender_file_is_named() {
        let error = read_sender_file("a@b.example\n\nc@d e\n", &mut 10).unwrap_err();
        assert_eq!(error, SenderFileError::Line(3, PatternError::WhiteSpace));
    }

    #[test]
    fn lines_beyond_the_limit_are_refused() {
        assert!(read_sender_file("a\nb", &mut 2).is_ok());
        assert_eq!(read_sender_file("a\nb\nc", &mut 2).unwrap_err(), SenderFileError::TooManyLines);
    }

    #[test]
    fn asking_a_large_set_is_no_search() {
        let text: String = (0..100_000).map(|n| format!("user{n}@example{}.org\n", n % 97)).collect();
        let set = read_sender_file(&text, &mut 100_000).unwrap();
        assert_eq!(set.cost(), 0);
        assert!(set.globs.is_empty());
        assert!(has(&set, "USER99999@example89.org"));
        assert!(!has(&set, "user100000@example90.org"));
    }
}
