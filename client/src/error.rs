//! What can go wrong for a caller.

use clutch_proto::{Refusal, types::Code};

/// Done is `Ok`; these are the other two outcomes.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClientError {
    /// Certainly no effect.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Refused for what the leader knew at that moment, which no log holds: room, block services, rows that were there or
    /// were not. It has had no effect; a copy of the request that is still on its way may find things changed, and have one.
    #[error("{0}")]
    Declined(Refusal),
    /// Nobody could be asked: certainly no effect.
    #[error("{0}")]
    Unreachable(String),
    /// The request was sent, and whether it took effect is not known.
    #[error("outcome unknown: {0}")]
    Unknown(String),
    /// Too few blocks of a span can be read. Names the span and what each service said.
    #[error("{0}")]
    DataLost(String),
    /// Reading the caller's bytes, or writing them for it, failed.
    #[error("local file: {0}")]
    Local(String),
}

impl ClientError {
    /// The code of a refusal.
    pub fn code(&self) -> Option<Code> {
        match self {
            ClientError::Refused(refusal) | ClientError::Declined(refusal) => Some(refusal.code),
            ClientError::Unreachable(_)
            | ClientError::Unknown(_)
            | ClientError::DataLost(_)
            | ClientError::Local(_) => None,
        }
    }

    /// Whether something does not exist.
    pub fn is_not_found(&self) -> bool {
        self.code() == Some(Code::NotFound)
    }

    /// Whether the same request may succeed in a moment.
    pub fn may_pass(&self) -> bool {
        match self {
            ClientError::Refused(refusal) | ClientError::Declined(refusal) => refusal.is_retryable(),
            ClientError::Unreachable(_) | ClientError::Unknown(_) => true,
            ClientError::DataLost(_) | ClientError::Local(_) => false,
        }
    }

    pub(crate) fn unexpected(what: &str) -> ClientError {
        ClientError::Refused(Refusal::malformed(format!(
            "an answer without {what}; client and server do not fit"
        )))
    }
}
