//! The commands that show and prepare: `resolve` step by step, and `init` with its lists.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown};
use std::process::{Command, Output, Stdio};

use common::{Sandbox, Usermilter, VirtualUsers, require_root};
use serde_json::Value;

fn run(command: &mut Command, input: &str) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A command that does not read its input may have ended already.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

#[test]
fn resolve_tells_every_step_from_the_alias_to_the_check_that_fails() {
    require_root();
    let sandbox = Sandbox::new();
    let users = VirtualUsers::new(&sandbox, &[("alice", 5401), ("bob", 5402)]);
    users.filter("alice", "message", "#!/bin/sh\n");
    users.filter("alice", "message-shop", "#!/bin/sh\n");
    let open = users.account("alice").home.join(".usermilter/message-shop");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    users.file("bob", "rules.toml", "colour = 1\n");
    let aliases = sandbox.write("aliases", "# people\nsales: alice+shop,\n    bob\n");
    let config = sandbox.write(
        "usermilter.toml",
        format!(
            "[server]\nuser = \"nobody\"\n[recipients]\ndomains = [\"test.example\"]\naliases = [\"{}\"]\n\
             [[resolver]]\ntype = \"passwd-file\"\npath = \"{}\"\n\
             [filter]\nvirtual-uids = [5401, 5402]\nvirtual-homes = [\"{}\"]\n",
            aliases.display(),
            users.passwd_file().display(),
            users.homes().display(),
        ),
    );
    let resolve = |arguments: &[&str]| {
        let mut command = Command::new(Usermilter::program());
        let output = run(command.arg("resolve").arg("--config").arg(&config).args(arguments), "");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };

    let all: Value =
        serde_json::from_str(&resolve(&["--json", "sales@test.example", "x@other.example"])).unwrap();
    let sales = &all[0];
    assert_eq!(sales["ours"], true);
    assert_eq!(sales["steps"][0]["step"], "alias");
    assert_eq!(sales["steps"][0]["origin"], format!("{}:2", aliases.display()));
    let asked: Vec<&str> =
        sales["steps"].as_array().unwrap().iter().filter_map(|s| s["said"].as_str()).collect();
    assert_eq!(asked, ["not found", "user alice", "user bob"]);
    let (alice, bob) = (&sales["users"][0], &sales["users"][1]);
    assert_eq!((&alice["uid"], &alice["extension"]), (&Value::from(5401), &Value::from("shop")));
    assert_eq!(alice["message_filter"], "message-shop");
    assert!(alice["filters"][1]["problem"].as_str().unwrap().contains("writable by group"), "{alice}");
    assert!(bob["rules_error"].as_str().unwrap().starts_with("rules.toml:1:1: "), "{bob}");
    assert_eq!(all[1]["outcome"], "accepted: x@other.example is not ours");

    let text = resolve(&["sales@test.example", "postmaster@test.example"]);
    for part in
        ["alias      sales@test.example -> alice+shop, bob", "user alice (", "exempt: always accepted"]
    {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let mut command = Command::new(Usermilter::program());
    assert_eq!(run(command.args(["resolve", "no address at all@"]), "").status.code(), Some(64));
}

#[test]
fn a_list_of_members_becomes_rules_that_refuse_everybody_else() {
    require_root();
    let sandbox = Sandbox::new();
    let users = VirtualUsers::new(&sandbox, &[("list", 5403)]);
    let home = &users.account("list").home;
    let members = "Joe Member <Joe@Member.Example>\n# left in May\nann@member.example\njoe@member.example\n";
    let init = || {
        let mut command = Command::new(Usermilter::program());
        run(command.args(["init", "--template", "allow-list"]).env("HOME", home), members)
    };
    assert!(init().status.success());
    let senders = fs::read_to_string(home.join(".usermilter/senders.txt")).unwrap();
    let addresses: Vec<&str> = senders.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(addresses, ["ann@member.example", "joe@member.example"]);
    assert_eq!(init().status.code(), Some(73), "what is there is not overwritten");

    for path in [".usermilter", ".usermilter/rules.toml", ".usermilter/senders.txt"] {
        chown(home.join(path), Some(5403), Some(5403)).unwrap();
    }
    let config = sandbox.write(
        "usermilter.toml",
        format!(
            "[server]\nuser = \"nobody\"\n[recipients]\ndomains = [\"test.example\"]\n\
             [[resolver]]\ntype = \"passwd-file\"\npath = \"{}\"\n\
             [filter]\nvirtual-uids = [5403, 5403]\nvirtual-homes = [\"{}\"]\n",
            users.passwd_file().display(),
            users.homes().display(),
        ),
    );
    for (sender, status) in [("JOE@member.example", 0), ("stranger@sender.example", 77), ("", 0)] {
        let mut command = Command::new(Usermilter::program());
        command.args(["try", "--phase", "recipient", "--user", "list", "--sender", sender]);
        let output = run(command.arg("--config").arg(&config), "");
        assert_eq!(output.status.code(), Some(status), "{sender}: {output:?}");
    }
}
