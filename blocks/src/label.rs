//! What a disk is known by: a file that names its cluster and service.
//!
//! A directory without its label is a disk that is not mounted, was emptied or was exchanged; one with another's label was
//! swapped. Neither is written to, and neither is labelled by itself: that is the operator's act.
//!
//! File `label`, one JSON object and its checksum: `{"cluster":"16 hex digits","service":"16 hex digits","created":nanoseconds
//! since 1970}`, a line feed, CRC-32 of the line before as 8 hex digits, a line feed.

use std::{
    io,
    path::{Path, PathBuf},
};

use clutch_proto::{ServiceId, Time};
use clutch_runtime::Disk;

/// The file's name.
pub const LABEL_FILE: &str = "label";

/// What a label says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// The cluster that the disk belongs to.
    pub cluster: u64,
    /// The service that its blocks are of.
    pub service: ServiceId,
    /// When it was labelled.
    pub created: Time,
}

impl Label {
    /// The file's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let line = format!(
            "{{\"cluster\":\"{:016x}\",\"service\":\"{:016x}\",\"created\":{}}}\n",
            self.cluster, self.service.0, self.created.0
        );
        format!("{line}{:08x}\n", crc32fast::hash(line.as_bytes())).into_bytes()
    }

    /// Reads a file's bytes; `None` when they are no label.
    pub fn decode(bytes: &[u8]) -> Option<Label> {
        let text = std::str::from_utf8(bytes).ok()?;
        let end = text.find('\n')? + 1;
        let (line, crc) = text.split_at(end);
        if crc != format!("{:08x}\n", crc32fast::hash(line.as_bytes())) {
            return None;
        }
        let field = |name: &str| {
            let rest = line.split_once(&format!("\"{name}\":"))?.1;
            let rest = rest.trim_start_matches('"');
            Some(&rest[..rest.find(|c: char| !c.is_ascii_hexdigit())?])
        };
        Some(Label {
            cluster: u64::from_str_radix(field("cluster")?, 16).ok()?,
            service: ServiceId(u64::from_str_radix(field("service")?, 16).ok()?),
            created: Time(field("created")?.parse().ok()?),
        })
    }

    /// Labels a disk, durably.
    pub fn write(&self, disk: &dyn Disk, dir: &Path) -> io::Result<()> {
        disk.create_dir_all(dir)?;
        disk.replace(&path(dir), &self.encode())
    }
}

/// Where a disk's label lies.
pub fn path(dir: &Path) -> PathBuf {
    dir.join(LABEL_FILE)
}

/// Why a directory cannot be used as the disk of a service; `Ok` when it can.
///
/// # Errors
/// A sentence that says what is there instead and what to do.
pub fn check(disk: &dyn Disk, dir: &Path, cluster: u64, service: ServiceId) -> Result<(), String> {
    let shown = dir.display();
    let path = path(dir);
    if !disk.exists(&path) {
        return Err(format!(
            "disk {shown} is missing or empty: it has no label. Mount it; or, when it was exchanged for an empty one, label \
             that with `clutch disk label`"
        ));
    }
    let bytes = disk.read(&path).map_err(|error| format!("disk {shown} cannot be read: {error}"))?;
    match Label::decode(&bytes) {
        None => Err(format!("the label of disk {shown} is damaged; write it again with `clutch disk label`")),
        Some(label) if (label.cluster, label.service) != (cluster, service) => Err(format!(
            "disk {shown} belongs to service {} of cluster {:016x}, not to service {service} of cluster {cluster:016x}: it was \
             swapped; mount each disk in its own place",
            label.service, label.cluster
        )),
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_label_and_every_flip() {
        let label = Label { cluster: 0x0102_0304_0506_0708, service: ServiceId(7), created: Time(99) };
        let bytes = label.encode();
        assert_eq!(bytes, include_bytes!("../../docs/formats/golden/label"));
        assert_eq!(Label::decode(&bytes), Some(label));
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Label::decode(&flipped), None, "bit {bit}");
        }
        for end in 0..bytes.len() {
            assert_eq!(Label::decode(&bytes[..end]), None);
        }
    }
}
