use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, SystemTime};

use tempfile::TempDir;

use super::*;

struct Site {
    dir: TempDir,
    aliases: Aliases,
}

impl Site {
    fn new(aliases: &str, virtuals: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let here = dir.path().to_str().unwrap();
        fs::write(dir.path().join("aliases"), aliases.replace("HERE", here)).unwrap();
        fs::write(dir.path().join("virtual"), virtuals).unwrap();
        for name in ["aliases", "virtual"] {
            // Or they would be waited for, as if somebody were writing them.
            let file = fs::File::options().write(true).open(dir.path().join(name)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
        }
        Self { aliases: Aliases::open(&[dir.path().join("aliases")], &[dir.path().join("virtual")]), dir }
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.dir.path().join(name);
        fs::write(&path, text.replace("HERE", self.dir.path().to_str().unwrap())).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    }

    /// What is written in place counts in the second look.
    fn refresh(&self) {
        self.aliases.refresh();
        self.aliases.refresh();
    }

    /// `ours.example` and bare names are ours.
    fn lookup(&self, stage: Stage, text: &str, delimiters: &str) -> Option<String> {
        let address = address(text);
        match self.aliases.lookup(&address, stage, is_ours(&address), delimiters) {
            Lookup::Found(found) => Some(found.targets.iter().map(written).collect::<Vec<_>>().join(" ")),
            Lookup::NotFound => None,
            Lookup::Unavailable(reason) => Some(format!("unavailable {reason}")),
        }
    }

    fn virtual_alias(&self, text: &str) -> Option<String> {
        self.lookup(Stage::Virtual, text, "+")
    }

    fn local_alias(&self, text: &str) -> Option<String> {
        self.lookup(Stage::Local, text, "+")
            .map(|targets| targets.replace(self.dir.path().to_str().unwrap(), "HERE"))
    }
}

fn address(text: &str) -> Address {
    Address::parse(text.as_bytes()).unwrap()
}

fn is_ours(address: &Address) -> bool {
    address.domain().is_none_or(|domain| domain == "ours.example")
}

fn written(target: &Target) -> String {
    match target {
        Target::Address(address) => address.to_string(),
        Target::Unjudged(why) => format!("unjudged({why})"),
    }
}

#[test]
fn virtual_patterns_are_tried_from_the_most_special_to_the_catch_all() {
    let rows = [
        ("a+x@ours.example 1\n", "1"),
        ("a@ours.example 2\n", "2+X"),
        ("a+x 3\n", "3"),
        ("a 4\n", "4+X"),
        ("@ours.example 5\n", "5"),
    ];
    for first in 0..rows.len() {
        // Backwards, so that it is not the order in the file that decides.
        let text: String = rows[first..].iter().rev().map(|(line, _)| *line).collect();
        let site = Site::new("", &text);
        let expected = Some(rows[first].1.to_owned());
        assert_eq!(site.virtual_alias("A+X@Ours.Example"), expected);
    }
    assert_eq!(Site::new("", "").virtual_alias("a+x@ours.example"), None);
}

#[test]
fn virtual_names_without_domain_are_for_our_domains_only() {
    let site = Site::new("", "bob robert\n@theirs.example us@ours.example\n");
    assert_eq!(site.virtual_alias("bob@ours.example").as_deref(), Some("robert"));
    assert_eq!(site.virtual_alias("bob").as_deref(), Some("robert"));
    assert_eq!(site.virtual_alias("bob@theirs.example").as_deref(), Some("us@ours.example"));
    assert_eq!(site.virtual_alias("bob@else.example"), None);
}

#[test]
fn the_same_user_in_another_domain_keeps_the_extension() {
    let site = Site::new("", "@old.example @new.example\na@old.example @new.example, b@x.example\n");
    let found = |text| site.virtual_alias(text).unwrap();
    assert_eq!(found("\"J D+x\"@old.example"), "\"J D+x\"@new.example");
    assert_eq!(found("a+x@old.example"), "a+x@new.example b+x@x.example");
}

#[test]
fn extensions_start_at_any_delimiter_and_some_names_have_none() {
    let site = Site::new("", "a@x.example b\npostmaster@x.example p\nowner@x.example o\nlist@x.example l\n");
    let found = |text: &str| site.lookup(Stage::Virtual, text, "+-");
    assert_eq!(found("a-1+2@x.example").as_deref(), Some("b-1+2"));
    assert_eq!(found("a+1-2@x.example").as_deref(), Some("b+1-2"));
    assert_eq!(found("Postmaster@x.example").as_deref(), Some("p"));
    assert_eq!(found("owner-list@x.example"), None);
    assert_eq!(found("list-request@x.example"), None);
    assert_eq!(found("list-else@x.example").as_deref(), Some("l-else"));
    assert_eq!(site.lookup(Stage::Virtual, "a-1@x.example", ""), None);
}

#[test]
fn all_sources_of_a_kind_are_asked_for_a_pattern_before_the_next_pattern() {
    let dir = tempfile::tempdir().unwrap();
    let paths = ["one", "two"].map(|name| dir.path().join(name));
    fs::write(&paths[0], "@ours.example catch\nb@ours.example first\n").unwrap();
    fs::write(&paths[1], "a@ours.example alice\nb@ours.example second\n").unwrap();
    let aliases = Aliases::open(&[], &paths);
    let found = |text| match aliases.lookup(&address(text), Stage::Virtual, true, "") {
        Lookup::Found(found) => (written(&found.targets[0]), found.origin),
        other => panic!("{other:?}"),
    };
    assert_eq!(found("a@ours.example"), ("alice".to_owned(), format!("{}:1", paths[1].display())));
    assert_eq!(found("b@ours.example"), ("first".to_owned(), format!("{}:2", paths[0].display())));
    assert_eq!(found("c@ours.example").0, "catch");
}

#[test]
fn local_aliases_are_for_our_addresses_and_swallow_the_extension() {
    let site = Site::new("a: b, |c\n\"a+x\": d\n", "");
    assert_eq!(site.local_alias("A+y@ours.example").as_deref(), Some("b unjudged(command \"|c\")"));
    assert_eq!(site.local_alias("a+x@ours.example").as_deref(), Some("d"));
    assert_eq!(site.local_alias("a").as_deref(), Some("b unjudged(command \"|c\")"));
    assert_eq!(site.local_alias("a@theirs.example"), None);
    assert_eq!(site.lookup(Stage::Local, "a+y@ours.example", ""), None);
}

#[test]
fn the_whole_way_of_an_address_is_found() {
    let site = Site::new("staff: alice, bob\nbob: \\bob, bob@away.example\n", "team@ours.example staff\n");
    let expansion = site.aliases.expand(&address("team+x@ours.example"), is_ours, "+");
    let leaves: Vec<_> = ["alice", "bob", "bob@away.example"].map(|a| Leaf::Address(address(a))).to_vec();
    assert_eq!(expansion.leaves, leaves);
    let file = |name| site.dir.path().join(name).display().to_string();
    let origins: Vec<_> = expansion.steps.into_iter().map(|step| step.origin).collect();
    assert_eq!(
        origins,
        [
            format!("{}:1", file("virtual")),
            format!("{}:1", file("aliases")),
            format!("{}:2", file("aliases")),
        ]
    );
}

#[test]
fn a_source_that_was_never_readable_makes_the_answer_unknown() {
    let dir = tempfile::tempdir().unwrap();
    let paths = ["one", "two"].map(|name| dir.path().join(name));
    fs::write(&paths[0], "a: b\n").unwrap();
    let aliases = Aliases::open(&paths, &[]);
    let ask = |name| aliases.lookup(&address(name), Stage::Local, true, "");
    assert!(matches!(ask("a"), Lookup::Found(_)));
    assert!(matches!(ask("c"), Lookup::Unavailable(reason) if reason.contains("two: No such file")));
    fs::write(&paths[1], "b: a\n").unwrap();
    aliases.refresh();
    assert!(matches!(ask("c"), Lookup::Unavailable(_)), "it may be half-written");
    aliases.refresh();
    assert_eq!(ask("c"), Lookup::NotFound);
}

#[test]
fn included_files_stand_in_place_and_are_read_again() {
    let site = Site::new("list: a, :include:HERE/members, z\n", "");
    assert!(site.local_alias("list").unwrap().starts_with("a unjudged(:include:HERE/members: No such file"));
    site.write("members", "b\n# c\nd, :include:HERE/more\n");
    site.write("more", "e\n:include:HERE/members\n");
    site.refresh();
    assert_eq!(site.local_alias("list").as_deref(), Some("a b d e z"));
    site.write("more", "f\n");
    assert_eq!(site.local_alias("list").as_deref(), Some("a b d e z"));
    site.refresh();
    assert_eq!(site.local_alias("list").as_deref(), Some("a b d f z"));
    site.write("members", "#\n");
    site.refresh();
    assert_eq!(
        site.local_alias("list").as_deref(),
        Some("a unjudged(:include:HERE/members: lists nobody) z")
    );
    assert_eq!(site.aliases.files.lock().unwrap().includes.len(), 1);
    site.write("members", "g\n");
    site.refresh();
    fs::remove_file(site.dir.path().join("members")).unwrap();
    site.aliases.refresh();
    assert_eq!(site.local_alias("list").as_deref(), Some("a g z"));
}

#[test]
fn an_included_file_that_others_can_write_is_not_believed() {
    let site = Site::new("list: a, :include:HERE/members\n", "");
    site.write("members", "b\n");
    site.refresh();
    assert_eq!(site.local_alias("list").as_deref(), Some("a b"));
    let path = site.dir.path().join("members");
    fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
    site.aliases.refresh();
    assert_eq!(
        site.local_alias("list").as_deref(),
        Some("a unjudged(:include:HERE/members: writable by group or other (mode 0666))")
    );
}

#[test]
fn files_that_include_each_other_without_end_list_nobody() {
    let site = Site::new("list: :include:HERE/a\n", "");
    site.write("a", ":include:HERE/b\n");
    site.write("b", ":include:HERE/a\n");
    site.refresh();
    assert_eq!(site.local_alias("list").as_deref(), Some("unjudged(a list of nobody)"));
    for depth in 0..=MAX_INCLUDE_DEPTH {
        site.write(&format!("n{depth}"), &format!("m{depth}, :include:HERE/n{}\n", depth + 1));
    }
    site.write("aliases", "list: :include:HERE/n1\n");
    site.refresh();
    let found = site.local_alias("list").unwrap();
    let deepest =
        format!("m{MAX_INCLUDE_DEPTH} unjudged(:include:HERE/n{}: included too deep)", MAX_INCLUDE_DEPTH + 1);
    assert!(found.ends_with(&deepest), "{found}");
}

#[test]
fn a_list_of_a_million_costs_no_more_than_one_of_a_thousand() {
    let members: Vec<_> = (0..MAX_TARGETS * 3).map(|n| format!("m{n}")).collect();
    let site = Site::new(&format!("list: {}\n", members.join(",")), "");
    let Lookup::Found(found) = site.aliases.lookup(&address("list"), Stage::Local, true, "") else {
        panic!("not found");
    };
    assert_eq!(found.targets.len(), MAX_TARGETS + 1);
    assert_eq!(written(&found.targets[MAX_TARGETS]), "unjudged(more than 1000 targets)");
}

#[test]
fn problems_are_known_by_file_and_line() {
    let site = Site::new("bad\nlist: :include:HERE/members\n", "b@ad");
    site.write("members", "ok\n@\n");
    site.refresh();
    let problems = site.aliases.problems();
    let mut places: Vec<_> = problems
        .iter()
        .map(|(path, problem)| (path.file_name().unwrap().to_str().unwrap(), problem.line))
        .collect();
    places.sort_unstable();
    assert_eq!(places, [("aliases", 1), ("members", 2), ("virtual", 1)]);
}

/// What a Postfix tool says about a source: its standard output, and the lines that it complains about.
struct Postfix {
    dir: TempDir,
    tool: &'static str,
}

impl Postfix {
    /// `None`, and a word about it, where the tool is not installed.
    fn with_table(tool: &'static str, text: &str) -> Option<(Self, Vec<usize>)> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("main.cf"), "compatibility_level = 3.6\n").unwrap();
        fs::write(dir.path().join("source"), text).unwrap();
        let postfix = Self { dir, tool };
        let Some(built) = postfix.run(&[]) else {
            println!("not compared: {tool}(1) of Postfix is not installed");
            return None;
        };
        assert!(built.status.success(), "{built:?}");
        let complaints = String::from_utf8(built.stderr).unwrap();
        let lines = complaints
            .lines()
            .filter_map(|line| line.split_once(", line ")?.1.split_once(':')?.0.parse().ok())
            .collect();
        Some((postfix, lines))
    }

    fn query(&self, key: &str) -> Option<String> {
        let answer = self.run(&["-q", key]).unwrap();
        let value = String::from_utf8(answer.stdout).unwrap();
        answer.status.success().then(|| value.trim_end().to_owned())
    }

    fn run(&self, arguments: &[&str]) -> Option<std::process::Output> {
        let sbin = ["/usr/sbin", "/usr/local/sbin"].map(|dir| Path::new(dir).join(self.tool));
        let program = sbin.iter().find(|path| path.exists())?;
        let output = Command::new(program)
            .arg("-c")
            .arg(self.dir.path())
            .args(arguments)
            .arg(self.dir.path().join("source"))
            .output();
        Some(output.unwrap())
    }
}

fn items_of(value: &str) -> Vec<Item> {
    let mut ignore = |_| {};
    let tokens = targets::scan(value, &mut ignore);
    targets::items(&tokens, &mut ignore)
}

#[test]
fn aliases_are_read_as_postalias_reads_them() {
    let text = r##"# comment
Simple: bob
"John Doe": john, "Jane Doe" , third
spaced.name : a
  b,
# a comment inside

  c
pipe: "|/usr/bin/vacation -a foo bar", \pipe
pipe2: |/bin/prog
file: /dev/null
file2: "/var/mail/a b"
incl: :include:/etc/list
incl2: ":include:/etc/my list"
esc: jo\ hn, x\,y
cm: bob (the builder), <carol@example.com>, Dave Smith <dave@example.com>
"quo\"te": q
grp: team: a, b; , c
at@dom: x
nocolon foo
two: three: four
"a@b": z
"ba\ck": z
 continued
unq\ uoted: u
"x"y: z
"|weird": a
dup: one
dup: two
a  b: c
a, b: c
UPPER: Bob@Example.ORG
"#: x
cr: b
	tab	continued
"##;
    let Some((postfix, complaints)) = Postfix::with_table("postalias", text) else {
        return;
    };
    let (table, problems) = parse::aliases(text, Path::new("source"));
    for line in &complaints {
        assert!(problems.iter().any(|problem| problem.line == *line), "{line}: {problems:?}");
    }
    assert!(complaints.len() >= 4, "{complaints:?}");
    let mut compared = 0;
    for name in [
        "simple",
        "john doe",
        "spaced.name",
        "pipe",
        "pipe2",
        "file",
        "file2",
        "incl",
        "incl2",
        "esc",
        "cm",
        "quo\"te",
        "grp",
        "at@dom",
        "at",
        "nocolon",
        "two",
        "a@b",
        "back",
        "unq uoted",
        "x y",
        "xy",
        "|weird",
        "dup",
        "a b",
        "a",
        "b",
        "upper",
        "cr",
        "",
    ] {
        // Newer releases keep the quotes of a name, as local(8) asks for it.
        let quoted = format!("\"{}\"", name.replace('\\', r"\\").replace('"', "\\\""));
        let theirs = postfix.query(name).or_else(|| postfix.query(&quoted));
        let ours = table.get(&Key::local(name)).map(|entry| entry.items.clone());
        assert_eq!(ours, theirs.as_deref().map(items_of), "{name:?}");
        compared += usize::from(theirs.is_some());
    }
    assert_eq!(compared, 23);
}

#[test]
fn virtual_is_read_as_postmap_reads_it() {
    let text = "\
# comment
Alice@Example.org bob, carol@x.example
\"john doe\"@example.org jd
\"john doe\" jd2
 \tcontinued
@example.org catch@x.example
virt.example anything
first.last fl
user   a b
 c,d
lonely
tab\tx
colon: x
\"open x
dup@example.org one
DUP@example.org two
esc\\ aped@example.org e
";
    let Some((postfix, complaints)) = Postfix::with_table("postmap", text) else {
        return;
    };
    let (table, problems) = parse::virtuals(text, Path::new("source"));
    for line in &complaints {
        assert!(problems.iter().any(|problem| problem.line == *line), "{line}: {problems:?}");
    }
    assert!(complaints.len() >= 3, "{complaints:?}");
    let mut compared = 0;
    for (pattern, key) in [
        ("alice@example.org", Key::mailbox(&address("Alice@example.ORG")).unwrap()),
        ("\"john doe\"@example.org", Key::mailbox(&address("\"john doe\"@example.org")).unwrap()),
        ("\"john doe\"", Key::local("john doe")),
        ("@example.org", Key::Domain("example.org".to_owned())),
        ("virt.example", Key::local("virt.example")),
        ("@virt.example", Key::Domain("virt.example".to_owned())),
        ("first.last", Key::local("first.last")),
        ("user", Key::local("user")),
        ("lonely", Key::local("lonely")),
        ("tab", Key::local("tab")),
        ("colon:", Key::local("colon:")),
        ("\"open", Key::local("open")),
        ("dup@example.org", Key::mailbox(&address("dup@example.org")).unwrap()),
        ("continued", Key::local("continued")),
    ] {
        let theirs = postfix.query(pattern);
        let ours = table.get(&key).map(|entry| entry.items.clone());
        assert_eq!(ours, theirs.as_deref().map(items_of), "{pattern:?}");
        compared += usize::from(theirs.is_some());
    }
    assert_eq!(compared, 10);
}
