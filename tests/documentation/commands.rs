//! Commands in documents: a shell reads them, stand-ins for programs take down how they were called, and each call is
//! held against the program that is meant. So nothing is built, installed or started, and yet nothing is taken for good
//! that a shell or a program would refuse.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;

use crate::{read, root};

const USERMILTER: &str = env!("CARGO_BIN_EXE_usermilter");

/// Programs for which the stand-in is called. What is beyond this list is a fault.
const PROGRAMS: [&str; 24] = [
    "usermilter",
    "target/release/usermilter",
    "new/usr/bin/usermilter",
    "make",
    "cargo",
    "tests/fuzz/run",
    "systemctl",
    "postconf",
    "postfix",
    "apt-get",
    "dpkg-deb",
    "useradd",
    "install",
    "haproxy",
    "valgrind",
    "strace",
    "perf",
    "callgrind_annotate",
    "socat",
    "list_members",
    "jq",
    "pkill",
    "m4",
    "su",
];

/// Programs that may do what they do, in a directory of their own.
const HARMLESS: [&str; 9] = ["cat", "chmod", "cp", "cut", "mkdir", "mv", "rm", "tee", "touch"];

const STAND_IN: &str = r#"#!/bin/sh
# In one piece: programs of a pipeline write at the same time.
line=$(printf '%s\037' "${0#"$STAND_INS/"}" "$@")
printf '%s\n' "$line" >> "$RECORD"
"#;

/// Where a shell finds the program, and the usual ones.
pub(crate) fn path_to_usermilter() -> String {
    format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", Path::new(USERMILTER).parent().unwrap().display())
}

/// Checks each command of a script.
///
/// # Errors
///
/// What is wrong with it.
pub(crate) fn check(script: &str) -> Result<(), String> {
    let calls = calls(script)?;
    if calls.is_empty() && !script.contains("mkdir") {
        return Err("it calls nothing".to_owned());
    }
    for call in &calls {
        let words: Vec<&str> = call.iter().map(String::as_str).collect();
        check_call(&words).map_err(|fault| format!("{}: {fault}", words.join(" ")))?;
    }
    let is_for_root = |call: &&Vec<String>| ["useradd", "install"].contains(&call[0].as_str());
    run_in_private_root(&calls.iter().filter(is_for_root).collect::<Vec<_>>())
}

/// What a shell calls when it runs the script.
fn calls(script: &str) -> Result<Vec<Vec<String>>, String> {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    for program in PROGRAMS {
        // By name, or by a path from the top of the sources.
        let path = if program.contains('/') { at("work").join(program) } else { at("bin").join(program) };
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, STAND_IN).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    }
    for program in HARMLESS {
        symlink(format!("/bin/{program}"), at("bin").join(program)).unwrap();
    }
    for name in ["postfix", "sendmail", "packaging", "ldap"] {
        symlink(root().join(name), at("work").join(name)).unwrap();
    }
    for input in ["mail", "some-mail", "spam", "members", "new.toml"] {
        fs::write(at("work").join(input), "a@example.org\n").unwrap();
    }
    for name in ["usermilter", "haproxy", "mail"] {
        fs::create_dir_all(at("etc").join(name)).unwrap();
    }
    for name in [".local/share/bash-completion/completions", ".zfunc", ".config/fish/completions"] {
        fs::create_dir_all(at("work").join(name)).unwrap();
    }
    let etc = at("etc/").display().to_string();
    let output = Command::new("/bin/bash")
        .args(["--norc", "-c"])
        .arg(format!("PATH=$STAND_INS\n{}", script.replace("/etc/", &etc)))
        .env_clear()
        .envs([("STAND_INS", at("bin")), ("RECORD", at("record")), ("HOME", at("work"))])
        .envs([("USER", "alice"), ("LC_ALL", "C")])
        .current_dir(at("work"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    if !output.stderr.is_empty() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let record = fs::read_to_string(at("record")).unwrap_or_default();
    let words =
        |line: &str| line.split_terminator('\u{1f}').map(|word| word.replace(&etc, "/etc/")).collect();
    Ok(record.split_terminator("\u{1f}\n").map(words).collect())
}

fn check_call(call: &[&str]) -> Result<(), String> {
    let (&program, arguments) = call.split_first().unwrap();
    let known = |is: bool, what: &str| if is { Ok(()) } else { Err(format!("no such {what}")) };
    match program.rsplit('/').next().unwrap() {
        "usermilter" if arguments.first() == Some(&"help") => succeeds(USERMILTER, arguments),
        // What comes before is read first, and has to be right.
        "usermilter" => succeeds(USERMILTER, &[arguments, &["--help"]].concat()),
        "make" => arguments.iter().try_for_each(|word| match word.split_once('=') {
            Some((variable, _)) => known(read("Makefile").contains(&format!("$({variable})")), "variable"),
            None => known(read("Makefile").contains(&format!("\n{word}:")), "target"),
        }),
        "cargo" => check_cargo(arguments),
        "run" => arguments.iter().try_for_each(|name| {
            known(root().join(format!("tests/fuzz/targets/{name}.rs")).exists(), "fuzz target")
        }),
        "systemctl" => match arguments {
            ["start" | "stop" | "restart" | "reload" | "enable" | "edit" | "status", units @ ..] => units
                .iter()
                .filter(|unit| **unit != "haproxy")
                .map(|unit| if unit.contains('.') { (*unit).to_owned() } else { format!("{unit}.service") })
                .try_for_each(|unit| known(root().join("packaging/systemd").join(unit).exists(), "unit")),
            _ => Err("no such command".to_owned()),
        },
        "postconf" => {
            let output = run("postconf", &[&["-d"], arguments].concat())?;
            known(output.stderr.is_empty(), "parameter")
        }
        "postfix" => known(matches!(arguments, ["reload" | "check" | "status"]), "command"),
        "apt-get" => {
            let lists = read("tests/install-dependencies") + &read("tests/scaling.rs");
            let package = |name: &&str| {
                name.starts_with("./")
                    || *name == "--allow-downgrades"
                    || *name == "usermilter"
                    || lists.split(|c: char| !c.is_alphanumeric() && c != '-').any(|word| word == *name)
            };
            known(
                matches!(arguments, ["install" | "remove" | "purge", rest @ ..] if rest.iter().all(package)),
                "package",
            )
        }
        "valgrind" | "strace" => {
            let end = arguments.iter().position(|word| word.ends_with("usermilter")).ok_or("of what?")?;
            check_call(&arguments[end..])?;
            succeeds(program, &[&arguments[..end], &["true"]].concat())
        }
        "callgrind_annotate" => {
            let output = run(program, &["--help"])?;
            let help = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            let mut options = arguments.iter().filter_map(|word| word.strip_prefix("--")?.split('=').next());
            known(options.all(|option| help.contains(&format!("--{option}"))), "option")
        }
        "haproxy" => known(matches!(arguments, ["-c", "-f", _] | ["-f", ..]), "option"),
        // Run for what they do to the system, in `run_in_private_root`.
        "useradd" | "install" => Ok(()),
        // The oldest of that name is the monitor.
        "pkill" => known(arguments == ["-HUP", "-o", "usermilter"], "process"),
        "dpkg-deb" => known(matches!(arguments, ["-x", _, _]), "option"),
        // As Sendmail's configuration is made there.
        "m4" => match arguments {
            ["-D_CF_DIR_=/usr/share/sendmail/cf/", _] => known(
                read("tests/common/sendmail.rs")
                    .contains(r#""-D_CF_DIR_={}/", unpacked().join("usr/share/sendmail/cf")"#),
                "way",
            ),
            _ => Err("no such option".to_owned()),
        },
        "su" => match arguments {
            ["-s", "/bin/sh", "-c", script, _] => check(script),
            _ => Err("no such option".to_owned()),
        },
        // Not installed by the tests: it belongs to the kernel that runs.
        "perf" => known(matches!(arguments, ["record" | "report", ..]), "command"),
        // HAProxy's socket, which tests/scaling.rs asks by itself; Mailman; and what reads our JSON.
        "socat" | "list_members" | "jq" => Ok(()),
        _ => Err("nobody knows this program".to_owned()),
    }
}

fn check_cargo(arguments: &[&str]) -> Result<(), String> {
    match arguments {
        ["install", tool] => match read("tests/install-dependencies").contains(tool) {
            true => Ok(()),
            false => Err("the tests install no such tool".to_owned()),
        },
        ["test" | "bench", rest @ ..] => {
            for pair in rest.windows(2).filter(|pair| pair[0] == "--test") {
                let name = pair[1];
                let places = [format!("tests/{name}.rs"), format!("tests/{name}/main.rs")];
                if !places.iter().any(|place| root().join(place).exists()) {
                    return Err(format!("no test {name}"));
                }
            }
            Ok(())
        }
        ["check" | "fmt" | "clippy", ..] => Ok(()),
        _ => Err("no such command".to_owned()),
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<Output, String> {
    static EMPTY: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().unwrap());
    let mut command = Command::new(program);
    command.args(arguments).env("PATH", path_to_usermilter()).current_dir(EMPTY.path()).stdin(Stdio::null());
    command.output().map_err(|error| format!("{program}: {error}"))
}

fn succeeds(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = run(program, arguments)?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// Runs what makes users and directories, for real, but over copies of /etc and /var/spool that nobody else sees.
fn run_in_private_root(calls: &[&Vec<String>]) -> Result<(), String> {
    const PREPARE: &str = r#"
        mount -t tmpfs -o mode=755 private "$1"
        mkdir "$1/etc" "$1/work"
        mount -t overlay -o "lowerdir=/etc,upperdir=$1/etc,workdir=$1/work" private /etc
        mount -t tmpfs -o mode=755 spool /var/spool
        if id usermilter 2>/dev/null; then userdel --force usermilter; fi >&2
    "#;
    if calls.is_empty() {
        return Ok(());
    }
    let quoted = |word: &String| format!("'{}'", word.replace('\'', r"'\''"));
    let lines = calls.iter().map(|call| call.iter().map(quoted).collect::<Vec<_>>().join(" "));
    let script = format!("{PREPARE}\n{}", lines.collect::<Vec<_>>().join("\n"));
    let place = tempfile::tempdir().unwrap();
    let place = place.path().to_str().unwrap();
    succeeds("unshare", &["--mount", "--propagation", "private", "/bin/sh", "-euc", &script, "sh", place])
}
