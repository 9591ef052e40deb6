//! clutch-server.
