//! One module for each command.

pub(crate) mod bench;
pub(crate) mod blocks;
pub(crate) mod cluster;
pub(crate) mod collect;
pub(crate) mod disk;
pub(crate) mod fs;
pub(crate) mod fsck;
pub(crate) mod fuzz;
pub(crate) mod log;
pub(crate) mod node;
pub(crate) mod serving;
pub(crate) mod shell;
pub(crate) mod status;
pub(crate) mod up;
pub(crate) mod up_several;
