//! `~/.usermilter/log`: what users are told about their own verdicts.
//!
//! A line for each verdict, and what the filter wrote to standard error; appended by a child of the monitor that has
//! become the user, in the background, so that no session waits for a home that hangs.

use std::{
    collections::HashMap,
    fmt::Write as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use prometheus_client::metrics::counter::Counter;
use tokio_util::task::TaskTracker;
use tracing::warn;

use crate::{
    ballot::Told,
    filter::Answer,
    logging::Quoted,
    pipeline::Change,
    recipient::{Judge, Recipient},
    record,
    reply::Reply,
    transaction::Envelope,
    user::{User, UserName},
    verdict::{Opinion, Verdict},
    worker::Monitor,
};

/// Users whose logs are written to at a time, or wait for it. Strangers choose how much there is to tell, so there are
/// bounds; what is beyond is dropped.
const MAX_USERS: usize = 512;

/// Bytes that wait for one user. An entry is shorter than half of it, and a request to the monitor must hold all.
const MAX_PENDING: usize = 144 * 1024;

/// Bytes told of one filter's standard error, give or take a line: the 16 KiB that are kept, with time stamps and escapes.
const MAX_ERROR_LINES_LENGTH: usize = 64 * 1024;

/// Writes entries without being waited for.
#[derive(Debug)]
pub struct UserLog {
    monitor: Arc<Monitor>,
    tracker: TaskTracker,
    pending: Arc<Pending>,
    failures: Counter,
}

/// What is to be written next; a user is in it as long as somebody writes for them.
type Pending = Mutex<HashMap<UserName, String>>;

impl UserLog {
    /// For a worker. `tracker`: gets the tasks, so that the worker does not leave before they are done. `failures`: counts
    /// what could not be written.
    pub fn new(monitor: Arc<Monitor>, tracker: TaskTracker, failures: Counter) -> Self {
        Self { monitor, tracker, pending: Arc::default(), failures }
    }

    /// Tells each user, if they keep a log, what became of a verdict.
    pub fn verdicts(&self, envelope: &Envelope, told: &[Told<'_>], outcome: &Opinion, changes: &[Change]) {
        for told in told {
            if let Some(judge) = told.judge.filter(|judge| judge.holdings.inspection.log) {
                let mut entry = error_lines(envelope, told.filter.unwrap_or_default(), told.error_output);
                let what = line(envelope, told, &fate(told, outcome, changes));
                let _ = writeln!(entry, "{} {what}", stamp(envelope));
                self.append(judge, entry);
            }
        }
    }

    /// Tells a user what a `recipient` filter wrote to standard error, and why it gave no verdict if it gave none.
    pub fn recipient_filter(&self, envelope: &Envelope, judge: &Judge, filter: &str, answer: &Answer) {
        let mut entry = error_lines(envelope, filter, &answer.error_output);
        if answer.is_error() {
            let _ = writeln!(entry, "{} {filter}: error ({})", stamp(envelope), Quoted(&answer.status));
        }
        if judge.holdings.inspection.log && !entry.is_empty() {
            self.append(judge, entry);
        }
    }

    /// Entries of a user are written one after the other, those that have come meanwhile at once.
    fn append(&self, judge: &Judge, entry: String) {
        let user = judge.user.clone();
        let mut pending = lock(&self.pending);
        let has_room = pending.len() < MAX_USERS;
        match pending.get_mut(&user.name) {
            Some(text) if text.len() + entry.len() <= MAX_PENDING => text.push_str(&entry),
            None if has_room => {
                pending.insert(user.name.clone(), entry);
                let (monitor, pending) = (Arc::clone(&self.monitor), Arc::clone(&self.pending));
                self.tracker.spawn(write(monitor, pending, user, self.failures.clone()));
            }
            _ => {
                self.failures.inc();
                warn!("user {}: log: too much waits to be written; an entry is dropped", user.name);
            }
        }
    }
}

/// Writes until nothing is left.
async fn write(monitor: Arc<Monitor>, pending: Arc<Pending>, user: User, failures: Counter) {
    while let Some(text) = next(&pending, &user.name) {
        if let Err(error) = monitor.append_to_log(&user, text).await {
            failures.inc();
            warn!("user {}: log: {}", user.name, Quoted(&error.to_string()));
        }
    }
}

fn next(pending: &Pending, user: &UserName) -> Option<String> {
    let mut pending = lock(pending);
    let text = pending.get_mut(user).map(std::mem::take).filter(|text| !text.is_empty());
    if text.is_none() {
        pending.remove(user);
    }
    text
}

fn lock(pending: &Pending) -> MutexGuard<'_, HashMap<UserName, String>> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Time and queue id.
fn stamp(envelope: &Envelope) -> String {
    let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ");
    format!("{now} {}", Quoted(envelope.queue_id()))
}

fn error_lines(envelope: &Envelope, filter: &str, text: &str) -> String {
    let mut lines = String::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        if lines.len() > MAX_ERROR_LINES_LENGTH {
            break;
        }
        let _ = writeln!(lines, "{} {}: {}", stamp(envelope), Quoted(filter), Quoted(line));
    }
    lines
}

fn line(envelope: &Envelope, told: &Told<'_>, fate: &str) -> String {
    let to: Vec<String> =
        told.recipients.iter().map(|recipient| record::shown(&recipient.argument)).collect();
    let reply = told.opinion.and_then(Opinion::reply).map(Reply::to_string);
    let reply = reply.map_or(String::new(), |reply| format!(" \"{}\"", Quoted(&reply)));
    format!(
        "from=<{}> to={} {} ({}){reply}{fate}",
        Quoted(&envelope.sender.to_string()),
        Quoted(&to.join(",")),
        told.said.as_str(),
        Quoted(&told.by),
    )
}

/// What became of a verdict that was not the last word. Others are never named.
fn fate(told: &Told<'_>, outcome: &Opinion, changes: &[Change]) -> String {
    let own = told.opinion.map(Opinion::verdict);
    match (own, outcome.verdict()) {
        (Some(Verdict::Reject), Verdict::Accept) => {
            let change = told.recipients.iter().find_map(|r| change_of(r, changes));
            let copy = match change.map(|change| &change.redirect_to[..]) {
                None => "delivered".to_owned(),
                Some([]) => "your copy is dropped".to_owned(),
                Some([address]) => format!("your copy goes to <{}>", Quoted(&address.to_string())),
                // Of an alias with several users: whose the other addresses are is not for this user to know.
                Some(_) => "your copy is redirected".to_owned(),
            };
            format!("; somebody else accepts: {copy}")
        }
        (Some(Verdict::Defer), Verdict::Accept) => "; somebody else accepts: delivered".into(),
        (Some(Verdict::Reject), Verdict::Defer) => "; somebody else defers: put off".into(),
        _ => String::new(),
    }
}

fn change_of<'a>(recipient: &Recipient, changes: &'a [Change]) -> Option<&'a Change> {
    changes.iter().find(|change| change.raw == recipient.argument.raw)
}
