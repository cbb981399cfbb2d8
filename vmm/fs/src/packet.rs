//! FUSE packets: where their fields are, what is in the number of a node, and answers that are made here.

/// Bytes of `fuse_in_header`.
pub const IN_HEADER: usize = 40;

/// The root of all, and within each owner's file system that of its own.
pub const ROOT: u64 = 1;
/// Where a node's number has that of its owner's file system.
pub const INDEX_SHIFT: u32 = 56;

/// The index of the owner whose a node is.
#[must_use]
pub fn owner_index(node: u64) -> u8 {
    (node >> INDEX_SHIFT) as u8
}

/// The number of an owner's node among those of all.
#[must_use]
pub fn node_of(index: u8, number: u64) -> u64 {
    u64::from(index) << INDEX_SHIFT | number
}

/// The answer with an error number to a packet.
#[must_use]
pub fn refusal(packet: &[u8], error: i32) -> [u8; 16] {
    let mut reply = [0; 16];
    reply[..4].copy_from_slice(&16_u32.to_le_bytes());
    reply[4..8].copy_from_slice(&(-error).to_le_bytes());
    if let Some(unique) = packet.get(8..16) {
        reply[8..].copy_from_slice(unique);
    }
    reply
}

/// The answer to a packet that is a number, or an error number.
#[must_use]
pub fn answer(packet: &[u8], result: Result<u64, i32>) -> Vec<u8> {
    match result {
        Ok(number) => {
            let mut reply = [&refusal(packet, 0)[..], &number.to_le_bytes()].concat();
            reply[0] = 24;
            reply
        }
        Err(error) => refusal(packet, error).to_vec(),
    }
}

/// The little-endian word at `offset`, if the packet is as long.
pub fn word(packet: &[u8], offset: usize) -> Option<u32> {
    let bytes = packet.get(offset..offset + 4)?;
    bytes.try_into().ok().map(u32::from_le_bytes)
}

/// The little-endian double word at `offset`, if the packet is as long.
pub fn double_word(packet: &[u8], offset: usize) -> Option<u64> {
    let bytes = packet.get(offset..offset + 8)?;
    bytes.try_into().ok().map(u64::from_le_bytes)
}

/// Writes a little-endian double word at `offset`, if the packet is as long.
pub fn put(packet: &mut [u8], offset: usize, value: u64) {
    if let Some(place) = packet.get_mut(offset..offset + 8) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_numbers_or_errors() {
        let mut request = [0; IN_HEADER + 24];
        request[8] = 7;
        let number = answer(&request, Ok(0x0102));
        assert_eq!(number[..9], [24, 0, 0, 0, 0, 0, 0, 0, 7]);
        assert_eq!(number[16..], [2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(answer(&request, Err(38)), refusal(&request, 38));
        assert_eq!(refusal(&request, 38)[4..9], [218, 255, 255, 255, 7]);
    }
}
