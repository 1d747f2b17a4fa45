//! One mail transaction, from MAIL FROM to end of message (RFC 5321 §3.3), as both interfaces hand it inward.

use std::{net::IpAddr, sync::Arc};

use crate::address::Sender;

/// Who talks to the MTA. Everything in it is a stranger's word, except what the MTA found out by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Client {
    /// The address; `None` if the MTA does not know it.
    pub address: Option<IpAddr>,
    /// The host name, only if its address record leads back to the address.
    pub name: Option<String>,
    /// HELO or EHLO argument.
    pub helo: Option<String>,
    /// `SMTP` or `ESMTP`.
    pub protocol: String,
    /// Who authenticated, if anybody did (RFC 4954).
    pub sasl: Option<Sasl>,
    /// TLS protocol, as `TLSv1.3`; `None`: in the clear.
    pub tls: Option<String>,
    /// Whether the mail was submitted on this host without SMTP (sendmail(1)).
    pub is_local: bool,
}

/// An authenticated client.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Sasl {
    /// The name.
    pub username: String,
    /// The mechanism.
    pub method: String,
    /// The AUTH= parameter of MAIL FROM.
    pub sender: String,
}

/// What is known of a transaction before any recipient is.
#[derive(Clone, Debug)]
pub struct Envelope {
    /// Which interface asks.
    pub interface: Interface,
    /// The MTA's name for the message, if it has given one yet.
    pub queue_id: Option<String>,
    /// Who delivers it.
    pub client: Arc<Client>,
    /// MAIL FROM.
    pub sender: Sender,
    /// SIZE= of MAIL FROM (RFC 1870), in bytes.
    pub declared_size: Option<u64>,
    /// Whether SMTPUTF8 was asked for (RFC 6531).
    pub smtputf8: bool,
}

impl Envelope {
    /// The queue id, or what Postfix writes when there is none.
    pub fn queue_id(&self) -> &str {
        self.queue_id.as_deref().unwrap_or("NOQUEUE")
    }
}

/// Longest queue id that is one, in bytes; Postfix' have 10 to 20, Sendmail's 14.
const MAX_QUEUE_ID_LENGTH: usize = 64;

/// A queue id as an MTA gives it. It stands in front of every line that tells of a mail, so what is none is left out,
/// whoever gave it: it could make a line of its own.
pub fn queue_id(text: &str) -> Option<String> {
    let is_one = (1..=MAX_QUEUE_ID_LENGTH).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    is_one.then(|| text.to_owned())
}

/// The two ways in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Interface {
    /// Sendmail's mail filter protocol.
    Milter,
    /// Postfix access policy delegation.
    Policy,
}

impl Interface {
    /// The word used in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Milter => "milter",
            Self::Policy => "policy",
        }
    }
}

/// A recipient as the MTA named it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecipientArgument {
    /// The argument of RCPT TO, byte for byte (an MTA that is to delete the recipient wants it back so).
    pub raw: Vec<u8>,
    /// The mailer that will deliver, as the milter macro `{rcpt_mailer}` says.
    pub mailer: Option<String>,
    /// The mailbox that the MTA has resolved the argument to, macro `{rcpt_addr}`.
    pub mailbox: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_id_can_not_make_a_line() {
        for good in ["4QUEUEID", "4dCJ3b1xYzz1k", "5AKHAbcd012345", "5AKHAbcd012345-1"] {
            assert_eq!(queue_id(good).as_deref(), Some(good));
        }
        for bad in
            ["", "4Q\nNOQUEUE: accept", "4Q\u{1b}[2J", "4Q: accept outcome=", "4\u{2028}", &"4".repeat(65)]
        {
            assert_eq!(queue_id(bad), None, "{bad:?}");
        }
    }
}
