//! Text files that an administrator edits while the daemon runs: read whole, and again when they change.
//!
//! Readers never wait for a file: they hold a lock only while they clone an [`Arc`]. Whatever happens to the
//! file, what was read last goes on serving, and a file that never could be read says so: "could not ask" is
//! not "not found".
//!
//! A file is best replaced by renaming, which shows in the next look. One that is written in place may be half-written when
//! we look, and who is missing from it would be taken for unknown, and refused for good: so a change in place counts when the
//! next look finds it the same, and a text that was cut off never does while there is an older one. A file that is read for the
//! first time, and was written a moment ago, is not taken before that either: who opens it waits, and for one that is written
//! for longer, nobody knows.

use std::fs::{self, Metadata, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::fcntl::OFlag;
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use crate::inquiry::Inquiry;

/// Largest file taken, in bytes: 64 MiB, about a million aliases, so that a mistake in a path can't eat the memory.
pub const MAX_SIZE: u64 = 64 * 1024 * 1024;

/// A file this young may be written again without a new modification time (FAT counts in steps of 2 s, NFS
/// and ext3 in 1 s), so it is read once more when it is older.
const TIME_GRANULARITY: Duration = Duration::from_secs(2);

/// How long a file must stay the same until a change in place counts, when it is waited for.
const SETTLING: Duration = Duration::from_millis(500);

/// How long a file that is being written is waited for when it is opened: until one whose last line is unfinished is no longer
/// young, and counts.
const OPENING_TIME_LIMIT: Duration = Duration::from_secs(3);

/// Problems kept and logged for one reading of a file: the first ones say what is wrong, a million would bury it.
pub const MAX_PROBLEMS: usize = 100;

/// Makes something of a file's text; what is wrong with single lines is returned beside it. The path is for messages.
pub type Parser<T> = fn(&str, &Path) -> (T, Vec<Problem>);

/// What is wrong with one line of a file whose other lines serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Counted from 1.
    pub line: usize,
    /// For the log, after `path:line: `.
    pub message: String,
}

impl Problem {
    /// A problem in `line`, counted from 1.
    pub fn new(line: usize, message: impl Into<String>) -> Self {
        Self { line, message: message.into() }
    }

    /// Adds one, unless there are more than [`MAX_PROBLEMS`] already: a wrong file must not eat the memory.
    pub fn note(problems: &mut Vec<Self>, line: usize, message: impl Into<String>) {
        if problems.len() <= MAX_PROBLEMS {
            problems.push(Self::new(line, message));
        }
    }
}

/// A text file and what a [`Parser`] made of it.
#[derive(Debug)]
pub struct SourceFile<T> {
    path: PathBuf,
    parse: Parser<T>,
    owners: Owners,
    published: RwLock<Published<T>>,
    /// Held by [`SourceFile::refresh`] from beginning to end, by nobody else.
    last: Mutex<LastReading>,
}

/// Whose files are believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owners {
    /// The administrator named the file.
    Any,
    /// Somebody else's text named it.
    RootOrSelf,
}

#[derive(Debug)]
struct Published<T> {
    content: Arc<T>,
    problems: Arc<Vec<Problem>>,
    unavailable: Option<String>,
}

#[derive(Debug, Default)]
struct LastReading {
    /// Of the content that is published, if any is.
    seen: Option<Seen>,
    /// Of a change in place, until a second look finds it the same.
    draft: Option<u64>,
    /// Why the last attempt failed, so that each state is logged once.
    failure: Option<String>,
}

impl LastReading {
    /// Whether a new text is what its author wants it to be.
    fn is_settled(&self, seen: &Seen, bytes: &[u8]) -> bool {
        let is_the_same = self.draft == Some(seen.digest);
        match &self.seen {
            Some(old) => is_the_same || seen.identity.was_renamed_over(&old.identity),
            None if !seen.young => true,
            // Some write no newline at the end, and some files are empty: that is seen when they are older.
            None => bytes.last() == Some(&b'\n') && (is_the_same || seen.identity.was_written_before()),
        }
    }
}

#[derive(Clone, Debug)]
struct Seen {
    identity: Identity,
    /// The file was so young that its next change may not show in the identity.
    young: bool,
    digest: u64,
}

/// What was found in a file.
#[derive(Debug)]
pub struct Reading {
    /// As of the moment before it was read.
    pub(crate) identity: Identity,
    /// All of it.
    pub(crate) bytes: Vec<u8>,
}

/// Differs between a file and its successor, whether that was renamed over it or written into it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    /// Betrays `cp -p` and `touch -r`, and tells when owner or mode were changed.
    changed: (i64, i64),
}

/// Why a file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It can't be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is a directory, a FIFO, a device.
    #[error("not a regular file")]
    NotRegular,
    /// It has more than [`MAX_SIZE`].
    #[error("larger than {MAX_SIZE} bytes")]
    TooLarge,
    /// It belongs to somebody who is not believed.
    #[error("owned by uid {0}, not by root or this process")]
    Owner(u32),
    /// Anybody could have written it.
    #[error("writable by group or other (mode {0:04o})")]
    Writable(u32),
    /// It is shorter than before, in the middle of a line: somebody is writing it.
    #[error("cut off: shorter than before, and its last line is unfinished")]
    CutOff,
    /// There is nothing older to use meanwhile.
    #[error("being written")]
    BeingWritten,
}

impl ReadError {
    /// Whether what was read before must not be used any more either.
    fn revokes(&self) -> bool {
        matches!(self, Self::Owner(_) | Self::Writable(_))
    }
}

impl<T: Default> SourceFile<T> {
    /// Reads the file for the first time, and waits a little for one that is just being written. A file that cannot be read is
    /// no error here: see [`SourceFile::available`].
    pub fn open(path: impl Into<PathBuf>, parse: Parser<T>) -> Self {
        Self::open_as(path.into(), parse, Owners::Any)
    }

    /// As [`SourceFile::open`], for a file that is believed only while it belongs to root or to this process
    /// and nobody else can write it; when that ends, its content is dropped.
    pub fn open_guarded(path: impl Into<PathBuf>, parse: Parser<T>) -> Self {
        Self::open_as(path.into(), parse, Owners::RootOrSelf)
    }

    fn open_as(path: PathBuf, parse: Parser<T>, owners: Owners) -> Self {
        let source = Self {
            path,
            parse,
            owners,
            published: RwLock::new(Published {
                content: Arc::default(),
                problems: Arc::default(),
                unavailable: Some("not read yet".to_owned()),
            }),
            last: Mutex::default(),
        };
        source.refresh();
        let until = Instant::now() + OPENING_TIME_LIMIT;
        while source.is_being_written() && Instant::now() < until {
            thread::sleep(SETTLING);
            source.refresh();
        }
        if source.is_being_written() {
            source.note_failure(&mut source.lock_last(), &ReadError::BeingWritten);
        }
        source
    }

    /// Whether there is something that nobody is sure of, and nothing else.
    fn is_being_written(&self) -> bool {
        let last = self.lock_last();
        last.seen.is_none() && last.draft.is_some()
    }

    fn lock_last(&self) -> MutexGuard<'_, LastReading> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The path as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What was read last; `T::default()` if nothing ever was.
    pub fn current(&self) -> Arc<T> {
        Arc::clone(&self.read_published().content)
    }

    /// Whether [`SourceFile::current`] has been read from the file.
    pub fn available(&self) -> bool {
        self.read_published().unavailable.is_none()
    }

    /// Both at once, since a refresh may come between two calls.
    ///
    /// # Errors
    ///
    /// The path and the reason, if the file could never be read.
    pub fn ask(&self) -> Result<Arc<T>, String> {
        let published = self.read_published();
        match &published.unavailable {
            Some(reason) => Err(format!("{}: {reason}", self.path.display())),
            None => Ok(Arc::clone(&published.content)),
        }
    }

    /// What was wrong in the text that was read last, at most [`MAX_PROBLEMS`].
    pub fn problems(&self) -> Arc<Vec<Problem>> {
        Arc::clone(&self.read_published().problems)
    }

    /// Looks whether the file has changed and reads it if so. Blocks on the file system: not for an async thread.
    ///
    /// If it cannot be read, the old content stays and the reason is logged once.
    pub fn refresh(&self) {
        self.refresh_by(&Inquiry::Direct);
    }

    /// As [`SourceFile::refresh`], for a process that may not open the file itself. To look at it (stat(2)) it may.
    pub fn refresh_by(&self, inquiry: &Inquiry) {
        let mut last = self.lock_last();
        match self.read_if_changed(last.seen.as_ref(), inquiry) {
            Ok(reading) => {
                let is_new = |seen: &Seen| last.seen.as_ref().is_none_or(|old| old.digest != seen.digest);
                let reading = reading.map(|(seen, bytes)| (is_new(&seen), seen, bytes));
                if let Some((true, seen, bytes)) = &reading
                    && !last.is_settled(seen, bytes)
                {
                    last.draft = Some(seen.digest);
                    return;
                }
                if last.failure.take().is_some() {
                    tracing::info!("{}: can be read again", self.path.display());
                }
                if let Some((is_new, seen, bytes)) = reading {
                    if is_new {
                        self.publish(&bytes);
                    }
                    (last.seen, last.draft) = (Some(seen), None);
                }
            }
            Err(error) => self.note_failure(&mut last, &error),
        }
    }

    fn read_if_changed(
        &self,
        seen: Option<&Seen>,
        inquiry: &Inquiry,
    ) -> Result<Option<(Seen, Vec<u8>)>, ReadError> {
        let metadata = fs::metadata(&self.path)?;
        // Asked before opening too: opening a device can have effects of its own.
        if !metadata.is_file() {
            return Err(ReadError::NotRegular);
        }
        if seen.is_some_and(|seen| !seen.young && seen.identity == Identity::of(&metadata)) {
            return Ok(None);
        }
        let Reading { identity, bytes } = match self.owners {
            Owners::Any => inquiry.read(&self.path)?,
            Owners::RootOrSelf => read_checked(&self.path, believed_owner)?,
        };
        let is_shorter = seen.is_some_and(|seen| (bytes.len() as u64) < seen.identity.size);
        // Emptied in place is what a shell does before the command begins whose output is to be there.
        if is_shorter && bytes.last() != Some(&b'\n') {
            return Err(ReadError::CutOff);
        }
        let seen = Seen { young: identity.is_young(), identity, digest: digest(&bytes) };
        Ok(Some((seen, bytes)))
    }

    fn publish(&self, bytes: &[u8]) {
        let (text, mut problems) = decode(bytes);
        let (content, more) = (self.parse)(&text, &self.path);
        problems.extend(more);
        problems.sort_by_key(|problem| problem.line);
        let path = self.path.display();
        for problem in problems.iter().take(MAX_PROBLEMS) {
            tracing::warn!("{path}:{}: {}", problem.line, problem.message);
        }
        if problems.len() > MAX_PROBLEMS {
            tracing::warn!("{path}: there are more problems, only the first {MAX_PROBLEMS} are shown");
            problems.truncate(MAX_PROBLEMS);
        }
        let published =
            Published { content: Arc::new(content), problems: Arc::new(problems), unavailable: None };
        self.replace(published);
    }

    fn note_failure(&self, last: &mut MutexGuard<'_, LastReading>, error: &ReadError) {
        let reason = error.to_string();
        if error.revokes() || last.seen.is_none() {
            last.seen = None;
            self.replace(Published {
                content: Arc::default(),
                problems: Arc::default(),
                unavailable: Some(reason.clone()),
            });
        }
        if last.failure.as_ref() != Some(&reason) {
            let path = self.path.display();
            if last.seen.is_some() {
                tracing::warn!("{path}: {reason}; what was read before stays in use");
            } else {
                tracing::warn!("{path}: {reason}");
            }
            last.failure = Some(reason);
        }
    }

    /// The old content is dropped outside the lock: freeing a million entries would keep the readers waiting.
    fn replace(&self, published: Published<T>) {
        let mut slot = self.published.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *slot, published);
        drop(slot);
        drop(old);
    }

    fn read_published(&self) -> std::sync::RwLockReadGuard<'_, Published<T>> {
        self.published.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads a file whole.
pub(crate) fn read(path: &Path) -> Result<Reading, ReadError> {
    read_checked(path, |_| Ok(()))
}

fn read_checked(path: &Path, check: fn(&Metadata) -> Result<(), ReadError>) -> Result<Reading, ReadError> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
        .open(path)?;
    // Taken before reading: a writer who comes in between leaves a later time behind.
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(ReadError::NotRegular);
    }
    if metadata.len() > MAX_SIZE {
        return Err(ReadError::TooLarge);
    }
    check(&metadata)?;
    let mut bytes = Vec::new();
    file.take(MAX_SIZE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_SIZE {
        return Err(ReadError::TooLarge);
    }
    Ok(Reading { identity: Identity::of(&metadata), bytes })
}

fn believed_owner(metadata: &Metadata) -> Result<(), ReadError> {
    if metadata.uid() != 0 && metadata.uid() != geteuid().as_raw() {
        return Err(ReadError::Owner(metadata.uid()));
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(ReadError::Writable(metadata.mode() & 0o7777));
    }
    Ok(())
}

impl Identity {
    /// Whether it is another file, and what was last done to it is no writing.
    fn was_renamed_over(&self, old: &Self) -> bool {
        (self.device, self.inode) != (old.device, old.inode) && self.was_written_before()
    }

    /// Whether the last that was done to it is no writing, but a renaming, or a change of its mode.
    fn was_written_before(&self) -> bool {
        self.modified != self.changed
    }

    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// A time far in the future (a wrong clock) is not young, or the file would be read every second for years.
    fn is_young(&self) -> bool {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let modified = Duration::new(
            u64::try_from(self.modified.0).unwrap_or(0),
            u32::try_from(self.modified.1).unwrap_or(0),
        );
        now.abs_diff(modified) < TIME_GRANULARITY
    }
}

/// Spares a second parsing, and a second log line per problem, when a young file is read again and is the same.
fn digest(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// A line that is not UTF-8 keeps what is: a Latin-1 name in a comment field must not cost the whole entry.
/// Where it matters, parsers look for U+FFFD (see [`is_damaged`]).
fn decode(bytes: &[u8]) -> (String, Vec<Problem>) {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut text = String::with_capacity(bytes.len());
    let mut problems = Vec::new();
    for (index, line) in bytes.split_inclusive(|&byte| byte == b'\n').enumerate() {
        let line = String::from_utf8_lossy(line);
        if matches!(line, std::borrow::Cow::Owned(_)) {
            Problem::note(&mut problems, index + 1, "not UTF-8");
        }
        text.push_str(&line);
    }
    (text, problems)
}

/// Whether a name or path can't be what its author wrote: control characters, or bytes that were not UTF-8.
pub(super) fn is_damaged(text: &str) -> bool {
    text.chars().any(|c| c.is_control() || c == char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logging::Captured;
    use std::fs::{File, Permissions};
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn lines(text: &str, _: &Path) -> (Vec<String>, Vec<Problem>) {
        let problems = text
            .lines()
            .enumerate()
            .filter(|(_, line)| line.starts_with("bad"))
            .map(|(index, _)| Problem::new(index + 1, "bad line"))
            .collect();
        let good = text.lines().filter(|line| !line.starts_with("bad"));
        (good.map(str::to_owned).collect(), problems)
    }

    fn set_age(path: &Path, age: Duration) {
        let file = File::options().write(true).open(path).unwrap();
        file.set_modified(SystemTime::now() - age).unwrap();
    }

    fn mkfifo(path: &Path) {
        nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    }

    /// A change in place counts in the second look.
    fn refresh_twice<T: Default>(source: &SourceFile<T>) {
        source.refresh();
        source.refresh();
    }

    /// What is logged on this thread while `act` runs.
    fn logged(act: impl FnOnce()) -> String {
        let captured = Captured::default();
        let writer = captured.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, act);
        captured.text()
    }

    #[test]
    fn a_changed_file_is_read_again_and_readers_keep_what_they_hold() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source");
        fs::write(&path, "one\n").unwrap();
        let source = SourceFile::open(&path, lines);
        let held = source.current();
        assert_eq!(*held, ["one"]);
        fs::write(&path, "one\ntwo\n").unwrap();
        assert_eq!(*source.current(), ["one"]);
        refresh_twice(&source);
        assert_eq!(*source.current(), ["one", "two"]);
        assert_eq!(*held, ["one"]);
    }

    #[test]
    fn a_change_in_place_counts_when_a_second_look_finds_it_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let (path, next) = (dir.path().join("source"), dir.path().join("next"));
        fs::write(&path, "one\ntwo\n").unwrap();
        let source = SourceFile::open(&path, lines);
        for text in ["", "zero\n", "zero\none\n", "zero\none\ntwo\n"] {
            fs::write(&path, text).unwrap();
            source.refresh();
            assert_eq!(*source.current(), ["one", "two"]);
        }
        source.refresh();
        assert_eq!(*source.current(), ["zero", "one", "two"]);
        fs::write(&next, "three\n").unwrap();
        set_age(&next, Duration::from_secs(1));
        fs::rename(&next, &path).unwrap();
        source.refresh();
        assert_eq!(*source.current(), ["three"], "what was renamed is whole");
        fs::write(&next, "three\nfour\n").unwrap();
        fs::rename(&next, &path).unwrap();
        fs::write(&path, "four\n").unwrap();
        source.refresh();
        assert_eq!(*source.current(), ["three"], "what was renamed and is being written is not");
    }

    #[test]
    fn a_text_that_is_cut_off_never_takes_the_place_of_a_whole_one() {
        let dir = tempfile::tempdir().unwrap();
        let (path, next) = (dir.path().join("source"), dir.path().join("next"));
        fs::write(&path, "one\ntwo\n").unwrap();
        let source = SourceFile::open(&path, lines);
        let log = logged(|| {
            fs::write(&path, "one\ntw").unwrap();
            refresh_twice(&source);
            fs::write(&next, "one\ntw").unwrap();
            fs::rename(&next, &path).unwrap();
            refresh_twice(&source);
        });
        assert_eq!(*source.current(), ["one", "two"]);
        assert_eq!(log.lines().count(), 1, "{log}");
        assert!(log.contains("cut off: shorter than before") && log.contains("stays in use"), "{log}");
        fs::write(&path, "one\nthree").unwrap();
        refresh_twice(&source);
        assert_eq!(*source.current(), ["one", "three"], "some write no newline at the end");
        fs::write(&path, "").unwrap();
        refresh_twice(&source);
        assert_eq!(*source.current(), ["one", "three"], "whoever writes it has only begun");
        fs::write(&path, "#\n").unwrap();
        refresh_twice(&source);
        assert_eq!(*source.current(), ["#"]);
    }

    #[test]
    fn a_first_text_that_is_being_written_is_nobodys_answer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source");
        let source = SourceFile::open(&path, lines);
        for text in ["", "one\n", "one\ntw", "one\ntwo\n"] {
            fs::write(&path, text).unwrap();
            source.refresh();
            assert!(source.ask().is_err(), "{text:?}");
        }
        source.refresh();
        assert_eq!(*source.ask().unwrap(), ["one", "two"]);
        // Which of them its author wants, only time can tell.
        for (text, expected) in [("one\ntw", &["one", "tw"][..]), ("", &[])] {
            let source = SourceFile::open(dir.path().join("none"), lines);
            let source = SourceFile { path: path.clone(), ..source };
            fs::write(&path, text).unwrap();
            refresh_twice(&source);
            assert!(source.ask().is_err(), "{text:?}");
            set_age(&path, TIME_GRANULARITY + Duration::from_secs(1));
            source.refresh();
            assert_eq!(*source.ask().unwrap(), expected);
        }
    }

    #[test]
    fn who_opens_a_file_waits_until_it_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source");
        let mut file = File::create(&path).unwrap();
        let writer = thread::spawn(move || {
            for line in ["one\n", "two\n", "thr", "ee\n"] {
                thread::sleep(Duration::from_millis(50));
                file.write_all(line.as_bytes()).unwrap();
            }
        });
        let source = SourceFile::open(&path, lines);
        writer.join().unwrap();
        assert_eq!(*source.ask().unwrap(), ["one", "two", "three"]);
    }

    #[test]
    fn a_file_that_is_written_for_long_is_not_known_until_it_stays_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source");
        let mut file = File::create(&path).unwrap();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let writer = thread::spawn(move || {
            while stopped.try_recv().is_err() {
                file.write_all(b"one\n").unwrap();
                thread::sleep(Duration::from_millis(5));
            }
        });
        let mut opened = None;
        let log = logged(|| opened = Some(SourceFile::open(&path, lines)));
        let source = opened.unwrap();
        assert!(source.ask().unwrap_err().ends_with("source: being written"));
        assert!(log.contains("source: being written"), "{log}");
        stop.send(()).unwrap();
        writer.join().unwrap();
        let log = logged(|| refresh_twice(&source));
        assert!(source.available());
        assert!(log.contains("can be read again"), "{log}");
    }

    #[test]
    fn a_file_renamed_over_the_old_one_is_read_even_if_it_is_as_old_and_as_long() {
        let dir = tempfile::tempdir().unwrap();
        let (path, next) = (dir.path().join("source"), dir.path().join("next"));
        fs::write(&path, "one\n").unwrap();
        set_age(&path, Duration::from_secs(60));
        let source = SourceFile::open(&path, lines);
        fs::write(&next, "two\n").unwrap();
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        File::options().write(true).open(&next).unwrap().set_modified(modified).unwrap();
        fs::rename(&next, &path).unwrap();
        source.refresh();
        assert_eq!(*source.current(), ["two"]);
    }

    #[test]
    fn a_young_file_is_read_again_although_nothing_seems_to_have_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source");
        fs::write(&path, "one\n").unwrap();
        let source = SourceFile::open(&path, lines);
        let seen = source.last.lock().unwrap().seen.clone().unwrap();
        assert!(source.read_if_changed(Some(&seen), &Inquiry::Direct).unwrap().is_some());
        set_age(&path, TIME_GRANULARITY + Duration::from_secs(1));
        source.refresh();
        let seen = source.last.lock().unwrap().seen.clone().unwrap();
        assert!(source.read_if_changed(Some(&seen), &Inquiry::Direct).unwrap().is_none());
    }

    #[test]
    fn a_file_from_the_far_future_is_not_read_every_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source");
        fs::write(&path, "one\n").unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(SystemTime::now() + Duration::from_secs(3600)).unwrap();
        let source = SourceFile::open(&path, lines);
        let seen = source.last.lock().unwrap().seen.clone().unwrap();
        assert!(source.read_if_changed(Some(&seen), &Inquiry::Direct).unwrap().is_none());
    }

    #[test]
    fn text_that_is_read_again_and_is_the_same_is_not_parsed_again() {
        static PARSED: AtomicUsize = AtomicUsize::new(0);
        fn counting(_: &str, _: &Path) -> ((), Vec<Problem>) {
            PARSED.fetch_add(1, Ordering::Relaxed);
            ((), Vec::new())
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source");
        fs::write(&path, "one\n").unwrap();
        let source = SourceFile::open(&path, counting);
        fs::write(&path, "one\n").unwrap();
        source.refresh();
        assert_eq!(PARSED.load(Ordering::Relaxed), 1);
        fs::write(&path, "two\n").unwrap();
        refresh_twice(&source);
        assert_eq!(PARSED.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_file_that_vanishes_goes_on_serving() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source");
        fs::write(&path, "one\n").unwrap();
        let source = SourceFile::open(&path, lines);
        fs::remove_file(&path).unwrap();
        source.refresh();
        assert!(source.available());
        assert_eq!(*source.current(), ["one"]);
        fs::write(&path, "two\n").unwrap();
        refresh_twice(&source);
        assert_eq!(*source.current(), ["two"]);
    }

    #[test]
    fn a_file_that_was_never_readable_is_unavailable_until_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source");
        let source = SourceFile::open(&path, lines);
        assert!(!source.available());
        assert!(source.current().is_empty());
        let reason = source.ask().unwrap_err();
        assert!(reason.contains("source: No such file"), "{reason}");
        fs::write(&path, "one\n").unwrap();
        refresh_twice(&source);
        assert!(source.available());
        assert_eq!(*source.ask().unwrap(), ["one"]);
    }

    #[test]
    fn a_fifo_in_place_of_the_file_hangs_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source");
        mkfifo(&path);
        let source = SourceFile::open(&path, lines);
        assert!(source.ask().unwrap_err().contains("not a regular file"));
        fs::remove_file(&path).unwrap();
        fs::write(&path, "one\n").unwrap();
        refresh_twice(&source);
        fs::remove_file(&path).unwrap();
        mkfifo(&path);
        source.refresh();
        assert_eq!(*source.ask().unwrap(), ["one"]);
    }

    #[test]
    fn a_directory_and_a_file_over_the_limit_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let source = SourceFile::open(dir.path(), lines);
        assert!(source.ask().unwrap_err().contains("not a regular file"));
        let path = dir.path().join("large");
        File::create(&path).unwrap().set_len(MAX_SIZE + 1).unwrap();
        let source = SourceFile::open(&path, lines);
        assert!(source.ask().unwrap_err().contains("larger than"));
    }

    #[test]
    fn each_state_is_logged_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source");
        let log = logged(|| {
            let source = SourceFile::open(&path, lines);
            source.refresh();
            fs::write(&path, "good\nbad\n").unwrap();
            source.refresh();
            source.refresh();
            fs::remove_file(&path).unwrap();
            source.refresh();
            source.refresh();
        });
        let path = path.display();
        let expected = [
            format!("WARN usermilter::resolver::source: {path}: No such file or directory (os error 2)"),
            format!("INFO usermilter::resolver::source: {path}: can be read again"),
            format!("WARN usermilter::resolver::source: {path}:2: bad line"),
            format!(
                "WARN usermilter::resolver::source: {path}: No such file or directory (os error 2); \
                 what was read before stays in use"
            ),
        ];
        let lines: Vec<_> = log.lines().collect();
        assert_eq!(lines.len(), expected.len(), "{log}");
        for (line, expected) in lines.iter().zip(&expected) {
            assert!(line.ends_with(expected), "{line}\n{expected}");
        }
    }

    #[test]
    fn a_file_full_of_problems_does_not_fill_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source");
        fs::write(&path, "bad\n".repeat(MAX_PROBLEMS + 50)).unwrap();
        let log = logged(|| {
            let source = SourceFile::open(&path, lines);
            assert_eq!(source.problems().len(), MAX_PROBLEMS);
        });
        assert_eq!(log.lines().count(), MAX_PROBLEMS + 1);
        assert!(log.ends_with("only the first 100 are shown\n"), "{log}");
        assert_eq!(decode(&b"\xff\n".repeat(1000)).1.len(), MAX_PROBLEMS + 1);
    }

    #[test]
    fn a_line_that_is_not_utf_8_is_a_problem_and_the_rest_serves() {
        let (text, problems) = decode(b"one\nR\xe9my\nthree");
        assert_eq!(text, "one\nR\u{fffd}my\nthree");
        assert_eq!(problems, [Problem::new(2, "not UTF-8")]);
        assert_eq!(decode(b"\xef\xbb\xbfone\n").0, "one\n");
    }

    #[test]
    fn a_guarded_file_is_dropped_when_others_can_write_it_and_comes_back_when_they_cannot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source");
        fs::write(&path, "one\n").unwrap();
        set_age(&path, Duration::from_secs(60));
        let mode = |mode| fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        mode(0o644);
        let source = SourceFile::open_guarded(&path, lines);
        assert!(source.available());
        for writable in [0o664, 0o646] {
            mode(writable);
            source.refresh();
            assert!(source.ask().unwrap_err().contains("writable"));
            assert!(source.current().is_empty());
        }
        mode(0o644);
        source.refresh();
        assert_eq!(*source.ask().unwrap(), ["one"]);
        let unguarded = SourceFile::open(&path, lines);
        mode(0o666);
        unguarded.refresh();
        assert!(unguarded.available());
    }

    #[test]
    fn a_guarded_file_of_somebody_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source");
        fs::write(&path, "one\n").unwrap();
        if std::os::unix::fs::chown(&path, Some(65534), None).is_err() {
            println!("not checked: giving a file away needs root");
            return;
        }
        let source = SourceFile::open_guarded(&path, lines);
        assert!(source.ask().unwrap_err().contains("owned by uid 65534"));
    }
}
