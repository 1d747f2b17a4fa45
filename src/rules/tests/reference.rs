//! Generated rules against the reference in `plain`, which walks what was generated, not what was parsed.

use super::plain::*;
use super::*;
use proptest::prelude::*;

const ACTIONS: [(&str, Action); 4] = [
    ("filter", Action::Filter),
    ("accept", Action::Accept),
    ("reject", Action::Reject),
    ("defer", Action::Defer),
];

/// Items of few characters, so that they often match; in any form that is understood.
fn items() -> impl Strategy<Value = Vec<String>> {
    let item = prop_oneof![
        1 => Just("<>".to_owned()),
        3 => "[abABü]{1,2}@[ab]{1,2}(\\.[aB])?",
        3 => "[ab*?ü]{0,3}@[abA*?]{1,2}(\\.[ab*])?",
        1 => "[abAB]{1,2}(\\.[abAB]{1,2})?",
        1 => "\\.[abAB]{1,2}",
        2 => "[ab*?@.]{1,6}",
    ];
    let item = item.prop_filter("an item that is understood", |i| i.parse::<AddressPattern>().is_ok());
    prop::collection::vec(item, 1..4)
}

fn host_globs() -> impl Strategy<Value = String> {
    "[abA*?]{1,2}(\\.[abB*?]{1,2})?"
}

fn clients() -> impl Strategy<Value = Vec<String>> {
    let item = prop_oneof![
        (0u8..8, 28u8..=32).prop_map(|(host, length)| format!("192.0.2.{host}/{length}")),
        (0u8..8, 124u8..=128).prop_map(|(host, length)| format!("2001:db8::{host}/{length}")),
        (0u8..8).prop_map(|host| format!("192.0.2.{host}")),
        (0u8..8).prop_map(|host| format!("2001:DB8::{host}")),
        host_globs(),
    ];
    prop::collection::vec(item, 1..4)
}

fn plain_rules() -> impl Strategy<Value = Vec<Plain>> {
    let often = |key| prop::option::weighted(0.4, key);
    let rule = (
        often(items()),
        prop::option::weighted(0.2, prop::collection::vec(0usize..2, 1..3)),
        prop::option::weighted(0.3, items()),
        prop::option::weighted(0.3, clients()),
        prop::option::weighted(0.2, prop::collection::vec(host_globs(), 1..3)),
        prop::option::weighted(0.2, 0u64..4),
        prop::option::weighted(0.2, 1i8..4),
    );
    let rule = rule.prop_map(|(sender, sender_files, recipient, client, helo, size_over, expires)| Plain {
        sender,
        sender_files,
        // No recipient is the null sender, and saying so is an error.
        recipient: recipient.map(|r| r.into_iter().map(|i| i.replace("<>", "a")).collect()),
        client,
        helo,
        size_over,
        expires: expires.map(day),
    });
    prop::collection::vec(rule, 0..5)
}

fn mails() -> impl Strategy<Value = Mail> {
    let mailbox = "[abABü]{1,2}(@[abA]{1,2}(\\.[ab]){0,2})?";
    let client = prop_oneof![
        (0u8..10).prop_map(|host| format!("192.0.2.{host}")),
        (0u8..10).prop_map(|host| format!("::ffff:192.0.2.{host}")),
        (0u8..10).prop_map(|host| format!("2001:db8::{host}")),
    ];
    let name = "[abA]{1,2}(\\.[abB]{1,2})?";
    (
        prop_oneof![1 => Just(String::new()), 9 => mailbox],
        mailbox,
        prop::option::of(client),
        prop::option::of(name),
        prop::option::of(name),
        prop::option::of(0u64..5),
        1i8..5,
    )
        .prop_map(|(from, recipient, client, client_name, helo, size, today)| Mail {
            sender: sender(&from),
            recipient: address(&recipient),
            client_address: client.map(|c| c.parse().unwrap()),
            client_name,
            helo,
            size,
            today: day(today),
        })
}

fn action_of(index: usize) -> (&'static str, Action) {
    ACTIONS[index % ACTIONS.len()]
}

fn to_toml(rules: &[Plain]) -> String {
    let mut text = String::from("default = \"defer\"\n");
    for (index, rule) in rules.iter().enumerate() {
        text += &format!("[[rule]]\naction = \"{}\"\nreply = \"rule {}\"\n", action_of(index).0, index + 1);
        let files: Option<Vec<String>> =
            rule.sender_files.as_ref().map(|files| files.iter().map(|i| format!("file{i}")).collect());
        let lists = [
            ("sender", &rule.sender),
            ("sender-file", &files),
            ("recipient", &rule.recipient),
            ("client", &rule.client),
            ("helo", &rule.helo),
        ];
        for (key, items) in lists {
            if let Some(items) = items {
                text += &format!("{key} = {items:?}\n");
            }
        }
        if let Some(size) = rule.size_over {
            text += &format!("size-over = {size}\n");
        }
        if let Some(last) = rule.expires {
            text += &format!("expires = {last}\n");
        }
    }
    text
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn judging_agrees_with_the_reference(
        plain in plain_rules(),
        files in prop::array::uniform2(items()),
        mails in prop::collection::vec(mails(), 8),
    ) {
        let text = to_toml(&plain);
        let rules = Rules::parse(&text, |name| Some(files[usize::from(name == "file1")].join("\n"))).unwrap();
        for mail in mails {
            let expected = plain_judge(&plain, &files, &mail.question());
            let ruling = rules.judge(&mail.question());
            prop_assert_eq!(ruling.rule, expected, "{:?}\n{}", mail, text);
            let action = expected.map_or(Action::Defer, |number| action_of(number - 1).1);
            prop_assert_eq!(ruling.action, action);
            let reply = expected.map(|number| format!("rule {number}"));
            prop_assert_eq!(ruling.reply, reply.as_deref());
        }
    }

    #[test]
    fn one_sender_list_agrees_with_the_reference(accept in items(), reject in items(), mail in mails()) {
        let lower = |items: &[String]| items.iter().any(|i| plain_address(&i.to_lowercase(), mail.sender.address()));
        let expected = match (lower(&accept), lower(&reject)) {
            (true, _) => Action::Accept,
            (false, true) => Action::Reject,
            (false, false) => Action::Filter,
        };
        let rules = Rules::from_sender_lists(&accept, &reject);
        prop_assert_eq!(rules.judge(&mail.question()).action, expected);
    }

    #[test]
    fn any_text_is_parsed_or_refused_without_panic(text in any::<String>(), file in any::<String>()) {
        let _ = Rules::sender_file_names(&text);
        let _ = Rules::parse(&text, |_| Some(file.clone()));
    }

    #[test]
    fn any_item_is_parsed_or_refused_without_panic(item in "[ab*?@.<>\"\\\\\\[\\]/:#ü 0-9é\u{3002}\u{df}xn-]{0,12}", mail in mails()) {
        let quoted = toml::Value::String(item.clone());
        for key in ["sender", "sender-file", "recipient", "client", "helo", "size-over"] {
            let text = format!("[[rule]]\n{key} = {quoted}\naction = \"defer\"\n");
            let names = Rules::sender_file_names(&text);
            let mut asked = Vec::new();
            let rules = Rules::parse(&text, |name| { asked.push(name.to_owned()); Some(item.clone()) });
            prop_assert_eq!(asked, names);
            match rules {
                Ok(rules) => drop(rules.judge(&mail.question())),
                Err(error) => prop_assert_eq!(error.line, 2),
            }
        }
    }

    #[test]
    fn damaged_rules_are_parsed_or_refused_without_panic(
        plain in plain_rules(), at in any::<prop::sample::Index>(), with in any::<char>(),
    ) {
        let mut chars: Vec<char> = to_toml(&plain).chars().collect();
        let at = at.index(chars.len());
        chars[at] = with;
        let text: String = chars.into_iter().collect();
        let _ = Rules::sender_file_names(&text);
        if let Err(error) = Rules::parse(&text, |_| None) {
            prop_assert!(error.line >= 1 && error.line <= text.matches('\n').count() + 1);
        }
    }

    #[test]
    fn every_address_matches_itself(address in "[^\\p{C}\\s@\"*?<>]{1,8}@[^\\p{C}\\s@\"*?<>\\[/\\\\]{1,12}") {
        if let (Ok(sender), Ok(_)) = (Sender::parse(address.as_bytes()), address.parse::<AddressPattern>()) {
            let rules = Rules::from_sender_lists(&[], &[address]);
            let mail = Mail { sender, ..mail() };
            prop_assert_eq!(rules.judge(&mail.question()).action, Action::Reject);
        }
    }
}
