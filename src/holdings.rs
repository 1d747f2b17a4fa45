//! What a user has: filters and rules, asked of the monitor once per `filter.inspect-ttl`.

use std::{io, sync::Arc};

use moka::future::Cache;
use tracing::{debug, warn};

use crate::{
    logging::Quoted,
    monitor::{Inspection, RulesSource},
    rules::Rules,
    user::User,
    worker::{InspectError, Monitor},
};

/// What is remembered of all users together, in bytes of their files. Compiled it is some times as much, and a user may
/// have 16 MiB of sender files.
const CAPACITY: u64 = 64 << 20;

/// What a user without rules counts, in bytes.
const LEAST_WEIGHT: usize = 4096;

/// What a user has, ready for use.
#[derive(Debug, Default)]
pub struct Holdings {
    /// As the monitor's child saw it.
    pub inspection: Inspection,
    /// The compiled rules; `None`: no rules, or rules with an error.
    pub rules: Option<Rules>,
    /// Why there are rules that are ignored.
    pub rules_error: Option<String>,
    /// Bytes of the rules and all that they name.
    pub(crate) weight: usize,
}

/// Asks and remembers.
#[derive(Debug)]
pub struct Inspector {
    monitor: Arc<Monitor>,
    cache: Cache<User, Arc<Holdings>>,
}

impl Inspector {
    /// `ttl`: how long an answer is remembered; zero: not at all.
    pub fn new(monitor: Arc<Monitor>, ttl: std::time::Duration) -> Self {
        let capacity = if ttl.is_zero() { 0 } else { CAPACITY };
        let weigh = |_: &User, holdings: &Arc<Holdings>| {
            u32::try_from(holdings.weight + LEAST_WEIGHT).unwrap_or(u32::MAX)
        };
        let cache = Cache::builder().weigher(weigh).max_capacity(capacity).time_to_live(ttl).build();
        Self { monitor, cache }
    }

    /// What the user has, if it is remembered.
    pub async fn remembered(&self, user: &User) -> Option<Arc<Holdings>> {
        self.cache.get(user).await
    }

    /// What the user has. Simultaneous questions about one user are asked once; errors are not remembered.
    ///
    /// # Errors
    ///
    /// Why it is not known.
    pub async fn holdings(&self, user: &User) -> Result<Arc<Holdings>, Arc<InspectError>> {
        let ask = async {
            let inspection = match self.monitor.inspect(user).await {
                // Known to the resolver, unknown to the monitor: an account that is just being removed.
                Err(InspectError::NoUser) => Inspection::default(),
                other => other?,
            };
            debug!(user = %user.name, "inspected");
            // Off the async threads: a hundred thousand addresses take a while to understand.
            let user = user.clone();
            let holdings = tokio::task::spawn_blocking(move || Holdings::new(&user, inspection)).await;
            holdings.map(Arc::new).map_err(|error| InspectError::System(io::Error::other(error)))
        };
        self.cache.try_get_with(user.clone(), ask).await
    }
}

impl Holdings {
    fn new(user: &User, mut inspection: Inspection) -> Self {
        let weight = inspection.rules.as_ref().map_or(0, |source| {
            source.text.len() + source.sender_files.iter().map(|(_, text)| text.len()).sum::<usize>()
        });
        let compiled = match (inspection.rules_problem.take(), inspection.rules.take()) {
            (Some(problem), _) => Err(problem),
            (None, Some(source)) => compile(&source).map(Some),
            (None, None) => Ok(None),
        };
        match compiled {
            Ok(rules) => Self { inspection, rules, rules_error: None, weight },
            Err(error) => {
                warn!(user = %user.name, "rules ignored: {}", Quoted(&error));
                Self { inspection, rules: None, rules_error: Some(error), weight }
            }
        }
    }
}

fn compile(source: &RulesSource) -> Result<Rules, String> {
    let file = |name: &str| {
        source.sender_files.iter().find(|(known, _)| known == name).map(|(_, text)| text.clone())
    };
    Rules::parse(&source.text, file).map_err(|error| format!("rules.toml:{error}"))
}
