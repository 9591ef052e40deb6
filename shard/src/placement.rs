//! Where a span's blocks go: distinct services, and distinct failure domains while there are enough.

use std::collections::BTreeMap;

use clutch_proto::{
    mutants::{self, Mutant},
    shard::InitiateSpan,
    types::{BlockService, Code},
};
use clutch_state::Stop;

/// The service takes no new blocks.
pub const FLAG_NO_WRITE: u32 = 1;
/// The service is gone for good.
pub const FLAG_GONE: u32 = 2;

/// Draws `count` services for blocks of `block_bytes`.
///
/// Domains are drawn in random order and each gives one service before any gives a second.
pub(crate) fn place(
    services: &[BlockService],
    op: &InitiateSpan,
    count: usize,
    block_bytes: u32,
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
    let mut domains: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for service in services.iter().filter(fits) {
        domains.entry(&service.failure_domain).or_default().push(service.service_id);
    }
    let usable: usize = domains.values().map(Vec::len).sum();
    if usable < count {
        return Err(Stop::refuse(
            Code::NoSpace,
            format!(
                "a span of {count} blocks needs {count} block services with room; {usable} of {} can be used \
                 (add disks, or choose a policy with fewer blocks)",
                services.len()
            ),
        ));
    }
    let mut domains: Vec<Vec<u64>> = domains.into_values().collect();
    for services in &mut domains {
        shuffle(services, random);
    }
    shuffle(&mut domains, random);
    let mut placed = Vec::with_capacity(count);
    for round in 0.. {
        for services in &domains {
            if let Some(service) = services.get(round) {
                placed.push(*service);
                if placed.len() == count {
                    return Ok(placed);
                }
            }
        }
    }
    Ok(placed)
}

fn shuffle<T>(items: &mut [T], random: &mut dyn FnMut() -> u64) {
    for i in (1..items.len()).rev() {
        items.swap(i, (random() % (i as u64 + 1)) as usize);
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
        place(&services(domains), op, count, 4096, &mut random)
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
