//! `docs/operations.md` must name every operation of the protocol once, with no empty cell, only codes that exist, and
//! tests that exist.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use crate::places;
use anyhow::{Context as _, Result, ensure};

const PAGE: &str = "docs/operations.md";
const COLUMNS: usize = 6;

/// Sections of the page and the message whose operations they list.
const AREAS: &[(&str, &str, &str)] = &[
    ("Shard", "proto/clutch/shard/v1/shard.proto", "ShardRequest"),
    ("CDC", "proto/clutch/cdc/v1/cdc.proto", "CdcRequest"),
    ("Registry", "proto/clutch/registry/v1/registry.proto", "RegistryRequest"),
    ("Block service", "proto/clutch/blocks/v1/blocks.proto", "BlocksRequest"),
    ("Administration", "proto/clutch/admin/v1/admin.proto", "AdminRequest"),
];

/// The types of a request's operations.
fn operations(proto: &str, message: &str) -> Result<BTreeSet<String>> {
    let begin = format!("message {message} {{");
    let body = proto.split_once(&begin).with_context(|| format!("{message} is not in its file"))?.1;
    let body = body.split_once("\n}").context("the message has no end")?.0;
    let words = body.lines().map(|line| line.split("//").next().unwrap_or_default());
    let fields = words.filter(|line| line.contains('=')).filter_map(|line| line.split_whitespace().next());
    Ok(fields.map(str::to_owned).collect())
}

/// `CODE_NOT_FOUND` as `NotFound`.
fn camel(code: &str) -> String {
    let words = code.trim_start_matches("CODE_").split('_');
    words.map(|word| format!("{}{}", &word[..1], word[1..].to_lowercase())).collect()
}

fn quoted(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Tables by section: the cells of each row that begins with an operation.
fn sections(page: &str) -> BTreeMap<String, Vec<Vec<String>>> {
    let mut found: BTreeMap<String, Vec<Vec<String>>> = BTreeMap::new();
    let mut section = String::new();
    for line in page.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            section = title.to_owned();
        } else if line.starts_with("| `") {
            let cells = line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
            found.entry(section.clone()).or_default().push(cells);
        }
    }
    found
}

/// What is wrong with one row.
fn check_row(row: &[String], codes: &BTreeSet<String>) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let name = &row[0];
    if row.len() != COLUMNS || row.iter().any(String::is_empty) {
        wrong.push(format!("{name} has {} cells, or empty ones; {COLUMNS} are needed", row.len()));
        return Ok(wrong);
    }
    for code in quoted(&row[1]).iter().filter(|code| !codes.contains(*code)) {
        wrong.push(format!("{name}: {code} is not a code"));
    }
    if let [file, test] = &quoted(&row[5])[..] {
        let text = std::fs::read_to_string(file).with_context(|| format!("{name}: read {file}"))?;
        if !text.contains(&format!("fn {test}(")) {
            wrong.push(format!("{name}: {file} has no test {test}"));
        }
    } else {
        wrong.push(format!("{name}: the last cell names a file and a test of it"));
    }
    Ok(wrong)
}

pub(crate) fn check() -> Result<()> {
    ensure!(Path::new(PAGE).exists(), "run this from the top of the repository");
    let found = sections(&std::fs::read_to_string(PAGE)?);
    let types = std::fs::read_to_string("proto/clutch/types/v1/types.proto")?;
    let codes: BTreeSet<String> = types
        .lines()
        .filter_map(|line| line.trim().split_once(" = ").map(|(code, _)| code))
        .filter(|code| code.starts_with("CODE_"))
        .map(camel)
        .collect();
    let (mut wrong, mut count) = (Vec::new(), 0);
    for (section, file, message) in AREAS {
        let expected = operations(&std::fs::read_to_string(file)?, message)?;
        let rows = found.get(*section).cloned().unwrap_or_default();
        let mut listed = BTreeSet::new();
        for row in &rows {
            count += 1;
            let name = quoted(&row[0]).pop().unwrap_or_default();
            if !expected.contains(&name) {
                wrong.push(format!("{section}: {name} is not an operation of {message}"));
            }
            if !listed.insert(name.clone()) {
                wrong.push(format!("{section}: {name} is there twice"));
            }
            wrong.extend(check_row(row, &codes)?);
        }
        for missing in expected.difference(&listed) {
            wrong.push(format!("{section}: {missing} is missing"));
        }
    }
    ensure!(wrong.is_empty(), "{PAGE} does not fit the protocol:\n  {}", wrong.join("\n  "));
    println!("operations: {count}, each with its row");
    let (_, file, message) = AREAS[0];
    places::check(&operations(&std::fs::read_to_string(file)?, message)?)
}
