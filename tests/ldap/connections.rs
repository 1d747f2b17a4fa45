//! Schemes, TLS, binding.

use std::{
    io,
    sync::{Arc, Mutex},
};

use tracing_subscriber::fmt::MakeWriter;

use crate::{
    DAEMON, TIMING, ask, credentials, found, parse, resolver, section,
    slapd::{Authority, Setup, Slapd},
    try_resolver, unavailable,
};
use usermilter::resolver::ldap::{LdapAnswer, LdapResolver};

#[tokio::test]
async fn a_user_is_found_over_ldap_ldaps_ldapi_and_starttls() {
    let authority = Authority::new();
    let certificate = authority.valid();
    let slapd = Slapd::start(&Setup { tls: Some(&certificate), ..Setup::default() });
    let bind = credentials(&slapd);
    let ca = format!("ca-file = \"{}\"\n", certificate.authority.display());
    for (uri, keys) in [
        (slapd.ldap(), bind.clone()),
        (slapd.ldapi(), bind.clone()),
        (slapd.ldaps(), format!("{bind}{ca}")),
        (slapd.ldap(), format!("{bind}{ca}starttls = true")),
    ] {
        let resolver = resolver(&section(std::slice::from_ref(&uri), &keys));
        let alice = found(&resolver, "alice@example.org").await;
        assert_eq!(alice.user.name.as_str(), "alice", "{uri}");
        assert_eq!(ask(&resolver, "nobody@example.org").await, Ok(LdapAnswer::NotFound), "{uri}");
    }
    assert_eq!(slapd.logged("TLS established"), 2);
}

#[tokio::test]
async fn a_certificate_that_is_expired_or_of_another_authority_is_no_server() {
    let authority = Authority::new();
    let stranger = Authority::new();
    for (certificate, trusted, complaint) in [
        (authority.expired(), authority.file(), "xpired"),
        (authority.valid(), stranger.file(), "certificate"),
    ] {
        let slapd = Slapd::start(&Setup { tls: Some(&certificate), ..Setup::default() });
        let keys = format!("{}ca-file = \"{}\"\n", credentials(&slapd), trusted.display());
        for (uri, keys) in [(slapd.ldaps(), keys.clone()), (slapd.ldap(), format!("{keys}starttls = true"))] {
            let resolver = resolver(&section(&[uri], &keys));
            let reason = unavailable(&resolver, "alice@example.org").await;
            assert!(reason.contains(complaint), "{reason}");
        }
        assert_eq!(slapd.logged("BIND"), 0, "no password goes to a server that nobody vouches for");
    }
}

#[tokio::test]
async fn the_systems_authorities_count_when_no_ca_file_is_named() {
    let authority = Authority::new();
    let certificate = authority.valid();
    let slapd = Slapd::start(&Setup { tls: Some(&certificate), ..Setup::default() });
    let resolver = resolver(&section(&[slapd.ldaps()], &credentials(&slapd)));
    let reason = unavailable(&resolver, "alice@example.org").await;
    assert!(reason.contains("certificate"), "{reason}");
}

#[tokio::test]
async fn a_ca_file_that_is_none_is_an_error_at_load() {
    let slapd = Slapd::start(&Setup::default());
    let uris = ["ldaps://127.0.0.1".to_owned()];
    let no_certificate = slapd.password_file("-----BEGIN NONSENSE-----");
    for file in [no_certificate.as_str(), "/nonexistent/ca.pem"] {
        let error = try_resolver(&section(&uris, &format!("ca-file = \"{file}\""))).unwrap_err();
        assert!(error.to_string().contains(file), "{error}");
    }
}

#[tokio::test]
async fn nothing_is_searched_in_the_clear_when_starttls_is_refused() {
    let authority = Authority::new();
    let slapd = Slapd::start(&Setup::default());
    let keys =
        format!("{}ca-file = \"{}\"\nstarttls = true", credentials(&slapd), authority.file().display());
    let resolver = resolver(&section(&[slapd.ldap()], &keys));
    unavailable(&resolver, "alice@example.org").await;
    assert_eq!(slapd.logged("BIND"), 0);
    assert_eq!(slapd.searches(""), 0);
}

#[tokio::test]
async fn who_does_not_bind_is_told_nothing_and_that_is_not_nobody() {
    let slapd = Slapd::start(&Setup::default());
    let resolver = resolver(&section(&[slapd.ldap()], ""));
    let reason = unavailable(&resolver, "alice@example.org").await;
    assert!(reason.contains("noSuchObject"), "{reason}");
}

#[tokio::test]
async fn external_over_ldapi_binds_by_the_uid_of_the_process() {
    let slapd = Slapd::start(&Setup::default());
    let resolver = resolver(&section(&[slapd.ldapi()], "sasl = \"external\""));
    assert_eq!(found(&resolver, "alice@example.org").await.reject_senders.len(), 1);
    assert_eq!(slapd.logged("mech=EXTERNAL"), 1);
}

#[tokio::test]
async fn a_wrong_password_is_an_outage_that_is_tried_now_and_then_and_never_logged() {
    let log = Log::default();
    let subscriber =
        tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(log.clone()).finish();
    // For all threads: what other tests log meanwhile does not matter.
    tracing::subscriber::set_global_default(subscriber).unwrap();

    let slapd = Slapd::start(&Setup::default());
    let password = "not-the-passw0rd";
    let keys = format!("bind-dn = \"{DAEMON}\"\npassword-file = \"{}\"", slapd.password_file(password));
    let text = section(&[slapd.ldap()], &keys);
    let resolver = resolver(&text);
    for _ in 0..50 {
        let reason = unavailable(&resolver, "alice@example.org").await;
        assert!(reason.contains("invalidCredentials") && !reason.contains(password), "{reason}");
    }
    let binds = slapd.logged("err=49");
    assert!((1..=3).contains(&binds), "fifty questions, {binds} binds");
    let mut config = parse(&text);
    config.load_secrets().unwrap();
    let shown = format!("{config:?} {:?} {:?}", LdapResolver::with_timing(config.clone(), TIMING), resolver);
    assert!(!shown.contains(password));
    let log = log.text();
    assert!(log.contains("invalidCredentials") && !log.contains(password), "{log}");
}

#[tokio::test]
async fn a_missing_password_file_is_an_error_at_load() {
    let keys = format!("bind-dn = \"{DAEMON}\"\npassword-file = \"/nonexistent/password\"");
    let error = try_resolver(&section(&["ldap://127.0.0.1".into()], &keys)).unwrap_err();
    assert_eq!(error.to_string(), "cannot read /nonexistent/password");
}

/// What is logged, for a look at it.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}
