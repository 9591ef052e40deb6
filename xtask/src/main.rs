//! Gates that no compiler checks. `cargo xtask layers` compares the crates' dependencies with the table below;
//! `cargo xtask purity` shows that one planted impurity of each kind in each pure crate is refused; `cargo xtask operations`
//! compares the page of all operations with the protocol, and shows where a new one must be known and who asks for it; `cargo xtask tidy` holds files, functions, commits and documents
//! against the style; `cargo xtask instructions` compares the instructions of hot paths with what they were.

mod instructions;
mod operations;
mod places;
mod purity;
mod tidy;

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

/// Which crates of ours a crate may use, from the bottom up. Anything else is an error, also in tests unless
/// listed in `TESTS`.
const LAYERS: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("runtime", &["proto"]),
    ("log", &["proto", "runtime"]),
    ("log-local", &["log", "log-store", "runtime"]),
    ("log-sim", &["log", "runtime"]),
    ("log-store", &["proto", "log", "runtime"]),
    ("log-raft", &["proto", "log", "log-store", "runtime"]),
    ("state", &["proto"]),
    ("state-buffered", &["proto", "state"]),
    ("state-replica", &["proto", "runtime", "log", "state"]),
    ("state-rocks", &["state"]),
    ("state-transcript", &["proto", "state"]),
    ("shard", &["proto", "state"]),
    ("cdc", &["proto", "state"]),
    ("registry", &["proto", "state"]),
    ("blocks", &["proto", "runtime"]),
    ("client", &["proto", "runtime", "blocks"]),
    ("client-maintenance", &["proto", "state", "shard", "client"]),
    (
        "server",
        &[
            "proto",
            "runtime",
            "log",
            "log-local",
            "log-raft",
            "log-store",
            "state",
            "state-buffered",
            "state-replica",
            "state-rocks",
            "shard",
            "cdc",
            "registry",
            "blocks",
            "client",
            "client-maintenance",
        ],
    ),
    (
        "integration",
        &[
            "proto",
            "runtime",
            "log",
            "log-local",
            "log-raft",
            "log-sim",
            "log-store",
            "state",
            "state-buffered",
            "state-replica",
            "shard",
            "cdc",
            "registry",
            "blocks",
            "client",
            "client-maintenance",
            "server",
        ],
    ),
    (
        "cli",
        &[
            "proto",
            "runtime",
            "log",
            "state",
            "state-rocks",
            "shard",
            "blocks",
            "client",
            "client-maintenance",
            "server",
            "integration",
        ],
    ),
    ("xtask", &[]),
];

/// What only tests of a crate may use beside.
const TESTS: &[(&str, &[&str])] = &[
    ("log-local", &["proto"]),
    ("log-sim", &["proto"]),
    ("state", &["state-buffered"]),
    ("shard", &["state-transcript"]),
    ("cdc", &["state-transcript"]),
    ("registry", &["state-transcript"]),
];

/// Crates that may name a concrete log engine or store.
const COMPOSERS: [&str; 3] = ["server", "integration", "cli"];
const CONCRETE: [&str; 4] = ["log-local", "log-sim", "log-raft", "state-rocks"];

/// Crates that decide, apply and decode. All that they depend on, at any depth, is `PURE_MAY`: nothing that waits, locks,
/// draws, reads a clock or does I/O. (`libc` is there for `cpufeatures`, which asks it what a processor can on other hosts.)
const PURE: [&str; 5] = ["proto", "state", "shard", "cdc", "registry"];
const PURE_MAY: [&str; 12] = [
    "arrayvec",
    "blake3",
    "bytes",
    "cfg-if",
    "constant_time_eq",
    "cpufeatures",
    "crc32fast",
    "libc",
    "prost",
    "smallvec",
    "thiserror",
    "xxhash-rust",
];

fn main() -> Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("layers") => layers(),
        Some("purity") => purity::check(),
        Some("operations") => operations::check(),
        Some("tidy") => tidy::run(std::env::args().nth(2).as_deref() == Some("--write")),
        Some("instructions") => instructions::run(std::env::args().nth(2).as_deref() == Some("--write")),
        _ => {
            bail!("usage: cargo xtask layers | purity | operations | tidy [--write] | instructions [--write]")
        }
    }
}

fn layers() -> Result<()> {
    let output = Command::new("cargo")
        .args(["metadata", "--format-version", "1", "--no-deps", "--locked"])
        .output()?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let allowed: BTreeMap<_, _> = LAYERS.iter().copied().collect();
    let in_tests: BTreeMap<_, _> = TESTS.iter().copied().collect();
    let mut wrong = Vec::new();
    let mut edges = 0;
    for package in metadata["packages"].as_array().context("packages")? {
        let full = package["name"].as_str().context("a name")?;
        let name = full.strip_prefix("clutch-").unwrap_or(full);
        let Some(may) = allowed.get(name) else {
            wrong.push(format!("{full} is not in the table"));
            continue;
        };
        for dependency in package["dependencies"].as_array().context("dependencies")? {
            let Some(used) = dependency["name"].as_str().and_then(|n| n.strip_prefix("clutch-")) else {
                continue;
            };
            edges += 1;
            let test_only = dependency["kind"].as_str() == Some("dev");
            let allowed =
                may.contains(&used) || test_only && in_tests.get(name).is_some_and(|t| t.contains(&used));
            if !allowed {
                wrong.push(format!("{name} uses {used}"));
            }
            if CONCRETE.contains(&used) && !COMPOSERS.contains(&name) {
                wrong.push(format!("{name} names {used}, which only {} may", COMPOSERS.join(", ")));
            }
        }
    }
    ensure!(wrong.is_empty(), "the layers do not hold:\n  {}", wrong.join("\n  "));
    println!("layers: {edges} edges, all as in the table");
    for crate_name in PURE {
        let tree = dependencies_of(crate_name)?;
        let others: Vec<_> = tree
            .iter()
            .filter(|name| match name.strip_prefix("clutch-") {
                Some(ours) => !PURE.contains(&ours),
                None => !PURE_MAY.contains(&name.as_str()),
            })
            .collect();
        ensure!(others.is_empty(), "{crate_name} is pure and depends on {others:?}");
        println!("layers: {crate_name} depends on {}", Vec::from_iter(tree).join(", "));
    }
    Ok(())
}

/// All that a crate is linked with, at any depth, itself aside. Macros run in the compiler and are not in it.
fn dependencies_of(crate_name: &str) -> Result<BTreeSet<String>> {
    let package = format!("clutch-{crate_name}");
    let output = Command::new("cargo")
        .args(["tree", "--locked", "--edges", "normal,no-proc-macro", "--prefix", "none", "--all-features"])
        .args(["--format", "{p}", "--package", &package])
        .output()?;
    ensure!(output.status.success(), "cargo tree: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    let names = text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned);
    Ok(names.filter(|name| *name != package).collect())
}
