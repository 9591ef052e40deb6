//! Operations of a script that look after what is stored: other contents, policies, collection, moving blocks.

use clutch_client::{ClientError, Draft, Moving, Resolved};
use clutch_client_maintenance::collector::{CollectOptions, collect};
use clutch_proto::{
    ContentId, InodeId, Refusal,
    cdc::{ListTransactions, cdc_request},
    registry::{SetServiceFlags, registry_request},
    shard::{RemoveSpan, SwapBlocks, SwapSpans, shard_request::Op},
    types::{Attributes, Code, DirectoryPolicy, PolicyPart, SnapshotPolicy, extent::Source},
};

use crate::{
    history::{Data, bytes_of},
    script::Operation,
    workload::{Worker, attributes},
};

fn not_found(what: &str) -> ClientError {
    Refusal::new(Code::NotFound, what).into()
}

impl Worker {
    /// Carries out what [`Worker::perform`] does not do itself.
    pub(crate) async fn look_after(&self, operation: &Operation) -> Result<String, ClientError> {
        let client = &self.client;
        match operation {
            Operation::Patch(path, offset, bytes, salt) => {
                self.patch(path, *offset, Data { salt: *salt, bytes: *bytes }).await
            }
            Operation::Truncate(path, size) => self.truncate(path, *size).await,
            Operation::Restore(path) => {
                let at = client.resolve(self.path(path)).await?;
                let before = client.stat(at.id).await?;
                let past = client.content_history(at.id).await?;
                let past = past.last().ok_or_else(|| not_found("no past content"))?;
                let after = client.restore_content(past, before.content, at.parent).await?;
                Ok(format!("content {:x}", after.content))
            }
            Operation::Contents(path) => {
                let at = client.resolve(self.path(path)).await?;
                Ok(format!("{} past contents", client.content_history(at.id).await?.len()))
            }
            Operation::Policy(path, age_ms, versions) => {
                let dir = client.resolve_directory(self.path(path)).await?;
                let snapshot = SnapshotPolicy { age_ms: *age_ms, versions: *versions };
                let is_set = age_ms.is_some() || versions.is_some();
                let policy =
                    DirectoryPolicy { snapshot: is_set.then_some(snapshot), ..DirectoryPolicy::default() };
                let inherit = if is_set { &[][..] } else { &[PolicyPart::Snapshot] };
                client.set_policy(dir, policy, inherit).await?;
                Ok("set".into())
            }
            Operation::Forget(path, age_ms) => {
                let (dir, name) = client.resolve_parent(self.path(path)).await?;
                let history = client.history(dir, Some(&name)).await?;
                let past = history.last().ok_or_else(|| not_found("no past entry"))?;
                let policy = SnapshotPolicy { age_ms: Some(*age_ms), versions: None };
                client.forget_edge(dir, past, policy).await?;
                Ok(format!("forgot {:x}", past.target))
            }
            Operation::Collect(eager) => {
                let options = CollectOptions { eager: *eager, concurrency: 4, ..CollectOptions::default() };
                let done = collect(client, options).await?;
                Ok(format!("{done:?}"))
            }
            Operation::Scrap(path, bytes, salt) => {
                let (dir, _) = client.resolve_parent(self.path(path)).await?;
                let draft = self.draft(dir, bytes_of(Data { salt: *salt, bytes: *bytes })).await?;
                client.scrap(&draft).await?;
                Ok(format!("scrapped {:x}", draft.content()))
            }
            Operation::Assemble(path, bytes, salt) => {
                self.assemble(path, Data { salt: *salt, bytes: *bytes }).await
            }
            Operation::MoveBlock(path, index) => self.move_block(path, *index).await,
            Operation::Recode(path) => self.recode(path).await,
            Operation::Survey(disk) => self.survey(*disk).await,
            Operation::Flag(disk, flags) => {
                let service_id = self.service(*disk).await?;
                let op = registry_request::Op::SetServiceFlags(SetServiceFlags { service_id, flags: *flags });
                client.registry(op).await?;
                Ok("set".into())
            }
            Operation::Forge(path, kind) => self.forge_exchange(path, *kind).await,
            Operation::MakeDirectory(_)
            | Operation::RemoveDirectory(_)
            | Operation::Create(..)
            | Operation::Write(..)
            | Operation::Symlink(..)
            | Operation::Read(_)
            | Operation::ReadRange(..)
            | Operation::Stat(_)
            | Operation::List(_)
            | Operation::History(_)
            | Operation::Move(..)
            | Operation::Remove(_)
            | Operation::ChangeMode(..)
            | Operation::Undelete(..) => {
                Err(Refusal::malformed(format!("{operation} is done elsewhere")).into())
            }
        }
    }

    /// A content with these bytes, not published.
    async fn draft(&self, home: InodeId, bytes: Vec<u8>) -> Result<Draft, ClientError> {
        let policy = self.client.write_policy(home).await?;
        let mut draft = self.client.start_draft(home).await?;
        self.client.append(&mut draft, bytes, &policy).await?;
        Ok(draft)
    }

    /// Publishes what `change` makes of a file's bytes, once it is written.
    async fn publish(
        &self,
        at: &Resolved,
        before: Attributes,
        draft: Option<Draft>,
        change: impl FnOnce(&mut Vec<u8>),
    ) -> Result<String, ClientError> {
        if let Some(draft) = &draft {
            // Whoever reads the content must find it known, so this comes before it can be seen.
            let expected = self.history.bytes_of_content(at.id, before.content).map(|bytes| {
                let mut bytes = bytes.to_vec();
                change(&mut bytes);
                bytes
            });
            self.history.content(draft.content(), expected);
        }
        let after = self.client.publish_over(at, before, draft).await?;
        Ok(format!("content {:x} of {} bytes", after.content, after.size))
    }

    async fn patch(&self, path: &str, offset: u64, data: Data) -> Result<String, ClientError> {
        let at = self.client.resolve(self.path(path)).await?;
        let bytes = bytes_of(data);
        let (before, draft) = self.client.draft_range(&at, offset, false, &mut &bytes[..]).await?;
        let (begin, end) = (offset as usize, offset as usize + bytes.len());
        let change = |all: &mut Vec<u8>| {
            all.resize(all.len().max(end), 0);
            all[begin..end].copy_from_slice(&bytes);
        };
        self.publish(&at, before, draft, change).await
    }

    async fn truncate(&self, path: &str, size: u64) -> Result<String, ClientError> {
        let at = self.client.resolve(self.path(path)).await?;
        let (before, draft) = self.client.draft_truncated(&at, size).await?;
        self.publish(&at, before, Some(draft), |all| all.resize(size as usize, 0)).await
    }

    /// Both halves are written at the same time, each as a content of its own.
    async fn assemble(&self, path: &str, data: Data) -> Result<String, ClientError> {
        let client = &self.client;
        let (dir, name) = client.resolve_parent(self.path(path)).await?;
        let bytes = bytes_of(data);
        let half = bytes.len() / 2;
        let (first, second) = futures_util::future::join(
            self.draft(dir, bytes[..half].to_vec()),
            self.draft(dir, bytes[half..].to_vec()),
        )
        .await;
        let (mut first, mut second) = (first?, second?);
        client.append_span_of(&mut first, &mut second).await?;
        client.scrap(&second).await?;
        self.history.content(first.content(), Some(bytes));
        let made = client.link(first, dir, &name, attributes(), true).await?;
        Ok(format!("file {}", made.id))
    }

    /// Tries, with bytes that fill all blocks of any code, to exchange what does not hold the same bytes, or to have a span forgotten whose blocks are not erased.
    async fn forge_exchange(&self, path: &str, kind: u32) -> Result<String, ClientError> {
        let client = &self.client;
        let (dir, _) = client.resolve_parent(self.path(path)).await?;
        let (a, b) = (
            self.draft(dir, bytes_of(Data { salt: 81, bytes: 16_384 })).await?,
            self.draft(dir, bytes_of(Data { salt: 82, bytes: 16_384 })).await?,
        );
        let (span_a, span_b) = (a.last_span().unwrap_or_default(), b.last_span().unwrap_or_default());
        let block_of = |span: u64| async move {
            let mut after = bytes::Bytes::new();
            let services = client.map().await?.services.clone();
            for service in services {
                loop {
                    let (page, next) = client.visit_blocks(service.service_id, after).await?;
                    if let Some(held) = page.iter().find(|held| held.span_id == span) {
                        return Ok(held.block_id);
                    }
                    after = next;
                    if after.is_empty() {
                        break;
                    }
                }
            }
            Err(not_found("the span has no blocks"))
        };
        let (what, op) = match kind {
            8 => {
                let (block_a, block_b) = (block_of(span_a).await?, block_of(span_b).await?);
                (
                    "an exchange of other blocks",
                    Op::SwapBlocks(SwapBlocks { span_a, block_a, span_b, block_b }),
                )
            }
            9 => {
                let swap = SwapSpans {
                    content_a: a.content(),
                    offset_a: 0,
                    span_a,
                    content_b: b.content(),
                    offset_b: 0,
                    span_b,
                };
                ("an exchange of other bytes", Op::SwapSpans(swap))
            }
            _ => {
                client.scrap(&a).await?;
                client.collect_content(ContentId(a.content())).await?;
                let blocks = client.map().await?.default_policy.unwrap_or_default();
                let proofs = vec![bytes::Bytes::new(); (blocks.data_blocks + blocks.parity_blocks) as usize];
                ("a span whose blocks are there", Op::RemoveSpan(RemoveSpan { span_id: span_a, proofs }))
            }
        };
        match client.shard(op).await {
            Ok(_) => {
                self.history.violation("certificates", format!("a shard took {what}"));
                Ok(format!("{what} was taken"))
            }
            Err(error) => Err(error),
        }
    }

    async fn move_block(&self, path: &str, index: u32) -> Result<String, ClientError> {
        let at = self.client.resolve(self.path(path)).await?;
        let layout = self.client.layout(at.id, 0, 0).await?;
        let span = layout.spans.first().ok_or_else(|| not_found("the file has no blocks"))?;
        let index = index as usize % span.blocks.len().max(1);
        let moved = self.client.move_block(at.id, span, index, Moving::default()).await?;
        moved.ok_or_else(|| not_found("the block was moved meanwhile"))?;
        Ok(format!("moved block {index} of span {:x}", span.span_id))
    }

    async fn recode(&self, path: &str) -> Result<String, ClientError> {
        let at = self.client.resolve(self.path(path)).await?;
        let layout = self.client.layout(at.id, 0, 0).await?;
        let policy = self.client.write_policy(at.parent).await?;
        let whole = layout.extents.iter().find(|extent| match &extent.source {
            Some(Source::Span(range)) => {
                layout.spans.iter().any(|s| s.span_id == range.span_id && u64::from(s.size) == extent.length)
            }
            _ => false,
        });
        let extent = whole.ok_or_else(|| not_found("the file has no whole span"))?;
        self.client.recode(at.id, ContentId(layout.content), extent, &policy).await?;
        Ok(format!("wrote {} bytes anew", extent.length))
    }

    /// The block service of a disk.
    async fn service(&self, disk: u32) -> Result<u64, ClientError> {
        let map = self.client.map().await?;
        let service = map.services.get(disk as usize % map.services.len().max(1));
        Ok(service.ok_or_else(|| not_found("no disks"))?.service_id)
    }

    async fn survey(&self, disk: u32) -> Result<String, ClientError> {
        let (mut inodes, mut blocks) = (0, 0);
        for kind in 1..=3 {
            let mut after = bytes::Bytes::new();
            loop {
                let (page, next) = self.client.visit_inodes(kind, after).await?;
                inodes += page.len();
                if next.is_empty() {
                    break;
                }
                after = next;
            }
        }
        let service = self.service(disk).await?;
        let mut after = bytes::Bytes::new();
        loop {
            let (page, next) = self.client.visit_blocks(service, after).await?;
            blocks += page.len();
            if next.is_empty() {
                break;
            }
            after = next;
        }
        self.client.visit_spans(service, bytes::Bytes::new()).await?;
        let listed = self.client.cdc(cdc_request::Op::ListTransactions(ListTransactions {})).await?;
        Ok(format!("{inodes} inodes, {blocks} blocks, {} in flight", listed.transactions.len()))
    }
}
