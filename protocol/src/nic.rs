//! virtio-net slots.
//!
//! A slot is made before anybody knows what it will be connected to, so its address only says which slot it is; the
//! agent gives the interface the address that it has on the host. The kernel keeps the first one as the permanent
//! address.

/// Queue pairs that an interface has at most: each costs a guest that uses it some hundred KiB of buffers.
pub const MAX_QUEUE_PAIRS: u8 = 4;

/// Queue pairs of each interface of a machine, which are as many queues of its tap.
pub const fn queue_pairs(vcpus: u8) -> u8 {
    match vcpus {
        0 => 1,
        1..=MAX_QUEUE_PAIRS => vcpus,
        _ => MAX_QUEUE_PAIRS,
    }
}

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
    fn there_is_a_pair_for_each_vcpu_up_to_the_most() {
        let pairs = [0, 1, 2, 3, 4, 5, 255].map(queue_pairs);
        assert_eq!(pairs, [1, 1, 2, 3, 4, 4, 4]);
    }

    #[test]
    fn a_slots_address_is_a_private_unicast_one_of_its_own() {
        for slot in 0..=u8::MAX {
            assert_eq!(slot_mac(slot)[0] & 3, 2);
            assert_eq!(slot_mac(slot)[5], slot);
        }
    }
}
