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

#[test]
fn a_recovery_may_be_cut_short_at_every_step() {
    let wrong = steps::recovery();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn what_is_proven_of_a_write_that_hangs_is_true() {
    let wrong = steps::stalled();
    assert!(wrong.is_empty(), "{wrong:#?}");
}
