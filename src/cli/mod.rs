//! The command line.

mod check;
mod serve;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

/// EX_USAGE of sysexits.h.
const USAGE: u8 = 64;
/// EX_CONFIG of sysexits.h.
const CONFIG: u8 = 78;

/// Lets every recipient of a mail decide, while the SMTP session is still open, whether they want it.
///
/// usermilter is a milter (Sendmail, Postfix) and a Postfix policy service. At end of message it runs the executable
/// ~/.usermilter/message of each local recipient, as that user, with the message on standard input; its exit status
/// decides. The mail is refused only if every recipient refuses it.
#[derive(Debug, Parser)]
#[command(name = "usermilter", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run in the foreground, log to standard error (or to the journal under systemd).
    Serve(ConfigArguments),
    /// Validate the configuration: exit status 0, or 78 with the place of the fault.
    Check(ConfigArguments),
}

#[derive(Debug, clap::Args)]
struct ConfigArguments {
    /// The configuration file [default: /etc/usermilter/usermilter.toml, or built-in defaults if there is none].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Runs the command line of the process.
pub fn run() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // --help and --version come this way too, and are no fault.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    match arguments.command {
        Command::Serve(arguments) => serve::run(arguments.config),
        Command::Check(arguments) => check::run(arguments.config.as_deref()),
    }
}
