//! Who may do what on this host, as owners and mode bits say. ACLs and security modules may say otherwise; then a warning
//! is one too many.

use std::{
    ffi::CString,
    fs::{self, Metadata},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::unistd::{User, getgrouplist};

/// Permission bits.
pub(super) const READ: u32 = 0o4;
pub(super) const WRITE: u32 = 0o2;
pub(super) const SEARCH: u32 = 0o1;

/// A user of this host with all groups.
pub(super) struct Person {
    pub(super) name: String,
    pub(super) uid: u32,
    groups: Vec<u32>,
}

impl Person {
    /// `None`: there is no such user, or the user database does not answer.
    pub(super) fn named(name: &str) -> Option<Self> {
        let user = User::from_name(name).ok()??;
        let groups = getgrouplist(&CString::new(name).ok()?, user.gid).ok()?;
        let groups = groups.into_iter().map(nix::unistd::Gid::as_raw).collect();
        Some(Self { name: name.to_owned(), uid: user.uid.as_raw(), groups })
    }

    /// Whether the mode of something with this owner and group lets the person.
    pub(super) fn may(&self, owner: u32, group: u32, mode: u32, wanted: u32) -> bool {
        let granted = match () {
            () if self.uid == 0 => return true,
            () if self.uid == owner => mode >> 6,
            () if self.groups.contains(&group) => mode >> 3,
            () => mode,
        };
        granted & wanted == wanted
    }

    /// What keeps the person from a file or directory: it, or a directory above it.
    pub(super) fn obstacle(&self, path: &Path, wanted: u32) -> Option<PathBuf> {
        let real = fs::canonicalize(path).ok()?;
        let is_open = |path: &Path, wanted| {
            fs::metadata(path).is_ok_and(|m: Metadata| self.may(m.uid(), m.gid(), m.mode(), wanted))
        };
        let above = real.ancestors().skip(1).find(|directory| !is_open(directory, SEARCH));
        above.or((!is_open(&real, wanted)).then_some(&*real)).map(Path::to_owned)
    }
}

/// Who else than root may change what a path leads to: the file or the first directory on the way that lets them. A sticky
/// directory protects what is in it.
pub(super) fn changeable(path: &Path) -> Option<(PathBuf, &'static str)> {
    let real = fs::canonicalize(path).ok()?;
    let own = nix::unistd::geteuid().as_raw();
    real.ancestors().find_map(|part| {
        let metadata = fs::metadata(part).ok()?;
        let sticky = metadata.is_dir() && metadata.mode() & 0o1000 != 0;
        let by = match () {
            () if metadata.uid() != 0 && metadata.uid() != own => "its owner, who is not root",
            () if metadata.mode() & 0o002 != 0 && !sticky => "everybody",
            () if metadata.mode() & 0o020 != 0 && metadata.gid() != 0 && !sticky => "its group",
            () => return None,
        };
        Some((part.to_owned(), by))
    })
}
