//! What goes: past edges, files, past contents, expired contents, dead spans, removed directories.

use clutch_proto::{
    limits::{CONTENTS_PER_ENTRY_MAX, EXTENTS_PER_ENTRY_MAX, SNAPSHOT_VERSIONS_MAX},
    name,
    shard::*,
    types::{Code, SnapshotPolicy},
};
use shard_reply::Reply;

use super::{Outcome, Past, ShardOracle, kind_of};

const DONE: Outcome = Ok(Reply::Done(Done {}));

fn remaining(gone: bool) -> Outcome {
    Ok(Reply::Remaining(Remaining { bytes: 0, gone }))
}

impl ShardOracle {
    /// Whether a policy lets something go that ended at a time and has so many newer ones.
    fn may_go(&self, policy: Option<SnapshotPolicy>, ended_at: u64, newer: usize) -> Result<(), Code> {
        let SnapshotPolicy { age_ms, versions } = policy.unwrap_or_default();
        if versions.is_some_and(|versions| versions > SNAPSHOT_VERSIONS_MAX) {
            return Err(Code::InvalidArgument);
        }
        let end_of_age = |age: u64| ended_at.saturating_add(age.saturating_mul(1_000_000));
        let is_old = age_ms.is_some_and(|age| self.time >= end_of_age(age));
        if is_old || versions.is_some_and(|versions| newer >= versions as usize) {
            return Ok(());
        }
        Err(Code::TooEarly)
    }

    /// The same by the policy that the directory has itself, if it has one.
    fn may_go_by_its_own(&self, dir: u64, ended_at: u64, newer: usize) -> Result<(), Code> {
        let own = self.inodes.get(&dir).and_then(|row| row.policy.as_ref()?.snapshot);
        own.map_or(Ok(()), |own| self.may_go(Some(own), ended_at, newer))
    }

    fn past_edge(
        &self,
        (dir, name, ended_at): (u64, &bytes::Bytes, u64),
        target: u64,
        policy: Option<SnapshotPolicy>,
    ) -> Result<Past, Code> {
        self.directory_here(dir)?;
        if !self.inodes.contains_key(&dir) {
            return Err(Code::NotFound);
        }
        name::check(name).map_err(|r| r.code)?;
        let key = (dir, name.clone(), ended_at);
        let past = self.past.get(&key).filter(|p| p.target == target).ok_or(Code::NotFound)?;
        let newer = self.past.keys().filter(|(d, n, e)| *d == dir && n == name && *e > ended_at).count();
        self.may_go(policy, ended_at, newer)?;
        self.may_go_by_its_own(dir, ended_at, newer)?;
        Ok(past.clone())
    }

    pub(super) fn forget_edge(&mut self, op: &ForgetEdge) -> Outcome {
        let past = self.past_edge((op.dir, &op.name, op.ended_at), op.target, op.policy)?;
        if past.owned {
            let target = kind_of(op.target)?;
            self.check_slot(target.slot().0).map_err(|_| Code::InvalidArgument)?;
            if !self.remove_file(op.target)? {
                return remaining(false);
            }
        }
        self.past.remove(&(op.dir, op.name.clone(), op.ended_at));
        remaining(true)
    }

    pub(super) fn drop_past_edge(&mut self, op: &DropPastEdge) -> Outcome {
        let past = self.past_edge((op.dir, &op.name, op.ended_at), op.target, op.policy)?;
        if !past.owned {
            return Err(Code::Stale);
        }
        self.past.remove(&(op.dir, op.name.clone(), op.ended_at));
        DONE
    }

    pub(super) fn remove_file_inode(&mut self, op: &RemoveFileInode) -> Outcome {
        let id = kind_of(op.id)?;
        self.check_slot(id.slot().0)?;
        let gone = self.remove_file(op.id)?;
        remaining(gone)
    }

    /// Whether the file is gone; one with a long history goes in parts.
    fn remove_file(&mut self, id: u64) -> Result<bool, Code> {
        if kind_of(id)?.is_directory() {
            return Err(Code::IsDirectory);
        }
        let row = self.inodes.get(&id).ok_or(Code::NotFound)?;
        let present = row.content;
        let past: Vec<(u64, u64)> = self.past_contents.keys().filter(|(f, _)| *f == id).copied().collect();
        for key in past.iter().take(CONTENTS_PER_ENTRY_MAX) {
            if let Some((content, _)) = self.past_contents.remove(key) {
                self.disown(content);
            }
        }
        if past.len() > CONTENTS_PER_ENTRY_MAX {
            return Ok(false);
        }
        self.disown(present);
        self.inodes.remove(&id);
        Ok(true)
    }

    pub(super) fn forget_content(&mut self, op: &ForgetContent) -> Outcome {
        let id = kind_of(op.id)?;
        self.check_slot(id.slot().0)?;
        if !self.inodes.contains_key(&op.id) {
            return Err(Code::NotFound);
        }
        let key = (op.id, op.ended_at);
        self.past_contents.get(&key).filter(|(content, _)| *content == op.content).ok_or(Code::NotFound)?;
        let newer = self.past_contents.keys().filter(|(f, e)| *f == op.id && *e > op.ended_at).count();
        self.may_go(op.policy, op.ended_at, newer)?;
        self.past_contents.remove(&key);
        self.disown(op.content);
        DONE
    }

    pub(super) fn collect_content(&mut self, op: &CollectContent) -> Outcome {
        self.check_slot(op.content as u8)?;
        let time = self.time;
        let content = self.contents.get_mut(&op.content).ok_or(Code::NotFound)?;
        if content.file != 0 {
            return Err(Code::Stale);
        }
        if time <= content.deadline {
            return Err(Code::TooEarly);
        }
        content.pending = 0;
        let taken = content.extents.len().min(EXTENTS_PER_ENTRY_MAX);
        content.extents.drain(..taken);
        let bytes = content.extents.iter().map(|(_, length, _)| length).sum();
        if bytes == 0 {
            self.contents.remove(&op.content);
        }
        Ok(Reply::Remaining(Remaining { bytes, gone: bytes == 0 }))
    }

    pub(super) fn remove_span(&mut self, entry: &RemoveSpanEntry) -> Outcome {
        let op = entry.op.as_ref().ok_or(Code::Malformed)?;
        self.check_slot(op.span_id as u8)?;
        if !self.is_dead(op.span_id) {
            return Err(Code::NotFound);
        }
        if entry.first_bad != 0 {
            return Err(Code::BadProof);
        }
        self.spans.remove(&op.span_id);
        DONE
    }

    pub(super) fn adopt(&mut self, op: &AdoptDirectory) -> Outcome {
        self.directory_here(op.dir)?;
        kind_of(op.parent)?;
        let time = self.time;
        let row = self.inodes.get_mut(&op.dir).ok_or(Code::NotFound)?;
        if row.parent != 0 {
            return Err(Code::Stale);
        }
        (row.parent, row.former_parent, row.nlink, row.ctime) = (op.parent, 0, 2, time);
        DONE
    }

    pub(super) fn forget_directory(&mut self, op: &ForgetDirectoryInode) -> Outcome {
        self.directory_here(op.dir)?;
        let row = self.inodes.get(&op.dir).ok_or(Code::NotFound)?;
        if row.parent != 0 {
            return Err(Code::Stale);
        }
        self.may_go(op.policy, row.ctime, 0)?;
        self.may_go_by_its_own(op.dir, row.ctime, 0)?;
        if !self.is_empty(op.dir) || self.past.keys().any(|(dir, ..)| *dir == op.dir) {
            return Err(Code::NotEmpty);
        }
        self.inodes.remove(&op.dir);
        DONE
    }
}
