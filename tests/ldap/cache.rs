//! What is remembered, and for how long.

use std::{sync::Arc, time::Duration};

use tokio::{task::JoinSet, time::sleep};
use usermilter::resolver::ldap::{LdapAnswer, Source};

use crate::{
    address, ask, credentials, forgetful, found, person, resolver, section,
    slapd::{Setup, Slapd},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_questions_at_once_about_one_address_are_one_search() {
    let slapd = Slapd::start(&Setup::default());
    let resolver = Arc::new(resolver(&section(&[slapd.ldap()], &credentials(&slapd))));
    let mut questions = JoinSet::new();
    for number in 0..1000 {
        let resolver = Arc::clone(&resolver);
        let text = if number % 2 == 0 { "alice@example.org" } else { "nobody@example.org" };
        questions.spawn(async move { (number, ask(&resolver, text).await) });
    }
    for (number, answer) in questions.join_all().await {
        assert_eq!(matches!(answer, Ok(LdapAnswer::Found(_))), number % 2 == 0, "{answer:?}");
    }
    assert_eq!(slapd.searches("alice@example.org"), 1);
    assert_eq!(slapd.searches("nobody@example.org"), 1);
    assert_eq!(slapd.logged("BIND dn="), 2, "one connection: request and identity");
    let counters = resolver.cache_counters();
    assert_eq!((counters.searches, counters.unavailable), (2, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_questions_about_as_many_addresses_share_one_connection() {
    let slapd = Slapd::start(&Setup { acl: Some("access to * by * read\n"), ..Setup::default() });
    let resolver = Arc::new(resolver(&section(&[slapd.ldap()], "")));
    found(&resolver, "alice@example.org").await;
    // slapd ends anonymous sessions that have more than 100 searches pending, as one that was asked too much while it
    // was busy would.
    slapd.pause();
    let mut questions = JoinSet::new();
    for number in 0..1000 {
        let resolver = Arc::clone(&resolver);
        questions.spawn(async move { ask(&resolver, &format!("u{number}@example.org")).await });
    }
    sleep(Duration::from_millis(100)).await;
    slapd.resume();
    for answer in questions.join_all().await {
        assert_eq!(answer, Ok(LdapAnswer::NotFound));
    }
    assert_eq!(slapd.searches("mail=u"), 1000);
    assert_eq!(slapd.logged("ACCEPT from"), 2, "ours, and the harness's");
}

#[tokio::test]
async fn a_new_user_is_found_after_the_negative_ttl_and_a_change_after_the_ttl() {
    let slapd = Slapd::start(&Setup::default());
    let keys = format!("{}cache-ttl = \"400ms\"\nnegative-ttl = \"200ms\"", credentials(&slapd));
    let resolver = resolver(&section(&[slapd.ldap()], &keys));
    assert_eq!(ask(&resolver, "erin@example.org").await, Ok(LdapAnswer::NotFound));
    slapd.administer(&person("erin", "").replace("objectClass: inet", "changetype: add\nobjectClass: inet"));
    assert_eq!(ask(&resolver, "erin@example.org").await, Ok(LdapAnswer::NotFound));
    sleep(Duration::from_millis(250)).await;
    assert!(found(&resolver, "erin@example.org").await.reject_senders.is_empty());

    slapd.administer(
        "dn: uid=erin,ou=people,dc=example,dc=org\nchangetype: modify\nadd: usermilterRejectSender\nusermilterRejectSender: x@y.example\n",
    );
    let (_, source) = resolver.lookup_with_source(&address("erin@example.org")).await.unwrap();
    assert_eq!(source, Source::Cache);
    sleep(Duration::from_millis(450)).await;
    assert_eq!(found(&resolver, "erin@example.org").await.reject_senders, ["x@y.example"]);
    assert_eq!(slapd.searches("erin@example.org"), 3);
}

#[tokio::test]
async fn no_more_addresses_are_remembered_than_cache_size() {
    let slapd = Slapd::start(&Setup::default());
    let keys = format!("{}cache-size = 0", credentials(&slapd));
    let nothing = resolver(&section(&[slapd.ldap()], &keys));
    for _ in 0..3 {
        found(&nothing, "alice@example.org").await;
    }
    assert_eq!(slapd.searches("alice@example.org"), 3);
    let forgetful = forgetful(&slapd);
    for _ in 0..3 {
        found(&forgetful, "alice@example.org").await;
    }
    assert_eq!(slapd.searches("alice@example.org"), 6);
}
