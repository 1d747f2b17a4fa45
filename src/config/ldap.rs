//! `[[resolver]] type = "ldap"`: which servers are asked, as whom, for what, and what their entries mean.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use serde::{Deserialize, Deserializer, de::Error as _};
use url::Url;

pub use super::template::{FilterTemplate, HomeTemplate};
use super::{OnError, Span, values::deserialize_from_str};

/// Settings of one directory. The field names are the keys, in kebab-case.
///
/// What is read by `Deserialize` is consistent: `starttls` has only ldap:// servers, a password has a name to it.
/// The files it names are read by [`LdapConfig::load_secrets`], which needs the privileges of the monitor.
#[derive(Clone, Debug, Deserialize)]
#[serde(remote = "Self", rename_all = "kebab-case", deny_unknown_fields)]
pub struct LdapConfig {
    /// Servers, asked in this order: the next one if one does not answer.
    pub uri: Vec<LdapUri>,
    /// Whether connections to ldap:// servers are encrypted by StartTLS (RFC 4511 §4.14). No answer, no search.
    #[serde(default)]
    pub starttls: bool,
    /// PEM file of the authorities that may sign servers' certificates; absent: those of the system.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// Name for a simple bind (RFC 4513 §5.1.3).
    #[serde(default)]
    pub bind_dn: Option<String>,
    /// File with the password that goes with `bind-dn`.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// SASL mechanism to bind by, instead of a name and a password.
    #[serde(default)]
    pub sasl: Option<Sasl>,
    /// Entry at or under which users are searched.
    #[serde(deserialize_with = "not_empty")]
    pub base: String,
    /// How far from `base`.
    #[serde(default)]
    pub scope: Scope,
    /// Which entry an address is.
    pub filter: FilterTemplate,
    /// Names of the attributes that are read.
    #[serde(default)]
    pub attributes: Attributes,
    /// Attribute with the addresses that an entry stands for, as of a group or an alias.
    #[serde(default)]
    pub forward_attribute: Option<AttributeName>,
    /// Uid of users whose entry has none.
    #[serde(default, deserialize_with = "id")]
    pub default_uid: Option<u32>,
    /// Gid of users whose entry has none.
    #[serde(default, deserialize_with = "id")]
    pub default_gid: Option<u32>,
    /// Home of users whose entry has none.
    #[serde(default)]
    pub default_home: Option<HomeTemplate>,
    /// Time limit of each of: connecting (with TLS), binding, searching.
    #[serde(default = "default_timeout")]
    pub timeout: Span,
    /// How long what a server said of a user is believed.
    #[serde(default = "default_cache_ttl")]
    pub cache_ttl: Span,
    /// How long it is believed that nobody has an address.
    #[serde(default = "default_negative_ttl")]
    pub negative_ttl: Span,
    /// How old an answer may be that serves while no server answers.
    #[serde(default = "default_stale_ttl")]
    pub stale_ttl: Span,
    /// Most addresses remembered.
    #[serde(default = "default_cache_size")]
    pub cache_size: u64,
    /// What becomes of mail when neither a server nor a remembered answer helps.
    #[serde(default = "default_on_error")]
    pub on_error: OnError,

    #[serde(skip)]
    password: Option<Secret>,
    #[serde(skip)]
    authorities: Option<Arc<RootCertStore>>,
}

/// How the daemon tells a server who it is.
#[derive(Clone, Copy, Debug)]
pub enum Bind<'a> {
    /// Not at all.
    Anonymous,
    /// By name and password.
    Simple {
        /// The name.
        dn: &'a str,
        /// `None` until [`LdapConfig::load_secrets`] has been called.
        password: Option<&'a Secret>,
    },
    /// By what the server sees of the connection (RFC 4513 §5.2.3): over ldapi://, uid and gid of the process.
    External,
}

impl LdapConfig {
    /// Reads the files that the section names: the password and the certificates of authorities.
    ///
    /// The monitor calls this before it starts the worker, who may not read them.
    ///
    /// # Errors
    ///
    /// [`SecretError`], which names the file and never shows what is in it.
    pub fn load_secrets(&mut self) -> Result<(), SecretError> {
        if let Some(path) = &self.password_file {
            let text = fs::read_to_string(path)
                .map_err(|source| SecretError::Read { path: path.clone(), source })?;
            let password = text.strip_suffix('\n').unwrap_or(&text);
            let password = password.strip_suffix('\r').unwrap_or(password);
            // A name with an empty password is an anonymous bind that looks like success (RFC 4513 §5.1.2).
            if password.is_empty() {
                return Err(SecretError::EmptyPassword { path: path.clone() });
            }
            self.password = Some(Secret(password.to_owned()));
        }
        if self.starttls || self.uri.iter().any(LdapUri::is_tls) {
            self.authorities = Some(Arc::new(match &self.ca_file {
                Some(path) => authorities_of(path)?,
                None => system_authorities(),
            }));
        }
        Ok(())
    }

    /// How to bind.
    pub fn bind(&self) -> Bind<'_> {
        match (&self.bind_dn, self.sasl) {
            (_, Some(Sasl::External)) => Bind::External,
            (Some(dn), None) => Bind::Simple { dn, password: self.password.as_ref() },
            (None, None) => Bind::Anonymous,
        }
    }

    /// The authorities to trust, once [`LdapConfig::load_secrets`] has read them and if TLS is used at all.
    pub fn authorities(&self) -> Option<&Arc<RootCertStore>> {
        self.authorities.as_ref()
    }

    /// What is wrong between keys that are each right.
    fn conflict(&self) -> Option<&'static str> {
        let tls = self.starttls || self.uri.iter().any(LdapUri::is_tls);
        let faults = [
            (self.uri.is_empty(), "uri: at least one server is needed"),
            (
                self.starttls && !self.uri.iter().all(LdapUri::is_plain),
                "starttls goes with ldap:// servers only: ldaps:// is encrypted from the start, ldapi:// never leaves the host",
            ),
            (self.ca_file.is_some() && !tls, "ca-file without TLS: use ldaps:// or set starttls = true"),
            (
                tls && self.uri.iter().any(LdapUri::is_ipv6_literal),
                "TLS to an IPv6 address: use a host name that the certificate has",
            ),
            (self.password_file.is_some() && self.bind_dn.is_none(), "password-file without bind-dn"),
            (self.bind_dn.is_some() && self.password_file.is_none(), "bind-dn without password-file"),
            (
                self.sasl.is_some() && self.bind_dn.is_some(),
                "sasl and bind-dn: only one way to bind can be used",
            ),
            (
                self.sasl == Some(Sasl::External) && !self.uri.iter().all(LdapUri::is_local),
                "sasl = \"external\" goes with ldapi:// servers only",
            ),
            (self.timeout.0.is_zero(), "timeout: a server needs more than no time to answer"),
        ];
        faults.into_iter().find_map(|(wrong, message)| wrong.then_some(message))
    }
}

impl<'de> Deserialize<'de> for LdapConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // The derived reader, under `remote = "Self"`, is an inherent function.
        let config = Self::deserialize(deserializer)?;
        match config.conflict() {
            None => Ok(config),
            Some(message) => Err(D::Error::custom(message)),
        }
    }
}

/// Why a file that an ldap section names can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// It can't be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no password in it.
    #[error("{}: the password is empty", path.display())]
    EmptyPassword {
        /// The file.
        path: PathBuf,
    },
    /// There is no usable certificate in it.
    #[error("{}: expected certificates in PEM form", path.display())]
    Certificates {
        /// The file.
        path: PathBuf,
    },
}

impl SecretError {
    /// The file.
    pub fn path(&self) -> &Path {
        match self {
            Self::Read { path, .. } | Self::EmptyPassword { path } | Self::Certificates { path } => path,
        }
    }
}

/// A password. Its `Debug` shows nothing, and there is no `Display`.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// The password, for nothing but a bind.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// `sasl`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sasl {
    /// EXTERNAL (RFC 4422 appendix A).
    External,
}

/// `scope` (RFC 4511 §4.5.1.2)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// The base entry itself.
    Base,
    /// Its children.
    One,
    /// The whole subtree, the base entry included.
    #[default]
    Sub,
}

/// A server: `ldap://host`, `ldaps://host:636`, `ldapi://%2Frun%2Fslapd%2Fldapi`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LdapUri(Url);

impl LdapUri {
    /// The URI in parsed form; it always has a host, and scheme ldap, ldaps or ldapi.
    pub fn url(&self) -> &Url {
        &self.0
    }

    /// Host and port of a server that is reached by TCP.
    pub fn tcp(&self) -> Option<(&str, u16)> {
        let default_port = match self.0.scheme() {
            "ldap" => 389,
            "ldaps" => 636,
            _ => return None,
        };
        let host = self.0.host_str()?;
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        Some((host, self.0.port().unwrap_or(default_port)))
    }

    fn is_plain(&self) -> bool {
        self.0.scheme() == "ldap"
    }

    /// Whether the connection is encrypted from the start.
    pub fn is_tls(&self) -> bool {
        self.0.scheme() == "ldaps"
    }

    fn is_local(&self) -> bool {
        self.0.scheme() == "ldapi"
    }

    fn is_ipv6_literal(&self) -> bool {
        self.0.host_str().is_some_and(|host| host.starts_with('['))
    }
}

impl FromStr for LdapUri {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected = || {
            format!(
                "server \"{text}\": expected \"ldap://HOST[:PORT]\", \"ldaps://HOST[:PORT]\" \
                 or \"ldapi://%2FPATH%2FTO%2FSOCKET\""
            )
        };
        let url = Url::parse(text).map_err(|_| expected())?;
        let known = matches!(url.scheme(), "ldap" | "ldaps" | "ldapi");
        let host = url.host_str().unwrap_or_default();
        let absolute = url.scheme() != "ldapi" || host.starts_with("%2f") || host.starts_with("%2F");
        let bare = matches!(url.path(), "" | "/")
            && url.query().is_none()
            && url.username().is_empty()
            && url.password().is_none();
        if known && !host.is_empty() && absolute && bare { Ok(Self(url)) } else { Err(expected()) }
    }
}

impl fmt::Display for LdapUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

/// Names of the attributes of a user's entry; an empty name: not asked for.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Attributes {
    /// The user's name.
    pub name: AttributeName,
    /// Uid.
    #[serde(deserialize_with = "optional_name")]
    pub uid: Option<AttributeName>,
    /// Gid.
    #[serde(deserialize_with = "optional_name")]
    pub gid: Option<AttributeName>,
    /// Home directory.
    #[serde(deserialize_with = "optional_name")]
    pub home: Option<AttributeName>,
    /// A program of `filter.program-directories`.
    #[serde(deserialize_with = "optional_name")]
    pub filter: Option<AttributeName>,
    /// Senders whose mail is accepted.
    #[serde(deserialize_with = "optional_name")]
    pub accept_senders: Option<AttributeName>,
    /// Senders whose mail is refused.
    #[serde(deserialize_with = "optional_name")]
    pub reject_senders: Option<AttributeName>,
}

impl Default for Attributes {
    fn default() -> Self {
        let name = |name: &str| AttributeName(name.to_owned());
        Self {
            name: name("uid"),
            uid: Some(name("uidNumber")),
            gid: Some(name("gidNumber")),
            home: Some(name("homeDirectory")),
            filter: Some(name("usermilterFilter")),
            accept_senders: Some(name("usermilterAcceptSender")),
            reject_senders: Some(name("usermilterRejectSender")),
        }
    }
}

/// An attribute description (RFC 4512 §2.5): a name or an OID, perhaps with options, as in `mail;lang-de`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttributeName(String);

impl AttributeName {
    /// The description as it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether values of the description `returned` are values of this attribute: same type, and at least the
    /// options asked for (RFC 4511 §4.5.1.8).
    pub fn covers(&self, returned: &str) -> bool {
        let (name, options) = split_options(&self.0);
        let (returned_name, returned_options) = split_options(returned);
        name.eq_ignore_ascii_case(returned_name)
            && options
                .into_iter()
                .all(|option| returned_options.iter().any(|r| r.eq_ignore_ascii_case(option)))
    }
}

/// The attribute type and the options of a description.
pub(crate) fn split_options(description: &str) -> (&str, Vec<&str>) {
    let mut parts = description.split(';');
    (parts.next().unwrap_or_default(), parts.collect())
}

impl FromStr for AttributeName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = |part: &str| {
            !part.is_empty()
                && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
        };
        if text.split(';').all(plain) {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!("\"{text}\" is no attribute name"))
        }
    }
}

deserialize_from_str!(LdapUri, AttributeName, FilterTemplate, HomeTemplate);

fn optional_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<AttributeName>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(D::Error::custom)
}

fn not_empty<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.trim().is_empty() {
        return Err(D::Error::custom("expected an entry's name like \"ou=people,dc=example,dc=org\""));
    }
    Ok(text)
}

fn id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    match u32::deserialize(deserializer)? {
        // 4294967295 is (uid_t)-1, which set*id reads as "leave unchanged".
        0 | u32::MAX => Err(D::Error::custom("expected an id greater than 0 and less than 4294967295")),
        id => Ok(Some(id)),
    }
}

fn authorities_of(path: &Path) -> Result<RootCertStore, SecretError> {
    let pem = fs::read(path).map_err(|source| SecretError::Read { path: path.into(), source })?;
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        certificate
            .ok()
            .and_then(|certificate| store.add(certificate).ok())
            .ok_or_else(|| SecretError::Certificates { path: path.into() })?;
    }
    if store.is_empty() {
        return Err(SecretError::Certificates { path: path.into() });
    }
    Ok(store)
}

/// What the system trusts. A certificate among them that can't be read is left out, as every TLS client does.
fn system_authorities() -> RootCertStore {
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    store
}

fn default_timeout() -> Span {
    Span(Duration::from_secs(5))
}

fn default_cache_ttl() -> Span {
    Span(Duration::from_secs(5 * 60))
}

fn default_negative_ttl() -> Span {
    Span(Duration::from_secs(60))
}

fn default_stale_ttl() -> Span {
    Span(Duration::from_secs(24 * 60 * 60))
}

/// At about 1 KiB an entry, 10 MiB.
fn default_cache_size() -> u64 {
    10_000
}

fn default_on_error() -> OnError {
    OnError::Defer
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, ResolverConfig};

    const MINIMAL: &str = "uri = [\"ldap://a.example\"]\nbase = \"dc=x\"\nfilter = \"(mail=%s)\"\n";

    fn parse(section: &str) -> Result<LdapConfig, String> {
        let text = format!("[[resolver]]\ntype = \"ldap\"\n{section}");
        let config = Config::parse(&text, Path::new("u.toml")).map_err(|e| e.to_string())?;
        match config.resolvers.into_iter().next() {
            Some(ResolverConfig::Ldap(ldap)) => Ok(*ldap),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_minimal_section_has_the_documented_defaults() {
        let config = parse(MINIMAL).unwrap();
        assert_eq!(config.timeout.0.as_secs(), 5);
        assert_eq!(config.cache_ttl.0.as_secs(), 300);
        assert_eq!(config.negative_ttl.0.as_secs(), 60);
        assert_eq!(config.stale_ttl.0.as_secs(), 86_400);
        assert_eq!(config.on_error, OnError::Defer);
        assert_eq!(config.scope, Scope::Sub);
        assert_eq!(config.attributes.name.as_str(), "uid");
        assert!(matches!(config.bind(), Bind::Anonymous));
    }

    #[test]
    fn keys_that_contradict_each_other_are_refused_at_load() {
        for (extra, message) in [
            ("password-file = \"/p\"", "password-file without bind-dn"),
            ("bind-dn = \"cn=x\"", "bind-dn without password-file"),
            ("sasl = \"external\"", "goes with ldapi:// servers only"),
            ("ca-file = \"/ca\"", "ca-file without TLS"),
            ("timeout = \"0s\"", "timeout"),
            ("default-uid = 0", "greater than 0"),
            ("default-gid = 4294967295", "less than 4294967295"),
            ("default-home = \"vmail\"", "absolute path"),
            ("default-home = \"/vmail/../%u\"", "absolute path"),
            ("default-home = \"/vmail/%h\"", "\"%h\" is unknown"),
            ("sasl = \"plain\"", "plain"),
            ("colour = 1", "colour"),
            ("attributes = { shoe = \"x\" }", "shoe"),
            ("attributes = { name = \"\" }", "is no attribute name"),
            ("forward-attribute = \"a b\"", "is no attribute name"),
        ] {
            let error = parse(&format!("{MINIMAL}{extra}\n")).unwrap_err();
            assert!(error.contains(message), "{extra}: {error}");
            assert!(error.starts_with("u.toml:"), "{error}");
        }
        for uri in ["ldaps://a.example", "ldapi://%2Fs"] {
            let section =
                format!("uri = [\"{uri}\"]\nbase = \"dc=x\"\nfilter = \"(mail=%s)\"\nstarttls = true");
            assert!(parse(&section).unwrap_err().contains("starttls"), "{uri}");
        }
        let none = "uri = []\nbase = \"dc=x\"\nfilter = \"(mail=%s)\"";
        assert!(parse(none).unwrap_err().contains("at least one server"));
        let no_base = "uri = [\"ldap://a\"]\nfilter = \"(mail=%s)\"";
        assert!(parse(no_base).unwrap_err().contains("base"));
    }

    #[test]
    fn servers_are_read_in_three_schemes() {
        let tcp = |text: &str| {
            let uri: LdapUri = text.parse().unwrap();
            uri.tcp().map(|(host, port)| (host.to_owned(), port))
        };
        assert_eq!(tcp("ldap://a.example"), Some(("a.example".into(), 389)));
        assert_eq!(tcp("ldaps://a.example/"), Some(("a.example".into(), 636)));
        assert_eq!(tcp("ldap://[::1]:3890"), Some(("::1".into(), 3890)));
        assert_eq!(tcp("ldapi://%2Frun%2Fldapi"), None);
        for bad in [
            "",
            "ldap",
            "ldap:a",
            "ldap://",
            "ldap:///dc=x",
            "http://a",
            "ldapi:///",
            "ldapi://a",
            "ldap://a/dc=x",
            "ldap://u@a",
        ] {
            assert!(bad.parse::<LdapUri>().is_err(), "{bad}");
        }
    }

    #[test]
    fn attribute_options_are_subtypes() {
        let mail: AttributeName = "mail".parse().unwrap();
        assert!(mail.covers("mail") && mail.covers("MAIL;lang-de") && !mail.covers("mailbox"));
        let german: AttributeName = "mail;lang-de".parse().unwrap();
        assert!(german.covers("mail;x-a;LANG-DE") && !german.covers("mail"));
    }

    #[test]
    fn the_password_is_never_shown() {
        let path = std::env::temp_dir().join(format!("usermilter-secret-{}", std::process::id()));
        fs::write(&path, "hush hush\n").unwrap();
        let section = format!("{MINIMAL}bind-dn = \"cn=x\"\npassword-file = \"{}\"", path.display());
        let mut config = parse(&section).unwrap();
        config.load_secrets().unwrap();
        let Bind::Simple { password, .. } = config.bind() else { panic!() };
        assert_eq!(password.unwrap().reveal(), "hush hush");
        assert!(!format!("{config:?}").contains("hush"));
        fs::write(&path, "\n").unwrap();
        assert!(matches!(config.load_secrets(), Err(SecretError::EmptyPassword { .. })));
        fs::remove_file(&path).unwrap();
        assert!(matches!(config.load_secrets(), Err(SecretError::Read { .. })));
    }
}
