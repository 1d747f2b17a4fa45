//! What entries mean, and what becomes of those that mean nothing.

use std::path::Path;

use usermilter::{
    address::Address,
    resolver::ldap::{LdapAnswer, Source},
    user::Account,
};

use crate::{
    PEOPLE, address, ask, credentials, forgetful, found, person, resolver, section,
    slapd::{Setup, Slapd},
    unavailable,
};

#[tokio::test]
async fn the_sample_entries_are_a_user_a_user_by_defaults_and_an_alias() {
    let slapd = Slapd::start(&Setup::default());
    let resolver = forgetful(&slapd);
    let alice = found(&resolver, "alice.example@example.org").await;
    assert_eq!(alice.user.name.as_str(), "alice");
    assert_eq!(
        alice.user.account,
        Account::Virtual { uid: 5001, gid: 5001, home: "/var/vmail/example.org/alice".into() }
    );
    assert_eq!(alice.accept_senders, ["friend@spam.example"]);
    assert_eq!(alice.reject_senders, ["*@spam.example"]);
    assert_eq!(alice.dn, format!("uid=alice,{PEOPLE}"));

    let bob = found(&resolver, "bob@example.org").await;
    assert_eq!(
        bob.user.account,
        Account::Virtual { uid: 5000, gid: 5000, home: "/var/vmail/example.org/bob".into() }
    );
    assert_eq!(bob.user.program.unwrap().as_str(), "spam-check");

    match ask(&resolver, "team@example.org").await {
        Ok(LdapAnswer::Forward(mut targets)) => {
            targets.sort();
            let targets: Vec<String> = targets.iter().map(Address::to_string).collect();
            assert_eq!(targets, ["alice@example.org", "bob@example.org"]);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(ask(&resolver, "nobody@example.org").await, Ok(LdapAnswer::NotFound));
    // The caller asks with the extension first, and then without.
    assert_eq!(ask(&resolver, "alice+shop@example.org").await, Ok(LdapAnswer::NotFound));
}

#[tokio::test]
async fn the_home_by_default_is_that_of_the_entry_however_the_address_is_spelt() {
    let slapd = Slapd::start(&Setup::default());
    let resolver = forgetful(&slapd);
    // A directory compares without case (RFC 4518).
    for spelling in ["BOB@Example.ORG", "Bob@example.org"] {
        let Account::Virtual { home, .. } = found(&resolver, spelling).await.user.account else { panic!() };
        assert_eq!(home, Path::new("/var/vmail/example.org/bob"));
    }
}

#[tokio::test]
async fn no_address_is_a_pattern() {
    let slapd = Slapd::start(&Setup::default());
    let resolver = forgetful(&slapd);
    for local in [
        "*",
        "al*",
        r#""alice)(mail=*""#,
        r#""*)(uid=alice""#,
        r#""alice\\2a""#,
        r#"")(|(uid=*""#,
        "alice%s",
        r#""\\""#,
    ] {
        for text in [local.to_owned(), format!("{local}@example.org")] {
            assert_eq!(ask(&resolver, &text).await, Ok(LdapAnswer::NotFound), "{text}");
        }
    }
    assert_eq!(found(&resolver, "alice@example.org").await.user.name.as_str(), "alice");
}

#[tokio::test]
async fn an_entry_whose_name_has_metacharacters_is_found_by_them() {
    let entries = format!(
        "dn: uid=star,{PEOPLE}\nobjectClass: inetOrgPerson\nuid: star\ncn: s\nsn: s\nmail: a*(b)\\c@example.org\n\n"
    );
    let slapd = Slapd::start(&Setup { entries: &entries, ..Setup::default() });
    let text = section(&[slapd.ldap()], &credentials(&slapd)).replace("(mail=%s)", "(mail=%u@%d)");
    let star = found(&resolver(&text), r#""a*(b)\\c"@example.org"#).await;
    assert_eq!(star.user.name.as_str(), "star");
}

#[tokio::test]
async fn two_entries_for_an_address_are_an_error_and_not_a_choice() {
    let entries = ["one", "two", "three"].map(|name| person(name, "mail: shared@example.org"));
    let slapd = Slapd::start(&Setup { entries: &entries.concat(), ..Setup::default() });
    let resolver = forgetful(&slapd);
    let reason = unavailable(&resolver, "shared@example.org").await;
    assert!(reason.contains("more than one entry") && reason.matches(PEOPLE).count() == 2, "{reason}");
    assert_eq!(
        found(&resolver, "alice@example.org").await.user.name.as_str(),
        "alice",
        "one bad address is no outage"
    );
}

#[tokio::test]
async fn accounts_that_no_filter_may_run_as_are_refused_with_the_entrys_name() {
    let ids = ["0", "-1", "4294967295", "4294967296", "99999999999999999999"];
    let mut entries = String::new();
    for (number, id) in ids.iter().enumerate() {
        for (kind, uid, gid) in [("u", *id, "5001"), ("g", "5001", *id)] {
            entries += &person(
                &format!("{kind}{number}"),
                &format!(
                    "objectClass: posixAccount\nuidNumber: {uid}\ngidNumber: {gid}\nhomeDirectory: /var/vmail/x"
                ),
            );
        }
    }
    let homes = ["relative", "/var/vmail/../../root"];
    for (number, home) in homes.iter().enumerate() {
        entries += &person(
            &format!("h{number}"),
            &format!("objectClass: posixAccount\nuidNumber: 5001\ngidNumber: 5001\nhomeDirectory: {home}"),
        );
    }
    // The name that counts is the one in the entry's own name.
    entries += &format!(
        "dn: uid=../x,{PEOPLE}\nobjectClass: inetOrgPerson\nuid: ../x\ncn: x\nsn: x\nmail: n0@example.org\n\n"
    );
    let slapd = Slapd::start(&Setup { entries: &entries, ..Setup::default() });
    let resolver = forgetful(&slapd);
    let names = (0..ids.len())
        .flat_map(|n| [format!("u{n}"), format!("g{n}")])
        .chain((0..homes.len()).map(|n| format!("h{n}")))
        .chain(["n0".to_owned()]);
    for name in names {
        let reason = unavailable(&resolver, &format!("{name}@example.org")).await;
        assert!(reason.contains(PEOPLE) && reason.contains("refused"), "{name}: {reason}");
    }
}

#[tokio::test]
async fn attributes_with_options_and_several_values_are_read_whole() {
    let entries = person(
        "carol",
        "usermilterRejectSender;lang-de: a@x.example\n\
         usermilterRejectSender;lang-de: b@x.example\n\
         usermilterRejectSender: c@x.example\n\
         mail;lang-de: caroline@example.org",
    );
    let slapd = Slapd::start(&Setup { entries: &entries, ..Setup::default() });
    let carol = found(&forgetful(&slapd), "caroline@example.org").await;
    assert_eq!(carol.reject_senders, ["a@x.example", "b@x.example", "c@x.example"]);
}

#[tokio::test]
async fn lists_kept_for_amavis_serve_by_naming_their_attributes() {
    let slapd = Slapd::start(&Setup {
        schema: "attributetype ( 2.25.1.1 NAME 'amavisWhitelistSender' EQUALITY caseIgnoreIA5Match SYNTAX 1.3.6.1.4.1.1466.115.121.1.26 )\n\
                 attributetype ( 2.25.1.2 NAME 'amavisBlacklistSender' EQUALITY caseIgnoreIA5Match SYNTAX 1.3.6.1.4.1.1466.115.121.1.26 )\n\
                 objectclass ( 2.25.1.3 NAME 'amavisAccount' SUP top AUXILIARY MAY ( amavisWhitelistSender $ amavisBlacklistSender ) )\n",
        entries: &person(
            "dave",
            "objectClass: amavisAccount\namavisWhitelistSender: friend@x.example\namavisBlacklistSender: @x.example\namavisBlacklistSender: @.y.example",
        ),
        ..Setup::default()
    });
    let keys = format!(
        "{}attributes = {{ accept-senders = \"amavisWhitelistSender\", reject-senders = \"amavisBlacklistSender\" }}",
        credentials(&slapd)
    );
    let dave = found(&resolver(&section(&[slapd.ldap()], &keys)), "dave@example.org").await;
    assert_eq!(dave.accept_senders, ["friend@x.example"]);
    assert_eq!(dave.reject_senders, ["*@*.y.example", "*@x.example", "*@y.example"]);
}

#[tokio::test]
async fn referrals_among_the_entries_are_ignored_and_one_in_place_of_an_answer_is_none() {
    let entries = format!(
        "dn: ou=elsewhere,{PEOPLE}\nobjectClass: referral\nobjectClass: extensibleObject\nou: elsewhere\nref: ldap://127.0.0.1:1/{PEOPLE}\n\n"
    );
    let slapd = Slapd::start(&Setup { entries: &entries, ..Setup::default() });
    let here = forgetful(&slapd);
    assert_eq!(found(&here, "alice@example.org").await.user.name.as_str(), "alice");
    assert_eq!(ask(&here, "nobody@example.org").await, Ok(LdapAnswer::NotFound));

    let text = section(&[slapd.ldap()], &credentials(&slapd))
        .replace(&format!("base = \"{PEOPLE}\""), &format!("base = \"ou=elsewhere,{PEOPLE}\""));
    let reason = unavailable(&resolver(&text), "alice@example.org").await;
    assert!(reason.contains("referral"), "{reason}");
}

#[tokio::test]
async fn a_base_that_is_not_there_is_not_nobody() {
    let slapd = Slapd::start(&Setup::default());
    let text = section(&[slapd.ldap()], &credentials(&slapd)).replace("ou=people", "ou=peolpe");
    let reason = unavailable(&resolver(&text), "alice@example.org").await;
    assert!(reason.contains("noSuchObject"), "{reason}");
}

#[tokio::test]
async fn the_scope_is_that_of_the_section() {
    let slapd = Slapd::start(&Setup::default());
    for (scope, answers) in [("sub", true), ("one", true), ("base", false)] {
        let keys = format!("{}scope = \"{scope}\"", credentials(&slapd));
        let (answer, source) = resolver(&section(&[slapd.ldap()], &keys))
            .lookup_with_source(&address("alice@example.org"))
            .await
            .unwrap();
        assert_eq!(matches!(*answer, LdapAnswer::Found(_)), answers, "{scope}");
        assert_eq!(source, Source::Server);
    }
}
