//! What a member answers when others ask.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use clutch_log::NodeId;
use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::BoxFuture;
use futures_util::StreamExt as _;
use openraft::{
    Snapshot,
    raft::{AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;

use crate::{
    codec::{Builder, Frame, Kind, Reader},
    member::Member,
    messages,
    peers::{Group, answer_with},
    types::{Vote, position_of},
};

/// How long the leader may take for what a follower asks of it.
pub(crate) const BARRIER_PATIENCE: Duration = Duration::from_secs(3);

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Group for Member {
    fn answer(self: Arc<Self>, kind: Kind, body: Bytes, from: NodeId) -> BoxFuture<Result<Bytes, String>> {
        Box::pin(async move {
            self.check_ended()?;
            match kind {
                Kind::Append | Kind::Heartbeat => {
                    let request = messages::read_append(body).map_err(text)?;
                    let prev = request.prev_log_id;
                    let last = request.entries.last().map(|entry| entry.log_id).or(prev);
                    let answer = self.raft().append_entries(request).await.map_err(text)?;
                    Ok(messages::append_answer(&answer.into_stream_result(prev, last)))
                }
                Kind::Vote => {
                    let request = messages::read_vote(body).map_err(text)?;
                    self.check_may_vote(request.leadership_transfer)?;
                    let answer = self.raft().vote(request).await.map_err(text)?;
                    Ok(messages::vote_answer(&answer))
                }
                Kind::PreVote => {
                    let request = messages::read_vote(body).map_err(text)?;
                    self.check_may_vote(request.leadership_transfer)?;
                    let answer = self.raft().pre_vote(request).await.map_err(text)?;
                    Ok(messages::vote_answer(&answer))
                }
                Kind::Snapshot => self.install(body, from).await,
                Kind::HandOver => {
                    let mut read = Reader(body);
                    let (vote, to) = (read.vote().map_err(text)?, read.u64().map_err(text)?);
                    let last = read.id().map_err(text)?;
                    let request = TransferLeaderRequest::new(vote, to, last);
                    self.raft().handle_transfer_leader(request).await.map_err(text)?.map_err(text)?;
                    Ok(Bytes::new())
                }
                Kind::Barrier => {
                    self.check_member(from)?;
                    let position = self.barrier_here(BARRIER_PATIENCE).await.map_err(text)?;
                    Ok(Builder::default().u64(position.0).done())
                }
                Kind::Seal => {
                    let tail = self.seal_here().await.map_err(text)?;
                    Ok(Builder::default().u64(tail.0).done())
                }
                Kind::Take => {
                    let least = Reader(body).u64().map_err(text)?;
                    let id = least.checked_sub(1).map(|index| self.log().id_at(index)).transpose();
                    let (_, manifest) =
                        self.sent().offered(id.map_err(text)?.flatten()).await.map_err(text)?;
                    Ok(Builder::default().manifest(&manifest).done())
                }
                Kind::Read => self.sent().read(body).await,
                Kind::Mark => Err("a mark is no group's".into()),
            }
        })
    }

    fn append_all(
        self: Arc<Self>,
        mut frames: mpsc::UnboundedReceiver<Frame>,
        answers: mpsc::Sender<Bytes>,
    ) -> BoxFuture<()> {
        Box::pin(async move {
            loop {
                // As long as all goes well what comes is handed on before what came before is durable.
                let (requests, input) = mpsc::unbounded_channel();
                let mut results = Box::pin(self.raft().stream_append(UnboundedReceiverStream::new(input)));
                let mut asked: VecDeque<Frame> = VecDeque::new();
                loop {
                    let result = tokio::select! {
                        biased;
                        result = results.next(), if !asked.is_empty() => result,
                        frame = frames.recv() => {
                            let Some(frame) = frame else { return };
                            let read = self.check_ended().and_then(|()| messages::read_append(frame.body.clone()).map_err(text));
                            match read {
                                Ok(request) => {
                                    // Whoever takes them is right here.
                                    let _ = requests.send(request);
                                    asked.push_back(frame);
                                }
                                Err(error) => answer_with(&answers, &frame, Err(error)).await,
                            }
                            continue;
                        }
                    };
                    let Some(frame) = asked.pop_front() else { break };
                    let answer = match &result {
                        Some(Ok(result)) => Ok(messages::append_answer(result)),
                        Some(Err(fatal)) => Err(fatal.to_string()),
                        None => Err("what came before it was refused".to_owned()),
                    };
                    answer_with(&answers, &frame, answer).await;
                    if !matches!(result, Some(Ok(Ok(_)))) {
                        break;
                    }
                }
                for frame in asked {
                    answer_with(&answers, &frame, Err("what came before it was refused".into())).await;
                }
            }
        })
    }
}

impl Member {
    /// Refuses what is asked of a group that has ended: openraft would complain about each of them.
    fn check_ended(&self) -> Result<(), String> {
        self.fault().map_or(Ok(()), |fault| Err(format!("the group has ended here: {fault}")))
    }

    /// Refuses to say what a read must have seen to who was taken out of the log and has not heard of it: nothing more comes there,
    /// and whoever reads there would wait in vain.
    fn check_member(&self, node: NodeId) -> Result<(), String> {
        let is_member = self.metrics().membership_config.nodes().any(|(member, _)| *member == node);
        if is_member || mutants::is(Mutant::AnybodyReads) {
            return Ok(());
        }
        self.runtime().note("raft: who is no member asks for a barrier");
        Err(format!("node {node} is no member of this log"))
    }

    /// Refuses to vote for a lease after the start, unless the leader itself asks for it.
    fn check_may_vote(&self, by_leader: bool) -> Result<(), String> {
        if by_leader || self.parts.lease.may_vote() {
            return Ok(());
        }
        self.runtime().note("raft: a vote is refused after a start");
        Err("this member has just started, and does not know whether somebody leads".into())
    }

    /// Follows a leader, or says whom this member follows instead. Whoever is answered counts on it for a lease, and only openraft
    /// knows whether it may.
    async fn follow(&self, vote: Vote) -> Result<Vote, String> {
        let request = AppendEntriesRequest { vote, prev_log_id: None, leader_commit: None, entries: vec![] };
        Ok(match self.raft().append_entries(request).await.map_err(text)? {
            AppendEntriesResponse::HigherVote(higher) => higher,
            _ => vote,
        })
    }

    /// Gets the snapshot that the leader offers, unless everything in it is here already.
    async fn install(&self, body: Bytes, from: NodeId) -> Result<Bytes, String> {
        let (vote, meta, manifest) = messages::read_snapshot(body).map_err(text)?;
        let last = meta.last_log_id.ok_or("a snapshot of nothing")?;
        if manifest.position != position_of(last.index) {
            return Err(format!("a snapshot at {} that is said to end at {last}", manifest.position));
        }
        // openraft would go back to where the snapshot ends, and stand there.
        let is_here = self.log().id_at(last.index).map_err(text)? == Some(last)
            || self.delivered().last().0 >= manifest.position;
        if is_here {
            self.runtime().note("raft: a snapshot is older than the log");
            let followed = match mutants::is(Mutant::SnapshotAnsweredUnasked) {
                true => vote,
                false => self.follow(vote).await?,
            };
            return Ok(Builder::default().vote(&followed).done());
        }
        self.received().receive(from, manifest.clone()).await.map_err(text)?;
        let snapshot = Snapshot { meta, snapshot: Some(manifest) };
        let answer = self.raft().install_full_snapshot(vote, snapshot).await.map_err(text)?;
        Ok(Builder::default().vote(&answer.vote).done())
    }
}
