//! The host's users, as NSS knows them (nsswitch.conf(5), getpwnam(3)).

use std::{sync::Arc, time::Duration};

use moka::future::Cache;

use crate::{inquiry::Inquiry, user::UserName};

/// How long an answer is remembered. Short, so that a new account is soon known.
const TTL: Duration = Duration::from_secs(10);

/// Names remembered. Strangers choose them, so there is a bound.
const CAPACITY: u64 = 10_000;

/// Look-ups by name. Each costs a process of the monitor's, so that no name is asked about twice in a while.
#[derive(Debug)]
pub(super) struct Passwd {
    inquiry: Inquiry,
    min_uid: u32,
    cache: Cache<UserName, Answer>,
}

/// What NSS says of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// A user who may have filters.
    Found,
    /// A system account: it exists, and is not judged.
    System,
    /// No such name.
    NotFound,
}

impl Passwd {
    /// `min_uid`: users below are system accounts.
    pub(super) fn new(inquiry: Inquiry, min_uid: u32) -> Self {
        let cache = Cache::builder().max_capacity(CAPACITY).time_to_live(TTL).build();
        Self { inquiry, min_uid, cache }
    }

    /// Looks a login name up; simultaneous questions about one name are asked once.
    ///
    /// # Errors
    ///
    /// Why NSS could not be asked. Not remembered.
    pub(super) async fn lookup(&self, name: &UserName) -> Result<Answer, Arc<std::io::Error>> {
        if let Some(answer) = self.cache.get(name).await {
            return Ok(answer);
        }
        let ask = async {
            Ok(match self.inquiry.uid(name.clone()).await? {
                Some(uid) if uid >= self.min_uid => Answer::Found,
                Some(_) => Answer::System,
                None => Answer::NotFound,
            })
        };
        self.cache.try_get_with_by_ref(name, ask).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn system_accounts_exist_but_are_not_judged() {
        let name = |name: &str| UserName::try_from(name.to_owned()).unwrap();
        let passwd = Passwd::new(Inquiry::Direct, 1000);
        assert_eq!(passwd.lookup(&name("root")).await.unwrap(), Answer::System);
        assert_eq!(passwd.lookup(&name("umt-nobody-has-this-name")).await.unwrap(), Answer::NotFound);
        let everybody = Passwd::new(Inquiry::Direct, 0);
        assert_eq!(everybody.lookup(&name("root")).await.unwrap(), Answer::Found);
    }
}
