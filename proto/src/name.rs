//! Names of directory entries: what is valid, and the hash that orders them.

use crate::{error::Refusal, rules::v1::NAME_BYTES_MAX, types::Code};

/// The order of a directory's entries: 63 bits, never 0, so that 0 can mean "from the start".
///
/// XXH3 of the name with its lowest bit cut off. Part of the format: stored in keys.
pub fn hash63(name: &[u8]) -> u64 {
    (xxhash_rust::xxh3::xxh3_64(name) >> 1).max(1)
}

/// Accepts what POSIX accepts: 1 to 255 bytes, no NUL, no slash, not `.` or `..`.
pub fn check(name: &[u8]) -> Result<(), Refusal> {
    let shown = String::from_utf8_lossy(&name[..name.len().min(64)]);
    match name {
        [] => Err(Refusal::new(Code::InvalidName, "an empty name")),
        b"." | b".." => Err(Refusal::new(Code::InvalidName, format!("the name {shown:?} is reserved"))),
        _ if name.len() > NAME_BYTES_MAX => Err(Refusal::new(
            Code::NameTooLong,
            format!("a name of {} bytes; at most {NAME_BYTES_MAX} are allowed", name.len()),
        )),
        _ if name.iter().any(|&b| b == 0 || b == b'/') => {
            Err(Refusal::new(Code::InvalidName, format!("the name {shown:?} has a slash or a NUL in it")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_at_the_edges() {
        assert!(check(b"a").is_ok() && check(&[0xff; 255]).is_ok() && check(b"...").is_ok());
        for (name, code) in [
            (&b""[..], Code::InvalidName),
            (b".", Code::InvalidName),
            (b"..", Code::InvalidName),
            (b"a/b", Code::InvalidName),
            (b"a\0", Code::InvalidName),
            (&[b'x'; 256], Code::NameTooLong),
        ] {
            assert_eq!(check(name).expect_err("refused").code, code);
        }
    }

    #[test]
    fn the_hash_is_part_of_the_format() {
        assert_eq!(hash63(b""), 0x2d06_8005_38d3_94c2 >> 1);
        assert!(hash63(b"a") < 1 << 63);
    }
}
