//! `usermilter completions`: what a shell needs to know to complete the command line.

use std::{io, process::ExitCode};

use clap_complete::Shell;

const HELP: &str = "\
`make install` and the Debian package put these where bash, zsh and fish look for them.

Examples:
  usermilter completions bash > ~/.local/share/bash-completion/completions/usermilter
  usermilter completions zsh > ~/.zfunc/_usermilter
  usermilter completions fish > ~/.config/fish/completions/usermilter.fish

Exit status:
   0  written
  64  wrong usage";

/// Write a script that makes a shell complete usermilter's commands and options.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub(super) struct Arguments {
    /// For which shell.
    #[arg(value_name = "SHELL", value_enum)]
    shell: Shell,
}

pub(super) fn run(arguments: &Arguments, mut command: clap::Command) -> ExitCode {
    // In memory first: a closed pipe is no reason to panic.
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut command, "usermilter", &mut script);
    match io::Write::write_all(&mut io::stdout(), &script) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            eprintln!("usermilter: standard output: {error}");
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}
