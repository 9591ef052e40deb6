//! Keeps logs for `tests/golden_logs.rs`: `cargo run --release -p clutch-integration --example golden -- NAME FIRST_SEED COUNT`.
//!
//! Of the clusters of those seeds it takes as few as have all kinds of refusals that any has, writes `NAME-SEED.lz4` beside
//! the others, and adds their hashes. Files that are there are left alone: a build must replay what it did not write.

use std::{collections::BTreeSet, fmt::Write as _, path::Path};

use clutch_integration::{
    generate::{Profile, generate},
    golden_logs::{encode, replay},
    run::run,
};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, first, count] = &arguments[..] else { anyhow::bail!("golden NAME FIRST_SEED COUNT") };
    let (first, count): (u64, u64) = (first.parse()?, count.parse()?);
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/formats/golden/logs");
    std::fs::create_dir_all(&dir)?;
    let hashes = dir.join("hashes.txt");
    let text = if hashes.exists() { std::fs::read_to_string(&hashes)? } else { String::new() };
    let kept = text.lines().filter_map(|l| l.strip_prefix("# refusals: ")).flat_map(str::split_whitespace);
    let kept: BTreeSet<String> = kept.map(str::to_owned).collect();
    let mut text = text.trim_end().to_owned();
    let mut candidates = Vec::new();
    for seed in first..first + count {
        let report = run(&generate(seed, Profile::Mixed));
        if report.violations.is_empty() {
            let (lines, codes) = replay(&report.logs)?;
            let file = encode(&report.logs);
            candidates.push((seed, file, lines, codes));
        }
    }
    let mut all = BTreeSet::new();
    while let Some(best) = (0..candidates.len()).max_by_key(|i| {
        let (_, file, _, codes) = &candidates[*i];
        // Many new kinds, then few bytes.
        (codes.difference(&all).count(), std::cmp::Reverse(file.len()))
    }) {
        let (seed, file, lines, codes) = candidates.swap_remove(best);
        if codes.is_subset(&all) {
            break;
        }
        all.extend(codes);
        let path = dir.join(format!("{name}-{seed}.lz4"));
        anyhow::ensure!(!path.exists(), "{} is there already", path.display());
        std::fs::write(&path, &file)?;
        write!(text, "\n\n{name}-{seed}.lz4\n{}", lines.trim())?;
        println!("seed {seed}: {} bytes", file.len());
    }
    let names = all.iter().map(|code| format!("{code:?}")).filter(|name| !kept.contains(name));
    let names: Vec<String> = names.collect();
    if !names.is_empty() {
        // Behind the others: what is kept is not written anew.
        write!(text, "\n\n# refusals: {}", names.join(" "))?;
    }
    std::fs::write(hashes, text.trim_start().to_owned() + "\n")?;
    Ok(())
}
