//! Right-hand sides: addresses, commands, files and includes, by the tokens of RFC 822 with the leniency of
//! Postfix (tok822_parse(3)).

use std::path::PathBuf;

use super::Target;
use crate::address::{Address, AddressError};
use crate::resolver::source::is_damaged;

/// Characters of a bad name or target that are shown.
const MAX_SHOWN: usize = 60;

/// One of the targets of an entry, as it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Item {
    To(Target),
    Include(PathBuf),
}

/// The files among `items`.
pub(super) fn includes(items: &[Item]) -> impl Iterator<Item = &PathBuf> {
    items.iter().filter_map(|item| match item {
        Item::Include(path) => Some(path),
        Item::To(_) => None,
    })
}

/// A lexical token as of RFC 822 §3.3, with `|`, `%` and `!` among the specials as Postfix has them.
#[derive(Debug)]
pub(super) enum Token {
    /// An atom, a quoted string without its quotes, or a domain literal with its brackets.
    Word(String),
    Operator(char),
}

impl Token {
    pub(super) fn is(&self, operator: char) -> bool {
        matches!(self, Self::Operator(c) if *c == operator)
    }

    pub(super) fn is_word(&self) -> bool {
        matches!(self, Self::Word(_))
    }
}

/// Comments in parentheses are dropped here.
pub(super) fn scan(text: &str, report: &mut dyn FnMut(String)) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut chars = text.chars().peekable();
    while let Some(&c) = chars.peek() {
        let token = match c {
            ' ' | '\t' | '\r' | '\n' => {
                chars.next();
                continue;
            }
            '(' => {
                if !skip_comment(&mut chars) {
                    report(format!("a comment stays open in {}", shown(text)));
                }
                continue;
            }
            '"' | '[' => {
                chars.next();
                let end = if c == '"' { '"' } else { ']' };
                let content = collect(&mut chars, |c| c == end);
                if chars.next().is_none() {
                    report(format!("{end:?} is missing in {}", shown(text)));
                }
                Token::Word(if c == '"' { content } else { format!("[{content}]") })
            }
            c if c != '\\' && is_operator(c) => {
                chars.next();
                Token::Operator(c)
            }
            _ => {
                Token::Word(collect(&mut chars, |c| matches!(c, ' ' | '\t' | '\r' | '\n') || is_operator(c)))
            }
        };
        tokens.push(token);
    }
    tokens
}

fn is_operator(c: char) -> bool {
    "|%!()<>@,;:\\\".[]".contains(c)
}

type Chars<'a> = std::iter::Peekable<std::str::Chars<'a>>;

/// What stands before the first unescaped character that `ends`, without backslashes.
fn collect(chars: &mut Chars<'_>, ends: impl Fn(char) -> bool) -> String {
    let mut content = String::new();
    while let Some(&c) = chars.peek() {
        if c == '\\' {
            chars.next();
        } else if ends(c) {
            break;
        }
        if let Some(c) = chars.next() {
            content.push(if matches!(c, '\t' | '\r' | '\n') { ' ' } else { c });
        }
    }
    content
}

/// Whether the comment, which may hold others, ends.
fn skip_comment(chars: &mut Chars<'_>) -> bool {
    let mut depth = 0;
    while let Some(c) = chars.next() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            '\\' => {
                chars.next();
            }
            _ => {}
        }
        if depth == 0 {
            return true;
        }
    }
    false
}

/// The targets of a right-hand side.
///
/// From right to left, as in Postfix: only from the right it is clear that the words before a `<` are
/// somebody's name, and two words side by side are otherwise two targets that lack a comma.
pub(super) fn items(tokens: &[Token], report: &mut dyn FnMut(String)) -> Vec<Item> {
    let mut groups: Vec<&[Token]> = Vec::new();
    let mut end = tokens.len();
    let mut at = end;
    let mut word_may_follow = true;
    let mut in_group = false;
    while at > 0 {
        let index = at - 1;
        at = index;
        match &tokens[index] {
            Token::Word(_) => {
                if !word_may_follow {
                    groups.push(&tokens[index + 1..end]);
                    end = index + 1;
                }
                word_may_follow = false;
                continue;
            }
            // RFC 822 named group, "team: alice, bob;": what follows the colon counts, the name does not.
            Token::Operator(';') => {
                groups.push(&tokens[index + 1..end]);
                end = index;
                in_group = true;
            }
            Token::Operator(':') if in_group => {
                groups.push(&tokens[index + 1..end]);
                end = skip_back(tokens, index, ",");
                at = end;
                in_group = false;
            }
            // "Alice A. <alice@example.org>": what the angle brackets hold counts.
            Token::Operator('>') => {
                groups.push(&tokens[index + 1..end]);
                let open = tokens[..index].iter().rposition(|token| token.is('<'));
                groups.push(&tokens[open.map_or(0, |open| open + 1)..index]);
                end = skip_back(tokens, open.unwrap_or(0), ">;,:");
                at = end;
            }
            Token::Operator(',') => {
                groups.push(&tokens[index + 1..end]);
                end = index;
            }
            Token::Operator(_) => {}
        }
        word_may_follow = true;
    }
    groups.push(&tokens[..end]);
    let groups = groups.iter().rev().filter(|group| !group.is_empty());
    groups.map(|group| item(group, report)).collect()
}

/// Behind the last of `stops` before `from`.
fn skip_back(tokens: &[Token], from: usize, stops: &str) -> usize {
    tokens[..from]
        .iter()
        .rposition(|token| matches!(token, Token::Operator(c) if stops.contains(*c)))
        .map_or(0, |stop| stop + 1)
}

/// One target. What can't be read is somebody who can't be asked: dropping it would leave the decision to
/// the others of the list.
fn item(tokens: &[Token], report: &mut dyn FnMut(String)) -> Item {
    const INCLUDE: &str = ":include:";
    let text = written(tokens, "");
    let unjudged = |why: String| Item::To(Target::Unjudged(why));
    if text.starts_with('|') {
        return unjudged(format!("command {}", shown(&text)));
    }
    if text.starts_with(['/', '~']) {
        return unjudged(format!("file {}", shown(&text)));
    }
    if is_damaged(&text) {
        report(format!("{} has a character that no target can have", shown(&text)));
        return unjudged(format!("unreadable target {}", shown(&text)));
    }
    if let (Some(keyword), Some(path)) = (text.get(..INCLUDE.len()), text.get(INCLUDE.len()..))
        && keyword.eq_ignore_ascii_case(INCLUDE)
    {
        if path.starts_with('/') {
            return Item::Include(PathBuf::from(path));
        }
        report(format!("{} is no absolute path", shown(&text)));
        return unjudged(format!("{} is no absolute path", shown(&text)));
    }
    // user%host and host!user: only the MTA knows where its rewriting sends these.
    if tokens.iter().any(|token| token.is('%') || token.is('!')) {
        return unjudged(format!("routed address {}", shown(&text)));
    }
    match address(tokens) {
        Ok(address) => Item::To(Target::Address(address)),
        Err(error) => {
            report(format!("{}: {error}", shown(&text)));
            unjudged(format!("unreadable target {}", shown(&text)))
        }
    }
}

/// The last `@` that was not quoted separates the domain.
fn address(tokens: &[Token]) -> Result<Address, AddressError> {
    let (local, domain) = match tokens.iter().rposition(|token| token.is('@')) {
        Some(at) => (written(&tokens[..at], ""), Some(written(&tokens[at + 1..], ""))),
        None => (written(tokens, ""), None),
    };
    mailbox(&local, domain.as_deref())
}

/// An address of parts that are not quoted.
pub(super) fn mailbox(local: &str, domain: Option<&str>) -> Result<Address, AddressError> {
    if local.is_empty() {
        return Err(AddressError::NoLocalPart);
    }
    let local = local.replace('\\', r"\\").replace('"', "\\\"");
    let text = match domain {
        Some(domain) => format!("\"{local}\"@{domain}"),
        None => format!("\"{local}\""),
    };
    Address::parse(text.as_bytes())
}

/// The tokens in their unquoted form, words side by side separated by `between`.
pub(super) fn written(tokens: &[Token], between: &str) -> String {
    let mut text = String::new();
    for (index, token) in tokens.iter().enumerate() {
        match token {
            Token::Word(word) => {
                if index > 0 && tokens[index - 1].is_word() {
                    text.push_str(between);
                }
                text.push_str(word);
            }
            Token::Operator(c) => text.push(*c),
        }
    }
    text
}

/// A piece of somebody's file as it may stand in the log: quoted, escaped, not too long.
pub(super) fn shown(text: &str) -> String {
    match text.char_indices().nth(MAX_SHOWN) {
        Some((at, _)) => format!("{:?}…", &text[..at]),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The targets of a right-hand side as text, and whether anything was reported.
    fn read(text: &str) -> (Vec<String>, bool) {
        let mut problems = Vec::new();
        let mut report = |message| problems.push(message);
        let tokens = scan(text, &mut report);
        let items = items(&tokens, &mut report);
        let written = items.iter().map(|item| match item {
            Item::To(Target::Address(address)) => address.to_string(),
            Item::To(Target::Unjudged(why)) => format!("unjudged {why}"),
            Item::Include(path) => format!("include {}", path.display()),
        });
        (written.collect(), !problems.is_empty())
    }

    fn good(text: &str) -> Vec<String> {
        let (targets, problems) = read(text);
        assert!(!problems, "{text}");
        targets
    }

    #[test]
    fn targets_are_separated_by_commas_or_by_white_space() {
        assert_eq!(good("a, b,c"), ["a", "b", "c"]);
        assert_eq!(good("a b\tc@d.example e"), ["a", "b", "c@d.example", "e"]);
        assert_eq!(good(",a,,b,"), ["a", "b"]);
        assert_eq!(good("a @ b . example, c"), ["a@b.example", "c"]);
        assert_eq!(good(""), [""; 0]);
    }

    #[test]
    fn quotes_and_backslashes_are_resolved() {
        assert_eq!(good(r#""Jane Doe", "a@b"@c.example"#), ["\"Jane Doe\"", "\"a@b\"@c.example"]);
        assert_eq!(good(r"jo\ hn, x\,y"), ["\"jo hn\"", "\"x,y\""]);
        assert_eq!(good(r#""quo\"te""#), [r#""quo\"te""#]);
        assert_eq!(good(r"\alice"), ["alice"]);
    }

    #[test]
    fn names_and_comments_beside_an_address_do_not_count() {
        assert_eq!(good("bob (the builder, (really)), carol"), ["bob", "carol"]);
        assert_eq!(
            good("x, Dave A. Smith <dave@a.example>, <eve@a.example> f"),
            ["x", "dave@a.example", "eve@a.example", "f"]
        );
        assert_eq!(good("team: a, b; , c"), ["a", "b", "c"]);
        assert_eq!(good("bob # no comment"), ["bob", "#", "no", "comment"]);
    }

    #[test]
    fn commands_and_files_are_nobody_who_can_be_asked() {
        for (text, shown) in [
            (r#""|/usr/bin/vacation -a foo, bar""#, r#"command "|/usr/bin/vacation -a foo, bar""#),
            ("|/bin/prog", r#"command "|/bin/prog""#),
            (r#"|"/bin/prog x""#, r#"command "|/bin/prog x""#),
            ("/dev/null", r#"file "/dev/null""#),
            (r#""/var/mail/a b""#, r#"file "/var/mail/a b""#),
            ("~/Mail/box", r#"file "~/Mail/box""#),
        ] {
            assert_eq!(good(&format!("a, {text}, b")), ["a", &format!("unjudged {shown}"), "b"]);
        }
        assert_eq!(good("user%b.example")[0], r#"unjudged routed address "user%b.example""#);
        assert_eq!(good("b!user")[0], r#"unjudged routed address "b!user""#);
        assert_eq!(good(r#""user%b""#), ["user%b"]);
    }

    #[test]
    fn includes_are_recognized_in_and_outside_quotes() {
        assert_eq!(
            good(r#"a, :include:/etc/list, ":Include:/etc/my list" , b"#),
            ["a", "include /etc/list", "include /etc/my list", "b"]
        );
        let (targets, problem) = read(":include:lists/all");
        assert!(problem && targets[0].starts_with("unjudged"));
    }

    #[test]
    fn what_cannot_be_read_is_reported_and_stays_as_somebody() {
        for text in ["a, @b.example", "a, b@", "a, b@c/d", "a, \u{fffd}", "a, \"\"", "a, \u{0}b"] {
            let (targets, problem) = read(text);
            assert!(problem, "{text:?}");
            assert_eq!(targets.len(), 2, "{text:?}");
            assert_eq!(targets[0], "a");
            assert!(targets[1].starts_with("unjudged unreadable target"), "{targets:?}");
        }
        for (text, targets) in [("a, \"b", ["a", "b"]), ("a, b (c", ["a", "b"])] {
            assert_eq!(read(text), (targets.map(str::to_owned).to_vec(), true));
        }
    }
}
