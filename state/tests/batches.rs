//! The model of batches of `clutch-integration`, as this crate's own test: it needs nothing of that crate.

#[allow(unreachable_pub)]
#[path = "../../integration/src/batches.rs"]
mod batches;

#[test]
fn idle_clients_are_forgotten_as_the_log_says() {
    assert_eq!(batches::idle(), Vec::<String>::new());
}

#[test]
fn batches_are_what_a_sorted_map_makes_of_them() {
    let wrong: Vec<String> = (0..100).flat_map(batches::check).take(5).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}
