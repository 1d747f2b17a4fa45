//! Labels: enums whose every value is known, so that each time series is made at the start, and found by a number.

use crate::{
    filter::AnswerKind,
    monitor::Phase,
    recipient::Source,
    transaction::Interface,
    verdict::{AtRcpt, Ending, Said},
};

/// Label names with their values.
pub type LabelSet = Vec<(&'static str, String)>;

/// One label, or several in a tuple. `at(n)` for `n` below `COUNT` are all combinations, and `index` is the way back.
pub trait Labels: Copy {
    /// How many values there are.
    const COUNT: usize;
    /// The number of a value.
    fn index(self) -> usize;
    /// The value of a number.
    fn at(index: usize) -> Self;
    /// Appends names and values.
    fn write(self, labels: &mut LabelSet);
}

/// What a connection is made to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// The milter interface.
    Milter,
    /// The policy service.
    Policy,
    /// `server.metrics`
    Metrics,
    /// `server.control`
    Control,
}

impl Service {
    /// The word used in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Milter => "milter",
            Self::Policy => "policy",
            Self::Metrics => "metrics",
            Self::Control => "control",
        }
    }
}

/// How a resolver came to its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerSource {
    /// A file, which is in memory as a whole.
    File,
    /// It was remembered.
    Cache,
    /// NSS or a server was asked.
    Asked,
    /// It is older than it should be; no server answered.
    Stale,
    /// There is none.
    Unavailable,
}

impl AnswerSource {
    /// The word used in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Cache => "cache",
            Self::Asked => "asked",
            Self::Stale => "stale",
            Self::Unavailable => "unavailable",
        }
    }
}

/// Where a message lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In memory.
    Memory,
    /// In `filter.spool-directory`.
    Disk,
}

impl Place {
    fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disk => "disk",
        }
    }
}

macro_rules! label {
    ($($type:ident is $name:literal of $($variant:ident),+;)+) => {$(
        impl Labels for $type {
            const COUNT: usize = [$(Self::$variant),+].len();

            fn index(self) -> usize {
                // No variant carries a number of its own, so they count from 0 in the order of their declaration.
                self as usize
            }

            fn at(index: usize) -> Self {
                [$(Self::$variant),+][index]
            }

            fn write(self, labels: &mut LabelSet) {
                labels.push(($name, self.as_str().to_owned()));
            }
        }
    )+};
}

label! {
    Interface is "interface" of Milter, Policy;
    Service is "interface" of Milter, Policy, Metrics, Control;
    Ending is "outcome" of Accept, Reject, Defer, Aborted;
    AtRcpt is "outcome" of Accept, Reject, Defer, Pending;
    Said is "verdict" of Accept, Reject, Defer, Error, NotAsked;
    Source is "source" of Site, Directory, Rules, RecipientFilter, MessageFilter, Nothing, Split, UnknownUser, Trouble;
    Phase is "phase" of Recipient, Message;
    AnswerKind is "result" of Accept, Reject, Defer, Gone, ExitStatus, Signal, Timeout, NotExecutable, NotStarted;
    AnswerSource is "source" of File, Cache, Asked, Stale, Unavailable;
    Place is "place" of Memory, Disk;
}

impl<A: Labels, B: Labels> Labels for (A, B) {
    const COUNT: usize = A::COUNT * B::COUNT;

    fn index(self) -> usize {
        self.0.index() * B::COUNT + self.1.index()
    }

    fn at(index: usize) -> Self {
        (A::at(index / B::COUNT), B::at(index % B::COUNT))
    }

    fn write(self, labels: &mut LabelSet) {
        self.0.write(labels);
        self.1.write(labels);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<L: Labels + PartialEq + std::fmt::Debug>() {
        for index in 0..L::COUNT {
            assert_eq!(L::at(index).index(), index, "{:?}", L::at(index));
        }
    }

    #[test]
    fn every_value_has_a_series_of_its_own() {
        check::<Interface>();
        check::<Service>();
        check::<Ending>();
        check::<(Interface, AtRcpt)>();
        check::<(Interface, (Said, Source))>();
        check::<(Phase, AnswerKind)>();
        check::<AnswerSource>();
        check::<Place>();
    }
}
