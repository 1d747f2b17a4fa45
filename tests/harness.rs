//! The harness itself, without usermilter: when these fail, no other test means anything.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use std::io::Cursor;
use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;

use common::milter::{self, Capture, Frame, protocol};
use common::smtp::{self, Reply};
use common::{PATIENCE, Postfix, Sandbox, SystemUser, VirtualUsers, policy};

const MESSAGE: &[u8] = b"From: Sender <s@sender.example>\r\n\
    To: alice@test.example\r\n\
    Subject: folded\r\n\x20 two spaces\r\n\ttab\r\n\
    X-Trail: trailing  \r\n\
    X-8bit: caf\xc3\xa9\r\n\
    Date: Mon, 1 Jan 2024 00:00:00 +0000\r\n\
    Message-ID: <m1@sender.example>\r\n\
    \r\n\
    .leading dot\r\n..two dots\r\n.\r\n\xe9 Latin-1, trailing space \r\n\r\nlast line\r\n";

#[test]
fn postfix_delivers_mail_for_alice_byte_for_byte() {
    let postfix = Postfix::builder().start();
    let mut client = smtp::Client::connect(postfix.port());
    assert!(client.ehlo("client.example").is_success());
    let sent = client.send("s@sender.example", &["alice@test.example"], MESSAGE);
    assert_eq!(sent.outcome().code, 250, "{}", client.transcript());
    assert_eq!(client.quit().code, 221);

    let delivered = postfix.wait_delivered("alice", 1, PATIENCE).remove(0);
    let expected: Vec<u8> = MESSAGE.iter().copied().filter(|&byte| byte != b'\r').collect();
    assert!(delivered.ends_with(&expected), "{}", String::from_utf8_lossy(&delivered));
    assert!(delivered.starts_with(b"Return-Path: <s@sender.example>\n"));
    assert!(postfix.maildir("bob").is_empty());
    postfix.wait_queue_empty();
}

#[test]
fn postfix_refuses_who_it_does_not_know_and_relays_for_no_stranger() {
    let postfix = Postfix::builder().mailboxes(&["dora", "eve@other.example"]).start();
    let mut client = smtp::Client::connect_as(postfix.port(), "192.0.2.10", "mx.sender.example");
    client.mail_from("s@sender.example", "");
    assert_eq!(client.rcpt_to("alice@test.example").code, 550, "{}", client.transcript());
    assert_eq!(client.rcpt_to("somebody@elsewhere.example").code, 554, "{}", client.transcript());
    assert_eq!(client.rcpt_to("dora@test.example").code, 250, "{}", client.transcript());
    assert_eq!(client.rcpt_to("eve@other.example").code, 250, "{}", client.transcript());
    assert_eq!(client.data(b"Subject: x\n\nx\n").code, 250, "{}", client.transcript());
    postfix.wait_delivered("dora", 1, PATIENCE);
    postfix.wait_delivered("eve@other.example", 1, PATIENCE);
}

#[test]
fn xclient_plays_a_foreign_client() {
    let postfix = Postfix::builder().start();
    let mut client = smtp::Client::connect_as(postfix.port(), "192.0.2.10", "mx.sender.example");
    client.send("s@sender.example", &["alice@test.example"], b"Subject: x\n\nx\n");
    let delivered = postfix.wait_delivered("alice", 1, PATIENCE).remove(0);
    let text = String::from_utf8(delivered).unwrap();
    assert!(text.contains("Received: from mx.sender.example (mx.sender.example [192.0.2.10])"), "{text}");
    assert!(client.transcript().contains("C: XCLIENT NAME=mx.sender.example ADDR=192.0.2.10\nS: 220 "));
}

#[test]
fn two_instances_run_side_by_side_and_one_delivers_to_system_users() {
    let sandbox = Sandbox::new();
    let user = SystemUser::create(&sandbox, "anna");
    let one = Postfix::builder().start();
    let two = Postfix::builder().local_domain("local.example").start();
    let mut client = smtp::Client::connect_as(two.port(), "192.0.2.10", "mx.sender.example");
    let recipient = format!("{}@local.example", user.name);
    let sent = client.send("", &[&recipient], b"Subject: x\n\nto a system user\n");
    assert_eq!(sent.outcome().code, 250, "{}", client.transcript());
    two.wait_delivered(&user.name, 1, PATIENCE);
    two.wait_for_log("relay=local");
    assert_eq!(client.mail_from("", "").code, 250);
    assert_eq!(client.rcpt_to("nobody.there@local.example").code, 550);
    assert_ne!(one.port(), two.port());
    assert!(!one.log().contains(&user.name));
}

#[test]
fn postfix_asks_the_milter_and_the_policy_service_it_is_given() {
    let (address, listener) = listen();
    let policy_service = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = Vec::new();
        while !request.ends_with(b"\n\n") {
            let mut byte = [0];
            std::io::Read::read_exact(&mut stream, &mut byte).unwrap();
            request.push(byte[0]);
        }
        stream.write_all(b"action=550 5.7.1 not you\n\n").unwrap();
        String::from_utf8(request).unwrap()
    });
    // Nothing listens where the milter should be: milter_default_action decides.
    let milter = format!("inet:127.0.0.1:{}", common::free_port());
    let postfix = Postfix::builder().policy(address).milter(milter).milter_default_action("accept").start();
    let mut client = smtp::Client::connect_as(postfix.port(), "192.0.2.10", "mx.sender.example");
    client.mail_from("s@sender.example", "");
    let reply = client.rcpt_to("alice@test.example");
    assert_eq!(
        (reply.code, reply.text().as_str()),
        (550, "5.7.1 <alice@test.example>: Recipient address rejected: not you")
    );
    let request = policy_service.join().unwrap();
    assert!(
        request.contains("\nclient_address=192.0.2.10\n") && request.contains("\nprotocol_state=RCPT\n"),
        "{request}"
    );
    postfix.wait_for_log("connect to Milter service");
}

#[test]
fn the_smtp_client_reads_multi_line_replies() {
    let read = |text: &str| Reply::read(&mut Cursor::new(text.as_bytes()));
    let reply = read("550-5.7.1 one\r\n550-\r\n550 5.7.1 three\r\n").unwrap();
    assert_eq!(
        reply,
        Reply { code: 550, lines: vec!["5.7.1 one".into(), String::new(), "5.7.1 three".into()] }
    );
    assert_eq!(reply.text(), "5.7.1 one\n\n5.7.1 three");
    assert_eq!(read("250\r\n").unwrap().code, 250);
    for malformed in [
        "250 lone newline\n",
        "2x0 ok\r\n",
        "250-one\r\n251 other code\r\n",
        "250_x\r\n",
        "",
        "250-unfinished\r\n",
    ] {
        assert!(read(malformed).is_err(), "{malformed:?}");
    }
}

#[test]
fn recorded_sessions_replay_to_the_recorded_replies() {
    for name in ["postfix", "sendmail"] {
        let (address, listener) = listen();
        let recorded = milter::recorded_replies(name);
        let expected = recorded.clone();
        let milter = std::thread::spawn(move || serve_frames(&listener, recorded));
        let answers = Capture::load(name).replay(&address);
        milter.join().unwrap();

        let answered: Vec<Frame> = answers
            .iter()
            .filter(|(_, answer)| answer.explicit)
            .flat_map(|(_, answer)| answer.changes.iter().chain([&answer.end]).cloned())
            .collect();
        assert_eq!(answered, expected[1..], "{name}");
        let stages: String = answers.iter().map(|(stage, _)| stage).collect();
        let ending = if name == "postfix" { "EAAQ" } else { "EQ" };
        assert_eq!(stages, format!("CHMRRT{}NBBBB{ending}", "L".repeat(18)), "{name}");
    }
}

#[test]
fn the_milter_client_waits_for_no_answer_that_was_negotiated_away() {
    let quiet =
        protocol::NR_CONNECT | protocol::NR_HELO | protocol::NR_MAIL | protocol::NO_HEADERS | protocol::SKIP;
    let negotiation = [6, 0, quiet].iter().flat_map(|number: &u32| number.to_be_bytes()).collect::<Vec<u8>>();
    let replies = vec![
        Frame::new(b'O', negotiation),
        Frame::new(b'y', *b"550 5.7.1 no\0"),
        Frame::new(b'c', []),
        Frame::new(b'c', []),
        Frame::new(b'p', []),
        Frame::new(b'a', []),
    ];
    let (address, listener) = listen();
    let server = std::thread::spawn(move || serve_frames(&listener, replies));
    let answers = Capture::load("postfix").replay(&address);
    let received = server.join().unwrap();

    let stages: String = answers
        .iter()
        .map(|(stage, answer)| if answer.explicit { *stage } else { stage.to_ascii_lowercase() })
        .collect();
    assert_eq!(stages, "chmRRTNaaq", "headers are unwanted; accepted at end of headers");
    assert_eq!((answers[3].1.letter(), answers[3].1.text().as_str()), ('y', "550 5.7.1 no"));
    assert_eq!(answers[6].1.progress, 1);
    assert!(!received.contains(&'L') && !received.contains(&'B') && !received.contains(&'E'), "{received:?}");
}

#[test]
fn the_policy_client_reads_exactly_one_action() {
    let sandbox = Sandbox::new();
    let path = sandbox.join("policy.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"action=DUNNO\n\naction=550 5.7.1 no\n\naction=\nDUNNO\n").unwrap();
    });
    let mut client = policy::Client::connect(&format!("unix:{}", path.display()));
    assert_eq!(client.read_action().unwrap().as_deref(), Some("DUNNO"));
    assert_eq!(client.read_action().unwrap().as_deref(), Some("550 5.7.1 no"));
    assert!(client.read_action().is_err());
    server.join().unwrap();
    assert!(client.read_action().unwrap().is_none());

    let recorded = policy::recorded_requests();
    assert_eq!(recorded.len(), 5);
    let names = |request: &str| -> Vec<String> {
        request.lines().map(|line| line.split('=').next().unwrap().to_owned()).collect()
    };
    let ours = String::from_utf8(policy::Request::rcpt("", "").encode()).unwrap();
    assert_eq!(names(&ours), names(&recorded[0]), "the attributes of a real Postfix, in its order");

    let request = policy::Request::rcpt("s@sender.example", "alice@test.example")
        .with("size", "1000")
        .without("stress");
    let text = String::from_utf8(request.encode()).unwrap();
    assert!(
        text.starts_with("request=smtpd_access_policy\nprotocol_state=RCPT\n")
            && text.ends_with("policy_context=\n\n")
    );
    assert!(
        text.contains("\nrecipient=alice@test.example\n")
            && text.contains("\nsize=1000\n")
            && !text.contains("stress")
    );
}

#[test]
fn only_a_user_or_root_can_change_what_leads_to_a_filter() {
    common::require_root();
    let sandbox = Sandbox::new();
    let users = VirtualUsers::new(&sandbox, &[("alice", 5001), ("bob", 5002)]);
    let filter = users.filter("alice", "message", "#!/bin/sh\nexit 0\n");
    assert_eq!(filter, users.homes().join("alice/.usermilter/message"));
    assert_eq!(filter.metadata().unwrap().permissions().mode() & 0o7777, 0o700);
    for path in filter.ancestors() {
        let metadata = path.metadata().unwrap();
        let (uid, mode) = (metadata.uid(), metadata.permissions().mode());
        assert!(uid == 0 || uid == 5001, "{} belongs to {uid}", path.display());
        assert!(mode & 0o022 == 0 || mode & 0o1000 != 0, "{} has mode {mode:o}", path.display());
    }
    let expected = format!(
        "alice:x:5001:5001::{0}/alice:/bin/sh\nbob:x:5002:5002::{0}/bob:/bin/sh\n",
        users.homes().display()
    );
    assert_eq!(std::fs::read_to_string(users.passwd_file()).unwrap(), expected);
}

#[test]
fn system_users_and_sandboxes_are_gone_after_the_test() {
    let sandbox = Sandbox::new();
    let path = sandbox.path().to_owned();
    let user = SystemUser::create(&sandbox, "eve");
    let name = user.name.clone();
    assert_eq!(user.home.metadata().unwrap().uid(), user.uid);
    drop(user);
    assert!(!std::fs::read_to_string("/etc/passwd").unwrap().contains(&name));
    drop(sandbox);
    assert!(!path.exists() || common::sandbox::kept());
}

/// A socket on loopback, and its address as in a configuration.
fn listen() -> (String, TcpListener) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    (format!("inet:{}", listener.local_addr().unwrap()), listener)
}

/// A milter that says the next of its replies whenever its own negotiation wants an answer, and the rest at
/// end of message. Returns the commands that it received.
fn serve_frames(listener: &TcpListener, replies: Vec<Frame>) -> Vec<char> {
    let quiet = u32::from_be_bytes(replies[0].data[8..12].try_into().unwrap());
    let mut replies = replies.into_iter().peekable();
    let (mut stream, _) = listener.accept().unwrap();
    let mut received = Vec::new();
    while let Ok(frame) = Frame::read(&mut stream) {
        received.push(char::from(frame.command));
        let silent = match frame.command {
            b'C' => quiet & protocol::NR_CONNECT != 0,
            b'H' => quiet & protocol::NR_HELO != 0,
            b'M' => quiet & protocol::NR_MAIL != 0,
            command => b"DAQ".contains(&command),
        };
        if silent {
            continue;
        }
        loop {
            let reply = replies.next().expect("a reply left");
            stream.write_all(&reply.encode()).unwrap();
            if !b"phim".contains(&reply.command) {
                break;
            }
        }
    }
    assert!(replies.peek().is_none(), "replies left over");
    received
}
