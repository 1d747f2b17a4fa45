//! The least that a milter can be: one thread that says what it does not want, and accepts at the first stage at which
//! the MTA waits. What an MTA spends with it, it spends on having a milter.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use clap::ValueEnum;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::common::milter::{Frame, protocol};

/// At which stage it accepts.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Stage {
    /// Before it has heard of any mail.
    Connect,
    /// Once it has heard of sender and recipients.
    Data,
}

impl Stage {
    fn command(self) -> u8 {
        match self {
            Self::Connect => b'C',
            Self::Data => b'T',
        }
    }

    /// What need not be sent, and what is not answered.
    fn protocol(self) -> u32 {
        use protocol::*;
        const AFTER: u32 = NO_HEADERS | NO_EOH | NO_BODY | NO_UNKNOWN;
        match self {
            Self::Connect => AFTER | NO_HELO | NO_MAIL | NO_RCPT | NO_DATA,
            Self::Data => AFTER | NR_CONNECT | NR_HELO | NR_MAIL | NR_RCPT,
        }
    }
}

pub(crate) fn serve(port: u16, stage: Stage) -> ! {
    const LISTENER: u64 = u64::MAX;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("bind");
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("epoll");
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER)).expect("epoll_ctl");
    let mut connections = HashMap::new();
    let mut events = [EpollEvent::empty(); 64];
    for next in 0.. {
        let ready = epoll.wait(&mut events, EpollTimeout::NONE).expect("epoll_wait");
        for event in &events[..ready] {
            if event.data() == LISTENER {
                let (stream, _) = listener.accept().expect("accept");
                stream.set_nodelay(true).expect("TCP_NODELAY");
                epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, next)).expect("epoll_ctl");
                connections.insert(next, Connection { stream, received: Vec::new() });
            } else if !connections.get_mut(&event.data()).is_some_and(|connection| connection.go_on(stage)) {
                // Closes it, and so ends what epoll has of it.
                connections.remove(&event.data());
            }
        }
    }
    unreachable!("so many connections")
}

struct Connection {
    stream: TcpStream,
    received: Vec<u8>,
}

impl Connection {
    /// Whether there will be more.
    fn go_on(&mut self, stage: Stage) -> bool {
        let mut buffer = [0; 8192];
        let Ok(length @ 1..) = self.stream.read(&mut buffer) else { return false };
        self.received.extend(&buffer[..length]);
        let mut rest = self.received.as_slice();
        while let Some((frame, after)) = split(rest) {
            rest = after;
            let answer = match frame {
                [b'O', offer @ ..] => negotiate(offer, stage).encode(),
                [command, ..] if *command == stage.command() => Frame::new(b'a', []).encode(),
                _ => continue,
            };
            if self.stream.write_all(&answer).is_err() {
                return false;
            }
        }
        let left = rest.len();
        self.received.drain(..self.received.len() - left);
        true
    }
}

/// The first frame, without its length, and what follows.
fn split(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk()?;
    rest.split_at_checked(u32::from_be_bytes(*length) as usize)
}

fn negotiate(offer: &[u8], stage: Stage) -> Frame {
    /// SMFIF_SETSYMLIST, and the number of the stages that have macros.
    const OWN_MACROS: u32 = 0x100;
    const STAGES: u32 = 7;
    let number = |at: usize| u32::from_be_bytes(offer[at..at + 4].try_into().expect("four bytes"));
    let (version, actions, protocol) = (number(0), number(4) & OWN_MACROS, number(8) & stage.protocol());
    let mut answer: Vec<u8> = [version, actions, protocol].iter().flat_map(|n| n.to_be_bytes()).collect();
    if actions != 0 {
        // None.
        (0..STAGES).for_each(|stage| answer.extend(stage.to_be_bytes().into_iter().chain([0])));
    }
    Frame::new(b'O', answer)
}
