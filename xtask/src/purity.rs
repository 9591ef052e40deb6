//! Plants a clock, a lock, a hash map, randomness and I/O in each pure crate, in a copy, and expects the lints to refuse them all.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};

/// Where it is planted.
const FILES: [(&str, &str); 5] = [
    ("clutch-proto", "proto/src/name.rs"),
    ("clutch-state", "state/src/applier.rs"),
    ("clutch-shard", "shard/src/edge.rs"),
    ("clutch-cdc", "cdc/src/steps.rs"),
    ("clutch-registry", "registry/src/lib.rs"),
];

/// One line each, so that the lints' lines tell them apart.
const PLANTS: [(&str, &str); 5] = [
    ("a clock", "fn _clock() -> bool { std::time::SystemTime::now().elapsed().is_ok() }"),
    ("a lock", "fn _lock() -> bool { std::sync::Mutex::new(1).is_poisoned() }"),
    ("a hash map", "fn _map() -> usize { std::collections::HashMap::<u8, u8>::new().len() }"),
    ("randomness", "fn _random() -> std::hash::RandomState { std::hash::RandomState::new() }"),
    ("I/O", "fn _io() -> bool { std::fs::read(\"/\").is_ok() }"),
];

pub(crate) fn check() -> Result<()> {
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
    for (package, file) in FILES {
        let path = copy.join(file);
        let clean = std::fs::read_to_string(&path)?;
        let lint = || {
            Command::new("cargo")
                .args(["clippy", "--release", "--quiet", "--locked", "--message-format", "short"])
                .args(["--package", package, "--", "-D", "warnings"])
                .current_dir(copy)
                .env("CARGO_TARGET_DIR", root.join("target"))
                .output()
        };
        let nothing = lint()?;
        let text = String::from_utf8_lossy(&nothing.stderr);
        ensure!(nothing.status.success(), "{file} is refused although nothing was planted:\n{text}");
        let code = PLANTS.map(|(_, code)| code).join("\n");
        std::fs::write(&path, format!("{clean}\n{code}\n"))?;
        let planted = lint()?;
        let text = String::from_utf8_lossy(&planted.stderr);
        ensure!(!planted.status.success(), "{file} passes with all that was planted");
        let first = clean.lines().count() + 2;
        for (n, (what, _)) in PLANTS.iter().enumerate() {
            let place = format!("{file}:{}:", first + n);
            let is_refused = text.lines().any(|line| line.contains(&place) && line.contains("disallowed"));
            ensure!(is_refused, "{what} in {file} ({place}) is not refused:\n{text}");
        }
        println!(
            "purity: {} in {file}: each refused; nothing: passes",
            PLANTS.map(|(what, _)| what).join(", ")
        );
        std::fs::write(&path, clean)?;
    }
    Ok(())
}
