//! The policy service: a refusal at RCPT TO before the body is sent, exactly one answer to each request, and silence
//! instead of a wrong one.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;

use std::time::Duration;

use common::policy::{Client, Request, recorded_requests};
use common::site::SiteBuilder;
use common::{PATIENCE, Postfix, Site, smtp, wait_until};

const MESSAGE: &[u8] = b"Subject: x\r\n\r\nhello\r\n";
const ALICE: &str = "alice@test.example";
const BOB: &str = "bob@test.example";
const SENDER: &str = "s@sender.example";

/// Alice takes mail from her friend only; Bob refuses in the message filter, which is not asked here.
fn site() -> SiteBuilder {
    let rules = "default = \"reject\"\n[[rule]]\nsender = [\"friend@sender.example\"]\naction = \"accept\"\n\
                 [[rule]]\nsender = [\"late@*\"]\naction = \"defer\"\nreply = \"450 4.2.0 100% later\"\n";
    let builder =
        Site::of(&[("alice", 5001), ("bob", 5002)]).filter("bob", "message", "#!/bin/sh\nexit 77\n");
    builder.users.file("alice", "rules.toml", rules);
    builder
}

const REFUSED: &str = "550 5.7.1 message refused by the recipient";

fn ask(site: &Site, request: &Request) -> String {
    Client::connect(site.policy_address()).ask(request)
}

#[test]
fn rules_refuse_at_rcpt_and_everybody_else_is_left_to_others() {
    let site = site().start();
    let mut client = Client::connect(site.policy_address());
    for (sender, recipient, action) in [
        (SENDER, ALICE, REFUSED),
        ("", ALICE, REFUSED),
        ("late@x.example", ALICE, "450 4.2.0 100% later"),
        ("friend@sender.example", ALICE, "DUNNO"),
        ("Friend@SENDER.example", "Alice+x@Test.Example", "DUNNO"),
        (SENDER, BOB, "DUNNO"),
        (SENDER, "alice@elsewhere.example", "DUNNO"),
        (SENDER, "nobody@test.example", "DUNNO"),
        (SENDER, "postmaster@test.example", "DUNNO"),
        (SENDER, "postmaster", "DUNNO"),
        (SENDER, "alice", REFUSED),
    ] {
        assert_eq!(client.ask(&Request::rcpt(sender, recipient)), action, "{sender} to {recipient}");
    }
    let line = site.daemon.wait_for_log("reject at RCPT TO", PATIENCE);
    for part in
        ["interface=\"policy\"", "<alice@test.example>", "<s@sender.example>", "192.0.2.10", "alice=reject"]
    {
        assert!(line.contains(part), "{line}");
    }
}

#[test]
fn through_postfix_a_refused_recipient_never_sends_its_body() {
    let site = site().start();
    let postfix = Postfix::builder().milter(site.milter_address()).policy(site.policy_address()).start();
    let mut client = smtp::Client::connect_as(postfix.port(), "192.0.2.10", "mx.sender.example");
    client.mail_from(SENDER, "");
    let reply = client.rcpt_to(ALICE);
    assert_eq!(
        (reply.code, reply.text().as_str()),
        (550, "5.7.1 <alice@test.example>: Recipient address rejected: message refused by the recipient")
    );
    assert_eq!(client.rcpt_to("carol@test.example").code, 250);
    assert_eq!(client.data(MESSAGE).code, 250, "{}", client.transcript());
    let sent = client.send("late@x.example", &[ALICE], MESSAGE);
    assert_eq!(
        sent.recipients[0].text(),
        "4.2.0 <alice@test.example>: Recipient address rejected: 100% later"
    );
    let sent = client.send("friend@sender.example", &[ALICE], MESSAGE);
    assert_eq!(sent.outcome().code, 250, "{}", client.transcript());
    postfix.wait_delivered("alice", 1, PATIENCE);
    postfix.wait_delivered("carol", 1, PATIENCE);
    postfix.wait_queue_empty();
    // The same over the milter alone.
    let postfix = Postfix::builder().milter(site.milter_address()).start();
    let mut client = smtp::Client::connect_as(postfix.port(), "192.0.2.10", "mx.sender.example");
    client.mail_from(SENDER, "");
    assert_eq!(client.rcpt_to(ALICE).text(), "5.7.1 message refused by the recipient");
    client.mail_from("late@x.example", "");
    client.rset();
    client.mail_from("late@x.example", "");
    assert_eq!(client.rcpt_to(ALICE).text(), "4.2.0 100% later");
}

#[test]
fn requests_recorded_from_postfix_are_answered() {
    let site = site().start();
    let mut client = Client::connect(site.policy_address());
    for request in recorded_requests() {
        client.send_raw(request.as_bytes()).unwrap();
        let rcpt_of_alice = request.contains("protocol_state=RCPT\n") && request.contains("recipient=alice@");
        let sasl = !request.contains("sasl_username=\n");
        let expected = if rcpt_of_alice && !sasl { REFUSED } else { "DUNNO" };
        assert_eq!(client.read_action().unwrap().as_deref(), Some(expected), "{request}");
    }
}

#[test]
fn requests_may_come_byte_by_byte_pipelined_and_in_halves() {
    let builder = site();
    let run = builder.sandbox.directory("run");
    let socket = format!("unix:{}", run.join("policy.sock").display());
    for address in [None, Some(&socket)] {
        let mut builder = site();
        if let Some(address) = address {
            builder = builder.policy_at(address);
        }
        let site = builder.start();
        let (refused, passed) = (Request::rcpt(SENDER, ALICE).encode(), Request::rcpt(SENDER, BOB).encode());
        let mut client = Client::connect(site.policy_address());
        client.set_timeout(Duration::from_secs(10));
        for byte in &refused {
            client.send_raw(&[*byte]).unwrap();
        }
        assert_eq!(client.read_action().unwrap().as_deref(), Some(REFUSED));
        // Many at once, answered in order.
        let many: Vec<u8> =
            (0..50).flat_map(|n| if n % 2 == 0 { refused.clone() } else { passed.clone() }).collect();
        client.send_raw(&many).unwrap();
        for n in 0..50 {
            let expected = if n % 2 == 0 { REFUSED } else { "DUNNO" };
            assert_eq!(client.read_action().unwrap().as_deref(), Some(expected), "{n}");
        }
        // Whoever waits for an answer before going on gets it.
        let (begin, rest) = passed.split_at(100);
        client.send_raw(&[&refused, begin].concat()).unwrap();
        assert_eq!(client.read_action().unwrap().as_deref(), Some(REFUSED));
        client.send_raw(&[rest, b"request=smtp"].concat()).unwrap();
        assert_eq!(client.read_action().unwrap().as_deref(), Some("DUNNO"));
        // And so does whoever says that no more will come.
        client.shut_down_write();
        assert!(client.read_action().unwrap().is_none());
        let mut client = Client::connect(site.policy_address());
        client.send_raw(&refused).unwrap();
        client.shut_down_write();
        assert_eq!(client.read_action().unwrap().as_deref(), Some(REFUSED));
        assert!(client.read_action().unwrap().is_none());
    }
}

#[test]
fn what_is_no_request_is_answered_by_closing_and_what_came_before_it_is_answered() {
    let site = site().start();
    let worker = site.daemon.worker_pid();
    let good = Request::rcpt(SENDER, ALICE).encode();
    let with = |name: &str, value: &str| Request::rcpt(SENDER, ALICE).with(name, value).encode();
    for garbage in [
        b"GET / HTTP/1.0\r\n\r\n\n\n".to_vec(),
        // Nobody who speaks something else need send an empty line.
        b"GET / HTTP/1.0\r\n\r\n".to_vec(),
        b"request=smtpd_access_policy\r\n\r\n".to_vec(),
        b"\n".to_vec(),
        b"\n".repeat(3),
        b"=value\n\n".to_vec(),
        b"request\n\n".to_vec(),
        b"request=smtpd_access_policy\nrecipient=a\0b\n\n".to_vec(),
        b"request=junk\nprotocol_state=RCPT\nrecipient=alice@test.example\n\n".to_vec(),
        b"protocol_state=RCPT\nrecipient=alice@test.example\n\n".to_vec(),
        with("sender", &"x".repeat(100_000)),
        vec![b'x'; 200_000],
        b"a=b\n".repeat(1000).into_iter().chain(*b"\n").collect(),
    ] {
        let shown = String::from_utf8_lossy(&garbage[..garbage.len().min(60)]).into_owned();
        let mut client = Client::connect(site.policy_address());
        client.set_timeout(Duration::from_secs(10));
        let seen = site.daemon.log_lines().len();
        let _ = client.send_raw(&garbage);
        let end = client.read_action();
        let reset = |e: &std::io::Error| e.kind() == std::io::ErrorKind::ConnectionReset;
        assert!(matches!(&end, Ok(None)) || end.as_ref().is_err_and(reset), "{shown}: {end:?}");
        site.daemon.wait_for_log_after(seen, "connection closed", PATIENCE);
        if garbage.len() < 1000 {
            let mut client = Client::connect(site.policy_address());
            client.send_raw(&[&good[..], &garbage].concat()).unwrap();
            assert_eq!(client.read_action().unwrap().as_deref(), Some(REFUSED), "before {shown}");
            let end = client.read_action();
            assert!(matches!(&end, Ok(None)) || end.as_ref().is_err_and(reset), "{shown}: {end:?}");
        }
    }
    assert_eq!(ask(&site, &Request::rcpt(SENDER, ALICE)), REFUSED);
    assert_eq!(site.daemon.worker_pid(), worker);
}

#[test]
fn strange_values_get_one_answer_and_never_a_refusal_for_good() {
    for (on_error, trouble) in
        [("accept", "DUNNO"), ("defer", "451 4.3.0 cannot decide right now, try again later")]
    {
        let site = site().set("filter", "on-error", &format!("\"{on_error}\"")).start();
        let mut client = Client::connect(site.policy_address());
        for (request, action) in [
            (Request::rcpt(SENDER, &format!("{}@test.example", "x".repeat(3000))), trouble),
            (Request::rcpt(&format!("{}@x.example", "x".repeat(3000)), ALICE), trouble),
            (Request::rcpt(SENDER, "\"open@test.example"), "DUNNO"),
            (Request::rcpt(SENDER, "a\u{1}@test.example"), "DUNNO"),
            (Request::rcpt(SENDER, "\"al\"ice@test.example"), REFUSED),
            (Request::rcpt(SENDER, "alice+\u{1}@test.example"), REFUSED),
            (Request::rcpt("a\u{1}@x.example", ALICE), REFUSED),
            (Request::rcpt("\"x@y", ALICE), REFUSED),
            (Request::rcpt(SENDER, ""), "DUNNO"),
            (Request::rcpt(SENDER, ALICE).without("recipient"), "DUNNO"),
            (Request::rcpt(SENDER, ALICE).without("protocol_state"), "DUNNO"),
            (Request::rcpt(SENDER, ALICE).without("sender"), REFUSED),
            (
                Request::rcpt(SENDER, ALICE)
                    .without("client_address")
                    .without("client_name")
                    .without("helo_name"),
                REFUSED,
            ),
            (Request::rcpt(SENDER, ALICE).without("instance").without("size").without("stress"), REFUSED),
            (
                Request::rcpt(SENDER, ALICE).with("client_address", "unknown").with("client_name", "unknown"),
                REFUSED,
            ),
            (Request::rcpt(SENDER, ALICE).with("size", "many").with("new_attribute", "a=b=c"), REFUSED),
            (Request::rcpt(SENDER, ALICE).with("size", "99999999999999999999"), REFUSED),
        ] {
            assert_eq!(client.ask(&request), action, "{request:?}");
        }
        for state in ["CONNECT", "EHLO", "HELO", "MAIL", "DATA", "END-OF-MESSAGE", "VRFY", "ETRN", "rcpt", ""]
        {
            let request = Request::rcpt(SENDER, ALICE).with("protocol_state", state);
            assert_eq!(client.ask(&request), "DUNNO", "{state}");
        }
    }
}

#[test]
fn an_unknown_user_is_refused_if_the_administrator_wants_so() {
    let site = site().set("recipients", "unknown", "\"reject\"").start();
    for (recipient, action) in [
        ("nobody@test.example", "550 5.1.1 no such user here"),
        ("nobody+x@test.example", "550 5.1.1 no such user here"),
        ("nobody@elsewhere.example", "DUNNO"),
        ("postmaster@test.example", "DUNNO"),
        (BOB, "DUNNO"),
    ] {
        assert_eq!(ask(&site, &Request::rcpt(SENDER, recipient)), action, "{recipient}");
    }
    let mut mta = site.mta();
    mta.mail(&["<s@sender.example>"]);
    assert_eq!(mta.rcpt(&["<nobody@test.example>"]).text(), "550 5.1.1 no such user here");
}

#[test]
fn trusted_networks_and_authenticated_clients_are_not_judged() {
    let networks = r#"["192.0.2.0/28", "2001:db8:1::/48"]"#;
    let site = site()
        .set("recipients", "trusted-networks", networks)
        .set("recipients", "unknown", "\"reject\"")
        .start();
    let from = |address: &str| Request::rcpt(SENDER, ALICE).with("client_address", address);
    for (request, action) in [
        (from("192.0.2.10"), "DUNNO"),
        (from("192.0.2.16"), REFUSED),
        (from("::ffff:192.0.2.10"), "DUNNO"),
        (from("2001:db8:1::7"), "DUNNO"),
        (from("2001:db8:2::7"), REFUSED),
        (from("unknown"), REFUSED),
        (from("127.0.0.1"), REFUSED),
        (from("198.51.100.1").with("sasl_username", "anna").with("sasl_method", "PLAIN"), "DUNNO"),
        (
            from("198.51.100.1").with("recipient", "nobody@test.example").with("sasl_username", "anna"),
            "DUNNO",
        ),
        // A name is nothing that a stranger can't have.
        (from("198.51.100.1").with("client_name", "localhost"), REFUSED),
    ] {
        assert_eq!(ask(&site, &request), action, "{request:?}");
    }
    let site = self::site().set("recipients", "judge-authenticated", "true").start();
    assert_eq!(ask(&site, &from("198.51.100.1").with("sasl_username", "anna")), REFUSED);
}

#[test]
fn exempt_addresses_are_accepted_whatever_their_users_say() {
    let site = site().set("recipients", "exempt", r#"["alice", "bob@test.example"]"#).start();
    site.users.file("bob", "rules.toml", "default = \"reject\"\n");
    for recipient in [ALICE, "Alice+x@test.example", BOB, "BOB@Test.example"] {
        assert_eq!(ask(&site, &Request::rcpt(SENDER, recipient)), "DUNNO", "{recipient}");
    }
    assert_eq!(ask(&site, &Request::rcpt(SENDER, "bob+x@test.example")), REFUSED);
}

#[test]
fn a_connection_beyond_the_limit_is_closed_and_a_free_place_is_taken_again() {
    let site = site().set("server", "max-connections", "2").start();
    let mut open: Vec<Client> = (0..2).map(|_| Client::connect(site.policy_address())).collect();
    for client in &mut open {
        assert_eq!(client.ask(&Request::rcpt(SENDER, BOB)), "DUNNO");
    }
    let mut refused = Client::connect(site.policy_address());
    refused.set_timeout(Duration::from_secs(5));
    let _ = refused.send_raw(&Request::rcpt(SENDER, ALICE).encode());
    let end = refused.read_action().map_err(|e| e.kind());
    assert!(matches!(end, Ok(None) | Err(std::io::ErrorKind::ConnectionReset)), "{end:?}");
    site.daemon.wait_for_log("max-connections reached", PATIENCE);
    assert_eq!(open[0].ask(&Request::rcpt(SENDER, ALICE)), REFUSED);
    drop(open.pop());
    let again = wait_until(PATIENCE, || {
        let mut client = Client::connect(site.policy_address());
        client.send_raw(&Request::rcpt(SENDER, ALICE).encode()).is_ok()
            && client.read_action().is_ok_and(|action| action.as_deref() == Some(REFUSED))
    });
    assert!(again);
}

#[test]
fn the_policy_service_can_be_reached_by_postfix_over_a_unix_socket() {
    let builder = site();
    let run = builder.sandbox.directory("run");
    let address = format!("unix:{}", run.join("policy.sock").display());
    let site = builder.policy_at(&address).set("server", "socket-group", "\"postfix\"").start();
    let postfix = Postfix::builder().policy(&address).start();
    let mut client = smtp::Client::connect_as(postfix.port(), "192.0.2.10", "mx.sender.example");
    let sent = client.send(SENDER, &[ALICE], MESSAGE);
    assert_eq!(sent.recipients[0].code, 550, "{}", client.transcript());
    drop(site);
}

#[test]
fn both_interfaces_answer_alike_and_a_recipient_executable_runs_once() {
    let sandbox = common::Sandbox::new();
    let user = common::SystemUser::create(&sandbox, "anna");
    user.filter("recipient", "#!/bin/sh\necho \"$SENDER $RECIPIENT\" >> ~/asked\n[ \"$SENDER\" != bad@sender.example ] || { echo 'not you'; exit 77; }\n");
    let site = Site::of(&[]).resolvers("[[resolver]]\ntype = \"passwd\"\n").start();
    let postfix = Postfix::builder()
        .local_domain("test.example")
        .set("virtual_mailbox_domains", "")
        .milter(site.milter_address())
        .policy(site.policy_address())
        .start();
    let mut client = smtp::Client::connect_as(postfix.port(), "192.0.2.10", "mx.sender.example");
    let upper = format!("{}@Test.Example", user.name.to_uppercase());
    let sent = client.send("good@sender.example", &[&upper], MESSAGE);
    assert_eq!(sent.outcome().code, 250, "{}", client.transcript());
    let sent = client.send("bad@sender.example", &[&upper], MESSAGE);
    assert!(sent.recipients[0].text().ends_with("not you"), "{}", client.transcript());
    let asked = std::fs::read_to_string(user.home.join("asked")).unwrap();
    assert_eq!(asked.lines().count(), 2, "{asked}");
}
