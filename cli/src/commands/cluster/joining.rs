//! `clutch cluster invite` and `join`: how a new node gets what all nodes of a cluster know.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, Read as _},
    path::Path,
};

use anyhow::{Context as _, Result, bail, ensure};
use clutch_client::Client;
use clutch_client_maintenance::members;
use clutch_proto::registry::{InviteNode, RedeemInvitation, registry_request::Op};
use clutch_runtime::Runtime;
use clutch_server::{
    joining::{Belongings, Token},
    several::layout::{Layout, NewNode},
};

use crate::{
    args::{InviteArgs, JoinArgs},
    output::{self, talk},
};

/// Prints a token.
pub(super) async fn invite(runtime: &Runtime, client: &Client, args: &InviteArgs) -> Result<()> {
    let key = client.key().context(
        "the cluster's key makes tokens: name keys/cluster.key of a node with --key, or ask where a node of this user runs",
    )?;
    let invitation = runtime.random.u64().max(1);
    let cluster = client.map().await?.cluster;
    client.registry(Op::InviteNode(InviteNode { invitation, lifetime_ms: args.lifetime_ms })).await?;
    output::line(Token::of(&key, cluster, invitation))?;
    talk!("  on the new node's machine, within {} s, with CLUTCH_REGISTRY as here:", args.lifetime_ms / 1000);
    talk!("    clutch cluster join --token - --dir DIR --node HOST:PORT --disks N    (and type the token)");
    talk!(
        "  whoever has the token can join once, and gets the cluster's key: pass it on as you would a password"
    );
    Ok(())
}

/// What a node is to be, and what it is handed over.
struct Joining {
    node: u64,
    nodes: BTreeMap<u64, String>,
    belongings: Belongings,
}

/// The highest number that a node was met under, and where all are.
async fn known(client: &Client, address: &str) -> Result<(u64, BTreeMap<u64, String>)> {
    let nodes = members::nodes(client).await?;
    if let Some((node, _)) = nodes.iter().find(|(_, known)| *known == address) {
        bail!("node {node} is reached as {address} already: choose another address");
    }
    let last = nodes.keys().max().copied();
    Ok((last.context("the registry knows of no node: is it one of several?")?, nodes))
}

/// Makes the directory of a node of a running cluster.
pub(super) async fn join(
    runtime: &Runtime,
    client: impl Fn(Option<[u8; 32]>) -> Result<Client>,
    args: &JoinArgs,
) -> Result<()> {
    // What would be refused in the end is refused before a token is used up.
    NewNode::check(&args.dir, &args.address, args.disks)?;
    let (_, made) = NewNode::prepare(runtime, &args.dir)?;
    let joining = match (&args.from, &args.token) {
        (Some(from), _) => from_node(runtime, &client(None)?, from, &args.address).await,
        (None, Some(token)) => by_token(runtime, client, token, &args.address).await,
        (None, None) => {
            bail!("name a token (clutch cluster invite) with --token, or a node's directory with --from")
        }
    };
    if joining.is_err() {
        // Empty still; one that stays is taken by the next try.
        let _ = std::fs::remove_dir(made);
    }
    let joining = joining?;
    let Joining { node, mut nodes, belongings } = joining;
    nodes.insert(node, args.address.clone());
    let is_here = args.from.is_none();
    let new = NewNode { dir: args.dir.clone(), belongings, node, nodes, disks: args.disks };
    let file = new.create(runtime)?;
    let dir = args.dir.display();
    talk!("clutch: made node {node} of cluster {} in {dir}", file.cluster);
    match is_here {
        true => talk!("  it holds keys, so keep it from others. Start it:"),
        false => talk!(
            "  carry it to its machine and keep no copy; it holds keys, so keep it from others. Then start it there:"
        ),
    }
    talk!("    clutch node --config {dir}/node.toml");
    talk!("  and make it a member of all logs, where the cluster's key is:");
    talk!(
        "    clutch cluster add-replica {node} --all    (or: clutch cluster replace-node OLD --with {node})"
    );
    Ok(())
}

async fn from_node(runtime: &Runtime, client: &Client, from: &Path, address: &str) -> Result<Joining> {
    let of = Layout::read(runtime, from)?;
    let (last, nodes) = known(client, address).await?;
    let cluster = client.map().await?.cluster;
    ensure!(
        of.cluster.cluster_id()? == cluster,
        "{} is a node of cluster {}, and the registry that was asked is of {cluster:016x}: name the ones that belong together",
        from.display(),
        of.cluster.cluster
    );
    Ok(Joining { node: last + 1, nodes, belongings: of.belongings()? })
}

async fn by_token(
    runtime: &Runtime,
    client: impl Fn(Option<[u8; 32]>) -> Result<Client>,
    token: &str,
    address: &str,
) -> Result<Joining> {
    let mut said = token.to_owned();
    if token == "-" {
        said.clear();
        std::io::stdin()
            .lock()
            .take(4096)
            .read_line(&mut said)
            .context("read the token from standard input")?;
    }
    let token: Token = said.parse().map_err(anyhow::Error::msg)?;
    let client = client(Some(token.signing_key()))?;
    let cluster = client.map().await?.cluster;
    ensure!(
        cluster == token.cluster,
        "the token is of cluster {:016x}, and the registry that was asked is of {cluster:016x}: set CLUTCH_REGISTRY to the cluster that \
         the token is of",
        token.cluster
    );
    let (last, _) = known(&client, address).await?;
    let joiner = runtime.random.u64().max(1);
    let redeem = RedeemInvitation { invitation: token.invitation, joiner, least_node: last + 1 };
    let welcome = client.registry(Op::RedeemInvitation(redeem)).await?.welcome;
    let welcome = welcome.context("the registry answers without a welcome: does it run another build?")?;
    let belongings = token.open(joiner, welcome.node, &welcome.sealed)?;
    ensure!(
        belongings.cluster.cluster_id()? == cluster,
        "what was handed over is of another cluster than the one that was asked"
    );
    Ok(Joining { node: welcome.node, nodes: belongings.nodes.clone(), belongings })
}
