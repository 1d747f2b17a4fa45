//! What is printed: for people, and to be pasted into docs/performance.md.

use std::fs;
use std::time::Duration;

use crate::{Figure, Plan};

/// A load average from which on others have a part in the figures.
const BUSY: f64 = 0.7;

/// One round.
pub(crate) struct Pair {
    pub(crate) ours: Measured,
    pub(crate) floor: Measured,
}

/// One side of a round.
pub(crate) struct Measured {
    /// Per second.
    pub(crate) rate: f64,
    /// Of one request or message, server and client together, in seconds.
    pub(crate) processor_time: f64,
}

/// One round of a figure that is no rate: how long each had to wait.
pub(crate) struct Waits {
    pub(crate) ours: Vec<Duration>,
    pub(crate) floor: Vec<Duration>,
}

/// What came of a figure.
pub(crate) enum Outcome {
    Measured(Vec<Pair>),
    Waited(Vec<Waits>),
    /// Why not, and what to do about it.
    Skipped(String),
}

pub(crate) struct Row {
    pub(crate) figure: &'static Figure,
    pub(crate) outcome: Outcome,
}

/// Cores and kernel, without which the figures say little.
pub(crate) fn machine() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let model = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = model.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or("unknown processor", |(_, name)| name.trim());
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: f64 = load.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0);
    println!("{cores} cores ({model}), Linux {}, load {load} before\n", kernel.trim());
    if load > BUSY {
        println!(
            "The machine is busy with something else: ratios of figures with filters favour whoever runs more"
        );
        println!("processes at a time, and all of them spread.\n");
    }
}

/// The table, in Markdown.
pub(crate) fn table(rows: &[Row], plan: Plan) {
    println!("| figure | ours /s | floor /s | ratio (min–max) | CPU ours | CPU floor | CPU ratio | bar | |");
    println!("|---|---:|---:|---|---:|---:|---:|---:|---|");
    for Row { figure, outcome } in rows {
        let Figure { name, bar, .. } = figure;
        match outcome {
            Outcome::Waited(_) => (),
            Outcome::Skipped(why) => println!("| {name} | | | skipped: {why} | | | | {bar} | |"),
            Outcome::Measured(pairs) => {
                let sorted = |value: fn(&Pair) -> f64| sorted(pairs.iter().map(value));
                let ratios = sorted(|pair| pair.ours.rate / pair.floor.rate);
                let ratio = median(&ratios);
                println!(
                    "| {name} | {} | {} | {ratio:.2} ({:.2}–{:.2}) | {} | {} | {:.2} | {bar} | {} |",
                    rate(median(&sorted(|pair| pair.ours.rate))),
                    rate(median(&sorted(|pair| pair.floor.rate))),
                    ratios[0],
                    ratios[ratios.len() - 1],
                    microseconds(median(&sorted(|pair| pair.ours.processor_time))),
                    microseconds(median(&sorted(|pair| pair.floor.processor_time))),
                    median(&sorted(|pair| pair.floor.processor_time / pair.ours.processor_time)),
                    if ratio < *bar { "**below the bar**" } else { "" },
                );
            }
        }
    }
    println!(
        "\n{} rounds of {:.1} s a side, in turn; medians. CPU is what one request or message costs of all processors,",
        plan.rounds,
        plan.duration.as_secs_f64()
    );
    println!(
        "client included; its ratio (floor to ours) is what the first would be if nothing ever waited.\n"
    );
    waits(rows);
    for Row { figure, .. } in rows {
        println!("* {}: {}; against: {}", figure.name, figure.what, figure.floor);
    }
    println!();
}

/// The table of figures whose bar is the most that they may be.
fn waits(rows: &[Row]) {
    let waited = rows.iter().filter_map(|row| match &row.outcome {
        Outcome::Waited(rounds) => Some((row.figure, rounds)),
        _ => None,
    });
    for (n, (figure, rounds)) in waited.enumerate() {
        if n == 0 {
            println!(
                "| figure | ours p50 | ours p99 | floor p50 | floor p99 | ratio of p99 (min–max) | bar | |"
            );
            println!("|---|---:|---:|---:|---:|---|---:|---|");
        }
        let column = |side: fn(&Waits) -> &[Duration], part: f64| {
            sorted(rounds.iter().map(|round| percentile(side(round), part)))
        };
        let ratios =
            sorted(rounds.iter().map(|round| percentile(&round.ours, 0.99) / percentile(&round.floor, 0.99)));
        let ratio = median(&ratios);
        println!(
            "| {} | {} | {} | {} | {} | {ratio:.2} ({:.2}–{:.2}) | {} | {} |",
            figure.name,
            microseconds(median(&column(|round| &round.ours, 0.5))),
            microseconds(median(&column(|round| &round.ours, 0.99))),
            microseconds(median(&column(|round| &round.floor, 0.5))),
            microseconds(median(&column(|round| &round.floor, 0.99))),
            ratios[0],
            ratios[ratios.len() - 1],
            figure.bar,
            if ratio > figure.bar { "**above the bar**" } else { "" },
        );
    }
    println!();
}

/// In seconds.
fn percentile(durations: &[Duration], part: f64) -> f64 {
    let sorted = sorted(durations.iter().map(Duration::as_secs_f64));
    let at = (part * sorted.len() as f64) as usize;
    sorted.get(at.min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// Of sorted values.
fn median(values: &[f64]) -> f64 {
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) }
}

/// Three digits are more than such figures are worth.
fn rate(per_second: f64) -> String {
    if per_second < 1000.0 { format!("{per_second:.1}") } else { format!("{per_second:.0}") }
}

fn microseconds(seconds: f64) -> String {
    format!("{:.1} µs", seconds * 1e6)
}
