//! Wall clocks that are far ahead for some seconds or minutes, in machines that are suspended meanwhile. A shard may go ahead of its
//! peers before they hear of it: who reads afterwards believes the shard, and the disks must not mind. And when its clock has been
//! put right, it must soon be where the others are.

use std::fmt::Write as _;

use crate::{run::run, script::Script};

const FILES: u32 = 8;

/// Files everywhere, and a step of the shard's clock that ends when the script does. Nobody tells the shard: it cannot ask the
/// registry meanwhile.
fn files(seed: u64, ends_at_s: u32, is_suspended: bool) -> String {
    let mut text = format!(
        "seed {seed}\ncluster shards=4 disks=4 policy=1+2 engine=sim flush=0 page=0 names=plain clients=2\n"
    );
    for number in 1..=FILES {
        // Writing to a string does not fail.
        let _ = writeln!(text, "0.05 c0.0 mkdir /d{number}");
        let _ = writeln!(text, "0.06 c0.0 write /d{number}/f 5000 {number}");
        let _ = writeln!(text, "0.3 c0.0 chmod /d{number}/f 700");
    }
    let _ = writeln!(text, "0.2 fault step shard1 31536000 40\n0.2 fault partition shard1 registry 40");
    if is_suspended {
        let _ = writeln!(text, "0.25 fault suspend 3500");
    }
    let _ = writeln!(text, "{ends_at_s} c0.0 mkdir /e\n{ends_at_s} c0.0 collect");
    text
}

/// A member of the CDC's log, whose machine is suspended again and again while its clock is wrong, and another that stutters: it
/// is still to be asked when the first is believed. The seed says which they are.
fn suspended_often(seed: u64) -> String {
    format!(
        "seed {seed}\n\
        cluster shards=2 disks=7 policy=4+2 engine=sim flush=0 page=0 names=plain clients=2 replicas=3\n\
        0.451946 fault slow cdc 1.64462\n0.597162 fault step cdc 3600 1.229695\n1.298788 fault suspend 60\n\
        1.438954 fault suspend 3500\n1.759747 fault suspend 3500\n1.808605 c1.0 create /d2/d2/d0/f3 1 137\n"
    )
}

/// A shard whose clock is wrong for minutes.
fn long(seed: u64, length_s: u32) -> String {
    let mut text = format!(
        "seed {seed}\ncluster shards=2 disks=3 policy=1+2 engine=sim flush=0 page=0 names=plain clients=2\n\
        0.2 fault step shard1 3600 {length_s}\n"
    );
    for number in 1..=FILES {
        let _ = writeln!(text, "0.05 c0.0 mkdir /d{number}");
    }
    for at_s in (1..length_s).step_by(5) {
        let number = at_s / 5 % FILES + 1;
        let _ = writeln!(text, "{at_s} c0.0 write /d{number}/f{at_s} 5000 {at_s}");
    }
    text
}

fn scripts() -> Vec<String> {
    let mut scripts = Vec::new();
    // Even seeds start every node again, which then hears what time it is.
    for seed in [1, 3, 5] {
        for ends_at_s in [5, 10, 18, 22, 30] {
            scripts.extend([false, true].map(|is_suspended| files(seed, ends_at_s, is_suspended)));
        }
    }
    // The next ones are found by few seeds.
    scripts.extend([33, 9_000_917].map(suspended_often));
    scripts.extend([1, 9, 13].map(|seed| long(seed, 60)));
    scripts
}

/// What is wrong in any of them.
pub fn all() -> Vec<String> {
    let mut wrong = Vec::new();
    for text in scripts() {
        let script: Script = text.parse().expect("a script");
        wrong.extend(run(&script).violations.iter().map(|v| format!("{}: {} in\n{text}", v.checker, v.what)));
    }
    wrong
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_cluster_bears_clocks_that_were_led_ahead() {
        assert_eq!(super::all(), Vec::<String>::new());
    }
}
