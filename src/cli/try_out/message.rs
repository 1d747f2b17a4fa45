//! A message in a file, as an MTA would hand it over.

use std::io;

use jiff::Timestamp;

use crate::{
    config::Config,
    spool::{Message, Spool, SpoolSettings},
    trace_headers,
    transaction::Envelope,
};

/// The message as it would come from an MTA called `host`, at `date`: whatever its line ends are, a filter sees those of
/// the configuration.
///
/// # Errors
///
/// If it can't be kept.
pub(super) fn spool(
    config: &Config,
    envelope: &Envelope,
    host: &str,
    date: Timestamp,
    text: &[u8],
) -> io::Result<Message> {
    let mut spool = Spool::new(SpoolSettings::new(&config.filter), Some(text.len() as u64))?;
    if config.filter.trace_headers {
        trace_headers::write(&mut spool, envelope, host, date)?;
    }
    let wire = with_crlf(without_mbox_line(text));
    let (fields, body) = take_apart(&wire);
    for (name, value) in fields {
        spool.header(name, &value)?;
    }
    spool.end_of_headers()?;
    spool.body(body)?;
    spool.finish()
}

/// A message out of an mbox begins with a line that is none of its own.
fn without_mbox_line(text: &[u8]) -> &[u8] {
    match text.iter().position(|byte| *byte == b'\n') {
        Some(end) if text.starts_with(b"From ") => &text[end + 1..],
        _ => text,
    }
}

/// Lines end in CRLF on the wire, whether the text has them so or as LF; the last one too.
fn with_crlf(text: &[u8]) -> Vec<u8> {
    let mut wire = Vec::with_capacity(text.len() + text.len() / 40 + 2);
    for (n, byte) in text.iter().enumerate() {
        if *byte == b'\n' && (n == 0 || text[n - 1] != b'\r') {
            wire.push(b'\r');
        }
        wire.push(*byte);
    }
    if !wire.is_empty() && !wire.ends_with(b"\n") {
        wire.extend_from_slice(b"\r\n");
    }
    wire
}

/// Name and value of a header field.
type Field<'a> = (&'a [u8], Vec<u8>);

/// Names and values of the header as a milter gets them, folds as bare LF, and the body. The header ends at an empty
/// line, or where a line can't belong to it, which Postfix takes for the first of the body.
fn take_apart(wire: &[u8]) -> (Vec<Field<'_>>, &[u8]) {
    let mut fields: Vec<Field<'_>> = Vec::new();
    let mut rest = wire;
    while let Some(end) = rest.windows(2).position(|window| window == b"\r\n") {
        let (line, after) = (&rest[..end], &rest[end + 2..]);
        let is_name = |name: &[u8]| !name.is_empty() && name.iter().all(u8::is_ascii_graphic);
        let colon = line.iter().position(|byte| *byte == b':');
        match (line.first(), colon, fields.last_mut()) {
            (None, ..) => return (fields, after),
            (Some(b' ' | b'\t'), _, Some((_, value))) => {
                value.push(b'\n');
                value.extend_from_slice(line);
            }
            (Some(_), Some(colon), _) if is_name(line[..colon].trim_ascii_end()) => {
                fields.push((line[..colon].trim_ascii_end(), line[colon + 1..].to_vec()));
            }
            _ => return (fields, rest),
        }
        rest = after;
    }
    (fields, rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_taken_apart_as_a_milter_gets_it() {
        for text in [&b"A: 1\n 2\nB:3\n\nx\ny"[..], b"A: 1\r\n 2\r\nB:3\r\n\r\nx\r\ny"] {
            let wire = with_crlf(text);
            let expected: Vec<Field<'_>> = vec![(b"A", b" 1\n 2".to_vec()), (b"B", b"3".to_vec())];
            assert_eq!(take_apart(&wire), (expected, &b"x\r\ny\r\n"[..]));
        }
        assert_eq!(take_apart(b"\r\nbody\r\n"), (vec![], &b"body\r\n"[..]));
        assert_eq!(take_apart(b"A: 1\r\n"), (vec![(&b"A"[..], b" 1".to_vec())], &b""[..]));
        assert_eq!(take_apart(b"no header\r\nx\r\n").1, b"no header\r\nx\r\n");
        assert_eq!(take_apart(b""), (vec![], &b""[..]));
        assert_eq!(without_mbox_line(b"From x@y Mon\nA: 1\n"), b"A: 1\n");
        assert_eq!(without_mbox_line(b"From: x\n"), b"From: x\n");
    }
}
