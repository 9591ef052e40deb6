//! A shard whose wall clock is a year ahead for some seconds, in a machine that is suspended meanwhile: the shard may go ahead of
//! its peers twice before they hear of it. Who reads afterwards believes the shard, and the disks must not mind.

use std::fmt::Write as _;

use crate::{run::run, script::Script};

const FILES: u32 = 8;

/// Files everywhere, and a step of the shard's clock that ends when the script does.
fn script(seed: u64, ends_at_s: u32, is_suspended: bool) -> Script {
    let mut text = format!(
        "seed {seed}\ncluster shards=4 disks=4 policy=1+2 engine=sim flush=0 page=0 names=plain clients=2\n"
    );
    for number in 1..=FILES {
        // Writing to a string does not fail.
        let _ = writeln!(text, "0.05 c0.0 mkdir /d{number}");
        let _ = writeln!(text, "0.06 c0.0 write /d{number}/f 5000 {number}");
        let _ = writeln!(text, "0.3 c0.0 chmod /d{number}/f 700");
    }
    let _ = writeln!(text, "0.2 fault step shard1 31536000 25");
    if is_suspended {
        let _ = writeln!(text, "0.25 fault suspend 3500");
    }
    let _ = writeln!(text, "{ends_at_s} c0.0 mkdir /e\n{ends_at_s} c0.0 collect");
    text.parse().expect("a script")
}

/// What is wrong in any of them.
pub fn all() -> Vec<String> {
    let mut wrong = Vec::new();
    // Even seeds start every node again, which then hears what time it is.
    for seed in [1, 3, 5] {
        for ends_at_s in [5, 10, 18, 20, 22] {
            for is_suspended in [false, true] {
                let report = run(&script(seed, ends_at_s, is_suspended));
                let which = format!("seed {seed}, {ends_at_s} s, suspended {is_suspended}");
                wrong.extend(report.violations.iter().map(|v| format!("{which}: {}: {}", v.checker, v.what)));
            }
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    #[test]
    fn disks_serve_who_believes_a_shard_that_was_led_ahead() {
        assert_eq!(super::all(), Vec::<String>::new());
    }
}
