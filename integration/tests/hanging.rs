//! One disk of several hangs, and then all of them.

use clutch_integration::hanging;

#[test]
fn the_others_keep_their_pace_and_all_their_room() {
    assert_eq!(hanging::all(), Vec::<String>::new());
    for (what, rate) in hanging::rates().expect("was measured") {
        println!("{what}: {rate:.2} of the rate without a disk that hangs");
    }
}
