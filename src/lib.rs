//! Every recipient decides about their mail while the SMTP session is still open.

pub mod address;
pub mod resolver;
