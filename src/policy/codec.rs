//! The form of Postfix policy requests and answers on the wire (SMTPD_POLICY_README), and nothing else.

use std::{borrow::Cow, io, ops::Range};

use memchr::{memchr, memchr_iter, memmem, memrchr};
use tokio_util::{
    bytes::{BufMut, BytesMut},
    codec::{Decoder, Encoder},
};

/// Longest request, in bytes. Postfix sends about 1 KiB; a line of its own is at most 2 KiB by default.
pub const MAX_REQUEST_LENGTH: usize = 64 * 1024;

/// Most attributes of a request; Postfix 3.9 sends 30.
pub(super) const MAX_ATTRIBUTES: usize = 200;

/// A request: attributes in the order in which they came.
///
/// They stay in the text that came, since two strings for each of thirty would be most of the work of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    text: Vec<u8>,
    attributes: Vec<Attribute>,
}

/// Where name and value are in the text.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Attribute {
    name: Range<usize>,
    value: Range<usize>,
}

impl Request {
    /// The value of an attribute, if it came and is not empty. Of several the last counts, as in Postfix.
    pub fn bytes(&self, name: &str) -> Option<&[u8]> {
        let (text, name) = (&self.text, name.as_bytes());
        let attribute = self.attributes.iter().rev().find(|a| &text[a.name.clone()] == name)?;
        Some(&text[attribute.value.clone()]).filter(|value| !value.is_empty())
    }

    /// The same as text. Strangers choose some values, which then need not be UTF-8.
    pub fn get(&self, name: &str) -> Option<Cow<'_, str>> {
        self.bytes(name).map(String::from_utf8_lossy)
    }
}

/// A connection that speaks something else.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// More than [`MAX_REQUEST_LENGTH`] bytes without an empty line, or too many attributes.
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
    /// Bytes of the buffer that were searched for the end of the request already.
    searched: usize,
    /// Bytes of the buffer that are whole lines, each an attribute.
    checked: usize,
}

impl PolicyCodec {
    /// Whoever speaks something else may never send an empty line: what came so far tells.
    fn check_lines(&mut self, buffer: &[u8]) -> Result<(), CodecError> {
        let rest = &buffer[self.checked..];
        let Some(end) = memrchr(b'\n', rest) else {
            return Ok(());
        };
        self.checked += end + 1;
        let is_attribute = |line: &[u8]| !matches!(memchr(b'=', line), None | Some(0));
        if rest[..end].split(|byte| *byte == b'\n').all(is_attribute) {
            Ok(())
        } else {
            Err(CodecError::Malformed)
        }
    }
}

impl Decoder for PolicyCodec {
    type Item = Request;
    type Error = CodecError;

    fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Request>, CodecError> {
        let from = self.searched.saturating_sub(1);
        let Some(end) = memmem::find(&buffer[from..], b"\n\n") else {
            self.searched = buffer.len();
            if buffer.len() > MAX_REQUEST_LENGTH {
                return Err(CodecError::TooLong);
            }
            return self.check_lines(buffer).map(|()| None);
        };
        let length = from + end + 2;
        (self.searched, self.checked) = (0, 0);
        if length > MAX_REQUEST_LENGTH {
            return Err(CodecError::TooLong);
        }
        let request = buffer.split_to(length);
        parse(&request[..length - 2]).map(Some)
    }
}

fn parse(text: &[u8]) -> Result<Request, CodecError> {
    if memchr(b'\0', text).is_some() {
        return Err(CodecError::Malformed);
    }
    let mut attributes = Vec::with_capacity(32);
    let mut start = 0;
    for end in memchr_iter(b'\n', text).chain([text.len()]) {
        match memchr(b'=', &text[start..end]) {
            None | Some(0) => return Err(CodecError::Malformed),
            Some(length) => {
                let equals = start + length;
                attributes.push(Attribute { name: start..equals, value: equals + 1..end });
            }
        }
        if attributes.len() > MAX_ATTRIBUTES {
            return Err(CodecError::TooLong);
        }
        start = end + 1;
    }
    Ok(Request { text: text.to_owned(), attributes })
}

impl Encoder<String> for PolicyCodec {
    type Error = CodecError;

    fn encode(&mut self, action: String, buffer: &mut BytesMut) -> Result<(), CodecError> {
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
            assert_eq!(requests[0].get("sender"), Some("a=b".into()));
            assert_eq!(requests[0].get("helo_name"), None);
            assert_eq!(requests[1].get("request"), Some("x".into()));
        }
    }

    #[test]
    fn values_are_bytes() {
        let (requests, error) = decode_in_pieces(b"sender=b\xf6se@x.example\n\n", &[]);
        assert!(error.is_none());
        assert_eq!(requests[0].bytes("sender"), Some(&b"b\xf6se@x.example"[..]));
        assert_eq!(requests[0].get("sender"), Some("b\u{fffd}se@x.example".into()));
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
        let many = "a=b\n".repeat(MAX_ATTRIBUTES + 1) + "\n";
        assert!(matches!(decode_in_pieces(many.as_bytes(), &[]).1, Some(CodecError::TooLong)));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(attributes in prop::collection::vec(("[a-z_]{1,12}", "[^\n\0]{0,30}"), 1..40)) {
            let text: String = attributes.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
            let (requests, error) = decode_in_pieces((text + "\n").as_bytes(), &[]);
            prop_assert!(error.is_none() && requests.len() == 1);
            for (name, _) in &attributes {
                // Of several the last counts.
                let (_, value) = attributes.iter().rfind(|(other, _)| other == name).unwrap();
                prop_assert_eq!(requests[0].bytes(name).unwrap_or_default(), value.as_bytes());
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
