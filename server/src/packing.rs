//! Small blocks of a directory's disks.

use std::{io, path::Path, sync::Arc};

use clutch_blocks::PackOptions;
use clutch_runtime::Runtime;
use parking_lot::Mutex;

use crate::ClusterFile;

/// How small blocks are kept.
#[derive(Clone)]
pub struct Packing {
    /// Where they go.
    pub options: PackOptions,
    /// Takes note that a build which does not know that cannot be gone back to.
    pub before_first: Arc<dyn Fn() -> io::Result<()> + Send + Sync>,
}

impl Packing {
    /// Of the disks of a directory.
    pub fn of(runtime: &Runtime, dir: &Path) -> Packing {
        let (runtime, dir) = (runtime.clone(), dir.to_owned());
        // All disks of a directory come to their first small block at about the same time.
        let is_raised = Mutex::new(false);
        let raise = move || {
            let mut is_raised = is_raised.lock();
            if !*is_raised {
                ClusterFile::raise(&runtime, &dir).map_err(|e| io::Error::other(format!("{e:#}")))?;
                *is_raised = true;
            }
            Ok(())
        };
        Packing { options: PackOptions::default(), before_first: Arc::new(raise) }
    }

    /// Of disks that no older build has seen, as in a simulation.
    pub fn with(options: PackOptions) -> Packing {
        Packing { options, before_first: Arc::new(|| Ok(())) }
    }
}
