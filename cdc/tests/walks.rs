//! Walks whose answers come when the tree is not any more what was read: entries in, steps and answers out.

use std::sync::Arc;

use clutch_cdc::{Cdc, MOVES_REMEMBERED, STEPS_PER_ENTRY_MAX, SendStep};
use clutch_proto::{
    InodeId, Refusal,
    cdc::{
        Begin, CdcEntry, CdcReply, CdcRequest, Genesis, Jump, RenameDirectory, StepDone, cdc_entry::Body,
        cdc_request::Op,
    },
    log::{Batch, Epoch},
    shard::{Done, EdgeReply, ShardReply, shard_reply::Reply, shard_request},
    state::{Entry, entry::Kind},
    types::{Attributes, ClientTag},
};
use clutch_state::{Applier, MemoryStore};
use prost::Message as _;

const ROOT: u64 = InodeId::ROOT.raw();

/// A directory of slot 0.
fn dir(number: u64) -> u64 {
    1 << 62 | number << 8
}

struct Coordinator {
    applier: Applier<Cdc>,
    sequence: u64,
}

type Effects = (Vec<SendStep>, Vec<Result<CdcReply, Refusal>>);

impl Coordinator {
    fn new() -> Coordinator {
        let applier = Applier::open(Arc::new(MemoryStore::new())).expect("opens");
        let mut coordinator = Coordinator { applier, sequence: 0 };
        coordinator
            .apply(CdcEntry { tag: None, body: Some(Body::Genesis(Genesis { cluster: 1, rules: 1 })) });
        coordinator
    }

    fn apply(&mut self, entry: CdcEntry) -> Effects {
        let entry = Entry { stamp: 1, kind: Some(Kind::Body(entry.encode_to_vec().into())) };
        let position = self.applier.position().next();
        let batch = Batch { position, epoch: Epoch(1), entries: vec![entry.encode_to_vec().into()] };
        let applied = self.applier.apply(&batch).expect("applies");
        (applied.actions, applied.resolved.into_iter().map(|(_, result)| result).collect())
    }

    /// Begins to move `target` out of one directory into another; its first step.
    fn begin(&mut self, target: u64, old_parent: u64, new_parent: u64) -> SendStep {
        self.sequence += 1;
        let (sequence, acknowledged) = (self.sequence, self.sequence - 1);
        let tag = ClientTag { client: 77, sequence, acknowledged, issued_at: 1 };
        let (old_name, new_name) = ("old".into(), "new".into());
        let op = RenameDirectory { target, old_parent, old_name, created_at: 1, new_parent, new_name };
        let begin = Begin { request: Some(CdcRequest { op: Some(Op::RenameDirectory(op)) }), slot: 0 };
        let (mut steps, _) = self.apply(CdcEntry { tag: Some(tag), body: Some(Body::Begin(begin)) });
        steps.pop().expect("a step")
    }

    /// Brings the answers to a step and to those after it.
    fn answer(&mut self, step: &SendStep, mut replies: Vec<ShardReply>) -> Effects {
        let reply = replies.pop();
        let SendStep { transaction, step, .. } = *step;
        let done = StepDone { transaction, step, error: None, reply, earlier: replies };
        self.apply(CdcEntry { tag: None, body: Some(Body::StepDone(done)) })
    }

    /// A move from its first step to its end.
    fn finish(&mut self, first: &SendStep, new_parent: u64) {
        let (steps, _) = self.answer(first, vec![locked(), owned_by(ROOT), owned_by(ROOT)]);
        assert!(matches!(steps[0].request.op, Some(shard_request::Op::InsertEdge(_))), "into {new_parent:x}");
        let (steps, answers) = self.answer(&steps[0], vec![inserted(), done(), done()]);
        assert!(steps.is_empty() && answers[0].is_ok());
    }
}

fn locked() -> ShardReply {
    done()
}

fn done() -> ShardReply {
    ShardReply { reply: Some(Reply::Done(Done {})) }
}

fn inserted() -> ShardReply {
    ShardReply { reply: Some(Reply::Edge(EdgeReply { created_at: 5, ..EdgeReply::default() })) }
}

fn owned_by(parent: u64) -> ShardReply {
    ShardReply { reply: Some(Reply::Attributes(Attributes { parent, ..Attributes::default() })) }
}

const X: u64 = 3;
const P: u64 = 4;
const Q: u64 = 5;
const Y: u64 = 6;
const R: u64 = 7;
const Z: u64 = 8;

/// A move of `X` from `P` to `Q`, begun before one of `Y` from `R` to `Z`; the first step of each.
fn two_moves() -> (Coordinator, SendStep, SendStep) {
    let mut cdc = Coordinator::new();
    let earlier = cdc.begin(dir(X), dir(P), dir(Q));
    let first = cdc.begin(dir(Y), dir(R), dir(Z));
    (cdc, earlier, first)
}

/// The answers to moving `Y` from `R` to `Z`, which lies in `X`, which lies in `P`: as they were read.
fn read_through_x() -> Vec<ShardReply> {
    vec![locked(), owned_by(dir(X)), owned_by(dir(P)), owned_by(ROOT), owned_by(ROOT)]
}

fn op_of(steps: &[SendStep]) -> &shard_request::Op {
    steps[0].request.op.as_ref().expect("a request")
}

#[test]
fn an_undisturbed_walk_is_believed() {
    let mut cdc = Coordinator::new();
    let first = cdc.begin(dir(Y), dir(R), dir(Z));
    let (steps, _) = cdc.answer(&first, read_through_x());
    assert!(matches!(op_of(&steps), shard_request::Op::InsertEdge(_)));
}

#[test]
fn a_walk_begins_again_when_an_earlier_move_of_what_it_read_has_ended() {
    let (mut cdc, earlier, first) = two_moves();
    cdc.finish(&earlier, dir(Q));
    let (steps, answers) = cdc.answer(&first, read_through_x());
    assert!(answers.is_empty());
    assert!(matches!(op_of(&steps), shard_request::Op::Stat(stat) if stat.id == dir(Z)));
    // What is read now counts.
    let again = vec![owned_by(dir(X)), owned_by(dir(Q)), owned_by(ROOT), owned_by(ROOT)];
    let (steps, _) = cdc.answer(&steps[0], again);
    assert!(matches!(op_of(&steps), shard_request::Op::InsertEdge(_)));
}

#[test]
fn a_walk_waits_for_an_earlier_move_of_what_it_read() {
    let (mut cdc, earlier, first) = two_moves();
    let (steps, answers) = cdc.answer(&first, read_through_x());
    assert!(steps.is_empty() && answers.is_empty());
    let (steps, _) = cdc.answer(&earlier, vec![locked(), owned_by(ROOT), owned_by(ROOT)]);
    let (steps, answers) = cdc.answer(&steps[0], vec![inserted(), done(), done()]);
    assert!(answers[0].is_ok());
    assert!(matches!(op_of(&steps), shard_request::Op::Stat(stat) if stat.id == dir(Z)));
}

#[test]
fn later_moves_do_not_hold_a_walk_up() {
    let mut cdc = Coordinator::new();
    let first = cdc.begin(dir(Y), dir(R), dir(Z));
    let later = cdc.begin(dir(X), dir(P), dir(Q));
    cdc.finish(&later, dir(Q));
    let (steps, _) = cdc.answer(&first, read_through_x());
    assert!(matches!(op_of(&steps), shard_request::Op::InsertEdge(_)));
}

#[test]
fn a_walk_begins_again_when_more_moves_ended_than_are_remembered() {
    let (mut cdc, earlier, first) = two_moves();
    cdc.finish(&earlier, dir(Q));
    for number in 0..MOVES_REMEMBERED {
        let other = cdc.begin(dir(100 + number), dir(10), dir(11));
        cdc.finish(&other, dir(11));
    }
    let (steps, _) = cdc.answer(&first, read_through_x());
    assert!(matches!(op_of(&steps), shard_request::Op::Stat(stat) if stat.id == dir(Z)));
}

#[test]
fn nothing_runs_ahead_of_a_verdict_on_what_was_read() {
    let mut cdc = Coordinator::new();
    let first = cdc.begin(dir(Y), dir(R), dir(Z));
    let walk = first.after(&locked()).expect("the walk may begin");
    assert!(matches!(op_of(std::slice::from_ref(&walk)), shard_request::Op::Stat(stat) if stat.id == dir(Z)));
    let root = walk.after(&owned_by(ROOT)).expect("and go on");
    assert!(matches!(op_of(std::slice::from_ref(&root)), shard_request::Op::Stat(stat) if stat.id == ROOT));
    assert_eq!(root.after(&owned_by(ROOT)), None, "the edge is inserted before the walk is logged");
    let (steps, _) = cdc.answer(&first, vec![locked(), owned_by(ROOT), owned_by(ROOT)]);
    // The same tags, whether a step was reached ahead or by the log.
    let ahead = steps[0].after(&inserted()).expect("forward");
    let (logged, _) = cdc.answer(&steps[0], vec![inserted()]);
    assert_eq!((ahead.step, ahead.tag, &ahead.request), (logged[0].step, logged[0].tag, &logged[0].request));
}

/// Directories between a destination and the root: more than two entries' worth of answers.
const DEPTH: u64 = 150;

/// The parent of the `n`-th directory of a deep chain, whose first is `Z`.
fn deep_parent(n: u64) -> ShardReply {
    owned_by(if n + 1 == DEPTH { ROOT } else { dir(1000 + n + 1) })
}

/// What the chain's directories say of their parents, from the `from`-th on, as many as an entry may bring.
fn deep_page(from: u64) -> Vec<ShardReply> {
    let until = (from + STEPS_PER_ENTRY_MAX as u64).min(DEPTH);
    let mut page: Vec<ShardReply> = (from..until).map(deep_parent).collect();
    if until == DEPTH && page.len() < STEPS_PER_ENTRY_MAX {
        page.push(owned_by(ROOT));
    }
    page
}

fn asks_for(steps: &[SendStep], id: u64) -> bool {
    matches!(op_of(steps), shard_request::Op::Stat(stat) if stat.id == id)
}

/// Begins to move `Y` into the chain's first directory and answers the lock; the walk's first step.
fn deep_move(cdc: &mut Coordinator) -> SendStep {
    let first = cdc.begin(dir(Y), dir(R), dir(1000));
    let (mut steps, _) = cdc.answer(&first, vec![locked()]);
    assert!(asks_for(&steps, dir(1000)));
    steps.pop().expect("the walk")
}

#[test]
fn a_walk_that_is_longer_than_an_entry_goes_on_where_it_was() {
    let mut cdc = Coordinator::new();
    let mut step = deep_move(&mut cdc);
    let page = STEPS_PER_ENTRY_MAX as u64;
    for from in (0..DEPTH).step_by(STEPS_PER_ENTRY_MAX) {
        let (mut steps, answers) = cdc.answer(&step, deep_page(from));
        assert!(answers.is_empty());
        if from + page < DEPTH {
            assert!(asks_for(&steps, dir(1000 + from + page)), "after {from}");
        } else {
            assert!(matches!(op_of(&steps), shard_request::Op::InsertEdge(_)));
        }
        step = steps.pop().expect("a step");
    }
}

#[test]
fn the_second_part_of_a_walk_is_checked_as_the_first() {
    // What moves lies in the second part of the walk.
    let moving = dir(1000 + STEPS_PER_ENTRY_MAX as u64 + 5);
    // Its move ends between the two parts; the second part was read before, or after.
    let mut cdc = Coordinator::new();
    let earlier = cdc.begin(moving, dir(P), dir(Q));
    let step = deep_move(&mut cdc);
    let (steps, _) = cdc.answer(&step, deep_page(0));
    assert!(asks_for(&steps, dir(1000 + STEPS_PER_ENTRY_MAX as u64)), "the first part is not held up");
    cdc.finish(&earlier, dir(Q));
    let (steps, answers) = cdc.answer(&steps[0], deep_page(STEPS_PER_ENTRY_MAX as u64));
    assert!(
        answers.is_empty() && asks_for(&steps, dir(1000)),
        "read before the move ended: from the beginning"
    );

    // It is in flight when the second part arrives: the walk waits, and then begins again.
    let mut cdc = Coordinator::new();
    let earlier = cdc.begin(moving, dir(P), dir(Q));
    let step = deep_move(&mut cdc);
    let (steps, _) = cdc.answer(&step, deep_page(0));
    let (steps, answers) = cdc.answer(&steps[0], deep_page(STEPS_PER_ENTRY_MAX as u64));
    assert!(steps.is_empty() && answers.is_empty(), "it waits");
    let (steps, _) = cdc.answer(&earlier, vec![locked(), owned_by(ROOT), owned_by(ROOT)]);
    let (steps, _) = cdc.answer(&steps[0], vec![inserted(), done(), done()]);
    assert!(asks_for(&steps, dir(1000)));
}

#[test]
fn transactions_of_a_lost_future_do_not_come_again() {
    let mut lost = Coordinator::new();
    let begin = |c: &mut Coordinator, n: u64| c.begin(dir(n), dir(n + 1), dir(n + 2));
    let last = [10, 20, 30].map(|n| begin(&mut lost, n).transaction).into_iter().max().expect("some");
    let jump = clutch_cdc::jump_past(&**lost.applier.store()).expect("reads");
    let mut cut = Coordinator::new();
    cut.apply(jump.clone());
    let next = begin(&mut cut, 10);
    assert!(next.transaction > last, "{} after {last}", next.transaction);
    // A past that knows less takes nothing back.
    cut.apply(CdcEntry { tag: None, body: Some(Body::Jump(Jump { transaction: 1 })) });
    assert!(begin(&mut cut, 30).transaction > next.transaction);
    cut.finish(&next, dir(12));
}
