//! Where a file's bytes come from.

use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::error::ClientError;

/// Where a file's bytes come from.
pub trait ContentSource: AsyncRead + Send + Unpin {}
impl<T: AsyncRead + Send + Unpin> ContentSource for T {}

/// Reads until there are `limit` bytes or no more.
pub(crate) async fn read_up_to(source: &mut dyn ContentSource, limit: usize) -> Result<Vec<u8>, ClientError> {
    let mut bytes = Vec::new();
    read_onto(source, &mut bytes, limit).await?;
    Ok(bytes)
}

/// Reads more until there are `limit` bytes in all or no more.
pub(crate) async fn read_onto(
    source: &mut dyn ContentSource,
    bytes: &mut Vec<u8>,
    limit: usize,
) -> Result<(), ClientError> {
    let more = limit.saturating_sub(bytes.len());
    source.take(more as u64).read_to_end(bytes).await.map_err(|e| ClientError::Local(e.to_string()))?;
    Ok(())
}
