//! aliases(5) and virtual(5) source files: who else an address means, as Postfix would deliver it.
//!
//! The files are read as text, not as the tables that postalias(1) and postmap(1) make of them, and again
//! when they change. A look-up sees all of them, with the files that they include, as of one moment.

mod expand;
mod parse;
mod targets;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

pub use self::expand::{Expansion, Leaf, MAX_DEPTH, MAX_LEAVES, Step, expand};
use self::parse::{AliasTable, Entry, IncludeList, Key};
use self::targets::Item;
use super::source::{Problem, SourceFile};
use crate::address::Address;
use crate::inquiry::Inquiry;

/// How deep files may include each other: Sendmail and Postfix users need 1 or 2.
const MAX_INCLUDE_DEPTH: usize = 10;

/// Files included altogether: each costs a stat(2) a second.
const MAX_INCLUDED_FILES: usize = 10_000;

/// Targets taken from one entry with all that it includes: [`expand`] would take no more.
const MAX_TARGETS: usize = MAX_LEAVES;

/// What an alias may lead to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// An address, perhaps an alias again; without a domain it is one of this host.
    Address(Address),
    /// Nobody who can be asked: a command, a file, an `:include:` that was refused, a target that can't be
    /// read. The text says which.
    Unjudged(String),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Unjudged(why) => f.write_str(why),
        }
    }
}

/// The two steps of Postfix: cleanup(8) applies virtual(5) to every address until nothing changes, local(8)
/// applies aliases(5) to what is left for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// virtual(5)
    Virtual,
    /// aliases(5)
    Local,
}

/// What the sources of one stage say about an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// It is an alias.
    Found(Found),
    /// It is none.
    NotFound,
    /// A source that could have known was never readable, for this reason.
    Unavailable(String),
}

/// An alias, included files read in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// At least one.
    pub targets: Vec<Target>,
    /// `path:line`, for people.
    pub origin: String,
}

/// All sources of a configuration.
#[derive(Debug)]
pub struct Aliases {
    /// Held by [`Aliases::refresh`] only.
    files: Mutex<Files>,
    snapshot: RwLock<Arc<Snapshot>>,
}

#[derive(Debug)]
struct Files {
    virtuals: Vec<SourceFile<AliasTable>>,
    aliases: Vec<SourceFile<AliasTable>>,
    includes: BTreeMap<PathBuf, SourceFile<IncludeList>>,
}

/// Everything as of one moment.
#[derive(Debug)]
struct Snapshot {
    virtuals: Vec<Table>,
    aliases: Vec<Table>,
    includes: HashMap<PathBuf, Result<Arc<IncludeList>, String>>,
}

#[derive(Debug)]
struct Table {
    path: PathBuf,
    content: Result<Arc<AliasTable>, String>,
}

impl Aliases {
    /// Reads the aliases(5) and virtual(5) files, each kind asked in the order given.
    pub fn open(aliases: &[PathBuf], virtuals: &[PathBuf]) -> Self {
        let aliases = aliases.iter().map(|path| SourceFile::open(path, parse::aliases));
        let virtuals = virtuals.iter().map(|path| SourceFile::open(path, parse::virtuals));
        let mut files =
            Files { aliases: aliases.collect(), virtuals: virtuals.collect(), includes: BTreeMap::new() };
        files.refresh_includes();
        let snapshot = files.snapshot();
        Self { files: Mutex::new(files), snapshot: RwLock::new(Arc::new(snapshot)) }
    }

    /// Reads what has changed, included files too. Blocks on the file system: not for an async thread.
    pub fn refresh(&self) {
        self.refresh_by(&Inquiry::Direct);
    }

    /// As [`Aliases::refresh`]; files that are included, and belong to root or this process, are read by itself.
    pub fn refresh_by(&self, inquiry: &Inquiry) {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        for source in files.virtuals.iter().chain(&files.aliases) {
            source.refresh_by(inquiry);
        }
        files.refresh_includes();
        let snapshot = Arc::new(files.snapshot());
        let mut slot = self.snapshot.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *slot, snapshot);
        drop(slot);
        drop(old);
    }

    /// The files that are included, by whatever text names them now.
    pub fn included_files(&self) -> Vec<PathBuf> {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.includes.keys().cloned().collect()
    }

    /// What was wrong in the texts that are in use, by file; waits while a refresh is under way.
    pub fn problems(&self) -> Vec<(PathBuf, Problem)> {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let tables = files.virtuals.iter().chain(&files.aliases);
        let includes = files.includes.values();
        tables
            .map(|source| (source.path(), source.problems()))
            .chain(includes.map(|source| (source.path(), source.problems())))
            .flat_map(|(path, problems)| {
                let problems = problems.iter().cloned();
                problems.map(|problem| (path.to_owned(), problem)).collect::<Vec<_>>()
            })
            .collect()
    }

    /// What the sources of one stage say about `address`.
    ///
    /// Order of virtual(5): user+ext@domain, user@domain, then for an address of ours user+ext and user, then
    /// @domain; each asked of every source before the next. An extension that was not matched is appended to
    /// the targets (propagate_unmatched_extensions, postconf(5)). aliases(5) are for addresses of ours only,
    /// full name first, and swallow the extension. An address without domain is looked up by its name alone:
    /// to find entries for `user@domain`, qualify it first.
    pub fn lookup(&self, address: &Address, stage: Stage, is_ours: bool, delimiters: &str) -> Lookup {
        let snapshot = self.snapshot.read().unwrap_or_else(PoisonError::into_inner).clone();
        match stage {
            Stage::Virtual => snapshot.lookup_virtual(address, is_ours, delimiters),
            Stage::Local if is_ours => snapshot.lookup_local(address, delimiters),
            Stage::Local => Lookup::NotFound,
        }
    }

    /// Everybody whom `address` means: [`expand`] over these sources.
    pub fn expand(
        &self,
        address: &Address,
        is_ours: impl Fn(&Address) -> bool,
        delimiters: &str,
    ) -> Expansion {
        expand(address, |address, stage| self.lookup(address, stage, is_ours(address), delimiters))
    }
}

impl Files {
    /// Follows `:include:` from the tables on; files that nobody includes any more are forgotten.
    fn refresh_includes(&mut self) {
        let mut known = std::mem::take(&mut self.includes);
        let mut queue: VecDeque<(PathBuf, usize)> = VecDeque::new();
        for source in self.virtuals.iter().chain(&self.aliases) {
            let table = source.current();
            queue.extend(table.includes().iter().map(|path| (path.clone(), 1)));
        }
        while let Some((path, depth)) = queue.pop_front() {
            if depth > MAX_INCLUDE_DEPTH
                || self.includes.len() >= MAX_INCLUDED_FILES
                || self.includes.contains_key(&path)
            {
                continue;
            }
            let source = match known.remove(&path) {
                Some(source) => {
                    source.refresh();
                    source
                }
                None => SourceFile::open_guarded(&path, parse::include),
            };
            let list = source.current();
            queue.extend(targets::includes(&list.items).map(|path| (path.clone(), depth + 1)));
            self.includes.insert(path, source);
        }
    }

    fn snapshot(&self) -> Snapshot {
        let tables = |sources: &[SourceFile<AliasTable>]| {
            let tables =
                sources.iter().map(|source| Table { path: source.path().to_owned(), content: source.ask() });
            tables.collect()
        };
        let includes = self.includes.iter();
        Snapshot {
            virtuals: tables(&self.virtuals),
            aliases: tables(&self.aliases),
            includes: includes.map(|(path, source)| (path.clone(), source.ask())).collect(),
        }
    }
}

impl Snapshot {
    fn lookup_virtual(&self, address: &Address, is_ours: bool, delimiters: &str) -> Lookup {
        if self.virtuals.is_empty() {
            return Lookup::NotFound;
        }
        let extended = split(address, delimiters);
        let spellings = || {
            let shorter = extended.iter().map(|(user, extension)| (user, *extension));
            std::iter::once((address, "")).chain(shorter)
        };
        let mut keys: Vec<(Key, &str)> = spellings()
            .filter_map(|(spelling, extension)| Some((Key::mailbox(spelling)?, extension)))
            .collect();
        if is_ours {
            keys.extend(spellings().map(|(spelling, extension)| (Key::local(spelling.local()), extension)));
        }
        if let Some(domain) = address.domain() {
            keys.push((Key::Domain(domain.to_owned()), ""));
        }
        for (key, extension) in &keys {
            match find(&self.virtuals, key) {
                Ok(Some((table, entry))) => {
                    let mut targets = self.targets(entry);
                    for target in &mut targets {
                        if let Target::Address(address) = target {
                            *address = address.with_local(format!("{}{extension}", address.local()));
                        }
                    }
                    if let Some(domain) = &entry.same_user_at {
                        targets.insert(0, same_user_at(domain, address));
                    }
                    return found(table, entry, targets);
                }
                Ok(None) => {}
                Err(reason) => return Lookup::Unavailable(reason),
            }
        }
        Lookup::NotFound
    }

    fn lookup_local(&self, address: &Address, delimiters: &str) -> Lookup {
        if self.aliases.is_empty() {
            return Lookup::NotFound;
        }
        let extended = split(address, delimiters);
        let shorter = extended.iter().map(|(user, _)| user);
        for spelling in std::iter::once(address).chain(shorter) {
            match find(&self.aliases, &Key::local(spelling.local())) {
                Ok(Some((table, entry))) => return found(table, entry, self.targets(entry)),
                Ok(None) => {}
                Err(reason) => return Lookup::Unavailable(reason),
            }
        }
        Lookup::NotFound
    }

    /// The targets of an entry with the included ones in place.
    fn targets(&self, entry: &Entry) -> Vec<Target> {
        let mut targets = Vec::new();
        let complete = self.splice(&entry.items, &mut targets, &mut HashSet::new(), 0);
        if !complete {
            targets.push(Target::Unjudged(format!("more than {MAX_TARGETS} targets")));
        }
        targets
    }

    /// Whether everything had room. A file that was already met adds nothing, as in local(8).
    fn splice<'a>(
        &'a self,
        items: &'a [Item],
        targets: &mut Vec<Target>,
        met: &mut HashSet<&'a Path>,
        depth: usize,
    ) -> bool {
        for item in items {
            if targets.len() >= MAX_TARGETS {
                return false;
            }
            let path = match item {
                Item::To(target) => {
                    targets.push(target.clone());
                    continue;
                }
                Item::Include(path) => path,
            };
            if !met.insert(path) {
                continue;
            }
            let unjudged = |why: &str| Target::Unjudged(format!(":include:{}: {why}", path.display()));
            match self.includes.get(path) {
                _ if depth >= MAX_INCLUDE_DEPTH => targets.push(unjudged("included too deep")),
                None => targets.push(unjudged("one included file too many")),
                Some(Err(reason)) => targets.push(Target::Unjudged(format!(":include:{reason}"))),
                // An empty list is a list of nobody, and nobody can't be asked.
                Some(Ok(list)) if list.items.is_empty() => targets.push(unjudged("lists nobody")),
                Some(Ok(list)) => {
                    if !self.splice(&list.items, targets, met, depth + 1) {
                        return false;
                    }
                }
            }
        }
        true
    }
}

/// The first table that has `key`; an unreadable table before it could have had it, so that ends the search.
fn find<'a>(tables: &'a [Table], key: &Key) -> Result<Option<(&'a Table, &'a Entry)>, String> {
    for table in tables {
        match &table.content {
            Ok(content) => {
                if let Some(entry) = content.get(key) {
                    return Ok(Some((table, entry)));
                }
            }
            Err(reason) => return Err(reason.clone()),
        }
    }
    Ok(None)
}

fn found(table: &Table, entry: &Entry, mut targets: Vec<Target>) -> Lookup {
    if targets.is_empty() {
        // Files that include nothing but each other.
        targets.push(Target::Unjudged("a list of nobody".to_owned()));
    }
    Lookup::Found(Found { targets, origin: format!("{}:{}", table.path.display(), entry.line) })
}

/// `@otherdomain`: this user there, extension and all.
fn same_user_at(domain: &str, address: &Address) -> Target {
    match targets::mailbox(address.local(), Some(domain)) {
        Ok(address) => Target::Address(address),
        Err(error) => Target::Unjudged(format!("{:?} at {domain}: {error}", address.local())),
    }
}

/// The address without its extension, and the extension with its delimiter. Names that Postfix never splits
/// (split_addr(3)) have none: postmaster, and with "-" as delimiter owner-list and list-request.
fn split<'a>(address: &'a Address, delimiters: &str) -> Option<(Address, &'a str)> {
    let (user, extension) = address.split_extension(delimiters);
    extension?;
    let lower = address.local().to_lowercase();
    if matches!(lower.as_str(), "postmaster" | "mailer-daemon" | "double-bounce") {
        return None;
    }
    if delimiters.contains('-') && (lower.starts_with("owner-") || lower.ends_with("-request")) {
        return None;
    }
    Some((address.with_local(user), &address.local()[user.len()..]))
}

#[cfg(test)]
mod tests;
