//! Logs that an earlier build wrote are replayed to the hashes that it had: words of refusals, defaults and limits of this
//! build must not show in a state.

use std::{collections::BTreeSet, path::Path};

use clutch_integration::golden_logs::{decode, replay};

#[test]
fn kept_logs_replay_to_the_hashes_that_were_recorded() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/formats/golden/logs");
    let recorded = std::fs::read_to_string(dir.join("hashes.txt")).expect("the hashes");
    let mut found = BTreeSet::new();
    let mut files = 0;
    for part in recorded.split("\n\n").filter(|part| !part.trim().is_empty() && !part.starts_with('#')) {
        let (name, hashes) = part.trim().split_once('\n').expect("a name and hashes");
        let file = std::fs::read(dir.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let (lines, codes) =
            replay(&decode(&file).expect("decodes")).unwrap_or_else(|e| panic!("{name}: {e:#}"));
        assert_eq!(lines.trim(), hashes, "{name}");
        found.extend(codes.iter().map(|code| format!("{code:?}")));
        files += 1;
    }
    assert!(files > 0);
    let expected = recorded.lines().filter_map(|l| l.strip_prefix("# refusals: ")).flat_map(|l| l.split(' '));
    let expected: BTreeSet<String> = expected.map(str::to_owned).collect();
    assert_eq!(found, expected, "refusals of every kind that apply decides");
}
