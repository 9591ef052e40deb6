//! Each step in its turn and out of it, what the files say then, and what is believed.

use clutch_runtime::simulated::{NodeId, World};

use super::*;

fn node(dir: &Path) -> Rotation {
    if !dir.join(KEY_FILE).exists() {
        keys::write_all(&dir.join(KEY_FILE), &[Key { epoch: 1, secret: [1; 32] }]).expect("written");
    }
    Rotation::read(dir, 7).expect("is there")
}

fn op(step: Step, epoch: u32, digest: u64, sealed: &[u8]) -> RotateKey {
    RotateKey { step: step as i32, epoch, digest, sealed: sealed.to_vec().into() }
}

/// The epochs of the keys that are believed; the same ones after a start.
fn epochs(rotation: &Rotation) -> Vec<u32> {
    let epochs = |of: &Rotation| of.believed().iter().map(|key| key.epoch).collect::<Vec<_>>();
    let again = Rotation::read(rotation.dir.as_ref().expect("it has one"), 7).expect("is there");
    assert_eq!((epochs(rotation), rotation.keys().all()), (epochs(&again), again.keys().all()));
    epochs(rotation)
}

/// Two nodes go from one key to the next; what both believe in the end.
fn rotated() -> (Vec<[u8; 32]>, Vec<[u8; 32]>) {
    let runtime = World::new(1).node(NodeId(1));
    let dirs = [tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory")];
    let [one, two] = [&dirs[0], &dirs[1]].map(|dir| node(dir.path()));
    let shown = [1; 32];
    let take = |node: &Rotation, op: RotateKey| node.step(&runtime, &op, &shown);
    let before = take(&one, op(Step::Look, 0, 0, &[])).expect("looks");
    assert_eq!((before.used, before.next, before.before), (1, 0, 0));
    // Not what nobody has named yet, nor one after the next.
    for wrong in [op(Step::Use, 2, 5, &[]), op(Step::Believe, 3, 0, &[]), op(Step::Forget, 2, 5, &[])] {
        take(&one, wrong).expect_err("is not the next step");
    }
    let drawn = take(&one, op(Step::Believe, 2, 0, &[])).expect("is drawn");
    let again = take(&one, op(Step::Believe, 2, 0, &[])).expect("is there");
    assert_eq!((drawn.next, drawn.next_digest), (again.next, again.next_digest), "it is drawn once");
    assert_eq!((epochs(&one), one.keys().used()), (vec![1, 2], [1; 32]), "believed and not used");
    assert!(open(7, &[2; 32], 2, &drawn.sealed).is_err() && open(8, &shown, 2, &drawn.sealed).is_err());
    let key = open(7, &shown, 2, &drawn.sealed).expect("opens");
    take(&two, op(Step::Believe, 2, 0, &drawn.sealed[1..])).expect_err("is cut");
    let told = take(&two, op(Step::Believe, 2, 0, &drawn.sealed)).expect("is told");
    assert_eq!((told.next_digest, digest(&key.secret)), (drawn.next_digest, drawn.next_digest));
    take(&two, op(Step::Use, 2, 5, &[])).expect_err("another key");
    for node in [&one, &two] {
        take(node, op(Step::Use, 2, drawn.next_digest, &[])).expect("is used");
        take(node, op(Step::Use, 2, drawn.next_digest, &[])).expect("again");
        assert_eq!((epochs(node), node.keys().used()), (vec![2, 1], key.secret));
        take(node, op(Step::Believe, 3, 0, &[])).expect_err("two are enough");
    }
    // Who has come later gets it from who uses it.
    take(&one, op(Step::Believe, 2, 0, &[])).expect_err("who has the one before is given nothing");
    let late = one.step(&runtime, &op(Step::Believe, 2, 0, &[]), &key.secret).expect("is used");
    assert_eq!(open(7, &key.secret, 2, &late.sealed).expect("opens"), key);
    let heard = std::sync::Arc::new(Mutex::new(Vec::new()));
    let hears = heard.clone();
    one.tell(move |keys| hears.lock().push(keys.len()));
    for node in [&one, &two] {
        take(node, op(Step::Forget, 2, drawn.next_digest, &[])).expect("forgets");
        take(node, op(Step::Forget, 2, drawn.next_digest, &[])).expect("again");
    }
    assert_eq!(heard.lock().first(), Some(&2));
    assert!(!dirs[0].path().join(NEXT_FILE).exists());
    assert_eq!(keys::read(&dirs[0].path().join(KEY_FILE)).expect("reads"), vec![key]);
    (one.keys().all(), two.keys().all())
}

#[test]
fn a_key_is_believed_by_all_used_by_all_and_the_one_before_is_forgotten() {
    let (one, two) = rotated();
    assert_eq!((one.len(), &one), (1, &two));
}

#[test]
fn what_a_step_left_in_its_middle_is_put_right() {
    let dir = tempfile::tempdir().expect("a directory");
    let keys = [2, 1].map(|epoch| Key { epoch, secret: [epoch as u8; 32] });
    keys::write_all(&dir.path().join(KEY_FILE), &keys).expect("written");
    keys::write_all(&dir.path().join(NEXT_FILE), &keys[..1]).expect("written");
    let rotation = Rotation::read(dir.path(), 7).expect("is there");
    assert_eq!(rotation.believed(), keys, "the next one is used already");
    fs::write(dir.path().join(NEXT_FILE), "3 00").expect("written");
    let damaged = Rotation::read(dir.path(), 7).err().map(|error| format!("{error:#}")).unwrap_or_default();
    assert!(damaged.contains("rotate-key again"), "{damaged}");
}

#[test]
fn planted_bugs_are_found() {
    mutants::plant(Some(Mutant::ForgottenKeyBelieved));
    let (is_planted, (one, _)) = (mutants::planted().is_some(), rotated());
    mutants::plant(None);
    assert_eq!(one.len(), if is_planted { 2 } else { 1 });
}
