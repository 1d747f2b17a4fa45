//! Policy requests, as a Postfix sends them: over a connection that stays, one at a time.

use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Stdio};

use crate::common::policy::Request;
use crate::common::process::Server;
use crate::common::sandbox::Sandbox;
use crate::common::stream::Stream;
use crate::floors::{Floor, wait_for_listener};
use crate::load::Side;
use crate::report::Outcome;
use crate::site::{self, PLAIN, RULED, SENDER, Site};
use crate::{Plan, common, load};

const CONNECTIONS: usize = 8;

pub(crate) fn plain(site: &Site, plan: Plan) -> Outcome {
    against_echo(site, plan, PLAIN)
}

pub(crate) fn ruled(site: &Site, plan: Plan) -> Outcome {
    against_echo(site, plan, RULED)
}

pub(crate) fn postfwd(site: &Site, plan: Plan) -> Outcome {
    if !std::path::Path::new(POSTFWD).exists() {
        return Outcome::Skipped("no postfwd1; apt-get install postfwd".into());
    }
    let port = common::free_port();
    let sandbox = Sandbox::new();
    let pid_file = sandbox.join("pid");
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", FOREGROUND])
        .arg(&pid_file)
        .arg(POSTFWD)
        .arg("--daemon")
        .arg("--pidfile")
        .arg(&pid_file);
    command.args(["--interface", "127.0.0.1", "--port", &port.to_string()]);
    // No look-up of names, or it would ask the network; no log, so that it is as fast as it can be.
    command.args(["--nodns", "--norulelog", "--user", "nobody", "--group", "nogroup"]);
    command.args(["--rule", "id=other; recipient==other@test.example; action=REJECT"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _server = Server::start(&mut command);
    let address = wait_for_listener(port);
    let server = fs::read_to_string(&pid_file).unwrap().trim().parse().expect("a pid");
    let request = request(PLAIN);
    Outcome::Measured(load::in_turn(
        plan,
        Side { rate: || rate(&site.policy, &request, plan), servers: site.processes() },
        Side { rate: || rate(&address, &request, plan), servers: vec![server] },
    ))
}

const POSTFWD: &str = "/usr/sbin/postfwd1";

/// As a server it always goes into the background, so this stays for it, and ends it.
const FOREGROUND: &str = "\"$@\"; trap 'kill $(cat \"$0\"); exit' TERM; while :; do sleep 9 & wait; done";

fn against_echo(site: &Site, plan: Plan, user: &str) -> Outcome {
    let echo = Floor::echo();
    let request = request(user);
    Outcome::Measured(load::in_turn(
        plan,
        side(site, user, plan),
        Side { rate: || rate(&echo.address, &request, plan), servers: echo.processes() },
    ))
}

/// A daemon that is asked for a user.
pub(crate) fn side(site: &Site, user: &str, plan: Plan) -> Side<impl Fn() -> f64> {
    let request = request(user);
    Side { rate: move || rate(&site.policy, &request, plan), servers: site.processes() }
}

/// From a client that is judged.
pub(crate) fn request(user: &str) -> Vec<u8> {
    Request::rcpt(SENDER, &site::address_of(user)).with("size", "4096").encode()
}

fn rate(address: &str, request: &[u8], plan: Plan) -> f64 {
    load::per_second(
        CONNECTIONS,
        plan,
        || Stream::connect(address).unwrap(),
        |connection| ask(connection, request),
    )
}

/// Asks, and sees to it that the answer is what nobody who refuses mail would say.
pub(crate) fn ask(connection: &mut Stream, request: &[u8]) {
    connection.write_all(request).unwrap();
    let mut answer = [0; 512];
    let mut length = 0;
    while !answer[..length].ends_with(b"\n\n") {
        let n = connection.read(&mut answer[length..]).unwrap();
        assert!(n > 0, "the policy server closed the connection");
        length += n;
    }
    assert!(answer[..length].eq_ignore_ascii_case(b"action=DUNNO\n\n"), "another answer than expected");
}
