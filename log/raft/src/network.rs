//! What openraft sends to another member: requests on the stream to its node.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use clutch_log::{LogletId, Manifest, NodeId};
use clutch_proto::mutants::{self, Mutant};
use futures_util::{FutureExt as _, Stream, StreamExt as _, future::BoxFuture, stream::BoxStream};
use openraft::{
    EmptyNode, OptionalSend, RaftNetworkFactory, RaftNetworkV2, SnapshotMeta as Meta,
    errors::{RPCError, ReplicationClosed, StreamingError, Unreachable},
    network::RPCOption,
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult,
        TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
    },
};

use crate::{
    codec::{Builder, Kind, Reader},
    messages,
    peers::{NoAnswer, Peers},
    snapshots::Sent,
    types::{LogId, RaftSnapshot, TypeConfig, Vote},
};

type Rpc = RPCError<TypeConfig>;

/// Appends that may wait for their answers at a time; the bytes of one are bounded by what is read for it.
const APPENDS_MAX: usize = 8;
/// How long the answer to an append may take: it waits for the other member's sync.
const APPEND_PATIENCE: Duration = Duration::from_secs(2);
/// How long a snapshot may take on its way.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(600);

fn unreachable(error: impl std::fmt::Display) -> Unreachable<TypeConfig> {
    Unreachable::from_string(error)
}

fn down(error: NoAnswer) -> Rpc {
    RPCError::Unreachable(unreachable(error))
}

fn wrong(error: crate::codec::Malformed) -> Rpc {
    RPCError::Unreachable(unreachable(error))
}

/// Makes connections of one group.
pub(crate) struct Factory {
    pub(crate) peers: Arc<Peers>,
    pub(crate) id: LogletId,
    pub(crate) sent: Arc<Sent>,
}

impl RaftNetworkFactory<TypeConfig> for Factory {
    type Network = Connection;

    async fn new_client(&mut self, to: NodeId, _node: &EmptyNode) -> Connection {
        Connection { peers: self.peers.clone(), id: self.id, sent: self.sent.clone(), to }
    }
}

/// The way from this member of a group to another.
pub(crate) struct Connection {
    peers: Arc<Peers>,
    id: LogletId,
    sent: Arc<Sent>,
    to: NodeId,
}

impl Connection {
    fn ask(
        &self,
        kind: Kind,
        body: Bytes,
        patience: Duration,
    ) -> impl Future<Output = Result<Bytes, NoAnswer>> + Send + use<> {
        self.peers.ask(self.to, self.id, kind, body, patience)
    }

    async fn vote_of(
        &self,
        kind: Kind,
        request: &VoteRequest<TypeConfig>,
        option: &RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, Rpc> {
        let body = messages::vote(request);
        let answer = self.ask(kind, body, option.hard_ttl()).await.map_err(down)?;
        messages::read_vote_answer(answer).map_err(wrong)
    }
}

impl RaftNetworkV2<TypeConfig> for Connection {
    type SnapshotData = Option<Manifest>;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, Rpc> {
        let answer = self.ask(Kind::Heartbeat, messages::append(&request), option.hard_ttl());
        let result = messages::read_append_answer(answer.await.map_err(down)?).map_err(wrong)?;
        Ok(AppendEntriesResponse::from(result))
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<StreamAppendResult<TypeConfig>, Rpc>>, Rpc>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        let this = &*self;
        // Each is on its way before the next is taken, so they arrive in order; answers are given in that order, too.
        let answers = input
            .map(move |request| {
                let answer = this.ask(Kind::Append, messages::append(&request), APPEND_PATIENCE);
                let last = request.entries.last().map(|entry| entry.log_id).or(request.prev_log_id);
                async move {
                    if mutants::is(Mutant::AppendAssumed) {
                        return Ok(Ok(last));
                    }
                    messages::read_append_answer(answer.await.map_err(down)?).map_err(wrong)
                }
            })
            .buffered(APPENDS_MAX);
        // Nothing follows on an answer that is no success.
        let until_refused = answers.scan(false, |is_over, answer| {
            let ended = std::mem::replace(is_over, !matches!(answer, Ok(Ok(_))));
            std::future::ready((!ended).then_some(answer))
        });
        async move { Ok(until_refused.boxed()) }.boxed()
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, Rpc> {
        self.vote_of(Kind::Vote, &request, &option).await
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, Rpc> {
        self.vote_of(Kind::PreVote, &request, &option).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: RaftSnapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let offered = async {
            let least = snapshot.meta.last_log_id;
            let (meta, manifest) = self.sent.offered(least).await.map_err(unreachable)?;
            let body = messages::snapshot(&vote, &meta, &manifest);
            let answer = self.ask(Kind::Snapshot, body, SNAPSHOT_PATIENCE).await.map_err(unreachable)?;
            let vote = Reader(answer).vote().map_err(unreachable)?;
            Ok(SnapshotResponse::new(vote))
        };
        tokio::select! {
            biased;
            offered = offered => offered.map_err(StreamingError::Unreachable),
            closed = cancel => Err(StreamingError::Closed(closed)),
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, Rpc> {
        let body = Builder::default()
            .vote(request.from_leader())
            .u64(*request.to_node_id())
            .id(request.last_log_id())
            .done();
        self.ask(Kind::HandOver, body, option.hard_ttl()).await.map_err(down)?;
        Ok(Ok(()))
    }
}

/// The identity and members of what a snapshot reaches.
pub(crate) fn meta_of(id: LogId, members: crate::types::StoredMembers) -> crate::types::SnapshotMeta {
    Meta { last_log_id: Some(id), last_membership: members }
}
