//! Where the registry may be: its members' addresses, and which of them is asked.

use std::sync::Mutex;

use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::Endpoint;

use crate::rpc::lock;

/// Addresses that are kept at most: of members that were, too.
const ADDRESSES_MAX: usize = 64;

/// The addresses of a registry, of which one leads at a time; at least one.
#[derive(Debug)]
pub struct Registries(Mutex<Known>);

#[derive(Clone, Debug)]
struct Known {
    all: Vec<Endpoint>,
    /// Which one is asked: another when the one before did not answer as a leader does.
    now: usize,
}

impl Clone for Registries {
    fn clone(&self) -> Registries {
        Registries(Mutex::new(lock(&self.0).clone()))
    }
}

impl Registries {
    /// The members' addresses, the most likely leader first, each once; `None` when there is none.
    pub fn new(named: Vec<Endpoint>) -> Option<Registries> {
        let mut all: Vec<Endpoint> = Vec::new();
        for one in named {
            if !all.contains(&one) {
                all.push(one);
            }
        }
        (!all.is_empty()).then(|| Registries(Mutex::new(Known { all, now: 0 })))
    }

    /// All that are known.
    pub(crate) fn all(&self) -> Vec<Endpoint> {
        lock(&self.0).all.clone()
    }

    /// Whom to ask.
    pub(crate) fn current(&self) -> Endpoint {
        let known = lock(&self.0);
        known.all[known.now].clone()
    }

    /// The one that was asked does not lead, or says nothing: the next one is asked from now on, unless that is so already.
    pub(crate) fn turn_from(&self, asked: &Endpoint) {
        let mut known = lock(&self.0);
        // Another request may have turned first; then it has.
        if known.all[known.now] == *asked && !mutants::is(Mutant::FirstRegistryOnly) {
            known.now = (known.now + 1) % known.all.len();
        }
    }

    /// Members were named that are perhaps not known yet.
    pub(crate) fn learn(&self, members: &[String]) {
        let mut known = lock(&self.0);
        for member in members {
            let member = Endpoint::from(member.as_str());
            if !known.all.contains(&member) && known.all.len() < ADDRESSES_MAX {
                known.all.push(member);
            }
        }
    }

    /// A member was said to lead; false where that is who was asked, or nobody that can be remembered.
    pub(crate) fn lead(&self, asked: &Endpoint, leader: &Endpoint) -> bool {
        if mutants::is(Mutant::FirstRegistryOnly) || asked == leader {
            return false;
        }
        self.learn(&[leader.to_string()]);
        let mut known = lock(&self.0);
        let Some(at) = known.all.iter().position(|one| one == leader) else { return false };
        known.now = at;
        true
    }
}

impl From<Endpoint> for Registries {
    fn from(one: Endpoint) -> Registries {
        Registries(Mutex::new(Known { all: vec![one], now: 0 }))
    }
}

impl From<&str> for Registries {
    fn from(one: &str) -> Registries {
        Endpoint::from(one).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_answer_is_turned_from_once() {
        let members: Vec<Endpoint> = ["a", "b", "c"].into_iter().map(Endpoint::from).collect();
        let registries = Registries::new(members.clone()).expect("three");
        for asked in &members {
            assert_eq!(registries.current(), *asked);
            // Two requests were on their way to the same one.
            registries.turn_from(asked);
            registries.turn_from(asked);
        }
        assert_eq!(registries.current(), members[0]);
        let alone = Registries::from(members[0].clone());
        alone.turn_from(&members[0]);
        assert_eq!(alone.current(), members[0]);
        assert!(Registries::new(Vec::new()).is_none());
        // What the map says is learnt once, and who is said to lead is asked next.
        let learnt = ["b".to_owned(), "d".to_owned()];
        registries.learn(&learnt);
        registries.learn(&learnt);
        assert_eq!(registries.all().len(), 4);
        assert!(registries.lead(&members[0], &"d".into()));
        assert_eq!(registries.current(), "d".into());
        assert!(!registries.lead(&"d".into(), &"d".into()), "it says so of itself");
    }
}
