//! The command line.

mod check;
mod dashboard;
mod init;
mod resolve;
mod serve;
mod status;
mod try_out;

use std::{future::Future, path::PathBuf, process::ExitCode, rc::Rc, sync::Arc};

use clap::{Parser, Subcommand};

use crate::{
    config::{Config, LogLevel},
    logging::{self, Chain},
    monitor,
    worker::{self, Monitor},
};

/// EX_USAGE of sysexits.h.
const USAGE: u8 = 64;
/// EX_UNAVAILABLE of sysexits.h.
const UNAVAILABLE: u8 = 69;
/// EX_SOFTWARE of sysexits.h.
const SOFTWARE: u8 = 70;
/// EX_CANTCREAT of sysexits.h.
const CANTCREAT: u8 = 73;
/// EX_TEMPFAIL of sysexits.h.
const TEMPFAIL: u8 = 75;
/// EX_NOPERM of sysexits.h.
const NOPERM: u8 = 77;
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
    /// Validate the configuration: exit status 0, or 78 with the place of every fault.
    Check(check::Arguments),
    /// Show, step by step, which users addresses mean, and what these have.
    Resolve(resolve::Arguments),
    /// Run rules and filter as the daemon would, on the message on standard input.
    ///
    /// The exit status is 0 for accept, 77 for reject, 75 for defer, and 70 for a filter error. Root can try
    /// anybody's filter, others their own.
    Try(try_out::Arguments),
    /// Write a first ~/.usermilter with a working filter.
    Init(init::Arguments),
    /// Show what the running daemon is doing: mail, filters, connections, resolvers, and what went wrong.
    Status(status::Arguments),
}

#[derive(Clone, Debug, clap::Args)]
struct ConfigArguments {
    /// The configuration file [default: /etc/usermilter/usermilter.toml, or built-in defaults if there is none].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// The configuration, or the exit status when it can't be used; what is wrong is printed.
fn load(config: &ConfigArguments) -> Result<Config, ExitCode> {
    Config::load(config.config.as_deref()).map_err(|error| {
        eprintln!("usermilter: {}", Chain(&error));
        ExitCode::from(CONFIG)
    })
}

/// Runs a command in a worker under a monitor of its own, as the daemon would run it. Of the log only what is wrong
/// is written.
fn run_in_worker<F>(
    mut config: Config,
    command: impl Fn(Arc<Config>, Arc<Monitor>) -> F + 'static,
) -> ExitCode
where
    F: Future<Output = u8>,
{
    config.log.level = LogLevel::Error;
    logging::start(&config.log);
    let command = Rc::new(command);
    let body = move |inherited| {
        let command = Rc::clone(&command);
        worker::start_for_command(inherited, |config, monitor| async move {
            i32::from(command(config, monitor).await)
        })
    };
    match monitor::run_once(config, body) {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(SOFTWARE)),
        Err(error) => {
            eprintln!("usermilter: {}", Chain(&error));
            ExitCode::from(SOFTWARE)
        }
    }
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
        Command::Check(arguments) => check::run(&arguments),
        Command::Resolve(arguments) => resolve::run(arguments),
        Command::Try(arguments) => try_out::run(arguments),
        Command::Init(arguments) => init::run(&arguments),
        Command::Status(arguments) => status::run(&arguments),
    }
}
