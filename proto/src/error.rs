//! What refusals mean: each code's sentence, errno, whether a retry can help and whether the request may
//! have taken effect.

use crate::types::{Code, Error};

/// A request was refused: it certainly had no effect unless [`Refusal::may_have_effect`] says otherwise.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{}", self.sentence())]
pub struct Refusal {
    /// Which of the closed list.
    pub code: Code,
    /// A sentence for a person.
    pub detail: String,
}

impl Refusal {
    fn sentence(&self) -> String {
        match self.detail.as_str() {
            "" => self.code.meaning().to_owned(),
            detail => format!("{detail} ({})", self.code.meaning()),
        }
    }

    /// A refusal with its reason.
    pub fn new(code: Code, detail: impl Into<String>) -> Refusal {
        let detail = detail.into();
        // Words may change with any build; this is how a test makes one.
        let detail = if cfg!(feature = "changed") { format!("in other words, {detail}") } else { detail };
        Refusal { code, detail }
    }

    /// The request or its encoding cannot be understood.
    pub fn malformed(detail: impl Into<String>) -> Refusal {
        Refusal::new(Code::Malformed, detail)
    }

    /// An argument lies outside what is allowed.
    pub fn invalid(detail: impl Into<String>) -> Refusal {
        Refusal::new(Code::InvalidArgument, detail)
    }

    /// Whether the same request may succeed later, unchanged.
    pub fn is_retryable(&self) -> bool {
        self.code.is_retryable()
    }

    /// Whether the request may have taken effect all the same.
    pub fn may_have_effect(&self) -> bool {
        self.code.may_have_effect()
    }

    /// The wire form.
    pub fn to_wire(&self) -> Error {
        Error { code: self.code as i32, detail: self.detail.clone() }
    }

    /// Reads the wire form; a code that this build does not know becomes `Unsupported`.
    pub fn from_wire(error: Error) -> Refusal {
        match Code::try_from(error.code) {
            Ok(code) => Refusal { code, detail: error.detail },
            Err(_) => Refusal::new(Code::Unsupported, format!("error code {}: {}", error.code, error.detail)),
        }
    }
}

impl Code {
    /// What the code says, in a few words.
    pub fn meaning(self) -> &'static str {
        match self {
            Code::Ok => "done",
            Code::NotFound => "no such file or directory",
            Code::Exists => "exists already",
            Code::NotEmpty => "directory not empty",
            Code::IsDirectory => "is a directory",
            Code::NotDirectory => "not a directory",
            Code::Loop => "would make a directory its own ancestor",
            Code::NameTooLong => "name too long",
            Code::InvalidName => "not a valid name",
            Code::InvalidArgument => "invalid argument",
            Code::NoSpace => "no space or too few block services",
            Code::TooLarge => "larger than the limit",
            Code::Busy => "held by another operation",
            Code::Stale => "changed since it was looked up",
            Code::Permission => "not permitted",
            Code::Malformed => "malformed message",
            Code::WrongShard => "sent to the wrong shard",
            Code::NotLeader => "not the leader",
            Code::StaleIncarnation => "an older incarnation of the log",
            Code::ClockAhead => "the sender's clock is too far ahead",
            Code::Overloaded => "overloaded",
            Code::NotReady => "not ready yet",
            Code::Unsupported => "not supported by this build",
            Code::WrongCluster => "another cluster",
            Code::WrongService => "another block service",
            Code::OutcomeUnknown => "outcome unknown",
            Code::ExpiredUnknown => "too old, outcome unknown",
            Code::ReplicaFault => "the replica has stopped on a fault",
            Code::Diverged => "the replica's state differs from its peers'",
            Code::Acknowledged => "answered before",
            Code::TransientGone => "the unpublished content is gone",
            Code::BadCookie => "wrong cookie",
            Code::BadCertificate => "certificate not valid",
            Code::CertificateExpired => "certificate expired",
            Code::BadProof => "proof not valid",
            Code::CrcMismatch => "checksum mismatch",
            Code::BlockNotFound => "block not found",
            Code::BlockCorrupt => "block corrupt",
            Code::DiskFault => "disk fault",
            Code::TooEarly => "too early",
            Code::Unreachable => "unreachable",
            Code::NotAgreed => "not all nodes know of it yet",
        }
    }

    /// The POSIX error number (Linux values) that a mount reports.
    pub fn errno(self) -> i32 {
        match self {
            Code::Ok => 0,
            Code::NotFound | Code::TransientGone => 2,
            Code::Exists => 17,
            Code::NotEmpty => 39,
            Code::IsDirectory => 21,
            Code::NotDirectory => 20,
            Code::Loop | Code::InvalidArgument | Code::InvalidName | Code::BadCookie => 22,
            Code::NameTooLong => 36,
            Code::NoSpace => 28,
            Code::TooLarge => 27,
            Code::Busy | Code::Overloaded | Code::TooEarly => 16,
            Code::Stale => 116,
            Code::Permission => 1,
            Code::Unsupported | Code::NotAgreed => 95,
            Code::Malformed
            | Code::WrongShard
            | Code::NotLeader
            | Code::StaleIncarnation
            | Code::ClockAhead
            | Code::NotReady
            | Code::WrongCluster
            | Code::WrongService
            | Code::OutcomeUnknown
            | Code::ExpiredUnknown
            | Code::ReplicaFault
            | Code::Diverged
            | Code::Acknowledged
            | Code::BadCertificate
            | Code::CertificateExpired
            | Code::BadProof
            | Code::CrcMismatch
            | Code::BlockNotFound
            | Code::BlockCorrupt
            | Code::DiskFault
            | Code::Unreachable => 5,
        }
    }

    /// Whether the same request, unchanged, may succeed later or elsewhere.
    pub fn is_retryable(self) -> bool {
        matches!(
            self,
            Code::Busy
                | Code::NotLeader
                | Code::Overloaded
                | Code::NotReady
                | Code::OutcomeUnknown
                | Code::Unreachable
                | Code::ClockAhead
        )
    }

    /// Whether the code says what became of the request: a machine looked at it and decided. Codes of the protocol
    /// and of faults say only that this attempt got no decision; an earlier one may have had an effect.
    pub fn is_decision(self) -> bool {
        matches!(
            self,
            Code::NotFound
                | Code::Exists
                | Code::NotEmpty
                | Code::IsDirectory
                | Code::NotDirectory
                | Code::Loop
                | Code::NameTooLong
                | Code::InvalidName
                | Code::InvalidArgument
                | Code::NoSpace
                | Code::TooLarge
                | Code::Stale
                | Code::Permission
                | Code::TransientGone
                | Code::BadCookie
                | Code::BadProof
                | Code::CrcMismatch
                | Code::TooEarly
                | Code::NotAgreed
        )
    }

    /// Whether the code is about the request alone, whatever the cluster's state: every copy of it is refused so.
    pub fn is_about_request(self) -> bool {
        matches!(
            self,
            Code::NameTooLong
                | Code::InvalidName
                | Code::InvalidArgument
                | Code::TooLarge
                | Code::Permission
                | Code::CrcMismatch
        )
    }

    /// Whether a request that was answered so may have taken effect.
    pub fn may_have_effect(self) -> bool {
        // A replica that has stopped cannot say what became of another copy of the request.
        matches!(self, Code::OutcomeUnknown | Code::ExpiredUnknown | Code::Acknowledged | Code::ReplicaFault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which classes each code is in: R may be retried, D is a decision, A is about the request alone, E may have had an effect.
    const CLASSES: &str = "\
        NotFound D, Exists D, NotEmpty D, IsDirectory D, NotDirectory D, Loop D, NameTooLong DA, InvalidName DA, \
        InvalidArgument DA, NoSpace D, TooLarge DA, Busy R, Stale D, Permission DA, Malformed -, WrongShard -, \
        NotLeader R, StaleIncarnation -, ClockAhead R, Overloaded R, NotReady R, Unsupported -, WrongCluster -, \
        WrongService -, OutcomeUnknown RE, ExpiredUnknown E, ReplicaFault E, Diverged -, Acknowledged E, \
        TransientGone D, BadCookie D, BadCertificate -, CertificateExpired -, BadProof D, CrcMismatch DA, \
        BlockNotFound -, BlockCorrupt -, DiskFault -, TooEarly D, Unreachable R, NotAgreed D";

    #[test]
    fn every_code_is_in_its_classes() {
        let mut listed: std::collections::BTreeMap<&str, &str> =
            CLASSES.split(", ").map(|line| line.split_once(' ').expect("a code and its classes")).collect();
        for number in 1..400 {
            let Ok(code) = Code::try_from(number) else { continue };
            let name = format!("{code:?}");
            let all = [
                (code.is_retryable(), "R"),
                (code.is_decision(), "D"),
                (code.is_about_request(), "A"),
                (code.may_have_effect(), "E"),
            ];
            let found: String = all.into_iter().filter(|(is_in, _)| *is_in).map(|(_, class)| class).collect();
            let found = if found.is_empty() { "-".to_owned() } else { found };
            assert_eq!(listed.remove(name.as_str()), Some(found.as_str()), "{name}");
            let refusal = Refusal::new(code, "why");
            assert_eq!(refusal.is_retryable(), code.is_retryable());
            assert_eq!(refusal.may_have_effect(), code.may_have_effect());
            // What is about the request alone is a decision, and what may be retried unchanged is none.
            assert!(!code.is_about_request() || code.is_decision(), "{name}");
            assert!(!code.is_retryable() || !code.is_decision(), "{name}");
        }
        assert!(listed.is_empty(), "not codes: {listed:?}");
    }

    #[test]
    fn a_refusal_is_said_and_sent_with_its_code() {
        let refusal = Refusal { code: Code::NotEmpty, detail: "dir 7".into() };
        assert_eq!(refusal.to_string(), "dir 7 (directory not empty)");
        assert_eq!(Refusal { detail: String::new(), ..refusal.clone() }.to_string(), "directory not empty");
        assert_eq!(Refusal::from_wire(refusal.to_wire()), refusal);
        let newer = Refusal::from_wire(Error { code: 9999, detail: "unheard of".into() });
        assert_eq!(newer.code, Code::Unsupported);
        assert!(newer.detail.contains("9999") && newer.detail.contains("unheard of"));
        assert_eq!(Code::Ok.errno(), 0);
    }

    #[test]
    fn the_page_of_operations_lists_every_code_as_it_is() {
        let page = include_str!("../../docs/operations.md");
        let section = page.split_once("## Codes").and_then(|(_, rest)| rest.split_once("\n## "));
        let section = section.expect("a section of codes").0;
        let mut listed = std::collections::BTreeMap::new();
        for line in section.lines().filter(|line| line.starts_with("| `")) {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            listed.insert(cells[0].trim_matches('`').to_owned(), (cells[1].to_owned(), cells[2].to_owned()));
        }
        for number in 1..400 {
            let Ok(code) = Code::try_from(number) else { continue };
            let name = format!("{code:?}");
            let (errno, meaning) = listed.remove(&name).unwrap_or_else(|| panic!("{name} is not listed"));
            assert_eq!(errno, code.errno().to_string(), "{name}");
            assert!(meaning.starts_with(code.meaning()), "{name}: {meaning}");
        }
        assert!(listed.is_empty(), "not codes: {listed:?}");
    }
}
