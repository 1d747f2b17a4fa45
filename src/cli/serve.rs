//! `usermilter serve`

use std::{path::PathBuf, process::ExitCode};

use tracing::error;

use super::CONFIG;
use crate::{
    config::Config,
    logging::{self, Chain},
    monitor::{self, Activated, MonitorError},
    sys,
};

pub(super) fn run(config_path: Option<PathBuf>) -> ExitCode {
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
    logging::start(&config.log);
    let served = activated.map_err(MonitorError::from);
    match served.and_then(|activated| monitor::serve(config_path, config, activated)) {
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
