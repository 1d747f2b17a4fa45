//! Users in a file of passwd(5) lines that need not exist on this host: `name:password:uid:gid:gecos:home:shell`.
//!
//! The name may be `user@domain`. Such users are virtual: whether their uid and home are allowed is checked by
//! the monitor, this module only refuses what can't be meant.

use std::collections::HashMap;
use std::collections::hash_map;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::source::{Problem, SourceFile, is_damaged};
use crate::address::{Address, normalize_domain};
use crate::inquiry::Inquiry;
use crate::user::{Account, User, UserName};

/// The two ids above it mean "unchanged" to setresuid(2) and, as -2, "nobody" on some systems.
const MAX_ID: u32 = 4_294_967_293;

/// A passwd(5) file that is read again when it changes.
#[derive(Debug)]
pub struct PasswdFile {
    source: SourceFile<Users>,
}

/// What the file says about a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// There is such a user: virtual, with a uid and gid that are never 0, and an absolute home without `..`.
    Found(User),
    /// The file was read and has no such user.
    NotFound,
    /// The file could never be read, for this reason.
    Unavailable(String),
}

impl PasswdFile {
    /// Reads the file; one that cannot be read yet answers [`Answer::Unavailable`].
    pub fn open(path: impl Into<PathBuf>) -> Self {
        Self { source: SourceFile::open(path, parse) }
    }

    /// See [`SourceFile::refresh`].
    pub fn refresh(&self) {
        self.source.refresh();
    }

    /// See [`SourceFile::refresh_by`].
    pub fn refresh_by(&self, inquiry: &Inquiry) {
        self.source.refresh_by(inquiry);
    }

    /// See [`SourceFile::problems`].
    pub fn problems(&self) -> Arc<Vec<Problem>> {
        self.source.problems()
    }

    /// All users that were read last, with their lines, in that order.
    pub fn users(&self) -> Vec<(usize, User)> {
        let mut users: Vec<_> = self.source.current().values().cloned().collect();
        users.sort_by_key(|(line, _)| *line);
        users
    }

    /// Looks for the whole address, then for its local part, in whatever case.
    pub fn lookup(&self, address: &Address) -> Answer {
        let users = match self.source.ask() {
            Ok(users) => users,
            Err(reason) => return Answer::Unavailable(reason),
        };
        let key = address.key();
        let local = &key[..key.len() - address.domain().map_or(0, |domain| domain.len() + 1)];
        let whole = address.domain().and_then(|_| users.get(&key));
        // A local part may have an `@` in it, and is no other domain's user for that.
        match whole.or_else(|| users.get(local).filter(|_| !local.contains('@'))) {
            Some((_, user)) => Answer::Found(user.clone()),
            None => Answer::NotFound,
        }
    }
}

/// By [`Address::key`], with the line that each comes from.
type Users = HashMap<String, (usize, User)>;

fn parse(text: &str, _: &Path) -> (Users, Vec<Problem>) {
    let mut users = Users::new();
    let mut problems = Vec::new();
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let number = index + 1;
        let (line, finished) = match line.strip_suffix('\n') {
            Some(line) => (line, true),
            None => (line, false),
        };
        let line = line.strip_suffix('\r').unwrap_or(line);
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let user = parse_line(line).and_then(|user| Ok((key(user.name.as_str())?, user)));
        let message = match user {
            Ok((key, user)) => match users.entry(key) {
                hash_map::Entry::Vacant(place) => {
                    place.insert((number, user));
                    continue;
                }
                hash_map::Entry::Occupied(first) => {
                    format!("{:?} is already in line {}, which is used", user.name.as_str(), first.get().0)
                }
            },
            Err(message) if finished => message,
            Err(message) => format!("unfinished last line: {message}"),
        };
        Problem::note(&mut problems, number, message);
    }
    (users, problems)
}

fn parse_line(line: &str) -> Result<User, String> {
    let fields: Vec<&str> = line.split(':').collect();
    let [name, _password, uid, gid, _gecos, home, _shell] = fields[..] else {
        return Err(format!("{} fields instead of 7", fields.len()));
    };
    if name.is_empty() {
        return Err("empty name".to_owned());
    }
    if is_damaged(name) || name.contains('/') {
        return Err(format!("name {name:?} has a character that no name can have"));
    }
    let user_name = UserName::try_from(name.to_owned())?;
    let home = PathBuf::from(home);
    let climbs = home.components().any(|part| part == Component::ParentDir);
    if !home.is_absolute() || climbs || is_damaged(&home.to_string_lossy()) {
        return Err(format!("home {home:?} of {name:?} is no absolute path without \"..\""));
    }
    let id = |kind: &str, text: &str| {
        parse_id(text).ok_or_else(|| format!("{kind} {text:?} of {name:?} is no number from 1 to {MAX_ID}"))
    };
    let account = Account::Virtual { uid: id("uid", uid)?, gid: id("gid", gid)?, home };
    Ok(User { name: user_name, account, program: None })
}

/// Digits only: `str::parse` would take a plus sign.
fn parse_id(text: &str) -> Option<u32> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let id = digits.then(|| text.parse().ok()).flatten()?;
    (1..=MAX_ID).contains(&id).then_some(id)
}

fn key(name: &str) -> Result<String, String> {
    let Some((local, domain)) = name.rsplit_once('@') else {
        return Ok(name.to_lowercase());
    };
    match normalize_domain(domain) {
        Some(domain) if !local.is_empty() => Ok(format!("{}@{domain}", local.to_lowercase())),
        _ => Err(format!("name {name:?} is no mailbox")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;

    const FILE: &str = "\
# virtual users
alice:x:5001:5000:Alice:/var/vmail/alice:/bin/sh
Alice@Example.ORG:x:5002:5000::/var/vmail/example.org/alice:

bob@bücher.example:*:5003:5000:::
bob@bücher.example:*:5003:5000::/var/vmail/bob:
";

    fn users(text: &str) -> (Users, Vec<Problem>) {
        parse(text, Path::new("users"))
    }

    fn open(text: &str) -> (tempfile::TempDir, PathBuf, PasswdFile) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("users");
        fs::write(&path, text).unwrap();
        let file = PasswdFile::open(&path);
        (dir, path, file)
    }

    fn uid(answer: Answer) -> u32 {
        match answer {
            Answer::Found(User { account: Account::Virtual { uid, .. }, .. }) => uid,
            other => panic!("{other:?}"),
        }
    }

    fn look_up(file: &PasswdFile, address: &str) -> Answer {
        file.lookup(&Address::parse(address.as_bytes()).unwrap())
    }

    #[test]
    fn the_name_with_domain_goes_before_the_name_alone() {
        let (_dir, _, file) = open(FILE);
        let account = Account::Virtual { uid: 5002, gid: 5000, home: "/var/vmail/example.org/alice".into() };
        let name = UserName::try_from("Alice@Example.ORG".to_owned()).unwrap();
        let alice = Answer::Found(User { name, account, program: None });
        assert_eq!(look_up(&file, "ALICE@example.org"), alice);
        assert_eq!(uid(look_up(&file, "alice@example.com")), 5001);
        assert_eq!(uid(look_up(&file, "alice")), 5001);
        assert_eq!(uid(look_up(&file, "bob@xn--bcher-kva.example")), 5003);
        assert_eq!(look_up(&file, "bob"), Answer::NotFound);
        assert_eq!(look_up(&file, "carol@example.org"), Answer::NotFound);
        let problems = file.problems();
        assert_eq!(problems.iter().map(|p| p.line).collect::<Vec<_>>(), [5]);
    }

    #[test]
    fn a_local_part_with_an_at_sign_is_no_way_to_another_domains_user() {
        let (_dir, _, file) = open("a@b.example:x:5000:5000::/home/a:\n");
        assert_eq!(look_up(&file, "\"a@b.example\""), Answer::NotFound);
        assert_eq!(look_up(&file, "\"a@b.example\"@c.example"), Answer::NotFound);
    }

    #[test]
    fn a_bad_line_is_reported_and_the_rest_serves() {
        for (bad, why) in [
            ("a:x:5000:5000:g:/home/a", "6 fields instead of 7"),
            ("a:x:5000:5000:g:/home/a:/bin/sh:", "8 fields instead of 7"),
            (":x:5000:5000:g:/home/a:", "empty name"),
            ("a/b:x:5000:5000:g:/home/a:", "character that no name"),
            ("a\tb:x:5000:5000:g:/home/a:", "character that no name"),
            ("a b:x:5000:5000:g:/home/a:", "\"a b\" is no user name"),
            ("-a:x:5000:5000:g:/home/a:", "\"-a\" is no user name"),
            ("a\u{fffd}:x:5000:5000:g:/home/a:", "character that no name"),
            ("a@:x:5000:5000:g:/home/a:", "no mailbox"),
            ("@b.example:x:5000:5000:g:/home/a:", "no mailbox"),
            ("a:x:0:5000:g:/home/a:", "uid \"0\""),
            ("a:x:00:5000:g:/home/a:", "uid \"00\""),
            ("a:x:+5:5000:g:/home/a:", "uid \"+5\""),
            ("a:x:-1:5000:g:/home/a:", "uid \"-1\""),
            ("a:x::5000:g:/home/a:", "uid \"\""),
            ("a:x:4294967294:5000:g:/home/a:", "uid \"4294967294\""),
            ("a:x:4294967296:5000:g:/home/a:", "uid \"4294967296\""),
            ("a:x:5000:0:g:/home/a:", "gid \"0\""),
            ("a:x:5000:4294967295:g:/home/a:", "gid \"4294967295\""),
            ("a:x:5000:staff:g:/home/a:", "gid \"staff\""),
            ("a:x:5000:5000:g:home/a:", "home \"home/a\""),
            ("a:x:5000:5000:g::", "home \"\""),
            ("a:x:5000:5000:g:/home/../etc:", "home \"/home/../etc\""),
            ("a:x:5000:5000:g:/home/\u{1b}:", "home"),
        ] {
            let (users, problems) = users(&format!("{bad}\nb:x:4294967293:1:g:/home/b:/bin/sh\n"));
            assert_eq!(problems.len(), 1, "{bad}");
            assert_eq!(problems[0].line, 1);
            assert!(problems[0].message.contains(why), "{:?}", problems[0]);
            assert_eq!(users.len(), 1);
            assert!(users.contains_key("b"));
        }
    }

    #[test]
    fn of_two_lines_for_one_name_the_first_is_used() {
        let (_dir, _, file) = open("a@B.example:x:1:1::/a:\nb:x:3:1::/b:\nA@b.EXAMPLE:x:2:1::/a:\n");
        assert_eq!(uid(look_up(&file, "a@b.example")), 1);
        assert_eq!(
            *file.problems(),
            [Problem::new(3, "\"A@b.EXAMPLE\" is already in line 1, which is used")]
        );
    }

    #[test]
    fn the_unfinished_last_line_serves_if_it_is_whole_enough() {
        let (whole, problems) = users("a:x:1:1::/a:\nb:x:2:1::/b:/bin/ba");
        assert_eq!((whole.len(), problems.len()), (2, 0));
        let (cut, problems) = users("a:x:1:1::/a:\nb:x:2:1::/b");
        assert_eq!(cut.len(), 1);
        assert_eq!(problems, [Problem::new(2, "unfinished last line: 6 fields instead of 7")]);
    }

    #[test]
    fn a_name_in_latin_1_in_the_gecos_field_does_not_cost_the_user() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("users");
        fs::write(&path, b"remy:x:5000:5000:R\xe9my:/home/remy:\r\n").unwrap();
        let file = PasswdFile::open(&path);
        assert_eq!(uid(look_up(&file, "remy")), 5000);
        assert_eq!(*file.problems(), [Problem::new(1, "not UTF-8")]);
    }

    #[test]
    fn users_come_and_go_with_the_file() {
        let (dir, path, file) = open("a:x:1:1::/a:\n");
        let next = dir.path().join("next");
        fs::write(&next, "b:x:2:1::/b:\n").unwrap();
        fs::rename(&next, &path).unwrap();
        assert_eq!(uid(look_up(&file, "a")), 1);
        // Twice: within one tick of the clock, renaming and writing look the same.
        file.refresh();
        file.refresh();
        assert_eq!(look_up(&file, "a"), Answer::NotFound);
        assert_eq!(uid(look_up(&file, "b")), 2);
        fs::remove_file(&path).unwrap();
        file.refresh();
        assert_eq!(uid(look_up(&file, "b")), 2);
    }

    #[test]
    fn a_file_that_was_never_readable_is_not_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("users");
        let file = PasswdFile::open(&path);
        assert!(matches!(look_up(&file, "a"), Answer::Unavailable(_)));
        fs::write(&path, "b:x:2:1::/b:\n").unwrap();
        file.refresh();
        assert!(matches!(look_up(&file, "a"), Answer::Unavailable(_)), "it may be half-written");
        file.refresh();
        assert_eq!(look_up(&file, "a"), Answer::NotFound);
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_never_yields_root(
            text in "([a-z@./:\\\\\u{0}\u{fffd}ü]|:[0-9+-]{1,11}|:/[a-z]|\r|\n){0,60}"
        ) {
            let (users, _) = users(&text);
            for (_, user) in users.values() {
                let Account::Virtual { uid, gid, home } = &user.account else { panic!("{user:?}") };
                prop_assert!(*uid != 0 && *gid != 0 && home.is_absolute());
            }
        }

        #[test]
        fn any_text_is_read_without_panic(text in any::<String>()) {
            users(&text);
        }
    }
}
