//! The Debian package: built, judged by lintian, installed, put before a real Postfix, upgraded under load, removed, purged.
//! In a root directory of its own (an overlay over this machine's), so that nothing of the machine changes.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::process::Server;
use common::smtp::{Client, Reply};
use common::{PATIENCE, Postfix, Sandbox, free_port, require, require_root, wait_until};

/// Stands in for systemctl: does for the one service what systemd would, as its unit says, and writes down what it was
/// asked. The package's scripts call it through deb-systemd-invoke(1).
const SYSTEMCTL: &str = r#"#!/bin/sh
unit=/usr/lib/systemd/system/usermilter.service
pidfile=/run/usermilter.pid log=/run/usermilter.log
setting() { sed -n "s/^$1=//p" $unit; }
running() { [ -s $pidfile ] && [ -d "/proc/$(cat $pidfile)" ] && ! grep -q ') Z' "/proc/$(cat $pidfile)/stat"; }
stop() {
    ! running || kill -TERM "$(cat $pidfile)"
    while running; do sleep 0.05; done
    rm -f $pidfile
}
start() {
    ! running || return 0
    : > $log
    # What RuntimeDirectory= asks for.
    mkdir -p /run/usermilter
    setsid $(setting ExecStart) </dev/null >/dev/null 2>>$log &
    echo $! > $pidfile
    while running && ! grep -qw ready $log; do sleep 0.05; done
    running
}
echo "$*" >> /run/systemctl.log
for word; do
    case $word in
        start | stop) $word ;;
        restart | try-restart) stop; start ;;
        is-active) running ;;
    esac || exit
done
"#;

/// A root directory of its own, with processes of its own, which end with it.
struct PrivateRoot {
    // Dropped first.
    _holder: Server,
    init: u32,
}

impl PrivateRoot {
    fn new(sandbox: &Sandbox) -> Self {
        const HOLD: &str = r#"
            mount -t tmpfs -o mode=755 private "$1"
            mkdir "$1/upper" "$1/work" "$1/root"
            mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" private "$1/root"
            mount -t proc proc "$1/root/proc"
            mount --rbind /dev "$1/root/dev"
            mount -t tmpfs -o mode=755 run "$1/root/run"
            mkdir -p "$1/root/run/systemd/system"
            exec chroot "$1/root" /bin/sh -c 'while :; do sleep 0.2; done'"#;
        let place = sandbox.directory("root");
        let mut unshare = Command::new(require("unshare"));
        unshare.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]);
        unshare.args(["/bin/sh", "-ec", HOLD, "sh"]).arg(place).stdin(Stdio::null()).stdout(Stdio::null());
        let holder = Server::start(&mut unshare);
        let children = format!("/proc/{0}/task/{0}/children", holder.pid());
        let mut init = 0;
        let is_up = wait_until(PATIENCE * 3, || {
            init = fs::read_to_string(&children).unwrap_or_default().trim().parse().unwrap_or(0);
            Path::new(&format!("/proc/{init}/root/run/systemd/system")).is_dir()
        });
        assert!(is_up, "no private root: may root mount file systems here?");
        PrivateRoot { _holder: holder, init }
    }

    fn run(&self, command: &str, arguments: &[&str]) -> Output {
        let mut nsenter = Command::new(require("nsenter"));
        nsenter.args(["--target", &self.init.to_string(), "--mount", "--pid", "--root"]);
        nsenter.args([
            "env",
            "-i",
            "--chdir=/",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL=C",
        ]);
        nsenter.args(["DEBIAN_FRONTEND=noninteractive", command]).args(arguments);
        nsenter.stdin(Stdio::null()).output().unwrap()
    }

    /// A shell script that must succeed; what it writes.
    #[track_caller]
    fn sh(&self, script: &str) -> String {
        let output = self.run("/bin/sh", &["-ec", script]);
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "{}: {script}\n{text}", output.status);
        text
    }

    /// dpkg without triggers: rebuilding the index of all manual pages takes long, and is not ours.
    #[track_caller]
    fn dpkg(&self, action: &str, what: &str) {
        self.sh(&format!("dpkg --no-triggers {action} {what}"));
    }

    fn write(&self, path: &str, text: &str, mode: u32) {
        let path = PathBuf::from(format!("/proc/{}/root{path}", self.init));
        fs::write(&path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// Whatever is called after us in the system's directories.
    fn traces(&self) -> String {
        self.sh("find /etc /usr /var /run -name '*usermilter*' 2>/dev/null | sort; getent passwd usermilter || true")
    }
}

/// Builds packages of the program under test, which is not built anew.
struct Builder {
    stage: PathBuf,
    out: PathBuf,
}

impl Builder {
    fn new(sandbox: &Sandbox) -> Self {
        let stage = sandbox.directory("stage");
        let completions = stage.join("release/completions");
        fs::create_dir_all(&completions).unwrap();
        let program = common::Usermilter::program();
        fs::copy(&program, stage.join("release/usermilter")).unwrap();
        for (shell, file) in [("bash", "usermilter"), ("zsh", "_usermilter"), ("fish", "usermilter.fish")] {
            let output = Command::new(&program).args(["completions", shell]).output().unwrap();
            fs::write(completions.join(file), output.stdout).unwrap();
        }
        Builder { stage, out: sandbox.directory("packages") }
    }

    fn build(&self, version: &str) -> PathBuf {
        let package = self.out.join(format!("usermilter-{version}.deb"));
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
        cargo.args(["deb", "--no-build", "--locked", "--fast", "--deb-version", version, "-o"]).arg(&package);
        let path = std::env::var("PATH").unwrap_or_default();
        let home = std::env::var("HOME").unwrap_or_default();
        cargo.env("CARGO_TARGET_DIR", &self.stage).env("PATH", format!("{path}:{home}/.cargo/bin"));
        let output = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.success(),
            "cargo deb (installed by tests/install-dependencies packaging): {said}"
        );
        assert!(!said.contains("warning"), "{said}");
        package
    }
}

/// One mail to alice: the reply that decides it, be it that to MAIL FROM, RCPT TO or the message.
fn reply_to(port: u16, message: &str) -> Reply {
    // No XCLIENT: without a milter it would be put off as well.
    let mut client = Client::connect(port);
    client.ehlo("mx.sender.example");
    let said = client.send("s@sender.example", &["alice@test.example"], message.as_bytes());
    match said.data {
        Some(reply) => reply,
        None if said.mail.is_success() => said.recipients[0].clone(),
        None => said.mail,
    }
}

/// Sends mail until told to stop, again and again what is put off, as any client does; each is delivered in the end.
fn send_meanwhile(
    port: u16,
    stop: &Arc<AtomicBool>,
    sent: &Arc<AtomicUsize>,
) -> std::thread::JoinHandle<usize> {
    let (stop, sent) = (Arc::clone(stop), Arc::clone(sent));
    std::thread::spawn(move || {
        let mut put_off = 0;
        while !stop.load(Ordering::Relaxed) {
            let number = sent.load(Ordering::Relaxed);
            let message = format!("Subject: number {number}\n\nx\n");
            loop {
                match reply_to(port, &message).code {
                    250 => break,
                    400..500 => put_off += 1,
                    code => panic!("{code}"),
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            sent.fetch_add(1, Ordering::Relaxed);
        }
        put_off
    })
}

#[test]
fn the_debian_package_installs_serves_upgrades_and_leaves_nothing_behind() {
    require_root();
    let sandbox = Sandbox::new();
    let builder = Builder::new(&sandbox);
    let (old, new) = (builder.build("0.1.0-1"), builder.build("0.1.0-2"));
    let lintian = Command::new(require("lintian"))
        .args(["--allow-root", "--fail-on", "error,warning", "--tag-display-limit", "0"])
        .arg(&old)
        .output()
        .unwrap();
    assert!(lintian.status.success(), "{}", String::from_utf8_lossy(&lintian.stdout));

    let root = PrivateRoot::new(&sandbox);
    root.sh("rm -f /usr/bin/systemctl /usr/sbin/policy-rc.d");
    root.write("/usr/bin/systemctl", SYSTEMCTL, 0o755);
    let before = root.traces();
    // Installed where services are not started yet (policy-rc.d), so that it can be configured first.
    root.write("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", 0o755);
    root.dpkg("--install", &old.display().to_string());
    root.sh("rm /usr/sbin/policy-rc.d");
    let installed = root.sh("stat -c '%U %G %a %n' /var/spool/usermilter /etc/usermilter/usermilter.toml; getent passwd usermilter");
    assert!(installed.contains("usermilter usermilter 700 /var/spool/usermilter"), "{installed}");
    assert!(installed.contains("root root 644 /etc/usermilter/usermilter.toml"), "{installed}");
    assert!(installed.contains("/nologin"), "{installed}");
    assert!(
        root.sh("usermilter check").contains("no fault found\n"),
        "neither fault nor warning as it comes"
    );
    for file in [
        "/usr/share/man/man8/usermilter.8.gz",
        "/usr/share/man/man5/usermilter.toml.5.gz",
        "/usr/share/man/man7/usermilter-filter.7.gz",
        "/usr/share/bash-completion/completions/usermilter",
        "/usr/share/zsh/vendor-completions/_usermilter",
        "/usr/share/fish/vendor_completions.d/usermilter.fish",
        "/usr/share/doc/usermilter/copyright",
        "/usr/share/doc/usermilter/changelog.gz",
        "/usr/share/doc/usermilter/examples/postfix/main.cf",
        "/usr/share/doc/usermilter/docs/postmaster.md",
        "/usr/share/doc/usermilter/docs/alerts.yaml",
        "/usr/share/doc/usermilter/docs/grafana.json",
        "/usr/share/doc/usermilter/docs/status.svg",
    ] {
        root.sh(&format!("test -s {file} && dpkg -S {file}"));
    }

    for unit in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/systemd")).unwrap() {
        let unit = unit.unwrap().file_name().into_string().unwrap();
        // Sockets are for whoever wants them.
        let optional = unit.ends_with(".socket");
        let place =
            if optional { "/usr/share/doc/usermilter/examples/systemd" } else { "/usr/lib/systemd/system" };
        root.sh(&format!("test -s {place}/{unit}"));
    }

    // The postmaster's own words in the configuration, and a user with a filter.
    let (milter, policy) = (free_port(), free_port());
    root.sh(&format!(
        "sed -i -e 's|^# milter = .*inet.*|milter = [\"inet:127.0.0.1:{milter}\"]|' \
         -e 's|^# policy = .*inet.*|policy = [\"inet:127.0.0.1:{policy}\"]|' \
         -e 's|^# domains = .*|domains = [\"test.example\"]|' \
         -e 's|^# trusted-networks = .*|trusted-networks = []|' /etc/usermilter/usermilter.toml
         usermilter check
         getent passwd alice || useradd --create-home alice
         su alice -c 'usermilter init && usermilter try </dev/null'"
    ));
    let configuration = root.sh("cat /etc/usermilter/usermilter.toml");
    assert!(configuration.contains(&format!("\nmilter = [\"inet:127.0.0.1:{milter}\"]")), "{configuration}");
    root.sh(
        "home=$(getent passwd alice | cut -d: -f6)
         printf '#!/bin/sh\\ngrep -q \"^Subject: refuse\" || exit 0\\necho 5.7.1 not this\\nexit 77\\n' > $home/.usermilter/message
         systemctl start usermilter.service",
    );

    let postfix = Postfix::builder()
        .milter(format!("inet:127.0.0.1:{milter}"))
        .policy(format!("{{ inet:127.0.0.1:{policy}, timeout=10s, default_action=DUNNO }}"))
        .start();
    let send = |subject: &str| reply_to(postfix.port(), &format!("Subject: {subject}\n\nx\n"));
    assert_eq!(send("first").code, 250);
    let refused = send("refuse me");
    assert_eq!((refused.code, refused.text().as_str()), (550, "5.7.1 not this"));

    // An upgrade while mail comes in: the configuration stays, the daemon is another, nothing is lost or doubled.
    let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let sender = send_meanwhile(postfix.port(), &stop, &sent);
    let pid = root.sh("cat /run/usermilter.pid");
    assert!(wait_until(PATIENCE, || sent.load(Ordering::Relaxed) > 3));
    root.dpkg("--install", &new.display().to_string());
    let seen = sent.load(Ordering::Relaxed);
    assert!(
        wait_until(PATIENCE * 3, || sent.load(Ordering::Relaxed) > seen + 3),
        "no mail after the upgrade"
    );
    stop.store(true, Ordering::Relaxed);
    let put_off = sender.join().unwrap();
    let sent = sent.load(Ordering::Relaxed);
    eprintln!("{sent} messages during the upgrade, {put_off} attempts put off");
    postfix.wait_delivered("alice", 1 + sent, PATIENCE * 3);
    postfix.wait_queue_empty();
    assert_eq!(postfix.maildir("alice").len(), 1 + sent, "each is delivered once");
    assert_eq!(root.sh("cat /etc/usermilter/usermilter.toml"), configuration);
    assert!(root.sh("dpkg-query -W usermilter").contains("0.1.0-2"));
    assert_ne!(root.sh("cat /run/usermilter.pid"), pid);
    let asked = root.sh("cat /run/systemctl.log");
    assert!(asked.contains("restart usermilter.service"), "{asked}");
    assert_eq!(send("refuse me too").code, 550);

    // Removed: no daemon, the configuration stays. Purged: nothing stays.
    root.dpkg("--remove", "usermilter");
    let running = root.sh("ps -e -o user:20,args | grep -e '[u]sermilter serve' -e '^usermilter' || true");
    assert_eq!(running, "", "still running");
    assert_eq!(send("while it is away").code, 451, "put off, not lost");
    root.sh("test -s /etc/usermilter/usermilter.toml");
    root.dpkg("--purge", "usermilter");
    root.sh("rm -f /run/usermilter.pid /run/usermilter.log");
    assert_eq!(root.traces(), before, "left behind");
    assert!(
        root.sh("test ! -e /etc/usermilter; find /home -path '*/.usermilter/message'").contains("message")
    );
}

#[test]
fn make_install_puts_everything_where_it_is_looked_for_and_uninstall_takes_it_away() {
    let sandbox = Sandbox::new();
    let builder = Builder::new(&sandbox);
    let make = |target: &str| {
        let mut make = Command::new(require("make"));
        make.args(["-s", "-C", env!("CARGO_MANIFEST_DIR"), target, "PREFIX=/opt/mail"]);
        make.arg(format!("DESTDIR={}", sandbox.join("dest").display()))
            .env("CARGO_TARGET_DIR", &builder.stage);
        let output = make.env_remove("MAKEFLAGS").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    make("install");
    let prefix = sandbox.join("dest/opt/mail");
    for file in [
        "bin/usermilter",
        "share/man/man8/usermilter.8",
        "share/man/man5/usermilter.toml.5",
        "share/man/man7/usermilter-filter.7",
        "share/bash-completion/completions/usermilter",
        "share/zsh/site-functions/_usermilter",
        "share/fish/vendor_completions.d/usermilter.fish",
        "share/doc/usermilter/examples/usermilter.toml",
        "share/doc/usermilter/examples/postfix/main.cf",
        "lib/sysusers.d/usermilter.conf",
        "lib/tmpfiles.d/usermilter.conf",
    ] {
        assert!(prefix.join(file).is_file(), "no {file}");
    }
    let unit = fs::read_to_string(prefix.join("lib/systemd/system/usermilter.service")).unwrap();
    assert!(unit.contains("\nExecStart=/opt/mail/bin/usermilter serve"), "{unit}");
    make("uninstall");
    let left = Command::new("find").arg(sandbox.join("dest")).args(["-type", "f"]).output().unwrap().stdout;
    assert_eq!(String::from_utf8(left).unwrap(), "");
}
