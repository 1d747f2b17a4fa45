//! `usermilter try` gives a filter byte for byte what the daemon gives it, for a mail that really came through Postfix.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::site::{MAIL_MACROS, send_message};
use common::smtp::Client;
use common::{
    PATIENCE, Postfix, Sandbox, Site, SystemUser, Usermilter, VirtualUsers, require, require_root, wait_until,
};

/// Writes down everything that a filter can find out about how it was started, before it starts anything itself.
const WITNESS: &str = r#"#!/usr/bin/perl
my ($seen, %seen) = "$ENV{HOME}/seen-$ENV{USERMILTER_PHASE}";
sub slurp { local $/; open my $file, '<', $_[0] or return "$_[0]: $!"; binmode $file; <$file> }
$seen{position} = join '', grep { !/^(mnt_id|ino)/ } split /^/, slurp('/proc/self/fdinfo/0');
opendir my $own, '/proc/self/fd';
for (sort grep { /^[0-9]/ } readdir $own) {
    my $to = readlink "/proc/self/fd/$_";
    $seen{descriptors} .= sprintf "%s %o %s\n", $_, (lstat "/proc/self/fd/$_")[2], $to =~ s{^(pipe|/proc).*}{$1}r;
}
$seen{$_} = slurp("/proc/self/$_") for qw(environ cmdline limits);
$seen{$_} = readlink "/proc/self/$_" for qw(cwd exe root);
$seen{status} = join '', grep { /^(Umask|[UG]id|Groups|Sig|ShdPnd|NoNew|Cap|Seccomp|Cpus)/ } split /^/, slurp('/proc/self/status');
my (undef, $parent, $group, $session, $terminal) = split ' ', slurp('/proc/self/stat') =~ s/.*\)//r;
$seen{session} = join ' ', $group == $$, $session == $$, $terminal, getpriority(0, 0);
$seen{stdin} = do { local $/; binmode STDIN; <STDIN> };
mkdir "$seen.new" or die;
for (keys %seen) {
    open my $file, '>', "$seen.new/$_" or die;
    binmode $file;
    print $file $seen{$_};
}
rename "$seen.new", $seen;
print "5.7.1 seen\n";
exit 77;
"#;

/// Long and folded fields, bytes beyond ASCII, spaces that matter, dots, an attachment's long lines, and no last line end.
fn message() -> Vec<u8> {
    let mut text = b"Received: from a.example (a.example [192.0.2.1])\n\tby b.example with ESMTP id 1;\n\tFri, 20 Nov 2026 10:00:00 +0000\n\
        From: Sender <s@sender.example>\nTo: somebody@host.test.example\nSubject:no space\n  folded with \xc3\xa4\nX-Empty:\n\
        X-Spaces:  two, and at the end  \nDate: Fri, 20 Nov 2026 10:00:00 +0000\nMessage-Id: <1@sender.example>\n\n\
        .dot\n..dots\n\n caf\xe9\n"
        .to_vec();
    text.extend([b'x'; 900]);
    text.extend(b"\nthe end");
    text
}

struct Scene {
    user: SystemUser,
    site: Site,
    message: PathBuf,
}

impl Scene {
    fn new() -> Self {
        require_root();
        let builder = Site::of(&[]);
        let user = SystemUser::create(&builder.sandbox, "tries");
        user.filter("message", WITNESS);
        user.filter("recipient", WITNESS.replace("exit 77", "exit 0"));
        let message = builder.sandbox.write("mail", message());
        let site = builder
            .set("recipients", "domains", r#"["host.test.example"]"#)
            .set("recipients", "judge-authenticated", "true")
            .resolvers("[[resolver]]\ntype = \"passwd\"\n")
            .start();
        Scene { user, site, message }
    }

    /// What a witness has written.
    #[track_caller]
    fn witnessed(&self, phase: &str) -> BTreeMap<String, Vec<u8>> {
        let directory = self.user.home.join(format!("seen-{phase}"));
        assert!(wait_until(PATIENCE, || directory.exists()), "the {phase} filter was not run");
        let entries = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path());
        entries.map(|path| (name_of(&path), fs::read(&path).unwrap())).collect()
    }

    /// The same, which is then gone.
    #[track_caller]
    fn seen(&self, phase: &str) -> BTreeMap<String, Vec<u8>> {
        let seen = self.witnessed(phase);
        fs::remove_dir_all(self.user.home.join(format!("seen-{phase}"))).unwrap();
        seen
    }

    /// The arguments of a `try` for the mail that the daemon's filter has seen.
    fn arguments(&self, phase: &str, seen: &BTreeMap<String, Vec<u8>>) -> Vec<String> {
        let variables = variables(&seen["environ"]);
        let mut arguments: Vec<String> =
            ["try", "--phase", phase, "--host", "mx.test.example", "--config"].map(String::from).into();
        arguments.push(self.site.daemon.config_path().display().to_string());
        for (option, variable) in
            [("sender", "SENDER"), ("client", "CLIENT_ADDRESS"), ("helo", "CLIENT_HELO")]
        {
            arguments.extend([format!("--{option}"), variables[variable].clone()]);
        }
        let others = variables["USERMILTER_RECIPIENTS"].lines().skip(1);
        for recipient in [&*variables["RECIPIENT"]].into_iter().chain(others) {
            arguments.extend(["--recipient".into(), recipient.to_owned()]);
        }
        let told = [
            "ORIGINAL_RECIPIENT",
            "CLIENT_HOSTNAME",
            "CLIENT_PROTOCOL",
            "USERMILTER_QUEUE_ID",
            "USERMILTER_SIZE",
            "USERMILTER_SMTPUTF8",
        ];
        let login = ["SASL_USERNAME", "SASL_METHOD", "SASL_SENDER", "USERMILTER_TLS"];
        for variable in told.iter().chain(login.iter().filter(|variable| !variables[**variable].is_empty())) {
            arguments.extend(["--set".into(), format!("{variable}={}", variables[*variable])]);
        }
        if let Some(date) = received_date(&seen["stdin"]) {
            arguments.extend(["--date".into(), date]);
        }
        arguments
    }

    /// The same mail once more, by `usermilter try`: as root for the user, and as the user.
    #[track_caller]
    fn compare(&self, phase: &str, status: i32) {
        let by_daemon = self.seen(phase);
        let arguments = self.arguments(phase, &by_daemon);
        let mut as_root = Command::new(Usermilter::program());
        as_root.args(&arguments).args(["--user", &self.user.name]);
        // A copy that everybody may execute, wherever the build directory is.
        let program = self.site.sandbox.join("usermilter");
        fs::copy(Usermilter::program(), &program).unwrap();
        let mut as_user = Command::new(require("runuser"));
        as_user.args(["-u", &self.user.name, "--"]).arg(&program).args(&arguments);
        for (who, command) in [("root", &mut as_root), ("the user", &mut as_user)] {
            let output = run(command, &self.message);
            assert_eq!(output.status.code(), Some(status), "as {who}: {output:?}");
            assert_same(who, &by_daemon, &self.seen(phase));
        }
    }
}

fn run(command: &mut Command, input: &Path) -> Output {
    command.stdin(fs::File::open(input).unwrap()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.current_dir("/").output().unwrap()
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

fn variables(environment: &[u8]) -> BTreeMap<String, String> {
    let text = String::from_utf8_lossy(environment);
    text.split_terminator('\0').filter_map(|v| v.split_once('=')).map(|(n, v)| (n.into(), v.into())).collect()
}

/// The date in the field on top that the daemon has written.
fn received_date(stdin: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(stdin);
    let line = text.lines().find(|line| line.contains("(usermilter)"))?;
    text.split_once(line)?.1.lines().nth(1).map(|date| date.trim().to_owned())
}

#[track_caller]
fn assert_same(who: &str, by_daemon: &BTreeMap<String, Vec<u8>>, by_try: &BTreeMap<String, Vec<u8>>) {
    assert!(by_daemon.len() > 9, "{:?}", by_daemon.keys());
    for (name, expected) in by_daemon {
        // At RCPT TO the time left is told, which passes.
        let comparable = |bytes: &Vec<u8>| {
            let mut text = String::from_utf8_lossy(bytes).into_owned();
            // The daemon takes from what a setuid program could get what no such program has a use for. Only root can.
            if who != "root" {
                let bounding = text.lines().find(|line| line.starts_with("CapBnd:")).map(str::to_owned);
                text = bounding.map_or_else(|| text.clone(), |line| text.replace(&line, ""));
            }
            if text.contains("USERMILTER_PHASE=recipient\0") {
                for seconds in 15..25 {
                    text = text.replace(&format!("USERMILTER_DEADLINE={seconds}"), "USERMILTER_DEADLINE=24");
                }
            }
            text
        };
        assert_eq!(comparable(expected), comparable(&by_try[name]), "{name}, tried by {who}");
        if name == "stdin" {
            assert_eq!(expected, &by_try[name], "standard input, tried by {who}");
        }
    }
    assert_eq!(by_daemon.len(), by_try.len());
}

#[test]
fn a_filter_gets_from_try_byte_for_byte_what_it_gets_from_the_daemon() {
    let scene = Scene::new();
    let postfix =
        Postfix::builder().milter(scene.site.milter_address()).local_domain("host.test.example").start();
    let name = &scene.user.name;
    let address = |extension: &str| format!("{}{extension}@Host.test.example", name.to_uppercase());
    let mut client = Client::connect_as(postfix.port(), "192.0.2.10", "mx.sender.example");
    client.mail_from("s+tag@sender.example", "SIZE=1400");
    assert!(client.rcpt_to(&address("+Shop")).is_success());
    scene.compare("recipient", 0);
    assert!(client.rcpt_to(&address("")).is_success());
    scene.compare("recipient", 0);
    let reply = client.data(&message());
    assert_eq!((reply.code, reply.text().as_str()), (550, "5.7.1 seen"));
    scene.compare("message", 77);
}

#[test]
fn so_it_is_for_a_bounce_from_a_client_without_a_name() {
    let scene = Scene::new();
    let postfix =
        Postfix::builder().milter(scene.site.milter_address()).local_domain("host.test.example").start();
    let mut client = Client::connect(postfix.port());
    client.ehlo("x");
    assert_eq!(client.xclient(&[("NAME", "[UNAVAILABLE]"), ("ADDR", "192.0.2.77")]).code, 220);
    client.ehlo("[192.0.2.77]");
    client.mail_from("", "SMTPUTF8");
    assert!(client.rcpt_to(&format!("{}@host.test.example", scene.user.name)).is_success());
    scene.compare("recipient", 0);
    assert_eq!(client.data(&message()).code, 550);
    scene.compare("message", 77);
}

#[test]
fn so_it_is_for_a_client_that_has_logged_in() {
    let scene = Scene::new();
    let mut mta = scene.site.mta();
    let login =
        [("{auth_type}", "PLAIN"), ("{auth_authen}", "anna"), ("{auth_author}", "anna@sender.example")];
    mta.macros('M', &[MAIL_MACROS, &[("{tls_version}", "TLSv1.3")], &login].concat());
    mta.mail(&["<s@sender.example>"]);
    let address = format!("{}@host.test.example", scene.user.name);
    mta.macros('R', &[("i", "4QUEUEID"), ("{rcpt_addr}", &address), ("{rcpt_mailer}", "local")]);
    assert_eq!(mta.rcpt(&[&format!("<{address}>")]).letter(), 'c');
    let witnessed = variables(&scene.witnessed("recipient")["environ"]);
    let login = ["SASL_USERNAME", "SASL_METHOD", "SASL_SENDER", "USERMILTER_TLS", "USERMILTER_QUEUE_ID"];
    let told = login.map(|variable| witnessed[variable].clone());
    assert_eq!(told, ["anna", "PLAIN", "anna@sender.example", "TLSv1.3", "4QUEUEID"]);
    scene.compare("recipient", 0);
    assert_eq!(send_message(&mut mta, &[message(), b"\n".to_vec()].concat()).letter(), 'y');
    scene.compare("message", 77);
}

#[test]
fn so_it_is_for_a_message_that_is_too_large_for_memory() {
    let scene = Scene::new();
    let large = [message(), b"\n0123456789abcdef".repeat(100_000)].concat();
    fs::write(&scene.message, &large).unwrap();
    let postfix =
        Postfix::builder().milter(scene.site.milter_address()).local_domain("host.test.example").start();
    let mut client = Client::connect_as(postfix.port(), "192.0.2.10", "mx.sender.example");
    client.mail_from("s@sender.example", "");
    assert!(client.rcpt_to(&format!("{}@host.test.example", scene.user.name)).is_success());
    fs::remove_dir_all(scene.user.home.join("seen-recipient")).unwrap();
    assert_eq!(client.data(&large).code, 550);
    let mut by_daemon = scene.seen("message");
    assert!(by_daemon["stdin"].len() > 1_600_000);
    let arguments = scene.arguments("message", &by_daemon);
    let program = scene.site.sandbox.join("usermilter");
    fs::copy(Usermilter::program(), &program).unwrap();
    let mut command = Command::new(require("runuser"));
    let output =
        run(command.args(["-u", &scene.user.name, "--"]).arg(&program).args(&arguments), &scene.message);
    assert_eq!(output.status.code(), Some(77), "{output:?}");
    let mut by_try = scene.seen("message");
    // A file without a name, in the spool directory there, in /tmp here.
    for seen in [&mut by_daemon, &mut by_try] {
        let descriptors = String::from_utf8(seen.remove("descriptors").unwrap()).unwrap();
        assert!(descriptors.starts_with("0 120500 /") && descriptors.contains("(deleted)"), "{descriptors}");
    }
    by_daemon.insert("descriptors".into(), Vec::new());
    by_try.insert("descriptors".into(), Vec::new());
    assert_same("the user", &by_daemon, &by_try);
}

#[test]
fn a_user_tries_without_what_only_the_daemon_may_read() {
    require_root();
    let sandbox = Sandbox::new();
    let user = SystemUser::create(&sandbox, "private");
    user.filter("message", "#!/bin/sh\necho '5.7.1 no'\nexit 77\n");
    let secret = sandbox.write("password", "geheim\n");
    let rules =
        sandbox.write("site-rules.toml", "[[rule]]\nsender = [\"x@sender.example\"]\naction = \"reject\"\n");
    for file in [&secret, &rules] {
        fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    }
    let config = sandbox.write(
        "usermilter.toml",
        format!(
            "[recipients]\nrules = \"{}\"\n[filter]\nmax-message = \"1M\"\n[[resolver]]\ntype = \"ldap\"\nuri = [\"ldaps://127.0.0.1:1\"]\n\
             bind-dn = \"cn=x\"\npassword-file = \"{}\"\nbase = \"dc=x\"\nfilter = \"(mail=%s)\"\n[[resolver]]\ntype = \"passwd\"\n",
            rules.display(),
            secret.display()
        ),
    );
    let program = sandbox.join("usermilter");
    fs::copy(Usermilter::program(), &program).unwrap();
    let attempt = |input: &[u8]| {
        let mail = sandbox.write("mail", input);
        let mut command = Command::new(require("runuser"));
        command.args(["-u", &user.name, "--"]).arg(&program).args(["try", "--config"]).arg(&config);
        run(&mut command, &mail)
    };
    let output = attempt(b"Subject: x\n\nx\n");
    assert_eq!(output.status.code(), Some(77), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("done without") && !said.contains("geheim"), "{said}");
    let output = attempt(&[b"Subject: x\n\n".to_vec(), vec![b'x'; 2 << 20]].concat());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("larger than filter.max-message"), "{said}");
}

#[test]
fn root_is_told_which_user_is_missing_and_how_to_make_one() {
    require_root();
    let sandbox = Sandbox::new();
    let users = VirtualUsers::new(&sandbox, &[("alice", 5001)]);
    let config = sandbox.write(
        "usermilter.toml",
        format!(
            "[server]\nuser = \"no-such-user\"\n[[resolver]]\ntype = \"passwd-file\"\npath = \"{}\"\n",
            users.passwd_file().display()
        ),
    );
    for arguments in [&["try", "--user", "alice"][..], &["resolve", "alice@localhost"]] {
        let mut command = Command::new(Usermilter::program());
        let mut child = command
            .args(arguments)
            .arg("--config")
            .arg(&config)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let _ = child.stdin.take().unwrap().write_all(b"Subject: x\n\n");
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(78), "{said}");
        assert!(said.contains("useradd --system") && said.contains("no-such-user"), "{said}");
    }
}
