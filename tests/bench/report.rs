//! What is printed: for people, and to be pasted into docs/performance.md.

use std::fs;

use crate::{Figure, Plan};

/// A load average from which on others have a part in the figures.
const BUSY: f64 = 0.7;

/// One round: both sides, per second.
pub(crate) struct Pair {
    pub(crate) ours: f64,
    pub(crate) floor: f64,
}

/// What came of a figure.
pub(crate) enum Outcome {
    Measured(Vec<Pair>),
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
    println!("| figure | ours | floor | ratio (min–max) | bar | |");
    println!("|---|---:|---:|---|---:|---|");
    for Row { figure, outcome } in rows {
        let Figure { name, bar, .. } = figure;
        match outcome {
            Outcome::Skipped(why) => println!("| {name} | – | – | skipped: {why} | {bar} | |"),
            Outcome::Measured(pairs) => {
                let ratios = sorted(pairs.iter().map(|pair| pair.ours / pair.floor));
                let (ours, floor) =
                    (sorted(pairs.iter().map(|pair| pair.ours)), sorted(pairs.iter().map(|pair| pair.floor)));
                let ratio = median(&ratios);
                let judgement = if ratio < *bar { "**below the bar**" } else { "" };
                println!(
                    "| {name} | {} | {} | {ratio:.2} ({:.2}–{:.2}) | {bar} | {judgement} |",
                    rate(median(&ours)),
                    rate(median(&floor)),
                    ratios[0],
                    ratios[ratios.len() - 1],
                );
            }
        }
    }
    println!("\n{} rounds of {:.1} s a side, in turn; medians.\n", plan.rounds, plan.duration.as_secs_f64());
    for Row { figure, .. } in rows {
        println!("* {}: {}; against: {}", figure.name, figure.what, figure.floor);
    }
    println!();
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
