//! Directories' policies: what new files get, and how long old versions stay.
//!
//! A part that a directory does not set comes from its parent; whoever asks walks up the parents. What is collected by
//! a policy is compared with it again in `apply`, by the log's time.

use clutch_proto::{
    Time,
    mutants::{self, Mutant},
    rules::v1::{
        CELL_BYTES_MAX, DATA_BLOCKS_MAX, INLINE_BYTES_MAX, INLINE_FILE_BYTES_MAX, PAGE_BYTES,
        PARITY_BLOCKS_MAX, POLICY_CLASSES_MAX, SNAPSHOT_VERSIONS_MAX, SPAN_BYTES_MAX,
    },
    shard::{InodeRow, SetPolicy, shard_reply::Reply},
    types::{
        Code, DirectoryPolicy, InlinePolicy, PolicyPart, SnapshotPolicy, SpanClasses, StorageClasses,
        StripePolicy,
    },
};
use clutch_state::{Stop, Tx};

use crate::{
    inode,
    rows::{Reapplied, parse_directory},
};

fn bad(what: String) -> Stop {
    Stop::refuse(Code::InvalidArgument, what)
}

fn check_snapshot(policy: &SnapshotPolicy) -> Result<(), Stop> {
    match policy.versions {
        Some(versions) if versions > SNAPSHOT_VERSIONS_MAX => {
            Err(bad(format!("{versions} versions; at most {SNAPSHOT_VERSIONS_MAX} are allowed")))
        }
        _ => Ok(()),
    }
}

fn check_sizes(what: &str, sizes: impl Iterator<Item = u32>) -> Result<(), Stop> {
    let sizes: Vec<u32> = sizes.collect();
    if sizes.is_empty() || sizes.len() > POLICY_CLASSES_MAX {
        return Err(bad(format!("{} {what}; 1 to {POLICY_CLASSES_MAX} are allowed", sizes.len())));
    }
    if !sizes.is_sorted_by(|a, b| a < b) {
        return Err(bad(format!("{what} must be in the order of their sizes, each size once")));
    }
    Ok(())
}

fn check_spans(policy: &SpanClasses) -> Result<(), Stop> {
    check_sizes("classes of spans", policy.classes.iter().map(|c| c.size_max))?;
    for class in &policy.classes {
        if class.size_max < PAGE_BYTES || class.size_max > SPAN_BYTES_MAX {
            let text =
                format!("spans of {} bytes; {PAGE_BYTES} to {SPAN_BYTES_MAX} are allowed", class.size_max);
            return Err(bad(text));
        }
        let (data, parity) = (class.data_blocks, class.parity_blocks);
        if data == 0 || data > DATA_BLOCKS_MAX || parity > PARITY_BLOCKS_MAX {
            let text = format!(
                "{data} data and {parity} parity blocks; 1 to {DATA_BLOCKS_MAX} and 0 to {PARITY_BLOCKS_MAX} are \
                 allowed"
            );
            return Err(bad(text));
        }
    }
    Ok(())
}

fn check_storage(policy: &StorageClasses) -> Result<(), Stop> {
    check_sizes("storage classes", policy.classes.iter().map(|c| c.size_min))
}

fn check_stripe(policy: &StripePolicy) -> Result<(), Stop> {
    let cell = policy.cell_size;
    if cell == 0 || !cell.is_multiple_of(PAGE_BYTES) || cell > CELL_BYTES_MAX {
        let text =
            format!("cells of {cell} bytes; multiples of {PAGE_BYTES} up to {CELL_BYTES_MAX} are allowed");
        return Err(bad(text));
    }
    Ok(())
}

fn check_inline(policy: &InlinePolicy) -> Result<(), Stop> {
    let size_max = policy.size_max as usize;
    if size_max != 0 && !(INLINE_BYTES_MAX..=INLINE_FILE_BYTES_MAX).contains(&size_max) {
        let text = format!(
            "files of up to {size_max} bytes in the metadata; {INLINE_BYTES_MAX} to {INLINE_FILE_BYTES_MAX} are allowed, and 0 for no \
             more than has to be"
        );
        return Err(bad(text));
    }
    Ok(())
}

/// Refuses parts that this build does not know, before they are logged.
pub(crate) fn check_parts(op: &SetPolicy) -> Result<(), Stop> {
    let is_known = |part: &i32| !matches!(PolicyPart::try_from(*part), Ok(PolicyPart::Unspecified) | Err(_));
    match op.inherit.iter().find(|part| !is_known(part)) {
        Some(part) => Err(bad(format!("{part} is not a part of a policy"))),
        None => Ok(()),
    }
}

/// Changes the parts that are named.
pub(crate) fn set(tx: &mut Tx<'_>, time: Time, op: SetPolicy) -> Reapplied {
    let id = parse_directory(tx, op.id)?;
    let row = inode::get(tx, id)?;
    let mut policy = row.policy.clone().unwrap_or_default();
    let change = op.policy.unwrap_or_default();
    change.snapshot.as_ref().map_or(Ok(()), check_snapshot)?;
    change.spans.as_ref().map_or(Ok(()), check_spans)?;
    change.storage.as_ref().map_or(Ok(()), check_storage)?;
    change.stripe.as_ref().map_or(Ok(()), check_stripe)?;
    change.inline.as_ref().map_or(Ok(()), check_inline)?;
    for part in &op.inherit {
        match PolicyPart::try_from(*part) {
            Ok(PolicyPart::Snapshot) => policy.snapshot = None,
            Ok(PolicyPart::Spans) => policy.spans = None,
            Ok(PolicyPart::Storage) => policy.storage = None,
            Ok(PolicyPart::Stripe) => policy.stripe = None,
            Ok(PolicyPart::Inline) => policy.inline = None,
            // Refused before it is logged, so that a newer build logged it.
            Ok(PolicyPart::Unspecified) | Err(_) => {
                return Err(Stop::unknown(format!("part {part} of a policy")));
            }
        }
    }
    policy.snapshot = change.snapshot.or(policy.snapshot);
    policy.spans = change.spans.or(policy.spans);
    policy.storage = change.storage.or(policy.storage);
    policy.stripe = change.stripe.or(policy.stripe);
    policy.inline = change.inline.or(policy.inline);
    let policy = Some(policy).filter(|p| *p != DirectoryPolicy::default());
    let row = InodeRow { policy, ctime: time.0, ..row };
    inode::put(tx, id, &row);
    Ok(Reply::Attributes(inode::attributes(id, row)))
}

/// Whether a policy lets something go that ended at a time. `newer` counts the newer versions, as far as it
/// is told.
pub(crate) fn may_go(
    policy: Option<&SnapshotPolicy>,
    time: Time,
    ended_at: u64,
    newer: impl FnOnce(usize) -> Result<usize, Stop>,
) -> Result<(), Stop> {
    let policy = policy.copied().unwrap_or_default();
    check_snapshot(&policy)?;
    let is_old = policy.age_ms.is_some_and(|age| time >= Time(ended_at).plus_ms(age));
    if is_old || mutants::is(Mutant::PolicyNotRechecked) {
        return Ok(());
    }
    if let Some(versions) = policy.versions
        && newer(versions as usize)? >= versions as usize
    {
        return Ok(());
    }
    Err(Stop::refuse(Code::TooEarly, "the policy still keeps it"))
}

/// The same for what lies in a directory whose row is at hand: its own policy, as it is by now, must let it go, too. One that
/// was replaced after it was read decides no more; what a directory inherits is read again by who asks.
pub(crate) fn may_go_from(
    directory: &InodeRow,
    policy: Option<&SnapshotPolicy>,
    time: Time,
    ended_at: u64,
    mut newer: impl FnMut(usize) -> Result<usize, Stop>,
) -> Result<(), Stop> {
    may_go(policy, time, ended_at, &mut newer)?;
    match directory.policy.as_ref().and_then(|own| own.snapshot.as_ref()) {
        Some(own) if !mutants::is(Mutant::OwnPolicyIgnored) => may_go(Some(own), time, ended_at, newer),
        _ => Ok(()),
    }
}
