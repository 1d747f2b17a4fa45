//! The shape of `rules.toml`, and where in it something is: what serde reads, before anything is understood.

use std::fmt;

use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use toml::Spanned;
use toml::value::Datetime;

use super::{Action, Mixed, RulesError};
use crate::spelling;

/// A rules file.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct File {
    pub(super) mixed: Option<Mixed>,
    pub(super) redirect_extension: Option<Spanned<String>>,
    #[serde(default)]
    pub(super) default: Action,
    #[serde(default)]
    pub(super) rule: Vec<Spanned<Rule>>,
}

/// A `[[rule]]` of it.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Rule {
    pub(super) sender: Option<Spanned<List>>,
    pub(super) sender_file: Option<Spanned<List>>,
    pub(super) recipient: Option<Spanned<List>>,
    pub(super) client: Option<Spanned<List>>,
    pub(super) helo: Option<Spanned<List>>,
    pub(super) size_over: Option<Size>,
    pub(super) action: Action,
    pub(super) reply: Option<String>,
    pub(super) expires: Option<Spanned<Datetime>>,
}

impl File {
    /// Reads TOML.
    pub(super) fn read(text: &str) -> Result<Self, RulesError> {
        toml::from_str(text).map_err(|e| {
            let start = e.span().map_or(0, |span| span.start);
            RulesError::at(text, start, spelling::corrected(e.message(), |_| None))
        })
    }
}

/// A list of strings, or a string as a list of one.
pub(super) enum List {
    One(String),
    Many(Vec<Spanned<String>>),
}

impl List {
    /// The items and where they are.
    pub(super) fn items(list: Spanned<Self>) -> Vec<Spanned<String>> {
        let span = list.span();
        match list.into_inner() {
            Self::One(item) => vec![Spanned::new(span, item)],
            Self::Many(items) => items,
        }
    }
}

impl<'de> Deserialize<'de> for List {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListVisitor;

        impl<'de> Visitor<'de> for ListVisitor {
            type Value = List;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E: Error>(self, item: &str) -> Result<List, E> {
                Ok(List::One(item.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<List, A::Error> {
                let mut list = Vec::new();
                while let Some(item) = items.next_element()? {
                    list.push(item);
                }
                Ok(List::Many(list))
            }
        }

        deserializer.deserialize_any(ListVisitor)
    }
}

/// A number of bytes: an integer, or a string of digits with an optional K, M or G (powers of 1024).
#[derive(Clone, Copy)]
pub(super) struct Size(pub(super) u64);

impl Size {
    fn parse(text: &str) -> Option<Self> {
        let (digits, shift) = match text.trim().split_at_checked(text.trim().len().saturating_sub(1)) {
            Some((digits, "k" | "K")) => (digits, 10),
            Some((digits, "M")) => (digits, 20),
            Some((digits, "G")) => (digits, 30),
            _ => (text.trim(), 0),
        };
        // `u64::from_str` takes a plus sign.
        if !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        digits.parse::<u64>().ok()?.checked_mul(1 << shift).map(Self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;

        impl Visitor<'_> for SizeVisitor {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size in bytes such as 1048576, \"500K\", \"10M\" or \"1G\"")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Size, E> {
                Size::parse(text).ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(text), &self))
            }

            fn visit_i64<E: Error>(self, bytes: i64) -> Result<Size, E> {
                u64::try_from(bytes)
                    .map(Size)
                    .map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(bytes), &self))
            }

            fn visit_u64<E: Error>(self, bytes: u64) -> Result<Size, E> {
                Ok(Size(bytes))
            }
        }

        deserializer.deserialize_any(SizeVisitor)
    }
}

/// Line and column, both counted from 1, of a byte of the text; columns in characters.
pub(super) fn position(text: &str, offset: usize) -> (usize, usize) {
    let end = (0..=offset.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    let before = &text[..end.unwrap_or(0)];
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    let line = before.matches('\n').count() + 1;
    (line, before[line_start..].chars().count() + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_powers_of_1024() {
        let size = |text| Size::parse(text).map(|s| s.0);
        assert_eq!(size("0"), Some(0));
        assert_eq!(size("1024"), Some(1024));
        assert_eq!(size("3k"), Some(3 << 10));
        assert_eq!(size("3K"), Some(3 << 10));
        assert_eq!(size(" 10M "), Some(10 << 20));
        assert_eq!(size("2G"), Some(2 << 30));
        for bad in [
            "",
            "K",
            "1T",
            "-1",
            "+1",
            "+1K",
            "1.5M",
            "1 M",
            "99999999999999999999",
            "18014398509481984K",
            "é",
            "1é",
        ] {
            assert_eq!(size(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn positions_count_characters_from_one() {
        assert_eq!(position("", 0), (1, 1));
        assert_eq!(position("ab\ncd", 2), (1, 3));
        assert_eq!(position("ab\ncd", 3), (2, 1));
        assert_eq!(position("é\néx", 5), (2, 2));
        assert_eq!(position("é", 1), (1, 1));
        assert_eq!(position("a\n", 99), (2, 1));
    }
}
