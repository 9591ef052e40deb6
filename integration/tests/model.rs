//! Random operations through produce and apply against a naive in-memory filesystem, with entries that are
//! delivered twice and late, and crashes of the CDC in every state of every kind of transaction; all invariants
//! after every batch.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use bytes::Bytes;
use clutch_cdc::{Cdc, SendStep};
use clutch_log::{Batch, Epoch};
use clutch_proto::{
    InodeId, InodeKind, Refusal,
    cdc::{self, CdcEntry, CdcReply, CdcRequest, StepDone, cdc_request},
    listing, operation,
    shard::*,
    state::{Entry, entry::Kind},
    types::{ClientTag, Code, SnapshotPolicy},
};
use clutch_shard::{Shard, ShardFacts, invariants};
use clutch_state::{Applier, EntryOutcome, Machine, MemoryStore, ProduceContext, Stop, applier::rescan};
use prost::Message as _;
use rand::{Rng as _, SeedableRng as _, seq::IndexedRandom as _};
use rand_chacha::ChaCha8Rng;
use shard_reply::Reply;
use shard_request::Op;

/// Operations that are carried out, reads among them; turns that find nothing to do are not counted.
const OPERATIONS: usize = 120_000;
const BATCH: usize = 100;

/// A replica without a log: entries are applied as they come.
struct Replica<M: Machine> {
    applier: Applier<M>,
    facts: M::Facts,
    /// Entries to be delivered again.
    late: Vec<Bytes>,
}

type Outcome<M> = (
    EntryOutcome<<M as Machine>::Reply>,
    Vec<<M as Machine>::Effect>,
    Vec<(ClientTag, Result<<M as Machine>::Reply, Refusal>)>,
);

impl<M: Machine> Replica<M> {
    fn new(facts: M::Facts, genesis: M::Entry) -> Replica<M> {
        let applier = Applier::open(Arc::new(MemoryStore::new())).expect("opens");
        let mut replica = Replica { applier, facts, late: Vec::new() };
        replica.apply(&genesis.encode_to_vec().into(), 1);
        replica
    }

    fn apply(&mut self, body: &Bytes, now: u64) -> Outcome<M> {
        let entry = Entry { stamp: now, kind: Some(Kind::Body(body.clone())) };
        let position = self.applier.position().next();
        let batch = Batch { position, epoch: Epoch(1), entries: vec![entry.encode_to_vec().into()] };
        let mut applied = self.applier.apply(&batch).expect("no fault");
        (applied.outcomes.pop().expect("one entry").1, applied.actions, applied.resolved)
    }

    fn call(
        &mut self,
        request: M::Request,
        tag: ClientTag,
        now: u64,
        rng: &mut ChaCha8Rng,
    ) -> Result<Outcome<M>, Refusal> {
        let store = self.applier.store().clone();
        let mut random = || rng.random();
        let mut context = ProduceContext { now: clutch_proto::Time(now), random: &mut random };
        let entry = match M::produce(&*store, request, Some(tag), &mut context, &self.facts) {
            Ok(entry) => Bytes::from(entry.encode_to_vec()),
            Err(Stop::Refused(refusal)) => return Err(refusal),
            Err(Stop::Fault(fault)) => panic!("{fault}"),
            Err(Stop::Unknown(what)) => panic!("{what}"),
        };
        let outcome = self.apply(&entry, now);
        if rng.random_ratio(1, 8) {
            // At once again: the same answer, no second effect.
            let (again, actions, resolved) = self.apply(&entry, now);
            let same = match (&again, &outcome.0) {
                // Of a refusal the code is kept, not the words.
                (EntryOutcome::Done(Err(again)), EntryOutcome::Done(Err(first))) => again.code == first.code,
                (again, first) => again == first,
            };
            assert!(same, "the same request again has another answer");
            assert!(actions.is_empty() && resolved.is_empty());
        }
        if rng.random_ratio(1, 8) {
            self.late.push(entry);
        }
        Ok(outcome)
    }

    /// Delivers entries of long ago: whatever they answer, they must change nothing but the clients' rows.
    fn deliver_late(&mut self, now: u64) {
        for entry in std::mem::take(&mut self.late) {
            let (_, actions, resolved) = self.apply(&entry, now);
            assert!(actions.is_empty() && resolved.is_empty(), "a late duplicate had an effect");
        }
    }
}

/// The cluster under test.
struct System {
    shards: Vec<Replica<Shard>>,
    cdc: Replica<Cdc>,
    now: u64,
    sequence: u64,
    rng: ChaCha8Rng,
    performed: usize,
    /// Kinds and states of transactions in which the CDC has crashed.
    crashed_in: BTreeSet<(&'static str, String)>,
}

impl System {
    fn new(seed: u64, shards: u32) -> System {
        let genesis = |shard: u32| {
            let (slot_first, slot_last) = clutch_registry::slots(shard, shards);
            let genesis = Genesis { shard, slot_first, slot_last, cluster: 1, root_mode: 0o755, rules: 1 };
            ShardEntry { tag: None, body: Some(shard_entry::Body::Genesis(genesis)) }
        };
        let begin = CdcEntry {
            tag: None,
            body: Some(cdc::cdc_entry::Body::Genesis(cdc::Genesis { cluster: 1, rules: 1 })),
        };
        System {
            shards: (0..shards)
                .map(|n| Replica::new(ShardFacts { cluster: 1, ..ShardFacts::default() }, genesis(n)))
                .collect(),
            cdc: Replica::new((), begin),
            now: 10,
            sequence: 0,
            rng: ChaCha8Rng::seed_from_u64(seed),
            performed: 0,
            crashed_in: BTreeSet::new(),
        }
    }

    fn tag(&mut self) -> ClientTag {
        self.sequence += 1;
        self.now += self.rng.random_range(0..1000);
        ClientTag {
            client: 77,
            sequence: self.sequence,
            acknowledged: self.sequence - 1,
            issued_at: self.now,
        }
    }

    fn shard_of(&mut self, slot: u8) -> &mut Replica<Shard> {
        let shard = usize::from(slot) * self.shards.len() / 256;
        &mut self.shards[shard]
    }

    fn write(&mut self, slot: u8, op: Op) -> Result<Reply, Refusal> {
        self.performed += 1;
        let tag = self.tag();
        self.step(slot, op, tag)
    }

    fn step(&mut self, slot: u8, op: Op, tag: ClientTag) -> Result<Reply, Refusal> {
        let (now, mut rng) = (self.now, self.rng.clone());
        let outcome = self.shard_of(slot).call(ShardRequest { op: Some(op) }, tag, now, &mut rng);
        self.rng = rng;
        match outcome?.0 {
            EntryOutcome::Done(result) => result.map(|r| r.reply.expect("a reply")),
            other => panic!("{other:?}"),
        }
    }

    fn read(&mut self, slot: u8, op: Op) -> Result<Reply, Refusal> {
        let shard = self.shard_of(slot);
        match Shard::read(&**shard.applier.store(), &ShardRequest { op: Some(op) }, &shard.facts) {
            Ok(reply) => Ok(reply.reply.expect("a reply")),
            Err(Stop::Refused(refusal)) => Err(refusal),
            Err(Stop::Fault(fault)) => panic!("{fault}"),
            Err(Stop::Unknown(what)) => panic!("{what}"),
        }
    }

    /// A whole transaction: begin, all steps, its answer.
    fn transaction(&mut self, op: cdc_request::Op) -> Result<CdcReply, Refusal> {
        self.performed += 1;
        let (tag, now) = (self.tag(), self.now);
        let mut rng = self.rng.clone();
        let outcome = self.cdc.call(CdcRequest { op: Some(op) }, tag, now, &mut rng);
        self.rng = rng;
        let (outcome, mut steps, _) = outcome?;
        assert_eq!(outcome, EntryOutcome::Pending);
        let mut answer = None;
        while let Some(step) = steps.pop() {
            if self.rng.random_ratio(1, 4) {
                // A crash before the step was sent: the next leader begins from the rows.
                steps = self.crash_cdc();
                continue;
            }
            let done = self.run_steps(step);
            if self.rng.random_ratio(1, 4) {
                // A crash after the shard executed it and before the answer was logged: it is sent again.
                steps = self.crash_cdc();
                continue;
            }
            let entry = CdcEntry { tag: None, body: Some(cdc::cdc_entry::Body::StepDone(done)) };
            let body = Bytes::from(entry.encode_to_vec());
            let (_, more, resolved) = self.cdc.apply(&body, self.now);
            steps.extend(more);
            answer =
                answer.or(resolved.into_iter().find(|(t, _)| t.sequence == tag.sequence).map(|(_, r)| r));
            if self.rng.random_ratio(1, 8) {
                let (_, more, resolved) = self.cdc.apply(&body, self.now);
                assert!(more.is_empty() && resolved.is_empty(), "the same answer moved a transaction twice");
            }
            if self.rng.random_ratio(1, 8) {
                self.cdc.late.push(body);
            }
        }
        answer.expect("a transaction ends when no step is left")
    }

    /// One step, or several whose answers one entry brings; some are sent and then lost with a crash.
    fn run_steps(&mut self, mut step: SendStep) -> StepDone {
        let first = step.step;
        let mut earlier = Vec::new();
        loop {
            let done = self.run_step(step.clone());
            let next = done.reply.as_ref().and_then(|reply| step.after(reply));
            match next.filter(|_| self.rng.random_ratio(1, 2)) {
                Some(next) => {
                    earlier.extend(done.reply);
                    step = next;
                }
                None => return StepDone { step: first, earlier, ..done },
            }
        }
    }

    /// Forgets everything but the rows; notes where the transaction stood.
    fn crash_cdc(&mut self) -> Vec<SendStep> {
        let store = self.cdc.applier.store().clone();
        for (key, value) in store.scan(clutch_cdc::tables::TRANSACTION, &[], &[], 10).expect("scans") {
            let row: cdc::TransactionRow =
                clutch_state::store::decode_row(clutch_cdc::tables::TRANSACTION, &key, value).expect("a row");
            self.crashed_in.insert((clutch_cdc::steps::kind_name(&row), clutch_cdc::steps::state_name(&row)));
        }
        self.cdc.applier = Applier::open(store.clone()).expect("opens");
        Cdc::recover(&*store).expect("recovers")
    }

    fn run_step(&mut self, step: SendStep) -> StepDone {
        let op = step.request.op.expect("a request");
        let slot = operation::of_shard(&op).0.slot().0;
        let result = match step.tag {
            Some(tag) => self.step(slot, op, tag),
            None => self.read(slot, op),
        };
        let (error, reply) = match result {
            Ok(reply) => (None, Some(ShardReply { reply: Some(reply) })),
            Err(refusal) => (Some(refusal.to_wire()), None),
        };
        StepDone { transaction: step.transaction, step: step.step, error, reply, earlier: vec![] }
    }

    fn check(&mut self) {
        let now = self.now;
        self.shards.iter_mut().for_each(|s| s.deliver_late(now));
        self.cdc.deliver_late(now);
        let mut facts = Vec::new();
        for shard in &self.shards {
            let (wrong, of_shard) = invariants::check_shard(&**shard.applier.store()).expect("reads");
            assert_eq!(wrong, Vec::<String>::new());
            facts.push(of_shard);
            let hashes = rescan(&**shard.applier.store()).expect("reads");
            assert_eq!(hashes.differences, Vec::<String>::new());
        }
        let hashes = rescan(&**self.cdc.applier.store()).expect("reads");
        assert_eq!(hashes.differences, Vec::<String>::new());
        assert_eq!(invariants::check_cluster(&facts), Vec::<String>::new());
    }
}

/// The naive filesystem.
#[derive(Default)]
struct Model {
    dirs: BTreeMap<InodeId, BTreeMap<Bytes, (InodeId, u64)>>,
    parents: BTreeMap<InodeId, InodeId>,
    files: BTreeMap<InodeId, (Bytes, u32)>,
    /// Deleted or replaced: directory, name, target.
    deleted: Vec<(InodeId, Bytes, InodeId)>,
    removed: BTreeSet<InodeId>,
}

type Expected = Result<(), Code>;

impl Model {
    fn entry(&self, dir: InodeId, name: &Bytes) -> Option<(InodeId, u64)> {
        self.dirs.get(&dir)?.get(name).copied()
    }

    /// What putting `target` under a name must say.
    fn can_put(&self, dir: InodeId, name: &Bytes, is_dir: bool, replace: bool) -> Expected {
        if !self.dirs.contains_key(&dir) {
            return Err(Code::NotFound);
        }
        match self.entry(dir, name) {
            None => Ok(()),
            Some((there, _)) if there.is_directory() => {
                Err(if replace && !is_dir { Code::IsDirectory } else { Code::Exists })
            }
            Some(_) if replace && is_dir => Err(Code::NotDirectory),
            Some(_) if !replace => Err(Code::Exists),
            Some(_) => Ok(()),
        }
    }

    fn put(&mut self, dir: InodeId, name: &Bytes, target: InodeId, created_at: u64) {
        let old = self.dirs.get_mut(&dir).expect("checked").insert(name.clone(), (target, created_at));
        if let Some((old, _)) = old {
            self.deleted.push((dir, name.clone(), old));
        }
    }

    fn is_below(&self, mut dir: InodeId, ancestor: InodeId) -> bool {
        while dir != InodeId::ROOT {
            if dir == ancestor {
                return true;
            }
            dir = self.parents[&dir];
        }
        false
    }
}

fn compare<T: std::fmt::Debug>(what: &str, got: Result<T, Refusal>, expected: Expected) -> Option<T> {
    assert_eq!(got.as_ref().map(drop).map_err(|r| r.code), expected, "{what}: {got:?}");
    got.ok()
}

fn made(reply: Option<Reply>) -> Option<(InodeId, u64)> {
    match reply? {
        Reply::Edge(edge) => Some((InodeId::from_wire(edge.target).expect("an inode"), edge.created_at)),
        other => panic!("{other:?}"),
    }
}

struct Test {
    system: System,
    model: Model,
}

impl Test {
    fn pick_dir(&mut self) -> InodeId {
        let rng = &mut self.system.rng;
        if rng.random_ratio(1, 50) && !self.model.removed.is_empty() {
            let removed: Vec<_> = self.model.removed.iter().copied().collect();
            return *removed.choose(rng).expect("some");
        }
        let dirs: Vec<_> = self.model.dirs.keys().copied().collect();
        *dirs.choose(rng).expect("the root")
    }

    fn pick_name(&mut self, dir: InodeId) -> Bytes {
        let names: Vec<_> =
            self.model.dirs.get(&dir).map(|d| d.keys().cloned().collect()).unwrap_or_default();
        let rng = &mut self.system.rng;
        match names.choose(rng).filter(|_| rng.random_ratio(2, 3)) {
            Some(name) => name.clone(),
            None => Bytes::from(format!("n{}", rng.random_range(0..24))),
        }
    }

    /// An existing entry of a directory, if it has one.
    fn pick_entry(&mut self) -> Option<(InodeId, Bytes, InodeId, u64)> {
        let dir = self.pick_dir();
        let name = self.pick_name(dir);
        self.model.entry(dir, &name).map(|(target, created_at)| (dir, name, target, created_at))
    }

    fn operate(&mut self) {
        match self.system.rng.random_range(0..100) {
            0..20 => self.create(),
            20..26 => self.symlink(),
            26..38 => self.make_directory(),
            38..52 => self.remove(),
            52..64 => self.rename_inside(),
            64..78 => self.rename_across(),
            78..84 => self.change_mode(),
            84..88 => self.undelete(),
            88..91 => self.forget(),
            91..94 => self.forget_or_undelete_directory(),
            _ => self.look(),
        }
    }

    fn create(&mut self) {
        let (dir, replace) = (self.pick_dir(), self.system.rng.random());
        let name = self.pick_name(dir);
        let is_apart = self.system.rng.random_ratio(1, 3);
        let length = self.system.rng.random_range(0..if is_apart { 70_000 } else { 300 });
        let data = Bytes::from(vec![self.system.rng.random::<u8>(); length]);
        let is_possible = if is_apart { (1..=65_536).contains(&length) } else { length <= 255 };
        // Before anything is looked at, or behind the directory.
        let is_told = is_apart || self.model.dirs.contains_key(&dir);
        let expected = match is_possible || !is_told {
            true => self.model.can_put(dir, &name, false, replace),
            false => Err(Code::TooLarge),
        };
        let (raw, name, mode) = (dir.raw(), name, 0o600);
        let op = match (is_apart, name.clone(), data.clone()) {
            (false, name, data) => {
                Op::CreateFile(CreateFile { dir: raw, name, mode, data, replace, ..CreateFile::default() })
            }
            (true, name, data) => Op::CreateInline(CreateInline {
                dir: raw,
                name,
                mode,
                data,
                replace,
                ..CreateInline::default()
            }),
        };
        let got = self.system.write(dir.slot().0, op);
        if let Some((id, at)) = made(compare("create", got, expected)) {
            self.model.put(dir, &name, id, at);
            self.model.files.insert(id, (data, 0o600));
        }
    }

    fn symlink(&mut self) {
        let dir = self.pick_dir();
        let name = self.pick_name(dir);
        let expected = self.model.can_put(dir, &name, false, false);
        let target = Bytes::from_static(b"../elsewhere");
        let op = CreateSymlink {
            dir: dir.raw(),
            name: name.clone(),
            target: target.clone(),
            ..CreateSymlink::default()
        };
        let got = self.system.write(dir.slot().0, Op::CreateSymlink(op));
        if let Some((id, at)) = made(compare("symlink", got, expected)) {
            self.model.put(dir, &name, id, at);
            self.model.files.insert(id, (target, 0o777));
        }
    }

    fn make_directory(&mut self) {
        if self.model.dirs.len() > 60 {
            return;
        }
        let parent = self.pick_dir();
        let name = self.pick_name(parent);
        let expected = self.model.can_put(parent, &name, true, false);
        let op = cdc::MakeDirectory {
            parent: parent.raw(),
            name: name.clone(),
            mode: 0o700,
            ..cdc::MakeDirectory::default()
        };
        let got = self.system.transaction(cdc_request::Op::MakeDirectory(op));
        if let Some(reply) = compare("mkdir", got, expected) {
            let id = InodeId::from_wire(reply.id).expect("an inode");
            self.model.put(parent, &name, id, reply.created_at);
            self.model.dirs.insert(id, BTreeMap::new());
            self.model.parents.insert(id, parent);
        }
    }

    fn remove(&mut self) {
        let Some((dir, name, target, created_at)) = self.pick_entry() else { return };
        if target.is_directory() {
            let expected = if self.model.dirs[&target].is_empty() { Ok(()) } else { Err(Code::NotEmpty) };
            let op = cdc::RemoveDirectory {
                parent: dir.raw(),
                name: name.clone(),
                target: target.raw(),
                created_at,
            };
            if compare("rmdir", self.system.transaction(cdc_request::Op::RemoveDirectory(op)), expected)
                .is_some()
            {
                self.model.dirs.get_mut(&dir).expect("there").remove(&name);
                self.model.dirs.remove(&target);
                self.model.parents.remove(&target);
                self.model.removed.insert(target);
            }
            return;
        }
        let stale = self.system.rng.random_ratio(1, 10);
        let expected = if stale { Err(Code::Stale) } else { Ok(()) };
        let op = Unlink {
            dir: dir.raw(),
            name: name.clone(),
            target: target.raw(),
            created_at: created_at - u64::from(stale),
        };
        if compare("unlink", self.system.write(dir.slot().0, Op::Unlink(op)), expected).is_some() {
            self.model.dirs.get_mut(&dir).expect("there").remove(&name);
            self.model.deleted.push((dir, name, target));
        }
    }

    fn rename_inside(&mut self) {
        let Some((dir, old_name, target, created_at)) = self.pick_entry() else { return };
        let new_name = self.pick_name(dir);
        let expected = if new_name == old_name {
            Ok(())
        } else {
            self.model.can_put(dir, &new_name, target.is_directory(), true)
        };
        // A directory never replaces anything.
        let op = RenameInDirectory {
            dir: dir.raw(),
            old_name: old_name.clone(),
            target: target.raw(),
            created_at,
            new_name: new_name.clone(),
        };
        let got = self.system.write(dir.slot().0, Op::RenameInDirectory(op));
        if let Some((_, at)) = made(compare("rename", got, expected)).filter(|_| new_name != old_name) {
            self.model.dirs.get_mut(&dir).expect("there").remove(&old_name);
            self.model.put(dir, &new_name, target, at);
        }
    }

    fn rename_across(&mut self) {
        let Some((dir, old_name, target, created_at)) = self.pick_entry() else { return };
        let new_parent = self.pick_dir();
        if new_parent == dir {
            return;
        }
        let new_name = self.pick_name(new_parent);
        let (raw, old_parent, new_parent_raw) = (target.raw(), dir.raw(), new_parent.raw());
        let is_dir = target.is_directory();
        let mut expected = self.model.can_put(new_parent, &new_name, is_dir, !is_dir);
        let op = if is_dir {
            if self.model.dirs.contains_key(&new_parent) && self.model.is_below(new_parent, target) {
                expected = Err(Code::Loop);
            }
            cdc_request::Op::RenameDirectory(cdc::RenameDirectory {
                target: raw,
                old_parent,
                old_name: old_name.clone(),
                created_at,
                new_parent: new_parent_raw,
                new_name: new_name.clone(),
            })
        } else {
            cdc_request::Op::RenameFile(cdc::RenameFile {
                target: raw,
                old_parent,
                old_name: old_name.clone(),
                created_at,
                new_parent: new_parent_raw,
                new_name: new_name.clone(),
            })
        };
        if let Some(reply) = compare("move", self.system.transaction(op), expected) {
            self.model.dirs.get_mut(&dir).expect("there").remove(&old_name);
            self.model.put(new_parent, &new_name, target, reply.created_at);
            if is_dir {
                self.model.parents.insert(target, new_parent);
            }
        }
    }

    fn change_mode(&mut self) {
        let Some((_, _, target, _)) = self.pick_entry() else { return };
        let mode = self.system.rng.random::<u32>() & 0o7777;
        let op = SetAttributes { id: target.raw(), mode: Some(mode), ..SetAttributes::default() };
        compare("chmod", self.system.write(target.slot().0, Op::SetAttributes(op)), Ok(()));
        if let Some(file) = self.model.files.get_mut(&target) {
            file.1 = mode;
        }
    }

    fn undelete(&mut self) {
        if self.model.deleted.is_empty() {
            return;
        }
        let at = self.system.rng.random_range(0..self.model.deleted.len());
        let (dir, name, target) = self.model.deleted[at].clone();
        if !self.model.dirs.contains_key(&dir) {
            return;
        }
        let new_name = self.pick_name(dir);
        let op = Op::History(History { dir: dir.raw(), name: name.clone(), ..History::default() });
        let Ok(Reply::History(history)) = self.system.read(dir.slot().0, op) else { panic!("no history") };
        let past = history
            .past
            .iter()
            .find(|p| p.target == target.raw() && p.owned)
            .expect("deleted, so in the history");
        let expected = match self.model.entry(dir, &new_name) {
            None => Ok(()),
            Some(_) => Err(Code::Exists),
        };
        let op = Undelete {
            dir: dir.raw(),
            name,
            target: target.raw(),
            ended_at: past.ended_at,
            new_name: new_name.clone(),
        };
        let got = self.system.write(dir.slot().0, Op::Undelete(op));
        if let Some((_, created_at)) = made(compare("undelete", got, expected)) {
            self.model.deleted.remove(at);
            self.model.put(dir, &new_name, target, created_at);
        }
    }

    /// Forgets a deleted file for good, through its shard or, when it lives in another, through the CDC.
    fn forget(&mut self) {
        if self.model.deleted.is_empty() {
            return;
        }
        let at = self.system.rng.random_range(0..self.model.deleted.len());
        let too_early = self.system.rng.random_ratio(1, 5);
        self.forget_at(at, too_early);
    }

    fn forget_at(&mut self, at: usize, too_early: bool) {
        let (dir, name, target) = self.model.deleted[at].clone();
        let op = Op::History(History { dir: dir.raw(), name: name.clone(), ..History::default() });
        let Ok(Reply::History(history)) = self.system.read(dir.slot().0, op) else { panic!("no history") };
        let past = history.past.iter().find(|p| p.target == target.raw() && p.owned).expect("deleted");
        let policy = match too_early {
            true => SnapshotPolicy { age_ms: Some(u64::MAX / 1_000_000), versions: Some(1000) },
            false => SnapshotPolicy { age_ms: Some(0), versions: None },
        };
        let expected = if too_early { Err(Code::TooEarly) } else { Ok(()) };
        let (dir_raw, target_raw, ended_at) = (dir.raw(), target.raw(), past.ended_at);
        let policy = Some(policy);
        let shard = |slot: u8| usize::from(slot) * self.system.shards.len() / 256;
        let done = if shard(dir.slot().0) == shard(target.slot().0) {
            let op = ForgetEdge { dir: dir_raw, name, target: target_raw, ended_at, policy };
            compare("forget", self.system.write(dir.slot().0, Op::ForgetEdge(op)), expected).is_some()
        } else {
            let op = cdc::ForgetFile { dir: dir_raw, name, target: target_raw, ended_at, policy };
            compare("forget", self.system.transaction(cdc_request::Op::ForgetFile(op)), expected).is_some()
        };
        if done {
            self.model.deleted.remove(at);
            self.model.files.remove(&target);
            let gone = self.system.read(target.slot().0, Op::Stat(Stat { id: target.raw() }));
            compare("stat", gone, Err(Code::NotFound));
        }
    }

    fn forget_or_undelete_directory(&mut self) {
        let removed: Vec<_> = self.model.removed.iter().copied().collect();
        let Some(dir) = removed.choose(&mut self.system.rng).copied() else { return };
        if self.system.rng.random() {
            let op = Op::History(History { dir: dir.raw(), ..History::default() });
            let Ok(Reply::History(history)) = self.system.read(dir.slot().0, op) else {
                panic!("no history")
            };
            let expected = if history.past.is_empty() { Ok(()) } else { Err(Code::NotEmpty) };
            self.forget_directory(dir, expected);
            return;
        }
        let parent = self.pick_dir();
        let name = self.pick_name(parent);
        let expected =
            if parent == dir { Err(Code::Loop) } else { self.model.can_put(parent, &name, true, false) };
        let op = cdc::UndeleteDirectory { target: dir.raw(), parent: parent.raw(), name: name.clone() };
        let got = self.system.transaction(cdc_request::Op::UndeleteDirectory(op));
        if let Some(reply) = compare("undelete directory", got, expected) {
            self.model.put(parent, &name, dir, reply.created_at);
            self.model.dirs.insert(dir, BTreeMap::new());
            self.model.parents.insert(dir, parent);
            self.model.removed.remove(&dir);
        }
    }

    fn forget_directory(&mut self, dir: InodeId, expected: Expected) {
        let policy = Some(SnapshotPolicy { age_ms: Some(0), versions: None });
        let op = cdc::ForgetDirectory { target: dir.raw(), policy };
        let got = self.system.transaction(cdc_request::Op::ForgetDirectory(op));
        if compare("forget directory", got, expected).is_some() {
            self.model.removed.remove(&dir);
        }
    }

    /// Forgets all that is past: only what is there now stays, in the rows of every shard.
    fn sweep(&mut self) {
        while !self.model.deleted.is_empty() {
            self.forget_at(self.model.deleted.len() - 1, false);
        }
        let at_once = Some(SnapshotPolicy { age_ms: Some(0), versions: None });
        for dir in self.model.dirs.keys().chain(&self.model.removed).copied().collect::<Vec<_>>() {
            let op = Op::History(History { dir: dir.raw(), ..History::default() });
            let Ok(Reply::History(history)) = self.system.read(dir.slot().0, op) else {
                panic!("no history")
            };
            for past in history.past {
                // Only traces of moves are left.
                assert!(!past.owned);
                let PastEdge { name, target, ended_at, .. } = past;
                let op = ForgetEdge { dir: dir.raw(), name, target, ended_at, policy: at_once };
                compare("forget", self.system.write(dir.slot().0, Op::ForgetEdge(op)), Ok(()));
            }
        }
        for dir in self.model.removed.clone() {
            self.forget_directory(dir, Ok(()));
        }
        for slot in 0..=255u8 {
            let visit = VisitTransients { slot: slot.into(), after: Bytes::new() };
            let Ok(Reply::VisitTransients(page)) = self.system.read(slot, Op::VisitTransients(visit)) else {
                panic!("no page")
            };
            for transient in page.transients {
                let content = transient.content;
                let op = Op::CollectContent(CollectContent { content });
                compare("collect", self.system.write(content as u8, op), Ok(()));
            }
        }
        let (mut inodes, mut past, mut contents) = (0, 0, 0);
        for shard in &self.system.shards {
            let (_, facts) = invariants::check_shard(&**shard.applier.store()).expect("reads");
            inodes += facts.inodes.len();
            past += facts.past_edges;
            contents += facts.contents;
        }
        let files = self
            .model
            .files
            .iter()
            .filter(|(id, (data, _))| id.kind() == InodeKind::File && !data.is_empty());
        assert_eq!(inodes, self.model.dirs.len() + self.model.files.len());
        assert_eq!((past, contents), (0, files.count() as u64));
    }

    fn look(&mut self) {
        let dir = self.pick_dir();
        let name = self.pick_name(dir);
        self.system.performed += 1;
        let got = self.system.read(dir.slot().0, Op::Lookup(Lookup { dir: dir.raw(), name: name.clone() }));
        let entry = self.model.entry(dir, &name);
        let found = compare("lookup", got, if entry.is_some() { Ok(()) } else { Err(Code::NotFound) });
        assert_eq!(made(found), entry);
        let limit = self.system.rng.random_range(1..8);
        let (mut cursor, mut after, mut listed) = (0, Bytes::new(), BTreeMap::new());
        loop {
            let op = Op::ReadDir(ReadDir { dir: dir.raw(), cursor, limit, after });
            let Ok(Reply::ReadDir(page)) = self.system.read(dir.slot().0, op) else { panic!("no page") };
            for entry in listing::entries(page.entries).expect("a page") {
                let id = InodeId::from_wire(entry.target).expect("an inode");
                assert!(
                    listed.insert(entry.name, (id, entry.created_at)).is_none(),
                    "a name twice in one listing"
                );
            }
            if page.next_cursor == 0 {
                break;
            }
            assert!(page.next_cursor > cursor || !page.next_after.is_empty());
            (cursor, after) = (page.next_cursor, page.next_after);
        }
        assert_eq!(&listed, self.model.dirs.get(&dir).unwrap_or(&BTreeMap::new()));
        let Some((id, _)) = entry.filter(|(id, _)| !id.is_directory()) else { return };
        let Ok(Reply::Attributes(attributes)) =
            self.system.read(id.slot().0, Op::Stat(Stat { id: id.raw() }))
        else {
            panic!()
        };
        let (data, mode) = &self.model.files[&id];
        assert_eq!((attributes.size, attributes.mode), (data.len() as u64, *mode));
        if id.kind() == InodeKind::File {
            let op = Op::Layout(Layout { id: id.raw(), ..Layout::default() });
            let Ok(Reply::Layout(layout)) = self.system.read(id.slot().0, op) else { panic!("no layout") };
            let inline = layout.extents.first().and_then(|e| e.source.clone());
            let expected =
                (!data.is_empty()).then(|| clutch_proto::types::extent::Source::Inline(data.clone()));
            assert_eq!(inline, expected);
        }
    }
}

#[test]
fn random_operations_match_the_naive_filesystem() {
    let mut model = Model::default();
    model.dirs.insert(InodeId::ROOT, BTreeMap::new());
    let mut test = Test { system: System::new(2026, 4), model };
    while test.system.performed < OPERATIONS {
        for _ in 0..BATCH {
            test.operate();
        }
        test.system.check();
        // Without it the history only grows, and the checks become slow.
        if test.model.deleted.len() > 2000 {
            test.sweep();
            test.system.check();
        }
    }
    let states =
        |kind, states: &[&'static str]| states.iter().map(|s| (kind, (*s).to_owned())).collect::<Vec<_>>();
    let expected: BTreeSet<_> = [
        states("make directory", &["first", "insert", "back"]),
        states("remove directory", &["first", "insert", "remove", "back"]),
        states("move file", &["first", "insert", "remove", "back"]),
        states("move directory", &["first", "walk", "insert", "setparent", "remove", "back"]),
        states("forget file", &["first", "remove"]),
        states("forget directory", &["first"]),
        states("undelete directory", &["first", "insert", "setparent"]),
    ]
    .concat()
    .into_iter()
    .collect();
    assert_eq!(test.system.crashed_in, expected, "the CDC crashed in every state of every kind");
}
