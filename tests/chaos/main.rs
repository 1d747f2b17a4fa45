//! Everything is broken on purpose, one thing at a time, under load through a real Postfix with both interfaces, and every
//! message is counted: what was accepted is delivered exactly once, nothing is refused for good that its recipients did
//! not all refuse, and afterwards every recipient's verdict is right again.
//!
//! ```text
//!   load::Load ──SMTP──▶ Postfix ──milter, policy──▶ usermilter ──▶ filters of every verdict
//!       │                   │                             ▲
//!       │ offers            ▼                             │ the fault of a scenario
//!       └──────────────▶ scene::Scene counts ◀── Maildirs
//! ```
//!
//! The scenarios run side by side on [`LANES`] Postfixes; each has a daemon of its own. `CHAOS=long` (`make chaos`) offers
//! more, and breaks it more often. Words that are no option choose scenarios, as in the usual harness; the counts are
//! printed at the end.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on fails")]

#[path = "../common/mod.rs"]
mod common;
mod directory;
mod files;
mod filters;
mod load;
mod processes;
mod resources;
mod scene;
mod sessions;
#[path = "../site/mod.rs"]
mod site;
#[path = "../slapd/mod.rs"]
#[allow(dead_code, reason = "the directory's own tests use the rest")]
mod slapd;

use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Instant;

use scene::{Counts, Lane};

/// Scenarios that run at a time: most of their time they wait.
const LANES: usize = 4;

type Scenario = (&'static str, fn(&Lane) -> Counts);

/// The names of functions are the names of scenarios.
macro_rules! scenarios {
    ($($module:ident: $($name:ident),+;)+) => { &[$($((stringify!($name), $module::$name)),+),+] };
}

/// Those that take longest first, so that no lane is left with one.
const SCENARIOS: &[Scenario] = scenarios![
    files: a_home_that_hangs_harms_its_own_user_alone, a_home_that_the_kernel_holds_harms_its_own_user_alone;
    directory: a_directory_that_hangs_dies_and_returns_costs_no_mail;
    processes: a_worker_that_stands_still_for_ten_seconds_costs_no_mail, a_reload_every_second_costs_no_mail,
        a_killed_worker_costs_no_mail, a_killed_monitor_costs_no_mail, a_restart_costs_no_mail;
    files: a_half_written_passwd_file_costs_no_mail, rules_and_filters_edited_in_use_cost_no_mail,
        a_fifo_wherever_a_file_should_be_harms_its_own_user_alone, a_clock_that_jumps_costs_no_mail;
    filters: a_filter_that_forks_for_ever_costs_no_mail, a_filter_that_ignores_sigterm_costs_no_mail,
        a_filter_that_leaves_a_daemon_behind_costs_no_mail, a_filter_that_writes_a_gigabyte_costs_no_mail,
        a_filter_that_writes_a_gigabyte_of_errors_costs_no_mail, a_filter_that_closes_its_input_costs_no_mail,
        a_filter_that_fills_its_quota_costs_no_mail, a_filter_that_allocates_without_end_costs_no_mail,
        a_filter_that_signals_every_process_costs_no_mail;
    resources: a_log_that_nobody_reads_costs_no_mail, a_log_whose_reader_is_gone_costs_no_mail,
        a_full_spool_directory_costs_no_mail, a_spool_directory_that_is_gone_costs_no_mail,
        descriptors_that_run_out_cost_no_mail;
    sessions: an_mta_that_goes_away_at_any_byte_leaves_nothing_behind;
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let is_chosen =
        |(name, _): &&Scenario| words.is_empty() || words.iter().any(|word| name.contains(word.as_str()));
    let chosen: Vec<Scenario> = SCENARIOS.iter().filter(is_chosen).copied().collect();
    if arguments.iter().any(|argument| argument == "--list") {
        chosen.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    common::require_root();
    let started = Instant::now();
    let results = Mutex::new(Vec::new());
    let queue = Mutex::new(chosen.iter());
    std::thread::scope(|scope| {
        for number in 0..LANES.min(chosen.len()) {
            let (queue, results) = (&queue, &results);
            scope.spawn(move || {
                let mut lane = None;
                while let Some(&(name, scenario)) = next(queue) {
                    let lane = &*lane.get_or_insert_with(|| Lane::new(number));
                    let started = Instant::now();
                    // A thread for each, since some have a mount namespace of their own.
                    let outcome = std::thread::scope(|scope| {
                        std::thread::Builder::new()
                            .name(name.to_owned())
                            .spawn_scoped(scope, || scenario(lane))
                            .unwrap()
                            .join()
                    });
                    let passed = outcome.is_ok();
                    println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
                    results.lock().unwrap().push((name, outcome.ok(), started.elapsed()));
                }
            });
        }
    });
    let results = results.into_inner().unwrap();
    println!("\n{}   s", Counts::HEADING);
    for (name, _) in &chosen {
        let (_, counts, took) = results.iter().find(|(other, ..)| other == name).unwrap();
        match counts {
            Some(counts) => println!("{counts} {:>3}  {name}", took.as_secs()),
            None => {
                println!("{:>width$} {:>3}  {name}", "FAILED", took.as_secs(), width = Counts::HEADING.len())
            }
        }
    }
    let total: Counts = results.iter().filter_map(|(_, counts, _)| *counts).sum();
    println!("{total} {:>3}  in all", started.elapsed().as_secs());
    if results.iter().all(|(_, counts, _)| counts.is_some()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The lock is not held while a scenario runs.
fn next<'a>(queue: &Mutex<std::slice::Iter<'a, Scenario>>) -> Option<&'a Scenario> {
    queue.lock().unwrap().next()
}
