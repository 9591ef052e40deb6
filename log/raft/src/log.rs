//! A member as its replica holds it.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use clutch_log::{
    Bounds, Commit, ConfigId, Epoch, Events, Floors, Log, LogFault, NodeId, Position, Rejected, Status,
    check_batch,
};

use crate::{
    changes::config_of,
    codec::{Kind, Reader},
    events::RaftEvents,
    member::{Member, PROPOSAL_PATIENCE, storage},
    peers::NoAnswer,
    types::Command,
};

/// The log of a member.
pub struct RaftLog(pub(crate) Arc<Member>);

#[async_trait]
impl Log for RaftLog {
    fn propose(&self, epoch: Epoch, batch: Vec<Bytes>) -> Result<Commit, Rejected> {
        let member = &self.0;
        let bytes = check_batch(&batch)? as u64;
        if let Some(fault) = member.fault() {
            return Err(Rejected::Stopped(fault));
        }
        if member.parts.delivered.sealed().is_some() {
            return Err(Rejected::Sealed);
        }
        if member.leading() != Some(epoch.0) {
            return Err(Rejected::NotLeader { epoch, hint: member.hint() });
        }
        let most = member.parts.log.group().options().queued_bytes_max as u64;
        if member.queued_bytes.load(Ordering::Relaxed) + bytes > most {
            return Err(Rejected::Overloaded);
        }
        member.take(epoch.0, Command::Batch(batch), bytes)
    }

    fn events(&self, from: Position) -> Box<dyn Events> {
        Box::new(RaftEvents::new(self.0.clone(), from.max(Position(1))))
    }

    async fn read_barrier(&self, patience: Duration) -> Result<Position, LogFault> {
        let member = &self.0;
        if member.leading().is_some() {
            let position = member.barrier_here(patience).await?;
            return Ok(member.up_to_the_end(position));
        }
        let Some(leader) = member.hint().filter(|leader| *leader != member.node()) else {
            return Err(LogFault::NoQuorum { waited: Duration::ZERO });
        };
        let asked = member.parts.peers.ask(leader, member.parts.id, Kind::Barrier, Bytes::new(), patience);
        match asked.await {
            Ok(body) => Ok(member.up_to_the_end(Position(Reader(body).u64().map_err(storage)?))),
            Err(NoAnswer::Refused(..)) => Err(LogFault::NotLeader { hint: member.hint() }),
            Err(NoAnswer::Unreachable(..) | NoAnswer::Late(..)) => {
                Err(LogFault::NoQuorum { waited: patience })
            }
        }
    }

    async fn seal(&self) -> Result<Position, LogFault> {
        let member = &self.0;
        if member.leading().is_some() || member.parts.delivered.sealed().is_some() {
            return member.seal_here().await;
        }
        let leader = member.hint().filter(|leader| *leader != member.node());
        let leader = leader.ok_or(LogFault::NotLeader { hint: None })?;
        let asked =
            member.parts.peers.ask(leader, member.parts.id, Kind::Seal, Bytes::new(), PROPOSAL_PATIENCE);
        Ok(Position(Reader(asked.await.map_err(storage)?).u64().map_err(storage)?))
    }

    async fn set_floors(&self, floors: Floors) -> Result<(), LogFault> {
        self.0.trim(floors).await
    }

    async fn transfer_leader(&self, to: NodeId) -> Result<(), LogFault> {
        self.0.hand_over(to).await
    }

    fn resign(&self) {
        self.0.resign();
    }

    async fn reconfigure(
        &self,
        expect: ConfigId,
        members: Vec<clutch_log::Member>,
    ) -> Result<ConfigId, LogFault> {
        self.0.reconfigure(expect, &members).await
    }

    fn status(&self) -> Status {
        let member = &self.0;
        let metrics = member.metrics();
        let (term, leader) = member.standing();
        let (last, _) = member.parts.delivered.last();
        let last = member.up_to_the_end(last.min(*member.parts.log.group().last().borrow()));
        Status {
            epoch: Epoch(term),
            leader,
            is_self: member.leading() == Some(term),
            bounds: Bounds { first: member.parts.log.group().first(), last },
            sealed: member.parts.delivered.sealed(),
            config: config_of(&metrics),
            members: member.members(&metrics),
            changes_kept: member.parts.log.group().view().members.len(),
            queued_bytes: member.queued_bytes.load(Ordering::Relaxed),
            fault: member.fault(),
        }
    }
}
