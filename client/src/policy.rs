//! What new bytes get: the policies of their directory, or of the nearest one above that says something.

use std::time::Duration;

use clutch_proto::{
    InodeId, Refusal,
    limits::{INLINE_FILE_BYTES_MAX, PATH_DEPTH_MAX, SNAPSHOT_AGE_MS_DEFAULT},
    shard::{SetPolicy, shard_request::Op},
    types::{Attributes, Code, DirectoryPolicy, PolicyPart, SnapshotPolicy},
};

use crate::{
    error::ClientError,
    files::attributes_of,
    rpc::{Client, lock},
};

/// How long a policy is believed.
const POLICY_LIFETIME: Duration = Duration::from_secs(5);
/// How long the members of a shard's log may take to say whether they know of what is new in a policy.
const LEVEL_PATIENCE: Duration = Duration::from_secs(3);
/// Pause before the shard is asked again.
const LEVEL_PAUSE: Duration = Duration::from_millis(50);
/// Directories whose policies are remembered.
const POLICIES_MAX: usize = 4096;
const SPAN_BYTES_DEFAULT: u32 = 8 << 20;
const CELL_BYTES_DEFAULT: u32 = 1 << 20;
/// Spans of up to so many bytes are mirrored where no directory says otherwise: cut into the blocks of a code they would take twice the
/// files and syncs, and not less space.
pub const MIRROR_BYTES_DEFAULT: u32 = 16 << 10;
/// Files of up to so many bytes lie in the metadata where no directory says otherwise: more than half of a source tree's, with few of
/// its bytes.
pub const INLINE_FILE_BYTES_DEFAULT: u32 = 4 << 10;

/// How bytes become spans.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WritePolicy {
    /// Sizes, data and parity blocks; in the order of the sizes.
    classes: Vec<(u32, u32, u32)>,
    /// Sizes of blocks and their storage class; in the order of the sizes.
    storage: Vec<(u32, u32)>,
    /// About the size of a cell.
    pub(crate) cell_size: u32,
    /// Files of up to so many bytes lie in the metadata.
    pub(crate) inline_bytes: usize,
}

impl WritePolicy {
    /// One code for everything.
    pub fn plain(span_bytes: u32, data_blocks: u32, parity_blocks: u32) -> WritePolicy {
        let classes = vec![(span_bytes.max(1), data_blocks.max(1), parity_blocks)];
        WritePolicy { classes, storage: Vec::new(), cell_size: CELL_BYTES_DEFAULT, inline_bytes: 0 }
    }

    /// The same, with copies of one block, as many as are lost with any disks that the code bears, for spans of up to a size.
    fn with_mirrors(mut self, up_to: u32) -> WritePolicy {
        if let [(size_max, data, parity)] = self.classes[..]
            && data > 1
            && parity > 0
            && (1..size_max).contains(&up_to)
        {
            self.classes.insert(0, (up_to, 1, parity));
        }
        self
    }

    /// The codes by size: up to so many bytes, data and parity blocks; in the order of the sizes.
    pub fn classes(&self) -> &[(u32, u32, u32)] {
        &self.classes
    }

    /// Data and parity blocks of a span of that size.
    pub fn code_of(&self, size: u32) -> (u32, u32) {
        let class = self.classes.iter().find(|c| size <= c.0).or(self.classes.last());
        class.map_or((1, 0), |c| (c.1, c.2))
    }

    /// Files are cut into spans of this size.
    pub fn span_bytes(&self) -> usize {
        self.classes.last().map_or(SPAN_BYTES_DEFAULT, |c| c.0) as usize
    }

    /// About the size of a cell.
    pub fn cell_bytes(&self) -> u32 {
        self.cell_size
    }

    /// Files of up to so many bytes lie in the metadata.
    pub fn inline_bytes(&self) -> u32 {
        self.inline_bytes as u32
    }

    /// Where blocks of that size go.
    pub fn storage_class_of(&self, block_bytes: u32) -> u32 {
        self.storage.iter().rev().find(|s| block_bytes >= s.0).map_or(0, |s| s.1)
    }
}

/// Fills what is not set from above.
fn inherit(own: DirectoryPolicy, above: &DirectoryPolicy) -> DirectoryPolicy {
    DirectoryPolicy {
        snapshot: own.snapshot.or(above.snapshot),
        spans: own.spans.or_else(|| above.spans.clone()),
        storage: own.storage.or_else(|| above.storage.clone()),
        stripe: own.stripe.or(above.stripe),
        inline: own.inline.or(above.inline),
    }
}

fn is_whole(policy: &DirectoryPolicy) -> bool {
    let DirectoryPolicy { snapshot, spans, storage, stripe, inline } = policy;
    snapshot.is_some() && spans.is_some() && storage.is_some() && stripe.is_some() && inline.is_some()
}

impl Client {
    /// The policies that hold in a directory, inherited parts among them; what nobody sets is not there.
    pub async fn effective_policy(&self, dir: InodeId) -> Result<DirectoryPolicy, ClientError> {
        let now = self.inner.runtime.clock.monotonic();
        self.policy_since(dir, now.saturating_sub(POLICY_LIFETIME)).await
    }

    /// The same, with nothing in it that was read before a moment of the client's clock.
    async fn policy_since(&self, dir: InodeId, not_before: Duration) -> Result<DirectoryPolicy, ClientError> {
        let mut read_at = self.inner.runtime.clock.monotonic();
        let mut chain: Vec<(InodeId, DirectoryPolicy)> = Vec::new();
        let mut policy = DirectoryPolicy::default();
        let mut at = dir;
        for _ in 0..=PATH_DEPTH_MAX {
            let known = lock(&self.inner.policies).known.get(&at).cloned();
            if let Some((known, since)) = known.filter(|(_, since)| *since >= not_before) {
                policy = known;
                // What is derived from something old is as old.
                read_at = read_at.min(since);
                break;
            }
            let attributes = match self.stat(at).await {
                Ok(attributes) => attributes,
                // A parent that is gone for good says nothing; what holds above everything holds here.
                Err(error) if error.is_not_found() && at != dir => {
                    at = InodeId::ROOT;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let own = attributes.policy.clone().unwrap_or_default();
            let ends = is_whole(&own) || at == InodeId::ROOT;
            chain.push((at, own));
            match parent_of(&attributes) {
                Some(parent) if !ends => at = parent,
                _ => break,
            }
        }
        let mut cache = lock(&self.inner.policies);
        if cache.known.len() + chain.len() > POLICIES_MAX {
            cache.known.clear();
        }
        for (id, own) in chain.into_iter().rev() {
            policy = inherit(own, &policy);
            cache.known.insert(id, (policy.clone(), read_at));
        }
        Ok(policy)
    }

    /// How bytes of new files in a directory become spans.
    pub async fn write_policy(&self, dir: InodeId) -> Result<WritePolicy, ClientError> {
        let found = self.effective_policy(dir).await?;
        let default = self.map().await?.default_policy.unwrap_or_default();
        let span_bytes = if default.span_size_max == 0 { SPAN_BYTES_DEFAULT } else { default.span_size_max };
        let mut policy = WritePolicy::plain(span_bytes, default.data_blocks, default.parity_blocks)
            .with_mirrors(self.inner.options.mirror_bytes);
        if let Some(spans) = found.spans {
            policy.classes =
                spans.classes.iter().map(|c| (c.size_max, c.data_blocks, c.parity_blocks)).collect();
        }
        if let Some(storage) = found.storage {
            policy.storage = storage.classes.iter().map(|c| (c.size_min, c.storage_class)).collect();
        }
        policy.cell_size = found.stripe.map_or(CELL_BYTES_DEFAULT, |s| s.cell_size);
        let inline = found.inline.map_or(self.inner.options.inline_bytes, |inline| inline.size_max);
        // What is not inline after all fits into the first span.
        policy.inline_bytes = (inline as usize).min(INLINE_FILE_BYTES_MAX).min(policy.span_bytes() - 1);
        Ok(policy)
    }

    /// How long old versions in a directory are kept.
    pub async fn snapshot_policy(&self, dir: InodeId) -> Result<SnapshotPolicy, ClientError> {
        let default = SnapshotPolicy { age_ms: Some(SNAPSHOT_AGE_MS_DEFAULT), versions: None };
        Ok(self.effective_policy(dir).await?.snapshot.unwrap_or(default))
    }

    /// The same, as it is now and not as it was a moment ago: before something is forgotten for good.
    pub async fn snapshot_policy_now(&self, dir: InodeId) -> Result<SnapshotPolicy, ClientError> {
        let default = SnapshotPolicy { age_ms: Some(SNAPSHOT_AGE_MS_DEFAULT), versions: None };
        let now = self.inner.runtime.clock.monotonic();
        Ok(self.policy_since(dir, now).await?.snapshot.unwrap_or(default))
    }

    /// Sets parts of a directory's own policies and lets others be inherited again. Other clients follow within seconds.
    pub async fn set_policy(
        &self,
        dir: InodeId,
        policy: DirectoryPolicy,
        inherit: &[PolicyPart],
    ) -> Result<Attributes, ClientError> {
        let (inherit, wanted) = (inherit.iter().map(|part| *part as i32).collect(), policy.inline);
        let op = Op::SetPolicy(SetPolicy { id: dir.raw(), policy: Some(policy), inherit });
        let clock = &self.inner.runtime.clock;
        let end = clock.monotonic() + LEVEL_PATIENCE;
        let reply = loop {
            match self.shard(op.clone()).await {
                // The shard's members are being asked whether they know of it.
                Err(error) if error.code() == Some(Code::NotAgreed) && clock.monotonic() < end => {
                    clock.sleep(LEVEL_PAUSE).await;
                }
                reply => break reply,
            }
        };
        // Of this directory and of all that inherit from it.
        lock(&self.inner.policies).known.clear();
        let attributes = attributes_of(reply?)?;
        let is_set = attributes.policy.as_ref().and_then(|policy| policy.inline) == wanted;
        if wanted.is_some() && !is_set {
            let text = "the build that leads the shard's log does not know inline data; the rest of the policy is set";
            return Err(Refusal::new(Code::Unsupported, text).into());
        }
        Ok(attributes)
    }
}

/// The directory above, or the one that was above before a directory was removed.
fn parent_of(attributes: &Attributes) -> Option<InodeId> {
    InodeId::from_wire(if attributes.parent == 0 { attributes.former_parent } else { attributes.parent })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_found_by_size() {
        let policy = WritePolicy {
            classes: vec![(65_536, 1, 2), (1 << 20, 4, 2), (8 << 20, 10, 4)],
            storage: vec![(65_536, 1), (1 << 20, 2)],
            cell_size: 4096,
            inline_bytes: 0,
        };
        assert_eq!(policy.code_of(1), (1, 2));
        assert_eq!(policy.code_of(65_537), (4, 2));
        assert_eq!(policy.code_of(100 << 20), (10, 4));
        assert_eq!([1, 65_536, 1 << 19, 4 << 20].map(|b| policy.storage_class_of(b)), [0, 1, 1, 2]);
        assert_eq!(policy.span_bytes(), 8 << 20);
    }

    #[test]
    fn small_spans_are_mirrored_where_a_code_has_parity() {
        let codes = |data, parity| {
            let policy = WritePolicy::plain(8 << 20, data, parity).with_mirrors(MIRROR_BYTES_DEFAULT);
            [16 << 10, (16 << 10) + 1].map(|size| policy.code_of(size))
        };
        assert_eq!(codes(4, 2), [(1, 2), (4, 2)]);
        assert_eq!(codes(10, 4), [(1, 4), (10, 4)]);
        for (data, parity) in [(1, 1), (1, 2), (4, 0)] {
            assert_eq!(codes(data, parity), [(data, parity); 2]);
        }
        assert_eq!(WritePolicy::plain(4096, 4, 2).with_mirrors(MIRROR_BYTES_DEFAULT).code_of(1), (4, 2));
    }

    #[test]
    fn what_is_set_below_wins() {
        let snapshot = |age_ms| Some(SnapshotPolicy { age_ms: Some(age_ms), versions: None });
        let above = DirectoryPolicy { snapshot: snapshot(1), ..DirectoryPolicy::default() };
        assert_eq!(inherit(DirectoryPolicy::default(), &above).snapshot, snapshot(1));
        let own = DirectoryPolicy { snapshot: snapshot(2), ..DirectoryPolicy::default() };
        assert_eq!(inherit(own, &above).snapshot, snapshot(2));
    }
}
