use clutch_integration::{
    generate::{Profile, generate},
    run::run,
};
#[test]
fn try_seeds() {
    let from: u64 = std::env::var("FROM").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let n: u64 = std::env::var("N").ok().and_then(|s| s.parse().ok()).unwrap_or(5);
    let begin = std::time::Instant::now();
    let (mut ops, mut reqs, mut faults) = (0, 0, 0);
    for seed in from..from + n {
        let start = std::time::Instant::now();
        let script = generate(seed, Profile::Mixed);
        let report = run(&script);
        ops += report.operations;
        reqs += report.requests;
        faults += report.faults.values().sum::<u64>();
        println!(
            "seed {seed} {:?} ops {} reqs {} faults {} virt {:?} took {:?} hash {:x} v {}",
            script.cluster.engine,
            report.operations,
            report.requests,
            report.faults.values().sum::<u64>(),
            report.elapsed,
            start.elapsed(),
            report.trace_hash,
            report.violations.len()
        );
        for v in report.violations.iter().take(4) {
            println!("   {}: {}", v.checker, &v.what[..v.what.len().min(600)]);
        }
        if std::env::var("TL").is_ok() {
            for (at, what) in &report.timeline {
                println!("{at:?} {what}");
            }
        }
    }
    println!("total ops {ops} reqs {reqs} faults {faults} in {:?}", begin.elapsed());
}
