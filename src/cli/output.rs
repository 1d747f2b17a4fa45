//! Text for people: coloured on a terminal, unless NO_COLOR (no-color.org) is set, and plain elsewhere.
//!
//! What comes from others must be escaped before it is printed, or it could colour too.

use std::io::Write;

use clap::builder::styling::{AnsiColor, Style};

/// What is as it should be.
pub(super) const GOOD: Style = AnsiColor::Green.on_default().bold();
/// What is wrong.
pub(super) const BAD: Style = AnsiColor::Red.on_default().bold();
/// What may go wrong, or asks for patience.
pub(super) const ODD: Style = AnsiColor::Yellow.on_default().bold();

/// The text in a style.
pub(super) fn styled(style: Style, text: &str) -> String {
    format!("{style}{text}{style:#}")
}

/// Writes to standard output. A reader who has seen enough (`| head`) is no trouble.
pub(super) fn print(text: &str) {
    let _ = anstream::stdout().lock().write_all(text.as_bytes());
}

/// Writes to standard error.
pub(super) fn complain(text: &str) {
    let _ = anstream::stderr().lock().write_all(text.as_bytes());
}
