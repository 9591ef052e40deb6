//! Pins: stored scripts, each of which reaches rare states or met a bug once. A script does not change when the generator
//! draws otherwise; a change of timing may still move what it reaches.
//!
//! A pin is a file of `integration/pins`. It begins with comments: `# reaches: STATE` for each state that it is kept for, and
//! `# bug: WORDS` for what it met.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

use crate::script::Script;

const REACHES: &str = "# reaches: ";
const BUG: &str = "# bug: ";

/// One file.
#[derive(Clone, Debug)]
pub struct Pin {
    /// The file's name.
    pub name: String,
    /// States that it is kept for.
    pub reaches: BTreeSet<String>,
    /// What it met.
    pub bugs: Vec<String>,
    /// What runs.
    pub script: Script,
}

/// Where they are.
pub fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("pins")
}

impl Pin {
    /// The file's text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (prefix, words) in
            self.bugs.iter().map(|bug| (BUG, bug)).chain(self.reaches.iter().map(|state| (REACHES, state)))
        {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{prefix}{words}");
        }
        text + &self.script.to_string()
    }

    fn parse(name: String, text: &str) -> Result<Pin> {
        let of = |prefix: &'static str| {
            text.lines().filter_map(move |line| line.strip_prefix(prefix)).map(str::to_owned)
        };
        let unknown = text
            .lines()
            .find(|line| line.starts_with('#') && !line.starts_with(REACHES) && !line.starts_with(BUG));
        ensure!(unknown.is_none(), "{name}: {unknown:?} is neither `{REACHES}…` nor `{BUG}…`");
        let script = text.parse().map_err(anyhow::Error::msg).with_context(|| name.clone())?;
        Ok(Pin { reaches: of(REACHES).collect(), bugs: of(BUG).collect(), name, script })
    }
}

/// All pins, in the order of their names.
///
/// # Errors
/// A file that cannot be read or is no script.
pub fn load() -> Result<Vec<Pin>> {
    let mut pins = Vec::new();
    for entry in fs::read_dir(dir()).context("read the directory of pins")? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "script") {
            continue;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = fs::read_to_string(&path).with_context(|| name.clone())?;
        pins.push(Pin::parse(name, &text)?);
    }
    pins.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(pins)
}
