//! The directory that knows the users stands still, dies, and comes back.

use std::fmt::Write as _;
use std::time::Duration;

use super::scene::{Counts, Lane, short_or_long, site, with_fault};
use super::slapd::{DAEMON, DAEMON_PASSWORD, PEOPLE, Setup, Slapd};

pub(crate) fn a_directory_that_hangs_dies_and_returns_costs_no_mail(lane: &Lane) -> Counts {
    let site = site(lane);
    let mut entries = String::new();
    // All but one, who is in the sample already; plain is somebody without a filter.
    for name in ["accept", "reject", "defer", "error", "slow", "plain", "ruled"] {
        let account = site.users.account(name);
        let _ = write!(
            entries,
            "dn: uid={name},{PEOPLE}\nobjectClass: inetOrgPerson\nobjectClass: posixAccount\n\
             uid: {name}\ncn: {name}\nsn: {name}\nmail: {name}@test.example\n\
             uidNumber: {}\ngidNumber: {}\nhomeDirectory: {}\n\n",
            account.uid,
            account.gid,
            account.home.display()
        );
    }
    let mut slapd = Slapd::start(&Setup { entries: &entries, quiet: true, ..Setup::default() });
    let resolver = format!(
        "[[resolver]]\ntype = \"ldap\"\nuri = [\"{}\"]\nbase = \"{PEOPLE}\"\n\
         bind-dn = \"{DAEMON}\"\npassword-file = \"{}\"\nfilter = \"(mail=%s)\"\ntimeout = \"1s\"\n\
         cache-ttl = \"1s\"\nnegative-ttl = \"0s\"\nstale-ttl = \"2s\"\non-error = \"defer\"\n",
        slapd.ldap(),
        slapd.password_file(DAEMON_PASSWORD)
    );
    // Who is not in the directory is refused for good; who could not be looked up is not.
    let site = site.resolvers(resolver).set("recipients", "unknown", "\"reject\"");
    let counts = with_fault(lane, site, |scene| {
        // Longer than anything is remembered.
        let outage = Duration::from_secs(4);
        for _ in 0..short_or_long(1, 6) {
            slapd.pause();
            scene.load.go_on(outage);
            slapd.resume();
            scene.wait_right();
            slapd.kill();
            scene.load.go_on(outage);
            slapd.restart();
            scene.wait_right();
            // As for an upgrade.
            slapd.restart();
            scene.load.wait_accepted(5);
        }
    });
    drop(slapd);
    counts
}
