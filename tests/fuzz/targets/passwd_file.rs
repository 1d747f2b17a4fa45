//! passwd(5) files: no text makes a user who is root, or whose name or home leads elsewhere.
#![no_main]

use libfuzzer_sys::fuzz_target;
use usermilter::resolver::passwd_file::{Answer, PasswdFile};
use usermilter::user::UserName;
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
        let (local, domain) = name.rsplit_once('@').map_or((name, None), |(l, d)| (l, Some(d)));
        let (lower, upper) = (users.lookup(local, domain), users.lookup(&local.to_uppercase(), domain));
        match lower {
            Answer::Found(entry) => {
                assert!(
                    entry.uid != 0 && entry.gid != 0 && entry.uid < u32::MAX - 1 && entry.gid < u32::MAX - 1
                );
                assert!(UserName::try_from(entry.name.clone()).is_ok(), "{entry:?}");
                assert!(entry.home.is_absolute(), "{entry:?}");
                assert!(!entry.home.to_string_lossy().split('/').any(|part| part == ".."), "{entry:?}");
                // The text has the user word for word.
                let fields = format!("{}:", entry.name);
                assert!(
                    text.lines().any(|line| line.trim_start_matches('\u{feff}').starts_with(&fields)),
                    "{entry:?}"
                );
                assert!(!local.is_ascii() || upper == Answer::Found(entry));
            }
            Answer::NotFound => (),
            Answer::Unavailable(why) => panic!("{why}"),
        }
    }
});
