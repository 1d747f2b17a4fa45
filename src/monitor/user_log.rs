//! Appending to a user's own log, as the user.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

use nix::fcntl::{Flock, FlockArg};

use super::checks::{self, CheckError};

/// Length, in bytes, at which a log becomes `log.1`, in the place of the one before. So both together stay below twice
/// this and one entry.
const MAX_LENGTH: u64 = 1 << 20;

/// Appends text to the log if there is one; it is never created.
///
/// # Errors
///
/// [`CheckError`]: somebody else could point the path elsewhere, it is no regular file, or can't be written.
pub(super) fn append(path: &Path, uid: u32, text: &str) -> Result<(), CheckError> {
    let Some((real, mut log)) = checks::open_for_appending(path, uid)? else {
        return Ok(());
    };
    let written = log.write_all(text.as_bytes()).and_then(|()| keep_short(&real, log));
    written.map_err(|error| CheckError::system(&real, error))
}

/// Sets a log aside that has become too long, and begins a new one.
fn keep_short(path: &Path, log: File) -> io::Result<()> {
    let metadata = log.metadata()?;
    if metadata.len() < MAX_LENGTH {
        return Ok(());
    }
    // Several may append at a time. Who does not get the lock, or finds another file in its place, leaves it to others.
    let Ok(_lock) = Flock::lock(log, FlockArg::LockExclusiveNonblock) else {
        return Ok(());
    };
    let current = fs::symlink_metadata(path)?;
    if (current.dev(), current.ino()) != (metadata.dev(), metadata.ino()) {
        return Ok(());
    }
    let mut old = path.as_os_str().to_owned();
    old.push(".1");
    fs::rename(path, old)?;
    OpenOptions::new().write(true).create_new(true).mode(metadata.mode() & 0o777).open(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// Mode 0700 whatever the umask, which other tests of this process change.
    fn private_directory() -> tempfile::TempDir {
        tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o700)).tempdir().unwrap()
    }

    fn uid() -> u32 {
        nix::unistd::geteuid().as_raw()
    }

    #[test]
    fn a_log_that_exists_grows_and_is_set_aside_in_time() {
        let directory = private_directory();
        let (log, old) = (directory.path().join("log"), directory.path().join("log.1"));
        append(&log, uid(), "nobody asked\n").unwrap();
        assert!(!log.exists());
        fs::write(&log, "").unwrap();
        append(&log, uid(), "one\n").unwrap();
        append(&log, uid(), "two\n").unwrap();
        assert_eq!(fs::read_to_string(&log).unwrap(), "one\ntwo\n");
        let line = "x".repeat(60_000) + "\n";
        for _ in 0..100 {
            append(&log, uid(), &line).unwrap();
            let length = |path: &Path| fs::metadata(path).map_or(0, |m| m.len());
            assert!(length(&log) < MAX_LENGTH && length(&old) < MAX_LENGTH + 60_001);
        }
        assert!(old.exists());
    }

    #[test]
    fn what_is_no_file_of_the_users_own_is_not_written_to() {
        let directory = private_directory();
        let path = |name: &str| directory.path().join(name);
        nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for special in [path("fifo"), "/dev/null".into(), directory.path().to_owned()] {
            assert!(append(&special, uid(), "x").is_err(), "{}", special.display());
        }
        fs::write(path("target"), "").unwrap();
        symlink("target", path("link")).unwrap();
        append(&path("link"), uid(), "x").unwrap();
        assert_eq!(fs::read_to_string(path("target")).unwrap(), "x");
        // Others could put a link there that leads to a file of the user's which is worth more.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(append(&path("target"), uid(), "x").is_err());
    }
}
