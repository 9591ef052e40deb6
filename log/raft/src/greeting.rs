//! How two nodes get to know each other on a new stream, before a byte of consensus is looked at.
//!
//! Who opens the stream sends a hello: `CRAFT004`, cluster (8), the own node (8), the node that it believes to speak to (8), the own
//! identity (16), its mark (8, 8), the mark at which it remembers the other (8, 8; zeros for none), 32 random bytes, and the address that it
//! is reached by (at most 255 printable bytes of ASCII, perhaps none). The other answers with its identity (16), its mark and the one
//! that it remembers of the first (32), 32 random bytes, and a MAC over the hello and these; or with a refusal, `CRAFTNO!` and a text. The
//! first proves in turn that it has the key, by a MAC over the same. All numbers are little-endian; a MAC is BLAKE3 under the cluster's
//! key (32 bytes), over the purpose, the hello, and what the answer says before it.
//!
//! Invariants: neither side believes the other before it has seen a MAC over bytes that it has drawn itself, so nothing that was heard
//! on another stream is of any use; who cannot prove anything learns whether he has found the node that he looked for, who that is, and two
//! marks. A node
//! that has another identity than the one that was met first under its number is refused: it has lost its log, and its votes with
//! that (`identities.rs`); and so is one that was further before, which is an older copy of itself. The address of who was proven to be a
//! node counts from then on, so a node is found where it went. Frames are not protected after that: who can change what is on the way
//! between nodes is not kept out.

use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use clutch_log::NodeId;
use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::{ClusterKeys, PeerStream, Runtime};

use crate::{
    codec::{Malformed, Reader},
    identities::{Claim, IDENTITY_BYTES, Identities, Identity as Drawn, MARK_BYTES, Mark},
};

/// How long one side waits for the other's next word.
const PATIENCE: Duration = Duration::from_secs(2);
const HELLO: &[u8; 8] = b"CRAFT004";
const REFUSED: &[u8; 8] = b"CRAFTNO!";
const NONCE_BYTES: usize = 32;
const MAC_BYTES: usize = 32;
/// An address is no longer.
const ADDRESS_BYTES_MAX: usize = 255;
/// What the MACs are made over, of what the answering node says: its identity, two marks, and what it has drawn.
const DRAWN_BYTES: usize = IDENTITY_BYTES + 2 * MARK_BYTES + NONCE_BYTES;
/// A refusal's text is no longer.
const TEXT_BYTES_MAX: usize = 512;

/// What a node knows of its cluster and of itself.
#[derive(Clone)]
pub(crate) struct Me {
    pub(crate) cluster: u64,
    pub(crate) node: NodeId,
    /// Who it is, and whom it has met.
    pub(crate) identities: Identities,
    /// What the cluster's nodes know each other by.
    pub(crate) keys: ClusterKeys,
    /// What others reach it by; empty where they know by themselves.
    pub(crate) address: String,
}

/// Who speaks to whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) cluster: u64,
    pub(crate) from: NodeId,
    pub(crate) to: NodeId,
    pub(crate) identity: Drawn,
    pub(crate) mark: Mark,
    /// At which mark the other was when it was met before.
    pub(crate) remembered: Mark,
    pub(crate) nonce: [u8; NONCE_BYTES],
    pub(crate) address: String,
}

impl Hello {
    pub(crate) fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::from(&HELLO[..]);
        [self.cluster, self.from, self.to].into_iter().for_each(|number| bytes.put_u64_le(number));
        bytes.put_slice(&self.identity);
        bytes.put_slice(&self.mark.encode());
        bytes.put_slice(&self.remembered.encode());
        bytes.put_slice(&self.nonce);
        bytes.put_slice(self.address.as_bytes());
        bytes.freeze()
    }

    pub(crate) fn decode(bytes: Bytes) -> Result<Hello, Malformed> {
        let mut from = Reader(bytes);
        if from.take(HELLO.len())? != HELLO[..] {
            return Err(Malformed("no stream between members of logs of this build"));
        }
        let (cluster, node, to) = (from.u64()?, from.u64()?, from.u64()?);
        let (identity, mark, remembered) = (from.array()?, Mark::read(&mut from)?, Mark::read(&mut from)?);
        let nonce = from.array()?;
        if from.0.len() > ADDRESS_BYTES_MAX || !from.0.iter().all(u8::is_ascii_graphic) {
            return Err(Malformed("no address of a node"));
        }
        let address = String::from_utf8_lossy(&from.0).into_owned();
        Ok(Hello { cluster, from: node, to, identity, mark, remembered, nonce, address })
    }
}

/// Under which name a MAC is made: what one side has said is never what the other is to say.
#[derive(Clone, Copy)]
enum Purpose {
    Answer,
    Proof,
}

fn mac(key: &[u8; 32], purpose: Purpose, hello: &Bytes, nonce: &[u8]) -> [u8; MAC_BYTES] {
    let name: &[u8] = match purpose {
        Purpose::Answer => b"clutch raft answer",
        Purpose::Proof => b"clutch raft proof.",
    };
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(name).update(hello).update(nonce);
    *hasher.finalize().as_bytes()
}

/// Without telling by the time that it takes how much of it is right.
fn is_same(one: &[u8], other: [u8; MAC_BYTES]) -> bool {
    <[u8; MAC_BYTES]>::try_from(one).is_ok_and(|one| blake3::Hash::from(one) == blake3::Hash::from(other))
}

fn nonce(runtime: &Runtime) -> [u8; NONCE_BYTES] {
    let mut nonce = [0; NONCE_BYTES];
    runtime.random.fill(&mut nonce);
    nonce
}

async fn next(runtime: &Runtime, stream: &mut PeerStream) -> Result<Bytes, String> {
    match runtime.timeout(PATIENCE, stream.receiver.recv()).await {
        Some(Some(bytes)) => Ok(bytes),
        Some(None) => Err("it ends the stream".into()),
        None => Err(format!("it says nothing for {} s", PATIENCE.as_secs())),
    }
}

/// Greets the node at the other end of a stream that was opened to it; under which key.
///
/// # Errors
/// When it refuses, or does not know the cluster's key.
pub(crate) async fn open(
    runtime: &Runtime,
    me: &Me,
    to: NodeId,
    stream: &mut PeerStream,
) -> Result<[u8; 32], String> {
    let Claim { identity, mark, address } = me.identities.claim(&me.address);
    let (remembered, nonce) = (me.identities.remembered(to), nonce(runtime));
    let hello = Hello { cluster: me.cluster, from: me.node, to, identity, mark, remembered, nonce, address };
    let hello = hello.encode();
    let gone = |_| "it ends the stream".to_owned();
    stream.sender.send(hello.clone()).await.map_err(gone)?;
    let answer = next(runtime, stream).await?;
    if let Some(text) = answer.strip_prefix(&REFUSED[..]) {
        return Err(String::from_utf8_lossy(&text[..text.len().min(TEXT_BYTES_MAX)]).into_owned());
    }
    if answer.len() != DRAWN_BYTES + MAC_BYTES {
        return Err("it speaks another language".into());
    }
    let (drawn, proven) = answer.split_at(DRAWN_BYTES);
    // By whichever it uses, and the proof by the same one: while the cluster goes from one key to the next, both are believed.
    let fits = |key: &[u8; 32]| is_same(proven, mac(key, Purpose::Answer, &hello, drawn));
    let key = me.keys.find(fits).or_else(|| mutants::is(Mutant::AnyAnswerTaken).then(|| me.keys.used()));
    let Some(key) = key else {
        return Err("it has another key than this node (keys/cluster.key)".into());
    };
    let mut said = Reader(Bytes::copy_from_slice(drawn));
    let found = (|| {
        let identity: Drawn = said.array()?;
        let (mark, remembered) = (Mark::read(&mut said)?, Mark::read(&mut said)?);
        Ok::<_, Malformed>((Claim { identity, mark, address: String::new() }, remembered))
    })();
    let (claim, remembered) = found.map_err(|error| error.to_string())?;
    me.identities.meet(runtime, to, claim).await?;
    let proof = mac(&key, Purpose::Proof, &hello, drawn);
    stream.sender.send(Bytes::copy_from_slice(&proof)).await.map_err(gone)?;
    // Who is to be refused has been heard by then, so the other says why, too.
    me.identities.is_remembered(to, remembered)?;
    Ok(key)
}

/// Greets whoever has opened a stream to this node; which node it is, and under which key.
///
/// # Errors
/// When it is none of the cluster's, or wants another.
pub(crate) async fn accept(
    runtime: &Runtime,
    me: &Me,
    stream: &mut PeerStream,
) -> Result<(NodeId, [u8; 32]), String> {
    let first = next(runtime, stream).await?;
    let said = Hello::decode(first.clone()).map_err(|error| error.to_string()).and_then(|hello| {
        let Hello { cluster, from, to, identity, mark, remembered, address, .. } = hello;
        match (cluster == me.cluster, to == me.node) {
            (false, _) => Err(format!("node {from} is of cluster {cluster:016x}, not of this one")),
            (_, false) => {
                Err(format!("node {from} looks for node {to}, which is another: correct its address"))
            }
            (true, true) => Ok((from, Claim { identity, mark, address }, remembered)),
        }
    });
    let (from, claim, remembered) = match said {
        Ok(said) => said,
        Err(why) => {
            let text = [&REFUSED[..], &why.as_bytes()[..why.len().min(TEXT_BYTES_MAX)]].concat();
            // It may have gone.
            let _ = stream.sender.send(text.into()).await;
            return Err(why);
        }
    };
    let drawn = if mutants::is(Mutant::ChallengeRepeated) { [7; NONCE_BYTES] } else { nonce(runtime) };
    let Claim { identity, mark, .. } = me.identities.claim("");
    let marks = [mark, me.identities.remembered(from)].map(Mark::encode);
    let drawn = [&identity[..], &marks.concat(), &drawn].concat();
    let key = me.keys.used();
    let answer = [&drawn[..], &mac(&key, Purpose::Answer, &first, &drawn)].concat();
    let gone = |_| "it ends the stream".to_owned();
    stream.sender.send(answer.into()).await.map_err(gone)?;
    let proof = next(runtime, stream).await?;
    if !is_same(&proof, mac(&key, Purpose::Proof, &first, &drawn)) && !mutants::is(Mutant::AnyProofTaken) {
        return Err(format!(
            "who says that it is node {from} has another key than this node (keys/cluster.key)"
        ));
    }
    me.identities.meet(runtime, from, claim).await?;
    me.identities.is_remembered(from, remembered)?;
    Ok((from, key))
}
