//! `usermilter resolve`: how an address becomes users, and what they have, step by step.

use std::{fmt::Write as _, process::ExitCode, sync::Arc};

use serde_json::{Value, json};

use super::{
    ConfigArguments, USAGE, load,
    output::{self, BAD, GOOD, ODD, styled},
    run_in_worker,
};
use crate::{
    address::Address,
    config::Config,
    holdings::Inspector,
    logging::Chain,
    monitor::Phase,
    pipeline::Pipeline,
    resolver::{self, ResolvedUser, Step},
    user::Account,
    worker::Monitor,
};

const HELP: &str = "\
Run it as root: it looks into users' homes as these users, to find what they have. It changes nothing and runs nobody's
filter.

Examples:
  usermilter resolve alice+shop@example.org
      which user, which rules, which filter
  usermilter resolve team@example.org postmaster@example.org
      several; aliases are followed
  usermilter resolve --json alice@example.org | jq -r '.[].users[].message_filter'
      for programs

Exit status:
   0  shown, whatever there was to show
  64  wrong usage; what is no address
  78  the configuration has a fault, or root calls and server.user does not exist";

/// Show, step by step, which users addresses mean, and what these have.
///
/// For each address: aliases, what each resolver said and how long it took, the users, whether they can be asked, and
/// which of their rules and filters would be.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub(super) struct Arguments {
    #[command(flatten)]
    config: ConfigArguments,
    /// Print one JSON array with an object for each address.
    #[arg(long)]
    json: bool,
    /// The addresses, as in RCPT TO.
    #[arg(value_name = "ADDRESS", required = true)]
    addresses: Vec<String>,
}

pub(super) fn run(arguments: Arguments) -> ExitCode {
    let mut addresses = Vec::new();
    for text in &arguments.addresses {
        match Address::parse(text.as_bytes()) {
            Ok(address) => addresses.push(address),
            Err(error) => {
                eprintln!("usermilter: \"{}\": {error}", text.escape_debug());
                return ExitCode::from(USAGE);
            }
        }
    }
    let config = match load(&arguments.config) {
        Ok(config) => config,
        Err(status) => return status,
    };
    let (addresses, as_json) = (Arc::new(addresses), arguments.json);
    run_in_worker(config, move |config, monitor| {
        resolve_all(config, monitor, Arc::clone(&addresses), as_json)
    })
}

async fn resolve_all(
    config: Arc<Config>,
    monitor: Arc<Monitor>,
    addresses: Arc<Vec<Address>>,
    as_json: bool,
) -> u8 {
    let chain = resolver::Chain::open(&config);
    let inspector = Inspector::new(monitor, config.filter.inspect_ttl.0);
    let mut reports = Vec::new();
    for address in addresses.iter() {
        let report = resolve(&config, &chain, &inspector, address).await;
        if !as_json {
            output::print(&text_of(&report));
        }
        reports.push(report);
    }
    if as_json {
        output::print(&format!("{}\n", Value::from(reports)));
    }
    0
}

/// One address, as the JSON that is printed; the text for people is made of it.
async fn resolve(
    config: &Config,
    chain: &resolver::Chain,
    inspector: &Inspector,
    address: &Address,
) -> Value {
    let ours = chain.is_our_domain(address);
    let exempt = Pipeline::is_exempt(&config.recipients, address);
    let mut steps = Vec::new();
    let resolution = match exempt {
        true => None,
        false => Some(chain.resolve_with(address, false, &mut |step| steps.push(step_json(&step))).await),
    };
    let mut users = Vec::new();
    let outcome = match resolution {
        None => "exempt: always accepted".to_owned(),
        Some(Err(unavailable)) => format!("could not ask {unavailable}"),
        Some(Ok(resolution)) => {
            for user in &resolution.users {
                users.push(user_json(inspector, user).await);
            }
            match (&resolution.unjudged, resolution.is_nobody()) {
                (Some(why), _) => format!("accepted: {why}"),
                (None, true) => "nobody has this address".to_owned(),
                (None, false) => format!("judged by {} user(s)", resolution.users.len()),
            }
        }
    };
    json!({
        "address": address.to_string(),
        "ours": ours,
        "exempt": exempt,
        "steps": steps,
        "users": users,
        "outcome": outcome,
    })
}

fn step_json(step: &Step) -> Value {
    match step {
        Step::Alias { address, origin, targets } => {
            json!({ "step": "alias", "address": address.to_string(), "origin": origin, "targets": targets })
        }
        Step::Unjudged(why) => json!({ "step": "unjudged", "why": why }),
        Step::Asked { resolver, name, said, elapsed } => json!({
            "step": "resolver",
            "resolver": resolver,
            "name": name,
            "said": said,
            "seconds": elapsed.as_secs_f64(),
        }),
    }
}

async fn user_json(inspector: &Inspector, resolved: &ResolvedUser) -> Value {
    let ResolvedUser { user, address, extension, directory_rules } = resolved;
    let account = match &user.account {
        Account::Passwd => json!({ "type": "passwd" }),
        Account::Virtual { uid, gid, home } => {
            json!({ "type": "virtual", "uid": uid, "gid": gid, "home": home })
        }
    };
    let mut report = json!({
        "user": user.name.as_str(),
        "account": account,
        "address": address.to_string(),
        "extension": extension,
        "directory_rules": directory_rules.is_some(),
    });
    match inspector.holdings(user).await {
        Err(error) => report["problem"] = json!(Chain(&*error).to_string()),
        Ok(holdings) => {
            let inspection = &holdings.inspection;
            let chosen =
                |phase| inspection.filter(phase, extension.as_deref()).map(|file| file.name.as_str());
            let filters = inspection.filters.iter().chain(&inspection.fallback_recipient);
            let filters = filters.chain(&inspection.fallback_message);
            let filters: Vec<_> =
                filters.map(|file| json!({ "name": file.name, "problem": file.problem })).collect();
            report["uid"] = json!(inspection.uid);
            report["home"] = json!(inspection.home);
            report["rules"] = json!(holdings.rules.is_some());
            report["rules_error"] = json!(holdings.rules_error);
            report["filters"] = json!(filters);
            report["recipient_filter"] = json!(chosen(Phase::Recipient));
            report["message_filter"] = json!(chosen(Phase::Message));
        }
    }
    report
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.escape_debug().to_string(),
        other => other.to_string(),
    }
}

fn each(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text_of(report: &Value) -> String {
    let mut out = String::new();
    let ours = if report["ours"] == json!(true) {
        "ours".to_owned()
    } else {
        styled(ODD, "not one of recipients.domains")
    };
    let _ = writeln!(out, "{} ({ours})", text(&report["address"]));
    for step in each(&report["steps"]) {
        match step["step"].as_str() {
            Some("alias") => {
                let targets: Vec<_> = each(&step["targets"]).map(text).collect();
                let _ = writeln!(
                    out,
                    "  alias      {} -> {} ({})",
                    text(&step["address"]),
                    targets.join(", "),
                    text(&step["origin"])
                );
            }
            Some("resolver") => {
                let milliseconds = step["seconds"].as_f64().unwrap_or(0.0) * 1000.0;
                let (resolver, name, said) =
                    (text(&step["resolver"]), text(&step["name"]), text(&step["said"]));
                let _ = writeln!(out, "  resolver   {resolver}: {name}: {said} ({milliseconds:.1} ms)");
            }
            _ => {
                let _ = writeln!(out, "  unjudged   {}", text(&step["why"]));
            }
        }
    }
    for user in each(&report["users"]) {
        let extension = user["extension"].as_str().map_or(String::new(), |e| format!(", extension {e:?}"));
        let _ = writeln!(out, "  user       {} ({}{extension})", text(&user["user"]), text(&user["address"]));
        if let Some(problem) = user["problem"].as_str() {
            let _ = writeln!(out, "             {}: {}", styled(BAD, "not asked"), problem.escape_debug());
            continue;
        }
        let _ = writeln!(out, "             uid {}, home {}", text(&user["uid"]), text(&user["home"]));
        match (user["rules"] == json!(true), user["rules_error"].as_str()) {
            (_, Some(error)) => {
                let _ = writeln!(out, "  rules      {}: {}", styled(BAD, "ignored"), error.escape_debug());
            }
            (true, None) => {
                let _ = writeln!(out, "  rules      rules.toml");
            }
            (false, None) => {
                let _ = writeln!(out, "  rules      none");
            }
        }
        if user["directory_rules"] == json!(true) {
            let _ = writeln!(out, "             sender lists of the directory");
        }
        for filter in each(&user["filters"]) {
            let is_chosen = [&user["recipient_filter"], &user["message_filter"]].contains(&&filter["name"]);
            let note = match filter["problem"].as_str() {
                Some(problem) => format!("{}: {}", styled(BAD, "would not run"), problem.escape_debug()),
                None if is_chosen => styled(GOOD, "asked for this address"),
                None => "not for this address".to_owned(),
            };
            let _ = writeln!(out, "  filter     {}: {note}", text(&filter["name"]));
        }
    }
    let _ = writeln!(out, "  => {}", text(&report["outcome"]));
    out
}
