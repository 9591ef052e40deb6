//! The hybrid logical clock of a node: the wall clock as far as it can be believed, pulled forward by every message it sees.
//!
//! A wall clock jumps: a wrong hardware clock, a correction after it, an operator's hand. What is stamped goes into logs
//! for good, and deadlines and ages are counted by it, so the wall clock is followed at a bounded rate: time moves on with
//! a steady clock, at most [`ELASTIC`] plus a sixteenth of the time that passed away from it. A small correction is
//! followed at once out of what was saved up. A jump takes nothing of that: it is followed by a sixteenth of the time that
//! the machine is awake, and not ahead while the others refuse what is stamped here.
//!
//! Invariants: [`HybridClock::stamp`] is above every time observed before it, so a cut of all logs at a time
//! is causally closed. A sender too far ahead is refused instead of observed (Kulkarni et al., 2014). Nothing waits for a
//! clock that is behind: time goes on at the steady clock's pace.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use clutch_proto::{
    Refusal, Time,
    limits::CLOCK_AHEAD_MS_MAX,
    mutants::{self, Mutant},
    types::Code,
};
use parking_lot::Mutex;

use crate::Clock;

/// How far time may follow a step of the wall clock at once.
pub const ELASTIC: Duration = Duration::from_millis(500);
/// Time follows the wall clock by this part of the time that passes.
pub const SLEW: u64 = 16;
/// A wall clock that is further than this from what is known of the time is not followed when a node starts. Less than a
/// peer bears, since a node that starts ahead of the others would be refused by all of them.
pub const START_SLACK: Duration = Duration::from_millis(250);
/// The same where nothing is known of how long the node was down.
pub const DOWN_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Who was refused as too far ahead does not follow its wall clock ahead for so long.
pub const REFUSED_FOR: Duration = Duration::from_secs(60);

/// Shared by everything on a node.
pub struct HybridClock {
    clock: Arc<dyn Clock>,
    highest: AtomicU64,
    pace: Mutex<Pace>,
}

/// How time goes on.
struct Pace {
    /// The time when it was looked at last, and the steady clock then.
    time: u64,
    steady: Duration,
    /// The clock that stands still while the machine sleeps, then.
    awake: Duration,
    /// Nanoseconds by which time may leave the steady clock's pace now.
    room: u64,
    /// Until when, by the steady clock, the wall clock is not followed ahead.
    refused_until: Duration,
    /// Whether the wall clock counts at all; else only what others say, and the steady clock.
    follows_wall: bool,
    /// Whether anybody who knows has said what time it is.
    is_set: bool,
    /// Nanoseconds that the wall clock is ahead of this.
    wall_ahead: i64,
    /// The latest that was heard, and nanoseconds by which this was ahead of it then and still is: whoever was ahead of the
    /// others for a while comes back by himself, and so must who followed him.
    heard: u64,
    excess: u64,
}

/// What was made of the wall clock at a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// It is as it should be.
    Followed,
    /// It is behind the logs; time goes on from where they ended.
    Behind(Duration),
    /// It is further ahead than the node can have been down; time goes on from where the logs ended.
    Ahead(Duration),
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl HybridClock {
    /// A clock that follows the wall clock and has observed nothing yet.
    pub fn new(clock: Arc<dyn Clock>) -> HybridClock {
        let pace = Pace {
            time: clock.now().0,
            steady: clock.steady(),
            awake: clock.monotonic(),
            room: nanos(ELASTIC),
            refused_until: Duration::ZERO,
            follows_wall: true,
            is_set: true,
            wall_ahead: 0,
            heard: 0,
            excess: 0,
        };
        HybridClock { clock, highest: AtomicU64::new(0), pace: Mutex::new(pace) }
    }

    /// A clock that goes by what others say: for clients, and for nodes without logs. Until it has heard something it shows
    /// the wall clock.
    pub fn following(clock: Arc<dyn Clock>) -> HybridClock {
        let this = HybridClock::new(clock);
        {
            let mut pace = this.pace.lock();
            (pace.follows_wall, pace.is_set) = (false, false);
        }
        this
    }

    /// Begins where the node's logs ended. `down` is how long ago that was, where it is known by a clock that nobody sets;
    /// with `accept` the wall clock is believed if it is ahead.
    pub fn begin(&self, last: Time, down: Option<Duration>, accept: bool) -> Start {
        let wall = self.clock.now().0;
        let known = last.0.saturating_add(nanos(down.unwrap_or(Duration::ZERO)));
        let slack = nanos(if down.is_some() { START_SLACK } else { DOWN_MAX });
        // What is known without the wall clock. Without a clock that nobody sets the logs' end is a lower bound only.
        let sure = down.is_some() && !accept;
        let floor = if sure { known.saturating_sub(slack).max(last.0) } else { last.0 };
        let (time, start) = if known == 0 {
            (wall, Start::Followed)
        } else if wall < floor {
            let time = if sure { known } else { last.0 };
            (time, Start::Behind(Duration::from_nanos(time - wall)))
        } else if wall <= known.saturating_add(slack) || accept || mutants::is(Mutant::JumpBelieved) {
            (wall, Start::Followed)
        } else {
            (known, Start::Ahead(Duration::from_nanos(wall - known)))
        };
        let mut pace = self.pace.lock();
        (pace.time, pace.steady, pace.room) = (time, self.clock.steady(), 0);
        (pace.follows_wall, pace.is_set) = (true, true);
        drop(pace);
        self.advance(last);
        start
    }

    /// The time as far as it is known: never below what was observed.
    pub fn now(&self) -> Time {
        Time(self.paced().max(self.highest().0))
    }

    /// The same, but for what was observed.
    fn paced(&self) -> u64 {
        let mut pace = self.pace.lock();
        let (steady, wall) = (self.clock.steady(), self.clock.now().0);
        if !pace.is_set {
            return wall;
        }
        let passed = nanos(steady.saturating_sub(pace.steady));
        pace.steady = pace.steady.max(steady);
        pace.room = pace.room.saturating_add(passed / SLEW).min(nanos(ELASTIC));
        let awake = self.clock.monotonic();
        let was_awake = nanos(awake.saturating_sub(pace.awake)).min(passed);
        pace.awake = pace.awake.max(awake);
        let expected = pace.time.saturating_add(passed);
        let time;
        if !pace.follows_wall {
            // Never below what was heard last and the time since.
            let step = pace.excess.min(passed / SLEW);
            pace.excess -= step;
            time = expected - step;
        } else if wall > expected {
            let ahead = wall - expected;
            let is_jump = ahead > nanos(ELASTIC) && !mutants::is(Mutant::JumpSavedUp);
            let step = if mutants::is(Mutant::JumpBelieved) {
                ahead
            } else if steady < pace.refused_until {
                0
            } else if is_jump {
                (was_awake / SLEW).min(pace.room)
            } else {
                ahead.min(pace.room)
            };
            pace.room = pace.room.saturating_sub(step);
            time = expected + step;
        } else {
            // Slower, but never back.
            let step = (expected - wall).min(pace.room).min(passed);
            pace.room -= step;
            time = expected - step;
        }
        assert!(time >= pace.time, "time goes on: {time} after {}", pace.time);
        pace.time = time;
        pace.wall_ahead = i64::try_from(i128::from(wall) - i128::from(time)).unwrap_or(i64::MAX);
        time
    }

    /// Takes note that a peer has refused what was stamped here, as too far ahead of its own clock. Whichever of the two is right,
    /// what is stamped here does no good while it is: the wall clock leads no further ahead for [`REFUSED_FOR`].
    pub fn refused(&self) {
        if !mutants::is(Mutant::RefusedGoesOn) {
            self.pace.lock().refused_until = self.clock.steady().saturating_add(REFUSED_FOR);
        }
    }

    /// Takes over what somebody says now who knows the cluster's time: its servers' answers.
    pub fn hear(&self, time: Time) {
        self.raise(time);
        let now = self.paced();
        let mut pace = self.pace.lock();
        // What is older says nothing of the present.
        if time.0 > pace.heard {
            pace.heard = time.0;
            pace.excess = now.saturating_sub(time.0);
        }
        if mutants::is(Mutant::FollowerStaysAhead) {
            pace.excess = 0;
        }
    }

    /// Takes note of what an answer says, whichever kind of clock this is: one that follows others hears it, one that has a wall
    /// clock of its own refuses what is too far ahead of it.
    ///
    /// # Errors
    /// [`Code::ClockAhead`], of a clock with a wall clock of its own: the time is not taken over then.
    pub fn learn(&self, time: Time) -> Result<(), Refusal> {
        if time == Time(0) {
            return Ok(());
        }
        let follows_wall = self.pace.lock().follows_wall;
        if follows_wall {
            return self.observe(time);
        }
        self.hear(time);
        Ok(())
    }

    /// Takes over a time at which something was signed by who knows the cluster's time. It may be long ago, so it sets no clock
    /// that nobody has set: only what is said now does.
    pub fn hear_signed(&self, time: Time) {
        match self.is_set() || mutants::is(Mutant::SignedLongAgoBelieved) {
            true => self.raise(time),
            false => self.advance(time),
        }
    }

    fn raise(&self, time: Time) {
        {
            let mut pace = self.pace.lock();
            if !pace.is_set {
                (pace.time, pace.steady, pace.is_set) = (time.0, self.clock.steady(), true);
            }
        }
        if time.0 > self.paced() {
            let mut pace = self.pace.lock();
            if time.0 > pace.time {
                pace.time = time.0;
                pace.excess = 0;
            }
        }
        self.advance(time);
    }

    /// Whether anybody who knows has said what time it is.
    pub fn is_set(&self) -> bool {
        self.pace.lock().is_set
    }

    /// How far the wall clock is ahead of this one, in milliseconds; negative when it is behind.
    pub fn wall_ahead_ms(&self) -> i64 {
        self.paced();
        self.pace.lock().wall_ahead / 1_000_000
    }

    /// What others may be told of the time; 0 where nobody has said what it is, which tells them nothing.
    pub fn told(&self) -> Time {
        if self.is_set() || mutants::is(Mutant::UnknownTimeTold) { self.now() } else { Time(0) }
    }

    /// Takes note of a peer's time; refuses one more than 500 ms ahead of what is known here. Where nothing is known it is neither
    /// believed nor refused.
    pub fn observe(&self, incoming: Time) -> Result<(), Refusal> {
        if incoming <= self.highest() {
            // Seen before, so it cannot pull this clock further; the wall clock may have been set back meanwhile.
            return Ok(());
        }
        // A clock that was put right is followed slowly, and its wall clock vouches for a peer that is right, where that counts.
        // What was only heard does not: each peer could add a little to what the last one said, without end.
        let (follows_wall, is_set) = {
            let pace = self.pace.lock();
            (pace.follows_wall, pace.is_set)
        };
        let now = match follows_wall || mutants::is(Mutant::WallVouchesForAll) {
            true => Time(self.clock.now().0.max(self.paced())),
            false if is_set => Time(self.paced()),
            false => return Ok(()),
        };
        if incoming > now.plus_ms(CLOCK_AHEAD_MS_MAX) {
            let ahead_ms = (incoming.0 - now.0) / 1_000_000;
            return Err(Refusal::new(
                Code::ClockAhead,
                format!(
                    "the sender's time is {ahead_ms} ms ahead of this node's clock; synchronise the clocks"
                ),
            ));
        }
        self.highest.fetch_max(incoming.0, Ordering::Relaxed);
        Ok(())
    }

    /// Takes note of a time that this node's own logs have fixed already.
    pub fn advance(&self, own: Time) {
        self.highest.fetch_max(own.0, Ordering::Relaxed);
    }

    /// A time above everything observed, at or above [`HybridClock::now`] before.
    pub fn stamp(&self) -> Time {
        let now = self.paced();
        let before = self
            .highest
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |h| Some(now.max(h.saturating_add(1))))
            .unwrap_or_else(|h| h);
        let stamp = Time(now.max(before.saturating_add(1)));
        assert!(stamp.0 > before || before == u64::MAX, "a stamp is above all that was seen");
        stamp
    }

    /// The highest time seen.
    pub fn highest(&self) -> Time {
        Time(self.highest.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BoxFuture;

    /// A clock whose hands the test moves: wall and steady, in milliseconds.
    #[derive(Default)]
    struct Hands(Mutex<(u64, u64)>);

    impl Hands {
        fn pass(&self, ms: u64) {
            let mut hands = self.0.lock();
            *hands = (hands.0 + ms, hands.1 + ms);
        }

        fn step(&self, ms: i64) {
            let mut hands = self.0.lock();
            hands.0 = hands.0.saturating_add_signed(ms);
        }
    }

    impl Clock for Hands {
        fn now(&self) -> Time {
            Time(self.0.lock().0 * 1_000_000)
        }

        fn monotonic(&self) -> Duration {
            self.steady()
        }

        fn steady(&self) -> Duration {
            Duration::from_millis(self.0.lock().1)
        }

        fn sleep(&self, _duration: Duration) -> BoxFuture<()> {
            Box::pin(std::future::pending())
        }
    }

    const DAY_MS: u64 = 86_400_000;

    fn clock() -> (Arc<Hands>, HybridClock) {
        let hands = Arc::new(Hands(Mutex::new((100 * DAY_MS, 5))));
        (hands.clone(), HybridClock::new(hands))
    }

    fn ms(time: Time) -> u64 {
        time.0 / 1_000_000
    }

    #[test]
    fn small_steps_are_followed_and_large_ones_are_not() {
        for step in [-(400 * DAY_MS as i64), -7_200_000, -30_000, 30_000, 7_200_000, 365 * DAY_MS as i64] {
            let (hands, clock) = clock();
            let before = ms(clock.stamp());
            hands.step(step);
            hands.pass(5000);
            let after = ms(clock.stamp());
            let moved = after - before;
            assert!((5000 - 813..=5000 + 813).contains(&moved), "a step of {step} ms: {moved} ms in 5 s");
            hands.step(-step);
            hands.pass(20_000);
            let again = ms(clock.stamp());
            assert!(again.abs_diff(before + 25_000) <= 1000, "{step}: {again} after {before}");
        }
        let (hands, clock) = clock();
        let before = ms(clock.now());
        hands.step(300);
        assert_eq!(ms(clock.now()), before + 300, "a correction of 300 ms is followed at once");
    }

    #[test]
    fn a_jump_is_caught_up_with_slowly_and_time_never_goes_back() {
        let (hands, clock) = clock();
        let start = ms(clock.now());
        hands.step(60_000);
        let mut last = Time(0);
        for _ in 0..1000 {
            hands.pass(1000);
            let now = clock.stamp();
            assert!(now > last);
            last = now;
        }
        assert_eq!(ms(last), start + 1_060_000, "after a thousand seconds it is where the wall clock is");
        hands.step(-60_000);
        for _ in 0..1000 {
            hands.pass(1000);
            let now = clock.stamp();
            assert!(now > last);
            last = now;
        }
        assert!(ms(last).abs_diff(start + 2_000_000) <= 1, "{}", ms(last));
    }

    #[test]
    fn a_start_believes_what_can_be_true() {
        let last = Time((100 * DAY_MS - 3_600_000) * 1_000_000);
        let hour = Some(Duration::from_secs(3600));
        let cases = [
            (0, hour, false, Start::Followed, 0i64),
            (7_200_000, hour, false, Start::Ahead(Duration::from_secs(7200)), 0),
            (7_200_000, hour, true, Start::Followed, 7_200_000),
            (7_200_000, None, false, Start::Followed, 7_200_000),
            (
                2 * DAY_MS as i64,
                None,
                false,
                Start::Ahead(Duration::from_secs(2 * 86_400 + 3600)),
                -3_600_000,
            ),
            (-7_200_000, hour, false, Start::Behind(Duration::from_secs(7200)), 0),
            (-1_800_000, hour, false, Start::Behind(Duration::from_secs(1800)), 0),
            (-1_800_000, hour, true, Start::Followed, -1_800_000),
            (-7_200_000, None, false, Start::Behind(Duration::from_secs(3600)), -3_600_000),
            (-1_800_000, None, false, Start::Followed, -1_800_000),
        ];
        for (step, down, accept, expected, offset) in cases {
            let (hands, clock) = clock();
            hands.step(step);
            assert_eq!(clock.begin(last, down, accept), expected, "a step of {step} ms");
            assert_eq!(ms(clock.now()) as i64, 100 * DAY_MS as i64 + offset, "a step of {step} ms");
            let before = ms(clock.stamp());
            hands.pass(1600);
            assert!((1000..=2200).contains(&(ms(clock.stamp()) - before)), "time goes on");
        }
    }

    /// A follower and its hands, twenty seconds after whom it followed was half a second ahead for a moment.
    fn after_a_detour() -> (Arc<Hands>, HybridClock) {
        let hands = Arc::new(Hands::default());
        hands.pass(1_000_000);
        let clock = HybridClock::following(hands.clone());
        clock.hear(Time(1_000_500 * 1_000_000));
        for second in 1..=20 {
            let before = clock.now();
            hands.pass(1000);
            clock.hear(Time((1_000_000 + second * 1000) * 1_000_000));
            assert!(clock.now() >= before, "never back");
        }
        (hands, clock)
    }

    /// By how many nanoseconds it is ahead then.
    fn still_ahead(clock: &HybridClock) -> u64 {
        clock.now().0 - 1_020_000 * 1_000_000
    }

    #[test]
    fn planted_bugs_are_found() {
        mutants::plant(Some(Mutant::FollowerStaysAhead));
        let ahead = still_ahead(&after_a_detour().1);
        let (is_planted, is_right) = (mutants::planted().is_some(), ahead < 1_000_000);
        mutants::plant(None);
        assert_ne!(is_planted, is_right);
    }

    #[test]
    fn a_follower_comes_back_with_whom_it_followed() {
        let (hands, clock) = after_a_detour();
        let ahead = still_ahead(&clock);
        assert!(ahead < 1_000_000, "{ahead} ns ahead");
        // What is old does not hold it back, and in silence it goes on at its pace.
        clock.hear(Time(1_000_000 * 1_000_000));
        hands.pass(60_000);
        assert!(clock.now().0 >= 1_080_000 * 1_000_000);
    }

    #[test]
    fn an_answer_leads_who_follows_and_not_who_has_a_wall_clock() {
        let hands = Arc::new(Hands(Mutex::new((100 * DAY_MS, 5))));
        let answers = Time(101 * DAY_MS * 1_000_000);
        let follower = HybridClock::following(hands.clone());
        follower.learn(answers).expect("who knows says so");
        assert_eq!(follower.now(), answers);
        let own = HybridClock::new(hands.clone());
        assert_eq!(own.learn(answers).map_err(|refusal| refusal.code), Err(Code::ClockAhead));
        assert_eq!(ms(own.now()), 100 * DAY_MS, "it is not led a day ahead");
        // What is a little ahead counts, so that what is stamped next comes behind it.
        let little = Time((100 * DAY_MS + CLOCK_AHEAD_MS_MAX) * 1_000_000);
        own.learn(little).expect("within what clocks may differ");
        assert!(own.stamp() > little);
    }

    #[test]
    fn who_follows_others_does_not_look_at_the_wall() {
        let hands = Arc::new(Hands(Mutex::new((100 * DAY_MS, 5))));
        let clock = HybridClock::following(hands.clone());
        assert!(!clock.is_set());
        // What was signed may have been signed long ago.
        clock.hear_signed(Time(69 * DAY_MS * 1_000_000));
        assert!(!clock.is_set());
        assert_eq!(clock.told(), Time(0));
        clock.learn(Time(0)).expect("says nothing");
        assert!(!clock.is_set());
        // Nothing is known that could refuse it, or vouch for it.
        let ahead = Time(100 * DAY_MS * 1_000_000);
        clock.observe(ahead).expect("is not refused");
        clock.hear(Time(70 * DAY_MS * 1_000_000));
        assert_eq!((clock.told(), clock.observe(ahead).is_ok()), (clock.now(), false));
        assert_eq!(ms(clock.now()), 70 * DAY_MS);
        hands.step(5 * DAY_MS as i64);
        hands.pass(60_000);
        assert_eq!(ms(clock.now()), 70 * DAY_MS + 60_000);
        clock.hear(Time((70 * DAY_MS + 90_000) * 1_000_000));
        hands.pass(1000);
        assert_eq!(ms(clock.now()), 70 * DAY_MS + 91_000);
    }

    #[test]
    fn peers_that_are_too_far_ahead_are_refused_unless_the_wall_vouches_for_them() {
        let (hands, clock) = clock();
        let ahead = |ms: u64| clock.now().plus_ms(ms);
        assert!(clock.observe(ahead(400)).is_ok());
        assert_eq!(clock.observe(ahead(2000)).expect_err("refused").code, Code::ClockAhead);
        // Nor little by little.
        let pushed = (0..100).take_while(|_| clock.observe(clock.now().plus_ms(400)).is_ok()).count();
        assert!(pushed <= 1, "{pushed} steps");
        hands.step(2000);
        assert!(clock.observe(ahead(1900)).is_ok());
    }
}
