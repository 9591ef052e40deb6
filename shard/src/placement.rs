//! Where a span's blocks go: distinct services, and distinct failure domains while there are enough.

use std::collections::BTreeMap;

use clutch_proto::{
    mutants::{self, Mutant},
    shard::InitiateSpan,
    types::{BlockService, Code},
};
use clutch_state::Stop;

pub use clutch_proto::flags::{FLAG_CONDEMNED, FLAG_DRAIN, FLAG_GONE, FLAG_NO_WRITE, FLAG_STAYS_NO_WRITE};

/// Draws `count` services for blocks of `block_bytes`.
///
/// Each domain gives one service before any gives a second. Within that, services of the file's span before come
/// first, then those that win a draw against another by having more room.
pub(crate) fn place(
    services: &[BlockService],
    op: &InitiateSpan,
    count: usize,
    block_bytes: u32,
    earlier: &[u64],
    random: &mut dyn FnMut() -> u64,
) -> Result<Vec<u64>, Stop> {
    if services.is_empty() && !mutants::is(Mutant::ServicesUnknown) {
        return Err(Stop::refuse(
            Code::NotReady,
            "the shard does not know the block services yet; try again",
        ));
    }
    let fits = |s: &&BlockService| {
        s.storage_class == op.storage_class
            && s.flags & (FLAG_NO_WRITE | FLAG_GONE) == 0
            && s.available_bytes > u64::from(block_bytes)
            && !op.avoid_services.contains(&s.service_id)
            && !op.avoid_failure_domains.contains(&s.failure_domain)
    };
    let mut domains: BTreeMap<&str, Vec<Candidate>> = BTreeMap::new();
    for service in services.iter().filter(fits) {
        let candidate = Candidate {
            service: service.service_id,
            room: service.available_bytes,
            is_new: !earlier.contains(&service.service_id),
        };
        domains.entry(&service.failure_domain).or_default().push(candidate);
    }
    let usable: usize = domains.values().map(Vec::len).sum();
    if usable < count {
        return Err(Stop::refuse(
            Code::NoSpace,
            format!(
                "a span of {count} blocks needs {count} block services of storage class {} with room; {usable} of {} \
                 can be used (add disks, or choose a policy with fewer blocks or another class)",
                op.storage_class,
                services.len()
            ),
        ));
    }
    let mut domains: Vec<Vec<Candidate>> = domains.into_values().collect();
    for services in &mut domains {
        order(services, |c| *c, random);
    }
    // A domain is as good as its best service.
    order(&mut domains, |services| services[0], random);
    let mut placed = Vec::with_capacity(count);
    for round in 0.. {
        for services in &domains {
            if let Some(candidate) = services.get(round) {
                placed.push(candidate.service);
                if placed.len() == count {
                    return Ok(placed);
                }
            }
        }
    }
    Ok(placed)
}

#[derive(Clone, Copy)]
struct Candidate {
    service: u64,
    room: u64,
    is_new: bool,
}

/// Puts those of the span before first, and the others in random order that leans towards room: each place goes to
/// the roomier of two that were drawn (the power of two choices; Mitzenmacher, 2001).
fn order<T>(items: &mut [T], of: impl Fn(&T) -> Candidate, random: &mut dyn FnMut() -> u64) {
    items.sort_by_key(|item| of(item).is_new);
    let first_new = items.partition_point(|item| !of(item).is_new);
    let items = &mut items[first_new..];
    for i in 0..items.len() {
        let left = (items.len() - i) as u64;
        let (a, b) = (i + (random() % left) as usize, i + (random() % left) as usize);
        let roomier = if of(&items[a]).room >= of(&items[b]).room { a } else { b };
        items.swap(i, roomier);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn services(domains: &[usize]) -> Vec<BlockService> {
        let mut all = Vec::new();
        for (domain, count) in domains.iter().enumerate() {
            for _ in 0..*count {
                all.push(BlockService {
                    service_id: all.len() as u64 + 1,
                    failure_domain: format!("d{domain}"),
                    available_bytes: 1 << 30,
                    ..BlockService::default()
                });
            }
        }
        all
    }

    fn draw(domains: &[usize], op: &InitiateSpan, count: usize) -> Result<Vec<u64>, Stop> {
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state >> 33
        };
        place(&services(domains), op, count, 4096, &[], &mut random)
    }

    #[test]
    fn domains_are_shared_only_when_there_are_too_few() {
        let domain = |s: &u64, domains: &[usize]| {
            let mut rest = *s as usize;
            domains
                .iter()
                .position(|n| {
                    rest <= *n || {
                        rest -= n;
                        false
                    }
                })
                .expect("in a domain")
        };
        for (domains, count) in
            [(&[1, 1, 1, 1, 1, 1, 1, 1][..], 6), (&[2, 2, 2], 6), (&[5, 1], 4), (&[3, 3, 3], 3)]
        {
            let placed = draw(domains, &InitiateSpan::default(), count).expect("enough");
            let mut per_domain = vec![0; domains.len()];
            placed.iter().for_each(|s| per_domain[domain(s, domains)] += 1);
            let distinct: std::collections::BTreeSet<_> = placed.iter().collect();
            assert_eq!(distinct.len(), count);
            assert_eq!(
                per_domain.iter().filter(|n| **n > 0).count(),
                count.min(domains.len()),
                "{per_domain:?}"
            );
        }
    }

    #[test]
    fn the_span_before_comes_first_and_room_counts() {
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state >> 33
        };
        let mut services = services(&[1; 12]);
        let op = InitiateSpan::default();
        for _ in 0..100 {
            let placed = place(&services, &op, 4, 4096, &[3, 5, 99], &mut random).expect("enough");
            assert!(placed.contains(&3) && placed.contains(&5), "{placed:?}");
        }
        // The first half has ten times the room.
        for service in &mut services[..6] {
            service.available_bytes *= 10;
        }
        let mut drawn = [0; 2];
        for _ in 0..1000 {
            for service in place(&services, &op, 3, 4096, &[], &mut random).expect("enough") {
                drawn[usize::from(service > 6)] += 1;
            }
        }
        assert!(drawn[0] > 2 * drawn[1] && drawn[1] > 200, "{drawn:?}");
    }

    #[test]
    fn too_few_services_is_no_space() {
        let avoid = InitiateSpan { avoid_services: vec![1], ..InitiateSpan::default() };
        for result in [draw(&[1, 1], &InitiateSpan::default(), 3), draw(&[1, 1, 1], &avoid, 3)] {
            match result {
                Err(Stop::Refused(refusal)) => assert_eq!(refusal.code, Code::NoSpace),
                other => panic!("{other:?}"),
            }
        }
    }
}
