//! `clutch cluster rotate-key`: the cluster goes from one key to the next while it runs.
//!
//! What each node has is asked before anything is done, so that the command can be told again wherever it was interrupted.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use clutch_client::{Client, ClientError};
use clutch_client_maintenance::members;
use clutch_proto::{
    admin::{AdminRequest, KeyReply, RotateKey, admin_request::Op, rotate_key::Step},
    limits::CERTIFICATE_LIFETIME_MS,
    session::Role,
    types::Code,
};
use clutch_server::rotation;

use crate::{args::RotateArgs, output::talk};

/// What was granted under the key before may be used for so long: the lifetime of a certificate, and clocks that are apart.
const USED_FOR_S: u64 = CERTIFICATE_LIFETIME_MS / 1000 + 2 * 3600;

/// The nodes of a cluster, and what each says of its keys.
struct Nodes<'a> {
    client: &'a Client,
    addresses: BTreeMap<u64, String>,
    keys: BTreeMap<u64, KeyReply>,
}

impl<'a> Nodes<'a> {
    async fn look(client: &'a Client, without: &[u64]) -> Result<Nodes<'a>> {
        let mut addresses = members::nodes(client).await?;
        if let Some(unknown) = without.iter().find(|node| !addresses.contains_key(node)) {
            bail!("node {unknown} is not known, so there is nothing to go on without");
        }
        addresses.retain(|node, _| !without.contains(node));
        let mut nodes = Nodes { client, addresses, keys: BTreeMap::new() };
        let (mut silent, mut are_strangers) = (Vec::new(), true);
        for node in nodes.addresses.keys().copied().collect::<Vec<_>>() {
            match nodes.step(node, Step::Look, 0, 0, Vec::new()).await {
                Ok(key) => drop(nodes.keys.insert(node, key)),
                Err(error) => {
                    let code = error.downcast_ref().and_then(ClientError::code);
                    are_strangers &= code == Some(Code::Permission);
                    silent.push(format!("node {node}: {error:#}"));
                }
            }
        }
        // All answer; another key is wanted, and not other nodes.
        if nodes.keys.is_empty() && are_strangers {
            bail!("{}", silent.swap_remove(0));
        }
        ensure!(
            silent.is_empty(),
            "every node must take part, or it could not speak to the others afterwards. Start those that do not answer; only of those that are \
             gone for good say --without N. {}",
            silent.join("; ")
        );
        Ok(nodes)
    }

    async fn step(
        &self,
        node: u64,
        step: Step,
        epoch: u32,
        digest: u64,
        sealed: Vec<u8>,
    ) -> Result<KeyReply> {
        let address = self.addresses.get(&node).context("a node without an address")?;
        let rotate = RotateKey { step: step as i32, epoch, digest, sealed: sealed.into() };
        let request = AdminRequest { op: Some(Op::RotateKey(rotate)) };
        let reply = self.client.admin_at(address.as_str().into(), Role::Registry, 0, request).await;
        let is_older = |error: &ClientError| error.code() == Some(Code::Malformed);
        if reply.as_ref().is_err_and(is_older) {
            bail!("it runs an older build, which does not know of this: give it the newer one");
        }
        reply?.key.context("it says nothing of its keys")
    }

    /// The key that is to be used, by its epoch: the one that was begun with, or the next one.
    fn target(&self) -> Result<u32> {
        let used = self.keys.values().map(|key| key.used).max().context("there are no nodes")?;
        let is_begun = self.keys.values().any(|key| key.used != used);
        let next = self.keys.values().map(|key| key.next).max().unwrap_or(0);
        if is_begun {
            return Ok(used);
        }
        let before: Vec<u64> =
            self.keys.iter().filter(|(_, key)| key.before > 0).map(|(node, _)| *node).collect();
        ensure!(
            before.is_empty(),
            "all nodes use the key of epoch {used}, and nodes {before:?} believe the one before still: end that change first, with --finish"
        );
        Ok(next.max(used + 1))
    }

    /// Lets all nodes believe the key of this epoch; which one that is.
    async fn believe(&mut self, epoch: u32) -> Result<u64> {
        let shown = self.client.key().context("the cluster's key is needed")?;
        let cluster = self.client.map().await?.cluster;
        let has = |key: &KeyReply| key.used == epoch || key.next == epoch;
        // Who uses it, then who believes it, and where nobody does, anybody draws it.
        let first =
            self.keys.iter().max_by_key(|(_, key)| (key.used == epoch, has(key))).map(|(node, _)| *node);
        let first = first.context("there are no nodes")?;
        let drawn = self.step(first, Step::Believe, epoch, 0, Vec::new()).await?;
        let key = rotation::open(cluster, &shown, epoch, &drawn.sealed)?;
        let digest = rotation::digest(&key.secret);
        for node in self.addresses.keys().copied().filter(|node| *node != first).collect::<Vec<_>>() {
            let told = self.keys.get(&node).context("a node that was not asked")?;
            if !(told.used == epoch && told.used_digest == digest) {
                let sealed = rotation::seal(self.client.runtime(), cluster, &shown, &key)?;
                let told = self.step(node, Step::Believe, epoch, 0, sealed).await;
                self.keys.insert(node, told.with_context(|| format!("node {node}"))?);
            }
        }
        self.keys.insert(first, drawn);
        let has = |key: &KeyReply| {
            (key.used, key.used_digest) == (epoch, digest) || (key.next, key.next_digest) == (epoch, digest)
        };
        if let Some((node, _)) = self.keys.iter().find(|(_, key)| !has(key)) {
            bail!("node {node} has another next key: does somebody else do this, too? Tell it again");
        }
        Ok(digest)
    }
}

/// Goes to the next key, or forgets the one before.
pub(super) async fn rotate(client: &Client, args: &RotateArgs) -> Result<()> {
    let mut nodes = Nodes::look(client, &args.without).await?;
    if args.finish {
        return finish(&nodes, args.at_once).await;
    }
    let epoch = nodes.target()?;
    let digest = nodes.believe(epoch).await?;
    talk!("clutch: all {} nodes believe the key of epoch {epoch}", nodes.addresses.len());
    for node in nodes.addresses.keys() {
        nodes
            .step(*node, Step::Use, epoch, digest, Vec::new())
            .await
            .with_context(|| format!("node {node}"))?;
    }
    talk!("clutch: all use it, and believe the one before");
    talk!("  copies of keys/cluster.key that you keep are of the old one: take new ones");
    talk!(
        "  in {} hours, when nothing that was granted under the old one is good any more:",
        USED_FOR_S / 3600
    );
    talk!("    clutch cluster rotate-key --finish");
    Ok(())
}

async fn finish(nodes: &Nodes<'_>, at_once: bool) -> Result<()> {
    let (_, first) = nodes.keys.first_key_value().context("there are no nodes")?;
    let which = |key: &KeyReply| (key.used, key.used_digest);
    if let Some((node, _)) = nodes.keys.iter().find(|(_, key)| which(key) != which(first)) {
        bail!(
            "node {node} uses another key than the others: tell clutch cluster rotate-key again, without --finish"
        );
    }
    if nodes.keys.values().all(|key| key.before == 0) {
        talk!("clutch: all nodes use the key of epoch {}, and believe no other", first.used);
        return Ok(());
    }
    let used_for =
        nodes.keys.values().filter(|key| key.before > 0).map(|key| key.used_for_s).min().unwrap_or(0);
    ensure!(
        at_once || used_for >= USED_FOR_S,
        "the key of epoch {} has been used for {} min, and what was granted under the one before may be used for {} h: wait, or say --at-once \
         where the old key is in wrong hands (files that are being written then fail, and are written again)",
        first.used,
        used_for / 60,
        USED_FOR_S / 3600
    );
    for node in nodes.addresses.keys() {
        let forgotten = nodes.step(*node, Step::Forget, first.used, first.used_digest, Vec::new()).await;
        forgotten.with_context(|| format!("node {node}"))?;
    }
    talk!(
        "clutch: all {} nodes use the key of epoch {}, and believe no other",
        nodes.addresses.len(),
        first.used
    );
    Ok(())
}
