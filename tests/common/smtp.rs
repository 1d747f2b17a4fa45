//! A small blocking SMTP client that remembers who said what.

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

/// Longer than any milter time-out of the tests' Postfix, so that its answer is seen and not ours.
const TIMEOUT: Duration = Duration::from_secs(90);

/// The body lines that a transcript shows of a message.
const TRANSCRIPT_MESSAGE_LINES: usize = 12;

/// A reply: its code and the text of every line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub code: u16,
    pub lines: Vec<String>,
}

impl Reply {
    /// Reads one reply, of as many lines as it has (RFC 5321 §4.2.1).
    ///
    /// # Errors
    ///
    /// The connection's errors, `UnexpectedEof` at its end, and `InvalidData` for what is no reply.
    pub fn read(from: &mut impl BufRead) -> io::Result<Self> {
        let mut lines = Vec::new();
        let mut first_code = None;
        loop {
            let mut raw = Vec::new();
            from.read_until(b'\n', &mut raw)?;
            if raw.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let line = String::from_utf8_lossy(&raw).into_owned();
            let malformed =
                || io::Error::new(io::ErrorKind::InvalidData, format!("not an SMTP reply: {line:?}"));
            let text = line.strip_suffix("\r\n").ok_or_else(malformed)?;
            let code = text.get(..3).and_then(|digits| digits.parse::<u16>().ok()).ok_or_else(malformed)?;
            if *first_code.get_or_insert(code) != code {
                return Err(malformed());
            }
            lines.push(text.get(4..).unwrap_or_default().to_owned());
            match text.as_bytes().get(3) {
                None | Some(b' ') => return Ok(Reply { code, lines }),
                Some(b'-') => {}
                Some(_) => return Err(malformed()),
            }
        }
    }

    /// The text without codes, lines joined by `\n`.
    pub fn text(&self) -> String {
        self.lines.join("\n")
    }

    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.code)
    }
}

/// An SMTP session. The methods panic, with the transcript, when the connection breaks; [`Client::send_raw`]
/// and [`Client::read_reply`] are there for tests in which it may.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<TcpStream>,
    greeting: Reply,
    transcript: String,
}

impl Client {
    /// Connects to a port of 127.0.0.1 and reads the greeting.
    #[track_caller]
    pub fn connect(port: u16) -> Self {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("connect to the SMTP server");
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.set_write_timeout(Some(TIMEOUT)).unwrap();
        stream.set_nodelay(true).unwrap();
        let greeting = Reply { code: 0, lines: Vec::new() };
        let mut client = Client { reader: BufReader::new(stream), greeting, transcript: String::new() };
        client.greeting = client.expect_reply();
        client
    }

    /// Connects and has Postfix see a client of this address and name (XCLIENT), which then says EHLO.
    #[track_caller]
    pub fn connect_as(port: u16, address: &str, name: &str) -> Self {
        let mut client = Client::connect(port);
        client.ehlo("localhost");
        let reply = client.xclient(&[("NAME", name), ("ADDR", address)]);
        assert_eq!(reply.code, 220, "XCLIENT refused\n{}", client.transcript());
        client.ehlo(name);
        client
    }

    pub fn greeting(&self) -> &Reply {
        &self.greeting
    }

    #[track_caller]
    pub fn ehlo(&mut self, name: &str) -> Reply {
        self.command(&format!("EHLO {name}"))
    }

    /// Plays another client: NAME, ADDR (`192.0.2.10` or `IPV6:2001:db8::7`), HELO, PROTO, LOGIN, …
    /// (XCLIENT_README).
    ///
    /// Postfix starts over, so the reply is a greeting (220) and EHLO has to be said again.
    #[track_caller]
    pub fn xclient(&mut self, attributes: &[(&str, &str)]) -> Reply {
        let attributes: Vec<String> =
            attributes.iter().map(|(name, value)| format!("{name}={}", xtext(value))).collect();
        self.command(&format!("XCLIENT {}", attributes.join(" ")))
    }

    /// MAIL FROM; the address without angle brackets (empty: the null sender), parameters as `SIZE=1000
    /// BODY=8BITMIME`.
    #[track_caller]
    pub fn mail_from(&mut self, address: &str, parameters: &str) -> Reply {
        self.command(format!("MAIL FROM:<{address}> {parameters}").trim_end())
    }

    #[track_caller]
    pub fn rcpt_to(&mut self, address: &str) -> Reply {
        self.command(&format!("RCPT TO:<{address}>"))
    }

    /// DATA and a message with any line endings: lone LFs become CRLF, leading dots are doubled. The reply to
    /// DATA itself if that is not 354, else to the message.
    #[track_caller]
    pub fn data(&mut self, message: &[u8]) -> Reply {
        self.data_raw(&wire_form(message))
    }

    /// DATA and exactly these bytes, the final dot included.
    #[track_caller]
    pub fn data_raw(&mut self, bytes: &[u8]) -> Reply {
        let reply = self.command("DATA");
        if reply.code != 354 {
            return reply;
        }
        self.note_message(bytes);
        if let Err(error) = self.reader.get_mut().write_all(bytes) {
            panic!("SMTP write: {error}\n{}", self.transcript);
        }
        self.expect_reply()
    }

    #[track_caller]
    pub fn rset(&mut self) -> Reply {
        self.command("RSET")
    }

    #[track_caller]
    pub fn quit(&mut self) -> Reply {
        self.command("QUIT")
    }

    /// A whole transaction: the replies to MAIL FROM, to each RCPT TO, and to the message if any recipient
    /// was accepted.
    #[track_caller]
    pub fn send(&mut self, sender: &str, recipients: &[&str], message: &[u8]) -> Sent {
        let mail = self.mail_from(sender, "");
        let recipients: Vec<Reply> = recipients.iter().map(|recipient| self.rcpt_to(recipient)).collect();
        let data = recipients.iter().any(Reply::is_success).then(|| self.data(message));
        if data.is_none() {
            self.rset();
        }
        Sent { mail, recipients, data }
    }

    /// Sends a line and reads the reply.
    #[track_caller]
    pub fn command(&mut self, line: &str) -> Reply {
        if let Err(error) = self.send_raw(format!("{line}\r\n").as_bytes()) {
            panic!("SMTP write: {error}\n{}", self.transcript);
        }
        self.expect_reply()
    }

    /// Sends bytes as they are: several commands at once (pipelining), or what is no command.
    pub fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        for line in String::from_utf8_lossy(bytes).lines() {
            let _ = writeln!(self.transcript, "C: {line}");
        }
        self.reader.get_mut().write_all(bytes)
    }

    /// Reads the next reply.
    ///
    /// # Errors
    ///
    /// As [`Reply::read`].
    pub fn read_reply(&mut self) -> io::Result<Reply> {
        let reply = Reply::read(&mut self.reader)?;
        for (number, line) in reply.lines.iter().enumerate() {
            let separator = if number + 1 < reply.lines.len() { '-' } else { ' ' };
            let _ = writeln!(self.transcript, "S: {}{separator}{line}", reply.code);
        }
        Ok(reply)
    }

    /// Who said what, in lines that begin with `S: ` or `C: `; of a message only its beginning.
    pub fn transcript(&self) -> &str {
        &self.transcript
    }

    #[track_caller]
    fn expect_reply(&mut self) -> Reply {
        match self.read_reply() {
            Ok(reply) => reply,
            Err(error) => panic!("SMTP read: {error}\n{}", self.transcript),
        }
    }

    fn note_message(&mut self, bytes: &[u8]) {
        let text = String::from_utf8_lossy(bytes);
        let lines: Vec<&str> = text.lines().collect();
        let shown =
            if lines.len() <= TRANSCRIPT_MESSAGE_LINES + 1 { lines.len() } else { TRANSCRIPT_MESSAGE_LINES };
        for line in &lines[..shown] {
            let _ = writeln!(self.transcript, "C: {line}");
        }
        if shown < lines.len() {
            let _ = writeln!(
                self.transcript,
                "C: [{} more lines, {} bytes in all]",
                lines.len() - shown,
                bytes.len()
            );
        }
    }
}

/// What the server said in a transaction.
#[derive(Debug)]
pub struct Sent {
    pub mail: Reply,
    pub recipients: Vec<Reply>,
    /// To the message (or to DATA, if that was refused); `None` if no recipient was accepted.
    pub data: Option<Reply>,
}

impl Sent {
    /// The reply to the message; panics if it was not sent.
    #[track_caller]
    pub fn outcome(&self) -> &Reply {
        self.data.as_ref().unwrap_or_else(|| panic!("no recipient was accepted: {:?}", self.recipients))
    }
}

/// CRLF line endings, doubled leading dots, a last line that ends, and the final dot.
fn wire_form(message: &[u8]) -> Vec<u8> {
    let mut wire = Vec::with_capacity(message.len() + message.len() / 32 + 5);
    for line in message.split_inclusive(|&byte| byte == b'\n') {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.starts_with(b".") {
            wire.push(b'.');
        }
        wire.extend_from_slice(line);
        wire.extend_from_slice(b"\r\n");
    }
    wire.extend_from_slice(b".\r\n");
    wire
}

/// RFC 3461 §4: `+`, `=` and what is not printable ASCII as `+XX`.
fn xtext(value: &str) -> String {
    let mut encoded = String::with_capacity(value.len());
    for byte in value.bytes() {
        if byte.is_ascii_graphic() && byte != b'+' && byte != b'=' {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "+{byte:02X}");
        }
    }
    encoded
}
