//! Rows of file data: whole files, written and read back through the client, every byte checked.

use std::sync::Arc;

use anyhow::{Result, ensure};
use bytes::Bytes;
use clutch_client::{Client, FileAttributes};

use super::{Load, Root, Row, measure};

/// Writes and reads `files` files of `size` bytes, one at a time on each of `clients` clients.
pub(super) async fn rows(
    client: &Client,
    root: &Root,
    files: usize,
    size: usize,
    clients: usize,
) -> Result<Vec<Row>> {
    let load = Load { clients: (0..clients).map(|_| client.sibling()).collect(), depth: 1 };
    let dir = root.at.id;
    let mut content = vec![0u8; size];
    client.runtime().random.fill(&mut content);
    let content = Bytes::from(content);
    let expected = clutch_proto::crc::of(&content);
    let write = move |client: Client, i: usize| {
        let content = content.clone();
        async move {
            let name = Bytes::from(format!("data{i}"));
            let attributes = FileAttributes { mode: 0o644, ..FileAttributes::default() };
            Ok(client.write_file(dir, &name, attributes, false, &mut &content[..]).await?.id)
        }
    };
    let (mut written, ids) = measure(&load, "write", files, write).await?;
    let ids = Arc::new(ids);
    let read = move |client: Client, i: usize| {
        let id = ids[i];
        async move {
            let mut crc = 0;
            let mut sink = |bytes: Bytes| {
                crc = clutch_proto::crc::concat(crc, clutch_proto::crc::of(&bytes), bytes.len() as u64);
                Ok(())
            };
            client.read_file(id, &mut sink).await?;
            ensure!(crc == expected, "other bytes were read than were written");
            Ok(())
        }
    };
    let mut back = measure(&load, "read", files, read).await?.0;
    (written.bytes, back.bytes) = ((files * size) as u64, (files * size) as u64);
    Ok(vec![written, back])
}
