//! Who a worker is, and a child that finds something out for it: `server.user`, looked up once, when the daemon starts. A user
//! database that hangs later keeps no worker from starting and no file from being read.

use std::{ffi::CString, io};

use caps::CapSet;
use nix::unistd::{Gid, Uid, User, getgrouplist, setgroups, setresgid, setresuid};
use tracing::warn;

use super::{WorkerError, system};

/// Why nobody can be a worker.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// There is no such user.
    #[error("user {0} does not exist; create it, or set server.user to an unprivileged account")]
    Unknown(String),
    /// It is root.
    #[error("user {0} is root; set server.user to an unprivileged account")]
    Root(String),
    /// The user database does not say.
    #[error("cannot look up user {name}, server.user")]
    Unavailable {
        /// Who.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// The unprivileged user that a worker becomes.
#[derive(Clone, Debug)]
pub struct WorkerUser {
    /// `None`: whoever started the daemon is not root, can become nobody else, and has nothing to lose.
    ids: Option<Ids>,
}

#[derive(Clone, Debug)]
struct Ids {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

impl WorkerUser {
    /// Asks the user database.
    ///
    /// # Errors
    ///
    /// [`UserError`], if this process is root's.
    pub(crate) fn look_up(name: &str) -> Result<Self, UserError> {
        if !Uid::effective().is_root() {
            return Ok(Self { ids: None });
        }
        let unavailable = |source: io::Error| UserError::Unavailable { name: name.into(), source };
        let user = User::from_name(name).map_err(|e| unavailable(e.into()))?;
        let user = user.ok_or_else(|| UserError::Unknown(name.into()))?;
        if user.uid.is_root() {
            return Err(UserError::Root(name.into()));
        }
        let c_name = CString::new(name).map_err(|e| unavailable(e.into()))?;
        let groups = getgrouplist(&c_name, user.gid).map_err(|e| unavailable(e.into()))?;
        Ok(Self { ids: Some(Ids { uid: user.uid, gid: user.gid, groups }) })
    }

    /// Makes this process the user's, for good.
    pub(crate) fn take_over(&self) -> Result<(), WorkerError> {
        let Some(Ids { uid, gid, groups }) = &self.ids else { return Ok(()) };
        let (uid, gid) = (*uid, *gid);
        // While there is the right to: nothing that is executed could ever give any back. Whoever started us may have taken
        // that right, and what it would take away, already.
        for set in [CapSet::Bounding, CapSet::Inheritable] {
            if let Err(error) = caps::clear(None, set) {
                warn!("capabilities that no program is executed to use stay: {error}");
            }
        }
        setgroups(groups).map_err(system("setgroups"))?;
        setresgid(gid, gid, gid).map_err(system("setresgid"))?;
        setresuid(uid, uid, uid).map_err(system("setresuid"))?;
        let (root, wheel) = (Uid::from_raw(0), Gid::from_raw(0));
        let dropped = setresuid(root, root, root).is_err()
            && (gid == wheel || setresgid(wheel, wheel, wheel).is_err())
            && Uid::current() == uid;
        if dropped { Ok(()) } else { Err(WorkerError::NotDropped) }
    }
}
