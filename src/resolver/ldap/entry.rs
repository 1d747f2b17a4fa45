//! What an entry of a directory means. Pure: no I/O.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use ldap3::{asn1::StructureTag, dn_escape};

use super::{Found, LdapAnswer};
use crate::{
    address::Address,
    config::ldap::{AttributeName, LdapConfig, split_options},
    rules::Rules,
    user::{Account, ProgramName, User, UserName},
};

/// Most values read of one attribute. Users write their lists themselves, and each is kept in memory.
const MAX_VALUES: usize = 10_000;

/// BER tag of a SearchResultEntry (RFC 4511 §4.5.2).
const SEARCH_RESULT_ENTRY: u64 = 4;

/// An entry as the server sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    dn: String,
    /// Attribute descriptions and their values.
    attributes: Vec<(String, Vec<Vec<u8>>)>,
}

impl Entry {
    /// Takes a SearchResultEntry apart; `None` if it is none (ldap3's own reader panics there).
    pub(super) fn from_ber(tag: StructureTag) -> Option<Self> {
        let mut parts = tag.match_id(SEARCH_RESULT_ENTRY)?.expect_constructed()?.into_iter();
        let dn = String::from_utf8(parts.next()?.expect_primitive()?).ok()?;
        let attributes = parts
            .next()?
            .expect_constructed()?
            .into_iter()
            .map(|attribute| {
                let mut parts = attribute.expect_constructed()?.into_iter();
                let description = String::from_utf8(parts.next()?.expect_primitive()?).ok()?;
                let values = parts.next()?.expect_constructed()?;
                let values = values.into_iter().map(StructureTag::expect_primitive);
                Some((description, values.collect::<Option<_>>()?))
            })
            .collect::<Option<_>>()?;
        Some(Self { dn, attributes })
    }

    /// The values of an attribute under all its descriptions, in the order of the server.
    fn values(&self, name: &AttributeName) -> Result<Vec<&str>, String> {
        let mut all = Vec::new();
        for (description, values) in &self.attributes {
            if !name.covers(description) {
                continue;
            }
            // Active Directory's way to send a long attribute in parts: half a list is not the user's list.
            if split_options(description).1.iter().any(|option| option.starts_with("range=")) {
                return Err(format!("only part of attribute {} was sent", name.as_str()));
            }
            if values.len() > MAX_VALUES {
                return Err(format!("more than {MAX_VALUES} values of attribute {}", name.as_str()));
            }
            for value in values {
                let value = std::str::from_utf8(value)
                    .map_err(|_| format!("a value of attribute {} is no text", name.as_str()))?;
                if !value.is_empty() {
                    all.push(value);
                }
            }
        }
        Ok(all)
    }

    /// The value of an attribute that can have only one meaning.
    fn value(&self, name: Option<&AttributeName>) -> Result<Option<&str>, String> {
        let Some(name) = name else { return Ok(None) };
        match self.values(name)?[..] {
            [] => Ok(None),
            [value] => Ok(Some(value)),
            [first, ref rest @ ..] if rest.iter().all(|value| *value == first) => Ok(Some(first)),
            _ => Err(format!("several values of attribute {}", name.as_str())),
        }
    }

    fn list(&self, name: Option<&AttributeName>) -> Result<Vec<&str>, String> {
        name.map_or(Ok(Vec::new()), |name| self.values(name))
    }
}

/// What the entries that a search for `address` gave mean together.
///
/// # Errors
///
/// Why nothing can be made of them, with their names. This is never "nobody has that address".
pub(super) fn answer(
    entries: &[Entry],
    address: &Address,
    config: &LdapConfig,
) -> Result<LdapAnswer, String> {
    match entries {
        [] => Ok(LdapAnswer::NotFound),
        [entry] => interpret(entry, address, config)
            .map_err(|reason| format!("entry {:?} is refused: {reason}", entry.dn)),
        several => {
            let names: Vec<String> = several.iter().map(|entry| format!("{:?}", entry.dn)).collect();
            Err(format!("more than one entry: {}", names.join(", ")))
        }
    }
}

fn interpret(entry: &Entry, address: &Address, config: &LdapConfig) -> Result<LdapAnswer, String> {
    let attributes = &config.attributes;
    let uid = entry.value(attributes.uid.as_ref())?;
    let gid = entry.value(attributes.gid.as_ref())?;
    let home = entry.value(attributes.home.as_ref())?;
    let forward = entry.list(config.forward_attribute.as_ref())?;
    if !forward.is_empty() && uid.is_none() && home.is_none() {
        return forward
            .into_iter()
            .map(|target| {
                Address::parse(target.as_bytes()).map_err(|error| format!("target {target:?}: {error}"))
            })
            .collect::<Result<_, _>>()
            .map(LdapAnswer::Forward);
    }

    let name = name_of(entry, &attributes.name)?;
    let uid = id("uid", uid, config.default_uid)?;
    let gid = id("gid", gid, config.default_gid)?;
    let home = match (home, &config.default_home) {
        (Some(home), _) => PathBuf::from(home),
        (None, Some(template)) => {
            // Not what the sender wrote: a directory finds alice as ALICE too, and under her other addresses.
            let (local, domain) = match name.as_str().rsplit_once('@') {
                Some((local, domain)) => (local, Some(domain)),
                None => (name.as_str(), address.domain()),
            };
            template
                .home_of(local, domain)
                .ok_or_else(|| format!("default-home can't be made of the name {:?}", name.as_str()))?
        }
        (None, None) => return Err("no home and no default-home".into()),
    };
    if !is_plain_absolute(&home) {
        return Err(format!("{home:?} is no home"));
    }
    let program = entry.value(attributes.filter.as_ref())?;
    let program = program.map(|name| ProgramName::try_from(name.to_owned())).transpose()?;
    let accept_senders = senders(entry.list(attributes.accept_senders.as_ref())?);
    let reject_senders = senders(entry.list(attributes.reject_senders.as_ref())?);
    let has_lists = !accept_senders.is_empty() || !reject_senders.is_empty();
    Ok(LdapAnswer::Found(Found {
        user: User { name, account: Account::Virtual { uid, gid, home }, program },
        rules: has_lists.then(|| Arc::new(Rules::from_sender_lists(&accept_senders, &reject_senders))),
        accept_senders,
        reject_senders,
        dn: entry.dn.clone(),
    }))
}

/// The name of a user. Of several the one that the entry itself is called by, else the least, so that it is the
/// same every time (servers return values in any order).
fn name_of(entry: &Entry, attribute: &AttributeName) -> Result<UserName, String> {
    let values = entry.values(attribute)?;
    let distinguished = values.iter().find(|value| {
        let rdn = format!("{}={}", attribute.as_str(), dn_escape(**value));
        match entry.dn.split_at_checked(rdn.len()) {
            Some((start, rest)) => {
                start.eq_ignore_ascii_case(&rdn) && (rest.is_empty() || rest.starts_with([',', '+']))
            }
            None => false,
        }
    });
    let name = distinguished
        .or_else(|| values.iter().min())
        .ok_or_else(|| format!("no attribute {}", attribute.as_str()))?;
    UserName::try_from((*name).to_owned())
}

/// An id that a process can take on: not root's, and not (uid_t)-1, which set*id reads as "leave unchanged".
fn id(what: &str, value: Option<&str>, default: Option<u32>) -> Result<u32, String> {
    let Some(value) = value else {
        return default.ok_or_else(|| format!("no {what} and no default-{what}"));
    };
    let digits = value.bytes().all(|byte| byte.is_ascii_digit());
    match value.parse() {
        Ok(id) if digits && id != 0 && id != u32::MAX => Ok(id),
        _ => Err(format!("{value:?} is no {what} of a user")),
    }
}

/// The monitor resolves links and checks `virtual-homes`; here only what can't be meant is refused.
fn is_plain_absolute(home: &Path) -> bool {
    home.is_absolute()
        && !home.components().any(|part| part == Component::ParentDir)
        && !home.to_string_lossy().contains(char::is_control)
}

/// Sender patterns as `rules.toml` has them.
fn senders(values: Vec<&str>) -> Vec<String> {
    let mut patterns: Vec<String> = values.into_iter().flat_map(sender_patterns).collect();
    patterns.sort();
    patterns.dedup();
    patterns
}

/// Lists kept for amavis have forms of their own, none of which could be an address (amavisd's README.lookups):
/// `@example.org` is anybody there, `@.example.org` and in the domains below too, `@.` is anybody at all.
fn sender_patterns(value: &str) -> Vec<String> {
    match value.strip_prefix('@') {
        None => vec![value.to_owned()],
        Some(".") => vec!["*".into()],
        Some(domain) => match domain.strip_prefix('.') {
            None => vec![format!("*@{domain}")],
            Some(domain) => vec![format!("*@{domain}"), format!("*@*.{domain}")],
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::{Config, ResolverConfig};

    fn config(extra: &str) -> LdapConfig {
        let text = format!(
            "[[resolver]]\ntype = \"ldap\"\nuri = [\"ldap://a\"]\nbase = \"dc=x\"\nfilter = \"(mail=%s)\"\n{extra}"
        );
        let config = Config::parse(&text, Path::new("u.toml")).unwrap();
        match config.resolvers.into_iter().next() {
            Some(ResolverConfig::Ldap(config)) => *config,
            other => panic!("{other:?}"),
        }
    }

    fn entry(attributes: &[(&str, &[&str])]) -> Entry {
        Entry {
            dn: "uid=alice,dc=x".into(),
            attributes: attributes
                .iter()
                .map(|(name, values)| {
                    let values = values.iter().map(|value| value.as_bytes().to_vec());
                    ((*name).to_owned(), values.collect())
                })
                .collect(),
        }
    }

    fn read(attributes: &[(&str, &[&str])], extra: &str) -> Result<LdapAnswer, String> {
        let address = Address::parse(b"Alice@example.org").unwrap();
        answer(&[entry(attributes)], &address, &config(extra))
    }

    fn found(attributes: &[(&str, &[&str])], extra: &str) -> Found {
        match read(attributes, extra) {
            Ok(LdapAnswer::Found(found)) => found,
            other => panic!("{other:?}"),
        }
    }

    const COMPLETE: [(&str, &[&str]); 4] = [
        ("uid", &["alice"]),
        ("uidNumber", &["5001"]),
        ("gidNumber", &["5002"]),
        ("homeDirectory", &["/var/vmail/alice"]),
    ];

    fn with<'a>(name: &'a str, values: &'a [&'a str]) -> Vec<(&'a str, &'a [&'a str])> {
        let kept = COMPLETE.into_iter().filter(|(other, _)| *other != name);
        kept.chain([(name, values)]).collect()
    }

    #[test]
    fn a_complete_entry_is_a_virtual_user() {
        let found = found(&COMPLETE, "");
        assert_eq!(found.user.name.as_str(), "alice");
        assert_eq!(
            found.user.account,
            Account::Virtual { uid: 5001, gid: 5002, home: "/var/vmail/alice".into() }
        );
        assert_eq!(found.dn, "uid=alice,dc=x");
    }

    #[test]
    fn what_an_entry_lacks_comes_from_the_defaults() {
        let defaults = "default-uid = 5000\ndefault-gid = 5000\ndefault-home = \"/var/vmail/%d/%u\"";
        let home_of = |attributes: &[(&str, &[&str])], extra: &str| {
            let Account::Virtual { home, .. } = found(attributes, extra).user.account else { panic!() };
            home
        };
        assert_eq!(home_of(&[("uid", &["alice"])], defaults), Path::new("/var/vmail/example.org/alice"));
        let by_mail = format!("{defaults}\nattributes = {{ name = \"mail\" }}");
        assert_eq!(
            home_of(&[("mail", &["alice@other.example"])], &by_mail),
            Path::new("/var/vmail/other.example/alice")
        );
        for missing in ["uidNumber", "gidNumber", "homeDirectory", "uid"] {
            let rest: Vec<_> = COMPLETE.into_iter().filter(|(n, _)| *n != missing).collect();
            assert!(read(&rest, "").unwrap_err().contains("no "), "{missing}");
        }
    }

    #[test]
    fn ids_that_no_user_can_have_are_refused_with_the_name_of_the_entry() {
        for bad in [
            "0",
            "-1",
            "+5",
            " 5",
            "abc",
            "5001x",
            "4294967295",
            "4294967296",
            "99999999999999999999",
            "0x10",
        ] {
            for attribute in ["uidNumber", "gidNumber"] {
                let error =
                    read(&with(attribute, &[bad]), "default-uid = 5000\ndefault-gid = 5000").unwrap_err();
                assert!(error.contains("uid=alice,dc=x"), "{error}");
            }
        }
        assert!(read(&with("uidNumber", &["4294967294"]), "").is_ok());
        assert!(read(&with("uidNumber", &["5001", "5002"]), "").is_err());
    }

    #[test]
    fn names_and_homes_that_are_none_are_refused() {
        for bad in ["../x", "-x", "a/b", "a b", "a\nb", "a:b"] {
            assert!(read(&with("uid", &[bad]), "").is_err(), "{bad}");
        }
        for bad in ["var/vmail", "/var/vmail/../../etc", "/var/\nvmail", ".."] {
            assert!(read(&with("homeDirectory", &[bad]), "").is_err(), "{bad}");
        }
        let template = "default-home = \"/var/vmail/%u\"\nattributes = { home = \"\" }";
        assert!(read(&with("uid", &["..@example.org"]), template).is_err());
    }

    #[test]
    fn of_several_names_the_distinguished_one_counts_whatever_the_order() {
        for order in [&["aaa", "Alice"][..], &["Alice", "aaa"]] {
            assert_eq!(found(&with("uid", order), "").user.name.as_str(), "Alice");
        }
        for order in [&["zoe", "bob"][..], &["bob", "zoe"]] {
            assert_eq!(found(&with("uid", order), "").user.name.as_str(), "bob");
        }
    }

    #[test]
    fn options_and_case_of_attributes_do_not_hide_values() {
        let mut attributes = COMPLETE.to_vec();
        attributes.push(("USERMILTERREJECTSENDER;lang-de", &["a@x.example", "b@x.example"]));
        attributes.push(("usermilterRejectSender", &["c@x.example"]));
        assert_eq!(found(&attributes, "").reject_senders, ["a@x.example", "b@x.example", "c@x.example"]);
        attributes.push(("usermilterRejectSender;range=0-1499", &["d@x.example"]));
        assert!(read(&attributes, "").unwrap_err().contains("only part"));
    }

    #[test]
    fn sender_lists_of_amavis_become_patterns() {
        let attributes = "attributes = { accept-senders = \"amavisWhitelistSender\" }";
        let mut entry = COMPLETE.to_vec();
        entry.push(("amavisWhitelistSender", &["friend@x.example", "@y.example", "@.z.example", "@."]));
        assert_eq!(
            found(&entry, attributes).accept_senders,
            ["*", "*@*.z.example", "*@y.example", "*@z.example", "friend@x.example"]
        );
    }

    #[test]
    fn a_program_is_a_name_and_not_a_path() {
        assert_eq!(
            found(&with("usermilterFilter", &["spam-check"]), "").user.program.unwrap().as_str(),
            "spam-check"
        );
        for bad in ["/bin/sh", "../x", ".x", "a/b", "a\0b"] {
            assert!(read(&with("usermilterFilter", &[bad]), "").is_err(), "{bad}");
        }
    }

    #[test]
    fn an_entry_without_an_account_stands_for_its_targets() {
        let forward = "forward-attribute = \"rfc822MailMember\"\ndefault-uid = 5000\ndefault-gid = 5000\ndefault-home = \"/v/%u\"";
        let targets: [(&str, &[&str]); 2] =
            [("uid", &["team"]), ("rfc822MailMember", &["bob@example.org", "carol"])];
        match read(&targets, forward) {
            Ok(LdapAnswer::Forward(targets)) => {
                let targets: Vec<String> = targets.iter().map(Address::to_string).collect();
                assert_eq!(targets, ["bob@example.org", "carol"]);
            }
            other => panic!("{other:?}"),
        }
        let mut both = COMPLETE.to_vec();
        both.push(("rfc822MailMember", &["bob@example.org"]));
        assert_eq!(found(&both, forward).user.name.as_str(), "alice");
        let broken: [(&str, &[&str]); 1] = [("rfc822MailMember", &["bob@example.org", "@"])];
        assert!(read(&broken, forward).is_err());
    }

    #[test]
    fn two_entries_are_an_error_that_names_both() {
        let mut second = entry(&COMPLETE);
        second.dn = "uid=other,dc=x".into();
        let address = Address::parse(b"alice@example.org").unwrap();
        let error = answer(&[entry(&COMPLETE), second], &address, &config("")).unwrap_err();
        assert!(error.contains("uid=alice,dc=x") && error.contains("uid=other,dc=x"), "{error}");
        assert!(matches!(answer(&[], &address, &config("")), Ok(LdapAnswer::NotFound)));
    }

    proptest! {
        #[test]
        fn no_entry_makes_the_reader_panic(name in "\\PC{0,12}", uid in "\\PC{0,12}", home in "\\PC{0,12}", dn in "\\PC{0,12}") {
            let mut entry = entry(&[("uid", &[&name]), ("uidNumber", &[&uid]), ("homeDirectory", &[&home]), ("gidNumber", &["7"])]);
            entry.dn = dn;
            let address = Address::parse(b"alice@example.org").unwrap();
            let config = config("default-home = \"/v/%d/%u\"\ndefault-uid = 5000");
            if let Ok(LdapAnswer::Found(found)) = answer(&[entry], &address, &config) {
                let Account::Virtual { uid, home, .. } = found.user.account else { panic!() };
                prop_assert!(uid != 0 && uid != u32::MAX);
                prop_assert!(home.is_absolute() && !home.components().any(|c| c == Component::ParentDir));
            }
        }
    }
}
