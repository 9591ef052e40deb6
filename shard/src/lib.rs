//! A metadata shard: inodes, directory entries, contents and spans of a range of slots. Pure.
//!
//! `produce` freezes time, cookies, placement and verdicts on proofs into the entry; `apply` does the rest from
//! rows alone. Ids come from the slots' counters in `apply`, so they are the same on every replica.
//!
//! Invariants are listed and checked in [`invariants`].

mod collect;
mod content;
mod directory;
mod edge;
mod exchange;
mod extent;
mod facts;
mod inline;
mod inode;
pub mod invariants;
pub mod jump;
mod placement;
pub mod policy;
mod produce;
mod publish;
mod read;
mod rows;
mod span;
pub mod tables;
mod visit;

use clutch_proto::{
    InodeId, Time, level,
    log::Position,
    mutants::{self, Mutant},
    operation::{self, Class},
    rules,
    shard::{
        Genesis, InodeRow, ServicesChanged, ShardEntry, ShardReply, ShardRequest, shard_entry::Body,
        shard_reply::Reply, shard_request::Op,
    },
    types::{ClientTag, Code},
};
use clutch_state::{Applied, Machine, ProduceContext, Stop, StoreError, Tx, View, machine::Effects};

pub use facts::{Keyring, Lifetimes, Pages, ShardFacts};
pub use placement::{FLAG_CONDEMNED, FLAG_DRAIN, FLAG_GONE, FLAG_NO_WRITE, FLAG_STAYS_NO_WRITE};

use rows::Reapplied;

/// The shard's machine.
pub struct Shard;

fn is_create(body: &Option<Body>) -> bool {
    matches!(body, Some(Body::Request(ShardRequest { op: Some(Op::CreateFile(_)) })))
}

/// A shard causes nothing outside itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoEffect {}

impl Machine for Shard {
    const NAME: &'static str = "shard";
    type Request = ShardRequest;
    type Reply = ShardReply;
    type Entry = ShardEntry;
    type Effect = NoEffect;
    type Facts = ShardFacts;

    fn check_home(view: &dyn View, cluster: u64, number: u32) -> Result<(), StoreError> {
        let genesis: Option<Genesis> = clutch_state::get_row(view, tables::SHARD, &[])?;
        match genesis {
            Some(genesis) if (genesis.cluster, genesis.shard) != (cluster, number) => {
                Err(StoreError::Damaged(format!(
                    "they are of shard {} of cluster {:016x}",
                    genesis.shard, genesis.cluster
                )))
            }
            _ => Ok(()),
        }
    }

    fn level(request: &ShardRequest) -> u32 {
        request.op.as_ref().map_or(level::FIRST, level::of_shard)
    }

    fn inline_bytes(view: &dyn View) -> Result<u64, StoreError> {
        inline::bytes(view)
    }

    fn is_read(request: &ShardRequest) -> bool {
        request.op.as_ref().is_none_or(|op| operation::of_shard(op).1.is_read())
    }

    fn gives_space_back(request: &ShardRequest) -> bool {
        request.op.as_ref().is_some_and(|op| operation::of_shard(op).1 == Class::Release)
    }

    fn read(view: &dyn View, request: &ShardRequest, facts: &ShardFacts) -> Result<ShardReply, Stop> {
        let reply = read::read(view, request, &facts.pages)?;
        let has_blocks = match &reply {
            Reply::Layout(layout) => !layout.spans.is_empty(),
            Reply::VisitDeadSpans(dead) => !dead.spans.is_empty(),
            Reply::VisitSpans(page) => !page.spans.is_empty(),
            _ => false,
        };
        if has_blocks && facts.services.is_empty() && !mutants::is(Mutant::ServicesUnknown) {
            // Blocks without addresses would look lost.
            let text = "the shard does not know the block services yet; try again";
            return Err(Stop::refuse(Code::NotReady, text));
        }
        Ok(ShardReply { reply: Some(reply) })
    }

    fn produce(
        view: &dyn View,
        request: ShardRequest,
        tag: Option<ClientTag>,
        context: &mut ProduceContext<'_>,
        facts: &ShardFacts,
    ) -> Result<ShardEntry, Stop> {
        produce::produce(view, request, tag, context, facts)
    }

    fn tag(entry: &ShardEntry) -> Option<&ClientTag> {
        if mutants::is(Mutant::DuplicateCreate) && is_create(&entry.body) {
            return None;
        }
        entry.tag.as_ref()
    }

    fn apply(
        tx: &mut Tx<'_>,
        _position: Position,
        time: Time,
        entry: ShardEntry,
        _effects: &mut Effects<Shard>,
    ) -> Result<Applied<ShardReply>, Stop> {
        let body = entry.body.ok_or_else(|| Stop::unknown("it has no operation that this build knows"))?;
        let reply = apply_body(tx, time, body)?;
        Ok(Applied::Reply(ShardReply { reply: Some(reply) }))
    }

    fn finish(reply: &mut ShardReply, now: &dyn Fn() -> Time, facts: &ShardFacts) {
        facts.sign(reply, now);
    }
}

fn apply_body(tx: &mut Tx<'_>, time: Time, body: Body) -> Reapplied {
    match body {
        Body::Genesis(genesis) => apply_genesis(tx, time, &genesis),
        Body::ServicesChanged(changed) => apply_services(tx, changed),
        Body::Jump(op) => jump::apply(tx, &op),
        Body::StartContent(op) => content::start(tx, time, op),
        Body::InitiateSpan(op) => content::initiate(tx, time, op),
        Body::CertifySpan(op) => content::certify(tx, time, &op),
        Body::RemoveSpan(op) => collect::remove_span(tx, &op),
        Body::Request(request) => apply_request(tx, time, request),
    }
}

fn apply_request(tx: &mut Tx<'_>, time: Time, request: ShardRequest) -> Reapplied {
    let op = request.op.ok_or_else(|| Stop::unknown("it has no operation that this build knows"))?;
    match op {
        Op::CreateFile(op) => edge::create_file(tx, time, op),
        Op::CreateInline(op) => edge::create_inline(tx, time, op),
        Op::CreateSymlink(op) => edge::create_symlink(tx, time, op),
        Op::LinkFile(op) => edge::link_file(tx, time, op),
        Op::RenameInDirectory(op) => edge::rename(tx, time, op),
        Op::Unlink(op) => edge::unlink(tx, time, &op),
        Op::Undelete(op) => edge::undelete(tx, time, op),
        Op::SetAttributes(op) => inode::set_attributes(tx, time, &op),
        Op::AddInline(op) => content::add_inline(tx, time, op),
        Op::AddHole(op) => content::add_hole(tx, time, &op),
        Op::ScrapContent(op) => content::scrap(tx, time, &op),
        Op::SetPolicy(op) => policy::set(tx, time, op),
        Op::ShareRange(op) => publish::share_range(tx, time, &op),
        Op::PublishContent(op) => publish::publish(tx, time, &op),
        Op::RestoreContent(op) => publish::restore(tx, time, &op),
        Op::SwapBlocks(op) => exchange::swap_blocks(tx, &op),
        Op::SwapSpans(op) => exchange::swap_spans(tx, &op),
        Op::MoveSpan(op) => exchange::move_span(tx, time, &op),
        Op::ForgetEdge(op) => collect::forget_edge(tx, time, op),
        Op::ForgetContent(op) => collect::forget_content(tx, time, &op),
        Op::CollectContent(op) => collect::collect_content(tx, time, &op),
        Op::CreateDirectoryInode(op) => directory::create_inode(tx, time, &op),
        Op::InsertEdge(op) => edge::insert_step(tx, time, &op),
        Op::LockEdge(op) => edge::lock_edge(tx, &op),
        Op::UnlockEdge(op) => edge::unlock_edge(tx, &op),
        Op::RemoveLockedEdge(op) => edge::remove_locked_edge(tx, time, &op),
        Op::SetParent(op) => directory::set_parent(tx, time, &op),
        Op::OrphanDirectory(op) => directory::orphan(tx, time, &op),
        Op::RemoveDirectoryInode(op) => directory::remove_inode(tx, &op),
        Op::DropPastEdge(op) => collect::drop_past_edge(tx, time, &op),
        Op::RemoveFileInode(op) => collect::remove_file_inode(tx, &op),
        Op::AdoptDirectory(op) => directory::adopt(tx, time, &op),
        Op::ForgetDirectoryInode(op) => directory::forget(tx, time, &op),
        Op::StartContent(_) | Op::InitiateSpan(_) | Op::CertifySpan(_) | Op::RemoveSpan(_) => {
            Err(Stop::unknown("it lacks what a producer adds to it"))
        }
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
        | Op::VisitSpans(_) => Err(Stop::unknown("it holds a read")),
    }
}

/// The first entry of a shard: its slots and, in slot 0, the root directory.
fn apply_genesis(tx: &mut Tx<'_>, time: Time, genesis: &Genesis) -> Reapplied {
    if tx.get(tables::SHARD, &[])?.is_some() {
        return Err(Stop::refuse(Code::Exists, "the shard has begun already"));
    }
    rules::check(genesis.rules).map_err(Stop::unknown)?;
    tx.put_row(tables::SHARD, &[], genesis);
    if genesis.slot_first == 0 {
        let row = InodeRow {
            mode: genesis.root_mode,
            mtime: time.0,
            ctime: time.0,
            atime: time.0,
            nlink: 2,
            parent: InodeId::ROOT.raw(),
            edge_time: time.0,
            ..InodeRow::default()
        };
        tx.put_row(tables::INODE, &tables::inode_key(InodeId::ROOT), &row);
    }
    Ok(Reply::Done(clutch_proto::shard::Done {}))
}

/// What the registry knows of block services, frozen into the log by the producer's shell.
fn apply_services(tx: &mut Tx<'_>, changed: ServicesChanged) -> Reapplied {
    for service in changed.services {
        tx.put_row(tables::SERVICE, &service.service_id.to_be_bytes(), &service);
    }
    Ok(Reply::Done(clutch_proto::shard::Done {}))
}
