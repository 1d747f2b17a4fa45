//! What is printed: for people, and to be pasted into docs/performance.md.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use crate::accounting::Spent;
use crate::{Figure, Plan};

/// A load average from which on others have a part in the figures.
const BUSY: f64 = 0.7;

/// One round.
pub(crate) struct Round {
    pub(crate) ours: Measured,
    pub(crate) floor: Measured,
    /// What says where the limit is, by name.
    pub(crate) references: Vec<(&'static str, Measured)>,
}

/// One side of a round.
pub(crate) struct Measured {
    /// Per second.
    pub(crate) rate: f64,
    /// For one request or message.
    pub(crate) spent: Spent,
}

impl Measured {
    /// One after the other, each with all processors.
    pub(crate) fn then(&self, other: &Self) -> Self {
        let rate = 1.0 / (1.0 / self.rate + 1.0 / other.rate);
        Self { rate, spent: self.spent.clone().and(&other.spent) }
    }
}

/// One round of a figure that is no rate: how long each had to wait.
pub(crate) struct Waits {
    pub(crate) ours: Vec<Duration>,
    pub(crate) floor: Vec<Duration>,
}

/// What came of a figure.
pub(crate) enum Outcome {
    Measured(Vec<Round>),
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

/// The tables, in Markdown.
pub(crate) fn tables(rows: &[Row], plan: Plan) {
    rates(rows);
    println!("\n{} rounds of {:.1} s a side, in turn; medians.\n", plan.rounds, plan.duration.as_secs_f64());
    waits(rows);
    references(rows);
    for Row { figure, outcome } in rows {
        if let Outcome::Measured(rounds) = outcome {
            processes(figure, rounds);
        }
    }
    for Row { figure, .. } in rows {
        println!("* {}: {}; against: {}", figure.name, figure.what, figure.floor);
    }
    println!();
}

/// The table of figures whose bar is the least that they may be.
fn rates(rows: &[Row]) {
    println!(
        "| figure | ours /s | floor /s | ratio (min–max) | bar | | server CPU ours | floor | server CPU ratio | \
         client CPU ours | floor | CPU ratio |"
    );
    println!("|---|---:|---:|---|---:|---|---:|---:|---:|---:|---:|---:|");
    for Row { figure, outcome } in rows {
        let Figure { name, bar, .. } = figure;
        match outcome {
            Outcome::Waited(_) => (),
            Outcome::Skipped(why) => println!("| {name} | | | skipped: {why} | {bar} | | | | | | | |"),
            Outcome::Measured(rounds) => {
                let median = |value: fn(&Round) -> f64| median(&sorted(rounds.iter().map(value)));
                let ratio = |round: &Round| round.ours.rate / round.floor.rate;
                println!(
                    "| {name} | {} | {} | {} | {bar} | {} | {} | {} | {:.2} | {} | {} | {:.2} |",
                    rate(median(|round| round.ours.rate)),
                    rate(median(|round| round.floor.rate)),
                    spread(rounds, ratio),
                    if median(ratio) < *bar { "**below**" } else { "" },
                    microseconds(median(|round| round.ours.spent.server)),
                    microseconds(median(|round| round.floor.spent.server)),
                    median(|round| round.floor.spent.server / round.ours.spent.server),
                    microseconds(median(|round| round.ours.spent.client)),
                    microseconds(median(|round| round.floor.spent.client)),
                    median(|round| round.floor.spent.total() / round.ours.spent.total()),
                );
            }
        }
    }
}

/// The table of what says where the limit is.
fn references(rows: &[Row]) {
    let mut is_first = true;
    for Row { figure, outcome } in rows {
        let Outcome::Measured(rounds) = outcome else { continue };
        for (n, (reference, _)) in rounds[0].references.iter().enumerate() {
            if std::mem::take(&mut is_first) {
                println!(
                    "| figure | reference | /s | of the floor (min–max) | ours of it (min–max) | CPU | CPU ratio, to the floor | ours to it |"
                );
                println!("|---|---|---:|---|---|---:|---:|---:|");
            }
            let of = |round: &Round| round.references[n].1.rate;
            let spent = |round: &Round| round.references[n].1.spent.total();
            let median = |value: &dyn Fn(&Round) -> f64| median(&sorted(rounds.iter().map(value)));
            println!(
                "| {} | {reference} | {} | {} | {} | {} | {:.2} | {:.2} |",
                figure.name,
                rate(median(&of)),
                spread(rounds, |round| of(round) / round.floor.rate),
                spread(rounds, |round| round.ours.rate / of(round)),
                microseconds(median(&spent)),
                median(&|round| round.floor.spent.total() / spent(round)),
                median(&|round| spent(round) / round.ours.spent.total()),
            );
        }
    }
    if !is_first {
        println!();
    }
}

/// The table of what each process spends on one request or message, in the mean of all rounds.
fn processes(figure: &Figure, rounds: &[Round]) {
    let sides = || {
        let references = (0..rounds[0].references.len()).map(Side::Reference);
        [Side::Ours, Side::Floor].into_iter().chain(references)
    };
    let spent = |side: Side| rounds.iter().map(move |round| side.of(round));
    let names: BTreeSet<&str> =
        sides().flat_map(spent).flat_map(|spent| spent.processes.keys().map(String::as_str)).collect();
    let titles: String = sides().map(|side| format!(" {} |", side.title(&rounds[0]))).collect();
    let totals: Vec<f64> =
        sides().map(|side| spent(side).map(Spent::total).sum::<f64>() * 1e6 / rounds.len() as f64).collect();
    println!("| {}, CPU in µs of |{titles}", figure.name);
    println!("|---|{}", "---:|".repeat(sides().count()));
    for name in names {
        let mean = |side| {
            let seconds = spent(side).filter_map(|spent| spent.processes.get(name));
            seconds.sum::<f64>() / rounds.len() as f64
        };
        let values: Vec<f64> = sides().map(|side| mean(side) * 1e6).collect();
        // What has done next to nothing is left out.
        let is_little: Vec<bool> =
            values.iter().zip(&totals).map(|(part, total)| part < &(total * 0.004)).collect();
        if is_little.contains(&false) {
            let cells = values.iter().zip(is_little).map(|(micros, is_little)| {
                if is_little { " |".to_owned() } else { format!(" {} |", digits(*micros, 100.0)) }
            });
            println!("| {name} |{}", cells.collect::<String>());
        }
    }
    let cells = totals.iter().map(|micros| format!(" {} |", digits(*micros, 100.0)));
    println!("| all |{}\n", cells.collect::<String>());
}

/// A column of [`processes`].
#[derive(Clone, Copy)]
enum Side {
    Ours,
    Floor,
    Reference(usize),
}

impl Side {
    fn of(self, round: &Round) -> &Spent {
        match self {
            Self::Ours => &round.ours.spent,
            Self::Floor => &round.floor.spent,
            Self::Reference(n) => &round.references[n].1.spent,
        }
    }

    fn title(self, round: &Round) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Floor => "floor",
            Self::Reference(n) => round.references[n].0,
        }
    }
}

/// The table of figures whose bar is the most that they may be.
fn waits(rows: &[Row]) {
    let waited = rows.iter().filter_map(|row| match &row.outcome {
        Outcome::Waited(rounds) => Some((row.figure, rounds)),
        _ => None,
    });
    let mut is_first = true;
    for (figure, rounds) in waited {
        if std::mem::take(&mut is_first) {
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
            if ratio > figure.bar { "**above**" } else { "" },
        );
    }
    if !is_first {
        println!();
    }
}

/// Median, smallest and largest.
fn spread(rounds: &[Round], ratio: impl Fn(&Round) -> f64) -> String {
    let ratios = sorted(rounds.iter().map(ratio));
    format!("{:.2} ({:.2}–{:.2})", median(&ratios), ratios[0], ratios[ratios.len() - 1])
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
    digits(per_second, 100.0)
}

fn microseconds(seconds: f64) -> String {
    match seconds * 1e6 {
        micros @ ..10_000.0 => format!("{} µs", digits(micros, 100.0)),
        micros => format!("{:.1} ms", micros / 1e3),
    }
}

/// With one digit after the point below a limit, and with separators of thousands.
fn digits(value: f64, limit: f64) -> String {
    if value.abs() < limit {
        return format!("{value:.1}");
    }
    let text = format!("{value:.0}");
    let separator = |n: usize| if n > 0 && (text.len() - n).is_multiple_of(3) { "," } else { "" };
    text.char_indices().map(|(n, digit)| format!("{}{digit}", separator(n))).collect()
}
