//! The text of aliases(5), virtual(5) and `:include:` files, read as Postfix reads it.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap, hash_map};
use std::fmt;
use std::path::{Path, PathBuf};

use super::Target;
use super::targets::{Item, Token, includes, items, scan, shown, written};
use crate::address::{Address, normalize_domain};
use crate::resolver::source::{Problem, is_damaged};

/// What one source says, by key.
#[derive(Debug, Default)]
pub(super) struct AliasTable {
    entries: HashMap<Key, Entry>,
    /// Every file that some entry includes.
    includes: BTreeSet<PathBuf>,
}

/// A left-hand side in the form in which two spellings of it are equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Key {
    /// `name:` of aliases(5), `user` of virtual(5)
    Local(String),
    /// `user@domain`
    Mailbox(String, String),
    /// `@domain`
    Domain(String),
}

/// A right-hand side.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) line: usize,
    /// `@otherdomain` in the first place, which virtual(5) reads as "the same user there".
    pub(super) same_user_at: Option<String>,
    pub(super) items: Vec<Item>,
}

/// The targets that an `:include:` file lists.
#[derive(Debug, Default)]
pub(super) struct IncludeList {
    pub(super) items: Vec<Item>,
}

impl AliasTable {
    pub(super) fn get(&self, key: &Key) -> Option<&Entry> {
        self.entries.get(key)
    }

    pub(super) fn includes(&self) -> &BTreeSet<PathBuf> {
        &self.includes
    }

    /// The first of two entries for one key counts, as in the tables of postalias(1) and postmap(1).
    fn insert(&mut self, key: Key, entry: Entry) -> Result<(), String> {
        match self.entries.entry(key) {
            hash_map::Entry::Vacant(place) => {
                self.includes.extend(includes(&entry.items).cloned());
                place.insert(entry);
                Ok(())
            }
            hash_map::Entry::Occupied(first) => Err(format!(
                "{} is already in line {}, which is used",
                shown(&first.key().to_string()),
                first.get().line
            )),
        }
    }
}

impl Key {
    /// `user`, in whatever case.
    pub(super) fn local(local: &str) -> Self {
        Self::Local(local.to_lowercase())
    }

    /// `user@domain` if the address has a domain, in whatever case.
    pub(super) fn mailbox(address: &Address) -> Option<Self> {
        let domain = address.domain()?;
        Some(Self::Mailbox(address.local().to_lowercase(), domain.to_owned()))
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(local) => f.write_str(local),
            Self::Mailbox(local, domain) => write!(f, "{local}@{domain}"),
            Self::Domain(domain) => write!(f, "@{domain}"),
        }
    }
}

/// Reads aliases(5): `name: target, target`.
pub(super) fn aliases(text: &str, _: &Path) -> (AliasTable, Vec<Problem>) {
    table(text, alias)
}

/// Reads virtual(5): `pattern target, target`.
pub(super) fn virtuals(text: &str, _: &Path) -> (AliasTable, Vec<Problem>) {
    table(text, virtual_alias)
}

/// Makes an entry of a logical line. Problems of single targets are reported, an error costs the whole line.
type LineParser = fn(&str, usize, &mut dyn FnMut(String)) -> Result<Option<(Key, Entry)>, String>;

fn table(text: &str, parse: LineParser) -> (AliasTable, Vec<Problem>) {
    let mut table = AliasTable::default();
    let mut problems = Vec::new();
    for (line, text) in logical_lines(text) {
        let mut report = |message: String| Problem::note(&mut problems, line, message);
        let inserted = if text.starts_with(is_space) {
            Err(format!("{} continues no line", shown(text.trim_matches(is_space))))
        } else {
            parse(&text, line, &mut report)
                .and_then(|found| found.map_or(Ok(()), |(key, entry)| table.insert(key, entry)))
        };
        if let Err(message) = inserted {
            report(message);
        }
    }
    (table, problems)
}

/// A line of aliases(5); `None` if it is but a comment in parentheses.
fn alias(text: &str, line: usize, report: &mut dyn FnMut(String)) -> Result<Option<(Key, Entry)>, String> {
    let tokens = scan(text, report);
    if tokens.is_empty() {
        return Ok(None);
    }
    let colon = tokens.iter().position(|token| token.is(':')).unwrap_or(0);
    let (name, value) = (&tokens[..colon], &tokens[colon..]);
    if name.is_empty() || value.len() < 2 || name.iter().any(|token| token.is(',')) {
        return Err(format!("{} is not of the form name: target, …", shown(text)));
    }
    let local = !name.iter().any(|token| token.is('@') || token.is('%'));
    let name = written(name, " ");
    if !local || is_damaged(&name) {
        return Err(format!("{} is no local name", shown(&name)));
    }
    let items = items(&value[1..], report);
    Ok(Some((Key::local(&name), entry(line, None, items, report))))
}

/// A line of virtual(5).
fn virtual_alias(
    text: &str,
    line: usize,
    report: &mut dyn FnMut(String),
) -> Result<Option<(Key, Entry)>, String> {
    let (name, value) = split_pattern(text).ok_or_else(|| format!("unbalanced quotes in {}", shown(text)))?;
    if value.is_empty() {
        return Err(format!("{} is not of the form pattern target, …", shown(text)));
    }
    let key = pattern(name).map_err(|why| format!("{}: {why}", shown(name)))?;
    if name.ends_with(':') {
        report(format!("{} ends with a colon: is this an aliases file?", shown(name)));
    }
    // "virtual-alias.domain anything" declares a domain, and really means anything; it can't be told
    // from "first.last someone", so it stays an entry for that local part, as it is to Postfix.
    let declares = matches!(&key, Key::Local(name) if name.contains('.'));
    let mut report = |message: String| {
        if !declares {
            report(message);
        }
    };
    let tokens = scan(value, &mut report);
    let (same_user_at, rest) = same_user(value, &tokens);
    let mut items = items(rest, &mut report);
    for item in &mut items {
        // virtual(5) knows addresses only: whatever Postfix makes of this, it is nobody who can be asked.
        if let Item::Include(path) = item {
            let text = format!(":include:{}", path.display());
            report(format!("{} has no meaning in a virtual(5) file", shown(&text)));
            *item = Item::To(Target::Unjudged(text));
        }
    }
    Ok(Some((key, entry(line, same_user_at, items, &mut report))))
}

/// An alias of nobody is one all the same: without it, its name could be taken for that of no user.
fn entry(
    line: usize,
    same_user_at: Option<String>,
    mut items: Vec<Item>,
    report: &mut dyn FnMut(String),
) -> Entry {
    if items.is_empty() && same_user_at.is_none() {
        report("no target".to_owned());
        items.push(Item::To(Target::Unjudged("no target".to_owned())));
    }
    Entry { line, same_user_at, items }
}

/// Reads a file that an alias includes: every line is a right-hand side of aliases(5), none is continued.
pub(super) fn include(text: &str, _: &Path) -> (IncludeList, Vec<Problem>) {
    let mut list = IncludeList::default();
    let mut problems = Vec::new();
    for (index, line) in text.split('\n').enumerate() {
        if !line.starts_with('#') {
            let mut report = |message| Problem::note(&mut problems, index + 1, message);
            let tokens = scan(line, &mut report);
            list.items.extend(items(&tokens, &mut report));
        }
    }
    (list, problems)
}

/// Each with the number of its first physical line. A line that starts with white space continues the one
/// before, across comments and empty lines; only a first line can start so here.
fn logical_lines(text: &str) -> impl Iterator<Item = (usize, Cow<'_, str>)> {
    let mut lines = text
        .split('\n')
        .enumerate()
        .filter(|(_, line)| {
            let content = line.trim_start_matches(is_space);
            !content.is_empty() && !content.starts_with('#')
        })
        .peekable();
    std::iter::from_fn(move || {
        let (index, first) = lines.next()?;
        let mut logical = Cow::Borrowed(first);
        while let Some((_, more)) = lines.next_if(|(_, line)| line.starts_with(is_space)) {
            logical.to_mut().push_str(more);
        }
        Some((index + 1, logical))
    })
}

/// As isspace(3) in the C locale: Unicode's spaces are part of a name.
fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t'..='\r')
}

/// Splits at the first white space outside quotes; `None` if a quote stays open.
fn split_pattern(line: &str) -> Option<(&str, &str)> {
    let mut quoted = false;
    let mut chars = line.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => {
                chars.next();
            }
            '"' => quoted = !quoted,
            c if is_space(c) && !quoted => return Some((&line[..at], line[at..].trim_matches(is_space))),
            _ => {}
        }
    }
    (!quoted).then_some((line, ""))
}

/// The left-hand side of virtual(5).
fn pattern(name: &str) -> Result<Key, String> {
    if is_damaged(name) || name.starts_with('<') {
        return Err("no mailbox can be written so".to_owned());
    }
    if let Some(domain) = name.strip_prefix('@') {
        return normalize_domain(domain).map(Key::Domain).ok_or_else(|| "no domain".to_owned());
    }
    let address = Address::parse(name.as_bytes()).map_err(|error| error.to_string())?;
    Ok(Key::mailbox(&address).unwrap_or_else(|| Key::local(address.local())))
}

/// `@otherdomain` in the first place, and the tokens behind it.
fn same_user<'a>(value: &str, tokens: &'a [Token]) -> (Option<String>, &'a [Token]) {
    if !value.starts_with('@') {
        return (None, tokens);
    }
    // Where the next target begins: at a comma, or at a word that follows a word.
    let end = (1..tokens.len())
        .find(|&at| tokens[at].is(',') || (tokens[at].is_word() && tokens[at - 1].is_word()))
        .unwrap_or(tokens.len());
    match normalize_domain(&written(&tokens[1..end], "")) {
        Some(domain) => (Some(domain), &tokens[end..]),
        None => (None, tokens),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALIASES: &str = r#"# comment
Simple: bob
"John Doe": john, "Jane Doe" , third
spaced.name : a
  b,
# a comment inside

  c
crlf: bob,
 carol
two: three:four
a b: c
ba\ck: z
"at@sign": z
"#;

    fn path() -> &'static Path {
        Path::new("source")
    }

    fn targets(entry: &Entry) -> Vec<String> {
        let written = entry.items.iter().map(|item| match item {
            Item::To(Target::Address(address)) => address.to_string(),
            other => format!("{other:?}"),
        });
        written.collect()
    }

    fn lines(problems: &[Problem]) -> Vec<usize> {
        problems.iter().map(|problem| problem.line).collect()
    }

    #[test]
    fn aliases_have_names_in_any_case_and_lines_that_go_on() {
        let (table, problems) = aliases(&ALIASES.replace("bob,\n", "bob,\r\n"), path());
        assert_eq!(problems, []);
        for (name, line, expected) in [
            ("SIMPLE", 2, &["bob"][..]),
            ("john doe", 3, &["john", "\"Jane Doe\"", "third"]),
            ("spaced.name", 4, &["a", "b", "c"]),
            ("crlf", 9, &["bob", "carol"]),
            ("two", 11, &["\"three:four\""]),
            ("a b", 12, &["c"]),
            ("back", 13, &["z"]),
            ("at@sign", 14, &["z"]),
        ] {
            let entry = table.get(&Key::local(name)).unwrap();
            assert_eq!(
                (entry.line, &targets(entry)[..]),
                (line, &expected.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>()[..])
            );
        }
        assert_eq!(table.entries.len(), 8);
    }

    #[test]
    fn a_bad_alias_is_reported_with_its_line_and_the_rest_serves() {
        let text = " leading\ngood: a\nno colon\nempty:\n: x\na, b: c\nat@dom: x\nGOOD: b\nnobody: ,\n\u{fffd}x: y\nlast: z";
        let (table, problems) = aliases(text, path());
        assert_eq!(lines(&problems), [1, 3, 4, 5, 6, 7, 8, 9, 10]);
        assert_eq!(problems[6].message, "\"good\" is already in line 2, which is used");
        assert_eq!(targets(table.get(&Key::local("good")).unwrap()), ["a"]);
        assert_eq!(targets(table.get(&Key::local("last")).unwrap()), ["z"]);
        let nobody = table.get(&Key::local("nobody")).unwrap();
        assert_eq!(nobody.items, [Item::To(Target::Unjudged("no target".to_owned()))]);
        assert_eq!(table.entries.len(), 3);
    }

    #[test]
    fn patterns_of_virtual_are_mailboxes_local_parts_and_domains() {
        let text = "\
Alice@B\u{dc}cher.example bob, carol@x.example
\"john doe\"@Example.org jd
\"john doe\" jd2
@example.org catch@x.example
@old.example @new.example
@mixed.example @new.example, copy@x.example
user\ta b
 c,d
";
        let (table, problems) = virtuals(text, path());
        assert_eq!(problems, []);
        let mailbox = |text: &str| Key::mailbox(&Address::parse(text.as_bytes()).unwrap()).unwrap();
        let domain = |text: &str| Key::Domain(text.to_owned());
        for (key, line, same, expected) in [
            (mailbox("alice@xn--bcher-kva.example"), 1, None, &["bob", "carol@x.example"][..]),
            (mailbox("\"John Doe\"@example.org"), 2, None, &["jd"]),
            (Key::local("john doe"), 3, None, &["jd2"]),
            (domain("example.org"), 4, None, &["catch@x.example"]),
            (domain("old.example"), 5, Some("new.example"), &[]),
            (domain("mixed.example"), 6, Some("new.example"), &["copy@x.example"]),
            (Key::local("user"), 7, None, &["a", "b", "c", "d"]),
        ] {
            let entry = table.get(&key).unwrap();
            assert_eq!((entry.line, entry.same_user_at.as_deref()), (line, same));
            assert_eq!(targets(entry), expected);
        }
    }

    #[test]
    fn a_bad_pattern_is_reported_with_its_line_and_the_rest_serves() {
        let text = "lonely\n\"open x\n@ x\na@ x\n<a@b> x\na :include:/etc/list\na@b.example c\nA@B.example d\ncolon: x";
        let (table, problems) = virtuals(text, path());
        assert_eq!(lines(&problems), [1, 2, 3, 4, 5, 6, 8, 9]);
        assert_eq!(table.entries.len(), 3);
        assert!(table.includes().is_empty());
    }

    #[test]
    fn the_declaration_of_a_virtual_domain_is_an_alias_of_none_of_its_addresses() {
        let (table, problems) = virtuals("virt.example \"anything (at all @ \nvirt2.example ,", path());
        assert_eq!(problems, []);
        assert_eq!(table.get(&Key::Domain("virt.example".to_owned())).map(targets), None);
    }

    #[test]
    fn lines_of_an_included_file_stand_alone() {
        let (list, problems) =
            include("# members\nalice, bob\n  carol\n@broken\n:include:/etc/more\n", path());
        assert_eq!(list.items.len(), 5);
        assert_eq!(lines(&problems), [4]);
        assert_eq!(includes(&list.items).collect::<Vec<_>>(), [Path::new("/etc/more")]);
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in any::<String>()) {
            aliases(&text, path());
            virtuals(&text, path());
            include(&text, path());
        }

        #[test]
        fn text_full_of_special_characters_is_read_without_panic(
            text in "([ab]|[ab]@[ab]|[ \\t\r\n:;,<>()\\[\\]\"@|%!.#~/\\\\]|:include:/|\u{fffd}|\u{e9}){0,60}"
        ) {
            aliases(&text, path());
            virtuals(&text, path());
            include(&text, path());
        }
    }
}
