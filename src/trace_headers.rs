//! What a delivery agent would see on top of a message: Return-Path and Received (RFC 5321 §4.4).
//!
//! The MTA adds its own Received only when the milters are through, so that a filter would not know the client. No
//! recipient is named: others read the same file.

use std::{io, net::IpAddr};

use jiff::Timestamp;

use crate::{spool::Spool, transaction::Envelope};

/// Writes both fields. `host`: the MTA's name; `date`: when the mail came.
///
/// # Errors
///
/// If the spool can't be written.
pub fn write(spool: &mut Spool, envelope: &Envelope, host: &str, date: Timestamp) -> io::Result<()> {
    spool.header(b"Return-Path", format!(" <{}>", envelope.sender).as_bytes())?;
    spool.header(b"Received", received(envelope, host, date).as_bytes())
}

fn received(envelope: &Envelope, host: &str, date: Timestamp) -> String {
    let client = &envelope.client;
    let date = date.to_zoned(jiff::tz::TimeZone::UTC);
    let date = jiff::fmt::rfc2822::to_string(&date).unwrap_or_default();
    let helo = client.helo.as_deref().unwrap_or("unknown");
    let name = client.name.as_deref().unwrap_or("unknown");
    let address = match client.address {
        Some(IpAddr::V6(address)) => format!("IPv6:{address}"),
        Some(address) => address.to_string(),
        None => "unknown".into(),
    };
    // RFC 3848
    let with = match (&client.tls, &client.sasl) {
        (Some(_), Some(_)) => "ESMTPSA",
        (Some(_), None) => "ESMTPS",
        (None, Some(_)) => "ESMTPA",
        (None, None) => "ESMTP",
    };
    format!(
        " from {} ({} [{address}])\n\tby {} (usermilter) with {with} id {};\n\t{date}",
        atom(helo),
        atom(name),
        atom(host),
        atom(envelope.queue_id()),
    )
}

/// A stranger's word with nothing in it that could end the field or a comment.
fn atom(text: &str) -> String {
    let unsafe_here = |c: char| c.is_control() || matches!(c, ' ' | '(' | ')' | '\\' | '"' | ';');
    text.chars().map(|c| if unsafe_here(c) { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        address::Sender,
        transaction::{Client, Interface},
    };
    use std::sync::Arc;

    #[test]
    fn the_field_says_who_the_client_is_and_can_not_be_forged() {
        let client = Client {
            address: Some("2001:db8::7".parse().unwrap()),
            helo: Some("evil (mx.example [192.0.2.1])\n\tby x".into()),
            tls: Some("TLSv1.3".into()),
            ..Client::default()
        };
        let envelope = Envelope {
            interface: Interface::Milter,
            queue_id: Some("4Bx".into()),
            client: Arc::new(client),
            sender: Sender::Null,
            declared_size: None,
            smtputf8: false,
        };
        let field = received(&envelope, "mx.example.org", Timestamp::UNIX_EPOCH);
        let start =
            " from evil??mx.example?[192.0.2.1]???by?x (unknown [IPv6:2001:db8::7])\n\tby mx.example.org ";
        assert!(field.starts_with(start), "{field}");
        assert!(field.contains(" with ESMTPS id 4Bx;\n\tThu, 1 Jan 1970 "), "{field}");
    }
}
