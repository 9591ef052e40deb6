//! Runs one hot path a number of times: for counting its instructions. `hot_path NAME TIMES`; `hot_path` alone lists
//! the names.

use anyhow::{Context as _, Result};
use clutch_integration::hot_paths;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let Some(name) = arguments.next() else {
        hot_paths::NAMES.iter().for_each(|name| println!("{name}"));
        return Ok(());
    };
    let times: u64 = arguments.next().context("say how often")?.parse().context("read how often")?;
    let mut run = hot_paths::path(&name).with_context(|| format!("no path is called {name:?}"))?;
    (0..times).for_each(|_| run());
    Ok(())
}
