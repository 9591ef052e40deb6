//! `clutch cluster`.

use std::process::ExitCode;

use anyhow::Result;
use clutch_runtime::Runtime;
use clutch_server::several::layout::NewCluster;

use crate::{args::InitArgs, output::talk};

pub(crate) fn init(runtime: &Runtime, args: &InitArgs) -> Result<ExitCode> {
    let InitArgs { dir, nodes, shards, disks, policy } = args;
    let new = NewCluster {
        dir: dir.clone(),
        nodes: nodes.clone(),
        shards: *shards,
        disks: *disks,
        policy: *policy,
    };
    let cluster = new.create(runtime)?;
    let count = nodes.len();
    talk!("clutch: made cluster {} of {count} nodes in {}", cluster.cluster, dir.display());
    talk!(
        "  registry, CDC and {shards} shards with a member on each node, {disks} disks, policy {}+{}",
        policy.0,
        policy.1
    );
    talk!(
        "  carry each to its machine and keep no copy; it holds keys, so keep it from others. Then start it there:"
    );
    talk!("    clutch node --config {}/n1/node.toml", dir.display());
    talk!("  and for commands:");
    talk!("    export CLUTCH_REGISTRY={}", nodes.join(","));
    if count.is_multiple_of(2) {
        talk!("  note: {count} nodes bear the loss of {}, as {} do", (count - 1) / 2, count - 1);
    }
    let blocks = policy.0 + policy.1;
    let on_one = blocks.div_ceil(count as u32);
    if on_one > policy.1 {
        talk!(
            "  note: a file has up to {on_one} blocks on one node and bears the loss of {}: with a node away it cannot be read",
            policy.1
        );
    }
    if *disks < blocks {
        talk!(
            "  note: files over 255 bytes need {blocks} disks and there are {disks}; writing one will be refused (no space)"
        );
    }
    Ok(ExitCode::SUCCESS)
}
