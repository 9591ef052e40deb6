//! Linearizability of single names by search, without a word from the logs (Wing and Gong, 1993; Lowe, 2017): is there
//! any order of the requests on one name of one directory that explains all answers?
//!
//! Histories are cut where nothing is in progress; the states in which a piece can end are those in which the next can
//! begin. A request whose end nobody saw may take effect at any later time, or never.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use clutch_client::{ClientError, Freshness};
use clutch_proto::{
    cdc::{CdcReply, CdcRequest, cdc_request},
    session::Role,
    shard::{
        CreateFile, CreateInline, CreateSymlink, LinkFile, ShardReply, shard_reply::Reply, shard_request::Op,
    },
    types::Code,
};
use prost::Message as _;

use super::{Evidence, Violation};
use crate::history::Record;

/// Requests of one piece, and lost requests of one name, that are searched; longer ones are left to the other checker.
const PIECE_MAX: usize = 14;
const LOST_MAX: usize = 5;

/// What a name leads to: inode and time of the edge. An edge that nobody was told of has the number of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Meaning {
    /// Nothing.
    Free,
    /// A known edge.
    Edge(u64, u64),
    /// The edge of a request whose answer nobody saw.
    Untold(usize),
}

/// A request on one name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// The name gets a meaning; with `replace` it may have had one before.
    Put {
        /// What it leads to from then on, if anybody was told.
        edge: Option<(u64, u64)>,
        /// Whatever it meant before.
        replace: bool,
    },
    /// The name loses the meaning that the request names.
    Take(u64, u64),
    /// The name had this meaning.
    Saw(Option<(u64, u64)>),
    /// The name had some meaning.
    SawSomething,
}

/// A request with its time.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// When it began.
    pub began: u64,
    /// When it ended; `None` when nobody saw that.
    pub ended: Option<u64>,
    /// What it did, if it did anything.
    pub act: Act,
}

fn execute(state: Meaning, number: usize, act: Act) -> Option<Meaning> {
    let is = |edge: (u64, u64)| match state {
        Meaning::Free => false,
        Meaning::Edge(target, at) => (target, at) == edge,
        Meaning::Untold(_) => true,
    };
    match act {
        Act::Put { edge, replace } => {
            let fits = state == Meaning::Free || replace;
            fits.then(|| edge.map_or(Meaning::Untold(number), |(target, at)| Meaning::Edge(target, at)))
        }
        Act::Take(target, at) => is((target, at)).then_some(Meaning::Free),
        Act::Saw(None) => (state == Meaning::Free).then_some(state),
        Act::Saw(Some(edge)) => is(edge).then_some(Meaning::Edge(edge.0, edge.1)),
        Act::SawSomething => (state != Meaning::Free).then_some(state),
    }
}

/// Whether some order explains all requests; `None` when there are too many to search.
pub fn explains(requests: &[Request]) -> Option<bool> {
    let mut seen: Vec<(usize, Request)> =
        requests.iter().copied().enumerate().filter(|(_, r)| r.ended.is_some()).collect();
    let lost: Vec<(usize, Request)> =
        requests.iter().copied().enumerate().filter(|(_, r)| r.ended.is_none()).collect();
    if lost.len() > LOST_MAX {
        return None;
    }
    seen.sort_by_key(|(_, r)| r.began);
    // A state, and which lost requests have taken effect.
    let mut states: BTreeSet<(Meaning, u32)> = BTreeSet::from([(Meaning::Free, 0)]);
    let mut from = 0;
    while from < seen.len() {
        let (mut to, mut latest) = (from + 1, seen[from].1.ended);
        while to < seen.len() && Some(seen[to].1.began) < latest {
            latest = latest.max(seen[to].1.ended);
            to += 1;
        }
        let piece = &seen[from..to];
        if piece.len() > PIECE_MAX {
            return None;
        }
        states = search(piece, &lost, states);
        if states.is_empty() {
            return Some(false);
        }
        from = to;
    }
    Some(true)
}

/// The states in which a piece can end.
fn search(
    piece: &[(usize, Request)],
    lost: &[(usize, Request)],
    begin: BTreeSet<(Meaning, u32)>,
) -> BTreeSet<(Meaning, u32)> {
    let all = (1u32 << piece.len()) - 1;
    let mut open: Vec<(u32, Meaning, u32)> =
        begin.into_iter().map(|(state, used)| (0, state, used)).collect();
    let mut known: BTreeSet<(u32, Meaning, u32)> = open.iter().copied().collect();
    let mut ends = BTreeSet::new();
    while let Some((done, state, used)) = open.pop() {
        if done == all {
            ends.insert((state, used));
        }
        let left = |i: usize| done & 1 << i == 0;
        // Whatever has ended must come before whatever began after that.
        let first_end =
            (0..piece.len()).filter(|i| left(*i)).filter_map(|i| piece[i].1.ended).min().unwrap_or(u64::MAX);
        let mut push = |next: (u32, Meaning, u32)| {
            if known.insert(next) {
                open.push(next);
            }
        };
        for (i, (number, request)) in piece.iter().enumerate().filter(|(i, _)| left(*i)) {
            if request.began < first_end
                && let Some(next) = execute(state, *number, request.act)
            {
                push((done | 1 << i, next, used));
            }
        }
        let latest = piece.iter().filter_map(|(_, r)| r.ended).max().unwrap_or(0);
        for (i, (number, request)) in lost.iter().enumerate().filter(|(i, _)| used & 1 << i == 0) {
            let may_begin = request.began < first_end.min(latest.saturating_add(1));
            if may_begin && let Some(next) = execute(state, *number, request.act) {
                push((done, next, used | 1 << i));
            }
        }
    }
    ends
}

type Name = (u64, Bytes);

/// What a request did to which names.
fn acts(record: &Record) -> Vec<(Name, Request)> {
    let (began, ended) = (record.began, record.ended.as_ref().map(|e| e.order));
    let result = record.ended.as_ref().map(|e| &e.result);
    let unknown = matches!(result, None | Some(Err(ClientError::Unknown(_) | ClientError::Declined(_))));
    let code = match result {
        Some(Err(ClientError::Refused(refusal))) => Some(refusal.code),
        _ => None,
    };
    let at = |name: Name, act: Act| (name, Request { began, ended: if unknown { None } else { ended }, act });
    let put = |name: Name, edge: Option<(u64, u64)>, replace: bool| match (edge, unknown, code) {
        (Some(_), ..) | (None, true, _) => vec![at(name, Act::Put { edge, replace })],
        (None, false, Some(Code::Exists)) => vec![at(name, Act::SawSomething)],
        _ => vec![],
    };
    let done = matches!(result, Some(Ok(_)));
    let take = |name: Name, target: u64, created_at: u64| match (done, unknown, code) {
        (true, ..) | (false, true, _) => vec![at(name, Act::Take(target, created_at))],
        _ => vec![],
    };
    if record.call.role == Role::Cdc {
        let Some(op) = CdcRequest::decode(record.call.body.clone()).ok().and_then(|r| r.op) else {
            return vec![];
        };
        let reply = match result {
            Some(Ok(bytes)) => CdcReply::decode(bytes.clone()).ok(),
            _ => None,
        };
        let edge = reply.map(|r| (r.id, r.created_at));
        return match op {
            cdc_request::Op::MakeDirectory(op) => put((op.parent, op.name), edge, false),
            cdc_request::Op::RemoveDirectory(op) => take((op.parent, op.name), op.target, op.created_at),
            cdc_request::Op::RenameFile(op) => {
                let mut acts = take((op.old_parent, op.old_name), op.target, op.created_at);
                // An "exists" of a move may be of either name.
                acts.extend(
                    put((op.new_parent, op.new_name), edge, true).into_iter().filter(|_| code.is_none()),
                );
                acts
            }
            cdc_request::Op::RenameDirectory(op) => {
                let mut acts = take((op.old_parent, op.old_name), op.target, op.created_at);
                acts.extend(
                    put((op.new_parent, op.new_name), edge, false).into_iter().filter(|_| code.is_none()),
                );
                acts
            }
            cdc_request::Op::UndeleteDirectory(op) => put((op.parent, op.name), edge, false),
            // Of what is past, names know nothing.
            cdc_request::Op::ForgetFile(_)
            | cdc_request::Op::ForgetDirectory(_)
            | cdc_request::Op::ListTransactions(_) => vec![],
        };
    }
    let request = clutch_proto::shard::ShardRequest::decode(record.call.body.clone());
    let Some(op) = request.ok().and_then(|r| r.op) else { return vec![] };
    let answered = |bytes: &bytes::Bytes| ShardReply::decode(bytes.clone()).ok()?.reply;
    let edge = match result.as_ref().and_then(|result| answered(result.as_ref().ok()?)) {
        Some(Reply::Edge(edge)) => Some((edge.target, edge.created_at)),
        _ => None,
    };
    match op {
        Op::CreateFile(CreateFile { dir, name, replace, .. })
        | Op::CreateInline(CreateInline { dir, name, replace, .. })
        | Op::CreateSymlink(CreateSymlink { dir, name, replace, .. })
        | Op::LinkFile(LinkFile { dir, name, replace, .. }) => put((dir, name), edge, replace),
        Op::Undelete(op) => put((op.dir, op.new_name), edge, false),
        Op::Unlink(op) => take((op.dir, op.name), op.target, op.created_at),
        Op::RenameInDirectory(op) if op.old_name != op.new_name => {
            let mut acts = take((op.dir, op.old_name), op.target, op.created_at);
            acts.extend(put((op.dir, op.new_name), edge, true).into_iter().filter(|_| code.is_none()));
            acts
        }
        Op::Lookup(op) => match (edge, code) {
            (Some(edge), _) => vec![at((op.dir, op.name), Act::Saw(Some(edge)))],
            (None, Some(Code::NotFound)) => vec![at((op.dir, op.name), Act::Saw(None))],
            _ => vec![],
        },
        _ => vec![],
    }
}

/// Checks every name.
pub fn check(evidence: &Evidence) -> Vec<Violation> {
    let mut names: BTreeMap<Name, Vec<Request>> = BTreeMap::new();
    for record in &evidence.records {
        // A read of a position may be behind what others have done.
        if matches!(record.call.freshness, Freshness::Position(_)) {
            continue;
        }
        for (name, request) in acts(record) {
            // A lookup whose end nobody saw says nothing.
            if request.ended.is_some() || !matches!(request.act, Act::Saw(_) | Act::SawSomething) {
                names.entry(name).or_default().push(request);
            }
        }
    }
    let mut violations = Vec::new();
    for ((dir, name), requests) in names {
        if explains(&requests) == Some(false) {
            let shown = String::from_utf8_lossy(&name).into_owned();
            let what = format!("no order explains the requests on {shown:?} in {dir:x}: {requests:?}");
            violations.push(Violation::new("linearizability by search", what));
        }
    }
    violations.truncate(5);
    violations
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(began: u64, ended: u64, act: Act) -> Request {
        Request { began, ended: (ended > 0).then_some(ended), act }
    }

    const A: Option<(u64, u64)> = Some((10, 1));
    const B: Option<(u64, u64)> = Some((11, 2));

    fn put(edge: Option<(u64, u64)>) -> Act {
        Act::Put { edge, replace: false }
    }

    #[test]
    fn good_histories_are_explained() {
        for history in [
            vec![
                at(1, 2, put(A)),
                at(3, 4, Act::Saw(A)),
                at(5, 6, Act::Take(10, 1)),
                at(7, 8, Act::Saw(None)),
            ],
            // While it is being put, both answers are fine.
            vec![at(1, 6, put(A)), at(2, 3, Act::Saw(None)), at(4, 5, Act::Saw(A))],
            // A lost request may take effect late, or never.
            vec![at(1, 0, put(None)), at(2, 3, Act::Saw(None)), at(4, 5, Act::Saw(A))],
            vec![at(1, 0, put(None)), at(2, 3, Act::Saw(None))],
            vec![at(1, 2, put(A)), at(3, 0, Act::Take(10, 1)), at(4, 5, Act::Saw(A)), at(6, 7, put(B))],
        ] {
            assert_eq!(explains(&history), Some(true), "{history:?}");
        }
    }

    #[test]
    fn a_hundred_thousand_requests_are_searched_quickly() {
        // Three requests at a time on each of 1,000 names; each name is put, seen and taken again and again.
        for name in 0..1000u64 {
            let mut history = Vec::new();
            for round in 0..34u64 {
                let (at_, edge) = (round * 20 + 1, (name, round + 1));
                history.push(at(at_, at_ + 9, put(Some(edge))));
                history.push(at(at_ + 1, at_ + 11, Act::Saw((round % 2 == 0).then_some(edge))));
                history.push(at(at_ + 12, at_ + 15, Act::Take(edge.0, edge.1)));
            }
            assert_eq!(explains(&history), Some(true));
        }
    }

    #[test]
    fn bad_histories_are_not() {
        for history in [
            // A stale read.
            vec![at(1, 2, put(A)), at(3, 4, Act::Saw(None))],
            // Seen, and then not any more, without anybody taking it.
            vec![at(1, 6, put(A)), at(2, 3, Act::Saw(A)), at(4, 5, Act::Saw(None))],
            // Two creations of one name.
            vec![at(1, 2, put(A)), at(3, 4, put(B))],
            // Taken twice.
            vec![at(1, 2, put(A)), at(3, 4, Act::Take(10, 1)), at(5, 6, Act::Take(10, 1))],
            // Seen before anybody began to put it.
            vec![at(1, 2, Act::Saw(A)), at(3, 4, put(A))],
            vec![at(1, 2, Act::SawSomething)],
        ] {
            assert_eq!(explains(&history), Some(false), "{history:?}");
        }
    }
}
