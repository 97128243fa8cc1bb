//! virtio-net slots.
//!
//! A slot is made before anybody knows what it will be connected to, so its address only says which slot it is; the
//! agent gives the interface the address that it has on the host. The kernel keeps the first one as the permanent
//! address.

/// What a slot's address begins with: locally administered, then `vmsh`.
const PREFIX: [u8; 5] = [0x02, b'v', b'm', b's', b'h'];

/// The address by which the guest knows a slot.
pub const fn slot_mac(slot: u8) -> [u8; 6] {
    let [a, b, c, d, e] = PREFIX;
    [a, b, c, d, e, slot]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slots_address_is_a_private_unicast_one_of_its_own() {
        for slot in 0..=u8::MAX {
            assert_eq!(slot_mac(slot)[0] & 3, 2);
            assert_eq!(slot_mac(slot)[5], slot);
        }
    }
}
