//! Counts the instructions of each hot path and compares them with `integration/instructions.txt`.
//!
//! Instructions do not depend on what else a machine does, so a path that became slower by more than the tolerance
//! fails the gate also on a busy one. They do depend on the kind of processor: where the program is not built for
//! x86-64-v3, nothing is compared. Only what is repeated is counted: the difference of a long and a short run.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

const FILE: &str = "integration/instructions.txt";
const SHORT_RUNS: u64 = 20;
const LONG_RUNS: u64 = 220;
/// Growth that is still taken for the same, in percent: allocators and hash seeds differ a little.
const TOLERANCE_PERCENT: u64 = 10;
const HEADER: &str = "\
# Instructions of one run of each hot path, as `cargo xtask instructions` counts them; CI fails where one grows by more
# than a tenth. `cargo xtask instructions --write` writes what it counted; say in the commit why it grew.
";

pub(crate) fn run(write: bool) -> Result<()> {
    if !cfg!(all(target_arch = "x86_64", target_feature = "avx2")) {
        println!("instructions: not compared, because they were counted for x86-64-v3");
        return Ok(());
    }
    let counted = count()?;
    if write {
        let mut text = HEADER.to_owned();
        for (name, count) in &counted {
            writeln!(text, "{count:>9} {name}")?;
        }
        std::fs::write(FILE, text).with_context(|| format!("write {FILE}"))?;
        println!("instructions: {} paths written", counted.len());
        return Ok(());
    }
    let expected = expected()?;
    let mut wrong = Vec::new();
    for (name, count) in &counted {
        let Some(limit) = expected.get(name) else {
            wrong.push(format!("{name}: {count} instructions, and no line in {FILE}"));
            continue;
        };
        let percent = count * 100 / limit.max(&1);
        println!("instructions: {name}: {count}, {percent} % of what is expected");
        if percent > 100 + TOLERANCE_PERCENT {
            wrong.push(format!("{name}: {count} instructions instead of {limit}"));
        }
    }
    wrong.extend(
        expected
            .keys()
            .filter(|name| !counted.contains_key(*name))
            .map(|n| format!("{n}: is no path any more")),
    );
    ensure!(
        wrong.is_empty(),
        "hot paths have changed; make them faster, or run `cargo xtask instructions --write` and say why:\n  {}",
        wrong.join("\n  ")
    );
    Ok(())
}

fn expected() -> Result<BTreeMap<String, u64>> {
    let text = std::fs::read_to_string(FILE).with_context(|| format!("read {FILE}"))?;
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    lines
        .map(|line| {
            let (count, name) = line.trim().split_once(' ').with_context(|| format!("{FILE}: {line:?}"))?;
            Ok((name.to_owned(), count.parse().with_context(|| format!("{FILE}: {line:?}"))?))
        })
        .collect()
}

fn count() -> Result<BTreeMap<String, u64>> {
    let built = Command::new("cargo")
        .args(["build", "--release", "--quiet", "--package", "clutch-integration", "--example", "hot_path"])
        .arg("--message-format=json")
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(built.status.success(), "the example hot_path does not build");
    let program = &executable(&String::from_utf8(built.stdout)?)?;
    let names = Command::new(program).output().with_context(|| format!("run {program}"))?;
    let names = String::from_utf8(names.stdout)?;
    ensure!(!names.is_empty(), "{program} names no paths");
    let mut counted = BTreeMap::new();
    for name in names.lines() {
        let (short, long) =
            (instructions(program, name, SHORT_RUNS)?, instructions(program, name, LONG_RUNS)?);
        counted.insert(name.to_owned(), long.saturating_sub(short) / (LONG_RUNS - SHORT_RUNS));
    }
    Ok(counted)
}

/// The program that cargo's messages name, wherever its target directory is.
fn executable(messages: &str) -> Result<String> {
    let found = messages.lines().rev().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        Some(message["executable"].as_str()?.to_owned())
    });
    found.context("cargo did not say where the example hot_path is")
}

/// All instructions of a whole process.
fn instructions(program: &str, name: &str, runs: u64) -> Result<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null", program, name])
        .arg(runs.to_string())
        .output()
        .context("run valgrind; `scripts/setup.sh` installs it")?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name}: {text}");
    let Some(line) = text.lines().find(|line| line.contains("I   refs:") || line.contains("I refs:")) else {
        bail!("{name}: valgrind printed no count:\n{text}");
    };
    let digits: String =
        line.rsplit(':').next().unwrap_or_default().chars().filter(char::is_ascii_digit).collect();
    digits.parse().with_context(|| format!("{name}: {line:?}"))
}
