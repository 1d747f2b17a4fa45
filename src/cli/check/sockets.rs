//! Whether an MTA can connect, and who else can.

use std::{fs, path::Path};

use nix::unistd::{AccessFlags, Group, access, getegid, geteuid};

use super::{
    Warnings,
    host::{Person, SEARCH, WRITE},
};
use crate::config::{Config, DEFAULT_CONTROL, Server, SocketAddress};

/// Who opens milter and policy sockets for Postfix (mail_owner of main.cf).
const POSTFIX: &str = "postfix";

pub(super) fn check(config: &Config, warnings: &mut Warnings) {
    let server = &config.server;
    if server.milter.is_empty() && server.policy.is_empty() {
        warnings.add("server.milter", "empty, and server.policy as well: nobody is served");
    }
    user(server, warnings);
    others(server, warnings);
    let group = group(server, warnings);
    for (key, addresses) in [("server.milter", &server.milter), ("server.policy", &server.policy)] {
        for address in addresses {
            match address {
                SocketAddress::Inet(inet) if inet.ip().is_unspecified() => warnings.add(
                    key,
                    format!(
                        "{address}: open to everybody who reaches this host, who then can ask about anybody's mail and \
                         feed filters with inventions; bind to 127.0.0.1, or to an address behind a firewall"
                    ),
                ),
                SocketAddress::Inet(_) => (),
                SocketAddress::Unix(path) => {
                    directory(key, path, warnings);
                    if let Some(group) = group {
                        rights(key, path, server, group, warnings);
                    }
                }
            }
        }
    }
}

/// Those that no MTA uses.
fn others(server: &Server, warnings: &mut Warnings) {
    match &server.metrics {
        Some(SocketAddress::Inet(inet)) if inet.ip().is_unspecified() => warnings.add(
            "server.metrics",
            format!("inet:{inet}: open to everybody who reaches this host; bind to 127.0.0.1, or to an inner address"),
        ),
        Some(SocketAddress::Unix(path)) => directory("server.metrics", path, warnings),
        Some(SocketAddress::Inet(_)) | None => (),
    }
    // The directory of the default is made by the daemon.
    if let Some(path) = server.control.0.as_deref().filter(|path| *path != Path::new(DEFAULT_CONTROL)) {
        directory("server.control", path, warnings);
    }
}

fn user(server: &Server, warnings: &mut Warnings) {
    let name = &server.user;
    match Person::named(name) {
        Some(person) if person.uid == 0 => {
            warnings.add("server.user", format!("{name} is root, and the daemon does not start so"));
        }
        Some(_) => (),
        None => warnings.add(
            "server.user",
            format!(
                "there is no user {name}, and started as root the daemon needs one: \
                 useradd --system --no-create-home --shell /usr/sbin/nologin {name}"
            ),
        ),
    }
}

/// The group that Unix sockets get; `None` if that can't be.
fn group(server: &Server, warnings: &mut Warnings) -> Option<u32> {
    let Some(name) = &server.socket_group else { return Some(getegid().as_raw()) };
    match Group::from_name(name) {
        Ok(Some(group)) => Some(group.gid.as_raw()),
        _ => {
            warnings.add("server.socket-group", format!("there is no group {name}: no socket can be bound"));
            None
        }
    }
}

fn directory(key: &str, path: &Path, warnings: &mut Warnings) {
    let parent = path.parent().unwrap_or(Path::new("/"));
    let shown = parent.display();
    match fs::metadata(parent) {
        Err(_) => warnings.add(
            key,
            format!(
                "the directory {shown} does not exist, and is not made by the daemon: mkdir {shown}, or have systemd make it \
                 (RuntimeDirectory=)"
            ),
        ),
        Ok(metadata) if !metadata.is_dir() => warnings.add(key, format!("{shown} is no directory")),
        Ok(_) if access(parent, AccessFlags::W_OK).is_err() => {
            warnings.add(key, format!("the directory {shown} is not writable: no socket can be bound in it"));
        }
        Ok(_) => (),
    }
}

/// Whether Postfix gets through to the socket that the daemon will make.
fn rights(key: &str, path: &Path, server: &Server, group: u32, warnings: &mut Warnings) {
    let mode = server.socket_mode.0;
    let advice = format!("socket-group = \"{POSTFIX}\" with socket-mode = \"0660\" lets it in");
    let Some(postfix) = Person::named(POSTFIX) else {
        if mode & 0o022 == 0 {
            let why = format!(
                "mode {mode:04o} keeps everybody out but its owner: no MTA but one that is root can connect"
            );
            warnings.add(key, format!("{}: {why}", path.display()));
        }
        return;
    };
    if !postfix.may(geteuid().as_raw(), group, mode, WRITE) {
        let group =
            Group::from_gid(group.into()).ok().flatten().map_or_else(|| group.to_string(), |g| g.name);
        warnings.add(
            key,
            format!("{}: mode {mode:04o} and group {group} keep Postfix out, which connects as user {POSTFIX}; {advice}", path.display()),
        );
    }
    if let Some(obstacle) = path.parent().and_then(|parent| postfix.obstacle(parent, SEARCH)) {
        warnings.add(
            key,
            format!(
                "Postfix, which connects as user {POSTFIX}, may not enter {}: chmod o+x",
                obstacle.display()
            ),
        );
    }
}
