//! Where a new operation of a shard must be known, and who asks for it there: the compiler, a gate or a test. Each place is
//! looked up for every operation that exists, so that a place that has moved or an operation that was forgotten is refused.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

/// Who notices that a place was forgotten.
enum AskedBy {
    /// Nobody: it is where an operation begins.
    Nobody,
    /// A match without a default, or a name that does not exist.
    Compiler,
    /// This gate.
    Gate,
    /// A test: its file and its name.
    Test(&'static str, &'static str),
}

struct Place {
    what: &'static str,
    /// Files or directories.
    within: &'static [&'static str],
    /// What stands there, or `|` what else: `{Op}` is the operation's message, `{op}` its field. Without either it stands there once for all.
    words: &'static str,
    asked_by: AskedBy,
}

/// No more places than these, and no fewer that somebody asks for.
const PLACES_MAX: usize = 20;
const ASKED_MIN: usize = 15;

const PROTO: &str = "proto/clutch/shard/v1/shard.proto";
const PINNED: AskedBy =
    AskedBy::Test("integration/tests/pinned.rs", "every_operation_is_done_by_a_pinned_script");
const TRANSCRIPTS: AskedBy =
    AskedBy::Test("shard/tests/transcripts.rs", "every_operation_does_what_its_transcript_says");

const PLACES: &[Place] = &[
    place("a field of the request", &[PROTO], "  {Op} {op} = ", AskedBy::Nobody),
    place("its message", &[PROTO], "message {Op} {", AskedBy::Compiler),
    place("its home and class", &["proto/src/operation.rs"], "Op::{Op}(", AskedBy::Compiler),
    place(
        "its bytes, kept",
        &["docs/formats/golden/messages.txt"],
        "ShardRequest.{op} ",
        AskedBy::Test("proto/tests/vectors.rs", "every_message_is_read_and_written_as_its_kept_bytes"),
    ),
    place("the shard's match of all operations", &["shard/src/lib.rs"], "Op::{Op}(", AskedBy::Compiler),
    place("what it does", &["shard/src"], "op: &{Op}|op: {Op}|{Op}Entry", AskedBy::Compiler),
    place("what it does, in words that are compared", &["shard/testdata"], "{Op}", TRANSCRIPTS),
    place("the entry of its transcript", &["shard/tests/transcripts.rs"], "{Op}", TRANSCRIPTS),
    place("the oracle's match", &["integration/src/oracle"], "Op::{Op}(", AskedBy::Compiler),
    place("what the oracle expects", &["integration/src/oracle"], "{Op}", AskedBy::Compiler),
    place("who asks for it: client, collector or CDC", &["client", "cdc/src"], "Op::{Op}(", AskedBy::Gate),
    place("an operation of scripts", &["integration/src/script.rs"], "pub enum Operation {", PINNED),
    place("its word, written", &["integration/src/script.rs"], "for Operation {", AskedBy::Compiler),
    place(
        "its word, read",
        &["integration/src/script.rs"],
        "fn operation(&mut self)",
        AskedBy::Test("integration/src/script.rs", "a_script_survives_its_text"),
    ),
    place("how a worker does it", &["integration/src/workload.rs"], "match operation {", AskedBy::Compiler),
    place("who else does it not", &["integration/src/upkeep.rs"], "match operation {", AskedBy::Compiler),
    place("a kind of the generator", &["integration/src/generate.rs"], "enum Kind {", PINNED),
    place("how the generator draws it", &["integration/src/generate.rs"], "match kind", AskedBy::Compiler),
    place("its row in the page of all operations", &["docs/operations.md"], "| `{Op}` |", AskedBy::Gate),
];

const fn place(
    what: &'static str,
    within: &'static [&'static str],
    words: &'static str,
    asked_by: AskedBy,
) -> Place {
    Place { what, within, words, asked_by }
}

/// The text of a file, or of all files of a directory.
fn text(path: &Path) -> Result<String> {
    if path.is_file() {
        return fs::read_to_string(path).with_context(|| format!("read {}", path.display()));
    }
    let entries = fs::read_dir(path).with_context(|| format!("read {}", path.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>>>()?;
    paths.sort();
    let is_text = |path: &&PathBuf| {
        let is_test = path.file_stem().is_some_and(|name| name == "tests");
        !is_test && (path.is_dir() || path.extension().is_some_and(|e| e == "rs" || e == "txt"))
    };
    paths.iter().filter(is_text).map(|path| text(path)).collect()
}

/// Whether the words stand in a text, and not as part of longer ones.
fn has(text: &str, words: &str) -> bool {
    let is_of_word = |c: char| c.is_alphanumeric() || c == '_';
    let goes_on = words.ends_with(is_of_word);
    text.match_indices(words).any(|(at, _)| {
        let behind = &text[at + words.len()..];
        let is_part = text[..at].ends_with(is_of_word) || goes_on && behind.starts_with(is_of_word);
        !is_part
    })
}

/// `SetPolicy` as `set_policy`.
fn snake(operation: &str) -> String {
    let mut name = String::new();
    for letter in operation.chars() {
        if letter.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.extend(letter.to_lowercase());
    }
    name
}

/// Looks every place up and prints them.
pub(crate) fn check(operations: &BTreeSet<String>) -> Result<()> {
    let (mut wrong, mut asked) = (Vec::new(), 0);
    println!("places of a shard's operation, and who asks for them:");
    for (number, Place { what, within, words, asked_by }) in PLACES.iter().enumerate() {
        let texts = within.iter().map(|path| text(Path::new(path))).collect::<Result<String>>()?;
        for operation in operations {
            let words = words.replace("{Op}", operation).replace("{op}", &snake(operation));
            if !words.split('|').any(|words| has(&texts, words)) {
                wrong.push(format!("{operation}: {what} is missing: {words:?} in {}", within.join(", ")));
            }
        }
        let by = match asked_by {
            AskedBy::Nobody => "nobody: it begins there".to_owned(),
            AskedBy::Compiler => "the compiler".to_owned(),
            AskedBy::Gate => "this gate".to_owned(),
            AskedBy::Test(file, name) => {
                if !text(Path::new(file))?.contains(&format!("fn {name}(")) {
                    wrong.push(format!("{file} has no test {name}"));
                }
                format!("test {name}")
            }
        };
        asked += usize::from(!matches!(asked_by, AskedBy::Nobody));
        println!("  {:2} {what} ({}): {by}", number + 1, within.join(", "));
    }
    ensure!(wrong.is_empty(), "operations are not known wherever they must be:\n  {}", wrong.join("\n  "));
    ensure!(PLACES.len() <= PLACES_MAX && asked >= ASKED_MIN, "{} places, {asked} asked for", PLACES.len());
    println!("operations: {} places, {asked} of them asked for", PLACES.len());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_whole_and_tests_do_not_count() {
        assert!(has("Op::History(op)", "History(") && !has("Op::ContentHistory(op)", "History("));
        assert!(has("op: &Stat,", "op: &Stat") && !has("op: &Status,", "op: &Stat"));
        assert_eq!(snake("SetPolicy"), "set_policy");
        let dir = std::env::temp_dir().join(format!("places-{}", std::process::id()));
        fs::create_dir_all(dir.join("src")).expect("made");
        for (name, words) in [("src/lib.rs", "one "), ("src/tests.rs", "two "), ("src/more.txt", "three ")] {
            fs::write(dir.join(name), words).expect("written");
        }
        assert_eq!(text(&dir).expect("reads"), "one three ");
        fs::remove_dir_all(&dir).expect("removed");
    }
}
