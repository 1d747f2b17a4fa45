//! The milter interface against MTAs of every manner: what a filter reads is what the MTA has, only what is offered is
//! used, and nothing that a peer sends harms anybody else.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

mod common;

use std::fs;
use std::io::Read;
use std::time::Duration;

use common::milter::{ALL_ACTIONS, Answer, Capture, Client, Frame, protocol};
use common::site::{MAIL_MACROS, send, send_message};
use common::{PATIENCE, Postfix, Site, smtp};

const MESSAGE: &[u8] = b"Subject: x\r\n\r\nhello\r\n";
const ALICE: &str = "alice@test.example";

/// Keeps the message and refuses it, so that the answer shows that the filter ran.
const KEEP: &str = "#!/bin/sh\ncat > ~/new && mv ~/new ~/message\nstat -Lc '%a %h %s' /dev/stdin > ~/stat 2>&1\n\
                    readlink /proc/self/fd/0 > ~/link\necho kept\nexit 77\n";

fn keeper() -> common::site::SiteBuilder {
    Site::of(&[("alice", 5001), ("bob", 5002)])
        .set("filter", "trace-headers", "false")
        .filter("alice", "message", KEEP)
}

fn is_kept(answer: &Answer) -> bool {
    answer.text() == "550 5.7.1 kept"
}

#[test]
fn recorded_sessions_of_both_mtas_reach_the_filter() {
    for name in ["postfix", "sendmail"] {
        // The captured session has a second recipient who has nothing; the message is for those it names.
        let site = Site::of(&[("alice", 5001), ("robert", 5002), ("bob", 5003)])
            .set("recipients", "domains", r#"["test.example", "sm.test.example"]"#)
            .set("filter", "trace-headers", "false")
            .filter("alice", "message", KEEP)
            .filter("robert", "message", KEEP)
            .filter("bob", "message", KEEP)
            .start();
        let capture = Capture::load(name);
        let answers = capture.replay(site.milter_address());
        let end = &answers
            .iter()
            .find(|(stage, _)| *stage == 'E')
            .unwrap_or_else(|| panic!("{name}: {answers:?}"))
            .1;
        assert!(is_kept(end), "{name}: {end:?}");
        // The body that the frames hold, with LF.
        let body: Vec<u8> =
            capture.frames.iter().filter(|f| f.command == b'B').flat_map(|f| f.data.clone()).collect();
        let body = String::from_utf8_lossy(&body).replace("\r\n", "\n");
        let kept = site.home_file("alice", "message");
        let kept = String::from_utf8_lossy(&kept);
        assert!(kept.ends_with(&body) && kept.contains("\nSubject:"), "{name}");
        // The queue id, wherever the MTA gives it.
        let id = macro_value(&capture, "i").expect("a queue id");
        site.daemon.wait_for_log(&format!(" {id}: reject"), PATIENCE);
    }
}

/// The last value of a macro in a session.
fn macro_value(capture: &Capture, name: &str) -> Option<String> {
    let mut found = None;
    for frame in capture.frames.iter().filter(|frame| frame.command == b'D') {
        let words: Vec<&[u8]> = frame.data[1..].split(|&b| b == 0).collect();
        for pair in words.chunks(2) {
            if pair[0] == name.as_bytes() && !pair[1].is_empty() {
                found = Some(String::from_utf8_lossy(pair[1]).into_owned());
            }
        }
    }
    found
}

#[test]
fn a_filter_reads_the_message_byte_for_byte() {
    for (endings, memory) in [("lf", "\"1M\""), ("crlf", "\"1M\""), ("lf", "\"1K\""), ("crlf", "\"1K\"")] {
        let site = keeper()
            .set("filter", "line-endings", &format!("\"{endings}\""))
            .set("filter", "memory-limit", memory)
            .start();
        let long = [b'x'; 70_000];
        let bodies: Vec<Vec<u8>> = vec![
            b"".to_vec(),
            b"no newline at the end".to_vec(),
            b"8-bit \xe9\xff, NUL \0, controls \x01\x1b\r\n trailing space \r\n\r\n".to_vec(),
            b"lone CR \r and LF \n and both \n\r \r\r\n.\r\n..\r\n\r".to_vec(),
            b"\r\n\r\n\r\n".to_vec(),
            [&long[..65_534], b"\r\nafter the cut\r\n"].concat(),
            [&long[..65_534], b"\rafter the cut\r"].concat(),
            [&long[..], b"\r\n", &long[..]].concat(),
        ];
        let huge = vec![b'h'; 1_048_575 - "X-Huge: \0\0".len()];
        let headers: &[(&str, &[u8])] = &[
            ("Subject", b"  two spaces\n\tfolded\n  again"),
            ("X-Empty", b""),
            ("X-8bit", b" caf\xc3\xa9 \xe9"),
            ("X-Trail", b" trailing \t "),
            ("x-CASE", b"no space"),
            ("X-Control", b" a\x01b\x7f"),
        ];
        for (n, body) in bodies.iter().enumerate() {
            let mut headers = headers.to_vec();
            if n == 0 {
                headers.push(("X-Huge", &huge));
            }
            let mut mta = site.mta();
            mta.macros('M', MAIL_MACROS);
            mta.mail(&["<s@sender.example>"]);
            mta.rcpt(&["<alice@test.example>"]);
            assert_eq!(mta.data().letter(), 'c');
            let mut expected = Vec::new();
            for (name, value) in &headers {
                mta.header(name, value);
                expected.extend_from_slice(&[name.as_bytes(), b":", value, b"\n"].concat());
            }
            mta.end_of_headers();
            expected.push(b'\n');
            if endings == "crlf" {
                expected = replace(&expected, b"\n", b"\r\n");
                expected.extend_from_slice(body);
            } else {
                expected.extend_from_slice(&replace(body, b"\r\n", b"\n"));
            }
            if !body.is_empty() {
                assert_eq!(mta.body(body).letter(), 'c');
            }
            assert!(is_kept(&mta.end_of_message()));
            let kept = site.home_file("alice", "message");
            assert!(
                kept == expected,
                "body {n}, {endings}: {:?}",
                String::from_utf8_lossy(&kept[..kept.len().min(500)])
            );
        }
    }
}

fn replace(text: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut at = 0;
    while at < text.len() {
        if text[at..].starts_with(from) {
            out.extend_from_slice(to);
            at += from.len();
        } else {
            out.push(text[at]);
            at += 1;
        }
    }
    out
}

#[test]
fn through_postfix_a_filter_reads_what_is_then_delivered() {
    let site = keeper().filter("alice", "message", "#!/bin/sh\ncat > ~/message\n").start();
    let postfix = Postfix::builder().milter(site.milter_address()).start();
    let message = b"From: s@sender.example\r\nTo: alice@test.example\r\nSubject:  two spaces\r\n\tfolded \r\n\
        X-Return: ends in CR\r\r\nX-Fold: a\r\r\n b\r\nX-8bit: \xe9\xc3\xa9\r\nDate: Mon, 1 Jan 2024 00:00:00 +0000\r\n\
        Message-ID: <m1@sender.example>\r\n\r\n..dot\r\nlone \r CR\r\n\xe9 trailing \r\n\r\nend\r\n.\r\n";
    let mut client = smtp::Client::connect_as(postfix.port(), "192.0.2.10", "mx.sender.example");
    client.mail_from("s@sender.example", "BODY=8BITMIME");
    client.rcpt_to(ALICE);
    assert_eq!(client.data_raw(message).code, 250, "{}", client.transcript());
    let delivered = postfix.wait_delivered("alice", 1, PATIENCE).remove(0);
    let kept = site.home_file("alice", "message");
    assert!(
        delivered.ends_with(&kept),
        "read:\n{}\ndelivered:\n{}",
        kept.escape_ascii(),
        delivered.escape_ascii()
    );
    assert!(kept.starts_with(b"From: s@sender.example\n"));
}

#[test]
fn trace_headers_are_what_a_delivery_agent_would_see() {
    let site = keeper().set("filter", "trace-headers", "true").start();
    assert!(is_kept(&site.judge(&[ALICE], MESSAGE)));
    let kept = site.home_text("alice", "message");
    let lines: Vec<&str> = kept.lines().collect();
    assert_eq!(lines[0], "Return-Path: <s@sender.example>");
    assert_eq!(lines[1], "Received: from mx.sender.example (mx.sender.example [192.0.2.10])");
    assert!(lines[2].starts_with("\tby mx.test.example ") && lines[2].contains("4QUEUEID"), "{kept}");
    assert!(lines[3].starts_with('\t') && lines[4] == "Subject: x", "{kept}");
}

#[test]
fn small_messages_stay_in_sealed_memory_and_large_ones_go_to_an_unlinked_file() {
    let site = keeper().set("filter", "memory-limit", "\"100K\"").start();
    let link = || site.home_text("alice", "link");
    assert!(is_kept(&site.judge(&[ALICE], MESSAGE)));
    assert!(link().starts_with("/memfd:"), "{}", link());
    let large = [b"Subject: x\r\n\r\n".to_vec(), b"0123456789abcd\r\n".repeat(20_000)].concat();
    assert!(is_kept(&site.judge(&[ALICE], &large)));
    let spool = site.sandbox.join("spool");
    assert!(link().starts_with(spool.to_str().unwrap()) && link().contains("(deleted)"), "{}", link());
    assert_eq!(site.home_text("alice", "stat").split(' ').take(2).collect::<Vec<_>>(), ["444", "0"]);
    // A client's SIZE= puts it there at once.
    let mut mta = site.mta();
    mta.macros('M', MAIL_MACROS);
    mta.mail(&["<s@sender.example>", "SIZE=1000000"]);
    mta.rcpt(&["<alice@test.example>"]);
    assert!(is_kept(&send_message(&mut mta, MESSAGE)));
    assert!(link().contains("(deleted)") && !link().contains("memfd"), "{}", link());
    assert_eq!(fs::read_dir(spool).unwrap().count(), 0, "nothing is left, and nothing ever had a name");
}

#[test]
fn a_spool_directory_that_is_gone_is_our_trouble_and_nobody_elses() {
    let large = [b"Subject: x\r\n\r\n".to_vec(), b"0123456789abcd\r\n".repeat(20_000)].concat();
    for (on_error, expected) in
        [("accept", ""), ("defer", "451 4.3.0 cannot decide right now, try again later")]
    {
        let site = keeper()
            .set("filter", "memory-limit", "\"100K\"")
            .set("filter", "on-error", &format!("\"{on_error}\""))
            .start();
        fs::remove_dir(site.sandbox.join("spool")).unwrap();
        assert_eq!(site.judge(&[ALICE], &large).text(), expected);
        let line = site.daemon.wait_for_log("not judged: spool ", PATIENCE);
        assert!(line.contains("No such file"), "{line}");
        let mut mta = site.mta();
        mta.macros('M', MAIL_MACROS);
        mta.mail(&["<s@sender.example>", "SIZE=1000000"]);
        mta.rcpt(&["<alice@test.example>"]);
        assert_eq!(send_message(&mut mta, MESSAGE).text(), expected);
        assert!(is_kept(&site.judge(&[ALICE], MESSAGE)), "small mail is judged all the same");
    }
}

#[test]
fn a_message_larger_than_max_message_is_accepted_and_its_rest_is_not_transferred() {
    let site =
        keeper().set("filter", "max-message", "\"200K\"").set("filter", "on-error", "\"defer\"").start();
    let large = [b"Subject: x\r\n\r\n".to_vec(), b"0123456789abcd\r\n".repeat(50_000)].concat();
    let begin = |mut mta: Client, parameters: &[&str]| {
        mta.macros('M', MAIL_MACROS);
        mta.mail(&[&["<s@sender.example>"], parameters].concat());
        mta.rcpt(&["<alice@test.example>"]);
        mta
    };
    // With SKIP the MTA stops; without, it goes on, whatever we want.
    let mut mta = begin(site.mta(), &[]);
    mta.data();
    mta.header("Subject", " x");
    mta.end_of_headers();
    assert_eq!(mta.body(&large).letter(), 's');
    assert_eq!(mta.end_of_message().letter(), 'a');
    let mut client = Client::connect_only(site.milter_address());
    client.negotiate(6, ALL_ACTIONS, protocol::ALL & !protocol::SKIP);
    let mut mta = begin(client, &[]);
    mta.data();
    mta.header("Subject", " x");
    mta.end_of_headers();
    assert_eq!(mta.body(&large).letter(), 'c');
    assert_eq!(mta.end_of_message().letter(), 'a', "accepted, not put off");
    site.daemon.wait_for_log("larger than max-message", PATIENCE);
    // A header alone can be too large too.
    let mut mta = begin(site.mta(), &[]);
    mta.data();
    mta.header("Subject", vec![b'x'; 300_000]);
    mta.end_of_headers();
    assert_eq!(mta.end_of_message().letter(), 'a');
    assert!(!site.users.account("alice").home.join("message").exists());
    // What the client declares is the client's word: a small message is judged.
    let mut mta = begin(site.mta(), &["SIZE=100000000"]);
    assert!(is_kept(&send_message(&mut mta, MESSAGE)), "SIZE= must not be a way around a filter");
}

#[test]
fn a_body_that_nobody_needs_is_never_transferred() {
    let site = keeper().start();
    let mut mta = site.mta();
    for recipients in [
        // Nobody has a filter; somebody has none, so that the outcome is settled; not ours; exempt; unknown.
        &["bob@test.example"][..],
        &[ALICE, "bob@test.example"],
        &[ALICE, "x@elsewhere.example"],
        &[ALICE, "postmaster@test.example"],
        &["nobody@test.example"],
    ] {
        mta.macros('M', MAIL_MACROS);
        mta.mail(&["<s@sender.example>"]);
        for recipient in recipients {
            assert_eq!(mta.rcpt(&[&format!("<{recipient}>")]).letter(), 'c');
        }
        assert_eq!(mta.data().letter(), 'a', "{recipients:?}");
        mta.abort();
    }
    assert!(is_kept(&send(&mut mta, "<s@sender.example>", &[ALICE], MESSAGE)), "the connection goes on");
}

#[test]
fn only_what_an_mta_offers_is_requested_and_the_mail_is_judged_all_the_same() {
    let site = keeper().start();
    let all = protocol::ALL;
    let noreply =
        protocol::NR_CONNECT | protocol::NR_HELO | protocol::NR_MAIL | protocol::NR_HEADER | protocol::NR_EOH;
    for (version, actions, offer) in [
        (6, ALL_ACTIONS, all),
        (6, ALL_ACTIONS, all & !protocol::SKIP),
        (6, ALL_ACTIONS, all & !protocol::LEADING_SPACE),
        (6, ALL_ACTIONS, all & !noreply),
        (6, 0xff, all),
        (6, 0x1, 0x7f),
        (4, 0x3f, 0x3ff),
        (3, 0x3f, 0x1ff),
        (2, 0x3f, 0x7f),
        (2, 0, 0),
        (7, u32::MAX, u32::MAX),
    ] {
        let context = format!("version {version}, actions {actions:x}, protocol {offer:x}");
        let mut mta = Client::connect_only(site.milter_address());
        let agreed = mta.negotiate(version, actions, offer).clone();
        assert_eq!(agreed.version, version.min(6), "{context}");
        let default_protocol = if offer == 0 { 0x7f } else { offer };
        let default_actions = if actions == 0 { 0x3f } else { actions };
        assert_eq!(agreed.actions & !default_actions, 0, "{context}: {:x}", agreed.actions);
        assert_eq!(agreed.protocol & !default_protocol, 0, "{context}: {:x}", agreed.protocol);
        assert_eq!(agreed.macro_lists.is_empty(), actions & 0x100 == 0, "{context}");
        let leading_space = agreed.protocol & protocol::LEADING_SPACE != 0;
        mta.macros('C', &[("j", "mx.test.example")]);
        mta.connected("mx.sender.example", "192.0.2.10", 4711);
        mta.helo("mx.sender.example");
        for _ in 0..2 {
            if agreed.macro_lists.is_empty() {
                mta.macros('M', &[("i", "4X")]);
            } else {
                mta.macros('M', MAIL_MACROS);
            }
            mta.mail(&["<s@sender.example>"]);
            assert_eq!(mta.rcpt(&["<alice@test.example>"]).letter(), 'c', "{context}");
            assert_eq!(mta.data().letter(), 'c', "{context}");
            // Without LEADING_SPACE the MTA takes one space away.
            mta.header("Subject", if leading_space { "  two" } else { " two" });
            mta.end_of_headers();
            mta.body(b"body\r\n");
            assert!(is_kept(&mta.end_of_message()), "{context}");
            assert_eq!(site.home_text("alice", "message"), "Subject:  two\n\nbody\n", "{context}");
            mta.abort();
        }
        // The client is known however the MTA told of it.
        let log = site.daemon.log_lines().join("\n");
        assert!(!log.contains("unknown["), "{context}\n{log}");
    }
}

#[test]
fn nobodys_filter_is_skipped_by_an_mta_without_a_data_stage() {
    let site = keeper().start();
    let mut mta = Client::connect_only(site.milter_address());
    mta.negotiate(2, 0x3f, 0x7f);
    mta.connected("mx.sender.example", "192.0.2.10", 4711);
    mta.helo("mx.sender.example");
    mta.mail(&["<s@sender.example>"]);
    mta.rcpt(&["<bob@test.example>"]);
    assert_eq!(mta.header("Subject", "x").letter(), 'a');
    // A message without any header.
    mta.mail(&["<s@sender.example>"]);
    mta.rcpt(&["<alice@test.example>"]);
    mta.end_of_headers();
    assert!(is_kept(&mta.end_of_message()));
    assert_eq!(site.home_text("alice", "message"), "\n");
}

#[test]
fn a_connection_carries_any_number_of_transactions_whatever_became_of_the_last() {
    let site = keeper().filter("bob", "rules.toml", "default = \"reject\"\n").start();
    let mut mta = site.mta();
    let mail = |mta: &mut Client| {
        mta.macros('M', MAIL_MACROS);
        mta.mail(&["<s@sender.example>"]);
        mta.rcpt(&["<alice@test.example>"]).letter()
    };
    for round in 0..3 {
        assert!(is_kept(&send(&mut mta, "<s@sender.example>", &[ALICE], MESSAGE)), "{round}");
        // RSET after MAIL, after RCPT, in the middle of the message; twice.
        mta.macros('M', MAIL_MACROS);
        mta.mail(&["<s@sender.example>"]);
        mta.abort();
        mail(&mut mta);
        mta.abort();
        mta.abort();
        mail(&mut mta);
        mta.data();
        mta.header("Subject", " never");
        mta.abort();
        // HELO twice, as after STARTTLS, and in the middle; MAIL without an end of the last.
        mta.helo("one.example");
        mta.helo("two.example");
        mail(&mut mta);
        assert_eq!(mta.rcpt(&["<bob@test.example>"]).letter(), 'y', "refused alone");
        assert_eq!(mail(&mut mta), 'c');
        assert!(is_kept(&send_message(&mut mta, MESSAGE)));
        let line = site.daemon.log_lines().pop().unwrap();
        assert!(line.contains("helo=\"two.example\""), "{line}");
        // All recipients refused: the MTA never says DATA.
        mta.macros('M', MAIL_MACROS);
        mta.mail(&["<s@sender.example>"]);
        assert_eq!(mta.rcpt(&["<bob@test.example>"]).letter(), 'y');
        mta.abort();
    }
    assert_eq!(site.home_text("alice", "message"), "Subject: x\n\nhello\n");
    mta.quit();
    mta.stream().set_timeout(Duration::from_secs(5)).unwrap();
    assert_eq!(
        Frame::read(&mut BorrowedStream(&mta)).map_err(|e| e.kind()).err(),
        Some(std::io::ErrorKind::UnexpectedEof)
    );
}

/// Reading from a client's connection without its protocol.
struct BorrowedStream<'a>(&'a Client);

impl Read for BorrowedStream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self.0.stream() {
            common::stream::Stream::Tcp(stream) => (&*stream).read(buffer),
            common::stream::Stream::Unix(stream) => (&*stream).read(buffer),
        }
    }
}

#[test]
fn a_client_of_unknown_address_is_judged_like_any_other() {
    let site = keeper()
        .filter("alice", "message", "#!/bin/sh\necho \"$CLIENT_ADDRESS $CLIENT_HOSTNAME\"\nexit 77\n")
        .start();
    let postfix = Postfix::builder().milter(site.milter_address()).set("inet_protocols", "all").start();
    for (address, expected) in [
        ("[UNAVAILABLE]", "unknown unknown"),
        ("IPV6:2001:db8::7", "2001:db8::7 unknown"),
        ("192.0.2.9", "192.0.2.9 unknown"),
    ] {
        let mut client = smtp::Client::connect(postfix.port());
        client.ehlo("localhost");
        client.xclient(&[("NAME", "[UNAVAILABLE]"), ("ADDR", address)]);
        client.ehlo("mx.sender.example");
        let sent = client.send("s@sender.example", &[ALICE], MESSAGE);
        assert_eq!(sent.outcome().text(), format!("5.7.1 {expected}"), "{}", client.transcript());
    }
}

#[test]
fn an_mta_that_waits_for_slow_filters_hears_of_progress() {
    let site = keeper().filter("alice", "message", "#!/bin/sh\nsleep 12\nexit 77\n").start();
    let answer = site.judge(&[ALICE], MESSAGE);
    assert!(answer.progress >= 1, "{answer:?}");
    assert_eq!(answer.letter(), 'y');
}

#[test]
fn garbage_ends_its_own_connection_and_nothing_else() {
    let site = keeper().start();
    let worker = site.daemon.worker_pid();
    let negotiation =
        Frame::new(b'O', [6u32, 0x1ff, 0x1f_ffff].iter().flat_map(|n| n.to_be_bytes()).collect::<Vec<u8>>())
            .encode();
    let frame = |command: u8, data: &[u8]| Frame::new(command, data).encode();
    let with = |rest: &[Vec<u8>]| [std::slice::from_ref(&negotiation), rest].concat().concat();
    let transaction = [
        frame(b'H', b"mx\0"),
        frame(b'M', b"<s@sender.example>\0"),
        frame(b'R', b"<alice@test.example>\0"),
        frame(b'T', b""),
    ];
    let mut cases: Vec<Vec<u8>> = vec![
        b"GET / HTTP/1.0\r\n\r\n".to_vec(),
        vec![0xff; 64],
        vec![0; 64],
        vec![0, 0, 0, 13, b'O'],
        frame(b'O', b"short"),
        frame(b'O', &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
        frame(b'M', b"<s@sender.example>\0"),
        with(&[frame(b'z', b"unknown command")]),
        with(&[frame(b'M', b"")]),
        with(&[frame(b'M', b"no nul")]),
        with(&[frame(b'H', b"no nul")]),
        with(&[frame(b'D', b"")]),
        with(&[frame(b'D', b"M")]),
        with(&[frame(b'D', b"Mi\0value without nul")]),
        with(&[frame(b'C', b"name\x00X")]),
        with(&[vec![0xff, 0xff, 0xff, 0xff, b'B']]),
        with(&[vec![0, 0x20, 0, 0, b'L']]),
        with(&[frame(b'E', b""), frame(b'B', b"body"), frame(b'N', b""), frame(b'Q', b"")]),
        with(&transaction),
        [with(&transaction), frame(b'L', b"\0\0")].concat(),
        [with(&transaction), frame(b'L', b"Subject\0")].concat(),
        [with(&transaction), frame(b'L', b"Subject\0 x\0"), vec![0, 0, 1, 0, b'B', 1, 2, 3]].concat(),
        [with(&transaction), frame(b'O', b"again"), frame(b'K', b""), frame(b'U', b"VRFY\0")].concat(),
    ];
    let mut seed = 1u64;
    for _ in 0..40 {
        let length = 5 + (seed % 300) as usize;
        let mut bytes = with(&transaction[..(seed % 5) as usize]);
        for _ in 0..length {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            bytes.push((seed >> 33) as u8);
        }
        cases.push(bytes);
    }
    for (n, bytes) in cases.iter().enumerate() {
        let mut client = Client::connect_only(site.milter_address());
        // The peer may close before it has read all of it.
        let _ = client.send_raw(bytes);
        let _ = client.stream().shut_down_write();
        client.stream().set_timeout(Duration::from_secs(5)).unwrap();
        let mut rest = Vec::new();
        let end = BorrowedStream(&client).read_to_end(&mut rest);
        assert!(
            end.as_ref().map_err(std::io::Error::kind).err() != Some(std::io::ErrorKind::WouldBlock),
            "case {n} is not dropped: {end:?} {rest:?}"
        );
    }
    assert!(is_kept(&site.judge(&[ALICE], MESSAGE)));
    assert_eq!(site.daemon.worker_pid(), worker, "the worker lives");
}

#[test]
fn a_connection_that_is_closed_for_what_it_said_is_logged_and_one_that_ends_by_itself_is_not() {
    let site = keeper().start();
    for polite in [true, false] {
        let mut mta = site.mta();
        if polite {
            mta.quit();
        } else {
            drop(mta);
        }
    }
    assert!(is_kept(&site.judge(&[ALICE], MESSAGE)));
    for bad in [Frame::new(b'M', *b"no nul").encode(), b"GET / HTTP/1.0\r\n\r\n".to_vec()] {
        let seen = site.daemon.log_lines().len();
        let mut mta = site.mta();
        mta.send_raw(&bad).unwrap();
        let line = site.daemon.wait_for_log_after(seen, "connection closed", PATIENCE);
        assert!(line.contains("makes no sense"), "{line}");
    }
    let closed = site.daemon.log_lines().iter().filter(|line| line.contains("connection closed")).count();
    assert_eq!(closed, 2, "{:?}", site.daemon.log_lines());
}

#[test]
fn a_thousand_recipients_are_one_question_to_each_user() {
    let many = "#!/bin/sh\necho \"$USERMILTER_RECIPIENTS\" | wc -l > ~/count\n: > ~/once.$$\necho \"no, $USER\"\nexit 77\n";
    let site = Site::of(&[("alice", 5001), ("bob", 5002)])
        .filter("alice", "message", many)
        .filter("bob", "message", many)
        .start();
    let addresses: Vec<String> = (0..1000)
        .map(|n| format!("{}+x{n}@test.example", if n % 2 == 0 { "alice" } else { "bob" }))
        .collect();
    let recipients: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let answer = site.judge(&recipients, MESSAGE);
    let text = answer.text();
    let lines: Vec<&str> = text.split("\r\n").collect();
    assert_eq!(lines.len(), 32, "{text}");
    assert_eq!(lines[0], "550-5.7.1 <alice+x0@test.example>: no, alice");
    assert_eq!(lines[31], "550 5.7.1 and 969 more recipients");
    for user in ["alice", "bob"] {
        assert_eq!(site.home_text(user, "count").trim(), "500");
        let home = fs::read_dir(&site.users.account(user).home).unwrap();
        assert_eq!(
            home.filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with("once")).count(),
            1
        );
    }
}

#[test]
fn recipients_that_make_no_sense_are_not_judged_and_not_refused_for_good() {
    let long = format!("<{}@test.example>", "x".repeat(3000));
    let strange: Vec<Vec<u8>> = vec![b"<>\0".to_vec(), b"\0".to_vec(), [long.as_bytes(), b"\0"].concat()];
    for (on_error, letter) in [("accept", 'c'), ("defer", 'y')] {
        let site = keeper().set("filter", "on-error", &format!("\"{on_error}\"")).start();
        let mut mta = site.mta();
        for argument in &strange {
            mta.macros('M', MAIL_MACROS);
            mta.mail(&["<s@sender.example>"]);
            let answer = mta.command(b'R', argument.clone());
            assert_eq!(answer.letter(), letter, "{:?}", argument.escape_ascii().to_string());
            assert!(letter == 'c' || answer.text().starts_with("451 4.3.0"), "{answer:?}");
            if letter == 'c' {
                assert_eq!(mta.data().letter(), 'a');
            }
            mta.abort();
            // Mail of our own people is no affair of ours, however it is addressed.
            mta.macros('M', &[MAIL_MACROS, &[("{auth_authen}", "anna"), ("{auth_type}", "PLAIN")]].concat());
            mta.mail(&["<\"open@sender.example>"]);
            assert_eq!(
                mta.command(b'R', argument.clone()).letter(),
                'c',
                "{:?}",
                argument.escape_ascii().to_string()
            );
            assert_eq!(mta.data().letter(), 'a');
            mta.abort();
        }
        site.daemon.wait_for_log("is not judged", PATIENCE);
    }
    // These do make sense, or are at least addresses, which nobody has.
    let site = keeper().start();
    for nobodys in [&b"<\xff\xfe@test.example>\0"[..], b"<a\x01b@test.example>\0", b"<@test.example>\0"] {
        let mut mta = site.mta();
        mta.macros('M', MAIL_MACROS);
        mta.mail(&["<s@sender.example>"]);
        assert_eq!(mta.command(b'R', nobodys).letter(), 'c', "{nobodys:?}");
        assert_eq!(mta.data().letter(), 'a');
    }
    for address in [
        "\"alice\"@test.example",
        "ALICE@TEST.EXAMPLE",
        "alice@test.example.",
        "@a.example,@b.example:alice@test.example",
        "alice",
    ] {
        assert!(is_kept(&site.judge(&[address], MESSAGE)), "{address}");
    }
    // An extension that no file name can hold is no way around the filter.
    let extension = format!("alice+{}@test.example", "x".repeat(400));
    assert!(is_kept(&site.judge(&[&extension], MESSAGE)));
    let extension = format!("alice+{}@test.example", "ü/../.x".repeat(20));
    assert!(is_kept(&site.judge(&[&extension], MESSAGE)));
}

#[test]
fn recipients_beyond_the_limit_are_put_off_and_the_others_judged() {
    let site = keeper().start();
    let mut mta = site.mta();
    mta.macros('M', MAIL_MACROS);
    mta.mail(&["<s@sender.example>"]);
    for n in 0..10_000 {
        assert_eq!(mta.rcpt(&[&format!("<alice+{n}@test.example>")]).letter(), 'c');
    }
    let answer = mta.rcpt(&["<alice+x@test.example>"]);
    assert_eq!(answer.text(), "452 4.5.3 too many recipients");
    assert!(is_kept(&send_message(&mut mta, MESSAGE)));
}

#[test]
fn a_sender_that_is_no_address_is_judged_and_one_that_is_too_long_is_our_trouble() {
    let long = format!("<{}@x.example>\0", "x".repeat(3000));
    for (on_error, expected) in
        [("accept", ""), ("defer", "451 4.3.0 cannot decide right now, try again later")]
    {
        let site = keeper().set("filter", "on-error", &format!("\"{on_error}\"")).start();
        let mut mta = site.mta();
        let mut ask = |sender: &[u8]| {
            mta.macros('M', MAIL_MACROS);
            mta.command(b'M', sender);
            mta.rcpt(&["<alice@test.example>"]);
            let answer = send_message(&mut mta, MESSAGE);
            mta.abort();
            answer
        };
        for sender in [&b"<\xff@x.example>\0"[..], b"<a\x02@x.example>\0", b"<\"open@x.example>\0"] {
            assert!(is_kept(&ask(sender)), "{sender:?}");
        }
        assert_eq!(ask(long.as_bytes()).text(), expected);
        assert!(is_kept(&send(&mut mta, "<>", &[ALICE], MESSAGE)));
    }
}

#[test]
fn the_milter_can_be_reached_over_a_unix_socket() {
    let builder = keeper();
    let run = builder.sandbox.directory("run");
    let address = format!("unix:{}", run.join("milter.sock").display());
    let site = builder.milter_at(&address).set("server", "socket-group", "\"postfix\"").start();
    assert!(is_kept(&site.judge(&[ALICE], MESSAGE)));
    let postfix = Postfix::builder().milter(&address).start();
    let mut client = smtp::Client::connect_as(postfix.port(), "192.0.2.10", "mx.sender.example");
    assert_eq!(client.send("s@sender.example", &[ALICE], MESSAGE).outcome().text(), "5.7.1 kept");
}

#[test]
fn a_connection_beyond_the_limit_is_closed_at_once_and_the_others_go_on() {
    let site = keeper().set("server", "max-connections", "3").start();
    let mut open: Vec<Client> = (0..3).map(|_| site.mta()).collect();
    let refused = Client::connect_only(site.milter_address());
    refused.stream().set_timeout(Duration::from_secs(5)).unwrap();
    let mut bytes = Vec::new();
    let end = BorrowedStream(&refused).read_to_end(&mut bytes).map_err(|e| e.kind());
    assert!(matches!(end, Ok(0) | Err(std::io::ErrorKind::ConnectionReset)), "{end:?}");
    site.daemon.wait_for_log("max-connections reached", PATIENCE);
    assert!(is_kept(&send(&mut open[0], "<s@sender.example>", &[ALICE], MESSAGE)));
    open.pop().unwrap().quit();
    let again = common::wait_until(PATIENCE, || {
        let mut client = Client::connect_only(site.milter_address());
        let offer: Vec<u8> =
            [6u32, ALL_ACTIONS, protocol::ALL].iter().flat_map(|n| n.to_be_bytes()).collect();
        client.send(&Frame::new(b'O', offer)).is_ok() && client.read_answer().is_ok()
    });
    assert!(again, "a place that is free again is taken");
}
