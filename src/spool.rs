//! The message: written once, then read by any number of filters, none of which can change it.
//!
//! Up to `filter.memory-limit` it is a memfd that is sealed when complete (memfd_create(2), F_SEAL_WRITE); beyond
//! that an unlinked file in `filter.spool-directory`. Filters read it through descriptors of their own. Both have mode
//! 0444, so that a filter can open /dev/stdin too; without a name, nobody else can open them.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{FcntlArg, OFlag, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};

use crate::{
    config::{Filter, LineEndings},
    metrics::{OneMore, Place, SpoolMetrics},
    sys,
};

/// Bytes gathered before they are written.
const BUFFER_SIZE: usize = 64 * 1024;

/// Where messages go and in which form.
#[derive(Clone, Debug)]
pub struct SpoolSettings {
    /// For messages beyond the limit.
    pub directory: PathBuf,
    /// Bytes kept in memory.
    pub memory_limit: u64,
    /// Line endings of what is written.
    pub line_endings: LineEndings,
    /// Where it is counted.
    pub metrics: SpoolMetrics,
}

impl SpoolSettings {
    /// As `[filter]` has them.
    pub fn new(filter: &Filter) -> Self {
        Self {
            directory: filter.spool_directory.clone(),
            memory_limit: filter.memory_limit.0,
            line_endings: filter.line_endings,
            metrics: SpoolMetrics::default(),
        }
    }
}

/// A message that is being received.
#[derive(Debug)]
pub struct Spool {
    settings: SpoolSettings,
    buffer: Vec<u8>,
    store: Option<Store>,
    /// Bytes handed to `store`.
    written: u64,
    counted: Counted,
    /// Whether the last body byte was a CR whose LF may be in the next chunk.
    pending_cr: bool,
}

#[derive(Debug)]
enum Store {
    Memory(File),
    Disk(File),
}

/// A complete message.
#[derive(Debug)]
pub struct Message {
    file: File,
    size: u64,
    _counted: Counted,
}

/// The part of a message in what is counted, for as long as the message is kept.
#[derive(Debug)]
struct Counted {
    metrics: SpoolMetrics,
    _message: OneMore,
    place: Place,
    bytes: i64,
}

impl Spool {
    /// An empty message. `expected_size` (SIZE= of the client) saves moving a large one from memory to disk.
    pub fn new(settings: SpoolSettings, expected_size: Option<u64>) -> io::Result<Self> {
        let store = match expected_size {
            Some(size) if size > settings.memory_limit => {
                Some(Store::Disk(unlinked_file(&settings.directory)?))
            }
            _ => None,
        };
        let counted = Counted::new(&settings.metrics);
        Ok(Self { settings, buffer: Vec::new(), store, written: 0, counted, pending_cr: false })
    }

    /// Bytes so far.
    pub fn size(&self) -> u64 {
        self.written + self.buffer.len() as u64
    }

    /// Appends a header field as the MTA has it: name, colon, value with its leading space, folds as bare LF.
    pub fn header(&mut self, name: &[u8], value: &[u8]) -> io::Result<()> {
        self.buffer.extend_from_slice(name);
        self.buffer.push(b':');
        for (n, line) in value.split(|b| *b == b'\n').enumerate() {
            if n > 0 {
                self.line_end();
            }
            // A fold that the MTA gives as CRLF is one line end, not two.
            let folded = line.last() == Some(&b'\r');
            self.buffer.extend_from_slice(if folded { &line[..line.len() - 1] } else { line });
        }
        self.line_end();
        self.flush_if_full()
    }

    /// Appends the empty line between header and body.
    pub fn end_of_headers(&mut self) -> io::Result<()> {
        self.line_end();
        self.flush_if_full()
    }

    /// Appends a piece of the body, whose lines end in CRLF and which may be cut anywhere.
    pub fn body(&mut self, chunk: &[u8]) -> io::Result<()> {
        match self.settings.line_endings {
            LineEndings::Crlf => self.buffer.extend_from_slice(chunk),
            LineEndings::Lf => self.append_with_lf(chunk),
        }
        self.flush_if_full()
    }

    /// Ends the message and makes it unchangeable.
    pub fn finish(mut self) -> io::Result<Message> {
        if std::mem::take(&mut self.pending_cr) {
            self.buffer.push(b'\r');
        }
        self.flush()?;
        let size = self.written;
        let file = match self.store {
            Some(Store::Disk(file)) => file,
            Some(Store::Memory(file)) => {
                seal(&file)?;
                file
            }
            None => {
                let file = memory_file()?;
                seal(&file)?;
                file
            }
        };
        Ok(Message { file, size, _counted: self.counted })
    }

    fn line_end(&mut self) {
        match self.settings.line_endings {
            LineEndings::Lf => self.buffer.push(b'\n'),
            LineEndings::Crlf => self.buffer.extend_from_slice(b"\r\n"),
        }
    }

    /// CRLF becomes LF; a CR or LF that stands alone is the sender's and stays.
    fn append_with_lf(&mut self, mut chunk: &[u8]) {
        // A CR held back from the last chunk is the sender's unless an LF follows.
        if self.pending_cr && !chunk.is_empty() {
            self.pending_cr = false;
            if chunk[0] != b'\n' {
                self.buffer.push(b'\r');
            }
        }
        while let Some(at) = chunk.iter().position(|b| *b == b'\r') {
            self.buffer.extend_from_slice(&chunk[..at]);
            match chunk.get(at + 1) {
                Some(b'\n') => (),
                Some(_) => self.buffer.push(b'\r'),
                None => self.pending_cr = true,
            }
            chunk = &chunk[at + 1..];
        }
        self.buffer.extend_from_slice(chunk);
    }

    fn flush_if_full(&mut self) -> io::Result<()> {
        if self.buffer.len() < BUFFER_SIZE { Ok(()) } else { self.flush() }
    }

    /// Whether what comes next is written to disk, which may take time.
    pub fn is_on_disk(&self) -> bool {
        matches!(self.store, Some(Store::Disk(_))) || self.size() >= self.settings.memory_limit
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let size = self.size();
        let store = match self.store.take() {
            Some(Store::Memory(memory)) if size > self.settings.memory_limit => {
                Store::Disk(moved_to_disk(memory, &self.settings.directory)?)
            }
            Some(store) => store,
            None if size > self.settings.memory_limit => {
                Store::Disk(unlinked_file(&self.settings.directory)?)
            }
            None => Store::Memory(memory_file()?),
        };
        let (file, place) = match self.store.insert(store) {
            Store::Memory(file) => (file, Place::Memory),
            Store::Disk(file) => (file, Place::Disk),
        };
        file.write_all(&self.buffer)?;
        self.counted.set(place, size);
        self.written = size;
        self.buffer.clear();
        Ok(())
    }
}

impl Message {
    /// A descriptor of its own for one filter: read-only, at offset 0.
    pub fn open(&self) -> io::Result<OwnedFd> {
        sys::reopen_for_reading(&self.file)
    }

    /// Length in bytes, trace headers included.
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl Counted {
    fn new(metrics: &SpoolMetrics) -> Self {
        let message = OneMore::of(&metrics.messages);
        Self { metrics: metrics.clone(), _message: message, place: Place::Memory, bytes: 0 }
    }

    fn set(&mut self, place: Place, bytes: u64) {
        self.metrics.bytes(self.place).dec_by(self.bytes);
        (self.place, self.bytes) = (place, i64::try_from(bytes).unwrap_or(i64::MAX));
        self.metrics.bytes(self.place).inc_by(self.bytes);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.set(self.place, 0);
    }
}

fn memory_file() -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create("message", flags)?);
    // Every filter opens it anew, as its own user.
    nix::sys::stat::fchmod(&file, nix::sys::stat::Mode::from_bits_truncate(0o444))?;
    Ok(file)
}

fn seal(file: &File) -> io::Result<()> {
    let seals =
        SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals))?;
    Ok(())
}

fn unlinked_file(directory: &Path) -> io::Result<File> {
    let flags = (OFlag::O_TMPFILE | OFlag::O_CLOEXEC).bits();
    OpenOptions::new().read(true).write(true).mode(0o444).custom_flags(flags).open(directory)
}

fn moved_to_disk(memory: File, directory: &Path) -> io::Result<File> {
    let mut disk = unlinked_file(directory)?;
    let mut reader = File::from(sys::reopen_for_reading(&memory)?);
    io::copy(&mut reader, &mut disk)?;
    Ok(disk)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Read;

    fn settings(line_endings: LineEndings, memory_limit: u64) -> SpoolSettings {
        SpoolSettings {
            directory: std::env::temp_dir(),
            memory_limit,
            line_endings,
            metrics: SpoolMetrics::default(),
        }
    }

    fn content(message: &Message) -> Vec<u8> {
        let mut bytes = Vec::new();
        File::from(message.open().unwrap()).read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, message.size());
        bytes
    }

    fn body_in_pieces(pieces: &[&[u8]]) -> Vec<u8> {
        let mut spool = Spool::new(settings(LineEndings::Lf, 1 << 20), None).unwrap();
        pieces.iter().for_each(|piece| spool.body(piece).unwrap());
        content(&spool.finish().unwrap())
    }

    #[test]
    fn headers_keep_folds_spaces_and_bytes() {
        for (endings, expected) in [
            (LineEndings::Lf, &b"Subject:  two\n\tfolds \xff\nEmpty:\n\nx\n"[..]),
            (LineEndings::Crlf, b"Subject:  two\r\n\tfolds \xff\r\nEmpty:\r\n\r\nx\r\n"),
        ] {
            let mut spool = Spool::new(settings(endings, 1 << 20), None).unwrap();
            spool.header(b"Subject", b"  two\n\tfolds \xff").unwrap();
            spool.header(b"Empty", b"").unwrap();
            spool.end_of_headers().unwrap();
            spool.body(b"x\r\n").unwrap();
            assert_eq!(content(&spool.finish().unwrap()), expected);
        }
    }

    #[test]
    fn lone_crs_lfs_nuls_and_a_missing_last_newline_stay() {
        assert_eq!(body_in_pieces(&[b"a\rb\nc\0\r\r\nd\r\n.\r\nlast"]), b"a\rb\nc\0\r\nd\n.\nlast");
        assert_eq!(body_in_pieces(&[b"a\r", b"\nb\r", b"", b"\r", b"c\r"]), b"a\nb\r\rc\r");
        assert_eq!(body_in_pieces(&[]), b"");
    }

    #[test]
    fn a_large_message_moves_to_disk_and_stays_whole() {
        let mut spool = Spool::new(settings(LineEndings::Lf, 100_000), None).unwrap();
        let chunk = vec![b'x'; 65_535];
        (0..4).for_each(|_| spool.body(&chunk).unwrap());
        assert!(spool.is_on_disk());
        let message = spool.finish().unwrap();
        assert_eq!(content(&message), vec![b'x'; 4 * 65_535]);
    }

    #[test]
    fn a_finished_message_can_not_be_written() {
        for limit in [1 << 20, 1] {
            let mut spool = Spool::new(settings(LineEndings::Lf, limit), Some(10)).unwrap();
            spool.body(b"12345").unwrap();
            let message = spool.finish().unwrap();
            assert!(File::from(message.open().unwrap()).write_all(b"x").is_err());
            if limit > 1 {
                assert!(
                    message.file.try_clone().unwrap().write_all(b"x").is_err(),
                    "sealed against its owner too"
                );
            }
        }
    }

    #[test]
    fn readers_do_not_share_an_offset() {
        let mut spool = Spool::new(settings(LineEndings::Lf, 1 << 20), None).unwrap();
        spool.body(b"message").unwrap();
        let message = spool.finish().unwrap();
        let (mut first, mut second) =
            (File::from(message.open().unwrap()), File::from(message.open().unwrap()));
        first.read_exact(&mut [0; 5]).unwrap();
        let mut bytes = Vec::new();
        second.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"message");
    }

    #[test]
    fn a_spool_directory_that_is_gone_is_an_error_and_no_panic() {
        let gone = SpoolSettings { directory: "/nonexistent".into(), ..settings(LineEndings::Lf, 1) };
        let mut spool = Spool::new(gone.clone(), None).unwrap();
        spool.body(b"12345").unwrap();
        assert!(spool.finish().is_err());
        assert!(Spool::new(gone, Some(5)).is_err());
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(body in "[ab\r\n]{0,40}", cuts in prop::collection::vec(0usize..40, 0..6)) {
            let bytes = body.as_bytes();
            let mut cuts: Vec<_> = cuts.into_iter().map(|c| c.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|w| &bytes[w[0]..w[1]]).collect();
            prop_assert_eq!(body_in_pieces(&pieces), body.replace("\r\n", "\n").into_bytes());
        }
    }
}
