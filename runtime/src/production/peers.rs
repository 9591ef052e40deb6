//! Streams between nodes: plain TCP, on the port where sessions are served, too.
//!
//! A connection that is a stream begins with [`PREFACE`], whose first byte no session begins with. Then both directions carry
//! frames: a length (4 bytes, little-endian) and so many bytes. Nothing is answered to a preface, and no more than
//! [`FIRST_BYTES_MAX`] are taken in from whoever has sent less than [`FIRST_FRAMES`] frames: who that is, is told by those. The way is held up by
//! TCP when nobody takes the frames. A peer that acknowledges nothing for [`SILENT_MAX`] is gone.

use std::{future::Future, io, time::Duration};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use clutch_proto::limits::MESSAGE_BYTES_MAX;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
};

use crate::{Endpoint, PeerStream};

/// The first byte of a stream; HTTP/2 begins with a `P`.
pub(super) const FIRST_BYTE: u8 = 0xc1;
const PREFACE: [u8; 8] = [FIRST_BYTE, b'C', b'L', b'U', b'T', b'C', b'H', 1];
/// How long a connection to a peer may take, and a preface.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A peer that acknowledges nothing for so long is gone: a stream over a cut way is not waited for when the way is back.
const SILENT_MAX: Duration = Duration::from_secs(5);
/// How often a peer is asked for a sign of life on a stream that rests.
const ALIVE: Duration = Duration::from_secs(2);
/// Frames that wait at each end.
const WAITING_MAX: usize = 64;
/// Bytes of one frame.
const FRAME_BYTES_MAX: usize = MESSAGE_BYTES_MAX;
/// The frames by which two nodes get to know each other: those of who opens a stream, those of the other, and how long they are
/// at most.
const FIRST_FRAMES: u64 = 2;
const ANSWERS_FIRST: u64 = 1;
const FIRST_BYTES_MAX: usize = 1 << 10;
/// Read and written at a time.
const CHUNK: usize = 128 << 10;
/// Larger frames are not copied.
const COPIED_MAX: usize = 16 << 10;

/// Opens a stream to whoever listens there.
pub(super) async fn open(to: &Endpoint) -> io::Result<PeerStream> {
    let opened = tokio::time::timeout(CONNECT_TIMEOUT, async {
        let mut stream = TcpStream::connect(&*to.0).await?;
        prepare(&stream)?;
        stream.write_all(&PREFACE).await?;
        Ok(stream)
    });
    let stream = match opened.await {
        Ok(opened) => opened,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("nothing within {CONNECT_TIMEOUT:?}"))),
    };
    let stream = stream.map_err(|error| io::Error::new(error.kind(), format!("open {to}: {error}")))?;
    let (stream, moves) = begin(stream, ANSWERS_FIRST);
    tokio::spawn(moves);
    Ok(stream)
}

/// Takes a connection that began with [`FIRST_BYTE`]; what moves its frames until it ends, or until `stopped` completes.
pub(super) async fn accept(
    mut stream: TcpStream,
    stopped: impl Future<Output = ()>,
) -> io::Result<(PeerStream, impl Future<Output = ()>)> {
    prepare(&stream)?;
    let mut preface = [0; PREFACE.len()];
    match tokio::time::timeout(CONNECT_TIMEOUT, stream.read_exact(&mut preface)).await {
        Ok(read) => drop(read?),
        Err(_) => return Err(io::ErrorKind::TimedOut.into()),
    }
    if preface != PREFACE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a stream of another build"));
    }
    let (stream, moves) = begin(stream, FIRST_FRAMES);
    let ends = async move {
        tokio::select! {
            () = moves => {}
            () = stopped => {}
        }
    };
    Ok((stream, ends))
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    stream.set_nodelay(true)?;
    let silent_ms = u32::try_from(SILENT_MAX.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(stream, silent_ms)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, ALIVE)?;
    sockopt::set_tcp_keepintvl(stream, ALIVE)?;
    Ok(())
}

/// An end of a stream, and what moves its frames over a connection until one side ends it.
fn begin(stream: TcpStream, short: u64) -> (PeerStream, impl Future<Output = ()> + Send) {
    let (sender, frames) = mpsc::channel(WAITING_MAX);
    let (given, receiver) = mpsc::channel(WAITING_MAX);
    let moves = async move {
        let (from, to) = stream.into_split();
        let mut writing = std::pin::pin!(write(to, frames));
        let ended = tokio::select! {
            ended = read(from, &given, short) => ended,
            ended = &mut writing => ended,
            // What was said before, perhaps why, still goes out.
            () = given.closed() => {
                let rest = tokio::time::timeout(CONNECT_TIMEOUT, writing).await;
                rest.unwrap_or(Ok(()))
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a stream between nodes ends");
        }
    };
    (PeerStream { sender, receiver }, moves)
}

/// Of the frames the first `short` are short.
async fn read(mut from: impl AsyncRead + Unpin, to: &mpsc::Sender<Bytes>, short: u64) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    for number in 0u64.. {
        let most = if number < short { FIRST_BYTES_MAX } else { FRAME_BYTES_MAX };
        if !fill(&mut from, &mut buffer, 4).await? {
            return Ok(());
        }
        let length = buffer.get_u32_le() as usize;
        if length > most {
            let text = format!("a frame of {length} bytes; {most} are allowed");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        if !fill(&mut from, &mut buffer, length).await? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // A small frame that is kept would keep all that came with it.
        let frame = if length <= COPIED_MAX {
            let frame = Bytes::copy_from_slice(&buffer[..length]);
            buffer.advance(length);
            frame
        } else {
            buffer.split_to(length).freeze()
        };
        if to.send(frame).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Reads until there are so many bytes; false when the other side has ended before. Memory is taken as bytes come, not as
/// they are promised.
async fn fill(from: &mut (impl AsyncRead + Unpin), buffer: &mut BytesMut, bytes: usize) -> io::Result<bool> {
    while buffer.len() < bytes {
        if buffer.capacity() == buffer.len() {
            buffer.reserve(CHUNK.min(bytes.max(COPIED_MAX)));
        }
        if from.read_buf(buffer).await? == 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

async fn write(mut to: impl AsyncWrite + Unpin, mut frames: mpsc::Receiver<Bytes>) -> io::Result<()> {
    let (mut batch, mut buffer) = (Vec::new(), BytesMut::with_capacity(CHUNK));
    while frames.recv_many(&mut batch, WAITING_MAX).await > 0 {
        for frame in batch.drain(..) {
            if frame.len() > FRAME_BYTES_MAX {
                let text = format!("a frame of {} bytes; {FRAME_BYTES_MAX} are allowed", frame.len());
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
            buffer.put_u32_le(frame.len() as u32);
            let is_large = frame.len() > COPIED_MAX;
            if !is_large {
                buffer.put_slice(&frame);
            }
            if is_large || buffer.len() > CHUNK {
                to.write_all(&buffer).await?;
                buffer.clear();
            }
            if is_large {
                to.write_all(&frame).await?;
            }
        }
        to.write_all(&buffer).await?;
        buffer.clear();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use clutch_proto::Parts;
    use tokio::io::AsyncReadExt as _;

    use super::*;
    use crate::{
        Answers, BoxFuture, Handled, Handler, Lane, Listening, Network as _, production::GrpcNetwork,
    };

    /// Sends every frame back; answers every request with itself.
    struct Echo;

    impl Handler for Echo {
        fn handle(&self, request: Bytes, _: Answers) -> BoxFuture<Handled> {
            Box::pin(async { Handled { answer: request.into(), ..Handled::default() } })
        }

        fn accept(&self, PeerStream { sender, mut receiver }: PeerStream) {
            tokio::spawn(async move {
                while let Some(frame) = receiver.recv().await {
                    if sender.send(frame).await.is_err() {
                        return;
                    }
                }
            });
        }
    }

    async fn echo(network: &GrpcNetwork) -> Box<dyn Listening> {
        network.listen(&"127.0.0.1:0".into(), Arc::new(Echo)).await.expect("a free port")
    }

    #[tokio::test]
    async fn frames_come_back_whole_and_in_order_beside_sessions() {
        let network = GrpcNetwork::new();
        let listening = echo(&network).await;
        let PeerStream { sender, mut receiver } =
            network.open(listening.endpoint()).await.expect("it listens");
        let lengths = [3, 0, 1, COPIED_MAX, COPIED_MAX + 1, CHUNK, 3 << 20, 0, 5]
            .into_iter()
            .chain((0..500).map(|n| n * 97));
        let frames: Vec<Bytes> =
            lengths.enumerate().map(|(n, length)| vec![n as u8; length].into()).collect();
        let sent = frames.clone();
        let sends = async {
            for frame in sent {
                sender.send(frame).await.expect("the stream is whole");
            }
        };
        let receives = async {
            for (number, frame) in frames.iter().enumerate() {
                assert!(receiver.recv().await.as_ref() == Some(frame), "frame {number}");
            }
        };
        tokio::join!(sends, receives);
        let other = GrpcNetwork::new();
        let (request, patience) = (Parts::from(Bytes::from_static(b"asked")), Duration::from_secs(30));
        let answered = other.call(listening.endpoint(), Lane::Metadata, request, 0, patience).await;
        assert_eq!(answered.expect("an answer"), "asked");
        drop(sender);
        assert_eq!(receiver.recv().await, None);
    }

    #[tokio::test]
    async fn a_stream_ends_with_its_listener() {
        let network = GrpcNetwork::new();
        let listening = echo(&network).await;
        let PeerStream { sender, mut receiver } =
            network.open(listening.endpoint()).await.expect("it listens");
        sender.send(Bytes::from_static(b"here")).await.expect("the stream is whole");
        assert_eq!(receiver.recv().await.as_deref(), Some(&b"here"[..]));
        drop(listening);
        assert_eq!(receiver.recv().await, None);
        sender.closed().await;
    }

    #[tokio::test]
    async fn what_is_no_stream_ends_and_takes_no_memory() {
        let network = GrpcNetwork::new();
        let listening = echo(&network).await;
        let long = [&PREFACE[..], &(FIRST_BYTES_MAX as u32 + 1).to_le_bytes()].concat();
        let second = [&PREFACE[..], &0u32.to_le_bytes(), &u32::MAX.to_le_bytes()].concat();
        let mut another_build = PREFACE;
        another_build[7] = 9;
        for bytes in [&long[..], &second, &another_build] {
            let mut stream = TcpStream::connect(&*listening.endpoint().0).await.expect("it listens");
            stream.write_all(bytes).await.expect("it reads");
            let mut answer = Vec::new();
            // Closed, politely or not, with no more than what was echoed.
            let _ = stream.read_to_end(&mut answer).await;
            assert!(answer.len() <= 4, "{answer:?}");
        }
    }
}
