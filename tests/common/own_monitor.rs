//! For test programs that are their own monitor, which must have one thread, so that the usual harness can't host them.

use std::path::PathBuf;
use std::process::ExitCode;

use usermilter::worker::Inherited;

/// First argument of the process that is to be the monitor; the configuration and what its worker needs follow.
pub const MONITOR: &str = "be-the-monitor";

/// A name that is a sentence, and the test.
pub type Test = (&'static str, fn());

/// Runs the tests that the command line chooses, or, called with [`MONITOR`], the monitor of such a worker.
pub fn run(tests: &[Test], worker: fn(Inherited) -> i32) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == MONITOR) {
        return be_the_monitor(&arguments[1], worker);
    }
    // As the usual harness: words that are no option choose tests, `--list` names them.
    let words: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let chosen = tests
        .iter()
        .filter(|(name, _)| words.is_empty() || words.iter().any(|word| name.contains(word.as_str())));
    let mut failed = false;
    for (name, test) in chosen {
        if arguments.iter().any(|argument| argument == "--list") {
            println!("{name}: test");
            continue;
        }
        let passed = std::panic::catch_unwind(test).is_ok();
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        failed |= !passed;
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn be_the_monitor(config: &str, worker: fn(Inherited) -> i32) -> ExitCode {
    usermilter::sys::close_all_but(&[]).unwrap();
    let path = PathBuf::from(config);
    let config = usermilter::config::Config::load(Some(&path)).unwrap();
    usermilter::logging::start(&config.log);
    match usermilter::monitor::serve_with(Some(path), config, worker) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
