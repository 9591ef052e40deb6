//! What failed of work on several things: said at once, and no reason to leave the others out.

use std::process::ExitCode;

use anyhow::{Error, Result};
use clutch_client::ClientError;
use clutch_proto::mutants::{self, Mutant};

use crate::output::talk;

/// Counts what failed.
#[derive(Default)]
pub(super) struct Failures {
    count: u64,
    unknown: bool,
    /// Failures in a row because nobody could be asked.
    unreachable: u32,
}

/// So many failures in a row because nobody could be asked mean that nobody serves.
const UNREACHABLE_MAX: u32 = 3;

impl Failures {
    /// Says what failed and goes on; `None` for it.
    pub(super) fn take<T>(&mut self, result: Result<T>) -> Option<T> {
        match result {
            // Says nothing about the cluster: it may have been something local.
            Ok(done) => Some(done),
            Err(error) => {
                self.add(&error);
                None
            }
        }
    }

    pub(super) fn add(&mut self, error: &Error) {
        talk!("clutch: {error:#}");
        self.count += 1;
        let is_unreachable = |cause: &(dyn std::error::Error + 'static)| {
            matches!(cause.downcast_ref::<ClientError>(), Some(ClientError::Unreachable(_)))
        };
        self.unreachable = if error.chain().any(is_unreachable) { self.unreachable + 1 } else { 0 };
        self.unknown &= !mutants::is(Mutant::UnknownOverwritten);
        self.unknown |= error
            .chain()
            .any(|cause| matches!(cause.downcast_ref::<ClientError>(), Some(ClientError::Unknown(_))));
    }

    /// It worked.
    pub(super) fn succeeded(&mut self) {
        self.unreachable = 0;
    }

    /// Whether nobody seems to serve: the rest would fail in the same way, each after its own wait.
    pub(super) fn is_hopeless(&self) -> bool {
        self.unreachable >= UNREACHABLE_MAX
    }

    /// How many so far.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// 0 when nothing failed, 3 when the outcome of something is unknown, else 1.
    pub(super) fn exit_code(&self) -> ExitCode {
        match (self.count, self.unknown) {
            (0, _) => ExitCode::SUCCESS,
            (_, true) => ExitCode::from(3),
            (_, false) => ExitCode::FAILURE,
        }
    }
}

/// Whether nobody reads what is printed, so that there is no sense in going on.
pub(super) fn is_final(error: &Error) -> bool {
    let is_pipe = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    };
    error.chain().any(is_pipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused() -> Error {
        clutch_proto::Refusal::new(clutch_proto::types::Code::NotFound, "x").into()
    }

    fn unknown() -> Error {
        Error::new(ClientError::Unknown("the answer did not come".into())).context("put /x")
    }

    /// The exit codes of commands in which these failed, one after another.
    fn codes() -> Vec<String> {
        let orders: [&[fn() -> Error]; 5] =
            [&[], &[refused], &[unknown], &[refused, unknown], &[unknown, refused, refused]];
        orders
            .map(|order| {
                let mut failures = Failures::default();
                order.iter().for_each(|error| failures.add(&error()));
                format!("{:?}", failures.exit_code())
            })
            .to_vec()
    }

    #[test]
    fn the_worst_of_several_failures_is_said() {
        let expected = [0, 1, 3, 3, 3].map(|code| format!("{:?}", ExitCode::from(code)));
        assert_eq!(codes(), expected);
    }

    #[test]
    fn planted_bugs_are_found() {
        mutants::plant(Some(Mutant::UnknownOverwritten));
        let (is_planted, codes) = (mutants::planted().is_some(), codes());
        mutants::plant(None);
        assert_eq!(codes[4] == format!("{:?}", ExitCode::from(1)), is_planted);
    }

    #[test]
    fn only_failures_in_a_row_mean_that_nobody_serves() {
        let unreachable = || Error::new(ClientError::Unreachable("nobody".into()));
        let mut failures = Failures::default();
        for _ in 0..UNREACHABLE_MAX - 1 {
            failures.add(&unreachable());
        }
        assert!(!failures.is_hopeless());
        failures.add(&refused());
        failures.add(&unreachable());
        assert!(!failures.is_hopeless());
        failures.succeeded();
        for _ in 0..UNREACHABLE_MAX {
            assert!(failures.take::<()>(Err(unreachable())).is_none());
        }
        assert!(failures.is_hopeless());
        assert_eq!(failures.count(), u64::from(2 * UNREACHABLE_MAX + 1));
    }
}
