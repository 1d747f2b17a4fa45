//! The promises of `rules.toml`, key by key and error by error.

mod plain;
mod reference;

use super::*;

fn no_files(_: &str) -> Option<String> {
    None
}

#[track_caller]
fn rules(text: &str) -> Rules {
    match Rules::parse(text, no_files) {
        Ok(rules) => rules,
        Err(error) => panic!("{error}\n{text}"),
    }
}

#[track_caller]
fn error(text: &str) -> RulesError {
    Rules::parse(text, no_files).unwrap_err()
}

/// That parsing fails at this place with a message that has these words.
#[track_caller]
fn check_error(text: &str, line: usize, column: usize, words: &str) {
    let error = error(text);
    assert_eq!((error.line, error.column), (line, column), "{error}\n{text}");
    assert!(error.message.contains(words), "{error}");
}

/// A question that owns what it asks about.
#[derive(Clone, Debug)]
struct Mail {
    sender: Sender,
    recipient: Address,
    client_address: Option<IpAddr>,
    client_name: Option<String>,
    helo: Option<String>,
    size: Option<u64>,
    today: Date,
}

impl Mail {
    fn question(&self) -> Question<'_> {
        Question {
            sender: &self.sender,
            recipient: &self.recipient,
            client_address: self.client_address,
            client_name: self.client_name.as_deref(),
            helo: self.helo.as_deref(),
            size: self.size,
            today: self.today,
        }
    }
}

/// From bob@example.net to alice@example.org, nothing else known.
fn mail() -> Mail {
    Mail {
        sender: sender("bob@example.net"),
        recipient: address("alice@example.org"),
        client_address: None,
        client_name: None,
        helo: None,
        size: None,
        today: day(15),
    }
}

fn address(text: &str) -> Address {
    Address::parse(text.as_bytes()).unwrap()
}

fn sender(text: &str) -> Sender {
    Sender::parse(text.as_bytes()).unwrap()
}

/// A day of January 2027.
fn day(day: i8) -> Date {
    Date::new(2027, 1, day).unwrap()
}

/// Whether a rule with these keys matches.
#[track_caller]
fn matches(keys: &str, mail: &Mail) -> bool {
    let rules = rules(&format!("[[rule]]\n{keys}\naction = \"reject\"\n"));
    rules.judge(&mail.question()).rule.is_some()
}

#[test]
fn the_rules_file_of_the_manual_is_understood() {
    let text = r#"
        mixed = "redirect"
        redirect-extension = "junk"
        default = "filter"
        [[rule]]
        sender = ["*@example.com", "<>"]
        sender-file = ["friends.txt"]
        recipient = ["alice+shop@*"]
        client = ["192.0.2.0/24", "2001:db8::/32", "192.0.2.7", "*.dyn.example.net"]
        helo = ["localhost"]
        size-over = "10M"
        action = "reject"
        reply = "5.7.1 not to this address"
        expires = 2027-01-31
    "#;
    let rules =
        Rules::parse(text, |name| (name == "friends.txt").then(|| "bob@example.com\n".to_owned())).unwrap();
    assert_eq!(rules.mixed(), Some(Mixed::Redirect));
    assert_eq!(rules.redirect_extension(), Some("junk"));
    assert!(!rules.is_empty());
    let mail = Mail {
        sender: sender("Bob@Example.com"),
        recipient: address("alice+shop@example.org"),
        client_address: Some("192.0.2.99".parse().unwrap()),
        client_name: None,
        helo: Some("LOCALHOST".to_owned()),
        size: Some((10 << 20) + 1),
        today: day(31),
    };
    let ruling = Ruling {
        action: Action::Reject,
        reply: Some("5.7.1 not to this address"),
        rule: Some(1),
        waits_for_size: WaitsForSize::default(),
    };
    assert_eq!(rules.judge(&mail.question()), ruling);
    // All keys must match: each alone, changed, undoes it.
    let undone = [
        Mail { sender: sender("carol@example.com"), ..mail.clone() },
        Mail { recipient: address("alice@example.org"), ..mail.clone() },
        Mail { client_address: None, ..mail.clone() },
        Mail { helo: None, ..mail.clone() },
        Mail { size: Some(10 << 20), ..mail.clone() },
        Mail { today: Date::new(2027, 2, 1).unwrap(), ..mail.clone() },
    ];
    for other in undone {
        let ruling = rules.judge(&other.question());
        assert_eq!(ruling.rule, None, "{other:?}");
        let waits = WaitsForSize { accept: other.size != mail.size, refusal: false };
        assert_eq!(ruling.waits_for_size, waits, "{other:?}");
    }
}

#[test]
fn an_empty_file_leaves_everything_to_the_filters() {
    let rules = rules("# nothing yet\n");
    assert!(rules.is_empty());
    assert_eq!((rules.mixed(), rules.redirect_extension()), (None, None));
    let ruling =
        Ruling { action: Action::Filter, reply: None, rule: None, waits_for_size: WaitsForSize::default() };
    assert_eq!(rules.judge(&mail().question()), ruling);
}

#[test]
fn an_answer_waits_for_the_size_only_if_a_rule_before_it_does() {
    let rules = rules(
        r#"
        [[rule]]
        helo = ["x"]
        size-over = 5
        action = "reject"
        [[rule]]
        sender = ["friend@example.com"]
        action = "accept"
        [[rule]]
        size-over = 100
        action = "reject"
    "#,
    );
    let ask = |helo: &str, from: &str, size| {
        let mail = Mail { helo: Some(helo.to_owned()), sender: sender(from), size, ..mail() };
        let ruling = rules.judge(&mail.question());
        (ruling.rule, ruling.waits_for_size.accept)
    };
    assert_eq!(ask("y", "friend@example.com", None), (Some(2), false));
    assert_eq!(ask("x", "friend@example.com", None), (Some(2), true));
    assert_eq!(ask("x", "friend@example.com", Some(5)), (Some(2), true));
    assert_eq!(ask("x", "friend@example.com", Some(6)), (Some(1), false));
    assert_eq!(ask("y", "other@example.com", Some(100)), (None, true));
    assert_eq!(ask("y", "other@example.com", Some(101)), (Some(3), false));
}

#[test]
fn what_says_the_same_of_a_larger_message_is_not_waited_for() {
    let waits = |larger: &str, small: &str| {
        let text = format!("default = \"{small}\"\n[[rule]]\nsize-over = 5\naction = \"{larger}\"\n");
        let waits = rules(&text).judge(&mail().question()).waits_for_size;
        (waits.accept, waits.refusal)
    };
    for action in ["accept", "reject", "defer", "filter"] {
        assert_eq!(waits(action, action), (false, false), "{action}");
    }
    // What rules say themselves, and, where they leave it to filters, what those say.
    assert_eq!(waits("filter", "accept"), (true, true));
    assert_eq!(waits("reject", "accept"), (true, false));
    assert!(waits("accept", "reject").1 && waits("filter", "reject").1 && waits("defer", "reject").1);
    assert!(waits("accept", "defer").1 && waits("filter", "defer").1);
    assert_eq!(waits("reject", "defer"), (true, false), "who is put off may come again");
    assert_eq!(waits("accept", "filter"), (false, true));
    assert_eq!(waits("reject", "filter"), (true, false));
}

#[test]
fn the_default_is_for_what_no_rule_matches() {
    for (name, action) in [
        ("filter", Action::Filter),
        ("accept", Action::Accept),
        ("reject", Action::Reject),
        ("defer", Action::Defer),
    ] {
        let rules =
            rules(&format!("default = \"{name}\"\n[[rule]]\nhelo=\"x\"\naction=\"accept\"\nreply=\"r\""));
        let ruling = Ruling { action, reply: None, rule: None, waits_for_size: WaitsForSize::default() };
        assert_eq!(rules.judge(&mail().question()), ruling);
        assert!(!rules.is_empty());
    }
    assert!(!rules("default = \"defer\"").is_empty());
    assert!(rules("default = \"filter\"\nmixed = \"drop\"").is_empty());
}

#[test]
fn the_first_rule_that_matches_wins() {
    let rules = rules(
        "[[rule]]\nsender = \"x@*\"\naction = \"accept\"\n\
         [[rule]]\nsender = \"b*@*\"\naction = \"defer\"\nreply = \"4.7.1 later\"\n\
         [[rule]]\naction = \"reject\"\n",
    );
    let ruling = rules.judge(&Question { ..mail().question() });
    assert_eq!((ruling.rule, ruling.action, ruling.reply), (Some(2), Action::Defer, Some("4.7.1 later")));
    let other = Mail { sender: Sender::Null, ..mail() };
    assert_eq!(rules.judge(&other.question()).rule, Some(3));
}

#[test]
fn a_rule_without_conditions_matches_everything() {
    assert!(matches("", &mail()));
}

#[test]
fn a_string_is_a_list_of_one() {
    for key in ["sender", "recipient"] {
        assert!(matches(&format!("{key} = \"*\""), &mail()));
        assert!(matches(&format!("{key} = [\"x\", \"*\"]"), &mail()));
        assert!(!matches(&format!("{key} = \"x\""), &mail()));
    }
}

#[test]
fn the_recipient_is_matched_like_a_sender() {
    let shop = Mail { recipient: address("Alice+Shop@example.org"), ..mail() };
    assert!(matches("recipient = \"alice+shop@*\"", &shop));
    assert!(!matches("recipient = \"alice+shop@*\"", &mail()));
    assert!(matches("recipient = \"@example.org\"", &mail()));
    let bare = Mail { recipient: address("alice"), ..mail() };
    assert!(matches("recipient = \"ALICE\"", &bare));
}

#[test]
fn networks_match_clients_of_their_family_and_mapped_ones() {
    let from = |client: &str| Mail { client_address: Some(client.parse().unwrap()), ..mail() };
    let four = "client = [\"192.0.2.0/25\", \"198.51.100.7\"]";
    assert!(matches(four, &from("192.0.2.127")));
    assert!(matches(four, &from("::ffff:192.0.2.127")));
    assert!(matches(four, &from("198.51.100.7")));
    assert!(!matches(four, &from("192.0.2.128")));
    assert!(!matches(four, &from("2001:db8::1")));
    assert!(!matches(four, &mail()));
    let six = "client = \"2001:DB8::/32\"";
    assert!(matches(six, &from("2001:db8:ffff::1")));
    assert!(!matches(six, &from("2001:db9::1")));
    assert!(matches("client = \"::ffff:192.0.2.0/120\"", &from("192.0.2.9")));
    assert!(matches("client = \"192.0.2.99/24\"", &from("192.0.2.1")));
}

#[test]
fn client_globs_match_the_verified_name_only() {
    let from = |name: Option<&str>| Mail {
        client_name: name.map(str::to_owned),
        client_address: Some("192.0.2.1".parse().unwrap()),
        ..mail()
    };
    let rule = "client = \"*.Dyn.example.net\"";
    assert!(matches(rule, &from(Some("host.DYN.example.net."))));
    assert!(!matches(rule, &from(Some("dyn.example.net"))));
    assert!(!matches("client = \"*\"", &from(None)));
    assert!(matches("client = \"*.bücher.example\"", &from(Some("a.xn--bcher-kva.example"))));
}

#[test]
fn helo_names_match_in_any_case() {
    let helo = |name: &str| Mail { helo: Some(name.to_owned()), ..mail() };
    assert!(matches("helo = \"LocalHost\"", &helo("lOCALhOST")));
    assert!(matches("helo = \"[192.0.2.*]\"", &helo("[192.0.2.1]")));
    assert!(matches("helo = \"bücher.example\"", &helo("BÜCHER.example")));
    assert!(matches("helo = \"?.example\"", &helo("a.example.")));
    assert!(!matches("helo = \"localhost\"", &helo("localhost.example")));
    assert!(!matches("helo = \"*\"", &mail()));
}

#[test]
fn a_size_must_be_known_and_over_the_limit() {
    let size = |size| Mail { size, ..mail() };
    assert!(matches("size-over = \"1K\"", &size(Some(1025))));
    assert!(!matches("size-over = \"1K\"", &size(Some(1024))));
    assert!(!matches("size-over = 0", &size(None)));
    assert!(matches("size-over = 5", &size(Some(6))));
}

#[test]
fn a_rule_is_in_force_through_the_day_it_expires() {
    let on = |d| Mail { today: day(d), ..mail() };
    assert!(matches("expires = 2027-01-15", &on(14)));
    assert!(matches("expires = 2027-01-15", &on(15)));
    assert!(!matches("expires = 2027-01-15", &on(16)));
}

#[test]
fn sender_files_are_asked_for_once_and_any_of_them_may_match() {
    let text = "[[rule]]\nsender-file = [\"a\", \"lists/b\", \"a\"]\naction = \"accept\"\n\
                [[rule]]\nsender-file = \"a\"\naction = \"reject\"";
    let mut asked = Vec::new();
    let rules = Rules::parse(text, |name| {
        asked.push(name.to_owned());
        Some(match name {
            "a" => "# a\nalice@example.net".to_owned(),
            _ => "<>\n.example.com".to_owned(),
        })
    })
    .unwrap();
    assert_eq!(asked, ["a", "lists/b"]);
    for (from, rule) in [
        ("alice@example.net", Some(1)),
        ("", Some(1)),
        ("x@y.example.com", Some(1)),
        ("bob@example.net", None),
    ] {
        let mail = Mail { sender: sender(from), ..mail() };
        assert_eq!(rules.judge(&mail.question()).rule, rule, "{from}");
    }
}

#[test]
fn directory_lists_accept_before_they_reject_and_skip_what_they_cannot_read() {
    let list = |items: &[&str]| items.iter().map(|i| (*i).to_owned()).collect::<Vec<_>>();
    let rules = Rules::from_sender_lists(
        &list(&["", "a b", "bob@spam.example", "friend.example"]),
        &list(&["@spam.example", ".bad.example", "*spam*@*", "a@@b", "<>"]),
    );
    for (from, action) in [
        ("bob@spam.example", Action::Accept),
        ("x@friend.example", Action::Accept),
        ("x@sub.friend.example", Action::Filter),
        ("eve@spam.example", Action::Reject),
        ("x@bad.example", Action::Reject),
        ("x@very.bad.example", Action::Reject),
        ("my.spam.1@good.example", Action::Reject),
        ("", Action::Reject),
        ("x@good.example", Action::Filter),
    ] {
        let mail = Mail { sender: sender(from), ..mail() };
        assert_eq!(rules.judge(&mail.question()).action, action, "{from}");
    }
    assert!(Rules::from_sender_lists(&[], &list(&["a b"])).is_empty());
    assert!(!Rules::from_sender_lists(&[], &list(&["a@b.example"])).is_empty());
}

#[test]
fn names_of_sender_files_are_those_that_parsing_asks_for() {
    let text = "[[rule]]\nsender-file = [\"a.txt\", \"../b\", \"/etc/passwd\", \".hidden\", \"x/../y\", \"\", \"c\\u0000\"]\n\
                action = \"accept\"\nclient = \"no/network\"\n\
                [[rule]]\nsender-file = \"lists/d\"\naction = \"accept\"\n\
                [[rule]]\nsender-file = \"a.txt\"\naction = \"accept\"\n";
    assert_eq!(Rules::sender_file_names(text), ["a.txt", "lists/d"]);
    assert!(Rules::sender_file_names("[[rule]]\nsender-file = \"a\"\nactoin = \"accept\"").is_empty());
    let many: Vec<String> = (0..20).map(|n| format!("\"f{n}\"")).collect();
    let text = format!("[[rule]]\nsender-file = [{}]\naction = \"accept\"", many.join(","));
    assert_eq!(Rules::sender_file_names(&text).len(), MAX_SENDER_FILES);
}

#[test]
fn errors_say_line_and_column_as_editors_do() {
    assert_eq!(
        error("default = \"maybe\"").to_string(),
        "1:11: unknown variant `maybe`, expected one of `filter`, `accept`, `reject`, `defer`"
    );
    check_error("\u{feff}default = \"maybe\"", 1, 11, "maybe");
    check_error("default = \"accept\"\r\nmixed = \"bin\"\r\n", 2, 9, "`deliver`");
}

#[test]
fn what_is_not_toml_is_refused_where_it_is() {
    check_error("default = \"filter\"\n[[rule]\n", 2, 8, "expected");
    check_error("default = filter\n", 1, 11, "");
    check_error("mixed = \"drop\"\nmixed = \"drop\"\n", 2, 1, "duplicate key");
}

#[test]
fn deep_nesting_is_refused_and_does_not_exhaust_the_stack() {
    let deep = 100_000;
    for text in [
        format!("rule = {}", "[".repeat(deep)),
        format!("rule = {}{}", "[".repeat(deep), "]".repeat(deep)),
        format!("rule = {}", "{a=".repeat(deep)),
        format!("{}a = 1", "a.".repeat(deep)),
        format!("[{}a]", "a.".repeat(deep)),
        format!("[[rule]]\nhelo = {{{}a = 1}}", "a.".repeat(deep)),
    ] {
        assert!(Rules::parse(&text, no_files).is_err());
    }
}

#[test]
fn unknown_keys_are_refused() {
    check_error("defualt = \"accept\"", 1, 1, "expected one of `mixed`");
    check_error(
        "[[rule]]\naction = \"accept\"\n  sneder = \"x\"\n",
        3,
        3,
        "expected one of `sender`, `sender-file`",
    );
}

#[test]
fn a_rule_must_have_an_action_that_exists() {
    check_error("[[rule]]\naction = \"accept\"\n\n[[rule]]\nhelo = \"x\"\n", 4, 1, "missing field `action`");
    check_error("[[rule]]\naction = \"bounce\"\n", 2, 10, "expected one of `filter`");
    check_error("[[rule]]\naction = 1\n", 2, 10, "string");
}

#[test]
fn values_of_another_type_are_refused() {
    check_error("[[rule]]\nsender = 1\n", 2, 10, "a string or a list of strings");
    check_error("[[rule]]\nsender = [\"a\",\n  1]\n", 3, 3, "string");
    check_error("rule = 1", 1, 8, "sequence");
    check_error("[[rule]]\nreply = [\"a\"]\n", 2, 9, "string");
    check_error("redirect-extension = 1", 1, 22, "string");
}

#[test]
fn an_empty_list_or_item_is_refused() {
    for key in ["sender", "sender-file", "recipient", "client", "helo"] {
        let at = key.len() + 4;
        check_error(&format!("[[rule]]\naction=\"defer\"\n{key} = []"), 3, at, "at least one item");
        check_error(&format!("[[rule]]\naction=\"defer\"\n{key} = \" \""), 3, at, "empty");
        check_error(&format!("[[rule]]\naction=\"defer\"\n{key} = [\n\"\"]"), 4, 1, "empty");
    }
}

#[test]
fn bad_items_are_refused_where_they_are() {
    for (key, item, words) in [
        ("sender", "a@b c@d", "white space"),
        ("sender", "a@b/c", "no valid domain"),
        ("sender", "*@b*ü.example", "b*ü"),
        ("recipient", "<>", "no recipient is <>"),
        ("recipient", "a@b@c", "more than one @"),
        ("client", "192.0.2.0/33", "CIDR"),
        ("client", "2001:db8::/129", "CIDR"),
        ("client", "*.ü*", "A-label"),
        ("helo", "*ü", "A-label"),
        ("helo", "a\\tb", "control character"),
    ] {
        // The é is two bytes and one column.
        let text = format!("[[rule]]\naction = \"defer\"\n{key} = [\n  \"é\", \"{item}\"]\n");
        check_error(&text, 4, 8, words);
    }
    let long = "a".repeat(MAX_PATTERN_LENGTH + 1);
    check_error(&format!("[[rule]]\naction = \"defer\"\nhelo = \"{long}\""), 3, 8, "at most 1024");
}

#[test]
fn bad_sizes_and_dates_are_refused_where_they_are() {
    for (key, value) in [
        ("size-over", "\"10T\""),
        ("size-over", "\"\""),
        ("size-over", "-1"),
        ("size-over", "1.5"),
        ("expires", "\"2027-01-31\""),
        ("expires", "2027-01-31T00:00:00Z"),
        ("expires", "2027-01-31T00:00:00"),
        ("expires", "00:00:00"),
        ("expires", "2027-02-29"),
    ] {
        let text = format!("[[rule]]\naction = \"defer\"\n{key} = {value}\n");
        let error = error(&text);
        assert_eq!(error.line, 3, "{error}");
        assert_eq!(error.column, key.len() + 4, "{value}: {error}");
    }
    check_error("[[rule]]\naction = \"defer\"\nexpires = 00:00:00", 3, 11, "such as 2027-01-31");
    check_error("[[rule]]\naction = \"defer\"\nsize-over = \"9X\"", 3, 13, "a size in bytes");
}

#[test]
fn bad_redirect_extensions_are_refused() {
    for bad in ["", ".junk", "a/b", "a@b", "a b", "a\\u0007", "\\u00a0"] {
        check_error(&format!("redirect-extension = \"{bad}\""), 1, 22, "expected an address extension");
    }
    assert_eq!(rules("redirect-extension = \"junk.mail\"").redirect_extension(), Some("junk.mail"));
}

#[test]
fn sender_files_outside_the_directory_are_refused() {
    for (name, words) in [
        ("/etc/passwd", "absolute"),
        ("../x", "leading dot"),
        ("a/../../x", ".."),
        (".hidden", "leading dot"),
        ("a\\u0000b", "control character"),
    ] {
        let text = format!("[[rule]]\naction = \"defer\"\nsender-file = [\"{name}\"]\n");
        let error = Rules::parse(&text, |_| panic!("must not be asked for")).unwrap_err();
        assert_eq!((error.line, error.column), (3, 16), "{error}");
        assert!(error.message.contains(words), "{error}");
    }
}

#[test]
fn a_missing_or_bad_sender_file_is_an_error_where_it_is_named() {
    let text = "[[rule]]\naction = \"defer\"\nsender-file = [\"good\",\n \"friends.txt\"]\n";
    let friends = |friends: Option<&str>| {
        Rules::parse(text, |name| match name {
            "good" => Some(String::new()),
            _ => friends.map(str::to_owned),
        })
    };
    assert!(friends(Some("a@b.example")).is_ok());
    assert_eq!(
        friends(None).unwrap_err().to_string(),
        "4:2: no sender-file \"friends.txt\" that can be read"
    );
    let error = friends(Some("a@b.example\n\nc@d.example e@f.example\n")).unwrap_err();
    assert_eq!((error.line, error.column), (4, 2));
    assert!(error.message.starts_with("sender-file \"friends.txt\" line 3: white space"), "{error}");
}

#[test]
fn what_exceeds_a_limit_is_refused_at_the_first_too_many() {
    let rule = "[[rule]]\naction = \"defer\"\n";
    assert!(Rules::parse(&rule.repeat(MAX_RULES), no_files).is_ok());
    check_error(&rule.repeat(MAX_RULES + 1), 2 * MAX_RULES + 1, 1, "too many rules");

    let items = |n: usize| vec!["\"a@b.example\""; n].join(",");
    let text = |n| format!("{rule}sender = \"x\"\nrecipient = [{}]", items(n));
    assert!(Rules::parse(&text(MAX_PATTERNS - 1), no_files).is_ok());
    check_error(&text(MAX_PATTERNS), 4, 13, "too many items");

    let files: Vec<String> = (0..=MAX_SENDER_FILES).map(|n| format!("\"f{n:02}\"")).collect();
    let text = |n| format!("{rule}sender-file = [{}]", files[..n].join(","));
    assert!(Rules::parse(&text(MAX_SENDER_FILES), |_| Some(String::new())).is_ok());
    let error = Rules::parse(&text(MAX_SENDER_FILES + 1), |_| Some(String::new())).unwrap_err();
    assert_eq!((error.line, error.column), (3, 16 + 6 * MAX_SENDER_FILES));

    let lines = "\n".repeat(MAX_SENDER_LINES);
    assert!(Rules::parse(&text(1), |_| Some(lines.clone())).is_ok());
    let error = Rules::parse(&text(2), |name| match name {
        "f00" => Some(lines.clone()),
        _ => Some("a@b.example".to_owned()),
    })
    .unwrap_err();
    assert_eq!((error.line, error.column), (3, 22));
    assert!(error.message.contains("1000000 lines"), "{error}");
}

#[test]
fn globs_of_a_sender_file_count_for_each_rule_that_names_it() {
    // A hundred globs of a thousand characters: one mention fits, a second does not.
    let file = format!("{}*\n", "a".repeat(999)).repeat(100);
    let rule = "[[rule]]\naction = \"defer\"\nsender-file = \"f\"\n";
    let parse = |text: &str| Rules::parse(text, |_| Some(file.clone()));
    assert!(parse(rule).is_ok());
    let error = parse(&rule.repeat(2)).unwrap_err();
    assert_eq!((error.line, error.column), (6, 15));
    assert!(error.message.contains("too many globs"), "{error}");
}
