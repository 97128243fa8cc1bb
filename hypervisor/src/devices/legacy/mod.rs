//! The few PC devices that Linux still wants: a serial port for its console, and ports to end the machine.

mod console;
mod reset;
mod serial;

pub use console::Console;
pub use reset::{KeyboardController, PowerPort};
pub use serial::{SERIAL_IRQ, SERIAL_PORT, SERIAL_PORTS, Serial};
