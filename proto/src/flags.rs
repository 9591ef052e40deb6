//! What the registry says of a block service, in bits.

/// No new blocks are placed on the service.
pub const FLAG_NO_WRITE: u32 = 1;
/// The service is gone for good: its blocks are lost, and erasing them needs no proof.
pub const FLAG_GONE: u32 = 2;
/// The service's blocks are to be moved to others; set together with [`FLAG_NO_WRITE`].
pub const FLAG_DRAIN: u32 = 4;
/// The service has not answered for too long, and [`FLAG_DRAIN`] was set for that: who set it clears it when the service is back.
pub const FLAG_CONDEMNED: u32 = 8;
/// [`FLAG_NO_WRITE`] was set before the service was condemned, and stays when it is back.
pub const FLAG_STAYS_NO_WRITE: u32 = 16;
