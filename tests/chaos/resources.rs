//! The system runs short of something, or nobody hears what is logged.

use std::fs;
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::common::site::SiteBuilder;
use super::common::{PATIENCE, require};
use super::scene::{Counts, Lane, short_or_long, site, with_fault};
use super::site::{descriptors, status_field};

/// What this thread and those whom it starts mount is nobody else's, and goes with them.
pub(crate) fn with_own_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
}

pub(crate) fn a_full_spool_directory_costs_no_mail(lane: &Lane) -> Counts {
    with_own_mounts();
    let site = site(lane);
    let spool = site.sandbox.join("spool");
    // The load's large messages have 22 KiB, so that some find room and others do not.
    let options = Some("size=64k,mode=0777");
    mount(Some("spool"), &spool, Some("tmpfs"), MsFlags::empty(), options).unwrap();
    with_fault(lane, site, |scene| {
        // As much as there is room for.
        let _ = fs::write(spool.join("ballast"), [0; 64 * 1024]);
        scene.site.daemon.wait_for_log("No space left", PATIENCE);
        scene.load.wait_accepted(short_or_long(10, 300));
        fs::remove_file(spool.join("ballast")).unwrap();
    })
}

pub(crate) fn a_spool_directory_that_is_gone_costs_no_mail(lane: &Lane) -> Counts {
    let site = site(lane);
    let (spool, elsewhere) = (site.sandbox.join("spool"), site.sandbox.join("elsewhere"));
    with_fault(lane, site, |scene| {
        for _ in 0..short_or_long(2, 20) {
            fs::rename(&spool, &elsewhere).unwrap();
            scene.site.daemon.wait_for_log("No such file or directory", PATIENCE);
            scene.load.wait_accepted(5);
            fs::rename(&elsewhere, &spool).unwrap();
        }
    })
}

/// Descriptors of a process that is not to run out of them.
const ENOUGH: u32 = 1024;

pub(crate) fn descriptors_that_run_out_cost_no_mail(lane: &Lane) -> Counts {
    // By the process's own user: that needs no privilege that a container's root may lack.
    let limit = |pid: u32, soft: u32| {
        let mut prlimit = Command::new(require("prlimit"));
        prlimit.arg(format!("--pid={pid}")).arg(format!("--nofile={soft}:"));
        let [uid, gid] =
            ["Uid", "Gid"].map(|field| status_field(pid, field).split('\t').next().unwrap().parse().unwrap());
        assert!(prlimit.uid(uid).gid(gid).status().unwrap().success());
    };
    let site = site(lane);
    let (milter, policy) = (lane.milter().to_owned(), lane.policy().to_owned());
    with_fault(lane, site, |scene| {
        for _ in 0..short_or_long(1, 8) {
            // First the worker, by connections; then the monitor, which needs some for every filter.
            let worker = scene.site.daemon.worker_pid();
            let highest = |pid| descriptors(pid).last().unwrap().0;
            let seen = scene.site.daemon.log_lines().len();
            limit(worker, highest(worker) + 20);
            let connect = |address: &String| TcpStream::connect(address.trim_start_matches("inet:")).unwrap();
            let connections: Vec<_> = (0..40).flat_map(|_| [connect(&milter), connect(&policy)]).collect();
            scene.site.daemon.wait_for_log_after(seen, "cannot accept a connection", PATIENCE);
            scene.load.go_on(Duration::from_secs(2));
            drop(connections);
            limit(worker, ENOUGH);
            scene.load.wait_accepted(5);

            let monitor = scene.site.daemon.pid();
            limit(monitor, highest(monitor) + 2);
            scene.load.go_on(Duration::from_secs(2));
            limit(monitor, ENOUGH);
            scene.load.wait_accepted(5);
        }
    })
}

/// More lines than a pipe holds.
fn talkative(lane: &Lane) -> SiteBuilder {
    site(lane).set("log", "level", "\"debug\"")
}

pub(crate) fn a_log_that_nobody_reads_costs_no_mail(lane: &Lane) -> Counts {
    with_fault(lane, talkative(lane), |scene| {
        scene.site.daemon.stop_reading_log();
        scene.load.wait_accepted(short_or_long(60, 1000));
        scene.assert_right();
        // The monitor writes there too.
        scene.site.daemon.reload();
        scene.load.wait_accepted(short_or_long(10, 200));
        scene.assert_right();
        let seen = scene.site.daemon.log_lines().len();
        scene.site.daemon.go_on_reading_log();
        scene.site.daemon.wait_for_log_after(seen, "lines lost", PATIENCE);
    })
}

pub(crate) fn a_log_whose_reader_is_gone_costs_no_mail(lane: &Lane) -> Counts {
    with_fault(lane, talkative(lane), |scene| {
        scene.site.daemon.close_log();
        scene.load.wait_accepted(short_or_long(20, 500));
        scene.assert_right();
        scene.site.daemon.reload();
        scene.load.wait_accepted(short_or_long(20, 500));
        scene.assert_right();
    })
}

/// Takes a file system away from whoever uses it, or waits for it.
pub(crate) fn unmount(path: &std::path::Path) {
    umount2(path, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH).unwrap();
}
