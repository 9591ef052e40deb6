//! Answers requests for blocks: certificate first, then the disk.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, Mutex, PoisonError, RwLock, Weak},
};

use bytes::Bytes;
use clutch_proto::{
    BlockId, Refusal, Time,
    blocks::{BlocksReply, BlocksRequest, blocks_request::Op},
    certificate::{Claims, Key, Operation},
    limits::{CLOCK_AHEAD_MS_MAX, CLOCK_SKEW_MS_MAX},
    mutants::{self, Mutant},
    types::Code,
};
use clutch_runtime::{Budget, Held, HybridClock, Runtime};
use prost::Message as _;

use self::small::{Asked, SmallChanges};
use crate::{
    queue::DiskQueue,
    store::{BlockStore, Expected, VERIFY_BYTES},
};

mod small;

/// One block service.
pub struct BlockService {
    runtime: Runtime,
    /// The cluster's time: what those who grant go by, never a wall clock alone.
    clock: Arc<HybridClock>,
    store: Arc<BlockStore>,
    cluster: u64,
    /// Live keys, the one that signs first.
    keys: RwLock<Arc<[Key]>>,
    /// How far apart this service's clock and those of shards may be.
    skew_ms_max: u64,
    /// Writes and erases: they may hang where reads do not, and what ends there says nothing of these.
    changes: Arc<DiskQueue>,
    /// Everything else.
    reads: DiskQueue,
    /// Why the last change of the disk failed; none since one has succeeded.
    failing: Mutex<Option<String>>,
    /// Blocks that are being written or erased.
    turns: Mutex<BTreeMap<BlockId, Weak<tokio::sync::Mutex<()>>>>,
    small: Arc<SmallChanges>,
    /// Blocks that a good certificate asked for and that could not be given as they were written.
    owed: Mutex<BTreeSet<BlockId>>,
}

/// Blocks that are remembered as owed; a scrub finds those beyond.
const OWED_MAX: usize = 1024;

/// An answer, and what is held for it until it is sent.
#[derive(Debug, Default)]
pub struct Answer {
    /// The answer.
    pub reply: BlocksReply,
    /// Its part of the budget for answers.
    pub held: Held,
}

impl From<BlocksReply> for Answer {
    fn from(reply: BlocksReply) -> Answer {
        Answer { reply, held: Held::default() }
    }
}

impl BlockService {
    /// A service over a disk's blocks.
    pub fn new(
        runtime: Runtime,
        clock: Arc<HybridClock>,
        store: BlockStore,
        cluster: u64,
        keys: Vec<Key>,
    ) -> BlockService {
        let store = Arc::new(store);
        let queue = || DiskQueue::new(runtime.clone(), store.service());
        let (changes, reads) = (Arc::new(queue()), queue());
        BlockService {
            runtime,
            clock,
            store,
            cluster,
            keys: RwLock::new(keys.into()),
            skew_ms_max: CLOCK_SKEW_MS_MAX,
            changes,
            reads,
            failing: Mutex::default(),
            turns: Mutex::default(),
            small: Arc::default(),
            owed: Mutex::default(),
        }
    }

    /// The same with another bound for the skew of clocks: where all of a cluster has one clock, erasing need not wait
    /// for others.
    pub fn with_skew_ms_max(self, skew_ms_max: u64) -> BlockService {
        BlockService { skew_ms_max, ..self }
    }

    /// From now on these keys are live; the first one signs.
    pub fn set_keys(&self, keys: Vec<Key>) {
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys.into();
    }

    fn keys(&self) -> Arc<[Key]> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The disk's blocks.
    pub fn store(&self) -> &Arc<BlockStore> {
        &self.store
    }

    /// What is wrong with the disk: it is not the right one, it hangs, or changes of it fail.
    pub fn fault(&self) -> Option<String> {
        let failing = || self.failing.lock().unwrap_or_else(|e| e.into_inner()).clone();
        self.store.unusable().or_else(|| self.changes.fault()).or_else(|| self.reads.fault()).or_else(failing)
    }

    /// Waits until nothing else is done to a block. A write that hangs after its grant was looked at must have come to its end
    /// before an erase is proven: else it would bring the block back, which nobody would know any more. The turn ends with the
    /// work, also when nobody waits for that; a disk that hangs refuses instead of letting its requests wait here.
    async fn turn(&self, block: BlockId) -> Result<tokio::sync::OwnedMutexGuard<()>, Refusal> {
        self.changes.refuse_stuck()?;
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(|e| e.into_inner());
            turns.retain(|_, turn| turn.strong_count() > 0);
            let known = turns.get(&block).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let new = Arc::default();
                turns.insert(block, Arc::downgrade(&new));
                new
            })
        };
        tokio::select! {
            biased;
            turn = turn.lock_owned() => Ok(turn),
            refusal = self.changes.is_stuck() => Err(refusal),
        }
    }

    /// Takes note of what became of a change. A disk that is mounted for reading only, or is dying, is seen by that alone.
    fn changed<T>(&self, what: &str, result: Result<T, Refusal>) -> Result<T, Refusal> {
        let failure = match &result {
            Ok(_) => None,
            // A disk that is not there says so itself, until it is.
            Err(refusal) if refusal.code == Code::DiskFault && self.store.unusable().is_none() => {
                Some(&refusal.detail)
            }
            // Says nothing of the disk.
            Err(_) => return result,
        };
        let mut failing = self.failing.lock().unwrap_or_else(|e| e.into_inner());
        let service = self.store.service();
        match (failure, failing.is_some()) {
            (Some(detail), had) => {
                if !had {
                    tracing::error!(%service, what, %detail, "a disk fails");
                }
                *failing = Some(format!("the disk of service {service} fails: {detail}"));
            }
            (None, true) => {
                tracing::warn!(%service, what, "the disk takes changes again");
                *failing = None;
            }
            (None, false) => {}
        }
        result
    }

    /// Remembers a block that somebody needs and has not got from here.
    fn owe(&self, block: BlockId, refusal: &Refusal) {
        let is_lost = matches!(refusal.code, Code::BlockNotFound | Code::BlockCorrupt | Code::DiskFault);
        // Of a disk that is not there nothing is lost yet.
        if is_lost && self.store.unusable().is_none() {
            let mut owed = self.owed.lock().unwrap_or_else(|e| e.into_inner());
            if owed.len() < OWED_MAX {
                owed.insert(block);
            }
        }
    }

    /// Blocks that were read under a good certificate since this was asked last, and were missing or damaged: whoever looks after the
    /// disk writes those elsewhere that are still in use.
    pub fn take_owed(&self) -> BTreeSet<BlockId> {
        std::mem::take(&mut *self.owed.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// Remembers blocks again that were taken and could not be looked at.
    pub fn owe_again(&self, blocks: impl IntoIterator<Item = BlockId>) {
        let mut owed = self.owed.lock().unwrap_or_else(|e| e.into_inner());
        let room = OWED_MAX.saturating_sub(owed.len());
        owed.extend(blocks.into_iter().take(room));
    }

    /// Whether nothing can be had from the disk at the moment: it is not the right one, or hangs.
    pub fn is_away(&self) -> bool {
        self.store.unusable().is_some() || self.hangs()
    }

    /// Whether the disk hangs: it has work, and nothing of it ends.
    pub fn hangs(&self) -> bool {
        self.changes.stuck().is_some() || self.reads.stuck().is_some()
    }

    fn is_failing(&self) -> bool {
        self.failing.lock().unwrap_or_else(|e| e.into_inner()).is_some()
    }

    /// Total and available bytes of the disk; an error when it cannot be asked, or hangs. Where changes of it fail nothing is
    /// available, until something small can be written again: that is tried each time.
    pub async fn space(&self) -> io::Result<(u64, u64)> {
        let store = self.store.clone();
        self.changes.refuse_stuck().map_err(io::Error::other)?;
        if self.is_failing() {
            let store = self.store.clone();
            let tried = self.changes.run(0, move || store.try_to_write()).await.map_err(io::Error::other)?;
            // Said in the disk's fault.
            let _ = self.changed("try", tried);
        }
        let (total, available) =
            self.reads.run(0, move || store.space()).await.map_err(io::Error::other)??;
        let takes_blocks = !self.is_failing() || mutants::is(Mutant::FailingDiskChosen);
        Ok((total, if takes_blocks { available } else { 0 }))
    }

    /// Says what a certificate grants, if it grants this now.
    ///
    /// A service that has just started may not know what time it is: nothing is written or erased then, since a grant of an hour ago
    /// would look like one of today, and its block may be proven erased. What is read is there or not.
    fn admit(&self, certificate: &[u8], operation: Operation) -> Result<(Claims, Expected), Refusal> {
        let admitted = Claims::verify(certificate, &self.keys()).and_then(|claims| {
            // Whoever has the key signs by the cluster's time, so it is at least that late; within the bounds of clocks.
            let bound = self.clock.now().plus_ms(self.skew_ms_max + CLOCK_AHEAD_MS_MAX);
            if !self.clock.is_set() || claims.time <= bound {
                self.clock.hear_signed(claims.time);
            }
            // Where the time is not known it is at least as late as what was signed.
            let is_set = self.clock.is_set();
            let known = if is_set { self.clock.now() } else { self.clock.highest().max(claims.time) };
            let now = match mutants::is(Mutant::GrantByWallClock) {
                true => self.runtime.clock.now(),
                false => known,
            };
            let check = |now| {
                claims.check_grant(operation, self.cluster, self.store.service(), now, self.skew_ms_max)
            };
            check(now).inspect_err(|_| {
                if check(known).is_ok() {
                    self.runtime.note("blocks: a good certificate is refused");
                }
            })?;
            if !is_set && matches!(operation, Operation::Write | Operation::Erase) {
                let text = "the service has just started and asks the registry what time it is; try again";
                return Err(Refusal::new(Code::NotReady, text));
            }
            Ok(claims)
        });
        let claims = admitted.inspect_err(|refusal| {
            self.runtime.note(match refusal.code {
                Code::CertificateExpired => "blocks: an expired certificate",
                Code::NotReady => "blocks: a change before the time is known",
                _ => "blocks: a certificate is refused",
            });
        })?;
        let expected =
            Expected { block: claims.block, size: claims.size, crc: claims.crc, time: claims.time.0 };
        Ok((claims, expected))
    }

    /// Handles one request. What is read has its part of `answers` first.
    pub async fn handle(&self, body: Bytes, answers: &Budget) -> Result<Answer, Refusal> {
        let request = BlocksRequest::decode(body)
            .map_err(|e| Refusal::malformed(format!("decode blocks request: {e}")))?;
        let store = self.store.clone();
        match request.op {
            None => Err(Refusal::malformed("a request without an operation that this build knows")),
            Some(Op::Write(op)) => {
                let (claims, expected) = self.admit(&op.certificate, Operation::Write)?;
                let (clock, expiry) = (self.clock.clone(), claims.expiry);
                let is_granted = Box::new(move || clock.now() <= expiry);
                let turn = self.turn(expected.block).await?;
                let ends_early = mutants::is(Mutant::TurnEndsWithRequest);
                let (turn, _of_request) = if ends_early { (None, Some(turn)) } else { (Some(turn), None) };
                let written = if store.is_small(op.data.len()) {
                    self.change(Asked::Write { expected, data: op.data, is_granted }, turn).await?
                } else {
                    let bytes = op.data.len();
                    let write = move || {
                        let _turn = turn;
                        store.write(&expected, &op.data, &is_granted)
                    };
                    self.changes.run(bytes, write).await?
                };
                self.changed("write", written)?;
                Ok(self.proof(&claims, Operation::Written).into())
            }
            Some(Op::Read(op)) => {
                let (_, expected) = self.admit(&op.certificate, Operation::Read)?;
                // No block is larger than was granted, whatever is asked for.
                let bytes = op.length.min(expected.size) as usize;
                // Who waits for a disk that hangs takes no memory from those who read others.
                self.reads.refuse_stuck()?;
                let held = answers.hold(bytes).await;
                let read = self.reads.run(bytes, move || store.read(&expected, op.offset, op.length));
                let data = read.await?.inspect_err(|refusal| self.owe(expected.block, refusal))?;
                let reply = BlocksReply { data, ..BlocksReply::default() };
                Ok(Answer { reply, held })
            }
            Some(Op::Check(op)) => {
                let (_, expected) = self.admit(&op.certificate, Operation::Check)?;
                self.reads.run(VERIFY_BYTES as usize, move || store.verify(&expected)).await??;
                Ok(Answer::default())
            }
            Some(Op::Erase(op)) => {
                let (claims, expected) = self.admit(&op.certificate, Operation::Erase)?;
                let turn = self.turn(expected.block).await?;
                let erased = self.change(Asked::Erase(expected.block), Some(turn)).await?;
                self.changed("erase", erased)?;
                Ok(self.proof(&claims, Operation::Erased).into())
            }
        }
    }

    fn proof(&self, claims: &Claims, operation: Operation) -> BlocksReply {
        let now: Time = self.clock.now();
        let proof = self.keys().first().map(|key| claims.proof(operation, now).sign(key)).unwrap_or_default();
        BlocksReply { proof, ..BlocksReply::default() }
    }
}

#[cfg(test)]
mod tests;
