//! usermilter lets every recipient of a mail decide, while the SMTP session is still open, whether they want it.
//!
//! The way of a mail, which is the order of the modules:
//!
//! ```text
//!   MTA ──► milter ─┐                                                          ┌─► reply ──► MTA
//!   MTA ──► policy ─┴► transaction ─► pipeline: resolver ─► rules ─► filter ─► verdict
//!                                                  │                   │
//!                              worker (no privilege, tokio)            │ inspect, run
//!   ───────────────────────────────────────────────────────────────────┼──────────────────────
//!                              monitor (root, one thread)              ▼
//!                                                 fork ─► become the user ─► check ─► exec
//! ```
//!
//! * [`cli`], [`config`] with [`spelling`], [`logging`]: what starts it; [`metrics`] and [`status`]: what those see who
//!   watch;
//! * [`monitor`], [`sys`]: the privileged side, [`worker`]: the other, and how they speak;
//! * [`milter`], [`policy`]: the interfaces; both know only [`transaction`], [`pipeline`] and [`verdict`];
//! * [`address`], [`resolver`], [`inquiry`], [`user`]: who a recipient is;
//! * [`holdings`], [`rules`], [`filter`], [`environment`], [`spool`], [`trace_headers`]: what their users have, and how it
//!   is asked; [`shares`]: how much of it at a time; [`answers`]: what they have just said;
//! * [`recipient`], [`ruling`], [`ballot`], [`verdict`], [`reply`], [`record`], [`user_log`]: what comes of it.

pub mod address;
pub mod answers;
pub mod ballot;
pub mod cli;
pub mod config;
pub mod environment;
pub mod filter;
pub mod holdings;
pub mod inquiry;
pub mod logging;
pub mod metrics;
pub mod milter;
pub mod monitor;
pub mod pipeline;
pub mod policy;
pub mod recipient;
pub mod record;
pub mod reply;
pub mod resolver;
pub mod rules;
pub mod ruling;
pub mod shares;
pub mod spelling;
pub mod spool;
pub mod status;
pub mod sys;
pub mod trace_headers;
pub mod transaction;
pub mod user;
pub mod user_log;
pub mod verdict;
pub mod worker;
