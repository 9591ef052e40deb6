//! Certificates for blocks: what the metadata grants, and the proofs that services give back.
//!
//! A grant names one operation on one block of one service and is signed with that service's key (keyed BLAKE3,
//! 128-bit tag). It is checked before anything else is looked at. A proof is signed with the same key and binds
//! size and CRC, so that only the service can have made it, and only for those bytes.
//!
//! A certificate is 74 bytes, little-endian:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 1 | version: 1 |
//! | 1 | 1 | operation: 1 write, 2 read, 3 erase, 4 check, 17 proof of write, 19 proof of erase |
//! | 2 | 4 | epoch of the key |
//! | 6 | 8 | cluster |
//! | 14 | 8 | service |
//! | 22 | 8 | block |
//! | 30 | 4 | size of the block in bytes |
//! | 34 | 4 | CRC-32 of the block |
//! | 38 | 8 | time of signing |
//! | 46 | 8 | expiry; 0 in a proof |
//! | 54 | 4 | zero |
//! | 58 | 16 | tag over bytes 0..58 |

use bytes::Bytes;

use crate::{
    error::Refusal,
    ids::{BlockId, ServiceId, Time},
    limits::{CERTIFICATE_LIFETIME_MS, CLOCK_AHEAD_MS_MAX},
    mutants::{self, Mutant},
    types::{ClientTag, Code},
};

/// Bytes of a certificate.
pub const CERTIFICATE_BYTES: usize = 74;
const SIGNED_BYTES: usize = 58;
const VERSION: u8 = 1;

/// What a certificate allows or proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Write the block.
    Write = 1,
    /// Read any part of it.
    Read = 2,
    /// Erase it.
    Erase = 3,
    /// Read and verify it at the service.
    Check = 4,
    /// It was written and is durable.
    Written = 17,
    /// It is gone.
    Erased = 19,
}

/// A service's key in one epoch. Never logged, never sent to clients.
#[derive(Clone, PartialEq, Eq)]
pub struct Key {
    /// Which epoch it signs in.
    pub epoch: u32,
    /// 32 secret bytes.
    pub secret: [u8; 32],
}

impl Key {
    /// The key of a block service that follows from this one, a cluster's: every node that has that knows it.
    pub fn of_service(&self, service: ServiceId) -> Key {
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        hasher.update(b"clutch key of a block service").update(&service.0.to_le_bytes());
        Key { epoch: self.epoch, secret: *hasher.finalize().as_bytes() }
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Key(epoch {})", self.epoch)
    }
}

/// What a certificate says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claims {
    /// Allowed or proven.
    pub operation: Operation,
    /// The cluster.
    pub cluster: u64,
    /// The service.
    pub service: ServiceId,
    /// The block.
    pub block: BlockId,
    /// Its size in bytes.
    pub size: u32,
    /// Its CRC.
    pub crc: u32,
    /// When it was signed.
    pub time: Time,
    /// Until when it is good; 0 in a proof.
    pub expiry: Time,
}

impl Claims {
    /// Signs the claims.
    pub fn sign(&self, key: &Key) -> Bytes {
        let mut bytes = Vec::with_capacity(CERTIFICATE_BYTES);
        bytes.extend_from_slice(&[VERSION, self.operation as u8]);
        bytes.extend_from_slice(&key.epoch.to_le_bytes());
        for number in [self.cluster, self.service.0, self.block.0] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&self.size.to_le_bytes());
        bytes.extend_from_slice(&self.crc.to_le_bytes());
        bytes.extend_from_slice(&self.time.0.to_le_bytes());
        bytes.extend_from_slice(&self.expiry.0.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        let tag = blake3::keyed_hash(&key.secret, &bytes);
        bytes.extend_from_slice(&tag.as_bytes()[..16]);
        bytes.into()
    }

    /// The proof that answers a grant.
    pub fn proof(&self, operation: Operation, time: Time) -> Claims {
        Claims { operation, time, expiry: Time(0), ..*self }
    }

    /// Checks the tag, in constant time, and then reads the claims.
    pub fn verify(certificate: &[u8], keys: &[Key]) -> Result<Claims, Refusal> {
        let bad = |what: &str| Refusal::new(Code::BadCertificate, what);
        if certificate.len() != CERTIFICATE_BYTES {
            return Err(bad(&format!(
                "a certificate has {CERTIFICATE_BYTES} bytes, this one {}",
                certificate.len()
            )));
        }
        let (signed, tag) = certificate.split_at(SIGNED_BYTES);
        let u32_at = |at: usize| u32::from_le_bytes(signed[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(signed[at..at + 8].try_into().expect("eight bytes"));
        let epoch = u32_at(2);
        let key = keys
            .iter()
            .find(|k| k.epoch == epoch)
            .ok_or_else(|| bad("signed with a key that is not live"))?;
        let expected = blake3::keyed_hash(&key.secret, signed);
        // Every byte is compared, whatever the first difference is.
        let difference = expected.as_bytes()[..16].iter().zip(tag).fold(0u8, |all, (a, b)| all | (a ^ b));
        if std::hint::black_box(difference) != 0 && !mutants::is(Mutant::SignatureUnchecked) {
            return Err(bad("the signature does not match"));
        }
        if signed[0] != VERSION {
            return Err(bad("a version that this build does not know"));
        }
        use Operation::{Check, Erase, Erased, Read, Write, Written};
        let operation =
            [Write, Read, Erase, Check, Written, Erased].into_iter().find(|o| *o as u8 == signed[1]);
        Ok(Claims {
            operation: operation.ok_or_else(|| bad("an unknown operation"))?,
            cluster: u64_at(6),
            service: ServiceId(u64_at(14)),
            block: BlockId(u64_at(22)),
            size: u32_at(30),
            crc: u32_at(34),
            time: Time(u64_at(38)),
            expiry: Time(u64_at(46)),
        })
    }

    /// What a service checks of a grant beside its tag: that it is for this cluster, service and operation and
    /// that its time has come and not passed. An erase is refused until writes granted before are over, also on
    /// clocks that are `skew_ms_max` apart.
    pub fn check_grant(
        &self,
        operation: Operation,
        cluster: u64,
        service: ServiceId,
        now: Time,
        skew_ms_max: u64,
    ) -> Result<(), Refusal> {
        // Who may read a block may let it be checked: that says less.
        let says_less = operation == Operation::Check && self.operation == Operation::Read;
        if self.operation != operation && !says_less {
            return Err(Refusal::new(
                Code::BadCertificate,
                format!("grants {:?}, not {operation:?}", self.operation),
            ));
        }
        if self.cluster != cluster {
            return Err(Refusal::new(Code::WrongCluster, "the certificate is for another cluster"));
        }
        if self.service != service {
            return Err(Refusal::new(Code::WrongService, "the certificate is for another block service"));
        }
        // Those who sign have clocks that follow what they hear, as far ahead as that is believed.
        if self.time > now.plus_ms(skew_ms_max + CLOCK_AHEAD_MS_MAX) {
            // Its time comes: whoever asks again is served.
            let text =
                "the certificate's signer is ahead of this service; synchronise the clocks of the servers";
            return Err(Refusal::new(Code::ClockAhead, text));
        }
        if operation != Operation::Erase && self.expiry > self.time.plus_ms(CERTIFICATE_LIFETIME_MS) {
            return Err(Refusal::new(Code::BadCertificate, "good for longer than a certificate may be"));
        }
        if operation == Operation::Erase {
            let earliest = self.expiry.plus_ms(2 * skew_ms_max);
            if now < earliest {
                return Err(Refusal::new(
                    Code::TooEarly,
                    "a write of this block may still be granted; erase it later",
                ));
            }
        } else if now > self.expiry {
            return Err(Refusal::new(Code::CertificateExpired, "ask the shard for a new certificate"));
        }
        Ok(())
    }
}

/// Clients below this id are parts of the cluster itself, such as the CDC's driver.
pub const SYSTEM_CLIENTS: u64 = 16;

/// What proves that a request with a system client's tag comes from the cluster: a keyed BLAKE3 tag of 16 bytes
/// over the tag's numbers and the body.
pub fn system_mac(key: &[u8; 32], tag: &ClientTag, body: &[u8]) -> Bytes {
    let mut hasher = blake3::Hasher::new_keyed(key);
    for number in [tag.client, tag.sequence, tag.acknowledged, tag.issued_at] {
        hasher.update(&number.to_le_bytes());
    }
    hasher.update(body);
    Bytes::copy_from_slice(&hasher.finalize().as_bytes()[..16])
}

/// For whom and when an administrative request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdminClaims {
    /// The cluster.
    pub cluster: u64,
    /// The role of the replica that is asked, by its number in `Role`.
    pub role: i32,
    /// Which of that role.
    pub number: u64,
    /// The time that the request says it is.
    pub time: Time,
}

/// What proves that an administrative request comes from who has the cluster's key: a keyed BLAKE3 tag of 16 bytes over a name, the
/// claims (little-endian) and the body.
pub fn admin_mac(key: &[u8; 32], claims: AdminClaims, body: &[u8]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(b"clutch administration");
    for number in [claims.cluster, u64::from(claims.role.unsigned_abs()), claims.number, claims.time.0] {
        hasher.update(&number.to_le_bytes());
    }
    hasher.update(body);
    let mut mac = [0; 16];
    mac.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    mac
}

/// Checks [`admin_mac`]; every byte is compared.
pub fn is_admin_mac(key: &[u8; 32], claims: AdminClaims, body: &[u8], mac: &[u8]) -> bool {
    let expected = admin_mac(key, claims, body);
    let difference = expected.iter().zip(mac).fold(0u8, |all, (a, b)| all | (a ^ b));
    mac.len() == expected.len() && std::hint::black_box(difference) == 0
}

/// Checks [`system_mac`]; every byte is compared.
pub fn is_system_mac(key: &[u8; 32], tag: &ClientTag, body: &[u8], mac: &[u8]) -> bool {
    let expected = system_mac(key, tag, body);
    let difference = expected.iter().zip(mac).fold(0u8, |all, (a, b)| all | (a ^ b));
    mac.len() == expected.len() && std::hint::black_box(difference) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_and_every_cut_is_refused() {
        let key = Key { epoch: 3, secret: [7; 32] };
        let claims = Claims {
            operation: Operation::Write,
            cluster: 1,
            service: ServiceId(2),
            block: BlockId(3),
            size: 4096,
            crc: 5,
            time: Time(6),
            expiry: Time(7),
        };
        let good = claims.sign(&key);
        assert_eq!(Claims::verify(&good, &[Key { epoch: 2, secret: [1; 32] }, key.clone()]), Ok(claims));
        for bit in 0..good.len() * 8 {
            let mut flipped = good.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(
                Claims::verify(&flipped, std::slice::from_ref(&key)).expect_err("refused").code,
                Code::BadCertificate
            );
        }
        for len in 0..good.len() {
            assert!(Claims::verify(&good[..len], std::slice::from_ref(&key)).is_err());
        }
        assert!(Claims::verify(&good, &[Key { epoch: 3, secret: [8; 32] }]).is_err());
    }

    const KEY: Key = Key { epoch: 3, secret: [7; 32] };

    fn claims(operation: Operation) -> Claims {
        Claims {
            operation,
            cluster: 1,
            service: ServiceId(2),
            block: BlockId(3),
            size: 4096,
            crc: 5,
            time: Time(1_000_000_000),
            expiry: Time(2_000_000_000),
        }
    }

    #[test]
    fn certificates_and_codes_have_their_golden_bytes() {
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let tag = ClientTag { client: 3, sequence: 4, ..ClientTag::default() };
        let now = format!(
            "{}\n{}\n{}\n",
            hex(&claims(Operation::Write).sign(&KEY)),
            hex(&claims(Operation::Write).proof(Operation::Written, Time(9)).sign(&KEY)),
            hex(&system_mac(&[9; 32], &tag, b"body"))
        );
        assert_eq!(now, include_str!("../../docs/formats/golden/certificate.hex"));
    }

    #[test]
    fn every_operation_and_proof_survives_its_signature_and_keys_are_not_shown() {
        use Operation::{Check, Erase, Erased, Read, Write, Written};
        for operation in [Write, Read, Erase, Check, Written, Erased] {
            let signed = claims(operation).sign(&KEY);
            assert_eq!(signed.len(), CERTIFICATE_BYTES);
            assert_eq!(Claims::verify(&signed, &[KEY]), Ok(claims(operation)));
        }
        let proof = claims(Write).proof(Written, Time(9));
        assert_eq!(proof, Claims { operation: Written, time: Time(9), expiry: Time(0), ..claims(Write) });
        let shown = format!("{KEY:?}");
        assert!(shown.contains('3') && !shown.contains("7, 7") && !shown.is_empty(), "{shown}");
    }

    #[test]
    fn grants_hold_up_to_their_edges_and_not_beyond() {
        const MS: u64 = 1_000_000;
        let skew_ms = 100;
        let check = |claims: &Claims, now: u64| {
            claims
                .check_grant(claims.operation, 1, ServiceId(2), Time(now), skew_ms)
                .err()
                .map(|refusal| (refusal.code, refusal.detail))
        };
        let write = claims(Operation::Write);
        // Signed as far ahead as clocks may be.
        let earliest = write.time.0 - (skew_ms + CLOCK_AHEAD_MS_MAX) * MS;
        assert_eq!(check(&write, earliest), None);
        let (code, detail) = check(&write, earliest - 1).expect("is refused");
        assert!(code == Code::ClockAhead && detail.contains("signer"), "{detail}");
        // Good for as long as one may be.
        let lifetime = CERTIFICATE_LIFETIME_MS * MS;
        for (operation, longer, is_good) in [
            (Operation::Write, 0, true),
            (Operation::Write, 1, false),
            (Operation::Read, 1, false),
            (Operation::Check, 1, false),
            // An erase names the end of the grants before it.
            (Operation::Erase, 1, true),
        ] {
            let grant = Claims { expiry: Time(write.time.0 + lifetime + longer), ..claims(operation) };
            let now = if operation == Operation::Erase { u64::MAX } else { write.time.0 };
            let refused = check(&grant, now);
            assert_eq!(refused.is_none(), is_good, "{operation:?}: {refused:?}");
            assert!(is_good || refused.expect("is refused").1.contains("longer"));
        }
        // Until its end, and for an erase from then on and twice the skew.
        assert_eq!(check(&write, write.expiry.0), None);
        assert_eq!(check(&write, write.expiry.0 + 1).expect("is refused").0, Code::CertificateExpired);
        let erase = claims(Operation::Erase);
        let from = erase.expiry.0 + 2 * skew_ms * MS;
        assert_eq!(check(&erase, from), None);
        assert_eq!(check(&erase, from - 1).expect("is refused").0, Code::TooEarly);
    }

    #[test]
    fn what_the_cluster_itself_asks_is_known_by_all_of_its_tag_and_body() {
        let tag = ClientTag { client: 1, sequence: 2, acknowledged: 1, issued_at: 9 };
        let (key, body) = ([5; 32], &b"body"[..]);
        let mac = system_mac(&key, &tag, body);
        assert_eq!(mac.len(), 16);
        assert!(is_system_mac(&key, &tag, body, &mac));
        for bit in 0..mac.len() * 8 {
            let mut flipped = mac.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(!is_system_mac(&key, &tag, body, &flipped), "bit {bit}");
        }
        for wrong in [&mac[..15], &[], &[&mac[..], &[0]].concat()] {
            assert!(!is_system_mac(&key, &tag, body, wrong));
        }
        // Two flips must not make up for each other.
        let twice: Vec<u8> = mac.iter().enumerate().map(|(n, byte)| byte ^ u8::from(n < 2)).collect();
        assert!(!is_system_mac(&key, &tag, body, &twice));
        assert!(!is_system_mac(&[6; 32], &tag, body, &mac) && !is_system_mac(&key, &tag, b"bodY", &mac));
        for other in [
            ClientTag { client: 2, ..tag },
            ClientTag { sequence: 3, ..tag },
            ClientTag { acknowledged: 0, ..tag },
            ClientTag { issued_at: 8, ..tag },
        ] {
            assert!(!is_system_mac(&key, &other, body, &mac), "{other:?}");
        }
    }

    #[test]
    fn grants_are_for_one_operation_one_service_and_a_while() {
        let claims = Claims {
            operation: Operation::Read,
            cluster: 1,
            service: ServiceId(2),
            block: BlockId(3),
            size: 1,
            crc: 0,
            time: Time(0),
            expiry: Time(1000),
        };
        let code = |claims: Claims, operation, cluster, service, now| {
            claims.check_grant(operation, cluster, ServiceId(service), Time(now), 100).err().map(|r| r.code)
        };
        assert_eq!(code(claims, Operation::Read, 1, 2, 1000), None);
        assert_eq!(code(claims, Operation::Read, 1, 2, 1001), Some(Code::CertificateExpired));
        assert_eq!(code(claims, Operation::Write, 1, 2, 0), Some(Code::BadCertificate));
        assert_eq!(code(claims, Operation::Read, 9, 2, 0), Some(Code::WrongCluster));
        assert_eq!(code(claims, Operation::Read, 1, 9, 0), Some(Code::WrongService));
        let erase = Claims { operation: Operation::Erase, ..claims };
        assert_eq!(code(erase, Operation::Erase, 1, 2, 1001), Some(Code::TooEarly));
        let late = 1001 + 2 * 100 * 1_000_000;
        assert_eq!(code(erase, Operation::Erase, 1, 2, late), None);
    }
}
