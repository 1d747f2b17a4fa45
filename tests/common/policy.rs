//! Postfix's side of the policy protocol (SMTPD_POLICY_README).

use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::time::Duration;

use super::stream::Stream;

/// A connection to a policy service.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<Stream>,
}

impl Client {
    /// Connects to `inet:127.0.0.1:PORT` or `unix:/path`.
    #[track_caller]
    pub fn connect(address: &str) -> Self {
        let stream = Stream::connect(address).unwrap_or_else(|e| panic!("policy service {address}: {e}"));
        Client { reader: BufReader::new(stream) }
    }

    /// Sends a request and returns the action; panics if there is none.
    #[track_caller]
    pub fn ask(&mut self, request: &Request) -> String {
        self.send_raw(&request.encode()).expect("policy request");
        self.read_action().expect("policy answer").expect("an action before the connection is closed")
    }

    /// Sends bytes as they are: parts of a request, several at once, or what is none.
    pub fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.reader.get_mut().write_all(bytes)
    }

    /// Reads one answer, `action=…` and an empty line; `None` if the connection is closed without one.
    ///
    /// # Errors
    ///
    /// The connection's errors, and `InvalidData` for anything that is not exactly one action.
    pub fn read_action(&mut self) -> io::Result<Option<String>> {
        let mut answer = Vec::new();
        if self.reader.read_until(b'\n', &mut answer)? == 0 {
            return Ok(None);
        }
        let mut empty = Vec::new();
        self.reader.read_until(b'\n', &mut empty)?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        match answer.strip_prefix("action=").and_then(|action| action.strip_suffix('\n')) {
            Some(action) if empty == b"\n" => Ok(Some(action.to_owned())),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("not a policy answer: {answer:?} {empty:?}"),
            )),
        }
    }

    /// How long a read waits from now on.
    pub fn set_timeout(&self, timeout: Duration) {
        self.reader.get_ref().set_timeout(timeout).unwrap();
    }

    /// Says that no request follows.
    pub fn shut_down_write(&self) {
        self.reader.get_ref().shut_down_write().unwrap();
    }
}

/// A request: the attributes that Postfix 3.7 sends, in its order.
#[derive(Clone, Debug)]
pub struct Request(Vec<(String, String)>);

impl Request {
    /// At RCPT TO, from mx.sender.example[192.0.2.10].
    pub fn rcpt(sender: &str, recipient: &str) -> Self {
        let mut attributes: Vec<(String, String)> =
            ATTRIBUTES.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        for (name, value) in &mut attributes {
            match name.as_str() {
                "sender" => *value = sender.to_owned(),
                "recipient" => *value = recipient.to_owned(),
                _ => {}
            }
        }
        Request(attributes)
    }

    /// Changes an attribute, or adds it at the end.
    pub fn with(mut self, name: &str, value: &str) -> Self {
        match self.0.iter_mut().find(|(other, _)| other == name) {
            Some(attribute) => attribute.1 = value.to_owned(),
            None => self.0.push((name.to_owned(), value.to_owned())),
        }
        self
    }

    /// Leaves an attribute out, as an older Postfix would.
    pub fn without(mut self, name: &str) -> Self {
        self.0.retain(|(other, _)| other != name);
        self
    }

    /// The bytes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        let lines: String = self.0.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
        (lines + "\n").into_bytes()
    }
}

/// The requests that a Postfix sent, byte for byte: `tests/captures/policy.txt`, each with the empty line
/// that ends it.
#[track_caller]
pub fn recorded_requests() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/captures/policy.txt");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.split_inclusive("\n\n").map(str::to_owned).collect()
}

const ATTRIBUTES: &[(&str, &str)] = &[
    ("request", "smtpd_access_policy"),
    ("protocol_state", "RCPT"),
    ("protocol_name", "ESMTP"),
    ("client_address", "192.0.2.10"),
    ("client_name", "mx.sender.example"),
    ("client_port", "46458"),
    ("reverse_client_name", "mx.sender.example"),
    ("server_address", "127.0.0.1"),
    ("server_port", "25"),
    ("helo_name", "mx.sender.example"),
    ("sender", ""),
    ("recipient", ""),
    ("recipient_count", "0"),
    ("queue_id", ""),
    ("instance", "27b5.6b0046a6.13e50.0"),
    ("size", "0"),
    ("etrn_domain", ""),
    ("stress", ""),
    ("sasl_method", ""),
    ("sasl_username", ""),
    ("sasl_sender", ""),
    ("ccert_subject", ""),
    ("ccert_issuer", ""),
    ("ccert_fingerprint", ""),
    ("ccert_pubkey_fingerprint", ""),
    ("encryption_protocol", ""),
    ("encryption_cipher", ""),
    ("encryption_keysize", "0"),
    ("policy_context", ""),
];
