//! What the targets share: a file for what is read from files, and a worker whose monitor is played by a thread.

mod worker;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::UNIX_EPOCH;

pub use worker::{Plan, with_worker};

/// Writes a text to a file of this process, in memory if that is possible, and returns its path.
pub fn file(name: &str, text: &[u8]) -> PathBuf {
    let path = directory().join(name);
    fs::write(&path, text).expect("a file of our own");
    // Or it would be waited for, as if somebody were writing it.
    let long_ago = fs::File::options().write(true).open(&path).and_then(|f| f.set_modified(UNIX_EPOCH));
    long_ago.expect("a file of our own");
    path
}

/// Of this process; gone when it ends well.
fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<tempfile::TempDir> = OnceLock::new();
    let directory = DIRECTORY.get_or_init(|| {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        remove_leftovers(&parent);
        let name = format!("{PREFIX}{}-", std::process::id());
        tempfile::Builder::new().prefix(&name).tempdir_in(parent).expect("a directory of our own")
    });
    directory.path()
}

/// What the names of our directories begin with; the process id follows.
const PREFIX: &str = "usermilter-fuzz-";

/// A fuzzer never ends well: the next one cleans up after those that are gone.
fn remove_leftovers(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// How many lines a text has for an editor: a place of a fault can't be below.
pub fn lines(text: &str) -> usize {
    text.matches('\n').count() + 1
}

/// The fields of an input that has several, and empty ones when it has fewer.
pub fn fields<const N: usize>(data: &[u8], separator: u8) -> [&[u8]; N] {
    let mut fields = data.splitn(N, |byte| *byte == separator);
    std::array::from_fn(|_| fields.next().unwrap_or_default())
}
