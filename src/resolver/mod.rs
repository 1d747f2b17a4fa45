//! Who is this recipient? From an address to local users, as the MTA itself would deliver it.

pub mod aliases;
pub mod passwd_file;
pub mod source;
