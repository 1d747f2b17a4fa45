//! Users who have filters: virtual ones from a passwd-file, and real ones of the system.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use super::sandbox::{Sandbox, make_directory, set_mode, set_owner, write_long_ago};
use super::{require, require_root};

/// The users of a passwd-file, with homes in a sandbox that only they may enter.
#[derive(Debug)]
pub struct VirtualUsers {
    users: Vec<Account>,
    homes: PathBuf,
    passwd_file: PathBuf,
}

impl VirtualUsers {
    /// Makes users of these names and uids (the gid is the same number), their homes and `sandbox/users`.
    ///
    /// Without root, the only uid whose home can be made is one's own.
    pub fn new(sandbox: &Sandbox, users: &[(&str, u32)]) -> Self {
        let mut virtual_users = VirtualUsers {
            users: Vec::new(),
            homes: sandbox.directory("homes"),
            passwd_file: sandbox.join("users"),
        };
        virtual_users.write_passwd_file();
        for &(name, uid) in users {
            virtual_users.add(name, uid, uid);
        }
        virtual_users
    }

    /// Adds a user to the passwd-file, and makes their home.
    pub fn add(&mut self, name: &str, uid: u32, gid: u32) {
        let home = self.homes.join(name);
        make_directory(&home, 0o700, Some((uid, gid)));
        self.users.push(Account { name: name.to_owned(), uid, gid, home });
        self.write_passwd_file();
    }

    /// The passwd-file, for `[[resolver]] type = "passwd-file"`.
    pub fn passwd_file(&self) -> &Path {
        &self.passwd_file
    }

    /// The directory of all homes, for `virtual-homes`.
    pub fn homes(&self) -> &Path {
        &self.homes
    }

    /// A user's account; panics if there is none.
    #[track_caller]
    pub fn account(&self, name: &str) -> &Account {
        self.users.iter().find(|user| user.name == name).unwrap_or_else(|| panic!("no user {name}"))
    }

    /// Writes an executable of the user's into `~/.usermilter` and returns its path.
    #[track_caller]
    pub fn filter(&self, user: &str, name: &str, script: impl AsRef<[u8]>) -> PathBuf {
        self.account(user).filter(name, script)
    }

    /// Writes a file of the user's (0600) into `~/.usermilter` and returns its path.
    #[track_caller]
    pub fn file(&self, user: &str, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        self.account(user).file(name, contents)
    }

    fn write_passwd_file(&self) {
        let line = |user: &Account| {
            format!("{}:x:{}:{}::{}:/bin/sh\n", user.name, user.uid, user.gid, user.home.display())
        };
        write_long_ago(&self.passwd_file, self.users.iter().map(line).collect::<String>());
    }
}

/// A user's name, ids and home.
#[derive(Clone, Debug)]
pub struct Account {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub home: PathBuf,
}

impl Account {
    /// Writes an executable (0700, the user's) into `~/.usermilter` and returns its path.
    #[track_caller]
    pub fn filter(&self, name: &str, script: impl AsRef<[u8]>) -> PathBuf {
        self.write(name, script, 0o700)
    }

    /// Writes a file (0600, the user's) into `~/.usermilter` and returns its path.
    #[track_caller]
    pub fn file(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        self.write(name, contents, 0o600)
    }

    /// The path of a file in `~/.usermilter`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.home.join(".usermilter").join(name)
    }

    /// Writes under another name first, so that one that is being run can be replaced.
    fn write(&self, name: &str, contents: impl AsRef<[u8]>, mode: u32) -> PathBuf {
        let directory = self.home.join(".usermilter");
        if !directory.is_dir() {
            make_directory(&directory, 0o700, Some((self.uid, self.gid)));
        }
        let path = directory.join(name);
        let new = directory.join(format!(".{name}.new"));
        fs::write(&new, contents).unwrap_or_else(|e| panic!("{}: {e}", new.display()));
        set_owner(&new, Some((self.uid, self.gid)));
        set_mode(&new, mode);
        fs::rename(&new, &path).unwrap();
        path
    }
}

/// A user of the system's passwd, with a home in a sandbox; removed when dropped.
#[derive(Debug)]
pub struct SystemUser {
    account: Account,
}

impl SystemUser {
    /// Makes a user named after this process and the hint, `umt4711-1anna`, so that test runs don't meet.
    ///
    /// # Panics
    ///
    /// Without root, and if useradd fails.
    #[track_caller]
    pub fn create(sandbox: &Sandbox, hint: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        require_root();
        remove_leftovers();
        let name = format!("umt{}-{}{hint}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let home = sandbox.directory("homes").join(&name);
        let mut useradd = Command::new(require("useradd"));
        useradd.args([
            "--user-group",
            "--no-create-home",
            "--no-log-init",
            "--shell",
            "/bin/sh",
            "--home-dir",
        ]);
        run_alone(useradd.arg(&home).arg(&name)).unwrap_or_else(|e| panic!("useradd {name}: {e}"));
        let user = nix::unistd::User::from_name(&name).unwrap().expect("the user just added");
        let account = Account { name, uid: user.uid.as_raw(), gid: user.gid.as_raw(), home };
        make_directory(&account.home, 0o700, Some((account.uid, account.gid)));
        SystemUser { account }
    }
}

impl std::ops::Deref for SystemUser {
    type Target = Account;

    fn deref(&self) -> &Account {
        &self.account
    }
}

impl Drop for SystemUser {
    fn drop(&mut self) {
        if let Err(error) = run_alone(Command::new(require("userdel")).arg(&self.account.name)) {
            eprintln!("userdel {}: {error}", self.account.name);
        }
    }
}

/// Removes the users of test runs that were killed: those whose process is no more.
fn remove_leftovers() {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    for name in passwd.lines().filter_map(|line| line.split(':').next()) {
        let owner = name.strip_prefix("umt").and_then(|rest| rest.split_once('-')?.0.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = run_alone(Command::new(require("userdel")).arg(name));
        }
    }
}

/// Runs useradd or userdel. One at a time: they lock /etc/passwd, and give up when they wait too long.
fn run_alone(command: &mut Command) -> Result<(), String> {
    static LOCK: Mutex<()> = Mutex::new(());
    let _guard = LOCK.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let output = command.stdin(Stdio::null()).output().map_err(|e| e.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()))
}
