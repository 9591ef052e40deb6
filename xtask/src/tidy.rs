//! Style as a test: headers, lengths of files and functions, subject lines, what documents name, and words.
//!
//! Functions that are longer than the limit stand in `xtask/long_functions.txt` with their length: none may grow, none may
//! come, and one that became shorter is taken off or down (`cargo xtask tidy --write`, which takes nothing up). Assertions for each function are
//! printed and compared with nothing: the number is a mirror.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

const FILE_LINES_MAX: usize = 1000;
const FUNCTION_LINES_MAX: usize = 70;
const SUBJECT_COLUMNS_MAX: usize = 72;
/// Commits whose subjects are looked at.
const COMMITS: &str = "20";
/// What was golden at this commit stays as it is.
const FROZEN: &str = "c45e8bd9b1fc";
const GOLDEN: &str = "docs/formats/golden";
const RATCHET: &str = "xtask/long_functions.txt";
const RATCHET_HEADER: &str = "\
# Functions of more than 70 lines, by their file and name: none may grow, and none may come.
";
/// What looks like a function that checks something.
const ASSERTIONS: [&str; 6] =
    ["assert!(", "assert_eq!(", "assert_ne!(", "debug_assert", "broken_unless!(", "unreachable!("];

/// A function: its name and what it consists of, from its first line to its brace.
struct Function<'a> {
    name: &'a str,
    lines: &'a [&'a str],
}

pub(crate) fn run(write: bool) -> Result<()> {
    let files = tracked()?;
    let mut wrong = Vec::new();
    let mut long = BTreeMap::new();
    let mut mirror: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for file in files.iter().filter(|file| file.ends_with(".rs")) {
        let text = std::fs::read_to_string(file).with_context(|| file.clone())?;
        let lines: Vec<&str> = text.lines().collect();
        if !lines.first().is_some_and(|line| line.starts_with("//! ")) {
            wrong.push(format!("{file} does not begin with what it owns (`//! …`)"));
        }
        if lines.len() > FILE_LINES_MAX {
            wrong.push(format!("{file} has {} lines; {FILE_LINES_MAX} are allowed", lines.len()));
        }
        if !file.contains("/src/") || file.contains("/tests") {
            continue;
        }
        // Tests beside the code are at its end.
        let code = lines.iter().position(|line| *line == "#[cfg(test)]").unwrap_or(lines.len());
        let functions = functions(&lines[..code]);
        let crate_name = file.split_once("/src/").map_or("", |(crate_name, _)| crate_name);
        let (count, asserted) = mirror.entry(crate_name.to_owned()).or_default();
        *count += functions.len();
        let mut named = BTreeMap::new();
        for function in functions {
            let number = named.entry(function.name).and_modify(|number| *number += 1).or_insert(1);
            let checks = |line: &&&str| ASSERTIONS.iter().any(|assertion| line.contains(assertion));
            *asserted += function.lines.iter().filter(checks).count();
            // Several of one name are told apart by their order.
            let which = if *number == 1 { String::new() } else { format!(" {number}") };
            long.insert(format!("{file} {}{which}", function.name), function.lines.len());
        }
    }
    long.retain(|_, lines| *lines > FUNCTION_LINES_MAX);
    if write {
        let before = std::fs::read_to_string(RATCHET).context(RATCHET)?;
        let before = allowed(&before);
        let mut text = RATCHET_HEADER.to_owned();
        for (function, lines) in &long {
            // None comes and none grows; one that moved to another file brings its line along.
            let name = |function: &str| function.split(' ').nth(1).map(str::to_owned);
            let moved = before.iter().find(|(old, most)| {
                !long.contains_key(**old) && name(old) == name(function) && *lines <= **most
            });
            if let Some(most) = before.get(function.as_str()).or(moved.map(|(_, most)| most)) {
                writeln!(text, "{} {function}", lines.min(most))?;
            }
        }
        std::fs::write(RATCHET, text).with_context(|| format!("write {RATCHET}"))?;
    }
    wrong.extend(compare(&long, &std::fs::read_to_string(RATCHET).context(RATCHET)?));
    wrong.extend(subjects()?);
    wrong.extend(golden()?);
    let known: BTreeSet<&str> = files.iter().map(String::as_str).collect();
    for file in files.iter().filter(|file| file.ends_with(".md")) {
        wrong.extend(named(file, &std::fs::read_to_string(file)?, &known)?);
    }
    wrong.extend(words(&files)?);
    for (crate_name, (functions, assertions)) in &mirror {
        let share = *assertions as f64 / (*functions).max(1) as f64;
        println!("tidy: {crate_name}: {assertions} assertions in {functions} functions, {share:.2}");
    }
    ensure!(wrong.is_empty(), "not tidy:\n  {}", wrong.join("\n  "));
    println!("tidy: {} files, {} functions of more than {FUNCTION_LINES_MAX} lines", files.len(), long.len());
    Ok(())
}

/// Golden files are only added, and their texts only grow.
fn golden() -> Result<Vec<String>> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).args([FROZEN, "--", GOLDEN]).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok::<_, anyhow::Error>(output.status.success().then_some(text))
    };
    let Some(changed) = git(&["diff", "--no-renames", "--diff-filter=d", "--numstat"])? else {
        println!("tidy: commit {FROZEN} is not in this clone, so golden files were not compared");
        return Ok(Vec::new());
    };
    let mut wrong = Vec::new();
    let added =
        git(&["diff", "--no-renames", "--diff-filter=A", "--name-only"])?.context("git diff failed")?;
    let added: BTreeSet<&str> = added.lines().collect();
    for line in changed.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        // Texts of many lines may grow. For what is no text, numbers of lines are `-`.
        if let [_, gone, file] = fields[..]
            && !(gone == "0" && file.ends_with(".txt"))
            && !added.contains(file)
        {
            wrong.push(format!("{file} is golden and was changed; add another beside it"));
        }
    }
    let gone =
        git(&["diff", "--no-renames", "--diff-filter=D", "--name-only"])?.context("git diff failed")?;
    wrong.extend(gone.lines().map(|file| format!("{file} is golden and was removed")));
    Ok(wrong)
}

fn tracked() -> Result<Vec<String>> {
    let output = Command::new("git").args(["ls-files", "-z"]).output()?;
    ensure!(output.status.success(), "git ls-files failed");
    let text = String::from_utf8(output.stdout)?;
    // What is removed and not yet committed is not there any more.
    Ok(text.split('\0').filter(|name| Path::new(name).is_file()).map(str::to_owned).collect())
}

/// Functions of formatted code: each ends with the first brace that stands as far in as it begins.
fn functions<'a>(lines: &'a [&'a str]) -> Vec<Function<'a>> {
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let Some((before, after)) = code.split_once("fn ") else { continue };
        let is_function = before.split_whitespace().all(|word| {
            matches!(word, "pub" | "async" | "const" | "unsafe" | "extern") || word.starts_with("pub(")
        });
        let name = after.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
        if !is_function || name.is_empty() {
            continue;
        }
        let end = format!("{}}}", &line[..line.len() - code.len()]);
        let length = match line.ends_with('}') || line.ends_with(';') {
            true => Some(1),
            false => {
                lines[at..].iter().position(|line| *line == end || is_declared(line, &end)).map(|n| n + 1)
            }
        };
        if let Some(length) = length {
            found.push(Function { name, lines: &lines[at..at + length] });
        }
    }
    found
}

/// The end of a function of a trait that has no body.
fn is_declared(line: &str, end: &str) -> bool {
    line.strip_prefix(&end[..end.len() - 1]).is_some_and(|rest| rest.starts_with(')') && rest.ends_with(';'))
}

fn allowed(ratchet: &str) -> BTreeMap<&str, usize> {
    let lines = ratchet.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(' '));
    lines.filter_map(|(lines, function)| Some((function, lines.parse().ok()?))).collect()
}

fn compare(long: &BTreeMap<String, usize>, ratchet: &str) -> Vec<String> {
    let allowed = allowed(ratchet);
    let mut wrong = Vec::new();
    for (function, lines) in long {
        match allowed.get(function.as_str()) {
            None => wrong.push(format!("{function} has {lines} lines; {FUNCTION_LINES_MAX} are allowed")),
            Some(allowed) if lines > allowed => {
                wrong.push(format!("{function} has grown from {allowed} lines to {lines}; make it shorter"));
            }
            Some(allowed) if lines < allowed => {
                wrong.push(format!("{function} has {lines} lines now: `cargo xtask tidy --write`"));
            }
            Some(_) => {}
        }
    }
    for function in allowed.keys().filter(|function| !long.contains_key(**function)) {
        wrong.push(format!("{function} is not long any more: `cargo xtask tidy --write`"));
    }
    wrong
}

/// Subjects of the newest commits.
fn subjects() -> Result<Vec<String>> {
    let output =
        Command::new("git").args(["log", "--no-merges", "--format=%h %s", "-n", COMMITS]).output()?;
    ensure!(output.status.success(), "git log failed");
    let text = String::from_utf8(output.stdout)?;
    let mut wrong = Vec::new();
    for (commit, subject) in text.lines().filter_map(|line| line.split_once(' ')) {
        let columns = subject.chars().count();
        if columns > SUBJECT_COLUMNS_MAX {
            wrong.push(format!(
                "commit {commit}: a subject of {columns} columns; {SUBJECT_COLUMNS_MAX} are allowed"
            ));
        }
        if subject.contains(';') {
            wrong.push(format!("commit {commit}: {subject:?} says two things"));
        }
        let is_begun = subject.split_once(": ").is_some_and(|(area, change)| {
            !area.is_empty() && change.chars().next().is_some_and(char::is_lowercase)
        });
        if !is_begun {
            wrong.push(format!("commit {commit}: {subject:?} is not `area: imperative`"));
        }
    }
    Ok(wrong)
}

/// Paths that a document names, and functions behind them, must be there.
fn named(document: &str, text: &str, files: &BTreeSet<&str>) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let mut is_code = false;
    // What was so when it was decided stays in the words of that day.
    if document.starts_with("docs/design/") {
        return Ok(wrong);
    }
    for line in text.lines() {
        if line.starts_with("```") {
            is_code = !is_code;
        }
        if is_code {
            continue;
        }
        let quoted: Vec<&str> = line.split('`').skip(1).step_by(2).collect();
        for (at, word) in quoted.iter().enumerate() {
            let is_source = word.ends_with(".rs") && word.contains('/') && !word.contains(['*', '<', ' ']);
            if !is_source {
                continue;
            }
            if !files.contains(word) {
                wrong.push(format!("{document} names {word}, which does not exist"));
                continue;
            }
            // A table's row may name a test behind its file.
            let test = quoted.get(at + 1).filter(|_| line.contains(&format!("`{word}` `")));
            if let Some(test) = test
                && !std::fs::read_to_string(word)?.contains(&format!("fn {test}("))
            {
                wrong.push(format!("{document} names {test} of {word}, which does not exist"));
            }
        }
    }
    Ok(wrong)
}

/// Every word of the glossary is one that the code uses.
fn words(files: &[String]) -> Result<Vec<String>> {
    let mut code = String::new();
    for file in files.iter().filter(|file| file.ends_with(".rs") || file.ends_with(".proto")) {
        code += &std::fs::read_to_string(file)?.to_lowercase();
    }
    let glossary = std::fs::read_to_string("docs/glossary.md").context("docs/glossary.md")?;
    let rows = glossary.lines().filter_map(|line| line.strip_prefix("| ")?.split_once(" | "));
    let unused = rows
        .map(|(word, _)| word.to_lowercase())
        .filter(|word| word != "word" && !word.starts_with('-'))
        // Of several words each is looked for by itself.
        .filter(|word| !word.split_whitespace().all(|part| code.contains(part)));
    Ok(unused.map(|word| format!("docs/glossary.md explains {word:?}, which no code says")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_measured_from_their_first_line_to_their_brace() {
        let code = "fn one() {}\n\nimpl X {\n    pub(crate) async fn two(\n        a: u8,\n    ) -> u8 {\n        if a {\n            b\n        }\n    }\n}\n";
        let lines: Vec<&str> = code.lines().collect();
        let found: Vec<(&str, usize)> = functions(&lines).iter().map(|f| (f.name, f.lines.len())).collect();
        assert_eq!(found, [("one", 1), ("two", 7)]);
    }

    #[test]
    fn nothing_grows_and_what_shrinks_is_taken_down() {
        let ratchet = "# words\n80 a.rs f\n90 a.rs g\n";
        let long = |f: usize, g: usize| BTreeMap::from([("a.rs f".to_owned(), f), ("a.rs g".to_owned(), g)]);
        assert!(compare(&long(80, 90), ratchet).is_empty());
        assert_eq!(compare(&long(81, 90), ratchet).len(), 1);
        assert_eq!(compare(&long(79, 90), ratchet).len(), 1);
        assert_eq!(compare(&BTreeMap::from([("a.rs f".to_owned(), 80)]), ratchet).len(), 1);
        let mut more = long(80, 90);
        more.insert("a.rs h".to_owned(), 71);
        assert_eq!(compare(&more, ratchet).len(), 1);
    }

    #[test]
    fn documents_name_what_is_there() {
        let files = BTreeSet::from(["a/b.rs"]);
        let of = |text: &str| named("page.md", text, &files).expect("reads").len();
        assert_eq!(of("see `a/c.rs`"), 1);
        assert_eq!(of("see `c.rs` and `a/*.rs`"), 0);
        assert_eq!(of("```\n`a/c.rs`\n```"), 0);
    }
}
