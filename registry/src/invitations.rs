//! Invitations: who may join the cluster with a node, once each, and under which number.

use clutch_proto::{
    Time,
    mutants::{self, Mutant},
    registry::{InvitationRow, InviteNode, RedeemInvitation, RegistryReply, Welcome},
    rules::v1::{INVITATION_LIFETIME_MS_MAX, INVITATION_SWEPT_AFTER_MS, INVITATIONS_MAX, NODE_NUMBER_MAX},
    types::Code,
};
use clutch_state::{Stop, Tx, store::decode_row};

use crate::{cluster, tables};

/// An invitation that is over is remembered for so long: longer than a request is good that makes one.
const SWEPT_AFTER_NS: u64 = INVITATION_SWEPT_AFTER_MS * 1_000_000;

/// Makes an invitation, and forgets those that are over.
pub(crate) fn invite(tx: &mut Tx<'_>, time: Time, op: InviteNode) -> Result<RegistryReply, Stop> {
    cluster(tx)?;
    if op.invitation == 0 || op.lifetime_ms == 0 || op.lifetime_ms > INVITATION_LIFETIME_MS_MAX {
        let text =
            format!("an invitation needs a number, and is good for 1 to {INVITATION_LIFETIME_MS_MAX} ms");
        return Err(Stop::refuse(Code::InvalidArgument, text));
    }
    let key = tables::invitation_key(op.invitation);
    let mut left = 0;
    for (known, value) in tx.scan(tables::INVITATION, &[], &[], INVITATIONS_MAX)? {
        let row: InvitationRow = decode_row(tables::INVITATION, &known, value)?;
        // Not at once: what was recorded of its making must not make it again.
        if row.expires_at.saturating_add(SWEPT_AFTER_NS) <= time.0 {
            tx.delete(tables::INVITATION, &known);
        } else if known[..] == key {
            return Err(Stop::refuse(Code::Exists, "there is an invitation of this number"));
        } else {
            left += 1;
        }
    }
    if left >= INVITATIONS_MAX {
        let text = format!("there are {INVITATIONS_MAX} invitations already: wait until some are over");
        return Err(Stop::refuse(Code::TooLarge, text));
    }
    let row = InvitationRow { expires_at: time.plus_ms(op.lifetime_ms).0, ..InvitationRow::default() };
    tx.put_row(tables::INVITATION, &key, &row);
    Ok(RegistryReply::default())
}

/// Gives whoever takes an invitation first a number for the node, and the same one when asked again.
pub(crate) fn redeem(tx: &mut Tx<'_>, time: Time, op: RedeemInvitation) -> Result<RegistryReply, Stop> {
    let mut of_cluster = cluster(tx)?;
    if op.joiner == 0 || op.least_node == 0 {
        return Err(Stop::refuse(Code::InvalidArgument, "who joins needs a number, and so does a node"));
    }
    let key = tables::invitation_key(op.invitation);
    let row: Option<InvitationRow> = tx.get_row(tables::INVITATION, &key)?;
    let is_good = |row: &InvitationRow| row.expires_at > time.0 || mutants::is(Mutant::InvitationNeverOver);
    let Some(row) = row.filter(is_good) else {
        let text = "the invitation is over, or of another cluster: make another (clutch cluster invite)";
        return Err(Stop::refuse(Code::Permission, text));
    };
    let node = match row.joiner {
        taken if taken == op.joiner => row.node,
        0 => number_of(&mut of_cluster.node_last, op.least_node)?,
        _ if mutants::is(Mutant::InvitationTakenTwice) => {
            number_of(&mut of_cluster.node_last, op.least_node)?
        }
        _ => {
            let text = "the invitation has been used already: make another (clutch cluster invite)";
            return Err(Stop::refuse(Code::Permission, text));
        }
    };
    tx.put_row(tables::CLUSTER, &[], &of_cluster);
    tx.put_row(tables::INVITATION, &key, &InvitationRow { joiner: op.joiner, node, ..row });
    Ok(RegistryReply { welcome: Some(Welcome { node, ..Welcome::default() }), ..RegistryReply::default() })
}

/// The next number: above all that were given, and at least this one.
fn number_of(last: &mut u64, least: u64) -> Result<u64, Stop> {
    let number = last.saturating_add(1).max(least);
    if number > NODE_NUMBER_MAX {
        let text = format!("nodes have numbers up to {NODE_NUMBER_MAX}");
        return Err(Stop::refuse(Code::InvalidArgument, text));
    }
    *last = number;
    Ok(number)
}
