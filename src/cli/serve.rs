//! `usermilter serve`

use std::process::ExitCode;

use tracing::error;

use super::{CONFIG, ConfigArguments};
use crate::{
    config::Config,
    logging::{self, Chain},
    monitor::{self, Activated, MonitorError},
    sys,
};

const HELP: &str = "\
It is started as root, by a service manager: the part that can become every user stays root and never looks at what a
stranger sent; what speaks with the MTA runs as server.user. Started by anybody else, it runs filters of that user alone.

Signals, to the process that was started:
  HUP        read the configuration again; one with a fault changes nothing, and is logged
  TERM, INT  finish the transactions under way (at most server.drain-timeout), and end; a second time: end at once

Examples:
  usermilter check && usermilter serve
      with /etc/usermilter/usermilter.toml, or built-in defaults
  usermilter serve --config ./usermilter.toml 2>&1 | tee log
      another configuration, to try it

Exit status:
   0  told to end, and did
   1  it can't start or go on, and the log says why
  64  wrong usage
  78  the configuration has a fault, a socket can't be bound, or server.user does not exist or is root";

/// Run in the foreground, log to standard error (or to the journal under systemd).
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub(super) struct Arguments {
    #[command(flatten)]
    config: ConfigArguments,
}

pub(super) fn run(arguments: Arguments) -> ExitCode {
    let config_path = arguments.config.config;
    let activated = Activated::take();
    let kept = activated.as_ref().map(Activated::descriptors).unwrap_or_default();
    // What whoever started us left open by mistake must reach neither the worker nor a user's filter.
    if let Err(error) = sys::close_all_but(&kept) {
        eprintln!("usermilter: cannot close inherited descriptors: {error}");
    }
    let config = match Config::load(config_path.as_deref()) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("usermilter: {}", Chain(&error));
            return ExitCode::from(CONFIG);
        }
    };
    logging::never_wait();
    logging::start(&config.log);
    let served = activated.map_err(MonitorError::from);
    match served.and_then(|activated| monitor::serve(config_path, config, activated)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{}", Chain(&error));
            if error.is_misconfiguration() { ExitCode::from(CONFIG) } else { ExitCode::FAILURE }
        }
    }
}
