//! `make bench`: every figure of docs/performance.md, each as a ratio to a floor that is measured in the same run.
//!
//! ```text
//!   main ── starts ──▶ usermilter serve          A │ measured in turn, A B A B …, with the same number of
//!    │  └── starts ──▶ a floor (floors, spawn)   B │ clients for the same time
//!    └── load: clients, which speak as Postfix does (policy, milter)
//! ```
//!
//! A floor does as little as can be done: it answers without reading, or runs a program and does nothing else. The
//! wall-clock figures depend on the machine and on who else uses it; the ratios depend on it much less. Nothing is
//! judged here: the exit status is 0 whatever the figures, and those below their bar are marked.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a benchmark that can't go on ends")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../slapd/mod.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod slapd;

mod accounting;
mod directory;
mod filter;
mod floors;
mod least;
mod load;
mod memory;
mod milter;
mod policy;
mod postfix;
mod report;
mod site;
mod spawn;

use std::time::Duration;

use clap::{Parser, Subcommand};

use report::{Outcome, Row};
use site::Site;

/// Measures usermilter against floors.
#[derive(Parser)]
struct Arguments {
    /// The figures to measure, by their name, or by a part of it that is no other's name; all by default.
    figures: Vec<String>,
    /// How many times each side is measured.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// How long each side is measured, in seconds.
    #[arg(long, default_value_t = 1.5)]
    seconds: f64,
    /// Show the names of the figures and end.
    #[arg(long)]
    list: bool,
    /// What cargo passes.
    #[arg(long, hide = true)]
    bench: bool,
    #[command(subcommand)]
    helper: Option<Helper>,
}

/// The floors, which run in processes of their own.
#[derive(Subcommand)]
enum Helper {
    #[command(hide = true)]
    Floor {
        #[command(subcommand)]
        floor: floors::Floor,
    },
}

/// How to measure.
#[derive(Clone, Copy)]
struct Plan {
    rounds: usize,
    duration: Duration,
}

/// One line of the table.
struct Figure {
    name: &'static str,
    /// What is counted.
    what: &'static str,
    /// What it is compared with.
    floor: &'static str,
    /// The ratio to reach.
    bar: f64,
    measure: fn(&Site, Plan) -> Outcome,
}

const FIGURES: &[Figure] = &[
    Figure {
        name: "policy",
        what: "policy requests/s, user without rules, 8 connections",
        floor: "echo server that parses nothing",
        bar: 0.85,
        measure: policy::plain,
    },
    Figure {
        name: "policy-rules",
        what: "policy requests/s, 50 rules and 100,000 senders",
        floor: "echo server that parses nothing",
        bar: 0.7,
        measure: policy::ruled,
    },
    Figure {
        name: "policy-postfwd",
        what: "policy requests/s, user without rules, 8 connections",
        floor: "postfwd1 with one rule",
        bar: 10.0,
        measure: policy::postfwd,
    },
    Figure {
        name: "milter",
        what: "messages/s of 4 KiB, no filter, 4 connections",
        floor: "indymilter with NOREPLY that collects nothing",
        bar: 1.0,
        measure: milter::no_filter,
    },
    Figure {
        name: "milter-libmilter",
        what: "messages/s of 4 KiB, no filter, 4 connections",
        floor: "a milter in C on libmilter that does nothing, in ten callbacks",
        bar: 8.0,
        measure: milter::against_libmilter,
    },
    Figure {
        name: "postfix",
        what: "messages/s of 4 KiB through Postfix, no filter, 10 sessions",
        floor: "the same Postfix without a milter",
        bar: 0.93,
        measure: postfix::no_filter,
    },
    Figure {
        name: "postfix-filter",
        what: "messages/s of 4 KiB through Postfix, one filter (true), 10 sessions",
        floor: "the slower of the same Postfix without a milter, and the floor of filter",
        bar: 0.9,
        measure: postfix::filter,
    },
    Figure {
        name: "filter",
        what: "messages/s of 4 KiB, one filter (true), 4 connections",
        floor: "fork, set ids, exec, wait; as many at a time as cores",
        bar: 0.85,
        measure: filter::one,
    },
    Figure {
        name: "filter-ten",
        what: "messages/s of 1 MiB, ten filters (cksum) read it all",
        floor: "ten such runs reading the same file, 20 at a time",
        bar: 0.85,
        measure: filter::ten,
    },
    Figure {
        name: "filter-p99",
        what: "wait for the answer to the end of a message of 4 KiB, one filter (true), half of what can be done at most",
        floor: "fork, set ids, exec, wait, with half of what can be done at most",
        bar: 1.5,
        measure: filter::latency,
    },
    Figure {
        name: "ldap-cached",
        what: "policy requests/s, LDAP user in the cache, 8 connections",
        floor: "a second usermilter with a passwd-file",
        bar: 0.95,
        measure: directory::cached,
    },
    Figure {
        name: "ldap-uncached",
        what: "look-ups/s of addresses never asked for before, 16 at a time",
        floor: "bare ldap3 searches on one connection",
        bar: 0.7,
        measure: directory::uncached,
    },
];

/// The name of the figure that is no ratio.
const MEMORY: &str = "memory";

fn main() {
    let arguments = Arguments::parse();
    if let Some(Helper::Floor { floor }) = arguments.helper {
        floor.run();
        return;
    }
    if arguments.list {
        FIGURES.iter().map(|figure| figure.name).chain([MEMORY]).for_each(|name| println!("{name}"));
        return;
    }
    let is_name = |part: &str| part == MEMORY || FIGURES.iter().any(|figure| figure.name == part);
    let is_chosen = |name: &str| {
        let is_meant = |part: &String| part == name || !is_name(part) && name.contains(part.as_str());
        arguments.figures.is_empty() || arguments.figures.iter().any(is_meant)
    };
    let plan = Plan {
        rounds: arguments.rounds.max(1),
        duration: Duration::from_secs_f64(arguments.seconds.clamp(0.1, 10.0)),
    };
    report::machine();
    let chosen: Vec<_> = FIGURES.iter().filter(|figure| is_chosen(figure.name)).collect();
    if !chosen.is_empty() {
        let site = Site::start();
        let rows: Vec<_> = chosen
            .into_iter()
            .map(|figure| {
                eprintln!("measuring {} …", figure.name);
                Row { figure, outcome: (figure.measure)(&site, plan) }
            })
            .collect();
        report::tables(&rows, plan);
    }
    if is_chosen(MEMORY) {
        memory::report();
    }
}
