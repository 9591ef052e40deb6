//! See [`clutch_integration::batches`].

use clutch_integration::batches;

#[test]
fn idle_clients_are_forgotten_as_the_log_says() {
    assert_eq!(batches::idle(), Vec::<String>::new());
}

#[test]
fn batches_are_what_a_sorted_map_makes_of_them() {
    let wrong: Vec<String> = (0..3000).flat_map(batches::check).take(5).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}
