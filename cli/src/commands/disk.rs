//! `clutch disk`.

use std::process::ExitCode;

use anyhow::Result;
use clutch_runtime::Runtime;
use clutch_server::up;

use crate::{args::DiskCommand, output};

pub(crate) fn run(runtime: &Runtime, command: &DiskCommand) -> Result<ExitCode> {
    match command {
        DiskCommand::Label { dir, disk } => {
            let labelled = up::label_disk(runtime, dir, *disk)?;
            output::line(format!("labelled {}", labelled.display()))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
