//! Certificates: nothing that was not signed is taken, and nothing panics.
#![no_main]

use clutch_proto::{
    ServiceId, Time,
    certificate::{Claims, Key, Operation},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // The key of the corpus is another: whatever passes was forged.
    let keys = [Key { epoch: 1, secret: [3; 32] }, Key { epoch: 0, secret: [4; 32] }];
    if let Ok(claims) = Claims::verify(data, &keys) {
        panic!("a forged certificate was taken: {claims:?}");
    }
    // Under the corpus's own key, what is taken must be just what was signed.
    let key = Key { epoch: 1, secret: [7; 32] };
    if let Ok(claims) = Claims::verify(data, std::slice::from_ref(&key)) {
        assert_eq!(&claims.sign(&key)[..], data);
        for operation in [Operation::Read, Operation::Write, Operation::Erase, Operation::Check] {
            let _ = claims.check_grant(operation, 1, ServiceId(2), Time(u64::MAX / 2), 60_000);
        }
    }
});
