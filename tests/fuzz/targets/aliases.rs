//! aliases(5) and virtual(5): any text is read, every address is expanded, and both end.
//!
//! Input: aliases(5), NUL, virtual(5), NUL, addresses, one a line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use usermilter::address::Address;
use usermilter::resolver::aliases::{Aliases, Leaf, MAX_LEAVES};
use usermilter_fuzz::{fields, file, lines};

fuzz_target!(|data: &[u8]| {
    let [aliases, virtuals, addresses] = fields(data, 0);
    let paths = [file("aliases", aliases), file("virtual", virtuals)];
    let sources = Aliases::open(&paths[..1], &paths[1..]);
    for (path, problem) in sources.problems() {
        if let Some(at) = paths.iter().position(|known| *known == path) {
            let text = String::from_utf8_lossy([aliases, virtuals][at]);
            assert!((1..=lines(&text)).contains(&problem.line), "{problem:?}");
        }
        assert!(!problem.message.contains(char::is_control), "{problem:?}");
    }
    let named = addresses.split(|byte| *byte == b'\n').take(4).filter_map(|text| Address::parse(text).ok());
    let common = ["alice@example.org", "list", "a@b", "a+b"]
        .into_iter()
        .map(|a| Address::parse(a.as_bytes()).unwrap());
    for address in named.chain(common) {
        let is_ours = |address: &Address| address.domain().is_none_or(|domain| domain == "example.org");
        let expansion = sources.expand(&address, is_ours, "+-");
        let leaves = &expansion.leaves;
        assert!((1..=MAX_LEAVES + 1).contains(&leaves.len()), "{address}: {} leaves", leaves.len());
        let distinct: std::collections::HashSet<&Leaf> = leaves.iter().collect();
        assert_eq!(distinct.len(), leaves.len(), "{address}: {leaves:?}");
    }
});
