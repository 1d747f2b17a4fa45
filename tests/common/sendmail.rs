//! A private Sendmail: its own configuration, queue and mailboxes in a sandbox, on a free port of 127.0.0.1.
//!
//! The Debian packages of Sendmail and Postfix exclude each other, so Sendmail's are only unpacked, once, below the build
//! directory. It runs in mount and UTS namespaces of its own: without a full host name every start would wait a minute.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufReader, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use super::process::Server;
use super::sandbox::{Sandbox, make_directory, set_mode};
use super::smtp::Reply;
use super::{PATIENCE, free_port, require, require_root, wait_until};

/// What is unpacked: Sendmail, and the libraries that a machine without it may lack.
const PACKAGES: [&str; 7] =
    ["sendmail-bin", "sendmail-cf", "libwrap0", "liblockfile1", "libnsl2", "libsasl2-2", "libdb5.3"];

/// Its own name, which is one of its domains.
const HOST: &str = "sm.test.example";

/// A running Sendmail; stopped when dropped.
#[derive(Debug)]
pub struct Sendmail {
    // Dropped in this order: the processes first, then their files.
    server: Server,
    sandbox: Sandbox,
    port: u16,
}

/// What to start; see [`Sendmail::builder`].
#[derive(Clone, Debug, Default)]
pub struct Builder {
    milter: Option<String>,
    aliases: String,
    virtual_users: String,
    options: String,
    tls: bool,
    login: Option<[String; 2]>,
}

impl Sendmail {
    /// A Sendmail that takes mail for anybody at test.example, without milter.
    ///
    /// Mail is delivered before the reply to it, into one file each, by a script in the place of mail.local.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The SMTP port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The messages delivered to a mailbox so far, oldest first. A mailbox is named as Sendmail names it to its local
    /// mailer: with the extension.
    pub fn maildir(&self, mailbox: &str) -> Vec<Vec<u8>> {
        let Ok(entries) = fs::read_dir(self.sandbox.join("mail").join(mailbox)) else {
            return Vec::new();
        };
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "mail"));
        paths.sort();
        paths.iter().map(|path| fs::read(path).unwrap()).collect()
    }

    /// Waits until a mailbox has at least this many messages and returns them all; panics with the sessions when time
    /// is up.
    #[track_caller]
    pub fn wait_delivered(&self, mailbox: &str, count: usize, timeout: Duration) -> Vec<Vec<u8>> {
        if !wait_until(timeout, || self.maildir(mailbox).len() >= count) {
            panic!("{mailbox} has {} of {count} messages\n{}", self.maildir(mailbox).len(), self.traffic());
        }
        self.maildir(mailbox)
    }

    /// Waits until everything taken is delivered: copies for the members of an alias come after the reply.
    #[track_caller]
    pub fn wait_queue_empty(&self) {
        let is_empty = || fs::read_dir(self.sandbox.join("queue")).unwrap().next().is_none();
        assert!(wait_until(PATIENCE, is_empty), "the queue is not empty\n{}", self.traffic());
    }

    /// What went over every SMTP connection; there is no other log without a syslogd.
    pub fn traffic(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.sandbox.join("traffic")).unwrap_or_default()).into_owned()
    }

    /// Sendmail's command line on this instance, as `sendmail -bs`; to be run in `sh -c`, in its namespaces.
    pub fn command(&self, arguments: &str) -> Command {
        in_namespaces(&self.sandbox, &format!("{} {arguments}", sendmail_with_configuration(&self.sandbox)))
    }
}

impl Drop for Sendmail {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- Sendmail on port {}\n{}---", self.port, self.traffic());
        }
    }
}

impl Builder {
    /// The milter, brought in by the project's own `sendmail/usermilter.mc`: `inet:127.0.0.1:PORT` or `unix:/path`.
    pub fn milter(mut self, address: &str) -> Self {
        self.milter = Some(address.to_owned());
        self
    }

    /// A line of aliases(5).
    pub fn alias(mut self, name: &str, targets: &str) -> Self {
        let _ = writeln!(self.aliases, "{name}: {targets}");
        self
    }

    /// A line of the virtusertable.
    pub fn virtual_user(mut self, address: &str, target: &str) -> Self {
        let _ = writeln!(self.virtual_users, "{address}\t{target}");
        self
    }

    /// A line of the .mc file, before the mailers.
    pub fn mc(mut self, line: &str) -> Self {
        self.options.push_str(line);
        self.options.push('\n');
        self
    }

    /// Offers STARTTLS with a certificate of its own.
    pub fn tls(mut self) -> Self {
        self.tls = true;
        self
    }

    /// Offers AUTH PLAIN to a client of this name and password (Cyrus SASL, sasldb).
    pub fn login(mut self, name: &str, password: &str) -> Self {
        self.login = Some([name, password].map(str::to_owned));
        self
    }

    /// Starts it and waits until it greets.
    #[track_caller]
    pub fn start(self) -> Sendmail {
        require_root();
        // It trusts no map, certificate or socket below a directory that others may write.
        let sandbox = Sandbox::below(Path::new("/run"));
        let port = free_port();
        self.write_files(&sandbox, port);
        let serve = format!(
            "{sendmail} -bi >/dev/null && exec {sendmail} -bD -X {traffic}",
            sendmail = sendmail_with_configuration(&sandbox),
            traffic = sandbox.join("traffic").display(),
        );
        let output = fs::File::create(sandbox.join("output")).unwrap();
        let mut command = in_namespaces(&sandbox, &serve);
        command.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output);
        let mut running = Sendmail { server: Server::start(&mut command), sandbox, port };
        if !wait_until(PATIENCE, || greets(port) || running.server.status().is_some())
            || running.server.status().is_some()
        {
            let output = fs::read_to_string(running.sandbox.join("output")).unwrap_or_default();
            panic!("Sendmail does not greet on port {port}\n{output}");
        }
        running
    }

    fn write_files(&self, sandbox: &Sandbox, port: u16) {
        sandbox.directory("etc");
        make_directory(&sandbox.join("queue"), 0o700, None);
        make_directory(&sandbox.join("mail"), 0o1777, None);
        sandbox.write("etc/hosts", format!("127.0.0.1 {HOST} localhost\n"));
        sandbox.write("etc/service.switch", "hosts files\naliases files\n");
        sandbox.write("etc/aliases", format!("{}mailer-daemon: postmaster\n", self.aliases));
        let deliver = sandbox.write("etc/deliver", DELIVER);
        set_mode(&deliver, 0o755);
        if self.tls {
            make_certificate(sandbox);
        }
        if let Some([name, password]) = &self.login {
            make_sasl(sandbox, name, password);
        }
        let source = sandbox.write("etc/sendmail.mc", self.render_mc(sandbox, port));
        let configuration = Command::new(require("m4"))
            .arg(format!("-D_CF_DIR_={}/", unpacked().join("usr/share/sendmail/cf").display()))
            .arg(&source)
            .output()
            .unwrap();
        assert!(configuration.status.success(), "{}", String::from_utf8_lossy(&configuration.stderr));
        sandbox.write("etc/sendmail.cf", configuration.stdout);
        let mut makemap = program("makemap");
        makemap.arg("-C").arg(sandbox.join("etc/sendmail.cf")).arg("hash").arg(sandbox.join("etc/virtuser"));
        let mut makemap = makemap.stdin(Stdio::piped()).spawn().unwrap();
        makemap.stdin.take().unwrap().write_all(self.virtual_users.as_bytes()).unwrap();
        assert!(makemap.wait().unwrap().success());
    }

    /// The .mc file: what a private instance needs, and our lines as an administrator copies them.
    fn render_mc(&self, sandbox: &Sandbox, port: u16) -> String {
        let directory = sandbox.path().display();
        let cf = unpacked().join("usr/share/sendmail/cf");
        let mut text = format!(
            "include(`{cf}/m4/cf.m4')dnl
OSTYPE(`linux')dnl
undefine(`_LOCAL_PROCMAIL_')dnl
define(`confDOMAIN_NAME', `{HOST}')dnl
define(`confPID_FILE', `{directory}/pid')dnl
define(`QUEUE_DIR', `{directory}/queue')dnl
define(`STATUS_FILE', `')dnl
define(`HELP_FILE', `')dnl
define(`confCW_FILE', `')dnl
define(`ALIAS_FILE', `{directory}/etc/aliases')dnl
define(`confSERVICE_SWITCH_FILE', `{directory}/etc/service.switch')dnl
define(`confDONT_PROBE_INTERFACES', `True')dnl
define(`confTO_IDENT', `0')dnl
define(`confREFUSE_LA', `0')dnl
define(`confDELAY_LA', `0')dnl
define(`confQUEUE_LA', `1000')dnl
define(`confBAD_RCPT_THROTTLE', `0')dnl
define(`confDELIVERY_MODE', `interactive')dnl
define(`LOCAL_MAILER_PATH', `{directory}/etc/deliver')dnl
define(`LOCAL_MAILER_ARGS', `deliver {directory}/mail $u')dnl
define(`LOCAL_MAILER_FLAGS', `Pn9')dnl
MODIFY_MAILER_FLAGS(`LOCAL', `-w')dnl
MODIFY_MAILER_FLAGS(`LOCAL', `-5')dnl
FEATURE(`no_default_msa')dnl
FEATURE(`nocanonify')dnl
FEATURE(`accept_unresolvable_domains')dnl
FEATURE(`virtusertable', `hash -o {directory}/etc/virtuser')dnl
DAEMON_OPTIONS(`Name=TEST, Addr=127.0.0.1, Port={port}, Family=inet')dnl
",
            cf = cf.display(),
        );
        if self.tls {
            let _ = writeln!(
                text,
                "define(`confSERVER_CERT', `{directory}/etc/cert.pem')dnl
define(`confSERVER_KEY', `{directory}/etc/key.pem')dnl
define(`confCACERT', `{directory}/etc/cert.pem')dnl
define(`confCACERT_PATH', `{directory}/etc')dnl"
            );
        }
        let mut local = String::from("Cw test.example\n");
        if self.login.is_some() {
            text += "define(`confAUTH_MECHANISMS', `PLAIN')dnl\nTRUST_AUTH_MECH(`PLAIN')dnl\n";
            let _ = write!(local, "ESASL_PATH={directory}/sasl\nESASL_CONF_PATH={directory}/sasl\n");
        }
        if let Some(address) = &self.milter {
            text += &project_mc(address);
        }
        text + &self.options + "MAILER(`local')dnl\nMAILER(`smtp')dnl\nLOCAL_CONFIG\n" + &local
    }
}

/// `sendmail/usermilter.mc`, with nothing changed but where the milter listens.
fn project_mc(address: &str) -> String {
    const DEFAULT: &str = "S=inet:8890@127.0.0.1";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("sendmail/usermilter.mc");
    let text = fs::read_to_string(&path).unwrap();
    let socket = match address.strip_prefix("unix:") {
        Some(path) => format!("S=local:{path}"),
        None => {
            let (host, port) = address.trim_start_matches("inet:").rsplit_once(':').expect("HOST:PORT");
            format!("S=inet:{port}@{host}")
        }
    };
    assert_eq!(text.matches(DEFAULT).count(), 1, "{}", path.display());
    text.replace(DEFAULT, &socket)
}

/// The local mailer: its standard input to a file of its own, which has its name only when it is whole.
const DELIVER: &str = "#!/bin/sh
set -eu
mailbox=$1/$2
mkdir -p -m 1777 \"$mailbox\"
name=$(date +%s%N)-$$
cat > \"$mailbox/$name.new\"
mv \"$mailbox/$name.new\" \"$mailbox/$name.mail\"
";

/// The directory with the unpacked packages.
fn unpacked() -> &'static Path {
    static UNPACKED: OnceLock<PathBuf> = OnceLock::new();
    UNPACKED.get_or_init(|| {
        let directory = super::unpacked("sendmail", &PACKAGES);
        // Set-group-id, it would not be told where its libraries are.
        set_mode(&directory.join("usr/libexec/sendmail/sendmail"), 0o755);
        directory
    })
}

fn program(name: &str) -> Command {
    let mut command = Command::new(unpacked().join("usr/libexec/sendmail").join(name));
    command.env("LD_LIBRARY_PATH", libraries());
    command
}

fn libraries() -> PathBuf {
    super::libraries(unpacked())
}

fn sendmail_with_configuration(sandbox: &Sandbox) -> String {
    let sendmail = unpacked().join("usr/libexec/sendmail/sendmail");
    format!("{} -C {}", sendmail.display(), sandbox.join("etc/sendmail.cf").display())
}

/// A shell in mount and UTS namespaces of its own, in which the host has a full name.
fn in_namespaces(sandbox: &Sandbox, script: &str) -> Command {
    let mut command = Command::new(require("unshare"));
    let hosts = sandbox.join("etc/hosts");
    let enter = format!("hostname {HOST} && mount --bind {} /etc/hosts && {script}", hosts.display());
    command.args(["--mount", "--uts", "sh", "-c", &enter]).env("LD_LIBRARY_PATH", libraries());
    command
}

/// What Cyrus SASL reads: the mechanism, its own database of passwords, and where that is. Copied, since Sendmail trusts
/// nothing below a directory that others may write.
fn make_sasl(sandbox: &Sandbox, name: &str, password: &str) {
    let unpacked = super::unpacked("sasl", &["libsasl2-modules", "libsasl2-modules-db", "sasl2-bin"]);
    let directory = sandbox.directory("sasl");
    for plugin in ["libplain.so", "libsasldb.so"] {
        fs::copy(super::libraries(&unpacked).join("sasl2").join(plugin), directory.join(plugin)).unwrap();
    }
    let database = directory.join("sasldb2");
    sandbox.write(
        "sasl/Sendmail.conf",
        format!(
            "pwcheck_method: auxprop\nauxprop_plugin: sasldb\nsasldb_path: {}\nmech_list: PLAIN\n",
            database.display()
        ),
    );
    let mut saslpasswd2 = Command::new(unpacked.join("usr/sbin/saslpasswd2"));
    saslpasswd2.env("LD_LIBRARY_PATH", libraries()).env("SASL_PATH", &directory);
    saslpasswd2.args(["-p", "-c", "-u", HOST, "-f"]).arg(&database).arg(name).stdin(Stdio::piped());
    let mut saslpasswd2 = saslpasswd2.spawn().unwrap();
    saslpasswd2.stdin.take().unwrap().write_all(password.as_bytes()).unwrap();
    assert!(saslpasswd2.wait().unwrap().success());
    set_mode(&database, 0o600);
}

fn make_certificate(sandbox: &Sandbox) {
    let key = sandbox.join("etc/key.pem");
    let mut openssl = Command::new(require("openssl"));
    openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]);
    openssl.args(["-days", "2", "-subj", &format!("/CN={HOST}"), "-keyout"]).arg(&key);
    let output = openssl.arg("-out").arg(sandbox.join("etc/cert.pem")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    set_mode(&key, 0o600);
}

fn greets(port: u16) -> bool {
    let Ok(stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else {
        return false;
    };
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    Reply::read(&mut BufReader::new(stream)).is_ok()
}
