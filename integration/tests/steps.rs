//! See [`clutch_integration::steps`].

use clutch_integration::steps;

#[test]
fn blocks_are_what_was_proven_after_every_step() {
    let wrong = steps::blocks();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_log_is_what_was_acknowledged_and_shown_after_every_step() {
    let wrong = steps::log();
    assert!(wrong.is_empty(), "{wrong:#?}");
}
