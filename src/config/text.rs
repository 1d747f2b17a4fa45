//! From TOML to settings: the place of every fault, and all of them.

use std::{collections::BTreeMap, path::Path};

use serde::de::DeserializeOwned;
use toml::{
    Spanned,
    de::{DeArray, DeTable, DeValue, Deserializer, Error},
};

use super::{ConfigError, Place};
use crate::spelling;

/// Most faults that are told. A file with more is no configuration.
const MAX_FAULTS: usize = 100;

/// The value that the text is.
///
/// # Errors
///
/// The first fault that is met.
pub(super) fn read<T: DeserializeOwned>(text: &str, path: &Path) -> Result<T, ConfigError> {
    let (table, faults) = table(text);
    let first = faults.into_iter().next();
    let value = first.map_or_else(|| T::deserialize(Deserializer::from(table)).map_err(Fault::from), Err);
    value.map_err(|fault| fault.corrected::<T>().at(text, path))
}

/// Everything that is wrong with the text, in its order.
pub(super) fn faults<T: DeserializeOwned>(text: &str, path: &Path) -> Vec<ConfigError> {
    let (mut table, mut faults) = table(text);
    let mut removed = Vec::new();
    // What is wrong is taken out, until nothing is.
    while faults.len() < MAX_FAULTS
        && let Err(error) = T::deserialize(Deserializer::from(table.clone()))
    {
        let fault = Fault::from(error);
        let key = remove(table.get_mut(), fault.offset);
        // What is missed only since it was taken out is no fault of its own.
        if !removed.iter().any(|key| fault.message == format!("missing field `{key}`")) {
            faults.push(fault);
        }
        match key {
            Some(key) => removed.push(key),
            None => break,
        }
    }
    faults.sort_by_key(|fault| fault.offset);
    faults.truncate(MAX_FAULTS);
    faults.into_iter().map(|fault| fault.corrected::<T>().at(text, path)).collect()
}

/// Where each key of a text stands, by names like `filter.deadline`, `resolver.0.uri`; of a table that is its first
/// place.
#[derive(Clone, Debug, Default)]
pub struct KeyPlaces(BTreeMap<String, Place>);

impl KeyPlaces {
    /// Of the text of a file; of what is no TOML, nothing.
    pub fn of(text: &str, path: &Path) -> Self {
        let mut places = Self::default();
        if let Ok(table) = DeTable::parse(text) {
            places.note("", table.get_ref(), &|offset| Place::of_offset(path, text, offset));
        }
        places
    }

    /// Where the key stands, or else what it would be in; `None` if neither is in the file.
    pub fn nearest(&self, key: &str) -> Option<&Place> {
        self.0.get(key).or_else(|| self.nearest(key.rsplit_once('.')?.0))
    }

    /// Whether the key is set.
    pub fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    fn note(&mut self, prefix: &str, table: &DeTable<'_>, place: &dyn Fn(usize) -> Place) {
        for (key, value) in table {
            let name = format!("{prefix}{}", key.get_ref());
            self.0.insert(name.clone(), place(key.span().start));
            match value.get_ref() {
                DeValue::Table(table) => self.note(&format!("{name}."), table, place),
                DeValue::Array(elements) => {
                    for (n, element) in elements.iter().enumerate() {
                        self.0.insert(format!("{name}.{n}"), place(element.span().start));
                        if let DeValue::Table(table) = element.get_ref() {
                            self.note(&format!("{name}.{n}."), table, place);
                        }
                    }
                }
                _ => (),
            }
        }
    }
}

struct Fault {
    offset: usize,
    message: String,
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        let offset = error.span().map_or(0, |span| span.start);
        Self { offset, message: error.message().trim().replace('\n', " ") }
    }
}

impl Fault {
    /// With what may have been meant.
    fn corrected<T: DeserializeOwned>(mut self) -> Self {
        self.message = match &*self.message {
            // What serde says of `[resolver]` helps nobody.
            "invalid type: map, expected a sequence" => {
                "expected a list of tables: write [[resolver]]".to_owned()
            }
            message => spelling::corrected(message, section_with::<T>),
        };
        self
    }

    fn at(self, text: &str, path: &Path) -> ConfigError {
        ConfigError::Invalid { place: Place::of_offset(path, text, self.offset), message: self.message }
    }
}

/// The section that has a key of this name, in words. Which there are, serde says when it is asked for others.
fn section_with<T: DeserializeOwned>(key: &str) -> Option<String> {
    let message = |text: &str| toml::from_str::<T>(text).err().map(|error| error.message().to_owned());
    let sections = message("no-such-key = 1")?;
    spelling::expected_names(&sections).into_iter().find_map(|section| {
        let keys = message(&format!("[{section}]\nno-such-key = 1"))?;
        spelling::expected_names(&keys).contains(&key).then(|| format!("`{key}` in [{section}]"))
    })
}

/// The settings of the text, and what is wrong with its form: what could be read of a text that is no TOML says little.
fn table(text: &str) -> (Spanned<DeTable<'_>>, Vec<Fault>) {
    let (mut table, errors) = DeTable::parse_recoverable(text);
    let mut faults: Vec<Fault> = errors.into_iter().take(MAX_FAULTS).map(Fault::from).collect();
    if !faults.is_empty() {
        table.get_mut().clear();
    }
    if let Some(DeValue::Array(resolvers)) = table.get_mut().get_mut("resolver").map(Spanned::get_mut) {
        let named =
            std::mem::replace(resolvers, DeArray::new()).into_iter().filter_map(
                |resolver| match name_variant(resolver) {
                    Ok(resolver) => Some(resolver),
                    Err(fault) => {
                        faults.push(fault);
                        None
                    }
                },
            );
        *resolvers = named.collect();
    }
    (table, faults)
}

/// `{ type = "passwd", … }` becomes `{ passwd = { … } }`, which serde reads without losing the places of faults, as it
/// would with a tag inside.
fn name_variant(resolver: Spanned<DeValue<'_>>) -> Result<Spanned<DeValue<'_>>, Fault> {
    let span = resolver.span();
    let fault = |offset: usize, message: &str| Err(Fault { offset, message: message.to_owned() });
    let DeValue::Table(mut keys) = resolver.into_inner() else {
        return fault(span.start, "invalid type: expected a table");
    };
    let Some(kind) = keys.remove("type") else {
        return fault(span.start, "missing field `type`");
    };
    let place = kind.span();
    let DeValue::String(kind) = kind.into_inner() else {
        return fault(place.start, "invalid type: expected a string");
    };
    let rest = Spanned::new(span.clone(), DeValue::Table(keys));
    let variant = DeTable::from_iter([(Spanned::new(place, kind), rest)]);
    Ok(Spanned::new(span, DeValue::Table(variant)))
}

/// Takes out the setting at a place and returns its key. The span of a table is its header.
fn remove(table: &mut DeTable<'_>, offset: usize) -> Option<String> {
    for (key, value) in table.iter_mut() {
        let is_key = key.span().contains(&offset);
        if !is_key && let Some(removed) = remove_within(value.get_mut(), offset) {
            return Some(removed);
        }
        if is_key || value.span().contains(&offset) {
            let key = key.get_ref().to_string();
            table.remove(key.as_str());
            return Some(key);
        }
    }
    None
}

fn remove_within(value: &mut DeValue<'_>, offset: usize) -> Option<String> {
    match value {
        DeValue::Table(table) => remove(table, offset),
        DeValue::Array(elements) => {
            let removed = elements.iter_mut().find_map(|element| remove_within(element.get_mut(), offset))?;
            // A resolver without its type and all that belongs to it.
            let is_left =
                |e: &Spanned<DeValue<'_>>| e.get_ref().as_table().is_none_or(|keys| !keys.is_empty());
            *elements = std::mem::replace(elements, DeArray::new()).into_iter().filter(is_left).collect();
            Some(removed)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn every_fault_is_found_in_the_order_of_the_file() {
        let text = "[server]\nuser = 3\ncolour = 1\nmilter = [\"inet:x\"]\n[filter]\ntimeout = \"x\"\n\
                    exit-status = { 1 = \"maybe\" }\n[[resolver]]\nmin-uid = 1\n[[resolver]]\ntype = \"nis\"\n\
                    [[resolver]]\ntype = \"passwd\"\ncolour = 1\nmin-uid = -1\n[[resolver]]\ntype = \"passwd-file\"\n\
                    [nowhere]\nx = 1\n";
        let places: Vec<String> = faults::<Config>(text, Path::new("x"))
            .iter()
            .map(|fault| fault.to_string().split(": ").next().unwrap_or_default().to_owned())
            .collect();
        let expected = [
            "x:2:8", "x:3:1", "x:4:10", "x:6:11", "x:7:21", "x:8:1", "x:11:8", "x:14:1", "x:15:11", "x:16:1",
            "x:18:2",
        ];
        assert_eq!(places, expected);
        assert!(faults::<Config>("", Path::new("x")).is_empty());
        let syntax = faults::<Config>("[server\nuser = \n", Path::new("x"));
        assert!(!syntax.is_empty());
    }

    #[test]
    fn a_text_that_is_no_configuration_has_no_more_faults_than_somebody_reads() {
        for text in ["= x\n", "[[resolver]]\n", "x = { ;;; }\n"] {
            let faults = faults::<Config>(&text.repeat(3 * MAX_FAULTS), Path::new("x"));
            assert_eq!(faults.len(), MAX_FAULTS, "{text}");
        }
    }

    #[test]
    fn a_fault_says_what_may_have_been_meant() {
        for (text, suggestion) in [
            ("[filter]\ntiemout = \"1s\"", "did you mean `timeout`?"),
            ("[server]\ntimeout = \"1s\"", "did you mean `timeout` in [filter]?"),
            ("milter = []", "did you mean `milter` in [server]?"),
            ("[recipient]\ndomains = []", "did you mean `recipients`?"),
            ("[verdict]\nmixed = \"delivr\"", "did you mean `deliver`?"),
            ("[log]\nlevel = \"warning\"", "did you mean `warn`?"),
            ("[[resolver]]\ntype = \"pasword-file\"", "did you mean `passwd-file`?"),
            ("[[resolver]]\ntype = \"passwd\"\nmin_uid = 1", "did you mean `min-uid`?"),
            ("[resolver]\ntype = \"passwd\"", "write [[resolver]]"),
        ] {
            let found = faults::<Config>(text, Path::new("x"));
            assert!(found[0].to_string().contains(suggestion), "{text}: {}", found[0]);
        }
        let unlike_any = faults::<Config>("[server]\ncolour = 1", Path::new("x"));
        assert!(!unlike_any[0].to_string().contains("did you mean"), "{}", unlike_any[0]);
    }

    #[test]
    fn keys_have_places_and_what_is_not_set_has_that_of_its_section() {
        let text = "[filter]\ndeadline = \"1s\"\n[[resolver]]\ntype = \"passwd\"\n[[resolver]]\n  uri = []\n";
        let places = KeyPlaces::of(text, Path::new("x"));
        let at = |key| places.nearest(key).map(|place| place.to_string());
        assert_eq!(at("filter.deadline").as_deref(), Some("x:2:1"));
        assert_eq!(at("filter.timeout").as_deref(), Some("x:1:2"));
        assert_eq!(at("resolver.1.uri").as_deref(), Some("x:6:3"));
        assert_eq!(at("resolver.1.base").as_deref(), Some("x:5:1"));
        assert_eq!(at("server.user"), None);
        assert!(places.has("filter.deadline") && !places.has("filter.timeout"));
    }
}
