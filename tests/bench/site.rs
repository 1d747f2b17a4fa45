//! The daemon that is measured, and its users.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::accounting;
use crate::common::process::Server;
use crate::common::{self, PATIENCE, Sandbox, Usermilter, VirtualUsers, free_port, wait_until};

/// A user without anything.
pub(crate) const PLAIN: &str = "plain";
/// A user with [`RULES`] rules and a file of [`SENDERS`] senders.
pub(crate) const RULED: &str = "ruled";
/// A user with a filter that ends at once.
pub(crate) const FILTERED: &str = "filtered";
/// How many users with a filter that reads all there are: `reader0`, `reader1`, …
pub(crate) const READERS: u32 = 10;

/// Of everybody's mail.
pub(crate) const SENDER: &str = "s@sender.example";

const RULES: usize = 50;
const SENDERS: usize = 100_000;

/// A running usermilter with users in a sandbox.
pub(crate) struct Site {
    pub(crate) milter: String,
    pub(crate) policy: String,
    pub(crate) users: VirtualUsers,
    pub(crate) sandbox: Sandbox,
    log: PathBuf,
    server: Server,
}

impl Site {
    /// Starts the daemon as it is started in production, but for the log, which goes to a file: it is written, and
    /// nobody spends the machine's time to read it.
    pub(crate) fn start() -> Self {
        Self::start_with("")
    }

    /// The same with a further line in `[filter]`.
    pub(crate) fn start_with(filter_option: &str) -> Self {
        Self::start_as(|sandbox, users, milter, policy| {
            configuration(sandbox, users, milter, policy, filter_option)
        })
    }

    /// The same with another `[[resolver]]`, whose users have their homes in `homes`.
    pub(crate) fn start_among(resolver: &str, homes: &Path) -> Self {
        Self::start_as(|sandbox, _, milter, policy| {
            configuration_with(resolver, homes, sandbox, milter, policy, "")
        })
    }

    /// The same for clients on this host, who otherwise are trusted.
    pub(crate) fn start_judging_loopback() -> Self {
        Self::start_as(|sandbox, users, milter, policy| {
            let text = configuration(sandbox, users, milter, policy, "");
            text.replace("[recipients]\n", "[recipients]\ntrusted-networks = []\n")
        })
    }

    fn start_as(configuration: impl Fn(&Sandbox, &VirtualUsers, &str, &str) -> String) -> Self {
        let sandbox = Sandbox::new();
        let users = users(&sandbox);
        let (milter, policy) = addresses();
        let config = sandbox.write("usermilter.toml", configuration(&sandbox, &users, &milter, &policy));
        let log = sandbox.join("log");
        let mut command = Command::new(Usermilter::program());
        command.arg("serve").arg("--config").arg(config);
        command.env_remove("NOTIFY_SOCKET").env_remove("JOURNAL_STREAM").env_remove("LISTEN_FDS");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log).unwrap());
        let server = Server::start(&mut command);
        let read_log = || fs::read_to_string(&log).unwrap_or_default();
        assert!(wait_until(PATIENCE, || read_log().contains("ready")), "not ready:\n{}", read_log());
        Self { milter, policy, users, sandbox, log, server }
    }

    /// The monitor, whose child is the worker.
    pub(crate) fn servers(&self) -> Vec<accounting::Server> {
        vec![accounting::Server::usermilter(self.server.pid())]
    }

    /// Sees to it that what was measured is what was meant.
    pub(crate) fn expect_log(&self, text: &str) {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let last: Vec<_> = log.lines().rev().take(5).collect();
        assert!(log.contains(text), "no {text:?} in the log, but:\n{}", last.join("\n"));
    }

    /// The path of a user's message filter.
    pub(crate) fn message_filter(&self, user: &str) -> PathBuf {
        self.users.account(user).path("message")
    }
}

/// A milter and a policy address.
pub(crate) fn addresses() -> (String, String) {
    (format!("inet:127.0.0.1:{}", free_port()), format!("inet:127.0.0.1:{}", free_port()))
}

/// The address of a user.
pub(crate) fn address_of(user: &str) -> String {
    format!("{user}@test.example")
}

/// Virtual users, each with a uid of their own; without root all have the invoking user's.
pub(crate) fn users(sandbox: &Sandbox) -> VirtualUsers {
    let mut users = VirtualUsers::new(sandbox, &[]);
    let mut add = |name: &str, uid: u32| {
        let own = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        let (uid, gid) = if common::is_root() { (uid, uid) } else { own };
        users.add(name, uid, gid);
    };
    add(PLAIN, 5001);
    add(RULED, 5002);
    add(FILTERED, 5003);
    let readers: Vec<String> = (0..READERS).map(|n| format!("reader{n}")).collect();
    for (uid, reader) in (5010..).zip(&readers) {
        add(reader, uid);
    }
    users.file(RULED, "rules.toml", rules());
    users.file(RULED, "friends.txt", senders());
    // Copies: a filter must be its user's own or root's all the way, and links would make the way shorter.
    users.filter(FILTERED, "message", program("true"));
    for reader in &readers {
        users.filter(reader, "message", program("cksum"));
    }
    users
}

fn program(name: &str) -> Vec<u8> {
    let path = common::require(name);
    fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Every kind of rule, none of which matches but the last, which looks the sender up.
fn rules() -> String {
    let mut rules = String::new();
    for n in 1..RULES {
        let condition = match n % 5 {
            0 => format!("sender = [\"*-{n}@*.example.net\"]"),
            1 => format!("sender = [\"person{n}@example.net\", \".list{n}.example\"]"),
            2 => format!("client = [\"198.51.{n}.0/24\", \"2001:db8:{n}::/48\"]"),
            3 => format!("helo = [\"host{n}.example\"]"),
            _ => format!("recipient = [\"ruled+{n}@*\"]\nsize-over = \"{n}M\""),
        };
        rules += &format!("[[rule]]\n{condition}\naction = \"reject\"\n");
    }
    rules + "[[rule]]\nsender-file = [\"friends.txt\"]\naction = \"accept\"\n"
}

fn senders() -> String {
    let others = (1..SENDERS).map(|n| format!("person{n}@friends{}.example\n", n % 1000));
    others.chain([format!("{SENDER}\n")]).collect()
}

/// What an administrator would write, with paths in the sandbox: all else is as it is by default.
pub(crate) fn configuration(
    sandbox: &Sandbox,
    users: &VirtualUsers,
    milter: &str,
    policy: &str,
    filter_option: &str,
) -> String {
    let resolver =
        format!("[[resolver]]\ntype = \"passwd-file\"\npath = \"{}\"\n", users.passwd_file().display());
    configuration_with(&resolver, users.homes(), sandbox, milter, policy, filter_option)
}

fn configuration_with(
    resolver: &str,
    homes: &Path,
    sandbox: &Sandbox,
    milter: &str,
    policy: &str,
    filter_option: &str,
) -> String {
    let nobody = nix::unistd::User::from_name("nobody").unwrap().expect("user nobody");
    let spool = sandbox.directory("spool");
    if common::is_root() {
        nix::unistd::chown(&spool, Some(nobody.uid), Some(nobody.gid)).unwrap();
    }
    format!(
        r#"
[server]
user = "nobody"
milter = ["{milter}"]
policy = ["{policy}"]
control = "unix:{control}"

[recipients]
domains = ["test.example"]

{resolver}
[filter]
virtual-homes = ["{homes}"]
spool-directory = "{spool}"
{filter_option}
"#,
        control = sandbox.join("control").display(),
        homes = homes.display(),
        spool = spool.display(),
    )
}
