//! The types of single settings. Each is checked as it is read, so that an error has the place of the value
//! and nobody checks again.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, de::Error as _};

/// Where a service listens or a client connects.
///
/// Written `inet:127.0.0.1:8890`, `inet:[::1]:8890`, `unix:/path`, or in libmilter's form `inet:8890@127.0.0.1`,
/// `inet6:8890@::1`, `local:/path` (sendmail's smfi_setconn).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SocketAddress {
    /// TCP.
    Inet(SocketAddr),
    /// A Unix domain stream socket.
    Unix(PathBuf),
}

impl FromStr for SocketAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected = || {
            format!(
                "socket address \"{text}\": expected \"inet:ADDRESS:PORT\", \"inet:[ADDRESS]:PORT\", \
                 \"inet:PORT@ADDRESS\" or \"unix:/PATH\""
            )
        };
        let (family, rest) = text.split_once(':').ok_or_else(expected)?;
        match family {
            "unix" | "local" if rest.starts_with('/') => Ok(Self::Unix(PathBuf::from(rest))),
            "inet" | "inet6" => {
                let (host, port) = match rest.split_once('@') {
                    Some((port, host)) => (host, port),
                    None => rest.rsplit_once(':').ok_or_else(expected)?,
                };
                let host = host.trim_start_matches('[').trim_end_matches(']');
                let host = if host == "localhost" { "127.0.0.1" } else { host };
                let host: IpAddr = host.parse().map_err(|_| expected())?;
                let port: u16 = port.parse().map_err(|_| expected())?;
                Ok(Self::Inet(SocketAddr::new(host, port)))
            }
            _ => Err(expected()),
        }
    }
}

impl fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inet(address) => write!(f, "inet:{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// The control socket: a Unix socket, since it tells names, or `off`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Control(pub Option<PathBuf>);

impl FromStr for Control {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse() {
            Ok(SocketAddress::Unix(path)) => Ok(Self(Some(path))),
            _ if text == "off" => Ok(Self(None)),
            _ => Err(format!("control socket \"{text}\": expected \"unix:/PATH\" or \"off\"")),
        }
    }
}

/// A number of bytes: an integer, or text with a suffix `K`, `M` or `G` (powers of 1024).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected =
            || format!("size \"{text}\": expected a number of bytes like \"512K\", \"50M\" or \"1G\"");
        let digits = text.trim_end_matches(['k', 'K', 'm', 'M', 'g', 'G']);
        let shift = match &text[digits.len()..] {
            "" => 0,
            "k" | "K" => 10,
            "m" | "M" => 20,
            "g" | "G" => 30,
            _ => return Err(expected()),
        };
        let number: u64 = digits.parse().map_err(|_| expected())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(expected)
    }
}

/// A span of time: text with a suffix `ms`, `s`, `m`, `h` or `d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected = || {
            format!(
                "time \"{text}\": expected a number with a unit like \"500ms\", \"30s\", \"5m\" or \"24h\""
            )
        };
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let number: u64 = digits.parse().map_err(|_| expected())?;
        let milliseconds = match &text[digits.len()..] {
            "ms" => Some(number),
            "s" => number.checked_mul(1000),
            "m" => number.checked_mul(60_000),
            "h" => number.checked_mul(3_600_000),
            "d" => number.checked_mul(86_400_000),
            _ => None,
        };
        // A year is longer than any wait here; more would overflow the clock arithmetic of callers.
        match milliseconds {
            Some(ms) if ms <= 366 * 86_400_000 => Ok(Self(Duration::from_millis(ms))),
            _ => Err(expected()),
        }
    }
}

/// Networks written as CIDR or as a single address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network(pub IpNet);

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bare = text.trim_start_matches('[').replace(']', "");
        bare.parse::<IpNet>().or_else(|_| bare.parse::<IpAddr>().map(IpNet::from)).map(Self).map_err(|_| {
            format!(
                "network \"{text}\": expected an address or CIDR like \"192.0.2.0/24\" or \"2001:db8::/32\""
            )
        })
    }
}

impl Network {
    /// Whether the address lies inside; an IPv4-mapped IPv6 address counts as its IPv4 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }
}

/// Permission bits of a socket, written in octal: `"0660"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileMode(pub u32);

impl FromStr for FileMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u32::from_str_radix(text, 8)
            .ok()
            .filter(|mode| *mode <= 0o777)
            .map(Self)
            .ok_or_else(|| format!("mode \"{text}\": expected octal permission bits like \"0660\""))
    }
}

/// Has a setting read from text by its `FromStr`.
macro_rules! deserialize_from_str {
    ($($type:ty),*) => {$(
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
pub(super) use deserialize_from_str;

deserialize_from_str!(Control, SocketAddress, Span, Network, FileMode);

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum NumberOrText {
            Number(u64),
            Text(String),
        }
        match NumberOrText::deserialize(deserializer)? {
            NumberOrText::Number(bytes) => Ok(Self(bytes)),
            NumberOrText::Text(text) => text.parse().map_err(D::Error::custom),
        }
    }
}

/// The first and the last of a range of numeric ids, written `[5000, 5999]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// Lowest id.
    pub first: u32,
    /// Highest id.
    pub last: u32,
}

impl IdRange {
    /// Whether the id lies inside.
    pub fn contains(&self, id: u32) -> bool {
        (self.first..=self.last).contains(&id)
    }
}

impl<'de> Deserialize<'de> for IdRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (first, last) = <(u32, u32)>::deserialize(deserializer)?;
        // 4294967295 is (uid_t)-1, which set*id reads as "leave unchanged".
        if first == 0 || first > last || last == u32::MAX {
            return Err(D::Error::custom(format!(
                "range [{first}, {last}]: expected [FIRST, LAST] with 0 < FIRST <= LAST < 4294967295"
            )));
        }
        Ok(Self { first, last })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_addresses_are_read_in_both_notations() {
        let inet = SocketAddress::Inet("127.0.0.1:8890".parse().unwrap());
        let inet6 = SocketAddress::Inet("[::1]:8890".parse().unwrap());
        for (text, expected) in [
            ("inet:127.0.0.1:8890", &inet),
            ("inet:8890@127.0.0.1", &inet),
            ("inet:8890@localhost", &inet),
            ("inet:[::1]:8890", &inet6),
            ("inet6:8890@::1", &inet6),
            ("unix:/run/x.sock", &SocketAddress::Unix("/run/x.sock".into())),
            ("local:/run/x.sock", &SocketAddress::Unix("/run/x.sock".into())),
        ] {
            assert_eq!(&text.parse::<SocketAddress>().unwrap(), expected, "{text}");
        }
        for bad in ["", "inet:", "inet:8890", "unix:relative", "inet:127.0.0.1:99999", "tcp:1@127.0.0.1"] {
            assert!(bad.parse::<SocketAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_and_times_have_units_and_limits() {
        assert_eq!("50M".parse(), Ok(ByteSize(50 << 20)));
        assert_eq!("1024".parse(), Ok(ByteSize(1024)));
        assert_eq!("2k".parse(), Ok(ByteSize(2048)));
        assert!("".parse::<ByteSize>().is_err());
        assert!("1MM".parse::<ByteSize>().is_err());
        assert!("99999999999G".parse::<ByteSize>().is_err());
        assert_eq!("5m".parse(), Ok(Span(Duration::from_secs(300))));
        assert_eq!("0s".parse(), Ok(Span(Duration::ZERO)));
        assert!("5".parse::<Span>().is_err());
        assert!("9999999999999h".parse::<Span>().is_err());
    }

    #[test]
    fn a_mapped_ipv4_address_is_an_ipv4_address() {
        let network: Network = "192.0.2.0/24".parse().unwrap();
        assert!(network.contains("::ffff:192.0.2.9".parse().unwrap()));
        assert!(!network.contains("::1".parse().unwrap()));
        assert!("::1".parse::<Network>().unwrap().contains("::1".parse().unwrap()));
    }
}
