//! A private slapd on loopback, with the very schema, rules, indexes and entries of `ldap/`.

use std::{
    fs,
    io::Write,
    net::{TcpListener, TcpStream},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, getgid, getuid},
};

/// slapd is ready within hundredths of a second; loaded machines are slower.
const START_LIMIT: Duration = Duration::from_secs(20);

pub(crate) const PEOPLE: &str = "ou=people,dc=example,dc=org";
pub(crate) const DAEMON: &str = "cn=usermilter,ou=services,dc=example,dc=org";
pub(crate) const DAEMON_PASSWORD: &str = "daemon-secret";

/// A directory that goes when the test does.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        // Short: the path of a Unix socket has 107 bytes.
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("um-ldap-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What a slapd should be like.
#[derive(Default)]
pub(crate) struct Setup<'a> {
    /// Entries beside those of `ldap/sample.ldif`.
    pub(crate) entries: &'a str,
    /// Schema beside ours.
    pub(crate) schema: &'a str,
    /// Rules instead of `ldap/acl.conf`.
    pub(crate) acl: Option<&'a str>,
    /// Certificate and authority for TLS.
    pub(crate) tls: Option<&'a Certificate>,
    /// Whether nothing is logged, as by a server that is to be fast: [`Slapd::logged`] then finds nothing.
    pub(crate) quiet: bool,
}

pub(crate) struct Slapd {
    scratch: Scratch,
    port: u16,
    tls_port: Option<u16>,
    /// slapd(8), `-d`, which with any argument keeps the server in the foreground.
    log_level: &'static str,
    child: Option<Child>,
}

impl Slapd {
    pub(crate) fn start(setup: &Setup<'_>) -> Self {
        let scratch = Scratch::new();
        let here = env!("CARGO_MANIFEST_DIR");
        let db = scratch.path().join("db");
        fs::create_dir(&db).unwrap();
        let schema = scratch.write("test.schema", setup.schema);
        let acl = match setup.acl {
            Some(rules) => scratch.write("acl.conf", rules),
            None => Path::new(here).join("ldap/acl.conf"),
        };
        let tls = setup.tls.map_or(String::new(), |certificate| {
            format!(
                "TLSCertificateFile {}\nTLSCertificateKeyFile {}\n",
                certificate.certificate.display(),
                certificate.key.display()
            )
        });
        let config = format!(
            "include /etc/ldap/schema/core.schema\n\
             include /etc/ldap/schema/cosine.schema\n\
             include /etc/ldap/schema/inetorgperson.schema\n\
             include /etc/ldap/schema/nis.schema\n\
             include /etc/ldap/schema/misc.schema\n\
             include {here}/ldap/usermilter.schema\n\
             include {schema}\n\
             modulepath /usr/lib/ldap\n\
             moduleload back_mdb\n\
             {tls}\
             authz-regexp \"gidNumber={gid}[+]uidNumber={uid},cn=peercred,cn=external,cn=auth\" \"{DAEMON}\"\n\
             database mdb\n\
             suffix \"dc=example,dc=org\"\n\
             rootdn \"cn=admin,dc=example,dc=org\"\n\
             rootpw admin-secret\n\
             directory {db}\n\
             include {here}/ldap/indexes.conf\n\
             include {acl}\n",
            schema = schema.display(),
            gid = getgid(),
            uid = getuid(),
            db = db.display(),
            acl = acl.display(),
        );
        let config = scratch.write("slapd.conf", &config);
        for (name, text) in [
            ("sample.ldif", fs::read_to_string(format!("{here}/ldap/sample.ldif")).unwrap().as_str()),
            ("more.ldif", setup.entries),
        ] {
            let file = scratch.write(name, text);
            let mut slapadd = Command::new("/usr/sbin/slapadd");
            slapadd.arg("-q").arg("-f").arg(&config).arg("-l").arg(file);
            succeeds(&mut slapadd);
        }
        let mut slapd = Self {
            scratch,
            port: free_port(),
            tls_port: setup.tls.map(|_| free_port()),
            log_level: if setup.quiet { "0" } else { "stats" },
            child: None,
        };
        slapd.restart();
        slapd
    }

    pub(crate) fn ldap(&self) -> String {
        format!("ldap://127.0.0.1:{}", self.port)
    }

    pub(crate) fn ldaps(&self) -> String {
        format!("ldaps://127.0.0.1:{}", self.tls_port.unwrap())
    }

    pub(crate) fn ldapi(&self) -> String {
        ldapi(&self.scratch.path().join("s"))
    }

    pub(crate) fn password_file(&self, password: &str) -> String {
        let path = self.scratch.write("password", &format!("{password}\n"));
        path.display().to_string()
    }

    /// Starts the server that was stopped or killed, at the same addresses.
    pub(crate) fn restart(&mut self) {
        self.end(Signal::SIGTERM);
        let mut addresses = format!("{} {}", self.ldap(), self.ldapi());
        if self.tls_port.is_some() {
            addresses = format!("{addresses} {}", self.ldaps());
        }
        let log = fs::File::options().create(true).append(true).open(self.log()).unwrap();
        let mut child = Command::new("/usr/sbin/slapd")
            .args(["-d", self.log_level, "-h", &addresses, "-f"])
            .arg(self.scratch.path().join("slapd.conf"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        wait_until_ready(self.port, || {
            if let Some(status) = child.try_wait().unwrap() {
                let log = fs::read_to_string(self.log()).unwrap_or_default();
                panic!("slapd: {status}: {log}");
            }
        });
        self.child = Some(child);
    }

    /// Ends the server without a chance to say good-bye.
    pub(crate) fn kill(&mut self) {
        self.end(Signal::SIGKILL);
    }

    /// Makes the server hang: the kernel goes on accepting connections for it.
    pub(crate) fn pause(&self) {
        self.signal(Signal::SIGSTOP);
        // A thread of it may be at work for a moment yet.
        let status = format!("/proc/{}/stat", self.pid());
        while !fs::read_to_string(&status).unwrap().contains(") T ") {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_millis(20));
    }

    /// Ends [`Slapd::pause`].
    pub(crate) fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// How many lines of the server's log, one or more an operation, have `text`.
    pub(crate) fn logged(&self, text: &str) -> usize {
        self.count(|line| line.contains(text))
    }

    /// How many searches for something like `text` were made.
    pub(crate) fn searches(&self, text: &str) -> usize {
        self.count(|line| line.contains("SRCH base=") && line.contains(text))
    }

    /// Counts lines once no more are coming: slapd writes about an operation after it has answered.
    fn count(&self, wanted: impl Fn(&str) -> bool) -> usize {
        let mut log = String::new();
        loop {
            let now = fs::read_to_string(self.log()).unwrap_or_default();
            if now == log && !now.is_empty() {
                return log.lines().filter(|line| wanted(line)).count();
            }
            log = now;
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Changes entries as `who` may.
    pub(crate) fn modify(&self, who: &str, password: &str, ldif: &str) -> Output {
        with_input(
            Command::new("ldapmodify").args(["-x", "-H", &self.ldap(), "-D", who, "-w", password]),
            ldif,
        )
    }

    /// Changes entries as the administrator, who may do everything.
    pub(crate) fn administer(&self, ldif: &str) {
        let output = self.modify("cn=admin,dc=example,dc=org", "admin-secret", ldif);
        assert!(output.status.success(), "{output:?}");
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    fn log(&self) -> PathBuf {
        self.scratch.path().join("log")
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().cast_signed()), signal).unwrap();
    }

    fn end(&mut self, signal: Signal) {
        if let Some(mut child) = self.child.take() {
            let pid = Pid::from_raw(child.id().cast_signed());
            let _ = kill(pid, Signal::SIGCONT);
            let _ = kill(pid, signal);
            let status = child.wait().unwrap();
            if signal == Signal::SIGKILL {
                assert_eq!(status.signal(), Some(Signal::SIGKILL as i32));
            }
        }
    }
}

impl Drop for Slapd {
    fn drop(&mut self) {
        self.end(Signal::SIGKILL);
    }
}

/// An authority that signs what a test needs.
pub(crate) struct Authority {
    scratch: Scratch,
}

/// A server certificate for 127.0.0.1 and localhost, and who signed it.
pub(crate) struct Certificate {
    pub(crate) authority: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let scratch = Scratch::new();
        scratch.write("index.txt", "");
        scratch.write(
            "ca.conf",
            &format!(
                "[ca]\ndefault_ca = own\n[own]\ndatabase = {dir}/index.txt\nnew_certs_dir = {dir}\nrand_serial = yes\n\
                 unique_subject = no\ndefault_md = sha256\npolicy = any\nx509_extensions = server\ncertificate = {dir}/ca.pem\n\
                 private_key = {dir}/ca.key\n[any]\ncommonName = supplied\n[server]\nsubjectAltName = IP:127.0.0.1,DNS:localhost\n",
                dir = scratch.path().display()
            ),
        );
        let authority = Self { scratch };
        authority.openssl("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.pem");
        authority
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.scratch.path().join("ca.pem")
    }

    pub(crate) fn valid(&self) -> Certificate {
        self.sign("valid", "-days 2")
    }

    pub(crate) fn expired(&self) -> Certificate {
        self.sign("expired", "-startdate 20200101000000Z -enddate 20200201000000Z")
    }

    fn sign(&self, name: &str, validity: &str) -> Certificate {
        self.openssl(&format!(
            "req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr"
        ));
        self.openssl(&format!("ca -config ca.conf -batch -notext {validity} -in {name}.csr -out {name}.pem"));
        let file = |suffix: &str| self.scratch.path().join(format!("{name}.{suffix}"));
        Certificate { authority: self.file(), certificate: file("pem"), key: file("key") }
    }

    fn openssl(&self, arguments: &str) {
        succeeds(Command::new("openssl").args(arguments.split(' ')).current_dir(self.scratch.path()));
    }
}

/// The URI of a Unix socket.
pub(crate) fn ldapi(socket: &Path) -> String {
    format!("ldapi://{}", socket.display().to_string().replace('/', "%2F"))
}

/// Waits until somebody listens; `check` may panic if there is no hope.
pub(crate) fn wait_until_ready(port: u16, mut check: impl FnMut()) {
    let start = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        check();
        assert!(start.elapsed() < START_LIMIT, "slapd does not start");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A port that was free a moment ago.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

pub(crate) fn with_input(command: &mut Command, input: &str) -> Output {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

pub(crate) fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
