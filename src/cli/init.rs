//! `usermilter init`: a first filter.

use std::{
    fs::{DirBuilder, OpenOptions},
    io::{self, IsTerminal, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::ExitCode,
};

use super::{CANTCREAT, USAGE};

const HELP: &str = "\
What is there is never overwritten.

Examples:
  usermilter init
      a filter that accepts everything, to write one's own tests into
  usermilter init --template bogofilter && usermilter try < spam
      a spam filter, and what it says
  usermilter init --template allow-list < members
      only these may write; addresses in any form, one a line

Exit status:
   0  written
  64  wrong usage; no such template
  73  it can't be written, or something is there already

Files:
  ~/.usermilter/message     the filter, an executable
  ~/.usermilter/rules.toml, senders.txt    rules, of the template allow-list";

/// Write a first ~/.usermilter with a working filter.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub(super) struct Arguments {
    /// What to write; `--list` shows the choice.
    #[arg(long, value_name = "NAME", default_value = "accept")]
    template: String,
    /// List the templates.
    #[arg(long)]
    list: bool,
}

struct Template {
    name: &'static str,
    summary: &'static str,
    files: &'static [File],
    /// A file of addresses that standard input fills, if it is no terminal.
    addresses: Option<&'static str>,
}

struct File {
    name: &'static str,
    text: &'static str,
    mode: u32,
}

macro_rules! file {
    ($name:literal, $source:literal, $mode:literal) => {
        File { name: $name, text: include_str!(concat!("templates/", $source)), mode: $mode }
    };
}

const TEMPLATES: &[Template] = &[
    Template {
        name: "accept",
        summary: "accepts everything, and shows where to write your own test",
        files: &[file!("message", "accept", 0o700)],
        addresses: None,
    },
    Template {
        name: "allow-list",
        summary: "lets only listed senders write to you; takes their addresses from standard input",
        files: &[file!("rules.toml", "allow-list.toml", 0o600)],
        addresses: Some("senders.txt"),
    },
    Template {
        name: "spamassassin",
        summary: "refuses what SpamAssassin (spamc, spamd) takes for spam",
        files: &[file!("message", "spamassassin", 0o700)],
        addresses: None,
    },
    Template {
        name: "rspamd",
        summary: "refuses what Rspamd (rspamc) wants to have refused",
        files: &[file!("message", "rspamd", 0o700)],
        addresses: None,
    },
    Template {
        name: "bogofilter",
        summary: "refuses what your own bogofilter word lists take for spam",
        files: &[file!("message", "bogofilter", 0o700)],
        addresses: None,
    },
];

pub(super) fn run(arguments: &Arguments) -> ExitCode {
    if arguments.list {
        for template in TEMPLATES {
            println!("{:<14}{}", template.name, template.summary);
        }
        return ExitCode::SUCCESS;
    }
    let Some(template) = TEMPLATES.iter().find(|template| template.name == arguments.template) else {
        let names: Vec<_> = TEMPLATES.iter().map(|template| template.name).collect();
        eprintln!("usermilter: no template \"{}\"; there are {}", arguments.template, names.join(", "));
        return ExitCode::from(USAGE);
    };
    let Some(home) = std::env::var_os("HOME").map(PathBuf::from).filter(|home| home.is_absolute()) else {
        eprintln!("usermilter: HOME is not set to a directory");
        return ExitCode::from(USAGE);
    };
    let directory = home.join(".usermilter");
    match write(template, &directory) {
        Ok(files) => {
            for file in files {
                println!("wrote {}", file.display());
            }
            println!("Try it:  usermilter try < some-message");
            ExitCode::SUCCESS
        }
        Err((path, error)) => {
            let hint =
                if error.kind() == io::ErrorKind::AlreadyExists { " (move it away first)" } else { "" };
            eprintln!("usermilter: {}: {error}{hint}", path.display());
            ExitCode::from(CANTCREAT)
        }
    }
}

/// Writes all files or none that was there before.
fn write(template: &Template, directory: &Path) -> Result<Vec<PathBuf>, (PathBuf, io::Error)> {
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700).create(directory).map_err(|error| (directory.to_owned(), error))?;
    let mut files: Vec<(PathBuf, String, u32)> = template
        .files
        .iter()
        .map(|file| (directory.join(file.name), file.text.to_owned(), file.mode))
        .collect();
    if let Some(name) = template.addresses {
        files.push((directory.join(name), addresses().map_err(|e| ("standard input".into(), e))?, 0o600));
    }
    if let Some((existing, ..)) = files.iter().find(|(path, ..)| path.symlink_metadata().is_ok()) {
        return Err((existing.clone(), io::ErrorKind::AlreadyExists.into()));
    }
    for (path, text, mode) in &files {
        let mut options = OpenOptions::new();
        let written = options
            .write(true)
            .create_new(true)
            .mode(*mode)
            .open(path)
            .and_then(|mut file| file.write_all(text.as_bytes()));
        written.map_err(|error| (path.clone(), error))?;
    }
    Ok(files.into_iter().map(|(path, ..)| path).collect())
}

/// The addresses on standard input, one a line, sorted and each once; a member list has them in any order, in any
/// case, in angle brackets or with names in front.
fn addresses() -> io::Result<String> {
    let mut text =
        String::from("# One address a line; * and ? are wildcards, @example.org is a whole domain.\n");
    let mut input = String::new();
    if !io::stdin().is_terminal() {
        io::stdin().lock().read_to_string(&mut input)?;
    }
    let mut addresses: Vec<String> = input.lines().filter_map(address_of_line).collect();
    addresses.sort();
    addresses.dedup();
    for address in addresses {
        text.push_str(&address);
        text.push('\n');
    }
    Ok(text)
}

fn address_of_line(line: &str) -> Option<String> {
    let line = line.split_once('#').map_or(line, |(before, _)| before).trim();
    let bare = match (line.rfind('<'), line.rfind('>')) {
        (Some(open), Some(close)) if open < close => &line[open + 1..close],
        _ => line,
    };
    (!bare.is_empty() && !bare.contains(char::is_whitespace)).then(|| bare.to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::Rules;

    #[test]
    fn member_lists_come_in_many_forms() {
        assert_eq!(address_of_line("Alice <Alice@Example.org>"), Some("alice@example.org".into()));
        assert_eq!(address_of_line("  bob@example.org  # since 2019"), Some("bob@example.org".into()));
        assert_eq!(address_of_line("# nobody"), None);
        assert_eq!(address_of_line(""), None);
        assert_eq!(address_of_line("no address here"), None);
    }

    #[test]
    fn the_rules_of_every_template_are_valid() {
        for template in TEMPLATES {
            for file in template.files.iter().filter(|file| file.name == "rules.toml") {
                let rules = Rules::parse(file.text, |name| {
                    assert_eq!(Some(name), template.addresses);
                    Some("a@example.org\n".into())
                });
                assert!(rules.is_ok_and(|rules| !rules.is_empty()), "{}", template.name);
            }
        }
    }

    #[test]
    fn nothing_is_overwritten() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join(".usermilter");
        assert!(write(&TEMPLATES[0], &directory).is_ok());
        assert!(write(&TEMPLATES[0], &directory).is_err());
        assert_eq!(std::fs::read_to_string(directory.join("message")).unwrap(), TEMPLATES[0].files[0].text);
    }
}
