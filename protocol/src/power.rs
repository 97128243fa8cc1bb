//! How a guest ends its machine.
//!
//! A guest that is done writes the byte [`POWER_OFF`] to I/O port [`POWER_PORT`] (`ioperm(2)`, then `outb`); the VMM
//! stops it at that instruction and reports `Outcome::PoweredOff`. What must
//! reach a disk or a stream has to be on its way before. A guest that resets in any other way has crashed.

/// The I/O port, one byte wide.
pub const POWER_PORT: u16 = 0x600;

/// Ends the machine in order.
pub const POWER_OFF: u8 = 1;
