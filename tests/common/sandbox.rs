//! A directory for one test: every server, home and spool of the test lives in it.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A temporary directory (in $TMPDIR or /tmp) that other users may enter, as filters run as them.
///
/// Removed when dropped, unless the test is failing or `KEEP` is set: then its path is printed.
#[derive(Debug)]
pub struct Sandbox {
    directory: Option<tempfile::TempDir>,
    path: PathBuf,
}

impl Sandbox {
    pub fn new() -> Self {
        Self::below(&std::env::temp_dir())
    }

    /// In another place than $TMPDIR, for programs that trust nothing below a directory that others may write: /run.
    pub fn below(parent: &Path) -> Self {
        let mut builder = tempfile::Builder::new();
        let directory = builder.prefix("usermilter-test-").tempdir_in(parent).expect("temporary directory");
        // Resolved, since usermilter judges a filter by its resolved path.
        let path = directory.path().canonicalize().expect("path of the temporary directory");
        set_mode(&path, 0o755);
        Sandbox { directory: Some(directory), path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Makes a directory (mode 0755, root's or the invoking user's) and returns its path.
    pub fn directory(&self, name: &str) -> PathBuf {
        let path = self.join(name);
        make_directory(&path, 0o755, None);
        path
    }

    /// Writes a file (mode 0644) and returns its path.
    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.join(name);
        write_long_ago(&path, contents);
        path
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if (std::thread::panicking() || kept())
            && let Some(directory) = self.directory.take()
        {
            eprintln!("kept: {}", directory.keep().display());
        }
    }
}

/// Whether the environment asks to keep what a test leaves behind (`KEEP=1`).
pub fn kept() -> bool {
    std::env::var("KEEP").is_ok_and(|value| !value.is_empty() && value != "0")
}

/// Writes a file (mode 0644) that nobody takes for one that is just being written, and waits for.
pub(super) fn write_long_ago(path: &Path, contents: impl AsRef<[u8]>) {
    let written = fs::write(path, contents).and_then(|()| fs::File::options().write(true).open(path));
    let long_ago = SystemTime::now() - Duration::from_secs(60);
    let aged = written.and_then(|file| file.set_modified(long_ago));
    aged.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    set_mode(path, 0o644);
}

pub(super) fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode))
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

/// Makes a directory with exactly this mode, whatever the umask, and this owner and group.
pub(super) fn make_directory(path: &Path, mode: u32, owner: Option<(u32, u32)>) {
    fs::create_dir_all(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    set_owner(path, owner);
    set_mode(path, mode);
}

/// Gives the file away; a no-op for a test without root whose files are its own already.
pub(super) fn set_owner(path: &Path, owner: Option<(u32, u32)>) {
    let Some((uid, gid)) = owner else { return };
    if uid == nix::unistd::geteuid().as_raw() && !super::is_root() {
        return;
    }
    chown(path, Some(uid), Some(gid)).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}
