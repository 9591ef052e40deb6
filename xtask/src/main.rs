//! Gates that no compiler checks. `cargo xtask layers` compares the crates' dependencies with the table below;
//! `cargo xtask purity` shows that a planted clock or hash map in an applier does not get past the lints;
//! `cargo xtask operations` compares the page of all operations with the protocol; `cargo xtask instructions` compares
//! the instructions of hot paths with what they were.

mod instructions;
mod operations;

use std::{collections::BTreeMap, path::Path, process::Command};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

/// Which crates of ours a crate may use, from the bottom up. Anything else is an error, also in tests unless
/// listed in `TESTS`.
const LAYERS: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("runtime", &["proto"]),
    ("log", &["proto", "runtime"]),
    ("log-local", &["proto", "log", "runtime"]),
    ("log-sim", &["log", "runtime"]),
    ("log-raft", &["log"]),
    ("state", &["proto", "runtime", "log"]),
    ("state-rocks", &["state"]),
    ("shard", &["proto", "log", "state"]),
    ("cdc", &["proto", "log", "state"]),
    ("registry", &["proto", "log", "state"]),
    ("blocks", &["proto", "runtime"]),
    ("client", &["proto", "runtime", "blocks"]),
    (
        "server",
        &[
            "proto",
            "runtime",
            "log",
            "log-local",
            "state",
            "state-rocks",
            "shard",
            "cdc",
            "registry",
            "blocks",
            "client",
        ],
    ),
    (
        "integration",
        &[
            "proto",
            "runtime",
            "log",
            "log-local",
            "log-sim",
            "state",
            "shard",
            "cdc",
            "registry",
            "blocks",
            "client",
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
            "server",
            "integration",
        ],
    ),
    ("xtask", &[]),
];

/// What only tests of a crate may use beside.
const TESTS: &[(&str, &[&str])] = &[("log-raft", &["runtime"])];

/// Crates that may name a concrete log engine or store.
const COMPOSERS: [&str; 3] = ["server", "integration", "cli"];
const CONCRETE: [&str; 4] = ["log-local", "log-sim", "log-raft", "state-rocks"];

fn main() -> Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("layers") => layers(),
        Some("purity") => purity(),
        Some("operations") => operations::check(),
        Some("instructions") => instructions::run(std::env::args().nth(2).as_deref() == Some("--write")),
        _ => bail!("usage: cargo xtask layers | purity | operations | instructions [--write]"),
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
    Ok(())
}

/// Plants a clock and a hash map in an applier, in a copy, and expects the lints to fail.
fn purity() -> Result<()> {
    let root = std::env::current_dir()?;
    ensure!(root.join("shard/src/edge.rs").exists(), "run this from the top of the repository");
    let copy = std::env::temp_dir().join(format!("clutch-purity-{}", std::process::id()));
    let result = plant_all(&root, &copy);
    // The copy is scratch; one that stays behind does no harm.
    let _ = std::fs::remove_dir_all(&copy);
    result
}

fn plant_all(root: &Path, copy: &Path) -> Result<()> {
    let files = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .output()?;
    ensure!(files.status.success(), "git ls-files failed");
    for name in files.stdout.split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let name = std::str::from_utf8(name)?;
        let target = copy.join(name);
        std::fs::create_dir_all(target.parent().context("a parent")?)?;
        if root.join(name).exists() {
            std::fs::copy(root.join(name), target).with_context(|| name.to_owned())?;
        }
    }
    let plants = [
        ("nothing", "", true),
        ("a clock", "fn _planted() -> std::time::SystemTime {\n    std::time::SystemTime::now()\n}\n", false),
        (
            "a hash map",
            "fn _planted() -> usize {\n    std::collections::HashMap::<u8, u8>::new().len()\n}\n",
            false,
        ),
    ];
    for (package, file) in [("clutch-shard", "shard/src/edge.rs"), ("clutch-cdc", "cdc/src/steps.rs")] {
        let path = copy.join(file);
        let clean = std::fs::read_to_string(&path)?;
        for (what, code, passes) in plants {
            std::fs::write(&path, format!("{clean}\n{code}"))?;
            let lint = Command::new("cargo")
                .args(["clippy", "--release", "--quiet", "--locked", "-p", package, "--", "-D", "warnings"])
                .current_dir(copy)
                .env("CARGO_TARGET_DIR", root.join("target"))
                .output()?;
            let text = String::from_utf8_lossy(&lint.stderr);
            ensure!(
                lint.status.success() == passes,
                "{what} in {file}: expected passes = {passes}, but:\n{text}"
            );
            ensure!(
                passes || text.contains("disallowed"),
                "{what} in {file} failed for another reason:\n{text}"
            );
            println!("purity: {what} in {file}: {}", if passes { "passes" } else { "refused" });
        }
        std::fs::write(&path, clean)?;
    }
    Ok(())
}
