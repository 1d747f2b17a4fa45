//! What documents show of mail and of commands, happens: dialogues with a real Postfix, lines of logs, replies, output.
//! Numbers that differ each time, times and queue ids, may differ; what stands for `…` may be anything.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::blocks::{self, Block, OF_SESSIONS};
use crate::common::smtp::Client;
use crate::common::{self, PATIENCE, Postfix, Sandbox, Site, SystemUser, Usermilter, wait_until};

const ALICE: &str = "alice@example.org";
const SENDER: &str = "billing@sender.example";
const INVOICE: &[u8] = b"Subject: Invoice 4711\n\nPlease pay.\n";

/// Blocks of the documents, each of which has to be looked at.
struct Shown {
    blocks: Vec<Block>,
    seen: BTreeSet<String>,
}

impl Shown {
    fn new() -> Self {
        let blocks = blocks::all().into_iter().filter(|block| OF_SESSIONS.contains(&block.info.as_str()));
        Shown { blocks: blocks.collect(), seen: BTreeSet::new() }
    }

    /// The block of a document that has this behind the fence, and these words in it.
    #[track_caller]
    fn take(&mut self, file: &str, info: &str, words: &str) -> Block {
        let mut found = self
            .blocks
            .iter()
            .filter(|block| block.file == file && block.info == info && block.text.contains(words));
        let block = found.next().unwrap_or_else(|| panic!("{file} has no ```{info} with {words:?}")).clone();
        assert!(found.next().is_none(), "{file} has two ```{info} with {words:?}");
        self.seen.insert(block.place());
        block
    }

    fn all_were_seen(&self) {
        let all: BTreeSet<String> = self.blocks.iter().map(Block::place).collect();
        assert_eq!(self.seen, all, "seen, and there");
    }
}

/// The file that a document's first block has a reader write, between `<<'END'` and `END`.
fn file_to_write(document: &str, file: &str) -> String {
    let blocks = blocks::of(document, &crate::read(document)).unwrap();
    let block = blocks.iter().find(|block| block.info == "sh run" && block.text.contains(file)).expect(file);
    let (_, rest) = block.text.split_once("<<'END'\n").expect(file);
    rest.split_once("END\n").expect(file).0.to_owned()
}

#[test]
fn mail_and_logs_are_as_documents_show_them() {
    let mut shown = Shown::new();
    let site = Site::of(&[("alice", 5001), ("bob", 5002)])
        .set("recipients", "domains", r#"["example.org"]"#)
        .set("recipients", "trusted-networks", r#"["127.0.0.1"]"#)
        .start();
    let postfix = Postfix::builder()
        .mailboxes(&[ALICE, "bob@example.org"])
        .milter(site.milter_address())
        .policy(site.policy_address())
        .start();
    let home = site.users.account("alice").home.display().to_string();
    let logged = |seen: usize, words: &str| {
        site.daemon.wait_for_log_after(seen, words, PATIENCE).replace(&home, "/home/alice")
    };
    let lines = || site.daemon.log_lines().len();

    // README.md: the sample filter, the dialogue, the line of the log.
    let samples = blocks::of("README.md", &crate::read("README.md")).unwrap();
    let sample = samples.into_iter().find(Block::is_sample).expect("a sample filter");
    site.users.filter("alice", "message", &sample.text);
    let seen = lines();
    let dialogue = shown.take("README.md", "text smtp", "DATA");
    assert_eq!(replay(postfix.port(), &dialogue.text), dialogue.text, "{}", dialogue.place());
    check_log(&shown.take("README.md", "text log", "reject"), &logged(seen, "outcome="));

    // docs/postfix.md: a mail that she wants.
    let seen = lines();
    let sent = client(&postfix).send("friend@sender.example", &[ALICE], b"Subject: Lunch\n\nAt one?\n");
    assert_eq!(sent.outcome().code, 250);
    check_log(&shown.take("docs/postfix.md", "text log", "accept"), &logged(seen, "outcome="));

    // docs/writing-filters.md: the first filter, which tells something to a log of her own.
    let filter = file_to_write("docs/writing-filters.md", "message");
    let telling = filter.replacen('\n', "\necho looked at 3 parts >&2\n", 1);
    let path = site.users.filter("alice", "message", &telling);
    let own_log = site.users.file("alice", "log", "");
    let seen = lines();
    let sent = client(&postfix).send(SENDER, &[ALICE], INVOICE);
    let reply = format!("550 {}", sent.outcome().text());
    assert!(crate::read("docs/writing-filters.md").contains(&format!("`{reply}`")), "{reply}");
    check_log(&shown.take("docs/writing-filters.md", "text log", "outcome="), &logged(seen, "outcome="));
    let told = || fs::read_to_string(&own_log).unwrap();
    assert!(wait_until(PATIENCE, || told().lines().count() == 2), "{}", told());
    let block = shown.take("docs/writing-filters.md", "text user-log", "3 parts");
    assert_eq!(plain(&told()), plain(&block.text), "{}", block.place());

    // docs/verdicts.md: two refuse in words of their own.
    site.users.filter("bob", "message", "#!/bin/sh\necho not from there\nexit 77\n");
    let sent = client(&postfix).send(SENDER, &[ALICE, "bob@example.org"], INVOICE);
    let [first, second] = &sent.outcome().lines[..] else { panic!("{sent:?}") };
    let block = shown.take("docs/verdicts.md", "text reply", "alice");
    assert_eq!(format!("550-{first}\n550 {second}\n"), block.text, "{}", block.place());

    // docs/writing-filters.md: a check that fails.
    fs::set_permissions(path.parent().unwrap(), fs::Permissions::from_mode(0o770)).unwrap();
    let seen = lines();
    client(&postfix).send(SENDER, &[ALICE], INVOICE);
    check_log(&shown.take("docs/writing-filters.md", "text log", "not run"), &logged(seen, "not run"));
    fs::set_permissions(path.parent().unwrap(), fs::Permissions::from_mode(0o700)).unwrap();

    // docs/rules.md: the first rules, and some with an error.
    site.users.file("alice", "rules.toml", file_to_write("docs/rules.md", "rules.toml"));
    let dialogue = shown.take("docs/rules.md", "text smtp", "RCPT TO");
    assert_eq!(replay(postfix.port(), &dialogue.text), dialogue.text, "{}", dialogue.place());
    site.users.file("alice", "rules.toml", "\n[[rule]]\nsendr = \"x\"\naction = \"accept\"\n");
    let seen = lines();
    client(&postfix).send(SENDER, &[ALICE], INVOICE);
    check_log(&shown.take("docs/rules.md", "text log", "rules ignored"), &logged(seen, "rules ignored"));

    // docs/splitting.md: alice has a filter, bob has none.
    let split = Site::of(&[("alice", 5001), ("bob", 5002)])
        .set("verdict", "split", r#""always""#)
        .filter("alice", "message", &filter)
        .start();
    let mut mta = split.mta();
    mta.macros('M', common::site::MAIL_MACROS);
    mta.mail(&["<s@sender.example>"]);
    mta.rcpt(&["<alice@test.example>"]);
    let reply = mta.rcpt(&["<bob@test.example>"]).text();
    let block = shown.take("docs/splitting.md", "text reply", "452");
    assert_eq!(reply.trim_end_matches('\0'), block.text.trim_end(), "{}", block.place());

    shown.all_were_seen();
}

fn client(postfix: &Postfix) -> Client {
    Client::connect_as(postfix.port(), "192.0.2.10", "mx.sender.example")
}

/// Says what the client says in a dialogue (`C: `); the dialogue as it is with what the server says (`S: `).
fn replay(port: u16, dialogue: &str) -> String {
    let mut client = Client::connect_as(port, "192.0.2.10", "mx.sender.example");
    let (mut pending, mut actual) = (String::new(), String::new());
    for line in dialogue.lines() {
        if let Some(said) = line.strip_prefix("C:") {
            pending += &format!("{}\r\n", said.strip_prefix(' ').unwrap_or(said));
            actual += &format!("{line}\n");
        } else if !pending.is_empty() {
            client.send_raw(std::mem::take(&mut pending).as_bytes()).unwrap();
            let reply = client.read_reply().unwrap();
            for (index, text) in reply.lines.iter().enumerate() {
                let separator = if index + 1 < reply.lines.len() { '-' } else { ' ' };
                actual += &format!("S: {}{separator}{text}\n", reply.code);
            }
        }
    }
    actual
}

/// All of the block is in the line, in this order.
#[track_caller]
fn check_log(block: &Block, line: &str) {
    let (shown, line) = (plain(block.text.trim_end()), plain(line));
    if !shown.contains('…') && shown.starts_with("INFO") {
        let line = line.split_once("INFO").map_or("", |(_, rest)| rest);
        assert_eq!(format!("INFO{line}"), shown, "{}", block.place());
    }
    let mut rest = line.as_str();
    for part in shown.split('…') {
        let part = part.trim();
        let at = rest.find(part).unwrap_or_else(|| panic!("{}: no {part:?} in {line}", block.place()));
        rest = &rest[at + part.len()..];
    }
}

/// Without what differs each time: times, how long something took, how large it was, queue ids.
fn plain(text: &str) -> String {
    let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | ':' | '-');
    let mut plain = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let end = rest.find(|c| !is_part(c)).unwrap_or(rest.len()).max(first.len_utf8());
        let (word, after) = rest.split_at(end);
        let number = word.strip_suffix('s').unwrap_or(word);
        let is_queue_id = word.trim_end_matches(':').len() > 8
            && word.trim_end_matches(':').chars().all(|c| c.is_ascii_digit() || matches!(c, 'A'..='F'));
        let kind = if is_queue_id {
            "ID"
        } else if word.len() == 20 && word.ends_with('Z') && word.contains('T') {
            "TIME"
        } else if (number.contains('.') && number.parse::<f64>().is_ok()) || plain.ends_with("size=") {
            "N"
        } else {
            word
        };
        plain += kind;
        rest = after;
    }
    plain
}

/// Commands that a reader may follow at once: a section's, in order, by a user in a home that has a mail, and nothing
/// else.
#[test]
fn what_a_reader_is_told_to_run_does_what_is_shown() {
    let sandbox = Sandbox::new();
    let user = SystemUser::create(&sandbox, "reads");
    let bin = sandbox.directory("bin");
    let program = bin.join("usermilter.real");
    fs::copy(Usermilter::program(), &program).unwrap();
    // The domain of the documents; and a verdict is no failure.
    let config = sandbox.write("usermilter.toml", "[recipients]\ndomains = [\"example.org\"]\n");
    let wrapper = format!(
        "#!/bin/sh\ncommand=$1\ncase $command in resolve|try) shift; set -- $command --config {} \"$@\" ;; esac\n\
         {} \"$@\" || case $? in 75|77) ;; *) exit 1 ;; esac\n",
        config.display(),
        program.display()
    );
    let wrapper = sandbox.write("bin/usermilter", wrapper);
    for file in [&program, &wrapper] {
        fs::set_permissions(file, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mine = |text: &str| text.replace("alice", &user.name);
    let shown = |text: &str| {
        let text = text.replace(&user.home.display().to_string(), "/home/alice").replace(&user.name, "alice");
        plain(&text.replace(&format!("uid {}", user.uid), "uid 1001"))
    };

    let (mut section, mut output, mut runs) = (String::new(), String::new(), 0);
    for block in blocks::all() {
        let place = format!("{}#{}", block.file, block.section);
        if place != section {
            section = place;
            fresh_home(&user);
            if block.section == "Debugging" {
                for name in ["message", "message-shop"] {
                    user.filter(name, "#!/bin/sh\nexit 0\n");
                }
            }
        }
        match block.info.as_str() {
            "sh run" => {
                let mut shell = Command::new("/bin/sh");
                shell.args(["-euc", &mine(&block.text)]).current_dir(&user.home).env_clear();
                shell.envs([("HOME", user.home.as_os_str()), ("USER", user.name.as_ref())]);
                shell.env("PATH", format!("{}:/usr/bin:/bin", bin.display()));
                let result = shell.uid(user.uid).gid(user.gid).stdin(Stdio::null()).output().unwrap();
                let errors = String::from_utf8_lossy(&result.stderr);
                assert!(result.status.success() && errors.is_empty(), "{}\n{result:?}", block.place());
                output = String::from_utf8(result.stdout).unwrap();
                runs += 1;
            }
            "text output" => assert_eq!(shown(&output), plain(&block.text), "{}", block.place()),
            _ => (),
        }
    }
    assert!(runs >= 8, "{runs}");
}

/// A home with what the commands read.
fn fresh_home(user: &SystemUser) {
    let _ = fs::remove_dir_all(user.home.join(".usermilter"));
    let write = |path: &Path, text: &str| {
        fs::write(path, text).unwrap();
        chown(path, Some(user.uid), Some(user.gid)).unwrap();
    };
    for name in ["mail", "some-mail"] {
        write(&user.home.join(name), "From: someone@example.com\nSubject: Lunch\n\nAt one?\n");
    }
    write(&user.home.join("members"), "a@example.com, B <b@example.net>\n");
}
