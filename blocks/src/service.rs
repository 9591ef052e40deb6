//! Answers requests for blocks: certificate first, then the disk.

use std::sync::Arc;

use bytes::Bytes;
use clutch_proto::{
    Refusal, Time,
    blocks::{BlocksReply, BlocksRequest, blocks_request::Op},
    certificate::{Claims, Key, Operation},
    limits::{CLOCK_AHEAD_MS_MAX, CLOCK_SKEW_MS_MAX},
    mutants::{self, Mutant},
    types::Code,
};
use clutch_runtime::{HybridClock, Runtime};
use prost::Message as _;

use crate::store::{BlockStore, Expected};

/// One block service.
pub struct BlockService {
    runtime: Runtime,
    /// The cluster's time: what those who grant go by, never a wall clock alone.
    clock: Arc<HybridClock>,
    store: Arc<BlockStore>,
    cluster: u64,
    /// Live keys, newest first.
    keys: Vec<Key>,
    /// How far apart this service's clock and those of shards may be.
    skew_ms_max: u64,
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
        BlockService { runtime, clock, store, cluster, keys, skew_ms_max: CLOCK_SKEW_MS_MAX }
    }

    /// The same with another bound for the skew of clocks: where all of a cluster has one clock, erasing need not wait
    /// for others.
    pub fn with_skew_ms_max(self, skew_ms_max: u64) -> BlockService {
        BlockService { skew_ms_max, ..self }
    }

    /// The disk's blocks.
    pub fn store(&self) -> &Arc<BlockStore> {
        &self.store
    }

    fn admit(&self, certificate: &[u8], operation: Operation) -> Result<(Claims, Expected), Refusal> {
        let admitted = Claims::verify(certificate, &self.keys).and_then(|claims| {
            // Whoever has the key signs by the cluster's time, so it is at least that late; within the bounds of clocks.
            let bound = self.clock.now().plus_ms(self.skew_ms_max + CLOCK_AHEAD_MS_MAX);
            if !self.clock.is_set() || claims.time <= bound {
                self.clock.hear(claims.time);
            }
            let now = match mutants::is(Mutant::GrantByWallClock) {
                true => self.runtime.clock.now(),
                false => self.clock.now(),
            };
            let check = |now| {
                claims.check_grant(operation, self.cluster, self.store.service(), now, self.skew_ms_max)
            };
            check(now).inspect_err(|_| {
                if check(self.clock.now()).is_ok() {
                    self.runtime.note("blocks: a good certificate is refused");
                }
            })?;
            Ok(claims)
        });
        let claims = admitted.inspect_err(|refusal| {
            self.runtime.note(match refusal.code {
                Code::CertificateExpired => "blocks: an expired certificate",
                _ => "blocks: a certificate is refused",
            });
        })?;
        let expected =
            Expected { block: claims.block, size: claims.size, crc: claims.crc, time: claims.time.0 };
        Ok((claims, expected))
    }

    /// Handles one request.
    pub async fn handle(&self, body: Bytes) -> Result<BlocksReply, Refusal> {
        let request = BlocksRequest::decode(body)
            .map_err(|e| Refusal::malformed(format!("decode blocks request: {e}")))?;
        let store = self.store.clone();
        let gone = || Refusal::new(Code::DiskFault, "the disk's work did not finish");
        match request.op {
            None => Err(Refusal::malformed("a request without an operation that this build knows")),
            Some(Op::Write(op)) => {
                let (claims, expected) = self.admit(&op.certificate, Operation::Write)?;
                let (clock, expiry) = (self.clock.clone(), claims.expiry);
                let is_granted = move || clock.now() <= expiry;
                let write = move || store.write(&expected, &op.data, &is_granted);
                self.runtime.blocking(write).await.ok_or_else(gone)??;
                Ok(self.proof(&claims, Operation::Written))
            }
            Some(Op::Read(op)) => {
                let (_, expected) = self.admit(&op.certificate, Operation::Read)?;
                let read = self.runtime.blocking(move || store.read(&expected, op.offset, op.length));
                Ok(BlocksReply { data: read.await.ok_or_else(gone)??, ..BlocksReply::default() })
            }
            Some(Op::Check(op)) => {
                let (_, expected) = self.admit(&op.certificate, Operation::Check)?;
                self.runtime.blocking(move || store.read_whole(&expected)).await.ok_or_else(gone)??;
                Ok(BlocksReply::default())
            }
            Some(Op::Erase(op)) => {
                let (claims, expected) = self.admit(&op.certificate, Operation::Erase)?;
                self.runtime.blocking(move || store.erase(expected.block)).await.ok_or_else(gone)??;
                Ok(self.proof(&claims, Operation::Erased))
            }
        }
    }

    fn proof(&self, claims: &Claims, operation: Operation) -> BlocksReply {
        let now: Time = self.clock.now();
        let proof = self.keys.first().map(|key| claims.proof(operation, now).sign(key)).unwrap_or_default();
        BlocksReply { proof, ..BlocksReply::default() }
    }
}

#[cfg(test)]
mod tests;
