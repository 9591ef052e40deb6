//! Carries out a script's operations through the client library.

use std::sync::Arc;

use bytes::Bytes;
use clutch_client::{Client, ClientError, DirCursor, FileAttributes};
use clutch_proto::{
    BlockId, InodeId, Refusal, ServiceId,
    blocks::{BlocksRequest, EraseBlock, WriteBlock, blocks_request},
    certificate::{Claims, Operation as BlockOperation},
    crc,
    session::{Request, Response, Role},
    shard::{CertifySpan, InitiateSpan, SetAttributes, StartContent, shard_reply::Reply, shard_request::Op},
    types::{Block, Code, Span, SpanShape},
};
use clutch_runtime::Lane as NetworkLane;
use prost::Message as _;

use crate::{
    history::{Data, History, bytes_of},
    names,
    script::Operation,
    sim_cluster::service_key,
};

/// What a lane needs.
#[derive(Clone)]
pub struct Worker {
    /// The client library.
    pub client: Client,
    /// Where what was seen goes.
    pub history: Arc<History>,
    /// The cluster's id, which forged certificates name.
    pub cluster: u64,
    /// Whether names of scripts stand for such that have one hash.
    pub collide: bool,
}

pub(crate) fn attributes() -> FileAttributes {
    FileAttributes { mode: 0o644, uid: 1, gid: 2, mtime: 0 }
}

fn word(result: Result<String, ClientError>) -> String {
    match result {
        Ok(text) => text,
        Err(ClientError::Refused(refusal)) => format!("refused: {:?}", refusal.code),
        Err(ClientError::Declined(refusal)) => format!("declined: {:?}", refusal.code),
        Err(ClientError::Unknown(_)) => "unknown".into(),
        Err(ClientError::Unreachable(_)) => "unreachable".into(),
        Err(ClientError::DataLost(text)) => format!("data lost: {text}"),
        Err(ClientError::Local(text)) => format!("local: {text}"),
    }
}

impl Worker {
    /// A script's path as it is in the cluster.
    pub(crate) fn path(&self, path: &str) -> Vec<u8> {
        if self.collide { names::collide(path) } else { path.as_bytes().to_vec() }
    }

    /// Carries one operation out; says in a few words what came of it.
    pub async fn perform(&self, operation: &Operation) -> String {
        word(self.attempt(operation).await)
    }

    async fn attempt(&self, operation: &Operation) -> Result<String, ClientError> {
        let client = &self.client;
        match operation {
            Operation::MakeDirectory(path) => {
                let (parent, name) = client.resolve_parent(self.path(path)).await?;
                let made = client.make_directory(parent, &name, attributes()).await?;
                Ok(format!("directory {}", made.id))
            }
            Operation::RemoveDirectory(path) => {
                let at = client.resolve(self.path(path)).await?;
                client.remove_directory(&at).await?;
                Ok("removed".into())
            }
            Operation::Create(path, bytes, salt) => {
                self.store(path, Data { salt: *salt, bytes: *bytes }, false).await
            }
            Operation::Write(path, bytes, salt) => {
                self.store(path, Data { salt: *salt, bytes: *bytes }, true).await
            }
            Operation::Symlink(path, target) => {
                let (parent, name) = client.resolve_parent(self.path(path)).await?;
                let target = Bytes::from(target.clone().into_bytes());
                let made = client.symlink(parent, &name, target, attributes(), false).await?;
                Ok(format!("link {}", made.id))
            }
            Operation::Read(path) => {
                let at = client.resolve(self.path(path)).await?;
                self.read(at.id).await
            }
            Operation::ReadRange(path, offset, bytes) => {
                let at = client.resolve(self.path(path)).await?;
                let (content, got) = client.read_range_of(at.id, 0, *offset, *bytes as usize).await?;
                self.compare((at.id, content), *offset, &got, Some(*bytes as usize));
                Ok(format!("{} bytes", got.len()))
            }
            Operation::Stat(path) => {
                let at = client.resolve(self.path(path)).await?;
                let attributes = client.stat(at.id).await?;
                Ok(format!("{} bytes, mode {:o}", attributes.size, attributes.mode))
            }
            Operation::List(path) => {
                let dir = client.resolve_directory(self.path(path)).await?;
                let mut cursor = Some(DirCursor::default());
                let mut count = 0;
                // Several pages, so that a listing meets changes between them.
                while let Some(begin) = cursor {
                    let (page, next) = client.read_dir_page(dir, &begin, 5).await?;
                    count += page.len();
                    cursor = next;
                }
                Ok(format!("{count} entries"))
            }
            Operation::History(path) => {
                let dir = client.resolve_directory(self.path(path)).await?;
                let past = client.history(dir, None).await?;
                let whole = client.whole_history(dir, None).await?;
                // Names by themselves, that are there and that are not.
                for edge in whole.iter().take(1).chain(whole.last()) {
                    client.history(dir, Some(&edge.name)).await?;
                    client.whole_history(dir, Some(&edge.name)).await?;
                }
                Ok(format!("{} past entries, {} with present ones", past.len(), whole.len()))
            }
            Operation::Move(from, to) => {
                let at = client.resolve(self.path(from)).await?;
                let (parent, name) = client.resolve_parent(self.path(to)).await?;
                client.rename(&at, parent, &name).await?;
                Ok("moved".into())
            }
            Operation::Remove(path) => {
                let at = client.resolve(self.path(path)).await?;
                client.unlink(&at).await?;
                Ok("removed".into())
            }
            Operation::ChangeMode(path, mode) => {
                let at = client.resolve(self.path(path)).await?;
                let change = SetAttributes { mode: Some(*mode), ..SetAttributes::default() };
                client.set_attributes(at.id, change).await?;
                Ok("changed".into())
            }
            Operation::Undelete(path, to) => {
                let (parent, name) = client.resolve_parent(self.path(path)).await?;
                let (_, new_name) = client.resolve_parent(self.path(to)).await?;
                let history = client.history(parent, Some(&name)).await?;
                if let Some(past) = history.iter().rev().find(|p| p.owned) {
                    let made = client.undelete(parent, past, &new_name).await?;
                    return Ok(format!("brought back {}", made.id));
                }
                let mut past = history.iter().rev().filter_map(|p| InodeId::from_wire(p.target));
                let dir = past.find(|id| id.is_directory());
                let dir = dir.ok_or_else(|| Refusal::new(Code::NotFound, "no version that was deleted"))?;
                let made = client.undelete_directory(dir, parent, &new_name).await?;
                Ok(format!("brought back directory {}", made.id))
            }
            Operation::Forge(path, kind) if *kind < 8 => self.forge(path, *kind).await,
            Operation::Patch(..)
            | Operation::Truncate(..)
            | Operation::Restore(_)
            | Operation::Contents(_)
            | Operation::Policy(..)
            | Operation::Forget(..)
            | Operation::Collect(_)
            | Operation::Scrap(..)
            | Operation::Assemble(..)
            | Operation::MoveBlock(..)
            | Operation::Recode(_)
            | Operation::Survey(_)
            | Operation::Flag(..)
            | Operation::Forge(..) => self.look_after(operation).await,
        }
    }

    async fn store(&self, path: &str, data: Data, replace: bool) -> Result<String, ClientError> {
        let (parent, name) = self.client.resolve_parent(self.path(path)).await?;
        let bytes = bytes_of(data);
        let made = self.client.write_file(parent, &name, attributes(), replace, &mut &bytes[..]).await?;
        self.history.stored(made.id, data);
        Ok(format!("file {}", made.id))
    }

    /// Reads a whole file and compares.
    pub async fn read(&self, file: InodeId) -> Result<String, ClientError> {
        let mut got = Vec::new();
        let mut sink = |bytes: Bytes| {
            got.extend_from_slice(&bytes);
            Ok(())
        };
        let (content, _) = self.client.read_version(file, 0, &mut sink).await?;
        self.compare((file, content), 0, &got, None);
        Ok(format!("{} bytes", got.len()))
    }

    fn compare(&self, (file, content): (InodeId, u64), offset: u64, got: &[u8], asked: Option<usize>) {
        let Some(expected) = self.history.bytes_of_content(file, content) else { return };
        let start = (offset as usize).min(expected.len());
        let end = asked.map_or(expected.len(), |asked| (start + asked).min(expected.len()));
        if got != &expected[start..end] {
            let differs = got.iter().zip(&expected[start..end]).position(|(a, b)| a != b);
            self.history.violation(
                "data",
                format!(
                    "file {file} was read from {offset}: {} bytes, expected {}; the first that differs is {differs:?}",
                    got.len(),
                    end - start
                ),
            );
        }
    }

    /// Does what a bad client might: each attempt must be refused.
    async fn forge(&self, path: &str, kind: u32) -> Result<String, ClientError> {
        let client = &self.client;
        let (dir, _) = client.resolve_parent(self.path(path)).await?;
        let start = Op::StartContent(StartContent { dir: dir.raw() });
        let Reply::Content(content) = client.shard(start).await? else {
            return Err(Refusal::malformed("not a content").into());
        };
        let data = bytes_of(Data { salt: 77 + u64::from(kind), bytes: 4096 });
        let crc = crc::of(&data);
        // Two mirrors: the least that has proofs to mix up.
        let shape = SpanShape { data_blocks: 1, parity_blocks: 1, stripes: 1, cell_size: 4096 };
        let initiate = |offset| InitiateSpan {
            content: content.content,
            cookie: content.cookie.clone(),
            offset,
            size: 4096,
            crc,
            shape: Some(shape),
            cell_crcs: vec![crc, crc],
            ..InitiateSpan::default()
        };
        let Reply::Span(first) = client.shard(Op::InitiateSpan(initiate(0))).await? else {
            return Err(Refusal::malformed("not a span").into());
        };
        if kind < 4 {
            let (what, taken) = self.forge_block(&first, &data, kind).await?;
            if taken {
                self.history.violation("certificates", format!("a block service took {what}"));
            }
            return Ok(format!("tried {what}"));
        }
        let mut proofs = Vec::new();
        for block in &first.blocks {
            let op = WriteBlock { certificate: block.certificate.clone(), data: data.clone().into() };
            proofs.push(self.blocks(block, blocks_request::Op::Write(op)).await?);
        }
        let (span, proofs, what) = match kind {
            4 => {
                // The second span is never written; its proofs are those of the first.
                let Reply::Span(second) = client.shard(Op::InitiateSpan(initiate(0))).await? else {
                    return Err(Refusal::malformed("not a span").into());
                };
                (second, proofs, "proofs of other blocks")
            }
            5 => (first.clone(), vec![proofs[0].clone(), proofs[0].clone()], "one proof twice"),
            6 => {
                let mut flipped = proofs[1].to_vec();
                if let Some(last) = flipped.last_mut() {
                    *last ^= 1;
                }
                (first.clone(), vec![proofs[0].clone(), flipped.into()], "a proof with a flipped bit")
            }
            _ => {
                let grants = first.blocks.iter().map(|b| b.certificate.clone()).collect();
                (first.clone(), grants, "grants instead of proofs")
            }
        };
        let certify = CertifySpan {
            content: content.content,
            cookie: content.cookie.clone(),
            span_id: span.span_id,
            proofs,
        };
        match client.shard(Op::CertifySpan(certify)).await {
            Ok(_) => {
                self.history.violation("certificates", format!("a shard took {what}"));
                Ok(format!("{what} were taken"))
            }
            Err(error) => Err(error),
        }
    }

    async fn forge_block(
        &self,
        span: &Span,
        data: &[u8],
        kind: u32,
    ) -> Result<(&'static str, bool), ClientError> {
        let block = &span.blocks[0];
        let mut other = data.to_vec();
        other[100] ^= 0x40;
        let (what, op) = match kind {
            0 => {
                let op = WriteBlock { certificate: block.certificate.clone(), data: other.into() };
                ("other data under a good certificate", blocks_request::Op::Write(op))
            }
            1 => {
                // In the signature: nothing else is wrong with it.
                let mut certificate = block.certificate.to_vec();
                if let Some(last) = certificate.last_mut() {
                    *last ^= 4;
                }
                let op = WriteBlock { certificate: certificate.into(), data: data.to_vec().into() };
                ("a certificate with a flipped bit", blocks_request::Op::Write(op))
            }
            2 => {
                let op = EraseBlock { certificate: block.certificate.clone() };
                ("an erase under a certificate for writing", blocks_request::Op::Erase(op))
            }
            _ => {
                let claims = Claims {
                    operation: BlockOperation::Write,
                    cluster: self.cluster,
                    service: ServiceId(block.service_id),
                    block: BlockId(block.block_id),
                    size: 4096,
                    crc: crc::of(data),
                    time: self.client.runtime().clock.now(),
                    expiry: self.client.runtime().clock.now().plus_ms(60_000),
                };
                let mut key = service_key(block.service_id);
                key.secret[5] ^= 1;
                let op = WriteBlock { certificate: claims.sign(&key), data: data.to_vec().into() };
                ("a certificate under another key", blocks_request::Op::Write(op))
            }
        };
        match self.blocks(block, op).await {
            Ok(_) => Ok((what, true)),
            Err(ClientError::Refused(_)) => Ok((what, false)),
            Err(error) => Err(error),
        }
    }

    /// One request to a block service; its proof.
    async fn blocks(&self, block: &Block, op: blocks_request::Op) -> Result<Bytes, ClientError> {
        let runtime = self.client.runtime();
        let request = Request {
            role: Role::Blocks as i32,
            number: block.service_id,
            body: BlocksRequest { op: Some(op) }.encode_to_vec().into(),
            ..Request::default()
        };
        let limit = std::time::Duration::from_millis(500);
        let address = block.address.as_str().into();
        let answer =
            runtime.network.call(&address, NetworkLane::Bulk, request.encode_to_vec().into(), 0, limit).await;
        let answer = answer.map_err(|e| ClientError::Unreachable(e.to_string()))?;
        let response = Response::decode(answer).map_err(|e| Refusal::malformed(e.to_string()))?;
        match response.error {
            Some(error) => Err(Refusal::from_wire(error).into()),
            None => {
                let reply = clutch_proto::blocks::BlocksReply::decode(response.body)
                    .map_err(|e| Refusal::malformed(e.to_string()))?;
                Ok(reply.proof)
            }
        }
    }
}
