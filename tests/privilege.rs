//! Who holds which privilege, seen from /proc and by programs that try to get more. Section 2 of the contract.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;
mod site;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{SystemUser, Usermilter};
use site::{Extra, Site, descriptors, is_accepted, status_field};

fn capabilities(pid: u32, set: &str) -> u64 {
    u64::from_str_radix(&status_field(pid, set), 16).unwrap()
}

/// Lines `name=value` as a map.
fn table(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

#[test]
fn the_monitor_is_small_and_has_one_thread() {
    let site = Site::new();
    let daemon = Usermilter::start(&site.config(Extra::default()));
    assert!(is_accepted(&site.judge("alice@test.example")));
    assert_eq!(status_field(daemon.pid(), "Threads"), "1");
    let resident: u64 = status_field(daemon.pid(), "VmRSS").split(' ').next().unwrap().parse().unwrap();
    // An optimized build has a third of it. A quarter more would be the code that only the start needs.
    assert!(resident < 15 * 1024, "the monitor has {resident} KiB resident");
    let open = descriptors(daemon.pid());
    let kinds: Vec<String> = open.iter().map(|(_, link)| link.display().to_string()).collect();
    // 0 to 2, signalfd, two listeners, the channel, the pipe of the guard.
    assert_eq!(open.len(), 8, "{kinds:?}");
}

#[test]
fn the_worker_holds_no_privilege_and_nothing_of_the_monitor() {
    let site = Site::new();
    let daemon = Usermilter::start(&site.config(Extra::default()));
    assert!(is_accepted(&site.judge("alice@test.example")));
    let (monitor, worker) = (daemon.pid(), daemon.worker_pid());
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    let four = |id: u32| vec![id.to_string(); 4].join("\t");
    assert_eq!(status_field(worker, "Uid"), four(nobody.uid.as_raw()));
    assert_eq!(status_field(worker, "Gid"), four(nobody.gid.as_raw()));
    let name = std::ffi::CString::new("nobody").unwrap();
    let mut groups: Vec<u32> =
        nix::unistd::getgrouplist(&name, nobody.gid).unwrap().iter().map(|gid| gid.as_raw()).collect();
    groups.sort_unstable();
    let mut held: Vec<u32> =
        status_field(worker, "Groups").split_whitespace().map(|gid| gid.parse().unwrap()).collect();
    held.sort_unstable();
    assert_eq!(held, groups);
    for set in ["CapPrm", "CapEff", "CapInh", "CapAmb"] {
        assert_eq!(capabilities(worker, set), 0, "{set}");
    }
    assert_eq!(status_field(worker, "NoNewPrivs"), "1");
    // A process that can't be dumped has files in /proc that are root's, so that nobody else looks into it.
    for file in ["environ", "mem", "fd", "maps"] {
        let owner = fs::metadata(format!("/proc/{worker}/{file}")).unwrap().uid();
        assert_eq!(owner, 0, "/proc/PID/{file}");
    }

    let links = |pid: u32| -> Vec<String> {
        descriptors(pid).into_iter().map(|(_, link)| link.display().to_string()).collect()
    };
    let (of_monitor, of_worker) = (links(monitor), links(worker));
    let listeners = listening_inodes(&[&site.milter, &site.policy]);
    for link in of_worker.iter().skip(3).filter(|link| of_monitor.contains(link)) {
        // The monitor's own end of the channel is a socket as well, and must not be here.
        assert!(
            listeners.contains(link),
            "the worker has {link} of the monitor: {of_worker:?} {of_monitor:?}"
        );
    }
    let unnamed = of_worker.iter().filter(|link| link.starts_with("anon_inode:[signalfd"));
    assert_eq!(unnamed.count(), 0, "{of_worker:?}");
}

/// How /proc/PID/fd shows the sockets that listen on these addresses of 127.0.0.1.
fn listening_inodes(addresses: &[&str]) -> Vec<String> {
    let ports: Vec<String> = addresses
        .iter()
        .map(|address| format!(":{:04X}", address.rsplit_once(':').unwrap().1.parse::<u16>().unwrap()))
        .collect();
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let inodes: Vec<String> = rows
        // State 0A: TCP_LISTEN.
        .filter(|row| row.get(3) == Some(&"0A") && ports.iter().any(|port| row[1].ends_with(port)))
        .map(|row| format!("socket:[{}]", row[9]))
        .collect();
    assert_eq!(inodes.len(), addresses.len(), "{table}");
    inodes
}

#[test]
fn a_reloaded_worker_has_nothing_of_its_predecessor() {
    let site = Site::new();
    let mut daemon = Usermilter::start(&site.config(Extra::default()));
    assert!(is_accepted(&site.judge("alice@test.example")));
    // Without the connection that was just closed.
    std::thread::sleep(Duration::from_millis(300));
    let first = descriptors(daemon.worker_pid()).len();
    let open = descriptors(daemon.pid()).len();
    for _ in 0..3 {
        let old = daemon.worker_pid();
        let seen = daemon.log_lines().len();
        daemon.reload();
        daemon.wait_for_log_after(seen, "worker has left", common::PATIENCE);
        assert_ne!(daemon.worker_pid(), old);
        assert!(is_accepted(&site.judge("alice@test.example")));
    }
    let worker = daemon.worker_pid();
    for (pid, expected) in [(worker, first), (daemon.pid(), open)] {
        // Connections that were just closed may not be gone yet.
        let now = || descriptors(pid).len();
        assert!(common::wait_until(common::PATIENCE, || now() == expected), "{:?}", descriptors(pid));
    }
}

#[test]
fn a_filter_has_its_own_identity_three_descriptors_and_a_clean_environment() {
    let site = Site::new();
    // Looked at by `sh` itself and what it becomes, so that a glob or a substitution adds no descriptor.
    let script = "#!/bin/sh\n\
        cat /proc/self/status > \"$HOME/status\"\n\
        ls -l /proc/$$/fd > \"$HOME/fd\"\n\
        env > \"$HOME/env\"\n\
        umask > \"$HOME/umask\"; pwd > \"$HOME/pwd\"; echo \"$0\" > \"$HOME/argv0\"\n\
        ps -o sid= -p $$ > \"$HOME/sid\" || cut -d' ' -f6 /proc/$$/stat > \"$HOME/sid\"\n\
        echo $$ > \"$HOME/self\"\n\
        exit 77\n";
    let path = site.users.filter("alice", "message", script);
    // What the daemon was started with must not reach anybody.
    let leaked = fs::File::open("/dev/null").unwrap();
    nix::fcntl::fcntl(&leaked, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    let _daemon = Usermilter::start(&site.config(Extra::default()));
    drop(leaked);
    assert_eq!(site.judge("alice@test.example").letter(), 'y');

    let home = site.users.account("alice").home.clone();
    let read = |name: &str| fs::read_to_string(home.join(name)).unwrap();
    let status = read("status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
        line.unwrap_or_else(|| panic!("no {name}: {status}")).trim().to_owned()
    };
    assert_eq!(field("Uid"), "5001\t5001\t5001\t5001");
    assert_eq!(field("Gid"), "5001\t5001\t5001\t5001");
    assert_eq!(field("Groups"), "5001");
    assert_eq!(field("NoNewPrivs"), "1");
    for set in ["CapPrm", "CapEff", "CapInh", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&field(set), 16).unwrap(), 0, "{set}");
    }
    for name in ["SigIgn", "SigBlk"] {
        assert_eq!(u64::from_str_radix(&field(name), 16).unwrap(), 0, "{name}: {status}");
    }
    let listing = read("fd");
    let open: Vec<&str> = listing
        .lines()
        .filter_map(|line| line.split_once(" -> ")?.0.rsplit_once(' '))
        .map(|(_, n)| n)
        .collect();
    // 10 and up: where dash keeps the script that it reads.
    let mut foreign = open.iter().filter(|n| n.parse::<u32>().unwrap() < 10 && !["0", "1", "2"].contains(n));
    assert_eq!(foreign.next(), None, "{}", read("fd"));
    assert_eq!((read("umask").trim(), read("pwd").trim()), ("0077", home.to_str().unwrap()));
    assert_eq!(Path::new(read("argv0").trim()), path);
    assert_eq!(read("sid").trim(), read("self").trim(), "its own session");

    let documented = "HOME USER LOGNAME SHELL PATH SENDER RECIPIENT ORIGINAL_RECIPIENT LOCAL EXTENSION DOMAIN \
        CLIENT_ADDRESS CLIENT_HOSTNAME CLIENT_HELO CLIENT_PROTOCOL SASL_USERNAME SASL_METHOD SASL_SENDER";
    let environment = table(&read("env"));
    for name in environment.keys() {
        // The shell itself adds these.
        let known = documented.split_whitespace().chain(["PWD", "_", "SHLVL", "OLDPWD"]).any(|n| n == name);
        assert!(known || name.starts_with("USERMILTER_"), "{name} in {environment:?}");
    }
    assert_eq!(environment["HOME"], home.to_str().unwrap());
    assert_eq!((&*environment["USER"], &*environment["LOGNAME"]), ("alice", "alice"));
    assert_eq!(environment["SENDER"], "s@sender.example");
}

#[test]
fn a_filter_gets_at_neither_the_daemon_nor_another_users_filter() {
    let site = Site::new();
    // Bob's filter waits, with the message open and a secret in its environment's SENDER.
    site.slow_filter("bob", 8.0, 77);
    let daemon = Usermilter::start(&site.config(Extra::default()));
    let (monitor, worker) = (daemon.pid(), daemon.worker_pid());
    let of_bob = site.judge_meanwhile("bob@test.example");
    let victim = site.filter_pid("bob");
    // Each attempt that succeeds is written down: the first, which shows that it would be, and break-ins.
    let ptrace = if cfg!(target_arch = "x86_64") { 101 } else { 117 };
    let script = format!(
        "#!/bin/bash\n\
         exec 2>/dev/null\n\
         attempt() {{ if \"$@\" > /dev/null; then echo \"$*\" >> \"$HOME/succeeded\"; fi; }}\n\
         attempt dd if=/proc/self/environ of=/dev/null bs=64 count=1\n\
         for pid in {monitor} {worker} {victim}; do\n\
           for signal in 0 TERM STOP KILL HUP 34; do attempt kill -$signal $pid; done\n\
           for file in environ mem maps auxv stack syscall fd/0 fd/3 fd/4 fd/5; do\n\
             attempt dd if=/proc/$pid/$file of=/dev/null bs=64 count=1\n\
           done\n\
           attempt ls /proc/$pid/fd/\n\
           attempt ls /proc/$pid/cwd/\n\
           attempt readlink /proc/$pid/exe\n\
           attempt prlimit --pid $pid --nofile=1:1\n\
           attempt bash -c \"echo x > /proc/$pid/oom_score_adj\"\n\
           attempt perl -e \"exit(syscall({ptrace}, 0x4206, $pid, 0, 0) == 0 ? 0 : 1)\"\n\
         done\n\
         attempt cat {bob}/.usermilter/message\n\
         attempt ls {bob}\n\
         attempt touch {bob}/x\n\
         attempt ls /root\n\
         echo done > \"$HOME/done\"\n\
         exit 77\n",
        bob = site.users.account("bob").home.display(),
    );
    site.users.filter("alice", "message", script);
    let answer = site.judge("alice@test.example");
    let alice = site.users.account("alice").home.clone();
    assert!(site::exists(&alice.join("done")), "{answer:?}");
    let succeeded = fs::read_to_string(alice.join("succeeded")).unwrap();
    assert_eq!(succeeded, "dd if=/proc/self/environ of=/dev/null bs=64 count=1\n", "a filter could do this");
    assert_eq!(of_bob.join().unwrap().unwrap().letter(), 'y');
    assert_eq!(daemon.worker_pid(), worker);
}

#[test]
fn no_filter_can_change_or_move_the_message_that_another_reads() {
    let site = Site::new();
    let grab = "#!/bin/bash\n\
        { echo x >&0; } 2> /dev/null && echo written > \"$HOME/broken\"\n\
        { echo x > /proc/self/fd/0; } 2> /dev/null && echo reopened > \"$HOME/broken\"\n\
        { truncate -s 0 /proc/self/fd/0; } 2> /dev/null && echo truncated > \"$HOME/broken\"\n\
        cat > \"$HOME/seen\"\n\
        exit 0\n";
    for user in ["alice", "bob"] {
        site.users.filter(user, "message", grab);
    }
    let daemon = Usermilter::start(&site.config(Extra::default()));
    let mut client = site.session();
    assert!(is_accepted(&site::message(&mut client, &["alice@test.example", "bob@test.example"])));
    drop(daemon);
    for user in ["alice", "bob"] {
        let home = &site.users.account(user).home;
        assert!(!site::exists(&home.join("broken")), "{user}");
        let seen = fs::read_to_string(home.join("seen")).unwrap();
        assert!(seen.ends_with("Subject: test\n\ntext\n"), "{user}: {seen:?}");
    }
}

#[test]
fn a_long_extension_does_not_pass_by_a_filter() {
    let site = Site::new();
    site.users.filter("alice", "message", "#!/bin/sh\nexit 77\n");
    let _daemon = Usermilter::start(&site.config(Extra::default()));
    for length in [1, 64, 247, 248, 255, 256, 900] {
        let recipient = format!("alice+{}@test.example", "x".repeat(length));
        assert_eq!(site.judge(&recipient).letter(), 'y', "{length}");
    }
}

/// While mail comes in, `race` swaps what leads to the victim's filter. The attacker's program, wherever the race
/// brought it, must never run as the victim, nor the victim's as anybody else.
fn nothing_foreign_runs_while(prepare: impl Fn(&SystemUser, &SystemUser) -> Box<dyn Fn() + Send>) {
    let site = Site::new();
    let victim = SystemUser::create(&site.sandbox, "victim");
    let attacker = SystemUser::create(&site.sandbox, "attacker");
    let trace = site.sandbox.directory("trace");
    fs::set_permissions(&trace, std::os::unix::fs::PermissionsExt::from_mode(0o1777)).unwrap();
    let script = |name: &str| format!("#!/bin/sh\nid -u > {}/{name}-$$\nexit 77\n", trace.display());
    victim.filter("message", script("victim"));
    attacker.filter("message", script("attacker"));
    // The attacker's program may be read and executed by all: only who owns it must matter.
    for path in [attacker.path("message"), attacker.home.join(".usermilter"), attacker.home.clone()] {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    let config = site.config(Extra::default()).replace(
        &format!("type = \"passwd-file\"\npath = \"{}\"", site.users.passwd_file().display()),
        "type = \"passwd\"",
    );
    let daemon = Usermilter::start(&config);
    let race = prepare(&victim, &attacker);
    let over = Arc::new(AtomicBool::new(false));
    let racer = {
        let over = Arc::clone(&over);
        std::thread::spawn(move || {
            let mut swaps = 0u32;
            while !over.load(Ordering::Relaxed) {
                race();
                swaps += 1;
            }
            swaps
        })
    };
    let start = Instant::now();
    let mut messages = 0;
    let senders: Vec<_> = [&victim.name, &attacker.name]
        .map(|user| (format!("{user}@test.example"), site.milter.clone()))
        .into_iter()
        .map(|(recipient, address)| {
            std::thread::spawn(move || {
                let mut count = 0;
                let mut client = site::session(&address);
                while start.elapsed() < Duration::from_secs(2) {
                    site::message(&mut client, &[&recipient]);
                    count += 1;
                }
                count
            })
        })
        .collect();
    for sender in senders {
        messages += sender.join().unwrap();
    }
    over.store(true, Ordering::Relaxed);
    let swaps = racer.join().unwrap();
    assert!(swaps > 100 && messages > 20, "{swaps} swaps, {messages} messages");
    drop(daemon);
    let mut ran: BTreeMap<(String, u32), usize> = BTreeMap::new();
    for entry in fs::read_dir(&trace).unwrap() {
        let path = entry.unwrap().path();
        let whose = path.file_name().unwrap().to_str().unwrap().split('-').next().unwrap().to_owned();
        // A filter that the end of the test cut off has written nothing.
        if let Ok(uid) = fs::read_to_string(&path).unwrap().trim().parse() {
            *ran.entry((whose, uid)).or_default() += 1;
        }
    }
    let own = |whose: &str, uid: u32| ran.get(&(whose.to_owned(), uid)).copied().unwrap_or(0);
    assert_eq!(own("attacker", victim.uid), 0, "the attacker's program ran as the victim: {ran:?}");
    assert_eq!(own("victim", attacker.uid), 0, "the victim's program ran as the attacker: {ran:?}");
    assert!(
        ran.values().sum::<usize>() > 0,
        "nothing ran, so nothing is shown: {swaps} swaps, {messages} messages"
    );
}

/// Replaces `path` at once by a link to `target`.
fn swap_link(path: &Path, target: &Path) {
    let new = path.with_extension("new");
    let _ = fs::remove_file(&new);
    symlink(target, &new).unwrap();
    fs::rename(&new, path).unwrap();
}

#[test]
fn a_filter_swapped_for_a_foreign_one_does_not_run() {
    nothing_foreign_runs_while(|victim, attacker| {
        let (own, foreign, filter) = (victim.path("own"), attacker.path("message"), victim.path("message"));
        fs::rename(&filter, &own).unwrap();
        Box::new(move || {
            swap_link(&filter, &own);
            swap_link(&filter, &foreign);
        })
    });
}

#[test]
fn a_filter_directory_swapped_for_a_foreign_one_does_not_run() {
    nothing_foreign_runs_while(|victim, attacker| {
        let directory = victim.home.join(".usermilter");
        let (own, foreign): (PathBuf, PathBuf) = (victim.home.join("own"), attacker.home.join(".usermilter"));
        fs::rename(&directory, &own).unwrap();
        Box::new(move || {
            swap_link(&directory, &own);
            swap_link(&directory, &foreign);
        })
    });
}

#[test]
fn a_home_swapped_for_a_foreign_one_does_not_run() {
    nothing_foreign_runs_while(|victim, attacker| {
        // Root's directory of homes: the swap stands for an automounter, or an administrator who moves homes about.
        let (own, foreign) = (victim.home.with_extension("own"), attacker.home.clone());
        fs::rename(&victim.home, &own).unwrap();
        let home = victim.home.clone();
        Box::new(move || {
            swap_link(&home, &own);
            swap_link(&home, &foreign);
        })
    });
}

#[test]
fn an_attacker_whose_directory_a_link_leads_through_wins_no_race() {
    nothing_foreign_runs_while(|victim, attacker| {
        // The attacker renames directories of their own; through one of them the way leads back to the victim's filter.
        let (own, foreign) = (attacker.home.join("own"), attacker.home.join(".usermilter"));
        fs::create_dir(&own).unwrap();
        std::os::unix::fs::chown(&own, Some(attacker.uid), Some(attacker.gid)).unwrap();
        let real = victim.home.join("real");
        fs::rename(victim.home.join(".usermilter"), &real).unwrap();
        symlink(real.join("message"), own.join("message")).unwrap();
        let current = attacker.home.join("current");
        symlink(&current, victim.home.join(".usermilter")).unwrap();
        Box::new(move || {
            for directory in [&own, &foreign] {
                fs::rename(directory, &current).unwrap();
                std::thread::sleep(Duration::from_micros(100));
                fs::rename(&current, directory).unwrap();
            }
        })
    });
}

#[test]
fn a_filter_that_cannot_be_executed_never_refuses_mail() {
    let site = Site::new();
    let daemon = Usermilter::start(&site.config(Extra::default()));
    for (script, why) in [
        ("#!/nonexistent/interpreter\n", "does the interpreter of its #! line exist?"),
        ("exit 77\n", "a script needs a #! line"),
    ] {
        site.users.filter("alice", "message", script);
        let seen = daemon.log_lines().len();
        for _ in 0..20 {
            let answer = site.judge("alice@test.example");
            assert!(is_accepted(&answer), "{script}: {}", answer.text());
        }
        let told = || daemon.log_lines()[seen..].join("\n").matches(why).count();
        assert!(common::wait_until(common::PATIENCE, || told() == 20), "{} times: {why}", told());
    }
}

#[test]
fn the_words_of_a_filter_are_never_lost() {
    let site = Site::new();
    site.users.filter("alice", "message", "#!/bin/sh\necho 'not today'\nexit 77\n");
    let _daemon = Usermilter::start(&site.config(Extra::default()));
    let senders: Vec<_> = (0..4)
        .map(|_| {
            let address = site.milter.clone();
            std::thread::spawn(move || {
                let mut client = site::session(&address);
                for _ in 0..100 {
                    let answer = site::message(&mut client, &["alice@test.example"]);
                    assert_eq!(answer.text(), "550 5.7.1 not today");
                }
            })
        })
        .collect();
    for sender in senders {
        sender.join().unwrap();
    }
}

#[test]
fn a_user_with_too_many_processes_is_named_with_the_limit() {
    let mut site = Site::new();
    // A uid that no other test has, since the kernel counts the processes of all.
    site.users.add("carol", 5777, 5777);
    site.users.filter("carol", "message", "#!/bin/sh\necho $$ > \"$HOME/pid\"\nexec sleep 3\n");
    let config = site.config(Extra { filter: "max-user-processes = 1", ..Extra::default() });
    let daemon = Usermilter::start(&config);
    // The kernel counts before the one that is about to be: two are one more than one.
    let running = [(); 2].map(|()| {
        let transaction = site.judge_meanwhile("carol@test.example");
        site.filter_pid("carol");
        transaction
    });
    assert!(is_accepted(&site.judge("carol@test.example")), "a filter error refuses nothing");
    daemon.wait_for_log("max-user-processes", common::PATIENCE);
    for transaction in running {
        assert!(is_accepted(&transaction.join().unwrap().unwrap()));
    }
}
