//! What usermilter-filter(7) promises to a filter and takes from it: exit status, standard output, environment,
//! and the process that it runs in.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::process::Command;

use common::milter::Answer;
use common::{PATIENCE, Postfix, Sandbox, Site, SystemUser, smtp};

const MESSAGE: &[u8] = b"Subject: x\r\nFrom: s@sender.example\r\n\r\nhello\r\n";
const ALICE: &str = "alice@test.example";

fn alice() -> common::site::SiteBuilder {
    Site::of(&[("alice", 5001)])
}

/// Letter and text of an answer, as `y 550 5.7.1 text`.
fn shown(answer: &Answer) -> String {
    format!("{} {}", answer.letter(), answer.text()).trim_end().to_owned()
}

#[test]
fn a_filter_can_not_pass_for_one_that_was_not_run() {
    use usermilter::monitor::{Refusal, Report, encode};
    // What the monitor's child reports of a filter that is gone, which accepts; and the status it leaves with.
    let forged = encode(&Report::Refusal(Refusal::NoFilter)).unwrap();
    let octal: String = forged.iter().map(|byte| format!("\\{byte:03o}")).collect();
    let site = alice()
        .set("filter", "on-error", "\"defer\"")
        .filter("alice", "message", &format!("#!/bin/sh\nprintf '{octal}'\nexit 126\n"))
        .start();
    assert_eq!(shown(&site.judge(&[ALICE], MESSAGE)).split(' ').nth(2), Some("4.3.0"));
}

#[test]
fn every_exit_status_means_what_the_manual_says() {
    // The status and the text come with the message, so that one daemon serves for all 256.
    let script = "#!/bin/sh\nread -r word status rest\nexit \"$status\"\n";
    let accept = "c";
    let (reject, defer, trouble) = ("y 550 5.7.1", "y 451 4.7.1", "y 451 4.3.0");
    let outcome = |site: &Site, status: i32| {
        let message = format!("Status: {status}\r\n\r\n");
        shown(&site.judge(&[ALICE], message.as_bytes()))
    };
    let documented: BTreeMap<i32, &str> = [77, 65, 67, 68, 69, 76, 100]
        .map(|status| (status, reject))
        .into_iter()
        .chain([75, 71, 111].map(|status| (status, defer)))
        .chain([0, 99].map(|status| (status, accept)))
        .collect();
    for (on_error, error) in [("accept", accept), ("defer", trouble)] {
        let site = alice()
            .set("filter", "on-error", &format!("\"{on_error}\""))
            .set("filter", "trace-headers", "false")
            .filter("alice", "message", script)
            .start();
        let others = [1, 2, 3, 64, 66, 70, 72, 73, 74, 78, 79, 98, 101, 112, 126, 127, 128, 137, 255];
        let all: Vec<i32> = documented.keys().copied().chain(others).collect();
        for status in all {
            let expected = documented.get(&status).copied().unwrap_or(error);
            let got = outcome(&site, status);
            let got = if got == "a" { "c" } else { got.as_str() };
            assert!(got.starts_with(expected), "exit {status}, on-error {on_error}: {got}");
        }
    }
}

#[test]
fn exit_statuses_can_be_overridden_for_filters_of_other_systems() {
    let site = alice()
        .set("filter", "exit-status", r#"{ 1 = "reject", 77 = "accept", 0 = "defer" }"#)
        .set("filter", "trace-headers", "false")
        .filter("alice", "message", "#!/bin/sh\nread -r word status rest\nexit \"$status\"\n")
        .start();
    for (status, letter) in [(1, "y 550"), (77, "a"), (0, "y 451"), (2, "a"), (65, "y 550")] {
        let message = format!("Status: {status}\r\n\r\n");
        let got = shown(&site.judge(&[ALICE], message.as_bytes()));
        assert!(got.starts_with(letter), "{status}: {got}");
    }
}

#[test]
fn what_a_filter_prints_is_what_the_smtp_client_reads() {
    let site = alice()
        .filter("alice", "message", "#!/bin/sh\nstatus=$(cat ~/status)\ncat ~/reply\nexit \"$status\"\n")
        .start();
    let postfix = Postfix::builder().milter(site.milter_address()).start();
    let mut client = smtp::Client::connect_as(postfix.port(), "192.0.2.10", "mx.sender.example");
    let mut ask = |status: i32, reply: &[u8], parameters: &str| {
        let home = &site.users.account("alice").home;
        fs::write(home.join("status"), format!("{status}\n")).unwrap();
        fs::write(home.join("reply"), reply).unwrap();
        assert_eq!(client.mail_from("s@sender.example", parameters).code, 250);
        assert_eq!(client.rcpt_to(ALICE).code, 250, "{}", client.transcript());
        let reply = client.data(MESSAGE);
        format!("{} {}", reply.code, reply.text())
    };
    for (status, printed, expected) in [
        (77, &b"554 5.6.0 no thanks\n"[..], "554 5.6.0 no thanks"),
        (77, b"5.6.0 no thanks", "550 5.6.0 no thanks"),
        (77, b"no thanks", "550 5.7.1 no thanks"),
        (77, b"554 no thanks", "554 5.7.1 no thanks"),
        (77, b"554 5.6.0\n", "554 5.6.0 message refused by the recipient"),
        (75, b"452 4.2.2 full", "452 4.2.2 full"),
        // A code of another class never turns one verdict into another.
        (77, b"451 4.7.1 later", "550 5.7.1 later"),
        (77, b"250 2.0.0 fine", "550 5.7.1 fine"),
        (75, b"550 5.7.1 never", "451 4.7.1 never"),
        (77, b"550 4.7.1 mixed", "550 5.7.1 mixed"),
        // These two would close the connection.
        (77, b"521 5.3.2 go away", "550 5.3.2 go away"),
        (75, b"421 4.3.2 go away", "451 4.3.2 go away"),
        (77, b"one\ntwo\r\n\nfour\n\n", "550 5.7.1 one\n5.7.1 two\n5.7.1 \n5.7.1 four"),
        (77, b"100% sure, 50%s %d %% %\n", "550 5.7.1 100% sure, 50%s %d %% %"),
        (77, b"a\tb\x07c\x1b[31m\x00d\x7f\rQUIT\r250 ok\n", "550 5.7.1 a b?c?[31m?d??QUIT?250 ok"),
        (77, "böse \u{202e}".as_bytes(), "550 5.7.1 b?se ?"),
        (77, b"latin-1 \xe9", "550 5.7.1 latin-1 ?"),
        (0, b"550 5.7.1 accepted all the same", "250"),
        (99, b"550 5.7.1 accepted all the same", "250"),
        (1, b"550 5.7.1 broken scripts cost no mail", "250"),
    ] {
        let got = ask(status, printed, "");
        let exact = expected != "250";
        assert!(if exact { got == expected } else { got.starts_with(expected) }, "{got:?} not {expected:?}");
    }
    assert_eq!(ask(77, "böse".as_bytes(), "SMTPUTF8"), "550 5.7.1 böse");

    let many: String = (1..=40).map(|n| format!("line {n}\n")).collect();
    let lines: Vec<String> = ask(77, many.as_bytes(), "").lines().map(str::to_owned).collect();
    assert_eq!((lines.len(), lines[31].as_str()), (32, "5.7.1 line 32"));

    // Whole up to what libmilter takes, which counts a percent sign twice; the rest is cut.
    let full = "abcdefghi ".repeat(90);
    assert_eq!(ask(77, full.as_bytes(), ""), format!("550 5.7.1 {}", full.trim_end()));
    let long = ask(77, "%x".repeat(2000).as_bytes(), "");
    assert_eq!(long, format!("550 5.7.1 {}", "%x".repeat(320)));
    let endless = ask(77, "spam ".repeat(100_000).as_bytes(), "");
    assert!(endless.starts_with("550 5.7.1 spam spam"), "{endless}");
    postfix.wait_queue_empty();
}

/// What the filter found in /proc about itself: files of its home, written by [`PROBE`].
const PROBE: &str = "#!/bin/sh
umask > ~/umask
pwd > ~/pwd
ulimit -a > ~/ulimit
echo \"$0\" > ~/zero
tr '\\0' '\\n' < /proc/$$/cmdline > ~/cmdline
cat /proc/$$/environ > ~/environ
cat /proc/self/status > ~/status
cat /proc/$$/stat > ~/stat
cat /proc/$$/limits > ~/limits
ls -l /proc/$$/fd > ~/fd
id -u > ~/uid; id -g > ~/gid; id -G > ~/groups
cat > ~/message
: > ~/done
";

fn environment(site: &Site, user: &str) -> BTreeMap<String, String> {
    parse_environment(&site.home_file(user, "environ"))
}

fn parse_environment(bytes: &[u8]) -> BTreeMap<String, String> {
    let pairs = bytes.split(|&b| b == 0).filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let text = String::from_utf8_lossy(pair).into_owned();
            let (name, value) = text.split_once('=').unwrap();
            (name.to_owned(), value.to_owned())
        })
        .collect()
}

#[test]
fn the_environment_holds_the_documented_variables_and_no_others() {
    let site = alice().filter("alice", "message", PROBE).start();
    let mut mta = site.mta();
    mta.macros('M', &[common::site::MAIL_MACROS, &[("i", "4ABC"), ("{tls_version}", "TLSv1.3")]].concat());
    mta.mail(&["<Sender@Sender.Example>", "SIZE=1000", "SMTPUTF8"]);
    for recipient in ["<Alice+Shop@Test.Example>", "<alice@test.example>"] {
        assert_eq!(mta.rcpt(&[recipient]).letter(), 'c');
    }
    common::site::send_message(&mut mta, MESSAGE);
    let home = site.users.account("alice").home.display().to_string();
    let size = site.home_file("alice", "message").len().to_string();
    let mut expected: BTreeMap<String, String> = [
        ("HOME", home.as_str()),
        ("USER", "alice"),
        ("LOGNAME", "alice"),
        ("SHELL", "/bin/sh"),
        ("SENDER", "Sender@sender.example"),
        ("RECIPIENT", "Alice+Shop@test.example"),
        ("ORIGINAL_RECIPIENT", "Alice+Shop@Test.Example"),
        ("LOCAL", "Alice+Shop"),
        ("EXTENSION", "shop"),
        ("DOMAIN", "test.example"),
        ("CLIENT_ADDRESS", "192.0.2.10"),
        ("CLIENT_HOSTNAME", "mx.sender.example"),
        ("CLIENT_HELO", "mx.sender.example"),
        ("CLIENT_PROTOCOL", "ESMTP"),
        ("SASL_USERNAME", ""),
        ("SASL_METHOD", ""),
        ("SASL_SENDER", ""),
        ("USERMILTER_PHASE", "message"),
        ("USERMILTER_QUEUE_ID", "4ABC"),
        ("USERMILTER_RECIPIENTS", "Alice+Shop@test.example\nalice@test.example"),
        ("USERMILTER_SIZE", size.as_str()),
        ("USERMILTER_DEADLINE", "60"),
        ("USERMILTER_SMTPUTF8", "1"),
        ("USERMILTER_TLS", "TLSv1.3"),
        ("USERMILTER_VERSION", env!("CARGO_PKG_VERSION")),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    let mut got = environment(&site, "alice");
    assert!(got.remove("PATH").is_some_and(|path| path.contains("/usr/bin")));
    // Postfix passes extensions as they are; usermilter may fold their case.
    let extension = got.insert("EXTENSION".into(), "shop".into()).unwrap();
    assert_eq!(extension.to_lowercase(), "shop");
    expected.remove("PATH");
    assert_eq!(got, expected);
}

#[test]
fn an_authenticated_sender_is_named_and_the_null_sender_is_set_and_empty() {
    let site =
        alice().set("recipients", "judge-authenticated", "true").filter("alice", "message", PROBE).start();
    let mut mta = site.mta();
    let sasl = [("{auth_type}", "PLAIN"), ("{auth_authen}", "anna"), ("{auth_author}", "anna@x.example")];
    mta.macros('M', &[common::site::MAIL_MACROS, &sasl].concat());
    mta.mail(&["<>"]);
    assert_eq!(mta.rcpt(&["<alice@test.example>"]).letter(), 'c');
    common::site::send_message(&mut mta, MESSAGE);
    let got = environment(&site, "alice");
    for (name, value) in [
        ("SENDER", ""),
        ("SASL_METHOD", "PLAIN"),
        ("SASL_USERNAME", "anna"),
        ("SASL_SENDER", "anna@x.example"),
        ("EXTENSION", ""),
        ("LOCAL", "alice"),
    ] {
        assert_eq!(got.get(name).map(String::as_str), Some(value), "{name}");
    }
}

#[test]
fn hostile_values_reach_the_filter_as_data_or_not_at_all() {
    let site = alice().filter("alice", "message", PROBE).start();
    let huge = "h".repeat(60 * 1024);
    for (helo, expected) in [
        (
            "`touch ~/owned` $(touch ~/owned) '\"; touch ~/owned #",
            Some("`touch ~/owned` $(touch ~/owned) '\"; touch ~/owned #"),
        ),
        ("%s%n%x", Some("%s%n%x")),
        ("() { :; }; touch ~/owned", Some("() { :; }; touch ~/owned")),
        (huge.as_str(), Some(huge.as_str())),
        ("a\nPATH=/evil", None),
        ("a\rb", None),
        ("-e", Some("-e")),
    ] {
        let seen = site.daemon.log_lines().len();
        let mut mta = site.mta();
        mta.helo(helo);
        let answer = common::site::send(&mut mta, "<\"a b'$(x)\"@sender.example>", &[ALICE], MESSAGE);
        assert_eq!(answer.letter(), 'a');
        let got = environment(&site, "alice");
        assert_eq!(got.get("CLIENT_HELO").map(String::as_str), expected);
        assert_eq!(got["SENDER"], "\"a b'$(x)\"@sender.example");
        assert_eq!(got.len(), if expected.is_some() { 26 } else { 25 }, "{:?}", got.keys());
        if expected.is_none() {
            site.daemon.wait_for_log_after(seen, "CLIENT_HELO dropped", PATIENCE);
        }
    }
    assert!(!site.users.account("alice").home.join("owned").exists());
    // No line of the log is the client's.
    assert!(!site.daemon.log_lines().iter().any(|line| line.starts_with("PATH=")));
}

#[test]
fn a_filter_runs_by_its_real_path_in_its_home_with_default_everything() {
    let site = alice().start();
    let account = site.users.account("alice");
    let real = account.filter("real-program", PROBE);
    symlink("real-program", account.path("message")).unwrap();
    assert_eq!(site.judge(&[ALICE], MESSAGE).letter(), 'a');
    let text = |name: &str| site.home_text("alice", name).trim().to_owned();
    assert_eq!(text("zero"), real.display().to_string());
    assert_eq!(text("cmdline"), format!("/bin/sh\n{}", real.display()));
    assert_eq!(text("pwd"), account.home.display().to_string());
    assert_eq!(text("umask"), "0077");
    assert_eq!((text("uid"), text("gid"), text("groups")), ("5001".into(), "5001".into(), "5001".into()));
    assert_eq!(fs::metadata(account.home.join("message")).unwrap().mode() & 0o777, 0o600);

    let status = text("status");
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_once(':').unwrap().1.trim().to_owned()
    };
    for signals in ["SigBlk", "SigIgn", "SigCgt", "SigPnd"] {
        let mask = u64::from_str_radix(&field(signals), 16).unwrap();
        // The shell itself catches some.
        assert!(mask == 0 || signals == "SigCgt", "{signals} {mask:x}");
    }
    assert_eq!(field("NoNewPrivs"), "1");
    for capabilities in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&field(capabilities), 16).unwrap(), 0, "{capabilities}");
    }
    assert_eq!(field("Uid"), "5001\t5001\t5001\t5001");
    assert_eq!(field("Gid"), "5001\t5001\t5001\t5001");

    // pid (comm) state ppid pgrp session tty
    let stat = text("stat");
    let (pid, rest) = stat.split_once(' ').unwrap();
    let rest: Vec<&str> = rest.rsplit_once(") ").unwrap().1.split(' ').collect();
    assert_eq!((rest[2], rest[3], rest[4]), (pid, pid, "0"), "{stat}");

    let fds = text("fd");
    let numbers: Vec<u32> =
        fds.lines().filter_map(|line| line.split(" -> ").next()?.rsplit(' ').next()?.parse().ok()).collect();
    // 10 and 11 are dash's own: the script, and standard output put aside.
    assert!(numbers.iter().all(|n| matches!(n, 0..=2 | 10 | 11)), "{fds}");
    assert!(fds.contains("0 -> /memfd:message"), "{fds}");
}

#[test]
fn limits_come_from_the_configuration() {
    let site = alice()
        .set("filter", "max-memory", "\"300M\"")
        .set("filter", "max-cpu", "\"7s\"")
        .set("filter", "max-open-files", "33")
        .set("filter", "max-file-size", "\"5M\"")
        .set("filter", "max-user-processes", "44")
        .set("filter", "no-new-privileges", "false")
        .filter("alice", "message", PROBE)
        .start();
    assert_eq!(site.judge(&[ALICE], MESSAGE).letter(), 'a');
    let limits = site.home_text("alice", "limits");
    for (name, value) in [
        ("Max address space", 300 << 20),
        ("Max cpu time", 7),
        ("Max open files", 33),
        ("Max file size", 5 << 20),
        ("Max processes", 44),
        ("Max core file size", 0),
    ] {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        let numbers: Vec<&str> = line[name.len()..].split_whitespace().take(2).collect();
        assert_eq!(numbers, [value.to_string(), value.to_string()], "{line}");
    }
    assert!(site.home_text("alice", "status").contains("NoNewPrivs:\t0"));
}

#[test]
fn the_message_on_standard_input_cannot_be_changed_by_any_of_its_readers() {
    // In memory, and on disk.
    for (limit, tail) in [("\"1M\"", 0), ("\"1K\"", 200_000)] {
        let attack = "#!/bin/sh
head -c 10 > /dev/null
{ echo changed > /dev/stdin; echo changed >> /proc/self/fd/0; truncate -s 0 /proc/self/fd/0; chmod 666 /proc/self/fd/0
  echo changed >&0
  perl -e 'print \"tried\n\"; print \"done\n\" if syswrite(STDIN, \"changed\"); print \"done\n\" if truncate(STDIN, 0);
           print \"done\n\" if chmod(0666, *STDIN); print \"done\n\" if fcntl(STDIN, 1033, 0)'
} > ~/attack 2>&1
cat > ~/rest
";
        let site = Site::of(&[("alice", 5001), ("bob", 5002)])
            .set("filter", "memory-limit", limit)
            .set("filter", "trace-headers", "false")
            .set("filter", "max-processes", "1")
            .filter("alice", "message", &format!("{attack}exit 77\n"))
            .filter("bob", "message", &format!("{attack}exit 77\n"))
            .start();
        let body = format!("{}\r\n", "x".repeat(tail));
        let message = ["Subject: original\r\n\r\n", &body].concat();
        let answer = site.judge(&[ALICE, "bob@test.example"], message.as_bytes());
        assert_eq!(answer.letter(), 'y');
        let whole = message.replace("\r\n", "\n");
        for user in ["alice", "bob"] {
            let attack = site.home_text(user, "attack");
            // Both read it whole, from the start, each behind an offset of its own.
            assert_eq!(site.home_text(user, "rest"), whole[10..], "{user}: {attack}");
            assert!(attack.contains("tried") && !attack.contains("done"), "{attack}");
        }
    }
}

#[test]
fn a_system_users_filter_runs_with_all_groups_of_the_user() {
    let sandbox = Sandbox::new();
    let user = SystemUser::create(&sandbox, "anna");
    let group = format!("{}g", user.name);
    let status = |program: &str, arguments: &[&str]| {
        let status = Command::new(common::require(program)).args(arguments).status().unwrap();
        assert!(status.success(), "{program} {arguments:?}");
    };
    status("groupadd", &[&group]);
    status("usermod", &["-a", "-G", &group, &user.name]);
    user.filter("message", PROBE);
    let site = Site::of(&[]).resolvers("[[resolver]]\ntype = \"passwd\"\n").start();
    let answer = site.judge(&[&format!("{}@test.example", user.name)], MESSAGE);
    status("groupdel", &[&group]);
    assert_eq!(answer.letter(), 'a');
    let text = |name: &str| fs::read_to_string(user.home.join(name)).unwrap().trim().to_owned();
    assert_eq!((text("uid"), text("gid")), (user.uid.to_string(), user.gid.to_string()));
    let groups: Vec<String> = text("groups").split(' ').map(str::to_owned).collect();
    assert_eq!(groups.len(), 2, "{groups:?}");
    assert!(groups.contains(&user.gid.to_string()));
    let environment = parse_environment(&fs::read(user.home.join("environ")).unwrap());
    assert_eq!((&environment["USER"], &environment["LOGNAME"]), (&user.name, &user.name));
}

#[test]
fn standard_error_goes_to_the_log_and_to_nobody_else() {
    let site = alice()
        .filter("alice", "message", "#!/bin/sh\necho 'to the log\x1b' >&2\necho reply\nexit 77\n")
        .start();
    let answer = site.judge(&[ALICE], MESSAGE);
    assert_eq!(shown(&answer), "y 550 5.7.1 reply");
    let line = site.daemon.wait_for_log("to the log", PATIENCE);
    assert!(line.contains("4QUEUEID") && line.contains("alice") && !line.contains('\x1b'), "{line}");
}
