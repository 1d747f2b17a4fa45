//! The files and directories that a configuration names: whether they are there, who may read them, who may change them.

use std::{
    fs::{self, Metadata},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::{
    Warnings,
    host::{Person, READ, SEARCH, WRITE, changeable},
};
use crate::{
    config::{Config, KeyPlaces, ResolverConfig},
    monitor,
    resolver::aliases::Aliases,
};

pub(super) fn check(config: &Config, places: &KeyPlaces, file: &Path, warnings: &mut Warnings) {
    let worker = Person::named(&config.server.user).filter(|_| nix::unistd::geteuid().is_root());
    let mut files = Files { worker, warnings };
    files.unchangeable("", file, "whoever can change it decides what root runs");
    files.recipients(config);
    for (number, resolver) in config.resolvers.iter().enumerate() {
        files.resolver(&format!("resolver.{number}"), resolver);
    }
    files.filter(config, places);
}

struct Files<'a> {
    /// Who reads most of them, if the daemon is started as the user who checks, and that is root.
    worker: Option<Person>,
    warnings: &'a mut Warnings,
}

impl Files<'_> {
    fn recipients(&mut self, config: &Config) {
        let recipients = &config.recipients;
        let sources = [("aliases", &recipients.aliases), ("virtual", &recipients.virtual_aliases)];
        for (key, paths) in sources {
            for path in paths {
                let key = format!("recipients.{key}");
                if self
                    .present(&key, path, "until it is there, its addresses are taken for other users'")
                    .is_some()
                {
                    self.readable(&key, path);
                    self.unchangeable(&key, path, "whoever can change it decides who is asked about mail");
                }
            }
        }
        let aliases = Aliases::open(&recipients.aliases, &recipients.virtual_aliases);
        for (path, problem) in aliases.problems() {
            self.warnings.add_at("recipients.aliases", &path, problem.line, &problem.message);
        }
        if let Some(rules) = &recipients.rules {
            let harm = "whoever can change it decides about everybody's mail";
            self.unchangeable("recipients.rules", &rules.path, harm);
        }
    }

    fn resolver(&mut self, key: &str, resolver: &ResolverConfig) {
        match resolver {
            ResolverConfig::Passwd(_) => (),
            ResolverConfig::PasswdFile(file) => {
                let key = format!("{key}.path");
                if self
                    .present(
                        &key,
                        &file.path,
                        "until it is there, mail for its users is decided by filter.on-error",
                    )
                    .is_some()
                {
                    self.readable(&key, &file.path);
                    self.unchangeable(&key, &file.path, "whoever can change it decides as whom filters run");
                }
            }
            ResolverConfig::Ldap(ldap) => {
                if let Some(path) = &ldap.password_file {
                    self.secret(&format!("{key}.password-file"), path);
                }
                if let Some(path) = &ldap.ca_file {
                    let harm = "whoever can change it can play the directory";
                    self.unchangeable(&format!("{key}.ca-file"), path, harm);
                }
            }
        }
    }

    fn filter(&mut self, config: &Config, places: &KeyPlaces) {
        let filter = &config.filter;
        let spool = &filter.spool_directory;
        let harm = "a message over filter.memory-limit is decided by filter.on-error";
        if self.directory("filter.spool-directory", spool, harm)
            && let Some(obstacle) =
                self.worker.as_ref().and_then(|worker| worker.obstacle(spool, WRITE | SEARCH))
        {
            let user = &config.server.user;
            let message = format!("user {user} may not write to it ({}): {harm}", obstacle.display());
            self.warnings.add("filter.spool-directory", message);
        }
        for (key, paths) in [
            ("filter.virtual-homes", &filter.virtual_homes),
            ("filter.program-directories", &filter.program_directories),
        ] {
            // Those of the built-in defaults need not be there.
            for path in paths.iter().filter(|_| places.has(key)) {
                self.directory(key, path, "nothing can lie in it");
            }
        }
        for path in &filter.program_directories {
            self.unchangeable("filter.program-directories", path, "its programs are not run");
        }
        for (key, path) in [
            ("filter.default-message", &filter.default_message),
            ("filter.default-recipient", &filter.default_recipient),
        ] {
            if let Some(path) = path
                && let Err(problem) = monitor::check_executable(path, 0)
            {
                self.warnings.add(key, format!("it will not run, and filter.on-error decides: {problem}"));
            }
        }
    }

    fn present(&mut self, key: &str, path: &Path, harm: &str) -> Option<Metadata> {
        match fs::metadata(path) {
            Ok(metadata) => Some(metadata),
            Err(error) => {
                self.warnings.add(key, format!("{}: {error}: {harm}", path.display()));
                None
            }
        }
    }

    fn directory(&mut self, key: &str, path: &Path, harm: &str) -> bool {
        match self.present(key, path, harm) {
            Some(metadata) if !metadata.is_dir() => {
                self.warnings.add(key, format!("{} is no directory: {harm}", path.display()));
                false
            }
            found => found.is_some(),
        }
    }

    fn readable(&mut self, key: &str, path: &Path) {
        let Some(worker) = &self.worker else { return };
        if let Some(obstacle) = worker.obstacle(path, READ) {
            let message = format!(
                "{}: user {} reads it, and may not ({})",
                path.display(),
                worker.name,
                obstacle.display()
            );
            self.warnings.add(key, message);
        }
    }

    fn unchangeable(&mut self, key: &str, path: &Path, harm: &str) {
        if let Some((part, by)) = changeable(path) {
            let part: PathBuf = part;
            self.warnings.add(key, format!("{} can be changed by {by}: {harm}", part.display()));
        }
    }

    fn secret(&mut self, key: &str, path: &Path) {
        let Ok(metadata) = fs::metadata(path) else { return };
        let mode = metadata.mode() & 0o777;
        if mode & 0o004 != 0 {
            let message = format!(
                "{} has mode {mode:04o}: everybody can read the password; the daemon reads it as root: chmod 0600",
                path.display()
            );
            self.warnings.add(key, message);
        }
        self.unchangeable(key, path, "whoever can change it can keep the directory from being asked");
    }
}
