//! A naive shard: what every entry of a shard's log must do, in plain maps, written apart from the real one.
//!
//! [`contents`](self) knows bytes, `collect` what goes, `read` what is seen; `registry` is another log's, in the same
//! manner.
//!
//! It is given the log that was in fact agreed on and says what each entry must have answered, what each read must
//! have seen, and what must be left at the end.

mod clients;
mod collect;
mod contents;
mod read;
mod registry;

use std::collections::BTreeMap;

use bytes::Bytes;
use clutch_log::Position;
use clutch_proto::{
    InodeId, InodeKind,
    limits::{INLINE_BYTES_MAX, INLINE_FILE_BYTES_MAX, SYMLINK_BYTES_MAX},
    name,
    shard::*,
    state::{self, entry::Kind},
    types::{ClientTag, Code},
};
use clutch_shard::Pages;
use prost::Message as _;
use shard_entry::Body;
use shard_reply::Reply;
use shard_request::Op;

use clients::Clients;
pub use read::agrees;
use read::attributes;
pub use registry::{RegistryOracle, RegistryStep};

type Outcome = Result<Reply, Code>;

/// A name's present meaning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edge {
    /// The inode.
    pub target: u64,
    /// When the edge was made.
    pub created_at: u64,
    /// A transaction holds it.
    pub locked: bool,
}

/// A name's earlier meaning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Past {
    /// The inode.
    pub target: u64,
    /// When the edge was made.
    pub created_at: u64,
    /// It is what keeps the inode.
    pub owned: bool,
}

/// What a file's bytes come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The bytes themselves.
    Inline(Bytes),
    /// Zeros.
    Hole,
    /// A span, from an offset in it on.
    Span(u64, u32),
}

impl Source {
    /// The span, if it is one.
    pub fn span(&self) -> Option<u64> {
        match self {
            Source::Span(id, _) => Some(*id),
            _ => None,
        }
    }
}

/// One version of a file's bytes.
#[derive(Clone, Debug, Default)]
pub struct Content {
    /// Bytes so far.
    pub size: u64,
    /// 0 while it is not published.
    pub file: u64,
    /// Where each extent begins, how long it is and where it comes from.
    pub extents: Vec<(u64, u64, Source)>,
    cookie: Bytes,
    /// How far use bumps the deadline; 0 for the default.
    lifetime_ms: u64,
    deadline: u64,
    pending: u64,
}

/// A span as far as its contents matter.
#[derive(Clone, Debug, Default)]
pub struct Span {
    /// Bytes of user data.
    pub size: u32,
    /// Its blocks were proven.
    pub certified: bool,
    /// Service and block.
    pub blocks: Vec<(u64, u64)>,
    crc: u32,
    block_bytes: u32,
    block_crcs: Vec<u32>,
}

/// What one entry must have done.
#[derive(Clone, Debug)]
pub struct Step {
    /// The record.
    pub position: Position,
    /// The log's time there.
    pub time: u64,
    /// Whose request it was.
    pub tag: Option<ClientTag>,
    /// The answer; `None` for what nobody asks.
    pub outcome: Option<Outcome>,
    /// It had its effect now, and not at an earlier time.
    pub is_first: bool,
    /// The operation, for those who look for traces of transactions.
    pub op: Option<Op>,
}

/// The naive shard.
#[derive(Default)]
pub struct ShardOracle {
    slots: Option<(u32, u32)>,
    /// How much the shard's answers hold.
    pub pages: Pages,
    /// The time of the last entry.
    pub time: u64,
    /// Inodes.
    pub inodes: BTreeMap<u64, InodeRow>,
    /// Current edges.
    pub edges: BTreeMap<(u64, Bytes), Edge>,
    /// Past edges by directory, name and end.
    pub past: BTreeMap<(u64, Bytes, u64), Past>,
    /// Past contents by file and end: the content and the directory in which it ended.
    pub past_contents: BTreeMap<(u64, u64), (u64, u64)>,
    /// Contents.
    pub contents: BTreeMap<u64, Content>,
    /// Spans.
    pub spans: BTreeMap<u64, Span>,
    services: BTreeMap<u64, u32>,
    counters: BTreeMap<u8, CounterRow>,
    clients: Clients<Reply>,
}

fn kind_of(id: u64) -> Result<InodeId, Code> {
    InodeId::from_wire(id).ok_or(Code::InvalidArgument)
}

fn is_directory(id: u64) -> bool {
    InodeId::from_wire(id).is_some_and(InodeId::is_directory)
}

/// The operation that an entry came from.
fn requested(body: &Body) -> Option<Op> {
    match body {
        Body::Genesis(_) | Body::ServicesChanged(_) | Body::Jump(_) => None,
        Body::StartContent(entry) => entry.op.map(Op::StartContent),
        Body::InitiateSpan(entry) => entry.op.clone().map(Op::InitiateSpan),
        Body::CertifySpan(entry) => entry.op.clone().map(Op::CertifySpan),
        Body::RemoveSpan(entry) => entry.op.clone().map(Op::RemoveSpan),
        Body::Request(request) => request.op.clone(),
    }
}

impl ShardOracle {
    /// Takes the next entry of the log.
    pub fn apply(&mut self, position: Position, entry: &Bytes) -> Result<Step, String> {
        let entry = state::Entry::decode(entry.clone()).map_err(|e| format!("entry at {position}: {e}"))?;
        self.time = entry.stamp.max(self.time + 1);
        let mut step =
            Step { position, time: self.time, tag: None, outcome: None, is_first: false, op: None };
        let Some(Kind::Body(body)) = entry.kind else { return Ok(step) };
        let entry = ShardEntry::decode(body).map_err(|e| format!("shard entry at {position}: {e}"))?;
        let body = entry.body.ok_or_else(|| format!("entry at {position} has no body"))?;
        step.tag = entry.tag;
        step.op = requested(&body);
        if let Some(tag) = entry.tag
            && let Some(known) = self.clients.admit(&tag, self.time)
        {
            step.outcome = Some(known);
            return Ok(step);
        }
        step.is_first = true;
        let outcome = self.execute(body);
        if let Some(tag) = &entry.tag {
            self.clients.record(tag, &outcome);
        }
        step.outcome = Some(outcome);
        Ok(step)
    }

    fn execute(&mut self, body: Body) -> Outcome {
        match body {
            Body::Genesis(op) => self.genesis(&op),
            Body::ServicesChanged(op) => {
                self.services.extend(op.services.into_iter().map(|s| (s.service_id, s.flags)));
                Ok(Reply::Done(Done {}))
            }
            Body::Jump(op) => {
                for line in op.slots {
                    // What the shard stops on is in no log that it has applied.
                    let slot = u8::try_from(line.slot).map_err(|_| Code::Malformed)?;
                    let (past, row) = (line.counters.ok_or(Code::Malformed)?, self.counter(slot));
                    row.inode = row.inode.max(past.inode);
                    row.content = row.content.max(past.content);
                    row.span = row.span.max(past.span);
                    row.block = row.block.max(past.block);
                }
                Ok(Reply::Done(Done {}))
            }
            Body::StartContent(op) => self.start_content(op),
            Body::InitiateSpan(op) => self.initiate(op),
            Body::CertifySpan(op) => self.certify(&op),
            Body::RemoveSpan(op) => self.remove_span(&op),
            Body::Request(request) => self.change(request.op.ok_or(Code::Malformed)?),
        }
    }

    /// What a request changes that is in the log as it was sent.
    fn change(&mut self, op: Op) -> Outcome {
        match op {
            Op::CreateFile(op) => self.create_file(op),
            Op::CreateInline(op) => self.create_inline(op),
            Op::CreateSymlink(op) => self.create_symlink(op),
            Op::LinkFile(op) => self.link_file(op),
            Op::RenameInDirectory(op) => self.rename(op),
            Op::Unlink(op) => self.unlink(&op),
            Op::Undelete(op) => self.undelete(op),
            Op::SetAttributes(op) => self.set_attributes(&op),
            Op::AddInline(op) => self.add_inline(op),
            Op::AddHole(op) => self.add_hole(&op),
            Op::ScrapContent(op) => self.scrap(&op),
            Op::SetPolicy(op) => self.set_policy(op),
            Op::ShareRange(op) => self.share_range(&op),
            Op::PublishContent(op) => self.publish(&op),
            Op::RestoreContent(op) => self.restore(&op),
            Op::SwapBlocks(op) => self.swap_blocks(&op),
            Op::SwapSpans(op) => self.swap_spans(&op),
            Op::MoveSpan(op) => self.move_span(&op),
            Op::ForgetEdge(op) => self.forget_edge(&op),
            Op::ForgetContent(op) => self.forget_content(&op),
            Op::CollectContent(op) => self.collect_content(&op),
            Op::CreateDirectoryInode(op) => self.create_directory(&op),
            Op::InsertEdge(op) => self.insert_edge(op),
            Op::LockEdge(op) => self.set_lock(op.dir, op.name, op.target, op.created_at, true),
            Op::UnlockEdge(op) => self.set_lock(op.dir, op.name, op.target, op.created_at, false),
            Op::RemoveLockedEdge(op) => self.remove_locked(op),
            Op::SetParent(op) => self.set_parent(&op),
            Op::OrphanDirectory(op) => self.orphan(&op),
            Op::RemoveDirectoryInode(op) => self.remove_directory(&op),
            Op::DropPastEdge(op) => self.drop_past_edge(&op),
            Op::RemoveFileInode(op) => self.remove_file_inode(&op),
            Op::AdoptDirectory(op) => self.adopt(&op),
            Op::ForgetDirectoryInode(op) => self.forget_directory(&op),
            // Those are in the log with what the producer adds to them.
            Op::StartContent(_) | Op::InitiateSpan(_) | Op::CertifySpan(_) | Op::RemoveSpan(_) => {
                Err(Code::Malformed)
            }
            // Reads are in no log: see `read`.
            Op::Lookup(_)
            | Op::Stat(_)
            | Op::ReadDir(_)
            | Op::Layout(_)
            | Op::History(_)
            | Op::ContentHistory(_)
            | Op::VisitInodes(_)
            | Op::VisitTransients(_)
            | Op::VisitPastContents(_)
            | Op::VisitDeadSpans(_)
            | Op::VisitBlocks(_)
            | Op::VisitSpans(_) => Err(Code::Malformed),
        }
    }

    fn genesis(&mut self, op: &Genesis) -> Outcome {
        if self.slots.is_some() {
            return Err(Code::Exists);
        }
        self.slots = Some((op.slot_first, op.slot_last));
        if op.slot_first == 0 {
            let mut row = self.new_inode(op.root_mode, 0, 0, 0);
            (row.nlink, row.parent, row.edge_time) = (2, InodeId::ROOT.raw(), self.time);
            row.mode = op.root_mode;
            self.inodes.insert(InodeId::ROOT.raw(), row);
        }
        Ok(Reply::Done(Done {}))
    }

    fn check_slot(&self, slot: u8) -> Result<(), Code> {
        let (first, last) = self.slots.ok_or(Code::NotReady)?;
        if (first..=last).contains(&u32::from(slot)) { Ok(()) } else { Err(Code::WrongShard) }
    }

    fn directory_here(&self, id: u64) -> Result<(), Code> {
        let id = kind_of(id)?;
        if !id.is_directory() {
            return Err(Code::NotDirectory);
        }
        self.check_slot(id.slot().0)
    }

    /// A directory that may get entries.
    fn live(&self, id: u64) -> Result<(), Code> {
        self.directory_here(id)?;
        match self.inodes.get(&id) {
            Some(row) if row.parent != 0 => Ok(()),
            _ => Err(Code::NotFound),
        }
    }

    fn new_inode(&self, mode: u32, uid: u32, gid: u32, mtime: u64) -> InodeRow {
        let mtime = if mtime == 0 { self.time } else { mtime };
        let (mode, ctime) = (mode & 0o7777, self.time);
        InodeRow { mode, uid, gid, mtime, ctime, atime: mtime, nlink: 1, ..InodeRow::default() }
    }

    fn counter(&mut self, slot: u8) -> &mut CounterRow {
        self.counters.entry(slot).or_insert(CounterRow { inode: 1, ..CounterRow::default() })
    }

    fn next_inode(&mut self, kind: InodeKind, slot: u8) -> u64 {
        let counter = self.counter(slot);
        counter.inode += 1;
        let sequence = counter.inode;
        InodeId::new(kind, sequence, clutch_proto::Slot(slot)).expect("few inodes").raw()
    }

    fn touch(&mut self, dir: u64) {
        let time = self.time;
        if let Some(row) = self.inodes.get_mut(&dir) {
            (row.mtime, row.ctime, row.edge_time) = (time, time, time);
        }
    }

    /// Whether an edge may be put there, without doing it.
    fn may_insert(
        &self,
        dir: u64,
        name: &Bytes,
        target_is_directory: bool,
        replace: bool,
    ) -> Result<(), Code> {
        name::check(name).map_err(|r| r.code)?;
        let Some(existing) = self.edges.get(&(dir, name.clone())) else { return Ok(()) };
        if existing.locked {
            return Err(Code::Busy);
        }
        match (is_directory(existing.target), target_is_directory, replace) {
            (true, false, true) => Err(Code::IsDirectory),
            (true, _, _) => Err(Code::Exists),
            (false, true, true) => Err(Code::NotDirectory),
            (false, _, false) => Err(Code::Exists),
            (false, false, true) => Ok(()),
        }
    }

    fn insert(&mut self, dir: u64, name: &Bytes, target: u64) -> Reply {
        let replaced = self.edges.get(&(dir, name.clone())).map_or(0, |e| e.target);
        if replaced != 0 {
            self.end(dir, name, true);
        }
        let edge = Edge { target, created_at: self.time, locked: false };
        self.edges.insert((dir, name.clone()), edge);
        self.touch(dir);
        Reply::Edge(EdgeReply { target, created_at: self.time, locked: false, replaced })
    }

    fn end(&mut self, dir: u64, name: &Bytes, owned: bool) {
        if let Some(edge) = self.edges.remove(&(dir, name.clone())) {
            let past = Past { target: edge.target, created_at: edge.created_at, owned };
            self.past.insert((dir, name.clone(), self.time), past);
        }
        self.touch(dir);
    }

    fn expect(&self, dir: u64, name: &Bytes, target: u64, created_at: u64) -> Result<&Edge, Code> {
        let edge = self.edges.get(&(dir, name.clone())).ok_or(Code::NotFound)?;
        if (edge.target, edge.created_at) == (target, created_at) { Ok(edge) } else { Err(Code::Stale) }
    }

    fn expect_free(&self, dir: u64, name: &Bytes, target: u64, created_at: u64) -> Result<(), Code> {
        if self.expect(dir, name, target, created_at)?.locked { Err(Code::Busy) } else { Ok(()) }
    }

    fn create_file(&mut self, op: CreateFile) -> Outcome {
        self.live(op.dir)?;
        if op.data.len() > INLINE_BYTES_MAX {
            return Err(Code::TooLarge);
        }
        self.create(op)
    }

    fn create_inline(&mut self, op: CreateInline) -> Outcome {
        self.live(op.dir)?;
        if op.data.is_empty() || op.data.len() > INLINE_FILE_BYTES_MAX {
            return Err(Code::TooLarge);
        }
        let CreateInline { dir, name, mode, uid, gid, mtime, data, replace } = op;
        self.create(CreateFile { dir, name, mode, uid, gid, mtime, data, replace })
    }

    fn create(&mut self, op: CreateFile) -> Outcome {
        self.may_insert(op.dir, &op.name, false, op.replace)?;
        let slot = op.dir as u8;
        let id = self.next_inode(InodeKind::File, slot);
        let mut row = self.new_inode(op.mode, op.uid, op.gid, op.mtime);
        if !op.data.is_empty() {
            row.size = op.data.len() as u64;
            row.content = self.whole_content(slot, id, op.data);
        }
        self.inodes.insert(id, row);
        Ok(self.insert(op.dir, &op.name, id))
    }

    fn create_symlink(&mut self, op: CreateSymlink) -> Outcome {
        self.live(op.dir)?;
        if op.target.is_empty() || op.target.len() > SYMLINK_BYTES_MAX || op.target.contains(&0) {
            return Err(Code::InvalidArgument);
        }
        self.may_insert(op.dir, &op.name, false, op.replace)?;
        let id = self.next_inode(InodeKind::Symlink, op.dir as u8);
        let mut row = self.new_inode(0o777, op.uid, op.gid, op.mtime);
        row.size = op.target.len() as u64;
        row.symlink_target = op.target;
        self.inodes.insert(id, row);
        Ok(self.insert(op.dir, &op.name, id))
    }

    fn rename(&mut self, op: RenameInDirectory) -> Outcome {
        self.live(op.dir)?;
        self.expect_free(op.dir, &op.old_name, op.target, op.created_at)?;
        if op.old_name == op.new_name {
            let (target, created_at) = (op.target, op.created_at);
            return Ok(Reply::Edge(EdgeReply { target, created_at, ..EdgeReply::default() }));
        }
        self.may_insert(op.dir, &op.new_name, is_directory(op.target), true)?;
        let reply = self.insert(op.dir, &op.new_name, op.target);
        self.end(op.dir, &op.old_name, false);
        Ok(reply)
    }

    fn unlink(&mut self, op: &Unlink) -> Outcome {
        self.live(op.dir)?;
        if kind_of(op.target)?.is_directory() {
            return Err(Code::IsDirectory);
        }
        self.expect_free(op.dir, &op.name, op.target, op.created_at)?;
        self.end(op.dir, &op.name, true);
        Ok(Reply::Edge(EdgeReply { target: op.target, created_at: self.time, ..EdgeReply::default() }))
    }

    fn undelete(&mut self, op: Undelete) -> Outcome {
        self.live(op.dir)?;
        name::check(&op.name).map_err(|r| r.code)?;
        let key = (op.dir, op.name, op.ended_at);
        let past = self.past.get(&key).filter(|p| p.target == op.target).ok_or(Code::NotFound)?;
        if !past.owned {
            return Err(Code::Stale);
        }
        self.may_insert(op.dir, &op.new_name, false, false)?;
        if let Some(past) = self.past.get_mut(&key) {
            past.owned = false;
        }
        Ok(self.insert(op.dir, &op.new_name, op.target))
    }

    fn set_attributes(&mut self, op: &SetAttributes) -> Outcome {
        let id = kind_of(op.id)?;
        self.check_slot(id.slot().0)?;
        let time = self.time;
        let row = self.inodes.get_mut(&op.id).ok_or(Code::NotFound)?;
        row.mode = op.mode.map_or(row.mode, |m| m & 0o7777);
        row.uid = op.uid.unwrap_or(row.uid);
        row.gid = op.gid.unwrap_or(row.gid);
        row.mtime = op.mtime.unwrap_or(row.mtime);
        row.atime = op.atime.unwrap_or(row.atime);
        row.ctime = time;
        Ok(Reply::Attributes(attributes(op.id, row)))
    }

    fn create_directory(&mut self, op: &CreateDirectoryInode) -> Outcome {
        let slot = u8::try_from(op.slot).map_err(|_| Code::InvalidArgument)?;
        self.check_slot(slot)?;
        if !kind_of(op.parent)?.is_directory() {
            return Err(Code::NotDirectory);
        }
        let id = self.next_inode(InodeKind::Directory, slot);
        let mut row = self.new_inode(op.mode, op.uid, op.gid, op.mtime);
        (row.parent, row.edge_time, row.nlink) = (op.parent, self.time, 2);
        self.inodes.insert(id, row);
        Ok(Reply::Edge(EdgeReply { target: id, ..EdgeReply::default() }))
    }

    fn insert_edge(&mut self, op: InsertEdge) -> Outcome {
        self.live(op.dir)?;
        self.may_insert(op.dir, &op.name, kind_of(op.target)?.is_directory(), op.replace)?;
        Ok(self.insert(op.dir, &op.name, op.target))
    }

    fn set_lock(&mut self, dir: u64, name: Bytes, target: u64, created_at: u64, lock: bool) -> Outcome {
        self.directory_here(dir)?;
        let locked = self.expect(dir, &name, target, created_at)?.locked;
        match (locked, lock) {
            (true, true) => return Err(Code::Busy),
            (false, false) => return Err(Code::Stale),
            _ => {}
        }
        if let Some(edge) = self.edges.get_mut(&(dir, name)) {
            edge.locked = lock;
        }
        Ok(Reply::Done(Done {}))
    }

    fn remove_locked(&mut self, op: RemoveLockedEdge) -> Outcome {
        self.directory_here(op.dir)?;
        if !self.inodes.contains_key(&op.dir) {
            return Err(Code::NotFound);
        }
        if !self.expect(op.dir, &op.name, op.target, op.created_at)?.locked {
            return Err(Code::Stale);
        }
        self.end(op.dir, &op.name, false);
        Ok(Reply::Done(Done {}))
    }

    fn set_parent(&mut self, op: &SetParent) -> Outcome {
        self.directory_here(op.dir)?;
        kind_of(op.parent)?;
        let time = self.time;
        let row = self.inodes.get_mut(&op.dir).ok_or(Code::NotFound)?;
        (row.parent, row.ctime) = (op.parent, time);
        Ok(Reply::Done(Done {}))
    }

    fn is_empty(&self, dir: u64) -> bool {
        self.edges.range((dir, Bytes::new())..).next().is_none_or(|((d, _), _)| *d != dir)
    }

    fn orphan(&mut self, op: &OrphanDirectory) -> Outcome {
        self.live(op.dir)?;
        if self.inodes.get(&op.dir).is_none_or(|row| row.parent != op.parent) {
            return Err(Code::Stale);
        }
        if !self.is_empty(op.dir) {
            return Err(Code::NotEmpty);
        }
        let time = self.time;
        if let Some(row) = self.inodes.get_mut(&op.dir) {
            (row.parent, row.former_parent, row.nlink, row.ctime) = (0, row.parent, 0, time);
        }
        Ok(Reply::Done(Done {}))
    }

    fn remove_directory(&mut self, op: &RemoveDirectoryInode) -> Outcome {
        self.directory_here(op.dir)?;
        if !self.inodes.contains_key(&op.dir) {
            return Err(Code::NotFound);
        }
        let has_past =
            self.past.range((op.dir, Bytes::new(), 0)..).next().is_some_and(|((d, ..), _)| *d == op.dir);
        if !self.is_empty(op.dir) || has_past {
            return Err(Code::NotEmpty);
        }
        self.inodes.remove(&op.dir);
        Ok(Reply::Done(Done {}))
    }
}

#[cfg(test)]
mod tests {
    use clutch_proto::state::Entry;

    use super::*;

    fn entry(tag: Option<ClientTag>, body: Body) -> Bytes {
        let body = ShardEntry { tag, body: Some(body) }.encode_to_vec().into();
        Entry { stamp: 1, kind: Some(Kind::Body(body)) }.encode_to_vec().into()
    }

    #[test]
    fn a_hundred_thousand_entries_are_replayed_quickly_and_a_repeated_one_once() {
        let mut oracle = ShardOracle::default();
        let genesis = Genesis { slot_last: 255, root_mode: 0o755, rules: 1, ..Genesis::default() };
        oracle.apply(Position(1), &entry(None, Body::Genesis(genesis))).expect("decodes");
        for n in 1..=100_000u64 {
            let tag = ClientTag { client: 99, sequence: n, acknowledged: n - 1, issued_at: 1 };
            let op = CreateFile {
                dir: InodeId::ROOT.raw(),
                name: format!("n{}", n % 5000).into(),
                replace: true,
                ..CreateFile::default()
            };
            let request = ShardRequest { op: Some(Op::CreateFile(op)) };
            let entry = entry(Some(tag), Body::Request(request));
            assert!(oracle.apply(Position(n + 1), &entry).expect("decodes").is_first);
            if n % 1000 == 0 {
                let again = oracle.apply(Position(n + 1), &entry).expect("decodes");
                assert!(!again.is_first && matches!(again.outcome, Some(Ok(Reply::Edge(_)))));
            }
        }
        assert_eq!((oracle.edges.len(), oracle.past.len()), (5000, 95_000));
    }
}
