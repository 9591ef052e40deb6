//! Who a node is, whom it has met under each number, and where that one said that it is.
//!
//! An identity is drawn when a node begins to keep logs, and lies beside them. A node whose logs were lost, and that begins anew, comes
//! with another one, and nobody speaks to it: it has forgotten its votes.
//!
//! A *mark* tells whether a node is an older copy of itself: a number that goes up every few seconds while the node runs, and what was
//! drawn with that. It goes up when another node has taken note of the one before, so a copy that nobody believes stays where it is.
//! Who meets a node that is behind what it remembers of it refuses it; and a node that others remember further than it is itself
//! knows that it was put back, and condemns itself. A copy of the last few seconds is not told apart, and neither is one that meets
//! nobody who knows better.
//!
//! File: a line for each node, the own one first (`NODE IDENTITY @MARK:DRAWN ADDRESS`: a number, 32 hexadecimal digits, a number and 16
//! hexadecimal digits, an address; the last two may be missing with the space before them), and CRC-32 of these lines, 8 hexadecimal
//! digits.
//!
//! Invariants: a node that was met is on the disk before anything that it says counts; a mark is on the disk before anybody is told.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use clutch_log::NodeId;
use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::{Disk, Runtime};
use parking_lot::Mutex;

use crate::codec::{Malformed, Reader};

pub(crate) const IDENTITY_BYTES: usize = 16;
/// Bytes of a mark.
pub(crate) const MARK_BYTES: usize = 16;
/// Drawn once for each disk that keeps logs.
pub(crate) type Identity = [u8; IDENTITY_BYTES];

/// How far a node has come, and in which of the lives that began as copies of one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) count: u64,
    pub(crate) drawn: u64,
}

impl Mark {
    /// Count and what was drawn, little-endian.
    pub(crate) fn encode(self) -> [u8; MARK_BYTES] {
        let mut bytes = [0; MARK_BYTES];
        bytes[..8].copy_from_slice(&self.count.to_le_bytes());
        bytes[8..].copy_from_slice(&self.drawn.to_le_bytes());
        bytes
    }

    pub(crate) fn read(from: &mut Reader) -> Result<Mark, Malformed> {
        Ok(Mark { count: from.u64()?, drawn: from.u64()? })
    }

    /// Whether a node at this mark is no older copy of one that was at the other.
    fn follows(self, known: Mark) -> bool {
        self == known || self.count > known.count
    }
}

/// What a node says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) identity: Identity,
    pub(crate) mark: Mark,
    /// Where it is; empty where it does not say.
    pub(crate) address: String,
}

/// A node that was met.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Met {
    identity: Identity,
    /// The furthest that it was at.
    mark: Mark,
    /// Where it has said last that it is; empty where it never did.
    address: String,
}

/// The identities that a node knows; cheap to clone.
#[derive(Clone)]
pub struct Identities {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    node: NodeId,
    own: Identity,
    mark: Arc<Mutex<OwnMark>>,
    met: Arc<Mutex<BTreeMap<NodeId, Met>>>,
    /// Why this node must not go on.
    condemned: Arc<OnceLock<String>>,
    /// Whose turn it is to write the file: a disk that stands still holds up nobody who was met before.
    turn: Arc<tokio::sync::Mutex<()>>,
}

/// The node's own mark.
#[derive(Clone, Copy, Debug, Default)]
struct OwnMark {
    mark: Mark,
    /// Whether another node has taken note of it.
    is_known: bool,
    /// Whether others have come further than the file says.
    is_news: bool,
}

fn encode(node: NodeId, own: Identity, mark: Mark, met: &BTreeMap<NodeId, Met>) -> String {
    let mut text = String::new();
    let own = Met { identity: own, mark, address: String::new() };
    for (node, Met { identity, mark, address }) in std::iter::once((&node, &own)).chain(met) {
        let digits: String = identity.iter().map(|byte| format!("{byte:02x}")).collect();
        // Writing to a string does not fail.
        let _ = write!(text, "{node} {digits}");
        if mark.count > 0 {
            let _ = write!(text, " @{}:{:016x}", mark.count, mark.drawn);
        }
        let space = if address.is_empty() { "" } else { " " };
        let _ = writeln!(text, "{space}{address}");
    }
    let crc = crc32fast::hash(text.as_bytes());
    format!("{text}{crc:08x}\n")
}

/// The lines of a file; `None` when it is damaged.
fn decode(bytes: &[u8]) -> Option<Vec<(NodeId, Met)>> {
    let text = std::str::from_utf8(bytes).ok()?;
    let (lines, crc) = text.strip_suffix('\n')?.rsplit_once('\n')?;
    let lines = format!("{lines}\n");
    if crc != format!("{:08x}", crc32fast::hash(lines.as_bytes())) {
        return None;
    }
    let line = |line: &str| {
        let (node, met) = line.split_once(' ')?;
        let mut parts = met.split(' ').peekable();
        let digits = parts.next()?;
        let mark = parts.next_if(|part| part.starts_with('@')).map(|part| {
            let (count, drawn) = part[1..].split_once(':')?;
            let count = count.parse().ok().filter(|count| *count > 0)?;
            Some(Mark { count, drawn: u64::from_str_radix(drawn, 16).ok()? })
        });
        let mark = mark.map_or(Some(Mark::default()), |mark| mark)?;
        let address = parts.next().unwrap_or_default();
        if parts.next().is_some() {
            return None;
        }
        let mut identity = Identity::default();
        for (at, byte) in identity.iter_mut().enumerate() {
            *byte = u8::from_str_radix(digits.get(2 * at..2 * at + 2)?, 16).ok()?;
        }
        let met = Met { identity, mark, address: address.to_owned() };
        Some((node.parse().ok()?, met)).filter(|_| digits.len() == 2 * IDENTITY_BYTES)
    };
    lines.lines().map(line).collect()
}

impl Identities {
    /// Those of a file, or a new one of a node that has kept nothing yet: `is_new` says whether that is so. Blocks on the disk.
    ///
    /// # Errors
    /// When the file cannot be read, is damaged, is another node's, or is missing although there are logs.
    pub fn open(
        runtime: &Runtime,
        path: PathBuf,
        node: NodeId,
        is_new: impl FnOnce() -> io::Result<bool>,
    ) -> io::Result<Identities> {
        let disk = runtime.disk.clone();
        let damaged =
            |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{} {what}", path.display()));
        let ((own, mark), met) = if disk.exists(&path) {
            let mut known = decode(&disk.read(&path)?).ok_or_else(|| damaged("is damaged"))?.into_iter();
            match known.next() {
                Some((own_node, own)) if own_node == node => ((own.identity, own.mark), known.collect()),
                _ => return Err(damaged("is of another node")),
            }
        } else {
            if !is_new()? {
                return Err(damaged("is missing, and there are logs"));
            }
            let mut own = Identity::default();
            runtime.random.fill(&mut own);
            ((own, Mark::default()), BTreeMap::new())
        };
        let mark = match mark.count {
            // A new one, or one of a build that had none.
            0 => {
                let mark = Mark { count: 1, drawn: runtime.random.u64() };
                disk.replace(&path, encode(node, own, mark, &met).as_bytes())?;
                mark
            }
            _ => mark,
        };
        let mark = Arc::new(Mutex::new(OwnMark { mark, ..OwnMark::default() }));
        let met = Arc::new(Mutex::new(met));
        Ok(Identities { disk, path, node, own, mark, met, condemned: Arc::default(), turn: Arc::default() })
    }

    /// What the node says of itself, beside where it is.
    pub(crate) fn claim(&self, address: &str) -> Claim {
        Claim { identity: self.own, mark: self.mark.lock().mark, address: address.to_owned() }
    }

    /// The furthest that another node was at.
    pub(crate) fn remembered(&self, node: NodeId) -> Mark {
        self.met.lock().get(&node).map(|met| met.mark).unwrap_or_default()
    }

    /// Why this node must not go on: it is an older copy of itself.
    pub fn condemned(&self) -> Option<String> {
        self.condemned.get().cloned()
    }

    /// Takes note of what another node remembers of this one.
    ///
    /// # Errors
    /// When that has seen this one further than it is: then nothing that this one promised since is known here.
    pub(crate) fn is_remembered(&self, by: NodeId, mark: Mark) -> Result<(), String> {
        let mut own = self.mark.lock();
        if own.mark.follows(mark) || mutants::is(Mutant::OwnCopyTaken) {
            own.is_known |= own.mark == mark;
            return Ok(());
        }
        let why = format!(
            "node {by} has met this node when it had come further: its directory is an older copy of itself, or was made anew, or the node \
             runs twice. It has forgotten what it promised since, and must not come back under its number. Put the newest state of its disk \
             back, or another node in its place (clutch cluster replace-node)"
        );
        Err(self.condemned.get_or_init(|| why).clone())
    }

    /// Takes note of how far another node, which has been met, says that it is.
    ///
    /// # Errors
    /// When it was further before.
    pub(crate) fn hear(&self, node: NodeId, mark: Mark) -> Result<(), String> {
        let mut met = self.met.lock();
        let known = met.get_mut(&node).ok_or("it was not met")?;
        if is_older(mark, known.mark) {
            return Err(older(node));
        }
        if mark != known.mark {
            known.mark = mark;
            self.mark.lock().is_news = true;
        }
        Ok(())
    }

    /// Goes on to the next mark if others know the present one, and writes down how far they are. What is to be told to others.
    pub(crate) async fn next_mark(&self, runtime: &Runtime) -> Mark {
        let _turn = self.turn.lock().await;
        let old = *self.mark.lock();
        if self.condemned.get().is_some() || !(old.is_known || old.is_news) {
            return old.mark;
        }
        let next = match old.is_known {
            true => Mark { count: old.mark.count + 1, drawn: runtime.random.u64() },
            false => old.mark,
        };
        self.mark.lock().is_news = false;
        let (this, all) = (self.clone(), self.met.lock().clone());
        let written = runtime.blocking(move || {
            this.disk.replace(&this.path, encode(this.node, this.own, next, &all).as_bytes())
        });
        let is_written = written.await.is_some_and(|written| written.is_ok());
        let mut own = self.mark.lock();
        if is_written {
            (own.mark, own.is_known) = (next, own.is_known && next == old.mark);
        } else {
            // The disk may be full: later, then.
            own.is_news = true;
        }
        own.mark
    }

    /// All nodes that were met, and where they have said that they are; empty where one has not.
    pub fn met(&self) -> BTreeMap<NodeId, String> {
        self.met.lock().iter().map(|(node, met)| (*node, met.address.clone())).collect()
    }

    /// Where a node has said last that it is.
    pub fn address(&self, node: NodeId) -> Option<String> {
        self.met.lock().get(&node).map(|met| met.address.clone()).filter(|address| !address.is_empty())
    }

    /// Takes note of a node that has proven that it is of the cluster, and of where it says that it is; an empty address says nothing.
    ///
    /// # Errors
    /// When another one was met under its number.
    pub(crate) async fn meet(&self, runtime: &Runtime, node: NodeId, claim: Claim) -> Result<(), String> {
        if let Some(known) = self.known(node, &claim) {
            return known.and_then(|()| self.hear(node, claim.mark));
        }
        let _turn = self.turn.lock().await;
        // Another stream of it may have been first.
        if let Some(known) = self.known(node, &claim) {
            return known.and_then(|()| self.hear(node, claim.mark));
        }
        let mut all = self.met.lock().clone();
        if all.get(&node).is_some_and(|known| is_older(claim.mark, known.mark)) {
            return Err(older(node));
        }
        let Claim { identity, mark, address } = claim;
        let met = Met { identity, mark, address };
        all.insert(node, met.clone());
        let (this, text) = (self.clone(), encode(self.node, self.own, self.mark.lock().mark, &all));
        let written = runtime.blocking(move || this.disk.replace(&this.path, text.as_bytes())).await;
        let written = written.ok_or("this node stops")?;
        written.map_err(|error| format!("write down who node {node} is: {error}"))?;
        let mut all = self.met.lock();
        // What was heard of it meanwhile counts.
        let heard = all.get(&node).map(|known| known.mark).filter(|known| !met.mark.follows(*known));
        let mark = heard.unwrap_or(met.mark);
        all.insert(node, Met { mark, ..met });
        Ok(())
    }

    /// What is to be said of a node that was met; `None` where none was under that number, or where it was elsewhere.
    fn known(&self, node: NodeId, claim: &Claim) -> Option<Result<(), String>> {
        let known = self.met.lock().get(&node)?.clone();
        if known.identity == claim.identity || mutants::is(Mutant::AnyIdentityTaken) {
            return (claim.address.is_empty() || known.address == claim.address).then_some(Ok(()));
        }
        Some(Err(format!(
            "node {node} is not the one that was met under its number before: its logs were lost or replaced, so it has \
             forgotten its votes and must not come back under that number"
        )))
    }
}

fn is_older(mark: Mark, known: Mark) -> bool {
    !mark.follows(known) && !mutants::is(Mutant::OlderCopyTaken)
}

fn older(node: NodeId) -> String {
    format!(
        "node {node} was further when it was met before: it is an older copy of itself, has forgotten what it promised since, and \
         must not come back under that number"
    )
}

#[cfg(test)]
mod tests {
    use std::{path::Path, time::Duration};

    use clutch_runtime::simulated::{NodeId as SimNode, World};

    use super::*;

    #[test]
    fn golden_identities_and_every_flip() {
        let mark = |count: u64| Mark { count, drawn: count * 0xfe };
        let at = |byte: u8, count: u64, address: &str| Met {
            identity: [byte; 16],
            mark: mark(count),
            address: address.to_owned(),
        };
        let met = BTreeMap::from([
            (2, at(0xab, 0, "")),
            (3, at(3, 5, "")),
            (10, at(1, 0, "ten.example:7400")),
            (11, at(2, 1, "[::1]:7400")),
        ]);
        let bytes = encode(1, [7; IDENTITY_BYTES], mark(9), &met).into_bytes();
        let lines = [
            "1 07070707070707070707070707070707 @9:00000000000008ee",
            "2 abababababababababababababababab",
            "3 03030303030303030303030303030303 @5:00000000000004f6",
            "10 01010101010101010101010101010101 ten.example:7400",
            "11 02020202020202020202020202020202 @1:00000000000000fe [::1]:7400",
        ];
        assert!(String::from_utf8_lossy(&bytes).starts_with(&lines.join("\n")));
        let read = decode(&bytes).expect("reads");
        let all: Vec<(NodeId, Met)> = std::iter::once((1, at(7, 9, ""))).chain(met).collect();
        assert_eq!(read, all);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&flipped), None, "bit {bit}");
        }
    }

    /// Whether a node is refused that comes with another identity than before, also by one that was started again.
    fn is_refused() -> bool {
        let world = World::new(1);
        let runtime = world.node(SimNode(1));
        let refused = world.run(SimNode(1), Duration::from_secs(60), async move {
            let open = |is_new: bool| Identities::open(&runtime, "identities".into(), 1, || Ok(is_new));
            let identities = open(true).expect("is made");
            let claim = |byte: u8, address: &str| Claim {
                identity: [byte; 16],
                mark: Mark { count: 1, drawn: 1 },
                address: address.to_owned(),
            };
            identities.meet(&runtime, 2, claim(1, "here")).await.expect("the first one");
            identities.meet(&runtime, 2, claim(1, "")).await.expect("the same again");
            assert_eq!(open(false).expect("is there").address(2).as_deref(), Some("here"));
            identities.meet(&runtime, 2, claim(1, "there")).await.expect("the same, which has moved");
            let again = open(false).expect("is there");
            assert_eq!((again.own, again.met()), (identities.own, BTreeMap::from([(2, "there".to_owned())])));
            let others = [&again, &identities];
            let other = others.map(|known| known.meet(&runtime, 2, claim(2, "elsewhere")));
            let [one, two] = other;
            let other = (one.await, two.await);
            other.0.is_err() && other.1.is_err()
        });
        refused.expect("ends")
    }

    #[test]
    fn who_has_lost_its_logs_is_refused() {
        assert!(is_refused());
        let world = World::new(2);
        let runtime = world.node(SimNode(1));
        let path = Path::new("identities").to_owned();
        assert!(Identities::open(&runtime, path.clone(), 1, || Ok(false)).is_err(), "there are logs");
        Identities::open(&runtime, path.clone(), 1, || Ok(true)).expect("is made");
        assert!(Identities::open(&runtime, path, 3, || Ok(false)).is_err(), "it is node 1's");
    }

    #[test]
    fn planted_bugs_are_found() {
        mutants::plant(Some(Mutant::AnyIdentityTaken));
        let (is_planted, is_refused) = (mutants::planted().is_some(), is_refused());
        mutants::plant(None);
        assert_ne!(is_planted, is_refused);
    }
}
