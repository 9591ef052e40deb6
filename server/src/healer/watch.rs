//! Disks that do not answer, as the registry's leader sees them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use clutch_client::ClientError;
use clutch_client_maintenance::heal;
use clutch_log::LogId;
use clutch_proto::{
    admin::AwayDisk,
    mutants::{self, Mutant},
    registry::{SetServiceFlags, registry_request::Op},
};
use clutch_shard::{FLAG_CONDEMNED, FLAG_DRAIN, FLAG_GONE, FLAG_NO_WRITE, FLAG_STAYS_NO_WRITE};

use super::{ANSWERS_WITHIN, Healer};

/// A disk that is condemned must answer for so many looks before it is used again.
const BACK_AFTER_LOOKS: u32 = 3;

/// The flags of a disk that is condemned.
fn condemned(flags: u32) -> u32 {
    let stays = if flags & FLAG_NO_WRITE != 0 { FLAG_STAYS_NO_WRITE } else { 0 };
    flags | FLAG_CONDEMNED | FLAG_DRAIN | FLAG_NO_WRITE | stays
}

/// The same when it is back.
fn used_again(flags: u32) -> u32 {
    let stays = if flags & FLAG_STAYS_NO_WRITE != 0 { FLAG_NO_WRITE } else { 0 };
    flags & !(FLAG_CONDEMNED | FLAG_DRAIN | FLAG_NO_WRITE | FLAG_STAYS_NO_WRITE) | stays
}

/// What has been seen of disks.
#[derive(Default)]
struct Seen {
    /// Since when they do not answer, by the monotonic clock.
    away: BTreeMap<u64, Duration>,
    /// For how many looks those that are condemned have answered.
    back: BTreeMap<u64, u32>,
    /// Those that were condemned when it was looked last.
    condemned: BTreeSet<u64>,
}

impl Seen {
    /// Takes note of a look at all disks with their flags, of which these do not answer. Which get other flags; those that have been away
    /// for so long are condemned, unless that is zero.
    fn look(
        &mut self,
        flags: &BTreeMap<u64, u32>,
        away: &BTreeSet<u64>,
        now: Duration,
        after: Duration,
    ) -> Vec<(u64, u32)> {
        let is_condemned = |id: &u64| flags.get(id).is_some_and(|flags| flags & FLAG_CONDEMNED != 0);
        // An operator who has taken that back had a reason: the disk gets its time anew.
        for id in self.condemned.iter().filter(|id| !is_condemned(id)) {
            self.away.remove(id);
        }
        self.condemned = flags.keys().copied().filter(is_condemned).collect();
        self.away.retain(|id, _| away.contains(id));
        self.back.retain(|id, _| !away.contains(id) && self.condemned.contains(id));
        let in_use = flags.values().filter(|flags| *flags & FLAG_GONE == 0).count();
        // Where most are away it is rather this node that is, and there is nowhere to go with what they have.
        let may_condemn = !after.is_zero() && away.len() * 2 <= in_use;
        let mut news = Vec::new();
        for (id, flags) in flags.iter().filter(|(_, flags)| *flags & FLAG_GONE == 0) {
            if away.contains(id) {
                let since = *self.away.entry(*id).or_insert(now);
                if may_condemn && flags & FLAG_DRAIN == 0 && now.saturating_sub(since) >= after {
                    news.push((*id, condemned(*flags)));
                    self.condemned.insert(*id);
                }
            } else if flags & FLAG_CONDEMNED != 0 {
                let looks = self.back.entry(*id).or_default();
                *looks += 1;
                if *looks >= BACK_AFTER_LOOKS && !mutants::is(Mutant::CondemnedForGood) {
                    news.push((*id, used_again(*flags)));
                }
            }
        }
        news
    }
}

impl Healer {
    /// Watches all disks while the registry is led here.
    pub(super) async fn watch_disks(&self) {
        let mut seen = Seen::default();
        while self.goes_on().await {
            if self.leads(|id| id == LogId::REGISTRY).is_empty() {
                // Who comes to lead it begins to watch then.
                seen = Seen::default();
                self.board.heal(|told| told.away.clear());
                continue;
            }
            if let Err(error) = self.look_at_disks(&mut seen).await {
                tracing::debug!(%error, "disks are not watched for now");
            }
        }
    }

    async fn look_at_disks(&self, seen: &mut Seen) -> Result<(), ClientError> {
        let map = self.client.refresh_map().await?;
        let away = heal::unavailable(&self.client.with_patience(ANSWERS_WITHIN), &map).await;
        let before: BTreeMap<u64, u32> =
            map.services.iter().map(|service| (service.service_id, service.flags)).collect();
        let now = self.client.runtime().clock.monotonic();
        let after = self.settings.rebuild_after;
        let news = seen.look(&before, &away.keys().copied().collect(), now, after);
        let told = away.iter().map(|(id, why)| AwayDisk {
            service_id: *id,
            for_s: seen.away.get(id).map_or(0, |since| now.saturating_sub(*since).as_secs()),
            why: why.clone(),
            rebuild_after_s: after.as_secs(),
        });
        let told = told.collect();
        self.board.heal(|healing| healing.away = told);
        if news.is_empty() {
            return Ok(());
        }
        // What an operator has said while the disks were asked counts.
        let now_is = self.client.refresh_map().await?;
        for (service_id, flags) in news {
            let service = format!("{service_id:016x}");
            let known = now_is.services.iter().find(|known| known.service_id == service_id);
            if known.map(|known| known.flags) != before.get(&service_id).copied() {
                continue;
            }
            self.client.registry(Op::SetServiceFlags(SetServiceFlags { service_id, flags })).await?;
            match away.get(&service_id) {
                Some(why) => {
                    self.client.runtime().note("heal: a disk is condemned");
                    tracing::error!(%service, why, "a disk has not answered for too long; what it held is written elsewhere");
                }
                None => {
                    self.client.runtime().note("heal: a condemned disk is back");
                    tracing::warn!(%service, "a disk that was condemned is back; all that is left of it is read, and it is used again");
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONDEMNED: u32 = FLAG_CONDEMNED | FLAG_DRAIN | FLAG_NO_WRITE;
    const AFTER: Duration = Duration::from_secs(60);

    /// What becomes of four disks in looks at these seconds, with those away.
    fn looks(
        seen: &mut Seen,
        flags: &mut BTreeMap<u64, u32>,
        times: impl IntoIterator<Item = (u64, &'static [u64])>,
    ) {
        for (at, away) in times {
            let away = away.iter().copied().collect();
            flags.extend(seen.look(flags, &away, Duration::from_secs(at), AFTER));
        }
    }

    fn disks() -> BTreeMap<u64, u32> {
        (1..=4).map(|id| (id, 0)).collect()
    }

    #[test]
    fn a_disk_is_condemned_when_it_has_been_away_without_a_break_and_used_when_it_is_back() {
        let (mut seen, mut flags) = (Seen::default(), disks());
        looks(&mut seen, &mut flags, [(0, &[2][..]), (59, &[2]), (60, &[]), (61, &[2]), (120, &[2])]);
        assert_eq!(flags[&2], 0, "it was back in between");
        looks(&mut seen, &mut flags, [(121, &[2][..])]);
        assert_eq!(flags[&2], CONDEMNED);
        looks(&mut seen, &mut flags, [(130, &[][..]), (135, &[]), (140, &[2]), (145, &[]), (150, &[])]);
        assert_eq!(flags[&2], CONDEMNED, "three looks one behind the other");
        looks(&mut seen, &mut flags, [(155, &[][..])]);
        assert_eq!(flags, disks());
    }

    #[test]
    fn what_took_no_blocks_before_takes_none_after() {
        for flags in [0, FLAG_NO_WRITE] {
            assert_eq!(used_again(condemned(flags)), flags);
            assert_eq!(condemned(flags) & CONDEMNED, CONDEMNED);
        }
    }

    #[test]
    fn what_an_operator_says_stays_and_most_disks_are_not_condemned() {
        let (mut seen, mut flags) = (Seen::default(), disks());
        flags.extend([(1, FLAG_DRAIN | FLAG_NO_WRITE), (3, FLAG_GONE)]);
        let before = flags.clone();
        looks(&mut seen, &mut flags, [(0, &[1, 2][..]), (100, &[1, 2])]);
        assert_eq!(flags, before, "two of three are away");
        looks(&mut seen, &mut flags, [(200, &[1][..]), (300, &[1]), (400, &[])]);
        assert_eq!(flags, before, "it was to be emptied before");
        looks(&mut seen, &mut flags, [(500, &[2][..]), (560, &[2])]);
        assert_eq!(flags[&2], CONDEMNED);
        // Taken back while it is still away: it gets its time anew.
        flags.insert(2, 0);
        looks(&mut seen, &mut flags, [(565, &[2][..]), (600, &[2])]);
        assert_eq!(flags[&2], 0);
        looks(&mut seen, &mut flags, [(625, &[2][..])]);
        assert_eq!(flags[&2], CONDEMNED);
        let never = seen.look(&disks(), &[4].into(), Duration::from_secs(10_000), Duration::ZERO);
        assert_eq!(never, []);
    }
}
