//! Who a node is, whom it has met under each number, and where that one said that it is.
//!
//! An identity is drawn when a node begins to keep logs, and lies beside them. A node whose logs were lost, and that begins anew, comes
//! with another one, and nobody speaks to it: it has forgotten its votes. An older copy of the node's own logs is not told apart.
//!
//! File: a line for each node, the own one first (`NODE IDENTITY ADDRESS`, a number, 32 hexadecimal digits, and an address, which may be
//! missing with the space before it), and CRC-32 of these lines, 8 hexadecimal digits.
//!
//! Invariant: a node that was met is on the disk before anything that it says counts.

use std::{collections::BTreeMap, fmt::Write as _, io, path::PathBuf, sync::Arc};

use clutch_log::NodeId;
use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::{Disk, Runtime};
use parking_lot::Mutex;

pub(crate) const IDENTITY_BYTES: usize = 16;
/// Drawn once for each disk that keeps logs.
pub(crate) type Identity = [u8; IDENTITY_BYTES];

/// A node that was met.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Met {
    identity: Identity,
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
    met: Arc<Mutex<BTreeMap<NodeId, Met>>>,
    /// Whose turn it is to write the file: a disk that stands still holds up nobody who was met before.
    turn: Arc<tokio::sync::Mutex<()>>,
}

fn encode(node: NodeId, own: Identity, met: &BTreeMap<NodeId, Met>) -> String {
    let mut text = String::new();
    let own = Met { identity: own, address: String::new() };
    for (node, Met { identity, address }) in std::iter::once((&node, &own)).chain(met) {
        let digits: String = identity.iter().map(|byte| format!("{byte:02x}")).collect();
        let space = if address.is_empty() { "" } else { " " };
        // Writing to a string does not fail.
        let _ = writeln!(text, "{node} {digits}{space}{address}");
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
        let (digits, address) = met.split_once(' ').unwrap_or((met, ""));
        let mut identity = Identity::default();
        for (at, byte) in identity.iter_mut().enumerate() {
            *byte = u8::from_str_radix(digits.get(2 * at..2 * at + 2)?, 16).ok()?;
        }
        let met = Met { identity, address: address.to_owned() };
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
        let (own, met) = if disk.exists(&path) {
            let mut known = decode(&disk.read(&path)?).ok_or_else(|| damaged("is damaged"))?.into_iter();
            match known.next() {
                Some((own_node, own)) if own_node == node => (own.identity, known.collect()),
                _ => return Err(damaged("is of another node")),
            }
        } else {
            if !is_new()? {
                return Err(damaged("is missing, and there are logs"));
            }
            let mut own = Identity::default();
            runtime.random.fill(&mut own);
            disk.replace(&path, encode(node, own, &BTreeMap::new()).as_bytes())?;
            (own, BTreeMap::new())
        };
        Ok(Identities { disk, path, node, own, met: Arc::new(Mutex::new(met)), turn: Arc::default() })
    }

    /// The node's own.
    pub(crate) fn own(&self) -> Identity {
        self.own
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
    pub(crate) async fn meet(
        &self,
        runtime: &Runtime,
        node: NodeId,
        identity: Identity,
        address: &str,
    ) -> Result<(), String> {
        if let Some(known) = self.known(node, identity, address) {
            return known;
        }
        let _turn = self.turn.lock().await;
        // Another stream of it may have been first.
        if let Some(known) = self.known(node, identity, address) {
            return known;
        }
        let mut all = self.met.lock().clone();
        let met = Met { identity, address: address.to_owned() };
        all.insert(node, met.clone());
        let (this, text) = (self.clone(), encode(self.node, self.own, &all));
        let written = runtime.blocking(move || this.disk.replace(&this.path, text.as_bytes())).await;
        let written = written.ok_or("this node stops")?;
        written.map_err(|error| format!("write down who node {node} is: {error}"))?;
        self.met.lock().insert(node, met);
        Ok(())
    }

    /// What is to be said of a node that was met; `None` where none was under that number, or where it was elsewhere.
    fn known(&self, node: NodeId, identity: Identity, address: &str) -> Option<Result<(), String>> {
        let known = self.met.lock().get(&node)?.clone();
        if known.identity == identity || mutants::is(Mutant::AnyIdentityTaken) {
            return (address.is_empty() || known.address == address).then_some(Ok(()));
        }
        Some(Err(format!(
            "node {node} is not the one that was met under its number before: its logs were lost or replaced, so it has \
             forgotten its votes and must not come back under that number"
        )))
    }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, time::Duration};

    use clutch_runtime::simulated::{NodeId as SimNode, World};

    use super::*;

    #[test]
    fn golden_identities_and_every_flip() {
        let at = |byte: u8, address: &str| Met { identity: [byte; 16], address: address.to_owned() };
        let met = BTreeMap::from([(2, at(0xab, "")), (10, at(1, "ten.example:7400"))]);
        let bytes = encode(1, [7; IDENTITY_BYTES], &met).into_bytes();
        let lines = [
            "1 07070707070707070707070707070707",
            "2 abababababababababababababababab",
            "10 01010101010101010101010101010101 ten.example:7400",
        ];
        assert!(String::from_utf8_lossy(&bytes).starts_with(&lines.join("\n")));
        let read = decode(&bytes).expect("reads");
        assert_eq!(read, [(1, at(7, "")), (2, met[&2].clone()), (10, met[&10].clone())]);
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
            identities.meet(&runtime, 2, [1; 16], "here").await.expect("the first one");
            identities.meet(&runtime, 2, [1; 16], "").await.expect("the same again");
            assert_eq!(open(false).expect("is there").address(2).as_deref(), Some("here"));
            identities.meet(&runtime, 2, [1; 16], "there").await.expect("the same, which has moved");
            let again = open(false).expect("is there");
            assert_eq!(
                (again.own(), again.met()),
                (identities.own(), BTreeMap::from([(2, "there".to_owned())]))
            );
            let others = [&again, &identities];
            let other = others.map(|known| known.meet(&runtime, 2, [2; 16], "elsewhere"));
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
