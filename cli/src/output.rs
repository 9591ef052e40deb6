//! How things are shown: JSON documents, names, times, modes, sizes, progress, talk.
//!
//! Data go to standard output, talk to standard error. Invariants: nothing here panics because nobody reads; a name from
//! outside never reaches a terminal with a control character in it; a number in JSON is exact in every reader.

use std::io::{IsTerminal as _, Write as _};

use anyhow::Result;
use clutch_proto::{InodeId, InodeKind};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::{Value, json};

/// Says something to whoever looks; that nobody does is no failure.
macro_rules! talk {
    ($($arg:tt)*) => { $crate::output::say(&format!($($arg)*)) };
}
pub(crate) use talk;

/// One line on standard error, without control characters.
pub(crate) fn say(text: &str) {
    // Whoever closed it does not want to know.
    let _ = writeln!(std::io::stderr().lock(), "{}", printable(text.as_bytes()));
}

/// Standard error for the log of the process: what cannot be written is dropped.
pub(crate) struct Quiet;

impl std::io::Write for Quiet {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = std::io::stderr().lock().write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Prints one JSON document.
pub(crate) fn json(document: &impl Serialize) -> Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, document).map_err(std::io::Error::from)?;
    writeln!(out)?;
    out.flush()?;
    Ok(())
}

/// Prints one line, and reports a closed pipe as an error instead of panicking. What is in it from outside cannot drive a
/// terminal.
pub(crate) fn line(text: impl std::fmt::Display) -> Result<()> {
    line_of(text.to_string().as_bytes())
}

/// The same of bytes: as they are where a program reads them.
pub(crate) fn line_of(text: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    if std::io::stdout().is_terminal() {
        writeln!(out, "{}", printable(text))?;
    } else {
        out.write_all(text)?;
        out.write_all(b"\n")?;
    }
    Ok(())
}

/// Prints several lines of our own making, as a table is.
pub(crate) fn block(text: impl std::fmt::Display) -> Result<()> {
    let text = text.to_string();
    text.lines().try_for_each(line)
}

/// Bytes as text without control characters: those, and what is not UTF-8, as `\xNN`; so no two look the same.
pub(crate) fn printable(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let escape = |text: &mut String, bytes: &[u8]| {
        for byte in bytes {
            match byte {
                b'\n' => text.push_str("\\n"),
                b'\r' => text.push_str("\\r"),
                b'\t' => text.push_str("\\t"),
                byte => text.push_str(&format!("\\x{byte:02x}")),
            }
        }
    };
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            // Also those that turn the direction of what follows.
            let drives = c.is_control()
                || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
            match drives {
                true => escape(&mut text, c.encode_utf8(&mut [0; 4]).as_bytes()),
                false => text.push(c),
            }
        }
        escape(&mut text, chunk.invalid());
    }
    text
}

/// A name in JSON: exact where it is UTF-8. Another one is shown with escapes, and `NAME_bytes` beside it has its bytes in
/// hexadecimal.
pub(crate) fn put_name(document: &mut Value, key: &str, name: &[u8]) {
    match std::str::from_utf8(name) {
        Ok(name) => document[key] = json!(name),
        Err(_) => {
            document[key] = json!(printable(name));
            document[format!("{key}_bytes")] =
                json!(name.iter().map(|b| format!("{b:02x}")).collect::<String>());
        }
    }
}

/// A number in JSON: as a string where readers that keep numbers in floating point would round it.
pub(crate) fn number(n: u64) -> Value {
    const EXACT_MAX: u64 = 1 << 53;
    if n <= EXACT_MAX { json!(n) } else { json!(n.to_string()) }
}

/// Nanoseconds since 1970 in JSON: always a string, because nearly all of them would be rounded.
pub(crate) fn nanoseconds(ns: u64) -> Value {
    json!(ns.to_string())
}

/// Nanoseconds since 1970 as a person reads them.
pub(crate) fn time(ns: u64) -> String {
    i64::try_from(ns)
        .ok()
        .and_then(|ns| jiff::Timestamp::from_nanosecond(i128::from(ns)).ok())
        .map_or_else(|| ns.to_string(), |t| t.strftime("%Y-%m-%d %H:%M:%S").to_string())
}

/// A word for the kind of an inode.
pub(crate) fn kind(id: InodeId) -> &'static str {
    match id.kind() {
        InodeKind::Directory => "directory",
        InodeKind::File => "file",
        InodeKind::Symlink => "symlink",
    }
}

/// Kind and permission bits as `ls -l` shows them.
pub(crate) fn mode(id: InodeId, mode: u32) -> String {
    let mut text = String::from(match id.kind() {
        InodeKind::Directory => "d",
        InodeKind::File => "-",
        InodeKind::Symlink => "l",
    });
    for shift in [6, 3, 0] {
        for (bit, letter) in [(4, 'r'), (2, 'w'), (1, 'x')] {
            text.push(if mode >> shift & bit != 0 { letter } else { '-' });
        }
    }
    text
}

/// Bytes with a unit.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

/// A counter on standard error; nothing where nobody looks.
pub(crate) fn counter(what: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix}: {msg} {elapsed}") {
        bar.set_style(style);
    }
    bar.set_prefix(what.to_owned());
    bar.enable_steady_tick(std::time::Duration::from_millis(100));
    bar
}

/// A bar on standard error; nothing where nobody looks.
pub(crate) fn bar(what: &str, total: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(total);
    if let Ok(style) = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {eta}") {
        bar.set_style(style);
    }
    bar.set_prefix(what.to_owned());
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_drives_a_terminal_gets_through() {
        for (bytes, shown) in [
            (&b"plain name"[..], "plain name"),
            (b"a\x1b]0;x\x07b", "a\\x1b]0;x\\x07b"),
            (b"one\ntwo\r\t", "one\\ntwo\\r\\t"),
            (b"caf\xe9.txt", "caf\\xe9.txt"),
            ("caf\u{e9} \u{1f980}".as_bytes(), "caf\u{e9} \u{1f980}"),
            ("\u{9b}31m\u{202e}".as_bytes(), "\\xc2\\x9b31m\\xe2\\x80\\xae"),
        ] {
            assert_eq!(printable(bytes), shown);
        }
    }

    #[test]
    fn numbers_survive_readers_that_round() {
        assert_eq!(number(5), json!(5));
        assert_eq!(number(1 << 53), json!(1u64 << 53));
        assert_eq!(number((1 << 53) + 1), json!("9007199254740993"));
        assert_eq!(nanoseconds(7), json!("7"));
    }
}
