//! What was said at RCPT TO in the last minute, so that both interfaces say the same and a `recipient` executable
//! runs once.
//!
//! Two memories, because two promises meet here. An executable's answer is good for everybody who asks the same. What
//! rules say is remembered for the *other* interface only: an interface that asks again asks about another mail, and
//! is to see an edit of `rules.toml` at once.

use std::{
    collections::hash_map::RandomState,
    future::Future,
    hash::BuildHasher,
    sync::Arc,
    time::{Duration, Instant},
};

use moka::{future, sync};

use crate::{
    address::Address,
    filter::Answer,
    ruling::Ruled,
    transaction::{Envelope, Interface},
    user::User,
};

/// How long an answer is good for the same question.
const ANSWER_TTL: Duration = Duration::from_secs(60);

/// How long rules that say the same again are not remembered anew, which costs more than asking them.
const RULES_MARGIN: Duration = Duration::from_secs(10);

/// Answers remembered of either kind. Strangers choose what is asked, so there is a bound.
const MAX_ANSWERS: u64 = 10_000;

/// What makes two questions at RCPT TO the same, as a hash with keys that no stranger knows: the parts themselves would
/// be a dozen strings to copy for every request of a policy client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RecipientQuestion([u64; 2]);

/// Which interface asked the rules, what they said, and since when that is remembered.
type Remembered = (Interface, Arc<Ruled>, Instant);

/// What was said in the last minute.
#[derive(Debug)]
pub struct Answers {
    keys: [RandomState; 2],
    /// By question and executable.
    executables: future::Cache<(RecipientQuestion, String), Answer>,
    /// By question and declared size; with the interface that asked.
    rules: sync::Cache<(RecipientQuestion, Option<u64>), Remembered>,
}

impl Answers {
    /// None yet.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self {
            keys: [RandomState::new(), RandomState::new()],
            executables: future::Cache::builder().max_capacity(MAX_ANSWERS).time_to_live(ANSWER_TTL).build(),
            rules: sync::Cache::builder()
                .max_capacity(MAX_ANSWERS)
                .time_to_live(ANSWER_TTL + RULES_MARGIN)
                .build(),
        }
    }

    /// The question about `recipient`, which aliases have made `final_address`, put to one user. Filters see both
    /// addresses; here they are in one spelling, since Postfix tells a milter that a local recipient is `alice` and a
    /// policy service `Alice`.
    pub fn question(
        &self,
        user: &User,
        envelope: &Envelope,
        recipient: &Address,
        final_address: &Address,
    ) -> RecipientQuestion {
        let client = &*envelope.client;
        let parts = (
            user,
            (client.address, &client.name, &client.helo),
            &envelope.sender,
            (recipient.key(), final_address.key()),
        );
        RecipientQuestion([self.keys[0].hash_one(&parts), self.keys[1].hash_one(&parts)])
    }

    /// The answer of an executable: the remembered one, or that of `ask`, which runs once for simultaneous questions.
    /// A filter error is an answer too: whoever waited for a time-out once is not to wait again.
    pub async fn of_executable(
        &self,
        question: RecipientQuestion,
        name: &str,
        ask: impl Future<Output = Option<Answer>>,
    ) -> Option<Answer> {
        // What it wrote has been logged, and may be long.
        let forget = |answer| Answer { output: String::new(), error_output: String::new(), ..answer };
        let ask = async { ask.await.map(forget).ok_or(()) };
        self.executables.try_get_with((question, name.to_owned()), ask).await.ok()
    }

    /// What rules say: what they said to the other interface, or else what `judge` finds.
    pub fn of_rules(
        &self,
        question: RecipientQuestion,
        envelope: &Envelope,
        judge: impl FnOnce() -> Ruled,
    ) -> Arc<Ruled> {
        let key = (question, envelope.declared_size);
        let known = self.rules.get(&key);
        match known {
            Some((asker, ruled, _)) if asker != envelope.interface => ruled,
            known => {
                let ruled = judge();
                match known {
                    // As when one client writes to one user again and again.
                    Some((_, known, since)) if *known == ruled && since.elapsed() < RULES_MARGIN => known,
                    _ => {
                        let ruled = Arc::new(ruled);
                        self.rules.insert(key, (envelope.interface, Arc::clone(&ruled), Instant::now()));
                        ruled
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        address::Sender,
        recipient::{Decision, Source},
        rules::WaitsForSize,
        transaction::Client,
        user::{Account, UserName},
        verdict::Opinion,
    };

    fn envelope(interface: Interface) -> Envelope {
        Envelope {
            interface,
            queue_id: None,
            client: Arc::new(Client::default()),
            sender: Sender::Null,
            declared_size: None,
            smtputf8: false,
        }
    }

    fn question(answers: &Answers, envelope: &Envelope) -> RecipientQuestion {
        let name = UserName::try_from("alice".to_owned()).unwrap();
        let user = User { name, account: Account::Passwd, program: None };
        let address = Address::parse(b"alice@example.org").unwrap();
        answers.question(&user, envelope, &address, &address)
    }

    fn ruled(by: &str) -> Ruled {
        let decision = Decision { opinion: Opinion::Accept, by: by.into(), source: Source::Rules };
        Ruled { decision: Some(decision), waits_for_size: WaitsForSize::default() }
    }

    #[test]
    fn rules_say_the_same_to_the_other_interface_and_are_asked_anew_by_the_same() {
        let answers = Answers::new();
        let ask = |interface, by: &str| {
            let envelope = envelope(interface);
            let answer = answers.of_rules(question(&answers, &envelope), &envelope, || ruled(by));
            answer.decision.as_ref().unwrap().by.clone()
        };
        assert_eq!(ask(Interface::Policy, "first"), "first");
        assert_eq!(ask(Interface::Milter, "edited"), "first");
        assert_eq!(ask(Interface::Policy, "edited"), "edited");
        assert_eq!(ask(Interface::Milter, "edited again"), "edited");
    }
}
