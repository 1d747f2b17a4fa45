//! `usermilter check`

use std::{path::Path, process::ExitCode};

use super::CONFIG;
use crate::{
    config::{Config, DEFAULT_PATH},
    logging::Chain,
};

pub(super) fn run(config_path: Option<&Path>) -> ExitCode {
    match Config::load(config_path) {
        Ok(_) => {
            println!("{}: no fault found", config_path.unwrap_or(Path::new(DEFAULT_PATH)).display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{}", Chain(&error));
            ExitCode::from(CONFIG)
        }
    }
}
