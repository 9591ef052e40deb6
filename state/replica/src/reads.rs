//! Reads: each waits until everything is applied that was acknowledged before it.

use clutch_log::{LogFault, Position};
use clutch_proto::{Refusal, types::Code};
use clutch_state::machine::{Machine, Stop};

use crate::{
    Replica,
    handle::{Answer, Reply},
};

pub(crate) struct PendingRead<M: Machine> {
    pub(crate) request: M::Request,
    pub(crate) reply: Reply,
}

/// The answer to a read barrier and the reads that wait for it.
pub(crate) type Barrier<M> = (Result<Position, LogFault>, Vec<PendingRead<M>>);

impl<M: Machine> Replica<M> {
    /// A read barrier was answered.
    pub(crate) fn passed(&mut self, barrier: Result<Position, LogFault>, reads: Vec<PendingRead<M>>) {
        if let Some(refusal) = self.unready() {
            for read in reads {
                let _ = read.reply.send(Answer::refused(refusal.clone()));
            }
            return;
        }
        match barrier {
            Ok(position) => {
                if position > self.applier.position() {
                    self.config.runtime.note("replica: reads wait for their barrier");
                }
                self.waiting_reads.push_back((position, reads));
                self.serve_waiting_reads();
            }
            Err(fault) => {
                for read in reads {
                    let _ =
                        read.reply.send(Answer::refused(Refusal::new(Code::NotLeader, fault.to_string())));
                }
            }
        }
    }

    pub(crate) fn serve_waiting_reads(&mut self) {
        let applied = self.applier.position();
        while self.waiting_reads.front().is_some_and(|(position, _)| *position <= applied) {
            let Some((_, reads)) = self.waiting_reads.pop_front() else { return };
            for PendingRead { request, reply } in reads {
                match M::read(&**self.applier.store(), &request, &self.config.facts.now()) {
                    Ok(answer) => self.send(reply, applied, self.applier.time(), Ok(answer)),
                    Err(Stop::Refused(refusal)) => {
                        self.send(reply, applied, self.applier.time(), Err(refusal))
                    }
                    Err(Stop::Unknown(what)) => {
                        self.send(reply, applied, self.applier.time(), Err(Refusal::malformed(what)))
                    }
                    Err(Stop::Fault(fault)) => return self.fail(&fault.into()),
                }
            }
        }
    }
}
