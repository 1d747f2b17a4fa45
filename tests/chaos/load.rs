//! Distinct messages over several SMTP sessions at a time, each with what became of it.

use std::io::{self, BufReader, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::common::postfix::DOMAIN;
use super::common::smtp::Reply;
use super::common::wait_until;

/// SMTP sessions of the load; there is one more if there is a user with a faulty filter.
const SESSIONS: usize = 6;

/// Messages of a session.
const MESSAGES: usize = 5;

/// Longer than any time limit of Postfix', so that its answer is seen and not ours.
const TIMEOUT: Duration = Duration::from_secs(90);

/// Longer than any message takes, be it a gigabyte of output on a busy machine.
const LONGEST: Duration = Duration::from_secs(60);

/// After a message that could not be offered or was put off: a client that tries at once, again and again, offers
/// thousands in a second in which nobody takes any.
const PAUSE: Duration = Duration::from_millis(50);

/// A header field by which messages are known again.
pub(crate) const FIELD: &str = "X-Offer";

/// Who gets the messages, in turn: every verdict alone, and some together.
const MIX: &[&[&str]] = &[
    &["accept"],
    &["reject"],
    &["accept", "reject"],
    &["defer"],
    &["plain"],
    &["error"],
    &["ruled"],
    &["slow"],
    &["reject", "ruled"],
    &["accept", "ruled", "defer"],
];

/// The same for the user with the faulty filter.
const ROGUE_MIX: &[&[&str]] = &[&["rogue"], &["reject", "rogue"], &["rogue", "accept"]];

/// A message and what became of it.
#[derive(Clone, Debug)]
pub(crate) struct Offer {
    pub(crate) id: String,
    /// Each with the reply to RCPT TO, if there was one.
    pub(crate) recipients: Vec<(&'static str, Option<Reply>)>,
    /// To MAIL FROM if that was refused, to DATA or to the message.
    pub(crate) reply: Option<Reply>,
    /// The connection broke when the whole message was sent: whether it was accepted is not known.
    pub(crate) in_doubt: bool,
}

/// What a client is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Accepted,
    Refused,
    Deferred,
}

impl Offer {
    pub(crate) fn fate(&self) -> Fate {
        let refused = |reply: &Reply| (500..600).contains(&reply.code);
        match &self.reply {
            Some(reply) if reply.is_success() => Fate::Accepted,
            Some(reply) if refused(reply) => Fate::Refused,
            Some(_) => Fate::Deferred,
            None => {
                let all = self.recipients.iter().all(|(_, reply)| reply.as_ref().is_some_and(refused));
                if all { Fate::Refused } else { Fate::Deferred }
            }
        }
    }

    /// Those whose copy the server took charge of, if the message was accepted.
    pub(crate) fn taken(&self) -> impl Iterator<Item = &'static str> {
        self.recipients
            .iter()
            .filter(|(_, reply)| reply.as_ref().is_some_and(Reply::is_success))
            .map(|(name, _)| *name)
    }
}

/// One client, with a connection while it is good.
#[derive(Debug)]
pub(crate) struct Client {
    port: u16,
    name: String,
    offered: usize,
    connection: Option<BufReader<TcpStream>>,
}

impl Client {
    pub(crate) fn new(port: u16, name: String) -> Self {
        Self { port, name, offered: 0, connection: None }
    }

    /// Offers one message.
    pub(crate) fn offer(&mut self, recipients: &[&'static str]) -> Offer {
        self.offered += 1;
        let mut offer = Offer {
            id: format!("{}-{}", self.name, self.offered),
            recipients: recipients.iter().map(|name| (*name, None)).collect(),
            reply: None,
            in_doubt: false,
        };
        let went_well = self.try_offer(&mut offer);
        let closing = offer.reply.as_ref().is_some_and(|reply| reply.code == 421);
        if went_well.is_err() || closing {
            self.connection = None;
        } else if self.offered.is_multiple_of(MESSAGES) {
            self.quit();
        }
        offer
    }

    /// Ends the session, if there is one.
    pub(crate) fn quit(&mut self) {
        if let Some(mut connection) = self.connection.take() {
            let _ = command(&mut connection, "QUIT");
        }
    }

    fn try_offer(&mut self, offer: &mut Offer) -> io::Result<()> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => connect(self.port)?,
        };
        let mail = command(&mut connection, "MAIL FROM:<s@sender.example>")?;
        if !mail.is_success() {
            offer.reply = Some(mail);
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        for (name, reply) in &mut offer.recipients {
            *reply = Some(command(&mut connection, &format!("RCPT TO:<{name}@{DOMAIN}>"))?);
        }
        if offer.taken().next().is_some() {
            let reply = command(&mut connection, "DATA")?;
            if reply.code == 354 {
                connection.get_mut().write_all(self.message(&offer.id).as_bytes())?;
                offer.in_doubt = true;
                offer.reply = Some(Reply::read(&mut connection)?);
                offer.in_doubt = false;
            } else {
                offer.reply = Some(reply);
                command(&mut connection, "RSET")?;
            }
        } else {
            command(&mut connection, "RSET")?;
        }
        self.connection = Some(connection);
        Ok(())
    }

    /// Every fourth is too large for memory (`filter.memory-limit` of [`super::scene`]).
    fn message(&self, id: &str) -> String {
        let lines = if self.offered.is_multiple_of(4) { 500 } else { 10 };
        let body = "The quick brown fox jumps over the lazy dog.\r\n".repeat(lines);
        format!("From: <s@sender.example>\r\n{FIELD}: {id}\r\nSubject: load\r\n\r\n{body}.\r\n")
    }
}

fn connect(port: u16) -> io::Result<BufReader<TcpStream>> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_nodelay(true)?;
    let mut connection = BufReader::new(stream);
    if !Reply::read(&mut connection)?.is_success() {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    command(&mut connection, "EHLO mx.sender.example")?;
    Ok(connection)
}

fn command(connection: &mut BufReader<TcpStream>, line: &str) -> io::Result<Reply> {
    connection.get_mut().write_all(format!("{line}\r\n").as_bytes())?;
    Reply::read(connection)
}

/// Clients that go on until they are told to stop.
#[derive(Debug)]
pub(crate) struct Load {
    port: u16,
    name: String,
    over: Arc<AtomicBool>,
    answered: Arc<Mutex<Vec<Offer>>>,
    rogue: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    pub(crate) fn start(port: u16, name: &str, with_rogue: bool) -> Self {
        let mut load = Self {
            port,
            name: name.to_owned(),
            over: Arc::default(),
            answered: Arc::default(),
            rogue: Arc::default(),
            clients: Vec::new(),
        };
        for number in 0..SESSIONS {
            load.add(&number.to_string(), MIX, number, Arc::default());
        }
        if with_rogue {
            let count = Arc::clone(&load.rogue);
            load.add("rogue", ROGUE_MIX, 0, count);
        }
        load
    }

    /// As many clients more, who all write to the user with the faulty filter.
    pub(crate) fn add_crowd(&mut self, clients: usize) {
        for number in 0..clients {
            self.add(&format!("crowd{number}"), ROGUE_MIX, number, Arc::default());
        }
    }

    fn add(
        &mut self,
        name: &str,
        mix: &'static [&'static [&'static str]],
        first: usize,
        count: Arc<AtomicUsize>,
    ) {
        let (over, answered) = (Arc::clone(&self.over), Arc::clone(&self.answered));
        let mut client = Client::new(self.port, format!("{}-{name}", self.name));
        self.clients.push(std::thread::spawn(move || {
            let mut turns = mix.iter().cycle().skip(first);
            while !over.load(Ordering::Relaxed) {
                let offer = client.offer(turns.next().unwrap());
                if offer.fate() == Fate::Deferred {
                    std::thread::sleep(PAUSE);
                }
                answered.lock().unwrap().push(offer);
                count.fetch_add(1, Ordering::Relaxed);
            }
        }));
    }

    /// Waits until as many more messages have been accepted.
    #[track_caller]
    pub(crate) fn wait_accepted(&self, more: usize) {
        let accepted = || {
            let answered = self.answered.lock().unwrap();
            answered.iter().filter(|offer| offer.fate() == Fate::Accepted).count()
        };
        let wanted = accepted() + more;
        let limit = Duration::from_secs(120);
        assert!(
            wait_until(limit, || accepted() >= wanted),
            "{} of {wanted} accepted in {limit:?}",
            accepted()
        );
    }

    /// Waits until the user with the faulty filter was offered as many more.
    #[track_caller]
    pub(crate) fn wait_rogue(&self, more: usize) {
        let offered = || self.rogue.load(Ordering::Relaxed);
        let wanted = offered() + more;
        let limit = LONGEST * u32::try_from(more).unwrap();
        assert!(wait_until(limit, || offered() >= wanted), "{} of {wanted} offered in {limit:?}", offered());
    }

    /// Lets everything go on for a while.
    pub(crate) fn go_on(&self, time: Duration) {
        std::thread::sleep(time);
    }

    /// Stops, and returns all that was offered.
    pub(crate) fn finish(mut self) -> Vec<Offer> {
        self.over.store(true, Ordering::Relaxed);
        for client in self.clients.drain(..) {
            client.join().unwrap();
        }
        std::mem::take(&mut self.answered.lock().unwrap())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}
