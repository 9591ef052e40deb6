//! A reader that stands still in the middle of a file until its certificates have expired, while the file gets another content:
//! what it has read in the end is all of the content with which it began.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use clutch_client::{Client, ClientError, Draft, WritePolicy};
use clutch_proto::{InodeId, limits::CERTIFICATE_LIFETIME_MS};
use clutch_runtime::simulated::NodeId;
use tokio::sync::oneshot;

use crate::{
    sim_cluster::{CLIENT, ClusterConfig, SimCluster},
    workload::attributes,
};

/// More than are asked for at a time.
const SPANS: usize = 12;
const SPAN_BYTES: usize = 20_000;
const OTHER: NodeId = NodeId(CLIENT.0 + 1);
const LIMIT: Duration = Duration::from_secs(600);

async fn draft(client: &Client, of: InodeId, byte: u8) -> Result<Draft, ClientError> {
    let policy = WritePolicy::plain(SPAN_BYTES as u32, 2, 1);
    let mut draft = client.start_draft(of).await?;
    for _ in 0..SPANS {
        client.append(&mut draft, vec![byte; SPAN_BYTES], &policy).await?;
    }
    Ok(draft)
}

/// Reads a file whose content is replaced when so many spans of it were handed out.
fn read(page: u32, spans_before: usize) -> Result<(), String> {
    let config = ClusterConfig { page, ..ClusterConfig::of(2, 4, (2, 1)) };
    let cluster = Arc::new(SimCluster::start_with(5, config).ok_or("the cluster does not come up")?);
    let (reader, other) = (cluster.client(), cluster.client_on(OTHER, None));
    let (stands_still, waits) = oneshot::channel();
    let mut stands_still = Some(stands_still);
    let (world, name) = (cluster.clone(), Bytes::from("f"));
    let reads = async move {
        let written = draft(&reader, InodeId::ROOT, 1).await?;
        let file = reader.link(written, InodeId::ROOT, &name, attributes(), false).await?;
        let mut bytes = Vec::new();
        let mut sink = |part: Bytes| {
            bytes.extend_from_slice(&part);
            if bytes.len() >= spans_before * SPAN_BYTES
                && let Some(stands_still) = stands_still.take()
            {
                world.world.pause(CLIENT);
                stands_still.send(file.id).ok();
            }
            Ok(())
        };
        reader.read_file(file.id, &mut sink).await?;
        Ok::<_, ClientError>(bytes)
    };
    let world = cluster.clone();
    let replaces = async move {
        let Ok(file) = waits.await else { return Ok(false) };
        let written = draft(&other, file, 2).await?;
        let before = other.stat(file).await?.content;
        other.publish(written, file, before, InodeId::ROOT).await?;
        world.world.suspend_ms(CERTIFICATE_LIFETIME_MS + 60_000);
        world.world.resume(CLIENT);
        Ok::<_, ClientError>(true)
    };
    let (is_replaced, replaced) = oneshot::channel();
    cluster.world.node(OTHER).spawn("replaces", async move {
        is_replaced.send(replaces.await).ok();
    });
    let read = cluster.world.run(CLIENT, LIMIT, reads).ok_or("reading does not end")?;
    let replaced = cluster.world.run(OTHER, LIMIT, replaced).and_then(Result::ok);
    if !replaced.ok_or("replacing does not end")?.map_err(|e| e.to_string())? {
        return Err("the reader did not stand still".into());
    }
    let bytes = read.map_err(|e| e.to_string())?;
    match bytes.iter().filter(|byte| **byte != 1).count() {
        0 if bytes.len() == SPANS * SPAN_BYTES => Ok(()),
        others => Err(format!("{others} of {} bytes that were read are of another content", bytes.len())),
    }
}

/// What is wrong; in one page of a layout, and from page to page.
pub fn all() -> Vec<String> {
    let cases = [(0, 1), (0, 7), (2, 1), (2, 6)];
    let wrong = |(page, before)| {
        read(page, before).err().map(|what| format!("pages {page}, {before} spans before: {what}"))
    };
    cases.into_iter().filter_map(wrong).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_reader_keeps_its_content() {
        assert_eq!(all(), Vec::<String>::new());
    }
}
