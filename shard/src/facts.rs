//! What a shard's shell knows and its log does not: the services' keys and addresses.

use std::{borrow::Cow, collections::BTreeMap, fmt, sync::Arc};

use clutch_proto::{
    BlockId, ServiceId, Time,
    certificate::{Claims, Key, Operation},
    limits::{
        CERTIFICATE_LIFETIME_MS, LAYOUT_EXTENTS_MAX, READDIR_ENTRIES_MAX, TRANSIENT_LIFETIME_MS,
        VISIT_ROWS_MAX, VISIT_SPANS_MAX,
    },
    mutants::{self, Mutant},
    shard::{ShardReply, shard_reply::Reply},
    types::{Block, BlockService, Span},
};

/// The keys of block services: the one that signs first, then others that are believed, too. A service that was there when its cluster was
/// made has keys of its own, which count as long as the cluster's first key is believed; all other keys follow from the cluster's.
#[derive(Clone, Default)]
pub struct Keyring {
    keys: BTreeMap<ServiceId, Vec<Key>>,
    cluster_keys: Vec<Key>,
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyring").field("keys", &self.keys).finish_non_exhaustive()
    }
}

impl Keyring {
    /// Adds a key.
    pub fn add(&mut self, service: ServiceId, key: Key) {
        let keys = self.keys.entry(service).or_default();
        keys.retain(|k| k.epoch != key.epoch);
        keys.push(key);
        keys.sort_by_key(|k| std::cmp::Reverse(k.epoch));
        keys.truncate(2);
    }

    /// The same, for a cluster whose nodes share these keys, of which they use the first.
    #[must_use]
    pub fn with_cluster_keys(&self, cluster_keys: &[Key]) -> Keyring {
        Keyring { keys: self.keys.clone(), cluster_keys: cluster_keys.to_vec() }
    }

    /// The live keys of a service, the one that signs first.
    pub fn of(&self, service: ServiceId) -> Cow<'_, [Key]> {
        let own = self.keys.get(&service);
        if let (Some(own), [] | [Key { epoch: 1, .. }]) = (own, &self.cluster_keys[..]) {
            return Cow::Borrowed(own.as_slice());
        }
        let mut all = Vec::new();
        for key in &self.cluster_keys {
            match own {
                Some(own) if key.epoch == 1 => all.extend_from_slice(own),
                _ => all.push(key.of_service(service)),
            }
        }
        Cow::Owned(all)
    }
}

/// How long what clients are given is good. Frozen into the entries that give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetimes {
    /// A permission to write a block; at most [`CERTIFICATE_LIFETIME_MS`].
    pub grant_ms: u64,
    /// An unpublished content that nobody uses.
    pub transient_ms: u64,
}

impl Default for Lifetimes {
    fn default() -> Lifetimes {
        Lifetimes { grant_ms: CERTIFICATE_LIFETIME_MS, transient_ms: TRANSIENT_LIFETIME_MS }
    }
}

/// How much one answer of a reading request holds at most; who wants more asks for the next page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    /// Entries of a directory, or of its history.
    pub entries: usize,
    /// Extents of a layout.
    pub extents: usize,
    /// Rows of a visit.
    pub rows: usize,
    /// Spans of a visit.
    pub spans: usize,
}

impl Default for Pages {
    fn default() -> Pages {
        Pages {
            entries: READDIR_ENTRIES_MAX,
            extents: LAYOUT_EXTENTS_MAX,
            rows: VISIT_ROWS_MAX,
            spans: VISIT_SPANS_MAX,
        }
    }
}

impl Pages {
    /// Pages of so many, whatever they hold: small ones for tests.
    pub fn of(count: usize) -> Pages {
        Pages { entries: count, extents: count, rows: count, spans: count }
    }
}

/// One moment of it; the shell replaces it when something is new.
#[derive(Clone, Default)]
pub struct ShardFacts {
    /// The cluster that certificates name.
    pub cluster: u64,
    /// How long grants and unpublished contents are good.
    pub lifetimes: Lifetimes,
    /// How much answers hold.
    pub pages: Pages,
    /// What signs certificates.
    pub keyring: Arc<Keyring>,
    /// The registry's newest list; placement and addresses come from it.
    pub services: Arc<Vec<BlockService>>,
}

impl ShardFacts {
    /// Whether a proof says that a block was written as its span wants it.
    pub(crate) fn proves_written(&self, proof: &[u8], block: &Block, size: u32) -> bool {
        let service = ServiceId(block.service_id);
        Claims::verify(proof, &self.keyring.of(service)).is_ok_and(|claims| {
            claims.operation == Operation::Written
                && claims.cluster == self.cluster
                && claims.service == service
                && (mutants::is(Mutant::CrcNotBound)
                    || claims.block == BlockId(block.block_id)
                        && (claims.size, claims.crc) == (size, block.crc))
        })
    }

    /// Whether a proof says that a block was erased.
    pub(crate) fn proves_erased(&self, proof: &[u8], block: &Block) -> bool {
        let service = ServiceId(block.service_id);
        Claims::verify(proof, &self.keyring.of(service)).is_ok_and(|claims| {
            claims.operation == Operation::Erased
                && claims.cluster == self.cluster
                && claims.service == service
                && claims.block == BlockId(block.block_id)
        })
    }

    /// Adds certificates and addresses to the blocks of a reply.
    pub(crate) fn sign(&self, reply: &mut ShardReply, now: &dyn Fn() -> Time) {
        match &mut reply.reply {
            Some(Reply::Span(span)) if !span.certified => self.grant(span, Operation::Write, now()),
            Some(Reply::Layout(layout)) => {
                let now = now();
                layout.spans.iter_mut().for_each(|s| self.grant(s, Operation::Read, now))
            }
            Some(Reply::VisitSpans(page)) => {
                let now = now();
                page.spans.iter_mut().for_each(|s| self.grant(s, Operation::Read, now))
            }
            Some(Reply::VisitDeadSpans(dead)) => {
                let now = now();
                dead.spans.iter_mut().for_each(|s| self.grant(s, Operation::Erase, now))
            }
            _ => {}
        }
    }

    fn grant(&self, span: &mut Span, operation: Operation, now: Time) {
        let size = span.shape.map_or(0, |s| s.block_bytes());
        let lifetime_end = now.plus_ms(CERTIFICATE_LIFETIME_MS);
        let expiry = match operation {
            // However often a grant is given again, it ends when the span's grants end.
            Operation::Write if !mutants::is(Mutant::EraseBeforeGrantsEnd) => {
                lifetime_end.min(Time(span.granted_until))
            }
            // An erase names the end of the grants for writing: no block comes back after it.
            Operation::Erase => Time(span.granted_until),
            _ => lifetime_end,
        };
        for block in &mut span.blocks {
            let service = ServiceId(block.service_id);
            if let Some(known) = self.services.iter().find(|s| s.service_id == service.0) {
                block.address = known.address.clone();
            }
            // A service whose key is not here cannot be reached by clients until it is.
            if let Some(key) = self.keyring.of(service).first() {
                let claims = Claims {
                    operation,
                    cluster: self.cluster,
                    service,
                    block: BlockId(block.block_id),
                    size,
                    crc: block.crc,
                    time: now,
                    expiry,
                };
                block.certificate = claims.sign(key);
            }
        }
    }
}
