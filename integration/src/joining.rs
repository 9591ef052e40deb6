//! A node is invited and joins: once the build of every member of the registry's log knows of invitations, once for each invitation, and by
//! nobody who has not its secret.

use std::time::Duration;

use clutch_client::{Client, ClientError, FileAttributes};
use clutch_client_maintenance::members::{self, Change};
use clutch_log::LogId;
use clutch_proto::{
    InodeId,
    registry::{InviteNode, RedeemInvitation, registry_request::Op},
    types::Code,
};
use clutch_runtime::simulated::NodeId;
use clutch_server::joining::Token;

use crate::sim_cluster::{CLIENT, ClusterConfig, Engine, SYSTEM_KEY, SimCluster};

/// A node comes and goes so often: more than an older build keeps.
const CHANGES_MANY: u32 = 12;
const HOUR_MS: u64 = 3_600_000;

async fn invite(client: &Client, invitation: u64) -> Result<(), String> {
    let op = Op::InviteNode(InviteNode { invitation, lifetime_ms: HOUR_MS });
    client.registry(op).await.map(drop).map_err(|error| error.to_string())
}

/// The number that a joiner gets, whatever he says is the least that it may be, and how many nodes it is handed over with it.
async fn redeem(client: &Client, token: &Token, joiner: u64) -> Result<(u64, usize), ClientError> {
    let op = RedeemInvitation { invitation: token.invitation, joiner, least_node: u64::from(u32::MAX) };
    let reply = client.registry(Op::RedeemInvitation(op)).await?;
    let welcome = reply.welcome.unwrap_or_default();
    let opened = token.open(joiner, welcome.node, &welcome.sealed);
    let handed_over = opened.map_err(|error| ClientError::DataLost(error.to_string()))?;
    Ok((welcome.node, handed_over.nodes.len()))
}

/// What is wrong with who is let in and who is not.
async fn joins(
    operator: Client,
    bearer: impl Fn(&Token) -> Client,
    cluster: u64,
) -> Result<Vec<String>, String> {
    let token = |key: [u8; 32], invitation| Token::of(&key, cluster, invitation);
    let mut wrong = Vec::new();
    let mut expect = |what: &str, is: bool, said: String| {
        if !is {
            wrong.push(format!("{what}: {said}"));
        }
    };
    let refused = |said: &Result<(u64, usize), ClientError>| matches!(said, Err(error) if error.code() == Some(Code::Permission));
    invite(&operator, 8).await?;
    invite(&operator, 9).await?;
    let (seven, eight) = (token(SYSTEM_KEY, 7), token(SYSTEM_KEY, 8));
    let foreign = Token::of(&[9; 32], cluster, 7);
    for (who, by) in [("by another key", foreign), ("by another invitation", eight.clone())] {
        let said = redeem(&bearer(&by), &seven, 1).await;
        expect(who, refused(&said), format!("{said:?}"));
    }
    let said = redeem(&operator, &seven, 1).await;
    expect("by the cluster's key", refused(&said), format!("{said:?}"));
    let client = bearer(&seven);
    let first = redeem(&client, &seven, 1).await;
    let number = first.as_ref().map_or(0, |(number, _)| *number);
    let is_next = (4..100_000).contains(&number) && matches!(first, Ok((_, 3)));
    expect("the first", is_next, format!("{first:?}"));
    let said = redeem(&client, &seven, 1).await;
    expect("the first again", matches!(said, Ok((again, 3)) if again == number), format!("{said:?}"));
    let said = redeem(&client, &seven, 2).await;
    expect("another joiner", refused(&said), format!("{said:?}"));
    let said = redeem(&bearer(&eight), &eight, 2).await;
    expect("the second", matches!(said, Ok((next, _)) if next == number + 1), format!("{said:?}"));
    operator.runtime().clock.sleep(Duration::from_millis(HOUR_MS + 1000)).await;
    let nine = token(SYSTEM_KEY, 9);
    let said = redeem(&bearer(&nine), &nine, 3).await;
    expect("when it is over", refused(&said), format!("{said:?}"));
    Ok(wrong)
}

/// What is wrong when the members of a log are changed again and again while one of them runs an older build.
fn changes_often(cluster: &SimCluster, older: NodeId) -> Result<Vec<String>, String> {
    let id = cluster.log_ids().into_iter().find(|id| *id != LogId::REGISTRY).ok_or("one log")?;
    let leader = cluster.home(id).ok_or("nobody leads")?;
    let comes_and_goes = cluster.members(id).into_iter().find(|node| ![leader, older].contains(node));
    let node = u64::from(comes_and_goes.ok_or("three keep it")?.0);
    let client = cluster.client();
    let changed = cluster.world.run(CLIENT, Duration::from_secs(900), async move {
        for round in 0..CHANGES_MANY {
            for to in [Change::Remove(node), Change::Add(node)] {
                if let Err(error) = members::change(&client, id, to, &|_, _| {}).await {
                    return Err((round, error.to_string()));
                }
            }
        }
        Ok(())
    });
    Ok(match changed.ok_or("changes of members do not come to an end")? {
        Err((round, text)) if round > 2 && text.contains("older build") => Vec::new(),
        said => vec![format!("members changed while one runs an older build: {said:?}")],
    })
}

/// Stores a small file; whether it lies in the metadata.
async fn is_inline(client: &Client, name: &'static str) -> Result<bool, String> {
    let (root, bytes, name) = (InodeId::ROOT, vec![7; 1000], name.into());
    let attributes = FileAttributes { mode: 0o600, uid: 0, gid: 0, mtime: 0 };
    let made = client.write_file(root, &name, attributes, false, &mut &bytes[..]).await;
    let file = made.map_err(|error| error.to_string())?.id;
    let mut read = Vec::new();
    let mut sink = |part: bytes::Bytes| {
        read.extend_from_slice(&part);
        Ok(())
    };
    client.read_file(file, &mut sink).await.map_err(|error| error.to_string())?;
    let layout = client.layout(file, 0, 0).await.map_err(|error| error.to_string())?;
    if read != bytes {
        return Err("other bytes are read than were written".into());
    }
    Ok(layout.spans.is_empty())
}

fn check(seed: u64) -> Result<Vec<String>, String> {
    let config = ClusterConfig {
        replicas: 3,
        joint: true,
        engine: Engine::Raft,
        inline: 4096,
        ..ClusterConfig::of(1, 3, (1, 1))
    };
    let cluster = SimCluster::start_with(seed, config).ok_or("the cluster does not come up")?;
    let leader = cluster.home(LogId::REGISTRY).ok_or("nobody leads")?;
    let members = cluster.members(LogId::REGISTRY);
    let other = *members.iter().find(|node| **node != leader).ok_or("nobody follows")?;
    let restart = |is_older| {
        cluster.world.crash(other);
        cluster.runs_older(other, is_older);
        cluster.boot(other);
        cluster.pause(Duration::from_secs(10));
    };
    let invited = || {
        let client = cluster.client();
        cluster.world.run(CLIENT, Duration::from_secs(120), async move { invite(&client, 7).await })
    };
    restart(true);
    let early = invited().ok_or("an invitation does not come to an end")?;
    if !early.as_ref().is_err_and(|text| text.contains("older build")) {
        return Ok(vec![format!("invited while a member runs an older build: {early:?}")]);
    }
    let mut wrong = changes_often(&cluster, other)?;
    let inline = |name| {
        let client = cluster.client();
        cluster.world.run(CLIENT, Duration::from_secs(120), async move { is_inline(&client, name).await })
    };
    let early = inline("early");
    restart(false);
    let (late, again) = (inline("late"), inline("again"));
    if [&early, &late, &again] != [&Some(Ok(false)), &Some(Ok(true)), &Some(Ok(true))] {
        wrong.push(format!(
            "small files in the metadata, before all know of it and after: {early:?}, {late:?}, {again:?}"
        ));
    }
    if !wrong.is_empty() {
        return Ok(wrong);
    }
    invited().ok_or("an invitation does not come to an end")??;
    let (operator, id) = (cluster.client(), cluster.cluster_id());
    let (seam, registries) = (cluster.world.node(CLIENT), cluster.registries());
    let bearer = move |token: &Token| {
        let options = clutch_client::ClientOptions {
            keys: Some(token.signing_key().into()),
            ..clutch_client::ClientOptions::default()
        };
        Client::new(seam.clone(), registries.clone(), options)
    };
    let ended = cluster.world.run(CLIENT, Duration::from_secs(9000), joins(operator, bearer, id));
    ended.ok_or("joining does not come to an end")?
}

/// What is wrong.
pub fn all() -> Vec<String> {
    [1, 2].into_iter().flat_map(|seed| check(seed).unwrap_or_else(|error| vec![error])).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn nodes_join_by_invitation_once_and_when_all_know_of_it() {
        assert_eq!(super::all(), Vec::<String>::new());
    }
}
