//! `clutch cluster`: who keeps the logs of a running cluster, and who leads them.

use anyhow::{Context as _, Result, bail};
use clutch_client::Client;
use clutch_client_maintenance::members::{self, Change};
use clutch_log::LogId;
use clutch_proto::admin::StatusReply;
use clutch_server::several::layout::BALANCE_AFTER_S;

use crate::{
    args::Which,
    commands::log::chosen,
    output::{self, talk},
};

/// Refuses a node that nobody has met: a number that was mistyped.
pub(super) async fn check_known(client: &Client, node: u64) -> Result<()> {
    let nodes = members::nodes(client).await?;
    if !nodes.contains_key(&node) {
        let known: Vec<String> = nodes.keys().map(u64::to_string).collect();
        bail!("node {node} is not known; these are: {}", known.join(", "));
    }
    Ok(())
}

async fn logs(client: &Client, which: Option<&Which>) -> Result<Vec<LogId>> {
    let all = Which { shard: None, cdc: false, registry_log: false, all: true };
    let shards = client.map().await?.shards.len();
    chosen(which.unwrap_or(&all), u32::try_from(shards).context("more shards than there can be")?)
}

/// Changes the members of these logs, of all where none is named.
pub(super) async fn change(client: &Client, which: Option<&Which>, change: Change) -> Result<()> {
    for id in logs(client, which).await? {
        let bar = output::bar(&id.to_string(), 0);
        let progress = |has, of| {
            bar.set_length(of);
            bar.set_position(has);
        };
        let changed = members::change(client, id, change, &progress).await;
        bar.finish_and_clear();
        let status = changed.with_context(|| format!("change the members of {id}"))?;
        let members = members::members_of(&status);
        let names: Vec<String> = members
            .iter()
            .map(|(node, voter)| if *voter { node.to_string() } else { format!("{node} (no vote)") })
            .collect();
        output::line(format!("{id}: kept by nodes {}", names.join(", ")))?;
        let voters = members.values().filter(|voter| **voter).count();
        if voters.is_multiple_of(2) {
            talk!("  note: {voters} voters bear the loss of {}, as {} do", (voters - 1) / 2, voters - 1);
        }
    }
    Ok(())
}

fn say_leader(id: LogId, leader: u64) -> Result<()> {
    output::line(format!("{id}: node {leader} leads"))
}

/// Lets a node lead these logs, all where none is named.
pub(super) async fn move_leaders(client: &Client, which: Option<&Which>, to: u64) -> Result<()> {
    for id in logs(client, which).await? {
        say_leader(id, members::move_leader(client, id, &|is| (is.leader != to).then_some(to)).await?)?;
    }
    Ok(())
}

/// Lets others lead what a node leads.
pub(super) async fn drain(client: &Client, node: u64) -> Result<()> {
    for id in logs(client, None).await? {
        let (status, _) = members::leader_of(client, id).await?;
        if status.leader == node && members::successor(&status, node).is_none() {
            bail!("{id} is kept by node {node} alone: add another member first");
        }
        let to = |is: &StatusReply| if is.leader == node { members::successor(is, node) } else { None };
        say_leader(id, members::move_leader(client, id, &to).await?)?;
    }
    talk!(
        "  note: when balance_after_s of node.toml has passed ({BALANCE_AFTER_S} s where nothing is said) leaders may come back to node {node}"
    );
    Ok(())
}

/// Refuses to put a member in the place of another: there would be one member less. Where a replacement was interrupted, there is one
/// more than there was.
pub(super) async fn check_replaces(client: &Client, node: u64, with: u64) -> Result<()> {
    for id in logs(client, None).await? {
        let voters = members::members_of(&members::leader_of(client, id).await?.0);
        let votes = |node| voters.get(&node) == Some(&true);
        let count = voters.values().filter(|voter| **voter).count();
        if votes(node) && votes(with) && !count.is_multiple_of(2) {
            bail!(
                "node {with} keeps {id} already, and would do so alone in the place of two: to take node {node} out without another, say \
                 remove-node {node}"
            );
        }
    }
    Ok(())
}

/// Says which disks a node leaves behind that is no member any more.
pub(super) async fn say_what_is_left(client: &Client, node: u64) -> Result<()> {
    let nodes = members::nodes(client).await?;
    let address = nodes.get(&node).with_context(|| format!("node {node} is not known"))?;
    let map = client.refresh_map().await?;
    let disks = map.services.iter().filter(|service| service.address == *address).count();
    if disks > 0 {
        talk!(
            "  note: {disks} disks of node {node} are still in the cluster, and what is on them is nowhere else: let it run as long as files \
             need them. When it is switched off they are read by parity, which makes up for no more disks than there are parity blocks, those of \
             other nodes that went counted in"
        );
    }
    Ok(())
}
