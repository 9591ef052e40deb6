//! Rare states that a simulation must reach sometimes.

use std::collections::BTreeSet;

use clutch_runtime::simulated::World;

use crate::checkers::Evidence;

/// What a run reached.
pub fn reached(evidence: &Evidence, world: &World) -> BTreeSet<String> {
    let _ = evidence;
    world.notes().keys().map(|s| (*s).to_owned()).collect()
}
