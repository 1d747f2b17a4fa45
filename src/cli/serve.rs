//! `usermilter serve`

use std::{path::PathBuf, process::ExitCode};

use tracing::error;

use super::CONFIG;
use crate::{
    config::Config,
    logging::{self, Chain},
    monitor::{self, MonitorError},
    sys,
};

pub(super) fn run(config_path: Option<PathBuf>) -> ExitCode {
    // What whoever started us left open by mistake must reach neither the worker nor a user's filter.
    if let Err(error) = sys::close_all_but(&[]) {
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
    match monitor::serve(config_path, config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{}", Chain(&error));
            match error {
                MonitorError::Config(_)
                | MonitorError::Bind(_)
                | MonitorError::Worker { misconfigured: true } => ExitCode::from(CONFIG),
                MonitorError::System { .. } | MonitorError::Worker { misconfigured: false } => {
                    ExitCode::FAILURE
                }
            }
        }
    }
}
