//! Where the registry may be: its members' addresses, and which of them is asked.

use std::sync::atomic::{AtomicUsize, Ordering};

use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::Endpoint;

/// The addresses of a registry, of which one leads at a time; at least one.
#[derive(Debug)]
pub struct Registries {
    all: Vec<Endpoint>,
    /// Which one is asked: the next when the one before did not answer as a leader does.
    now: AtomicUsize,
}

impl Clone for Registries {
    fn clone(&self) -> Registries {
        Registries { all: self.all.clone(), now: AtomicUsize::new(self.now.load(Ordering::Relaxed)) }
    }
}

impl Registries {
    /// The members' addresses, the most likely leader first; `None` when there is none.
    pub fn new(all: Vec<Endpoint>) -> Option<Registries> {
        (!all.is_empty()).then(|| Registries { all, now: AtomicUsize::new(0) })
    }

    /// Whether there is another to turn to.
    pub fn are_several(&self) -> bool {
        self.all.len() > 1
    }

    /// Whom to ask.
    pub(crate) fn current(&self) -> Endpoint {
        self.all[self.now.load(Ordering::Relaxed) % self.all.len()].clone()
    }

    /// The one that was asked does not lead, or says nothing: the next one is asked from now on, unless that is so already.
    pub(crate) fn turn_from(&self, asked: &Endpoint) {
        let now = self.now.load(Ordering::Relaxed);
        let is_asked = self.all[now % self.all.len()] == *asked;
        if self.all.len() > 1 && is_asked && !mutants::is(Mutant::FirstRegistryOnly) {
            // Another request may have turned first; then it has.
            let _ = self.now.compare_exchange(now, now + 1, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

impl From<Endpoint> for Registries {
    fn from(one: Endpoint) -> Registries {
        Registries { all: vec![one], now: AtomicUsize::new(0) }
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
    }
}
