//! What is read is being written, is something else than it should be, or does not answer; and time is not what it was.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::Mode;
use nix::unistd::{chown, mkfifo};

use super::common::users::Account;
use super::common::{PATIENCE, wait_until};
use super::resources::{unmount, with_own_mounts};
use super::scene::{Counts, Lane, short_or_long, site, with_fault, with_rogue};

pub(crate) fn a_half_written_passwd_file_costs_no_mail(lane: &Lane) -> Counts {
    // Who is not in the file is refused for good, here.
    let site = site(lane).set("recipients", "unknown", "\"reject\"");
    with_fault(lane, site, |scene| {
        let path = scene.site.users.passwd_file().to_owned();
        let whole = fs::read_to_string(&path).unwrap();
        let half = &whole[..whole.len() / 4];
        assert!(!half.ends_with('\n'));
        let long_enough_to_be_read = Duration::from_secs(4);
        for _ in 0..short_or_long(1, 5) {
            // By a program that stops in the middle, and goes on.
            let mut file = File::create(&path).unwrap();
            file.write_all(half.as_bytes()).unwrap();
            scene.load.go_on(long_enough_to_be_read);
            file.write_all(&whole.as_bytes()[half.len()..]).unwrap();
            scene.load.go_on(Duration::from_secs(1));
            // By one that renames what it has not finished.
            let new = path.with_extension("new");
            fs::write(&new, half).unwrap();
            fs::rename(&new, &path).unwrap();
            scene.load.go_on(long_enough_to_be_read);
            fs::write(&new, &whole).unwrap();
            fs::rename(&new, &path).unwrap();
            // By one that writes line by line.
            let mut file = File::create(&path).unwrap();
            for line in whole.split_inclusive('\n') {
                file.write_all(line.as_bytes()).unwrap();
                scene.load.go_on(Duration::from_millis(50));
            }
        }
    })
}

pub(crate) fn rules_and_filters_edited_in_use_cost_no_mail(lane: &Lane) -> Counts {
    with_fault(lane, site(lane), |scene| {
        let accounts =
            ["accept", "reject", "ruled", "error"].map(|name| scene.site.users.account(name).clone());
        let [accept, reject, ruled, error] = &accounts;
        for round in 0..short_or_long(40, 600) {
            // By renaming, as editors do, and in place, as shells do.
            reject.filter("message", format!("#!/bin/sh\n# {round}\necho not wanted\nexit 77\n"));
            in_place(accept, "message", &format!("#!/bin/sh\n# {round}\ncat > /dev/null\nexit 0\n"));
            in_place(error, "message", &format!("#!/bin/sh\n# {round}\nexit 1\n"));
            ruled.file("rules.toml", format!("# {round}\ndefault = \"reject\"\n"));
            in_place(ruled, "rules.toml", &format!("default = \"reject\"\n# {round}\n"));
            scene.load.go_on(Duration::from_millis(50));
        }
    })
}

fn in_place(account: &Account, name: &str, text: &str) {
    // Not while it is executed: text file busy.
    assert!(wait_until(PATIENCE, || fs::write(account.path(name), text).is_ok()));
}

pub(crate) fn a_fifo_wherever_a_file_should_be_harms_its_own_user_alone(lane: &Lane) -> Counts {
    let site = site(lane).filter("rogue", "message", "#!/bin/sh\n");
    with_rogue(lane, site, |scene| {
        let rogue = scene.site.users.account("rogue").clone();
        for name in ["message", "recipient", "rules.toml", "log"] {
            let path = rogue.path(name);
            let _ = fs::remove_file(&path);
            mkfifo(&path, Mode::S_IRWXU).unwrap();
            chown(&path, Some(rogue.uid.into()), Some(rogue.gid.into())).unwrap();
            scene.load.wait_rogue(short_or_long(3, 50));
            scene.assert_right();
            fs::remove_file(&path).unwrap();
        }
    })
}

/// A file system in place of rogue's home that never answers, as of an automounter whose server is gone.
fn home_that_hangs(lane: &Lane, hang: impl FnOnce(&Path) -> File) -> Counts {
    if File::open("/dev/fuse").is_err() {
        println!("not checked: there is no /dev/fuse, as in a container without devices");
        return Counts::default();
    }
    with_own_mounts();
    let site = site(lane)
        .set("filter", "recipient-deadline", "\"1s\"")
        .set("filter", "timeout", "\"2s\"")
        .filter("rogue", "message", "#!/bin/sh\nexit 0\n");
    let home = site.users.account("rogue").home.clone();
    with_rogue(lane, site, |scene| {
        let server = hang(&home);
        // Many wait for the one home: nobody else waits with them.
        scene.load.add_crowd(20);
        scene.load.wait_rogue(2);
        scene.assert_right();
        scene.load.wait_rogue(short_or_long(2, 10));
        scene.assert_right();
        // Who waits is let go.
        unmount(&home);
        drop(server);
    })
}

pub(crate) fn a_home_that_hangs_harms_its_own_user_alone(lane: &Lane) -> Counts {
    home_that_hangs(lane, mount_fuse)
}

pub(crate) fn a_home_that_the_kernel_holds_harms_its_own_user_alone(lane: &Lane) -> Counts {
    // Once the server has taken a question, who asked can't be killed any more.
    home_that_hangs(lane, |home| {
        let server = mount_fuse(home);
        let mut questions = server.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut question = vec![0; 1 << 17];
            let length = questions.read(&mut question).unwrap();
            questions.write_all(&fuse_init(&question[..length])).unwrap();
            while questions.read(&mut question).is_ok() {}
        });
        server
    })
}

/// Mounts a file system of which this file is the server. What it does not answer hangs.
fn mount_fuse(at: &Path) -> File {
    let server = nix::fcntl::open("/dev/fuse", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
    let options =
        format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", server.as_fd().as_raw_fd());
    mount(Some("hangs"), at, Some("fuse.hangs"), MsFlags::MS_NODEV, Some(options.as_str())).unwrap();
    server.into()
}

/// The answer to FUSE_INIT (fuse(4)), of the version that was offered, without any extra.
fn fuse_init(question: &[u8]) -> Vec<u8> {
    let number = |at: usize| u32::from_ne_bytes(question[at..at + 4].try_into().unwrap());
    let (unique, major, minor) = (&question[8..16], number(40), number(44));
    assert_eq!((number(4), major), (26, 7), "FUSE_INIT of version 7");
    let mut body = [major, minor].map(u32::to_ne_bytes).concat();
    body.resize(64, 0);
    // max_write, after max_readahead, flags, max_background and congestion_threshold.
    body[20..24].copy_from_slice(&65_536_u32.to_ne_bytes());
    let length = u32::try_from(16 + body.len()).unwrap();
    [&length.to_ne_bytes(), &[0; 4], unique, &body].concat()
}

pub(crate) fn a_clock_that_jumps_costs_no_mail(lane: &Lane) -> Counts {
    let library = fs::read_dir("/usr/lib").unwrap().flatten();
    let library =
        library.map(|entry| entry.path().join("faketime/libfaketimeMT.so.1")).find(|path| path.exists());
    let library = library.expect("libfaketime is not installed: run tests/install-dependencies");
    let site = site(lane);
    // The daemon's time of day is that of this file's last change, which the worker may ask for, though it may read no
    // file. The kernel's other clocks never jump.
    let clock = site.sandbox.write("clock", "");
    let site = site
        .env("LD_PRELOAD", library.to_str().unwrap())
        .env("FAKETIME", "%")
        .env("FAKETIME_FOLLOW_FILE", clock.to_str().unwrap())
        .env("FAKETIME_NO_CACHE", "1")
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        .env("NO_FAKE_STAT", "1");
    with_fault(lane, site, |scene| {
        let now = SystemTime::now();
        let days = |days: u64| Duration::from_secs(days * 86_400);
        let hour = Duration::from_secs(3600);
        let times = [now + hour, now - hour, now + days(400), now - days(9000), now + days(15_000), now];
        for time in times.repeat(short_or_long(1, 8)) {
            File::options().write(true).open(&clock).unwrap().set_modified(time).unwrap();
            scene.load.wait_accepted(5);
            scene.assert_right();
        }
        let years = |line: &String| line.get(..4).and_then(|year| year.parse::<u32>().ok());
        let years: Vec<u32> = scene.site.daemon.log_lines().iter().filter_map(years).collect();
        assert!(years.iter().max().unwrap() - years.iter().min().unwrap() > 50, "the clock did not jump");
    })
}
