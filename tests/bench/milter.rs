//! The MTA's side of the milter protocol as Postfix plays it: macros before their command, no wait where none was
//! agreed on, everything up to the next wait in one write, no more of a message after it was accepted.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use crate::common::Sandbox;
use crate::common::milter::{ALL_ACTIONS, Frame, protocol};
use crate::common::stream::Stream;
use crate::floors::{Floor, Running};
use crate::load::{Answered, Client, Side};
use crate::report::{Outcome, Round};
use crate::site::{self, PLAIN, SENDER, Site};
use crate::{Plan, load};

const CONNECTIONS: usize = 4;

pub(crate) fn no_filter(site: &Site, plan: Plan) -> Outcome {
    against(site, plan, &Floor::milter(), None)
}

pub(crate) fn against_libmilter(site: &Site, plan: Plan) -> Outcome {
    match Floor::libmilter(&Sandbox::new()) {
        Some(floor) => against(site, plan, &floor, Some(("floor of milter", &Floor::milter()))),
        None => Outcome::Skipped("no cc or no libmilter; apt-get install gcc libmilter-dev".into()),
    }
}

fn against(site: &Site, plan: Plan, floor: &Running, reference: Option<(&'static str, &Running)>) -> Outcome {
    let message = Message::new(&[PLAIN], 4096);
    let send = |address: &str| send(address, &message, CONNECTIONS, plan, End::Accepted);
    let side = |milter: &Running| Side::of(milter.servers(), || send(&milter.address)).measure();
    let ours = Side::of(site.servers(), || send(&site.milter));
    Outcome::Measured(load::rounds(plan, || Round {
        ours: ours.measure(),
        floor: side(floor),
        references: reference.iter().map(|(name, milter)| (*name, side(milter))).collect(),
    }))
}

/// Sends a message again and again.
pub(crate) fn send(address: &str, message: &Message, connections: usize, plan: Plan, end: End) -> Answered {
    load::ask(connections, plan, || Session::open(address, message, end))
}

/// How long each of the messages that are sent at these times has to wait for the answer to its end.
pub(crate) fn waits(address: &str, message: &Message, times: &[Duration], end: End) -> Vec<Duration> {
    /// More than are ever under way.
    const CONNECTIONS: usize = 32;
    let ask = |session: &mut Session| {
        session.ask_and_wait();
        session.asked.elapsed()
    };
    load::at_times(CONNECTIONS, times, || Session::open(address, message, end), ask)
}

/// What is expected of a message.
#[derive(Clone, Copy)]
pub(crate) enum End {
    Accepted,
    Refused,
}

impl End {
    fn is(self, answer: u8) -> bool {
        match self {
            Self::Accepted => matches!(answer, b'a' | b'c'),
            Self::Refused => answer == b'y',
        }
    }
}

/// A message with ten headers.
pub(crate) struct Message {
    recipients: Vec<String>,
    headers: Vec<(&'static str, &'static str)>,
    body: Vec<u8>,
}

impl Message {
    /// To these users, with about this many bytes.
    pub(crate) fn new(users: &[&str], size: usize) -> Self {
        let headers = vec![
            (
                "Received",
                "from a.example (a.example [192.0.2.1])\n\tby mx.sender.example with ESMTP id 4Zabc\
                \n\tfor <user@test.example>; Mon, 2 Nov 2026 00:00:00 +0000",
            ),
            ("DKIM-Signature", "v=1; a=ed25519-sha256; d=sender.example; s=x; h=from:to; bh=Zm9v; b=YmFy"),
            ("From", "Somebody <s@sender.example>"),
            ("To", "user@test.example"),
            ("Subject", "A message like many others"),
            ("Date", "Mon, 2 Nov 2026 00:00:00 +0000"),
            ("Message-ID", "<4Zabc.1@sender.example>"),
            ("MIME-Version", "1.0"),
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Transfer-Encoding", "8bit"),
        ];
        let header_size: usize = headers.iter().map(|(name, value)| name.len() + value.len() + 4).sum();
        let line = b"All work and no play makes Jack a dull boy, as every line of this body says.\r\n";
        let body = line.iter().copied().cycle().take(size - header_size - 2).collect();
        Self { recipients: users.iter().map(|user| site::address_of(user)).collect(), headers, body }
    }

    /// As one file.
    pub(crate) fn content(&self) -> Vec<u8> {
        let header: String =
            self.headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        [header.as_bytes(), b"\r\n", &self.body].concat()
    }
}

/// A connection on which one message is sent again and again.
pub(crate) struct Session {
    stream: Stream,
    /// What is written up to each wait, and the command whose answer is waited for.
    steps: Vec<(Vec<u8>, u8)>,
    end: End,
    is_first: bool,
    /// The step that is waited for, and since when.
    step: usize,
    asked: Instant,
    /// What has come of an answer.
    received: [u8; 512],
    length: usize,
}

/// What the milter wants.
struct Terms {
    protocol: u32,
    /// By stage, as SMFIM_* of libmilter's mfapi.h.
    macros: [String; 7],
}

impl Session {
    /// Connects, negotiates, and introduces the client.
    pub(crate) fn open(address: &str, message: &Message, end: End) -> Self {
        let mut stream = Stream::connect(address).unwrap();
        let offer: Vec<u8> =
            [6, ALL_ACTIONS, protocol::ALL].iter().flat_map(|number: &u32| number.to_be_bytes()).collect();
        stream.write_all(&Frame::new(b'O', offer).encode()).unwrap();
        let terms = Terms::read(&Frame::read(&mut stream).unwrap().data);
        let mut script = Script::new(&terms);
        script.command(b'C', &[b"mx.sender.example\x004\x9c\xbb192.0.2.10\0"]);
        script.command(b'H', &[b"mx.sender.example\0"]);
        let (introduction, rest) = (script.steps, script.pending);
        let mut script = Script::new(&terms);
        // Postfix ends each message with ABORT, which stays in its buffer until it has more to say.
        script.pending = Frame::new(b'A', []).encode();
        script.command(b'M', &[b"<", SENDER.as_bytes(), b">\0SIZE=4096\0"]);
        for recipient in &message.recipients {
            script.recipient(recipient);
        }
        script.command(b'T', &[]);
        for (name, value) in &message.headers {
            let space: &[u8] = if terms.has(protocol::LEADING_SPACE) { b" " } else { b"" };
            script.command(b'L', &[name.as_bytes(), b"\0", space, value.as_bytes(), b"\0"]);
        }
        script.command(b'N', &[]);
        for chunk in message.body.chunks(65_535) {
            script.command(b'B', &[chunk]);
        }
        script.command(b'E', &[]);
        let mut session = Self {
            stream,
            steps: Vec::new(),
            end,
            is_first: true,
            step: 0,
            asked: Instant::now(),
            received: [0; 512],
            length: 0,
        };
        for (bytes, command) in introduction {
            session.stream.write_all(&bytes).unwrap();
            assert_eq!(
                session.wait_for_answer(),
                b'c',
                "no wish to hear more than {:?}",
                char::from(command)
            );
        }
        session.stream.write_all(&rest).unwrap();
        session.steps = script.steps;
        session
    }

    /// Sends a message but for its end, with as many bytes in its body: the last chunk of this session's message again and
    /// again.
    pub(crate) fn send_unfinished(&mut self, size: usize) {
        let steps = std::mem::take(&mut self.steps);
        let (_, start) = steps.split_last().expect("an end of message");
        let (chunk, _) = start.last().expect("a body");
        let more = size.div_ceil(chunk.len());
        for bytes in start.iter().map(|(bytes, _)| bytes).chain(std::iter::repeat_n(chunk, more)) {
            let skipped = self.skipped();
            self.stream.write_all(&bytes[skipped..]).unwrap();
            assert_eq!(self.wait_for_answer(), b'c', "the milter wants no more of it");
        }
    }

    fn write_step(&mut self) {
        let skipped = self.skipped();
        self.asked = Instant::now();
        self.stream.write_all(&self.steps[self.step].0[skipped..]).unwrap();
    }

    /// Before the first message there is none to end.
    fn skipped(&mut self) -> usize {
        const ABORT_LENGTH: usize = 5;
        if std::mem::take(&mut self.is_first) { ABORT_LENGTH } else { 0 }
    }

    fn wait_for_answer(&mut self) -> u8 {
        loop {
            if let Some(answer) = self.read_answer() {
                return answer;
            }
        }
    }

    /// The command byte of the next answer, if it is complete with what comes now; requests for patience are granted.
    fn read_answer(&mut self) -> Option<u8> {
        let n = self.stream.read(&mut self.received[self.length..]).unwrap();
        assert!(n > 0, "the milter closed the connection");
        self.length += n;
        while let Some((header, _)) = self.received[..self.length].split_first_chunk() {
            let frame = 4 + u32::from_be_bytes(*header) as usize;
            if self.length < frame {
                break;
            }
            let command = self.received[4];
            self.received.copy_within(frame..self.length, 0);
            self.length -= frame;
            if command != b'p' {
                assert_eq!(self.length, 0, "more than one answer");
                return Some(command);
            }
        }
        None
    }
}

impl Client for Session {
    fn ask(&mut self) {
        self.step = 0;
        self.write_step();
    }

    /// Goes on with the message as far as the milter wants it.
    fn advance(&mut self) -> bool {
        let Some(answer) = self.read_answer() else { return false };
        let is_last = self.step + 1 == self.steps.len();
        if answer == b'c' && !is_last {
            self.step += 1;
            self.write_step();
            return false;
        }
        assert_ne!(self.steps[self.step].1, b'R', "a recipient was refused");
        assert!(self.end.is(answer), "the milter said {:?} of the message", char::from(answer));
        true
    }
}

impl Terms {
    fn read(data: &[u8]) -> Self {
        let number = |at: usize| u32::from_be_bytes(data[at..at + 4].try_into().unwrap());
        // Postfix's defaults (milter_*_macros), unless the milter asks for others.
        let mut macros = [
            "j {daemon_name} {daemon_addr} v _",
            "{tls_version} {cipher} {cipher_bits} {cert_subject} {cert_issuer}",
            "i {auth_type} {auth_authen} {auth_author} {mail_addr} {mail_host} {mail_mailer}",
            "i {rcpt_addr} {rcpt_host} {rcpt_mailer}",
            "i",
            "i",
            "i",
        ]
        .map(str::to_owned);
        let mut at = 12;
        while at < data.len() {
            let list = data[at + 4..].split(|byte| *byte == 0).next().unwrap();
            macros[number(at) as usize] = String::from_utf8_lossy(list).into_owned();
            at += 4 + list.len() + 1;
        }
        Self { protocol: number(8), macros }
    }

    fn has(&self, bit: u32) -> bool {
        self.protocol & bit != 0
    }

    /// Whether the milter does not want to see a command, whether it does not answer, and its macros.
    fn of(&self, command: u8) -> (bool, bool, &str) {
        use protocol::*;
        let (unwanted, quiet, stage) = match command {
            b'C' => (NO_CONNECT, NR_CONNECT, 0),
            b'H' => (NO_HELO, NR_HELO, 1),
            b'M' => (NO_MAIL, NR_MAIL, 2),
            b'R' => (NO_RCPT, NR_RCPT, 3),
            b'T' => (NO_DATA, NR_DATA, 4),
            b'L' => (NO_HEADERS, NR_HEADER, 6),
            b'N' => (NO_EOH, NR_EOH, 6),
            b'B' => (NO_BODY, NR_BODY, 5),
            _ => (0, 0, 5),
        };
        (self.has(unwanted), self.has(quiet), &self.macros[stage])
    }
}

/// Gathers what is written between two waits.
struct Script<'a> {
    terms: &'a Terms,
    pending: Vec<u8>,
    steps: Vec<(Vec<u8>, u8)>,
    has_queue_id: bool,
}

impl<'a> Script<'a> {
    fn new(terms: &'a Terms) -> Self {
        Self { terms, pending: Vec::new(), steps: Vec::new(), has_queue_id: false }
    }

    fn recipient(&mut self, address: &str) {
        self.command_to(b'R', &[b"<", address.as_bytes(), b">\0"], address);
        // From the first recipient on.
        self.has_queue_id = true;
    }

    fn command(&mut self, command: u8, data: &[&[u8]]) {
        self.command_to(command, data, "");
    }

    fn command_to(&mut self, command: u8, data: &[&[u8]], recipient: &str) {
        let (is_unwanted, is_quiet, macros) = self.terms.of(command);
        let mut definitions = vec![command];
        for name in macros.split_whitespace() {
            if let Some(value) = self.value(name, recipient) {
                definitions.extend([name.as_bytes(), b"\0", value.as_bytes(), b"\0"].concat());
            }
        }
        self.pending.extend(Frame::new(b'D', definitions).encode());
        if is_unwanted {
            return;
        }
        self.pending.extend(Frame::new(command, data.concat()).encode());
        if !is_quiet {
            self.steps.push((std::mem::take(&mut self.pending), command));
        }
    }

    /// A macro that has no value is not sent.
    fn value(&self, name: &str, recipient: &str) -> Option<String> {
        Some(match name {
            "i" if self.has_queue_id => "4cXyZ01Abcz9".to_owned(),
            "j" | "{daemon_name}" => "mx.test.example".to_owned(),
            "{daemon_addr}" => "127.0.0.1".to_owned(),
            "v" => "Postfix 3.7.11".to_owned(),
            "_" => "mx.sender.example [192.0.2.10]".to_owned(),
            "{client_addr}" => "192.0.2.10".to_owned(),
            "{client_name}" => "mx.sender.example".to_owned(),
            "{client_port}" => "40123".to_owned(),
            "{mail_addr}" => SENDER.to_owned(),
            "{mail_host}" => "sender.example".to_owned(),
            "{mail_mailer}" => "smtp".to_owned(),
            "{rcpt_addr}" => recipient.to_owned(),
            "{rcpt_host}" => "test.example".to_owned(),
            "{rcpt_mailer}" => "virtual".to_owned(),
            _ => return None,
        })
    }
}
