//! Ids and time. Every id that crosses a crate has a type of its own; on the wire they are plain `u64`.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:x})"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:x}", self.0)
            }
        }
    };
}

id!(
    /// A block service: one disk. Assigned once when the disk is formatted, never 0.
    ServiceId
);
id!(
    /// A client process, drawn at random when it starts, never 0.
    ClientId
);
id!(
    /// A block. The low byte is the slot of the span's shard; never reused.
    BlockId
);
id!(
    /// A span. The low byte is its slot; never reused.
    SpanId
);
id!(
    /// One version of a file's bytes. The low byte is its slot; never reused, never 0.
    ContentId
);

/// One of the 256 parts of the namespace; a shard owns a contiguous range of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u8);

impl ContentId {
    /// The slot that holds its rows.
    pub fn slot(self) -> Slot {
        Slot(self.0 as u8)
    }
}

impl BlockId {
    /// The slot of its span.
    pub fn slot(self) -> Slot {
        Slot(self.0 as u8)
    }
}

impl SpanId {
    /// The slot that holds its row.
    pub fn slot(self) -> Slot {
        Slot(self.0 as u8)
    }
}

/// What an inode is; the two highest bits of its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum InodeKind {
    /// 1 on the wire.
    Directory,
    /// 2 on the wire.
    File,
    /// 3 on the wire.
    Symlink,
}

/// An inode: `kind (2 bits) | sequence (54 bits) | slot (8 bits)`. Never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId(u64);

impl fmt::Debug for InodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InodeId({:x})", self.0)
    }
}
impl fmt::Display for InodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl InodeId {
    /// The root directory: sequence 1 in slot 0.
    pub const ROOT: InodeId = InodeId(1 << 62 | 1 << 8);
    /// Sequences stay below this.
    pub const SEQUENCE_MAX: u64 = (1 << 54) - 1;

    /// Builds an id; `None` when the sequence does not fit.
    pub fn new(kind: InodeKind, sequence: u64, slot: Slot) -> Option<InodeId> {
        let kind = match kind {
            InodeKind::Directory => 1u64,
            InodeKind::File => 2,
            InodeKind::Symlink => 3,
        };
        (sequence != 0 && sequence <= Self::SEQUENCE_MAX)
            .then_some(InodeId(kind << 62 | sequence << 8 | u64::from(slot.0)))
    }

    /// Reads an id from the wire; `None` when its kind or sequence is not one.
    pub fn from_wire(raw: u64) -> Option<InodeId> {
        (raw >> 62 != 0 && (raw << 2) >> 10 != 0).then_some(InodeId(raw))
    }

    /// The wire form.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// What it is.
    pub fn kind(self) -> InodeKind {
        match self.0 >> 62 {
            1 => InodeKind::Directory,
            2 => InodeKind::File,
            _ => InodeKind::Symlink,
        }
    }

    /// Whether it is a directory.
    pub fn is_directory(self) -> bool {
        self.kind() == InodeKind::Directory
    }

    /// The slot that holds its row and, for a directory, its edges.
    pub fn slot(self) -> Slot {
        Slot(self.0 as u8)
    }
}

/// Nanoseconds since the Unix epoch, as a log orders them: strictly increasing within one log.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Time(pub u64);

impl fmt::Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Time({}.{:09})", self.0 / 1_000_000_000, self.0 % 1_000_000_000)
    }
}

impl Time {
    /// Adds milliseconds and stays at the highest time instead of wrapping.
    pub fn plus_ms(self, ms: u64) -> Time {
        Time(self.0.saturating_add(ms.saturating_mul(1_000_000)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_times_are_shown_as_people_type_them() {
        let id = InodeId::new(InodeKind::Directory, 1, Slot(0)).expect("fits");
        assert_eq!((id, id.is_directory()), (InodeId::ROOT, true));
        assert_eq!(format!("{id} {id:?}"), "4000000000000100 InodeId(4000000000000100)");
        for kind in [InodeKind::File, InodeKind::Symlink] {
            assert!(!InodeId::new(kind, 1, Slot(0)).expect("fits").is_directory());
        }
        let time = Time(7_000_000_009);
        assert_eq!(format!("{time:?}"), "Time(7.000000009)");
        assert_eq!((time.plus_ms(3), time.plus_ms(u64::MAX)), (Time(7_003_000_009), Time(u64::MAX)));
    }

    #[test]
    fn ids_survive_the_wire() {
        for kind in [InodeKind::Directory, InodeKind::File, InodeKind::Symlink] {
            for sequence in [1, 2, 1 << 30, InodeId::SEQUENCE_MAX] {
                for slot in [0u8, 1, 255] {
                    let id = InodeId::new(kind, sequence, Slot(slot)).expect("fits");
                    assert_eq!(InodeId::from_wire(id.raw()), Some(id));
                    assert_eq!((id.kind(), id.slot()), (kind, Slot(slot)));
                }
            }
        }
        assert_eq!(InodeId::new(InodeKind::File, InodeId::SEQUENCE_MAX + 1, Slot(0)), None);
        assert_eq!(InodeId::from_wire(0), None);
        assert_eq!(InodeId::from_wire(0xff), None);
        assert_eq!(InodeId::from_wire(1 << 62 | 0xff), None);
        assert_eq!(InodeId::from_wire(InodeId::ROOT.raw()), Some(InodeId::ROOT));
    }
}
