//! How far a disk has been read through, kept on the disk itself: it goes on there after a restart, and with the disk to another node.
//!
//! File `scrub`: `begun ended marks after`, two decimal numbers of nanoseconds since 1970, letters or `-`, hexadecimal digits or `-`,
//! a line feed, CRC-32 of the line before as 8 hex digits, a line feed. The letters: `h` for [`Position::is_hasty`], `c` for
//! [`Position::was_condemned`]. What is damaged or missing is worth nothing: then the disk may be another one, and all of it is read.

use clutch_proto::Time;

/// The file's name.
pub const SCRUB_FILE: &str = "scrub";

/// How far a disk has been read through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// When this reading began; 0 before the first.
    pub begun: Time,
    /// When the last one that came to its end did; 0 for never.
    pub ended: Time,
    /// Where it goes on, as the visit of spans said; empty at the beginning, and where none is under way.
    pub after: Vec<u8>,
    /// The disk has lost something: it is read at once, and not spread over the time that there is.
    pub is_hasty: bool,
    /// It was condemned when it was looked at last.
    pub was_condemned: bool,
}

impl Position {
    /// The file's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let hex: String = self.after.iter().map(|byte| format!("{byte:02x}")).collect();
        let after = if hex.is_empty() { "-" } else { &hex };
        let marks = match (self.is_hasty, self.was_condemned) {
            (false, false) => "-",
            (true, false) => "h",
            (false, true) => "c",
            (true, true) => "hc",
        };
        let line = format!("{} {} {marks} {after}\n", self.begun.0, self.ended.0);
        format!("{line}{:08x}\n", crc32fast::hash(line.as_bytes())).into_bytes()
    }

    /// Reads a file's bytes; `None` when they are no position.
    pub fn decode(bytes: &[u8]) -> Option<Position> {
        let text = std::str::from_utf8(bytes).ok()?;
        let (line, crc) = text.split_at(text.find('\n')? + 1);
        if crc != format!("{:08x}\n", crc32fast::hash(line.as_bytes())) {
            return None;
        }
        let mut fields = line.trim_end().split(' ');
        let mut number = || fields.next()?.parse().ok().map(Time);
        let (begun, ended) = (number()?, number()?);
        let (is_hasty, was_condemned) = match fields.next()? {
            "-" => (false, false),
            "h" => (true, false),
            "c" => (false, true),
            "hc" => (true, true),
            _ => return None,
        };
        let after = match fields.next()? {
            "-" => Vec::new(),
            hex => unhex(hex)?,
        };
        let position = Position { begun, ended, after, is_hasty, was_condemned };
        fields.next().is_none().then_some(position)
    }
}

fn unhex(hex: &str) -> Option<Vec<u8>> {
    let digits = hex.bytes().all(|byte| byte.is_ascii_hexdigit()) && hex.len().is_multiple_of(2);
    let pair = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).ok();
    if digits { (0..hex.len()).step_by(2).map(pair).collect() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_come_back_and_a_flipped_bit_is_none() {
        for (n, after) in [vec![], vec![0], vec![7; 17], vec![255]].into_iter().enumerate() {
            let (is_hasty, was_condemned) = (n % 2 == 1, n > 1);
            let position =
                Position { begun: Time(12), ended: Time(u64::MAX), after, is_hasty, was_condemned };
            let bytes = position.encode();
            assert_eq!(Position::decode(&bytes), Some(position.clone()));
            for bit in 0..bytes.len() * 8 {
                let mut flipped = bytes.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                // The case of a digit means nothing.
                assert!(Position::decode(&flipped).is_none_or(|read| read == position), "bit {bit}");
            }
            for end in 0..bytes.len() {
                assert_eq!(Position::decode(&bytes[..end]), None, "{end} bytes");
            }
        }
    }
}
