//! Every recipient decides about their mail while the SMTP session is still open.

pub mod address;
pub mod config;
pub mod reply;
pub mod resolver;
pub mod user;
pub mod verdict;
