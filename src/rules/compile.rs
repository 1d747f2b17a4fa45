//! From what serde read to [`Rules`]: every item understood, every limit kept.

use std::str::FromStr;

use jiff::civil::Date;
use toml::Spanned;
use toml::value::Datetime;

use super::file::{self, File, List};
use super::senders::{MAX_SENDER_LINES, read_sender_file};
use super::{Action, AddressPattern, AddressSet, ClientPattern, HeloPattern, Rule, Rules, RulesError};

/// Most rules in a file: they are asked one after another, for every recipient.
pub const MAX_RULES: usize = 1000;

/// Most items in all lists of a file, not counting the lines of sender-files, which are the place for more.
pub const MAX_PATTERNS: usize = 10_000;

/// Most characters in all globs that a question may be compared with; those of a sender-file count for each rule that
/// names it. Globs are scanned one after another, each at worst in (its length × the address's length) steps: this keeps
/// the worst that a user can think up well under a second of one processor.
pub const MAX_GLOB_CHARACTERS: usize = 128 * 1024;

/// Most sender-files that a file may name: each is opened and read for it.
pub const MAX_SENDER_FILES: usize = 16;

/// See [`Rules::parse`].
pub(super) fn rules(
    text: &str,
    sender_file: impl FnMut(&str) -> Option<String>,
) -> Result<Rules, RulesError> {
    let text = without_byte_order_mark(text);
    let file = File::read(text)?;
    if let Some(rule) = file.rule.get(MAX_RULES) {
        let message = format!("too many rules, expected at most {MAX_RULES}");
        return Err(RulesError::at(text, rule.span().start, message));
    }
    let mut compiler = Compiler {
        text,
        sender_file,
        file_names: Vec::new(),
        sender_files: Vec::new(),
        patterns_left: MAX_PATTERNS,
        glob_characters_left: MAX_GLOB_CHARACTERS,
        lines_left: MAX_SENDER_LINES,
    };
    let redirect_extension = file.redirect_extension;
    let redirect_extension = redirect_extension.map(|e| compiler.redirect_extension(e)).transpose()?;
    let rules =
        file.rule.into_iter().map(|rule| compiler.rule(rule.into_inner())).collect::<Result<_, _>>()?;
    Ok(Rules {
        mixed: file.mixed,
        redirect_extension,
        default: file.default,
        rules,
        sender_files: compiler.sender_files,
    })
}

/// See [`Rules::sender_file_names`].
pub(super) fn sender_file_names(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    let Ok(file) = File::read(without_byte_order_mark(text)) else {
        return names;
    };
    let lists = file.rule.into_iter().filter_map(|rule| rule.into_inner().sender_file);
    for name in lists.flat_map(List::items).map(Spanned::into_inner) {
        if names.len() < MAX_SENDER_FILES && refused_name(&name).is_none() && !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// See [`Rules::from_sender_lists`].
pub(super) fn sender_lists(accept: &[String], reject: &[String]) -> Rules {
    let mut characters_left = MAX_GLOB_CHARACTERS;
    let mut rule = |items: &[String], action| {
        let mut set = AddressSet::default();
        let mut some = false;
        for pattern in items.iter().filter_map(|item| item.parse::<AddressPattern>().ok()) {
            if let Some(left) = characters_left.checked_sub(pattern.cost()) {
                characters_left = left;
                set.insert(pattern);
                some = true;
            }
        }
        some.then(|| Rule { sender: Some(set), action, ..Rule::default() })
    };
    let rules = [rule(accept, Action::Accept), rule(reject, Action::Reject)];
    Rules { rules: rules.into_iter().flatten().collect(), ..Rules::default() }
}

struct Compiler<'t, F> {
    text: &'t str,
    sender_file: F,
    /// The names of `sender_files`, in the same order.
    file_names: Vec<String>,
    sender_files: Vec<AddressSet>,
    patterns_left: usize,
    glob_characters_left: usize,
    lines_left: usize,
}

impl<F: FnMut(&str) -> Option<String>> Compiler<'_, F> {
    fn rule(&mut self, rule: file::Rule) -> Result<Rule, RulesError> {
        Ok(Rule {
            sender: rule.sender.map(|list| self.addresses(list, true)).transpose()?,
            sender_files: rule.sender_file.map(|list| self.files(list)).transpose()?,
            recipient: rule.recipient.map(|list| self.addresses(list, false)).transpose()?,
            client: rule.client.map(|list| self.patterns(list, ClientPattern::cost)).transpose()?,
            helo: rule.helo.map(|list| self.patterns(list, HeloPattern::cost)).transpose()?,
            size_over: rule.size_over.map(|size| size.0),
            expires: rule.expires.map(|date| self.date(&date)).transpose()?,
            action: rule.action,
            reply: rule.reply,
        })
    }

    fn addresses(&mut self, list: Spanned<List>, null_allowed: bool) -> Result<AddressSet, RulesError> {
        let mut set = AddressSet::default();
        for item in self.items(list)? {
            let pattern = self.pattern(&item, AddressPattern::cost)?;
            if matches!(pattern, AddressPattern::Null) && !null_allowed {
                return Err(self.error(&item, "no recipient is <>, expected an address, a domain or a glob"));
            }
            set.insert(pattern);
        }
        Ok(set)
    }

    fn patterns<P>(&mut self, list: Spanned<List>, cost: impl Fn(&P) -> usize) -> Result<Vec<P>, RulesError>
    where
        P: FromStr<Err: std::fmt::Display>,
    {
        let items = self.items(list)?;
        items.iter().map(|item| self.pattern(item, &cost)).collect()
    }

    fn pattern<P>(&mut self, item: &Spanned<String>, cost: impl Fn(&P) -> usize) -> Result<P, RulesError>
    where
        P: FromStr<Err: std::fmt::Display>,
    {
        let pattern = item.get_ref().parse().map_err(|e| self.error(item, e))?;
        self.spend(item, cost(&pattern))?;
        Ok(pattern)
    }

    /// The indexes of the files that a list names, which are read if they are new.
    fn files(&mut self, list: Spanned<List>) -> Result<Vec<usize>, RulesError> {
        let mut indexes = Vec::new();
        for item in self.items(list)? {
            let known = self.file_names.iter().position(|name| name == item.get_ref());
            let index = match known {
                Some(index) => index,
                None => self.read_file(&item)?,
            };
            if !indexes.contains(&index) {
                self.spend(&item, self.sender_files[index].cost())?;
                indexes.push(index);
            }
        }
        Ok(indexes)
    }

    fn read_file(&mut self, item: &Spanned<String>) -> Result<usize, RulesError> {
        let name = item.get_ref();
        if let Some(why) = refused_name(name) {
            return Err(self.error(item, why));
        }
        if self.file_names.len() == MAX_SENDER_FILES {
            let message = format!("too many sender-files, expected at most {MAX_SENDER_FILES}");
            return Err(self.error(item, message));
        }
        let text = (self.sender_file)(name)
            .ok_or_else(|| self.error(item, format!("no sender-file \"{name}\" that can be read")))?;
        let set = read_sender_file(&text, &mut self.lines_left)
            .map_err(|e| self.error(item, format!("sender-file \"{name}\" {e}")))?;
        self.file_names.push(name.clone());
        self.sender_files.push(set);
        Ok(self.sender_files.len() - 1)
    }

    fn date(&self, value: &Spanned<Datetime>) -> Result<Date, RulesError> {
        // A day is enough, and a time would raise the question of the zone.
        let date = match value.get_ref() {
            Datetime { date: Some(date), time: None, offset: None } => i16::try_from(date.year)
                .ok()
                .zip(i8::try_from(date.month).ok())
                .zip(i8::try_from(date.day).ok())
                .and_then(|((year, month), day)| Date::new(year, month, day).ok()),
            _ => None,
        };
        date.ok_or_else(|| self.error(value, "expected a date such as 2027-01-31"))
    }

    fn redirect_extension(&self, value: Spanned<String>) -> Result<String, RulesError> {
        let refused = |c: char| matches!(c, '/' | '@') || c.is_control() || c.is_whitespace();
        let text = value.get_ref();
        if text.is_empty() || text.starts_with('.') || text.contains(refused) {
            return Err(self.error(
                &value,
                "expected an address extension such as \"junk\", without \"/\", \"@\", white space or a leading dot",
            ));
        }
        Ok(value.into_inner())
    }

    /// The items of a list, of which there must be one: a key without values could match nothing.
    fn items(&mut self, list: Spanned<List>) -> Result<Vec<Spanned<String>>, RulesError> {
        let start = list.span().start;
        let items = List::items(list);
        if items.is_empty() {
            let message = "empty list, expected at least one item";
            return Err(RulesError::at(self.text, start, message));
        }
        match self.patterns_left.checked_sub(items.len()) {
            Some(left) => self.patterns_left = left,
            None => {
                let message = format!("too many items, expected at most {MAX_PATTERNS} in the file");
                return Err(RulesError::at(self.text, start, message));
            }
        }
        Ok(items)
    }

    fn spend(&mut self, item: &Spanned<String>, characters: usize) -> Result<(), RulesError> {
        self.glob_characters_left = self.glob_characters_left.checked_sub(characters).ok_or_else(|| {
            let message = format!("too many globs, expected at most {MAX_GLOB_CHARACTERS} characters");
            self.error(item, message)
        })?;
        Ok(())
    }

    fn error<T>(&self, item: &Spanned<T>, message: impl std::fmt::Display) -> RulesError {
        RulesError::at(self.text, item.span().start, message)
    }
}

/// Why a file of this name isn't opened. What opens it, as the user, can't leave their home by a name that passes, and
/// a hidden file is hardly meant.
fn refused_name(name: &str) -> Option<&'static str> {
    if name.trim().is_empty() {
        Some("empty name, expected the name of a sender-file")
    } else if name.contains(char::is_control) {
        Some("control character in the name of a sender-file")
    } else if name.starts_with('/') {
        Some("absolute path, expected the name of a sender-file relative to the rules file's directory")
    } else if name.starts_with('.') || name.split('/').any(|component| component == "..") {
        Some("leading dot or \"..\" in the name of a sender-file")
    } else if name.len() > super::MAX_PATTERN_LENGTH {
        Some("name of a sender-file is too long")
    } else {
        None
    }
}

/// Some editors put one at the start; TOML 1.0 has no place for it.
fn without_byte_order_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}
