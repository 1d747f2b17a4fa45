//! Who an address is: system users, a passwd-file that changes under way, sources in their order; and that a source that
//! can't be asked is never taken for one that says no.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use common::site::{MAIL_MACROS, SiteBuilder, send_message};
use common::{PATIENCE, Postfix, Sandbox, Site, SystemUser, Usermilter, VirtualUsers, smtp, wait_until};

const MESSAGE: &[u8] = b"Subject: x\r\n\r\nhello\r\n";

/// Says who was asked.
const WHO: &str = "#!/bin/sh\necho \"$USER ext=$EXTENSION\"\nexit 77\n";

fn who(site: &Site, address: &str) -> String {
    let answer = site.judge(&[address], MESSAGE);
    let text = answer.text();
    text.strip_prefix("550 5.7.1 ").unwrap_or(if text.is_empty() { "accepted" } else { &text }).to_owned()
}

fn passwd_file(site: &SiteBuilder) -> String {
    format!("[[resolver]]\ntype = \"passwd-file\"\npath = \"{}\"\n", site.users.passwd_file().display())
}

const PASSWD: &str = "[[resolver]]\ntype = \"passwd\"\n";

#[test]
fn system_users_are_found_through_nss_and_system_accounts_are_not_judged() {
    let sandbox = Sandbox::new();
    let user = SystemUser::create(&sandbox, "anna");
    user.filter("message", WHO);
    let site = Site::of(&[]).resolvers(PASSWD).set("recipients", "unknown", "\"reject\"").start();
    let name = &user.name;
    for local in [name.clone(), name.to_uppercase(), format!("{name}+shop"), format!("\"{name}\"")] {
        let extension = if local.contains('+') { "shop" } else { "" };
        let expected = format!("{name} ext={extension}").trim().to_owned();
        assert_eq!(who(&site, &format!("{local}@test.example")), expected, "{local}");
    }
    for accepted in ["root", "daemon", "nobody+x"] {
        // nobody is above min-uid, and has nothing.
        assert_eq!(who(&site, &format!("{accepted}@test.example")), "accepted", "{accepted}");
    }
    for unknown in ["no-such-user", "+", "-x", "a b", "x:y", "../root", "%s"] {
        let address = format!("\"{unknown}\"@test.example");
        assert!(
            who(&site, &address).starts_with("550 5.1.1") || who(&site, &address) == "no such user here",
            "{address}"
        );
    }
    assert_eq!(who(&site, &format!("{name}@elsewhere.example")), "accepted");
}

#[test]
fn a_system_users_mail_is_judged_with_postfix_delivering_locally() {
    let sandbox = Sandbox::new();
    let (anna, ben) = (SystemUser::create(&sandbox, "anna"), SystemUser::create(&sandbox, "ben"));
    anna.filter("message", WHO);
    // The domain is not ours by configuration; the MTA says that it delivers locally.
    let site = Site::of(&[]).resolvers(PASSWD).set("recipients", "domains", "[]").start();
    let postfix = Postfix::builder().local_domain("local.example").milter(site.milter_address()).start();
    let mut client = smtp::Client::connect_as(postfix.port(), "192.0.2.10", "mx.sender.example");
    let address = |user: &SystemUser| format!("{}@local.example", user.name);
    let sent = client.send("s@sender.example", &[&address(&anna)], MESSAGE);
    assert_eq!(sent.outcome().text(), format!("5.7.1 {} ext=", anna.name), "{}", client.transcript());
    let sent = client.send("s@sender.example", &[&address(&anna), &address(&ben)], MESSAGE);
    assert_eq!(sent.outcome().code, 250);
    postfix.wait_delivered(&anna.name, 1, PATIENCE);
    postfix.wait_delivered(&ben.name, 1, PATIENCE);
}

#[test]
fn a_passwd_file_that_changes_is_read_again_within_seconds() {
    let mut builder = Site::of(&[("alice", 5001)])
        .set("recipients", "unknown", "\"reject\"")
        .filter("alice", "message", WHO);
    builder.users.add("bob", 5002, 5002);
    let builder = builder.filter("bob", "message", WHO);
    let file = builder.users.passwd_file().to_owned();
    let both = fs::read_to_string(&file).unwrap();
    let alice: String = both.lines().take(1).map(|line| format!("{line}\n")).collect();
    fs::write(&file, &alice).unwrap();
    let site = builder.start();
    let unknown = "550 5.1.1 no such user here";
    let soon = |address: &str, expected: &str| {
        let started = Instant::now();
        let seen = wait_until(Duration::from_secs(8), || who(&site, address) == expected);
        assert!(seen, "{address} is not {expected} but {}", who(&site, address));
        // Promised are about two seconds; this machine may be busy.
        assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
    };
    assert_eq!(who(&site, "alice@test.example"), "alice ext=");
    assert_eq!(who(&site, "bob@test.example"), unknown);
    // Written in place, and renamed over.
    fs::write(&file, &both).unwrap();
    soon("bob@test.example", "bob ext=");
    let next = site.sandbox.write("next", &alice);
    fs::rename(next, &file).unwrap();
    soon("bob@test.example", unknown);
    assert_eq!(who(&site, "alice@test.example"), "alice ext=");
    // Gone or spoiled: what was read last serves.
    fs::remove_file(&file).unwrap();
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(who(&site, "alice@test.example"), "alice ext=");
    assert_eq!(who(&site, "bob@test.example"), unknown);
}

#[test]
fn a_source_that_was_never_readable_is_our_trouble_and_not_an_unknown_user() {
    for (on_error, expected) in
        [("accept", "accepted"), ("defer", "451 4.3.0 cannot decide right now, try again later")]
    {
        let builder = Site::of(&[("alice", 5001)]).filter("alice", "message", WHO);
        let file = builder.users.passwd_file().to_owned();
        let text = fs::read(&file).unwrap();
        // The worker is nobody, who can't read it.
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        let resolver = passwd_file(&builder);
        let site = builder
            .resolvers(resolver)
            .set("recipients", "unknown", "\"reject\"")
            .set("filter", "on-error", &format!("\"{on_error}\""))
            .start();
        for address in ["alice@test.example", "nobody-here@test.example"] {
            assert_eq!(who(&site, address), expected, "{address}");
        }
        let line = site.daemon.wait_for_log("passwd-file", PATIENCE);
        assert!(line.contains("ermission denied"), "{line}");
        assert_eq!(who(&site, "postmaster@test.example"), "accepted");
        assert_eq!(who(&site, "alice@elsewhere.example"), "accepted");
        // As soon as it can be read, it is asked.
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(wait_until(Duration::from_secs(8), || who(&site, "alice@test.example") == "alice ext="));
        assert_eq!(who(&site, "nobody-here@test.example"), "550 5.1.1 no such user here");
    }
}

/// Writes a file in place: a line of no interest every 20 ms until it is told to stop, and then the text.
fn write_slowly(path: &Path, text: String) -> impl FnOnce() {
    let mut file = File::create(path).unwrap();
    let (stop, stopped) = mpsc::channel::<()>();
    let writer = thread::spawn(move || {
        while stopped.recv_timeout(Duration::from_millis(20)) == Err(mpsc::RecvTimeoutError::Timeout) {
            file.write_all(b"# more ").unwrap();
        }
        file.write_all(format!("\n{text}").as_bytes()).unwrap();
    });
    move || {
        drop(stop);
        writer.join().unwrap();
    }
}

#[test]
fn a_file_that_is_being_written_when_a_worker_starts_makes_nobody_unknown() {
    let builder = Site::of(&[("alice", 5001)])
        .set("recipients", "unknown", "\"reject\"")
        .filter("alice", "message", WHO);
    let file = builder.users.passwd_file().to_owned();
    let text = fs::read_to_string(&file).unwrap();
    // For longer than anybody waits.
    let finish = write_slowly(&file, text.clone());
    let mut site = builder.start();
    for _ in 0..20 {
        assert_eq!(who(&site, "alice@test.example"), "accepted");
    }
    site.daemon.wait_for_log("users: being written", PATIENCE);
    finish();
    assert!(wait_until(PATIENCE, || who(&site, "alice@test.example") == "alice ext="));
    assert_eq!(who(&site, "nobody-here@test.example"), "550 5.1.1 no such user here");

    // For a moment: who serves goes on with what it has, until the next has read all.
    let finish = write_slowly(&file, text);
    let seen = site.daemon.log_lines().len();
    site.daemon.signal(nix::sys::signal::Signal::SIGHUP);
    let until = Instant::now() + Duration::from_secs(1);
    while Instant::now() < until {
        assert_eq!(who(&site, "alice@test.example"), "alice ext=");
    }
    finish();
    site.daemon.wait_for_log_after(seen, " ready ", PATIENCE);
    assert_eq!(who(&site, "alice@test.example"), "alice ext=");
    assert_eq!(who(&site, "nobody-here@test.example"), "550 5.1.1 no such user here");
}

/// A user database that hangs says as little about server.user as one that does not know it any more.
#[test]
fn who_the_worker_is_is_asked_once_and_not_for_every_file_and_worker() {
    let builder = Site::of(&[("alice", 5001)]).filter("alice", "message", WHO);
    let file = builder.users.passwd_file().to_owned();
    let resolver = passwd_file(&builder);
    let builder = builder.resolvers(resolver).set("recipients", "unknown", "\"reject\"").set(
        "server",
        "user",
        "\"umt-worker\"",
    );
    // Seen only in a mount namespace of the daemon's own, and changed in place.
    let system = fs::read_to_string("/etc/passwd").unwrap();
    let passwd = builder.sandbox.write("passwd", format!("{system}umt-worker:x:65533:65533::/:/bin/false\n"));
    let script = "mount --bind \"$0\" /etc/passwd && exec \"$@\"";
    let wrapper = ["unshare", "-m", "/bin/sh", "-c", script, passwd.to_str().unwrap()].map(str::to_owned);
    let site = builder.start_under(&wrapper);
    let worker = site.daemon.worker_pid();
    assert_eq!(who(&site, "alice@test.example"), "alice ext=");
    fs::write(&passwd, &system).unwrap();

    fs::write(&file, "# nobody\n").unwrap();
    let unknown = || who(&site, "alice@test.example") == "550 5.1.1 no such user here";
    assert!(wait_until(PATIENCE, unknown), "{}", who(&site, "alice@test.example"));
    let seen = site.daemon.log_lines().len();
    let worker = nix::unistd::Pid::from_raw(worker.cast_signed());
    nix::sys::signal::kill(worker, nix::sys::signal::Signal::SIGKILL).unwrap();
    site.daemon.wait_for_log_after(seen, " ready ", PATIENCE);
    assert!(unknown());
}

#[test]
fn the_first_resolver_that_knows_the_user_wins_and_one_in_trouble_is_not_passed_over() {
    let sandbox = Sandbox::new();
    let user = SystemUser::create(&sandbox, "anna");
    user.filter("message", "#!/bin/sh\necho system\nexit 77\n");
    let address = format!("{}@test.example", user.name);
    for (order, expected) in [
        (["file", "passwd"], "virtual"),
        (["passwd", "file"], "system"),
        (["missing", "passwd"], "451 4.3.0 cannot decide right now, try again later"),
    ] {
        let mut builder = Site::of(&[]);
        builder.users.add(&user.name, 5001, 5001);
        let builder = builder.filter(&user.name, "message", "#!/bin/sh\necho virtual\nexit 77\n");
        let text = |name: &&str| match *name {
            "passwd" => PASSWD.to_owned(),
            "file" => passwd_file(&builder),
            _ => "[[resolver]]\ntype = \"passwd-file\"\npath = \"/nonexistent/users\"\n".to_owned(),
        };
        let resolvers: String = order.iter().map(text).collect();
        let site = builder.resolvers(resolvers).set("filter", "on-error", "\"defer\"").start();
        assert_eq!(who(&site, &address), expected, "{order:?}");
    }
}

#[test]
fn the_whole_local_part_is_tried_before_what_stands_in_front_of_a_delimiter() {
    let sandbox_users: &[(&str, u32)] =
        &[("alice", 5001), ("alice+work", 5002), ("al", 5003), ("bob@test.example", 5004), ("bob", 5005)];
    for (delimiters, address, expected) in [
        ("+", "alice@test.example", "alice ext="),
        ("+", "alice+shop@test.example", "alice ext=shop"),
        ("+", "Alice+Work@test.example", "alice+work ext="),
        ("+", "alice+work+x@test.example", "alice ext=work+x"),
        ("+", "al-ice@test.example", "accepted"),
        ("+-", "al-ice@test.example", "al ext=ice"),
        ("-", "alice+shop@test.example", "accepted"),
        ("", "alice+shop@test.example", "accepted"),
        ("+", "+alice@test.example", "accepted"),
        ("+", "bob@test.example", "bob@test.example ext="),
        ("+", "bob@other.example", "bob ext="),
        ("+", "bob+x@test.example", "bob@test.example ext=x"),
        ("+", "bob", "bob ext="),
    ] {
        let mut builder = Site::of(sandbox_users)
            .set("recipients", "delimiters", &format!("\"{delimiters}\""))
            .set("recipients", "domains", r#"["test.example", "other.example"]"#);
        for (user, _) in sandbox_users {
            builder = builder.filter(user, "message", WHO);
        }
        let site = builder.start();
        assert_eq!(who(&site, address), expected, "{address} with {delimiters:?}");
    }
}

#[test]
fn domains_are_compared_as_a_labels_and_sendmails_mailbox_is_believed() {
    let builder = Site::of(&[("alice", 5001)]).filter("alice", "message", WHO);
    let site = builder.set("recipients", "domains", r#"["bücher.example", "Test.Example"]"#).start();
    for (address, expected) in [
        ("alice@xn--bcher-kva.example", "alice ext="),
        ("alice@BÜCHER.example", "alice ext="),
        ("alice@TEST.EXAMPLE", "alice ext="),
        ("alice@sub.test.example", "accepted"),
        ("alice@[192.0.2.1]", "accepted"),
    ] {
        assert_eq!(who(&site, address), expected, "{address}");
    }
    // Sendmail: virtusertable made alice of info@elsewhere.
    let mut mta = site.mta();
    mta.macros('M', MAIL_MACROS);
    mta.mail(&["<s@sender.example>"]);
    mta.macros('R', &[("{rcpt_mailer}", "local"), ("{rcpt_host}", ""), ("{rcpt_addr}", "alice")]);
    assert_eq!(mta.rcpt(&["<info@elsewhere.example>"]).letter(), 'c');
    assert_eq!(send_message(&mut mta, MESSAGE).text(), "550 5.7.1 alice ext=");
    // Another mailer's word makes nothing ours.
    mta.macros('M', MAIL_MACROS);
    mta.mail(&["<s@sender.example>"]);
    mta.macros('R', &[("{rcpt_mailer}", "esmtp"), ("{rcpt_addr}", "alice@elsewhere.example")]);
    assert_eq!(mta.rcpt(&["<alice@elsewhere.example>"]).letter(), 'c');
    assert_eq!(mta.data().letter(), 'a');
}

#[test]
fn a_line_that_names_no_possible_user_costs_only_that_user() {
    let builder = Site::of(&[("alice", 5001)]).filter("alice", "message", WHO);
    let file = builder.users.passwd_file().to_owned();
    let good = fs::read_to_string(&file).unwrap();
    let home = builder.users.homes().display().to_string();
    let bad =
        ["-dash", ".dot", "+plus", "john doe"].map(|name| format!("{name}:x:5002:5002::{home}/x:/bin/sh\n"));
    fs::write(&file, bad.concat() + &good).unwrap();
    let site = builder.set("filter", "on-error", "\"defer\"").start();
    assert_eq!(who(&site, "alice@test.example"), "alice ext=");
    for name in ["-dash", ".dot", "+plus", "john doe"] {
        // There is no such user: the mail is not put off for ever.
        assert_eq!(who(&site, &format!("\"{name}\"@test.example")), "accepted", "{name}");
        site.daemon.wait_for_log(name, PATIENCE);
    }
}

#[test]
fn without_user_try_means_the_invoking_one_and_nobody_is_no_user() {
    let sandbox = Sandbox::new();
    let users = VirtualUsers::new(&sandbox, &[("alice", 5001)]);
    users.filter("alice", "message", WHO);
    let config = format!(
        "[server]\nuser = \"nobody\"\n[filter]\nvirtual-homes = [\"{}\"]\n[[resolver]]\ntype = \"passwd-file\"\npath = \"{}\"\n",
        users.homes().display(),
        users.passwd_file().display()
    );
    let config = sandbox.write("usermilter.toml", config);
    let run = |arguments: &[&str]| {
        let mut command = Command::new(Usermilter::program());
        command.arg("try").arg("--config").arg(&config).args(arguments).stdin(Stdio::null());
        let output = command.output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&text).into_owned())
    };
    let (status, text) = run(&["--user", "alice"]);
    assert_eq!(status, Some(77), "{text}");
    let (status, text) = run(&["--user", "no-such-user"]);
    assert_eq!(status, Some(64), "{text}");
    // Not the worker's user, who would accept: root asks, and no filter runs as root.
    let (status, text) = run(&["--recipient", "alice@test.example"]);
    assert_eq!(status, Some(70), "{text}");
    assert!(text.contains("user root"), "{text}");
}
