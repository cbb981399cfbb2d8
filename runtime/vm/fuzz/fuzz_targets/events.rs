#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| hull_vm::fuzz::events(input));
