//! Mail that is not judged, and mail of unusual shape: local submission, authenticated clients, trusted networks, bounces,
//! too large, empty, many recipients, long headers. With both MTAs where they can make it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;

use std::io::{BufReader, Write};
use std::process::{Command, Output, Stdio};

use common::site::SiteBuilder;
use common::smtp::{Client, Reply, Sent};
use common::{PATIENCE, Postfix, Sendmail, Site};

const MESSAGE: &str = "Subject: x\r\nFrom: s@sender.example\r\n\r\nhello\r\n";
const SENDER: &str = "s@sender.example";
const ALICE: &str = "alice@test.example";

/// `\0anna\0secret` in base64.
const ANNA_SECRET: &str = "AGFubmEAc2VjcmV0";

/// `\0anna\0wrong`.
const ANNA_WRONG: &str = "AGFubmEAd3Jvbmc=";

/// Refuses, and remembers what came.
const REFUSE: &str = "#!/bin/sh
printf '%s\\n' \"$USERMILTER_RECIPIENTS\" > ~/recipients
printf '%s\n' \"$SASL_USERNAME,$SASL_METHOD,$SASL_SENDER\" > ~/sasl
cat > ~/message
echo \"no, <$SENDER>\"
exit 77
";

fn refusing() -> SiteBuilder {
    Site::of(&[("alice", 5001)]).filter("alice", "message", REFUSE)
}

fn with_input(command: &mut Command, input: &str) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// One mail over a connection from 127.0.0.1: the code and text of the reply to the message.
fn send(port: u16, message: &str) -> String {
    let mut client = Client::connect(port);
    client.ehlo("mx.sender.example");
    told(&client.send(SENDER, &[ALICE], message.as_bytes()))
}

fn told(sent: &Sent) -> String {
    format!("{} {}", sent.outcome().code, sent.outcome().text())
}

#[test]
fn mail_submitted_on_the_host_is_not_judged() {
    let site = refusing();
    site.users.file("alice", "rules.toml", "[[rule]]\nsender = [\"root@*\"]\naction = \"reject\"\n");
    let site = site.start();
    let postfix = Postfix::builder()
        .milter(site.milter_address())
        .set("non_smtpd_milters", site.milter_address())
        .start();
    let seen = site.daemon.log_lines().len();
    let output = with_input(postfix.command("sendmail").args(["-i", "-f", SENDER, ALICE]), MESSAGE);
    assert!(output.status.success(), "{output:?}");
    postfix.wait_delivered("alice", 1, PATIENCE);
    let line = site.daemon.wait_for_log_after(seen, "outcome=", PATIENCE);
    assert!(line.contains("local submission") && line.contains("outcome=\"accept\""), "{line}");

    // Sendmail as a mail program uses it: SMTP on standard input.
    let sendmail = Sendmail::builder().milter(site.milter_address()).start();
    let seen = site.daemon.log_lines().len();
    let mut session = sendmail.command("-bs").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = session.stdin.take().unwrap();
    let mut output = BufReader::new(session.stdout.take().unwrap());
    assert_eq!(Reply::read(&mut output).unwrap().code, 220);
    for (line, code) in [
        ("EHLO localhost", 250),
        ("MAIL FROM:<s@sender.example>", 250),
        ("RCPT TO:<alice@test.example>", 250),
        ("DATA", 354),
        ("Subject: x\r\n\r\nhello\r\n.", 250),
        ("QUIT", 221),
    ] {
        input.write_all(format!("{line}\r\n").as_bytes()).unwrap();
        let reply = Reply::read(&mut output).unwrap();
        assert_eq!(reply.code, code, "{line}: {reply:?}");
    }
    assert!(session.wait().unwrap().success());
    sendmail.wait_delivered("alice", 1, PATIENCE);
    let line = site.daemon.wait_for_log_after(seen, "outcome=", PATIENCE);
    assert!(line.contains("local submission") && line.contains("outcome=\"accept\""), "{line}");

    // The command line calls no milter at all.
    let seen = site.daemon.log_lines().len();
    let output = with_input(&mut sendmail.command(&format!("-i -f {SENDER} {ALICE}")), MESSAGE);
    assert!(output.status.success(), "{output:?}");
    sendmail.wait_delivered("alice", 2, PATIENCE);
    assert_eq!(site.daemon.log_lines().len(), seen);
}

#[test]
fn an_authenticated_client_is_judged_only_if_the_site_says_so() {
    for (judge, expected) in [("false", "250 "), ("true", "550 5.7.1 no, <s@sender.example>")] {
        let site = refusing().set("recipients", "judge-authenticated", judge).start();
        let postfix =
            Postfix::builder().milter(site.milter_address()).set("smtpd_sasl_auth_enable", "no").start();
        let mut client = Client::connect(postfix.port());
        client.ehlo("localhost");
        let login = [("NAME", "pc.sender.example"), ("ADDR", "192.0.2.77"), ("LOGIN", "anna")];
        assert_eq!(client.xclient(&login).code, 220, "{}", client.transcript());
        client.ehlo("pc.sender.example");
        let at_postfix = client;

        let sendmail = Sendmail::builder().milter(site.milter_address()).login("anna", "secret").start();
        let mut client = Client::connect(sendmail.port());
        client.ehlo("pc.sender.example");
        // RFC 4616: authorization identity (none), authentication identity and password, each after a NUL.
        assert_eq!(client.command(&format!("AUTH PLAIN {ANNA_WRONG}")).code, 535, "{}", client.transcript());
        assert_eq!(client.command(&format!("AUTH PLAIN {ANNA_SECRET}")).code, 235, "{}", client.transcript());
        let at_sendmail = client;

        for (mta, method, mut client) in
            [("Postfix", "XCLIENT", at_postfix), ("Sendmail", "PLAIN", at_sendmail)]
        {
            let seen = site.daemon.log_lines().len();
            let reply = told(&client.send(SENDER, &[ALICE], MESSAGE.as_bytes()));
            assert!(reply.starts_with(expected), "{mta}, {judge}: {reply}");
            let line = site.daemon.wait_for_log_after(seen, "outcome=", PATIENCE);
            assert_eq!(line.contains("authenticated client"), judge == "false", "{mta}: {line}");
            if judge == "true" {
                assert_eq!(site.home_text("alice", "sasl"), format!("anna,{method},\n"), "{mta}");
            }
        }
    }
}

#[test]
fn mail_from_a_trusted_network_is_not_judged() {
    let site = refusing().set("recipients", "trusted-networks", "[\"127.0.0.0/8\", \"::1\"]").start();
    let postfix = Postfix::builder().milter(site.milter_address()).start();
    let sendmail = Sendmail::builder().milter(site.milter_address()).start();
    for port in [postfix.port(), sendmail.port()] {
        let seen = site.daemon.log_lines().len();
        let reply = send(port, MESSAGE);
        assert!(reply.starts_with("250 "), "{reply}");
        site.daemon.wait_for_log_after(seen, "trusted network", PATIENCE);
    }
    let mut client = Client::connect_as(postfix.port(), "192.0.2.10", "mx.sender.example");
    assert!(told(&client.send(SENDER, &[ALICE], MESSAGE.as_bytes())).starts_with("550 "));
}

#[test]
fn bounces_and_lists_are_judged_like_other_mail() {
    let site = refusing().start();
    let postfix = Postfix::builder().milter(site.milter_address()).start();
    let sendmail = Sendmail::builder().milter(site.milter_address()).start();
    let list = format!("List-Id: <dev.lists.example>\r\nPrecedence: list\r\n{MESSAGE}");
    for port in [postfix.port(), sendmail.port()] {
        let mut client = Client::connect(port);
        client.ehlo("mx.sender.example");
        assert_eq!(told(&client.send("", &[ALICE], MESSAGE.as_bytes())), "550 5.7.1 no, <>");
        let bounces = "dev-bounces+alice=test.example@lists.example";
        let reply = told(&client.send(bounces, &[ALICE], list.as_bytes()));
        assert_eq!(reply, format!("550 5.7.1 no, <{bounces}>"));
        assert!(site.home_text("alice", "message").contains("\nList-Id: <dev.lists.example>\n"));
    }
}

#[test]
fn what_is_too_large_is_accepted_unseen_and_what_is_empty_is_judged() {
    let site = refusing().set("filter", "max-message", "\"100K\"").start();
    let postfix = Postfix::builder().milter(site.milter_address()).start();
    let sendmail = Sendmail::builder().milter(site.milter_address()).start();
    let large = format!("{MESSAGE}{}", "0123456789abcdef\r\n".repeat(20_000));
    let largest = format!("{MESSAGE}{}", "0123456789abcdef\r\n".repeat(5_000));
    for port in [postfix.port(), sendmail.port()] {
        for parameters in ["", "SIZE=360000"] {
            let seen = site.daemon.log_lines().len();
            let mut client = Client::connect(port);
            client.ehlo("mx.sender.example");
            client.mail_from(SENDER, parameters);
            client.rcpt_to(ALICE);
            assert_eq!(client.data(large.as_bytes()).code, 250, "{}", client.transcript());
            site.daemon.wait_for_log_after(seen, "larger than max-message", PATIENCE);
        }
        assert!(!site.users.account("alice").home.join("message").exists());
        assert!(send(port, &largest).starts_with("550 5.7.1 no"));
        assert!(site.home_file("alice", "message").len() > 80_000);
        assert!(send(port, "").starts_with("550 5.7.1 no"));
        std::fs::remove_file(site.users.account("alice").home.join("message")).unwrap();
    }
}

#[test]
fn a_thousand_recipients_of_one_user_are_one_question() {
    // Over TCP, where Sendmail would wait 44 ms for each if its packets were not acknowledged at once.
    let site = refusing().set("filter", "inspect-ttl", "\"5s\"").start();
    let postfix = Postfix::builder().milter(site.milter_address()).start();
    let sendmail = Sendmail::builder().milter(site.milter_address()).start();
    let recipients: Vec<String> = (1..=1000).map(|n| format!("alice+{n}@test.example")).collect();
    let recipients: Vec<&str> = recipients.iter().map(String::as_str).collect();
    for port in [postfix.port(), sendmail.port()] {
        let seen = site.daemon.log_lines().len();
        let mut client = Client::connect(port);
        client.ehlo("mx.sender.example");
        let reply = told(&client.send(SENDER, &recipients, MESSAGE.as_bytes()));
        assert_eq!(reply, "550 5.7.1 no, <s@sender.example>");
        let told = site.home_text("alice", "recipients");
        assert_eq!(told.lines().collect::<Vec<_>>(), recipients);
        let line = site.daemon.wait_for_log_after(seen, "outcome=", PATIENCE);
        assert_eq!(line.matches("alice=").count(), 1);
    }
}

#[test]
fn a_header_of_a_mebibyte_reaches_the_filter_as_far_as_the_mta_passes_it() {
    let site = refusing().start();
    // Neither takes such a header by default.
    let postfix =
        Postfix::builder().milter(site.milter_address()).set("header_size_limit", "2000000").start();
    let sendmail = Sendmail::builder()
        .milter(site.milter_address())
        .mc("define(`confMAX_HEADERS_LENGTH', `4000000')dnl")
        .start();
    let field = |lines: usize| format!("X-Long: {}\r\n", vec!["0123456789abcdef"; lines].join("\r\n "));
    let many = "X-Many: 0123456789abcdef\r\n".repeat(40_330);
    let seen = |port: u16, header: &str| {
        let reply = send(port, &format!("{header}{MESSAGE}"));
        assert!(reply.starts_with("550 5.7.1 no"), "{reply}");
        let message = site.home_file("alice", "message");
        std::fs::remove_file(site.users.account("alice").home.join("message")).unwrap();
        String::from_utf8(message).unwrap().matches("0123456789abcdef").count()
    };
    for port in [postfix.port(), sendmail.port()] {
        assert_eq!(seen(port, &many), 40_330);
        assert_eq!(seen(port, &field(3_200)), 3_200);
    }
    // Postfix tells a milter no more of a field than this; Sendmail can't tell it of one that is longer than 64 KiB, and
    // takes that for the milter's failure.
    assert_eq!(seen(postfix.port(), &field(58_000)) / 100, 33);
    assert!(send(sendmail.port(), &field(58_000)).starts_with("451 4.3.2 "));
    // By default it takes no such mail at all, so that nobody tries again for days.
    let default = Sendmail::builder().milter(site.milter_address()).start();
    let refused = send(default.port(), &field(58_000));
    assert!(refused.starts_with("552 5."), "{refused}");
}
