//! The worker's own walls: what it has no use for is taken from it before it reads a byte of a stranger's.
//!
//! Landlock takes files, TCP ports, and signals and abstract sockets of others; seccomp takes system calls. Files that
//! change while the worker runs, user names and host names are therefore asked of the monitor ([`crate::inquiry`]),
//! and no rule for a directory lets the worker read what merely lies beside a file of the configuration.
//!
//! Where a kernel lacks something the worker goes without it, and says so once.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, NetPort, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};
use nix::libc;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use tracing::{info, warn};

use crate::{
    config::{Config, ResolverConfig},
    logging,
};

/// What Landlock is asked for. Later versions have more to forbid; older kernels forbid less.
const KNOWN_ABI: ABI = ABI::V6;

/// Confines the process, which must have one thread yet. `included`: files that aliases include, which are read by this
/// process when they change.
pub(super) fn confine(settings: &Config, included: &[PathBuf]) {
    let ports = directory_ports(settings);
    let landlock = restrict_access(&settings.filter.spool_directory, included, &ports);
    let seccomp = restrict_calls(!ports.is_empty());
    match (&landlock, &seccomp) {
        (Ok(Landlock { abi, full: true }), Ok(())) => info!(landlock = abi, "worker confined"),
        (landlock, seccomp) => {
            let landlock = match landlock {
                Ok(Landlock { abi, .. }) => format!("in part ({abi})"),
                Err(error) => format!("no ({})", logging::Chain(error)),
            };
            let seccomp = match seccomp {
                Ok(()) => "yes".to_owned(),
                Err(error) => format!("no ({})", logging::Chain(error)),
            };
            warn!(%landlock, %seccomp, "worker confined as far as this kernel can");
        }
    }
}

/// Ports of directory servers.
fn directory_ports(settings: &Config) -> BTreeSet<u16> {
    let directories = settings.resolvers.iter().filter_map(|resolver| match resolver {
        ResolverConfig::Ldap(ldap) => Some(&ldap.uri),
        ResolverConfig::Passwd(_) | ResolverConfig::PasswdFile(_) => None,
    });
    directories.flatten().filter_map(|uri| Some(uri.tcp()?.1)).collect()
}

struct Landlock {
    abi: String,
    full: bool,
}

fn restrict_access(
    spool: &Path,
    included: &[PathBuf],
    ports: &BTreeSet<u16>,
) -> Result<Landlock, RulesetError> {
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN_ABI))?
        .handle_access(AccessNet::from_all(KNOWN_ABI))?
        .scope(Scope::from_all(KNOWN_ABI))?
        .create()?;
    // Files there are never named, so that none is made or removed.
    let unnamed: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | WriteFile | Truncate});
    match PathFd::new(spool) {
        Ok(directory) => ruleset = ruleset.add_rule(PathBeneath::new(directory, unnamed))?,
        Err(error) => {
            warn!("filter.spool-directory can't be used until the next reload: {}", logging::Chain(&error));
        }
    }
    for directory in parents(included) {
        // One that is gone may have been replaced since; what was read of its files goes on serving.
        if let Ok(directory) = PathFd::new(directory) {
            ruleset = ruleset.add_rule(PathBeneath::new(directory, AccessFs::ReadFile))?;
        }
    }
    for port in ports {
        ruleset = ruleset.add_rule(NetPort::new(*port, AccessNet::ConnectTcp))?;
    }
    let status = ruleset.restrict_self()?;
    let abi = match status.landlock {
        LandlockStatus::Available { effective_abi, kernel_abi } => {
            format!("ABI {}", kernel_abi.unwrap_or(effective_abi as i32))
        }
        LandlockStatus::NotEnabled => "not enabled".into(),
        LandlockStatus::NotImplemented => "not in this kernel".into(),
    };
    Ok(Landlock { abi, full: status.ruleset == RulesetStatus::FullyEnforced })
}

/// Included files are replaced by renaming, which only a rule for their directory survives.
fn parents(files: &[PathBuf]) -> BTreeSet<PathBuf> {
    let real = files.iter().filter_map(|file| file.canonicalize().ok());
    files.iter().cloned().chain(real).filter_map(|file| file.parent().map(Path::to_owned)).collect()
}

/// Why there is no filter for system calls.
#[derive(Debug, thiserror::Error)]
enum CallsError {
    /// For this machine none can be made.
    #[error("no filter of system calls")]
    Build(#[from] BackendError),
    /// The kernel takes none.
    #[error("seccomp(2)")]
    Install(#[from] seccompiler::Error),
}

/// Installs two filters: what no worker ever does ends it, and of the rest only what it does is there. The kernel
/// remembers which calls are always allowed, so that a filter's length hardly matters (seccomp's action cache).
fn restrict_calls(needs_inet: bool) -> Result<(), CallsError> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    let rules = |calls: &[libc::c_long]| calls.iter().map(|call| (*call, Vec::new())).collect();
    let hostile: BpfProgram =
        SeccompFilter::new(rules(HOSTILE), SeccompAction::Allow, SeccompAction::KillProcess, architecture)?
            .try_into()?;
    let mut needed: BTreeMap<i64, Vec<SeccompRule>> = rules(NEEDED);
    needed.extend(conditional(needs_inet)?);
    // As if the kernel were older: a library that tries something new then does it the old way, and one that uses
    // clone3(2), whose arguments no filter can see, uses clone(2).
    let unknown = SeccompAction::Errno(libc::ENOSYS as u32);
    let needed: BpfProgram =
        SeccompFilter::new(needed, unknown, SeccompAction::Allow, architecture)?.try_into()?;
    seccompiler::apply_filter_all_threads(&hostile)?;
    seccompiler::apply_filter_all_threads(&needed)?;
    Ok(())
}

/// What is allowed with some arguments only.
fn conditional(needs_inet: bool) -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    use SeccompCmpOp::{Eq, MaskedEq};
    let rule = |conditions: &[(u8, SeccompCmpOp, u64)]| {
        let conditions = conditions.iter().map(|(argument, operator, value)| {
            SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, operator.clone(), *value)
        });
        SeccompRule::new(conditions.collect::<Result<_, _>>()?)
    };
    // Any flag, as the system call has it: a mask to be compared with.
    let mask = |flag: libc::c_int| u64::from(flag.cast_unsigned());
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    let mut sockets = vec![rule(&[(0, Eq, mask(libc::AF_UNIX))])?];
    let mut sendto = Vec::new();
    let mut sendmsg = Vec::new();
    if needs_inet {
        for family in [libc::AF_INET, libc::AF_INET6] {
            // Landlock knows TCP by itself only: not what is behind other numbers of a protocol.
            let stream = (1, MaskedEq(0xf), mask(libc::SOCK_STREAM));
            sockets.push(rule(&[(0, Eq, mask(family)), stream, (2, Eq, 0)])?);
        }
        // It connects without connect(2).
        let fast_open = mask(libc::MSG_FASTOPEN);
        sendto.push(rule(&[(3, MaskedEq(fast_open), 0)])?);
        sendmsg.push(rule(&[(2, MaskedEq(fast_open), 0)])?);
    }
    let no_code = rule(&[(2, MaskedEq(mask(libc::PROT_EXEC)), 0)])?;
    Ok(BTreeMap::from([
        // Threads, and no processes.
        (
            libc::SYS_clone,
            vec![rule(&[(0, MaskedEq(mask(libc::CLONE_THREAD | namespaces)), mask(libc::CLONE_THREAD))])?],
        ),
        (libc::SYS_socket, sockets),
        (libc::SYS_sendto, sendto),
        (libc::SYS_sendmsg, sendmsg),
        (libc::SYS_mmap, vec![no_code.clone()]),
        (libc::SYS_mprotect, vec![no_code]),
        // abort(3)
        (libc::SYS_tgkill, vec![rule(&[(0, Eq, u64::from(std::process::id()))])?]),
        // The standard library's way to O_NONBLOCK.
        (libc::SYS_ioctl, vec![rule(&[(1, Eq, libc::FIONBIO)])?]),
        // Names of threads, and of the C library's memory.
        (
            libc::SYS_prctl,
            vec![rule(&[(0, Eq, mask(libc::PR_SET_NAME))])?, rule(&[(0, Eq, mask(libc::PR_SET_VMA))])?],
        ),
        // To ask, not to set: the pointer to new limits, of which both halves must be zero.
        (
            libc::SYS_prlimit64,
            vec![SeccompRule::new(vec![SeccompCondition::new(2, SeccompCmpArgLen::Qword, Eq, 0)?])?],
        ),
    ]))
}

/// What tokio, the C library and our own code do.
const NEEDED: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_close,
    libc::SYS_lseek,
    libc::SYS_openat,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_pipe2,
    libc::SYS_memfd_create,
    libc::SYS_fchmod,
    libc::SYS_ftruncate,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_ppoll,
    libc::SYS_connect,
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_membarrier,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // The old forms, which newer machines never had.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_time,
];

/// What is only tried by whoever has taken the worker over, or in an error that nobody should live with.
const HOSTILE: &[libc::c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_open_by_handle_at,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
];
