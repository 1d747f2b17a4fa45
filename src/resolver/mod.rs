//! Who an address is.

pub mod ldap;
