//! The unique id: where the ranks meet, and which fault they agreed on.
//!
//! Owns: the layout of its 128 bytes. Refuses to know: sockets.
//!
//! Bytes 0..8 magic, 8..10 port, 10..18 token, 18 kind of the fault, 19..23 its rank, 23..31 its call; little-endian.

use std::ffi::c_int;

use crate::fault::Fault;

const MAGIC: [u8; 8] = *b"WCMOCKID";

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct UniqueId {
    internal: [u8; 128],
}

impl UniqueId {
    pub(crate) fn new(port: u16, token: u64, fault: Fault) -> Self {
        let mut internal = [0; 128];
        internal[..8].copy_from_slice(&MAGIC);
        internal[8..10].copy_from_slice(&port.to_le_bytes());
        internal[10..18].copy_from_slice(&token.to_le_bytes());
        let mut id = Self { internal };
        id.set_fault(fault);
        id
    }

    pub(crate) fn set_fault(&mut self, fault: Fault) {
        self.internal[18] = fault.kind as u8;
        self.internal[19..23].copy_from_slice(&fault.rank.to_le_bytes());
        self.internal[23..31].copy_from_slice(&fault.call.to_le_bytes());
    }

    pub(crate) fn is_ours(&self) -> bool {
        self.internal[..8] == MAGIC
    }

    pub(crate) fn port(&self) -> u16 {
        u16::from_le_bytes(self.field(8))
    }

    pub(crate) fn token(&self) -> u64 {
        u64::from_le_bytes(self.field(10))
    }

    pub(crate) fn fault(&self) -> Fault {
        let (rank, call) = (u32::from_le_bytes(self.field(19)), u64::from_le_bytes(self.field(23)));
        Fault::new(c_int::from(self.internal[18]), rank, call).unwrap_or(Fault::NONE)
    }

    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut field = [0; N];
        field.copy_from_slice(&self.internal[at..at + N]);
        field
    }
}
