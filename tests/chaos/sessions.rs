//! The MTA's side closes, resets or stands still after any byte of a session that was recorded from Postfix.

use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

use super::common::milter::{Capture, Client, Frame, protocol};
use super::common::policy::recorded_requests;
use super::common::wait_until;
use super::scene::{Counts, Lane, Scene, site, with_fault};
use super::site::descriptors;

/// Bytes kept of each piece of the recorded body of 200 KB: every cut is a connection.
const BODY: usize = 300;

/// Connections that stand still at a time, below `server.max-connections`.
const STALLED: usize = 600;

pub(crate) fn an_mta_that_goes_away_at_any_byte_leaves_nothing_behind(lane: &Lane) -> Counts {
    let site = site(lane).filter("alice", "message", "#!/bin/sh\ncat > /dev/null\n").filter(
        "robert",
        "message",
        "#!/bin/sh\ncat > /dev/null\nexit 77\n",
    );
    with_fault(lane, site, |scene| {
        let (milter, policy) = (lane.milter().to_owned(), lane.policy().to_owned());
        let session = recorded_session(&milter);
        let requests = recorded_requests()[..2].concat().into_bytes();
        for (address, bytes) in [(milter, session), (policy, requests)] {
            let address = address.trim_start_matches("inet:").to_owned();
            let cuts: Vec<usize> = (0..=bytes.len()).collect();
            for at in cuts.iter().copied() {
                drop(cut(&address, &bytes[..at]));
                let reset = cut(&address, &bytes[..at]);
                setsockopt(&reset, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 }).unwrap();
            }
            for some in cuts.chunks(STALLED) {
                wait_for_few_connections(scene);
                let stalled: Vec<TcpStream> = some.iter().map(|at| cut(&address, &bytes[..*at])).collect();
                scene.assert_right();
                drop(stalled);
            }
        }
        wait_for_few_connections(scene);
    })
}

/// What Postfix would have sent, had it been connected to this daemon.
fn recorded_session(address: &str) -> Vec<u8> {
    let client = Client::connect(address);
    let mut body = 0;
    let mut frames = Vec::new();
    for mut frame in Capture::load("postfix").frames {
        let subject = match (frame.command, frame.data.first()) {
            (b'D', Some(&subject)) => subject,
            (command, _) => command,
        };
        if client.is_unwanted(subject) {
            continue;
        }
        if frame.command == b'B' {
            frame.data.truncate(BODY);
            body += 1;
        }
        frames.extend(Frame::encode(&frame));
    }
    assert!(body > 0 && client.negotiated().protocol & protocol::NO_BODY == 0);
    frames
}

/// A connection on which this much was said. What is answered is not read.
fn cut(address: &str, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    // It may have been closed already for what it said: a recorded session is not as this daemon asks for it.
    let _ = stream.write_all(bytes);
    stream
}

/// What was cut is gone, or else `server.max-connections` is reached, and Postfix turned away.
fn wait_for_few_connections(scene: &Scene) {
    let sockets = || {
        let open = descriptors(scene.site.daemon.worker_pid());
        open.iter().filter(|(_, link)| link.to_string_lossy().starts_with("socket:")).count()
    };
    // Postfix has two for each of its sessions.
    assert!(wait_until(Duration::from_secs(30), || sockets() < 60), "{} sockets are left", sockets());
}
