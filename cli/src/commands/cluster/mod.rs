//! `clutch cluster`.

mod members;

use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clutch_client::Client;
use clutch_client_maintenance::members::Change;
use clutch_runtime::Runtime;
use clutch_server::several::layout::{NewCluster, NewNode};

use crate::{
    args::{ClusterCommand, InitArgs, JoinArgs},
    output::talk,
};

pub(crate) async fn run(
    runtime: &Runtime,
    client: impl Fn() -> Result<Client>,
    operator: impl AsyncFn() -> Result<Client>,
    command: &ClusterCommand,
) -> Result<ExitCode> {
    match command {
        ClusterCommand::Init(args) => return init(runtime, args),
        ClusterCommand::Join(args) => join(runtime, &client()?, args).await?,
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
            members::change(&operator().await?, None, Change::Replace(*node, *with)).await?;
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
        ClusterCommand::Drain { node } => members::drain(&operator().await?, *node).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn join(runtime: &Runtime, client: &Client, args: &JoinArgs) -> Result<()> {
    let mut nodes = clutch_client_maintenance::members::nodes(client).await?;
    if let Some((node, _)) = nodes.iter().find(|(_, address)| **address == args.address) {
        anyhow::bail!("node {node} is reached as {} already: choose another address", args.address);
    }
    let node =
        nodes.keys().max().copied().context("the registry knows of no node: is it one of several?")? + 1;
    nodes.insert(node, args.address.clone());
    let (dir, from, disks) = (args.dir.clone(), args.from.clone(), args.disks);
    let cluster = client.map().await?.cluster;
    let file = NewNode { dir, from, cluster, node, nodes, disks }.create(runtime)?;
    talk!("clutch: made node {node} of cluster {} in {}", file.cluster, args.dir.display());
    talk!(
        "  carry it to its machine and keep no copy; it holds keys, so keep it from others. Then start it there:"
    );
    talk!("    clutch node --config {}/node.toml", args.dir.display());
    talk!("  and make it a member of all logs:");
    talk!(
        "    clutch cluster add-replica {node} --all    (or: clutch cluster replace-node OLD --with {node})"
    );
    Ok(())
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
