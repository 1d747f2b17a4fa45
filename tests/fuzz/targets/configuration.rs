//! The configuration: text becomes settings, or faults that have a place inside the text.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use usermilter::config::{Config, ConfigError};
use usermilter_fuzz::{file, lines};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let path = Path::new("usermilter.toml");
    let Err(first) = Config::parse(text, path) else { return };
    check(&first, text);
    // Only the text: a file without faults would be loaded with all that it names.
    let faults = Config::faults(Some(&file("usermilter.toml", data)));
    assert!((1..=100).contains(&faults.len()), "{first}: {faults:?}");
    faults.iter().for_each(|fault| check(fault, text));
});

fn check(fault: &ConfigError, text: &str) {
    let ConfigError::Invalid { place, message } = fault else { panic!("{fault:?}") };
    assert!((1..=lines(text)).contains(&place.line), "{fault}");
    let line = text.split('\n').nth(place.line - 1).unwrap_or_default();
    assert!((1..=line.chars().count() + 1).contains(&place.column), "{fault}");
    assert!(!message.is_empty() && !message.contains('\n'), "{message:?}");
}
