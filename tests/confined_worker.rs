//! What a confined worker goes on doing, by what ways it has left: files that change, NSS, directories by name, and what
//! the monitor leaves to filters. What it can't do any more is in tests/confinement.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;
#[path = "slapd/mod.rs"]
#[allow(dead_code, reason = "others use the rest")]
mod slapd;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::time::Duration;

use common::policy::{Client, Request};
use common::{PATIENCE, Sandbox, Site, SystemUser, wait_until};
use slapd::{Authority, DAEMON, DAEMON_PASSWORD, PEOPLE, Setup, Slapd};

const WHO: &str = "#!/bin/sh\necho \"$USER\"\nexit 77\n";
const MESSAGE: &[u8] = b"Subject: x\r\n\r\nhello\r\n";

fn who(site: &Site, address: &str) -> String {
    let text = site.judge(&[address], MESSAGE).text();
    text.strip_prefix("550 5.7.1 ").unwrap_or(if text.is_empty() { "accepted" } else { &text }).to_owned()
}

#[track_caller]
fn wait_for(site: &Site, address: &str, expected: &str) {
    assert!(wait_until(PATIENCE, || who(site, address) == expected), "{address}: {}", who(site, address));
}

fn status(pid: u32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {field}: {text}")).trim().to_owned()
}

#[test]
fn the_worker_has_no_capability_no_way_to_one_and_a_filter_for_its_calls() {
    let site = Site::of(&[]).start();
    let worker = site.daemon.worker_pid();
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&status(worker, set), 16).unwrap(), 0, "{set}");
    }
    assert_eq!((status(worker, "NoNewPrivs"), status(worker, "Seccomp")), ("1".into(), "2".into()));
    // One line says how far it went: here, all the way.
    let confined: Vec<_> =
        site.daemon.log_lines().into_iter().filter(|line| line.contains("worker confined")).collect();
    assert_eq!(confined.len(), 1, "{confined:?}");
    assert!(confined[0].contains(" INFO ") && confined[0].contains("ABI"), "{confined:?}");
}

/// valgrind knows neither Landlock nor seccomp(2), and answers for the kernel that there is no such call.
#[test]
fn a_kernel_that_can_confine_nothing_is_told_of_and_served() {
    let builder = Site::of(&[("alice", 5001)]);
    builder.users.file("alice", "rules.toml", "default = \"reject\"\n");
    let site = builder.start_under(&["valgrind".into(), "--quiet".into(), "--tool=none".into()]);
    let line = site.daemon.wait_for_log("worker confined as far as this kernel can", PATIENCE);
    assert!(line.contains(" WARN "), "{line}");
    assert_eq!(status(site.daemon.worker_pid(), "Seccomp"), "0");
    assert_eq!(status(site.daemon.worker_pid(), "CapEff"), "0000000000000000");
    assert_eq!(site.judge(&["alice@test.example"], MESSAGE).text().split(' ').next(), Some("550"));
}

#[test]
fn files_that_are_replaced_are_read_again() {
    let builder = Site::of(&[("alice", 5001), ("bob", 5002)])
        .filter("alice", "message", WHO)
        .filter("bob", "message", WHO);
    let sandbox = Sandbox::new();
    let replace = |path: &Path, text: &str| {
        let new = path.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, path).unwrap();
    };
    sandbox.directory("lists");
    sandbox.directory("later");
    let members = sandbox.write("lists/members", "alice\n");
    let aliases_text = |team: &str| format!("team: {team}\nlist: :include:{}\n", members.display());
    let aliases = sandbox.write("aliases", aliases_text("alice"));
    let site = builder.set("recipients", "aliases", &format!("[\"{}\"]", aliases.display())).start();
    assert_eq!(
        (who(&site, "team@test.example"), who(&site, "list@test.example")),
        ("alice".into(), "alice".into())
    );

    replace(&aliases, &aliases_text("bob"));
    wait_for(&site, "team@test.example", "bob");
    replace(&members, "bob\n");
    wait_for(&site, "list@test.example", "bob");
    let users = site.users.passwd_file().to_owned();
    let text = fs::read_to_string(&users).unwrap();
    replace(&users, &text.replace("alice:x", "carol:x"));
    wait_for(&site, "carol@test.example", "carol");
    fs::remove_file(&users).unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(who(&site, "carol@test.example"), "carol", "what was read goes on serving");

    // A list in a directory that had none when the worker began: nobody can be asked, until the next worker.
    let later = sandbox.write("later/members", "bob\n");
    fs::write(&users, &text).unwrap();
    wait_for(&site, "alice@test.example", "alice");
    replace(&aliases, &format!("list: :include:{}\n", later.display()));
    wait_for(&site, "list@test.example", "accepted");
    site.daemon.wait_for_log("Permission denied", PATIENCE);
    let mut site = site;
    site.daemon.reload();
    wait_for(&site, "list@test.example", "bob");
}

#[test]
fn directories_are_reached_by_name_with_tls_by_starttls_and_by_a_local_socket() {
    common::require_root();
    let authority = Authority::new();
    let certificate = authority.valid();
    let entry = format!(
        "dn: uid=zoe,{PEOPLE}\nobjectClass: inetOrgPerson\nuid: zoe\ncn: zoe\nsn: zoe\nmail: zoe@test.example\n\n"
    );
    let slapd = Slapd::start(&Setup { entries: &entry, tls: Some(&certificate), ..Setup::default() });
    let by_name = |uri: String| uri.replace("127.0.0.1", "localhost");
    let ca = format!("ca-file = \"{}\"\n", certificate.authority.display());
    for (uri, more) in [
        (by_name(slapd.ldaps()), ca.clone()),
        (by_name(slapd.ldap()), format!("starttls = true\n{ca}")),
        (slapd.ldapi(), String::new()),
        (slapd.ldap(), String::new()),
    ] {
        let builder = Site::of(&[("zoe", 5001)]).filter("zoe", "message", WHO);
        let resolver = format!(
            "[[resolver]]\ntype = \"ldap\"\nuri = [\"{uri}\"]\nbase = \"{PEOPLE}\"\nfilter = \"(mail=%s)\"\n\
             bind-dn = \"{DAEMON}\"\npassword-file = \"{}\"\n{more}default-uid = 5001\ndefault-gid = 5001\n\
             default-home = \"{}/%u\"\n",
            slapd.password_file(DAEMON_PASSWORD),
            builder.users.homes().display(),
        );
        let site = builder.resolvers(resolver).start();
        assert_eq!(who(&site, "zoe@test.example"), "zoe", "{uri}");
    }
}

#[test]
fn a_name_is_asked_of_the_system_once_and_few_at_a_time() {
    let sandbox = Sandbox::new();
    let user = SystemUser::create(&sandbox, "anna");
    user.filter("message", WHO);
    let site = Site::of(&[])
        .resolvers("[[resolver]]\ntype = \"passwd\"\n")
        .set("recipients", "unknown", "\"reject\"")
        .set("log", "level", "\"debug\"")
        .start();
    let asked = |name: &str| {
        let question = format!("Uid(UserName(\"{name}\"))");
        site.daemon.log_lines().iter().filter(|line| line.contains(&question)).count()
    };
    let refused = |name: &str| {
        let request = Request::rcpt("s@sender.example", &format!("{name}@test.example"));
        assert!(Client::connect(site.policy_address()).ask(&request).starts_with("550 5.1.1"), "{name}");
    };
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| (0..5).for_each(|_| refused("umt-nobody")));
        }
    });
    // Its answer is remembered for 10 s: once, or twice on a machine that took that long.
    assert!((1..=2).contains(&asked("umt-nobody")), "{}", asked("umt-nobody"));

    let children = || {
        let pid = site.daemon.pid();
        let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        text.split_whitespace().count()
    };
    let mut most = 0;
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..40).map(|n| scope.spawn(move || refused(&format!("umt-guess-{n}")))).collect();
        while threads.iter().any(|thread| !thread.is_finished()) {
            most = most.max(children());
        }
    });
    // The worker is one of them.
    assert!((1..=9).contains(&most), "{most} children at a time");
    assert_eq!(asked("umt-guess-7"), 1);
    assert_eq!(who(&site, &format!("{}@test.example", user.name)), user.name);
}

#[test]
fn a_setuid_program_of_a_filter_works_if_allowed_but_never_rules_the_machine() {
    let sandbox = Sandbox::new();
    let secret = sandbox.write("secret", "of root\n");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let program = sandbox.join("cat");
    fs::copy(common::require("cat"), &program).unwrap();
    chown(&program, Some(0), Some(0)).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
    let script = format!(
        "#!/bin/sh\n{cat} {secret} > \"$HOME/got\"\n{cat} /proc/self/status > \"$HOME/status\"\nexit 77\n",
        cat = program.display(),
        secret = secret.display()
    );
    for allowed in [true, false] {
        let site = Site::of(&[("alice", 5001)])
            .filter("alice", "message", &script)
            .set("filter", "no-new-privileges", if allowed { "false" } else { "true" })
            .start();
        assert!(who(&site, "alice@test.example").contains("refused"));
        let got = fs::read_to_string(site.users.account("alice").home.join("got")).unwrap();
        assert_eq!(got, if allowed { "of root\n" } else { "" });
        let status = fs::read_to_string(site.users.account("alice").home.join("status")).unwrap();
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).unwrap();
        let effective = u64::from_str_radix(effective, 16).unwrap();
        assert_eq!(effective != 0, allowed, "{status}");
        for capability in [
            caps::Capability::CAP_SYS_ADMIN,
            caps::Capability::CAP_SYS_MODULE,
            caps::Capability::CAP_SYS_PTRACE,
        ] {
            assert_eq!(effective & capability.bitmask(), 0, "{capability}: {status}");
        }
    }
}
