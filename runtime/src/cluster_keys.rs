//! The keys by which the parts of a cluster know each other: one that is used, and others that are believed, too, while the cluster goes
//! from one to the next.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

/// The keys of a cluster, which whoever shares them sees change; cheap to clone.
#[derive(Clone)]
pub struct ClusterKeys(Arc<RwLock<Vec<[u8; 32]>>>);

impl ClusterKeys {
    /// The first is used, all are believed.
    ///
    /// # Panics
    /// When there is none.
    pub fn new(keys: Vec<[u8; 32]>) -> ClusterKeys {
        assert!(!keys.is_empty(), "one key is used");
        ClusterKeys(Arc::new(RwLock::new(keys)))
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Vec<[u8; 32]>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one that is used.
    pub fn used(&self) -> [u8; 32] {
        self.read()[0]
    }

    /// All that are believed, the one that is used first.
    pub fn all(&self) -> Vec<[u8; 32]> {
        self.read().clone()
    }

    /// The one that is believed and that fits.
    pub fn find(&self, fits: impl Fn(&[u8; 32]) -> bool) -> Option<[u8; 32]> {
        self.read().iter().find(|key| fits(key)).copied()
    }

    /// From now on these.
    ///
    /// # Panics
    /// When there is none.
    pub fn set(&self, keys: Vec<[u8; 32]>) {
        assert!(!keys.is_empty(), "one key is used");
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = keys;
    }
}

impl From<[u8; 32]> for ClusterKeys {
    fn from(key: [u8; 32]) -> ClusterKeys {
        ClusterKeys::new(vec![key])
    }
}

/// How many, and none of them.
impl fmt::Debug for ClusterKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterKeys({})", self.read().len())
    }
}
