//! Real servers for the tests, each private, on loopback, and ended with the test that started it.
//!
//! ```text
//!   smtp::Client ──SMTP──▶ postfix::Postfix ──milter──▶ daemon::Usermilter ──▶ filters of users::VirtualUsers
//!        (XCLIENT plays        │    │                     ▲   ▲                 and users::SystemUser
//!         foreign clients)     │    └──policy─────────────┘   │
//!                              ▼                              │
//!                     Maildirs in a Sandbox         milter::Client, policy::Client
//!                                                   (the MTA's side of both protocols, for the odd cases
//!                                                    and for the sessions recorded in tests/captures)
//! ```
//!
//! Nothing here is skipped when a program or a privilege is missing: [`require`] and [`require_root`] fail
//! the test and say what to install. Everything waits with a time limit, and no process outlives the test run
//! (see [`process`]).
//!
//! `KEEP=1` in the environment keeps the sandboxes for a look afterwards; a failing test keeps its own.

// Each test binary compiles this module for itself and uses a part of it.
#![allow(dead_code, unused_imports, reason = "every test binary uses another part of the harness")]
#![allow(unreachable_pub, reason = "`pub` marks what the harness offers to tests")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a harness that can't go on fails the test")]

pub mod daemon;
pub mod milter;
pub mod own_monitor;
pub mod policy;
pub mod postfix;
pub mod process;
pub mod sandbox;
pub mod sendmail;
pub mod site;
pub mod smtp;
pub mod stream;
pub mod users;

pub use daemon::Usermilter;
pub use postfix::Postfix;
pub use sandbox::Sandbox;
pub use sendmail::Sendmail;
pub use site::Site;
pub use users::{SystemUser, VirtualUsers};

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// The limit for what should take milliseconds: generous, for a loaded machine, since only failures wait for
/// it.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A TCP port of 127.0.0.1 that nobody listens on.
///
/// Taken from below the ephemeral range (32768 and up), so that no outgoing connection grabs it between this
/// call and the server's bind; every process starts elsewhere in the range, and no port is handed out twice.
pub fn free_port() -> u16 {
    const FIRST: u16 = 20_000;
    const COUNT: u16 = 12_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = (std::process::id().wrapping_mul(37) % u32::from(COUNT)) as u16;
    for _ in 0..COUNT {
        let port = FIRST + (start + NEXT.fetch_add(1, Ordering::Relaxed) % COUNT) % COUNT;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
    panic!("no free port on 127.0.0.1");
}

/// Polls until the condition holds; false if it still does not when the time is up.
pub fn wait_until(timeout: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Fails the test unless it runs as root: Postfix, other users' filters and useradd need that.
#[track_caller]
pub fn require_root() {
    assert!(
        is_root(),
        "this test needs root (a private Postfix, programs run as several users): run it as root"
    );
}

/// Whether the effective user is root.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// The path of a program of the system; fails the test, saying what to install, if there is none.
#[track_caller]
pub fn require(program: &str) -> PathBuf {
    let search = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&search)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/lib/postfix/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("{program} is not installed: run tests/install-dependencies"))
}

/// Debian packages unpacked, not installed: once, in a directory of this name below the build directory.
#[track_caller]
pub fn unpacked(name: &str, packages: &[&str]) -> PathBuf {
    let parent = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let directory = parent.join(name);
    if !directory.exists() {
        // Under another name until it is complete, since another test may be at it too.
        let new = tempfile::tempdir_in(parent).expect("temporary directory");
        sandbox::set_mode(new.path(), 0o755);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/unpack-packages");
        let output = Command::new(script).arg(new.path()).args(packages).output().expect("unpack-packages");
        assert!(output.status.success(), "{packages:?}: {}", String::from_utf8_lossy(&output.stderr));
        if std::fs::rename(new.path(), &directory).is_ok() {
            let _ = new.keep();
        }
    }
    directory
}

/// The directory of the libraries in what [`unpacked`] made, which is named after the machine's architecture.
#[track_caller]
pub fn libraries(unpacked: &Path) -> PathBuf {
    let entries = std::fs::read_dir(unpacked.join("usr/lib")).expect("a directory of libraries");
    let is_library = |path: &PathBuf| path.to_string_lossy().ends_with("-linux-gnu");
    entries.flatten().map(|entry| entry.path()).find(is_library).expect("a directory of libraries")
}
