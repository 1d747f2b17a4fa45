//! What a filter writes, on its way into an SMTP session: whatever it is, it stays a refusal of the right class in lines
//! that no client can take for anything else.
//!
//! Input: a byte of which bit 1 is the verdict and bit 2 SMTPUTF8, then the filter's output.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tokio_util::bytes::BytesMut;
use tokio_util::codec::Encoder;
use usermilter::address::Address;
use usermilter::policy::PolicyCodec;
use usermilter::reply::{MAX_LINE_LENGTH, MAX_LINES, Reply};
use usermilter::verdict::Verdict;

fuzz_target!(|data: &[u8]| {
    let Some((flags, output)) = data.split_first() else { return };
    let verdict = if flags & 1 == 0 { Verdict::Reject } else { Verdict::Defer };
    let smtputf8 = flags & 2 != 0;
    let text = String::from_utf8_lossy(output);
    let reply = Reply::from_text(verdict, &text, smtputf8);
    check(&reply, verdict, smtputf8);
    check(&reply.clone().into_ascii(), verdict, false);
    // What was cleaned is clean: nothing comes of reading it again but itself.
    let written = reply.to_string();
    let bare: Vec<&str> =
        written.lines().filter_map(|line| line.get(4..)?.split_once(' ').map(|(_, text)| text)).collect();
    let again = format!("{} {} {}", reply.code(), reply.enhanced(), bare.join("\n"));
    let again = Reply::from_text(verdict, &again, smtputf8);
    // Unless it begins with white space, or was cut behind some, which a reading takes away.
    if !bare.iter().any(|line| line.ends_with(' ')) && !bare[0].starts_with(|c: char| c.is_whitespace()) {
        assert_eq!(again, reply, "{written:?}");
    }
    // The words of several recipients, one of whom has chosen their own address.
    let name = text.lines().next().unwrap_or_default();
    let Ok(address) = Address::parse(name.as_bytes()) else { return };
    let other = Reply::default_of(verdict);
    check(
        &Reply::per_recipient(verdict, &[(&address, &reply), (&address, &other)], smtputf8),
        verdict,
        smtputf8,
    );
});

fn check(reply: &Reply, verdict: Verdict, smtputf8: bool) {
    let class = if verdict == Verdict::Reject { '5' } else { '4' };
    assert!(reply.code().len() == 3 && reply.code().starts_with(class), "{reply}");
    assert!(!matches!(&*reply.code(), "421" | "521"), "{reply}");
    assert!(reply.enhanced().starts_with(class), "{reply}");
    let lines = reply.milter_lines();
    assert!((1..=MAX_LINES).contains(&lines.len()));
    for line in &lines {
        assert!(line.len() <= MAX_LINE_LENGTH && !line.contains(char::is_control), "{line:?}");
        assert!(smtputf8 || line.is_ascii(), "{line:?}");
        assert!(!line.contains(['\u{2028}', '\u{2029}', '\u{202e}', '\u{feff}']), "{line:?}");
        assert!(!line.replace("%%", "").contains('%'), "{line:?}");
    }
    let mut buffer = BytesMut::new();
    PolicyCodec::default().encode(&reply.policy_action(), &mut buffer).unwrap();
    let action =
        buffer.strip_prefix(b"action=").and_then(|rest| rest.strip_suffix(b"\n\n")).expect("an action");
    assert!(!action.iter().any(u8::is_ascii_control));
    assert!(action.len() <= MAX_LINE_LENGTH + 16 && action[0] == class as u8 && action[3] == b' ');
}
