//! Keyrings: one file for each block service, mode 0600, a line of text for each epoch: `EPOCH KEY CHECK`, the key as 64 hexadecimal
//! digits of 32 random bytes, the check as 8 of the CRC32 of what is before it. Lines of earlier builds have no check.

use std::{
    collections::BTreeMap,
    io::Write as _,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use clutch_proto::{ServiceId, certificate::Key};
use clutch_runtime::Runtime;
use clutch_shard::Keyring;

use crate::joining::Secret;

/// Reads the keys of these services, and makes those that are missing.
pub fn load_or_create(runtime: &Runtime, dir: &Path, services: &[u64]) -> Result<Keyring> {
    make_directory(runtime, dir)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))?;
    let mut keyring = Keyring::default();
    for service in services {
        for key in read_or_create(runtime, &dir.join(format!("{service:016x}.key")))? {
            keyring.add(ServiceId(*service), key);
        }
    }
    Ok(keyring)
}

/// Reads the key that the parts of the cluster know each other by, and makes it if it is missing.
pub fn system_key(runtime: &Runtime, dir: &Path) -> Result<[u8; 32]> {
    make_directory(runtime, dir)?;
    let keys = read_or_create(runtime, &dir.join("cluster.key"))?;
    Ok(keys.into_iter().max_by_key(|k| k.epoch).context("no key")?.secret)
}

fn make_directory(runtime: &Runtime, dir: &Path) -> Result<()> {
    let made = runtime.disk.create_dir_all(dir).and_then(|()| match dir.parent() {
        // Also one that a process made that did not come to its sync.
        Some(parent) => runtime.disk.sync_dir(parent),
        None => Ok(()),
    });
    made.with_context(|| format!("make {}", dir.display()))
}

fn read_or_create(runtime: &Runtime, path: &Path) -> Result<Vec<Key>> {
    if !path.exists() {
        create(runtime, path)?;
    }
    read(path)
}

/// Reads a file with keys.
pub(crate) fn read(path: &Path) -> Result<Vec<Key>> {
    let metadata = path.metadata().with_context(|| {
        format!("look at {}: restore it from a copy, or copy it from another node", path.display())
    })?;
    let mode = metadata.permissions().mode() & 0o777;
    ensure!(
        mode & 0o077 == 0,
        "{} can be read by others (mode {mode:o}); run chmod 600 on it",
        path.display()
    );
    let bytes = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let damaged =
        || format!("{} is damaged: restore it from a copy, or copy it from another node", path.display());
    let text = String::from_utf8(bytes).with_context(damaged)?;
    let mut keys = Vec::new();
    for line in text.lines().filter(|l| !l.trim().is_empty()) {
        keys.push(parse(line).with_context(damaged)?);
    }
    ensure!(!keys.is_empty(), "{} holds no key: restore it from a copy", path.display());
    Ok(keys)
}

fn check(epoch_and_key: &str) -> String {
    format!("{:08x}", crc32fast::hash(epoch_and_key.as_bytes()))
}

fn parse(line: &str) -> Result<Key> {
    let line = line.trim();
    let said = match line.match_indices(' ').nth(1) {
        Some((at, _)) => {
            ensure!(line[at + 1..] == check(&line[..at]), "the check at the end of a line does not match");
            &line[..at]
        }
        None => line,
    };
    let (epoch, digits) = said.split_once(' ').context("a line is `EPOCH KEY CHECK`")?;
    ensure!(digits.len() == 64 && digits.is_ascii(), "a key has 64 hexadecimal digits");
    let mut secret = [0; 32];
    for (i, byte) in secret.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).context("not a hexadecimal digit")?;
    }
    Ok(Key { epoch: epoch.parse().context("the epoch is not a number")?, secret })
}

fn newest(keys: Vec<Key>) -> Result<[u8; 32]> {
    Ok(keys.into_iter().max_by_key(|key| key.epoch).context("no key")?.secret)
}

/// Reads the key that the parts of a cluster know each other by, from a file that an operator names.
pub fn read_key(path: &Path) -> Result<[u8; 32]> {
    let named = || {
        format!(
            "the cluster's key is to be in {} (--key or CLUTCH_KEY): name keys/cluster.key in the directory of a node",
            path.display()
        )
    };
    ensure!(!path.is_dir(), "{}; this is a directory", named());
    let metadata = path.metadata().with_context(named)?;
    ensure!(metadata.is_file(), named());
    std::fs::File::open(path).with_context(named)?;
    newest(read(path).with_context(named)?)
}

/// Reads the keys of these services, where others have made them: a key that is made anew is of no use to anybody.
pub fn load(dir: &Path, services: &[u64]) -> Result<Keyring> {
    let mut keyring = Keyring::default();
    for service in services {
        for key in read(&dir.join(format!("{service:016x}.key")))? {
            keyring.add(ServiceId(*service), key);
        }
    }
    Ok(keyring)
}

/// What is in all files with keys, by their names. Each is read as a key first: a damaged one is handed to nobody.
pub(crate) fn texts(dir: &Path) -> Result<BTreeMap<String, Secret>> {
    let mut texts = BTreeMap::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).filter(|name| is_known(name));
        let Some(name) = name else { continue };
        read(&path)?;
        let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        texts.insert(name.to_owned(), Secret(text));
    }
    Ok(texts)
}

/// Whether a file has keys that all nodes have: the cluster's, the one that is to be its next, and those of block services.
fn is_known(name: &str) -> bool {
    let service = name.strip_suffix(".key").filter(|stem| stem.len() == 16);
    name == "cluster.key"
        || name == "cluster.next"
        || service.is_some_and(|stem| stem.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Writes a file with keys, as another node has it.
pub(crate) fn store(dir: &Path, name: &str, text: &str) -> Result<()> {
    ensure!(is_known(name), "{name:?} is no name of a file with keys");
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        parse(line).with_context(|| format!("{name} is damaged"))?;
    }
    write(&dir.join(name), text.as_bytes())
}

fn create(runtime: &Runtime, path: &Path) -> Result<()> {
    let mut secret = [0u8; 32];
    runtime.random.fill(&mut secret);
    write_all(path, &[Key { epoch: 1, secret }])
}

/// Writes a file with these keys, durably.
pub(crate) fn write_all(path: &Path, keys: &[Key]) -> Result<()> {
    let mut text = String::new();
    for key in keys {
        let digits: String = key.secret.iter().map(|b| format!("{b:02x}")).collect();
        let said = format!("{} {digits}", key.epoch);
        text += &format!("{said} {}\n", check(&said));
    }
    write(path, text.as_bytes())
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension("new");
    let _ = std::fs::remove_file(&temporary);
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    std::fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_was_changed_in_any_byte_is_no_key() {
        let said = format!("1 {}", "5c".repeat(32));
        let secret = [0x5c; 32];
        assert_eq!(parse(&said).expect("as earlier builds wrote it").secret, secret);
        let line = format!("{said} {}", check(&said));
        assert_eq!(parse(&format!("{line}\n")).expect("whole").secret, secret);
        for at in 0..line.len() {
            for mask in 1..=255u8 {
                let mut bytes = line.clone().into_bytes();
                bytes[at] ^= mask;
                let Ok(changed) = String::from_utf8(bytes) else { continue };
                // What only adds white space at the end says the same.
                assert!(parse(&changed).is_err() || changed.trim() == line, "{changed:?}");
            }
        }
    }
}
