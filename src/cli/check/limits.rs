//! Times and numbers that contradict each other, or the MTA's.

use std::time::Duration;

use super::Warnings;
use crate::config::{Config, Mixed, Split};

/// Postfix' milter_content_timeout, and time limit E in sendmail/usermilter.mc.
const MESSAGE_PATIENCE: Duration = Duration::from_secs(300);
/// Postfix' milter_command_timeout.
const COMMAND_PATIENCE: Duration = Duration::from_secs(30);
/// Address space in which a shell hardly starts.
const LITTLE_MEMORY: u64 = 8 << 20;
/// Descriptors that a program needs to load its libraries, standard ones included.
const FEW_FILES: u64 = 8;

pub(super) fn check(config: &Config, warnings: &mut Warnings) {
    times(config, warnings);
    numbers(config, warnings);
    verdicts(config, warnings);
}

fn times(config: &Config, warnings: &mut Warnings) {
    let (filter, server) = (&config.filter, &config.server);
    let (timeout, deadline, at_rcpt) = (filter.timeout.0, filter.deadline.0, filter.recipient_deadline.0);
    if deadline >= MESSAGE_PATIENCE {
        warnings.add(
            "filter.deadline",
            format!(
                "{deadline:?} is not below {MESSAGE_PATIENCE:?}, for which Postfix waits (milter_content_timeout), and \
                 Sendmail with T=E:300s: they may give up first; lower it, or raise theirs"
            ),
        );
    }
    if at_rcpt >= COMMAND_PATIENCE {
        warnings.add(
            "filter.recipient-deadline",
            format!(
                "{at_rcpt:?} is not below {COMMAND_PATIENCE:?}, for which Postfix waits at RCPT TO \
                 (milter_command_timeout), and Sendmail's T=R: is 10s unless set: they may give up first"
            ),
        );
    }
    if timeout > deadline {
        warnings.add(
            "filter.timeout",
            format!("{timeout:?} is longer than filter.deadline, {deadline:?}, which ends a filter before"),
        );
    }
    if server.drain_timeout.0 < deadline {
        warnings.add(
            "server.drain-timeout",
            format!(
                "{:?} is shorter than filter.deadline, {deadline:?}: on a restart, transactions whose filters take \
                 longer are put off",
                server.drain_timeout.0
            ),
        );
    }
    for (key, time, what) in [
        ("filter.timeout", timeout, "no filter has time to run"),
        ("filter.deadline", deadline, "no message filter has time to run"),
        ("filter.recipient-deadline", at_rcpt, "nobody has time to answer at RCPT TO"),
    ] {
        if time.is_zero() {
            warnings.add(key, format!("no time at all: {what}, and filter.on-error decides"));
        }
    }
}

fn numbers(config: &Config, warnings: &mut Warnings) {
    let (filter, server) = (&config.filter, &config.server);
    let nothing_runs = "no filter can run, and filter.on-error decides when the deadline is over";
    for (key, number, what) in [
        ("server.max-connections", server.max_connections as u64, "no MTA is served"),
        ("filter.max-processes", filter.max_processes as u64, nothing_runs),
        ("filter.max-processes-per-user", filter.max_processes_per_user as u64, nothing_runs),
        ("filter.max-user-processes", filter.max_user_processes, "no filter can be started"),
        ("filter.max-message", filter.max_message.0, "every message is too large for filters, and accepted"),
    ] {
        if number == 0 {
            warnings.add(key, format!("0 is not \"without limit\": {what}"));
        }
    }
    if filter.max_memory.0 < LITTLE_MEMORY {
        warnings.add("filter.max-memory", "hardly any program starts in so little memory");
    }
    if filter.max_open_files < FEW_FILES {
        warnings.add(
            "filter.max-open-files",
            format!("programs need at least {FEW_FILES} to load their libraries"),
        );
    }
    if filter.max_processes_per_user > filter.max_processes && filter.max_processes > 0 {
        warnings.add(
            "filter.max-processes-per-user",
            format!(
                "{} is more than filter.max-processes, {}: one user's filters can keep all others waiting",
                filter.max_processes_per_user, filter.max_processes
            ),
        );
    }
    if filter.memory_limit > filter.max_message {
        warnings.add("filter.memory-limit", "larger than filter.max-message: nothing is ever kept on disk");
    }
    if filter.virtual_uids.first < filter.min_uid {
        warnings
            .add("filter.virtual-uids", format!("no filter runs below filter.min-uid, {}", filter.min_uid));
    }
}

fn verdicts(config: &Config, warnings: &mut Warnings) {
    let (verdicts, recipients) = (&config.verdicts, &config.recipients);
    if verdicts.split == Split::Always && verdicts.mixed != Mixed::Deliver {
        warnings.add(
            "verdict.mixed",
            "has no effect with split = \"always\": whoever filters differently gets a transaction of their own",
        );
    }
    if verdicts.mixed == Mixed::Redirect && recipients.delimiters.is_empty() {
        warnings.add(
            "verdict.mixed",
            "\"redirect\" needs a delimiter for the extension, and recipients.delimiters is empty: delivered",
        );
    }
    if recipients.domains.is_empty() {
        warnings.add(
            "recipients.domains",
            "empty: only what a milter macro {rcpt_mailer} calls local is judged, and the policy service judges nothing",
        );
    }
    if recipients.trusted_networks.iter().any(|network| network.0.prefix_len() == 0) {
        warnings.add("recipients.trusted-networks", "has everybody: no mail is judged");
    }
}
