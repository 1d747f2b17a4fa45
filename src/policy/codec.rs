//! The form of Postfix policy requests and answers on the wire (SMTPD_POLICY_README), and nothing else.

use std::{borrow::Cow, io, ops::Range};

use memchr::memchr;
use tokio_util::{
    bytes::{Buf, BufMut, BytesMut},
    codec::{Decoder, Encoder},
};

/// Longest request, in bytes. Postfix sends about 1 KiB; a line of its own is at most 2 KiB by default.
pub const MAX_REQUEST_LENGTH: usize = 64 * 1024;

/// The attributes that are read, of the thirty that come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "SMTPD_POLICY_README describes them")]
pub enum Attribute {
    Request,
    ProtocolState,
    ProtocolName,
    ClientAddress,
    ClientName,
    HeloName,
    QueueId,
    Instance,
    Sender,
    Recipient,
    Size,
    SaslMethod,
    SaslUsername,
    SaslSender,
    EncryptionProtocol,
}

impl Attribute {
    const COUNT: usize = Self::EncryptionProtocol as usize + 1;

    fn named(name: &[u8]) -> Option<Self> {
        Some(match name {
            b"request" => Self::Request,
            b"protocol_state" => Self::ProtocolState,
            b"protocol_name" => Self::ProtocolName,
            b"client_address" => Self::ClientAddress,
            b"client_name" => Self::ClientName,
            b"helo_name" => Self::HeloName,
            b"queue_id" => Self::QueueId,
            b"instance" => Self::Instance,
            b"sender" => Self::Sender,
            b"recipient" => Self::Recipient,
            b"size" => Self::Size,
            b"sasl_method" => Self::SaslMethod,
            b"sasl_username" => Self::SaslUsername,
            b"sasl_sender" => Self::SaslSender,
            b"encryption_protocol" => Self::EncryptionProtocol,
            _ => return None,
        })
    }
}

/// A request. The values stay in the text that came: a string for each would be most of the work of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    text: BytesMut,
    values: Values,
}

/// Where in the text the values are; empty: the attribute did not come, or without a value.
type Values = [Range<usize>; Attribute::COUNT];

impl Request {
    /// The value of an attribute, if it came and is not empty. Of several the last counts, as in Postfix.
    pub fn bytes(&self, attribute: Attribute) -> Option<&[u8]> {
        let value = &self.text[self.values[attribute as usize].clone()];
        (!value.is_empty()).then_some(value)
    }

    /// The same as text. Strangers choose some values, which then need not be UTF-8.
    pub fn get(&self, attribute: Attribute) -> Option<Cow<'_, str>> {
        // Mostly they are, which this finds out sooner.
        let text =
            |value| std::str::from_utf8(value).map_or_else(|_| String::from_utf8_lossy(value), Cow::Borrowed);
        self.bytes(attribute).map(text)
    }
}

/// A connection that speaks something else.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// More than [`MAX_REQUEST_LENGTH`] bytes without an empty line.
    #[error("request is too long")]
    TooLong,
    /// A line without `=`, with an empty name, or with a NUL.
    #[error("malformed request")]
    Malformed,
    /// The client went away in the middle of a request, or the network failed.
    #[error("connection failed")]
    Io(#[from] io::Error),
}

/// Reads requests, writes actions.
#[derive(Debug, Default)]
pub struct PolicyCodec {
    /// Bytes of the buffer that are whole lines, each an attribute: looked at as they come, since whoever speaks something
    /// else may never send an empty line.
    parsed: usize,
    /// The attributes of these lines.
    values: Values,
}

impl Decoder for PolicyCodec {
    type Item = Request;
    type Error = CodecError;

    fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Request>, CodecError> {
        while let Some(length) = memchr(b'\n', &buffer[self.parsed..]) {
            let (start, end) = (self.parsed, self.parsed + length);
            if end >= MAX_REQUEST_LENGTH {
                return Err(CodecError::TooLong);
            }
            let line = &buffer[start..end];
            if line.is_empty() && start > 0 {
                let Self { values, .. } = std::mem::take(self);
                let text = buffer.split_to(start);
                buffer.advance(1);
                return if memchr(b'\0', &text).is_some() {
                    Err(CodecError::Malformed)
                } else {
                    Ok(Some(Request { text, values }))
                };
            }
            // Names are short: to look at each byte is quicker than to set up a search.
            let equals = match line.iter().position(|byte| *byte == b'=') {
                None | Some(0) => return Err(CodecError::Malformed),
                Some(length) => length,
            };
            if let Some(attribute) = Attribute::named(&line[..equals]) {
                self.values[attribute as usize] = start + equals + 1..end;
            }
            self.parsed = end + 1;
        }
        if buffer.len() > MAX_REQUEST_LENGTH { Err(CodecError::TooLong) } else { Ok(None) }
    }
}

impl Encoder<&str> for PolicyCodec {
    type Error = CodecError;

    fn encode(&mut self, action: &str, buffer: &mut BytesMut) -> Result<(), CodecError> {
        // An action is ours or comes from `Reply`, which lets no line end through.
        buffer.reserve(action.len() + 9);
        buffer.put_slice(b"action=");
        buffer.put_slice(action.as_bytes());
        buffer.put_slice(b"\n\n");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode_in_pieces(bytes: &[u8], cuts: &[usize]) -> (Vec<Request>, Option<CodecError>) {
        let (mut codec, mut buffer, mut requests) = (PolicyCodec::default(), BytesMut::new(), Vec::new());
        let mut start = 0;
        for end in cuts.iter().copied().chain([bytes.len()]) {
            buffer.extend_from_slice(&bytes[start..end]);
            start = end;
            loop {
                match codec.decode(&mut buffer) {
                    Ok(Some(request)) => requests.push(request),
                    Ok(None) => break,
                    Err(error) => return (requests, Some(error)),
                }
            }
        }
        (requests, None)
    }

    #[test]
    fn requests_come_whole_pipelined_or_byte_by_byte() {
        let bytes = b"request=smtpd_access_policy\nsender=a=b\nhelo_name=\n\nrequest=x\n\nrequ";
        let all: Vec<usize> = (0..=bytes.len()).collect();
        for cuts in [&[][..], &all] {
            let (requests, error) = decode_in_pieces(bytes, cuts);
            assert!(error.is_none());
            assert_eq!(requests.len(), 2);
            assert_eq!(requests[0].get(Attribute::Sender), Some("a=b".into()));
            assert_eq!(requests[0].get(Attribute::HeloName), None);
            assert_eq!(requests[1].get(Attribute::Request), Some("x".into()));
        }
    }

    #[test]
    fn values_are_bytes() {
        let (requests, error) = decode_in_pieces(b"sender=b\xf6se@x.example\n\n", &[]);
        assert!(error.is_none());
        assert_eq!(requests[0].bytes(Attribute::Sender), Some(&b"b\xf6se@x.example"[..]));
        assert_eq!(requests[0].get(Attribute::Sender), Some("b\u{fffd}se@x.example".into()));
    }

    #[test]
    fn what_is_no_request_is_an_error() {
        for bytes in [&b"nonsense\n\n"[..], b"=x\n\n", b"a=\0\n\n", b"\n\n", b"a=b\r\n\r\n\n\n"] {
            assert!(matches!(decode_in_pieces(bytes, &[]).1, Some(CodecError::Malformed)), "{bytes:?}");
        }
        // Nobody who speaks something else need send an empty line.
        for bytes in
            [&b"\n"[..], b"nonsense\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"a=b\r\n\r\n", b"a=b\n=x\nc"]
        {
            let all: Vec<usize> = (0..=bytes.len()).collect();
            for cuts in [&[][..], &all] {
                assert!(matches!(decode_in_pieces(bytes, cuts).1, Some(CodecError::Malformed)), "{bytes:?}");
            }
        }
        let long = vec![b'a'; MAX_REQUEST_LENGTH + 1];
        assert!(matches!(decode_in_pieces(&long, &[]).1, Some(CodecError::TooLong)));
        let many = "a=b\n".repeat(MAX_REQUEST_LENGTH / 4) + "\n";
        assert!(matches!(decode_in_pieces(many.as_bytes(), &[]).1, Some(CodecError::TooLong)));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(
            lines in prop::collection::vec((prop_oneof!["[a-z_]{1,12}", Just("sender".into()), Just("helo_name".into())], "[^\n\0]{0,30}"), 1..40),
        ) {
            let text: String = lines.iter().map(|(name, value): &(String, String)| format!("{name}={value}\n")).collect();
            let (requests, error) = decode_in_pieces((text + "\n").as_bytes(), &[]);
            prop_assert!(error.is_none() && requests.len() == 1);
            for (name, attribute) in [("sender", Attribute::Sender), ("helo_name", Attribute::HeloName)] {
                // Of several the last counts.
                let last = lines.iter().rfind(|(other, _)| other == name).map(|(_, value)| value.as_bytes());
                prop_assert_eq!(requests[0].bytes(attribute).unwrap_or_default(), last.unwrap_or_default());
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic_and_cuts_do_not_matter(
            bytes in prop::collection::vec(prop_oneof![Just(b'\n'), Just(b'='), any::<u8>()], 0..100),
            cuts in prop::collection::vec(0usize..100, 0..5),
        ) {
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.sort_unstable();
            let (whole, pieces) = (decode_in_pieces(&bytes, &[]), decode_in_pieces(&bytes, &cuts));
            prop_assert_eq!(whole.0, pieces.0);
            prop_assert_eq!(whole.1.is_some(), pieces.1.is_some());
        }
    }
}
