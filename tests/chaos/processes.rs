//! The daemon's own processes end, stand still, or are replaced.

use std::time::Duration;

use nix::sys::signal::Signal;

use super::common::{PATIENCE, Usermilter};
use super::scene::{Counts, Lane, Scene, short_or_long, site, with_fault};
use super::site::signal;

pub(crate) fn a_killed_worker_costs_no_mail(lane: &Lane) -> Counts {
    with_fault(lane, site(lane), |scene| {
        for _ in 0..short_or_long(3, 8) {
            signal(scene.site.daemon.worker_pid(), Signal::SIGKILL);
            scene.site.daemon.wait_for_log("worker died", PATIENCE);
            scene.load.wait_accepted(5);
        }
    })
}

pub(crate) fn a_killed_monitor_costs_no_mail(lane: &Lane) -> Counts {
    with_fault(lane, site(lane), |scene| {
        for _ in 0..short_or_long(2, 10) {
            scene.site.daemon.signal(Signal::SIGKILL);
            scene.site.daemon.terminate_without_signal();
            // Nobody serves for a while.
            scene.load.go_on(Duration::from_millis(500));
            scene.site.daemon = Usermilter::start(&scene.config);
            scene.load.wait_accepted(10);
        }
    })
}

pub(crate) fn a_reload_every_second_costs_no_mail(lane: &Lane) -> Counts {
    with_fault(lane, site(lane), |scene| {
        for _ in 0..short_or_long(5, 60) {
            scene.site.daemon.reload();
            scene.load.go_on(Duration::from_secs(1));
        }
    })
}

pub(crate) fn a_restart_costs_no_mail(lane: &Lane) -> Counts {
    with_fault(lane, site(lane), |scene| {
        for _ in 0..short_or_long(2, 10) {
            let status = scene.site.daemon.terminate();
            assert_eq!(status.code(), Some(0));
            scene.site.daemon = Usermilter::start(&scene.config);
            scene.load.wait_accepted(10);
        }
    })
}

pub(crate) fn a_worker_that_stands_still_for_ten_seconds_costs_no_mail(lane: &Lane) -> Counts {
    let stand_still = |scene: &mut Scene| {
        let worker = scene.site.daemon.worker_pid();
        signal(worker, Signal::SIGSTOP);
        scene.load.go_on(Duration::from_secs(10));
        signal(worker, Signal::SIGCONT);
        assert_eq!(scene.site.daemon.worker_pid(), worker);
    };
    with_fault(lane, site(lane), |scene| (0..short_or_long(1, 4)).for_each(|_| stand_still(scene)))
}
