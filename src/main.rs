//! The `usermilter` program; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    usermilter::cli::run()
}
