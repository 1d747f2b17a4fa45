//! The documentation says what the program does: every key with its default, every exit status, variable, command and
//! option; every link leads somewhere, every sample filter runs, and no command, example or dialogue is there unchecked.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod blocks;
mod commands;
#[path = "../common/mod.rs"]
mod common;
mod sessions;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use usermilter::config::Config;
use usermilter::filter::Meaning;
use usermilter::monitor::{self, Variable};
use usermilter::rules::{self, Rules};
use usermilter::verdict::Verdict;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// README.md and its likes, there and below, with paths relative to the root.
fn markdown() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut directories =
        ["docs", "postfix", "sendmail", "ldap", "packaging", "tests"].map(PathBuf::from).to_vec();
    let mut names: Vec<PathBuf> = names(Path::new(""));
    while let Some(directory) = directories.pop() {
        for name in self::names(&directory) {
            if root().join(&name).is_dir() {
                directories.push(name);
            } else {
                names.push(name);
            }
        }
    }
    for name in names {
        let readme = name.file_name().is_some_and(|name| name == "README");
        if readme || name.extension().is_some_and(|extension| extension == "md") {
            let text = fs::read_to_string(root().join(&name)).unwrap();
            found.push((name, text));
        }
    }
    assert!(found.len() > 8, "the documents are not where they are looked for");
    found
}

fn names(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(root().join(directory)) else {
        return Vec::new();
    };
    entries.map(|entry| directory.join(entry.unwrap().file_name())).collect()
}

// What the program knows.

/// What serde expects instead of a name that it does not know: `expected one of `a`, `b``.
fn expected(message: &str) -> BTreeSet<String> {
    let (_, expected) = message.split_once("expected ").unwrap_or_else(|| panic!("{message}"));
    expected.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn fault(text: &str) -> String {
    Config::parse(text, Path::new("x")).expect_err(text).to_string()
}

/// Keys by section, as configuration.md and usermilter.toml(5) call the sections.
fn keys_of_the_program() -> BTreeMap<String, BTreeSet<String>> {
    let mut keys = BTreeMap::new();
    for section in expected(&fault("no-such-key = 1")) {
        if section != "resolver" {
            keys.insert(format!("[{section}]"), expected(&fault(&format!("[{section}]\nno-such-key = 1"))));
        }
    }
    for kind in expected(&fault("[[resolver]]\ntype = \"no-such-type\"")) {
        let text = format!("[[resolver]]\ntype = \"{kind}\"\nno-such-key = 1");
        keys.insert(format!("type = \"{kind}\""), expected(&fault(&text)));
    }
    keys
}

/// The words that a key takes, for keys that take words.
fn words(section: &str, key: &str) -> BTreeSet<String> {
    let text = format!("{section}\n{key} = \"no-such-word\"");
    match Config::parse(&text, Path::new("x")) {
        Err(error) if error.to_string().contains("unknown variant") => expected(&error.to_string()),
        _ => BTreeSet::new(),
    }
}

fn statuses_of_the_program() -> BTreeMap<u8, &'static str> {
    let name = |status: u8| match Meaning::of_status(status.into()) {
        Meaning::Verdict(Verdict::Accept) | Meaning::AcceptFinally => Some("accept"),
        Meaning::Verdict(Verdict::Reject) => Some("reject"),
        Meaning::Verdict(Verdict::Defer) => Some("defer"),
        Meaning::Error => None,
    };
    (0..=255).filter_map(|status| Some((status, name(status)?))).collect()
}

fn variables_of_the_program() -> Vec<&'static str> {
    // On the wire a variable is its number.
    let named = (0..).map_while(|n: u8| monitor::decode::<Variable>(&[n]).ok()).map(Variable::name);
    let variables: Vec<_> = named.chain(["HOME", "USER", "LOGNAME", "SHELL", "PATH"]).collect();
    assert!(variables.contains(&"SENDER") && variables.len() > 20);
    variables
}

// What the documents say.

/// Keys by section, each with its default if it has one.
type Documented = BTreeMap<String, BTreeMap<String, Option<String>>>;

/// The tables `| key | default | meaning |` of configuration.md, and the text of each section.
fn configuration_md() -> (Documented, BTreeMap<String, String>) {
    let (mut keys, mut texts) = (Documented::new(), BTreeMap::<String, String>::new());
    let mut section = String::new();
    for line in read("docs/configuration.md").lines() {
        if let Some(title) =
            line.strip_prefix("## ").or_else(|| line.strip_prefix("### type").map(|_| &line[4..]))
        {
            section = title.to_owned();
        }
        let text = texts.entry(section.clone()).or_default();
        text.push_str(line);
        text.push('\n');
        let is_section = section.starts_with('[') || section.starts_with("type = ");
        let cells: Vec<&str> = line.split(" | ").map(|cell| cell.trim_matches(['|', ' '])).collect();
        if let (true, [key, default, ..]) = (is_section, &cells[..])
            && let Some(key) = key.strip_prefix('`').and_then(|key| key.strip_suffix('`'))
        {
            let default = default.strip_prefix('`').and_then(|d| d.strip_suffix('`')).map(str::to_owned);
            keys.entry(section.clone()).or_default().insert(key.to_owned(), default);
        }
    }
    (keys, texts)
}

/// The items `.It Cm key No = default` of usermilter.toml(5), and the text of each section.
fn configuration_5() -> (Documented, BTreeMap<String, String>) {
    let (mut keys, mut texts) = (Documented::new(), BTreeMap::<String, String>::new());
    let mut section = String::new();
    for line in read("docs/man/usermilter.toml.5").lines() {
        let line = line.replace("\\(dq", "\"").replace("\\&", "").replace("\\-", "-");
        if let Some(title) = line.strip_prefix(".Ss ").or_else(|| line.strip_prefix(".Sh ")) {
            section = title.trim_start_matches("[[resolver]], ").to_owned();
        }
        let text = texts.entry(section.clone()).or_default();
        text.push_str(&line);
        text.push('\n');
        if let Some(item) = line.strip_prefix(".It Cm ") {
            let (key, default) = match item.split_once(" No = ") {
                Some((key, default)) => (key, Some(default.to_owned())),
                None => (item, None),
            };
            keys.entry(section.clone()).or_default().insert(key.to_owned(), default);
        }
    }
    (keys, texts)
}

#[track_caller]
fn check_configuration(document: &str, documented: &Documented, texts: &BTreeMap<String, String>) {
    for (section, keys) in keys_of_the_program() {
        let said = documented.get(&section).unwrap_or_else(|| panic!("{document} has no section {section}"));
        let said: BTreeSet<String> = said.keys().filter(|key| *key != "type").cloned().collect();
        let keys: BTreeSet<String> = keys.into_iter().filter(|key| key != "type").collect();
        assert_eq!(said, keys, "{document}, {section}: keys in the document, keys in the program");
        if section.starts_with('[') {
            for word in keys.iter().flat_map(|key| words(&section, key)) {
                assert!(texts[&section].contains(&word), "{document}, {section}: no word about \"{word}\"");
            }
        }
    }
    // The defaults, written out, change nothing.
    let mut text = String::new();
    for (section, keys) in documented.iter().filter(|(section, _)| section.starts_with("[")) {
        let defaults =
            keys.iter().filter_map(|(key, default)| Some(format!("{key} = {}\n", default.as_ref()?)));
        text += &format!("{section}\n{}", defaults.collect::<String>());
    }
    let written =
        Config::parse(&text, Path::new(document)).unwrap_or_else(|error| panic!("{error}:\n{text}"));
    let built_in = Config::parse("", Path::new("nothing")).unwrap();
    let differing: Vec<_> = format!("{written:#?}")
        .lines()
        .zip(format!("{built_in:#?}").lines())
        .filter(|(written, built_in)| written != built_in)
        .map(|(written, built_in)| format!("{} instead of {}", written.trim(), built_in.trim()))
        .collect();
    assert!(differing.is_empty(), "{document}: other defaults than the program's: {differing:?}");
    // And none is left out that could be written.
    for (section, keys) in documented.iter().filter(|(section, _)| section.starts_with('[')) {
        for (key, default) in keys {
            let optional =
                ["socket-group", "metrics", "domains", "rules", "default-message", "default-recipient"];
            let optional = optional.contains(&key.as_str());
            assert!(default.is_some() || optional, "{document}, {section}: {key} has no default");
        }
    }
}

#[test]
fn configuration_md_has_every_key_and_default() {
    let (documented, texts) = configuration_md();
    check_configuration("docs/configuration.md", &documented, &texts);
}

#[test]
fn usermilter_toml_5_has_every_key_and_default() {
    let (documented, texts) = configuration_5();
    check_configuration("usermilter.toml(5)", &documented, &texts);
}

/// Numbers before a comma, a bar or the end, with the first word of what follows.
fn statuses_of_lines<'a>(rows: impl Iterator<Item = (&'a str, &'a str)>) -> BTreeMap<u8, String> {
    let mut statuses = BTreeMap::new();
    for (numbers, meaning) in rows {
        let word: String = meaning.trim().chars().take_while(char::is_ascii_alphabetic).collect();
        for number in numbers.split(',').filter_map(|number| number.trim().parse().ok()) {
            statuses.insert(number, word.to_lowercase());
        }
    }
    statuses
}

#[test]
fn every_exit_status_of_a_filter_is_documented() {
    let program: BTreeMap<u8, String> =
        statuses_of_the_program().into_iter().map(|(status, word)| (status, word.to_owned())).collect();
    let text = read("docs/writing-filters.md");
    let rows = section_of(&text, "## Exit status")
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split_once(" | "));
    assert_eq!(statuses_of_lines(rows), program, "docs/writing-filters.md");
    let text = read("docs/man/usermilter-filter.7");
    let items =
        section_of(&text, ".Sh EXIT STATUS").split("\n.It ").skip(1).filter_map(|item| item.split_once('\n'));
    assert_eq!(statuses_of_lines(items), program, "usermilter-filter(7)");
}

/// From a heading to the next one of its kind.
fn section_of<'a>(text: &'a str, heading: &str) -> &'a str {
    let (_, rest) = text.split_once(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no {heading}"));
    let kind = heading.split(' ').next().unwrap();
    rest.split(&format!("\n{kind} ")).next().unwrap()
}

#[test]
fn every_variable_of_a_filter_is_documented() {
    let (guide, manual) = (read("docs/writing-filters.md"), read("docs/man/usermilter-filter.7"));
    let guide = section_of(&guide, "## Environment");
    let manual: BTreeSet<&str> = section_of(&manual, ".Sh ENVIRONMENT")
        .lines()
        .filter_map(|line| line.strip_prefix(".It Ev "))
        .flat_map(|names| names.split(" , "))
        .collect();
    let program = variables_of_the_program();
    for name in &program {
        assert!(guide.contains(&format!("`{name}`")), "docs/writing-filters.md: no {name}");
    }
    assert_eq!(manual, program.into_iter().collect(), "usermilter-filter(7)");
}

#[test]
fn every_key_action_and_limit_of_rules_is_documented() {
    let no_files = |_: &str| None;
    let top = expected(&Rules::parse("no-such-key = 1", no_files).unwrap_err().to_string());
    let rule = expected(&Rules::parse("[[rule]]\nno-such-key = 1", no_files).unwrap_err().to_string());
    let actions = expected(&Rules::parse("default = \"no\"", no_files).unwrap_err().to_string());
    assert!(top.contains("default") && rule.contains("sender") && actions.contains("defer"));
    let (guide, manual) = (read("docs/rules.md"), read("docs/man/usermilter-filter.7"));
    let manual = section_of(&manual, ".Sh RULES").replace("\\-", "-");
    for key in top.iter().chain(&rule).filter(|key| *key != "rule") {
        assert!(guide.contains(&format!("`{key}`")), "docs/rules.md: no {key}");
        let item = |line: &str| {
            line.strip_prefix(".It Cm ").is_some_and(|names| names.split([' ', ',']).any(|n| n == key))
        };
        assert!(manual.lines().any(item), "usermilter-filter(7): no {key}");
    }
    for action in &actions {
        assert!(guide.contains(&format!("`\"{action}\"`")), "docs/rules.md: no {action}");
        assert!(manual.contains(&format!(".Ql {action}")), "usermilter-filter(7): no {action}");
    }
    for limit in [
        rules::MAX_RULES,
        rules::MAX_PATTERNS,
        rules::MAX_PATTERN_LENGTH,
        rules::MAX_SENDER_FILES,
        rules::MAX_SENDER_LINES,
        rules::MAX_GLOB_CHARACTERS,
    ] {
        let limits = section_of(&guide, "## Limits");
        assert!(limits.contains(&format!("| {limit}")), "docs/rules.md: no limit of {limit}");
    }
}

fn usermilter(arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_usermilter")).args(arguments).output().unwrap();
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

/// The first words of an indented list in `--help`.
fn listed(help: &str, heading: &str) -> Vec<String> {
    let list = help.lines().skip_while(|line| *line != heading).skip(1);
    let items = list.take_while(|line| !line.is_empty() && line.starts_with(' '));
    let first = items.filter(|line| !line.starts_with("     ") || line.trim_start().starts_with("--"));
    first.map(|line| line.trim().to_owned()).collect()
}

#[test]
fn every_command_option_and_exit_status_is_in_usermilter_8() {
    let manual = read("docs/man/usermilter.8").replace("\\-", "-");
    let (status, help) = usermilter(&["--help"]);
    assert_eq!(status, Some(0));
    let commands = listed(&help, "Commands:");
    assert!(!commands.is_empty(), "{help}");
    for command in commands.iter().filter_map(|line| line.split(' ').next()) {
        assert!(manual.contains(&format!("\n.It Cm {command}\n")), "usermilter(8): no command {command}");
        let (_, help) = usermilter(&[command, "--help"]);
        for option in help.split_whitespace().filter_map(|word| word.strip_prefix("--")) {
            let option: String =
                option.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
            assert!(manual.contains(&format!("Fl -{option}")), "usermilter(8): no option --{option}");
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("usermilter.toml");
    fs::write(&file, "nonsense").unwrap();
    let bad = usermilter(&["check", "--config", file.to_str().unwrap()]).0;
    fs::write(&file, "").unwrap();
    let good = usermilter(&["check", "--config", file.to_str().unwrap()]).0;
    let statuses = section_of(&manual, ".Sh EXIT STATUS");
    for (status, expected) in [(good, 0), (usermilter(&["--no-such-option"]).0, 64), (bad, 78)] {
        assert_eq!(status, Some(expected));
        assert!(
            statuses.contains(&format!("\n.It {expected}\n")),
            "usermilter(8): no exit status {expected}"
        );
    }
}

#[test]
fn links_lead_to_what_exists() {
    for (name, text) in markdown() {
        for (at, _) in text.match_indices("](") {
            let target = text[at + 2..].split(')').next().unwrap();
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
            let file = if path.is_empty() { name.clone() } else { name.parent().unwrap().join(path) };
            assert!(root().join(&file).exists(), "{}: link to {target}", name.display());
            if !anchor.is_empty() {
                let headings = fs::read_to_string(root().join(&file)).unwrap();
                let found =
                    headings.lines().filter(|line| line.starts_with('#')).any(|line| slug(line) == anchor);
                assert!(found, "{}: link to {target}", name.display());
            }
        }
    }
}

/// What GitHub makes of a heading.
fn slug(heading: &str) -> String {
    let heading = heading.trim_start_matches('#').trim().to_lowercase();
    heading.replace(' ', "-").chars().filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_')).collect()
}

/// Literal displays of a manual page: the line before them, and the text.
fn displays(page: &str) -> Vec<(String, String)> {
    let mut displays = Vec::new();
    let mut parts = page.split("\n.Bd -literal -offset indent\n");
    let mut before = parts.next().unwrap();
    for part in parts {
        let (display, after) = part.split_once("\n.Ed").unwrap();
        displays.push((
            before.lines().last().unwrap().to_owned(),
            display.replace("\\-", "-").replace("\\e", "\\"),
        ));
        before = after;
    }
    displays
}

fn check_config_example(place: &str, text: &str) {
    if let Err(error) = Config::parse(text, Path::new(place)) {
        panic!("{error}\n{text}");
    }
}

#[test]
fn examples_in_manual_pages_are_understood() {
    // As a block of a document is: a comment before it says how, else it is what the page is about.
    for (page, usual) in
        [("usermilter.8", "sh"), ("usermilter.toml.5", "toml"), ("usermilter-filter.7", "sh")]
    {
        let displays = displays(&read(&format!("docs/man/{page}")));
        assert!(!displays.is_empty(), "{page}");
        for (mark, text) in displays {
            let info = mark.strip_prefix(".\\\" ").unwrap_or(usual);
            blocks::check_text(page, info, &text).unwrap_or_else(|fault| panic!("{page}: {fault}\n{text}"));
        }
    }
}

/// Runs a sample with a mail and the environment of a filter, as the manual has it.
fn run_sample(script: &str, mail: &str, values: &[(&str, &str)]) -> Option<(Option<i32>, String)> {
    let interpreter = script.lines().next().unwrap().trim_start_matches("#!").to_owned();
    if !Path::new(&interpreter).exists() {
        eprintln!("skipped: no {interpreter}");
        return None;
    }
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("message");
    fs::write(&file, script).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o700)).unwrap();
    let mut command = Command::new(&interpreter);
    command.arg(&file).current_dir(home.path()).env_clear();
    for name in variables_of_the_program() {
        command.env(name, "");
    }
    command.env("HOME", home.path()).env("PATH", "/usr/local/bin:/usr/bin:/bin").envs(values.iter().copied());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // One that does not read to the end closes the pipe early.
    let _ = child.stdin.take().unwrap().write_all(mail.as_bytes());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let left: Vec<_> = fs::read_dir(home.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["message"], "the sample leaves files behind");
    assert!(output.stderr.is_empty(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
    Some((output.status.code(), said))
}

fn samples() -> Vec<String> {
    let documents = blocks::all().into_iter().map(|block| block.text);
    let manual = displays(&read("docs/man/usermilter-filter.7")).into_iter().map(|(_, text)| text);
    documents.chain(manual).filter(|text| text.starts_with("#!")).collect()
}

#[test]
fn sample_filters_accept_what_is_harmless_and_are_not_fooled() {
    let samples = samples();
    assert!(samples.len() > 4);
    let harmless = "Return-Path: <bob@example.com>\nFrom: bob@example.com\nTo: alice@example.org\nSubject: Lunch\n\nAt one?\n";
    let values = [
        ("SENDER", "bob@example.com"),
        ("ORIGINAL_RECIPIENT", "alice@example.org"),
        ("USERMILTER_RECIPIENTS", "alice@example.org"),
    ];
    let evil = "$(touch owned);`touch owned`' \"-rf *@example.com";
    let hostile: Vec<(&str, &str)> = [
        "SENDER",
        "RECIPIENT",
        "LOCAL",
        "EXTENSION",
        "CLIENT_HELO",
        "ORIGINAL_RECIPIENT",
        "USERMILTER_RECIPIENTS",
    ]
    .map(|name| (name, evil))
    .into();
    let hostile_mail = format!("Subject: {evil}\nTo: {evil}\nTo: =?utf-8?q?=ff\nCc: \0\n\n{evil}\n");
    for sample in samples {
        // Without a spamd, spamc may say what it likes; its sample is tested with the real one elsewhere.
        if sample.contains("spamc") {
            continue;
        }
        if let Some((status, said)) = run_sample(&sample, harmless, &values) {
            assert_eq!((status, said.as_str()), (Some(0), ""), "{sample}");
        }
        if let Some((Some(status), _)) = run_sample(&sample, &hostile_mail, &hostile) {
            assert_ne!(Meaning::of_status(status), Meaning::Error, "{status}: {sample}");
        }
    }
}

#[test]
fn sample_filters_refuse_what_they_say() {
    let mails = [
        ("invoice", "Subject: Invoice 1\n\nPay\n".to_owned()),
        ("programs", "Content-Type: application/x; name=\"a.exe\"\n\nx\n".to_owned()),
        ("neither in To nor in Cc", "To: somebody@example.net\n\nx\n".to_owned()),
        ("addresses in To and Cc", format!("To: {}\n\nx\n", "a@example.net,\n ".repeat(60))),
    ];
    for (words, mail) in mails {
        let sample = samples().into_iter().find(|sample| sample.contains(words)).expect(words);
        let values = [("SENDER", "s@example.com"), ("USERMILTER_RECIPIENTS", "alice@example.org")];
        if let Some((status, said)) = run_sample(&sample, &mail, &values) {
            assert_eq!(status, Some(77), "{sample}\n{said}");
            assert!(said.starts_with("5."), "{said}");
        }
    }
}

/// The threat model may name only tests that exist.
#[test]
fn tests_that_documents_name_exist() {
    let mut sources = String::new();
    let mut directories = vec![PathBuf::from("src"), PathBuf::from("tests")];
    while let Some(directory) = directories.pop() {
        for name in names(&directory) {
            if root().join(&name).is_dir() {
                directories.push(name);
            } else if name.extension().is_some_and(|extension| extension == "rs") {
                sources += &fs::read_to_string(root().join(&name)).unwrap();
            }
        }
    }
    let mut count = 0;
    for (name, text) in markdown() {
        for word in text.split('`').skip(1).step_by(2) {
            let sentence = word.matches('_').count() >= 3
                && word.chars().all(|c| c == '_' || c.is_ascii_lowercase() || c.is_ascii_digit());
            // Parameters of Postfix and OpenLDAP look alike, and so do metrics, which tests/metrics.rs compares.
            if sentence
                && !["milter_", "smtpd_", "lmtp_", "max_", "tls_", "usermilter_"]
                    .iter()
                    .any(|prefix| word.starts_with(prefix))
            {
                // Some have a harness of their own, and are in a table.
                let exists = [format!("fn {word}("), format!("(\"{word}\", ")];
                let exists = exists.iter().any(|form| sources.contains(form.as_str()));
                assert!(exists, "{}: no test {word}", name.display());
                count += 1;
            }
        }
    }
    assert!(count > 10, "the threat model names tests");
}

/// The threat model is an index: each of its tests stands behind the file, or the directory, that has it, and each test of
/// whole promises about security is in it.
#[test]
fn the_threat_model_names_tests_with_their_files() {
    let text = fs::read_to_string(root().join("docs/threat-model.md")).unwrap();
    let mut named = BTreeSet::new();
    for row in text.lines().filter(|line| line.starts_with("| ")) {
        let cell = row.trim_end_matches(['|', ' ']).rsplit(" | ").next().unwrap();
        let mut source = String::new();
        for word in cell.split('`').skip(1).step_by(2) {
            if word.starts_with("src/") || word.starts_with("tests/") {
                source = source_of(Path::new(word));
            } else if word.matches('_').count() >= 2 && !word.contains(['/', '.', ' ']) {
                let is_there = [format!("fn {word}("), format!("(\"{word}\", ")];
                assert!(is_there.iter().any(|form| source.contains(form.as_str())), "{word} in {row}");
                named.insert(word.to_owned());
            }
        }
    }
    for directory in ["isolation", "hostile_worker", "confinement"] {
        let source = source_of(&Path::new("tests").join(directory));
        let harness =
            source.split("(\"").skip(1).filter_map(|rest| rest.split_once("\", ").map(|(name, _)| name));
        let usual = source
            .split("#[test]\nfn ")
            .skip(1)
            .filter_map(|rest| rest.split_once("()").map(|(name, _)| name));
        let is_sentence =
            |name: &str| name.contains('_') && name.chars().all(|c| c == '_' || c.is_ascii_lowercase());
        for name in harness.chain(usual).filter(|name| is_sentence(name)) {
            assert!(named.contains(name), "docs/threat-model.md does not name {name} of tests/{directory}");
        }
    }
}

/// The text of a source, or of all in a directory.
fn source_of(path: &Path) -> String {
    if !root().join(path).is_dir() {
        return fs::read_to_string(root().join(path))
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
    let sources = names(path).into_iter().filter(|name| name.extension().is_some_and(|kind| kind == "rs"));
    sources.map(|name| source_of(&name)).collect()
}

#[test]
fn manual_pages_are_clean() {
    let pages = ["usermilter.8", "usermilter.toml.5", "usermilter-filter.7"]
        .map(|page| root().join("docs/man").join(page));
    match Command::new("mandoc").args(["-T", "lint", "-W", "warning"]).args(pages).output() {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout)),
        Err(error) => eprintln!("skipped: mandoc: {error}"),
    }
}

/// The direct dependencies in a section of a manifest.
fn dependencies(manifest: &str, section: &str) -> BTreeSet<String> {
    let manifest: toml::Table = read(manifest).parse().unwrap();
    manifest[section].as_table().unwrap().keys().cloned().collect()
}

#[test]
fn every_dependency_has_its_reason() {
    let text = read("docs/dependencies.md");
    let rows = |text: &str| -> BTreeSet<String> {
        let cells = text.lines().filter_map(|line| line.strip_prefix("| ")?.split_once(" | "));
        let names = cells.flat_map(|(names, _)| names.split(", ")).map(str::to_owned);
        names.filter(|name| !["crate", "---"].contains(&name.as_str())).collect()
    };
    let (program, tests) = text.split_once("For tests only").unwrap();
    let of_program = dependencies("Cargo.toml", "dependencies");
    assert_eq!(rows(program), of_program);
    let mut of_tests = dependencies("tests/fuzz/Cargo.toml", "dependencies");
    of_tests.retain(|name| name != "usermilter" && !of_program.contains(name));
    of_tests.extend(dependencies("Cargo.toml", "dev-dependencies"));
    assert_eq!(rows(tests), of_tests);
}

#[test]
fn make_help_lists_every_target_and_documents_name_no_other() {
    let makefile = read("Makefile");
    let is_name = |name: &&str| !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase());
    let targets: BTreeSet<&str> = makefile
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(_, rest)| rest.contains(" ## "))
        .map(|(name, _)| name)
        .filter(is_name)
        .collect();
    assert!(targets.contains("install") && targets.contains("audit"));
    let help = Command::new("make").args(["-C"]).arg(root()).args(["-s", "help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let listed: BTreeSet<&str> =
        help.lines().filter_map(|line| line.trim().strip_prefix("make ")?.split(' ').next()).collect();
    assert_eq!(listed, targets);
}

/// Help is a document too.
#[test]
fn examples_in_help_are_understood() {
    let commands = listed(&usermilter(&["--help"]).1, "Commands:");
    let commands = commands.iter().filter_map(|line| line.split(' ').next()).filter(|name| *name != "help");
    let mut examples = 0;
    for help in commands.map(|command| usermilter(&[command, "--help"]).1).chain([usermilter(&["--help"]).1])
    {
        for line in help.lines().filter(|line| line.starts_with("  usermilter ")) {
            // What it is for stands apart.
            let example = line.trim_start().split("   ").next().unwrap();
            if !is_form(example) {
                commands::check(example).unwrap_or_else(|fault| panic!("{fault}"));
                examples += 1;
            }
        }
    }
    assert!(examples > 10, "{examples}");
}

/// Whether a word in capitals stands for another.
fn is_form(command: &str) -> bool {
    command.split([' ', '=']).any(|word| word.len() > 1 && word.chars().all(|c| c.is_ascii_uppercase()))
}

/// Commands in running text, `like this one`, are held against the programs as those in blocks are.
#[test]
fn commands_in_running_text_exist() {
    let mut checked = 0;
    for (name, text) in markdown() {
        for line in text.lines() {
            for span in line.split('`').skip(1).step_by(2) {
                let is_command = [
                    "usermilter ",
                    "make ",
                    "cargo ",
                    "systemctl ",
                    "apt-get ",
                    "postconf ",
                    "tests/fuzz/run ",
                ];
                let is_command = is_command.iter().any(|start| span.starts_with(start));
                if is_command && !is_form(span) {
                    commands::check(span).unwrap_or_else(|fault| panic!("{}: {fault}", name.display()));
                    checked += 1;
                }
            }
        }
    }
    assert!(checked > 30, "{checked}");
}

/// Settings and files that running text names, `server.milter` and `src/sys.rs`, are there.
#[test]
fn settings_and_files_that_documents_name_exist() {
    let keys = keys_of_the_program();
    let (mut settings, mut files) = (0, 0);
    for (name, text) in markdown() {
        for span in text.lines().flat_map(|line| line.split('`').skip(1).step_by(2)) {
            let is_word =
                |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase() || c == '-');
            let setting = span.split([' ', '=']).next().unwrap().split_once('.');
            if let Some((section, key)) = setting
                && let Some(known) = keys.get(&format!("[{section}]"))
                && is_word(key)
                && !["toml", "service", "conf"].contains(&key)
            {
                assert!(known.contains(key), "{}: no setting {span}", name.display());
                settings += 1;
            }
            let is_path = ["src/", "tests/", "packaging/", "docs/", "postfix/", "sendmail/", "ldap/"]
                .iter()
                .any(|directory| span.starts_with(directory));
            if is_path && !span.contains(['*', '…', ' ']) {
                assert!(root().join(span).exists(), "{}: no file {span}", name.display());
                files += 1;
            }
        }
    }
    assert!(settings > 50 && files > 50, "{settings}, {files}");
}

/// Who is called at night finds what to do.
#[test]
fn every_alert_has_its_advice() {
    let alerts = blocks::read_yaml(&read("docs/alerts.yaml")).unwrap();
    let groups = alerts["groups"].as_array().unwrap().iter();
    let rules = groups.flat_map(|group| group["rules"].as_array().unwrap());
    let alerts: BTreeSet<&str> = rules
        .map(|rule| {
            assert!(rule["expr"].is_string() && rule["annotations"]["summary"].is_string(), "{rule}");
            rule["alert"].as_str().unwrap()
        })
        .collect();
    let page = read("docs/postmaster.md");
    let advice: BTreeSet<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `Usermilter")?.split_once('`'))
        .map(|(name, _)| name)
        .collect();
    let alerts: BTreeSet<&str> = alerts.iter().filter_map(|name| name.strip_prefix("Usermilter")).collect();
    assert!(alerts.len() > 5);
    assert_eq!(advice, alerts, "docs/postmaster.md, docs/alerts.yaml");
}

/// The configuration that packages install: everything in it is a comment, each a default or an example that is understood.
#[test]
fn the_installed_configuration_changes_nothing_and_its_comments_are_understood() {
    let text = read("packaging/usermilter.toml");
    check_config_example("packaging/usermilter.toml", &text);
    let is_setting = |line: &str| line.contains(" = ") || line.starts_with('[');
    let mut seen = BTreeSet::new();
    let mut section = String::new();
    for line in text.lines() {
        let bare = line.strip_prefix("# ").unwrap_or(line);
        if bare.starts_with('[') {
            section = bare.to_owned();
        } else if is_setting(bare) && bare.split(' ').nth(1) == Some("=") {
            assert!(line.starts_with("# "), "{line} changes something");
            let kind = if section == "[[resolver]]" && !bare.starts_with("type") {
                "type = \"passwd\"\n"
            } else {
                ""
            };
            check_config_example("packaging/usermilter.toml", &format!("{section}\n{kind}{bare}\n"));
            seen.insert(bare.split(' ').next().unwrap().to_owned());
        }
    }
    assert!(seen.contains("domains") && seen.contains("min-uid"), "{seen:?}");
}
