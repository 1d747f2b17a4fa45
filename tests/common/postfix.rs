//! A private Postfix: its own configuration, queue and Maildirs in a sandbox, on a free port of 127.0.0.1.
//!
//! It runs without systemd and beside any Postfix of the host, whose queue and configuration it never
//! touches.

use std::fmt::Write as _;
use std::fs;
use std::io::BufReader;
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use nix::unistd::User;

use super::process::Server;
use super::sandbox::{Sandbox, make_directory};
use super::smtp::Reply;
use super::{PATIENCE, free_port, require, require_root, wait_until};

/// The domain of the virtual mailboxes.
pub const DOMAIN: &str = "test.example";

/// A running Postfix; stopped when dropped.
#[derive(Debug)]
pub struct Postfix {
    // Dropped in this order: the processes first, then their files.
    server: Server,
    sandbox: Sandbox,
    port: u16,
    master_log: PathBuf,
}

/// What to start; see [`Postfix::builder`].
#[derive(Clone, Debug)]
pub struct Builder {
    milters: Vec<String>,
    policy: Option<String>,
    mailboxes: Vec<String>,
    local_domain: Option<String>,
    process_limit: u32,
    settings: Vec<(String, String)>,
    main_cf: String,
}

impl Postfix {
    /// A Postfix that takes mail for alice, bob and carol@test.example, without milter or policy service.
    ///
    /// No delays, no rate limits, short milter time-outs, `milter_default_action=tempfail`; 127.0.0.1 may use
    /// XCLIENT.
    pub fn builder() -> Builder {
        Builder {
            milters: Vec::new(),
            policy: None,
            mailboxes: ["alice", "bob", "carol"].map(|user| format!("{user}@{DOMAIN}")).to_vec(),
            local_domain: None,
            process_limit: 10,
            settings: Vec::new(),
            main_cf: String::new(),
        }
    }

    /// The SMTP port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The pid of master(8).
    pub fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// The directory that holds everything of this instance (etc, spool, mail, maillog).
    pub fn directory(&self) -> &Path {
        self.sandbox.path()
    }

    /// The messages delivered to a user so far, oldest first, exactly as they are in the Maildir.
    ///
    /// The user is a mailbox's local part (or whole address, for a domain other than test.example), or the
    /// name of a system user when there is a [`Builder::local_domain`].
    pub fn maildir(&self, user: &str) -> Vec<Vec<u8>> {
        let mail = self.sandbox.join("mail");
        let mut messages = Vec::new();
        for kind in ["virtual", "local"] {
            let Ok(entries) = fs::read_dir(mail.join(kind).join(user).join("new")) else {
                continue;
            };
            for path in entries.map(|entry| entry.unwrap().path()) {
                let written = fs::metadata(&path).unwrap().modified().unwrap();
                messages.push((written, fs::read(&path).unwrap()));
            }
        }
        messages.sort();
        messages.into_iter().map(|(_, message)| message).collect()
    }

    /// Waits until a user has at least this many messages and returns them all; panics with the log when time
    /// is up.
    #[track_caller]
    pub fn wait_delivered(&self, user: &str, count: usize, timeout: Duration) -> Vec<Vec<u8>> {
        if !wait_until(timeout, || self.maildir(user).len() >= count) {
            panic!("{user} has {} of {count} messages\n{}", self.maildir(user).len(), self.log());
        }
        self.maildir(user)
    }

    /// The mail log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.sandbox.join("maillog")).unwrap_or_default()
    }

    /// Waits for a line of the mail log with this text in it; panics with the log when time is up.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str) -> String {
        let find = || self.log().lines().find(|line| line.contains(text)).map(str::to_owned);
        if !wait_until(PATIENCE, || find().is_some()) {
            panic!("the mail log has no {text:?}\n{}", self.log());
        }
        find().unwrap()
    }

    /// Whether no message is waiting for delivery, held or kept as corrupt.
    pub fn queue_is_empty(&self) -> bool {
        const QUEUES: [&str; 6] = ["maildrop", "incoming", "active", "deferred", "hold", "corrupt"];
        let seems_empty =
            || QUEUES.iter().all(|queue| !contains_file(&self.sandbox.join("spool").join(queue)));
        // One that goes back from deferred to active in between is seen in neither; it is not that fast twice.
        seems_empty() && seems_empty()
    }

    /// Waits until everything taken is delivered or bounced; panics with the log when time is up.
    #[track_caller]
    pub fn wait_queue_empty(&self) {
        assert!(wait_until(PATIENCE, || self.queue_is_empty()), "the queue is not empty\n{}", self.log());
    }

    /// Runs one of Postfix's commands (`sendmail`, `postqueue`, …) on this instance.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(require(program));
        command.env("MAIL_CONFIG", self.sandbox.join("etc"));
        if program != "sendmail" {
            command.arg("-c").arg(self.sandbox.join("etc"));
        }
        command
    }
}

impl Drop for Postfix {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- Postfix on port {}\n{}---", self.port, self.log());
        }
    }
}

impl Builder {
    /// Adds a milter: `inet:127.0.0.1:PORT` or `unix:/path`.
    pub fn milter(mut self, address: impl Into<String>) -> Self {
        self.milters.push(address.into());
        self
    }

    /// The policy service to ask at RCPT TO: `inet:127.0.0.1:PORT` or `unix:/path`.
    pub fn policy(mut self, address: impl Into<String>) -> Self {
        self.policy = Some(address.into());
        self
    }

    /// The mailboxes there are instead of alice, bob and carol: local parts in test.example, or whole
    /// addresses.
    pub fn mailboxes(mut self, addresses: &[&str]) -> Self {
        let qualify = |name: &&str| {
            if name.contains('@') { (*name).to_owned() } else { format!("{name}@{DOMAIN}") }
        };
        self.mailboxes = addresses.iter().map(qualify).collect();
        self
    }

    /// A domain whose users are those of passwd, delivered by local(8).
    pub fn local_domain(mut self, domain: impl Into<String>) -> Self {
        self.local_domain = Some(domain.into());
        self
    }

    /// What happens to mail when the milter is in trouble: `accept`, `reject`, `tempfail` (the default here),
    /// `quarantine`.
    pub fn milter_default_action(self, action: &str) -> Self {
        self.set("milter_default_action", action)
    }

    /// The most processes of a service (smtpd, cleanup, virtual, …) at a time; 10 by default.
    pub fn process_limit(mut self, limit: u32) -> Self {
        self.process_limit = limit;
        self
    }

    /// Sets a main.cf parameter, whatever this harness sets it to; `$DIRECTORY` is the instance's directory.
    pub fn set(mut self, parameter: &str, value: impl Into<String>) -> Self {
        self.settings.push((parameter.to_owned(), value.into()));
        self
    }

    /// Appends lines to main.cf as they are.
    pub fn main_cf(mut self, lines: &str) -> Self {
        self.main_cf.push_str(lines);
        self.main_cf.push('\n');
        self
    }

    /// Starts it and waits until it greets.
    #[track_caller]
    pub fn start(self) -> Postfix {
        require_root();
        let postfix = require("postfix");
        let master = require("master");
        let sandbox = Sandbox::new();
        let port = free_port();
        make_tree(&sandbox);
        write_settled(&sandbox, "etc/main.cf", &self.render_main_cf(&sandbox));
        write_settled(&sandbox, "etc/master.cf", &self.render_master_cf(port));

        let etc = sandbox.join("etc");
        let check =
            Command::new(postfix).arg("-c").arg(&etc).arg("check").stdin(Stdio::null()).output().unwrap();
        let complaints = String::from_utf8_lossy(&check.stderr).into_owned();
        assert!(check.status.success(), "postfix check: {}\n{complaints}", check.status);

        let master_log = sandbox.join("master.stderr");
        let mut command = Command::new(&master);
        command.arg("-c").arg(&etc).arg("-d").stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(fs::File::create(&master_log).unwrap());
        let mut running = Postfix { server: Server::start(&mut command), sandbox, port, master_log };
        if !wait_until(PATIENCE, || greets(port) || running.server.status().is_some())
            || running.server.status().is_some()
        {
            let stderr = fs::read_to_string(&running.master_log).unwrap_or_default();
            panic!("Postfix does not greet on port {port}\n{complaints}{stderr}");
        }
        running
    }

    fn render_main_cf(&self, sandbox: &Sandbox) -> String {
        let directory = sandbox.path().display().to_string();
        let mut settings: Vec<(String, String)> = Vec::new();
        let mut set = |parameter: &str, value: &str| {
            settings.retain(|(other, _)| other != parameter);
            settings.push((parameter.to_owned(), value.replace("$DIRECTORY", &directory)));
        };
        for (parameter, value) in FIXED_SETTINGS {
            set(parameter, value);
        }

        let boxes: String = self
            .mailboxes
            .iter()
            .map(|address| {
                format!(
                    "{address} virtual/{}/\n",
                    address.strip_suffix(&format!("@{DOMAIN}")).unwrap_or(address)
                )
            })
            .collect();
        write_settled(sandbox, "etc/mailboxes", &boxes);
        let mut domains = vec![DOMAIN];
        for (_, domain) in self.mailboxes.iter().filter_map(|address| address.rsplit_once('@')) {
            if !domains.contains(&domain) {
                domains.push(domain);
            }
        }
        set("virtual_mailbox_domains", &domains.join(" "));
        if let Some(domain) = &self.local_domain {
            set("mydestination", domain);
        }
        set("default_process_limit", &self.process_limit.to_string());
        set("smtpd_milters", &self.milters.join(", "));
        if let Some(policy) = &self.policy {
            let restrictions =
                format!("check_policy_service {policy}, permit_mynetworks, reject_unauth_destination");
            set("smtpd_recipient_restrictions", &restrictions);
        }
        for (parameter, value) in &self.settings {
            set(parameter, value);
        }

        // Postfix warns of a parameter that is set twice before it knows where to log, which costs it seconds.
        let is_appended = |parameter: &str| {
            let names = self.main_cf.lines().filter_map(|line| line.split_once('='));
            names.into_iter().any(|(name, _)| name.trim_end() == parameter)
        };
        settings.retain(|(parameter, _)| !is_appended(parameter));

        let mut text = String::new();
        for (parameter, value) in &settings {
            let _ = writeln!(text, "{parameter} = {value}");
        }
        text + &self.main_cf
    }

    fn render_master_cf(&self, port: u16) -> String {
        format!("127.0.0.1:{port} inet n - n - - smtpd\n{SERVICES}")
    }
}

/// A fragment of main.cf from `postfix/`, in which nothing is changed but an address; for [`Builder::main_cf`].
#[track_caller]
pub fn fragment(name: &str, from: &str, to: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("postfix").join(name);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let active: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(active.join("\n").matches(from).count(), 1, "{name} has {from} once");
    text.replace(from, to)
}

/// What every instance has, in main.cf's words.
const FIXED_SETTINGS: &[(&str, &str)] = &[
    ("compatibility_level", "3.6"),
    ("queue_directory", "$DIRECTORY/spool"),
    ("data_directory", "$DIRECTORY/data"),
    ("mail_owner", "postfix"),
    ("maillog_file", "$DIRECTORY/maillog"),
    ("maillog_file_prefixes", "$DIRECTORY"),
    ("myhostname", "mx.test.example"),
    ("mydestination", ""),
    ("mynetworks", "127.0.0.0/8"),
    ("inet_interfaces", "127.0.0.1"),
    ("inet_protocols", "ipv4"),
    ("smtpd_authorized_xclient_hosts", "127.0.0.1"),
    // Mailboxes: Maildirs (trailing slash), whose files are the delivered messages.
    ("virtual_mailbox_base", "$DIRECTORY/mail"),
    ("virtual_mailbox_maps", "texthash:$DIRECTORY/etc/mailboxes"),
    ("virtual_uid_maps", "static:65534"),
    ("virtual_gid_maps", "static:65534"),
    ("alias_maps", ""),
    ("alias_database", ""),
    ("local_recipient_maps", "unix:passwd.byname $alias_maps"),
    ("mail_spool_directory", "$DIRECTORY/mail/local/"),
    ("biff", "no"),
    ("recipient_delimiter", "+"),
    ("virtual_mailbox_limit", "0"),
    ("mailbox_size_limit", "0"),
    ("message_size_limit", "200000000"),
    // Nothing leaves the machine, nobody is asked outside.
    ("default_transport", "error:no external delivery from a test"),
    ("disable_dns_lookups", "yes"),
    ("smtpd_relay_restrictions", ""),
    ("smtpd_recipient_restrictions", "permit_mynetworks, reject_unauth_destination"),
    ("smtpd_policy_service_timeout", "10s"),
    ("milter_connect_timeout", "5s"),
    ("milter_command_timeout", "15s"),
    ("milter_content_timeout", "60s"),
    ("milter_default_action", "tempfail"),
    ("non_smtpd_milters", ""),
    // No delay, no limit on what one client does.
    ("in_flow_delay", "0"),
    ("smtpd_error_sleep_time", "0"),
    ("smtpd_soft_error_limit", "10000"),
    ("smtpd_hard_error_limit", "10000"),
    ("smtpd_junk_command_limit", "10000"),
    ("smtpd_client_connection_count_limit", "0"),
    ("smtpd_client_connection_rate_limit", "0"),
];

/// master.cf without the listener: everything that SMTP reception and local delivery need, nothing chrooted.
const SERVICES: &str = "\
pickup    unix  n  -  n  60    1  pickup
cleanup   unix  n  -  n  -     0  cleanup
qmgr      unix  n  -  n  300   1  qmgr
tlsmgr    unix  -  -  n  1000? 1  tlsmgr
rewrite   unix  -  -  n  -     -  trivial-rewrite
bounce    unix  -  -  n  -     0  bounce
defer     unix  -  -  n  -     0  bounce
trace     unix  -  -  n  -     0  bounce
verify    unix  -  -  n  -     1  verify
flush     unix  n  -  n  1000? 0  flush
proxymap  unix  -  -  n  -     -  proxymap
showq     unix  n  -  n  -     -  showq
error     unix  -  -  n  -     -  error
retry     unix  -  -  n  -     -  error
discard   unix  -  -  n  -     -  discard
local     unix  -  n  n  -     -  local
virtual   unix  -  n  n  -     -  virtual
smtp      unix  -  -  n  -     -  smtp
anvil     unix  -  -  n  -     1  anvil
postlog   unix-dgram n - n -   1  postlogd
";

/// Writes a file and dates it back: each program of Postfix waits until what it reads is no longer fresh, in
/// case somebody is still writing, which costs seconds at every start.
fn write_settled(sandbox: &Sandbox, name: &str, contents: &str) {
    let path = sandbox.write(name, contents);
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
}

/// The directories that must be there before `postfix check`, which makes those of the queue.
fn make_tree(sandbox: &Sandbox) {
    let owner =
        User::from_name("postfix").unwrap().expect("user postfix: run tests/install-dependencies").uid;
    sandbox.directory("etc");
    sandbox.directory("spool");
    make_directory(&sandbox.join("data"), 0o700, Some((owner.as_raw(), 0)));
    for directory in ["mail", "mail/virtual", "mail/local"] {
        make_directory(&sandbox.join(directory), 0o1777, None);
    }
}

/// Whether a connection is greeted, be it with a refusal: only then smtpd has read its configuration and
/// works.
fn greets(port: u16) -> bool {
    let Ok(stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else {
        return false;
    };
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    Reply::read(&mut BufReader::new(stream)).is_ok()
}

/// Whether there is a regular file anywhere below a directory (queues may be hashed into subdirectories).
fn contains_file(directory: &Path) -> bool {
    let Ok(entries) = fs::read_dir(directory) else {
        return false;
    };
    entries.flatten().any(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => contains_file(&entry.path()),
        Ok(_) => true,
        Err(_) => false,
    })
}
