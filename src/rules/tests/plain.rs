//! Rules, and what they say about a mail, too simple to be wrong. tests/fuzz takes this file too, with other names in scope
//! than the crate's own.

use std::net::IpAddr;

use super::{Address, Date, Question};

#[derive(Clone, Debug)]
pub(super) struct Plain {
    pub(super) sender: Option<Vec<String>>,
    pub(super) sender_files: Option<Vec<usize>>,
    pub(super) recipient: Option<Vec<String>>,
    pub(super) client: Option<Vec<String>>,
    pub(super) helo: Option<Vec<String>>,
    pub(super) size_over: Option<u64>,
    pub(super) expires: Option<Date>,
}

pub(super) fn plain_judge(rules: &[Plain], files: &[Vec<String>], mail: &Question<'_>) -> Option<usize> {
    fn any(key: &Option<Vec<String>>, matches: impl Fn(&str) -> bool) -> bool {
        key.as_ref().is_none_or(|items| items.iter().any(|i| matches(&i.to_lowercase())))
    }
    for (index, rule) in rules.iter().enumerate() {
        let in_files = rule.sender_files.as_ref().is_none_or(|indexes| {
            indexes.iter().any(|i| any(&Some(files[*i].clone()), |i| plain_address(i, mail.sender.address())))
        });
        if in_files
            && any(&rule.sender, |i| plain_address(i, mail.sender.address()))
            && any(&rule.recipient, |i| plain_address(i, Some(mail.recipient)))
            && any(&rule.client, |i| plain_client(i, mail))
            && any(&rule.helo, |i| mail.helo.is_some_and(|h| plain_glob(i, &h.to_lowercase())))
            && rule.size_over.is_none_or(|limit| mail.size.is_some_and(|s| s > limit))
            && rule.expires.is_none_or(|last| mail.today <= last)
        {
            return Some(index + 1);
        }
    }
    None
}

pub(super) fn plain_address(item: &str, address: Option<&Address>) -> bool {
    let Some(address) = address else {
        return item == "<>";
    };
    let local = address.local().to_lowercase();
    let domain = address.domain();
    // The root's dot is no part of a domain's name.
    let name = item.strip_suffix('.').unwrap_or(item);
    match name.rsplit_once('@') {
        Some((l, d)) => {
            (l.is_empty() || plain_glob(l, &local)) && domain.is_some_and(|own| plain_glob(d, own))
        }
        None if item.contains(['*', '?']) => plain_glob(item, &address.key()),
        None if item.starts_with('.') => domain.is_some_and(|own| format!(".{own}").ends_with(name)),
        None => domain.map_or(local == item, |own| own == name),
    }
}

fn plain_client(item: &str, mail: &Question<'_>) -> bool {
    fn bits(address: IpAddr) -> String {
        match address {
            IpAddr::V4(v4) => format!("4{:032b}", v4.to_bits()),
            IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
                Some(v4) => bits(v4.into()),
                None => format!("6{:0128b}", v6.to_bits()),
            },
        }
    }
    let (start, length) = item.split_once('/').unwrap_or((item, "128"));
    match start.parse::<IpAddr>() {
        Ok(network) => mail.client_address.is_some_and(|client| {
            let (network, client) = (bits(network), bits(client));
            let length = (length.parse::<usize>().unwrap() + 1).min(network.len());
            client.starts_with(&network[..length])
        }),
        Err(_) => mail.client_name.is_some_and(|name| plain_glob(item, &name.to_lowercase())),
    }
}

fn plain_glob(pattern: &str, text: &str) -> bool {
    let mut rest = text.chars();
    match pattern.chars().next() {
        None => text.is_empty(),
        Some('*') => {
            plain_glob(&pattern[1..], text) || rest.next().is_some() && plain_glob(pattern, rest.as_str())
        }
        Some(c) => {
            rest.next().is_some_and(|t| c == '?' || c == t)
                && plain_glob(&pattern[c.len_utf8()..], rest.as_str())
        }
    }
}
