//! `usermilter check`: where each fault is and what may have been meant, and what will bite.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use common::{Sandbox, Usermilter, require, require_root};
use serde_json::Value;

/// Exit status and JSON report about a configuration, as root.
fn check(sandbox: &Sandbox, text: &str) -> (i32, Value) {
    let config = sandbox.write("usermilter.toml", text);
    let output = Command::new(Usermilter::program())
        .args(["check", "--json", "--config"])
        .arg(&config)
        .output()
        .unwrap();
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    (output.status.code().unwrap(), report)
}

/// A configuration with nothing to warn of.
fn sound(sandbox: &Sandbox) -> String {
    let spool = sandbox.directory("spool");
    fs::set_permissions(&spool, fs::Permissions::from_mode(0o777)).unwrap();
    format!("[server]\nuser = \"nobody\"\n[filter]\nspool-directory = \"{}\"\n", spool.display())
}

/// The one warning about a key, as `line: message`; panics if there is none.
#[track_caller]
fn warning(report: &Value, key: &str) -> String {
    let warnings = report["warnings"].as_array().unwrap();
    let found = warnings.iter().find(|warning| warning["key"] == key);
    let found = found.unwrap_or_else(|| panic!("no warning about {key} in {report:#}"));
    assert_eq!(found["severity"], "warning");
    format!("{}: {}", found["line"], found["message"].as_str().unwrap())
}

#[test]
fn a_sound_configuration_has_neither_fault_nor_warning() {
    require_root();
    let sandbox = Sandbox::new();
    let (status, report) = check(&sandbox, &sound(&sandbox));
    assert_eq!(status, 0);
    assert_eq!(
        (&report["faults"], &report["warnings"]),
        (&Value::from(vec![0; 0]), &Value::from(vec![0; 0]))
    );
}

#[test]
fn each_fault_has_its_place_and_the_nearest_name() {
    let sandbox = Sandbox::new();
    let text = "[server]\nmilter = [\"inet:here\"]\n\n[filter]\n  tiemout = \"1s\"\non-error = \"reject\"\n\
                [verdict]\nmixed = \"dorp\"\n[[resolver]]\ntype = \"pwasswd\"\n[recipients]\ntimeout = \"3s\"\n";
    let (status, report) = check(&sandbox, text);
    assert_eq!(status, 78);
    let config = sandbox.join("usermilter.toml").display().to_string();
    let faults = report["faults"].as_array().unwrap();
    let expected = [
        (2, 10, "inet:ADDRESS:PORT"),
        (5, 3, "did you mean `timeout`?"),
        (6, 12, "expected `accept` or `defer`"),
        (8, 9, "did you mean `drop`?"),
        (10, 8, "did you mean `passwd`?"),
        (12, 1, "did you mean `timeout` in [filter]?"),
    ];
    assert_eq!(faults.len(), expected.len(), "{report:#}");
    for (fault, (line, column, hint)) in faults.iter().zip(expected) {
        assert_eq!(
            (&fault["file"], &fault["severity"]),
            (&Value::from(config.as_str()), &Value::from("error"))
        );
        assert_eq!((&fault["line"], &fault["column"]), (&Value::from(line), &Value::from(column)), "{fault}");
        assert!(fault["message"].as_str().unwrap().contains(hint), "no {hint:?} in {fault}");
    }
    // The same for people, on standard error.
    let mut command = Command::new(Usermilter::program());
    let output = command.args(["check", "--config", &config]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.starts_with(&format!("{config}:2:10: error: ")), "{said}");
    assert!(output.stdout.is_empty());
}

#[test]
fn files_that_the_configuration_names_are_faults_at_their_keys_and_in_their_own_lines() {
    let sandbox = Sandbox::new();
    let rules = sandbox.write("rules.toml", "\n[[rule]]\nsendr = [\"x@y.example\"]\naction = \"reject\"\n");
    let text = format!(
        "[recipients]\nrules = \"{}\"\n[[resolver]]\ntype = \"ldap\"\nuri = [\"ldaps://ldap.example\"]\nbase = \"dc=x\"\n\
         filter = \"(mail=%s)\"\nbind-dn = \"cn=x\"\npassword-file = \"/nonexistent/password\"\n",
        rules.display()
    );
    let (status, report) = check(&sandbox, &text);
    assert_eq!(status, 78);
    let faults = report["faults"].as_array().unwrap();
    assert_eq!(faults.len(), 2, "{report:#}");
    assert_eq!((&faults[0]["file"], &faults[0]["line"]), (&rules.display().to_string().into(), &3.into()));
    assert!(faults[0]["message"].as_str().unwrap().contains("did you mean `sender`?"), "{report:#}");
    assert_eq!((&faults[1]["line"], &faults[1]["column"]), (&9.into(), &1.into()));
    assert!(faults[1]["message"].as_str().unwrap().contains("/nonexistent/password"), "{report:#}");
}

#[test]
fn limits_that_contradict_each_other_or_the_mta_are_warned_of() {
    require_root();
    let sandbox = Sandbox::new();
    let base = sound(&sandbox);
    for (settings, key, expected) in [
        ("deadline = \"5m\"", "filter.deadline", "5: 300s is not below 300s"),
        ("recipient-deadline = \"30s\"", "filter.recipient-deadline", "5: 30s is not below 30s"),
        ("deadline = \"10s\"", "filter.timeout", "3: 60s is longer than filter.deadline"),
        ("timeout = \"0s\"", "filter.timeout", "5: no time at all"),
        ("max-processes = 0", "filter.max-processes", "5: 0 is not"),
        ("max-processes = 2", "filter.max-processes-per-user", "3: 4 is more than filter.max-processes, 2"),
        ("max-message = 0", "filter.max-message", "5: 0 is not"),
        ("max-memory = \"1M\"", "filter.max-memory", "5: hardly any program"),
        ("max-open-files = 3", "filter.max-open-files", "5: programs need"),
        ("memory-limit = \"60M\"", "filter.memory-limit", "5: larger than filter.max-message"),
        ("virtual-uids = [500, 600]", "filter.virtual-uids", "5: no filter runs below filter.min-uid"),
        ("[verdict]\nmixed = \"drop\"\nsplit = \"always\"", "verdict.mixed", "6: has no effect"),
        (
            "[verdict]\nmixed = \"redirect\"\n[recipients]\ndelimiters = \"\"",
            "verdict.mixed",
            "6: \"redirect\" needs a delimiter",
        ),
        ("[recipients]\ndomains = []", "recipients.domains", "6: empty"),
        (
            "[recipients]\ntrusted-networks = [\"0.0.0.0/0\"]",
            "recipients.trusted-networks",
            "6: has everybody",
        ),
        (
            "[[resolver]]\ntype = \"passwd\"\nmin-uid = 500",
            "resolver.0.min-uid",
            "7: below filter.min-uid, 1000",
        ),
        (
            "[[resolver]]\ntype = \"passwd\"\n[[resolver]]\ntype = \"passwd\"",
            "resolver.1.type",
            "8: passwd again",
        ),
    ] {
        let (status, report) = check(&sandbox, &format!("{base}{settings}\n"));
        assert_eq!(status, 0, "{settings}: a warning is no fault");
        let warning = warning(&report, key);
        assert!(warning.starts_with(expected), "{settings}: {warning}");
    }
    let drained = base.replace("\"nobody\"\n", "\"nobody\"\ndrain-timeout = \"10s\"\n");
    let said = warning(&check(&sandbox, &drained).1, "server.drain-timeout");
    assert!(said.starts_with("3: 10s is shorter than filter.deadline"), "{said}");
}

#[test]
fn sockets_that_postfix_can_not_reach_are_warned_of() {
    require_root();
    require("postfix");
    let sandbox = Sandbox::new();
    let run = sandbox.directory("run");
    let base = sound(&sandbox);
    let with = |settings: &str, directory: &Path| {
        let milter = format!("milter = [\"unix:{}/milter.sock\"]\n", directory.display());
        let text = base.replace("\"nobody\"\n", &format!("\"nobody\"\n{milter}{settings}"));
        let (status, report) = check(&sandbox, &text);
        assert_eq!(status, 0);
        report
    };
    let is_about = |report: &Value, words: &str| {
        let said = warning(report, "server.milter");
        assert!(said.starts_with("3: ") && said.contains(words), "no {words:?} in {said}");
    };
    is_about(&with("", &run), "mode 0660 and group root keep Postfix out");
    is_about(
        &with("socket-group = \"postfix\"\nsocket-mode = \"0600\"\n", &run),
        "mode 0600 and group postfix",
    );
    is_about(&with("socket-group = \"postfix\"\n", Path::new("/nonexistent")), "does not exist");
    let said = warning(&with("socket-group = \"no-such-group\"\n", &run), "server.socket-group");
    assert!(said.starts_with("4: there is no group no-such-group"), "{said}");
    for fine in ["socket-group = \"postfix\"\n", "socket-mode = \"0666\"\n"] {
        assert_eq!(with(fine, &run)["warnings"], Value::from(vec![0; 0]), "{fine}");
    }
    fs::set_permissions(&run, fs::Permissions::from_mode(0o700)).unwrap();
    is_about(&with("socket-group = \"postfix\"\n", &run), "may not enter");

    let open = base.replace("\"nobody\"\n", "\"nobody\"\npolicy = [\"inet:0.0.0.0:8891\"]\n");
    let said = warning(&check(&sandbox, &open).1, "server.policy");
    assert!(said.contains("open to everybody"), "{said}");
    let root = base.replace("\"nobody\"", "\"root\"");
    assert!(warning(&check(&sandbox, &root).1, "server.user").contains("is root"));
    let missing = base.replace("\"nobody\"", "\"no-such-user\"");
    assert!(warning(&check(&sandbox, &missing).1, "server.user").contains("useradd --system"));
}

#[test]
fn files_that_are_missing_unreadable_or_not_safe_are_warned_of() {
    require_root();
    let sandbox = Sandbox::new();
    let base = sound(&sandbox);
    let file = |name: &str, text: &str, mode: u32| {
        let path = sandbox.write(name, text);
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path.display().to_string()
    };
    let (closed, open) = (file("closed", "a: b\n", 0o600), file("open", "a: b\n", 0o646));
    let wrong = file("wrong", "# fine\nno colon\n", 0o644);
    let program = file("program", "#!/bin/sh\n", 0o755);
    let given_away = file("given-away", "#!/bin/sh\n", 0o755);
    chown(&given_away, Some(65534), Some(65534)).unwrap();
    let narrow = sandbox.directory("narrow").display().to_string();
    for (settings, key, expected) in [
        (
            "[recipients]\naliases = [\"/nonexistent/aliases\"]".to_owned(),
            "recipients.aliases",
            "6: /nonexistent/aliases: No such",
        ),
        (format!("[recipients]\naliases = [\"{closed}\"]"), "recipients.aliases", "may not"),
        (format!("[recipients]\nvirtual = [\"{open}\"]"), "recipients.virtual", "changed by everybody"),
        (format!("[recipients]\naliases = [\"{wrong}\"]"), "recipients.aliases", "2: "),
        (
            "[[resolver]]\ntype = \"passwd-file\"\npath = \"/nonexistent/users\"".into(),
            "resolver.0.path",
            "7: /nonexistent/users",
        ),
        (format!("default-message = \"{given_away}\""), "filter.default-message", "5: it will not run"),
        ("default-recipient = \"/nonexistent/program\"".into(), "filter.default-recipient", "no such file"),
        (
            "program-directories = [\"/nonexistent/programs\"]".into(),
            "filter.program-directories",
            "5: /nonexistent/programs",
        ),
        (format!("virtual-homes = [\"{program}\"]"), "filter.virtual-homes", "is no directory"),
    ] {
        let (status, report) = check(&sandbox, &format!("{base}{settings}\n"));
        assert_eq!(status, 0, "{settings}");
        let said = warning(&report, key);
        assert!(said.contains(expected), "{settings}: no {expected:?} in {said}");
    }
    let spool = format!("[server]\nuser = \"nobody\"\n[filter]\nspool-directory = \"{narrow}\"\n");
    assert!(
        warning(&check(&sandbox, &spool).1, "filter.spool-directory").contains("user nobody may not write")
    );
    assert_eq!(
        check(&sandbox, &format!("{base}default-message = \"{program}\"\n")).1["warnings"],
        Value::from(vec![0; 0])
    );
}

#[test]
fn directories_that_can_be_listened_to_and_passwords_that_can_be_read_are_warned_of() {
    require_root();
    let sandbox = Sandbox::new();
    let base = sound(&sandbox);
    let password = sandbox.write("password", "secret\n");
    let ldap = |uri: &str, more: &str| {
        let text = format!(
            "{base}[[resolver]]\ntype = \"ldap\"\nuri = [\"{uri}\"]\nbase = \"dc=x\"\nfilter = \"(mail=%s)\"\n{more}\n"
        );
        check(&sandbox, &text).1
    };
    let bind = format!("bind-dn = \"cn=x\"\npassword-file = \"{}\"", password.display());
    assert!(
        warning(&ldap("ldap://ldap.example", ""), "resolver.0.uri")
            .starts_with("7: ldap://ldap.example without TLS")
    );
    assert!(warning(&ldap("ldap://ldap.example", &bind), "resolver.0.uri").contains("reads the password"));
    let said = warning(&ldap("ldaps://ldap.example", &bind), "resolver.0.password-file");
    assert!(said.starts_with("11: ") && said.contains("mode 0644: everybody can read"), "{said}");
    assert!(warning(&ldap("ldap://localhost", "timeout = \"30s\""), "resolver.0.timeout").contains("30s"));
    assert!(
        warning(&ldap("ldap://localhost", "stale-ttl = \"1s\""), "resolver.0.stale-ttl")
            .contains("cache-ttl")
    );
    fs::set_permissions(&password, fs::Permissions::from_mode(0o600)).unwrap();
    for (uri, more) in [
        ("ldaps://ldap.example", bind.as_str()),
        ("ldap://127.0.0.1:389", &bind),
        ("ldap://h.example", "starttls = true"),
    ] {
        assert_eq!(ldap(uri, more)["warnings"], Value::from(vec![0; 0]), "{uri} {more}");
    }
}

#[test]
fn users_whom_nobody_finds_or_no_filter_may_run_as_are_named_with_their_line() {
    require_root();
    let sandbox = Sandbox::new();
    let base = sound(&sandbox);
    let homes = sandbox.directory("vmail").display().to_string();
    let first = sandbox
        .write("first", format!("anna:x:5001:5001::{homes}/anna:/bin/sh\nnobody:x:5002:5002::{homes}/n:\n"));
    let second = sandbox.write(
        "second",
        format!(
            "anna:x:5003:5003::{homes}/x:\nlow:x:900:900::{homes}/low:\nout:x:5004:5004::/home/out:\nbroken\n"
        ),
    );
    let file = |path: &Path| format!("[[resolver]]\ntype = \"passwd-file\"\npath = \"{}\"\n", path.display());
    let text = format!(
        "{base}virtual-homes = [\"{homes}\"]\n[[resolver]]\ntype = \"passwd\"\n{}{}",
        file(&first),
        file(&second)
    );
    let (status, report) = check(&sandbox, &text);
    assert_eq!(status, 0);
    let warnings = report["warnings"].as_array().unwrap();
    for (path, line, words) in [
        (&first, 2, "nobody is never found here"),
        (&second, 1, "anna is never found here: resolver 2"),
        (&second, 2, "uid 900 is below filter.min-uid"),
        (&second, 3, "home /home/out is outside filter.virtual-homes"),
        (&second, 4, "fields instead of 7"),
    ] {
        let found = warnings.iter().any(|warning| {
            (&warning["file"], &warning["line"]) == (&path.display().to_string().into(), &line.into())
                && warning["message"].as_str().unwrap().contains(words)
        });
        assert!(found, "{}:{line}: no {words:?} in {report:#}", path.display());
    }
}
