//! Nonces from a seed.
//!
//! Owns: SplitMix64. Must not know: where the seed comes from (the operating system, or a simulation).
//! Invariant: one sequence never repeats a nonce within 2^64 draws and never gives 0; two sequences of
//! independent random seeds share a nonce among n draws each with probability about 2n/2^64.

/// A sequence of nonces (SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number
/// generators", 2014). Not secret: whoever saw one can compute the next.
#[derive(Clone, Debug)]
pub struct Nonces {
    state: u64,
}

impl Nonces {
    /// The sequence of a seed.
    pub const fn new(seed: u64) -> Nonces {
        Nonces { state: seed }
    }

    /// The next nonce, never 0.
    pub fn draw(&mut self) -> u64 {
        loop {
            self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = self.state;
            mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^= mixed >> 31;
            if mixed != 0 {
                return mixed;
            }
        }
    }

    /// A number below `bound`, which is not 0. Biased by less than `bound` / 2^64.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.draw() % bound
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonces_differ_and_follow_the_seed() {
        let mut seen = std::collections::HashSet::new();
        let (mut one, mut same, mut other) = (Nonces::new(1), Nonces::new(1), Nonces::new(2));
        for _ in 0..10_000 {
            let nonce = one.draw();
            assert_eq!(nonce, same.draw());
            assert!(seen.insert(nonce));
            assert!(seen.insert(other.draw()));
        }
    }
}
