//! Races: while an attacker swaps what is on the way to alice's filter, as fast as they can, the stand-in has it run and her
//! looked at a thousand times each. Every program leaves a file, which belongs to who it ran as.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe;
use usermilter::monitor::{End, Event};

use super::stand_in::{Request, StandIn, User, virtual_user};
use super::{Scene, wait_for_within};

/// Runs, and as many inspections, while one thing is swapped.
const TIMES: u32 = 1000;

/// Jobs under way: as many as the scene's `max-processes`.
const AT_A_TIME: u32 = 4;

/// What only alice may read.
const SECRET: &str = "# nobody reads this but alice\n";

/// For a thousand processes each way on a machine that does other things too.
const LONG: Duration = Duration::from_secs(300);

/// What came of it.
#[derive(Debug)]
struct Race {
    /// Times that the attacker went round.
    swaps: u64,
    /// Of the runs, those that came to an exit status of a filter.
    executed: u32,
    /// Inspections that told what is secret.
    leaks: u32,
    /// What the attacker wrote down.
    notes: String,
    /// Program and uid, and how often it ran.
    ran: BTreeMap<(String, u32), u32>,
}

impl Race {
    /// Sets the scene, has the attacker swap, and waits for the stand-in. The attacker is a piece of Python, run as
    /// this uid, with `homes` to begin paths with and `quiet(f, *arguments)` for calls that may fail.
    #[track_caller]
    fn run(prepare: impl FnOnce(&Scene), attacker: u32, loop_body: &str) -> Self {
        let scene = Scene::new();
        let trace = scene.sandbox.directory("trace");
        fs::set_permissions(&trace, Permissions::from_mode(0o1777)).unwrap();
        for (user, uid) in [("alice", 5001), ("bob", 5002)] {
            let account = scene.users.account(user);
            account.filter("message", marker(&trace, user));
            account.filter("message-own", marker(&trace, &format!("{user}-own")));
            account.file("rules.toml", format!("# rules of {user}\n"));
            // All that is not to be read may be reached: only who owns it must matter.
            for path in [account.home.clone(), account.home.join(".usermilter"), account.path("message")] {
                fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
            }
            owned(&account.home.join("secret"), SECRET, uid, 0o600);
        }
        prepare(&scene);
        let monitor = scene.start("races", None);
        wait_for_within(&scene.mark("attacks"), LONG);

        let script = format!(
            "import ctypes, os, sys, time\nhomes, stop, monitor = sys.argv[1:]\n\
             def quiet(f, *a):\n    try: return f(*a)\n    except OSError: return None\n\
             mount = ctypes.CDLL(None, use_errno=True).mount\n\
             umount = ctypes.CDLL(None, use_errno=True).umount2\n\
             n = 0\nwhile n % 50 or not os.path.exists(stop):\n    n += 1\n{}\nprint(n)\n",
            loop_body.lines().map(|line| format!("    {line}\n")).collect::<String>()
        );
        let mut command = Command::new("nsenter");
        // Where the monitor has mounts of its own, an attacker that is root changes those.
        command.arg("--mount").arg("-t").arg(monitor.pid().to_string());
        if attacker != 0 {
            command = Command::new("env");
            command.uid(attacker).gid(attacker);
        }
        command.arg("/usr/bin/python3").args(["-c", &script]).arg(scene.users.homes());
        command
            .arg(scene.mark("raced"))
            .arg(monitor.pid().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let attack = command.spawn().unwrap();
        fs::write(scene.mark("begin"), "").unwrap();
        wait_for_within(&scene.mark("raced"), LONG);
        let swaps = String::from_utf8(attack.wait_with_output().unwrap().stdout).unwrap();
        let told = fs::read_to_string(scene.mark("raced")).unwrap();
        let counts: Vec<u32> = told.split_whitespace().map(|number| number.parse().unwrap()).collect();
        monitor.stop();

        let mut ran = BTreeMap::new();
        for entry in fs::read_dir(&trace).unwrap().flatten() {
            let name = entry.file_name().into_string().unwrap();
            let program = name.rsplit_once('-').unwrap().0.to_owned();
            *ran.entry((program, entry.metadata().unwrap().uid())).or_default() += 1;
        }
        let swaps = swaps.trim().parse().unwrap();
        let notes = fs::read_to_string(alice(&scene, "notes")).unwrap_or_default();
        let race = Race { swaps, executed: counts[0], leaks: counts[1], notes, ran };
        println!("  {} runs, {} inspections: {race:?}", TIMES, TIMES);
        assert!(race.swaps >= 20, "{race:?}");
        assert_eq!(race.leaks, 0, "{race:?}");
        race
    }

    /// How often programs ran, after it is seen that these, as alice, are all that did.
    #[track_caller]
    fn only(&self, programs: &[&str]) -> Vec<u32> {
        for (program, uid) in self.ran.keys() {
            assert!(*uid == 5001 && programs.contains(&program.as_str()), "{self:?}");
        }
        let count = |program: &&str| self.ran.get(&((*program).to_owned(), 5001)).copied().unwrap_or(0);
        programs.iter().map(count).collect()
    }
}

fn marker(trace: &Path, name: &str) -> String {
    format!("#!/bin/sh\n: > {}/{name}-$$\n", trace.display())
}

fn owned(path: &Path, text: &str, uid: u32, mode: u32) {
    fs::write(path, text).unwrap();
    chown(path, Some(uid), Some(uid)).unwrap();
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn alice(scene: &Scene, name: &str) -> std::path::PathBuf {
    scene.users.account("alice").home.join(name)
}

/// Alice's own edits: the only swaps that may change what runs, and each run is of one or the other.
pub(super) fn edits() {
    let other = |scene: &Scene| {
        let text = marker(&scene.sandbox.join("trace"), "alice-new");
        owned(&alice(scene, "new"), &text, 5001, 0o755);
        fs::hard_link(scene.users.account("alice").path("message"), alice(scene, "old")).unwrap();
    };
    // A link of each version is renamed over the filter: at any time there is one of them.
    let race = Race::run(
        other,
        5001,
        "for version in ('old', 'new'):\n\
         \x20   quiet(os.link, homes + '/alice/' + version, homes + '/alice/next')\n\
         \x20   os.rename(homes + '/alice/next', homes + '/alice/.usermilter/message')\n\
         \x20   quiet(os.unlink, homes + '/alice/next')",
    );
    let ran = race.only(&["alice", "alice-new", "alice-own"]);
    assert_eq!(ran.iter().sum::<u32>(), TIMES, "{race:?}");
    assert!(race.executed == TIMES && ran[0] > 0 && ran[1] > 0, "{race:?}");
}

/// A directory that a group may write, as some administrators make them.
pub(super) fn writable_directory() {
    let shared = |scene: &Scene| {
        let directory = alice(scene, ".usermilter");
        chown(&directory, None, Some(5002)).unwrap();
        fs::set_permissions(directory, Permissions::from_mode(0o2775)).unwrap();
    };
    let race = Race::run(
        shared,
        5002,
        "place = homes + '/alice/.usermilter/'\n\
         os.rename(place + 'message', place + 'kept')\n\
         quiet(os.symlink, homes + '/bob/.usermilter/message', place + 'message')\n\
         quiet(os.rename, place + 'message', place + 'away')\n\
         with open(place + 'message', 'w') as f:\n\
         \x20   f.write(open(homes + '/bob/.usermilter/message').read()); os.fchmod(f.fileno(), 0o755)\n\
         os.rename(place + 'kept', place + 'message')",
    );
    race.only(&[]);
    assert_eq!(race.executed, 0, "{race:?}");
}

/// Sticky directories, in which everybody may make names, as filter directory and as the home's parent.
pub(super) fn sticky_directory() {
    let open = |scene: &Scene| {
        let directory = alice(scene, ".usermilter");
        fs::remove_file(directory.join("message")).unwrap();
        // What alice has elsewhere, and what root has, is not to be made a filter by others either.
        let trace = scene.sandbox.join("trace");
        owned(&alice(scene, "tool"), &marker(&trace, "tool"), 5001, 0o755);
        owned(&scene.users.homes().join("roots"), &marker(&trace, "roots"), 0, 0o755);
        fs::set_permissions(directory, Permissions::from_mode(0o1777)).unwrap();
    };
    let race = Race::run(
        open,
        5002,
        "place = homes + '/alice/.usermilter/'\n\
         for target in (homes + '/bob/.usermilter/message', homes + '/alice/tool', homes + '/roots'):\n\
         \x20   quiet(os.symlink, target, place + 'message'); quiet(os.unlink, place + 'message')\n\
         \x20   quiet(os.link, target, place + 'message'); quiet(os.unlink, place + 'message')\n\
         quiet(os.rename, place + 'message-own', place + 'message')\n\
         quiet(os.link, place + 'message-own', place + 'message')\n\
         quiet(os.mkdir, place + 'message'); quiet(os.rmdir, place + 'message')",
    );
    // Hard links to what is another's: the kernel forbids them on every host that systemd or Debian has set up.
    let linked = fs::read_to_string("/proc/sys/fs/protected_hardlinks").unwrap().trim() == "0";
    let own = race.only(if linked { &["alice-own", "tool", "roots"] } else { &["alice-own"] })[0];
    // Every other run is of a filter that is not under attack.
    assert!(own >= TIMES / 2, "{race:?}");
}

/// A home that a worker names, behind a link that the attacker points now here, now there.
pub(super) fn home_behind_a_link() {
    let lure = |scene: &Scene| {
        let home = scene.users.account("bob").home.clone();
        // Rules that are alice's secret, wherever the way leads to bob's.
        let rules = home.join(".usermilter/rules.toml");
        fs::remove_file(&rules).unwrap();
        symlink(alice(scene, "secret"), &rules).unwrap();
        fs::write(scene.mark("home"), home.join("way").as_os_str().as_encoded_bytes()).unwrap();
    };
    let race = Race::run(
        lure,
        5002,
        "for target in (homes + '/alice', homes + '/bob'):\n\
         \x20   quiet(os.symlink, target, homes + '/bob/next')\n\
         \x20   os.rename(homes + '/bob/next', homes + '/bob/way')",
    );
    race.only(&[]);
}

/// No swap, but the same race: a child of the monitor that is alice already, and not yet her filter, has the monitor's
/// memory, with passwords for directories in it. She may stop it, and may not look into it.
pub(super) fn looks_into_a_child() {
    let race = Race::run(
        |_| (),
        5001,
        "name = open(f'/proc/{monitor}/comm').read()\n\
         if n == 1: caught = executed = looks = 0\n\
         for pid in open(f'/proc/{monitor}/task/{monitor}/children').read().split():\n\
         \x20   if not quiet(lambda: os.kill(int(pid), 19) or 1): continue\n\
         \x20   state = lambda: open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()[0]\n\
         \x20   until = time.monotonic() + 1\n\
         \x20   while quiet(state) not in ('T', 'Z', 'X', None) and time.monotonic() < until: pass\n\
         \x20   if quiet(state) == 'T':\n\
         \x20       files = [lambda f=f: open(f'/proc/{pid}/{f}', 'rb').fileno() for f in ('mem', 'environ', 'maps')]\n\
         \x20       seen = [quiet(f) is not None for f in files] + [quiet(os.listdir, f'/proc/{pid}/fd') is not None]\n\
         \x20       if quiet(lambda: open(f'/proc/{pid}/comm').read()) == name: caught += 1; looks += any(seen)\n\
         \x20       else: executed += all(seen)\n\
         \x20   quiet(os.kill, int(pid), 18)\n\
         if n % 50 == 49: open(homes + '/alice/notes', 'w').write(f'{caught} {executed} {looks}')",
    );
    race.only(&["alice", "alice-own"]);
    let counts: Vec<u32> = race.notes.split_whitespace().map(|count| count.parse().unwrap()).collect();
    // The same looks into what has become her filter succeed.
    assert!(counts[0] > 0 && counts[1] > 0 && counts[2] == 0, "{race:?}");
}

/// Versions of a directory that root mounts over each other.
pub(super) fn mounts() {
    let versions = |scene: &Scene| {
        let (directory, copy) = (alice(scene, ".usermilter"), alice(scene, "mounted"));
        fs::create_dir(&copy).unwrap();
        let text = marker(&scene.sandbox.join("trace"), "alice-mounted");
        for name in ["message", "message-own"] {
            owned(&copy.join(name), &text, 5001, 0o755);
        }
        for path in [&directory, &copy] {
            chown(path, Some(5001), Some(5001)).unwrap();
            fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
        }
        fs::write(scene.mark("own-mounts"), "").unwrap();
    };
    const BIND: u32 = 0x1000;
    const DETACH: u32 = 2;
    let race = Race::run(
        versions,
        0,
        &format!(
            "place = (homes + '/alice/.usermilter').encode()\n\
             mount((homes + '/alice/mounted').encode(), place, None, {BIND}, None)\n\
             time.sleep(0.002)\n\
             umount(place, {DETACH})"
        ),
    );
    let ran = race.only(&["alice", "alice-own", "alice-mounted"]);
    // A directory that goes away under a process is a filter error, now and then.
    assert!(ran.iter().sum::<u32>() > TIMES / 2 && ran[0] > 0 && ran[2] > 0, "{race:?}");
}

impl StandIn {
    pub(super) fn run_while_others_swap(&self) {
        while !self.path("begin").exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let home = fs::read_to_string(self.path("home")).map_or_else(|_| self.home("alice"), Into::into);
        let user: User = virtual_user("alice", 5001, 5001, home);
        let (output, theirs) = pipe().unwrap();
        fcntl(&output, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let mut output = File::from(output);
        let (mut sent, mut ended, mut executed, mut leaks) = (0, 0, 0, 0);
        while ended < 2 * TIMES {
            if sent < 2 * TIMES && sent - ended < AT_A_TIME {
                // The extension has a filter that is nobody's aim.
                let extension = (sent % 4 < 2).then_some("own");
                let (request, descriptors) = match sent % 2 {
                    0 => (Request::Inspect { job: 0, user: user.clone() }, 1),
                    _ => (self.run(1, user.clone(), extension), 2),
                };
                self.send(&request, &[theirs.as_raw_fd(); 2][..descriptors]);
                sent += 1;
                continue;
            }
            if let Some(Event::Finished { job, end, .. }) = self.event(Duration::from_millis(50)) {
                ended += 1;
                executed += u32::from(job == 1 && matches!(end, End::Exited(_)));
            }
            // Reports are short, and written at once, so that none is cut where it matters.
            let mut said = Vec::new();
            let _ = output.read_to_end(&mut said);
            leaks += u32::from(String::from_utf8_lossy(&said).contains(SECRET.trim_end()));
        }
        self.mark("raced", &format!("{executed} {leaks}\n"));
    }
}
