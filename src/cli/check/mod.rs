//! `usermilter check`: what is wrong with a configuration, and what will bite whoever uses it.
//!
//! A *fault* keeps the daemon from starting; a *warning* does not. Faults are found by reading the configuration as
//! `serve` does, warnings by the checks here, each of which looks at one subject.

mod files;
mod host;
mod limits;
mod resolvers;
mod sockets;

use std::{fmt::Write as _, fs, path::Path, process::ExitCode};

use serde_json::{Value, json};

use super::{
    CONFIG, ConfigArguments,
    output::{self, BAD, GOOD, ODD, styled},
};
use crate::{
    config::{Config, ConfigError, DEFAULT_PATH, KeyPlaces, Place},
    logging::Chain,
};

const HELP: &str = "\
Faults and warnings have the form FILE:LINE:COLUMN: what is wrong, with what was expected. Run it as the user who
starts the daemon, mostly root: what this user can't look at is not checked.

Examples:
  usermilter check
      the configuration in use
  usermilter check --config new.toml && mv new.toml /etc/usermilter/usermilter.toml && pkill -HUP -o usermilter
      a new one, before the daemon gets it
  usermilter check --json | jq -r '.warnings[].message'
      for programs: {\"file\": …, \"faults\": […], \"warnings\": […]}, each with severity, file, line, column, key, message

Exit status:
   0  no fault; there may be warnings
  64  wrong usage
  78  there are faults: the daemon would not start, or keep its old configuration";

/// Validate the configuration: every fault with file, line and column; and warn of what will bite.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub(super) struct Arguments {
    #[command(flatten)]
    config: ConfigArguments,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Something that the daemon takes, and that will hardly be what was meant.
struct Warning {
    /// The key, as `filter.deadline`, `resolver.0.uri`.
    key: String,
    /// Where, if not where the key stands: in a file that it names.
    place: Option<Place>,
    /// What is odd about it, what comes of that, and what to do.
    message: String,
}

/// The warnings of all checks.
#[derive(Default)]
struct Warnings(Vec<Warning>);

impl Warnings {
    fn add(&mut self, key: impl Into<String>, message: impl Into<String>) {
        self.0.push(Warning { key: key.into(), place: None, message: message.into() });
    }

    fn add_at(&mut self, key: impl Into<String>, path: &Path, line: usize, message: impl Into<String>) {
        let place = Place { path: path.to_owned(), line, column: 1 };
        self.0.push(Warning { key: key.into(), place: Some(place), message: message.into() });
    }
}

pub(super) fn run(arguments: &Arguments) -> ExitCode {
    let path = arguments.config.config.as_deref();
    let faults = Config::faults(path);
    let file = path.unwrap_or(Path::new(DEFAULT_PATH));
    let places = KeyPlaces::of(&fs::read_to_string(file).unwrap_or_default(), file);
    let warnings = match Config::load(path) {
        Ok(config) if faults.is_empty() => warnings_of(&config, &places, file),
        // Without a configuration there is nothing to look at.
        _ => Warnings::default(),
    };
    if arguments.json {
        let faults: Vec<Value> = faults.iter().map(fault_in_json).collect();
        let warnings: Vec<Value> = warnings.0.iter().map(|w| w.in_json(&places, file)).collect();
        let report = json!({ "file": file.display().to_string(), "faults": faults, "warnings": warnings });
        output::print(&format!("{report}\n"));
    } else {
        show(file, &places, &faults, &warnings);
    }
    if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(CONFIG) }
}

fn warnings_of(config: &Config, places: &KeyPlaces, file: &Path) -> Warnings {
    let mut warnings = Warnings::default();
    sockets::check(config, &mut warnings);
    limits::check(config, &mut warnings);
    resolvers::check(config, &mut warnings);
    files::check(config, places, file, &mut warnings);
    // In the order of the file; what it does not have comes last.
    warnings.0.sort_by_key(|warning| {
        places.nearest(&warning.key).map_or((usize::MAX, 0), |place| (place.line, place.column))
    });
    warnings
}

fn show(file: &Path, places: &KeyPlaces, faults: &[ConfigError], warnings: &Warnings) {
    let mut complaints = String::new();
    for fault in faults {
        let line = match fault {
            ConfigError::Invalid { place, message } => {
                format!("{place}: {} {message}", styled(BAD, "error:"))
            }
            other => format!("{} {}", styled(BAD, "error:"), Chain(other)),
        };
        let _ = writeln!(complaints, "{line}");
    }
    for warning in &warnings.0 {
        let place =
            warning.place(places).map_or_else(|| file.display().to_string(), |place| place.to_string());
        let label = styled(ODD, "warning:");
        let key = if warning.key.is_empty() { String::new() } else { in_words(&warning.key) + ": " };
        let _ = writeln!(complaints, "{place}: {label} {key}{}", warning.message);
    }
    output::complain(&complaints);
    if faults.is_empty() {
        let warnings = match warnings.0.len() {
            0 => String::new(),
            1 => ", 1 warning".into(),
            count => format!(", {count} warnings"),
        };
        output::print(&format!("{}: {}{warnings}\n", file.display(), styled(GOOD, "no fault found")));
    }
}

/// `resolver.0.uri` is the first resolver's.
fn in_words(key: &str) -> String {
    match key.strip_prefix("resolver.").map(|rest| rest.split_once('.').unwrap_or((rest, ""))) {
        Some((number, key)) => {
            let number = number.parse::<usize>().map_or(0, |number| number + 1);
            format!("[[resolver]] {number} {key}").trim_end().to_owned()
        }
        None => key.to_owned(),
    }
}

impl Warning {
    fn place<'a>(&'a self, places: &'a KeyPlaces) -> Option<&'a Place> {
        self.place.as_ref().or_else(|| places.nearest(&self.key))
    }

    fn in_json(&self, places: &KeyPlaces, file: &Path) -> Value {
        let place = self.place(places);
        json!({
            "severity": "warning",
            "file": place.map_or(file, |place| &place.path).display().to_string(),
            "line": place.map(|place| place.line),
            "column": place.map(|place| place.column),
            "key": self.key,
            "message": self.message,
        })
    }
}

fn fault_in_json(fault: &ConfigError) -> Value {
    let (place, message) = match fault {
        ConfigError::Invalid { place, message } => (Some(place), message.clone()),
        other => (None, Chain(other).to_string()),
    };
    json!({
        "severity": "error",
        "file": place.map(|place| place.path.display().to_string()),
        "line": place.map(|place| place.line),
        "column": place.map(|place| place.column),
        "message": message,
    })
}
