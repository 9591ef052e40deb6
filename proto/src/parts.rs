//! Encoded messages in two pieces, so that a block is not copied into each message that wraps it.
//!
//! On the wire nothing of it can be seen: what [`Frame`] encodes is what its proto says.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::{
    DecodeError, Message,
    encoding::{self, DecodeContext, WireType, encode_key, encode_varint, encoded_len_varint, key_len},
};

use crate::{
    blocks::{BlocksReply, BlocksRequest, WriteBlock, blocks_request::Op},
    limits::MESSAGE_FRAMES_MAX,
    session::{Request, Response},
};

/// Fields that hold what is wrapped; the numbers are in the protos.
const REQUEST_BODY: u32 = 6;
const RESPONSE_BODY: u32 = 4;
const BLOCKS_REQUEST_WRITE: u32 = 1;
const WRITE_BLOCK_DATA: u32 = 2;
const BLOCKS_REPLY_DATA: u32 = 2;
const FRAME_ID: u32 = 1;
const FRAME_MESSAGE: u32 = 2;
const FRAMES_FRAMES: u32 = 1;
const FRAMES_PADDING: u32 = 2;

/// An encoded message: its bytes are those of `head`, then those of `tail`.
#[derive(Clone, Debug, Default)]
pub struct Parts {
    /// The beginning, or all of it.
    pub head: Bytes,
    /// The end, where a block is wrapped.
    pub tail: Bytes,
}

impl Parts {
    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.head.len() + self.tail.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// In one piece: copies if there are two.
    pub fn joined(self) -> Bytes {
        if self.tail.is_empty() {
            return self.head;
        }
        let mut whole = BytesMut::with_capacity(self.len());
        whole.extend_from_slice(&self.head);
        whole.extend_from_slice(&self.tail);
        whole.freeze()
    }

    /// A request to a block service, whose body must be empty.
    pub fn of_request(request: &Request, body: BlocksRequest) -> Parts {
        match body.op {
            Some(Op::Write(WriteBlock { certificate, data })) if !data.is_empty() => {
                let write = WriteBlock { certificate, data: Bytes::new() };
                let write = wrap(write.encode_to_vec(), WRITE_BLOCK_DATA, &[], data.len());
                let body = wrap(Vec::new(), BLOCKS_REQUEST_WRITE, &write, data.len());
                let head = wrap(request.encode_to_vec(), REQUEST_BODY, &body, data.len());
                Parts { head: head.into(), tail: data }
            }
            op => {
                let body = BlocksRequest { op }.encode_to_vec();
                wrap(request.encode_to_vec(), REQUEST_BODY, &body, 0).into()
            }
        }
    }

    /// A block service's answer; the response's body must be empty.
    pub fn of_response(response: &Response, reply: BlocksReply) -> Parts {
        let BlocksReply { proof, data } = reply;
        let mut body = BlocksReply { proof, data: Bytes::new() }.encode_to_vec();
        if !data.is_empty() {
            body = wrap(body, BLOCKS_REPLY_DATA, &[], data.len());
        }
        let head = wrap(response.encode_to_vec(), RESPONSE_BODY, &body, data.len());
        Parts { head: head.into(), tail: data }
    }
}

impl From<Bytes> for Parts {
    fn from(head: Bytes) -> Parts {
        Parts { head, tail: Bytes::new() }
    }
}

impl From<Vec<u8>> for Parts {
    fn from(head: Vec<u8>) -> Parts {
        Bytes::from(head).into()
    }
}

impl PartialEq for Parts {
    fn eq(&self, other: &Parts) -> bool {
        self.len() == other.len() && self.clone().joined() == other.clone().joined()
    }
}

/// Appends a field that begins with `inner` and ends with `tail_len` bytes that follow later.
fn wrap(mut outer: Vec<u8>, field: u32, inner: &[u8], tail_len: usize) -> Vec<u8> {
    encode_key(field, WireType::LengthDelimited, &mut outer);
    encode_varint((inner.len() + tail_len) as u64, &mut outer);
    outer.extend_from_slice(inner);
    outer
}

/// One message of a session, as in `session.proto`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Frame {
    /// Chosen by the caller, unique on its session, echoed in the answer.
    pub id: u64,
    /// The request or the answer. In one piece when it was decoded.
    pub message: Parts,
}

impl Message for Frame {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        if self.id != 0 {
            encoding::uint64::encode(FRAME_ID, &self.id, buf);
        }
        if !self.message.is_empty() {
            encode_key(FRAME_MESSAGE, WireType::LengthDelimited, buf);
            encode_varint(self.message.len() as u64, buf);
            buf.put_slice(&self.message.head);
            buf.put_slice(&self.message.tail);
        }
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        match tag {
            FRAME_ID => encoding::uint64::merge(wire_type, &mut self.id, buf, ctx),
            FRAME_MESSAGE => {
                self.message.tail.clear();
                encoding::bytes::merge(wire_type, &mut self.message.head, buf, ctx)
            }
            _ => encoding::skip_field(wire_type, tag, buf, ctx),
        }
    }

    fn encoded_len(&self) -> usize {
        let id = if self.id == 0 { 0 } else { encoding::uint64::encoded_len(FRAME_ID, &self.id) };
        let message = match self.message.len() {
            0 => 0,
            len => key_len(FRAME_MESSAGE) + encoded_len_varint(len as u64) + len,
        };
        id + message
    }

    fn clear(&mut self) {
        *self = Frame::default();
    }
}

/// Several frames, as in `session.proto`. More than [`MESSAGE_FRAMES_MAX`] of them are refused while they are decoded:
/// an empty frame has two bytes on the wire and many more in memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Frames {
    /// In the order in which they came.
    pub frames: Vec<Frame>,
    /// Zeros at the end, of which only the sender knows: see [`Frames::pad`].
    padding: usize,
}

/// A block shorter than this is copied into what stands around it.
const PIECE_BYTES_MIN: usize = 256 << 10;
/// What a message of a client is padded to.
const PADDED_BYTES: usize = 256;

impl Frames {
    /// One message of these frames.
    pub fn new(frames: Vec<Frame>) -> Frames {
        Frames { frames, padding: 0 }
    }

    /// Fills a short message up. HTTP/2 servers bound how many short frames may wait to be read, and end the connection
    /// beyond; a session that asks many small things at once would meet that bound.
    pub fn pad(&mut self) {
        let len = self.encoded_len();
        if len < PADDED_BYTES {
            self.padding = PADDED_BYTES - len;
        }
    }

    /// The encoded message in pieces, none of them empty: blocks are not copied.
    pub fn into_pieces(self) -> Vec<Bytes> {
        let (mut pieces, mut gathered) = (Vec::new(), BytesMut::new());
        for Frame { id, message: Parts { head, tail } } in self.frames {
            let frame = Frame { id, message: Parts { head: Bytes::new(), tail: Bytes::new() } };
            let len = head.len() + tail.len();
            let field = match len {
                0 => 0,
                len => key_len(FRAME_MESSAGE) + encoded_len_varint(len as u64) + len,
            };
            encode_key(FRAMES_FRAMES, WireType::LengthDelimited, &mut gathered);
            encode_varint((frame.encoded_len() + field) as u64, &mut gathered);
            frame.encode_raw(&mut gathered);
            if len > 0 {
                encode_key(FRAME_MESSAGE, WireType::LengthDelimited, &mut gathered);
                encode_varint(len as u64, &mut gathered);
                for part in [head, tail] {
                    if part.len() < PIECE_BYTES_MIN {
                        gathered.extend_from_slice(&part);
                    } else {
                        pieces.extend([gathered.split().freeze(), part]);
                    }
                }
            }
        }
        pieces.push(gathered.freeze());
        // An empty frame of HTTP/2 costs its receiver as much as a full one, and too many end a connection.
        pieces.retain(|piece| !piece.is_empty());
        pieces
    }
}

impl Message for Frames {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        encoding::message::encode_repeated(FRAMES_FRAMES, &self.frames, buf);
        if self.padding > 0 {
            encode_key(FRAMES_PADDING, WireType::LengthDelimited, buf);
            encode_varint(self.padding as u64, buf);
            buf.put_bytes(0, self.padding);
        }
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        if tag != FRAMES_FRAMES {
            return encoding::skip_field(wire_type, tag, buf, ctx);
        }
        encoding::message::merge_repeated(wire_type, &mut self.frames, buf, ctx)?;
        if self.frames.len() > MESSAGE_FRAMES_MAX {
            #[allow(deprecated, reason = "prost has no other way to make one")]
            return Err(DecodeError::new(format!("more than {MESSAGE_FRAMES_MAX} frames in one message")));
        }
        Ok(())
    }

    fn encoded_len(&self) -> usize {
        let padding = match self.padding {
            0 => 0,
            len => key_len(FRAMES_PADDING) + encoded_len_varint(len as u64) + len,
        };
        encoding::message::encoded_len_repeated(FRAMES_FRAMES, &self.frames) + padding
    }

    fn clear(&mut self) {
        *self = Frames::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        blocks::ReadBlock,
        types::{ClientTag, Error},
    };

    /// [`Frame`] as its proto has it.
    #[derive(Clone, PartialEq, prost::Message)]
    struct Plain {
        #[prost(uint64, tag = "1")]
        id: u64,
        #[prost(bytes = "bytes", tag = "2")]
        message: Bytes,
    }

    fn sizes() -> Vec<Bytes> {
        [0, 1, 127, 128, 100_000, 600_000].map(|len| Bytes::from(vec![9; len])).to_vec()
    }

    #[test]
    fn wrapped_is_the_same_as_encoded_first() {
        for data in sizes() {
            let reply = BlocksReply { data: data.clone(), proof: vec![1; 20].into() };
            let error = Some(Error { code: 3, detail: "x".into() });
            let outer = Response { time: 5, position: 6, error, ..Response::default() };
            let expected = Response { body: reply.encode_to_vec().into(), ..outer.clone() };
            let parts = Parts::of_response(&outer, reply);
            assert_eq!(parts.clone().joined(), expected.encode_to_vec());
            assert_eq!(Response::decode(parts.joined()).expect("decodes"), expected);
            let tag = Some(ClientTag { client: 7, sequence: 8, ..ClientTag::default() });
            let outer = Request { number: 3, cluster: 99, admin: true, tag, ..Request::default() };
            for op in [
                None,
                Some(Op::Write(WriteBlock { certificate: vec![2; 60].into(), data: data.clone() })),
                Some(Op::Read(ReadBlock { certificate: data.clone(), offset: 4, length: 5 })),
            ] {
                let body = BlocksRequest { op };
                let expected = Request { body: body.encode_to_vec().into(), ..outer.clone() };
                let parts = Parts::of_request(&outer, body);
                assert_eq!(Request::decode(parts.joined()).expect("decodes"), expected);
            }
        }
    }

    #[test]
    fn parts_are_equal_when_their_bytes_are() {
        let parts = |head: &'static [u8], tail: &'static [u8]| Parts {
            head: Bytes::from_static(head),
            tail: Bytes::from_static(tail),
        };
        assert_eq!(parts(b"ab", b"c"), parts(b"a", b"bc"));
        assert_eq!(parts(b"abc", b""), parts(b"", b"abc"));
        assert_ne!(parts(b"ab", b"c"), parts(b"ab", b"d"));
        assert_ne!(parts(b"ab", b"c"), parts(b"ab", b""));
        assert!(parts(b"", b"").is_empty() && !parts(b"", b"x").is_empty());
    }

    #[test]
    fn blocks_are_not_copied_and_what_is_short_is_gathered() {
        for (len, is_apart) in
            [(PIECE_BYTES_MIN - 1, false), (PIECE_BYTES_MIN, true), (PIECE_BYTES_MIN + 1, true)]
        {
            let data = Bytes::from(vec![5; len]);
            let message = Parts { head: Bytes::from_static(b"head"), tail: data.clone() };
            let pieces = Frames::new(vec![Frame { id: 1, message }]).into_pieces();
            assert_eq!(pieces.iter().any(|piece| piece.as_ptr() == data.as_ptr()), is_apart, "{len} bytes");
            assert_eq!(pieces.len(), if is_apart { 2 } else { 1 });
        }
    }

    #[test]
    fn only_short_messages_are_padded_and_cleared_ones_are_empty() {
        for len in PADDED_BYTES - 12..PADDED_BYTES + 4 {
            let mut frames = Frames::new(vec![Frame { id: 1, message: vec![7; len].into() }]);
            let before = frames.encoded_len();
            frames.pad();
            let after = frames.encoded_len();
            assert!(
                after >= PADDED_BYTES && (after == before) == (before >= PADDED_BYTES),
                "{before}, {after}"
            );
            frames.clear();
            assert_eq!((frames.frames.len(), frames.encoded_len()), (0, 0));
        }
        let mut frame = Frame { id: 1, message: vec![7; 9].into() };
        frame.clear();
        assert_eq!(frame, Frame::default());
    }

    #[test]
    fn frames_are_what_their_proto_says() {
        for id in [0, 1, u64::MAX] {
            for whole in sizes() {
                for cut in [0, whole.len() / 3, whole.len()] {
                    let message = Parts { head: whole.slice(..cut), tail: whole.slice(cut..) };
                    let frame = Frame { id, message };
                    let plain = Plain { id, message: whole.clone() };
                    assert_eq!(frame.encode_to_vec(), plain.encode_to_vec());
                    assert_eq!(frame.encoded_len(), plain.encoded_len());
                    assert_eq!(Frame::decode(&plain.encode_to_vec()[..]).expect("decodes"), frame);
                }
            }
        }
        let mut many = Frames::new((0..5).map(|id| Frame { id, message: vec![7; 3].into() }).collect());
        assert_eq!(Frames::decode(&many.encode_to_vec()[..]).expect("decodes"), many);
        let short = many.clone();
        many.pad();
        assert_eq!(many.encode_to_vec().len(), many.encoded_len());
        assert!((PADDED_BYTES..PADDED_BYTES + 8).contains(&many.encoded_len()));
        assert_eq!(Frames::decode(&many.encode_to_vec()[..]).expect("decodes"), short);
        let mut wrapped = Frames::default();
        for (id, data) in (0..).zip(sizes()) {
            let message = Parts { head: data.slice(..data.len() / 2), tail: data.slice(data.len() / 2..) };
            wrapped.frames.extend([Frame { id, message: data.into() }, Frame { id, message }]);
        }
        assert_eq!(wrapped.clone().into_pieces().concat(), wrapped.encode_to_vec());
        assert!(wrapped.clone().into_pieces().iter().all(|piece| !piece.is_empty()));
        assert_eq!(Frames::default().into_pieces().concat(), []);
        // So many that they would fill the memory are refused before they do.
        let empty = |count: usize| [10, 0].repeat(count);
        let most = Frames::decode(&empty(MESSAGE_FRAMES_MAX)[..]).expect("as many as may be");
        assert_eq!(most.frames.len(), MESSAGE_FRAMES_MAX);
        assert!(Frames::decode(&empty(MESSAGE_FRAMES_MAX + 1)[..]).is_err());
        // Fields of a later version are passed over; what is cut or of the wrong type is refused.
        assert_eq!(Frame::decode(&[24, 5][..]).expect("decodes"), Frame::default());
        assert!(Frame::decode(&[18, 200, 1, 0][..]).is_err());
        assert!(Frame::decode(&[16, 0][..]).is_err());
    }
}
