//! The policy service: bytes that a client sends, in whatever pieces. Each well-formed request gets one answer, and none
//! refuses what nobody's filter refuses.
//!
//! Input: flags and exit status as in [`Plan`], a byte that says where to cut, then what the client sends. The filters
//! write the first line of it.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::bytes::BytesMut;
use tokio_util::codec::Decoder;
use usermilter::policy::{self, Attribute, CodecError, MAX_REQUEST_LENGTH, PolicyCodec, Request};
use usermilter_fuzz::{Plan, with_worker};

fuzz_target!(|data: &[u8]| {
    let [flags, status, cut, bytes @ ..] = data else { return };
    let (whole, error) = decode(bytes.chunks(bytes.len().max(1)));
    let (pieces, piecewise_error) = decode(bytes.chunks(usize::from(*cut).max(1)));
    assert_eq!(whole, pieces);
    assert_eq!(error.is_some(), piecewise_error.is_some());
    let output = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default().to_vec();
    let plan = Plan { flags: *flags, status: *status, output };
    let answers = with_worker(&plan, async |pipeline, _, _| serve(pipeline, bytes).await);
    let mut rest = &answers[..];
    let mut count = 0;
    while !rest.is_empty() {
        rest = rest.strip_prefix(b"action=").expect("an action");
        let end = rest.windows(2).position(|pair| pair == b"\n\n").expect("an end");
        let action = std::str::from_utf8(&rest[..end]).expect("text");
        assert!(!action.contains(char::is_control), "{action:?}");
        let refuses = action.starts_with('5');
        assert!(action == "DUNNO" || refuses || action.starts_with('4'), "{action:?}");
        assert!(!refuses || plan.may_reject(), "{action:?}");
        assert!(!action.starts_with("421") && !action.starts_with("521"), "{action:?}");
        (rest, count) = (&rest[end + 2..], count + 1);
    }
    // The connection is closed on a request for something else.
    let is_access =
        |request: &Request| request.get(Attribute::Request).as_deref() == Some("smtpd_access_policy");
    let good = whole.iter().take_while(|request| is_access(request)).count();
    assert_eq!(count, good);
});

fn decode<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Request>, Option<CodecError>) {
    let (mut codec, mut buffer, mut requests) = (PolicyCodec::default(), BytesMut::new(), Vec::new());
    for piece in pieces {
        buffer.extend_from_slice(piece);
        loop {
            match codec.decode(&mut buffer) {
                Ok(Some(request)) => requests.push(request),
                Ok(None) => break,
                Err(error) => return (requests, Some(error)),
            }
        }
        assert!(buffer.len() <= MAX_REQUEST_LENGTH + piece.len());
    }
    (requests, None)
}

/// All that the service says.
async fn serve(pipeline: Arc<usermilter::pipeline::Pipeline>, bytes: &[u8]) -> Vec<u8> {
    let (client, server) = tokio::io::duplex(1 << 20);
    let (drain, drained) = tokio::sync::watch::channel(None);
    let (mut read, mut write) = tokio::io::split(client);
    let mut answers = Vec::new();
    let talk = async {
        let _ = write.write_all(bytes).await;
        let _ = write.shutdown().await;
        read.read_to_end(&mut answers).await.expect("a duplex stream");
    };
    let service = Arc::new(policy::Service::new(pipeline));
    tokio::join!(policy::serve(service, server, drained), talk);
    drop(drain);
    answers
}
