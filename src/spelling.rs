//! "Did you mean …?": the nearest of the names that serde expected.

/// Similarity, from 0 to 1, from which a name is suggested (Jaro and Winkler); what clap uses for options.
const THRESHOLD: f64 = 0.8;

/// serde's message, with a suggestion if it is about an unknown name that has a near one: ``unknown field `tiemout`, did
/// you mean `timeout`? expected one of …``. `elsewhere` may know another place that has exactly this name.
pub fn corrected(message: &str, elsewhere: impl FnOnce(&str) -> Option<String>) -> String {
    let Some((start, name, expected)) = unknown(message) else { return message.to_owned() };
    let near = nearest(name, names(expected)).map(|near| format!("`{near}`"));
    match elsewhere(name).or(near) {
        Some(suggestion) => format!("{start}, did you mean {suggestion}? expected {expected}"),
        None => message.to_owned(),
    }
}

/// The names that a message of serde's says were expected.
pub fn expected_names(message: &str) -> Vec<&str> {
    unknown(message).map(|(_, _, expected)| names(expected).collect()).unwrap_or_default()
}

/// The part before the comma, the unknown name in it, and what was expected.
fn unknown(message: &str) -> Option<(&str, &str, &str)> {
    let (start, expected) = message.split_once(", expected ")?;
    let name = start.strip_prefix("unknown field `").or_else(|| start.strip_prefix("unknown variant `"))?;
    Some((start, name.strip_suffix('`')?, expected))
}

fn names(expected: &str) -> impl Iterator<Item = &str> {
    expected.split('`').skip(1).step_by(2)
}

fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // As people write keys elsewhere: MaxMessage, max_message.
    let name = name.to_lowercase().replace('_', "-");
    let rated = known.map(|known| (strsim::jaro_winkler(&name, known), known));
    let best = rated.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 >= THRESHOLD).then_some(best.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corrected_here(message: &str) -> String {
        corrected(message, |_| None)
    }

    #[test]
    fn the_nearest_name_is_suggested_and_nothing_far_off() {
        let message = "unknown field `tiemout`, expected one of `deadline`, `timeout`, `on-error`";
        assert_eq!(
            corrected_here(message),
            "unknown field `tiemout`, did you mean `timeout`? expected one of `deadline`, `timeout`, `on-error`"
        );
        assert!(
            corrected_here("unknown variant `delivr`, expected `deliver` or `drop`").contains("`deliver`?")
        );
        assert!(
            corrected_here("unknown field `max_message`, expected `max-message`").contains("`max-message`?")
        );
        for other in [
            "unknown field `colour`, expected `user` or `milter`",
            "invalid type: integer `3`, expected a string",
            "",
        ] {
            assert_eq!(corrected_here(other), other);
        }
    }

    #[test]
    fn a_name_that_belongs_elsewhere_is_sent_there() {
        let message = "unknown field `timeout`, expected one of `time`, `user`";
        let said = corrected(message, |name| (name == "timeout").then(|| "`timeout` in [filter]".to_owned()));
        assert!(said.contains("did you mean `timeout` in [filter]? expected one of"), "{said}");
    }
}
