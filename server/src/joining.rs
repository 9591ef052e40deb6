//! How a new node gets what all nodes of a cluster know: by a token that is good once.
//!
//! A token names a cluster and an invitation, and has that invitation's secret, which follows from the cluster's key: so whoever has the
//! key can make the secret again, and no log, and no state, has it. Who joins proves that it has the secret as nodes prove that they have
//! the key, and what it is answered is closed under the secret (XChaCha20-Poly1305): who only listens learns nothing, and who answers
//! without the key is found out.

use std::{collections::BTreeMap, fmt, str::FromStr, sync::Arc};

use anyhow::{Context as _, Result, bail, ensure};
use chacha20poly1305::{
    KeyInit as _, XChaCha20Poly1305, XNonce,
    aead::{Aead as _, Payload},
};
use clutch_log::NodeId;
use clutch_runtime::Runtime;
use serde::{Deserialize, Serialize};

use crate::ClusterFile;

/// Bytes of an invitation's secret.
const SECRET_BYTES: usize = 16;
const NONCE_BYTES: usize = 24;
/// The layout of what is handed over that this build writes.
const LAYOUT: u32 = 1;

/// Closes something under a key, bound to something else that who opens it must know, too.
pub(crate) fn seal(runtime: &Runtime, key: [u8; 32], bound: &[u8], plain: &[u8]) -> Result<Vec<u8>> {
    let mut nonce = [0; NONCE_BYTES];
    runtime.random.fill(&mut nonce);
    let payload = Payload { msg: plain, aad: bound };
    let sealed = XChaCha20Poly1305::new(&key.into()).encrypt(XNonce::from_slice(&nonce), payload);
    let sealed = sealed.map_err(|_| anyhow::anyhow!("what is to be closed is too large"))?;
    Ok([&nonce[..], &sealed].concat())
}

/// Opens it; `None` where it was closed otherwise, or was changed.
pub(crate) fn open(key: [u8; 32], bound: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
    let (nonce, sealed) = sealed.split_at_checked(NONCE_BYTES)?;
    let payload = Payload { msg: sealed, aad: bound };
    XChaCha20Poly1305::new(&key.into()).decrypt(XNonce::from_slice(nonce), payload).ok()
}

/// An invitation, as its bearer has it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// The cluster.
    pub cluster: u64,
    /// The invitation's number.
    pub invitation: u64,
    secret: [u8; SECRET_BYTES],
}

impl Token {
    /// The token of an invitation; the same for everybody who has the cluster's key.
    pub fn of(cluster_key: &[u8; 32], cluster: u64, invitation: u64) -> Token {
        let mut hasher = blake3::Hasher::new_keyed(cluster_key);
        hasher.update(b"clutch invitation").update(&cluster.to_le_bytes()).update(&invitation.to_le_bytes());
        let mut secret = [0; SECRET_BYTES];
        secret.copy_from_slice(&hasher.finalize().as_bytes()[..SECRET_BYTES]);
        Token { cluster, invitation, secret }
    }

    /// What a request is signed with that takes the invitation.
    pub fn signing_key(&self) -> [u8; 32] {
        blake3::derive_key("clutch 2026 invitation, requests", &self.secret)
    }

    fn answer_key(&self) -> [u8; 32] {
        blake3::derive_key("clutch 2026 invitation, answers", &self.secret)
    }

    /// What an answer is bound to beside the secret: whose it is.
    fn bound(&self, joiner: u64, node: NodeId) -> Vec<u8> {
        [self.cluster, self.invitation, joiner, node].map(u64::to_le_bytes).concat()
    }

    /// Closes what this joiner is handed over, as this node.
    pub(crate) fn seal(
        &self,
        runtime: &Runtime,
        (joiner, node): (u64, NodeId),
        plain: &[u8],
    ) -> Result<Vec<u8>> {
        seal(runtime, self.answer_key(), &self.bound(joiner, node), plain)
    }

    /// Opens what was closed for this joiner.
    ///
    /// # Errors
    /// When it was changed on the way, or was made by somebody who has not the cluster's key.
    pub fn open(&self, joiner: u64, node: NodeId, sealed: &[u8]) -> Result<Belongings> {
        let foreign = "the answer was not made with this cluster's key, or was changed on the way: is the right cluster asked?";
        let Some(opened) = open(self.answer_key(), &self.bound(joiner, node), sealed) else { bail!(foreign) };
        let belongings: Belongings = serde_json::from_slice(&opened).context(
            "what the cluster hands over is not known to this build: join with the build that its nodes run",
        )?;
        ensure!(
            belongings.layout == LAYOUT,
            "what the cluster hands over has layout {}, this build knows {LAYOUT}: join with the build that its nodes run",
            belongings.layout
        );
        Ok(belongings)
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let secret: String = self.secret.iter().map(|byte| format!("{byte:02x}")).collect();
        let said = format!("{:016x}{:016x}{secret}", self.cluster, self.invitation);
        write!(f, "clutch-{said}{:08x}", crc32fast::hash(said.as_bytes()))
    }
}

/// Without its secret.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token(cluster {:016x}, invitation {:016x})", self.cluster, self.invitation)
    }
}

impl FromStr for Token {
    type Err = String;

    fn from_str(text: &str) -> Result<Token, String> {
        let wrong =
            || "this is no whole token: copy the line that clutch cluster invite has printed".to_owned();
        let digits = text.trim().strip_prefix("clutch-").ok_or_else(wrong)?;
        if digits.len() != 72
            || !digits.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
        {
            return Err(wrong());
        }
        let (said, check) = digits.split_at(64);
        if check != format!("{:08x}", crc32fast::hash(said.as_bytes())) {
            return Err(wrong());
        }
        let number = |from: usize| u64::from_str_radix(&said[from..from + 16], 16).map_err(|_| wrong());
        let mut secret = [0; SECRET_BYTES];
        for (at, byte) in secret.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&said[32 + 2 * at..34 + 2 * at], 16).map_err(|_| wrong())?;
        }
        Ok(Token { cluster: number(0)?, invitation: number(16)?, secret })
    }
}

/// What all nodes of a cluster have in their directories, and each new one is handed over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Belongings {
    layout: u32,
    /// What the cluster is made of.
    pub cluster: ClusterFile,
    /// The nodes that the logs' first members are on.
    pub founders: Vec<NodeId>,
    /// Where the nodes are.
    pub nodes: BTreeMap<NodeId, String>,
    /// Files with keys, by their names.
    pub keys: BTreeMap<String, Secret>,
}

/// A text that nobody is shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

impl Belongings {
    /// What belongs together; files with keys by their names.
    pub fn new(
        cluster: ClusterFile,
        founders: Vec<NodeId>,
        nodes: BTreeMap<NodeId, String>,
        keys: BTreeMap<String, Secret>,
    ) -> Belongings {
        Belongings { layout: LAYOUT, cluster, founders, nodes, keys }
    }

    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        Ok(serde_json::to_vec(self)?)
    }
}

/// Hands over what this node has, where it is one of several.
pub type HandOver = Arc<dyn Fn() -> Result<Belongings> + Send + Sync>;

#[cfg(test)]
mod tests {
    use clutch_runtime::simulated::World;

    use super::*;

    fn belongings() -> Belongings {
        let runtime = World::new(1).node(clutch_runtime::simulated::NodeId(1));
        let cluster = ClusterFile::generate(&runtime, 2, 6, 4, 2).expect("generated");
        let keys = BTreeMap::from([("cluster.key".to_owned(), Secret("1 secret".into()))]);
        Belongings { layout: LAYOUT, cluster, founders: vec![1, 2], nodes: BTreeMap::new(), keys }
    }

    #[test]
    fn a_token_is_read_as_it_was_said_and_not_with_any_other_sign_in_it() {
        let token = Token::of(&[7; 32], 0xabc, 9);
        let text = token.to_string();
        assert_eq!(format!(" {text}\n").parse::<Token>(), Ok(token.clone()));
        assert_ne!(Token::of(&[8; 32], 0xabc, 9), token);
        assert!(!format!("{token:?}").contains(&text[39..71]), "its secret is not shown");
        for at in 0..text.len() {
            for other in ["0", "1", "F", "é", ""] {
                let changed = format!("{}{other}{}", &text[..at], &text[at + 1..]);
                assert!(changed == text || changed.parse::<Token>().is_err(), "{changed}");
            }
        }
    }

    #[test]
    fn what_is_handed_over_is_opened_by_whom_it_is_for_alone() {
        let runtime = World::new(1).node(clutch_runtime::simulated::NodeId(1));
        let (token, belongings) = (Token::of(&[7; 32], 1, 9), belongings());
        let sealed = token.seal(&runtime, (5, 4), &belongings.encode().expect("encodes")).expect("closed");
        assert_eq!(token.open(5, 4, &sealed).expect("opened"), belongings);
        assert!(!String::from_utf8_lossy(&sealed).contains("secret"));
        assert!(token.open(6, 4, &sealed).is_err() && token.open(5, 3, &sealed).is_err());
        assert!(Token::of(&[8; 32], 1, 9).open(5, 4, &sealed).is_err());
        assert!(Token::of(&[7; 32], 1, 8).open(5, 4, &sealed).is_err());
        for bit in 0..sealed.len() * 8 {
            let mut flipped = sealed.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(token.open(5, 4, &flipped).is_err(), "bit {bit}");
        }
        for length in 0..sealed.len() {
            assert!(token.open(5, 4, &sealed[..length]).is_err(), "{length} bytes");
        }
    }
}
