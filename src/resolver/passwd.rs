//! The host's users, as NSS knows them (nsswitch.conf(5), getpwnam(3)).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use moka::future::Cache;

use crate::{inquiry::Inquiry, user::UserName};

use crate::metrics::{AnswerSource, Histogram};

/// How long an answer is remembered. Short, so that a new account is soon known.
const TTL: Duration = Duration::from_secs(10);

/// Names remembered. Strangers choose them, so there is a bound.
const CAPACITY: u64 = 10_000;

/// Look-ups by name. Each costs a process of the monitor's, so that no name is asked about twice in a while.
#[derive(Debug)]
pub(super) struct Passwd {
    inquiry: Inquiry,
    min_uid: u32,
    latency: Histogram,
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
    /// `min_uid`: users below are system accounts. `latency`: how long NSS takes is counted there.
    pub(super) fn new(inquiry: Inquiry, min_uid: u32, latency: Histogram) -> Self {
        let cache = Cache::builder().max_capacity(CAPACITY).time_to_live(TTL).build();
        Self { inquiry, min_uid, latency, cache }
    }

    /// Looks a login name up; simultaneous questions about one name are asked once.
    ///
    /// # Errors
    ///
    /// Why NSS could not be asked. Not remembered.
    pub(super) async fn lookup(
        &self,
        name: &UserName,
    ) -> Result<(Answer, AnswerSource), Arc<std::io::Error>> {
        if let Some(answer) = self.cache.get(name).await {
            return Ok((answer, AnswerSource::Cache));
        }
        let ask = async {
            let started = Instant::now();
            let uid = self.inquiry.uid(name.clone()).await;
            self.latency.observe(started.elapsed());
            Ok(match uid? {
                Some(uid) if uid >= self.min_uid => Answer::Found,
                Some(_) => Answer::System,
                None => Answer::NotFound,
            })
        };
        let answer = self.cache.try_get_with_by_ref(name, ask).await?;
        Ok((answer, AnswerSource::Asked))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn system_accounts_exist_but_are_not_judged() {
        let name = |name: &str| UserName::try_from(name.to_owned()).unwrap();
        let latency = Histogram::default();
        let passwd = Passwd::new(Inquiry::Direct, 1000, latency.clone());
        let root = name("root");
        assert_eq!(passwd.lookup(&root).await.unwrap(), (Answer::System, AnswerSource::Asked));
        assert_eq!(passwd.lookup(&root).await.unwrap(), (Answer::System, AnswerSource::Cache));
        let nobody = passwd.lookup(&name("umt-nobody-has-this-name")).await.unwrap();
        assert_eq!(nobody, (Answer::NotFound, AnswerSource::Asked));
        assert_eq!(latency.percentiles().count, 2);
        let passwd = Passwd::new(Inquiry::Direct, 0, Histogram::default());
        assert_eq!(passwd.lookup(&root).await.unwrap().0, Answer::Found);
    }
}
