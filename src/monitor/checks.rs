//! What must hold of a file before it is executed; asked as the user whose file it is.
//!
//! Only the user or root may be able to swap the file, anywhere on its way: then checking by path and
//! executing by path can't be played against each other by anybody else.

use std::{
    borrow::Cow,
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
    time::{Duration, SystemTime},
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::{Mode, SFlag, fstat},
    unistd::{AccessFlags, access},
};

/// Symbolic links followed on the way to one file, as in the kernel (path_resolution(7)).
const MAX_LINKS: usize = 40;

use crate::sys;

/// Write permission of group and others.
const OTHERS_MAY_WRITE: u32 = 0o022;
const STICKY: u32 = 0o1000;
const SETID: u32 = 0o6000;

/// Why a file is not executed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CheckError {
    /// There is none.
    #[error("no such file")]
    Missing,
    /// The check named failed on the path.
    #[error("{}: {problem}", path.display())]
    Failed {
        /// On what.
        path: PathBuf,
        /// Which check, and what to do.
        problem: String,
    },
}

impl CheckError {
    fn failed(path: &Path, problem: impl Into<String>) -> Self {
        Self::Failed { path: path.into(), problem: problem.into() }
    }

    pub(super) fn system(path: &Path, error: impl Into<io::Error>) -> Self {
        Self::failed(path, error.into().to_string())
    }

    /// The same, of a path that begins in `directory`.
    pub(super) fn below(self, directory: &Path) -> Self {
        match self {
            Self::Missing => Self::Missing,
            Self::Failed { path, problem } => Self::Failed { path: directory.join(path), problem },
        }
    }
}

/// Something on the way to which every directory and every symbolic link is checked.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Without links.
    path: PathBuf,
    metadata: Metadata,
}

impl Place {
    fn root() -> Result<Self, CheckError> {
        let path = PathBuf::from("/");
        let metadata = fs::symlink_metadata(&path).map_err(|error| CheckError::system(&path, error))?;
        Ok(Self { path, metadata })
    }

    /// The real path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// As [`executable`], with a path that begins at this place: what is checked is not checked again.
    pub(super) fn executable(&self, path: &Path, uid: u32) -> Result<PathBuf, CheckError> {
        find(Some(self), path, uid)?.ok_or(CheckError::Missing)?.into_executable(uid)
    }

    /// Whether only the user and root can make files in it, not even in a sticky directory. Where a group may write, it
    /// was given to the group by the user; a directory of root's is not the user's to give.
    ///
    /// # Errors
    ///
    /// [`CheckError`]: who could.
    pub(super) fn check_filled_by(&self, uid: u32) -> Result<(), CheckError> {
        let Self { path, metadata } = self;
        check_owner(path, metadata.uid(), uid)?;
        let others = if metadata.uid() == uid { OTHERS_MAY_WRITE & 0o007 } else { OTHERS_MAY_WRITE };
        if metadata.mode() & others != 0 {
            return Err(CheckError::failed(path, "directory is writable by group or others (chmod go-w)"));
        }
        Ok(())
    }

    fn into_executable(self, uid: u32) -> Result<PathBuf, CheckError> {
        let Self { path, metadata } = self;
        check_file(&path, &metadata, uid)?;
        access(&path, AccessFlags::X_OK)
            .map_err(|_| CheckError::failed(&path, "not executable by its user (chmod u+x)"))?;
        Ok(path)
    }
}

/// The real path of an executable that passes every check for the user `uid`.
///
/// Symbolic links are followed; the file is never opened for reading or writing.
///
/// # Errors
///
/// [`CheckError`], with the path on which the check failed.
pub(super) fn executable(path: &Path, uid: u32) -> Result<PathBuf, CheckError> {
    find(None, path, uid)?.ok_or(CheckError::Missing)?.into_executable(uid)
}

/// What is there, every step of the way checked. `None`: there is nothing, whatever the way.
fn find(from: Option<&Place>, path: &Path, uid: u32) -> Result<Option<Place>, CheckError> {
    follow_from(from, path, uid).map(Some).or_else(|failed| {
        let whole = from.map_or_else(|| path.to_owned(), |place| place.path.join(path));
        match fs::symlink_metadata(whole) {
            Err(error) if is_absence(&error) => Ok(None),
            _ => Err(failed),
        }
    })
}

/// Whether the error says that there is no such file. A name that is too long for the file system is that of none:
/// strangers choose extensions, which are part of names.
pub(super) fn is_absence(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidFilename, NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory | InvalidFilename)
}

/// What is behind a path, when everything that decides where it leads is checked: each directory, and each symbolic
/// link. A link in a directory that others may write could be pointed elsewhere by them.
///
/// # Errors
///
/// [`CheckError`], with the path on which the check failed.
pub(super) fn follow(path: &Path, uid: u32) -> Result<Place, CheckError> {
    follow_from(None, path, uid)
}

/// The working directory, to be called by the path by which it was entered.
///
/// # Errors
///
/// [`CheckError`], if it can't be looked at.
pub(super) fn working_directory(path: &Path) -> Result<Place, CheckError> {
    let metadata = fs::metadata(".").map_err(|error| CheckError::system(path, error))?;
    Ok(Place { path: path.into(), metadata })
}

/// Whether there is nothing, and nobody but the user or root can put something there.
pub(super) fn stays_absent(path: &Path, uid: u32) -> bool {
    let is_absent = |path: &Path| fs::symlink_metadata(path).is_err_and(|error| is_absence(&error));
    let present = path.ancestors().find(|path| !is_absent(path));
    present.is_some_and(|present| {
        present != path && follow(present, uid).is_ok_and(|place| place.check_filled_by(uid).is_ok())
    })
}

fn follow_from(from: Option<&Place>, path: &Path, uid: u32) -> Result<Place, CheckError> {
    let (mut place, mut rest) = match (from, path.strip_prefix("/")) {
        (Some(place), Err(_)) => (place.clone(), Cow::Borrowed(path)),
        (_, Ok(below_root)) => (Place::root()?, Cow::Borrowed(below_root)),
        (None, Err(_)) => return Err(CheckError::failed(path, "not an absolute path")),
    };
    let mut links = 0;
    'way: loop {
        let mut components = rest.components();
        while let Some(component) = components.next() {
            match component {
                Component::CurDir | Component::Prefix(_) => continue,
                Component::RootDir => {
                    place = Place::root()?;
                    continue;
                }
                // Whatever the way goes on from is a directory.
                Component::ParentDir => {
                    check_directory(&place.path, &place.metadata, uid)?;
                    place.path.pop();
                }
                Component::Normal(name) => {
                    check_directory(&place.path, &place.metadata, uid)?;
                    place.path.push(name);
                }
            }
            let next = &place.path;
            let metadata = fs::symlink_metadata(next).map_err(|error| CheckError::system(next, error))?;
            if metadata.is_symlink() {
                check_owner(next, metadata.uid(), uid)?;
                links += 1;
                if links > MAX_LINKS {
                    return Err(CheckError::system(path, nix::errno::Errno::ELOOP));
                }
                let target = fs::read_link(next).map_err(|error| CheckError::system(next, error))?;
                place.path.pop();
                rest = Cow::Owned(target.join(components.as_path()));
                continue 'way;
            }
            place.metadata = metadata;
        }
        return Ok(place);
    }
}

fn check_directory(path: &Path, metadata: &Metadata, uid: u32) -> Result<(), CheckError> {
    if !metadata.is_dir() {
        return Err(CheckError::failed(path, "not a directory"));
    }
    check_owner(path, metadata.uid(), uid)?;
    let mode = metadata.mode();
    if mode & OTHERS_MAY_WRITE != 0 && mode & STICKY == 0 {
        return Err(CheckError::failed(path, "directory is writable by group or others (chmod go-w)"));
    }
    Ok(())
}

fn check_regular(path: &Path, mode: u32) -> Result<(), CheckError> {
    if SFlag::from_bits_truncate(mode) & SFlag::S_IFMT == SFlag::S_IFREG {
        Ok(())
    } else {
        Err(CheckError::failed(path, "not a regular file"))
    }
}

fn check_file(path: &Path, metadata: &Metadata, uid: u32) -> Result<(), CheckError> {
    let mode = metadata.mode();
    check_regular(path, mode)?;
    check_owner(path, metadata.uid(), uid)?;
    if mode & OTHERS_MAY_WRITE != 0 {
        return Err(CheckError::failed(path, "file is writable by group or others (chmod go-w)"));
    }
    if mode & SETID != 0 {
        return Err(CheckError::failed(path, "file has a setuid or setgid bit (chmod ug-s)"));
    }
    Ok(())
}

fn check_owner(path: &Path, owner: u32, uid: u32) -> Result<(), CheckError> {
    if owner == uid || owner == 0 {
        Ok(())
    } else {
        Err(CheckError::failed(
            path,
            format!("owned by uid {owner}, neither by the user (uid {uid}) nor by root"),
        ))
    }
}

/// A regular file to append to, and its real path; `None` if there is none. Its way must be one that only the user or
/// root can change, or somebody else could have the user write to another file.
///
/// # Errors
///
/// [`CheckError`], with the path on which the check failed.
pub(super) fn open_for_appending(path: &Path, uid: u32) -> Result<Option<(PathBuf, fs::File)>, CheckError> {
    let Some(Place { path: real, .. }) = find(None, path, uid)? else { return Ok(None) };
    // O_PATH: looking at a FIFO or a device must neither wait nor have an effect.
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = open(&real, flags, Mode::empty()).map_err(|error| CheckError::system(&real, error))?;
    let stat = fstat(&file).map_err(|error| CheckError::system(&real, error))?;
    check_regular(&real, stat.st_mode)?;
    check_owner(&real, stat.st_uid, uid)?;
    let file = sys::reopen_for_appending(&file).map_err(|error| CheckError::system(&real, error))?;
    Ok(Some((real, file.into())))
}

/// A file that was changed so short a time ago may be half-written: it is read again until it stays the same. Programs that
/// write in place are done within a fraction of it.
const UNSETTLED: Duration = Duration::from_millis(50);

/// The text of a regular file, or `None` if there is none. Special files are not waited for; one that is just being
/// written is.
///
/// # Errors
///
/// [`CheckError`] if it is no regular file, can't be read, is longer than `limit` bytes, or not UTF-8.
pub(super) fn read_text(path: &Path, limit: u64) -> Result<Option<String>, CheckError> {
    settled(|| read_text_once(path, limit), || std::thread::sleep(UNSETTLED))
}

/// Reads, with the time of the last change, until nothing changes.
fn settled(
    mut read: impl FnMut() -> Result<Option<(String, SystemTime)>, CheckError>,
    mut wait: impl FnMut(),
) -> Result<Option<String>, CheckError> {
    let mut last = None;
    loop {
        let Some((text, changed)) = read()? else { return Ok(None) };
        // A time to come is of a clock that was set back.
        let is_settled = changed.elapsed().map_or(true, |age| age > UNSETTLED);
        if is_settled || last.as_ref() == Some(&text) {
            return Ok(Some(text));
        }
        last = Some(text);
        wait();
    }
}

fn read_text_once(path: &Path, limit: u64) -> Result<Option<(String, SystemTime)>, CheckError> {
    use std::io::Read;
    // Opening a device or a FIFO can wait or have an effect (a tty would become the session's): look first.
    let file = match open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map_err(io::Error::from) {
        Err(error) if is_absence(&error) => return Ok(None),
        other => other.map_err(|error| CheckError::system(path, error))?,
    };
    let stat = fstat(&file).map_err(|error| CheckError::system(path, error))?;
    check_regular(path, stat.st_mode)?;
    let file = sys::reopen_for_reading(&file).map_err(|error| CheckError::system(path, error))?;
    let file = fs::File::from(file);
    let changed = file.metadata().and_then(|metadata| metadata.modified());
    let changed = changed.map_err(|error| CheckError::system(path, error))?;
    let mut text = String::new();
    file.take(limit + 1).read_to_string(&mut text).map_err(|error| CheckError::system(path, error))?;
    if text.len() as u64 > limit {
        return Err(CheckError::failed(path, format!("longer than {limit} bytes")));
    }
    Ok(Some((text, changed)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// Mode 0700 whatever the umask, which other tests of this process change.
    fn private_directory() -> tempfile::TempDir {
        tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o700)).tempdir().unwrap()
    }

    struct Scene {
        directory: tempfile::TempDir,
        uid: u32,
    }

    impl Scene {
        fn new() -> Self {
            Self { directory: private_directory(), uid: nix::unistd::geteuid().as_raw() }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn filter(&self, name: &str, mode: u32) -> PathBuf {
            let path = self.path(name);
            fs::write(&path, "#!/bin/sh\n").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        }

        fn fault(&self, path: &Path) -> String {
            executable(path, self.uid).unwrap_err().to_string()
        }
    }

    #[test]
    fn a_filter_of_ones_own_passes_and_links_are_followed_to_the_real_path() {
        let scene = Scene::new();
        let filter = scene.filter("message", 0o755);
        let link = scene.path("link");
        symlink(&filter, &link).unwrap();
        assert_eq!(executable(&link, scene.uid).unwrap(), fs::canonicalize(&filter).unwrap());
    }

    #[test]
    fn each_check_names_the_path_that_fails_it() {
        let scene = Scene::new();
        assert!(scene.fault(&scene.filter("a", 0o775)).contains("a: file is writable by group"));
        assert!(scene.fault(&scene.filter("b", 0o757)).contains("writable"));
        assert!(scene.fault(&scene.filter("c", 0o4755)).contains("setuid"));
        assert!(scene.fault(&scene.filter("d", 0o644)).contains("not executable"));
        assert!(scene.fault(scene.directory.path()).contains("not a regular file"));
        nix::unistd::mkfifo(&scene.path("fifo"), Mode::S_IRWXU).unwrap();
        assert!(scene.fault(&scene.path("fifo")).contains("not a regular file"));
        symlink("/nonexistent/x", scene.path("dangling")).unwrap();
        assert!(scene.fault(&scene.path("dangling")).contains("/nonexistent: "));
        symlink("loop", scene.path("loop")).unwrap();
        assert!(scene.fault(&scene.path("loop")).contains("loop: "));
        assert!(matches!(executable(&scene.path("nothing"), scene.uid), Err(CheckError::Missing)));
        assert!(matches!(executable(&scene.path("a/message"), scene.uid), Err(CheckError::Missing)));
        assert!(matches!(executable(&scene.path(&"x".repeat(300)), scene.uid), Err(CheckError::Missing)));
    }

    #[test]
    fn links_are_followed_as_the_kernel_does_and_each_directory_on_the_way_is_checked() {
        let scene = Scene::new();
        let filter = scene.filter("message", 0o755);
        for directory in ["open", "closed", "closed/deep"] {
            fs::create_dir(scene.path(directory)).unwrap();
            fs::set_permissions(scene.path(directory), fs::Permissions::from_mode(0o755)).unwrap();
        }
        symlink("../message", scene.path("open/link")).unwrap();
        symlink("../../message", scene.path("closed/deep/link")).unwrap();
        symlink("closed/./deep/../deep", scene.path("way")).unwrap();
        assert_eq!(
            executable(&scene.path("way/../deep/link"), scene.uid).unwrap(),
            fs::canonicalize(&filter).unwrap()
        );
        assert!(executable(&scene.path("open/link"), scene.uid).is_ok());
        fs::set_permissions(scene.path("open"), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(scene.fault(&scene.path("open/link")).contains("open: directory is writable"));
    }

    #[test]
    fn a_directory_that_others_may_write_fails_unless_it_is_sticky() {
        let scene = Scene::new();
        let filter = scene.filter("message", 0o755);
        fs::set_permissions(scene.directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(scene.fault(&filter).contains("directory is writable"));
        fs::set_permissions(scene.directory.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        assert!(executable(&filter, scene.uid).is_ok());
    }

    #[test]
    fn a_file_of_somebody_else_fails() {
        let scene = Scene::new();
        let filter = scene.filter("message", 0o755);
        // Root may own anything; so ask on behalf of a uid that owns nothing here, which the owner must differ from.
        if scene.uid != 0 {
            assert!(executable(&filter, scene.uid + 1).unwrap_err().to_string().contains("owned by uid"));
        } else {
            nix::unistd::chown(&filter, Some(4242.into()), None).unwrap();
            assert!(executable(&filter, 4243).unwrap_err().to_string().contains("owned by uid 4242"));
        }
    }

    #[test]
    fn reading_waits_for_no_fifo_and_takes_no_more_than_the_limit() {
        let scene = Scene::new();
        nix::unistd::mkfifo(&scene.path("fifo"), Mode::S_IRWXU).unwrap();
        assert!(read_text(&scene.path("fifo"), 10).is_err());
        assert!(read_text(Path::new("/dev/zero"), 10).is_err());
        fs::write(scene.path("long"), "12345678901").unwrap();
        assert!(read_text(&scene.path("long"), 10).is_err());
        assert_eq!(read_text(&scene.path("long"), 11).unwrap().as_deref(), Some("12345678901"));
        assert_eq!(read_text(&scene.path("none"), 10).unwrap(), None);
    }

    #[test]
    fn a_text_that_is_being_written_is_read_until_it_stays_the_same() {
        let read_in_turn = |texts: &[&str], age: Duration| {
            let mut waits = 0;
            let mut texts = texts.iter();
            let read = || Ok(texts.next().map(|text| ((*text).to_owned(), SystemTime::now() - age)));
            let text = settled(read, || waits += 1).unwrap();
            (text, waits)
        };
        let text = |text: &str| Some(text.to_owned());
        let now = Duration::ZERO;
        assert_eq!(read_in_turn(&["half", "whole", "whole", "x"], now), (text("whole"), 2));
        assert_eq!(read_in_turn(&["", "half", "half", "x"], now), (text("half"), 2));
        assert_eq!(read_in_turn(&["whole", "x"], UNSETTLED * 2), (text("whole"), 0));
        assert_eq!(read_in_turn(&[], now), (None, 0));
    }
}
