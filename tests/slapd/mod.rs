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

pub const PEOPLE: &str = "ou=people,dc=example,dc=org";
pub const DAEMON: &str = "cn=usermilter,ou=services,dc=example,dc=org";
pub const DAEMON_PASSWORD: &str = "daemon-secret";

/// A directory that goes when the test does.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        // Short: the path of a Unix socket has 107 bytes.
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("um-ldap-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn write(&self, name: &str, text: &str) -> PathBuf {
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
pub struct Setup<'a> {
    /// Entries beside those of `ldap/sample.ldif`.
    pub entries: &'a str,
    /// Schema beside ours.
    pub schema: &'a str,
    /// Rules instead of `ldap/acl.conf`.
    pub acl: Option<&'a str>,
    /// Certificate and authority for TLS.
    pub tls: Option<&'a Certificate>,
}

pub struct Slapd {
    scratch: Scratch,
    port: u16,
    tls_port: Option<u16>,
    child: Option<Child>,
}

impl Slapd {
    pub fn start(setup: &Setup<'_>) -> Self {
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
            (
                "sample.ldif",
                fs::read_to_string(format!("{here}/ldap/sample.ldif"))
                    .unwrap()
                    .as_str(),
            ),
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
            child: None,
        };
        slapd.restart();
        slapd
    }

    pub fn ldap(&self) -> String {
        format!("ldap://127.0.0.1:{}", self.port)
    }

    pub fn ldaps(&self) -> String {
        format!("ldaps://127.0.0.1:{}", self.tls_port.unwrap())
    }

    pub fn ldapi(&self) -> String {
        ldapi(&self.scratch.path().join("s"))
    }

    pub fn password_file(&self, password: &str) -> String {
        let path = self.scratch.write("password", &format!("{password}\n"));
        path.display().to_string()
    }

    /// Starts the server that was stopped or killed, at the same addresses.
    pub fn restart(&mut self) {
        self.end(Signal::SIGTERM);
        let mut addresses = format!("{} {}", self.ldap(), self.ldapi());
        if self.tls_port.is_some() {
            addresses = format!("{addresses} {}", self.ldaps());
        }
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.log())
            .unwrap();
        let mut child = Command::new("/usr/sbin/slapd")
            .args(["-d", "stats", "-h", &addresses, "-f"])
            .arg(self.scratch.path().join("slapd.conf"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let start = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            if let Some(status) = child.try_wait().unwrap() {
                panic!(
                    "slapd: {status}: {}",
                    fs::read_to_string(self.log()).unwrap_or_default()
                );
            }
            assert!(start.elapsed() < START_LIMIT, "slapd does not start");
            thread::sleep(Duration::from_millis(10));
        }
        self.child = Some(child);
    }

    /// Ends the server without a chance to say good-bye.
    pub fn kill(&mut self) {
        self.end(Signal::SIGKILL);
    }

    /// Makes the server hang: the kernel goes on accepting connections for it.
    pub fn pause(&self) {
        self.signal(Signal::SIGSTOP);
        // A thread of it may be at work for a moment yet.
        let status = format!("/proc/{}/stat", self.child.as_ref().unwrap().id());
        while !fs::read_to_string(&status).unwrap().contains(") T ") {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_millis(20));
    }

    /// Ends [`Slapd::pause`].
    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// How many lines of the server's log, one or more an operation, have `text`.
    pub fn logged(&self, text: &str) -> usize {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        log.lines().filter(|line| line.contains(text)).count()
    }

    /// How many searches for something like `text` were made.
    pub fn searches(&self, text: &str) -> usize {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        log.lines()
            .filter(|line| line.contains("SRCH base=") && line.contains(text))
            .count()
    }

    /// Changes entries as `who` may.
    pub fn modify(&self, who: &str, password: &str, ldif: &str) -> Output {
        with_input(
            Command::new("ldapmodify").args(["-x", "-H", &self.ldap(), "-D", who, "-w", password]),
            ldif,
        )
    }

    /// Changes entries as the administrator, who may do everything.
    pub fn administer(&self, ldif: &str) {
        let output = self.modify("cn=admin,dc=example,dc=org", "admin-secret", ldif);
        assert!(output.status.success(), "{output:?}");
    }

    fn log(&self) -> PathBuf {
        self.scratch.path().join("log")
    }

    fn signal(&self, signal: Signal) {
        let pid = self.child.as_ref().unwrap().id();
        kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
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
pub struct Authority {
    scratch: Scratch,
}

/// A server certificate for 127.0.0.1, and who signed it.
pub struct Certificate {
    pub authority: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

impl Authority {
    pub fn new() -> Self {
        let scratch = Scratch::new();
        scratch.write("index.txt", "");
        scratch.write(
            "ca.conf",
            &format!(
                "[ca]\ndefault_ca = own\n[own]\ndatabase = {dir}/index.txt\nnew_certs_dir = {dir}\nrand_serial = yes\n\
                 unique_subject = no\ndefault_md = sha256\npolicy = any\nx509_extensions = server\ncertificate = {dir}/ca.pem\n\
                 private_key = {dir}/ca.key\n[any]\ncommonName = supplied\n[server]\nsubjectAltName = IP:127.0.0.1\n",
                dir = scratch.path().display()
            ),
        );
        let authority = Self { scratch };
        authority.openssl("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.pem");
        authority
    }

    pub fn file(&self) -> PathBuf {
        self.scratch.path().join("ca.pem")
    }

    pub fn valid(&self) -> Certificate {
        self.sign("valid", "-days 2")
    }

    pub fn expired(&self) -> Certificate {
        self.sign("expired", "-startdate 20200101000000Z -enddate 20200201000000Z")
    }

    fn sign(&self, name: &str, validity: &str) -> Certificate {
        self.openssl(&format!(
            "req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr"
        ));
        self.openssl(&format!(
            "ca -config ca.conf -batch -notext {validity} -in {name}.csr -out {name}.pem"
        ));
        let file = |suffix: &str| self.scratch.path().join(format!("{name}.{suffix}"));
        Certificate {
            authority: self.file(),
            certificate: file("pem"),
            key: file("key"),
        }
    }

    fn openssl(&self, arguments: &str) {
        succeeds(
            Command::new("openssl")
                .args(arguments.split(' '))
                .current_dir(self.scratch.path()),
        );
    }
}

/// The URI of a Unix socket.
pub fn ldapi(socket: &Path) -> String {
    format!("ldapi://{}", socket.display().to_string().replace('/', "%2F"))
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0))
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

pub fn with_input(command: &mut Command, input: &str) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

pub fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
