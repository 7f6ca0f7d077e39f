//! Replays the committed corpora of the fuzz targets, and a short run of random changes to them.
//!
//! The changes come from a fixed seed: the same ones on every run. What the fuzzer finds becomes a
//! file of the corpus.

#[path = "../fuzz/targets.rs"]
mod targets;

use std::path::{Path, PathBuf};

/// Changed copies tried of every corpus file.
const MUTATIONS_PER_FILE: u32 = 400;

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn every_target_has_a_corpus_that_passes() {
    for (name, target) in targets::ALL {
        let files = corpus(name);
        assert!(files.len() >= 5, "{name} has {} files", files.len());
        for (path, bytes) in files {
            println!("{}", path.display());
            target(&bytes);
        }
    }
}

#[test]
fn changed_inputs_pass_too() {
    let mut random = Xorshift(0x9e37_79b9_7f4a_7c15);
    for (name, target) in targets::ALL {
        let files = corpus(name);
        for (path, bytes) in &files {
            for _ in 0..MUTATIONS_PER_FILE {
                let other = &files[random.below(files.len())].1;
                let changed = mutate(bytes, other, &mut random);
                println!("{}: {changed:?}", path.display());
                target(&changed);
            }
        }
    }
}

/// One to four changes: a byte flipped, set, removed, doubled, or the tail of another file.
fn mutate(bytes: &[u8], other: &[u8], random: &mut Xorshift) -> Vec<u8> {
    const INTERESTING: &[u8] = b"\0\x7f\x80\xff\"\\{}[]:,\n\r 0-e";
    let mut changed = bytes.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(changed.len() + 1);
        match (random.below(6), changed.get_mut(at)) {
            (0, Some(byte)) => *byte ^= 1 << random.below(8),
            (1, Some(byte)) => *byte = INTERESTING[random.below(INTERESTING.len())],
            (2, Some(_)) => drop(changed.remove(at)),
            (3, _) => changed.insert(at, INTERESTING[random.below(INTERESTING.len())]),
            (4, _) => changed.truncate(at),
            _ => {
                changed.truncate(at);
                changed.extend_from_slice(&other[random.below(other.len() + 1)..]);
            }
        }
    }
    changed
}

/// Marsaglia's generator: enough to choose changes.
struct Xorshift(u64);

impl Xorshift {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((u128::from(self.0) * bound as u128) >> 64) as usize
    }
}
