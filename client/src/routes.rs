//! Where everything is, as far as a client has heard: the cluster's map, and what nodes have said since it was read.
//!
//! Invariants: a map that was read earlier never replaces one that was read later; whose services were left out because they are
//! known has those that are known.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use clutch_proto::{
    mutants::{self, Mutant},
    registry::Map,
};
use clutch_runtime::Endpoint;

use crate::rpc::{LogKey, lock};

/// What was heard, shared by all requests of a client.
#[derive(Default)]
pub(crate) struct Routes(Mutex<Heard>);

#[derive(Default)]
struct Heard {
    map: Option<Arc<Map>>,
    /// Whether the map is believed.
    is_fresh: bool,
    /// The registry's log where the map was read.
    position: u64,
    /// Counts what happens here.
    moment: u64,
    /// The moment the map was stored.
    stored: u64,
    /// Who is asked instead of whom the map says: who was said to lead, or the next member after one that was silent.
    leaders: BTreeMap<LogKey, Endpoint>,
    /// Which member reads are asked of.
    readers: BTreeMap<LogKey, Endpoint>,
}

/// A map is being read.
pub(crate) struct Reading {
    began: u64,
    /// The version of the services that need not be sent; 0 for none.
    pub(crate) services_version: u64,
}

impl Routes {
    /// The map, if it is believed.
    pub(crate) fn map(&self) -> Option<Arc<Map>> {
        let heard = lock(&self.0);
        heard.map.clone().filter(|_| heard.is_fresh)
    }

    /// The cluster, once it is known.
    pub(crate) fn cluster(&self) -> u64 {
        lock(&self.0).map.as_ref().map_or(0, |map| map.cluster)
    }

    /// Begins to read the map: all of it, or what may have changed.
    pub(crate) fn begin_reading(&self, is_whole: bool) -> Reading {
        let mut heard = lock(&self.0);
        heard.moment += 1;
        let known = heard.map.as_ref().filter(|_| !is_whole);
        Reading { began: heard.moment, services_version: known.map_or(0, |map| map.services_version) }
    }

    /// A map was read; returns the newest that is known. `None` when it cannot be completed and must be read whole.
    pub(crate) fn read(&self, reading: &Reading, mut map: Map, position: u64) -> Option<Arc<Map>> {
        let mut heard = lock(&self.0);
        heard.moment += 1;
        if let Some(known) = heard.map.clone() {
            // Which of two was read later is known where one began after the other was stored; else their positions say so.
            let is_older = position < heard.position && reading.began < heard.stored;
            if is_older && !mutants::is(Mutant::OlderMapStored) {
                return Some(known);
            }
            if reading.services_version != 0 && reading.services_version == map.services_version {
                // A log that ends earlier than it did was rewound, and its versions come again.
                if known.services_version != map.services_version || position < heard.position {
                    return None;
                }
                map.services = known.services.clone();
            }
        } else if reading.services_version != 0 {
            return None;
        }
        let map = Arc::new(map);
        (heard.stored, heard.position) = (heard.moment, position);
        heard.is_fresh = true;
        heard.map = Some(map.clone());
        heard.leaders.clear();
        Some(map)
    }

    /// The map is not believed any more.
    pub(crate) fn doubt(&self) {
        lock(&self.0).is_fresh = false;
    }

    /// Whom to ask for a log, instead of whom the map says.
    pub(crate) fn leader(&self, log: LogKey) -> Option<Endpoint> {
        lock(&self.0).leaders.get(&log).cloned()
    }

    /// A node said where a log is led; false where that is who was asked.
    pub(crate) fn lead(&self, log: LogKey, asked: &Endpoint, leader: &Endpoint) -> bool {
        if asked == leader {
            return false;
        }
        lock(&self.0).leaders.insert(log, leader.clone());
        true
    }

    /// Who was asked does not lead, or is silent: the next member is asked from now on, behind the last whom the map says. Where
    /// another request has turned away from it meanwhile, that stays: it may have found who leads.
    pub(crate) fn turn_from(&self, log: LogKey, asked: &Endpoint, members: &[Endpoint]) {
        let at = members.iter().position(|member| member == asked);
        let next = members.get(at.map_or(0, |at| at + 1)).cloned();
        let mut heard = lock(&self.0);
        if heard.leaders.get(&log).is_some_and(|now| now != asked) {
            return;
        }
        match next {
            Some(next) => drop(heard.leaders.insert(log, next)),
            None => drop(heard.leaders.remove(&log)),
        }
    }

    /// Which of a log's members reads are asked of; a first guess spreads clients over them.
    pub(crate) fn reader(&self, log: LogKey, guess: u64, members: &[Endpoint]) -> Option<Endpoint> {
        let mut heard = lock(&self.0);
        if let Some(reader) = heard.readers.get(&log).filter(|reader| members.contains(reader)) {
            return Some(reader.clone());
        }
        let first = members.get((guess % members.len().max(1) as u64) as usize)?;
        heard.readers.insert(log, first.clone());
        Some(first.clone())
    }

    /// A member did not answer a read: the next one is asked from now on, unless that is so already.
    pub(crate) fn turn_reader(&self, log: LogKey, asked: &Endpoint, members: &[Endpoint]) {
        let mut heard = lock(&self.0);
        if heard.readers.get(&log) == Some(asked) {
            let at = members.iter().position(|member| member == asked).map_or(0, |at| at + 1);
            let next = members.get(at).or(members.first()).cloned();
            next.map(|next| heard.readers.insert(log, next));
        }
    }
}

#[cfg(test)]
mod tests {
    use clutch_proto::types::BlockService;

    use super::*;

    fn map(version: u64, services: &[u64]) -> Map {
        let services = services.iter().map(|id| BlockService { service_id: *id, ..BlockService::default() });
        Map { services_version: version, services: services.collect(), ..Map::default() }
    }

    fn services(map: &Map) -> Vec<u64> {
        map.services.iter().map(|service| service.service_id).collect()
    }

    /// The version that is known behind two readings of which the earlier one comes late.
    fn after_a_late_reading(routes: &Routes) -> u64 {
        let (early, late) = (routes.begin_reading(true), routes.begin_reading(true));
        routes.read(&late, map(2, &[1, 2]), 20).expect("whole");
        routes.read(&early, map(1, &[1]), 10).expect("the newer one").services_version
    }

    #[test]
    fn planted_bugs_are_found() {
        mutants::plant(Some(Mutant::OlderMapStored));
        let version = after_a_late_reading(&Routes::default());
        let (is_planted, is_right) = (mutants::planted().is_some(), version == 2);
        mutants::plant(None);
        assert_ne!(is_planted, is_right);
    }

    #[test]
    fn an_older_map_that_comes_late_changes_nothing() {
        let routes = Routes::default();
        assert_eq!(after_a_late_reading(&routes), 2);
        assert_eq!(routes.map().map(|map| services(&map)), Some(vec![1, 2]));
        // Who begins anew is believed, however far the log was before: it was rewound.
        let anew = routes.begin_reading(true);
        assert_eq!(services(&routes.read(&anew, map(1, &[7]), 5).expect("whole")), [7]);
    }

    #[test]
    fn who_is_turned_from_late_does_not_hide_who_was_found_to_lead() {
        let (routes, log) = (Routes::default(), (1, 0));
        let members: Vec<Endpoint> = ["a", "b", "c"].into_iter().map(Endpoint::from).collect();
        // One request is told who leads while another still waits for the one that is silent.
        routes.turn_from(log, &members[0], &members);
        assert_eq!(routes.leader(log), Some("b".into()));
        assert!(routes.lead(log, &members[1], &members[2]));
        routes.turn_from(log, &members[0], &members);
        assert_eq!(routes.leader(log), Some("c".into()));
        routes.turn_from(log, &members[2], &members);
        assert_eq!(routes.leader(log), None, "behind the last whom the map says");
    }

    #[test]
    fn services_that_are_known_are_not_sent_again() {
        let routes = Routes::default();
        assert_eq!(routes.begin_reading(false).services_version, 0, "nothing is known");
        routes.read(&routes.begin_reading(false), map(3, &[1, 2]), 10).expect("whole");
        routes.doubt();
        assert!(routes.map().is_none());
        let reading = routes.begin_reading(false);
        assert_eq!(reading.services_version, 3);
        let completed = routes.read(&reading, map(3, &[]), 12).expect("completed");
        assert_eq!(services(&completed), [1, 2]);
        // Newer ones come whole, and an empty list of them is one.
        let emptied = routes.read(&routes.begin_reading(false), map(4, &[]), 13).expect("whole");
        assert!(services(&emptied).is_empty());
        let rewound = routes.begin_reading(false);
        assert!(routes.read(&rewound, map(4, &[]), 9).is_none(), "version 4 may be another one");
    }

    #[test]
    fn a_map_that_was_completed_by_services_that_are_gone_is_read_whole() {
        let routes = Routes::default();
        routes.read(&routes.begin_reading(true), map(3, &[1]), 10).expect("whole");
        let slow = routes.begin_reading(false);
        routes.read(&routes.begin_reading(true), map(4, &[2]), 11).expect("whole");
        assert!(routes.read(&slow, map(3, &[]), 12).is_none(), "version 3 is not known any more");
    }

    #[test]
    fn members_are_asked_in_turn_until_all_have_been() {
        let routes = Routes::default();
        let members: Vec<Endpoint> = ["a", "b", "c"].into_iter().map(Endpoint::from).collect();
        let log = (3, 1);
        routes.turn_from(log, &members[0], &members);
        assert_eq!(routes.leader(log), Some(members[1].clone()));
        routes.turn_from(log, &members[1], &members);
        assert_eq!(routes.leader(log), Some(members[2].clone()));
        routes.turn_from(log, &members[2], &members);
        assert_eq!(routes.leader(log), None, "all have been asked");
        // Several reads that failed at one member turn from it once.
        assert_eq!(routes.reader(log, 4, &members), Some(members[1].clone()));
        for _ in 0..3 {
            routes.turn_reader(log, &members[1], &members);
        }
        assert_eq!(routes.reader(log, 4, &members), Some(members[2].clone()));
        routes.turn_reader(log, &members[2], &members);
        assert_eq!(routes.reader(log, 4, &members), Some(members[0].clone()));
        // One that is no member any more is not asked.
        assert_eq!(routes.reader(log, 4, &members[1..]), Some(members[1].clone()));
        assert!(routes.lead(log, &members[0], &members[2]));
        assert_eq!(routes.leader(log), Some(members[2].clone()));
        assert!(!routes.lead(log, &members[2], &members[2]), "it says so of itself");
    }
}
