//! A log's chain: which engines have kept it, one after the other, and from where on.
//!
//! What one engine keeps of a log, from its base to its end, is a *loglet*. It counts from 1: position = base + index. A chain is
//! read from the registry, which extends it by compare-and-swap; here is what every chain must be for a node to open it.

use std::fmt;

use clutch_proto::{
    log::{Epoch, LogId, Position},
    registry,
};

/// Incarnations are counted up to here; records and reigns have 24 bits for them.
pub const INCARNATION_MAX: u32 = 1 << 24;

/// Names a loglet: the log, and how often it was begun anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogletId {
    /// The log.
    pub log: LogId,
    /// 1 for the first life of the log, at most [`INCARNATION_MAX`].
    pub incarnation: u32,
}

impl From<LogId> for LogletId {
    fn from(log: LogId) -> LogletId {
        LogletId { log, incarnation: 1 }
    }
}

impl fmt::Display for LogletId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.incarnation {
            1 => write!(f, "{}", self.log),
            incarnation => write!(f, "{} (incarnation {incarnation})", self.log),
        }
    }
}

impl LogletId {
    /// What a reign of this loglet is called in the whole log: one of a later incarnation is greater, whatever its engine counts.
    ///
    /// # Panics
    /// When an engine has counted 2^40 reigns.
    pub fn epoch(self, of_loglet: Epoch) -> Epoch {
        assert!(of_loglet.0 < Epoch::OF_INCARNATION, "{self} has had {} reigns", of_loglet.0);
        Epoch(u64::from(self.incarnation - 1) * Epoch::OF_INCARNATION + of_loglet.0)
    }

    /// The loglet's own name of a reign; `None` when it is another incarnation's.
    pub fn epoch_of_loglet(self, epoch: Epoch) -> Option<Epoch> {
        (epoch.incarnation() == self.incarnation).then_some(Epoch(epoch.0 % Epoch::OF_INCARNATION))
    }
}

/// One part of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogletSpec {
    /// How often the log was begun anew.
    pub incarnation: u32,
    /// Its first record stands behind this position.
    pub base: Position,
    /// The engine's name.
    pub engine: String,
    /// What the engine is to know, in its own words.
    pub parameters: String,
}

/// Why a chain cannot be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the chain of {log} cannot be right: {what}")]
pub struct BadChain {
    log: LogId,
    what: String,
}

/// The chain of one log: its loglets, oldest first. There is one at least; incarnations grow, and bases do not go back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    log: LogId,
    loglets: Vec<LogletSpec>,
}

impl Chain {
    /// The chain of a log that begins with this engine, which needs to know nothing.
    pub fn first(log: LogId, engine: &str) -> Chain {
        Chain::first_with(log, engine, String::new())
    }

    /// The chain of a log that begins with this engine, and with what the engine is to know.
    pub fn first_with(log: LogId, engine: &str, parameters: String) -> Chain {
        let first = LogletSpec { incarnation: 1, base: Position(0), engine: engine.to_owned(), parameters };
        Chain { log, loglets: vec![first] }
    }

    /// The chain as the registry has it.
    ///
    /// # Errors
    /// When it breaks a rule of chains; then it is damaged, or of a newer build.
    pub fn from_wire(log: LogId, chain: &registry::Chain) -> Result<Chain, BadChain> {
        let bad = |what: String| BadChain { log, what };
        let mut loglets: Vec<LogletSpec> = Vec::new();
        for registry::Segment { base_position, engine, parameters, incarnation } in &chain.segments {
            let known = u32::try_from(*incarnation).ok().filter(|i| (1..=INCARNATION_MAX).contains(i));
            let incarnation = known.ok_or_else(|| bad(format!("there is no incarnation {incarnation}")))?;
            if engine.is_empty() {
                return Err(bad(format!("incarnation {incarnation} names no engine")));
            }
            let base = Position(*base_position);
            match loglets.last() {
                None if base != Position(0) => {
                    return Err(bad(format!("the first loglet begins behind {base}")));
                }
                Some(last) if last.incarnation >= incarnation || last.base > base => {
                    let (before, from) = (last.incarnation, last.base);
                    let what =
                        format!("incarnation {incarnation} behind {base} follows {before} behind {from}");
                    return Err(bad(what));
                }
                _ => {}
            }
            loglets.push(LogletSpec {
                incarnation,
                base,
                engine: engine.clone(),
                parameters: parameters.clone(),
            });
        }
        match loglets.is_empty() {
            true => Err(bad("it has no loglet".to_owned())),
            false => Ok(Chain { log, loglets }),
        }
    }

    /// The chain as the registry keeps it.
    pub fn to_wire(&self) -> registry::Chain {
        let segment = |loglet: &LogletSpec| registry::Segment {
            base_position: loglet.base.0,
            engine: loglet.engine.clone(),
            parameters: loglet.parameters.clone(),
            incarnation: u64::from(loglet.incarnation),
        };
        registry::Chain { segments: self.loglets.iter().map(segment).collect() }
    }

    /// The log.
    pub fn log(&self) -> LogId {
        self.log
    }

    /// Its loglets, oldest first.
    pub fn loglets(&self) -> &[LogletSpec] {
        &self.loglets
    }

    /// The names of its loglets, oldest first.
    pub fn ids(&self) -> impl Iterator<Item = LogletId> + '_ {
        self.loglets.iter().map(|loglet| LogletId { log: self.log, incarnation: loglet.incarnation })
    }

    /// The incarnation that is appended to.
    pub fn incarnation(&self) -> u32 {
        self.newest().incarnation
    }

    /// The loglet that is appended to.
    pub fn newest(&self) -> &LogletSpec {
        self.loglets.last().expect("a chain has a loglet")
    }

    /// The number of the loglet in which a position is or will be: the newest one that begins before it.
    pub fn holder(&self, position: Position) -> usize {
        self.loglets.iter().rposition(|loglet| loglet.base < position).unwrap_or(0)
    }

    /// Up to where a loglet counts, as an index of its own; `None` for the newest.
    pub fn end(&self, number: usize) -> Option<Position> {
        let next = self.loglets.get(number + 1)?;
        Some(Position(next.base.0 - self.loglets[number].base.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(parts: &[(u64, u64)]) -> Result<Chain, BadChain> {
        let segment = |(incarnation, base_position): &(u64, u64)| registry::Segment {
            base_position: *base_position,
            engine: "local".into(),
            parameters: String::new(),
            incarnation: *incarnation,
        };
        let wire = registry::Chain { segments: parts.iter().map(segment).collect() };
        let chain = Chain::from_wire(LogId::CDC, &wire)?;
        assert_eq!(chain.to_wire(), wire);
        Ok(chain)
    }

    #[test]
    fn chains_that_cannot_be_right_are_refused() {
        for (parts, is_good) in [
            (&[][..], false),
            (&[(1, 0)], true),
            (&[(7, 0)], true),
            (&[(0, 0)], false),
            (&[(1 << 24, 0)], true),
            (&[((1 << 24) + 1, 0)], false),
            (&[(1, 5)], false),
            (&[(1, 0), (2, 0)], true),
            (&[(1, 0), (2, 9), (5, 9), (6, 12)], true),
            (&[(1, 0), (1, 9)], false),
            (&[(1, 0), (2, 9), (3, 8)], false),
        ] {
            assert_eq!(chain(parts).is_ok(), is_good, "{parts:?}");
        }
    }

    #[test]
    fn a_position_is_in_the_newest_loglet_that_begins_before_it() {
        let chain = chain(&[(1, 0), (2, 4), (3, 4), (5, 6)]).expect("a good chain");
        let holders = [0, 1, 4, 5, 6, 7, 100].map(|position| chain.holder(Position(position)));
        assert_eq!(holders, [0, 0, 0, 2, 2, 3, 3], "the second loglet is empty");
        assert_eq!(
            [0, 1, 2, 3].map(|number| chain.end(number)),
            [Some(Position(4)), Some(Position(0)), Some(Position(2)), None]
        );
    }

    const EPOCHS: u64 = Epoch::OF_INCARNATION;

    #[test]
    fn a_reign_of_a_later_incarnation_is_greater() {
        let id = |incarnation| LogletId { log: LogId::CDC, incarnation };
        assert_eq!(id(1).epoch(Epoch(9)), Epoch(9), "the first life of a log counts as its engine does");
        assert!(id(2).epoch(Epoch(0)) > id(1).epoch(Epoch(EPOCHS - 1)));
        for (incarnation, epoch) in [(1, 0), (1, 77), (3, 5), (INCARNATION_MAX, EPOCHS - 1)] {
            let whole = id(incarnation).epoch(Epoch(epoch));
            assert_eq!(whole.incarnation(), incarnation);
            assert_eq!(id(incarnation).epoch_of_loglet(whole), Some(Epoch(epoch)));
            assert_eq!(id(incarnation % 7 + 9).epoch_of_loglet(whole), None);
        }
    }
}
