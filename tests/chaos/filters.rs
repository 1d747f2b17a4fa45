//! One user's filter does what it must not. Everybody else's verdict stays right meanwhile.

use std::fs;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::common::site::SiteBuilder;
use super::common::wait_until;
use super::scene::{Counts, Lane, Scene, short_or_long, site, with_rogue};

/// A site in which rogue has this filter, and little time for it.
fn site_with(lane: &Lane, filter: &str) -> SiteBuilder {
    site(lane)
        .set("filter", "timeout", "\"2s\"")
        .set("filter", "max-user-processes", "40")
        .filter("rogue", "message", filter)
}

/// Mail for rogue and for everybody else; at the end nothing runs as rogue.
fn harm(lane: &Lane, filter: &str) -> Counts {
    harm_in(lane, site_with(lane, filter), "")
}

/// The same, when the log has to say of rogue what it did.
fn harm_in(lane: &Lane, site: SiteBuilder, logged: &str) -> Counts {
    harm_times(lane, site, logged, short_or_long(3, 40))
}

fn harm_times(lane: &Lane, site: SiteBuilder, logged: &str, times: usize) -> Counts {
    with_rogue(lane, site, |scene| {
        go_on_meanwhile(scene, times);
        if !logged.is_empty() {
            scene.site.daemon.wait_for_log(logged, Duration::from_secs(60));
        }
        calm(scene);
        let uid = scene.lane.rogue_uid();
        let gone = wait_until(Duration::from_secs(30), || processes_of(uid).is_empty());
        assert!(gone, "{:?} of rogue's still run", processes_of(uid));
    })
}

fn go_on_meanwhile(scene: &mut Scene, times: usize) {
    scene.assert_right();
    scene.load.wait_rogue(times);
    scene.assert_right();
}

/// A filter that does nothing takes the place of the faulty one.
fn calm(scene: &Scene) {
    scene.site.users.filter("rogue", "message", "#!/bin/sh\n");
    scene.load.wait_rogue(2);
}

fn processes_of(uid: u32) -> Vec<Pid> {
    let is_theirs = |status: &str| {
        let field =
            status.lines().find_map(|line| line.strip_prefix("Uid:\t")?.split('\t').next()?.parse().ok());
        field == Some(uid) && !status.contains("State:\tZ")
    };
    let numbers = fs::read_dir("/proc").unwrap().flatten();
    let pids = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| is_theirs(&fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default()))
        .map(Pid::from_raw)
        .collect()
}

pub(crate) fn a_filter_that_forks_for_ever_costs_no_mail(lane: &Lane) -> Counts {
    harm(lane, "#!/bin/sh\nbomb() { bomb & bomb & wait; }\nbomb\n")
}

pub(crate) fn a_filter_that_ignores_sigterm_costs_no_mail(lane: &Lane) -> Counts {
    let filter =
        "#!/bin/sh\ntrap '' TERM INT HUP\n(trap '' TERM; sleep 600) &\nwhile :; do sleep 600; done\n";
    harm_in(lane, site_with(lane, filter), "rogue=error (message: timed out")
}

pub(crate) fn a_filter_that_leaves_a_daemon_behind_costs_no_mail(lane: &Lane) -> Counts {
    // It keeps standard output and error open, as daemons do that are started in haste.
    let site = site_with(lane, "#!/bin/sh\nsetsid sleep 600 &\nexit 0\n");
    with_rogue(lane, site, |scene| {
        go_on_meanwhile(scene, short_or_long(3, 40));
        calm(scene);
        // In a session of its own: documented to be left alone (docs/threat-model.md, known limits).
        for pid in processes_of(scene.lane.rogue_uid()) {
            let _ = kill(pid, Signal::SIGKILL);
        }
    })
}

pub(crate) fn a_filter_that_writes_a_gigabyte_costs_no_mail(lane: &Lane) -> Counts {
    gigabyte(lane, "#!/bin/sh\nhead -c 1073741824 /dev/zero\n")
}

pub(crate) fn a_filter_that_writes_a_gigabyte_of_errors_costs_no_mail(lane: &Lane) -> Counts {
    gigabyte(lane, "#!/bin/sh\nhead -c 1073741824 /dev/zero >&2\n")
}

fn gigabyte(lane: &Lane, filter: &str) -> Counts {
    // Time enough to write it all.
    let site = site_with(lane, filter).set("filter", "timeout", "\"60s\"");
    harm_times(lane, site, "rogue=accept", short_or_long(1, 10))
}

pub(crate) fn a_filter_that_closes_its_input_costs_no_mail(lane: &Lane) -> Counts {
    harm_in(lane, site_with(lane, "#!/bin/sh\nexec <&-\nsleep 0.2\n"), "rogue=accept")
}

pub(crate) fn a_filter_that_fills_its_quota_costs_no_mail(lane: &Lane) -> Counts {
    // Without a trap, SIGXFSZ would end it.
    let filter = "#!/bin/sh\ntrap '' XFSZ\nwhile head -c 4194304 /dev/zero >> ~/full; do :; done\nexit 73\n";
    let site = site_with(lane, filter).set("filter", "max-file-size", "\"16M\"");
    harm_in(lane, site, "rogue=error (message: exit 73")
}

pub(crate) fn a_filter_that_allocates_without_end_costs_no_mail(lane: &Lane) -> Counts {
    let filter = "#!/usr/bin/perl\nmy @all; push @all, 'x' x 1048576 while 1;\n";
    let site = site_with(lane, filter).set("filter", "max-memory", "\"100M\"");
    harm_in(lane, site.set("filter", "timeout", "\"20s\""), "rogue=error (message: exit 1")
}

pub(crate) fn a_filter_that_signals_every_process_costs_no_mail(lane: &Lane) -> Counts {
    // First what can be handled, then, from a child, what can't: kill(2) spares who calls it.
    let filter =
        "#!/bin/sh\ntrap '' HUP TERM USR1\nkill -HUP -1\nkill -TERM -1\nkill -USR1 -1\n(kill -KILL -1)\n";
    harm_in(lane, site_with(lane, filter), "rogue=error (message: killed by SIGKILL")
}
