//! The child of one job, from fork to exec, in order: look the user up, check, drop every privilege, prove it,
//! and only then touch what is the user's.
//!
//! Everything here runs in a process of its own, forked from the monitor. A refusal is written to a pipe which the worker
//! reads: the job's report pipe, or for a run the filter's standard output, which nobody else has written to then.
//!
//! Between fork and exec every page that is touched is a page fault, and every system call is made once for each filter:
//! what is the same for all of them is found out before, in the monitor.

use std::{
    convert::Infallible,
    ffi::{CStr, CString},
    fs::{self, File},
    io::Write,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl, open},
    sys::{
        prctl,
        resource::{Resource, getrlimit, rlim_t, setrlimit},
        signal::Signal,
        stat::{Mode, SFlag, fstat, umask},
    },
    unistd::{
        self, Gid, Pid, Uid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, execve, getgrouplist, getppid,
        getresgid, getresuid, setgroups, setresgid, setresuid, setsid,
    },
};

use super::{
    checks::{self, CheckError, Place},
    user_log,
    wire::{self, FilterFile, Inspection, Phase, Refusal, Report, RulesSource, Variable},
};
use crate::{
    config::Filter,
    rules::Rules,
    sys,
    user::{Account, User},
};

/// SHELL and PATH of every filter.
const SHELL: &CStr = c"SHELL=/bin/sh";
const PATH: &CStr = c"PATH=/usr/local/bin:/usr/bin:/bin";

/// Exit status of a child that did not become a filter. The report says why; should it get lost, this is no verdict
/// either. A filter may exit with it too: the kernel knows which it was.
pub(super) const NOT_RUN: i32 = 126;

/// Longest `rules.toml`, in bytes.
const MAX_RULES_LENGTH: u64 = 1 << 20;

/// Most that all sender files of a user may have, in bytes: 100,000 addresses are 3 MB.
const MAX_SENDER_FILES_LENGTH: u64 = 16 << 20;

/// Most filters listed of one user.
const MAX_FILTERS: usize = 256;

/// What a child needs to know of the process it was forked from.
pub(super) struct Child<'a> {
    /// Limits, and where filters lie.
    pub(super) settings: &'a Filter,
    pub(super) parent: &'a Parent,
}

/// The process that children are forked from, asked once.
pub(super) struct Parent {
    pid: Pid,
    /// Who it runs as.
    uid: Uid,
    /// What no limit of a filter may exceed.
    hard_limits: [(Resource, rlim_t); 6],
}

impl Parent {
    pub(super) fn this_process() -> nix::Result<Self> {
        let mut hard_limits = [
            (Resource::RLIMIT_CORE, 0),
            (Resource::RLIMIT_AS, 0),
            (Resource::RLIMIT_CPU, 0),
            (Resource::RLIMIT_NOFILE, 0),
            (Resource::RLIMIT_FSIZE, 0),
            (Resource::RLIMIT_NPROC, 0),
        ];
        for (resource, hard) in &mut hard_limits {
            (_, *hard) = getrlimit(*resource)?;
        }
        Ok(Self { pid: Pid::this(), uid: Uid::effective(), hard_limits })
    }
}

/// Descriptors and request of a run.
pub(super) struct Run<'a> {
    pub(super) user: &'a User,
    pub(super) phase: Phase,
    pub(super) extension: Option<&'a str>,
    pub(super) variables: &'a [(Variable, &'a str)],
    /// The message; `None` means empty.
    pub(super) stdin: Option<&'a OwnedFd>,
    pub(super) stdout: &'a OwnedFd,
    pub(super) stderr: &'a OwnedFd,
}

/// Who the child becomes.
struct Identity {
    name: String,
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
    home: PathBuf,
}

impl Run<'_> {
    /// The first act: makes what the filter reads and writes descriptors 0 to 2, and closes all that is left of the
    /// monitor's. Only then may anything be asked of them that could hang.
    fn take_streams(&self) -> nix::Result<[OwnedFd; 3]> {
        match self.stdin {
            Some(message) => dup2_stdin(message),
            None => open("/dev/null", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).and_then(dup2_stdin),
        }
        .and_then(|()| dup2_stdout(self.stdout))
        .and_then(|()| dup2_stderr(self.stderr))
        .and_then(|()| sys::close_all_but(&[]))?;
        Ok([0, 1, 2].map(sys::adopt))
    }

    /// Whatever the worker says, a filter reads the message, and writes to pipes.
    fn check_streams(&self, stdin: &OwnedFd, stderr: &OwnedFd) -> Result<(), Refusal> {
        check_pipe("standard error", stderr)?;
        self.stdin.map_or(Ok(()), |_| check_message(stdin))
    }
}

impl Child<'_> {
    /// Looks at what the user has and reports it. Returns the exit status.
    pub(super) fn inspect(&self, user: &User, report: &OwnedFd) -> i32 {
        if keep_only(report).is_err() {
            return NOT_RUN;
        }
        let outcome = self.become_user(user).and_then(|(identity, home)| {
            let mut inspection = Inspection { uid: identity.uid.as_raw(), ..Inspection::default() };
            self.find_files(user, &identity, home.as_ref(), &mut inspection)?;
            inspection.home = identity.home;
            Ok(inspection)
        });
        let (report_text, status) = match outcome {
            Ok(inspection) => (Report::Inspection(inspection), 0),
            Err(refusal) => (Report::Refusal(refusal), NOT_RUN),
        };
        send(report, &report_text);
        status
    }

    /// Appends to the user's log, if there is one, and reports only what went wrong. Returns the exit status.
    pub(super) fn log(&self, user: &User, text: &str, report: &OwnedFd) -> i32 {
        if keep_only(report).is_err() {
            return NOT_RUN;
        }
        let outcome = self.become_user(user).and_then(|(identity, _)| {
            let path = identity.home.join(&self.settings.directory).join("log");
            umask(Mode::S_IRWXG | Mode::S_IRWXO);
            user_log::append(&path, identity.uid.as_raw(), text)
                .map_err(|failed| Refusal::Check(failed.to_string()))
        });
        match outcome {
            Ok(()) => 0,
            Err(refusal) => {
                send(report, &Report::Refusal(refusal));
                NOT_RUN
            }
        }
    }

    /// Becomes the user's filter. Returns only if it could not, with the exit status.
    pub(super) fn run(&self, run: &Run<'_>) -> i32 {
        let Ok([stdin, stdout, stderr]) = run.take_streams() else { return NOT_RUN };
        if check_pipe("standard output", &stdout).is_err() {
            return NOT_RUN;
        }
        let Err(refusal) = run.check_streams(&stdin, &stderr).and_then(|()| self.try_run(run));
        send(&stdout, &Report::Refusal(refusal));
        NOT_RUN
    }

    fn try_run(&self, run: &Run<'_>) -> Result<Infallible, Refusal> {
        self.limit_resources()?;
        let (identity, home) = self.become_user(run.user)?;
        if self.settings.no_new_privileges {
            prctl::set_no_new_privs().map_err(|e| refused("prctl(PR_SET_NO_NEW_PRIVS)", e))?;
        }
        umask(Mode::S_IRWXG | Mode::S_IRWXO);
        let filter = self.find_filter(&identity, home.as_ref(), run)?;
        // A virtual user of whom the directory knows all may have no home.
        chdir(&identity.home)
            .or_else(|_| chdir("/"))
            .map_err(|e| Refusal::Check(format!("home {}: {}", identity.home.display(), e.desc())))?;
        let filter = CString::new(filter.as_os_str().as_bytes()).map_err(|e| refused("path of filter", e))?;
        let environment = environment(&identity, run.variables);

        // What the look-up of a user may have left open.
        sys::close_on_exec_from(3).map_err(|e| refused("descriptors", e))?;
        execve(&filter, &[&filter], &environment).map_err(|e| {
            let hint = match e {
                nix::errno::Errno::ENOENT => " (does the interpreter of its #! line exist?)",
                nix::errno::Errno::ENOEXEC => " (a script needs a #! line)",
                // execve(2): the uid has as many processes as RLIMIT_NPROC allows, whoever started them.
                nix::errno::Errno::EAGAIN => " (the user has filter.max-user-processes already)",
                _ => "",
            };
            Refusal::Check(format!("{}: cannot be executed: {}{hint}", filter.to_string_lossy(), e.desc()))
        })
    }

    /// Every privilege goes, for good, before anything of the user's is touched. The place is the user's home, if only
    /// the user or root can change the way to it.
    fn become_user(&self, user: &User) -> Result<(Identity, Option<Place>), Refusal> {
        let identity = self.identify(user)?;
        setsid().map_err(|e| refused("setsid", e))?;
        let (uid, mut gid) = (identity.uid, identity.gid);
        if !self.parent.uid.is_root() {
            // Nothing can be changed, nor is there anything to lose: the group is the invoking user's.
            gid = Gid::effective();
        } else {
            setgroups(&identity.groups).map_err(|e| refused("setgroups", e))?;
            setresgid(gid, gid, gid).map_err(|e| refused("setresgid", e))?;
            setresuid(uid, uid, uid).map_err(|e| refused("setresuid", e))?;
        }
        prove_dropped(uid, gid)?;
        // After the change of uid, which clears it. The signal goes to a process that may ignore all others.
        prctl::set_pdeathsig(Signal::SIGKILL).map_err(|e| refused("prctl(PR_SET_PDEATHSIG)", e))?;
        if getppid() != self.parent.pid {
            return Err(Refusal::Check("the monitor is gone".into()));
        }
        let home = self.check_home(user, &identity)?;
        Ok((identity, home))
    }

    /// Looks the user up and refuses whoever no filter may run as.
    fn identify(&self, user: &User) -> Result<Identity, Refusal> {
        let name = user.name.as_str();
        let identity = match &user.account {
            Account::Passwd => {
                let entry = unistd::User::from_name(name)
                    .map_err(|e| refused("user database (getpwnam)", e))?
                    .ok_or(Refusal::NoUser)?;
                let c_name = CString::new(entry.name.as_str()).map_err(|e| refused("user name", e))?;
                let groups = getgrouplist(&c_name, entry.gid).map_err(|e| refused("getgrouplist", e))?;
                Identity { name: entry.name, uid: entry.uid, gid: entry.gid, groups, home: entry.dir }
            }
            Account::Virtual { uid, gid, home } => {
                let gid = Gid::from_raw(*gid);
                Identity {
                    name: name.into(),
                    uid: Uid::from_raw(*uid),
                    gid,
                    groups: vec![gid],
                    home: home.clone(),
                }
            }
        };
        let (uid, gid) = (identity.uid.as_raw(), identity.gid.as_raw());
        let no = |why: String| Err(Refusal::Check(format!("user {name} (uid {uid}): {why}")));
        if uid == 0 || uid < self.settings.min_uid || uid == u32::MAX {
            return no(format!("no filter runs below filter.min-uid = {}", self.settings.min_uid));
        }
        if gid == 0 || gid == u32::MAX || identity.groups.contains(&Gid::from_raw(0)) {
            return no("no filter runs in group 0".into());
        }
        let own = self.parent.uid;
        if !own.is_root() && own != identity.uid {
            return no(format!("not started as root, so filters run for uid {own} only"));
        }
        if let Account::Virtual { .. } = user.account {
            let range = self.settings.virtual_uids;
            if own.is_root() && !(range.contains(uid) && range.contains(gid)) {
                return no(format!(
                    "uid or gid {gid} outside filter.virtual-uids [{}, {}]",
                    range.first, range.last
                ));
            }
            let plain =
                identity.home.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
            // A path with NUL is none to the kernel: it could neither be checked nor entered, nor told to the filter.
            let plain = plain && !identity.home.as_os_str().as_bytes().contains(&0);
            if !plain || !is_below(&identity.home, &self.settings.virtual_homes) {
                return no(format!("home {} outside filter.virtual-homes", identity.home.display()));
            }
        }
        Ok(identity)
    }

    /// A virtual user's home may be reached through links, but not out of `virtual-homes`. Asked as the user, for
    /// whom nothing is lost by looking.
    fn check_home(&self, user: &User, identity: &Identity) -> Result<Option<Place>, Refusal> {
        let way = checks::follow(&identity.home, identity.uid.as_raw()).ok();
        if let Account::Passwd = user.account {
            return Ok(way);
        }
        let real = match &way {
            Some(home) => home.path().to_owned(),
            None => match fs::canonicalize(&identity.home) {
                Ok(real) => real,
                Err(_) => return Ok(None),
            },
        };
        // Without links on the way, what `identify` has seen of the path as it is written is all there is.
        let leads_astray = real != identity.home && {
            let roots = self.settings.virtual_homes.iter().filter_map(|p| fs::canonicalize(p).ok());
            !is_below(&real, &roots.collect::<Vec<_>>())
        };
        if leads_astray {
            return Err(Refusal::Check(format!(
                "home {} leads outside filter.virtual-homes",
                identity.home.display()
            )));
        }
        Ok(way)
    }

    fn limit_resources(&self) -> Result<(), Refusal> {
        let s = self.settings;
        for (resource, hard) in self.parent.hard_limits {
            let limit = match resource {
                Resource::RLIMIT_AS => s.max_memory.0,
                Resource::RLIMIT_CPU => s.max_cpu.0.as_secs().max(1),
                Resource::RLIMIT_NOFILE => s.max_open_files,
                Resource::RLIMIT_FSIZE => s.max_file_size.0,
                Resource::RLIMIT_NPROC => s.max_user_processes,
                // A core file could hold what is not the user's.
                _ => 0,
            };
            let limit = hard.min(limit as rlim_t);
            setrlimit(resource, limit, limit).map_err(|e| refused("setrlimit", e))?;
        }
        Ok(())
    }

    fn find_filter(
        &self,
        identity: &Identity,
        home: Option<&Place>,
        run: &Run<'_>,
    ) -> Result<PathBuf, Refusal> {
        for name in run.phase.candidates(run.extension) {
            match self.own_executable(identity, home, &name) {
                Err(CheckError::Missing) => (),
                Err(failed) => return Err(Refusal::Check(failed.to_string())),
                Ok(path) => return Ok(path),
            }
        }
        // The site's programs belong to root; the user could not be trusted with another's.
        let Some(program) = self.fallback_paths(run.user, run.phase).into_iter().next() else {
            return Err(Refusal::NoFilter);
        };
        checks::executable(&program, 0).map_err(|failed| Refusal::Check(program_problem(&program, &failed)))
    }

    /// The real path of an executable in the user's directory.
    fn own_executable(
        &self,
        identity: &Identity,
        home: Option<&Place>,
        name: &str,
    ) -> Result<PathBuf, CheckError> {
        let (path, uid) = (self.settings.directory.join(name), identity.uid.as_raw());
        match home {
            Some(home) => home.executable(&path, uid),
            // Again from the root, for the error.
            None => checks::executable(&identity.home.join(path), uid),
        }
    }

    /// Where a filter of the site's may lie, for a user without one.
    fn fallback_paths(&self, user: &User, phase: Phase) -> Vec<PathBuf> {
        let s = self.settings;
        match (phase, &user.program) {
            (Phase::Recipient, _) => s.default_recipient.iter().cloned().collect(),
            // Named by the directory, it must be there: no default takes its place.
            (Phase::Message, Some(program)) => {
                let paths: Vec<_> = s.program_directories.iter().map(|d| d.join(program.as_str())).collect();
                let present = paths.iter().find(|path| path.exists()).or(paths.first()).cloned();
                present.into_iter().collect()
            }
            (Phase::Message, None) => s.default_message.iter().cloned().collect(),
        }
    }

    fn fallback(&self, user: &User, phase: Phase) -> Option<FilterFile> {
        let path = self.fallback_paths(user, phase).into_iter().next()?;
        let problem = checks::executable(&path, 0).err().map(|failed| program_problem(&path, &failed));
        Some(FilterFile { name: path.display().to_string(), problem })
    }

    fn find_files(
        &self,
        user: &User,
        identity: &Identity,
        home: Option<&Place>,
        inspection: &mut Inspection,
    ) -> Result<(), Refusal> {
        inspection.fallback_recipient = self.fallback(user, Phase::Recipient);
        inspection.fallback_message = self.fallback(user, Phase::Message);
        let directory = identity.home.join(&self.settings.directory);
        let entries = match fs::read_dir(&directory) {
            Err(error) if checks::is_absence(&error) => return Ok(()),
            // What is there and can't be seen is not nothing.
            other => other.map_err(|e| refused(&directory.display().to_string(), e))?,
        };
        for entry in entries.filter_map(Result::ok) {
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            if name == "log" {
                inspection.log = true;
            } else if is_filter_name(&name) && inspection.filters.len() < MAX_FILTERS {
                let problem = match self.own_executable(identity, home, &name) {
                    Ok(_) => None,
                    Err(CheckError::Missing) => continue,
                    Err(failed) => Some(failed.to_string()),
                };
                inspection.filters.push(FilterFile { name, problem });
            }
        }
        inspection.filters.sort_by(|a, b| a.name.cmp(&b.name));
        match read_rules(&directory) {
            Ok(rules) => inspection.rules = rules,
            Err(error) => inspection.rules_problem = Some(error.to_string()),
        }
        Ok(())
    }
}

/// What is wrong with a program of the site's, which must be there.
fn program_problem(path: &Path, failed: &CheckError) -> String {
    match failed {
        CheckError::Missing => format!("{}: no such program", path.display()),
        failed @ CheckError::Failed { .. } => failed.to_string(),
    }
}

/// The rules file and what it names, read as the user: the child decides which files, by the text itself.
fn read_rules(directory: &Path) -> Result<Option<RulesSource>, CheckError> {
    let Some(text) = checks::read_text(&directory.join("rules.toml"), MAX_RULES_LENGTH)? else {
        return Ok(None);
    };
    let mut left = MAX_SENDER_FILES_LENGTH;
    let mut sender_files = Vec::new();
    for name in Rules::sender_file_names(&text) {
        // A missing one is reported with its place by whoever parses the rules.
        if let Some(text) = checks::read_text(&directory.join(&name), left)? {
            left -= text.len() as u64;
            sender_files.push((name, text));
        }
    }
    Ok(Some(RulesSource { text, sender_files }))
}

fn is_filter_name(name: &str) -> bool {
    [Phase::Recipient, Phase::Message]
        .iter()
        .filter_map(|phase| name.strip_prefix(phase.as_str()))
        .any(|rest| rest.is_empty() || rest.starts_with('-'))
}

fn is_below(path: &Path, roots: &[PathBuf]) -> bool {
    roots.iter().any(|root| path != root && path.starts_with(root))
}

/// The old ids must be gone from every slot, and an attempt to get root back must fail.
fn prove_dropped(uid: Uid, gid: Gid) -> Result<(), Refusal> {
    let uids = getresuid().map_err(|e| refused("getresuid", e))?;
    let gids = getresgid().map_err(|e| refused("getresgid", e))?;
    let all_uids = [uids.real, uids.effective, uids.saved].iter().all(|id| *id == uid);
    let all_gids = [gids.real, gids.effective, gids.saved].iter().all(|id| *id == gid);
    if !all_uids || !all_gids {
        return Err(Refusal::Check("ids differ from those of the user".into()));
    }
    let (root_uid, root_gid) = (Uid::from_raw(0), Gid::from_raw(0));
    if setresuid(root_uid, root_uid, root_uid).is_ok() || setresgid(root_gid, root_gid, root_gid).is_ok() {
        return Err(Refusal::Check("privileges could be regained after setresuid".into()));
    }
    Ok(())
}

/// Whatever the worker says, a filter reads an anonymous regular file that this descriptor can't write.
fn check_message(message: &OwnedFd) -> Result<(), Refusal> {
    let stat = fstat(message).map_err(|e| refused("fstat of message", e))?;
    let flags = fcntl(message.as_fd(), FcntlArg::F_GETFL).map_err(|e| refused("fcntl of message", e))?;
    let regular = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
    let read_only = OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE == OFlag::O_RDONLY;
    if regular && read_only && stat.st_nlink == 0 {
        Ok(())
    } else {
        Err(Refusal::Check("the message is not an anonymous read-only file".into()))
    }
}

/// A report may be written before the drop: on a socket, what root writes could carry root's credentials (unix(7),
/// SO_PASSCRED), and a file may ask who writes. The monitor itself must not ask what a descriptor is: fstat(2) can hang.
fn check_pipe(what: &str, descriptor: &OwnedFd) -> Result<(), Refusal> {
    let stat = fstat(descriptor).map_err(|e| refused("fstat", e))?;
    if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFIFO {
        Ok(())
    } else {
        Err(Refusal::Check(format!("{what} is no pipe")))
    }
}

/// The first act of a job that only reports: closes all that is the monitor's.
pub(super) fn keep_only(report: &OwnedFd) -> Result<(), Refusal> {
    sys::close_all_but(&[report.as_raw_fd()]).map_err(|e| refused("descriptors", e))?;
    check_pipe("report", report)
}

fn environment(identity: &Identity, variables: &[(Variable, &str)]) -> Vec<CString> {
    let home = identity.home.as_os_str().as_bytes();
    let own = [("HOME", home), ("USER", identity.name.as_bytes()), ("LOGNAME", identity.name.as_bytes())];
    let given = variables.iter().map(|(variable, value)| (variable.name(), value.as_bytes()));
    own.into_iter()
        .chain(given)
        // A value with NUL has no form in an environment; the worker has dropped and logged such.
        .filter_map(|(name, value)| {
            let mut line = Vec::with_capacity(name.len() + value.len() + "=\0".len());
            [name.as_bytes(), b"=", value].into_iter().for_each(|part| line.extend_from_slice(part));
            CString::new(line).ok()
        })
        .chain([SHELL.to_owned(), PATH.to_owned()])
        .collect()
}

/// For tests/fuzz: what a child would make of a request to run a filter, before it becomes anybody.
#[cfg(fuzzing)]
pub struct Examined {
    /// Who it would become.
    pub uid: u32,
    /// The same.
    pub gid: u32,
    /// Where it would look for filters.
    pub home: PathBuf,
    /// The environment of the filter.
    pub environment: Vec<CString>,
}

/// `None`: it would refuse.
#[cfg(fuzzing)]
pub fn examine(settings: &Filter, user: &User, variables: &[(Variable, &str)]) -> Option<Examined> {
    let parent = Parent::this_process().ok()?;
    let identity = Child { settings, parent: &parent }.identify(user).ok()?;
    let environment = environment(&identity, variables);
    Some(Examined {
        uid: identity.uid.as_raw(),
        gid: identity.gid.as_raw(),
        home: identity.home,
        environment,
    })
}

pub(super) fn refused(what: &str, error: impl std::fmt::Display) -> Refusal {
    Refusal::Check(format!("{what}: {error}"))
}

/// The worker may be gone; then nobody misses the report.
fn send(pipe: &OwnedFd, report: &Report) {
    if let (Ok(bytes), Ok(pipe)) = (wire::encode(report), pipe.try_clone()) {
        let _ = File::from(pipe).write_all(&bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::IdRange, user::UserName};

    fn settings() -> Filter {
        Filter {
            virtual_uids: IdRange { first: 5000, last: 5999 },
            virtual_homes: vec!["/var/vmail".into()],
            ..Filter::default()
        }
    }

    fn refusal(user: &str, account: Account) -> String {
        let settings = settings();
        let parent = Parent::this_process().unwrap();
        let child = Child { settings: &settings, parent: &parent };
        let name = UserName::try_from(user.to_owned()).unwrap();
        let user = User { name, account, program: None };
        match child.identify(&user) {
            Ok(identity) => format!("{} allowed", identity.uid),
            Err(Refusal::Check(why)) => why,
            Err(other) => format!("{other:?}"),
        }
    }

    fn virtual_user(uid: u32, gid: u32, home: &str) -> Account {
        Account::Virtual { uid, gid, home: home.into() }
    }

    #[test]
    fn nobody_runs_a_filter_as_root_or_as_a_system_account() {
        assert!(refusal("root", Account::Passwd).contains("min-uid"));
        assert!(refusal("daemon", Account::Passwd).contains("min-uid"));
        assert!(refusal("v", virtual_user(0, 5000, "/var/vmail/v")).contains("min-uid"));
        assert!(refusal("v", virtual_user(u32::MAX, 5000, "/var/vmail/v")).contains("min-uid"));
        assert!(refusal("v", virtual_user(5000, 0, "/var/vmail/v")).contains("group 0"));
        assert_eq!(refusal("umt-nobody-has-this-name", Account::Passwd), "NoUser");
    }

    #[test]
    fn virtual_users_stay_inside_what_the_configuration_allows() {
        if !Uid::effective().is_root() {
            assert!(refusal("v", virtual_user(5000, 5000, "/var/vmail/v")).contains("not started as root"));
            return;
        }
        assert_eq!(refusal("v", virtual_user(5000, 5000, "/var/vmail/v")), "5000 allowed");
        assert!(refusal("v", virtual_user(4999, 5000, "/var/vmail/v")).contains("virtual-uids"));
        assert!(refusal("v", virtual_user(5000, 6000, "/var/vmail/v")).contains("virtual-uids"));
        for home in
            ["/var/vmail", "/var/vmail/../root", "/var/vmailx/v", "var/vmail/v", "/root", "/var/vmail/v\0"]
        {
            assert!(refusal("v", virtual_user(5000, 5000, home)).contains("virtual-homes"), "{home}");
        }
    }

    #[test]
    fn only_names_of_filters_are_filters() {
        for name in ["message", "recipient", "message-shop", "recipient-default"] {
            assert!(is_filter_name(name));
        }
        for name in ["messages", "message.bak", "rules.toml", "log", "xmessage"] {
            assert!(!is_filter_name(name));
        }
    }

    #[test]
    fn nothing_but_a_pipe_is_written_to() {
        let (read, write) = unistd::pipe().unwrap();
        assert!(check_pipe("report", &write).is_ok());
        drop(read);
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(check_pipe("report", &socket.into()).is_err());
        assert!(check_pipe("report", &tempfile::tempfile().unwrap().into()).is_err());
    }

    #[test]
    fn a_message_that_could_be_written_or_has_a_name_is_refused() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let open = |path: &Path| OwnedFd::from(File::open(path).unwrap());
        assert!(check_message(&open(named.path())).is_err());
        let anonymous = tempfile::tempfile().unwrap();
        assert!(check_message(&sys::reopen_for_reading(&anonymous).unwrap()).is_ok());
        assert!(check_message(&anonymous.into()).is_err());
        assert!(check_message(&open(Path::new("/dev/null"))).is_err());
    }
}
