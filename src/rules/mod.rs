//! Envelope rules: what `rules.toml`, of a user or of the site, says about a mail before its body is known.
//!
//! [`Rules::parse`] understands the text, [`Rules::judge`] answers a [`Question`]. Nothing here reads a file: whoever
//! parses looks the sender-files up, by the names that [`Rules::sender_file_names`] gives beforehand.
//!
//! * `file`: the TOML as serde reads it, and positions in it
//! * `compile`: from that to [`Rules`], with every limit
//! * `pattern`: a single item of a list
//! * `senders`: many address patterns asked at once
//!
//! # Which address an item means
//!
//! `sender`, `recipient`, sender-files and the directory's sender lists share one notation:
//!
//! | item | means |
//! | --- | --- |
//! | `alice@example.org` | that address, in any case |
//! | `alice+*@example.*` | a glob, matched against local part and domain apart |
//! | `@example.org`, `example.org` | any address at that domain |
//! | `.example.org` | any address at that domain or below it |
//! | `*`, `*.example.org` | a glob without `@`, matched against the whole address |
//! | `alice` | the address without a domain (also any at a domain `alice`: the two look alike) |
//! | `<>` | the null sender, which nothing else matches, not even `*` |
//!
//! An address without a domain is matched by items without `@` only.

mod compile;
mod file;
mod pattern;
mod senders;

use std::borrow::Cow;
use std::cell::OnceCell;
use std::fmt;
use std::net::IpAddr;

use jiff::civil::Date;
use serde::Deserialize;

pub use self::compile::{MAX_GLOB_CHARACTERS, MAX_PATTERNS, MAX_RULES, MAX_SENDER_FILES};
pub use self::pattern::MAX_PATTERN_LENGTH;
pub use self::senders::MAX_SENDER_LINES;

use self::pattern::{AddressPattern, ClientPattern, HeloPattern, host_key};
use self::senders::{AddressSet, Mailbox};
use crate::address::{Address, Sender};
use crate::verdict::Verdict;

/// What is known about a mail at RCPT TO, or again at the end of the message.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// Of MAIL FROM.
    pub sender: &'a Sender,
    /// Of RCPT TO.
    pub recipient: &'a Address,
    /// The client's address; an IPv4-mapped IPv6 address counts as the IPv4 address.
    pub client_address: Option<IpAddr>,
    /// The client's host name, only if the MTA verified it (its address has the name and the name has the address).
    pub client_name: Option<&'a str>,
    /// What the client called itself.
    pub helo: Option<&'a str>,
    /// Bytes: the declared `SIZE=` (RFC 1870) at RCPT TO, the real size at the end of the message.
    pub size: Option<u64>,
    /// Today in UTC, for rules that expire.
    pub today: Date,
}

/// What a rule says is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Let the user's filters decide.
    #[default]
    Filter,
    /// Accept, and ask no filter.
    Accept,
    /// Refuse for good.
    Reject,
    /// Refuse for now.
    Defer,
}

/// What becomes of a refuser's copy when others accept the mail, from the mildest to the strongest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mixed {
    /// They get it all the same.
    Deliver,
    /// It goes to their address with the redirect extension.
    Redirect,
    /// It is not delivered, and nobody is told.
    Drop,
}

/// The answer to a [`Question`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ruling<'a> {
    /// Of the first rule that matches, else the default.
    pub action: Action,
    /// The rule's own reply as it was written: `[CODE ][D.S.N ]text`, not checked.
    pub reply: Option<&'a str>,
    /// The number of the rule that matches, counted from 1. `None`: the default.
    pub rule: Option<usize>,
    /// What can be no last word before the real size is known, since a rule before it would match a larger message.
    pub waits_for_size: WaitsForSize,
}

/// Which answers, of rules or of who is asked after them, are not final: rules that would match a larger message say otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WaitsForSize {
    /// Accepting.
    pub accept: bool,
    /// Rejecting and deferring.
    pub refusal: bool,
}

impl WaitsForSize {
    /// Whatever is said.
    pub const ALL: Self = Self { accept: true, refusal: true };

    /// Whether anything does.
    pub fn any(self) -> bool {
        self.accept || self.refusal
    }

    /// Whether this is not final.
    pub fn holds_back(self, verdict: Verdict) -> bool {
        match verdict {
            Verdict::Accept => self.accept,
            Verdict::Reject | Verdict::Defer => self.refusal,
        }
    }

    /// When rules say `action` as long as the message is no larger, and one of `larger` if it is.
    fn new(action: Action, larger: &[Action]) -> Self {
        let says_otherwise = |than| larger.iter().any(|other| *other != action && *other != than);
        Self { accept: says_otherwise(Action::Accept), refusal: says_otherwise(Action::Reject) }
    }
}

/// A rules file that has been understood. The [`Default`] is the empty one, which leaves everything to the filters.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    mixed: Option<Mixed>,
    redirect_extension: Option<String>,
    default: Action,
    rules: Vec<Rule>,
    /// What [`Rule::sender_files`] indexes: a file that many rules name is kept once.
    sender_files: Vec<AddressSet>,
}

/// A `[[rule]]`. What is `None` was not set and constrains nothing.
#[derive(Clone, Debug, Default)]
struct Rule {
    sender: Option<AddressSet>,
    sender_files: Option<Vec<usize>>,
    recipient: Option<AddressSet>,
    client: Option<Vec<ClientPattern>>,
    helo: Option<Vec<HeloPattern>>,
    size_over: Option<u64>,
    expires: Option<Date>,
    action: Action,
    reply: Option<String>,
}

/// What is wrong with a rules file, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RulesError {
    /// Counted from 1.
    pub line: usize,
    /// In characters, counted from 1.
    pub column: usize,
    /// What is wrong and what was expected.
    pub message: String,
}

impl Rules {
    /// Reads a rules file. `sender_file` gives the text of a sender-file by its name, `None` if there is none; it is
    /// asked once for each name, and only for names that [`Rules::sender_file_names`] gives.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong. A file with an error is not to be used in part: a rule left out could turn what
    /// the others mean into its opposite.
    pub fn parse(text: &str, sender_file: impl FnMut(&str) -> Option<String>) -> Result<Self, RulesError> {
        compile::rules(text, sender_file)
    }

    /// The names of the sender-files, relative to the user's directory, that a rules file mentions: each once, in order,
    /// at most [`MAX_SENDER_FILES`], without those that [`Rules::parse`] refuses. None if the text is not TOML of a
    /// rules file.
    pub fn sender_file_names(text: &str) -> Vec<String> {
        compile::sender_file_names(text)
    }

    /// The rules that a directory entry's sender lists stand for: who is in `accept` is accepted, who is only in `reject`
    /// is rejected, everybody else is for the filters. Items are as in a sender-file. An item that can't be
    /// understood is skipped: the directory is written for other programs too.
    pub fn from_sender_lists(accept: &[String], reject: &[String]) -> Self {
        compile::sender_lists(accept, reject)
    }

    /// The first rule that is in force and all whose keys match, or the default. A rule that asks for something that is
    /// not known (the client's name, say) doesn't match.
    pub fn judge<'a>(&'a self, question: &Question<'_>) -> Ruling<'a> {
        let asked = Asked::new(question);
        let mut larger = Vec::new();
        let ruling = |action, reply, rule, larger: &[Action]| Ruling {
            action,
            reply,
            rule,
            waits_for_size: WaitsForSize::new(action, larger),
        };
        for (number, rule) in (1..).zip(&self.rules) {
            if !rule.matches_but_for_size(&asked, &self.sender_files) {
                continue;
            }
            if is_none_or(&rule.size_over, |limit| question.size.is_some_and(|size| size > *limit)) {
                return ruling(rule.action, rule.reply.as_deref(), Some(number), &larger);
            }
            larger.push(rule.action);
        }
        ruling(self.default, None, None, &larger)
    }

    /// The user's own wish for a refused copy of a mail that others accept.
    pub fn mixed(&self) -> Option<Mixed> {
        self.mixed
    }

    /// The user's own extension for [`Mixed::Redirect`]: not empty, no `/`, `@`, control character or white space, no
    /// leading dot.
    pub fn redirect_extension(&self) -> Option<&str> {
        self.redirect_extension.as_deref()
    }

    /// Whether every answer is [`Action::Filter`] by default. [`Rules::mixed`] may be set all the same.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty() && self.default == Action::Filter
    }
}

impl Rule {
    /// The cheap and the telling first.
    fn matches_but_for_size(&self, asked: &Asked<'_>, sender_files: &[AddressSet]) -> bool {
        let Asked { question, .. } = asked;
        is_none_or(&self.expires, |last| question.today <= *last)
            && is_none_or(&self.client, |any| any.iter().any(|p| asked.client_matches(p)))
            && is_none_or(&self.helo, |any| asked.helo_matches(any))
            && is_none_or(&self.recipient, |set| set.contains(&asked.recipient))
            && is_none_or(&self.sender, |set| set.contains(&asked.sender))
            && is_none_or(&self.sender_files, |any| {
                any.iter().filter_map(|file| sender_files.get(*file)).any(|set| set.contains(&asked.sender))
            })
    }
}

fn is_none_or<T>(key: &Option<T>, matches: impl FnOnce(&T) -> bool) -> bool {
    key.as_ref().is_none_or(matches)
}

/// A question with what is derived from it on the way: each at most once, whatever the number of rules.
struct Asked<'a> {
    question: &'a Question<'a>,
    sender: Mailbox<'a>,
    recipient: Mailbox<'a>,
    client_address: Option<IpAddr>,
    client_name: OnceCell<Option<Cow<'a, str>>>,
    helo: OnceCell<Option<Cow<'a, str>>>,
}

impl<'a> Asked<'a> {
    fn new(question: &'a Question<'a>) -> Self {
        Self {
            question,
            sender: Mailbox::new(question.sender.address()),
            recipient: Mailbox::new(Some(question.recipient)),
            client_address: question.client_address.map(|address| address.to_canonical()),
            client_name: OnceCell::new(),
            helo: OnceCell::new(),
        }
    }

    fn client_matches(&self, pattern: &ClientPattern) -> bool {
        match pattern {
            ClientPattern::Network(network) => self.client_address.is_some_and(|a| network.contains(&a)),
            ClientPattern::Name(glob) => self
                .client_name
                .get_or_init(|| self.question.client_name.map(host_key))
                .as_ref()
                .is_some_and(|name| glob.matches(name)),
        }
    }

    fn helo_matches(&self, any: &[HeloPattern]) -> bool {
        self.helo
            .get_or_init(|| self.question.helo.map(host_key))
            .as_ref()
            .is_some_and(|name| any.iter().any(|pattern| pattern.0.matches(name)))
    }
}

impl RulesError {
    /// An error at a byte of the text.
    fn at(text: &str, offset: usize, message: impl fmt::Display) -> Self {
        let (line, column) = file::position(text, offset);
        Self { line, column, message: message.to_string() }
    }
}

impl fmt::Display for RulesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.line, self.column, self.message)
    }
}

impl std::error::Error for RulesError {}

#[cfg(test)]
mod tests;
