//! An older copy of a node's own disk is put back: it knows that itself as soon as it meets anybody, and nobody speaks to it.

use std::path::Path;

use clutch_proto::mutants::{self, Mutant};

use super::*;
use crate::identities::{Claim, Identities, Mark};

/// What node 2 has kept of itself, twice: as it was at its first mark, and as it was when it had met node 1 for a while.
async fn lived(one: &Runtime, two: &Runtime) -> (Vec<u8>, Identities, Identities) {
    let open = |runtime: &Runtime, node: NodeId| {
        Identities::open(runtime, "identities".into(), node, || Ok(true)).expect("is there")
    };
    let (first, second) = (open(one, 1), open(two, 2));
    let copy = two.disk.read(Path::new("identities")).expect("it is written");
    greet(one, &first, two, &second).await.expect("they meet");
    for _ in 0..3 {
        let (at, other) = (first.next_mark(one).await, second.next_mark(two).await);
        second.hear(1, at).expect("it goes on");
        first.hear(2, other).expect("it goes on");
        second.is_remembered(1, first.remembered(2)).expect("it is itself");
        first.is_remembered(2, second.remembered(1)).expect("it is itself");
    }
    (copy, first, second)
}

/// What each makes of the other when they meet, in that order: the second of what the first remembers, the first of the second.
async fn greet(
    one: &Runtime,
    first: &Identities,
    two: &Runtime,
    second: &Identities,
) -> Result<(), (Option<String>, Option<String>)> {
    let (of_first, of_second) = (first.claim("one"), second.claim("two"));
    let own = second.is_remembered(1, first.remembered(2));
    let others = first.meet(one, 2, of_second).await;
    let back = second.meet(two, 1, of_first).await;
    match (own, others, back) {
        (Ok(()), Ok(()), Ok(())) => Ok(()),
        (own, others, back) => Err((own.err(), others.and(back).err())),
    }
}

/// Whether node 2, and node 1, notice that node 2's disk is an older copy.
fn noticed() -> (bool, bool) {
    let world = World::new(1);
    let (one, two) = (world.node(SimNode(1)), world.node(SimNode(2)));
    let done = world.run(SimNode(1), Duration::from_secs(60), async move {
        let (copy, first, second) = lived(&one, &two).await;
        assert!(second.claim("").mark.count > 1, "it has gone on");
        // Started again as it is, it is itself.
        let again = Identities::open(&two, "identities".into(), 2, || Ok(false)).expect("is there");
        greet(&one, &first, &two, &again).await.expect("it is itself");
        two.disk.replace(Path::new("identities"), &copy).expect("put back");
        let old = Identities::open(&two, "identities".into(), 2, || Ok(false)).expect("is there");
        let (own, others) = greet(&one, &first, &two, &old).await.err().unwrap_or_default();
        assert_eq!(own.is_some(), old.condemned().is_some());
        // Who is condemned stays where it is, however often it is started.
        if own.is_some() {
            assert_eq!(old.next_mark(&two).await, old.claim("").mark);
        }
        (own.is_some(), others.is_some())
    });
    done.expect("ends")
}

#[test]
fn an_older_copy_knows_itself_and_is_known() {
    assert_eq!(noticed(), (true, true));
}

#[test]
fn a_copy_that_goes_on_beside_its_original_is_known() {
    let world = World::new(2);
    let (one, two, twin) = (world.node(SimNode(1)), world.node(SimNode(2)), world.node(SimNode(3)));
    let done = world.run(SimNode(1), Duration::from_secs(60), async move {
        let (_, first, second) = lived(&one, &two).await;
        let copy = two.disk.read(Path::new("identities")).expect("it is written");
        twin.disk.replace(Path::new("identities"), &copy).expect("copied");
        let other = Identities::open(&twin, "identities".into(), 2, || Ok(false)).expect("is there");
        greet(&one, &first, &twin, &other).await.expect("nobody can know yet");
        // Both come to the same number, each with a draw of its own.
        first.hear(2, second.next_mark(&two).await).expect("the first to go on");
        let behind = other.next_mark(&twin).await;
        assert_eq!(behind.count, second.claim("").mark.count);
        assert!(first.hear(2, behind).is_err());
        other.is_remembered(1, first.remembered(2)).expect_err("one of the two has to go");
        second.is_remembered(1, first.remembered(2)).expect("and the other stays");
    });
    assert!(done.is_some());
}

#[test]
fn a_full_disk_only_delays_marks() {
    let world = World::new(3);
    let (one, two) = (world.node(SimNode(1)), world.node(SimNode(2)));
    let world_disk = world.disk(SimNode(2));
    let done = world.run(SimNode(1), Duration::from_secs(60), async move {
        let (_, first, second) = lived(&one, &two).await;
        let before = second.claim("").mark;
        world_disk.fail_writes_after(0);
        assert_eq!(second.next_mark(&two).await, before, "what is not on the disk is not told");
        world_disk.heal();
        let after = second.next_mark(&two).await;
        assert_eq!(after.count, before.count + 1);
        first.hear(2, after).expect("it goes on");
        // Not before the other has said so.
        assert_eq!(second.next_mark(&two).await, after);
    });
    assert!(done.is_some());
}

#[test]
fn a_mark_follows_what_it_comes_behind() {
    let at = |count, drawn| Mark { count, drawn };
    let claim = |mark| Claim { identity: [1; 16], mark, address: String::new() };
    let world = World::new(4);
    let runtime = world.node(SimNode(1));
    let done = world.run(SimNode(1), Duration::from_secs(60), async move {
        let own = Identities::open(&runtime, "identities".into(), 1, || Ok(true)).expect("is there");
        for (mark, is_taken) in [
            (at(3, 7), true),
            (at(3, 7), true),
            (at(3, 8), false),
            (at(2, 9), false),
            (at(4, 1), true),
            (at(3, 7), false),
        ] {
            assert_eq!(own.meet(&runtime, 2, claim(mark)).await.is_ok(), is_taken, "{mark:?}");
        }
        // Also when it is said to be elsewhere by now, which is written down.
        let moved = Claim { address: "there".into(), ..claim(at(1, 1)) };
        assert!(own.meet(&runtime, 2, moved).await.is_err());
        assert_eq!(own.address(2), None);
    });
    assert!(done.is_some());
}

macro_rules! planted {
    ($($module:ident: $mutant:ident finds $expected:expr,)*) => {
        $(mod $module {
            #[test]
            fn planted_bugs_are_found() {
                use super::*;
                mutants::plant(Some(Mutant::$mutant));
                let is_planted = mutants::planted().is_some();
                let noticed = noticed();
                mutants::plant(None);
                assert_eq!(noticed, if is_planted { $expected } else { (true, true) });
            }
        })*
    };
}

planted! {
    own: OwnCopyTaken finds (false, true),
    others: OlderCopyTaken finds (true, false),
}
