//! The MTA's side of the milter protocol, frame by frame: for the order of things that no MTA would use, and
//! for sessions that one has used (`tests/captures`).
//!
//! A frame is a u32 length in network order (of what follows), a command byte, and data.

use std::io::{self, Read, Write};
use std::path::Path;

use super::stream::Stream;

/// No milter has a reason to send a longer frame.
const MAX_REPLY_FRAME: u32 = 64 * 1024 * 1024;

/// The most of a body that an MTA puts into a frame.
const BODY_CHUNK: usize = 65_535;

/// Protocol bits (SMFIP_* of libmilter's mfdef.h): what the milter does not want to see, and what it does not
/// answer.
pub mod protocol {
    pub const NO_CONNECT: u32 = 0x1;
    pub const NO_HELO: u32 = 0x2;
    pub const NO_MAIL: u32 = 0x4;
    pub const NO_RCPT: u32 = 0x8;
    pub const NO_BODY: u32 = 0x10;
    pub const NO_HEADERS: u32 = 0x20;
    pub const NO_EOH: u32 = 0x40;
    pub const NR_HEADER: u32 = 0x80;
    pub const NO_UNKNOWN: u32 = 0x100;
    pub const NO_DATA: u32 = 0x200;
    pub const SKIP: u32 = 0x400;
    pub const RCPT_REJECTED: u32 = 0x800;
    pub const NR_CONNECT: u32 = 0x1000;
    pub const NR_HELO: u32 = 0x2000;
    pub const NR_MAIL: u32 = 0x4000;
    pub const NR_RCPT: u32 = 0x8000;
    pub const NR_DATA: u32 = 0x1_0000;
    pub const NR_UNKNOWN: u32 = 0x2_0000;
    pub const NR_EOH: u32 = 0x4_0000;
    pub const NR_BODY: u32 = 0x8_0000;
    pub const LEADING_SPACE: u32 = 0x10_0000;
    /// What Postfix 3.7 and Sendmail 8.17 offer.
    pub const ALL: u32 = 0x1f_ffff;
}

/// Action bits (SMFIF_*) that Postfix 3.7 and Sendmail 8.17 offer.
pub const ALL_ACTIONS: u32 = 0x1ff;

/// A frame of either direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub command: u8,
    pub data: Vec<u8>,
}

impl Frame {
    pub fn new(command: u8, data: impl Into<Vec<u8>>) -> Self {
        Frame { command, data: data.into() }
    }

    /// The bytes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        let length = u32::try_from(self.data.len() + 1).expect("frame length");
        let mut bytes = length.to_be_bytes().to_vec();
        bytes.push(self.command);
        bytes.extend_from_slice(&self.data);
        bytes
    }

    /// Reads one frame.
    ///
    /// # Errors
    ///
    /// The stream's, `UnexpectedEof` at its end, and `InvalidData` for a length that makes no sense.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut length = [0; 4];
        from.read_exact(&mut length)?;
        let length = u32::from_be_bytes(length);
        if !(1..=MAX_REPLY_FRAME).contains(&length) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("frame of length {length}")));
        }
        let mut data = vec![0; length as usize];
        from.read_exact(&mut data)?;
        let command = data.remove(0);
        Ok(Frame { command, data })
    }
}

/// What a milter said to one command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The reply that ends it: `c`ontinue, `a`ccept, `r`eject, `t`empfail, repl`y` code, `d`iscard, `s`kip, …
    pub end: Frame,
    /// What came before it at end of message: changes of the message, in order.
    pub changes: Vec<Frame>,
    /// How many times it asked for patience (`p`).
    pub progress: usize,
    /// False if the milter had negotiated to say nothing here, which means continue.
    pub explicit: bool,
}

impl Answer {
    fn implied() -> Self {
        Answer { end: Frame::new(b'c', []), changes: Vec::new(), progress: 0, explicit: false }
    }

    /// The command byte of the final reply.
    pub fn letter(&self) -> char {
        char::from(self.end.command)
    }

    /// The SMTP reply of a `y`, as the MTA gets it: `550 5.7.1 text` (a doubled `%` stays doubled).
    pub fn text(&self) -> String {
        String::from_utf8_lossy(self.end.data.strip_suffix(b"\0").unwrap_or(&self.end.data)).into_owned()
    }
}

/// What was agreed on: the milter's answer to the offer.
#[derive(Clone, Debug, Default)]
pub struct Negotiated {
    pub version: u32,
    pub actions: u32,
    pub protocol: u32,
    /// Which macros it wants at which stage: (stage, names separated by spaces).
    pub macro_lists: Vec<(u32, String)>,
}

/// A milter connection, from the MTA's side. The methods panic when it breaks; [`Client::send`],
/// [`Client::send_raw`] and [`Client::read_answer`] are there for tests in which it may.
#[derive(Debug)]
pub struct Client {
    stream: Stream,
    negotiated: Negotiated,
}

impl Client {
    /// Connects to `inet:127.0.0.1:PORT` or `unix:/path` and negotiates as Postfix 3.7 does.
    #[track_caller]
    pub fn connect(address: &str) -> Self {
        let mut client = Client::connect_only(address);
        client.negotiate(6, ALL_ACTIONS, protocol::ALL);
        client
    }

    /// Connects without negotiating.
    #[track_caller]
    pub fn connect_only(address: &str) -> Self {
        let stream = Stream::connect(address).unwrap_or_else(|e| panic!("milter {address}: {e}"));
        Client { stream, negotiated: Negotiated::default() }
    }

    /// Offers a version, action and protocol bits, and remembers what the milter chose.
    #[track_caller]
    pub fn negotiate(&mut self, version: u32, actions: u32, protocol: u32) -> &Negotiated {
        let offer: Vec<u8> =
            [version, actions, protocol].iter().flat_map(|number| number.to_be_bytes()).collect();
        self.send(&Frame::new(b'O', offer)).expect("milter negotiation");
        let reply = Frame::read(&mut self.stream).expect("milter negotiation");
        assert_eq!(char::from(reply.command), 'O', "not an answer to the negotiation: {reply:?}");
        self.negotiated = parse_negotiation(&reply.data).expect("well-formed negotiation");
        &self.negotiated
    }

    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// Macros for a command: (name, value), names as `i` or `{mail_addr}`.
    #[track_caller]
    pub fn macros(&mut self, command: char, macros: &[(&str, &str)]) {
        let mut data = vec![command as u8];
        for (name, value) in macros {
            data.extend(strings(&[name, value]));
        }
        self.send(&Frame::new(b'D', data)).expect("milter macros");
    }

    /// A client by name and address: an IPv4 or IPv6 address, else of unknown family.
    #[track_caller]
    pub fn connected(&mut self, name: &str, address: &str, port: u16) -> Answer {
        let family = match address.parse() {
            Ok(std::net::IpAddr::V4(_)) => b'4',
            Ok(std::net::IpAddr::V6(_)) => b'6',
            Err(_) => b'U',
        };
        let mut data = strings(&[name]);
        data.push(family);
        if family != b'U' {
            data.extend(port.to_be_bytes());
            data.extend(strings(&[address]));
        }
        self.command(b'C', data)
    }

    #[track_caller]
    pub fn helo(&mut self, name: &str) -> Answer {
        self.command(b'H', strings(&[name]))
    }

    /// The arguments as on the wire: the address with its angle brackets, then ESMTP parameters.
    #[track_caller]
    pub fn mail(&mut self, arguments: &[&str]) -> Answer {
        self.command(b'M', strings(arguments))
    }

    /// As [`Client::mail`].
    #[track_caller]
    pub fn rcpt(&mut self, arguments: &[&str]) -> Answer {
        self.command(b'R', strings(arguments))
    }

    #[track_caller]
    pub fn data(&mut self) -> Answer {
        self.command(b'T', [])
    }

    #[track_caller]
    pub fn header(&mut self, name: &str, value: impl AsRef<[u8]>) -> Answer {
        let mut data = strings(&[name]);
        data.extend_from_slice(value.as_ref());
        data.push(0);
        self.command(b'L', data)
    }

    #[track_caller]
    pub fn end_of_headers(&mut self) -> Answer {
        self.command(b'N', [])
    }

    /// A body, in as many frames as an MTA would use; stops when the milter has heard enough.
    #[track_caller]
    pub fn body(&mut self, bytes: &[u8]) -> Answer {
        let mut answer = Answer::implied();
        for chunk in bytes.chunks(BODY_CHUNK) {
            answer = self.command(b'B', chunk);
            if answer.letter() != 'c' {
                break;
            }
        }
        answer
    }

    #[track_caller]
    pub fn end_of_message(&mut self) -> Answer {
        self.command(b'E', [])
    }

    #[track_caller]
    pub fn abort(&mut self) {
        self.command(b'A', []);
    }

    #[track_caller]
    pub fn quit(&mut self) {
        self.command(b'Q', []);
    }

    /// Sends a command and reads the answer, if the negotiation says that there is one; sends nothing if the
    /// milter asked not to see such commands.
    #[track_caller]
    pub fn command(&mut self, command: u8, data: impl Into<Vec<u8>>) -> Answer {
        let frame = Frame::new(command, data);
        let stage = char::from(command);
        if self.is_unwanted(command) {
            return Answer::implied();
        }
        self.send(&frame).unwrap_or_else(|e| panic!("milter command {stage}: {e}"));
        if !self.is_answered(command) {
            return Answer::implied();
        }
        self.read_answer().unwrap_or_else(|e| panic!("milter answer to {stage}: {e}"))
    }

    /// Sends a frame, whatever was negotiated.
    ///
    /// # Errors
    ///
    /// The connection's.
    pub fn send(&mut self, frame: &Frame) -> io::Result<()> {
        self.stream.write_all(&frame.encode())
    }

    /// Sends bytes that need not be a frame.
    ///
    /// # Errors
    ///
    /// The connection's.
    pub fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Reads frames up to the one that ends an answer.
    ///
    /// # Errors
    ///
    /// As [`Frame::read`].
    pub fn read_answer(&mut self) -> io::Result<Answer> {
        let mut answer = Answer { explicit: true, ..Answer::implied() };
        loop {
            let frame = Frame::read(&mut self.stream)?;
            match frame.command {
                b'p' => answer.progress += 1,
                b'+' | b'-' | b'2' | b'e' | b'b' | b'h' | b'i' | b'm' | b'q' | b'l' => {
                    answer.changes.push(frame)
                }
                _ => {
                    answer.end = frame;
                    return Ok(answer);
                }
            }
        }
    }

    /// The connection itself, for time-outs and half-closing.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    fn has(&self, bits: u32) -> bool {
        self.negotiated.protocol & bits != 0
    }

    /// Whether the milter asked not to see such commands.
    pub fn is_unwanted(&self, command: u8) -> bool {
        use protocol::*;
        match command {
            b'C' => self.has(NO_CONNECT),
            b'H' => self.has(NO_HELO),
            b'M' => self.has(NO_MAIL),
            b'R' => self.has(NO_RCPT),
            b'T' => self.has(NO_DATA) || self.negotiated.version < 4,
            b'L' => self.has(NO_HEADERS),
            b'N' => self.has(NO_EOH),
            b'B' => self.has(NO_BODY),
            b'U' => self.has(NO_UNKNOWN) || self.negotiated.version < 3,
            _ => false,
        }
    }

    fn is_answered(&self, command: u8) -> bool {
        use protocol::*;
        match command {
            b'C' => !self.has(NR_CONNECT),
            b'H' => !self.has(NR_HELO),
            b'M' => !self.has(NR_MAIL),
            b'R' => !self.has(NR_RCPT),
            b'T' => !self.has(NR_DATA),
            b'L' => !self.has(NR_HEADER),
            b'N' => !self.has(NR_EOH),
            b'B' => !self.has(NR_BODY),
            b'U' => !self.has(NR_UNKNOWN),
            b'A' | b'D' | b'K' | b'Q' => false,
            _ => true,
        }
    }
}

/// What an MTA sent in one recorded session.
#[derive(Clone, Debug)]
pub struct Capture {
    pub frames: Vec<Frame>,
}

impl Capture {
    /// The capture `tests/captures/NAME.c2s.bin`.
    #[track_caller]
    pub fn load(name: &str) -> Self {
        Capture { frames: read_frames(&format!("{name}.c2s.bin")) }
    }

    /// Sends the session to a milter as the MTA would have, had it been connected to this one, and returns
    /// every command that was sent with the answer.
    ///
    /// The recorded frames stay as they are; which of them are sent follows the milter's answers. Macros go
    /// with their command; what the milter does not want to see is left out; after a final answer (accept, or
    /// a refusal of the sender, of DATA or later) the rest of the message is; so is the rest of a body that
    /// is to be skipped. A header has the leading space that the recorded session had, so none, even if
    /// LEADING_SPACE is negotiated.
    #[track_caller]
    pub fn replay(&self, address: &str) -> Vec<(char, Answer)> {
        let mut client = Client::connect_only(address);
        let mut answers = Vec::new();
        let mut skipping = Skip::Nothing;
        for frame in &self.frames {
            let subject = match (frame.command, frame.data.first()) {
                (b'D', Some(&command)) => command,
                (command, _) => command,
            };
            if skipping.covers(subject) || client.is_unwanted(subject) {
                continue;
            }
            match frame.command {
                b'O' => {
                    let offer = parse_negotiation(&frame.data).expect("recorded negotiation");
                    client.negotiate(offer.version, offer.actions, offer.protocol);
                }
                b'D' => client.send(frame).expect("milter macros"),
                command => {
                    let answer = client.command(command, frame.data.clone());
                    skipping = Skip::after(command, &answer);
                    answers.push((char::from(command), answer));
                }
            }
        }
        answers
    }
}

/// What a milter said to the MTA in one recorded session: `tests/captures/NAME.s2c.bin`.
#[track_caller]
pub fn recorded_replies(name: &str) -> Vec<Frame> {
    read_frames(&format!("{name}.s2c.bin"))
}

/// The recorded frames that are left out after an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Skip {
    Nothing,
    Body,
    Message,
    Session,
}

impl Skip {
    fn after(command: u8, answer: &Answer) -> Self {
        match (command, answer.letter()) {
            (_, 'c') => Skip::Nothing,
            (b'B', 's') => Skip::Body,
            (b'C' | b'H', _) => Skip::Session,
            // A recipient is refused alone; accepting or discarding is about the message.
            (b'R', 'r' | 't' | 'y') | (b'E', _) => Skip::Nothing,
            _ => Skip::Message,
        }
    }

    fn covers(self, command: u8) -> bool {
        match self {
            Skip::Nothing => false,
            Skip::Body => command == b'B',
            Skip::Message => b"RTLNBE".contains(&command),
            Skip::Session => command != b'Q',
        }
    }
}

fn parse_negotiation(data: &[u8]) -> Option<Negotiated> {
    let number = |at: usize| Some(u32::from_be_bytes(data.get(at..at + 4)?.try_into().ok()?));
    let mut negotiated = Negotiated {
        version: number(0)?,
        actions: number(4)?,
        protocol: number(8)?,
        macro_lists: Vec::new(),
    };
    let mut at = 12;
    while at < data.len() {
        let stage = number(at)?;
        let names = data.get(at + 4..)?.split(|&byte| byte == 0).next()?;
        negotiated.macro_lists.push((stage, String::from_utf8_lossy(names).into_owned()));
        at += 4 + names.len() + 1;
    }
    Some(negotiated)
}

fn read_frames(file: &str) -> Vec<Frame> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/captures").join(file);
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut rest = bytes.as_slice();
    let mut frames = Vec::new();
    while !rest.is_empty() {
        frames.push(Frame::read(&mut rest).expect("recorded frame"));
    }
    frames
}

/// Each ended by NUL.
fn strings(strings: &[&str]) -> Vec<u8> {
    strings.iter().flat_map(|string| string.bytes().chain([0])).collect()
}
