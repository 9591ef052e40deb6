//! What becomes of proposals: two things are heard of each, in either order. The log says where it is, and the batch
//! comes back with its outcomes.
//!
//! Invariants: whoever waits is answered once; outcomes go to those who proposed them, one for each; outcomes of a batch
//! that nobody here proposed are kept only while a proposal of ours may turn out to be it.

use std::collections::BTreeMap;

use clutch_log::Position;

/// Proposals in flight, with those who wait for them.
pub(crate) struct Fates<W, O> {
    next: u64,
    undecided: BTreeMap<u64, Vec<W>>,
    /// Decided, not yet delivered.
    decided: BTreeMap<Position, Vec<W>>,
    /// Delivered while some proposal was not yet decided.
    unclaimed: BTreeMap<Position, Vec<O>>,
}

/// Who is answered now, and with what; outcomes of the batch at a position.
pub(crate) type Answers<W, O> = (Position, Vec<(W, O)>);

impl<W, O> Fates<W, O> {
    pub(crate) fn new() -> Fates<W, O> {
        Fates { next: 1, undecided: BTreeMap::new(), decided: BTreeMap::new(), unclaimed: BTreeMap::new() }
    }

    /// A batch was taken by the log; its number here.
    pub(crate) fn proposed(&mut self, waiters: Vec<W>) -> u64 {
        let id = self.next;
        self.next += 1;
        let before = self.undecided.insert(id, waiters);
        assert!(before.is_none(), "proposal {id} is numbered twice");
        id
    }

    /// The log has it at this position: answers, if it has been delivered.
    pub(crate) fn committed(&mut self, id: u64, position: Position) -> Option<Answers<W, O>> {
        let waiters = self.undecided.remove(&id)?;
        let answers = match self.unclaimed.remove(&position) {
            Some(outcomes) => Some(pair(position, waiters, outcomes)),
            None => {
                let before = self.decided.insert(position, waiters);
                assert!(before.is_none(), "two proposals are at {position}");
                None
            }
        };
        self.forget_unclaimed();
        answers
    }

    /// The log does not have it, or does not say: those who wait are told by the caller.
    pub(crate) fn lost(&mut self, id: u64) -> Vec<W> {
        let waiters = self.undecided.remove(&id).unwrap_or_default();
        self.forget_unclaimed();
        waiters
    }

    /// The batch at a position was applied: answers, if it is known to be one of ours.
    pub(crate) fn applied(&mut self, position: Position, outcomes: Vec<O>) -> Option<Answers<W, O>> {
        if let Some(waiters) = self.decided.remove(&position) {
            return Some(pair(position, waiters, outcomes));
        }
        if !self.undecided.is_empty() {
            self.unclaimed.insert(position, outcomes);
        }
        None
    }

    /// Everybody who waits; nothing is in flight any more.
    pub(crate) fn abandon(&mut self) -> Vec<W> {
        self.unclaimed.clear();
        let undecided = std::mem::take(&mut self.undecided).into_values();
        undecided.chain(std::mem::take(&mut self.decided).into_values()).flatten().collect()
    }

    /// Whether the log has not yet said of some proposal where it is.
    pub(crate) fn has_undecided(&self) -> bool {
        !self.undecided.is_empty()
    }

    /// Whether nothing is in flight.
    pub(crate) fn is_idle(&self) -> bool {
        self.undecided.is_empty() && self.decided.is_empty()
    }

    fn forget_unclaimed(&mut self) {
        if self.undecided.is_empty() {
            self.unclaimed.clear();
        }
    }
}

fn pair<W, O>(position: Position, waiters: Vec<W>, outcomes: Vec<O>) -> Answers<W, O> {
    assert_eq!(waiters.len(), outcomes.len(), "the batch at {position} has an outcome for each that waits");
    (position, waiters.into_iter().zip(outcomes).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    enum Heard {
        Proposed(&'static [&'static str]),
        Committed(u64, u64),
        Lost(u64),
        Applied(u64, &'static [u8]),
    }
    use Heard::{Applied, Committed, Lost, Proposed};

    /// What somebody is told: at which position and how, or that it was lost.
    type Told = (&'static str, Option<(u64, u8)>);

    fn told(heard: &[Heard]) -> (Vec<Told>, Fates<&'static str, u8>) {
        let (mut fates, mut told) = (Fates::new(), Vec::new());
        for event in heard {
            let answers = match *event {
                Proposed(waiters) => {
                    fates.proposed(waiters.to_vec());
                    None
                }
                Committed(id, position) => fates.committed(id, Position(position)),
                Applied(position, outcomes) => fates.applied(Position(position), outcomes.to_vec()),
                Lost(id) => {
                    told.extend(fates.lost(id).into_iter().map(|waiter| (waiter, None)));
                    None
                }
            };
            if let Some((position, answers)) = answers {
                told.extend(
                    answers.into_iter().map(|(waiter, outcome)| (waiter, Some((position.0, outcome)))),
                );
            }
        }
        (told, fates)
    }

    #[test]
    fn both_must_be_heard_in_either_order() {
        let table: [(&[Heard], &[Told]); 10] = [
            (
                &[Proposed(&["a", "b"]), Committed(1, 5), Applied(5, &[7, 8])],
                &[("a", Some((5, 7))), ("b", Some((5, 8)))],
            ),
            (&[Proposed(&["a"]), Applied(5, &[7]), Committed(1, 5)], &[("a", Some((5, 7)))]),
            // Of two in flight, decided in the other order.
            (
                &[
                    Proposed(&["a"]),
                    Proposed(&["b"]),
                    Applied(5, &[7]),
                    Applied(6, &[8]),
                    Committed(2, 6),
                    Committed(1, 5),
                ],
                &[("b", Some((6, 8))), ("a", Some((5, 7)))],
            ),
            (
                &[
                    Proposed(&["a"]),
                    Proposed(&["b"]),
                    Committed(1, 5),
                    Committed(2, 6),
                    Applied(5, &[7]),
                    Applied(6, &[8]),
                ],
                &[("a", Some((5, 7))), ("b", Some((6, 8)))],
            ),
            // Another leader's batch in between is nobody's.
            (
                &[Proposed(&["a"]), Applied(5, &[7]), Applied(6, &[8]), Committed(1, 6)],
                &[("a", Some((6, 8)))],
            ),
            // Of an unknown outcome each is told once, also when the batch turns up.
            (&[Proposed(&["a"]), Lost(1), Applied(5, &[7])], &[("a", None)]),
            (&[Proposed(&["a"]), Applied(5, &[7]), Lost(1), Committed(1, 5)], &[("a", None)]),
            (&[Committed(9, 5), Applied(5, &[7]), Lost(9)], &[]),
            // A number that nobody knows takes nothing from those who are known.
            (&[Proposed(&["a"]), Applied(5, &[7]), Committed(9, 5), Committed(1, 5)], &[("a", Some((5, 7)))]),
            // Neither is enough.
            (&[Proposed(&["a"]), Committed(1, 5), Applied(4, &[7]), Applied(6, &[8])], &[]),
        ];
        for (number, (heard, expected)) in table.iter().enumerate() {
            assert_eq!(told(heard).0, *expected, "row {number}");
        }
    }

    #[test]
    fn outcomes_that_nobody_can_claim_are_not_kept() {
        let (_, fates) = told(&[Applied(5, &[7])]);
        assert!(fates.unclaimed.is_empty() && fates.is_idle());
        let (_, fates) = told(&[Proposed(&["a"]), Applied(5, &[7])]);
        assert!(fates.unclaimed.len() == 1 && fates.has_undecided());
        let (_, fates) = told(&[Proposed(&["a"]), Applied(5, &[7]), Lost(1)]);
        assert!(fates.unclaimed.is_empty() && fates.is_idle());
        let (_, mut fates) = told(&[Proposed(&["a"]), Proposed(&["b"]), Committed(1, 5), Applied(4, &[7])]);
        assert!(!fates.is_idle());
        assert_eq!(fates.abandon(), ["b", "a"]);
        assert!(fates.unclaimed.is_empty() && fates.is_idle() && !fates.has_undecided());
    }

    #[test]
    #[should_panic(expected = "an outcome for each that waits")]
    fn nobody_is_left_without_an_answer() {
        told(&[Proposed(&["a", "b"]), Committed(1, 5), Applied(5, &[7])]);
    }
}
