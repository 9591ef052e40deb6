//! Whether a request is asked again, and what its caller is told when it is not: from what was heard alone.
//!
//! Invariants: what may have been done is never called refused or unreachable, unless the log says what became of it; a
//! request that was never sent is never unknown.

use std::time::Duration;

use clutch_proto::{
    Refusal,
    mutants::{self, Mutant},
    rules::v1::CLIENT_IDLE_LIFETIME_MS,
    types::Code,
};

use crate::error::ClientError;

/// How often one request is tagged anew, each time because it was held up for longer than the cluster remembers clients.
const RENEWALS_MAX: u32 = 8;
/// What a copy of a message has done may be forgotten when the message was sent longer ago than this: then no tag is drawn anew for
/// what it asked for. Half of the time for which it is remembered, since clocks differ.
const COPIES_KNOWN: Duration = Duration::from_millis(CLIENT_IDLE_LIFETIME_MS / 2);

/// A request on its way.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Asked {
    /// Whether it changes something.
    pub(crate) is_tagged: bool,
    /// Whether an attempt may have had an effect that nobody has told of.
    pub(crate) maybe_done: bool,
    renewals: u32,
    /// When the first attempt was sent, by a clock that also counts while the machine sleeps.
    first_sent: Option<Duration>,
    /// Why who leads did not take it, of late: the others say that they do not lead, which tells a person less.
    unready: Option<Refusal>,
}

/// How an attempt failed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attempt<'a> {
    /// Why.
    pub(crate) error: &'a ClientError,
    /// Whether the service was asked: what went wrong on the way to the registry had no effect there.
    pub(crate) was_sent: bool,
    /// Whether the answer is in a log.
    pub(crate) is_logged: bool,
    /// Whether others may answer instead of who was asked.
    pub(crate) has_others: bool,
    /// When it had failed, by the clock that says when attempts are sent.
    pub(crate) now: Duration,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Ask again, if there is patience left.
    pub(crate) again: bool,
    /// Draw the tag's time anew; its sequence stays, so that a copy of the attempt that comes late is recognised.
    pub(crate) renew: bool,
    /// Whoever was asked may not be the one any more: look where everything is.
    pub(crate) look_again: bool,
    /// For those who count rare states.
    pub(crate) note: Option<&'static str>,
}

impl Asked {
    pub(crate) fn new(is_tagged: bool) -> Asked {
        Asked { is_tagged, ..Asked::default() }
    }

    /// An attempt is sent at a time of a clock that also counts while the machine sleeps.
    pub(crate) fn sent(&mut self, now: Duration) {
        self.first_sent.get_or_insert(now);
    }

    /// An attempt failed.
    pub(crate) fn failed(&mut self, attempt: Attempt<'_>) -> Verdict {
        let end = Verdict { again: false, renew: false, look_again: false, note: None };
        let since_first = self.first_sent.map_or(Duration::ZERO, |sent| attempt.now.saturating_sub(sent));
        let are_copies_known = since_first <= COPIES_KNOWN;
        match attempt.error {
            // Nothing was sent before that could have had an effect, so this had none: the tag's time was too old when it was
            // drawn, and now the cluster's time is known. A network may have carried a copy of what was refused, which came when it
            // was not refused any more; it is recognised as long as what it did is remembered.
            ClientError::Refused(refusal)
                if refusal.code == Code::ExpiredUnknown
                    && !self.maybe_done
                    && self.renewals < RENEWALS_MAX
                    && (are_copies_known || mutants::is(Mutant::RenewedHoweverLate))
                    && !mutants::is(Mutant::TagFromWallClock) =>
            {
                self.renewals += 1;
                Verdict { again: true, renew: true, note: Some("client: a tag is drawn again"), ..end }
            }
            ClientError::Refused(refusal) => {
                match refusal.code {
                    Code::NotReady => self.unready = Some(refusal.clone()),
                    Code::NotLeader => {}
                    // Something else happened since.
                    _ => self.unready = None,
                }
                let has_expired = refusal.code == Code::ExpiredUnknown && !self.maybe_done && self.is_tagged;
                let never_sent = has_expired && are_copies_known;
                self.maybe_done |= attempt.was_sent && refusal.may_have_effect();
                let moved = matches!(
                    refusal.code,
                    Code::WrongShard | Code::NotLeader | Code::NotReady | Code::OutcomeUnknown
                );
                // The log was begun anew elsewhere; where it is in a log it answers the question.
                let moved = moved || refusal.code == Code::StaleIncarnation && !attempt.is_logged;
                // Who has stopped does not get better; another member does what it cannot.
                let moved = moved || refusal.code == Code::ReplicaFault && attempt.has_others;
                // A refusal that is in no log binds only its own attempt: an earlier one may be on its way still.
                let is_open = self.maybe_done && self.is_tagged && !attempt.is_logged;
                let note = match (never_sent, moved) {
                    _ if has_expired && !never_sent => Some("client: expired, and a copy may be forgotten"),
                    (true, _) => Some("client: expired before it was ever sent"),
                    (_, true) => Some("client: was sent elsewhere"),
                    _ => None,
                };
                let again = refusal.is_retryable() || moved || is_open && refusal.code.is_decision();
                Verdict { again, look_again: moved, note, ..end }
            }
            // Whoever it was may have moved.
            ClientError::Unreachable(_) => {
                Verdict { again: true, look_again: true, note: Some("client: nobody listens"), ..end }
            }
            // A leader that was cut off does not know it, and says nothing: another may have taken over.
            ClientError::Unknown(_) => {
                self.maybe_done |= attempt.was_sent && !mutants::is(Mutant::UnknownIsRefused);
                Verdict { again: true, look_again: true, ..end }
            }
            // Made by `told`, from what is left when no retry helps.
            ClientError::Declined(_) | ClientError::DataLost(_) | ClientError::Local(_) => end,
        }
    }

    /// What the caller is told when it is not asked again; with a note.
    pub(crate) fn told(&self, error: ClientError, is_logged: bool) -> (ClientError, Option<&'static str>) {
        let unready = self.unready.clone().filter(|_| error.code() == Some(Code::NotLeader));
        match unready.map_or(error, ClientError::Refused) {
            // Once it may have been done, only an answer that says what became of it is better.
            ClientError::Refused(refusal)
                if self.maybe_done && self.is_tagged && (!refusal.code.is_decision() || !is_logged) =>
            {
                let note = "client: a refusal after an unknown attempt stays unknown";
                (ClientError::Unknown(refusal.to_string()), Some(note))
            }
            ClientError::Refused(refusal)
                if self.is_tagged
                    && !is_logged
                    && refusal.code.is_decision()
                    && !refusal.code.is_about_request() =>
            {
                (ClientError::Declined(refusal), Some("client: declined, which no log holds"))
            }
            ClientError::Unreachable(text) if self.maybe_done && self.is_tagged => {
                (ClientError::Unknown(text), None)
            }
            ClientError::Unknown(text) if !self.is_tagged || mutants::is(Mutant::UnknownIsRefused) => {
                (ClientError::Unreachable(text), None)
            }
            other => (other, None),
        }
    }
}

#[cfg(test)]
mod tests {
    use clutch_proto::Refusal;

    use super::*;

    fn refused(code: Code) -> ClientError {
        Refusal::new(code, "words").into()
    }

    fn silence() -> ClientError {
        ClientError::Unknown("no answer".into())
    }

    fn nobody() -> ClientError {
        ClientError::Unreachable("nobody listens".into())
    }

    /// One that was sent just now, to who is the only one; its answer is in no log.
    fn attempt(error: &ClientError) -> Attempt<'_> {
        Attempt { error, was_sent: true, is_logged: false, has_others: false, now: Duration::ZERO }
    }

    /// What was heard of each attempt (the error, whether it was sent, whether it is in a log) of a change, and whether each
    /// is followed by another; then what the caller is told.
    type Row = (&'static str, Vec<(ClientError, bool, bool)>, Vec<bool>, fn(&ClientError) -> bool);

    fn is_code(error: &ClientError, code: Code) -> bool {
        matches!(error, ClientError::Refused(refusal) if refusal.code == code)
    }

    #[test]
    fn what_is_asked_again_and_what_is_told_of_a_change() {
        let unknown: fn(&ClientError) -> bool = |e| matches!(e, ClientError::Unknown(_));
        let declined: fn(&ClientError) -> bool = |e| matches!(e, ClientError::Declined(_));
        let unreachable: fn(&ClientError) -> bool = |e| matches!(e, ClientError::Unreachable(_));
        let table: Vec<Row> = vec![
            ("a logged refusal", vec![(refused(Code::Exists), true, true)], vec![false], |e| {
                is_code(e, Code::Exists)
            }),
            (
                "a refusal of its form is in no log and certain",
                vec![(refused(Code::InvalidArgument), true, false)],
                vec![false],
                |e| is_code(e, Code::InvalidArgument),
            ),
            ("a leader's own refusal", vec![(refused(Code::NoSpace), true, false)], vec![false], declined),
            ("nobody was reached", vec![(nobody(), true, false)], vec![true], unreachable),
            ("silence", vec![(silence(), true, false)], vec![true], unknown),
            (
                "silence on the way to the registry",
                vec![(silence(), false, false), (nobody(), false, false)],
                vec![true, true],
                unreachable,
            ),
            (
                "silence, then nobody",
                vec![(silence(), true, false), (nobody(), true, false)],
                vec![true, true],
                unknown,
            ),
            (
                "silence, then a logged refusal",
                vec![(silence(), true, false), (refused(Code::Exists), true, true)],
                vec![true, false],
                |e| is_code(e, Code::Exists),
            ),
            (
                "silence, then a refusal that is in no log",
                vec![(silence(), true, false), (refused(Code::Exists), true, false)],
                vec![true, true],
                unknown,
            ),
            ("somewhere else", vec![(refused(Code::NotLeader), true, false)], vec![true], |e| {
                is_code(e, Code::NotLeader)
            }),
            ("the log does not say", vec![(refused(Code::OutcomeUnknown), true, false)], vec![true], unknown),
            (
                "a tag that is too old is drawn again, and not for ever",
                (0..=RENEWALS_MAX).map(|_| (refused(Code::ExpiredUnknown), true, true)).collect(),
                (0..=RENEWALS_MAX).map(|n| n < RENEWALS_MAX).collect(),
                unknown,
            ),
            (
                "silence, then a tag that is too old",
                vec![(silence(), true, false), (refused(Code::ExpiredUnknown), true, true)],
                vec![true, false],
                unknown,
            ),
        ];
        for (what, heard, again, is_told) in table {
            let mut asked = Asked::new(true);
            let mut last = None;
            for ((error, was_sent, is_logged), again) in heard.into_iter().zip(again) {
                let verdict = asked.failed(Attempt { was_sent, is_logged, ..attempt(&error) });
                assert_eq!(verdict.again, again, "{what}: {error}");
                last = Some((error, is_logged));
            }
            let (error, is_logged) = last.expect("attempts");
            let (told, _) = asked.told(error, is_logged);
            assert!(is_told(&told), "{what}: {told:?}");
        }
    }

    #[test]
    fn a_read_is_never_unknown() {
        for error in [silence(), nobody(), refused(Code::OutcomeUnknown), refused(Code::NoSpace)] {
            let mut asked = Asked::new(false);
            asked.failed(attempt(&error));
            let (told, _) = asked.told(error.clone(), false);
            assert!(!matches!(told, ClientError::Unknown(_) | ClientError::Declined(_)), "{error}: {told}");
        }
    }

    #[test]
    fn only_a_tag_that_was_never_used_is_drawn_again() {
        let expired = refused(Code::ExpiredUnknown);
        fn logged(error: &ClientError) -> Attempt<'_> {
            Attempt { is_logged: true, ..attempt(error) }
        }
        let mut asked = Asked::new(true);
        let verdict = asked.failed(logged(&expired));
        assert!(verdict.renew && verdict.again && !verdict.look_again && verdict.note.is_some());
        let silent = silence();
        asked.failed(logged(&silent));
        assert!(!asked.failed(logged(&expired)).renew, "the silent attempt may have had an effect");
        for code in [Code::Exists, Code::NotLeader, Code::Busy] {
            assert!(!Asked::new(true).failed(logged(&refused(code))).renew, "{code:?}");
        }
        // What was not sent had no effect, whatever was answered.
        let mut asked = Asked::new(true);
        let unknown = refused(Code::OutcomeUnknown);
        asked.failed(Attempt { was_sent: false, ..attempt(&unknown) });
        assert!(!asked.maybe_done);
    }

    /// Whether a tag is drawn anew when it is called too old so long after a first attempt that was refused for its time.
    fn is_renewed_after(since_first: Duration) -> bool {
        let (ahead, expired) = (refused(Code::ClockAhead), refused(Code::ExpiredUnknown));
        let mut asked = Asked::new(true);
        let (first, second) = (Duration::from_secs(77), Duration::from_secs(78));
        asked.sent(first);
        assert!(asked.failed(Attempt { now: second, ..attempt(&ahead) }).again);
        asked.sent(second);
        asked.failed(Attempt { is_logged: true, now: first + since_first, ..attempt(&expired) }).renew
    }

    #[test]
    fn a_tag_whose_copies_may_be_forgotten_is_not_drawn_again() {
        assert!(is_renewed_after(Duration::from_secs(30 * 60)));
        assert!(!is_renewed_after(Duration::from_secs(30 * 60 + 1)));
    }

    #[test]
    fn planted_bugs_are_found() {
        mutants::plant(Some(Mutant::RenewedHoweverLate));
        let is_renewed = is_renewed_after(Duration::from_secs(60 * 60));
        let is_planted = mutants::planted().is_some();
        mutants::plant(None);
        assert_eq!(is_planted, is_renewed);
    }

    #[test]
    fn who_has_stopped_is_turned_from_where_there_are_others() {
        let stopped = refused(Code::ReplicaFault);
        for has_others in [false, true] {
            let verdict = Asked::new(false).failed(Attempt { has_others, ..attempt(&stopped) });
            assert_eq!((verdict.again, verdict.look_again), (has_others, has_others));
        }
    }

    #[test]
    fn whoever_may_have_moved_is_looked_for() {
        let looks = |error: ClientError| Asked::new(true).failed(attempt(&error)).look_again;
        for code in [Code::WrongShard, Code::NotLeader, Code::NotReady, Code::OutcomeUnknown] {
            assert!(looks(refused(code)), "{code:?}");
        }
        assert!(looks(silence()) && looks(nobody()));
        for is_logged in [false, true] {
            let error = refused(Code::StaleIncarnation);
            let verdict = Asked::new(true).failed(Attempt { is_logged, ..attempt(&error) });
            let expected = !is_logged;
            assert_eq!((verdict.again, verdict.look_again), (expected, expected), "logged: {is_logged}");
        }
        assert!(!looks(refused(Code::Exists)) && !looks(refused(Code::Busy)));
    }
}
