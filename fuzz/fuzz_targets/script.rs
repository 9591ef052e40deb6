//! The text of a script: read or refused with its line, and what was read survives its own text.
#![no_main]

use clutch_integration::script::Script;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(script) = text.parse::<Script>() {
        let text = script.to_string();
        let again: Script = text.parse().expect("reads what it wrote");
        assert_eq!(again.to_string(), text);
    }
});
