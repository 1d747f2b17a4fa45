//! The milter service: what an MTA, or whoever has found the socket, sends. Nothing is refused that nobody's filter
//! refuses, and no reply has what an MTA or a client could misread.
//!
//! Input: flags and exit status as in [`Plan`] (flag 128: as it stands), then parts that `FF FE` separates. The first is
//! what filters write; each of the others is a frame without its length, or, as it stands, bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use usermilter::milter::Service;
use usermilter::worker::Stream;
use usermilter_fuzz::{Plan, with_worker};

fuzz_target!(|data: &[u8]| {
    let [flags, status, rest @ ..] = data else { return };
    let mut parts = split(rest).into_iter();
    let output = parts.next().unwrap_or_default().to_vec();
    let mut bytes = Vec::new();
    for part in parts {
        if flags & 128 == 0 {
            bytes.extend(u32::try_from(part.len()).unwrap().to_be_bytes());
        }
        bytes.extend_from_slice(part);
    }
    let plan = Plan { flags: *flags, status: *status, output };
    let replies = with_worker(&plan, async |pipeline, settings, tracker| {
        let (client, server) = UnixStream::pair().expect("a pair of sockets");
        let (mut read, mut write) = client.into_split();
        let service = Service::new(pipeline, &settings, tracker).serve(Stream::Unix(server));
        let talk = async {
            let _ = write.write_all(&bytes).await;
            let _ = write.shutdown().await;
            drop(write);
            let mut replies = Vec::new();
            // The service closes without reading on what makes no sense, which resets.
            let _ = read.read_to_end(&mut replies).await;
            replies
        };
        tokio::join!(service, talk).1
    });
    let smtputf8 = contains(&bytes, b"SMTPUTF8");
    let mut rest = &replies[..];
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_be_bytes(*length) as usize;
        assert!((1..=100_000).contains(&length));
        // The last may be cut by a reset.
        let Some((frame, after)) = after.split_at_checked(length) else { break };
        check(frame[0], &frame[1..], &plan, smtputf8);
        rest = after;
    }
});

fn check(command: u8, data: &[u8], plan: &Plan, smtputf8: bool) {
    match command {
        b'O' | b'c' | b'a' | b't' | b'p' | b's' => (),
        b'r' => assert!(plan.may_reject(), "refused"),
        b'+' | b'-' => {
            assert!(plan.flags & 16 != 0, "a change that nobody wants");
            assert!(data.ends_with(b"\0") && !data[..data.len() - 1].contains(&0));
            assert!(command == b'-' || !data[..data.len() - 1].iter().any(u8::is_ascii_control));
        }
        b'y' => {
            let text = data.strip_suffix(b"\0").expect("an end");
            let text = std::str::from_utf8(text).expect("text");
            assert!(smtputf8 || text.is_ascii(), "{text:?}");
            assert!(text.starts_with('4') || text.starts_with('5') && plan.may_reject(), "{text:?}");
            let lines: Vec<&str> = text.split("\r\n").collect();
            assert!(lines.len() <= 32);
            for (number, line) in (1..).zip(&lines) {
                let separator = if number == lines.len() { b' ' } else { b'-' };
                assert!(!line.contains(char::is_control) && line.len() <= 990, "{line:?}");
                assert!(
                    line.as_bytes()[..3] == text.as_bytes()[..3] && line.as_bytes()[3] == separator,
                    "{line:?}"
                );
                assert!(!line.replace("%%", "").contains('%'), "{line:?}");
            }
            assert!(!text.starts_with("421") && !text.starts_with("521"), "{text:?}");
        }
        other => panic!("reply {:?}", char::from(other)),
    }
}

fn split(data: &[u8]) -> Vec<&[u8]> {
    let (mut parts, mut start) = (Vec::new(), 0);
    while let Some(at) = data[start..].windows(2).position(|pair| pair == [0xff, 0xfe]) {
        parts.push(&data[start..start + at]);
        start += at + 2;
    }
    parts.push(&data[start..]);
    parts
}

fn contains(bytes: &[u8], word: &[u8]) -> bool {
    bytes.windows(word.len()).any(|window| window.eq_ignore_ascii_case(word))
}
