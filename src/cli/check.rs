//! `usermilter check`

use std::{path::Path, process::ExitCode};

use serde_json::{Value, json};

use super::{CONFIG, ConfigArguments};
use crate::{
    config::{Config, ConfigError, DEFAULT_PATH},
    logging::Chain,
};

#[derive(Clone, Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    config: ConfigArguments,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> ExitCode {
    let path = arguments.config.config.as_deref();
    let faults = Config::faults(path);
    let file = path.unwrap_or(Path::new(DEFAULT_PATH)).display();
    if arguments.json {
        let faults: Vec<Value> = faults.iter().map(in_json).collect();
        println!("{}", json!({ "file": file.to_string(), "faults": faults }));
    } else if faults.is_empty() {
        println!("{file}: no fault found");
    }
    if faults.is_empty() {
        return ExitCode::SUCCESS;
    }
    if !arguments.json {
        for fault in &faults {
            eprintln!("{}", Chain(fault));
        }
    }
    ExitCode::from(CONFIG)
}

fn in_json(fault: &ConfigError) -> Value {
    match fault {
        ConfigError::Invalid { place, message } => json!({
            "file": place.path.display().to_string(),
            "line": place.line,
            "column": place.column,
            "message": message,
        }),
        other => json!({ "file": null, "line": null, "column": null, "message": Chain(other).to_string() }),
    }
}
