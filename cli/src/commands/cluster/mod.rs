//! `clutch cluster`.

mod joining;
mod members;
mod rotation;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use clutch_client::Client;
use clutch_client_maintenance::members::Change;
use clutch_runtime::Runtime;
use clutch_server::several::layout::NewCluster;

use crate::{
    args::{ClusterCommand, InitArgs},
    commands::status,
    output::talk,
};

pub(crate) async fn run(
    runtime: &Runtime,
    client: impl Fn(Option<[u8; 32]>) -> Result<Client>,
    operator: impl AsyncFn() -> Result<Client>,
    command: &ClusterCommand,
) -> Result<ExitCode> {
    match command {
        ClusterCommand::Init(args) => return init(runtime, args),
        ClusterCommand::Invite(args) => joining::invite(runtime, &operator().await?, args).await?,
        ClusterCommand::Join(args) => joining::join(runtime, client, args).await?,
        ClusterCommand::Status(args) => return status::run(&client(None)?, args).await,
        ClusterCommand::AddReplica(of) => {
            members::change(&operator().await?, of.which.as_ref(), Change::Add(of.node)).await?;
        }
        ClusterCommand::RemoveReplica(of) => {
            let client = operator().await?;
            members::check_known(&client, of.node).await?;
            members::change(&client, of.which.as_ref(), Change::Remove(of.node)).await?;
        }
        ClusterCommand::ReplaceNode { node, with } => {
            ensure!(node != with, "a node cannot be put in its own place");
            let client = operator().await?;
            members::check_replaces(&client, *node, *with).await?;
            members::change(&client, None, Change::Replace(*node, *with)).await?;
            // All is done; who leads now may never have met a node that is gone.
            let _ = members::say_what_is_left(&client, *node).await;
        }
        ClusterCommand::RemoveNode { node } => {
            let client = operator().await?;
            members::check_known(&client, *node).await?;
            members::change(&client, None, Change::Remove(*node)).await?;
            members::say_what_is_left(&client, *node).await?;
        }
        ClusterCommand::MoveLeader { to, which } => {
            members::move_leaders(&operator().await?, which.as_ref(), *to).await?;
        }
        ClusterCommand::RotateKey(args) => rotation::rotate(&operator().await?, args).await?,
        ClusterCommand::Drain { node } => {
            let client = operator().await?;
            members::check_known(&client, *node).await?;
            members::drain(&client, *node).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn init(runtime: &Runtime, args: &InitArgs) -> Result<ExitCode> {
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
