//! Rules: any text is understood or refused at a place inside it, and what is understood says what a reference says that
//! reads it much more simply.
//!
//! Input, with NUL between: rules, a sender-file, sender, recipient, client address, client name, HELO, size.
#![no_main]

#[path = "../../../src/rules/tests/plain.rs"]
mod plain;

use jiff::civil::Date;
use libfuzzer_sys::fuzz_target;
use toml::Value;
use usermilter::address::{Address, Sender};
use usermilter::rules::{Question, Rules};
use usermilter_fuzz::{fields, lines};

use plain::{Plain, plain_judge};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let fields: [&[u8]; 8] = fields(text.as_bytes(), 0);
    let [text, file, sender, recipient, address, name, helo, size] =
        fields.map(|field| std::str::from_utf8(field).expect("cut at NUL"));
    let names = Rules::sender_file_names(text);
    let mut asked = Vec::new();
    let parsed = Rules::parse(text, |name| {
        asked.push(name.to_owned());
        Some(file.to_owned())
    });
    assert!(asked.iter().all(|name| names.contains(name)), "{asked:?} of {names:?}");
    assert!(names.iter().all(|name| !name.starts_with('/') && !name.split('/').any(|part| part == "..")));
    let rules = match parsed {
        Ok(rules) => rules,
        Err(error) => {
            let line = text.split('\n').nth(error.line - 1).unwrap_or_default();
            assert!(error.line <= lines(text), "{error}");
            assert!((1..=line.chars().count() + 1).contains(&error.column), "{error}");
            return;
        }
    };
    let Ok(sender) = Sender::parse(sender.as_bytes()) else { return };
    let Ok(recipient) = Address::parse(recipient.as_bytes()) else { return };
    let question = Question {
        sender: &sender,
        recipient: &recipient,
        client_address: address.parse().ok(),
        client_name: Some(name).filter(|name| !name.is_empty()),
        helo: Some(helo).filter(|helo| !helo.is_empty()),
        size: size.parse().ok(),
        today: Date::constant(2027, 1, 15),
    };
    let ruling = rules.judge(&question);
    let is_simple = [sender.to_string(), recipient.to_string(), name.to_owned(), helo.to_owned()]
        .iter()
        .all(|text| is_simple(text));
    if let (true, Some((plain, files))) = (is_simple, read(text, file)) {
        assert_eq!(ruling.rule, plain_judge(&plain, &files, &question), "{question:?}\n{text}");
    }
});

/// The rules as the reference has them; `None` if there is something in them that it does not know.
fn read(text: &str, file: &str) -> Option<(Vec<Plain>, Vec<Vec<String>>)> {
    let table: toml::Table = text.parse().ok()?;
    let rules = match table.get("rule") {
        Some(Value::Array(rules)) => rules.clone(),
        _ => Vec::new(),
    };
    let lines: Vec<String> = file.split('\n').filter(|line| !line.is_empty()).map(str::to_owned).collect();
    if !lines.iter().all(|line| is_simple(line)) {
        return None;
    }
    let plain = rules.iter().map(|rule| {
        let rule = rule.as_table()?;
        let hosts_have_no_root = |items: &Option<Vec<String>>| {
            items.as_ref().is_none_or(|items| items.iter().all(|item| !item.ends_with('.')))
        };
        let (client, helo) = (list(rule, "client")?, list(rule, "helo")?);
        if !hosts_have_no_root(&client) || !hosts_have_no_root(&helo) {
            return None;
        }
        Some(Plain {
            sender: list(rule, "sender")?,
            sender_files: list(rule, "sender-file")?.map(|files| vec![0; files.len()]),
            recipient: list(rule, "recipient")?,
            client,
            helo,
            size_over: match rule.get("size-over") {
                None => None,
                Some(Value::Integer(size)) => Some(u64::try_from(*size).ok()?),
                Some(_) => return None,
            },
            expires: match rule.get("expires") {
                None => None,
                Some(date) => Some(date.as_datetime()?.to_string().parse().ok()?),
            },
        })
    });
    Some((plain.collect::<Option<_>>()?, vec![lines]))
}

/// `None` if an item is none for the reference, `Some(None)` if there is no such key.
fn list(rule: &toml::Table, key: &str) -> Option<Option<Vec<String>>> {
    let items = match rule.get(key) {
        None => return Some(None),
        Some(Value::String(item)) => vec![item.clone()],
        Some(Value::Array(items)) => {
            items.iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<_>>()?
        }
        Some(_) => return None,
    };
    items.iter().all(|item| is_simple(item)).then_some(Some(items))
}

/// Without what makes two spellings of one name: quotes, IDNA, literals, dots at the end.
fn is_simple(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "@.*?<>-_+=:/".contains(c);
    let at = text.matches('@').count();
    text.chars().all(plain)
        && !text.to_ascii_lowercase().contains("xn--")
        && at <= 1
        && !text.contains("..")
        && !text.ends_with('.')
        && (!text.contains(['<', '>']) || text == "<>")
}
