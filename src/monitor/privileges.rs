//! What the monitor keeps of root's privileges, and what filters may inherit of it.
//!
//! It walls itself in less than the worker does: system call filters, Landlock and no_new_privs would pass to every
//! filter, which is a user's program and may do what its user may.

use std::io;

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::{
    resource::{Resource, setrlimit},
    stat::{Mode, umask},
};
use tracing::warn;

/// What the monitor and its children do as root: become a user, end what runs as another, bind a socket anywhere and give
/// it a group, read a configuration that only others may read, raise the worker's limit of descriptors.
const OWN: &[Capability] = &[
    Capability::CAP_SETUID,
    Capability::CAP_SETGID,
    Capability::CAP_KILL,
    Capability::CAP_CHOWN,
    Capability::CAP_FOWNER,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_NET_BIND_SERVICE,
    Capability::CAP_SYS_RESOURCE,
    Capability::CAP_SETPCAP,
];

/// What beside it a setuid program may get that a filter executes, if `filter.no-new-privileges` is off: delivery agents
/// and sudo(8) are at home in this, and nothing that rules the machine is.
const OF_SETUID_PROGRAMS: &[Capability] = &[
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_FSETID,
    Capability::CAP_SYS_NICE,
    Capability::CAP_AUDIT_WRITE,
];

/// To be called before anything is forked.
pub(super) fn reduce() {
    umask(Mode::S_IWGRP | Mode::S_IWOTH);
    if let Err(error) = setrlimit(Resource::RLIMIT_CORE, 0, 0) {
        warn!("core files are not turned off: {error}");
    }
    if let Err(error) = reduce_capabilities() {
        warn!("privileges stay as they are: {error}");
    }
}

fn reduce_capabilities() -> io::Result<()> {
    let failed = |error: caps::errors::CapsError| io::Error::other(error.to_string());
    let read = |set| caps::read(None, set).map_err(failed);
    let may_drop = read(CapSet::Effective)?.contains(&Capability::CAP_SETPCAP);
    for capability in read(CapSet::Bounding)? {
        // Whoever started us may have forbidden it already.
        if may_drop && !OWN.contains(&capability) && !OF_SETUID_PROGRAMS.contains(&capability) {
            caps::drop(None, CapSet::Bounding, capability).map_err(failed)?;
        }
    }
    let kept: CapsHashSet =
        read(CapSet::Permitted)?.into_iter().filter(|capability| OWN.contains(capability)).collect();
    caps::clear(None, CapSet::Ambient).map_err(failed)?;
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &kept).map_err(failed)?;
    }
    caps::clear(None, CapSet::Inheritable).map_err(failed)
}
