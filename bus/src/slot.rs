//! Numbers that names stand for: slots, and hashes that outlive a process.
//!
//! Owns: both functions. Must not know: what is kept under them.
//! Invariant: the same on every node and in every release, for subjects, partitions and positions are made of them.

/// Slots of the bus, all nodes together: users are routed by them, and interest may be.
pub const SLOTS: u16 = 4_096;

/// The slot of a channel. A user's is that of the user's own channel, `user:{id}`.
pub fn slot_of(channel: &str) -> u16 {
    crc16(channel.bytes()) % SLOTS
}

/// CRC-16/XMODEM, which Redis Cluster uses: polynomial 0x1021, from 0.
pub fn crc16(bytes: impl Iterator<Item = u8>) -> u16 {
    bytes.fold(0, |crc, byte| (crc << 8) ^ CRC16[usize::from((crc >> 8) as u8 ^ byte)])
}

const CRC16: [u16; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = (index as u16) << 8;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 0x8000 != 0 { (crc << 1) ^ 0x1021 } else { crc << 1 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
};

/// FNV-1a with the finalizer of SplitMix64.
pub fn hash(seed: u64, name: &str) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325 ^ seed;
    for byte in name.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ hash >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_of_crc16() {
        assert_eq!(crc16(b"123456789".iter().copied()), 0x31c3);
        assert_eq!(slot_of("123456789"), 0x31c3 % SLOTS);
    }
}
