//! The files of `ldap/` and the commands of `docs/ldap.md` do what they say.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::unistd::{getgid, getuid};
use usermilter::{
    config::{Config, ResolverConfig},
    resolver::ldap::{LdapAnswer, LdapResolver},
};

use crate::{
    DAEMON, DAEMON_PASSWORD, PEOPLE, ask, forgetful, found,
    slapd::{Scratch, Setup, Slapd, free_port, ldapi, succeeds, wait_until_ready, with_input},
};

/// Adds a value to an attribute of alice, as somebody; whether that was allowed.
fn may_add(slapd: &Slapd, who: &str, password: &str, change: &str) -> bool {
    let ldif = format!("dn: uid=alice,{PEOPLE}\nchangetype: modify\n{change}\n");
    let output = slapd.modify(who, password, &ldif);
    match output.status.code() {
        Some(0) => true,
        // insufficientAccessRights
        Some(50) => false,
        _ => panic!("{output:?}"),
    }
}

#[tokio::test]
async fn users_write_their_own_lists_and_nothing_else_that_usermilter_reads() {
    let slapd = Slapd::start(&Setup::default());
    let alice = format!("uid=alice,{PEOPLE}");
    let bob = format!("uid=bob,{PEOPLE}");
    for (attribute, value) in
        [("usermilterAcceptSender", "a@x.example"), ("usermilterRejectSender", "r@x.example")]
    {
        let add = format!("add: {attribute}\n{attribute}: {value}");
        assert!(!may_add(&slapd, &bob, "bob-secret", &add), "{attribute} by another user");
        assert!(!may_add(&slapd, DAEMON, DAEMON_PASSWORD, &add), "{attribute} by the daemon");
        assert!(may_add(&slapd, &alice, "alice-secret", &add), "{attribute}");
    }
    for (attribute, value) in [
        ("usermilterFilter", "own"),
        ("uidNumber", "5999"),
        ("gidNumber", "5999"),
        ("homeDirectory", "/root"),
        ("mail", "postmaster@example.org"),
        ("uid", "root"),
        ("objectClass", "nisMailAlias"),
    ] {
        let replace = format!("replace: {attribute}\n{attribute}: {value}");
        assert!(!may_add(&slapd, &alice, "alice-secret", &replace), "{attribute} by herself");
    }
    let entry = found(&forgetful(&slapd), "alice@example.org").await;
    assert_eq!(entry.accept_senders, ["a@x.example", "friend@spam.example"]);
    assert_eq!(entry.reject_senders, ["*@spam.example", "r@x.example"]);
}

#[test]
fn users_do_not_see_each_others_lists_and_the_daemon_sees_no_passwords() {
    let slapd = Slapd::start(&Setup::default());
    let search = |who: &str, password: &str| {
        let output = Command::new("ldapsearch")
            .args(["-LLL", "-x", "-H", &slapd.ldap(), "-D", who, "-w", password])
            .args(["-b", &format!("uid=alice,{PEOPLE}"), "-s", "base"])
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(!search(&format!("uid=bob,{PEOPLE}"), "bob-secret").contains("usermilter"));
    let daemon = search(DAEMON, DAEMON_PASSWORD);
    assert!(daemon.contains("usermilterRejectSender") && !daemon.contains("userPassword"));
}

/// A slapd that keeps its configuration in itself, as Debian's does.
struct Configured {
    // First, for fields are dropped in order.
    _slapd: Background,
    scratch: Scratch,
    port: u16,
}

impl Configured {
    fn start() -> Self {
        let scratch = Scratch::new();
        let (db, config) = (scratch.path().join("db"), scratch.path().join("config"));
        fs::create_dir(&db).unwrap();
        fs::create_dir(&config).unwrap();
        let schema = ["core", "cosine", "inetorgperson", "nis", "misc"]
            .map(|name| format!("include: file:///etc/ldap/schema/{name}.ldif\n"))
            .concat();
        let administrator =
            format!("gidNumber={}+uidNumber={},cn=peercred,cn=external,cn=auth", getgid(), getuid());
        let ldif = format!(
            "dn: cn=config\nobjectClass: olcGlobal\ncn: config\nolcPidFile: {dir}/slapd.pid\n\n\
             dn: cn=module{{0}},cn=config\nobjectClass: olcModuleList\ncn: module{{0}}\nolcModulePath: /usr/lib/ldap\nolcModuleLoad: back_mdb\n\n\
             dn: cn=schema,cn=config\nobjectClass: olcSchemaConfig\ncn: schema\n\n\
             {schema}\n\
             dn: olcDatabase={{0}}config,cn=config\nobjectClass: olcDatabaseConfig\nolcDatabase: {{0}}config\n\
             olcAccess: {{0}}to * by dn.exact={administrator} manage by * break\n\n\
             dn: olcDatabase={{1}}mdb,cn=config\nobjectClass: olcDatabaseConfig\nobjectClass: olcMdbConfig\nolcDatabase: {{1}}mdb\n\
             olcSuffix: dc=example,dc=org\nolcDbDirectory: {db}\nolcRootDN: cn=admin,dc=example,dc=org\nolcRootPW: admin-secret\n\
             olcAccess: {{0}}to attrs=userPassword by self write by anonymous auth by * none\n\
             olcAccess: {{1}}to * by * read\n\
             olcDbIndex: objectClass eq\nolcDbIndex: cn,uid eq\n",
            dir = scratch.path().display(),
            db = db.display(),
        );
        let file = scratch.write("config.ldif", &ldif);
        succeeds(Command::new("/usr/sbin/slapadd").args(["-n", "0", "-F"]).arg(&config).arg("-l").arg(file));
        let slapd = Self { _slapd: Background(scratch.path().join("slapd.pid")), port: free_port(), scratch };
        succeeds(
            Command::new("/usr/sbin/slapd")
                .arg("-F")
                .arg(config)
                .args(["-h", &format!("{} {}", slapd.uri(), slapd.ldapi())])
                .stdin(Stdio::null()),
        );
        // It goes into the background before it listens.
        wait_until_ready(slapd.port, || ());
        slapd.add(
            "dn: dc=example,dc=org\nobjectClass: dcObject\nobjectClass: organization\ndc: example\no: Example\n\n\
             dn: ou=people,dc=example,dc=org\nobjectClass: organizationalUnit\nou: people\n\n\
             dn: ou=services,dc=example,dc=org\nobjectClass: organizationalUnit\nou: services\n\n\
             dn: cn=usermilter,ou=services,dc=example,dc=org\nobjectClass: organizationalRole\nobjectClass: simpleSecurityObject\n\
             cn: usermilter\nuserPassword: daemon-secret\n\n\
             dn: uid=zoe,ou=people,dc=example,dc=org\nobjectClass: inetOrgPerson\nuid: zoe\ncn: zoe\nsn: zoe\n\
             mail: zoe@example.org\nuserPassword: zoe-secret\n\n",
        );
        slapd
    }

    fn uri(&self) -> String {
        format!("ldap://127.0.0.1:{}", self.port)
    }

    fn ldapi(&self) -> String {
        ldapi(&self.scratch.path().join("s"))
    }

    fn add(&self, ldif: &str) {
        let output = with_input(
            Command::new("ldapadd")
                .args(["-x", "-H", &self.uri(), "-w", "admin-secret"])
                .args(["-D", "cn=admin,dc=example,dc=org"]),
            ldif,
        );
        assert!(output.status.success(), "{output:?}");
    }
}

/// A slapd in the background, which has written its pid to a file; ended when dropped.
struct Background(PathBuf);

impl Background {
    /// Waits for the end: slapd removes the file when it is done.
    fn wait(&self) {
        let start = Instant::now();
        while self.0.exists() {
            assert!(start.elapsed() < Duration::from_secs(10), "slapd does not end");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Ok(pid) = fs::read_to_string(&self.0) {
            let _ = Command::new("kill").arg(pid.trim()).status();
            if !thread::panicking() {
                self.wait();
            }
        }
    }
}

/// The commands of the page under a heading, as one script. Those of usermilter are among them if we are root: they
/// look at users with uids of their own.
fn commands(heading: &str) -> String {
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/ldap.md")).unwrap();
    let section = page.split("\n## ").find(|text| text.starts_with(heading)).unwrap();
    let blocks = section.split("```sh\n").skip(1).map(|block| block.split("```").next().unwrap());
    let blocks: Vec<&str> =
        blocks.filter(|block| getuid().is_root() || !block.starts_with("usermilter ")).collect();
    assert!(!blocks.is_empty());
    blocks.concat()
}

fn run(script: &str, variables: &[(&str, &str)]) {
    // bash, for -e to heed "! command" nowhere but where it says so: each of those is checked here.
    let script = script.replace("\n! ", "\nif_fails ");
    let ours = Path::new(env!("CARGO_BIN_EXE_usermilter")).parent().unwrap().display().to_string();
    let output = Command::new("bash")
        .args(["-euc"])
        .arg(format!(
            "if_fails() {{ if \"$@\"; then echo \"should have failed: $*\" >&2; exit 1; fi; }}\n{script}"
        ))
        .env("PATH", format!("{ours}:{}", std::env::var("PATH").unwrap()))
        .envs(variables.iter().copied())
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

fn resolver_of(file: &Path) -> LdapResolver {
    let config = Config::load(Some(file)).unwrap();
    match config.resolvers.into_iter().next() {
        Some(ResolverConfig::Ldap(mut config)) => {
            config.load_secrets().unwrap();
            LdapResolver::new(*config)
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_page_leads_from_an_empty_slapd_to_a_user_with_rules() {
    let scratch = Scratch::new();
    let port = free_port().to_string();
    let dir = scratch.path().display().to_string();
    let slapd = Background(scratch.path().join("slapd.pid"));
    let script = commands("From an empty slapd");
    let (work, stop) = script.split_once("kill ").unwrap();
    run(work, &[("dir", &dir), ("port", &port), ("user", "nobody")]);

    let resolver = resolver_of(&scratch.path().join("usermilter.toml"));
    let alice = found(&resolver, "alice@example.org").await;
    assert_eq!(alice.reject_senders, ["*@offers.example", "*@spam.example"]);
    assert!(matches!(
        ask(&resolver, "team@example.org").await,
        Ok(LdapAnswer::Forward(targets)) if targets.len() == 2
    ));

    run(&format!("kill {stop}"), &[("dir", &dir)]);
    slapd.wait();
}

#[tokio::test]
async fn the_page_adds_usermilter_to_a_directory_that_postfix_asks() {
    let slapd = Configured::start();
    let dir = slapd.scratch.path().display().to_string();
    run(&commands("Beside Postfix"), &[("dir", &dir), ("uri", &slapd.uri()), ("ldapi", &slapd.ldapi())]);
    let resolver = resolver_of(&slapd.scratch.path().join("beside.toml"));
    let zoe = found(&resolver, "zoe@example.org").await;
    assert_eq!(zoe.user.name.as_str(), "zoe@example.org");
    assert_eq!(zoe.reject_senders, ["*@offers.example"]);

    // Where there is a Postfix with LDAP, its table gives the same answer.
    let types = Command::new("/usr/sbin/postconf").arg("-m").output();
    if types.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("ldap")) {
        let table = format!("ldap:{dir}/users.cf");
        let answer = succeeds(Command::new("/usr/sbin/postmap").args(["-q", "zoe@example.org", &table]));
        assert_eq!(answer.trim(), "zoe@example.org");
    }
}

#[test]
fn the_two_forms_of_the_schema_are_one() {
    let read = |name: &str| {
        let path = format!("{}/ldap/{name}", env!("CARGO_MANIFEST_DIR"));
        let text = fs::read_to_string(path).unwrap();
        text.lines()
            .filter(|line| !line.starts_with('#'))
            .flat_map(str::split_whitespace)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let ldif: Vec<String> = read("usermilter.ldif")
        .into_iter()
        .skip_while(|word| word != "olcObjectIdentifier:")
        .map(|word| match word.as_str() {
            "olcObjectIdentifier:" => "objectidentifier".into(),
            "olcAttributeTypes:" => "attributetype".into(),
            "olcObjectClasses:" => "objectclass".into(),
            _ => word,
        })
        .collect();
    assert_eq!(ldif, read("usermilter.schema"));
}
