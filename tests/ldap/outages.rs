//! Servers that are dead, hang, or come back. None of it makes a user unknown.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{task::JoinSet, time::sleep};
use usermilter::resolver::ldap::{LdapAnswer, LdapResolver, Source, Timing, Unavailable};

use crate::{
    TIMEOUT, TIMING, address, ask, credentials, forgetful, found, parse, resolver, section,
    slapd::{Setup, Slapd, free_port},
    unavailable,
};

/// Far less than a time limit: nobody waited for a server that does not answer.
const AT_ONCE: Duration = Duration::from_millis(500);

/// A resolver that asks these servers in order and remembers nothing but for an outage.
fn failing_over(slapds: &[&Slapd]) -> LdapResolver {
    let uris: Vec<String> = slapds.iter().map(|slapd| slapd.ldap()).collect();
    let keys = format!("{}cache-ttl = \"0s\"\nnegative-ttl = \"0s\"", credentials(slapds[0]));
    resolver(&section(&uris, &keys))
}

async fn source(resolver: &LdapResolver, text: &str) -> Result<Source, Unavailable> {
    let (answer, source) = resolver.lookup_with_source(&address(text)).await?;
    assert!(matches!(*answer, LdapAnswer::Found(_)), "{answer:?}");
    Ok(source)
}

/// Asks until a server answers again.
async fn until_answered(resolver: &LdapResolver) {
    let start = Instant::now();
    while source(resolver, "alice@example.org").await != Ok(Source::Server) {
        assert!(start.elapsed() < Duration::from_secs(10), "no server came back");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn the_next_server_answers_for_a_killed_one_until_that_is_back() {
    let mut first = Slapd::start(&Setup::default());
    let second = Slapd::start(&Setup::default());
    let resolver = failing_over(&[&first, &second]);
    found(&resolver, "alice@example.org").await;
    assert_eq!((first.searches("alice@"), second.searches("alice@")), (1, 0));

    first.kill();
    for _ in 0..3 {
        found(&resolver, "alice@example.org").await;
    }
    assert_eq!((first.searches("alice@"), second.searches("alice@")), (1, 3));

    first.restart();
    sleep(TIMING.return_after).await;
    // This one starts the way back, and is not kept waiting by it.
    found(&resolver, "alice@example.org").await;
    sleep(Duration::from_millis(300)).await;
    let before = second.searches("alice@");
    found(&resolver, "alice@example.org").await;
    assert_eq!(second.searches("alice@"), before);
    assert_eq!(first.searches("alice@"), 2);
}

#[tokio::test]
async fn the_next_server_answers_for_a_hung_one_and_only_the_first_question_waits() {
    let first = Slapd::start(&Setup::default());
    let second = Slapd::start(&Setup::default());
    let resolver = failing_over(&[&first, &second]);
    found(&resolver, "alice@example.org").await;

    first.pause();
    let start = Instant::now();
    found(&resolver, "alice@example.org").await;
    assert!(start.elapsed() >= TIMEOUT);
    let start = Instant::now();
    for _ in 0..10 {
        found(&resolver, "alice@example.org").await;
    }
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());

    // While it is tried again nobody waits.
    sleep(TIMING.return_after).await;
    let start = Instant::now();
    found(&resolver, "alice@example.org").await;
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());

    first.resume();
    sleep(TIMEOUT + TIMING.return_after).await;
    found(&resolver, "alice@example.org").await;
    sleep(Duration::from_millis(300)).await;
    let before = second.searches("alice@");
    found(&resolver, "alice@example.org").await;
    assert_eq!(second.searches("alice@"), before);
}

#[tokio::test]
async fn a_server_that_was_restarted_is_asked_again_as_if_nothing_had_been() {
    let mut slapd = Slapd::start(&Setup::default());
    let resolver = forgetful(&slapd);
    for _ in 0..3 {
        found(&resolver, "alice@example.org").await;
        slapd.restart();
    }
    assert_eq!(resolver.cache_counters().unavailable, 0);
}

#[tokio::test]
async fn a_connection_that_was_long_unused_is_replaced_before_it_can_fail() {
    let slapd = Slapd::start(&Setup::default());
    let keys = format!("{}cache-ttl = \"0s\"", credentials(&slapd));
    let mut config = parse(&section(&[slapd.ldap()], &keys));
    config.load_secrets().unwrap();
    let timing = Timing { idle_limit: Duration::from_millis(100), ..TIMING };
    let resolver = LdapResolver::with_timing(config, timing);
    for _ in 0..3 {
        found(&resolver, "alice@example.org").await;
        found(&resolver, "alice@example.org").await;
        sleep(Duration::from_millis(150)).await;
    }
    assert_eq!(slapd.logged(" method=128"), 3, "three binds for six searches");
}

#[tokio::test]
async fn a_question_that_is_given_up_leaves_nothing_behind() {
    let slapd = Slapd::start(&Setup::default());
    let resolver = forgetful(&slapd);
    slapd.pause();
    let given_up = tokio::time::timeout(TIMEOUT / 10, ask(&resolver, "alice@example.org")).await;
    assert!(given_up.is_err());
    slapd.resume();
    found(&resolver, "alice@example.org").await;
    assert_eq!(slapd.logged(" method=128"), 1, "the connection was made all the same");
}

#[tokio::test]
async fn old_answers_serve_while_no_server_does_and_nobody_else_is_taken_for_unknown() {
    let mut slapd = Slapd::start(&Setup::default());
    let resolver = failing_over(&[&slapd]);
    found(&resolver, "alice@example.org").await;
    found(&resolver, "alice.example@example.org").await;
    assert_eq!(ask(&resolver, "erin@example.org").await, Ok(LdapAnswer::NotFound));

    slapd.kill();
    assert_eq!(source(&resolver, "alice@example.org").await, Ok(Source::Stale));
    unavailable(&resolver, "bob@example.org").await;
    // Since then she may have come: that nobody has an address is not served from memory.
    unavailable(&resolver, "erin@example.org").await;
    let start = Instant::now();
    for _ in 0..100 {
        assert_eq!(source(&resolver, "alice.example@example.org").await, Ok(Source::Stale));
    }
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());

    slapd.restart();
    until_answered(&resolver).await;
    found(&resolver, "bob@example.org").await;
    assert_eq!(ask(&resolver, "erin@example.org").await, Ok(LdapAnswer::NotFound));
}

#[tokio::test]
async fn while_the_only_server_hangs_one_question_at_a_time_waits_for_it() {
    let slapd = Slapd::start(&Setup::default());
    let resolver = Arc::new(failing_over(&[&slapd]));
    found(&resolver, "alice@example.org").await;

    slapd.pause();
    assert_eq!(source(&resolver, "alice@example.org").await, Ok(Source::Stale));
    let start = Instant::now();
    let mut late = 0;
    let mut asked = 0;
    while start.elapsed() < 4 * TIMEOUT {
        let mut questions = JoinSet::new();
        for (number, text) in ["alice@example.org", "bob@example.org"].iter().cycle().take(10).enumerate() {
            let resolver = Arc::clone(&resolver);
            questions.spawn(async move {
                let start = Instant::now();
                let answer = resolver.lookup_with_source(&address(text)).await;
                match answer {
                    Ok((_, source)) => assert_eq!((number % 2, source), (0, Source::Stale)),
                    Err(_) => assert_eq!(number % 2, 1),
                }
                start.elapsed()
            });
        }
        // All about one address share one try, so count tries and not questions.
        let waits = questions.join_all().await;
        asked += 1;
        late += usize::from(waits.iter().any(|wait| *wait > AT_ONCE));
        sleep(Duration::from_millis(20)).await;
    }
    assert!(late <= 4, "{late} of {asked} rounds had to wait");

    slapd.resume();
    until_answered(&resolver).await;
}

#[tokio::test]
async fn an_answer_older_than_stale_ttl_does_not_serve() {
    let mut slapd = Slapd::start(&Setup::default());
    let keys = format!("{}cache-ttl = \"0s\"\nstale-ttl = \"500ms\"", credentials(&slapd));
    let resolver = resolver(&section(&[slapd.ldap()], &keys));
    found(&resolver, "alice@example.org").await;
    slapd.kill();
    assert_eq!(source(&resolver, "alice@example.org").await, Ok(Source::Stale));
    sleep(Duration::from_millis(600)).await;
    unavailable(&resolver, "alice@example.org").await;
}

#[tokio::test]
async fn who_is_remembered_is_found_without_a_server_having_to_be_there() {
    let slapd = Slapd::start(&Setup::default());
    let resolver = resolver(&section(&[slapd.ldap()], &credentials(&slapd)));
    found(&resolver, "alice@example.org").await;
    slapd.pause();
    let start = Instant::now();
    for _ in 0..100 {
        assert_eq!(source(&resolver, "alice@example.org").await, Ok(Source::Cache));
    }
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_server_that_is_not_there_costs_no_time_limit() {
    let nobody = format!("ldap://127.0.0.1:{}", free_port());
    let resolver = resolver(&section(&[nobody], ""));
    let start = Instant::now();
    for _ in 0..100 {
        let reason = unavailable(&resolver, "alice@example.org").await;
        assert!(reason.contains("refused"), "{reason}");
    }
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    assert_eq!(resolver.cache_counters().unavailable, 100);
}

#[tokio::test]
async fn a_server_that_hangs_before_the_first_question_is_unavailable_after_the_limit() {
    let slapd = Slapd::start(&Setup::default());
    for keys in [String::new(), credentials(&slapd)] {
        let resolver = resolver(&section(&[slapd.ldap()], &keys));
        slapd.pause();
        let start = Instant::now();
        let reason = unavailable(&resolver, "alice@example.org").await;
        assert!(reason.contains("no answer within"), "{reason}");
        assert!(start.elapsed() >= TIMEOUT && start.elapsed() < 2 * TIMEOUT);
        let start = Instant::now();
        unavailable(&resolver, "bob@example.org").await;
        assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
        slapd.resume();
    }
}

#[tokio::test]
async fn a_server_that_speaks_no_ldap_is_unavailable() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("ldap://{}", listener.local_addr().unwrap());
    let server = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            // A search result for message 1 whose content makes no sense.
            let nonsense = [0x30, 0x07, 0x02, 0x01, 0x01, 0x65, 0x02, 0x0a, 0x00];
            let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, &nonsense).await;
            sleep(Duration::from_secs(1)).await;
        }
    });
    let resolver = resolver(&section(&[uri], ""));
    unavailable(&resolver, "alice@example.org").await;
    server.abort();
}
