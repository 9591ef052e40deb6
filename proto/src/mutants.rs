//! Bugs that are planted on purpose, to see that the simulation finds them. Without the feature `mutants`, which no
//! shipped build has, [`is`] is a constant `false` and nothing of them is compiled in.

/// A planted bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mutant {
    /// The log acknowledges before it has synced.
    AcknowledgeBeforeSync = 1,
    /// An applier looks at something that goes on by itself, as a clock does.
    ApplyReadsClock,
    /// Rows and the applied position are written one after the other.
    PositionWrittenApart,
    /// A shard does not recognise a step of the CDC that it has executed.
    StepNotIdempotent,
    /// A transaction that is turned back forgets its first step.
    RollbackForgets,
    /// A creation is not recognised when it comes again.
    DuplicateCreate,
    /// Unlocking an edge does nothing.
    UnlockSkipped,
    /// The state hash does not notice rows that go.
    HashIgnoresDelete,
    /// A block service removes good blocks when it starts.
    BlockErasedInUse,
    /// Whole blocks are read without looking at their checksums.
    CrcUnchecked,
    /// A proof, or a block, is taken although it is of other bytes.
    CrcNotBound,
    /// Signatures of certificates are not looked at.
    SignatureUnchecked,
    /// Directory moves do not wait for each other.
    LoopThroughMoves,
    /// Reads are answered before the replica knows that it is up to date.
    ReadBeforeCatchUp,
    /// A log's time is whatever its leader's clock says.
    TimeGoesBack,
    /// Outcomes are forgotten long before their clients acknowledge them.
    OutcomeForgottenEarly,
    /// A client takes silence for refusal.
    UnknownIsRefused,
    /// Directories with entries can be removed.
    RemoveNotEmpty,
    /// A locked edge can be changed.
    LockIgnored,
    /// Blocks of a span that is tried again are in no index.
    FirstTryNotIndexed,
    /// A listing leaves out the first name of each page but the first.
    ListingSkips,
    /// A directory's edge time does not follow its edges.
    EdgeTimeForgotten,
    /// The ancestors of a move's target are not all looked at.
    WalkEndsEarly,
    /// A leader that is late to say where it is replaces its successor. A real bug once.
    OlderLeaderPlaced,
    /// A shard answers layouts, and refuses spans, before it knows any block service. A real bug once.
    ServicesUnknown,
    /// Blocks may be erased while writes of them are still granted.
    EraseBeforeGrantsEnd,
    /// What a collector proposes is not compared with the policy again.
    PolicyNotRechecked,
    /// What a directory says itself by now does not count when something of it is forgotten.
    OwnPolicyIgnored,
    /// A range that is shared is not counted as a use of its span.
    SharedUseNotCounted,
    /// Publishing replaces whatever content a file has.
    PublishIgnoresExpected,
    /// Blocks that are exchanged stay where they were in the index.
    SwapNotIndexed,
    /// A file that is forgotten leaves its content behind.
    ContentLeaks,
    /// Contents that are being written can be collected.
    LiveTransientCollected,
    /// What a walk read is believed although a move that has ended since made it wrong.
    EndedMoveForgotten,
    /// A directory without its label is used as if it were the disk.
    EmptyDiskUsed,
    /// A request's tag is drawn from the client's own clock.
    TagFromWallClock,
    /// A block service looks at its own clock when it checks a certificate.
    GrantByWallClock,
    /// A request that is called too old is tagged anew however long ago it was sent first. A real bug once.
    RenewedHoweverLate,
    /// Who does not know the time takes it from what was signed, however long ago. A real bug once.
    SignedLongAgoBelieved,
    /// Who does not know the time tells others what his wall clock says.
    UnknownTimeTold,
    /// A wall clock that does not count vouches for whoever says the same. A real bug once.
    WallVouchesForAll,
    /// A clock that jumps ahead is believed at once.
    JumpBelieved,
    /// A clock that jumps is followed with all that was saved up, each time that the machine wakes. A real bug once.
    JumpSavedUp,
    /// Who is refused as too far ahead follows his wall clock further ahead. A real bug once.
    RefusedGoesOn,
    /// What a new process finds behind the mark is not written once more.
    TailNotWrittenAgain,
    /// A block that is in place already is proven without a sync.
    SettledUnsynced,
    /// An erase of a block that is not there is proven without a sync.
    GoneUnsynced,
    /// A segment's name is not synced before something relies on it.
    SegmentNameUnsynced,
    /// What a refused entry takes back is a write of an earlier one of its batch, too.
    UndoTakesTooMuch,
    /// An entry that is undone leaves what it has removed without a look removed in the rest of its batch.
    RemovalNotUndone,
    /// A scan does not make up for stored rows that its batch has deleted.
    ScanEndsEarly,
    /// A refusal is not recorded: who asks again is executed.
    RefusalNotRecorded,
    /// The last entry of a full page of a history is on no page.
    HistoryCutAtWrongEnd,
    /// The second page of a layout is of the newest content, whichever the first was of.
    SecondPageOfNewer,
    /// A page of a listing that ends among names of one hash is followed by one of the next hash.
    CollidersSkipped,
    /// Past versions of a name are counted with those of all names of its hash.
    VersionsOfColliders,
    /// A service that registers again loses what the operator said of it.
    FlagsLost,
    /// Free space is reported once.
    SpaceReportedOnce,
    /// Who knows the services is not told when their flags change.
    FlagsUnversioned,
    /// A file is fetched into its place, so that whoever is interrupted has neither the old nor the new one.
    GetWritesInPlace,
    /// A replay that is to be verified is always found equal.
    ReplayAlwaysEqual,
    /// The log may be trimmed beyond its newest checkpoint.
    TrimPastCheckpoint,
    /// Rows that do not give the stored hash are not reported.
    RescanBlind,
    /// The mark that was found is written anew, and synced only with the next one.
    MarkRenewedAfterSync,
    /// A block has its name before its bytes are synced.
    NamedBeforeSync,
    /// The turn of a write ends with its request, though the write goes on.
    TurnEndsWithRequest,
    /// How long a node was down is measured from its states, not from its logs.
    DownSinceStates,
    /// A reader whose certificates have expired goes on in the present content.
    RenewedOfPresent,
    /// A visit ends with the first full page of the last slot.
    LastSlotEndsEarly,
    /// The history of a name holds that of all names of its hash.
    HistoryOfColliders,
    /// The whole history of a name holds what is present of names of its hash.
    PresentOfColliders,
    /// Clients know entries by their hashes.
    CachedByHash,
    /// A change of free space that is no news is not kept.
    SmallMovesLost,
    /// Of many idle clients only one batch's share is forgotten.
    ForgettingEndsEarly,
    /// Records that find no room end their group.
    FullIsForGood,
    /// A raft group ends where it cannot read what another member needs.
    UnreadableEndsGroup,
    /// Damage at the end of a log is taken for what a power cut tore, also where all was synced.
    SyncedTailCut,
    /// What a mark says is believed, whether or not it is durable. A real bug once.
    CachedMarkBelieved,
    /// A disk's label is looked at before work only, however long that takes. A real bug once.
    LabelLookedAtOnce,
    /// A segment that the mark does not know goes on without it. A real bug once.
    SegmentGoesOnUnmarked,
    /// Who followed a clock that was ahead for a while stays ahead. A real bug once.
    FollowerStaysAhead,
    /// A command over several things whose last failure is certain does not say that an earlier one is unknown.
    UnknownOverwritten,
    /// A round of the check that could not look at everything clears what others found.
    PartialRoundClears,
    /// A report to the registry counts as told whether or not it was, and is not compared with the registry's row.
    ReportedBeforeTold,
    /// Whether disks hang is looked at before they are asked, and wait.
    HangingSeenEarly,
    /// A checkpoint lacks the rows that wait in memory.
    CheckpointOfWritten,
    /// An outcome that is forgotten stays in the stored row.
    ForgottenInMemory,
    /// A report of an earlier process that came late stays what the registry knows. A real bug once.
    LateReportStays,
    /// The oldest transaction in flight is in no listing.
    OldestNotListed,
    /// A block service looks at the time that its client says. A real bug once.
    DisksMindClients,
    /// The registry is told where a log is led when its node starts, and not when that changes.
    PlacedOnce,
    /// A replica goes on as if its reign had not ended.
    EndOfReignLost,
    /// A client asks the first of the registry's members alone.
    FirstRegistryOnly,
    /// A follower answers a read without having asked how much there is.
    FollowerReadsAtOnce,
    /// A member answers a read of a position that it has not applied.
    PositionIgnored,
    /// A client forgets that a transaction changed shards whose positions it does not know.
    TransactionsUnseen,
    /// What a node asks others is of a clock of its own, and what it is answered, too.
    UnsharedClock,
    /// The leader logs its own hash as that of all members.
    LeadersWord,
    /// A snapshot is called by a position that its state has not come to.
    SnapshotPastState,
    /// A member offers the snapshot that it has, whatever is asked for.
    OldSnapshotOffered,
    /// What a segment has restarted of a group is not taken away from the segments before it.
    EarlierNotCut,
    /// Who leads a life of a log that is over goes on when it hears of the next.
    LaterLifeIgnored,
    /// What the registry knows of disks is logged into a life of a log before it was asked whether that is over.
    LoggedBeforeAsked,
    /// A node answers those who believe in another life of its log.
    AnyLifeServed,
    /// A replica calls durable whatever it has applied, when it says what its log may forget.
    FloorsOfApplied,
    /// A list of services that was read long ago is logged by a new leader.
    OldListLogged,
    /// A map that was read earlier and comes later replaces a newer one.
    OlderMapStored,
    /// A member of a raft group answers for its vote before that is durable.
    VoteNotSynced,
    /// Every record that is read looks its place up again, and keeps all that was read with it. A real bug once.
    CursorForgotten,
    /// Who opens a stream is believed to have the cluster's key.
    AnyProofTaken,
    /// Who does not answer is handed a reign.
    HandedToAnybody,
    /// A client goes on to ask the same member of the registry, which cannot answer.
    ReaderKept,
    /// A client whose reads any member may answer goes on to ask those that were members, as long as they name who leads.
    FormerMembersKept,
    /// A leader that has no room for its log goes on to lead, whoever else has some.
    LeadsWithoutRoom,
    /// A client that has read the map before everything was in it does not read it again.
    YoungMapKept,
    /// A log is led by another node although that leads as many then as the one before had.
    BalancedForNothing,
    /// A member that is cut off, or is none any more, shows what it has as what there is.
    CutOffShows,
    /// A member that has what a snapshot has says so to whoever offers it, whomever it follows. A real bug once.
    SnapshotAnsweredUnasked,
    /// A member votes as soon as it has started.
    VotesAfterRestart,
    /// A leader whose machine was suspended believes in promises from before.
    LeaseThroughSuspension,
    /// Readers of a group are not told that a reign is over until something is delivered in the next one.
    StandingUntold,
    /// A segment that was found damaged when it was read is believed again at the next start.
    DamagedIndexKept,
    /// Small blocks are proven before they are synced.
    PackedUnsynced,
    /// What a start finds of small blocks is believed to be on the disk.
    PackedTailNotWrittenAgain,
    /// A start looks no further in a segment of small blocks than to what is damaged.
    ScanEndsAtDamage,
    /// That a record of a small block is dead is forgotten when its segment is moved.
    DeadForgotten,
    /// A copy of a small block that was torn when the power went is taken for the block.
    TornCopyTaken,
    /// A small block is proven erased while it may lie behind a write that failed.
    ErasedInDoubt,
    /// A hole is made in a record that says of another one that it is dead.
    HoleInDeath,
    /// A damaged small block goes with its segment.
    DamagedRecordRemoved,
    /// A block that is not where the metadata say is taken for one that will be.
    MissingNotRepaired,
    /// A disk that fails with what is written to it is given more.
    FailingDiskChosen,
    /// A read waits for a block that is late although others would do.
    LateAwaited,
    /// What was asked for in vain is not looked at.
    OwedForgotten,
    /// A disk that was found empty once is not looked at again, although what was being written is in use since.
    EmptiedAtOneLook,
    /// A disk that was condemned is not used again when it is back.
    CondemnedForGood,
    /// A damaged record of a group is in the way of what the group has since it was removed and began again.
    DamageOutlivesRemoval,
    /// A segment without an index is read from its beginning for each part of a group that is looked for.
    SegmentScannedForEach,
    /// Who was a member when a leader last looked is told as if most members had said so.
    UnconfirmedMembers,
    /// A leader that hears nothing of a quorum goes on to say that it leads.
    CutOffLeads,
    /// A member that has forgotten what it promised takes itself for one that the log begins on.
    RejoinsAsFounder,
    /// A node that is behind what others remember of it goes on.
    OwnCopyTaken,
    /// A node that is behind what is remembered of it is spoken to.
    OlderCopyTaken,
    /// Who was taken out of a log and has not heard of it is told what its reads must have seen.
    AnybodyReads,
    /// Members that do not answer are made voters, so many that nothing can be committed.
    SilentVotersTaken,
    /// Whoever asks changes the members of logs.
    AnybodyAdministers,
    /// Whoever asks changes the registry.
    AnybodyRegisters,
    /// The leader of a log raises its feature level when its own build knows it.
    LevelOfLeader,
    /// What is removed leaves its inline data behind.
    InlineLeaks,
    /// A log gets more changes of members than an older build among its members keeps.
    ManyChangesAtOnce,
    /// An invitation is good for whoever comes.
    InvitationTakenTwice,
    /// An invitation is good for ever.
    InvitationNeverOver,
    /// Whoever names an invitation is taken for who has its secret.
    AnyTokenTaken,
    /// A key of the cluster that was forgotten is believed until the next start.
    ForgottenKeyBelieved,
    /// A stream between nodes goes on when the key is forgotten that it was greeted under.
    StreamOutlivesKey,
    /// Whoever answers is believed to have the cluster's key.
    AnyAnswerTaken,
    /// A node that comes back with another identity is spoken to.
    AnyIdentityTaken,
    /// A node asks every peer to prove the same.
    ChallengeRepeated,
    /// What a new leader's records replace is only taken away in memory.
    TruncationLost,
    /// A member of a raft group says that its records are durable before they are.
    UnsyncedAcknowledged,
    /// A reader of a raft group is given what is not durable on its own disk.
    DeliveredUnsynced,
    /// The leader of a raft group counts records as held by a member to which it has only sent them.
    AppendAssumed,
    /// A leader answers barriers without asking anybody.
    ReadWithoutQuorum,
    /// A raft group that begins behind a snapshot does not say who belongs to it.
    SnapshotWithoutMembers,
    /// A raft group forgets whatever it has delivered, not what its replica has no need of.
    PurgedAboveFloor,
}

impl Mutant {
    /// Every planted bug and the checkers one of which must find it; behind `tools` a test of `cli/tests/tools.rs`, behind `replicas`
    /// in worlds where every log has several members.
    /// Those of `units` are planted by tests beside the code, which are named.
    pub const ALL: [(Mutant, &'static [&'static str]); 165] = [
        (Mutant::AcknowledgeBeforeSync, &["outcomes", "log", "state hash", "transactions"]),
        (Mutant::ApplyReadsClock, &["state hash"]),
        (Mutant::PositionWrittenApart, &["state hash", "linearizability"]),
        (Mutant::StepNotIdempotent, &["invariants", "oracle", "transactions"]),
        (Mutant::RollbackForgets, &["transactions", "invariants"]),
        (Mutant::DuplicateCreate, &["oracle", "linearizability", "outcomes"]),
        (Mutant::UnlockSkipped, &["oracle", "invariants"]),
        (Mutant::HashIgnoresDelete, &["state hash"]),
        (Mutant::BlockErasedInUse, &["data"]),
        (Mutant::CrcUnchecked, &["data"]),
        (Mutant::CrcNotBound, &["certificates"]),
        (Mutant::SignatureUnchecked, &["certificates"]),
        (Mutant::LoopThroughMoves, &["invariants", "convergence"]),
        (Mutant::ReadBeforeCatchUp, &["linearizability", "linearizability by search"]),
        (Mutant::TimeGoesBack, &["log time", "linearizability", "oracle"]),
        (Mutant::OutcomeForgottenEarly, &["oracle", "linearizability", "outcomes", "transactions"]),
        (Mutant::UnknownIsRefused, &["outcomes", "transactions"]),
        (Mutant::RemoveNotEmpty, &["oracle", "linearizability"]),
        (Mutant::LockIgnored, &["oracle", "linearizability"]),
        (Mutant::FirstTryNotIndexed, &["invariants"]),
        (Mutant::ListingSkips, &["linearizability"]),
        (Mutant::EdgeTimeForgotten, &["invariants", "oracle", "linearizability"]),
        (Mutant::WalkEndsEarly, &["invariants", "convergence"]),
        (Mutant::OlderLeaderPlaced, &["late placement"]),
        (Mutant::ServicesUnknown, &["just started"]),
        (Mutant::EraseBeforeGrantsEnd, &["leaks"]),
        (Mutant::PolicyNotRechecked, &["oracle", "linearizability"]),
        (Mutant::OwnPolicyIgnored, &["oracle", "linearizability"]),
        (Mutant::InlineLeaks, &["invariants"]),
        (Mutant::SharedUseNotCounted, &["invariants", "oracle"]),
        (Mutant::PublishIgnoresExpected, &["oracle", "linearizability"]),
        (Mutant::SwapNotIndexed, &["invariants"]),
        (Mutant::ContentLeaks, &["invariants", "oracle"]),
        (Mutant::LiveTransientCollected, &["oracle", "linearizability"]),
        (Mutant::EndedMoveForgotten, &["invariants", "convergence"]),
        (Mutant::EmptyDiskUsed, &["data"]),
        (Mutant::TagFromWallClock, &["clock"]),
        (Mutant::GrantByWallClock, &["clock"]),
        (Mutant::SignedLongAgoBelieved, &["late write"]),
        (Mutant::UnknownTimeTold, &["late write"]),
        (Mutant::WallVouchesForAll, &["late write"]),
        (Mutant::JumpBelieved, &["clock"]),
        (Mutant::JumpSavedUp, &["led ahead"]),
        (Mutant::RefusedGoesOn, &["led ahead"]),
        (Mutant::TailNotWrittenAgain, &["log", "convergence", "outcomes", "state hash"]),
        (Mutant::SettledUnsynced, &["steps"]),
        (Mutant::GoneUnsynced, &["steps"]),
        (Mutant::SegmentNameUnsynced, &["steps"]),
        (Mutant::UndoTakesTooMuch, &["batches"]),
        (Mutant::RemovalNotUndone, &["batches"]),
        (Mutant::ScanEndsEarly, &["batches"]),
        (Mutant::RefusalNotRecorded, &["batches"]),
        (Mutant::HistoryCutAtWrongEnd, &["linearizability"]),
        (Mutant::SecondPageOfNewer, &["linearizability", "data"]),
        (Mutant::CollidersSkipped, &["linearizability"]),
        (Mutant::VersionsOfColliders, &["oracle", "linearizability"]),
        (Mutant::FlagsLost, &["registry"]),
        (Mutant::SpaceReportedOnce, &["registry"]),
        (Mutant::FlagsUnversioned, &["registry"]),
        (Mutant::GetWritesInPlace, &["tools", "commands_that_fail_change_nothing"]),
        (Mutant::ReplayAlwaysEqual, &["tools", "what_verifies_is_red_when_something_differs"]),
        (
            Mutant::TrimPastCheckpoint,
            &["tools", "in_any_order_of_upkeep_every_log_replays_from_what_is_kept"],
        ),
        (Mutant::RescanBlind, &["tools", "what_verifies_is_red_when_something_differs"]),
        (Mutant::MarkRenewedAfterSync, &["steps"]),
        (Mutant::NamedBeforeSync, &["steps"]),
        (Mutant::TurnEndsWithRequest, &["steps"]),
        (Mutant::DownSinceStates, &["convergence", "clock"]),
        (Mutant::LastSlotEndsEarly, &["linearizability"]),
        (Mutant::HistoryOfColliders, &["linearizability"]),
        (Mutant::PresentOfColliders, &["linearizability"]),
        (Mutant::CachedByHash, &["names"]),
        (Mutant::SmallMovesLost, &["registry"]),
        (Mutant::ForgettingEndsEarly, &["batches"]),
        (Mutant::CachedMarkBelieved, &["steps"]),
        (Mutant::FullIsForGood, &["units", "tests::room::planted_bugs_are_found"]),
        (Mutant::UnreadableEndsGroup, &["units", "tests::unreadable::planted_bugs_are_found"]),
        (Mutant::SyncedTailCut, &["units", "tests::flips::planted_bugs_are_found"]),
        (Mutant::LabelLookedAtOnce, &["steps"]),
        (Mutant::SegmentGoesOnUnmarked, &["steps"]),
        (Mutant::FollowerStaysAhead, &["units", "hlc::tests::planted_bugs_are_found"]),
        (Mutant::UnknownOverwritten, &["units", "commands::fs::failures::tests::planted_bugs_are_found"]),
        (Mutant::PartialRoundClears, &["units", "fsck::tests::planted_bugs_are_found"]),
        (Mutant::ReportedBeforeTold, &["registry"]),
        (Mutant::HangingSeenEarly, &["hanging"]),
        (Mutant::CheckpointOfWritten, &["batches"]),
        (Mutant::ForgottenInMemory, &["batches"]),
        (Mutant::LateReportStays, &["late reports"]),
        (Mutant::RenewedOfPresent, &["slow reader"]),
        (Mutant::OldestNotListed, &["transactions"]),
        (Mutant::DisksMindClients, &["led ahead"]),
        (Mutant::PlacedOnce, &["replicas", "convergence"]),
        (Mutant::EndOfReignLost, &["replicas", "convergence", "panic"]),
        (Mutant::FirstRegistryOnly, &["replicas", "convergence"]),
        (Mutant::FollowerReadsAtOnce, &["replicas", "linearizability", "linearizability by search"]),
        (Mutant::PositionIgnored, &["replicas", "session"]),
        (Mutant::TransactionsUnseen, &["replicas", "session"]),
        (Mutant::UnsharedClock, &["causality"]),
        (Mutant::LeadersWord, &["diverged"]),
        (Mutant::SnapshotPastState, &["replicas", "state hash", "convergence", "panic"]),
        (Mutant::OldSnapshotOffered, &["old snapshot"]),
        (Mutant::FloorsOfApplied, &["replicas", "log"]),
        (Mutant::OldListLogged, &["replicas", "registry"]),
        (Mutant::LaterLifeIgnored, &["begun anew"]),
        (Mutant::LoggedBeforeAsked, &["begun anew"]),
        (Mutant::AnyLifeServed, &["begun anew"]),
        (Mutant::VoteNotSynced, &["units", "tests::votes::planted_bugs_are_found"]),
        (Mutant::CursorForgotten, &["units", "tests::reads::planted_bugs_are_found"]),
        (Mutant::AnyProofTaken, &["units", "tests::greetings::proof::planted_bugs_are_found"]),
        (Mutant::HandedToAnybody, &["units", "tests::members::handed::planted_bugs_are_found"]),
        (Mutant::FormerMembersKept, &["units", "rpc::tests::former::planted_bugs_are_found"]),
        (Mutant::ReaderKept, &["units", "rpc::tests::planted_bugs_are_found"]),
        (Mutant::LeadsWithoutRoom, &["units", "room::tests::planted_bugs_are_found"]),
        (Mutant::PackedUnsynced, &["steps"]),
        (Mutant::PackedTailNotWrittenAgain, &["steps"]),
        (Mutant::ScanEndsAtDamage, &["units", "packed::tests::scanned::planted_bugs_are_found"]),
        (Mutant::TornCopyTaken, &["units", "packed::tests::torn::planted_bugs_are_found"]),
        (Mutant::ErasedInDoubt, &["units", "packed::tests::doubtful::planted_bugs_are_found"]),
        (Mutant::HoleInDeath, &["units", "packed::tests::holes::planted_bugs_are_found"]),
        (Mutant::DeadForgotten, &["units", "packed::tests::buried::planted_bugs_are_found"]),
        (Mutant::DamagedRecordRemoved, &["units", "packed::tests::damaged::planted_bugs_are_found"]),
        (Mutant::MissingNotRepaired, &["healing"]),
        (Mutant::FailingDiskChosen, &["units", "service::tests::failing::planted_bugs_are_found"]),
        (Mutant::LateAwaited, &["hanging"]),
        (Mutant::OwedForgotten, &["healing"]),
        (Mutant::EmptiedAtOneLook, &["healing"]),
        (Mutant::CondemnedForGood, &["healing"]),
        (Mutant::SegmentScannedForEach, &["units", "tests::groups::again::planted_bugs_are_found"]),
        (Mutant::DamageOutlivesRemoval, &["units", "tests::groups::again::planted_bugs_are_found"]),
        (Mutant::DamagedIndexKept, &["units", "tests::groups::closed::planted_bugs_are_found"]),
        (Mutant::SnapshotAnsweredUnasked, &["units", "tests::votes::snapshot::planted_bugs_are_found"]),
        (Mutant::VotesAfterRestart, &["units", "tests::lease::restart::planted_bugs_are_found"]),
        (Mutant::LeaseThroughSuspension, &["units", "tests::lease::suspension::planted_bugs_are_found"]),
        (Mutant::StandingUntold, &["units", "tests::standing::planted_bugs_are_found"]),
        (Mutant::YoungMapKept, &["units", "rpc::tests::young::planted_bugs_are_found"]),
        (Mutant::BalancedForNothing, &["units", "several::balance::tests::planted_bugs_are_found"]),
        (Mutant::CutOffShows, &["cut off"]),
        (Mutant::UnconfirmedMembers, &["units", "confirmed::tests::planted_bugs_are_found"]),
        (Mutant::CutOffLeads, &["units", "tests::members::cut_off::planted_bugs_are_found"]),
        (Mutant::RejoinsAsFounder, &["units", "tests::members::forgotten::planted_bugs_are_found"]),
        (Mutant::OwnCopyTaken, &["units", "tests::copies::own::planted_bugs_are_found"]),
        (Mutant::OlderCopyTaken, &["units", "tests::copies::others::planted_bugs_are_found"]),
        (Mutant::AnybodyRegisters, &["denied"]),
        (Mutant::LevelOfLeader, &["joining"]),
        (Mutant::ManyChangesAtOnce, &["joining"]),
        (Mutant::InvitationTakenTwice, &["joining"]),
        (Mutant::InvitationNeverOver, &["joining"]),
        (Mutant::AnyTokenTaken, &["joining"]),
        (Mutant::ForgottenKeyBelieved, &["units", "rotation::tests::planted_bugs_are_found"]),
        (Mutant::StreamOutlivesKey, &["units", "tests::greetings::outlived::planted_bugs_are_found"]),
        (Mutant::AnybodyReads, &["units", "tests::members::removed::planted_bugs_are_found"]),
        (Mutant::SilentVotersTaken, &["units", "tests::members::silent::planted_bugs_are_found"]),
        (
            Mutant::AnybodyAdministers,
            &["tools", "who_has_not_the_key_of_a_cluster_does_not_change_its_members"],
        ),
        (Mutant::AnyAnswerTaken, &["units", "tests::greetings::answer::planted_bugs_are_found"]),
        (Mutant::AnyIdentityTaken, &["units", "identities::tests::planted_bugs_are_found"]),
        (Mutant::ChallengeRepeated, &["units", "tests::greetings::challenge::planted_bugs_are_found"]),
        (Mutant::TruncationLost, &["units", "tests::nemesis::truncation::planted_bugs_are_found"]),
        (Mutant::UnsyncedAcknowledged, &["units", "tests::nemesis::sync::planted_bugs_are_found"]),
        (Mutant::DeliveredUnsynced, &["units", "tests::nemesis::delivery::planted_bugs_are_found"]),
        (Mutant::AppendAssumed, &["units", "tests::nemesis::quorum::planted_bugs_are_found"]),
        (Mutant::ReadWithoutQuorum, &["units", "tests::nemesis::barriers::planted_bugs_are_found"]),
        (Mutant::SnapshotWithoutMembers, &["units", "tests::nemesis::members::planted_bugs_are_found"]),
        (Mutant::PurgedAboveFloor, &["units", "tests::nemesis::floors::planted_bugs_are_found"]),
        (Mutant::EarlierNotCut, &["units", "tests::planted_bugs_are_found"]),
        (Mutant::OlderMapStored, &["units", "routes::tests::planted_bugs_are_found"]),
        (Mutant::RenewedHoweverLate, &["units", "verdict::tests::planted_bugs_are_found"]),
    ];
}

#[cfg(feature = "mutants")]
mod active {
    use std::{
        cell::Cell,
        sync::atomic::{AtomicU8, Ordering},
    };

    use super::Mutant;

    thread_local! {
        static ACTIVE: Cell<Option<Mutant>> = const { Cell::new(None) };
        static TICKS: Cell<u64> = const { Cell::new(0) };
    }

    /// The bug of the whole process; 0 for none.
    static EVERYWHERE: AtomicU8 = AtomicU8::new(0);

    /// Plants the bug of that name in everything that this process runs; false when there is none.
    pub fn plant_everywhere(name: &str) -> bool {
        let found = Mutant::ALL.iter().find(|(mutant, _)| format!("{mutant:?}") == name);
        if let Some((mutant, _)) = found {
            EVERYWHERE.store(*mutant as u8, Ordering::Relaxed);
        }
        found.is_some()
    }

    /// Plants a bug in everything that this thread runs, or takes it out again.
    pub fn plant(mutant: Option<Mutant>) {
        ACTIVE.set(mutant);
    }

    /// The bug that is planted.
    pub fn planted() -> Option<Mutant> {
        ACTIVE.get()
    }

    /// Whether this bug is planted.
    pub fn is(mutant: Mutant) -> bool {
        ACTIVE.get() == Some(mutant) || EVERYWHERE.load(Ordering::Relaxed) == mutant as u8
    }

    /// A number that goes on by itself.
    pub fn ticks() -> u64 {
        TICKS.set(TICKS.get() + 1);
        TICKS.get()
    }
}

#[cfg(not(feature = "mutants"))]
mod active {
    use super::Mutant;

    /// Plants nothing, in this build.
    #[inline(always)]
    pub const fn plant(_: Option<Mutant>) {}

    /// The bug that is planted: none, in this build.
    #[inline(always)]
    pub const fn planted() -> Option<Mutant> {
        None
    }

    /// Whether this bug is planted: never, in this build.
    #[inline(always)]
    pub const fn is(_: Mutant) -> bool {
        false
    }

    /// A number that goes on by itself; stands still in this build.
    #[inline(always)]
    pub const fn ticks() -> u64 {
        0
    }
}

pub use active::*;
