//! passwd(5) files: no text makes a user who is root, or whose name or home leads elsewhere.
#![no_main]

use libfuzzer_sys::fuzz_target;
use usermilter::address::Address;
use usermilter::resolver::passwd_file::{Answer, PasswdFile};
use usermilter::user::{Account, UserName};
use usermilter_fuzz::{file, lines};

fuzz_target!(|data: &[u8]| {
    let users = PasswdFile::open(file("users", data));
    let text = String::from_utf8_lossy(data);
    for problem in users.problems().iter() {
        assert!((1..=lines(&text)).contains(&problem.line), "{problem:?}");
        assert!(!problem.message.contains(char::is_control), "{problem:?}");
    }
    for line in text.lines().take(20) {
        let name = line.split(':').next().unwrap_or_default().trim_start_matches('\u{feff}');
        let Ok(address) = Address::parse(name.as_bytes()) else { continue };
        match users.lookup(&address) {
            Answer::Found(user) => {
                let Account::Virtual { uid, gid, home } = &user.account else { panic!("{user:?}") };
                assert!([*uid, *gid].iter().all(|id| (1..u32::MAX - 1).contains(id)), "{user:?}");
                assert!(UserName::try_from(user.name.as_str().to_owned()).is_ok(), "{user:?}");
                assert!(home.is_absolute(), "{user:?}");
                assert!(!home.to_string_lossy().split('/').any(|part| part == ".."), "{user:?}");
                // The text has the user word for word.
                let fields = format!("{}:", user.name);
                assert!(
                    text.lines().any(|line| line.trim_start_matches('\u{feff}').starts_with(&fields)),
                    "{user:?}"
                );
                if address.local().is_ascii() {
                    let upper = address.with_local(address.local().to_uppercase());
                    assert_eq!(users.lookup(&upper), Answer::Found(user));
                }
            }
            Answer::NotFound => (),
            Answer::Unavailable(why) => panic!("{why}"),
        }
    }
});
