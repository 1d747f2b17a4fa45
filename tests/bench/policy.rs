//! Policy requests, as a Postfix sends them: over a connection that stays, one at a time.

use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Stdio};

use crate::accounting::Server as Measured;
use crate::common::policy::Request;
use crate::common::process::Server;
use crate::common::sandbox::Sandbox;
use crate::common::stream::Stream;
use crate::floors::{Floor, wait_for_listener};
use crate::load::{Answered, Client, Side};
use crate::report::{Outcome, Round};
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
    let pid = fs::read_to_string(&pid_file).unwrap().trim().parse().expect("a pid");
    let (request, servers) = (request(PLAIN), vec![Measured { pid, name: "postfwd1" }]);
    let ours = side(site, PLAIN, plan);
    let floor = Side::of(servers, || ask(&address, &request, plan));
    // What a server can reach at most, with these clients on the same processors.
    let echo = Floor::echo();
    let most = Side::of(echo.servers(), || ask(&echo.address, &request, plan));
    Outcome::Measured(load::rounds(plan, || Round {
        ours: ours.measure(),
        floor: floor.measure(),
        references: vec![("echo server that parses nothing", most.measure())],
    }))
}

const POSTFWD: &str = "/usr/sbin/postfwd1";

/// As a server it always goes into the background, so this stays for it, and ends it.
const FOREGROUND: &str = "\"$@\"; trap 'kill $(cat \"$0\"); exit' TERM; while :; do sleep 9 & wait; done";

fn against_echo(site: &Site, plan: Plan, user: &str) -> Outcome {
    let (echo, request) = (Floor::echo(), request(user));
    let floor = Side::of(echo.servers(), || ask(&echo.address, &request, plan));
    Outcome::Measured(load::in_turn(plan, &side(site, user, plan), &floor))
}

/// A daemon that is asked for a user.
pub(crate) fn side(site: &Site, user: &str, plan: Plan) -> Side<impl Fn() -> Answered> {
    let request = request(user);
    Side::of(site.servers(), move || ask(&site.policy, &request, plan))
}

/// From a client that is judged.
pub(crate) fn request(user: &str) -> Vec<u8> {
    Request::rcpt(SENDER, &site::address_of(user)).with("size", "4096").encode()
}

fn ask(address: &str, request: &[u8], plan: Plan) -> Answered {
    load::ask(CONNECTIONS, plan, || Connection::open(address, request))
}

/// A connection on which one request is sent again and again.
pub(crate) struct Connection<'a> {
    stream: Stream,
    request: &'a [u8],
    /// What has come of the answer.
    answer: [u8; 64],
    length: usize,
}

impl<'a> Connection<'a> {
    pub(crate) fn open(address: &str, request: &'a [u8]) -> Self {
        Self { stream: Stream::connect(address).unwrap(), request, answer: [0; 64], length: 0 }
    }
}

impl Client for Connection<'_> {
    fn ask(&mut self) {
        self.length = 0;
        self.stream.write_all(self.request).unwrap();
    }

    /// Sees to it that the answer is what nobody who refuses mail would say.
    fn advance(&mut self) -> bool {
        let n = self.stream.read(&mut self.answer[self.length..]).unwrap();
        assert!(n > 0, "the policy server closed the connection");
        self.length += n;
        let answer = &self.answer[..self.length];
        let is_complete = answer.ends_with(b"\n\n");
        assert!(
            !is_complete || answer.eq_ignore_ascii_case(b"action=DUNNO\n\n"),
            "another answer than expected"
        );
        is_complete
    }
}
