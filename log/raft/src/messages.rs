//! The bodies of requests and answers.

use bytes::Bytes;
use clutch_log::Manifest;
use openraft::{
    SnapshotMeta as Meta,
    raft::{AppendEntriesRequest, StreamAppendError, StreamAppendResult, VoteRequest, VoteResponse},
};

use crate::{
    codec::{Builder, Malformed, Reader},
    types::{SnapshotMeta, TypeConfig, Vote},
};

pub(crate) fn append(request: &AppendEntriesRequest<TypeConfig>) -> Bytes {
    let mut to = Builder::default();
    to.vote(&request.vote).id(request.prev_log_id.as_ref()).id(request.leader_commit.as_ref());
    to.u32(request.entries.len());
    request.entries.iter().for_each(|entry| {
        to.entry(entry);
    });
    to.done()
}

pub(crate) fn read_append(body: Bytes) -> Result<AppendEntriesRequest<TypeConfig>, Malformed> {
    let mut from = Reader(body);
    let (vote, prev_log_id, leader_commit) = (from.vote()?, from.id()?, from.id()?);
    let entries = (0..from.u32()?).map(|_| from.entry()).collect::<Result<Vec<_>, _>>()?;
    from.end()?;
    let before = prev_log_id.map(|id| id.index);
    let follow = |(at, entry): (usize, &crate::types::Entry)| {
        entry.log_id.index == before.map_or(0, |before| before + 1) + at as u64
    };
    if !entries.iter().enumerate().all(follow) {
        return Err(Malformed("records that do not follow on each other"));
    }
    Ok(AppendEntriesRequest { vote, prev_log_id, entries, leader_commit })
}

pub(crate) fn append_answer(result: &StreamAppendResult<TypeConfig>) -> Bytes {
    let mut to = Builder::default();
    match result {
        Ok(last) => to.u8(0).id(last.as_ref()),
        Err(StreamAppendError::Conflict(at)) => to.u8(1).id(Some(at)),
        Err(StreamAppendError::HigherVote(vote)) => to.u8(2).vote(vote),
    };
    to.done()
}

pub(crate) fn read_append_answer(body: Bytes) -> Result<StreamAppendResult<TypeConfig>, Malformed> {
    let mut from = Reader(body);
    let result = match from.u8()? {
        0 => Ok(from.id()?),
        1 => {
            let at = from.id()?;
            Err(StreamAppendError::Conflict(at.ok_or(Malformed("a conflict at no record"))?))
        }
        2 => Err(StreamAppendError::HigherVote(from.vote()?)),
        _ => return Err(Malformed("an answer of a kind that this build does not know")),
    };
    from.end()?;
    Ok(result)
}

pub(crate) fn vote(request: &VoteRequest<TypeConfig>) -> Bytes {
    let is_handed = u8::from(request.leadership_transfer);
    Builder::default().vote(&request.vote).id(request.last_log_id.as_ref()).u8(is_handed).done()
}

pub(crate) fn read_vote(body: Bytes) -> Result<VoteRequest<TypeConfig>, Malformed> {
    let mut from = Reader(body);
    let (vote, last_log_id) = (from.vote()?, from.id()?);
    let mut request = VoteRequest::new(vote, last_log_id);
    request.leadership_transfer = from.flag()?;
    from.end()?;
    Ok(request)
}

pub(crate) fn vote_answer(answer: &VoteResponse<TypeConfig>) -> Bytes {
    let granted = u8::from(answer.vote_granted);
    Builder::default().vote(&answer.vote).u8(granted).id(answer.last_log_id.as_ref()).done()
}

pub(crate) fn read_vote_answer(body: Bytes) -> Result<VoteResponse<TypeConfig>, Malformed> {
    let mut from = Reader(body);
    let (vote, vote_granted, last_log_id) = (from.vote()?, from.flag()?, from.id()?);
    from.end()?;
    Ok(VoteResponse { vote, vote_granted, last_log_id })
}

pub(crate) fn snapshot(vote: &Vote, meta: &SnapshotMeta, manifest: &Manifest) -> Bytes {
    let mut to = Builder::default();
    to.vote(vote).id(meta.last_log_id.as_ref()).stored_members(&meta.last_membership).manifest(manifest);
    to.done()
}

pub(crate) fn read_snapshot(body: Bytes) -> Result<(Vote, SnapshotMeta, Manifest), Malformed> {
    let mut from = Reader(body);
    let vote = from.vote()?;
    let meta = Meta { last_log_id: from.id()?, last_membership: from.stored_members()? };
    let manifest = from.manifest()?;
    from.end()?;
    Ok((vote, meta, manifest))
}
