//! The command line.

mod check;
mod completions;
mod dashboard;
mod init;
mod output;
mod resolve;
mod serve;
mod status;
mod try_out;

use std::{future::Future, path::PathBuf, process::ExitCode, rc::Rc, sync::Arc};

use clap::{CommandFactory, Parser, Subcommand};
use nix::unistd::{Uid, User};

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

const HELP: &str = "\
To begin:
  usermilter init                   a first filter of one's own; then: usermilter try < some-mail
  usermilter check                  is the configuration in order?
  usermilter resolve you@example.org    who is that, and what would be asked?
  usermilter serve                  the daemon
  usermilter help COMMAND           all about a command, with examples

Files:
  /etc/usermilter/usermilter.toml   configuration, see usermilter.toml(5); without it built-in defaults serve
  /var/spool/usermilter             large messages, while they are judged
  ~/.usermilter                     what a user has, see usermilter-filter(7)

Exit status (sysexits.h): 0 success; 64 wrong usage; 70 trouble; 78 fault in the configuration; see each command.";

/// Lets every recipient of a mail decide, while the SMTP session is still open, whether they want it.
///
/// usermilter is a milter (Sendmail, Postfix) and a Postfix policy service. At end of message it runs the executable
/// ~/.usermilter/message of each local recipient, as that user, with the message on standard input; its exit status
/// decides. The mail is refused only if every recipient refuses it.
#[derive(Debug, Parser)]
#[command(name = "usermilter", version, max_term_width = 100, after_long_help = HELP)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Arguments),
    Check(check::Arguments),
    Resolve(resolve::Arguments),
    Try(try_out::Arguments),
    Init(init::Arguments),
    Status(status::Arguments),
    Completions(completions::Arguments),
}

#[derive(Clone, Debug, clap::Args)]
struct ConfigArguments {
    /// The configuration file [default: /etc/usermilter/usermilter.toml, or built-in defaults if there is none].
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    config: Option<PathBuf>,
}

/// The configuration, or the exit status when it can't be used; what is wrong is printed.
fn load(config: &ConfigArguments) -> Result<Config, ExitCode> {
    Config::load(config.config.as_deref()).map_err(|error| {
        eprintln!("usermilter: {}", Chain(&error));
        ExitCode::from(CONFIG)
    })
}

/// As [`load`], for a command with which users look at what is their own: what only the daemon may read is done without, if
/// whoever calls is not root.
fn load_for_oneself(config: &ConfigArguments) -> Result<Config, ExitCode> {
    let path = config.config.as_deref();
    let forbidden = match Config::load(path) {
        Err(error) if !Uid::effective().is_root() && error.is_forbidden() => error,
        _ => return load(config),
    };
    eprintln!("usermilter: done without, since only the daemon may read it: {}", Chain(&forbidden));
    Config::load_readable(path).map_err(|error| {
        eprintln!("usermilter: {}", Chain(&error));
        ExitCode::from(CONFIG)
    })
}

/// Root's commands need a user to be while they look at what strangers may have written.
fn check_worker(config: &Config) -> Result<(), ExitCode> {
    let name = &config.server.user;
    if !Uid::effective().is_root() || !matches!(User::from_name(name), Ok(None)) {
        return Ok(());
    }
    eprintln!(
        "usermilter: user {name} does not exist, which this needs when root calls (server.user): create it with\n  \
         useradd --system --no-create-home --shell /usr/sbin/nologin {name}\nor name another unprivileged user in the \
         configuration, or call as the user whose filter it is"
    );
    Err(ExitCode::from(CONFIG))
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
    if let Err(status) = check_worker(&config) {
        return status;
    }
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
            ExitCode::from(if error.is_misconfiguration() { CONFIG } else { SOFTWARE })
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
        Command::Serve(arguments) => serve::run(arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Resolve(arguments) => resolve::run(arguments),
        Command::Try(arguments) => try_out::run(arguments),
        Command::Init(arguments) => init::run(&arguments),
        Command::Status(arguments) => status::run(&arguments),
        Command::Completions(arguments) => completions::run(&arguments, Arguments::command()),
    }
}
