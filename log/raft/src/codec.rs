//! What members of a group tell each other and write down, byte by byte. All numbers are little-endian.
//!
//! A stream begins with a greeting (`greeting.rs`). Every frame after it:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 1 | kind of the request: 1 append, 2 heartbeat, 3 vote, 4 pre-vote, 5 snapshot, 6 hand over, 7 barrier, 8 seal, 9 take a snapshot, 10 read of a snapshot |
//! | 1 | 1 | 0 request, 1 answer, 2 refusal, whose rest is text |
//! | 2 | 8 | group: as in the segments of the log's store |
//! | 10 | 8 | number of the request on its stream |
//! | 18 | 4 | CRC-32 of the bytes before and after this field |
//! | 22 | | body |
//!
//! In bodies an identity of a record that may be missing is a byte (0 missing, 1 there), term and index (8 each); a vote is a
//! term, who was voted for (8 each), and a byte that is 1 when a quorum has; bytes are a length (4) and as many bytes; members are
//! the number of sets of voters (1: a set, 2: two while they change), of each the number and ids, then number and ids of all nodes.

use bytes::{BufMut as _, Bytes, BytesMut};
use clutch_log::{Epoch, Manifest, Position, SnapshotFile};
use openraft::{EmptyNode, Membership, StoredMembership, impls::leader_id_std::LeaderId};

use crate::types::{Command, Entry, LogId, Members, Payload, StoredMembers, Vote};

/// Indices are below this, so that counting on from one is safe.
const INDEX_MAX: u64 = 1 << 62;
/// What a frame has before its body.
pub(crate) const HEADER_BYTES: usize = 22;

/// What does not fit.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Malformed(pub(crate) &'static str);

/// What a request asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Append = 1,
    Heartbeat = 2,
    Vote = 3,
    PreVote = 4,
    Snapshot = 5,
    HandOver = 6,
    Barrier = 7,
    Seal = 8,
    Take = 9,
    Read = 10,
    /// Of no group: how far the node that asks is.
    Mark = 11,
}

impl Kind {
    const ALL: [Kind; 11] = [
        Kind::Append,
        Kind::Heartbeat,
        Kind::Vote,
        Kind::PreVote,
        Kind::Snapshot,
        Kind::HandOver,
        Kind::Barrier,
        Kind::Seal,
        Kind::Take,
        Kind::Read,
        Kind::Mark,
    ];
}

/// Which of the three a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Request = 0,
    Answer = 1,
    Refusal = 2,
}

/// A frame that is no hello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) kind: Kind,
    pub(crate) form: Form,
    pub(crate) group: u64,
    pub(crate) number: u64,
    pub(crate) body: Bytes,
}

impl Frame {
    pub(crate) fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(HEADER_BYTES + self.body.len());
        bytes.put_u8(self.kind as u8);
        bytes.put_u8(self.form as u8);
        bytes.put_u64_le(self.group);
        bytes.put_u64_le(self.number);
        let mut crc = crc32fast::Hasher::new();
        crc.update(&bytes);
        crc.update(&self.body);
        bytes.put_u32_le(crc.finalize());
        bytes.extend_from_slice(&self.body);
        bytes.freeze()
    }

    pub(crate) fn decode(bytes: Bytes) -> Result<Frame, Malformed> {
        let mut from = Reader(bytes.clone());
        let (kind, form) = (from.u8()?, from.u8()?);
        let (group, number, stored) = (from.u64()?, from.u64()?, from.u32()?);
        let body = from.0;
        let mut crc = crc32fast::Hasher::new();
        crc.update(&bytes[..HEADER_BYTES - 4]);
        crc.update(&body);
        if crc.finalize() != stored {
            return Err(Malformed("a frame has another checksum than its bytes"));
        }
        let kind = Kind::ALL.into_iter().find(|known| *known as u8 == kind);
        let forms = [Form::Request, Form::Answer, Form::Refusal];
        let form = forms.into_iter().find(|known| *known as u8 == form);
        let (Some(kind), Some(form)) = (kind, form) else {
            return Err(Malformed("a frame of a kind that this build does not know"));
        };
        Ok(Frame { kind, form, group, number, body })
    }
}

/// Takes bytes apart.
pub(crate) struct Reader(pub(crate) Bytes);

const SHORT: Malformed = Malformed("a message is cut off");

impl Reader {
    pub(crate) fn take(&mut self, count: usize) -> Result<Bytes, Malformed> {
        if self.0.len() < count { Err(SHORT) } else { Ok(self.0.split_to(count)) }
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        self.take(N).map(|bytes| std::array::from_fn(|at| bytes[at]))
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Malformed> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn flag(&mut self) -> Result<bool, Malformed> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed("a flag is neither 0 nor 1")),
        }
    }

    pub(crate) fn bytes(&mut self) -> Result<Bytes, Malformed> {
        let length = self.u32()?;
        self.take(length as usize)
    }

    pub(crate) fn end(self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed("a message is longer than it should be")) }
    }

    /// A reign, as far as they are counted: what is behind could be none's.
    fn term(&mut self) -> Result<u64, Malformed> {
        let term = self.u64()?;
        if term < Epoch::OF_INCARNATION { Ok(term) } else { Err(Malformed("a reign that no log comes to")) }
    }

    fn index(&mut self) -> Result<u64, Malformed> {
        let index = self.u64()?;
        if index < INDEX_MAX { Ok(index) } else { Err(Malformed("an index that no log comes to")) }
    }

    pub(crate) fn id(&mut self) -> Result<Option<LogId>, Malformed> {
        let is_there = self.flag()?;
        let (term, index) = (self.term()?, self.index()?);
        if !is_there && (term, index) != (0, 0) {
            return Err(Malformed("a record that is missing has an identity"));
        }
        Ok(is_there.then(|| LogId::new(term.into(), index)))
    }

    pub(crate) fn vote(&mut self) -> Result<Vote, Malformed> {
        let leader_id = LeaderId { term: self.term()?, voted_for: self.u64()? };
        Ok(Vote { leader_id, committed: self.flag()? })
    }

    pub(crate) fn members(&mut self) -> Result<Members, Malformed> {
        let sets = (0..self.u8()?).map(|_| self.ids()).collect::<Result<Vec<_>, _>>()?;
        let nodes = self.ids()?.into_iter().map(|node| (node, EmptyNode {}));
        let nodes: std::collections::BTreeMap<u64, EmptyNode> = nodes.collect();
        // A set of voters that is empty, or names an unknown node, would elect nobody or anybody.
        Membership::new(sets, nodes).map_err(|_| Malformed("members that cannot be"))
    }

    fn ids(&mut self) -> Result<std::collections::BTreeSet<u64>, Malformed> {
        let mut ids = std::collections::BTreeSet::new();
        for _ in 0..self.u32()? {
            let id = self.u64()?;
            if ids.last().is_some_and(|last| *last >= id) {
                return Err(Malformed("nodes that are not in their order"));
            }
            ids.insert(id);
        }
        Ok(ids)
    }

    pub(crate) fn stored_members(&mut self) -> Result<StoredMembers, Malformed> {
        let id = self.id()?;
        Ok(match self.flag()? {
            true => StoredMembership::new(id, self.members()?),
            false => StoredMembership::default(),
        })
    }

    pub(crate) fn entry(&mut self) -> Result<Entry, Malformed> {
        let log_id = LogId::new(self.term()?.into(), self.index()?);
        let payload = match self.u8()? {
            0 => Payload::Blank,
            1 => {
                let entries = (0..self.u32()?).map(|_| self.bytes()).collect::<Result<Vec<_>, _>>()?;
                Payload::Normal(Command::Batch(entries))
            }
            2 => Payload::Normal(Command::Seal),
            3 => Payload::Membership(self.members()?),
            _ => return Err(Malformed("a record of a kind that this build does not know")),
        };
        Ok(Entry { log_id, payload })
    }

    pub(crate) fn manifest(&mut self) -> Result<Manifest, Malformed> {
        let (position, hash) = (Position(self.index()?), self.array()?);
        let file = |from: &mut Reader| {
            let name = String::from_utf8(from.bytes()?.into());
            let name = name.map_err(|_| Malformed("a file's name is no text"))?;
            Ok(SnapshotFile { name, bytes: from.u64()?, crc: from.u32()? })
        };
        let files = (0..self.u32()?).map(|_| file(self)).collect::<Result<Vec<_>, _>>()?;
        Ok(Manifest { position, hash, files })
    }
}

/// Puts bytes together.
#[derive(Default)]
pub(crate) struct Builder(pub(crate) BytesMut);

impl Builder {
    pub(crate) fn u8(&mut self, number: u8) -> &mut Builder {
        self.0.put_u8(number);
        self
    }

    pub(crate) fn u32(&mut self, number: usize) -> &mut Builder {
        self.0.put_u32_le(u32::try_from(number).expect("messages are bounded"));
        self
    }

    pub(crate) fn u64(&mut self, number: u64) -> &mut Builder {
        self.0.put_u64_le(number);
        self
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Builder {
        self.u32(bytes.len());
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn id(&mut self, id: Option<&LogId>) -> &mut Builder {
        self.u8(u8::from(id.is_some()));
        self.u64(id.map_or(0, |id| id.leader_id.term)).u64(id.map_or(0, |id| id.index))
    }

    pub(crate) fn vote(&mut self, vote: &Vote) -> &mut Builder {
        self.u64(vote.leader_id.term).u64(vote.leader_id.voted_for).u8(u8::from(vote.committed))
    }

    pub(crate) fn members(&mut self, members: &Members) -> &mut Builder {
        let sets = members.get_joint_config();
        self.u8(u8::try_from(sets.len()).expect("one set of voters, or two"));
        for set in sets {
            self.ids(set.iter().copied());
        }
        self.ids(members.nodes().map(|(node, _)| *node))
    }

    fn ids(&mut self, ids: impl Iterator<Item = u64>) -> &mut Builder {
        let ids: Vec<u64> = ids.collect();
        self.u32(ids.len());
        ids.into_iter().for_each(|id| self.0.put_u64_le(id));
        self
    }

    pub(crate) fn stored_members(&mut self, stored: &StoredMembers) -> &mut Builder {
        self.id(stored.log_id().as_ref());
        let is_there = !stored.membership().get_joint_config().is_empty();
        self.u8(u8::from(is_there));
        if is_there {
            self.members(stored.membership());
        }
        self
    }

    pub(crate) fn entry(&mut self, entry: &Entry) -> &mut Builder {
        self.u64(entry.log_id.leader_id.term).u64(entry.log_id.index);
        match &entry.payload {
            Payload::Blank => self.u8(0),
            Payload::Normal(Command::Batch(entries)) => {
                self.u8(1).u32(entries.len());
                entries.iter().for_each(|entry| {
                    self.bytes(entry);
                });
                self
            }
            Payload::Normal(Command::Seal) => self.u8(2),
            Payload::Membership(members) => self.u8(3).members(members),
        }
    }

    pub(crate) fn manifest(&mut self, manifest: &Manifest) -> &mut Builder {
        self.u64(manifest.position.0);
        self.0.extend_from_slice(&manifest.hash);
        self.u32(manifest.files.len());
        for SnapshotFile { name, bytes, crc } in &manifest.files {
            self.bytes(name.as_bytes()).u64(*bytes);
            self.0.put_u32_le(*crc);
        }
        self
    }

    pub(crate) fn done(&mut self) -> Bytes {
        std::mem::take(&mut self.0).freeze()
    }
}
