//! The command line as a whole: help that teaches, exit statuses, colour, completions.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use std::process::{Command, Output, Stdio};

use common::{Sandbox, Usermilter, require};

/// The commands that `--help` lists.
fn commands() -> Vec<String> {
    let overview = String::from_utf8(usermilter(&["--help"]).stdout).unwrap();
    let list = overview.split_once("Commands:\n").unwrap().1.lines().take_while(|line| !line.is_empty());
    let names =
        list.filter(|line| !line.starts_with("     ")).filter_map(|line| line.split_whitespace().next());
    let commands: Vec<String> = names.filter(|name| *name != "help").map(str::to_owned).collect();
    for known in ["serve", "check", "resolve", "try", "init", "completions"] {
        assert!(commands.iter().any(|command| command == known), "no {known} in {overview}");
    }
    commands
}

fn usermilter(arguments: &[&str]) -> Output {
    Command::new(Usermilter::program()).args(arguments).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn the_help_of_every_command_teaches_it() {
    for command in &commands() {
        for arguments in [vec![command, "--help"], vec!["help", command]] {
            let output = usermilter(&arguments);
            let help = String::from_utf8(output.stdout).unwrap();
            assert_eq!(output.status.code(), Some(0));
            for part in ["Examples:", "Exit status:", &format!("usermilter {command}")] {
                assert!(help.contains(part), "{arguments:?}: no {part:?} in {help}");
            }
            assert!(!help.contains('\\'), "{help}");
            assert!(help.lines().all(|line| line.chars().count() <= 200), "{help}");
        }
    }
}

#[test]
fn usage_errors_are_64_and_name_what_is_near() {
    for (arguments, hint) in [
        (&[][..], "Usage"),
        (&["serv"], "serve"),
        (&["check", "--jsn"], "--json"),
        (&["resolve"], "ADDRESS"),
        (&["try", "--phase", "mesage"], "message"),
        (&["try", "--set", "NONSENSE=1"], "CLIENT_HOSTNAME"),
        (&["try", "--set", "USERMILTER_SIZE=much"], "number of bytes"),
        (&["try", "--client", "nowhere"], "--client"),
        (&["try", "--date", "today"], "--date"),
        (&["init", "--template", "nonsense"], "spamassassin"),
        (&["completions", "csh"], "bash"),
    ] {
        let output = usermilter(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(64), "{arguments:?}: {said}");
        assert!(said.contains(hint), "{arguments:?}: no {hint:?} in {said}");
    }
}

/// What a command writes to a terminal.
fn on_a_terminal(command: &str, no_color: bool) -> String {
    let mut script = Command::new(require("script"));
    script
        .args(["--quiet", "--return", "--command", command, "/dev/null"])
        .env("TERM", "xterm")
        .stdin(Stdio::null());
    script.env_remove("NO_COLOR").env_remove("CLICOLOR").env_remove("CLICOLOR_FORCE");
    if no_color {
        script.env("NO_COLOR", "1");
    }
    String::from_utf8(script.output().unwrap().stdout).unwrap()
}

#[test]
fn there_is_colour_on_a_terminal_only_and_not_where_it_is_not_wanted() {
    let sandbox = Sandbox::new();
    let faulty = sandbox.write("faulty.toml", "[filter]\ntiemout = \"1s\"\n");
    let odd = sandbox.write("odd.toml", "[server]\nuser = \"nobody\"\n[filter]\nmax-processes = 0\n");
    let program = Usermilter::program().display().to_string();
    let commands = [
        format!("{program} --help"),
        format!("{program} check --config {}", faulty.display()),
        format!("{program} check --config {}", odd.display()),
        format!("{program} resolve --config {} x@elsewhere.example", odd.display()),
        format!("{program} check --nonsense"),
    ];
    for command in &commands {
        let coloured = on_a_terminal(command, false);
        assert!(coloured.contains("\u{1b}["), "{command}: {coloured:?}");
        let plain = on_a_terminal(command, true);
        assert!(!plain.contains('\u{1b}') && !plain.is_empty(), "{command}: {plain:?}");
        let output = Command::new("/bin/sh")
            .args(["-c", command])
            .env("TERM", "xterm")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let piped = [output.stdout, output.stderr].concat();
        assert!(!piped.contains(&0x1b) && !piped.is_empty(), "{command}");
    }
    // JSON is for programs, whatever reads it.
    assert!(!on_a_terminal(&format!("{} --json", commands[2]), false).contains('\u{1b}'));
}

#[test]
fn a_reader_who_has_seen_enough_is_no_trouble() {
    let program = Usermilter::program().display().to_string();
    for command in ["completions bash", "check --json", "try --help"] {
        // `true` is gone before anything is written.
        let command = format!("sleep 0.2 | {{ {program} {command}; echo $? >&2; }} | true");
        let output = Command::new("/bin/sh").args(["-c", &command]).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!said.contains("panicked"), "{command}: {said}");
    }
}

/// What bash offers for a line, by the script that is installed.
fn completed_by_bash(words: &[&str]) -> Vec<String> {
    const ASK: &str = r#"
        source /dev/stdin
        function=$(complete -p usermilter | sed 's/.*-F \([^ ]*\).*/\1/')
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
        "$function" usermilter "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\n' "${COMPREPLY[@]}""#;
    let mut bash = Command::new(require("bash"));
    bash.args(["--norc", "--noprofile", "-c", ASK, "bash", "usermilter"]).args(words);
    let mut child = bash.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let script = usermilter(&["completions", "bash"]).stdout;
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), &script).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_options_and_values() {
    let offered = completed_by_bash(&[""]);
    for command in commands() {
        assert!(offered.contains(&command), "no {command} in {offered:?}");
    }
    assert_eq!(completed_by_bash(&["ch"]), ["check"]);
    assert_eq!(completed_by_bash(&["check", "--j"]), ["--json"]);
    assert_eq!(completed_by_bash(&["try", "--phase", "m"]), ["message"]);
    assert!(completed_by_bash(&["try", "--"]).contains(&"--recipient".to_owned()));
    for (shell, word) in [("zsh", "#compdef usermilter"), ("fish", "complete -c usermilter")] {
        let script = String::from_utf8(usermilter(&["completions", shell]).stdout).unwrap();
        assert!(script.contains(word), "{shell}");
    }
}
