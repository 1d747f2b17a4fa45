//! Well-formed requests that no honest worker sends: homes of other users, numbers that are taken, values without end.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::unistd::pipe;

use super::stand_in::{Question, Request, StandIn, User, virtual_user};
use usermilter::monitor::{Event, Phase, Variable};

impl StandIn {
    /// Everything that reads or writes by a home which is another's, as bob: carol helps, and is no more than a user.
    pub(super) fn others_homes(&self) {
        let mut told = String::new();
        let mut ask = |what: &str, uid: u32, home: &Path| {
            let user = virtual_user("somebody", uid, uid, home);
            told += &format!("inspect {what} => {}\n", self.inspection(user.clone()));
            told += &format!("run {what} => {}\n", self.outcome(user.clone(), None));
            told += &format!("log {what} => {}\n", self.log(user));
        };
        let carol = self.home("carol");
        ask("bob at home", 5002, &self.home("bob"));
        ask("carol at home", 5003, &carol);
        ask("carol nowhere", 5003, &carol.join("absent"));
        ask("bob in the home of carol", 5002, &carol);
        ask("bob in a directory of carol", 5002, &carol.join("lists"));
        ask("bob behind a link of carol", 5002, &carol.join("link"));
        ask("bob where carol can put something", 5002, &carol.join("absent"));
        ask("bob where all can put something", 5002, &self.home("open"));
        ask("bob where all could put something", 5002, &self.home("open/absent"));
        self.mark("told", &told);
    }

    fn inspection(&self, user: User) -> String {
        let (report, theirs) = pipe().unwrap();
        self.send(&Request::Inspect { job: 3, user }, &[theirs.as_raw_fd()]);
        drop(theirs);
        self.end(3, report)
    }

    fn log(&self, user: User) -> String {
        let (report, theirs) = pipe().unwrap();
        self.send(&Request::Log { job: 4, user, text: "forged\n".into() }, &[theirs.as_raw_fd()]);
        drop(theirs);
        self.end(4, report)
    }

    /// What the configuration does not name is neither read nor looked up, and what it names is as the worker's user may.
    pub(super) fn questions(&self) {
        let mut told = String::new();
        let mut ask = |what: String, question| {
            let (report, theirs) = pipe().unwrap();
            self.send(&Request::Ask { job: 40, question }, &[theirs.as_raw_fd()]);
            drop(theirs);
            told += &format!("{what} => {}\n", self.answer(40, report));
        };
        for number in [0, 1, 2, 3, u64::from(u32::MAX), u64::MAX] {
            ask(format!("file {number}"), Question::File(number));
        }
        for (resolver, server) in [(0, 0), (1, 0), (u64::MAX, u64::MAX)] {
            ask(format!("host {resolver} {server}"), Question::Host { resolver, server });
        }
        for name in ["root", "umt-nobody-has-this-name"] {
            ask(format!("uid {name}"), Question::Uid(name.into()));
        }
        told += &format!("alice => {}\n", self.outcome(self.alice(), None));
        self.mark("told", &told);
    }

    /// How a question ended, and all that was said.
    fn answer(&self, job: u32, report: OwnedFd) -> String {
        let mut said = Vec::new();
        File::from(report).read_to_end(&mut said).unwrap();
        let end = loop {
            match self.event(Duration::from_secs(10)) {
                Some(Event::Finished { job: of, end, .. }) if of == job => break end,
                Some(_) => (),
                None => return "no answer".into(),
            }
        };
        format!("{end:?} {}", String::from_utf8_lossy(&said).escape_debug())
    }

    pub(super) fn ask_without_pipe(&self) {
        self.send(&Request::Ask { job: 41, question: Question::File(0) }, &[]);
    }

    /// After each, a proper request is served.
    pub(super) fn odd_requests(&self) {
        let mut told = String::new();
        let odd = |job, time_limit, variables: Vec<(Variable, String)>| {
            let (user, phase) = (self.alice(), Phase::Message);
            Request::Run { job, user, phase, extension: None, variables, time_limit }
        };
        let sender = |value: String| vec![(Variable::Sender, value)];
        for (what, times, request) in [
            ("number 0", 1, odd(0, 1000, vec![])),
            ("the last number", 1, odd(u32::MAX, 1000, vec![])),
            ("a number that is taken", 4, odd(25, 500, sender("wait".into()))),
            ("no time", 2, odd(26, 0, sender("wait".into()))),
            ("time without end", 1, odd(27, u64::MAX, vec![])),
            (
                "the same variable again and again",
                1,
                odd(28, 1000, vec![(Variable::Sender, "x".into()); 20_000]),
            ),
            ("NUL in a variable", 1, odd(29, 1000, sender("a\0PATH=/tmp".into()))),
            ("lines in a variable", 1, odd(30, 1000, sender("a\nPATH=/tmp\n".into()))),
            ("a variable that execve(2) can't take", 1, odd(31, 1000, sender("x".repeat(150_000)))),
            ("the phase without a filter", 1, {
                let (user, phase) = (self.alice(), Phase::Recipient);
                let (extension, variables) = (None, vec![]);
                Request::Run { job: 32, user, phase, extension, variables, time_limit: 1000 }
            }),
        ] {
            let (mut output, theirs) = pipe().map(|(output, theirs)| (File::from(output), theirs)).unwrap();
            for _ in 0..times {
                self.send(&request, &[theirs.as_raw_fd(); 2]);
            }
            drop(theirs);
            // Its end: all of them are over.
            let mut said = Vec::new();
            output.read_to_end(&mut said).unwrap();
            told += &format!("after {what} => {}\n", self.outcome(self.alice(), None));
        }
        self.mark("told", &told);
    }
}
