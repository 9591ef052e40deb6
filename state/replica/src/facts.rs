//! What the shell knows and no log holds: machines see one moment of it, the shell replaces it as a whole.

use std::sync::{Arc, PoisonError, RwLock};

/// Facts that several replicas of a node share.
pub struct SharedFacts<F>(RwLock<Arc<F>>);

impl<F> SharedFacts<F> {
    /// Facts to begin with.
    pub fn new(facts: F) -> SharedFacts<F> {
        SharedFacts(RwLock::new(Arc::new(facts)))
    }

    /// How they are now; what is replaced later does not change them.
    pub fn now(&self) -> Arc<F> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces them.
    pub fn update(&self, change: impl FnOnce(&F) -> F) {
        let mut facts = self.0.write().unwrap_or_else(PoisonError::into_inner);
        *facts = Arc::new(change(&facts));
    }
}
