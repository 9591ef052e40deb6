//! Sending requests to a replica.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use clutch_log::{Epoch, Log, Position};
use clutch_proto::{
    Refusal, Time,
    admin::{AdminReply, AdminRequest, admin_request::Op},
    limits::{INBOX_REQUESTS_MAX, METADATA_REQUEST_BYTES_MAX},
    mutants::{self, Mutant},
    types::{ClientTag, Code},
};
use clutch_runtime::Clock;
use tokio::sync::{mpsc, oneshot};

/// What an answer is, before it is put into an envelope.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The encoded reply, or why there is none.
    pub result: Result<Bytes, Refusal>,
    /// Where the mutation took effect, or up to where the read saw the log.
    pub position: Position,
    /// The log's time at that position.
    pub time: Time,
}

impl Answer {
    pub(crate) fn refused(refusal: Refusal) -> Answer {
        Answer { result: Err(refusal), position: Position(0), time: Time(0) }
    }
}

pub(crate) type Reply = oneshot::Sender<Answer>;

/// How much of the log a read must have seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Freshness {
    /// All that was acknowledged before it; only a leader answers.
    #[default]
    Leader,
    /// The same; any member answers.
    Member,
    /// This position and whatever else is applied; any member answers, without asking others.
    Position(Position),
}

pub(crate) enum Input {
    Request { body: Bytes, tag: Option<ClientTag>, freshness: Freshness, reply: Reply },
    Entry { body: Bytes, reign: Option<Epoch>, reply: Reply },
    Admin { request: AdminRequest, at_least: Position, reply: oneshot::Sender<Result<AdminReply, Refusal>> },
    Stop { done: oneshot::Sender<()> },
}

/// Pause before it is looked again whether what is to be shown is applied.
const AGAIN: Duration = Duration::from_millis(5);

/// Whether a request is answered with how things are now.
fn shows_present(request: &AdminRequest) -> bool {
    match &request.op {
        Some(Op::ScanRows(scan)) => scan.snapshot == 0 && scan.checkpoint == 0,
        Some(Op::ReadLog(_)) => true,
        // Who asks these wants to know how it stands with this member, or the leader refuses for itself.
        None
        | Some(
            Op::Status(_)
            | Op::HashAt(_)
            | Op::TakeCheckpoint(_)
            | Op::TrimLog(_)
            | Op::Rescan(_)
            | Op::RotateKey(_)
            | Op::Reconfigure(_)
            | Op::MoveLeader(_),
        ) => false,
    }
}

/// Sends requests to a replica; cheap to clone.
#[derive(Clone)]
pub struct ReplicaHandle {
    pub(crate) sender: mpsc::Sender<Input>,
    /// A lane of its own: who looks after a replica is heard whatever else waits.
    pub(crate) admin: mpsc::Sender<Input>,
    pub(crate) fault: Arc<OnceLock<String>>,
    pub(crate) log: Arc<dyn Log>,
    pub(crate) clock: Arc<dyn Clock>,
}

impl ReplicaHandle {
    /// Why the replica has stopped for good; `None` while it goes on.
    pub fn fault(&self) -> Option<&str> {
        self.fault.get().map(String::as_str)
    }

    /// Asks the machine, as the leader of its log; every failure is an answer.
    pub async fn call(&self, body: Bytes, tag: Option<ClientTag>) -> Answer {
        self.call_as(body, tag, Freshness::Leader).await
    }

    /// As [`ReplicaHandle::call`], where a read may be content with a follower; a change never is.
    pub async fn call_as(&self, body: Bytes, tag: Option<ClientTag>, freshness: Freshness) -> Answer {
        if body.len() > METADATA_REQUEST_BYTES_MAX {
            let text = format!(
                "a request of {} bytes; at most {METADATA_REQUEST_BYTES_MAX} are allowed",
                body.len()
            );
            return Answer::refused(Refusal::new(Code::TooLarge, text));
        }
        let (reply, answer) = oneshot::channel();
        self.exchange(Input::Request { body, tag, freshness, reply }, answer).await
    }

    /// Proposes an entry of the shell's own.
    pub async fn propose(&self, body: Bytes) -> Answer {
        let (reply, answer) = oneshot::channel();
        self.exchange(Input::Entry { body, reign: None, reply }, answer).await
    }

    /// As [`ReplicaHandle::propose`], if this replica leads in that reign: what it says was true in it.
    pub async fn propose_in(&self, reign: Epoch, body: Bytes) -> Answer {
        let (reply, answer) = oneshot::channel();
        self.exchange(Input::Entry { body, reign: Some(reign), reply }, answer).await
    }

    async fn exchange(&self, input: Input, answer: oneshot::Receiver<Answer>) -> Answer {
        match self.sender.try_send(input) {
            Ok(()) => answer.await.unwrap_or_else(|_| {
                Answer::refused(Refusal::new(Code::OutcomeUnknown, "the replica stopped before it answered"))
            }),
            Err(mpsc::error::TrySendError::Full(_)) => Answer::refused(Refusal::new(
                Code::Overloaded,
                format!("{INBOX_REQUESTS_MAX} requests are waiting"),
            )),
            Err(mpsc::error::TrySendError::Closed(_)) => {
                Answer::refused(Refusal::new(Code::NotReady, "the replica is not running"))
            }
        }
    }

    /// Asks for something that is not the machine's: status, rows, log. What is shown as the present is what a quorum confirms, so
    /// that nobody is shown what somebody has who is no member any more, or is cut off.
    pub async fn admin(&self, request: AdminRequest) -> Result<AdminReply, Refusal> {
        // One that has stopped shows what it stopped on.
        if !shows_present(&request) || self.fault().is_some() || mutants::is(Mutant::CutOffShows) {
            return self.ask(request, Position(0)).await;
        }
        let barrier = self.log.read_barrier(crate::BARRIER_PATIENCE).await;
        let at_least = barrier.map_err(|fault| Refusal::new(Code::NotLeader, fault.to_string()))?;
        let began = self.clock.monotonic();
        loop {
            match self.ask(request.clone(), at_least).await {
                Err(refusal)
                    if refusal.code == Code::NotReady
                        && self.clock.monotonic() - began < crate::reads::BARRIER_WAIT =>
                {
                    self.clock.sleep(AGAIN).await;
                }
                answer => return answer,
            }
        }
    }

    async fn ask(&self, request: AdminRequest, at_least: Position) -> Result<AdminReply, Refusal> {
        let gone = || Refusal::new(Code::NotReady, "the replica is not running");
        let (reply, answer) = oneshot::channel();
        self.admin.send(Input::Admin { request, at_least, reply }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Flushes the state and ends the replica.
    pub async fn stop(&self) {
        let (done, stopped) = oneshot::channel();
        if self.admin.send(Input::Stop { done }).await.is_ok() {
            // A replica that ended by itself has nothing left to stop.
            let _ = stopped.await;
        }
    }
}
