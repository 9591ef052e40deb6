//! The two directions of a session on the server, without a copy of any block.
//!
//! Framing is gRPC's: five bytes before each message, and the status in the trailers. A library's decoder keeps the buffer
//! of the last message as long as its session lives, which with many sessions is many times what they need.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use clutch_proto::parts::Frames;
use futures_util::Stream;
use http_body::{Body as _, Frame};
use prost::Message as _;
use tokio::sync::mpsc;
use tonic::{Status, body::Body};

use super::{
    admission::{Admitted, PREFIX_BYTES, Share, guarded},
    sessions::FRAMES_BYTES_MAX,
    sockets::Counted,
};
use crate::Held;

/// What a peer sends, message by message, each with what is held for it.
pub(super) struct Incoming {
    body: Admitted,
    share: Share,
    /// What is there of the message that is being read, and how much is still to come.
    message: BytesMut,
    left: Option<usize>,
}

impl Incoming {
    pub(super) fn new(body: Body, share: Share) -> Incoming {
        Incoming { body: Admitted::new(body, share.clone()), share, message: BytesMut::new(), left: None }
    }

    /// Whether nothing of a message is there, and none is waited for.
    pub(super) fn is_resting(&self) -> bool {
        self.left.is_none() && self.body.is_resting()
    }

    /// Takes a piece of the body: a prefix, or a part of one message.
    fn take(&mut self, piece: Bytes) -> Option<Result<(Frames, Held), Status>> {
        let whole = match self.left {
            None => {
                let length = match length_of(&piece) {
                    Ok(length) => length,
                    Err(status) => return Some(Err(status)),
                };
                if length > 0 {
                    self.left = Some(length);
                    return None;
                }
                Bytes::new()
            }
            // All of it in one piece: as it is.
            Some(left) if piece.len() == left && self.message.is_empty() => piece,
            Some(left) => {
                if self.message.is_empty() {
                    self.message.reserve(left);
                }
                self.message.extend_from_slice(&piece);
                // A piece never reaches into the next message.
                let left = left.saturating_sub(piece.len());
                self.left = Some(left);
                if left > 0 {
                    return None;
                }
                std::mem::take(&mut self.message).freeze()
            }
        };
        self.left = None;
        let held = self.share.take();
        let frames = Frames::decode(whole).map_err(|e| Status::internal(format!("decode frames: {e}")));
        Some(frames.map(|frames| (frames, held)))
    }
}

/// The length that a prefix announces.
fn length_of(prefix: &[u8]) -> Result<usize, Status> {
    let Ok([packed, length @ ..]) = <[u8; PREFIX_BYTES]>::try_from(prefix) else {
        return Err(Status::internal("a message without its length"));
    };
    if packed != 0 {
        return Err(Status::unimplemented("messages of a session are not packed"));
    }
    match u32::from_be_bytes(length) as usize {
        length if length > FRAMES_BYTES_MAX => Err(Status::out_of_range(format!(
            "a message of {length} bytes; {FRAMES_BYTES_MAX} bytes at most are allowed"
        ))),
        length => Ok(length),
    }
}

impl Stream for Incoming {
    type Item = Result<(Frames, Held), Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let piece = match ready!(Pin::new(&mut self.body).poll_frame(context)) {
                None if self.left.is_some() => Err(Status::internal("the stream ended within a message")),
                None => return Poll::Ready(None),
                Some(Err(status)) => Err(status),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(piece) => Ok(piece),
                    // Trailers say nothing to a server.
                    Err(_) => continue,
                },
            };
            match piece {
                Err(status) => return Poll::Ready(Some(Err(status))),
                Ok(piece) => {
                    if let Some(message) = self.take(piece) {
                        return Poll::Ready(Some(message));
                    }
                }
            }
        }
    }
}

/// A message of answers, and what is held until it is sent.
pub(super) struct Sending {
    pub(super) frames: Frames,
    pub(super) held: Vec<Held>,
    pub(super) owed: Counted,
}

/// HTTP/2 takes whole pieces however little it may send.
const PIECE_BYTES_MAX: usize = 1 << 20;

/// What a session sends. The bytes of a message keep what is held for it until they are written.
pub(super) struct Outgoing {
    answers: mpsc::Receiver<Result<Sending, Status>>,
    sending: Option<Arc<(Vec<Held>, Counted)>>,
    pieces: VecDeque<Bytes>,
    has_ended: bool,
}

impl Outgoing {
    pub(super) fn new(answers: mpsc::Receiver<Result<Sending, Status>>) -> Outgoing {
        Outgoing { answers, sending: None, pieces: VecDeque::new(), has_ended: false }
    }
}

impl http_body::Body for Outgoing {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(mut piece) = self.pieces.pop_front() {
            if piece.len() > PIECE_BYTES_MAX {
                let rest = piece.split_off(PIECE_BYTES_MAX);
                self.pieces.push_front(rest);
            }
            let piece = match &self.sending {
                Some(sending) => guarded(piece, sending),
                None => piece,
            };
            return Poll::Ready(Some(Ok(Frame::data(piece))));
        }
        if self.has_ended {
            return Poll::Ready(None);
        }
        self.sending = None;
        let status = match ready!(self.answers.poll_recv(context)) {
            Some(Ok(Sending { frames, held, owed })) => {
                let mut pieces = VecDeque::from(frames.into_pieces());
                let length = pieces.iter().map(Bytes::len).sum::<usize>();
                let mut first = BytesMut::with_capacity(PREFIX_BYTES + pieces.front().map_or(0, Bytes::len));
                first.put_u8(0);
                first.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
                first.extend_from_slice(&pieces.pop_front().unwrap_or_default());
                pieces.push_front(first.freeze());
                (self.pieces, self.sending) = (pieces, Some(Arc::new((held, owed))));
                return self.poll_frame(context);
            }
            Some(Err(status)) => status,
            None => Status::ok(""),
        };
        self.has_ended = true;
        let mut trailers = http::HeaderMap::new();
        status.add_header(&mut trailers)?;
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }
}
