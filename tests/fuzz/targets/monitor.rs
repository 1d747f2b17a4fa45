//! The monitor's table of requests: bytes of a worker that an attacker owns. What is understood names users and
//! files that the configuration allows, whatever the rest says.
#![no_main]

use std::path::{Component, Path};
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use usermilter::config::{Config, Filter};
use usermilter::monitor::{Event, MAX_PACKET, Phase, Report, Request, decode, encode, examine};
use usermilter::sys;
use usermilter::user::{Account, User, UserName};

fuzz_target!(|data: &[u8]| {
    let bytes = over_the_socket(data);
    let _ = (decode::<Event>(data), decode::<Report>(data));
    let Some(bytes) = bytes else { return };
    let Ok(request) = decode::<Request>(&bytes) else { return };
    let written = encode(&request).expect("what was read can be written");
    let again: Request = decode(&written).expect("what was written can be read");
    assert_eq!(format!("{again:?}"), format!("{request:?}"));
    match &request {
        // A question names a number of the configuration, or a user as others do.
        Request::Ready | Request::Alive | Request::Ask { .. } => (),
        Request::Inspect { user, .. } | Request::Log { user, .. } => check_user(user, &[]),
        Request::Run { user, extension, variables, .. } => {
            check_user(user, variables);
            for phase in [Phase::Recipient, Phase::Message] {
                let names = phase.candidates(extension.as_deref());
                assert_eq!(names.last().map(String::as_str), Some(phase.as_str()));
                for name in names {
                    let mut parts = Path::new(&name).components();
                    assert!(
                        matches!(parts.next(), Some(Component::Normal(_))) && parts.next().is_none(),
                        "{name:?}"
                    );
                    assert!(name.starts_with(phase.as_str()) && !name.contains('\0'), "{name:?}");
                }
            }
        }
    }
});

/// As the monitor receives it: `None` if it is too long, or empty, which is the end.
fn over_the_socket(data: &[u8]) -> Option<Vec<u8>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("a pair");
    sys::send_with_descriptors(&theirs, data, &[]).ok()?;
    let mut buffer = vec![0; MAX_PACKET];
    let received = sys::receive_with_descriptors(&ours, &mut buffer).expect("a packet");
    assert_eq!(received.truncated, data.len() > MAX_PACKET);
    buffer.truncate(received.length);
    (!received.truncated && received.length > 0).then_some(buffer)
}

fn settings() -> &'static Filter {
    static SETTINGS: OnceLock<Filter> = OnceLock::new();
    SETTINGS.get_or_init(|| {
        let text =
            "[filter]\nvirtual-uids = [5000, 5999]\nvirtual-homes = [\"/var/vmail\"]\nmin-uid = 1000\n";
        Config::parse(text, Path::new("fuzz")).expect("a configuration").filter
    })
}

fn check_user(user: &User, variables: &[(usermilter::monitor::Variable, &str)]) {
    assert!(UserName::try_from(user.name.as_str().to_owned()).is_ok());
    if let Some(program) = &user.program {
        assert!(!program.as_str().contains(['/', '\0']) && !program.as_str().starts_with('.'));
    }
    let Some(examined) = examine(settings(), user, variables) else { return };
    assert!(examined.uid >= 1000 && examined.gid != 0 && examined.gid != u32::MAX);
    if let Account::Virtual { .. } = user.account {
        assert!((5000..=5999).contains(&examined.uid) && (5000..=5999).contains(&examined.gid));
        let inside = examined.home.strip_prefix("/var/vmail").expect("a home inside");
        let mut parts = inside.components().peekable();
        assert!(
            parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_))),
            "{inside:?}"
        );
    }
    for entry in &examined.environment {
        assert!(entry.to_bytes().contains(&b'='), "{entry:?}");
    }
    let names: Vec<&[u8]> =
        examined.environment.iter().filter_map(|e| e.to_bytes().split(|byte| *byte == b'=').next()).collect();
    assert_eq!(names.last(), Some(&&b"PATH"[..]));
    assert_eq!(&names[..3], [&b"HOME"[..], b"USER", b"LOGNAME"]);
    let is_allowed = |name: &[u8]| {
        name.starts_with(b"USERMILTER_") || name.is_ascii() && !name.starts_with(b"LD_") && name != b"IFS"
    };
    assert!(names.iter().all(|name| is_allowed(name)));
}
