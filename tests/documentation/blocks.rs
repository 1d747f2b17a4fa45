//! No fenced block of a document is there unchecked. What stands behind the fence says how it is checked:
//!
//! | behind the fence | how |
//! | --- | --- |
//! | `toml`, `toml rules` | read as a configuration, or as rules |
//! | `sh`, `python`, `perl`, beginning with `#!` | run as a sample filter, in `main.rs` |
//! | `sh` | each command exists and has these arguments (`commands.rs`); those of `docs/ldap.md` are run by `tests/ldap` |
//! | `sh run` | run by a user, who gets what the `text output` after it shows (`sessions.rs`) |
//! | `console` | run, and compared with what it prints |
//! | `text PATH` | stands in that file, line by line; other tests use the file |
//! | `text smtp`, `text log`, `text user-log`, `text reply` | happens when mail is sent (`sessions.rs`) |
//! | `text passwd`, `text senders` | read as a file of that kind |
//! | `yaml` | read by Prometheus' rules for YAML, names our socket |
//! | `mermaid` | is a diagram whose parts are closed |

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use usermilter::address::Address;
use usermilter::config::Config;
use usermilter::resolver::passwd_file::{Answer, PasswdFile};
use usermilter::rules::Rules;

use crate::{commands, read, root};

/// A fenced block.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    /// The document, and the line of the fence.
    pub(crate) file: String,
    pub(crate) line: usize,
    /// The heading of the second level that it stands under.
    pub(crate) section: String,
    pub(crate) info: String,
    pub(crate) text: String,
}

impl Block {
    pub(crate) fn place(&self) -> String {
        format!("{}:{}", self.file, self.line)
    }

    pub(crate) fn is_sample(&self) -> bool {
        self.text.starts_with("#!")
    }
}

/// All blocks of a document.
///
/// # Errors
///
/// For a block that is not closed, and for code that is indented instead of fenced, which nobody would check.
pub(crate) fn of(file: &str, text: &str) -> Result<Vec<Block>, String> {
    let mut blocks = Vec::new();
    let mut open: Option<(usize, Block)> = None;
    let (mut section, mut after_blank) = (String::new(), true);
    for (index, line) in text.lines().enumerate() {
        let bare = line.trim_start();
        let indent = line.len() - bare.len();
        match (&mut open, bare.strip_prefix("```")) {
            (None, Some(info)) => {
                let (section, info) = (section.clone(), info.trim().to_owned());
                let file = file.to_owned();
                open = Some((indent, Block { file, line: index + 1, section, info, text: String::new() }));
            }
            (Some(_), Some(_)) => blocks.extend(open.take().map(|(_, block)| block)),
            (Some((indent, block)), None) => {
                block.text.push_str(line.get(*indent..).unwrap_or(""));
                block.text.push('\n');
            }
            (None, None) => {
                if after_blank && indent >= 4 && !bare.starts_with(['|', '*', '!']) {
                    return Err(format!("{file}:{}: indented, not fenced: {bare}", index + 1));
                }
                if let Some(title) = line.strip_prefix("## ") {
                    title.clone_into(&mut section);
                }
            }
        }
        after_blank = bare.is_empty();
    }
    match open {
        Some((_, block)) => Err(format!("{}: not closed", block.place())),
        None => Ok(blocks),
    }
}

/// All blocks of all documents.
pub(crate) fn all() -> Vec<Block> {
    let documents = crate::markdown();
    let of_document = |(name, text): (std::path::PathBuf, String)| of(&name.to_string_lossy(), &text);
    let blocks: Result<Vec<_>, String> = documents.into_iter().map(of_document).collect();
    blocks.unwrap_or_else(|fault| panic!("{fault}")).concat()
}

/// The kinds that `sessions.rs` looks for, all of them.
pub(crate) const OF_SESSIONS: [&str; 4] = ["text smtp", "text log", "text user-log", "text reply"];

#[test]
fn every_block_of_the_documents_is_checked() {
    let blocks = all();
    assert!(blocks.len() > 40, "{}", blocks.len());
    let mut before: Option<&Block> = None;
    let mut faults = Vec::new();
    for block in &blocks {
        let before = before.replace(block).filter(|before| before.file == block.file);
        if let Err(fault) = check(block, before) {
            faults.push(format!("{}: {fault}", block.place()));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn what_nobody_would_check_is_found() {
    let block = |info: &str, text: &str| {
        let mut blocks = of("a.md", &format!("## Here\n\n```{info}\n{text}\n```\n")).unwrap();
        check(&blocks.remove(0), None)
    };
    for (info, text) in [
        ("", "something"),
        ("text", "something"),
        ("bash", "true"),
        ("text postfix/main.cf", "milter_default_action = accept"),
        ("text no/such/file", "x"),
        ("text output", "x"),
        ("toml", "[server]\nmilters = []"),
        ("toml rules", "[[rule]]\naction = \"refuse\""),
        ("text passwd", "alice:x:5001:/home/alice"),
        ("text senders", "two addresses"),
        ("yaml", "a: [b"),
        ("mermaid", "flowchart LR\n subgraph one\n a --> b"),
        ("console", "$ usermilter --version\nusermilter 47.11"),
        ("sh", "usermilter serve --foreground"),
        ("sh", "make it"),
        ("sh", "if true; then no-such-program; fi"),
        ("sh", "systemctl restart usermilterd"),
        ("sh", "postconf smtpd_milter"),
        ("sh", "cargo test --test no_such_test"),
        ("sh", "strace --no-such-option target/release/usermilter serve"),
        ("sh", "useradd --no-such-option usermilter"),
        ("sh", "cat < no-such-file"),
    ] {
        assert!(block(info, text).is_err(), "```{info}: {text}");
    }
    assert!(of("a.md", "Do\n\n    this\n").is_err());
    assert!(of("a.md", "```sh\ntrue\n").is_err());
    assert!(block("sh", "make test && usermilter serve --config x   # and so on").is_ok());
}

/// Checks what stands elsewhere as if it were a block.
pub(crate) fn check_text(file: &str, info: &str, text: &str) -> Result<(), String> {
    let (file, section, info) = (file.to_owned(), String::new(), info.to_owned());
    check(&Block { file, line: 0, section, info, text: text.to_owned() }, None)
}

fn check(block: &Block, before: Option<&Block>) -> Result<(), String> {
    let text = block.text.as_str();
    let words: Vec<&str> = block.info.split(' ').collect();
    match words[..] {
        // `main.rs` runs each of them.
        ["sh" | "python" | "perl"] if block.is_sample() => Ok(()),
        ["toml"] => Config::parse(text, Path::new(&block.file)).map(drop).map_err(|error| error.to_string()),
        ["toml", "rules"] => rules(text, ""),
        ["sh"] if block.file == "docs/ldap.md" => run_by_tests_of_ldap(block),
        ["sh"] | ["sh", "run"] => commands::check(text),
        ["console"] => console(text),
        ["text", "output"] => match before {
            Some(before) if before.info == "sh run" => Ok(()),
            _ => Err("no output of anything that was run".to_owned()),
        },
        ["text", "passwd"] => passwd(text),
        ["text", "senders"] => rules("[[rule]]\nsender-file = [\"x\"]\naction = \"accept\"", text),
        ["text", path] if path.contains('/') => stands_in(text, path),
        ["yaml"] => yaml(text),
        ["mermaid"] => diagram(text),
        _ if OF_SESSIONS.contains(&block.info.as_str()) => Ok(()),
        _ => Err(format!("nobody checks ```{}", block.info)),
    }
}

fn rules(text: &str, sender_file: &str) -> Result<(), String> {
    Rules::parse(text, |_| Some(sender_file.to_owned())).map(drop).map_err(|error| error.to_string())
}

/// tests/ldap/files.rs runs all blocks under the headings that it names.
fn run_by_tests_of_ldap(block: &Block) -> Result<(), String> {
    let tests = read("tests/ldap/files.rs");
    let named = tests.split("commands(\"").skip(1).filter_map(|rest| rest.split('"').next());
    match named.into_iter().any(|heading| !heading.is_empty() && block.section.starts_with(heading)) {
        true => Ok(()),
        false => Err(format!("tests/ldap does not run {:?}", block.section)),
    }
}

/// `$ command`, and what it prints of `new.toml`, whose sockets are in a directory of root.
fn console(text: &str) -> Result<(), String> {
    let (command, printed) = text.split_once('\n').unwrap_or((text, ""));
    let command = command.strip_prefix("$ ").ok_or("no command after `$ `")?;
    commands::check(command)?;
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().display().to_string();
    let (sockets, spool) = (format!("{place}/sockets"), format!("{place}/spool"));
    for (path, mode) in [(&place, 0o755), (&sockets, 0o755), (&spool, 0o777)] {
        std::fs::create_dir_all(path).unwrap();
        std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }
    let config = format!(
        "[server]\nmilter = [\"unix:{sockets}/milter.sock\"]\nuser = \"nobody\"\n\
         [filter]\nspool-directory = \"{spool}\"\n"
    );
    std::fs::write(directory.path().join("new.toml"), config).unwrap();
    let output = Command::new("/bin/sh")
        .args(["-c", &format!("exec 2>&1; {command}")])
        .env("PATH", commands::path_to_usermilter())
        .current_dir(&directory)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&output.stdout).replace(&sockets, "/run/usermilter");
    if output == printed { Ok(()) } else { Err(format!("it prints\n{output}")) }
}

fn passwd(text: &str) -> Result<(), String> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("users");
    std::fs::write(&path, text).unwrap();
    let file = PasswdFile::open(&path);
    if !file.problems().is_empty() {
        return Err(format!("{:?}", file.problems()));
    }
    for name in text.lines().filter_map(|line| line.split(':').next()) {
        let address = if name.contains('@') { name.to_owned() } else { format!("{name}@example.org") };
        let address = Address::parse(address.as_bytes()).map_err(|error| error.to_string())?;
        if !matches!(file.lookup(&address), Answer::Found(_)) {
            return Err(format!("{name} is not found"));
        }
    }
    Ok(())
}

fn stands_in(text: &str, path: &str) -> Result<(), String> {
    let file = std::fs::read_to_string(root().join(path)).map_err(|error| format!("{path}: {error}"))?;
    match text.lines().find(|line| !file.lines().any(|other| other == *line)) {
        Some(line) => Err(format!("{path} has no line {line}")),
        None => Ok(()),
    }
}

/// What a document in YAML says.
pub(crate) fn read_yaml(text: &str) -> Result<serde_json::Value, String> {
    let mut python = Command::new("python3");
    python.args(["-c", "import json, sys, yaml; json.dump(yaml.safe_load(sys.argv[1]), sys.stdout)", text]);
    let output = python.output().map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())
}

fn yaml(text: &str) -> Result<(), String> {
    let value = read_yaml(text)?;
    let target = &value["scrape_configs"][0]["static_configs"][0]["targets"][0];
    let ours = format!("metrics = \"inet:{}\"", target.as_str().unwrap_or_default());
    match read("docs/monitoring.md").contains(&ours) {
        true => Ok(()),
        false => Err(format!("{target} is not where the page has the metrics")),
    }
}

/// There is no parser of Mermaid to be had; this finds a diagram that is none, and parts that are not closed.
fn diagram(text: &str) -> Result<(), String> {
    let kind = text.split_whitespace().next().unwrap_or_default();
    if !["flowchart", "sequenceDiagram", "stateDiagram-v2"].contains(&kind) {
        return Err(format!("no diagram: {kind}"));
    }
    let count = |words: &[&str]| {
        text.lines().filter(|line| line.split_whitespace().next().is_some_and(|w| words.contains(&w))).count()
    };
    let brackets = |open, close| text.matches(open).count() == text.matches(close).count();
    let closed = count(&["subgraph", "alt", "opt", "loop"]) == count(&["end"])
        && text.matches('"').count().is_multiple_of(2)
        && brackets('[', ']')
        && brackets('(', ')')
        && brackets('{', '}');
    if closed { Ok(()) } else { Err("something is not closed".to_owned()) }
}
