//! How the guest ends the machine: in order, or by a reset.

use vmshim_protocol::control::Outcome;
use vmshim_protocol::power::POWER_OFF;

use crate::bus::BusDevice;
use crate::machine::Ending;

/// The one command of the keyboard controller that Linux uses with `reboot=k`: pulse the reset line.
const PULSE_RESET: u8 = 0xfe;

/// Ports 0x60 to 0x64 as far as a reset needs them. Linux resets the machine when it panics, and a reset by anything
/// else is none of the ways in which a guest ends in order.
pub struct KeyboardController(Ending);

impl KeyboardController {
    /// First port.
    pub const PORT: u64 = 0x60;
    /// Ports taken up.
    pub const PORTS: u64 = 5;
    /// The command port, from the first one.
    const COMMAND: u64 = 4;

    /// A controller that resets the machine by ending it.
    pub fn new(ending: Ending) -> Self {
        Self(ending)
    }
}

impl BusDevice for KeyboardController {
    /// No key, and always ready for a command.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == Self::COMMAND && data.contains(&PULSE_RESET) {
            self.0.declare(Outcome::Panicked);
        }
    }
}

/// The port of [`vmshim_protocol::power`].
pub struct PowerPort(Ending);

impl PowerPort {
    /// A port that ends the machine.
    pub fn new(ending: Ending) -> Self {
        Self(ending)
    }
}

impl BusDevice for PowerPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data == [POWER_OFF] {
            self.0.declare(Outcome::PoweredOff);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_is_a_crash() {
        let ending = Ending::new().unwrap();
        let controller = KeyboardController::new(ending.clone());
        controller.write(0, &[PULSE_RESET]);
        controller.write(4, &[0xd1]);
        assert_eq!(ending.outcome(), None);
        controller.write(4, &[PULSE_RESET]);
        assert_eq!(ending.outcome(), Some(Outcome::Panicked));
    }

    #[test]
    fn power_off_is_not() {
        let ending = Ending::new().unwrap();
        let port = PowerPort::new(ending.clone());
        for other in [&[][..], &[0], &[2], &[1, 0]] {
            port.write(0, other);
        }
        assert_eq!(ending.outcome(), None);
        port.write(0, &[POWER_OFF]);
        assert_eq!(ending.outcome(), Some(Outcome::PoweredOff));
    }
}
