//! From an address to everybody whom its aliases mean in the end.

use std::collections::{HashSet, VecDeque};

use super::{Lookup, Stage, Target};
use crate::address::Address;

/// Aliases of aliases that are followed; Postfix local(8) stops at 100 calls deep, two to an alias.
pub const MAX_DEPTH: usize = 50;

/// Addresses that one address may mean, as virtual_alias_expansion_limit (postconf(5)) has it.
pub const MAX_LEAVES: usize = 1000;

/// Targets looked at on the way: keeps lists that list each other from costing the product of their lengths.
const MAX_VISITS: usize = 10 * MAX_LEAVES;

/// What an address means, and how that was found out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expansion {
    /// Never empty, nobody twice, at most [`MAX_LEAVES`] and one for the remainder.
    pub leaves: Vec<Leaf>,
    /// The aliases that were followed, in the order in which they were met.
    pub steps: Vec<Step>,
}

/// Where an alias ends.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Leaf {
    /// An address that no alias replaces; whether somebody has it is for the resolvers to say.
    Address(Address),
    /// Somebody who can't be asked, and why: counts as accepting.
    Unjudged(String),
    /// A source could not be read, so who is meant is not known: neither "nobody" nor "somebody else".
    Unavailable(String),
}

/// An alias that was followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The address that was looked up.
    pub address: Address,
    /// `path:line`
    pub origin: String,
    /// What stands there.
    pub targets: Vec<Target>,
}

/// Follows `start` through all its aliases.
///
/// An address whose list contains itself is delivered to itself (aliases(5), and "expands into itself" of
/// virtual(5)): to Postfix that ends virtual(5) for it, and aliases(5) may still say more. Members of a loop
/// that lead nowhere else are nobody; an address that leads into nothing but a loop can't be judged.
pub fn expand(start: &Address, lookup: impl Fn(&Address, Stage) -> Lookup) -> Expansion {
    // Most addresses are nobody's alias: for them all the book-keeping would cost more than the look-ups.
    if [Stage::Virtual, Stage::Local].into_iter().all(|stage| lookup(start, stage) == Lookup::NotFound) {
        return Expansion { leaves: vec![Leaf::Address(start.clone())], steps: Vec::new() };
    }
    let mut walk = Walk::default();
    walk.visit(start.clone(), Stage::Virtual, 0);
    // Breadth first, so that MAX_DEPTH means the shortest way to an address, not the one tried first.
    while let Some(node) = walk.queue.pop_front() {
        match lookup(&node.address, node.stage) {
            Lookup::NotFound => walk.settle(&node),
            Lookup::Unavailable(why) => walk.leaf(Leaf::Unavailable(why)),
            Lookup::Found(found) => {
                for target in &found.targets {
                    walk.follow(&node, target);
                }
                walk.expansion.steps.push(Step {
                    address: node.address,
                    origin: found.origin,
                    targets: found.targets,
                });
            }
        }
    }
    walk.finish()
}

struct Node {
    address: Address,
    stage: Stage,
    depth: usize,
}

#[derive(Default)]
struct Walk {
    expansion: Expansion,
    queue: VecDeque<Node>,
    visited: HashSet<(Address, Stage)>,
    leaves: HashSet<Leaf>,
    visits: usize,
    overflow: bool,
}

impl Walk {
    fn follow(&mut self, from: &Node, target: &Target) {
        self.visits += 1;
        if self.visits > MAX_VISITS {
            self.overflow = true;
            return;
        }
        match target {
            Target::Unjudged(why) => self.leaf(Leaf::Unjudged(why.clone())),
            Target::Address(address) if is_itself(address, from) => self.settle(from),
            Target::Address(address) => {
                // local(8) delivers a bare name itself; anything with a domain goes through the queue again.
                let stage = match (from.stage, address.domain()) {
                    (Stage::Local, None) => Stage::Local,
                    _ => Stage::Virtual,
                };
                self.visit(address.clone(), stage, from.depth + 1);
            }
        }
    }

    /// Nothing replaces this address at its stage.
    fn settle(&mut self, node: &Node) {
        match node.stage {
            Stage::Virtual => self.visit(node.address.clone(), Stage::Local, node.depth),
            Stage::Local => self.leaf(Leaf::Address(node.address.clone())),
        }
    }

    fn visit(&mut self, address: Address, stage: Stage, depth: usize) {
        if depth > MAX_DEPTH {
            self.leaf(Leaf::Unjudged(format!("more than {MAX_DEPTH} aliases in a row")));
        } else if self.visited.insert((folded(&address), stage)) {
            self.queue.push_back(Node { address, stage, depth });
        }
    }

    fn leaf(&mut self, leaf: Leaf) {
        let key = match &leaf {
            Leaf::Address(address) => Leaf::Address(folded(address)),
            other => other.clone(),
        };
        if !self.leaves.insert(key) {
            return;
        }
        if self.expansion.leaves.len() < MAX_LEAVES {
            self.expansion.leaves.push(leaf);
        } else {
            self.overflow = true;
        }
    }

    fn finish(mut self) -> Expansion {
        let leaves = &mut self.expansion.leaves;
        if self.overflow {
            leaves.push(Leaf::Unjudged(format!("more than {MAX_LEAVES} addresses")));
        }
        if leaves.is_empty() {
            leaves.push(Leaf::Unjudged("alias loop".to_owned()));
        }
        self.expansion
    }
}

/// A bare name in aliases(5) is its own address whatever the domain that it was asked with.
fn is_itself(target: &Address, from: &Node) -> bool {
    let same_local = target.local().to_lowercase() == from.address.local().to_lowercase();
    let same_domain = target.domain() == from.address.domain();
    same_local && (same_domain || (from.stage == Stage::Local && target.domain().is_none()))
}

fn folded(address: &Address) -> Address {
    address.with_local(address.local().to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::super::Found;
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn address(text: &str) -> Address {
        Address::parse(text.as_bytes()).unwrap()
    }

    fn target(text: &str) -> Target {
        if text.starts_with('|') {
            return Target::Unjudged(text.to_owned());
        }
        Target::Address(address(text))
    }

    /// `(stage, name, targets)`; the origin of each is `table:` and its index.
    fn table(rows: &[(Stage, &str, &str)]) -> impl Fn(&Address, Stage) -> Lookup {
        let rows: HashMap<_, _> = rows
            .iter()
            .enumerate()
            .map(|(index, (stage, name, targets))| {
                let found = Found {
                    targets: targets.split(' ').map(target).collect(),
                    origin: format!("table:{index}"),
                };
                ((*stage, (*name).to_owned()), found)
            })
            .collect();
        move |address, stage| {
            let name = match stage {
                Stage::Virtual => address.key(),
                Stage::Local => address.local().to_lowercase(),
            };
            match rows.get(&(stage, name)) {
                Some(found) => Lookup::Found(found.clone()),
                None => Lookup::NotFound,
            }
        }
    }

    fn leaves(expansion: &Expansion) -> Vec<String> {
        let written = expansion.leaves.iter().map(|leaf| match leaf {
            Leaf::Address(address) => address.to_string(),
            Leaf::Unjudged(why) => format!("unjudged {why}"),
            Leaf::Unavailable(why) => format!("unavailable {why}"),
        });
        written.collect()
    }

    fn expanded(start: &str, rows: &[(Stage, &str, &str)]) -> Vec<String> {
        leaves(&expand(&address(start), table(rows)))
    }

    #[test]
    fn an_address_without_alias_is_itself() {
        assert_eq!(expanded("Alice+x@a.example", &[]), ["Alice+x@a.example"]);
        assert!(expand(&address("a"), table(&[])).steps.is_empty());
    }

    #[test]
    fn chains_are_followed_through_both_kinds_of_table() {
        let rows = [
            (Stage::Virtual, "sales@a.example", "list carol@b.example"),
            (Stage::Local, "list", "alice bob"),
            (Stage::Local, "bob", "robert@c.example |vacation"),
            (Stage::Virtual, "robert@c.example", "rob@d.example"),
        ];
        let expansion = expand(&address("sales@a.example"), table(&rows));
        assert_eq!(leaves(&expansion), ["carol@b.example", "alice", "unjudged |vacation", "rob@d.example"]);
        let origins: Vec<_> = expansion.steps.iter().map(|step| step.origin.as_str()).collect();
        assert_eq!(origins, ["table:0", "table:1", "table:2", "table:3"]);
        assert_eq!(expansion.steps[1].address, address("list"));
        assert_eq!(expansion.steps[1].targets, [target("alice"), target("bob")]);
    }

    #[test]
    fn an_address_in_its_own_list_is_delivered_to_itself() {
        let rows = [(Stage::Local, "alice", "Alice bob")];
        assert_eq!(expanded("alice@a.example", &rows), ["alice@a.example", "bob"]);
        let rows = [(Stage::Virtual, "alice@a.example", "alice@a.example bob@b.example")];
        assert_eq!(expanded("Alice@a.example", &rows), ["Alice@a.example", "bob@b.example"]);
    }

    #[test]
    fn an_address_in_its_own_virtual_list_still_has_its_local_aliases() {
        let rows = [
            (Stage::Virtual, "alice@a.example", "alice@a.example archive@b.example"),
            (Stage::Local, "alice", "al"),
        ];
        assert_eq!(expanded("alice@a.example", &rows), ["al", "archive@b.example"]);
    }

    #[test]
    fn a_local_name_met_in_a_local_list_is_not_asked_of_virtual_tables() {
        let rows = [
            (Stage::Local, "list", "bob bob@a.example"),
            (Stage::Virtual, "bob", "robert"),
            (Stage::Virtual, "bob@a.example", "carol@c.example"),
        ];
        assert_eq!(expanded("list@a.example", &rows), ["bob", "carol@c.example"]);
    }

    #[test]
    fn a_loop_without_a_way_out_cannot_be_judged() {
        let rows = [(Stage::Local, "a", "b"), (Stage::Local, "b", "a")];
        assert_eq!(expanded("a", &rows), ["unjudged alias loop"]);
        let rows =
            [(Stage::Virtual, "a@x.example", "b@x.example"), (Stage::Virtual, "b@x.example", "a@x.example")];
        assert_eq!(expanded("a@x.example", &rows), ["unjudged alias loop"]);
    }

    #[test]
    fn a_loop_with_a_way_out_means_those_outside() {
        let rows = [(Stage::Local, "a", "b"), (Stage::Local, "b", "a c")];
        assert_eq!(expanded("a", &rows), ["c"]);
    }

    #[test]
    fn who_is_reached_on_two_ways_counts_once() {
        let rows = [(Stage::Local, "a", "b c |x"), (Stage::Local, "b", "D |x"), (Stage::Local, "c", "d")];
        assert_eq!(expanded("a", &rows), ["unjudged |x", "D"]);
    }

    #[test]
    fn a_chain_is_followed_to_its_fiftieth_alias_and_no_further() {
        let count = |address: &Address, stage| {
            let number: usize = address.local().parse().unwrap();
            if stage == Stage::Virtual || number == 0 {
                return Lookup::NotFound;
            }
            Lookup::Found(Found { targets: vec![target(&(number - 1).to_string())], origin: String::new() })
        };
        assert_eq!(leaves(&expand(&address(&MAX_DEPTH.to_string()), count)), ["0"]);
        assert_eq!(
            leaves(&expand(&address(&(MAX_DEPTH + 1).to_string()), count)),
            ["unjudged more than 50 aliases in a row"]
        );
    }

    #[test]
    fn the_thousand_and_first_and_all_beyond_count_as_one() {
        for (members, expected) in
            [(MAX_LEAVES, MAX_LEAVES), (MAX_LEAVES + 1, MAX_LEAVES + 1), (5000, MAX_LEAVES + 1)]
        {
            let list: Vec<_> = (0..members).map(|n| format!("m{n}")).collect();
            let list = list.join(" ");
            let got = expanded("list", &[(Stage::Local, "list", &list)]);
            assert_eq!(got.len(), expected);
            let last_is_rest = got.last().is_some_and(|leaf| leaf == "unjudged more than 1000 addresses");
            assert_eq!(last_is_rest, members > MAX_LEAVES);
        }
    }

    #[test]
    fn what_could_not_be_asked_is_not_taken_for_nothing() {
        let expansion = expand(&address("a"), |_, stage| match stage {
            Stage::Virtual => Lookup::NotFound,
            Stage::Local => Lookup::Unavailable("gone".to_owned()),
        });
        assert_eq!(expansion.leaves, [Leaf::Unavailable("gone".to_owned())]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn random_graphs_end_and_stay_within_the_limits(
            graph in prop::collection::hash_map(
                (0usize..40, any::<bool>()),
                prop::collection::vec((0usize..60, any::<bool>(), any::<bool>()), 0..40),
                0..40,
            ),
            spread in any::<bool>(),
        ) {
            let lookups = std::cell::Cell::new(0usize);
            let name = |number: usize, domain: bool| address(&match domain {
                true => format!("{number}@a.example"),
                false => number.to_string(),
            });
            let expansion = expand(&name(0, true), |address, stage| {
                lookups.set(lookups.get() + 1);
                let number: usize = address.local().parse().unwrap();
                let Some(targets) = graph.get(&(number, stage == Stage::Virtual)) else {
                    return Lookup::NotFound;
                };
                let targets = targets.iter().flat_map(|&(to, domain, judged)| {
                    let fan = if spread { 100 } else { 1 };
                    (0..fan).map(move |n| match judged {
                        true => Target::Address(name(to + n * 60, domain)),
                        false => Target::Unjudged(format!("{to}")),
                    })
                });
                Lookup::Found(Found { targets: targets.collect(), origin: String::new() })
            });
            prop_assert!(!expansion.leaves.is_empty());
            prop_assert!(expansion.leaves.len() <= MAX_LEAVES + 1);
            prop_assert!(lookups.get() <= 2 * (MAX_VISITS + 1));
            let distinct: HashSet<_> = expansion.leaves.iter().collect();
            prop_assert_eq!(distinct.len(), expansion.leaves.len());
        }
    }
}
