//! A state that is replaced by a snapshot: the replica ends, all of it but what it is reached by, and another begins on the
//! snapshot. What became of proposals before it is not known any more.

use std::sync::Arc;

use clutch_log::{Manifest, Position};
use clutch_proto::{Refusal, types::Code};
use clutch_state::{
    applier::{Applier, Fault},
    machine::Machine,
    store::{Store, StoreError},
};
use tokio::sync::mpsc;

use crate::{
    Replica, ReplicaConfig, Waiter,
    handle::{Answer, Input},
};

/// Puts the checkpoint at a position in the place of the state, which nobody has open any more, and opens it.
pub type Restore = Arc<dyn Fn(Position) -> Result<Arc<dyn Store>, StoreError> + Send + Sync>;

/// Runs a replica, and another in its place whenever its state was replaced.
pub(crate) async fn run_restored<M: Machine>(
    mut replica: Replica<M>,
    mut inbox: mpsc::Receiver<Input>,
    mut admin: mpsc::Receiver<Input>,
) {
    loop {
        let fault = replica.fault.clone();
        let Some((config, manifest)) = replica.run(&mut inbox, &mut admin).await else { return };
        let applier = match restored::<M>(&config, &manifest) {
            Ok(applier) => applier,
            Err(error) => {
                config.runtime.note("replica: a snapshot cannot be used");
                tracing::error!(replica = %config.name, %error, "the replica stops: it has no state any more");
                config.log.resign();
                let text = format!("the snapshot at {} cannot be used: {error}", manifest.position);
                // It is the first fault: a replica with one takes no events.
                let _ = fault.set(text);
                return;
            }
        };
        tracing::warn!(replica = %config.name, position = %manifest.position, "restored from a snapshot");
        config.runtime.note("replica: its state is replaced by a snapshot");
        replica = Replica::new(applier, config, fault);
    }
}

fn restored<M: Machine>(config: &ReplicaConfig<M>, manifest: &Manifest) -> Result<Applier<M>, Fault> {
    let mut applier = Applier::<M>::open((config.restore)(manifest.position)?)?;
    if applier.position() > manifest.position {
        return Err(Fault::Order { applied: manifest.position, got: applier.position() });
    }
    // Records of the log's own may lie between the last batch and the snapshot's position.
    applier.skip(manifest.position);
    config.clock.advance(applier.time());
    Ok(applier)
}

impl<M: Machine> Replica<M> {
    /// Ends what this replica has begun; its state is closed when it returns.
    pub(crate) fn leave(mut self) -> ReplicaConfig<M> {
        self.end_leading();
        let unknown =
            || Refusal::new(Code::OutcomeUnknown, "the replica was restored from a snapshot meanwhile");
        for waiter in self.fates.abandon() {
            if let Waiter::Caller { reply, .. } = waiter {
                // The caller may have given up.
                let _ = reply.send(Answer::refused(unknown()));
            }
        }
        for read in self.waiting_reads.take() {
            let text = "the replica is being restored from a snapshot";
            let _ = read.reply.send(Answer::refused(Refusal::new(Code::NotReady, text)));
        }
        self.config
    }
}
