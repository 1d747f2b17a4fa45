//! An SMTP reply (RFC 5321 §4.2) with its enhanced status code (RFC 3463): the only door through which a user's
//! text can reach an SMTP session.
//!
//! Whatever goes in, what comes out is a 4xx or 5xx reply of the class that the verdict asks for, in lines
//! without control characters, short enough for every MTA, and in ASCII unless the client speaks SMTPUTF8.

use std::fmt;

use crate::{address::Address, verdict::Verdict};

/// Most lines of a reply; libmilter's `smfi_setmlreply` takes no more.
pub const MAX_LINES: usize = 32;

/// Longest text of a line, in bytes as the MTA gets it; libmilter takes 980. Codes are not counted. RFC 5321
/// §4.5.3.1.5 gives whole lines 512 octets and wants clients to take more; MTAs pass these on as they are.
pub const MAX_LINE_LENGTH: usize = 960;

/// A reply that refuses or puts off.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reply {
    /// 400 to 599 without 421 and 521, which would close the connection.
    code: u16,
    /// Subject and detail of the enhanced status code; its class is that of `code`.
    enhanced: (u16, u16),
    /// At least one; no controls, no bare CR or LF.
    lines: Vec<String>,
}

impl Reply {
    /// `550 5.7.1`, the reply of a reject that says nothing.
    pub fn default_reject() -> Self {
        Self::new(550, (7, 1), "message refused by the recipient")
    }

    /// `451 4.7.1`, the reply of a defer that says nothing.
    pub fn default_defer() -> Self {
        Self::new(451, (7, 1), "recipient asks to try again later")
    }

    /// The reply of a verdict that says nothing. An accept has none; it gets that of a defer, which refuses nobody.
    pub fn default_of(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Reject => Self::default_reject(),
            Verdict::Accept | Verdict::Defer => Self::default_defer(),
        }
    }

    /// `452 4.5.3`, for a recipient of whom there is no room in the transaction.
    pub fn too_many_recipients() -> Self {
        Self::new(452, (5, 3), "too many recipients")
    }

    /// `452 4.5.3`, for a recipient who is to be asked alone.
    pub fn one_filter_at_a_time() -> Self {
        Self::new(452, (5, 3), "recipients who filter differently are taken one at a time")
    }

    /// `550 5.1.1`, for an address of ours that nobody has.
    pub fn unknown_user() -> Self {
        Self::new(550, (1, 1), "no such user here")
    }

    /// `451 4.3.0`, for trouble of our own.
    pub fn trouble() -> Self {
        Self::new(451, (3, 0), "cannot decide right now, try again later")
    }

    fn new(code: u16, enhanced: (u16, u16), text: &str) -> Self {
        Self { code, enhanced, lines: vec![text.to_owned()] }
    }

    /// Reads `[CODE ][D.S.N ]text`, and further lines, for a reject or a defer.
    ///
    /// Codes that do not agree with the verdict, and 421 and 521, are replaced by the default; so is an empty
    /// text. For an accept, which has no reply, the result is that of a defer: nothing can turn it into a refusal.
    pub fn from_text(verdict: Verdict, text: &str, smtputf8: bool) -> Self {
        let default = Self::default_of(verdict);
        let mut lines = text.split('\n').map(|line| line.strip_suffix('\r').unwrap_or(line));
        let first = lines.next().unwrap_or_default().trim();
        let class = default.class();
        let (code, rest) = split_code(first);
        let (enhanced, rest) = split_enhanced(rest);
        let code = code.filter(|c| c / 100 == class && !matches!(c, 421 | 521)).unwrap_or(default.code);
        let enhanced = match enhanced {
            Some((c, subject, detail)) if c == class => (subject, detail),
            _ => default.enhanced,
        };
        let mut lines: Vec<String> = std::iter::once(rest)
            .chain(lines)
            .take(MAX_LINES)
            .map(|line| clean_line(line, smtputf8))
            .collect();
        while lines.len() > 1 && lines.last().is_some_and(String::is_empty) {
            lines.pop();
        }
        if lines.iter().all(String::is_empty) {
            lines = default.lines;
        }
        Self { code, enhanced, lines }
    }

    /// One reply for recipients that differ: the default codes and a line for each address, up to [`MAX_LINES`].
    pub fn per_recipient(verdict: Verdict, replies: &[(&Address, &Self)], smtputf8: bool) -> Self {
        let default = Self::default_of(verdict);
        let line = |(address, reply): &(&Address, &Self)| {
            clean_line(&format!("<{address}>: {}", reply.lines.join(" ")), smtputf8)
        };
        let mut lines: Vec<String> = if replies.len() <= MAX_LINES {
            replies.iter().map(line).collect()
        } else {
            replies.iter().take(MAX_LINES - 1).map(line).collect()
        };
        if replies.len() > MAX_LINES {
            lines.push(format!("and {} more recipients", replies.len() - lines.len()));
        }
        Self { lines, ..default }
    }

    /// The same with `?` for every character that a client without SMTPUTF8 can't read.
    pub fn into_ascii(mut self) -> Self {
        for line in self.lines.iter_mut().filter(|line| !line.is_ascii()) {
            *line = line.replace(|c: char| !c.is_ascii(), "?");
        }
        self
    }

    /// The class of reply code and enhanced status code: 4 or 5.
    pub fn class(&self) -> u16 {
        self.code / 100
    }

    /// The reply code, as `550`.
    pub fn code(&self) -> String {
        self.code.to_string()
    }

    /// The enhanced status code, as `5.7.1`.
    pub fn enhanced(&self) -> String {
        format!("{}.{}.{}", self.class(), self.enhanced.0, self.enhanced.1)
    }

    /// The lines for a milter reply: `%` doubled, since MTAs read the text as a format (Sendmail turns a lone
    /// one into `550 Command rejected`).
    pub fn milter_lines(&self) -> Vec<String> {
        self.lines.iter().map(|line| line.replace('%', "%%")).collect()
    }

    /// The reply as the action of a Postfix policy service, which has one line: `550 5.7.1 text`.
    pub fn policy_action(&self) -> String {
        let text = truncated(&self.lines.join(" "), MAX_LINE_LENGTH).to_owned();
        format!("{} {} {}", self.code, self.enhanced(), text)
    }
}

impl fmt::Display for Reply {
    /// Writes the reply as the client sees it, with LF between lines.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, line) in self.lines.iter().enumerate() {
            let last = n + 1 == self.lines.len();
            write!(f, "{}{}{} {line}", self.code, if last { ' ' } else { '-' }, self.enhanced())?;
            if !last {
                f.write_str("\n")?;
            }
        }
        Ok(())
    }
}

/// A leading reply code and what follows it.
fn split_code(text: &str) -> (Option<u16>, &str) {
    let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
    let looks_like_code = word.len() == 3
        && word.bytes().all(|b| b.is_ascii_digit())
        && matches!(word.as_bytes(), [b'2'..=b'5', b'0'..=b'5', _]);
    match word.parse() {
        Ok(code) if looks_like_code => (Some(code), rest.trim_start()),
        _ => (None, text),
    }
}

/// A leading enhanced status code and what follows it. RFC 3463 §2: up to three digits, no leading zeros.
fn split_enhanced(text: &str) -> (Option<(u16, u16, u16)>, &str) {
    let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
    let number = |part: &str| -> Option<u16> {
        let plain = !part.is_empty() && part.len() <= 3 && part.bytes().all(|b| b.is_ascii_digit());
        let plain = plain && (part == "0" || !part.starts_with('0'));
        plain.then(|| part.parse().ok())?
    };
    let mut parts = word.split('.').map(number);
    match (parts.next().flatten(), parts.next().flatten(), parts.next().flatten(), parts.next()) {
        (Some(class @ (2 | 4 | 5)), Some(subject), Some(detail), None) => {
            (Some((class, subject, detail)), rest.trim_start())
        }
        _ => (None, text),
    }
}

/// One line without anything that an SMTP session could misread.
fn clean_line(line: &str, smtputf8: bool) -> String {
    let mut clean = String::new();
    let mut length = 0;
    for c in line.trim_end().chars() {
        let c = match c {
            '\t' => ' ',
            // Line and paragraph separators and format characters (bidirectional marks among them) forge what people read.
            c if c.is_control()
                || matches!(c, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}') =>
            {
                '?'
            }
            c if !c.is_ascii() && !smtputf8 => '?',
            c => c,
        };
        length += if c == '%' { 2 } else { c.len_utf8() };
        if length > MAX_LINE_LENGTH {
            break;
        }
        clean.push(c);
    }
    clean
}

fn truncated(text: &str, length: usize) -> &str {
    let mut end = text.len().min(length);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reject(text: &str) -> String {
        Reply::from_text(Verdict::Reject, text, false).to_string()
    }

    #[test]
    fn codes_are_read_and_the_rest_is_text() {
        assert_eq!(reject("554 5.6.0 no thanks"), "554 5.6.0 no thanks");
        assert_eq!(reject("554 no thanks"), "554 5.7.1 no thanks");
        assert_eq!(reject("5.6.0 no thanks"), "550 5.6.0 no thanks");
        assert_eq!(reject("no thanks"), "550 5.7.1 no thanks");
        assert_eq!(reject("100 reasons"), "550 5.7.1 100 reasons");
        assert_eq!(reject("5.6 is a number"), "550 5.7.1 5.6 is a number");
        assert_eq!(reject("5.06.0 x"), "550 5.7.1 5.06.0 x");
    }

    #[test]
    fn the_text_never_turns_one_verdict_into_another() {
        assert_eq!(reject("451 4.7.1 later"), "550 5.7.1 later");
        assert_eq!(reject("250 2.0.0 fine"), "550 5.7.1 fine");
        let defer = Reply::from_text(Verdict::Defer, "550 5.7.1 never", false);
        assert_eq!(defer.to_string(), "451 4.7.1 never");
    }

    #[test]
    fn codes_that_close_the_connection_are_refused() {
        assert_eq!(reject("521 5.3.2 go away"), "550 5.3.2 go away");
        assert_eq!(Reply::from_text(Verdict::Defer, "421 later", false).to_string(), "451 4.7.1 later");
    }

    #[test]
    fn an_empty_text_gets_the_default() {
        assert_eq!(reject(""), Reply::default_reject().to_string());
        assert_eq!(reject("554 5.6.0"), "554 5.6.0 message refused by the recipient");
        assert_eq!(reject("\n\n"), Reply::default_reject().to_string());
    }

    #[test]
    fn more_lines_become_a_multi_line_reply() {
        assert_eq!(reject("554 5.6.0 one\r\ntwo\n\n"), "554-5.6.0 one\n554 5.6.0 two");
        let many = vec!["x"; 50].join("\n");
        assert_eq!(reject(&many).lines().count(), MAX_LINES);
    }

    #[test]
    fn percent_signs_are_doubled_for_the_milter_only() {
        let reply = Reply::from_text(Verdict::Reject, "100% no", false);
        assert_eq!(reply.milter_lines(), ["100%% no"]);
        assert_eq!(reply.policy_action(), "550 5.7.1 100% no");
    }

    #[test]
    fn text_beyond_ascii_needs_smtputf8() {
        assert_eq!(reject("nein, böse"), "550 5.7.1 nein, b?se");
        let utf8 = Reply::from_text(Verdict::Reject, "böse", true);
        assert_eq!(utf8.to_string(), "550 5.7.1 böse");
        assert_eq!(utf8.into_ascii().to_string(), "550 5.7.1 b?se");
        assert_eq!(Reply::from_text(Verdict::Reject, "a\u{202e}b", true).to_string(), "550 5.7.1 a?b");
    }

    #[test]
    fn many_recipients_are_summed_up() {
        let reply = Reply::default_reject();
        let addresses: Vec<_> =
            (0..40).map(|n| Address::parse(format!("u{n}@x.example").as_bytes()).unwrap()).collect();
        let pairs: Vec<_> = addresses.iter().map(|a| (a, &reply)).collect();
        let all = Reply::per_recipient(Verdict::Reject, &pairs, false);
        assert_eq!(all.lines.len(), MAX_LINES);
        assert_eq!(all.lines[31], "and 9 more recipients");
    }

    proptest! {
        #[test]
        fn what_was_cleaned_is_clean(text in "(?s).{0,200}", reject in any::<bool>()) {
            let verdict = if reject { Verdict::Reject } else { Verdict::Defer };
            let reply = Reply::from_text(verdict, &text, true);
            let again = format!("{} {} {}", reply.code(), reply.enhanced(), reply.lines.join("\n"));
            // What stands in front of a first line is no part of it.
            if reply.lines[0].trim_start() == reply.lines[0] {
                prop_assert_eq!(Reply::from_text(verdict, &again, true), reply);
            }
        }

        #[test]
        fn nothing_dangerous_reaches_the_session(text in "(?s).{0,200}", reject in any::<bool>(), smtputf8 in any::<bool>()) {
            let verdict = if reject { Verdict::Reject } else { Verdict::Defer };
            let reply = Reply::from_text(verdict, &text, smtputf8);
            prop_assert_eq!(reply.class(), if reject { 5 } else { 4 });
            prop_assert!(!matches!(reply.code, 421 | 521));
            prop_assert!((1..=MAX_LINES).contains(&reply.lines.len()));
            for line in reply.milter_lines().iter().chain([&reply.policy_action()]) {
                prop_assert!(!line.chars().any(char::is_control));
                prop_assert!(smtputf8 || line.is_ascii());
            }
            for line in reply.milter_lines() {
                prop_assert!(line.len() <= MAX_LINE_LENGTH);
                prop_assert!(!line.replace("%%", "").contains('%'));
            }
        }
    }
}
