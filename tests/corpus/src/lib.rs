//! Runs fuzz targets without a fuzzer, for the tests of the crates that have them: over the inputs that are
//! kept for a target, and over mutations of these that are the same each time.

#![forbid(unsafe_code)]

use std::{env, fs, panic, path::Path, thread};

/// How many mutations a target runs over, unless HULL_FUZZ_MUTATIONS says otherwise.
const MUTATIONS: u64 = 500;
/// The longest input, in bytes; `make fuzz` makes none that is longer.
const LONGEST: usize = 4096;
/// Numbers at which lengths and counters go wrong.
const EDGES: [u64; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    u64::MAX,
];

/// A fuzz target: its name, which is that of its inputs' directory below `tests/fuzz/corpus`, and what it does.
pub type Target = (&'static str, fn(&[u8]));

/// Runs each target over its inputs and over mutations of them.
///
/// # Panics
/// When a target does, after the input was written to a file that is named on standard error; or when a
/// target has no inputs.
pub fn replay(targets: &[Target]) {
    let mutations = env::var("HULL_FUZZ_MUTATIONS").map_or(MUTATIONS, |number| {
        number.parse().expect("HULL_FUZZ_MUTATIONS is a number")
    });
    for &(name, run) in targets {
        let corpus = corpus(name);
        assert!(!corpus.is_empty(), "tests/fuzz/corpus/{name} has no inputs");
        for input in &corpus {
            run_or_keep(name, run, input);
        }
        for seed in 0..mutations {
            run_or_keep(name, run, &mutated(&corpus, Random::new(name, seed)));
        }
    }
}

/// The inputs of a target, by file name.
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(name);
    let entries = fs::read_dir(&directory);
    let entries = entries.unwrap_or_else(|error| panic!("read {}: {error}", directory.display()));
    let mut paths: Vec<_> = entries
        .map(|entry| entry.expect("list inputs").path())
        .collect();
    paths.sort();
    let read = |path| fs::read(path).expect("read an input");
    paths.into_iter().map(read).collect()
}

fn run_or_keep(name: &str, run: fn(&[u8]), input: &[u8]) {
    let keep = Keep { name, input };
    run(input);
    drop(keep);
}

/// Writes the input to a file if the target panics.
struct Keep<'a> {
    name: &'a str,
    input: &'a [u8],
}

impl Drop for Keep<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let file = env::temp_dir().join(format!("{}-failed", self.name));
            let (name, path) = (self.name, file.display());
            match fs::write(&file, self.input) {
                Ok(()) => eprintln!(
                    "fuzz target {name} failed with {path}: make fuzz TARGET={name} INPUT={path}"
                ),
                Err(error) => eprintln!("write {path}: {error}"),
            }
        }
    }
}

/// Changes an input in a few places.
fn mutated(corpus: &[Vec<u8>], mut random: Random) -> Vec<u8> {
    let mut bytes = corpus[random.below(corpus.len())].clone();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        let length = random
            .below(bytes.len() - at + 1)
            .min(1 << random.below(10));
        match random.below(8) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.next() as u8,
            2 => drop(bytes.drain(at..at + length)),
            3 => {
                let copied = bytes[at..at + length].to_vec();
                let to = random.below(bytes.len() + 1);
                drop(bytes.splice(to..to, copied));
            }
            4 => {
                let noise = (0..random.below(16)).map(|_| random.next() as u8);
                let noise: Vec<u8> = noise.collect();
                drop(bytes.splice(at..at, noise));
            }
            5 => {
                // A number of some width, in either byte order.
                let number = EDGES[random.below(EDGES.len())].to_le_bytes();
                let mut number = number[..1 << random.below(4)].to_vec();
                if random.below(2) == 0 {
                    number.reverse();
                }
                let end = bytes.len().min(at + number.len());
                drop(bytes.splice(at..end, number));
            }
            6 => {
                let other = &corpus[random.below(corpus.len())];
                let from = random.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            _ => bytes.truncate(at),
        }
    }
    bytes.truncate(LONGEST);
    bytes
}

/// Random numbers that are the same for the same seed (SplitMix64).
struct Random(u64);

impl Random {
    fn new(name: &str, seed: u64) -> Self {
        let mix = |state: u64, byte| (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        Self(
            name.bytes()
                .fold(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), mix),
        )
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`, which is not 0.
    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mutations_are_the_same_each_time_and_differ() {
        let corpus = [b"one input".to_vec(), b"another".to_vec(), Vec::new()];
        let make = |name, seed| mutated(&corpus, Random::new(name, seed));
        let all: Vec<_> = (0..1000).map(|seed| make("a", seed)).collect();
        assert_eq!(
            all,
            (0..1000).map(|seed| make("a", seed)).collect::<Vec<_>>()
        );
        let different: std::collections::HashSet<_> = all.iter().collect();
        assert!(different.len() > 500, "{}", different.len());
        assert!(all.iter().all(|input| input.len() <= LONGEST));
        assert_ne!(
            all,
            (0..1000).map(|seed| make("b", seed)).collect::<Vec<_>>()
        );
    }
}
